"""BM25 in many scripts, against expectations written by hand and against Lance itself, text by text."""

from __future__ import annotations

from pathlib import Path

import lance
import lancedb
import numpy as np
import pyarrow as pa
import pytest
from lance.query import MatchQuery

from pipeline.evaluation.metrics import bm25_ranking
from pipeline.index.search import TableSearch
from pipeline.index.table import PLACE, VectorTable
from pipeline.index.words import SEPARATOR, SETTINGS, TEXTS_AT_ONCE, index_words, search_words

SENTENCES = {
    "Chinese": ["今天天气很好,我们去公园散步。", "图书馆里有很多书。", "火车站离这里不远。"],
    "Japanese": ["東京の図書館で本を読む。", "電車は駅に着きました。", "明日は雨が降るでしょう。"],
    "Thai": ["ฉันไปโรงเรียนทุกวัน", "แมวดื่มน้ำในครัว", "พรุ่งนี้ฝนจะตก"],
    "Khmer": ["ខ្ញុំចូលចិត្តនំបុ័ង", "ស្ពានពណ៌ខៀវ", "រថយន្តក្រុងចុងក្រោយ"],
    "Bengali": ["পুরানো কলের পিছনে নীল সেতু", "গরম রুটি ও ছাগলের পনির", "পাহাড়ের দিকে শেষ বাস"],
    "Tamil": ["நீல பாலம் அருகே", "சூடான ரொட்டி", "கடைசி பேருந்து"],
    "Hebrew": ["הַגֶּשֶׁר הַכָּחֹל", "לֶחֶם חַם", "הָאוֹטוֹבּוּס הָאַחֲרוֹן"],
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
    "Khmer": ["នំបុ័ង", "ស្ពាន", "ក្រោយ"],
    "Bengali": ["নীল সেতু", "রুটি", "শেষ"],
    "Tamil": ["பாலம்", "ரொட்டி", "பேருந்து"],
    "Hebrew": ["הגשר", "לחם", "האוטובוס"],  # without vowel points
    "Hindi": ["विद्यालय", "अंतर्राष्ट्रीय", "किताब"],
    "Korean": ["학교에", "물을", "내일은"],
    "Arabic": ["الكتاب", "القطار", "غدا"],
    "English": ["dog", "STATIONS", "cafe strasse"],
    "code": ["date", "norm", "c"],
}


@pytest.mark.parametrize("script", SENTENCES)
def test_one_word_finds_its_sentence_first(script: str) -> None:
    found = bm25_ranking(["0", "1", "2"], QUERIES[script], ["0", "1", "2"], SENTENCES[script])
    assert {query: max(ranking, key=lambda name: ranking[name]) for query, ranking in found.items()} == {
        str(i): str(i) for i in range(3)
    }


@pytest.mark.parametrize("script", SENTENCES)
def test_the_table_finds_what_bm25_finds(script: str, tmp_path: Path) -> None:
    """An index by pylance, searched by pylance and by lancedb."""
    rows = pa.table({"id": [0, 1, 2], "words": [search_words(text) for text in SENTENCES[script]]})
    table = lance.write_dataset(rows, tmp_path / "texts.lance")
    table.create_scalar_index("words", "INVERTED", **SETTINGS)
    opened = lancedb.connect(tmp_path).open_table("texts")
    for number, query in enumerate(map(search_words, QUERIES[script])):
        scanned = table.to_table(columns=["id", "_score"], full_text_query=MatchQuery(query, "words"))
        assert scanned["id"][0].as_py() == number
        assert opened.search(query, query_type="fts").limit(3).to_list()[0]["id"] == number


WHOLE = {
    "मैं विद्यालय जाता हूँ": ["मैं", "विद्यालय", "जाता", "हूँ"],  # not cut at the virama
    "很好 2021年": ["很", "好", "很好", "2021", "年"],
    "的, 桥": ["的", "桥"],  # neighbours have nothing between them
    "น้ำเย็น": ["น้ำ", "เ", "น้ำเ", "ย็", "เย็", "น", "ย็น"],
    "The parse_date of Straßen, C and v1.2": ["pars", "date", "strassen", "c", "v1", "2"],
    "cafe\u0301 كَتَبَ می\u200cخواهم שָׁלוֹם": ["cafe", "كتب", "میخواهم", "שלום"],
    "": [],
    " \n ... ": [],
    "of the": [],
    f"a{SEPARATOR}b c": ["b", "c"],
    "a" * 64: ["a" * 64],  # a hash is a word
    "a" * 1000: [],
}


@pytest.mark.parametrize("text", WHOLE)
def test_words_by_hand(text: str) -> None:
    assert index_words([text]) == [WHOLE[text]]


def test_many_texts_are_filtered_as_lance_filters_each() -> None:
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
    assert index_words(texts) == [
        [token.text for token in lance.tokenize(search_words(text), **SETTINGS)] for text in texts
    ]
    assert index_words([]) == []


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("蓝色大桥", {"a"}),
        ("蓝色 大桥", {"a"}),
        ("大桥", {"a", "c"}),
        ("蓝色河流", {"a", "b", "d"}),
        ("blue bread", {"d", "e"}),
        ("?!", set()),
    ],
)
def test_a_phrase_without_blanks_is_found_whole_or_else_in_parts(query: str, found: set[str], tmp_path: Path) -> None:
    texts = ["磨坊那边的蓝色大桥很有名", "色大的河", "一座大桥", "blue 河流", "bread"]
    table = VectorTable(tmp_path, "t", 2)
    table.create()
    columns = {name: [""] * 5 for name in ("source", "source_id", "metadata", "digest")}
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(10, np.float32)), 2)
    places = pa.nulls(5, pa.list_(PLACE))
    rows = pa.table({"id": list("abcde"), **columns, "text": texts, "places": places, "vector": vectors})
    with table.writing() as writer:
        writer.append(table.write(table.stored(rows)))
        writer.index_words()
    assert {row["id"] for row in TableSearch(table)._with_words(query, None, 5).to_pylist()} == found
