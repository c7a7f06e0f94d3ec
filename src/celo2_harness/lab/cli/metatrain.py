"""`celo2 metatrain`: learn a rule on small image tasks."""

import contextlib
import dataclasses
import datetime
import json
import os
import sys
import time
import typing
from pathlib import Path
from typing import Any

import jax
import tyro
from jax.sharding import Mesh

from celo2_harness.lab.cli._language_score import language_evaluation
from celo2_harness.lab.cli._setup import MOST_DEVICES, input_errors
from celo2_harness.lab.metatrain import MetaTrainConfig, load_portable, run_metatrain, saved_run, task_mesh
from celo2_harness.lab.suites import InputError, StopSignals, plot_meta_loss

PICTURE = "meta-loss.png"
REGISTRY = tyro.constructors.ConstructorRegistry()
_REDRAW_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Config:
    """Meta-train the rule with evolution strategies on 8x8 image tasks.

    Metrics, a picture of the meta-loss, checkpoints and at the end weights.celo2 go to a folder. Ctrl-C saves and
    stops; --resume goes on.
    """

    data: str = "digits"
    """digits (scikit-learn's), a folder of NAME_8x8.npz files (see celo2 data prepare), or a folder of IDX images."""
    sets: tuple[str, ...] = ()
    """Image sets of the source; by default all."""
    inner_text: Path | None = None
    """Text file of the tasks on text, which --text-tasks asks for; by default the language reference that comes with
    Python."""
    start_from: str | None = None
    """Weights to begin with: a bundled name or a file; by default random ones."""
    continue_from: Path | None = None
    """portable.msgpack of another run, to go on from in a new folder with its configuration; --data is needed again."""
    out: Path = Path("runs/metatrain")
    """Folder of the run."""
    resume: bool = False
    """Continue the run in the folder with its own settings. Other options may be left out."""
    devices: int = 0
    """Devices that the tasks are spread over: cores, or graphics cards; 0 for all. The result is the same but for
    rounding, so that a resumed run takes as many as before."""
    checkpoint_every: int = 100
    """Iterations between checkpoints."""
    log_every: int = 10
    """Iterations between lines of metrics."""
    eval_every: int = 0
    """Iterations between evaluations on a small language model, for celo2 metatrain select; 0 for none."""
    text: Path | None = None
    """Text of the language model; by default the language reference that comes with Python."""
    eval_model: str = "nano"
    """Size of the language model; see celo2 train."""
    eval_steps: int = 300
    """Training steps of the language model."""
    eval_learning_rates: tuple[float, ...] = ()
    """Learning rates of the language model; the best one counts. By default 1e-3, for a VeLO 1."""
    rule: typing.Literal["celo2", "velo_s"] | None = None
    """What is learned: celo2, or velo_s, which is short for --variant velo_s."""
    config: tyro.conf.OmitArgPrefixes[MetaTrainConfig] = MetaTrainConfig()
    """The recipe."""


@REGISTRY.primitive_rule
def _widths(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Layer widths: numbers for one network, or a word such as 64-32-10 for each of several."""
    if info.type != typing.get_type_hints(MetaTrainConfig)["widths"]:
        return None

    def read(words: list[str]) -> tuple[Any, ...]:
        if not any("-" in word for word in words):
            return tuple(map(int, words))
        return tuple(tuple(map(int, word.split("-"))) for word in words)

    def write(widths: tuple[Any, ...]) -> list[str]:
        return [str(item) if isinstance(item, int) else "-".join(map(str, item)) for item in widths]

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="INT [INT ...] | INT-INT[-...] [...]",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=write,
    )


_RUN_OPTIONS = (
    "data",
    "sets",
    "inner_text",
    "start_from",
    "continue_from",
    "out",
    "resume",
    "checkpoint_every",
    "log_every",
)
_FILES = ("text", "inner_text")
# What is not among the options that a run writes down for the one that resumes it.
_NOT_SAVED = ("out", "resume", "start_from", "continue_from", "devices", "rule", "config")


def defaults(config: Config) -> Config:
    """Returns the options that hold where none is given: those of the run that is resumed or continued."""
    with input_errors():
        if config.resume:
            saved = saved_run(config.out)
            known = {field.name for field in dataclasses.fields(Config)} - set(_NOT_SAVED)
            options = {name: value for name, value in saved.options.items() if name in known}
            options |= {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
            options |= {name: Path(options[name]) for name in _FILES if options.get(name) is not None}
            return Config(config=saved.config, devices=saved.devices, **options)
        if config.continue_from is not None:
            return Config(config=load_portable(config.continue_from).config)
    return Config()


def run(config: Config) -> int:
    """Meta-trains; returns 0 if the run finished, 130 if it was interrupted."""
    config = _with_rule(config)
    mesh = _mesh(config.devices)
    run_options = {name: getattr(config, name) for name in _RUN_OPTIONS}
    with StopSignals() as stop, _Display(config) as display:
        evaluation = None
        if config.eval_every:
            evaluation = language_evaluation(
                every=config.eval_every,
                variant=config.config.variant,
                text=config.text,
                model=config.eval_model,
                steps=config.eval_steps,
                learning_rates=config.eval_learning_rates,
                stop=lambda: stop.requested,
            )
        with input_errors():
            weights = run_metatrain(
                config.config,
                mesh=mesh,
                evaluation=evaluation,
                options=_options(config),
                on_start=display.start,
                on_log=display.show,
                on_evaluation=display.show_evaluation,
                warn=lambda message: print(f"celo2: warning: {message}", file=sys.stderr),
                stop=lambda: stop.requested,
                **run_options,
            )
    _draw(config)
    if weights is None:
        print(f"saved; go on with: celo2 metatrain --resume --out {config.out}", file=sys.stderr)
        return 130
    print(f"weights: {config.out / 'weights.celo2'}\npicture: {config.out / PICTURE}")
    return 0


def _with_rule(config: Config) -> Config:
    """The option `rule` is a word about the recipe's variant."""
    is_velo = config.config.variant == "velo_s"
    if config.rule == "velo_s" and not is_velo:
        return dataclasses.replace(config, config=dataclasses.replace(config.config, variant="velo_s"))
    if config.rule == "celo2" and is_velo:
        raise InputError("rule = celo2, but the variant is velo_s; choose --variant ortho or base")
    return config


def _mesh(devices: int) -> Mesh:
    """A mesh of so many devices; a CPU becomes one device per core, if JAX has not run anything yet."""
    if not 0 <= devices <= MOST_DEVICES:
        raise InputError(f"devices = {devices}: expected a number above 0, or 0 for all, at most {MOST_DEVICES}")
    with contextlib.suppress(RuntimeError):  # JAX has started, with the devices that it has
        jax.config.update("jax_num_cpu_devices", devices or _cores())
    there = jax.devices()
    if devices > len(there):
        raise InputError(
            f"devices = {devices}: JAX has {len(there)} of the platform {there[0].platform}; choose 0 to {len(there)}"
        )
    return task_mesh(there[: devices or None])


def _cores() -> int:
    # Containers and batch systems often give a process fewer cores than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Display:
    """A bar in a terminal, lines elsewhere, and the picture once a minute."""

    def __init__(self, config: Config):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._config, self._drawn, self._score = config, time.monotonic(), ""
        # The time left is ours: the bar's own estimate would count what an earlier process did as done at once.
        columns = (TextColumn("metatrain"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
        self._bar = Progress(*columns, disable=not sys.stdout.isatty())
        self._task = self._bar.add_task("metatrain", total=config.config.iterations, status="loading", start=True)

    def __enter__(self) -> "_Display":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def start(self, iteration: int) -> None:
        self._bar.update(self._task, completed=iteration, status="compiling")
        if self._bar.disable and iteration:
            print(f"goes on from iteration {iteration}", flush=True)

    def show(self, line: dict[str, Any]) -> None:
        iteration, total, speed = line["iteration"], self._config.config.iterations, line["iterations_per_second"]
        parts = [f"{name} {loss:.3f}" for name, loss in line["meta_loss"].items()]
        if speed:
            left = datetime.timedelta(seconds=round((total - iteration) / speed))
            parts.append(f"{speed:.2f} it/s  {left} left")
        self._bar.update(self._task, completed=iteration, status="  ".join([*parts, self._score]))
        if self._bar.disable:
            print(f"iteration {iteration}/{total}  {'  '.join(parts)}", flush=True)
        if time.monotonic() - self._drawn > _REDRAW_SECONDS:
            _draw(self._config)
            self._drawn = time.monotonic()

    def show_evaluation(self, record: dict[str, Any]) -> None:
        self._score = "diverged" if record["score"] is None else f"score {record['score']:.4f}"
        if self._bar.disable:
            print(f"iteration {record['iteration']}: language model {self._score}", flush=True)


def _draw(config: Config) -> None:
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()[1:]]
    title = f"{config.config.variant}, outer learning rate {config.config.outer_learning_rate:g}: {config.out.name}"
    plot_meta_loss(lines, config.out / PICTURE, title)


def _options(config: Config) -> dict[str, Any]:
    """What `defaults` finds again; paths in full, because a run may be resumed from another folder."""
    options = {
        field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name not in _NOT_SAVED
    }
    options |= {name: str(options[name].absolute()) for name in _FILES if options[name] is not None}
    if Path(config.data).exists():
        options["data"] = str(Path(config.data).absolute())
    return options
