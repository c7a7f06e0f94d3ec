"""The whole train state saved with Orbax, and restored onto another mesh: training goes on as if nothing had happened.

The first half runs with the parameters spread over half of the devices, the second half over all of them. Try it with
XLA_FLAGS=--xla_force_host_platform_device_count=4.
"""

import tempfile

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from celo2_harness import harness

STEPS = 20


def init(key):
    keys = jax.random.split(key)
    return {
        "hidden": {"kernel": jax.random.normal(keys[0], (8, 16)) / 3, "bias": jnp.zeros(16)},
        "head": {"kernel": jax.random.normal(keys[1], (16, 1)) / 4},
    }


def loss_fn(params, x, y):
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return jnp.mean((hidden @ params["head"]["kernel"] - y) ** 2)


def place(tree, devices):
    """Matrices spread over the devices by their last axis where it divides, all else on every device."""
    mesh = Mesh(devices, ("model",))

    def sharding(leaf):
        spread = leaf.ndim > 1 and leaf.shape[-1] % len(devices) == 0
        return NamedSharding(mesh, P(*[None] * (leaf.ndim - 1), "model") if spread else P())

    return jax.tree.map(sharding, tree)


def main():
    x, y = jax.random.normal(jax.random.key(1), (32, 8)), jax.random.normal(jax.random.key(2), (32, 1))
    params = init(jax.random.key(0))
    tx = harness.build("celo2_ortho", 3e-3, STEPS)
    run = {"params": params, "opt_state": tx.init(params), "step": jnp.zeros([], jnp.int32)}
    few, all_of_them = jax.devices()[: (jax.device_count() + 1) // 2], jax.devices()

    @jax.jit
    def step(run):
        loss, grads = jax.value_and_grad(loss_fn)(run["params"], x, y)
        updates, opt_state = tx.update(grads, run["opt_state"], run["params"])
        params = optax.apply_updates(run["params"], updates)
        return {"params": params, "opt_state": opt_state, "step": run["step"] + 1}, loss

    def train(run):
        losses = []
        for _ in range(STEPS // 2):
            run, loss = step(run)
            losses.append(float(loss))
        return run, losses

    shapes = jax.eval_shape(lambda: run)
    run, losses = train(jax.device_put(run, place(shapes, few)))
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(f"{folder}/checkpoint", run)
        checkpointer.wait_until_finished()
        # Shapes, dtypes and where to put what: the mesh may be another one.
        like = jax.tree.map(
            lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to),
            shapes,
            place(shapes, all_of_them),
        )
        restored = checkpointer.restore(f"{folder}/checkpoint", like)
    assert restored["params"]["hidden"]["kernel"].sharding.device_set == set(all_of_them)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), jax.device_get(restored), jax.device_get(run))
    assert all(jax.tree.leaves(same))
    restored, more = train(restored)
    assert int(restored["step"]) == STEPS
    return losses[0], more[-1]


if __name__ == "__main__":
    print("first loss {:.4f}, last loss {:.4f}".format(*main()))
