"""Part of a run on some devices, as a program: the number of devices is fixed when JAX starts.

Usage: run_part.py IMAGES OUT DEVICES STOP [wait]. It starts the run or resumes it, saves every iteration, and stops
after iteration STOP; or waits there to be killed, before that iteration is saved.
"""

import signal
import sys
from pathlib import Path

import jax


def main(images, out, devices, stop, *wait):
    """Prints a line per iteration."""
    jax.config.update("jax_num_cpu_devices", int(devices))

    from helpers import META_CONFIG

    from celo2_harness.lab.metatrain import load_data, run_metatrain, task_mesh

    done = [0]

    def show(now):
        done.append(now.step)
        print("iteration", now.step, flush=True)
        if wait and now.step == int(stop):
            signal.pause()

    run_metatrain(
        META_CONFIG,
        load_data(META_CONFIG, images),
        out,
        resume=(Path(out) / "metrics.jsonl").exists(),
        mesh=task_mesh(),
        log_every=1,
        checkpoint_every=1,
        on_progress=show,
        should_stop=lambda: done[-1] == int(stop),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
