"""What all tests share: hypothesis without randomness, a key whose seed a failure shows, the reference material."""

import os
import subprocess
import zlib
from pathlib import Path

# Tests are the files of tests/ and the examples in docstrings of src/. Most of their time is compilation. Workers,
# processes that tests start, and later runs share what was compiled; the folder may be deleted at any time.
ENVIRONMENT = {
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parent / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    # Decompositions of small matrices wait for each other's threads where workers share the cores, 100 times as long.
    "OPENBLAS_NUM_THREADS": "1",
}
for variable, setting in ENVIRONMENT.items():
    os.environ.setdefault(variable, setting)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=25)
hypothesis.settings.load_profile("repeatable")

# A program for type checkers, mistakes included: read by a test, not imported.
collect_ignore = ["tests/downstream"]

# Starts JAX with one device, before a test of `celo2 metatrain` makes a device of every core.
jax.devices()


# Models written with implicit rank promotion, which strict projects forbid.
PROMOTING = {
    "lab",
    "test_benchmarks.py",
    "test_convergence.py",
    "test_docs.py",
    "test_examples.py",
    "test_models.py",
    "test_plugins.py",
}
# Compared with numbers that optimised programs made, or measured: these compile as users do.
OPTIMISED = {
    "sharding",
    "test_bench.py",
    "test_convergence.py",
    "test_golden.py",
}


@pytest.fixture(autouse=True)
def rank_promotion(request):
    """Implicit rank promotion is an error, wherever the code is the package's core."""
    with jax.numpy_rank_promotion("allow" if PROMOTING & set(request.path.parts) else "raise"):
        yield


@pytest.fixture(scope="module", autouse=True)
def compilation(request):
    """Most tests run a step or two, so compiling well costs more than it saves; processes that they start do alike."""
    before = jax.config.read("jax_disable_most_optimizations")
    quick = not OPTIMISED & set(request.path.parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(quick)))
        jax.config.update("jax_disable_most_optimizations", quick)
        yield
    jax.config.update("jax_disable_most_optimizations", before)


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
    folder = Path(os.environ.get("CELO2_SHARED") or Path(__file__).parents[1] / "shared")
    if not folder.is_dir():
        pytest.skip(f"no reference material at {folder}; set CELO2_SHARED")
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    except OSError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"cannot mount a file system: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)
