"""A model's forward pass compiled whole: op by op, a test spends its time compiling each."""

import jax


@jax.jit
def logits(model, ids, segment_ids=None):
    return model(ids, segment_ids=segment_ids)
