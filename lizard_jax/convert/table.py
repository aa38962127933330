"""The one table between names of HF tensors and paths of NNX parameters; both directions read the same rows."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """An HF name and the path it belongs to. ``{i}`` stands for a layer, ``{p}`` for what the pattern allows.

    ``transpose`` says that the HF matrix is ``[out, in]`` where the parameter is ``[in, out]``.
    """

    hf: str
    path: str
    transpose: bool = False
    pattern: str = ""


ATTENTION = "q_proj|k_proj|v_proj|o_proj"
MLP = "gate_proj|up_proj|down_proj"

BASE = (
    Row("model.embed_tokens.weight", "embed/embedding"),
    Row("model.layers.{i}.input_layernorm.weight", "layers/{i}/attention_norm/weight"),
    Row("model.layers.{i}.self_attn.{p}.weight", "layers/{i}/attention/{p}/kernel", True, ATTENTION),
    Row("model.layers.{i}.self_attn.{p}.bias", "layers/{i}/attention/{p}/bias", False, ATTENTION),
    Row("model.layers.{i}.self_attn.{p}.weight", "layers/{i}/attention/{p}/weight", False, "q_norm|k_norm"),
    Row("model.layers.{i}.post_attention_layernorm.weight", "layers/{i}/mlp_norm/weight"),
    Row("model.layers.{i}.mlp.{p}.weight", "layers/{i}/mlp/{p}/kernel", True, MLP),
    Row("model.layers.{i}.mlp.{p}.bias", "layers/{i}/mlp/{p}/bias", False, MLP),
    Row("model.norm.weight", "norm/weight"),
    Row("lm_head.weight", "lm_head/kernel", True),
)

# The new modules, in lizard.safetensors. Below the mixer, dots and slashes are the same tree.
NEW = (Row("model.layers.{i}.self_attn.lizard.{p}", "layers/{i}/attention/mixer/{p}", False, r"[\w./]+"),)

# Adapters, in the names PEFT gives them.
_PEFT = "base_model.model.model.layers.{i}."
LORA = (
    Row(_PEFT + "self_attn.{p}.lora_A.weight", "layers/{i}/attention/{p}/lora_a", True, ATTENTION),
    Row(_PEFT + "self_attn.{p}.lora_B.weight", "layers/{i}/attention/{p}/lora_b", True, ATTENTION),
    Row(_PEFT + "mlp.{p}.lora_A.weight", "layers/{i}/mlp/{p}/lora_a", True, MLP),
    Row(_PEFT + "mlp.{p}.lora_B.weight", "layers/{i}/mlp/{p}/lora_b", True, MLP),
)

ROWS = BASE + NEW + LORA

# Buffers that older checkpoints stored and no model reads.
BUFFERS = re.compile(r"(model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq)")


def _match(template: str, row: Row, name: str) -> re.Match[str] | None:
    expression = re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{p\}", f"(?P<p>{row.pattern})")
    return re.fullmatch(expression, name)


def _translate(name: str, source: str, target: str, separators: tuple[str, str]) -> tuple[str, bool]:
    for row in ROWS:
        found = _match(getattr(row, source), row, name)
        if found:
            parts = found.groupdict()
            if "p" in parts:
                parts["p"] = parts["p"].replace(*separators)
            return getattr(row, target).format(**parts), row.transpose
    raise KeyError(name)


def to_path(name: str) -> tuple[str, bool]:
    """The parameter path of an HF tensor, and whether it is stored transposed.

    Raises:
        KeyError: the table has no such tensor.
    """
    return _translate(name, "hf", "path", (".", "/"))


def to_hf(path: str) -> tuple[str, bool]:
    """The HF tensor of a parameter path, and whether it is stored transposed.

    Raises:
        KeyError: the table has no such path.
    """
    return _translate(path, "path", "hf", ("/", "."))
