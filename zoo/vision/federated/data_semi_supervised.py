"""Pictures on many sites of which few are labelled: some clients label all, or each labels a few of its own."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.core import ZooError
from zoo.core.seeding import seed_from
from zoo.engines.federated import Samples
from zoo.vision.federated.data_federated import FederatedClassificationDataModule


class FederatedSemiSupervisedDataModule(FederatedClassificationDataModule):
    """Images of k classes, divided among clients of which some label their samples, or a share of them.

    A training batch is one round, as in `FederatedClassificationDataModule`: "image" (n, c, h, w) uint8, "label" (n,)
    long, "client", "size", "work" and "seed" lists. Beside them "labelled" (n,) bool, and "known", a list of how many
    of each client's samples are labelled: they come first among the client's. The label of an unlabelled sample is -1,
    whatever it is: no batch to train on holds it. Validation and test batches are sets to score, with all labels:
    "image", "label", "client", "size". To predict: "image" and "name".

    root=None: the 8 x 8 digits of scikit-learn, a fifth of them for testing.

    root=DIR: as `FederatedClassificationDataModule` reads it: DIR/*.npz with x_train, y_train, x_test, y_test, or
    DIR/{train,test}/<class>/<picture>, or DIR/client_<x>/<class>/<picture>.

    Args:
        labelled_clients: how many clients label anything, drawn by the seed; or a list of their numbers; None = all.
        labelled: share of a labelled client's samples that is labelled, rounded up.
        labelled_alpha: the labelled samples of a client are drawn class by class, with shares of its classes from
            Dirichlet(labelled_alpha); small is uneven, large is alike. None draws among its samples uniformly.
        unlabelled: hand out unlabelled samples too; False leaves only the labelled samples, and the clients that have
            some: what training on labels alone sees.
    Raises:
        ZooError: if the samples cannot be divided as asked, or no client is left that labels anything.
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        clients: int | None = 10,
        partition: str = "dirichlet",
        alpha: float = 0.5,
        min_size: int = 10,
        classes_per_client: int = 2,
        partition_file: str | None = None,
        rounds: int = 10,
        per_round: int | None = None,
        dropout: float = 0.0,
        stragglers: float = 0.0,
        long_tail: float = 1.0,
        label_noise: float | list[float] = 0.0,
        val: float = 0.1,
        test: str = "proportional",
        test_per_client: int = 100,
        per_class: int | None = None,
        labelled_clients: int | list[int] | None = None,
        labelled: float = 0.1,
        labelled_alpha: float | None = None,
        unlabelled: bool = True,
    ):
        super().__init__(
            root, batch_size, num_workers, seed, clients, partition, alpha, min_size, classes_per_client,
            partition_file, rounds, per_round, dropout, stragglers, long_tail, label_noise, val, test, test_per_client,
            per_class,
        )  # fmt: skip
        self.save_hyperparameters()
        if not 0 < labelled <= 1 or (labelled_alpha is not None and labelled_alpha <= 0):
            raise ValueError(
                f"labelled={labelled}, labelled_alpha={labelled_alpha}: a share in (0, 1], a positive number or None."
            )
        if labelled_clients in (0, []):
            raise ValueError(f"labelled_clients is {labelled_clients}; at least one client must have labels.")

    def remember(self) -> dict[str, Any]:
        own = ("labelled_clients", "labelled", "labelled_alpha", "unlabelled")
        return {key: value for key, value in super().remember().items() if key not in own}

    def _divide(self, pool: Tensor, sites: Sequence[str] | None) -> list[Tensor]:
        """The clients' samples, labelled ones first; `labelled` says of every training sample whether it is."""
        shares = super()._divide(pool, sites)
        self.labelled = torch.zeros(len(self.labels), dtype=torch.bool)
        for client in self._labelling(len(shares)):
            self.labelled[self._choose(client, shares[client])] = True
        shares = [torch.cat([own[self.labelled[own]], own[~self.labelled[own]]]) for own in shares]
        if not self.hparams.unlabelled:
            shares = [own[self.labelled[own]] for own in shares]
        return [own for own in shares if len(own)]

    def _labelling(self, clients: int) -> list[int]:
        """The clients that label anything."""
        asked = self.hparams.labelled_clients
        if asked is None:
            return list(range(clients))
        if isinstance(asked, int):
            if asked > clients:
                raise ZooError(f"labelled_clients is {asked}; there are {clients} clients.")
            return torch.randperm(clients, generator=self._draws("labelled clients"))[:asked].tolist()
        far = [client for client in asked if not 0 <= client < clients]
        if far:
            raise ZooError(f"labelled_clients names client {far[0]}; there are {clients}, from 0.")
        return list(asked)

    def _choose(self, client: int, own: Tensor) -> Tensor:
        """Those of a client's samples that are labelled."""
        draws = self._draws("labelled", client)
        wanted = math.ceil(self.hparams.labelled * len(own) - 1e-9)  # 0.1 of 30 is 3
        weight = torch.ones(len(own), dtype=torch.float64)
        if self.hparams.labelled_alpha is not None:
            present, label = self.labels[own].unique(return_inverse=True)
            numbers = np.random.default_rng(int(torch.randint(2**62, (), generator=draws)))
            share = torch.from_numpy(numbers.dirichlet([self.hparams.labelled_alpha] * len(present))).clamp(min=1e-12)
            weight = (share / torch.bincount(label))[label]
        # the smallest of exponential times with these rates: a draw without replacement in proportion to them
        times = -torch.rand(len(own), generator=draws, dtype=torch.float64).clamp(min=1e-300).log() / weight
        return own[times.argsort()[:wanted]]

    def gather(self, clients: Sequence[int]) -> dict[str, Any]:
        found = super().gather(clients)
        labelled = self.labelled[torch.cat([self.shares[client] for client in clients])]
        known = [int(self.labelled[self.shares[client]].sum()) for client in clients]
        label = torch.where(labelled, found["label"], -1)
        return {**found, "label": label, "labelled": labelled, "known": known}


# ---- two pools of a client's samples ---------------------------------------------------------------------------------


def two_pools(batch: dict[str, Any], size: int, steps: int) -> dict[str, Any]:
    """A round's batch of the clients' unlabelled samples, and beside it a plan of their labelled ones.

    Local steps are then counted over unlabelled samples, and each takes ``size`` labelled ones too (`labelled_part`),
    which go round and round in ever new orders. A client all of whose samples are labelled takes them as unlabelled
    ones as well; one without labels fills its part with unlabelled samples, marked so.

    Args:
        batch: of `FederatedSemiSupervisedDataModule`. size: labelled samples a step. steps: at most so many.
    """
    known = batch["known"]
    first = [sum(batch["size"][:i]) for i in range(len(known))]
    rows, sizes, plans = [], [], []
    for start, total, labels, seed in zip(first, batch["size"], known, batch["seed"], strict=True):
        skipped = labels if labels < total else 0
        rows.append(torch.arange(start + skipped, start + total))
        sizes.append(total - skipped)
        generator = torch.Generator().manual_seed(seed_from(seed, "labelled"))
        pool = labels or total
        turns = -(-size * steps // pool)
        order = torch.cat([torch.randperm(pool, generator=generator) for _ in range(turns)])
        plans.append(start + order[: size * steps].view(steps, size))
    kept = torch.cat(rows).to(batch["image"].device)
    found = {**batch, "size": sizes, "image": batch["image"][kept], "label": batch["label"][kept]}
    found["label"] = torch.full_like(found["label"], -1)
    found["labelled"] = torch.zeros_like(found["label"], dtype=torch.bool)
    return found | {"whole": batch, "labelled_rows": torch.stack(plans)}


def labelled_part(samples: Samples, step: int, count: int) -> dict[str, Tensor]:
    """The labelled samples of the first ``count`` clients at a step: "image" as it is, "label", "labelled".

    Shapes:
        returns: (s, size, c, h, w), (s, size) long, (s, size) bool: False where a client without labels fills up
    """
    whole = samples.batch["whole"]
    rows = samples.batch["labelled_rows"][samples.rows[:count], step].to(whole["image"].device)
    return {key: whole[key][rows] for key in ("image", "label", "labelled")}
