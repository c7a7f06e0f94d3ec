"""Runs the first iterations of the meta-training run behind a weight file again, and compares.

Usage: python benchmarks/reproduce_weights.py WEIGHTS --data SOURCE [--inner-text FILE] [--metrics FILE]
           [--iterations 100]

Configuration, seed and digests come from the provenance in the file. Compared are the digests of the data, the SHA-256
of theta that the run recorded after 100 iterations and, with --metrics, every meta-loss and norm that the run's
metrics.jsonl (or its first lines) has up to there. All have to agree to the bit, which takes the same versions and kind
of machine; where they do not, the differences in these are printed. Exit status 0: reproduced; 1: not; 2: cannot be
told.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from celo2_harness import load_weights
from celo2_harness.lab.metatrain import config_from, init_metatrain, load_data, metatrain
from celo2_harness.lab.metatrain.loop import DIGEST_AFTER
from celo2_harness.lab.metatrain.run import prepared
from celo2_harness.lab.training.provenance import provenance
from celo2_harness.lab.training.settings import first_difference

_MEASURES = ("meta_loss", "gradient_norm", "theta_norm")


def recorded_lines(path: Path | None, last: int) -> list[dict[str, Any]]:
    """Returns the measures in a metrics file, up to an iteration."""
    lines = [] if path is None else [json.loads(line) for line in path.read_text().splitlines()]
    return [measures(line) for line in lines if line["kind"] == "progress" and line["step"] <= last]


def measures(line: dict[str, Any]) -> dict[str, Any]:
    """Returns what has to agree in a line of metrics."""
    return {name: line[name] for name in ("step", *_MEASURES)}


def compare(options: argparse.Namespace) -> int:
    """Runs, prints what agrees, and returns the exit status."""
    facts = load_weights(options.weights).provenance
    if "data_sha256" not in facts:
        print(f"{options.weights}: no provenance of a meta-training run")
        return 2
    config, digest = config_from(facts["config"]), facts.get("theta_digest")
    last = min(options.iterations, config.iterations)
    wanted = recorded_lines(options.metrics, last)
    if not wanted and (digest is None or digest["iteration"] > last):
        print(f"{options.weights}: records no digest of theta up to iteration {last}; give --metrics of its run")
        return 2
    data = load_data(config, options.data, tuple(facts["sets"]), options.inner_text)
    for name, here in data.digests.items():
        if here != facts[name]:
            print(f"{name}: {here}, the run had {facts[name]}")
            return 1

    state = prepared(config, data, init_metatrain(config, len(data.sets)), facts["start_from"])
    # Means over as many iterations as there.
    run = metatrain(config, data, state, log_every=wanted[0]["step"] if wanted else last)
    got, theta = [], None
    for now in run:
        for line in now.lines:
            if line.get("kind") == "digest":
                theta = {"iteration": now.step, "sha256": line["theta_sha256"]}
            else:
                got.append(measures({"step": now.step, **line}))
        if now.step == last:
            break
    same = True
    if digest is not None and digest["iteration"] <= last:
        same &= theta == digest
        print(f"theta at iteration {digest['iteration']}: {'identical to the bit' if theta == digest else 'differs'}")
    if wanted:
        pairs = zip(wanted, got, strict=False)
        different = next((there["step"] for there, here in pairs if there != here), None)
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
    parser.add_argument("--metrics", type=Path, help="metrics.jsonl of the run, or its first lines")
    parser.add_argument("--iterations", type=int, default=DIGEST_AFTER)
    return compare(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
