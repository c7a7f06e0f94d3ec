"""Momentum on several time scales, with Nesterov's step ahead."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Int

from celo2_harness._types import Params, ScalarOrSchedule, Updates
from celo2_harness.blocks.views import zeros_like_params
from celo2_harness.rule import resolve_state_dtype


class MixMomentaState(NamedTuple):
    """Step count, and per decay a momentum for every parameter."""

    count: Int[Array, ""]
    mu: tuple[Updates, ...]


def mix_momenta(
    decays: Sequence[ArrayLike] = (0.95,),
    weights: Sequence[ScalarOrSchedule] | None = None,
    nesterov: bool | ScalarOrSchedule = True,
    *,
    state_dtype: Any = "float32",
) -> optax.GradientTransformation:
    """Replaces the gradient g by a weighted sum of it and of its averages over several time scales.

    m_k <- b_k m_k + (1 - b_k) g;  u = (1 - a) g + a (w_1 m_1 + ... + w_K m_K)

    With one decay b and a = b this is Muon's momentum, and `optax.trace(b, nesterov=True)` times 1 - b. A momentum of
    decay b is as old as 1 / (1 - b) steps in the mean. There is no bias correction: slow momenta grow in over their
    first steps.

    Args:
        decays: The decays b_1, ..., b_K.
        weights: The weights w_1, ..., w_K, each a number or a schedule of the step count. They usually sum to one,
            which is not enforced; None is 1 / K each.
        nesterov: The share a, a number or a schedule. True is the mean decay, w_1 b_1 + ... + w_K b_K; False is one,
            which is plain momentum.
        state_dtype: The dtype of the momenta, float32 or bfloat16. Arithmetic is float32.

    Returns:
        An `optax.GradientTransformation` whose state is K times the parameters. Updates keep the gradient's dtype.
        Where an entry of the gradient (or its square) is not finite, the state stays as it is and the update is zero.

    Raises:
        ValueError: If there is no decay, or there are not as many weights as decays.

    Example:
        >>> tx = mix_momenta((0.9, 0.99), weights=(0.7, 0.3))
        >>> params = {"w": jnp.zeros(1)}
        >>> updates, state = tx.update({"w": jnp.ones(1)}, tx.init(params))
        >>> round(float(updates["w"][0]), 5)  # a = 0.927, m = 0.1 and 0.01: 0.073 + 0.927 (0.07 + 0.003)
        0.14067

    References:
        AdEMAMix, arXiv 2409.03137 (two time scales); Nesterov momentum as in https://kellerjordan.github.io/posts/muon.
    """
    decays = tuple(decays)
    weights = (1.0 / max(len(decays), 1),) * len(decays) if weights is None else tuple(weights)
    if not decays or len(weights) != len(decays):
        raise ValueError(
            f"mix_momenta: {len(decays)} decays and {len(weights)} weights, expected at least one decay and a weight"
            " for each."
        )
    dtype = resolve_state_dtype(state_dtype)

    def init_fn(params: Params) -> MixMomentaState:
        momenta = tuple(zeros_like_params(params, dtype) for _ in decays)
        return MixMomentaState(jnp.zeros([], jnp.int32), momenta)

    def update_fn(
        updates: Updates, state: MixMomentaState, params: Params | None = None
    ) -> tuple[Updates, MixMomentaState]:
        del params
        now = [jnp.asarray(_at(w, state.count), jnp.float32) for w in weights]
        if isinstance(nesterov, bool):
            ahead = sum(w * b for w, b in zip(now, decays, strict=True)) if nesterov else 1.0
        else:
            ahead = jnp.asarray(_at(nesterov, state.count), jnp.float32)

        def mix(gradient: jax.Array, momenta: Sequence[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
            g = gradient.astype(jnp.float32)
            # A momentum whose norm overflows would stop its matrix for hundreds of steps.
            finite = jnp.isfinite(jnp.square(g))
            new = [
                jnp.where(finite, b * m.astype(jnp.float32) + (1.0 - b) * g, m.astype(jnp.float32))
                for b, m in zip(decays, momenta, strict=True)
            ]
            mean = sum(w * m for w, m in zip(now, new, strict=True))
            mixed = jnp.where(finite, (1.0 - ahead) * g + ahead * mean, 0.0)
            return mixed.astype(gradient.dtype), [m.astype(dtype) for m in new]

        leaves, treedef = jax.tree.flatten(updates)
        old = zip(*map(treedef.flatten_up_to, state.mu), strict=True)
        mixed = [mix(g, m) if g.size else (g, m) for g, m in zip(leaves, old, strict=True)]
        mu = tuple(treedef.unflatten([momenta[k] for _, momenta in mixed]) for k in range(len(decays)))
        count = jnp.asarray(optax.safe_increment(state.count))
        return treedef.unflatten([u for u, _ in mixed]), MixMomentaState(count, mu)

    return optax.GradientTransformation(init_fn, update_fn)  # type: ignore[arg-type]


def _at(value: Any, count: jax.Array) -> Any:
    return value(count) if callable(value) else value
