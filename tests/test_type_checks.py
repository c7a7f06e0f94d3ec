"""Run-time type checks for users: off by default, on by a call or a variable; and annotations that say something."""

import dataclasses
import inspect
import os
import subprocess
import sys
import textwrap
import typing
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jaxtyping import ArrayLike

import celo2_harness as c2
from celo2_harness import blocks, harness, plugins, routing, rule, schedules

SOURCE = Path(c2.__file__).parents[1]


def run(program, **variables):
    ours = {"CELO2_TYPE_CHECKS": "0", "PYTHONPATH": str(SOURCE), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ours, **variables})
    assert done.returncode == 0, done.stderr
    return done.stdout


# A vector where newton_schulz asks for matrices; a list where update asks for arrays; a good step in between.
WRONG = """
    import jax.numpy as jnp
    def message(call, *arguments):
        try:
            call(*arguments)
        except Exception as error:
            return f"{type(error).__name__} {error}"
        return "accepted"
    tx = harness.build("adamw", 1e-3)
    params = {"w": jnp.ones((2, 3))}
    assert harness.presets()["adamw"] and isinstance(c2.load_weights("celo2"), c2.Weights)
    updates, state = tx.update(params, tx.init(params), params)
    assert updates["w"].shape == (2, 3)
    print(message(c2.newton_schulz, jnp.ones(3)).replace(chr(10), " "))
    print(message(tx.init, {"w": 1.0}).replace(chr(10), " "))
    print(message(c2.schedules.warmup_steps, "ten", 0.1).replace(chr(10), " "))
"""


def test_off_by_default():
    program = """
        import sys
        import celo2_harness as c2
        from celo2_harness import harness
        assert not any("jaxtyping" in type(finder).__module__ for finder in sys.meta_path)
        assert not hasattr(c2.newton_schulz, "__wrapped__")
    """
    vector, number, steps = run(textwrap.dedent(program) + textwrap.dedent(WRONG)).splitlines()
    assert vector.startswith("ValueError newton_schulz: x has shape (3,)")
    # The package's own checks speak, and name the leaf.
    assert number.startswith("ValueError adamw: leaf 'w' is a Python number")
    assert "TypeCheckError" not in steps


ON = {
    "a call": (
        """
        import celo2_harness as c2
        from celo2_harness import harness
        before = c2.harness, harness.__dict__
        c2.enable_type_checks()
        c2.enable_type_checks()
        assert (c2.harness, harness.__dict__) == before  # the modules stay the same objects
        """,
        {},
    ),
    "the variable": (
        """
        import celo2_harness as c2
        from celo2_harness import harness
        """,
        {"CELO2_TYPE_CHECKS": "1"},
    ),
}


@pytest.mark.parametrize("way", ON)
def test_on_when_asked(way):
    program, variables = ON[way]
    vector, number, steps = run(textwrap.dedent(program) + textwrap.dedent(WRONG), **variables).splitlines()
    assert vector.startswith("TypeCheckError") and "newton_schulz" in vector and "*batch rows columns" in vector
    assert number.startswith("TypeCheckError") and "init_fn" in number and "params" in number
    assert steps.startswith("TypeCheckError") and "warmup_steps" in steps and "total_steps" in steps


# ---------------------------------------------------------------------------------------------------------- annotations

MODULES = (c2, harness, blocks, routing, rule, schedules, plugins)


def public_functions():
    """Functions, and methods of classes, that a public module names without an underscore."""
    found = {}
    for module in MODULES:
        for name, value in vars(module).items():
            if name.startswith("_") or not getattr(value, "__module__", "").startswith("celo2_harness"):
                continue
            if inspect.isfunction(value):
                found[f"{value.__module__}.{name}"] = value
            elif inspect.isclass(value):
                members = {k: v for k, v in vars(value).items() if not k.startswith("_")}
                for k, v in members.items():
                    v = v.fget if isinstance(v, property) else getattr(v, "func", v)
                    if inspect.isfunction(v) and not hasattr(v, "_method"):
                        found[f"{value.__module__}.{name}.{k}"] = v
    return found


FUNCTIONS = public_functions()


def parts(annotation):
    """An annotation and what it is made of, except that a schedule and "a number, of whatever library" are wholes."""
    yield annotation
    arguments = typing.get_args(annotation)
    if annotation == optax.Schedule:
        return
    numbers = typing.get_args(ArrayLike)
    whole = numbers if all(number in arguments for number in numbers) else ()
    for argument in arguments:
        for inner in argument if isinstance(argument, list) else [argument]:  # the arguments of a Callable
            if inner not in whole:
                yield from parts(inner)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_are_annotated(name):
    """Every parameter and the result; arrays by jaxtyping, with dtype and shape."""
    function = inspect.unwrap(FUNCTIONS[name])
    hints = typing.get_type_hints(function)
    signature = inspect.signature(function)
    wanted = [p for p in signature.parameters if p != "self"] + ["return"]
    assert [p for p in wanted if p not in hints] == []
    bare = {p for p in wanted if any(part in (jax.Array, np.ndarray) for part in parts(hints[p]))}
    assert not bare, f"{name}: write Float[Array, 'shape'] (or another dtype) instead of a bare array: {bare}"


def test_fields_of_public_records_are_annotated_with_shapes():
    records = [value for module in MODULES for value in vars(module).values() if inspect.isclass(value)]
    records = [value for value in records if dataclasses.is_dataclass(value) or hasattr(value, "_fields")]
    assert len(records) > 10
    for record in records:
        bare = [field for field, hint in record.__annotations__.items() if hint in (jax.Array, np.ndarray)]
        assert not bare, (record, bare)


def test_the_walk_finds_the_contract():
    assert {f"celo2_harness.blocks.{module}" for module in ("direction.celo2_direction", "guard.guard_updates")} < set(
        FUNCTIONS
    )
    assert len(FUNCTIONS) > 50
