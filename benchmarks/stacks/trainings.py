"""Many small language models trained at once, in one program: a run is a row of numbers.

A seed gives the same initial parameters and the same batches as `celo2 evaluate` does, and the loss is that of the same
held-out windows.
"""

import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from benchmarks.stacks.directions import NUMBERS, Numbers
from celo2_harness.lab.tasks.gpt import MODELS, GPTConfig, gpt_loss, init_gpt
from celo2_harness.lab.tasks.language_model import VALIDATION_PREDICTIONS
from celo2_harness.lab.tasks.text import Text

Structure = Callable[[Numbers, int], optax.GradientTransformation]

BATCH = 16
# Decays of the averages of the parameters that are evaluated at the end.
AVERAGES = (0.96, 0.99)
ENDINGS = ("last", "average_25", "average_100", "mixed_100")


class Runs(NamedTuple):
    """One entry per run: its seed, which text, where its batches start (steps x batch), and its numbers."""

    seed: Any
    text: Any
    starts: Any
    numbers: Any


class Losses(NamedTuple):
    """Of each run: held-out losses along it, mean training losses between them, and held-out losses of `ENDINGS`."""

    curve: Any
    training: Any
    endings: Any


@dataclass
class Texts:
    """Texts on the device, and where the batches of a seed start."""

    texts: Sequence[Text]
    context: int
    _starts: dict[Any, np.ndarray] = field(default_factory=dict)

    @functools.cached_property
    def train(self) -> np.ndarray:
        """All training parts, one after the other."""
        return np.concatenate([text.train for text in self.texts])

    @functools.cached_property
    def held_out(self) -> np.ndarray:
        """The windows of validation of each text."""
        return np.stack([t.spread(self.context, VALIDATION_PREDICTIONS) for t in self.texts])

    def starts(self, text: int, seed: int, steps: int) -> np.ndarray:
        """Where the windows of every batch start, those of `LanguageModel.batch`."""
        key = text, seed, steps
        if key not in self._starts:
            # Of a text in which every byte is its own place, the first column of a batch says where windows start.
            places: Any = np.arange(len(self.texts[text].train))
            text_of_places = Text("places", places, places)
            offset = sum(len(t.train) for t in self.texts[:text])
            found = [text_of_places.sample(seed, step, BATCH, self.context)[:, 0] for step in range(steps)]
            self._starts[key] = (np.stack(found) + offset).astype(np.int32)
        return self._starts[key]


def train_one(
    structure: Structure, config: GPTConfig, steps: int, eval_every: int, data: tuple[Array, Array], run: Runs
) -> Losses:
    """One run from the start to the end; `jax.vmap` makes it many."""
    train, held_out = data
    tx = structure(run.numbers, steps)
    loss_of = lambda params, windows: gpt_loss(config, params, windows)

    def validate(params: Any) -> Array:
        # A quarter of the windows at a time, for the memory of many runs together.
        windows = held_out[run.text]
        parts = next(k for k in (4, 2, 1) if len(windows) % k == 0)
        return jnp.mean(jax.lax.map(lambda part: loss_of(params, part), windows.reshape(parts, -1, windows.shape[-1])))

    def step(carry: Any, starts: Array) -> Any:
        params, state, averages = carry
        windows = train[starts[:, None] + jnp.arange(config.context + 1)]
        loss, gradients = jax.value_and_grad(loss_of)(params, windows)
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        averages = tuple(
            jax.tree.map(lambda a, p, d=decay: d * a + (1.0 - d) * p, average, params)
            for decay, average in zip(AVERAGES, averages, strict=True)
        )
        return (params, state, averages), loss

    def stretch(carry: Any, starts: Array) -> Any:
        carry, losses = jax.lax.scan(step, carry, starts)
        return carry, (validate(carry[0]), jnp.mean(losses))

    params = init_gpt(config, jax.random.key(run.seed))
    # Weakly typed numbers would change their type in the loop.
    state = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), tx.init(params))
    carry = params, state, (params,) * len(AVERAGES)
    starts = run.starts.reshape(steps // eval_every, eval_every, -1)
    (params, _, averages), (curve, training) = jax.lax.scan(stretch, carry, starts)
    mixed = jax.tree.map(lambda p, a: 0.4 * p + 0.6 * a, params, averages[-1])
    return Losses(curve, training, jnp.stack([curve[-1], *map(validate, (*averages, mixed))]))


@dataclass
class Program:
    """A structure of optimizers on a model, compiled for a number of runs at once.

    Attributes:
        name: For the log.
        structure: From numbers and the length of the run to the optimizer.
        model: Out of `MODELS`.
        steps: Of every run.
        eval_every: Steps between evaluations.
        size: Runs at once; fewer are filled up with copies.
        texts: The data.
    """

    name: str
    structure: Structure
    model: GPTConfig
    steps: int
    eval_every: int
    size: int
    texts: Texts
    lowering_seconds: float = 0.0
    compile_seconds: float = 0.0
    _compiled: Any = None

    def lower(self) -> Any:
        """Traces; Python's lock is held, so one after the other."""
        start = time.perf_counter()
        train = jax.vmap(
            functools.partial(train_one, self.structure, self.model, self.steps, self.eval_every), in_axes=(None, 0)
        )
        shape = lambda *shape: jax.ShapeDtypeStruct((self.size, *shape), jnp.int32)
        numbers = {name: jax.ShapeDtypeStruct((self.size,), jnp.float32) for name in NUMBERS}
        runs = Runs(shape(), shape(), shape(self.steps, BATCH), numbers)
        data = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (self.texts.train, self.texts.held_out))
        lowered = jax.jit(train).lower(data, runs)
        self.lowering_seconds = time.perf_counter() - start
        return lowered

    def compile(self, lowered: Any) -> "Program":
        """Compiles what `lower` gave; this runs outside of Python's lock."""
        start = time.perf_counter()
        self._compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - start
        return self

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Losses:
        """Trains: a row is {"text": index, "seed": seed, numbers by name}; any number of rows up to `size`."""
        padded = [*rows, *[rows[0]] * (self.size - len(rows))]
        runs = Runs(
            np.array([row["seed"] for row in padded], np.int32),
            np.array([row["text"] for row in padded], np.int32),
            np.stack([self.texts.starts(row["text"], row["seed"], self.steps) for row in padded]),
            {name: np.array([row.get(name, usual) for row in padded], np.float32) for name, usual in NUMBERS.items()},
        )
        losses = self._compiled((self.texts.train, self.texts.held_out), runs)
        return Losses(*(np.asarray(x)[: len(rows)] for x in losses))


def compile_in_background(programs: Sequence[Program], threads: int) -> list["Future[Program]"]:
    """Traces the programs in order and compiles them side by side; a future for each."""
    futures: list[Future[Program]] = [Future() for _ in programs]
    pool = ThreadPoolExecutor(threads)

    def compile_one(program: Program, lowered: Any, future: "Future[Program]") -> None:
        try:
            future.set_result(program.compile(lowered))
        except Exception as error:
            future.set_exception(error)

    def lower_all() -> None:
        for program, future in zip(programs, futures, strict=True):
            try:
                lowered = program.lower()
            except Exception as error:
                future.set_exception(error)
            else:
                pool.submit(compile_one, program, lowered, future)

    threading.Thread(target=lower_all, daemon=True).start()
    return futures


def model_config(name: str) -> GPTConfig:
    """A model by name; `width-N` is a tiny one for tests."""
    if name.startswith("width-"):
        return GPTConfig(width=int(name.removeprefix("width-")), layers=2, heads=2, context=16)
    return MODELS[name]
