"""The picture of a space: who is drawn, where, in which colour, and that no text runs as a script."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.evaluation.map import COLUMNS, ITERATIONS, Points, draw_png, group, project, sample, write_page
from tests.conftest import run_here
from tests.test_evaluation import small_model

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def batch(ids: list[str], chance: np.random.Generator, width: int = 3) -> pa.RecordBatch:
    vectors = chance.normal(size=(len(ids), width)).astype(np.float32)
    columns: list[Any] = [ids, ["s"] * len(ids), [f"s:{i}" for i in ids], [f"text {i}" for i in ids]]
    vector = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), width)
    return pa.RecordBatch.from_arrays([*map(pa.array, columns), vector], list(COLUMNS))


def test_a_sample_is_the_first_by_id_however_they_come() -> None:
    chance = np.random.default_rng(0)
    ids = [f"{i:03}" for i in chance.permutation(500)]
    batches = [batch(ids[start : start + 70], chance) for start in range(0, 500, 70)]
    points = sample(iter(batches), 60)
    assert points.texts == [f"text {i:03}" for i in range(60)]
    assert sample(reversed(batches), 60).vectors.tolist() == points.vectors.tolist()
    rows = {row["id"]: row["vector"] for one in batches for row in one.to_pylist()}
    expected = np.array(rows["007"]) / np.linalg.norm(rows["007"])
    np.testing.assert_allclose(points.vectors[7], expected, rtol=1e-6)
    assert len(sample(iter(batches), 1000).texts) == 500
    assert sample(iter([]), 10).texts == []


def clumps(seed: int = 0) -> tuple[Points, np.ndarray]:
    """Four clumps of 40 in 20 dimensions, each with words of its own."""
    chance = np.random.default_rng(seed)
    label = np.repeat(np.arange(4), 40)
    vectors = (3 * np.eye(20)[label] + 0.3 * chance.normal(size=(160, 20))).astype(np.float32)
    words = ["violin orchestra", "kernel driver", "pepper kitchen", "glacier mountain"]
    texts = [f"{words[i]} of page {chance.integers(1000)}" for i in label]
    return Points(["s"] * 160, [f"s:{i}" for i in range(160)], texts, vectors), label


def test_what_is_near_stays_near() -> None:
    points, label = clumps()
    iterations: list[int] = []
    plane = project(points.vectors, iterations.append)
    assert min(iterations) > 0
    assert 250 <= sum(iterations) <= ITERATIONS
    assert plane.shape == (160, 2)
    apart = np.linalg.norm(plane[:, None] - plane[None], axis=2) + 1e9 * np.eye(160)
    assert (label[apart.argmin(axis=1)] == label).all()
    assert project(points.vectors[:4]).shape == (4, 2)


def test_groups_are_clusters_with_their_words_or_sources() -> None:
    points, label = clumps()
    groups = group(points, clusters=4)
    by_label = {int(one): {groups[i] for i in np.flatnonzero(label == one)} for one in range(4)}
    assert all(len(names) == 1 for names in by_label.values())
    assert {"violin", "orchestra"} <= set(re.findall(r"\w+", *by_label[0]))
    two = Points(["a", "b"] * 80, points.source_ids, points.texts, points.vectors)
    assert group(two, clusters=4) == two.sources
    silent = Points(points.sources, points.source_ids, ["…"] * 160, points.vectors)
    assert set(group(silent, clusters=4)) == {"1", "2", "3", "4"}


class Tags(HTMLParser):
    """What a browser would see of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.append(data)


def page_of(points: Points, groups: list[str], folder: Path, title: str = "title") -> Tags:
    write_page(np.zeros((len(groups), 2), np.float32), groups, points, title, folder / "map.html")
    page = Tags()
    page.feed((folder / "map.html").read_text("utf-8"))
    return page


def test_no_text_runs_or_is_taken_for_markup(tmp_path: Path) -> None:
    vectors = np.zeros((2, 3), np.float32)
    tame = page_of(Points(["s"] * 2, ["s:1", "s:2"], ["one", "two"], vectors), ["g", "h"], tmp_path)
    points = Points(["s"] * 2, [EVIL, "s:2"], [EVIL, f"'\"{EVIL} & <b>bold</b>"], vectors)
    evil = page_of(points, [EVIL, "h"], tmp_path, EVIL)
    assert [tag for tag, _ in evil.tags] == [tag for tag, _ in tame.tags]
    assert all("src" not in attributes and "href" not in attributes for _, attributes in evil.tags)  # offline
    (data,) = (script for script in evil.scripts if "Plotly.newPlot(" in script)
    traces = json.JSONDecoder().raw_decode(data[data.index("[{", data.index("Plotly.newPlot(")) :])[0]
    shown = [text for trace in traces for text in trace["text"]] + [trace["name"] for trace in traces]
    assert not any(re.search(r"<(?!/?b>|br>)", text) for text in shown)
    assert any("&lt;/script&gt;" in text for text in shown)
    assert any("&lt;b&gt;bold&lt;/b&gt;" in text for text in shown)


def test_the_png_has_a_colour_for_each_group(tmp_path: Path) -> None:
    from matplotlib.image import imread

    points, label = clumps()
    names = [f"group {i}" for i in label]
    draw_png(project(points.vectors), names, "title", tmp_path / "map.png")
    pixels = imread(tmp_path / "map.png")[..., :3]
    saturated = pixels[np.ptp(pixels, axis=-1) > 0.3]
    assert len(np.unique(np.round(saturated, 1), axis=0)) >= 4


def test_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.config import load
    from pipeline.index.published import encoder_recipe, table_of
    from pipeline.index.table import PLACE

    model = small_model(tmp_path / "model")
    settings = {"storage": {"root": str(tmp_path / "store")}, "embedding": {"model": str(model)}}
    (tmp_path / "c.yaml").write_text(json.dumps(settings))

    def job(*options: str) -> tuple[int, dict[str, Any], str]:
        arguments = ["--config", str(tmp_path / "c.yaml"), *options]
        code, last, _, err = run_here(capsys, "map", *arguments)
        return code, last, err

    code, _, err = job()
    assert (code, "run tep embed first" in err) == (1, True)
    for option in (["--sample", "3"], ["--clusters", "0"]):
        code, _, err = job(*option)
        assert code == 2
        assert f"{option[0]}: found {option[1]}; allowed is" in err
    config = load(tmp_path / "c.yaml", environ={})
    table = table_of(config, encoder_recipe(config, model))
    rows = pa.Table.from_batches([batch([f"{i:032x}" for i in range(50)], np.random.default_rng(0), 16)])
    for name, kind in (
        ("metadata", pa.string()),
        ("digest", pa.string()),
        ("places", pa.list_(PLACE)),
        ("words", pa.string()),
    ):
        rows = rows.append_column(name, pa.nulls(50, kind))
    with table.writing() as writer:
        writer.append(table.write(rows.select(table.schema.names)))
    code, last, err = job("--sample", "40", "--clusters", "3", "--to", str(tmp_path / "out"))
    assert code == 0, err
    assert last["metrics"] == {"points": 40, "groups": 3}
    for path in last["paths"].values():
        assert Path(path).parent == tmp_path / "out"
        assert Path(path).stat().st_size > 10_000
