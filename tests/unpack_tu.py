"""TU graph sets from one text file each (muhanzhang/pytorch_DGCNN) into the TU layout, with its ten folds."""

import zipfile
from pathlib import Path

import numpy as np


def write_tu(
    folder: Path,
    name: str,
    edges: np.ndarray,
    graph: np.ndarray,
    labels: np.ndarray,
    node_labels: np.ndarray | None = None,
    node_attributes: np.ndarray | None = None,
) -> None:
    """Write the files of the TU layout.

    Args:
        edges: (m, 2) pairs of nodes numbered from 0 over all graphs, both directions.
        graph: (n) number of each node's graph, from 0, ascending.
        labels: a class a graph; node_labels: a number a node; node_attributes: (n, any).
    """
    folder.mkdir(parents=True, exist_ok=True)

    def write(kind: str, rows: list[str]) -> None:
        (folder / f"{name}_{kind}.txt").write_text("".join(f"{row}\n" for row in rows))

    write("A", [f"{a}, {b}" for a, b in (edges + 1).tolist()])
    write("graph_indicator", [str(g) for g in (graph + 1).tolist()])
    write("graph_labels", [str(v) for v in labels.tolist()])
    if node_labels is not None:
        write("node_labels", [str(v) for v in node_labels.tolist()])
    if node_attributes is not None:
        write("node_attributes", [", ".join(f"{v:g}" for v in row) for row in node_attributes.tolist()])


def read_dgcnn(text: str) -> dict[str, np.ndarray | None]:
    """One set's text: the number of graphs, then a line ``nodes label`` a graph and a line
    ``tag degree neighbour ... attribute ...`` a node."""
    lines = iter(text.split("\n"))
    count, first = int(next(lines)), 0
    edges, graph, labels, tags, attributes = [], [], [], [], []
    for number in range(count):
        n, label = (int(v) for v in next(lines).split()[:2])
        labels.append(label)
        for node in range(n):
            fields = next(lines).split()
            degree = int(fields[1])
            tags.append(int(fields[0]))
            edges += [(first + node, first + int(v)) for v in fields[2 : 2 + degree]]
            attributes.append([float(v) for v in fields[2 + degree :]])
        graph += [number] * n
        first += n
    plain = len(set(tags)) == 1  # a set without node labels
    return {
        "edges": np.array(edges, dtype=np.int64).reshape(-1, 2),
        "graph": np.array(graph),
        "labels": np.array(labels),
        "node_labels": None if plain else np.array(tags),
        "node_attributes": np.array(attributes) if attributes[0] else None,
    }


def unpack_tu(source: Path, target: Path) -> None:
    """``tu_graphs.zip`` in ``source`` -> ``target/NAME/raw/NAME_*.txt`` and ``target/NAME/10fold_idx``, lower-case
    folders."""
    with zipfile.ZipFile(source / "tu_graphs.zip") as archive:
        members = archive.namelist()
        for member in members:
            name = Path(member).stem
            if member != f"{name}/{name}.txt":
                continue
            folder = target / name.lower().replace("_", "-")
            write_tu(folder / "raw", name, **read_dgcnn(archive.read(member).decode()))
            for fold in members:
                if fold.startswith(f"{name}/10fold_idx/") and fold.endswith(".txt"):
                    (folder / "10fold_idx").mkdir(exist_ok=True)
                    (folder / "10fold_idx" / Path(fold).name).write_bytes(archive.read(fold))
