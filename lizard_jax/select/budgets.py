"""How much of the past each key head needs: a budget of bytes, split where it keeps most of the teacher's predictions.

Key heads differ by orders of magnitude in what they lose without their far past. One pass over a little text measures,
for every head and every number of kept pairs of ``menu``, the error δ of its outputs at the teacher's own hidden
states, and weighs it by what the teacher's loss makes of it: ½ (∂L/∂o · δ)² a token, the second-order estimate of the
KL that this error alone costs (the empirical Fisher information). The sum of these over heads is what ``spend``
makes small.
"""

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from pydantic import BaseModel, ByteSize, ConfigDict, TypeAdapter, ValidationError
from tqdm import tqdm

from lizard_jax import sharding
from lizard_jax.config import DataConfig, LizardConfig, ModelConfig
from lizard_jax.convert.files import read_json
from lizard_jax.convert.hf_config import model_config
from lizard_jax.convert.load import load_hf
from lizard_jax.data.loader import Batch, Loader
from lizard_jax.data.text import load_tokenizer
from lizard_jax.errors import UserError
from lizard_jax.losses import cross_entropy
from lizard_jax.models import Llama, build
from lizard_jax.models.llama import Block
from lizard_jax.nn.finite import not_finite
from lizard_jax.nn.lizard_attention import LizardMixer
from lizard_jax.nn.numerics import accumulation_dtype
from lizard_jax.nn.softmax_attention import SoftmaxMixer
from lizard_jax.select.rank import Tick, like, silent
from lizard_jax.typing import Array, Float, Int
from pallas_kernels import partition

SHARES = (0.0, 0.25, 1.0, 4.0, 16.0)
"""Kept pairs that a head may have, in windows; finer steps gain nothing (docs/recipe.md)."""
TOKENS = 8192
"""Tokens of text that curves are measured on."""
EXACT_SHARE = 0.75
"""Of what windows and memory leave of a state, how much bounded exact heads may take: with more the other heads
have too few pairs for the text, with less little is found from far back (docs/recipe.md)."""
LENGTH = 8192
"""Tokens at which a growing cache is counted where nothing is said."""
SIZE = re.compile(r"([^@]+?)(?:@(\d{1,8}))?")
FORMAT = 1


class Curves(BaseModel):
    """What ``budgets.json`` holds: by layer, key head and number of kept pairs, the nats a token lost."""

    model_config = ConfigDict(strict=True)

    format: Literal[1] = FORMAT
    window: int
    kept: list[int]
    errors: list[list[list[float]]]

    @property
    def array(self) -> Float[np.ndarray, "L K options"]:
        """The errors."""
        return np.asarray(self.errors)


def menu(window: int, length: int) -> list[int]:
    """The numbers of kept pairs that are measured: up to the first with which a head loses nothing of the texts."""
    counts = sorted({round(share * window) for share in SHARES})
    covering = [kept for kept in counts if window + kept >= length]
    return [kept for kept in counts if window + kept < length] + covering[:1]


def measure(
    teacher: Llama,
    batches: Sequence[Batch],
    switches: LizardConfig,
    *,
    tick: Tick = silent,
) -> Curves:
    """The curves of every key head.

    Args:
        teacher: with softmax attention.
        batches: text, of one shape, longer than the window, on the devices that the teacher lies on.
        switches: of the student; its window and meta memory count, not its memory.
        tick: called after each layer of each batch with 1.

    Raises:
        UserError: the texts never leave the window.
    """
    config, window = teacher.config, switches.window
    length = batches[0].inputs.shape[1]
    if length <= window:
        raise UserError(
            f"texts of {length} tokens never leave the window of {window}, so no head's needs can be measured; give a "
            "longer --sequence-length or a smaller --window"
        )
    options = menu(window, length)
    total = np.zeros((config.num_layers, config.kv_heads, len(options)))
    count = 0.0
    # Functions of this call alone: what is traced depends on the mesh that kernels are split over.
    slopes_of = jax.jit(lambda *args: _slopes(*args))
    costs = jax.jit(lambda *args, **kinds: _costs(*args, **kinds), static_argnames=("student", "config", "layer"))
    for batch in batches:
        inputs, targets, segments, mask = (
            jnp.asarray(a) for a in (batch.inputs, batch.targets, batch.segment_ids, batch.loss_mask)
        )
        slopes = jax.block_until_ready(slopes_of(teacher, inputs, targets, segments, mask))
        x = following = jax.block_until_ready(teacher.embed(inputs))
        for layer, block in enumerate(teacher.layers):
            for n, kept in enumerate(options):
                if window + kept >= length:
                    continue
                student = replace(config, attention=plain(switches, kept=kept))
                own_error, following = costs(
                    block, x, slopes[layer], segments, student=student, config=config, layer=like(config, layer)
                )
                total[layer, :, n] += sharding.on_host(jax.block_until_ready(own_error))
            x = following
            tick(1)
        count += float(sharding.on_host(mask.sum()))
    errors = total / max(count, 1.0)
    if not np.isfinite(errors).all():
        path = not_finite(teacher)
        cause = f"for the teacher's {path} holds NaN or infinity; its weights are damaged" if path else (
            "though the teacher's weights are finite; try --dtype float32"
        )  # fmt: skip
        raise UserError(f"no budget can be split: errors of heads are not finite, {cause}")
    return Curves(window=window, kept=options, errors=errors.tolist())


def _slopes(
    teacher: Llama,
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    mask: Float[Array, "B T"],
) -> list[Float[Array, "B T N H"]]:
    """Of the summed loss, the slope by every layer's head outputs."""

    def step(block: Block, layer: int, x: Array, more: Array) -> Array:
        normed = block.attention_norm(x)
        heads = SoftmaxMixer(teacher.config, layer)(normed, *block.attention.qkv(normed), segment_ids=segments)
        return block.after_heads(x, heads + more)

    def loss(extra: list[Array]) -> Array:
        x = teacher.embed(inputs)
        for layer, (block, more) in enumerate(zip(teacher.layers, extra, strict=True)):
            x = jax.checkpoint(step, static_argnums=1)(block, layer, x, more)
        return cross_entropy(teacher, teacher.norm(x), targets, mask)

    config, dtype = teacher.config, teacher.embed.embedding.dtype
    shape = (*inputs.shape, config.num_heads, config.head_dim)
    return jax.grad(loss)([jnp.zeros(shape, dtype) for _ in range(config.num_layers)])


def _costs(
    block: Block,
    x: Float[Array, "B T D"],
    slope: Float[Array, "B T N H"],
    segments: Int[Array, "B T"],
    *,
    student: ModelConfig,
    config: ModelConfig,
    layer: int,
) -> tuple[Float[Array, " K"], Float[Array, "B T D"]]:
    """Of each key head, the sum of the second-order costs of its error; and the teacher's next hidden states."""
    normed = block.attention_norm(x)
    qkv = block.attention.qkv(normed)
    whole = SoftmaxMixer(config, layer)(normed, *qkv, segment_ids=segments)
    cut = LizardMixer(student, rngs=nnx.Rngs(0))(normed, *qkv, segment_ids=segments)
    wide = accumulation_dtype(whole)
    product = ((cut.astype(wide) - whole.astype(wide)) * slope.astype(wide)).sum(axis=-1)
    by_head = product.reshape(*product.shape[:2], config.kv_heads, -1).sum(axis=-1)
    return 0.5 * jnp.square(by_head).sum((0, 1)), block.after_heads(x, whole)


# ------------------------------------------------------------------------------------------------ spending


@dataclass(frozen=True)
class Size:
    """Bytes of a sequence's state, and the length at which those that grow are counted."""

    bytes: int
    length: int


def size(text: str, config: ModelConfig, switches: LizardConfig) -> Size:
    """What ``16MiB``, ``258tokens`` or ``16MiB@32768`` asks for.

    Tokens are those of a student with a window alone. A length is told by ``@``, else it is 8,192 or the context.

    Raises:
        UserError: it is no size.
    """
    match = SIZE.fullmatch(text.strip())
    length = int(match[2] or min(LENGTH, config.max_positions)) if match else 0
    tokens = re.fullmatch(r"(\d{1,8}) ?tokens?", match[1]) if match else None
    if tokens and 1 <= int(tokens[1]) <= 2**24 and length:
        alone = plain(switches, window=int(tokens[1]))
        return Size(state_bytes(replace(config, attention=alone), length), length)
    with contextlib.suppress(ValidationError):
        if match and length and (found := int(TypeAdapter(ByteSize).validate_python(match[1]))) > 0:
            return Size(found, length)
    raise UserError(
        f"--state-bytes {text}: give a size as 16MiB, or a window of equal bytes as 258tokens, and if exact heads are "
        "to be counted at a length of their own, that as 16MiB@32768"
    )


def plain(switches: LizardConfig, **more: Any) -> LizardConfig:
    """The exact part of these switches, without memory, and the same for all heads."""
    usual = {"memory": "none", "combine": "joint", "softmax_layers": (), "softmax_heads": (), "budgets": (), "kept": 0}
    return replace(switches, **usual | {"retrieval_window": 0} | more)


def state_bytes(config: ModelConfig, length: int) -> int:
    """Bytes of one sequence's decode state with keys and values of 16 bits, after ``length`` tokens."""
    return nnx.eval_shape(lambda: build(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))).state_bytes(length)


@dataclass(frozen=True)
class Spent:
    """A split of a budget.

    Attributes:
        switches: the attention with its budgets.
        bytes: what its state takes, and ``cost``: the nats a token that the curves say it costs.
    """

    switches: LizardConfig
    bytes: int
    cost: float

    def summary(self) -> str:
        """The line that the log shows."""
        kept = [kept for _, kept in self.switches.own_budgets.values()]
        exact, reach = len(self.switches.softmax_heads), self.switches.retrieval_window
        heads = [f"{exact} exact {f'for {reach:,} tokens' if reach else 'in a growing cache'}"] if exact else []
        heads.append(f"{len(kept)} with up to {max(kept):,} kept pairs" if kept else "none with kept pairs")
        return (
            f"state: {self.bytes / 2**20:.2f} MiB a sequence; windows of {self.switches.window}; of the key heads "
            f"{', '.join(heads)}"
        )


def spend(curves: Curves, limit: Size, config: ModelConfig, switches: LizardConfig) -> Spent:
    """The kept pairs of every key head that cost least, with a state of at most so many bytes.

    Starts from none, and gives a head more where a byte helps most. ``softmax_heads`` and ``softmax_layers`` keep
    what they have, and their caches count.

    Raises:
        UserError: the curves are of another model or window, or the windows alone take more than there is.
    """
    shape = (config.num_layers, config.kv_heads, len(curves.kept))
    if curves.array.shape != shape or curves.window != switches.window:
        raise UserError(
            f"the curves are of {' x '.join(map(str, curves.array.shape[:2]))} key heads with a window of "
            f"{curves.window}, and the model has {shape[0]} x {shape[1]} with {switches.window}; measure them again"
        )
    bare = replace(switches, kept=0, budgets=())
    least = state_bytes(replace(config, attention=bare), limit.length)
    check_size(limit, least)
    # Pairs, the numbers that decide about them and about the window's, and a position for a class of their own.
    prices = [0 if kept == 0 else kept * (4 * config.head_dim + 8) + 4 * switches.window + 4 for kept in curves.kept]
    steps = []
    chosen: dict[tuple[int, int], int] = {}
    for layer in range(config.num_layers):
        if layer in switches.softmax_layers:
            continue
        for head in set(range(config.kv_heads)) - set(switches.exact_heads(layer)):
            chosen[layer, head] = 0
            steps += [(-gain, layer, head, before, after) for gain, before, after in hull(prices, curves, layer, head)]
    left = limit.bytes - least
    for _, layer, head, before, after in sorted(steps):
        price = prices[after] - prices[before]
        if chosen[layer, head] == before and price <= left:
            chosen[layer, head], left = after, left - price
    budgets = (f"{layer}.{head}={switches.window}+{curves.kept[n]}" for (layer, head), n in chosen.items())
    out = replace(bare, budgets=tuple(budgets))
    cost = float(sum(curves.array[layer, head, n] for (layer, head), n in chosen.items()))
    return Spent(out, state_bytes(replace(config, attention=out), limit.length), cost)


def check_size(limit: Size, least: int) -> None:
    """Refuse a size that not even a student without kept pairs fits into.

    Args:
        least: bytes that it takes.

    Raises:
        UserError: they are more.
    """
    if least > limit.bytes:
        raise UserError(
            f"a state of {limit.bytes:,} bytes (--state-bytes) is too small: windows, memory and exact heads "
            f"alone take {least:,}; give more, or a smaller --window"
        )


def hull(prices: Sequence[int], curves: Curves, layer: int, head: int) -> list[tuple[float, int, int]]:
    """The steps of a head's curve that pay, each less a byte than the one before: what a byte gains, from, to."""
    errors, steps, at = curves.array[layer, head], [], 0
    while at < len(prices) - 1:
        gains = [(errors[at] - errors[n]) / (prices[n] - prices[at]) for n in range(at + 1, len(prices))]
        best = int(np.argmax(gains))
        if gains[best] <= 0:
            break
        steps.append((float(gains[best]), at, at + 1 + best))
        at += 1 + best
    return steps


def reach(limit: Size, config: ModelConfig, switches: LizardConfig, share: float = EXACT_SHARE) -> int:
    """Tokens that exact heads see: as ``retrieval_window`` says, or as the teacher's context has, or fewer, so that
    they take no more than this share of what windows and memory leave of a size.
    """
    least, more = (
        state_bytes(replace(config, attention=replace(switches, retrieval_window=n, kept=0, budgets=())), limit.length)
        for n in (switches.window, switches.window + 1)
    )
    spare = max(0, int(share * (limit.bytes - least)))
    context = max(config.max_positions, switches.window)
    return min(switches.retrieval_window, context, switches.window + spare // (more - least))


def split(
    text: str,
    source: Path,
    switches: LizardConfig,
    data: DataConfig,
    curves: str = "",
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    reach_follows: bool = False,
) -> Spent:
    """What ``--state-bytes`` and ``--curves`` ask for: the curves of the file, or measured on the text.

    Args:
        reach_follows: a bounded reach of exact heads may shrink to what the size pays for (``reach``).

    Raises:
        UserError: as ``size``, ``read``, ``automatic`` and ``spend`` do.
    """
    shape = model_config(read_json(source / "config.json"))
    limit = size(text, shape, switches)
    if reach_follows and switches.softmax_heads and switches.retrieval_window:
        switches = replace(switches, retrieval_window=reach(limit, shape, switches))
    found = read(curves) if curves else automatic(source, switches, data, dtype=dtype, mesh=mesh)
    return spend(found, limit, shape, switches)


def automatic(
    source: Path, switches: LizardConfig, data: DataConfig, *, dtype: DTypeLike | None = None, mesh: Mesh | None = None
) -> Curves:
    """The curves of a teacher on the first ``TOKENS`` tokens of a text, which are what training begins with.

    Raises:
        UserError: no such teacher or text, or texts that never leave the window.
    """
    teacher = load_hf(source, dtype=dtype, mesh=mesh)
    loader = Loader(data, load_tokenizer(source), vocab_size=teacher.config.vocab_size)
    batches, over = loader.first(TOKENS), contextlib.nullcontext()
    if mesh is not None:
        batches = [sharding.put_batch(batch, mesh) for batch in batches]
        over = partition.over(sharding.kernel_partition(mesh))
    total = len(batches) * teacher.config.num_layers
    quiet = None if jax.process_index() == 0 else True
    with over, tqdm(total=total, desc="measuring key heads", unit=" layers", disable=quiet, leave=False) as bar:
        return measure(teacher, batches, switches, tick=bar.update)


def read(file: str | Path) -> Curves:
    """The curves in a file.

    Raises:
        UserError: it is missing, or no such file.
    """
    raw: Any = read_json(Path(file).expanduser())
    try:
        found = Curves.model_validate(raw)
        good = found.array.ndim == 3 and found.array.shape[2] == len(found.kept) and np.isfinite(found.array).all()
        if good and found.kept == sorted(set(found.kept)) and found.kept[:1] == [0]:
            return found
    except (ValidationError, ValueError):
        pass
    raise UserError(f"{file} holds no curves of key heads; make them with lizard_jax.select TEACHER --by error")
