"""GPT-2 (124 million parameters, bfloat16) on source code with five optimizers, in ten minutes of one GPU.

    python benchmarks/gpt2.py data --out gpt2-data           # once; a CPU will do
    python benchmarks/gpt2.py train --data gpt2-data --out gpt2-runs --seconds 580
    python benchmarks/gpt2.py report --out gpt2-runs

The text is Python source: the standard library (PSF licence), then JAX, Flax, NumPy and SciPy where they are installed
(Apache 2.0 and BSD), each file once, 50 MB at most. Its tokens are those of a byte-level pair encoding trained on it.
All optimizers see the same batches on the same schedule. Every run is a folder as `celo2 train` writes it, and is
continued where it is if the program is started again. What takes too long is ended, and the next one begins.
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from celo2_harness import harness
from celo2_harness.lab.tasks import LanguageModel, make_token_language_model
from celo2_harness.lab.tasks.tokenizing import write_tokens
from celo2_harness.lab.training.display import Display
from celo2_harness.lab.training.figures import add_legend, add_line, new_axes
from celo2_harness.lab.training.folder import METRICS, holds_run, read_lines
from celo2_harness.lab.training.optimizers import preset_spec
from celo2_harness.lab.training.train import TrainConfig, train

OPTIMIZERS = ("adamw", "muon", "modern_muon", "celo2", "celo2_ortho")
PACKAGES = ("jax", "flax", "numpy", "scipy")
# The width that the presets' default rates were found at (docs/research/stacks.md).
SEARCHED_WIDTH = 128
# Their steps shrink with the width by themselves.
CARRIED_OVER = ("celo2", "modern_muon")


def default_rate(preset: str, width: int) -> float:
    """The rate of a preset, carried over from the width that it was found at by the root of the ratio, if need be."""
    rate = float(harness.presets()[preset].learning_rate)
    return rate if preset in CARRIED_OVER else float(f"{rate * (SEARCHED_WIDTH / width) ** 0.5:.1e}")


def source_files() -> Iterator[Path]:
    """Python files of permissive licences, the standard library first."""
    folders = [Path(sysconfig.get_paths()["stdlib"])]
    for name in PACKAGES:
        found = importlib.util.find_spec(name)
        folders += [Path(place) for place in (found.submodule_search_locations or ())] if found else []
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            if folder != folders[0] or "site-packages" not in path.parts:
                yield path


def write_text(path: Path, limit: int) -> int:
    """Writes the source files one after the other, each once, up to a number of bytes; returns the bytes."""
    seen, size = set(), 0
    with path.open("wb") as file:
        for source in source_files():
            content = source.read_bytes()
            digest = hashlib.sha256(content).digest()
            try:
                content.decode()
            except UnicodeDecodeError:
                continue
            if digest not in seen and size + len(content) <= limit:
                seen.add(digest)
                size += file.write(content.rstrip() + b"\n\n")
    return size


def data(options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    text = options.out / "source.txt"
    size = write_text(text, options.megabytes * 10**6)
    header = write_tokens([text], options.out, train_vocabulary=options.vocabulary)
    counts = {part: sum(shard["tokens"] for shard in header[part]) for part in ("train", "held_out")}
    print(json.dumps({"bytes": size, "vocabulary": header["vocabulary"], **counts}))


def make_task(options: argparse.Namespace) -> LanguageModel:
    task = make_token_language_model(options.size, options.data, options.batch)
    return dataclasses.replace(task, config=dataclasses.replace(task.config, dtype=options.dtype))


def run_one(options: argparse.Namespace, preset: str) -> None:
    task = make_task(options)
    rates = dict(pair.split("=") for pair in options.rates)
    rate = float(rates.get(preset, default_rate(preset, task.config.width)))
    spec = preset_spec(preset, rate, total_steps=options.steps, weight_decay=options.weight_decay)
    folder = options.out / preset
    every = max(1, options.steps // 20)
    config = TrainConfig(
        options.steps, options.seed, eval_every=every, log_every=every, checkpoint_every=max(1, options.steps // 2)
    )
    with Display("tokens", task.tokens_per_batch) as display:
        train(
            task,
            spec,
            config,
            folder,
            title=f"{preset}, {rate:g}",
            resume=holds_run(folder),
            on_start=lambda step: display.start(preset, options.steps, step),
            on_progress=display.update,
        )


def train_all(options: argparse.Namespace) -> None:
    end = time.monotonic() + options.seconds
    for k, preset in enumerate(options.optimizers):
        # What a quick one leaves over is for those after it.
        left = (end - time.monotonic()) / (len(options.optimizers) - k)
        command = [sys.executable, __file__, *sys.argv[1:], "--only", preset]
        try:
            subprocess.run(command, timeout=max(1.0, left), check=False)
        except subprocess.TimeoutExpired:
            print(f"{preset}: ended after {left:.0f} s", flush=True)
    report(options)


def curve(folder: Path) -> list[dict[str, Any]]:
    """The lines with a held-out loss."""
    lines = read_lines(folder / METRICS)[1:] if holds_run(folder) else []
    return [line for line in lines if line.get("validation_loss") is not None]


def reached(lines: Sequence[dict[str, Any]], loss: float, name: str) -> float | None:
    """Where a curve first passes a loss, on the straight line between two evaluations."""
    for before, line in zip(lines, lines[1:], strict=False):
        if line["validation_loss"] <= loss:
            part = (before["validation_loss"] - loss) / (before["validation_loss"] - line["validation_loss"])
            return before[name] + part * (line[name] - before[name])
    return None


def report(options: argparse.Namespace) -> None:
    curves = {name: lines for name in options.optimizers if (lines := curve(options.out / name))}
    muon = curves["muon"][-1]["validation_loss"] if "muon" in curves else None
    rows = []
    for name, lines in curves.items():
        header, *body = read_lines(options.out / name / METRICS)
        timed = [line for line in body if "step_milliseconds" in line]
        rows.append(
            {
                "optimizer": name,
                "learning_rate": header["settings"]["optimizer"].get("learning_rate"),
                "device": header.get("device"),
                "step": lines[-1]["step"],
                "loss": lines[-1]["validation_loss"],
                "seconds": lines[-1]["seconds"],
                "step_milliseconds": timed[-1]["step_milliseconds"] if timed else None,
                "tokens_per_second": timed[-1]["tokens_per_second"] if timed else None,
                "share_of_peak": timed[-1].get("share_of_peak") if timed else None,
                "steps_to_muon": None if muon is None else reached(lines, muon, "step"),
                "seconds_to_muon": None if muon is None else reached(lines, muon, "seconds"),
            }
        )
    (options.out / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = [name for name in (rows[0] if rows else {}) if name != "device"]
    print("| " + " | ".join(columns) + " |\n| " + " | ".join("---" for _ in columns) + " |")
    for row in rows:
        cells = (
            "-" if row[name] is None else f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name])
            for name in columns
        )
        print("| " + " | ".join(cells) + " |")
    if curves:
        figure, axes = new_axes("GPT-2 on source code", "seconds", "held-out loss (nats per token)")
        for k, (name, lines) in enumerate(curves.items()):
            add_line(axes, k, [x["seconds"] for x in lines], [x["validation_loss"] for x in lines], name)
        add_legend(axes, outside=False)
        figure.savefig(options.out / "gpt2.png")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("data")
    make.add_argument("--out", type=Path, default=Path("gpt2-data"))
    make.add_argument("--megabytes", type=int, default=50)
    make.add_argument("--vocabulary", type=int, default=50257)
    for name in ("train", "report"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, default=Path("gpt2-runs"))
        command.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS))
        if name == "train":
            command.add_argument("--data", type=Path, default=Path("gpt2-data"))
            command.add_argument("--size", default="gpt2-124m")
            command.add_argument("--dtype", default="bfloat16")
            command.add_argument("--batch", type=int, default=32)
            command.add_argument("--steps", type=int, default=800)
            command.add_argument("--seed", type=int, default=0)
            command.add_argument("--weight-decay", type=float, default=0.1)
            command.add_argument("--rates", nargs="*", default=[], metavar="OPTIMIZER=RATE")
            command.add_argument("--seconds", type=float, default=580.0, help="for all of them")
            command.add_argument("--only", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.command == "data":
        data(options)
    elif options.command == "report":
        report(options)
    elif options.only:
        run_one(options, options.only)
    else:
        train_all(options)


if __name__ == "__main__":
    main()
