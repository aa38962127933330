"""The training settings that the recipes of published models share; docs/recipe.md says why they are what they are."""

import dataclasses

from lizard_jax.config import DataConfig, ModelConfig, OptimConfig, RunConfig, preset


def published(recipe: str, teacher: str, shape: ModelConfig) -> dict[int, RunConfig]:
    """Stages 1 and 2: 20 M tokens each, 1,220 steps of 8 x 2048, learning rate 1e-2 then 5e-4.

    A window of 128 and a quarter of the features; the tenth of the key heads that retrieve sees as many tokens as three
    quarters of what is left pay for (some 6,500), and the others keep exact pairs, as many as each needs: in all an
    eighth of the cache at 8,192 tokens, at any length. On SmolLM2, at equal bytes, far better than all of the features,
    a wider window, or as many pairs for every head; without exact heads the loss is no lower, and nothing is found
    again that was said thousands of tokens ago.

    Budget and text are the paper's, cleaned Alpaca. Its records have some 130 tokens, so attention reads on across
    them: kept to one record, a memory beyond a window of 128 would see next to nothing.
    """
    first = RunConfig(
        recipe=recipe,
        stage=1,
        teacher=teacher,
        dtype="bfloat16",
        attention=dataclasses.replace(
            preset("lizard"), window=128, feature_half=shape.head_dim // 4, retrieval_window=8192
        ),
        heads="auto:10%",
        state_bytes="1024tokens",
        data=DataConfig(path="yahma/alpaca-cleaned", sequence_length=2048, batch_size=8, segment_mask=False),
        optim=OptimConfig(learning_rate=1e-2, tokens=20_000_000),
    )
    second = dataclasses.replace(first, stage=2, optim=dataclasses.replace(first.optim, learning_rate=5e-4))
    return {1: first, 2: second}
