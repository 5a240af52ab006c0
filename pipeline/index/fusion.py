"""Several rankings as one, by reciprocal rank."""

from __future__ import annotations

from collections.abc import Sequence

FUSION_K = 60  # Cormack, Clarke and Büttcher 2009, section 3


def reciprocal_ranks(*rankings: Sequence[str]) -> dict[str, float]:
    """What each id gets: the sum of 1 / (FUSION_K + its rank) over rankings, whose best comes first, with rank 1.

    >>> reciprocal_ranks(["a", "b"], ["b"])
    {'a': 0.0163…, 'b': 0.0325…}
    """
    scores: dict[str, float] = {}
    for ranking in rankings:
        for rank, one in enumerate(ranking, 1):
            scores[one] = scores.get(one, 0.0) + 1 / (FUSION_K + rank)
    return scores
