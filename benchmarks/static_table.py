"""A token table end to end: documents/s from token shards, and from text, to a vector table, beside its peers.

    python benchmarks/static_table.py --data data                       # 500,000 documents, 8 GB of disk
    python benchmarks/static_table.py --data data --documents 5000      # to try it

The documents are debian's descriptions over and over, each with a number at its end. All sides read the same record
files, and have one tokenizer and the same rows of numbers: those of `--model`, or random ones. Each side is one
process, of as many threads as it starts; it has loaded its model, and worked on some documents, before round one.

  ours, from token shards        read, encode, write fragments, commit them in waves, finish the table; without Ray
  ours, from text                the same, and tokenize what was read, which counts as reading; `encode` is waiting
  model2vec                      StaticModel.encode of all texts, then one lancedb create_table of id, text, vector
  model2vec, no multiprocessing  the same with use_multiprocessing=False: the tokenizer has threads of its own then
  sentence-transformers          SentenceTransformer.encode with StaticEmbedding, at its best batch size; then the same

No side builds an index of vectors. Sides take turns, in the other order every second round; seconds are medians, and
ratios medians of the rounds' ratios to a peer. `CPU s` are of all threads. Vectors read back from the tables must agree
to a cosine of 0.999, and a search must find its row. model2vec cuts texts by characters before it tokenizes them, which
is less work and gives other vectors for long texts: its cosine is printed. Needs the `dev` packages.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from timeit import repeat

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.core.session import set_environment

set_environment()

import lance
import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.corpora import machine, records, write_records
from pipeline.config import Embedding
from pipeline.core.artifact import Artifact, Output
from pipeline.core.console import table as lines_of
from pipeline.core.memory import returning_freed_memory
from pipeline.data.partitions import content_id
from pipeline.data.tokenizing import TokenRecipe, tokenize_file
from pipeline.index.backends import TableBackend
from pipeline.index.dead_letters import DeadLetters
from pipeline.index.documents import Documents
from pipeline.index.embed import WaveCommitter, fragment_rows, write_fragments
from pipeline.index.encoder import EncoderRecipe, TextEncoder, open_encoder
from pipeline.index.indexing import finish
from pipeline.index.sync import Sync, with_vectors
from pipeline.index.table import VectorTable
from pipeline.index.vectors import as_column, as_matrix
from pipeline.model.folder import is_table, load_tokenizer, read_model_spec

VOCABULARY, WIDTH, MAX_LENGTH = 16_000, 256, 128  # of the model that is made where none is given
WARM_DOCUMENTS, SAMPLE, LEAST_COSINE = 2_000, 500, 0.999
BATCH_SIZES = (32, 256, 2_048)  # the first is the default


@dataclass(frozen=True)
class World:
    """A folder with record files and token shards, and the model that is to encode them."""

    folder: Path
    model: Path
    documents: int

    @property
    def records(self) -> list[Path]:
        return sorted((self.folder / "records").iterdir())

    def write(self, rows: list[dict[str, str]]) -> None:
        """What jobs/prepare.py leaves of these documents: records by rising id, and all of their tokens to train on."""
        (self.folder / "records").mkdir(parents=True)
        tokenizer, length = load_tokenizer(self.model), read_model_spec(self.model).max_length
        recipe = TokenRecipe(["text"], length, 0.0)
        tokenizer.no_truncation()
        for file in write_records(rows, self.folder / "records"):
            tokenize_file(file, Output(self.folder), recipe, tokenizer)

    def out(self, side: str) -> Path:
        return self.folder / "out" / side


class Laps(Counter[str]):
    """Nanoseconds by step: each call ends one."""

    last = 0

    def __call__(self, step: str) -> None:
        now = time.perf_counter_ns()
        self[step] += now - self.last
        self.last = now


def ours(world: World, side: str, lap: Laps) -> None:
    """What jobs/embed.py has its Ray tasks and its driver do: a batch is encoded while the next one is read."""
    recipe, encoder = our_encoder(world.model)
    artifact = Artifact(world.folder, "documents", [])
    documents = Documents(world.records, "text", {}, side == FROM_TOKENS, world.folder, artifact, are_records=True)
    table, letters = VectorTable(world.out(side), "ours", recipe.width), DeadLetters(world.out(side) / "letters")
    table.create()
    with table.writing() as writer, ThreadPoolExecutor(1) as pool:
        sync, waves, some = Sync(documents, table, recipe, "", 0), WaveCommitter(writer), []
        encoding: Future[pa.Table] | None = None
        lap("write")
        for batch in chain(chain.from_iterable(map(sync.due, range(len(documents)))), [None]):
            lap("read")
            encoded = encoding
            encoding = None if batch is None else pool.submit(with_vectors, batch, encoder)
            if encoded is not None:
                some.append(encoded.result())
                lap("encode")
            if some and (batch is None or sum(map(len, some)) >= fragment_rows(world.documents)):
                with returning_freed_memory():
                    fragments, _ = write_fragments(table, pa.concat_tables(some), letters)
                waves.add(fragments)
                some.clear()
                lap("write")
        waves.commit()
        with returning_freed_memory():
            finish(table, None, 0)
        lap("write")


@cache
def our_encoder(model: Path) -> tuple[EncoderRecipe, TextEncoder]:
    recipe = EncoderRecipe(model, Embedding(), model)
    return recipe, open_encoder(recipe)


def peer(world: World, side: str, lap: Laps) -> None:
    encode = peer_encoder(side, world.model)
    rows = pa.concat_tables([pq.read_table(path, columns=["id", "text"]) for path in world.records])
    texts = rows["text"].to_pylist()
    lap("read")
    vectors = as_column(encode(texts))
    lap("encode")
    lancedb.connect(world.out(side)).create_table("peer", rows.append_column("vector", vectors))
    lap("write")


@cache
def peer_encoder(side: str, model: Path) -> Callable[[list[str]], np.ndarray]:
    """StaticModel or StaticEmbedding with our rows. The first texts are for finding out the best batch size."""
    spec, tokenizer = read_model_spec(model), load_tokenizer(model)
    rows, unit = TableBackend(model, spec).rows_VD, spec.head.normalize
    if side.startswith("model2vec"):
        from model2vec import StaticModel

        static = StaticModel(rows, tokenizer, normalize=unit, max_length=spec.max_length)
        return partial(static.encode, use_multiprocessing=side == "model2vec")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    bag = SentenceTransformer(modules=[StaticEmbedding(tokenizer, rows)], device="cpu")
    encode, seconds = partial(bag.encode, normalize_embeddings=unit, show_progress_bar=False), dict[int, float]()

    def at_best(texts: list[str]) -> np.ndarray:
        for size in BATCH_SIZES if not seconds else ():
            seconds[size] = min(repeat(partial(encode, texts, batch_size=size), number=1, repeat=3))
            print(f"{side}: {len(texts) / seconds[size]:,.0f} documents/s in batches of {size:,}")
        return encode(texts, batch_size=min(seconds, key=lambda size: seconds[size]))

    return at_best


FROM_TOKENS, FROM_TEXT = "ours, from token shards", "ours, from text"
PEERS = ("model2vec", "model2vec, no multiprocessing", "sentence-transformers")
SIDES = {FROM_TOKENS: ours, FROM_TEXT: ours, **dict.fromkeys(PEERS, peer)}


def turn(side: str, world: World) -> dict[str, float]:
    """One side's work from its beginning, in its process. Seconds of all, by step, and of CPU."""
    shutil.rmtree(world.out(side), ignore_errors=True)
    world.out(side).mkdir(parents=True)
    cpu, lap = time.process_time(), Laps()
    lap.last = time.perf_counter_ns()
    SIDES[side](world, side, lap)
    seconds = {step: took / 1e9 for step, took in lap.items()}
    return {"s": sum(seconds.values()), **seconds, "CPU s": time.process_time() - cpu}


def vectors_of(world: World, side: str, ids: list[str]) -> np.ndarray:
    """(N, D), read back from the side's table. Exits where rows are missing, or a search does not find them."""
    (path,) = world.out(side).glob("*.lance")
    table = lance.dataset(str(path))
    quoted = ", ".join(f"'{one}'" for one in ids)
    found = table.to_table(["id", "vector"], filter=f"id IN ({quoted})").sort_by("id")
    vectors = as_matrix(found["vector"])
    near = table.to_table(
        ["id", "_distance"], nearest={"column": "vector", "q": vectors[0], "k": 1, "metric": "cosine"}
    )
    if table.count_rows() != world.documents or found["id"].to_pylist() != ids or near["id"].to_pylist() != ids[:1]:
        sys.exit(f"{side}: found {table.count_rows():,} rows of {world.documents:,}, and searched for {ids[0]}: {near}")
    return vectors


def distinct(data: Path, count: int) -> list[dict[str, str]]:
    """Records of text alone, by rising id."""
    texts, rows = [row["positive"] for row in records(data, "debian")], []
    for number in range(count):
        text = f"{texts[number % len(texts)]} {number}"
        rows.append({"id": content_id([text]), "source": "debian", "source_id": str(number), "text": text})
    return sorted(rows, key=lambda row: row["id"])


def write_model(folder: Path, texts: list[str]) -> None:
    from pipeline.data.tokenizer import train_tokenizer
    from pipeline.model.embedding_model import EmbeddingModel
    from pipeline.model.folder import save_model
    from pipeline.model.transformer import Encoder, EncoderShape

    tokenizer = train_tokenizer(texts, kind="bpe", vocab_size=VOCABULARY, lowercase=True)
    shape = EncoderShape(tokenizer.get_vocab_size(), d_model=WIDTH, num_layers=0, num_heads=4, d_ff=WIDTH)
    folder.mkdir()
    save_model(folder, EmbeddingModel(Encoder(shape)), tokenizer.to_str(), MAX_LENGTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with debian/pairs.jsonl")
    parser.add_argument("--documents", type=int, default=500_000)
    parser.add_argument("--model", type=Path, help="a model's folder, num_layers 0; by default one of random numbers")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder, rows = Path(name), distinct(args.data, args.documents)
        if not args.model:
            write_model(folder / "model", [row["text"] for row in rows[:60_000]])
        model = args.model or folder / "model"
        if not is_table(read_model_spec(model)):
            sys.exit(f"--model: {model} is no token table; give a folder of a model that has num_layers 0")
        world = World(folder / "all", model, len(rows))
        warm = World(folder / "warm", model, min(WARM_DOCUMENTS, len(rows)))
        for each in (world, warm):
            each.write(rows[: each.documents])
        ids = [row["id"] for row in rows[:: max(1, len(rows) // SAMPLE)]]
        del rows
        context = get_context("spawn")
        pools = {side: stack.enter_context(ProcessPoolExecutor(1, context)) for side in SIDES}
        for side, pool in pools.items():
            pool.submit(turn, side, warm).result()
        found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for number in range(args.rounds):
            for side in list(SIDES)[:: -1 if number % 2 else 1]:
                found[side].append(pools[side].submit(turn, side, world).result())
                print(f"round {number + 1}, {side}: {found[side][-1]['s']:.1f} s", file=sys.stderr)
        vectors = {side: vectors_of(world, side, ids) for side in SIDES}
    cosines = {side: float((vectors[FROM_TOKENS] * vectors[side]).sum(axis=1).min()) for side in SIDES}
    print(f"\n{machine()}, {args.documents:,} documents\n\n{report(found, args.documents, cosines)}")
    least = min(cosine for side, cosine in cosines.items() if not side.startswith("model2vec"))
    if least < LEAST_COSINE:
        sys.exit(f"found vectors at cosine {least:.5f}; allowed is {LEAST_COSINE}")


def report(found: dict[str, list[dict[str, float]]], documents: int, cosines: dict[str, float]) -> str:
    steps, lines = ("s", "read", "encode", "write", "CPU s"), []
    medians = {side: {step: median(each[step] for each in turns) for step in steps} for side, turns in found.items()}
    for side, took in medians.items():
        cells = [f"{took[step]:.1f}" for step in steps]
        lines.append([side, f"{documents / took['s']:,.0f}", *cells, f"{cosines[side]:.5f}"])
    best = min(PEERS, key=lambda side: medians[side]["s"])
    text = lines_of(lines, ["side, one process each", "documents/s", *steps, "least cosine"])
    for side, aim in ((FROM_TOKENS, 2), (FROM_TEXT, 1)):
        for peer in dict.fromkeys((best, PEERS[-1])):
            ratio = median(b["s"] / a["s"] for a, b in zip(found[side], found[peer], strict=True))
            text += f"\n{side}: {ratio:.2f} times the documents/s of {peer} (aim: {aim})"
    return text


if __name__ == "__main__":
    main()
