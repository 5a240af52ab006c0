"""Whether near-duplicate removal finds what brute force finds, on real records.

examples:
  python benchmarks/near_duplicates_accuracy.py --data data                    # 5,000 records of each corpus
  python benchmarks/near_duplicates_accuracy.py --data data --records 0        # all of them

Prints a line a corpus and threshold. Brute force takes 5-word tuples, not their hashes, and counts what each record
shares with every other. `recall` and `precision` are over pairs, of those that share a band and reach the threshold by
`jaccard`; `proposed` have a band in common. `broken` is the share of the true pairs of which a record was removed, end
to end; `right` that of the removed ones whose named survivor stayed and reaches the threshold; `pairs left` are true
pairs of which both stayed.

Of linux-doc these are paragraphs of 20 words or more. The 5,000 are not drawn evenly, which would leave hardly any pair
of wordnet's: first come, in the order of ids, records that have others at 0.5 or above, with those, then the rest.
"""

import argparse
import itertools
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from pipeline.core.artifact import Artifact

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.core.session import Progress, ray_session, set_environment

set_environment()

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.corpora import CORPORA, Record, machine, records, text_of, write_records
from pipeline.config import Data, NearDuplicates
from pipeline.core.console import table
from pipeline.data import near_duplicates
from pipeline.data.similarity import band_keys, bands_of, jaccard, shingle_sets

Pairs = dict[tuple[int, int], float]  # places in a list of records, the smaller first, and their similarity

NEAR = 0.5  # pairs from here on decide which records are taken
THRESHOLDS = (0.7, 0.8)


def brute_force(rows: Sequence[Record], least: float) -> Pairs:
    """Every pair of similarity `least` or more, from sets of word tuples."""
    sets: list[set[tuple[str, ...]]] = []
    holders: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    found: Pairs = {}
    for place, row in enumerate(rows):
        words = re.findall(r"\w+", text_of(row).lower())
        mine = {tuple(words[i : i + 5]) for i in range(max(len(words) - 4, 1))} if words else set()
        shared: Counter[int] = Counter()
        for one in mine:
            shared.update(holders[one])
            holders[one].append(place)
        for other, count in shared.items():
            similarity = count / (len(mine) + len(sets[other]) - count)
            if similarity >= least:
                found[other, place] = similarity
        sets.append(mine)
    return found


def sample(rows: list[Record], count: int) -> list[Record]:
    """`count` records, those that have a near one before others."""
    others: defaultdict[int, list[int]] = defaultdict(list)
    for a, b in sorted(brute_force(rows, NEAR)):
        others[a].append(b)
    near = itertools.chain.from_iterable([a, *others[a]] for a in sorted(others))
    places = list(dict.fromkeys([*near, *range(len(rows))]))[:count]
    return [rows[place] for place in sorted(places)]


def by_bands(rows: Sequence[Record], threshold: float, permutations: int) -> tuple[int, set[tuple[int, int]]]:
    """How many pairs share a band, and those of them that jaccard confirms."""
    sets = shingle_sets([text_of(row) for row in rows])
    proposed: set[tuple[int, int]] = set()
    for band in band_keys(sets, threshold, permutations).T.tolist():
        members: defaultdict[int, list[int]] = defaultdict(list)
        for place, key in enumerate(band):
            if key:
                members[key].append(place)
        for places in members.values():
            proposed.update(itertools.combinations(places, 2))
    return len(proposed), {(a, b) for a, b in proposed if jaccard(sets[a], sets[b]) >= threshold}


def end_to_end(rows: Sequence[Record], data: Data, progress: Progress) -> dict[int, int]:
    """What the stage removes, and who stands for it, by their places."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_records(rows, Path(folder) / "input", shards=4)
        stage = Artifact(Path(folder), "distinct", [])
        near_duplicates.find_duplicates(stage, progress, files, data)
        near_duplicates.write_distinct(stage, progress, files)
        rejected = pa.concat_tables([pq.read_table(stage.folder / "rejected" / file.name) for file in files])
    by_id = {row["id"]: place for place, row in enumerate(rows)}
    by_name = {row["source_id"]: place for place, row in enumerate(rows)}
    pairs = zip(rejected["id"].to_pylist(), rejected["duplicate_of"].to_pylist(), strict=True)
    return {by_id[gone]: by_name[survivor] for gone, survivor in pairs}


def line(name: str, rows: Sequence[Record], near: Pairs, threshold: float, progress: Progress) -> list[object]:
    """One line of the table."""
    data = Data(near_duplicates=NearDuplicates(threshold=threshold))
    permutations = data.near_duplicates.permutations
    truth = {pair for pair, similarity in near.items() if similarity >= threshold}
    proposed, found = by_bands(rows, threshold, permutations)
    gone = end_to_end(rows, data, progress)
    left = sum(a not in gone and b not in gone for a, b in truth)
    right = sum((min(pair), max(pair)) in truth and pair[1] not in gone for pair in gone.items())
    bands = "{} of {}".format(*bands_of(threshold, permutations))
    shares = (
        len(found & truth) / len(truth),
        len(found & truth) / len(found),
        1 - left / len(truth),
        right / len(gone),
    )
    counts = [f"{count:,}" for count in (len(rows), len(truth), proposed, len(gone), left)]
    recall, precision, broken, correct = (f"{share:.4f}" for share in shares)
    return [name, threshold, bands, *counts[:3], recall, precision, counts[3], broken, correct, counts[4]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with debian, wordnet and linux-doc")
    parser.add_argument("--records", type=int, default=5000, help="of each corpus; 0 takes all")
    args = parser.parse_args()
    lines = []
    with ray_session() as progress:
        for name in CORPORA:
            rows = records(args.data, name, paragraphs=True)
            rows = sample(rows, args.records) if args.records else rows
            near = brute_force(rows, min(THRESHOLDS))
            lines += [line(name, rows, near, threshold, progress) for threshold in THRESHOLDS]
    header = ["corpus", "threshold", "bands", "records", "true pairs", "proposed", "recall", "precision"]
    print(f"{machine()}\n\n{table(lines, [*header, 'removed', 'broken', 'right', 'pairs left'])}")


if __name__ == "__main__":
    main()
