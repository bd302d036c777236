"""Classify the nodes of a graph of your own from a few labelled ones.

    python examples/classify_my_nodes.py --npz mygraph.npz --out classes.csv

The npz holds node_features (n, f), node_labels (n), edges (e, 2), and train_masks, val_masks, test_masks (folds, n).
Without a file a demo makes one: three groups of pages that mostly link within their group.
"""

import argparse
import tempfile
from pathlib import Path

import lightning
import numpy as np

from zoo import Trainer
from zoo.core.command import quiet
from zoo.graph import LAGNN, NodeClassificationDataModule


def demo(folder: Path) -> Path:
    """90 nodes in three groups, five labelled nodes a group, noisy features."""
    draw = np.random.default_rng(0)
    label = np.arange(90) % 3
    linked = draw.random((90, 90)) < np.where(label[:, None] == label, 0.10, 0.01)
    edges = np.argwhere(np.triu(linked, 1))
    features = (draw.random((90, 12)) < np.where(np.arange(12) % 3 == label[:, None], 0.4, 0.2)).astype(np.float32)
    train, val = np.arange(90) < 15, (np.arange(90) >= 15) & (np.arange(90) < 35)
    masks = {"train_masks": train[None], "val_masks": val[None], "test_masks": ~(train | val)[None]}
    np.savez(folder / "mygraph.npz", node_features=features, node_labels=label, edges=edges, **masks)
    return folder / "mygraph.npz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npz", type=Path, help="your graph")
    parser.add_argument("--out", type=Path, default=Path("classes.csv"))
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    quiet()
    lightning.seed_everything(0, verbose=False)
    source = args.npz or demo(Path(tempfile.mkdtemp()))

    data = NodeClassificationDataModule(str(source.parent), name=source.stem)
    data.setup()
    model = LAGNN.from_variant("tiny", **data.describe())
    trainer = Trainer(
        args.out.parent / "run", max_epochs=args.steps, num_sanity_val_steps=0, enable_model_summary=False
    )
    trainer.fit(model, datamodule=data)
    print(trainer.test(model, datamodule=data, ckpt_path="best", verbose=False)[0])
    data.from_files(source)
    data.write([model.predict_step(batch, 0) for batch in data.predict_dataloader()], args.out)
    print(*args.out.read_text(encoding="utf-8").splitlines()[:4], sep="\n")


if __name__ == "__main__":
    main()
