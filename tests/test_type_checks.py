"""Annotations that jaxtyping's import hook can check at run time."""

import subprocess
import sys
import textwrap


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
