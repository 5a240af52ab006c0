"""Views of texts: crops that depend on record, seed and epoch alone, and the same text twice under dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Config, Objective, load
from pipeline.data.feed import LocalFeed, training_plan
from pipeline.model.batch import EMPTY, Batch
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.learner import Learner
from pipeline.model.packing import Packed, pack
from pipeline.model.transformer import Encoder, EncoderShape
from pipeline.model.views import Frame, Prompts, Views
from pipeline.training.assembly import build_views, train_locally
from pipeline.training.checkpoints import newest_valid, resume_point
from pipeline.training.prefetch import to_batch
from tests.killed_loop import prepared

CLS, SEP = 2, 3
FRAME = Frame((CLS,), (SEP,), max_length=64)
CROPS = Views("crops", FRAME, seed=0)

texts = st.lists(st.lists(st.integers(10, 99), min_size=1, max_size=62), min_size=1, max_size=6)


def rows(packed: Packed) -> list[list[int]]:
    return [packed.slice(i, i + 1).ids.tolist() for i in range(len(packed))]


def batch(bodies: list[list[int]], ids: list[str] | None = None) -> Batch:
    framed = pack([[CLS, *body, SEP] for body in bodies])
    return Batch(ids or [f"r{i}" for i in range(len(bodies))], {"text": framed}, EMPTY, [0] * len(bodies))


def views_of(
    views: Views, bodies: list[list[int]], epoch: int = 0, ids: list[str] | None = None
) -> list[list[list[int]]]:
    """Both views of each text."""
    found = views.of(batch(bodies, ids), ["s"] * len(bodies), epoch).views
    assert found
    return [list(pair) for pair in zip(*map(rows, found), strict=True)]


def is_within(part: list[int], whole: list[int]) -> bool:
    return any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


@given(texts, st.integers(0, 2**32 - 1), st.integers(0, 1000))
def test_crops_are_spans_of_a_twentieth_to_a_half(bodies: list[list[int]], seed: int, epoch: int) -> None:
    for body, pair in zip(bodies, views_of(Views("crops", FRAME, seed), bodies, epoch), strict=True):
        for view in pair:
            assert (view[0], view[-1]) == (CLS, SEP)
            assert is_within(view[1:-1], body)
            if len(body) < 10:
                assert view[1:-1] == body
            else:
                assert max(5, int(0.05 * len(body))) <= len(view) - 2 <= max(5, 0.5 * len(body))


@given(texts, st.integers(0, 2**32 - 1), st.integers(0, 1000), st.randoms(use_true_random=False))
def test_crops_depend_on_record_tokens_seed_and_epoch_alone(
    bodies: list[list[int]], seed: int, epoch: int, chance: object
) -> None:
    """In whatever batch, order and process: each row alone gives what it gives among others."""
    views, ids = Views("crops", FRAME, seed), [f"r{i}" for i in range(len(bodies))]
    together = dict(zip(ids, views_of(views, bodies, epoch), strict=True))
    order = list(range(len(bodies)))
    chance.shuffle(order)  # type: ignore[attr-defined]
    for i in order:
        assert views_of(views, [bodies[i]], epoch, [ids[i]]) == [together[ids[i]]]


def test_crops_change_with_each_of_them() -> None:
    bodies = [list(range(10, 70))] * 40
    ids = [f"r{i}" for i in range(40)]
    found = views_of(CROPS, bodies)
    for other in (
        views_of(CROPS, bodies, epoch=1),
        views_of(Views("crops", FRAME, seed=1), bodies),
        views_of(CROPS, bodies, ids=ids[::-1]),
        views_of(CROPS, [body[::-1] for body in bodies]),
    ):
        assert sum(a == b for a, b in zip(found, other, strict=True)) < 4
    assert sum(first == second for first, second in found) < 4


def test_lengths_and_places_of_crops_are_uniform() -> None:
    """Against the moments of the uniform distribution, over 4,000 crops of texts of 100 tokens."""
    frame = Frame((CLS,), (SEP,), 128)
    found = views_of(Views("crops", frame, 0), [list(range(1000, 1100))] * 2000)
    crops = [view[1:-1] for pair in found for view in pair]
    sizes = np.array([len(crop) for crop in crops])
    places = np.array([(crop[0] - 1000) / (100 - len(crop)) for crop in crops])
    assert sizes.mean() == pytest.approx((5 + 49) / 2, abs=1)
    assert sizes.std() == pytest.approx(45 / 12**0.5, abs=0.5)
    assert places.mean() == pytest.approx(0.5, abs=0.02)
    first, second = (np.array([len(pair[i]) for pair in found]) for i in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.08


def test_prompts_are_taken_from_texts_and_put_before_views() -> None:
    """The query's before the first view, the document's before the second; sources have their own."""
    views = Views("crops", FRAME, 0, {"a": Prompts((50, 51), (60, 61)), "b": Prompts((), (70,))})
    body = list(range(100, 140))
    stored = pack([[CLS, 60, 61, *body, SEP], [CLS, 70, *body, SEP], [CLS, *body, SEP], [CLS, 60, *body, SEP]])
    made = views.of(Batch(["w", "x", "y", "z"], {"text": stored}, EMPTY, [0] * 4), ["a", "b", "c", "a"], epoch=0)
    assert made.views
    expected = [[(50, 51), (60, 61)], [(), (70,)], [(), ()], [(50, 51), (60, 61)]]
    for pair, prompts in zip(zip(*map(rows, made.views), strict=True), expected, strict=True):
        for view, prompt in zip(pair, prompts, strict=True):
            assert view[1 : 1 + len(prompt)] == list(prompt)
            assert is_within(view[1 + len(prompt) : -1], body)


def test_views_fit_the_longest_text() -> None:
    views = Views("dropout", Frame((CLS,), (SEP,), 8), 0, {"s": Prompts((50, 51, 52), ())})
    assert views_of(views, [[10, 11, 12, 13, 14, 15]]) == [
        [[CLS, 50, 51, 52, 10, 11, 12, SEP], [CLS, 10, 11, 12, 13, 14, 15, SEP]]
    ]
    endless = Views("crops", Frame((CLS,), (SEP,), 8), 0, {"s": Prompts(tuple(range(50, 90)), ())})
    assert views_of(endless, [[10, 11]])[0][0] == [CLS, *range(50, 56), SEP]


def test_prompts_of_a_config_are_tokenized_as_texts_are(tmp_path: Path) -> None:
    """Against the tokenizer's own tokens of prompt and text together."""
    prepared(tmp_path / "data")
    from tokenizers import Tokenizer, pre_tokenizers

    tokenizer = Tokenizer.from_file(str(tmp_path / "data" / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    (tmp_path / "c.yaml").write_text(
        "objective: {contrastive: {views: dropout}}\nmodel: {dropout: 0.1}\ndata: {sources: [{name: s, type: json, "
        "path: s.jsonl, fields: {text: t}, prompts: {anchor: 'w1 w2 ', text: 'w3 '}}]}\n"
    )
    views = build_views(load(tmp_path / "c.yaml", [f"storage.root={tmp_path}"], environ={}), tokenizer)
    assert views
    stored = tokenizer.encode("w3 w10 w11 w12").ids
    made = views.of(Batch(["r"], {"text": pack([stored])}, EMPTY, [0]), ["s"], 0).views
    assert made
    assert [rows(each)[0] for each in made] == [tokenizer.encode("w1 w2 w10 w11 w12").ids, stored]


def test_views_of_equal_texts_are_no_negatives() -> None:
    """By the keys of whole texts: crops of one text, or of two records with the same text, never count as wrong."""
    body = list(range(10, 60))
    keys = CROPS.of(batch([body, body, body[::-1]]), ["s"] * 3, 0).keys(slots=0)
    assert keys.shape == (3, 3)
    assert bool((keys[:, 1] == keys[:, 2]).all())
    assert int(keys[0, 1]) == int(keys[1, 1]) != int(keys[2, 1])
    assert len(set(keys[:, 0].tolist())) == 3


def test_dropout_contrasts_two_passes_over_the_same_text() -> None:
    views = Views("dropout", FRAME, 0)
    body = list(range(10, 30))
    made = views.of(batch([body, body[::-1]]), ["s"] * 2, 0)
    assert made.views
    assert rows(made.views[0]) == rows(made.views[1]) == rows(made.text)
    shape = EncoderShape(vocab_size=64, d_model=16, num_layers=1, num_heads=2, d_ff=24, dropout=0.2)
    learner = Learner(EmbeddingModel(Encoder(shape)), Objective.model_validate({"contrastive": {}}), views=views)
    torch.manual_seed(0)
    first, second = learner.train().embed(learner.prepare(made, 0)).split(2)
    assert not torch.isclose(first, second).all(dim=1).any()
    first, second = learner.eval().embed(learner.prepare(made, 0)).split(2)
    torch.testing.assert_close(first, second)


def test_batches_have_the_same_crops_on_one_and_two_workers_and_none_of_a_held_out_text(tmp_path: Path) -> None:
    """Over three epochs, against crops of each row alone. A text's crops change with the epoch."""
    plan = training_plan(tmp_path / "d", prepared(tmp_path / "d", 24, pairs=False), 8, seed=0)
    shards = [pq.read_table(path) for path in sorted((tmp_path / "d").glob("train/*.parquet"))]
    bodies = {row["id"]: row["text"][1:-1] for shard in shards for row in shard.to_pylist()}

    def seen(rank: int, world_size: int, start: int = 0) -> list[dict[str, list[list[int]]]]:
        """By step, both views of each record."""
        steps = []
        for read in LocalFeed(plan, rank, world_size).batches(start, 9):
            made = to_batch(read, views=CROPS)
            assert made.views
            steps.append({one: [*pair] for one, *pair in zip(made.ids, *map(rows, made.views), strict=True)})
        return steps

    whole = seen(0, 1)
    assert [first | second for first, second in zip(seen(0, 2), seen(1, 2), strict=True)] == whole
    assert seen(0, 1, start=5) == whole[5:]
    for step, found in enumerate(whole):
        for one, pair in found.items():  # an id of the training split, and nothing but spans of its own text
            assert [pair] == views_of(CROPS, [bodies[one]], step // 3, [one])
    epochs = [{one: pair for found in whole[3 * e : 3 * e + 3] for one, pair in found.items()} for e in range(3)]
    assert epochs[0].keys() == epochs[1].keys() == bodies.keys()
    long = [one for one, body in bodies.items() if len(body) >= 15]
    assert sum(epochs[0][one] == epochs[1][one] for one in long) < len(long) / 3


CONFIG: dict[str, Any] = {
    "data": {"sources": [{"name": "made", "type": "json", "path": "made.jsonl", "fields": {"text": "text"}}]},
    "tokenizer": {"max_length": 48},
    "model": {"d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 2, "dropout": 0.1},
    "training": {
        "global_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "max_steps": 20,
        "validate_every_steps": 8,
        "log_every_steps": 1,
    },
    "checkpointing": {"every_steps": 5},
}


class StoppedError(Exception): ...


@pytest.mark.parametrize("kind", ["crops", "dropout"])
@pytest.mark.parametrize("pairs", [False, True])
def test_a_resumed_run_ends_with_the_same_bits(kind: str, pairs: bool, tmp_path: Path) -> None:
    """Of texts alone, and of pairs, whose positives are contrasted."""
    data, manifest = tmp_path / "data", prepared(tmp_path / "data", pairs=pairs)
    objective = {"contrastive": {"views": kind, "learn_temperature": True}, "mlm": {"weight": 0.5}}

    def config_of(run: str) -> Config:
        settings = CONFIG | {"objective": objective, "storage": {"root": str(tmp_path), "run": run}}
        if pairs:
            settings["data"] = {"sources": [{"name": "made", "type": "json", "path": "made.jsonl"}]}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
        return load(tmp_path / "c.yaml", environ={})

    def stop(metrics: dict[str, float]) -> None:
        if metrics["step"] >= 14:
            raise StoppedError

    alone, killed = config_of("alone"), config_of("killed")
    state = train_locally(alone, data, manifest)
    assert 0 < state.metrics["validation_ndcg@10"] <= 1
    with pytest.raises(StoppedError):
        train_locally(killed, data, manifest, stop)
    assert resume_point(killed.run_dir).state.step == 10
    assert train_locally(killed, data, manifest).metrics == state.metrics
    ended = [newest_valid(config.run_dir).folder / "model.safetensors" for config in (alone, killed)]  # type: ignore[operator]
    assert ended[0].read_bytes() == ended[1].read_bytes()


def test_texts_that_are_nearly_all_too_short_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, manifest = tmp_path / "data", prepared(tmp_path / "data", pairs=False)
    for longest, warned in ((11, True), (12, False)):  # with [CLS] and [SEP]
        manifest.lengths["text"]["p90"] = longest
        settings = CONFIG | {"storage": {"root": str(tmp_path), "run": f"r{longest}"}}
        settings |= {"objective": {"contrastive": {"views": "crops"}}, "training": {"max_steps": 1}}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
        caplog.clear()
        train_locally(load(tmp_path / "c.yaml", environ={}), data, manifest)
        found = [each.getMessage() for each in caplog.records if "nine of ten texts" in each.getMessage()]
        assert len(found) == warned
        if found:
            assert "at most 9 tokens" in found[0]
