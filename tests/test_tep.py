"""The command `tep`: its commands, shipped configs by name, the list of keys, and completion in a shell."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.commands import tep
from pipeline.config import Config, ConfigError, load
from pipeline.config.loading import shipped_configs
from pipeline.config.reference import all_keys, complete_override, find_keys
from pipeline.core.outcome import command
from pipeline.job import parse, parser

ROOT = Path(__file__).parents[1]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = tep.main(words)
    out, err = capsys.readouterr()
    return code, out, err


def test_every_job_is_a_command_and_a_shell_of_it() -> None:
    jobs = {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"from_deepspeed"}
    assert jobs <= {*tep.COMMANDS}
    assert {*tep.COMMANDS} == {path.stem for path in (ROOT / "pipeline/commands").glob("*.py")} - {"__init__", "tep"}
    for name in jobs:
        assert f'run_command("{name}")' in (ROOT / f"jobs/{name}.py").read_text()


def test_help_version_and_commands_that_do_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name in tep.COMMANDS:
        assert f"\n    {name} " in out
    code, out, err = run(capsys)
    assert (code, out) == (2, "")
    assert "first steps" in err
    code, out, _ = run(capsys, "--version")
    assert (code, out.split()[0]) == (0, "tep")
    for word, advice in (
        ("trian", "did you mean tep train?"),
        ("\x1b[2Jx", "the commands are run, prepare"),
        ("--verion", "did you mean tep --version?"),
    ):
        code, _, err = run(capsys, word)
        assert code == 2
        assert advice in err
        assert "\x1b" not in err


def test_commands_in_the_readme_exist() -> None:
    named = re.findall(r"(?:^|`)tep ([a-z]+)", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    assert {*tep.COMMANDS} == {*named}


def test_help_of_a_command_says_how_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Do it.\n\nexamples:\n  tep train --config pairs\n"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/tep", "train"])
    assert "  tep train --config pairs" in parser("train", text).format_help()
    monkeypatch.setattr(sys, "argv", ["jobs/train.py"])
    assert "  python jobs/train.py --config pairs" in parser("train", text).format_help()


def test_advice_repeats_the_config_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["search", "two words", "--config", "my file.yaml", "--limit", "3", "storage.run=b", "a=b", "--json"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/tep", *words])
    assert command("embed") == "tep embed --config 'my file.yaml' storage.run=b"
    assert command("embed", []) == "tep embed"
    monkeypatch.setattr(sys, "argv", ["jobs/map.py", "--config=c.yaml", "--local_data_dir", "notes", "--to", "x"])
    assert command("embed") == "python jobs/embed.py --config=c.yaml --local_data_dir notes"


class TestShippedConfigs:
    def test_they_are_found_by_name_from_any_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("fine_tune", "fine_tune.yaml"):
            assert load(name, environ={}).model.pretrained == "sentence-transformers/all-MiniLM-L6-v2"

    def test_a_file_of_the_user_comes_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "fine_tune.yaml").write_text("storage: {run: mine}")
        assert load("fine_tune.yaml", environ={}).storage.run == "mine"
        assert load("fine_tune", environ={}).storage.run == "fine_tune"
        with pytest.raises(ConfigError, match=r"found no file nowhere/fine_tune\.yaml"):
            load("nowhere/fine_tune.yaml")
        (tmp_path / "texts").mkdir()
        with pytest.raises(ConfigError, match="texts: Is a directory; allowed is a readable YAML file"):
            load("texts")

    def test_an_unknown_name_lists_them(self) -> None:
        with pytest.raises(ConfigError) as raised:
            load("fine_tun")
        assert "did you mean --config fine_tune?" in str(raised.value)
        for name in shipped_configs():
            assert name in str(raised.value)

    def test_the_package_lists_all_its_folders(self) -> None:
        """An installed package has only what pyproject.toml names."""
        text = (ROOT / "pyproject.toml").read_text()
        folders = {path.parent for path in (ROOT / "pipeline").rglob("*.py")}
        for folder in folders:
            assert f'"{".".join(folder.relative_to(ROOT).parts)}",' in text
        assert {path.parent.name for path in (ROOT / "pipeline").rglob("*") if path.suffix in (".yaml", ".json")} == {
            "data"
        }


class TestKeys:
    def test_every_key_is_listed_with_its_docs(self) -> None:
        keys = {key.key: key for key in all_keys()}
        for section, model in Config.model_fields.items():
            for name in model.annotation.model_fields:  # type: ignore[union-attr]
                assert f"{section}.{name}" in keys
        assert [key for key, value in keys.items() if "." in key and not value.docs and value.type != "mapping"] == []

    def test_defaults_are_those_of_an_empty_config(self) -> None:
        plain = Config()
        for key in all_keys():
            if "[]" in key.key or key.required or key.type.startswith("mapping") or key.key == "storage.root":
                continue
            try:
                value = plain.get(key.key)
            except KeyError:  # in a section that is null
                continue
            plain_value = json.loads(json.dumps(value, default=lambda section: section.model_dump(mode="json")))
            assert key.default == plain_value, key.key

    def test_types_say_what_is_allowed(self) -> None:
        for name, said in (
            ("training.learning_rate", "number > 0, ≤ 10"),
            ("scaling.num_workers", "auto or integer ≥ 1 or list of integer ≥ 1"),
            ("training.strategy", "ddp | fsdp"),
            ("embedding.model", "path or null"),
            ("training.max_steps", "integer ≥ 1 or null"),
            ("data.sources.0.path", "path or null"),
        ):
            (key,) = find_keys(name)
            assert key.type == said

    def test_sections_and_unknown_keys(self) -> None:
        assert {key.key.split(".")[0] for key in find_keys("training")} == {"training"}
        for name, meant in (
            ("lr", "did you mean training.learning_rate?"),
            ("training.learning_rat", "did you mean training.learning_rate?"),
            ("seed", "did you mean data.seed or training.seed or"),
            ("trainig", "did you mean training?"),
            ("qqq", "the sections are storage, data"),
        ):
            with pytest.raises(ConfigError, match="found no key") as raised:
                find_keys(name)
            assert meant in str(raised.value)

    def test_the_command(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PIPELINE_STORAGE", str(tmp_path / "store"))
        code, out, _ = run(capsys, "config", "training.learning_rate")
        (key,) = json.loads(out)
        assert (code, key["key"], key["default"]) == (0, "training.learning_rate", 1e-3)
        assert len(json.loads(run(capsys, "config")[1])) == len(list(all_keys()))
        (key,) = json.loads(run(capsys, "config", "training.learning_rate", "--config", "fine_tune")[1])
        assert key["value"] == 5e-5
        code, out, err = run(capsys, "config", "lr")
        assert (code, json.loads(out)["status"]) == (2, "failed")
        assert "did you mean training.learning_rate?" in err
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        _, out, _ = run(capsys, "config", "training.learning_rate", "model.dropout")
        assert "training.learning_rate\n    number > 0, ≤ 10; default: 0.001\n    AdamW's peak" in out
        _, out, _ = run(capsys, "config")
        assert "training.learning_rate" in out
        assert list(tmp_path.iterdir()) == []  # it writes nothing


def completed(line: str, folder: Path) -> list[str]:
    """What a shell would offer at the end of a line, by argcomplete's protocol."""
    answer = folder / "answer"
    answer.unlink(missing_ok=True)
    environment = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
        "PYTHONPATH": str(ROOT),
        "PATH": os.environ["PATH"],
    }
    subprocess.run(
        [sys.executable, "-m", "pipeline.commands.tep"], cwd=folder, env=environment, timeout=120, check=False
    )
    return [word.strip() for word in answer.read_text().split("\n")]


def test_a_shell_completes_commands_options_configs_and_keys(tmp_path: Path) -> None:
    (tmp_path / "fine.yaml").touch()
    assert completed("tep tr", tmp_path) == ["train"]
    assert completed("tep train --ch", tmp_path) == ["--check"]
    assert set(completed("tep train --config fine", tmp_path)) == {"fine_tune", "fine.yaml"}
    assert completed("tep train training.learning_r", tmp_path) == ["training.learning_rate="]
    assert set(complete_override("training.strategy=")) == {"training.strategy=ddp", "training.strategy=fsdp"}
    assert complete_override("nothing=") == []


def test_names_and_overrides_are_told_apart() -> None:
    args = parse(parser("runs", "", names="RUN"), ["a", "storage.root=x", "b", "--config", "c.yaml"])
    assert (args.names, args.overrides, args.config) == (["a", "b"], ["storage.root=x"], "c.yaml")
