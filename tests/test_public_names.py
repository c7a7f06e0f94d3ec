"""What `import celo2_harness` offers, and what it leaves alone."""

import inspect
import subprocess
import sys

import pytest

import celo2_harness
from celo2_harness import blocks, harness, routing, rule, schedules, velo, weights
from celo2_harness.lab import metatrain, tasks

CONTRACT = [
    *("load_weights", "save_weights", "Weights", "WeightsError", "celo2_direction", "orthogonalize", "normalize_rms"),
    *("scale_by_celo2", "add_decayed_weights", "guard_updates", "newton_schulz", "label_params", "build", "describe"),
    *("harness", "schedules", "__version__"),
]
HARNESS = ["build", "presets", "register_preset", "describe", "learning_rate_schedule"]
HARNESS += ["AdamW", "Preset", "Group", "Settings", "STATIC_ARGS", "MATRICES"]


@pytest.mark.parametrize("name", CONTRACT)
def test_contract(name):
    assert hasattr(celo2_harness, name)


@pytest.mark.parametrize("name", HARNESS)
def test_harness_contract(name):
    assert hasattr(harness, name)


def test_schedules():
    assert set(schedules.SCHEDULES) >= {"constant", "linear", "warmup_cosine", "warmup_stable_decay", "inverse_sqrt"}
    assert all(getattr(schedules, name) is schedule for name, schedule in schedules.SCHEDULES.items())


MODULES = [celo2_harness, blocks, metatrain, routing, rule, tasks, velo, weights]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_every_exported_name_is_documented(module):
    values = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    values = {name: x for name, x in values.items() if inspect.isfunction(x) or inspect.isclass(x)}
    assert values and all(value.__doc__ for value in values.values())


def test_importing_is_light():
    heavy = ["matplotlib", "orbax", "tyro", "sklearn", "huggingface_hub", "haiku", "equinox", "PIL", "hypothesis"]
    # rich is not listed: flax imports it.
    program = (
        "import sys; before = set(sys.modules); import celo2_harness;"
        f"print([m for m in {heavy} if m in sys.modules and m not in before])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]", out.stdout
