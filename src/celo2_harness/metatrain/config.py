"""What a meta-training run is, in one frozen record that is saved with it."""

import dataclasses
from typing import Literal

from celo2_harness.rule import RuleConfig


@dataclasses.dataclass(frozen=True)
class MetaTrainConfig:
    """The recipe of the paper (arXiv 2602.19142, section 4 and appendix); defaults are its values.

    Attributes:
      variant: "ortho" (matrices: learned rule + Newton-Schulz, biases: Adam) or "base" (learned rule everywhere).
      rule: features, decays and normalisation of the rule.
      hidden: units of each hidden layer of the rule's network.
      widths: layer widths of the inner task.
      batch: images per inner step.
      tasks_per_set: inner tasks per image set, each an antithetic pair.
      inner_learning_rate: step size of the inner update.
      adam_factor: step size of the inner Adam (biases of "ortho") over `inner_learning_rate`.
      shortest_unroll: fewest inner steps of one unroll; lengths are log-uniform.
      longest_unroll: most inner steps of one unroll.
      truncation: inner steps per outer iteration (K).
      sigma: standard deviation of the perturbation of every number of theta.
      augmentation: params are divided by alpha at init and multiplied by alpha in the loss, alpha log-uniform in
        [1 / augmentation, augmentation], one per task; 1 switches it off.
      iterations: outer iterations.
      outer_learning_rate: of the outer AdamW (its peak, if `outer_schedule` is "cosine").
      outer_schedule: "constant", or "cosine" (to zero, after 2% linear warm-up).
      outer_weight_decay: of the outer AdamW.
      seed: of everything random.
    """

    variant: Literal["ortho", "base"] = "ortho"
    rule: RuleConfig = RuleConfig()
    hidden: int = 8
    widths: tuple[int, ...] = (64, 32, 10)
    batch: int = 64
    tasks_per_set: int = 8
    inner_learning_rate: float = 1e-3
    adam_factor: float = 20.0
    shortest_unroll: int = 100
    longest_unroll: int = 2000
    truncation: int = 50
    sigma: float = 0.01
    augmentation: float = 1000.0
    iterations: int = 100_000
    outer_learning_rate: float = 5e-5
    outer_schedule: Literal["constant", "cosine"] = "constant"
    outer_weight_decay: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.truncation > self.shortest_unroll:
            raise ValueError(
                f"truncation = {self.truncation} must not exceed shortest_unroll = {self.shortest_unroll}: an unroll"
                " may restart once per truncation."
            )
        for name in ("hidden", "batch", "tasks_per_set", "truncation", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}, expected at least 1.")
        if not self.sigma > 0 or not self.augmentation >= 1 or self.longest_unroll < self.shortest_unroll:
            raise ValueError(
                f"expected sigma > 0, augmentation >= 1 and longest_unroll >= shortest_unroll; got {self.sigma},"
                f" {self.augmentation}, {self.longest_unroll} and {self.shortest_unroll}."
            )
        if self.rule.normalization not in ("per_step", "none"):
            raise ValueError(
                f"rule.normalization = {self.rule.normalization!r}: the inner loop knows 'per_step' and 'none'."
            )
        if self.widths[0] != 64 or self.widths[-1] != 10 or len(self.widths) < 2:
            raise ValueError(f"widths = {self.widths}: expected 64 inputs and 10 outputs, as 8x8 images of 10 classes.")
