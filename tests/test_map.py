"""The picture of a space: who is drawn, where, in which colour, and that no text runs as a script."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.report.map import (
    COLUMNS,
    TSNE_STEPS,
    Points,
    characteristic_words,
    cluster,
    described,
    draw_png,
    project,
    sample,
    write_page,
)
from tests.conftest import run_here
from tests.test_evaluation import small_model
from tests.test_report import ACTS, CHROMIUM, EVIL, Tags, browse, data_of


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
    assert 250 <= sum(iterations) <= TSNE_STEPS
    assert plane.shape == (160, 2)
    apart = np.linalg.norm(plane[:, None] - plane[None], axis=2) + 1e9 * np.eye(160)
    assert (label[apart.argmin(axis=1)] == label).all()
    assert project(points.vectors[:4]).shape == (4, 2)


def test_clusters_have_the_names_of_their_words() -> None:
    points, label = clumps()
    numbers, names = cluster(points, clusters=4)
    for one, words in enumerate(("violin", "kernel", "pepper", "glacier")):
        (number,) = set(numbers[label == one].tolist())
        assert words in names[number]
        assert "page" not in names[number]  # which is in all of them
    silent = Points(points.sources, points.source_ids, ["…"] * 160, points.vectors)
    assert cluster(silent, clusters=4)[1] == ["1", "2", "3", "4"]
    sizes = np.bincount(cluster(points, clusters=7)[0])
    assert (np.diff(sizes) <= 0).all()


def test_names_are_c_tf_idf_by_hand() -> None:
    texts = ["apple apple pear", "apple plum", "kernel kernel driver pear"]
    names = characteristic_words(texts, np.array([0, 0, 1]))
    # A = 4.5 words a cluster. apple: sqrt(3/5) log(1 + 2/3.5) = 0.35; plum: sqrt(1/5) log(1 + 4/1.5) = 0.58;
    # pear, in both: sqrt(1/5) log(1 + 3/2.5) = 0.35, just above apple; kernel: sqrt(2/4) log(1 + 3/2.5) = 0.56;
    # driver: sqrt(1/4) log(1 + 4/1.5) = 0.65
    assert names == ["plum, pear, apple", "driver, kernel, pear"]


def test_the_map_fills_its_canvas() -> None:
    points, _ = clumps()
    plane = np.random.default_rng(0).normal(size=(160, 2)).astype(np.float32) * [1, 50] + [1000, 0]
    drawn = described(plane, np.arange(160) % 4, list("abcd"), points, "title")
    for axis in ("x", "y"):
        values = [point[axis] for point in drawn["points"]]
        assert (min(values), max(values)) == (0, 1)
        assert drawn["centres"][2][axis] == pytest.approx(np.median(values[2::4]), abs=1e-3)
    json.dumps(drawn)
    same = described(np.zeros((160, 2), np.float32), np.zeros(160, int), ["a"], points, "title")
    assert {point["x"] for point in same["points"]} == {0.0}


def map_of(points: Points, name: str, folder: Path) -> Path:
    numbers = np.arange(len(points.texts)) % 2
    drawn = described(np.array([[0, 0], [1, 1]], np.float32), numbers, [name, "h"], points, name)
    write_page(drawn, folder / "map.html")
    return folder / "map.html"


def test_no_text_runs_or_is_taken_for_markup(tmp_path: Path) -> None:
    vectors = np.zeros((2, 3), np.float32)
    tame = Tags(map_of(Points(["s", "t"], ["s:1", "s:2"], ["one", "two"], vectors), "g", tmp_path).read_text("utf-8"))
    points = Points([EVIL, "s"], [EVIL, "s:2"], [EVIL, f"'\"{EVIL} & <b>bold</b> {ACTS}" + "x" * 1_000_000], vectors)
    evil = Tags(map_of(points, EVIL, tmp_path).read_text("utf-8"))
    assert evil.tags == tame.tags
    (data,) = (each for each in data_of(evil) if "points" in each)
    shown = [point["hover"] for point in data["points"]]
    assert not any(re.search(r"<(?!/?b>|br>)", text) for text in shown)
    assert any("&lt;/script&gt;" in text for text in shown)
    assert any("&lt;b&gt;bold&lt;/b&gt;" in text for text in shown)
    assert not re.search("[\x1b\u202e]", json.dumps(data, ensure_ascii=False))
    assert len(json.dumps(data)) < 10_000


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_draws_and_searches_it(tmp_path: Path) -> None:
    points = Points(["a", "b"], [EVIL, "s:2"], [EVIL, "a kernel driver"], np.zeros((2, 3), np.float32))
    page = map_of(points, EVIL, tmp_path)
    dom, console = browse(page)
    assert console == ""
    assert "<title>hacked</title>" not in dom
    assert len(re.findall(r'<path class="point"', dom)) == 2
    search = """<script>
    const box = document.querySelector("input");
    box.value = "KERNEL driver"; box.dispatchEvent(new Event("input"));
    </script></body>"""
    html, _, _ = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text("utf-8")).rpartition("</body>")
    page.write_text(html + search, "utf-8")
    dom, _ = browse(page)
    assert ">1 of 2 match</output>" in dom


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
    assert last["metrics"] == {"points": 40, "clusters": 3, "sources": 1}
    for path in last["paths"].values():
        assert Path(path).parent == tmp_path / "out"
        assert Path(path).stat().st_size > 1_000
