"""Fine-tune a text classifier on a CSV of your own and label new sentences.

    python examples/classify_my_texts.py --csv reviews.csv --new sentences.txt --out labels.csv [--backbone HUB_ID]

The CSV has the columns text and label; the new sentences stand one a line. Without files a demo makes its own. Without
``--backbone`` a small untrained encoder is used, which is enough for the demo; for real work name a pretrained one,
such as distilbert/distilbert-base-uncased.
"""

import argparse
import csv
import tempfile
from pathlib import Path

from zoo import Trainer
from zoo.core.command import quiet
from zoo.language import HRP, LoRAFinetuneDataModule

SMALL = dict(HRP.variants["tiny"]["backbone"])


def demo(folder: Path) -> tuple[Path, Path]:
    """A table of opinions and two sentences to label."""
    good, bad = ["lovely", "superb", "delightful", "brilliant"], ["dull", "awful", "tedious", "clumsy"]
    things = ["film", "book", "meal", "song", "play"]
    with open(folder / "reviews.csv", "w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(["text", "label"])
        for label, words in (("good", good), ("bad", bad)):
            table.writerows([f"what a {word} {thing}", label] for word in words for thing in things)
    (folder / "new.txt").write_text("a superb meal\nsuch a tedious play\n", encoding="utf-8")
    return folder / "reviews.csv", folder / "new.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="your table with the columns text and label")
    parser.add_argument("--new", type=Path, help="sentences to label, one a line")
    parser.add_argument("--out", type=Path, default=Path("labels.csv"))
    parser.add_argument("--backbone", help="Hub id or folder of a transformers model")
    parser.add_argument("--steps", type=int, default=80)
    args = parser.parse_args()
    quiet()
    if args.csv is None or args.new is None:
        args.csv, args.new = demo(Path(tempfile.mkdtemp()))

    data = LoRAFinetuneDataModule(str(args.csv), batch_size=16)
    sizes = {} if args.backbone else {"rank": 4, "rank_pre": 16, "preheat_steps": 4, "lr": 1e-2}
    model = HRP(args.backbone or SMALL, max_length=64, **data.describe(), **sizes)
    trainer = Trainer(args.out.parent / "run", max_steps=args.steps, num_sanity_val_steps=0, enable_model_summary=False)
    trainer.fit(model, datamodule=data)
    data.from_files(args.new)
    data.write([model.predict_step(batch, 0) for batch in data.predict_dataloader()], args.out)
    print(args.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
