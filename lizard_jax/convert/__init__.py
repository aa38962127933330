"""Checkpoints in and out: HF directories, Flax directories, and the table of names between them."""
