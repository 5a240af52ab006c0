"""Sources in buckets: S3 against moto, GCS against a small server, over real sockets on 127.0.0.1."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.config import ConfigError, Source
from pipeline.runtime.job import JobError
from pipeline.sources import filesystem
from pipeline.sources import source as sources
from pipeline.sources.source import check_fields, plan_source, read
from tests import bucket_servers
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


@contextmanager
def s3() -> Iterator[str]:
    """The options of a bucket URI that lead to a server with OBJECTS in the bucket `corpus`."""
    with bucket_servers.s3("corpus") as served:
        for key, data in OBJECTS.items():
            served.write(key, data)
        yield served.options


@contextmanager
def gcs(folder: Path) -> Iterator[str]:
    with bucket_servers.gcs("corpus", folder) as served:
        for key, data in OBJECTS.items():
            served.write(key, data)
        yield served.options


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """What stands before and after a path in a bucket's URI."""
    if request.param == "s3":
        with s3() as options:
            yield "s3://corpus", options
    else:
        with gcs(tmp_path_factory.mktemp("gcs")) as options:
            yield "gs://corpus", options


def source_at(bucket: tuple[str, str], path: str, kind: str = "json") -> Source:
    return Source(name="s", type=kind, path=f"{bucket[0]}{path}{bucket[1]}")


@pytest.mark.parametrize("key", [key for key in OBJECTS if "hidden" not in key and "cut" not in key])
@pytest.mark.parametrize("task_bytes", [4 << 20, 500])
def test_objects_are_read_like_files(
    key: str, task_bytes: int, bucket: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "TASK_BYTES", task_bytes)
    source = source_at(bucket, f"/{key}", KINDS.get(key, "json"))
    check_fields(source)
    found = all_records(source)
    assert [{"id": record.native_id, **record.fields} for record in found] == ROWS
    splittable = key.endswith((".jsonl", ".parquet"))
    assert len(plan_source(source).tasks) > 4 or task_bytes > 500 or not splittable


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/pages", ["a.jsonl", "b.jsonl.gz", "cut.json.gz", "deep/c.ndjson.zst"]),
        ("/pages/", ["a.jsonl", "b.jsonl.gz", "cut.json.gz", "deep/c.ndjson.zst"]),
        ("", [f"pages/{name}" for name in ("a.jsonl", "b.jsonl.gz", "cut.json.gz", "deep/c.ndjson.zst")]),
        ("/pages/*.jsonl*", ["a.jsonl", "b.jsonl.gz"]),
        ("/*/[ab].jsonl", ["pages/a.jsonl"]),
        ("/pages/**/*.zst", ["deep/c.ndjson.zst"]),
        ("/pages/a.jsonl", ["a.jsonl"]),
    ],
)
def test_paths_folders_and_globs(path: str, expected: list[str], bucket: tuple[str, str]) -> None:
    plan = plan_source(source_at(bucket, path))
    assert [name for name, _, _ in plan.inputs] == expected
    assert all(changed > 0 for _, _, changed in plan.inputs)
    sizes = {key.rpartition("/")[2]: len(data) for key, data in OBJECTS.items()}
    assert [size for _, size, _ in plan.inputs] == [sizes[name.rpartition("/")[2]] for name in expected]


def test_a_truncated_object_is_a_record_and_no_failure(bucket: tuple[str, str]) -> None:
    reasons = [record.reason for record in all_records(source_at(bucket, "/pages/cut.json.gz"))]
    assert reasons == [None] * len(ROWS) + ["unreadable_file"]


@pytest.mark.parametrize("path", ["/nothing", "/nothing/*.jsonl", "/pages/a.json"])
def test_a_path_with_nothing_in_it_is_refused(path: str, bucket: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=rf"^data.sources s: found nothing to read at {bucket[0]}/[^?]*;"):
        plan_source(source_at(bucket, path))


def test_a_bucket_that_is_not_there_is_refused(bucket: tuple[str, str]) -> None:
    missing = bucket[0].replace("corpus", "elsewhere")
    with pytest.raises(ConfigError, match=r"^data.sources s: found no bucket elsewhere at (s3|gs)://elsewhere/x;"):
        plan_source(source_at((missing, bucket[1]), "/x"))


def test_public_data_needs_no_credentials() -> None:
    with s3() as options, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        assert len(all_records(source_at(("s3://corpus", f"{options}&anonymous=true"), "/pages/a.jsonl"))) == len(ROWS)


def test_an_option_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="Unexpected query parameter in S3 URI: 'regio'"):
        plan_source(Source(name="s", type="json", path="s3://corpus/x?regio=here"))


@pytest.mark.timeout(60)  # pyarrow gives up after six seconds; of GCS it would try for a quarter of an hour
def test_a_server_that_does_not_answer_is_refused() -> None:
    where = "?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:1"
    source = Source(name="s", type="json", path=f"s3://corpus/pages{where}")
    with pytest.raises(
        ConfigError, match=r"^data.sources s: found no way into s3://corpus/pages \(AWS Error"
    ) as refused:
        plan_source(source)
    assert "\n" not in str(refused.value)


class Forbidding(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


def test_wrong_credentials_are_refused() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Forbidding)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    where = f"?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:{server.server_address[1]}"
    try:
        with pytest.raises(
            ConfigError, match=r"found no way into s3://corpus/x \(AWS Error ACCESS_DENIED .*credentials"
        ):
            plan_source(Source(name="s", type="json", path=f"s3://corpus/x{where}"))
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.timeout(60)
def test_a_server_that_goes_away_stops_the_run() -> None:
    """What is lost on the way is no bad input: another try reads it, so it must not be counted and left out."""
    with s3() as options:
        source = source_at(("s3://corpus", options), "/pages/a.jsonl")
        task = plan_source(source).tasks[0]
    with pytest.raises(JobError, match=r"^source s: a.jsonl could not be read: AWS Error NETWORK_CONNECTION"):
        list(read(task, source))


def test_gs_is_google_cloud_storage() -> None:
    place = filesystem._place("gs://corpus/pages/*.jsonl?anonymous=true")
    assert place.path == "corpus/pages/*.jsonl"
    assert filesystem._filesystem(place).type_name == "gcs"
