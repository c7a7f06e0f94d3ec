"""A deep autoencoder of images, the standard test of optimizers since Hinton and Salakhutdinov (2006)."""

from dataclasses import dataclass

import jax
from flax import nnx
from jaxtyping import Array, Float32

from celo2_harness.lab.tasks.vision.data import ImageFormat


@dataclass(frozen=True)
class AutoencoderConfig:
    """The size of an autoencoder.

    Attributes:
        widths: Units of the layers down to the code, which is the last; the decoder has them in reverse.
    """

    widths: tuple[int, ...]

    def build(self, form: ImageFormat, rngs: nnx.Rngs) -> "Autoencoder":
        """Returns a new model."""
        return Autoencoder(self, form, rngs)


class Autoencoder(nnx.Module):
    """Affine layers with ReLU between, down to a code without one, and up again to the logits of the pixels."""

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


AUTOENCODERS = {
    "digits": AutoencoderConfig((32, 8)),
    "fashion": AutoencoderConfig((256, 64, 32)),
    "fashion-deep": AutoencoderConfig((1000, 500, 250, 30)),
}
