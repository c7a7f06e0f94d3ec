"""The same layer is routed the same in a list, in a stack, in a flattened dict and under another name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings, strategies as st

from celo2_harness import harness
from celo2_harness.routing import route

D, H, K, F, E, N = 16, 4, 6, 40, 3, 8

# Parts of a layer: name -> shape of one layer. Whatever is drawn, a norm says that it is a stack.
PARTS = {
    "dense": {"up": {"kernel": (D, F), "bias": (F,)}, "down": {"kernel": (F, D)}},
    "weight": {"fc": {"weight": (F, D), "bias": (F,)}, "fc_out": {"weight": (D, F)}},
    "haiku": {"linear": {"w": (D, F), "b": (F,)}, "linear_1": {"w": (F, D)}},
    "bare": {"w1": (D, F), "b1": (F,), "w2": (F, D)},
    "heads": {
        "attn": {
            **{name: {"kernel": (D, H, K), "bias": (H, K)} for name in ("query", "key", "value")},
            "out": {"kernel": (H, K, D), "bias": (D,)},
        }
    },
    "plain heads": {"attention": {"q": {"kernel": (D, H, K)}, "k": {"kernel": (D, 2, K)}, "o": {"kernel": (H, K, D)}}},
    "projections": {"self_attn": {f"{name}_proj": {"weight": (D, D)} for name in "qkvo"}},
    "fused": {"attn": {"qkv": {"kernel": (D, 3 * D), "bias": (3 * D,)}, "proj": {"kernel": (D, D)}}},
    "einsum": {"attn": {"q_einsum": {"w": (H, D, K)}, "kv_einsum": {"w": (2, 1, D, K)}}},
    "conv": {"conv": {"kernel": (3, 3, D, F), "bias": (F,)}, "depthwise_conv": {"kernel": (3, 3, 1, F)}},
    "conv weight": {"bn_conv": {"weight": (F, D, 3, 3), "bias": (F, 1, 1)}},
    "transposed": {"up": {"kernel": (2, 2, F, D), "bias": (F,)}},
    "one by one": {"qkv": {"kernel": (1, 1, D, 3 * D), "bias": (3 * D,)}},
    "weight norm": {"conv": {"v": (7, D, F), "g": (F,)}, "conv_pre": {"weight_v": (F, D, 5), "weight_g": (F, 1, 1)}},
    "state space": {"mixer": {"A_log": (F, N), "D": (F,), "dt_bias": (F,), "in_proj": {"kernel": (D, 2 * F)}}},
    "vectors": {"sinks": (H,), "alpha": (D,), "time_decay": (D,), "layer_scale": (D,)},
    "scalars": {"resid": (), "temperature": ()},
    "adaptive norm": {"adaLN_modulation": {"kernel": (D, 6 * D), "bias": (6 * D,)}},
    "adapter": {"q_proj": {"kernel": (D, D), "a": (D, 2), "b": (2, D)}},
    "experts": {"moe": {"router": {"kernel": (D, E)}, "experts": {"w_in": (E, D, F), "w_out": (E, F, D)}}},
    "matrices": {"A": (D, N), "B": (N, D)},
    "cell": {"gru": {"w_i": (D, 3 * D), "w_h": (D, 3 * D), "b": (3 * D,)}},
}
NORM = {"norm": {"scale": (D,)}}
STYLES = {"tuples": None, "dots": ".", "slashes": "/"}


def is_shape(node):
    return isinstance(node, tuple)


def shapes_of(tree, change=lambda shape: shape):
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(change(shape), jnp.float32), tree, is_leaf=is_shape)


def around(layers, layer):
    """A model with an embedding, a final norm and a head around its layers."""
    kernel = lambda *shape: {"kernel": shape}
    return shapes_of({"embed": {"embedding": (50, D)}, "norm_f": {"scale": (D,)}, "head": kernel(D, 50)}) | {
        layers: layer
    }


def decisions(routes, axis=None):
    """Label, role, and the axes of one layer, in the order of the leaves."""

    def one(found):
        axes = lambda some: tuple(a if axis is None or a < axis else a - 1 for a in some)
        batch = () if found.view is None else tuple(a for a in found.view.batch_axis if a != axis)
        if axis is not None:
            assert found.view is not None and axis in found.view.batch_axis, found
        view = found.view
        if view is None or (not batch and not view.reduction_axis):
            return found.label, found.role, "vector"
        return found.label, found.role, axes(batch), axes(view.reduction_axis), axes(view.output_axis)

    return [one(found) for found in jax.tree.leaves(routes)]


def check(parts, count, container):
    layer = NORM | {part.replace(" ", "_"): PARTS[part] for part in parts}
    alone = decisions(route(around(container, [shapes_of(layer)]))[container])
    listed = around(container, [shapes_of(layer)] * count)
    assert decisions(route(listed)[container]) == alone * count
    numbered = around(container, {str(i): shapes_of(layer) for i in range(count)})
    stacked = around(container, shapes_of(layer, lambda shape: (count, *shape)))
    assert decisions(route(numbered)[container]) == alone * count
    assert decisions(route(stacked)[container], 0) == alone
    for separator in STYLES.values():
        assert flattened(numbered, separator, container) == alone * count
        assert flattened(stacked, separator, container, axis=0) == alone
    # Along the second axis: flax's names only, and no scalars, which have none.
    if count > 1 and not any(part in ("scalars",) or "weight" in str(PARTS[part]) for part in parts):
        second = around(container, shapes_of(layer, lambda shape: (*shape[:1], count, *shape[1:])))
        assert decisions(route(second)[container], 1) == alone


def flattened(tree, separator, container, axis=None):
    """The decisions about what is in a container, from a flattened tree."""
    routes = route(flatten_dict(tree, sep=separator))
    split = lambda key: key if separator is None else tuple(key.split(separator))
    mine = {split(key): found for key, found in routes.items() if split(key)[0] == container}
    return decisions([mine[key] for key in sorted(mine)], axis)


@pytest.mark.parametrize("container", ["layers", "trunk"])
@pytest.mark.parametrize("part", PARTS)
def test_every_form_of_a_layer_is_routed_alike(part, container):
    check([part], 1 if container == "layers" else 5, container)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.sets(st.sampled_from(sorted(PARTS)), min_size=2, max_size=5))
def test_every_form_of_layers_of_many_parts_is_routed_alike(parts):
    check(sorted(parts), 5, "trunk")


@pytest.mark.slow
def test_every_form_of_a_layer_gets_the_same_update():
    shapes = NORM | PARTS["heads"] | PARTS["transposed"] | PARTS["vectors"]
    rng = np.random.default_rng(0)
    stacked = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=(3, *shape)), jnp.float32), shapes, is_leaf=is_shape
    )
    layers = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(3)]
    second = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), stacked)
    numbered = {str(i): layer for i, layer in enumerate(layers)}

    def updates(params):
        tx = harness.build("muon", 1.0)
        return tx.update(params, tx.init(params), params)[0]

    wanted = updates({"trunk": layers})["trunk"]
    got = updates({"trunk": stacked})["trunk"]
    for i, layer in enumerate(wanted):
        # Newton-Schulz magnifies the rounding of batched products.
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=1e-5), got, layer)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(jnp.moveaxis(a, 1, 0), b, rtol=1e-3, atol=1e-5),
        updates({"trunk": second})["trunk"],
        got,
    )
    for separator in STYLES.values():
        flat = updates(flatten_dict({"trunk": numbered}, sep=separator))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
            flat,
            flatten_dict({"trunk": {str(i): layer for i, layer in enumerate(wanted)}}, sep=separator),
        )


@pytest.mark.parametrize("style", STYLES)
def test_optax_flatten_leaves_nothing_hidden(style):
    params = flatten_dict({"fc": {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}}, sep=STYLES[style])
    assert "hidden" in jax.tree.leaves(jax.tree.map(lambda found: found.label, route(params)))
    tx = optax.flatten(harness.build("muon", 0.1))
    with pytest.warns(UserWarning, match="no leaf is a hidden matrix"):
        tx.init(params)
