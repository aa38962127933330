"""Text from a model in constant memory: prefill in chunks, then a loop over a fixed-size state."""
