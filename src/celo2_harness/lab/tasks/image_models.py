"""Models on images: a multilayer perceptron, a convolutional net, an autoencoder and a vision transformer.

Each is a frozen dataclass of sizes whose `build` makes the module, from standardised images to logits.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from celo2_harness.lab.tasks.images import ImageFormat
from celo2_harness.lab.tasks.transformer import DTYPES, Block, check_transformer, embedding, layer_norm, run_blocks


@runtime_checkable
class ImageModel(Protocol):
    """The configuration of a model on images."""

    def build(self, form: ImageFormat, rngs: nnx.Rngs) -> nnx.Module:
        """Returns a new model, from standardised images to logits."""
        ...


@dataclass(frozen=True)
class ImageMLPConfig:
    """The size of a multilayer perceptron.

    Attributes:
        widths: The units of each hidden layer.
    """

    widths: tuple[int, ...]

    def build(self, form: ImageFormat, rngs: nnx.Rngs) -> "ImageMLP":
        """Returns a new model."""
        return ImageMLP(self, form, rngs)


class ImageMLP(nnx.Module):
    """Affine layers with ReLU between, on all pixels of an image at once."""

    def __init__(self, config: ImageMLPConfig, form: ImageFormat, rngs: nnx.Rngs):
        inputs = (form.pixels, *config.widths[:-1])
        self.layers = nnx.List([nnx.Linear(i, o, rngs=rngs) for i, o in zip(inputs, config.widths, strict=True)])
        self.head = nnx.Linear(config.widths[-1], form.classes, rngs=rngs)

    def __call__(self, images: Float32[Array, "batch height width channels"]) -> Float32[Array, "batch classes"]:
        """Returns the logits."""
        x = images.reshape(len(images), -1)
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return self.head(x)


@dataclass(frozen=True)
class ConvConfig:
    """The size of a convolutional net.

    Attributes:
        channels: The output channels of each layer.
        strides: The stride of each layer; 2 halves both sides of the image.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    def build(self, form: ImageFormat, rngs: nnx.Rngs) -> "ConvNet":
        """Returns a new model."""
        return ConvNet(self, form, rngs)


class ConvNet(nnx.Module):
    """3x3 convolutions with ReLU (kernels height x width x in x out), the mean over positions, an affine head."""

    def __init__(self, config: ConvConfig, form: ImageFormat, rngs: nnx.Rngs):
        inputs = (form.channels, *config.channels[:-1])
        self.convolutions = nnx.List(
            [
                nnx.Conv(i, o, (3, 3), strides=(stride, stride), rngs=rngs)
                for i, o, stride in zip(inputs, config.channels, config.strides, strict=True)
            ]
        )
        self.head = nnx.Linear(config.channels[-1], form.classes, rngs=rngs)

    def __call__(self, images: Float32[Array, "batch height width channels"]) -> Float32[Array, "batch classes"]:
        """Returns the logits."""
        x = images
        for convolution in self.convolutions:
            x = jax.nn.relu(convolution(x))
        return self.head(x.mean(axis=(1, 2)))


@dataclass(frozen=True)
class AutoencoderConfig:
    """The size of an autoencoder.

    Attributes:
        widths: The units of the layers down to the code, which is the last; the decoder has them in reverse.
    """

    widths: tuple[int, ...]

    def build(self, form: ImageFormat, rngs: nnx.Rngs) -> "Autoencoder":
        """Returns a new model."""
        return Autoencoder(self, form, rngs)


class Autoencoder(nnx.Module):
    """A deep autoencoder, a standard test of optimizers since Hinton and Salakhutdinov (2006).

    Affine layers with ReLU between, down to a code without one, and up again to the logits of the pixels.
    """

    def __init__(self, config: AutoencoderConfig, form: ImageFormat, rngs: nnx.Rngs):
        down = (form.pixels, *config.widths)
        up = config.widths[::-1]
        self.encoder = nnx.List([nnx.Linear(i, o, rngs=rngs) for i, o in zip(down[:-1], down[1:], strict=True)])
        self.decoder = nnx.List([nnx.Linear(i, o, rngs=rngs) for i, o in zip(up[:-1], up[1:], strict=True)])
        self.output = nnx.Linear(config.widths[0], form.pixels, rngs=rngs)

    def __call__(
        self, images: Float32[Array, "batch height width channels"]
    ) -> Float32[Array, "batch height width channels"]:
        """Returns the logit of each pixel's brightness."""
        x = images.reshape(len(images), -1)
        for layer in self.encoder[:-1]:
            x = jax.nn.relu(layer(x))
        x = self.encoder[-1](x)
        for layer in self.decoder:
            x = jax.nn.relu(layer(x))
        return self.output(x).reshape(images.shape)


@dataclass(frozen=True)
class ViTConfig:
    """The size and the number formats of a vision transformer.

    Attributes:
        patch: The side of a patch in pixels; it divides the sides of the images.
        width: The channels of the residual stream.
        layers: The number of blocks.
        heads: The number of attention heads; it divides the width.
        dtype: The format that the blocks compute in, "float32" or "bfloat16".
        param_dtype: The format of the parameters.
        remat: Whether each block is computed again in the backward pass instead of keeping its activations.
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
    """A vision transformer: square patches as tokens, the blocks of the GPT without its mask, mean pooling.

    Patches go through one affine map, learned positions are added, and the mean over all tokens is classified: there is
    no class token, as in the plain baseline of Beyer, Zhai and Kolesnikov (2022). Linear maps inside the blocks have no
    bias.

    Args:
        config: The size.
        form: The format of the images.
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


IMAGE_MODELS: dict[str, dict[str, ImageModel]] = {
    "image_mlp": {"digits": ImageMLPConfig((32,)), "fashion": ImageMLPConfig((128, 128))},
    "conv": {"digits": ConvConfig((16, 32), (1, 2)), "fashion": ConvConfig((16, 32, 64), (2, 2, 1))},
    "vit": {
        "digits": ViTConfig(patch=2, width=32, layers=2, heads=2),
        "fashion": ViTConfig(patch=7, width=64, layers=4, heads=4),
    },
    "autoencoder": {"digits": AutoencoderConfig((32, 8)), "fashion": AutoencoderConfig((256, 64, 32))},
}
"""The models by kind of task and by the images that they take."""
