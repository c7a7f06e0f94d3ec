"""Annotations that say something, and that jaxtyping's import hook can check at run time."""

import dataclasses
import inspect
import subprocess
import sys
import textwrap
import typing

import jax
import numpy as np
import optax
import pytest
from jaxtyping import ArrayLike

import celo2_harness as c2
from celo2_harness import blocks, harness, plugins, routing, rule, schedules


def test_the_import_hook_checks_every_call():
    """In a process of its own: the tests are under the hook anyway."""
    program = """
        from jaxtyping import TypeCheckError, install_import_hook
        with install_import_hook("celo2_harness", "beartype.beartype"):
            import celo2_harness as c2
        import jax.numpy as jnp
        tx = c2.build("adamw", 1e-3)
        params = {"w": jnp.ones((2, 3))}
        updates, state = tx.update(params, tx.init(params), params)
        for call, argument in ((c2.newton_schulz, jnp.ones(3)), (tx.init, {"w": "a word"})):
            try:
                call(argument)
            except TypeCheckError:
                continue
            raise AssertionError("accepted")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


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
