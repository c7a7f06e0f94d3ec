"""Meta-trains Celo2 with one part changed at a time, each on one small budget, and makes a suite of the results.

Usage: python benchmarks/ablations.py DATA [--only NAME ...] [--out meta-training/ablations]
       celo2 evaluate meta-training/ablations/ablations.toml --data language_model=tinyshakespeare.txt

DATA is a folder of 8x8 image sets, as `celo2 metatrain --data` takes it. A variant whose weights are there is not
trained again, and one that was stopped goes on. A new variant is a row of `VARIANTS`. On one core of a small machine a
variant takes 6 minutes. The second command is to be given in the repository's root, because one
optimizer of the suite is `make` of this file.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import optax

from celo2_harness import harness
from celo2_harness.lab.cli.main import main as celo2
from celo2_harness.presets import Group, Preset, find_preset

BUDGET = "--iterations 1400 --outer-learning-rate 2e-3 --outer-schedule cosine --seed 0 --devices 1"


class Variant(NamedTuple):
    """What is changed: in words, as options of `celo2 metatrain`, and as lines of the suite."""

    label: str
    options: str = ""
    lines: str = 'preset = "celo2_ortho"'


# What Newton-Schulz returns has an RMS of about 0.1 in these matrices. Where nothing scales that to one, rates have to
# be ten times as large, and AdamW's, for embeddings and vectors, as before.
UNSCALED = """preset = "celo2_ortho"
learning_rates = [3e-2, 1e-1, 3e-1]
options = {rest_learning_rate_factor = 2.0}"""
VARIANTS = {
    "default": Variant("default"),
    "none": Variant("no output normalisation", "--normalization none", UNSCALED),
    "rolling": Variant("rolling RMS", "--normalization rolling"),
    "clip": Variant("clipped RMS", "--normalization clip", UNSCALED),
    "unaugmented": Variant("no task augmentation", "--augmentation 1"),
    "hidden_4": Variant("4 hidden units", "--hidden 4"),
    "hidden_16": Variant("16 hidden units", "--hidden 16"),
    "decay_0.999": Variant("second-moment decay 0.999", "--second-moment-decay 0.999"),
    "base": Variant("no Newton-Schulz, no AdamW", "--variant base", 'preset = "celo2_base"'),
}
SUITE = """name = "ablations"
description = "Celo2 with one part changed at a time, each meta-trained for 1,400 iterations; nano GPT, 300 steps"
baseline = "default"
reference = "default"

[[tasks]]
name = "language_model"
size = "nano"
batch = 16
steps = 300
eval_every = 25
label = "ablations"

[search]
learning_rates = [1e-3, 3e-3, 1e-2]
weight_decays = [0.1]
selection_seeds = [0]
report_seeds = [1, 2]
"""
NO_ADAMW = """
[[optimizers]]
label = "no AdamW"
make = "benchmarks.ablations:make"
options = {weights = "meta-training/ablations/default.celo2"}
"""


def make(learning_rate: Any, weight_decay: float, total_steps: int, weights: str) -> optax.GradientTransformation:
    """Celo2 with Newton-Schulz on hidden matrices, and without it, in place of AdamW, on everything else."""
    del total_steps  # the schedule knows it
    hidden = find_preset("celo2_ortho").hidden
    rest = Group("celo2", find_preset("celo2_base").hidden.direction)
    preset = Preset("celo2_without_adamw", "Celo2 for all leaves", hidden, rest, learning_rate=1e-3, weights="celo2")
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
        words = ["--resume"] if begun else ["--data", options.data, *BUDGET.split(), *VARIANTS[name].options.split()]
        print(f"{name}: celo2 metatrain {' '.join(words)}")
        if status := celo2(["metatrain", "--out", str(run), *words]):
            return status
        shutil.copy(run / "weights.celo2", file)
    lines = [
        f'\n[[optimizers]]\nlabel = "{variant.label}"\nweights = "{name}.celo2"\n{variant.lines}\n'
        for name, variant in VARIANTS.items()
    ]
    (options.out / "ablations.toml").write_text(SUITE + "".join(lines) + NO_ADAMW)
    print(f"suite: {options.out / 'ablations.toml'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
