"""A small stand-in for Google Cloud Storage on 127.0.0.1: the JSON API by which objects are looked up, listed and read.

with gcs({"corpus": {"a/one.jsonl": b"…"}}) as address:
    list_files("s", f"gs://anonymous@corpus/a?scheme=http&endpoint_override={address}", (".jsonl",))
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Buckets = dict[str, dict[str, bytes]]
CHANGED = "2024-05-01T12:00:00Z"


@contextmanager
def gcs(buckets: Buckets) -> Iterator[str]:
    handler = type("Handler", (_Handler,), {"buckets": buckets})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    buckets: Buckets
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        import sys

        print(self.path, self.headers.get("Range"), file=sys.stderr)
        parts = url.path.strip("/").split("/")
        if parts[:3] == ["storage", "v1", "b"]:
            return self.api(unquote(parts[3]), parts[4:], query)
        return self.missing()

    def api(self, bucket: str, rest: list[str], query: dict[str, str]) -> None:
        objects = self.buckets.get(bucket)
        if objects is None:
            return self.missing()
        if not rest:
            return self.json({"kind": "storage#bucket", "name": bucket, "id": bucket})
        if len(rest) == 1:
            names = [name for name in sorted(objects) if name.startswith(query.get("prefix", ""))]
            items = [described(bucket, name, objects[name]) for name in names]
            return self.json({"kind": "storage#objects", "items": items})
        name = unquote("/".join(rest[1:]))
        if name not in objects:
            return self.missing()
        if query.get("alt") == "media":
            return self.media(objects[name])
        return self.json(described(bucket, name, objects[name]))

    def media(self, data: bytes) -> None:
        first, _, last = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last or len(data) - 1) + 1, len(data))
        headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}", "x-goog-generation": "1"}
        self.answer(206 if "Range" in self.headers else 200, data[start:stop], headers)

    def json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def missing(self) -> None:
        self.answer(404, b'{"error": {"code": 404, "message": "Not Found"}}', {"Content-Type": "application/json"})

    def answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def described(bucket: str, name: str, data: bytes) -> dict[str, Any]:
    return {
        "kind": "storage#object",
        "bucket": bucket,
        "name": name,
        "id": f"{bucket}/{name}/1",
        "size": str(len(data)),
        "generation": "1",
        "updated": CHANGED,
        "timeCreated": CHANGED,
    }
