"""BEIR folders as people have them: against BEIR's own way of reading them, and against trec_eval's file format."""

from __future__ import annotations

import csv
import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import ConfigError
from pipeline.data.beir import read_qrels
from pipeline.evaluation.metrics import METRICS, retrieval_metrics
from pipeline.evaluation.tasks import check_beir, read_beir, read_labels
from pipeline.model.scores import read_sts
from tests.test_sources import write_new

MARK = b"\xef\xbb\xbf"
HEADER = "query-id\tcorpus-id\tscore\n"
QUERIES = [{"_id": f"q{i}", "text": f"ask {i}"} for i in range(3)]
CORPUS = [{"_id": f"d{i}", "title": "", "text": f"tell {i}"} for i in range(6)]
JUDGED = "q0\td0\t1\nq1\td1\t2\nq1\td4\t0\nq2\td2\t1\n"
FOUND = {"q0": {"d0": 1}, "q1": {"d1": 2}, "q2": {"d2": 1}}


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(folder: Path, corpus: bytes = b"", queries: bytes = b"", qrels: bytes = b"") -> Path:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    write_new(folder / "corpus.jsonl", corpus or lines(CORPUS))
    write_new(folder / "queries.jsonl", queries or lines(QUERIES))
    write_new(folder / "qrels" / "test.tsv", qrels or (HEADER + JUDGED).encode())
    return folder


def as_beir(qrels: str) -> dict[str, dict[str, int]]:
    """The judgements above zero, read as BEIR's GenericDataLoader does."""
    rows = csv.reader(io.StringIO(qrels), delimiter="\t", quoting=csv.QUOTE_MINIMAL)
    next(rows)
    found: dict[str, dict[str, int]] = {}
    for query, document, score in ((row[0], row[1], int(row[2])) for row in rows if row):
        if score > 0:
            found.setdefault(query, {})[document] = score
    return found


@pytest.mark.parametrize(
    "qrels",
    [
        HEADER + JUDGED,
        "qid\tdid\tlabel\n" + JUDGED,
        HEADER.replace("\n", "\tyear\n") + JUDGED.replace("\n", "\t2024\n"),
        HEADER + JUDGED + "\n\n",
        (HEADER + JUDGED).replace("\n", "\r\n"),
        HEADER + JUDGED.rstrip("\n"),
        HEADER + JUDGED + "q0\td5\t-1\n",
        HEADER + JUDGED + "q0\td0\t1\n",  # the same judgement again
    ],
)
def test_judgements_are_those_that_beir_reads(qrels: str, tmp_path: Path) -> None:
    for mark in (b"", MARK):
        assert read_beir(write(tmp_path, qrels=mark + qrels.encode())).qrels == as_beir(qrels) == FOUND


@pytest.mark.parametrize(
    "qrels",
    [
        JUDGED,  # no header
        HEADER + JUDGED.replace("\t1\n", "\t1.0\n"),
        "score\tcorpus-id\tquery-id\n1\td0\tq0\n2\td1\tq1\n1\td2\tq2\n",
        (HEADER + JUDGED).replace("\t", " "),
    ],
)
def test_judgements_that_only_we_read(qrels: str, tmp_path: Path) -> None:
    assert read_beir(write(tmp_path, qrels=qrels.encode())).qrels == FOUND


@pytest.mark.parametrize("separator", [" ", "\t"])
@pytest.mark.parametrize("prefix", ["d", ""], ids=["names", "numbers"])
def test_judgements_of_trec(separator: str, prefix: str, tmp_path: Path) -> None:
    rows = [["301", "0", f"{prefix}17", "1"], ["301", "0", f"{prefix}18", "0"], ["302", "0", f"{prefix}0", "2"]]
    text = "".join(separator.join(row) + "\n" for row in rows)
    path = tmp_path / "test.tsv"
    path.write_text(text)
    expected = pytrec_eval.parse_qrel(text.replace("\t", " ").splitlines())
    assert read_qrels(path, {"301", "302"}, "key") == expected


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (
            {"queries": lines([*QUERIES, {"_id": "q1", "text": "other"}])},
            r"queries.jsonl line 4: the _id 'q1' is",
        ),
        ({"corpus": lines([*CORPUS, CORPUS[2]])}, r"documents 3 and 7 have the same _id 'd2'"),
        ({"qrels": (HEADER + JUDGED.replace("d", "x")).encode()}, r"3 of 3 judged documents .* missing from corpus"),
        ({"qrels": (HEADER + JUDGED.replace("q", "x")).encode()}, r"no query with a relevant document; .* 0 of its 3"),
        ({"qrels": (HEADER + "q0\td0\t0\n").encode()}, r"no query with a relevant document"),
        ({"qrels": HEADER.encode()}, r"no query with a relevant document"),
        (
            {"qrels": (HEADER + JUDGED + "q0\td0\t2\n").encode()},
            r"line 6: found the score 2 for 'q0' and 'd0', ",
        ),
        ({"qrels": (HEADER + "q0\td0\tgood\n").encode()}, r"test.tsv line 2: the score 'good' is not a whole number"),
        ({"qrels": b"q0\td0\tgood\nq1\td1\t1\n"}, r"test.tsv line 1: the score 'good' is not a whole number"),
        ({"qrels": (HEADER + "q0\td0\t0.5\n").encode()}, r"line 2: the score '0.5' is not"),
        (
            {"qrels": (HEADER + "q0\td0\t1e30\n").encode()},
            r"line 2: the score '1e30' is not .* up to 1,000",
        ),
        ({"qrels": (HEADER + "q0\td0\tnan\n").encode()}, r"line 2: the score 'nan' is not"),
        ({"qrels": (HEADER + "\nq0\td0\n").encode()}, r"line 3: found 2 columns; .* query-id, corpus-id, score"),
        ({"qrels": (HEADER + "q0\td0\0\t1\n").encode()}, r"line 2: found a null character"),
        ({"qrels": HEADER.encode() + b"q0\td\xff\t1\n"}, r"line 2: .*utf-8"),
        ({"corpus": lines([{"_id": "d", "title": ["x"], "text": "x"}])}, r"line 1: the title of 'd' is not a text"),
        ({"corpus": lines([{"_id": "d\0", "text": "x"}])}, r"line 1: the _id 'd\\x00' has a null character"),
        ({"corpus": b"[" * 100_000}, r"corpus.jsonl line 1: .*recursion"),
    ],
)
def test_what_is_refused(parts: dict[str, bytes], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^evaluation.beir_dir: .*{sentence}"):
        read_beir(write(tmp_path, **parts))


def test_queries_and_judgements_are_checked_before_work_starts(tmp_path: Path) -> None:
    check_beir(write(tmp_path))
    with pytest.raises(ConfigError, match="'q0' is not unique"):
        check_beir(write(tmp_path, queries=lines([*QUERIES, QUERIES[0]])))
    with pytest.raises(ConfigError, match="line 2"):
        check_beir(write(tmp_path, qrels=b"h\nq0\td0\n"))


def test_what_is_missing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    qrels = HEADER + JUDGED + "q0\tgone\t1\nq9\td3\t1\nq1\tunused\t0\nq3\td1\t0\n"
    folder = write(tmp_path, queries=lines([*QUERIES, {"_id": "q3", "text": "x"}]), qrels=qrels.encode())
    with caplog.at_level(logging.WARNING, "pipeline"):
        task = read_beir(folder)
    assert task.qrels == FOUND | {"q0": {"d0": 1, "gone": 1}}  # as in trec_eval, a missing document is not found
    assert [record.getMessage().split(", ", 1)[1] for record in caplog.records] == [
        "1 of 5 judged queries are missing from queries.jsonl, such as 'q9'",
        "1 of 4 judged queries have no score above 0 and are left out, such as 'q3'",
        "1 of 4 judged documents with a score above 0 are missing from corpus.jsonl, such as 'gone'",
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "pipeline"):
        read_beir(write(tmp_path / "whole"))
    assert not caplog.records


def test_texts_of_documents_are_those_of_beir(tmp_path: Path) -> None:
    """`(title + " " + text).strip()`, in Windows' line ends and with a mark, as BEIR's models join them."""
    rows = [("T", "x"), ("", "x"), (None, "x"), ("T", ""), ("", "")]
    documents = [{"_id": f"d{i}", "title": title, "text": text} for i, (title, text) in enumerate(rows)]
    documents.append({"_id": "d5", "text": "x"})
    content = MARK + lines(documents).replace(b"\n", b"\r\n\r\n")
    task = read_beir(write(tmp_path, corpus=content, queries=MARK + lines(QUERIES)))
    expected = [f"{title or ''} {text}".strip() for title, text in rows]
    assert list(task.documents.values()) == [*expected, "x"]
    assert task.queries["q0"] == "ask 0"


ids = st.sampled_from(["q0", "q1", "d0", "d1", "", "0", "Q0", "é", 'a"b', " ", "-1", "\u2028", "\ufeff"])
rows = st.builds(dict, _id=ids | st.integers(), title=st.none() | st.text(max_size=3), text=st.text(max_size=5))
json_lines = st.lists(rows.map(json.dumps) | st.text(max_size=8), max_size=5).map("\n".join)
cells = ids | st.sampled_from(["1", "2", "0", "1.0", "-1", "x", "nan", "query-id", "corpus-id", "score"])
tables = st.tuples(
    st.sampled_from(["", HEADER, "a\tb\tc\n", "score\tsentence1\tsentence2\n", "text\tlabel\n"]),
    st.lists(st.lists(cells, max_size=5), max_size=5),
    st.sampled_from(["\t", " "]),
    st.sampled_from(["\n", "\r\n", "\n\n", "\r"]),
).map(lambda part: part[0] + part[3].join(part[2].join(row) for row in part[1]))


def file_bytes(texts: st.SearchStrategy[str]) -> st.SearchStrategy[bytes]:
    """Files of a kind, with a mark or without, and any bytes."""
    encoded = texts.map(lambda text: text.encode("utf-8", "surrogatepass"))
    return encoded | encoded.map(lambda data: MARK + data) | encoded.map(lambda data: data[:-1] + b"\xff") | st.binary()


@pytest.mark.slow
@settings(max_examples=1000)
@given(file_bytes(json_lines), file_bytes(json_lines), file_bytes(tables))
def test_any_folder_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, corpus: bytes, queries: bytes, qrels: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    well_formed = lines([{"_id": name, "text": "x"} for name in ("q0", "q1", "é", "0", "")])
    for parts in ((corpus, queries, qrels), (corpus, well_formed, qrels), (well_formed, well_formed, qrels)):
        try:
            task = read_beir(write(folder, *(part or b"\n" for part in parts)))
        except ConfigError:
            continue
        assert task.qrels.keys() == task.queries.keys()
        assert all(score > 0 for answers in task.qrels.values() for score in answers.values())
        ranking = {query: dict.fromkeys(task.documents, 1.0) for query in task.queries}
        assert retrieval_metrics(task.qrels, ranking).keys() == set(METRICS)


@pytest.mark.slow
@settings(max_examples=1000)
@given(file_bytes(tables))
def test_any_sentence_pairs_and_labels_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.tsv"
    write_new(path, content)
    try:
        task = read_sts(path)
        assert len(task.first) == len(task.second) == len(task.scores) >= 2
    except ConfigError:
        pass
    try:
        texts, labels = read_labels(path, "key")
        assert len(texts) == len(labels) >= 2
    except ConfigError:
        pass
