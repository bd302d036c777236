"""The command, in this process: what it prints, writes and returns."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zoo import cli
from zoo.core import catalogue


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Pictures as people have them: odd sizes, grey, one broken."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (37, 51, 3), np.uint8)).save(folder / "odd.png")
    Image.fromarray(rng.integers(0, 255, (40, 64), np.uint8)).save(folder / "grey.jpg")
    (folder / "broken.png").write_bytes((folder / "odd.png").read_bytes()[:200])
    return folder


def test_list_and_info(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "list")
    assert code == 0 and all(name in out for name in catalogue.names())
    code, out, _ = run(capsys, "list", "--domain", "vision", "--json")
    assert {row["domain"] for row in json.loads(out)} == {"vision"}
    for name in catalogue.names():
        code, out, _ = run(capsys, "info", name.lower())
        assert code == 0 and f"import {name}" in out and "zoo reproduce" in out
        code, out, _ = run(capsys, "info", name, "--json")
        assert json.loads(out)["class"] == name


def test_help_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys)[1] == cli.HELP == run(capsys, "--help")[1]
    for verb in (*cli.VERBS, *cli.TRAINING):
        code, out, err = run(capsys, verb, "--help")
        assert code == 0 and "usage" in out and not err, verb


def test_fit_resume_test_predict_export(capsys: pytest.CaptureFixture[str], photos: Path) -> None:
    run_dir, tail = photos.parent / "run", ["--variant", "tiny", "--trainer.accelerator", "cpu"]
    tail += ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", run_dir]
    code, out, err = run(capsys, "fit", "regformer", *tail, "--trainer.max_steps", 2)
    assert code == 0, err
    best = re.search(r"best checkpoint: (\S+)", out)[1]
    code, _, err = run(capsys, "fit", "Regformer", *tail, "--trainer.max_steps", 3, "--ckpt_path", "last")
    assert code == 0, err
    code, out, err = run(capsys, "test", "Regformer", *tail[2:], "--ckpt_path", best, "--data.batch_size", 20)
    assert code == 0 and "test/psnr" in out, err
    target = photos.parent / "derained"
    code, out, err = run(capsys, "predict", "Regformer", "--ckpt_path", best, "--input", photos, "--output", target)
    assert code == 0, err
    assert sorted(p.stem for p in target.iterdir()) == ["grey", "odd"]
    assert Image.open(next(target.glob("odd*"))).size == (51, 37)
    code, out, err = run(capsys, "export", "Regformer", best, photos.parent / "x.pt2", "--format", "torch_export")
    assert code == 0 and (photos.parent / "x.pt2").stat().st_size > 10_000, err


def test_predict_goes_on_where_it_stopped_and_compares(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, photos: Path
) -> None:
    from zoo.vision import Regformer

    checkpoint = Regformer.from_variant("tiny").save_pretrained(photos.parent / "ckpt")

    def predict(*options: str, target: str = "derained") -> tuple[list[str], str]:
        caplog.clear()
        how = ["--ckpt_path", checkpoint, "--input", photos, "--output", photos.parent / target, "--device", "cpu"]
        code, out, err = run(capsys, "predict", "Regformer", *how, *options)
        assert code == 0, err
        return [Path(line).name for line in out.splitlines()], caplog.text

    written, said = predict()
    assert written == ["grey.png", "odd.png"] and "broken.png" in said
    assert re.search(r"2 pictures in .* s, .* a second; 1 could not be read", said)
    assert Image.open(photos.parent / "derained/grey.png").mode == "L"
    (photos.parent / "derained/grey.png").unlink()
    written, said = predict()
    assert written == ["grey.png"] and "1 of 3 pictures are done already; --overwrite" in said
    assert predict()[0] == []
    assert predict("--overwrite")[0] == ["grey.png", "odd.png"]
    assert predict("--compare")[0] == ["grey.png", "grey_compare.png", "odd.png", "odd_compare.png"]
    assert Image.open(photos.parent / "derained/odd_compare.png").size == (2 * 51 + 4, 37)
    code, _, err = run(capsys, "predict", "Regformer", "--ckpt_path", checkpoint, "--input", photos, "--output", photos)
    assert code == 2 and "results need a folder of their own" in err


def test_fine_tune_from_a_folder_and_from_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from zoo.vision import Regformer

    Regformer.from_variant("tiny").save_pretrained(tmp_path / "ckpt")
    options = ["--trainer.max_steps", 1, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    options += ["--trainer.default_root_dir", tmp_path / "run", "--model.lr", "1e-4"]
    for start in (tmp_path / "ckpt", tmp_path / "run" / "checkpoints" / "last.ckpt"):  # of a repository's form; a run's
        code, _, err = run(capsys, "fit", "Regformer", "--from", start, *options)
        assert code == 0, err
    made = torch.load(start, weights_only=True)["zoo"]["hyperparameters"]
    assert made["lr"] == 1e-4


def test_reproduce_returns_the_verdict(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zoo.core import recipe

    made = {
        "name": "X", "claim": "c", "paper": "", "comparable": False, "checks": [], "arms": {"a": {}}, "seeds": [0],
        "seconds": 1.0, "cause": "the cause",
    }  # fmt: skip
    monkeypatch.setattr(recipe, "reproduce", lambda *a, **k: {**made, "holds": False})
    code, out, _ = run(capsys, "reproduce", "AttentionSVM", "--json", tmp_path / "x.json")
    assert code == 3 and "cause: the cause" in out and json.loads((tmp_path / "x.json").read_text())["holds"] is False
    monkeypatch.setattr(recipe, "reproduce", lambda *a, **k: {**made, "holds": True})
    assert run(capsys, "reproduce", "AttentionSVM")[0] == 0


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["ft", "X"], "No verb 'ft'. Did you mean 'fit'"),
        (["fit"], "needs a method's name"),
        (["fit", "Regfomer"], "Did you mean 'Regformer'"),
        (["fit", "Regformer", "--model.widht", "3"], "Did you mean 'model.width'"),
        (["fit", "Regformer", "--variant", "huge"], "no variant 'huge'"),
        (["fit", "LAGNN", "--variant", "tiny", "--model.num_classes", "9"], "num_classes is 9, but the data has 4"),
        (["fit", "Regformer", "--data.root", "/no/where"], "not a folder"),
        (["fit", "Regformer", "--from", "/no/where"], "neither a folder nor a repository"),
        (["test", "Regformer"], "needs --ckpt_path"),
        (["predict", "Regformer", "--input", "x"], "required: --ckpt_path, --output"),
        (["predict", "Regformer", "--ckpt_path", "a", "--input", "nope", "--output", "b"], "does not exist"),
        (["predict", "Regformer", "--ckpt_path", "a", "--input", ".", "--output", "b", "--foo"], "Unknown option"),
        (["demo", "Regformer"], "zoo demo Regformer needs --ckpt_path"),
        (["demo", "N2", "--variant", "tiny"], "methods that turn pictures into pictures; N2 is for"),
        (["reproduce", "Regformer@atlantis"], "no recipe 'atlantis'"),
        (["reproduce", "LAGNN@cora", "--seeds", "x"], "invalid int value"),
        (["convert", "Regformer", "nope.pth", "out"], "does not exist"),
        (["publish", "nope", "--repo-id", "a/b"], "not a folder"),
        (["export", "Regformer", "nope.ckpt", "x", "--format", "onnx"], "does not exist"),
        (["list", "--domain", "space"], "invalid choice"),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], argv: list[str], error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *argv)
    lines = [line for line in err.splitlines() if line.startswith("zoo: error:")]
    assert code == 2 and len(lines) == 1 and error in lines[0], (out, err)
    assert "Traceback" not in err and "usage" not in out + err


def test_traceback_on_request() -> None:
    with pytest.raises(Exception, match="No method"):
        cli.main(["info", "Nothing", "--traceback"])


def test_foreign_checkpoints_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import torch

    torch.save({"params": {"a.weight": torch.zeros(1)}}, tmp_path / "theirs.pth")
    code, _, err = run(capsys, "convert", "Regformer", tmp_path / "theirs.pth", tmp_path / "out")
    assert code == 2 and not (tmp_path / "out").exists() and len(err.strip().splitlines()) == 1, err
    (tmp_path / "evil.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    code, _, err = run(capsys, "convert", "Regformer", tmp_path / "evil.pth", tmp_path / "out")
    assert code == 2 and "tensors only" in err
