"""The recipe of a meta-training run, in one frozen record that is saved with it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from celo2_harness.lab.metatrain.celo2_rule import Celo2Learning
from celo2_harness.lab.metatrain.learned import LearnedRule
from celo2_harness.lab.metatrain.velo_rule import VeloLearning
from celo2_harness.rule import RuleConfig
from celo2_harness.weights.weights_file import check_config

INPUTS, CLASSES = 64, 10
"""What the inner networks see and predict: 8x8 images of ten classes."""


@dataclasses.dataclass(frozen=True)
class MetaTrainConfig:
    """The recipe of the paper (arXiv 2602.19142, section 4 and appendix); the defaults are its values.

    Attributes:
        variant: "ortho" (matrices follow the learned rule and Newton-Schulz, biases Adam), "base" (everything follows
            the learned rule), or "velo_s" (everything follows a small VeLO, for which `rule`, `hidden`, `adam_factor`
            and the inner step sizes and schedules do not count).
        rule: The features, decays and normalisation of the rule.
        hidden: The units of each hidden layer of the rule's network.
        eigenbasis: Whether the rule acts in the eigenbasis of the gradients' covariance on hidden matrices, as the
            preset `celo2` has it (see `in_eigenbasis`); of variant "ortho" only.
        widths: The layer widths of the inner networks, one word per network, over which the tasks of each image set are
            spread: for example "64-32-10", or "64-32-10" and "64-64-10".
        batch: The number of images in an inner step.
        tasks_per_set: The number of inner tasks per image set, each an antithetic pair.
        text_tasks: The number of inner tasks on text, besides those on images.
        text_batch: The number of windows in an inner step of a task on text.
        text_width: The width of the GPT in tasks on text, an even number.
        text_layers: The number of its blocks.
        inner_learning_rates: The lowest and highest step size of the inner update, drawn log-uniformly per task.
        inner_schedule: The schedule of the step size over an unroll: "constant", or "warmup_cosine" over the length of
            the unroll.
        adam_factor: The step size of the inner Adam (biases in "ortho") over that of the rule.
        shortest_unroll: The fewest inner steps of an unroll; lengths are log-uniform.
        longest_unroll: The most inner steps of an unroll.
        estimator: The estimator of the meta-gradient: "pes", "es" or "full" (see `estimators`).
        truncation: The number K of inner steps per outer iteration; "full" runs whole unrolls instead.
        sigma: The standard deviation of the perturbation of every number of theta.
        meta_loss: "mean" for the mean of the training losses of an unroll, "last" for that of its last steps.
        last_part: The part of an unroll that counts for the meta-loss "last".
        instances: The number of different unrolls of a task, each with its own start, length, step size and batches,
            among which every new one is drawn; 0 for no end of them.
        reference: "muon" for a meta-loss relative to what Muon reaches in the same unroll, with the same start, step
            size and batches; "none" for the loss itself. It is measured once for each of the `instances`.
        augmentation: The bound of alpha: parameters are divided by alpha at the start and multiplied by alpha in the
            loss, and alpha is log-uniform in [1 / augmentation, augmentation]. 1 switches it off.
        iterations: The number of outer iterations.
        outer_learning_rate: The learning rate of AdamW on theta, at its peak.
        outer_schedule: The schedule of the outer learning rate: "constant", or "cosine" to zero after a linear warm-up
            of 2%.
        outer_weight_decay: The weight decay of AdamW on theta.
        seed: The seed of everything random.
    """

    variant: Literal["ortho", "base", "velo_s"] = "ortho"
    rule: RuleConfig = RuleConfig()
    hidden: int = 8
    eigenbasis: bool = False
    widths: tuple[str, ...] = ("64-32-10",)
    batch: int = 64
    tasks_per_set: int = 8
    text_tasks: int = 0
    text_batch: int = 8
    text_width: int = 16
    text_layers: int = 1
    inner_learning_rates: tuple[float, float] = (1e-3, 1e-3)
    inner_schedule: Literal["constant", "warmup_cosine"] = "constant"
    adam_factor: float = 20.0
    shortest_unroll: int = 100
    longest_unroll: int = 2000
    estimator: Literal["pes", "es", "full"] = "pes"
    truncation: int = 50
    sigma: float = 0.01
    meta_loss: Literal["mean", "last"] = "mean"
    last_part: float = 0.1
    instances: int = 0
    reference: Literal["none", "muon"] = "none"
    augmentation: float = 1000.0
    iterations: int = 100_000
    outer_learning_rate: float = 5e-5
    outer_schedule: Literal["constant", "cosine"] = "constant"
    outer_weight_decay: float = 1e-4
    seed: int = 0

    @property
    def networks(self) -> tuple[tuple[int, ...], ...]:
        """The layer widths of each inner network, as numbers."""
        return tuple(tuple(map(int, word.split("-"))) for word in self.widths)

    @property
    def learned(self) -> LearnedRule:
        """What is learned, as functions of theta."""
        if self.variant == "velo_s":
            return VeloLearning()
        return Celo2Learning(self.rule, self.hidden, self.variant == "ortho", self.adam_factor, self.eigenbasis)

    def __post_init__(self) -> None:
        check_config(self.rule, "rule")
        for name, hint in get_type_hints(MetaTrainConfig).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise ValueError(f"{name} = {value!r}, expected one of {', '.join(get_args(hint))}.")
        low, high = self.inner_learning_rates
        # Comparisons are written so that NaN fails them.
        counts = ("hidden", "batch", "tasks_per_set", "text_batch", "text_layers", "shortest_unroll", "iterations")
        zero_or_more = ("adam_factor", "outer_learning_rate", "outer_weight_decay", "text_tasks", "instances")
        expected = {
            **{name: (getattr(self, name) >= 1, "at least 1") for name in counts},
            **{name: (0 <= getattr(self, name) < float("inf"), "a finite number, at least 0") for name in zero_or_more},
            "text_width": (self.text_width >= 2 and self.text_width % 2 == 0, "an even number, at least 2"),
            "sigma": (0 < self.sigma < float("inf"), "above 0"),
            "augmentation": (1 <= self.augmentation < float("inf"), "at least 1"),
            "seed": (0 <= self.seed < 2**32, "at least 0 and below 2^32"),
            "last_part": (0 < self.last_part <= 1, "above 0 and at most 1"),
            "eigenbasis": (not self.eigenbasis or self.variant == "ortho", "False in other variants than ortho"),
            "reference": (
                self.reference == "none" or self.instances > 0,
                "none, or at least one of instances, whose reference is measured",
            ),
            "inner_learning_rates": (0 < low <= high < float("inf"), "(lowest, highest), above 0 and in order"),
            "longest_unroll": (
                self.longest_unroll >= self.shortest_unroll,
                f"at least shortest_unroll = {self.shortest_unroll}",
            ),
            # An unroll may restart once per truncation.
            "truncation": (
                self.truncation >= 1 and (self.estimator == "full" or self.truncation <= self.shortest_unroll),
                f"1 to shortest_unroll = {self.shortest_unroll}",
            ),
        }
        for name, (holds, wanted) in expected.items():
            if not holds:
                raise ValueError(f"{name} = {getattr(self, name)}, expected {wanted}.")
        for word in self.widths:
            layers = [int(part) if part.isdecimal() else 0 for part in word.split("-")]
            if len(layers) < 2 or layers[0] != INPUTS or layers[-1] != CLASSES or min(layers) < 1:
                raise ValueError(
                    f"widths = {word}: expected layers from {INPUTS} inputs to {CLASSES} outputs, such as 64-32-10."
                )
        if not self.widths or self.tasks_per_set % len(self.widths):
            raise ValueError(
                f"tasks_per_set = {self.tasks_per_set} cannot be spread over {len(self.widths)} networks (widths); it"
                " must be a multiple."
            )


def config_from(record: Mapping[str, Any]) -> MetaTrainConfig:
    """Returns the configuration that `dataclasses.asdict` and JSON have made a record of.

    Args:
        record: The fields by name.

    Returns:
        The configuration.

    Raises:
        ValueError: If a field is unknown or its value is impossible.

    Example:
        >>> config_from(dataclasses.asdict(MetaTrainConfig(seed=3))).seed
        3
    """

    def tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}

    try:
        fields = tuples(record)
        fields["rule"] = RuleConfig(**tuples(record["rule"]))
        return MetaTrainConfig(**fields)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not a configuration of a meta-training run: {error}") from None
