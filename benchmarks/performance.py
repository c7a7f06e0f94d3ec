"""Measures everything that docs/research/performance.md reports, one `celo2 bench` after the other.

    python benchmarks/performance.py FOLDER

prints the tables and leaves the figures of every round in FOLDER, one JSON file per table. It takes about half an hour
on two cores; close other programs first.
"""

import subprocess
import sys
from pathlib import Path

RULES = ("--preset", "celo2_base", "celo2_ortho")

# Name of the file -> arguments of `celo2 bench`.
TABLES: dict[str, tuple[str, ...]] = {
    "step": ("step",),
    "step-bfloat16": ("step", "--state-dtype", "bfloat16", "--rounds", "5", *RULES),
    "newton-schulz": ("newton-schulz",),
    **{
        f"growth-{size}": ("step", "--model", f"blocks-{size}", "--rounds", rounds, *RULES)
        for size, rounds in (("1m", "15"), ("3m", "10"), ("25m", "5"), ("50m", "5"), ("100m", "3"))
    },
    "compile-gpt2-12": ("step", "--compile-only", "--model", "gpt2-12", *RULES),
    "compile-gpt2-48": ("step", "--compile-only", "--model", "gpt2-48", *RULES),
    "training-nano": ("training", "--model", "nano", "--rounds", "20"),
    "training-small": ("training", "--model", "small", "--batch", "8", "--rounds", "5"),
    "plan-gpt3-xl": ("plan", "--model", "gpt3-xl", *RULES),
    "plan-gpt3-xl-mesh": ("plan", "--model", "gpt3-xl", "--mesh", "fsdp=8", *RULES),
}


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, arguments in TABLES.items():
        command = [sys.executable, "-m", "celo2_harness.lab.cli.main", "bench", *arguments]
        print(f"\n$ celo2 bench {' '.join(arguments)}", flush=True)
        subprocess.run([*command, "--json", str(folder / f"{name}.json")], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
