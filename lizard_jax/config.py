"""Every setting of the project as frozen dataclasses, with the named attention presets.

A field carries its own help text (``option``); the command line and the documentation read it from there.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from lizard_jax.errors import UserError

HEAD = re.compile(r"[0-9]{1,6}\.[0-9]{1,6}")
"""A key head's name: its layer and its number there."""
BUDGET = re.compile(r"([0-9]{1,6})\.([0-9]{1,6})=([0-9]{1,8})\+([0-9]{1,7})")
"""A key head's budget: its name, its window and its kept pairs."""


def option(default: Any, help: str) -> Any:
    """A dataclass field with a default and the help text that ``--help`` shows."""
    return field(default=default, metadata={"help": help})


# ---------------------------------------------------------------------------------------------- the decoder


@dataclass(frozen=True)
class YarnConfig:
    """What YaRN adds to a factor: pairs that turn more often than ``beta_fast`` in the original context keep their
    frequency, those that turn less often than ``beta_slow`` are interpolated, and cos and sin are scaled."""

    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class LongRopeConfig:
    """What LongRoPE divides each pair's frequency by, in texts within the original context and beyond it, and what cos
    and sin are scaled by in both."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    attention_factor: float = 1.0


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding, as transformers computes it.

    ``kind`` is the ``rope_type`` of an HF config. ``factor`` belongs to every kind but ``default``;
    ``low_freq_factor`` and ``high_freq_factor`` to ``llama3``, and ``original_max_positions`` to it, ``dynamic``,
    ``yarn`` and ``longrope``; the last two to the kinds of their names.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    # Not in the repr, which old runs are known by.
    yarn: YarnConfig | None = field(default=None, repr=False)
    longrope: LongRopeConfig | None = field(default=None, repr=False)


@dataclass(frozen=True)
class LizardConfig:
    """The attention that replaces softmax: which published variant, or ours, as a choice of switches.

    Raises:
        UserError: a value out of range, or a pair of switches that has no meaning.
    """

    act: Literal["softmax", "exp"] = option("exp", "feature activation: softmax over features, or exp")
    feature_start: Literal["identity", "random", "slow"] = option(
        "slow",
        "how the feature maps A start: identity, random, or random on slow RoPE pairs, one for a key head's heads",
    )
    feature_half: int = option(0, "half-width of the feature map (F is twice this); 0 means the head width")
    window: int = option(128, "W, the tokens the softmax window sees")
    window_rope: bool = option(True, "rotate q and k inside the window")
    linear_rope: bool = option(False, "rotate q and k before the feature map")
    meta: Literal["none", "sink", "prefix", "learned"] = option("prefix", "meta memory of the window branch")
    meta_tokens: int = option(4, "M, the number of meta tokens")
    memory: Literal["all", "evicted", "none"] = option(
        "evicted", "what the linear branch holds: all tokens, those that left the window, or none (window only)"
    )
    combine: Literal["sum", "joint"] = option("joint", "y_g + alpha*y_w, or one softmax over both branches")
    kept: int = option(0, "X, the exact pairs a key head keeps of what left its window, by attention received")
    gate: Literal["scalar", "mamba2", "low_rank", "channel", "pooled", "none"] = option("scalar", "forget gate")
    gate_bias: bool = option(True, "give the scalar gate a learned bias, spread from 1 to 6 across the heads")
    state_heads: Literal["kv", "query"] = option("kv", "one state per key/value head, or per query head")
    beta_start: float = option(-12.0, "where beta, the joint merge's bias towards the linear branch, starts")
    measured_start: bool = option(True, "start gates and beta where a little training text says (scalar gate, joint)")
    chunk: int = option(64, "C, the chunk length of the linear branch")
    softmax_layers: tuple[int, ...] = option((), "layers that keep the teacher's softmax attention")
    softmax_heads: tuple[str, ...] = option((), "key heads that keep it, as LAYER.HEAD; --heads takes them from a file")
    retrieval_window: int = option(0, "tokens that softmax_heads see, beside the first; 0 keeps all in a growing cache")
    budgets: tuple[str, ...] = option((), "key heads with a window and kept pairs of their own, as LAYER.HEAD=W+X")

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            allowed = get_args(one.type) if get_origin(one.type) is Literal else ()
            if allowed and getattr(self, one.name) not in allowed:
                raise UserError(
                    f"attention {one.name}={getattr(self, one.name)!r} is unknown; choose from {', '.join(allowed)}"
                )
        for name in ("window", "chunk", "meta_tokens"):
            if not 1 <= getattr(self, name) <= 2**24:
                raise UserError(f"attention {name}={getattr(self, name)} must be at least 1 and at most {2**24}")
        if not 0 <= self.kept <= 2**20:
            raise UserError(f"attention kept={self.kept} must be 0 (none) or up to {2**20}")
        if not 0 <= self.retrieval_window <= 2**24:
            raise UserError(f"attention retrieval_window={self.retrieval_window} must be 0 (keep all) or up to {2**24}")
        if 0 < self.retrieval_window < self.window:
            raise UserError(
                f"attention retrieval_window={self.retrieval_window} is below the window of {self.window}, which every "
                "head has"
            )
        if wrong := [name for name in self.softmax_heads if not (isinstance(name, str) and HEAD.fullmatch(name))]:
            raise UserError(f"softmax-heads names {', '.join(map(repr, wrong))}; a key head is LAYER.HEAD, as '3.0'")
        # One spelling and one order, so that the same choice is the same setting.
        heads = sorted({tuple(map(int, name.split("."))) for name in self.softmax_heads})
        object.__setattr__(self, "softmax_heads", tuple(f"{layer}.{head}" for layer, head in heads))
        self._check_budgets()
        if not 0 <= self.feature_half <= 2**14:
            raise UserError(f"attention feature_half={self.feature_half} must be 0 (the head width) or 1 to {2**14}")
        if not math.isfinite(self.beta_start):
            raise UserError(f"attention beta_start={self.beta_start} must be a finite number")
        if self.memory == "all" and self.combine == "joint":
            raise UserError(
                "attention memory=all with combine=joint counts the window's tokens twice; "
                "use memory=evicted with joint, or combine=sum with all"
            )
        if self.memory == "all" and (self.kept or any(kept for _, kept in self.own_budgets.values())):
            raise UserError("attention memory=all would count kept pairs twice; give kept=0, or memory=evicted")
        if self.memory == "none" and self.combine == "sum":
            raise UserError("attention memory=none has no linear branch to sum; use combine=joint")
        if self.gate_bias and self.gate != "scalar":
            raise UserError(
                f"attention gate_bias=true belongs to gate=scalar, not gate={self.gate}; set gate_bias=false"
            )

    def _check_budgets(self) -> None:
        """Each head once, in one order, and none that has what all have: one choice is one setting."""
        found: dict[tuple[int, int], tuple[int, int]] = {}
        for text in self.budgets:
            match = BUDGET.fullmatch(text) if isinstance(text, str) else None
            if match is None:
                raise UserError(f"budgets has {text!r}; a head's budget is LAYER.HEAD=W+X, as '3.0=64+128'")
            layer, head, window, kept = map(int, match.groups())
            if not 1 <= window <= 2**24 or kept > 2**20:
                raise UserError(f"budgets has {text!r}; a window is 1 to {2**24}, kept pairs are 0 to {2**20}")
            if (layer, head) in found:
                raise UserError(f"budgets names the key head {layer}.{head} twice")
            if f"{layer}.{head}" in self.softmax_heads:
                raise UserError(f"budgets and softmax-heads both name the key head {layer}.{head}; leave it out of one")
            found[layer, head] = window, kept
        own = {head: budget for head, budget in sorted(found.items()) if budget != (self.window, self.kept)}
        texts = (f"{layer}.{head}={window}+{kept}" for (layer, head), (window, kept) in own.items())
        object.__setattr__(self, "budgets", tuple(texts))

    @property
    def own_budgets(self) -> dict[tuple[int, int], tuple[int, int]]:
        """By layer and key head, the window and the kept pairs of those that ``budgets`` names."""
        matches = (BUDGET.fullmatch(text) for text in self.budgets)
        numbers = (tuple(map(int, match.groups())) for match in matches if match is not None)
        return {(layer, head): (window, kept) for layer, head, window, kept in numbers}

    def budget(self, layer: int, head: int) -> tuple[int, int]:
        """The window and the kept pairs of a key head."""
        return self.own_budgets.get((layer, head), (self.window, self.kept))

    def exact_heads(self, layer: int) -> tuple[int, ...]:
        """The key heads of a layer that keep softmax attention by name; ``softmax_layers`` are not among them."""
        if layer in self.softmax_layers:
            return ()
        pairs = (name.split(".") for name in self.softmax_heads)
        return tuple(int(head) for own, head in pairs if int(own) == layer)

    @property
    def adds_modules(self) -> bool:
        """Whether stage 1 has anything to train: a window with real first tokens has no parameters of its own."""
        return self.memory != "none" or self.meta in ("sink", "learned")


PRESETS: dict[str, LizardConfig] = {
    "lizard_paper": LizardConfig(
        act="softmax", feature_start="identity", window_rope=False, meta="prefix", memory="all", combine="sum",
        gate_bias=False, state_heads="query", measured_start=False,
    ),
    "lizard_sink": LizardConfig(
        act="softmax", feature_start="identity", window_rope=False, meta="sink", memory="all", combine="sum",
        gate_bias=False, state_heads="query", measured_start=False,
    ),
    "lolcats": LizardConfig(
        act="softmax", feature_start="identity", linear_rope=True, meta="none", gate="none", gate_bias=False,
        state_heads="query", beta_start=0.0, measured_start=False,
    ),
    "lizard": LizardConfig(),
}  # fmt: skip


def preset(name: str) -> LizardConfig:
    """The named attention preset.

    Raises:
        UserError: no preset has that name.
    """
    if name not in PRESETS:
        raise UserError(f"unknown attention preset {name!r}; choose from {', '.join(PRESETS)}")
    return PRESETS[name]


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-style decoder: what an HF ``config.json`` says of it, and which attention its layers carry."""

    architecture: Literal["llama", "mistral", "qwen2", "qwen3"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    hidden_act: str = "silu"
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_window_layers: tuple[int, ...] | None = None  # None: every layer, where sliding_window is set
    attention: LizardConfig | None = None  # None: the teacher's softmax attention

    def __post_init__(self) -> None:
        kept = self.attention.softmax_layers if self.attention is not None else ()
        absent = [layer for layer in kept if not 0 <= layer < self.num_layers]
        if absent:
            named = ", ".join(map(str, absent))
            raise UserError(f"softmax-layers names {named}, and the model has layers 0 to {self.num_layers - 1}")
        if kept and len(set(kept)) == self.num_layers:
            raise UserError("softmax-layers names every layer, so that nothing would be linearized; leave some out")
        heads = self.attention.softmax_heads if self.attention is not None else ()
        if absent := [name for name in heads if not self._has(*map(int, name.split(".")))]:
            raise UserError(
                f"softmax-heads names {', '.join(absent)}, and the model has layers 0 to {self.num_layers - 1} of key "
                f"heads 0 to {self.kv_heads - 1}"
            )
        own = self.attention.own_budgets if self.attention is not None else {}
        if missing := [f"{layer}.{head}" for layer, head in own if not self._has(layer, head)]:
            raise UserError(
                f"budgets names {', '.join(missing)}, and the model has layers 0 to {self.num_layers - 1} of key "
                f"heads 0 to {self.kv_heads - 1}"
            )
        if self.attention is not None and heads:
            layers = [layer for layer in range(self.num_layers) if layer not in kept]
            if all(len(self.attention.exact_heads(layer)) == self.kv_heads for layer in layers):
                raise UserError("softmax-heads names every key head, so that nothing would be linearized")

    def _has(self, layer: int, head: int) -> bool:
        return layer < self.num_layers and head < self.kv_heads


# ------------------------------------------------------------------------------------------------ a run


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes batches of packed sequences."""

    path: str = option(
        "embedded", "text, JSON, JSONL or parquet file, directory, URL of one, datasets hub name, or 'embedded'"
    )
    format: Literal["auto", "text", "alpaca", "chat"] = option("auto", "how to read it; auto looks at the content")
    separator: str = option("<|endoftext|>", "what splits plain text into documents")
    split: str = option("train", "split to read of a datasets name")
    text_column: str = option("text", "column that holds the text of a plain-text dataset")
    text_eos: bool = option(False, "end plain-text documents with EOS; answers always end so")
    sequence_length: int = option(2048, "T, tokens per packed sequence")
    batch_size: int = option(8, "B, sequences per optimizer step")
    accumulate: int = option(1, "parts of a step's batch, computed one after the other to save memory")
    held_out: float = option(0.02, "share of the documents kept for validation")
    held_out_tokens: int = option(131072, "at most this many tokens are scored at each validation")
    answer_only: bool = option(False, "score answers only, not prompts (Alpaca and chat records)")
    segment_mask: bool = option(True, "keep attention inside each document of a packed sequence")
    date: str = option("", "date that chat templates are told, as 2026-11-25; empty: the day the run began")
    seed: int = option(0, "seed of the data order")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warmup and cosine decay."""

    learning_rate: float = option(1e-3, "peak learning rate")
    tokens: int = option(20_000_000, "tokens to train on")
    warmup: float = option(0.1, "share of the steps spent warming up")
    final: float = option(0.1, "learning rate at the end, as a share of the peak")
    beta1: float = option(0.9, "AdamW beta1")
    beta2: float = option(0.99, "AdamW beta2")
    weight_decay: float = option(0.0, "weight decay of base weights and LoRA; never of the new modules")
    clip: float = option(1.0, "largest global gradient norm")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of stage 2."""

    rank: int = option(8, "LoRA rank r")
    alpha: float = option(16.0, "LoRA alpha; the update is scaled by alpha / r")
    targets: tuple[str, ...] = option(("q_proj", "k_proj", "v_proj"), "projections that carry LoRA")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes what is left."""

    data: int = option(1, "mesh axis that splits the batch and repeats the parameters")
    fsdp: int = option(-1, "mesh axis that splits the batch and the parameters; -1 takes the devices left over")
    tensor: int = option(1, "mesh axis that splits heads and widths")
    seq: int = option(1, "mesh axis that splits texts too long for one device, and the parameters")


@dataclass(frozen=True)
class RunConfig:
    """One training run: a stage of a recipe with every override applied."""

    recipe: str = option("tiny", "recipe in configs/")
    stage: Literal[0, 1, 2] = option(1, "0 pretrains a teacher, 1 distils the attention, 2 adapts the model")
    teacher: str = option("embedded", "directory or hub id of the teacher, or 'embedded'")
    out: str = option("", "run directory; default runs/RECIPE (the stage's own folder is made inside)")
    preset: str = option("lizard", "attention preset the run starts from")
    heads: str = option(
        "", "which key heads keep softmax attention: FILE:N or FILE:10% of `lizard select`, or auto:10%"
    )
    state_bytes: str = option(
        "", "size of a sequence's state, as 16MiB or 258tokens (of a plain window): split among key heads by need"
    )
    curves: str = option("", "what each key head needs, from `lizard select --by error`; default: the text says")
    dtype: Literal["float32", "bfloat16", "float64"] = option("float32", "dtype of base weights and activations")
    attention: LizardConfig = LizardConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig = LoraConfig()
    mesh: MeshConfig = MeshConfig()
    train_new: bool = option(True, "stage 2: keep training the new attention modules beside LoRA")
    full: bool = option(False, "stage 2: train every weight instead of LoRA")
    kl: float = option(0.9, "stage 2: share of the loss that is KL to the teacher's predictions, not next-token loss")
    remat: bool = option(True, "stages 0 and 2: recompute each block in the backward pass to save memory")
    validate_every: int = option(0, "steps between validations; 0 makes ten of them")
    save_every: int = option(0, "steps between checkpoints; 0 saves at each validation")
    profile: int = option(0, "steps to trace for a profiler, from the second on, into the stage's folder")
    wandb: str = option("", "project of Weights & Biases to log to as well, where wandb is installed")
    seed: int = option(0, "seed of parameter initialisation")
    steps: int = option(0, "stop after this many steps; 0 takes what the token budget gives")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON types (tuples become lists)."""
    out = dataclasses.asdict(config)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in out.items()}
