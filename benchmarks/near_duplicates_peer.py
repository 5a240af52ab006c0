"""Near-duplicate removal by datatrove, for near_duplicates.py to time beside ours. Needs datatrove and nothing of ours.

  PYTHON benchmarks/near_duplicates_peer.py FOLDER --workers 2

FOLDER/input holds JSON Lines files with `id` and `text`, a task each; FOLDER/output gets what stays. The four MinHash
stages have their defaults: 5 words, 14 buckets of 8 hashes, English words by spaCy (--words regex: runs of letters,
digits and underscores, as ours). Prints a line of JSON with the seconds from the first stage's start to the last
one's end, that of each stage, and the records that stayed.
"""

import argparse
import json
import re
import time
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor  # type: ignore[import-not-found]
from datatrove.pipeline.dedup import (  # type: ignore[import-not-found]
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig  # type: ignore[import-not-found]
from datatrove.pipeline.readers import JsonlReader  # type: ignore[import-not-found]
from datatrove.pipeline.writers import JsonlWriter  # type: ignore[import-not-found]
from datatrove.utils.typeshelper import Languages  # type: ignore[import-not-found]
from datatrove.utils.word_tokenizers import WordTokenizer  # type: ignore[import-not-found]


class RegexWords(WordTokenizer):
    def word_tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text)

    def sent_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        raise NotImplementedError


def stages(folder: Path, workers: int, words: str) -> dict[str, LocalPipelineExecutor]:
    """The stages in their order, each over as many tasks as it allows."""
    config = MinhashConfig(n_grams=5)
    signatures, buckets, remove = (str(folder / name) for name in ("signatures", "buckets", "remove"))
    tasks = len(list((folder / "input").iterdir()))
    reader = JsonlReader(str(folder / "input"))
    language = RegexWords() if words == "regex" else Languages.english
    pipelines = {
        "signatures": ([reader, MinhashDedupSignature(signatures, config, language)], tasks),
        "buckets": ([MinhashDedupBuckets(signatures, buckets, config=config)], config.num_buckets),
        "cluster": ([MinhashDedupCluster(buckets, remove, config)], 1),
        "filter": ([reader, MinhashDedupFilter(remove), JsonlWriter(str(folder / "output"), compression=None)], tasks),
    }
    return {
        name: LocalPipelineExecutor(
            pipeline, tasks=count, workers=min(workers, count), logging_dir=str(folder / "logs" / name)
        )
        for name, (pipeline, count) in pipelines.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--words", choices=("spacy", "regex"), default="spacy")
    args = parser.parse_args()
    seconds: dict[str, float] = {}
    for name, executor in stages(args.folder, args.workers, args.words).items():
        began = time.perf_counter()
        executor.run()
        seconds[name] = round(time.perf_counter() - began, 2)
    kept = sum(sum(1 for _ in file.open("rb")) for file in (args.folder / "output").iterdir())
    print(json.dumps({"seconds": sum(seconds.values()), "stages": seconds, "kept": kept}))


if __name__ == "__main__":
    main()
