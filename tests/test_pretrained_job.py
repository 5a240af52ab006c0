"""A pretrained encoder through the whole job: long texts alone, denoising and masking, an STS file, an export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from pipeline.data.tokenizer import train_tokenizer
from tests.conftest import make_pairs, run_here


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with random weights and a WordPiece tokenizer that frames texts."""
    from transformers import BertConfig, BertModel

    texts = [str(row["positive"]) for row in make_pairs(200)]
    tokenizer = train_tokenizer(texts, kind="wordpiece", vocab_size=512, lowercase=True)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder = tmp_path_factory.mktemp("pretrained") / "bert"
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = BertConfig(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=40, **shape)
    BertModel(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def run(config: Path, capsys: pytest.CaptureFixture[str], name: str, *args: str) -> tuple[int, Any, str]:
    code, last, _, err = run_here(capsys, name, "--config", str(config), *args)
    return code, last, err


@pytest.fixture(scope="module")
def config(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("texts")
    (tmp_path / "texts").mkdir()
    for number in range(30):
        text = " ".join(str(row["positive"]) for row in make_pairs(12, seed=number))
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    sts = [f"{score}\ta page on {one}\ta page on {two}\n" for score, one, two in ("5aa", "1bc", "0de")]
    (tmp_path / "sts.tsv").write_text("".join(["score\tsentence1\tsentence2\n", *sts]))
    source = {"name": "t", "type": "text", "path": str(tmp_path / "texts"), "fields": {"text": "text"}}
    file = tmp_path / "c.yaml"
    sections = {
        "storage": {"root": str(tmp_path / "store"), "run": "texts"},
        "data": {"sources": [source], "validation_fraction": 0.2},
        "tokenizer": {"max_length": 32, "long_texts": "windows", "window_overlap": 4},
        "model": {"pretrained": str(bert), "decoder_layers": 1, "matryoshka_dims": [16]},
        "objective": {"contrastive": {"views": "crops"}, "denoising": {}, "mlm": {"weight": 0.5}},
        "training": {"global_batch_size": 16, "max_steps": 4, "generated_texts": 4},
        "embedding": {"dimensions": 16},
        "evaluation": {"sts_file": str(tmp_path / "sts.tsv")},
        "scaling": {"num_workers": 1},
    }
    file.write_text(json.dumps(sections))
    return file


@pytest.mark.usefixtures("ray_cluster")
def test_texts_alone_train_a_pretrained_encoder(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, last, err = run(config, capsys, "run")
    assert code == 0, err
    metrics = last["metrics"]
    assert metrics["prepare"]["rows_kept"] == 30
    assert metrics["prepare"]["splits"]["train"] > 100  # windows
    validated = [
        "ndcg@10",
        "denoising_nll",
        "denoising_perplexity",
        "denoising_bleu",
        "denoising_rougeL",
        "mlm_perplexity",
    ]
    assert metrics["train"].keys() >= {f"validation_{name}" for name in validated}
    assert "parameters:" in err
    assert metrics["embed"]["rows"] == 30
    assert metrics["evaluate"]["sts"]["pairs"] == 3
    assert "Spearman" in err

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, last, err = run(config, capsys, "export", "--to", str(tmp_path / "exported"), "--embeddings", "float32")
    assert code == 0, err
    from sentence_transformers import SentenceTransformer

    from pipeline.index.encoder import TextEncoder

    texts = [str(row["positive"]) for row in make_pairs(20)]
    ours = TextEncoder(Path(last["paths"]["model"])).encode(texts)
    theirs = SentenceTransformer(str(tmp_path / "exported"), device="cpu").encode(texts)
    assert (ours * theirs).sum(axis=1).min() > 0.9999


def test_what_does_not_fit_is_refused_before_training(
    bert: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ray_cluster: None
) -> None:
    plain = Path(shutil.copytree(bert, tmp_path / "plain"))
    described = json.loads((plain / "config.json").read_text())
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (plain / "config.json").write_text(json.dumps(described | none))
    for options, sentence in (
        (["objective.contrastive.views=given"], "objective: found prepared records with only text"),
        (["tokenizer.max_length=64"], "tokenizer.max_length: found 64; model.pretrained="),
        (["model.pretrained=nowhere/at-all", "tokenizer.load_path=nowhere"], "nowhere"),
        (["model.matryoshka_dims=[32]"], "model.matryoshka_dims: found [32]; allowed are sizes below 32"),
        (
            [f"model.pretrained={plain}", "objective.contrastive.views=dropout"],
            "objective.contrastive.views: found dropout, but the config.json of model.pretrained=",
        ),
        (["evaluation.sts_file=nowhere.tsv"], "evaluation.sts_file: nowhere.tsv: No such file"),
    ):
        code, _, err = run(config, capsys, "train", "storage.run=other", *options)
        assert code == 2, err
        assert sentence in err
