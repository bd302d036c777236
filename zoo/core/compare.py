"""Several methods on one set: trained under the same conditions, in one table and one plot."""

import csv
import inspect
import json
import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.core import catalogue, recipe
from zoo.core.errors import ZooError, nearest
from zoo.core.files import atomic_write

log = logging.getLogger(__name__)


def parse(text: str) -> tuple[str, str, dict[str, Any]]:
    """``"Label=Method:Other,lr=0.1,net=cnn"``: its label, by default all of it, class, and hyperparameters of its own.

    Raises:
        ZooError: for an unknown method, or a part that is no ``key=value``.
    """
    first, *parts = text.split(",")
    label, equals, name = first.partition("=")
    label, name = (label, name) if equals else (text, first)
    entry, other = catalogue.entry(name).facts["class"], name.partition(":")[2]
    own: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise ZooError(f"{text!r}: {part!r} is no key=value. Write [LABEL=]METHOD,key=value,...")
        try:
            own[key] = json.loads(value)
        except ValueError:
            own[key] = value
    return label, f"{entry}:{other}" if other else entry, own


def compare(
    methods: Sequence[str],
    *,
    data: dict[str, Any],
    model: dict[str, Any],
    trainer: dict[str, Any],
    output: Path,
    seeds: int = 1,
    accelerator: str = "auto",
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Train and test each method with each seed; an interrupted comparison goes on with what is left.

    Args:
        methods: as `parse` takes them, each with another label.
        data: arguments of the methods' DataModule, whose class must take them all.
        model: hyperparameters for all methods that have them; a method's own go before.
        trainer: arguments of the Trainer.
        output: folder of ``compare.csv``, ``compare.png`` (with matplotlib) and a folder a run.
    Returns:
        a row for each method and seed: "method", "seed" and every test metric.
    Raises:
        ZooError: for an unknown method or argument.
    """
    plans: dict[str, tuple[str, dict[str, Any]]] = {}
    for text in methods:
        label, name, own = parse(text)
        if label in plans:
            raise ZooError(f"Two methods are called {label!r}: give one a label of its own, LABEL=METHOD,key=value,...")
        plans[label] = name, _plan(label, name, own, data, model, trainer)
    unused = [key for key in model if not any(key in plan["model"] for _, plan in plans.values())]
    if unused:
        raise ZooError(f"No method here has a hyperparameter {unused[0]!r}.")
    rows = []
    for text, (name, plan) in plans.items():
        for seed in range(seeds):
            folder = output / text.replace("/", "_") / str(seed)
            metrics = recipe.run_once(
                folder / "done.json", name, plan, seed, folder / "run", None, accelerator, progress
            )
            found = {key: value for key, value in metrics.items() if key.startswith("test/")}
            found["seconds"] = metrics["seconds"]
            print(f"{text}  seed {seed}: {', '.join(f'{k} {v:.4g}' for k, v in found.items())}", flush=True)
            rows.append({"method": text, "seed": seed, **found})
            _write(rows, output / "compare.csv")
    _draw(plans, seeds, output)
    return rows


def _plan(
    text: str, name: str, own: dict[str, Any], data: dict[str, Any], model: dict[str, Any], trainer: dict[str, Any]
) -> dict[str, Any]:
    cls, data_cls = catalogue.load_class(name), catalogue.load_datamodule(name)
    known = [*inspect.signature(cls).parameters, "variant"]
    for given, owner, options in ((own, cls, known), (data, data_cls, [*inspect.signature(data_cls).parameters])):
        unknown = [key for key in given if key not in options]
        if unknown:
            raise ZooError(f"{owner.__name__} has no argument {unknown[0]!r}.{nearest(unknown[0], options)}")
    left = [key for key in model if key not in known]
    if left:
        log.info("%s has no %s: left out.", text, ", ".join(left))
    shared = {key: value for key, value in model.items() if key in known}
    return {"data": data, "model": {**shared, **own}, "trainer": {"logger": True, **trainer}, "evaluate": "last"}


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part, part.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, keys)
        writer.writeheader()
        writer.writerows(rows)


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, and standard deviations where there are several, of what several methods have."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    owners = {key: {row["method"] for row in rows if key in row} for row in rows for key in row}
    least = min(2, len(methods))
    keys = [key for key, own in owners.items() if key not in ("method", "seed") and len(own) >= least]
    lines = [["method", *(key.removeprefix("test/") for key in keys)]]
    for method in methods:
        cells = [method]
        for key in keys:
            have = [row[key] for row in rows if row["method"] == method and key in row]
            spread = f" ± {statistics.stdev(have):.2g}" if len(have) > 1 else ""
            cells.append(f"{statistics.fmean(have):.4g}{spread}" if have else "-")
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _draw(plans: dict[str, tuple[str, dict[str, Any]]], seeds: int, output: Path) -> None:
    """Over steps, and over megabytes sent where that was logged, every metric that one of the methods is chosen by and
    another has too: the mean over seeds, and from the least to the largest."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        log.info('No plot: matplotlib is missing (pip install "paper-zoo[plots]").')
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves: dict[tuple[str, int], list[dict[str, str]]] = {}
    for text in plans:
        for seed in range(seeds):
            file = output / text.replace("/", "_") / str(seed) / "run" / "metrics.csv"
            with file.open(newline="", encoding="utf-8") as handle:
                curves[text, seed] = list(csv.DictReader(handle))
    metrics = list(dict.fromkeys(catalogue.load_class(name).monitor for name, _ in plans.values()))
    having = {m: {text for (text, _), rows in curves.items() if any(row.get(m) for row in rows)} for m in metrics}
    metrics = [metric for metric in metrics if len(having[metric]) >= min(2, len(plans))] or metrics
    sent = all(any(row.get("val/up_mb") for row in rows) for rows in curves.values())
    axes = ["step", "val/up_mb"] if sent else ["step"]
    megabytes = [float(row["val/up_mb"]) for rows in curves.values() for row in rows if row.get("val/up_mb")]
    least = min([size for size in megabytes if size > 0], default=1.0)
    sizes = (5.2 * len(axes) + 3, 3.6 * len(metrics))
    figure, places = plt.subplots(len(metrics), len(axes), figsize=sizes, squeeze=False, layout="constrained")
    for metric, row_of in zip(metrics, places, strict=True):
        for place, axis in zip(row_of, axes, strict=True):
            for number, text in enumerate(plans):
                style = {"color": f"C{number % 10}", "ls": "-" if number < 10 else "--"}
                runs = [
                    [
                        (float(row[axis]), float(row[metric]))
                        for row in curves[text, seed]
                        if row.get(metric) and row.get(axis)
                    ]
                    for seed in range(seeds)
                ]
                points = list(zip(*runs, strict=False))  # of all seeds at each validation
                x = [statistics.fmean(x for x, _ in point) for point in points]
                y = [[y for _, y in point] for point in points]
                label = text if points else None
                place.plot(x, [statistics.fmean(own) for own in y], marker=".", lw=1.2, label=label, **style)
                place.fill_between(x, [*map(min, y)], [*map(max, y)], color=style["color"], alpha=0.08, lw=0)
            if axis != "step":  # some methods send ten times as much as others, some nothing
                place.set_xscale("symlog", linthresh=least)
            place.set_xlabel("megabytes that clients sent" if axis != "step" else "training step (a federated round)")
            place.set_ylabel(metric)
            place.grid(alpha=0.3)
    handles = {line.get_label(): line for place in places[:, 0] for line in place.get_lines()}
    known = {label: line for label, line in handles.items() if not str(label).startswith("_")}
    figure.legend(known.values(), known.keys(), fontsize="small", loc="outside right upper")
    figure.savefig(output / "compare.png", dpi=120)
    plt.close(figure)
