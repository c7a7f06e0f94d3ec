"""Presets on a task: both learning rates searched alike, then fresh seeds, at the best rates and at the defaults.

Usage: python -m benchmarks.rates TASK [TASK ...] [--size fashion] [--data PATH] [--presets muon modern_muon celo2]
       python -m benchmarks.rates --table results/rates/*.jsonl

For every preset a grid of three learning rates times three of AdamW, a factor of 1.7 apart, starts at the preset's
defaults and runs with the selection seeds. The grid moves to its best pair until that is the one in the middle. The
best pair and the defaults then run with fresh seeds; `--at` names the pair in place of the search. One JSON line per
run goes to OUT/TASK-SIZE.jsonl as it ends; runs that are there are not repeated, so that a second command goes on.
The rates are traced: a preset is compiled once per task. Roles that a preset sets apart keep their share of AdamW's
rate.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from celo2_harness import harness
from celo2_harness.lab.suites.significance import paired_difference
from celo2_harness.lab.tasks.kinds import make_task
from celo2_harness.lab.tasks.task import Task
from celo2_harness.lab.training.loop import evaluate
from celo2_harness.presets import find_preset
from celo2_harness.schedules import SCHEDULES

REFERENCE = "muon"
FRESH_SEEDS_FROM = 10
SPACING = 1.7
# How often the grid may move before the search gives up.
MAX_MOVES = 8
# What tells one run from another.
IDENTITY = ("task", "data", "steps", "schedule", "preset", "hidden", "rest", "seed")
Run = dict[str, Any]


class Pair(NamedTuple):
    """Two learning rates, as powers of `SPACING` over a preset's defaults."""

    hidden: float
    rest: float


class Trainer:
    """A preset on a task, compiled once for all rates and seeds."""

    def __init__(self, task: Task, preset: str, steps: int, evaluations: int, schedule: str):
        self.task, self.steps, self.every = task, steps, max(1, steps // evaluations)
        recipe = find_preset(preset)
        assert recipe.rest is not None
        self.defaults = recipe.learning_rate, recipe.learning_rate * recipe.rest.learning_rate_factor
        # Roles that the preset sets apart keep their share of AdamW's rate.
        shares = {
            role: terms.learning_rate_factor / recipe.rest.learning_rate_factor
            for role, terms in recipe.roles.items()
            if isinstance(terms.learning_rate_factor, float)
        }
        shape = SCHEDULES[schedule](steps, 0.05)

        def optimizer(hidden: Any, rest: Any) -> optax.GradientTransformation:
            rate = lambda count: hidden * shape(count)
            factor = lambda count, share=1.0: share * rest / hidden
            apart = {role: harness.AdamW(functools.partial(factor, share=share)) for role, share in shares.items()}
            return harness.build(preset, rate, steps, rest_learning_rate_factor=factor, rest=apart)

        def step(params: Any, state: Any, batch: Any, hidden: Any, rest: Any) -> Any:
            gradients = jax.grad(task.loss)(params, batch)
            updates, state = optimizer(hidden, rest).update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        self.init = jax.jit(lambda params: optimizer(1.0, 1.0).init(params))
        self.step = jax.jit(step, donate_argnums=(0, 1))
        self.examples = jax.tree.map(jnp.asarray, task.validation())

    def rates(self, pair: Pair) -> tuple[float, float]:
        """The two learning rates of a pair, rounded to three digits."""
        hidden, rest = (peak * SPACING**k for peak, k in zip(self.defaults, pair, strict=True))
        return float(f"{hidden:.3g}"), float(f"{rest:.3g}")

    def __call__(self, hidden: float, rest: float, seed: int) -> Run:
        """Trains from a seed; the held-out losses along the run."""
        begun = time.perf_counter()
        params = self.task.init(jax.random.key(seed))
        state, curve = self.init(params), []
        for step in range(self.steps):
            params, state = self.step(params, state, self.task.batch(seed, step), hidden, rest)
            if (step + 1) % self.every == 0:
                curve.append(round(float(evaluate(self.task, params, self.examples)), 5))
        return {"hidden": hidden, "rest": rest, "seed": seed, "curve": curve, "seconds": time.perf_counter() - begun}


def search(loss: Callable[[Pair], float]) -> Pair:
    """The best pair of three by three, moved until the best is the one in the middle.

    Args:
        loss: The mean loss of a pair over the selection seeds.
    """
    best = Pair(0, 0)
    for _ in range(MAX_MOVES):
        middle = best
        grid = [Pair(middle.hidden + h, middle.rest + r) for h in (-1, 0, 1) for r in (-1, 0, 1)]
        best = min(grid, key=loss)
        if best == middle:
            break
    return best


def measure(options: argparse.Namespace, kind: str, preset: str) -> None:
    """Searches and reports one preset on one task; writes the runs that are missing."""
    file = options.out / f"{kind}-{options.size}.jsonl"
    settings = {"task": f"{kind} {options.size}", "preset": preset, "steps": options.steps}
    settings |= {"schedule": options.schedule, "data": options.data.name if options.data else None}
    known: list[Run] = []
    if file.exists():
        lines = map(json.loads, file.read_text().splitlines())
        known = [run for run in lines if settings.items() <= run.items()]
    trainer: Trainer = Trainer(
        make_task(kind, options.size, options.data), preset, options.steps, options.evaluations, options.schedule
    )

    def run(pair: Pair, seed: int, phase: str) -> float:
        hidden, rest = trainer.rates(pair)
        wanted = {"hidden": hidden, "rest": rest, "seed": seed}
        found = next((old for old in known if wanted.items() <= old.items()), None)
        if found is None:
            found = settings | trainer(hidden, rest, seed)
            found["seconds"] = round(found["seconds"], 1)
            known.append(found)
        if phase not in found.setdefault("phases", []):
            found["phases"].append(phase)
            with file.open("a") as lines:
                lines.write(json.dumps(found) + "\n")
            print(f"{settings['task']}, {preset}, {phase}: {wanted} {found['curve'][-1]:.4f}", flush=True)
        return found["curve"][-1] if found["curve"][-1] == found["curve"][-1] else float("inf")

    @functools.cache
    def selection(pair: Pair) -> float:
        return statistics.fmean(run(pair, seed, "selection") for seed in range(options.selection_seeds))

    phases = {"defaults": Pair(0, 0)}
    if options.at:
        phases = {options.phase: Pair(*options.at)}
    elif options.selection_seeds:
        phases = {"report": search(selection)} | phases
    for phase, pair in phases.items():
        for seed in range(FRESH_SEEDS_FROM, FRESH_SEEDS_FROM + options.seeds):
            run(pair, seed, phase)


def table(files: Sequence[Path]) -> str:
    """Mean final losses on the fresh seeds, and paired differences with their 95% intervals, as Markdown."""
    # A run that serves twice is written twice; the later line knows both phases.
    runs: dict[Any, Run] = {}
    for line in (line for file in files for line in file.read_text().splitlines()):
        run = json.loads(line)
        runs[tuple(run[name] for name in IDENTITY)] = run
    lines = [
        "| task | preset | best rates (hidden, AdamW) | loss | minus Muon | at the defaults | minus its best |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    of = lambda phase, *key: {
        r["seed"]: r for r in runs.values() if phase in r["phases"] and (_task(r), r["preset"]) == key
    }
    for task in dict.fromkeys(map(_task, runs.values())):
        for preset in dict.fromkeys(r["preset"] for r in runs.values() if _task(r) == task):
            best, plain = of("report", task, preset), of("defaults", task, preset)
            if not best:
                continue
            a_run = next(iter(best.values()))
            cells = [task, preset, f"{a_run['hidden']:.2g}, {a_run['rest']:.2g}", _mean(best)]
            cells += [_minus(best, of("report", task, REFERENCE)) if preset != REFERENCE else "", _mean(plain)]
            lines.append("| " + " | ".join([*cells, _minus(plain, best)]) + " |")
    return "\n".join(lines) + "\n"


def _task(run: Run) -> str:
    return f"{run['task']}, {run['data']}, {run['steps']} steps, {run['schedule']}"


def _finals(runs: dict[int, Run]) -> dict[int, float]:
    return {seed: run["curve"][-1] for seed, run in runs.items()}


def _mean(runs: dict[int, Run]) -> str:
    return f"{statistics.fmean(_finals(runs).values()):.4f}" if runs else ""


def _minus(runs: dict[int, Run], others: dict[int, Run]) -> str:
    difference = paired_difference(_finals(runs), _finals(others))
    if difference is None:
        return ""
    width = "" if difference.half_width is None else f" ± {difference.half_width:.4f}"
    return f"{difference.mean:+.4f}{width}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, or prints the table of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="kinds of tasks, as `celo2 evaluate` knows them")
    parser.add_argument("--size", default="fashion")
    parser.add_argument("--data", type=Path, help="a text, or a folder of images")
    parser.add_argument("--presets", nargs="+", default=["muon", "modern_muon", "celo2"])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--evaluations", type=int, default=20, help="along a run")
    parser.add_argument("--schedule", default="warmup_cosine", choices=sorted(SCHEDULES))
    parser.add_argument("--selection-seeds", type=int, default=2, help="0: no search, the defaults only")
    parser.add_argument(
        "--at",
        type=float,
        nargs=2,
        metavar=("HIDDEN", "REST"),
        help="no search: this pair, as powers of 1.7 over the defaults",
    )
    parser.add_argument(
        "--phase", default="report", help="what runs of --at are called; the table takes those of the report alone"
    )
    parser.add_argument("--seeds", type=int, default=5, help="fresh ones, for the report")
    parser.add_argument("--out", type=Path, default=Path("results/rates"))
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="print the table of these files instead")
    options = parser.parse_args(arguments)
    if not options.table:
        options.out.mkdir(parents=True, exist_ok=True)
        for kind in options.tasks:
            for preset in options.presets:
                measure(options, kind, preset)
    print(table(options.table or sorted(options.out.glob("*.jsonl"))), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
