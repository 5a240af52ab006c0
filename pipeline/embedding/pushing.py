"""A push to Pinecone spread over the cluster: a task a range of ids, all within one budget of requests.

with table.writing() as writer:
    counts = push_over_cluster(writer, config, config.run_dir / "dead_letters" / table.name, progress)
"""

from __future__ import annotations

import json
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipeline.config import Config
from pipeline.embedding.stores.budget import Allowance, Budget
from pipeline.embedding.stores.dead_letters import DeadLetters
from pipeline.embedding.stores.pinecone_store import PineconeStore
from pipeline.embedding.stores.push import Push
from pipeline.embedding.stores.store import StoreError
from pipeline.embedding.table import Writer
from pipeline.runtime.cluster import on_own_node
from pipeline.runtime.outcome import JobError
from pipeline.runtime.session import Progress
from pipeline.storage.object_store import BucketError
from pipeline.storage.path import StoragePath

PUSH_CPUS = 0.5  # of a task, which mostly waits for answers


def push_over_cluster(writer: Writer, config: Config, letters: StoragePath, progress: Progress) -> Counter[str]:
    """Make the namespace of a table hold what the table holds. Returns the counts of `Push.run`.

    Rows that were refused lie under `letters` afterwards. Raises StoreError.
    """
    table, settings = writer.table, config.pinecone
    imports = config.under_root(settings.import_uri) if settings.import_uri else None
    account = SharedAccount(settings.requests_per_second, settings.max_concurrency, 2 * settings.timeout_s + 1)
    namespace = settings.namespace or table.name
    store = PineconeStore(settings, namespace, table.width, config.secret_files, Budget(account))
    store.create()
    handle = progress.handle

    def report(rows: int) -> None:
        handle.add.remote("pushed", rows)

    with progress.stage("push to Pinecone", None, "rows", counter="pushed"):
        most = config.embedding.max_deleted_fraction
        return Push(writer, store, DeadLetters(letters), over_cluster, imports, report, most).run()


def over_cluster(work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """What `work` returns for each item, in a task each, in the order in which they end. Raises StoreError."""
    import ray.data

    def run(batch: dict[str, Any]) -> dict[str, list[str]]:
        try:
            return {"found": [json.dumps({"found": work(items[i])}) for i in batch["id"].tolist()]}
        except Exception as error:  # returned as data: Ray would raise an error that has lost the cause
            traceback.print_exc()  # to the log
            says_all = isinstance(error, JobError | OSError | BucketError)
            words = str(error) if says_all else f"{type(error).__name__}: {error}"
            return {"found": [json.dumps({"error": words})]}

    if not items:
        return
    tasks = ray.data.range(len(items), override_num_blocks=len(items))
    for row in tasks.map_batches(run, batch_size=1, num_cpus=PUSH_CPUS).iter_rows():
        answer = json.loads(row["found"])
        if "error" in answer:
            raise StoreError(answer["error"])
        yield answer["found"]


class SharedAccount:
    """An `Allowance` in an actor, which all processes of a job ask."""

    def __init__(self, requests_per_second: float, max_concurrency: int, lease_s: float = 120.0) -> None:
        import ray

        actor = on_own_node(ray.remote(num_cpus=0)(Allowance))
        self.actor = actor.remote(requests_per_second, max_concurrency, lease_s)

    def ask(self) -> float:
        import ray

        return float(ray.get(self.actor.ask.remote()))

    def give_back(self) -> None:
        self.actor.give_back.remote()

    def hold(self, seconds: float) -> None:
        self.actor.hold.remote(seconds)
