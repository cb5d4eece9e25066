"""A Hugging Face Hub on loopback, in memory, that the true clients use over real HTTP.

It keeps models, datasets and Spaces with every commit on `main` and other branches. It has no pull requests or tags,
checks no YAML, and serves LFS files itself where the real Hub redirects to a CDN. A new repository has one commit
without files.
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 1 << 20  # bytes; larger files go to LFS, and so do those with these endings
LARGE_ENDINGS = (".arrow", ".parquet", ".safetensors")
USER = "tester"

# Clients read the address and their home when they are imported. With one address for all Hubs, and a home that is a
# link, they can be forked from one that has imported them. A socket that does not listen keeps the port for us.
PORT = socket.socket()
PORT.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
PORT.bind(("127.0.0.1", 0))
FOLDER = tempfile.TemporaryDirectory()
HOME = Path(FOLDER.name) / "home"


class Refusal(Exception):
    """Any answer that is not a success; the clients tell what is missing by the header X-Error-Code."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: object):
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


def git_id(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


def is_large(path: str, size: int) -> bool:
    return size > 0 and (size > LARGE or path.endswith(LARGE_ENDINGS))  # clients send an empty file as a regular one


@dataclass(frozen=True)
class File:
    content: bytes
    large: bool

    @cached_property
    def oid(self) -> str:
        """What a client compares its own file with, to leave an unchanged one out of a commit."""
        return hashlib.sha256(self.content).hexdigest() if self.large else git_id("blob", self.content)

    def describe(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "oid": self.oid, "size": len(self.content)}
        if self.large:  # git itself has a pointer to the content
            pointer = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.oid}\nsize {entry['size']}\n".encode()
            )
            lfs = {"oid": self.oid, "size": entry["size"], "pointerSize": len(pointer)}
            entry |= {"oid": git_id("blob", pointer), "lfs": lfs}
        return entry


@dataclass(frozen=True)
class Commit:
    sha: str
    title: str
    date: str
    files: dict[str, File]

    def inside(self, path: str) -> list[tuple[str, str]]:
        """A file's content, or a folder's contents."""
        return sorted((name, file.oid) for name, file in self.files.items() if f"{name}/".startswith(f"{path}/"))

    def entries(self) -> dict[str, dict]:
        """Every file and folder, by path, as the Hub describes them."""
        found = {path: file.describe(path) for path, file in self.files.items()}
        for folder in {str(parent) for path in self.files for parent in PurePosixPath(path).parents} - {"."}:
            oid = git_id("tree", repr(self.inside(folder)).encode())
            found[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
        return dict(sorted(found.items()))


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": []})

    @property
    def commits(self) -> list[Commit]:
        return self.branches["main"]

    def commit(self, title: str, files: dict[str, File], branch: str = "main") -> Commit:
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        commits = self.branches[branch]
        sha = git_id("commit", repr((branch, len(commits), title, date, sorted(files))).encode())
        commits.append(Commit(sha, title, date, files))
        return commits[-1]

    def at(self, revision: str) -> Commit:
        for commit in (commit for commits in self.branches.values() for commit in commits):
            if revision == commit.sha:
                return commit
        if revision not in self.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.branches[revision][-1]

    def with_last_commit(self, entry: dict, commit: Commit) -> dict:
        """Say which commit gave a file or folder the content that it has in `commit`."""
        path, last = entry["path"], commit
        for earlier in reversed(self.commits[: self.commits.index(commit)]):
            if earlier.inside(path) != commit.inside(path):
                break
            last = earlier
        return {**entry, "lastCommit": {"id": last.sha, "title": last.title, "date": last.date}}


class Hub:
    """`with Hub() as hub:` serves until the block ends, one at a time. With a token, only its bearer may write."""

    def __init__(self, token: str | None = None):
        self.token = token
        self.requests: list[tuple[str, str, dict[str, str], int]] = []  # method, path, headers (lower case), status
        self.repositories: dict[tuple[str, str], Repository] = {}  # by type and id
        self.storage: dict[str, bytes] = {}  # what was uploaded by LFS, by its sha256
        self.awaited: set[str] = set()  # the sha256 of what a client was told to upload
        self.lock = threading.Lock()
        self._failures: list[list] = []  # times left, status, part of the path
        self._drops: list[list] = []  # times left, bytes that go through, whether by a reset
        self._held: str | None = None  # part of the paths that are not answered
        self._released = threading.Condition()
        self._server = Server(PORT.getsockname(), Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """The variables of a client process that knows this Hub alone, and caches in `home`, until the next call."""
        home.mkdir(parents=True, exist_ok=True)
        HOME.unlink(missing_ok=True)
        HOME.symlink_to(home)
        caches = {"HF_HOME": HOME, "HF_HUB_CACHE": HOME / "hub", "HF_DATASETS_CACHE": HOME / "datasets"}
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token or "any",
            **{name: str(folder) for name, folder in caches.items()},
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # `datasets` would call S3
            "NO_PROXY": "*",
            "no_proxy": "*",
        }

    def add(self, repo_id: str, files: dict[str, bytes], repo_type: str = "dataset") -> str:
        """Make or extend a repository in one commit, and return the commit's sha."""
        new = {path: File(content, is_large(path, len(content))) for path, content in files.items()}
        with self.lock:
            repository = self.repositories.setdefault((repo_type, repo_id), Repository())
            before = repository.commits[-1].files if repository.commits else {}
            return repository.commit("Add files", before | new).sha

    def files(self, repo_id: str, repo_type: str = "dataset", revision: str = "main") -> dict[str, bytes]:
        with self.lock:
            files = self.repositories[repo_type, repo_id].at(revision).files
        return {path: file.content for path, file in files.items()}

    def commits(self, repo_id: str, repo_type: str = "dataset") -> list[str]:
        """The shas, oldest first."""
        with self.lock:
            return [commit.sha for commit in self.repositories[repo_type, repo_id].commits]

    def drop_downloads(self, times: int, after_bytes: int, reset: bool = False) -> None:
        """Break off the next `times` downloads of more than `after_bytes` bytes when so many have gone through.

        The client sees the stream end too early or, with `reset`, a connection reset, which may also take bytes that
        it has not read yet.
        """
        with self.lock:
            self._drops.append([times, after_bytes, reset])

    def fail(self, times: int, status: int = 503, matching: str = "/commit/") -> None:
        """Answer the next `times` requests whose path contains `matching` with this status, and do nothing."""
        with self.lock:
            self._failures.append([times, status, matching])

    @contextmanager
    def hold(self, matching: str) -> Iterator[None]:
        """Within it, requests whose path contains `matching` wait for their answer."""
        self._held = matching
        try:
            yield
        finally:
            with self._released:
                self._held = None
                self._released.notify_all()

    def wait_where_held(self, path: str) -> None:
        with self._released:
            self._released.wait_for(lambda: self._held is None or self._held not in path)

    def next_failure(self, path: str) -> int | None:
        """The status to answer this path with, where it is to fail."""
        for failure in self._failures:
            times, status, part = failure
            if times > 0 and part in path:
                failure[0] -= 1
                return status
        return None

    def next_drop(self, size: int) -> tuple[int, bool] | None:
        """After how many bytes to break off a download of `size` bytes, where it is to, and whether by a reset."""
        for drop in self._drops:
            times, after_bytes, reset = drop
            if times > 0 and after_bytes < size:
                drop[0] -= 1
                return after_bytes, reset
        return None


class Server(ThreadingHTTPServer):
    request_queue_size = 128
    hub: Hub

    def __init__(self, *arguments):
        self.connections: set[socket.socket] = set()
        super().__init__(*arguments)

    def server_close(self) -> None:
        """And end what clients keep open, who would go on talking to this Hub where the next one is at its address."""
        super().server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address) -> None:
        """A client may go at any time; anything else is a mistake in this file, and is told."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    drop: tuple[int, bool] | None = None

    @classmethod
    def json(cls, value: object, status: int = 200, **headers: str) -> "Answer":
        return cls(status, {"Content-Type": "application/json", **headers}, json.dumps(value).encode())


ROUTES: list[tuple[str, re.Pattern, bool, str]] = []  # methods, paths, whether they write, the handler's method


def route(methods: str, path: str, writes: bool = False):
    """Answer these requests by this method; `KIND`, `ID`, `REV` and `PATH` in the path become its arguments."""
    parts = {"KIND": "(models|datasets|spaces)", "ID": "([^/]+(?:/[^/]+)?)", "REV": "([^/]+)", "PATH": "(.+)"}
    pattern = re.compile(re.sub("|".join(parts), lambda word: parts[word[0]], path))

    def register(method):
        ROUTES.append((methods, pattern, writes, method.__name__))
        return method

    return register


class Handler(BaseHTTPRequestHandler):
    """One connection, which is kept open from request to request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_) -> None:
        pass  # `Hub.requests` is the log

    def do_GET(self) -> None:
        self.hub, self.url = self.server.hub, urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(self.url.query).items()}
        self.body = self.read_body()  # even for a refusal: the next request on this connection comes after it
        self.hub.wait_where_held(self.path)
        try:
            with self.hub.lock:
                answer = self.answer()
        except Refusal as refusal:
            answer = Answer.json(refusal.body, refusal.status, **refusal.headers)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append((self.command, self.path, headers, answer.status))
        self.send(answer)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.read_exactly(int(self.headers.get("Content-Length", 0)))
        body = bytearray()
        while size := int(self.rfile.readline().partition(b";")[0] or b"0", 16):
            body += self.read_exactly(size + 2)[:-2]
        self.read_exactly(2)
        return bytes(body)

    def read_exactly(self, size: int) -> bytes:
        content = self.rfile.read(size)
        if len(content) < size:
            raise ConnectionError("The client went in the middle of a request")  # half a commit is none
        return content

    def send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if answer.drop is None:
            self.wfile.write(answer.body)
        else:
            self.break_off(answer.body, *answer.drop)

    def break_off(self, body: bytes, after_bytes: int, reset: bool) -> None:
        """Close the connection in the middle of a body."""
        self.wfile.write(body[:after_bytes])
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # otherwise socketserver would end the stream properly first
        else:
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self) -> Answer:
        """Do what the request asks for, where its token may."""
        if status := self.hub.next_failure(self.path):
            raise Refusal(status, "Failing as the test asked for")
        token = self.headers.get("Authorization")
        if self.hub.token and token not in (None, f"Bearer {self.hub.token}"):
            raise Refusal(401, "Invalid credentials in Authorization header")
        for methods, pattern, writes, method in ROUTES:
            match = pattern.fullmatch(self.url.path)
            if match and self.command in methods.split():
                if writes and self.hub.token and token is None:
                    raise Refusal(401, "Invalid username or password.")
                answer = getattr(self, method)(*(part and unquote(part) for part in match.groups()))
                return answer if isinstance(answer, Answer) else Answer.json(answer)
        raise Refusal(404, "Not Found")

    def repository(self, kind: str | None, repo_id: str) -> Repository:
        """`kind` is as in the path: `models`, `datasets` or `spaces`, outside of the API with a slash, or nothing."""
        repo_type = (kind or "models").rstrip("/").removesuffix("s")
        if (repo_type, repo_id) not in self.hub.repositories:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self.hub.repositories[repo_type, repo_id]

    def page(self, repo_type: str, repo_id: str) -> str:
        return f"{self.hub.endpoint}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        if "Authorization" not in self.headers:
            raise Refusal(401, "Invalid username or password.")
        token = {"displayName": "test", "role": "write"}
        return {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token", "accessToken": token}}

    @route("POST", "/api/repos/create", writes=True)
    def create(self):
        wanted = json.loads(self.body)
        repo_type, repo_id = wanted.get("type") or "model", f"{wanted.get('organization') or USER}/{wanted['name']}"
        url = self.page(repo_type, repo_id)
        if (repo_type, repo_id) in self.hub.repositories:
            raise Refusal(409, f"You already created this {repo_type} repo", url=url)  # read where `exist_ok`
        repository = self.hub.repositories[repo_type, repo_id] = Repository(wanted.get("visibility") == "private")
        repository.commit("initial commit", {})
        return {"url": url, "name": repo_id}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        return {"errors": [], "warnings": []}

    @route("GET", "/api/KIND/ID(?:/revision/REV)?")
    def info(self, kind, repo_id, revision):
        repository = self.repository(kind, repo_id)
        commit = repository.at(revision or "main")
        siblings = [{"rfilename": path, "size": len(file.content)} for path, file in sorted(commit.files.items())]
        dates = {"createdAt": repository.commits[0].date, "lastModified": commit.date}
        access = {"private": repository.private, "gated": False, "disabled": False}
        config = {"config": json.loads(commit.files["config.json"].content)} if "config.json" in commit.files else {}
        return {"id": repo_id, "sha": commit.sha, "tags": [], "siblings": siblings, **dates, **access, **config}

    @route("GET", "/api/KIND/ID/auth-check/write", writes=True)
    def may_write(self, kind, repo_id):
        self.repository(kind, repo_id)
        return {}

    @route("GET", "/api/KIND/ID/tree/REV(?:/PATH)?")
    def tree(self, kind, repo_id, revision, folder):
        repository = self.repository(kind, repo_id)
        commit = repository.at(revision)
        prefix = f"{folder}/" if folder else ""
        found = [entry for path, entry in commit.entries().items() if path.startswith(prefix)]
        if folder and not found:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        if self.query.get("recursive", "").lower() != "true":
            found = [entry for entry in found if "/" not in entry["path"].removeprefix(prefix)]
        if self.query.get("expand", "").lower() == "true":
            found = [repository.with_last_commit(entry, commit) for entry in found]
        return found

    @route("POST", "/api/KIND/ID/branch/REV", writes=True)
    def branch(self, kind, repo_id, name):
        repository = self.repository(kind, repo_id)
        if name in repository.branches:
            raise Refusal(409, f"Reference already exists: refs/heads/{name}")
        start = repository.at(json.loads(self.body or b"{}").get("startingPoint", "main"))
        commits = next(commits for commits in repository.branches.values() if start in commits)
        repository.branches[name] = commits[: commits.index(start) + 1]
        return {}

    @route("GET", "/api/KIND/ID/refs")
    def refs(self, kind, repo_id):
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1].sha}
            for name, commits in self.repository(kind, repo_id).branches.items()
        ]
        return {"branches": branches, "converts": [], "tags": []}

    @route("GET", "/api/KIND/ID/commits/REV")
    def list_commits(self, kind, repo_id, revision):
        """Of a branch, the newest first, on one page."""
        commits = self.repository(kind, repo_id).branches[revision]
        return [
            {"id": commit.sha, "title": commit.title, "message": "", "date": commit.date, "authors": []}
            for commit in reversed(commits)
        ]

    @route("POST", "/api/KIND/ID/paths-info/REV")
    def paths_info(self, kind, repo_id, revision):
        repository, form = self.repository(kind, repo_id), parse_qs(self.body.decode())
        commit = repository.at(revision)
        entries = commit.entries()
        found = [entries[path.strip("/")] for path in form.get("paths", []) if path.strip("/") in entries]
        if form.get("expand", [""])[0].lower() == "true":
            found = [repository.with_last_commit(entry, commit) for entry in found]
        return found

    @route("POST", "/api/KIND/ID/preupload/REV", writes=True)
    def preupload(self, kind, repo_id, revision):
        files = self.repository(kind, repo_id).at(revision).files
        answers = []
        for wanted in json.loads(self.body)["files"]:
            mode = "lfs" if is_large(wanted["path"], wanted["size"]) else "regular"
            oid = files[wanted["path"]].oid if wanted["path"] in files else None
            answers.append({"path": wanted["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    @route("POST", "/(datasets/|spaces/)?ID\\.git/info/lfs/objects/batch", writes=True)
    def lfs_batch(self, kind, repo_id):
        self.repository(kind, repo_id)
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in json.loads(self.body)["objects"]]
        for item in objects:
            if item["oid"] not in self.hub.storage:
                self.hub.awaited.add(item["oid"])
                item["actions"] = {"upload": {"href": f"{self.hub.endpoint}/storage/{item['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/storage/([0-9a-f]{64})")
    def upload(self, oid):
        """Clients send no token here; that they were told to come stands for the real Hub's signed addresses."""
        if oid not in self.hub.awaited:
            raise Refusal(403, "Nobody was told to upload this")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "The content does not have the sha256 that was announced")
        self.hub.storage[oid] = self.body
        return {}

    @route("POST", "/api/KIND/ID/commit/REV", writes=True)
    def commit(self, kind, repo_id, revision):
        repository = self.repository(kind, repo_id)
        if revision not in repository.branches or "create_pr" in self.query:
            raise Refusal(400, "This Hub takes commits on the heads of branches alone")
        head = repository.at(revision)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if header["value"].get("parentCommit", head.sha) != head.sha:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for operation in operations:
            self.change(files, operation["key"], **operation["value"])
        commit = repository.commit(header["value"]["summary"], files, revision)
        url = f"{self.page(kind.removesuffix('s'), repo_id)}/commit/{commit.sha}"
        return {"success": True, "commitOid": commit.sha, "commitUrl": url}

    def change(self, files: dict[str, File], key: str, path: str, content: str = "", oid: str = "", **_) -> None:
        """Apply one operation of a commit."""
        if key == "file":
            files[path] = File(base64.b64decode(content), large=False)
        elif key == "lfsFile":
            if oid not in self.hub.storage:
                raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = File(self.hub.storage[oid], large=True)
        elif key in ("deletedFile", "deletedFolder"):
            folder = f"{path.rstrip('/')}/" if key == "deletedFolder" else None
            gone = [name for name in files if (name.startswith(folder) if folder else name == path)]
            if not gone:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise Refusal(400, f"Unknown operation {key}")

    @route("GET HEAD", "/(datasets/|spaces/)?ID/resolve/REV/PATH")
    def download(self, kind, repo_id, revision, path):
        commit = self.repository(kind, repo_id).at(revision)
        file = commit.files.get(path)
        if file is None:
            raise Refusal(404, f"Entry not found: {path}", "EntryNotFound")
        etag = f'"{file.oid}"'
        headers = {"ETag": etag, "X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if file.large:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(file.content))}
        answer = self.cut(file.content, {"Content-Type": "application/octet-stream", **headers})
        if self.command == "GET":
            answer.drop = self.hub.next_drop(len(answer.body))
        return answer

    def cut(self, content: bytes, headers: dict[str, str]) -> Answer:
        """The whole content, or the one range that was asked for."""
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or wanted[0] == "bytes=-":
            return Answer(200, headers, content)
        size = len(content)
        if wanted[1]:
            start, end = int(wanted[1]), min(int(wanted[2] or size) + 1, size)
        else:
            start, end = max(size - int(wanted[2]), 0), size  # `bytes=-N` is the last N bytes
        if start >= end:
            return Answer(416, {"Content-Range": f"bytes */{size}"}, b"")
        return Answer(206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{size}"}, content[start:end])
