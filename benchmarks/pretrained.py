"""A pretrained encoder on packed tokens: its vectors beside sentence-transformers', its work and time beside padding.

examples:
  python benchmarks/pretrained.py --data data                       # data/sts_b/test.tsv, data/debian/pairs.jsonl
  python benchmarks/pretrained.py --data data --batches 3 --threads 1

Both tables are of MiniLM, with the weights of its package. Vectors are of every sentence of the STS file. For packing,
random batches of 64 pairs, cut at 128 tokens, take a training step: forward and backward of the contrastive loss, with
dropout. `packed` is our encoder, `padded` the same weights as transformers runs them, anchors and positives each padded
to their longest; each with the linear layers of torch and with ours (pipeline/model/linear.py). Sides take turns on
each batch. `computed` counts the rows that the linear layers were given, by hooks on them; seconds are medians, and
`CPU s` those of all cores together: where other work fills the machine, CPU seconds of one thread say more. Ends with 1
where a vector is off by more than 1e-5, Spearman differs in four digits, or real tokens are less than 0.95 of computed.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.corpora import machine
from benchmarks.fine_tuning import minilm
from pipeline.core.console import table
from pipeline.index.encoder import TextEncoder
from pipeline.model.contrastive import ContrastiveOptions, PairVectors, contrastive_loss
from pipeline.model.folder import load_model
from pipeline.model.linear import use_onednn
from pipeline.model.packing import pack
from pipeline.model.scores import read_sts, spearman

BATCH, MAX_LENGTH, TEMPERATURE = 64, 128, 0.05
MAX_DIFFERENCE, MIN_RATIO = 1e-5, 0.95

Column = list[list[int]]  # token ids of each text
Pairs = tuple[Column, Column]  # a batch's anchors and its positives


class Packed(nn.Module):
    """Our encoder: (2 B, D) vectors, anchors first, in one pass."""

    def __init__(self, folder: Path, *, own_linear: bool) -> None:
        super().__init__()
        with nullcontext() if own_linear else patch("pipeline.model.linear.is_intel", return_value=True):
            self.model, _ = load_model(folder)  # on Intel's processors torch's own layers stay

    def forward(self, pairs: Pairs) -> Tensor:
        return self.model(pack(pairs[0] + pairs[1]))


class Padded(nn.Module):
    """The encoder of transformers: (2 B, D) vectors, anchors first, in a pass a column."""

    def __init__(self, folder: Path, *, own_linear: bool) -> None:
        super().__init__()
        from transformers import AutoModel

        self.model = AutoModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="sdpa")
        if own_linear:
            use_onednn(self.model)

    def forward(self, pairs: Pairs) -> Tensor:
        return torch.cat([self._vectors(column) for column in pairs])

    def _vectors(self, column: Column) -> Tensor:
        lengths = torch.tensor([len(ids) for ids in column])
        ids_NL = pad_sequence([torch.tensor(ids) for ids in column], batch_first=True)
        mask_NL = (torch.arange(ids_NL.shape[1]) < lengths[:, None]).long()
        states_NLD = self.model(input_ids=ids_NL, attention_mask=mask_NL).last_hidden_state
        return F.normalize((states_NLD * mask_NL[..., None]).sum(dim=1) / lengths[:, None], dim=-1)


def step(side: nn.Module, pairs: Pairs) -> float:
    """Leaves gradients in the side's parameters. Returns the loss."""
    anchors, positives = side(pairs).chunk(2)
    keys = torch.arange(3 * len(anchors)).view(-1, 3)  # all pairs differ
    rows = PairVectors(anchors, positives, anchors.new_zeros(len(anchors), 0, anchors.shape[1]), keys)
    loss, _ = contrastive_loss(rows, ContrastiveOptions(symmetric=False), 1 / TEMPERATURE)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


def seconds(side: nn.Module, pairs: Pairs) -> tuple[float, float]:
    """Of a step: by the clock, and of CPUs."""
    side.train().zero_grad()
    began, began_cpu = time.perf_counter(), time.process_time()
    step(side, pairs)
    return time.perf_counter() - began, time.process_time() - began_cpu


def computed(side: nn.Module, pairs: Pairs) -> float:
    """Rows that a linear layer of the side was given, by the mean over its linear layers."""
    linear = [module for module in side.modules() if isinstance(module, nn.Linear)]
    rows: list[int] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows.append(inputs[0].shape[:-1].numel())

    hooks = [module.register_forward_hook(note) for module in linear]
    with torch.inference_mode():
        side(pairs)
    for hook in hooks:
        hook.remove()
    return sum(rows) / len(linear)


def batches(path: Path, folder: Path, count: int, seed: int) -> list[Pairs]:
    """Random pairs of a JSON Lines file, as token ids."""
    _, tokenizer = load_model(folder)
    tokenizer.enable_truncation(MAX_LENGTH)
    lines = random.Random(seed).sample(path.read_text(encoding="utf-8").splitlines(), count * BATCH)
    rows = [json.loads(line) for line in lines]
    anchors, positives = (
        [encoding.ids for encoding in tokenizer.encode_batch([row[field] for row in rows])]
        for field in ("anchor", "positive")
    )
    return [(anchors[i : i + BATCH], positives[i : i + BATCH]) for i in range(0, len(rows), BATCH)]


def packing(folder: Path, drawn: list[Pairs], repeats: int) -> tuple[list[list[object]], float]:
    """The lines of the table, and the share of computed tokens that are real when packed."""
    sides = {
        "packed, our linear layers": Packed(folder, own_linear=True),
        "packed, torch's": Packed(folder, own_linear=False),
        "padded, our linear layers": Padded(folder, own_linear=True),
        "padded, torch's": Padded(folder, own_linear=False),
    }
    check_losses([side.eval() for side in sides.values()], drawn[0])
    seen = {name: sum(computed(side, pairs) for pairs in drawn) for name, side in sides.items()}
    for side in sides.values():
        seconds(side, drawn[0])  # warms it
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for pairs in drawn:
            for name, side in sides.items():
                times[name].append(seconds(side, pairs))
    real, base = sum(len(ids) for pairs in drawn for column in pairs for ids in column), next(iter(sides))
    lines: list[list[object]] = [
        [name, f"{real:,}", f"{seen[name]:,.0f}", f"{real / seen[name]:.4f}", *_times(times[name], times[base])]
        for name in sides
    ]
    return lines, real / seen[base]


def _times(found: list[tuple[float, float]], base: list[tuple[float, float]]) -> list[str]:
    """Median seconds, by the clock and of CPUs, and how many times the base's each is.

    Ratios are of the same batch, one right after the other: what else the machine does falls on both.
    """
    cells: list[str] = []
    for own, other in zip(zip(*found, strict=True), zip(*base, strict=True), strict=True):
        cells += [f"{median(own):.3f}", f"{median(a / b for a, b in zip(own, other, strict=True)):.2f}"]
    return cells


def check_losses(sides: list[nn.Module], pairs: Pairs) -> None:
    """All sides do the same work, or there is nothing to compare."""
    losses = [step(side, pairs) for side in sides]
    if max(losses) - min(losses) > MAX_DIFFERENCE:
        sys.exit(
            f"the sides' losses on one batch are {', '.join(f'{loss:.6f}' for loss in losses)}; they must be equal"
        )


def vectors(folder: Path, file: Path) -> tuple[list[list[object]], bool]:
    """The lines of the table, and whether the two sides agree."""
    from sentence_transformers import SentenceTransformer

    task = read_sts(file)
    theirs = SentenceTransformer(str(folder), device="cpu")
    encode: dict[str, Callable[[list[str]], np.ndarray]] = {
        "ours": TextEncoder(folder, device="cpu").encode,
        "sentence-transformers": lambda texts: theirs.encode(texts, show_progress_bar=False),
    }
    found = {name: (side(task.first), side(task.second)) for name, side in encode.items()}
    scores = {name: spearman(task.scores, cosines(*both).tolist()) for name, both in found.items()}
    difference = float(np.abs(np.stack(found["ours"]) - np.stack(found["sentence-transformers"])).max())
    off = {"ours": f"{difference:.1e}", "sentence-transformers": ""}
    lines: list[list[object]] = [[name, 2 * len(task.scores), off[name], f"{scores[name]:.4f}"] for name in encode]
    return lines, difference <= MAX_DIFFERENCE and len({f"{score:.4f}" for score in scores.values()}) == 1


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return (first * second).sum(axis=1) / lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with sts_b/test.tsv and debian/pairs.jsonl")
    parser.add_argument("--batches", type=int, default=10, help=f"batches of {BATCH} pairs")
    parser.add_argument("--repeats", type=int, default=3, help="turns that each side takes on each batch")
    parser.add_argument("--threads", type=int, help="of torch; by default as many as there are cores")
    parser.add_argument("--seed", type=int, default=0, help="of which pairs are drawn")
    args = parser.parse_args()
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # of the pooling layer that is left out
    torch.set_num_threads(args.threads or torch.get_num_threads())
    folder = Path(minilm())
    equal, agree = vectors(folder, args.data / "sts_b" / "test.tsv")
    drawn = batches(args.data / "debian" / "pairs.jsonl", folder, args.batches, args.seed)
    lines, share = packing(folder, drawn, args.repeats)
    print(f"\n{machine()}\n\n{table(equal, ['vectors', 'sentences', 'largest difference', 'Spearman'])}\n")
    print(
        table(
            lines, ["step", "real tokens", "computed", "real/computed", "seconds", "times ours", "CPU s", "times ours"]
        )
    )
    if not agree:
        sys.exit(f"found other vectors; allowed is a difference of {MAX_DIFFERENCE}, and Spearman equal in 4 digits")
    if share < MIN_RATIO:
        sys.exit(f"found {share:.4f} of the computed tokens to be real; allowed is {MIN_RATIO} or more")


if __name__ == "__main__":
    main()
