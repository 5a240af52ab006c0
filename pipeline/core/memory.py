"""Return freed memory to the operating system.

    with returning_freed_memory(): write(...)

glibc keeps freed buffers of up to 32 MB for reuse, in one arena per thread. LanceDB's threads free buffers of many
sizes, so a process that writes with it would grow to twice the memory that it uses and stay there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

TRIM, MAPPED = -1, -3  # mallopt's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
LARGE, LARGEST = 2 << 20, 32 << 20  # bytes; LARGEST is the maximum of glibc's dynamic threshold


@contextmanager
def returning_freed_memory() -> Iterator[None]:
    """Within the block, return freed buffers of 2 MB or more to the system at once, in all threads of the process.

    For 200,000 vectors of 384 numbers, indexing and compacting takes 0.4 GB and 20 s, without it 0.8 GB and 14 s. Does
    nothing for C libraries other than glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(MAPPED, LARGE)
    try:
        yield
    finally:
        mallopt(MAPPED, LARGEST)
        mallopt(TRIM, 2 * LARGEST)
