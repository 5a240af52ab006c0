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
from pipeline.core.files import REQUESTS_AT_ONCE
from pipeline.data.prepare import MAX_SHARDS
from pipeline.data.records import parts_at_most
from pipeline.data.tokenizing import ROW_GROUP_ROWS
from pipeline.index.embed import MIN_WAVE_S, SPREAD_ROWS, fragment_rows

SCALES = {"1 M": 10**6, "1 G": 10**9, "100 G": 10**11}
NODES = {"1 M": (1, 1), "1 G": (8, 4), "100 G": (64, 32)}  # CPU workers, GPU workers
CPU_CORES, GPU_CORES = 16, 8
TOKENS, WEIGHTS, WIDTH = 120, 10.6e6, 384
SENT_ROW_BYTES = 4 * WIDTH + RECORD_BYTES + 150  # vector, text, ids and metadata
TABLE_ROW_BYTES = SENT_ROW_BYTES + 150  # and digest and places
COMPARED_BYTES = 200  # of a document and its row: ids, digests, places
DIFFERENCE_BYTES = 24  # a document that is new, changed or gone, in the driver
FRAGMENT_BYTES = 119  # of the table's manifest, which each commit writes anew; measured
CHANGED = 0.01
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
    "distinct texts": Rate(
        1 / 3.0e-6, "records/s a core", "2026-11-30, two Intel Xeon cores, busy: CPU of 320,000 records of 16 files"
    ),
    "write fragments": Rate(
        1 / 4.5e-6, "rows/s a core", "the same day: CPU of benchmarks/table.py's first write, of 64 numbers a row"
    ),
    "compare": Rate(1 / 1.8e-6, "documents/s a core", "the same day: CPU of a range of its documents"),
    "a commit": Rate(0.0022, "s", "the same day: the least of ten, to an empty table on a local disk"),
    "a commit, a fragment there": Rate(6.6e-6, "s", "and to one of 6,060 fragments, 42 ms"),
    "index": Rate(3 / (1e5 * 256), "s a number", "pipeline/index/indexing.py: 3 s for 100,000 of 256 on two cores"),
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

    def meetings(self, parts: int) -> float:
        """Times that a part and a shard have a record in common: Poisson, for ids are hashes."""
        return parts * self.shards * -math.expm1(-self.records / (parts * self.shards))

    @property
    def pairs(self) -> float:
        return self.meetings(parts_at_most(self.text_bytes, self.read_tasks))

    @property
    def exchange_bytes(self) -> float:
        """Written once and read once: text as lz4 leaves it, columns beside, and what a record batch costs."""
        return 2 * (self.records * EXCHANGE_RECORD_BYTES + self.pairs * BATCH_BYTES)

    @property
    def fragments(self) -> int:
        return -(-self.records // fragment_rows(self.records))

    @cached_property
    def waves(self) -> tuple[int, float, float]:
        """While all is encoded, as WaveCommitter has them: commits, their seconds, the seconds that a kill loses."""
        fixed, a_fragment = RATES["a commit"].value, RATES["a commit, a fragment there"].value
        a_fragment_s = 3600 * self.encode_hours / self.fragments
        there, now, commits, spent, longest, wave = 0, 0.0, 0, 0.0, 0.0, 0.0
        while there < self.fragments:
            some = math.ceil(max(MIN_WAVE_S, 50 * longest, 0.01 * now) / a_fragment_s)
            there, wave = min(there + some, self.fragments), some * a_fragment_s
            longest = fixed + a_fragment * there
            commits, spent, now = commits + 1, spent + longest, now + wave + longest
        return commits, spent, wave

    def waiting_hours(self, meetings: float, cores: int) -> float:
        """For the requests of an exchange through a bucket."""
        requests = REQUESTS_A_MEETING * meetings
        return self.hours(requests * RATES["a request to a bucket"].value / REQUESTS_AT_ONCE / cores)

    def reads_dollars(self, meetings: float) -> float:
        return REQUESTS_A_MEETING * meetings / 1e6 * PRICES["S3, a million reads"]

    def hours(self, seconds: float) -> float:
        return seconds / 3600

    def cost(self, hours: float, cpu_nodes: int, gpu_nodes: int) -> float:
        cpu, gpu = PRICES["c7i.4xlarge spot, an hour"], PRICES["g6.2xlarge spot, an hour"]
        return hours * (PRICES["m7i.xlarge, the head, an hour"] + cpu_nodes * cpu + gpu_nodes * gpu)

    def prepare(self) -> Line:
        cores = self.cpu_nodes * CPU_CORES
        seconds = self.text_bytes / 1e6 / RATES["records, near-duplicates"].value / cores
        moved = self.text_bytes + self.exchange_bytes + 3 * self.records * RECORD_FILE_BYTES
        waiting, reads = self.waiting_hours(self.pairs, cores), self.reads_dollars(self.pairs)
        hours = self.hours(max(seconds, moved / self.cpu_nodes / RATES["a node's disk or network"].value)) + waiting
        component, shard = self.records * COMPONENT_BYTES, self.text_bytes / self.shards
        bottleneck = {
            "1 M": "nodes that start, 4 minutes",
            "1 G": f"near-duplicates: one task holds a band of all records, {size(component)}, and a worker has 32 GB; "
            f"without them the exchange, whose requests wait {span(waiting)}",
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

    def work_hours(self, rate: str) -> float:
        """Of all records, on the GPU workers' cores."""
        return self.hours(self.records / RATES[rate].value / self.gpu_nodes / GPU_CORES)

    @property
    def comparing_hours(self) -> float:
        """Of all ranges, once."""
        bytes_a_node = self.records * COMPARED_BYTES / self.gpu_nodes
        return max(self.work_hours("compare"), self.hours(bytes_a_node / RATES["a node's disk or network"].value))

    def distinct_texts(self) -> Line:
        """Records to documents, where they are pairs or have prompts."""
        meetings, cores = self.meetings(self.shards), self.gpu_nodes * GPU_CORES
        waiting = self.waiting_hours(meetings, cores)
        moved = (
            2 * (self.records * EXCHANGE_RECORD_BYTES + meetings * BATCH_BYTES) + 2 * self.records * RECORD_FILE_BYTES
        )
        reading = self.hours(moved / self.gpu_nodes / RATES["a node's disk or network"].value)
        hours = max(self.work_hours("distinct texts"), reading) + waiting
        bottleneck = f"{meetings:,.0f} meetings, whose requests wait {span(waiting)}; none for texts alone"
        dollars = self.cost(hours, 0, self.gpu_nodes) + self.reads_dollars(meetings)
        return Line("embed: distinct texts", hours, moved, dollars, bottleneck)

    def embed(self) -> Line:
        """Into an empty table: encode and write side by side, and compare once at the end."""
        writing, comparing = self.work_hours("write fragments"), self.comparing_hours
        commits, seconds, wave = self.waves
        hours = max(self.encode_hours, writing) + self.hours(seconds) + comparing
        moved = self.records * (RECORD_FILE_BYTES + TOKEN_FILE_BYTES + TABLE_ROW_BYTES + COMPARED_BYTES)
        bottleneck = (
            f"encoding, {span(self.encode_hours)}; writing beside it {span(writing)}, {commits:,} commits "
            f"{span(self.hours(seconds))}, comparing {span(comparing)}; a kill loses {span(self.hours(wave))} at most"
        )
        return Line("embed", hours, moved, self.cost(hours, 0, self.gpu_nodes), bottleneck)

    def embed_again(self) -> Line:
        """With 1% of the texts new: compare, encode, delete as many, compare again."""
        comparing, encoding = 2 * self.comparing_hours, CHANGED * self.encode_hours
        hours = comparing + encoding
        moved = self.records * (2 * COMPARED_BYTES + CHANGED * TABLE_ROW_BYTES)
        held = self.records * CHANGED * DIFFERENCE_BYTES
        bottleneck = (
            f"comparing twice, {span(comparing)}, encoding {span(encoding)}; the driver holds the difference, "
            f"{size(held)}, and a task a range, {size(self.records / self.shards * COMPARED_BYTES)}"
        )
        return Line("embed again, 1% new", hours, moved, self.cost(hours, 0, self.gpu_nodes), bottleneck)

    def search(self) -> Line:
        """The index, by the CPU workers where there are many rows, and its recall, in one task; a month of storage."""
        vectors, is_spread = self.records * 4 * WIDTH, self.records >= SPREAD_ROWS
        pairs_of_cores = self.cpu_nodes * CPU_CORES / 2 if is_spread else 1  # the rate is that of two cores
        building = self.hours(self.records * WIDTH * RATES["index"].value / pairs_of_cores)
        reading = self.hours(vectors / RATES["a node's disk or network"].value)
        month = self.records * TABLE_ROW_BYTES / 1e9 * PRICES["S3, a GB and month"]
        who = "all nodes build" if is_spread else "one task builds"
        bottleneck = (
            f"{who} the index, {size(self.records * WIDTH)} of codes, in {span(building)}; one task reads all "
            f"vectors for its recall in {span(reading)}; the dollars hold a month of storage, ${month:,.2f}"
        )
        hours = building + reading
        return Line("search: index", hours, 2 * vectors, self.cost(hours, self.cpu_nodes, 0) + month, bottleneck)

    def pinecone(self) -> Line:
        """The first push of all rows."""
        sent = self.records * SENT_ROW_BYTES
        hours = self.hours(sent / RATES["Pinecone"].value)
        units = sent / 1e3 / 1e6 * PRICES["Pinecone, a million write units"]
        month = sent / 1e9 * PRICES["Pinecone, a GB and month"]
        bottleneck = (
            f"50 MB/s a namespace; write units are ${units:,.0f} of it; a month of storage is ${month:,.2f} more"
        )
        return Line("push to Pinecone", hours, sent, self.cost(hours, 0, self.gpu_nodes) + units, bottleneck)

    def lines(self) -> list[Line]:
        stages: list[Callable[[], Line]] = [self.prepare, self.tokenize, self.train]
        stages += [self.distinct_texts, self.embed, self.embed_again, self.search, self.pinecone]
        return [stage() for stage in stages]


def markdown(header: list[str], rows: list[list[str]], aligned: str) -> str:
    """A table; `aligned` has an l or an r a column."""
    marks = ["--:" if side == "r" else "---" for side in aligned]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, marks, *rows])


def size(number: float) -> str:
    power = min(int(math.log10(max(number, 1))) // 3, 6)
    return f"{number / 1000**power:.3g} {('B', 'KB', 'MB', 'GB', 'TB', 'PB', 'EB')[power]}"


def span(hours: float) -> str:
    for unit, of_hours, most in (("s", 1 / 3600, 1 / 60), ("min", 1 / 60, 1), ("h", 1, 72), ("days", 24, 24 * 730)):
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
        ("documents of a range, which a task compares", lambda s: f"{s.records // s.shards:,}"),
        ("rows of a fragment of the table", lambda s: f"{fragment_rows(s.records):,}"),
        ("fragments", lambda s: f"{s.fragments:,}"),
        ("commits of a first embedding", lambda s: f"{s.waves[0]:,}"),
        ("the table's manifest, written by each of them", lambda s: size(s.fragments * FRAGMENT_BYTES)),
    ]
    rows = [[name, *(count(scale) for scale in scales)] for name, count in of]
    return markdown(["", *(scale.name for scale in scales)], rows, "lrrr")


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
