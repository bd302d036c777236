"""Writes what follows from the catalogue: ``.pyi`` faces, METHODS.md, docs/RESULTS.md, the cards in hub/, the causes
in results/.

``--check`` only compares.

python -m zoo.core.generate [--check]
"""

import json
import sys
from pathlib import Path
from typing import Any

from zoo.core import catalogue, results, tables

NAMED = {True: "holds", False: "does not hold", None: "not measured"}


def faces() -> dict[Path, str]:
    """The ``__init__.pyi`` of each domain: its methods and DataModules, one sorted line each."""
    lines: dict[str, set[str]] = {}
    for name, entry in catalogue.entries().items():
        if entry.domain != "extern":
            relative = "." + ".".join(entry.module.split(".")[2:])
            lines.setdefault(entry.domain, set()).add(f"from {relative} import {name} as {name}")
    for name, module in catalogue.datamodules().items():
        parts = module.split(".")
        if parts[0] == "zoo" and parts[1] in catalogue.DOMAINS:
            lines.setdefault(parts[1], set()).add(f"from .{'.'.join(parts[2:])} import {name} as {name}")
    # lazy_loader takes relative level-1 imports only, so a domain's face names the module below it
    return {catalogue.ROOT / d / "__init__.pyi": "\n".join(sorted(found)) + "\n" for d, found in lines.items()}


def methods() -> str:
    """METHODS.md: every method with its evidence."""
    rows = [
        "# Methods",
        "",
        "Generated from the catalogue by `python -m zoo.core.generate`. *Parity* is the largest relative difference",
        "from the authors' code in float32 (and in float64, where only that shows it); *claim* is what",
        "`zoo reproduce NAME` found; *speed* is the authors' time over ours; *stale*: the code has changed since.",
        "",
        "| method | paper | place | fidelity | parity | claim | speed | checkpoints |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in catalogue.entries().items():
        if entry.domain == "extern":
            continue
        facts = entry.facts
        link = f"[{facts['title']}](https://arxiv.org/abs/{facts['arxiv']})" if facts.get("arxiv") else facts["title"]
        own = results.read(name)
        parity, timed = own.get("parity", {}), own.get("speed", {})
        speed = [
            f"{what} {row['authors_ms'] / row['ours_ms']:.1f}x"
            for what, row in timed.get("figures", {}).items()
            if "authors_ms" in row
        ]
        claims = [
            f"{label.partition('@')[2] or 'embedded'}: {NAMED[found.get('holds')]}" + _stale(label, found)
            for label, found in results.claims(name).items()
        ]
        points = [c.get("repo") or f"hub/{c['path']}" for c in facts.get("checkpoints", [])]
        cells = [
            f"`{name}`",
            link,
            f"{entry.domain}/{entry.family}",
            facts["fidelity"],
            _worst(parity.get("figures", {})) + _stale(name, parity),
            "; ".join(claims) or "not measured",
            ("; ".join(speed) or "-") + _stale(name, timed),
            ", ".join(points) or "-",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _stale(label: str, evidence: dict[str, Any]) -> str:
    return " (stale)" if results.is_stale(label, evidence) else ""


def _worst(figures: dict[str, float]) -> str:
    """The largest of the figures in float32, and of those that were taken again in float64 where they say more."""
    if not figures:
        return "-"
    double = {key: value for key, value in figures.items() if "_float64" in key}
    single = max(value for key, value in figures.items() if key not in double)
    return f"{single:.0e}" + (f" (float64 {max(double.values()):.0e})" if double and single > 1e-5 else "")


def cards() -> dict[Path, str]:
    """The model card of each checkpoint under hub/, with the figures that it has."""
    from huggingface_hub import ModelCard

    from zoo.core import load
    from zoo.core.card import model_card, of_checkpoint

    found = {}
    for name in catalogue.names():
        for point in catalogue.facts(name).get("checkpoints", []):
            path = catalogue.ROOT.parent / "hub" / point["path"] / "README.md"
            if point["status"] == "local" and path.is_file():
                rows = ModelCard.load(path).data.eval_results or []
                figures = {f"test/{row.metric_type}": row.metric_value for row in rows}
                found[path] = str(model_card(name, load(path.parent), **of_checkpoint(name, point, figures)))
    return found


def causes() -> dict[Path, str]:
    """Evidence of claims that do not hold, with the cause that stands in the recipe: it is found after the figures."""
    found = {}
    for name in catalogue.entries():
        for label, evidence in results.claims(name).items():
            if evidence["holds"] is False:
                whole = {**evidence, "cause": results.recipe_of(label).get("cause", "")}
                found[results.path(label)] = json.dumps(whole, indent=1, allow_nan=False) + "\n"
    return found


def main(argv: list[str] | None = None) -> int:
    """Write the generated files, or with ``--check`` name those that are stale and return 1."""
    check = "--check" in (sys.argv[1:] if argv is None else argv)
    stale = _write(causes(), check)  # first: the pages quote them
    stale |= _write({**faces(), catalogue.ROOT.parent / "METHODS.md": methods(), **cards(), **tables.page()}, check)
    return 1 if check and stale else 0


def _write(files: dict[Path, str], check: bool) -> bool:
    """Write the files that are stale, or with ``check`` name them; whether there were any."""
    stale = [path for path, text in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if check:
            print(f"{path.relative_to(catalogue.ROOT.parent)} is stale: run python -m zoo.core.generate")
        else:
            path.write_text(files[path], encoding="utf-8")
            print(f"wrote {path.relative_to(catalogue.ROOT.parent)}")
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
