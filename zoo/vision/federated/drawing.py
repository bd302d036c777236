"""Pictures of how a set is divided among clients. Needs matplotlib (``pip install "paper-zoo[plots]"``)."""

from pathlib import Path

import torch

from zoo.core import ZooError
from zoo.vision.federated.data_federated import FederatedClassificationDataModule


def draw_partition(data: FederatedClassificationDataModule, path: str | Path) -> Path:
    """Clients by classes: the area of a dot is how many training samples of that class a client has.

    Args:
        data: set up here where it is not yet. path: the picture's file, by whose suffix its format goes.
    Returns:
        the path.
    Raises:
        ZooError: if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ZooError('Drawing needs matplotlib: pip install "paper-zoo[plots]".') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    data.setup("fit")
    classes, clients = len(data.class_names), len(data.shares)
    counts = torch.stack([torch.bincount(data.labels[own], minlength=classes) for own in data.shares])
    rows, columns = counts.nonzero(as_tuple=True)
    found = counts[rows, columns]
    width, height = min(max(0.32 * classes + 1.6, 4), 16), min(max(0.32 * clients + 1.2, 3), 16)
    figure, (axes, sizes) = plt.subplots(
        1, 2, figsize=(width + 1.6, height), sharey=True, width_ratios=(width, 1.6), layout="constrained"
    )
    axes.scatter(columns, rows, s=180 * found / counts.max(), color="C0")
    axes.set_xticks(range(classes), data.class_names, rotation=90 if max(map(len, data.class_names)) > 2 else 0)
    axes.set_xlabel("class")
    axes.set_ylabel("client")
    names = data.sites if len(data.sites) == clients else [str(client) for client in range(clients)]
    axes.set_yticks(range(clients), names if clients <= 50 else [""] * clients)
    axes.set_xlim(-0.7, classes - 0.3)
    axes.set_ylim(clients - 0.3, -0.7)
    sizes.barh(range(clients), counts.sum(1), color="C0")
    sizes.set_xlabel("samples")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
