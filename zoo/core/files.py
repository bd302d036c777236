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
    """Yield a temporary folder; on success its files take their places in ``path``, those of the same name replaced.

    A new ``path`` appears whole, in one step. One that is there gets file by file, each old or new but never half; the
    temporary folder then lies inside it, for it may be a mount point or the only place that may be written to.

    Raises:
        ZooError: if the folder cannot be written or the disk is full; ``path`` is then as it was.
    """
    path = Path(path)
    part = None
    try:
        new = not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent if new else path))
        yield part
        files = [file for file in sorted(part.rglob("*")) if file.is_file()]
        for file in files:
            file.chmod(0o666 & ~_umask())
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        if new:
            part.chmod(0o777 & ~_umask())
            os.rename(part, path)
        else:
            for file in files:
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
