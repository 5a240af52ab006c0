"""What makes two records the same: a hash of their normalised fields, never their place.

    >>> content_id(["remove duplicates", "def unique(x): ..."])
    'c5b7…'                                           # 32 hex digits

Any 8 of its digits are a uniform number in [0, 1), and different digits are independent ones: shards take the first
8, the split takes the next 8. Cost: about 10 GB/s a core.
"""

from __future__ import annotations

from collections.abc import Sequence

import xxhash


def content_id(fields: Sequence[str]) -> str:
    """xxh3-128 of the fields, each led by its length so that ("ab", "c") and ("a", "bc") differ."""
    digest = xxhash.xxh3_128()
    for field in fields:
        data = field.encode("utf-8")
        digest.update(f"{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()


def shard_of(record_id: str, shards: int) -> int:
    """Which of `shards` shards a record belongs to."""
    return int(record_id[:8], 16) * shards >> 32


def overlapping(shard: int, shards: int, others: int) -> range:
    """Which of `others` shards may hold records that belong to this one of `shards`."""
    return range(shard * others // shards, -((shard + 1) * others // -shards))


def id_bounds(shard: int, shards: int) -> tuple[str, str]:
    """A shard's ids are texts from the first of these on that come before the second."""
    first, end = (-(number * 2**32 // -shards) for number in (shard, shard + 1))
    return f"{first:08x}", f"{end:08x}" if end < 2**32 else "g"


def is_validation(record_id: str, fraction: float) -> bool:
    """Whether a record is held out."""
    return int(record_id[8:16], 16) < fraction * 2**32
