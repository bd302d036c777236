"""Rainy and clean pictures: the public deraining sets in their own layouts, generated rain, and a user's own photos."""

import functools
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from zoo.core import ZooDataModule, ZooError, atomic_write, seed_from
from zoo.vision.restoration.tiling import pad_reflect

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})

# ---- where the public sets keep their pairs -----------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How one set pairs its files: globs below a split's folder, and what in a file's stem names the scene.

    ``clean`` empty: both pictures lie side by side in one file, the rainy one left.
    """

    sets: str
    rainy: str
    clean: str
    rainy_key: str = "(.+)"
    clean_key: str = "(.+)"


LAYOUTS = (
    Layout("RealRain-1k, HQ-Rain, Rain13k, and Rain200, DID, DDN, SPA as packed by DRSformer", "input/*", "target/*"),
    Layout("Rain200L, Rain200H", "rain/X2/*", "norain/*", r"norain-(\d+)x2", r"norain-(\d+)"),
    Layout("Rain100 in two folders", "rain/*", "norain/*", r"(?:no)?rain-?(\d+)(?:x2)?", r"(?:no)?rain-?(\d+)"),
    Layout("rain and norain folders of equal names", "rain/*", "norain/*"),
    Layout("Rain100L, Rain100H", "rain-*", "norain-*", r"rain-(\d+)", r"norain-(\d+)"),
    Layout("Rain100 as packed by PReNet", "rainy/rain-*", "norain-*", r"rain-(\d+)", r"norain-(\d+)"),
    Layout("DDN (Rain1400)", "rainy_image/*", "ground_truth/*", r"(\d+)_\d+"),
    Layout("SPA-Data test", "rain/*", "gt/*", "(.+)", "(.+?)(?:gt)?"),
    Layout("rainy and gt folders", "rainy/*", "gt/*"),
    Layout("data and gt folders", "data/*", "gt/*"),
    Layout("DID-MDN training", "Rain_*/train2018new/*", ""),
    Layout("DID-MDN test", "[0-9]*.jpg", ""),
)

SPLITS = {
    "train": ("train", "training", "rain_data_train_*", "raintrain*", "did-mdn-training"),
    "val": ("val", "valid", "validation"),
    "test": (
        *("test", "testing", "testing/real_test_1000", "real_test_1000"),
        *("rain_data_test_*", "rain_data_test_*/rain_*_test", "did-mdn-test"),
    ),
}
LISTS = {"train": "real_world.txt", "test": "real_test_1000.txt"}  # SPA-Data names its pairs in text files

Pair = tuple[Path, Path | None]


def split_folders(root: Path, split: str) -> list[Path]:
    """The folders under ``root`` that may hold a split, by the names of `SPLITS`, in any case."""
    found = []
    for pattern in SPLITS[split]:
        folders = [root]
        for part in pattern.split("/"):
            matches = re.compile(part.replace("*", ".*"), re.IGNORECASE).fullmatch
            folders = [f for folder in folders for f in sorted(folder.iterdir()) if f.is_dir() and matches(f.name)]
        found += folders
    return found


def find_pairs(folder: Path) -> list[Pair]:
    """The pairs of a split's folder, by the first of `LAYOUTS` that finds a rainy picture; none where none does.

    Raises:
        ZooError: naming the files of either side that lack the other.
    """
    for layout in LAYOUTS:
        rainy, odd = _by_key(folder, layout.rainy, layout.rainy_key)
        if not rainy:
            continue
        if not layout.clean:
            return [(path, None) for path in sorted(rainy.values(), key=_natural)]
        clean, odd_clean = _by_key(folder, layout.clean, layout.clean_key)
        if not clean:
            continue
        # Several rainy pictures may share a scene (DDN): only there is a key a part of the rainy name.
        scenes = {key.split("\0")[0] for key in rainy}
        lonely = odd + odd_clean + [rainy[key] for key in rainy if key.split("\0")[0] not in clean]
        lonely += [clean[key] for key in clean.keys() - scenes]
        if lonely:
            names = ", ".join(str(path.relative_to(folder)) for path in sorted(lonely, key=_natural)[:5])
            raise ZooError(
                f"{len(lonely)} pictures in {folder} have no partner: {names}{', ...' if len(lonely) > 5 else ''}. "
                f"Each of {layout.rainy} needs its clean one in {layout.clean} ({layout.sets}). Add or remove them."
            )
        return [(rainy[key], clean[key.split("\0")[0]]) for key in sorted(rainy, key=lambda k: _natural(rainy[k]))]
    return []


def _by_key(folder: Path, pattern: str, key: str) -> tuple[dict[str, Path], list[Path]]:
    """Pictures below a folder by what ``key`` finds in their stems (a second one of a scene gets its stem added), and
    those in whose stems it finds nothing."""
    found: dict[str, Path] = {}
    odd = []
    for path in sorted(folder.glob(pattern)):
        if path.suffix.lower() not in PICTURES or not path.is_file():
            continue
        match = re.fullmatch(key, path.stem)
        if match is None:
            odd.append(path)
        else:
            found[match[1] if match[1] not in found else f"{match[1]}\0{path.stem}"] = path
    return found, odd


def _natural(path: Path) -> list[tuple[int, str]]:
    """Order by numbers as numbers: 2.png before 10.png."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", str(path))]


def listed_pairs(file: Path) -> list[Pair]:
    """SPA-Data's lists: a rainy and a clean path per line, relative to the list's folder.

    Raises:
        ZooError: naming a line that is no pair, or the first files that are missing.
    """
    pairs: list[Pair] = []
    missing = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        names = line.split()
        if not names:
            continue
        if len(names) != 2:
            raise ZooError(f"{file}, line {number}: expected a rainy and a clean path, found {line!r}.")
        rainy, clean = (file.parent / name.lstrip("./") for name in names)
        missing += [path for path in (rainy, clean) if not path.is_file()]
        pairs.append((rainy, clean))
    if missing:
        raise ZooError(f"{file} names {len(missing)} files that are missing: {', '.join(map(str, missing[:3]))}, ...")
    return pairs


# ---- pictures -----------------------------------------------------------------------------------------------------


def read_picture(path: Path) -> Tensor:
    """A picture as (3, h, w) in [0, 1], upright by its EXIF orientation.

    Grey is repeated over the channels, palettes are resolved. Sixteen-bit grey keeps its depth; sixteen-bit colour is
    read as eight. Transparency is left out here (`DerainDataModule.write` puts it back).

    Raises:
        ZooError: naming a file that is broken, or of floating-point pixels, whose range is anyone's guess.
    """
    try:
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture)
            if picture.mode == "F":
                raise ZooError(f"{path} has floating-point pixels of unknown range. Save it with 8 or 16 bits.")
            if picture.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it to white
                grey = torch.from_numpy(np.asarray(picture).astype(np.float32) / 65535)
                return grey.clamp(0, 1).expand(3, -1, -1).contiguous()
            if picture.mode in ("P", "PA", "LA", "RGBA"):
                picture = picture.convert("RGBA")
            pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ZooError(f"{path} cannot be read as a picture ({error}). Remove it or fetch it again.") from error
    return pixels.permute(2, 0, 1).float() / 255


def read_pair(pair: Pair) -> tuple[Tensor, Tensor]:
    """Rainy and clean picture of a pair.

    Raises:
        ZooError: naming the file if their sizes differ, or if one cannot be read.
    """
    path, partner = pair
    rainy = read_picture(path)
    if partner is None:
        if rainy.shape[-1] % 2:
            raise ZooError(f"{path} is {rainy.shape[-1]} pixels wide, but should hold two pictures of equal width.")
        rainy, clean = rainy.chunk(2, -1)
        return rainy, clean
    clean = read_picture(partner)
    if rainy.shape != clean.shape:
        raise ZooError(f"{path} is {_size(rainy)} and its clean picture {partner} is {_size(clean)}; they must agree.")
    return rainy, clean


def _size(picture: Tensor) -> str:
    return f"{picture.shape[-1]} x {picture.shape[-2]}"


def crop(pictures: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """The same random square of each picture, flipped and turned at random; small pictures are reflected outwards.

    Shapes:
        pictures: (..., h, w); returns (..., size, size)
    """
    if min(pictures.shape[-2:]) < size:
        h, w = pictures.shape[-2:]
        pictures = pad_reflect(pictures, size)[..., : max(h, size), : max(w, size)]
    h, w = pictures.shape[-2:]
    top, left = (int(torch.randint(side - size + 1, (), generator=generator)) for side in (h, w))
    pictures = pictures[..., top : top + size, left : left + size]
    flip, turns = (int(torch.randint(n, (), generator=generator)) for n in (2, 4))
    return torch.rot90(pictures.flip(-1) if flip else pictures, turns, (-2, -1)).contiguous()


# ---- generated rain -----------------------------------------------------------------------------------------------


def make_rain(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Layers of streaks to add to pictures: sparse noise, blurred along a line.

    A layer draws: the share of seeds that are kept (2 to 6 % of Gaussian noise, the largest), the length of the streaks
    (9 to 15 pixels), their angle (-30 to 30 degrees off the vertical) and their strength (0.4 to 0.9, the brightest
    pixel).

    Shapes:
        returns: (count, 1, height, width) in [0, 0.9]
    """
    uniform = torch.rand(4, count, 1, 1, generator=generator)
    share = 0.02 + 0.04 * uniform[0]
    length = 9 + 6 * uniform[1]
    angle = math.pi / 180 * (60 * uniform[2] - 30)
    strength = 0.4 + 0.5 * uniform[3]

    noise = torch.randn(count, height + 14, width + 14, generator=generator)
    level = -math.sqrt(2) * torch.erfinv(2 * share - 1)  # the Gaussian's quantile that ``share`` lies beyond
    seeds = (noise - level).clamp_min(0)

    # A line of that length and angle, one pixel thick, with soft ends and sides.
    y, x = torch.meshgrid(torch.arange(-7.0, 8), torch.arange(-7.0, 8), indexing="ij")
    along, across = y * angle.cos() + x * angle.sin(), x * angle.cos() - y * angle.sin()
    line = ((length + 1) / 2 - along.abs()).clamp(0, 1) * (1 - across.abs()).clamp_min(0)
    size = seeds.shape[-2:]  # by Fourier transform: each layer has a kernel of its own, and 15 x 15 is large
    spectrum = torch.fft.rfft2(seeds) * torch.fft.rfft2(line, s=size).conj()
    rain = torch.fft.irfft2(spectrum, s=size)[:, :height, :width].clamp_min(1e-4) - 1e-4  # rounding is no rain
    peak = rain.amax((1, 2), keepdim=True).clamp_min(1e-6)
    return (rain / peak * strength)[:, None]


def add_rain(clean: Tensor, generator: torch.Generator) -> Tensor:
    """Rainy pictures: clean plus a layer of streaks for each, clipped to [0, 1].

    Shapes:
        clean: (b, 3, h, w); returns (b, 3, h, w)
    """
    return (clean + make_rain(len(clean), *clean.shape[-2:], generator)).clamp(0, 1)


EMBEDDED = {  # photographs that scikit-image and scikit-learn install, no download; each serves one split only
    "train": ("astronaut.png", "coffee.png", "motorcycle_left.png", "flower.jpg"),
    "val": ("rocket.jpg",),
    "test": ("chelsea.png", "china.jpg"),
}


@functools.cache
def embedded_photos(split: str) -> tuple[Tensor, ...]:
    """The bundled photographs of a split, (3, h, w) in [0, 1].

    Raises:
        ZooError: if scikit-image or scikit-learn is not installed.
    """
    from importlib.util import find_spec

    folders = {}
    for package, part in (("skimage", "data"), ("sklearn", "datasets/images")):
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ZooError(
                "The embedded photographs come with scikit-image and scikit-learn: pip install them, or give a `root`."
            )
        folders[package] = Path(spec.origin).parent / part
    names = ((name, "sklearn" if name in ("china.jpg", "flower.jpg") else "skimage") for name in EMBEDDED[split])
    return tuple(read_picture(folders[package] / name) for name, package in names)


# ---- datasets -----------------------------------------------------------------------------------------------------


class Pairs(Dataset):
    """Pairs on disk: with ``patch``, a random crop of each; without, whole pictures."""

    def __init__(self, pairs: list[Pair], patch: int | None = None):
        self.pairs, self.patch = pairs, patch

    def __len__(self) -> int:
        return len(self.pairs)

    def sample(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        rainy, clean = read_pair(self.pairs[index])
        if self.patch:
            rainy, clean = crop(torch.stack((rainy, clean)), self.patch, generator)
        return {"rainy": rainy, "clean": clean, "name": self.pairs[index][0].stem}


class GeneratedRain(Dataset):
    """Fresh crops under fresh rain from clean photographs; an epoch is ``length`` crops."""

    def __init__(self, photos: list[Path] | tuple[Tensor, ...], length: int, patch: int):
        self.photos, self.length, self.patch = photos, length, patch
        self.read = functools.lru_cache(maxsize=256)(read_picture)  # some 250 photographs of 481 x 321 fit into 0.5 GB

    def __len__(self) -> int:
        return self.length

    def batch(self, indices: list[int], generator: torch.Generator) -> dict[str, Any]:
        clean = []
        for choice in torch.randint(len(self.photos), (len(indices),), generator=generator).tolist():
            photo = self.photos[choice]
            clean.append(crop(photo if isinstance(photo, Tensor) else self.read(photo), self.patch, generator))
        stacked = torch.stack(clean)
        rainy = add_rain(stacked, generator)
        return {"rainy": rainy, "clean": stacked, "name": [f"crop-{index}" for index in indices]}


class Fixed(Dataset):
    """Pictures made once and kept."""

    def __init__(self, rainy: Tensor, clean: Tensor):
        self.rainy, self.clean = rainy, clean

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"rainy": self.rainy[index], "clean": self.clean[index], "name": f"crop-{index}"}


@functools.lru_cache(maxsize=8)
def fixed_crops(split: str, count: int, patch: int, seed: int) -> Fixed:
    """``count`` rainy crops from the embedded photographs of a split, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed_from("derain", split, seed))
    batch = GeneratedRain(embedded_photos(split), count, patch).batch(list(range(count)), generator)
    return Fixed(batch["rainy"], batch["clean"])


class Photos(Dataset):
    """A user's own pictures, already known to be readable."""

    def __init__(self, files: dict[str, Path]):
        self.files, self.names = files, list(files)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.names[index]
        return {"rainy": read_picture(self.files[name]), "name": name}


# ---- the DataModule -----------------------------------------------------------------------------------------------


class DerainDataModule(ZooDataModule):
    """Single image deraining. Batch: "rainy", "clean": (b, 3, h, w) float in [0, 1]; "name": list[str].

    Training batches are square crops. Evaluation and prediction take whole pictures; where a batch of those holds
    several sizes, "rainy" and "clean" are lists of (3, h, w).

    root=None: fresh crops of photographs bundled with scikit-image and scikit-learn (public domain or CC BY) under
    generated rain; 60 fixed test crops come from photographs that training never sees.

    root=DIR: pairs in DIR or its folders train, val, test, as one of: input/X and target/X; rain-001.png and
    norain-001.png; rain/X2/norain-1x2.png and norain/norain-1.png; rainy_image/1_1.jpg and ground_truth/1.jpg;
    rain/000.png and gt/000gt.png.

    These are, in that order: RealRain-1k, HQ-Rain and what DRSformer packed (Rain200L/H, DID-Data, DDN-Data, SPA-Data);
    Rain100L/H; Rain200L/H; DDN; SPA-Data, whose real_world.txt is read as well. `LAYOUTS` has more. Without a folder
    for validation, every 20th training pair (at most 100) is held out for it. Licence: research use, or none stated.

    Args:
        root: folder of the set; None for the embedded photographs.
        batch_size: crops a training batch, pictures an evaluation batch.
        num_workers: processes that read pictures.
        seed: of order, crops and generated rain.
        patch: side of training crops in pixels, a multiple of 8; by default 128 (the paper's), 48 when embedded.
        length: crops an epoch, where rain is generated.
        photos: folder of clean photographs, relative to ``root``, to train on under generated rain instead of the set's
            own training pairs; each tenth one is for validation. Every photograph that ``DIR/index.json`` names (the
            sources of Rain100H's test pictures) is left out.
    Raises:
        FileNotFoundError: if a folder is missing or holds no layout that is known.
        ZooError: naming pictures without a partner, or that are broken.
    Example:
        >>> data = DerainDataModule()
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch["rainy"].shape
        torch.Size([8, 3, 48, 48])
    """

    embedded: ClassVar[str] = "crops of photographs bundled with scikit-image and scikit-learn, under generated rain"

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        patch: int | None = None,
        length: int = 400,
        photos: str | None = None,
    ):
        super().__init__(root, batch_size, num_workers, seed)
        self.patch = patch or (48 if root is None else 128)
        if self.patch < 16 or self.patch % 8 or length < 1:
            raise ValueError(
                f"patch is {patch} and length {length}; patch must be a multiple of 8 from 16 on, length at least 1."
            )
        if photos is not None and root is None:
            raise ValueError("photos is a folder relative to `root`, and no root was given.")
        self.length, self.photos = length, photos
        self._files: dict[str, Path] = {}
        self.save_hyperparameters()

    # ---- sets ---------------------------------------------------------------------------------------------------

    def build(self) -> dict[str, Dataset]:
        if self.root is None:
            return {
                "train": GeneratedRain(embedded_photos("train"), self.length, self.patch),
                "val": fixed_crops("val", 20, self.patch, self.seed),
                "test": fixed_crops("test", 60, self.patch, self.seed),
            }
        pairs = {split: self.pairs(split) for split in SPLITS}
        if not any(pairs.values()):
            pairs["test"] = find_pairs(self.root)  # a test set alone, such as Rain100H
        sets: dict[str, Dataset] = {}
        if self.photos is not None:
            photos = self.clean_photos()
            held = photos[::10]
            generator = torch.Generator().manual_seed(seed_from("derain", "photos", self.seed))
            fixed = GeneratedRain(held, 40, self.patch).batch(list(range(40)), generator)
            sets["train"] = GeneratedRain([p for p in photos if p not in set(held)], self.length, self.patch)
            sets["val"] = Fixed(fixed["rainy"], fixed["clean"])
        elif pairs["train"]:
            if not pairs["val"] and len(pairs["train"]) > 1:
                step = max(20, -(-len(pairs["train"]) // 100))
                pairs["val"] = pairs["train"][step // 2 :: step] or pairs["train"][-1:]
                held_out = set(pairs["val"])
                pairs["train"] = [pair for pair in pairs["train"] if pair not in held_out]
            sets["train"] = Pairs(pairs["train"], self.patch)
        for split in ("val", "test"):
            if pairs[split] and split not in sets:
                sets[split] = Pairs(pairs[split])
        if not sets:
            raise FileNotFoundError(f"{self.root} holds no pairs in a layout that is known. Expected {self.layout()}")
        return sets

    def pairs(self, split: str) -> list[Pair]:
        """The pairs of a split on disk, none where the root has no folder for it."""
        assert self.root is not None
        for folder in split_folders(self.root, split):
            for file in (folder / LISTS.get(split, ""), folder.parent / LISTS.get(split, "")):
                if file.is_file():
                    return listed_pairs(file)
            if pairs := find_pairs(folder):
                return pairs
        return []

    def clean_photos(self) -> list[Path]:
        """Photographs to put rain on, less those that the test set was made from."""
        assert self.root is not None and self.photos is not None
        folder = self.need(self.photos, expected="a folder of clean photographs", get="BSD300's train folder serves.")
        index = self.root / "index.json"
        named = set()
        if index.is_file():
            named = {Path(entry["clean"]).name for entry in json.loads(index.read_text())}
        found = [p for p in sorted(folder.rglob("*"), key=_natural) if p.suffix.lower() in PICTURES]
        kept = [p for p in found if p.name not in named]
        if len(kept) < 2:
            raise FileNotFoundError(f"{folder} holds {len(kept)} usable photographs; at least 2 are needed.")
        return kept

    @staticmethod
    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:  # type: ignore[override]
        """Stacks pictures of one size; keeps a list where sizes differ."""
        if len({item["rainy"].shape for item in items}) == 1:
            return default_collate(items)
        return {key: [item[key] for item in items] for key in items[0]}

    # ---- a user's own photographs -------------------------------------------------------------------------------

    def read(self, path: Path) -> Dataset:
        """A picture, or all pictures in a folder and below: PNG, JPEG, WebP, BMP, TIFF; any size; ``name`` is the path
        in the folder without its suffix. Broken ones are named and left out."""
        files = [path] if path.is_file() else sorted((p for p in path.rglob("*") if p.is_file()), key=_natural)
        pictures = [p for p in files if p.suffix.lower() in PICTURES or p == path]
        self._files = {}
        for file in pictures:
            try:
                read_picture(file)
            except ZooError as error:
                self.skip(file, error)
                continue
            name = file.stem if path.is_file() else file.relative_to(path).with_suffix("").as_posix()
            if name in self._files:  # photo.jpg beside photo.png
                name = f"{name}{file.suffix}"
            self._files[name] = file
        return Photos(dict(self._files))

    def write(self, predictions: Iterable[dict[str, Any]], path: Path) -> list[Path]:
        """Write ``derained`` as 8-bit PNG files: ``path`` itself where it names a picture and there is one, otherwise
        ``path/NAME.png``. An original's transparency and colour profile are kept."""
        single = path.suffix.lower() in PICTURES
        written: list[Path] = []
        for prediction in predictions:
            for name, picture in zip(prediction["name"], prediction["derained"], strict=True):
                if single and written:
                    raise ZooError(f"{path} is one picture, but there are several to write. Name a folder.")
                target = path if single else path / f"{name}.png"
                pixels = (picture.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
                image, options = Image.fromarray(pixels), {}
                suffix = target.suffix.lower()
                alpha, profile = _extras(self._files[name]) if name in self._files else (None, None)
                if alpha is not None and suffix in (".png", ".webp", ".tif", ".tiff"):
                    image.putalpha(alpha)
                if profile is not None and suffix != ".bmp":
                    options["icc_profile"] = profile
                if suffix in (".jpg", ".jpeg", ".webp"):
                    options["quality"] = 95
                with atomic_write(target) as part:
                    image.save(part, **options)
                written.append(target)
        return written


def _extras(path: Path) -> tuple[Image.Image | None, bytes | None]:
    """What a picture carries beside its colours: transparency (upright) and the profile of its RGB values."""
    with Image.open(path) as picture:
        profile = picture.info.get("icc_profile") if picture.mode in ("RGB", "RGBA", "P") else None
        upright = ImageOps.exif_transpose(picture)
        transparent = upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info
        return upright.convert("RGBA").getchannel("A") if transparent else None, profile
