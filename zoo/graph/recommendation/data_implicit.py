"""Implicit feedback for collaborative filtering: who interacted with what, as pairs with a sampled negative."""

import csv
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from zoo.core import ZooDataModule, ZooError, atomic_write, seed_from

log = logging.getLogger(__name__)

SPLITS = ("random", "time", "leave_one_out")
PLANTED = ("communities", "interests")
COLUMNS = {
    "user": ("user", "user_id", "userid", "uid"),
    "item": ("item", "item_id", "itemid", "iid", "movie_id"),
    "time": ("time", "timestamp", "date"),
    "rating": ("rating", "score", "stars", "weight"),
}
MAX_SHOWN = 3


class Pairs(Dataset):
    """Training pairs; a whole batch is drawn at once, with one negative a pair that its user has not in training."""

    def __init__(self, pairs: Tensor, users: int, items: int, graph: Tensor):
        self.pairs, self.items, self.graph = pairs, items, graph
        self.known = (pairs[0] * items + pairs[1]).sort().values

    def __len__(self) -> int:
        return self.pairs.shape[1]

    def batch(self, indices: list[int], generator: torch.Generator) -> dict[str, Tensor]:
        user, item = self.pairs[:, torch.tensor(indices)]
        return {"user": user, "item": item, "negative": self.negatives(user, generator), **_graph(self.graph)}

    def negatives(self, user: Tensor, generator: torch.Generator) -> Tensor:
        """One item a user, uniform over those that the user has not. Shapes: (b,); returns (b,)."""
        negative = torch.randint(self.items, user.shape, generator=generator)
        redo = self._has(user, negative).nonzero()[:, 0]
        while len(redo):  # a few percent of the last round each time
            negative[redo] = torch.randint(self.items, redo.shape, generator=generator)
            redo = redo[self._has(user[redo], negative[redo])]
        return negative

    def _has(self, user: Tensor, item: Tensor) -> Tensor:
        key = user * self.items + item
        place = torch.searchsorted(self.known, key).clamp(max=len(self.known) - 1)
        return self.known[place] == key


class Ranking(Dataset):
    """Users to rank all items for, with their held-out items; ``minor`` are pairs of a user and a lesser interest."""

    def __init__(
        self,
        users: Tensor,
        names: list[str],
        graph: Tensor | None,
        target: Tensor | None,
        seen: Tensor | None,
        minor: Tensor | None = None,
    ):
        self.users, self.names, self.graph = users, names, graph
        self.minor = None if minor is None else _Ragged(minor)
        self.target = None if target is None else _Ragged(target)
        self.seen = None if seen is None else _Ragged(seen)

    def __len__(self) -> int:
        return len(self.users)

    def batch(self, indices: list[int], generator: torch.Generator) -> dict[str, Any]:
        user = self.users[torch.tensor(indices)]
        batch: dict[str, Any] = {"user": user, "name": [self.names[u] for u in user.tolist()], **_graph(self.graph)}
        if self.target is not None:
            batch["target"] = self.target.padded(user)
            batch["seen"] = user.new_empty(len(user), 0) if self.seen is None else self.seen.padded(user)
            if self.minor is not None:
                minor = self.minor.padded(user)
                same = batch["target"][:, :, None] == minor[:, None].where(minor[:, None] >= 0, -2)
                batch["minority"] = same.any(2)
        return batch


class _Ragged:
    """(2, t) pairs of user and item, looked up by user."""

    def __init__(self, pairs: Tensor):
        order = pairs[0].argsort(stable=True)
        self.user, self.item = pairs[:, order]

    def padded(self, user: Tensor) -> Tensor:
        """The items of each user, (b, most), padded with -1."""
        start, end = torch.searchsorted(self.user, user), torch.searchsorted(self.user, user, right=True)
        place = start[:, None] + torch.arange(int((end - start).max()))
        inside = place < end[:, None]
        return self.item[place.clamp(max=max(len(self.item) - 1, 0))].where(inside, -1) if len(self.item) else place


def _graph(graph: Tensor | None) -> dict[str, Tensor]:
    # The main process hands out the same tensor each time, so it costs nothing; a worker would copy it every batch.
    return {"graph": graph} if graph is not None and get_worker_info() is None else {}


class ImplicitCFDataModule(ZooDataModule):
    """Implicit feedback. Batch for training: "user", "item", "negative": (b,) int64, and "graph": (2, e) int64, all
    training interactions (the same tensor every time). For validation, test and prediction: "user": (b,); "name":
    list[str], the users' own ids; "target" (b, t) and "seen" (b, s), held-out items and further items to leave out of
    the ranking, padded with -1; "graph"; with planted interests "minority": (b, t) bool, the targets outside their
    user's largest interest.

    root=None: drawn from the seed. 600 users and 400 items in 8 communities, 15 items a user, 85 % of them from its own
    community; or (``planted="interests"``) 600 users with two or three interests of unequal size among 18, 360 items.

    root=DIR: one of four layouts. LightGCN's: DIR/train.txt and DIR/test.txt, one user a line, "user item item ...",
    numbers from 0 (optional: DIR/val.txt in the same form; DIR/user_list.txt and DIR/item_list.txt, "org_id remap_id",
    for names). LibCML's: DIR/users.dat, one user a line, "count item item ...", split 3:1:1 exactly as published
    (whatever the seed). RecBole's: DIR/NAME.inter, tab-separated with typed header ("user_id:token item_id:token
    rating:float timestamp:float"). Your own: one DIR/*.csv with a header of user,item[,time][,rating], any ids.

    What happens to odd data: repeated pairs count once; a held-out pair that is also in training is dropped; a rating
    column needs ``min_rating``; users with too few interactions for a split stay in training; a LightGCN user without a
    training item is refused, one without a test item is not evaluated; a LibCML user with fewer than 5 items is left
    out; an item without a training interaction is ranked like any other. Each is logged with its count.

    Licences: Gowalla (SNAP) states none; the generated set is this library's.

    Args:
        root: folder, see above.
        batch_size: pairs a training step, and users a ranking step (which works in blocks of its own).
        num_workers: processes that draw batches; with any, "graph" is left out of the batches: the Trainer's
            DataModule must be this one, or the model's graph be set by hand.
        seed: of the order, the negatives, the split and the generated set.
        split: for RecBole's layout, a CSV and the generated set: ``"random"`` or ``"time"`` (the latest are held out)
            per user by the two fractions, or ``"leave_one_out"``: the last one tests, the one before validates (random
            ones where there is no time column).
        test_fraction: share of a user's interactions held out for testing, rounded down.
        val_fraction: share of a user's (in LightGCN's layout: training) interactions held out for validation, rounded
            down; 0 for none. A val.txt stands in for it.
        min_rating: with ratings, those at least this high count as interactions; 0 takes all.
        user_limit: in LightGCN's layout, keep only the first so many users and the items they have in training: a
            smaller set for a smaller budget. Not the published split any more.
        hide_validation: leave the validation items out of the test ranking; False ranks them among the others, as
            LibCML's evaluation does.
        planted: what the generated set holds, ``"communities"`` or ``"interests"``, see above.
    Raises:
        FileNotFoundError: if a file is missing.
        ZooError: if a file is malformed, naming the line, or nothing would be left to train on.
    Example:
        >>> data = ImplicitCFDataModule(batch_size=4)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch["user"].shape, batch["graph"].shape
        (torch.Size([4]), torch.Size([2, 6600]))
    """

    embedded = "generated users and items in communities (or users with several interests, planted='interests')"

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 512,
        num_workers: int = 0,
        seed: int = 0,
        split: str = "random",
        test_fraction: float = 0.2,
        val_fraction: float = 0.1,
        min_rating: float | None = None,
        user_limit: int | None = None,
        hide_validation: bool = True,
        planted: str = "communities",
    ):
        super().__init__(root, batch_size, num_workers, seed)
        self.save_hyperparameters()
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; expected {', '.join(SPLITS)}.")
        if not (0 <= val_fraction < 1 and 0 < test_fraction < 1 and val_fraction + test_fraction < 1):
            raise ValueError(
                f"test_fraction is {test_fraction} and val_fraction {val_fraction}; expected 0 < test_fraction, "
                "0 <= val_fraction, and together less than 1."
            )
        if user_limit is not None and user_limit < 1:
            raise ValueError(f"user_limit is {user_limit}; it must be at least 1, or None for all users.")
        if planted not in PLANTED:
            raise ValueError(f"planted is {planted!r}; expected {' or '.join(PLANTED)}.")
        self.split, self.test_fraction, self.val_fraction = split, test_fraction, val_fraction
        self.hide_validation, self.planted = hide_validation, planted
        self.min_rating, self.user_limit = min_rating, user_limit
        self.user_names: list[str] = []
        self.item_names: list[str] = []
        self._graph: Tensor | None = None
        self._minor: Tensor | None = None
        self._recalled: tuple[list[str], list[str]] | None = None

    # ---- building -----------------------------------------------------------------------------------------------

    def build(self) -> dict[str, Dataset]:
        parts = self._load()
        users, items = len(self.user_names), len(self.item_names)
        train = _distinct(parts["train"], items, "training")
        _check_users(train, users, items, str(self.root))
        known = train[0] * items + train[1]
        held = {}
        for name in ("val", "test"):
            pairs = _distinct(parts[name], items, name)
            fresh = ~torch.isin(pairs[0] * items + pairs[1], known)
            if not fresh.all():
                log.warning("%d of %d %s pairs are also in training; dropped.", int((~fresh).sum()), len(fresh), name)
            held[name] = pairs[:, fresh]
        if torch.cuda.is_available() and not self.num_workers:
            # the loader then has nothing left to copy; a forked worker could not read it
            train = train.pin_memory()
        self._graph = train
        sets: dict[str, Dataset] = {"train": Pairs(train, users, items, train)}
        if held["val"].shape[1]:
            users_in = held["val"][0].unique()
            sets["val"] = Ranking(users_in, self.user_names, train, held["val"], None, self._minor)
        if held["test"].shape[1]:
            also = held["val"] if held["val"].shape[1] and self.hide_validation else None
            users_in = held["test"][0].unique()
            sets["test"] = Ranking(users_in, self.user_names, train, held["test"], also, self._minor)
        return sets

    def _load(self) -> dict[str, Tensor]:
        """(2, n) pairs by split, and the names."""
        if self.root is None:
            users, items = (600, 400) if self.planted == "communities" else (600, 360)
            self.user_names = [f"user{u}" for u in range(users)]
            self.item_names = [f"item{i}" for i in range(items)]
            if self.planted == "communities":
                return self._hold_out(communities(self.seed), None)
            pairs, minor = interests(self.seed)
            self._minor = pairs[:, minor]
            return self._hold_out(pairs, None)
        if (self.root / "train.txt").exists():
            return self._lightgcn()
        if (self.root / "users.dat").exists():
            return self._libcml()
        tables = sorted(self.root.glob("*.inter")) or sorted(self.root.glob("*.csv"))
        if len(tables) != 1:
            found = ", ".join(p.name for p in tables) or "none of them"
            raise FileNotFoundError(
                f"{self.root}: expected train.txt and test.txt (LightGCN), users.dat (LibCML), one NAME.inter "
                f"(RecBole), or one .csv with columns user,item[,time]; found {found}."
            )
        pairs, time, self.user_names, self.item_names = _read_table(tables[0], self.min_rating)
        return self._hold_out(pairs, time)

    def _lightgcn(self) -> dict[str, Tensor]:
        assert self.root is not None
        train, listed = _adjacency(self.root / "train.txt")
        test, also = _adjacency(
            self.need("test.txt", expected="held-out items, one user a line, 'user item item ...'", get="It comes with "
                      "train.txt, e.g. in https://github.com/gusye1234/LightGCN-PyTorch/tree/master/data.")
        )  # fmt: skip
        given = self.root / "val.txt"
        val, more = _adjacency(given) if given.exists() else (torch.zeros(2, 0, dtype=torch.int64), 0)
        users = max(listed, also, more)
        items = int(max(p[1].max() if p.shape[1] else -1 for p in (train, val, test))) + 1
        if not train.shape[1]:
            raise ZooError(f"{self.root / 'train.txt'} holds no interaction.")
        self.user_names = _names(self.root / "user_list.txt", users)
        self.item_names = _names(self.root / "item_list.txt", items)
        if self.user_limit is not None and self.user_limit < users:
            train, val, test = (p[:, p[0] < self.user_limit] for p in (train, val, test))
            kept = train[1].unique()
            number = torch.full((items,), -1)
            number[kept] = torch.arange(len(kept))
            train, val, test = (torch.stack([p[0], number[p[1]]])[:, number[p[1]] >= 0] for p in (train, val, test))
            self.user_names = self.user_names[: self.user_limit]
            self.item_names = [self.item_names[i] for i in kept.tolist()]
        if not given.exists() and self.val_fraction:
            train = _distinct(train, items, "training")
            share = _share(torch.bincount(train[0]), self.val_fraction)
            return {**self._cut(train, None, share, 0 * share), "test": test}
        return {"train": train, "val": val, "test": test}

    def _libcml(self) -> dict[str, Tensor]:
        """Split every user's items 3:1:1 with numpy's old generator, seeded as the authors seed it."""
        assert self.root is not None
        path, rows, few = self.root / "users.dat", [], 0
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            words = line.split()
            if not all(word.isdigit() for word in words) or (words and int(words[0]) != len(words) - 1):
                raise ZooError(f"{path}, line {number}: expected 'count item item ...', got {line[:60]!r}.")
            found = sorted({int(word) for word in words[1:]})
            few += len(found) < 5
            if len(found) >= 5:
                rows.append(found)
        if few:
            log.warning("%d of %d users have fewer than 5 items; left out.", few, few + len(rows))
        if not rows:
            raise ZooError(f"{path} holds no user with 5 items.")
        self.user_names = [str(u) for u in range(len(rows))]
        self.item_names = [str(i) for i in range(max(row[-1] for row in rows) + 1)]
        random, parts = np.random.RandomState(1234), {"train": [], "val": [], "test": []}
        for user, row in enumerate(rows):
            random.shuffle(row)
            train, val = len(row) * 3 // 5, len(row) // 5
            for name, some in (("train", row[:train]), ("val", row[train : train + val]), ("test", row[train + val :])):
                parts[name] += [(user, item) for item in some]
        return {name: torch.tensor(found, dtype=torch.int64).T.contiguous() for name, found in parts.items()}

    def _hold_out(self, pairs: Tensor, time: Tensor | None) -> dict[str, Tensor]:
        """Split by user into training, validation and test."""
        if self.split == "time" and time is None:
            raise ZooError(f"split='time' needs a time column; {self.root or 'the generated set'} has none.")
        pairs, time = _latest(pairs, len(self.item_names), time)
        size = torch.bincount(pairs[0])
        if self.split == "leave_one_out":
            test = torch.ones_like(size)
            val = test if self.val_fraction else 0 * test
        else:
            test, val = _share(size, self.test_fraction), _share(size, self.val_fraction)
        return self._cut(pairs, None if self.split == "random" else time, val, test)

    def _cut(self, pairs: Tensor, time: Tensor | None, val: Tensor, test: Tensor) -> dict[str, Tensor]:
        """Per user: the last (without times: random) ``test`` pairs, the ``val`` before them, at least one to train."""
        generator = torch.Generator().manual_seed(seed_from(self.seed, "split"))
        rank = torch.rand(pairs.shape[1], generator=generator) if time is None else time
        order = rank.argsort(stable=True)
        order = order[pairs[0, order].argsort(stable=True)]
        pairs = pairs[:, order]
        user, size = pairs[0], torch.bincount(pairs[0])
        test = test.minimum(size - 1).clamp(min=0)
        val = val.minimum(size - 1 - test).clamp(min=0)
        from_end = size.cumsum(0)[user] - 1 - torch.arange(len(user))
        is_test = from_end < test[user]
        is_val = ~is_test & (from_end < (test + val)[user])
        return {"train": pairs[:, ~is_test & ~is_val], "val": pairs[:, is_val], "test": pairs[:, is_test]}

    # ---- what models ask ----------------------------------------------------------------------------------------

    def interactions(self) -> Tensor:
        """The training interactions, (2, e) int64 users and items, each pair once."""
        self.dataset("train")
        assert self._graph is not None
        return self._graph

    def describe(self) -> dict[str, Any]:
        size = self.interactions().shape[1]
        return {"num_users": len(self.user_names), "num_items": len(self.item_names), "num_interactions": size}

    # ---- a user's own files -------------------------------------------------------------------------------------

    def remember(self) -> dict[str, Any]:
        """The users' and items' own ids too: a checkpoint numbers them. Ids that are the numbers, as their count."""
        self.dataset("train")
        names = {"user_names": self.user_names, "item_names": self.item_names}
        plain = {key: [str(i) for i in range(len(own))] for key, own in names.items()}
        return super().remember() | {key: len(own) if own == plain[key] else own for key, own in names.items()}

    @classmethod
    def recall(cls, remembered: dict[str, Any], **arguments: Any) -> Self:
        remembered = dict(remembered)
        found = [remembered.pop(key, None) for key in ("user_names", "item_names")]
        data = super().recall(remembered, **arguments)
        if None not in found:
            own = [[str(i) for i in range(names)] if isinstance(names, int) else list(names) for names in found]
            data._recalled = (own[0], own[1])
        return data

    def _names(self) -> bool:
        """Have the ids: those that a checkpoint remembers, else the data's own; True if these were read.

        Raises:
            ZooError: if the data under ``root`` has other ids than the checkpoint.
        """
        if self._recalled and self.root is None:
            self.user_names, self.item_names = self._recalled
            return False
        self.dataset("train")
        if self._recalled and self._recalled != (self.user_names, self.item_names):
            raise ZooError(f"The checkpoint was fitted to other users and items than those in {self.root}.")
        return True

    def read(self, path: Path) -> Dataset:
        """Users to recommend for: a file with one user id a line, or a CSV with a column "user" (ids as in the training
        data). Unknown users are named and skipped, repeated ones count once."""
        graph = self.interactions() if self._names() else None
        number = {name: u for u, name in enumerate(self.user_names)}
        files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".csv", ".txt"))
        found: dict[int, None] = {}
        for file in files:
            try:
                asked = _user_column(file)
            except (ZooError, UnicodeDecodeError) as error:
                self.skip(file, error)
                continue
            unknown = [name for name in asked if name not in number]
            if unknown:
                shown = ", ".join(unknown[:MAX_SHOWN]) + (", ..." if len(unknown) > MAX_SHOWN else "")
                self.skip(file, f"{len(unknown)} users are not in the training data: {shown}")
            found |= {number[name]: None for name in asked if name in number}
        return Ranking(torch.tensor(list(found), dtype=torch.int64), self.user_names, graph, None, None)

    def write(self, predictions: Iterable[dict[str, Any]], path: Path) -> list[Path]:
        """A CSV of user,rank,item,score with the users' and items' own ids, best first."""
        self._names()
        path = Path(path)
        if path.suffix != ".csv":
            path = path / "recommendations.csv"
        with atomic_write(path) as part, open(part, "w", newline="", encoding="utf-8") as stream:
            rows = csv.writer(stream)
            rows.writerow(["user", "rank", "item", "score"])
            for batch in predictions:
                columns = (batch["name"], batch["item"].tolist(), batch["score"].tolist())
                for name, items, scores in zip(*columns, strict=True):
                    places = enumerate(zip(items, scores, strict=True), start=1)
                    rows.writerows([name, p, self.item_names[i], f"{s:.6g}"] for p, (i, s) in places if i >= 0)
        return [path]


# ---- files -----------------------------------------------------------------------------------------------------------


def _adjacency(path: Path) -> tuple[Tensor, int]:
    """Lines of "user item item ..." as (2, n) pairs, and 1 + the highest user (also one without items).

    Raises:
        ZooError: naming the line that is not whole numbers, or whose user came before.
    """
    users, items, at = [], [], {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            values = np.array(line.split(), dtype=np.int64)
        except ValueError:
            values = np.array([-1])
        if not len(values):
            continue
        if values.min() < 0:
            raise ZooError(f"{path}, line {number}: expected whole numbers 'user item item ...', got {line[:60]!r}.")
        if at.setdefault(int(values[0]), number) != number:
            raise ZooError(f"{path}, line {number}: user {values[0]} was already in line {at[int(values[0])]}.")
        users.append(np.full(len(values) - 1, values[0]))
        items.append(values[1:])
    if not users:
        return torch.zeros(2, 0, dtype=torch.int64), 0
    return torch.from_numpy(np.stack([np.concatenate(users), np.concatenate(items)]).astype(np.int64)), max(at) + 1


def _names(path: Path, size: int) -> list[str]:
    """The ids before renumbering, from "org_id remap_id" lines where there are any, else the numbers themselves."""
    names = [str(i) for i in range(size)]
    if path.exists():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[1:], start=2):
            parts = line.split()
            if len(parts) < 2 or not parts[-1].isdigit():
                raise ZooError(f"{path}, line {number}: expected 'org_id remap_id', got {line[:60]!r}.")
            if int(parts[-1]) < size:
                names[int(parts[-1])] = " ".join(parts[:-1])
    return names


def _rows(path: Path) -> tuple[dict[str, int], Any]:
    """The known columns of a table by name, and a reader of the rows below its header."""
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    reader = csv.reader(lines, delimiter="\t" if path.suffix == ".inter" else ",")
    header = [cell.split(":")[0].strip().lower() for cell in next(reader, [])]
    places = {name: header.index(w) for name, words in COLUMNS.items() for w in reversed(words) if w in header}
    return places, reader


def _read_table(path: Path, min_rating: float | None) -> tuple[Tensor, Tensor | None, list[str], list[str]]:
    """Pairs, times, and the names of users and items, numbered by first appearance.

    Raises:
        ZooError: naming the line that cannot be read, or the missing column; for ratings without ``min_rating``.
    """
    places, reader = _rows(path)
    missing = [name for name in ("user", "item") if name not in places]
    if missing:
        raise ZooError(
            f"{path}: no column {missing[0]!r}. Expected a header line with user,item and optionally time and rating "
            f"({', '.join(COLUMNS[missing[0]])} are understood)."
        )
    if "rating" in places and min_rating is None:
        raise ZooError(
            f"{path} has ratings; implicit feedback is yes or no. Say from which rating on a pair counts: "
            "min_rating=4, or min_rating=0 for all."
        )
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    pairs, times = [], []
    for row in reader:
        if not row:
            continue
        try:
            user, item = row[places["user"]].strip(), row[places["item"]].strip()
            rating = float(row[places["rating"]]) if "rating" in places else None
            time = float(row[places["time"]]) if "time" in places else 0.0
            if not user or not item or time != time:
                raise ValueError
        except (ValueError, IndexError):
            numbers = "".join(f", a number as {name}" for name in ("time", "rating") if name in places)
            raise ZooError(
                f"{path}, line {reader.line_num}: cannot read {','.join(row)[:60]!r}; "
                f"expected a user, an item{numbers}."
            ) from None
        if rating is not None and min_rating is not None and not rating >= min_rating:
            continue
        pairs.append((users.setdefault(user, len(users)), items.setdefault(item, len(items))))
        times.append(time)
    if not pairs:
        raise ZooError(f"{path} holds no interaction{'' if min_rating is None else f' rated {min_rating} or higher'}.")
    time = torch.tensor(times, dtype=torch.float64) if "time" in places else None
    return torch.tensor(pairs, dtype=torch.int64).T.contiguous(), time, list(users), list(items)


def _user_column(path: Path) -> list[str]:
    places, reader = _rows(path)
    if "user" in places:
        cells = [row[places["user"]].strip() for row in reader if len(row) > places["user"]]
        return [cell for cell in cells if cell]
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    if any("," in line for line in lines):
        raise ZooError("no column 'user'. Expected one user id a line, or a CSV with a header that names 'user'")
    return [line.strip() for line in lines if line.strip()]


# ---- pairs -----------------------------------------------------------------------------------------------------------


def _distinct(pairs: Tensor, items: int, name: str) -> Tensor:
    """Sorted by user and item, each pair once."""
    key = (pairs[0] * items + pairs[1]).unique()
    if len(key) < pairs.shape[1]:
        log.warning("%d of %d %s pairs are repeated; counted once.", pairs.shape[1] - len(key), pairs.shape[1], name)
    return torch.stack([key // items, key % items])


def _latest(pairs: Tensor, items: int, time: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Each pair once, at its latest time, sorted."""
    if time is None:
        return _distinct(pairs, items, "given"), None
    key = pairs[0] * items + pairs[1]
    order = time.argsort(stable=True)
    order = order[key[order].argsort(stable=True)]
    last = torch.ones(len(key), dtype=torch.bool)
    last[:-1] = key[order][1:] != key[order][:-1]
    chosen = order[last]
    if len(chosen) < len(key):
        log.warning("%d of %d given pairs are repeated; the latest of each counts.", len(key) - len(chosen), len(key))
    return pairs[:, chosen], time[chosen]


def _share(size: Tensor, fraction: float) -> Tensor:
    """``fraction`` of each size, rounded down (0.1 of 10 is 1, whatever 0.1 is in binary)."""
    return (size.double() * fraction + 1e-9).long()


def _check_users(train: Tensor, users: int, items: int, where: str) -> None:
    count = torch.bincount(train[0], minlength=users)
    empty = (count == 0).nonzero().flatten().tolist()
    if empty:
        raise ZooError(
            f"{where}: {len(empty)} users have no training item (first: {empty[:MAX_SHOWN]}), and nothing can be "
            "learned about them. Remove them and number the others 0, 1, ..."
        )
    full = (count == items).nonzero().flatten().tolist()
    if full:
        raise ZooError(
            f"{where}: {len(full)} users have every one of the {items} items (first: {full[:MAX_SHOWN]}), so there is "
            "no negative to draw and nothing to recommend. Remove them."
        )


def communities(
    seed: int, users: int = 600, items: int = 400, groups: int = 8, clicks: int = 15, own: float = 0.85
) -> Tensor:
    """Interactions of users who mostly stay in their community, (2, users * clicks), each pair once.

    Every user has ``clicks`` distinct items: each is, with probability ``own``, a random one of its community, else a
    random one of all.
    """
    generator = torch.Generator().manual_seed(seed_from(seed, "communities"))
    user_group = torch.arange(users) % groups
    item_group = torch.arange(items) % groups
    inside = user_group[:, None] == item_group
    weight = torch.where(inside, own / inside.sum(1, keepdim=True), 0.0) + (1 - own) / items
    drawn = torch.multinomial(weight, clicks, generator=generator)
    return torch.stack([torch.arange(users).repeat_interleave(clicks), drawn.flatten()])


def interests(
    seed: int,
    users: int = 600,
    clusters: int = 18,
    size: int = 20,
    shares: tuple[tuple[int, ...], ...] = ((16, 6), (13, 5, 4)),
) -> tuple[Tensor, Tensor]:
    """Interactions of users with several interests of unequal size.

    Items come in clusters; user u has as many of them, drawn at random, as ``shares[u % len(shares)]`` has entries, and
    from each as many distinct items as the entry says.

    Shapes:
        returns: (2, e) pairs of user and item, each once; (e,) bool, True outside the user's first, largest interest
    """
    generator = torch.Generator().manual_seed(seed_from(seed, "interests"))
    pairs, minor = [], []
    for user in range(users):
        clicks = shares[user % len(shares)]
        chosen = torch.randperm(clusters, generator=generator)[: len(clicks)].tolist()
        for place, (cluster, count) in enumerate(zip(chosen, clicks, strict=True)):
            items = torch.randperm(size, generator=generator)[:count] * clusters + cluster
            pairs.append(torch.stack([torch.full_like(items, user), items]))
            minor.append(torch.full((count,), place > 0))
    return torch.cat(pairs, dim=1), torch.cat(minor)
