"""An HF ``config.json`` as a ``ModelConfig`` and back, and its ``lizard`` section as a ``LizardConfig`` and back."""

import dataclasses
import math
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lizard_jax.config import LizardConfig, LongRopeConfig, ModelConfig, RopeConfig, YarnConfig, to_dict
from lizard_jax.errors import UserError
from lizard_jax.nn.layers import activation

Size = Annotated[int, Field(ge=1, lt=2**31)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# transformers leaves out of config.json what equals its own default, so the defaults are part of the format.
COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "head_dim": None,
    "num_key_value_heads": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "layer_types": None,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": COMMON | {"max_position_embeddings": 2048},
    "mistral": COMMON | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": COMMON | {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": COMMON
    | {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "scale_emb": (1,),
    "scale_depth": (1,),
    "no_rope_layers": ([],),
    "attention_chunk_size": (),
    "num_experts": (0,),
    "num_local_experts": (0, 1),
}
"""Settings of other decoders that change what is computed, and the values at which they do not."""
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def model_config(raw: dict[str, Any], *, attention: LizardConfig | None = None) -> ModelConfig:
    """What an HF configuration says of the decoder; ``attention`` becomes the configuration's.

    Reads both spellings of RoPE: ``rope_parameters`` (transformers 5) and ``rope_theta`` with ``rope_scaling``.

    Raises:
        UserError: an architecture, activation, RoPE kind or quantization that is not supported (named), a size that
            is missing or does not divide.
    """
    kind = raw.get("model_type")
    listed = raw.get("architectures")
    named = listed[0] if isinstance(listed, list) and listed else listed or ARCHITECTURES.get(str(kind))
    if not isinstance(kind, str) or kind not in ARCHITECTURES or named != ARCHITECTURES[kind]:
        raise UserError(
            f"architecture {named or kind!r} (model_type {kind!r}) is not supported; "
            f"supported are {', '.join(ARCHITECTURES.values())}"
        )
    if quantized := raw.get("quantization_config"):
        method = quantized.get("quant_method", "unknown method") if isinstance(quantized, dict) else quantized
        raise UserError(f"the checkpoint is quantized ({method}); convert it to bfloat16 or float32 first")
    missing = [key for key in SIZES if raw.get(key) is None]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}")
    changing = [f"{key}={raw[key]}" for key, neutral in NEUTRAL.items() if raw.get(key) not in (None, False, *neutral)]
    if changing:
        raise UserError(f"config.json has {', '.join(changing)}, which no {kind} decoder of transformers computes")
    _check_types(raw)
    full = DEFAULTS[kind] | raw
    heads, width, layers = full["num_attention_heads"], full["hidden_size"], full["num_hidden_layers"]
    kv_heads = full["num_key_value_heads"] or heads
    head_dim = full["head_dim"] or width // heads
    if heads % kv_heads:
        raise UserError(f"{heads} query heads do not divide into {kv_heads} key/value heads")
    if head_dim % 2:
        raise UserError(f"head_dim {head_dim} is odd; rotary position embedding pairs its features")
    activation(full["hidden_act"])

    window, window_layers = full["sliding_window"], None
    if kind == "llama" or (kind.startswith("qwen") and not full["use_sliding_window"]):
        window = None
    if kind.startswith("qwen") and window is not None:
        types = full["layer_types"] or [
            "sliding_attention" if index >= full["max_window_layers"] else "full_attention" for index in range(layers)
        ]
        unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
        if unknown:
            raise UserError(f"layer_types {', '.join(unknown)} are not supported")
        window_layers = tuple(index for index, name in enumerate(types) if name == "sliding_attention")

    llama_bias = full["attention_bias"] and kind in ("llama", "qwen3")
    return ModelConfig(
        architecture=cast(Any, kind),
        vocab_size=full["vocab_size"],
        hidden_size=width,
        intermediate_size=full["intermediate_size"],
        num_layers=layers,
        num_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=full["max_position_embeddings"],
        norm_eps=full["rms_norm_eps"],
        rope=_rope(raw, full["max_position_embeddings"], head_dim),
        hidden_act=full["hidden_act"],
        tie_embeddings=bool(full["tie_word_embeddings"]),
        qkv_bias=bool(llama_bias or kind == "qwen2"),
        o_bias=bool(llama_bias),
        mlp_bias=bool(full["mlp_bias"] and kind == "llama"),
        qk_norm=kind == "qwen3",
        sliding_window=window,
        sliding_window_layers=window_layers,
        attention=attention,
    )


class _Types(BaseModel):
    """What the entries of a ``config.json`` that are read here must be; any other entry may be anything."""

    model_config = ConfigDict(strict=True, extra="ignore")
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, Field(ge=1, le=10_000)]
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    max_position_embeddings: Size | None = None
    original_max_position_embeddings: Size | None = None
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)] | None = None
    hidden_act: str = "silu"
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    sliding_window: Size | None = None
    use_sliding_window: bool | None = None
    max_window_layers: Annotated[int, Field(ge=0)] | None = None
    layer_types: list[str] | None = None
    rope_theta: Positive | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    lizard: dict[str, Any] | None = None


def _check_types(raw: dict[str, Any]) -> None:
    """Refuses entries of another type or range than they can have.

    Raises:
        UserError: there is one; the first is named.
    """
    try:
        _Types.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"][:1])
        raise UserError(f"config.json has {key}={str(raw.get(key))[:40]}: {first['msg'].lower()}") from None


def _rope(raw: dict[str, Any], max_positions: int, width: int) -> RopeConfig:
    # As transformers chooses: what somebody added as rope_scaling takes the place of rope_parameters.
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    nested = any(isinstance(value, dict) for value in scaling.values())
    if not isinstance(kind, str) or kind not in ROPE_KINDS or nested:
        raise UserError(f"rope type {kind!r} is not supported; supported are {', '.join(ROPE_KINDS)}")
    partial = scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise UserError(f"partial_rotary_factor {partial} is not supported; every feature must be rotated")
    needed = {
        "linear": ["factor"], "dynamic": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"],
        "yarn": ["factor"],
    }  # fmt: skip
    missing = [key for key in needed.get(kind, []) if not isinstance(scaling.get(key), int | float)]
    if missing:
        raise UserError(f"rope type {kind!r} lacks {', '.join(missing)} in config.json")
    numbers = (
        "factor", "rope_theta", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
        "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    )  # fmt: skip
    given = {key: scaling[key] for key in numbers if scaling.get(key) is not None}
    odd = [f"{key}={value!r}" for key, value in given.items() if not _is_positive(value)]
    if odd:
        raise UserError(f"config.json has {', '.join(odd)} for RoPE; a positive number is needed")
    rope = RopeConfig(theta=float(scaling.get("rope_theta") or raw.get("rope_theta") or 10000.0), kind=kind)
    if kind == "default":
        return rope
    original = raw.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
    if kind == "longrope":
        return _longrope(rope, scaling, width, int(original or max_positions), max_positions)
    rope = dataclasses.replace(rope, factor=float(scaling["factor"]))
    if kind == "dynamic":
        # transformers measures growth from max_position_embeddings, whatever original_max_position_embeddings says.
        return dataclasses.replace(rope, original_max_positions=max_positions)
    if kind == "yarn":
        return dataclasses.replace(
            rope, original_max_positions=int(original or max_positions), yarn=_yarn(scaling, float(scaling["factor"]))
        )
    if kind == "llama3":
        return dataclasses.replace(
            rope,
            low_freq_factor=float(scaling["low_freq_factor"]),
            high_freq_factor=float(scaling["high_freq_factor"]),
            original_max_positions=int(original or max_positions),
        )
    return rope


def _yarn(scaling: dict[str, Any], factor: float) -> YarnConfig:
    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, over = scaling.get("mscale"), scaling.get("mscale_all_dim")
    inferred = scale(mscale) / scale(over) if mscale and over else scale(1.0)
    return YarnConfig(
        attention_factor=float(scaling.get("attention_factor") or inferred),
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
        truncate=bool(scaling.get("truncate", True)),
    )


def _longrope(rope: RopeConfig, scaling: dict[str, Any], width: int, original: int, max_positions: int) -> RopeConfig:
    """As transformers reads it: without a factor, the context over the original one."""
    for name in ("short_factor", "long_factor"):
        factors = scaling.get(name)
        if not isinstance(factors, list) or len(factors) != width // 2 or not all(map(_is_positive, factors)):
            raise UserError(
                f"config.json has no {name} of {width // 2} positive numbers, which rope type 'longrope' needs"
            )
    factor = float(scaling.get("factor") or max_positions / original)
    if original < 2:
        raise UserError(f"config.json has original_max_position_embeddings={original}, too few for 'longrope'")
    inferred = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return dataclasses.replace(
        rope,
        factor=factor,
        original_max_positions=original,
        longrope=LongRopeConfig(
            tuple(map(float, scaling["short_factor"])),
            tuple(map(float, scaling["long_factor"])),
            float(scaling.get("attention_factor") or inferred),
        ),
    )


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def hf_dict(config: ModelConfig, *, dtype: str = "float32") -> dict[str, Any]:
    """A ``config.json`` for a decoder that has none yet; ``model_config`` reads the same configuration back.

    RoPE is written in the older spelling, which every version of transformers reads.
    """
    kind, rope = config.architecture, config.rope
    out: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": rope.theta,
        "rope_scaling": None,
        "torch_dtype": dtype,
    }
    if rope.kind != "default":
        out["rope_scaling"] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.yarn is not None:
        out["rope_scaling"] |= dataclasses.asdict(rope.yarn)
        out["rope_scaling"]["original_max_position_embeddings"] = rope.original_max_positions
    if rope.longrope is not None:
        out["rope_scaling"] |= {
            "short_factor": list(rope.longrope.short),
            "long_factor": list(rope.longrope.long),
            "attention_factor": rope.longrope.attention_factor,
            "original_max_position_embeddings": rope.original_max_positions,
        }
    if rope.kind == "llama3":
        out["rope_scaling"] |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_positions,
        }
    if kind in ("llama", "qwen3"):
        out["attention_bias"] = config.qkv_bias
    if kind == "llama":
        out["mlp_bias"] = config.mlp_bias
    if kind == "mistral":
        out["sliding_window"] = config.sliding_window
    if kind.startswith("qwen") and config.sliding_window is not None:
        slides = config.sliding_window_layers
        out["use_sliding_window"], out["sliding_window"] = True, config.sliding_window
        out["layer_types"] = [
            "sliding_attention" if slides is None or index in slides else "full_attention"
            for index in range(config.num_layers)
        ]
    if config.attention is not None:
        out["lizard"] = lizard_section(config.attention)
    return out


def lizard_section(attention: LizardConfig) -> dict[str, Any]:
    """The ``lizard`` section of a ``config.json``."""
    return to_dict(attention)


def lizard_config(section: dict[str, Any]) -> LizardConfig:
    """The attention a ``lizard`` section describes.

    Raises:
        UserError: a setting that does not exist, or has the wrong type or a refused value.
    """
    fields = {field.name: field for field in dataclasses.fields(LizardConfig)}
    unknown = [key for key in section if key not in fields]
    if unknown:
        raise UserError(f"the lizard section of config.json has unknown settings: {', '.join(unknown)}")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in section.items()}
    for key, value in values.items():
        expected = type(fields[key].default)
        if type(value) is not expected and not (expected is float and type(value) is int):
            raise UserError(
                f"the lizard section of config.json has {key}={value!r}; it must be of type {expected.__name__}"
            )
    return LizardConfig(**values)
