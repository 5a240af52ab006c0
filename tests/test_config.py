"""The config tree: precedence, dotted reads, and one sentence for whatever is wrong."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from pipeline.config import Config, ConfigError, load
from pipeline.runtime.job import JobError, Result, alone_in, run_job

SECTIONS = list(Config.model_fields)
NUMBERS = {  # key → values out of its range
    "data.max_bad_fraction": [-0.1, 1.1],
    "data.validation_fraction": [0, 0.5],
    "data.min_chars": [0],
    "tokenizer.vocab_size": [511, 1_000_001],
    "tokenizer.max_length": [1],
    "model.dropout": [-0.1, 1.0],
    "model.norm_eps": [0],
    "objective.contrastive.temperature": [0, 11],
    "training.global_batch_size": [1],
    "training.learning_rate": [0, -1, 11],
    "training.seed": [-1, 2**32],
    "training.max_time_s": [0],
    "checkpointing.every_steps": [0],
    "embedding.batch_tokens": [15, "few"],
    "evaluation.held_out_queries": [-1],
    "scaling.num_workers": [0, -2],
    "scaling.cpus_per_worker": [0],
}
WRONG_TYPES = ["abc", [1], {"a": 1}, True, None, "2024-01-01"]


def _nested(key: str, value: object) -> str:
    tree: object = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return json.dumps(tree)  # JSON is YAML


def wrong_configs() -> list[tuple[str, bytes, list[str]]]:
    """(name, file content, what the sentence must mention)."""
    cases: list[tuple[str, bytes, list[str]]] = [
        ("empty", b"", ["empty"]),
        ("comment only", b"# nothing\n", ["empty"]),
        ("a list", b"- 1\n", ["list"]),
        ("a word", b"word\n", ["word"]),
        ("a number", b"12\n", ["12"]),
        ("unclosed", b"training: [1,\n", ["line"]),
        ("tab", b"training:\n\tseed: 1\n", ["line"]),
        ("bad anchor", b"training: *nowhere\n", ["nowhere"]),
        ("two documents", b"training: {}\n---\nmodel: {}\n", ["line"]),
        ("twice", b"training: {seed: 1}\ntraining: {seed: 2}\n", ["training", "twice"]),
        ("not utf-8", b"\xff\xfe\x00", ["UTF-8"]),
        ("nul", b"training: \x00\n", ["plain YAML"]),
        ("python object", b"training: !!python/object/apply:os.system ['touch /tmp/x']\n", ["line 1"]),
        ("python name", b"!!python/name:os.system\n", ["line 1"]),
        ("bad date", b"training: 2024-13-45\n", ["plain YAML"]),
        ("a tag without a value", b"training: !!int ''\n", ["plain YAML"]),
        ("a tag that does not fit", b"training: !!bool foo\n", ["plain YAML"]),
        ("a key like a type", b"str: 1\n", ["str", "unknown key"]),
        ("a key like a type, inside", b"training: {int: 1}\n", ["training.int", "unknown key"]),
        ("a key with brackets", b"training: {'lr[ms]': 1}\n", ["training.lr[ms]", "unknown key"]),
        ("no format", b"logging: {format: abc}\n", ["logging.format", "abc"]),
        ("a format of nothing", b"logging: {format: '%(nope)s'}\n", ["logging.format", "nope"]),
        ("nan", b"training: {learning_rate: .nan}\n", ["training.learning_rate", "nan"]),
        ("infinite", b"training: {learning_rate: .inf}\n", ["training.learning_rate", "inf"]),
        ("unset variable", b"logging: {save_dir: $NO_SUCH_VARIABLE_1/logs}\n", ["logging.save_dir", "NO_SUCH_VARIABLE_1"]),
        ("unset variable, braces", b"embedding: {uri: '${NO_SUCH_VARIABLE_2}'}\n", ["embedding.uri", "NO_SUCH_VARIABLE_2"]),
        ("root of no bucket's kind", b"storage: {root: 'http://b/k'}\n", ["storage.root", "http://b/k", "s3://bucket"]),
        ("credentials in the root", b"storage: {root: 's3://a:b@c/k'}\n", ["storage.root", "credentials", "environment"]),
        ("no sources", b"data: {sources: []}\n", ["data.sources"]),
        ("source without path", b"data: {sources: [{name: a, type: json}]}\n", ["data.sources.0", "path"]),
        ("source twice", b"data: {sources: [{name: a, type: python_packages}, {name: a, type: python_packages}]}", ["a, a"]),
        ("source of no type", b"data: {sources: [{name: a}]}\n", ["data.sources.0.type"]),
        ("source of wrong type", b"data: {sources: [{name: a, type: xml, path: b}]}\n", ["data.sources.0.type", "xml"]),
        ("half a pair", b"data: {sources: [{name: a, type: json, path: b, fields: {anchor: c}}]}", ["anchor", "positive"]),
        ("odd heads", b"model: {d_model: 100, num_heads: 3}\n", ["model", "100", "3"]),
        ("older name", b"training: {mixed_precision: fp16}\n", ["mixed_precision", "training.precision"]),
        ("older place", b"data: {max_samples: 5}\n", ["max_samples", "data.sources[].max_samples"]),
        ("older place 2", b"tokenizer: {save_dir: x}\n", ["save_dir", "logging.save_dir"]),
        ("older place 3", b"training: {max_checkpoints: 3}\n", ["checkpointing.max_checkpoints"]),
        ("near miss", b"training: {learning_rat: 1.0}\n", ["training.learning_rat", "learning_rate"]),
        ("near section", b"trainning: {}\n", ["trainning", "training"]),
    ]  # fmt: skip
    cases += [(f"{s} null", f"{s}: null\n".encode(), [s, "null"]) for s in SECTIONS]
    cases += [(f"{s} empty value", f"{s}:\n".encode(), [s, "null"]) for s in SECTIONS]
    cases += [(f"{s} list", f"{s}: [1]\n".encode(), [s, "mapping"]) for s in SECTIONS]
    cases += [(f"{s} text", f"{s}: yes please\n".encode(), [s, "yes please"]) for s in SECTIONS]
    cases += [(f"{s} unknown", f"{s}: {{zzz: 1}}\n".encode(), [f"{s}.zzz", "unknown"]) for s in SECTIONS]
    for key, values in NUMBERS.items():
        cases += [(f"{key}={value}", _nested(key, value).encode(), [key, str(value)]) for value in values]
    numeric = [key for key in NUMBERS if key not in ("training.max_time_s", "model.norm_eps")]
    for key, value in itertools.product(numeric, WRONG_TYPES):
        cases.append((f"{key}={value!r}", _nested(key, value).encode(), [key]))
    return cases


CASES = wrong_configs()


def test_there_are_two_hundred() -> None:
    assert len(CASES) >= 200


@pytest.mark.parametrize(("content", "mentions"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_wrong_config_exits_2_with_one_sentence(
    content: bytes, mentions: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(content)

    def main(config: Config, args: object) -> Result:
        raise AssertionError("a wrong config came through")

    code = run_job("train", "", main, argv=["--config", str(file)])
    out, err = capsys.readouterr()
    assert code == 2
    assert "Traceback" not in err
    assert err.strip().count("\n") == 0
    assert "storage.root" in err or str(file) in err
    assert "allowed" in err or "did you mean" in err or "its name here" in err or "stands at" in err
    for mention in mentions:
        assert mention in err
    assert json.loads(out.splitlines()[-1])["status"] == "failed"


@pytest.mark.parametrize(
    "argument",
    ["nonsense", "training=1", "training.seed=[1", "training.seed.x.y=1", ".=1", "--nope", "training.nope=1"],
)
def test_wrong_argument_exits_2(argument: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("training: {seed: 1}\n")
    assert run_job("train", "", lambda config, args: Result(), argv=["--config", str(file), argument]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_planted_constructor_is_not_run(tmp_path: Path) -> None:
    planted = tmp_path / "planted"
    file = tmp_path / "c.yaml"
    file.write_text(
        f"training: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{planted}']]"
    )
    with pytest.raises(ConfigError):
        load(file)
    assert not planted.exists()


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("storage: {root: /from/file}\ntraining: {seed: 1, learning_rate: 1e-3}\n")
    assert load(file, environ={}).storage.root == "/from/file"
    assert load(file, environ={"PIPELINE_STORAGE": "/from/env"}).storage.root == "/from/env"
    overridden = load(
        file, ["storage.root=/from/argument", "training.seed=7"], environ={"PIPELINE_STORAGE": "/from/env"}
    )
    assert overridden.storage.root == "/from/argument"
    assert overridden.get("training.seed") == 7
    assert overridden.get("training.learning_rate") == 0.001  # YAML 1.1 would read 1e-3 as text
    assert overridden.get("training.max_grad_norm") == 1.0  # a default


def test_variables_in_the_root_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMEWHERE", str(tmp_path))
    file = tmp_path / "c.yaml"
    file.write_text("storage: {root: $SOMEWHERE/store}\n")
    assert load(file, environ={}).storage.root == str(tmp_path / "store")
    file.write_text("storage: {root: $NO_SUCH_VARIABLE_3/store}\n")
    with pytest.raises(ConfigError, match="NO_SUCH_VARIABLE_3"):
        load(file, environ={})


def test_a_last_line_without_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"storage: {{root: '{tmp_path}'}}\n")
    metrics = {"loss": float("nan"), "all": [{"x": float("inf")}]}
    assert run_job("train", "", lambda config, args: Result(metrics), argv=["--config", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == {"loss": None, "all": [{"x": None}]}


def test_what_a_signal_leaves_half_made_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As one of Ray's datasets whose destructor looks for what its constructor had not come to."""

    class Half:
        def __init__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

        def __del__(self) -> None:
            raise AttributeError("the other half")

    (tmp_path / "c.yaml").write_text(f"storage: {{root: '{tmp_path}'}}\nlogging: {{level: DEBUG}}\n")
    hook = sys.unraisablehook
    code = run_job(
        "train", "", lambda config, args: Result({"half": Half()}), argv=["--config", str(tmp_path / "c.yaml")]
    )
    said = capsys.readouterr().err
    assert (code, sys.unraisablehook) == (130, hook)
    assert "the other half" in said
    assert "Traceback" not in said


def test_a_job_holds_its_folder_alone(tmp_path: Path) -> None:
    with alone_in(tmp_path), pytest.raises(JobError, match="another job is at work"), alone_in(tmp_path):
        pass
    with alone_in(tmp_path):
        pass


def test_an_argument_can_change_an_item_of_a_list(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("data: {sources: [{name: a, type: json, path: x}]}\n")
    assert load(file, ["data.sources.0.path=y"]).data.sources[0].path == "y"
    for wrong in ("data.sources.1.path=y", "data.sources.path=y", "data.sources.0.path.z=y"):
        with pytest.raises(ConfigError, match="allowed is a key that is there"):
            load(file, [wrong])


def test_dotted_read_of_nothing_names_it(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("training: {}\n")
    with pytest.raises(KeyError, match=r"training\.nothing"):
        load(file).get("training.nothing")


def test_resolved_config_loads_again(tmp_path: Path) -> None:
    import yaml

    file, resolved = tmp_path / "c.yaml", tmp_path / "resolved.yaml"
    file.write_text("training: {learning_rate: 1e-4}\nmodel: {size: base, num_layers: 3}\n")
    config = load(file)
    resolved.write_text(yaml.safe_dump(config.dump()))
    assert load(resolved) == config


def test_every_field_has_a_docstring() -> None:
    def check(section: type, path: str) -> None:
        for name, field in section.model_fields.items():  # type: ignore[attr-defined]
            inner = field.annotation
            if isinstance(inner, type) and hasattr(inner, "model_fields"):
                check(inner, f"{path}{name}.")
            elif path:
                assert field.description, f"{path}{name} has no docstring"

    check(Config, "")


@pytest.mark.parametrize("file", sorted(Path(__file__).parents[1].glob("configs/*.yaml")), ids=lambda f: f.name)
def test_shipped_configs_load(file: Path) -> None:
    assert load(file)
