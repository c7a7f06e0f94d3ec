"""`celo2 metatrain`: learn a rule on small image tasks."""

import contextlib
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from jax.sharding import Mesh

from celo2_harness.lab.cli._devices import MOST_DEVICES
from celo2_harness.lab.errors import InputError, check_range, input_errors
from celo2_harness.lab.metatrain import (
    MetaTrainConfig,
    MetaTrainData,
    config_from,
    fitting_mesh,
    load_data,
    run_groups,
    run_metatrain,
    task_mesh,
)
from celo2_harness.lab.metatrain.language_score import language_evaluation
from celo2_harness.lab.metatrain.plot import plot_meta_loss
from celo2_harness.lab.training.display import Display
from celo2_harness.lab.training.folder import METRICS, Progress, read_header, read_lines
from celo2_harness.lab.training.interrupt import StopSignals

PICTURE = "meta-loss.png"
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
    """Weights to begin with: a bundled name, a file, or a rule made by hand: muon, or (with --eigenbasis) soap;
    muon:1,1.9,0.76 has weights of the gradient and the momenta of one's own. By default random ones."""
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
    rule: Literal["celo2", "velo_s"] | None = None
    """What is learned: celo2, or velo_s, which is short for --variant velo_s."""
    config: tyro.conf.OmitArgPrefixes[MetaTrainConfig] = MetaTrainConfig()
    """The recipe."""


# What a run writes down for the one that resumes it. Paths in full: it may be resumed from another folder.
_SAVED = ("data", "inner_text", "checkpoint_every", "log_every", "eval_every", "text", "eval_model", "eval_steps")
_PATHS = ("inner_text", "text")


def defaults(config: Config) -> Config:
    """Returns the options that hold where none is given: those of the run that is resumed."""
    if not config.resume:
        return Config()
    with input_errors():
        header = read_header(config.out)
        settings, options = header["settings"], header["options"]
        saved = {name: options[name] for name in (*_SAVED, "devices")}
        saved |= {name: Path(saved[name]) for name in _PATHS if saved[name] is not None}
        return Config(
            config=config_from(settings["config"]),
            sets=tuple(settings["sets"]),
            start_from=settings["start_from"],
            eval_learning_rates=tuple(options["eval_learning_rates"]),
            **saved,
        )


def run(config: Config) -> int:
    """Meta-trains; returns 0 if the run finished, 130 if it was interrupted."""
    check_range(1, checkpoint_every=config.checkpoint_every, log_every=config.log_every)
    if not 0 <= config.devices <= MOST_DEVICES:
        raise InputError(f"devices = {config.devices}: expected 0 for all, or a number up to {MOST_DEVICES}")
    with input_errors(), StopSignals() as stop, Display("iterations") as display:
        recipe = _recipe(config)
        _make_devices(config.devices)  # before anything starts JAX
        data = load_data(recipe, config.data, config.sets, config.inner_text)
        mesh = _mesh(config, recipe, data)
        picture = _Picture(config.out, f"{recipe.variant}, outer learning rate {recipe.outer_learning_rate:g}")
        evaluation = None
        if config.eval_every:
            evaluation = language_evaluation(
                recipe,
                every=config.eval_every,
                text=config.text,
                model=config.eval_model,
                steps=config.eval_steps,
                learning_rates=config.eval_learning_rates,
                should_stop=lambda: stop.requested,
            )

        def show(now: Progress) -> None:
            display.update(now)
            picture.draw_now_and_then()

        weights = run_metatrain(
            recipe,
            data,
            config.out,
            start_from=config.start_from,
            resume=config.resume,
            checkpoint_every=config.checkpoint_every,
            log_every=config.log_every,
            mesh=mesh,
            evaluation=evaluation,
            options=_options(config) | {"devices": mesh.size},
            should_stop=lambda: stop.requested,
            on_start=lambda step: display.start("metatrain", recipe.iterations, step),
            on_progress=show,
        )
        picture.draw()
    if weights is None:
        print(f"saved; go on with: celo2 metatrain --resume --out {config.out}", file=sys.stderr)
        return 130
    print(f"weights: {config.out / 'weights.celo2'}\npicture: {config.out / PICTURE}")
    return 0


def _recipe(config: Config) -> MetaTrainConfig:
    """The option `rule` is a word about the recipe's variant."""
    is_velo = config.config.variant == "velo_s"
    if config.rule == "celo2" and is_velo:
        raise InputError("rule = celo2, but the variant is velo_s; choose --variant ortho or base")
    return dataclasses.replace(config.config, variant="velo_s") if config.rule == "velo_s" else config.config


def _make_devices(count: int) -> None:
    """Makes a device of every core, or so many, of a CPU, if JAX has not run anything yet."""
    # Containers and batch systems often give a process fewer cores than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):  # JAX has started, with the devices that it has
        jax.config.update("jax_num_cpu_devices", count or cores)


def _mesh(config: Config, recipe: MetaTrainConfig, data: MetaTrainData) -> Mesh:
    """The devices that are asked for, as many as the tasks can be spread over evenly."""
    there = jax.devices()
    if config.devices > len(there):
        raise InputError(
            f"devices = {config.devices}: JAX has {len(there)} of the platform {there[0].platform}; choose 0 to"
            f" {len(there)}"
        )
    mesh = task_mesh(there[: config.devices or None])
    fitting = fitting_mesh(mesh, run_groups(recipe, len(data.sets)))
    if fitting.size < mesh.size:
        print(
            f"celo2: warning: the tasks cannot be spread evenly over {mesh.size} devices; {fitting.size} are used.",
            file=sys.stderr,
        )
    return fitting


class _Picture:
    """The picture of a run, drawn once a minute and at the end."""

    def __init__(self, folder: Path, title: str):
        self._folder, self._title, self._drawn = folder, f"{title}: {folder.name}", time.monotonic()

    def draw_now_and_then(self) -> None:
        """Draws if the last picture is some time ago."""
        if time.monotonic() - self._drawn > _REDRAW_SECONDS:
            self.draw()
            self._drawn = time.monotonic()

    def draw(self) -> None:
        """Draws what the metrics say by now."""
        plot_meta_loss(read_lines(self._folder / METRICS), self._folder / PICTURE, self._title)


def _options(config: Config) -> dict[str, Any]:
    options = {name: getattr(config, name) for name in (*_SAVED, "eval_learning_rates")}
    options |= {name: str(options[name].absolute()) for name in _PATHS if options[name] is not None}
    if Path(config.data).exists():
        options["data"] = str(Path(config.data).absolute())
    return options
