"""Every record's texts as 64-bit hashes, by which mining knows them: some 60 bytes a record in memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from pipeline.data.work import Report, Task, run_tasks
from pipeline.mining.choosing import Keys
from pipeline.runtime.files import replacing
from pipeline.runtime.session import Board
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


def text_keys(folder: Path, files: Sequence[Path], fraction: float, board: Board) -> TextKeys:
    """Hash the texts of record files; `fraction` of the records are held out. Leaves a file each in `folder`."""
    outputs = [folder / f"{file.stem}.npy" for file in files]
    sizes = [file.stat().st_size for file in files]

    def hash_texts(index: int, report: Report) -> None:
        rows = pq.read_table(files[index], columns=["id", "anchor", "positive"]).to_pylist()
        found = [(text_key(r["anchor"]), text_key(r["positive"]), not is_validation(r["id"], fraction)) for r in rows]
        with replacing(outputs[index]) as temporary, temporary.open("wb") as file:
            np.save(file, np.array(found, dtype=np.uint64).reshape(-1, 3))
        report({"bytes": sizes[index]})

    run_tasks(board, "mine: hash texts", [Task(*of) for of in zip(sizes, outputs, strict=True)], hash_texts)
    found = [np.load(output) for output in outputs]
    whole = np.concatenate(found)
    starts = list(itertools.accumulate(map(len, found), initial=0))
    return TextKeys(whole[:, 0], whole[:, 1], whole[:, 2].astype(bool), starts)
