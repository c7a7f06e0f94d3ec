"""What a kind of source gives for every image set that it finds."""

from collections.abc import Callable

from celo2_harness.lab.tasks.images.pairs import Pair

Reader = Callable[[str], Pair | None]
"""Reads one part of a set, "train" or "test"; None where the set has no such part."""
