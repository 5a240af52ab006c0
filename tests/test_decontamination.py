"""Evaluation texts among the records, against every pair of texts, and in other forms of Unicode."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from pipeline.config import ConfigError, Data, Safety, Sanitize, Source
from pipeline.data.decontamination import Contamination, check_beir_folders, contamination
from pipeline.data.fields import RawRecord
from pipeline.data.filtering import Filter
from tests.test_near_duplicates import beir
from tests.test_similarity import likeness, variants, word_tuples


def test_contamination_against_every_pair() -> None:
    texts = variants(300, 8)
    known = Contamination([], 0.7, str)
    for i, text in enumerate(texts[:150]):
        known.add(str(i), text)
    oracle = [word_tuples(text) for text in texts]
    for place in range(150, 300):
        best = max(likeness(oracle[place], other) for other in oracle[:150])
        found = known.nearest([texts[place]])
        assert (found[1] if found else 0.0) == (best if best >= 0.7 else 0.0)


FORMS = {
    "as it is": str,
    "decomposed": lambda text: unicodedata.normalize("NFD", text),
    "wrongly decoded": lambda text: text.encode().decode("latin-1"),
    "with soft hyphens": lambda text: "\u00ad".join(text),
    "with zero-width spaces": lambda text: "\u200b".join(text),
    "with controls": lambda text: text.replace("e", "e\x02"),
    "with Windows line ends": lambda text: text.replace(" ", "\r\n"),
    "with overrides of direction": lambda text: f"\u202e{text}\u202c",
}
PLAIN = "Ängstliche Möwen überqueren früh am Morgen schnell die geöffnete Brücke über dem Fluß"


@pytest.mark.parametrize("form", FORMS)
def test_an_evaluation_text_in_another_form_is_found(form: str, tmp_path: Path) -> None:
    """Also as a query, and where the record has the other form in its turn."""
    text = FORMS[form](PLAIN)
    for name, documents, queries in (("docs", [{"_id": "d", "text": text}], []), ("asked", [], [text])):
        data = data_of(beir(tmp_path / name, documents, queries))
        for raw in (PLAIN, text):
            record = Filter(data.sources[0], data)(RawRecord("1", {"text": raw}))["text"]
            found = contamination(data).nearest(["something else", record])
            assert found is not None
            assert found[1] == 1.0


def test_an_evaluation_text_is_redacted_like_a_record(tmp_path: Path) -> None:
    raw = "Ask ann@example.org about it"
    data = data_of(beir(tmp_path / "set", [{"_id": "d", "text": raw}], []), safety=Safety(actions={"email": "redact"}))
    record = Filter(data.sources[0], data)(RawRecord("1", {"text": raw}))["text"]
    assert "ann" not in record
    assert contamination(data).nearest([record]) == ("set: document d", 1.0)


def test_what_the_config_keeps_is_compared_as_it_is(tmp_path: Path) -> None:
    folder = beir(tmp_path / "set", [{"_id": "d", "text": FORMS["with soft hyphens"](PLAIN)}], [])
    data = data_of(folder, sanitize=Sanitize(remove_zero_width=False))
    assert contamination(data).nearest([PLAIN]) is None
    assert contamination(data_of(folder)).nearest([PLAIN]) == ("set: document d", 1.0)


def data_of(folder: Path, **settings: object) -> Data:
    sources = [Source(name="s", type="json", path="x")]
    return Data(sources=sources, decontaminate=[str(folder)], max_nonprintable=1.0, **settings)  # type: ignore[arg-type]


def test_folders_that_are_no_evaluation_sets(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no corpus\.jsonl in .*give a folder with corpus\.jsonl"):
        check_beir_folders([str(tmp_path)])
    folder = beir(tmp_path / "set", [], [])
    for line in (b'{"_id": "a"}', b'{"_id": "a", "text": null}', b'{"_id": "a", "text": "caf\xe9"}', b"[]"):
        (folder / "corpus.jsonl").write_bytes(line + b"\n")
        with pytest.raises(ConfigError, match=r"^data\.decontaminate: .*corpus\.jsonl line 1: .*texts _id and text"):
            Contamination([str(folder)], 0.8, str)
    (folder / "corpus.jsonl").write_bytes(
        b"\xef\xbb\xbf" + json.dumps({"_id": "a", "text": PLAIN}).encode() + b"\r\n\n"
    )
    assert Contamination([str(folder)], 0.8, str).nearest([PLAIN]) == ("set: document a", 1.0)
