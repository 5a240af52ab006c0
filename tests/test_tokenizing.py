"""Token shards without Ray: cutting, windows, order, lengths, augmentation, and the exchange between tasks."""

from __future__ import annotations

import io
import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from tokenizers import Tokenizer, processors

from pipeline.config import Augment, ConfigError
from pipeline.core.artifact import Output
from pipeline.data.manifest import RECORD_SCHEMA, LengthCounts, draw_lengths
from pipeline.data.partitions import content_id, id_bounds, is_validation, overlapping, read_part, shard_of, write_parts
from pipeline.data.shards import EarlierTokens
from pipeline.data.tokenizer import load_tokenizer, train_tokenizer
from pipeline.data.tokenizing import MASK, Cutter, TokenRecipe, augment, tokenize_file

WORDS = [f"word{i}" for i in range(50)]
PAIRS = ["anchor", "positive"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([" ".join(WORDS)] * 5, kind="bpe", vocab_size=600, lowercase=True)


@pytest.fixture(scope="module")
def framed(tokenizer: Tokenizer) -> Tokenizer:
    """With a special token at either end."""
    framed = Tokenizer.from_str(tokenizer.to_str())
    framed.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return framed


def records(folder: Path, count: int = 300, **extra: Any) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A record file of pairs from two sources, and its rows by id."""
    chance = random.Random(0)
    rows = []
    for i in range(count):
        anchor, positive = (" ".join(chance.choices(WORDS, k=chance.randrange(2, 20))) for _ in range(2))
        source = "ab"[chance.random() < 0.3]
        row = {"source": source, "source_id": f"{source}:{i}", "anchor": anchor, "positive": positive, **extra}
        rows.append({"id": content_id([anchor, positive]), **row})
    rows.sort(key=lambda row: str(row["id"]))
    path = folder / "records" / "00000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, RECORD_SCHEMA), path)
    return path, {str(row["id"]): row for row in rows}


def test_rows_are_in_canonical_order_and_row_groups_hold_one_source(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, rows = records(tmp_path, 4000)
    found = tokenize_file(path, Output(tmp_path), TokenRecipe(PAIRS, 16, 0.1, seed=7), tokenizer)
    train, validation = found["shards"]
    order = [(row["source"], xxhash.xxh3_64_intdigest(one.encode(), seed=7), one) for one, row in rows.items()]
    held_out = {one for one in rows if is_validation(one, 0.1)}
    assert pq.read_table(tmp_path / train["path"])["id"].to_pylist() == [
        one for _, _, one in sorted(order) if one not in held_out
    ]
    assert pq.read_table(tmp_path / validation["path"])["id"].to_pylist() == [
        one for _, _, one in sorted(order, key=lambda key: key[1:]) if one in held_out
    ]
    file = pq.ParquetFile(tmp_path / train["path"])
    for index, (size, source) in enumerate(zip(train["row_groups"], train["row_group_sources"], strict=True)):
        assert file.read_row_group(index)["source"].to_pylist() == [source] * size
    assert max(train["row_groups"]) == 1024
    assert len(set(train["row_group_sources"])) == 2


def test_texts_are_cut_and_special_tokens_stay(tmp_path: Path, framed: Tokenizer) -> None:
    path, rows = records(tmp_path)
    tokenize_file(path, Output(tmp_path), TokenRecipe(PAIRS, 9, 0.1), framed)
    own = Tokenizer.from_str(framed.to_str())
    own.enable_truncation(9)
    for row in pq.read_table(tmp_path / "train").to_pylist():
        assert row["anchor"] == own.encode(rows[row["id"]]["anchor"]).ids
    Cutter(framed, TokenRecipe(PAIRS, 3, 0.1))
    with pytest.raises(ConfigError, match="leave no room for text with 2 special tokens"):
        Cutter(framed, TokenRecipe(PAIRS, 2, 0.1))


def test_windows_cover_their_parent_and_overlap(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = {content_id([text]): text for text in (" ".join(WORDS[:count]) for count in range(1, 40))}
    whole = {one: tokenizer.encode(text).ids for one, text in texts.items()}
    rows = [{"id": one, "source": "s", "source_id": "s:1", "text": text} for one, text in texts.items()]
    pq.write_table(pa.Table.from_pylist(rows, RECORD_SCHEMA), tmp_path / "00000.parquet")
    for max_length, overlap in ((10, 3), (7, 0), (5, 2)):
        recipe, folder = TokenRecipe(["text"], max_length, 0.2, window_overlap=overlap), tmp_path / f"{max_length}"
        found = tokenize_file(tmp_path / "00000.parquet", Output(folder), recipe, tokenizer)
        table = pa.concat_tables([pq.read_table(folder / shard["path"]) for shard in found["shards"]])
        windows: dict[str, list[list[int]]] = {}
        for row in sorted(table.to_pylist(), key=lambda row: row["window"]):
            windows.setdefault(row["id"], []).append(row["text"])
        assert set(windows) == set(texts)
        for one, parts in windows.items():
            assert parts[0] + [token for part in parts[1:] for token in part[overlap:]] == whole[one]
            assert all(len(part) == max_length for part in parts[:-1])
            assert all(len(part) > overlap for part in parts[1:])


def test_prompts_and_negatives(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, rows = records(tmp_path, negatives=["word1 word2", "word3"])
    recipe = TokenRecipe([*PAIRS, "negatives"], 32, 0.1, prompts={"a": {"anchor": "query: "}})
    found = tokenize_file(path, Output(tmp_path), recipe, tokenizer)
    for row in pq.read_table(tmp_path / "train").to_pylist():
        prompt = "query: " if row["source"] == "a" else ""
        assert row["anchor"] == tokenizer.encode(prompt + rows[row["id"]]["anchor"]).ids[:32]
        assert row["positive"] == tokenizer.encode(rows[row["id"]]["positive"]).ids[:32]
        assert row["negatives"] == [tokenizer.encode(text).ids for text in ("word1 word2", "word3")]
    assert sum(found["lengths"]["negatives"]["whole"].values()) == 2 * len(rows)


def test_anchors_of_the_training_split_alone_are_augmented(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, rows = records(tmp_path)
    change = Augment(word_dropout=0.5)
    tokenize_file(path, Output(tmp_path), TokenRecipe(PAIRS, 256, 0.2, seed=3, augmentation=change), tokenizer)
    for split in ("train", "validation"):
        for row in pq.read_table(tmp_path / split).to_pylist():
            whole = rows[row["id"]]
            anchor = augment(whole["anchor"], change, row["id"], 3) if split == "train" else whole["anchor"]
            assert row["anchor"] == tokenizer.encode(anchor).ids
            assert row["positive"] == tokenizer.encode(whole["positive"]).ids


def test_augmentation_is_a_function_of_id_and_seed() -> None:
    text = " ".join(WORDS)
    change = Augment(word_dropout=0.2, span_masking=0.2, truncation=0.5)
    assert augment(text, change, "a", 0) == augment(text, change, "a", 0)
    assert len({augment(text, change, one, seed) for one in "abc" for seed in range(3)}) == 9
    masked = [augment(text, Augment(span_masking=0.3), str(i), 0).split() for i in range(50)]
    assert all(words.count(MASK) == 15 and len(words) == 50 for words in masked)
    kept = [len(augment(text, Augment(word_dropout=0.3), str(i), 0).split()) for i in range(200)]
    assert 0.67 < np.mean(kept) / 50 < 0.73
    shortest = min(len(augment(text, Augment(truncation=0.4), str(i), 0).split()) for i in range(200))
    assert 30 <= shortest <= 31
    assert augment(text, Augment(word_dropout=1.0), "a", 0) == "word0"
    assert augment("  ", change, "a", 0) == "  "
    change = Augment(span_masking=0.5)  # of texts that have masks already
    assert augment(f"{MASK} {MASK} word", change, "id", 0) == f"{MASK} {MASK} {MASK}"
    assert augment(f"{MASK} {MASK}", change, "id", 0) == f"{MASK} {MASK}"


def in_shards(folder: Path, rows: list[dict[str, Any]], shards: int) -> list[Path]:
    """Record files as prepare writes them."""
    paths = [folder / "records" / f"{shard:05d}.parquet" for shard in range(shards)]
    for shard, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        own = sorted((row for row in rows if shard_of(row["id"], shards) == shard), key=lambda row: str(row["id"]))
        pq.write_table(pa.Table.from_pylist(own, RECORD_SCHEMA), path)
    return paths


@pytest.mark.parametrize("recipe", ["pairs", "negatives and prompts", "windows", "augment"])
@pytest.mark.parametrize(("then", "now"), [(3, 3), (3, 5), (5, 2)])
def test_tokens_of_an_earlier_data_set_give_the_same_files(
    recipe: str, then: int, now: int, tmp_path: Path, framed: Tokenizer
) -> None:
    how = {
        "pairs": TokenRecipe(PAIRS, 9, 0.1),
        "negatives and prompts": TokenRecipe([*PAIRS, "negatives"], 9, 0.1, prompts={"b": {"anchor": "word7 "}}),
        "windows": TokenRecipe(["text"], 9, 0.1, window_overlap=2),
        "augment": TokenRecipe(PAIRS, 9, 0.1, augmentation=Augment(word_dropout=0.3)),
    }[recipe]
    _, by_id = records(tmp_path / "all", 90)
    rows = [
        {**row, "text": f"{row['anchor']} {row['positive']}", "negatives": row["positive"].split()[:number]}
        for number, row in zip(itertools.cycle(range(4)), by_id.values())
    ]
    moved = {**rows[40], "source": "ab"[rows[40]["source"] == "a"]}  # its prompt may be another one
    for path in in_shards(tmp_path / "then", rows[:70], then):
        found = tokenize_file(path, Output(tmp_path / "then"), how, framed)
        assert found["tokenized"] == found["records"] == pq.read_metadata(path).num_rows
    later = in_shards(tmp_path / "now", [*rows[10:40], moved, *rows[41:]], now)
    known, tokenized = EarlierTokens(tmp_path / "then", then), 0
    for shard, path in enumerate(later):
        plain = tokenize_file(path, Output(tmp_path / "plain"), how, framed)
        found = tokenize_file(path, Output(tmp_path / "reused"), how, framed, known.read(shard, now))
        tokenized += found.pop("tokenized")
        assert found == {name: value for name, value in plain.items() if name != "tokenized"}
    assert tokenized == 20 + 1
    written = {path.relative_to(tmp_path / "plain"): path.read_bytes() for path in tmp_path.glob("plain/*/*")}
    assert {path.parent.name for path in written} == {"train", "validation", "lengths"}
    assert {path.relative_to(tmp_path / "reused"): path.read_bytes() for path in tmp_path.glob("reused/*/*")} == written


def test_earlier_tokens_that_are_gone_are_not_used(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, _ = records(tmp_path)
    tokenize_file(path, Output(tmp_path), TokenRecipe(PAIRS, 9, 0.1), tokenizer)
    assert EarlierTokens(tmp_path, 1).read(0, 1)
    (tmp_path / "train" / path.name).rename(tmp_path / "train" / "moved")
    part = EarlierTokens(tmp_path, 1).read(0, 1)
    found = tokenize_file(path, Output(tmp_path / "again"), TokenRecipe(PAIRS, 9, 0.1), tokenizer, part)
    assert found["tokenized"] == found["shards"][0]["rows"] > 0
    assert (tmp_path / "again/train" / path.name).read_bytes() == (tmp_path / "train/moved").read_bytes()
    (tmp_path / "train" / path.name).write_bytes(b"no Parquet")
    assert EarlierTokens(tmp_path, 1).read(0, 1) is None
    assert EarlierTokens(tmp_path / "elsewhere", 1).read(0, 1) is None


@pytest.mark.parametrize(("shards", "others"), [(1, 1), (3, 3), (3, 5), (7, 2), (4096, 4095)])
def test_shards_of_another_number_that_hold_the_same_ids(shards: int, others: int) -> None:
    chance = random.Random(1)
    edges = [
        number * 2**32 // count + near for count in (shards, others) for number in (0, 1, count) for near in (-1, 0, 1)
    ]
    for number in [*(edge for edge in edges if 0 <= edge < 2**32), *(chance.randrange(2**32) for _ in range(500))]:
        one = f"{number:08x}{chance.randrange(16**24):024x}"
        shard = shard_of(one, shards)
        assert shard_of(one, others) in overlapping(shard, shards, others)
        for each in {max(shard - 1, 0), shard, min(shard + 1, shards - 1)}:
            first, end = id_bounds(each, shards)
            assert (first <= one < end) == (each == shard)


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_unknown_tokens_are_counted_by_the_models_own_id(kind: str, tmp_path: Path) -> None:
    trained = train_tokenizer([" ".join(WORDS)] * 5, kind=kind, vocab_size=120, lowercase=True)
    renamed = Tokenizer.from_str(trained.to_str().replace("[UNK]", "<unk>"))
    path, _ = records(tmp_path, 20, anchor="word1 漢 word2 漢")
    found = tokenize_file(path, Output(tmp_path / "out"), TokenRecipe(PAIRS, 64, 0.1), renamed)
    assert found["lengths"]["anchor"]["unknown"] == 2 * 20


def test_length_figures_against_numpy() -> None:
    chance = np.random.default_rng(0)
    lengths = chance.geometric(0.02, 1000)
    halves = [LengthCounts(), LengthCounts()]
    for half, part in zip(halves, np.split(lengths, [300]), strict=True):
        half.add(part, np.minimum(part, 64), room=64, unknown=len(part))
    total = LengthCounts()
    for half in halves:
        total.merge(vars(half))
    summary, cut = total.summary(), np.minimum(lengths, 64)
    assert summary["mean"] == round(cut.mean(), 2)
    assert summary["std"] == round(cut.std(), 2)
    assert (summary["min"], summary["max"]) == (cut.min(), 64)
    for p in (50, 90, 95, 99):
        assert summary[f"p{p}"] == np.percentile(cut, p, method="inverted_cdf")
    assert (summary["whole_max"], summary["tokens"]) == (lengths.max(), cut.sum())
    assert summary["truncation_rate"] == round((lengths > 64).mean(), 6)
    assert summary["unknown_rate"] == round(1000 / lengths.sum(), 6)


def test_the_picture_is_drawn_whatever_there_is(tmp_path: Path) -> None:
    one = LengthCounts()
    one.add(np.array([3]), np.array([3]), room=8, unknown=0)
    draw_lengths({"anchor": one, "negatives": LengthCounts()}, 8, tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_each_kind_of_vocabulary_encodes_and_decodes(kind: str) -> None:
    texts = ["The quick brown fox", "jumps over the lazy dog", "and then the fox naps"] * 20
    own = train_tokenizer(texts, kind=kind, vocab_size=600, lowercase=True)
    again = Tokenizer.from_str(own.to_str())
    encoded = again.encode("The lazy fox jumps")
    assert again.decode(encoded.ids).strip() == "the lazy fox jumps"
    assert [again.token_to_id(t) for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [0, 1, 2, 3, 4]
    assert again.encode("fox " + MASK).ids[-1] == 4


def test_byte_level_bpe_trains_to_the_same_file() -> None:
    texts = [" ".join(random.Random(i).choices(WORDS, k=9)) for i in range(500)]
    one, other = (train_tokenizer(some, kind="bpe", vocab_size=700, lowercase=False) for some in (texts, texts[::-1]))
    assert one.to_str() == other.to_str()


def test_a_pretrained_tokenizers_folder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).to_str() == load_tokenizer(tmp_path / "tokenizer.json").to_str()
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"found no valid tokenizer at .*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_an_exchange_gives_each_partition_its_rows(tmp_path: Path) -> None:
    chance = random.Random(0)
    expected: dict[int, Counter[int]] = {part: Counter() for part in range(5)}
    files = []
    for number in range(4):
        values = [chance.randrange(1000) for _ in range(number * 30)]
        parts = [value % 4 for value in values]  # partition 4 stays empty
        for value, part in zip(values, parts, strict=True):
            expected[part][value] += 1
        files.append(tmp_path / f"{number}.parts")
        write_parts(pa.table({"value": pa.array(values, pa.int64())}), parts, 5, files[-1])
    for part, found in expected.items():
        assert Counter(read_part(files, part)["value"].to_pylist()) == found


def test_who_reads_a_partition_reads_no_more_of_a_file_than_that(tmp_path: Path) -> None:
    read: list[int] = []

    class Watched(type(tmp_path)):  # type: ignore[misc]
        def open(self, mode: str) -> Any:
            class File(io.FileIO):
                def read(self, size: int = -1) -> bytes:
                    read.append(size)
                    return super().read(size)

            return File(str(self))

    write_parts(pa.table({"value": np.arange(20_000)}), np.arange(20_000) % 5000, 5000, tmp_path / "a.parts")
    path = Watched(tmp_path / "a.parts")
    assert read_part([path], 4999)["value"].to_pylist() == [4999, 9999, 14_999, 19_999]
    assert sum(read) < path.stat().st_size / 1000
    assert min(read) >= 0


LANGUAGES = {
    "Hindi": "नीली नदी के पास पुरानी चक्की",
    "Tamil": "மொழி அழகான நீலம்",
    "Persian": "می\u200cخواهم نمی\u200cدانم",
    "Arabic": "كَتَبَ الوَلَدُ رِسالةً",
    "English": "It's the old mill, isn't it? 3.5 km",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_byte_level_words_keep_their_marks(language: str, tmp_path: Path) -> None:
    """A vocabulary that has seen each word often has one token for each, in transformers too."""
    import transformers
    from tokenizers import pre_tokenizers

    text = LANGUAGES[language]
    tokenizer = train_tokenizer([text] * 50, kind="bpe", vocab_size=1000, lowercase=False)
    tokens = tokenizer.encode(text).tokens
    if language == "English":  # as GPT-2 splits it
        split = pre_tokenizers.ByteLevel(add_prefix_space=True).pre_tokenize_str(text)
        assert tokens == [token for token, _ in split]
    else:
        assert len(tokens) == len(text.split())
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert loaded(text)["input_ids"] == tokenizer.encode(text).ids


def test_augmentation_changes_text_without_blanks() -> None:
    for text in ("磨坊那边的蓝色大桥很有名", "สะพานสีฟ้าหลังโรงสีเก่า", "བོད་ཡིག་གི་ཡི་གེ", "水車小屋の青い橋"):
        for shares in (Augment(word_dropout=0.5), Augment(truncation=0.8), Augment(span_masking=0.3)):
            found = [augment(text, shares, str(record), 0) for record in range(50)]
            assert sum(one != text for one in found) >= 45, text
            assert all(found)
            assert not any(" " in one for one in found)
    assert augment("蓝 桥", Augment(), "0", 0) == "蓝 桥"
