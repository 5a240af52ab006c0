"""Peak memory of jobs/embed.py's processes, as the corpus grows from 10,000 to 200,000 documents.

  python benchmarks/embedding_memory.py --data data
  python benchmarks/embedding_memory.py --data data --small 1000 --large 4000      # to try it

The documents are debian's descriptions over and over, each time with other words, prepared first; the model is a token
table of random weights with 384 numbers a vector, as many as MiniLM's, so that hours of encoding need not be waited
for. What is measured, and how, is said in benchmarks/memory.py.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.corpora import machine, records
from benchmarks.memory import MEASURED, by, compared, watch
from pipeline.core.console import table

WIDTH = 384
WORKS = {"MapBatches": "compare, read and write", "MapWorker": "encode", "work": "join files and index"}
"""Ray's names for what its workers do; one that has read may write later, and keeps what it had."""


def write_model(folder: Path, texts: list[str]) -> None:
    from pipeline.data.tokenizer import train_tokenizer
    from pipeline.model.embedding_model import EmbeddingModel
    from pipeline.model.folder import save_model
    from pipeline.model.transformer import Encoder, EncoderShape

    tokenizer = train_tokenizer(texts, kind="bpe", vocab_size=8000, lowercase=False)
    shape = EncoderShape(vocab_size=8000, d_model=WIDTH, num_layers=0, num_heads=4, d_ff=WIDTH)
    folder.mkdir(parents=True)
    save_model(folder, EmbeddingModel(Encoder(shape)), tokenizer.to_str(), 128)


def embedding(data: Path, documents: int) -> dict[str, Any]:
    """A whole embed job in a folder of its own, its records prepared before."""
    texts = [row["positive"] for row in records(data, "debian")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", texts[:2000])
        with (folder / "input.jsonl").open("w", encoding="utf-8") as file:
            for number in range(documents):
                turn, place = divmod(number, len(texts))
                file.write(json.dumps({"text": f"{texts[place]} turn {turn} of {number}"}) + "\n")
        source = {"name": "text", "type": "json", "path": str(folder / "input.jsonl"), "fields": {"text": "text"}}
        shared = [f"storage.root={folder}/storage", f"data.sources=[{json.dumps(source)}]"]
        shared += [f"tokenizer.load_path={folder / 'model' / 'tokenizer.json'}"]  # of no use here, and soonest made
        subprocess.run(
            [sys.executable, str(ROOT / "jobs" / "prepare.py"), *shared], check=True, stdout=subprocess.DEVNULL
        )
        return watch([sys.executable, str(ROOT / "jobs" / "embed.py"), *shared, f"embedding.model={folder / 'model'}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with debian")
    parser.add_argument("--small", type=int, default=10_000, help="documents")
    parser.add_argument("--large", type=int, default=200_000, help="documents")
    args = parser.parse_args()
    found = {size: embedding(args.data, size) for size in (args.small, args.large)}
    lines = table(compared(found, ("rows",)), ["documents", "rows", *MEASURED])
    by_work = table(by("works", found, WORKS), ["peak worker MB by work", *(f"{size:,}" for size in found)])
    print(f"\n{machine()}\n\n{lines}\n\n{by_work}")


if __name__ == "__main__":
    main()
