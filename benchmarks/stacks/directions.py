"""What the stacks are made of. Every choice is a number, traced, so that one compiled program trains all rows.

A switch that is off costs a little arithmetic and no compilation; see `NUMBERS` for what there is.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from benchmarks.stacks.eigenbasis import follow, init_bases, orient, refresh_bases, rotate
from jax import Array

from celo2_harness import RuleConfig, Theta, Weights, celo2_direction, normalize_rms, orthogonalize
from celo2_harness.routing import label_params
from celo2_harness.rule import default_view, init_moments, leaf_direction

Numbers = Mapping[str, Any]

NUMBERS: dict[str, float] = {
    # Learning rates: the root mean square of a step of a hidden matrix, and AdamW's; factors of the latter by role.
    "hidden_rate": 2e-3,
    "rest_rate": 1e-2,
    "embedding_factor": 1.0,
    "head_factor": 1.0,
    "vector_factor": 1.0,
    # Schedule, in parts of the run: linear warm-up, then flat, then (1 - t)^power down to a floor; power 0: a cosine.
    "warmup": 0.05,
    "flat": 0.0,
    "power": 0.0,
    "floor": 0.0,
    # AdamW's side.
    "b1": 0.9,
    "embedding_b2": 0.95,
    "head_b2": 0.95,
    "vector_b2": 0.95,
    # Weight decay, and whether it acts only where the step shrinks the parameter.
    "weight_decay": 0.0,
    "rest_weight_decay": 0.0,
    "cautious": 0.0,
    # Momenta before Newton-Schulz: weights of the gradient and of three momenta, their decays, and how the logarithm of
    # a weight changes over the run; 1 to give every part the same root mean square before it is weighed.
    "gradient": 0.05,
    "decay_1": 0.95,
    "weight_1": 0.95,
    "slope_1": 0.0,
    "decay_2": 0.99,
    "weight_2": 0.0,
    "slope_2": 0.0,
    "decay_3": 0.999,
    "weight_3": 0.0,
    "slope_3": 0.0,
    "normalized": 0.0,
    # The basis: decays of covariance and second moment; the power of the second moment that parts are divided by, and
    # what is added to it.
    "basis_decay": 0.95,
    "second_decay": 0.95,
    "whitening": 0.5,
    "second_floor": 1e-16,
    # A learned rule: its place in `THETAS`.
    "theta": 0.0,
    # After Newton-Schulz: rows of one length (1), the norm of each matrix pinned (1: the rate is an angle), momentum of
    # the applied steps.
    "row_norm": 0.0,
    "hyperball": 0.0,
    "look_ahead": 0.0,
    "look_ahead_decay": 0.97,
}


def schedule_shape(n: Numbers, t: Array) -> Array:
    """The learning rate at a part t of the run, over its peak."""
    rising = t / jnp.maximum(n["warmup"], 1e-6)
    x = jnp.clip((t - n["warmup"]) / (1.0 - n["warmup"]), 0.0, 1.0)
    x = jnp.clip((x - n["flat"]) / (1.0 - n["flat"]), 0.0, 1.0)
    falling = jnp.where(n["power"] > 0.0, (1.0 - x) ** jnp.maximum(n["power"], 1e-6), 0.5 * (1.0 + jnp.cos(jnp.pi * x)))
    return jnp.where(t < n["warmup"], rising, n["floor"] + (1.0 - n["floor"]) * falling)


def stack_layers(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same transformation on stacks of the leaves of one shape: a quarter of the work for the compiler."""

    def pack(tree: Any) -> dict[str, Array]:
        groups: dict[str, list[Array]] = {}
        for leaf in jax.tree.leaves(tree):
            groups.setdefault("x".join(map(str, leaf.shape)), []).append(leaf)
        return {name: jnp.stack(leaves) for name, leaves in groups.items()}

    def unpack(stacks: dict[str, Array], like: Any) -> Any:
        leaves, structure = jax.tree.flatten(like)
        parts = {name: iter(stack) for name, stack in stacks.items()}
        return structure.unflatten([next(parts["x".join(map(str, leaf.shape))]) for leaf in leaves])

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        stacks, state = inner.update(pack(updates), state, pack(params))
        return unpack(stacks, updates), state

    return optax.GradientTransformation(lambda params: inner.init(pack(params)), update)


class LinearState(NamedTuple):
    """Momenta of every stack of matrices and, with a basis, second moments, covariances and bases; else empty."""

    count: Array
    momenta: list[tuple[Array, Array, Array]]
    second: list[Array]
    covariance: list[Array]
    basis: list[Array]


def linear_direction(n: Numbers, steps: int, *, basis: bool) -> optax.GradientTransformation:
    """Gradient and three momenta, weighed and summed; with a basis, each whitened in it before.

    u = sum_k w_k c_k / rms(c_k)^normalized, with c_k the gradient or a momentum, in the basis Q^T c_k / (v + floor)^p
    and v the second moment of Q^T g. Whitening the sum and summing whitened parts are the same where nothing is
    normalised; with it, this is a learned rule's linear part acting in the basis.
    """
    decays = [n[f"decay_{k}"] for k in (1, 2, 3)]

    def init(params: Any) -> LinearState:
        leaves = [orient(leaf) for leaf in jax.tree.leaves(params)]
        bases = init_bases([leaf.shape for leaf in leaves]) if basis else []
        return LinearState(
            jnp.zeros([], jnp.int32),
            [tuple(jnp.zeros_like(leaf) for _ in decays) for leaf in leaves],  # type: ignore[misc]
            [jnp.zeros_like(leaf) for leaf in leaves] if basis else [],
            [jnp.zeros_like(b) for b in bases],
            bases,
        )

    def update(updates: Any, state: LinearState, params: Any = None) -> tuple[Any, LinearState]:
        del params
        leaves, structure = jax.tree.flatten(updates)
        gradients = [orient(leaf) for leaf in leaves]
        time = state.count / steps
        weights = [n["gradient"], *(n[f"weight_{k}"] * jnp.exp(n[f"slope_{k}"] * (time - 0.5)) for k in (1, 2, 3))]
        momenta = [
            tuple(d * m + (1.0 - d) * g for d, m in zip(decays, old, strict=True))
            for g, old in zip(gradients, state.momenta, strict=True)
        ]
        second, covariance, bases = state.second, state.covariance, state.basis
        directions = []
        if not basis:
            for g, parts in zip(gradients, momenta, strict=True):
                directions.append(_weighed(n, weights, [g, *parts]))
        else:
            second = [
                n["second_decay"] * v + (1.0 - n["second_decay"]) * jnp.square(rotate(q, g))
                for v, q, g in zip(second, bases, gradients, strict=True)
            ]
            for g, parts, v, q in zip(gradients, momenta, second, bases, strict=True):
                inverse = jnp.exp(-n["whitening"] * jnp.log(v + n["second_floor"]))
                directions.append(q @ _weighed(n, weights, [rotate(q, part) * inverse for part in (g, *parts)]))
            covariance, bases, orders = move(n, gradients, covariance, bases)
            second = [follow(order, v) for order, v in zip(orders, second, strict=True)]
        state = LinearState(state.count + 1, momenta, second, covariance, bases)  # type: ignore[arg-type]
        # Oriented again, a matrix is what it was.
        turned = [d if d.shape == u.shape else jnp.swapaxes(d, -1, -2) for d, u in zip(directions, leaves, strict=True)]
        return structure.unflatten(turned), state

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _weighed(n: Numbers, weights: list[Any], parts: list[Array]) -> Array:
    rms = lambda x: jnp.sqrt(jnp.mean(jnp.square(x), axis=(-2, -1), keepdims=True) + 1e-30)
    return sum(w * part / rms(part) ** n["normalized"] for w, part in zip(weights, parts, strict=True))  # type: ignore[return-value]


def move(n: Numbers, gradients: list[Array], covariance: list[Array], bases: list[Array]) -> Any:
    """Covariances with these gradients, bases after one power step, and the orders they follow."""
    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    covariance = [
        n["basis_decay"] * c + (1.0 - n["basis_decay"]) * product(g, jnp.swapaxes(g, -1, -2))
        for c, g in zip(covariance, gradients, strict=True)
    ]
    return covariance, *refresh_bases(covariance, bases)


class ThetaState(NamedTuple):
    """Moments of the rule, seen in the basis, covariances and bases of every stack of matrices."""

    moments: list[Any]
    covariance: list[Array]
    basis: list[Array]


def theta_direction(n: Numbers, steps: int, *, basis: bool, thetas: Theta) -> optax.GradientTransformation:
    """A learned rule; with a basis, it sees gradients and parameters in it, and its moments move along."""
    del steps
    config = RuleConfig()
    theta = Theta(*(jnp.asarray(x)[n["theta"].astype(jnp.int32)] for x in thetas))
    if not basis:
        return celo2_direction(Weights(theta, config))

    def init(params: Any) -> ThetaState:
        leaves = [orient(leaf) for leaf in jax.tree.leaves(params)]
        bases = init_bases([leaf.shape for leaf in leaves])
        moments = [init_moments(config, default_view(leaf.shape)) for leaf in leaves]
        return ThetaState(moments, [jnp.zeros_like(b) for b in bases], bases)

    def update(updates: Any, state: ThetaState, params: Any = None) -> tuple[Any, ThetaState]:
        leaves, structure = jax.tree.flatten(updates)
        gradients = [orient(leaf) for leaf in leaves]
        directions, moments = [], []
        for g, p, m, q in zip(gradients, jax.tree.leaves(params), state.moments, state.basis, strict=True):
            seen = rotate(q, g)
            result = leaf_direction(theta, config, default_view(g.shape), seen, rotate(q, orient(p)), m)
            directions.append(q @ result.direction)
            moments.append(result.moments)
        covariance, bases, orders = move(n, gradients, state.covariance, state.basis)
        moved = []
        for m, old, new, order in zip(moments, state.basis, bases, orders, strict=True):
            turn = jnp.swapaxes(new, -1, -2) @ old
            mu = tuple(turn @ x for x in m.mu)
            moved.append(m._replace(mu=mu, nu=follow(order, m.nu), row=tuple(follow(order, r) for r in m.row)))
        turned = [d if d.shape == u.shape else jnp.swapaxes(d, -1, -2) for d, u in zip(directions, leaves, strict=True)]
        return structure.unflatten(turned), ThetaState(moved, covariance, bases)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def equalize_rows(n: Numbers) -> optax.GradientTransformation:
    """Rows (one per output) of one root mean square, as far as `row_norm` says."""

    def equal(x: Array) -> Array:
        return x * (jnp.mean(jnp.square(x), axis=-2, keepdims=True) + 1e-12) ** (-0.5 * n["row_norm"])

    return optax.stateless(lambda updates, params: jax.tree.map(equal, updates))


def decay_weights(n: Numbers, decay: str) -> optax.GradientTransformation:
    """Weight decay, cautious if asked for."""

    def decayed(u: Array, p: Array) -> Array:
        return u + n[decay] * p * jnp.where((u * p <= 0.0) & (n["cautious"] > 0.0), 0.0, 1.0)

    return optax.stateless(lambda updates, params: jax.tree.map(decayed, updates, params))


def pin_norms(n: Numbers) -> optax.GradientTransformation:
    """With `hyperball`, steps relative to the norm of a matrix, which they leave as it is."""

    def pinned(u: Array, p: Array) -> Array:
        norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True) + 1e-30)
        moved = p + u * norm(p) / p.shape[-1] ** 0.5 / p.shape[-2] ** 0.5
        return jnp.where(n["hyperball"] > 0.0, moved * norm(p) / norm(moved) - p, u)

    return optax.stateless(lambda updates, params: jax.tree.map(pinned, updates, params))


class LookAheadState(NamedTuple):
    """Step count and the mean of the applied steps."""

    count: Array
    steps: Any


def look_ahead(n: Numbers, steps: int) -> optax.GradientTransformation:
    """Momentum of the applied steps from 15% to 75% of the run: u <- u + b e, e <- gamma e + (1 - gamma) u."""

    def update(updates: Any, state: LookAheadState, params: Any = None) -> Any:
        del params
        time = state.count / steps
        strength = jnp.where((time > 0.15) & (time < 0.75), n["look_ahead"] * schedule_shape(n, time), 0.0)
        updates = jax.tree.map(lambda u, e: u + strength * e, updates, state.steps)
        gamma = n["look_ahead_decay"]
        mean = jax.tree.map(lambda u, e: gamma * e + (1.0 - gamma) * u, updates, state.steps)
        return updates, LookAheadState(state.count + 1, mean)

    init = lambda params: LookAheadState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params))
    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def assemble(
    direction: Callable[[Numbers, int], optax.GradientTransformation], n: Numbers, steps: int
) -> optax.GradientTransformation:
    """The whole optimizer: a direction for hidden matrices, AdamW by role for the rest."""

    def rate(*names: str) -> optax.GradientTransformation:
        factor = jnp.prod(jnp.stack([jnp.asarray(n[name], jnp.float32) for name in names]))
        return optax.scale_by_schedule(lambda count: -factor * schedule_shape(n, count / steps))

    def adamw(role: str) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(n["b1"], n[f"{role}_b2"]),
            decay_weights(n, "rest_weight_decay"),
            rate("rest_rate", f"{role}_factor"),
        )

    hidden = optax.chain(
        direction(n, steps),
        # The usual precision of accelerators' matrix products, as optax.contrib.muon has it.
        orthogonalize(precision=jax.lax.Precision.DEFAULT),
        equalize_rows(n),
        normalize_rms(),
        decay_weights(n, "weight_decay"),
        rate("hidden_rate"),
        pin_norms(n),
    )
    transforms = {role: adamw(role) for role in ("embedding", "head", "vector")} | {"hidden": stack_layers(hidden)}
    labels = lambda params: jax.tree.map(lambda label: "vector" if label == "other" else label, label_params(params))
    return optax.chain(optax.partition(transforms, labels), look_ahead(n, steps))


def optax_muon(n: Numbers, steps: int) -> optax.GradientTransformation:
    """`optax.contrib.muon` as it is: every matrix, embeddings and head too; Adam for vectors. Rates are its own."""
    schedule = lambda peak: lambda count: peak * schedule_shape(n, count / steps)
    return stack_layers(
        optax.contrib.muon(
            schedule(n["hidden_rate"]),
            adam_learning_rate=schedule(n["rest_rate"]),
            weight_decay=n["weight_decay"],
            muon_weight_dimension_numbers=lambda params: jax.tree.map(
                lambda x: optax.contrib.MuonDimensionNumbers(1, 2) if x.ndim == 3 else None, params
            ),
        )
    )


def hand_set(channels: Mapping[int, float]) -> Theta:
    """A theta that passes on a weighed sum of channels: two of eight units are its positive and its negative part."""
    theta = Theta(*(np.zeros(shape, np.float32) for shape in ((30, 8), 8, (8, 8), 8, (8, 3), 3)))
    for channel, weight in channels.items():
        theta.w0[channel, :2] = weight, -weight
    theta.w1[0, 0] = theta.w1[1, 1] = 1.0
    theta.w2[:2, 0] = 1.0, -1.0
    return theta
