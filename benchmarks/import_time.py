"""How long `import celo2_harness` takes, beside `import optax`, each in new processes, in turns.

    python benchmarks/import_time.py [--repeats 7]

Prints medians in seconds, and their difference, which is what this package adds to a program that uses Optax anyway.
"""

import argparse
import statistics
import subprocess
import sys

PROGRAM = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
MODULES = ("optax", "celo2_harness")
LIMIT = 0.3


def seconds(module: str) -> float:
    """Time of one import in a process of its own, without the start of Python."""
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(module)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    for module in MODULES:
        seconds(module)  # bytecode is written, files are in memory
    taken = {module: [] for module in MODULES}
    for _ in range(repeats):
        for module in MODULES:
            taken[module].append(seconds(module))
    for module, times in taken.items():
        print(f"{module:14} {statistics.median(times):.3f} s  ({min(times):.3f} to {max(times):.3f})")
    added = statistics.median(taken["celo2_harness"]) - statistics.median(taken["optax"])
    print(f"{'added':14} {added:.3f} s  (limit {LIMIT})")
    sys.exit(added > LIMIT)


if __name__ == "__main__":
    main()
