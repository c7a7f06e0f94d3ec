"""Which cheap runs put rules into the order of expensive ones: Spearman's correlations over rules, with intervals.

Usage: python -m benchmarks.stacks.correlation [FOLDER]

The folder (meta-training/linear) holds the runs of `benchmarks.stacks` and of `proxies.py`. A rule's value is its mean
final loss over seeds and both texts, at its best rates. Intervals are those of 10,000 resamplings of the rules.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata  # comes with JAX

TEXTS = {"documentation": "perl-doc.txt", "Shakespeare": "tinyshakespeare.txt"}
MUON_RATES = (2e-3, 1e-2)
# Far behind everything at any size: one such rule would make every proxy look good.
LEFT_OUT = "hyperball"
# `proxies.py` calls rules by shorter names than the runs do.
RUN_LABELS = {
    "found": "searched rule in basis",
    **{name: f"searched rule: {name}" for name in ("no slopes", "only 0.99", "no 0.99", "flat linear")},
    **{
        f"w2 {weight}, {structure}": f"{name}, annealed, w2 {weight}"
        for weight in (0.1, 0.3, 1.0)
        for structure, name in (("linear", "Muon"), ("whiten", "SOAP"))
    },
}

Record = Mapping[str, Any]
# By rule.
Values = Mapping[str, float]


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def mean_over_texts(value: Callable[[str], Values]) -> Values:
    """The mean over both texts, of the rules that have both."""
    first, second = map(value, TEXTS.values())
    return {label: (first[label] + second[label]) / 2 for label in first if label in second}


def finals(
    runs: Sequence[Record], model: str, text: str, phases: Sequence[str], rates: tuple[float, float] | None = None
) -> Values:
    """The mean final loss of every rule at its best rates, or at the given ones, of the first phase that has any."""
    found: dict[str, float] = {}
    for phase in phases:
        cells: dict[str, dict[tuple[float, float], list[float]]] = {}
        for run in runs:
            pair = run["hidden_rate"], run["rest_rate"]
            own = (run["phase"], run["model"], run["text"]) == (phase, model, text) and LEFT_OUT not in run["stack"]
            if own and rates in (None, pair):
                cells.setdefault(run["stack"], {}).setdefault(pair, []).append(run["loss"])
        for label, by_rates in cells.items():
            found.setdefault(label, min(float(np.mean(losses)) for losses in by_rates.values()))
    return found


def along(runs: Sequence[Record], model: str, text: str, value: Callable[[Record], float]) -> Values:
    """The mean of something over the report runs of every rule."""
    found: dict[str, list[float]] = {}
    for run in runs:
        own = (run["phase"], run["model"], run["text"]) == ("report", model, text) and LEFT_OUT not in run["stack"]
        if own and ("training" in run or value is not training_loss):
            found.setdefault(run["stack"], []).append(value(run))
    return {label: float(np.mean(values)) for label, values in found.items()}


def final_loss(run: Record) -> float:
    """The held-out loss at the end of a run."""
    return run["loss"]


def training_loss(run: Record) -> float:
    """The training loss over the last tenth of a run."""
    return run["training"][-1] if isinstance(run["training"], list) else run["training"]


def proxies(runs: Sequence[Record], text: str, value: Callable[[Record], float], **of: Any) -> Values:
    """The mean over the seeds of every rule in `proxies.py`."""
    found: dict[str, list[float]] = {}
    for run in runs:
        if run["text"] == text and all(run[name] == wanted for name, wanted in of.items()):
            found.setdefault(RUN_LABELS.get(run["stack"], run["stack"]), []).append(value(run))
    return {label: float(np.mean(values)) for label, values in found.items()}


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The correlations of ranks along the last axis; equal values share theirs."""
    x, y = (ranks - ranks.mean(axis=-1, keepdims=True) for ranks in (rankdata(x, axis=-1), rankdata(y, axis=-1)))
    with np.errstate(invalid="ignore"):
        return np.sum(x * y, axis=-1) / np.sqrt(np.sum(x**2, axis=-1) * np.sum(y**2, axis=-1))


def given(proxy: np.ndarray, target: np.ndarray, other: np.ndarray) -> float:
    """The correlation of ranks that is left when a third quantity is held fixed."""
    xy, xz, yz = spearman(proxy, target), spearman(proxy, other), spearman(target, other)
    return float((xy - xz * yz) / np.sqrt((1.0 - xz**2) * (1.0 - yz**2)))


def row(label: str, proxy: Values, target: Values, rates: Values | None = None, seed: int = 0) -> str:
    """A line of the table: over how many rules, the correlation and its interval, and what is left at equal rates."""
    both = sorted(proxy.keys() & target.keys())
    if len(both) < 5:
        return ""
    x, y = (np.array([values[name] for name in both]) for values in (proxy, target))
    samples = np.random.default_rng(seed).integers(0, len(both), (10_000, len(both)))
    low, high = np.nanquantile(spearman(x[samples], y[samples]), (0.025, 0.975))
    left = f"{given(x, y, np.array([rates[name] for name in both])):.2f}" if rates else ""
    return f"| {label} | {len(both)} | {spearman(x, y):.2f} | {low:.2f} to {high:.2f} | {left} |"


def main(folder: Path) -> int:
    """Prints the tables."""
    runs, tiny, mixtures = (read(folder / f"{name}.jsonl") for name in ("runs", "proxies", "mixtures"))
    phases = ("report", "selection")
    nano = mean_over_texts(lambda text: finals(runs, "nano", text, phases))
    nano_64 = mean_over_texts(lambda text: finals(runs, "nano-64", text, (*phases, "leave-one-out", "annealed raw")))
    mixed = {m["stack"]: float(np.mean(list(m["loss"].values()))) for m in mixtures}

    def heading(title: str) -> None:
        print(f"\n| {title} | rules | rho | 95% interval | given the rate |\n| --- | --- | --- | --- | --- |")

    heading("order on `nano`, 1,000 steps")
    print(
        row(
            "itself: two selection seeds against eight fresh ones",
            mean_over_texts(lambda text: finals(runs, "nano", text, ("selection",))),
            mean_over_texts(lambda text: finals(runs, "nano", text, ("report",))),
        )
    )
    for name, text in TEXTS.items():
        (other,) = (path for path in TEXTS.values() if path != text)
        target = finals(runs, "nano", text, phases)
        print(row(f"itself on the other text, {name}", finals(runs, "nano", other, phases), target))
        print(row(f"`nano-64`, {name}", finals(runs, "nano-64", text, phases), target))
        print(row(f"`nano-64` on the other text, {name}", finals(runs, "nano-64", other, phases), target))
    print(row("`nano-64`, both texts", nano_64, nano))
    measures: dict[str, Callable[[Record], float]] = {
        **{f"after {100 * (k + 1)} of 1,000 steps": lambda run, k=k: run["curve"][k] for k in (0, 1, 2, 4, 7)},
        "mean of the curve": lambda run: float(np.mean(run["curve"])),
        "training loss, last tenth": training_loss,
        "final": final_loss,
    }
    for model in ("nano", "nano-64"):
        for name, value in measures.items():
            if (model, name) != ("nano", "final"):
                values = mean_over_texts(lambda text, model=model, value=value: along(runs, model, text, value))
                print(row(f"`{model}` {name}", values, nano))
    tiny_rows(tiny, nano)

    heading("order on `nano-64`, 1,000 steps")
    at_equal = mean_over_texts(lambda text: finals(runs, "nano-64", text, ("selection",), MUON_RATES))
    print(row("itself, all at Muon's rates", at_equal, nano_64))
    for name, value in measures.items():
        if name != "final":
            values = mean_over_texts(lambda text, value=value: along(runs, "nano-64", text, value))
            print(row(f"itself {name}", values, nano_64))
    tiny_rows(tiny, nano_64)

    heading("order on `nano-64` at Muon's rates, 1,000 steps")
    tiny_rows(tiny, at_equal)

    heading("order of random mixtures on `nano-64`, 1,000 steps, one seed")
    tiny_rows(tiny, mixed)
    return 0


def tiny_rows(tiny: Sequence[Record], target: Values) -> None:
    """The rows of the tiny models, and one of no model at all: whether a rule has high rates."""
    hidden = {RUN_LABELS.get(run["stack"], run["stack"]): -run["hidden_rate"] for run in tiny if run["rates"] == "own"}
    print(row("no run: the higher its own hidden rate", hidden, target))
    for model in dict.fromkeys(run["model"] for run in tiny):
        for steps in sorted({run["steps"] for run in tiny if run["model"] == model}):
            rates = {run["rates"] for run in tiny if run["model"] == model and run["steps"] == steps}
            for name in sorted(rates, reverse=True):
                values = mean_over_texts(
                    lambda text, name=name: proxies(tiny, text, final_loss, model=model, steps=steps, rates=name)  # noqa: B023
                )
                if line := row(
                    f"{model}, {steps} steps, {name} rates", values, target, hidden if name == "own" else None
                ):
                    print(line)
            values = mean_over_texts(
                lambda text: proxies(tiny, text, training_loss, model=model, steps=steps, rates="own")  # noqa: B023
            )
            if line := row(f"{model}, {steps} steps, own rates, training loss", values, target, hidden):
                print(line)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "meta-training/linear")))
