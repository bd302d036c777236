"""A small method and its data, for tests of the base."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from zoo.core import ZooDataModule, ZooModule


class Line(ZooModule):
    """A linear map with dropout and batch norm: enough to show train mode, randomness and state."""

    variants = {"tiny": {"width": 3}}
    monitor, mode = "val/loss", "min"
    head = ("out",)

    def __init__(self, width: int = 4, outputs: int = 1, lr: float = 0.05, note: str | None = None):
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Dropout(0.5))
        self.out = nn.Linear(width, outputs)
        self.seen: list[tuple[int, int, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append((self.trainer.current_epoch, batch_idx, batch["x"].sum().item()))
        loss = (self(batch["x"]) - batch["y"]).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", (self(batch["x"]) - batch["y"]).square().mean(), batch_size=len(batch["x"]))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test/loss", (self(batch["x"]) - batch["y"]).square().mean(), batch_size=len(batch["x"]))


class Fitted(ZooModule):
    """A method without optimiser steps: one epoch counts the samples it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.register_buffer("count", torch.zeros(()))
        self.count: Tensor

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.count += len(batch["x"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", -self.count)


class Noisy(Dataset):
    """Points on a line; each draw adds noise of its own."""

    def __init__(self, size: int = 22):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Tensor]:
        x = torch.tensor([index / self.size, 1.0]) + 0.1 * torch.randn(2, generator=generator)
        return {"x": x, "y": x.sum()[None]}


class LineDataModule(ZooDataModule):
    """Batch: "x": (b, 2) float, "y": (b, 1) float. root=None: noisy points. root=DIR: a file `points.csv`."""

    def __init__(self, root: str | None = None, batch_size: int = 4, num_workers: int = 0, seed: int = 0):
        super().__init__(root, batch_size, num_workers, seed)
        self.save_hyperparameters()

    def build(self) -> dict[str, Any]:
        if self.root is not None:
            self.need("points.csv", expected="the points", get="Make one.")
        return {"train": Noisy(), "val": Noisy(6), "test": Noisy(6)}
