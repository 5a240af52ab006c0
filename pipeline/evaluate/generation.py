"""Scores of generated texts beside their references.

>>> generation_metrics(["the cat sat on the mat"], ["the cats sat on the mat"])
{'bleu': 53.7285, 'rouge1': 1.0, 'rouge2': 1.0, 'rougeL': 1.0}
"""

from __future__ import annotations

ROUGE = ("rouge1", "rouge2", "rougeL")


def generation_metrics(hypotheses: list[str], references: list[str]) -> dict[str, float]:
    """BLEU of the corpus, 0 to 100, and ROUGE's F1, 0 to 1, as means over the texts.

    BLEU by sacrebleu at its defaults (Post 2018): cased, tokenizer 13a, and zero where no text has four words. ROUGE by
    Google's rouge-score with Porter's stemmer: words are runs of a-z and 0-9 there, so it suits English. Raises
    ValueError where there are no texts, or not one reference for each.
    """
    # Here, as nltk under rouge-score takes seconds to import, and few runs ask for scores.
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]
    from sacrebleu import corpus_bleu

    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(f"found {len(hypotheses)} generated texts and {len(references)} references; need one for each")
    scorer = RougeScorer(ROUGE, use_stemmer=True)
    scores = [scorer.score(reference, text) for text, reference in zip(hypotheses, references, strict=True)]
    rouge = {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in ROUGE}
    values = {"bleu": corpus_bleu(hypotheses, [references]).score} | rouge
    return {name: round(value, 4) for name, value in values.items()}
