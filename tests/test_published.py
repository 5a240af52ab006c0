"""The table that belongs to a run."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import load
from pipeline.core.path import as_path
from pipeline.index.published import encoder_recipe, open_pinecone, table_of
from pipeline.job import DEFAULT_CONFIG
from tests.embedding_world import save_random_model


def test_runs_with_similar_names_have_tables_of_their_own(tmp_path: Path) -> None:
    model = as_path(str(save_random_model(tmp_path / "model")))
    names, namespaces = set(), set()
    runs = ["team/one", "team.one", "team-one", "team_one", "one", "Team/one", "a" * 100 + "/b", "c" * 100 + "/b"]
    for run in runs:
        config = load(DEFAULT_CONFIG, [f"storage.root={tmp_path}", f"storage.run={run}"])
        table = table_of(config, encoder_recipe(config, model))
        names.add(str(table.path).lower())  # file systems may ignore case
        namespaces.add(open_pinecone(config, table).namespace)
    assert len(names) == len(namespaces) == len(runs)
