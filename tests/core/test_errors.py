"""What a user can do wrong, or the machine can do to him, ends in one clear line, and nothing is lost."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.cli import main
from zoo.core import ZooError, catalogue

SMALL = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test runs in an empty folder: default outputs land there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command, which must fail with status 2 and one line; returns it."""

    def run(*arguments: str | Path) -> str:
        capsys.readouterr()
        status = main([str(a) for a in arguments])
        output = capsys.readouterr()
        errors = [line for line in output.err.splitlines() if line.startswith("zoo: error: ")]
        assert status == 2 and len(errors) == 1, output.err
        assert output.err.rstrip().endswith(errors[0])  # the last word, with no line after it
        assert "Traceback" not in output.err and "usage:" not in output.err + output.out
        assert 20 < len(errors[0]) < 600
        return errors[0]

    return run


def fit(*more: str | Path, epochs: int = 1) -> int:
    return main(["fit", "Affine", *SMALL, "--trainer.max_epochs", str(epochs), *map(str, more)])


def weights(path: str | Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


# ---- names and options -----------------------------------------------------------------------------------------------


def test_wrong_method_name_gives_the_nearest(Affine, fails):
    for verb, *rest in (
        ["fit"],
        ["info"],
        ["test", "--ckpt_path", "x"],
        ["predict", "--ckpt_path", "x", "--input", ".", "--output", "o"],
        ["reproduce"],
        ["convert", "a", "b"],
        ["export", "a", "b", "--format", "onnx"],
    ):
        assert "No method 'Afine'. Did you mean 'Affine'?" in fails(verb, "Afine", *rest)
    assert "Did you mean" not in fails("info", "Xyzzy9")


def test_a_class_that_is_not_beside_the_method(Affine, fails):
    line = fails("compare", "Affine:Afine", "--output", "o")
    assert "Affine's file has no class 'Afine'. Did you mean 'Affine'?" in line


def test_sizes_that_the_embedded_set_does_not_fit_name_the_small_variant(fails):
    line = fails("fit", "GLLCM", *SMALL)
    assert "multiple of 256" in line and "--data.root, or --variant tiny" in line
    assert "--variant tiny" not in fails("fit", "GLLCM", *SMALL, "--model.lr", "-1")


def test_wrong_name_on_import_gives_the_nearest():
    name = catalogue.names("vision")[0]
    with pytest.raises(ImportError, match=f"Did you mean '{name}'"):
        exec(f"from zoo.vision import {name}s")


def test_wrong_verb_gives_the_nearest(fails):
    assert "Did you mean 'predict'?" in fails("predct", "Affine")
    assert "needs a method's name" in fails("fit")
    assert "needs a method's name" in fails("fit", "--model.width", "3")


@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        (["--model.widht", "3"], "--model.width|model.width"),
        (["--data.batchsize", "3"], "data.batch_size"),
        (["--trainer.max_epoch", "3"], "trainer.max_epochs"),
        (["--model.width", "wide"], "width"),
        (["--model.scales", "7"], "scales"),
        (["--model.width", "-3"], "width is -3"),
        (["--data.batch_size", "0"], "batch_size is 0"),
        (["--trainer.accelerator", "quantum"], "quantum"),
        (["--variant", "huge"], "tiny"),
        (["--variant"], "--variant needs a value"),
        (["--ckpt_path", "missing.ckpt"], "missing.ckpt does not exist"),
        (["--from", "missing"], "missing is neither a folder nor a repository"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_wrong_options_of_fit(Affine, fails, option, nearest):
    line = fails("fit", "Affine", *SMALL, *option)
    assert any(part in line for part in nearest.split("|")), line


def test_wrong_options_of_the_other_verbs(Affine, fails):
    assert "needs --ckpt_path" in fails("test", "Affine", *SMALL)
    assert "--ckpt_path" in fails("predict", "Affine", "--input", ".", "--output", "o")
    arguments = ("predict", "Affine", "--ckpt_path", "x", "--input", ".", "--output", "o")
    assert "--speed" in fails(*arguments, "--speed", "9")
    assert "--format" in fails("export", "Affine", "x", "o", "--format", "coreml")
    assert "--domain" in fails("list", "--domain", "visoin")
    assert "nofamily" in fails("list", "--family", "nofamily")
    assert "no recipe" in fails("reproduce", "Affine@atlantis").lower()


def test_traceback_on_request(Affine):
    with pytest.raises(ZooError, match="does not exist"):
        fit("--ckpt_path", "missing.ckpt", "--traceback")


# ---- data ------------------------------------------------------------------------------------------------------------


def points(folder: Path, text: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    rows = [",".join(map(str, [*(i * 0.1 + j for j in range(8)), i % 3])) for i in range(16)]
    (folder / "points.csv").write_text(text or "\n".join(rows))
    return folder


def test_missing_or_broken_data_root(Affine, fails, tmp_path):
    line = fails("fit", "Affine", *SMALL, "--data.root", "nowhere")
    assert "nowhere is not a folder" in line and "points.csv" in line
    (tmp_path / "file").write_text("x")
    assert "not a folder" in fails("fit", "Affine", *SMALL, "--data.root", "file")
    (tmp_path / "empty").mkdir()
    line = fails("fit", "Affine", *SMALL, "--data.root", "empty")
    assert "empty/points.csv is missing: expected a row a point" in line and "Make your own" in line
    points(tmp_path / "broken", "1,2\nx,y")
    assert "points.csv cannot be read" in fails("fit", "Affine", *SMALL, "--data.root", "broken")
    (tmp_path / "odd" / "points.csv").mkdir(parents=True)
    assert "points.csv" in fails("fit", "Affine", *SMALL, "--data.root", "odd")
    assert not (tmp_path / "runs").exists()  # nothing was begun


def test_data_root_that_may_not_be_read(Affine, tmp_path):
    root = points(tmp_path / "root")
    assert fit("--data.root", str(root)) == 0
    outcome = as_nobody(lambda: fit("--data.root", str(root), "--trainer.default_root_dir", "/nonexistent"), root)
    assert outcome[0] == 2 and "points.csv" in outcome[1] and "Permission denied" in outcome[1], outcome


def test_data_that_does_not_fit_the_model(Affine, fails):
    assert fails("fit", "Affine", *SMALL, "--model.width", "5")  # points of 8 features


def test_nan_in_a_batch_is_named(Affine, fails, tmp_path):
    good = points(tmp_path / "root")
    assert fit("--data.root", good) == 0
    bad = points(tmp_path / "bad", (good / "points.csv").read_text().replace("3.1", "nan").replace("4.1", "inf"))
    line = fails("fit", "Affine", *SMALL, "--data.root", bad, "--trainer.num_sanity_val_steps", "0")
    assert "'x' holds" in line and "NaN or infinite" in line
    last = "runs/Affine.1/checkpoints/last.ckpt"  # the first run, moved aside by the second
    assert "'x' holds" in fails("test", "Affine", *SMALL, "--data.root", bad, "--ckpt_path", last)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("nan,1,1,1,1,1,1,1")
    line = fails("predict", "Affine", "--ckpt_path", last, "--input", "in", "--output", "out", "--device", "cpu")
    assert "'x' holds 1 values" in line and not (tmp_path / "out" / "labels.csv").exists()


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(Affine) -> Path:
    assert fit() == 0
    return Path("runs/Affine/checkpoints/last.ckpt").resolve()


def test_checkpoint_that_is_missing_or_broken(Affine, trained, fails, tmp_path):
    data = trained.read_bytes()
    broken = {
        "empty.ckpt": b"",
        "half.ckpt": data[: len(data) // 2],
        "text.ckpt": b"hello",
        "odd.ckpt": b"\x80\x04K\x01.",
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        assert f"{name} cannot be read" in fails("test", "Affine", *SMALL, "--ckpt_path", name)
        assert f"{name} cannot be read" in fails("fit", "Affine", *SMALL, "--ckpt_path", name)
    assert "none.ckpt does not exist" in fails("validate", "Affine", *SMALL, "--ckpt_path", "none.ckpt")
    (tmp_path / "folder").mkdir()
    assert "config.json" in fails("test", "Affine", *SMALL, "--ckpt_path", "folder")
    torch.save({"state_dict": {}}, "foreign.ckpt")
    assert "was not written by the zoo" in fails("test", "Affine", *SMALL, "--ckpt_path", "foreign.ckpt")
    assert "foreign.ckpt holds no run to go on" in fails("fit", "Affine", *SMALL, "--ckpt_path", "foreign.ckpt")
    assert trained.read_bytes() == data  # none of this moved the run that is there


def test_checkpoint_of_another_method(Affine, trained, fails, tmp_path):
    content = torch.load(trained, weights_only=True)
    content["zoo"]["class"] = "Regformer"
    torch.save(content, "other.ckpt")
    for verb in ("test", "fit"):
        assert "holds Regformer, not Affine" in fails(verb, "Affine", *SMALL, "--ckpt_path", "other.ckpt")
    folder = Affine().save_pretrained("folder")
    config = json.loads((folder / "config.json").read_text()) | {"class": "Regformer"}
    (folder / "config.json").write_text(json.dumps(config))
    for option in ("--ckpt_path", "--from"):
        verb = "test" if option == "--ckpt_path" else "fit"
        assert "holds Regformer, not Affine" in fails(verb, "Affine", *SMALL, option, "folder")


def test_checkpoint_of_another_size(Affine, trained, fails):
    line = fails("fit", "Affine", *SMALL, "--model.depth", "3", "--ckpt_path", trained)
    assert "do not fit this model" in line and "layers.2" in line
    Affine(depth=3).save_pretrained("deep")
    line = fails("fit", "Affine", *SMALL, "--model.depth", "5", "--from", "deep")
    assert "do not fit this model" in line
    (Path("deep") / "model.safetensors").write_bytes(b"")
    assert "is not the file that config.json was saved with" in fails("test", "Affine", *SMALL, "--ckpt_path", "deep")


def test_last_with_nothing_there_is_an_error(Affine, fails, tmp_path):
    line = fails("fit", "Affine", *SMALL, "--ckpt_path", "last")
    assert "Nothing to resume" in line and "last.ckpt does not exist" in line
    assert not list(tmp_path.rglob("*.ckpt"))


# ---- places to write to ----------------------------------------------------------------------------------------------


def as_nobody(action: Callable[[], Any], private: Path | None = None) -> tuple[int, str]:
    """Run ``action`` in a forked process without root's rights; its exit status and what it wrote to stderr."""
    if os.getuid() == 0:
        for parent in (Path.cwd(), *Path.cwd().parents):
            if parent != Path("/") and not parent.stat().st_mode & 0o001:
                parent.chmod(parent.stat().st_mode | 0o011)
    if private is not None:
        for path in (*private.rglob("*"), private):
            path.chmod(0o700 if path.is_dir() else 0o000)
        private.chmod(0o755)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.dup2(writer, 2)
            sys.stderr = os.fdopen(2, "w")
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            status = action()
        except BaseException:
            sys.stderr.write(traceback.format_exc())
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def test_output_that_may_not_be_written(Affine, trained, tmp_path):
    """Found out before the training, not after it."""
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(0o555)
    (tmp_path / "data.csv").write_text("1,1,1,1,1,1,1,1")
    status, text = as_nobody(lambda: fit("--trainer.default_root_dir", "closed/run"))
    assert status == 2 and "Cannot write to closed/run: Permission denied" in text and "Traceback" not in text, text
    predict = ["predict", "Affine", "--ckpt_path", str(trained), "--input", "data.csv", "--device", "cpu", "--output"]
    assert main([*predict, "out"]) == 0
    status, text = as_nobody(lambda: main([*predict, "closed/out"]))
    assert status == 2 and "closed/out" in text and "Permission denied" in text and "Traceback" not in text, text
    assert not list((tmp_path / "closed").iterdir())


def test_output_where_a_file_stands(Affine, trained, fails, tmp_path):
    (tmp_path / "mine").write_text("mine")
    assert "Cannot write" in fails("fit", "Affine", *SMALL, "--trainer.default_root_dir", "mine/run")
    assert "Cannot write" in fails("fit", "Affine", *SMALL, "--trainer.default_root_dir", "mine")
    (tmp_path / "data.csv").write_text("1,1,1,1,1,1,1,1")
    predict = ("predict", "Affine", "--ckpt_path", trained, "--input", "data.csv", "--device", "cpu", "--output")
    assert "Cannot write" in fails(*predict, "mine/out")
    assert (tmp_path / "mine").read_text() == "mine"


def test_disk_full_while_training(Affine, trained, tmp_path):
    """A refusal of the operating system in the middle of a checkpoint: the one before it stands."""
    before = trained.read_bytes()

    def go_on() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        return fit("--ckpt_path", "last", epochs=3)

    status, text = in_child(go_on)
    assert status == 2 and "Cannot write" in text and "too large" in text and "Traceback" not in text, text
    assert trained.read_bytes() == before
    assert fit("--ckpt_path", "last", epochs=3) == 0


def test_full_disk_that_is_not_the_temporary_folders(Affine, small_disk):
    """Another file system than /tmp: nothing may be copied over the checkpoint that stands there."""
    run = ["--trainer.default_root_dir", str(small_disk / "run"), "--model.width", "8"]
    assert fit(*run) == 0
    folder = small_disk / "run" / "checkpoints"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), open(filler, "wb") as stream:
        while True:
            stream.write(b"0" * 512)
            stream.flush()
    os.truncate(filler, filler.stat().st_size - 8192)  # room for half a checkpoint
    status, text = in_child(lambda: fit(*run, "--ckpt_path", "last", epochs=3))
    assert status == 2 and "Cannot write" in text and "No space left" in text and "Traceback" not in text, text
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    filler.unlink()
    assert fit(*run, "--ckpt_path", "last", epochs=3) == 0


def in_child(action: Callable[[], int]) -> tuple[int, str]:
    """As `as_nobody`, but as whoever runs the tests."""
    original, os.getuid = os.getuid, lambda: -1
    try:
        return as_nobody(action)
    finally:
        os.getuid = original


# ---- files of the user's ---------------------------------------------------------------------------------------------


def test_predicting_goes_on_past_a_broken_file_and_names_it(Affine, trained, capsys, caplog, tmp_path):
    (tmp_path / "in").mkdir()
    for name, text in {"a": "1,1,1,1,1,1,1,1", "b": "no numbers", "c": "2,2,2,2,2,2,2,2"}.items():
        (tmp_path / "in" / f"{name}.csv").write_text(text)
    predict = ["predict", "Affine", "--ckpt_path", str(trained), "--input", "in", "--output", "out", "--device", "cpu"]
    assert main(predict) == 0
    assert [line.split(",")[0] for line in (tmp_path / "out" / "labels.csv").read_text().splitlines()] == ["a", "c"]
    assert "b.csv" in caplog.text + capsys.readouterr().err


def test_predicting_on_nothing_readable(Affine, trained, fails, tmp_path):
    predict = ("predict", "Affine", "--ckpt_path", trained, "--output", "out", "--device", "cpu", "--input")
    assert "nothing does not exist" in fails(*predict, "nothing")
    (tmp_path / "in").mkdir()
    assert "Nothing readable in in" in fails(*predict, "in")
    (tmp_path / "in" / "b.csv").write_bytes(b"\xff\x00")
    line = fails(*predict, "in")
    assert "Nothing readable in in" in line and "b.csv" in line
    assert not (tmp_path / "out").exists()


def test_converting_what_cannot_be_converted(Affine, fails, tmp_path):
    assert "does not exist" in fails("convert", "Affine", "none.pth", "out")
    (tmp_path / "text.pth").write_text("hello")
    assert "text.pth cannot be read" in fails("convert", "Affine", "text.pth", "out")
    torch.save({"a": torch.zeros(1)}, "fine.pth")
    assert "knows no authors' checkpoint" in fails("convert", "Affine", "fine.pth", "out")
    assert not (tmp_path / "out").exists()


# ---- interruptions ---------------------------------------------------------------------------------------------------

RUN = """
import sys
from zoo.core.trainer import BestAndLast
BestAndLast.SAVE_EVERY = float(sys.argv[1])
from zoo.cli import main
sys.exit(main(sys.argv[2:]))
"""
LONG = ["fit", "Affine", *SMALL, "--trainer.max_epochs", "6", "--trainer.default_root_dir"]


def start(save_every: float, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(save_every), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not what():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.005)


def last(run: str) -> Path:
    return Path(run) / "checkpoints" / "last.ckpt"


def test_killed_in_mid_training_and_resumed_equals_an_unbroken_run(Affine):
    assert main([*LONG, "whole"]) == 0
    process = start(0, *LONG, "broken", "--data.pause", "0.02")  # a checkpoint after every step
    wait_for(lambda: last("broken").exists(), process)
    first = last("broken").stat().st_mtime_ns
    wait_for(lambda: last("broken").stat().st_mtime_ns != first, process)
    time.sleep(0.5)  # a few steps, and not at a step's end
    process.kill()
    assert process.wait(30) == -signal.SIGKILL
    process.stdout.close()
    content = torch.load(last("broken"), weights_only=True)
    assert 0 < content["global_step"] < 24
    assert not same(weights(last("broken")), weights(last("whole")))
    assert main([*LONG, "broken", "--ckpt_path", "last"]) == 0
    assert same(weights(last("broken")), weights(last("whole")))
    assert torch.load(last("broken"), weights_only=True)["global_step"] == 24


@pytest.mark.parametrize(
    "sign", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=["ctrl-c", "sigterm"]
)
def test_interrupted_training_saves_and_can_be_resumed(Affine, sign):
    assert main([*LONG, "whole"]) == 0
    process = start(600, *LONG, "broken", "--data.pause", "0.1")  # 0.8 s a step, 4 steps an epoch
    wait_for(lambda: last("broken").exists(), process)  # the first step saves; the next would be the epoch's end
    time.sleep(1)
    process.send_signal(sign)
    text, _ = process.communicate(timeout=60)
    assert process.returncode not in (0, -sign), text
    assert "Traceback" not in text, text
    content = torch.load(last("broken"), weights_only=True)
    assert 1 < content["global_step"] < 4
    assert main([*LONG, "broken", "--ckpt_path", "last"]) == 0
    assert same(weights(last("broken")), weights(last("whole")))


def test_a_fresh_run_does_not_overwrite_an_earlier_one(Affine, trained):
    before = trained.read_bytes()
    assert fit() == 0
    assert Path("runs/Affine.1/checkpoints/last.ckpt").read_bytes() == before
    shutil.rmtree("runs")
