"""The token table that a teacher gives, against its formula, and in a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sentence_transformers import SentenceTransformer
from sklearn.decomposition import PCA
from tokenizers import Tokenizer, decoders, models

from pipeline.config import ConfigError, load
from pipeline.data.manifest import Manifest
from pipeline.index.encoder import TextEncoder
from pipeline.index.static_table import SIF_A, before_norm, static_rows, token_texts, with_initial_table
from pipeline.index.teacher import check_teacher
from pipeline.training.assembly import train_locally
from pipeline.training.checkpoints import best_checkpoint
from tests.conftest import no_progress, progress
from tests.test_hf_io import bert as bert
from tests.test_teacher import Data, config_of
from tests.test_teacher import data as data
from tests.test_teacher import teacher as teacher


def cosines(rows: np.ndarray) -> np.ndarray:
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit @ unit.T


@pytest.mark.parametrize("width", [3, 8])
def test_rows_are_principal_components_with_sif_weights(width: int) -> None:
    chance = np.random.default_rng(0)
    vectors, counts = chance.normal(size=(60, 8)) * np.arange(1, 9), chance.integers(0, 50, 60).astype(float)
    used = np.ones(60, bool)
    used[[0, 7]] = False
    rows = static_rows(vectors, counts, used, width)
    assert not rows[~used].any()
    weights = (SIF_A / (SIF_A + counts[used] / counts.sum()))[:, None]
    expected = PCA(width, svd_solver="full").fit_transform(vectors[used]) * weights
    np.testing.assert_allclose(cosines(rows[used]), cosines(expected), atol=1e-9)
    lengths, expected_lengths = (np.linalg.norm(each, axis=1) for each in (rows[used], expected))
    np.testing.assert_allclose(lengths / lengths.sum(), expected_lengths / expected_lengths.sum(), rtol=1e-9)


@pytest.mark.parametrize("eps", [1.0, 1e-5])
def test_the_norm_gives_the_rows(eps: float) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 8)) * 0.2
    table = before_norm(rows, eps)
    np.testing.assert_allclose(table / np.sqrt(np.square(table).mean(axis=1, keepdims=True) + eps), rows, rtol=1e-9)


def test_tokens_as_texts() -> None:
    words = {"[PAD]": 0, "[UNK]": 1, "violin": 2, "##ist": 3, "é": 4}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[PAD]", "[UNK]"])
    tokenizer.decoder = decoders.WordPiece()
    assert token_texts(tokenizer) == ["", "", "violin", "ist", "é"]


def made(data: Data, teacher: Path, *overrides: str) -> tuple[Manifest, Path]:
    config, folder, manifest = data
    told = [f"model.static_from={teacher}", "objective.distillation=null", *overrides]
    config = load(config.root.parent / "c.yaml", told, environ={})
    return with_initial_table(config, folder, manifest, progress), config.root.parent / "c.yaml"


def test_a_table_of_the_teachers_vectors(data: Data, teacher: Path) -> None:
    manifest, _ = made(data, teacher, "model.d_model=16")
    table = np.load(str(manifest.initial_table))
    tokenizer = Tokenizer.from_file(str(data[1] / "tokenizer.json"))
    counts = np.zeros(tokenizer.get_vocab_size())
    for row in pq.read_table(data[1] / "train").to_pylist():
        for tokens in (row["anchor"], row["positive"], *(row["negatives"] or [])):
            np.add.at(counts, tokens, 1)
    words = [tokenizer.decode([i], skip_special_tokens=False).strip() for i in range(len(counts))]
    used = np.array(
        [
            bool(word) and word not in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") and "\ufffd" not in word
            for word in words
        ]
    )
    vectors = SentenceTransformer(str(teacher), device="cpu").encode([w for w, u in zip(words, used, strict=True) if u])
    weights = SIF_A / (SIF_A + counts[used] / counts.sum())
    expected = PCA(16, svd_solver="full").fit_transform(vectors.astype(np.float64)) * weights[:, None]
    rows = table / np.sqrt(np.square(table).mean(axis=1, keepdims=True) + 1.0)
    assert not table[~used].any()
    scale = np.linalg.norm(rows[used]) / np.linalg.norm(expected)
    np.testing.assert_allclose(np.abs(rows[used]), np.abs(expected) * scale, atol=1e-5)


def test_a_run_starts_from_it(data: Data, teacher: Path) -> None:
    """With a rate of almost nothing, a trained model's vectors are means of the table's rows."""
    told = ["model.d_model=16", "training.learning_rate=1e-12", "training.max_steps=1", "storage.run=static"]
    manifest, file = made(data, teacher, *told)
    told += [f"model.static_from={teacher}", "objective.distillation=null"]
    config = load(file, told, environ={})
    assert config.model.dimensions()["num_layers"] == 0
    train_locally(config, data[1], manifest)
    folder = best_checkpoint(config.run_dir)
    assert isinstance(folder, Path)
    text = "merge the violin and the carpet"
    tokenizer = Tokenizer.from_file(str(data[1] / "tokenizer.json"))
    table = np.load(str(manifest.initial_table))
    rows = table / np.sqrt(np.square(table).mean(axis=1, keepdims=True) + 1.0)
    mean = rows[tokenizer.encode(text).ids].mean(axis=0)
    (found,) = TextEncoder(folder, device="cpu").encode([text])
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=1e-5)


def test_it_is_made_once(data: Data, teacher: Path) -> None:
    manifest, file = made(data, teacher, "model.d_model=16")
    config = load(file, [f"model.static_from={teacher}", "model.d_model=16"], environ={})
    assert with_initial_table(config, data[1], data[2], no_progress) == manifest


def test_what_is_refused(data: Data, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.d_model: found 64; allowed are at most 32, the size of the vectors"):
        made(data, teacher, "model.d_model=64")
    with pytest.raises(ConfigError, match=r"model\.static_from: .*/missing: no such folder"):
        check_teacher(config_of(tmp_path, teacher, f"model.static_from={tmp_path}/missing"))
    with pytest.raises(ConfigError, match="either pretrained or static_from, not both"):
        config_of(tmp_path, teacher, "model.pretrained=a/b", "model.static_from=a/b")
