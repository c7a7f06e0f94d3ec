"""Some hundred pieces of broken input of every kind; `benchmarks/fuzz.py` tries thousands."""

import collections

import pytest
from fuzz_cases import CASES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Traced, parsed by tyro or read by Orbax: more costly than the others.
FEW = {"parameter trees": 8, "command lines": 25, "bytes of training checkpoints": 15, "recipes of meta-training": 25}


@pytest.mark.parametrize("name", CASES)
def test_broken_input_is_refused_or_right(name, tmp_path_factory):
    folder, outcomes = tmp_path_factory.mktemp("fuzz"), collections.Counter()

    @settings(max_examples=FEW.get(name, 60), suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def run(data):
        outcomes[CASES[name](data, folder)] += 1

    run()
    assert outcomes
    if name not in ("parameter trees", "command lines"):
        assert outcomes["refused"]
