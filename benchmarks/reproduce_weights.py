"""Runs the first iterations of the meta-training run behind a weight file again, and compares.

Usage: python benchmarks/reproduce_weights.py WEIGHTS --data SOURCE [--inner-text FILE] [--continue-from FILE]
           [--metrics FILE] [--iterations 100]

Configuration, seed and digests come from the provenance in the file. Compared are the digest of the data, the SHA-256
of theta that the run recorded after 100 iterations and, with --metrics, every meta-loss and norm that the run's
metrics.jsonl (or its first lines) has up to there. All have to agree to the bit, which takes the same versions and kind
of machine; where they do not, the differences in these are printed. A run that went on from a portable file needs that
file. Exit status 0: reproduced; 1: not; 2: cannot be told.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from celo2_harness import load_weights
from celo2_harness.lab.metatrain import load_portable, run_metatrain
from celo2_harness.lab.metatrain.checkpoints import config_from
from celo2_harness.lab.metatrain.run import DIGEST_AFTER, data_digest
from celo2_harness.lab.tasks import load_image_sets
from celo2_harness.lab.training.provenance import provenance
from celo2_harness.lab.training.settings import first_difference

_NUMBERS = ("iteration", "meta_loss", "gradient_norm", "theta_norm")


def recorded_lines(path: Path | None, last: int) -> list[dict[str, Any]]:
    """The lines of a metrics file, up to an iteration."""
    lines = [] if path is None else [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return [{name: line[name] for name in _NUMBERS} for line in lines if line["iteration"] <= last]


def compare(options: argparse.Namespace) -> int:
    """Runs, prints what agrees, and returns the exit status."""
    facts = load_weights(options.weights).provenance
    if "data_sha256" not in facts:
        print(f"{options.weights}: no provenance of a meta-training run")
        return 2
    config = config_from(facts["config"], options.weights)
    first, digest = facts.get("first_iteration", 0), facts.get("theta_digest")
    last = min(first + options.iterations, config.iterations)
    wanted = recorded_lines(options.metrics, last)
    if not wanted and (digest is None or digest["iteration"] > last):
        print(f"{options.weights}: records no digest of theta up to iteration {last}; give --metrics of its run")
        return 2
    if facts["continue_from"] and options.continue_from is None:
        print(f"went on from {facts['continue_from']}: give that file with --continue-from")
        return 2
    sets = tuple(facts["sets"])
    images, _ = load_image_sets(options.data, sets)
    if data_digest(images) != facts["data_sha256"]:
        print(f"data: SHA-256 {data_digest(images)}, the run had {facts['data_sha256']}")
        return 1

    got: list[dict[str, Any]] = []
    done = first
    # Means over as many iterations as there.
    every = wanted[0]["iteration"] - first if wanted else options.iterations

    def stop() -> bool:
        nonlocal done
        done += 1
        return done >= last

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        run_metatrain(
            config,
            options.data,
            out,
            sets=sets,
            inner_text=options.inner_text,
            start_from=None if facts["continue_from"] else facts["start_from"],
            continue_from=options.continue_from,
            checkpoint_every=options.iterations,
            log_every=every,
            on_log=lambda line: got.append({name: line[name] for name in _NUMBERS}),
            stop=stop,
        )
        here = load_portable(out / "portable.msgpack").header
    same = True
    if "text_sha256" in facts and here["text_sha256"] != facts["text_sha256"]:
        print(f"text: SHA-256 {here['text_sha256']}, the run had {facts['text_sha256']}")
        same = False
    if digest is not None and digest["iteration"] <= last:
        agrees = here.get("theta_digest") == digest
        same &= agrees
        print(f"theta at iteration {digest['iteration']}: {'identical to the bit' if agrees else 'differs'}")
    if wanted:
        pairs = zip(wanted, got, strict=False)
        different = next((there["iteration"] for there, line in pairs if there != line), None)
        agrees = different is None and len(got) >= len(wanted)
        same &= agrees
        told = "identical to the bit" if agrees else f"first difference at iteration {different}"
        print(f"meta-losses and norms of {len(wanted)} lines of metrics: {told}")
    if not same:
        there = {name: facts[name] for name in ("versions", "device")}
        difference = first_difference(there, {name: provenance()[name] for name in there})
        print("the versions and the device are those of the run" if difference is None else
              "other than in the run: {} = {}, here {}".format(*difference))  # fmt: skip
    return 0 if same else 1


def main() -> int:
    """Reads the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="a weight file, or a bundled name")
    parser.add_argument("--data", required=True, help="as for celo2 metatrain")
    parser.add_argument("--inner-text", help="the text of the run, if it was not the default")
    parser.add_argument("--continue-from", help="the portable file that the run went on from")
    parser.add_argument("--metrics", type=Path, help="metrics.jsonl of the run, or its first lines")
    parser.add_argument("--iterations", type=int, default=DIGEST_AFTER)
    return compare(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
