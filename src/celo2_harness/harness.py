"""Whole optimizers from the blocks: presets, and `build`. Assembly only, no arithmetic.

A preset sends hidden matrices to one direction and everything else to another. Each becomes a chain

    direction -> decoupled weight decay -> learning rate

and `optax.partition` joins the two by the labels of `routing`. A preset whose leaves depend on each other has one
direction for all. Leaves labelled "frozen" get no update.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from beartype import BeartypeConf, beartype
from jax.sharding import NamedSharding, PartitionSpec

from celo2_harness import plugins, routing
from celo2_harness._trees import require_like_params, tree_difference
from celo2_harness._types import Params, PyTree, ScalarOrSchedule, Updates
from celo2_harness.baselines import VELO, VELO_S, VeloConfig, VeloWeights, load_velo_weights, velo
from celo2_harness.blocks import Celo2State, add_decayed_weights, orthogonalize, scale_by_celo2, scale_by_shape
from celo2_harness.blocks.views import WeightDimensionNumbers
from celo2_harness.routing import RuleLike
from celo2_harness.rule import Weights, load_weights, resolve_kernel, resolve_state_dtype
from celo2_harness.schedules import SCHEDULES, scaled
from celo2_harness.sharding import Sharding, like_parameters, resolve_shardings

# What `optax.inject_hyperparams(build, static_args=...)` must leave alone: they are no numbers of the update.
STATIC_ARGS = ("total_steps", "warmup", "state_dtype", "kernel", "sharding", "weight_dimension_numbers")
# Update RMS at which a normalised update and AdamW want the same learning rate (arXiv 2502.16982).
ADAMW_RMS = 0.2

_checked = beartype(conf=BeartypeConf(violation_param_type=TypeError))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the direction of a preset may depend on.

    Attributes:
      weights: the learned rule; None in presets that have none.
      weight_dimension_numbers: the matrix view of every leaf, from routing.
      state_dtype: of the learned rule's state.
      kernel: how the learned rule's network is evaluated.
      total_steps: length of the run; None where it is not known.
      sharding: the `NamedSharding` of every leaf, as a function of the updates; None on one device.
    """

    weights: Weights | VeloWeights | None
    weight_dimension_numbers: WeightDimensionNumbers
    state_dtype: Any
    kernel: str = "xla"
    total_steps: int | None = None
    sharding: Callable[[Updates], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Group:
    """The optimizer of one group of leaves.

    Attributes:
      optimizer: its name in reports.
      direction: makes the update direction, before weight decay and learning rate.
      learning_rate_factor: its learning rate over that of `build`.
      weight_decay_factor: its weight decay over that of `build`.
    """

    optimizer: str
    direction: Callable[[Settings], optax.GradientTransformation]
    learning_rate_factor: float = 1.0
    weight_decay_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named optimizer: one group for hidden matrices, one for the rest.

    Attributes:
      name: what `build(preset=...)` takes.
      description: one line.
      hidden: group of leaves labelled "hidden".
      rest: group of all other leaves, except frozen ones; None: they are in the first group too.
      learning_rate: default peak learning rate.
      weights: default weights of the learned rule; None if the preset has none.
      load: how weights are loaded, if not by `load_weights`. Without default weights they have to be given.
      own_course: the rule knows how much of the run is left: it needs `total_steps`, and `schedule` and `warmup` have
        no effect.
    """

    name: str
    description: str
    hidden: Group
    rest: Group | None
    learning_rate: float
    weights: str | None = None
    load: Callable[[Any], Any] | None = None
    own_course: bool = False


def _celo2(settings: Settings, orthogonalize: bool) -> optax.GradientTransformation:
    assert isinstance(settings.weights, Weights)
    return scale_by_celo2(
        settings.weights,
        orthogonalize,
        weight_dimension_numbers=settings.weight_dimension_numbers,
        state_dtype=settings.state_dtype,
        kernel=settings.kernel,
        sharding=settings.sharding,
    )


def _celo2_base(settings: Settings) -> optax.GradientTransformation:
    return _celo2(settings, orthogonalize=False)


def _celo2_ortho(settings: Settings) -> optax.GradientTransformation:
    return _celo2(settings, orthogonalize=True)


def _celo2_muon(settings: Settings) -> optax.GradientTransformation:
    return optax.chain(_celo2(settings, orthogonalize=True), optax.scale(ADAMW_RMS))


def _muon(settings: Settings) -> optax.GradientTransformation:
    views = settings.weight_dimension_numbers
    shape = scale_by_shape(ADAMW_RMS, weight_dimension_numbers=views)
    if settings.sharding is None:
        # The identity stands where a mesh has a block, so that states are of one structure.
        return optax.chain(
            optax.contrib.scale_by_muon(beta=0.95, weight_dimension_numbers=views), optax.identity(), shape
        )
    # On a mesh, Optax's iterations would each communicate. Without iterations it gives the normalised momentum.
    momentum = optax.contrib.scale_by_muon(beta=0.95, ns_steps=0, weight_dimension_numbers=views)
    return optax.chain(momentum, orthogonalize(weight_dimension_numbers=views, sharding=settings.sharding), shape)


def _adamw(settings: Settings) -> optax.GradientTransformation:
    del settings
    return optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8)


def _velo(settings: Settings) -> optax.GradientTransformation:
    assert isinstance(settings.weights, VeloWeights) and settings.total_steps is not None
    rule = velo(
        settings.weights,
        num_steps=settings.total_steps,
        state_dtype=settings.state_dtype,
        kernel=settings.kernel,
    )
    return optax.chain(rule, optax.scale(-1.0))  # a direction is subtracted


# Its step is the rule's own; a weight decay w shrinks by 0.001 w a step, as it would at the learning rate 0.001.
_VELO = Group("velo", _velo, weight_decay_factor=1e-3)


def _load_velo(config: VeloConfig) -> Callable[[Any], VeloWeights]:
    return lambda source: load_velo_weights(source, published_as=config, expect=config)


_PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="celo2_ortho",
            description="Celo2 of the paper: learned + Newton-Schulz for hidden matrices, AdamW at 20x for the rest",
            hidden=Group("celo2 + Newton-Schulz", _celo2_ortho),
            rest=Group("adamw", _adamw, learning_rate_factor=20.0),
            learning_rate=1e-3,
            weights="celo2",
        ),
        Preset(
            name="celo2_base",
            description="Celo2-base of the paper: learned rule for every leaf",
            hidden=Group("celo2", _celo2_base),
            rest=Group("celo2", _celo2_base),
            learning_rate=1e-3,
            weights="celo2_base",
        ),
        Preset(
            name="celo2_muon",
            description="Celo2 in Muon's conventions: update RMS 0.2, one learning rate shared with AdamW",
            hidden=Group("celo2 + Newton-Schulz", _celo2_muon),
            rest=Group("adamw", _adamw),
            learning_rate=3e-3,
            weights="celo2",
        ),
        Preset(
            name="muon",
            description="Muon (Optax) for hidden matrices at update RMS 0.2, AdamW for the rest",
            hidden=Group("muon", _muon),
            rest=Group("adamw", _adamw),
            learning_rate=3e-3,
        ),
        Preset(
            name="adamw",
            description="AdamW (Optax) for every leaf",
            hidden=Group("adamw", _adamw),
            rest=Group("adamw", _adamw),
            learning_rate=3e-3,
        ),
        Preset(
            name="velo",
            description="VeLO at its published size, for every leaf; needs its weights, total_steps and the loss",
            hidden=_VELO,
            rest=None,
            learning_rate=1.0,
            load=_load_velo(VELO),
            own_course=True,
        ),
        Preset(
            name="velo_s",
            description="VeLO with an LSTM of 64 and a bank of 32, for every leaf; needs the same",
            hidden=_VELO,
            rest=None,
            learning_rate=1.0,
            load=_load_velo(VELO_S),
            own_course=True,
        ),
    )
}


def presets() -> dict[str, Preset]:
    """All presets by name: built-in, registered, and those of installed packages.

    Packages add theirs by the entry-point group "celo2_harness.presets", each entry a `Preset`. One that cannot be
    loaded is named in a warning and left out.

    >>> sorted(presets())[:5]
    ['adamw', 'celo2_base', 'celo2_muon', 'celo2_ortho', 'muon']
    """
    found = dict(_PRESETS)
    for preset in plugins.load_plugins("presets", plugins.expect(Preset)).values():
        found.setdefault(preset.name, preset)
    return found


@_checked
def register_preset(preset: Preset, *, overwrite: bool = False) -> None:
    """Makes a preset known to `build` by its name.

    Args:
      preset: the preset.
      overwrite: replace one of the same name.

    Raises:
      ValueError: the name is taken, and `overwrite` is False.

    Example:
      >>> lion = Group("lion", lambda settings: optax.scale_by_lion())
      >>> register_preset(Preset("lion", "Lion for every leaf", lion, lion, 3e-4), overwrite=True)
      >>> tx = build(preset="lion")
    """
    if preset.name in _PRESETS and not overwrite:
        raise ValueError(f"preset {preset.name!r} exists already; choose another name, or pass overwrite=True.")
    _PRESETS[preset.name] = preset


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
        `load_velo_weights` takes). None: the preset's default.
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
    recipe = _find(preset)
    rate = recipe.learning_rate if learning_rate is None else learning_rate
    _require_at_least_zero(
        learning_rate=rate,
        weight_decay=weight_decay,
        rest_weight_decay=rest_weight_decay,
        rest_learning_rate_factor=rest_learning_rate_factor,
    )
    shape = _named(schedule, SCHEDULES, "schedule")
    if recipe.own_course and total_steps is None:
        raise ValueError(f"preset {recipe.name}: total_steps is missing; the rule needs the length of the run.")
    if total_steps is not None and (recipe.own_course or not callable(rate)):
        _check_run(total_steps, 0 if recipe.own_course else warmup)
        rate = rate if recipe.own_course else scaled(rate, shape(int(total_steps), warmup))
    factor = _rest_factor(recipe, rest_learning_rate_factor)
    loaded = preset_weights(recipe, weights)
    state_dtype = resolve_state_dtype(state_dtype)
    kernel = resolve_kernel(kernel)
    rules = routing.expand_rules(rules)

    def partition(tree: Params) -> optax.GradientTransformationExtraArgs:
        own = (*rules, *routing.rules_of_dimension_numbers(weight_dimension_numbers, tree))
        routes = routing.route(tree, own, strict=strict, per_head=per_head)
        _require_floating(recipe.name, routes)
        places = None if sharding is None else _by_path(resolve_shardings(sharding, tree))
        settings = Settings(loaded, _views_of(routes), state_dtype, kernel, total_steps, places)
        labels = jax.tree.map(group_of, routes, is_leaf=_is_route)

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
    recipe = _find(preset)
    loaded = preset_weights(recipe, weights)
    rest = recipe.hidden if recipe.rest is None else recipe.rest
    factor = _rest_factor(recipe, rest_learning_rate_factor)
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
    return routing.format_report([row(route) for route in jax.tree.leaves(routes, is_leaf=_is_route)])


def group_of(route: routing.Route) -> str:
    """The group ("hidden", "rest" or "frozen") that a label belongs to."""
    return route.label if route.label in ("hidden", "frozen") else "rest"


def _find(preset: str | Preset) -> Preset:
    if isinstance(preset, Preset):
        return preset
    # Packages are only looked at for a name that is not there.
    return _named(preset, _PRESETS if preset in _PRESETS else presets(), "preset")


def _require_floating(name: str, routes: PyTree) -> None:
    for route in jax.tree.leaves(routes, is_leaf=_is_route):
        if route.dtype is None:
            raise ValueError(f"{name}: leaf {route.path!r} is a Python number, expected an array: jnp.asarray(...).")
        if route.label != "frozen" and not jnp.issubdtype(route.dtype, jnp.floating):
            raise ValueError(
                f"{name}: leaf {route.path!r} has dtype {jnp.dtype(route.dtype)}, expected a floating-point one. Leave"
                f" it out of the parameters, or freeze it: rules=[({route.path!r}, 'frozen')]."
            )


# What JAX and Optax raise for a tree or an array that does not fit.
_TREE_ERRORS = (ValueError, TypeError, AttributeError, KeyError, IndexError)


def preset_weights(recipe: Preset, weights: Weights | VeloWeights | str | None) -> Weights | VeloWeights | None:
    """The weights that a preset is built with: the given ones or its own, loaded; None if it has no learned rule.

    Raises:
      ValueError: they cannot be loaded, or none are given where there are no default ones.
    """
    if recipe.weights is None and recipe.load is None:
        return None
    source: Any = recipe.weights if weights is None else weights
    if source is None:
        raise ValueError(f"preset {recipe.name}: weights is missing, and there are no default ones; give a file.")
    return (recipe.load or load_weights)(source)


def _rest_factor(recipe: Preset, asked: Any) -> Any:
    """Learning rate of the rest over that of the first group."""
    if recipe.rest is None:
        if asked is not None:
            raise ValueError(
                f"rest_learning_rate_factor = {asked!r}: preset {recipe.name} has one learning rate; leave it out."
            )
        return recipe.hidden.learning_rate_factor
    return recipe.rest.learning_rate_factor if asked is None else asked


def _has_label(labels: PyTree, label: str) -> Callable[[Params], Any]:
    """Where a label is, in whatever part of the tree a masked block sees, found by path."""
    by_path = dict(jax.tree_util.tree_flatten_with_path(labels)[0])
    return lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: by_path[path] == label, tree)


def _at_least_float32(tree: PyTree) -> PyTree:
    """Narrow floats as float32: state and arithmetic do not follow the parameters down to bfloat16."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def _is_route(x: Any) -> bool:
    return isinstance(x, routing.Route)


def _bytes(tx: optax.GradientTransformation, params: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(tx.init, params)))


def _by_path(tree: PyTree) -> Callable[[Updates], Any]:
    """The leaves of a tree for whatever part of it a masked block sees."""
    leaves = dict(jax.tree_util.tree_flatten_with_path(tree)[0])
    return lambda updates: jax.tree_util.tree_map_with_path(lambda path, _: leaves[path], updates)


def _views_of(routes: PyTree) -> Callable[[Updates], Any]:
    """The views for whatever part of the tree a masked block sees, found by path."""
    by_path = dict(jax.tree_util.tree_flatten_with_path(routes, is_leaf=_is_route)[0])
    return lambda updates: jax.tree_util.tree_map_with_path(lambda path, _: by_path[path].view, updates)


def _named(name: str, choices: Mapping[str, Any], argument: str) -> Any:
    if name not in choices:
        near = difflib.get_close_matches(name, choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"{argument} = {name!r}: expected one of {', '.join(choices)}{hint}")
    return choices[name]


def _require_at_least_zero(**values: Any) -> None:
    for name, value in values.items():
        if value is None or callable(value) or isinstance(value, jax.Array):
            continue
        if jnp.ndim(value) != 0 or not 0.0 <= float(value) < math.inf:
            raise ValueError(f"{name} = {value!r}: expected a finite number >= 0 (or a schedule).")


def _check_run(total_steps: Any, warmup: Any) -> None:
    if isinstance(total_steps, jax.Array) or isinstance(warmup, jax.Array):
        raise ValueError(
            "total_steps and warmup must be Python numbers; with optax.inject_hyperparams pass"
            " static_args=harness.STATIC_ARGS."
        )
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise ValueError(f"total_steps = {total_steps!r}: expected a whole number of steps >= 1, or None.")
    if not isinstance(warmup, (int, float)) or not 0 <= warmup < total_steps:
        raise ValueError(
            f"warmup = {warmup!r}: expected a fraction of the run below 1, or steps below total_steps = {total_steps}."
        )
