"""Whole optimizers from the blocks: `build` and `describe`. Assembly only, no arithmetic.

A preset sends hidden matrices to one direction and everything else to another. Each becomes a chain

    direction -> weight decay -> learning rate

and `optax.partition` joins them by the labels of `routing`. A preset whose leaves depend on each other has one
direction for all. Leaves labelled "frozen" get no update.
"""

import dataclasses
import inspect
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import optax
from beartype import BeartypeConf, beartype

from celo2_harness import routing
from celo2_harness._arguments import choose, number, run_length, warmup_length
from celo2_harness._trees import by_path, tree_bytes
from celo2_harness._types import Params, PyTree, ScalarOrSchedule, Updates
from celo2_harness._wrappers import explained, in_float32, wide_dtype
from celo2_harness.blocks import Celo2State, add_decayed_weights
from celo2_harness.blocks.decay import Mode
from celo2_harness.blocks.views import WeightDimensionNumbers
from celo2_harness.presets import (
    Group as Group,
    Preset as Preset,
    Settings as Settings,
    find_preset,
    preset_weights as preset_weights,
    presets as presets,
    register_preset as register_preset,
)
from celo2_harness.roles import (
    MATRICES as MATRICES,
    REST_ROLES as REST_ROLES,
    AdamW as AdamW,
    ByRole,
    by_role,
    checked_terms,
    rest_terms,
)
from celo2_harness.routing import RuleLike
from celo2_harness.rule import (
    kernel_here,
    resolve_kernel,
    resolve_state_dtype,
    sees_training_fraction,
    usual_precision,
)
from celo2_harness.schedules import SCHEDULES, scaled
from celo2_harness.sharding import Sharding, on_explicit_mesh, placed, resolve_shardings
from celo2_harness.velo import VeloWeights
from celo2_harness.weights import LinearWeights, Weights

# What `optax.inject_hyperparams(build, static_args=...)` must leave alone: they are no numbers of the update.
STATIC_ARGS = ("total_steps", "warmup", "state_dtype", "kernel", "precision", "sharding", "weight_dimension_numbers")

_checked = beartype(conf=BeartypeConf(violation_param_type=TypeError))


def build(
    preset: str | Preset = "celo2",
    learning_rate: ScalarOrSchedule | None = None,
    total_steps: Any = None,
    *,
    weight_decay: ByRole = 0.0,
    rest_weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mode: Mode = "decoupled",
    schedule: str = "warmup_cosine",
    warmup: Any = 0.05,
    weights: Weights | LinearWeights | VeloWeights | str | None = None,
    rest_learning_rate_factor: ByRole | None = None,
    rest: Mapping[str, AdamW] | None = None,
    rules: Sequence[RuleLike] = (),
    strict: bool = False,
    per_head: bool = False,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    state_dtype: Any = "float32",
    kernel: str = "auto",
    precision: Any = None,
    sharding: Sharding | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer for a whole parameter tree.

    Hidden matrices: p <- p - eta (direction + weight_decay p); the rest: p <- p - factor eta (direction +
    rest_weight_decay p), with eta the learning rate of the step. Presets with one group for all leaves (VeLO) have no
    factor: p <- p - eta (direction + 0.001 decay p), decay being that of the leaf's label; eta = 1 is VeLO's own step.

    Numbers may be those of Python, NumPy or JAX, traced ones too. A role is "embedding", "head", "other", "vector",
    or one of the kinds of vectors: "gain", "bias" and "scalar", which go before "vector".

    Args:
        preset: A name out of `presets()`, or a `Preset`.
        learning_rate: The peak learning rate (for Celo2: the RMS of a step of a hidden matrix, in `celo2` of one with
            128 inputs), or an Optax schedule, which is taken as it is (under `optax.inject_hyperparams` it arrives as a
            number, and is multiplied by `schedule` if `total_steps` is given). None: the preset's default.
        total_steps: The length of the run in steps, for the schedule. None: a number is a constant learning rate. VeLO
            needs it.
        weight_decay: Weight decay of hidden matrices; or a mapping from roles ("hidden" is one here) to weight decays.
            `dict.fromkeys(harness.MATRICES, 0.1)` decays all matrices, embeddings and heads too, and neither biases
            nor norms.
        rest_weight_decay: Weight decay of all other leaves (embeddings, heads, vectors) that nothing else speaks of.
        weight_decay_mode: "decoupled" (times the learning rate), "cautious" (only where the step already shrinks the
            parameter) or "independent" (of the learning rate; a step shrinks by the weight decay itself). See
            `add_decayed_weights`.
        schedule: The name of a schedule out of `celo2_harness.schedules.SCHEDULES`. VeLO keeps its own time instead.
        warmup: Warm-up of the schedule: a fraction of the run if below one, else steps.
        weights: The learned rule: `Weights` or `LinearWeights`, or what `load_weights` takes (of VeLO, `VeloWeights`,
            or what `load_velo_weights` takes). None: the preset's default. Presets without a learned rule refuse any.
        rest_learning_rate_factor: Learning rate of the rest over that of hidden matrices, for roles that the preset
            sets apart too; or a mapping from roles to factors. None: the preset's.
        rest: A mapping from roles to `AdamW(learning_rate_factor, b1, b2, weight_decay)`, for what a role has apart
            from the rest. It goes before the short forms above.
        rules: Routing rules that go before the built-in ones (see `label_params`).
        strict: Whether to refuse leaves that no routing rule matches.
        per_head: Whether every attention head is a matrix of its own.
        weight_dimension_numbers: What `optax.contrib.muon` takes under that name: a tree of `MuonDimensionNumbers`
            (None: not a hidden matrix), a prefix of it, or a function of the parameters. It goes before the built-in
            rules and after `rules`.
        state_dtype: The dtype of the learned rule's momenta and second moment, float32 or bfloat16.
        kernel: How the learned rule is computed: "auto" (three Pallas kernels a leaf where JAX runs on one GPU, else
            XLA), "xla" or "pallas" (without a GPU it is interpreted, which is slow and meant for tests).
        precision: The precision of the matrix products of Newton-Schulz and of turning into an eigenbasis, as in
            `jax.numpy.matmul`, for example "highest" or "BF16_BF16_F32". None: the highest where JAX runs on a CPU,
            and the hardware's usual one on accelerators.
        sharding: How the parameters lie on a mesh of devices: a mesh (placed by
            `celo2_harness.sharding.parameter_shardings`), a tree of `jax.sharding.NamedSharding` like the parameters,
            or a function of the parameters returning one. State and updates are then placed like the parameters, and
            matrices are shared out among the devices to be orthogonalised (see `orthogonalize`). None: nothing is
            placed.

    Returns:
        An `optax.GradientTransformationExtraArgs`; `update` needs `params`, and with VeLO `value`, the loss. The state
        is an `optax.PartitionState` with inner states "hidden", "rest" and "frozen", and one for each role that is set
        apart (with VeLO "all" and "frozen"); updates have the parameters' dtype. Frozen leaves may have any dtype, and
        their gradients are not looked at.

    Raises:
        ValueError: If a value is out of range, a name is unknown (the nearest one is suggested), or weights cannot be
            loaded; in `init` and `update`, if a leaf to train is no floating-point array, or updates or a state are of
            other parameters.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> tx = build(total_steps=1000, weight_decay=0.1)
        >>> params = {"layer": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> jax.tree.map(jnp.shape, updates)
        {'layer': {'bias': (4,), 'kernel': (8, 4)}}

    References:
        arXiv 2602.19142, section 4 (harness); Muon's conventions (arXiv 2502.16982) for `celo2_muon` and `muon`.
    """
    plan = _plan(
        preset=preset,
        learning_rate=learning_rate,
        total_steps=total_steps,
        weight_decay=weight_decay,
        rest_weight_decay=rest_weight_decay,
        weight_decay_mode=weight_decay_mode,
        schedule=schedule,
        warmup=warmup,
        weights=weights,
        rest_learning_rate_factor=rest_learning_rate_factor,
        rest=rest,
        rules=rules,
        strict=strict,
        per_head=per_head,
        weight_dimension_numbers=weight_dimension_numbers,
        state_dtype=state_dtype,
        kernel=kernel,
        precision=precision,
        sharding=sharding,
    )

    def init_fn(params: Params) -> optax.OptState:
        return in_float32(plan.transformation(params, starting=True)).init(params)

    def update_fn(updates: Updates, state: Any, params: Any = None, **extra_args: Any) -> tuple[Updates, Any]:
        return in_float32(plan.transformation(params)).update(updates, state, params, **extra_args)

    tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)  # type: ignore[arg-type]
    tx = on_explicit_mesh(tx) if sharding is None else placed(tx, sharding, own=Celo2State)
    return explained(plan.preset.name, tx)


def describe(params: PyTree, preset: str | Preset = "celo2", **arguments: Any) -> str:
    """Returns a printable table of what `build` would do with every leaf.

    Args:
        params: A parameter tree; shapes are enough (`jax.eval_shape`).
        preset: A name out of `presets()`, or a `Preset`.
        **arguments: The other arguments of `build`, with the same defaults.

    Returns:
        A table of path, shape, matrix view, label, optimizer, learning-rate factor, weight decay, parameters, state
        bytes and rule, and totals; and how the update is computed on this machine.

    Raises:
        ValueError: As `build` does.
        TypeError: As `build` does.

    Example:
        >>> params = {"mlp": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}}
        >>> print(describe(params).splitlines()[0].split()[0])
        path
    """
    if isinstance(preset, (str, Preset)) and find_preset(preset).needs_num_steps:
        arguments.setdefault("total_steps", 1)  # the size of a state does not depend on the length of the run
    bound = inspect.signature(build).bind(preset, **arguments)
    bound.apply_defaults()
    plan = _plan(**bound.arguments)
    return routing.format_report([plan.row(route) for route in jax.tree.leaves(plan.routes(params))], plan.computed())


@_checked
def learning_rate_schedule(
    preset: str | Preset = "celo2",
    learning_rate: ScalarOrSchedule | None = None,
    total_steps: Any = None,
    schedule: str = "warmup_cosine",
    warmup: Any = 0.05,
) -> optax.Schedule:
    """The learning rate of hidden matrices at every step, as `build` has it for the same arguments.

    `build` takes the result as its `learning_rate`, so that a program can log what its optimizer uses.

    Args:
        preset: A name out of `presets()`, or a `Preset`.
        learning_rate: The peak, or a schedule, which is returned as it is. None: the preset's default.
        total_steps: The length of the run in steps. None: the learning rate is constant.
        schedule: The name of a schedule. Rules that keep their own time (VeLO) have a constant learning rate.
        warmup: Warm-up of the schedule: a fraction of the run if below one, else steps.

    Returns:
        A function of the step count.

    Raises:
        ValueError: As `build` does.
        TypeError: As `build` does.

    Example:
        >>> rate = learning_rate_schedule("adamw", 1e-3, total_steps=100, warmup=10)
        >>> [round(float(rate(step)), 6) for step in (0, 5, 10, 55)]
        [0.0, 0.0005, 0.001, 0.0005]
        >>> tx = build("adamw", rate, 100)
    """
    rate = _learning_rate(find_preset(preset), learning_rate, total_steps, schedule, warmup)
    return rate if callable(rate) else optax.constant_schedule(rate)


def group_of(route: routing.Route) -> str:
    """The group ("hidden", "rest" or "frozen") that a label belongs to."""
    return route.label if route.label in ("hidden", "frozen") else "rest"


def _learning_rate(
    recipe: Preset, learning_rate: ScalarOrSchedule | None, total_steps: Any, schedule: str, warmup: Any
) -> ScalarOrSchedule:
    """The one place where default, bounds and schedule of a learning rate are decided."""
    rate = number("learning_rate", recipe.learning_rate if learning_rate is None else learning_rate)
    shape = choose(schedule, SCHEDULES, "schedule")
    if total_steps is None:
        return rate
    steps = run_length(total_steps)
    if callable(rate) or recipe.needs_num_steps:
        return rate
    return scaled(rate, shape(steps, warmup_length(warmup, steps)))


@_checked
def _plan(
    preset: str | Preset,
    learning_rate: ScalarOrSchedule | None,
    total_steps: Any,
    weight_decay: ByRole,
    rest_weight_decay: ScalarOrSchedule,
    weight_decay_mode: str,
    schedule: str,
    warmup: Any,
    weights: Weights | LinearWeights | VeloWeights | str | None,
    rest_learning_rate_factor: ByRole | None,
    rest: Mapping[str, AdamW] | None,
    rules: Sequence[RuleLike],
    strict: bool,
    per_head: bool,
    weight_dimension_numbers: WeightDimensionNumbers,
    state_dtype: Any,
    kernel: str,
    precision: Any,
    sharding: Sharding | None,
) -> "_Plan":
    """The arguments of `build` and `describe`, checked and resolved."""
    recipe = find_preset(preset)
    rate = _learning_rate(recipe, learning_rate, total_steps, schedule, warmup)
    loaded = preset_weights(recipe, weights)
    needs_num_steps = recipe.needs_num_steps or isinstance(loaded, Weights) and sees_training_fraction(loaded.config)
    if needs_num_steps and total_steps is None:
        raise ValueError(f"preset {recipe.name}: total_steps is missing; the rule needs the length of the run.")
    decays = by_role("weight_decay", weight_decay, "hidden")
    factor = {} if rest_learning_rate_factor is None else rest_learning_rate_factor
    factors = by_role("rest_learning_rate_factor", factor, "rest")
    asked = by_role("rest", rest or {}, "rest", read=checked_terms)
    if recipe.rest is None and (factors or asked):
        name = "rest" if asked else "rest_learning_rate_factor"
        raise ValueError(f"{name} = {rest or factor!r}: preset {recipe.name} has one learning rate; leave it out.")
    for role, terms in asked.items():
        if recipe.rest is not None and recipe.rest.betas is None and (terms.b1, terms.b2) != (None, None):
            raise ValueError(f"rest[{role!r}] = {terms}: preset {recipe.name} has no AdamW there; leave out b1 and b2.")
    group = recipe.hidden if recipe.rest is None else recipe.rest
    decay = number("rest_weight_decay", rest_weight_decay)
    base = AdamW(group.learning_rate_factor, *(group.betas or (None, None)), weight_decay=decay)
    return _Plan(
        preset=recipe,
        learning_rate=rate,
        hidden=AdamW(recipe.hidden.learning_rate_factor, weight_decay=decays.pop("hidden", 0.0)),
        rest=rest_terms(base, recipe.roles, factors, decays, asked),
        weight_decay_mode=choose(weight_decay_mode, {mode: mode for mode in get_args(Mode)}, "weight_decay_mode"),
        settings=Settings(
            weights=loaded,
            state_dtype=resolve_state_dtype(state_dtype),
            kernel=resolve_kernel(kernel),
            precision=precision,
            total_steps=None if total_steps is None else run_length(total_steps),
        ),
        sharding=sharding,
        rules=rules,
        strict=strict,
        per_head=per_head,
        weight_dimension_numbers=weight_dimension_numbers,
    )


@dataclasses.dataclass(frozen=True, eq=False)  # hashable: programs hash what an optimizer closes over
class _Plan:
    """What `build` was asked for: everything but the parameters.

    `rest` holds "rest" and the roles that are set apart from it; `settings` lack what depends on the parameters.
    """

    preset: Preset
    learning_rate: ScalarOrSchedule
    hidden: AdamW
    rest: Mapping[str, AdamW]
    weight_decay_mode: str
    settings: Settings
    sharding: Sharding | None
    rules: Sequence[RuleLike]
    strict: bool
    per_head: bool
    weight_dimension_numbers: WeightDimensionNumbers

    def routes(self, params: Params) -> PyTree:
        """The route of every leaf. All leaves that are trained are floating-point arrays."""
        rules = (*self.rules, *routing.rules_of_dimension_numbers(self.weight_dimension_numbers, params))
        routes = routing.route(params, rules, strict=self.strict, per_head=self.per_head)
        for route in jax.tree.leaves(routes):
            if route.dtype is None:
                raise ValueError(
                    f"{self.preset.name}: leaf {route.path!r} is a Python number, expected an array: jnp.asarray(...)."
                )
            if route.label != "frozen" and not jnp.issubdtype(route.dtype, jnp.floating):
                raise ValueError(
                    f"{self.preset.name}: leaf {route.path!r} has dtype {route.dtype}, expected a floating-point one."
                    f" Leave it out of the parameters, or freeze it: rules=[({route.path!r}, 'frozen')]."
                )
        return routes

    def key(self, route: routing.Route) -> str:
        """Returns which of the terms a leaf has: "hidden", "frozen", a role that is set apart, or "rest"."""
        group = group_of(route)
        apart = [name for name in (route.role, route.label) if name in self.rest]
        return apart[0] if group == "rest" and apart else group

    def group(self, key: str) -> Group:
        """The optimizer of a key other than "frozen"."""
        return self.preset.hidden if key == "hidden" or self.preset.rest is None else self.preset.rest

    def direction(self, key: str, terms: AdamW, **settings: Any) -> optax.GradientTransformation:
        """The update direction of a key, with the settings that depend on the parameters."""
        if terms.b1 is not None and terms.b2 is not None:
            settings["betas"] = terms.b1, terms.b2
        return self.group(key).direction(dataclasses.replace(self.settings, **settings))

    def transformation(self, params: Params, starting: bool = False) -> optax.GradientTransformationExtraArgs:
        """The optimizer of trees with the paths and shapes of these parameters."""
        routes = self.routes(params)
        if starting and self.preset.rest is not None and self.preset.rest.optimizer != self.preset.hidden.optimizer:
            routing.warn_if_nothing_hidden(routes, self.preset.name, self.preset.rest.optimizer)
        keys = jax.tree.map(self.key, routes)
        settings = {
            "views": by_path(routes, lambda route: route.view),
            "sharding": None if self.sharding is None else by_path(resolve_shardings(self.sharding, params)),
        }

        def chain(key: str, terms: AdamW, decays: Mapping[Any, Any]) -> optax.GradientTransformation:
            group, mode = self.group(key), self.weight_decay_mode
            decay = [
                add_decayed_weights(scaled(group.weight_decay_factor, w), mode, mask=mask)  # type: ignore[arg-type]
                for mask, w in decays.items()
            ]
            assert terms.learning_rate_factor is not None
            rate = optax.scale_by_learning_rate(scaled(terms.learning_rate_factor, self.learning_rate))  # type: ignore[arg-type]
            after = [rate, *decay] if mode == "independent" else [*decay, rate]
            return optax.chain(self.direction(key, terms, **settings), *after)

        transforms: dict[Hashable, optax.GradientTransformation] = {"frozen": optax.set_to_zero()}
        if self.preset.rest is None:
            of = lambda key: by_path(keys, lambda found: found == key)
            decays = {of(key): terms.weight_decay for key, terms in {"hidden": self.hidden, **self.rest}.items()}
            transforms["all"] = chain("hidden", self.hidden, decays)
            keys = jax.tree.map(lambda key: key if key == "frozen" else "all", keys)
        else:
            for key, terms in {"hidden": self.hidden, **self.rest}.items():
                transforms[key] = chain(key, terms, {None: terms.weight_decay})
        # A function: Optax would call a tree of labels that can be called, which every Equinox model is.
        return optax.partition(transforms, lambda _: keys)

    def computed(self) -> str:
        """How learned rules and Newton-Schulz are computed here."""
        kernel, precision = kernel_here(self.settings.kernel), usual_precision(self.settings.precision)
        ways = {"xla": "by XLA", "pallas": "in Pallas kernels"}
        return (
            f"on {jax.default_backend()}: learned rules are computed {ways[kernel]} (kernel={self.settings.kernel!r}),"
            f" matrix products are made at precision {precision} (precision={self.settings.precision!r})"
        )

    def row(self, route: routing.Route) -> routing.ReportRow:
        """What the optimizer does with a leaf."""
        size = math.prod(route.shape)
        key = self.key(route)
        if key == "frozen":
            return routing.ReportRow(route, "none", 0.0, 0.0, size, 0)
        group, terms = self.group(key), self.hidden if key == "hidden" else self.rest[key]
        tx = self.direction(key, terms, views=route.view)
        betas = (
            ""
            if key == "hidden" or (terms.b1, terms.b2) == (group.betas or (None, None))
            else (f" ({terms.b1:g}, {terms.b2:g})")
        )
        leaf = jax.ShapeDtypeStruct(route.shape, wide_dtype(route.dtype))
        return routing.ReportRow(
            route=route,
            optimizer=group.optimizer + betas,
            learning_rate_factor=terms.learning_rate_factor,
            weight_decay=scaled(group.weight_decay_factor, terms.weight_decay),  # type: ignore[arg-type]
            parameters=size,
            state_bytes=_bytes(tx, leaf) - _bytes(tx, ()),
        )


def _bytes(tx: optax.GradientTransformation, params: Any) -> int:
    return tree_bytes(jax.eval_shape(tx.init, params))
