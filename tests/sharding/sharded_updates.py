"""Updates on a mesh of eight devices beside those of one, as a program: the number of devices is fixed when JAX starts.

Usage: sharded_updates.py OUT DEVICES tiny|published [ADDRESS PROCESS]. With an address, it is process 0 or 1 of two.
Writes what it found as JSON.
"""

import collections
import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

SHAPES = {
    **{f"block_{i}": {"mlp": {"kernel": (16, 24), "bias": (24,)}} for i in range(3)},
    "layers": {"kernel": (3, 8, 12)},
    "odd": {"kernel": (5, 7)},
    "token_embedding": {"embedding": (64, 16)},
}
CONVOLUTION = {"conv": {"kernel": (3, 3, 4, 8)}}
# Its covariance has its own shape.
SQUARE = {"square": {"kernel": (8, 8)}}
MESHES = ({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8})


def normal(seed, scale, more=None):
    from helpers import normal

    return normal(jax.random.key(seed), SHAPES | CONVOLUTION | (more or {}), scale)


def put(tree, places):
    """NumPy arrays on the mesh, from every process the whole."""
    make = lambda x, place: jax.make_array_from_callback(x.shape, place, lambda index: np.asarray(x)[index])
    return jax.tree.map(make, tree, places)


def difference(got, wanted):
    """The largest error of a leaf, of the parts that this process has, relative to the leaf's largest entry."""
    worst = 0.0
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        y = np.asarray(y)
        for shard in x.addressable_shards:
            worst = max(worst, float(np.max(np.abs(np.asarray(shard.data) - y[shard.index])) / np.max(np.abs(y))))
    return worst


def counted(compiled):
    from celo2_harness.lab.bench import find_collectives

    found = find_collectives(compiled.as_text())
    return {
        "counts": collections.Counter(x.kind for x in found),
        "sent": sum(x.operand_bytes for x in found if x.kind in ("all-to-all", "all-gather")),
        "largest": max((x.largest_operand for x in found if x.kind != "all-to-all"), default=0),
    }


def updates(preset, weights, lengths):
    """Three steps of a preset on the mesh and off it."""
    from celo2_harness import harness
    from celo2_harness.sharding import like_parameters, make_mesh, parameter_shardings
    from celo2_harness.velo import load_velo_weights

    mesh = make_mesh(lengths)
    name = dataclasses.replace(harness.presets()[preset], load=load_velo_weights) if preset == "velo" else preset
    plain, tx = (harness.build(name, 1e-3, 10, weights=weights, sharding=place) for place in (None, mesh))
    loss = jnp.ones([])  # for those that watch it
    params, gradients = normal(0, 0.1), [normal(seed, 0.01) for seed in (1, 2, 3)]
    places = parameter_shardings(params, mesh)
    placed = put(params, places)
    state, there = jax.jit(plain.init)(params), jax.jit(tx.init)(placed)
    assert jax.tree.structure(state) == jax.tree.structure(there)
    at = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
    started = at(there)
    found = like_parameters(there, placed, places)
    like = [
        place is None or x.sharding.is_equivalent_to(place, x.ndim)
        for x, place in zip(jax.tree.leaves(there), jax.tree.structure(there).flatten_up_to(found), strict=True)
    ]
    one, many = jax.jit(plain.update), jax.jit(tx.update)
    worst = 0.0
    for gradient in gradients:
        wanted, state = one(gradient, state, params, value=loss)
        got, there = many(put(gradient, places), there, placed, value=loss)
        worst = max(worst, difference(got, wanted))
    compiled = many.lower(put(gradient, places), there, placed, value=loss).compile()
    return counted(compiled) | {
        "error": worst,
        "state_error": difference(there, state),
        "state_like_parameters": all(like),
        "placed": sum(place is not None for place in jax.tree.structure(there).flatten_up_to(found)),
        "stays": at(there) == started and jax.tree.all(jax.tree.map(lambda x, p: x.sharding == p, got, places)),
        "compilations": many._cache_size(),
        "state": sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(there)),
        "leaves": len(jax.tree.leaves(params)),
    }


def blocks(weights):
    """Three steps of the modern blocks on the mesh and off it, with the state where `state_shardings` says."""
    import optax

    import celo2_harness as c2
    from celo2_harness.sharding import make_mesh, parameter_shardings, state_shardings

    mesh = make_mesh(MESHES[0])
    params, gradients = normal(0, 0.1, SQUARE), [normal(seed, 0.01, SQUARE) for seed in (1, 2, 3)]
    places = parameter_shardings(params, mesh)
    rule = lambda sharding: c2.celo2_direction(weights or "celo2", sharding=sharding)
    made = {
        "mix_momenta": lambda sharding: c2.mix_momenta((0.9, 0.99)),
        "look_ahead": lambda sharding: c2.look_ahead(0.5, 0.5, 0.0, total_steps=10),
        "control_norm": lambda sharding: c2.control_norm("hyperball", 0.1),
        "average_tail": lambda sharding: c2.average_tail(0.0, total_steps=10),
        "linear_direction": lambda sharding: c2.linear_direction(total_steps=10, sharding=sharding),
        "in_eigenbasis": lambda sharding: c2.in_eigenbasis(optax.trace(0.9), sharding=sharding),
        "in_eigenbasis act": lambda sharding: c2.in_eigenbasis(rule(sharding), mode="act", sharding=sharding),
        "in_eigenbasis act, linear": lambda sharding: c2.in_eigenbasis(
            c2.linear_direction(total_steps=10, sharding=sharding), mode="act", sharding=sharding
        ),
    }
    results = {}
    for name, make in made.items():
        plain, tx, placed = make(None), make(places), put(params, places)
        state_places = state_shardings(tx, params, places)
        state, there = jax.jit(plain.init)(params), jax.jit(tx.init, out_shardings=state_places)(placed)
        one, many = jax.jit(plain.update), jax.jit(tx.update, out_shardings=(places, state_places))
        worst = 0.0
        for gradient in gradients:
            wanted, state = one(gradient, state, params)
            got, there = many(put(gradient, places), there, placed)
            worst = max(worst, difference(got, wanted))
        compiled = many.lower(put(gradient, places), there, placed).compile()
        results[name] = counted(compiled) | {"error": worst, "state_error": difference(there, state)}
        if name.startswith("in_eigenbasis"):
            squares = jax.tree.leaves(there.squares)
            results[name]["everywhere"] = all(x.sharding.is_fully_replicated for x in squares)
            results[name]["sizes"] = len({x.shape[-1] for x in squares})
            results[name]["leaves"] = len(squares) // 2
    return results


def plans(weights):
    """What is planned for a mesh, and what a compiled update takes."""
    from celo2_harness import harness
    from celo2_harness.lab.bench import estimate_update, plan_update
    from celo2_harness.lab.bench.models import matrix_blocks
    from celo2_harness.sharding import make_mesh, parameter_shardings

    lengths = {"data": 2, "fsdp": 4}
    mesh, shapes = make_mesh(lengths), matrix_blocks(32, 4) | {"norm": {"scale": jax.ShapeDtypeStruct((6,), "float32")}}
    results = {}
    for preset in ("celo2_ortho", "adamw"):
        tx = harness.build(preset, 1e-3, weights=weights if preset != "adamw" else None, sharding=mesh)
        plan = plan_update(tx, shapes, mesh)
        places = parameter_shardings(shapes, mesh)
        params = jax.tree.map(lambda x, place: jnp.zeros(x.shape, device=place), shapes, places)
        state = jax.jit(tx.init)(params)
        compiled = jax.jit(tx.update, donate_argnums=(0, 1), keep_unused=True).lower(params, state, params).compile()
        memory = compiled.memory_analysis()
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        results[preset] = {
            "plan": plan._asdict() | {"total": plan.total},
            "measured": memory.argument_size_in_bytes + memory.temp_size_in_bytes + new,
            "sent": counted(compiled)["sent"],
            "estimate": estimate_update(
                harness.build(preset, 1e-3), shapes, lengths, orthogonalized=preset != "adamw"
            )._asdict(),
        }
    return results


def orthogonalization():
    """Matrices cut in all ways: the result, and the collectives for two iterations and for five."""
    from jax.sharding import NamedSharding, PartitionSpec
    from optax.contrib import MuonDimensionNumbers

    import celo2_harness as c2
    from celo2_harness.blocks.spread import plan_rounds
    from celo2_harness.blocks.views import matrix_views
    from celo2_harness.sharding import make_mesh

    module = sys.modules["celo2_harness.blocks.orthogonalize"]  # the package has the function by this name
    mesh = make_mesh(MESHES[0])
    cases = {  # shapes, how they are cut, view
        "rows": ([(8, 12)] * 5, ("fsdp",), None),
        "columns, on two axes": ([(12, 8)] * 3, (None, ("tensor", "fsdp")), None),
        "rows and columns": ([(8, 12)] * 9, ("data", "tensor"), None),
        "nothing": ([(8, 12)] * 9, (), None),
        "a stack by its layers": ([(4, 8, 12), (2, 8, 12)], ("fsdp", None, "tensor"), None),
        "heads": ([(12, 2, 4)] * 2, ("fsdp",), MuonDimensionNumbers((0,), (2,))),
        "a convolution": ([(3, 3, 4, 8)] * 2, (None, None, "fsdp", "tensor"), MuonDimensionNumbers((0, 1, 2), (3,))),
    }
    results = {}
    for name, (shapes, spec, view) in cases.items():
        leaves = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
        place = NamedSharding(mesh, PartitionSpec(*spec))
        placed = put(leaves, [place] * len(leaves))

        def compiled(iterations, places, placed=placed, place=place, view=view):
            triples = [(3.4445, -4.7750, 2.0315)] * iterations
            tx = c2.orthogonalize(triples, weight_dimension_numbers=view, sharding=places)
            update = jax.jit(lambda x: tx.update(x, tx.init({}))[0], out_shardings=[place] * len(placed))
            return update.lower(placed).compile()

        results[name] = {}
        for largest in (module.LARGEST_STACKED, 100):  # all in one round; a matrix or two per device at a time
            module.LARGEST_STACKED, before = largest, module.LARGEST_STACKED
            rounds = plan_rounds(leaves, matrix_views(leaves, view), [place] * len(leaves), largest)
            five = compiled(5, [place] * len(leaves))
            module.LARGEST_STACKED = before
            wanted = c2.orthogonalize(weight_dimension_numbers=view).update(leaves, None)[0]
            results[name][largest] = counted(five) | {
                "error": difference(five(placed), wanted),
                "rounds": len(rounds),
                "planned": [sum(len(turn.sent) for turn in rounds), sum(sum(turn.sent) for turn in rounds)],
            }
        if name == "rows":  # outside of jit
            tx = c2.orthogonalize(sharding=[place] * len(leaves))
            results["eager"] = difference(tx.update(placed, None)[0], wanted)
        results[name]["two"] = counted(compiled(2, [place] * len(leaves)))["counts"]
        if name == "rows":
            results["by XLA"] = {n: counted(compiled(n, None))["counts"] for n in (2, 5)}
    return results


def main(out, devices, which, *distributed):
    """Writes the findings."""
    jax.config.update("jax_num_cpu_devices", int(devices))
    jax.config.update("jax_disable_most_optimizations", which == "tiny")  # compiling is what takes the time
    if distributed:
        jax.distributed.initialize(distributed[0], num_processes=2, process_id=int(distributed[1]))
    from helpers import TINY, VELO_TINY

    weights = TINY if which == "tiny" else None
    # Of VeLO there are no weights to read; those of `celo2` are its own.
    of = {"velo": VELO_TINY, "celo2": None, "modern_muon": None, "muon": None, "adamw": None}
    found = {
        f"{preset} {list(lengths)}": updates(preset, of.get(preset, weights), lengths)
        for preset in ("celo2", "modern_muon", "celo2_ortho", "celo2_base", "celo2_muon", "muon", "adamw", "velo")
        for lengths in (MESHES if preset == "celo2_base" and which != "tiny" else MESHES[:1])
    }
    if not distributed:
        found |= {"orthogonalization": orthogonalization(), "blocks": blocks(weights), "plans": plans(weights)}
    Path(out).write_text(json.dumps(found | {"devices": len(jax.devices())}))


if __name__ == "__main__":
    main(*sys.argv[1:])
