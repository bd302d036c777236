"""The checkpoints under hub/: small, complete, and as good as their cards say."""

import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from zoo.core import Trainer, catalogue, load, recipe
from zoo.core.card import PICTURE, SECTIONS

HUB = Path(__file__).resolve().parent.parent / "hub"
POINTS = [
    pytest.param(name, point, id=point["path"])
    for name in catalogue.names()
    for point in catalogue.facts(name).get("checkpoints", [])
    if point["status"] == "local"
]


def test_every_folder_is_listed_and_small() -> None:
    listed = {p.values[1]["path"] for p in POINTS}
    folders = {f.name for f in HUB.iterdir() if f.is_dir()}
    assert folders == listed
    sizes = {f: sum(x.stat().st_size for x in (HUB / f).rglob("*")) for f in folders}
    assert max(sizes.values()) <= 12 * 2**20 and sum(sizes.values()) <= 100 * 2**20
    assert {catalogue.entry(p.values[0]).domain for p in POINTS} == {"vision", "graph", "tabular", "language"}


@pytest.mark.parametrize(("name", "point"), POINTS)
def test_cards_are_complete(name: str, point: dict[str, Any]) -> None:
    card = ModelCard.load(HUB / point["path"] / "README.md")
    assert card.data.library_name == "paper-zoo" and card.data.license and card.data.pipeline_tag
    assert card.data.eval_results, "no figures as evaluation metadata"
    assert all(f"## {section}" in card.text for section in SECTIONS)
    assert f'from_pretrained("paper-zoo/{point["path"]}")' in card.text
    assert (HUB / point["path"] / PICTURE).is_file() == (f"]({PICTURE})" in card.text)


@pytest.mark.parametrize(("name", "point"), POINTS)
def test_figures_are_those_of_the_card(name: str, point: dict[str, Any], tmp_path: Path) -> None:
    table = recipe.recipe(name, point["recipe"])
    root = None
    if not table.get("embedded", point["recipe"] == "default"):
        dataset = point.get("root", point["recipe"])
        root = Path(os.environ.get("ZOO_DATA", "/nonexistent")) / dataset
        if not root.is_dir():
            pytest.skip(f"needs the real data set {dataset!r} under $ZOO_DATA")
    plan = recipe._plan(table, point["arm"], None if root is None else str(root))
    folder = HUB / point["path"]
    model = load(folder)
    data_cls = catalogue.load_datamodule(plan.get("datamodule") or name)
    # what a recipe first makes for its own training is not what the card's figures are of
    options = {key: value for key, value in plan.get("data", {}).items() if "{prepare}" not in str(value)}
    data = data_cls(**{"seed": point.get("seed", 0), **options})
    trainer = Trainer(
        tmp_path, seed=point.get("seed", 0), accelerator="cpu", logger=False, enable_progress_bar=False, devices=1
    )
    trainer.test(model, datamodule=data, verbose=False)
    card = ModelCard.load(folder / "README.md")
    for result in card.data.eval_results:
        found = float(trainer.callback_metrics[f"test/{result.metric_type}"])
        assert math.isclose(found, result.metric_value, rel_tol=1e-3, abs_tol=1e-4), (result.metric_type, found)


@pytest.mark.parametrize("folder", sorted(p.name for p in HUB.iterdir() if p.is_dir()))
def test_no_path_of_the_machine_that_trained_it_is_published(folder: str) -> None:
    for file in ("config.json", "README.md"):
        found = re.findall(r"(?<![\w/:.])/(?:[\w.-]+/)+[\w.-]+", (HUB / folder / file).read_text(encoding="utf-8"))
        assert not found, f"{file} names {found[0]}"
