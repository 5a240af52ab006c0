"""The texts that the benchmarks of the data stages run on, as records.

    rows = records(Path("data"), "wordnet")             # RECORD_SCHEMA, each text once, in the order of ids
    files = write_records(rows, Path("records"), 2)     # 00000.parquet, 00001.parquet, cut as jobs/prepare.py cuts them

Expected in the data folder: `debian/pairs.jsonl` and `wordnet/pairs.jsonl` (`id`, `anchor`, `positive` a line), and
`linux-doc`, a folder of text files.
"""

import json
import math
import os
import platform
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.core.artifact import write_parquet
from pipeline.data.manifest import RECORD_SCHEMA
from pipeline.data.partitions import content_id, shard_of
from pipeline.data.prepare import SHARD_BYTES

CORPORA = ("wordnet", "linux-doc", "debian")
PARAGRAPH_WORDS = 20  # shorter ones are headings and lists of names

Record = dict[str, Any]


def records(data: Path, name: str, paragraphs: bool = False) -> list[Record]:
    """A corpus's records; linux-doc's are whole files, or their paragraphs of at least PARAGRAPH_WORDS words."""
    texts = _paragraphs(data / name) if paragraphs else _files(data / name)
    found = texts if name == "linux-doc" else _pairs(data / name / "pairs.jsonl")
    rows = {row["id"]: row for row in (_record(name, *one) for one in found)}
    return [rows[key] for key in sorted(rows)]


def text_of(row: Record) -> str:
    """What near-duplicate removal compares."""
    return "\n".join(row[name] for name in ("anchor", "positive", "text") if row.get(name))


def text_bytes(rows: Sequence[Record]) -> int:
    return sum(len(text_of(row).encode()) for row in rows)


def with_copies(rows: Sequence[Record], copies: int) -> list[Record]:
    """Each record `copies` times: as it is, then with every hundredth word or so, one at least, made another."""
    found = list(rows)
    for copy in range(1, copies):
        chance = random.Random(copy)
        for row in rows:
            fields = {name: _edited(row[name], copy, chance) for name in ("text", "positive") if row.get(name)}
            kept = {name: row[name] for name in ("anchor",) if row.get(name)}
            found.append(_record(row["source"], f"{row['source_id']}#{copy}", kept | fields))
    return sorted(found, key=lambda row: str(row["id"]))


def write_records(rows: Sequence[Record], folder: Path, shards: int | None = None) -> list[Path]:
    """Record files, as many as jobs/prepare.py would cut."""
    shards = shards or math.ceil(text_bytes(rows) / SHARD_BYTES)
    files = [folder / f"{shard:05d}.parquet" for shard in range(shards)]
    parts: list[list[Record]] = [[] for _ in files]
    for row in rows:
        parts[shard_of(row["id"], shards)].append(row)
    for part, file in zip(parts, files, strict=True):
        write_parquet(pa.Table.from_pylist(part, RECORD_SCHEMA), file)
    return files


def machine() -> str:
    """What the numbers were measured on; the load says what else ran in the last minute."""
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = f"load {os.getloadavg()[0]:.1f} at the end"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {gib:.0f} GiB, {load}"


def _record(source: str, native: str, fields: dict[str, str]) -> Record:
    identity = content_id([fields[name] for name in ("anchor", "positive", "text") if name in fields])
    return {"id": identity, "source": source, "source_id": native, **fields}


def _files(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    for path in sorted(folder.iterdir()):
        yield path.name, {"text": path.read_text(encoding="utf-8", errors="replace")}


def _paragraphs(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    for name, fields in _files(folder):
        for place, text in enumerate(re.split(r"\n\s*\n", fields["text"])):
            if len(text.split()) >= PARAGRAPH_WORDS:
                yield f"{name}:{place}", {"text": text.strip()}


def _pairs(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    with path.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            yield row["id"], {"anchor": row["anchor"], "positive": row["positive"]}


def _edited(text: str, copy: int, chance: random.Random) -> str:
    words = text.split(" ")
    for place in chance.sample(range(len(words)), max(1, len(words) // 100)):
        words[place] = f"edit{copy}"
    return " ".join(words)
