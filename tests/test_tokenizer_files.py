"""Tokenizers of other makers whose patterns do not end, wherever texts are encoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from pipeline.config import ConfigError
from pipeline.core.outcome import JobError
from pipeline.core.tokenizer_files import MAX_CHARS, bounded, encoding, parse_tokenizer
from pipeline.data.tokenizer import load_tokenizer
from pipeline.data.tokenizing import Cutter, TokenRecipe
from pipeline.index.chunks import split_into_chunks
from pipeline.index.encoder import tokenize
from pipeline.model.folder import load_tokenizer as load_model_tokenizer

GIVES_UP = r"(x+x+)+y"
HOSTILE_TEXT = "x" * 5_000


def split_by(pattern: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated")])
    return tokenizer


def saved(folder: Path, tokenizer: Tokenizer) -> Path:
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_a_pattern_that_gives_up_is_one_sentence_that_names_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path, split_by(GIVES_UP))
    tokenizer = load_tokenizer(path)
    documents = pa.table({"text": [HOSTILE_TEXT]})
    cutter = Cutter(tokenizer, TokenRecipe(["text"], 8, 0.1))
    assert np.array_equal(cutter.prefix, [])
    for encode in (
        lambda: tokenize(tokenizer, [HOSTILE_TEXT]),
        lambda: split_into_chunks(documents, [""], tokenizer),
        lambda: tokenizing(cutter),
    ):
        with pytest.raises(JobError, match=r"tokenizer\.json: its patterns cannot split one of the texts \(.*retry"):
            encode()


def tokenizing(cutter: Cutter) -> None:
    from pipeline.data.tokenizing import _encode_texts

    _encode_texts([HOSTILE_TEXT], "text", ["s"], cutter)


def test_other_errors_pass_unchanged() -> None:
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), encoding(split_by("a")):
            raise error


REFUSED = [r"(?=(a+))\1*b", r"(?<q>a)\k<q>", r"(?<q>a)\k'q'", r"(?<q>a\g<q>?)", r"\\(a)\1"]
ALLOWED = [r"\\1", r"a\\\\1", r"\d\s\p{L}+", r"\x41", r"'s|'t| ?\p{L}+|\s+(?!\S)|\s+"]


def test_backreferences_and_recursion_are_refused_at_load(tmp_path: Path) -> None:
    for pattern in REFUSED:
        path = saved(tmp_path, split_by(pattern))
        with pytest.raises(ConfigError, match=r"tokenizer\.json: the pattern .* has a backreference or recursion"):
            load_tokenizer(path)
        (tmp_path / "model.json").write_text("{}")
        with pytest.raises(ValueError, match=r"tokenizer\.json: found no valid tokenizer \(the pattern"):
            load_model_tokenizer(tmp_path)
    normalizing = split_by("a")
    normalizing.normalizer = normalizers.Replace(Regex(r"(a)\1"), "b")
    with pytest.raises(ValueError, match="backreference"):
        parse_tokenizer(normalizing.to_str(), "t")
    for pattern in ALLOWED:
        assert load_tokenizer(saved(tmp_path, split_by(pattern))).encode("a").ids


def test_what_is_no_tokenizer_is_a_value_error() -> None:
    for content in ("", "{}", "[1]", "\ud800"):
        with pytest.raises(ValueError):  # noqa: PT011 (the library's own words)
            parse_tokenizer(content, "t")


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    "pattern", [LLAMA_3, r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"]
)
@pytest.mark.parametrize("unit", [" ", "\n", " \n", "a", "aA", "1", "!", "!\n", "'", "\u0301", "一"])
def test_texts_are_whole_for_common_patterns(pattern: str, unit: str) -> None:
    """A million characters, which take minutes where time is quadratic."""
    tokenizer, text = split_by(pattern), unit * (1_000_000 // len(unit)) + "x"
    assert bounded(tokenizer, [text]) == [text]
    assert tokenize(tokenizer, [text])


@pytest.mark.parametrize(
    "pattern", [r"\s+$", r"\s+x", r"\s+\s", r"(a|b)+c", r"[^a]*b", r"a*|b", LLAMA_3 + "$", r"x{9999,}"]
)
def test_texts_are_cut_for_patterns_that_may_be_quadratic(pattern: str) -> None:
    tokenizer = split_by(pattern)
    assert bounded(tokenizer, ["x" * MAX_CHARS, "x" * (MAX_CHARS + 1)]) == ["x" * MAX_CHARS] * 2
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizers.Whitespace(), normalizers.Replace(Regex(pattern), "")
    tokenizer.__dict__.clear()
    assert bounded(tokenizer, ["x" * 50_000]) == ["x" * MAX_CHARS]


def test_a_run_of_blanks_is_cut_wherever_texts_are_encoded() -> None:
    tokenizer = split_by(r"\s+(?!.)")
    tokenizer.enable_truncation(1 << 30)
    text = "a." * 15_000
    expected = len(tokenizer.encode(text[:MAX_CHARS]).ids)
    assert len(tokenize(tokenizer, [text])[0]) == expected
    documents = split_into_chunks(pa.table({"text": [text]}), [""], tokenizer)
    assert len(documents["tokens"][0][0]) == expected
    from pipeline.data.tokenizing import _encode_texts

    found = _encode_texts([text], "text", ["s"], Cutter(tokenizer, TokenRecipe(["text"], 1 << 30, 0.1)))
    assert found.tokens.to_pylist() == [expected]


@pytest.mark.parametrize("pattern", [r" {2,}", r"\s+", r"\p{N}{1,3}", r"[0-9]", r"[^\s\p{L}\n]+", " ?[^(|.,!)]+"])
def test_one_class_is_linear(pattern: str) -> None:
    assert bounded(split_by(pattern), ["x" * 50_000]) == ["x" * 50_000]


def test_wordpiece_has_a_limit_for_words() -> None:
    model = models.WordPiece({"[UNK]": 0}, unk_token="[UNK]", max_input_chars_per_word=1_000_000)
    with pytest.raises(ValueError, match="found max_input_chars_per_word 1,000,000; supported are at most 1,000"):
        parse_tokenizer(Tokenizer(model).to_str(), "t")
