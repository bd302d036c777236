"""RealRain1k: a benchmark of deraining on real rain, and the module that trains any deraining method in it.

Paper: Li et al., "Toward Real-world Single Image Deraining: A New Benchmark and Beyond", arXiv:2206.05514 (2022).
Repository (figures only, no code, no licence): https://github.com/hiker-lw/RealRain-1k.

The paper makes pairs of rainy and clean pictures from video (`rain_pairs`: RealRain-1k-L and -H by the density of rain,
SynRain-13k with the extracted rain on other photographs) and compares thirteen derainers on three tracks:

    supervised              train and test on RealRain-1k-H, and on -L
    generalisation          train on one set or several, test on others
    syn-to-real transfer    train on synthetic pairs, go on training on real ones

Here a track is a few folders (`Track`), `run_benchmark` runs methods through tracks, and `table` prints the paper's
form: PSNR/SSIM, parameters, and multiply-adds for 256 x 256 pixels, which the paper calls FLOPs.

What the public material leaves open and is ours: the pair extraction's formula (see `rain_pairs`), the split by scene,
and, with ``training="shared"``, one loss and schedule for all methods; ``"own"`` keeps each method's own, as the paper.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.core import Trainer, ZooError, ZooModule, catalogue, check_channels
from zoo.vision.restoration.data_derain import DerainDataModule
from zoo.vision.restoration.restorer import Restorer

TASK = "image-deraining"
RESTORMER: dict[str, Any] = {
    "width": 48, "blocks": [4, 6, 6, 8], "heads": [1, 2, 4, 8], "refinement": 4, "expansion": 2.66,
    "regions": "none", "mixed_gate": False,
}  # fmt: skip
"""Restormer, one of the paper's two best, as a setting of the zoo's Regformer."""


# ---- losses -------------------------------------------------------------------------------------------------------


def charbonnier(made: Tensor, wanted: Tensor) -> Tensor:
    """mean sqrt((made - wanted)^2 + 0.001^2): (b, c, h, w) twice -> scalar."""
    return ((made - wanted).square() + 1e-6).sqrt().mean()


def negative_ssim(made: Tensor, wanted: Tensor) -> Tensor:
    """1 - SSIM of the colours, an 11 x 11 Gaussian window of sigma 1.5, pictures in [0, 1]; differentiable.

    Shapes:
        made, wanted: (b, c, h, w), sides at least 11; returns a scalar
    """
    place = torch.arange(-5, 6, device=made.device, dtype=made.dtype)
    window = torch.exp(-place.square() / (2 * 1.5**2))
    window = (window / window.sum()).view(1, 1, -1, 1)
    x, y = made.flatten(0, 1)[:, None], wanted.flatten(0, 1)[:, None]

    def local(t: Tensor) -> Tensor:
        return torch.conv2d(torch.conv2d(t, window), window.transpose(2, 3))

    mx, my = local(x), local(y)
    xx, yy, xy = local(x * x) - mx * mx, local(y * y) - my * my, local(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mx * my + c1) * (2 * xy + c2) / ((mx * mx + my * my + c1) * (xx + yy + c2))
    return 1 - similarity.mean()


LOSSES = {"l1": torch.nn.functional.l1_loss, "charbonnier": charbonnier, "neg_ssim": negative_ssim}

# ---- the method ---------------------------------------------------------------------------------------------------


class RealRain1k(Restorer):
    """A deraining method of the zoo in the RealRain-1k benchmark (arXiv:2206.05514).

    Batch: "rainy" and "clean", (b, 3, h, w) in [0, 1], of `DerainDataModule`. ``model.derainer`` is the method itself,
    to be saved or used alone.

    Args:
        method: class name of a deraining method (``zoo list``: task image-deraining).
        arguments: its hyperparameters; ``{"variant": "tiny"}`` takes a variant, and more change that. By default
            Restormer's.
        training: ``"own"``: the method's loss, optimiser, schedule and clipping; ``"shared"``: those below, the same
            for every method.
        loss: ``"l1"``, ``"charbonnier"`` or ``"neg_ssim"``, when shared.
        lr: AdamW's learning rate, when shared; a cosine takes it to ``lr_min``.
        lr_min: learning rate at the end.
        weight_decay: AdamW's.
        start: folder, ``.ckpt`` file or repository of a RealRain1k of the same method (or of the method itself) whose
            weights training starts from: the last track's second half. Checkpoints do not keep it.
    Raises:
        ZooError: if the method is unknown or none for deraining.
        ValueError: if an argument is out of range.
    Example:
        >>> model = RealRain1k.from_variant("tiny")
        >>> model.predict(torch.rand(1, 3, 50, 70)).shape
        torch.Size([1, 3, 50, 70])
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "small": {
            "arguments": {
                "width": 12, "blocks": [1, 1, 1, 1], "heads": [2, 2, 2, 2], "refinement": 1, "expansion": 2.0,
                "regions": "none", "mixed_gate": False,
            },
            "training": "shared",
            "lr": 2e-3,
        },
        "tiny": {"arguments": {"variant": "tiny", "width": 4, "regions": "none", "mixed_gate": False}},
    }  # fmt: skip
    given, wanted, output = "rainy", "clean", "derained"
    untrusted: ClassVar[tuple[str, ...]] = ("start",)

    def __init__(
        self,
        method: str = "Regformer",
        arguments: dict[str, Any] = RESTORMER,
        training: str = "own",
        loss: str = "l1",
        lr: float = 3e-4,
        lr_min: float = 1e-6,
        weight_decay: float = 1e-4,
        start: str | None = None,
    ):
        super().__init__()
        if training not in ("own", "shared") or loss not in LOSSES:
            raise ValueError(
                f"training is {training!r} and loss {loss!r}; training may be 'own' or 'shared', loss "
                f"{', '.join(map(repr, LOSSES))}."
            )
        if lr <= 0 or not 0 <= lr_min <= lr or weight_decay < 0:
            raise ValueError(f"lr is {lr}, lr_min {lr_min} and weight_decay {weight_decay}; need 0 <= lr_min <= lr.")
        self.save_hyperparameters()
        self.derainer = build_derainer(method, arguments)

    def forward(self, rainy: Tensor) -> Tensor:
        """Derain without clamping; sides as the method needs them, which `predict` sees to.

        Shapes:
            rainy: (b, 3, h, w) float in [0, 1]; returns (b, 3, h, w)
        """
        check_channels(rainy, 3, "rainy")
        return self.derainer(rainy)

    def example_inputs(self) -> tuple[Tensor, ...]:
        return self.derainer.example_inputs()

    # ---- training -----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        # Before a checkpoint is restored, which beats it.
        if stage == "fit" and self.hparams.start is not None:
            self.start_from(self.hparams.start)

    def start_from(self, folder: str | Path) -> "RealRain1k":
        """Take the weights of a saved RealRain1k of this method, or of the method itself; returns self.

        Raises:
            ZooError: if there is no checkpoint, or one of another method or size.
        """
        from zoo.core import load

        saved = load(str(folder))
        theirs = saved.derainer if isinstance(saved, RealRain1k) else saved
        if type(theirs) is not type(self.derainer):
            raise ZooError(f"{folder} holds {type(theirs).__name__}, not {type(self.derainer).__name__}.")
        self.derainer.load_state_dict(theirs.state_dict())
        return self

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        if self.hparams.training == "own":
            self.derainer.log = self.log  # what the method logs is logged here
            self.derainer.log_dict = self.log_dict
            return self.derainer.training_step(batch, batch_idx)
        loss = LOSSES[self.hparams.loss](self(batch["rainy"]), batch["clean"])
        self.log("train/loss", loss, batch_size=len(batch["rainy"]))
        return loss

    def configure_optimizers(self) -> Any:
        hp = self.hparams
        if hp.training == "own":
            if self._trainer is not None:
                self.derainer.trainer = self.trainer
            return self.derainer.configure_optimizers()
        optimizer = torch.optim.AdamW(self.parameter_groups(), lr=hp.lr, weight_decay=hp.weight_decay)
        steps = self.trainer.estimated_stepping_batches

        def factor(step: int) -> float:
            if not math.isfinite(steps):
                return 1.0
            done = min(step / max(steps, 1), 1.0)
            return (hp.lr_min + (hp.lr - hp.lr_min) * (1 + math.cos(math.pi * done)) / 2) / hp.lr

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if self.hparams.training == "own":
            self.derainer.configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # ---- prediction ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, rainy: Tensor, tile: int | None = None) -> Tensor:  # type: ignore[override]
        """The method's own `predict`: pictures of any size, in tiles where they are large, in [0, 1].

        Shapes:
            rainy: (b, 3, h, w) float in [0, 1]; returns the same
        """
        more = {} if tile is None else {"tile": tile}
        return self.derainer.predict(rainy, **more)

    @classmethod
    def convert_state_dict(cls, content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A checkpoint of one of the compared methods' authors: that of Regformer or Restormer's layout is known."""
        found = catalogue.load_class("Regformer").convert_state_dict(content)
        return {"method": "Regformer", "arguments": found[0]}, {f"derainer.{k}": v for k, v in found[1].items()}


def derainers() -> list[str]:
    """Class names of the zoo's deraining methods, this benchmark left out."""
    return [name for name in catalogue.names() if catalogue.facts(name)["task"] == TASK and name != "RealRain1k"]


def build_derainer(method: str, arguments: Mapping[str, Any]) -> ZooModule:
    """A deraining method of the zoo by its name.

    Raises:
        ZooError: if there is none of that name, or it does something else.
    """
    entry = catalogue.entry(method)
    name = entry.facts["class"]
    if entry.facts["task"] != TASK or name == "RealRain1k":
        raise ZooError(f"{name} is no deraining method. The zoo has {', '.join(derainers())}.")
    cls: Any = catalogue.load_class(name)
    given = dict(arguments)
    return cls.from_variant(given.pop("variant", "paper"), **given)


# ---- cost ---------------------------------------------------------------------------------------------------------


def cost(module: ZooModule, size: int = 256) -> tuple[float, float]:
    """Millions of parameters, and billions of multiply-adds for one picture of ``size`` x ``size`` (convolutions and
    matrix products; the paper calls them FLOPs). Counted without computing anything."""
    import copy

    from torch.utils.flop_counter import FlopCounterMode

    twin = copy.deepcopy(module).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(torch.empty(1, 3, size, size, device="meta"))
    return sum(p.numel() for p in module.parameters()) / 1e6, counter.get_total_flops() / 2e9


# ---- tracks -------------------------------------------------------------------------------------------------------


@dataclass
class Track:
    """One row of experiments.

    Attributes:
        name: for the table.
        train: folders to train on, each of a layout that `DerainDataModule` knows; several are mixed. Empty: nothing is
            trained, the methods are tested as they start.
        test: folders to test on, by the name of the column.
        first: folders to train on before ``train`` (syn-to-real transfer).
    """

    name: str
    train: Sequence[str | Path]
    test: Mapping[str, str | Path]
    first: Sequence[str | Path] = ()


def supervised(real: str | Path) -> list[Track]:
    """The first track: RealRain-1k-H and -L, each on itself, below the folder ``real``."""
    sets = [Path(real) / f"RealRain-1k-{density}" for density in "HL"]
    return [Track(f"supervised {s.name[-1]}", [s], {s.name: s}) for s in sets if s.is_dir()]


def generalisation(sets: Mapping[str, str | Path], test: Sequence[str]) -> list[Track]:
    """The second track: train on each set alone, test on all of ``test`` but itself."""
    found = []
    for name, folder in sets.items():
        others = {other: sets[other] for other in test if other != name}
        if others:
            found.append(Track(f"generalisation from {name}", [folder], others))
    return found


def transfer(synthetic: Sequence[str | Path], real: str | Path) -> list[Track]:
    """The third track: synthetic pairs first, then the real ones; beside the real ones alone."""
    name = Path(real).name
    return [Track("real alone", [real], {name: real}), Track("syn-to-real", [real], {name: real}, first=synthetic)]


@dataclass
class Row:
    """A method's result on a track: PSNR and SSIM by test set, and what the method costs."""

    method: str
    track: str
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    parameters: float = 0.0
    flops: float = 0.0


def run_benchmark(
    methods: Mapping[str, Mapping[str, Any]],
    tracks: Iterable[Track],
    work: str | Path = "runs/real_rain1k",
    data: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> list[Row]:
    """Train and test methods on tracks.

    Args:
        methods: by the name in the table, the hyperparameters of `RealRain1k` (``method``, ``arguments``, ...).
        tracks: see `Track`.
        work: folder for checkpoints, one below it a run.
        data: arguments of `DerainDataModule`, less ``root`` (``patch``, ``batch_size``, ...).
        trainer: arguments of `zoo.Trainer` (``max_steps``, ``accelerator``, ...).
        seed: of weights, order and crops.
    Returns:
        a `Row` for each method on each track, and for each track that of the rainy pictures themselves.
    """
    import lightning

    rows: list[Row] = []
    for track in tracks:
        given = Row("rainy input", track.name)
        for label, settings in methods.items():
            lightning.seed_everything(seed, verbose=False)
            model = RealRain1k(**settings)
            row = Row(label, track.name, {}, *cost(model))
            stages = [folders for folders in (track.first, track.train) if folders]
            for number, folders in enumerate(stages):
                place = Path(work) / f"{track.name}-{label}-{number}".replace(" ", "-").replace("/", "-")
                runner = Trainer(**{"default_root_dir": place, "seed": seed, **(trainer or {})})
                runner.fit(model, datamodule=Sets(folders, seed=seed, **(data or {})))
            for name, folder in track.test.items():
                tester = Trainer(**{"default_root_dir": Path(work) / "test", "logger": False, **(trainer or {})})
                tester.test(model, datamodule=DerainDataModule(str(folder), batch_size=1), verbose=False)
                found = {key: float(value) for key, value in tester.callback_metrics.items()}
                row.scores[name] = found["test/psnr"], found["test/ssim"]
                if name not in given.scores:
                    given.scores[name] = found["test/psnr_rainy"], input_ssim(folder)
            rows.append(row)
        rows.append(given)
    return rows


def input_ssim(folder: str | Path) -> float:
    """Mean SSIM of a set's rainy test pictures against the clean ones, on luma."""
    from zoo.nn.image_metrics import SSIM

    metric = SSIM()
    for batch in DerainDataModule(str(folder), batch_size=1).test_dataloader():
        metric.update(batch["rainy"], batch["clean"])
    return float(metric.compute())


class Sets(DerainDataModule):
    """Several folders as one training set. Batch: "rainy", "clean", "name" as in `DerainDataModule`. Validation is the
    first folder's.

    Args:
        roots: folders, each of a layout that `DerainDataModule` knows.
        batch_size: crops a training batch.
        num_workers: processes that read pictures.
        seed: of order and crops.
        patch: side of training crops in pixels, a multiple of 8.
    """

    def __init__(
        self,
        roots: Sequence[str | Path],
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        patch: int | None = None,
    ):
        roots = [str(root) for root in roots]  # checkpoints keep the arguments, and hold plain values only
        self.parts = [DerainDataModule(root, batch_size, num_workers, seed, patch) for root in roots]
        super().__init__(roots[0], batch_size, num_workers, seed, patch)

    def build(self) -> dict[str, Any]:
        found = self.parts[0].build()
        for part in self.parts[1:]:
            more: Any = part.build().get("train")
            if more is not None and "train" in found:
                found["train"].pairs = [*found["train"].pairs, *more.pairs]  # type: ignore[attr-defined]
        if "train" not in found:
            raise ZooError(f"{self.root} holds no training pairs.")
        return found


def table(rows: Sequence[Row]) -> str:
    """The paper's table as Markdown: PSNR/SSIM by test set, parameters, FLOPs; a track's best in bold."""
    sets = list(dict.fromkeys(name for row in rows for name in row.scores))
    lines = ["| track | method | " + " | ".join(sets) + " | Params (M) | FLOPs (G) |"]
    lines.append("|---|---|" + "---|" * (len(sets) + 2))
    ordered = sorted(rows, key=lambda row: (_first(rows, row.track), row.method != "rainy input"))
    for row in ordered:
        cells = []
        for name in sets:
            if name not in row.scores:
                cells.append("-")
                continue
            psnr, ssim = row.scores[name]
            rivals = [r.scores[name][0] for r in rows if r.track == row.track and name in r.scores]
            text = f"{psnr:.2f}/{f'{ssim:.4f}'.removeprefix('0')}"
            cells.append(f"**{text}**" if psnr == max(rivals) and len(rivals) > 1 else text)
        price = [f"{row.parameters:.2f}", f"{row.flops:.2f}"] if row.parameters else ["-", "-"]
        lines.append(f"| {row.track} | {row.method} | {' | '.join(cells + price)} |")
    return "\n".join(lines)


def _first(rows: Sequence[Row], track: str) -> int:
    return next(k for k, row in enumerate(rows) if row.track == track)


def pretrained(
    folder: Path, seed: int, benchmark: dict[str, Any], model: dict[str, Any], data: dict[str, Any], steps: int
) -> None:
    """For recipes: `rain_pairs.generated_benchmark` in ``folder``, and a model trained on its SynRain in
    ``folder/pretrained``.

    Args:
        folder: where to write.
        seed: of everything.
        benchmark: arguments of `generated_benchmark`.
        model: arguments of `RealRain1k`, ``variant`` among them.
        data: arguments of `DerainDataModule`, less ``root``.
        steps: of training.
    """
    import lightning

    from zoo.vision.restoration.rain_pairs import generated_benchmark

    generated_benchmark(folder, seed, **benchmark)
    lightning.seed_everything(seed, verbose=False)
    given = dict(model)
    made = RealRain1k.from_variant(given.pop("variant", "paper"), **given)
    runner = Trainer(
        default_root_dir=folder / "run", max_steps=steps, accelerator="cpu", devices=1, logger=False, seed=seed,
        limit_val_batches=0, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=True,
    )  # fmt: skip
    runner.fit(made, datamodule=Sets([folder / "SynRain"], seed=seed, **data))
    made.save_pretrained(folder / "pretrained")
