"""Memory that is freed goes back to the system where the code says so."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HELD = """
import contextlib
import numpy as np, psutil
from pipeline.core.memory import returning_freed_memory

def freed(within):
    own, before = psutil.Process(), psutil.Process().memory_info().rss
    with within:
        blocks = [(np.ones(3 << 17), np.ones(1 << 13)) for _ in range(100)]  # 3 MB, and 64 kB that stay behind it
        pins = [small for _, small in blocks]
        del blocks
    return (own.memory_info().rss - before) >> 20

del [np.ones(20 << 17)][0]  # 20 MB: from now on glibc keeps what is smaller
print(*map(freed, (contextlib.nullcontext(), returning_freed_memory(), contextlib.nullcontext())))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_large_buffers_are_given_back_within_and_kept_after() -> None:
    run = subprocess.run([sys.executable, "-c", HELD], cwd=ROOT, capture_output=True, text=True, check=True)
    kept, given_back, kept_after = map(int, run.stdout.split())
    assert kept > 200
    assert given_back < 50
    assert kept_after > 200
