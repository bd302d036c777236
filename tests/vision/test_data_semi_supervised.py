"""Few labels on many sites: which clients and samples are labelled, that no other label gets out, two pools."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.core import ZooError
from zoo.vision.federated.data_federated import FederatedClassificationDataModule
from zoo.vision.federated.data_semi_supervised import FederatedSemiSupervisedDataModule, labelled_part, two_pools


def data(**arguments):
    found = FederatedSemiSupervisedDataModule(**{"clients": 5, "test": "none", **arguments})
    found.setup("fit")
    return found


def first(found):
    return next(iter(found.train_dataloader()))


def by_client(batch, key):
    return batch[key].split(batch["size"])


@pytest.fixture(scope="module")
def tenth():
    return data()


def test_a_tenth_of_each_client_is_labelled_and_comes_first(tenth):
    batch = first(tenth)
    assert batch["image"].dtype == torch.uint8 and batch["labelled"].dtype == torch.bool
    for size, known, labelled in zip(batch["size"], batch["known"], by_client(batch, "labelled"), strict=True):
        assert known == -(-size // 10) == int(labelled.sum())
        assert labelled[:known].all()


def test_no_label_of_an_unlabelled_sample_gets_out(tenth):
    batch = first(tenth)
    assert (batch["label"][~batch["labelled"]] == -1).all()
    assert (batch["label"][batch["labelled"]] >= 0).all()
    rows = torch.cat([tenth.shares[client] for client in batch["client"]])
    labelled = batch["labelled"]
    assert torch.equal(batch["label"][labelled], tenth.labels[rows][labelled])
    # whatever the hidden labels are, the batch is the same
    hidden = ~tenth.labelled
    kept = tenth.labels.clone()
    tenth.labels[hidden] = (tenth.labels[hidden] + 3) % 10
    assert torch.equal(first(tenth)["label"], batch["label"])
    tenth.labels = kept


def test_clients_have_the_samples_they_have_without_hidden_labels(tenth):
    plain = FederatedClassificationDataModule(clients=5, test="none")
    plain.setup("fit")
    assert [sorted(own.tolist()) for own in tenth.shares] == [sorted(own.tolist()) for own in plain.shares]
    assert torch.equal(next(iter(tenth.test_dataloader()))["label"], next(iter(plain.test_dataloader()))["label"])
    assert "labelled" not in next(iter(tenth.val_dataloader()))


@pytest.mark.parametrize("asked, count", [(2, 2), ([0, 3], 2), (None, 5)])
def test_labelled_clients(asked, count):
    batch = first(data(labelled_clients=asked, labelled=1.0))
    full = [i for i, (size, known) in enumerate(zip(batch["size"], batch["known"], strict=True)) if known == size]
    assert len(full) == count and sum(known > 0 for known in batch["known"]) == count
    if isinstance(asked, list):
        assert full == asked


def test_which_clients_are_labelled_follows_the_seed():
    def chosen(seed):
        return tuple(bool(known) for known in first(data(labelled_clients=2, seed=seed))["known"])

    assert chosen(1) == chosen(1)
    assert len({chosen(seed) for seed in range(5)}) > 1


def test_labels_alone():
    with_all = data(labelled_clients=[1, 4], labelled=0.2)
    alone = data(labelled_clients=[1, 4], labelled=0.2, unlabelled=False)
    batch, whole = first(alone), first(with_all)
    assert alone.describe()["num_clients"] == 2 and batch["client"] == [0, 1]
    assert batch["size"] == batch["known"] == [whole["known"][1], whole["known"][4]]
    assert batch["labelled"].all()
    assert torch.equal(batch["label"], whole["label"][whole["labelled"]])
    assert torch.equal(batch["image"], whole["image"][whole["labelled"]])


def test_a_skew_of_their_own():
    """Small concentration: nearly one class of a client; none: about the client's mixture; large: its classes alike."""

    def classes(**arguments):
        batch = first(data(partition="iid", labelled=0.2, **arguments))
        counts = [
            torch.bincount(label[labelled], minlength=10)
            for label, labelled in zip(by_client(batch, "label"), by_client(batch, "labelled"), strict=True)
        ]
        return torch.stack(counts).float()

    uneven, even, plain = classes(labelled_alpha=0.01), classes(labelled_alpha=1e4), classes()
    share = uneven.max(1).values / uneven.sum(1)
    assert (share > 0.4).all() and (uneven > 0).sum(1).float().mean() < 5
    assert (plain > 0).sum(1).min() >= 7
    assert even.std(1).mean() < plain.std(1).mean() + 1.0 and even.sum() == plain.sum() == uneven.sum()


@settings(max_examples=15, deadline=None)
@given(share=st.floats(0.001, 1.0), count=st.integers(1, 60), alpha=st.none() | st.floats(1e-3, 50))
def test_a_share_is_rounded_up(share, count, alpha):
    found = FederatedSemiSupervisedDataModule(labelled=share, labelled_alpha=alpha)
    found.labels = torch.arange(count) % 3
    chosen = found._choose(0, torch.arange(count))
    assert len(chosen) == len(set(chosen.tolist())) and 1 <= len(chosen) <= count
    assert abs(len(chosen) - share * count) < 1


def test_root_and_partition_file(tmp_path):
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 256, (60, 6, 6, 3), dtype=np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "set.npz", x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
    file = tmp_path / "division.json"
    asked = {"root": str(tmp_path), "clients": 3, "min_size": 4, "val": 0.0, "partition_file": str(file)}
    found = data(**asked, labelled=0.25)
    assert found.describe() == {"num_classes": 3, "in_channels": 3, "image_size": 6, "num_clients": 3}
    lists = json.loads(file.read_text())["clients"]
    assert [sorted(own.tolist()) for own in found.shares] == [sorted(own) for own in lists]
    again = data(**asked, labelled=0.25)
    assert torch.equal(first(again)["labelled"], first(found)["labelled"])


def test_what_a_checkpoint_remembers(tenth):
    kept = data(labelled_clients=[1], labelled=0.5, labelled_alpha=0.3).remember()
    assert not set(kept) & {"labelled_clients", "labelled", "labelled_alpha", "unlabelled"}
    again = FederatedSemiSupervisedDataModule.recall(kept)
    assert again.class_names == tenth.class_names and again.shape == [1, 8, 8]


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"labelled": 0.0}, ValueError, r"labelled=0.0"),
        ({"labelled": 1.5}, ValueError, r"share in \(0, 1\]"),
        ({"labelled_alpha": 0.0}, ValueError, "labelled_alpha=0.0"),
        ({"labelled_clients": 0}, ValueError, "at least one client"),
        ({"labelled_clients": []}, ValueError, "at least one client"),
        ({"labelled_clients": 6}, ZooError, "there are 5 clients"),
        ({"labelled_clients": [2, 7]}, ZooError, "names client 7"),
        ({"alpha": -1.0}, ValueError, "alpha=-1.0"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        data(**arguments)


# ---- two pools -------------------------------------------------------------------------------------------------------


def hand_batch(sizes, known):
    total = sum(sizes)
    labelled = torch.cat([torch.arange(size) < k for size, k in zip(sizes, known, strict=True)])
    label = torch.where(labelled, torch.arange(total) % 5, -1)
    image = torch.arange(total).view(-1, 1, 1, 1)
    return {
        "image": image, "label": label, "labelled": labelled, "size": sizes, "known": known,
        "client": list(range(len(sizes))), "seed": [11, 12, 13][: len(sizes)],
    }  # fmt: skip


class Part:
    """What `labelled_part` needs of `Samples`."""

    def __init__(self, batch, rows):
        self.batch, self.rows = batch, rows


def test_pools_of_a_hand_written_round():
    batch = hand_batch([6, 4, 5], [2, 4, 0])
    pools = two_pools(batch, size=3, steps=4)
    # the second client has nothing unlabelled, and takes all; the third has no labels
    assert pools["size"] == [4, 4, 5]
    assert pools["image"].flatten().tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    assert (pools["label"] == -1).all() and not pools["labelled"].any()
    seen = [[], [], []]
    for step in range(4):
        part = labelled_part(Part(pools, [2, 0, 1]), step, 3)
        for row, client in enumerate([2, 0, 1]):
            seen[client] += part["image"][row].flatten().tolist()
            where = part["image"][row].flatten()
            assert torch.equal(part["label"][row], batch["label"][where])
            assert part["labelled"][row].all() == (client != 2) and part["labelled"][row].any() == (client != 2)
    # round and round: every sample as often, up to one
    for client, own in enumerate([range(0, 2), range(6, 10), range(10, 15)]):
        counts = [seen[client].count(sample) for sample in own]
        assert sum(counts) == 12 and max(counts) - min(counts) <= 1


def test_more_steps_only_go_on():
    batch = hand_batch([6, 4, 5], [2, 4, 0])
    short, long = (two_pools(batch, 3, steps)["labelled_rows"] for steps in (2, 7))
    assert torch.equal(short, long[:, :2])


def test_pools_leave_the_batch_alone():
    batch = hand_batch([6, 4], [1, 2])
    before = {key: value.clone() for key, value in batch.items() if isinstance(value, torch.Tensor)}
    two_pools(batch, 2, 3)
    assert batch["size"] == [6, 4] and all(torch.equal(batch[key], value) for key, value in before.items())
