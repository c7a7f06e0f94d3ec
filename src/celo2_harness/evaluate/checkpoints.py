"""Checkpoints of a run, kept by Orbax: written whole or not at all, the last few kept."""

import gc
import logging
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from celo2_harness.evaluate.errors import InputError
from celo2_harness.evaluate.loop import TrainState

KEEP = 3
"""How many checkpoints a run folder keeps."""


class Checkpoints:
    """The checkpoints in a folder.

    Each holds the parameters and the optimizer's state, leaf by leaf under their paths, and the settings of the run.

    Args:
        folder: Where they are; made by the first save.
    """

    def __init__(self, folder: Path):
        self._folder = folder.absolute()
        self._open_manager = None

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, in rising order."""
        return sorted(self._manager().all_steps()) if self._folder.is_dir() else []

    def save(self, state: TrainState, settings: Mapping[str, Any]) -> None:
        """Writes a checkpoint and returns when it is on the disk.

        Args:
            state: What to save. Saving a step that is there already does nothing.
            settings: What determines the numbers of the run, as JSON can hold it.
        """
        import orbax.checkpoint as ocp

        if state.step in self.steps():
            return
        leaves = _named_leaves(state)
        meta = {
            "settings": settings,
            "leaves": {name: _describe(leaf) for name, leaf in leaves.items()},
            # Orbax notices files that are cut short, but not every changed byte.
            "checksums": {name: _checksum(leaf) for name, leaf in leaves.items()},
        }
        self._manager().save(
            state.step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(leaves), meta=ocp.args.JsonSave(meta)),
        )

    def restore(self, step: int, template: TrainState, settings: Mapping[str, Any]) -> TrainState:
        """Reads a checkpoint back.

        Args:
            step: One of `steps()`.
            template: A state of the run that continues, for its structure, shapes and dtypes; its values are not used.
            settings: The settings of the run that continues.

        Returns:
            The saved state.

        Raises:
            InputError: if the checkpoint is of a run with other settings or other parameters, or cannot be read.
        """
        import orbax.checkpoint as ocp

        def read(**items: Any) -> Any:
            return _read(place, lambda: self._manager().restore(step, args=ocp.args.Composite(**items)))

        place = self._folder / str(step)
        leaves = _named_leaves(template)
        meta = read(meta=ocp.args.JsonRestore())["meta"]
        if not isinstance(meta, dict) or {"settings", "leaves", "checksums"} - set(meta):
            raise InputError(f"checkpoint {place} was not written by celo2-harness")
        refuse_difference(f"checkpoint {place}", meta["settings"], settings)
        refuse_difference(
            f"checkpoint {place}", meta["leaves"], {name: _describe(leaf) for name, leaf in leaves.items()}
        )
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), leaves)
        restored = read(state=ocp.args.StandardRestore(target))["state"]
        for name, leaf in restored.items():
            if _checksum(leaf) != meta["checksums"][name]:
                raise _unreadable(place, f"{name} does not have the checksum that it was saved with")
        structure = jax.tree.structure((template.params, template.opt_state))
        params, opt_state = jax.tree.unflatten(structure, [restored[name] for name in leaves])
        return TrainState(step, params, opt_state)

    def close(self) -> None:
        """Lets go of the folder."""
        if self._open_manager is not None:
            self._open_manager.close()
            self._open_manager = None

    def _manager(self):
        import orbax.checkpoint as ocp

        if self._open_manager is None:
            # Not asynchronous: the next step is given the arrays that would still be on their way to the disk.
            options = ocp.CheckpointManagerOptions(max_to_keep=KEEP, enable_async_checkpointing=False)
            self._open_manager = ocp.CheckpointManager(self._folder, options=options)
        return self._open_manager


def refuse_difference(where: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuses to continue a run with other settings.

    Args:
        where: What holds the saved settings, for the message.
        there: The saved settings, possibly nested.
        here: The settings of now.

    Raises:
        InputError: naming the first setting that differs.

    >>> refuse_difference("the run", {"model": {"width": 8}}, {"model": {"width": 8}})
    """
    difference = _first_difference(there, here)
    if difference:
        name, old, new = difference
        raise InputError(
            f"{where} is of another run: {name} is {old} there and {new} here; use the same settings or another folder"
        )


def _first_difference(there: Mapping[str, Any], here: Mapping[str, Any], path: str = "") -> tuple[str, Any, Any] | None:
    for name in [*there, *(name for name in here if name not in there)]:
        old, new = there.get(name, "absent"), here.get(name, "absent")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            inner = _first_difference(old, new, f"{path}{name}.")
            if inner:
                return inner
        elif old != new:
            return f"{path}{name}", old, new
    return None


def _named_leaves(state: TrainState) -> dict[str, Any]:
    tree = (state.params, state.opt_state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _checksum(leaf: Any) -> int:
    return zlib.crc32(np.asarray(leaf).reshape(-1).view(np.uint8))


def _read(place: Path, restore: Callable[[], Any]) -> Any:
    try:
        return restore()
    except Exception as error:  # Orbax, TensorStore and JSON each raise their own.
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0][:200]}"
    # Orbax reads all leaves at once and raises the first error. The others would be printed with their tracebacks when
    # their tasks are collected, whenever that is; so collect them here, where nobody listens.
    logger = logging.getLogger("asyncio")
    logger.disabled, disabled = True, logger.disabled
    try:
        gc.collect()
    finally:
        logger.disabled = disabled
    raise _unreadable(place, reason)


def _unreadable(place: Path, reason: str) -> InputError:
    return InputError(f"checkpoint {place} cannot be read ({reason}); remove it to resume from the one before")
