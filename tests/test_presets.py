"""Each preset rebuilt by hand from public blocks: equal updates over three steps."""

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import TINY, assert_trees_close, normal
from optax.contrib import MuonDimensionNumbers

import celo2_harness as c2
from celo2_harness import harness

SHAPES = {
    "embedding": {"table": (7, 6)},
    "conv": {"kernel": (3, 3, 2, 4), "bias": (4,)},
}
VIEWS = {
    "embedding": {"table": None},
    "conv": {"kernel": MuonDimensionNumbers((0, 1, 2), (3,)), "bias": None},
}
RATE, DECAY, REST_DECAY = 0.01, 0.1, 0.3


def adam():
    return optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8)


def chain(*direction, rate=RATE, decay=DECAY):
    return optax.chain(*direction, c2.add_decayed_weights(decay), optax.scale_by_learning_rate(rate))


def by_label(hidden, rest, **apart):
    groups = {"hidden": hidden, "rest": rest, **apart}
    labels = lambda params: jax.tree.map(lambda label: label if label in groups else "rest", c2.label_params(params))
    return optax.partition(groups, labels)


def adam_with_fast_embeddings():
    """AdamW's side of the two presets in the eigenbasis."""
    return {
        "rest": chain(adam(), rate=3.5 * RATE, decay=REST_DECAY),
        "embedding": chain(adam(), rate=10.5 * RATE, decay=REST_DECAY),
    }


def views_of(updates):
    """The part of VIEWS that a masked tree of updates asks for."""
    flat = dict(
        jax.tree_util.tree_flatten_with_path(VIEWS, is_leaf=lambda x: x is None or hasattr(x, "output_axis"))[0]
    )
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[path], updates)


def celo2(orthogonalize):
    blocks = [c2.celo2_direction(TINY, weight_dimension_numbers=views_of)]
    if orthogonalize:
        blocks.append(c2.orthogonalize(weight_dimension_numbers=views_of))
    return [*blocks, c2.normalize_rms(weight_dimension_numbers=views_of)]


def stack(direction, mode):
    return [
        c2.in_eigenbasis(direction, mode=mode, weight_dimension_numbers=views_of),
        c2.orthogonalize(weight_dimension_numbers=views_of),
        c2.normalize_rms(weight_dimension_numbers=views_of),
        c2.scale_by_width(weight_dimension_numbers=views_of),
    ]


def muon():
    # Optax's own, for the hidden matrices; its consistent_rms is the rule of `scale_by_shape`.
    return optax.contrib.muon(
        RATE,
        beta=0.95,
        weight_decay=DECAY,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=views_of,
    )


BY_HAND = {
    "celo2": lambda: by_label(
        chain(*stack(c2.linear_direction("celo2_linear", 10, weight_dimension_numbers=views_of), "act")),
        **adam_with_fast_embeddings(),
    ),
    "celo2 with a network": lambda: by_label(
        chain(*stack(c2.celo2_direction(TINY, weight_dimension_numbers=views_of), "act")),
        **adam_with_fast_embeddings(),
    ),
    "modern_muon": lambda: by_label(
        # gradient + 1.9 momentum(0.9) + 0.76 momentum(0.99), over 3.66
        chain(*stack(c2.mix_momenta((0.9, 0.99), (1.9 / 2.66, 0.76 / 2.66), 2.66 / 3.66), "whiten")),
        **adam_with_fast_embeddings(),
    ),
    "celo2_ortho": lambda: by_label(chain(*celo2(True)), chain(adam(), rate=20 * RATE, decay=REST_DECAY)),
    "celo2_base": lambda: by_label(chain(*celo2(False)), chain(*celo2(False), decay=REST_DECAY)),
    "celo2_muon": lambda: by_label(chain(*celo2(True), optax.scale(0.2)), chain(adam(), decay=REST_DECAY)),
    "muon": lambda: by_label(muon(), chain(adam(), decay=REST_DECAY)),
    "adamw": lambda: by_label(
        optax.adamw(RATE, b1=0.9, b2=0.95, eps=1e-8, weight_decay=DECAY),
        optax.adamw(RATE, b1=0.9, b2=0.95, eps=1e-8, weight_decay=REST_DECAY),
    ),
}


def test_labels_are_those_this_file_assumes():
    params = jax.tree.map(jnp.zeros, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    assert c2.label_params(params) == {
        "embedding": {"table": "embedding"},
        "conv": {"kernel": "hidden", "bias": "vector"},
    }


@pytest.mark.parametrize("name", BY_HAND)
def test_a_preset_is_its_blocks(name, key):
    preset = name.split()[0]
    options = {"weights": TINY} if "celo2" in name and name != "celo2" else {}
    ours = harness.build(preset, lambda step: RATE, 10, weight_decay=DECAY, rest_weight_decay=REST_DECAY, **options)
    theirs = BY_HAND[name]()
    params = normal(key, SHAPES)

    @jax.jit
    def both(params, states, key):
        gradients = normal(key, SHAPES)
        pairs = [tx.update(gradients, s, params) for tx, s in zip((ours, theirs), states, strict=True)]
        return [updates for updates, _ in pairs], [state for _, state in pairs]

    states = [ours.init(params), theirs.init(params)]
    for t in range(3):
        (mine, other), states = both(params, states, jax.random.fold_in(key, t))
        # Equal arithmetic; Optax's Muon sums its norm in another order, which Newton-Schulz stretches.
        assert_trees_close(mine, other, 1e-4 if name == "muon" else 1e-6)
        params = optax.apply_updates(params, mine)


def test_a_preset_of_a_network_refuses_a_linear_rule():
    with pytest.raises(c2.WeightsError, match="celo2_linear: LinearWeights, expected Weights"):
        harness.build("celo2_ortho", weights="celo2_linear")


def test_which_presets_have_a_learned_rule():
    learned = {name for name, preset in harness.presets().items() if preset.learned}
    assert {"celo2", "celo2_ortho", "celo2_base", "celo2_muon", "velo", "velo_s"} <= learned
    assert not {"adamw", "muon", "modern_muon"} & learned
