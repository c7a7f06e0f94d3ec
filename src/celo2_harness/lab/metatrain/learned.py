"""What is learned: per kind of rule its first numbers, its step in the inner loop, its weights, and its files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from celo2_harness.lab.metatrain.config import MetaTrainConfig
from celo2_harness.lab.metatrain.problem import Clock
from celo2_harness.lab.metatrain.update import Views, apply_update, init_update
from celo2_harness.lab.metatrain.velo import apply_velo, init_velo
from celo2_harness.rule import Theta, channel_counts
from celo2_harness.velo import VELO_S, VeloTheta, VeloWeights, load_velo_weights, save_velo_weights
from celo2_harness.velo.config import Affine
from celo2_harness.velo.config import init_theta as init_velo_theta
from celo2_harness.velo.weights_file import FORMAT as VELO_FORMAT
from celo2_harness.weights import Weights, load_weights, save_weights
from celo2_harness.weights.container import is_packed, read_file, restore

AnyWeights = Weights | VeloWeights


class InnerStep(NamedTuple):
    """What a rule may look at in one step of an unroll, beside parameters and its own state: views of the leaves (None
    for Adam), gradients, the loss that they are of, where the unroll stands, and the step size of now."""

    views: Views
    gradients: Sequence[Array]
    loss: Float[Array, ""]
    clock: Clock
    step_size: Float[Array, ""]


class LearnedRule(NamedTuple):
    """A kind of rule.

    `init` (config, key) gives random numbers; `start` (config, views, leaves) the state of an unroll before its first
    step; `step` (config, theta, leaves, state, step) the new leaves and state; `weights` (config, theta, provenance)
    what is saved; `load` (config, source) reads it, refusing what was trained as something else; `save` (path, weights)
    writes it; `theta` makes the tree of numbers out of nested dicts.
    """

    init: Callable[[MetaTrainConfig, Array], Any]
    start: Callable[[MetaTrainConfig, Views, Sequence[Array]], Any]
    step: Callable[[MetaTrainConfig, Any, list[Array], Any, InnerStep], tuple[list[Array], Any]]
    weights: Callable[[MetaTrainConfig, Any, Mapping[str, Any]], AnyWeights]
    load: Callable[[MetaTrainConfig, Any], AnyWeights]
    save: Callable[[Path, Any], None]
    theta: Callable[[Mapping[str, Any]], Any]


def init_celo2(config: MetaTrainConfig, key: Array) -> Theta:
    """Kernels from a normal cut off at 2 sigma, sigma = 1 / sqrt(fan in); zero biases; three outputs."""
    channels, hidden, outputs = sum(channel_counts(config.rule)), config.hidden, 3
    keys = jax.random.split(key, 3)
    kernel = lambda k, i, o: jax.random.truncated_normal(k, -2.0, 2.0, (i, o)) / jnp.sqrt(i)
    return Theta(
        w0=kernel(keys[0], channels, hidden),
        b0=jnp.zeros(hidden),
        w1=kernel(keys[1], hidden, hidden),
        b1=jnp.zeros(hidden),
        w2=kernel(keys[2], hidden, outputs),
        b2=jnp.zeros(outputs),
    )


def _celo2_step(
    config: MetaTrainConfig, theta: Theta, leaves: list[Array], state: Any, step: InnerStep
) -> tuple[list[Array], Any]:
    return apply_update(
        rule=config.rule,
        views=step.views,
        orthogonalize=config.variant == "ortho",
        theta=theta,
        leaves=leaves,
        gradients=step.gradients,
        state=state,
        count=step.clock.step,
        step_size=step.step_size,
        adam_factor=config.adam_factor,
    )


def _velo_step(
    config: MetaTrainConfig, theta: VeloTheta, leaves: list[Array], state: Any, step: InnerStep
) -> tuple[list[Array], Any]:
    del config
    return apply_velo(theta, step.views, leaves, step.gradients, state, step.loss, step.clock.length)


def _velo_theta(tree: Mapping[str, Any]) -> VeloTheta:
    parts: dict[str, Any] = {name: Affine(**x) if isinstance(x, Mapping) else x for name, x in tree.items()}
    return VeloTheta(**parts)


CELO2 = LearnedRule(
    init=init_celo2,
    start=lambda config, views, leaves: init_update(config.rule, views, leaves),
    step=_celo2_step,
    weights=lambda config, theta, facts: Weights(jax.tree.map(np.asarray, theta), config.rule, facts),
    load=lambda config, source: load_weights(source, expect=config.rule),
    save=save_weights,
    theta=lambda tree: Theta(**tree),
)
SMALL_VELO = LearnedRule(
    init=lambda config, key: init_velo_theta(VELO_S, key),
    start=lambda config, views, leaves: init_velo(views),
    step=_velo_step,
    weights=lambda config, theta, facts: VeloWeights(jax.tree.map(np.asarray, theta), VELO_S, facts),
    load=lambda config, source: load_velo_weights(source, published_as=VELO_S, expect=VELO_S),
    save=save_velo_weights,
    theta=_velo_theta,
)
# By variant of the run.
LEARNED: dict[str, LearnedRule] = {"ortho": CELO2, "base": CELO2, "velo_s": SMALL_VELO}


def save_rule(path: Path, weights: AnyWeights) -> None:
    """Writes the weights of any kind of rule."""
    (SMALL_VELO if isinstance(weights, VeloWeights) else CELO2).save(path, weights)


def load_rule(path: Path) -> AnyWeights:
    """Reads what `save_rule` has written.

    Raises:
      WeightsError: as `load_weights` and `load_velo_weights`.
    """
    is_velo = is_packed(restore(read_file(str(path), ""), str(path)), VELO_FORMAT)
    return load_velo_weights(path) if is_velo else load_weights(path)
