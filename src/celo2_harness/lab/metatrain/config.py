"""What a meta-training run is, in one frozen record that is saved with it."""

import dataclasses
from typing import Literal, cast, get_args

from celo2_harness.lab.metatrain.augmentation import AUGMENTATIONS
from celo2_harness.lab.metatrain.estimators import ESTIMATORS
from celo2_harness.lab.metatrain.inner_schedules import INNER_SCHEDULES
from celo2_harness.lab.metatrain.outer_optimizers import OUTER_OPTIMIZERS, OUTER_SCHEDULES
from celo2_harness.rule import Normalization, RuleConfig
from celo2_harness.weights.weights_file import check_config


@dataclasses.dataclass(frozen=True)
class MetaTrainConfig:
    """The recipe of the paper (arXiv 2602.19142, section 4 and appendix); defaults are its values.

    Attributes:
      variant: "ortho" (matrices: learned rule + Newton-Schulz, biases: Adam), "base" (learned rule everywhere), or
        "velo_s" (another rule, a VeLO of `baselines.VELO_S`, everywhere: `rule`, `hidden`, `adam_factor` and the inner
        step sizes and schedules are not its own).
      rule: features, decays and normalisation of the rule.
      hidden: units of each hidden layer of the rule's network.
      widths: layer widths of the inner network; or several such tuples, over which the tasks of each set are spread (as
        words: 64 32 10, or 64-32-10 64-64-10).
      batch: images per inner step.
      smallest_batch: batch sizes are log-uniform in [smallest_batch, batch], drawn per unroll, on text in proportion;
        None: always batch.
      tasks_per_set: inner tasks per image set, each an antithetic pair.
      text_tasks: inner tasks on text, besides those on images; 0: none.
      text_batch: windows per inner step of a task on text.
      inner_learning_rates: (lowest, highest) step size of the inner update, drawn log-uniformly per task.
      inner_schedule: of the step size over an unroll, out of `INNER_SCHEDULES`: "constant", or "warmup_cosine" over the
        unroll's own length.
      inner_warmup: part of the unroll that is warm-up under "warmup_cosine".
      adam_factor: step size of the inner Adam (biases of "ortho") over that of the rule.
      shortest_unroll: fewest inner steps of one unroll; lengths are log-uniform.
      longest_unroll: most inner steps of one unroll.
      estimator: of the meta-gradient, out of `ESTIMATORS`: "pes", "es" or "full".
      truncation: inner steps per outer iteration (K); "full" runs whole unrolls instead.
      sigma: standard deviation of the perturbation of every number of theta.
      meta_loss: "mean" of the training losses of an unroll, or of its "last" steps.
      last_part: the part of an unroll that counts for meta_loss "last".
      augmentation: params are divided by alpha at init and multiplied by alpha in the loss, alpha log-uniform in
        [1 / augmentation, augmentation]; 1 switches it off.
      augmentation_level: what shares one alpha, out of `AUGMENTATIONS`: a task ("global"), a leaf ("tensor"), nothing
        ("parameter"), or one of these drawn per task ("mixed").
      iterations: outer iterations.
      outer_optimizer: out of `OUTER_OPTIMIZERS`: "adamw", "adam", "nadamw" or "sgd".
      outer_learning_rate: of the outer optimizer (its peak, unless `outer_schedule` is "constant").
      outer_schedule: out of `OUTER_SCHEDULES`: "constant", "cosine" or "linear" (to zero, after 2% linear warm-up).
      outer_weight_decay: of the outer optimizer, where it has one.
      seed: of everything random.
    """

    variant: Literal["ortho", "base", "velo_s"] = "ortho"
    rule: RuleConfig = RuleConfig()
    hidden: int = 8
    widths: tuple[int, ...] | tuple[tuple[int, ...], ...] = (64, 32, 10)
    batch: int = 64
    smallest_batch: int | None = None
    tasks_per_set: int = 8
    text_tasks: int = 0
    text_batch: int = 8
    inner_learning_rates: tuple[float, float] = (1e-3, 1e-3)
    inner_schedule: str = "constant"
    inner_warmup: float = 0.05
    adam_factor: float = 20.0
    shortest_unroll: int = 100
    longest_unroll: int = 2000
    estimator: str = "pes"
    truncation: int = 50
    sigma: float = 0.01
    meta_loss: Literal["mean", "last"] = "mean"
    last_part: float = 0.1
    augmentation: float = 1000.0
    augmentation_level: str = "global"
    iterations: int = 100_000
    outer_optimizer: str = "adamw"
    outer_learning_rate: float = 5e-5
    outer_schedule: str = "constant"
    outer_weight_decay: float = 1e-4
    seed: int = 0

    @property
    def networks(self) -> tuple[tuple[int, ...], ...]:
        """`widths` as a tuple of layer widths, however many there are."""
        if self.widths and isinstance(self.widths[0], int):
            return (cast(tuple[int, ...], self.widths),)
        return cast(tuple[tuple[int, ...], ...], self.widths)

    def __post_init__(self) -> None:
        choices = {
            "variant": ("ortho", "base", "velo_s"),
            "estimator": ESTIMATORS,
            "meta_loss": ("mean", "last"),
            "inner_schedule": INNER_SCHEDULES,
            "augmentation_level": AUGMENTATIONS,
            "outer_optimizer": OUTER_OPTIMIZERS,
            "outer_schedule": OUTER_SCHEDULES,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r}, expected one of {', '.join(known)}.")
        if self.rule.normalization not in get_args(Normalization):
            raise ValueError(
                f"rule.normalization = {self.rule.normalization!r}, expected one of"
                f" {', '.join(get_args(Normalization))}."
            )
        check_config(self.rule, "rule")
        for name in ("hidden", "batch", "tasks_per_set", "text_batch", "shortest_unroll", "truncation", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}, expected at least 1.")
        if self.text_tasks < 0:
            raise ValueError(f"text_tasks = {self.text_tasks}, expected at least 0.")
        if self.smallest_batch is not None and not 1 <= self.smallest_batch <= self.batch:
            raise ValueError(
                f"smallest_batch = {self.smallest_batch}, expected at least 1 and at most batch = {self.batch}."
            )
        if self.estimator != "full" and self.truncation > self.shortest_unroll:
            raise ValueError(
                f"truncation = {self.truncation} must not exceed shortest_unroll = {self.shortest_unroll}: an unroll"
                " may restart once per truncation."
            )
        if self.longest_unroll < self.shortest_unroll:
            raise ValueError(
                f"longest_unroll = {self.longest_unroll}, expected at least shortest_unroll = {self.shortest_unroll}."
            )
        lowest, highest = self.inner_learning_rates
        # Comparisons are written so that NaN fails them.
        bounds = {
            "sigma": (self.sigma, 0 < self.sigma < float("inf"), "above 0"),
            "augmentation": (self.augmentation, 1 <= self.augmentation < float("inf"), "at least 1"),
            **{
                name: (getattr(self, name), 0 <= getattr(self, name) < float("inf"), "a finite number, at least 0")
                for name in ("adam_factor", "outer_learning_rate", "outer_weight_decay")
            },
            "seed": (self.seed, 0 <= self.seed < 2**32, "at least 0 and below 2^32"),
            "last_part": (self.last_part, 0 < self.last_part <= 1, "above 0 and at most 1"),
            "inner_warmup": (self.inner_warmup, 0 <= self.inner_warmup < 1, "at least 0 and below 1"),
            "inner_learning_rates": (
                self.inner_learning_rates,
                0 < lowest <= highest < float("inf"),
                "(lowest, highest), above 0 and in order",
            ),
        }
        for name, (value, holds, expected) in bounds.items():
            if not holds:
                raise ValueError(f"{name} = {value}, expected {expected}.")
        if not self.networks:
            raise ValueError("widths = (): expected the layer widths of a network, such as (64, 32, 10).")
        for widths in self.networks:
            if len(widths) < 2 or widths[0] != 64 or widths[-1] != 10 or min(widths) < 1:
                raise ValueError(f"widths = {widths}: expected 64 inputs and 10 outputs, as 8x8 images of 10 classes.")
        if self.tasks_per_set % len(self.networks):
            raise ValueError(
                f"tasks_per_set = {self.tasks_per_set} cannot be spread over {len(self.networks)} networks (widths);"
                " it must be a multiple."
            )
