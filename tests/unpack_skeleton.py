"""JHMDB's skeletons as DD-Net lays them out: GT_train_1.pkl, GT_test_1.pkl and so on."""

import pickle
from pathlib import Path

import numpy as np


def unpack_jhmdb(source: Path, target: Path) -> None:
    """Write the six pickles of {"pose": list of (t, 15, 2), "label": list of str} from ``jhmdb_pose2d.npz``."""
    with np.load(source / "jhmdb_pose2d.npz") as archive:
        pose, offsets, y, names = (archive[key] for key in ("pose", "offsets", "y", "class_names"))
        for split in (1, 2, 3):
            for part in ("train", "test"):
                which = archive[f"split{split}_{part}"]
                content = {
                    "pose": [pose[offsets[i] : offsets[i + 1]] for i in which],
                    "label": [str(names[y[i]]) for i in which],
                }
                (target / f"GT_{part}_{split}.pkl").write_bytes(pickle.dumps(content))
