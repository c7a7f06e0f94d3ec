"""Routing: labels and views on trees built with each library, known traps, rules, strict mode, the report."""

import math
import re

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from hypothesis import given, settings, strategies as st
from optax.contrib import MuonDimensionNumbers

from celo2_harness import routing
from celo2_harness.routing import Leaf, ReportRow, Rule, format_report, label_params, route, view_params
from celo2_harness.rule import MatrixView

KEY = jax.random.key(0)


def routes_of(params, *args, **kwargs):
    """Path -> Route, every path once."""
    found = jax.tree.leaves(route(params, *args, **kwargs))
    table = {entry.path: entry for entry in found}
    assert len(table) == len(found)
    return table


def seen(entry):
    """Label, input axes, output axes: what the tables below compare."""
    if entry.view is None:
        return (entry.label,)
    return entry.label, entry.view.reduction_axis, entry.view.output_axis


def check(params, expected, **kwargs):
    table = routes_of(params, **kwargs)
    assert {path: seen(table[path]) for path in expected} == expected
    return table


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def zeros(abstract):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)


def tree_of(shapes):
    """Nested dicts of abstract arrays from nested dicts of shapes."""
    return jax.tree.map(lambda sizes: shape(*sizes), shapes, is_leaf=lambda node: isinstance(node, tuple))


# ---------------------------------------------------------------------------------------------------------- libraries


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(4, 16, 16, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.up = nnx.Linear(16, 32, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(32, 16, rngs=rngs)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(50, 16, rngs=rngs)
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.conv_1d = nnx.Conv(3, 8, (5,), use_bias=False, rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs)])
        self.layers = nnx.vmap(NnxBlock, in_axes=0, out_axes=0)(rngs.split(3))
        self.lora = nnx.LoRA(16, 2, 16, rngs=rngs)
        self.batch_norm = nnx.BatchNorm(16, rngs=rngs)
        self.lm_head = nnx.Linear(16, 50, rngs=rngs)


def nnx_params():
    return nnx.state(nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0))), nnx.Param)


NNX = {
    "embed/embedding": ("embedding", (0,), (1,)),
    "conv/kernel": ("hidden", (0, 1, 2), (3,)),
    "conv/bias": ("vector",),
    "conv_1d/kernel": ("hidden", (0, 1), (2,)),
    "depthwise/kernel": ("other", (0, 1, 2), (3,)),
    "blocks/0/attn/query/kernel": ("hidden", (0,), (1, 2)),
    "blocks/0/attn/query/bias": ("vector", (), (0, 1)),
    "blocks/0/attn/value/kernel": ("hidden", (0,), (1, 2)),
    "blocks/0/attn/out/kernel": ("hidden", (0, 1), (2,)),
    "blocks/0/norm/scale": ("vector",),
    "blocks/0/up/kernel": ("hidden", (0,), (1,)),
    "layers/attn/query/kernel": ("hidden", (1,), (2, 3)),
    "layers/attn/query/bias": ("vector", (), (1, 2)),
    "layers/attn/out/kernel": ("hidden", (1, 2), (3,)),
    "layers/attn/out/bias": ("vector", (), (1,)),
    "layers/norm/scale": ("vector", (), (1,)),
    "layers/up/kernel": ("hidden", (1,), (2,)),
    "layers/down/kernel": ("hidden", (1,), (2,)),
    "layers/down/bias": ("vector", (), (1,)),
    "lora/lora_a": ("hidden", (0,), (1,)),
    "lora/lora_b": ("hidden", (0,), (1,)),
    "batch_norm/scale": ("vector",),
    "lm_head/kernel": ("head", (0,), (1,)),
    "lm_head/bias": ("vector",),
}


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = nn.LayerNorm()(x)
        x = nn.MultiHeadDotProductAttention(4)(x, x)
        return nn.Dense(16)(x), None


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(50, 16)(tokens)
        x = x + self.param("pos_embedding", nn.initializers.normal(), (1, 8, 16))
        x = nn.DenseGeneral((3, 4, 4), name="qkv")(x).reshape(1, 8, 48)[..., :16]
        x, _ = nn.scan(LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()(x, None)
        image = nn.Conv(6, (3, 3))(x.reshape(1, 8, 4, 4))
        image = nn.Conv(6, (3, 3), feature_group_count=6)(image)
        x = nn.Dense(16, kernel_init=nn.with_partitioning(nn.initializers.normal(), (None, "model")))(x)
        return nn.Dense(50, name="lm_head")(x) + nn.Dense(1, name="critic")(x) + image.sum()


def linen_params():
    # Partitioned parameters keep their box, which adds a level to the path.
    return jax.eval_shape(LinenModel().init, KEY, jnp.zeros((1, 8), int))


LINEN = {
    "params/Embed_0/embedding": ("embedding", (0,), (1,)),
    "params/pos_embedding": ("embedding", (1,), (2,)),
    "params/qkv/kernel": ("hidden", (0,), (2, 3)),
    "params/qkv/bias": ("vector", (), (0, 1, 2)),
    "params/ScanLinenBlock_0/LayerNorm_0/scale": ("vector", (), (1,)),
    "params/ScanLinenBlock_0/Dense_0/kernel": ("hidden", (1,), (2,)),
    "params/ScanLinenBlock_0/Dense_0/bias": ("vector", (), (1,)),
    "params/ScanLinenBlock_0/MultiHeadDotProductAttention_0/key/kernel": ("hidden", (1,), (2, 3)),
    "params/ScanLinenBlock_0/MultiHeadDotProductAttention_0/key/bias": ("vector", (), (1, 2)),
    "params/ScanLinenBlock_0/MultiHeadDotProductAttention_0/out/kernel": ("hidden", (1, 2), (3,)),
    "params/Conv_0/kernel": ("hidden", (0, 1, 2), (3,)),
    "params/Conv_1/kernel": ("other", (0, 1, 2), (3,)),
    "params/Dense_0/kernel": ("hidden", (0,), (1,)),
    "params/lm_head/kernel": ("head", (0,), (1,)),
    "params/critic/kernel": ("other", (0,), (1,)),
}


def haiku_params():
    def forward(tokens):
        x = hk.Embed(50, 16)(tokens)
        x = hk.MultiHeadAttention(4, 4, w_init=hk.initializers.TruncatedNormal())(x, x, x)
        x = hk.nets.MLP([32, 16])(hk.LayerNorm(-1, True, True)(x))
        image = hk.BatchNorm(True, True, 0.9)(hk.Conv2D(6, 3)(x.reshape(1, 8, 4, 4)), True)
        image = hk.Conv2DTranspose(5, 3)(hk.DepthwiseConv2D(1, 3)(image))
        image = hk.Conv1D(7, 3)(image[:, 0])
        x = hk.experimental.layer_stack(3)(lambda x: hk.LayerNorm(-1, True, True)(hk.Linear(16)(x)))(x)
        return hk.Linear(50, name="lm_head")(hk.Linear(16, name="embed_proj")(x)) + image.sum()

    return jax.eval_shape(hk.transform_with_state(forward).init, KEY, jnp.zeros((1, 8), int))[0]


HAIKU = {
    "embed/embeddings": ("embedding", (0,), (1,)),
    "multi_head_attention/query/w": ("hidden", (0,), (1,)),
    "multi_head_attention/linear/w": ("hidden", (0,), (1,)),
    "layer_norm/scale": ("vector",),
    "mlp/~/linear_0/w": ("hidden", (0,), (1,)),
    "conv2_d/w": ("hidden", (0, 1, 2), (3,)),
    "batch_norm/scale": ("vector", (), (0, 1, 2, 3)),
    "depthwise_conv2_d/w": ("other", (0, 1, 2), (3,)),
    "conv2_d_transpose/w": ("hidden", (0, 1, 3), (2,)),
    "conv1_d/w": ("hidden", (0, 1), (2,)),
    "__layer_stack_no_per_layer/linear/w": ("hidden", (1,), (2,)),
    "__layer_stack_no_per_layer/linear/b": ("vector", (), (1,)),
    "__layer_stack_no_per_layer/layer_norm/offset": ("vector", (), (1,)),
    "embed_proj/w": ("hidden", (0,), (1,)),
    "lm_head/w": ("head", (0,), (1,)),
}


class EqxModel(eqx.Module):
    lookup: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    first: eqx.nn.Conv2d
    depthwise: eqx.nn.Conv2d
    signal: eqx.nn.Conv1d
    norm: eqx.nn.LayerNorm
    steps: list
    stack: eqx.nn.Linear
    stack_norm: eqx.nn.RMSNorm
    recurrent: eqx.nn.GRUCell
    scalar: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self):
        keys = jax.random.split(KEY, 3)
        self.lookup = eqx.nn.Embedding(50, 16, key=KEY)
        self.attention = eqx.nn.MultiheadAttention(4, 16, key=KEY)
        self.first = eqx.nn.Conv2d(3, 8, 3, key=KEY)
        self.depthwise = eqx.nn.Conv2d(8, 8, 3, groups=8, key=KEY)
        self.signal = eqx.nn.Conv1d(4, 8, 5, use_bias=False, key=KEY)
        self.norm = eqx.nn.LayerNorm(16)
        self.steps = [eqx.nn.Linear(16, 32, key=KEY), jax.nn.relu]
        self.stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(16, 32, key=key))(keys)
        self.stack_norm = eqx.filter_vmap(lambda key: eqx.nn.RMSNorm(16, use_bias=False))(keys)
        self.recurrent = eqx.nn.GRUCell(4, 6, key=KEY)
        self.scalar = eqx.nn.Linear("scalar", 5, key=KEY)
        self.head = eqx.nn.Linear(16, 50, key=KEY)


def equinox_params():
    return eqx.filter(eqx.filter_eval_shape(EqxModel), lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))


EQUINOX = {
    "lookup/weight": ("embedding", (0,), (1,)),
    "attention/query_proj/weight": ("hidden", (1,), (0,)),
    "attention/output_proj/weight": ("hidden", (1,), (0,)),
    "first/weight": ("hidden", (1, 2, 3), (0,)),
    "first/bias": ("vector", (), (0, 1, 2)),
    "depthwise/weight": ("other", (1, 2, 3), (0,)),
    "signal/weight": ("hidden", (1, 2), (0,)),
    "norm/weight": ("vector",),
    "steps/0/weight": ("hidden", (1,), (0,)),
    "stack/weight": ("hidden", (2,), (1,)),
    "stack/bias": ("vector", (), (1,)),
    "stack_norm/weight": ("vector", (), (1,)),
    "recurrent/weight_ih": ("hidden", (1,), (0,)),
    "scalar/weight": ("other", (1,), (0,)),
    "head/weight": ("head", (1,), (0,)),
}

GPT2_BLOCK = {
    "ln_1": {"g": (16,), "b": (16,)},
    "attn": {"c_attn": {"w": (16, 48), "b": (48,)}, "c_proj": {"w": (16, 16), "b": (16,)}},
    "mlp": {"c_fc": {"w": (16, 64), "b": (64,)}, "c_proj": {"w": (64, 16), "b": (16,)}},
}


def gpt2_params():
    return tree_of({"wte": (50, 16), "wpe": (8, 16), "h": [GPT2_BLOCK], "ln_f": {"g": (16,)}, "lm_head": (16, 50)})


GPT2 = {
    "wte": ("embedding", (0,), (1,)),
    "wpe": ("embedding", (0,), (1,)),
    "h/0/attn/c_attn/w": ("hidden", (0,), (1,)),
    "h/0/attn/c_proj/w": ("hidden", (0,), (1,)),
    "h/0/mlp/c_proj/w": ("hidden", (0,), (1,)),
    "h/0/ln_1/g": ("vector",),
    "lm_head": ("head", (0,), (1,)),
}

LIBRARIES = {
    "nnx": (nnx_params, NNX),
    "linen": (linen_params, LINEN),
    "haiku": (haiku_params, HAIKU),
    "equinox": (equinox_params, EQUINOX),
    "gpt2": (gpt2_params, GPT2),
}


@pytest.fixture(scope="module")
def trees():
    return {name: build() for name, (build, _) in LIBRARIES.items()}


@pytest.mark.parametrize("library", LIBRARIES)
def test_library_trees_are_routed_and_no_leaf_is_unmatched(trees, library):
    check(trees[library], LIBRARIES[library][1], strict=True)


@pytest.mark.parametrize("library", LIBRARIES)
def test_structure_equals_a_tree_map(trees, library):
    params = trees[library]
    labels = label_params(params)
    assert jax.tree.structure(labels) == jax.tree.structure(jax.tree.map(lambda _: 0, params))
    assert set(jax.tree.leaves(labels)) <= set(routing.LABELS)


@pytest.mark.parametrize("library", ["nnx", "linen", "haiku", "equinox"])
def test_labels_drive_optax_partition(trees, library):
    params = zeros(trees[library])
    transforms = {label: optax.sgd(1.0) for label in routing.LABELS} | {"hidden": optax.set_to_zero()}
    for labels in (label_params, label_params(params)):
        tx = optax.partition(transforms, labels)
        updates, _ = tx.update(params, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_frozen_dict_keeps_its_type():
    labels = label_params(FrozenDict({"Dense_0": {"kernel": jnp.zeros((2, 3))}}))
    assert labels == FrozenDict({"Dense_0": {"kernel": "hidden"}})


def test_nnx_module_as_a_tree_is_routed_like_its_state():
    model = nnx.Linear(16, 32, rngs=nnx.Rngs(0))
    assert seen(routes_of(model)["kernel"]) == ("hidden", (0,), (1,))


# -------------------------------------------------------------------------------------------------------------- traps

TRAPS = {
    "head is not in attention": (
        {"attention": {"heads": {"kernel": (8, 8)}, "head": {"kernel": (8, 8)}}, "multi_head": {"kernel": (8, 8)}},
        {
            "attention/heads/kernel": ("hidden", (0,), (1,)),
            "attention/head/kernel": ("hidden", (0,), (1,)),
            "multi_head/kernel": ("hidden", (0,), (1,)),
        },
    ),
    "one head per module": (
        {"block": {"head_0": {"query": {"kernel": (8, 4)}, "value": {"kernel": (8, 4)}}}},
        {
            "block/head_0/query/kernel": ("hidden", (0,), (1,)),
            "block/head_0/value/kernel": ("hidden", (0,), (1,)),
        },
    ),
    "out of an attention block at the root": (
        {"query": {"kernel": (8, 2, 4)}, "out": {"kernel": (2, 4, 8)}},
        {"query/kernel": ("hidden", (0,), (1, 2)), "out/kernel": ("hidden", (0, 1), (2,))},
    ),
    "out at the root of a model": (
        {"hidden": {"kernel": (8, 8)}, "out": {"kernel": (8, 5), "bias": (5,)}},
        {"hidden/kernel": ("hidden", (0,), (1,)), "out/kernel": ("head", (0,), (1,))},
    ),
    "heads by other names": (
        {
            "classifier": {"weight": (5, 8)},
            "unembed": {"w": (8, 5)},
            "embed_out": (8, 5),
            "logits_dense": {"kernel": (8, 5)},
        },
        {
            "classifier/weight": ("head", (1,), (0,)),
            "unembed/w": ("head", (0,), (1,)),
            "embed_out": ("head", (0,), (1,)),
            "logits_dense/kernel": ("head", (0,), (1,)),
        },
    ),
    "policy and value heads": (
        {"policy_head": {"kernel": (8, 5)}, "value_head": {"kernel": (8, 1)}, "value": {"kernel": (8, 8)}},
        {
            "policy_head/kernel": ("head", (0,), (1,)),
            "value_head/kernel": ("head", (0,), (1,)),
            "value/kernel": ("hidden", (0,), (1,)),
        },
    ),
    "transposed table and tied head": (
        {"embedding": (16, 50), "decoder": {"embedding": (16, 50), "layer": {"kernel": (16, 16)}}},
        {
            "embedding": ("embedding", (0,), (1,)),
            "decoder/embedding": ("embedding", (0,), (1,)),
            "decoder/layer/kernel": ("hidden", (0,), (1,)),
        },
    ),
    "embed_proj and token mixing are layers": (
        {"embed_proj": {"kernel": (8, 16)}, "token_mixing": {"kernel": (8, 16)}, "embed": {"w": (8, 16)}},
        {
            "embed_proj/kernel": ("hidden", (0,), (1,)),
            "token_mixing/kernel": ("hidden", (0,), (1,)),
            "embed/w": ("embedding", (0,), (1,)),
        },
    ),
    "patch embeddings": (
        {"patch_embed": {"proj": {"kernel": (4, 4, 3, 16), "bias": (16,)}}, "to_patch_embedding": {"kernel": (48, 16)}},
        {
            "patch_embed/proj/kernel": ("embedding", (0, 1, 2), (3,)),
            "to_patch_embedding/kernel": ("embedding", (0,), (1,)),
        },
    ),
    "tokens": (
        {"cls_token": (1, 1, 16), "registers_token": (1, 4, 16), "mask_token": (16,)},
        {
            "cls_token": ("vector", (), (0, 1, 2)),
            "registers_token": ("embedding", (1,), (2,)),
            "mask_token": ("vector",),
        },
    ),
    "scan-stacked vectors look like matrices": (
        {"layers": {"fc": {"kernel": (3, 8, 16), "bias": (3, 16)}, "norm": {"scale": (3, 8)}, "gamma": (3, 8)}},
        {
            "layers/fc/kernel": ("hidden", (1,), (2,)),
            "layers/fc/bias": ("vector", (), (1,)),
            "layers/norm/scale": ("vector", (), (1,)),
            "layers/gamma": ("vector", (), (1,)),
        },
    ),
    "stack of as many layers as inputs": (
        {"fc": {"kernel": (4, 4, 8), "bias": (4, 8)}, "query": {"kernel": (4, 4, 8), "bias": (4, 8)}},
        {"fc/kernel": ("hidden", (1,), (2,)), "query/kernel": ("hidden", (1,), (2,))},
    ),
    "bare stacked arrays": (
        {"blocks": {"attn_norm": (3, 8), "wq": (3, 8, 8), "wo": (3, 8, 8), "w1": (3, 8, 32), "b1": (3, 32)}},
        {
            "blocks/attn_norm": ("vector", (), (1,)),
            "blocks/wq": ("hidden", (1,), (2,)),
            "blocks/wo": ("hidden", (1,), (2,)),
            "blocks/w1": ("hidden", (1,), (2,)),
            "blocks/b1": ("vector", (), (1,)),
        },
    ),
    "nested stacks": (
        {
            "layers": {
                "norm": {"scale": (2, 3, 8)},
                "fc": {"kernel": (2, 3, 8, 16)},
                "attn": {"q": {"kernel": (2, 3, 8, 4, 2)}},
            }
        },
        {
            "layers/norm/scale": ("vector", (), (2,)),
            "layers/fc/kernel": ("hidden", (2,), (3,)),
            "layers/attn/q/kernel": ("hidden", (2,), (3, 4)),
        },
    ),
    "per-head key norm is no stack": (
        {"attn": {"key": {"kernel": (16, 4, 8)}, "key_norm": {"scale": (4, 8)}, "out": {"kernel": (4, 8, 16)}}},
        {
            "attn/key/kernel": ("hidden", (0,), (1, 2)),
            "attn/key_norm/scale": ("vector", (), (1,)),
            "attn/out/kernel": ("hidden", (0, 1), (2,)),
        },
    ),
    "one key head is no depthwise convolution": (
        {"attn": {"key": {"kernel": (16, 1, 8), "bias": (1, 8)}, "query": {"kernel": (16, 4, 8)}}},
        {"attn/key/kernel": ("hidden", (0,), (1, 2)), "attn/query/kernel": ("hidden", (0,), (1, 2))},
    ),
    "fused query-key-value": (
        {
            "a": {"qkv": {"kernel": (16, 48)}},
            "b": {"qkv": {"kernel": (16, 3, 4, 4)}},
            "c": {"c_attn": {"kernel": (3, 16, 48), "bias": (3, 48)}},
        },
        {
            "a/qkv/kernel": ("hidden", (0,), (1,)),
            "b/qkv/kernel": ("hidden", (0,), (2, 3)),
            "c/c_attn/kernel": ("hidden", (1,), (2,)),
        },
    ),
    "einsum order": (
        {
            "attn": {
                "q_einsum": {"w": (4, 16, 8)},
                "kv_einsum": {"w": (2, 1, 16, 8)},
                "attn_vec_einsum": {"w": (4, 8, 16)},
            }
        },
        {
            "attn/q_einsum/w": ("hidden", (1,), (0, 2)),
            "attn/kv_einsum/w": ("hidden", (2,), (1, 3)),
            "attn/attn_vec_einsum/w": ("hidden", (0, 1), (2,)),
        },
    ),
    "experts": (
        {"moe": {"experts": {"w_in": (4, 8, 32), "w_out": (4, 32, 8)}, "router": {"kernel": (8, 4)}}},
        {
            "moe/experts/w_in": ("hidden", (1,), (2,)),
            "moe/experts/w_out": ("hidden", (1,), (2,)),
            "moe/router/kernel": ("hidden", (0,), (1,)),
        },
    ),
    "convolutions that only the shape or the bias shows": (
        {"a": {"kernel": (3, 3, 4, 8)}, "b": {"kernel": (2, 5, 4, 8), "bias": (8,)}, "c": {"kernel": (3, 3, 1, 8)}},
        {
            "a/kernel": ("hidden", (0, 1, 2), (3,)),
            "b/kernel": ("hidden", (0, 1, 2), (3,)),
            "c/kernel": ("other", (0, 1, 2), (3,)),
        },
    ),
    "stacked convolutions": (
        {"layers": {"conv": {"kernel": (5, 3, 3, 4, 8), "bias": (5, 8)}, "conv2d": {"kernel": (5, 3, 3, 4, 8)}}},
        {"layers/conv/kernel": ("hidden", (1, 2, 3), (4,)), "layers/conv2d/kernel": ("hidden", (1, 2, 3), (4,))},
    ),
    "single rows and columns": (
        {"a": {"kernel": (1, 8)}, "b": {"kernel": (8, 1)}, "c": {"w": (3, 1, 8), "b": (3, 8)}},
        {
            "a/kernel": ("other", (0,), (1,)),
            "b/kernel": ("other", (0,), (1,)),
            "c/w": ("other", (1,), (2,)),
        },
    ),
    "low-rank adapters": (
        {
            "attn": {"query": {"lora_a": (8, 2), "lora_b": (2, 8)}},
            "embed": {"lora_A": (8, 2)},
            "layers": {"LoRA_b": (3, 2, 8)},
        },
        {
            "attn/query/lora_a": ("hidden", (0,), (1,)),
            "attn/query/lora_b": ("hidden", (0,), (1,)),
            "embed/lora_A": ("hidden", (0,), (1,)),
            "layers/LoRA_b": ("hidden", (1,), (2,)),
        },
    ),
    "torch and in-first weights": (
        {"a": {"weight": (32, 16), "bias": (32,)}, "b": {"weight": (16, 32), "bias": (32,)}, "ln": {"weight": (3, 16)}},
        {
            "a/weight": ("hidden", (1,), (0,)),
            "b/weight": ("hidden", (0,), (1,)),
            "ln/weight": ("vector", (), (1,)),
        },
    ),
    "attention arrays named value": (
        {"query": (8, 8), "key": (8, 8), "value": (8, 8), "out": (8, 8)},
        {"value": ("hidden", (0,), (1,)), "out": ("hidden", (0,), (1,))},
    ),
    "state-space parameters": ({"mixer": {"A_log": (16, 4), "D": (16,)}}, {"mixer/A_log": ("vector", (), (1,))}),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_trap(trap):
    shapes, expected = TRAPS[trap]
    check(tree_of(shapes), expected, strict=True)


def test_unclear_three_axes_say_so():
    found = routes_of(tree_of({"mix": {"kernel": (4, 8, 8)}}))["mix/kernel"]
    assert (found.label, found.rule) == ("hidden", "3-d kernel, first axis taken as a batch")


def test_one_table_used_twice_has_one_leaf():
    class Tied(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(50, 16, rngs=nnx.Rngs(0))
            self.lm_head = self.embed

    assert [entry.label for entry in routes_of(nnx.state(Tied(), nnx.Param)).values()] == ["embedding"]


def test_per_head_moves_heads_to_the_batch():
    params = tree_of(
        {"attn": {"query": {"kernel": (16, 4, 8)}, "out": {"kernel": (4, 8, 16)}, "qkv": {"kernel": (16, 3, 4, 8)}}}
    )
    expected = {
        "attn/query/kernel": ("hidden", (0,), (2,)),
        "attn/out/kernel": ("hidden", (1,), (2,)),
        "attn/qkv/kernel": ("hidden", (0,), (3,)),
    }
    check(params, expected, per_head=True)
    assert label_params(params, per_head=True) == label_params(params)


def test_agrees_with_optax_muon_on_attention(trees):
    """The axes of the views are the weight_dimension_numbers of optax's Muon."""
    view = view_params(trees["nnx"])["blocks"][0]["attn"]["out"]["kernel"].get_value()
    kernel = jax.random.normal(KEY, (4, 4, 16))

    def muon(leaf, dimensions):
        tx = optax.contrib.scale_by_muon(weight_dimension_numbers={"k": dimensions})
        return tx.update({"k": leaf}, tx.init({"k": leaf}))[0]["k"]

    seen_as_one = muon(kernel, view).reshape(16, 16)
    one = muon(kernel.reshape(16, 16), MuonDimensionNumbers())
    # Same arithmetic on the same matrix: only the order of float32 sums may differ.
    np.testing.assert_allclose(seen_as_one, one, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- what leaves may be


@pytest.mark.parametrize("make", [jnp.zeros, np.zeros, lambda sizes: shape(*sizes)], ids=["jax", "numpy", "abstract"])
def test_kinds_of_arrays(make):
    assert label_params({"fc": {"kernel": make((4, 8)), "bias": make((8,))}}) == {
        "fc": {"kernel": "hidden", "bias": "vector"}
    }


def test_numbers_are_vectors_and_empty_nodes_stay():
    params = {"temperature": 1.0, "masked": optax.MaskedNode(), "none": None, "fc": {"kernel": jnp.zeros((4, 8))}}
    expected = {"temperature": "vector", "masked": optax.MaskedNode(), "none": None, "fc": {"kernel": "hidden"}}
    assert label_params(params) == expected


def test_works_at_trace_time_and_on_a_bare_array():
    def step(params):
        assert label_params(params) == "hidden"
        return params

    jax.jit(step)(jnp.zeros((4, 8)))


def test_passes_through_map_params():
    params = {"fc": {"kernel": jnp.zeros((4, 8)), "bias": jnp.zeros(8)}}
    tx = optax.partition({"hidden": optax.sgd(1.0, momentum=0.9), "vector": optax.adam(1.0)}, label_params)
    shapes = optax.tree.map_params(tx, lambda leaf: leaf.shape, tx.init(params))
    assert (4, 8) in jax.tree.leaves(shapes, is_leaf=lambda node: isinstance(node, tuple) and node == (4, 8))


def test_leaf_that_is_no_array_is_refused_by_name():
    with pytest.raises(ValueError, match=r"leaf 'steps/1' is .*not an array.*eqx\.filter"):
        route(eqx.filter_eval_shape(EqxModel))


# --------------------------------------------------------------------------------------------------------- user rules

PARAMS = {"fc": {"kernel": (4, 8), "bias": (8,)}, "extra": {"kernel": (2, 4, 8)}}


@pytest.mark.parametrize(
    "rule, name",
    [
        (("^fc/kernel$", "frozen"), "user: ^fc/kernel$"),
        (Rule("mine", "frozen", pattern="kernel", when=lambda leaf: leaf.owner == "fc"), "mine"),
        (lambda path, leaf: "frozen" if path == "fc/kernel" else None, "user: <lambda>"),
        (lambda path, leaf: Rule("made", "frozen") if leaf.shape == (4, 8) else None, "made"),
        (lambda path, leaf: ("frozen", None) if leaf.ndim == 2 else None, "user: <lambda>"),
    ],
    ids=["regex", "rule", "function", "function giving a rule", "function giving a pair"],
)
def test_user_rules_come_first(rule, name):
    table = routes_of(tree_of(PARAMS), [rule, (".*", "other")])
    # A rule without a view keeps the built-in one.
    assert seen(table["fc/kernel"]) == ("frozen", (0,), (1,))
    assert table["fc/kernel"].rule == name
    assert table["fc/bias"].rule == "user: .*"


def test_user_view_is_normalised():
    view = MuonDimensionNumbers(reduction_axis=-1, output_axis=[0, 1])
    found = routes_of(tree_of(PARAMS), [("extra", "hidden", view)])["extra/kernel"]
    assert found.view == MatrixView((2, 4, 8), (2,), (0, 1))


def test_vector_by_a_user_rule_has_no_input_axes():
    assert seen(routes_of(tree_of(PARAMS), [("fc", "vector")])["fc/kernel"]) == ("vector", (), (1,))


def test_view_function_of_a_rule():
    rule = Rule(
        "last two", "hidden", pattern="extra", view=lambda leaf: MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)
    )
    assert seen(routes_of(tree_of(PARAMS), [rule])["extra/kernel"]) == ("hidden", (1,), (2,))


@pytest.mark.parametrize(
    "rules, message",
    [
        ([("(", "hidden")], r"rules\[0\] has the pattern '\('.*no regular expression"),
        ([("fc", "matrix")], r"rules\[0\] \('user: fc'\) gives the label 'matrix'.*Expected one of 'hidden'"),
        ([lambda path, leaf: 3], r"rules\[0\] \(user: <lambda>\) for leaf '.*' gives the label 3"),
        (["fc"], r"rules\[0\] is 'fc'.*Expected a Rule, a tuple"),
        (("fc", "hidden"), r"rules\[0\] is 'fc'.*rules=\[\(regex, label\)\]"),
        (
            [("fc/kernel", "hidden", MuonDimensionNumbers((0,), (2,)))],
            r"'user: fc/kernel': leaf 'fc/kernel' of shape \(4, 8\).*names axes \(2,\).*narrow the rule",
        ),
        ([("fc/kernel", "hidden", MuonDimensionNumbers((0,), (-2,)))], "each axis once"),
        ([("fc/kernel", "hidden", MuonDimensionNumbers((0, 1), ()))], "at least one output axis"),
        ([Rule("bad", "hidden", view=lambda leaf: (0, 1))], "not an optax.contrib.MuonDimensionNumbers"),
    ],
)
def test_bad_rules_are_named(rules, message, monkeypatch):
    # Past the type checks, which speak first where they are on.
    inner = routing.routes.compile_rules
    monkeypatch.setattr(routing.routes, "compile_rules", getattr(inner, "__wrapped__", inner))
    with pytest.raises(ValueError, match=message):
        getattr(route, "__wrapped__", route)(tree_of(PARAMS), rules)


def test_strict_names_all_unmatched_leaves():
    params = tree_of({"a": (2, 3, 4), "fc": {"kernel": (4, 8)}, "b": {"odd": (2, 3, 4, 5)}})
    with pytest.raises(ValueError, match=r"no rule matched 2 of 3 leaves") as error:
        route(params, strict=True)
    assert "'a' of shape (2, 3, 4)" in str(error.value)
    assert "'b/odd' of shape (2, 3, 4, 5)" in str(error.value)
    assert seen(routes_of(params)["a"]) == ("other", (1,), (2,))
    assert routes_of(params, [("^a$|odd", "other")], strict=True)["a"].rule == "user: ^a$|odd"


# ---------------------------------------------------------------------------------------------------------- invariants

NAMES = st.sampled_from(
    ["kernel", "bias", "w", "b", "weight", "scale", "embedding", "embed", "query", "out", "qkv", "conv", "experts"]
    + ["layers", "norm", "lora_a", "head", "lm_head", "0", "x", "h"]
)
SHAPES = st.lists(st.integers(0, 4), max_size=6).map(tuple)
TREES = st.dictionaries(NAMES, st.recursive(SHAPES, lambda sub: st.dictionaries(NAMES, sub, max_size=4), max_leaves=8))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(TREES, st.booleans())
def test_any_tree(shapes, per_head):
    params = tree_of(shapes)
    routes = route(params, per_head=per_head)
    table = jax.tree.leaves(routes)
    assert [entry.shape for entry in table] == [leaf.shape for leaf in jax.tree.leaves(params)]
    assert jax.tree.structure(label_params(params)) == jax.tree.structure(params)
    for entry in table:
        assert entry.label in set(routing.LABELS) - {"frozen"}
        assert (entry.rule == "") <= (entry.label == "other")
        if len(entry.shape) < 2:
            assert (entry.label, entry.view) == ("vector", None)
            continue
        inputs, outputs = entry.view.reduction_axis, entry.view.output_axis
        assert outputs
        assert bool(inputs) == (entry.label != "vector")
        axes = (*inputs, *outputs)
        assert len(set(axes)) == len(axes)
        assert set(axes) <= set(range(len(entry.shape)))
    unmatched = [entry.path for entry in table if not entry.rule]
    try:
        route(params, strict=True, per_head=per_head)
        assert not unmatched
    except ValueError as error:
        assert unmatched == re.findall(r"^  '(.*)' of shape", str(error), flags=re.MULTILINE)


# -------------------------------------------------------------------------------------------------------------- report


def test_report_lists_every_leaf_and_adds_up(trees):
    entries = routes_of(trees["nnx"]).values()
    rows = [ReportRow(entry, "celo2", 1.0, 0.1, math.prod(entry.shape), 8) for entry in entries]
    text = format_report(rows)
    for entry in entries:
        line = next(line for line in text.splitlines() if line.startswith(entry.path + " "))
        assert str(entry.shape) in line and entry.label in line and line.endswith(entry.rule)
    total = sum(leaf.size for leaf in jax.tree.leaves(trees["nnx"]))
    assert text.splitlines()[-1].split() == ["total", str(len(rows)), f"{total:,}", str(8 * len(rows))]


def test_report_says_what_no_rule_matched():
    entry = routes_of(tree_of({"odd": (2, 3, 4)}))["odd"]
    text = format_report([ReportRow(entry, "adamw", 20.0, 0.0, 24, 192)])
    assert "no rule matched" in text.splitlines()[2]
    assert text.endswith("no rule matched 1 of 1 leaves; they are labelled 'other'.")


def test_empty_report_and_empty_tree():
    assert route({}) == {}
    assert "total" in format_report([])


def test_rules_are_documented(pytestconfig):
    page = (pytestconfig.rootpath / "docs" / "guide" / "routing.md").read_text()
    listed = re.findall(r"^\| \d+ \| ([^|]+?) \| `(\w+)` \|", page, flags=re.MULTILINE)
    assert listed == [(rule.name, rule.label) for rule in routing.BUILT_IN]


def test_leaf_is_public_for_rules():
    leaf = Leaf("fc/kernel", ("fc", "kernel"), (4, 8), jnp.float32)
    assert (leaf.name, leaf.owner, leaf.module, leaf.ndim) == ("kernel", "fc", "fc", 2)


@pytest.mark.parametrize("name", ["up", "deconv1", "conv_transpose", "upsample2", "tconv", "ConvTranspose_0"])
def test_a_square_convolution_that_may_be_transposed_is_not_guessed(name):
    """Its inputs and outputs cannot be told apart: flax keeps (..., in, out), or (..., out, in) if asked to."""
    square, oblong = jnp.zeros((3, 3, 8, 8)), jnp.zeros((3, 3, 8, 4))
    found = route({"block": {name: {"kernel": square, "bias": jnp.zeros(8)}, "conv2": {"kernel": square}}})["block"]
    assert (found[name]["kernel"].label, found[name]["kernel"].rule) == ("other", "")  # no rule matched
    assert found["conv2"]["kernel"].label == "hidden"
    # Where the bias tells them apart, it is read.
    kernel = route({name: {"kernel": oblong, "bias": jnp.zeros(8)}})[name]["kernel"]
    assert kernel.label == "hidden" and kernel.view.viewed[-2:] == (36, 8)
