"""A vision transformer: square patches as tokens, the blocks of the GPT without its mask, mean pooling."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from celo2_harness.lab.tasks.transformer import DTYPES, Block, check_transformer, embedding, layer_norm, run_blocks
from celo2_harness.lab.tasks.vision.data import ImageFormat


@dataclass(frozen=True)
class ViTConfig:
    """The size and the number formats of a vision transformer.

    Attributes:
        patch: The side of a patch in pixels; it divides the sides of the images.
        width: Channels of the residual stream.
        layers: Number of blocks.
        heads: Attention heads; they divide the width.
        dtype: What the blocks compute in, "float32" or "bfloat16".
        param_dtype: What the parameters are kept in.
        remat: Recompute each block in the backward pass instead of keeping its activations.
    """

    patch: int
    width: int
    layers: int
    heads: int
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: bool = False

    def __post_init__(self):
        check_transformer(self, "patch")

    def build(self, form: ImageFormat, rngs: nnx.Rngs) -> "ViT":
        """Returns a new model."""
        return ViT(self, form, rngs)


class ViT(nnx.Module):
    """A vision transformer.

    Patches go through one affine map, learned positions are added, and the mean over all tokens is classified: there is
    no class token, as in the plain baseline of Beyer, Zhai and Kolesnikov (2022). Linear maps inside the blocks have no
    bias.

    Args:
        config: Its size.
        form: The images.
        rngs: The source of the initial values; only the `params` stream is used.
    """

    def __init__(self, config: ViTConfig, form: ImageFormat, rngs: nnx.Rngs):
        if form.height % config.patch or form.width % config.patch:
            raise ValueError(f"patch = {config.patch}: expected a divisor of {form.height} and of {form.width} pixels")
        self.config = config
        dtypes = {"dtype": DTYPES[config.dtype], "param_dtype": DTYPES[config.param_dtype]}
        tokens = form.height * form.width // config.patch**2
        self.patch_embedding = nnx.Linear(config.patch**2 * form.channels, config.width, rngs=rngs, **dtypes)
        self.position_embedding = embedding(tokens, config, rngs)
        self.blocks = nnx.List([Block(config, rngs, causal=False) for _ in range(config.layers)])
        self.norm = layer_norm(config, rngs)
        self.head = nnx.Linear(config.width, form.classes, rngs=rngs, **dtypes)

    def __call__(self, images: Float32[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        """Returns the logits, in the compute dtype."""
        patches = cut_patches(images, self.config.patch)
        x = self.patch_embedding(patches) + self.position_embedding(jnp.arange(patches.shape[1]))
        x = self.norm(run_blocks(self.blocks, x, self.config.remat))
        return self.head(x.mean(axis=1))


def cut_patches(images: Float[Array, "batch height width channels"], side: int) -> Float[Array, "batch patches pixels"]:
    """Returns the square patches of images, row by row, each as one vector.

    >>> cut_patches(jnp.arange(16.0).reshape(1, 4, 4, 1), 2)[0, 1].tolist()
    [2.0, 3.0, 6.0, 7.0]
    """
    batch, height, width, channels = images.shape
    grid = images.reshape(batch, height // side, side, width // side, side, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, side * side * channels)


VITS = {
    "digits": ViTConfig(patch=2, width=32, layers=2, heads=2),
    "fashion": ViTConfig(patch=7, width=64, layers=4, heads=4),
    "vit-s16": ViTConfig(patch=16, width=384, layers=12, heads=6),
}
