"""A small stand-in for Google Cloud Storage: the JSON API by which pyarrow looks objects up, lists and reads them,
uploads, copies and deletes.

    python -m tests.gcs_server FOLDER      # prints its address; the folders in FOLDER are buckets

It is a process of its own, for pyarrow asks a stream whether it is open, which waits for the server, under the GIL.
"""

from __future__ import annotations

import json
import sys
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, quote, unquote, urlsplit

CHANGED = "2024-05-01T12:00:00Z"


class Handler(BaseHTTPRequestHandler):
    root: Path
    uploads: ClassVar[dict[str, bytes]] = {}
    """Begun and not whole, by their place."""
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        bucket, _, rest = url.path.removeprefix("/storage/v1/b/").partition("/")
        folder = self.root / unquote(bucket)
        if not folder.is_dir():
            return self.missing()
        if not rest:
            return self.json({"kind": "storage#bucket", "name": bucket, "id": bucket})
        if rest == "o":
            return self.json({"kind": "storage#objects", "items": self.listed(folder, query.get("prefix", ""))})
        file = folder / unquote(rest.removeprefix("o/"))
        if not file.is_file():
            return self.missing()
        return self.media(file.read_bytes()) if query.get("alt") == "media" else self.json(described(folder, file))

    def do_POST(self) -> None:
        """Begin an upload, which has a place of its own until it is whole, or copy an object."""
        url, body = urlsplit(self.path), self.body()
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if url.path.startswith("/upload/"):
            assert query["uploadType"] == "resumable"
            name = f"{url.path.split('/')[-2]}/{query.get('name') or json.loads(body)['name']}"
            session = f"/session/{quote(name, safe='')}?id={uuid.uuid4().hex}"
            self.uploads[session] = b""
            return self.answer(200, b"", {"Location": f"http://{self.headers['Host']}{session}"})
        source, _, target = url.path.removeprefix("/storage/v1/b/").partition("/rewriteTo/b/")
        (bucket, name), (to, copy) = (part.split("/o/") for part in (source, target))
        file = self.root / unquote(bucket) / unquote(name)
        if not file.is_file():
            return self.missing()
        resource = self.kept(f"{unquote(to)}/{unquote(copy)}", file.read_bytes())
        size = {"totalBytesRewritten": resource["size"], "objectSize": resource["size"]}
        return self.json({"kind": "storage#rewriteResponse", "done": True, "resource": resource, **size})

    def do_PUT(self) -> None:
        """A piece of an upload; the last one says how long the whole is."""
        self.uploads[self.path] += self.body()
        data = self.uploads[self.path]
        if self.headers["Content-Range"].endswith("/*"):
            return self.answer(308, b"", {"Range": f"bytes=0-{len(data) - 1}"} if data else {})
        name = unquote(urlsplit(self.path).path.removeprefix("/session/"))
        return self.json(self.kept(name, self.uploads.pop(self.path)))

    def do_DELETE(self) -> None:
        bucket, _, name = urlsplit(self.path).path.removeprefix("/storage/v1/b/").partition("/o/")
        file = self.root / unquote(bucket) / unquote(name)
        if not file.is_file():
            return self.missing()
        file.unlink()
        return self.answer(204, b"", {})

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def kept(self, name: str, data: bytes) -> dict[str, Any]:
        bucket, _, key = name.partition("/")
        file = self.root / bucket / key
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return described(self.root / bucket, file)

    def listed(self, folder: Path, prefix: str) -> list[dict[str, Any]]:
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        return [described(folder, file) for file in files if file.relative_to(folder).as_posix().startswith(prefix)]

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
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def described(folder: Path, file: Path) -> dict[str, Any]:
    name, size = file.relative_to(folder).as_posix(), str(file.stat().st_size)
    common = {"kind": "storage#object", "bucket": folder.name, "name": name, "id": f"{folder.name}/{name}/1"}
    return {**common, "size": size, "generation": "1", "updated": CHANGED, "timeCreated": CHANGED}


if __name__ == "__main__":
    Handler.root = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"127.0.0.1:{server.server_address[1]}", flush=True)  # noqa: T201
    server.serve_forever()
