"""Stacks of optimizer blocks on small language models: many seeds and rates at once, in few compiled programs.

Usage: python -m benchmarks.stacks TEXT [TEXT ...] [--out results/stacks] [--models nano-64 nano] [--seconds 560]

Every row of `table.py` is trained on every model and text with a grid of two learning rates and two selection seeds;
the best pair, by the mean loss at the end, then runs with eight fresh seeds. In between a linear rule in the eigenbasis
is searched by CMA-ES, judged at the end of full runs, and reported like a row. Results go to OUT/results.jsonl as they
come, one line per run, and a table is printed at the end. With --seconds the program stops in time and reports what it
has.

The English documentation is that of Debian's package perl-doc:
    find /usr/share/perl -name "*.pod" ! -name "perl*delta.pod" ! -name perltoc.pod ! -name perluniprops.pod \\
        | sort | xargs cat > perl-doc.txt
"""

import argparse
import dataclasses
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.stacks.directions import NUMBERS
from benchmarks.stacks.search import CMA
from benchmarks.stacks.summary import summarize
from benchmarks.stacks.table import OVER_RMS, STACKS, Stack, structures
from benchmarks.stacks.trainings import ENDINGS, Program, Texts, compile_in_background, model_config
from celo2_harness.lab.tasks.text import read_text

REPORT_SEEDS_FROM = 10
SEARCH_SEEDS_FROM = 1000

# What the search moves: the number, how it is written down, and a step that is worth trying.
SEARCHED = {
    "hidden_rate": ("log", 0.25),
    "rest_rate": ("log", 0.25),
    "weight_1": ("log", 0.5),
    "weight_2": ("log", 0.5),
    "weight_3": ("log", 0.5),
    "slope_1": ("plain", 1.0),
    "slope_2": ("plain", 1.0),
    "slope_3": ("plain", 1.0),
    "basis_decay": ("complement", 0.5),
    "second_decay": ("complement", 0.5),
    "floor_of_second": ("log", 1.5),
    "whitening": ("plain", 0.08),
}
SEARCH_START = NUMBERS | OVER_RMS | {"weight_3": 0.1}


class Clock:
    """Time since the start, and what is left of it."""

    def __init__(self, seconds: float):
        self.start, self.seconds = time.perf_counter(), seconds

    def now(self) -> float:
        return time.perf_counter() - self.start

    def left(self) -> float:
        return self.seconds - self.now()


class Bench:
    """Runs rows on compiled programs and writes down what comes out."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.clock = options, Clock(options.seconds)
        self.texts = [Path(text) for text in options.texts]
        self.records: list[dict[str, Any]] = []
        options.out.mkdir(parents=True, exist_ok=True)
        self.file = (options.out / "results.jsonl").open("a", buffering=1)
        self.durations: dict[str, float] = {}
        made = structures(options.published)
        given = {name: rates for name in ("hidden_rates", "rest_rates") if (rates := getattr(options, name))}
        self.stacks = [dataclasses.replace(s, **given) for s in STACKS if re.search(options.only, s.label)]
        programs = []
        for model in options.models:
            config = model_config(model)
            texts = Texts([read_text(path, config.context) for path in self.texts], config.context)
            wanted = dict.fromkeys(s.structure for s in self.stacks)
            if options.search_seconds:
                wanted["act"] = None
            for name in wanted:
                programs.append(
                    Program(
                        f"{model} {name}", made[name], config, options.steps, options.eval_every, options.size, texts
                    )
                )
        futures = compile_in_background(programs, options.threads)
        self.programs = {p.name: future for p, future in zip(programs, futures, strict=True)}

    def log(self, message: str) -> None:
        print(f"[{self.clock.now():6.1f} s] {message}", flush=True)

    def write(self, record: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")

    def program(self, model: str, structure: str) -> Program | None:
        """The compiled program; None if it cannot be compiled, or not in time."""
        name = f"{model} {structure}"
        waiting = name not in self.durations
        try:
            left = self.clock.left()
            program = self.programs[name].result(timeout=None if left == float("inf") else max(0.0, left))
        except Exception as error:
            self.log(f"{name}: {type(error).__name__}: {str(error)[:2000]}")
            return None
        if waiting:
            self.durations[name] = 0.0
            self.log(f"{name}: traced in {program.lowering_seconds:.1f} s, compiled in {program.compile_seconds:.1f} s")
        return program

    def train(self, program: Program, rows: Sequence[dict[str, Any]], until: float) -> list[dict[str, Any]]:
        """Trains rows in portions; those for which time does not suffice are left out."""
        done: list[dict[str, Any]] = []
        for start in range(0, len(rows), program.size):
            if self.clock.now() + 1.1 * self.durations[program.name] > until:
                self.log(f"{program.name}: {len(rows) - start} runs left out for want of time")
                break
            portion = rows[start : start + program.size]
            begun = time.perf_counter()
            losses = program(portion)
            seconds = time.perf_counter() - begun
            self.durations[program.name] = seconds
            for row, curve, training, endings in zip(portion, *losses, strict=True):
                record = {
                    **row,
                    "final": float(endings[0]),
                    "endings": dict(zip(ENDINGS, map(float, endings), strict=True)),
                    "curve": [round(float(x), 5) for x in curve],
                    "training": [round(float(x), 5) for x in training],
                    "steps": program.steps,
                    "portion_seconds": round(seconds, 2),
                }
                self.write(record)
                done.append(record)
            self.log(f"{program.name}: {len(portion)} runs in {seconds:.2f} s")
        return done

    def run_rows(self, model: str, stacks: Sequence[Stack], until: float) -> None:
        """Selection and report of rows, those of one structure together, in the order of the table."""
        selection_seeds = range(self.options.selection_seeds)
        report_seeds = range(REPORT_SEEDS_FROM, REPORT_SEEDS_FROM + self.options.report_seeds)
        waiting = self.groups(stacks)
        while waiting and self.clock.now() < until:
            # The first whose program is there; compilation goes on meanwhile.
            group = next((g for g in waiting if self.programs[f"{model} {g[0].structure}"].done()), None)
            if group is None:
                time.sleep(0.1)
                continue
            waiting.remove(group)
            program = self.program(model, group[0].structure)
            if program is None:
                continue
            base = lambda stack, phase, text: {
                **stack.numbers, "stack": stack.label, "model": model, "phase": phase, "text": text,
                "text_name": self.texts[text].name,
            }  # fmt: skip
            trials = [
                base(stack, "selection", text) | {"hidden_rate": hidden, "rest_rate": rest, "seed": seed}
                for stack in group
                for text in range(len(self.texts))
                for hidden in stack.hidden_rates
                for rest in stack.rest_rates
                for seed in selection_seeds
            ]
            tried = self.train(program, trials, until)
            chosen = []
            for stack in group:
                for text in range(len(self.texts)):
                    own = [r for r in tried if r["stack"] == stack.label and r["text"] == text]
                    # What was tried in part has no best pair.
                    if len(own) == len(stack.hidden_rates) * len(stack.rest_rates) * len(selection_seeds):
                        rates = best_rates(own)
                        chosen += [base(stack, "report", text) | rates | {"seed": seed} for seed in report_seeds]
            self.records += tried + self.train(program, chosen, until)

    def groups(self, stacks: Sequence[Stack]) -> list[list[Stack]]:
        """Neighbours of one structure whose trials fill whole portions, in the order of their first ones."""
        trials = len(stacks[0].hidden_rates) * len(stacks[0].rest_rates) if stacks else 1
        per_row = trials * self.options.selection_seeds * len(self.texts)
        together = max(1, 4 * self.options.size // per_row // 2)
        open_groups: dict[str, list[Stack]] = {}
        groups: list[list[Stack]] = []
        for stack in stacks:
            group = open_groups.get(stack.structure)
            if group is None or len(group) >= together:
                group = open_groups[stack.structure] = []
                groups.append(group)
            group.append(stack)
        return groups

    def search(self, model: str, until: float) -> Stack | None:
        """Searches the numbers of a linear rule in the eigenbasis; a row with what was found."""
        program = self.program(model, "act")
        if program is None:
            return None
        population = program.size // len(self.texts) // 2 * 2
        scales = np.array([scale for _, scale in SEARCHED.values()])
        start = np.array([written(name, SEARCH_START[name]) for name in SEARCHED])
        cma = CMA(start / scales, 1.0, population)
        while self.clock.now() + 1.2 * self.durations[program.name] < until:
            points = cma.ask() * scales
            rules = [SEARCH_START | {name: read(name, x) for name, x in zip(SEARCHED, p, strict=True)} for p in points]
            seed = SEARCH_SEEDS_FROM + cma.generation
            rows = [rule | {"seed": seed, "text": text} for text in range(len(self.texts)) for rule in rules]
            begun = time.perf_counter()
            finals = program(rows).endings[:, 0].reshape(len(self.texts), population)
            self.durations[program.name] = time.perf_counter() - begun
            cma.tell(finals.mean(axis=0))
            self.write(
                {
                    "phase": "search", "model": model, "generation": cma.generation, "seed": seed,
                    "names": list(SEARCHED), "points": np.round(points, 5).tolist(),
                    "finals": np.round(finals, 5).tolist(), "sigma": cma.sigma,
                    "mean": np.round(cma.mean * scales, 5).tolist(),
                }
            )  # fmt: skip
            if cma.generation % 5 == 1:
                self.log(f"search, generation {cma.generation}: mean {np.mean(finals):.4f}, sigma {cma.sigma:.3f}")
        found = {name: read(name, x) for name, x in zip(SEARCHED, cma.mean * scales, strict=True)}
        self.log(
            f"found after {cma.generation} generations: {json.dumps({k: float(f'{v:.4g}') for k, v in found.items()})}"
        )
        rates = {name: found.pop(name) for name in ("hidden_rate", "rest_rate")}
        around = {name: (rate / 1.7, rate, 1.7 * rate) for name, rate in rates.items()}
        return Stack("searched rule in basis", "act", SEARCH_START | found, around["hidden_rate"], around["rest_rate"])


def written(name: str, value: float) -> float:
    """A number as the search sees it."""
    kind = SEARCHED[name][0]
    return {"log": np.log, "complement": lambda x: np.log(1.0 - x), "plain": float}[kind](value)


def read(name: str, value: float) -> float:
    """The inverse of `written`."""
    kind = SEARCHED[name][0]
    return float({"log": np.exp, "complement": lambda x: 1.0 - np.exp(min(x, -0.1)), "plain": float}[kind](value))


def best_rates(trials: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The pair of rates with the lowest mean final loss."""
    finals: dict[tuple[float, float], list[float]] = {}
    for trial in trials:
        finals.setdefault((trial["hidden_rate"], trial["rest_rate"]), []).append(trial["final"])
    mean = lambda pair: float(np.nan_to_num(np.mean(finals[pair]), nan=np.inf))
    return dict(zip(("hidden_rate", "rest_rate"), min(finals, key=mean), strict=True))


def main() -> int:
    """Measures, searches and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="a text file; a part of it is held out")
    parser.add_argument("--out", type=Path, default=Path("results/stacks"))
    parser.add_argument("--models", nargs="+", default=["nano-64", "nano"], help="the search is on the first")
    parser.add_argument("--only", default="", help="a regular expression: which rows of the table")
    parser.add_argument("--hidden-rates", type=float, nargs="+", help="in place of those of the table, for all rows")
    parser.add_argument("--rest-rates", type=float, nargs="+", help="the same for AdamW's")
    parser.add_argument("--published", type=Path, help="a file with the published weights")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--size", type=int, default=72, help="runs at once")
    parser.add_argument("--selection-seeds", type=int, default=2)
    parser.add_argument("--report-seeds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=8, help="programs that are compiled side by side")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for everything")
    parser.add_argument("--rows-seconds", type=float, default=float("inf"), help="for the table on the first model")
    parser.add_argument("--search-seconds", type=float, default=0.0, help="for the search; 0 for none")
    options = parser.parse_args()
    bench = Bench(options)
    bench.log(f"jax {jax.__version__} on {jax.devices()[0].device_kind}; {len(bench.stacks)} rows")
    first, *others = options.models
    end = options.seconds - 3.0
    bench.run_rows(first, bench.stacks, min(end, options.rows_seconds))
    found = None
    if options.search_seconds:
        found = bench.search(first, min(end, bench.clock.now() + options.search_seconds))
        if found:
            bench.run_rows(first, [found], end)
    for model in others:
        head, rest = bench.stacks[:3], bench.stacks[3:]
        bench.run_rows(model, [*head, *([found] if found else []), *rest], end)
    table = summarize(bench.records, STACKS[0].label, options.steps, options.eval_every)
    (options.out / "table.txt").write_text(table)
    print(table, flush=True)
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Compilations that nobody waits for any more would hold the interpreter.
    import os

    os._exit(status)
