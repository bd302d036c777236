"""Fill the gaps of a table of measurements of your own.

    python examples/fill_my_gaps.py --csv sensors.csv --out filled.csv

A header line, optionally a first column of times, then columns of numbers; gaps are empty cells. Every cell that held
something stays as it was. Without a file a demo makes one: three linked sensors with gaps.
"""

import argparse
import csv
import math
import random
import tempfile
from pathlib import Path

import lightning

from zoo import Trainer
from zoo.core.command import quiet
from zoo.tabular import GlocalIB, TimeSeriesImputationDataModule


def demo(folder: Path) -> Path:
    """600 rows of three sensors that follow one daily rhythm; one cell in ten is empty."""
    random.seed(0)
    with open(folder / "sensors.csv", "w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(["hour", "roof", "cellar", "garden"])
        for hour in range(600):
            wave = [math.sin(2 * math.pi * (hour + shift) / 24) + random.gauss(0, 0.05) for shift in (0, 3, 6)]
            table.writerow([f"h{hour}", *("" if random.random() < 0.1 else f"{10 + 5 * w:.2f}" for w in wave)])
    return folder / "sensors.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="your table")
    parser.add_argument("--out", type=Path, default=Path("filled.csv"))
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    quiet()
    lightning.seed_everything(0, verbose=False)
    source = args.csv or demo(Path(tempfile.mkdtemp()))

    # rate=0: the table has gaps of its own; a share of the rest is hidden to learn from
    data = TimeSeriesImputationDataModule(str(source.parent), file=source.name, n_steps=24, rate=0.0, stride=4)
    data.setup()
    model = GlocalIB.from_variant("tiny", **{**data.describe(), "lr": 5e-3})
    trainer = Trainer(args.out.parent / "run", max_steps=args.steps, num_sanity_val_steps=0, enable_model_summary=False)
    trainer.fit(model, datamodule=data)
    data.from_files(source)
    data.write([model.predict_step(batch, 0) for batch in data.predict_dataloader()], args.out)
    print(*args.out.read_text(encoding="utf-8").splitlines()[:6], sep="\n")


if __name__ == "__main__":
    main()
