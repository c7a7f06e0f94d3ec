"""`celo2 data prepare`: image sets as small files for meta-training."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from celo2_harness.lab.errors import input_errors
from celo2_harness.lab.tasks import prepare_image_sets


@dataclass(frozen=True)
class Config:
    """Shrink image sets to 8x8 grey NAME_8x8.npz files, which --data of celo2 metatrain takes.

    Pixels become exact area means.
    """

    source: tyro.conf.Positional[str]
    """A folder of IDX images, a folder of npz files, or digits."""
    out: Path = Path("images")
    """Folder of the files; made where missing."""


def run(config: Config) -> int:
    """Writes the files; returns 0."""

    def show(path: Path, counts: dict[str, int]) -> None:
        print(f"{path}: {', '.join(f'{count:,} {part}' for part, count in counts.items())}", flush=True)

    with input_errors():
        prepare_image_sets(config.source, config.out, show)
    return 0
