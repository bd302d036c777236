"""The catalogue's facts against reality, for every method."""

import inspect
import json
import re
from fnmatch import fnmatch
from typing import Any

import pytest
import torch

from zoo.core import ZooDataModule, ZooModule, catalogue, results
from zoo.core.recipe import judge, recipe
from zoo.testing.contract.case import case, every_method, tensors

STRINGS = ("class", "title", "venue", "arxiv", "code", "code_licence", "summary", "task", "pipeline_tag", "datamodule")
CAPABILITIES = {"batch", "meta", "bf16", "compile", "export", "onnx", "ddp"}
LICENCES = {"MIT", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "GPL-3.0-only", "GPL-3.0-or-later", "AGPL-3.0-only"}
LICENCES |= {"CC-BY-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "LGPL-3.0-only", "MPL-2.0", "Unlicense", "none", ""}


@every_method
def test_facts_are_complete(name: str) -> None:
    facts = catalogue.facts(name)
    for key in STRINGS:
        assert isinstance(facts.get(key), str), f"'{key}' must be a string"
    assert facts["class"] == name and facts["title"] and facts["summary"].endswith(".")
    assert facts["authors"] and all(isinstance(a, str) and " " in a for a in facts["authors"])
    assert isinstance(facts["year"], int) and 1990 < facts["year"] < 2100
    assert facts["fidelity"] in ("parity", "paper", "reconstruction")
    assert not facts["arxiv"] or re.fullmatch(r"\d{4}\.\d{4,5}", facts["arxiv"])
    assert not facts["code"] or facts["code"].startswith("https://")
    assert facts["code_licence"] in LICENCES, f"{facts['code_licence']!r} is no SPDX identifier known here"
    assert facts["fidelity"] != "parity" or facts["code"], "parity needs public code"
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", facts["task"])
    assert facts["datasets"] and facts["metrics"]
    for checkpoint in facts.get("checkpoints", []):
        local = checkpoint["status"] == "local"
        assert local == ("repo" not in checkpoint) == ("revision" not in checkpoint)
        assert local or re.fullmatch(r"[0-9a-f]{40}", checkpoint["revision"])


@every_method
def test_capabilities_are_true_or_reasons(name: str) -> None:
    listed = catalogue.facts(name)["capabilities"]
    assert set(listed) == CAPABILITIES
    for flag, value in listed.items():
        assert value is True or (isinstance(value, str) and len(value) > 10), f"{flag}: true, or the reason why not"


@every_method
def test_class_and_data(name: str) -> None:
    one = case(name)
    assert issubclass(one.cls, ZooModule) and one.cls.__name__ == name
    assert issubclass(one.data_cls, ZooDataModule) and one.data_cls.__name__ == one.facts["datamodule"]
    assert one.cls.mode in ("min", "max") and one.cls.monitor.startswith("val/")
    assert "tiny" in one.cls.variants
    assert not any(path == "module" or path.endswith(".module") for path, _ in one.tiny().named_modules())


@every_method
def test_arguments_are_json_with_defaults_and_documented(name: str) -> None:
    one = case(name)
    for cls in (one.cls, one.data_cls):
        documented = "\n".join(
            inspect.getdoc(c) or "" for c in cls.__mro__ if issubclass(c, (ZooModule, ZooDataModule))
        )
        documented += inspect.getdoc(cls.__init__) or ""
        for key, parameter in inspect.signature(cls).parameters.items():
            assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD or parameter.kind is parameter.KEYWORD_ONLY
            assert parameter.default is not parameter.empty, f"{cls.__name__}({key}) has no default"
            assert parameter.annotation is not parameter.empty, f"{cls.__name__}({key}) has no type"
            assert json.loads(json.dumps(parameter.default)) == _listed(parameter.default)
            assert re.search(rf"\b{key}\b[^\n]*:", documented), f"{cls.__name__}: argument '{key}' is not documented"


def _listed(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_listed(v) for v in value]
    return {k: _listed(v) for k, v in value.items()} if isinstance(value, dict) else value


@every_method
def test_batches_are_documented(name: str) -> None:
    one = case(name)
    text = inspect.getdoc(one.data_cls) or ""
    batch = one.batch("train")
    for key in batch if isinstance(batch, dict) else tensors(batch):
        assert re.search(rf"\b{key}\b", text), f"{one.data_cls.__name__}: batch key '{key}' is not in the docstring"
    assert "root=None" in text and "root=DIR" in text


@every_method
def test_every_variant_has_the_stated_size(name: str) -> None:
    """Recounted on the meta device; a backbone that would come from the Hub is built from its listed config."""
    one = case(name)
    stated = one.facts["parameters"]
    assert {"paper", "tiny"} <= stated.keys() <= {"paper", *one.cls.variants}
    configs = [b["config"] for b in one.facts.get("backbones", []) if "config" in b]
    for variant, parameters in stated.items():
        values = one.cls.variant(variant)
        default = inspect.signature(one.cls).parameters.get("backbone")
        if default is not None and isinstance(values.get("backbone", default.default), str) and configs:
            values["backbone"] = configs[0]
        with torch.device("meta"):
            model = one.cls(**values)
        assert sum(p.numel() for p in model.parameters()) == parameters, variant


@every_method
def test_no_gradient_names_parameters(name: str) -> None:
    one = case(name)
    names = [n for n, _ in one.tiny().named_parameters()]
    for pattern, reason in one.facts.get("no_gradient", {}).items():
        assert len(reason) > 10, f"{pattern}: say why"
        assert any(fnmatch(n, pattern) for n in names), f"{pattern} names no parameter"


@every_method
def test_recipes_name_what_exists(name: str) -> None:
    one = case(name)
    recipes = catalogue.entry(name).recipes
    assert "default" in recipes
    for dataset in recipes:
        table = recipe(name, dataset)
        for part in (table, *table["arms"].values()):
            cls = catalogue.load_class(part["class"]) if "class" in part else one.cls
            data = catalogue.load_datamodule(part["datamodule"]) if "datamodule" in part else one.data_cls
            own = {"model": (cls, {"variant"}), "data": (data, set())}
            for key, (target, more) in own.items():
                if key == "data" and "class" in part and "datamodule" not in part:
                    continue
                unknown = set(part.get(key, {})) - set(inspect.signature(target).parameters) - more
                assert not unknown, f"[recipes.{dataset}] {key}: {unknown}"
        for check in table["checks"]:
            assert check["metric"].split("/")[0] in ("test", "val", "train", "seconds", "parameters")


@every_method
def test_verdicts_follow_from_their_figures(name: str) -> None:
    for label, evidence in results.claims(name).items():
        if results.is_stale(label, evidence):
            continue
        checks = [judge(check, evidence["arms"]) for check in results.recipe_of(label)["checks"]]
        assert evidence["checks"] == checks, f"{label}: the recorded checks are not what its figures give"
        assert evidence["holds"] is all(check["holds"] for check in checks)
        assert evidence["holds"] or evidence["cause"], f"{label} does not hold: its recipe must say the cause"
        held = evidence["holds"] and results.recipe_of(label).get("cause")
        assert not held, f"{label} holds: its recipe still gives a cause why it does not"
        assert len(evidence["seeds"]) >= 3 and all(len(a) == len(evidence["seeds"]) for a in evidence["arms"].values())


@every_method
def test_refuses_unknown_and_live_arguments(name: str) -> None:
    one = case(name)
    with pytest.raises(TypeError, match="no hyperparameter"):
        one.cls(no_such_argument=1)
    first = next(iter(inspect.signature(one.cls).parameters))
    with pytest.raises(TypeError, match=first):
        one.cls(**{first: object()})
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        one.data_cls(root="/no/such/folder")
