"""A meta-training run in a folder: metrics, checkpoints, scores along the way, and the weights at the end."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from celo2_harness.lab.metatrain.card import write_weights
from celo2_harness.lab.metatrain.config import MetaTrainConfig
from celo2_harness.lab.metatrain.data import MetaTrainData
from celo2_harness.lab.metatrain.evaluations import WEIGHTS_FILE, Evaluation, with_scores
from celo2_harness.lab.metatrain.learned import AnyWeights
from celo2_harness.lab.metatrain.loop import metatrain
from celo2_harness.lab.metatrain.outer import MetaTrainState, init_metatrain
from celo2_harness.lab.metatrain.references import with_references
from celo2_harness.lab.metatrain.starts import starting_theta
from celo2_harness.lab.training.folder import Progress, RunFolder, open_run
from celo2_harness.lab.training.provenance import provenance


def run_metatrain(
    config: MetaTrainConfig,
    data: MetaTrainData,
    folder: str | Path,
    *,
    start_from: str | None = None,
    resume: bool = False,
    checkpoint_every: int = 100,
    log_every: int = 10,
    mesh: Mesh | None = None,
    evaluation: Evaluation | None = None,
    options: Mapping[str, Any] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_start: Callable[[int], None] = lambda step: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> AnyWeights | None:
    """Meta-trains a rule and writes it to a folder, in which only one run at a time may work.

    Args:
        config: The recipe.
        data: The data, from `load_data`.
        folder: The run folder: `metrics.jsonl`, `checkpoints/`, and at the end `weights.celo2` with its card
            `weights.md`; with `evaluation` also `snapshots/`.
        start_from: The weights to begin with, or a rule made by hand (see `starting_theta`); by default random numbers.
            A run that goes on does not read them again.
        resume: Whether to go on from the newest checkpoint of the folder, to the bits of a run that was never stopped.
        checkpoint_every: The number of iterations between checkpoints.
        log_every: The number of iterations between lines of metrics.
        mesh: The devices that the tasks are spread over, from `task_mesh`; their number divides that of the tasks.
        evaluation: The evaluation that scores thetas along the way.
        options: Facts that `read_header` finds again. They are never compared.
        should_stop: Asked after every iteration; once it says yes, a checkpoint is saved and the run returns.
        on_start: Called with the iteration that the run starts from.
        on_progress: Called after every iteration and every evaluation.

    Returns:
        The weights, or None if the run was stopped before the end.

    Raises:
        InputError: If the folder holds a run (without `resume`), none (with it), or a run of other settings; or if it
            cannot be written. The checkpoints in it stay whole in every case.
        ValueError: If the weights to begin with are of another rule.
    """
    folder, learned = Path(folder), config.learned
    settings = {
        "config": dataclasses.asdict(config),
        "start_from": start_from,
        "sets": data.sets,
        **data.digests,
        "evaluation": None if evaluation is None else {"every": evaluation.every, **evaluation.settings},
    }
    with open_run(folder, settings, options=options, resume=resume) as run:
        if run.status == "finished" and (folder / WEIGHTS_FILE).exists():
            return learned.load(folder / WEIGHTS_FILE)
        state = init_metatrain(config, len(data.sets))
        if not run.saved_steps():
            state = prepared(config, data, state, start_from)
            # First of all, so that the run can always be resumed without the file that it came from.
            run.save(0, state)
        start, state = run.begin(state)
        on_start(start)
        progress = metatrain(config, data, state, log_every=log_every, mesh=mesh)
        last: list[MetaTrainState] = []

        def save(path: Path, state: MetaTrainState) -> AnyWeights:
            weights = learned.weights(state.theta, _facts(run, state))
            (folder / path).parent.mkdir(exist_ok=True)
            learned.save(folder / path, weights)
            return weights

        def follow(now: Progress) -> None:
            last[:] = [now.state]
            on_progress(now)

        if evaluation is not None:
            scored = {line["step"] for line in run.lines if line["kind"] == "evaluation"}
            progress = with_scores(progress, evaluation, config.iterations, scored, save)
        status = run.follow(
            progress,
            steps=config.iterations,
            checkpoint_every=checkpoint_every,
            should_stop=should_stop,
            on_progress=follow,
        )
        if status == "interrupted":
            return None
        weights = learned.weights(last[0].theta, _facts(run, last[0]))
        write_weights(folder / WEIGHTS_FILE, weights, learned)
        return weights


def prepared(
    config: MetaTrainConfig, data: MetaTrainData, state: MetaTrainState, start_from: str | None
) -> MetaTrainState:
    """Returns the state before the first iteration with the theta to start from and with the reference losses."""
    if start_from is not None:
        state = state._replace(theta=starting_theta(config, state.theta, start_from))
    return with_references(config, state, data.inner)


def _facts(run: RunFolder, state: MetaTrainState) -> dict[str, Any]:
    """Returns what the weights of a state say of where they come from."""
    settings = {name: value for name, value in run.header["settings"].items() if name != "evaluation"}
    lines = {kind: [line for line in run.lines if line["kind"] == kind] for kind in ("progress", "digest")}
    digests = [{"iteration": line["step"], "sha256": line["theta_sha256"]} for line in lines["digest"]]
    return {
        **settings,
        **({"theta_digest": digests[0]} if digests else {}),
        "iterations": int(state.iteration),
        "seconds": max((line["seconds"] for line in run.lines), default=0.0),
        "final_meta_loss": lines["progress"][-1]["meta_loss"] if lines["progress"] else None,
        **provenance(),
    }
