"""Few-shot out-of-distribution detection: a few images of known classes, and sets of unknown ones to test on."""

import csv
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from zoo.core import ZooDataModule, ZooError, atomic_write
from zoo.core.seeding import seed_from

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
SIZE = 32
"""Side of the embedded images in pixels."""

# ---- the embedded set: coloured shapes ------------------------------------------------------------------------------

SHAPES = (
    "square", "circle", "triangle", "cross", "diamond", "ring", "bar", "arrow", "moon", "frame", "corner", "hourglass",
)  # fmt: skip
COLOURS = {
    "red": (0.85, 0.15, 0.15), "green": (0.15, 0.7, 0.2), "blue": (0.15, 0.25, 0.85), "yellow": (0.9, 0.85, 0.15),
    "purple": (0.55, 0.15, 0.7), "cyan": (0.15, 0.8, 0.85), "orange": (0.95, 0.55, 0.1), "white": (0.95, 0.95, 0.95),
}  # fmt: skip
KNOWN = ("red square", "green circle", "blue triangle", "yellow cross", "purple diamond", "cyan ring")
FOREIGN = ("glyph", "part")
"""The embedded unknown sets: a known object with a small glyph over it, and one with a half of another material."""


def draw_shapes(shape: Tensor, colour: Tensor, generator: torch.Generator, foreign: str | None = None) -> Tensor:
    """Pictures of one coloured shape each, at a random place and size, on grey noise and two patches of clutter.

    Clutter is an 8 x 8 patch of 2 x 2 cells, or of stripes, in two random colours; the shape lies over it.

    Args:
        shape: (n,) long, index into `SHAPES`. colour: (n,) long, index into `COLOURS`.
        foreign: None; "glyph": one more such patch, of cells, over the shape; "part": the half of the shape on one side
            of its centre in such stripes.
    Returns:
        (n, 3, 32, 32) uint8.
    """
    n = len(shape)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, generator=generator)

    grid = torch.arange(SIZE, dtype=torch.float32) + 0.5
    radius = uniform(7.0, 10.0)
    cy, cx = uniform(11.0, 21.0), uniform(11.0, 21.0)

    def patch(top: Tensor, left: Tensor, striped: Tensor) -> tuple[Tensor, Tensor]:
        """Where an 8 x 8 patch lies, (n, 1, s, s), and its colours, (n, 3, s, s)."""
        rows, columns = grid[:, None] - 0.5 - top, grid[None, :] - 0.5 - left
        inside = (rows >= 0) & (rows < 8) & (columns >= 0) & (columns < 8)
        cells = torch.rand(n, 4, 4, generator=generator) < 0.5
        stripes = (torch.arange(4) % 2 == 0).expand(n, 4, 4)
        stripes = torch.where(uniform(0, 1) < 0.5, stripes, stripes.mT)
        ink = torch.where(striped, stripes, cells).flatten(1)
        cell = (rows.clamp(0, 7) // 2 * 4 + columns.clamp(0, 7) // 2).long()
        ink = ink.gather(1, cell.flatten(1)).view(n, 1, SIZE, SIZE)
        return inside[:, None], torch.where(ink, *torch.rand(2, n, 3, 1, 1, generator=generator))

    image = (0.45 + 0.1 * uniform(-1, 1)[:, None]).expand(n, 3, SIZE, SIZE)
    for _ in range(2):
        inside, material = patch(uniform(0, 24).round(), uniform(0, 24).round(), uniform(0, 1) < 0.5)
        image = torch.where(inside, material, image)
    noise = 0.08 * torch.randn(n, 3, SIZE, SIZE, generator=generator)  # now: what is foreign changes nothing else
    v, u = (grid[:, None] - cy) / radius, (grid[None, :] - cx) / radius
    r, box = (u**2 + v**2).sqrt(), torch.maximum(u.abs(), v.abs())
    masks = torch.stack([
        box < 0.85,
        r < 0.95,
        (v > -0.9) & (v < 0.8) & (u.abs() < (v + 0.9) / 1.7),
        (torch.minimum(u.abs(), v.abs()) < 0.33) & (box < 0.95),
        u.abs() + v.abs() < 1,
        (r > 0.5) & (r < 1),
        (v.abs() < 0.4) & (u.abs() < 0.95),
        ((u > 0) & (u + v.abs() < 0.95)) | ((u <= 0) & (u > -0.95) & (v.abs() < 0.3)),
        (r < 1) & ((u - 0.5) ** 2 + v**2 > 0.6),
        (box > 0.5) & (box < 0.9),
        ((u < -0.25) | (v > 0.25)) & (box < 0.9),
        (u.abs() < v.abs()) & (box < 0.9),
    ])  # fmt: skip
    mask = masks[shape, torch.arange(n)]
    paint = torch.tensor(list(COLOURS.values()))[colour][:, :, None, None].expand(n, 3, SIZE, SIZE)
    if foreign == "part":
        angle = uniform(-math.pi, math.pi)
        half = u * angle.cos() + v * angle.sin() > 0
        stripes = ((u * angle.sin() - v * angle.cos()) * radius / 2).floor() % 2 == 0
        material = torch.where(stripes[:, None], *torch.rand(2, n, 3, 1, 1, generator=generator))
        paint = torch.where(half[:, None], material, paint)
    image = torch.where(mask[:, None], paint, image)
    if foreign == "glyph":
        top, left = ((c + uniform(-2, 2) - 4).round() for c in (cy, cx))
        inside, material = patch(top, left, torch.zeros(n, 1, 1, dtype=torch.bool))
        image = torch.where(inside, material, image)
    return ((image + noise).clamp(0, 1) * 255).round().to(torch.uint8)


def pretrain(
    folder: Path,
    seed: int,
    steps: int = 400,
    lr: float = 2e-3,
    width: int = 64,
    vision_layers: int = 3,
    text_layers: int = 2,
    patch: int = 4,
    projection: int = 32,
) -> None:
    """Pretrain a small CLIP on the embedded shapes with captions, and write it as a transformers checkpoint.

    Each batch holds all 96 pairs of colour and shape once, so that no two captions agree, with random crops and
    templates. Its tokenizer is the embedded one; nothing foreign is ever shown. Beside CLIP's loss on the global
    features stands the same loss on the mean cosine of the 8 best regions: that regions agree with words comes to the
    real CLIP with its size, not to one of this size.

    Args:
        folder: where ``config.json`` and ``model.safetensors`` are written.
        seed: of weights and data. steps: batches.
        lr: peak rate of AdamW. width, vision_layers, text_layers, patch, projection: sizes of the model.
    """
    from transformers import CLIPConfig, CLIPModel

    from zoo.vision.prompt.local_prompt import CLIP, EmbeddedTokenizer

    text = {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": text_layers,
        "num_attention_heads": 2, "vocab_size": 80, "max_position_embeddings": 24, "pad_token_id": 0,
        "bos_token_id": 78, "eos_token_id": 79,
    }  # fmt: skip
    vision = {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": vision_layers,
        "num_attention_heads": 2, "image_size": SIZE, "patch_size": patch,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed_from(seed, "pretrain"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from(seed, "weights"))
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection))
    clip, tokenizer = CLIP(model), EmbeddedTokenizer(80)
    templates = ("a photo of a {}.", "a picture of a {}.", "a drawing of a {}.", "the {}.", "one {}.")
    pairs = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    shape, colour = torch.arange(len(pairs)) % len(SHAPES), torch.arange(len(pairs)) // len(SHAPES)
    captions = [[[tokenizer.bos, *tokenizer.encode(t.format(p)), tokenizer.eos] for p in pairs] for t in templates]
    longest = max(len(ids) for rows in captions for ids in rows)
    ends = torch.tensor([[len(ids) - 1 for ids in rows] for rows in captions])
    tokens = torch.tensor([[ids + [0] * (longest - len(ids)) for ids in rows] for rows in captions])
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (_MEAN, _STD))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    rows = torch.arange(len(pairs))
    for _ in range(steps):
        images = draw_shapes(shape, colour, generator).float() / 255
        images = _crop_tensors(images, 0.3, generator)
        which = torch.randint(len(templates), (len(pairs),), generator=generator)
        g, regions = (torch.nn.functional.normalize(x, dim=-1) for x in clip.image((images - mean) / std))
        t = torch.nn.functional.normalize(clip.text(clip.embed(tokens[which, rows]), ends[which, rows]), dim=-1)
        best = (regions @ t.t()).topk(8, dim=1).values.mean(1)
        logits = [model.logit_scale.exp() * x for x in (g @ t.t(), best)]
        loss = sum(torch.nn.functional.cross_entropy(y, rows) for x in logits for y in (x, x.t())) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))  # as CLIP
    model.save_pretrained(folder, safe_serialization=True)


_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def _crop_tensors(images: Tensor, smallest: float, generator: torch.Generator) -> Tensor:
    """One random square crop of each image, ``smallest`` to 1 of its area, back at the old size (bilinear)."""
    n = len(images)
    side = (smallest + (1 - smallest) * torch.rand(n, generator=generator)).sqrt()
    shift = (2 * torch.rand(n, 2, generator=generator) - 1) * (1 - side)[:, None]
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = shift
    grid = torch.nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, align_corners=False, padding_mode="border")


# ---- pictures -> tensors --------------------------------------------------------------------------------------------


def open_image(source: Path | Tensor) -> Image.Image:
    """An RGB picture from a file or a (3, h, w) uint8 tensor.

    Raises:
        ZooError: naming the file that cannot be read.
    """
    if isinstance(source, Tensor):
        return Image.fromarray(source.permute(1, 2, 0).numpy())
    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ZooError(f"{source} is not a readable picture: {error}. Replace or remove it.") from error


def to_tensor(image: Image.Image) -> Tensor:
    """(3, h, w) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def centre(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to ``size`` (bicubic), then the centre square, as CLIP evaluates."""
    w, h = image.size
    if (w, h) == (size, size):
        return image
    scale = size / min(w, h)
    w, h = max(size, round(w * scale)), max(size, round(h * scale))
    left, top = (w - size) // 2, (h - size) // 2
    return image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def random_view(
    image: Image.Image, size: int, scale: Sequence[float], flip: float, generator: torch.Generator
) -> Image.Image:
    """Random resized crop (area ``scale``, aspect 3/4 to 4/3, bicubic) and flip: the authors' training transform."""
    w, h = image.size
    draws = torch.rand(11, 4, generator=generator, dtype=torch.float64)
    box = None
    for area, aspect, x, y in draws[:10].tolist():
        target = (scale[0] + (scale[1] - scale[0]) * area) * w * h
        ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * aspect)
        cw, ch = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < cw <= w and 0 < ch <= h:
            left, top = int(x * (w - cw + 1)), int(y * (h - ch + 1))
            box = (left, top, left + cw, top + ch)
            break
    if box is None:  # a very long picture: the largest centre part of an allowed aspect
        cw, ch = min(w, round(h * 4 / 3)), min(h, round(w * 4 / 3))
        box = ((w - cw) // 2, (h - ch) // 2, (w - cw) // 2 + cw, (h - ch) // 2 + ch)
    view = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if float(draws[10, 0]) < flip else view


class _Item:
    """A picture (file or tensor), its label (-1 = unknown), the set it is from (0 = known) and a name."""

    __slots__ = ("label", "name", "ood", "source")

    def __init__(self, source: Path | Tensor, label: int, ood: int, name: str):
        self.source, self.label, self.ood, self.name = source, label, ood, name


class _Views(Dataset):
    def __init__(self, items: list[_Item], module: "FewShotOODDataModule"):
        hp = module.hparams
        self.items, self.size = items, module.image_size
        self.views, self.scale, self.flip, self.redraw, self.seed = hp.views, hp.crop_scale, hp.flip, hp.redraw, hp.seed

    def __len__(self) -> int:
        return len(self.items)

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        item = self.items[index]
        image = open_image(item.source)
        if not self.redraw:
            generator = torch.Generator().manual_seed(seed_from(self.seed, "views", index))
        views = [to_tensor(random_view(image, self.size, self.scale, self.flip, generator)) for _ in range(self.views)]
        out = {"views": torch.stack(views), "label": item.label, "name": item.name}
        return out if self.redraw else {**out, "view_key": index}


class _Images(Dataset):
    def __init__(self, items: list[_Item], size: int, targets: bool = True):
        self.items, self.size, self.targets = items, size, targets

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        out = {"image": to_tensor(centre(open_image(item.source), self.size)).float() / 255, "name": item.name}
        return {**out, "label": item.label, "ood": item.ood} if self.targets else out


# ---- the DataModule -------------------------------------------------------------------------------------------------


class FewShotOODDataModule(ZooDataModule):
    """A few training images of each known class; tests mix known images with sets of unknown ones.

    Training batches: "views" (b, v, 3, s, s) uint8, random crops of each image; "label" (b,) long; "name" list[str];
    with ``redraw=False`` also "view_key" (b,) long: the views of a key never change. Validation (known images only,
    none of them trained on) and test: "image" (b, 3, s, s) float in [0, 1]; "label" (b,) long, -1 for unknown images;
    "ood" (b,) long, 0 = known, i = the i-th of ``ood_names``; "name".

    root=None: six classes of coloured shapes (32 x 32), generated from the seed; unknown are the same classes with a
    small foreign patch ("glyph") or half of another material ("part"): alike on the whole, different in one place.

    root=DIR: either DIR/imagenet/{classnames.txt,train/<wnid>/*,val/<wnid>/*} (also imagenet10, imagenet20, imagenet100
    by ``id_set``, and DIR/imagenet/images/{train,val}) beside DIR/{iNaturalist,SUN,places365,Texture}, or any pictures
    as DIR/id/{train,test}/<class>/* and DIR/ood/<set>/**. Licences: ImageNet for research only; the four sets are the
    subsets of github.com/deeplearning-wisc/large_scale_ood.

    Args:
        shots: training images of each class, drawn with the seed; a class with fewer gives all.
        val_shots: validation images of each class, from the training images that were not drawn.
        id_set: folder of the known classes in the ImageNet layout.
        ood_sets: names of the unknown sets; None = the four beside imagenet and imagenet100, imagenet20 for imagenet10
            and the reverse; all that are there in the other layout.
        views: crops of a training image. redraw: draw them anew every epoch; False keeps them, so that a model can
            keep their features.
        crop_scale: smallest and largest area of a crop. flip: probability of mirroring a crop.
        image_size: side of the squares in pixels; None = 32 for the embedded set, else 224.
        embedded_test: embedded test images of each class and of each class in each unknown set.
    Raises:
        FileNotFoundError: if a piece of the layout is missing.
        ZooError: for an unknown set without pictures, or one that holds a known class.
    """

    embedded = "six classes of generated coloured shapes, with foreign patches as unknown images"

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        shots: int = 4,
        val_shots: int = 4,
        id_set: str = "imagenet",
        ood_sets: list[str] | None = None,
        views: int = 16,
        redraw: bool = True,
        crop_scale: list[float] = [0.08, 1.0],  # noqa: B006 (read only; the command knows no tuple)
        flip: float = 0.5,
        image_size: int | None = None,
        embedded_test: int = 5,
    ):
        super().__init__(root, batch_size, num_workers, seed)
        self.save_hyperparameters()
        if shots < 1 or val_shots < 0 or views < 1 or embedded_test < 1:
            raise ValueError(
                f"shots={shots}, val_shots={val_shots}, views={views}, embedded_test={embedded_test}: "
                "all but val_shots must be at least 1, and that at least 0."
            )
        if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"crop_scale={crop_scale}: expected [smallest, largest], 0 < smallest <= largest <= 1.")
        self.image_size = image_size or (SIZE if root is None else 224)
        self.class_names: list[str] = []
        self.ood_names: list[str] = []

    def describe(self) -> dict[str, Any]:
        """``classes``: the names of the known classes, in the order of the labels."""
        return {"classes": list(self.class_names)} if self.class_names else {}

    def build(self) -> dict[str, Dataset]:
        if self.root is None:
            pool, test = self._embedded()
        elif (self.root / "id").is_dir():
            pool, test = self._folders()
        else:
            pool, test = self._imagenet()
        train, val = self._draw(pool)
        sets: dict[str, Dataset] = {"train": _Views(train, self), "test": _Images(test, self.image_size)}
        if val:
            sets["val"] = _Images(val, self.image_size)
        return sets

    def _draw(self, pool: list[list[_Item]]) -> tuple[list[_Item], list[_Item]]:
        """Shots and validation images of each class, by the seed."""
        hp = self.hparams
        train: list[_Item] = []
        val: list[_Item] = []
        for label, items in enumerate(pool):
            generator = torch.Generator().manual_seed(seed_from(self.seed, "shots", label))
            order = torch.randperm(len(items), generator=generator).tolist()
            train += [items[i] for i in order[: hp.shots]]
            val += [items[i] for i in order[hp.shots : hp.shots + hp.val_shots]]
        return train, val

    def _embedded(self) -> tuple[list[list[_Item]], list[_Item]]:
        hp = self.hparams
        self.class_names, self.ood_names = list(KNOWN), list(FOREIGN)
        colours = list(COLOURS)
        pool: list[list[_Item]] = []
        test: list[_Item] = []
        for label, name in enumerate(KNOWN):
            colour, shape = (index.index(word) for index, word in zip((colours, SHAPES), name.split(), strict=True))
            # -1: training pool, 0: known, 1, 2: unknown
            for ood, foreign in enumerate((None, None, *FOREIGN), start=-1):
                count = hp.shots + hp.val_shots if ood < 0 else hp.embedded_test
                generator = torch.Generator().manual_seed(seed_from(self.seed, "embedded", label, ood))
                images = draw_shapes(torch.full((count,), shape), torch.full((count,), colour), generator, foreign)
                kind = ("train", "known", *FOREIGN)[ood + 1]
                items = [
                    _Item(image, -1 if ood > 0 else label, max(ood, 0), f"{kind}/{name.replace(' ', '_')}/{i:03d}")
                    for i, image in enumerate(images)
                ]
                if ood < 0:
                    pool.append(items)
                else:
                    test += items
        return pool, test

    def _folders(self) -> tuple[list[list[_Item]], list[_Item]]:
        train = self.need("id", "train", expected="a folder of training pictures for each class")
        tested = self.need("id", "test", expected="a folder of test pictures for each class")
        ood = self.need("ood", expected="a folder of pictures for each unknown set")
        folders = _subfolders(train)
        if not folders:
            raise ZooError(f"{train} has no class folders. Expected {train}/<class>/<picture>.")
        self.class_names = [folder.name.replace("_", " ") for folder in folders]
        pool, test = self._known(folders, tested)
        names = self.hparams.ood_sets or [folder.name for folder in _subfolders(ood)]
        if not names:
            raise ZooError(f"{ood} has no sets of unknown pictures. Expected {ood}/<set>/<picture>.")
        sets = {name: self.need("ood", name, expected="a set of unknown pictures") for name in names}
        return pool, test + self._unknown(sets, folders)

    def _imagenet(self) -> tuple[list[list[_Item]], list[_Item]]:
        hp = self.hparams
        site = "ImageNet (ILSVRC2012): https://image-net.org; classnames.txt: see the README of CoOp."
        listed = self.need(hp.id_set, "classnames.txt", expected="'<wnid> <class name>' lines", get=site)
        names = _read_class_names(listed)
        inner = "images" if (self.root / hp.id_set / "images").is_dir() else "."  # type: ignore[operator]
        train = self.need(hp.id_set, inner, "train", expected="a folder of training pictures for each wnid", get=site)
        val = self.need(hp.id_set, inner, "val", expected="a folder of validation pictures for each wnid", get=site)
        folders = _subfolders(train)
        unnamed = [folder.name for folder in folders if folder.name not in names]
        if not folders or unnamed:
            raise ZooError(
                f"{train}: {'no class folders' if not folders else f'classnames.txt has no name for {unnamed[0]}'}. "
                "Expected one folder for each line of classnames.txt."
            )
        self.class_names = [names[folder.name] for folder in folders]
        pool, test = self._known(folders, val)
        near = {"imagenet10": ["imagenet20"], "imagenet20": ["imagenet10"]}
        sets = hp.ood_sets or near.get(hp.id_set, ["iNaturalist", "SUN", "places365", "Texture"])
        return pool, test + self._unknown({name: self._ood_folder(name) for name in sets}, folders)

    def _ood_folder(self, name: str) -> Path:
        """The folder of an unknown set, also under the name that its public archive gives it."""
        aliases = {
            "places365": ("places365", "Places"),
            "Texture": ("Texture", "dtd/images"),
            **{f"imagenet{n}": tuple(f"imagenet{n}/{v}" for v in ("val", "images/val")) for n in (10, 20, 100)},
        }
        for folder in aliases.get(name, ()):
            if (self.root / folder).is_dir():  # type: ignore[operator]
                return self.root / folder  # type: ignore[operator]
        return self.need(
            name,
            expected=f"the pictures of the unknown set {name}",
            get="The subsets in use: https://github.com/deeplearning-wisc/large_scale_ood.",
        )

    def _known(self, folders: list[Path], tested: Path) -> tuple[list[list[_Item]], list[_Item]]:
        pool, test = [], []
        for label, folder in enumerate(folders):
            items = [_Item(path, label, 0, f"{folder.name}/{path.name}") for path in _pictures(folder)]
            if not items:
                raise ZooError(f"{folder} has no pictures ({', '.join(SUFFIXES)}).")
            pool.append(items)
            test += [_Item(path, label, 0, f"{folder.name}/{path.name}") for path in _pictures(tested / folder.name)]
        if not test:
            raise ZooError(f"{tested} has no pictures of the {len(folders)} classes. Name its folders as for training.")
        return pool, test

    def _unknown(self, sets: dict[str, Path], known: list[Path]) -> list[_Item]:
        self.ood_names = list(sets)
        classes = {_plain(folder.name) for folder in known}
        items: list[_Item] = []
        for number, (name, folder) in enumerate(sets.items(), start=1):
            shared = classes & {_plain(name), *(_plain(inner.name) for inner in _subfolders(folder))}
            if shared:
                raise ZooError(
                    f"The unknown set {folder} holds the known class {sorted(shared)[0]!r}: not unknown. "
                    "Remove that folder from one of the two."
                )
            found = [_Item(path, -1, number, f"{name}/{path.relative_to(folder)}") for path in _pictures(folder)]
            if not found:
                raise ZooError(f"The unknown set {folder} has no pictures ({', '.join(SUFFIXES)}).")
            items += found
        return items

    # ---- a user's own files -----------------------------------------------------------------------------------------

    def read(self, path: Path) -> Dataset:
        """Pictures: one file, a folder of them (also nested), or an .npz.

        An .npz holds ``images``: (n, h, w, 3) uint8, or (n, 3, h, w) float in [0, 1]; optionally ``names`` (n,).
        """
        items: list[_Item] = []
        if path.suffix == ".npz":
            items = self._read_npz(path)
        else:
            for file in _pictures(path) if path.is_dir() else [path]:
                try:
                    open_image(file)
                except ZooError as error:
                    self.skip(file, error)
                    continue
                items.append(_Item(file, -1, 0, str(file.relative_to(path)) if path.is_dir() else file.name))
        return _Images(items, self.image_size, targets=False)

    def _read_npz(self, path: Path) -> list[_Item]:
        try:
            with np.load(path, allow_pickle=False) as content:
                images = content["images"]
                names = content["names"].tolist() if "names" in content else [f"{i:05d}" for i in range(len(images))]
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ZooError(f"{path} is not an .npz with an array 'images': {error}.") from error
        if images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3:
            tensors = torch.from_numpy(images).permute(0, 3, 1, 2)
        elif images.dtype.kind == "f" and images.ndim == 4 and images.shape[1] == 3:
            if not np.isfinite(images).all() or images.min() < 0 or images.max() > 1:
                raise ZooError(f"{path}: 'images' of floats must lie in [0, 1] without NaN.")
            tensors = torch.from_numpy((images * 255).round().astype(np.uint8))
        else:
            raise ZooError(
                f"{path}: 'images' is {images.dtype} {images.shape}; expected uint8 (n, h, w, 3) or float (n, 3, h, w)."
            )
        if len(names) != len(tensors):
            raise ZooError(f"{path}: {len(names)} names for {len(tensors)} images.")
        return [_Item(image, -1, 0, str(name)) for image, name in zip(tensors, names, strict=True)]

    def write(self, predictions: Iterable[dict[str, Any]], path: Path) -> list[Path]:
        """One CSV: name, class, probability, score (large = known), is_ood. ``path`` may be the file or a folder."""
        path = Path(path)
        file = path if path.suffix == ".csv" else path / "predictions.csv"
        with atomic_write(file) as part, open(part, "w", newline="", encoding="utf-8") as stream:
            rows = csv.writer(stream)
            rows.writerow(["name", "class", "probability", "score", "is_ood"])
            for batch in predictions:
                classes = batch.get("class_name") or batch["class"].tolist()
                for name, label, p, s, unknown in zip(
                    batch["name"], classes, batch["probability"].tolist(), batch["score"].tolist(),
                    batch["is_ood"].tolist(), strict=True,
                ):  # fmt: skip
                    rows.writerow([name, label, f"{p:.6f}", f"{s:.6f}", int(unknown)])
        return [file]


def _subfolders(folder: Path) -> list[Path]:
    return sorted(inner for inner in folder.iterdir() if inner.is_dir() and not inner.name.startswith("."))


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def _plain(name: str) -> str:
    return name.replace("_", " ").lower()


def _read_class_names(path: Path) -> dict[str, str]:
    """Folder -> class name, from lines ``n01440764 tench`` or ``n01440764,tench``."""
    names = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"([^\s,]+)[\s,]+(.+)", line.strip()):
            names[found[1]] = found[2]
    if not names:
        raise ZooError(f"{path} has no lines of the form 'n01440764 tench'.")
    return names
