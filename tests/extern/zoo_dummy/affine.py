"""Affine: a classifier small enough to be saved and loaded a hundred times in a test.

Index legend: b batch, f features, k classes.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.core import ZooDataModule, ZooError, ZooModule, atomic_write, check_finite


class Affine(ZooModule):
    """``depth`` linear layers with a normalisation in front and a classifier behind.

    Args:
        width: features of every layer.
        depth: layers.
        num_classes: k.
        length: values of a table that is recomputed, not saved.
        act: name of the activation in ``torch.nn.functional``.
        scales: what each feature group is multiplied by.
        lr: learning rate.
    """

    variants = {"tiny": {"width": 4, "depth": 1}}
    monitor, mode = "val/loss", "min"
    head = ("classifier",)

    def __init__(
        self,
        width: int = 8,
        depth: int = 2,
        num_classes: int = 3,
        length: int = 16,
        act: str = "relu",
        scales: tuple[float, ...] = (1.0, 0.5),
        lr: float = 1e-2,
    ):
        super().__init__()
        self.save_hyperparameters()
        if width < 1 or depth < 1:
            raise ValueError(f"width is {width} and depth {depth}; both must be at least 1.")
        self.norm = nn.BatchNorm1d(width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.drop = nn.Dropout(0.25)
        self.classifier = nn.Linear(width, num_classes)
        self.register_buffer("scale", torch.tensor(scales).sum())
        self.register_buffer("positions", torch.arange(length), persistent=False)
        self.act = getattr(F, act)

    def forward(self, x: Tensor) -> Tensor:
        """(b, f) features to (b, k) logits."""
        x = self.norm(x)
        for layer in self.layers:
            x = x + self.act(layer(self.drop(x)))
        return self.classifier(x * self.scale)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch["x"]), batch["label"])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self(batch["x"]), batch["label"]), batch_size=len(batch["x"]))

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("test/loss", F.cross_entropy(self(batch["x"]), batch["label"]), batch_size=len(batch["x"]))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        logits = self.predict(batch["x"])
        return {"name": batch["name"], "logits": logits, "label": logits.argmax(-1)}

    def predict(self, x: Tensor) -> Tensor:
        check_finite(x, "x")
        if x.ndim != 2 or x.shape[1] != self.hparams.width:
            raise ValueError(f"'x' has shape {tuple(x.shape)}; expected (batch, {self.hparams.width}).")
        return super().predict(x)

    def example_inputs(self) -> tuple[Tensor, ...]:
        return (torch.ones(2, self.hparams.width, device=self.device),)


class _Points(torch.utils.data.Dataset):
    """Rows of features with a label and a name."""

    def __init__(self, x: Tensor, label: Tensor | None, names: list[str], pause: float = 0.0):
        self.x, self.label, self.names, self.pause = x, label, names, pause

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(self.pause)
        item = {"x": self.x[index], "name": self.names[index]}
        return item if self.label is None else {**item, "label": self.label[index]}


class AffineDataModule(ZooDataModule):
    """Clouds of points. Batch: "x": (b, width); "label": (b,), whole numbers from 0; "name": list[str].

    root=None: clouds drawn from the seed. root=DIR: DIR/points.csv, a row a point, its label in the last column.

    Args:
        root, batch_size, num_workers, seed: as in every DataModule.
        width: features of the generated points.
        pause: seconds that reading a point takes.
    """

    embedded = "three generated clouds"

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        width: int = 8,
        pause: float = 0.0,
    ):
        super().__init__(root, batch_size, num_workers, seed)
        self.save_hyperparameters()
        self.width, self.pause = width, pause

    def build(self) -> dict[str, torch.utils.data.Dataset]:
        if self.root is None:
            return {split: self._cloud(32, self.seed + i) for i, split in enumerate(("train", "val", "test"))}
        path = self.need("points.csv", expected="a row a point, its label in the last column", get="Make your own.")
        try:
            rows = torch.tensor([[float(v) for v in line.split(",")] for line in path.read_text().splitlines()])
        except (ValueError, OSError) as error:
            raise ZooError(f"{path} cannot be read as rows of numbers: {error}") from error
        names = [str(i) for i in range(len(rows))]
        points = _Points(rows[:, :-1], rows[:, -1].long(), names, self.pause)
        return {"train": points, "val": points, "test": points}

    def describe(self) -> dict[str, Any]:
        return {"width": self.width}

    def _cloud(self, size: int, seed: int) -> _Points:
        draw = torch.Generator().manual_seed(seed)
        label = torch.randint(3, (size,), generator=draw)
        x = torch.randn(size, self.width, generator=draw) + label[:, None]
        return _Points(x, label, [str(i) for i in range(size)], self.pause)

    def read(self, path: Path) -> torch.utils.data.Dataset:
        rows, names = [], []
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            try:
                rows.append(torch.tensor([float(v) for v in file.read_text().split(",")]))
                names.append(file.stem)
            except (ValueError, OSError) as error:
                self.skip(file, error)
        return _Points(torch.stack(rows) if rows else torch.zeros(0, self.width), None, names)

    def write(self, predictions: Iterable[dict[str, Any]], path: Path) -> list[Path]:
        target = path / "labels.csv"
        with atomic_write(target) as part:
            lines = [f"{n},{int(y)}\n" for p in predictions for n, y in zip(p["name"], p["label"], strict=True)]
            part.write_text("".join(lines))
        return [target]
