"""The presets: which direction hidden matrices get, which one everything else, as a table.

A new preset is a row of `_PRESETS`; `harness.build` makes the optimizer of it.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

import optax
from beartype import BeartypeConf, beartype

from celo2_harness import plugins
from celo2_harness._types import Updates
from celo2_harness.blocks import orthogonalize, scale_by_celo2, scale_by_shape
from celo2_harness.blocks.views import WeightDimensionNumbers, optax_dimension_numbers
from celo2_harness.velo import VELO, VELO_S, VeloConfig, VeloWeights, load_velo_weights, velo
from celo2_harness.weights import Weights, load_weights

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

    @property
    def learned(self) -> bool:
        """Whether it has a learned rule, and so takes weights."""
        return self.weights is not None or self.load is not None


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
    numbers = optax_dimension_numbers(views)
    if settings.sharding is None:
        # The identity stands where a mesh has a block, so that states are of one structure.
        return optax.chain(
            optax.contrib.scale_by_muon(beta=0.95, weight_dimension_numbers=numbers), optax.identity(), shape
        )
    # On a mesh, Optax's iterations would each communicate. Without iterations it gives the normalised momentum.
    momentum = optax.contrib.scale_by_muon(beta=0.95, ns_steps=0, weight_dimension_numbers=numbers)
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
      >>> from celo2_harness import harness
      >>> lion = Group("lion", lambda settings: optax.scale_by_lion())
      >>> register_preset(Preset("lion", "Lion for every leaf", lion, lion, 3e-4), overwrite=True)
      >>> tx = harness.build(preset="lion")
    """
    if preset.name in _PRESETS and not overwrite:
        raise ValueError(f"preset {preset.name!r} exists already; choose another name, or pass overwrite=True.")
    _PRESETS[preset.name] = preset


def find_preset(preset: str | Preset) -> Preset:
    """A preset by name, or the given one.

    Raises:
      ValueError: there is none of that name.
    """
    if isinstance(preset, Preset):
        return preset
    # Packages are only looked at for a name that is not there.
    return choose(preset, _PRESETS if preset in _PRESETS else presets(), "preset")


def preset_weights(recipe: Preset, weights: Weights | VeloWeights | str | None) -> Weights | VeloWeights | None:
    """The weights that a preset is built with: the given ones or its own, loaded; None if it has no learned rule.

    Raises:
      ValueError: they cannot be loaded, none are given where there are no default ones, or some where there is no
        learned rule.
    """
    if not recipe.learned:
        if weights is not None:
            given = weights if isinstance(weights, str) else type(weights).__name__
            raise ValueError(f"weights = {given!r}: preset {recipe.name} has no learned rule; leave it out.")
        return None
    source: Any = recipe.weights if weights is None else weights
    if source is None:
        raise ValueError(f"preset {recipe.name}: weights is missing, and there are no default ones; give a file.")
    return (recipe.load or load_weights)(source)


def rest_factor(recipe: Preset, asked: Any) -> Any:
    """Learning rate of the rest over that of the first group: the asked one, or the preset's.

    Raises:
      ValueError: the preset has one group.
    """
    if recipe.rest is None:
        if asked is not None:
            raise ValueError(
                f"rest_learning_rate_factor = {asked!r}: preset {recipe.name} has one learning rate; leave it out."
            )
        return recipe.hidden.learning_rate_factor
    return recipe.rest.learning_rate_factor if asked is None else asked


def choose(name: str, choices: Mapping[str, Any], argument: str) -> Any:
    """The choice of that name.

    Raises:
      ValueError: there is none; the message names the nearest.
    """
    if name not in choices:
        near = difflib.get_close_matches(name, choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"{argument} = {name!r}: expected one of {', '.join(choices)}{hint}")
    return choices[name]
