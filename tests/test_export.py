"""Exports against what others make of them: sentence-transformers, transformers and onnxruntime, off the network."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import BPE

from pipeline.config import ConfigError, load
from pipeline.data.manifest import Manifest, SourceCount
from pipeline.data.read_text import docstring_pairs
from pipeline.data.tokenizer import train_tokenizer
from pipeline.evaluation.embedding_matrix import load_embeddings, save_embeddings_for_model
from pipeline.evaluation.export import exporting, refuse_foreign
from pipeline.evaluation.model_card import model_card, read_origin
from pipeline.index.published import encoder_recipe, table_of
from pipeline.index.table import VectorTable
from pipeline.model import hf_export
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.folder import Head, Projection, load_model, model_fingerprint, read_model_spec, save_model
from pipeline.model.hf_export import export_model, pad_token_id
from pipeline.model.onnx import PaddedEmbedder, export_onnx
from pipeline.model.packing import pack
from pipeline.model.transformer import Encoder, EncoderShape
from tests.conftest import run_here

WIDTH, VOCABULARY, MAX_LENGTH = 64, 1200, 48
VARIANTS = {
    "table": ({"num_layers": 0}, Head(prompts=(("query", "find: "),)), "bpe"),
    "table of maxima": ({"num_layers": 0}, Head(pooling="max"), "bpe"),
    "root of length": ({"num_layers": 0}, Head(pooling="mean_sqrt_len", normalize=False), "wordpiece"),
    "projected": (
        {"num_layers": 1},
        Head(projections=(Projection(48, activation="GELU"), Projection(40, bias=False, unit_input=True))),
        "bpe",
    ),
    "projected table": ({"num_layers": 0}, Head(normalize=False, projections=(Projection(64, residual=True),)), "bpe"),
    "grouped": ({"num_layers": 1, "num_kv_heads": 2}, Head(dimensions=(16,)), "bpe"),
    "cls": ({"num_layers": 1}, Head(pooling="cls"), "wordpiece"),
    "last": ({"num_layers": 1}, Head(pooling="last"), "unigram"),
    "weighted": (
        {"num_layers": 2, "rope_theta": 500.0},
        Head(pooling="weighted", normalize=False, prompts=(("query", "find: "), ("document", "text: "))),
        "bpe",
    ),
}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """1,000 names, docstrings and functions of an installed package, 1 to some hundred tokens long."""
    files = sorted((Path(np.__file__).parent / "lib").glob("*.py"))
    found = [pair for file in files for pair in docstring_pairs(file.read_text("utf-8"))]
    return [text for pair in found for text in (pair.name, pair.docstring, pair.code)][:1000]


@pytest.fixture(scope="module")
def checkpoints(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders of random encoders."""
    settings = {"vocab_size": VOCABULARY}
    kinds = {kind for _, _, kind in VARIANTS.values()}
    tokenizers = {k: train_tokenizer(texts[:400], kind=k, lowercase=k != "bpe", **settings) for k in kinds}
    made = VARIANTS.items()
    return {n: checkpoint(tmp_path_factory.mktemp(n), layers, head, tokenizers[k]) for n, (layers, head, k) in made}


def checkpoint(folder: Path, layers: dict[str, Any], head: Head, tokenizer: Tokenizer) -> Path:
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "d_model": WIDTH, "num_heads": 4, "d_ff": 96, "norm_eps": 1e-3}
    encoder = Encoder(EncoderShape(**{**shape, **layers}))
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = EmbeddingModel(encoder, head)
    save_model(folder, model, tokenizer.to_str(), MAX_LENGTH)
    return folder


@pytest.fixture(scope="module")
def exports(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, source in checkpoints.items():
        folders[name] = tmp_path_factory.mktemp(f"exported-{name}")
        assert export_model(source, folders[name]) >= 0.9999
    return folders


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    attempts: list[object] = []

    def connect(self: socket.socket, address: object) -> None:
        attempts.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **rest: connect(None, args))  # type: ignore[arg-type]
    yield
    assert attempts == []


@torch.inference_mode()
def ours(source: Path, texts: list[str]) -> np.ndarray:
    """(N, D), packed, 100 texts at a time."""
    model, tokenizer = load_model(source)
    sequences = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate([model(pack(sequences[i : i + 100])).numpy() for i in range(0, len(sequences), 100)])


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


class TestFolder:
    def test_the_texts_are_of_mixed_length(self, checkpoints: dict[str, Path], texts: list[str]) -> None:
        lengths = [len(encoding.ids) for encoding in load_model(checkpoints["table"])[1].encode_batch(texts)]
        assert (len(texts), min(lengths), max(lengths)) == (1000, 1, MAX_LENGTH)
        assert len(set(lengths)) > 40

    @pytest.mark.parametrize("name", VARIANTS)
    def test_sentence_transformers_gives_our_vectors(
        self, name: str, checkpoints: dict[str, Path], exports: dict[str, Path], texts: list[str]
    ) -> None:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(exports[name]), device="cpu")
        theirs, own = model.encode(texts), ours(checkpoints[name], texts)
        assert cosines(theirs, own).min() >= 0.9999
        np.testing.assert_allclose(np.linalg.norm(theirs, axis=1), np.linalg.norm(own, axis=1), rtol=1e-3)
        head = VARIANTS[name][1]
        is_static = name in ("table", "projected table")  # its tokenizer.json truncates
        assert type(model[0]).__name__ == ("StaticEmbedding" if is_static else "Transformer")
        assert (model.max_seq_length, model.similarity_fn_name) == (math.inf if is_static else MAX_LENGTH, "cosine")
        prompts = {use: head.prompt(use) for use in ("query", "document")}
        assert model.prompts == prompts
        few = texts[:20]
        for use, encode in {"query": model.encode_query, "document": model.encode_document}.items():
            led = ours(checkpoints[name], [prompts[use] + text for text in few])
            assert cosines(encode(few), led).min() >= 0.9999
        for size in head.dimensions:
            shortened = SentenceTransformer(str(exports[name]), device="cpu", truncate_dim=size)
            expected = torch.nn.functional.normalize(torch.from_numpy(theirs[:20, :size]), dim=1)
            np.testing.assert_allclose(shortened.encode(few, normalize_embeddings=True), expected, atol=1e-5)

    @torch.inference_mode()
    @pytest.mark.parametrize("name", ["table", "grouped"])
    def test_transformers_and_a_mean_by_hand_give_our_vectors(
        self, name: str, checkpoints: dict[str, Path], exports: dict[str, Path], texts: list[str]
    ) -> None:
        from transformers import AutoModel, AutoTokenizer

        model, found = AutoModel.from_pretrained(exports[name], output_loading_info=True)
        assert type(model).__name__ == "EuroBertModel"
        assert not any(found.values())
        tokenizer, theirs = AutoTokenizer.from_pretrained(exports[name]), []
        for start in range(0, len(texts), 100):
            batch = tokenizer(texts[start : start + 100], truncation=True, padding=True, return_tensors="pt")
            states, mask = model(**batch).last_hidden_state, batch["attention_mask"][:, :, None]
            theirs.append((states * mask).sum(1) / mask.sum(1))
        assert cosines(torch.cat(theirs).numpy(), ours(checkpoints[name], texts)).min() >= 0.9999

    @pytest.mark.parametrize("name", ["table", "cls", "last"])  # a tokenizer of each kind
    def test_the_tokenizer_gives_our_ids(
        self, name: str, checkpoints: dict[str, Path], exports: dict[str, Path], texts: list[str]
    ) -> None:
        from transformers import AutoTokenizer

        hard = ["", " ", "\n\n a\t b ", "[MASK] it [SEP]", "Ünï\u0301 İ 漢字 🙂", "x" * 500, "<s>", "\u200b\ufeff"]
        theirs = AutoTokenizer.from_pretrained(exports[name])
        own = load_model(checkpoints[name])[1]
        assert theirs(texts + hard, truncation=True)["input_ids"] == [e.ids for e in own.encode_batch(texts + hard)]
        assert (theirs.pad_token, theirs.pad_token_id, theirs.padding_side) == ("[PAD]", 0, "right")

    @pytest.mark.parametrize("family", ["bert", "xlm-roberta", "modernbert"])
    def test_a_pretrained_encoder_keeps_its_own_config_and_frame(
        self, family: str, texts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        from sentence_transformers import SentenceTransformer

        source = pretrained_checkpoint(tmp_path / "source", family, texts)
        (tmp_path / "out").mkdir()
        assert export_model(source, tmp_path / "out") >= 0.9999
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert (config["model_type"], "auto_map" in config) == (family, False)
        caplog.clear()
        model = SentenceTransformer(str(tmp_path / "out"), device="cpu")
        assert "MISSING" not in caplog.text
        assert model.tokenizer("a word")["input_ids"][0] == model.tokenizer.convert_tokens_to_ids("[CLS]")
        assert cosines(model.encode(texts), ours(source, texts)).min() >= 0.9999

    def test_learned_positions_are_refused(self, checkpoints: dict[str, Path], tmp_path: Path) -> None:
        layers = {"num_layers": 1, "positions": "learned", "max_positions": MAX_LENGTH}
        tokenizer = Tokenizer.from_file(str(checkpoints["table"] / "tokenizer.json"))
        (tmp_path / "out").mkdir()
        with pytest.raises(ConfigError, match=r"found learned; exports need model\.positions=rotary$"):
            export_model(checkpoint(tmp_path, layers, Head(), tokenizer), tmp_path / "out")

    def test_padding_takes_a_token_that_is_special_already(self, checkpoints: dict[str, Path]) -> None:
        spec, tokenizer = read_model_spec(checkpoints["table"]), Tokenizer(BPE())
        with pytest.raises(ConfigError, match="no special token to pad with"):
            pad_token_id(spec, tokenizer)
        tokenizer.add_special_tokens(["<s>", "<|endoftext|>"])
        assert tokenizer.id_to_token(pad_token_id(spec, tokenizer)) == "<|endoftext|>"
        spec.shape["pad_token_id"] = tokenizer.token_to_id("<s>")
        assert tokenizer.id_to_token(pad_token_id(spec, tokenizer)) == "<s>"

    def test_an_export_that_gives_other_vectors_fails(
        self, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:

        def wrong(*args: Any) -> dict[str, Any]:
            return {**right(*args), "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}

        right = hf_export.eurobert_config
        monkeypatch.setattr(hf_export, "eurobert_config", wrong)
        with pytest.raises(RuntimeError, match="please report this bug"):
            export_model(checkpoints["weighted"], tmp_path)


def pretrained_checkpoint(folder: Path, family: str, texts: list[str]) -> Path:
    """A random encoder of transformers with texts framed by [CLS] and [SEP], as a checkpoint of ours."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoConfig

    from pipeline.model.pretrained import PretrainedEncoder

    tokenizer = train_tokenizer(texts[:400], kind="wordpiece", vocab_size=VOCABULARY, lowercase=True)
    frame = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=frame)
    shape = {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 2)}
    limits = {"vocab_size": VOCABULARY, "max_position_embeddings": MAX_LENGTH + 2}
    config = AutoConfig.for_model(family, **shape, **limits, **ids)
    torch.manual_seed(0)
    encoder = PretrainedEncoder.from_description(json.loads(config.to_json_string(use_diff=False)))
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder.mkdir()
    save_model(folder, EmbeddingModel(encoder, Head(pooling="cls")), tokenizer.to_str(), MAX_LENGTH)
    return folder


class TestOnnx:
    @torch.inference_mode()
    @pytest.mark.parametrize("name", VARIANTS)
    def test_what_is_traced_pools_as_we_do(
        self, name: str, checkpoints: dict[str, Path], exports: dict[str, Path], texts: list[str]
    ) -> None:
        from transformers import AutoModel, AutoTokenizer

        embedder = PaddedEmbedder(AutoModel.from_pretrained(exports[name]), load_model(checkpoints[name])[0]).eval()
        tokenizer = AutoTokenizer.from_pretrained(exports[name])
        batch = tokenizer([*texts[:100], ""], truncation=True, padding=True, return_tensors="pt")
        vectors = embedder(**batch).numpy()
        np.testing.assert_allclose(vectors[:100], ours(checkpoints[name], texts[:100]), atol=1e-3)
        assert not vectors[100].any()

    @pytest.mark.parametrize("name", ["table", "grouped"])
    def test_onnxruntime_gives_our_vectors(
        self, name: str, checkpoints: dict[str, Path], exports: dict[str, Path], texts: list[str], tmp_path: Path
    ) -> None:
        import onnxruntime

        for file in exports[name].glob("*.*"):
            (tmp_path / file.name).symlink_to(file)
        assert export_onnx(tmp_path, load_model(checkpoints[name])[0]) >= 0.9999
        assert str(Path(__file__).parents[1]).encode() not in (tmp_path / "model.onnx").read_bytes()
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        found = [(given.name, given.shape) for given in session.get_inputs()]
        assert found == [(key, ["batch", "length"]) for key in ("input_ids", "attention_mask")]
        tokenizer, theirs = load_model(checkpoints[name])[1], []
        tokenizer.enable_padding(pad_id=0)
        for start, count in ((0, 1), (1, 2), (3, 97), (100, 200)):
            encodings = tokenizer.encode_batch(texts[start : start + count])
            inputs = {"input_ids": [e.ids for e in encodings], "attention_mask": [e.attention_mask for e in encodings]}
            theirs += session.run(["sentence_embedding"], {key: np.array(value) for key, value in inputs.items()})
        assert cosines(np.concatenate(theirs), ours(checkpoints[name], texts[:300])).min() >= 0.999


def vectors_of(count: int, seed: int = 0) -> pa.Table:
    """Rows as the store has them, in no order."""
    chance = np.random.default_rng(seed)
    vectors = chance.standard_normal((count, 6)).astype(np.float32)
    order = np.random.default_rng(seed + 1).permutation(count)
    columns = {
        "id": [f"{i * 7919 % 65_536:04x}" for i in range(count)],
        "source_id": [f"pages/{i}" for i in range(count)],
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 6),
    }
    return pa.table(columns).take(order)


def scan_of(table: pa.Table) -> Any:
    return lambda columns: table.select(columns).to_batches(max_chunksize=7)


class TestEmbeddingMatrix:
    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_rows_belong_to_their_ids(self, dtype: Any, tmp_path: Path) -> None:
        table = vectors_of(50)
        assert save_embeddings_for_model(tmp_path / "out", scan_of(table), model="9f0c", dtype=dtype) == 50
        layer, ids = load_embeddings(tmp_path / "out")
        vectors = {row["id"]: row["vector"] for row in table.to_pylist()}
        assert ids == sorted(vectors)
        assert (layer.weight.dtype, layer.weight.requires_grad) == (getattr(torch, dtype), False)
        looked_up = layer(torch.arange(50)).float().numpy()
        np.testing.assert_allclose(looked_up, [vectors[i] for i in ids], rtol=0 if dtype == "float32" else 1e-3)
        np.testing.assert_array_equal(load_file(tmp_path / "out" / "embeddings.safetensors")["weight"], layer.weight)
        rows = pq.read_table(tmp_path / "out" / "ids.parquet").to_pylist()
        assert [row["row"] for row in rows] == list(range(50))
        assert {row["id"]: row["source_id"] for row in rows} == {r["id"]: r["source_id"] for r in table.to_pylist()}
        described = json.loads((tmp_path / "out" / "embeddings.json").read_text())
        expected = {"version": 1, "dtype": dtype, "rows": 50, "width": 6, "model": "9f0c"}
        assert {key: described[key] for key in expected} == expected

    def test_neither_the_order_of_the_rows_nor_the_store_changes_a_byte(self, tmp_path: Path) -> None:
        table, rows = VectorTable(tmp_path / "lancedb", "vectors", 6), vectors_of(30)
        with table.writing() as writer:
            for part in (rows.slice(0, 11), rows.slice(11)):
                writer.append(table.write(with_all_columns(part, table)))
        backwards = rows.take(list(range(30))[::-1])
        scans = {"direct": scan_of(rows), "backwards": scan_of(backwards), "stored": table.scan}
        for name, scan in scans.items():
            save_embeddings_for_model(tmp_path / name, scan, model="9f0c")
            for file in (tmp_path / "direct").iterdir():
                assert file.read_bytes() == (tmp_path / name / file.name).read_bytes()

    def test_changed_files_and_other_versions_are_refused(self, tmp_path: Path) -> None:
        save_embeddings_for_model(tmp_path / "out", scan_of(vectors_of(9)), model="9f0c")
        for name in ("embeddings.safetensors", "ids.parquet"):
            whole = (tmp_path / "out" / name).read_bytes()
            changed = bytearray(whole)
            changed[len(whole) // 2] ^= 1
            (tmp_path / "out" / name).write_bytes(changed)
            with pytest.raises(ValueError, match=rf"{name} is missing or does not match embeddings\.json"):
                load_embeddings(tmp_path / "out")
            (tmp_path / "out" / name).write_bytes(whole)
        marker = tmp_path / "out" / "embeddings.json"
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"version": 2}))
        with pytest.raises(ValueError, match="has version 2; this reader supports version 1"):
            load_embeddings(tmp_path / "out")
        marker.write_text("{}")
        with pytest.raises(ValueError, match=r"its embeddings\.json is missing or broken"):
            load_embeddings(tmp_path / "out")

    def test_rows_that_make_no_matrix_are_refused(self, tmp_path: Path) -> None:
        few, more = vectors_of(9), vectors_of(10)
        refused = {
            "there are no vectors": scan_of(few.slice(0, 0)),
            "duplicate id": scan_of(pa.concat_tables([few, few.slice(0, 1)])),
            "changed during": lambda columns: (more if "vector" in columns else few).select(columns).to_batches(),
            "changed during the": lambda columns: (few if "vector" in columns else more).select(columns).to_batches(),
        }
        for words, scan in refused.items():
            with pytest.raises(ValueError, match=words):
                save_embeddings_for_model(tmp_path / "out", scan, model="9f0c")
        huge = few.set_column(2, "vector", pa.FixedSizeListArray.from_arrays(pa.array(np.full(54, 1e6, np.float32)), 6))
        with pytest.raises(ValueError, match="not finite in float16"):
            save_embeddings_for_model(tmp_path / "out", scan_of(huge), model="9f0c", dtype="float16")
        assert list(tmp_path.iterdir()) == []


def with_all_columns(rows: pa.Table, table: VectorTable) -> pa.Table:
    """Rows with nulls in the columns that they lack."""
    columns = {field.name: pa.nulls(len(rows), field.type) for field in table.schema}
    columns |= {name: rows[name] for name in rows.column_names}
    return pa.table([columns[name] for name in table.schema.names], schema=table.schema)


class TestDestination:
    def test_an_earlier_export_is_replaced_whole_and_nothing_else_is(self, tmp_path: Path) -> None:
        folder = tmp_path / "new" / "out"
        for name in ("first.txt", "second.txt"):
            with exporting(folder, "m.json", {"version": 1}) as temporary:
                (temporary / "inner").mkdir()
                (temporary / "inner" / name).write_text(name)
            assert [p.name for p in (folder / "inner").iterdir()] == [name]
        (folder / ".git").mkdir()
        (folder / ".git" / "HEAD").write_text("ref")
        with pytest.raises(ConfigError, match=r"holds \.git/HEAD, which no export wrote"):
            refuse_foreign(folder, "m.json")
        assert sorted(p.name for p in folder.parent.iterdir()) == ["out"]

    def test_a_failure_leaves_the_earlier_one(self, tmp_path: Path) -> None:
        folder = tmp_path / "out"
        with exporting(folder, "m.json", {}):
            pass
        with pytest.raises(FileNotFoundError), exporting(folder, "m.json", {}) as temporary:
            (temporary / "no such folder" / "file").write_text("")
        assert [p.name for p in folder.iterdir()] == ["m.json"]
        assert list(tmp_path.iterdir()) == [folder]

    def test_a_file_and_a_link_are_no_folders(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        for name in ("file", "link"):
            with pytest.raises(ConfigError, match="is not a folder"):
                refuse_foreign(tmp_path / name, "m.json")
        (tmp_path / "empty").mkdir()
        refuse_foreign(tmp_path / "empty", "m.json")


VERDICTS = ("bm25", "base", "previous")


@pytest.fixture
def run(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """storage.root of a run that trained the grouped model, embedded two records and was evaluated."""
    root, run_dir = tmp_path / "secret-place", tmp_path / "secret-place" / "runs" / "small"
    best = run_dir / "best" / "step-00000060"
    best.mkdir(parents=True)
    for file in checkpoints["grouped"].iterdir():
        (best / file.name).write_bytes(file.read_bytes())
    (best / "state.json").write_text(json.dumps({"step": 60, "train_seconds": 12.3, "metrics": {}, "files": {}}))
    (run_dir / "run.json").write_text(json.dumps({"data_fingerprint": "d4", "versions": {"torch": "2.13.0"}}))
    config = load(empty_config(tmp_path), [f"storage.root={root}", "storage.run=small"])
    (run_dir / "config.resolved.yaml").write_text(yaml.safe_dump(config.dump()))
    scores = {"held-out": {"queries": 50, "documents": 800, "model": {"ndcg@10": 0.75}, "bm25": {"ndcg@10": 0.5}}}
    compared = [{"other": name, "sentence": f"On held-out the model is better than {name}."} for name in VERDICTS]
    evaluated = {"of": {"model": model_fingerprint(best)}, "scores": scores, "comparisons": compared}
    (run_dir / "evaluation.json").write_text(json.dumps(evaluated))
    sources, splits = [SourceCount("pages", 900, 800, {"duplicate": 100})], {"train": 700, "validation": 100}
    (root / "prepared" / "k").mkdir(parents=True)
    manifest = asdict(Manifest("d4", sources, splits, [], {}, [], {}))
    (root / "prepared" / "k" / "manifest.json").write_text(json.dumps(manifest))
    return root


def empty_config(folder: Path) -> Path:
    file = folder / "c.yaml"
    source = {"name": "pages", "type": "text", "path": str(folder)}
    file.write_text(json.dumps({"data": {"sources": [source]}}))
    return file


class TestCard:
    def test_it_says_what_is_known(self, run: Path) -> None:
        best = run / "runs" / "small" / "best" / "step-00000060"
        origin = read_origin(best, run / "runs" / "small")
        command = "tep evaluate"
        text = model_card(read_model_spec(best), origin, "mine", "mit", command, onnx=True, embeddings=2)
        front = yaml.safe_load(text.split("---")[1])
        assert (front["license"], front["pipeline_tag"]) == ("mit", "sentence-similarity")
        assert front["library_name"] in front["tags"]
        for part in (
            "| pages | 900 | 800 |",
            "700 in train, 100 in validation",
            "60 steps, 12 s of training, torch 2.13.0",
            "| held-out (50 queries, 800 documents) | model | ndcg@10 0.7500 |",
            "\n- On held-out the model is better than bm25.\n- On held-out the model is better than base.\n",
            "tep evaluate",
            "| num_kv_heads | 2 |",
            "truncate_dim=16",
            "model.onnx",
            "2 vectors for use inside another model",
            "global_batch_size",
        ):
            assert part in text
        assert "secret-place" not in text
        assert "previous" not in text  # a model that the card's readers do not know

    def test_it_leaves_out_what_is_not(self, checkpoints: dict[str, Path], run: Path) -> None:
        origin = read_origin(checkpoints["table"], run / "runs" / "small")
        text = model_card(read_model_spec(checkpoints["table"]), origin, "m", None, "")
        assert "license" not in text.split("---")[1]
        headings = [line for line in text.splitlines() if line.startswith("## ")]
        assert headings == ["## Use", "## Model", "## Limits"]


class TestJob:
    def job(self, capsys: pytest.CaptureFixture[str], folder: Path, *args: str) -> tuple[int, Any, str]:
        shared = ["--config", str(empty_config(folder)), f"storage.root={folder / 'secret-place'}", "storage.run=small"]
        code, last, _, err = run_here(capsys, "export", *shared, *args)
        return code, last, err

    def test_a_run_becomes_a_folder(
        self, run: Path, tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        best, to = run / "runs" / "small" / "best" / "step-00000060", tmp_path / "out"
        config = load(empty_config(tmp_path), [f"storage.root={run}", "storage.run=small", f"embedding.model={best}"])
        table = table_of(config, encoder_recipe(config, best))
        arguments = ["--to", str(to), f"embedding.model={best}", "--embeddings", "float16", "--license", "mit"]
        code, last, err = self.job(capsys, tmp_path, *arguments)
        assert (code, last["status"]) == (1, "failed")
        assert "run tep embed first" in err
        assert not to.exists()
        vectors = ours(best, texts[:2])
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), WIDTH)
        rows = with_all_columns(pa.table({"id": ["b", "a"], "source_id": ["2", "1"], "vector": column}), table)
        with table.writing() as writer:
            writer.append(table.write(rows))
            writer.mark_verified("key")
        code, last, err = self.job(capsys, tmp_path, *arguments)
        assert (code, last["paths"]["export"], last["metrics"]["embeddings"]) == (0, str(to), 2), err
        assert last["metrics"]["cosine"] >= 0.9999
        layer, ids = load_embeddings(to / "embeddings")
        assert ids == ["a", "b"]
        np.testing.assert_allclose(layer.weight, vectors[::-1], atol=1e-3)
        assert "embedding.model=" in (to / "README.md").read_text()
        code, _, err = self.job(capsys, tmp_path, "--to", str(to), f"embedding.model={best}")
        assert code == 0, err
        assert not (to / "embeddings").exists()

    @pytest.mark.usefixtures("run")
    def test_arguments_that_cannot_be(
        self, tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("years of work")
        new = ["--to", str(tmp_path / "new")]
        monkeypatch.setattr("pipeline.model.onnx.PACKAGES", ("onnx", "no_such_package"))
        for arguments, words in (
            ([], "the following arguments are required: --to"),
            (["--to", str(tmp_path / "mine")], "holds thesis.txt, which no export wrote"),
            ([*new, "--license", "MIT License"], "--license: found 'MIT License'"),
            ([*new, "--embeddings", "int8"], "invalid choice: 'int8'"),
            ([*new, "--onnx"], "--onnx: found no package no_such_package"),
            ([*new, "model.sise=tiny"], "did you mean size?"),
        ):
            code, last, err = self.job(capsys, tmp_path, *arguments)
            assert (code, last["status"]) == (2, "failed"), err
            assert words in err + caplog.text  # pytest catches what is logged before the job's own log begins
        assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
        assert not (tmp_path / "new").exists()

    def test_a_run_without_a_model(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code, _, err = self.job(capsys, tmp_path, "--to", str(tmp_path / "new"))
        assert code == 1
        assert "run tep train first" in err
