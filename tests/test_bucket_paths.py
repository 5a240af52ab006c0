"""Paths in buckets, and what stands on them: copies on this machine, mirrors, locks, a root that cannot be reached."""

from __future__ import annotations

import json
import os
import pickle
import random
import ssl
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from unittest.mock import patch

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pyarrow import fs

from pipeline.config import ConfigError, load
from pipeline.core import mirror
from pipeline.core.arrow import arrow_location
from pipeline.core.files import (
    file_sizes,
    link_or_copy,
    local_copy,
    remove_folder,
    replacing,
    scratch,
    write_atomically,
)
from pipeline.core.object_store import BucketError
from pipeline.core.path import BucketPath, as_path
from pipeline.data.tokenizer import load_tokenizer, train_tokenizer
from pipeline.evaluation.export import exporting
from pipeline.evaluation.tasks import check_beir, open_beir
from pipeline.job import check_reachable
from pipeline.model.scores import read_sts
from pipeline.stages import check_writable
from tests.bucket_servers import CREDENTIALS, NOBODY, Forbidding, Served, answering, give_up_at_once, s3, serving


@pytest.fixture(scope="module", params=["s3", "gs", "az"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(request.param, "store", tmp_path_factory.mktemp("served")) as server:
        yield server


@pytest.fixture
def root(served: Served, request: pytest.FixtureRequest) -> BucketPath:
    """A folder of the test's own."""
    found = as_path(served.uri(request.node.name.partition("[")[0]))
    assert isinstance(found, BucketPath)
    return found


@pytest.fixture(autouse=True)
def own_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_a_path_says_what_it_is_and_comes_back(root: BucketPath) -> None:
    path = root / "runs" / "r.json"
    assert as_path(str(path)) == path == pickle.loads(pickle.dumps(path))
    assert (path.name, path.stem, path.parent.name, path.parent.parent) == ("r.json", "r", "runs", root)
    with pytest.raises(TypeError):
        os.fspath(path)  # type: ignore[call-overload]  # or `open` would write to a folder `s3:` on disk
    assert as_path("a/b") == Path("a/b")


def test_what_pathlib_says_of_a_folder_is_said_of_a_bucket(root: BucketPath, tmp_path: Path) -> None:
    names = ["a/step-01/x", "a/step-02/y", "a/step-02/deep/z", "a/other", "b/step-03/x", "c.json"]
    disk = tmp_path / "disk"
    for name in names:
        (disk / name).parent.mkdir(parents=True, exist_ok=True)
        (disk / name).write_bytes(name.encode())
        (root / name).write_bytes(name.encode())
    for pattern in ("*", "a/*", "*/step-[0-9]*", "*/step-0[12]/x", "a/step-02", "nothing/*", "c.*", "a/nothing"):
        expected = {str(path).removeprefix(str(disk)) for path in disk.glob(pattern)}
        assert {path.key.removeprefix(root.key) for path in root.glob(pattern)} == expected, pattern
    for name in ("a", "a/other", "c.json", "nothing", "a/step-02/deep", "a/st"):
        found, expected = root / name, disk / name
        for ask in ("exists", "is_file", "is_dir"):
            assert getattr(found, ask)() == getattr(expected, ask)(), (name, ask)
    assert list(root.files()) == sorted(names)
    assert file_sizes([root / "c.json", root / "nothing", disk / "c.json", root / "a/step-01/x"]) == [6, None, 6, 11]
    remove_folder(root / "a")
    remove_folder(root / "nothing")
    assert list(root.files()) == ["b/step-03/x", "c.json"]
    assert [path.name for path in root.iterdir()] == ["b", "c.json"]


def test_objects_that_stand_for_folders_are_no_files(served: Served, root: BucketPath) -> None:
    """As consoles of S3 make them."""
    if served.scheme != "s3":
        pytest.skip("S3's consoles")
    for key in ("m/", "m/1_Pooling/", "m/1_Pooling/config.json", "m/model"):
        served.write(f"{root.key}/{key}", b"" if key.endswith("/") else b"x")
    assert (root / "m").files().keys() == {"1_Pooling/config.json", "model"}
    assert (local_copy(root / "m") / "1_Pooling/config.json").read_bytes() == b"x"


def test_missing_objects_are_missing_files(root: BucketPath) -> None:
    for read in (root.read_bytes, root.stat, root.unlink, lambda: root.open()):
        with pytest.raises(FileNotFoundError):
            read()
    root.unlink(missing_ok=True)


@pytest.mark.parametrize("size", [0, 1, 10 << 20, 17 << 20])
def test_bytes_come_back(size: int, root: BucketPath, served: Served, tmp_path: Path) -> None:
    """Whatever they are sent as: one request or several parts."""
    data = random.Random(size).randbytes(size)
    write_atomically(root / "written", data)
    with replacing(root / "replaced") as temporary:
        temporary.write_bytes(data)
    link_or_copy(root / "replaced", root / "copied")
    (tmp_path / "disk").write_bytes(data)
    link_or_copy(tmp_path / "disk", root / "placed")
    prefix = root.key.removeprefix("store/")
    assert all(served.read(f"{prefix}/{name}") == data for name in ("written", "replaced", "copied", "placed"))
    (root / "placed").download(tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data == (root / "copied").read_bytes()
    assert not list(scratch().iterdir())


def test_what_fails_is_not_put_in_place(root: BucketPath) -> None:
    with suppress(KeyError), replacing(root / "x") as temporary:
        temporary.write_bytes(b"half")
        raise KeyError
    assert not (root / "x").exists()


def test_a_folder_is_fetched_once_and_again_when_it_changed(root: BucketPath, tmp_path: Path) -> None:
    for name in ("a", "deep/b"):
        (root / "m" / name).write_bytes(name.encode())
    first = local_copy(root / "m")
    assert first.name == "m"
    assert {path.relative_to(first).as_posix() for path in first.rglob("*") if path.is_file()} == {"a", "deep/b"}
    with patch.object(BucketPath, "download", side_effect=AssertionError("it is there")):
        assert local_copy(root / "m") == first
    (root / "m" / "a").write_bytes(b"another")
    assert (local_copy(root / "m") / "a").read_bytes() == b"another"
    assert (first / "a").read_bytes() == b"a"  # who reads it still does
    os.utime(first.parent, (0, 0))
    (root / "m" / "a").write_bytes(b"of another size")
    local_copy(root / "m")
    assert not first.exists()
    assert stat.S_IMODE(scratch().stat().st_mode) == 0o700
    assert local_copy(tmp_path) == tmp_path


def test_what_reads_a_file_or_a_folder_reads_one_in_a_bucket(root: BucketPath) -> None:
    """Evaluation data and tokenizers: names, bytes and lines are those of a disk."""
    documents = [{"_id": f"d{i}", "text": f"text number {i}"} for i in range(3)]
    (root / "beir/corpus.jsonl").write_bytes("".join(json.dumps(row) + "\n" for row in documents).encode())
    (root / "beir/queries.jsonl").write_bytes(b'{"_id": "q", "text": "which one?"}\n')
    (root / "beir/qrels/test.tsv").write_bytes(b"query-id\tcorpus-id\tscore\nq\td1\t1\n")
    check_beir(root / "beir")
    task = open_beir(root / "beir")
    assert task.queries == {"q": "which one?"}
    assert dict(task.documents.items()) == {row["_id"]: row["text"] for row in documents}
    (root / "sts.tsv").write_bytes(b"score\tsentence1\tsentence2\n4.5\ta\tb\n1\tc\td\n2\te\tf\n")
    assert read_sts(root / "sts.tsv").scores == [4.5, 1, 2]
    trained = train_tokenizer(["one two three"] * 9, kind="bpe", vocab_size=300, lowercase=False)
    (root / "tokenizer/tokenizer.json").write_bytes(trained.to_str().encode())
    assert load_tokenizer(root / "tokenizer").get_vocab() == trained.get_vocab()
    assert local_copy(root / "sts.tsv").name == "sts.tsv"
    with pytest.raises(FileNotFoundError):
        local_copy(root / "nothing")


def test_an_export_in_a_bucket_takes_the_place_of_an_earlier_one_alone(root: BucketPath) -> None:
    for names in (("a", "deep/b"), ("a", "c")):
        with exporting(root / "to", "export.json", {"version": 1}) as folder:
            for name in names:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(name)
        assert root.files().keys() == {f"to/{name}" for name in (*names, "export.json")}
        assert (root / "to" / names[1]).read_text() == names[1]
    lost = patch.object(BucketPath, "unlink", side_effect=BucketError("lost"))
    with pytest.raises(BucketError), lost, exporting(root / "to", "export.json", {"version": 1}) as folder:
        (folder / "d").write_text("d")
    assert json.loads((root / "to/export.json").read_text())["unfinished"]
    with exporting(root / "to", "export.json", {"version": 1}) as folder:
        (folder / "d").write_text("d")
    assert root.files().keys() == {"to/d", "to/export.json"}
    assert "unfinished" not in json.loads((root / "to/export.json").read_text())
    (root / "to" / "mine").write_bytes(b"")
    with (
        pytest.raises(ConfigError, match=r"holds mine, which no export wrote"),
        exporting(root / "to", "export.json", {}),
    ):
        pytest.fail("it is not ours alone")


def test_as_a_filesystem_of_pyarrow_it_answers_as_a_disk_does(root: BucketPath, tmp_path: Path) -> None:
    """In what Ray asks of it."""
    place, in_bucket = arrow_location(root)
    disk, in_bucket = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), pickle.loads(pickle.dumps(in_bucket))
    for system, home in ((disk, "home"), (in_bucket, f"{place}/home")):
        for name, size in (("a/x", 3), ("a/deep/y", 9 << 20), ("b", 0)):
            system.create_dir(f"{home}/{name}".rpartition("/")[0])
            with system.open_output_stream(f"{home}/{name}") as file:
                file.write(b"x" * size)
    for name in ("home", "home/a", "home/a/x", "home/none", "home/b"):
        found, expected = in_bucket.get_file_info(f"{place}/{name}"), disk.get_file_info(name)
        assert (found.type, found.size) == (expected.type, expected.size), name

    def listed(system: fs.FileSystem, home: str, recursive: bool) -> set[tuple[str, str]]:
        infos = system.get_file_info(fs.FileSelector(home, recursive=recursive))
        return {(info.path[len(home) :], info.type.name) for info in infos}

    for recursive in (False, True):
        assert listed(in_bucket, f"{place}/home", recursive) == listed(disk, "home", recursive)
    with in_bucket.open_input_file(f"{place}/home/a/x") as file:
        assert file.read() == b"xxx"
    fs.copy_files(f"{place}/home", str(tmp_path / "copied"), source_filesystem=in_bucket)
    assert (tmp_path / "copied/a/deep/y").stat().st_size == 9 << 20
    fs.copy_files(str(tmp_path / "copied"), f"{place}/back", destination_filesystem=in_bucket)
    assert root.files().keys() == {f"{top}/{name}" for top in ("home", "back") for name in ("a/x", "a/deep/y", "b")}
    in_bucket.move(f"{place}/home/b", f"{place}/home/c")
    in_bucket.delete_dir(f"{place}/home/a")
    in_bucket.delete_dir(f"{place}/back")
    assert root.files().keys() == {"home/c"}
    with pytest.raises(FileNotFoundError):
        in_bucket.get_file_info(fs.FileSelector(f"{place}/none"))


def test_a_mirror_sends_what_grows(root: BucketPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "SEND_EVERY_S", 0.01)
    (root / "metrics.jsonl").write_bytes(b"1\n")
    found = mirror.Mirror(root, ["metrics.jsonl", "alerts.jsonl"])
    assert (found.folder / "metrics.jsonl").read_bytes() == b"1\n"
    with (found.folder / "metrics.jsonl").open("a") as file:
        file.write("2\n")
    (found.folder / "deep").mkdir()
    (found.folder / "deep" / "events").write_bytes(b"x")
    (found.folder / "half.tmp").write_bytes(b"x")
    while not ((root / "deep/events").is_file() and (root / "metrics.jsonl").read_bytes() == b"1\n2\n"):
        time.sleep(0.01)
    (found.folder / "last").write_bytes(b"y")
    found.close()
    assert list(root.files()) == ["deep/events", "last", "metrics.jsonl"]
    assert not found.folder.exists()


def config_file(tmp_path: Path) -> Path:
    (tmp_path / "c.yaml").write_text("{}")
    return tmp_path / "c.yaml"


@pytest.mark.parametrize(
    "key",
    [
        *("embedding.uri", "embedding.model", "tokenizer.load_path", "model.pretrained", "logging.save_dir"),
        *("evaluation.beir_dir", "evaluation.sts_file", "data.decontaminate.0", "data.sources.0.path"),
    ],
)
def test_credentials_are_refused_whatever_the_key(key: str, tmp_path: Path) -> None:
    source = {"name": "s", "type": "json", "path": "x"}
    arguments = [f"data.sources=[{json.dumps(source)}]", "data.decontaminate=[x]"]
    for value in ("s3://KEY:hunter2@b/x", "az://b/x?sig=hunter2"):
        with pytest.raises(ConfigError, match=r"found credentials in a URI of (s3|az)://") as refused:
            load(config_file(tmp_path), [*arguments, f"{key}={value}"], environ={})
        assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    "uri",
    ["s3://AKIAX:hunter2@b/p", "gs://hunter2@b/p", "s3://b/p?secret_key=hunter2", "s3://b?x=y&session_token=hunter2"],
)
def test_credentials_are_refused_and_not_repeated(uri: str, tmp_path: Path) -> None:
    for arguments, environ in (([f"storage.root={uri}"], {}), ([], {"PIPELINE_STORAGE": uri})):
        with pytest.raises(ConfigError, match=r"^storage\.root: found credentials in a URI") as refused:
            load(config_file(tmp_path), arguments, environ=environ)
        assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("uri", ["s3://", "s3:///x", "http://bucket/x", "hdfs://host/x", "s3://b/x?regio=here"])
def test_what_is_no_bucket_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^storage\.root: found .*; allowed is a path on disk, s3://bucket"):
        load(config_file(tmp_path), [f"storage.root={uri}"], environ={})


def test_folders_under_a_root_in_a_bucket(tmp_path: Path) -> None:
    config = load(config_file(tmp_path), ["storage.root=gs://b/p/?anonymous=true", "storage.run=r"], environ={})
    assert str(config.run_dir) == "gs://b/p/runs/r?anonymous=true"
    assert str(config.log_dir) == str(config.run_dir)
    assert config.under_root("/logs") == Path("/logs")
    assert str(config.under_root("s3://other/logs")) == "s3://other/logs"
    local = load(config_file(tmp_path), [f"storage.root={tmp_path}", "logging.save_dir=logs"], environ={})
    assert (local.root, local.log_dir) == (tmp_path, tmp_path / "logs")


def test_a_root_that_cannot_be_reached_is_one_sentence(tmp_path: Path) -> None:
    def refused(uri: str) -> str:
        config = load(config_file(tmp_path), [f"storage.root={uri}"], environ={})
        with pytest.raises(ConfigError) as error:
            check_reachable(config)
        assert "\n" not in str(error.value)
        assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in str(error.value)
        return str(error.value)

    with s3("store") as served:
        check_writable(load(config_file(tmp_path), [f"storage.root={served.uri('x')}"], environ={}))
        assert served.keys("x/") == []
        elsewhere = refused(f"s3://elsewhere/x{served.options}")
        assert elsewhere.startswith("storage.root: found no way into s3://elsewhere/x (404 Not Found, NoSuchBucket)")
    no_way = "storage.root: found no way into s3://store/x ("
    with pytest.MonkeyPatch.context() as monkeypatch:
        give_up_at_once(monkeypatch)
        assert refused(f"s3://store/x{NOBODY}").startswith(f"{no_way}Connection refused)")
    with answering(Forbidding) as options:
        found = refused(f"s3://store/x{options}")
        assert found.startswith(f"{no_way}403 Forbidden)")
        assert "credentials in the environment" in found


class ReadOnly(Forbidding):
    def do_HEAD(self) -> None:
        self.do_GET(200)


def test_a_root_that_may_only_be_read_is_refused_to_jobs_that_write(tmp_path: Path) -> None:
    with answering(ReadOnly) as options:
        config = load(config_file(tmp_path), [f"storage.root=s3://store/x{options}"], environ={})
        check_reachable(config)
        with pytest.raises(ConfigError, match=r"^storage\.root: found no way into s3://store/x/.* \(403 Forbidden"):
            check_writable(config)


def test_a_bucket_that_goes_away_is_no_missing_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that cannot be read for want of a network must not count as one that is broken."""
    give_up_at_once(monkeypatch)
    with s3("gone") as other:
        path = as_path(other.uri("x"))
    assert isinstance(path, BucketPath)
    for read in (path.read_bytes, path.files):
        with pytest.raises(BucketError, match=r"^found no way into s3://gone/x \(Connection refused\)"):
            read()
    assert not isinstance(BucketError(""), OSError)


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_up_at_once(monkeypatch)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    today = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, today - timedelta(days=1), today + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption(), serialization.PrivateFormat.PKCS8
    (tmp_path / "own.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, plain[1], plain[0])
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "own.pem")
    with answering(ReadOnly, context) as options:
        path = as_path(f"s3://store/x{options.replace('scheme=http&', '')}")
        with pytest.raises(BucketError, match=r"^found no way into s3://store/x \(.*certificate.*\); "):
            path.read_bytes()
