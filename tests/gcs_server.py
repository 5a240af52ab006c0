"""A small stand-in for Google Cloud Storage: the XML API by which obstore and lancedb put, read, list, copy and delete.

    python -m tests.gcs_server FOLDER      # prints its address; the folders in FOLDER are buckets

An object is a file of its name below its bucket's folder, and tests may read and write these files themselves. So a
name cannot be an object's and a folder's at once, which Google allows.
It is a process of its own, so that no client of it can wait for it while holding the GIL.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 1000  # entries of a listing in one answer, at most


class Handler(BaseHTTPRequestHandler):
    root: Path
    lock = threading.Lock()  # held from the check of a condition to the end of the change, and while files are listed
    uploads: ClassVar[dict[str, dict[int, bytes]]] = {}  # the parts of those that are not whole, by their ids
    changed = 0  # when the last object was put, in nanoseconds
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the client waits for the body of each answer

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client that was killed
            super().handle()

    def do_request(self) -> None:
        url, length = urlsplit(self.path), int(self.headers.get("Content-Length") or 0)
        self.query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        bucket, _, key = unquote(url.path).removeprefix("/").partition("/")
        self.folder, self.file = self.root / bucket, self.root / bucket / key
        self.body = self.rfile.read(length)
        if len(self.body) < length:
            raise ConnectionError
        if not bucket or not self.folder.is_dir():
            return self.refuse(404, "NoSuchBucket")
        method = {"GET": self.read, "HEAD": self.read, "PUT": self.write, "POST": self.upload, "DELETE": self.delete}
        try:
            return method[self.command]() if key else self.list()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return self.refuse(404, "NoSuchKey")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_request  # noqa: N815

    def read(self) -> None:
        """An object or one range of it, or with HEAD what is known of it."""
        with self.file.open("rb") as stream:
            data, stat = stream.read(), os.fstat(stream.fileno())
        headers = {**version(stat), "Last-Modified": formatdate(stat.st_mtime, usegmt=True)}
        if self.headers.get("If-Match", headers["ETag"]) != headers["ETag"]:
            return self.refuse(412, "PreconditionFailed")
        if "Range" not in self.headers:
            return self.answer(200, data, headers)
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        start = int(first) if first else max(0, len(data) - int(last))  # "-5" asks for the last five bytes
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= stop:
            return self.refuse(416, "InvalidRange")
        return self.answer(206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    def list(self) -> None:
        """A page of a bucket: objects, and what stands for all of which a part of the name is the same."""
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        after, token = self.query.get("start-after", ""), self.query.get("continuation-token", "")
        entries: dict[str, str] = {}
        with self.lock:
            for file in (self.folder / prefix.rpartition("/")[0]).rglob("*"):
                name = file.relative_to(self.folder).as_posix()
                if not name.startswith(prefix) or name <= after or not file.is_file():
                    continue
                if delimiter and delimiter in name[len(prefix) :]:
                    common = name[: name.index(delimiter, len(prefix))] + delimiter
                    entries[common] = f"<CommonPrefixes><Prefix>{escape(common)}</Prefix></CommonPrefixes>"
                else:
                    stat = file.stat()
                    about = f"<Key>{escape(name)}</Key><Size>{stat.st_size}</Size><ETag>{version(stat)['ETag']}</ETag>"
                    changed = datetime.fromtimestamp(stat.st_mtime, UTC).isoformat()
                    entries[name] = f"<Contents>{about}<LastModified>{changed}</LastModified></Contents>"
        names = sorted(name for name in entries if name > token)
        found = "".join(entries[name] for name in names[:PAGE])
        if len(names) > PAGE:
            found += f"<NextContinuationToken>{escape(names[PAGE - 1])}</NextContinuationToken>"
        self.answer(200, f"<ListBucketResult>{found}</ListBucketResult>".encode())

    def write(self) -> None:
        """An object, a part of an upload, or a copy."""
        if "uploadId" in self.query:
            self.uploads[self.query["uploadId"]][int(self.query["partNumber"])] = self.body
            return self.answer(200, b"", {"ETag": self.query["partNumber"]})
        if source := self.headers.get("x-goog-copy-source"):
            self.body = (self.root / unquote(source)).read_bytes()
        return self.keep(self.body)

    def upload(self) -> None:
        """Begin an upload, or put its parts together."""
        if "uploads" in self.query:
            self.uploads[upload := uuid.uuid4().hex] = {}
            result = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
            return self.answer(200, result.encode())
        parts = self.uploads.pop(self.query["uploadId"])
        return self.keep(b"".join(parts[int(each)] for each in re.findall(rb"<PartNumber>(\d+)<", self.body)))

    def delete(self) -> None:
        with self.lock:
            if "uploadId" not in self.query:  # else an upload is given up, parts of which may still come
                self.file.unlink()
        return self.answer(204, b"")

    def keep(self, data: bytes) -> None:
        """Put the object: whole, at once, and only if the condition that the request may name is met."""
        partial, wanted = self.root / ".partial", self.headers.get("x-goog-if-generation-match")
        with self.lock:
            there = version(self.file.stat())["x-goog-generation"] if self.file.is_file() else "0"
            if wanted not in (None, there):
                return self.refuse(412, "PreconditionFailed")
            partial.write_bytes(data)
            Handler.changed = max(time.time_ns(), Handler.changed + 1)  # no two puts have the same
            os.utime(partial, ns=(Handler.changed, Handler.changed))
            headers = version(partial.stat())
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                partial.replace(self.file)
            except OSError as error:
                return self.refuse(400, type(error).__name__)
        result = f"<CompleteMultipartUploadResult><ETag>{headers['ETag']}</ETag></CompleteMultipartUploadResult>"
        return self.answer(200, result.encode() if self.command == "POST" else b"", headers)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())

    def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def version(stat: os.stat_result) -> dict[str, str]:
    """Headers of an object's version, for files that a test wrote too."""
    generation = f"{stat.st_mtime_ns}{stat.st_ino}"
    return {"x-goog-generation": generation, "ETag": f'"{generation}"'}


if __name__ == "__main__":
    Handler.root = Path(sys.argv[1])
    ThreadingHTTPServer.request_queue_size = 128  # clients open many connections at once
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"127.0.0.1:{server.server_address[1]}", flush=True)  # noqa: T201
    server.serve_forever()
