"""Part of a run on some devices, as a program: the number of devices is fixed when JAX starts.

Usage: run_part.py IMAGES OUT DEVICES STOP [ADDRESS PROCESS]. It starts the run or resumes it, and stops after iteration
STOP. With an address, it is process 0 or 1 of two.
"""

import sys
from pathlib import Path

import jax


def main(images, out, devices, stop, *distributed):
    """Prints a line per iteration."""
    jax.config.update("jax_num_cpu_devices", int(devices))
    if distributed:
        jax.distributed.initialize(distributed[0], num_processes=2, process_id=int(distributed[1]))

    from helpers import META_CONFIG

    from celo2_harness.lab.metatrain import run_metatrain, task_mesh

    done = [0]

    def show(line):
        done.append(line["iteration"])
        print("iteration", line["iteration"])

    run_metatrain(
        META_CONFIG,
        images,
        out,
        resume=(Path(out) / "metrics.jsonl").exists(),
        mesh=task_mesh(),
        log_every=1,
        on_log=show,
        stop=lambda: done[-1] >= int(stop),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
