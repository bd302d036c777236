"""Pictures on many sites: how a set is divided among clients, which of them take part in a round, what they test on."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.core import ZooDataModule, ZooError, atomic_write
from zoo.core.datamodule import Items, _identity, _Loader, _Order, _Seeded
from zoo.core.seeding import seed_from
from zoo.data.pictures import Pictures, PictureSet, fit, open_picture, read_pictures
from zoo.data.plain import class_rows, write_csv
from zoo.engines.federated.schedule import sample_clients

TOGETHER = 4096
"""Samples of the sets to score that come in one batch."""
PARTITIONS = ("dirichlet", "classes", "shards", "quantity", "iid", "natural")


class FederatedClassificationDataModule(ZooDataModule):
    """Images of k classes, divided among clients that train together without sharing them.

    A training batch is one round: "image" (n, c, h, w) uint8 and "label" (n,) long of all clients that take part, one
    client after the other; "client" list of their numbers, "size" list of their samples, "work" list of the share of
    its steps that each gets done (0: it never answers), "seed" list of a seed for each. Validation and test batches are
    sets to score in the same form: first the server's own, "client" [-1], then each client's. To predict: "image" and
    "name".

    root=None: the 8 x 8 digits of scikit-learn, a fifth of them for testing.

    root=DIR: DIR/<name>.npz with x_train, y_train, x_test, y_test (pictures (n, h, w) or (n, h, w, c) as bytes, or
    vectors (n, d); several files are a site each); cifar-10-batches-py/ or cifar-100-python/; MNIST/raw/ or
    FashionMNIST/raw/ with idx files; {train,test}_32x32.mat (SVHN); {train,test}/<class>/<picture>;
    client_<x>/<class>/<picture>, a site each, with test/<class>/<picture> or else a fifth of each site's for testing;
    clients.csv, a header and file,client,class[,split] a line, where split is train or test (without it a fifth of
    each client's for testing), the files relative to DIR; the faces of RAF-DB (EmoLabel/list_patition_label.txt,
    Image/aligned/, in DIR or DIR/basic) or FERPlus (fer2013new.csv beside fer2013.csv, or FER2013Train/, FER2013Test/;
    without "PublicTest" and faces on which most taggers don't agree).

    Args:
        clients: how many there are; None takes the sites of a set that has them.
        partition: how training samples are divided: "dirichlet" (each class by shares drawn from Dirichlet(alpha)),
            "classes" (each client has ``classes_per_client``), "shards" (two contiguous shards of the sorted labels
            each), "quantity" (sizes from Dirichlet(alpha), classes alike), "iid", or "natural" (the set's own sites).
        alpha: concentration; small is uneven.
        min_size: samples that each client has at least; the draw is repeated until it holds.
        classes_per_client: for "classes".
        partition_file: JSON of a division to use; written there where it does not exist.
        rounds: rounds an epoch. per_round: clients that take part in each; None = all.
        dropout: probability that a client never answers. stragglers: that it gets done a part of its steps only.
        long_tail: size of the rarest class over that of the commonest, sizes falling exponentially; 1 = as they are.
        label_noise: share of training labels replaced by another class: one number, or one for each client.
        val: share of the training samples that is held out for validation.
        test: what a client is tested on: "proportional" (of the test set, in the proportions of its training classes),
            "classes" (all test samples of its classes), or "none".
        test_per_client: test samples of each client with "proportional".
        per_class: training samples of each class at most, drawn by the seed; None = all.
        shifts: what sets clients' pictures apart, given to clients in turn: "none", "invert", "rotate:30" (degrees),
            "scale:0.6" (contrast), "noise:0.1". A client is tested on pictures like its own, the server on all kinds.
        image_size: side that pictures are resized to. channels: 1 or 3; None keeps both as they are.
    Raises:
        FileNotFoundError: if a piece of the layout is missing.
        ZooError: if the samples cannot be divided as asked.
    """

    embedded = "scikit-learn's 8 x 8 digits"

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
        shifts: list[str] = [],  # noqa: B006 (read only; the command knows no tuple)
        image_size: int | None = None,
        channels: int | None = None,
    ):
        super().__init__(root, batch_size, num_workers, seed)
        self.save_hyperparameters()
        if partition not in PARTITIONS:
            raise ValueError(f"partition is {partition!r}; one of {', '.join(PARTITIONS)}.")
        if test not in ("proportional", "classes", "none"):
            raise ValueError(f"test is {test!r}; 'proportional', 'classes' or 'none'.")
        if not 0 < long_tail <= 1:
            raise ValueError(f"long_tail is {long_tail}; the rarest class over the commonest, in (0, 1].")
        if clients is not None and clients < 1:
            raise ValueError(f"clients is {clients}; at least 1.")
        if alpha <= 0 or not 0 <= val < 1:
            raise ValueError(f"alpha={alpha}, val={val}: alpha must be positive, val a share in [0, 1).")
        if rounds < 1 or min_size < 1:
            raise ValueError(f"rounds={rounds}, min_size={min_size}: both at least 1.")
        self.class_names: list[str] = []
        self.shape: list[int] = []
        self.sites: list[str] = []
        self.site_of: list[int] = []
        self.shares: list[Tensor] = []

    def describe(self) -> dict[str, Any]:
        """``num_classes``, ``in_channels``, ``image_size`` and ``num_clients``."""
        if not self.shares:
            return {}
        return {
            "num_classes": len(self.class_names),
            "in_channels": self.images.shape[1],
            "image_size": self.images.shape[2],
            "num_clients": len(self.shares),
        }

    def remember(self) -> dict[str, Any]:
        """The names of the classes and the size of pictures, beside the arguments."""
        found = {k: v for k, v in super().remember().items() if k not in ("label_noise",)}
        return found | {"class_names": self.class_names, "shape": list(self.images.shape[1:])}

    @classmethod
    def recall(cls, remembered: dict[str, Any], **arguments: Any) -> "FederatedClassificationDataModule":
        own = dict(remembered)
        names, shape = own.pop("class_names", []), own.pop("shape", [])
        found = super().recall(own, **arguments)
        found.class_names, found.shape = [str(n) for n in names], [int(s) for s in shape]
        return found

    images: Tensor
    labels: Tensor
    clean: Tensor

    # ---- the sets -----------------------------------------------------------------------------------------------

    def build(self) -> dict[str, Dataset]:
        hp = self.hparams
        if self.root is None:
            found = _digits(self.seed)
            for part in (found.train, found.test):
                part.image = fit(part.image, hp.image_size, hp.channels)
        else:
            found = read_pictures(self.root, hp.image_size, hp.channels)
        train, test = found.train, found.test
        self.class_names, self.shape, self.sites = found.classes, list(train.image.shape[1:]), found.sites
        if not len(train) or not len(test):
            raise ZooError(f"{self.root} holds {len(train)} training and {len(test)} test pictures; need both.")
        keep = torch.arange(len(train))
        if hp.per_class is not None or hp.long_tail < 1:
            keep = self._thin(train.label)
        order = keep[torch.randperm(len(keep), generator=self._draws("val"))]
        held = order[: round(hp.val * len(order))]
        pool = order[len(held) :].sort().values
        self.images = train.image
        self.labels = self.clean = train.label
        self.shares = self._divide(pool, train.site)
        self.labels = self._noisy(self.clean)
        if hp.shifts:
            self.images = self.images.clone()
            for client, own in enumerate(self.shares):
                self.images[own] = self.shifted(self.images[own], client)
        sets: dict[str, Dataset] = {"train": _Rounds(self), "test": _Scored(self, test, "test")}
        if len(held):
            site = None if train.site is None else train.site[held]
            sets["val"] = _Scored(self, Pictures(train.image[held], train.label[held], site), "val")
        return sets

    def shifted(self, images: Tensor, client: int) -> Tensor:
        """Pictures as this client sees them."""
        kinds = self.hparams.shifts
        return shift(images, kinds[client % len(kinds)], self._draws("shift", client)) if kinds else images

    def _draws(self, *words: object) -> torch.Generator:
        return torch.Generator().manual_seed(seed_from(self.seed, *words))

    def _thin(self, labels: Tensor) -> Tensor:
        """Fewer of each class: at most ``per_class``, falling exponentially to ``long_tail`` of it."""
        hp, classes = self.hparams, len(self.class_names)
        most = hp.per_class or int(torch.bincount(labels, minlength=classes).max())
        kept = []
        for label in range(classes):
            where = (labels == label).nonzero().flatten()
            wanted = max(int(most * hp.long_tail ** (label / max(classes - 1, 1))), 1)
            kept.append(where[torch.randperm(len(where), generator=self._draws("thin", label))[:wanted]])
        return torch.cat(kept)

    def _divide(self, pool: Tensor, site: Tensor | None) -> list[Tensor]:
        hp = self.hparams
        file = None if hp.partition_file is None else Path(hp.partition_file)
        if file is not None and file.is_file():
            return self._read_partition(file)
        if hp.partition == "natural":
            if site is None:
                raise ZooError(
                    "partition='natural' needs a set with sites: client_<x>/ folders, clients.csv, or .npz files."
                )
            shares = [pool[site[pool] == i] for i in range(len(self.sites))]
            self.site_of = list(range(len(self.sites)))
        else:
            clients = hp.clients or len(self.sites) or 10
            self.site_of = [client % max(len(self.sites), 1) for client in range(clients)]
            groups = [pool] if site is None else [pool[site[pool] == i] for i in range(len(self.sites))]
            shares = [torch.zeros(0, dtype=torch.long)] * clients
            for i, group in enumerate(groups):  # the clients of a site divide what it has
                own = [client for client in range(clients) if self.site_of[client] == i]
                if own:
                    found = divide(self.labels[group], len(own), hp, len(self.class_names), self._draws)
                    for client, share in zip(own, found, strict=True):
                        shares[client] = group[share]
        empty = [i for i, share in enumerate(shares) if len(share) == 0]
        if empty:
            raise ZooError(f"Client {empty[0]} has no samples; leave it out, or ask for fewer clients.")
        if file is not None:
            with atomic_write(file) as part:
                part.write_text(json.dumps({"clients": [share.tolist() for share in shares]}), encoding="utf-8")
        return shares

    def _read_partition(self, file: Path) -> list[Tensor]:
        try:
            lists = json.loads(file.read_text(encoding="utf-8"))["clients"]
            shares = [torch.tensor(own, dtype=torch.long) for own in lists]
        except (ValueError, KeyError, TypeError) as error:
            raise ZooError(f'{file} is no partition: expected {{"clients": [[sample, ...], ...]}}.') from error
        far = [int(own.max()) for own in shares if len(own) and int(own.max()) >= len(self.labels)]
        if far or not shares or any(len(own) == 0 or int(own.min()) < 0 for own in shares):
            raise ZooError(f"{file} does not fit {len(self.labels)} samples: empty clients, or sample {far[:1]}.")
        return shares

    def _noisy(self, labels: Tensor) -> Tensor:
        """Labels of which each client has a share replaced by another class."""
        noise = self.hparams.label_noise
        if noise == 0:
            return labels
        noise = noise if isinstance(noise, list) else [noise] * len(self.shares)
        if len(noise) != len(self.shares) or not all(0 <= share <= 1 for share in noise):
            raise ZooError(f"label_noise is {noise}: one number in [0, 1], or one for each of the clients.")
        found = labels.clone()
        for client, (own, share) in enumerate(zip(self.shares, noise, strict=True)):
            draws = self._draws("noise", client)
            wrong = own[torch.rand(len(own), generator=draws) < share]
            step = torch.randint(1, max(len(self.class_names), 2), (len(wrong),), generator=draws)
            found[wrong] = (labels[wrong] + step) % len(self.class_names)
        return found

    def gather(self, clients: Sequence[int]) -> dict[str, Any]:
        """All samples of some clients, one after the other."""
        rows = torch.cat([self.shares[client] for client in clients])
        found = {"image": self.images[rows], "label": self.labels[rows]}
        if self.labels is not self.clean:
            found["clean"] = self.clean[rows]
        return {**found, "client": list(clients), "size": [len(self.shares[client]) for client in clients]}

    # ---- a user's own files -------------------------------------------------------------------------------------

    def read(self, path: Path) -> Dataset:
        """Pictures, or folders of them, in the size that the checkpoint was trained with."""
        if not self.shape:
            self.setup("fit")
        channels, side, _ = self.shape
        items = []
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            try:
                image = open_picture(file, side, channels)
            except ZooError as error:
                self.skip(file, error)
                continue
            name = str(file.relative_to(path)) if path.is_dir() else file.name
            items.append({"image": image, "name": name})
        return Items(items)

    def write(self, predictions: Iterable[dict[str, Any]], path: Path) -> list[Path]:
        """``predictions.csv``: name, class and probability of each picture."""
        names = self.class_names
        found = ({**batch, "class": batch["probability"].argmax(-1)} for batch in predictions)
        rows = ((name, names[c] if c < len(names) else str(c), p) for name, c, p in class_rows(found))
        return write_csv(path, ["name", "class", "probability"], rows)

    # ---- loaders ------------------------------------------------------------------------------------------------

    def loader(self, dataset: Dataset, shuffle: bool = False) -> "DataLoader[Any]":
        """Rounds and sets to score go whole to every process: these share the clients."""
        if not isinstance(dataset, (_Rounds, _Scored)):
            return super().loader(dataset, shuffle)
        sampler = _Order(dataset, 1, self.seed, self if shuffle else None, None)
        return _Loader(_Seeded(dataset, self.seed), batch_size=1, sampler=sampler, collate_fn=_identity)

    def predict_dataloader(self) -> "DataLoader[Any]":
        if "predict" not in self._sets:
            self.setup()
            first = self.dataset("test").pictures.image[:256]  # type: ignore[attr-defined]
            self._sets["predict"] = Items([{"image": image, "name": f"{i:05d}"} for i, image in enumerate(first)])
        return super().predict_dataloader()


class _Rounds(Dataset):
    """One item a round: the samples of the clients that take part."""

    def __init__(self, data: FederatedClassificationDataModule):
        self.data = data

    def __len__(self) -> int:
        return self.data.hparams.rounds

    def batch(self, indices: list[int], generator: torch.Generator) -> dict[str, Any]:
        hp, shares = self.data.hparams, self.data.shares
        seed = generator.initial_seed()
        clients, work = sample_clients(len(shares), hp.per_round or len(shares), seed, hp.dropout, hp.stragglers)
        return self.data.gather(clients) | {"work": work, "seed": [seed_from(seed, client) for client in clients]}


class _Scored(Dataset):
    """Sets to score: the server's own, then each client's."""

    def __init__(self, data: FederatedClassificationDataModule, pictures: Pictures, split: str):
        self.data, self.pictures = data, pictures
        self.sets = [(-1, torch.arange(len(pictures)))]
        hp = data.hparams
        for client, own in enumerate(data.shares if hp.test != "none" else ()):
            counts = torch.bincount(data.clean[own], minlength=len(data.class_names))
            of_site = torch.arange(len(pictures))
            if pictures.site is not None:  # pictures of no site are everybody's
                of_site = ((pictures.site == data.site_of[client]) | (pictures.site < 0)).nonzero().flatten()
            found = local_test(pictures.label[of_site], counts, hp.test, hp.test_per_client, data._draws(split, client))
            if len(found):
                self.sets.append((client, of_site[found]))

        self.items: list[list[int]] = []  # small sets come together
        held = TOGETHER
        for number, (_, own) in enumerate(self.sets):
            held += len(own)
            if held > TOGETHER:
                self.items.append([])
                held = len(own)
            self.items[-1].append(number)

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, indices: list[int], generator: torch.Generator) -> dict[str, Any]:
        chosen = [self.sets[number] for index in indices for number in self.items[index]]
        rows = torch.cat([own for _, own in chosen])
        image = torch.cat([self._seen(client, self.pictures.image[own]) for client, own in chosen])
        sizes = {"client": [client for client, _ in chosen], "size": [len(own) for _, own in chosen]}
        return {"image": image, "label": self.pictures.label[rows], **sizes}

    def _seen(self, client: int, image: Tensor) -> Tensor:
        """Pictures as a client sees them; the server's set holds every kind in turn."""
        kinds = len(self.data.hparams.shifts)
        if client >= 0 or not kinds:
            return self.data.shifted(image, client)
        found = image.clone()
        for kind in range(kinds):
            found[kind::kinds] = self.data.shifted(image[kind::kinds], kind)
        return found


def shift(images: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Pictures of another look: "none", "invert", "rotate:DEGREES", "scale:CONTRAST", "noise:STD" (of [0, 1]).

    Shapes:
        images: (n, c, h, w) uint8; returns: the same
    Raises:
        ZooError: for another word.
    """
    name, _, value = kind.partition(":")
    x = images.float() / 255
    if name == "none":
        return images
    if name == "invert":
        x = 1 - x
    elif name == "rotate":
        from torchvision.transforms.v2 import functional as tf

        x = tf.rotate(x, float(value), interpolation=tf.InterpolationMode.BILINEAR)
    elif name == "scale":
        x = x * float(value)
    elif name == "noise":
        x = x + float(value) * torch.randn(x.shape, generator=generator)
    else:
        raise ZooError(f"No shift {kind!r}; there are none, invert, rotate:DEGREES, scale:CONTRAST and noise:STD.")
    return (255 * x.clamp(0, 1)).round().to(torch.uint8)


# ---- dividing -------------------------------------------------------------------------------------------------------


def divide(labels: Tensor, clients: int, how: Any, classes: int, draws: Any) -> list[Tensor]:
    """Indices of each client's samples.

    Args:
        labels: (n,) long. how: ``partition``, ``alpha``, ``min_size``, ``classes_per_client`` as in the DataModule.
        draws: gives a generator by words.
    Raises:
        ZooError: if there are too few samples for the clients.
    """
    if len(labels) < clients * how.min_size:
        raise ZooError(f"{len(labels)} samples are too few for {clients} clients of at least {how.min_size}.")
    kind = how.partition
    for attempt in range(1000):
        generator = draws("partition", attempt)
        place = _PLACES[kind](labels, clients, how, classes, generator)
        sizes = torch.bincount(place[place >= 0], minlength=clients)
        if int(sizes.min()) >= how.min_size:
            return [(place == client).nonzero().flatten() for client in range(clients)]
    raise ZooError(
        f"No division among {clients} clients in 1000 draws gives each {how.min_size} samples: "
        f"raise alpha ({how.alpha}), lower min_size, or ask for fewer clients."
    )


def _gamma(alpha: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Rows from Dirichlet(alpha)."""
    numbers = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    return torch.from_numpy(numbers.dirichlet([alpha] * shape[-1], shape[0]))


def _by_shares(where: Tensor, shares: Tensor, generator: torch.Generator) -> Tensor:
    """Each of ``where`` gets a client, so that clients have these shares of them."""
    cuts = (shares.cumsum(0)[:-1] * len(where)).round().long()
    owner = torch.bucketize(torch.arange(len(where)), cuts, right=True)
    return owner[torch.randperm(len(where), generator=generator)]


def _dirichlet(labels: Tensor, clients: int, how: Any, classes: int, generator: torch.Generator) -> Tensor:
    shares = _gamma(how.alpha, (classes, clients), generator)
    place = torch.full_like(labels, -1)
    for label in range(classes):
        where = (labels == label).nonzero().flatten()
        place[where] = _by_shares(where, shares[label], generator)
    return place


def _quantity(labels: Tensor, clients: int, how: Any, classes: int, generator: torch.Generator) -> Tensor:
    return _by_shares(torch.arange(len(labels)), _gamma(how.alpha, (1, clients), generator)[0], generator)


def _iid(labels: Tensor, clients: int, how: Any, classes: int, generator: torch.Generator) -> Tensor:
    return torch.arange(len(labels))[torch.randperm(len(labels), generator=generator)] % clients


def _shards(labels: Tensor, clients: int, how: Any, classes: int, generator: torch.Generator) -> Tensor:
    shard = torch.empty_like(labels)
    shard[labels.argsort(stable=True)] = torch.arange(len(labels)) * 2 * clients // len(labels)
    return (torch.randperm(2 * clients, generator=generator) // 2)[shard]


def _classes(labels: Tensor, clients: int, how: Any, classes: int, generator: torch.Generator) -> Tensor:
    per = how.classes_per_client
    if not 1 <= per <= classes:
        raise ZooError(f"classes_per_client is {per}; the set has {classes} classes.")
    turns = -(-clients * per // classes)
    deck = torch.cat([torch.randperm(classes, generator=generator) for _ in range(turns)]).tolist()
    hands: list[list[int]] = [[] for _ in range(clients)]
    for own in hands:  # the next card that the client has not got; at the deck's end, the first class it lacks
        for _ in range(per):
            at = next((i for i, card in enumerate(deck) if card not in own), None)
            own.append(next(c for c in range(classes) if c not in own) if at is None else deck.pop(at))
    owners = torch.tensor(hands)
    place = torch.full_like(labels, -1)
    for label in range(classes):
        having = (owners == label).any(1).nonzero().flatten()
        where = (labels == label).nonzero().flatten()
        if len(having):
            mixed = where[torch.randperm(len(where), generator=generator)]
            place[mixed] = having[torch.arange(len(mixed)) % len(having)]
    return place


_PLACES = {"dirichlet": _dirichlet, "quantity": _quantity, "iid": _iid, "shards": _shards, "classes": _classes}


def local_test(labels: Tensor, counts: Tensor, kind: str, size: int, generator: torch.Generator) -> Tensor:
    """Indices of the samples that a client is tested on.

    Args:
        labels: (n,) of the set to draw from. counts: (k,) training samples of each class that the client has.
        kind: "classes", all samples of its classes; "proportional", about ``size`` in the proportions of its classes
            (at least one of each of them, where there are enough).
    """
    if kind == "classes":
        return (counts[labels] > 0).nonzero().flatten()
    found = []
    for label in counts.nonzero().flatten().tolist():
        where = (labels == label).nonzero().flatten()
        wanted = math.ceil(size * float(counts[label] / counts.sum()))
        found.append(where[torch.randperm(len(where), generator=generator)[:wanted]])
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.long)


# ---- sets -----------------------------------------------------------------------------------------------------------


def _digits(seed: int) -> PictureSet:
    """scikit-learn's digits, 16 grey levels as bytes; a fifth of each class for testing."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy((raw.images * (255 / 16)).round().astype(np.uint8))[:, None]
    labels = torch.from_numpy(raw.target.astype(np.int64))
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        where = (labels == label).nonzero().flatten()
        order = torch.randperm(len(where), generator=torch.Generator().manual_seed(seed_from(seed, "digits", label)))
        test[where[order[: len(where) // 5]]] = True
    parts = [Pictures(images[rows], labels[rows]) for rows in (~test, test)]
    return PictureSet(parts[0], parts[1], [str(i) for i in range(10)])
