"""A server that speaks as much of the model hub's protocol as its client needs to find a commit and fetch files."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit


class FakeHub:
    """Repositories, each with one branch.

    Args:
        url: what ``HF_ENDPOINT`` is to be.
        files: directory whose files every repository has at every commit; None: only commits are asked for.

    Attributes:
        commits: repository -> commit of its branch ``main``.
        failures: so many of the next questions are answered with 503.
        asked: questions so far.
    """

    def __init__(self, url: str, files: Path | None) -> None:
        self.url = url
        self.files = files
        self.commits: dict[str, str] = {}
        self.failures = 0
        self.asked = 0

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        self.asked += 1
        if self.failures:
            self.failures -= 1
            return 503, {}, b"out of order"
        match path.strip("/").split("/"):
            case ["api", "models", owner, name, *rest] if f"{owner}/{name}" in self.commits:
                return self._api(f"{owner}/{name}", rest)
            case [owner, name, "resolve", commit, file] if f"{owner}/{name}" in self.commits and self.files:
                return self._file(self.files / file, commit)
        return 404, {"X-Error-Code": "RepoNotFound"}, b""

    def _api(self, repository: str, rest: list[str]) -> tuple[int, dict[str, str], bytes]:
        commit = self.commits[repository]
        match rest:
            case [] | ["revision", "main"]:
                return _json({"id": repository, "sha": commit})
            case ["revision", revision] if revision == commit:
                return _json({"id": repository, "sha": commit})
            case ["tree", _] if self.files:
                return _json(
                    [
                        {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": _digest(path)}
                        for path in sorted(self.files.iterdir())
                    ]
                )
        return 404, {"X-Error-Code": "RevisionNotFound"}, b""

    def _file(self, path: Path, commit: str) -> tuple[int, dict[str, str], bytes]:
        if not path.is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{_digest(path)}"'}, path.read_bytes()


@contextmanager
def fake_hub(files: Path | None = None) -> Iterator[FakeHub]:
    """A running one on a free port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = hub.answer(urlsplit(self.path).path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 - the name that the server looks for

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = FakeHub(f"http://127.0.0.1:{server.server_port}", files)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _json(value: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
