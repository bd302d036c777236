"""Writing that leaves the old file or the new one, never half of either."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from zoo.core.errors import ZooError


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it takes its name, on failure it is removed.

    The temporary name ends as ``path`` does, so that writers which choose a format by suffix work.

    Raises:
        ZooError: if the folder cannot be written or the disk is full.
    """
    path = Path(path)
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        part = Path(name)
        yield part
        with open(part, "rb") as stream:
            os.fsync(stream.fileno())
        part.chmod(0o666 & ~_umask())
        os.replace(part, path)
    except OSError as error:
        raise ZooError(
            f"Cannot write {path}: {error.strerror or error}. Choose a folder with space and access."
        ) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success each of its files replaces the one of that name in ``path``.

    Raises:
        ZooError: if the folder cannot be written or the disk is full; ``path`` is then as it was.
    """
    path = Path(path)
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        yield part
        path.mkdir(exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied", str(path))
        for file in sorted(part.rglob("*")):
            if file.is_file():
                file.chmod(0o666 & ~_umask())
                target = path / file.relative_to(part)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
    except OSError as error:
        raise ZooError(
            f"Cannot write {path}: {error.strerror or error}. Choose a folder with space and access."
        ) from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
