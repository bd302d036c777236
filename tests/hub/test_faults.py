"""Broken downloads, hostile repositories, full disks, killed processes: one clear error, and nothing lost."""

import json
import os
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import zoo.core
from zoo.cli import main
from zoo.core import ZooError

REPO = "acme/affine"


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the client try again at once; it waits up to 23 s in all."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def saved(model: Any, folder: Path, config: dict[str, Any] | None = None, **hyperparameters: Any) -> Path:
    """A checkpoint with its config changed after the fact, and as older ones without checksums in it."""
    model.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    del content["sha256"]
    content["hyperparameters"] |= hyperparameters
    (folder / "config.json").write_text(json.dumps(content | (config or {})))
    return folder


def refused(action: Any, match: str | None = None) -> str:
    """The message of the ZooError that ``action`` raises: one line that a person reads."""
    with pytest.raises(ZooError, match=match) as caught:
        action()
    message = str(caught.value)
    assert message.strip() and "\n" not in message and len(message) < 600, message
    return message


def command(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command prints on failing: exit status 2 and one line."""
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("zoo: error: "), lines
    return lines[0]


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


# ---- on the way ------------------------------------------------------------------------------------------------------


def test_download_cut_in_the_middle_is_resumed(Affine, hub, tmp_path, no_pause):
    chunk = constants.DOWNLOAD_CHUNK_SIZE  # the client keeps whole chunks only
    model = Affine(width=1700, depth=1)
    hub.load_folder(REPO, model.save_pretrained(tmp_path / "out"))
    assert len(hub.files(REPO)["model.safetensors"]) > chunk + 1000
    hub.cut("*.safetensors", after=chunk + 500)
    assert equal(Affine.from_pretrained(REPO), model)
    tries = [(r.range, r.status) for r in hub.requests if r.method == "GET" and r.path.endswith(".safetensors")]
    assert tries == [("", 200), (f"bytes={chunk}-", 206)]


def test_download_that_never_completes(Affine, hub, hf_home, no_pause):
    model = Affine()
    model.push_to_hub(REPO)
    hub.cut("*.safetensors", times=1000)
    refused(lambda: Affine.from_pretrained(REPO), "Fetching acme/affine failed")
    assert not list((hf_home / "hub").rglob("*.safetensors"))
    hub.heal()
    assert equal(Affine.from_pretrained(REPO), model)


@pytest.mark.parametrize("links", [True, False], ids=["symlinks", "no-symlinks"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_file_damaged_on_its_way_with_its_size_kept_is_refused(Affine, hub, monkeypatch, name, links):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", not links)
    model = Affine()
    model.push_to_hub(REPO)
    hub.corrupt(name)
    for _ in range(2):  # and it is not taken from the cache the second time
        refused(lambda: Affine.from_pretrained(REPO), f"{name} was damaged")
    hub.heal()
    assert equal(Affine.from_pretrained(REPO), model)
    assert equal(Affine.from_pretrained(REPO, local_files_only=True), model)


def test_file_damaged_in_the_cache_is_refused_and_fetched_again(Affine, hub, hf_home):
    model = Affine()
    model.push_to_hub(REPO)
    Affine.from_pretrained(REPO)
    blob = next((hf_home / "hub").rglob("model.safetensors")).resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(bytes(data))
    refused(lambda: Affine.from_pretrained(REPO), "damaged")
    assert equal(Affine.from_pretrained(REPO), model)


def test_hub_out_of_reach(Affine, hub, no_pause):
    Affine().push_to_hub(REPO)
    Affine.from_pretrained(REPO)
    with hub.down():
        Affine.from_pretrained(REPO)  # from the cache
        refused(lambda: Affine.from_pretrained("acme/other"), "acme/other is not in the cache, and the Hub cannot")
    refused(lambda: Affine.from_pretrained("acme/other", local_files_only=True), "not in the cache")
    hub.commit("acme/other", {"config.json": b"{}"})
    hub.fail(503)
    refused(lambda: Affine.from_pretrained("acme/other"))


def test_a_folder_and_a_file_have_no_revisions(Affine, tmp_path):
    folder = Affine().save_pretrained(tmp_path / "out")
    refused(lambda: Affine.from_pretrained(folder, revision="v1"), "has no revision 'v1'")
    torch.save({}, tmp_path / "run.ckpt")
    for load in (Affine.from_pretrained, zoo.core.load):
        refused(lambda load=load: load(tmp_path / "run.ckpt", revision="v1"), "is a file here and has no revision 'v1'")


def test_what_the_caller_changed_is_named_beside_the_config(tmp_path):
    """A wrong override is not laid to the checkpoint's own config alone."""
    from zoo.vision import Regformer

    folder = Regformer.from_variant("tiny").save_pretrained(tmp_path / "out")
    message = refused(lambda: Regformer.from_pretrained(folder, width=13), "with your width does not build Regformer")
    assert "width 13 must be even" in message


def test_a_file_that_is_no_checkpoint_says_why(Affine, tmp_path):
    (tmp_path / "text.ckpt").write_text("not a checkpoint\n")
    refused(lambda: Affine.from_pretrained(tmp_path / "text.ckpt"), "neither in torch's format nor in safetensors'")
    torch.save({"zoo": torch.zeros(9)}, tmp_path / "cut.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "cut.ckpt").read_bytes()[:200])
    refused(lambda: Affine.from_pretrained(tmp_path / "cut.ckpt"), "it is damaged")
    torch.save({"zoo": Path}, tmp_path / "code.ckpt")
    message = refused(lambda: Affine.from_pretrained(tmp_path / "code.ckpt"), r"asks for pathlib.*could run code")
    assert "weights_only" not in message  # no advice to run it


def test_no_such_repository(Affine, hub):
    refused(lambda: Affine.from_pretrained("acme/none"), "No repository acme/none")
    refused(lambda: Affine.from_pretrained("not-a-repository"), "neither a folder nor a repository")
    refused(lambda: Affine.from_pretrained("../../no/where"), "neither a folder nor a repository")
    refused(lambda: Affine.from_pretrained("/etc/passwd"), "cannot be read as tensors only")
    hub.commit("acme/empty", {})
    refused(lambda: Affine.from_pretrained("acme/empty"), r"config\.json|model\.safetensors")


# ---- pickles ---------------------------------------------------------------------------------------------------------


def test_repository_that_offers_only_a_pickle(Affine, hub, tmp_path):
    marker = tmp_path / "marker"
    config = json.loads((saved(Affine(), tmp_path / "out") / "config.json").read_text())
    hub.pickle_only(REPO, config, marker)
    message = refused(lambda: Affine.from_pretrained(REPO), "only pytorch_model.bin")
    assert "pickle" in message and not marker.exists()
    assert not [r for r in hub.requests if r.method == "GET" and r.path.endswith(".bin")]
    refused(lambda: zoo.core.load(REPO), "pickle")
    refused(lambda: Affine.from_pretrained(REPO, local_files_only=True), r"model\.safetensors")


def test_folder_that_holds_only_a_pickle(Affine, hub, tmp_path):
    marker = tmp_path / "marker"
    hub.pickle_only(REPO, {}, marker)
    folder = saved(Affine(), tmp_path / "out")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(hub.files(REPO)["pytorch_model.bin"])
    refused(lambda: Affine.from_pretrained(folder), "pytorch_model.bin: a pickle")
    shutil.copy(folder / "pytorch_model.bin", folder / "model.safetensors")  # a pickle under a safe name
    refused(lambda: Affine.from_pretrained(folder), "not a readable safetensors file")
    assert not marker.exists()


def test_checkpoint_file_with_code_in_it(Affine, hub, tmp_path, capsys):
    """`.ckpt` files are torch's format: read as tensors only."""
    marker = tmp_path / "marker"
    hub.pickle_only(REPO, {}, marker)
    (tmp_path / "evil.ckpt").write_bytes(hub.files(REPO)["pytorch_model.bin"])

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(marker), "w")

    torch.save({"state_dict": {}, "zoo": Payload()}, tmp_path / "zip.ckpt")
    for name in ("evil.ckpt", "zip.ckpt"):
        (tmp_path / "in").mkdir(exist_ok=True)
        arguments = ("predict", "Affine", "--ckpt_path", str(tmp_path / name), "--input", str(tmp_path / "in"))
        assert "tensors only" in command(*arguments, "--output", str(tmp_path / "o"), capsys=capsys)
        run = ("--trainer.default_root_dir", str(tmp_path / "run"), "--ckpt_path", str(tmp_path / name))
        assert f"{name} cannot be read" in command("fit", "Affine", *run, capsys=capsys)
    assert not marker.exists()


# ---- hostile configs -------------------------------------------------------------------------------------------------

DEEP = "[" * 100_000 + "]" * 100_000
HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "depth": {"depth": 10**9},
    "width": {"width": 10**9},
    "both": {"depth": 10**9, "width": 10**9},
    "beyond-64-bits": {"width": 10**30},
    "not-saved-buffer": {"length": 10**9},
    "not-saved-buffer-beyond-memory": {"length": 10**14},
    "negative": {"width": -1},
    "zero": {"depth": 0},
    "string-for-int": {"width": "8"},
    "code": {"width": "__import__('os').system('touch pwned')"},
    "code-as-name": {"act": "__import__('os').system('touch pwned')"},
    "float-for-int": {"width": 8.5},
    "bool-for-int": {"depth": True},
    "none-for-int": {"width": None},
    "list-for-int": {"width": [8]},
    "dict-for-int": {"width": {"$ref": "os.system"}},
    "nested-code": {"scales": [["__class__"], {"!!python/object": "os.system"}]},
    "strings-for-floats": {"scales": ["1.0"]},
    "unknown": {"heads": 4},
    "dunder": {"__class__": "Regformer"},
    "self": {"self": 1},
    "cls": {"cls": 1},
    "other-size": {"width": 16},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "newer": {"format_version": 2},
    "much-newer": {"format_version": 10**9},
    "version-as-text": {"format_version": "1"},
    "version-zero": {"format_version": 0},
    "version-none": {"format_version": None},
    "version-true": {"format_version": True},
    "other-class": {"class": "Regformer"},
    "no-class": {"class": None},
    "path-as-class": {"class": "../../evil"},
    "function-as-class": {"class": "os.system"},
    "list-of-hyperparameters": {"hyperparameters": [1, 2]},
    "no-hyperparameters": {"hyperparameters": None},
    "list-of-checksums": {"sha256": ["model.safetensors"]},
    "checksum-of-none": {"sha256": {"model.safetensors": None}},
    "checksums-elsewhere": {"sha256": {"../out/README.md": "0" * 64}},
    "checksums-anywhere": {"sha256": {"/etc/passwd": "0" * 64}},
}
TEXTS: dict[str, bytes] = {
    "empty": b"",
    "not-json": b"width: 8",
    "list": b"[]",
    "number": b"1",
    "null": b"null",
    "object": b"{}",
    "binary": bytes(range(256)),
    "deep": DEEP.encode(),
    "deep-hyperparameter": b'{"format_version": 1, "class": "Affine", "hyperparameters": {"act": %s}}' % DEEP.encode(),
    "not-a-number": b'{"format_version": 1, "class": "Affine", "hyperparameters": {"lr": NaN}}',
    "infinite": b'{"format_version": 1, "class": "Affine", "hyperparameters": {"lr": Infinity}}',
    "huge-number": b'{"format_version": 1, "class": "Affine", "hyperparameters": {"width": 1%s}}' % (b"0" * 10_000),
    "surrogate": b'{"format_version": 1, "class": "\\ud800", "hyperparameters": {}}',
}


@pytest.fixture
def lean() -> Iterator[None]:
    """The test must not need more than 500 MB on top of what was used at its peak before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB on Linux


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_hostile_hyperparameters_are_refused(Affine, lean, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = saved(Affine(), tmp_path / "out", **HYPERPARAMETERS[name])
    refused(lambda: Affine.from_pretrained(folder))
    refused(lambda: zoo.core.load(folder))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_configs_are_refused(Affine, lean, tmp_path, name):
    folder = saved(Affine(), tmp_path / "out", CONFIGS[name])
    message = refused(lambda: Affine.from_pretrained(folder))
    if "newer" in name:
        assert "pip install -U" in message
    if name != "other-class":
        refused(lambda: zoo.core.load(folder))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", TEXTS)
def test_config_that_is_no_config_is_refused(Affine, lean, tmp_path, name):
    folder = saved(Affine(), tmp_path / "out")
    (folder / "config.json").write_bytes(TEXTS[name])
    refused(lambda: Affine.from_pretrained(folder))
    refused(lambda: zoo.core.load(folder))


def test_missing_config_and_other_things_in_its_place(Affine, tmp_path):
    folder = saved(Affine(), tmp_path / "out")
    (folder / "config.json").unlink()
    refused(lambda: Affine.from_pretrained(folder), "no config.json")
    (folder / "config.json").mkdir()
    refused(lambda: Affine.from_pretrained(folder), "no config.json")


def test_hostile_config_from_the_hub(Affine, hub, lean, tmp_path):
    hub.load_folder(REPO, saved(Affine(), tmp_path / "out", depth=10**9))
    refused(lambda: Affine.from_pretrained(REPO), "far more parameters than")


class Wrapped(zoo.core.ZooModule):
    """A head on a backbone that comes from the Hub by its id."""

    def __init__(self, backbone: str = "acme/backbone", width: int = 8, depth: int = 1):
        super().__init__()
        self.save_hyperparameters()
        self.backbone = torch.nn.Linear(4, 4)
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(depth)))


@pytest.mark.timeout(60)
def test_hostile_config_beside_a_backbone_of_the_hub(lean, tmp_path):
    """The size of such a backbone is not known before it is there; the rest must fit this machine."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    folder = saved(Wrapped(), tmp_path / "out")
    assert "backbone.weight" not in load_file(folder / "model.safetensors")
    Wrapped.from_pretrained(folder)
    for width in (int(memory**0.5), 10**9):
        saved(Wrapped(), folder, width=width)
        refused(lambda: Wrapped.from_pretrained(folder), "far more bytes|does not build")
    saved(Wrapped(), folder, depth=10**9, width=0)
    refused(lambda: Wrapped.from_pretrained(folder), "far more (parameters|modules)")


def test_config_of_an_older_save_may_lack_what_came_later(Affine, tmp_path):
    folder = saved(Affine(), tmp_path / "out")
    content = json.loads((folder / "config.json").read_text())
    del content["hyperparameters"]["lr"]
    (folder / "config.json").write_text(json.dumps(content))
    assert Affine.from_pretrained(folder).hyperparameters == Affine().hyperparameters


# ---- weights that do not fit -----------------------------------------------------------------------------------------


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    state = load_file(folder / "model.safetensors") | {k.replace("__", "."): v for k, v in tensors.items()}
    save_file({k: v for k, v in state.items() if v is not None}, folder / "model.safetensors")


def test_weights_with_missing_extra_or_misshapen_keys(Affine, tmp_path):
    folder = saved(Affine(), tmp_path / "out")
    change(folder, layers__0__weight=None)
    refused(lambda: Affine.from_pretrained(folder), r"1 missing \(layers\.0\.weight\)")
    change(folder, layers__0__weight=torch.zeros(8, 8), evil=torch.zeros(1))
    refused(lambda: Affine.from_pretrained(folder), r"1 unexpected \(evil\)")
    change(folder, evil=None, norm__bias=torch.zeros(9))
    refused(lambda: Affine.from_pretrained(folder), r"norm\.bias: \(9,\) given, \(8,\) expected")
    change(folder, norm__bias=torch.zeros(8))
    Affine.from_pretrained(folder)


def test_head_is_strict_without_an_override(Affine, tmp_path):
    folder = saved(Affine(), tmp_path / "out", num_classes=7)
    refused(lambda: Affine.from_pretrained(folder), "classifier")
    change(folder, classifier__bias=None)
    refused(lambda: Affine.from_pretrained(folder), "classifier")


def test_checkpoint_of_another_size_or_method(Affine, tmp_path):
    from safetensors.torch import save

    small, large = saved(Affine(width=4), tmp_path / "s"), saved(Affine(width=16), tmp_path / "l")
    shutil.copy(small / "model.safetensors", large / "model.safetensors")
    refused(lambda: Affine.from_pretrained(large), r"another shape.*\(4,\) given, \(16,\) expected")
    (large / "model.safetensors").write_bytes(save({"body.weight": torch.zeros(2)}))
    refused(lambda: Affine.from_pretrained(large), "missing")


def test_weights_file_that_is_broken(Affine, lean, tmp_path):
    folder = saved(Affine(), tmp_path / "out")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for data in (b"", whole[:5], whole[:100], whole[:-1], whole + b"more", b"\xff" * 64, (2**40).to_bytes(8, "little")):
        weights.write_bytes(data)
        refused(lambda: Affine.from_pretrained(folder), "not a readable safetensors file")
    weights.unlink()
    refused(lambda: Affine.from_pretrained(folder), r"has no model\.safetensors")


# ---- saving ----------------------------------------------------------------------------------------------------------


def in_child(action: Callable[[], Any]) -> tuple[int, str]:
    """Run ``action`` in a forked process; its exit status (negative: killed by a signal) and its error."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        text, status = "", 1
        try:
            action()
            status = 0
        except ZooError as error:
            text = f"ZooError: {error}"
        except BaseException:
            text = traceback.format_exc()
        finally:
            os.write(writer, text.encode())
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


@pytest.fixture
def large(Affine) -> torch.nn.Module:
    """1.4 MB of weights."""
    return Affine(width=600, depth=1)


def as_nobody() -> None:
    """Give up root's right to write anywhere."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def reachable(folder: Path) -> None:
    """Let another user through to ``folder``."""
    for parent in folder.parents:
        if parent != Path("/") and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def stays(folder: Path, before: dict[str, bytes], outcome: tuple[int, str], why: str) -> None:
    status, text = outcome
    assert status == 1 and text.startswith(f"ZooError: Cannot write {folder}") and why in text, text
    assert "\n" not in text and content(folder) == before
    assert [p for p in folder.parent.rglob("*") if p.name.startswith(".")] == []


def test_file_size_limit_while_saving(Affine, large, tmp_path):
    """The operating system's own refusal in the middle of writing, as on a full quota."""

    def save(folder: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        large.save_pretrained(folder)

    folder = Affine().save_pretrained(tmp_path / "out")
    before = content(folder)
    stays(folder, before, in_child(lambda: save(folder)), "too large")
    Affine.from_pretrained(folder)
    status, text = in_child(lambda: save(tmp_path / "new"))
    assert status == 1 and "Cannot write" in text and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_disk_full_while_saving(Affine, large, small_disk):
    for folder in (small_disk, small_disk / "out"):  # also right on the mount point
        Affine().save_pretrained(folder)
        before = content(folder)
        stays(folder, before, in_child(lambda folder=folder: large.save_pretrained(folder)), "No space left")
        Affine.from_pretrained(folder)


def test_saving_where_one_may_not_write(Affine, large, tmp_path):
    folder = Affine().save_pretrained(tmp_path / "out")
    before = content(folder)
    reachable(folder)

    def save() -> None:
        as_nobody()
        large.save_pretrained(folder)

    os.chmod(folder, 0o555)
    stays(folder, before, in_child(save), "Permission denied")
    os.chmod(folder, 0o755)


def test_saving_into_a_folder_whose_parent_may_not_be_written(Affine, large, tmp_path):
    """As with a folder mounted into a container: only the folder itself belongs to the user."""
    folder = tmp_path / "parent" / "out"
    folder.mkdir(parents=True)
    large.save_pretrained(tmp_path / "warm-up")  # imports, for the other user
    reachable(folder)
    folder.chmod(0o777)

    def save() -> None:
        as_nobody()
        large.save_pretrained(folder)

    os.chmod(folder.parent, 0o555)
    assert in_child(save) == (0, "")
    os.chmod(folder.parent, 0o755)
    assert content(folder) == content(tmp_path / "warm-up")
    assert (folder / "model.safetensors").stat().st_mode & 0o444 == 0o444


def test_saving_onto_a_file(Affine, tmp_path):
    (tmp_path / "out").write_text("mine")
    refused(lambda: Affine().save_pretrained(tmp_path / "out"), "Cannot write")
    refused(lambda: Affine().save_pretrained(tmp_path / "out" / "deeper"), "Cannot write")
    assert (tmp_path / "out").read_text() == "mine"


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("where", ["save_file", "half of save_file", "card", "fsync", "replace"])
@pytest.mark.parametrize("new", [False, True], ids=["over-an-old-one", "new"])
def test_killed_while_saving(Affine, large, tmp_path, where, new):
    """SIGKILL before the first file takes its name: what stood there before stands, a new folder does not appear."""

    def save() -> None:
        write = zoo.core.hub.save_file

        def half(state: Any, path: Path, **options: Any) -> None:
            write(state, path, **options)
            os.truncate(path, 1000)
            die()

        if where == "card":
            Affine.generate_model_card = die
        elif where in ("fsync", "replace"):
            os.fsync, os.rename = die if where == "fsync" else os.fsync, die
            os.replace = die
        else:
            zoo.core.hub.save_file = half if "half" in where else die
        large.save_pretrained(folder)

    folder = tmp_path / "out"
    before = {} if new else content(Affine().save_pretrained(folder))
    assert in_child(save) == (-signal.SIGKILL, "")
    if new:
        assert not folder.exists()
    else:
        assert {k: v for k, v in content(folder).items() if not k.startswith(".")} == before
        Affine.from_pretrained(folder)
    large.save_pretrained(folder)  # and the next save works
    assert equal(Affine.from_pretrained(folder), large)


def test_killed_between_two_files_of_a_save(Affine, tmp_path):
    """The new config with the old weights, of the same shapes: only the checksum tells."""
    folder = Affine(lr=0.1).save_pretrained(tmp_path / "out")
    before = content(folder)

    def save() -> None:
        replace = os.replace

        def until_the_weights(*paths: Any) -> None:
            if str(paths[0]).endswith(".safetensors"):
                die()
            replace(*paths)

        os.replace = until_the_weights
        Affine(lr=0.2).save_pretrained(folder)

    assert in_child(save) == (-signal.SIGKILL, "")
    now = {k: v for k, v in content(folder).items() if not k.startswith(".")}
    assert [k for k in before if before[k] == now[k]] == ["model.safetensors"]
    refused(lambda: Affine.from_pretrained(folder), "model.safetensors is not the file that config.json was saved with")
    model = Affine(lr=0.2)
    model.save_pretrained(folder)
    assert equal(Affine.from_pretrained(folder), model)


def test_extra_files_belong_to_the_save(Affine, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Affine, "save_extra", lambda self, folder: (folder / "vocab.txt").write_text("a b"), raising=False
    )
    folder = Affine().save_pretrained(tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["sha256"].keys() == {"model.safetensors", "vocab.txt"}
    Affine.from_pretrained(folder)
    (folder / "vocab.txt").write_text("b a")
    refused(lambda: Affine.from_pretrained(folder), "vocab.txt is not the file")
    (folder / "vocab.txt").unlink()
    refused(lambda: Affine.from_pretrained(folder), "vocab.txt is not the file")


# ---- publishing ------------------------------------------------------------------------------------------------------


def publish(folder: Path, capsys: pytest.CaptureFixture[str], repo: str = REPO) -> str:
    return command("publish", str(folder), "--repo-id", repo, capsys=capsys)


def test_publishing_without_the_right_to(Affine, hub, tmp_path, capsys, monkeypatch):
    folder = Affine().save_pretrained(tmp_path / "out")
    hub.deny_writes()
    assert "403" in publish(folder, capsys)
    hub.heal()
    monkeypatch.delenv("HF_TOKEN")
    assert "Uploading to acme/affine failed" in publish(folder, capsys)
    with pytest.raises(KeyError):
        hub.files(REPO)


def test_publishing_to_a_name_that_is_none(Affine, hub, tmp_path, capsys):
    folder = Affine().save_pretrained(tmp_path / "out")
    assert "a b/c" in publish(folder, capsys, "a b/c") and not hub.requests


def test_publishing_what_is_not_whole(Affine, hub, tmp_path, capsys):
    """Found before anything is sent."""
    assert "is not a folder" in publish(tmp_path / "none", capsys)
    folder = Affine().save_pretrained(tmp_path / "out")
    (folder / "README.md").write_text("# mine\n")
    assert "no complete model card" in publish(folder, capsys)
    (folder / "README.md").unlink()
    assert "no complete model card" in publish(folder, capsys)
    folder = saved(Affine(), tmp_path / "out2")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-4])
    assert "not a readable safetensors file" in publish(folder, capsys)
    folder = saved(Affine(), tmp_path / "out3", width=16)
    assert "do not fit" in publish(folder, capsys)
    assert not hub.requests


def test_publishing_while_the_hub_is_down(Affine, hub, tmp_path, capsys, no_pause):
    folder = Affine().save_pretrained(tmp_path / "out")
    with hub.down():
        assert "acme/affine" in publish(folder, capsys)


@pytest.mark.parametrize("step", ["api/preupload", "api/lfs", "api/commit"])
def test_upload_that_breaks_off_leaves_the_old_revision(Affine, hub, tmp_path, capsys, no_pause, step):
    """The commit is the last step: what arrived before it is invisible."""
    model = Affine()
    model.push_to_hub(REPO)
    old, files = hub.head(REPO), hub.files(REPO)
    folder = Affine().save_pretrained(tmp_path / "out")
    hub.fail(500, step)
    assert "Uploading to acme/affine failed" in publish(folder, capsys)
    assert hub.head(REPO) == old and hub.files(REPO) == files
    hub.heal()
    assert equal(Affine.from_pretrained(REPO), model)
    assert main(["publish", str(folder), "--repo-id", REPO]) == 0
    assert hub.head(REPO) != old
