"""The image tasks: a model, images, and what is asked of them."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float32

from celo2_harness._types import Params
from celo2_harness.lab.errors import check_range
from celo2_harness.lab.tasks.image_models import IMAGE_MODELS, ImageModel
from celo2_harness.lab.tasks.images import (
    FORMATS,
    VALIDATION_IMAGES,
    ImageArrays,
    ImageBatch,
    ImageFormat,
    load_images,
)


class Objective(NamedTuple):
    """The loss of a model on images, and its unit.

    Attributes:
        loss: (logits, images as stored, labels) -> the mean loss.
        unit: The unit of the loss, for example "nats per image".
    """

    loss: Callable[[Array, Array, Array], Float32[Array, ""]]
    unit: str


def _classify(logits: Array, images: Array, labels: Array) -> Float32[Array, ""]:
    del images
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels))


def _reconstruct(logits: Array, images: Array, labels: Array) -> Float32[Array, ""]:
    del labels
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), images.astype(jnp.float32) / 255.0))


OBJECTIVES = {
    "classification": Objective(_classify, "nats per image"),
    "reconstruction": Objective(_reconstruct, "nats per pixel"),
}


@dataclass(frozen=True, eq=False)
class ImageTask:
    """A model on images; a `Task`.

    The loss of "classification" is softmax cross-entropy in nats per image. That of "reconstruction" is the
    cross-entropy of each pixel's brightness in [0, 1], taken as a probability, in nats per pixel; grey pixels keep it
    above zero however good the model is, by their own entropy.

    Attributes:
        model: The configuration of the model.
        form: What the images look like.
        data: The images.
        batch_size: The number of images in a training batch.
        objective: The name of an objective in `OBJECTIVES`.

    >>> from celo2_harness.lab.tasks import make_task
    >>> task = make_task("image_mlp", "digits", batch=3)
    >>> task.batch(seed=0, step=0).images.shape, task.unit
    ((3, 8, 8, 1), 'nats per image')
    """

    model: ImageModel
    form: ImageFormat
    data: ImageArrays
    batch_size: int
    objective: str = "classification"

    def __post_init__(self):
        check_range(1, batch=self.batch_size)
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective = {self.objective!r}: expected one of {', '.join(OBJECTIVES)}")

    @property
    def tokens_per_batch(self) -> int:
        """The number of images in a training batch."""
        return self.batch_size

    @property
    def unit(self) -> str:
        """The unit of the loss, "nats per image" or "nats per pixel"."""
        return OBJECTIVES[self.objective].unit

    def describe(self) -> dict[str, Any]:
        """Returns the model, the images, the objective and the batch size."""
        return {
            "model": {"name": type(self.model).__name__, **_settings(self.model)},
            "images": {**_settings(self.form), **self.data.describe()},
            "validation_images": VALIDATION_IMAGES,
            "objective": self.objective,
            "batch": self.batch_size,
        }

    def init(self, key: jax.Array) -> Params:
        """Returns new parameters."""
        return _init(self.model, self.form, key)

    def loss(self, params: Params, batch: ImageBatch) -> Float32[Array, ""]:
        """Returns the mean loss over a batch, in `unit`."""
        # Abstract construction costs a little tracing time and no memory; the structure it yields holds no arrays.
        structure, _ = nnx.split(nnx.eval_shape(lambda: self.model.build(self.form, nnx.Rngs(params=0))))
        images, labels = jnp.asarray(batch.images), jnp.asarray(batch.labels)
        logits = nnx.merge(structure, params)(self.form.standardise(images))
        return OBJECTIVES[self.objective].loss(logits, images, labels)

    def batch(self, seed: int, step: int) -> ImageBatch:
        """Returns the training images of a step; the same for the same seed and step."""
        return self.data.sample(seed, step, self.batch_size)

    def validation(self) -> ImageBatch:
        """Returns the held-out images, the same for every seed and batch size."""
        return self.data.validation()


def _settings(config: Any) -> dict[str, Any]:
    # As JSON would give them back, so that what was written compares equal to what is asked for.
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}


@partial(jax.jit, static_argnums=(0, 1))
def _init(model: ImageModel, form: ImageFormat, key: jax.Array) -> Params:
    return nnx.state(model.build(form, nnx.Rngs(params=key)), nnx.Param)


def make_image_task(kind: str, size: str, data: Path | None, batch: int) -> ImageTask:
    """Returns an image task.

    Args:
        kind: "image_mlp", "vit", "conv" or "autoencoder".
        size: The name of the images that the model takes, "digits" or "fashion".
        data: The images, see `load_images`; None for scikit-learn's digits.
        batch: The number of images in a training batch.

    Returns:
        The task.

    Raises:
        ValueError: If there is no such size, or the data cannot be used or have another format.
    """
    sizes = IMAGE_MODELS[kind]
    if size not in sizes:
        raise ValueError(f"size = {size!r}: {kind} comes as {', '.join(sizes)}")
    objective = "reconstruction" if kind == "autoencoder" else "classification"
    return ImageTask(sizes[size], FORMATS[size], load_images(data, FORMATS[size]), batch, objective)
