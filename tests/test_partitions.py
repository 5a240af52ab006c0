"""The records that are held out, of data of any size."""

from __future__ import annotations

import pytest

from pipeline.data.partitions import content_id, held_out_fraction, is_validation


def held_out(ids: list[str], fraction: float) -> set[str]:
    share = held_out_fraction(ids, fraction)
    return {each for each in ids if is_validation(each, share)}


def of(count: int, seed: int = 0) -> list[str]:
    return [content_id([f"{seed}", f"{number}"]) for number in range(count)]


@pytest.mark.parametrize("count", [4, 5, 19, 20, 21, 40, 60, 99])
@pytest.mark.parametrize("fraction", [1e-9, 0.02, 0.1, 0.49])
def test_small_data_hold_out_two_records_or_more(count: int, fraction: float) -> None:
    for seed in range(20):
        ids = of(count, seed)
        natural = {each for each in ids if int(each[8:16], 16) / 2**32 < fraction}
        found = held_out(ids, fraction)
        if len(natural) >= 2:
            assert found == natural
        else:
            assert len(found) == max(2, count // 10)
            assert natural <= found


def test_a_new_record_brings_no_trained_one_into_the_held_out() -> None:
    for seed in range(50):
        ids = of(60, seed)
        before = held_out(ids, 0.02)
        for new in of(30, seed + 1000):
            assert held_out([*ids, new], 0.02) <= before | {new}


def test_fewer_than_four_records_are_left_alone() -> None:
    for count in range(4):
        assert held_out_fraction(of(count), 0.02) == 0.02
