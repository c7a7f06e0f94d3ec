"""A task so small that a step takes a millisecond."""

import pytest

from celo2_harness.lab.tasks import GPTConfig, LanguageModel, split_text


@pytest.fixture(scope="session")
def task():
    return LanguageModel(GPTConfig(16, 1, 2, context=8), split_text(b"abracadabra, " * 50, "spell", 8), batch_size=4)
