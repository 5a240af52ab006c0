"""What 1 M, 1 G and 100 G records take: nodes, hours, bytes, dollars, and what gives out first.

  python benchmarks/scaling.py              # the tables of cluster/SCALING.md, a few seconds

Rates are measured on this project's machine of two cores (benchmarks/README.md, and below), scaled by cores; what is
assumed is named so. Counts of tasks are those of the real plans (benchmarks/scaling_plan.py). A record is 500 bytes of
text or 120 tokens, a model MiniLM's size: 10.6 M weights beside the token table, vectors of 384 numbers.
"""

import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.scaling_plan import RECORD_BYTES, inputs_of
from pipeline.data.prepare import MAX_SHARDS
from pipeline.data.records import parts_at_most
from pipeline.data.tokenizing import ROW_GROUP_ROWS
from pipeline.embedding.embed import write_rows
from pipeline.embedding.ledger import PART_ENTRIES
from pipeline.storage.files import REQUESTS_AT_ONCE

SCALES = {"1 M": 10**6, "1 G": 10**9, "100 G": 10**11}
NODES = {"1 M": (1, 1), "1 G": (8, 4), "100 G": (64, 32)}  # CPU workers, GPU workers
CPU_CORES = 16
TOKENS, WEIGHTS, WIDTH = 120, 10.6e6, 384
VECTOR_ROW_BYTES = 4 * WIDTH + RECORD_BYTES + 150  # vector, text, ids and metadata
BANDS = 32  # of data.near_duplicates.threshold=0.8
# Bytes a record, measured on 20,000 of Debian's descriptions, and what else costs bytes
RECORD_FILE_BYTES, TOKEN_FILE_BYTES, EXCHANGE_RECORD_BYTES = 230, 200, 450
BATCH_BYTES = 1400  # of a record batch in the exchange, beside its rows
REQUESTS_A_MEETING = 3  # of a part and a shard, in a bucket
ID_BYTES = 32
COMPONENT_BYTES = 40  # a record in the task that joins near-duplicates: labels, the graph of a band, its components
ROW_GROUP_BYTES = 300  # of memory, a row group: an entry of the manifest and one of the plan; tests/test_scaling.py

# Dollars; us-east-1, from memory, November 2026: to be checked. Pinecone: its Standard plan on 2026-11-04.
PRICES = {
    "m7i.xlarge, the head, an hour": 0.2016,
    "c7i.4xlarge on demand, an hour": 0.714,
    "c7i.4xlarge spot, an hour": 0.32,
    "g6.2xlarge on demand, an hour": 0.9776,
    "g6.2xlarge spot, an hour": 0.50,
    "S3, a million reads": 0.40,
    "S3, a GB and month": 0.023,
    "Pinecone, a million write units": 4.0,
    "Pinecone, a GB and month": 0.33,
}


@dataclass(frozen=True)
class Rate:
    value: float
    unit: str
    source: str


RATES = {
    "records, near-duplicates": Rate(
        1000 / (745 - 1000e6 / 4.2 / (8.20e6 / 9.40)) / 2,
        "MB/s a core",
        "benchmarks/README.md: 1,000 MB in 745 s on two cores, less the time to tokenize them",
    ),
    "tokenize": Rate(
        8.20e6 / 9.40 / 2, "tokens/s a core", "benchmarks/README.md: 8.20 M tokens in 9.40 s on two cores"
    ),
    "encode on CPUs": Rate(
        2000, "tokens/s a core", "2026-11-26, two Intel Xeon cores: MiniLM, 42,500 tokens of Debian's in 20.9 s of CPU"
    ),
    "LanceDB, a write": Rate(0.11, "s", "the same day: an upsert of 8,192 rows takes 0.13 s where 125,000 are there"),
    "LanceDB, a write, a row there": Rate(1.6e-7, "s", "and 0.25 s where 874,000 are, 384 numbers each"),
    "ledger, an entry": Rate(0.004, "s", "the same day: a commit to a table of 100 fragments"),
    "ledger, an entry, a fragment there": Rate(
        9e-6, "s", "and of 1,200: 0.0157 s where it was 0.0046 s, on a local disk"
    ),
    "LanceDB, index": Rate(3 / (1e5 * 256), "s a number", "stores/lancedb_store.py: 3 s for 100,000 of 256"),
    "L4, training": Rate(0.25 * 121e12, "FLOP/s", "assumed: 25% of its dense bf16 peak, 121 TFLOP/s"),
    "L4, encoding": Rate(0.35 * 121e12, "FLOP/s", "assumed: 35% of it"),
    "Pinecone": Rate(50e6, "B/s a namespace", "its documentation"),
    "a request to a bucket": Rate(0.02, "s", "assumed, on the service's own network; a process makes 16 at once"),
    "a node's disk or network": Rate(500e6, "B/s", "assumed"),
}


@dataclass(frozen=True)
class Line:
    """A stage at one scale."""

    stage: str
    hours: float
    moved: float  # bytes over networks and disks
    dollars: float
    bottleneck: str


class Scale:
    """The arithmetic of one number of records."""

    def __init__(self, name: str) -> None:
        self.name, self.records = name, SCALES[name]
        self.cpu_nodes, self.gpu_nodes = NODES[name]
        self.text_bytes, self.tokens = self.records * RECORD_BYTES, self.records * TOKENS

    @cached_property
    def plan(self) -> tuple[int, int]:
        """Read tasks and shards of the real plan; of 100 G records that of 1 G, for both are at their limits there."""
        planned = min(self.records, SCALES["1 G"])
        with tempfile.TemporaryDirectory() as folder:
            inputs = inputs_of(Path(folder), planned)
        return len(inputs.work), inputs.shards

    @property
    def read_tasks(self) -> int:
        return self.plan[0]

    @property
    def shards(self) -> int:
        return self.plan[1]

    @property
    def pairs(self) -> float:
        """Meetings of a part and a shard that have rows: Poisson, for ids are hashes."""
        parts = parts_at_most(self.text_bytes, self.read_tasks)
        return parts * self.shards * -math.expm1(-self.records / (parts * self.shards))

    @property
    def exchange_bytes(self) -> float:
        """Written once and read once: text as lz4 leaves it, columns beside, and what a record batch costs."""
        return 2 * (self.records * EXCHANGE_RECORD_BYTES + self.pairs * BATCH_BYTES)

    @property
    def writes(self) -> int:
        return -(-self.records // write_rows(self.records))

    @property
    def merge_s(self) -> float:
        """All of LanceDB's upserts, one after the other: each looks at the ids of all rows that are there."""
        fixed, a_row = RATES["LanceDB, a write"].value, RATES["LanceDB, a write, a row there"].value
        return self.writes * (fixed + a_row * self.records / 2)

    @property
    def ledger_s(self) -> float:
        """Two entries a write; each commit rewrites the list of all fragments."""
        entries = 2 * self.writes
        fixed, a_fragment = RATES["ledger, an entry"].value, RATES["ledger, an entry, a fragment there"].value
        return entries * fixed + a_fragment * entries**2 / 2

    def hours(self, seconds: float) -> float:
        return seconds / 3600

    def cost(self, hours: float, cpu_nodes: int, gpu_nodes: int) -> float:
        cpu, gpu = PRICES["c7i.4xlarge spot, an hour"], PRICES["g6.2xlarge spot, an hour"]
        return hours * (PRICES["m7i.xlarge, the head, an hour"] + cpu_nodes * cpu + gpu_nodes * gpu)

    def prepare(self) -> Line:
        cores = self.cpu_nodes * CPU_CORES
        seconds = self.text_bytes / 1e6 / RATES["records, near-duplicates"].value / cores
        moved = self.text_bytes + self.exchange_bytes + 3 * self.records * RECORD_FILE_BYTES
        requests = REQUESTS_A_MEETING * self.pairs
        waiting = requests * RATES["a request to a bucket"].value / REQUESTS_AT_ONCE / cores
        hours = self.hours(max(seconds, moved / self.cpu_nodes / RATES["a node's disk or network"].value) + waiting)
        reads = requests / 1e6 * PRICES["S3, a million reads"]
        component, shard = self.records * COMPONENT_BYTES, self.text_bytes / self.shards
        bottleneck = {
            "1 M": "nodes that start, 4 minutes",
            "1 G": f"near-duplicates: one task holds a band of all records, {size(component)}, and a worker has 32 GB; "
            f"without them the exchange, whose requests wait {span(self.hours(waiting))}",
            "100 G": f"{size(shard)} of text a shard, three times that in a task's memory; near-duplicates "
            f"{size(component)} in one",
        }[self.name]
        return Line("prepare", hours, moved, self.cost(hours, self.cpu_nodes, 0) + reads, bottleneck)

    def tokenize(self) -> Line:
        cores = self.cpu_nodes * CPU_CORES
        hours = self.hours(self.tokens / RATES["tokenize"].value / cores)
        moved = self.records * (RECORD_FILE_BYTES + TOKEN_FILE_BYTES)
        shard = self.tokens / self.shards * 4 * 2
        bottleneck = {
            "1 M": "nodes that start",
            "1 G": "none: cores",
            "100 G": f"a shard's rows are in one task's memory twice, {size(shard)}",
        }[self.name]
        return Line("tokenize", hours, moved, self.cost(hours, self.cpu_nodes, 0), bottleneck)

    def train(self) -> Line:
        hours = self.hours(6 * WEIGHTS * self.tokens / RATES["L4, training"].value / self.gpu_nodes)
        groups = self.records / ROW_GROUP_ROWS
        plan = groups * ROW_GROUP_BYTES
        bottleneck = {
            "1 M": "workers that start",
            "1 G": f"GPUs; the driver holds {groups:,.0f} row groups, {size(plan)}",
            "100 G": f"the driver and each worker hold {groups:,.0f} row groups, {size(plan)}",
        }[self.name]
        moved = self.records * TOKEN_FILE_BYTES
        return Line("train, one epoch", hours, moved, self.cost(hours, 0, self.gpu_nodes), bottleneck)

    @property
    def encode_hours(self) -> float:
        return self.hours(2 * WEIGHTS * self.tokens / RATES["L4, encoding"].value / self.gpu_nodes)

    @property
    def encode_on_cpus_hours(self) -> float:
        return self.hours(self.tokens / RATES["encode on CPUs"].value / self.cpu_nodes / CPU_CORES)

    def embed_lancedb(self) -> Line:
        merging, noting = self.hours(self.merge_s), self.hours(self.ledger_s)
        hours = max(self.encode_hours, merging + noting)
        moved = self.records * (RECORD_FILE_BYTES + VECTOR_ROW_BYTES + ID_BYTES * self.writes / 2)
        bottleneck = (
            f"one writer: {self.writes:,} upserts that look at all ids there take {span(merging)}; the ledger's "
            f"commits {span(noting)}, encoding {span(self.encode_hours)}"
        )
        return Line("embed into LanceDB", hours, moved, self.cost(hours, 0, self.gpu_nodes), bottleneck)

    def embed_pinecone(self) -> Line:
        sent = self.records * VECTOR_ROW_BYTES
        sending = self.hours(sent / RATES["Pinecone"].value)
        hours = max(self.encode_hours, sending, noting := self.hours(self.ledger_s))
        units = sent / 1e3 / 1e6 * PRICES["Pinecone, a million write units"]
        bottleneck = (
            f"sending takes {span(sending)}, the ledger's commits {span(noting)}, encoding {span(self.encode_hours)}; "
            f"write units are ${units:,.0f} of it"
        )
        moved = self.records * RECORD_FILE_BYTES + sent
        return Line("embed into Pinecone", hours, moved, self.cost(hours, 0, self.gpu_nodes) + units, bottleneck)

    def search(self) -> Line:
        """Of LanceDB: the index, which one task builds; what a month of storage costs."""
        hours = self.hours(self.records * WIDTH * RATES["LanceDB, index"].value)
        held = self.records * VECTOR_ROW_BYTES
        month = held / 1e9 * PRICES["S3, a GB and month"]
        pinecone = held / 1e9 * PRICES["Pinecone, a GB and month"]
        bottleneck = (
            f"one task builds the index, {size(self.records * WIDTH)} of codes; a month of storage, which the "
            f"dollars hold, is ${month:,.2f}, in Pinecone ${pinecone:,.2f}"
        )
        return Line("search: index", hours, held, self.cost(hours, 1, 0) + month, bottleneck)

    def lines(self) -> list[Line]:
        stages: list[Callable[[], Line]] = [self.prepare, self.tokenize, self.train]
        stages += [self.embed_lancedb, self.embed_pinecone, self.search]
        return [stage() for stage in stages]


def markdown(header: list[str], rows: list[list[str]], aligned: str) -> str:
    """A table; `aligned` has an l or an r a column."""
    marks = ["--:" if side == "r" else "---" for side in aligned]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, marks, *rows])


def size(number: float) -> str:
    power = min(int(math.log10(max(number, 1))) // 3, 6)
    return f"{number / 1000**power:.3g} {('B', 'KB', 'MB', 'GB', 'TB', 'PB', 'EB')[power]}"


def span(hours: float) -> str:
    for unit, of_hours, most in (("min", 1 / 60, 1), ("h", 1, 72), ("days", 24, 24 * 730)):
        if hours < most:
            return f"{hours / of_hours:.3g} {unit}"
    return f"{hours / 24 / 365:,.0f} years"


def dollars(amount: float) -> str:
    return f"{amount:,.2f}" if amount < 100 else f"{amount:,.0f}"


def scale_table(scale: Scale) -> str:
    rows = [
        [one.stage, span(one.hours), size(one.moved), dollars(one.dollars), one.bottleneck] for one in scale.lines()
    ]
    return markdown(["stage", "time", "bytes moved", "dollars", "gives out first"], rows, "lrrrl")


def counts_table(scales: list[Scale]) -> str:
    """What the design has of each kind."""
    of: list[tuple[str, Callable[[Scale], str]]] = [
        ("read tasks (at most 2,000 a source, and one a file)", lambda s: f"{s.read_tasks:,}"),
        ("input a read task", lambda s: size(s.text_bytes / s.read_tasks)),
        (f"shards (at most {MAX_SHARDS:,})", lambda s: f"{s.shards:,}"),
        ("text a shard", lambda s: size(s.text_bytes / s.shards)),
        ("meetings in the exchange, three requests each in a bucket", lambda s: f"{s.pairs:,.0f}"),
        ("near-duplicates: the largest task's memory", lambda s: size(s.records * COMPONENT_BYTES)),
        ("encoding on the CPU workers in place of GPUs", lambda s: span(s.encode_on_cpus_hours)),
        ("near-duplicates: keys of all bands", lambda s: size(8.0 * BANDS * s.records)),
        ("row groups in the manifest", lambda s: f"{s.records // ROW_GROUP_ROWS:,}"),
        ("rows of a write to the store", lambda s: f"{write_rows(s.records):,}"),
        ("writes to the store", lambda s: f"{s.writes:,}"),
        ("entries of the ledger that one process holds at once", lambda s: f"{entries_at_once(s.records):,}"),
    ]
    rows = [[name, *(count(scale) for scale in scales)] for name, count in of]
    return markdown(["", *(scale.name for scale in scales)], rows, "lrrr")


def entries_at_once(entries: int) -> int:
    """Of the ledger's, by its own cut into ranges of ids."""
    return entries // min(1 << 16, 1 + entries // PART_ENTRIES)


def rates_table() -> str:
    rows = [[name, f"{rate.value:.3g}", rate.unit, rate.source] for name, rate in RATES.items()]
    return markdown(["rate", "value", "unit", "from"], rows, "lrll")


def prices_table() -> str:
    return markdown(["price", "dollars"], [[name, f"{price:g}"] for name, price in PRICES.items()], "lr")


def tables() -> dict[str, str]:
    """Everything that cluster/SCALING.md has from here, by the heading it stands under."""
    scales = [Scale(name) for name in SCALES]
    found = {}
    for scale in scales:
        cpu, gpu = scale.cpu_nodes, scale.gpu_nodes
        found[f"{scale.name} records on a head, {cpu} CPU and {gpu} GPU workers"] = scale_table(scale)
    return found | {"Counts": counts_table(scales), "Rates": rates_table(), "Prices": prices_table()}


def main() -> None:
    for heading, text in tables().items():
        print(f"## {heading}\n\n{text}\n")


if __name__ == "__main__":
    main()
