"""`celo2 data tokens`: text files as token shards."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from celo2_harness.lab.errors import input_errors
from celo2_harness.lab.tasks import write_tokens


@dataclass(frozen=True)
class Config:
    """Turn text files into uint16 token shards for the task token_language_model.

    The last tenth of the text is held out. Give --tokenizer or --train-vocabulary.
    """

    texts: tyro.conf.Positional[tuple[Path, ...]]
    """UTF-8 files, in order."""
    out: Path = Path("tokens")
    """Folder of the shards; made where missing."""
    tokenizer: str | None = None
    """A tokenizer.json file, or a name on the Hugging Face hub such as gpt2, which is fetched."""
    train_vocabulary: int | None = None
    """Train a byte-level pair encoding with this many tokens on the text instead; needs no network."""


def run(config: Config) -> int:
    """Writes the shards; returns 0."""
    from rich.progress import Progress

    with input_errors(), Progress(transient=True) as bar:
        shown = bar.add_task("tokens", total=None)
        header = write_tokens(
            config.texts,
            config.out,
            tokenizer=config.tokenizer,
            train_vocabulary=config.train_vocabulary,
            on_bytes=lambda done, total: bar.update(shown, completed=done, total=total),
        )
    counts = {part: sum(shard["tokens"] for shard in header[part]) for part in ("train", "held_out")}
    print(
        f"{config.out}: {counts['train']:,} tokens to train on, {counts['held_out']:,} held out,"
        f" vocabulary {header['vocabulary']:,}"
    )
    return 0
