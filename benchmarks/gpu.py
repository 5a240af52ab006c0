"""Whether training is right on a GPU, then how fast it is. It takes torch and this repository: no data, and no Ray.

examples:
  python benchmarks/gpu.py                       # in under ten minutes on a GPU; without one, tiny models on the CPU
  python benchmarks/gpu.py --json gpu.json       # all that is printed, to keep
  python benchmarks/gpu.py --profile             # also what the steps of the first line spend their time on
  python benchmarks/gpu.py --quick               # tiny models on any device, to try it

First come the checks of benchmarks/gpu_checks.py, each way to a result beside another one; a wrong one is told in a
sentence, and the exit code is 1. Then a line a configuration, each in the largest micro-batch that fits, found by
doubling. `MFU` is the model's operations (recomputation not counted; embedding's are a forward pass) a second over the
device's peak in that precision; `wait` is the share of the time in which the loop waited for the next batch.

base is `model.size=base` with 32,000 tokens, 110 M parameters; small with BERT's 30,522 has MiniLM's size. Lengths are
512, or drawn from quantiles of real texts, a short and a long description of a Debian package a pair, or two paragraphs
of Linux's documentation; tokens are random.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.gpu_checks import CHECKS, Deviation, Rig
from benchmarks.gpu_speed import Bounds, Case, Speed, measure, profile, release
from benchmarks.gpu_training import shape_of
from pipeline.core.console import table
from pipeline.core.files import write_atomically
from pipeline.training.step import OutOfMemory

LIMIT_S = 530.0  # a configuration takes up to a minute, and the whole is to take under ten
PROFILE_S = 60.0  # of these

QUICK = Bounds(seconds=0.0, steps=2, fewest_tokens=256, most_tokens=512, backend="eager")
HEADER = (
    "work",
    "model",
    "texts",
    "precision",
    "layers",
    "pairs",
    "tokens/s",
    "pairs/s",
    "MFU %",
    "peak GB",
    "first step s",
    "wait %",
)


def cases(quick: bool) -> list[Case]:
    """What is measured, in the order of how much it matters."""
    if quick:
        train = [Case("toy", "descriptions", precision) for precision in ("bf16", "fp32", "fp16")]
        return [*train, Case("toy", "512", "bf16", compiled=True), Case("toy", "paragraphs", "fp32", trains=False)]
    return [
        *_both("base", "512", "bf16"),
        *_both("base", "descriptions", "bf16"),
        *_both("small", "descriptions", "bf16"),
        *_both("base", "512", "bf16", trains=False),
        *_both("small", "paragraphs", "bf16", trains=False),
        *(Case("base", "512", precision) for precision in ("fp16", "tf32", "fp32")),
        *_both("small", "descriptions", "fp16"),
        *(Case("small", "descriptions", precision) for precision in ("tf32", "fp32")),
        Case("base", "paragraphs", "bf16", trains=False),
        *(Case("small", "paragraphs", precision, trains=False) for precision in ("fp16", "tf32", "fp32")),
    ]


def _both(size: str, texts: str, precision: str, trains: bool = True) -> list[Case]:
    return [Case(size, texts, precision, compiled, trains) for compiled in (True, False)]


def rig_of(device: torch.device, quick: bool) -> Rig:
    if quick:
        return Rig(device, shape_of("toy"), pairs=6, backend=QUICK.backend, steps=6)
    return Rig(device, shape_of("small"), pairs=32)


def check(rig: Rig) -> tuple[list[Deviation], list[str]]:
    """All deviations, and a sentence for each that is too large and for each check that could not be made."""
    found: list[Deviation] = []
    sentences = []
    for name, one in CHECKS.items():
        began = time.monotonic()
        try:
            found += list(one(rig))
        except Exception as error:  # what fails on a device is a finding, and the other checks are more of them
            words = " ".join(str(error).split())[:500]
            sentences.append(f"{name}: the check ended with {type(error).__name__}: {words}")
        _note(f"checked {name} in {time.monotonic() - began:.1f} s")
    return found, [f"{each}." for each in [*sentences, *(str(one) for one in found if one.is_wrong)]]


def measure_all(device: torch.device, quick: bool, end: float) -> tuple[list[Speed], list[str]]:
    """All speeds, and what was left out, with the reason."""
    bounds = QUICK if quick else Bounds()
    found: list[Speed] = []
    left_out = []
    for case in cases(quick):
        if time.monotonic() > end:
            left_out.append(f"{case}: time was up")
            continue
        try:
            found.append(measure(case, device, bounds))
            _note(" ".join(map(str, _line(found[-1]))))
        except (OutOfMemory, torch.OutOfMemoryError):
            left_out.append(f"{case}: it does not fit into memory")
        release(device)
    return found, left_out


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    found = {"date": datetime.now(UTC).date().isoformat(), "torch": torch.__version__, "python": sys.version.split()[0]}
    if device.type != "cuda":
        return {"device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, no GPU", **found}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
        f"compute capability {properties.major}.{properties.minor}",
        "driver": _driver(),
        "CUDA": torch.version.cuda,
        **found,
    }


def _driver() -> str:
    if not shutil.which("nvidia-smi"):
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def _line(speed: Speed) -> list[object]:
    case = speed.case
    return [
        "train" if case.trains else "embed",
        case.size,
        case.texts,
        case.precision,
        "compiled" if case.compiled else "eager",
        speed.pairs,
        f"{speed.tokens_per_s:,.0f}",
        f"{speed.pairs_per_s:,.1f}",
        "–" if speed.mfu is None else f"{100 * speed.mfu:.1f}",
        f"{speed.peak_bytes / 1e9:.1f}",
        f"{speed.first_step_s:.1f}",
        f"{100 * speed.wait_share:.0f}",
    ]


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def write(path: Path, results: dict[str, Any], speeds: Sequence[Speed]) -> None:
    rows = [asdict(one) | {"tokens_per_s": one.tokens_per_s, "pairs_per_s": one.pairs_per_s} for one in speeds]
    write_atomically(path, json.dumps(results | {"speeds": rows}, indent=1).encode())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models, as where there is no GPU")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--profile", action="store_true", help="also list what takes most of a step's time")
    args = parser.parse_args(arguments)
    end = time.monotonic() + LIMIT_S - PROFILE_S * args.profile
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quick = args.quick or device.type == "cpu"
    results: dict[str, Any] = {"machine": machine(device)}
    print(", ".join(f"{name} {value}" if name != "device" else value for name, value in results["machine"].items()))

    deviations, wrong = check(rig_of(device, quick))
    release(device)
    results |= {"deviations": [asdict(one) for one in deviations], "wrong": wrong}
    rows = [(one.what, f"{one.found:.1e}", f"{one.allowed:.0e}") for one in deviations]
    print(f"\n{table(rows, ('deviation', 'found', 'allowed'))}\n")
    speeds, left_out = ([], []) if wrong else measure_all(device, quick, end)
    if speeds:
        print(table(map(_line, speeds), HEADER))
    if args.profile and speeds:
        print(f"\n{profile(speeds[0].case, device, QUICK if quick else Bounds())}")
    if args.json:
        write(args.json, results | {"left_out": left_out}, speeds)
    print("\n".join([*wrong, *left_out]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
