"""How pictures are divided among clients, drawn for a round, scored, read from published layouts, and handed in."""

import gzip
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from zoo.core import ZooError
from zoo.core.seeding import seed_from
from zoo.data.pictures import read_pictures
from zoo.vision.federated.data_federated import (
    PARTITIONS,
    FederatedClassificationDataModule,
    divide,
    local_test,
    shift,
)

Data = FederatedClassificationDataModule


def ready(**given: Any) -> Data:
    data = Data(**given)
    data.setup()
    return data


class How:
    alpha, min_size, classes_per_client = 0.3, 1, 2

    def __init__(self, partition: str, **given: Any):
        self.partition = partition
        self.__dict__.update(given)


def draws(*words: object) -> torch.Generator:
    return torch.Generator().manual_seed(seed_from(*words))


# ---- dividing -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([p for p in PARTITIONS if p != "natural"]),
    clients=st.integers(1, 6),
    each=st.integers(4, 30),
    seed=st.integers(0, 1000),
)
def test_every_sample_has_one_client(kind: str, clients: int, each: int, seed: int) -> None:
    labels = torch.arange(5).repeat(each)
    how = How(kind, alpha=1.0, classes_per_client=3 if clients > 1 else 5)
    shares = divide(labels, clients, how, 5, lambda *w: torch.Generator().manual_seed(seed + w[-1]))
    together = torch.cat(shares)
    assert len(shares) == clients and len(together.unique()) == len(together)
    if kind != "classes":
        assert len(together) == len(labels)
    assert min(map(len, shares)) >= 1


def test_divisions_are_of_their_kind() -> None:
    labels = torch.arange(10).repeat_interleave(100)

    def counts(kind: str, **given: Any) -> Tensor:
        shares = divide(labels, 10, How(kind, **given), 10, draws)
        return torch.stack([torch.bincount(labels[s], minlength=10) for s in shares])

    assert counts("iid").sum(1).tolist() == [100] * 10
    assert (counts("classes", classes_per_client=2) > 0).sum(1).tolist() == [2] * 10
    assert (counts("classes", classes_per_client=3) > 0).sum(1).tolist() == [3] * 10
    shards = counts("shards")
    assert shards.sum(1).tolist() == [100] * 10 and (shards > 0).sum(1).max() <= 2
    uneven, even = counts("dirichlet", alpha=0.1).float(), counts("dirichlet", alpha=1000.0).float()
    assert uneven.std(0).mean() > 3 * even.std(0).mean() and even.min() >= 5
    sizes = counts("quantity", alpha=0.5).sum(1).float()
    assert sizes.std() > 40
    assert counts("quantity", alpha=2.0, min_size=30).sum(1).min() >= 30


def test_impossible_divisions_are_refused() -> None:
    labels = torch.zeros(20, dtype=torch.long)
    with pytest.raises(ZooError, match="20 samples are too few for 3 clients of at least 10"):
        divide(labels, 3, How("iid", min_size=10), 1, draws)
    with pytest.raises(ZooError, match="classes_per_client is 2; the set has 1"):
        divide(labels, 3, How("classes"), 1, draws)
    with pytest.raises(ZooError, match=r"1000 draws .* raise alpha \(0.01\)"):
        divide(torch.arange(2).repeat(30), 6, How("dirichlet", alpha=0.01, min_size=9), 2, draws)


@settings(max_examples=40, deadline=None)
@given(clients=st.integers(1, 12), per=st.integers(1, 10), classes=st.integers(2, 10), seed=st.integers(0, 99))
def test_a_client_has_as_many_classes_as_asked(clients: int, per: int, classes: int, seed: int) -> None:
    per = min(per, classes)
    how = How("classes", classes_per_client=per)
    labels = torch.arange(classes).repeat_interleave(40)
    shares = divide(labels, clients, how, classes, lambda *words: draws(seed, *words))
    assert all(len(labels[own].unique()) == per for own in shares)
    having = [sum(bool((labels[own] == c).any()) for own in shares) for c in range(classes)]
    assert max(having) - min(having) <= 2, "no class is everybody's while another is nobody's"


def test_local_tests_follow_the_classes() -> None:
    labels = torch.arange(4).repeat(50)
    counts = torch.tensor([30, 10, 0, 0])
    found = torch.bincount(labels[local_test(labels, counts, "proportional", 40, draws("a"))], minlength=4)
    assert found.tolist() == [30, 10, 0, 0]
    everything = torch.bincount(labels[local_test(labels, counts, "classes", 40, draws("a"))], minlength=4)
    assert everything.tolist() == [50, 50, 0, 0]
    rare = local_test(torch.tensor([0, 0, 0]), torch.tensor([0, 5]), "proportional", 10, draws("a"))
    assert len(rare) == 0, "no test sample of its only class"


# ---- rounds and sets to score ---------------------------------------------------------------------------------------


def test_rounds_hold_whole_clients() -> None:
    data = ready(clients=6, per_round=2, rounds=4, dropout=0.3, stragglers=0.3)
    rounds = list(data.train_dataloader())
    assert len(rounds) == 4 and len({tuple(r["client"]) for r in rounds}) > 1
    for one in rounds:
        assert len(one["client"]) == 2 == len(one["seed"]) == len(one["work"])
        assert one["size"] == [len(data.shares[c]) for c in one["client"]] and sum(one["size"]) == len(one["label"])
        first = one["image"][: one["size"][0]]
        assert torch.equal(first, data.images[data.shares[one["client"][0]]]) and first.dtype == torch.uint8
    again = list(ready(clients=6, per_round=2, rounds=4, dropout=0.3, stragglers=0.3).train_dataloader())
    assert [r["seed"] for r in again] == [r["seed"] for r in rounds]
    assert [r["seed"] for r in data.train_dataloader()] != [r["seed"] for r in rounds], "the next epoch"


def test_scored_sets() -> None:
    data = ready(clients=4, alpha=0.2, test_per_client=20)
    sets = scored(data.test_dataloader())
    assert [s["client"] for s in sets] == [[-1], [0], [1], [2], [3]]
    assert sets[0]["size"] == [len(sets[0]["label"])] and len(sets[0]["label"]) == 355
    for one in sets[1:]:
        own = data.labels[data.shares[one["client"][0]]].unique().tolist()
        assert set(one["label"].tolist()) <= set(own)
    assert [s["client"] for s in ready(test="none").val_dataloader()] == [[-1]]
    assert [s["client"] for s in data.test_dataloader()] == [[-1, 0, 1, 2, 3]], "small sets come in one batch"
    assert "val" not in ready(val=0.0)._sets


def scored(loader: Any) -> list[dict[str, Any]]:
    """The sets of a loader one by one."""
    found = []
    for batch in loader:
        parts = zip(
            batch["client"], batch["image"].split(batch["size"]), batch["label"].split(batch["size"]), strict=True
        )
        found += [{"client": [c], "size": [len(y)], "image": x, "label": y} for c, x, y in parts]
    return found


def test_no_sample_is_in_two_parts() -> None:
    data = ready()
    parts = [data.images[torch.cat(data.shares)], *(data.dataset(s).pictures.image for s in ("val", "test"))]
    assert sum(map(len, parts)) == 1797


def test_long_tail_and_few_of_each() -> None:
    data = ready(long_tail=0.1, per_class=100, val=0.0, partition="iid", clients=2)
    counts = torch.bincount(data.labels[torch.cat(data.shares)], minlength=10)
    assert counts.tolist() == [int(100 * 0.1 ** (c / 9)) for c in range(10)]


def test_label_noise_by_client() -> None:
    clean, noisy = ready(clients=3), ready(clients=3, label_noise=[0.0, 0.5, 1.0])
    wrong = [(clean.labels[s] != noisy.labels[s]).float().mean() for s in noisy.shares]
    batch = next(iter(noisy.train_dataloader()))
    assert "clean" not in next(iter(clean.train_dataloader()))
    assert (
        torch.equal(batch["clean"], clean.labels[torch.cat(clean.shares)]) and (batch["clean"] != batch["label"]).any()
    )
    tested = [[s["label"].bincount(minlength=10).tolist() for s in scored(d.test_dataloader())] for d in (clean, noisy)]
    assert tested[0] == tested[1], "what a client is tested on does not depend on the noise"
    assert wrong[0] == 0 and 0.4 < wrong[1] < 0.6 and wrong[2] == 1
    with pytest.raises(ZooError, match="one for each of the clients"):
        ready(clients=3, label_noise=[0.1, 0.2])


def test_partition_file_is_written_and_used(tmp_path: Path) -> None:
    file = tmp_path / "clients.json"
    first = ready(clients=5, partition_file=str(file))
    again = ready(clients=9, seed=0, partition_file=str(file))
    assert len(again.shares) == 5
    assert all(torch.equal(a, b) for a, b in zip(first.shares, again.shares, strict=True))
    for bad in ('{"clients": [[0], []]}', '{"clients": [[99999]]}', "[]", "no json", '{"clients": [["a"]]}'):
        file.write_text(bad)
        with pytest.raises(ZooError, match="clients.json") as caught:
            ready(partition_file=str(file))
        assert "\n" not in str(caught.value)


def test_shifts_set_clients_apart() -> None:
    plain, shifted = ready(clients=4), ready(clients=4, shifts=["none", "invert"])
    for client, (a, b) in enumerate(zip(plain.shares, shifted.shares, strict=True)):
        wanted = plain.images[a] if client % 2 == 0 else 255 - plain.images[a]
        assert torch.equal(shifted.images[b], wanted)
    sets = {s["client"][0]: s["image"] for s in scored(shifted.test_dataloader())}
    before = {s["client"][0]: s["image"] for s in scored(plain.test_dataloader())}
    assert torch.equal(sets[1], 255 - before[1]) and torch.equal(sets[2], before[2])
    assert torch.equal(sets[-1][1::2], 255 - before[-1][1::2]) and torch.equal(sets[-1][::2], before[-1][::2])
    image = torch.full((1, 1, 4, 4), 100, dtype=torch.uint8)
    assert shift(image, "scale:0.5", draws("s")).unique().tolist() == [50]
    assert shift(image, "rotate:90", draws("s")).shape == image.shape
    assert shift(image, "noise:0.1", draws("s")).float().std() > 5
    with pytest.raises(ZooError, match="No shift 'blur'"):
        ready(shifts=["blur"])


@pytest.mark.parametrize(
    ("given_", "error"),
    [
        ({"partition": "dirichlt"}, "partition is 'dirichlt'"),
        ({"test": "some"}, "test is 'some'"),
        ({"long_tail": 0.0}, "long_tail is 0"),
        ({"clients": 0}, "clients is 0"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"val": 1.0}, "val=1.0"),
    ],
)
def test_wrong_arguments(given_: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Data(**given_)
    with pytest.raises(ZooError, match="needs a set with sites"):
        ready(partition="natural")


# ---- published layouts ----------------------------------------------------------------------------------------------


def pictures(n: int, channels: int, side: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, channels), dtype=np.uint8)


def write_npz(root: Path) -> tuple[int, int]:
    x = pictures(30, 3, 6, 0)
    np.savez(root / "set.npz", x_train=x[:20], y_train=np.arange(20) % 3, x_test=x[20:], y_test=np.arange(10) % 3)
    return 3, 6


def write_vectors(root: Path) -> tuple[int, int]:
    x = np.random.default_rng(0).normal(size=(30, 7)).astype(np.float32)
    np.savez(root / "set.npz", x_train=x[:20], y_train=np.arange(20) % 3, x_test=x[20:], y_test=np.arange(10) % 3)
    return 7, 1


def write_cifar10(root: Path) -> tuple[int, int]:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for i, name in enumerate(("data_batch_1", "data_batch_2", "test_batch")):
        flat = pictures(10, 3, 32, i).transpose(0, 3, 1, 2).reshape(10, -1)
        (folder / name).write_bytes(pickle.dumps({"data": flat, "labels": [j % 3 for j in range(10)]}, 2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog", "frog"]}, 2))
    return 3, 32


def write_cifar100(root: Path) -> tuple[int, int]:
    folder = root / "cifar-100-python"
    folder.mkdir()
    for name, n in (("train", 20), ("test", 10)):
        flat = pictures(n, 3, 32, n).transpose(0, 3, 1, 2).reshape(n, -1)
        (folder / name).write_bytes(pickle.dumps({"data": flat, "fine_labels": [j % 3 for j in range(n)]}, 2))
    return 3, 32


def write_idx(root: Path) -> tuple[int, int]:
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for name, n in (("train", 20), ("t10k", 10)):
        x = pictures(n, 1, 5, n)[..., 0]
        image = struct.pack(">HBB3I", 0, 8, 3, *x.shape) + x.tobytes()
        label = struct.pack(">HBBI", 0, 8, 1, n) + bytes(j % 3 for j in range(n))
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(image))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(label)
    return 1, 5


def write_svhn(root: Path) -> tuple[int, int]:
    from scipy.io import savemat

    for name, n in (("train", 20), ("test", 10)):
        x = pictures(n, 3, 32, n).transpose(1, 2, 3, 0)
        savemat(root / f"{name}_32x32.mat", {"X": x, "y": np.array([[10, 1, 2][j % 3] for j in range(n)])[:, None]})
    return 3, 32


def write_folders(root: Path) -> tuple[int, int]:
    for part, n in (("train", 7), ("test", 4)):
        for label in ("a", "b", "c"):
            folder = root / part / label
            folder.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(pictures(1, 3, 6, i)[0]).save(folder / f"{i}.png")
    return 3, 6


def write_sites(root: Path) -> tuple[int, int]:
    for site in ("north", "south"):
        for label in ("a", "b", "c"):
            folder = root / f"client_{site}" / label
            folder.mkdir(parents=True)
            for i in range(10):
                Image.fromarray(pictures(1, 1, 6, i)[0, ..., 0]).save(folder / f"{i}.png")
    return 1, 6


def write_listed(root: Path) -> tuple[int, int]:
    lines = ["file,client,class"]
    (root / "scans").mkdir()
    for site in ("2", "10"):
        for label in ("a", "b", "c"):
            for i in range(10):
                file = f"scans/{site}-{label}-{i}.png"
                Image.fromarray(pictures(1, 1, 6, i)[0, ..., 0]).save(root / file)
                lines.append(f"{file},{site},{label}")
    (root / "clients.csv").write_text("\n".join(lines))
    return 1, 6


def face(kind: int, i: int) -> np.ndarray:
    return np.random.default_rng(10 * i + kind).integers(0, 256, (48, 48), dtype=np.uint8)


def write_raf_db(root: Path, below: str = "basic") -> tuple[int, int]:
    (root / below / "EmoLabel").mkdir(parents=True)
    (root / below / "Image" / "aligned").mkdir(parents=True)
    lines = []
    for part, n in (("train", 21), ("test", 9)):
        for i in range(n):
            Image.fromarray(pictures(1, 3, 10, i)[0]).save(root / below / f"Image/aligned/{part}_{i:05d}_aligned.jpg")
            lines.append(f"{part}_{i:05d}.jpg {1 + i % 3}")
    (root / below / "EmoLabel" / "list_patition_label.txt").write_text("\n".join(lines) + "\n")
    return 3, 10


def write_ferplus(root: Path, packed: bool = True) -> tuple[int, int]:
    """Three classes; one face in four has no majority, is none, or is of the public test."""
    head = "Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF"
    votes, lines = [head], ["emotion,pixels,Usage"]
    split = ["4,4,1,0,0,0,0,0,1,0", "0,0,0,0,0,0,0,0,0,10", "1,1,1,1,1,1,1,1,1,1"]
    for usage, folder, n in (("Training", "FER2013Train", 32), ("PublicTest", "FER2013Valid", 4),
                             ("PrivateTest", "FER2013Test", 16)):  # fmt: skip
        (root / folder).mkdir()
        for i in range(n):
            kind = i % 4
            counts = ["7,1,1,1,0,0,0,0,0,0", "0,6,4,0,0,0,0,0,0,0", "0,0,3,1,1,1,1,1,1,1", split[i % 3]][kind]
            votes.append(f"{usage},{f'fer{len(votes):07d}.png' if kind < 3 else ''},{counts}")
            lines.append(f"{kind},{' '.join(map(str, face(kind, i).ravel()))},{usage}")
            if kind < 3 and not packed:
                Image.fromarray(face(kind, i)).save(root / folder / f"fer{len(votes) - 1:07d}.png")
    (root / "fer2013new.csv").write_text("\n".join(votes))
    if packed:
        (root / "fer2013.csv").write_text("\n".join(lines))
    return 1, 48


WRITERS = [
    write_npz,
    write_vectors,
    write_cifar10,
    write_cifar100,
    write_idx,
    write_svhn,
    write_folders,
    write_sites,
    write_listed,
    write_raf_db,
    write_ferplus,
]
CLASSES = {write_svhn: 10, write_raf_db: 7, write_ferplus: 8}


@pytest.mark.parametrize("write", WRITERS)
def test_layouts(write: Any, tmp_path: Path) -> None:
    channels, side = write(tmp_path)
    data = ready(root=str(tmp_path), clients=2, partition="iid", min_size=2)
    sizes = {"num_classes": CLASSES.get(write, 3), "in_channels": channels, "image_size": side}
    assert data.describe() == sizes | {"num_clients": 2}
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape[1:] == (channels, side, side) and batch["image"].isfinite().all()
    assert set(batch["label"].tolist()) == {0, 1, 2}
    if write is write_cifar10:
        assert data.class_names == ["cat", "dog", "frog"]


def test_first_pictures_are_what_was_written(tmp_path: Path) -> None:
    write_npz(tmp_path)
    found = read_pictures(tmp_path)
    assert torch.equal(found.train.image[0], torch.from_numpy(pictures(30, 3, 6, 0)[0].transpose(2, 0, 1).copy()))
    folder = tmp_path / "other"
    folder.mkdir()
    write_cifar10(folder)
    found = read_pictures(folder)
    assert torch.equal(found.train.image[10], torch.from_numpy(pictures(10, 3, 32, 1)[0].transpose(2, 0, 1).copy()))


def test_faces_of_raf_db(tmp_path: Path) -> None:
    write_raf_db(tmp_path, ".")
    found = read_pictures(tmp_path, channels=1)
    assert found.classes[:2] == ["surprise", "fear"] and found.train.label.tolist() == [0, 1, 2] * 7
    assert found.train.image.shape == (21, 1, 10, 10) and len(found.test) == 9
    table = tmp_path / "EmoLabel" / "list_patition_label.txt"
    for line in ("train_00000.jpg 8", "valid_1.jpg 1", "train_00000.jpg"):
        table.write_text(f"test_00000.jpg 1\n{line}\n")
        with pytest.raises(ZooError, match=f"line 2: '{line}'; expected train_"):
            read_pictures(tmp_path)
    table.write_text("train_99999.jpg 1\n")
    with pytest.raises(ZooError, match=r"train_99999_aligned\.jpg cannot be read"):
        read_pictures(tmp_path)
    table.unlink()
    with pytest.raises(FileNotFoundError, match=r"list_patition_label\.txt is missing"):
        ready(root=str(tmp_path))


def test_faces_of_ferplus_from_either_form(tmp_path: Path) -> None:
    sets = []
    for packed in (True, False):
        root = tmp_path / str(packed)
        root.mkdir()
        write_ferplus(root, packed)
        sets.append(read_pictures(root))
    for part in ("train", "test"):
        one, other = (getattr(found, part) for found in sets)
        assert torch.equal(one.image, other.image) and torch.equal(one.label, other.label)
    assert sets[0].classes[7] == "contempt" and torch.bincount(sets[0].train.label).tolist() == [8, 8, 8]
    assert len(sets[0].test) == 12 and torch.equal(sets[0].train.image[1, 0], torch.from_numpy(face(1, 1)))
    assert read_pictures(tmp_path / "True", image_size=24, channels=3).train.image.shape == (24, 3, 24, 24)
    table = tmp_path / "False" / "fer2013new.csv"
    table.write_text("header\nTraining,fer0000001.png,1,2,3\n")
    with pytest.raises(ZooError, match="line 2: 5 columns; expected Usage, Image name and 10"):
        read_pictures(table.parent)
    pixels = tmp_path / "True" / "fer2013.csv"
    lines = pixels.read_text().splitlines()
    pixels.write_text("\n".join([*lines[:1], "0,1 2 3,Training", *lines[2:]]))
    with pytest.raises(ZooError, match=r"fer2013\.csv, line 2: expected emotion, 48 x 48 grey"):
        read_pictures(pixels.parent)
    pixels.write_text("\n".join(lines[:5]))
    with pytest.raises(ZooError, match="has 4 faces and .* 52; expected the same"):
        read_pictures(pixels.parent)


def test_sites_become_clients(tmp_path: Path) -> None:
    write_sites(tmp_path)
    data = ready(root=str(tmp_path), clients=None, partition="natural", val=0.0, test="classes")
    assert data.sites == ["north", "south"] and [len(s) for s in data.shares] == [24, 24]
    assert [len(s["label"]) for s in scored(data.test_dataloader())] == [12, 6, 6]
    many = ready(root=str(tmp_path), clients=6, partition="iid", val=0.0, min_size=2)
    assert many.site_of == [0, 1] * 3 and [len(s) for s in many.shares] == [8] * 6


def test_a_table_names_clients_classes_and_splits(tmp_path: Path) -> None:
    write_listed(tmp_path)
    data = ready(root=str(tmp_path), clients=None, partition="natural", val=0.0, test="classes")
    assert data.sites == ["2", "10"] and [len(s) for s in data.shares] == [24, 24], "numbers in their order"
    table = tmp_path / "clients.csv"
    lines = table.read_text().splitlines()[1:]
    marked = [f"{line},{'train' if i % 3 else 'test'}" for i, line in enumerate(lines)]
    marked[0] = "scans/2-a-0.png,,a,test"  # nobody's: everybody is tested on it
    table.write_text("\n".join(["file,client,class,split", *marked]))
    data = ready(root=str(tmp_path), clients=None, partition="natural", val=0.0, test="classes")
    assert [len(s) for s in data.shares] == [20, 20]
    assert [len(s["label"]) for s in scored(data.test_dataloader())] == [20, 10, 11]


@pytest.mark.parametrize(
    "line, says",
    [
        ("scans/2-a-0.png,2", r"line 2: 'scans/2-a-0.png,2'; expected file,client,class"),
        ("scans/2-a-0.png,,a", "line 2"),
        ("scans/2-a-0.png,2,a,later", "'train' .of a client. or 'test'"),
        ("scans/2-a-0.png,,a,train", "split is 'train'"),
        ("scans/gone.png,2,a", "gone.png cannot be read"),
        ("", "clients.csv is empty"),
    ],
)
def test_a_wrong_line_of_the_table_is_named(line: str, says: str, tmp_path: Path) -> None:
    write_listed(tmp_path)
    (tmp_path / "clients.csv").write_text(f"file,client,class,split\n{line}\n")
    with pytest.raises(ZooError, match=says):
        read_pictures(tmp_path)


def test_files_of_several_sites_are_made_alike(tmp_path: Path) -> None:
    for name, side in (("a", 6), ("b", 4)):
        x = pictures(20, 1, side, side)[..., 0]
        y = np.arange(10) % 2
        np.savez(tmp_path / f"{name}.npz", x_train=x[:10], y_train=y, x_test=x[10:], y_test=y)
    data = ready(root=str(tmp_path), clients=None, partition="natural", val=0.0)
    assert data.sites == ["a", "b"] and data.shape == [1, 6, 6] and [len(s) for s in data.shares] == [10, 10]
    assert ready(root=str(tmp_path), clients=2, min_size=1, image_size=3, channels=3).shape == [3, 3, 3]


@pytest.mark.parametrize(
    ("break_it", "error"),
    [
        (lambda r: None, "holds no set of pictures"),
        (lambda r: np.savez(r / "a.npz", x_train=np.zeros(3)), "a.npz lacks y_train"),
        (lambda r: (r / "a.npz").write_bytes(b"no archive"), "a.npz cannot be read"),
        (
            lambda r: np.savez(r / "a.npz", x_train=np.zeros((3, 2, 2)), y_train=[0, 1], x_test=[], y_test=[]),
            "3 pictures and 2 labels",
        ),
        (lambda r: (r / "train").mkdir(), "has no class folders"),
        (lambda r: (r / "cifar-10-batches-py").mkdir(), "data_batch_1 is missing"),
    ],
)
def test_broken_layouts(break_it: Any, error: str, tmp_path: Path) -> None:
    break_it(tmp_path)
    with pytest.raises((FileNotFoundError, ZooError), match=error) as caught:
        ready(root=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_broken_pictures_and_pickles(tmp_path: Path) -> None:
    write_folders(tmp_path)
    (tmp_path / "train" / "a" / "9.png").write_bytes(b"nothing")
    with pytest.raises(ZooError, match=r"9\.png cannot be read as a picture"):
        ready(root=str(tmp_path))
    Image.fromarray(pictures(1, 3, 9, 0)[0]).save(tmp_path / "train" / "a" / "9.png")
    with pytest.raises(ZooError, match="2 sizes .* set image_size"):
        ready(root=str(tmp_path))
    assert ready(root=str(tmp_path), image_size=4, clients=2, min_size=1).shape == [3, 4, 4]
    hostile = tmp_path / "hostile" / "cifar-100-python"
    hostile.mkdir(parents=True)
    for name in ("train", "test"):
        (hostile / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ZooError, match="cannot be read: it asks for os.system"):
        ready(root=str(hostile.parent))


# ---- a user's own pictures ------------------------------------------------------------------------------------------


def test_own_pictures_in_and_a_table_out(tmp_path: Path) -> None:
    data = ready()
    own = tmp_path / "own"
    own.mkdir()
    Image.fromarray(pictures(1, 3, 50, 0)[0]).save(own / "a.jpg")
    Image.fromarray(pictures(1, 1, 20, 0)[0, ..., 0]).save(own / "b.png")
    (own / "c.png").write_bytes(b"broken")
    fresh = Data.recall(json.loads(json.dumps(data.remember())))
    fresh.from_files(own)
    batch = next(iter(fresh.predict_dataloader()))
    assert batch["image"].shape == (2, 1, 8, 8) and batch["name"] == ["a.jpg", "b.png"]
    assert [path.name for path, _ in fresh.skipped] == ["c.png"]
    (table,) = fresh.write([{"name": batch["name"], "probability": torch.eye(10)[[3, 1]]}], tmp_path / "out")
    assert table.read_text().splitlines() == ["name,class,probability", "a.jpg,3,1.000000", "b.png,1,1.000000"]


def test_real_cifar10(zoo_data: Any) -> None:
    found = read_pictures(zoo_data("cifar10"))
    assert found.train.image.shape == (50000, 3, 32, 32) and len(found.test) == 10000
    assert torch.bincount(found.train.label).tolist() == [5000] * 10 and found.classes[3] == "cat"


def test_real_digits(zoo_data: Any) -> None:
    found = read_pictures(zoo_data("digits"))
    assert found.sites == ["mnist", "usps"] and found.train.image.shape == (67291, 1, 28, 28)
    assert found.train.image[-1].float().mean() > 20


def test_a_division_is_drawn(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    from zoo.vision.federated.drawing import draw_partition

    path = draw_partition(Data(clients=7, alpha=0.2), tmp_path / "new" / "division.png")
    assert matplotlib.image.imread(path).shape[2] == 4
    write_sites(tmp_path)
    natural = Data(root=str(tmp_path), clients=None, partition="natural")
    assert draw_partition(natural, tmp_path / "sites.svg").read_text().count("north") == 1
