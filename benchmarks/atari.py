"""All runs of the Atari comparison at once: three games, three presets, two seeds, 500,000 agent steps each.

Usage: python benchmarks/atari.py FOLDER [--games freeway] [--presets adamw] [--seeds 0] [--steps 500000]

For a machine with a GPU and many cores: a process per game and a thread per run, so that the emulators of all runs
keep the cores busy while the kernels of a few processes share the GPU. The runs are those of `celo2 reinforce`, in
folders of its kind. Ctrl-C saves all of them, the same command again goes on with those that have not ended, and
`celo2 report FOLDER` draws them.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import jax

from celo2_harness.lab.cli.reinforce import Config, train
from celo2_harness.lab.reinforce import ReinforceResult
from celo2_harness.lab.training.folder import Progress, holds_run
from celo2_harness.lab.training.interrupt import StopSignals

GAMES = ("asterix", "freeway", "space_invaders")
PRESETS = ("adamw", "celo2_base", "celo2_ortho")
REPORT_SECONDS = 15.0
# Eighteen runs that write 34 MB every 20 updates would keep the disk busy.
CHECKPOINT_EVERY = 100


def play(game: str, presets: list[str], seeds: list[int], steps: int, folder: Path) -> dict[str, ReinforceResult]:
    """Trains on one game with every preset and seed, each in a thread of its own."""
    # The seeds of a preset run one program: the first compiles it, the others wait and find it in the cache.
    compiled = {preset: threading.Event() for preset in presets}
    reached: dict[str, int] = {}
    started = time.monotonic()

    def run(preset: str, seed: int) -> ReinforceResult:
        name = f"{preset}-{seed}"
        place = folder / f"{game}-{name}"

        def follow(progress: Progress) -> None:
            reached[name] = progress.step
            compiled[preset].set()

        if seed != seeds[0]:
            compiled[preset].wait()
        try:
            config = Config(
                game, preset, steps=steps, seed=seed, resume=holds_run(place), checkpoint_every=CHECKPOINT_EVERY
            )
            return train(config, place, should_stop=lambda: stop.requested, on_progress=follow)
        finally:
            compiled[preset].set()

    with StopSignals() as stop, ThreadPoolExecutor(len(presets) * len(seeds)) as pool:
        futures = {f"{preset}-{seed}": pool.submit(run, preset, seed) for preset in presets for seed in seeds}
        while wait(futures.values(), REPORT_SECONDS).not_done:
            steps_of = "  ".join(f"{name} {step:,}" for name, step in sorted(reached.items()))
            print(f"{game} {time.monotonic() - started:.0f} s  {steps_of or 'compiling'}", flush=True)
    return {name: future.result() for name, future in futures.items()}


def main() -> None:
    """Starts a process per game, or plays the one that there is; exits with 1 if a run failed, 130 if stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--games", nargs="+", default=GAMES)
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=500_000)
    arguments = parser.parse_args()
    if len(arguments.games) > 1:
        rest = ["--presets", *arguments.presets, "--seeds", *map(str, arguments.seeds), "--steps", str(arguments.steps)]
        command = [sys.executable, __file__, str(arguments.folder), *rest, "--games"]
        # JAX would give three quarters of the GPU's memory to the first process.
        share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.85 / len(arguments.games):.2f}"}
        with StopSignals():  # Ctrl-C is for the processes, which save; this one waits for them
            processes = [subprocess.Popen([*command, game], env=share | os.environ) for game in arguments.games]
            codes = [process.wait() for process in processes]
        # A process that was killed has a negative code.
        sys.exit(1 if set(codes) - {0, 130} else max(codes))
    (game,) = arguments.games
    jax.config.update("jax_compilation_cache_dir", str(arguments.folder.absolute() / "compiled"))
    results = play(game, arguments.presets, arguments.seeds, arguments.steps, arguments.folder)
    for name, result in results.items():
        print(f"{game} {name}: {result.status} at step {result.step:,}", flush=True)
    statuses = {result.status for result in results.values()}
    sys.exit(130 if "interrupted" in statuses else 1 if "diverged" in statuses else 0)


if __name__ == "__main__":
    main()
