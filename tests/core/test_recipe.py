"""Recipes: run, judged both ways, interrupted and gone on with, malformed ones refused."""

import csv
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from zoo.cli import main
from zoo.core import ZooError, catalogue, compare, recipe, results, tables
from zoo.core.catalogue import Entry

FACTS = """
class = "Line"
title = "A line"
authors = ["A. Author"]
year = 2026
summary = "Numbers in, a number out."
datamodule = "LineDataModule"
fidelity = "paper"
parameters = {paper = 5}
# ==== recipes ====
[recipes.default]
claim = "training lowers the loss"
seeds = [0, 1, 2]
budget = 1
model = {width = 8}
data = {batch_size = 11}
trainer = {max_steps = 30}
[recipes.default.arms.trained]
[recipes.default.arms.untrained]
fit = false
[recipes.default.arms.again]
from = "trained"
[[recipes.default.checks]]
left = "trained"
op = "<"
right = "untrained"
metric = "test/loss"
margin = MARGIN
relative = true
[[recipes.default.checks]]
left = "again"
op = "<"
right = 1e9
metric = "test/loss"
"""


@pytest.fixture
def method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`Line` of dummies.py as a method of the catalogue, with a margin of choice."""
    from . import dummies

    def install(margin: float, text: str = FACTS) -> None:
        toml = tmp_path / "line.toml"
        toml.write_text(text.replace("MARGIN", str(margin)))
        entry = Entry(toml, dummies.__name__)
        monkeypatch.setattr(catalogue, "entries", lambda: {"Line": entry})
        monkeypatch.setattr(catalogue, "datamodules", lambda: {"LineDataModule": dummies.__name__})

    return install


def test_a_claim_that_holds(method: Any, tmp_path: Path) -> None:
    method(0.1)
    outcome = recipe.reproduce("line", work=tmp_path / "work", accelerator="cpu")
    assert outcome["holds"] is True and outcome["seeds"] == [0, 1, 2]
    assert set(outcome["arms"]) == {"trained", "untrained", "again"}
    assert outcome["arms"]["trained"]["0"]["test/loss"] == outcome["arms"]["again"]["0"]["test/loss"]
    assert outcome["arms"]["trained"]["0"]["test/loss"] != outcome["arms"]["trained"]["1"]["test/loss"]
    assert outcome["checks"][0]["left_mean"] < outcome["checks"][0]["right_mean"]
    assert {"versions", "hardware", "seconds", "files", "recipe"} <= outcome.keys()
    assert "the claim holds" in recipe.report(outcome)


def test_a_claim_that_does_not_hold(method: Any, tmp_path: Path) -> None:
    method(0.999999)
    outcome = recipe.reproduce("Line", work=tmp_path / "work", accelerator="cpu")
    assert outcome["holds"] is False and "cause" in outcome
    assert "FAILS" in recipe.report(outcome) and "does not hold" in recipe.report(outcome)


def test_missing_arms_leave_the_claim_open(method: Any, tmp_path: Path) -> None:
    method(0.1)
    outcome = recipe.reproduce("Line", work=tmp_path, accelerator="cpu", arms=["untrained"], seeds=1)
    assert outcome["holds"] is None and outcome["seeds"] == [0]


def test_an_interrupted_run_goes_on(method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method(0.1)
    real, calls = recipe.run, []

    def stops(name: str, plan: Any, seed: int, *rest: Any) -> Any:
        calls.append(seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(name, plan, seed, *rest)

    monkeypatch.setattr(recipe, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        recipe.reproduce("Line", work=tmp_path, accelerator="cpu", arms=["trained"])
    recipe.reproduce("Line", work=tmp_path, accelerator="cpu", arms=["trained"])
    assert calls == [0, 1, 2, 2], "finished seeds are not run again"
    recipe.reproduce("Line", work=tmp_path, accelerator="cpu", arms=["trained"])
    assert calls[4:] == [0, 1, 2], "a finished recipe runs anew"


def test_one_seed_confirms_evidence_after_a_change(
    method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    method(0.1)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    file = results.path("Line")
    run = ["reproduce", "Line", "--accelerator", "cpu", "--work", str(tmp_path / "work")]
    assert main([*run, "--confirm"]) == 2
    assert "is not recorded: nothing to confirm" in capsys.readouterr().err
    assert main([*run, "--json", str(file)]) == 0
    whole = results.read("Line")
    monkeypatch.setattr(results, "fingerprint", lambda name: "after the change")
    assert results.is_stale("Line", whole)
    assert main([*run, "--confirm"]) == 0
    again = results.read("Line")
    assert not results.is_stale("Line", again)
    assert again["confirmed"]["seed"] == 0 and again["confirmed"]["largest_difference"] == 0.0
    assert {**again, "confirmed": None} == {**whole, "confirmed": None}
    assert "the same figures" in "\n".join(tables._claim("Line", again))

    whole["arms"]["trained"]["0"]["test/loss"] *= 1.001
    results.record(file, whole, drop=("confirmed",))
    capsys.readouterr()
    assert main([*run, "--confirm"]) == 2
    assert "trained, seed 0: test/loss was" in capsys.readouterr().err
    assert "confirmed" not in results.read("Line")
    assert main([*run, "--confirm", "--seeds", "2"]) == 2
    method(0.2)
    capsys.readouterr()
    assert main([*run, "--confirm"]) == 2
    assert "was recorded with another recipe" in capsys.readouterr().err


def test_methods_side_by_side(method: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method(0.1)
    run = ["compare", "Line", "narrow=line,width=4", "--output", str(tmp_path), "--seeds", "2", "--accelerator", "cpu"]
    options = ["--data.batch_size", "11", "--trainer.max_steps=5", "--model.width", "8"]
    assert main([*run, *options]) == 0
    out = capsys.readouterr().out
    with (tmp_path / "compare.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for m in ("Line", "narrow") for s in "01"]
    assert rows[0]["test/loss"] != rows[2]["test/loss"], "a method's own hyperparameters go before"
    assert out.splitlines()[-3].split()[:2] == ["method", "loss"] and "±" in out.splitlines()[-1]
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"
    before = (tmp_path / "compare.csv").read_text()
    assert main([*run, *options]) == 0
    assert (tmp_path / "compare.csv").read_text() == before, "what is done is not run again: the seconds are the same"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["Lin"], "No method 'Lin'. Did you mean 'Line'?"),
        (["Line,4"], "'4' is no key=value"),
        (["Line", "Line"], "Two methods are called 'Line'"),
        (["a=Lin,width=4"], "No method 'Lin'. Did you mean 'Line'?"),
        (["Line,wide=4"], "Line has no argument 'wide'. Did you mean 'width'?"),
        (["Line", "--data.batch", "4"], "LineDataModule has no argument 'batch'"),
        (["Line", "--model.depth", "4"], "No method here has a hyperparameter 'depth'"),
        ([], "Name methods to compare"),
        (["--family", "none"], "Name methods to compare"),
    ],
)
def test_comparisons_that_cannot_be(
    words: list[str], error: str, method: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method(0.1)
    assert main(["compare", *words, "--output", str(tmp_path)]) == 2
    assert error in capsys.readouterr().err


def test_methods_without_a_common_metric_are_drawn_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare.catalogue, "load_class", lambda name: types.SimpleNamespace(monitor=f"val/{name}"))
    for name in ("a", "b"):
        (tmp_path / name / "0" / "run").mkdir(parents=True)
        (tmp_path / name / "0" / "run" / "metrics.csv").write_text(f"step,val/{name}\n1,0.5\n2,0.7\n")
    compare._draw({"a": ("a", {}), "b": ("b", {})}, 1, tmp_path)
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"


def stage(folder: Path, seed: int) -> None:
    (folder / "seed").write_text(str(seed))


def test_a_stage_with_its_own_seed_is_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("stages")
    module.stage = stage  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stages", module)
    call = "stages:stage"
    shared = {recipe._prepare({"call": call, "seed": 7}, seed, tmp_path) for seed in (0, 1)}
    own = [recipe._prepare({"call": call}, seed, tmp_path) for seed in (0, 1)]
    assert [(f / "seed").read_text() for f in (*shared, *own)] == ["7", "0", "1"]


def test_processes_share_the_work_without_changing_it(extern: Path, tmp_path: Path) -> None:
    one = recipe.reproduce("Affine", work=tmp_path / "1", accelerator="cpu")
    two = recipe.reproduce("Affine", work=tmp_path / "2", accelerator="cpu", jobs=2)
    for arm, seeds in one["arms"].items():
        for seed, metrics in seeds.items():
            other = two["arms"][arm][seed]
            assert {k: v for k, v in metrics.items() if k != "seconds"} == {
                k: v for k, v in other.items() if k != "seconds"
            }


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("seeds = [0, 1, 2]", "seeds = [0]", "at least 3 seeds"),
        ('right = "untrained"', 'right = "nobody"', "names no arm"),
        ("budget = 1", "bugdet = 1", "'budget' is missing"),
        ("fit = false", "fitt = false", "unknown key 'fitt'. Did you mean 'fit'"),
    ],
)
def test_malformed_recipes_are_refused(method: Any, old: str, new: str, error: str) -> None:
    method(0.1, FACTS.replace(old, new))
    with pytest.raises(ZooError, match=error):
        recipe.recipe("Line")


def test_unknown_recipes_and_metrics_are_named(method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method(0.1, FACTS.replace("test/loss", "test/los"))
    with pytest.raises(ZooError, match="no recipe 'cora'. It has Line"):
        recipe.recipe("Line", "cora")
    with pytest.raises(ZooError, match="Did you mean 'test/loss'"):
        recipe.reproduce("Line", work=tmp_path, accelerator="cpu", seeds=1)


def test_margins() -> None:
    def judge(op: str, left: float, right: float, margin: float, relative: bool = False) -> bool:
        check = {"left": "a", "op": op, "right": right, "metric": "m", "margin": margin, "relative": relative}
        return recipe.judge(check, {"a": {"0": {"m": left - 1}, "1": {"m": left + 1}}})["holds"]

    assert judge(">", 10.3, 10, 0.2) and not judge(">", 10.1, 10, 0.2) and not judge(">", 10, 10, 0)
    assert judge("<", 9.7, 10, 0.2) and not judge("<", 9.9, 10, 0.2)
    assert judge(">", 11.1, 10, 0.1, True) and not judge(">", 10.9, 10, 0.1, True)
    assert judge("<", 8.9, 10, 0.1, True) and not judge("<", 9.1, 10, 0.1, True)
    assert not judge(">", 0.75, 0.7499999940395355, 0)  # a tie in float32


def test_records_keep_other_sections(tmp_path: Path) -> None:
    file = tmp_path / "Line.json"
    results.record(file, {"name": "Line", "parity": {"figures": {"forward": 1e-7}}})
    results.record(file, {"holds": True})
    assert results.read("Line", tmp_path) == {"name": "Line", "parity": {"figures": {"forward": 1e-7}}, "holds": True}


SOURCE = '''"""Docstring é."""

WIDTH = 3  # colour channels
"""What a user reads."""
PROMPT = f"""# no comment

{WIDTH}"""


class Line:
    """One."""; slope = "# no comment"  # noqa: E702

    def f(self):
        """Two,

        over lines.
        """
        return "é", 1  # one
'''


@pytest.mark.parametrize(
    ("old", "new", "kept"),
    [
        ("Docstring é", "Another ö\n\n#", True),
        ("What a user reads.", "x", True),
        ("  # colour channels", "", True),
        ("# one", "# two", True),
        ('"é", 1  #', '"é", 1 \n\n\n    #', True),
        ("over lines", "over more\n\n        lines", True),
        ("\n", "\r\n", True),
        ("WIDTH = 3", "WIDTH = 4", False),
        ('"# no comment"', '"# a comment"', False),
        ("# no comment\n\n", "# no comment\n", False),
        ('"é", 1', '"e", 1', False),
        ("        return", "        if self:\n            return", False),
    ],
)
def test_evidence_goes_stale_with_code_not_with_words(
    old: str, new: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "line.py"
    entry = catalogue.Entry(file.with_suffix(".toml"), "zoo.vision.family.line")
    monkeypatch.setattr(catalogue, "entry", lambda name: entry)
    file.with_suffix(".toml").write_text('class = "Line"\ndatamodule = "NoDataModule"\n')
    file.write_text(SOURCE, encoding="utf-8")
    before = results.fingerprint("Line")
    assert not results.is_stale("Line@set", {"files": before})
    assert old in SOURCE
    file.write_bytes(SOURCE.replace(old, new).encode())
    assert results.is_stale("Line@set", {"files": before}) != kept


def test_evidence_goes_stale_with_what_the_family_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = catalogue.Entry(tmp_path / "line.toml", "zoo.vision.family.line")
    monkeypatch.setattr(catalogue, "entry", lambda name: entry)
    entry.toml.write_text('class = "Line"\ndatamodule = "NoDataModule"\n')
    (tmp_path / "line.py").write_text("from zoo.vision.family.slopes import slope\n")
    (tmp_path / "slopes.py").write_text("from zoo.vision.family.line import x\nslope = 1\n")
    before = results.fingerprint("Line")
    (tmp_path / "slopes.py").write_text("from zoo.vision.family.line import x\nslope = 2\n")
    assert results.fingerprint("Line") != before


def test_evidence_goes_stale_with_shared_layers_and_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = catalogue.Entry(tmp_path / "vision" / "family" / "line.toml", "zoo.vision.family.line")
    monkeypatch.setattr(catalogue, "entry", lambda name: entry)
    monkeypatch.setattr(catalogue, "ROOT", tmp_path)
    for folder in ("vision/family", "engines/rounds", "nn"):
        (tmp_path / folder).mkdir(parents=True)
    entry.toml.write_text('class = "Line"\ndatamodule = "NoDataModule"\n')
    entry.toml.with_suffix(".py").write_text("from zoo.engines.rounds import clients\nfrom zoo.core import ZooModule\n")
    (tmp_path / "engines/rounds/__init__.py").write_text("from zoo.engines.rounds.clients import clients\n")
    (tmp_path / "engines/rounds/clients.py").write_text("from zoo.nn.layers import layer\n")
    layer = tmp_path / "nn" / "layers.py"
    layer.write_text("layer = 1\n")
    before = results.fingerprint("Line")
    (tmp_path / "nn" / "others.py").write_text("other = 1\n")
    assert results.fingerprint("Line") == before
    layer.write_text("layer = 2\n")
    assert results.fingerprint("Line") != before


def test_evidence_goes_stale_with_its_recipe_not_with_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = catalogue.Entry(tmp_path / "line.toml", "zoo.vision.family.line")
    monkeypatch.setattr(catalogue, "entry", lambda name: entry)
    text = 'class = "Line"\ndatamodule = "NoDataModule"\n# ==== recipes ====\n[recipes.set]\nbudget = 1\n'
    entry.toml.write_text(text)
    (tmp_path / "line.py").write_text("slope = 1\n")
    evidence = {"files": results.fingerprint("Line"), "recipe": results.recipe_digest({"budget": 1})}
    for more, stale in (("", False), ('cause = "found later"\n', False), ("margin = 2\n", True)):
        entry.toml.write_text(text + more)
        entry = catalogue.Entry(entry.toml, entry.module)
        assert results.is_stale("Line@set", evidence) == stale


def test_bare_code_is_what_is_left_without_words() -> None:
    assert results.bare(SOURCE).split("\n") == [
        "WIDTH = 3",
        'PROMPT = f"""# no comment',
        "",
        '{WIDTH}"""',
        "class Line:",
        '    ; slope = "# no comment"',
        "    def f(self):",
        '        return "é", 1',
    ]


def test_results_are_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "is_stale", lambda label, evidence: label == "Line@far")
    check = {"left": "ours", "op": ">", "right": "plain", "metric": "test/psnr", "margin": 0.1, "relative": False}
    arms = {"ours": {"0": {"test/psnr": 31.0}, "1": {"test/psnr": 33.0}}, "plain": {"0": {"test/psnr": 30.0}}}
    found = {"claim": "Ours derains better.", "paper": "31 dB", "comparable": False, "seeds": [0, 1], "arms": arms}
    lines = tables._claim("Line@far", {**found, "holds": False, "checks": [{**check, "holds": False}], "cause": "rain"})
    assert "| ours | 32.0000 ± 1.4142 |" in lines and "| plain | 30.0000 |" in lines
    assert "Paper (other data or size): 31 dB" in lines and "Cause: rain" in lines
    assert "- fails: ours > plain by 0.1 in test/psnr" in lines
    assert any(line.startswith("The claim does not hold.") and "Stale" in line for line in lines)
    parity = {"figures": {"net.forward": 1e-7, "big.forward": 3e-7, "step_float64": 1e-14}, "authors": "https://x"}
    assert "forward 3.0e-07, step (float64) 1.0e-14." in tables._parity("Line", parity)[0]
