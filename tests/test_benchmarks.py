"""Scripts whose figures the documentation quotes, at small size: kills, and memory over many steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "metatrain", "evaluate"])
def test_kills_at_random_moments(command):
    words = [sys.executable, str(SCRIPTS / "kill.py"), command, "--kills", "3", "--minutes", "3"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"celo2 {command}: 3 kills in ")
    assert "identical to the bit" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
def test_no_memory_is_kept_over_20000_steps():
    words = [sys.executable, str(SCRIPTS / "memory.py"), "--presets", "adamw", "celo2_ortho"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        numbers = [int(word) for word in line.split() if word.lstrip("-").isdecimal() and word != "20000"]
        kibibytes, arrays = numbers[:2]
        # The allocator may take another page or two; a kept scalar per step would be megabytes.
        assert arrays == 0 and kibibytes < 1024, line
