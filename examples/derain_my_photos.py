"""Take the rain out of a folder of your own photographs.

    python examples/derain_my_photos.py --photos FOLDER --out derained [--checkpoint FOLDER_OR_REPO]

Without a checkpoint a tiny model is first trained for a moment on the embedded photographs: enough to see the way, not
to get fine pictures. Without ``--photos`` a demo makes two rainy pictures of its own.
"""

import argparse
import tempfile
from pathlib import Path

import lightning

from zoo import Trainer
from zoo.core.command import quiet
from zoo.vision import DerainDataModule, Regformer


def demo(folder: Path) -> Path:
    """Two rainy crops of the embedded photographs, as files."""
    data = DerainDataModule(batch_size=2)
    batch = next(iter(data.test_dataloader()))
    data.write([{"derained": batch["rainy"], "name": ["first", "second"]}], folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of pictures (or one picture)")
    parser.add_argument("--out", type=Path, default=Path("derained"))
    parser.add_argument("--checkpoint", help="folder or Hub repository of a Regformer")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    quiet()
    lightning.seed_everything(0, verbose=False)
    photos = args.photos or demo(Path(tempfile.mkdtemp()))

    if args.checkpoint:
        model = Regformer.from_pretrained(args.checkpoint)
    else:
        model = Regformer.from_variant("tiny")
        trainer = Trainer(args.out / "run", max_steps=args.steps, limit_val_batches=0, enable_model_summary=False)
        trainer.fit(model, datamodule=DerainDataModule(batch_size=4))
    data = DerainDataModule(batch_size=1).from_files(photos)
    for file in data.write((model.predict_step(batch, 0) for batch in data.predict_dataloader()), args.out):
        print(file)


if __name__ == "__main__":
    main()
