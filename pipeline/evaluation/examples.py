"""What an evaluation keeps of single queries: the NDCG@10 of each, and what was expected and found for a few.

    details = Details()
    details.add("beir", task, {"model": ranking, "bm25": ranking})
    details.by_query["beir"]["model"]["q7"]       # 0.6309
    details.examples["beir"][0]
    # {"kind": "best", "query": "archive manager", "model": 1.0, "bm25": 0.0,
    #  "expected": [{"id": "7zip", "text": "…"}],
    #  "found": [{"id": "7zip", "text": "…", "score": 0.71, "right": True}, …]}

The best queries are those that the model answers and BM25 does not; the worst are the reverse. The random ones follow
from the queries' ids. Cost: one pass over the documents; texts are cut, so that the result is small.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import xxhash

from pipeline.evaluation.metrics import Ranking, ndcg_by_query
from pipeline.evaluation.tasks import RetrievalTask
from pipeline.evaluation.verdict import ByQuery

EXAMPLES = 5  # of each kind
FOUND, EXPECTED = 5, 3  # documents shown for a query
SHOWN_CHARS = 300  # of each text
ID_CHARS = 200


@dataclass
class Details:
    by_query: ByQuery = field(default_factory=dict)
    """The model at full width, and BM25."""
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Task → examples: the best, the worst and random ones."""

    def add(self, name: str, task: RetrievalTask, rankings: Mapping[str, Ranking]) -> None:
        """Add a task, with the rankings of each system."""
        of_task = {
            system: ndcg_by_query(task.qrels, rankings[system]) for system in ("model", "bm25") if system in rankings
        }
        self.by_query[name] = of_task
        chosen = choose(of_task)
        self.examples[name] = list(_examples(chosen, task, rankings["model"], of_task))


def choose(of_task: Mapping[str, Mapping[str, float]], count: int = EXAMPLES) -> dict[str, str]:
    """Query → kind. A query is chosen once: the best and the worst first, the others at random."""
    model, bm25 = of_task["model"], of_task.get("bm25", {})
    at_random = sorted(model, key=lambda query: xxhash.xxh3_64_intdigest(query.encode()))
    by_gain = sorted(at_random, key=lambda query: (-model[query], bm25.get(query, 0.0)))
    chosen = dict.fromkeys(by_gain[: min(count, len(model) // 3)], "best")
    chosen |= dict.fromkeys(by_gain[::-1][: min(count, len(model) // 3)], "worst")
    others = [query for query in at_random if query not in chosen]
    return chosen | dict.fromkeys(others[:count], "random")


def _examples(
    chosen: Mapping[str, str], task: RetrievalTask, ranking: Ranking, of_task: Mapping[str, Mapping[str, float]]
) -> Iterable[dict[str, Any]]:
    right = {query: [name for name, score in task.qrels[query].items() if score > 0] for query in chosen}
    found = {query: list(ranking.get(query, {}).items())[:FOUND] for query in chosen}
    wanted = {name for query in chosen for name in right[query][:EXPECTED]}
    wanted |= {name for query in chosen for name, _ in found[query]}
    texts = {name: text[:SHOWN_CHARS] for name, text in task.documents.items() if name in wanted}
    for query, kind in chosen.items():
        yield {
            "kind": kind,
            "query": task.queries[query][:SHOWN_CHARS],
            **{system: round(values[query], 4) for system, values in of_task.items()},
            "expected": [
                {"id": name[:ID_CHARS], "text": texts.get(name, "missing from the documents")}
                for name in right[query][:EXPECTED]
            ],
            "found": [
                {
                    "id": name[:ID_CHARS],
                    "text": texts.get(name, ""),
                    "score": round(score, 4),
                    "right": name in right[query],
                }
                for name, score in found[query]
            ],
        }
