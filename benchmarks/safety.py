"""What the safety rules find in labelled lines, what their default actions do to them, and their speed.

examples:
  python benchmarks/safety.py
  python benchmarks/safety.py --data data/linux-doc       # MB/s over a folder's files as well, one core
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.data.safety import Rules, load_rules

LINES = ROOT / "tests" / "data" / "safety_lines.tsv"


def rows(texts: list[tuple[str, str]], default: Rules, everything: Rules) -> list[list[object]]:
    """A row a category. Precision and recall: all rules on. Rejected, redacted: of its lines, with default actions."""
    category = {rule.name: rule.category for rule in default.rules}
    found = [(label, {category[name] for name in everything.apply(text).found}) for label, text in texts]
    result = []
    for label in [*dict.fromkeys(category.values()), "clean"]:
        hits = sum(of == label and label in names for of, names in found)
        verdicts = [(text, default.apply(text)) for of, text in texts if of == label]
        precision = hits / (sum(label in names for _, names in found) or 1)
        rejected = sum(verdict.reason is not None for _, verdict in verdicts)
        redacted = sum(verdict.text != text for text, verdict in verdicts)
        scores = ["", ""] if label == "clean" else [f"{precision:.2f}", f"{hits / len(verdicts):.2f}"]
        result.append([label, len(verdicts), *scores, rejected, redacted])
    return result


def speed(files: list[Path], default: Rules, everything: Rules) -> None:
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    size = sum(len(text.encode()) for text in texts)
    for name, rules in (("default actions", default), ("all rules on", everything)):
        start = time.perf_counter()
        for text in texts:
            rules.apply(text)
        print(
            f"{name}: {size / 1e6 / (time.perf_counter() - start):.0f} MB/s, {len(texts):,} texts, {size / 1e6:.1f} MB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of text files to measure the speed on")
    args = parser.parse_args()
    default = load_rules(None, {})
    everything = load_rules(None, {rule.category: "reject" for rule in default.rules})
    lines = [line.split("\t") for line in LINES.read_text(encoding="utf-8").splitlines()[1:]]
    for split in ("dev", "held_out"):
        texts = [(label, json.loads(text)) for label, of, text in lines if of == split]
        print(f"\n| {split} | lines | precision | recall | rejected | redacted |\n|---|--:|--:|--:|--:|--:|")
        for row in rows(texts, default, everything):
            print("|", " | ".join(map(str, row)), "|")
    if args.data:
        print(f"\n{platform.processor() or platform.machine()}, one core")
        speed(sorted(path for path in args.data.rglob("*") if path.is_file()), default, everything)


if __name__ == "__main__":
    main()
