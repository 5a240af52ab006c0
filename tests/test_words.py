"""Words in many scripts, against expectations written by hand and against Lance itself, text by text."""

from __future__ import annotations

from pathlib import Path

import lance
import lancedb
import pyarrow as pa
import pytest
from lance.query import MatchQuery

from pipeline.evaluation.metrics import bm25_ranking
from pipeline.index.words import SEPARATOR, TEXTS_AT_ONCE, word_settings, words

SENTENCES = {
    "Chinese": ["今天天气很好,我们去公园散步。", "图书馆里有很多书。", "火车站离这里不远。"],
    "Japanese": ["東京の図書館で本を読む。", "電車は駅に着きました。", "明日は雨が降るでしょう。"],
    "Thai": ["ฉันไปโรงเรียนทุกวัน", "แมวดื่มน้ำในครัว", "พรุ่งนี้ฝนจะตก"],
    "Hindi": ["मैं विद्यालय जाता हूँ", "यह एक अंतर्राष्ट्रीय विश्वविद्यालय है", "किताब मेज़ पर रखी है"],
    "Korean": ["나는 학교에 갑니다", "고양이가 물을 마십니다", "내일은 비가 옵니다"],
    "Arabic": ["أنا أقرأ الكتاب في المدرسة", "القطار وصل إلى المحطة", "غدا سوف تمطر السماء"],
    "English": ["The dogs were barking all night", "A train arrives at the station", "Café in the Straße of the city"],
    "code": ["def parse_date(text): ...", "return numpy.linalg.norm(x)", "class C(HTTPError): retry = 3.5"],
}
QUERIES = {
    "Chinese": ["公园", "图书馆", "火车站"],
    "Japanese": ["図書館", "電車", "明日"],
    "Thai": ["โรงเรียน", "น้ำ", "พรุ่งนี้"],
    "Hindi": ["विद्यालय", "अंतर्राष्ट्रीय", "किताब"],
    "Korean": ["학교에", "물을", "내일은"],
    "Arabic": ["الكتاب", "القطار", "غدا"],
    "English": ["dog", "STATIONS", "cafe strasse"],
    "code": ["date", "norm", "c"],
}


@pytest.mark.parametrize("script", SENTENCES)
def test_one_word_finds_its_sentence(script: str) -> None:
    found = bm25_ranking(["0", "1", "2"], QUERIES[script], ["0", "1", "2"], SENTENCES[script])
    assert {query: list(ranking) for query, ranking in found.items()} == {str(i): [str(i)] for i in range(3)}


@pytest.mark.parametrize("script", SENTENCES)
def test_the_table_finds_what_bm25_finds(script: str, tmp_path: Path) -> None:
    """An index by pylance with the same settings, searched by pylance and by lancedb."""
    rows = pa.table({"id": [0, 1, 2], "text": SENTENCES[script]})
    table = lance.write_dataset(rows, tmp_path / "texts.lance")
    table.create_scalar_index("text", "INVERTED", **word_settings(SENTENCES[script]))
    opened = lancedb.connect(tmp_path).open_table("texts")
    for number, query in enumerate(QUERIES[script]):
        scanned = table.to_table(columns=["id", "_score"], full_text_query=MatchQuery(query, "text"))
        assert scanned["id"].to_pylist() == [number]
        assert [row["id"] for row in opened.search(query, query_type="fts").limit(3).to_list()] == [number]


WHOLE = {
    "मैं विद्यालय जाता हूँ": ["मैं", "विद्यालय", "जाता", "हूँ"],  # not cut at the virama
    "แมวดื่มน้ำ": ["แมว", "ดื่ม", "น้ำ"],
    "今天天气很好": ["今天", "天气", "很好"],
    "The parse_date of Straßen, C and v1.2": ["pars", "date", "strassen", "c", "v1", "2"],
    "": [],
    " \n ... ": [],
    "of the": [],
    f"a{SEPARATOR}b c": ["b", "c"],
    "a" * 64: ["a" * 64],  # a hash is a word
    "a" * 1000: [],
}


@pytest.mark.parametrize("text", WHOLE)
def test_words_by_hand(text: str) -> None:
    assert words([text], word_settings([text])) == [WHOLE[text]]


def test_many_texts_are_split_as_lance_splits_each() -> None:
    mixed = [sentence for sentences in SENTENCES.values() for sentence in sentences]
    mixed += [
        "l'homme d’aujourd'hui",
        "1,000.5 user@example.com",
        "tab\tand\u00a0other\u3000spaces",
        "a😀b ①x²",
        "x" * 127,
    ]
    texts = [f"{text} {number}" for number in range(100) for text in mixed]
    assert len(texts) > 2 * TEXTS_AT_ONCE
    for sample in (SENTENCES["code"], SENTENCES["Thai"]):
        settings = word_settings(sample)
        alone = [[token.text for token in lance.tokenize(text, **settings)] for text in texts]
        assert words(texts, settings) == alone
    assert words([], settings) == []


def test_scripts_decide_how_words_are_split() -> None:
    split = {script: word_settings(sentences)["base_tokenizer"] for script, sentences in SENTENCES.items()}
    assert split == {script: "icu" if script in ("Thai", "Hindi") else "icu/split" for script in SENTENCES}
    for letters, kind in ((11, "icu"), (10, "icu/split")):  # in a hundred
        assert word_settings(["x" * (100 - letters) + "ก" * letters])["base_tokenizer"] == kind
