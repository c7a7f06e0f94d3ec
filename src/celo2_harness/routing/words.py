"""What names say: the words of a name, and what routing takes them for."""

import functools
import re

_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+")


@functools.lru_cache(maxsize=1 << 16)
def words(name: str) -> tuple[str, ...]:
    """The lower-case words of a name, without digits.

    Example:
        >>> words("MultiHeadAttention_0"), words("c_attn_w"), words("ln_1")
        (('multi', 'head', 'attention'), ('c', 'attn', 'w'), ('ln',))
    """
    return tuple(word.lower() for word in _WORD.findall(name))


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words that stand for the weight itself: `c_attn_w` and `c_attn` mean the same thing.
WEIGHT = _set("w weight weights kernel kernels")
BIAS = _set("b bias biases")
VECTOR = _set("bias biases scale scales offset offsets gamma beta gain gains")
GAIN = _set("scale scales gamma gain gains g weight")
NORM = _set("norm norms ln layernorm rmsnorm batchnorm groupnorm instancenorm bn gn rms")
# A module whose name ends with one of these is a layer, whatever else its name says.
LAYER = _set("proj projection projector dense linear fc mlp conv modulation")
# Containers that hold one entry per layer (or expert). Followed by an index they are lists, otherwise stacks.
STACK = _set("layers blocks h scan scanned stack stacked experts expert")
EXPERT = _set("expert experts moe")

QKV = _set("q k v query key value queries keys values wq wk wv kv")
_FUSED = _set("qkv wqkv cattn querykeyvalue")
_OUT = _set("out o output wo vec proj projection")
_ATTENTION = _set("attn attention mha msa mhsa")
# Words that say nothing about which projection of an attention block a name means.
_FILLER = _set("w weight weights kernel kernels to linear dense c attn attention self cross einsum")
_PROJECTION = _set("proj projection")

EMBEDDING = _set("embed embeds embedder embedding embeddings emb embs wte wpe posemb codebook codebooks")
# Only as the end of an array's own name: "cls_token" is an embedding, "token_mixing/kernel" is not.
TOKEN = _set("token tokens pos positions positional registers prompt prompts latent latents table tables")
# The parts of a diagonal state matrix A, and what RWKV keeps per channel.
_PARTS = _set("log real imag re im")
_TIME = _set("decay first faaaa mix")
# What transposed convolutions are called, and convolutions behind an upsampling too.
_TRANSPOSED_BEGINS = ("transpos", "deconv", "upconv", "upsampl", "upscal", "unpool")
_TRANSPOSED = _set("up ups tconv convt transconv convtrans convtranspose")
_TRANSPOSED_WITH_CONV = _set("t tr trans fractional fractionally")

_PATCH = _set("patch patches")
_PATCH_LAYER = EMBEDDING | _set("conv proj projection stem dense linear")

_HEAD = _set("head heads lmhead lmheads logits classifier unembed unembedding readout readouts")
# "multi_head", "q_head", "map_head" (attention pooling) are no output layers.
_NOT_A_HEAD = _set("multi attn attention q k v kv query key per map pool num norm")
_ROOT_HEADS = _set("out output fcout projout outproj outputproj outputprojection outputlayer finallayer finaldense")


@functools.lru_cache(maxsize=1 << 16)
def is_qkv(name: str) -> bool:
    """Returns whether a name is a query, key or value projection: "query", "q_proj", "to_k", "wv"."""
    meaning = frozenset(words(name)) - _FILLER - _PROJECTION
    return len(meaning) == 1 and meaning <= QKV


@functools.lru_cache(maxsize=1 << 16)
def is_fused_qkv(name: str, in_attention: bool = False) -> bool:
    """Whether a name is a fused query-key-value projection: "qkv", "c_attn", "in_proj" of an attention block."""
    spoken = words(name)
    joined = "".join(word for word in spoken if word not in WEIGHT and word not in ("to", "proj", "einsum"))
    return joined in _FUSED or (in_attention and spoken[:2] == ("in", "proj"))


@functools.lru_cache(maxsize=1 << 16)
def is_out(name: str) -> bool:
    """Returns whether a name is an output projection, if it stands in an attention block: "out", "c_proj", "wo"."""
    meaning = frozenset(words(name)) - _FILLER
    return bool(meaning) and meaning <= _OUT


@functools.lru_cache(maxsize=1 << 16)
def says_attention(name: str) -> bool:
    """Whether the name of a module or an array says attention. "value" may also be a critic: it needs company."""
    return bool(_ATTENTION & frozenset(words(name))) or (name != "value" and (is_qkv(name) or is_fused_qkv(name)))


@functools.lru_cache(maxsize=1 << 16)
def says_norm(name: str) -> bool:
    """Returns whether a name is one of a normalisation: "ln_1", "post_norm"; not "bn_conv", not "adaLN_modulation".

    Example:
        >>> says_norm("conv_bn"), says_norm("bn_conv")
        (True, False)
    """
    spoken = words(name)
    if "weight" in spoken or "spectral" in spoken:  # these normalise a weight
        return False
    meaning = [word for word in spoken if word in NORM or word in LAYER]
    return bool(meaning) and (meaning[-1] in NORM or meaning[-1] == "mlp" and meaning[0] in NORM)


@functools.lru_cache(maxsize=1 << 16)
def says_conv(name: str) -> bool:
    """Returns whether a name says "convolution"."""
    return any(word.startswith("conv") or word == "depthwise" for word in words(name))


@functools.lru_cache(maxsize=1 << 16)
def says_embedding(name: str) -> bool:
    """Returns whether a name is one of an embedding table; "embed_proj" maps embeddings to something else."""
    spoken = frozenset(words(name))
    return bool(spoken & EMBEDDING) and not spoken & LAYER


@functools.lru_cache(maxsize=1 << 16)
def says_patch(name: str) -> bool:
    """Returns whether a name is one of a layer that turns image patches into tokens: "patch_embed", "patchify"."""
    spoken = frozenset(words(name))
    return "patchify" in spoken or bool(spoken & _PATCH and spoken & _PATCH_LAYER)


@functools.lru_cache(maxsize=1 << 16)
def says_head(name: str) -> bool:
    """Returns whether a name is one of an output layer: "lm_head", "classifier", "embed_out"."""
    spoken = [word for word in words(name) if word not in WEIGHT]
    meaning = frozenset(spoken)
    if not spoken or meaning & _NOT_A_HEAD:
        return False
    untied = meaning & {"embed", "embedding", "embeddings"} and meaning & {"out", "output"}
    return spoken[-1] in _HEAD or "logits" in meaning or bool(untied)


@functools.lru_cache(maxsize=1 << 16)
def says_diagonal(name: str) -> bool:
    """Returns whether a name is one of a state-space or linear-attention model's vectors, one per channel or head.

    Example:
        >>> says_diagonal("A_log"), says_diagonal("Lambda_re"), says_diagonal("time_first"), says_diagonal("B_re")
        (True, True, True, False)
    """
    spoken = frozenset(words(name))
    return (
        "lambda" in spoken
        or ("a" in spoken and bool(spoken & _PARTS))
        or ("time" in spoken and bool(spoken & _TIME) and not spoken & WEIGHT)
    )


@functools.lru_cache(maxsize=1 << 16)
def says_table(name: str) -> bool:
    """Returns whether an array's own name is one of a table: "cls_token", "latents", "decoder_query", "embedding"."""
    spoken = words(name)
    if not spoken or frozenset(spoken) & LAYER:
        return False
    learned_query = spoken[-1] in ("query", "queries") and not is_qkv(name)
    return bool(frozenset(spoken) & EMBEDDING) or spoken[-1] in TOKEN or learned_query


def is_root_head(name: str) -> bool:
    """Returns whether a name is one of an output layer, if it stands at the top of the model: "out", "final_dense"."""
    return "".join(word for word in words(name) if word not in WEIGHT) in _ROOT_HEADS


@functools.lru_cache(maxsize=1 << 16)
def says_transposed(name: str) -> bool:
    """Returns whether a convolution of this name may be a transposed one: "deconv1", "conv_t", "upsample".

    Example:
        >>> says_transposed("up2"), says_transposed("tconv"), says_transposed("conv2"), says_transposed("update")
        (True, True, False, False)
    """
    spoken = words(name)
    return (
        any(word.startswith(_TRANSPOSED_BEGINS) or word in _TRANSPOSED for word in spoken)
        or bool(_TRANSPOSED_WITH_CONV & frozenset(spoken))
        and says_conv(name)
    )


def is_haiku_transposed(owner: str, name: str) -> bool:
    """Returns whether these are the names of Haiku's transposed convolutions, which keep `w` as (..., out, in)."""
    return "transpose" in words(owner) and name == "w"
