"""Small random HF models, saved where a test can load them."""

import inspect
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def make(kind: str, directory: Path, *, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """A random model of an architecture, saved to ``directory``.

    Weights are several times larger than an untrained model's and biases and norms are random too, so that every
    part moves the logits well above the tolerance.
    """
    settings = SIZES | changes
    if "rope_parameters" in settings and int(transformers.__version__.split(".")[0]) < 5:
        settings |= _as_before_5(settings)
    config = getattr(transformers, f"{kind}Config")(**settings)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.15 if parameter.ndim == 2 else 0.3
            parameter.normal_(1.0 if "norm" in name else 0.0, spread)
    model.save_pretrained(directory)
    return model


def _as_before_5(settings: dict[str, Any]) -> dict[str, Any]:
    """The angles as transformers 4 reads them."""
    rope = dict(settings.pop("rope_parameters"))
    old = {"rope_theta": rope.pop("rope_theta", 10000.0), "rope_scaling": rope}
    if rope["rope_type"] == "longrope":
        old["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return {"head_dim": settings["hidden_size"] // settings["num_attention_heads"]} | old


def tokens(length: int, *, batch: int = 2, vocab: int = SIZES["vocab_size"], seed: int = 0) -> np.ndarray:
    """Random token ids ``[batch, length]``."""
    return np.random.default_rng(seed).integers(0, vocab, (batch, length)).astype(np.int32)


def logits(model: transformers.PreTrainedModel, ids: np.ndarray) -> jnp.ndarray:
    """What transformers computes, in float32."""
    with torch.no_grad():
        return jnp.asarray(model(torch.tensor(ids, dtype=torch.long)).logits.float().numpy())


def extend_logits(
    model: transformers.PreTrainedModel, ids: np.ndarray, cache: transformers.DynamicCache
) -> jnp.ndarray:
    """What transformers computes for tokens behind those in ``cache``, which then holds them too.

    Its argument is named ``cache`` since 5.24 and ``past_key_values`` before.
    """
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with torch.no_grad():
        out = model(torch.tensor(ids, dtype=torch.long), use_cache=True, **{name: cache})
    return jnp.asarray(out.logits.float().numpy())
