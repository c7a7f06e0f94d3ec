"""A small convolutional net that classifies images."""

from dataclasses import dataclass

import jax
from flax import nnx
from jaxtyping import Array, Float32

from celo2_harness.lab.tasks.vision.data import ImageFormat


@dataclass(frozen=True)
class ConvConfig:
    """The size of a convolutional net.

    Attributes:
        channels: Of each layer.
        strides: Of each layer; 2 halves both sides of the image.
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


CONV_NETS = {
    "digits": ConvConfig((16, 32), (1, 2)),
    "fashion": ConvConfig((16, 32, 64), (2, 2, 1)),
    "cifar": ConvConfig((64, 128, 128, 256, 256), (1, 2, 1, 2, 1)),
}
