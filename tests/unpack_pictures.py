"""Classification sets as one .npz of arrays each: x_train, y_train, x_test, y_test."""

import io
import itertools
from pathlib import Path

import numpy as np

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def unpack_cifar10(source: Path, target: Path) -> None:
    """JPEG files one after another into target/cifar10.npz."""
    from PIL import Image

    target.mkdir(parents=True, exist_ok=True)
    found: dict[str, np.ndarray] = {"classes": np.array(NAMES)}
    with np.load(source / "cifar10_jpeg.npz", allow_pickle=False) as packed:
        for part in ("train", "test"):
            raw, ends = packed[f"jpeg_{part}"], packed[f"offsets_{part}"].astype(np.int64)
            files = (raw[a:b].tobytes() for a, b in itertools.pairwise(ends))
            found[f"x_{part}"] = np.stack([np.asarray(Image.open(io.BytesIO(f)).convert("RGB")) for f in files])
            found[f"y_{part}"] = packed[f"labels_{part}"]
    np.savez(target / "cifar10.npz", **found)


def unpack_digits(source: Path, target: Path) -> None:
    """MNIST and USPS beside each other, a site each: target/{mnist,usps}.npz."""
    unpack_mnist(source.parent / "mnist", target)
    with np.load(source.parent / "usps" / "usps.npz", allow_pickle=False) as packed:
        arrays = {key: packed[key] for key in packed.files}
    for key in ("x_train", "x_test"):  # stored in units of 1 / 2000
        arrays[key] = (arrays[key].astype(np.float32) * (255 / 2000)).round().clip(0, 255).astype(np.uint8)
    np.savez(target / "usps.npz", **arrays)


def unpack_mnist(source: Path, target: Path) -> None:
    """MNIST into target/mnist.npz."""
    target.mkdir(parents=True, exist_ok=True)
    with np.load(source.parent / "mnist" / "mnist.npz", allow_pickle=False) as packed:
        np.savez(target / "mnist.npz", **{key: packed[key] for key in packed.files})


def unpack_fashion_mnist(source: Path, target: Path) -> None:
    """15,000 of the 60,000 training pictures of Fashion-MNIST, and its test set, into target/fashion_mnist.npz."""
    target.mkdir(parents=True, exist_ok=True)
    with np.load(source.parent / "fashion_mnist" / "fashion_mnist_15k.npz", allow_pickle=False) as packed:
        np.savez(target / "fashion_mnist.npz", **{key: packed[key] for key in packed.files})
