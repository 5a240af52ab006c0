"""A trained model merged with the one it began from: against numpy, and the share against each merged model's score."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from pipeline.config import Config, ConfigError, load
from pipeline.data.feed import validation_rows
from pipeline.data.manifest import Manifest, read_prepared
from pipeline.model.folder import load_model
from pipeline.training.assembly import train_locally
from pipeline.training.checkpoints import best_checkpoint
from pipeline.training.merging import WEIGHTS, merged_model, merged_weights
from pipeline.training.prefetch import to_batch
from pipeline.training.validation import ranking_metrics
from tests.conftest import run_here
from tests.killed_loop import VOCABULARY, prepared


def bert(folder: Path, width: int = 32) -> Path:
    """A tiny BERT with random weights for the tokenizer of `prepared`."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(width)
    shape = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=40, **shape)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path, Manifest]:
    """A run that began from a pretrained model, its data set, and the file of its config."""
    root = tmp_path_factory.mktemp("merging")
    data = root / "prepared" / "data"
    manifest = prepared(data)
    (data / "manifest.json").write_text(json.dumps({**asdict(manifest), "files": {}}))
    settings: dict[str, Any] = {
        "storage": {"root": str(root), "run": "r"},
        "data": {"sources": [{"name": "made", "type": "json", "path": "made.jsonl"}]},
        "tokenizer": {"max_length": 16, "load_path": str(data / "tokenizer.json")},
        "model": {"pretrained": str(bert(root / "bert"))},
        "objective": {"contrastive": {}, "mlm": {"weight": 0.1}},
        "training": {"global_batch_size": 16, "max_steps": 30, "learning_rate": 2e-3, "validate_every_steps": 30},
    }
    (root / "c.yaml").write_text(yaml.safe_dump(settings))
    config = load(root / "c.yaml", environ={})
    train_locally(config, data, manifest)
    return config, data, manifest


def test_weights_are_between_the_two() -> None:
    chance = np.random.default_rng(0)
    tuned, base = ({name: chance.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()} for _ in "ab")
    ours, theirs = ({name: torch.from_numpy(each) for name, each in of.items()} for of in (tuned, base))
    ours["ids"], theirs["ids"] = torch.tensor([1, 2]), torch.tensor([3, 4])
    for share in (0.0, 0.3, 0.5, 0.9, 1.0):
        found = merged_weights(ours, theirs, share)
        assert found.pop("ids").tolist() == [1, 2]
        for name, weight in found.items():
            np.testing.assert_allclose(weight.numpy(), share * tuned[name] + (1 - share) * base[name], atol=1e-6)
    assert all(torch.equal(weight, ours[name]) for name, weight in merged_weights(ours, theirs, 1.0).items())
    ends = merged_weights(ours, theirs, 0.0)
    assert all(torch.equal(ends[name], theirs[name]) for name in SHAPES)
    for other in ({}, {**theirs, "more": theirs["a"]}, {**theirs, "a": theirs["b"]}):
        with pytest.raises(ValueError, match="of one of the two alone, or of another shape"):
            merged_weights(ours, other, 0.5)


SHAPES = {"a": (3, 4), "b": (5,)}


def test_a_merged_folder_has_the_weights_of_both(trained: tuple[Config, Path, Manifest]) -> None:
    """Against the safetensors of the checkpoint and of the pretrained model, whose names have no prefix."""
    config, _, _ = trained
    best = best_checkpoint(config.run_dir)
    assert best
    tuned = load_file(best / "model.safetensors")
    base = load_file(config.root / "bert" / "model.safetensors")
    for share in (0.0, 0.7, 1.0):
        folder, found = merged_model(config, best, share)
        assert found == share
        merged = load_file(folder / "model.safetensors")
        assert merged.keys() == tuned.keys()
        for name, weight in merged.items():
            expected = share * tuned[name] + (1 - share) * base[name.removeprefix("model.")]
            np.testing.assert_allclose(weight, expected, atol=1e-6)
            if share in (0.0, 1.0):
                assert np.array_equal(weight, expected)
        assert load_model(folder)[0].head == load_model(best)[0].head
        assert merged_model(config, best, share)[0] == folder


def test_auto_takes_the_share_that_ranks_held_out_pairs_best(
    trained: tuple[Config, Path, Manifest], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Each merged folder is scored on its own. The job exports that model, and it can be evaluated."""
    config, data, manifest = trained
    best = best_checkpoint(config.run_dir)
    assert best
    batch = to_batch(validation_rows(data, manifest, 100))
    scores = {}
    for tenths in range(11):
        model, _ = load_model(merged_model(config, best, tenths / 10)[0])
        with torch.no_grad():
            vectors = [model(batch.fields[name]) for name in ("anchor", "positive")]
        scores[tenths / 10] = ranking_metrics(*vectors, batch.keys(0), 20.0)["ndcg@10"]
    assert max(scores.values()) > scores[0.0]
    expected = max(share for share, score in scores.items() if score >= max(scores.values()) - 1e-9)
    assert merged_model(config, best, "auto")[1] == expected

    file, to = str(config.root / "c.yaml"), tmp_path / "exported"
    code, last, _, err = run_here(capsys, "export", "--config", file, "--to", str(to), "--merge-share", "auto")
    assert code == 0, err
    assert last["metrics"]["merge_share"] == expected
    assert Path(last["paths"]["model"]) == merged_model(config, best, expected)[0]
    assert "with 0.5 of the trained model, ndcg@10 is" in err
    assert (to / "config.json").is_file()


def test_what_cannot_be_merged_is_said_in_one_sentence(
    trained: tuple[Config, Path, Manifest], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config, data, _ = trained
    best = best_checkpoint(config.run_dir)
    assert best
    assert read_prepared(data)
    scratch = load(config.root / "c.yaml", ["model.pretrained=null"], environ={})
    other = load(config.root / "c.yaml", [f"model.pretrained={bert(tmp_path / 'other', 16)}"], environ={})
    without = load(config.root / "c.yaml", ["objective.contrastive=null"], environ={})
    new = load(config.root / "c.yaml", ["storage.run=new"], environ={})
    for of, model, share, sentence in (
        (scratch, best, 0.5, "--merge-share: found a run from scratch; allowed are runs that began from"),
        (other, best, 0.5, "--merge-share: found a model that did not begin from model.pretrained="),
        (config, Path(str(config.model.pretrained)), 0.5, "which is no checkpoint; leave embedding.model out"),
        (without, best, "auto", "--merge-share: found auto without a contrastive objective to choose by; give a share"),
        (new, best, "auto", "--merge-share: found auto without the prepared data of the run to choose by"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            merged_model(of, model, share)  # type: ignore[arg-type]
    for wrong in ("1.5", "-0.1", "nan", "half"):
        args = ("--config", str(config.root / "c.yaml"), "--to", str(tmp_path / "x"), f"--merge-share={wrong}")
        code, _, _, err = run_here(capsys, "export", *args)
        assert code == 2
        assert f"found '{wrong}'; allowed are 0 to 1, and auto" in err


def test_a_run_with_adapters_merges_too(trained: tuple[Config, Path, Manifest]) -> None:
    _, data, manifest = trained
    config = load(data.parents[1] / "c.yaml", ["model.lora.rank=2", "storage.run=adapted"], environ={})
    train_locally(config, data, manifest)
    model = best_checkpoint(config.run_dir)
    assert isinstance(model, Path)
    folder, _ = merged_model(config, model, 0.5)
    tuned, base = load_file(model / "model.safetensors"), load_file(Path(str(config.model.pretrained)) / WEIGHTS)
    moved = 0
    for name, weight in load_file(Path(str(folder)) / WEIGHTS).items():
        before = base[name.removeprefix("model.")]
        np.testing.assert_allclose(weight, (tuned[name] + before) / 2, atol=1e-6)
        moved += not np.array_equal(tuned[name], before)
    assert moved
