"""Gives the package thousands of pieces of broken input and counts what comes of them.

Usage: python benchmarks/fuzz.py [--examples 1000] [--seed 0] [--only PART] [--seconds 30] [--json FILE]

Every piece ends in an error of the package's own or in a right result; the first one that does not is printed with
what drew it, and so is one that takes longer than `--seconds`. The kinds are those of `tests/fuzz_cases.py`; the ones
that parse options or trace optimizers get a tenth of the examples.
"""

import argparse
import collections
import json
import signal
import sys
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fuzz_cases import CASES  # noqa: E402

COSTLY = ("parameter trees", "command lines", "bytes of training checkpoints", "recipes of meta-training")


def main() -> None:
    """Runs all kinds and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--seconds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    counts: dict[str, dict[str, int]] = {}
    if options.json and options.json.exists():
        counts = json.loads(options.json.read_text())
    for name in CASES:
        if options.only in name:
            examples = options.examples // 10 if name in COSTLY else options.examples
            counts[name] = fuzz(name, examples, options.seed, options.seconds)
            print(f"{name}: {', '.join(f'{n} {outcome}' for outcome, n in counts[name].items())}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(counts, indent=2) + "\n")
    total = sum(sum(kind.values()) for kind in counts.values())
    print(f"{total} pieces of broken input: each refused by an error of the package's own, or used rightly")


def fuzz(name: str, examples: int, number: int, seconds: int) -> dict[str, int]:
    """Counts of outcomes of one kind."""
    outcomes: collections.Counter[str] = collections.Counter()

    def hangs(*_: object) -> None:
        raise TimeoutError(f"{name}: more than {seconds} s")

    signal.signal(signal.SIGALRM, hangs)
    with tempfile.TemporaryDirectory() as folder:

        @seed(number)
        @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(data=st.data())
        def run(data: st.DataObject) -> None:
            signal.alarm(seconds)
            try:
                outcomes[CASES[name](data, Path(folder))] += 1
            finally:
                signal.alarm(0)

        run()
    return dict(sorted(outcomes.items()))


if __name__ == "__main__":
    main()
