"""The loopback Hub against the real client: what a test may rely on when it says "published" or "downloaded"."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _http

from zoo.testing import LoopbackHub

httpx = getattr(_http, "httpx2", None) or _http.httpx  # the library that this client speaks HTTP with

REPO = "acme/model"
WEIGHTS = bytes(range(256)) * 2048  # 512 KiB


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    return HfApi()


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the client try again at once; it waits up to 23 s in all."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def read(filename: str, **kwargs) -> bytes:
    return Path(hf_hub_download(REPO, filename, **kwargs)).read_bytes()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def downloads(hub: LoopbackHub, name: str) -> list[tuple[str, int]]:
    """(Range, status) of the GETs of a file."""
    return [(r.range, r.status) for r in hub.requests if r.method == "GET" and r.path.endswith(f"/{name}")]


# ---- up and down -----------------------------------------------------------------------------------------------------


def test_folder_goes_up_and_comes_back_bit_for_bit(api, hub, tmp_path):
    files = {
        "README.md": b"---\nlicense: mit\npipeline_tag: image-to-image\n---\n# Card\n",
        "config.json": b'{"width": 8}\n',
        "model.safetensors": WEIGHTS,
        "notes/empty.txt": b"",
        "notes/deep/\xc3\xa4 b+c.txt".encode("latin-1").decode(): b"name that needs quoting",
    }
    url = api.create_repo(REPO)
    assert url == f"{hub.endpoint}/{REPO}" and url.repo_id == REPO
    info = api.upload_folder(repo_id=REPO, folder_path=write(tmp_path / "up", files), commit_message="First")
    assert info.oid == hub.head(REPO) and len(info.oid) == 40
    assert {k: v for k, v in hub.files(REPO).items() if k != ".gitattributes"} == files
    back = Path(snapshot_download(REPO))
    assert {p.relative_to(back).as_posix(): p.read_bytes() for p in back.rglob("*") if p.is_file()} == hub.files(REPO)
    assert back.name == info.oid
    assert [r.path for r in hub.requests if r.method == "PUT"] == [
        f"/lfs/{hashlib.sha256(WEIGHTS).hexdigest()}?size={len(WEIGHTS)}"
    ]


def test_blobs_in_the_cache_are_named_by_their_hash(hub, hf_home):
    hub.commit(REPO, {"model.safetensors": WEIGHTS, "config.json": b"{}"})
    weights, config = (Path(hf_hub_download(REPO, n)).resolve() for n in ("model.safetensors", "config.json"))
    assert weights.name == hashlib.sha256(WEIGHTS).hexdigest()
    assert config.name == hashlib.sha1(b"blob 2\0{}").hexdigest()  # git hash-object
    assert weights.is_relative_to(hf_home)


def test_cached_file_is_not_downloaded_again_and_a_new_commit_is(hub):
    hub.commit(REPO, {"config.json": b"old"})
    assert read("config.json") == read("config.json") == b"old"
    assert len(downloads(hub, "config.json")) == 1
    hub.commit(REPO, {"config.json": b"new"})
    assert read("config.json") == b"new"


def test_unchanged_files_make_no_commit(api, hub, tmp_path):
    folder = write(tmp_path / "up", {"config.json": b"{}", "model.safetensors": WEIGHTS})
    api.create_repo(REPO)
    first = api.upload_folder(repo_id=REPO, folder_path=folder)
    again = api.upload_folder(repo_id=REPO, folder_path=folder)
    assert again.oid == first.oid == hub.head(REPO)
    (folder / "config.json").write_text("{ }")
    assert api.upload_folder(repo_id=REPO, folder_path=folder).oid != first.oid
    assert sum(r.method == "PUT" for r in hub.requests) == 1


def test_many_threads_at_once(hub):
    hub.commit(REPO, {f"part-{i}.bin": bytes([i]) * 4096 for i in range(24)})
    back = Path(snapshot_download(REPO, max_workers=12))
    assert all((back / f"part-{i}.bin").read_bytes() == bytes([i]) * 4096 for i in range(24))


def test_load_folder_serves_a_checkpoint_folder(hub, tmp_path):
    sha = hub.load_folder(REPO, write(tmp_path / "x", {"config.json": b"{}", "a/b.txt": b"1"}))
    assert hub.files(REPO, revision=sha)["a/b.txt"] == b"1" and read("a/b.txt", revision=sha) == b"1"
    with pytest.raises(FileNotFoundError, match="not a folder with files"):
        hub.load_folder(REPO, tmp_path / "nothing")


# ---- revisions -------------------------------------------------------------------------------------------------------


def test_tags_branches_and_commits_are_revisions(api, hub):
    first = hub.commit(REPO, {"config.json": b"1"})
    api.create_tag(REPO, tag="v1.0", tag_message="first")
    second = hub.commit(REPO, {"config.json": b"2"})
    api.create_branch(REPO, branch="try/out", revision="v1.0")
    api.upload_file(repo_id=REPO, path_or_fileobj=b"3", path_in_repo="config.json", revision="try/out")
    found = {r: read("config.json", revision=r) for r in ("v1.0", "main", "try/out", first, second)}
    assert found == {"v1.0": b"1", "main": b"2", "try/out": b"3", first: b"1", second: b"2"}
    assert hub.files(REPO, revision=first[:7])["config.json"] == b"1"
    refs = api.list_repo_refs(REPO)
    assert {b.name: b.target_commit for b in refs.branches}["main"] == second
    assert [(t.name, t.ref, t.target_commit) for t in refs.tags] == [("v1.0", "refs/tags/v1.0", first)]
    assert api.model_info(REPO, revision="v1.0").sha == first
    with pytest.raises(HfHubHTTPError, match="exists already"):
        api.create_tag(REPO, tag="v1.0")
    api.create_tag(REPO, tag="v1.0", exist_ok=True)
    api.delete_tag(REPO, tag="v1.0")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="v1.0")


def test_history_parent_check_and_pull_request(api, hub):
    first = hub.commit(REPO, {"a.txt": b"1"}, message="one")
    second = hub.commit(REPO, {"a.txt": b"2"}, message="two")
    assert [(c.commit_id, c.title) for c in api.list_repo_commits(REPO)][:2] == [(second, "two"), (first, "one")]
    add = CommitOperationAdd("a.txt", b"3")
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.create_commit(REPO, [add], commit_message="late", parent_commit=first)
    request = api.create_commit(REPO, [CommitOperationAdd("a.txt", b"4")], commit_message="please", create_pr=True)
    assert request.pr_revision == "refs/pr/1"
    assert (read("a.txt", revision="refs/pr/1"), read("a.txt")) == (b"4", b"2")


def test_delete_and_copy(api, hub):
    hub.commit(REPO, {"a.safetensors": WEIGHTS, "b.txt": b"b", "dir/c.txt": b"c", "dir/d.txt": b"d"})
    api.create_commit(
        REPO,
        [
            CommitOperationCopy("a.safetensors", "copy.safetensors"),
            CommitOperationDelete("b.txt"),
            CommitOperationDelete("dir/"),
        ],
        commit_message="move",
    )
    assert set(hub.files(REPO)) == {".gitattributes", "a.safetensors", "copy.safetensors"}
    assert hub.files(REPO)["copy.safetensors"] == WEIGHTS
    with pytest.raises(EntryNotFoundError):
        api.delete_file("b.txt", REPO)


def test_what_the_hub_tells_about_a_repository(api, hub):
    card = b"---\nlicense: mit\nlibrary_name: zoo\npipeline_tag: image-to-image\ntags: [zoo]\n---\n"
    sha = hub.commit(REPO, {"README.md": card, "model.safetensors": WEIGHTS, "dir/x.txt": b"x"})
    info = api.model_info(REPO, files_metadata=True)
    assert (info.id, info.sha, info.library_name, info.pipeline_tag) == (REPO, sha, "zoo", "image-to-image")
    assert info.card_data.license == "mit" and info.tags == ["zoo"]
    lfs = next(s for s in info.siblings if s.rfilename == "model.safetensors").lfs
    assert (lfs.sha256, lfs.size) == (hashlib.sha256(WEIGHTS).hexdigest(), len(WEIGHTS))
    assert {e.path for e in api.list_repo_tree(REPO)} == {".gitattributes", "README.md", "model.safetensors", "dir"}
    assert [e.path for e in api.list_repo_tree(REPO, "dir")] == ["dir/x.txt"]
    assert "dir/x.txt" in {e.path for e in api.list_repo_tree(REPO, recursive=True)}
    assert {e.path for e in api.get_paths_info(REPO, ["dir", "README.md", "nope"])} == {"dir", "README.md"}
    assert [m.id for m in api.list_models(author="acme")] == [REPO]
    assert api.whoami()["name"] == "loopback"
    assert api.file_exists(REPO, "dir/x.txt") and not api.file_exists(REPO, "nope")
    assert api.repo_exists(REPO) and not api.repo_exists("acme/none")


def test_datasets_and_names_without_an_owner(api, hub):
    api.create_repo("acme/data", repo_type="dataset")
    api.upload_file(repo_id="acme/data", repo_type="dataset", path_or_fileobj=b"1,2", path_in_repo="train.csv")
    path = hf_hub_download("acme/data", "train.csv", repo_type="dataset")
    assert Path(path).read_bytes() == b"1,2"
    hub.commit("gpt2", {"config.json": b"{}"})
    assert Path(hf_hub_download("gpt2", "config.json")).read_bytes() == b"{}"
    assert [b.name for b in api.list_repo_refs("gpt2").branches] == ["main"]
    assert api.model_info("gpt2").id == "gpt2"
    assert api.create_repo("mine").repo_id == "loopback/mine"


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_missing_things_raise_the_clients_own_errors(api, hub):
    sha = hub.commit(REPO, {"config.json": b"{}"})
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("acme/none", "config.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "config.json", revision="v9")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "config.json", revision="0" * 40)
    with pytest.raises(EntryNotFoundError) as caught:
        hf_hub_download(REPO, "none.json")
    assert caught.value.response.headers["X-Repo-Commit"] == sha
    with pytest.raises(RepositoryNotFoundError):
        api.upload_file(repo_id="acme/none", path_or_fileobj=b"1", path_in_repo="x.txt")
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"1", path_in_repo="x.txt", revision="nope")


def test_creating_twice(api, hub):
    api.create_repo(REPO)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    api.delete_repo(REPO)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(REPO)
    api.delete_repo(REPO, missing_ok=True)


def test_private_needs_a_token(api, hub):
    api.create_repo(REPO, private=True)
    assert api.model_info(REPO).private
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(REPO, token=False)
    with pytest.raises(HfHubHTTPError):
        api.create_repo("acme/other", token=False)


def test_broken_card_is_refused(api, hub):
    api.create_repo(REPO)
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"---\na: [1\n---\n", path_in_repo="README.md")
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"# no metadata\n", path_in_repo="README.md")


def test_paths_cannot_leave_the_repository(hub):
    with pytest.raises(Exception, match="Invalid path"):
        hub.commit(REPO, {"../evil.txt": b""})


def test_wrong_bytes_are_not_accepted_as_an_lfs_object(hub):
    import urllib.error
    import urllib.request

    url = f"{hub.endpoint}/lfs/{hashlib.sha256(b'said').hexdigest()}?size=4"
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(url, data=b"sent", method="PUT"))


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_download_cut_in_the_middle_is_resumed_by_range(hub):
    chunk = constants.DOWNLOAD_CHUNK_SIZE  # the client keeps whole chunks only
    data = os.urandom(chunk + 300_000)
    hub.commit(REPO, {"model.safetensors": data})
    hub.cut("*.safetensors", after=chunk + 200_000)
    with contextlib.suppress(httpx.RemoteProtocolError):  # newer clients try again by themselves
        read("model.safetensors")
    assert read("model.safetensors") == data
    assert downloads(hub, "model.safetensors") == [("", 200), (f"bytes={chunk}-", 206)]


def test_download_cut_again_and_again_ends_in_an_error_and_leaves_nothing(hub, hf_home, no_pause):
    hub.commit(REPO, {"model.safetensors": WEIGHTS})
    hub.cut("*.safetensors", times=100)
    with pytest.raises(Exception, match="peer closed connection"):
        read("model.safetensors")
    assert not [p for p in (hf_home / "hub").rglob("*.safetensors")]
    hub.heal()
    assert read("model.safetensors") == WEIGHTS


def test_range_requests(hub):
    import urllib.error
    import urllib.request

    hub.commit(REPO, {"x.bin": b"0123456789"})

    def get(spec: str) -> tuple[int, bytes, str | None]:
        request = urllib.request.Request(f"{hub.endpoint}/{REPO}/resolve/main/x.bin", headers={"Range": spec})
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read(), answer.headers["Content-Range"]

    assert get("bytes=2-4") == (206, b"234", "bytes 2-4/10")
    assert get("bytes=7-") == (206, b"789", "bytes 7-9/10")
    assert get("bytes=-3") == (206, b"789", "bytes 7-9/10")
    assert get("bytes=5-99") == (206, b"56789", "bytes 5-9/10")
    with pytest.raises(urllib.error.HTTPError, match="416"):
        get("bytes=10-")


def test_corruption_keeps_size_and_hash_and_the_client_does_not_notice(hub):
    """Why whoever loads must check the sha256 himself."""
    hub.commit(REPO, {"model.safetensors": WEIGHTS})
    hub.corrupt("*.safetensors", offset=5)
    path = Path(hf_hub_download(REPO, "model.safetensors"))
    got = path.read_bytes()
    assert len(got) == len(WEIGHTS) and [i for i, (a, b) in enumerate(zip(got, WEIGHTS, strict=True)) if a != b] == [5]
    assert path.resolve().name == hashlib.sha256(WEIGHTS).hexdigest() != hashlib.sha256(got).hexdigest()
    hub.heal()
    assert Path(hf_hub_download(REPO, "model.safetensors", force_download=True)).read_bytes() == WEIGHTS


def test_slow_answers_reach_the_clients_timeout(hub):
    hub.commit(REPO, {"config.json": b"{}"})
    hub.slow(0.2)
    start = time.monotonic()
    assert read("config.json") == b"{}"
    assert time.monotonic() - start >= 0.4  # HEAD and GET
    hub.heal()
    hub.slow(30, times=1)
    start = time.monotonic()
    assert read("config.json", etag_timeout=0.1) == b"{}"  # from the cache
    assert time.monotonic() - start < 5


def test_server_errors_pass_and_persist(hub, no_pause):
    hub.commit(REPO, {"config.json": b"{}", "other.json": b"[]"})
    assert read("config.json") == b"{}"
    hub.fail(503)
    assert read("config.json") == b"{}"  # from the cache
    with pytest.raises(LocalEntryNotFoundError):
        read("other.json")
    hub.heal()
    hub.fail(503, "other.json", times=1)
    with contextlib.suppress(LocalEntryNotFoundError):  # newer clients try again by themselves
        read("other.json")
    assert read("other.json") == b"[]"


def test_denied_writes(api, hub):
    hub.commit(REPO, {"config.json": b"{}"})
    hub.deny_writes()
    before = hub.head(REPO)
    with pytest.raises(HfHubHTTPError, match="403"):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"1", path_in_repo="x.txt")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("acme/other")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_tag(REPO, tag="v1")
    assert api.create_repo(REPO, exist_ok=True) == f"{hub.endpoint}/{REPO}"
    assert hub.head(REPO) == before and read("config.json") == b"{}"


def test_pickle_only_repository_runs_code_when_unpickled(hub, tmp_path):
    """The bait is live: it shows whether anybody opened it."""
    import pickle

    marker = tmp_path / "marker"
    hub.pickle_only(REPO, {"width": 8}, marker)
    data = read("pytorch_model.bin")
    assert json.loads(read("config.json")) == {"width": 8} and not marker.exists()
    pickle.loads(data)["weight"].close()
    assert marker.exists()


def test_down_refuses_connections_and_comes_back_with_everything(hub, no_pause):
    hub.commit(REPO, {"config.json": b"{}", "other.json": b"[]"})
    assert read("config.json") == b"{}"
    endpoint = hub.endpoint
    with hub.down():
        assert read("config.json") == b"{}"  # from the cache
        with pytest.raises(LocalEntryNotFoundError):
            read("other.json")
    assert hub.endpoint == endpoint and read("other.json") == b"[]"


def test_offline_process_after_the_server_stopped(hf_home, tmp_path):
    code = f"from huggingface_hub import hf_hub_download as d; print(open(d('{REPO}', 'config.json')).read())"
    with LoopbackHub() as own:
        own.commit(REPO, {"config.json": b'{"width": 8}'})
        environ = {**os.environ, **own.environ(tmp_path / "home")}
        assert _run(code, environ) == '{"width": 8}'
    assert _run(code, {**environ, "HF_HUB_OFFLINE": "1"}) == '{"width": 8}'
    code = code.replace("config.json", "other.json")
    failed = subprocess.run(
        [sys.executable, "-c", code], env={**environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert failed.returncode and "LocalEntryNotFoundError" in failed.stderr


def _run(code: str, environ: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- the server by itself --------------------------------------------------------------------------------------------


def test_servers_are_independent():
    with LoopbackHub() as one, LoopbackHub() as two:
        assert one.port != two.port
        one.commit(REPO, {"a": b""})
        with pytest.raises(KeyError, match="is not here"):
            two.files(REPO)


def test_no_address_before_start_and_no_thread_after_stop():
    hub = LoopbackHub()
    with pytest.raises(RuntimeError, match="no address before start"):
        _ = hub.endpoint
    before = threading.active_count()
    hub.start()
    hub.stop()
    hub.stop()
    assert threading.active_count() == before


def test_example_in_the_docstring():
    import doctest

    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    for test in finder.find(LoopbackHub, globs={"LoopbackHub": LoopbackHub}):
        runner.run(test)
    assert runner.summarize(verbose=False) == doctest.TestResults(0, 1)


def test_import_needs_neither_client_nor_torch():
    heavy = "{'torch', 'lightning', 'huggingface_hub', 'numpy'}"
    code = f"import sys, zoo.testing; print(sorted({heavy} & set(sys.modules)))"
    assert _run(code, dict(os.environ)) == "[]"


def test_by_hand(tmp_path):
    write(tmp_path / "ckpt", {"config.json": b"{}"})
    process = subprocess.Popen(
        [sys.executable, "-m", "zoo.testing.hub", f"{REPO}={tmp_path / 'ckpt'}"], stdout=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("export HF_ENDPOINT=http://127.0.0.1:")
        path = hf_hub_download(REPO, "config.json", endpoint=line.split("=")[1].strip(), cache_dir=tmp_path / "cache")
        assert Path(path).read_text() == "{}"
    finally:
        process.terminate()
        process.wait(10)


# ---- the guard in conftest -------------------------------------------------------------------------------------------


def test_leaving_this_machine_is_refused(no_network):
    import socket

    for attempt in (
        lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
        lambda: socket.socket().connect_ex(("192.0.2.1", 80)),
        lambda: socket.getaddrinfo("huggingface.co", 443),
        lambda: HfApi(endpoint="https://huggingface.co").model_info("gpt2"),
        lambda: hf_hub_download("gpt2", "config.json", endpoint="http://192.0.2.1"),
    ):
        with pytest.raises(RuntimeError, match="Tests use no network"):
            attempt()
    assert set(no_network) == {"192.0.2.1", "huggingface.co"}
    no_network.clear()


def test_loopback_and_unix_sockets_are_allowed(tmp_path):
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=5).close()
    a, b = socket.socketpair()
    a.close(), b.close()
