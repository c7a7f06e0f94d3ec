"""The score of a rule: how well a small language model learns under it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from celo2_harness import harness
from celo2_harness.lab.errors import InputError, input_errors
from celo2_harness.lab.metatrain import Evaluation
from celo2_harness.lab.tasks import make_language_model
from celo2_harness.lab.training.loop import init_state, train_step, train_steps
from celo2_harness.lab.training.optimizers import preset_spec
from celo2_harness.velo import VELO_S, VeloWeights, init_theta

# Which preset a variant's rule was trained for.
_PRESETS = {"ortho": "celo2_ortho", "base": "celo2_base", "velo_s": "velo_s"}
_BATCH = 16


def language_evaluation(
    *,
    every: int,
    variant: str,
    text: Path | None,
    model: str,
    steps: int,
    learning_rates: Sequence[float],
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Judges a rule by the held-out loss at the end of a short training run of a byte-level GPT.

    Args:
        every: Iterations between evaluations.
        variant: Of the rule.
        text: A text file, or None for the text that Python carries.
        model: A name in `MODELS`.
        steps: Training steps.
        learning_rates: Peak learning rates; the best one counts. None given: 1e-3, or 1 for a VeLO.
        stop: Asked after every step.

    Returns:
        The evaluation. Its score is in nats per byte, NaN where all runs diverged.

    Raises:
        InputError: if an option is wrong.
    """
    if every < 1:
        raise InputError(f"eval_every = {every}: expected at least 1")
    learning_rates = learning_rates or (float(harness.presets()[_PRESETS[variant]].learning_rate),)
    with input_errors():
        task = make_language_model(model, text, _BATCH)
    optimizer = {"preset": _PRESETS[variant], "total_steps": steps, "weight_decay": 0.1}
    # Refused before the run starts, not at its first evaluation. A VeLO has no weights until then.
    first = {"weights": VeloWeights(init_theta(VELO_S, jax.random.key(0)), VELO_S)} if variant == "velo_s" else {}
    for rate in learning_rates:
        preset_spec(learning_rate=rate, **first, **optimizer)

    def train(weights: Any, learning_rate: float) -> float | None:
        tx = preset_spec(learning_rate=learning_rate, weights=weights, **optimizer).tx
        state, loss = init_state(task, tx, 0), float("nan")
        for progress in train_steps(task, tx, state, steps=steps, seed=0, eval_every=steps):
            loss = progress.validation_loss if progress.validation_loss is not None else loss
            if stop():
                return None
        return loss

    def score(weights: Any) -> float | None:
        losses = []
        for rate in learning_rates:
            losses.append(train(weights, rate))
            # Every theta compiles a program of its own, which nobody runs again.
            train_step.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]
            if losses[-1] is None:
                return None
        finite = [loss for loss in losses if jax.numpy.isfinite(loss)]
        return min(finite, default=float("nan"))

    described = task.describe()
    settings = {
        "model": model,
        "text_sha256": described["text"]["sha256"],
        "batch": _BATCH,
        "context": task.config.context,
        "steps": steps,
        "preset": optimizer["preset"],
        "weight_decay": optimizer["weight_decay"],
        "learning_rates": list(learning_rates),
        "seed": 0,
    }
    return Evaluation(every, settings, score)
