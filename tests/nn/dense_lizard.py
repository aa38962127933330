"""Lizard attention written down from its definition, O(T²), in float64 numpy: what the mixer is tested against."""

import numpy as np

from lizard_jax.nn.lizard_attention import LizardMixer


def _f64(param) -> np.ndarray:
    return np.asarray(param[...], np.float64)


def _rotated(x: np.ndarray, position: np.ndarray, theta: float) -> np.ndarray:
    """RoPE of rows x[T, H] at positions[T], half-split layout."""
    half = x.shape[-1] // 2
    angle = position[:, None] * theta ** (-np.arange(half) / half)
    a, b = x[:, :half], x[:, half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def _log_sum_exp(logs: np.ndarray) -> np.ndarray:
    top = np.maximum(logs.max(-1), -1e30)
    with np.errstate(divide="ignore"):
        return np.where(top <= -1e29, -1e30, top + np.log(np.exp(logs - top[:, None]).sum(-1)))


def _log_gates(mixer: LizardMixer, x: np.ndarray, k: np.ndarray, head: int) -> np.ndarray:
    """log γ[T, F] of one state head (equal along F for scalar gates)."""
    gate, features = mixer.gate, mixer.feature_width

    def sigmoid(a):
        return 1 / (1 + np.exp(-a))

    kind = mixer.switches.gate
    ones = np.ones((1, features))
    if kind == "none":
        return np.zeros((len(x), features))
    if kind == "pooled":
        return np.log(sigmoid(k.mean(-1)))[:, None] * ones
    w = _f64(gate.kernel)
    if kind == "scalar":
        bias = 0.0 if gate.bias is None else _f64(gate.bias)[head]
        return np.log(sigmoid(x @ w[:, head] + bias))[:, None] * ones
    if kind == "mamba2":
        return -np.log1p(np.exp(x @ w[:, head]))[:, None] * np.exp(_f64(gate.bias)[head]) * ones
    if kind == "low_rank":
        return np.log(sigmoid(x @ _f64(gate.down) @ w[:, head]))
    return np.log(sigmoid(x @ w[:, head]))


def _phi(mixer: LizardMixer, fmap, x: np.ndarray, head: int) -> np.ndarray:
    s = x @ _f64(fmap.kernel)[head]
    if mixer.switches.act == "exp":
        return np.concatenate([np.exp(s), np.exp(-s)], -1)
    both = []
    for a in (s, -s):
        e = np.exp(a - a.max(-1, keepdims=True))
        both.append(e / e.sum(-1, keepdims=True))
    return np.concatenate(both, -1)


def dense_heads(mixer: LizardMixer, x, q, k, v, segments) -> np.ndarray:
    """Head outputs [B, T, N, H] before o_proj."""
    x, q, k, v = (np.asarray(a, np.float64) for a in (x, q, k, v))
    segments = np.asarray(segments)
    return np.stack([_dense_row(mixer, *row) for row in zip(x, q, k, v, segments, strict=True)])


def _dense_row(mixer: LizardMixer, x, q, k, v, seg) -> np.ndarray:
    s, theta = mixer.switches, mixer.config.rope.theta
    time, heads, width = q.shape
    group = heads // k.shape[1]
    i, j = np.arange(time)[:, None], np.arange(time)[None, :]
    start = np.array([np.flatnonzero(seg == seg[t])[0] for t in range(time)])
    position = np.arange(time) - start
    same = (seg[:, None] == seg[None, :]) & (seg[:, None] != 0)
    near = same & (j <= i) & (j > i - s.window)
    out = np.zeros_like(q)
    for n in range(heads):
        qn, kn, vn = q[:, n], k[:, n // group], v[:, n // group]
        turn = (lambda a, p: _rotated(a, p, theta)) if s.window_rope else (lambda a, p: a)
        scores = turn(qn, position) @ turn(kn, position).T / width**0.5
        logs, values = [np.where(near, scores, -np.inf)], [vn]
        is_prefix = position < s.meta_tokens
        if s.meta == "prefix":
            far_query = turn(qn, np.minimum(position, s.window + s.meta_tokens - 1))
            far = far_query @ turn(kn, position).T / width**0.5
            logs.append(np.where(same & is_prefix[None] & (j <= i - s.window), far, -np.inf))
            values.append(vn)
        if s.meta == "learned":
            logs.append(qn @ _f64(mixer.meta_k)[:, n // group].T / width**0.5)
            values.append(_f64(mixer.meta_v)[:, n // group])
        if s.meta == "sink":
            logs.append(np.full((time, 1), _f64(mixer.sink)[n]))
            values.append(np.zeros((1, width)))
        log_w = np.concatenate(logs, -1)
        n_w = _log_sum_exp(log_w)
        y_w = np.exp(log_w - n_w[:, None]) @ np.concatenate(values)
        if s.memory == "none":
            out[:, n] = y_w
            continue

        age = s.window if s.memory == "evicted" else 0
        state_head = n if mixer.state_heads == heads else n // group
        ql, kl = (_rotated(a, position, theta) if s.linear_rope else a for a in (qn, kn))
        phi_q, phi_k = _phi(mixer, mixer.phi_q, ql, n), _phi(mixer, mixer.phi_k, kl, state_head)
        g = _log_gates(mixer, x, kn, state_head)
        reach = same & (j <= i - age)
        if s.memory == "evicted" and s.meta == "prefix":
            reach &= ~is_prefix[None]
        weight = np.zeros((time, time))
        for a in range(time):
            for b in np.flatnonzero(reach[a]):
                decay = np.exp(g[b + age + 1 : a + 1].sum(0))
                weight[a, b] = (phi_q[a] * decay * phi_k[b]).sum()
        total = weight.sum(-1)
        y_g = weight @ vn / np.where(total > 0, total, 1)[:, None]
        with np.errstate(divide="ignore"):
            n_g = np.where(total > 0, np.log(total), -np.inf)
        if s.combine == "sum":
            out[:, n] = y_g + _f64(mixer.alpha) * y_w
        else:
            both = np.stack([n_w, n_g + _f64(mixer.beta)[n]], -1)
            share = np.exp(both - _log_sum_exp(both)[:, None])
            out[:, n] = share[:, :1] * y_w + share[:, 1:] * y_g
    return np.where((seg != 0)[:, None, None], out, 0.0)
