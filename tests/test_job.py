"""Arguments of the jobs: overrides, options, queries and --local-data-dir."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.commands.search import arguments
from pipeline.config import Config, ConfigError, load
from pipeline.config.reading import OTHER_NAMES
from pipeline.core.console import log
from pipeline.core.outcome import Result
from pipeline.job import load_config, parse, parser, run_job

ROOT = Path(__file__).parents[1]
SAID = [  # arguments of train.py, and what the message must name
    (["--epochs", "3"], "training.max_epochs=3"),
    (["--lr=1e-3"], "training.learning_rate=1e-3"),
    (["--max-seq-length", "64"], "tokenizer.max_length=64"),
    (["--training.max_steps=10"], "training.max_steps=10"),
    (["--training.max-steps", "10"], "training.max_steps=10"),
    (["--vocab-size=900"], "tokenizer.vocab_size=900"),
    (["learning_rate=1e-3"], "use training.learning_rate=1e-3"),
    (["learning_rat=1e-3"], "use training.learning_rate=1e-3"),
    (["seed=4"], "data.seed=4 or training.seed=4"),
    (["max_samples=4"], "data.sources.0.max_samples=4"),
    (["batch_size=8"], "training.global_batch_size=8"),
    (["trainig.learning_rate=1"], "argument trainig.learning_rate: trainig: unknown key; did you mean training?"),
    (["training.learning_rat=1"], "argument training.learning_rat: unknown key; did you mean learning_rate?"),
    (["training.seed=x"], "argument training.seed: found 'x'"),
    (["--chek"], "did you mean --check?"),
    (["--nope"], "--help lists"),
    (["nonsense"], "section.key=value"),
]
QUERIES = [  # arguments of search.py, the query, and the overrides
    (["blue bridge"], "blue bridge", []),
    (["blue", "bridge"], "blue bridge", []),
    (["blue", "storage.run=x", "--limit", "3", "bridge"], "blue bridge", ["storage.run=x"]),
    (["training.learning_rate=3e-4 diverges"], "training.learning_rate=3e-4 diverges", []),
    (["storage.run=x", "training.seed=1 fails"], "training.seed=1 fails", ["storage.run=x"]),
    (["os.environ=3"], "os.environ=3", []),
    (["a=b", "is", "it"], "a=b is it", []),
    (["-Wall"], "-Wall", []),
    (["gcc", "-hello", "-Wno-x=1"], "gcc -hello -Wno-x=1", []),
    (["-1"], "-1", []),
    (["--", "--epochs", "3"], "--epochs 3", []),
    (["--", "training.seed=1"], "training.seed=1", []),
    (["--limit", "3", "storage.run=x", "--", "--limit"], "--limit", ["storage.run=x"]),
]


@pytest.mark.parametrize(("argv", "named"), SAID)
def test_a_wrong_argument_names_the_right_one(argv: list[str], named: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(parse(parser("train", ""), argv))
    assert named in str(raised.value)


def test_names_of_other_libraries_lead_to_keys() -> None:
    for key in OTHER_NAMES.values():
        Config().get(key)


@pytest.mark.parametrize(("argv", "query", "overrides"), QUERIES)
def test_words_of_a_search_are_its_query(argv: list[str], query: str, overrides: list[str]) -> None:
    args = parse(arguments(), argv)
    assert (args.query, args.overrides) == (query, overrides)


def test_a_search_without_a_query_or_with_an_unknown_option_says_how_to_write_it() -> None:
    for argv, advice in (
        ([], "found no text to search for"),
        (["training.seed=1"], "-- 'training.seed=1'"),
        (["--wall"], "to search for it, write it after --, as in -- '--wall'"),
        (["\udcff"], "UTF-8"),
    ):
        with pytest.raises(ConfigError, match=advice):
            parse(arguments(), argv)


def sources_of(argv: list[str]) -> list[Any]:
    return [source.model_dump() for source in load_config(parse(parser("prepare", ""), argv)).data.sources]


@pytest.mark.parametrize("option", ["--local-data-dir", "--local_data_dir"])
def test_a_local_folder_changes_only_where_the_source_reads(option: str, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    own = "{name: n, type: text, path: elsewhere, record: paragraph, quality: web, max_samples: 3}"
    config.write_text(f"data: {{sources: [{own}]}}")
    (before,) = load(config).data.sources
    (after,) = sources_of(["--config", str(config), option, str(tmp_path)])
    assert after == before.model_dump() | {"path": str(tmp_path)}


def test_a_local_folder_takes_the_place_of_sources_that_read_no_text_files(tmp_path: Path) -> None:
    (source,) = sources_of(["--local-data-dir", str(tmp_path)])
    assert (source["type"], source["path"], source["record"]) == ("text", str(tmp_path), "file")
    config = tmp_path / "c.yaml"
    config.write_text("data: {sources: [{name: a, type: text, path: a}, {name: b, type: text, path: b}]}")
    with pytest.raises(ConfigError, match="found 2 text sources, a, b"):
        sources_of(["--config", str(config), "--local-data-dir", str(tmp_path)])
    with pytest.raises(ConfigError, match="found no folder at nowhere"):
        sources_of(["--local-data-dir", "nowhere"])


def test_characters_that_the_terminal_lacks_are_replaced() -> None:
    code = """
from pipeline.config import load
from pipeline.core.outcome import Result
from pipeline.job import run_job
import sys
sys.exit(run_job("search", "", lambda config, args: print("café") or Result(), argv=[f"storage.root={sys.argv[1]}"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "/nonexistent"],
        cwd=ROOT,
        env={"PYTHONIOENCODING": "ascii", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "caf?"


@pytest.mark.parametrize(
    "argument",
    [
        "s3://KEY:SECRET@b/x",
        "--lr=s3://KEY:SECRET@b/x",
        "x=[s3://KEY:SECRET/SECRET@b/x",
        "embedding.model=https://user:SECRET@host/x",
        "data.sources=[{path: 's3://KEY:SECRET@b/x', name: s, type: json}]",
        "storage.root=s3://b/x?my_token=SECRET",
        "https://h/x?a=b&signature=SECRET",
        "--local-data-dir=s3://KEY:SECRET@b/x",
        "--config=s3://KEY:SECRET@b/x",
    ],
)
def test_credentials_in_an_argument_are_not_shown(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_job("prepare", "", lambda config, args: Result(), argv=[argument]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("prepare: ")
    assert "SECRET" not in said.out + said.err


def test_credentials_are_not_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def main(config: Config, args: object) -> Result:
        log.warning("reading %s", "s3://KEY:SECRET@b/x?region=r")
        raise OSError("no s3://KEY:SECRET@b/x")

    assert run_job("prepare", "", main, argv=[f"storage.root={tmp_path}"]) == 1
    (file,) = tmp_path.rglob("training.log")
    said = capsys.readouterr().err + file.read_text()
    assert said.count("reading s3://…@b/x?region=r") == 2
    assert "Traceback" in file.read_text()
    assert "SECRET" not in said


WORDS = st.one_of(
    st.text(max_size=20),
    st.from_regex(r"\A-{0,2}[a-z_]{1,9}(\.[a-z_]{1,9}){0,2}=?[\w\[\]{}:., '\"-]{0,12}\Z"),
    st.builds(
        "{}.{}={}".format,
        st.sampled_from(sorted(Config.model_fields)),
        st.sampled_from(["seed", "run", "sources", "sources.0.path", "learning_rate", "root", "uri", "load_path"]),
        st.text(max_size=12),
    ),
)


@pytest.fixture(scope="module")
def small_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of one line, because most of the time of loading one is YAML's."""
    path = tmp_path_factory.mktemp("config") / "c.yaml"
    path.write_text("data: {sources: [{name: s, type: json, path: a.jsonl}]}\n")
    return path


@pytest.mark.slow
@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
@given(words=st.lists(WORDS, max_size=3))
@example(words=["storage.root=a\x00b"])
@example(words=["data.sources.0.path=~nobody/x"])
@example(words=["storage.root=s3://"])
@example(words=["training.seed=" + "[" * 2000])
@example(words=["training.seed=1" + "0" * 5000])
def test_any_arguments_give_a_config_or_a_config_error(small_config: Path, words: list[str]) -> None:
    for own in (parser("train", ""), arguments()):
        with contextlib.suppress(ConfigError):
            args = parse(own, ["--config", str(small_config), *words, "--"])
            load_config(args).dump()


@pytest.mark.slow
@settings(max_examples=1000)
@given(path=st.text(max_size=40))
@example(path="s3://b?region=x&endpoint_override")
@example(path="file://%00")
@example(path="\x00")
def test_any_path_gives_a_config_or_a_config_error(small_config: Path, path: str) -> None:
    for key in ("storage.root", "embedding.uri", "embedding.model", "logging.save_dir", "tokenizer.load_path"):
        with contextlib.suppress(ConfigError):
            config = load(small_config, [f"{key}={path!r}"])
            _ = config.run_dir, config.log_dir, config.under_root(config.embedding.uri or "lancedb")
