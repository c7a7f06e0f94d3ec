"""What all tests share: hypothesis without randomness, a key whose seed a failure shows, the reference material."""

import os
import zlib
from pathlib import Path

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=25)
hypothesis.settings.load_profile("repeatable")

# A program for type checkers, mistakes included: read by a test, not imported.
collect_ignore = ["downstream"]

# Starts JAX with one device, before a test of `celo2 metatrain` makes a device of every core.
jax.devices()


@pytest.fixture
def seed(request):
    """A number of the test's own; a failing test shows it among its fixtures."""
    return zlib.crc32(request.node.nodeid.encode()) % 2**31


@pytest.fixture
def key(seed):
    print(f"seed {seed}")  # captured; shown when the test fails
    return jax.random.key(seed)


@pytest.fixture(scope="session")
def shared():
    """Reference material that is not part of the repository, beside the checkout or where CELO2_SHARED says."""
    folder = Path(os.environ.get("CELO2_SHARED") or Path(__file__).parents[2] / "shared")
    if not folder.is_dir():
        pytest.skip(f"no reference material at {folder}; set CELO2_SHARED")
    return folder
