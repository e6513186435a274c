"""HTTP server for tests: files of a folder with ranges and validators, a small Hub, and faults on demand.

    with HTTPServer(folder) as server:
        server.fail("/zips/a.zip", "break", 500)   # the first GET breaks off, the second gets 500, the third succeeds
        ...
        assert [request.range for request in server.gets("/zips/a.zip")] == [None, ...]

`folder/hub/datasets/<owner>/<name>/` and `folder/hub/models/...` are repositories of the Hub at HF_ENDPOINT =
`server.url`. Each has one commit, whose hash follows from its files.
"""

import hashlib
import json
import re
import threading
from collections import defaultdict, deque
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

FAULTS = ("break", "truncate", "stall", "corrupt")
"""break: the connection ends in the middle. truncate: the response is half of the file, with the matching length.
stall: nothing is sent after half of the file. corrupt: every byte is wrong. A number is the status of the response."""

API = re.compile(
    r"/api/(?P<kind>datasets|models)/(?P<repo>[^/]+/[^/]+)"
    r"(/(?P<what>revision|tree|paths-info)/(?P<revision>[^/]+)(/(?P<below>.+))?)?"
)
RESOLVE = re.compile(r"(/(?P<kind>datasets))?/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass(frozen=True)
class Request:
    """Request of a client."""

    method: str
    path: str
    range: str | None


class HTTPServer:
    """Server of `folder` at `url` until the `with` block ends; the Hub's addresses require `token`, if there is one."""

    def __init__(self, folder: Path, token: str | None = None) -> None:
        self.folder, self.token = Path(folder), token
        self.has_ranges = True
        self.requests: list[Request] = []
        self.closed = threading.Event()
        self._faults: dict[str, deque[str | int]] = defaultdict(deque)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_state": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HTTPServer":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()

    def fail(self, path: str, *faults: str | int) -> None:
        """Answer the next GETs of `path` with these faults, one each; later ones succeed."""
        self._faults[path].extend(faults)

    def gets(self, path: str) -> list[Request]:
        """Return the GETs of `path` so far."""
        return [request for request in self.requests if request.method == "GET" and request.path == path]

    def next_fault(self, path: str) -> str | int | None:
        """Return the fault of this request, or None."""
        return self._faults[path].popleft() if self._faults[path] else None

    def commit(self, repo: Path) -> str:
        """Return the commit hash of a repository, from its files."""
        content = [(str(file.relative_to(repo)), sha256(file.read_bytes())) for file in files_of(repo)]
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server_state: HTTPServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_POST(self) -> None:
        """The Hub's question about some paths of a repository."""
        self.asked_paths = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        state, path = self.server_state, unquote(urlsplit(self.path).path)
        state.requests.append(Request(self.command, path, self.headers.get("Range")))
        fault = state.next_fault(path) if with_body else None
        if isinstance(fault, int):
            return self.send_empty(fault)
        if match := API.fullmatch(path) or RESOLVE.fullmatch(path):
            return self.answer_as_hub(match.groupdict(), with_body, fault)
        file = state.folder / path.lstrip("/")
        if not file.is_file():
            return self.send_empty(404)
        self.send_file(file.read_bytes(), with_body, fault)

    def answer_as_hub(self, asked: dict[str, str | None], with_body: bool, fault: str | None) -> None:
        state = self.server_state
        if state.token and self.headers.get("Authorization") != f"Bearer {state.token}":
            return self.send_empty(401, {"X-Error-Code": "GatedRepo"})
        repo = state.folder / "hub" / (asked["kind"] or "models") / asked["repo"]
        if not repo.is_dir():
            return self.send_empty(404, {"X-Error-Code": "RepoNotFound"})
        commit = state.commit(repo)
        if asked["revision"] not in (None, "main", commit):
            return self.send_empty(404, {"X-Error-Code": "RevisionNotFound"})
        if "what" in asked:
            tree = [tree_entry(file, repo) for file in files_of(repo)]
            about = {"id": asked["repo"], "sha": commit, "siblings": [{"rfilename": item["path"]} for item in tree]}
            if asked["what"] == "tree":
                about = self.listed(tree, asked["below"])
            elif asked["what"] == "paths-info":
                about = [item for path in self.asked_paths for item in self.listed(tree, None) if item["path"] == path]
            return (
                self.send_empty(404) if about is None else self.send_file(json.dumps(about).encode(), with_body, fault)
            )
        file = repo / asked["path"]
        if not file.is_file():
            return self.send_empty(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        self.send_file(file.read_bytes(), with_body, fault, {"X-Repo-Commit": commit})

    def listed(self, tree: list[dict], folder: str | None) -> list[dict] | None:
        """Entries below a folder, with "recursive=false" in the address only its own; None: there is no such one."""
        start = f"{folder}/" if folder else ""
        below = [item for item in tree if item["path"].startswith(start)]
        if "recursive=false" not in self.path.lower():
            names = {str(parent) for item in below for parent in Path(item["path"]).parents} - {"."}
            return [folder_entry(name) for name in sorted(names)] * ("/paths-info/" in self.path) + below
        names = {
            item["path"].removeprefix(start).partition("/")[0] for item in below if "/" in item["path"][len(start) :]
        }
        files = [item for item in below if "/" not in item["path"][len(start) :]]
        return ([folder_entry(start + name) for name in sorted(names)] + files) or None

    def send_empty(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def send_file(self, content: bytes, with_body: bool, fault: str | None, headers: dict[str, str] | None = None):
        tag, total, start = f'"{sha256(content)}"', len(content), self.range_start(f'"{sha256(content)}"')
        if start is not None and start >= total:
            return self.send_empty(416, {"Content-Range": f"bytes */{total}"})
        end = self.range_end(total)
        body = content[start or 0 : None if start is None else end + 1]
        half = body[: len(body) // 2]
        if fault == "truncate":
            body = half
        self.send_response(200 if start is None else 206)
        sent = {"ETag": tag, "Content-Length": str(len(body)), "Accept-Ranges": "bytes", **(headers or {})}
        if start is not None:
            sent["Content-Range"] = f"bytes {start}-{end}/{total}"
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.send_body(body, half, fault)

    def send_body(self, body: bytes, half: bytes, fault: str | None) -> None:
        if fault == "corrupt":
            body = bytes(255 - byte for byte in body)
        self.wfile.write(half if fault in ("break", "stall") else body)
        self.wfile.flush()
        if fault == "stall":
            self.server_state.closed.wait(timeout=30)
        if fault in ("break", "stall"):
            self.close_connection = True

    def range_start(self, tag: str) -> int | None:
        """Return the first byte that the client asks for; None for all of them, also if its validator is outdated."""
        asked = re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("Range", ""))
        still_valid = self.headers.get("If-Range", tag) == tag
        return int(asked[1]) if asked and still_valid and self.server_state.has_ranges else None

    def range_end(self, total: int) -> int:
        """Return the last byte that the client asks for."""
        asked = re.fullmatch(r"bytes=\d+-(\d+)", self.headers.get("Range", ""))
        return min(int(asked[1]), total - 1) if asked else total - 1


def files_of(repo: Path) -> list[Path]:
    """Return the files of a folder, sorted."""
    return sorted(path for path in repo.rglob("*") if path.is_file())


def tree_entry(file: Path, repo: Path) -> dict:
    """Return the Hub's entry of one file of a repository, as a large file (LFS)."""
    content = file.read_bytes()
    entry = {"type": "file", "path": str(file.relative_to(repo)), "size": len(content), "oid": "0" * 40}
    return entry | {"lfs": {"oid": sha256(content), "size": len(content), "pointerSize": 130}}


def folder_entry(path: str) -> dict:
    """Return the Hub's entry of a folder of a repository."""
    return {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}


def sha256(content: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(content).hexdigest()
