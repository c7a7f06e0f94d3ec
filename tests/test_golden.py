"""Trajectories of every preset, kept as numbers: a change of what an optimizer computes cannot pass unseen.

`python tests/test_golden.py` writes the file anew; a commit that does so says why the numbers changed.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from celo2_harness import harness, presets

FILE = Path(__file__).parent / "data" / "golden_trajectories.npz"
SHAPES = {
    "embedding/table": (7, 6),
    "layer/kernel": (6, 8),
    "layer/bias": (8,),
    "conv/kernel": (3, 3, 2, 4),
    "conv/bias": (4,),
}
STEPS = 4
# Rounding differs from machine to machine and from compiler to compiler. Newton-Schulz stretches it, as the oracle's
# tests say, and the steps add it up.
# The first bases of a run stretch it further.
TOLERANCE = {
    "celo2": 2e-2,
    "modern_muon": 2e-2,
    "celo2_base": 5e-5,
    "celo2_ortho": 5e-4,
    "celo2_muon": 5e-4,
    "muon": 5e-4,
    "adamw": 1e-5,
}


def trajectory(name):
    """Each leaf's way from its first value, (steps, ...): bundled weights, a schedule, both weight decays."""
    rng = np.random.default_rng(2602_19142)
    params = {leaf: jnp.asarray(rng.normal(size=shape), jnp.float32) for leaf, shape in SHAPES.items()}
    noise = [{leaf: rng.normal(size=shape).astype(np.float32) for leaf, shape in SHAPES.items()} for _ in range(STEPS)]
    tx = harness.build(name, 0.01, 20, weight_decay=0.1, rest_weight_decay=0.01, warmup=2)
    nested = lambda flat: {
        module: {leaf.split("/")[1]: x for leaf, x in flat.items() if leaf.split("/")[0] == module}
        for module in {leaf.split("/")[0] for leaf in flat}
    }
    start = params = nested(params)
    state, step = tx.init(params), jax.jit(tx.update)
    way = {leaf: [] for leaf in SHAPES}
    for kick in noise:
        # Gradients follow the parameters a little, as those of a loss do, and differ by orders of magnitude.
        gradients = jax.tree.map(lambda p, n: 0.3 * p + n * 10.0 ** jnp.round(n), params, nested(kick))
        updates, state = step(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for leaf in SHAPES:
            module, part = leaf.split("/")
            way[leaf].append(np.asarray(params[module][part] - start[module][part]))
    return {leaf: np.stack(steps) for leaf, steps in way.items()}


@pytest.mark.parametrize("name", TOLERANCE)
def test_a_preset_goes_where_it_went(name):
    with np.load(FILE) as file:
        assert {key.split(":")[0] for key in file.files} == set(TOLERANCE)
        kept = {leaf: file[f"{name}:{leaf}"] for leaf in SHAPES}
    for wanted in kept.values():
        assert np.all(np.any(wanted[1:] != 0, axis=tuple(range(1, wanted.ndim))))  # step 0 is the warm-up's zero
    for leaf, got in trajectory(name).items():
        error = np.max(np.abs(got - kept[leaf])) / np.max(np.abs(kept[leaf]))
        assert error <= TOLERANCE[name], (leaf, error)


def test_every_built_in_preset_is_kept():
    """All that need no file: VeLO's weights are not shipped, and its numbers are compared with the reference's."""
    ours = {
        name
        for name, preset in presets._PRESETS.items()
        if preset.hidden.direction.__module__ == presets.__name__ and (preset.weights or preset.load is None)
    }
    assert ours == set(TOLERANCE)


if __name__ == "__main__":
    np.savez_compressed(FILE, **{f"{name}:{leaf}": way for name in TOLERANCE for leaf, way in trajectory(name).items()})
