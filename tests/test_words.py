"""Words in many scripts, against expectations written by hand and grapheme clusters found by wcwidth."""

from __future__ import annotations

import itertools
import random
import re
import sys
import unicodedata

import pytest
import wcwidth
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.data.similarity import drop_similar, jaccard, shingles
from pipeline.data.words import dense_chars, is_plain, pieces, word_spans, words

BY_HAND = {
    "English": ("Don't split parse_date(v1.2), naïve café!", "Don t split parse date v1 2 naïve café"),
    "German": ("Straße „Öl“ – 3½ km²", "Straße Öl 3½ km²"),
    "Hindi": ("मैं विद्यालय जाता हूँ।", "मैं विद्यालय जाता हूँ"),
    "Bengali": ("নীল সেতু, গরম রুটি", "নীল সেতু গরম রুটি"),
    "Tamil": ("மொழி அழகான (நீலம்)", "மொழி அழகான நீலம்"),
    "Arabic": ("كَتَبَ الوَلَدُ، ٣ كتب", "كَتَبَ الوَلَدُ ٣ كتب"),
    "Persian": ("می\u200cخواهم بروم", "می\u200cخواهم بروم"),
    "Hebrew": ("שָׁלוֹם, עוֹלָם", "שָׁלוֹם עוֹלָם"),
    "Korean": ("방앗간 너머 파란 다리", "방앗간 너머 파란 다리"),
    "Vietnamese": ("tie\u0302\u0301ng Vie\u0323\u0302t", "tie\u0302\u0301ng Vie\u0323\u0302t"),
    "Chinese": ("蓝色大桥,2021年ABC公司", "蓝 色 大 桥 2021 年 ABC 公 司"),
    "Japanese": ("カメラを、が 々", "カ メ ラ を が 々"),
    "Thai": ("น้ำเย็น ๓", "น้ำ เ ย็ น ๓"),
    "Lao": ("ນ້ຳ", "ນ້ຳ"),
    "Khmer": ("ខ្ញុំចូលចិត្ត", "ខ្ញុំ ចូ ល ចិ ត្ត"),
    "Burmese": ("မြန်မာ", "မြ န် မာ"),
    "Tibetan": ("བོད་ཡིག", "བོ ད ཡི ག"),
    "Javanese": ("ꦲꦏ꧀ꦱꦫ", "ꦲ ꦏ꧀ꦱ ꦫ"),
    "full width": ("ＡＢＣ　ㅋㅋㅋ", "ＡＢＣ ㅋㅋㅋ"),
    "signs": ("❤️ 👩‍👩‍👧 © ℹ 1️⃣", "1️⃣"),
    "nothing": ("\n… \u0301", ""),
}
ALPHABETS = [
    "aé_1' .\u0301\u00ad\u200b\u200c\u200d\u2060\ufe0f\u20e3\n\ud800",
    "कषि\u094d\u093c ত\u09cdরள\u0bcd",  # consonants, and signs that join them
    "กน\u0e33\u0e49 \u0e40ខ\u17d2\u17bbမ\u1039\u102b\ua98f\ua9c0",
    "桥がか\u3099ー々カｶﾞ한\u1112\u1161\u11ab",
    "❤👩🏻🇩🇪ℹ㊗©#",
    "\u0600\u06dd\u0d4e\U000110bd\U000111c2",  # signs that stand before a letter in its cluster
]
ANY_TEXT = st.text(st.sampled_from("".join(ALPHABETS)) | st.characters(), max_size=30)


@pytest.mark.parametrize("text", BY_HAND)
def test_words_by_hand(text: str) -> None:
    given_text, expected = BY_HAND[text]
    assert words(given_text) == expected.split(" ") * bool(expected)


def test_pieces_have_the_mean_length_of_words() -> None:
    assert pieces("蓝色大桥很 bridge カメ") == ["蓝色", "大桥", "很", "bridge", "カメ"]
    assert pieces("ขนมปังอุ่น") == ["ขนม", "ปังอุ่", "น"]
    assert pieces("Don't नीली 다리") == ["Don", "t", "नीली", "다리"]
    assert dense_chars("蓝色 bridge น้ำ") == 5
    assert dense_chars("नीली bridge 다리") == 0


def test_plain_text_has_the_words_that_the_other_path_finds() -> None:
    """Each character, where it stands between letters, at the begin and at the end."""
    plain = [chr(code) for code in range(sys.maxunicode + 1) if is_plain(chr(code))]
    assert len(plain) > 13_000
    for character in plain:
        text = f"{character}a{character}b{character} {character}"
        assert words(text) == [text[start:stop] for start, stop, _ in word_spans(text)], hex(ord(character))


def clusters(text: str) -> set[int]:
    return set(itertools.accumulate(map(len, wcwidth.iter_graphemes(text)), initial=0))


@pytest.mark.slow
@settings(max_examples=1000)
@given(ANY_TEXT)
@example("\u0915\u094d\u1780")  # a consonant of a dense script joined to another
@example("©\u094d\u0915")
@example("👩\u200dℹ")
def test_words_stand_in_the_text_and_split_no_cluster(text: str) -> None:
    boundaries, end = clusters(text), 0
    for find in (words, pieces):
        place = 0
        for word in find(text):
            place = text.index(word, place) + len(word)
    spans = list(word_spans(text))
    assert [text[start:stop] for start, stop, _ in spans] == words(text)
    for start, stop, _ in spans:
        assert end <= start < stop
        assert {start, stop} <= boundaries
        end = stop


@pytest.mark.slow
@settings(max_examples=1000)
@given(ANY_TEXT)
@example("か\u3099a\u0301\u1112\u1161\u11ab")
def test_words_do_not_depend_on_the_normalisation_form(text: str) -> None:
    composed = [unicodedata.normalize("NFC", word) for word in words(text)]
    assert words(unicodedata.normalize("NFC", text)) == composed
    assert [unicodedata.normalize("NFC", word) for word in words(unicodedata.normalize("NFD", text))] == composed


@pytest.mark.slow
@settings(max_examples=1000)
@given(ANY_TEXT)
def test_every_letter_and_digit_is_in_a_word(text: str) -> None:
    """As long as no sign of another script precedes it."""
    letters = [c for c in text if unicodedata.category(c)[0] in "LN"]
    found = [c for word in words(re.sub(r"[\u094d\u09cd\u0bcd\u17d2\u1039\ua9c0]", "", text)) for c in word]
    for letter in set(letters) & set("aé1कতளกខမ桥がカ한"):
        assert found.count(letter) == letters.count(letter)


SENTENCES = {
    "Hindi": "नीली नदी के पास पुरानी चक्की में गरम रोटी और बकरी का पनीर रोज़ मिलता है",
    "Tamil": "நீல பாலம் அருகே பழைய ஆலை சூடான ரொட்டி ஆடு பாலாடைக்கட்டி தினமும் கிடைக்கும்",
    "Chinese": "磨坊那边的蓝色大桥很有名热面包和山羊奶酪很好吃开往山里的末班公共汽车",
    "Japanese": "水車小屋の向こうの青い橋は有名で温かいパンと山羊のチーズがとてもおいしい",
    "Thai": "สะพานสีฟ้าหลังโรงสีเก่าขนมปังอุ่นกับเนยแข็งรถเมล์เที่ยวสุดท้ายขึ้นภูเขา",
    "Khmer": "ខ្ញុំចូលចិត្តនំបុ័ងក្តៅនិងឈីសពពែនៅជិតស្ពានពណ៌ខៀវក្រោយរោងម៉ាស៊ីនកិនស្រូវចាស់",
    "Korean": "방앗간 너머 파란 다리 근처 가게 따뜻한 빵과 염소 치즈 매일 아침 일찍 판다",
    "Arabic": "كَتَبَ الوَلَدُ رِسالةً عَنِ الجِسرِ الأَزرَقِ وَراءَ الطاحونةِ القَديمةِ",
    "Hebrew": "הַגֶּשֶׁר הַכָּחֹל מֵאֲחוֹרֵי הַטַּחֲנָה לֶחֶם חַם וּגְבִינַת עִזִּים בְּכָל בֹּקֶר",
    "English": "the old mill beyond the blue bridge sells warm bread and goat cheese every single morning",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_near_copies_are_found_and_other_texts_kept(language: str) -> None:
    """Long texts of shuffled words: a copy with one word changed, and another shuffle."""
    parts = SENTENCES[language].split() if " " in SENTENCES[language] else words(SENTENCES[language])
    blank, chance = " " * (" " in SENTENCES[language]), random.Random(0)
    text = chance.choices(parts, k=200)
    copy = [*text[:100], next(part for part in parts if part != text[100]), *text[101:]]
    other = chance.choices(parts, k=200)
    sets = [shingles(blank.join(one)) for one in (text, copy, other)]
    assert jaccard(sets[0], sets[1]) > 0.85
    assert set(drop_similar(sets, [0, 1, 2], 0.8)) == {1}


def test_texts_that_differ_in_marks_are_not_copies() -> None:
    for one, other in (("नीला ", "नीली "), ("কিল ", "কাল "), ("நீலம் ", "நூலம் "), ("كَتَبَ ", "كُتُبٌ ")):
        mixed = [one] * 6 + [other]
        assert jaccard(shingles("".join(mixed)), shingles(other * 7)) < 0.8, one
