"""The paper's training settings, which the recipes of published models share."""

import dataclasses

from lizard_jax.config import DataConfig, OptimConfig, RunConfig, preset


def paper(recipe: str, teacher: str) -> dict[int, RunConfig]:
    """Stages 1 and 2: 20 M tokens each of cleaned Alpaca, 1,220 steps of 8 x 2048, learning rate 1e-3 then 5e-4."""
    first = RunConfig(
        recipe=recipe,
        stage=1,
        teacher=teacher,
        dtype="bfloat16",
        attention=preset("lizard"),
        data=DataConfig(path="yahma/alpaca-cleaned", sequence_length=2048, batch_size=8),
        optim=OptimConfig(learning_rate=1e-3, tokens=20_000_000),
    )
    second = dataclasses.replace(first, stage=2, optim=dataclasses.replace(first.optim, learning_rate=5e-4))
    return {1: first, 2: second}
