"""`celo2 train` on one device and on meshes, as a program: the number of devices is fixed when JAX starts, which here
the command itself has to see to.

Usage: sharded_train.py FOLDER STEPS [WEIGHTS]. Trains on one device, in FOLDER/one; and on a mesh, stopped half-way and
resumed on another one, in FOLDER/mesh.
"""

import signal
import sys
from pathlib import Path

import jax


def main(folder, steps, *weights):
    """Prints how the meshed run's parameters lie in the end."""
    jax.config.update("jax_disable_most_optimizations", bool(weights))  # compiling is what takes the time
    from celo2_harness.lab.cli import train as command
    from celo2_harness.lab.cli.main import main as celo2
    from celo2_harness.lab.tasks import MODELS, GPTConfig

    MODELS["nano"] = GPTConfig(width=16, layers=1, heads=2, context=64)
    # A rule without an eigenbasis, which amplifies the rounding of the first steps.
    words = [
        "train",
        "--preset",
        "celo2_ortho",
        "--context",
        "8",
        "--batch",
        "8",
        "--steps",
        steps,
        "--log-every",
        "1",
        "--eval-every",
        steps,
    ]
    words += ["--weights", *weights] if weights else []
    one, mesh = Path(folder) / "one", Path(folder) / "mesh"
    # The first command that asks for a mesh makes the devices.
    assert celo2(["bench", "plan", "--model", "nano", "--preset", "adamw", "--mesh", "data=4,fsdp=2"]) == 0

    class Stopping(command.Display):
        """Presses Ctrl-C half-way."""

        def update(self, progress):
            super().update(progress)
            if progress.step == int(steps) // 2:
                places = {str(x.sharding.spec) for x in jax.tree.leaves(progress.state[0])}
                print("parameters:", *sorted(places))
                signal.raise_signal(signal.SIGINT)

    display, command.Display = command.Display, Stopping
    assert celo2([*words, "--mesh", "data=4,fsdp=2", "--out", str(mesh)]) == 130
    command.Display = display
    assert celo2([*words, "--out", str(one)]) == 0
    assert celo2(["train", "--resume", "--mesh", "fsdp=2,tensor=2", "--out", str(mesh)]) == 0
    assert celo2([*words, "--mesh", "data=8", "--batch", "12", "--out", str(Path(folder) / "odd")]) == 2


if __name__ == "__main__":
    main(*sys.argv[1:])
