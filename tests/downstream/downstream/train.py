"""What a user's code does with the package, every call typed.

The ignored lines are about functions of JAX that pyright knows in part only; none is about celo2-harness.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers

import celo2_harness as c2
from celo2_harness import harness, plugins, routing, schedules

Params = Mapping[str, Float[Array, "..."]]


class TrainState(NamedTuple):
    """Everything that a step changes."""

    params: Params
    opt_state: optax.OptState


def loss_fn(params: Params, x: Float[Array, "batch width"]) -> Float[Array, ""]:
    """Mean squared error of a linear layer that should copy."""
    return jnp.mean((x @ params["kernel"] + params["bias"] - x) ** 2)


def make_optimizer(weights: Path | None = None) -> optax.GradientTransformationExtraArgs:
    """By name, with every kind of option."""
    loaded: c2.Weights | c2.LinearWeights = c2.load_weights("celo2" if weights is None else weights)
    return harness.build(
        preset="celo2_ortho",
        learning_rate=1e-3,
        total_steps=100,
        weight_decay=0.1,
        weights=loaded,
        rules=[
            ("^kernel$", "hidden", MuonDimensionNumbers((0,), (1,))),
            routing.Rule("bias", "vector", pattern="bias"),
        ],
    )


def make_chain() -> optax.GradientTransformation:
    """By hand, block by block."""
    rate: optax.Schedule = schedules.warmup_cosine(100, 0.1)
    return c2.guard_updates(
        optax.chain(
            c2.celo2_direction("celo2"),
            c2.orthogonalize("polar_express"),
            c2.normalize_rms("clip", threshold=2.0),
            c2.add_decayed_weights(0.1, "cautious"),
            optax.scale_by_learning_rate(rate),
        ),
        spike_factor=8.0,
    )


def make_preset() -> harness.Preset:
    """A preset of one's own."""

    def direction(settings: harness.Settings) -> optax.GradientTransformation:
        return c2.scale_by_shape(0.2, weight_dimension_numbers=settings.views)

    group = harness.Group("shape", direction)
    return harness.Preset("shape", "gradients scaled by shape", group, group, learning_rate=0.1)


def train(steps: int) -> tuple[float, int]:
    """Runs both optimizers one after the other; returns the loss and how many steps the guard saw."""
    params: Params = {"kernel": jnp.zeros((4, 4)), "bias": jnp.ones(4)}  # pyright: ignore[reportUnknownMemberType]
    tx = make_optimizer()
    state = TrainState(params, tx.init(params))
    x = jax.random.normal(jax.random.key(0), (8, 4))
    loss = jnp.zeros([])  # pyright: ignore[reportUnknownMemberType]
    for _ in range(steps):
        loss, gradients = jax.value_and_grad(loss_fn)(state.params, x)  # pyright: ignore[reportUnknownMemberType]
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        state = TrainState(cast(Params, optax.apply_updates(state.params, updates)), opt_state)
    guard = make_chain()
    guarded = guard.init(state.params)
    assert isinstance(guarded, c2.GuardState)
    count: Array = guarded.count
    return float(loss), int(count)


def report(params: Params) -> str:
    """Routing, presets and plug-ins, as text."""
    labels: list[str] = jax.tree.leaves(c2.label_params(params))
    names: tuple[str, ...] = plugins.plugin_names("presets")
    descriptions = [preset.description for preset in harness.presets().values()]
    matrix: Float[Array, "rows columns"] = c2.newton_schulz(jnp.eye(3), "quintic")  # pyright: ignore[reportUnknownMemberType]
    return "\n".join([c2.describe(params), *labels, *names, *descriptions, str(matrix.shape)])


def save(path: Path, weights: c2.Weights) -> str:
    """Writes a weight file and says what is in it."""
    try:
        c2.save_weights(path, weights, layout="published")
    except c2.WeightsError as error:
        return str(error)
    config: c2.RuleConfig = weights.config
    return f"{config.normalization}, {weights.theta.w0.shape}, {', '.join(c2.bundled_weights())}"
