"""Rules on cheap proxies of the nano GPT: small models, short schedules. `correlation.py` says which keep the order.

Usage: python -m benchmarks.stacks.proxies TEXT [TEXT ...] --published FILE [--out meta-training/linear/proxies.jsonl]

Each rule is trained by a full decayed schedule of each length, at its own best rates on `nano-64` and at Muon's. One
core takes half an hour; runs that the file has already are not made again.
"""

import argparse
import functools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.stacks.directions import NUMBERS
from benchmarks.stacks.table import OVER_RMS, STACKS, Stack, structures
from benchmarks.stacks.trainings import Texts
from celo2_harness.lab.tasks.gpt import GPTConfig, gpt_loss, init_gpt
from celo2_harness.lab.tasks.text import read_text

FOLDER = Path("meta-training/linear")
MODELS = {
    "width 32, 1 layer": GPTConfig(width=32, layers=1, heads=2, context=32),
    "width 32, 2 layers": GPTConfig(width=32, layers=2, heads=2, context=32),
}
MUON_RATES = (2e-3, 1e-2)
SIZE = 12

# Rules of earlier runs that are no rows of the table: parts of the first searched rule, and annealed weights.
FIRST_FOUND = OVER_RMS | {
    "weight_1": 0.07321097042867138,
    "slope_1": -0.35775,
    "weight_2": 0.022073885957875107,
    "slope_2": 5.96012,
    "weight_3": 0.001383885716471466,
    "slope_3": 2.46866,
    "basis_decay": 0.6858893604871779,
    "second_decay": 0.9755146426675175,
    "floor_of_second": 5.479538762225026e-10,
    "whitening": 0.82575,
}
LEFT_OUT = {
    "found": {},
    "no slopes": {"slope_1": 0.0, "slope_2": 0.0, "slope_3": 0.0},
    "only 0.99": {"weight_1": 0.0, "weight_3": 0.0},
    "no 0.99": {"weight_2": 0.0},
    "flat linear": {"flat": 0.3, "power": 1.0},
}
RAW = {"gradient": 0.3, "decay_1": 0.9, "weight_1": 0.3, "slope_2": 6.0}


def rules() -> list[tuple[Stack, tuple[float, float]]]:
    """Rules that have been trained on the larger models, with their best rates on `nano-64` (English documentation)."""
    labels = {"searched rule": "second search"}
    runs = [json.loads(line) for line in (FOLDER / "runs.jsonl").read_text().splitlines()]
    found = []
    for stack in STACKS:
        label = labels.get(stack.label, stack.label)
        own = [r for r in runs if r["stack"] == label and r["model"] == "nano-64" and r["text"] == "perl-doc.txt"]
        if own and stack.structure != "optax.contrib.muon" and "look-ahead" not in label and "hyperball" not in label:
            finals: dict[tuple[float, float], list[float]] = {}
            for run in (r for r in own if r["phase"] == "selection"):
                finals.setdefault((run["hidden_rate"], run["rest_rate"]), []).append(run["loss"])
            rates = min(finals, key=lambda pair: float(np.mean(finals[pair])))
            found.append((Stack(label, stack.structure, stack.numbers), rates))
    for label, change in LEFT_OUT.items():
        found.append((Stack(label, "act", FIRST_FOUND | change), (6.1e-3, 1.9e-2)))
    for weight in (0.1, 0.3, 1.0):
        for structure in ("linear", "whiten"):
            label = f"w2 {weight}, {structure}"
            found.append((Stack(label, structure, RAW | {"weight_2": weight}), (6.1e-3, 1.4e-2)))
    for line in (FOLDER / "mixtures.jsonl").read_text().splitlines():
        mixture = json.loads(line)
        rates = mixture["hidden_rate"], mixture["rest_rate"]
        found.append((Stack(mixture["stack"], "act", OVER_RMS | mixture["numbers"]), rates))
    return found


def train_one(structure: Any, model: GPTConfig, data: Any, steps: Any, run: Any) -> tuple[Any, Any]:
    """One run of a length that the compiler does not know: the held-out loss at its end, and all training losses."""
    train, held_out = data
    tx: optax.GradientTransformation = structure(run["numbers"], steps)
    loss_of = functools.partial(gpt_loss, model)

    def step(k: Any, carry: Any) -> Any:
        params, state, losses = carry
        windows = train[run["starts"][k][:, None] + jnp.arange(model.context + 1)]
        loss, gradients = jax.value_and_grad(loss_of)(params, windows)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, losses.at[k].set(loss)

    params = init_gpt(model, jax.random.key(run["seed"]))
    state = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), tx.init(params))
    params, _, losses = jax.lax.fori_loop(0, steps, step, (params, state, jnp.zeros(len(run["starts"]))))
    return loss_of(params, held_out[run["text"]]), losses


def main() -> int:
    """Trains what is missing and writes it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path, metavar="TEXT")
    parser.add_argument("--published", type=Path, required=True, help="a file with the published weights")
    parser.add_argument("--out", type=Path, default=FOLDER / "proxies.jsonl")
    parser.add_argument("--lengths", nargs="+", type=int, default=[100, 200, 400])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rates", nargs="+", choices=["own", "Muon's"], default=["own", "Muon's"])
    options = parser.parse_args()
    made, longest = structures(options.published), max(options.lengths)
    done = options.out.read_text().splitlines() if options.out.exists() else []
    key = lambda r: tuple(r[name] for name in ("stack", "model", "steps", "text", "seed", "rates"))
    there = {key(json.loads(line)) for line in done}
    for name in options.models:
        model = MODELS[name]
        texts = Texts([read_text(path, model.context) for path in options.texts], model.context)
        data = jnp.asarray(texts.train), jnp.asarray(texts.held_out)
        by_structure: dict[str, list[tuple[Stack, dict[str, tuple[float, float]]]]] = {}
        for stack, own in rules():
            rates = {"own": own, "Muon's": MUON_RATES}
            chosen = {label: rates[label] for label in options.rates}
            by_structure.setdefault(stack.structure, []).append((stack, chosen))
        for structure, stacks in by_structure.items():
            program = jax.jit(
                jax.vmap(functools.partial(train_one, made[structure], model), in_axes=(None, None, 0)),
            )
            for steps in options.lengths:
                rows = [
                    {
                        "stack": stack.label, "model": name, "steps": steps, "text": path.name, "seed": seed,
                        "rates": label, "hidden_rate": pair[0], "rest_rate": pair[1],
                    }
                    for stack, rates in stacks
                    for label, pair in rates.items()
                    for path in options.texts
                    for seed in range(options.seeds)
                ]  # fmt: skip
                rows = [row for row in rows if key(row) not in there]
                numbers = {stack.label: {**NUMBERS, **stack.numbers} for stack, _ in stacks}
                for k in range(0, len(rows), SIZE):
                    part, begun = rows[k : k + SIZE], time.perf_counter()
                    finals, losses = program(data, steps, _stacked(part, numbers, texts, options.texts, longest))
                    finals, losses = np.asarray(finals), np.asarray(losses)
                    seconds = time.perf_counter() - begun
                    with options.out.open("a") as file:
                        for row, final, training in zip(part, finals, losses, strict=False):
                            tenths = training[:steps].reshape(10, -1).mean(axis=1)
                            row["loss"] = round(float(final), 4)
                            row["training"] = [round(float(x), 4) for x in tenths]
                            file.write(json.dumps(row) + "\n")
                    print(f"{name}, {structure}, {steps} steps: {len(part)} runs in {seconds:.1f} s", flush=True)
    return 0


def _stacked(
    rows: Sequence[Mapping[str, Any]],
    numbers: Mapping[str, Mapping[str, float]],
    texts: Texts,
    paths: Sequence[Path],
    longest: int,
) -> dict[str, Any]:
    """Runs as arrays, filled up with copies."""
    rows = [*rows, *[rows[0]] * (SIZE - len(rows))]
    places = [[path.name for path in paths].index(row["text"]) for row in rows]
    whole = [{**numbers[r["stack"]], "hidden_rate": r["hidden_rate"], "rest_rate": r["rest_rate"]} for r in rows]
    return {
        "seed": np.array([row["seed"] for row in rows], np.int32),
        "text": np.array(places, np.int32),
        "starts": np.stack([texts.starts(k, row["seed"], longest) for k, row in zip(places, rows, strict=True)]),
        "numbers": {name: np.array([n[name] for n in whole], np.float32) for name in NUMBERS},
    }


if __name__ == "__main__":
    raise SystemExit(main())
