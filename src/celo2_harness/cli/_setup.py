"""From options to a task and an optimizer, with errors fit to print."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optax

from celo2_harness import harness
from celo2_harness.evaluate import InputError
from celo2_harness.tasks import MODELS, LanguageModel, default_text, read_text


@contextmanager
def input_errors() -> Iterator[None]:
    """Turns the error of a wrong argument or a missing extra into an `InputError`, whose message is shown as it is."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(str(error)) from error


def make_task(
    text: Path | None, model: str, context: int | None, batch: int, dtype: str, param_dtype: str
) -> LanguageModel:
    """Returns the language-model task that the options describe.

    Args:
        text: A text file, or None for the text that Python carries.
        model: A name in `MODELS`.
        context: Window length in bytes, or None for the model's.
        batch: Windows per batch.
        dtype: What to compute in.
        param_dtype: What to keep the parameters in.

    Returns:
        The task.

    Raises:
        InputError: if an option is wrong.
    """
    if model not in MODELS:
        raise InputError(f"model = {model!r}: expected one of {', '.join(MODELS)}")
    with input_errors():
        config = MODELS[model]
        config = dataclasses.replace(
            config, context=config.context if context is None else context, dtype=dtype, param_dtype=param_dtype
        )
        return LanguageModel(
            config, default_text(config.context) if text is None else read_text(text, config.context), batch
        )


def default_learning_rate(preset: str) -> float:
    """Returns the learning rate that a preset is used with where none is given.

    Args:
        preset: The name of a preset.

    Returns:
        Its learning rate.

    Raises:
        InputError: if there is no such preset.
    """
    presets = harness.presets()
    if preset not in presets:
        raise InputError(f"preset = {preset!r}: expected one of {', '.join(presets)}")
    return float(presets[preset].learning_rate)


def make_optimizer(**arguments: Any) -> optax.GradientTransformation:
    """Returns `harness.build(**arguments)`.

    Args:
        **arguments: Of `harness.build`.

    Returns:
        The optimizer.

    Raises:
        InputError: if an argument is wrong.
    """
    if arguments["learning_rate"] <= 0:
        raise InputError(f"learning_rate = {arguments['learning_rate']}: expected a number above 0")
    if arguments["total_steps"] < 1:
        raise InputError(f"steps = {arguments['total_steps']}: expected at least 1")
    with input_errors():
        return harness.build(**arguments)


def describe_task(task: LanguageModel) -> dict[str, Any]:
    """Returns what determines a task, as JSON can hold it.

    Args:
        task: The task.

    Returns:
        The sizes of the model, the text and its digest, and the batch size.
    """
    return {
        "model": dataclasses.asdict(task.config),
        "text": {"sha256": task.text.digest, "bytes": len(task.text.train) + len(task.text.held_out)},
        "batch": task.batch_size,
    }
