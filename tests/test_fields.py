"""From a source's rows to records: names, nested names, defaults, lists, and what is no text."""

from __future__ import annotations

import datetime
import json
import uuid
from decimal import Decimal
from typing import Any

from pipeline.config import Source
from pipeline.data.fields import FieldMap, RawRecord, Row, broken, own_fields, required_fields, text_fields


def source(kind: str = "json", **settings: Any) -> Source:
    return Source(name="s", type=kind, path="somewhere", **settings)


def record(values: dict[str, Any], **settings: Any) -> RawRecord:
    return FieldMap(source(**settings))(Row("a.jsonl:7", values))


def test_text_fields_of_a_source_and_what_a_reader_has_to_read() -> None:
    three = {"negatives": "n", "positive": "p", "anchor": "a"}
    for found, expected in (
        (source("json"), ["anchor", "positive"]),
        (source("python_packages"), ["anchor", "positive"]),
        (source("text"), ["anchor", "positive"]),
        (source("text", record="line"), ["text"]),
        (source("text", fields={"text": "body"}), ["text"]),
        (source(fields={"id": "key"}), ["anchor", "positive"]),
        (source(fields=three), ["anchor", "positive", "negatives"]),
    ):
        assert text_fields(found) == expected, found
    mapped = source(fields={"text": "a.b", "id": "key"}, metadata=["year", "a.b"])
    assert own_fields(mapped) == ["a.b", "key", "year"]
    assert required_fields(mapped) == ["a.b", "key"]
    assert own_fields(source()) == ["anchor", "positive", "id"]
    assert required_fields(source()) == ["anchor", "positive"]


def test_negatives_are_a_list_of_texts() -> None:
    fields = {"anchor": "a", "positive": "p", "negatives": "n"}
    for given, expected in (
        ({"n": ["x", "y"]}, ["x", "y"]),
        ({"n": "x"}, ["x"]),
        ({"n": None}, []),
        ({"n": []}, []),
        ({}, []),
    ):
        found = record({"a": "q", "p": "r", **given}, fields=fields)
        assert found.fields == {"anchor": "q", "positive": "r", "negatives": expected}
    for wrong, reason in ((["x", None], "null_field"), ([1], "wrong_type"), (7, "wrong_type")):
        assert record({"a": "q", "p": "r", "n": wrong}, fields=fields).reason == reason


NESTED: list[tuple[dict[str, Any], str | None, str | None]] = [  # row, text of its field a.b, and reason
    ({"a": {"b": "x"}}, "x", None),
    ({"a.b": "x", "a": {"b": "y"}}, "x", None),
    ({"a": {"b": ["x", "y"]}}, "x\n\ny", None),
    ({"a": {"b": []}}, "", None),
    ({"a": None}, None, "null_field"),
    ({"a": {"b": None}}, None, "null_field"),
    ({"a": {"c": "x"}}, None, "missing_field"),
    ({"a": "x"}, None, "missing_field"),
    ({"a": {"b": b"caf\xc3\xa9"}}, "café", None),
    ({"a": {"b": b"caf\xe9"}}, None, "invalid_utf8"),
    ({"a": {"b": {"c": "x"}}}, None, "wrong_type"),
    ({"a": {"b": 1.5}}, None, "wrong_type"),
]


def test_nested_fields() -> None:
    for values, expected, reason in NESTED:
        found = record(values, fields={"text": "a.b"})
        assert (found.fields.get("text"), found.reason) == (expected, reason), values
        assert bool(found.excerpt) == bool(reason)


UTC, DAY = datetime.UTC, datetime.datetime(2024, 3, 5, 12, 30)
IDS: list[tuple[Any, str]] = [
    (Decimal("5001"), "5001"), (Decimal("5001.00"), "5001"), (Decimal("12.50"), "12.5"), (70.0, "70"), (-0.0, "0"),
    (b"caf\xc3\xa9", "café"), (b"\xff\x00", "ff00"), (DAY.date(), "2024-03-05"),
    (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"),
    (float("nan"), "a.jsonl:7"), (float("inf"), "a.jsonl:7"), (None, "a.jsonl:7"), (["x"], "a.jsonl:7"),
    ({"x": 1}, "a.jsonl:7"),
]  # fmt: skip
NAN, INFINITY = float("nan"), float("inf")
VALUES: list[tuple[Any, str]] = [  # value and its JSON
    ("NaN", '"NaN"'), (True, "true"), (NAN, "null"), (-INFINITY, "null"), (2.0, "2.0"), (0.5, "0.5"),
    (Decimal(7), "7"), (Decimal("12.50"), "12.5"), (Decimal("NaN"), "null"), (b"fi", '"fi"'), (b"\xff", '"ff"'),
    (DAY.date(), '"2024-03-05"'), (DAY.time(), '"12:30:00"'), (DAY, '"2024-03-05T12:30:00"'),
    (DAY.replace(tzinfo=UTC), '"2024-03-05T12:30:00+00:00"'), (datetime.timedelta(minutes=1.5), "90.0"),
    ({"deep": [1.5, -INFINITY, {"x": NAN, 7: b"y"}]}, '{"deep": [1.5, null, {"x": null, "7": "y"}]}'),
    ([("key", NAN)], '[["key", null]]'),
]  # fmt: skip


def test_values_of_all_types_have_one_form_in_metadata() -> None:
    for value, expected in VALUES:
        found = record({"text": "x", "a": value}, fields={"text": "text"}, metadata=["a"])
        assert json.dumps(found.metadata["a"], allow_nan=False) == expected, value
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert record({"text": "x", "a": deep}, fields={"text": "text"}, metadata=["a"]).reason == "unreadable_value"


def test_ids_are_the_rows_own_else_its_position() -> None:
    assert record({"text": "x"}, fields={"text": "text"}).native_id == "a.jsonl:7"
    for value, expected in (("k", "k"), (12, "12"), (True, "a.jsonl:7"), (1.5, "1.5"), *IDS):
        assert record({"text": "x", "id": value}, fields={"text": "text"}).native_id == expected
        assert record({"text": "x", "n": {"k": value}}, fields={"text": "text", "id": "n.k"}).native_id == expected


def test_metadata_rides_along() -> None:
    found = record({"text": "x", "a": {"b": 1}, "c": None}, fields={"text": "text"}, metadata=["a.b", "c", "d"])
    assert found.metadata == {"a.b": 1, "c": None, "d": None}
    given = {"text": "x", "file": "a.txt", "line": 3}
    assert record(given, kind="text", record="paragraph").metadata == {"file": "a.txt", "line": 3}
    assert record({"text": "x", "file": "a.txt"}, kind="text", record="line").metadata == {"file": "a.txt"}


def test_a_broken_row_and_one_that_lacks_a_field_say_why() -> None:
    found = FieldMap(source())(broken("a.jsonl:0", "broken_json", b"\xff" + b"x" * 5_000))
    assert (found.native_id, found.fields, found.reason) == ("a.jsonl:0", {}, "broken_json")
    assert found.excerpt == "\ufffd" + "x" * 5_000
    row = Row("a.parquet:0", {"id": 1}, names=("id", "title", "words"))
    assert FieldMap(source("parquet"))(row).excerpt == "no field 'anchor'; the row has id, title, words"
