"""Public time series, from compressed copies into the layout that their publisher uses."""

import gzip
import shutil
from pathlib import Path


def unpack_etth1(source: Path, target: Path) -> None:
    """ETTh1.csv.gz -> target/ETTh1.csv (ETDataset: hourly transformer load and oil temperature)."""
    _unzip(source, "ETTh1.csv.gz", target / "ETTh1.csv")


def unpack_etth2(source: Path, target: Path) -> None:
    """ETTh2.csv.gz -> target/ETTh2.csv."""
    _unzip(source, "ETTh2.csv.gz", target / "ETTh2.csv")


def _unzip(source: Path, name: str, target: Path) -> None:
    found = sorted(source.rglob(name))
    if not found:
        raise FileNotFoundError(f"{name} is missing under {source}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(found[0], "rb") as packed, open(target, "wb") as plain:
        shutil.copyfileobj(packed, plain)
