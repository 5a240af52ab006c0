"""Every record's texts as 64-bit hashes, by which mining knows them: some 60 bytes a record in memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.mining.choosing import Keys
from pipeline.runtime.artifact import Artifact, Output, open_parquet
from pipeline.runtime.session import Progress
from pipeline.storage.files import sizes
from pipeline.storage.path import StoragePath
from pipeline.text.identity import content_id, is_validation


@dataclass(frozen=True)
class TextKeys:
    """Of every record in the order of the files: hashes of its two texts, and whether it trains. (N,) each."""

    anchors: Keys
    positives: Keys
    trains: npt.NDArray[np.bool_]
    file_starts: list[int]

    def first_of_each_positive(self) -> npt.NDArray[np.bool_]:
        """(N,): whether a record trains and none before it that does has the same positive."""
        rows = np.flatnonzero(self.trains)
        first = np.zeros(len(self.trains), dtype=bool)
        first[rows[np.unique(self.positives[rows], return_index=True)[1]]] = True
        return first


def text_key(text: str) -> int:
    """The same for equal texts alone: among 5 million, two others meet with a chance of one in a million."""
    return int(content_id([text])[:16], 16)


def text_keys(mined: Artifact, files: Sequence[StoragePath], fraction: float, progress: Progress) -> TextKeys:
    """Hash the texts of record files, into files in the scratch folder; `fraction` of the records are held out."""

    def hash_texts(index: int, output: Output) -> None:
        rows = open_parquet(files[index]).read(columns=["id", "anchor", "positive"]).to_pylist()
        found = [(text_key(r["anchor"]), text_key(r["positive"]), not is_validation(r["id"], fraction)) for r in rows]
        with output.writing(f"scratch/keys/{files[index].stem}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, np.array(found, dtype=np.uint64).reshape(-1, 3))

    mined.tasks(progress, "mine: hash texts", [size or 0 for size in sizes(files)], hash_texts)
    found = []
    for path in files:
        with (mined.scratch / "keys" / f"{path.stem}.npy").open("rb") as file:
            found.append(np.load(file))
    whole = np.concatenate(found)
    starts = list(itertools.accumulate(map(len, found), initial=0))
    return TextKeys(whole[:, 0], whole[:, 1], whole[:, 2].astype(bool), starts)
