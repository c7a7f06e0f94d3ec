"""`celo2 bench`: what optimizer steps cost, side by side in one run."""

import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import optax
import tyro
from rich.console import Console
from rich.table import Table

from celo2_harness import harness
from celo2_harness.lab.bench import (
    GRADIENT,
    MODEL_SHAPES,
    ORTHOGONAL,
    Plan,
    StepCost,
    estimate_update,
    measure_newton_schulz,
    measure_training,
    measure_updates,
    median_ratio,
    plan_update,
)
from celo2_harness.lab.cli._devices import device_mesh, mesh_lengths
from celo2_harness.lab.errors import InputError, check_range, input_errors
from celo2_harness.lab.tasks import make_language_model
from celo2_harness.lab.training.provenance import provenance
from celo2_harness.velo import VELO, VELO_S, VeloConfig, VeloWeights, init_theta

# The peers that ratios refer to: Optax's own, not our presets of the same name.
PEERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "optax.adamw": lambda: optax.adamw(1e-3),
    "optax.contrib.muon": lambda: optax.contrib.muon(1e-3),
}


# Presets without weights of their own: what they cost does not depend on the numbers, so random ones will do.
STAND_INS: dict[str, VeloConfig] = {"velo": VELO, "velo_s": VELO_S}


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure what an optimizer step costs, side by side with Optax's AdamW and Muon.

    "step" compiles and times the jitted update of each optimizer, gradients and state donated; "newton-schulz" times
    the orthogonalisation of one 1024 x 4096 matrix; "training" times whole training steps of a language model and the
    optimizer's share of them. Calls alternate, so that noise hits all alike. "plan" allocates nothing: it prints what
    parameters, gradients, state and temporaries take on each device of a mesh, and what the update sends.
    """

    measure: tyro.conf.Positional[Literal["step", "newton-schulz", "training", "plan"]] = "step"
    """What to measure."""
    model: str | None = None
    """Parameters: blocks (12.6 million, the default), blocks-1m to blocks-100m, gpt2-12, gpt2-48, or a model of
    `celo2 train`; "training" takes only the last, by default nano."""
    preset: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--presets"])] = ()
    """Presets beside the two of Optax; by default all."""
    rounds: int = 10
    """Timed calls of each."""
    compile_only: bool = False
    """Only compile: compile times, temporaries and state, on shapes alone. Nothing is allocated."""
    state_dtype: str = "float32"
    """The dtype of the learned rule's state: float32 or bfloat16."""
    kernel: str = "auto"
    """How the learned rule is computed: auto, xla or pallas."""
    batch: int = 16
    """Windows per training step ("training")."""
    mesh: str = "fsdp=1"
    """Lengths of mesh axes ("plan"), for example data=2,fsdp=4: leaves are split over fsdp and tensor, repeated over
    data."""
    estimate: bool = False
    """Costs by formula ("plan"): nothing is compiled, and the mesh may be larger than the machine. Presets only."""
    json: Path | None = None
    """File for the figures of every round."""


def run(config: Config) -> int:
    """Measures and prints a table; returns 0."""
    check_range(1, rounds=config.rounds)
    if config.json is not None and not config.json.parent.is_dir():
        raise InputError(f"json: there is no folder {config.json.parent}; create it")
    measures = {"step": _step, "newton-schulz": _newton_schulz, "training": _training, "plan": _plan}
    table, figures = measures[config.measure](config)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if config.json is not None:
        header = provenance() | {"cores": os.cpu_count(), "config": dataclasses.asdict(config) | {"json": None}}
        config.json.write_text(json.dumps({"header": header, "figures": figures}, indent=1) + "\n", encoding="utf-8")
        print(f"figures: {config.json}")
    return 0


def _step(config: Config) -> tuple[Table, dict[str, Any]]:
    model, shapes = _shapes(config)
    rounds = 0 if config.compile_only else config.rounds
    costs = measure_updates(
        _optimizers(config),
        shapes,
        rounds=rounds,
        on_compiled=lambda name: _progress(f"compiled {name}"),
        on_round=lambda done: _progress(f"round {done} of {rounds}"),
    )
    parameters = next(iter(costs.values())).parameter_bytes
    table = _table(
        ("optimizer", "ms per update", "/ adamw", "/ muon", "temporaries", "state", "trace s", "compile s"),
        f"{model}, {parameters / 1e6:.1f} MB of parameters, {rounds} rounds: medians and interquartile ranges;"
        " temporaries and state relative to the parameters",
    )
    for name, cost in costs.items():
        table.add_row(
            name,
            _milliseconds(cost.seconds),
            *(_ratio(cost, costs[peer]) for peer in PEERS),
            f"{cost.temporary_bytes / cost.parameter_bytes:.2f}x",
            f"{cost.state_bytes / cost.parameter_bytes:.2f}x",
            f"{cost.trace_seconds:.1f}",
            f"{cost.compile_seconds:.1f}",
        )
    return table, {name: cost._asdict() for name, cost in costs.items()}


def _newton_schulz(config: Config) -> tuple[Table, dict[str, Any]]:
    cost = measure_newton_schulz((1024, 4096), rounds=config.rounds)
    table = _table(("newton_schulz, 1024 x 4096, float32", "ms", "/ optax", "relative difference"))
    ratio = median_ratio(cost.ours, cost.optax)
    table.add_row("optax", _milliseconds(cost.optax), "1.00", "")
    table.add_row("celo2_harness", _milliseconds(cost.ours), f"{ratio:.2f}", f"{cost.difference:.1e}")
    return table, cost._asdict()


def _training(config: Config) -> tuple[Table, dict[str, Any]]:
    model = config.model or "nano"
    with input_errors():
        task = make_language_model(model, None, config.batch)
    times = measure_training(
        task,
        _optimizers(config),
        rounds=config.rounds,
        on_round=lambda done: _progress(f"round {done} of {config.rounds}"),
    )
    caption = f"{model}, {task.tokens_per_batch} bytes a step, {config.rounds} rounds"
    table = _table(("optimizer", "ms per step", "optimizer's share"), caption)
    for name, seconds in times.items():
        share = 1.0 - median_ratio(times[GRADIENT], seconds)
        table.add_row(name, _milliseconds(seconds), "" if name == GRADIENT else f"{100 * max(0.0, share):.0f}%")
    return table, times


def _plan(config: Config) -> tuple[Table, dict[str, Any]]:
    if config.estimate:
        return _estimate(config)
    mesh = device_mesh(config.mesh)  # before anything starts JAX
    model, shapes = _shapes(config)
    table = _table(
        ("MB per device", *Plan._fields[:4], "total", *Plan._fields[4:]),
        f"{model} on a mesh of {config.mesh}; temporaries and collectives as XLA plans them",
    )
    plans = {}
    for name, tx in _optimizers(config, sharding=mesh if mesh.size > 1 else None).items():
        plan = plans[name] = plan_update(tx, shapes, mesh)
        table.add_row(name, *_megabytes(*plan[:4], plan.total), str(plan.collectives), *_megabytes(plan.sent))
        _progress(f"planned {name}")
    return table, {name: plan._asdict() for name, plan in plans.items()}


def _estimate(config: Config) -> tuple[Table, dict[str, Any]]:
    model, shapes = _shapes(config)
    table = _table(
        ("MB per device", "parameters", "gradients", "state", "total", "sent", "collectives", "matrices"),
        f"{model} on a mesh of {config.mesh}, by formula; collectives and what a device sends into them are those of"
        " the orthogonalisation, matrices those that the busiest device orthogonalises",
    )
    estimates, lengths = {}, mesh_lengths(config.mesh)
    for name, tx in _optimizers(config).items():
        if name not in PEERS:
            got = estimates[name] = estimate_update(tx, shapes, lengths, orthogonalized=name in ORTHOGONAL)
            table.add_row(name, *_megabytes(*got[:3], got.total, got.sent), str(got.collectives), str(got.matrices))
    return table, {name: got._asdict() for name, got in estimates.items()}


def _table(headings: tuple[str, ...], caption: str | None = None) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", caption=caption, caption_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    return table


def _megabytes(*sizes: int) -> list[str]:
    return [f"{size / 1e6:.1f}" for size in sizes]


def _shapes(config: Config) -> tuple[str, Any]:
    model = config.model or "blocks"
    if model not in MODEL_SHAPES:
        raise InputError(f"model = {model!r}: expected one of {', '.join(MODEL_SHAPES)}")
    return model, MODEL_SHAPES[model]()


def _optimizers(config: Config, **arguments: Any) -> dict[str, optax.GradientTransformation]:
    optimizers = {name: make() for name, make in PEERS.items()}
    with input_errors():
        for name in config.preset or tuple(harness.presets()):
            options = dict(arguments)
            if name in STAND_INS:
                weights = VeloWeights(init_theta(STAND_INS[name], jax.random.key(0)), STAND_INS[name])
                options |= {"weights": weights, "total_steps": 10_000}
            optimizers[name] = harness.build(
                name, 1e-3, state_dtype=config.state_dtype, kernel=config.kernel, **options
            )
    return optimizers


def _ratio(cost: StepCost, peer: StepCost) -> str:
    return f"{median_ratio(cost.seconds, peer.seconds):.2f}" if cost.seconds else "-"


def _milliseconds(seconds: tuple[float, ...]) -> str:
    if not seconds:
        return "-"
    if len(seconds) == 1:
        return f"{1e3 * seconds[0]:.1f}"
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return f"{1e3 * median:.1f} ({1e3 * low:.1f}-{1e3 * high:.1f})"


def _progress(message: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{message:<60}\r", end="", file=sys.stderr, flush=True)
