"""STIGCN against the authors' recorded network, its equations in their own order, and files that the tests write."""

import csv
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.core import ZooError
from zoo.graph.skeleton.data_skeleton import (
    LAYOUTS,
    SkeletonActionDataModule,
    bones,
    generate,
    read_clip,
    resample,
)
from zoo.graph.skeleton.stigcn import STIGCN, Space, Time, fixed_graphs, partitions

GOLDEN = Path(__file__).parents[1] / "golden" / "stigcn.safetensors"
ALL = ["joint", "bone", "cheby", "soft"]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


# ---- the authors' code ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["ntu", "openpose"])
def test_graphs_equal_the_authors(golden, layout: str) -> None:
    assert torch.allclose(fixed_graphs(layout, ALL), golden[f"graphs_{layout}"], rtol=0, atol=1e-6)


def test_network_equals_the_authors(golden) -> None:
    weights = {k.removeprefix("weights."): v for k, v in golden.items() if k.startswith("weights.")}
    sizes, state = STIGCN.convert_state_dict({"state_dict": {f"module.{k}": v for k, v in weights.items()}})
    wanted = {"layout": "openpose", "in_channels": 3, "persons": 2, "num_classes": 4, "layers": [1, 1, 1]}
    assert sizes == {**wanted, "widths": [8, 8, 16, 16]}
    model = STIGCN(**sizes, dropout=0.0)
    model.load_state_dict(state)
    for mode in ("eval", "train"):
        out = model.train(mode == "train")(golden["skeleton"])
        assert float((out - golden[mode]).abs().max()) <= 1e-5 * float(golden[mode].abs().max())
    loss = F.cross_entropy(out, golden["label"])
    assert float(loss) == pytest.approx(float(golden["loss"]), rel=1e-5)
    loss.backward()
    theirs = golden["gradient"]
    assert float((model.net.first.space.offsets.grad[2] - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())


def test_paper_size_is_the_authors() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in STIGCN().parameters()) == 1_596_474


def test_convert_refuses_other_weights(golden) -> None:
    with pytest.raises(ZooError, match=r"expected layer0"):
        STIGCN.convert_state_dict({"conv.weight": torch.zeros(1)})
    weights = {k.removeprefix("weights."): v for k, v in golden.items() if k.startswith("weights.")}
    with pytest.raises(ZooError, match="it has no extra"):
        STIGCN.convert_state_dict({**weights, "extra": torch.zeros(1)})
    weights.pop("layer1.0.spatial.PA2")
    with pytest.raises(ZooError, match=r"layer1\.0\.spatial\.PA2 is missing"):
        STIGCN.convert_state_dict(weights)


# ---- the graph --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_skeletons_are_trees(layout: str) -> None:
    joints, edges = LAYOUTS[layout]
    parents = dict(edges)
    assert len(edges) == len(parents) == joints - 1
    roots = set()
    for joint in range(joints):
        seen = {joint}
        while joint in parents:
            joint = parents[joint]
            assert joint not in seen, "a circle"
            seen.add(joint)
        roots.add(joint)
    assert len(roots) == 1


def test_partitions_by_hand() -> None:
    eye, inward, outward = partitions("jhmdb")
    assert torch.equal(eye, torch.eye(15))
    assert float(inward[0, 3]) == 1  # the right shoulder (3) leads to the neck (0)
    assert outward[:, 0].nonzero().flatten().tolist() == [2, 3, 4]  # and the neck outwards to face and shoulders
    assert torch.allclose(outward[:, 0].sum(), torch.tensor(1.0))
    with pytest.raises(ValueError, match="expected one of ntu"):
        partitions("cat")


def test_fixed_graphs_entry_by_entry_and_as_matrices() -> None:
    _, inward, outward = partitions("jhmdb")
    s = inward + outward
    found, matrix = fixed_graphs("jhmdb", ALL), fixed_graphs("jhmdb", ALL, "matrix")
    for i in range(15):
        for j in range(15):
            e = float(i == j)
            assert float(found[2, i, j]) == pytest.approx(4 * float(s[i, j]) ** 2 - float(s[i, j]) - 2 * e, abs=1e-6)
    assert torch.allclose(matrix[2], 4 * s @ s - s - 2 * torch.eye(15), atol=1e-6)
    assert torch.allclose(found[3].sum(0), torch.ones(15), atol=1e-6)
    assert torch.equal(fixed_graphs("jhmdb", ["cheby"])[0], found[2])


# ---- blocks -----------------------------------------------------------------------------------------------------


def test_space_in_the_papers_order() -> None:
    """Mixing joints first and channels after, branch by branch, gives the same."""
    torch.manual_seed(0)
    graphs = fixed_graphs("jhmdb", ALL)
    block = Space(6, 16, graphs).eval().double()
    with torch.no_grad():
        block.offsets.normal_(0, 0.1)
        block.scale.fill_(0.3)
    x = torch.randn(2, 6, 5, 15, dtype=torch.float64)
    theta, phi = block.relate(x).split(4, 1)
    relation = torch.zeros(2, 15, 15, dtype=torch.float64)
    for b in range(2):
        for i in range(15):
            for j in range(15):
                relation[b, i, j] = (theta[b, :, :, i] * phi[b, :, :, j]).sum() / (4 * 5)
    relation = relation.softmax(1)
    assert torch.allclose(block.relation(x), relation)
    parts = []
    for k in range(4):
        a = graphs[k].double() + block.offsets[k] + 0.3 * relation
        mixed = torch.einsum("bctv,bvw->bctw", x, a)
        parts.append(F.conv2d(mixed, block.mix.weight[4 * k : 4 * k + 4]))
    y = F.relu(block.norm(torch.cat(parts, 1)))
    assert torch.allclose(block(x), block.fuse_norm(block.fuse(y)), atol=1e-12)


def test_time_by_frames() -> None:
    torch.manual_seed(0)
    block = Time(4, 8).eval().double()
    x = torch.randn(1, 4, 6, 15, dtype=torch.float64)
    motion = torch.stack([x[:, :, t + 1] - x[:, :, t] if t < 5 else 0 * x[:, :, t] for t in range(6)], 2)
    parts = []
    for layer, norm, given in ((block.still, block.still_norm, x), (block.moving, block.moving_norm, motion)):
        frames = []
        for t in range(6):
            near = [(s, t + s - 1) for s in range(3) if 0 <= t + s - 1 < 6]
            frames.append(sum(torch.einsum("oc,bcv->bov", layer.weight[:, :, s, 0], given[:, :, u]) for s, u in near))
        parts.append(F.relu(norm(torch.stack(frames, 2))))
    assert torch.allclose(block(x), block.fuse_norm(block.fuse(torch.cat(parts, 1))), atol=1e-12)


def test_a_still_person_has_no_motion() -> None:
    block = Time(3, 8).eval()
    nn.init.zeros_(block.still.weight)
    still = torch.randn(1, 3, 1, 15).expand(-1, -1, 6, -1)
    moving = torch.randn(1, 3, 6, 15)
    assert float(block(still).std()) < 1e-6 < float(block(moving).std())


def test_blocks_start_as_their_shortcut() -> None:
    model = STIGCN.from_variant("tiny")
    block = model.net.stages[0][0].eval()
    x = torch.rand(1, 8, 8, 25)
    assert torch.allclose(block(x), x, atol=1e-4)


def test_the_second_person_counts_and_people_may_change_places() -> None:
    torch.manual_seed(0)
    model = STIGCN.from_variant("tiny").eval()
    x = torch.randn(1, 3, 16, 25, 2)
    # at the start the input's norm treats both people alike
    assert torch.allclose(model(x), model(x.flip(-1)), atol=1e-5)
    alone = x.clone()
    alone[..., 1] = 0
    assert not torch.allclose(model(x), model(alone), atol=1e-3)


def test_switches_take_parts_away() -> None:
    full = STIGCN.from_variant("tiny")
    for change in ({"motion": False}, {"relation": False}, {"branches": ["joint"]}, {"architecture": "stgcn"}):
        other = STIGCN.from_variant("tiny", **change)
        assert other(torch.randn(1, 3, 16, 25, 2)).shape == (1, 60)
        assert {n for n, _ in other.named_parameters()} != {n for n, _ in full.named_parameters()} or any(
            p.shape != q.shape for p, q in zip(full.parameters(), other.parameters(), strict=True)
        )


def test_wrong_inputs() -> None:
    model = STIGCN.from_variant("tiny")
    with pytest.raises(ValueError, match=r"25 joints of layout 'ntu'"):
        model(torch.zeros(1, 3, 16, 18, 2))
    with pytest.raises(ValueError, match="3 poolings need 8"):
        model(torch.zeros(1, 3, 7, 25, 2))
    with pytest.raises(ValueError, match="expected some of joint"):
        STIGCN(branches=["joint", "muscle"])
    with pytest.raises(ValueError, match="one entry more"):
        STIGCN(widths=[8, 8], layers=[1, 1])
    bad = torch.zeros(1, 3, 16, 25, 2)
    bad[0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="'skeleton' holds 1 value"):
        model.predict(bad)


# ---- data -------------------------------------------------------------------------------------------------------


def test_generated_people() -> None:
    clips, label = generate(40, 32, torch.Generator().manual_seed(0))
    assert clips.shape == (40, 3, 32, 25, 2) and float(clips[..., 1].abs().max()) == 0
    assert set(label.tolist()) == set(range(6))
    moving = clips[:, 2, :, :, 0].std(1)  # how far each joint swings
    for clip, action in zip(moving, label.tolist(), strict=True):
        limbs = [clip[list(j)].mean() for j in ((6, 7), (10, 11), (14, 15, 18, 19))]
        assert int(torch.stack(limbs).argmax()) == action // 2


def test_resampling_and_bones() -> None:
    clip = torch.arange(5.0).view(5, 1, 1).expand(5, 3, 2)
    assert resample(clip, 9)[:, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4]
    assert resample(clip[:1], 4).shape == (4, 3, 2)
    x = torch.randn(3, 4, 15, 1)
    found = bones(x, "jhmdb")
    assert torch.equal(found[:, :, 11], x[:, :, 11] - x[:, :, 7]) and float(found[:, :, 1].abs().max()) == 0


def test_streams() -> None:
    given = {"train_size": 4, "val_size": 1, "test_size": 1}
    joint, motion, bone = (
        SkeletonActionDataModule(stream=s, **given).dataset("train")[0]["skeleton"]
        for s in ("joint", "joint_motion", "bone")
    )
    assert torch.equal(motion[:, :-1], joint[:, 1:] - joint[:, :-1]) and float(motion[:, -1].abs().max()) == 0
    assert torch.equal(bone, bones(joint, "ntu"))


def agcn(folder: Path, count: int = 12, joints: int = 25, test: str = "test") -> None:
    for split in ("train", test):
        np.save(folder / f"{split}_data_joint.npy", np.random.rand(count, 3, 16, joints, 2).astype(np.float32))
        names, labels = [f"S001_{split}{i}.skeleton" for i in range(count)], [i % 3 for i in range(count)]
        (folder / f"{split}_label.pkl").write_bytes(pickle.dumps((names, labels)))


@pytest.mark.parametrize(("layout", "joints", "test"), [("ntu", 25, "val"), ("openpose", 18, "test")])
def test_reads_the_2s_agcn_layout(tmp_path: Path, layout: str, joints: int, test: str) -> None:
    agcn(tmp_path, joints=joints, test=test)
    data = SkeletonActionDataModule(str(tmp_path), layout=layout, batch_size=4, val_fraction=0.25)
    assert [len(data.dataset(s)) for s in ("train", "val", "test")] == [9, 3, 12]
    batch = next(iter(data.test_dataloader()))
    assert batch["skeleton"].shape == (4, 3, 16, joints, 2) and batch["label"].tolist() == [0, 1, 2, 0]
    whole = np.load(tmp_path / "train_data_joint.npy")
    names = [data.dataset(s)[i]["name"] for s in ("train", "val") for i in range(len(data.dataset(s)))]
    assert sorted(names) == sorted(f"S001_train{i}.skeleton" for i in range(12))
    item = data.dataset("val")[1]
    number = int(item["name"].removeprefix("S001_train").removesuffix(".skeleton"))
    assert np.array_equal(item["skeleton"].numpy(), whole[number]) and int(item["label"]) == number % 3
    assert data.describe() == {"layout": layout, "in_channels": 3, "persons": 2, "num_classes": 3}


def test_reads_jhmdb_as_dd_net_prepares_it(tmp_path: Path) -> None:
    for part, count in (("train", 10), ("test", 4)):
        poses = [np.random.rand(5 + i, 15, 2).astype(np.float32) for i in range(count)]
        content = {"pose": poses, "label": [("wave", "jump", "sit")[i % 3] for i in range(count)]}
        (tmp_path / f"GT_{part}_2.pkl").write_bytes(pickle.dumps(content))
    data = SkeletonActionDataModule(str(tmp_path), layout="jhmdb", split=2, frames=16)
    item = data.dataset("test")[1]
    assert item["skeleton"].shape == (2, 16, 15, 1) and int(item["label"]) == 0  # jump, sit, wave
    assert torch.allclose(item["skeleton"][:, 0, :, 0].T, torch.as_tensor(poses[1][0]))
    assert data.describe() == {"layout": "jhmdb", "in_channels": 2, "persons": 1, "num_classes": 3}
    with pytest.raises(ZooError, match="need layout='jhmdb'"):
        SkeletonActionDataModule(str(tmp_path), split=2).setup()


def test_broken_layouts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train_data_joint\.npy is missing.*2s-AGCN"):
        SkeletonActionDataModule(str(tmp_path)).setup()
    agcn(tmp_path, joints=18)
    with pytest.raises(ZooError, match="25 joints of layout 'ntu'"):
        SkeletonActionDataModule(str(tmp_path)).setup()
    with pytest.raises(ValueError, match="layout 'jhmdb' needs a root"):
        SkeletonActionDataModule(layout="jhmdb").setup()


def test_a_users_clip_needs_no_root(tmp_path: Path) -> None:
    np.save(tmp_path / "clip.npy", np.random.default_rng(0).random((40, 15, 2)))
    data = SkeletonActionDataModule.recall(SkeletonActionDataModule(layout="jhmdb", persons=1, frames=16).remember())
    batch = next(iter(data.from_files(tmp_path / "clip.npy").predict_dataloader()))
    assert batch["skeleton"].shape == (1, 2, 16, 15, 1)


def test_pickles_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return print, ("gotcha",)

    agcn(tmp_path)
    (tmp_path / "train_label.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ZooError, match=r"train_label\.pkl cannot be read: it asks for builtins\.print"):
        SkeletonActionDataModule(str(tmp_path)).setup()


def test_own_clips_in_and_out(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    np.save(folder / "a.npy", np.random.rand(7, 25, 3))
    np.savez(folder / "b.npz", pose=np.random.rand(40, 25, 3, 3))
    with open(folder / "c.csv", "w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow([f"{axis}{j}" for j in range(25) for axis in "xyz"])
        rows.writerows(np.random.rand(5, 75).tolist())
    np.save(folder / "short.npy", np.random.rand(7, 18, 3))
    (folder / "torn.npz").write_text("no zip")
    lines = ["2"]
    for frame in range(2):
        lines += ["1", f"7205{frame} 0 1", "25", *(f"{j} {frame} 0.5 0 0 0" for j in range(25))]
    (folder / "S001.skeleton").write_text("\n".join(lines) + "\n")
    data = SkeletonActionDataModule(batch_size=8, frames=16, class_names=[f"action {i}" for i in range(60)])
    batch = next(iter(data.from_files(folder).predict_dataloader()))
    assert batch["name"] == ["S001", "a", "b", "c"] and batch["skeleton"].shape == (4, 3, 16, 25, 2)
    assert {p.name for p, _ in data.skipped} == {"short.npy", "torn.npz"}
    assert float(batch["skeleton"][1, ..., 1].abs().max()) == 0 < float(batch["skeleton"][2, ..., 1].abs().max())
    out = STIGCN.from_variant("tiny").predict_step(batch, 0)
    (written,) = data.write([out], tmp_path / "out")
    rows = list(csv.DictReader(written.open()))
    assert [r["name"] for r in rows] == batch["name"]
    assert rows[0]["action"] == f"action {int(out['label'][0])}"
    assert float(rows[0]["probability"]) == pytest.approx(float(out["probability"][0].max()), abs=1e-5)


def test_ntu_text_form(tmp_path: Path) -> None:
    path = tmp_path / "S001C001P001R001A001.skeleton"
    joints = "\n".join(f"{j} {j + 0.5} 3 0.1 0.1" for j in range(25))
    path.write_text(f"2\n1\n72057 0 1\n25\n{joints}\n2\n72057 0 1\n25\n{joints}\n72058 1 1\n25\n{joints}\n")
    clip = read_clip(path, 25)
    assert clip.shape == (2, 25, 3, 2)
    assert clip[0, 4].tolist() == [[4.0, 0.0], [4.5, 0.0], [3.0, 0.0]]  # the second body comes later
    path.write_text("2\n1\n")
    with pytest.raises(ZooError, match=r"not in NTU's \.skeleton form"):
        read_clip(path, 25)


def test_a_clip_is_drawn(tmp_path: Path) -> None:
    from PIL import Image

    from zoo.graph.skeleton.drawing import draw

    clip = torch.randn(3, 12, 15, 2)
    clip[..., 1] = 0  # nobody: left out
    path = draw(clip, "jhmdb", tmp_path / "clip.png", frames=4, title="waves")
    picture = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(picture, axis=0)) > 10  # bones, joints and the root's mark, not an empty page
    other = draw(clip * 2 + 1, "jhmdb", tmp_path / "other.png", frames=4)
    assert path.read_bytes() != other.read_bytes()
    with pytest.raises(ValueError, match=r"shape \(3, 12, 15, 2\); layout 'ntu'"):
        draw(clip, "ntu", tmp_path / "no.png")
    with pytest.raises(ValueError, match="layout is 'cat'"):
        draw(clip, "cat", tmp_path / "no.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.png", "other.png"]
