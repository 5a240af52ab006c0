"""MiniLM's vectors of Debian descriptions: documents/s beside SentenceTransformer.encode, and what each backend costs.

    python benchmarks/encoding.py --data DIR

Both sides have the same model, cores and documents, and take turns on blocks of them: the peer with a thread a core, at
the batch size that is best for it on the first block; ours as `python jobs/embed.py` encodes, an encoder of one thread
a core. The ratio is of the same block, one right after the other, so what else the machine does falls on both. Vectors
must agree to cosine 1 - 1e-5. Then each backend of ours embeds the BEIR folder, in one process: its speed, the least
cosine to float32, and NDCG@10. Needs the `dev` packages.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks.corpora import machine
from benchmarks.fine_tuning import minilm
from pipeline.config import Embedding
from pipeline.embedding.backends import CPU_BATCH_TOKENS, make_graph
from pipeline.embedding.encode import TextEncoder, open_encoder
from pipeline.embedding.recipe import EncoderRecipe
from pipeline.embedding.sync import ROWS
from pipeline.evaluation.beir import read_beir
from pipeline.evaluation.metrics import nearest, retrieval_metrics
from pipeline.runtime.console import table

BATCH_SIZES = (8, 16, 32, 64, 128)
BACKENDS = {
    "torch fp32": Embedding(),
    "torch bf16": Embedding(precision="bf16"),
    "onnxruntime fp32": Embedding(backend="onnxruntime"),
    "onnxruntime int8": Embedding(backend="onnxruntime", precision="int8"),
}
LEAST_COSINE = 1 - 1e-5
Encode = Callable[[list[str]], np.ndarray]


def seconds(encode: Encode, texts: list[str]) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    vectors = encode(texts)
    return time.perf_counter() - start, vectors


def in_blocks(encoder: TextEncoder, prompt: str = "document") -> Encode:
    """As an encoding actor takes them."""
    return lambda texts: np.concatenate(
        [encoder.encode(texts[i : i + ROWS], prompt) for i in range(0, len(texts), ROWS)]
    )


class _Actor:
    """An encoder in a process of its own."""

    encode: Encode

    @classmethod
    def start(cls, folder: Path) -> None:
        torch.set_num_threads(1)
        cls.encode = in_blocks(TextEncoder(folder, device="cpu"))

    @classmethod
    def run(cls, texts: list[str]) -> np.ndarray:
        return cls.encode(texts)


@contextmanager
def actors(folder: Path, count: int) -> Iterator[Encode]:
    """As the job's pool: `count` encoders of one thread each, which share the texts."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, _Actor.start, (folder,)) as pool:
        yield lambda texts: np.concatenate(
            list(pool.map(_Actor.run, [part.tolist() for part in np.array_split(np.array(texts, object), count)]))
        )


def beside_the_peer(
    folder: Path, texts: list[str], blocks: int, threads: int
) -> tuple[list[list[object]], float, float]:
    """The lines of the table, the median ratio, and the least cosine between the sides."""
    from sentence_transformers import SentenceTransformer

    first = texts[:500]
    with actors(folder, threads) as ours:
        start = time.perf_counter()
        ours(first[:threads])
        loads = {"ours": time.perf_counter() - start}
        start = time.perf_counter()
        theirs = SentenceTransformer(str(folder), device="cpu")
        loads["sentence-transformers"] = time.perf_counter() - start

        def peer(size: int) -> Encode:
            return lambda part: theirs.encode(part, batch_size=size, show_progress_bar=False)

        ours(first), peer(32)(first)  # warms both
        tried = {size: min(seconds(peer(size), first)[0] for _ in range(2)) for size in BATCH_SIZES}
        best = min(tried, key=lambda size: tried[size])
        print("the peer's batch sizes, documents/s:", {size: round(len(first) / took) for size, took in tried.items()})
        sides = {"ours": ours, "sentence-transformers": peer(best)}
        times: dict[str, list[float]] = {name: [] for name in sides}
        least = 1.0
        for number, part in enumerate(np.array_split(np.array(texts, dtype=object), blocks)):
            found = {}
            for name in list(sides)[:: 1 if number % 2 else -1]:
                took, found[name] = seconds(sides[name], part.tolist())
                times[name].append(took)
            least = min(least, float((found["ours"] * found["sentence-transformers"]).sum(axis=1).min()))
    names = {"ours": f"ours, {threads} encoders of 1 thread, batches of {CPU_BATCH_TOKENS:,} tokens"}
    names["sentence-transformers"] = f"sentence-transformers, {threads} threads, batches of {best}"
    lines: list[list[object]] = [
        [
            names[name],
            f"{len(texts) / sum(times[name]):.1f}",
            f"{loads[name]:.1f}",
            f"{loads[name] + sum(times[name]):.1f}",
        ]
        for name in sides
    ]
    ratio = median(b / a for a, b in zip(times["ours"], times["sentence-transformers"], strict=True))
    return lines, ratio, least


def backends(folder: Path, beir: Path, threads: int) -> list[list[object]]:
    """A line a backend."""
    lines: list[list[object]] = []
    task, plain = read_beir(beir), np.empty(0)
    texts = dict(task.documents.items())
    with tempfile.TemporaryDirectory() as graphs:
        for name, settings in BACKENDS.items():
            recipe = EncoderRecipe(folder, settings, Path(graphs))
            if settings.backend == "onnxruntime":
                make_graph(folder, settings, recipe.graphs)
            encoder = open_encoder(recipe, threads, "cpu")
            encode = in_blocks(encoder)
            encode(list(texts.values())[:500])  # warms it
            took, documents = seconds(encode, list(texts.values()))
            plain = documents if not plain.size else plain
            queries = in_blocks(encoder, "query")(list(task.queries.values()))
            ranking = nearest(list(task.queries), queries, list(texts), documents)
            score = retrieval_metrics(task.qrels, ranking)["ndcg@10"]
            cosine = float((documents * plain).sum(axis=1).min())
            lines.append([name, f"{len(documents) / took:.1f}", f"{cosine:.5f}", f"{score:.4f}"])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with debian/pairs.jsonl and debian/beir")
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--blocks", type=int, default=10, help="that the sides take turns on")
    parser.add_argument("--threads", type=int, help="by default as many as there are cores")
    parser.add_argument("--peer-alone", action="store_true", help="leave out the other backends")
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    folder, threads = Path(minilm()), torch.get_num_threads()
    with (args.data / "debian" / "pairs.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["positive"] for line, _ in zip(file, range(args.documents), strict=False)]
    lines, ratio, least = beside_the_peer(folder, texts, args.blocks, threads)
    print(f"\n{machine()}, {len(texts):,} documents\n")
    print(table(lines, ["side", "documents/s", "s to load", "s in all"]))
    print(f"\nours over theirs: {ratio:.2f} times the documents/s; least cosine between them {least:.7f}\n")
    if not args.peer_alone:
        print(
            table(
                backends(folder, args.data / "debian" / "beir", threads),
                ["backend", "documents/s", "least cosine", "NDCG@10"],
            )
        )
    if least < LEAST_COSINE:
        sys.exit(f"found vectors at cosine {least:.7f}; allowed is {LEAST_COSINE}")


if __name__ == "__main__":
    main()
