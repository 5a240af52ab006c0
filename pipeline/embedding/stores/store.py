"""What stores of vectors raise, and what they give back for rows that they do not take."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.runtime.outcome import JobError


class StoreError(JobError):
    """A store that cannot be used as asked, in one sentence. What was written before it stays written."""


class Refused(NamedTuple):
    """A row that was not written, why, and how often it was tried (0 where it could not be sent at all)."""

    id: str
    reason: str
    attempts: int
