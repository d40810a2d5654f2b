"""A loopback hub with one data set: what the clients ask the Hugging Face hub for, and nothing else."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves the files of the repository ``name`` at the revision `SHA`."""

    name: str
    files: Mapping[str, bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        hub = self.server
        assert isinstance(hub, Hub)
        api, files = f"/api/datasets/{hub.name}", f"/datasets/{hub.name}/resolve/"
        if path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": name} for name in hub.files]
            facts = {"id": hub.name, "sha": SHA, "private": False, "disabled": False, "downloads": 0, "likes": 0}
            self._json({**facts, "tags": [], "siblings": siblings, "lastModified": "2026-01-01T00:00:00.000Z"})
        elif path.startswith(f"{api}/tree/"):
            self._tree(path.removeprefix(f"{api}/tree/").partition("/")[2])
        elif path.startswith(files) and (name := path.removeprefix(files).partition("/")[2]) in hub.files:
            self._file(hub.files[name])
        else:
            self._missing(path)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        data = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        hub = self.server
        assert isinstance(hub, Hub)
        if "/paths-info/" not in self.path or hub.name not in self.path:
            self._missing(self.path)
            return
        self._json([self._entry(name, hub.files[name]) for name in data["paths"] if name in hub.files])

    def _tree(self, folder: str) -> None:
        hub = self.server
        assert isinstance(hub, Hub)
        below = {name: data for name, data in hub.files.items() if name.startswith(f"{folder}/" if folder else "")}
        folders = {name.rpartition("/")[0] for name in below} - {"", folder}
        entries = [{"type": "directory", "oid": SHA, "size": 0, "path": name} for name in sorted(folders)]
        self._json([*entries, *(self._entry(name, data) for name, data in below.items())])

    def _entry(self, name: str, data: bytes) -> dict[str, object]:
        return {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, data: bytes) -> None:
        facts = {"X-Repo-Commit": SHA, "ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range", "")
        if not asked.startswith("bytes="):
            self._answer(200, data, facts)
            return
        start, _, end = asked.removeprefix("bytes=").partition("-")
        last = min(int(end), len(data) - 1) if end else len(data) - 1
        facts["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
        self._answer(206, data[int(start) : last + 1], facts)

    def _missing(self, path: str) -> None:
        hub = self.server
        assert isinstance(hub, Hub)
        code = "EntryNotFound" if f"/{hub.name}/" in path else "RepoNotFound"
        self._answer(404, b"{}", {"X-Error-Code": code, "X-Error-Message": "not found"})

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving(name: str, files: Mapping[str, bytes]) -> Iterator[Hub]:
    """A running hub on a free port."""
    hub = Hub(("127.0.0.1", 0), _Handler)
    hub.name, hub.files = name, files
    threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
