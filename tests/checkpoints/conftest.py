"""A web server on this machine, a registry of one's own, and directories that refuse writing."""

from __future__ import annotations

import errno
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import scfm
from scfm.checkpoints import _registry


class Server:
    """Serves ``content``; ``behaviour[path]`` is called instead of sending it whole."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.behaviour: dict[str, list] = {}
        self.requests: list[str] = []
        self.ranges: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                outer.requests.append(name)
                outer.ranges.append(self.headers.get("Range", ""))
                if outer.behaviour.get(name):
                    outer.behaviour[name].pop(0)(self, outer.content.get(name, b""))
                elif name in outer.content:
                    send(self, outer.content[name])
                else:
                    self.send_error(404)

            def log_message(self, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def send(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


@pytest.fixture
def server(monkeypatch):
    """Web server; scfm may use the network."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("scfm.checkpoints._download._WAITS", (0, 0))
    # a chunk that breaks off is lost
    monkeypatch.setattr("scfm.checkpoints._download._CHUNK", 1000)
    scfm.settings.offline = False
    server = Server()
    yield server
    server.close()


@pytest.fixture
def register(monkeypatch):
    """``register(entry, ...)`` replaces the released checkpoints."""

    def put(*entries: _registry.Entry) -> None:
        monkeypatch.setattr(_registry, "_released", lambda: list(entries))
        _registry.entries.cache_clear()
        _registry._names.cache_clear()

    yield put
    monkeypatch.undo()
    _registry.entries.cache_clear()
    _registry._names.cache_clear()


@pytest.fixture
def read_only(monkeypatch):
    """``read_only(directory)`` refuses new files there, for root too."""

    def lock(directory: Path) -> None:
        real_open, real_mkdir = os.open, os.mkdir

        def inside(path: object) -> bool:
            return Path(os.fspath(path)).is_relative_to(directory)

        def guarded_open(path, flags, *args, **kwargs):
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and inside(path):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return real_open(path, flags, *args, **kwargs)

        def guarded_mkdir(path, *args, **kwargs):
            if inside(path) and not Path(path).is_dir():
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return real_mkdir(path, *args, **kwargs)

        monkeypatch.setattr(os, "open", guarded_open)
        monkeypatch.setattr(os, "mkdir", guarded_mkdir)

    return lock
