"""Kills `celo2 train`, `metatrain` or `evaluate` at random moments, resumes, and compares with a run left alone.

Usage: python benchmarks/kill.py train|metatrain|evaluate [--kills 100] [--minutes 30] [--seed 0] [--json FILE]

The runs are tiny and save after every step or two, so that many kills fall into a write. Each process is killed with
SIGKILL: some while it starts, most while it trains. What was saved before a process started must be there after its
death, whatever it did. When a run gets to its end, its results must have the bits of the run that nobody killed; then
the next run begins. Processes are forked from one that has imported everything and run nothing, which saves seconds
per kill. `--json` writes the counts into a file, one entry per command.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# What a run's numbers do not determine.
INCIDENTAL = ("seconds", "tokens_per_second", "step_milliseconds", "commit")
META_ITERATIONS = 400
METATRAIN = f"""
    --variant base --features gradient momentum --momentum-decays 0.9 --factored-decays 0.9 --hidden 2 --widths 64 10
    --batch 4 --tasks-per-set 2 --truncation 5 --shortest-unroll 5 --longest-unroll 20 --outer-learning-rate 1e-2
    --iterations {META_ITERATIONS} --checkpoint-every 1 --log-every 1 --devices 1
"""
TRAIN = "--model tiny --preset adamw --batch 2 --steps 40 --eval-every 10 --log-every 1 --checkpoint-every 2"
SUITE = """
name = "short"
checkpoint_every = 2
[[tasks]]
name = "language_model"
size = "tiny"
batch = 2
steps = 12
eval_every = 3
[search]
learning_rates = [0.01]
selection_seeds = [0, 1]
[[optimizers]]
preset = "adamw"
[[optimizers]]
optax = "sgd"
"""


class Case(NamedTuple):
    """What is killed.

    `begun`: whether a folder holds a run. `words`: of the command that starts it (False) or goes on (True). `saved`: a
    number that rises with what is saved. `kept`: what must never be lost or changed once it is there, as a list that
    grows. `whole`: raises if something that must be whole is not. `result`: what must be the same at the end.
    """

    words: Callable[[Path, Path, bool], list[str]]
    begun: Callable[[Path], bool]
    saved: Callable[[Path], int]
    kept: Callable[[Path], list[Any]]
    whole: Callable[[Path], None]
    result: Callable[[Path], Any]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a file, without what depends on the clock."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{name: value for name, value in json.loads(line).items() if name not in INCIDENTAL} for line in lines]


def metatrain_case() -> Case:
    """The newest checkpoint only rises, and the portable form is whole at every moment."""
    from celo2_harness import load_weights
    from celo2_harness.lab.metatrain import load_portable

    def words(data: Path, out: Path, begun: bool) -> list[str]:
        return ["metatrain", "--out", str(out), *(["--resume"] if begun else ["--data", str(data), *METATRAIN.split()])]

    def saved(out: Path) -> int:
        return max((int(path.stem) for path in (out / "checkpoints").glob("*.msgpack")), default=-1)

    def whole(out: Path) -> None:
        if (out / "portable.msgpack").exists():
            load_portable(out / "portable.msgpack")

    def result(out: Path) -> Any:
        theta = load_weights(out / "weights.celo2").theta
        lines = read_json_lines(out / "metrics.jsonl")[1:]
        names = ("iteration", "meta_loss", "gradient_norm", "theta_norm")
        damaged = [path.name for path in out.rglob("*.damaged")]
        return [digest([*theta]), [[line[name] for name in names] for line in lines], damaged]

    return Case(words, lambda out: (out / "metrics.jsonl").exists(), saved, lambda out: [], whole, result)


def train_case() -> Case:
    """The newest checkpoint only rises; at the end, metrics and all leaves of the last checkpoint are the same."""

    def words(data: Path, out: Path, begun: bool) -> list[str]:
        new = ["--text", str(data / "text.txt"), *TRAIN.split()]
        return ["train", "--out", str(out), *(["--resume"] if begun else new)]

    def result(out: Path) -> Any:
        from celo2_harness.lab.training.checkpoints import read_checkpoint

        leaves = read_checkpoint(max((out / "checkpoints").glob("*.checkpoint")))[1]
        header, *lines = read_json_lines(out / "metrics.jsonl")
        return [header["settings"], lines, digest([leaves[name] for name in sorted(leaves)])]

    return Case(
        words,
        lambda out: (out / "metrics.jsonl").exists(),
        lambda out: newest_step(out / "checkpoints"),
        lambda out: [],
        lambda out: None,
        result,
    )


def evaluate_case() -> Case:
    """Records stay as they are; at the end every run has one, the same as if nobody had killed anything."""

    def words(data: Path, out: Path, begun: bool) -> list[str]:
        del begun
        return ["evaluate", str(data / "suite.toml"), "--out", str(out), "--data", f"language_model={data}/text.txt"]

    def saved(out: Path) -> int:
        folders = (out / "unfinished").glob("*/checkpoints")
        done = max(map(newest_step, folders), default=-1)
        return 1000 * len(read_json_lines(out / "runs.jsonl")) + done

    def result(out: Path) -> Any:
        left = [path.name for path in (out / "unfinished").glob("*")]
        return [read_json_lines(out / "runs.jsonl"), left]

    return Case(words, Path.exists, saved, lambda out: read_json_lines(out / "runs.jsonl"), lambda out: None, result)


CASES = {"train": train_case, "metatrain": metatrain_case, "evaluate": evaluate_case}


def newest_step(checkpoints: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(path.stem) for path in checkpoints.glob("*.checkpoint")), default=-1)


def digest(arrays: list[Any]) -> str:
    """SHA-256 of the bytes of arrays."""
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in arrays)).hexdigest()


def is_writing(out: Path) -> bool:
    """Whether the death of a process has left a file or a checkpoint half done."""
    return any(out.rglob("*.partial"))


class Process:
    """A forked process that calls a function; what it prints goes to a file."""

    def __init__(self, function: Callable[[], int], log: Path):
        sys.stdout.flush()
        sys.stderr.flush()
        self.log, self.status = log, None
        self.pid = os.fork()
        if not self.pid:
            status = 70
            try:
                file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(file, 1)
                os.dup2(file, 2)
                status = function()
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else 1
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)

    def poll(self) -> int | None:
        """The exit status, negative after a signal; None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def finish(self) -> None:
        """Waits for a process that must succeed."""
        while self.poll() is None:
            time.sleep(0.01)
        if self.status:
            raise SystemExit(f"a process ended with status {self.status}: {self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        """Ends it, in the middle of whatever it does."""
        os.kill(self.pid, signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.001)


def in_process(function: Callable[[], Any], place: Path) -> Any:
    """What a function returns in a process of its own, as JSON can hold it: this one must not start JAX."""

    def write() -> int:
        (place / "result.json").write_text(json.dumps(function()))
        return 0

    Process(write, place / "result.log").finish()
    return json.loads((place / "result.json").read_text())


def prepare(data: Path) -> None:
    """Data for all commands."""
    numbers = np.random.default_rng(0)
    images = numbers.integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(data / "noise_8x8.npz", train_images=images, train_labels=np.arange(40) % 10)
    (data / "text.txt").write_text("abracadabra, " * 100)
    (data / "suite.toml").write_text(SUITE)


def main() -> None:
    """Kills runs until the time or the kills are used up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=CASES)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        # Compiled programs are kept, so that a process is soon at work; they are the same programs.
        os.environ |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(data / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        prepare(data)
        counts = kill_runs(options.command, data, options.kills, 60 * options.minutes, random.Random(options.seed))
    if options.json:
        there = json.loads(options.json.read_text()) if options.json.exists() else {}
        options.json.write_text(json.dumps(there | {options.command: counts}, indent=2) + "\n")


def kill_runs(command: str, data: Path, kills: int, seconds: float, rng: random.Random) -> dict[str, int]:
    """Does what the head of this file says, and returns the counts."""
    import importlib

    from celo2_harness.lab.cli.main import COMMANDS, main

    importlib.import_module(COMMANDS[command].module)
    importlib.import_module("matplotlib.pyplot")
    case = CASES[command]()

    def start(out: Path) -> Process:
        words = case.words(data, out, case.begun(out))
        return Process(lambda: main(words), data / "log")

    for name in ("warm", "whole"):  # the first one compiles
        started = time.monotonic()
        process = start(data / name)
        while case.saved(data / name) < 1 and process.poll() is None:
            time.sleep(0.005)
        ready = time.monotonic() - started
        process.finish()
        length = time.monotonic() - started
    wanted = in_process(lambda: case.result(data / "whole"), data)
    print(f"left alone: {length:.1f} s, the first step saved after {ready:.1f} s", flush=True)

    done = early = writing = runs = 0
    until = time.monotonic() + seconds
    while done < kills and time.monotonic() < until:
        out, since = data / f"killed-{runs}", 0
        while True:
            before, kept = case.saved(out), case.kept(out)
            process = start(out)
            if done >= kills or time.monotonic() > until:
                process.finish()
                break
            # While it starts, or while it trains: most processes live to do something.
            begun = time.monotonic()
            if rng.random() < 0.2:
                time.sleep(rng.uniform(0, ready))
            else:
                while case.saved(out) <= before and process.poll() is None and time.monotonic() < begun + 120:
                    time.sleep(0.002)
                time.sleep(rng.uniform(0, (length - ready) / 3))
            if process.poll() is not None:
                process.finish()
                break
            process.kill()
            done, since = done + 1, since + 1
            early += case.saved(out) <= max(before, 0)
            writing += is_writing(out)
            if case.saved(out) < before or case.kept(out)[: len(kept)] != kept:
                raise SystemExit(
                    f"run {runs}: after kill {since} something saved is lost, {before} -> {case.saved(out)}"
                )
            case.whole(out)
        if in_process(lambda: case.result(out), data) != wanted:  # noqa: B023
            raise SystemExit(f"run {runs}: after {since} kills the results differ from those of the run left alone")
        runs += 1
        print(f"run {runs}: {since} kills, results identical to the bit", flush=True)
    print(
        f"celo2 {command}: {done} kills in {runs} runs, {early} of them before the process had saved a step, {writing}"
        f" in the middle of writing a file: the results of all {runs} identical to the bit"
    )
    return {"kills": done, "runs": runs, "before_saving": early, "while_writing": writing, "differences": 0}


if __name__ == "__main__":
    main()
