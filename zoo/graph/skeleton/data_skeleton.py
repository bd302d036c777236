"""Clips of moving skeletons with one action each: generated, NTU RGB+D and JHMDB in their layouts, and users' own."""

import csv
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from zoo.core import ZooDataModule, ZooError, atomic_write
from zoo.core.seeding import seed_from
from zoo.data.plain import unpickle

log = logging.getLogger(__name__)


class Layout(NamedTuple):
    """How many joints, and the bones as (child, parent), all paths leading to one root."""

    joints: int
    edges: tuple[tuple[int, int], ...]


def _edges(text: str, first: int) -> tuple[tuple[int, int], ...]:
    return tuple(tuple(int(v) - first for v in pair.split("-")) for pair in text.split())  # type: ignore[misc]


LAYOUTS = {
    # spine 1, 2, 21; neck 3; head 4; arms 5..8 and 9..12; legs 13..16 and 17..20; hands 22..25 (Kinect's numbers)
    "ntu": Layout(
        25,
        _edges(
            "1-2 2-21 3-21 4-3 5-21 6-5 7-6 8-7 9-21 10-9 11-10 12-11 13-1 14-13 15-14 16-15 17-1 18-17 19-18 20-19 "
            "22-23 23-8 24-25 25-12",
            1,
        ),
    ),
    # nose 0, neck 1, right arm 2..4, left arm 5..7, right leg 8..10, left leg 11..13, eyes 14, 15, ears 16, 17
    "openpose": Layout(
        18, _edges("4-3 3-2 7-6 6-5 13-12 12-11 10-9 9-8 11-5 8-2 5-1 2-1 0-1 15-0 14-0 17-15 16-14", 0)
    ),
    # neck 0, belly 1, face 2, then right and left in turns: shoulders 3, 4, hips 5, 6, elbows 7, 8, knees 9, 10,
    # wrists 11, 12, ankles 13, 14
    "jhmdb": Layout(15, _edges("0-1 2-0 3-0 4-0 5-1 6-1 7-3 8-4 9-5 10-6 11-7 12-8 13-9 14-10", 0)),
}
ACTIONS = ("left arm slow", "left arm fast", "right arm slow", "right arm fast", "legs slow", "legs fast")


# ---- clips ------------------------------------------------------------------------------------------------------


def resample(clip: Tensor, frames: int) -> Tensor:
    """Linear interpolation along time, first and last frame kept.

    Shapes:
        clip: (t, v, c); returns: (frames, v, c)
    """
    if len(clip) == frames:
        return clip
    if len(clip) == 1:
        return clip.expand(frames, -1, -1)
    flat = clip.flatten(1).T.unsqueeze(0)
    return F.interpolate(flat, frames, mode="linear", align_corners=True)[0].T.reshape(frames, *clip.shape[1:])


def bones(skeleton: Tensor, layout: str) -> Tensor:
    """Each joint less its parent; the root 0.

    Shapes:
        skeleton: (..., v, m); returns: the same
    """
    found = torch.zeros_like(skeleton)
    for child, parent in LAYOUTS[layout].edges:
        found[..., child, :] = skeleton[..., child, :] - skeleton[..., parent, :]
    return found


def generate(count: int, frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """People who swing one limb, slowly or fast, seen from changing sides; the second person is absent.

    The limb tells three pairs of actions apart; within a pair only the speed differs. Phase, amplitude and viewing
    angle are random, so that no single frame shows it.

    Shapes:
        returns: skeleton (count, 3, frames, 25, 2), label (count,)
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    height = torch.tensor([0, 1, 3, 4, 2, 1, 0, -1, 2, 1, 0, -1, 0, -1, -2, -3, 0, -1, -2, -3, 2, -1, -1, -1, -1.0]) / 4
    side = torch.zeros(25)
    for joints, x in (((4, 5, 6, 7, 21, 22), -0.25), ((8, 9, 10, 11, 23, 24), 0.25)):
        side[list(joints)] = x
    side[12:16], side[16:20] = -0.12, 0.12
    pose = torch.stack([side, height, torch.zeros(25)])  # (3, 25)
    reach = torch.zeros(3, 25)  # how far each joint swings, by limb
    for limb, chains in enumerate((((5, 6, 7, 21, 22),), ((9, 10, 11, 23, 24),), ((13, 14, 15), (17, 18, 19)))):
        for chain in chains:
            reach[limb, list(chain)] = torch.linspace(0.3, 0.6, len(chain))
    reach[2, 17:20] *= -1  # legs swing against each other
    label = torch.randint(0, len(ACTIONS), (count,), generator=generator)
    cycles = torch.where(label % 2 == 0, 2.0, 3.5) * uniform(0.9, 1.1, count)
    time = torch.arange(frames) / frames
    swing = torch.sin(2 * math.pi * (cycles.unsqueeze(1) * time + uniform(0, 1, count, 1)))  # (b, t)
    swing = swing * uniform(0.7, 1.3, count, 1)
    clip = pose.unsqueeze(1) + torch.zeros(count, 3, frames, 25)
    clip[:, 2] += swing.unsqueeze(-1) * reach[label // 2].unsqueeze(1)  # forwards and back
    clip = clip + 0.05 * torch.randn(count, 3, 1, 25, generator=generator)  # no two people are alike
    clip = clip + 0.02 * torch.randn(clip.shape, generator=generator)
    yaw = uniform(-math.pi / 6, math.pi / 6, count, 1, 1)
    x, z = clip[:, 0].clone(), clip[:, 2].clone()
    clip[:, 0], clip[:, 2] = yaw.cos() * x + yaw.sin() * z, yaw.cos() * z - yaw.sin() * x
    return torch.stack([clip, torch.zeros_like(clip)], -1), label


class Clips(Dataset):
    """Clips of equal length.

    Shapes:
        skeleton: (n, c, t, v, m), an array on disk or a tensor; label: (n,) or None
    """

    def __init__(self, skeleton: Any, label: Tensor | None, names: list[str], layout: str, stream: str):
        self.skeleton, self.label, self.names = skeleton, label, names
        self.layout, self.stream = layout, stream

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        clip = torch.as_tensor(np.array(self.skeleton[index], dtype=np.float32))
        if "bone" in self.stream:
            clip = bones(clip, self.layout)
        if "motion" in self.stream:
            clip = F.pad(clip[:, 1:] - clip[:, :-1], (0, 0, 0, 0, 0, 1))
        item: dict[str, Any] = {"skeleton": clip, "name": self.names[index]}
        if self.label is not None:
            item["label"] = self.label[index]
        return item


class SkeletonActionDataModule(ZooDataModule):
    """Clips of skeletons with one action each.

    Batch: "skeleton": (b, c, t, v, m) float32 coordinates of v joints of m people over t frames; "label": (b,) int64;
    "name": list[str].

    root=None: generated people who swing an arm or the legs, slowly or fast: 25 joints, 32 frames, 6 actions.

    root=DIR: NTU RGB+D or Kinetics-Skeleton as 2s-AGCN prepares them, DIR/{train,test}_data_joint.npy with
    {train,test}_label.pkl (or {train,val}_data_joint.npy with {train,val}_label.pkl), or JHMDB as DD-Net prepares it,
    DIR/GT_{train,test}_{1,2,3}.pkl. Validation is a part of the training clips. Licence: NTU for academic use only;
    Kinetics-Skeleton CC BY 4.0; DD-Net's JHMDB MIT.

    A user's own clips: .npy or .npz (array pose) of shape (frames, joints, coordinates) or (frames, joints,
    coordinates, people), .csv with a row a frame and the coordinates of joint after joint, or NTU's .skeleton; one file
    a clip, or a folder of them. They are brought to ``frames`` frames.

    Args:
        batch_size: clips a batch.
        layout: "ntu" (25 joints), "openpose" (18) or "jhmdb" (15); root=None serves "ntu".
        frames: length that JHMDB's and users' clips are resampled to; of generated clips.
        persons: people of users' clips; missing ones are zeros, others left out.
        stream: "joint", "bone" (joint less parent), "joint_motion" or "bone_motion" (change to the next frame).
        split: which of JHMDB's three splits.
        train_size: generated clips to train on.
        val_size: generated clips to choose the checkpoint by.
        test_size: generated clips to test on.
        val_fraction: share of the training clips of real sets that validates.
        class_names: names of the actions for `write`; the labels' own numbers where there are none.
    """

    embedded: ClassVar[str] = "generated people who swing an arm or the legs"

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        layout: Literal["ntu", "openpose", "jhmdb"] = "ntu",
        frames: int = 32,
        persons: int = 2,
        stream: Literal["joint", "bone", "joint_motion", "bone_motion"] = "joint",
        split: int = 1,
        train_size: int = 600,
        val_size: int = 100,
        test_size: int = 300,
        val_fraction: float = 0.1,
        class_names: list[str] = [],  # noqa: B006
    ):
        super().__init__(root, batch_size, num_workers, seed)
        self.save_hyperparameters()
        if layout not in LAYOUTS or stream not in ("joint", "bone", "joint_motion", "bone_motion"):
            raise ValueError(f"layout is {layout!r} ({', '.join(LAYOUTS)}) and stream {stream!r} (joint, bone, ...).")
        if (
            min(frames, persons, train_size, val_size, test_size) < 1
            or split not in (1, 2, 3)
            or not 0 <= val_fraction < 1
        ):
            raise ValueError(
                f"frames={frames}, persons={persons} and the sizes must be at least 1, split={split} 1...3, "
                f"val_fraction={val_fraction} in [0, 1)."
            )
        self._names: list[str] = list(ACTIONS) if root is None and layout == "ntu" else []

    def _clips(self, skeleton: Any, label: Tensor | None, names: list[str]) -> Clips:
        return Clips(skeleton, label, names, self.hparams.layout, self.hparams.stream)

    def build(self) -> dict[str, Dataset]:
        hp = self.hparams
        if self.root is None and hp.layout != "ntu":
            raise ValueError(f"The generated clips have layout 'ntu'; layout {hp.layout!r} needs a root.")
        if self.root is None:
            sizes, found = {"train": hp.train_size, "val": hp.val_size, "test": hp.test_size}, {}
            for split, size in sizes.items():
                draw = torch.Generator().manual_seed(seed_from("skeletons", hp.seed, split))
                clips, label = generate(size, hp.frames, draw)
                found[split] = self._clips(clips, label, [f"{split}{i:05d}" for i in range(size)])
            return found  # type: ignore[return-value]
        read = self._read_jhmdb if (self.root / f"GT_train_{hp.split}.pkl").exists() else self._read_agcn
        train, test = read("train"), read("test")
        skeleton, label, names = train
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed_from("val", hp.seed))).tolist()
        val = sorted(order[: int(hp.val_fraction * len(names))])
        rest = sorted(order[len(val) :])
        sets: dict[str, Dataset] = {"test": self._clips(*test)}
        for split, which in (("train", rest), ("val", val)):
            if which:
                part = _Rows(skeleton, which)
                sets[split] = self._clips(part, label[which], [names[i] for i in which])
        return sets

    def _read_agcn(self, split: str) -> tuple[Any, Tensor, list[str]]:
        assert self.root is not None
        if split == "test" and not (self.root / "test_label.pkl").exists():
            split = "val"
        what = "2s-AGCN's prepared set (NTU: data_gen/ntu_gendata.py, Kinetics: kinetics_gendata.py)"
        data = self.need(f"{split}_data_joint.npy", expected=what, get="https://github.com/lshiwjx/2s-AGCN")
        label_path = self.need(f"{split}_label.pkl", expected=what)
        content = unpickle(label_path)
        skeleton = np.load(data, mmap_mode="r")
        joints = LAYOUTS[self.hparams.layout].joints
        if not (isinstance(content, (tuple, list)) and len(content) == 2 and len(content[0]) == len(content[1])):
            raise ZooError(f"{label_path.name} holds no pair of names and labels of one length.")
        if skeleton.ndim != 5 or skeleton.shape[3] != joints or len(skeleton) != len(content[0]):
            raise ZooError(
                f"{data.name} has shape {skeleton.shape}; expected ({len(content[0])} clips as in {label_path.name}, "
                f"coordinates, frames, {joints} joints of layout {self.hparams.layout!r}, people)."
            )
        return skeleton, torch.tensor([int(v) for v in content[1]]), [str(n) for n in content[0]]

    def _read_jhmdb(self, split: str) -> tuple[Any, Tensor, list[str]]:
        if self.hparams.layout != "jhmdb":
            raise ZooError(f"{self.root} holds JHMDB's clips; they need layout='jhmdb'.")
        clips, labels = {}, {}
        for part in ("train", "test"):
            path = self.need(
                f"GT_{part}_{self.hparams.split}.pkl",
                expected="DD-Net's JHMDB",
                get="https://github.com/fandulu/DD-Net",
            )
            content = unpickle(path)
            if not isinstance(content, dict) or not {"pose", "label"} <= content.keys():
                raise ZooError(f"{path.name} holds no dictionary with pose and label.")
            clips[part], labels[part] = content["pose"], [str(v) for v in content["label"]]
        self._names = sorted({*labels["train"], *labels["test"]})
        number = {name: i for i, name in enumerate(self._names)}
        found = [self._one(torch.as_tensor(np.asarray(p, np.float32)).reshape(-1, 15, 2)) for p in clips[split]]
        names = [f"{split}{self.hparams.split}_{i:04d}" for i in range(len(found))]
        return torch.stack(found), torch.tensor([number[v] for v in labels[split]]), names

    def _one(self, clip: Tensor, persons: int = 1) -> Tensor:
        """(t, v, c) or (t, v, c, m) as (c, frames, v, persons)."""
        clip = clip.unsqueeze(-1) if clip.ndim == 3 else clip
        people = [resample(clip[..., i], self.hparams.frames) for i in range(min(persons, clip.shape[-1]))]
        people += [torch.zeros_like(people[0])] * (persons - len(people))
        return torch.stack(people, -1).permute(2, 0, 1, 3)

    def describe(self) -> dict[str, Any]:
        """Sizes that a model needs: ``layout``, ``in_channels``, ``persons``, ``num_classes``."""
        train: Any = self.dataset("train")
        shape = train[0]["skeleton"].shape
        test: Any = self.dataset("test")
        classes = len(self._names) or int(max(train.label.max(), test.label.max())) + 1
        return {
            "layout": self.hparams.layout,
            "in_channels": shape[0],
            "persons": shape[-1],
            "num_classes": classes,
        }

    # ---- users' own clips ---------------------------------------------------------------------------------------

    def read(self, path: Path) -> Dataset:
        """.npy, .npz, .csv and .skeleton files, one a clip; or a folder of them."""
        files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES) if path.is_dir() else [path]
        clips, names = [], []
        for file in files:
            try:
                clip = self._one(read_clip(file, LAYOUTS[self.hparams.layout].joints), self.hparams.persons)
                if clips and clip.shape != clips[0].shape:
                    raise ZooError(f"{clip.shape[0]} coordinates a joint, {clips[0].shape[0]} in the files before.")
            except (ZooError, ValueError, OSError) as error:
                self.skip(file, str(error).splitlines()[0][:200])
                continue
            clips.append(clip)
            names.append(file.stem)
        return self._clips(torch.stack(clips) if clips else torch.zeros(0), None, names)

    def write(self, predictions: Iterable[dict[str, Any]], path: Path) -> list[Path]:
        """``actions.csv`` in a folder, or one .csv: name, action, probability, then the probability of every action."""
        parts = list(predictions)
        if not parts:
            raise ZooError("No predictions to write.")
        probability = torch.cat([p["probability"].float().cpu() for p in parts])
        label = torch.cat([p["label"].cpu() for p in parts])
        given = list(self.hparams.class_names) or self._names
        actions = given if len(given) == probability.shape[1] else [str(i) for i in range(probability.shape[1])]
        target = path if path.suffix == ".csv" else path / "actions.csv"
        with atomic_write(target) as part, open(part, "w", newline="", encoding="utf-8") as stream:
            rows = csv.writer(stream)
            rows.writerow(["name", "action", "probability", *actions])
            for name, best, row in zip((n for p in parts for n in p["name"]), label, probability, strict=True):
                rows.writerow([name, actions[best], f"{float(row[best]):.6f}", *(f"{v:.6f}" for v in row.tolist())])
        return [target]


class _Rows:
    """Some rows of an array on disk, read when they are asked for."""

    def __init__(self, array: Any, rows: list[int]):
        self.array, self.rows = array, rows

    def __getitem__(self, index: int) -> Any:
        return self.array[self.rows[index]]


# ---- files ------------------------------------------------------------------------------------------------------

SUFFIXES = (".npy", ".npz", ".csv", ".skeleton")


def read_clip(path: Path, joints: int) -> Tensor:
    """One clip of the user's: (t, v, c) or (t, v, c, m) float32.

    Raises:
        ZooError: saying what is wrong with the file.
    """
    if path.suffix == ".skeleton":
        clip = _read_ntu(path)
    elif path.suffix == ".csv":
        clip = _read_csv(path, joints)
    elif path.suffix in (".npy", ".npz"):
        try:
            loaded = np.load(path, allow_pickle=False)
            if path.suffix == ".npz":
                with loaded:
                    key = "pose" if "pose" in loaded.files else loaded.files[0] if len(loaded.files) == 1 else None
                    if key is None:
                        raise ZooError(f"it holds {', '.join(loaded.files)}; expected an array pose.")
                    loaded = loaded[key]
        except ZooError:
            raise
        except Exception as error:
            raise ZooError(f"it cannot be read: {str(error).splitlines()[0][:120]}") from error
        if loaded.dtype.kind not in "fiu":
            raise ZooError(f"it holds {loaded.dtype}; expected numbers.")
        clip = torch.from_numpy(loaded.astype(np.float32))
    else:
        raise ZooError(f"expected one of {', '.join(SUFFIXES)}.")
    if clip.ndim not in (3, 4) or 0 in clip.shape or clip.shape[1] != joints:
        raise ZooError(
            f"it has shape {tuple(clip.shape)}; expected (frames, {joints} joints, coordinates) or one more for people."
        )
    if not bool(clip.isfinite().all()):
        raise ZooError("it holds NaN or infinite coordinates.")
    return clip


def _read_csv(path: Path, joints: int) -> Tensor:
    with open(path, newline="", encoding="utf-8-sig") as stream:
        rows = [row for row in csv.reader(stream) if row]
    try:
        values = np.array([[float(v) for v in row] for row in rows[0:]], np.float32)
    except ValueError:
        try:  # a line of names first
            values = np.array([[float(v) for v in row] for row in rows[1:]], np.float32)
        except ValueError as error:
            raise ZooError(f"not every row holds the same count of numbers: {str(error)[:80]}.") from error
    if values.ndim != 2 or len(values) == 0 or values.shape[1] % joints:
        raise ZooError(
            f"it has {values.shape[-1] if values.ndim == 2 else 0} columns; expected a multiple of {joints}."
        )
    return torch.from_numpy(values).view(len(values), joints, -1)


def _read_ntu(path: Path) -> Tensor:
    """NTU's text: frames; for each the bodies; for each body a line of its own, the count of joints and their lines."""
    tokens = path.read_text(encoding="utf-8").split("\n")
    try:
        at, frames = 1, []
        for _ in range(int(tokens[0])):
            bodies, at = {}, at
            count, at = int(tokens[at]), at + 1
            for _ in range(count):
                body = tokens[at].split()[0]
                joints = int(tokens[at + 1])
                lines = tokens[at + 2 : at + 2 + joints]
                bodies[body] = np.array([[float(v) for v in line.split()[:3]] for line in lines], np.float32)
                at += 2 + joints
            frames.append(bodies)
    except (ValueError, IndexError) as error:
        raise ZooError(f"it is not in NTU's .skeleton form: {str(error)[:80]}") from error
    order = list(dict.fromkeys(body for bodies in frames for body in bodies))
    if not order:
        raise ZooError("it shows nobody.")
    shape = next(iter(next(b for b in frames if b).values())).shape
    missing = np.zeros(shape, np.float32)
    return torch.from_numpy(np.stack([np.stack([b.get(body, missing) for b in frames]) for body in order], -1))
