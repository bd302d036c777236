"""The federated methods and their baselines on real pictures, at equal rounds: a table, a CSV file and a plot each.

    python -m benchmarks.federated_methods [cifar10|digits ...] [--seeds 3] [--work runs/federated_methods]

Reads ``$ZOO_DATA/cifar10`` and ``$ZOO_DATA/digits`` (mnist.npz, usps.npz), goes on with what is in ``--work``, and
writes ``docs/federated_SET.png``, ``benchmarks/federated_SET.csv`` and the tables in ``docs/federated.md``. One set of
conditions for all; those of each method's paper are in its recipes (``zoo reproduce METHOD``).
"""

import argparse
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

from zoo.core import ZooError, atomic_write
from zoo.core.command import quiet
from zoo.core.compare import compare
from zoo.data.plain import write_csv

METHODS = [
    "FedAvg=FedLoGe:FederatedModule",
    "FedProx=FedLoGe:FederatedModule,algorithm=fedprox",
    # the same step as with momentum 0.9, which SCAFFOLD does without
    "SCAFFOLD=FedLoGe:FederatedModule,algorithm=scaffold,momentum=0,lr=0.05",
    "FedNova=FedLoGe:FederatedModule,algorithm=fednova",
    "Ditto=FedLoGe:FederatedModule,algorithm=ditto",
    "local only=FedLoGe:FederatedModule,algorithm=local",
    "FedLoGe=FedLoGe,etf_norm=1.0,etf_lr=0.001,etf_steps=1500{grey}",
    "FedImpro=FedImpro,cut=layer2",
    "FedFed=FedFed,distill_rounds=4,width=16,latent=128,mosaic=32,randaugment=0",
    "FedLD=FedLD,warm_up=0{grey}",
    "DisPFL=DisPFL,rounds=30,peers={peers}{grey}",
    "SCooL=SCooL,local_steps={steps}{kept}{grey}",
    "AMY=AMY",
    "FAL=FAL,attack_steps=4,attack_step=0.012",
]
MODEL: dict[str, Any] = {
    "net": {"name": "cnn", "widths": [16, 32], "features": 64},
    "norm": "group",
    "lr": 0.005,  # the best for FedAvg of 0.005, 0.01 and 0.02 on another seed of CIFAR-10
    "momentum": 0.9,  # for all: a method of its own without it would take steps a tenth as long
    "local_batch": 32,
    "local_epochs": 2,
}
SETS: dict[str, dict[str, Any]] = {
    "cifar10": {"clients": 10, "partition": "dirichlet", "alpha": 0.1, "per_class": 200, "rounds": 5},
    "digits": {"partition": "natural", "per_class": 200, "image_size": 16, "rounds": 5},
}
EPOCHS = 6
COLUMNS = {
    "test/accuracy": "the server's model",
    "test/personal_accuracy": "clients' own, mean",
    "test/worst_accuracy": "worst client",
    "test/up_mb": "MB up",
    "test/down_mb": "MB down",
    "seconds": "seconds a round, with its share of validation",
}


def run(name: str, seeds: int, work: Path) -> list[dict[str, Any]]:
    """Compare all methods on a set, and put table, CSV file and plot in their places."""
    root = Path(os.environ.get("ZOO_DATA", "data")) / name
    if not root.is_dir():
        raise ZooError(f"{root} is missing: set $ZOO_DATA to a folder that holds {name}.")
    own = (
        {"peers": 4, "kept": "", "grey": "", "steps": 13}  # two epochs of the mean client
        if name == "cifar10"
        else {"peers": 1, "kept": ",mask_fraction=0.5", "grey": ",mean=[],std=[]", "steps": 126}
    )
    methods = [text.format(**own) for text in METHODS]
    output, home = work / name, Path(__file__).parent
    options = {"data": {"root": str(root), **SETS[name]}, "model": MODEL, "trainer": {"max_epochs": EPOCHS}}
    rows = compare(methods, **options, output=output, seeds=seeds, accelerator="cpu")
    shutil.copy(output / "compare.png", home.parent / "docs" / f"federated_{name}.png")
    keys = ["method", "seed", *COLUMNS]
    cells = ([f"{row[k]:.6g}" if isinstance(row[k], float) else row[k] for k in keys] for row in rows)
    write_csv(home / f"federated_{name}.csv", keys, cells)
    page = home.parent / "docs" / "federated.md"
    first, last = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, _, rest = page.read_text(encoding="utf-8").partition(first)
    _, found, after = rest.partition(last)
    if not found:
        raise ZooError(f"{page} has no lines {first.strip()} and {last.strip()} to put the table between.")
    with atomic_write(page) as part:
        part.write_text(before + first + table(rows, EPOCHS * SETS[name]["rounds"]) + last + after, encoding="utf-8")
    return rows


def table(rows: list[dict[str, Any]], rounds: int) -> str:
    """Means over seeds and, of shares, standard deviations, as Markdown."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for key in COLUMNS:
            own = [row[key] / (rounds if key == "seconds" else 1) for row in rows if row["method"] == method]
            mean = statistics.fmean(own)
            spread = f" ± {statistics.stdev(own):.3f}" if len(own) > 1 else ""
            cells.append(f"{mean:.3f}{spread}" if "accuracy" in key else f"{mean:.3g}" if mean < 100 else f"{mean:.0f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", choices=list(SETS), help="all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/federated_methods"))
    args = parser.parse_args()
    quiet()
    for name in args.sets or SETS:
        run(name, args.seeds, args.work)


if __name__ == "__main__":
    main()
