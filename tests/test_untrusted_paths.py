"""Names that come from files never lead out of their folder. Oracle: os.path, which resolves them as text."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.artifact import read_manifest
from pipeline.core.path import stays_below
from pipeline.training.checkpoints import read_state

parts = st.sampled_from(["..", ".", "", "a", "b.json", "...", "..a", "\\", "~", "\n", " .. "])
names = st.lists(parts | st.text(max_size=3), max_size=6).map("/".join)
FOLDER = "/home/models/one"


@pytest.mark.slow
@settings(max_examples=1000)
@given(names)
def test_a_name_that_passes_stays_in_the_folder(name: str) -> None:
    target = os.path.normpath(os.path.join(FOLDER, name))
    if stays_below(name):
        assert target == FOLDER or target.startswith(f"{FOLDER}/")
    else:
        assert name.startswith("/") or ".." in name.split("/")


def test_names_that_pass_and_do_not() -> None:
    for name in ("model.safetensors", "1_Pooling", "", "a/./b", "..a", "a..", "..."):
        assert stays_below(name), name
    for name in ("..", "../a", "a/../b", "/etc", "a/..", "//a"):
        assert not stays_below(name), name


def test_manifests_and_states_that_name_files_outside_are_broken(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "step"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"files": {"../secret": {"bytes": 1}}}))
    assert read_manifest(folder) is None
    state = {"step": 0, "files": {"../secret": "0"}}
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="missing or broken"):
        read_state(folder)
