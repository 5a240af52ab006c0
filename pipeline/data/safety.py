"""Redacts or rejects dangerous and private text: injections, terminal escapes, personal data, secrets.

>>> rules = load_rules(None, {"email": "redact"})
>>> rules.apply("Write to ann@example.org.")
Verdict(text='Write to [EMAIL].', reason=None, found=('email',))
>>> rules.apply("' OR 1=1 --").reason
'unsafe_sql_injection'

The rules are in safety_rules.yaml, or in your own file of the same form. RE2 searches in linear time and never
backtracks, so neither your rules nor an attacker's text can hang the pipeline. Patterns run before control characters
are removed, because removal would leave the tail of a terminal escape behind.

Cost: one automaton matches all active rules in one pass, 400 MB/s per core on documents of 8 kB, 60 MB/s on
descriptions of 200 bytes, where call overhead dominates. A rule's own pattern runs only on texts that it matched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import re2  # type: ignore[import-untyped]
import yaml

SHIPPED = Path(__file__).with_name("safety_rules.yaml")
ACTIONS = ("keep", "redact", "reject")
_FRAGMENT = re.compile(r"(?<!\\)(?<!\\[pPx])\{([A-Za-z_]\w*)\}")
_ROUNDS = 4  # two are enough, except for texts built to survive redaction
_SET_BYTES = 256 << 20  # limit of the automaton's cache; the default rules need a few MB


class Rule(NamedTuple):
    name: str
    category: str
    pattern: str
    action: str
    replacement: str
    """Replaces the pattern's first group, or the whole match if it has no group."""


class Verdict(NamedTuple):
    text: str
    """The text after redactions."""
    reason: str | None
    """unsafe_<category> of the first rule that rejects the text, else None."""
    found: tuple[str, ...]
    """Names of the rules that matched. Rules with the action `keep` are not searched."""


class Rules:
    """Compiled rules. They cannot be pickled, so each worker loads its own."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)
        self._active = [rule for rule in rules if rule.action != "keep"]
        self._patterns = [_compiled(rule) for rule in self._active]
        self._set = _set(self._active)
        for rule, pattern in zip(self._active, self._patterns, strict=True):
            if rule.action == "redact" and pattern.search(rule.replacement.encode()):
                raise ValueError(
                    f"rule {rule.name!r} has the replacement {rule.replacement!r}, which its own pattern matches; "
                    "choose another replacement"
                )

    def apply(self, text: str) -> Verdict:
        """Redact one text, or reject it.

        Redacted text is checked again, because a redaction can join the parts of a payload. A text that still changes
        after four rounds is rejected: it was built to evade redaction.
        """
        data = text.encode("utf-8", "surrogatepass")
        hits = self._hits(data)
        if not hits:
            return Verdict(text, None, ())
        found: dict[str, None] = {}
        for _ in range(_ROUNDS):
            found |= dict.fromkeys(self._active[i].name for i in hits)
            rejecting = next((i for i in hits if self._active[i].action == "reject"), None)
            before = data
            for i in hits if rejecting is None else ():
                data = b"".join(_redacted(self._patterns[i], data, self._active[i].replacement.encode()))
            if rejecting is not None or data == before or not (hits := self._hits(data)):
                break
        else:
            rejecting = hits[0]
        reason = None if rejecting is None else f"unsafe_{self._active[rejecting].category}"
        return Verdict(data.decode("utf-8", "surrogatepass"), reason, tuple(found))

    def redact(self, text: str) -> str:
        """Replace every match, also of rules that reject. For what is kept beside a record's texts.

        A text that still matches after four rounds is replaced as a whole.
        """
        data = text.encode("utf-8", "surrogatepass")
        hits = self._hits(data)
        if not hits:
            return text
        for _ in range(_ROUNDS):
            for i in hits:
                data = b"".join(_redacted(self._patterns[i], data, self._active[i].replacement.encode()))
            if not (hits := self._hits(data)):
                return data.decode("utf-8", "surrogatepass")
        return self._active[hits[0]].replacement

    def _hits(self, data: bytes) -> list[int]:
        """Indices of the active rules that match, in the file's order."""
        return sorted(self._set.Match(data) or ()) if self._active else []


def load_rules(path: Path | None, actions: Mapping[str, str]) -> Rules:
    """The rules of a file (None: the default ones); `actions` overrides actions by rule or category.

    A rule's own name takes precedence over its category. Raises ValueError with a one-sentence message.
    """
    path = path or SHIPPED
    rules = _read(path)
    names, categories = {rule.name for rule in rules}, {rule.category for rule in rules}
    for key, action in actions.items():
        if action not in ACTIONS:
            raise ValueError(f"safety action {action!r} for {key!r} is not one of {', '.join(ACTIONS)}")
        if key not in names | categories:
            raise ValueError(
                f"safety actions: {key!r} is not in {path}; use a category ("
                f"{', '.join(sorted(categories))}) or a rule ({', '.join(sorted(names))})"
            )
    return Rules(
        [rule._replace(action=actions.get(rule.name) or actions.get(rule.category) or rule.action) for rule in rules]
    )


def _read(path: Path) -> list[Rule]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"safety rules {path} cannot be read: {' '.join(str(error).split())}") from None
    fragments = content.get("fragments", {}) if isinstance(content, dict) else None
    if not isinstance(fragments, dict) or not isinstance(content.get("rules"), list):
        raise ValueError(f"safety rules {path} must be a mapping with a list `rules`, like {SHIPPED}")
    rules = [_rule(entry, fragments, path) for entry in content["rules"]]
    for rule in rules:
        if sum(rule.name in (other.name, other.category) for other in rules) > 1:
            raise ValueError(f"safety rules {path} use the name {rule.name!r} for two rules, or a rule and a category")
    return rules


def _rule(entry: Any, fragments: Mapping[str, str], path: Path) -> Rule:
    """One rule of a file. `pattern` is one pattern or a list of alternatives; {word} in it stands for a fragment."""
    if not isinstance(entry, dict) or not all(entry.get(key) for key in ("name", "category", "pattern", "action")):
        raise ValueError(f"a rule of {path} lacks one of name, category, pattern, action: {entry!r:.200}")
    name, pattern = str(entry["name"]), _alternatives(entry["pattern"])
    for word, fragment in reversed(list(fragments.items())):  # a fragment may use those above it
        pattern = pattern.replace("{" + word + "}", f"(?:{_alternatives(fragment)})")
    if unknown := _FRAGMENT.search(pattern):
        raise ValueError(f"rule {name!r} of {path} uses the fragment {unknown[1]!r}, which the file does not define")
    replacement = str(entry.get("replacement", f"[{name.upper()}]"))
    if (action := entry["action"]) not in ACTIONS:
        raise ValueError(f"rule {name!r} of {path}: action {action!r} is not one of {', '.join(ACTIONS)}")
    rule = Rule(name, str(entry["category"]), pattern, action, replacement)
    try:
        compiled = _compiled(rule)
    except re2.error as error:
        raise ValueError(f"rule {name!r} of {path} has a pattern that RE2 rejects: {_message(error)}") from None
    if compiled.search(b""):
        raise ValueError(
            f"rule {name!r} of {path} has a pattern that matches the empty text; make it match at least one character"
        )
    return rule


def _alternatives(pattern: Any) -> str:
    return "|".join(f"(?:{p})" for p in pattern) if isinstance(pattern, list) else str(pattern)


def _compiled(rule: Rule) -> Any:
    return re2.compile(rule.pattern, _options())


def _set(rules: Sequence[Rule]) -> Any:
    """One automaton that reports which rules match."""
    combined = re2.Set.SearchSet(_options())
    for rule in rules:
        combined.Add(rule.pattern)
    combined.Compile()
    return combined


def _options() -> Any:
    options = re2.Options()
    options.max_mem = _SET_BYTES  # with too little memory, a set silently finds nothing
    options.log_errors = False
    return options


def _redacted(pattern: Any, data: bytes, replacement: bytes) -> Iterator[bytes]:
    """`data` in pieces, with each match replaced.

    The search continues right after the replaced group, so a blank between two addresses can delimit both.
    """
    position = kept = 0
    while match := pattern.search(data, position):
        group = next((g for g in range(1, pattern.groups + 1) if match.start(g) >= 0), 0)
        yield data[kept : match.start(group)] + replacement
        kept = match.end(group)
        position = max(kept, match.start() + 1)
    yield data[kept:]


def _message(error: Exception) -> str:
    message = error.args[0] if error.args else error
    return message.decode("utf-8", "replace") if isinstance(message, bytes) else str(message)
