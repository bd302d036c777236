"""A Hugging Face Hub on 127.0.0.1 that keeps its repositories in memory, for tests with the real client.

Nothing of ``huggingface_hub`` is replaced: the client creates repositories, uploads (regular and LFS files), commits,
tags, lists and downloads over HTTP as it does against huggingface.co. On top, the server misbehaves on request:
`LoopbackHub.cut`, `LoopbackHub.corrupt`, `LoopbackHub.slow`, `LoopbackHub.fail`, `LoopbackHub.deny_writes`,
`LoopbackHub.pickle_only`, `LoopbackHub.down`.

The client reads its address and its cache folder once, on import; so the environment comes first::

    # conftest.py
    from zoo.testing import LoopbackHub                     # imports neither huggingface_hub nor torch

    server = LoopbackHub().start()
    os.environ.update(server.environ(tempfile.mkdtemp()))   # before the first import of huggingface_hub

    @pytest.fixture
    def hub():
        server.clear()
        yield server
        server.clear()

By hand, for a look at a checkpoint folder without publishing it: ``python -m zoo.testing.hub org/name=FOLDER`` prints
the environment to use in another shell.
"""

import base64
import binascii
import fnmatch
import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

USER = "loopback"
"""The account that any token belongs to; ``create_repo("name")`` makes ``loopback/name``."""

# What the Hub's initial .gitattributes stores outside git, as far as checkpoints are concerned.
_LFS_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("7z", "arrow", "bin", "bz2", "ckpt", "gguf", "gz", "h5", "joblib", "msgpack", "npy", "npz", "onnx", "ot"),
        *("parquet", "pb", "pickle", "pkl", "pt", "pth", "rar", "safetensors", "tar", "tflite", "tgz", "wasm"),
        *("xz", "zip", "zst"),
    )
)
_REGULAR_LIMIT = 5 * 2**20  # bytes; the client sends larger files by LFS only
_VERBS = "preupload|commit|commits|revision|tree|tag|branch|refs|paths-info|auth-check"


@dataclass(frozen=True)
class _File:
    """One file's content; ``lfs`` says whether git would hold a pointer to it."""

    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def blob(self) -> str:
        """Git's id of what git stores: the content, or the LFS pointer."""
        data = self.data
        if self.lfs:
            data = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob

    def describe(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "oid": self.blob, "size": len(self.data), "path": path}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": 134}
        return entry


@dataclass(frozen=True)
class _Commit:
    sha: str
    parent: str | None
    title: str
    message: str
    date: str
    files: Mapping[str, _File]


@dataclass
class _Repo:
    id: str
    kind: str  # "model", "dataset" or "space"
    private: bool = False
    commits: dict[str, _Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        """The full commit id of a branch, tag, pull request, full id or an id's first 7 or more digits."""
        for refs in (self.branches, self.tags, self.pulls):
            if revision in refs:
                return refs[revision]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            found = [sha for sha in self.commits if sha.startswith(revision)]
            return found[0] if len(found) == 1 else None
        return None

    def add(self, files: Mapping[str, _File], branch: str, title: str, message: str = "") -> str:
        """Put a new commit with exactly these files on top of a branch or pull request; returns its id."""
        refs = self.pulls if branch.startswith("refs/pr/") else self.branches
        parent = refs.get(branch)
        # The count makes ids differ where parent, files and words are the same, as git's dates do.
        content = [self.kind, self.id, parent, title, message, len(self.commits)]
        content += sorted((path, file.blob) for path, file in files.items())
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[sha] = _Commit(sha, parent, title, message, _now(), dict(files))
        refs[branch] = sha
        return sha


@dataclass(frozen=True)
class Request:
    """One request that the server answered: ``Request("GET", "/org/name/resolve/main/config.json", "", 200)``."""

    method: str
    path: str
    range: str
    status: int


@dataclass
class _Fault:
    kind: str
    pattern: str
    times: float  # requests left; infinity for always
    value: Any


class _Refusal(Exception):
    """An answer that is not a success, with the Hub's error code where it has one."""

    def __init__(self, status: int, message: str, code: str = "", body: dict[str, Any] | None = None, sha: str = ""):
        super().__init__(message)
        self.status, self.message, self.code, self.body, self.sha = status, message, code, body or {}, sha


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())


def _is_lfs(path: str, size: int, sample: bytes) -> bool:
    return Path(path).suffix.lower() in _LFS_SUFFIXES or size > _REGULAR_LIMIT or b"\0" in sample


def _check_path(path: Any) -> str:
    if not isinstance(path, str) or not path or any(part in ("", ".", "..", ".git") for part in path.split("/")):
        raise _Refusal(400, f"Invalid path in repository: {path!r}")
    return path


class LoopbackHub:
    """A Hub in memory, served on loopback.

    Use as a context manager, or `start` and `stop` it. After a `stop`, `start` serves the same repositories on the
    same port again.

    Args:
        port: 0 picks a free one.

    Example:
        >>> with LoopbackHub() as hub:
        ...     sha = hub.commit("org/name", {"config.json": b"{}"})
        ...     hub.files("org/name", revision=sha)["config.json"]
        b'{}'
    """

    def __init__(self, port: int = 0):
        self.host, self.port = "127.0.0.1", port
        self.requests: list[Request] = []
        """Every request answered since the last `clear`, in order."""
        self._lock = threading.RLock()
        self._repos: dict[tuple[str, str], _Repo] = {}
        self._lfs: dict[str, bytes] = {}
        self._faults: list[_Fault] = []
        self._deny = False
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()

    # ---- running ------------------------------------------------------------------------------------------------

    @property
    def endpoint(self) -> str:
        """The address to give the client as ``HF_ENDPOINT``.

        Raises:
            RuntimeError: if the server was never started, so that its port is not known.
        """
        if self.port == 0:
            raise RuntimeError("LoopbackHub has no address before start(): use `with LoopbackHub() as hub:`.")
        return f"http://{self.host}:{self.port}"

    def start(self) -> Self:
        """Serve from a background thread; returns self."""
        if self._server is None:
            self._stopping.clear()
            self._server = _Server((self.host, self.port), self)
            self.port = self._server.server_address[1]
            self._thread = threading.Thread(
                target=self._server.serve_forever, args=(0.02,), name="LoopbackHub", daemon=True
            )
            self._thread.start()
        return self

    def stop(self) -> None:
        """Refuse connections from now on; the repositories stay."""
        if self._server is not None and self._thread is not None:
            self._stopping.set()
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = self._thread = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @contextmanager
    def down(self) -> Iterator[None]:
        """Stop the server inside a ``with`` block: connections are refused, as without a network."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def clear(self) -> None:
        """Forget repositories, uploads, faults and requests; start again if stopped."""
        with self._lock:
            self._repos.clear()
            self._lfs.clear()
            self.requests.clear()
        self.heal()
        self.start()

    def environ(self, home: str | Path) -> dict[str, str]:
        """The environment that points the client (and only it) here.

        Args:
            home: an empty folder for the client's cache.
        """
        home = Path(home)
        quiet = [part for part in (os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or "").split(",") if part]
        no_proxy = ",".join(dict.fromkeys([*quiet, "127.0.0.1", "localhost"]))
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            # these three win over HF_HOME where the user has set them
            "HF_HUB_CACHE": str(home / "hub"),
            "HUGGINGFACE_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_TOKEN": "hf_loopback",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
        }

    # ---- repositories, without the client -----------------------------------------------------------------------

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        *,
        revision: str = "main",
        message: str = "commit",
        repo_type: str = "model",
    ) -> str:
        """Add or replace files of a repository (made where missing) on a branch; returns the commit's id."""
        with self._lock:
            repo = self._repos.get((repo_type, repo_id)) or self._create(repo_id, repo_type)
            old = repo.commits[repo.branches.setdefault(revision, repo.branches["main"])].files
            new = {_check_path(path): _File(data, _is_lfs(path, len(data), data[:512])) for path, data in files.items()}
            return repo.add({**old, **new}, revision, message)

    def load_folder(self, repo_id: str, path: str | Path, *, revision: str = "main", repo_type: str = "model") -> str:
        """Add a local folder's files, such as ``hub/<name>``, to a repository; returns the commit's id.

        Raises:
            FileNotFoundError: if ``path`` is not a folder with at least one file.
        """
        path = Path(path)
        files = {
            file.relative_to(path).as_posix(): file.read_bytes()
            for file in sorted(path.rglob("*"))
            if file.is_file() and ".cache" not in file.parts and ".git" not in file.parts
        }
        if not files:
            raise FileNotFoundError(f"{path} is not a folder with files to serve as {repo_id}.")
        return self.commit(repo_id, files, revision=revision, message=f"Load {path.name}", repo_type=repo_type)

    def pickle_only(self, repo_id: str, config: Mapping[str, Any] | None = None, marker: str | Path = "") -> str:
        """Make a repository whose only weights are a pickle that creates the file ``marker`` when it is unpickled.

        Args:
            config: the content of its config.json.
            marker: a path to watch: it exists only if somebody has unpickled the file.
        Returns:
            The commit's id.
        """
        import pickle

        class Payload:
            def __reduce__(self) -> tuple[Any, ...]:
                return open, (str(marker or os.devnull), "w")

        files = {"pytorch_model.bin": pickle.dumps({"weight": Payload()})}
        files["config.json"] = json.dumps(config or {}).encode()
        return self.commit(repo_id, files)

    def files(self, repo_id: str, *, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """What a repository holds at a revision, by path.

        Raises:
            KeyError: if there is no such repository or revision.
        """
        with self._lock:
            repo = self._repos.get((repo_type, repo_id))
            sha = repo and repo.resolve(revision)
            if not repo or not sha:
                raise KeyError(f"{repo_id}@{revision} is not here; repositories: {[key[1] for key in self._repos]}")
            return {path: file.data for path, file in repo.commits[sha].files.items()}

    def head(self, repo_id: str, *, revision: str = "main", repo_type: str = "model") -> str:
        """The commit id that a branch, tag or shortened id stands for.

        Raises:
            KeyError: if there is no such repository or revision.
        """
        self.files(repo_id, revision=revision, repo_type=repo_type)
        return self._repos[repo_type, repo_id].resolve(revision) or ""

    def _create(self, repo_id: str, kind: str, private: bool = False) -> _Repo:
        repo = self._repos[kind, repo_id] = _Repo(repo_id, kind, private)
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(_LFS_SUFFIXES))
        repo.add({".gitattributes": _File(attributes.encode(), False)}, "main", "initial commit")
        return repo

    # ---- faults -------------------------------------------------------------------------------------------------

    def cut(self, pattern: str = "*", after: int | None = None, times: int = 1) -> None:
        """Break the connection in the middle of the next ``times`` downloads of files that match ``pattern``.

        Args:
            pattern: of the file's path in its repository, as in ``*.safetensors``.
            after: bytes of the body that still arrive; None: half of them.
        """
        self._inject("cut", pattern, times, after)

    def corrupt(self, pattern: str = "*", offset: int = -1, times: float = float("inf")) -> None:
        """Flip one byte of matching files on their way; size, ETag and sha256 stay those of the true file."""
        self._inject("corrupt", pattern, times, offset)

    def slow(self, seconds: float, pattern: str = "*", times: float = float("inf")) -> None:
        """Wait before every answer about matching files; the API goes by names such as ``api/revision``."""
        self._inject("slow", pattern, times, seconds)

    def fail(self, status: int = 500, pattern: str = "*", times: float = float("inf")) -> None:
        """Answer requests about matching files with an HTTP error.

        Args:
            status: such as 503; the client tries again where that makes sense.
            pattern: of the file's path; the API goes by the names ``api/commit``, ``api/preupload``, ``api/lfs``,
                ``api/tree``, ``api/revision`` (what a repository is and holds), ``api/tag``, ``api/branch``.
            times: how many requests.
        """
        self._inject("fail", pattern, times, status)

    def deny_writes(self, deny: bool = True) -> None:
        """Answer everything that writes with 403, as for a token that may only read."""
        self._deny = deny

    def heal(self) -> None:
        """Switch all faults off."""
        with self._lock:
            self._faults.clear()
        self._deny = False

    def _inject(self, kind: str, pattern: str, times: float, value: Any) -> None:
        with self._lock:
            self._faults.append(_Fault(kind, pattern, times, value))

    def _fault(self, kind: str, path: str) -> _Fault | None:
        """The first fault of a kind for a file, used up by one."""
        with self._lock:
            for fault in self._faults:
                if fault.kind == kind and fault.times > 0 and fnmatch.fnmatchcase(path, fault.pattern):
                    fault.times -= 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], hub: LoopbackHub):
        self.hub = hub
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away (a killed process, a cancelled download) is no news; anything else is."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    @property
    def hub(self) -> LoopbackHub:
        return self.server.hub

    def _serve(self) -> None:
        # One request a connection: once stopped, nothing is answered any more over a connection kept alive.
        self.close_connection = True
        self.body = self._read_body()
        split = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(split.query).items()}
        try:
            self._route(split.path)
        except _Refusal as refusal:
            headers = {"X-Error-Message": refusal.message.replace("\n", " ")}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            if refusal.sha:
                headers["X-Repo-Commit"] = refusal.sha
            self._reply(refusal.status, {"error": refusal.message, **refusal.body}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass  # trailers
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _json(self) -> dict[str, Any]:
        try:
            content = json.loads(self.body or b"{}")
        except ValueError:
            raise _Refusal(400, "The body is not JSON.") from None
        if not isinstance(content, dict):
            raise _Refusal(400, "The body is not a JSON object.")
        return content

    def _log(self, status: int) -> None:
        with self.hub._lock:
            self.hub.requests.append(Request(self.command, self.path, self.headers.get("Range", ""), status))

    def _reply(self, status: int, content: Any = None, headers: Mapping[str, str] | None = None) -> None:
        data = b"" if content is None else json.dumps(content).encode()
        self._log(status)
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ---- where a request goes -----------------------------------------------------------------------------------

    def _route(self, path: str) -> None:
        if path == "/api/whoami-v2":
            self._need_token()
            return self._reply(200, {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {}})
        if path == "/api/validate-yaml":
            return self._validate_yaml()
        if path in ("/api/repos/create", "/api/repos/delete"):
            return self._create() if path.endswith("create") else self._delete()
        if match := re.fullmatch("/lfs/([0-9a-f]{64}|verify)", path):
            return self._verify() if match[1] == "verify" else self._put(match[1])
        if match := re.fullmatch("/api/(model|dataset|space)s", path):
            return self._list(match[1])
        if match := re.fullmatch(r"/(?:(dataset|space)s/)?([^/]+(?:/[^/]+)?)\.git/info/lfs/objects/batch", path):
            return self._batch(self._repo(match[1] or "model", unquote(match[2])))
        if match := re.fullmatch("/(?:(dataset|space)s/)?([^/]+(?:/[^/]+)?)/(?:resolve|raw)/([^/]+)/(.+)", path):
            repo = self._repo(match[1] or "model", unquote(match[2]))
            return self._resolve(repo, unquote(match[3]), unquote(match[4]))
        found = []
        for owner in ("[^/]+/", ""):  # "gpt2" has no owner: "/gpt2/refs" may be a repository, or its references
            if match := re.fullmatch(rf"/api/(model|dataset|space)s/({owner}[^/]+)(?:/({_VERBS})(?:/(.*))?)?", path):
                found.append((match[1], unquote(match[2]), match[3] or "revision", match[4] or ""))
        for kind, repo_id, verb, rest in sorted(found, key=lambda f: f[:2] not in self.hub._repos):
            return self._api(self._repo(kind, repo_id), verb, rest)
        raise _Refusal(404, f"LoopbackHub has no route for {self.command} {path}")

    def _misbehave(self, path: str) -> None:
        if slow := self.hub._fault("slow", path):
            self.hub._stopping.wait(slow.value)
        if fail := self.hub._fault("fail", path):
            raise _Refusal(fail.value, f"LoopbackHub was told to answer {fail.value}")

    def _api(self, repo: _Repo, verb: str, rest: str) -> None:
        self._misbehave(f"api/{verb}")
        revision, _, inner = rest.partition("/")
        revision, inner = unquote(revision) or "main", unquote(inner)
        if verb == "auth-check":
            return self._reply(200, {})
        if verb == "refs":
            return self._refs(repo)
        if verb in ("tag", "branch"):
            return self._ref(repo, verb, revision)
        if verb in ("preupload", "commit"):
            self._need_write()
        commit = self._at(repo, revision)
        if verb == "preupload":
            return self._preupload(commit)
        if verb == "commit":
            return self._commit(repo, revision, commit)
        if verb == "commits":
            return self._commits(repo, commit)
        if verb == "tree":
            return self._reply(200, self._tree(commit, inner))
        if verb == "paths-info":
            return self._paths_info(commit)
        return self._reply(200, self._info(repo, commit))

    def _repo(self, kind: str, repo_id: str) -> _Repo:
        with self.hub._lock:
            repo = self.hub._repos.get((kind, repo_id))
        if repo is None or (repo.private and not self._token()):
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        return repo

    def _at(self, repo: _Repo, revision: str) -> _Commit:
        with self.hub._lock:
            sha = repo.resolve(revision)
            if sha is None:
                raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return repo.commits[sha]

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ").strip()

    def _need_token(self) -> None:
        if not self._token():
            raise _Refusal(401, "Invalid username or password.")

    def _need_write(self) -> None:
        self._need_token()
        if self.hub._deny:
            raise _Refusal(403, "Forbidden: this token may not write here")

    # ---- reading ------------------------------------------------------------------------------------------------

    def _list(self, kind: str) -> None:
        author, search = self.query.get("author", ""), self.query.get("search", "")
        with self.hub._lock:
            repos = [repo for (key, _), repo in self.hub._repos.items() if key == kind and not repo.private]
        found = [r for r in repos if r.id.startswith(author and f"{author}/") and search.lower() in r.id.lower()]
        self._reply(200, [self._info(repo, self._at(repo, "main")) for repo in found])

    def _info(self, repo: _Repo, commit: _Commit) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = []
        for path, file in sorted(commit.files.items()):
            entry: dict[str, Any] = {"rfilename": path}
            if self.query.get("blobs", "").lower() in ("1", "true"):
                entry |= {"size": len(file.data), "blobId": file.blob}
                if file.lfs:
                    entry["lfs"] = {"sha256": file.sha256, "size": len(file.data), "pointerSize": 134}
            siblings.append(entry)
        card = _front_matter(commit.files["README.md"].data.decode()) if "README.md" in commit.files else {}
        card = card if isinstance(card, dict) else {}
        return {
            "_id": hashlib.sha1(repo.id.encode()).hexdigest()[:24],
            "id": repo.id,
            "modelId": repo.id,
            "author": repo.id.partition("/")[0],
            "sha": commit.sha,
            "lastModified": commit.date,
            "createdAt": next(iter(repo.commits.values())).date,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": list(card.get("tags") or []),
            "cardData": card,
            **{key: card[key] for key in ("library_name", "pipeline_tag") if card.get(key)},
            "siblings": siblings,
        }

    def _tree(self, commit: _Commit, folder: str) -> list[dict[str, Any]]:
        folder = folder.strip("/")
        below = {path: file for path, file in commit.files.items() if not folder or path.startswith(f"{folder}/")}
        if folder and not below:
            raise _Refusal(404, f"{folder} does not exist", "EntryNotFound", sha=commit.sha)
        recursive = self.query.get("recursive", "").lower() in ("1", "true")
        entries: dict[str, dict[str, Any]] = {}
        for path, file in sorted(below.items()):
            inner = path[len(folder) + 1 if folder else 0 :].split("/")
            for depth in range(1, len(inner) if recursive else min(len(inner), 2)):
                name = "/".join([*([folder] if folder else []), *inner[:depth]])
                oid = hashlib.sha1(name.encode()).hexdigest()
                entries.setdefault(name, {"type": "directory", "oid": oid, "size": 0, "path": name})
            if recursive or len(inner) == 1:
                entries[path] = file.describe(path)
        if self.query.get("expand", "").lower() in ("1", "true"):
            last = {"id": commit.sha, "title": commit.title, "date": commit.date}
            entries = {path: {**entry, "lastCommit": last} for path, entry in entries.items()}
        return list(entries.values())

    def _paths_info(self, commit: _Commit) -> None:
        if "json" in self.headers.get("Content-Type", ""):
            paths = self._json().get("paths", [])
        else:
            paths = parse_qs(self.body.decode()).get("paths", [])
        found = []
        for path in paths:
            path = path.strip("/")
            if path in commit.files:
                found.append(commit.files[path].describe(path))
            elif any(name.startswith(f"{path}/") for name in commit.files):
                found.append({"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "path": path})
        self._reply(200, found)

    def _refs(self, repo: _Repo) -> None:
        def rows(refs: Mapping[str, str], prefix: str) -> list[dict[str, str]]:
            return [{"name": name, "ref": prefix + name, "targetCommit": sha} for name, sha in refs.items()]

        with self.hub._lock:
            found = {"branches": rows(repo.branches, "refs/heads/"), "tags": rows(repo.tags, "refs/tags/")}
            found |= {"converts": [], "pullRequests": rows(repo.pulls, "")}
        self._reply(200, found)

    def _commits(self, repo: _Repo, commit: _Commit | None) -> None:
        found = []
        while commit is not None:
            entry = {"id": commit.sha, "title": commit.title, "message": commit.message, "date": commit.date}
            found.append({**entry, "authors": [{"user": USER}]})
            commit = repo.commits[commit.parent] if commit.parent else None
        self._reply(200, found)

    def _resolve(self, repo: _Repo, revision: str, path: str) -> None:
        self._misbehave(path)
        commit = self._at(repo, revision)
        file = commit.files.get(path)
        if file is None:
            raise _Refusal(404, f"{path} does not exist", "EntryNotFound", sha=commit.sha)
        data, size = file.data, len(file.data)
        first, last, status = 0, size - 1, 200
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "").replace(" ", "")):
            if match[1]:
                first, last = int(match[1]), min(int(match[2] or size - 1), size - 1)
            elif match[2]:
                first = max(size - int(match[2]), 0)
            if first > last:
                self._log(416)
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{size}")
                self.send_header("Content-Length", "0")
                self.send_header("Connection", "close")
                return self.end_headers()
            status = 206
        if self.command == "GET" and size and (bad := self.hub._fault("corrupt", path)):
            at = bad.value % size
            data = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
        body = data[first : last + 1]
        self._log(status)
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if file.lfs else "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Connection", "close")
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("ETag", f'"{file.etag}"')
        self.send_header("X-Repo-Commit", commit.sha)
        if file.lfs:
            self.send_header("X-Linked-Etag", f'"{file.sha256}"')
            self.send_header("X-Linked-Size", str(size))
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut := self.hub._fault("cut", path):
            body = body[: len(body) // 2 if cut.value is None else cut.value]
        self.wfile.write(body)  # a cut ends here: less than Content-Length, then the connection closes

    # ---- writing ------------------------------------------------------------------------------------------------

    def _validate_yaml(self) -> None:
        try:
            card = _front_matter(str(self._json().get("content", "")))
        except ValueError as error:
            return self._reply(400, {"errors": [{"message": str(error)}], "warnings": []})
        if not isinstance(card, dict):
            return self._reply(400, {"errors": [{"message": "the metadata is not a mapping"}], "warnings": []})
        warnings = [] if card else [{"message": "empty or missing yaml metadata in repo card"}]
        self._reply(200, {"errors": [], "warnings": warnings})

    def _create(self) -> None:
        self._need_write()
        content = self._json()
        owner, name, kind = content.get("organization") or USER, content.get("name"), content.get("type") or "model"
        kinds = ("model", "dataset", "space")
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,96}", name) or kind not in kinds:
            raise _Refusal(400, f"Invalid repository name or type: {name!r}, {kind!r}")
        repo_id = f"{owner}/{name}"
        url = f"{self.hub.endpoint}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        private = bool(content.get("private")) or content.get("visibility") == "private"
        with self.hub._lock:
            if (kind, repo_id) in self.hub._repos:
                raise _Refusal(409, f"You already created this {kind} repo", body={"url": url})
            repo = self.hub._create(repo_id, kind, private)
        self._reply(200, {"url": url, "name": repo_id, "id": hashlib.sha1(repo.id.encode()).hexdigest()[:24]})

    def _delete(self) -> None:
        self._need_write()
        content = self._json()
        repo_id = f"{content.get('organization') or USER}/{content.get('name')}"
        with self.hub._lock:
            if self.hub._repos.pop((content.get("type") or "model", repo_id), None) is None:
                raise _Refusal(404, "Repository not found", "RepoNotFound")
        self._reply(200, {})

    def _preupload(self, commit: _Commit) -> None:
        answer = []
        for file in self._json().get("files", []):
            path, size = _check_path(file.get("path")), int(file.get("size", 0))
            lfs = _is_lfs(path, size, base64.b64decode(file.get("sample", "")))
            entry = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if path in commit.files:
                entry["oid"] = commit.files[path].etag  # what lets the client leave out files that are the same
            answer.append(entry)
        self._reply(200, {"files": answer})

    def _batch(self, repo: _Repo) -> None:
        self._misbehave("api/lfs")
        self._need_write()
        content = self._json()
        if content.get("operation") != "upload" or content.get("hash_algo", "sha256") != "sha256":
            raise _Refusal(400, "Only uploads by sha256 are served here")
        objects = []
        for wanted in content.get("objects", []):
            entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub._lfs:
                upload = {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}?size={wanted['size']}"}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/lfs/verify"}}
            objects.append(entry)
        self._reply(200, {"transfer": "basic", "objects": objects})

    def _put(self, oid: str) -> None:
        if self.hub._deny:
            raise _Refusal(403, "Forbidden: this token may not write here")
        got = hashlib.sha256(self.body).hexdigest()
        if got != oid or str(len(self.body)) != self.query.get("size"):
            raise _Refusal(400, f"Upload has sha256 {got} and {len(self.body)} bytes, announced were {oid}")
        with self.hub._lock:
            self.hub._lfs[oid] = self.body
        self._reply(200)

    def _verify(self) -> None:
        content = self._json()
        data = self.hub._lfs.get(content.get("oid", ""))
        if data is None or len(data) != content.get("size"):
            raise _Refusal(404, "The object has not arrived as announced")
        self._reply(200, {})

    def _commit(self, repo: _Repo, branch: str, parent: _Commit) -> None:
        try:
            lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
            header = next(line["value"] for line in lines if line["key"] == "header")
            title = str(header["summary"])
        except (ValueError, KeyError, TypeError, StopIteration):
            raise _Refusal(400, "The commit is not ndjson with a header") from None
        with self.hub._lock:
            if branch not in repo.branches and branch not in repo.pulls:
                raise _Refusal(400, f"{branch} is not a branch that can be committed to")
            if header.get("parentCommit") not in (None, parent.sha):
                raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
            files = dict(parent.files)
            for line in lines:
                key, value = line.get("key"), line.get("value")
                if key != "header":
                    self._apply(files, str(key), value, parent)
            extra = {}
            if self.query.get("create_pr") in ("1", "true"):
                branch = f"refs/pr/{len(repo.pulls) + 1}"
                repo.pulls[branch] = parent.sha
                extra = {"pullRequestUrl": f"{self.hub.endpoint}/{repo.id}/discussions/{len(repo.pulls)}"}
            sha = repo.add(files, branch, title, str(header.get("description", "")))
        prefix = "" if repo.kind == "model" else f"{repo.kind}s/"
        url = f"{self.hub.endpoint}/{prefix}{repo.id}/commit/{sha}"
        self._reply(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": "", **extra})

    def _apply(self, files: dict[str, _File], key: str, value: dict[str, Any], parent: _Commit) -> None:
        """Carry out one line of a commit."""
        path = _check_path(str(value.get("path", "")).rstrip("/"))
        if key == "file":
            try:
                files[path] = _File(base64.b64decode(value["content"], validate=True), False)
            except (KeyError, binascii.Error):
                raise _Refusal(400, f"{path} is not base64") from None
        elif key == "lfsFile":
            data = self.hub._lfs.get(value.get("oid", ""))
            if data is None:  # a copy inside the repository, or served without an upload
                same = [f.data for f in parent.files.values() if f.lfs and f.sha256 == value.get("oid")]
                if not same:
                    raise _Refusal(400, f"The LFS object of {path} was not uploaded")
                data = same[0]
            files[path] = _File(data, True)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [name for name in files if (name == path if key == "deletedFile" else name.startswith(f"{path}/"))]
            if not gone:
                raise _Refusal(404, "A file with this name doesn't exist", "EntryNotFound", sha=parent.sha)
            for name in gone:
                del files[name]
        else:
            raise _Refusal(400, f"LoopbackHub knows no commit operation {key!r}")

    def _ref(self, repo: _Repo, verb: str, name: str) -> None:
        """Make or remove a tag (``POST tag/{revision}``, ``DELETE tag/{tag}``) or a branch."""
        self._need_write()
        refs = repo.tags if verb == "tag" else repo.branches
        if self.command == "DELETE":
            with self.hub._lock:
                if refs.pop(name, None) is None:
                    raise _Refusal(404, f"There is no {verb} {name}", "RevisionNotFound")
            return self._reply(200, {})
        content = self._json()
        start = name if verb == "tag" else content.get("startingPoint") or "main"
        target = self._at(repo, start).sha
        name = str(content.get("tag", "")) if verb == "tag" else name
        if not name or name.startswith("/") or ".." in name:
            raise _Refusal(400, f"Invalid {verb} name {name!r}")
        with self.hub._lock:
            if name in refs and not content.get("overwrite"):
                raise _Refusal(409, f"The {verb} {name} exists already")
            refs[name] = target
        self._reply(201, {})


def _front_matter(text: str) -> Any:
    """The YAML between the first two ``---`` lines of a card; {} where there is none.

    Raises:
        ValueError: if it is not YAML.
    """
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    if not match:
        return {}
    import yaml  # a dependency of huggingface_hub

    try:
        return yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def main(arguments: list[str] | None = None) -> int:
    """Serve folders until interrupted: ``python -m zoo.testing.hub [--port N] org/name=FOLDER ...``."""
    import argparse
    import tempfile

    parser = argparse.ArgumentParser(prog="python -m zoo.testing.hub", description=main.__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    parser.add_argument("repositories", nargs="*", metavar="ORG/NAME=FOLDER")
    options = parser.parse_args(arguments)
    hub = LoopbackHub(options.port)
    for pair in options.repositories:
        repo_id, equals, folder = pair.partition("=")
        if not equals:
            parser.error(f"{pair!r} is not ORG/NAME=FOLDER")
        try:
            hub.load_folder(repo_id, folder)
        except FileNotFoundError as error:
            parser.error(str(error))
    with tempfile.TemporaryDirectory(prefix="loopback-hub-") as home, hub:
        for key, value in hub.environ(home).items():
            print(f"export {key}={quote(value, safe='/:.,_')}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
