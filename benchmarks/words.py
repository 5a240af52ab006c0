"""BM25 by what it takes for words: NDCG@10 on three kinds of texts, and how fast texts are split.

examples:
  python benchmarks/words.py --data data        # data/debian/beir, data/wordnet/pairs.jsonl, Python's own library

Python code is looked up by docstrings. Each line is 2,000 queries among 10,000 documents.
"""

import argparse
import ast
import json
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import bm25s
import lance

from pipeline.core.console import table
from pipeline.evaluation.metrics import DEPTH, retrieval_metrics
from pipeline.evaluation.tasks import RetrievalTask, read_beir
from pipeline.index.words import SETTINGS, index_words

DOCUMENTS, QUERIES = 10_000, 2_000
Split = Callable[[Sequence[str]], list[list[str]]]


def lance_words(texts: Sequence[str], **settings: Any) -> list[list[str]]:
    return [[token.text for token in lance.tokenize(text, **settings)] for text in texts]


def bm25s_words(texts: Sequence[str]) -> list[list[str]]:
    found = bm25s.tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)
    return list(found)


SPLITS: dict[str, Split] = {
    "ours": index_words,
    "bm25s": bm25s_words,
    "Lance's default": lance_words,
    "Lance's icu": partial(lance_words, base_tokenizer="icu"),
    "Lance's icu/split, our stop words": partial(lance_words, **SETTINGS | {"base_tokenizer": "icu/split"}),
}


def ndcg(task: RetrievalTask, split: Split) -> float:
    names, documents = (list(column) for column in zip(*task.documents.items(), strict=True))
    index = bm25s.BM25()
    index.index(split(documents), show_progress=False)
    found, scores = index.retrieve(split(list(task.queries.values())), k=DEPTH, show_progress=False)
    ranking = {
        query: {names[i]: float(score) for i, score in zip(*row, strict=True) if score > 0}
        for query, row in zip(task.queries, zip(found, scores, strict=True), strict=True)
    }
    return retrieval_metrics(task.qrels, ranking)["ndcg@10"]


def of_pairs(name: str, pairs: Iterator[tuple[str, str]]) -> RetrievalTask:
    taken = list(islice(pairs, DOCUMENTS))
    queries = {f"q{i}": query for i, (query, _) in enumerate(taken[:QUERIES])}
    documents = {f"d{i}": document for i, (_, document) in enumerate(taken)}
    return RetrievalTask(name, queries, documents, {f"q{i}": {f"d{i}": 1} for i in range(len(queries))})


def python_code() -> Iterator[tuple[str, str]]:
    """The first paragraph of a docstring, and the function or class without it."""
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*/**/*.py")):
        try:
            tree = ast.parse(file.read_text())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and len(node.body) > 1:
                docstring = ast.get_docstring(node) or ""
                if len(docstring) > 20:
                    body = "\n".join(map(ast.unparse, node.body[1:]))
                    yield docstring.split("\n\n")[0], f"{node.name}\n{body}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with debian/beir and wordnet/pairs.jsonl")
    args = parser.parse_args()
    wordnet = map(json.loads, (args.data / "wordnet" / "pairs.jsonl").open())
    tasks = [
        read_beir(args.data / "debian" / "beir"),
        of_pairs("wordnet", ((row["anchor"], row["positive"]) for row in wordnet)),
        of_pairs("python", python_code()),
    ]
    rows = []
    for task in tasks:
        texts = list(dict(task.documents.items()).values())
        for name, split in SPLITS.items():
            begin = time.perf_counter()
            split(texts)
            megabytes_s = sum(map(len, texts)) / 1e6 / (time.perf_counter() - begin)
            rows.append([task.name, name, f"{ndcg(task, split):.4f}", f"{megabytes_s:.1f}"])
    print(table(rows, ("task", "words", "NDCG@10", "MB/s")))


if __name__ == "__main__":
    main()
