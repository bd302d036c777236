"""A model goes to the Hub and comes back bit for bit, through the real client."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from torch import Tensor, nn

import zoo.core
from zoo.cli import main
from zoo.core import ZooError, ZooModule

REPO = "acme/affine"


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every tensor away from its initial value, buffers too."""
    draw = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
        else:
            tensor.fill_(seed + 7)
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(
        torch.equal(first[k], second[k]) and first[k].dtype == second[k].dtype for k in first
    )


# ---- there and back --------------------------------------------------------------------------------------------------


def test_push_and_pull_is_bit_equal(Affine, hub):
    model = randomised(Affine(width=5, depth=3, act="gelu", scales=(0.1, 0.2, 0.3)))
    model.push_to_hub(REPO)
    back = Affine.from_pretrained(REPO)
    assert same(model, back) and back.hyperparameters == model.hyperparameters
    assert back.hparams.act == "gelu" and back.hyperparameters["scales"] == [0.1, 0.2, 0.3]
    assert not back.training and torch.equal(back.positions, torch.arange(16))
    x = torch.randn(4, 5)
    assert torch.equal(back(x), model.eval()(x))


def test_repository_holds_exactly_config_weights_and_card(Affine, hub):
    Affine().push_to_hub(REPO)
    assert set(hub.files(REPO)) == {".gitattributes", "config.json", "model.safetensors", "README.md"}
    config = json.loads(hub.files(REPO)["config.json"])
    assert config["class"] == "Affine" and config["format_version"] == 1
    assert config["hyperparameters"] == Affine().hyperparameters
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert card.data.library_name == "paper-zoo" and card.data.license
    assert HfApi().model_info(REPO).pipeline_tag == "tabular-classification"


def test_publish_command(Affine, hub, tmp_path, capsys):
    model = randomised(Affine())
    model.save_pretrained(tmp_path / "out", metrics={"accuracy": 0.5}, dataset="clouds")
    assert main(["publish", str(tmp_path / "out"), "--repo-id", REPO]) == 0
    where = capsys.readouterr().out.strip()
    assert where == f"{REPO}@{hub.head(REPO)}"
    assert same(model, Affine.from_pretrained(where))
    for name in ("config.json", "model.safetensors", "README.md"):
        assert hub.files(REPO)[name] == (tmp_path / "out" / name).read_bytes()
    commits = [c.title for c in HfApi().list_repo_commits(REPO)]
    assert len(commits) == 2 and commits[0].startswith("Affine")  # one commit on top of the Hub's own first
    assert main(["publish", str(tmp_path / "out"), "--repo-id", REPO]) == 0  # nothing changed: no new commit
    assert capsys.readouterr().out.strip() == where


def test_publish_private(Affine, hub, tmp_path, capsys):
    Affine().save_pretrained(tmp_path / "out")
    assert main(["publish", str(tmp_path / "out"), "--repo-id", REPO, "--private"]) == 0
    assert HfApi().model_info(REPO).private


def test_publish_takes_only_what_belongs_to_a_checkpoint(Affine, hub, tmp_path):
    folder = Affine().save_pretrained(tmp_path / "out")
    (folder / "secrets.env").write_text("TOKEN=1")
    (folder / "weights.ckpt").write_bytes(b"pickle")
    (folder / ".out-left").mkdir()
    (folder / ".out-left" / "config.json").write_text("{}")  # what a killed save leaves
    assert main(["publish", str(folder), "--repo-id", REPO]) == 0
    assert set(hub.files(REPO)) == {".gitattributes", "config.json", "model.safetensors", "README.md"}


def test_load_folder_equals_hub(Affine, hub, tmp_path):
    model = randomised(Affine(depth=1))
    hub.load_folder(REPO, model.save_pretrained(tmp_path / "out"))
    assert same(Affine.from_pretrained(tmp_path / "out"), Affine.from_pretrained(REPO))
    assert type(zoo.core.load(REPO)) is Affine and same(zoo.core.load(REPO), model)


def test_saving_is_reproducible(Affine, tmp_path):
    """No dates, no random order: the same model makes the same bytes, so that nothing is uploaded twice."""
    a, b = (randomised(Affine()).save_pretrained(tmp_path / name) for name in ("a", "b"))
    for name in ("config.json", "model.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes()


def test_saving_over_an_earlier_checkpoint_replaces_it(Affine, tmp_path):
    Affine(depth=1).save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    model = randomised(Affine(depth=4))
    model.save_pretrained(tmp_path / "out")
    assert same(Affine.from_pretrained(tmp_path / "out"), model)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "notes.txt",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


class Drawn(ZooModule):
    """What `__init__` draws: into parameters, which the file replaces, and into a table, which nothing replaces."""

    head = ("classifier",)

    def __init__(self, num_classes: int = 3):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Linear(4, 4)
        self.classifier = torch.nn.Linear(4, num_classes)
        draw = torch.Generator().manual_seed(0)
        self.register_buffer("table", torch.empty(5).normal_(generator=draw), persistent=False)


def test_loading_draws_only_what_the_file_lacks(tmp_path):
    model = randomised(Drawn())
    folder = model.save_pretrained(tmp_path / "out")
    before = torch.get_rng_state()
    again = Drawn.from_pretrained(folder)
    assert same(again, model) and torch.equal(again.table, model.table)
    assert torch.equal(torch.get_rng_state(), before)
    changed = Drawn.from_pretrained(folder, num_classes=7)
    assert changed.classifier.weight.std() > 0.05 and torch.equal(changed.net.weight, model.net.weight)


def test_only_safe_files_are_fetched(Affine, hub, tmp_path):
    hub.load_folder(REPO, Affine().save_pretrained(tmp_path / "out"))
    hub.commit(REPO, {"extra.pkl": b"x", "pytorch_model.bin": b"x", "sub/train.py": b"x"})
    Affine.from_pretrained(REPO)
    fetched = {Path(r.path).name for r in hub.requests if r.method == "GET" and "/resolve/" in r.path}
    assert fetched == {"config.json", "model.safetensors", "README.md"}


class Mixed(ZooModule):
    """Tensors of all kinds, in no catalogue."""

    def __init__(self, size: int = 3):
        super().__init__()
        self.save_hyperparameters()
        self.low = nn.Parameter(torch.zeros(size, dtype=torch.bfloat16))
        self.transposed = nn.Parameter(torch.arange(6.0).reshape(2, 3).T)
        self.tied = nn.Linear(size, size)
        self.also = nn.Linear(size, size)
        self.also.weight = self.tied.weight
        for name, value in {
            "scalar": torch.tensor(1.5, dtype=torch.float64),
            "empty": torch.zeros(0, 4),
            "long": torch.tensor([2**40]),
            "flags": torch.tensor([True, False]),
            "bytes": torch.arange(4, dtype=torch.uint8),
            "complex": torch.tensor([1 + 2j]),
            "special": torch.tensor([float("nan"), float("inf"), -0.0]),
        }.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.also(self.tied(x))


def test_all_kinds_of_tensors_come_back(hub):
    model = Mixed()
    with torch.no_grad():
        model.low.copy_(torch.tensor([0.1, -3.0, 1e30]))
        model.tied.weight.copy_(torch.rand(3, 3))
        model.scalar.fill_(0.1)
    model.push_to_hub("acme/mixed")
    back = Mixed.from_pretrained("acme/mixed")
    assert back.also.weight is back.tied.weight
    for (key, a), b in zip(model.state_dict().items(), back.state_dict().values(), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, key
        assert a.detach().flatten().view(torch.uint8).tolist() == b.detach().flatten().view(torch.uint8).tolist(), key


# ---- revisions -------------------------------------------------------------------------------------------------------


def test_a_pinned_revision_stays_what_it_was(Affine, hub):
    first, second = randomised(Affine(), 1), randomised(Affine(), 2)
    first.push_to_hub(REPO)
    old = hub.head(REPO)
    HfApi().create_tag(REPO, tag="v1")
    second.push_to_hub(REPO, commit_message="better")
    for revision in (old, old[:8], "v1"):
        assert same(Affine.from_pretrained(REPO, revision=revision), first)
        assert same(Affine.from_pretrained(f"{REPO}@{revision}"), first)
    assert same(Affine.from_pretrained(REPO), second)
    assert same(Affine.from_pretrained(f"{REPO}@main", revision="v1"), first)  # the argument wins
    with pytest.raises(ZooError, match=r"acme/affine has no revision 'v9'"):
        Affine.from_pretrained(REPO, revision="v9")


def test_a_pinned_revision_needs_no_server_once_cached(Affine, hub):
    model = randomised(Affine())
    model.push_to_hub(REPO)
    sha = hub.head(REPO)
    Affine.from_pretrained(REPO, revision=sha)
    with hub.down():
        assert same(Affine.from_pretrained(REPO, revision=sha), model)
        assert same(Affine.from_pretrained(REPO, local_files_only=True, revision=sha), model)


def test_a_branch_of_its_own(Affine, hub):
    Affine().push_to_hub(REPO)
    HfApi().create_branch(REPO, branch="wide")
    wide = randomised(Affine(width=16))
    wide.push_to_hub(REPO, branch="wide")
    assert same(Affine.from_pretrained(f"{REPO}@wide"), wide)
    assert Affine.from_pretrained(REPO).hyperparameters["width"] == 8


# ---- offline ---------------------------------------------------------------------------------------------------------

LOAD = """
import sys
from zoo_dummy.affine import Affine
from zoo.core import ZooError
for name in sys.argv[1:]:
    try:
        print(sum(t.double().sum().item() for t in Affine.from_pretrained(name).state_dict().values()))
    except ZooError as error:
        print("ZooError:", error)
"""


def test_offline_from_the_cache_after_the_server_stopped(Affine, hub, python):
    model = randomised(Affine())
    model.push_to_hub(REPO)
    model.push_to_hub("acme/never-loaded")
    hub.pickle_only("acme/pickle", json.loads(hub.files(REPO)["config.json"]))
    Affine.from_pretrained(REPO)
    with pytest.raises(ZooError, match="only pytorch_model.bin"):
        Affine.from_pretrained("acme/pickle")
    with hub.down():
        done = python(LOAD, REPO, f"{REPO}@main", "acme/never-loaded", "acme/pickle", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    total = sum(t.double().sum().item() for t in model.state_dict().values())
    first, second, third, fourth = done.stdout.splitlines()
    assert float(first) == float(second) == total
    assert third.startswith("ZooError: acme/never-loaded is not in the cache")
    assert fourth.startswith("ZooError: ")


# ---- another task ----------------------------------------------------------------------------------------------------


def test_another_number_of_classes_starts_a_new_head_and_nothing_else(Affine, hub, caplog):
    model = randomised(Affine())
    model.push_to_hub(REPO)
    with caplog.at_level("INFO"):
        tuned = Affine.from_pretrained(REPO, num_classes=7)
    assert tuned.classifier.weight.shape == (7, 8) and tuned.hyperparameters["num_classes"] == 7
    for key, value in tuned.state_dict().items():
        assert key.startswith("classifier.") or torch.equal(value, model.state_dict()[key]), key
    lines = [r.getMessage() for r in caplog.records if "initialised anew" in r.getMessage()]
    assert len(lines) == 1 and "classifier.weight" in lines[0] and "classifier.bias" in lines[0]
    assert "layers" not in lines[0]
    tuned.push_to_hub("acme/tuned")
    assert same(Affine.from_pretrained("acme/tuned"), tuned)


def test_the_file_of_a_run_loads_like_a_checkpoint(Affine, tmp_path):
    from zoo_dummy.affine import AffineDataModule

    from zoo.core import Trainer, load

    trainer = Trainer(max_steps=2, default_root_dir=tmp_path, accelerator="cpu", enable_progress_bar=False)
    trainer.fit(model := Affine(), datamodule=AffineDataModule())
    file = tmp_path / "checkpoints" / "last.ckpt"
    again = Affine.from_pretrained(file)
    assert same(again, model) and not again.training and again.data_memory == model.data_memory
    assert same(load(file), model)
    tuned = Affine.from_pretrained(file, num_classes=7)
    assert tuned.classifier.weight.shape == (7, 8) and same(tuned.layers, model.layers)
    with pytest.raises(ZooError, match="do not fit this model"):
        Affine.from_pretrained(file, width=16)
    with pytest.raises(ZooError, match="does not exist"):
        Affine.from_pretrained(tmp_path / "first.ckpt")
    folder = again.save_pretrained(tmp_path / "folder")
    assert same(Affine.from_pretrained(folder / "model.safetensors"), model)


def test_an_override_that_changes_no_shape_keeps_the_head(Affine, hub):
    model = randomised(Affine())
    model.push_to_hub(REPO)
    tuned = Affine.from_pretrained(REPO, lr=0.5)
    assert same(tuned, model) and tuned.hyperparameters["lr"] == 0.5


def test_an_override_that_changes_more_than_the_head_is_refused(Affine, hub):
    Affine().push_to_hub(REPO)
    with pytest.raises(ZooError, match="do not fit this model"):
        Affine.from_pretrained(REPO, width=16)
    with pytest.raises(ZooError, match="do not fit this model"):
        Affine.from_pretrained(REPO, depth=5)
    with pytest.raises(ZooError, match=r"no hyperparameter 'num_clases'.*'num_classes'"):
        Affine.from_pretrained(REPO, num_clases=7)


def test_fine_tuning_what_came_from_the_hub(Affine, hub, tmp_path):
    """Loaded in eval mode, trained in train mode: batch norm moves, and the result goes up again."""
    from zoo_dummy.affine import AffineDataModule

    model = randomised(Affine())
    model.push_to_hub(REPO)
    tuned = Affine.from_pretrained(REPO)
    trainer = zoo.core.Trainer(
        default_root_dir=tmp_path / "run", max_steps=3, accelerator="cpu", logger=False, enable_progress_bar=False
    )
    trainer.fit(tuned, datamodule=AffineDataModule())
    assert not torch.equal(tuned.norm.running_mean, model.norm.running_mean)
    assert not torch.equal(tuned.layers[0].weight, model.layers[0].weight)
    tuned.push_to_hub(REPO)
    assert same(Affine.from_pretrained(REPO), tuned)


# ---- the zoo's own methods -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(zoo.core.catalogue.names())[::7])
def test_tiny_methods_round_trip(name, hub):
    cls = zoo.core.catalogue.load_class(name)
    model = cls.from_variant("tiny")
    model.push_to_hub(f"acme/{name}")
    back = cls.from_pretrained(f"acme/{name}")
    assert back.hyperparameters == model.hyperparameters
    saved = model.saved_state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in back.saved_state_dict().items())
