"""Compare three ways of training together on your own sites' pictures, in simulation, before any machine is set up.

    python examples/federated_sites.py --sites FOLDER --side 32 --out sites.csv

FOLDER holds client_<site>/<class>/<picture>, and test/<class>/<picture> or else a fifth of each site's is for testing.
Compared: one model for all (FedAvg), one body with a head for each site, no exchange at all. Without a folder a demo
writes three sites of digits that hold other classes each. How the winner goes to real machines: docs/federated.md.
"""

import argparse
import csv
import tempfile
from pathlib import Path

import lightning
from PIL import Image
from sklearn.datasets import load_digits

from zoo import Trainer
from zoo.core.command import quiet
from zoo.engines.federated import FederatedModule
from zoo.vision import FederatedClassificationDataModule

WAYS = {"one-model": {}, "own-heads": {"personal": ["head."]}, "no-exchange": {"algorithm": "local"}}
NAMES = ("accuracy", "personal_accuracy", "worst_accuracy", "up_mb")


def demo(folder: Path) -> Path:
    """Three sites, each with many of three digits and few of the others."""
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images[:900], digits.target[:900], strict=True)):
        site = number % 3
        if label // 3 == site or number % 4 == 0:
            place = folder / f"client_{'abc'[site]}" / str(label)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 15.9).astype("uint8")).save(place / f"{number}.png")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=Path, help="folder of client_<site>/<class>/<picture>")
    parser.add_argument("--side", type=int, default=8, help="side that pictures are resized to")
    parser.add_argument("--out", type=Path, default=Path("sites.csv"))
    parser.add_argument("--steps", type=int, default=20, help="rounds of communication")
    args = parser.parse_args()
    quiet()
    asked = {"root": str(args.sites or demo(Path(tempfile.mkdtemp()))), "rounds": args.steps, "image_size": args.side}
    lines = [["way", *NAMES]]
    for way, given in WAYS.items():
        lightning.seed_everything(0, verbose=False)
        data = FederatedClassificationDataModule(partition="natural", **asked)
        data.setup()
        model = FederatedModule.from_variant("tiny", **data.describe(), lr=0.05, local_epochs=2, **given)
        where = args.out.parent / "run" / way
        trainer = Trainer(where, max_epochs=1, num_sanity_val_steps=0, enable_model_summary=False)
        trainer.fit(model, datamodule=data)
        found = trainer.test(model, datamodule=data, verbose=False)[0]
        lines.append([way, *(f"{found[f'test/{name}']:.3f}" for name in NAMES)])
    with open(args.out, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(lines)
    print(*(", ".join(line) for line in lines), sep="\n")


if __name__ == "__main__":
    main()
