"""Lazy faces: what ``from zoo.vision import ...`` offers, read from the ``.pyi`` beside the package."""

from collections.abc import Callable
from typing import Any

import lazy_loader

from zoo.core.errors import nearest


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`lazy_loader.attach_stub`, with the nearest known name in the error for a wrong one.

    Raises (on use):
        ImportError: for an unknown class name: ``from zoo.vision import X`` would drop an AttributeError's message.
        AttributeError: for any other unknown name, so that ``hasattr`` works on a module as ever.
    """
    load, listing, names = lazy_loader.attach_stub(package, file)

    def __getattr__(name: str) -> Any:
        if name in names or not name[:1].isupper():
            return load(name)
        raise ImportError(f"{package} has no {name!r}.{nearest(name, names)} `zoo list` shows all.", name=name)

    return __getattr__, listing, names
