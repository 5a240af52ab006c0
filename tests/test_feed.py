"""The batch plan of a data set of any size."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.data.feed import training_plan
from pipeline.data.manifest import Manifest, Shard


def manifest(train: int, validation: int) -> Manifest:
    shard = Shard("train/00000.parquet", "train", train, [train], [None], "")
    return Manifest("f", [], {"train": train, "validation": validation}, [shard], {}, [], {})


@pytest.mark.parametrize(
    ("records", "size", "steps"),
    [(2, 2, 1), (3, 2, 1), (7, 2, 3), (8, 2, 4), (54, 13, 4), (255, 63, 4), (256, 256, 1), (600, 256, 2)],
)
def test_a_batch_is_no_larger_than_the_data(records: int, size: int, steps: int) -> None:
    plan = training_plan(Path(), manifest(records, 2), 256, seed=0)
    assert (plan.global_batch_size, plan.batches_per_epoch) == (size, steps)


@pytest.mark.parametrize(
    ("train", "validation", "advice"),
    [
        (1, 2, "data.sources: found 3 records; training needs 4 or more"),
        (0, 0, "data.sources: found 0 records"),
        (39, 1, "holds out 1 of 40 records; raise it to hold out at least 2, as in data.validation_fraction=0.2"),
        (1, 5, "leaves 1 of 6 records to train on; lower it, as in data.validation_fraction=0.1"),
    ],
)
def test_data_that_are_too_few_are_refused(train: int, validation: int, advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        training_plan(Path(), manifest(train, validation), 256, seed=0)
