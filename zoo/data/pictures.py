"""Sets of labelled pictures on disk, in the layouts that they are published in, as arrays of bytes.

Index legend: n pictures, c channels, h/w height and width, k classes.
"""

import gzip
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.core import ZooError
from zoo.data.plain import csv_rows, load_npz, unpickle

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
LAYOUT = """<name>.npz with x_train, y_train, x_test, y_test (one file a site, where there are several);
cifar-10-batches-py/ or cifar-100-python/; MNIST/raw/ or FashionMNIST/raw/ with idx files, gzipped or not;
train_32x32.mat and test_32x32.mat (SVHN); {train,test}/<class>/<picture>; client_<x>/<class>/<picture>,
a site each, with or without test/<class>/<picture>; clients.csv with file,client,class[,split] beside pictures;
EmoLabel/list_patition_label.txt and Image/aligned/ (RAF-DB basic); or fer2013new.csv (FERPlus) beside fer2013.csv or
FER2013Train/ and FER2013Test/"""
EXPRESSIONS = {
    "RAF-DB": ["surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral"],
    "FERPlus": ["neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt"],
}
"""Classes of the sets of faces, in the order of their labels or columns."""


@dataclass
class Pictures:
    """A part of a set: pictures (n, c, h, w), uint8 or for vectors float, labels (n,), and the site of each."""

    image: Tensor
    label: Tensor
    site: Tensor | None = None
    """(n,) long, index into ``sites``."""

    def __len__(self) -> int:
        return len(self.label)


@dataclass
class PictureSet:
    """Training and test part, names of the classes, and of the sites where the set has them."""

    train: Pictures
    test: Pictures
    classes: list[str]
    sites: list[str] = field(default_factory=list)


def read_pictures(root: Path, image_size: int | None = None, channels: int | None = None) -> PictureSet:
    """The set in a folder, whichever of the layouts it has.

    Args:
        root: folder. image_size: side that pictures are resized to; None keeps them, which must then be alike.
        channels: 1 or 3; None keeps them: a grey picture among coloured ones gets three equal channels.
    Raises:
        FileNotFoundError: if none of the layouts is there, naming them.
        ZooError: for a file that cannot be read, or pictures of different sizes.
    """
    packed = sorted(root.glob("*.npz"))
    if packed:
        found = _npz(packed)
    elif (root / "cifar-10-batches-py").is_dir() or (root / "cifar-100-python").is_dir():
        found = [_cifar(root)]
    elif (idx := _idx_folder(root)) is not None:
        found = [_idx(idx)]
    elif (root / "train_32x32.mat").is_file():
        found = [_svhn(root)]
    elif (root / "clients.csv").is_file():
        return _listed(root, image_size, channels)
    elif (raf := next((place for place in (root, root / "basic") if (place / "EmoLabel").is_dir()), None)) is not None:
        return _raf_db(raf, image_size, channels)
    elif (root / "fer2013new.csv").is_file():
        return _ferplus(root, image_size, channels)
    elif (root / "train").is_dir() or any(root.glob("client_*/")):
        return _folders(root, image_size, channels)
    else:
        raise FileNotFoundError(f"{root} holds no set of pictures: expected {' '.join(LAYOUT.split())}.")
    sets = [_alike(one, image_size, channels) for one in found]
    shapes = {tuple(part.image.shape[1:]) for one in sets for part in (one.train, one.test)}
    if len(shapes) > 1:
        wide = max(shape[0] for shape in shapes)
        side = image_size or max(shape[1] for shape in shapes)
        sets = [_alike(one, side, channels or wide) for one in sets]
    if len(sets) == 1:
        return sets[0]
    return _joined(sets, [file.stem for file in packed])


def _joined(sets: list[PictureSet], sites: list[str]) -> PictureSet:
    parts = []
    for split in ("train", "test"):
        own = [getattr(one, split) for one in sets]
        site = torch.cat([torch.full_like(part.label, i) for i, part in enumerate(own)])
        parts.append(Pictures(torch.cat([p.image for p in own]), torch.cat([p.label for p in own]), site))
    most = max((one.classes for one in sets), key=len)
    return PictureSet(parts[0], parts[1], most, sites)


def _alike(found: PictureSet, side: int | None, channels: int | None) -> PictureSet:
    for part in (found.train, found.test):
        part.image = fit(part.image, side, channels)
    return found


def fit(image: Tensor, side: int | None, channels: int | None) -> Tensor:
    """Pictures with that side (area averages where they shrink, else bilinear) and that many channels.

    Shapes:
        image: (n, c, h, w) uint8; returns: (n, channels, side, side) uint8
    """
    if side is not None and tuple(image.shape[2:]) != (side, side):
        mode = {"mode": "area"} if side < image.shape[2] else {"mode": "bilinear", "align_corners": False}
        pieces = [F.interpolate(piece.float(), (side, side), **mode) for piece in image.split(4096)]  # type: ignore[arg-type]
        image = torch.cat([piece.round().clamp(0, 255).to(image.dtype) for piece in pieces])
    if channels == 3 and image.shape[1] == 1:
        image = image.expand(-1, 3, -1, -1).contiguous()
    elif channels == 1 and image.shape[1] == 3:
        grey = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        image = (image.float() * grey).sum(1, keepdim=True).round().to(image.dtype)
    elif channels is not None and image.shape[1] != channels:
        raise ZooError(f"Pictures have {image.shape[1]} channels, not {channels}.")
    return image


# ---- layouts --------------------------------------------------------------------------------------------------------


def _npz(files: list[Path]) -> list[PictureSet]:
    found = []
    for file in files:
        arrays = load_npz(file, ("x_train", "y_train", "x_test", "y_test"))
        train, test = (_arrays(file, arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test"))
        names = [str(name) for name in arrays["classes"]] if "classes" in arrays else _numbers(train, test)
        found.append(PictureSet(train, test, names))
    return found


def _numbers(*parts: Pictures) -> list[str]:
    return [str(i) for i in range(max(int(part.label.max()) for part in parts if len(part)) + 1)]


def _arrays(file: Path, x: np.ndarray, y: np.ndarray) -> Pictures:
    y = y.reshape(-1)
    if len(x) != len(y) or not np.issubdtype(y.dtype, np.integer) or (len(y) and y.min() < 0):
        raise ZooError(f"{file}: {len(x)} pictures and {len(y)} labels of type {y.dtype}; expected as many, from 0.")
    shapes = {2: (0, 1, None, None), 3: (0, None, 1, 2), 4: (0, 3, 1, 2)}
    if x.ndim not in shapes:
        raise ZooError(f"{file}: pictures have shape {x.shape}; expected (n, h, w), (n, h, w, c), or (n, d) vectors.")
    x = np.expand_dims(x, 1) if x.ndim == 3 else x[:, :, None, None] if x.ndim == 2 else x.transpose(0, 3, 1, 2)
    if x.dtype != np.uint8:
        x = x.astype(np.float32)
        if not np.isfinite(x).all():
            raise ZooError(f"{file} holds values that are NaN or infinite.")
        if x.shape[2] > 1 and len(x) and (x.min() < 0 or x.max() > 1):
            raise ZooError(f"{file}: pictures lie in [{x.min():g}, {x.max():g}]; expected bytes, or floats in [0, 1].")
    return Pictures(torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(y.astype(np.int64)))


def _cifar(root: Path) -> PictureSet:
    """The "python version" of CIFAR-10 or CIFAR-100, one pickle a batch: data (n, 3072) and labels."""
    ten = root / "cifar-10-batches-py"
    folder = ten if ten.is_dir() else root / "cifar-100-python"
    train = sorted(folder.glob("data_batch_*")) if folder is ten else [folder / "train"]
    test = [folder / ("test_batch" if folder is ten else "test")]
    meta, key = ("batches.meta", "label_names") if folder is ten else ("meta", "fine_label_names")
    label = "labels" if folder is ten else "fine_labels"
    parts = []
    for files in (train, test):
        missing = [file for file in files if not file.is_file()] or ([folder / "data_batch_1"] if not files else [])
        if missing:
            raise FileNotFoundError(f"{missing[0]} is missing: expected the python version of CIFAR, unpacked.")
        images, labels = [], []
        for file in files:
            batch = unpickle(file)
            if not isinstance(batch, dict) or not {"data", label} <= batch.keys():
                raise ZooError(f"{file} holds no CIFAR batch: expected a dictionary with 'data' and {label!r}.")
            images.append(np.asarray(batch["data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
            labels.append(np.asarray(batch[label], dtype=np.int64))
        parts.append(Pictures(torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels))))
    names = unpickle(folder / meta)[key] if (folder / meta).is_file() else _numbers(*parts)
    return PictureSet(parts[0], parts[1], [str(name) for name in names])


def _idx_folder(root: Path) -> Path | None:
    places = [root, root / "raw", *sorted(root.glob("*/raw"))]
    return next((p for p in places if any(p.glob("train-images*"))), None)


def _idx(folder: Path) -> PictureSet:
    """MNIST's four files: a magic number, the sizes, then bytes."""

    def array(stem: str) -> np.ndarray:
        files = sorted(folder.glob(f"{stem}*"), key=lambda p: p.suffix == ".gz")
        if not files:
            raise FileNotFoundError(f"{folder / stem}-ubyte is missing: expected the four idx files of the set.")
        raw = files[0].read_bytes()
        try:
            raw = gzip.decompress(raw) if files[0].suffix == ".gz" else raw
            zero, kind, dims = struct.unpack(">HBB", raw[:4])
            shape = struct.unpack(f">{dims}I", raw[4 : 4 + 4 * dims])
            if zero or kind != 8:
                raise ValueError("no idx file of bytes")
            return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)
        except (OSError, EOFError, ValueError, struct.error) as error:
            raise ZooError(f"{files[0]} cannot be read as an idx file: {error}") from error

    parts = []
    for name in ("train", "t10k"):
        parts.append(_arrays(folder, array(f"{name}-images").copy(), array(f"{name}-labels").copy()))
    return PictureSet(parts[0], parts[1], _numbers(*parts))


def _svhn(root: Path) -> PictureSet:
    """Cropped digits of SVHN: X (32, 32, 3, n), y (n, 1) with 10 for the digit 0."""
    from scipy.io import loadmat

    parts = []
    for name in ("train", "test"):
        file = root / f"{name}_32x32.mat"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: expected train_32x32.mat and test_32x32.mat.")
        try:
            content = loadmat(file, variable_names=["X", "y"])
            x, y = content["X"].transpose(3, 0, 1, 2), content["y"].reshape(-1).astype(np.int64) % 10
        except Exception as error:
            raise ZooError(f"{file} cannot be read as a MATLAB file with X and y: {error}") from error
        parts.append(_arrays(file, x, y))
    return PictureSet(parts[0], parts[1], [str(i) for i in range(10)])


def _folders(root: Path, side: int | None, channels: int | None) -> PictureSet:
    """Pictures in folders by class; without test/, the last fifth of each site's pictures of a class tests."""
    sites = sorted(p for p in root.glob("client_*") if p.is_dir())
    bases = sites or [root / "train"]
    names = sorted({p.name for base in (*bases, root / "test") for p in base.glob("*/")})
    if not names:
        raise FileNotFoundError(f"{bases[0]} has no class folders: expected {bases[0]}/<class>/<picture>.")
    rows: dict[str, list[tuple[Tensor, int, int]]] = {"train": [], "test": []}
    for site, base in enumerate(bases):
        for label, name in enumerate(names):
            files = list(_files(base / name))
            cut = len(files) if (root / "test").is_dir() else len(files) - len(files) // 5
            for i, file in enumerate(files):
                rows["train" if i < cut else "test"].append((open_picture(file, side, channels), label, site))
    for label, name in enumerate(names):
        for file in _files(root / "test" / name):
            rows["test"].append((open_picture(file, side, channels), label, -1))
    return _assembled(root, rows, names, [site.name.removeprefix("client_") for site in sites], channels)


def _listed(root: Path, side: int | None, channels: int | None) -> PictureSet:
    """Pictures by ``clients.csv``: file, client, class and, in a fourth column where there is one, train or test.

    Without a split, the last fifth of each client's pictures of a class tests. Pictures for testing whose client is
    empty are of no site.
    """
    table = root / "clients.csv"
    lines = csv_rows(table)
    if not lines:
        raise ZooError(f"{table} is empty: expected a header, then file,client,class[,split] a line.")
    wide = len(lines[0][1])
    for number, line in lines:
        if len(line) != wide or wide not in (3, 4) or not line[0] or not line[2] or (wide == 3 and not line[1]):
            raise ZooError(f"{table}, line {number}: {','.join(line)!r}; expected file,client,class[,split].")
        if wide == 4 and (line[3] not in ("train", "test") or (line[3] == "train" and not line[1])):
            raise ZooError(f"{table}, line {number}: split is {line[3]!r}; 'train' (of a client) or 'test'.")
    names = sorted({line[2] for _, line in lines}, key=_number_or_name)
    sites = sorted({line[1] for _, line in lines if line[1]}, key=_number_or_name)
    groups: dict[tuple[str, str], list[Path]] = {}
    rows: dict[str, list[tuple[Tensor, int, int]]] = {"train": [], "test": []}
    label, site = ({name: i for i, name in enumerate(every)} for every in (names, sites))
    for _, line in lines:
        file = root / line[0]
        if wide == 4:
            rows[line[3]].append((open_picture(file, side, channels), label[line[2]], site.get(line[1], -1)))
        else:
            groups.setdefault((line[1], line[2]), []).append(file)
    for (client, name), files in groups.items():
        for i, file in enumerate(files):
            part = rows["train" if i < len(files) - len(files) // 5 else "test"]
            part.append((open_picture(file, side, channels), label[name], site[client]))
    return _assembled(root, rows, names, sites, channels)


def _raf_db(root: Path, side: int | None, channels: int | None) -> PictureSet:
    """Aligned faces of RAF-DB's basic expressions: lines are train_00001.jpg or test_0001.jpg, and 1 to 7."""
    table = root / "EmoLabel" / "list_patition_label.txt"
    if not table.is_file():
        raise FileNotFoundError(f"{table} is missing: expected a picture and its label, 1 to 7, a line.")
    names = EXPRESSIONS["RAF-DB"]
    rows: dict[str, list[tuple[Tensor, int, int]]] = {"train": [], "test": []}
    for number, line in enumerate(table.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        file, _, label = line.strip().partition(" ")
        part = file.partition("_")[0]
        if part not in rows or not label.isdecimal() or not 1 <= int(label) <= len(names):
            raise ZooError(
                f"{table}, line {number}: {line[:80]!r}; expected train_<n>.jpg or test_<n>.jpg, and 1 to 7."
            )
        picture = root / "Image" / "aligned" / f"{Path(file).stem}_aligned.jpg"
        rows[part].append((open_picture(picture, side, channels), int(label) - 1, -1))
    return _assembled(root, rows, names, [], channels)


def _ferplus(root: Path, side: int | None, channels: int | None) -> PictureSet:
    """Faces of FER2013 with the votes of FERPlus: ``Usage,Image name``, then one column a class, unknown and no face.

    The label has more than half of the votes that two taggers or more agree on, which is FERPlus' "majority"; faces
    without one are left out. "Training" trains, "PrivateTest" tests, and "PublicTest" is not used. Pixels are those of
    fer2013.csv, whose lines are in the same order, or the pictures of FER2013Train/ and FER2013Test/.
    """
    table, pixels = root / "fer2013new.csv", root / "fer2013.csv"
    names, lines = EXPRESSIONS["FERPlus"], csv_rows(root / "fer2013new.csv")
    faces = csv_rows(pixels) if pixels.is_file() else None
    if faces is not None and len(faces) != len(lines):
        raise ZooError(f"{pixels} has {len(faces)} faces and {table} {len(lines)}; expected the same, in one order.")
    rows: dict[str, list[tuple[Tensor, int, int]]] = {"train": [], "test": []}
    folders = {"Training": ("train", "FER2013Train"), "PrivateTest": ("test", "FER2013Test")}
    for place, (number, line) in enumerate(lines):
        votes = line[2:]
        if len(votes) != len(names) + 2 or not all(vote.isdecimal() for vote in votes):
            raise ZooError(
                f"{table}, line {number}: {len(line)} columns; expected Usage, Image name and 10 vote counts."
            )
        label = _majority([int(vote) for vote in votes])
        if line[0] not in folders or label >= len(names):
            continue
        part, folder = folders[line[0]]
        if faces is None:
            face = open_picture(root / folder / line[1], side, channels)
        else:
            face = fit(_face(pixels, *faces[place])[None], side, channels)[0]
        rows[part].append((face, label, -1))
    return _assembled(root, rows, names, [], channels)


def _majority(votes: list[int]) -> int:
    """The column with more than half of the votes, single ones aside; the number of columns where there is none."""
    agreed = [vote if vote > 1 else 0 for vote in votes]
    return agreed.index(max(agreed)) if 2 * max(agreed) > sum(agreed) else len(votes)


def _face(file: Path, number: int, line: list[str]) -> Tensor:
    """The 48 x 48 grey values of a line of fer2013.csv, ``emotion,pixels,Usage``: (1, 48, 48)."""
    try:
        values = np.array(line[1].split(), dtype=np.int64).reshape(1, 48, 48)
        if values.min() < 0 or values.max() > 255:
            raise ValueError("no bytes")
    except (IndexError, ValueError) as error:
        raise ZooError(
            f"{file}, line {number}: expected emotion, 48 x 48 grey values from 0 to 255, and Usage."
        ) from error
    return torch.from_numpy(values.astype(np.uint8))


def _number_or_name(word: str) -> tuple[int, int, str]:
    return (0, int(word), word) if word.isdecimal() else (1, 0, word)


def _assembled(
    root: Path, rows: dict[str, list[tuple[Tensor, int, int]]], names: list[str], sites: list[str], channels: int | None
) -> PictureSet:
    """A set from its pictures (c, h, w), their labels and sites, for "train" and "test"."""
    most = channels or max((image.shape[0] for part in rows.values() for image, *_ in part), default=1)
    parts = []
    for part in rows.values():
        images = [fit(image[None], None, most)[0] for image, *_ in part]
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) > 1:
            raise ZooError(
                f"{root} holds pictures of {len(shapes)} sizes ({sorted(shapes)[0][1:]}, ...): set image_size."
            )
        image = torch.stack(images) if images else torch.zeros(0, most, 1, 1, dtype=torch.uint8)
        where = torch.tensor([site for *_, site in part], dtype=torch.long)
        parts.append(Pictures(image, torch.tensor([y for _, y, _ in part], dtype=torch.long), where if sites else None))
    return PictureSet(parts[0], parts[1], names, sites)


def _files(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.glob("*")) if p.suffix.lower() in SUFFIXES)


def open_picture(file: Path, side: int | None = None, channels: int | None = None) -> Tensor:
    """A picture file, turned as its EXIF data say, scaled to a square of ``side``: (c, h, w) uint8.

    Raises:
        ZooError: if it cannot be read.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as raw:
            image = ImageOps.exif_transpose(raw)
            grey = image.mode in ("1", "L", "I", "I;16", "F", "LA")
            image = image.convert("L" if (grey if channels is None else channels == 1) else "RGB")
            if side is not None:
                image = image.resize((side, side), Image.Resampling.BILINEAR)
            array = np.asarray(image, dtype=np.uint8)
    except (OSError, ValueError, SyntaxError) as error:
        raise ZooError(f"{file} cannot be read as a picture: {error}") from error
    return torch.from_numpy(array.reshape(array.shape[0], array.shape[1], -1).transpose(2, 0, 1).copy())
