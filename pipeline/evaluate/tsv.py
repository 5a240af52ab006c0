"""Tab-separated files with a header, read strictly: no quoting, and as many cells a line as there are columns."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence

from pipeline.config import ConfigError
from pipeline.storage.files import fetched
from pipeline.storage.path import StoragePath


def read_tsv(path: StoragePath, columns: Sequence[str], key: str, take: Callable[[list[str]], None]) -> None:
    """Call `take` with the cells of each line; what it raises ValueError for is wrong with that line.

    Raises ConfigError naming the config `key`, the file and the line that is not as it should be.
    """
    names = ", ".join(columns)
    try:
        with fetched(path).open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            if next(rows, None) != list(columns):
                raise ValueError(f"a header of {names} is wanted")
            for cells in rows:
                if len(cells) != len(columns):
                    raise ValueError(f"{'not enough' if len(cells) < len(columns) else 'too many'} values")
                take(cells)
    except OSError as error:
        raise ConfigError(f"{key}: {path}: {error.strerror}; allowed is a TSV of {names}") from None
    except (ValueError, csv.Error) as error:
        raise ConfigError(f"{key}: {path} line {rows.line_num}: {error}; allowed are rows of {names}") from None
