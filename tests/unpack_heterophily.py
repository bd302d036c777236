"""The npz files of yandex-research/heterophilous-graphs, one folder a graph."""

import shutil
from pathlib import Path


def unpack_heterophily(source: Path, target: Path) -> None:
    """``NAME.npz`` in ``source`` -> ``target/NAME/NAME.npz``, unchanged: that is the public layout."""
    for archive in sorted(source.glob("*.npz")):
        folder = target / archive.stem
        folder.mkdir(parents=True)
        shutil.copy2(archive, folder / archive.name)
