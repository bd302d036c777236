"""What lives on with each client from round to round, in memory or in files."""

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.core.errors import ZooError
from zoo.core.files import atomic_write

_held: ContextVar[list[int] | None] = ContextVar("held", default=None)


@contextmanager
def holding(clients: Sequence[int]) -> Iterator[None]:
    """Modules that are built within have the rows of these clients only, as on a machine of theirs."""
    before = _held.set(list(clients))
    try:
        yield
    finally:
        _held.reset(before)


class ClientStates(nn.Module):
    """One row a client of each of several tensors: control variates, personal heads, masks.

    In memory the tensors are buffers, and travel with every checkpoint. After `to_disk` they are memory-mapped files:
    memory then holds only the rows of clients at work.

    Args:
        clients: how many there are.
        held: those whose rows are kept here; None = all.
        lean: take no memory for rows before one is written, which after `to_disk` none is in memory.
    """

    def __init__(self, clients: int, held: Sequence[int] | None = None, lean: bool = False):
        super().__init__()
        self.clients, self.lean = clients, lean
        self.held = None if held is None else list(held)
        self._first: dict[str, Tensor] = {}  # of rows that are not here
        self._names: dict[str, str] = {}
        self._files: dict[str, Tensor] = {}
        self.folder: Path | None = None

    def add(self, name: str, first: Tensor) -> None:
        """Keep a tensor for each client, whose first value is ``first`` for all."""
        key = name.replace(".", "__")
        self._names[name] = key
        rows = self.clients if self.held is None else len(self.held)
        row = first.detach().clone()
        self.register_buffer(key, row.expand(rows, *row.shape) if self.lean else row.repeat(rows, *[1] * row.ndim))
        if self.held is not None:
            self._first[name] = first.detach().clone()

    def complete(self) -> None:
        """Give the clients that are kept elsewhere their first values, so that a checkpoint has a row for each."""
        held, self.held = self.held, None
        for name, key in self._names.items() if held is not None else ():
            rows = getattr(self, key)
            full = self._first[name].to(rows.device)[None].repeat(self.clients, *[1] * (rows.ndim - 1))
            full[torch.as_tensor(held, dtype=torch.long)] = rows
            setattr(self, key, full)
        self._first = {}

    def _places(self, clients: Sequence[int]) -> Tensor:
        """Which rows are these clients'."""
        if self.held is None:
            return torch.as_tensor(clients, dtype=torch.long)
        far = [int(client) for client in clients if client not in self.held]
        if far:
            raise ZooError(f"What lives on with client {far[0]} is on a machine of its own, and cannot be read here.")
        return torch.tensor([self.held.index(client) for client in clients], dtype=torch.long)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    @property
    def names(self) -> list[str]:
        return list(self._names)

    def _all(self, name: str) -> Tensor:
        key = self._names[name]
        return self._files[key] if self.folder is not None else getattr(self, key)

    def read(
        self, clients: Sequence[int], prefix: str = "", device: torch.device | str | None = None
    ) -> dict[str, Tensor]:
        """The rows of some clients, copied, by name less ``prefix``; only names that start with it.

        Shapes:
            returns: each (len(clients), ...)
        Raises:
            ZooError: for a client whose rows are kept elsewhere.
        """
        wanted = self._places(clients)
        found = {}
        for name in self._names:
            if name.startswith(prefix):
                rows = self._all(name)
                found[name.removeprefix(prefix)] = rows[wanted.to(rows.device)].to(device or rows.device)
        return found

    @torch.no_grad()
    def write(self, clients: Sequence[int], values: dict[str, Tensor], prefix: str = "") -> None:
        """Put back the rows of some clients, each (len(clients), ...)."""
        wanted = self._places(clients) if values else torch.zeros(0)
        self._spread()
        for name, value in values.items():
            rows = self._all(prefix + name)
            rows[wanted.to(rows.device)] = value.detach().to(rows)

    def _spread(self) -> None:
        """Memory of its own for each row, where the rows of a lean beginning are one."""
        for key in self._names.values() if self.lean and self.folder is None else ():
            setattr(self, key, getattr(self, key).clone(memory_format=torch.contiguous_format))
        self.lean = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._spread()
        super()._load_from_state_dict(*args, **kwargs)

    # ---- on disk ------------------------------------------------------------------------------------------------

    def to_disk(self, folder: str | Path) -> None:
        """Move the tensors to memory-mapped files in ``folder``; what stood there is taken over where it fits."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for key in self._names.values():
            first = getattr(self, key)
            delattr(self, key)
            if self.lean:  # written, not mapped: mapped rows would all count as this process's memory
                self._repeat(key, first)
            self._files[key] = self._map(key, first.shape, first.dtype)
            if not self.lean:
                self._files[key].copy_(first)

    def _repeat(self, key: str, rows: Tensor) -> None:
        """A file of equal rows; it takes its name when it is whole, as another process may have mapped one before."""
        assert self.folder is not None
        row = rows[:1].cpu().flatten().view(torch.uint8).numpy().tobytes()
        many = max(2**20 // max(len(row), 1), 1)
        with atomic_write(self.folder / f"{key}.bin") as part, open(part, "wb") as file:
            for start in range(0, len(rows), many):
                file.write(row * min(many, len(rows) - start))

    def _map(self, key: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        assert self.folder is not None
        size = math.prod(shape)
        flat = torch.from_file(str(self.folder / f"{key}.bin"), shared=True, size=size, dtype=dtype)
        return flat.view(*shape)

    def snapshot(self, name: str, keep: int = 3) -> None:
        """Copy the files aside under a name, for a checkpoint; the ``keep`` newest copies stay."""
        assert self.folder is not None
        aside = self.folder / "saved"
        part = aside / f".{name}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for key in self._files:
            shutil.copyfile(self.folder / f"{key}.bin", part / f"{key}.bin")
        shutil.rmtree(aside / name, ignore_errors=True)
        part.rename(aside / name)
        for old in sorted(aside.glob("[!.]*"), key=lambda p: p.stat().st_mtime)[:-keep]:
            shutil.rmtree(old)

    def restore(self, name: str) -> None:
        """Take back the files that a checkpoint goes with.

        Raises:
            ZooError: if they are not there any more.
        """
        assert self.folder is not None
        saved = self.folder / "saved" / name
        if not saved.is_dir():
            raise ZooError(f"The clients' states of this checkpoint are not in {saved}. Resume from a newer one.")
        for key, rows in self._files.items():
            rows.copy_(torch.from_file(str(saved / f"{key}.bin"), size=rows.numel(), dtype=rows.dtype).view_as(rows))
