"""Checkpoints: one file each, written whole or not at all, and checked when read.

A file is one line of JSON that says what it holds, the bytes of the arrays in that order, and the SHA-256 of all that
in hexadecimal. It holds arrays only, so that reading one runs no code.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from celo2_harness.lab.errors import InputError
from celo2_harness.lab.training.settings import refuse_difference
from celo2_harness.weights.files import replace_file

_DIGEST_BYTES = 64


def write_checkpoint(path: Path, tree: Any, facts: Mapping[str, Any]) -> None:
    """Writes a tree of arrays to a file.

    Args:
        path: The file. Its folder must exist.
        tree: The arrays, on one process. Arrays that are split over a mesh of devices are put together.
        facts: Further facts that the file states, as JSON can hold them.

    Raises:
        OSError: If the file cannot be written. A file that was there before is unchanged then.
    """
    leaves = _by_name(tree)

    def pieces() -> Iterator[bytes]:
        yield json.dumps({**facts, "leaves": {name: _describe(leaf) for name, leaf in leaves.items()}}).encode() + b"\n"
        for leaf in leaves.values():
            yield np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf).tobytes()

    def signed() -> Iterator[bytes]:
        digest = hashlib.sha256()
        for piece in pieces():
            digest.update(piece)
            yield piece
        yield digest.hexdigest().encode()

    replace_file(path, signed())


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads a file of `write_checkpoint`.

    Args:
        path: The file.

    Returns:
        The facts, and the arrays by the paths of their leaves.

    Raises:
        InputError: If the file cannot be read, is damaged, or is something else.
    """
    try:
        content = path.read_bytes()
        body = memoryview(content)[:-_DIGEST_BYTES]
        if hashlib.sha256(body).hexdigest().encode() != content[-_DIGEST_BYTES:]:
            raise ValueError("it is damaged, cut short, or no checkpoint")
        line, arrays = content.partition(b"\n")[0], {}
        facts, offset = json.loads(line), len(line) + 1
        for name, (dtype, shape) in facts.pop("leaves").items():
            array = np.frombuffer(body, jax.numpy.dtype(dtype), math.prod(shape), offset).reshape(shape)
            arrays[name], offset = array, offset + array.nbytes
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"checkpoint {path} cannot be read ({reason}); remove it to go on from the one before"
        ) from None
    return facts, arrays


def fit_to(template: Any, arrays: Mapping[str, np.ndarray], where: str) -> Any:
    """Puts the arrays of a checkpoint into a tree.

    Args:
        template: A tree with the structure, shapes and dtypes that are expected. The result lies on devices as its
            leaves do; its values are not used, so that shapes alone will do.
        arrays: The arrays, from `read_checkpoint`.
        where: The name of their source, for the message.

    Returns:
        A tree like the template.

    Raises:
        InputError: If the arrays are those of another tree; the message names the first leaf that differs.
    """
    leaves = _by_name(template)
    there = {name: f"{array.dtype}{list(array.shape)}" for name, array in arrays.items()}
    here = {name: "{}{}".format(*_describe(leaf)) for name, leaf in leaves.items()}
    refuse_difference(where, there, here)

    def place(leaf: Any, array: np.ndarray) -> Any:
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding):
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
        there = jax.numpy.array(array)
        return jax.random.wrap_key_data(there) if _is_key(leaf) else there

    return jax.tree.unflatten(
        jax.tree.structure(template), [place(leaf, arrays[name]) for name, leaf in leaves.items()]
    )


def _by_name(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _is_key(leaf: Any) -> bool:
    return jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(leaf: Any) -> tuple[str, list[int]]:
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return str(leaf.dtype), list(leaf.shape)
