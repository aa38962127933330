"""The weights with which a layer's attention looks back, written down densely, for one short text.

A mixer's output is linear in the values, ``heads[i] = Σ_j map[i, j] v[j]``, plus what memory of its own adds. Here the
map is formed from the definition (docs/attention.md) in float64, whole, branch by branch: it costs T² and is for
looking at.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

if TYPE_CHECKING:
    from lizard_jax.config import RopeConfig
    from lizard_jax.nn.lizard_attention import LizardMixer

NOTHING = -np.inf


@dataclass(frozen=True)
class Maps:
    """The map of every head of one layer, in its parts.

    Attributes:
        window: ``[N, T, T]`` weights of the softmax window (all of it for softmax attention), prefix tokens included.
        gated: ``[N, T, T]`` weights of the gated linear branch.
        meta: ``[N, T]`` the share of what is no token of the text: the sink, learned pairs.

    Row i of ``window`` and ``gated`` and the i-th share of ``meta`` sum to 1; with ``combine="sum"`` to 1 + α, where a
    branch gives 1 and the other α.
    """

    window: Float[np.ndarray, "N T T"]
    gated: Float[np.ndarray, "N T T"]
    meta: Float[np.ndarray, "N T"]

    @property
    def total(self) -> Float[np.ndarray, "N T T"]:
        """The effective weight of every token."""
        return self.window + self.gated


def layer_maps(attention: Any, normed: Any) -> Maps:
    """The maps of an ``Attention`` for its normalized input ``[1, T, D]``, one document."""
    return _mixer_maps(attention.mixer, normed, *attention.qkv(normed))


def _mixer_maps(mixer: Any, normed: Any, q: Any, k: Any, v: Any) -> Maps:
    from lizard_jax.nn.lizard_attention import LizardMixer
    from lizard_jax.nn.split_attention import SplitMixer

    if isinstance(mixer, SplitMixer):
        mixers = [*mixer.linearized, *([] if mixer.long is None else [mixer.long])]
        parts = [_mixer_maps(own, normed, *mixer.part(i, q, k, v)) for i, own in enumerate(mixers)]
        return Maps(
            *(
                np.concatenate([getattr(part, name) for part in parts])[list(mixer.order)]
                for name in ("window", "gated", "meta")
            )
        )
    if isinstance(mixer, LizardMixer):
        return _probed(mixer, normed, q, k) if mixer.switches.kept else _lizard(mixer, normed, q, k)
    queries, keys = _f64(q)[0], _f64(k)[0]
    time, heads = queries.shape[:2]
    positions, kv = np.arange(time), keys.shape[1]
    rope = _Rope(mixer.rope, mixer.head_dim, time)
    seen = _near(time, mixer.window or time)
    scores = [_scores(rope(queries[:, n], positions), rope(keys[:, n * kv // heads], positions)) for n in range(heads)]
    weights = np.stack([_softmax(np.where(seen, score, NOTHING))[0] for score in scores])
    return Maps(weights, np.zeros_like(weights), np.zeros(weights.shape[:2]))


def _lizard(mixer: "LizardMixer", x: Any, q: Any, k: Any) -> Maps:
    switches, queries, keys = mixer.switches, _f64(q)[0], _f64(k)[0]
    time, heads, width = queries.shape
    group = heads // keys.shape[1]
    rope = _Rope(mixer.config.rope, width, None)
    positions = np.arange(time)
    linear = None if switches.memory == "none" else _linear(mixer, x, q, k, rope)
    parts = []
    for n in range(heads):
        query, key = queries[:, n], keys[:, n // group]
        seen, log_window = _window(mixer, query, key, rope, positions)
        own = []
        if mixer.sink is not None:
            own.append(np.full((time, 1), _f64(mixer.sink[...])[n]))
        if mixer.meta_k is not None:
            own.append(_scores(query, _f64(mixer.meta_k[...])[:, n // group]))
        weights, normalizer = _softmax(np.concatenate([np.where(seen, log_window, NOTHING), *own], axis=1))
        window, meta = weights[:, :time], weights[:, time:].sum(axis=1)
        if linear is None:
            parts.append((window, np.zeros_like(window), meta))
            continue
        gated, gated_normalizer = _softmax(linear[n])
        if mixer.alpha is not None:
            near, far = np.full(time, float(mixer.alpha[...])), np.ones(time)
        else:
            assert mixer.beta is not None
            both = np.stack([normalizer, gated_normalizer + _f64(mixer.beta[...])[n]], axis=1)
            near, far = _softmax(both)[0].T
        parts.append((near[:, None] * window, far[:, None] * gated, near * meta))
    return Maps(*(np.stack(part) for part in zip(*parts, strict=True)))


def _probed(mixer: "LizardMixer", x: Any, q: Any, k: Any) -> Maps:
    """The map where pairs are kept, whose choice has no closed form: read off with values that say who they are.

    It is as exact as the mixer's own dtype. Kept pairs count to the window.
    """
    import jax
    import jax.numpy as jnp

    time, (groups, width) = q.shape[1], k.shape[2:]
    run = jax.jit(lambda mixer, v: vars(mixer.branches(x, q, k, v)))
    near, far = [], []
    found: dict[str, Any] = {}
    for start in range(0, time, width):
        own = np.zeros((1, time, groups, width), np.float32)
        for place in range(start, min(start + width, time)):
            own[0, place, :, place - start] = 1.0
        found = run(mixer, jnp.asarray(own, k.dtype))
        count = min(width, time - start)
        near.append(np.moveaxis(_f64(found["near"])[0, :, :, :count], 1, 0))
        if found["far"] is not None:
            far.append(np.moveaxis(_f64(found["far"])[0, :, :, :count], 1, 0))
    window = np.concatenate(near, axis=2)
    meta = 1.0 - window.sum(axis=2)
    if not far:
        return Maps(window, np.zeros_like(window), meta)
    gated = np.concatenate(far, axis=2)
    if mixer.alpha is not None:
        alpha = float(mixer.alpha[...])
        return Maps(alpha * window, gated, alpha * meta)
    assert mixer.beta is not None
    logs = _f64(found["near_log"])[0].T, _f64(found["far_log"])[0].T + _f64(mixer.beta[...])[:, None]
    share = np.exp(logs[0] - np.logaddexp(*logs))
    return Maps(share[..., None] * window, (1 - share)[..., None] * gated, share * meta)


def _window(
    mixer: "LizardMixer",
    query: Float[np.ndarray, "T H"],
    key: Float[np.ndarray, "T H"],
    rope: "_Rope",
    positions: Any,
) -> tuple[Bool[np.ndarray, "T T"], Float[np.ndarray, "T T"]]:
    """Which tokens the window branch of a head sees, the far prefix included, and its scores of them."""
    switches, time = mixer.switches, len(positions)

    def scores(at: Any) -> Float[np.ndarray, "T T"]:
        if not switches.window_rope:
            return _scores(query, key)
        return _scores(rope(query, at), rope(key, positions))

    near, log_weights = _near(time, switches.window), scores(positions)
    if switches.meta != "prefix":
        return near, log_weights
    tokens = switches.meta_tokens
    far = (positions[None] < tokens) & (positions[None] <= positions[:, None] - switches.window)
    return near | far, np.where(far, scores(np.minimum(positions, switches.window + tokens - 1)), log_weights)


def _linear(mixer: "LizardMixer", x: Any, q: Any, k: Any, rope: "_Rope") -> Float[np.ndarray, "N T T"]:
    """Log-weights of the gated linear branch, −∞ where there is none."""
    import jax.numpy as jnp

    switches, time = mixer.switches, q.shape[1]
    assert mixer.phi_q is not None
    assert mixer.phi_k is not None
    assert mixer.gate is not None
    positions = np.arange(time)
    age = switches.window if switches.memory == "evicted" else 0
    to_q, to_k = q, k
    if switches.linear_rope:
        to_q, to_k = (
            jnp.asarray(np.stack([rope(_f64(a)[0, :, n], positions) for n in range(a.shape[2])], axis=1)[None], a.dtype)
            for a in (q, k)
        )
    (q_feat, q_scale), (k_feat, k_scale) = mixer.phi_q(to_q), mixer.phi_k(to_k)
    q_feat, q_scale, k_feat, k_scale = (_f64(a)[0] for a in (q_feat, q_scale, k_feat, k_scale))
    gates = _f64(mixer.gate(x, k))[0]
    gates = gates if gates.ndim == 3 else gates[..., None]  # [T, S, F or 1]
    total = np.cumsum(gates, axis=0)
    # The decay of key j at query i is e^{g_{j+age+1} + … + g_i}: from its entry on, without its own gate.
    i, j = positions[:, None], positions[None]
    reach = j <= i - age
    if switches.memory == "evicted" and switches.meta == "prefix":
        reach = reach & (j >= switches.meta_tokens)
    entry = np.minimum(positions + age, time - 1)
    heads, states = q_feat.shape[1], k_feat.shape[1]
    out = np.full((heads, time, time), NOTHING)
    for n in range(heads):
        s = n * states // heads
        for row in range(age, time):
            keys = np.flatnonzero(reach[row])
            decay = np.exp(total[row, s] - total[entry[keys], s])
            with np.errstate(divide="ignore"):
                weight = np.log((q_feat[row, n] * decay * k_feat[keys, s]).sum(axis=-1))
            out[n, row, keys] = weight + q_scale[row, n] + k_scale[keys, s]
    return out


class _Rope:
    """Rotation of rows ``[T, H]`` by their positions; ``length`` as in ``inverse_frequencies``."""

    def __init__(self, rope: "RopeConfig", width: int, length: int | None) -> None:
        from lizard_jax.nn.rope import inverse_frequencies

        self.frequencies = _f64(inverse_frequencies(rope, width, length=length))

    def __call__(self, x: Float[np.ndarray, "T H"], positions: Any) -> Float[np.ndarray, "T H"]:
        angles = np.asarray(positions)[:, None] * self.frequencies
        first, second = np.split(x, 2, axis=-1)
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _scores(q: Float[np.ndarray, "T H"], k: Float[np.ndarray, "S H"]) -> Float[np.ndarray, "T S"]:
    return q @ k.T / q.shape[-1] ** 0.5


def _near(time: int, window: int) -> Bool[np.ndarray, "T T"]:
    i, j = np.arange(time)[:, None], np.arange(time)[None]
    return (j <= i) & (j > i - window)


def _softmax(logs: Float[np.ndarray, "T S"]) -> tuple[Float[np.ndarray, "T S"], Float[np.ndarray, " T"]]:
    """Weights and log-normalizers of rows of log-weights; a row of nothing gives 0 and −∞."""
    top = logs.max(axis=1, keepdims=True)
    there = np.isfinite(top)
    weights = np.where(there, np.exp(logs - np.where(there, top, 0.0)), 0.0)
    total = weights.sum(axis=1, keepdims=True)
    normalizer = np.where(there, np.where(there, top, 0.0) + np.log(np.where(there, total, 1.0)), NOTHING)
    return weights / np.where(there, total, 1.0), normalizer[:, 0]


def _f64(a: Any) -> np.ndarray:
    return np.asarray(a, np.float64)
