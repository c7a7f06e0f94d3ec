"""The tasks of a run, and the data that they sample from."""

from typing import NamedTuple

from jaxtyping import Array, UInt8

from celo2_harness.lab.metatrain.config import MetaTrainConfig
from celo2_harness.lab.metatrain.inner import image_groups
from celo2_harness.lab.metatrain.problem import TaskGroup
from celo2_harness.lab.metatrain.text import TextProblem
from celo2_harness.lab.tasks import ImageSets

TEXT_SET = "text"
"""What the text is called beside the names of image sets."""


class InnerData(NamedTuple):
    """Image sets and a text, for runs with `text_tasks`; the text as `text_classes` gives it."""

    images: ImageSets
    text: UInt8[Array, " bytes"]


def run_groups(config: MetaTrainConfig, sets: int) -> tuple[TaskGroup, ...]:
    """The tasks of a run on so many image sets; those on text, if any, count as one more set, after the others."""
    images = image_groups(config, sets)
    if not config.text_tasks:
        return images
    first = sets * config.tasks_per_set
    tasks = tuple(range(first, first + config.text_tasks))
    text = TaskGroup(TextProblem(config), tasks, (sets,) * config.text_tasks, part="text")
    return (*(group._replace(part="images") for group in images), text)


def image_sets_of(config: MetaTrainConfig, data: ImageSets | InnerData) -> int:
    """How many image sets the data of a run hold.

    Raises:
      ValueError: a run with text has data without one, or the other way round.
    """
    if bool(config.text_tasks) != isinstance(data, InnerData):
        needed = "InnerData(images, text)" if config.text_tasks else "ImageSets"
        raise ValueError(f"data: text_tasks = {config.text_tasks} needs {needed}, got {type(data).__name__}.")
    return (data.images if isinstance(data, InnerData) else data).starts.shape[0]
