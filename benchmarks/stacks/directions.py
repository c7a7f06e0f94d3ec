"""What the stacks are made of. Every choice is a number, traced, so that one compiled program trains all rows.

A switch that is off costs a little arithmetic and no compilation; see `NUMBERS` for what there is.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from celo2_harness import RuleConfig, Theta, Weights, celo2_direction, normalize_rms, orthogonalize
from celo2_harness.blocks import control_norm, in_eigenbasis, look_ahead, mix_momenta
from celo2_harness.lab.metatrain.starts import HAND_MADE, channel_weights, hand_made_theta
from celo2_harness.routing import label_params

Numbers = Mapping[str, Any]
# From numbers and the length of the run to what is done to the gradients of hidden matrices before Newton-Schulz.
Direction = Callable[[Numbers, int], optax.GradientTransformation]

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
    # The basis: decays of covariance and second moment, and what is added to the latter, as a part of its mean.
    "basis_decay": 0.95,
    "second_decay": 0.95,
    "eps": 1e-8,
    # Of a linear rule that acts in the basis: the power of the second moment that parts are divided by, and what is
    # added to it.
    "whitening": 0.5,
    "floor_of_second": 1e-16,
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


def two_passes(y: Array) -> Array:
    """Orthonormal columns by Cholesky QR, in two passes always: a loop until it is done waits for the worst matrix.

    The first pass has a shift for columns that are nearly dependent; Newton-Schulz takes away what rounding leaves.
    """
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    gram = lambda q: product(jnp.swapaxes(q, -1, -2), q)
    identity = jnp.eye(y.shape[-1])
    q = y / (jnp.linalg.norm(y, axis=-2, keepdims=True) + 1e-30)
    for shift in (3e-5, 1e-6):
        lower = jnp.linalg.cholesky(gram(q) + shift * identity, symmetrize_input=False)
        q = jax.lax.linalg.triangular_solve(lower, q, left_side=False, lower=True, transpose_a=True)
    return product(q, 1.5 * identity - 0.5 * gram(q))


def mixed(n: Numbers, steps: int) -> optax.GradientTransformation:
    """Gradient and three momenta, weighed and summed."""
    ahead = 1.0 - n["gradient"]
    weights = [lambda count, k=k: _weight(n, k, count / steps) / ahead for k in (1, 2, 3)]
    return mix_momenta([n[f"decay_{k}"] for k in (1, 2, 3)], weights, lambda count: ahead)


def whitened(n: Numbers, steps: int) -> optax.GradientTransformation:
    """The same, whitened in the eigenbasis."""
    return in_eigenbasis(
        mixed(n, steps),
        n["basis_decay"],
        second_moment_decay=n["second_decay"],
        eps=n["eps"],
        orthonormalize=two_passes,
    )


class LinearRuleState(NamedTuple):
    """Step count, three momenta and a second moment."""

    count: Array
    mu: tuple[Any, Any, Any]
    nu: Any


def linear_rule(n: Numbers, steps: int) -> optax.GradientTransformation:
    """The linear part of a learned rule: u = sum_k w_k c_k / rms(c_k), with c_k = m_k / (v + f)^p and m_0 = g."""
    decays = [n[f"decay_{k}"] for k in (1, 2, 3)]

    def init(params: Any) -> LinearRuleState:
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        return LinearRuleState(jnp.zeros([], jnp.int32), (zeros(), zeros(), zeros()), zeros())

    def update(updates: Any, state: LinearRuleState, params: Any = None) -> tuple[Any, LinearRuleState]:
        del params
        mean = lambda decay, old, new: jax.tree.map(lambda x, y: decay * x + (1.0 - decay) * y, old, new)
        mu = tuple(mean(decay, old, updates) for decay, old in zip(decays, state.mu, strict=True))
        nu = mean(n["second_decay"], state.nu, jax.tree.map(jnp.square, updates))
        weights = [n["gradient"], *(_weight(n, k, state.count / steps) for k in (1, 2, 3))]

        def direction(v: Array, *parts: Array) -> Array:
            inverse = jnp.exp(-n["whitening"] * jnp.log(v + n["floor_of_second"]))
            channels = [part * inverse for part in parts]
            rms = lambda x: jnp.sqrt(jnp.mean(jnp.square(x), axis=(-2, -1), keepdims=True) + 1e-30)
            return sum(w * c / rms(c) ** n["normalized"] for w, c in zip(weights, channels, strict=True))  # type: ignore[return-value]

        return jax.tree.map(direction, nu, updates, *mu), LinearRuleState(state.count + 1, mu, nu)  # type: ignore[arg-type]

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _weight(n: Numbers, k: int, time: Any) -> Any:
    return n[f"weight_{k}"] * jnp.exp(n[f"slope_{k}"] * (time - 0.5))


def acting(inner: Direction) -> Direction:
    """A direction that acts in the eigenbasis."""
    return lambda n, steps: in_eigenbasis(inner(n, steps), n["basis_decay"], mode="act", orthonormalize=two_passes)


def theta_direction(thetas: Theta) -> Direction:
    """Learned rules, stacked on the first axis; a number says which."""

    def direction(n: Numbers, steps: int) -> optax.GradientTransformation:
        del steps
        theta = Theta(*(jnp.asarray(x)[n["theta"].astype(jnp.int32)] for x in thetas))
        return celo2_direction(Weights(theta, RuleConfig()))

    return direction


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


def take_step(n: Numbers, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The learning rate; with `hyperball` an angle, and norms stay."""
    plain, pinned = optax.scale_by_learning_rate(schedule), control_norm("hyperball", schedule)

    def update(updates: Any, states: Any, params: Any = None) -> Any:
        step, first = plain.update(updates, states[0], params)
        turn, second = pinned.update(updates, states[1], params)
        return jax.tree.map(lambda u, v: jnp.where(n["hyperball"] > 0.0, v, u), step, turn), (first, second)

    return optax.GradientTransformation(lambda params: (plain.init(params), pinned.init(params)), update)


def assemble(direction: Direction, n: Numbers, steps: int) -> optax.GradientTransformation:
    """The whole optimizer: a direction for hidden matrices, AdamW by role for the rest."""

    def schedule(*names: str) -> optax.Schedule:
        peak = jnp.prod(jnp.stack([jnp.asarray(n[name], jnp.float32) for name in names]))
        return lambda count: peak * schedule_shape(n, count / steps)

    def adamw(role: str) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(n["b1"], n[f"{role}_b2"]),
            decay_weights(n, "rest_weight_decay"),
            optax.scale_by_learning_rate(schedule("rest_rate", f"{role}_factor")),
        )

    hidden = optax.chain(
        direction(n, steps),
        # The usual precision of accelerators' matrix products, as optax.contrib.muon has it.
        orthogonalize(precision=jax.lax.Precision.DEFAULT),
        equalize_rows(n),
        normalize_rms(),
        decay_weights(n, "weight_decay"),
        take_step(n, schedule("hidden_rate")),
    )
    transforms = {role: adamw(role) for role in ("embedding", "head", "vector")} | {"hidden": stack_layers(hidden)}
    labels = lambda params: jax.tree.map(lambda label: "vector" if label == "other" else label, label_params(params))
    strength = lambda count: n["look_ahead"] * schedule_shape(n, count / steps)
    parts = optax.partition(transforms, labels)
    if not isinstance(steps, int):  # traced: the length is not known, and without a length there is no look-ahead
        return parts
    return optax.chain(parts, look_ahead(strength, n["look_ahead_decay"], total_steps=steps))


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


def hand_set(name: str) -> Theta:
    """The theta of a rule made by hand, without any other units."""
    config = RuleConfig()
    zeros = Theta(*(np.zeros(shape, np.float32) for shape in ((30, 8), 8, (8, 8), 8, (8, 3), 3)))
    return hand_made_theta(config, zeros, channel_weights(config, HAND_MADE[name], (1.0, 1.9, 0.76), name))
