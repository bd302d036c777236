"""What lives on with each client from round to round, in memory or in files."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from zoo.core.errors import ZooError


class ClientStates(nn.Module):
    """One row a client of each of several tensors: control variates, personal heads, masks.

    In memory the tensors are buffers, and travel with every checkpoint. After `to_disk` they are memory-mapped files:
    memory then holds only the rows of clients at work.

    Args:
        clients: how many there are.
    """

    def __init__(self, clients: int):
        super().__init__()
        self.clients = clients
        self._names: dict[str, str] = {}
        self._files: dict[str, Tensor] = {}
        self.folder: Path | None = None

    def add(self, name: str, first: Tensor) -> None:
        """Keep a tensor for each client, whose first value is ``first`` for all."""
        key = name.replace(".", "__")
        self._names[name] = key
        self.register_buffer(key, first.detach()[None].repeat(self.clients, *[1] * first.ndim))

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
        """
        wanted = torch.as_tensor(clients, dtype=torch.long)
        found = {}
        for name in self._names:
            if name.startswith(prefix):
                rows = self._all(name)
                found[name.removeprefix(prefix)] = rows[wanted.to(rows.device)].to(device or rows.device)
        return found

    @torch.no_grad()
    def write(self, clients: Sequence[int], values: dict[str, Tensor], prefix: str = "") -> None:
        """Put back the rows of some clients, each (len(clients), ...)."""
        wanted = torch.as_tensor(clients, dtype=torch.long)
        for name, value in values.items():
            rows = self._all(prefix + name)
            rows[wanted.to(rows.device)] = value.detach().to(rows)

    # ---- on disk ------------------------------------------------------------------------------------------------

    def to_disk(self, folder: str | Path) -> None:
        """Move the tensors to memory-mapped files in ``folder``; what stood there is taken over where it fits."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for key in self._names.values():
            first = getattr(self, key)
            delattr(self, key)
            self._files[key] = self._map(key, first.shape, first.dtype)
            self._files[key].copy_(first)

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
