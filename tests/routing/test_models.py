"""Whole models: what every kind of leaf is, written down from the architecture.

Patterns stand for all leaves of a kind; every leaf of a model must be covered by one, and none may be unmatched.
"""

import fnmatch

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from celo2_harness.routing import route

KEY = jax.random.key(0)
TOKENS = jnp.zeros((1, 8), int)


def tree_of(shapes):
    is_shape = lambda node: isinstance(node, tuple)
    return jax.tree.map(lambda sizes: jax.ShapeDtypeStruct(sizes, jnp.float32), shapes, is_leaf=is_shape)


def matrix(inputs, outputs):
    return "hidden", inputs, outputs


DENSE, OUT_FIRST = matrix((0,), (1,)), matrix((1,), (0,))
STACKED, STACKED_OUT_FIRST = matrix((1,), (2,)), matrix((2,), (1,))
TABLE, HEAD, HEAD_OUT_FIRST = ("embedding", (0,), (1,)), ("head", (0,), (1,)), ("head", (1,), (0,))
VECTOR, STACKED_VECTOR = ("vector",), ("vector", (), (1,))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(4, 16, 24, decode=False, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(16, 32, use_bias=False, rngs=rngs)
        self.adaLN_modulation = nnx.Linear(16, 96, rngs=rngs)
        self.bn_conv = nnx.Conv(16, 8, (3,), use_bias=False, rngs=rngs)
        self.D = nnx.Param(jnp.ones(32))
        self.gain = nnx.Param(jnp.ones(()))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.listed = nnx.List([NnxBlock(rngs)])
        self.trunk = nnx.vmap(NnxBlock, in_axes=0, out_axes=0)(rngs.split(6))
        self.embed = nnx.Embed(50, 16, rngs=rngs)
        self.gru, self.lstm = nnx.GRUCell(4, 6, rngs=rngs), nnx.LSTMCell(4, 6, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 4, (2, 2), transpose_kernel=True, rngs=rngs)
        self.mix = nnx.LinearGeneral(16, (4, 4), rngs=rngs)
        self.head = nnx.Linear(16, 50, rngs=rngs)


def nnx_model():
    return nnx.state(nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0))), nnx.Param)


NNX = {
    "listed/0/attn/[qkv]*/kernel": matrix((0,), (1, 2)),
    "listed/0/attn/out/kernel": matrix((0, 1), (2,)),
    "listed/0/bn_conv/kernel": matrix((0, 1), (2,)),
    "listed/0/*/kernel": DENSE,
    "listed/0/*": VECTOR,
    "trunk/attn/[qkv]*/kernel": matrix((1,), (2, 3)),
    "trunk/attn/out/kernel": matrix((1, 2), (3,)),
    "trunk/bn_conv/kernel": matrix((1, 2), (3,)),
    "trunk/*/kernel": STACKED,
    "trunk/gain": ("vector", (), ()),
    "trunk/*": STACKED_VECTOR,
    "embed/embedding": TABLE,
    "gru/*/kernel": DENSE,
    "lstm/*/kernel": DENSE,
    "up/kernel": matrix((0, 1, 3), (2,)),
    "mix/kernel": matrix((0,), (1, 2)),
    "mix/bias": ("vector", (), (0, 1)),
    "head/kernel": HEAD,
    "*/bias": VECTOR,
}


class LinenLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = nn.RMSNorm(name="pre")(x) * self.param("D", nn.initializers.ones, (16,))
        x = nn.MultiHeadDotProductAttention(4, qkv_features=24, use_bias=False, name="self_attention")(x, x)
        return nn.Dense(16, use_bias=False, name="wo")(nn.Dense(64, use_bias=False, name="wi")(x)), None


class LinenModel(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(50, 16, name="token_embedder")(tokens)
        scan = nn.scan(LinenLayer, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=6)
        x = nn.WeightNorm(nn.Dense(16))(scan(name="layers")(x, None)[0])
        (_, h), _ = nn.OptimizedLSTMCell(16)((x[:, 0], x[:, 0]), nn.GRUCell(16)(x[:, 0], x[:, 0])[0])
        y = nn.ConvTranspose(4, (2, 2), transpose_kernel=True, name="up")(x.reshape(1, 8, 8, 2))
        return nn.Dense(50, name="logits")(h) + y.sum()


def linen_model(axis):
    return jax.eval_shape(LinenModel(axis).init, KEY, TOKENS)["params"]


LINEN_REST = {
    "token_embedder/embedding": TABLE,
    "up/kernel": matrix((0, 1, 3), (2,)),
    "logits/kernel": HEAD,
    "*/scale": VECTOR,
    "*/bias": VECTOR,
    "*/kernel": DENSE,
}
LINEN_FIRST = {
    "layers/self_attention/out/kernel": matrix((1, 2), (3,)),
    "layers/self_attention/*/kernel": matrix((1,), (2, 3)),
    "layers/w[io]/kernel": STACKED,
    "layers/*": STACKED_VECTOR,
    **LINEN_REST,
}
LINEN_SECOND = {
    "layers/self_attention/out/kernel": matrix((0, 2), (3,)),
    "layers/self_attention/*/kernel": matrix((0,), (2, 3)),
    "layers/w[io]/kernel": matrix((0,), (2,)),
    "layers/*": ("vector", (), (0,)),
    **LINEN_REST,
}


def haiku_model():
    attention = lambda **kwargs: hk.MultiHeadAttention(4, 4, w_init=hk.initializers.TruncatedNormal(), **kwargs)

    def block(x):
        x = hk.LayerNorm(-1, True, True)(x)
        return hk.Linear(16)(attention(name="attn")(x, x, x)) * hk.get_parameter("layer_scale", (16,), init=jnp.ones)

    def forward(tokens):
        x = hk.Embed(50, 16)(tokens)
        x = hk.experimental.layer_stack(3)(block)(attention()(x, x, x))
        h, _ = hk.GRU(16)(x[:, 0], jnp.zeros((1, 16)))
        c, _ = hk.LSTM(16)(h, hk.LSTM(16).initial_state(1))
        image = hk.Conv2DTranspose(5, 3, name="up")(hk.Conv2D(8, 3, name="norm_conv")(x.reshape(1, 8, 4, 4)))
        return hk.Linear(50, name="logits")(c) + image.sum()

    return jax.eval_shape(hk.transform(forward).init, KEY, TOKENS)


HAIKU = {
    "*layer_stack*/w": STACKED,
    "*layer_stack*": STACKED_VECTOR,
    "embed/embeddings": TABLE,
    "norm_conv/w": matrix((0, 1, 2), (3,)),
    "up/w": matrix((0, 1, 3), (2,)),
    "logits/w": HEAD,
    "*/b": VECTOR,
    "*/w*": DENSE,
}


class EqxBlock(eqx.Module):
    attn: eqx.nn.MultiheadAttention
    ln_mlp: eqx.nn.LayerNorm
    adaLN_modulation: eqx.nn.Linear
    bn_conv: eqx.nn.Conv1d
    gate: jax.Array
    A: jax.Array
    B: jax.Array

    def __init__(self, key):
        self.attn = eqx.nn.MultiheadAttention(4, 16, use_query_bias=True, key=key)
        self.ln_mlp = eqx.nn.LayerNorm(16)
        self.adaLN_modulation = eqx.nn.Linear(16, 96, use_bias=False, key=key)
        self.bn_conv = eqx.nn.Conv1d(16, 8, 3, use_bias=False, key=key)
        self.gate, self.A, self.B = jnp.ones(16), jnp.ones((16, 4)), jnp.ones((4, 16))


class EqxModel(eqx.Module):
    vocab: eqx.nn.Embedding
    trunk: EqxBlock
    listed: list
    gru: eqx.nn.GRUCell
    lstm: eqx.nn.LSTMCell
    up: eqx.nn.ConvTranspose2d
    weight_norm: eqx.nn.WeightNorm
    time_embed: eqx.nn.Linear
    lm_head: eqx.nn.Linear

    def __init__(self):
        self.vocab = eqx.nn.Embedding(50, 16, key=KEY)
        self.trunk = eqx.filter_vmap(EqxBlock)(jax.random.split(KEY, 3))
        self.listed = [EqxBlock(KEY)]
        self.gru, self.lstm = eqx.nn.GRUCell(4, 6, key=KEY), eqx.nn.LSTMCell(4, 6, key=KEY)
        self.up = eqx.nn.ConvTranspose2d(8, 4, 2, key=KEY)
        self.weight_norm = eqx.nn.WeightNorm(eqx.nn.Linear(4, 8, key=KEY))
        self.time_embed, self.lm_head = eqx.nn.Linear(16, 16, key=KEY), eqx.nn.Linear(16, 50, key=KEY)


def equinox_model():
    is_array = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    return eqx.filter(eqx.filter_eval_shape(EqxModel), is_array)


EQUINOX = {
    "vocab/weight": TABLE,
    "trunk/ln_mlp/*": STACKED_VECTOR,
    "trunk/bn_conv/weight": matrix((2, 3), (1,)),
    "trunk/*/weight": STACKED_OUT_FIRST,
    "trunk/[AB]": STACKED,
    "trunk/*": STACKED_VECTOR,
    "listed/0/ln_mlp/*": VECTOR,
    "listed/0/bn_conv/weight": matrix((1, 2), (0,)),
    "listed/0/*/weight": OUT_FIRST,
    "listed/0/[AB]": DENSE,
    "listed/0/*": VECTOR,
    "up/weight": matrix((1, 2, 3), (0,)),
    "up/bias": ("vector", (), (0, 1, 2)),
    "weight_norm/g": ("vector", (), (0, 1)),
    "lm_head/weight": HEAD_OUT_FIRST,
    "*/bias*": VECTOR,
    "*/weight*": OUT_FIRST,
}


def mamba(*stack):
    return {
        "norm": {"scale": (*stack, 16)},
        "mixer": {
            "in_proj": {"kernel": (*stack, 16, 64)},
            "conv1d": {"kernel": (*stack, 4, 1, 32), "bias": (*stack, 32)},
            "x_proj": {"kernel": (*stack, 32, 10)},
            "dt_proj": {"kernel": (*stack, 2, 32), "bias": (*stack, 32)},
            "A_log": (*stack, 32, 4),
            "D": (*stack, 32),
            "out_proj": {"kernel": (*stack, 32, 16)},
        },
    }


def mixture(*stack):
    return {
        "norm": {"scale": (*stack, 16)},
        "moe": {
            "router": {"kernel": (*stack, 16, 8)},
            "wi": (*stack, 8, 16, 40),
            "wo": (*stack, 8, 40, 16),
        },
        "shared_expert": {"up": {"kernel": (*stack, 16, 40)}, "down": {"kernel": (*stack, 40, 16)}},
    }


def conv(*shape):
    return {"kernel": shape, "bias": shape[-1:]}


UNET = {
    "conv_in": conv(3, 3, 3, 16),
    "time_embedding": {"linear_1": conv(16, 64), "linear_2": conv(64, 64)},
    "down_0": {
        "norm1": {"scale": (16,), "bias": (16,)},
        "conv1": conv(3, 3, 16, 24),
        "time_emb_proj": conv(64, 24),
        "attention": {"qkv": conv(1, 1, 24, 72), "proj_out": conv(1, 1, 24, 24)},
    },
    "up_0": {"up": {"kernel": (2, 2, 8, 24), "bias": (8,)}, "conv": conv(3, 3, 8, 8)},
    "conv_norm_out": {"scale": (8,), "bias": (8,)},
    "conv_out": conv(3, 3, 8, 4),
}
T5_LAYER = {
    "SelfAttention": {
        **{name: {"kernel": (16, 16)} for name in "qkvo"},
        "relative_attention_bias": {"embedding": (32, 4)},
    },
    "DenseReluDense": {"wi_0": {"kernel": (16, 40)}, "wo": {"kernel": (40, 16)}},
    "layer_norm": {"weight": (16,)},
}
T5 = {"shared": {"embedding": (50, 16)}, "encoder": {"block": {"0": T5_LAYER}}, "lm_head": {"kernel": (16, 50)}}


def gemma(*stack):
    return {
        "attn": {
            "q_einsum": {"w": (*stack, 4, 16, 8)},
            "kv_einsum": {"w": (*stack, 2, 1, 16, 8)},
            "attn_vec_einsum": {"w": (*stack, 4, 8, 16)},
            "_key_norm": {"scale": (*stack, 8)},
        },
        "mlp": {"gating_einsum": {"w": (*stack, 2, 16, 40)}, "linear": {"w": (*stack, 40, 16)}},
        "pre_attention_norm": {"scale": (*stack, 16)},
    }


MODELS = {
    "nnx": (nnx_model, NNX),
    "linen, scanned along the first axis": (lambda: linen_model(0), LINEN_FIRST),
    "linen, scanned along the second axis": (lambda: linen_model(1), LINEN_SECOND),
    "haiku": (haiku_model, HAIKU),
    "equinox": (equinox_model, EQUINOX),
    "mamba": (
        lambda: tree_of({"embedding": (50, 16), "backbone": [mamba()]}),
        {
            "embedding": TABLE,
            "*/conv1d/kernel": ("other", (0, 1), (2,)),
            "*/A_log": ("vector", (), (1,)),
            "*/kernel": DENSE,
            "*": VECTOR,
        },
    ),
    "mamba, stacked": (
        lambda: tree_of({"embedding": (50, 16), "backbone": mamba(6), "norm_f": {"scale": (16,)}}),
        {
            "embedding": TABLE,
            "norm_f/scale": VECTOR,
            "*/conv1d/kernel": ("other", (1, 2), (3,)),
            "*/A_log": ("vector", (), (2,)),
            "*/kernel": STACKED,
            "*": STACKED_VECTOR,
        },
    ),
    "mixture of experts": (
        lambda: tree_of({"layer_0": mixture()}),
        {"*/moe/w*": STACKED, "*/kernel": DENSE, "*/scale": VECTOR},
    ),
    "mixture of experts, stacked": (
        lambda: tree_of({"trunk": mixture(6)}),
        {"*/moe/w*": matrix((2,), (3,)), "*/kernel": STACKED, "*/scale": STACKED_VECTOR},
    ),
    "u-net": (
        lambda: tree_of(UNET),
        {
            "time_embedding/*/kernel": DENSE,
            "*/time_emb_proj/kernel": DENSE,
            "*/up/kernel": matrix((0, 1, 3), (2,)),
            "*/kernel": matrix((0, 1, 2), (3,)),
            "*": VECTOR,
        },
    ),
    "t5": (
        lambda: tree_of(T5),
        {"*/embedding": TABLE, "lm_head/kernel": HEAD, "*/kernel": DENSE, "*/weight": VECTOR},
    ),
    "gemma": (
        lambda: tree_of({"embedder": {"input_embedding": (50, 16)}, "layer_0": gemma()}),
        {
            "embedder/*": TABLE,
            "*/q_einsum/w": matrix((1,), (0, 2)),
            "*/kv_einsum/w": matrix((2,), (1, 3)),
            "*/attn_vec_einsum/w": matrix((0, 1), (2,)),
            "*/gating_einsum/w": STACKED,
            "*/linear/w": DENSE,
            "*/scale": VECTOR,
        },
    ),
    "gemma, stacked": (
        lambda: tree_of({"layers": gemma(6)}),
        {
            "*/q_einsum/w": matrix((2,), (1, 3)),
            "*/kv_einsum/w": matrix((3,), (2, 4)),
            "*/attn_vec_einsum/w": matrix((1, 2), (3,)),
            "*/gating_einsum/w": matrix((2,), (3,)),
            "*/linear/w": STACKED,
            "*/scale": STACKED_VECTOR,
        },
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_every_leaf_of_a_model(model):
    build, expected = MODELS[model]
    routes = jax.tree.leaves(route(build(), strict=True))
    used = set()
    for found in routes:
        pattern = next((pattern for pattern in expected if fnmatch.fnmatchcase(found.path, pattern)), None)
        assert pattern is not None, found.path
        used.add(pattern)
        view = () if found.view is None else (found.view.reduction_axis, found.view.output_axis)
        assert (found.label, *view) == expected[pattern], found
    assert used == set(expected)
