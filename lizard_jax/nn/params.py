"""Kinds of parameter. A stage picks what it trains, and a checkpoint what it holds, by kind."""

from flax import nnx


class BaseParam(nnx.Param):
    """A weight that came with the teacher. Kept in the run's dtype."""


class NewParam(nnx.Param):
    """A weight Lizard attention adds (feature map, gate, sink, merge). Always fp32, never decayed."""


class LoraParam(nnx.Param):
    """A low-rank adapter's weight. Always fp32."""
