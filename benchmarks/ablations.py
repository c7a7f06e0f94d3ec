"""Meta-trains Celo2 with one part changed at a time, each on one small budget, and makes a suite of the results.

Usage: python benchmarks/ablations.py DATA [--only NAME ...] [--out meta-training/ablations]
       celo2 evaluate meta-training/ablations/ablations.toml --data language_model=tinyshakespeare.txt

DATA is a folder of 8x8 image sets, as `celo2 metatrain --data` takes it. A variant whose weights are there is not
trained again, and one that was stopped goes on. A new variant is a row of `VARIANTS`. On one core of a small machine a
variant takes 6 minutes, `hidden_16` 12. The second command is to be given in the repository's root, because one
optimizer of the suite is `make` of this file.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import optax

from celo2_harness import harness
from celo2_harness.cli.main import main as celo2
from celo2_harness.presets import Group, Preset, find_preset

BUDGET = "--iterations 1400 --outer-learning-rate 2e-3 --outer-schedule cosine --seed 0 --devices 1"
# What is changed, as options of `celo2 metatrain`, and the preset that the weights are for.
VARIANTS = {
    "per_step": ("", "celo2_ortho"),
    "none": ("--normalization none", "celo2_ortho"),
    "rolling": ("--normalization rolling", "celo2_ortho"),
    "clip": ("--normalization clip", "celo2_ortho"),
    "unaugmented": ("--augmentation 1", "celo2_ortho"),
    "hidden_4": ("--hidden 4", "celo2_ortho"),
    "hidden_16": ("--hidden 16", "celo2_ortho"),
    "decay_0.999": ("--second-moment-decay 0.999", "celo2_ortho"),
    "base": ("--variant base", "celo2_base"),
}
SUITE = """name = "ablations"
description = "Celo2 with one part changed at a time, each meta-trained for 1,400 iterations; nano GPT, 500 steps"
baseline = "per_step"
rival = "per_step"

[[tasks]]
name = "language_model"
size = "nano"
batch = 16
steps = 500
eval_every = 25

[search]
learning_rates = [3e-4, 1e-3, 3e-3]
weight_decays = [0.1]
selection_seeds = [0]
report_seeds = [1, 2]
"""
NEWTON_SCHULZ_ONLY = """
[[optimizers]]
label = "per_step, the rule for the rest too"
make = "benchmarks.ablations:make"
options = {weights = "meta-training/ablations/per_step.celo2"}
"""


def make(learning_rate: Any, weight_decay: float, total_steps: int, weights: str) -> optax.GradientTransformation:
    """Celo2 with Newton-Schulz on hidden matrices, and without it, in place of AdamW, on everything else."""
    del total_steps  # the schedule knows it
    hidden = find_preset("celo2_ortho").hidden
    rest = Group("celo2", find_preset("celo2_base").hidden.direction)
    preset = Preset("celo2_newton_schulz", "Celo2 for all leaves, Newton-Schulz on hidden matrices", hidden, rest, 1e-3)
    return harness.build(preset=preset, learning_rate=learning_rate, weight_decay=weight_decay, weights=weights)


def main() -> int:
    """Trains what is missing, and writes the suite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("meta-training/ablations"))
    options = parser.parse_args()
    for name in options.only:
        run, file = options.out / "runs" / name, options.out / f"{name}.celo2"
        if file.exists():
            continue
        begun = (run / "metrics.jsonl").exists()
        words = ["--resume"] if begun else ["--data", options.data, *BUDGET.split(), *VARIANTS[name][0].split()]
        print(f"{name}: celo2 metatrain {' '.join(words)}")
        if status := celo2(["metatrain", "--out", str(run), *words]):
            return status
        shutil.copy(run / "weights.celo2", file)
    there = [name for name in VARIANTS if (options.out / f"{name}.celo2").exists()]
    lines = [
        f'\n[[optimizers]]\nlabel = "{name}"\npreset = "{VARIANTS[name][1]}"\nweights = "{name}.celo2"\n'
        for name in there
    ]
    (options.out / "ablations.toml").write_text(SUITE + "".join(lines) + NEWTON_SCHULZ_ONLY)
    print(f"suite: {options.out / 'ablations.toml'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
