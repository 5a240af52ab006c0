"""A small stand-in for the Hugging Face hub on 127.0.0.1: the routes by which data sets are looked up and streamed.

    with hub({"owner/name": {COMMIT: {"README.md": b"…", "data/train-0.parquet": b"…"}}}) as (endpoint, requests): ...

Written after what huggingface_hub 2.4 and datasets 5.2 ask for: the answer's fields and headers are those they read.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Repos = dict[str, dict[str, dict[str, bytes]]]
"""Repository → commit → path → content. The last commit is what `main` and no revision stand for."""


Faults = dict[str, list[int]]
"""Part of a path → how the next downloads of such a file fail: with a status, or 0 for a connection that is reset."""


@contextmanager
def hub(repos: Repos, faults: Faults | None = None) -> Iterator[tuple[str, list[str]]]:
    """The server's address, and the requests that it has answered so far."""
    requests: list[str] = []
    handler = type(
        "Handler", (_Handler,), {"repos": repos, "requests": requests, "faults": {} if faults is None else faults}
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    repos: Repos
    requests: list[str]
    faults: Faults | None
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path).strip("/")
        self.requests.append(f"{self.command} /{path}")
        is_api = path.startswith("api/")
        parts = path.removeprefix("api/").removeprefix("datasets/").split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        if repo not in self.repos:
            return self.answer(404 if not is_api else 401, error="RepoNotFound")
        commit, files, inside = self.at(repo, rest[1:])
        if files is None:
            return self.answer(404, error="RevisionNotFound")
        due = next((due for part, due in (self.faults or {}).items() if due and part in path), [])
        if not is_api and self.command == "GET" and due:
            return self.fail(due.pop(0))
        if not is_api:
            return self.content(commit, files, inside)
        return self.json(self.described(repo, commit, files, rest[0] if rest else "revision", inside, body))

    do_HEAD = do_POST = do_GET  # noqa: N815

    def at(self, repo: str, parts: list[str]) -> tuple[str, dict[str, bytes] | None, str]:
        """Commit, its files and the path that follows; refs such as refs/convert/parquet are keys with slashes."""
        commits = self.repos[repo]
        for length in range(len(parts), 0, -1):
            if (name := "/".join(parts[:length])) in commits:
                return name, commits[name], "/".join(parts[length:])
        if parts and parts[0] != "main":
            return "", None, ""
        latest = list(commits)[-1]
        return latest, commits[latest], "/".join(parts[1:])

    def described(self, repo: str, commit: str, files: dict[str, bytes], what: str, inside: str, body: bytes) -> Any:
        """The commit, the entries of a folder (`tree`) or those asked for by name (`paths-info`)."""
        entries = {name: entry("file", name, data) for name, data in files.items()}
        for folder in {str(parent) for name in files for parent in PurePosixPath(name).parents} - {"."}:
            entries[folder] = entry("directory", folder, b"")
        if what == "tree":
            recursive = "true" in parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower()
            prefix = f"{inside}/" if inside else ""
            below = [name for name in entries if name.startswith(prefix) and name != inside]
            return [entries[name] for name in below if recursive or "/" not in name[len(prefix) :]]
        if what == "paths-info":
            asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            return [entries[name] for name in ([asked] if isinstance(asked, str) else asked) if name in entries]
        siblings = [{"rfilename": name, "size": len(data), "blobId": oid(data)} for name, data in files.items()]
        return {"id": repo, "sha": commit, "siblings": siblings, "private": False, "gated": False, "tags": []}

    def content(self, commit: str, files: dict[str, bytes], name: str) -> None:
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if name not in files:
            return self.answer(404, error="EntryNotFound", headers=headers)
        data = files[name]
        headers["ETag"] = f'"{oid(data)}"'
        wanted = self.headers.get("Range")
        if not wanted:
            return self.answer(200, data, headers=headers)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last or len(data) - 1) + 1, len(data))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return self.answer(206, data[start:stop], headers=headers)

    def fail(self, status: int) -> None:
        if status:
            return self.answer(status)
        self.close_connection = True
        # With this option, closing sends a reset.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return self.connection.close()

    def json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def answer(
        self, status: int, data: bytes = b"", *, error: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), **({"X-Error-Code": error} if error else {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def entry(kind: str, path: str, data: bytes) -> dict[str, Any]:
    return {"type": kind, "path": path, "size": len(data), "oid": oid(data)}


def oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
