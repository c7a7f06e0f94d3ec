"""Whole optimizers from the blocks: presets, and `build`. Assembly only, no arithmetic.

A preset sends hidden matrices to one direction and everything else to another. Each becomes a chain

    direction -> decoupled weight decay -> learning rate

and `optax.partition` joins the two by the labels of `routing`. A preset whose leaves depend on each other has one
direction for all. Leaves labelled "frozen" get no update.
"""

import math
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from beartype import BeartypeConf, beartype
from jax.sharding import NamedSharding, PartitionSpec

from celo2_harness import routing
from celo2_harness._trees import require_like_params, tree_difference
from celo2_harness._types import Params, PyTree, ScalarOrSchedule, Updates
from celo2_harness.blocks import Celo2State, add_decayed_weights
from celo2_harness.blocks.views import WeightDimensionNumbers
from celo2_harness.presets import Group as Group
from celo2_harness.presets import Preset as Preset
from celo2_harness.presets import Settings as Settings
from celo2_harness.presets import choose, find_preset, rest_factor
from celo2_harness.presets import preset_weights as preset_weights
from celo2_harness.presets import presets as presets
from celo2_harness.presets import register_preset as register_preset
from celo2_harness.routing import RuleLike
from celo2_harness.rule import resolve_kernel, resolve_state_dtype
from celo2_harness.schedules import SCHEDULES, scaled
from celo2_harness.sharding import Sharding, like_parameters, resolve_shardings
from celo2_harness.velo import VeloWeights
from celo2_harness.weights import Weights

# What `optax.inject_hyperparams(build, static_args=...)` must leave alone: they are no numbers of the update.
STATIC_ARGS = ("total_steps", "warmup", "state_dtype", "kernel", "sharding", "weight_dimension_numbers")

_checked = beartype(conf=BeartypeConf(violation_param_type=TypeError))


@_checked
def build(
    preset: str | Preset = "celo2_ortho",
    learning_rate: ScalarOrSchedule | None = None,
    total_steps: Any = None,
    *,
    weight_decay: ScalarOrSchedule = 0.0,
    rest_weight_decay: ScalarOrSchedule = 0.0,
    schedule: str = "warmup_cosine",
    warmup: Any = 0.05,
    weights: Weights | VeloWeights | str | None = None,
    rest_learning_rate_factor: Any = None,
    rules: Sequence[RuleLike] = (),
    strict: bool = False,
    per_head: bool = False,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    state_dtype: Any = "float32",
    kernel: str = "xla",
    sharding: Sharding | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer for a whole parameter tree.

    Hidden matrices: p <- p - eta (direction + weight_decay p); the rest: p <- p - factor eta (direction +
    rest_weight_decay p), with eta the learning rate of the step. Presets with one group for all leaves (VeLO) have no
    factor: p <- p - eta (direction + 0.001 decay p), decay being that of the leaf's label; eta = 1 is VeLO's own step.

    Args:
      preset: a name out of `presets()`, or a `Preset`.
      learning_rate: peak learning rate (for Celo2: the RMS of a step of a hidden matrix), or an Optax schedule, which
        is taken as it is (under `optax.inject_hyperparams` it arrives as a number, and is multiplied by `schedule`
        if `total_steps` is given). None: the preset's default.
      total_steps: length of the run in steps, for the schedule. None: a number is a constant learning rate. VeLO needs
        it.
      weight_decay: decoupled weight decay of hidden matrices.
      rest_weight_decay: decoupled weight decay of all other leaves (embeddings, heads, vectors).
      schedule: name of the schedule out of `celo2_harness.schedules.SCHEDULES`. VeLO keeps its own time instead.
      warmup: warm-up of the schedule: a fraction of the run if below one, else steps.
      weights: the learned rule: `Weights`, or what `load_weights` takes (of VeLO, `VeloWeights`, or what
        `load_velo_weights` takes). None: the preset's default. Presets without a learned rule refuse any.
      rest_learning_rate_factor: learning rate of the rest over that of hidden matrices. None: the preset's.
      rules: routing rules that go before the built-in ones (see `label_params`), or names of installed ones.
      strict: refuse leaves that no routing rule matches.
      per_head: one matrix per attention head.
      weight_dimension_numbers: what `optax.contrib.muon` takes under that name: a tree of `MuonDimensionNumbers` (None:
        not a hidden matrix), a prefix of it, or a function of the parameters. It goes before the built-in rules and
        after `rules`.
      state_dtype: of the learned rule's momenta and second moment, float32 or bfloat16.
      kernel: how the network is evaluated: "xla", or "pallas" (one Triton kernel; without a GPU it is interpreted,
        which is slow and meant for tests).
      sharding: how the parameters lie on a mesh of devices: a mesh (placed by
        `celo2_harness.sharding.parameter_shardings`), a tree of `jax.sharding.NamedSharding` like the parameters, or a
        function of the parameters returning one. State and updates are then placed like the parameters, and matrices
        are shared out among the devices to be orthogonalised (see `orthogonalize`). None: nothing is placed.

    Returns:
      An `optax.GradientTransformationExtraArgs`; `update` needs `params`, and with VeLO `value`, the loss. The state is
      an `optax.PartitionState` with inner states "hidden", "rest" and "frozen" (with VeLO "all" and "frozen"); updates
      have the parameters' dtype.

    Raises:
      ValueError: a value out of range, an unknown name (the nearest one is suggested), weights that cannot be loaded;
        in `init` and `update`, a leaf that is no floating-point array, updates or a state of other parameters.
      TypeError: an argument of the wrong type.

    Example:
      >>> tx = build(preset="celo2_ortho", learning_rate=1e-3, total_steps=1000, weight_decay=0.1)
      >>> params = {"layer": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> jax.tree.map(jnp.shape, updates)
      {'layer': {'bias': (4,), 'kernel': (8, 4)}}

    Source: arXiv 2602.19142, section 4 (harness), and Muon's conventions (arXiv 2502.16982) for `celo2_muon`, `muon`.
    """
    recipe = find_preset(preset)
    rate = recipe.learning_rate if learning_rate is None else learning_rate
    _require_at_least_zero(
        learning_rate=rate,
        weight_decay=weight_decay,
        rest_weight_decay=rest_weight_decay,
        rest_learning_rate_factor=rest_learning_rate_factor,
    )
    shape = choose(schedule, SCHEDULES, "schedule")
    if recipe.own_course and total_steps is None:
        raise ValueError(f"preset {recipe.name}: total_steps is missing; the rule needs the length of the run.")
    if total_steps is not None and (recipe.own_course or not callable(rate)):
        _check_run(total_steps, 0 if recipe.own_course else warmup)
        rate = rate if recipe.own_course else scaled(rate, shape(int(total_steps), warmup))
    factor = rest_factor(recipe, rest_learning_rate_factor)
    loaded = preset_weights(recipe, weights)
    state_dtype = resolve_state_dtype(state_dtype)
    kernel = resolve_kernel(kernel)

    def partition(tree: Params) -> optax.GradientTransformationExtraArgs:
        own = (*rules, *routing.rules_of_dimension_numbers(weight_dimension_numbers, tree))
        routes = routing.route(tree, own, strict=strict, per_head=per_head)
        _require_floating(recipe.name, routes)
        places = None if sharding is None else _by_path(resolve_shardings(sharding, tree))
        settings = Settings(loaded, _views_of(routes), state_dtype, kernel, total_steps, places)
        labels = jax.tree.map(group_of, routes)

        def chain(
            group: Group, rate: ScalarOrSchedule, decays: Mapping[Any, ScalarOrSchedule]
        ) -> optax.GradientTransformation:
            return optax.chain(
                group.direction(settings),
                *(add_decayed_weights(scaled(group.weight_decay_factor, w), mask=mask) for mask, w in decays.items()),
                optax.scale_by_learning_rate(rate),  # type: ignore[arg-type]
            )

        transforms: dict[Hashable, optax.GradientTransformation] = {"frozen": optax.set_to_zero()}
        if recipe.rest is None:
            decays = {_has_label(labels, "hidden"): weight_decay, _has_label(labels, "rest"): rest_weight_decay}
            transforms["all"] = chain(recipe.hidden, rate, decays)
            labels = jax.tree.map(lambda label: label if label == "frozen" else "all", labels)
        else:
            transforms["hidden"] = chain(recipe.hidden, rate, {None: weight_decay})
            transforms["rest"] = chain(recipe.rest, scaled(factor, rate), {None: rest_weight_decay})
        # A function: Optax would call a tree of labels that can be called, which every Equinox model is.
        return optax.partition(transforms, lambda _: labels)

    def placed(params: Params, updates: Any, state: Any) -> tuple[Any, Any]:
        """Updates (or None) and state where they belong on the mesh."""
        if sharding is None or not jax.tree.leaves(params):
            return updates, state
        places = resolve_shardings(sharding, params)
        whole = NamedSharding(jax.tree.leaves(places)[0].mesh, PartitionSpec())
        constrain = jax.lax.with_sharding_constraint

        def place(part: Any, found: Any) -> Any:
            if isinstance(part, Celo2State):
                return part  # it has placed itself
            return constrain(part, whole if found is None else found)

        is_leaf = lambda part: isinstance(part, Celo2State)
        state = jax.tree.map(place, state, like_parameters(state, params, places), is_leaf=is_leaf)
        return None if updates is None else constrain(updates, places), state

    def init_fn(params: Params) -> optax.OptState:
        return placed(params, None, partition(params).init(_at_least_float32(params)))[1]

    def update_fn(
        updates: Updates, state: optax.OptState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Updates, optax.OptState]:
        if params is None:
            raise ValueError(
                f"{recipe.name}: update(updates, state, params) was called without params. The update depends on the"
                " parameters; pass the tree that you will apply the updates to."
            )
        require_like_params(recipe.name, updates, params)
        tx = partition(params)
        try:
            updates, state = placed(params, updates, state)
            wide = _at_least_float32((updates, params))
            updates, state = tx.update(wide[0], state, wide[1], **extra_args)
        except _TREE_ERRORS as error:
            difference = tree_difference(state, jax.eval_shape(init_fn, params), dtypes=True)
            if difference is None:
                raise
            raise ValueError(
                f"{recipe.name}: the state is not one that init makes for these parameters: {difference} Make it with"
                " init of this optimizer, built with the same options, on the tree that is passed as params."
            ) from error
        return placed(params, jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params), state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # type: ignore[arg-type]


@_checked
def describe(
    params: PyTree,
    preset: str | Preset = "celo2_ortho",
    *,
    weight_decay: float | int = 0.0,
    rest_weight_decay: float | int = 0.0,
    weights: Weights | VeloWeights | str | None = None,
    rest_learning_rate_factor: float | int | None = None,
    rules: Sequence[RuleLike] = (),
    strict: bool = False,
    per_head: bool = False,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    state_dtype: Any = "float32",
) -> str:
    """What `build` would do with every leaf, as a printable table.

    Args:
      params: a parameter tree; shapes are enough (`jax.eval_shape`).
      preset: and the other arguments as for `build`.

    Returns:
      A table: path, shape, matrix view, label, optimizer, learning-rate factor, weight decay, parameters, state bytes,
      and totals.

    Raises:
      ValueError: as `build` and `label_params`.

    Example:
      >>> params = {"mlp": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}}
      >>> print(describe(params).splitlines()[0].split()[0])
      path
    """
    recipe = find_preset(preset)
    loaded = preset_weights(recipe, weights)
    rest = recipe.hidden if recipe.rest is None else recipe.rest
    factor = rest_factor(recipe, rest_learning_rate_factor)
    columns = {
        "hidden": (recipe.hidden, recipe.hidden.learning_rate_factor, recipe.hidden.weight_decay_factor * weight_decay),
        "rest": (rest, factor, rest.weight_decay_factor * rest_weight_decay),
        "frozen": (Group("none", lambda settings: optax.identity()), 0.0, 0.0),
    }

    def row(route: routing.Route) -> routing.ReportRow:
        group, learning_rate_factor, decay = columns[group_of(route)]
        leaf = jax.ShapeDtypeStruct(route.shape, jnp.promote_types(route.dtype, jnp.float32))
        # The size of a state does not depend on the length of the run.
        tx = group.direction(Settings(loaded, route.view, state_dtype, total_steps=1))
        return routing.ReportRow(
            route=route,
            optimizer=group.optimizer,
            learning_rate_factor=learning_rate_factor,
            weight_decay=decay,
            parameters=math.prod(route.shape),
            state_bytes=_bytes(tx, leaf) - _bytes(tx, ()),
        )

    own = (*rules, *routing.rules_of_dimension_numbers(weight_dimension_numbers, params))
    routes = routing.route(params, own, strict=strict, per_head=per_head)
    return routing.format_report([row(route) for route in jax.tree.leaves(routes)])


def group_of(route: routing.Route) -> str:
    """The group ("hidden", "rest" or "frozen") that a label belongs to."""
    return route.label if route.label in ("hidden", "frozen") else "rest"


def _require_floating(name: str, routes: PyTree) -> None:
    for route in jax.tree.leaves(routes):
        if route.dtype is None:
            raise ValueError(f"{name}: leaf {route.path!r} is a Python number, expected an array: jnp.asarray(...).")
        if route.label != "frozen" and not jnp.issubdtype(route.dtype, jnp.floating):
            raise ValueError(
                f"{name}: leaf {route.path!r} has dtype {jnp.dtype(route.dtype)}, expected a floating-point one. Leave"
                f" it out of the parameters, or freeze it: rules=[({route.path!r}, 'frozen')]."
            )


# What JAX and Optax raise for a tree or an array that does not fit.
_TREE_ERRORS = (ValueError, TypeError, AttributeError, KeyError, IndexError)


def _has_label(labels: PyTree, label: str) -> Callable[[Params], Any]:
    """Where a label is, in whatever part of the tree a masked block sees, found by path."""
    by_path = dict(jax.tree_util.tree_flatten_with_path(labels)[0])
    return lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: by_path[path] == label, tree)


def _at_least_float32(tree: PyTree) -> PyTree:
    """Narrow floats as float32: state and arithmetic do not follow the parameters down to bfloat16."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def _bytes(tx: optax.GradientTransformation, params: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(tx.init, params)))


def _by_path(tree: PyTree) -> Callable[[Updates], Any]:
    """The leaves of a tree for whatever part of it a masked block sees."""
    leaves = dict(jax.tree_util.tree_flatten_with_path(tree)[0])
    return lambda updates: jax.tree_util.tree_map_with_path(lambda path, _: leaves[path], updates)


def _views_of(routes: PyTree) -> Callable[[Updates], Any]:
    """The views for whatever part of the tree a masked block sees, found by path."""
    by_path = dict(jax.tree_util.tree_flatten_with_path(routes)[0])
    return lambda updates: jax.tree_util.tree_map_with_path(lambda path, _: by_path[path].view, updates)


def _require_at_least_zero(**values: Any) -> None:
    for name, value in values.items():
        if value is None or callable(value) or isinstance(value, jax.Array):
            continue
        # Not float(value): there are whole numbers that no float can hold.
        if jnp.ndim(value) != 0 or not 0.0 <= value <= sys.float_info.max:
            raise ValueError(f"{name} = {value!r}: expected a finite number >= 0 (or a schedule).")


def _check_run(total_steps: Any, warmup: Any) -> None:
    if isinstance(total_steps, jax.Array) or isinstance(warmup, jax.Array):
        raise ValueError(
            "total_steps and warmup must be Python numbers; with optax.inject_hyperparams pass"
            " static_args=harness.STATIC_ARGS."
        )
    # Steps are counted in int32.
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or not 1 <= total_steps < 2**31:
        raise ValueError(f"total_steps = {total_steps!r}: expected a whole number of steps >= 1 (below 2^31), or None.")
    if not isinstance(warmup, (int, float)) or not 0 <= warmup < total_steps:
        raise ValueError(
            f"warmup = {warmup!r}: expected a fraction of the run below 1, or steps below total_steps = {total_steps}."
        )
