"""The config tree: precedence, dotted reads, and one sentence for whatever is wrong."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.config import Config, ConfigError, load
from pipeline.core.outcome import JobError, Result, job_lock
from pipeline.job import run_job

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
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a config file of this content."""

    def write(text: str) -> Path:
        (tmp_path / "c.yaml").write_text(text + "\n")
        return tmp_path / "c.yaml"

    return write


# content of a file, and what the sentence must mention
WRONG: list[tuple[str, ...]] = [
    ("", "empty"),
    ("# nothing", "empty"),
    ("- 1", "list"),
    ("word", "word"),
    ("12", "12"),
    ("training: [1,", "line"),
    ("training:\n\tseed: 1", "line"),
    ("training: *nowhere", "nowhere"),
    ("training: {}\n---\nmodel: {}", "line"),
    ("training: {seed: 1}\ntraining: {seed: 2}", "training", "duplicate"),
    ("\xff\xfe\x00", "UTF-8"),
    ("training: \x00", "plain YAML"),
    ("training: !!python/object/apply:os.system ['touch /tmp/x']", "line 1"),
    ("!!python/name:os.system", "line 1"),
    ("training: 2024-13-45", "plain YAML"),
    ("training: !!int ''", "plain YAML"),
    ("training: !!bool foo", "plain YAML"),
    ("str: 1", "str", "unknown key"),  # a type of Python's, as pydantic names the members of unions
    ("training: {int: 1}", "training.int", "unknown key"),
    ("training: {'lr[ms]': 1}", "training.lr[ms]", "unknown key"),
    ("logging: {format: abc}", "logging.format", "abc"),
    ("logging: {format: '%(nope)s'}", "logging.format", "nope"),
    ("training: {learning_rate: .nan}", "training.learning_rate", "nan"),
    ("training: {learning_rate: .inf}", "training.learning_rate", "inf"),
    ("storage: {root: $NO_SUCH_VARIABLE_1/store}", "NO_SUCH_VARIABLE_1"),
    ("logging: {save_dir: $NO_SUCH_VARIABLE_2/logs}", "logging.save_dir", "NO_SUCH_VARIABLE_2"),
    ("embedding: {uri: '${NO_SUCH_VARIABLE_3}'}", "embedding.uri", "NO_SUCH_VARIABLE_3"),
    ("storage: {root: 'http://b/k'}", "storage.root", "http://b/k", "s3://bucket"),
    ("storage: {root: 's3://a:b@c/k'}", "storage.root", "credentials", "environment"),
    ("data: {sources: []}", "data.sources"),
    ("data: {sources: [{name: a, type: json}]}", "data.sources.0", "path"),
    ("data: {sources: [{name: a, type: python_packages}, {name: a, type: python_packages}]}", "a, a"),
    ("data: {sources: [{name: a}]}", "data.sources.0.type"),
    ("data: {sources: [{name: a, type: xml, path: b}]}", "data.sources.0.type", "xml"),
    ("data: {sources: [{name: a, type: json, path: b, fields: {anchor: c}}]}", "anchor", "positive"),
    ("data: {sources: [{name: a, type: json, path: b, pairs: heading}]}", "`pairs` only on sources of type text"),
    (
        "data: {sources: [{name: a, type: text, path: b, pairs: heading, record: line}]}",
        "`pairs` only with record=file",
    ),
    ("data: {sources: [{name: a, type: text, path: b, pairs: titles}]}", "'heading' or 'neighbours'"),
    ("model: {d_model: 100, num_heads: 3}", "model", "100", "3"),
    ("training: {mixed_precision: fp16}", "mixed_precision", "training.precision"),
    ("objective: {contrastive: {views: crop}}", "objective.contrastive.views", "crop", "'given', 'crops' or 'dropout'"),
    ("objective: {contrastive: {views: dropout}}", "objective.contrastive.views", "model.dropout=0.1"),
    ("{objective: {contrastive: {views: dropout}}, model: {dropout: 0.1, num_layers: 0}}", "model.num_layers=1"),
    (
        "{objective: {contrastive: {views: dropout}}, model: {dropout: 0.1}, training: {table_warmup_fraction: 0.5}}",
        "training.table_warmup_fraction=0.5",
        "training.table_warmup_fraction=0 ",
    ),
    ("data: {max_samples: 5}", "max_samples", "data.sources[].max_samples"),
    ("tokenizer: {save_dir: x}", "save_dir", "logging.save_dir"),
    ("training: {max_checkpoints: 3}", "checkpointing.max_checkpoints"),
    ("training: {learning_rat: 1.0}", "training.learning_rat", "learning_rate"),
    ("trainning: {}", "trainning", "training"),
]


def wrong_configs() -> Iterator[tuple[str, ...]]:
    yield from WRONG
    for section in Config.model_fields:
        yield f"{section}:", section, "null"
        yield f"{section}: [1]", section, "mapping"
        yield f"{section}: yes please", section, "yes please"
        yield f"{section}: {{zzz: 1}}", f"{section}.zzz", "unknown"
    for key, values in NUMBERS.items():
        yield from ((_nested(key, value), key, str(value)) for value in values)
        if key not in ("training.max_time_s", "model.norm_eps"):
            yield from ((_nested(key, value), key) for value in WRONG_TYPES)


def _nested(key: str, value: object) -> str:
    for part in reversed(key.split(".")):
        value = {part: value}
    return json.dumps(value)  # JSON is YAML


def test_wrong_configs_exit_2_with_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def main(config: Config, args: object) -> Result:
        raise AssertionError("a wrong config came through")

    file, faults = tmp_path / "c.yaml", []
    for content, *mentions in wrong_configs():
        file.write_bytes(content.encode("latin-1"))
        code = run_job("train", "", main, argv=["--config", str(file)])
        out, err = capsys.readouterr()
        is_told = (
            code == 2
            and json.loads(out.splitlines()[-1])["status"] == "failed"
            and "Traceback" not in err
            and "\n" not in err.strip()
            and any(where in err for where in ("storage.root", str(file)))
            and any(word in err for word in ("allowed", "did you mean", "missing key", "use"))
            and all(mention in err for mention in mentions)
        )
        if not is_told:
            faults.append(f"{content!r} must mention {mentions}; exit {code}: {err}")
    assert not faults, "\n".join(faults)


def test_wrong_arguments_exit_2(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    file = write("training: {seed: 1}")
    for wrong in (
        "nonsense",
        "training=1",
        "training.seed=[1",
        "training.seed.x.y=1",
        ".=1",
        "--nope",
        "training.no=1",
    ):
        assert run_job("train", "", lambda config, args: Result(), argv=["--config", str(file), wrong]) == 2, wrong
        assert "Traceback" not in capsys.readouterr().err


def test_a_planted_constructor_is_not_run(write: Write, tmp_path: Path) -> None:
    apply, planted = "!!python/object/apply:pathlib.Path", tmp_path / "planted"
    with pytest.raises(ConfigError):
        load(write(f"training: {apply}.touch [{apply} ['{planted}']]"))
    assert not planted.exists()


def test_precedence(write: Write) -> None:
    file = write("storage: {root: /from/file}\ntraining: {seed: 1, learning_rate: 1e-3}")
    environ = {"PIPELINE_STORAGE": "/from/env"}
    assert load(file, environ={}).storage.root == "/from/file"
    assert load(file, environ=environ).storage.root == "/from/env"
    overridden = load(file, ["storage.root=/from/argument", "training.seed=7"], environ=environ)
    assert overridden.storage.root == "/from/argument"
    assert overridden.get("training.seed") == 7
    assert overridden.get("training.learning_rate") == 0.001  # YAML 1.1 would read 1e-3 as text
    assert overridden.get("training.max_grad_norm") == 1.0  # a default


def test_variables_in_the_root_are_expanded(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMEWHERE", "/some/where")
    assert load(write("storage: {root: $SOMEWHERE/store}"), environ={}).storage.root == "/some/where/store"


def test_a_last_line_without_nan(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(f"storage: {{root: '{tmp_path}'}}")
    metrics = {"loss": float("nan"), "all": [{"x": float("inf")}]}
    assert run_job("train", "", lambda config, args: Result(metrics), argv=["--config", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == {"loss": None, "all": [{"x": None}]}


def test_what_a_signal_leaves_half_made_is_not_shown(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one of Ray's datasets whose destructor looks for what its constructor had not come to."""

    class Half:
        def __init__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

        def __del__(self) -> None:
            raise AttributeError("the other half")

    file, hook = write(f"storage: {{root: '{tmp_path}'}}\nlogging: {{level: DEBUG}}"), sys.unraisablehook
    code = run_job("train", "", lambda config, args: Result({"half": Half()}), argv=["--config", str(file)])
    said = capsys.readouterr().err
    assert (code, sys.unraisablehook) == (130, hook)
    assert "the other half" in said
    assert "Traceback" not in said


def test_a_job_holds_its_folder_alone(tmp_path: Path) -> None:
    with job_lock(tmp_path), pytest.raises(JobError, match="another job is at work"), job_lock(tmp_path):
        pass
    with job_lock(tmp_path):
        pass


def test_an_argument_can_change_an_item_of_a_list(write: Write) -> None:
    file = write("data: {sources: [{name: a, type: json, path: x}]}")
    assert load(file, ["data.sources.0.path=y"]).data.sources[0].path == "y"
    for wrong in ("data.sources.1.path=y", "data.sources.path=y", "data.sources.0.path.z=y"):
        with pytest.raises(ConfigError, match="allowed is an existing key"):
            load(file, [wrong])


def test_dotted_read_of_nothing_names_it() -> None:
    with pytest.raises(KeyError, match=r"training\.nothing"):
        Config().get("training.nothing")


def test_resolved_config_loads_again(write: Write) -> None:
    config = load(write("training: {learning_rate: 1e-4}\nmodel: {size: base, num_layers: 3}"))
    assert load(write(yaml.safe_dump(config.dump()))) == config


def test_a_changed_config_has_views_that_differ(write: Write) -> None:
    """As a sweep changes it."""
    config = load(write("{objective: {contrastive: {views: dropout}}, model: {dropout: 0.1}}"), environ={})
    with pytest.raises(
        ConfigError, match=r"trial 3: objective\.contrastive\.views: found dropout with model\.dropout=0,"
    ):
        config.changed({"model.dropout": 0.0}, "trial 3")


def test_every_field_has_a_docstring() -> None:
    def check(section: type, path: str) -> None:
        for name, field in section.model_fields.items():  # type: ignore[attr-defined]
            inner = field.annotation
            if isinstance(inner, type) and hasattr(inner, "model_fields"):
                check(inner, f"{path}{name}.")
            elif path:
                assert field.description, f"{path}{name} has no docstring"

    check(Config, "")


def test_shipped_configs_load() -> None:
    files = list(Path(__file__).parents[1].glob("configs/*.yaml"))
    assert files
    for file in files:
        load(file)  # the sentence of a ConfigError names the file
