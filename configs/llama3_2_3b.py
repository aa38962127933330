"""Llama-3.2-3B by the recipe of docs/recipe.md: 20 M tokens a stage, bf16 weights, fp32 new modules.

    python train.py --stage=1 --config=llama3_2_3b
    python train.py --stage=2 --config=llama3_2_3b

The teacher is the hub id below, or a local copy with ``--teacher DIR``; the text is cleaned Alpaca, or ``--data PATH``.

What to expect, by arithmetic alone; no run of this recipe has been measured:
- the teacher has 3.21 B weights, 6.4 GB in bf16, which ``--mesh-fsdp`` splits over the devices;
- stage 1 trains 3.9 M new weights (0.12% of the teacher's), stage 2 those and 3.2 M of LoRA (r=8 on q, k, v);
- 1,220 steps a stage of 8 sequences of 2,048 tokens;
- generating needs 112.4 MiB a sequence at any length, as much as softmax attention's cache (112 KiB a token) at
  1,028 tokens (--state-bytes makes it any other size).
"""

from lizard_jax.config import ModelConfig, RopeConfig, RunConfig

from ._published import published

SHAPE = ModelConfig(
    "llama", 128256, 3072, 8192, 28, 24, 8, 128, 131072,
    rope=RopeConfig(theta=500000.0, kind="llama3", factor=32.0), tie_embeddings=True,
)  # fmt: skip
"""The teacher, for planning where it is not at hand."""

RECIPE: dict[int, RunConfig] = published("llama3_2_3b", "meta-llama/Llama-3.2-3B", SHAPE)
