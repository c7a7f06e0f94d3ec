"""A multilayer perceptron that classifies images."""

from dataclasses import dataclass

import jax
from flax import nnx
from jaxtyping import Array, Float32

from celo2_harness.lab.tasks.vision.data import ImageFormat


@dataclass(frozen=True)
class ImageMLPConfig:
    """The size of a multilayer perceptron.

    Attributes:
        widths: Units of the hidden layers.
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


IMAGE_MLPS = {
    "digits": ImageMLPConfig((32,)),
    "fashion": ImageMLPConfig((128, 128)),
}
