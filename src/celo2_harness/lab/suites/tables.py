"""Tables of results: what each says, in cells; and cells as Markdown and HTML."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from celo2_harness.lab.suites.record import FAILURES, Record
from celo2_harness.lab.suites.results import Row, TaskResults
from celo2_harness.lab.suites.returns import ReturnCurve
from celo2_harness.lab.suites.significance import CONFIDENCE, WEAK_BELOW, paired_difference
from celo2_harness.lab.suites.spikes import SPIKE_FACTOR, peaks

NONE = "-"


class Table(NamedTuple):
    """A table.

    Attributes:
        title: The title, which says what the table shows.
        headings: The headings of the columns.
        rows: The cells.
        notes: The sentences under it.
    """

    title: str
    headings: list[str]
    rows: list[list[str]]
    notes: list[str]


def result_tables(results: TaskResults) -> list[Table]:
    """Returns the tables of one task: the comparison, every trial of the search, and loss spikes.

    Args:
        results: The results of the task.

    Returns:
        The tables; the one on spikes only if the records say something of them.
    """
    tables = [comparison_table(results), search_table(results)]
    spikes = spike_table(results)
    return tables + ([spikes] if spikes.rows else [])


def overview_table(tasks: Sequence[TaskResults]) -> Table:
    """Returns the final losses of all optimizers that were on several tasks, a column per task."""
    rows = {results.title: {row.name: row for row in results.rows} for results in tasks}
    names = dict.fromkeys(name for of_task in rows.values() for name in of_task)
    counts = {name: sum(name in of_task for of_task in rows.values()) for name in names}
    names = sorted((name for name in names if counts[name] > 1), key=lambda name: -counts[name])
    titles = [title for title, of_task in rows.items() if any(name in of_task for name in names)]
    cells = [[name, *(_loss(rows[t][name]) if name in rows[t] else NONE for t in titles)] for name in names]
    notes = ["Mean final loss over seeds ± standard deviation, each optimizer at its best trial on that task."]
    return Table("All tasks", ["optimizer", *titles], cells, notes)


def comparison_table(results: TaskResults) -> Table:
    """Returns one line per optimizer, at its best trial, the lowest final loss first."""
    baseline, reference = results.baseline, results.reference
    headings = ["optimizer", f"final loss ({results.unit})", "seeds", "learning rate", "weight decay", "trials"]
    headings += ["ms per step", "diverged / failed runs"]
    if baseline:
        headings[2:2] = [f"steps to {baseline.name}'s loss", f"time to it, of {baseline.name}'s"]
    if reference:
        headings.insert(2, f"minus {reference.name}, paired")
    rows = []
    for row in sorted(results.rows, key=lambda row: row.loss):
        cells = [
            row.name,
            _loss(row),
            str(len(row.finals)),
            f"{row.learning_rate:g}{_edge(row, results)}",
            NONE if row.weight_decay is None else f"{row.weight_decay:g}",
            str(row.trials),
            NONE if row.step_milliseconds is None else f"{row.step_milliseconds:.1f}",
            " / ".join(str(row.failures[status]) for status in FAILURES),
        ]
        if baseline:
            cells[2:2] = _race(row, baseline, results.steps)
        if reference:
            cells.insert(2, _difference(row, reference))
        rows.append(cells)
    return Table(f"{results.title}, {results.steps:,} steps", headings, rows, _notes(results, baseline, reference))


def search_table(results: TaskResults) -> Table:
    """Returns every trial with its mean final loss: one line per optimizer and weight decay."""
    rates = sorted({record.learning_rate for record in results.searched()})
    groups: dict[tuple[str, float | None], dict[float, list[Record]]] = {}
    for record in results.searched():
        line = groups.setdefault((record.name, record.weight_decay), {})
        line.setdefault(record.learning_rate, []).append(record)
    several = len({decay for _, decay in groups}) > 1
    rows = []
    for (name, decay), line in groups.items():
        cells = [name] + ([NONE if decay is None else f"{decay:g}"] if several else [])
        rows.append(cells + [_trial(line.get(rate, [])) for rate in rates])
    headings = ["optimizer", *(["weight decay"] if several else []), *(f"{rate:g}" for rate in rates)]
    notes = [
        "Mean final loss over the seeds of the search that finished, by learning rate; how many did not, in brackets."
    ]
    return Table(f"{results.title}: every trial", headings, rows, notes)


def spike_table(results: TaskResults) -> Table:
    """Returns the largest jumps of the training loss, at the best trial of each optimizer."""
    rows = []
    notes = ["Largest training loss between two evaluations over the running level of the training loss before."]
    for row in results.rows:
        found = [peaks(record.training, record.training_peak) for record in row.runs if record.training_peak]
        flat = [peak for run in found for peak in run]
        if flat:
            largest = max(flat, key=lambda peak: peak.ratio)
            ratio = "no number" if math.isinf(largest.ratio) else f"{largest.ratio:.2f}x"
            number = sum(peak.ratio > SPIKE_FACTOR for peak in flat)
            rows.append([row.name, str(len(found)), str(number), ratio, f"{largest.step:,}"])
        if guarded := [record.guarded_steps for record in row.runs if record.guarded_steps is not None]:
            notes.append(f"{row.name}: {sum(guarded)} steps skipped or clipped by the guard.")
    headings = ["optimizer", "runs", f"spikes above {SPIKE_FACTOR:g}x", "largest", "up to step"]
    return Table(f"{results.title}: loss spikes", headings, rows, notes)


def _loss(row: Row) -> str:
    if math.isinf(row.loss):
        return "diverged"
    return f"{row.loss:.4f}" + ("" if row.spread is None else f" ± {row.spread:.4f}")


def _edge(row: Row, results: TaskResults) -> str:
    rates = {record.learning_rate for record in results.records if record.name == row.name}
    return "*" if len(rates) > 1 and row.learning_rate in (min(rates), max(rates)) else ""


def _race(row: Row, baseline: Row, steps: int) -> list[str]:
    step = row.steps_to(baseline.loss)
    if step is None:
        return [NONE, NONE]
    reached = f"{step:,} ({step / steps:.0%})"
    if not row.step_milliseconds or not baseline.step_milliseconds:
        return [reached, NONE]
    seconds = step * row.step_milliseconds / 1e3
    return [reached, f"{seconds:.1f} s ({seconds / (steps * baseline.step_milliseconds / 1e3):.0%})"]


def _difference(row: Row, reference: Row) -> str:
    if row.name == reference.name:
        return NONE
    difference = paired_difference(row.finals, reference.finals)
    if difference is None:
        return "no common seed"
    if difference.verdict == "diverged":
        return NONE
    if difference.standard_error is None:
        return f"{difference.mean:+.4f}, {difference.verdict}"
    return f"{difference.mean:+.4f} ± {difference.standard_error:.4f}, {difference.verdict}"


def _trial(records: Sequence[Record]) -> str:
    if not records:
        return ""
    losses = [loss for record in records if math.isfinite(loss := record.final_loss)]
    lost = [
        f"{number} {status}" for status in FAILURES if (number := sum(record.status == status for record in records))
    ]
    if not losses:
        return lost[0].partition(" ")[2] if len(lost) == 1 else ", ".join(lost)
    return f"{sum(losses) / len(losses):.4f}" + (f" ({', '.join(lost)})" if lost else "")


def _notes(results: TaskResults, baseline: Row | None, reference: Row | None) -> list[str]:
    notes = ["± after the final loss: standard deviation over seeds."]
    if reference:
        notes.append(
            f"Differences to {reference.name}: mean ± standard error over common seeds; lower or higher where "
            f"Student's {CONFIDENCE:.0%} interval leaves zero out, otherwise open."
        )
        seeds = [d.seeds for row in results.rows if (d := paired_difference(row.finals, reference.finals))]
        if seeds and min(seeds) < WEAK_BELOW:
            notes.append(f"{min(seeds)} seed{'s' * (min(seeds) > 1)}: weak evidence.")
    if baseline:
        notes.append("Steps are told at evaluations, time as steps times the median step.")
    if any(_edge(row, results) for row in results.rows):
        notes.append("*: at the edge of the search, so a wider one might find better.")
    if len({row.trials for row in results.rows}) > 1:
        notes.append("The optimizers had different numbers of trials, so this comparison is not even.")
    if any(row.incomplete for row in results.rows):
        names = ", ".join(f"{row.name} {row.incomplete}" for row in results.rows if row.incomplete)
        notes.append(f"Trials that lack seeds, and could not be chosen: {names}.")
    errors = {record.name: record.error for record in results.records if record.status == "failed"}
    notes += [f"{name} failed: {error}." for name, error in errors.items()]
    return notes


def common_table(curves: Sequence[ReturnCurve]) -> Table:
    """Returns the optimizers side by side, a line per game, as far as all runs of the game have come.

    Args:
        curves: The curves, from `return_curves`.
    """
    labels = sorted({curve.label for curve in curves})
    rows = []
    for game, here in curves_by_game(curves).items():
        reached = min(_end(curve, run)[0] for curve in here for run in curve.runs)
        cells = {curve.label: _all_seeds(curve, reached) for curve in here}
        rows.append([game, f"{reached:,.0f}", *(cells.get(label, NONE) for label in labels)])
    note = (
        "Mean return of the episodes in the tenth of the run before that agent step, the last that all runs of the "
        "game have come to: mean over seeds, and of each seed in brackets."
    )
    return Table("Returns, as far as all runs have come", ["game", "agent steps", *labels], rows, [note])


def runs_table(curves: Sequence[ReturnCurve]) -> Table:
    """Returns every run, with its return where it ended.

    Args:
        curves: The curves, from `return_curves`.
    """
    rows = []
    for curve in curves:
        for seed, status, run in zip(curve.seeds, curve.statuses, curve.runs, strict=True):
            step, final = _end(curve, run)
            rows.append([curve.game, curve.label, str(seed), status, f"{step:,.0f}", f"{final:.1f}" if step else NONE])
    headings = ["game", "optimizer", "seed", "run", "agent steps", "return"]
    note = "Mean return of the episodes in the tenth of the run before its end, or before where it is."
    return Table("Returns of every run", headings, rows, [note])


def curves_by_game(curves: Sequence[ReturnCurve]) -> dict[str, list[ReturnCurve]]:
    """Sorts curves by game, in alphabetical order."""
    games = sorted({curve.game for curve in curves})
    return {game: [curve for curve in curves if curve.game == game] for game in games}


def _end(curve: ReturnCurve, run: Float64[np.ndarray, " points"]) -> tuple[float, float]:
    """The last point of a run: agent step and return; step 0 where no episode has ended."""
    there = np.flatnonzero(np.isfinite(run))
    return (float(curve.steps[there[-1]]), float(run[there[-1]])) if len(there) else (0.0, math.nan)


def _all_seeds(curve: ReturnCurve, step: float) -> str:
    index = int(np.searchsorted(curve.steps, step, side="right")) - 1
    if index < 0 or math.isnan(curve.mean[index]):
        return NONE
    each = ", ".join(f"{value:.1f}" for value in curve.runs[:, index])
    return f"{curve.mean[index]:.1f}" + (f" ({each})" if len(curve.runs) > 1 else "")


def to_markdown(table: Table) -> str:
    """Returns a table as Markdown, numbers to the right.

    Example:
        >>> print(to_markdown(Table("Losses", ["optimizer", "loss"], [["adamw", "1.0"]], ["One seed."])))
        **Losses**
        <BLANKLINE>
        | optimizer | loss |
        | --- | ---: |
        | adamw | 1.0 |
        <BLANKLINE>
        One seed.
    """
    cells = [table.headings, ["---"] + ["---:"] * (len(table.headings) - 1), *table.rows]
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in cells]
    # An asterisk at the start of a sentence would open a list or emphasis.
    notes = " ".join(table.notes).replace("*", r"\*")
    return "\n".join([f"**{table.title}**", "", *lines, "", notes])


def to_html(table: Table) -> str:
    """Returns a table as HTML.

    Example:
        >>> print(to_html(Table("Losses", ["optimizer"], [["a<b"]], [])))
        <h3>Losses</h3>
        <table>
        <tr><th>optimizer</th></tr>
        <tr><td>a&lt;b</td></tr>
        </table>
    """

    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = [f"<h3>{html.escape(table.title)}</h3>", "<table>", row(table.headings, "th")]
    lines += [row(cells, "td") for cells in table.rows] + ["</table>"]
    if table.notes:
        lines.append(f'<p class="notes">{html.escape(" ".join(table.notes))}</p>')
    return "\n".join(lines)
