"""Wrong trees, shapes, dtypes and labels: every message names the leaf."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TINY, assert_trees_close
from optax.contrib import MuonDimensionNumbers

import celo2_harness as c2
from celo2_harness import harness, routing

PARAMS = {"layer": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}, "out": {"kernel": jnp.ones((6, 3))}}
KERNEL, BIAS = PARAMS["layer"]["kernel"], PARAMS["layer"]["bias"]
MISSING = {"layer": {"kernel": KERNEL}, "out": PARAMS["out"]}
EXTRA = PARAMS | {"more": {"scale": jnp.ones(2)}}
TURNED = {"layer": {"kernel": KERNEL.T, "bias": BIAS}, "out": PARAMS["out"]}
BROADCAST = {"layer": {"kernel": KERNEL[:1], "bias": BIAS}, "out": PARAMS["out"]}  # NumPy's rules would let it pass
INTEGER = {"layer": {"kernel": KERNEL, "bias": BIAS}, "steps": jnp.ones(3, jnp.int32)}
DIMENSIONS = MuonDimensionNumbers((0,), (1,))


def update(tx, updates, params=PARAMS, state_of=PARAMS):
    return lambda: tx.update(updates, tx.init(state_of), params)


def build(**options):
    return harness.build("celo2_ortho", 1e-3, weights=TINY, **options)


def views(tree):
    return lambda: build(weight_dimension_numbers=tree).init(PARAMS)


ORTHO, ADAMW = build(), harness.build("adamw", 1e-3)
WRONG = {
    "updates lack a leaf": (update(ORTHO, MISSING), "celo2_ortho: .* 'layer/bias' of shape (6,) is missing"),
    "updates have one more": (update(ORTHO, EXTRA), "'more/scale' of shape (2,) is not expected"),
    "updates of another shape": (update(ORTHO, TURNED), "'layer/kernel' has shape (6, 4), expected (4, 6)"),
    "updates that would broadcast": (update(ADAMW, BROADCAST), "adamw: .* 'layer/kernel' has shape (1, 6)"),
    "no update for a parameter": (update(ORTHO, PARAMS, EXTRA), "'more/scale' of shape (2,) is missing"),
    "direction": (update(c2.celo2_direction(TINY), TURNED), "celo2_direction: .* 'layer/kernel' has shape (6, 4)"),
    "direction, leaf missing": (update(c2.celo2_direction(TINY), MISSING), "'layer/bias' of shape (6,) is missing"),
    "decay": (update(c2.add_decayed_weights(0.1), MISSING), "add_decayed_weights: .* 'layer/bias'"),
    "state of fewer leaves": (
        update(ORTHO, PARAMS, state_of=MISSING),
        "celo2_ortho: the state is not one .*layer/bias.* is missing",
    ),
    "state of other shapes": (
        update(ORTHO, PARAMS, state_of=TURNED),
        "the state is not one .*layer/kernel' has shape (6, 4), expected (4, 6)",
    ),
    "state of another preset": (
        lambda: ORTHO.update(PARAMS, ADAMW.init(PARAMS), PARAMS),
        "the state is not one .*layer/kernel' of shape (4, 6) is missing",
    ),
    "integers": (lambda: ORTHO.init(INTEGER), "leaf 'steps' has dtype int32, expected a floating-point one.*'frozen'"),
    "integers in update": (update(ORTHO, INTEGER, INTEGER), "leaf 'steps' has dtype int32"),
    "booleans": (lambda: ADAMW.init({"on": jnp.ones(3, bool)}), "leaf 'on' has dtype bool"),
    "complex numbers": (lambda: ADAMW.init({"z": jnp.ones(3, complex)}), "leaf 'z' has dtype complex64"),
    "no array": (lambda: c2.label_params({"layer": {"name": "x"}}), "leaf 'layer/name' is 'x', which is not an array"),
    "unknown label": (
        lambda: c2.label_params(PARAMS, [lambda path, leaf: "hiden" if "bias" in path else None]),
        "for leaf 'layer/bias' gives the label 'hiden'",
    ),
    "view of too many axes": (
        lambda: c2.label_params(PARAMS, [("bias", "hidden", DIMENSIONS)]),
        "leaf 'layer/bias' of shape (6,): the matrix view names axes (1,), but the leaf has axes 0 to 0",
    ),
    "dimension numbers lack a leaf": (
        views({"layer": {"kernel": DIMENSIONS, "bias": None}}),
        "leaf 'out/kernel' of shape (6, 3) has no entry in the tree of dimension numbers",
    ),
    "dimension numbers of another tree": (
        views({"layer": None, "out": None, "more": {"kernel": DIMENSIONS}}),
        "entry at ['more']['kernel'], where the parameters have no leaf",
    ),
    "no dimension numbers": (views({"layer": None, "out": "hidden"}), "leaf 'out/kernel' has 'hidden'"),
    "dimension numbers of a vector": (
        views(DIMENSIONS),
        "leaf 'layer/bias' of shape (6,): the matrix view names axes (1,)",
    ),
    "dimension numbers of a block": (
        update(c2.orthogonalize(weight_dimension_numbers={"layer": {"kernel": None, "bias": None}}), PARAMS),
        "['out']['kernel']: no entry in weight_dimension_numbers",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_message_names_the_leaf(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError) as caught:
        call()
    pattern = ".*".join(map(re.escape, re.split(r" ?\.\* ?|\.\*", message)))
    assert re.search(pattern, str(caught.value), re.DOTALL), str(caught.value)


def test_the_message_is_the_same_under_jit():
    with pytest.raises(ValueError, match="'layer/bias' of shape .* is missing"):
        jax.jit(ORTHO.update)(MISSING, ORTHO.init(PARAMS), PARAMS)


def test_frozen_leaves_may_be_integers():
    tx = build(rules=[("steps", "frozen")])
    gradients = INTEGER | {"steps": jnp.zeros(3, jnp.int32)}
    updates, _ = jax.eval_shape(lambda: tx.update(gradients, tx.init(INTEGER), INTEGER))
    assert updates["steps"].dtype == jnp.int32


# ------------------------------------------------------------------------------ the trees that optax.contrib.muon takes

SHAPES = {"embed": (7, 4), "attention": {"query": (4, 2, 3), "out": (2, 3, 4)}, "mlp": {"kernel": (4, 8), "bias": (8,)}}
MUON_TREE = {
    "embed": None,
    "attention": {
        "query": MuonDimensionNumbers(0, (1, 2)),
        "out": MuonDimensionNumbers((-3, -2), -1),
    },
    "mlp": {"kernel": MuonDimensionNumbers(), "bias": None},
}


def arrays(seed):
    rng = np.random.default_rng(seed)
    shapes, treedef = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    return treedef.unflatten([jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes])


MUON_TREES = {
    "a tree": MUON_TREE,
    "a function of the parameters": lambda params: MUON_TREE,
    "a prefix": {"embed": None, "attention": None, "mlp": {"kernel": MuonDimensionNumbers(), "bias": None}},
    "masked nodes for None": MUON_TREE | {"embed": optax.MaskedNode()},
}


@pytest.mark.parametrize("name", MUON_TREES)
def test_routing_is_that_of_optax_muon(name):
    """The state of Optax's own Muon shows which leaves it orthogonalises; ours has the same ones under "hidden"."""
    tree, params = MUON_TREES[name], arrays(0)
    theirs = optax.contrib.muon(
        0.01, muon_weight_dimension_numbers=tree if name != "masked nodes for None" else MUON_TREE
    )
    ours = harness.build("muon", 0.01, weight_dimension_numbers=tree)
    shapes = lambda state: sorted(x.shape for x in jax.tree.leaves(state) if x.ndim > 1)
    hidden = jax.eval_shape(ours.init, params).inner_states["hidden"]
    assert shapes(hidden) == shapes(jax.eval_shape(theirs.init, params).inner_states["muon"])


def test_updates_are_those_of_optax_muon():
    """Hidden matrices as Optax's Muon, the rest as AdamW: Optax's Muon gives its Adam the Nesterov momentum too."""
    params, gradients = arrays(0), arrays(1)
    muon = optax.contrib.muon(0.01, weight_decay=0.1, muon_weight_dimension_numbers=MUON_TREE, consistent_rms=0.2)
    adamw = optax.adamw(0.01, b2=0.95, weight_decay=0.0)
    ours = harness.build("muon", 0.01, weight_decay=0.1, weight_dimension_numbers=MUON_TREE)
    mine, hidden, rest = jax.jit(lambda g, p: [tx.update(g, tx.init(p), p)[0] for tx in (ours, muon, adamw)])(
        gradients, params
    )
    wanted = {
        "embed": rest["embed"],
        "attention": hidden["attention"],
        "mlp": {"kernel": hidden["mlp"]["kernel"], "bias": rest["mlp"]["bias"]},
    }
    # Newton-Schulz magnifies the rounding of another order of operations.
    assert_trees_close(mine, wanted, 1e-4)


def test_rules_go_before_dimension_numbers():
    labels = c2.describe(arrays(0), "muon", weight_dimension_numbers=MUON_TREE, rules=[("mlp/kernel", "frozen")])
    assert re.search(r"^mlp/kernel .* frozen ", labels, re.MULTILINE)
    kernels = routing.rules_of_dimension_numbers({"embed": None, "attention": None, "mlp": None}, arrays(0))
    assert set(jax.tree.leaves(c2.label_params(arrays(0), kernels))) == {"embedding", "other", "vector"}


# --------------------------------------------------------------------------------- trees that are functions: Equinox


class Layer(eqx.Module):
    weight: jax.Array
    bias: jax.Array

    def __call__(self, x):
        return self.weight @ x + self.bias


def test_a_model_that_can_be_called_is_a_tree():
    """Labels, views and masks of an Equinox model are models too; nobody may call them."""
    model = Layer(jnp.ones((3, 4)), jnp.ones(3))
    views = routing.view_params(model)
    mask = jax.tree.map(lambda p: p.ndim > 1, model)
    for tx in (
        harness.build("muon", 0.1),
        harness.build("muon", 0.1, weight_dimension_numbers=views),
        c2.orthogonalize(weight_dimension_numbers=views),
        c2.add_decayed_weights(0.1, mask=mask),
    ):
        updates, _ = jax.jit(lambda tx=tx: tx.update(model, tx.init(model), model))()
        assert isinstance(updates, Layer) and bool(jnp.all(jnp.isfinite(updates.weight)))
    np.testing.assert_allclose(updates.weight, 1.1, rtol=1e-6)
    np.testing.assert_array_equal(updates.bias, 1.0)
