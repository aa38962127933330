"""The embedded default: a small teacher, its tokenizer and its text, with nothing to download."""

from pathlib import Path

from lizard_jax.config import ModelConfig


def teacher_path() -> Path:
    """The directory of the embedded teacher, in HF format."""
    return Path(__file__).resolve().parent / "teacher"


def budgets_path() -> Path:
    """What each key head of the embedded teacher needs beside a window of 32, as the embedded text says.

    A run would measure the same (``select/budgets.py``); it is kept so that the first command ends sooner.
    """
    return Path(__file__).resolve().parent / "budgets.json"


def teacher_config() -> ModelConfig:
    """The shape of the embedded teacher: 1.31 M parameters, 5.2 MB in fp32."""
    return ModelConfig(
        architecture="llama",
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=384,
        num_layers=6,
        num_heads=4,
        kv_heads=2,
        head_dim=32,
        max_positions=256,
        tie_embeddings=True,
    )
