"""A stand-in for Pinecone on 127.0.0.1: the REST contract of its 2026-07 API, as the SDK 10.2 speaks it.

    with pinecone_server(key="k", faults={"500": 0.1, "cut-after": 0.1}, seed=3) as server:
        Pinecone(api_key="k", host=server.url)

Control plane under `/indexes`, the data plane of an index under `/data/<name>`, as its description says. It refuses
what the service refuses: another key, too many records or bytes, wrong dimensions, ids, metadata. Of the requests to a
data plane a share fails, by kind:

    429, 429-after           without and with Retry-After
    403, 500, 503            as they are
    timeout                  no answer until the client goes
    cut-before, cut-after    the connection ends, nothing done or all
    part                     half of an upsert is written, then 500
    short                    half of an upsert is written, and the answer says so

Reads see what was written `lag_s` ago.
"""

from __future__ import annotations

import json
import operator
import random
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

Record = dict[str, Any]


class RefusalError(Exception):
    def __init__(self, status: int, message: str, code: str = "INVALID_ARGUMENT") -> None:
        self.status, self.body = status, {"error": {"code": code, "message": message}, "status": status}


class Service:
    """What is stored, what was asked, and what goes wrong."""

    def __init__(self, key: str, faults: dict[str, float], seed: int, retry_after_s: float) -> None:
        self.key, self.faults, self.retry_after_s = key, faults, retry_after_s
        self.chance, self.lock = random.Random(seed), threading.RLock()
        self.url = ""
        self.indexes: dict[str, dict[str, Any]] = {}
        self.records: dict[str, dict[str, dict[str, Record]]] = {}
        self.requests: list[tuple[float, str]] = []  # when and what, to data planes
        self.control: list[str] = []
        self.keys: list[str | None] = []
        self.faulted: list[str] = []
        self.under_way = self.most_under_way = 0
        self.poison: set[str] = set()  # ids that make a batch fail
        self.not_ready = 0  # descriptions until an index is ready
        self.work_s = 0.0  # that a request takes
        self.lag_s = 0.0
        self.writes: list[list[str]] = []  # ids of each upsert that was taken
        self.seen: dict[str, dict[str, dict[str, Record]]] = {}  # `records`, as reads see them
        self.unseen: list[tuple[float, str, str, dict[str, Record | None]]] = []  # when what was written
        self.imports: dict[str, Record] = {}
        self.bucket: Callable[[str], dict[str, list[Record]]] | None = None  # a folder's records by namespace

    def busiest(self, seconds: float = 1.0) -> int:
        """Most requests that came within so long."""
        times = [at for at, _ in self.requests]
        return max((sum(at <= other < at + seconds for other in times) for at in times), default=0)

    def count(self, operation: str) -> int:
        return sum(what == operation for _, what in self.requests)

    def fault(self) -> str | None:
        draw = self.chance.random()
        for kind, rate in self.faults.items():
            if draw < rate:
                return kind
            draw -= rate
        return None

    # The control plane.

    def create(self, body: Record) -> Record:
        name, fields = body["name"], body["schema"]["fields"]
        if name in self.indexes:
            raise RefusalError(409, "Resource already exists", "ALREADY_EXISTS")
        self.indexes[name] = {
            "name": name,
            "host": f"{self.url}/data/{name}",
            "schema": {"fields": fields},
            "deployment": {"environment": "test", **body["deployment"]},
            "deletion_protection": "disabled",
            "status": {"ready": self.not_ready == 0, "state": "Initializing" if self.not_ready else "Ready"},
        }
        self.records[name] = {}
        return self.indexes[name]

    def described(self, name: str) -> Record:
        if name not in self.indexes:
            raise RefusalError(404, f"Resource {name} not found", "NOT_FOUND")
        if self.not_ready:
            self.not_ready -= 1
        else:
            self.indexes[name]["status"] = {"ready": True, "state": "Ready"}
        return self.indexes[name]

    def remove(self, name: str) -> Record:
        self.described(name)
        del self.indexes[name], self.records[name]
        self.seen.pop(name, None)
        self.unseen = [each for each in self.unseen if each[1] != name]
        return {}

    # The data plane.

    def write(self, index: str, namespace: str, changes: dict[str, Record | None]) -> None:
        self.unseen.append((time.monotonic(), index, namespace, changes))
        _apply(self.records, index, namespace, changes)

    def visible(self, index: str) -> dict[str, dict[str, Record]]:
        """The namespaces of an index, as reads see them."""
        while self.unseen and self.unseen[0][0] <= time.monotonic() - self.lag_s:
            _apply(self.seen, *self.unseen.pop(0)[1:])
        return self.seen.get(index, {})

    def space(self, index: str, namespace: str) -> dict[str, Record]:
        return self.visible(index).get(namespace or "__default__", {})

    def checked(self, index: str, vectors: list[Record]) -> dict[str, Record]:
        dimension = self.indexes[index]["schema"]["fields"]["_values"]["dimension"]
        if len(vectors) > 1000:
            raise RefusalError(400, f"Batch size of {len(vectors)} exceeds the limit of 1000")
        for one in vectors:
            i, values = one["id"], one["values"]
            metadata = json.dumps(one.get("metadata", {}), ensure_ascii=False, separators=(",", ":")).encode()
            wrong = {
                f"Record {i} is not to our taste": i in self.poison,
                "Vector ID is invalid": not 0 < len(i) <= 512 or not i.isascii(),
                f"Vector dimension {len(values)} does not match the index's {dimension}": len(values) != dimension,
                "Dense vectors must contain at least one non-zero value": not any(values),
                "Metadata size is over the limit of 40960 bytes": len(metadata) > 40960,
            }
            for words, found in wrong.items():
                if found:
                    raise RefusalError(400, words)
        return {one["id"]: {"values": one["values"], "metadata": stored(one.get("metadata") or {})} for one in vectors}

    def upsert(self, index: str, body: Record, share: float = 1.0) -> Record:
        new = self.checked(index, body["vectors"])
        taken = list(new) if share == 1 else self.chance.sample(list(new), int(len(new) * share))
        self.write(index, body.get("namespace") or "__default__", {i: new[i] for i in taken})
        self.writes.append(taken)
        return {"upsertedCount": len(taken)}

    def query(self, index: str, body: Record) -> Record:
        space = self.space(index, body.get("namespace", ""))
        there = [i for i, one in space.items() if matches(body.get("filter") or {}, one["metadata"])]
        query = np.array(body["vector"], dtype=np.float64)
        vectors = np.array([space[i]["values"] for i in there], dtype=np.float64).reshape(len(there), len(query))
        scores = vectors @ query / (np.linalg.norm(vectors, axis=1) * np.linalg.norm(query))
        best = sorted(zip(scores, there, strict=True), reverse=True)[: body["topK"]]
        found = [{"id": i, "score": float(score), "metadata": space[i]["metadata"]} for score, i in best]
        return {"matches": found, "namespace": body.get("namespace", ""), "usage": {"readUnits": 1}}

    def fetch(self, index: str, query: dict[str, list[str]]) -> Record:
        namespace = query.get("namespace", [""])[0]
        space = self.space(index, namespace)
        found = {i: {"id": i, **space[i]} for i in query.get("ids", []) if i in space}
        return {"vectors": found, "namespace": namespace, "usage": {"readUnits": 1}}

    def delete(self, index: str, body: Record) -> Record:
        if body["namespace"] not in self.records[index]:
            raise RefusalError(404, "Namespace not found", "NOT_FOUND")
        if len(body["ids"]) > 1000:
            raise RefusalError(400, "Too many ids")
        self.write(index, body["namespace"], dict.fromkeys(body["ids"]))
        return {}

    def listed(self, index: str, query: dict[str, list[str]]) -> Record:
        ids = sorted(self.space(index, query["namespace"][0]))
        start = int(query.get("paginationToken", ["0"])[0])
        end = start + int(query.get("limit", ["100"])[0])
        more = {"pagination": {"next": str(end)}} if end < len(ids) else {}
        return {"vectors": [{"id": i} for i in ids[start:end]], "namespace": query["namespace"][0], **more}

    def stats(self, index: str) -> Record:
        counts = {name: {"vectorCount": len(space)} for name, space in self.visible(index).items()}
        dimension = self.indexes[index]["schema"]["fields"]["_values"]["dimension"]
        total = sum(one["vectorCount"] for one in counts.values())
        return {"namespaces": counts, "dimension": dimension, "indexFullness": 0, "totalVectorCount": total}

    def start_import(self, index: str, body: Record) -> Record:
        number = str(len(self.imports) + 1)
        state = {"id": number, "uri": body["uri"], "status": "Pending", "createdAt": "2026-11-30T00:00:00Z"}
        self.imports[number] = {**state, "percentComplete": 0.0, "body": body}
        return {"id": number}

    def described_import(self, index: str, number: str) -> Record:
        """The state, which is one step further at each look."""
        state = self.imports[number]
        if state["status"] == "InProgress":
            state |= {"status": "Completed", "percentComplete": 100.0}
            assert self.bucket
            for namespace, vectors in self.bucket(state["uri"]).items():
                if namespace in self.records[index]:
                    state |= {"status": "Failed", "error": f"namespace {namespace} exists"}
                    return state
                for start in range(0, len(vectors), 1000):
                    self.write(index, namespace, dict(self.checked(index, vectors[start : start + 1000])))
        elif state["status"] == "Pending":
            state["status"] = "InProgress"
        return state


def _apply(
    indexes: dict[str, dict[str, dict[str, Record]]], index: str, namespace: str, changes: dict[str, Record | None]
) -> None:
    space = indexes.setdefault(index, {}).setdefault(namespace, {})
    for i, one in changes.items():
        if one is None:
            space.pop(i, None)
        else:
            space[i] = one


def stored(metadata: Record) -> Record:
    """As the service keeps it: without nulls, and with numbers of one kind. It takes no objects and no mixed lists."""
    for name, value in metadata.items():
        texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if name.startswith("$") or not (value is None or texts or isinstance(value, str | bool | int | float)):
            raise RefusalError(400, f"Metadata value of {name} must be a string, number, boolean or list of strings")
    number = lambda value: float(value) if isinstance(value, int) and not isinstance(value, bool) else value  # noqa: E731
    return {name: number(value) for name, value in metadata.items() if value is not None}


def matches(conditions: Record, metadata: Record) -> bool:
    if "$or" in conditions:
        return any(matches(each, metadata) for each in conditions["$or"])
    if "$and" in conditions:
        return all(matches(each, metadata) for each in conditions["$and"])
    return all(
        any(meets(value, sign, want) for value in (have if isinstance(have, list) else [have]))
        for name, condition in conditions.items()
        for sign, want in condition.items()
        for have in [metadata.get(name)]
    )


ORDERS = {"$gt": operator.gt, "$gte": operator.ge, "$lt": operator.lt, "$lte": operator.le}


def meets(have: Any, sign: str, want: Any) -> bool:
    if sign in ORDERS:
        return isinstance(have, int | float) and not isinstance(have, bool) and bool(ORDERS[sign](have, want))
    if sign == "$in":
        return any(meets(have, "$eq", one) for one in want)
    return bool(have == want and isinstance(have, bool) == isinstance(want, bool))


class Handler(BaseHTTPRequestHandler):
    service: Service
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one packet
    disable_nagle_algorithm = True

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, BrokenPipeError):
            self.close_connection = True

    def do_GET(self) -> None:
        self.serve()

    do_POST = do_DELETE = do_GET  # noqa: N815

    def serve(self) -> None:
        url, service = urlsplit(self.path), self.service
        self.query = parse_qs(url.query)
        self.raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        _, plane, *self.rest = unquote(url.path).split("/")
        self.operation = "/".join(self.rest[1:]) if plane == "data" else ""
        with service.lock:
            service.keys.append(self.headers.get("Api-Key"))
            if plane == "data":
                service.requests.append((time.monotonic(), self.operation))
                service.under_way += 1
                service.most_under_way = max(service.most_under_way, service.under_way)
            else:
                service.control.append(f"{self.command} {url.path}")
            fault = service.fault() if plane == "data" else None
            if fault:
                service.faulted.append(fault)
        time.sleep(service.work_s)
        with service.lock:
            answer = self.answer(fault, plane)
            service.under_way -= plane == "data"  # before the client knows that it may send the next
        if answer is None:
            if fault == "timeout":
                select.select([self.connection], [], [], 20)
            self.close_connection = True
            return
        status, body, headers = answer
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def answer(self, fault: str | None, plane: str) -> tuple[int, Record, dict[str, str]] | None:
        """Status, body and headers; None where the connection is to end."""
        after = {"Retry-After": f"{self.service.retry_after_s:g}"} if fault == "429-after" else {}
        broken = {"error": {"code": "UNKNOWN", "message": "so it goes"}}
        if fault in ("403", "429", "429-after", "500", "503"):
            return int(fault[:3]), broken, after
        if fault in ("timeout", "cut-before"):
            return None
        try:
            body = self.act(plane, 0.5 if fault in ("part", "short") else 1.0)
        except RefusalError as refusal:
            return refusal.status, refusal.body, {}
        if fault == "cut-after":
            return None
        return (500, broken, {}) if fault == "part" else (200, body, {})

    def act(self, plane: str, share: float) -> Record:
        """What is asked, of an upsert so large a share."""
        service, key, operation = self.service, self.headers.get("Api-Key"), self.operation
        if key != service.key:
            raise RefusalError(401, f"Invalid API Key {key}", "UNAUTHENTICATED")
        if len(self.raw) > 2_097_152:
            raise RefusalError(413, "Request is over the limit of 2 MB")
        body = json.loads(self.raw or b"{}")
        if plane == "indexes":
            if self.command == "POST":
                return service.create(body)
            if not self.rest:
                return {"indexes": list(service.indexes.values())}
            return service.remove(self.rest[0]) if self.command == "DELETE" else service.described(self.rest[0])
        index = self.rest[0]
        if index not in service.indexes:
            raise RefusalError(404, f"Index {index} not found", "NOT_FOUND")
        acts: dict[str, Callable[[], Record]] = {
            "vectors/upsert": lambda: service.upsert(index, body, share),
            "vectors/fetch": lambda: service.fetch(index, self.query),
            "vectors/list": lambda: service.listed(index, self.query),
            "vectors/delete": lambda: service.delete(index, body),
            "bulk/imports": lambda: (
                service.start_import(index, body) if body else {"data": list(service.imports.values())}
            ),
            "query": lambda: service.query(index, body),
            "describe_index_stats": lambda: service.stats(index),
        }
        if operation.startswith("bulk/imports/"):
            return service.described_import(index, self.rest[-1])
        return acts[operation]()

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        pass  # clients that went away


@contextmanager
def pinecone_server(
    key: str = "pc-test", faults: dict[str, float] | None = None, seed: int = 0, retry_after_s: float = 0.05
) -> Iterator[Service]:
    service = Service(key, dict(faults or {}), seed, retry_after_s)
    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"service": service}))
    service.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
