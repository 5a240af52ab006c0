"""A vector table that is changed step by step, and a dict that says what it must hold."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.path import StoragePath
from pipeline.data.partitions import content_id
from pipeline.index.table import VectorTable
from pipeline.index.vectors import as_column
from pipeline.index.writer import Writer

WIDTH = 5
Place = dict[str, Any]
"""source, source_id and metadata, an object."""
Documents = dict[str, list[Place]]
"""The places of each text."""
ODD = ["a'b", 'say "x"', "p/q\\r", "two\nlines", "tab\t", "é ü 漢", "; DROP TABLE t --", "%s {}"]


def vector_of(text: str) -> np.ndarray:
    return np.random.default_rng(int(content_id([text])[:8], 16)).normal(size=WIDTH).astype(np.float32)


def rows_of(table: VectorTable, documents: Documents) -> pa.Table:
    """Rows as the table stores them."""
    texts, every = list(documents), [[written(place) for place in places] for places in documents.values()]
    columns: dict[str, Any] = {
        "id": [content_id([text]) for text in texts],
        **{name: [places[0][name] for places in every] for name in ("source", "source_id", "metadata")},
        "places": pa.array(every, table.schema.field("places").type),
        "text": texts,
        "digest": [content_id([json.dumps(places)]) for places in every],
        "vector": as_column(np.stack([vector_of(text) for text in texts])),
    }
    return table.stored(pa.table({name: pa.array(values) for name, values in columns.items()}))


def written(place: Place) -> dict[str, str]:
    return {**place, "metadata": json.dumps(place["metadata"])}


class World:
    def __init__(self, folder: StoragePath, seed: int = 0, vector_type: str = "float32", name: str = "t") -> None:
        self.table = VectorTable(folder, name, WIDTH, vector_type)
        self.documents: Documents = {}
        self.chance, self.made = random.Random(seed), 0

    def new(self, count: int) -> Documents:
        """So many new documents of one place each."""
        self.made += count
        return {f"text {n} of {self.chance.random()}": [self.place()] for n in range(self.made - count, self.made)}

    def place(self) -> Place:
        chance = self.chance
        metadata = {
            "size": chance.choice([1, 2.5, 30]),
            "tag": chance.choice([["a", "b"], "a", None, [1, "a"], [], {"deep": [None]}]),
            "new": chance.random() < 0.5,
        }
        return {
            "source": chance.choice("st"),
            "source_id": f"{chance.choice(ODD)}{chance.random()}",
            "metadata": metadata,
        }

    def add(self, writer: Writer, documents: Documents) -> None:
        self.documents |= documents
        if documents:
            rows = rows_of(self.table, documents).sort_by("id").combine_chunks()
            writer.append(self.table.write(rows))

    def change(self, writer: Writer, documents: Documents) -> None:
        """Other places of texts that are there."""
        self.documents |= documents
        if documents:
            rows = rows_of(self.table, documents).sort_by("id").combine_chunks()
            old = self.table.read(["id", "_rowid"])
            keep = pc.is_in(old["id"], rows["id"].combine_chunks())
            writer.append(self.table.write(rows))
            writer.delete(old["_rowid"].filter(keep).to_numpy())

    def remove(self, writer: Writer, texts: list[str]) -> None:
        ids = {content_id([text]) for text in texts}
        rows = self.table.read(["id", "_rowid"])
        keep = pa.array([i in ids for i in rows["id"].to_pylist()], pa.bool_())
        writer.delete(rows["_rowid"].filter(keep).to_numpy())
        for text in texts:
            del self.documents[text]

    def some(self, count: int) -> list[str]:
        return self.chance.sample(sorted(self.documents), min(count, len(self.documents)))

    def step(self, writer: Writer) -> None:
        """A few random changes."""
        self.add(writer, self.new(self.chance.randrange(6)))
        changed = {text: list(self.documents[text]) for text in self.some(self.chance.randrange(5))}
        for places in changed.values():
            if len(places) > 1 and self.chance.random() < 0.5:
                places.pop(0)
            else:
                places.append(self.place())
        self.change(writer, changed)
        self.remove(writer, self.some(self.chance.randrange(4)))
        if self.chance.random() < 0.2:
            self.table.open().optimize.compact_files()
