"""Restoration sets as archived into their public layouts."""

import json
import zipfile
from pathlib import Path


def unpack_bsd300(source: Path, target: Path) -> None:
    """``bsd300_jpg.zip`` -> ``target/{train,test}/*.jpg``, the original files."""
    with zipfile.ZipFile(source / "bsd300_jpg.zip") as archive:
        archive.extractall(target)


def unpack_rain100h(source: Path, target: Path) -> None:
    """``rain100h.zip`` and ``bsd300_jpg.zip`` -> ``target/rain-001.png``, ``norain-001.png``, ...: the test pairs.

    The archive stores each pair as a grey layer on a crop of a BSD300 picture. ``index.json``, which names those
    pictures, is kept: who trains on BSD300 must leave them out.
    """
    import numpy as np
    from PIL import Image

    with zipfile.ZipFile(source / "bsd300_jpg.zip") as photos, zipfile.ZipFile(source / "rain100h.zip") as layers:
        index = layers.read("index.json")
        held = set(layers.namelist())
        for entry in json.loads(index):
            with photos.open(entry["clean"].removeprefix("bsd300/")) as file:
                clean = np.asarray(Image.open(file).convert("RGB"))
            top, left = entry["top"], entry["left"]
            clean = clean[top : top + entry["height"], left : left + entry["width"]]
            number = entry["id"]
            if f"rainy/{number}.png" in held:
                with layers.open(f"rainy/{number}.png") as file:
                    rainy = np.asarray(Image.open(file).convert("RGB"))
            else:
                with layers.open(f"streak/{number}.png") as file:
                    streak = np.asarray(Image.open(file).convert("L")).astype(np.int16)[..., None]
                rainy = np.clip(clean + streak, 0, 255).astype(np.uint8)
            Image.fromarray(rainy).save(target / f"rain-{number:03d}.png", compress_level=1)
            Image.fromarray(clean).save(target / f"norain-{number:03d}.png", compress_level=1)
        (target / "index.json").write_bytes(index)
