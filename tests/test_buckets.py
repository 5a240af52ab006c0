"""Sources in buckets: S3 against moto, GCS against a small server, over real sockets on 127.0.0.1."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import pytest

from pipeline.config import ConfigError, Source
from pipeline.core.outcome import JobError
from pipeline.data import sources
from pipeline.data.sources import check_fields, plan_source, read
from tests.bucket_servers import NOBODY, Forbidding, Served, answering, give_up_at_once, s3, serving
from tests.test_sources import FORMATS, ROWS, all_records, as_csv, as_lines, as_parquet, compressed

OBJECTS = {
    "pages/a.jsonl": as_lines(ROWS),
    "pages/b.jsonl.gz": gzip.compress(as_lines(ROWS)),
    "pages/deep/c.ndjson.zst": compressed(as_lines(ROWS), ".zst"),
    "pages/d.csv": as_csv(ROWS),
    "pages/e.parquet": as_parquet(ROWS),
    "pages/f.arrow.gz": gzip.compress(FORMATS["a.arrow"][1]),
    "pages/.hidden/g.jsonl": as_lines(ROWS),
    "pages/cut.json.gz": gzip.compress(as_lines(ROWS))[:-4],
}
KINDS = {"pages/d.csv": "csv", "pages/e.parquet": "parquet", "pages/f.arrow.gz": "arrow"}


@pytest.fixture(scope="module", params=["s3", "gs", "az"])
def bucket(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(request.param, "corpus", tmp_path_factory.mktemp("served")) as served:
        for key, data in OBJECTS.items():
            served.write(key, data)
        yield served


def source_at(bucket: Served, path: str, kind: str = "json") -> Source:
    return Source(name="s", type=kind, path=bucket.uri(path))


@pytest.mark.parametrize("key", [key for key in OBJECTS if "hidden" not in key and "cut" not in key])
@pytest.mark.parametrize("task_bytes", [4 << 20, 500])
def test_objects_are_read_like_files(key: str, task_bytes: int, bucket: Served) -> None:
    source = source_at(bucket, key, KINDS.get(key, "json"))
    with patch.object(sources, "TASK_BYTES", task_bytes):
        check_fields(source)
        found, tasks = all_records(source), plan_source(source).tasks
    assert [{"id": record.native_id, **record.fields} for record in found] == ROWS
    assert len(tasks) > 4 or task_bytes > 500 or not key.endswith((".jsonl", ".parquet"))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("pages", ["a.jsonl", "b.jsonl.gz", "cut.json.gz", "deep/c.ndjson.zst"]),
        ("pages/", ["a.jsonl", "b.jsonl.gz", "cut.json.gz", "deep/c.ndjson.zst"]),
        ("", [f"pages/{name}" for name in ("a.jsonl", "b.jsonl.gz", "cut.json.gz", "deep/c.ndjson.zst")]),
        ("pages/*.jsonl*", ["a.jsonl", "b.jsonl.gz"]),
        ("*/[ab].jsonl", ["pages/a.jsonl"]),
        ("pages/**/*.zst", ["deep/c.ndjson.zst"]),
        ("pages/a.jsonl", ["a.jsonl"]),
    ],
)
def test_paths_folders_and_globs(path: str, expected: list[str], bucket: Served) -> None:
    plan = plan_source(source_at(bucket, path))
    assert [name for name, _, _ in plan.inputs] == expected
    assert all(changed > 0 for _, _, changed in plan.inputs)
    sizes = {key.rpartition("/")[2]: len(data) for key, data in OBJECTS.items()}
    assert [size for _, size, _ in plan.inputs] == [sizes[name.rpartition("/")[2]] for name in expected]


def test_a_truncated_object_is_a_record_and_no_failure(bucket: Served) -> None:
    reasons = [record.reason for record in all_records(source_at(bucket, "pages/cut.json.gz"))]
    assert reasons == [None] * len(ROWS) + ["unreadable_file"]


@pytest.mark.parametrize("path", ["nothing", "nothing/*.jsonl", "pages/a.json"])
def test_a_path_with_nothing_in_it_is_refused(path: str, bucket: Served) -> None:
    with pytest.raises(
        ConfigError, match=rf"^data.sources s: found nothing to read at {bucket.scheme}://corpus/[^?]*;"
    ):
        plan_source(source_at(bucket, path))


def test_a_bucket_that_is_not_there_is_refused(bucket: Served) -> None:
    with pytest.raises(
        ConfigError, match=r"^data.sources s: found no way into (s3|gs|az)://elsewhere/x \(404 Not Found"
    ):
        plan_source(source_at(replace(bucket, bucket="elsewhere"), "x"))


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_public_data_needs_no_credentials(bucket: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    public = replace(bucket, options=f"{bucket.options}&anonymous=true")
    assert len(all_records(source_at(public, "pages/a.jsonl"))) == len(ROWS)


def test_an_option_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="found the option 'regio' at s3://"):
        plan_source(Source(name="s", type="json", path="s3://corpus/x?regio=here"))


def test_a_server_that_does_not_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    give_up_at_once(monkeypatch)
    source = Source(name="s", type="json", path=f"s3://corpus/pages{NOBODY}")
    words = r"^data.sources s: found no way into s3://corpus/pages \(Connection refused"
    with pytest.raises(ConfigError, match=words) as refused:
        plan_source(source)
    assert "\n" not in str(refused.value)


def test_wrong_credentials_are_refused() -> None:
    words = r"found no way into s3://corpus/x \(403 Forbidden.*credentials"
    with answering(Forbidding) as options, pytest.raises(ConfigError, match=words):
        plan_source(Source(name="s", type="json", path=f"s3://corpus/x{options}"))


def test_a_server_that_goes_away_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lost on the way is no bad input: another try reads it, so it must not be counted and left out."""
    give_up_at_once(monkeypatch)
    with s3("corpus") as served:
        served.write("a.jsonl", as_lines(ROWS))
        source = source_at(served, "a.jsonl")
        task = plan_source(source).tasks[0]
    with pytest.raises(JobError, match=r"^source s: cannot read a.jsonl: Connection refused"):
        list(read(task, source))
