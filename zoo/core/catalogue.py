"""The catalogue: every fact about a method, read from the ``.toml`` beside its code, without torch or lightning.

A file is facts first, then `MARKER`, then recipes; listing parses only the facts.
"""

import functools
import importlib
import importlib.util
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.core.errors import ZooError, nearest

MARKER = "# ==== recipes ===="
DOMAINS = ("vision", "language", "graph", "tabular", "training")
GROUP = "zoo.methods"
"""Entry point group by which other packages add methods: ``Name = "package.module:Name"``, its ``.toml`` beside it."""
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Entry:
    """Where a method lives: its toml, its dotted module, and its place in the zoo ("" for other packages' domains)."""

    toml: Path
    module: str

    @property
    def domain(self) -> str:
        parts = self.module.split(".")
        return parts[1] if parts[0] == "zoo" else "extern"

    @property
    def family(self) -> str:
        return self.module.split(".")[-2]

    @property
    def package(self) -> str:
        """Where users import it from: the domain's face, or another package's own module."""
        return f"zoo.{self.domain}" if self.domain != "extern" else self.module

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """The part before the marker."""
        text = self.toml.read_text(encoding="utf-8").split(MARKER)[0]
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ZooError(f"{self.toml} is not valid TOML: {error}.") from error

    @functools.cached_property
    def recipes(self) -> dict[str, Any]:
        """The recipes by name; ``default`` is the one on the embedded set."""
        try:
            return tomllib.loads(self.toml.read_text(encoding="utf-8")).get("recipes", {})
        except tomllib.TOMLDecodeError as error:
            raise ZooError(f"{self.toml} is not valid TOML: {error}.") from error


def published(facts: dict[str, Any]) -> str:
    """Venue and year, the year once."""
    venue, year = facts.get("venue", ""), str(facts["year"])
    return venue if year in venue else f"{venue} {year}".strip()


@functools.cache
def entries() -> dict[str, Entry]:
    """All methods by class name, sorted; the zoo's own and those of other packages.

    Raises:
        ZooError: if two methods share a name.
    """
    found: dict[str, Entry] = {}
    for domain in DOMAINS:
        for toml in sorted((ROOT / domain).rglob("*.toml")):
            module = ".".join(("zoo", *toml.relative_to(ROOT).with_suffix("").parts))
            _add(found, Entry(toml, module))
    import importlib.metadata

    for point in importlib.metadata.entry_points(group=GROUP):
        _add(found, Entry(_locate(point.module).with_suffix(".toml"), point.module))
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _add(found: dict[str, Entry], entry: Entry) -> None:
    name = entry.facts["class"]
    if name in found:
        raise ZooError(f"Two methods are called {name}: {found[name].toml} and {entry.toml}.")
    found[name] = entry


def _locate(module: str) -> Path:
    """The file of a module of another package, found without importing anything but namespace parents."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    places = list(spec.submodule_search_locations or [spec.origin or ""]) if spec else [""]
    if not places[0]:
        raise ZooError(f"The entry point {module!r} of group {GROUP!r} points to no installed package.")
    base = Path(places[0])
    return base.joinpath(*rest) if rest else base


def names(domain: str | None = None, family: str | None = None) -> list[str]:
    """The methods' class names, optionally of one domain or family."""
    return [
        name
        for name, entry in entries().items()
        if (domain is None or entry.domain == domain) and (family is None or entry.family == family)
    ]


def entry(name: str) -> Entry:
    """A method by its class name in any case.

    Raises:
        ZooError: for an unknown name, with the nearest known one.
    """
    name = name.partition(":")[0]  # "Method:Other" is a class beside the method, in its file
    known = entries()
    lower = {key.lower(): key for key in known}
    if name.lower() not in lower:
        raise ZooError(f"No method {name!r}.{nearest(name, list(known))} `zoo list` shows all.")
    return known[lower[name.lower()]]


def facts(name: str) -> dict[str, Any]:
    """The facts of a method."""
    return entry(name).facts


def load_class(name: str) -> Any:
    """Import a method's class; ``Method:Other`` is a class beside it, in its file (an arm of a recipe).

    Raises:
        ZooError: for an unknown name, or where there is no such class in the method's file.
    """
    found, own = entry(name), name.partition(":")[2]
    module = importlib.import_module(found.module)
    if own and not isinstance(getattr(module, own, None), type):
        there = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise ZooError(f"{found.facts['class']}'s file has no class {own!r}.{nearest(own, there)}")
    return getattr(module, own or found.facts["class"])


def load_datamodule(name: str) -> Any:
    """Import a method's DataModule; ``name`` is a method's or a DataModule's.

    Raises:
        ZooError: if there is no such method or DataModule.
    """
    modules = datamodules()
    if name not in modules:
        name = facts(name)["datamodule"]
    if name not in modules:
        raise ZooError(f"No DataModule {name!r}.{nearest(name, list(modules))}")
    return getattr(importlib.import_module(modules[name]), name)


@functools.cache
def datamodules() -> dict[str, str]:
    """The DataModules by class name, with their dotted modules: found by their ``class`` lines, nothing is imported."""
    import re

    found = {}
    files = [*(ROOT / "data").glob("*.py"), *(f for d in DOMAINS for f in (ROOT / d).rglob("data_*.py"))]
    folders = {e.toml.parent: e.module.rpartition(".")[0] for e in entries().values() if e.domain == "extern"}
    for file in sorted(files):
        module = ".".join(("zoo", *file.relative_to(ROOT).with_suffix("").parts))
        for match in re.finditer(r"^class (\w+DataModule)\(", file.read_text(encoding="utf-8"), re.M):
            found[match[1]] = module
    for folder, package in folders.items():
        for file in sorted(folder.glob("*.py")):
            for match in re.finditer(r"^class (\w+DataModule)\(", file.read_text(encoding="utf-8"), re.M):
                found.setdefault(match[1], f"{package}.{file.stem}")
    return found
