"""The learned rule once more, slow and plain: NumPy float64, one leaf, all feature planes in memory.

Written from the published equations, not from the package; it shares no code with it. Letters as in the paper:
g gradient, p parameter, m momenta, v second moment, R and C inverse roots of row and column moments.
"""

import dataclasses

import numpy as np

MOMENTUM = FACTORED = (0.9, 0.99, 0.999)
SECOND = 0.95


@dataclasses.dataclass
class State:
    m: list
    v: np.ndarray
    row: list
    col: list
    diag: list


def factored_axes(shape):
    """(d1, d0): the two largest axes, d0 the larger one, later axes first among equals."""
    order = np.argsort(shape, kind="stable")
    return order[-2], order[-1]


def init(shape, axes=None):
    """Zeros; `axes` overrides the factored axes (d1, d0) of a matrix view."""
    zeros = lambda size: [np.zeros(size) for _ in FACTORED]
    m, v = [np.zeros(shape) for _ in MOMENTUM], np.zeros(shape)
    if len(shape) < 2:
        return State(m, v, [], [], zeros(shape))
    d1, d0 = axes or factored_axes(shape)
    return State(m, v, zeros(np.delete(shape, d0)), zeros(np.delete(shape, d1)), [])


def features(g, p, state, d1, d0):
    """30 planes of a matrix, 15 of a vector, stacked on a new last axis."""
    s = 1 / np.sqrt(state.v + 1e-8)
    rsqrt = lambda x: 1 / np.sqrt(np.maximum(x, 1e-9))
    m, matrix = state.m, bool(state.row)
    if matrix:
        row, col = [np.expand_dims(r, d0) for r in state.row], [np.expand_dims(c, d1) for c in state.col]
        factor = [rsqrt(r / (r.mean(axis=d1, keepdims=True) + 1e-9)) * rsqrt(c) for r, c in zip(row, col, strict=True)]
    else:
        row = col = []
        factor = [1 / np.sqrt(d + 1e-9) for d in state.diag]
    groups = [
        [g],
        [np.clip(g, -0.1, 0.1)],
        [p],
        m,
        [state.v],
        [mk * s for mk in m],
        [s],
        [g * f for f in factor],
        [g * s],
    ]
    if matrix:
        groups += [
            row,
            col,
            [1 / np.sqrt(r + 1e-8) for r in row],
            [1 / np.sqrt(c + 1e-8) for c in col],
            [mk * f for mk, f in zip(m, factor, strict=True)],
        ]
    return np.stack([np.broadcast_to(x, g.shape) for group in groups for x in group], axis=-1)


def direction(theta, g, p, state, axes=None):
    """One step of a leaf in its view: the raw direction, and the new state."""
    g, p = np.clip(np.asarray(g, np.float64), -1000, 1000), np.asarray(p, np.float64)
    if g.ndim == 0:
        d, new = direction(theta, g[None], p[None], _map(lambda x: x[None], state), axes)
        return d[0], _map(lambda x: x[0], new)
    average = lambda beta, old, new: beta * old + (1 - beta) * new
    d1 = d0 = None
    square = g**2
    m = [average(b, old, g) for b, old in zip(MOMENTUM, state.m, strict=True)]
    v = average(SECOND, state.v, square)
    row = col = diag = []
    if g.ndim >= 2:
        d1, d0 = axes or factored_axes(g.shape)
        row = [average(b, old, (square + 1e-30).mean(d0)) for b, old in zip(FACTORED, state.row, strict=True)]
        col = [average(b, old, (square + 1e-30).mean(d1)) for b, old in zip(FACTORED, state.col, strict=True)]
    else:
        diag = [average(b, old, square + 1e-30) for b, old in zip(FACTORED, state.diag, strict=True)]
    new = State(m, v, row, col, diag)
    x = features(g, p, new, d1, d0)
    x = x / np.sqrt(np.mean(x**2, axis=tuple(range(g.ndim))[-2:], keepdims=True) + 1e-9)
    w0, b0, w1, b1, w2, b2 = (np.asarray(t, np.float64) for t in theta)
    x = np.maximum(x @ w0[: x.shape[-1]] + b0, 0)
    x = np.maximum(x @ w1 + b1, 0)
    return (x @ w2 + b2)[..., 0], new


def normalize(d):
    """Unit RMS over the last two axes (all there are, if fewer)."""
    return d / np.sqrt(np.mean(d**2, axis=tuple(range(d.ndim))[-2:], keepdims=True) + 1e-9)


def newton_schulz(x, triples=((3.4445, -4.7750, 2.0315),) * 5):
    """Every matrix of the last two axes on its own, as published."""
    x = np.asarray(x, np.float64)
    if x.ndim > 2:
        return np.stack([newton_schulz(part, triples) for part in x])
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T, triples).T
    x = x / (np.linalg.norm(x) + 1e-8)
    for a, b, c in triples:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def _map(f, state):
    fields = dataclasses.astuple(state)
    return State(*([f(x) for x in field] if isinstance(field, list) else f(field) for field in fields))


def linear(theta, config, g, m, v, t):
    """One step of the linear rule on one matrix or vector: the direction, and the new moments."""
    m = [b * old + (1 - b) * g for b, old in zip(config.momentum_decays, m, strict=True)]
    v = config.second_moment_decay * v + (1 - config.second_moment_decay) * g**2
    channels = [x / (v / v.mean() + config.floor) ** config.power for x in (g, *m)]
    weights = np.asarray(theta.weights, np.float64) * np.exp(np.asarray(theta.slopes, np.float64) * (t - 0.5))
    return sum(w * c / np.sqrt(np.mean(c**2)) for w, c in zip(weights, channels, strict=True)), m, v
