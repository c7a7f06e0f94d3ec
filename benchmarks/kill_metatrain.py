"""Kills a meta-training run at random moments, resumes it, and compares theta with a run that was left alone.

Usage: python benchmarks/kill_metatrain.py [--minutes 5] [--kills 1000] [--seed 0]

A run of a small configuration writes a checkpoint every iteration, so that many kills fall into a write. Each process
is killed with SIGKILL: some while it starts, most while it trains. When a run gets to its end, its theta and its
meta-losses must have the bits of the run that nobody killed; then the next run begins.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from celo2_harness import load_weights
from celo2_harness.metatrain import load_portable

ITERATIONS = 400
OPTIONS = f"""
    --variant base --features gradient momentum --momentum-decays 0.9 --factored-decays 0.9 --hidden 2 --widths 64 10
    --batch 4 --tasks-per-set 2 --truncation 5 --shortest-unroll 5 --longest-unroll 20 --outer-learning-rate 1e-2
    --iterations {ITERATIONS} --checkpoint-every 1 --log-every 1
"""


def start(data: Path, out: Path) -> subprocess.Popen:
    """A process that starts the run in a folder, or resumes it where there is one."""
    words = ["--resume"] if (out / "metrics.jsonl").exists() else ["--data", str(data), *OPTIONS.split()]
    # Compiled programs are kept, so that a process is soon at work; they are the same programs.
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(data / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-m", "celo2_harness.cli.main", "metatrain", "--out", str(out), *words]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen) -> None:
    """Waits for a process that must succeed."""
    _, error = process.communicate()
    if process.returncode:
        raise SystemExit(f"a run ended with status {process.returncode}: {error}")


def iteration(out: Path) -> int:
    """Of the newest checkpoint."""
    return max((int(path.stem) for path in (out / "checkpoints").glob("*.msgpack")), default=-1)


def meta_losses(out: Path) -> list:
    """Of all lines of metrics."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()[1:]]
    return [(line["iteration"], line["meta_loss"], line["gradient_norm"], line["theta_norm"]) for line in lines]


def main() -> None:
    """Kills runs until the time or the kills are used up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, numbers = random.Random(options.seed), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        images = numbers.integers(0, 256, (40, 8, 8), dtype=np.uint8)
        np.savez(data / "noise_8x8.npz", train_images=images, train_labels=np.arange(40) % 10)

        started = time.monotonic()
        process = start(data, data / "whole")
        while iteration(data / "whole") < 1 and process.poll() is None:
            time.sleep(0.02)
        ready = time.monotonic() - started
        finish(process)
        whole = time.monotonic() - started
        theta, losses = load_weights(data / "whole" / "weights.celo2").theta, meta_losses(data / "whole")
        print(
            f"left alone: {ITERATIONS} iterations in {whole:.1f} s, the first one done after {ready:.1f} s", flush=True
        )

        kills = early = writing = runs = 0
        until = time.monotonic() + 60 * options.minutes
        while kills < options.kills and time.monotonic() < until:
            out = data / f"killed-{runs}"
            since = 0
            while True:
                before = iteration(out)
                process = start(data, out)
                if kills >= options.kills or time.monotonic() > until:
                    finish(process)
                    break
                # While it starts, or while it trains: most processes live to do something.
                begun = time.monotonic()
                if rng.random() < 0.2:
                    time.sleep(rng.uniform(0, ready))
                else:
                    while iteration(out) <= before and process.poll() is None and time.monotonic() < begun + 120:
                        time.sleep(0.005)
                    time.sleep(rng.uniform(0, (whole - ready) / 4))
                if process.poll() is not None:
                    finish(process)
                    break
                process.kill()
                process.communicate()
                kills, since = kills + 1, since + 1
                early += iteration(out) <= max(before, 0)
                writing += any(out.rglob("*.partial"))
                if (out / "portable.msgpack").exists():
                    load_portable(out / "portable.msgpack")  # whole at every moment
            damaged = list(out.rglob("*.damaged"))
            got = load_weights(out / "weights.celo2").theta
            if damaged or not all(map(np.array_equal, got, theta)) or meta_losses(out) != losses:
                raise SystemExit(
                    f"run {runs}: after {since} kills theta or the metrics differ, or {damaged} is damaged"
                )
            runs += 1
            print(f"run {runs}: {since} kills, theta and metrics identical to the bit", flush=True)
        print(
            f"{kills} kills in {runs} runs, {early} of them before the process had saved an iteration, {writing} in the"
            f" middle of writing a file: all {runs} thetas identical to the bit"
        )


if __name__ == "__main__":
    main()
