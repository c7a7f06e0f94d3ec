"""Takes many steps with every preset and shows what memory they keep: of the process, and arrays that JAX holds.

Usage: python benchmarks/memory.py [--steps 20000] [--presets adamw celo2_ortho]

One step is one call of a compiled function on a tree of three small leaves. Memory is read after a tenth of the steps
and at the end; between the two nothing may grow.
"""

import argparse
import gc
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from celo2_harness import harness

PRESETS = ("adamw", "muon", "celo2_base", "celo2_ortho", "celo2_muon")


class Growth(NamedTuple):
    """What the steps between the two readings have kept: bytes of the process, and arrays."""

    resident_bytes: int
    arrays: int


def resident_bytes() -> int:
    """Memory of this process that is in RAM (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(preset: str, steps: int) -> Growth:
    """Takes the steps."""
    tx = harness.build(preset, learning_rate=1e-3, total_steps=steps, weight_decay=0.1)
    params = {"embedding": {"table": jnp.ones((7, 4))}, "layer": {"kernel": jnp.eye(4, 6), "bias": jnp.zeros(6)}}

    @jax.jit
    def step(params, state):
        gradients = jax.tree.map(lambda p: jnp.cos(p) - 0.5, params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.tree.map(lambda x: jnp.array(x, dtype=x.dtype), tx.init(params))
    readings = []
    for number in range(steps):
        if number == steps // 10:
            gc.collect()
            readings.append((resident_bytes(), len(jax.live_arrays())))
        params, state = step(params, state)
    jax.block_until_ready(params)
    gc.collect()
    (before, arrays), after = readings[0], (resident_bytes(), len(jax.live_arrays()))
    return Growth(after[0] - before, after[1] - arrays)


def main() -> None:
    """Prints a line per preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    options = parser.parse_args()
    for preset in options.presets:
        growth = measure(preset, options.steps)
        print(
            f"{preset}: {growth.resident_bytes / 1024:.0f} KiB and {growth.arrays} arrays more after"
            f" {options.steps} steps than after {options.steps // 10}",
            flush=True,
        )


if __name__ == "__main__":
    main()
