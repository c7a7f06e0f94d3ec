"""Where a result comes from: package versions, the device, the commit."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

_PACKAGES = {"jax": "jax", "jaxlib": "jaxlib", "optax": "optax", "flax": "flax", "celo2_harness": "celo2-harness"}


def provenance() -> dict[str, Any]:
    """Returns what a result depends on besides its settings.

    Returns:
        The package versions, the device, and the commit if the package is run from a checkout.
    """
    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version()} | {name: version(dist) for name, dist in _PACKAGES.items()},
        "device": f"{device.device_kind} ({device.platform})",
        "commit": git_commit(),
    }


def git_commit(folder: Path = Path(__file__).parents[2]) -> str | None:
    """Returns the git commit of the files in a folder.

    Args:
        folder: The folder; by default that of this package.

    Returns:
        The hexadecimal name, followed by "+changes" if the files differ from the commit. None outside a checkout,
        without git, and for files that the checkout does not track.
    """

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "--", ".") is None:
        return None
    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
    return commit and commit + ("+changes" if changed else "")
