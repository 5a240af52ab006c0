"""Changed copies of a text to train on: words left out, spans masked, the end cut off; the same ones on every run.

>>> change = Augmentation(word_dropout=0.5)
>>> change.apply("remove the duplicate rows of a table", "5f3a", seed=0)
'the duplicate rows a table'
"""

from __future__ import annotations

import random
from dataclasses import dataclass

MASK = "[MASK]"
MEAN_SPAN_WORDS = 3  # SpanBERT (Joshi et al. 2020), section 3.1, has 3.8 after clipping at 10 tokens


@dataclass(frozen=True)
class Augmentation:
    """Shares of words, each from 0 to 1: left out, masked, and cut off the end at most."""

    word_dropout: float = 0.0
    span_masking: float = 0.0
    truncation: float = 0.0

    def __bool__(self) -> bool:
        return any((self.word_dropout, self.span_masking, self.truncation))

    def apply(self, text: str, record_id: str, seed: int) -> str:
        """The changed text: a function of the text, the record's id and the seed. At least one word stays."""
        words = text.split()
        if not words or not self:
            return text
        chance = random.Random(f"{seed}:{record_id}")
        words = words[: max(1, round(len(words) * (1 - self.truncation * chance.random())))]
        words = _with_spans_masked(words, self.span_masking, chance)
        kept = [word for word in words if chance.random() >= self.word_dropout]
        return " ".join(kept or words[:1])


def _with_spans_masked(words: list[str], share: float, chance: random.Random) -> list[str]:
    """`share` of the words replaced, one mask a word, in spans of geometric length."""
    words = list(words)
    left = min(round(len(words) * share), sum(word != MASK for word in words))
    while left > 0:
        length = 1
        while length < left and chance.random() > 1 / MEAN_SPAN_WORDS:
            length += 1
        start = chance.randrange(len(words))
        for place in range(start, min(start + length, len(words))):
            left -= words[place] != MASK
            words[place] = MASK
    return words
