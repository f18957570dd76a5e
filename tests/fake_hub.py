"""A hub of its own on localhost, for the real ``huggingface_hub`` client: the few routes that a download uses."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REPO = "owner/name"


@dataclass
class FakeHub:
    """One repository: commits of files, names of commits, and how it misbehaves."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    """Branches and tags."""
    gated: bool = False
    token: str = "right"
    break_after: int | None = None
    """Where in a weight file the connection ends, for ``breaks`` answers."""
    breaks: int = 0
    broken_file: str = ".safetensors"
    """How the names of those files end."""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path, Range header)."""
    tokens: set[str] = field(default_factory=set)
    url: str = ""

    def commit(self, folder: Path, name: str = "main") -> str:
        """A new commit of a folder's files under the name; its hash."""
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[digest], self.names[name] = files, digest
        return digest

    def find(self, revision: str) -> str | None:
        commit = self.names.get(revision, revision)
        return commit if commit in self.commits else None

    def downloads(self, suffix: str) -> list[str]:
        """Range headers of the downloads of files whose names end so, in order."""
        return [wanted for method, path, wanted in self.requests if method == "GET" and path.endswith(suffix)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append((self.command, path, self.headers.get("Range") or ""))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token:
            self.hub.tokens.add(token)
        parts = path.strip("/").split("/")
        if path.startswith(f"/api/models/{REPO}/"):
            self._about(parts[4], parts[5])
        elif path.startswith(f"/{REPO}/resolve/"):
            if self.hub.gated and token != self.hub.token:
                self._fail(401, "GatedRepo")
            else:
                self._file(parts[3], parts[4])
        else:
            self._fail(404, "RepoNotFound")

    def _about(self, what: str, revision: str) -> None:
        commit = self.hub.find(revision)
        if commit is None:
            return self._fail(404, "RevisionNotFound")
        files = self.hub.commits[commit]
        if what == "revision":
            return self._json({"id": REPO, "sha": commit, "siblings": [{"rfilename": name} for name in files]})
        oids = {name: hashlib.sha1(data).hexdigest() for name, data in files.items()}
        rows = [{"type": "file", "path": n, "size": len(d), "oid": oids[n]} for n, d in files.items()]
        return self._json(rows)

    def _file(self, revision: str, name: str) -> None:
        commit = self.hub.find(revision)
        if commit is None or name not in self.hub.commits[commit]:
            return self._fail(404, "EntryNotFound")
        data, first = self.hub.commits[commit][name], 0
        wanted = self.headers.get("Range")
        if wanted:
            first = int(wanted.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        if self.command == "HEAD":
            return None
        part = data[first:]
        if name.endswith(self.hub.broken_file) and self.hub.break_after is not None and self.hub.breaks > 0:
            self.hub.breaks -= 1
            part = data[first : self.hub.break_after]
            self.close_connection = True
        self.wfile.write(part)
        return None

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", f"{code}, says the fake hub")
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serving() -> Iterator[FakeHub]:
    """A hub that answers at its ``url`` inside the block."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
