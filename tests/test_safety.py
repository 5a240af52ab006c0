"""Safety rules: against labelled lines (the oracle), and each action, override and error."""

import itertools
import json
from pathlib import Path

import pytest

from pipeline.data.safety import SHIPPED, Rules, load_rules

LINES = (Path(__file__).parent / "data" / "safety_lines.tsv").read_text().splitlines()[1:]
TEXTS = [(label, split, json.loads(text)) for label, split, text in (line.split("\t") for line in LINES)]
DEFAULT = load_rules(None, {})
CATEGORY = {rule.name: rule.category for rule in DEFAULT.rules}
CATEGORIES = sorted(set(CATEGORY.values()))

# Precision and recall with all rules on: a little under what benchmarks/safety.py measures, both splits together.
FLOORS = {
    "sql_injection": (0.88, 0.95),
    "script_injection": (0.83, 0.92),
    "template_injection": (0.92, 0.95),
    "terminal_escape": (0.99, 0.99),
    "prompt_injection": (0.88, 0.93),
    "personal_data": (0.97, 0.93),
    "secret": (0.97, 0.95),
}


@pytest.fixture(scope="module")
def everything() -> Rules:
    return load_rules(None, dict.fromkeys(CATEGORIES, "redact"))


def test_the_labelled_lines_cover_every_category_in_both_splits() -> None:
    assert len(TEXTS) >= 300
    expected = itertools.product(("clean", *CATEGORIES), ("dev", "held_out"))
    assert {(label, split) for label, split, _ in TEXTS} == set(expected)


def test_precision_and_recall_hold() -> None:
    rules = load_rules(None, dict.fromkeys(CATEGORIES, "reject"))
    found = [(label, {CATEGORY[name] for name in rules.apply(text).found}) for label, _, text in TEXTS]
    for category in CATEGORIES:
        hits = sum(label == category and category in names for label, names in found)
        precision, recall = FLOORS[category]
        assert hits / sum(category in names for _, names in found) >= precision, category
        assert hits / sum(label == category for label, _ in found) >= recall, category


def test_defaults_reject_no_clean_line_and_change_few() -> None:
    verdicts = [(text, DEFAULT.apply(text)) for label, _, text in TEXTS if label == "clean"]
    assert [text for text, verdict in verdicts if verdict.reason] == []
    assert sum(verdict.text != text for text, verdict in verdicts) <= 0.02 * len(verdicts)


def test_defaults_leave_no_escape_and_no_secret() -> None:
    for label, _, text in TEXTS:
        verdict = DEFAULT.apply(text)
        if label == "terminal_escape":
            assert "\x1b" not in verdict.text
            assert "\x9b" not in verdict.text
        if label == "personal_data":
            assert verdict == (text, None, ())
    secrets = [text for label, _, text in TEXTS if label == "secret"]
    assert sum(DEFAULT.apply(text).text != text for text in secrets) >= 0.85 * len(secrets)


def test_redaction_leaves_the_rest_of_the_text() -> None:
    rules = load_rules(None, {"personal_data": "redact"})
    text = "Grüße 😀\x00 to ann@example.org,bob@example.org from 198.51.100.7 198.51.100.8 198.51.100.9.\n"
    verdict = rules.apply(text)
    assert verdict.text == "Grüße 😀\x00 to [EMAIL],[EMAIL] from [IP] [IP] [IP].\n"
    assert verdict == (verdict.text, None, ("email", "ipv4"))


def test_a_terminal_escape_hides_nothing() -> None:
    assert DEFAULT.apply("a\x1b[1;31mred\x1b[0m \x1b]0;title\x07b").text == "ared b"
    split = DEFAULT.apply("' OR\x1b[0m 1=1 --")
    assert (split.reason, split.found[0]) == ("unsafe_sql_injection", "terminal_escape")
    built_to_survive = "\x1b[" * 50 + "0m" * 50
    assert DEFAULT.apply(built_to_survive).reason == "unsafe_terminal_escape"


def test_no_text_raises(everything: Rules) -> None:
    for text in ("", "\x00", "a\x00b", "\ud800", "x\udfff \x1b[1m\ud83d", "😀" * 1000, "é" * 1_000_000):
        verdict = everything.apply(text)
        assert verdict.text == text.replace("\x1b[1m", "")
        assert verdict.reason is None


def test_redacting_twice_is_redacting_once(everything: Rules) -> None:
    for _, _, text in TEXTS:
        once = everything.apply(text)
        assert once.reason is None
        assert everything.apply(once.text) == (once.text, None, ())


def test_actions() -> None:
    address, injection, escape = "ann@example.org", "' OR 1=1 --", "\x1b[0mx"
    for actions, text, expected in (
        ({}, address, (address, None, ())),
        ({"email": "redact"}, address, ("[EMAIL]", None, ("email",))),
        ({"email": "reject"}, address, (address, "unsafe_personal_data", ("email",))),
        ({"personal_data": "redact", "email": "keep"}, address, (address, None, ())),
        ({"sql_injection": "keep"}, injection, (injection, None, ())),
        ({"terminal_escape": "keep"}, escape, (escape, None, ())),
        (dict.fromkeys(CATEGORIES, "keep"), injection, (injection, None, ())),
    ):
        assert load_rules(None, actions).apply(text) == expected, actions


def test_rules_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(
        "fragments: {digit: '[0-9]', four: ['{digit}{4}', 'none']}\n"
        "rules:\n"
        "- {name: badge, category: house, pattern: 'badge ({four})', action: redact, replacement: '#'}\n"
        "- {name: draft, category: house, pattern: ['(?i)\\ba draft\\b', 'TODO'], action: reject}\n"
    )
    rules = load_rules(path, {})
    assert rules.apply("badge 1234, badge none, badge 12") == ("badge #, badge #, badge 12", None, ("badge",))
    assert rules.apply("badge 1234, a Draft") == ("badge 1234, a Draft", "unsafe_house", ("badge", "draft"))
    assert load_rules(path, {"draft": "redact"}).apply("TODO").text == "[DRAFT]"


def rule(pattern: str, action: str = "keep") -> str:
    return f"- {{name: n, category: c, pattern: '{pattern}', action: {action}}}\n"


WRONG_FILES = {
    "rules: [": "cannot be read: while parsing",
    "[]": "must be a mapping with a list `rules`",
    "rules: [{name: n}]": "lacks one of name, category, pattern, action",
    "rules:\n" + rule("(a"): r"rule 'n' .* RE2 rejects: missing \): ",
    "rules:\n" + rule("(?=a)"): "rule 'n' .* RE2 rejects: invalid perl operator",
    "rules:\n" + rule("a*"): "rule 'n' .* matches the empty text",
    "rules:\n" + rule("a", "drop"): "rule 'n' .* action 'drop' is not one of keep",
    "rules:\n" + rule("{quote}a"): "rule 'n' .* fragment 'quote'",
    "rules:\n" + rule("N", "redact"): r"rule 'n' has the replacement '\[N\]', which its own pattern",
    "rules:\n" + rule("a") * 2: "use the name 'n' for two rules",
}


def test_a_wrong_file_is_one_sentence(tmp_path: Path) -> None:
    for content, message in WRONG_FILES.items():
        (tmp_path / "rules.yaml").write_text(content)
        with pytest.raises(ValueError, match=message) as error:
            load_rules(tmp_path / "rules.yaml", {})
        assert "\n" not in str(error.value)


def test_a_missing_file_and_wrong_actions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml cannot be read: .*No such file"):
        load_rules(tmp_path / "none.yaml", {})
    with pytest.raises(ValueError, match="safety action 'drop' for 'email' is not one of keep, redact, reject"):
        load_rules(None, {"email": "drop"})
    with pytest.raises(ValueError, match=r"'mail' is not in .* category \(personal_data, .* rule \(.*email, "):
        load_rules(None, {"mail": "keep"})


def test_every_shipped_rule_says_why() -> None:
    assert SHIPPED.read_text().count("    why: ") == len(DEFAULT.rules)
