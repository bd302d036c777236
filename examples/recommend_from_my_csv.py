"""Recommend items to the users of a CSV of your own (columns user,item and optionally time, rating).

    python examples/recommend_from_my_csv.py --csv clicks.csv --out recommendations.csv

Without a file a demo makes one: readers who mostly stay within their genre.
"""

import argparse
import csv
import random
import tempfile
from pathlib import Path

import lightning

from zoo import Trainer
from zoo.core.command import quiet
from zoo.graph import NESCL, ImplicitCFDataModule


def demo(folder: Path) -> Path:
    """60 readers and 40 books of 4 genres; nine clicks in ten within the reader's own."""
    random.seed(0)
    with open(folder / "clicks.csv", "w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(["user", "item"])
        for reader in range(60):
            for _ in range(12):
                genre = reader % 4 if random.random() < 0.9 else random.randrange(4)
                table.writerow([f"reader{reader}", f"genre{genre}-book{random.randrange(10)}"])
    return folder / "clicks.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="your table; the only CSV in its folder")
    parser.add_argument("--out", type=Path, default=Path("recommendations.csv"))
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    quiet()
    lightning.seed_everything(0, verbose=False)
    source = args.csv or demo(Path(tempfile.mkdtemp()))

    data = ImplicitCFDataModule(str(source.parent), batch_size=128)
    data.setup()
    model = NESCL.from_variant("tiny", **{**data.describe(), "lr": 1e-2})
    trainer = Trainer(args.out.parent / "run", max_steps=args.steps, limit_val_batches=0, enable_model_summary=False)
    trainer.fit(model, datamodule=data)
    data.from_files(source)  # its column "user": recommend to everyone in it
    data.write([model.predict_step(batch, 0) for batch in data.predict_dataloader()], args.out)
    print(*args.out.read_text(encoding="utf-8").splitlines()[:6], sep="\n")


if __name__ == "__main__":
    main()
