"""Small things that several test files need."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import celo2_harness as c2
from celo2_harness import harness
from celo2_harness.lab.metatrain import MetaTrainConfig
from celo2_harness.velo import VELO, VeloWeights, init_theta, load_velo_weights

# A rule with few features and two hidden units, for tests of plumbing: the published size takes long to compile.
TINY_CONFIG = c2.RuleConfig(
    features=("gradient", "momentum", "factored_gradient", "row_moment"), momentum_decays=(0.9,), factored_decays=(0.9,)
)


def random_theta(channels=30, hidden=8, seed=0):
    """A network with every number nonzero, biases included."""
    rng = np.random.default_rng(seed)
    shapes = ((channels, hidden), (hidden,), (hidden, hidden), (hidden,), (hidden, 3), (3,))
    return c2.Theta(*(rng.normal(size=shape).astype(np.float32) / 2 for shape in shapes))


TINY = c2.Weights(random_theta(4, 2), TINY_CONFIG)
RANDOM = c2.Weights(random_theta())
# What optimizers that watch the loss are told.
LOSS = 1.5


def random_velo(lstm=3, bank=2, seed=0, **changes):
    """A VeLO with every number nonzero, start and biases included, that moves parameters by some per cent."""
    config = dataclasses.replace(VELO, lstm=lstm, bank=bank, ff_mult=1.0, **changes)
    leaves, treedef = jax.tree.flatten(init_theta(config, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    theta = treedef.unflatten([rng.normal(size=x.shape).astype(np.float32) / 2 for x in leaves])
    size = theta.step_size
    return VeloWeights(theta._replace(step_size=size._replace(w=50 * size.w, b=50 * size.b)), config)


VELO_TINY = random_velo()

PRESETS = ("celo2", "modern_muon", "celo2_ortho", "celo2_base", "celo2_muon", "muon", "adamw", "velo")
# The preset with weights of any size.
VELO_PRESET = dataclasses.replace(harness.presets()["velo"], load=load_velo_weights)


def arguments(name):
    """Preset and what it cannot do without."""
    if name == "velo":
        return {"preset": VELO_PRESET, "weights": VELO_TINY, "total_steps": 10}
    # The bundled linear rule of `celo2` is as small as one can be.
    network = name != "celo2" and harness.presets()[name].weights is not None
    return {"preset": name, **({"weights": TINY} if network else {})}


@functools.cache
def decaying(name):
    """The presets whose compiled updates several files share (`jitted`)."""
    return harness.build(learning_rate=0.01, weight_decay=0.1, **arguments(name))


SHAPES = {"embedding": {"table": (7, 4)}, "layer": {"kernel": (4, 6), "bias": (6,)}}


# A meta-training run of seconds. Files that use it with twenty images in two sets share its compilation.
META_CONFIG = MetaTrainConfig(
    variant="base",
    rule=c2.RuleConfig(features=("gradient", "momentum"), momentum_decays=(0.9,), factored_decays=(0.9,)),
    hidden=2,
    widths=("64-10",),
    batch=4,
    tasks_per_set=2,
    truncation=5,
    shortest_unroll=5,
    longest_unroll=20,
    iterations=3,
    outer_learning_rate=1e-2,
)
META_IMAGES = np.random.default_rng(0).integers(0, 255, (20, 8, 8), dtype=np.uint8)
META_LABELS = np.arange(20) % 10


def normal(key, shapes, scale=1.0, dtype=jnp.float32):
    """A tree of normal numbers for a tree of shapes."""
    is_shape = lambda node: isinstance(node, tuple)
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=is_shape)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(
        [scale * jax.random.normal(k, shape, dtype) for k, shape in zip(keys, leaves, strict=True)]
    )


def relative_error(got, wanted):
    """The larger of the errors in the Euclidean and in the maximum norm, each relative to the reference."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape
    worst = 0.0
    for norm in (np.linalg.norm, lambda x: np.max(np.abs(x), initial=0.0)):
        size = norm(wanted.ravel())
        error = norm((got - wanted).ravel())
        worst = max(worst, error / size if size else error)
    return worst


def assert_trees_close(got, wanted, tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(wanted), strict=True):
        assert relative_error(a, b) <= tolerance, (jax.tree_util.keystr(path), relative_error(a, b))


def assert_trees_equal(got, wanted):
    """Same structure, dtypes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype, jax.tree_util.keystr(path)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=jax.tree_util.keystr(path))


def signature(tree):
    """Structure, shapes and dtypes, to compare."""
    return jax.tree.structure(tree), [(x.shape, x.dtype, getattr(x, "weak_type", False)) for x in jax.tree.leaves(tree)]


@functools.cache
def jitted(tx):
    """`tx.update` compiled; one per transformation, so that tests share it. `traces` on it lists its traces."""
    traces = []

    def update(updates, state, params):
        traces.append(None)
        return optax.with_extra_args_support(tx).update(updates, state, params, value=LOSS)

    compiled = jax.jit(update)
    compiled.traces = traces
    return compiled
