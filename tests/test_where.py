"""Filter conditions: what is written on the command line finds what is stored, in LanceDB and in Pinecone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.config import ConfigError, load
from pipeline.index.documents import PLACE_COLUMNS
from pipeline.index.pinecone_store import PineconeStore
from pipeline.index.search import TableSearch
from pipeline.index.table import PLACE, VectorTable
from pipeline.index.vectors import as_column
from pipeline.index.where import keeps, parse, to_sql, why_none
from pipeline.job import DEFAULT_CONFIG
from tests.pinecone_server import pinecone_server

ROWS: dict[str, dict[str, Any]] = {
    "text": {"year": "2021", "zip": "02143", "land": "NO", "v": "1.10", "opens": "12:30", "day": "2024-03-05"},
    "other": {"year": "1123", "zip": "2143", "land": "false", "v": "1.1", "opens": "750", "day": "2024-03-06"},
    "number": {"year": 2021, "price": 12.5, "new": True, "big": 2**60, "tags": ["a", "true"]},
    "smaller": {"year": 1999, "price": 11, "new": False, "big": 2**60 + 1, "tags": ["b, c"]},
    "strange": {
        "year": "",
        "land": "[draft]",
        "v": " x ",
        "opens": "=SUM(A1)",
        "day": ">5",
        "text": "own",
        "größe": "XL",
    },
}
FOUND: dict[str, set[str]] = {
    "year=2021": {"text", "number"},
    "year==2021": {"text", "number"},
    "year = 2021": {"text", "number"},
    "year=2021.0": {"number"},
    "year=": {"strange"},
    "year=[1999, 1123]": {"other", "smaller"},
    "zip=02143": {"text"},
    "zip=2143": {"other"},
    "land=NO": {"text"},
    "land=false": {"other"},
    "land=[NO, false]": {"text", "other"},
    "land=[draft]": {"strange"},
    "v=1.10": {"text"},
    "v=1.1": {"other"},
    "v= x ": {"strange"},
    "opens=12:30": {"text"},
    "opens=[12:30, 750]": {"text", "other"},
    "opens==SUM(A1)": {"strange"},
    "day=2024-03-05": {"text"},
    "day=>5": {"strange"},
    "price=12.50": {"number"},
    "price>11": {"number"},
    "price>=11": {"number", "smaller"},
    "new=true": {"number"},
    "new=False": {"smaller"},
    f"big={2**60}": {"number"},
    "tags=a": {"number"},
    "tags=true": {"number"},
    "tags=['b, c', d]": {"smaller"},
    "text=own": {"strange"},
    "größe=XL": {"strange"},
    "source_id=s:text": {"text"},
    "source=2021": {"number"},
    "new=2021": set(),
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    """ROWS in LanceDB and in Pinecone."""
    table = VectorTable(tmp_path_factory.mktemp("where"), "t", 4)
    columns: dict[str, Any] = {
        "id": list(ROWS),
        "source": ["s", "s", "2021", "s", "s"],
        "source_id": [f"s:{name}" for name in ROWS],
        "text": list(ROWS),
        "metadata": [json.dumps(metadata, ensure_ascii=False) for metadata in ROWS.values()],
        "digest": ["0" * 32] * len(ROWS),
    }
    places = [[{name: columns[name][row] for name in PLACE_COLUMNS}] for row in range(len(ROWS))]
    vectors = as_column(np.eye(len(ROWS), 4, dtype=np.float32) + 0.1)
    with table.writing() as writer:
        writer.append(
            table.write(
                table.stored(pa.table({**columns, "places": pa.array(places, pa.list_(PLACE)), "vector": vectors}))
            )
        )
    with pytest.MonkeyPatch.context() as patch, pinecone_server("k") as server:
        patch.setenv("PINECONE_API_KEY", "k")
        config = load(DEFAULT_CONFIG, [f"pinecone.host={server.url}", "pinecone.create=true"])
        store = PineconeStore(config.pinecone, "n", 4)
        store.create()
        assert store.upsert(table.read(table.schema.names)) == []
        yield [TableSearch(table), store]


@pytest.mark.parametrize("written", FOUND)
def test_written_values_find_stored_ones(written: str, stores: list[Any]) -> None:
    for store in stores:
        found = store.query(np.ones(4, np.float32), 10, parse([written]))
        assert {row["id"] for row in found} == FOUND[written], type(store).__name__


def test_bounds_of_one_key_are_joined() -> None:
    assert parse(["n>=10", "n < 20.5", "a=x"]) == {"n": {"gte": 10, "lt": 20.5}, "a": ["x"]}
    assert parse([]) == {}


@pytest.mark.parametrize(
    "written",
    ["source", "=x", "", "n>=x", "n>", "day>2024-03-05", "$a=1", "a!=1", "a<>1", "a~1", "source>1", "n>1e999"],
)
def test_wrong_conditions_are_refused(written: str) -> None:
    with pytest.raises(ConfigError, match="where"):
        parse([written])


def test_two_conditions_on_one_key_are_refused() -> None:
    with pytest.raises(ConfigError, match=re.escape("two conditions on a; for either value, a=[a, b]")):
        parse(["a=1", "a=2"])


def test_an_empty_result_is_explained() -> None:
    places = [{**row, "source": "web", "source_id": f"s:{i}"} for i, row in enumerate(ROWS.values())]
    with pytest.raises(
        ConfigError, match=r"no record with the key 'nosuch'; the keys are source, source_id, big, day, "
    ):
        why_none(parse(["nosuch=1"]), places)
    with pytest.raises(ConfigError, match=r"no record with the key 'yaer'; did you mean year\? The keys are"):
        why_none(parse(["yaer=1"]), places)
    with pytest.raises(ConfigError, match=r"bounds on zip, which has no numbers, but values such as '02143'"):
        why_none(parse(["zip>5"]), places)
    assert why_none(parse(["year>3000"]), places).startswith("no record meets the condition on year, which has values")
    assert why_none(parse(["source=none"]), places) == (
        "no record meets the condition on source, which has values such as web"
    )
    assert why_none(parse(["a=1", "b=1"]), [{"a": 1, "b": 2}, {"a": 2, "b": 1}]) == (
        "each condition is met by some record, but no record meets all of them"
    )
    assert why_none(parse(["a=1"]), [{"a": None}]).endswith("values such as null")
    assert why_none(parse(["a=9"]), [{"a": i} for i in range(8)]).endswith("values such as 0, 1, 2, 3, 4")


SCALARS = st.one_of(st.text(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False))


@pytest.mark.slow
@settings(max_examples=1000)
@given(key=st.from_regex(r"[^<>=!$\s]([^<>=!]*[^<>=!\s])?", fullmatch=True), value=SCALARS)
@example(key="a", value=1e-320)
@example(key="a", value="[[[")
def test_an_equality_finds_every_stored_value(key: str, value: Any) -> None:
    written = value if isinstance(value, str) else json.dumps(value)
    where = parse([f"{key}={written}"])
    if key not in ("source", "source_id"):
        assert keeps(where, {"source": "s", "source_id": "i", "metadata": json.dumps({key: value}), "places": None})
    elif isinstance(value, str):
        assert keeps(where, {"source": value, "source_id": value, "metadata": "{}", "places": None})


@pytest.mark.slow
@settings(max_examples=1000)
@given(
    st.lists(st.text(st.characters(), max_size=30) | st.from_regex(r"\A\w+(=|==|>=|<|>|!=)[\w\[\], .-]*\Z"), max_size=3)
)
def test_any_argument_is_a_condition_or_refused(written: list[str]) -> None:
    try:
        where = parse(written)
    except ConfigError:
        return
    condition, exact = to_sql(where)
    assert condition
    assert exact in (True, False)
    for value in where.values():
        numbers = value.values() if isinstance(value, dict) else [each for each in value if isinstance(each, float)]
        assert all(map(math.isfinite, numbers))
