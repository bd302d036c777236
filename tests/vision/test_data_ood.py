"""FewShotOODDataModule and OODMetrics: layouts, seeded shots, views, users' files; metrics against slow counts."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from zoo.core import ZooError
from zoo.nn.ood_metrics import OODMetrics, fpr_at_tpr
from zoo.vision.prompt.data_ood import (
    COLOURS,
    FOREIGN,
    KNOWN,
    SHAPES,
    FewShotOODDataModule,
    centre,
    draw_shapes,
    pretrain,
    random_view,
    to_tensor,
)


def picture(path, shade=128, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 255 - shade, 7)).save(path)


def module(root=None, **options):
    options = {"batch_size": 4, "shots": 2, "val_shots": 1, "views": 3, "embedded_test": 1, "image_size": 16, **options}
    data = FewShotOODDataModule(None if root is None else str(root), **options)
    data.setup()
    return data


def imagenet(root, name="imagenet", wnids=("n01", "n02"), images=4, separator=" "):
    for i, wnid in enumerate(wnids):
        for j in range(images):
            picture(root / name / "train" / wnid / f"{wnid}_{j}.JPEG", 20 * j + i)
        picture(root / name / "val" / wnid / "v.JPEG")
    lines = [f"{wnid}{separator}great {wnid} shark" for wnid in (*wnids, "n99")]
    (root / name / "classnames.txt").write_text("\n".join(lines) + "\n")


# ---- layouts -------------------------------------------------------------------------------------------------------


def test_imagenet_layout(tmp_path):
    imagenet(tmp_path)
    for name in ("iNaturalist/images", "SUN", "Places", "dtd/images/banded"):  # as the public archives unpack
        picture(tmp_path / name / "a.jpg")
    data = module(tmp_path)
    assert data.describe() == {"classes": ["great n01 shark", "great n02 shark"]}
    assert data.ood_names == ["iNaturalist", "SUN", "places365", "Texture"]
    assert len(data.dataset("train")) == 4 and len(data.dataset("val")) == 2
    batch = next(iter(data.train_dataloader()))
    assert batch["views"].shape == (4, 3, 3, 16, 16) and batch["views"].dtype == torch.uint8
    assert sorted(batch["label"].tolist()) == [0, 0, 1, 1] and "view_key" not in batch
    seen = [b for b in data.test_dataloader()]
    labels = torch.cat([b["label"] for b in seen]).tolist()
    assert labels == [0, 1, -1, -1, -1, -1] and torch.cat([b["ood"] for b in seen]).tolist() == [0, 0, 1, 2, 3, 4]
    assert seen[0]["image"].shape == (4, 3, 16, 16) and seen[0]["image"].max() <= 1
    assert seen[0]["name"][0] == "n01/v.JPEG"


def test_images_subfolder_and_named_sets(tmp_path):
    imagenet(tmp_path)
    (tmp_path / "imagenet/images").mkdir()
    for split in ("train", "val"):
        (tmp_path / "imagenet" / split).rename(tmp_path / "imagenet/images" / split)
    picture(tmp_path / "SUN/a.jpg")
    assert module(tmp_path, ood_sets=["SUN"]).ood_names == ["SUN"]


def test_near_sets_face_each_other_and_must_not_overlap(tmp_path):
    imagenet(tmp_path, "imagenet10", ("n01", "n02"), separator=",")
    imagenet(tmp_path, "imagenet20", ("n03", "n04"), separator=",")
    data = module(tmp_path, id_set="imagenet10")
    assert data.ood_names == ["imagenet20"] and data.class_names == ["great n01 shark", "great n02 shark"]
    picture(tmp_path / "imagenet20/val/n01/x.JPEG")
    with pytest.raises(ZooError, match="holds the known class 'n01'"):
        module(tmp_path, id_set="imagenet10")


def test_generic_folders(tmp_path):
    for split in ("train", "test"):
        for name in ("polar_bear", "cat"):
            picture(tmp_path / "id" / split / name / "a.png")
    picture(tmp_path / "ood/noise/deep/er.png")
    data = module(tmp_path)
    assert data.class_names == ["cat", "polar bear"] and data.ood_names == ["noise"]
    assert "val" not in data._sets and data.val_dataloader() == []  # no picture is left for it
    picture(tmp_path / "ood/noise/Cat/x.png")
    with pytest.raises(ZooError, match="known class 'cat'"):
        module(tmp_path)


def test_missing_and_broken_pieces_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="classnames.txt"):
        module(tmp_path)
    imagenet(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"iNaturalist is missing.*large_scale_ood"):
        module(tmp_path)
    (tmp_path / "SUN").mkdir()
    with pytest.raises(ZooError, match="SUN has no pictures"):
        module(tmp_path, ood_sets=["SUN"])
    picture(tmp_path / "SUN/a.jpg")
    (tmp_path / "imagenet/train/n03").mkdir()
    with pytest.raises(ZooError, match="no name for n03"):
        module(tmp_path, ood_sets=["SUN"])
    (tmp_path / "imagenet/train/n03").rmdir()
    (tmp_path / "imagenet/val/n01/v.JPEG").write_bytes(b"not a picture")
    with pytest.raises(ZooError, match=r"v.JPEG is not a readable picture"):
        list(module(tmp_path, ood_sets=["SUN"]).test_dataloader())
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        FewShotOODDataModule(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "options", [{"shots": 0}, {"views": 0}, {"crop_scale": [0.5, 0.1]}, {"crop_scale": [0.0, 1.0]}]
)
def test_impossible_arguments_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        FewShotOODDataModule(**options)


# ---- shots and views -----------------------------------------------------------------------------------------------


def names(dataset):
    return [item.name for item in dataset.items]


def test_shots_follow_the_seed_and_never_meet_validation(tmp_path):
    imagenet(tmp_path, images=8)
    picture(tmp_path / "SUN/a.jpg")
    draws = [module(tmp_path, ood_sets=["SUN"], seed=seed) for seed in (0, 0, 1)]
    train = [names(d.dataset("train")) for d in draws]
    assert train[0] == train[1] != train[2]
    assert not set(train[0]) & set(names(draws[0].dataset("val")))
    more = module(tmp_path, ood_sets=["SUN"], shots=4)
    assert set(train[0]) < set(names(more.dataset("train")))  # more shots add to fewer
    assert len(module(tmp_path, ood_sets=["SUN"], shots=20).dataset("train")) == 16  # all there are


def test_views_are_drawn_anew_each_epoch_or_kept():
    def two_epochs(redraw):
        data = module(redraw=redraw)
        epochs = []
        for _ in range(2):
            found = {}
            for batch in data.train_dataloader():
                found |= dict(zip(batch["name"], batch["views"], strict=True))
            epochs.append(found)
        return batch, [torch.stack([e[name] for name in sorted(e)]) for e in epochs]

    batch, (a, b) = two_epochs(redraw=True)
    assert not torch.equal(a, b) and "view_key" not in batch
    batch, (a, b) = two_epochs(redraw=False)
    assert torch.equal(a, b) and batch["view_key"].dtype == torch.int64
    assert not torch.equal(a[:, 0], a[:, 1])  # views differ among themselves


def test_crops_lie_inside_and_span_the_scale():
    gradient = np.tile(np.arange(200, dtype=np.uint8), (100, 1))
    image = Image.fromarray(np.stack([gradient] * 3, 2))
    generator = torch.Generator().manual_seed(0)
    widths = []
    for _ in range(200):
        view = to_tensor(random_view(image, 16, [0.08, 1.0], 0.0, generator))[0].float()
        assert (view[:, 1:] >= view[:, :-1] - 1).all()  # never mirrored
        widths.append(float(view[0, -1] - view[0, 0]) / 15 * 16)
    assert min(widths) < 70 and max(widths) > 100 and max(widths) < 140  # sqrt(.08 * 2e4 * 3/4) ~ 35, 100 * 4/3
    mirrored = to_tensor(random_view(image, 16, [1.0, 1.0], 1.0, generator))[0].float()
    assert mirrored[0, 0] > mirrored[0, -1]


def test_centre_keeps_the_middle():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    assert to_tensor(centre(Image.fromarray(wide), 20)).min() == 255


def test_embedded_set_differs_only_in_one_place():
    data = module(embedded_test=2, image_size=None)
    batches = list(data.test_dataloader())
    assert batches[0]["image"].shape[-1] == 32 and data.describe()["classes"] == list(KNOWN)
    groups = torch.cat([b["ood"] for b in batches])
    assert groups.bincount().tolist() == [12, 12, 12] and data.ood_names == list(FOREIGN)
    shape, colour = torch.tensor([0, 5]), torch.tensor([0, 5])
    plain = draw_shapes(shape, colour, torch.Generator().manual_seed(5))
    for foreign, most in (("glyph", 64), ("part", 200)):
        other = draw_shapes(shape, colour, torch.Generator().manual_seed(5), foreign)
        changed = (plain != other).any(1).flatten(1).sum(1)
        assert ((changed > 20) & (changed <= most)).all()  # of 1024 pixels


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_shapes_are_visible_and_distinct(shape):
    def stack(index):
        n = 8
        white = list(COLOURS).index("white")
        pictures = draw_shapes(torch.full((n,), index), torch.full((n,), white), torch.Generator().manual_seed(1))
        return (pictures.float().mean(1) > 190).float()

    own = stack(shape)
    assert (own.mean((1, 2)) > 0.04).all()
    for other in range(len(SHAPES)):
        if other != shape:  # the same draws: only the shape differs
            assert (own - stack(other)).abs().mean() > 0.02


# ---- a user's own files --------------------------------------------------------------------------------------------


def test_reads_folders_and_names_broken_files(tmp_path):
    picture(tmp_path / "b.png")
    picture(tmp_path / "inner/a.jpg")
    (tmp_path / "c.png").write_bytes(b"broken")
    (tmp_path / "notes.txt").write_text("no picture")
    data = FewShotOODDataModule(batch_size=4, image_size=16).from_files(tmp_path)
    (batch,) = list(data.predict_dataloader())
    assert batch["name"] == ["b.png", "inner/a.jpg"] and set(batch) == {"image", "name"}
    assert [path.name for path, _ in data.skipped] == ["c.png"]
    (batch,) = list(FewShotOODDataModule(image_size=16).from_files(tmp_path / "b.png").predict_dataloader())
    assert batch["name"] == ["b.png"]
    with pytest.raises(ZooError, match="Nothing readable"):
        FewShotOODDataModule().from_files(tmp_path / "c.png")


def test_reads_npz(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, names=np.array(["x", "y"]))
    np.savez(tmp_path / "b.npz", images=images.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    a, b = (
        next(iter(FewShotOODDataModule(image_size=16).from_files(tmp_path / f"{n}.npz").predict_dataloader()))
        for n in "ab"
    )
    assert a["name"] == ["x", "y"] and b["name"] == ["00000", "00001"]
    assert torch.equal(a["image"], b["image"])
    np.savez(tmp_path / "c.npz", images=np.zeros((2, 16, 16), np.uint8))
    with pytest.raises(ZooError, match=r"uint8 \(2, 16, 16\)"):
        FewShotOODDataModule().from_files(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", images=np.full((1, 3, 4, 4), np.nan))
    with pytest.raises(ZooError, match=r"\[0, 1\] without NaN"):
        FewShotOODDataModule().from_files(tmp_path / "d.npz")


def test_writes_one_csv(tmp_path):
    part = {
        "name": ["a.png", "b,c.png"], "class_name": ["cat", "dog"], "class": torch.tensor([0, 1]),
        "probability": torch.tensor([0.25, 1.0]), "score": torch.tensor([1.5, -0.5]),
        "is_ood": torch.tensor([False, True]),
    }  # fmt: skip
    (file,) = FewShotOODDataModule().write([part, part], tmp_path / "out")
    rows = list(csv.reader(file.read_text(encoding="utf-8").splitlines()))
    assert rows[0] == ["name", "class", "probability", "score", "is_ood"] and len(rows) == 5
    assert rows[2] == ["b,c.png", "dog", "1.000000", "-0.500000", "1"]


def test_pretraining_is_seeded_and_loads(tmp_path):
    from zoo.vision.prompt.local_prompt import LocalPrompt

    sizes = {"steps": 2, "width": 16, "vision_layers": 1, "text_layers": 1, "patch": 8, "projection": 8}
    for name in ("a", "b"):
        torch.rand(ord(name))  # whatever was drawn before
        pretrain(tmp_path / name, 0, **sizes)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    found = LocalPrompt(list(KNOWN), str(tmp_path / "a"), tokenizer="embedded", regions=4, score_regions=4, context=2)
    assert found.predict(torch.rand(1, 3, 32, 32))["score"].isfinite().all()


# ---- metrics -------------------------------------------------------------------------------------------------------


def slow_fpr(score, known, tpr):
    """The threshold among the scores whose true positive rate is nearest; the later one where several are."""
    best = None
    for threshold in sorted(set(score.tolist()), reverse=True):
        accepted = score >= threshold
        rate = (accepted & known).sum().item() / known.sum().item()
        false = (accepted & ~known).sum().item() / (~known).sum().item()
        gap = round(abs(rate - tpr), 9)
        if best is None or gap <= best[0]:
            best = (gap, false)
        if rate == 1:
            break
    return best[1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ties", [False, True])
def test_metrics_against_slow_counts(seed, ties):
    generator = torch.Generator().manual_seed(seed)
    score = torch.cat([torch.randn(37, generator=generator) + 1, torch.randn(23, generator=generator)])
    score = (score * 3).round() if ties else score
    known = torch.arange(60) < 37
    assert fpr_at_tpr(score, known).item() == pytest.approx(slow_fpr(score, known, 0.95))
    first = min(
        ((score >= t) & ~known).sum().item() / 23 for t in score if ((score >= t) & known).sum().item() >= 0.95 * 37
    )
    assert fpr_at_tpr(score, known, nearest=False).item() == pytest.approx(first)
    metric = OODMetrics()
    metric.update(score[:30], (~known[:30]).long())
    metric.update(score[30:], (~known[30:]).long() * 1)
    found = metric.compute()
    pairs = [(a > b) + 0.5 * (a == b) for a in score[known] for b in score[~known]]
    assert found["auroc"].item() == pytest.approx(float(sum(pairs)) / len(pairs), abs=1e-6)


def test_metric_means_run_over_sets_and_limits_are_known():
    metric = OODMetrics()
    # known 2..3; set 1 far below, set 2 far above: perfectly right and perfectly wrong
    metric.update(torch.tensor([2.0, 3.0, -1.0, 0.0, 5.0, 6.0]), torch.tensor([0, 0, 1, 1, 2, 2]))
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found["fpr95/1"] == 0 and found["auroc/1"] == 1 and found["aupr/1"] == 1
    assert found["fpr95/2"] == 1 and found["auroc/2"] == 0
    assert found["fpr95"] == 0.5 and found["auroc"] == 0.5
    only = OODMetrics()
    only.update(torch.tensor([1.0]), torch.tensor([0]))
    assert only.compute() == {}
    with pytest.raises(ValueError, match="equally long"):
        only.update(torch.zeros(2), torch.zeros(3).long())


def test_close_scores_are_not_merged():
    """Scores above 1 would pass torchmetrics' sigmoid, which makes 20.0 and 20.5 equal in float32."""
    metric = OODMetrics()
    metric.update(torch.tensor([20.5, 20.6, 20.0, 20.1]), torch.tensor([0, 0, 1, 1]))
    assert metric.compute()["auroc"].item() == 1
