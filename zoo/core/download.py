"""Fetching a public dataset's file: to ``.part``, resumed where it stopped, checked, then renamed."""

import hashlib
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.core.errors import ZooError

if TYPE_CHECKING:
    from zoo.core.datamodule import Source


def fetch(source: "Source", path: Path) -> Path:
    """Fetch ``source`` to ``path`` unless it is there; a broken-off transfer goes on where it stopped.

    Raises:
        ZooError: if the address cannot be read or the file's sha256 differs.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(source.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with (
            urllib.request.urlopen(request, timeout=60) as answer,
            open(part, "ab" if answer.status == 206 else "wb") as out,
        ):
            while block := answer.read(1 << 20):
                out.write(block)
    except (urllib.error.URLError, OSError) as error:
        raise ZooError(
            f"Downloading {source.url} failed: {error}. Try again: what has come is kept in {part}."
        ) from error
    digest = hashlib.sha256()
    with open(part, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != source.sha256:
        part.unlink()
        raise ZooError(
            f"{source.url}: the sha256 is {digest.hexdigest()}, expected {source.sha256}. The file was dropped."
        )
    part.replace(path)
    return path
