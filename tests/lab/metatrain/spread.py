"""A short meta-training run on some devices, as a program: the number of devices is fixed when JAX starts.

Usage: spread.py OUT DEVICES [ADDRESS PROCESS]. With an address, it is process 0 or 1 of two.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np


def main(out, devices, *distributed):
    """Writes theta and metrics after two iterations."""
    jax.config.update("jax_num_cpu_devices", int(devices))
    if distributed:
        jax.distributed.initialize(distributed[0], num_processes=2, process_id=int(distributed[1]))

    from helpers import META_CONFIG, META_IMAGES, META_LABELS

    from celo2_harness.lab.metatrain import InnerData, init_metatrain, metatrain_step, place_data, task_mesh
    from celo2_harness.lab.tasks import ImageSets

    config = dataclasses.replace(
        META_CONFIG, variant="ortho", widths=("64-4-10",), tasks_per_set=4, truncation=10, shortest_unroll=10
    )
    images = ImageSets(
        images=jnp.asarray(META_IMAGES.reshape(20, 64)),
        labels=jnp.asarray(META_LABELS, jnp.int32),
        starts=jnp.array([0, 10], jnp.int32),
        sizes=jnp.array([10, 10], jnp.int32),
    )
    data = InnerData(images)
    mesh = None if len(jax.devices()) == 1 else task_mesh()
    if mesh is not None:
        data = place_data(data, mesh)
    state = init_metatrain(config, 2, mesh=mesh)
    for _ in range(2):
        state, metrics = metatrain_step(config, state, data, mesh=mesh)
    shown = {**state.theta._asdict(), "meta_loss": metrics.tasks.meta_loss, "gradient_norm": metrics.gradient_norm}
    np.savez(out, **{name: np.asarray(x) for name, x in shown.items()}, devices=len(jax.devices()))


if __name__ == "__main__":
    main(*sys.argv[1:])
