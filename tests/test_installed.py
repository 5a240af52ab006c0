"""The package as a wheel in an environment of its own, without the repository, from an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.loading import shipped_configs
from tests.conftest import FOR_RAY
from tests.test_packed import ROOT, tracked

pytestmark = pytest.mark.slow


class Installed:
    """An environment with our wheel and, by a .pth file, the packages that the tests have."""

    def __init__(self, home: Path) -> None:
        self.home, self.folder = home, home / "empty"
        self.folder.mkdir()
        source = home / "source"
        for name in tracked():
            if name.startswith(("pipeline/", "configs/")) or name in ("pyproject.toml", "README.md", "LICENSE"):
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                (source / name).write_bytes((ROOT / name).read_bytes())
        venv.create(home / "venv", with_pip=False)
        self.python = home / "venv/bin/python"
        packages = self.run(str(self.python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout
        (Path(packages.strip()) / "others.pth").write_text(sysconfig.get_path("purelib"))
        pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
        self.run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(home), str(source))
        (wheel,) = home.glob("*.whl")
        self.run(*pip, "--python", str(self.python), "install", "--no-deps", "--no-index", str(wheel))

    def run(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """A command in the empty folder, with nothing of ours in its environment."""
        kept = {"PATH", "TMPDIR", "LANG", *FOR_RAY}
        environment = {name: value for name, value in os.environ.items() if name in kept or name.startswith("PIP_")}
        environment |= {"HOME": str(self.home), "PIPELINE_STORAGE": str(self.home / "store")}
        done = subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=540)
        assert done.returncode == code, done.stderr
        return done

    def tep(self, *words: str, code: int = 0) -> Any:
        """The last line of a command's output, and what it said."""
        done = self.run(str(self.home / "venv/bin/tep"), *words, code=code)
        return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("i"))


def test_what_needs_no_ray(installed: Installed) -> None:
    place = installed.run(str(installed.python), "-c", "import pipeline; print(pipeline.__file__)").stdout
    assert place.startswith(str(installed.home / "venv"))
    shown = installed.run(str(installed.home / "venv/bin/tep"), "--version").stdout
    assert shown.split()[0] == "tep"
    assert shown.split()[1][0].isdigit()
    keys, _ = installed.tep("config")
    assert {"training.learning_rate", "storage.root"} <= {key["key"] for key in keys}
    last, said = installed.tep("train", "--config", "nosuch", code=2)
    assert last["status"] == "failed"
    for name in shipped_configs():
        assert name in said
        values, _ = installed.tep("config", "storage.run", "--config", name)
        assert values[0]["value"]
    assert list(installed.folder.iterdir()) == []


def test_the_quickstart_is_checked(installed: Installed) -> None:
    last, said = installed.tep("run", "--config", "quickstart", "--check")
    assert (last["job"], last["status"]) == ("run", "ok")
    assert "preflight" in said


def test_workers_have_the_package_and_its_data_files(installed: Installed) -> None:
    notes = installed.home / "notes"
    notes.mkdir()
    for number in range(8):
        (notes / f"{number}.txt").write_text(
            f"Note number {number}\n\nThis is what the note {number} says about it, by a@example.org.\n"
        )
    last, _ = installed.tep(
        "prepare", "--local-data-dir", str(notes), "data.safety.actions={email: redact}", "storage.run=n"
    )
    assert last["metrics"]["rows_kept"] == 8
    assert list(installed.folder.iterdir()) == []
