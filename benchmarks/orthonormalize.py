"""Three ways to make the columns of squares orthonormal, timed in turn: what `in_eigenbasis` does in every step.

    python benchmarks/orthonormalize.py [--sides 64 128 ...] [--rounds 5]

Cholesky QR and `jax.numpy.linalg.qr` give the orthonormal factor of the QR decomposition. Newton-Schulz (five quintic
iterations) is here for its time: it finds the nearest orthonormal matrix, which is another one, and does not make a
basis turn. "Moving" matrices are a power step of a basis that is nearly there already, as they are after the first
steps of a run; "normal" ones have independent normal entries. Times are those of the processor, all threads together,
so that other programs on the machine matter little.
"""

import argparse
import statistics
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from celo2_harness.lab.bench import interleave, median_ratio
from celo2_harness.rule import newton_schulz
from celo2_harness.rule.eigenbasis import cholesky_qr

METHODS = {
    "Cholesky QR": cholesky_qr,
    "jnp.linalg.qr": lambda y: jnp.linalg.qr(y)[0],
    "Newton-Schulz": newton_schulz,
}


def moving(batch: int, side: int) -> np.ndarray:
    """L Q with Q close to the eigenvectors of L, whose eigenvalues fall as 1 / k."""
    rng = np.random.default_rng(0)
    exact = np.linalg.qr(rng.normal(size=(batch, side, side)))[0]
    basis = np.linalg.qr(exact + 1e-3 / np.sqrt(side) * rng.normal(size=exact.shape))[0]
    covariance = exact / np.arange(1, side + 1) @ exact.transpose(0, 2, 1)
    return covariance @ basis


def normal(batch: int, side: int) -> np.ndarray:
    """Independent entries."""
    return np.random.default_rng(0).normal(size=(batch, side, side))


def main() -> int:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--entries", type=int, default=2**20, help="of a batch, at least one matrix")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {options.rounds} rounds; ms of processor time")
    print(f"{'matrices':24}" + "".join(f"{name:>32}" for name in METHODS))
    for side in options.sides:
        for kind in (moving, normal):
            batch = max(1, options.entries // side**2)
            y = jnp.asarray(kind(batch, side), jnp.float32)
            functions = {name: jax.jit(function) for name, function in METHODS.items()}
            calls = {name: partial(function, y) for name, function in functions.items()}
            seconds = interleave(calls, options.rounds, clock=time.process_time)
            cells = []
            for name, function in functions.items():
                q = np.asarray(function(y), np.float64)
                error = np.max(np.abs(np.swapaxes(q, -1, -2) @ q - np.eye(side)))
                ratio = median_ratio(seconds[name], seconds["Cholesky QR"])
                cells.append(f"{1e3 * statistics.median(seconds[name]):.1f} ({ratio:.2f}x), off by {error:.0e}")
            print(f"{f'{batch} x {side}, {kind.__name__}':24}" + "".join(f"{cell:>32}" for cell in cells), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
