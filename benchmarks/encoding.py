"""MiniLM's vectors of Debian descriptions: documents/s beside SentenceTransformer.encode, and what each backend costs.

    python benchmarks/encoding.py --data DIR

Both sides have the same model, cores and documents, and take turns on blocks of them: the peer with a thread a core, at
the batch size that is best for it on the first block; ours as `python jobs/embed.py` encodes, an encoder of one thread
a core. The ratio is of the same block, one right after the other, so what else the machine does falls on both. Vectors
must agree to cosine 1 - 1e-5. Then our backends take turns on documents of the BEIR folder, in one process: the speed
of each, the least cosine to float32, and NDCG@10. Last a token table, with numpy and with torch, from token ids on.
Needs the `dev` packages.
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
import torch.nn.functional as F

from benchmarks.corpora import machine
from benchmarks.fine_tuning import minilm, ranked
from pipeline.config import Embedding
from pipeline.core.console import table
from pipeline.evaluation.metrics import retrieval_metrics
from pipeline.evaluation.tasks import read_beir
from pipeline.index.backends import CPU_BATCH_TOKENS, TableBackend, make_graph
from pipeline.index.encoder import EncoderRecipe, TextEncoder, open_encoder, tokenize
from pipeline.index.torch_backend import TorchBackend
from pipeline.index.vectors import as_ragged
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.folder import load_model, load_tokenizer, save_model
from pipeline.model.transformer import Encoder, EncoderShape

ROWS = 1024  # that an encoding actor takes together
BATCH_SIZES = (8, 16, 32, 64, 128)
BACKENDS = {
    "torch fp32": Embedding(),
    "torch bf16": Embedding(precision="bf16"),
    "onnxruntime fp32": Embedding(backend="onnxruntime"),
    "onnxruntime int8": Embedding(backend="onnxruntime", precision="int8"),
}
PARTS = ("peer", "backends", "table")
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
        cls.encode = in_blocks(open_encoder(EncoderRecipe(folder, Embedding(), folder), 1, "cpu"))

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


def backends(folder: Path, beir: Path, documents: int, threads: int) -> list[list[object]]:
    """A line a backend, which take turns on blocks of so many documents, those that answer queries first."""
    task = read_beir(beir)
    there, judged = dict(task.documents.items()), [name for grades in task.qrels.values() for name in grades]
    names = list(dict.fromkeys(judged + list(there)))[:documents]
    queries = {name: text for name, text in task.queries.items() if not task.qrels[name].keys() - set(names)}
    blocks = [[there[names[i]] for i in block] for block in np.array_split(np.arange(len(names)), 8)]
    times: dict[str, list[float]] = {name: [] for name in BACKENDS}
    found: dict[str, list[np.ndarray]] = {name: [] for name in BACKENDS}
    with tempfile.TemporaryDirectory() as graphs:
        encoders = {}
        for name, settings in BACKENDS.items():
            recipe = EncoderRecipe(folder, settings, Path(graphs))
            if settings.backend == "onnxruntime":
                make_graph(folder, settings, recipe.graphs)
            encoders[name] = open_encoder(recipe, threads, "cpu")
            in_blocks(encoders[name])(blocks[0][:200])  # warms it
        for block in blocks:
            for name, encoder in encoders.items():
                took, vectors = seconds(in_blocks(encoder), block)
                times[name].append(took)
                found[name].append(vectors)
        asked = {name: in_blocks(each, "query")(list(queries.values())) for name, each in encoders.items()}
    plain, lines = np.concatenate(found["torch fp32"]), list[list[object]]()
    for name in BACKENDS:
        vectors = np.concatenate(found[name])
        ranking = ranked(list(queries), asked[name], names, vectors)
        score = retrieval_metrics({query: task.qrels[query] for query in queries}, ranking)["ndcg@10"]
        ratio = median(a / b for a, b in zip(times["torch fp32"], times[name], strict=True))
        cosine = float((vectors * plain).sum(axis=1).min())
        rate = len(names) / sum(times[name])
        lines.append([name, f"{rate:.1f}", f"{ratio:.2f}", f"{cosine:.5f}", f"{score:.4f}"])
    return lines


def table_ways(folder: Path, texts: list[str]) -> list[list[object]]:
    """A token table of 256 numbers on the model's vocabulary: a line a way to its vectors, on one thread each."""
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(folder)
    shape = EncoderShape(tokenizer.get_vocab_size(), d_model=256, num_layers=0, num_heads=4, d_ff=256)
    with tempfile.TemporaryDirectory() as name:
        save_model(Path(name), EmbeddingModel(Encoder(shape)), tokenizer.to_str(), 512)
        ours = TextEncoder(Path(name), device="cpu")
        theirs = TextEncoder(Path(name), backend=TorchBackend(load_model(Path(name))[0], "cpu"))
    assert isinstance(ours.backend, TableBackend)
    rows = torch.from_numpy(ours.backend.rows_VD)
    start = time.perf_counter()
    tokens = tokenize(ours.tokenizer, texts)
    lines: list[list[object]] = [["tokenizing, all threads", f"{len(texts) / (time.perf_counter() - start):,.0f}", ""]]
    ids, offsets = (np.array(part) for part in as_ragged(tokens))

    def bag() -> np.ndarray:
        with torch.inference_mode():
            means = F.embedding_bag(torch.from_numpy(ids), rows, torch.from_numpy(offsets[:-1]), mode="mean")
            return F.normalize(means, dim=-1).numpy()

    ways: dict[str, Callable[[], np.ndarray]] = {
        "numpy, ours": lambda: ours.encode_tokens(tokens),
        "torch's embedding_bag": bag,
        "the model in torch": lambda: theirs.encode_tokens(tokens),
    }
    expected = bag()
    for way, run in ways.items():
        start = time.perf_counter()
        off = float(np.abs(run() - expected).max())
        lines.append([way, f"{len(texts) / (time.perf_counter() - start):,.0f}", f"{off:.0e}"])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with debian/pairs.jsonl and debian/beir")
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--blocks", type=int, default=10, help="that the sides take turns on")
    parser.add_argument("--threads", type=int, help="by default as many as there are cores")
    parser.add_argument("--beir-documents", type=int, default=10_000, help="that the backends embed")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    folder, threads = Path(minilm()), torch.get_num_threads()
    with (args.data / "debian" / "pairs.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["positive"] for line, _ in zip(file, range(args.documents), strict=False)]
    print(f"\n{machine()}, {len(texts):,} documents\n")
    least = 1.0
    if "peer" in args.parts:
        lines, ratio, least = beside_the_peer(folder, texts, args.blocks, threads)
        print(table(lines, ["side", "documents/s", "s to load", "s in all"]))
        print(f"\nours over theirs: {ratio:.2f} times the documents/s; least cosine between them {least:.7f}\n")
    if "backends" in args.parts:
        lines = backends(folder, args.data / "debian" / "beir", args.beir_documents, threads)
        print(table(lines, ["backend", "documents/s", "times torch fp32", "least cosine", "NDCG@10"]))
    if "table" in args.parts:
        print(table(table_ways(folder, texts), ["token table", "documents/s", "most off"]))
    if least < LEAST_COSINE:
        sys.exit(f"found vectors at cosine {least:.7f}; allowed is {LEAST_COSINE}")


if __name__ == "__main__":
    main()
