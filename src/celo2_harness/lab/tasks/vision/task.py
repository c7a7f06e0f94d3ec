"""The image tasks: a model, images, and what is asked of them."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float32

from celo2_harness._types import Params
from celo2_harness.lab.tasks.vision.autoencoder import AUTOENCODERS
from celo2_harness.lab.tasks.vision.conv import CONV_NETS
from celo2_harness.lab.tasks.vision.data import VALIDATION_IMAGES, ImageBatch, ImageData, ImageFormat
from celo2_harness.lab.tasks.vision.formats import FORMATS
from celo2_harness.lab.tasks.vision.mlp import IMAGE_MLPS
from celo2_harness.lab.tasks.vision.sources import load_images
from celo2_harness.lab.tasks.vision.vit import VITS


@runtime_checkable
class ImageModel(Protocol):
    """The configuration of a model on images: a frozen dataclass that builds it."""

    def build(self, form: ImageFormat, rngs: nnx.Rngs) -> nnx.Module:
        """Returns a new model, from standardised images to logits."""
        ...


class Objective(NamedTuple):
    """What a model on images is asked for.

    Attributes:
        loss: (logits, images as stored, labels) -> the mean loss.
        unit: What it is counted in.
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
        batch_size: Images per training batch.
        objective: Out of `OBJECTIVES`.

    >>> from celo2_harness.lab.tasks import make_task
    >>> task = make_task("image_mlp", "digits", batch=3)
    >>> task.batch(seed=0, step=0).images.shape, task.unit
    ((3, 8, 8, 1), 'nats per image')
    """

    model: ImageModel
    form: ImageFormat
    data: ImageData
    batch_size: int
    objective: str = "classification"

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch = {self.batch_size}: expected at least 1")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective = {self.objective!r}: expected one of {', '.join(OBJECTIVES)}")

    @property
    def tokens_per_batch(self) -> int:
        """How many images one batch holds."""
        return self.batch_size

    @property
    def unit(self) -> str:
        """Of the loss."""
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


class ImageSize(NamedTuple):
    """A size of an image task.

    Attributes:
        model: The model.
        form: The images it takes, by name.
    """

    model: ImageModel
    form: str


def _sizes(models: Mapping[str, ImageModel]) -> dict[str, ImageSize]:
    # A size goes by the name of its images, "fashion-deep" too, except where a model has a name of its own.
    named = {"vit-s16": "imagenet"}
    return {size: ImageSize(model, named.get(size, size.partition("-")[0])) for size, model in models.items()}


_MODELS = {
    "image_mlp": _sizes(IMAGE_MLPS),
    "vit": _sizes(VITS),
    "conv": _sizes(CONV_NETS),
    "autoencoder": _sizes(AUTOENCODERS),
}


def make_image_task(kind: str, size: str, data: Path | None, batch: int) -> ImageTask:
    """Returns an image task.

    Args:
        kind: "image_mlp", "vit", "conv" or "autoencoder".
        size: The name of the model and of the images it takes.
        data: See `load_images`; None for scikit-learn's digits.
        batch: Images per batch.

    Returns:
        The task.

    Raises:
        ValueError: if there is no such size, or the data cannot be used or have another format.
    """
    sizes = _MODELS[kind]
    if size not in sizes:
        raise ValueError(f"size = {size!r}: {kind} comes as {', '.join(sizes)}")
    model, name = sizes[size]
    objective = "reconstruction" if kind == "autoencoder" else "classification"
    return ImageTask(model, FORMATS[name], load_images(data, FORMATS[name]), batch, objective)
