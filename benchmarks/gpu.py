"""What an update costs on an accelerator: milliseconds back to back and seconds of compilation, one JSON line an item.

`python benchmarks/gpu.py [--seconds 180] [--each 60] [--calls 20] [--trees gpt2-12 blocks-50m]`. Every item is measured
in a process of its own, which is ended when it takes longer than `--each`; items that no time is left for are named and
left out. `--trees blocks-1m` tries the program on a CPU.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import celo2_harness as c2
from celo2_harness import harness
from celo2_harness.lab.bench.models import MODEL_SHAPES


def _learned(kernel: str, **orthogonal: Any) -> optax.GradientTransformation:
    """Celo2 with Newton-Schulz on every leaf, at the published view."""
    blocks = [c2.celo2_direction("celo2", kernel=kernel), c2.orthogonalize(**orthogonal), c2.normalize_rms()]
    return optax.chain(*blocks, optax.scale_by_learning_rate(1e-3))


OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "optax.adamw": lambda: optax.adamw(1e-3),
    "optax.contrib.muon": lambda: optax.contrib.muon(1e-3),
    "celo2_ortho": lambda: harness.build("celo2_ortho"),
    "celo2_ortho pallas": lambda: harness.build("celo2_ortho", kernel="pallas"),
    "celo2_base": lambda: harness.build("celo2_base"),
    "celo2_base pallas": lambda: harness.build("celo2_base", kernel="pallas"),
    "blocks highest": lambda: _learned("xla", precision="highest"),
    "blocks default": lambda: _learned("xla"),
    "blocks bfloat16": lambda: _learned("xla", dtype="bfloat16"),
}


def measure(tree: str, name: str, calls: int) -> dict[str, Any]:
    """Compiles one optimizer's update on one tree, then calls it on its own results without waiting in between."""
    shapes, tx = MODEL_SHAPES[tree](), OPTIMIZERS[name]()
    started = time.perf_counter()
    lowered = jax.jit(tx.update, donate_argnums=(0, 1)).lower(shapes, jax.eval_shape(tx.init, shapes), shapes)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    fill = lambda value: jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), shapes)
    params, updates = fill(0.02), fill(1e-3)
    state = jax.jit(tx.init)(params)
    updates, state = jax.block_until_ready(compiled(updates, state, params))
    begin = time.perf_counter()
    for _ in range(calls):
        updates, state = compiled(updates, state, params)
    jax.block_until_ready(updates)
    milliseconds = 1000.0 * (time.perf_counter() - begin) / calls
    memory = compiled.memory_analysis()
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "trace_seconds": round(traced - started, 2),
        "compile_seconds": round(done - traced, 2),
        "milliseconds": round(milliseconds, 3),
        "temporary_bytes": memory.temp_size_in_bytes if memory is not None else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--each", type=float, default=60.0)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--trees", nargs="+", default=["gpt2-12", "blocks-50m"])
    parser.add_argument("--item", nargs=2, metavar=("TREE", "OPTIMIZER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.item:
        tree, name = options.item
        print(json.dumps(measure(tree, name, options.calls)), flush=True)
        return
    end = time.monotonic() + options.seconds
    for tree in options.trees:
        for name in OPTIMIZERS:
            line: dict[str, Any] = {"tree": tree, "optimizer": name}
            left = min(options.each, end - time.monotonic())
            command = [sys.executable, __file__, "--calls", str(options.calls), "--item", tree, name]
            try:
                if left <= 0:
                    raise subprocess.TimeoutExpired(command, 0)
                done = subprocess.run(command, capture_output=True, text=True, timeout=left)
                lines = done.stdout.splitlines()
                line |= json.loads(lines[-1]) if done.returncode == 0 else {"error": done.stderr[-500:]}
            except subprocess.TimeoutExpired:
                line |= {"error": f"not done after {max(left, 0.0):.0f} s"}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
