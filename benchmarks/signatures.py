"""MinHash signatures by the libraries written for them, on the same shingle hashes: speed, and how well they estimate.

  python benchmarks/signatures.py --data data

Prints a line a corpus and library: seconds (the best of three) and MB of text a second on one core, from arrays of
64-bit shingle hashes to one array of signatures; the mean absolute error of the Jaccard that signatures give for pairs
whose true one, by brute force, is 0.5 or more; and the error that independent permutations would have on those pairs.
datasketch is no dependency of the pipeline: without it, its lines are left out.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import numpy.typing as npt

from benchmarks.corpora import CORPORA, machine, records, text_bytes, text_of
from benchmarks.near_duplicates_accuracy import NEAR, brute_force
from pipeline.config import NearDuplicates
from pipeline.core.console import table
from pipeline.data.similarity import Shingles, shingle_sets

Signatures = npt.NDArray[np.unsignedinteger]  # (records, permutations)

PERMUTATIONS = NearDuplicates().permutations
BATCH = 4096  # records at a time, as near_duplicates.BATCH_ROWS


def by_rensa(sets: Sequence[Shingles]) -> Signatures:
    from rensa import RMinHash

    offsets = np.concatenate([[0], np.cumsum([len(one) for one in sets])]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(sets), offsets, PERMUTATIONS, 1)
    return np.array(matrix.to_rows(), dtype=np.uint32)


def by_datasketch(scheme: str) -> Callable[[Sequence[Shingles]], Signatures]:
    """`affine32`, datasketch's default, sees the lower half of a hash; `affine64` all of it."""
    from datasketch import MinHash

    empty = MinHash(num_perm=PERMUTATIONS, hashfunc=int, scheme=scheme)  # permutations are drawn once
    bits = np.uint64(0xFFFFFFFF if scheme == "affine32" else 0xFFFFFFFFFFFFFFFF)

    def sign(sets: Sequence[Shingles]) -> Signatures:
        signatures = []
        for one in sets:
            sketch = empty.copy()
            sketch.update_batch((one & bits).tolist())
            signatures.append(sketch.digest())
        return np.stack(signatures)

    return sign


def libraries() -> dict[str, Callable[[Sequence[Shingles]], Signatures]]:
    found: dict[str, Callable[[Sequence[Shingles]], Signatures]] = {"rensa, RMinHash": by_rensa}
    try:
        found |= {f"datasketch, {scheme}": by_datasketch(scheme) for scheme in ("affine32", "affine64")}
    except ImportError:
        print("datasketch is not installed: its lines are left out", file=sys.stderr)
    return found


def ideal_error(similarities: npt.NDArray[np.float64]) -> float:
    """Mean absolute error of the share of PERMUTATIONS independent trials, by the normal approximation."""
    return float(np.mean(np.sqrt(2 / np.pi * similarities * (1 - similarities) / PERMUTATIONS)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with debian, wordnet and linux-doc")
    parser.add_argument("--records", type=int, default=20_000, help="of each corpus, those first by id")
    args = parser.parse_args()
    lines = []
    for name in CORPORA:
        rows = [row for row in records(args.data, name)[: args.records] if re.search(r"\w", text_of(row))]
        sets = shingle_sets([text_of(row) for row in rows])
        near = brute_force(rows, NEAR)
        pairs, truth = np.array(list(near)), np.array(list(near.values()))
        for library, sign in libraries().items():
            seconds = float("inf")
            for _ in range(3):
                began = time.perf_counter()
                signatures = np.concatenate([sign(sets[start : start + BATCH]) for start in range(0, len(sets), BATCH)])
                seconds = min(seconds, time.perf_counter() - began)
            estimate = (signatures[pairs[:, 0]] == signatures[pairs[:, 1]]).mean(axis=1)
            error = float(np.abs(estimate - truth).mean())
            line = [name, f"{len(rows):,}", library, f"{seconds:.2f}", f"{text_bytes(rows) / 1e6 / seconds:.1f}"]
            lines.append([*line, f"{len(truth):,}", f"{error:.4f}", f"{ideal_error(truth):.4f}"])
    header = ["corpus", "records", "library", "seconds", "MB/s", "near pairs", "mean error", "if independent"]
    print(f"{machine()}, {PERMUTATIONS} permutations\n\n{table(lines, header)}")


if __name__ == "__main__":
    main()
