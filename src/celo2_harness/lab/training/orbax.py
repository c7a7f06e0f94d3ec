"""Checkpoints of a run, kept by Orbax: written whole or not at all, the last few kept."""

import json
import logging
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from celo2_harness.lab.errors import InputError
from celo2_harness.lab.training.loop import TrainState
from celo2_harness.lab.training.settings import first_difference

KEEP = 3
"""How many checkpoints a run folder keeps."""
# Written into a checkpoint last: the checksums of its files.
_FILES = "celo2-files.json"


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
        return sorted(
            int(path.parent.name) for path in self._folder.glob(f"*/{_FILES}") if path.parent.name.isdecimal()
        )

    def save(self, state: TrainState, settings: Mapping[str, Any]) -> None:
        """Writes a checkpoint and returns when it is on the disk.

        Args:
            state: What to save. Saving a step that is there already does nothing.
            settings: What determines the numbers of the run, as JSON can hold it.

        Raises:
            OSError: if it cannot be written, on a full disk for instance. Those before are whole.
        """
        import orbax.checkpoint as ocp

        if state.step in self.steps():
            return
        leaves = _named_leaves(state)
        meta = {"settings": settings, "leaves": {name: _describe(leaf) for name, leaf in leaves.items()}}
        args = ocp.args.Composite(state=ocp.args.StandardSave(leaves), meta=ocp.args.JsonSave(meta))
        place = self._folder / str(state.step)
        try:
            with _quiet():
                self._manager().save(state.step, args=args)
        except OSError:
            raise
        except Exception as error:  # TensorStore has a ValueError for a full disk.
            raise OSError(f"checkpoint {place}: {_reason(error)}") from error
        new = place / f"{_FILES}.new"
        new.write_text(json.dumps(_checksums(place)), encoding="utf-8")
        new.rename(place / _FILES)

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

        place = self._folder / str(step)
        leaves = _named_leaves(template)
        try:
            # Orbax notices files that are cut short, but not every changed byte, and it fails noisily.
            saved, now = json.loads((place / _FILES).read_text(encoding="utf-8")), _checksums(place)
            for name in sorted({*saved, *now}):
                if saved.get(name) != now.get(name):
                    raise ValueError(f"{name} is not as it was saved")
            meta = self._manager().restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            there = meta["settings"], meta["leaves"]
        except Exception as error:  # Orbax, TensorStore and JSON each raise their own.
            raise _unreadable(place, error) from None
        refuse_difference(f"checkpoint {place}", there[0], settings)
        refuse_difference(f"checkpoint {place}", there[1], {name: _describe(leaf) for name, leaf in leaves.items()})
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), leaves)
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
            restored = self._manager().restore(step, args=args)["state"]
        except Exception as error:
            raise _unreadable(place, error) from None
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
    difference = first_difference(there, here)
    if difference:
        name, old, new = difference
        raise InputError(
            f"{where} is of another run: {name} is {old} there and {new} here; use the same settings or another folder"
        )


def _named_leaves(state: TrainState) -> dict[str, Any]:
    tree = (state.params, state.opt_state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _checksums(place: Path) -> dict[str, int]:
    """The CRC-32 of every file of a checkpoint but the list itself."""
    checksums = {}
    for path in sorted(place.rglob("*")):
        if path.is_file() and not path.name.startswith(_FILES):
            with path.open("rb") as file:
                checksum = 0
                while block := file.read(1 << 24):
                    checksum = zlib.crc32(block, checksum)
            checksums[path.relative_to(place).as_posix()] = checksum
    return checksums


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax from printing tracebacks of what is raised anyway."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _reason(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 200 else f"{line[:80]} ... {line[-100:]}"  # TensorStore has the cause at the end


def _unreadable(place: Path, error: Exception) -> InputError:
    return InputError(f"checkpoint {place} cannot be read ({_reason(error)}); remove it to resume from the one before")
