"""The score of a rule: how well a small language model learns under it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from celo2_harness import harness
from celo2_harness.lab.errors import check_range
from celo2_harness.lab.metatrain.config import MetaTrainConfig
from celo2_harness.lab.metatrain.evaluations import Evaluation
from celo2_harness.lab.tasks import make_language_model
from celo2_harness.lab.training.loop import init_state, train_step, train_steps

# Which preset a variant's rule is trained for; one in the eigenbasis has its own.
_PRESETS = {"ortho": "celo2_ortho", "base": "celo2_base", "velo_s": "velo_s"}
_BATCH = 16


def language_evaluation(
    config: MetaTrainConfig,
    *,
    every: int,
    text: Path | None = None,
    model: str = "nano",
    steps: int = 300,
    learning_rates: Sequence[float] = (),
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Scores a rule by the held-out loss at the end of a short training run of a byte-level GPT.

    Args:
        config: The recipe, which says what kind of rule it is.
        every: The number of iterations between evaluations.
        text: A text file, or None for the text that Python carries.
        model: The name of a model in `celo2_harness.lab.tasks.MODELS`.
        steps: The number of training steps.
        learning_rates: Peak learning rates, of which the best counts; by default the preset's own.
        should_stop: Asked after every step; once it says yes, the score raises KeyboardInterrupt.

    Returns:
        The evaluation. Its score is in nats per byte, NaN where all runs diverged.

    Raises:
        ValueError: If an option is wrong.
    """
    check_range(1, eval_every=every, eval_steps=steps)
    preset = "celo2" if config.eigenbasis else _PRESETS[config.variant]
    learning_rates = tuple(learning_rates) or (float(harness.presets()[preset].learning_rate),)
    if min(learning_rates) <= 0:
        raise ValueError(f"eval_learning_rates = {learning_rates}: expected numbers above 0")
    task = make_language_model(model, text, _BATCH)
    optimizer: dict[str, Any] = {"preset": preset, "total_steps": steps, "weight_decay": 0.1}

    def final_loss(weights: Any, learning_rate: float) -> float:
        tx, loss = harness.build(learning_rate=learning_rate, weights=weights, **optimizer), float("nan")
        for now in train_steps(task, tx, init_state(task, tx, 0), steps=steps, seed=0, eval_every=steps):
            loss = loss if now.validation_loss is None else now.validation_loss
            if should_stop():
                raise KeyboardInterrupt
        # Every theta compiles a program of its own, which nobody runs again.
        train_step.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]
        return loss

    def score(weights: Any) -> float:
        losses = np.array([final_loss(weights, rate) for rate in learning_rates])
        return float(np.min(losses[np.isfinite(losses)], initial=np.inf)) if np.isfinite(losses).any() else float("nan")

    described = task.describe()
    settings = {
        "model": model,
        "text_sha256": described["text"]["sha256"],
        "batch": _BATCH,
        "context": described["model"]["context"],
        "steps": steps,
        "preset": preset,
        "weight_decay": optimizer["weight_decay"],
        "learning_rates": list(learning_rates),
        "seed": 0,
    }
    return Evaluation(every, settings, score)
