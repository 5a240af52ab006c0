"""Mined negatives against a loop over all pairs of texts, and a data set that trains with them."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from pipeline.commands.tep import run_command
from pipeline.config import Config, ConfigError, Mining, load
from pipeline.data.manifest import Manifest, read_prepared
from pipeline.data.partitions import is_validation
from pipeline.index.mine import with_negatives
from pipeline.index.negatives import Answers, Block, Judged, negatives_of, rank
from tests.conftest import make_pairs, write_jsonl
from tests.test_evaluation import small_model

WANTED = {
    "as it comes": {},
    "few": {"num_negatives": 1},
    "no margin": {"relative_margin": None},
    "half": {"relative_margin": 0.5, "num_negatives": 9},
    "beyond": {"relative_margin": 1.5, "range_min": 2},
    "window": {"range_min": 3, "range_max": 11, "num_negatives": 20, "relative_margin": None},
    "bounds": {"min_score": -1.0, "max_score": 1.0, "num_negatives": 50, "range_max": 60, "relative_margin": None},
    "all": {"num_negatives": 500, "range_max": 500, "relative_margin": None},
}


def by_hand(anchor: np.ndarray, own: int, right: set[int], texts: dict[int, np.ndarray], wanted: Mining) -> list[int]:
    """One anchor's negatives, one text at a time."""
    score = {key: int(anchor @ vector) for key, vector in texts.items()}
    ranked = sorted((key for key in texts if key not in right | {own}), key=lambda key: (-score[key], -key))
    found = []
    for key in ranked[wanted.range_min : wanted.range_max]:
        if wanted.relative_margin is not None:
            limit = score[own] * wanted.relative_margin
            if score[own] < 0:  # as far below it as above zero
                limit = score[own] + (1 - wanted.relative_margin) * score[own]
            if score[key] > limit:
                continue
        if wanted.min_score is not None and score[key] < wanted.min_score:
            continue
        if wanted.max_score is not None and score[key] > wanted.max_score:
            continue
        found.append(key)
    return found[: wanted.num_negatives]


@pytest.mark.parametrize("name", WANTED)
@pytest.mark.parametrize("seed", range(3))
def test_choosing_against_a_loop_over_all_texts(name: str, seed: int) -> None:
    chance, wanted = np.random.default_rng(seed), Mining.model_validate(WANTED[name])
    keys = np.unique(chance.integers(0, 2**63, size=150).astype(np.uint64))
    # Few small numbers: ties everywhere, and exact products.
    texts = {int(key): chance.integers(-2, 3, size=3).astype(np.float32) for key in keys}
    anchors = chance.integers(-2, 3, size=(40, 3)).astype(np.float32)
    own = chance.choice(keys, size=40)
    rows = np.repeat(np.arange(40), 3)
    others = chance.choice(keys, size=120)
    parts = [np.sort(part) for part in np.split(chance.permutation(keys), [1, 60, 61])]
    blocks = [Block(part, np.array([texts[int(key)] for key in part])) for part in parts]
    found = rank(anchors, own, (rows, others), blocks, wanted).first(wanted.num_negatives)
    right = [{int(key) for key in others[rows == i]} for i in range(40)]
    expected = [by_hand(anchors[i], int(own[i]), right[i], texts, wanted) for i in range(40)]
    assert [keys.tolist() for keys in found] == expected
    assert any(expected)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_a_guide_drops_what_it_places_nearer_than_the_positive(tmp_path: Path) -> None:
    """And counts what would have been a negative without it."""
    chance, count = np.random.default_rng(0), 3
    keys, anchors = np.arange(1, 41, dtype=np.uint64), np.arange(100, 120, dtype=np.uint64)
    texts, guided = unit(chance.normal(size=(40, 5))), unit(chance.normal(size=(40, 4)))
    vectors, guide = unit(chance.normal(size=(20, 5))), unit(chance.normal(size=(20, 4)))
    own = keys[:20]
    column = {"vector": texts, "guide": guided}
    table = pa.table(
        {"positive_key": keys, "text": [f"text {key}" for key in keys]} | {n: [*v] for n, v in column.items()}
    )
    for name, values in column.items():
        fixed = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        table = table.set_column(table.column_names.index(name), name, fixed)
    for start in (0, 15):
        Block.write(table.slice(start, 15 if not start else 25), tmp_path)
    expected, seen, false = [], 0, 0
    for i in range(20):
        ranked = [j for j in np.argsort(-(texts @ vectors[i])) if j != i and texts[j] @ vectors[i] <= 0.9]
        nearer = {int(j) for j in ranked if guided[j] @ guide[i] > guided[i] @ guide[i]}
        seen += len(ranked[:count])
        false += len(nearer.intersection(map(int, ranked[:count])))
        expected.append([f"text {keys[j]}" for j in ranked if int(j) not in nearer][:count])
    rows = pa.table({"anchor_key": anchors, "positive_key": own})
    for name, values in (("vector", vectors), ("guide", guide)):
        rows = rows.append_column(name, pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1]))
    judged, wanted = Judged(), Mining(num_negatives=count, relative_margin=None, max_score=0.9)
    files = sorted(tmp_path.glob("*.arrow"))
    assert len(files) == 2
    assert negatives_of(rows, files, Answers.of(anchors, own), wanted, judged=judged) == expected
    assert (judged.seen, judged.false) == (seen, false)
    assert 0 < false < seen


def test_without_texts_there_are_no_negatives() -> None:
    known = (np.empty(0, np.int64), np.empty(0, np.uint64))
    (found,) = rank(np.ones((1, 2), np.float32), np.array([7], np.uint64), known, [], Mining()).first(4)
    assert found.tolist() == []


def test_blocks_on_disk(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    vectors = chance.normal(size=(9, 4)).astype(np.float32)
    keys = chance.permutation(9).astype(np.uint64) + 2**63
    texts = [f"text {key}" for key in keys]
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 4)
    anchors = np.arange(9, dtype=np.uint64)
    rows = pa.table({"anchor_key": anchors, "positive_key": keys, "text": texts, "vector": column})
    for start in (0, 5):
        Block.write(rows.slice(start, 5).drop_columns(["anchor_key"]), tmp_path)
    files = sorted(tmp_path.glob("*.arrow"))
    assert len(files) == 2
    for file in files:
        block = Block.open(file)
        assert block.keys.tolist() == sorted(block.keys.tolist())
        assert block.texts.to_pylist() == [f"text {key}" for key in block.keys]
        np.testing.assert_allclose(np.linalg.norm(block.vectors, axis=1), 1, rtol=1e-6)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = [[texts[j] for j in np.argsort(-(unit @ unit[i])) if j != i][:2] for i in range(9)]
    assert negatives_of(rows, files, Answers.of(anchors, keys), Mining(num_negatives=2)) == expected


def test_own_negatives_stay_behind_the_mined() -> None:
    records = pa.table({name: [None] * 3 for name in ("source", "source_id", "text", "anchor", "positive", "metadata")})
    records = records.add_column(0, "id", pa.array(["a", "b", "c"]))
    records = records.add_column(6, "negatives", pa.array([["own", "near"], None, ["kept"]]))
    found = with_negatives(records, {"a": ["near", "nearer"], "b": []})
    assert found["negatives"].to_pylist() == [["near", "nearer", "own"], [], ["kept"]]
    assert found.column_names == records.column_names


# Through Ray, on real records.

Mined = tuple[Path, Manifest, Path, Manifest]
"""A data set as prepared, and as mined."""
PROMPTS = {"anchor": "find: ", "positive": "page: "}


def rows() -> list[dict[str, object]]:
    """Pairs of which some share their anchor and some their positive."""
    found, chance = make_pairs(700), random.Random(0)
    for row in chance.sample(found, 150):
        row["anchor"] = "open the same page"
    for row in chance.sample(found, 60):
        row["positive"] = "This page answers many a question about whatever one may ask."
    return found


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("mining")
    model = small_model(folder / "model")
    source = {"name": "pages", "type": "json", "path": str(write_jsonl(folder / "pairs.jsonl", rows()))}
    settings = {
        "storage": {"root": str(folder / "store"), "run": "mined"},
        "data": {"sources": [source | {"metadata": ["line"], "prompts": PROMPTS}], "validation_fraction": 0.1},
        "tokenizer": {"vocab_size": 600, "max_length": 24},
        "model": {"d_model": 16, "num_layers": 0, "d_ff": 16},
        "embedding": {"model": str(model)},
        "mining": {"num_negatives": 3, "relative_margin": 0.9},
        "training": {"global_batch_size": 32, "max_steps": 4, "log_every_steps": 1},
        "objective": {"contrastive": {"hard_negatives": 2}},
    }
    (folder / "c.yaml").write_text(json.dumps(settings))
    return load(folder / "c.yaml", environ={})


@pytest.fixture(scope="module")
def mined(config: Config, ray_cluster: None) -> Mined:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.index.mine.BLOCK_ROWS", 150)
        patch.setattr("pipeline.index.mine.MINE_ROWS", 200)
        assert run_command("mine", ["--config", str(yaml_of(config))]) == 0
    folders = {}
    for path in (config.root / "prepared").iterdir():
        manifest = read_prepared(path)
        assert manifest is not None
        folders["negatives" in manifest.text_fields] = (path, manifest)
    return (*folders[False], *folders[True])


def yaml_of(config: Config) -> Path:
    return config.root.parent / "c.yaml"


def records_of(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "records").to_pylist()


def test_mined_records_against_a_loop(config: Config, mined: Mined) -> None:
    from pipeline.index.encoder import TextEncoder

    before, after = records_of(mined[0]), records_of(mined[2])
    assert [row | {"negatives": 0} for row in after] == [row | {"negatives": 0} for row in before]
    training = [row for row in after if not is_validation(row["id"], 0.1)]
    assert all(row["negatives"] is None for row in after if is_validation(row["id"], 0.1))
    texts = sorted({row["positive"] for row in training})
    encoder = TextEncoder(Path(str(config.embedding.model)), device="cpu")
    vectors = dict(zip(texts, encoder.encode([PROMPTS["positive"] + text for text in texts]), strict=True))
    anchors = encoder.encode([PROMPTS["anchor"] + row["anchor"] for row in training])
    answers: dict[str, set[str]] = {}
    for row in after:  # held-out pairs too: what answers an anchor is never wrong
        answers.setdefault(row["anchor"], set()).add(row["positive"])
    numbers: Counter[int] = Counter()
    for row, anchor in zip(training, anchors, strict=True):
        score = {text: float(anchor @ vector) for text, vector in vectors.items()}
        ranked = sorted((t for t in texts if t not in answers[row["anchor"]]), key=score.__getitem__, reverse=True)
        limit = 0.9 * score[row["positive"]]
        expected = [text for text in ranked[:100] if score[text] <= limit][:3]
        numbers[len(row["negatives"])] += 1
        assert len(row["negatives"]) == len(expected)
        # Scores that differ by rounding alone may change places.
        np.testing.assert_allclose([score[t] for t in row["negatives"]], [score[t] for t in expected], atol=2e-6)
        assert not {*row["negatives"]} & answers[row["anchor"]]
        assert all(score[text] <= limit + 2e-6 for text in row["negatives"])
    assert numbers[3] > 100


def test_the_split_and_its_tokens_stay(mined: Mined) -> None:
    folder, manifest, target, new = mined
    assert new.fingerprint != manifest.fingerprint
    assert (new.splits, new.sources, new.settings) == (manifest.splits, manifest.sources, manifest.settings)
    assert new.settings == {"data.validation_fraction": 0.1, "tokenizer.max_length": 24}
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    texts = {row["id"]: row["negatives"] for row in records_of(target)}
    for split in ("train", "validation"):
        old, with_negatives = (pq.read_table(each / split) for each in (folder, target))
        assert with_negatives.drop_columns("negatives").equals(old)
        for row in with_negatives.to_pylist():
            expected = [tokenizer.encode(PROMPTS["positive"] + text).ids[:24] for text in texts[row["id"]] or []]
            assert row["negatives"] == expected, split


def test_it_is_made_once(config: Config, mined: Mined) -> None:
    from pipeline.index.mine import mine
    from pipeline.index.published import encoder_recipe

    model = Path(str(config.embedding.model))
    again = mine(config, mined[0], mined[1], encoder_recipe(config, model), lambda: pytest.fail("asked for Ray"))
    assert again == (mined[2], mined[3])


def test_it_trains(config: Config, mined: Mined) -> None:
    from pipeline.data.prepare import prepare
    from pipeline.training.assembly import train_locally

    name = mined[2].relative_to(config.root)
    chosen = load(yaml_of(config), [f"data.prepared={name}", "storage.run=harder"], environ={})
    folder, manifest = prepare(chosen, lambda: pytest.fail("asked for Ray"))
    assert (folder, manifest) == (mined[2], mined[3])
    losses = {}
    for negatives in (2, 0):
        run = [f"storage.run=negatives-{negatives}", f"objective.contrastive.hard_negatives={negatives}"]
        settings = load(yaml_of(config), [f"data.prepared={name}", *run], environ={})
        assert train_locally(settings, folder, manifest).step == 4
        history = (settings.run_dir / "metrics.jsonl").read_text().splitlines()
        losses[negatives] = next(row["loss"] for row in map(json.loads, history) if "loss" in row)
    assert losses[2] > losses[0] + 0.05  # more candidates to tell the positive from


WRONG = {
    "mining.range_min=100": "a range_min below range_max, not 100 and 100",
    "mining.min_score=0.5 mining.max_score=0.4": "a min_score up to max_score, not 0.5 and 0.4",
    "mining.num_negatives=0": "mining.num_negatives",
    "data.prepared=nowhere": r"data.prepared: found no manifest\.json of a prepared data set in .*nowhere",
    "tokenizer.max_length=32": "tokenizer.max_length: found 32; set 24, with which ",
    "data.validation_fraction=0.2": "data.validation_fraction: found 0.2; set 0.1, with which ",
    "data.sources.0.name=other": "data.sources: found other with prompts .*; set pages",
}


@pytest.mark.parametrize("overrides", WRONG)
def test_wrong_settings_and_others_than_the_data_sets_own(overrides: str, config: Config, mined: Mined) -> None:
    from pipeline.data.prepare import prepare

    prepared = f"data.prepared={mined[2].relative_to(config.root)}"
    with pytest.raises(ConfigError, match=WRONG[overrides]):
        prepare(load(yaml_of(config), [prepared, *overrides.split()], environ={}), lambda: pytest.fail("Ray"))


def test_texts_alone_have_no_negatives(config: Config, tmp_path: Path) -> None:
    from pipeline.index.encoder import EncoderRecipe
    from pipeline.index.mine import mine

    manifest = Manifest("", [], {}, [], {"text": {}}, [], {})
    recipe = EncoderRecipe(tmp_path, config.embedding, tmp_path)
    with pytest.raises(ConfigError, match="found records with only text; allowed for mining are sources with"):
        mine(config, tmp_path, manifest, recipe, lambda: pytest.fail("asked for Ray"))
