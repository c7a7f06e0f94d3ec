"""The presets: which direction hidden matrices get, which one everything else, as a table.

A new preset is a row of `_PRESETS`; `harness.build` makes the optimizer of it.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import optax
from beartype import BeartypeConf, beartype

from celo2_harness import plugins
from celo2_harness._arguments import choose
from celo2_harness._types import Updates
from celo2_harness.blocks import (
    celo2_direction,
    in_eigenbasis,
    linear_direction,
    mix_momenta,
    normalize_rms,
    orthogonalize,
    scale_by_celo2,
    scale_by_shape,
    scale_by_width,
)
from celo2_harness.blocks.in_eigenbasis import Mode
from celo2_harness.blocks.views import WeightDimensionNumbers, optax_dimension_numbers
from celo2_harness.roles import AdamW
from celo2_harness.velo import VELO, VELO_S, VeloConfig, VeloWeights, load_velo_weights, velo
from celo2_harness.weights import LinearWeights, Weights, load_weights

# Decays of AdamW's moments; the second is that of language models (arXiv 2005.14165).
ADAMW_BETAS = (0.9, 0.95)
# Update RMS at which a normalised update and AdamW want the same learning rate (arXiv 2502.16982).
ADAMW_RMS = 0.2

# Momenta of `modern_muon`: gradient + 1.9 momentum(0.9) + 0.76 momentum(0.99), with weights that sum to one. They are
# the best in the mean of those measured in docs/research/stacks.md that need no length of the run.
THREE_NUMBERS = ((0.9, 0.99), (1.9 / 2.66, 0.76 / 2.66), 2.66 / 3.66)

_checked = beartype(conf=BeartypeConf(violation_param_type=TypeError))


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of a preset's direction.

    Attributes:
        weights: The learned rule; None in presets that have none.
        views: The matrix view of every leaf, as blocks take it (`weight_dimension_numbers`).
        state_dtype: The dtype of the learned rule's state.
        kernel: How the learned rule is computed.
        precision: The precision of matrix products.
        sharding: The `NamedSharding` of every leaf, as a function of the updates; None on one device.
        total_steps: The length of the run in steps; None where it is not known.
        betas: The decays of AdamW's moments.
    """

    weights: Weights | LinearWeights | VeloWeights | None = None
    views: WeightDimensionNumbers = None
    state_dtype: Any = "float32"
    kernel: str = "auto"
    precision: Any = None
    sharding: Callable[[Updates], Any] | None = None
    total_steps: int | None = None
    betas: tuple[float, float] = ADAMW_BETAS


@dataclasses.dataclass(frozen=True)
class Group:
    """The optimizer of one group of leaves.

    Attributes:
        optimizer: The name of the preset in reports.
        direction: Makes the update direction, before weight decay and learning rate.
        learning_rate_factor: The learning rate over that of `build`.
        weight_decay_factor: The weight decay over that of `build`.
        betas: The decays of AdamW's moments; None if the direction is not AdamW's.
    """

    optimizer: str
    direction: Callable[[Settings], optax.GradientTransformation]
    learning_rate_factor: float = 1.0
    weight_decay_factor: float = 1.0
    betas: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named optimizer: one group for hidden matrices, one for the rest.

    Attributes:
        name: The name that `build(preset=...)` takes.
        description: One line.
        hidden: Group of leaves labelled "hidden".
        rest: Group of all other leaves, except frozen ones; None: they are in the first group too.
        learning_rate: Default peak learning rate.
        weights: Default weights of the learned rule; None if the preset has none.
        load: The function that loads weights; None is `load_weights`. Without default weights they have to be given.
        needs_num_steps: Whether the rule keeps its own time: it needs `total_steps`, and `schedule` and `warmup` have
            no effect.
        roles: Roles of the rest that differ from it (see `build`).
    """

    name: str
    description: str
    hidden: Group
    rest: Group | None
    learning_rate: float
    weights: str | None = None
    load: Callable[[Any], Any] | None = None
    needs_num_steps: bool = False
    roles: Mapping[str, AdamW] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def learned(self) -> bool:
        """Whether it has a learned rule, and so takes weights."""
        return self.weights is not None or self.load is not None


def _celo2(settings: Settings, orthogonalize: bool) -> optax.GradientTransformation:
    assert isinstance(settings.weights, Weights)
    return scale_by_celo2(
        settings.weights,
        orthogonalize,
        weight_dimension_numbers=settings.views,
        state_dtype=settings.state_dtype,
        kernel=settings.kernel,
        precision=settings.precision,
        sharding=settings.sharding,
        total_steps=settings.total_steps,
    )


def _celo2_base(settings: Settings) -> optax.GradientTransformation:
    return _celo2(settings, orthogonalize=False)


def _celo2_ortho(settings: Settings) -> optax.GradientTransformation:
    return _celo2(settings, orthogonalize=True)


def _celo2_muon(settings: Settings) -> optax.GradientTransformation:
    return optax.chain(_celo2(settings, orthogonalize=True), optax.scale(ADAMW_RMS))


def _muon(settings: Settings) -> optax.GradientTransformation:
    views = settings.views
    shape = scale_by_shape(ADAMW_RMS, weight_dimension_numbers=views)
    numbers = optax_dimension_numbers(views)
    if settings.sharding is None:
        # The identity stands where a mesh has a block, so that states are of one structure.
        return optax.chain(
            optax.contrib.scale_by_muon(beta=0.95, weight_dimension_numbers=numbers), optax.identity(), shape
        )
    # On a mesh, Optax's iterations would each communicate. Without iterations it gives the normalised momentum.
    momentum = optax.contrib.scale_by_muon(beta=0.95, ns_steps=0, weight_dimension_numbers=numbers)
    products = orthogonalize(weight_dimension_numbers=views, precision=settings.precision, sharding=settings.sharding)
    return optax.chain(momentum, products, shape)


def _in_eigenbasis(direction: optax.GradientTransformation, mode: Mode, settings: Settings) -> Any:
    """The stack of `modern_muon` and `celo2`: they differ in the direction alone."""
    views, sharding = settings.views, settings.sharding
    return optax.chain(
        in_eigenbasis(
            direction, mode=mode, weight_dimension_numbers=views, precision=settings.precision, sharding=sharding
        ),
        orthogonalize(weight_dimension_numbers=views, precision=settings.precision, sharding=sharding),
        normalize_rms(weight_dimension_numbers=views),
        scale_by_width(weight_dimension_numbers=views),
    )


def _modern_muon(settings: Settings) -> optax.GradientTransformation:
    momenta = mix_momenta(*THREE_NUMBERS, state_dtype=settings.state_dtype)
    return _in_eigenbasis(momenta, "whiten", settings)


def _celo2_in_eigenbasis(settings: Settings) -> optax.GradientTransformation:
    weights, views, dtype = settings.weights, settings.views, settings.state_dtype
    if isinstance(weights, LinearWeights):
        direction = linear_direction(
            weights,
            settings.total_steps,
            weight_dimension_numbers=views,
            state_dtype=dtype,
            sharding=settings.sharding,
        )
    else:
        assert isinstance(weights, Weights)
        direction = celo2_direction(
            weights,
            weight_dimension_numbers=views,
            state_dtype=dtype,
            kernel=settings.kernel,
            sharding=settings.sharding,
            total_steps=settings.total_steps,
        )
    return _in_eigenbasis(direction, "act", settings)


def _adamw(settings: Settings) -> optax.GradientTransformation:
    b1, b2 = settings.betas
    return optax.scale_by_adam(b1=b1, b2=b2, eps=1e-8)


def _velo(settings: Settings) -> optax.GradientTransformation:
    assert isinstance(settings.weights, VeloWeights) and settings.total_steps is not None
    rule = velo(
        settings.weights,
        num_steps=settings.total_steps,
        state_dtype=settings.state_dtype,
        kernel=settings.kernel,
    )
    return optax.chain(rule, optax.scale(-1.0))  # a direction is subtracted


_ADAMW = Group("adamw", _adamw, betas=ADAMW_BETAS)
# Its step is the rule's own; a weight decay w shrinks by 0.001 w a step, as it would at the learning rate 0.001.
_VELO = Group("velo", _velo, weight_decay_factor=1e-3)


# The presets of the paper are networks.
_load_network = functools.partial(load_weights, kind=Weights)


def _load_velo(config: VeloConfig) -> Callable[[Any], VeloWeights]:
    return lambda source: load_velo_weights(source, published_as=config, expect=config)


# Default learning rates are those that are best in the tables of docs/results.md, first of all for the language model;
# that of `celo2_muon` makes the steps of `celo2_ortho` at its own.
_PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="celo2",
            description="Learned rule in the gradients' eigenbasis + Newton-Schulz for hidden matrices, AdamW else",
            hidden=Group("celo2 in the eigenbasis + Newton-Schulz", _celo2_in_eigenbasis),
            rest=dataclasses.replace(_ADAMW, learning_rate_factor=3.5),
            learning_rate=3.5e-3,
            weights="celo2_linear",
            roles={"embedding": AdamW(learning_rate_factor=10.5)},
        ),
        Preset(
            name="modern_muon",
            description="The same stack with two momenta, whitened (SOAP), in place of the learned rule",
            hidden=Group("momenta whitened in the eigenbasis + Newton-Schulz", _modern_muon),
            rest=dataclasses.replace(_ADAMW, learning_rate_factor=3.5),
            learning_rate=3.2e-3,
            roles={"embedding": AdamW(learning_rate_factor=10.5)},
        ),
        Preset(
            name="celo2_ortho",
            description="Celo2 of the paper: learned + Newton-Schulz for hidden matrices, AdamW at 20x for the rest",
            hidden=Group("celo2 + Newton-Schulz", _celo2_ortho),
            rest=dataclasses.replace(_ADAMW, learning_rate_factor=20.0),
            learning_rate=1e-3,
            weights="celo2",
            load=_load_network,
        ),
        Preset(
            name="celo2_base",
            description="Celo2-base of the paper: learned rule for every leaf",
            hidden=Group("celo2", _celo2_base),
            rest=Group("celo2", _celo2_base),
            learning_rate=1e-3,
            weights="celo2_base",
            load=_load_network,
        ),
        Preset(
            name="celo2_muon",
            description="Celo2 in Muon's conventions: update RMS 0.2, one learning rate shared with AdamW",
            hidden=Group("celo2 + Newton-Schulz", _celo2_muon),
            rest=_ADAMW,
            learning_rate=5e-3,
            weights="celo2",
            load=_load_network,
        ),
        Preset(
            name="muon",
            description="Muon (Optax) for hidden matrices at update RMS 0.2, AdamW for the rest",
            hidden=Group("muon", _muon),
            rest=_ADAMW,
            learning_rate=1e-2,
        ),
        Preset(
            name="adamw",
            description="AdamW (Optax) for every leaf",
            hidden=_ADAMW,
            rest=_ADAMW,
            learning_rate=3e-3,
        ),
        Preset(
            name="velo",
            description="VeLO at its published size, for every leaf; needs its weights, total_steps and the loss",
            hidden=_VELO,
            rest=None,
            learning_rate=1.0,
            load=_load_velo(VELO),
            needs_num_steps=True,
        ),
        Preset(
            name="velo_s",
            description="VeLO with an LSTM of 64 and a bank of 32, for every leaf; needs the same",
            hidden=_VELO,
            rest=None,
            learning_rate=1.0,
            load=_load_velo(VELO_S),
            needs_num_steps=True,
        ),
    )
}


def presets() -> dict[str, Preset]:
    """All presets by name: built-in, registered, and those of installed packages.

    Packages add theirs by the entry-point group "celo2_harness.presets", each entry a `Preset`. One that cannot be
    loaded is named in a warning and left out.

    Example:
        >>> sorted(presets())[:5]
        ['adamw', 'celo2', 'celo2_base', 'celo2_muon', 'celo2_ortho']
    """
    found = dict(_PRESETS)
    for name in plugins.plugin_names("presets"):
        try:
            preset = plugins.load_plugin("presets", name, Preset)
        except ValueError as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
        else:
            if preset is not None:
                found.setdefault(name, preset)
    return found


@_checked
def register_preset(preset: Preset, *, overwrite: bool = False) -> None:
    """Makes a preset known to `build` by its name.

    Args:
        preset: The preset.
        overwrite: Whether to replace one of the same name.

    Raises:
        ValueError: If the name is taken, and `overwrite` is False.

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
        ValueError: If there is none of that name.
    """
    if isinstance(preset, Preset):
        return preset
    # Packages are only looked at for a name that is not there.
    found = _PRESETS.get(preset) or plugins.load_plugin("presets", preset, Preset)
    return found or choose(preset, dict.fromkeys((*_PRESETS, *plugins.plugin_names("presets"))), "preset")


def preset_weights(
    recipe: Preset, weights: Weights | LinearWeights | VeloWeights | str | None
) -> Weights | LinearWeights | VeloWeights | None:
    """The weights that a preset is built with: the given ones or its own, loaded; None if it has no learned rule.

    Raises:
        ValueError: If they cannot be loaded, none are given where there are no default ones, or some where there is no
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
