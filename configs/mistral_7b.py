"""Mistral-7B v0.1 by the recipe of docs/recipe.md: 20 M tokens a stage, bf16 weights, fp32 new modules.

    python train.py --stage=1 --config=mistral_7b
    python train.py --stage=2 --config=mistral_7b

The teacher is the hub id below, or a local copy with ``--teacher DIR``; the text is cleaned Alpaca, or ``--data PATH``.

What to expect, by arithmetic alone; no run of this recipe has been measured:
- the teacher has 7.24 B weights, 14.5 GB in bf16, which ``--mesh-fsdp`` splits over the devices;
- stage 1 trains 5.7 M new weights (0.08% of the teacher's), stage 2 those and 4.7 M of LoRA (r=8 on q, k, v);
- 1,220 steps a stage of 8 sequences of 2,048 tokens;
- generating needs 128.5 MiB a sequence at any length, as much as softmax attention's cache (128 KiB a token) at
  1,028 tokens (--state-bytes makes it any other size).
"""

from lizard_jax.config import ModelConfig, RopeConfig, RunConfig

from ._published import published

SHAPE = ModelConfig(
    "mistral", 32000, 4096, 14336, 32, 32, 8, 128, 32768,
    rope=RopeConfig(theta=10000.0), sliding_window=4096,
)  # fmt: skip
"""The teacher, for planning where it is not at hand."""

RECIPE: dict[int, RunConfig] = published("mistral_7b", "mistralai/Mistral-7B-v0.1", SHAPE)
