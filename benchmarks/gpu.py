"""What training costs on a GPU, one JSON line an item; every item in a process of its own, with a time limit.

    python benchmarks/gpu.py [--seconds 580] [--each 75] [--items updates training large products variants]
    python benchmarks/gpu.py --count [--trees gpt2-12 blocks-50m]        # no GPU needed
    python benchmarks/gpu.py --tiny                                      # every item at a size for a CPU

    updates   milliseconds of an update back to back, seconds of tracing and compilation, on the tree of GPT-2
    variants  updates of what is not the default: bfloat16 products, no kernels
    products  Newton-Schulz of 16 matrices of width 1024 at three precisions
    training  steps of GPT-2 (124 million parameters, bfloat16): share of peak, and of it what the optimizer takes
    large     GPT-3 XL (1.3 billion): 20 steps, and the memory that they took

An item that takes longer than `--each` is ended; items that no time is left for are named and left out. With `--count`
the update is lowered for a GPU as it would be there, and compiled for an H100 if JAX's CUDA plugin and `ptxas` can be
imported (`pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12`): launches, branches that the host waits
for, and words that are moved per parameter. Kernels of products are not tuned then, all else is as on the device.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from celo2_harness import harness
from celo2_harness._trees import tree_bytes
from celo2_harness.lab.bench.launches import count_launches
from celo2_harness.lab.bench.models import MODEL_SHAPES
from celo2_harness.lab.tasks import GPTConfig, LanguageModel
from celo2_harness.lab.tasks.gpt import TOKEN_MODELS
from celo2_harness.lab.training.loop import init_state, train_chunk
from celo2_harness.lab.training.peak import share_of_peak
from celo2_harness.rule import newton_schulz

TINY = GPTConfig(width=16, layers=1, heads=2, context=16, vocabulary=64, tied=True)
PRESETS = ("muon", "modern_muon", "celo2", "celo2_base", "celo2_ortho")
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "optax.adamw": lambda: optax.adamw(1e-3),
    "optax.contrib.muon": lambda: optax.contrib.muon(1e-3),
    **{name: lambda name=name: harness.build(name, 1e-3) for name in PRESETS},
    "celo2_base xla": lambda: harness.build("celo2_base", 1e-3, kernel="xla"),
    "celo2_ortho bfloat16": lambda: harness.build("celo2_ortho", 1e-3, precision="BF16_BF16_F32"),
}
VARIANTS = ("celo2_ortho bfloat16", "celo2_base xla")
PRECISIONS = ("highest", None, "BF16_BF16_F32")
TRAINED = ("adamw", "muon", "celo2", "celo2_ortho")
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 device_address_bits: 64
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  device_vendor: "NVIDIA Corporation" name: "NVIDIA H100 80GB HBM3" driver_version: "13.0.0"
  runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def update(tree: str, name: str, calls: int) -> dict[str, Any]:
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
    memory = compiled.memory_analysis()
    return {
        "trace_seconds": round(traced - started, 2),
        "compile_seconds": round(done - traced, 2),
        "milliseconds": round(1e3 * (time.perf_counter() - begin) / calls, 3),
        "temporary_bytes": memory.temp_size_in_bytes if memory is not None else None,
    }


def products(precision: str | None, width: int, calls: int) -> dict[str, Any]:
    """Newton-Schulz of a batch of 16 square matrices."""
    x = jax.random.normal(jax.random.key(0), (16, width, width))
    started = time.perf_counter()
    compiled = jax.jit(lambda x: newton_schulz(x, precision=precision)).lower(x).compile()
    done = time.perf_counter()
    jax.block_until_ready(compiled(x))
    begin = time.perf_counter()
    jax.block_until_ready([compiled(x) for _ in range(calls)])
    milliseconds = 1e3 * (time.perf_counter() - begin) / calls
    return {"compile_seconds": round(done - started, 2), "milliseconds": round(milliseconds, 3)}


@dataclass(frozen=True, eq=False)
class RandomTokens:
    """Tokens without meaning; what a step costs does not depend on them. `LanguageData`."""

    vocabulary: int
    unit: str = "nats per token"

    def describe(self) -> dict[str, Any]:
        return {"tokens": "random"}

    def sample(self, seed: int, step: int, count: int, context: int) -> np.ndarray:
        rng = np.random.default_rng((seed, step))
        return rng.integers(0, self.vocabulary, (count, context + 1), np.uint16)

    def spread(self, context: int, most: int) -> np.ndarray:
        return self.sample(0, 0, max(1, most // context), context)


def training(config: GPTConfig, name: str, batch: int, steps: int, calls: int) -> dict[str, Any]:
    """Times calls of several training steps; "gradient" is the model without an optimizer."""
    task = LanguageModel(config, RandomTokens(config.vocabulary), batch)
    # Updates of zero would let XLA leave the gradients out.
    nothing = optax.stateless(lambda updates, _: jax.tree.map(lambda g: 1e-30 * g, updates))
    tx = nothing if name == "gradient" else harness.build(name, 1e-4, total_steps=1000)
    state = init_state(task, tx, 0)
    batches = jnp.asarray(np.stack([task.batch(0, k) for k in range(steps)]))
    state_bytes = tree_bytes((state.params, state.opt_state))
    params, opt_state = state.params, state.opt_state
    started = time.perf_counter()
    params, opt_state, losses = train_chunk(task, tx, params, opt_state, batches)
    jax.block_until_ready(losses)
    first, seconds = time.perf_counter() - started, []
    for _ in range(calls):
        begin = time.perf_counter()
        params, opt_state, losses = train_chunk(task, tx, params, opt_state, batches)
        jax.block_until_ready(losses)
        seconds.append((time.perf_counter() - begin) / steps)
    step = statistics.median(seconds)
    memory = jax.devices()[0].memory_stats() or {}
    share = share_of_peak(task.flops_per_batch, step)
    return {
        "first_call_seconds": round(first, 2),
        "step_milliseconds": round(1e3 * step, 3),
        "tokens_per_second": round(task.tokens_per_batch / step),
        "share_of_peak": None if share is None else round(share, 4),
        "loss": float(losses[-1]),
        "params_and_state_bytes": state_bytes,
        "peak_bytes": memory.get("peak_bytes_in_use"),
    }


def items(options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """What is measured, what matters most first."""
    found: dict[str, list[tuple[str, ...]]] = {
        "updates": [("updates", tree, name) for tree in options.trees for name in OPTIMIZERS if name not in VARIANTS],
        "training": [("training", name) for name in ("gradient", *TRAINED)],
        "large": [("large", "celo2_ortho")],
        "products": [("products", str(precision)) for precision in PRECISIONS],
        # Last, since the first of them compiles longest.
        "variants": [("updates", tree, name) for tree in options.trees for name in VARIANTS],
    }
    for name in options.items:
        yield from found[name]


def measure(item: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    if item[0] == "updates":
        result = update(item[1], item[2], options.calls)
    elif item[0] == "products":
        result = products(None if item[1] == "None" else item[1], 16 if options.tiny else 1024, options.calls)
    elif item[0] == "training":
        config = TINY if options.tiny else dataclasses.replace(TOKEN_MODELS["gpt2-124m"], dtype="bfloat16")
        result = training(config, item[1], 2 if options.tiny else options.batch, 5, 2 if options.tiny else 6)
    else:
        config = TINY if options.tiny else dataclasses.replace(TOKEN_MODELS["gpt3-xl-1.3b"], dtype="bfloat16")
        result = training(config, item[1], 2 if options.tiny else 4, 4, 5)
    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__, **result}


def with_share(line: dict[str, Any], gradient: float | None) -> dict[str, Any]:
    """The line of a training item with the optimizer's share of a step."""
    if gradient is None or "step_milliseconds" not in line:
        return line
    return line | {"share_of_optimizer": round(1.0 - gradient / line["step_milliseconds"], 4)}


def count(tree: str, name: str) -> dict[str, Any]:
    """What one update launches on a GPU."""
    jax.config.update("jax_platforms", "cpu")
    device = _h100()
    with mock.patch("jax.default_backend", lambda: "gpu"):
        shapes, tx = MODEL_SHAPES[tree](), OPTIMIZERS[name]()
        arguments = (shapes, jax.eval_shape(tx.init, shapes), shapes)
        if device is not None:
            place = jax.sharding.SingleDeviceSharding(device)
            arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments)
        traced = jax.jit(tx.update, donate_argnums=(0, 1)).trace(*arguments)
        lowered = traced.lower(lowering_platforms=("cuda",)) if device is None else traced.lower()
    text = lowered.as_text()
    line: dict[str, Any] = {"operations": text.count(" = "), "pallas_calls": text.count("@__gpu$xla.gpu.triton")}
    if device is not None:
        began = _processor_seconds()
        launches = count_launches(lowered.compile().as_text() or "")
        parameters = sum(x.size for x in jax.tree.leaves(shapes))
        line |= {
            "launches": launches.kernels,
            "branches": launches.branches,
            "words_per_parameter": round(launches.bytes / 4 / parameters, 2),
            "kinds": launches.kinds,
            "compile_processor_seconds": round(_processor_seconds() - began, 1),
        }
    return line


def _h100() -> Any:
    """An H100 to compile for, or None where the plugin or the assembler is missing."""
    # Looking for a part of a package that is missing is an error.
    part = lambda of, name: importlib.util.find_spec(f"{of}.{name}") if importlib.util.find_spec(of) else None
    plugin, tools = part("jax_plugins", "xla_cuda12"), part("nvidia", "cuda_nvcc")
    if plugin is None or tools is None:
        return None
    from jax.experimental import topologies

    folder = Path(next(iter(tools.submodule_search_locations or ())))
    os.environ["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
    os.environ["XLA_FLAGS"] = f"--xla_gpu_autotune_level=0 --xla_gpu_cuda_data_dir={folder}"
    return topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1").devices[0]


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=580.0, help="for all items")
    parser.add_argument("--each", type=float, default=75.0, help="for an item at most")
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32, help="windows of 1,024 tokens in a step of GPT-2")
    parser.add_argument("--trees", nargs="+", default=["gpt2-12"])
    parser.add_argument("--items", nargs="+", default=["updates", "training", "large", "products", "variants"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--out", type=Path, help="file for the lines, beside the terminal")
    parser.add_argument("--item", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.tiny:
        options.trees, options.calls = ["tiny"], 2
    if options.count:
        options.items = ["updates"]
    return options


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    if options.item:
        found = count(*options.item[1:]) if options.count else measure(options.item, options)
        print(json.dumps(found), flush=True)
        return [found]
    end, lines, gradient = time.monotonic() + options.seconds, [], None
    for item in items(options):
        line: dict[str, Any] = {"item": " ".join(item)}
        left = min(options.each, end - time.monotonic())
        command = [sys.executable, __file__, *arguments, "--item", *item]
        try:
            if left <= 0:
                raise subprocess.TimeoutExpired(command, 0)
            done = subprocess.run(command, capture_output=True, text=True, timeout=left)
            printed = done.stdout.splitlines()
            line |= json.loads(printed[-1]) if done.returncode == 0 else {"error": done.stderr[-500:]}
        except subprocess.TimeoutExpired:
            line |= {"error": f"not done after {max(left, 0.0):.0f} s"}
        if item == ("training", "gradient"):
            gradient = line.get("step_milliseconds")
        elif item[0] == "training":
            line = with_share(line, gradient)
        lines.append(line)
        print(json.dumps(line), flush=True)
        if options.out is not None:
            options.out.write_text("".join(json.dumps(x) + "\n" for x in lines))
    return lines


if __name__ == "__main__":
    main()
