"""From a source's rows to records: names, nested names, defaults, lists, and what is no text."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import Source
from pipeline.sources.fields import FieldMap, RawRecord, Row, broken, own_fields, required_fields, text_fields


def source(kind: str = "json", **settings: Any) -> Source:
    return Source(name="s", type=kind, path="somewhere", **settings)


def record(values: dict[str, Any], **settings: Any) -> RawRecord:
    return FieldMap(source(**settings))(Row("a.jsonl:7", values))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kind": "json"}, ["anchor", "positive"]),
        ({"kind": "python_packages"}, ["anchor", "positive"]),
        ({"kind": "text"}, ["anchor", "positive"]),
        ({"kind": "text", "record": "line"}, ["text"]),
        ({"kind": "text", "fields": {"text": "body"}}, ["text"]),
        ({"fields": {"id": "key"}}, ["anchor", "positive"]),
        ({"fields": {"negatives": "n", "positive": "p", "anchor": "a"}}, ["anchor", "positive", "negatives"]),
    ],
)
def test_text_fields_of_a_source(settings: dict[str, Any], expected: list[str]) -> None:
    assert text_fields(source(**settings)) == expected


def test_own_fields_are_what_a_reader_has_to_read() -> None:
    mapped = source(fields={"text": "a.b", "id": "key"}, metadata=["year", "a.b"])
    assert own_fields(mapped) == ["a.b", "key", "year"]
    assert required_fields(mapped) == ["a.b", "key"]
    assert own_fields(source()) == ["anchor", "positive", "id"]
    assert required_fields(source()) == ["anchor", "positive"]


@pytest.mark.parametrize(
    ("negatives", "expected"),
    [(["x", "y"], ["x", "y"]), ("x", ["x"]), (None, []), ([], []), (..., [])],
)
def test_negatives_are_a_list_of_texts(negatives: Any, expected: list[str]) -> None:
    values = {"a": "q", "p": "r"} | ({} if negatives is ... else {"n": negatives})
    fields = {"anchor": "a", "positive": "p", "negatives": "n"}
    assert record(values, fields=fields).fields == {"anchor": "q", "positive": "r", "negatives": expected}


@pytest.mark.parametrize(("negatives", "reason"), [(["x", None], "null_field"), ([1], "wrong_type"), (7, "wrong_type")])
def test_negatives_that_are_none(negatives: Any, reason: str) -> None:
    values, fields = {"a": "q", "p": "r", "n": negatives}, {"anchor": "a", "positive": "p", "negatives": "n"}
    assert record(values, fields=fields).reason == reason


@pytest.mark.parametrize(
    ("values", "expected", "reason"),
    [
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
    ],
)
def test_nested_fields(values: dict[str, Any], expected: str | None, reason: str | None) -> None:
    found = record(values, fields={"text": "a.b"})
    assert (found.fields.get("text"), found.reason) == (expected, reason)
    assert bool(found.excerpt) == bool(reason)


@pytest.mark.parametrize(("value", "expected"), [("k", "k"), (12, "12"), (True, "a.jsonl:7"), (1.5, "a.jsonl:7")])
def test_ids_are_the_rows_own_else_its_position(value: Any, expected: str) -> None:
    assert record({"text": "x", "id": value}, fields={"text": "text"}).native_id == expected
    assert record({"text": "x", "n": {"k": value}}, fields={"text": "text", "id": "n.k"}).native_id == expected
    assert record({"text": "x"}, fields={"text": "text"}).native_id == "a.jsonl:7"


def test_metadata_rides_along() -> None:
    found = record({"text": "x", "a": {"b": 1}, "c": None}, fields={"text": "text"}, metadata=["a.b", "c", "d"])
    assert found.metadata == {"a.b": 1, "c": None, "d": None}
    given = {"text": "x", "file": "a.txt", "line": 3}
    assert record(given, kind="text", record="paragraph").metadata == {"file": "a.txt", "line": 3}
    assert record({"text": "x", "file": "a.txt"}, kind="text", record="line").metadata == {"file": "a.txt"}


def test_a_broken_row_is_a_record_with_its_reason() -> None:
    found = FieldMap(source())(broken("a.jsonl:0", "broken_json", b"\xff" + b"x" * 5_000))
    assert (found.native_id, found.fields, found.reason) == ("a.jsonl:0", {}, "broken_json")
    assert found.excerpt == "\ufffd" + "x" * 199


def test_a_missing_field_is_told_with_all_columns_there_are() -> None:
    row = Row("a.parquet:0", {"id": 1}, names=("id", "title", "words"))
    assert FieldMap(source("parquet"))(row).excerpt == "no field 'anchor'; it has id, title, words"
