"""How fast texts become token shards inside the pipeline, with `tokenizers.encode_batch` alone beside it.

  python benchmarks/tokenizing.py --data data

Prints a line a data set: debian and wordnet as pairs, linux-doc as documents. Ours is the stage's own time, as its
marker has it (reading records, cutting, counting lengths, sorting, writing shards, drawing the histogram), the Ray
session up and its workers warm. The library encodes the same texts, in memory already, on as many threads as there are
cores, with the same tokenizer, and its ids are not even looked at; encode_batch_fast leaves out offsets, and the stage
uses it too. Each is the best of `--repeats` runs; `ratio` is encode_batch's seconds over ours.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.core.session import Progress, ray_session, set_environment

set_environment()

from tokenizers import Tokenizer

from benchmarks.corpora import machine
from pipeline.config import Config, Data, Source
from pipeline.config.data import Tokenizer as TokenizerSection
from pipeline.config.tree import Storage
from pipeline.core.console import table
from pipeline.data.prepare import Inputs, prepare
from pipeline.data.records import record_texts
from pipeline.data.tokenizer import load_tokenizer

BATCH = 1000  # texts at a time: larger ones are no faster
EVERYTHING = 1 << 40  # bytes


def sources(data: Path) -> dict[str, list[Source]]:
    """Data sets of one shape each."""
    pairs = [Source(name=name, type="json", path=str(data / name / "pairs.jsonl")) for name in ("debian", "wordnet")]
    documents = Source(name="linux-doc", type="text", path=str(data / "linux-doc"), fields={"text": "text"})
    return {"debian, wordnet": pairs, "linux-doc": [documents]}


def config(root: Path, read: list[Source], seed: int, tokenizer: Path | None) -> Config:
    """Another seed makes the tokens anew, from the records that are there."""
    return Config(
        storage=Storage(root=str(root)),
        data=Data(sources=read, min_chars=1, seed=seed),
        tokenizer=TokenizerSection(load_path=str(tokenizer) if tokenizer else None),
    )


def ours(root: Path, read: list[Source], progress: Progress, repeats: int) -> tuple[float, Path]:
    """The stage's seconds, and the folder with the records and the tokenizer."""
    folder, _ = prepare(config(root, read, 0, None), lambda: progress)  # trains the tokenizer, and warms the workers
    assert isinstance(folder, Path)
    seconds = []
    for seed in range(1, repeats + 1):
        wanted = config(root, read, seed, folder / "tokenizer.json")
        prepare(wanted, lambda: progress)
        seconds.append((Inputs(wanted).tokens.read() or {})["seconds"])
    return min(seconds), folder


def alone(texts: list[str], encode: Callable[[list[str]], list[Any]], repeats: int) -> tuple[float, int]:
    """Seconds and tokens of the library's encoding."""

    def run(some: list[str]) -> int:
        return sum(len(encoding) for batch in _batches(some) for encoding in encode(batch))

    run(texts[:BATCH])
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        tokens = run(texts)
        seconds.append(time.perf_counter() - began)
    return min(seconds), tokens


def _batches(texts: list[str]) -> Iterator[list[str]]:
    return (texts[start : start + BATCH] for start in range(0, len(texts), BATCH))


def line(name: str, seconds: float, folder: Path, repeats: int) -> list[str]:
    """One line of the table."""
    tokenizer: Tokenizer = load_tokenizer(folder)
    fields = ["text"] if name == "linux-doc" else ["anchor", "positive"]
    texts = list(record_texts(sorted((folder / "records").glob("*.parquet")), fields, EVERYTHING))
    plain, tokens = alone(texts, tokenizer.encode_batch, repeats)
    fast, _ = alone(texts, tokenizer.encode_batch_fast, repeats)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    counts = [f"{len(texts):,}", f"{megabytes:.1f}", f"{tokens / 1e6:.2f}"]
    times = [f"{value:.2f}" for value in (seconds, plain, fast)]
    rates = [f"{tokens / value:,.0f}" for value in (seconds, plain)]
    return [name, *counts, *times, *rates, f"{plain / seconds:.2f}", f"{fast / seconds:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with debian, wordnet and linux-doc")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        with ray_session() as progress:
            found = {
                name: ours(Path(root), read, progress, args.repeats)
                for name, read in sources(args.data.resolve()).items()
            }
        lines = [line(name, seconds, folder, args.repeats) for name, (seconds, folder) in found.items()]
    header = ["data", "texts", "MB", "M tokens", "ours s", "encode_batch s", "fast s"]
    rates = ["ours tokens/s", "encode_batch tokens/s", "ratio", "to fast"]
    print(f"\n{machine()}\n\n{table(lines, [*header, *rates])}")


if __name__ == "__main__":
    main()
