"""Node classification in mini-batches: every node as a sequence of nodes near it, with features of their surroundings.

Index legend: n nodes, e directed edges, f features, K nodes of a sequence, t kinds of token, g width of a positional
encoding, b nodes of a batch, u distinct nodes of a batch's sequences, c classes.
"""

import functools
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from zoo.core import ZooError, atomic_write, check_finite, seed_from
from zoo.core.datamodule import Items, _Loader, _Order
from zoo.data.plain import Matrix, tensor_file
from zoo.graph.node.data_graphs import Packed, _ranges
from zoo.graph.node.data_nodes import Graph, NodeClassificationDataModule, clean_edges
from zoo.graph.node.ogb import read_ogb

log = logging.getLogger(__name__)

EXACT = 2e8
"""Paths of two edges up to which ``sampler="auto"`` lists the whole neighbourhoods."""
CHUNK = 2**22
"""Entries that the samplers hold at a time."""


class LargeGTTokenDataModule(NodeClassificationDataModule):
    """One graph as mini-batches of nodes, each with a sequence of nodes from its 1- and 2-hop neighbourhood.

    Batch: "features" (u, t, f) float, of all nodes that occur in the batch's sequences: their own features x, then
    A x, then A^2 x; "tokens" (b, K) int64, the sequences as rows of "features", the node itself first; "pos_enc" (b, g)
    float; "node" (b) int64, numbers in the graph; "y" (b) int64, -1 where unknown; "name": list[str]. A user's own
    graph has no "y" and no "node". The sequences are drawn once, before training.

    What is drawn (LargeGT's Algorithm 1): K - 1 nodes from those one edge away and those two edges away, in the
    direction of the edges. ``sampler="exact"``: the authors' multiset, the nodes one edge away and, each once, the
    nodes two edges away (a node may be both); K - 1 without replacement, where the list is shorter all of it in turns.
    ``sampler="paths"``: the nodes one edge away and the ends of all paths of two edges, so that a node weighs as many
    paths as lead to it, the node itself included; the list is cut into K - 1 equal parts and one is drawn from each,
    straight from the edges, with no list ever made. A node without neighbours gets random nodes of the graph.

    A = D_in^-1/2 (A + I) D_out^-1/2, as the authors' code has it; edges count once, self-loops of the data not at all.

    root=None: a stochastic block model, made from ``seed`` (see `block_ball`): 2,000 nodes in 8 blocks, mean degree 6;
    features name the block and are wrong for 70 % of the nodes; the label is the commonest block within three hops.
    Half of the nodes are for training, a quarter for validation.

    root=DIR: the layouts of `NodeClassificationDataModule`, where edges of the Open Graph Benchmark keep their
    direction; or the authors' prepared files, in DIR or in DIR/data: ``NAME_sample_node_len_K.pt`` (sequences,
    features, averages; labels and splits where it has them) with ``NAME_embedding_G.pt`` (positional encodings); or
    ``snap_patents.mat`` (edge_index, node_feat, num_nodes, years; edges keep their direction), whose labels are five
    quantiles of the years. Prepared files of snap-patents and ogbn take labels from these.

    Args:
        batch_size: nodes a batch.
        num_workers: processes that put batches together.
        name: of the graph in ``root``; None where it holds a single one.
        split: as in `NodeClassificationDataModule`; "half" draws half of the labelled nodes for training and a quarter
            for validation, the protocol of snap-patents and of the embedded set, where "auto" takes it.
        fold: of the splits that come in several.
        per_class: training nodes a class of ``split="random"``.
        tokens: K, at least 2.
        hops: averages that come with each node, 0 to 2; 2 make a field of 4 hops, 0 leaves the nodes' own features.
        sampler: "exact", "paths", or "auto": exact up to 200 million paths of two edges.
        pos_enc: g, of node2vec; 0 for none.
        walks, walk_length, context, walk_epochs: of node2vec: walks a node, nodes a walk and a context, passes.
        walk_batch: nodes a step of node2vec; a small graph needs smaller ones to take enough steps.
        cache: folder for what is prepared, memory-mapped from there; None takes ROOT/prepared, without a root memory.
        form: "tokens", or "graph": the batches of `NodeClassificationDataModule`, for methods that see all at once.
        loader: "zoo", or "torch_geometric": the same batches as `torch_geometric.data.Data`, with the sequences also as
            "edge_index", through its ``NodeLoader``.
    Raises:
        FileNotFoundError: naming the missing file, what was expected and where to get it.
        ZooError: if a file does not hold what its layout says, or names an unknown node.
        ValueError: for fewer than 2 tokens, an unknown choice, or features that are not finite.
    """

    embedded = "a generated graph of 2,000 nodes (labels by the blocks around them)"
    directed = True

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 1024,
        num_workers: int = 0,
        seed: int = 0,
        name: str | None = None,
        split: str = "auto",
        fold: int = 0,
        per_class: int = 20,
        tokens: int = 100,
        hops: int = 2,
        sampler: str = "auto",
        pos_enc: int = 64,
        walks: int = 10,
        walk_length: int = 40,
        context: int = 20,
        walk_epochs: int = 1,
        walk_batch: int = 256,
        cache: str | None = None,
        form: str = "tokens",
        loader: str = "zoo",
    ):
        for key, value, choices in (
            ("sampler", sampler, ("auto", "exact", "paths")),
            ("form", form, ("tokens", "graph")),
            ("loader", loader, ("zoo", "torch_geometric")),
        ):
            if value not in choices:
                raise ValueError(f"{key} is {value!r}; it must be one of {', '.join(choices)}.")
        if tokens < 2 or not 0 <= hops <= 2 or pos_enc < 0:
            raise ValueError(
                f"tokens is {tokens}, hops {hops} and pos_enc {pos_enc}; expected at least 2 (the node and one more), "
                "0 to 2, and at least 0."
            )
        if min(walks, walk_epochs, walk_batch, context - 1) < 1 or walk_length < context:
            raise ValueError(
                f"walks is {walks}, walk_epochs {walk_epochs}, walk_batch {walk_batch}, walk_length {walk_length} and "
                f"context {context}; expected at least 1, 1, 1, a context of at least 2 and walks no shorter."
            )
        self.whole = form == "graph"
        size = 1 if self.whole else batch_size
        super().__init__(root, size, num_workers, seed, name, "random" if split == "half" else split, fold, per_class)
        self.split = split
        self.tokens, self.hops, self.sampler, self.pos_enc = tokens, hops, sampler, pos_enc
        self.walk = {"walks": walks, "length": walk_length, "context": context, "epochs": walk_epochs}
        self.walk["batch"] = walk_batch
        self.cache, self.form, self.through = cache, form, loader
        self._graph: Graph | None = None
        self.save_hyperparameters()

    def build(self) -> dict[str, Dataset]:
        if self.form == "graph":
            graph = self._whole()
            graph = {key: value for key, value in graph.items() if key not in ("sequences", "context", "pos_enc")}
            graph.setdefault("name", [str(i) for i in range(len(graph["x"]))])
            graphs = Items([graph])
            return {"train": graphs, "val": graphs, "test": graphs}
        if self.root is None and self.cache is None:
            prepared = _embedded(self.seed, self.split, json.dumps(self._options()))
        else:
            prepared = self._prepare(self._whole())
        parts = {key: prepared.masks[f"{key}_mask"].nonzero().flatten() for key in ("train", "val", "test")}
        return {key: prepared.subset(nodes) for key, nodes in parts.items()}

    def describe(self) -> dict[str, Any]:
        """``in_features``, ``num_classes``; with sequences ``num_nodes``, with positional encodings ``global_dim``."""
        data = self.dataset("train")
        if not isinstance(data, Sequences):
            return super().describe()
        sizes = {"in_features": data.features.shape[2], "num_classes": data.classes, "num_nodes": len(data.features)}
        return sizes | ({"global_dim": data.pos_enc.shape[1]} if data.pos_enc is not None else {})

    # ---- preparing ----------------------------------------------------------------------------------------------

    def _options(self) -> dict[str, Any]:
        """All that what is prepared depends on, beside the graph."""
        keys = ("seed", "tokens", "hops", "sampler", "pos_enc", "walk")
        return {key: getattr(self, key) for key in keys}

    def _whole(self) -> Graph:
        """The graph with its split, read or made once."""
        if self._graph is None:
            graph = block_ball(self.seed) if self.root is None else self._read_public()
            if "train_mask" not in graph or self.split == "half":
                graph.update(half_split(graph["y"], self.seed))
            self._graph = graph
        return self._graph

    def _prepare(self, graph: Graph) -> "Sequences":
        folder = Path(self.cache).expanduser() if self.cache is not None else None
        if folder is None and self.root is not None:
            folder = self.root / "prepared"
        prepared = prepare(graph, folder=folder, **self._options())
        self._graph = None  # a large one is not held twice
        return prepared

    # ---- public layouts -----------------------------------------------------------------------------------------

    def _read_public(self) -> Graph:
        assert self.root is not None
        places = [folder for folder in (self.root, self.root / "data") if folder.is_dir()]
        end = f"_sample_node_len_{self.tokens}.pt"
        files = {p.name.removesuffix(end): p for folder in places for p in sorted(folder.glob(f"*{end}"))}
        patents = next((p for folder in places for p in [folder / "snap_patents.mat"] if p.is_file()), None)
        name = self.name or (next(iter(files)) if len(files) == 1 else None)
        if name is None and len(files) > 1:
            raise ZooError(f"{self.root} holds {', '.join(files)}: choose one with name=...")
        if name in files:
            graph = read_prepared(files[name], self.hops)
            if "y" not in graph:
                graph.update(self._labels(name, patents, len(graph["x"])))
            encodings = files[name].with_name(f"{name}_embedding_{self.pos_enc}.pt")
            if self.pos_enc and encodings.is_file():
                graph["pos_enc"] = tensor_file(encodings).float()
            return graph
        if patents is not None and self.name in (None, "snap-patents", "snap_patents"):
            return read_patents(patents)
        return super()._read_public()

    def _labels(self, name: str, patents: Path | None, nodes: int) -> Graph:
        """Labels, splits and edges of a set whose prepared file has none."""
        assert self.root is not None
        if name.startswith("ogbn-"):
            graph = read_ogb(name, self.root)
        elif patents is not None:
            graph = read_patents(patents)
        else:
            raise FileNotFoundError(
                f"{self.root} has sequences of {name}, but no labels: expected snap_patents.mat beside them, or a name "
                "that begins with ogbn- and that set's folder."
            )
        if len(graph["y"]) != nodes:
            raise ZooError(f"{name} has {len(graph['y'])} labels and {nodes} sequences.")
        return {key: graph[key] for key in graph if key not in ("x", "name")}

    # ---- users' own graphs, loaders -----------------------------------------------------------------------------

    def read(self, path: Path) -> Any:
        """A user's own graph, as `NodeClassificationDataModule.read` takes it; of several, the first is taken.

        Positional encodings of another graph than the one trained on lie in a space of their own: use
        ``conv_type="local"`` there. For the same edges and ``seed`` they are the same.
        """
        graphs = super().read(path)
        if self.form == "graph" or len(graphs) == 0:
            return graphs
        for graph in graphs.items[1:]:
            self.skip(path, f"a second graph, of {len(graph['x'])} nodes: name one")
        prepared = prepare(graphs.items[0], folder=None, **self._options())
        prepared.own = True
        return prepared

    def loader(self, dataset: Dataset, shuffle: bool = False) -> "DataLoader[Any]":
        if self.through == "torch_geometric" and not self.whole:
            sampler = _Order(dataset, self.batch_size, self.seed, self if shuffle else None, self.trainer)
            return geometric_loader(
                dataset, batch_size=self.batch_size, sampler=_Numbers(sampler), num_workers=self.num_workers
            )
        return super().loader(dataset, shuffle)


class Sequences(Packed):
    """Nodes as sequences; a batch is gathered without a loop over nodes. Tensors may be memory-mapped.

    Args:
        features: (n, t, f), the nodes' own features and their averages.
        tokens: (n, K) int32.
        pos_enc: (n, g) or None.
        y: (n) int64 or None.
        masks: of the splits.
        names: of the nodes; None numbers them.
    """

    def __init__(
        self,
        features: Tensor,
        tokens: Tensor,
        pos_enc: Tensor | None = None,
        y: Tensor | None = None,
        masks: dict[str, Tensor] | None = None,
        names: Sequence[str] | None = None,
    ):
        self.features, self.tokens, self.pos_enc, self.y = features, tokens, pos_enc, y
        self.masks, self.names = masks or {}, names
        self.classes = 0 if y is None else int(y.max()) + 1
        self.chosen = torch.arange(len(features))
        self.own = False  # a user's graph is another one than the model's: its nodes have no numbers there

    def batch(self, indices: list[int], generator: torch.Generator | None = None) -> dict[str, Any]:
        """Some nodes with their sequences."""
        node = self.chosen[indices]
        distinct, rows = torch.unique(self.tokens[node], return_inverse=True)
        found: dict[str, Any] = {"features": self.features[distinct.long()], "tokens": rows}
        if self.pos_enc is not None:
            found["pos_enc"] = self.pos_enc[node]
        if not self.own:
            found["node"] = node
        if self.y is not None:
            found["y"] = self.y[node]
        return {**found, "name": self.named(node)}

    def named(self, node: Tensor) -> list[str]:
        return [self.names[i] if self.names is not None else str(i) for i in node.tolist()]


@functools.lru_cache(maxsize=2)
def _embedded(seed: int, split: str, options: str) -> Sequences:
    """The embedded set, prepared once a process."""
    graph = block_ball(seed)
    graph.update(half_split(graph["y"], seed))
    return prepare(graph, folder=None, **json.loads(options))


# ---- torch_geometric's loaders ---------------------------------------------------------------------------------------


class _Numbers:
    """The order of a `_Order`, without its epochs, as torch_geometric's loaders take it."""

    def __init__(self, order: _Order):
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return (index for index, _ in self.order)


def geometric_loader(data: Sequences, **options: Any) -> Any:
    """A `torch_geometric.loader.NodeLoader` over these nodes; needs torch_geometric alone, none of its extensions.

    Its batches are `torch_geometric.data.Data`: "features", "tokens", "pos_enc", "node", "y" and "name" as in
    `LargeGTTokenDataModule`, beside what its loaders add: "n_id" (u), the nodes' numbers, those of the batch first;
    "batch_size"; and "edge_index" (2, b (K - 1)), from every node of a sequence to the one it is for.

    Args:
        options: of ``torch.utils.data.DataLoader``: batch_size, shuffle, num_workers, ...
    Raises:
        ImportError: naming the extra to install.
    """
    try:
        from torch_geometric.data import Data
        from torch_geometric.loader import NodeLoader
        from torch_geometric.sampler import BaseSampler, SamplerOutput
    except ImportError as error:
        raise ImportError("This loader needs torch_geometric: pip install 'paper-zoo[graph]'.") from error

    class Near(BaseSampler):
        """Looks up the sequences."""

        def sample_from_nodes(self, index: Any, **_: Any) -> Any:
            node = index.node
            sequences = data.tokens[node].long()
            both, place = torch.unique(torch.cat((node, sequences[:, 1:].flatten())), return_inverse=True)
            seeds = place[: len(node)]  # torch_geometric has the nodes of the batch first
            order = torch.ones(len(both), dtype=torch.bool)
            order[seeds] = False
            order = torch.cat((seeds, order.nonzero().flatten()))
            rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
            row = rank[place[len(node) :]]
            col = torch.arange(len(node)).repeat_interleave(sequences.shape[1] - 1)
            return SamplerOutput(
                node=both[order], row=row, col=col, edge=torch.arange(len(row)), metadata=(index.input_id, index.time)
            )

        def sample_from_edges(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError("Sequences are those of nodes, not of edges.")

    def finish(batch: Any) -> Any:
        size, edges = batch.batch_size, batch.edge_index[0].view(batch.batch_size, -1)
        batch.tokens = torch.cat((torch.arange(size)[:, None], edges), 1)
        for key in ("pos_enc", "y"):
            if key in batch:
                batch[key] = batch[key][:size]
        if not data.own:
            batch.node = batch.n_id[:size]
        batch.name = data.named(batch.n_id[:size])
        return batch

    class Loader(_Loader, NodeLoader):
        """Begins, and resumes, as ours do."""

    held = {"features": data.features, "pos_enc": data.pos_enc, "y": data.y}
    graph = Data(num_nodes=len(data.features), **{k: v for k, v in held.items() if v is not None})
    graph.edge_index = torch.zeros(2, 0, dtype=torch.int64)
    return Loader(graph, Near(), input_nodes=data.chosen, transform=finish, **options)


# ---- edges -----------------------------------------------------------------------------------------------------------


class Rows:
    """A graph by its rows: row i lists the targets of the edges of node i, ascending, each once, without i.

    Args:
        edge_index: (2, e) int64, in the order and number it comes.
        nodes: n.
    Raises:
        ZooError: if an edge names a node that does not exist.
    """

    def __init__(self, edge_index: Tensor, nodes: int):
        if edge_index.numel():
            low, high = (int(v) for v in torch.aminmax(edge_index))
            if low < 0 or high >= nodes:
                raise ZooError(f"An edge names node {low if low < 0 else high}; nodes are 0 to {nodes - 1}.")
        keys = torch.unique((edge_index[0] * nodes + edge_index[1])[edge_index[0] != edge_index[1]])
        self.nodes = nodes
        self.targets = (keys % nodes).int()  # (e)
        self.degree = torch.bincount(keys // nodes, minlength=nodes)  # (n), out
        self.first = self.degree.cumsum(0) - self.degree  # (n)

    def of(self, nodes: Tensor) -> Tensor:
        """The rows of some nodes, one after the other."""
        return self.targets[_ranges(self.first[nodes], self.degree[nodes])]

    def second(self) -> Tensor:
        """Paths of two edges from each node, (n) int64."""
        ends = self.degree[self.targets.long()].cumsum(0)
        ends = torch.cat((ends.new_zeros(1), ends))
        return ends[self.first + self.degree] - ends[self.first]

    def fingerprint(self) -> str:
        return _digest(self.degree, self.targets)


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def _chunks(size: Tensor, limit: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Neighbouring rows whose sizes sum to at most ``limit`` (a row that is larger comes alone)."""
    ends, start = size.cumsum(0).numpy(), 0
    while start < len(size):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + limit, side="right")))
        yield start, stop
        start = stop


# ---- sequences -------------------------------------------------------------------------------------------------------


def exact_sequences(rows: Rows, tokens: int, generator: torch.Generator, out: Tensor) -> None:
    """The authors' sequences: K - 1 nodes out of those one and those two edges away (their `create_node_ids`).

    Where there are fewer, the list is gone through again and again, nodes one edge away first.

    Shapes:
        out: (n, K) int32, written
    """
    import scipy.sparse

    more = tokens - 1
    paths = np.ones(len(rows.targets), dtype=bool)  # sums of bits: only where there is a path matters
    indptr = np.append(rows.first.numpy(), len(rows.targets))
    matrix = scipy.sparse.csr_matrix((paths, rows.targets.numpy(), indptr), shape=(rows.nodes, rows.nodes))
    for a, b in _chunks(rows.degree + rows.second() + more):
        own = torch.arange(a, b)
        near, far = matrix[a:b], matrix[a:b] @ matrix
        one, two = (torch.from_numpy(np.diff(m.indptr)).long() for m in (near, far))
        total = one + two
        start = total.cumsum(0) - total
        listed = torch.empty(int(total.sum()), dtype=torch.int32)
        listed[_ranges(start, one)] = torch.from_numpy(near.indices)
        listed[_ranges(start + one, two)] = torch.from_numpy(far.indices)
        # In random order where there is a choice, in its own order elsewhere.
        owner = torch.repeat_interleave(torch.arange(b - a), total)
        key = torch.rand(len(listed), generator=generator, dtype=torch.float64)
        inside = torch.arange(len(listed)) - start[owner]
        key = torch.where(total[owner] >= more, key, inside / (total[owner] + 1))
        listed = listed[(owner + key).argsort()]  # keys below 1
        place = start[:, None] + torch.arange(more) % total.clamp(min=1)[:, None]
        out[a:b, 0] = own.int()
        alone = total == 0
        out[a:b][~alone, 1:] = listed[place[~alone]]
        if bool(alone.any()):
            out[own[alone], 1:] = _anywhere(rows.nodes, int(alone.sum()), more, generator)


def _anywhere(nodes: int, count: int, more: int, generator: torch.Generator) -> Tensor:
    """For nodes without neighbours: different nodes of the graph, with repeats only where it has too few.

    Shapes:
        returns: (count, more) int32
    """
    if nodes >= 4 * more * more:  # repeats are rare: draw anew the rows that have one
        drawn = torch.randint(nodes, (count, more), generator=generator)
        while bool((twice := (drawn.sort(1).values.diff(dim=1) == 0).any(1)).any()):
            drawn[twice] = torch.randint(nodes, (int(twice.sum()), more), generator=generator)
        return drawn.int()
    if nodes < more:
        return torch.randint(nodes, (count, more), generator=generator, dtype=torch.int32)
    return torch.rand(count, nodes, generator=generator).argsort(1)[:, :more].int()


def path_sequences(
    rows: Rows, tokens: int, generator: torch.Generator, out: Tensor, nodes: Tensor | None = None
) -> None:
    """Sequences straight from the edges: K - 1 draws from the nodes one edge away and the ends of paths of two.

    The list of node i has d_i + w_i entries, w_i the sum of its neighbours' degrees. Entry number
    ``floor((k + r_k) (d_i + w_i) / (K - 1))``, r_k uniform in [0, 1), is drawn k-th: each entry is drawn
    (K - 1) / (d_i + w_i) times on average, at most twice more than another, and short lists are used up evenly.
    Where an entry of paths lies follows from running sums of degrees by bisection; no list is made, no A A either.

    Args:
        nodes: (m) int64, whose sequences; None takes all.
    Shapes:
        out: (m, K) int32, written
    """
    more = tokens - 1
    every = torch.arange(rows.nodes) if nodes is None else nodes
    targets, part = rows.targets, torch.arange(more, dtype=torch.float64)
    for a, b in _chunks(rows.degree[every] + more):
        own = every[a:b]
        one = rows.degree[own]
        near = rows.of(own).long()
        degree = rows.degree[near]
        ends = degree.cumsum(0)
        bounds = torch.cat((ends.new_zeros(1), ends))
        begin = one.cumsum(0) - one  # where a row starts in `near`
        before = bounds[begin]
        total = one + bounds[begin + one] - before
        drawn = torch.rand((b - a, more), generator=generator, dtype=torch.float64)
        entry = ((part + drawn) * (total[:, None] / more)).long()
        entry = torch.minimum(entry, (total - 1).clamp(min=0)[:, None])
        chosen = torch.empty(b - a, more, dtype=torch.int32)
        first = entry < one[:, None]
        chosen[first] = near[(begin[:, None] + entry)[first]].int()
        second = ~first & (total > 0)[:, None]
        position = (before[:, None] + entry - one[:, None])[second]
        edge = torch.searchsorted(ends, position, right=True)
        chosen[second] = targets[rows.first[near[edge]] + position - bounds[edge]]
        alone = total == 0
        if bool(alone.any()):
            chosen[alone] = _anywhere(rows.nodes, int(alone.sum()), more, generator)
        out[a:b, 0], out[a:b, 1:] = own.int(), chosen


# ---- averages --------------------------------------------------------------------------------------------------------


def averages(rows: Rows, features: Tensor, hops: int) -> None:
    """Write A x and A^2 x behind x,  A = D_in^-1/2 (A + I) D_out^-1/2, a few rows at a time.

    Row i of the product sums over the targets j of i's edges, scaled by i's in-degree and j's out-degree (plus one).

    Shapes:
        features: (n, 1 + hops, f), the first filled in
    """
    coming = torch.bincount(rows.targets.long(), minlength=rows.nodes)
    left, right = ((d + 1).double().rsqrt() for d in (coming, rows.degree))
    for hop in range(hops):
        x = features[:, hop]
        for a, b in _chunks(rows.degree + 1):
            own = torch.arange(a, b)
            there = rows.of(own).long()
            count = rows.degree[a:b]
            bounds = torch.cat((count.new_zeros(1), count.cumsum(0)))
            owner = torch.repeat_interleave(own, count)
            values = (left[owner] * right[there]).to(x.dtype)
            with warnings.catch_warnings():  # "beta state"
                warnings.simplefilter("ignore", UserWarning)
                matrix = torch.sparse_csr_tensor(bounds, there, values, (b - a, rows.nodes), check_invariants=False)
            loop = (left[a:b] * right[a:b]).to(x.dtype)[:, None]
            features[a:b, hop + 1] = matrix @ x + loop * x[a:b]


# ---- positional encodings --------------------------------------------------------------------------------------------


def walk_gradient(vectors: Tensor, context: int, near: bool) -> Tensor:
    """Gradient of skip-gram's loss for one kind of sequence, its mean over all windows, by the vectors.

        -log sigma(<e_s, e_v>) on walks,   -log(1 - sigma(<e_s, e_v>)) on random sequences

    over a window's first node s and its other nodes v. Windows overlap: all scores of a sequence are one small product.

    Args:
        near: on walks.
    Shapes:
        vectors: (w, length, g); returns: the same
    """
    length = vectors.shape[1]
    first = length - context + 1
    apart = torch.arange(length) - torch.arange(first)[:, None]
    window = ((apart >= 1) & (apart < context)).to(vectors.dtype)
    window /= len(vectors) * window.sum()
    scores = vectors[:, :first] @ vectors.mT  # (w, windows, length)
    slope = scores.neg_().sigmoid_().mul_(-window) if near else scores.sigmoid_().mul_(window)
    gradient = slope.mT @ vectors[:, :first]
    gradient[:, :first] += slope @ vectors
    return gradient


def random_walks(rows: Rows, start: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Uniform random walks; a node without edges is stayed at. Shapes: start (w); returns (w, length) int64."""
    walk = torch.empty(len(start), length, dtype=torch.int64)
    walk[:, 0] = start
    for step in range(1, length):
        here = walk[:, step - 1]
        degree = rows.degree[here]
        chosen = (torch.rand(len(here), generator=generator, dtype=torch.float64) * degree).long()
        goes = degree > 0
        walk[:, step] = here
        walk[goes, step] = rows.targets[(rows.first[here] + chosen)[goes]].long()
    return walk


def node2vec(
    rows: Rows,
    dim: int,
    generator: torch.Generator,
    walks: int = 10,
    length: int = 40,
    context: int = 20,
    epochs: int = 1,
    batch: int = 256,
    lr: float = 0.01,
) -> Tensor:
    """Positional encodings (Grover and Leskovec, arXiv:1607.00653, p = q = 1), as torch_geometric's Node2Vec trains.

    (Its own walks only with pyg-lib.) Adam moves a node's vector and moments only in steps where the node occurs, as
    torch's SparseAdam does.

    Args:
        dim: g.
        walks, length, context: walks a node, nodes a walk and a window.
        epochs, batch, lr: passes over all nodes, nodes a step, learning rate.
    Shapes:
        returns: (n, dim)
    """
    weight = torch.empty(rows.nodes, dim).normal_(generator=generator)
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    step = 0
    for _ in range(epochs):
        for node in torch.randperm(rows.nodes, generator=generator).split(batch):
            start = node.repeat(walks)
            near = random_walks(rows, start, length, generator)
            far = torch.randint(rows.nodes, near.shape, generator=generator)
            far[:, 0] = start
            met, place = torch.unique(torch.stack((near, far)), return_inverse=True)
            gradient = torch.zeros(len(met), dim)
            for kind, own in enumerate(place):
                part = walk_gradient(weight[met][own], context, kind == 0)
                gradient.index_add_(0, own.flatten(), part.flatten(0, 1))
            step += 1
            mean[met] = mean[met].lerp(gradient, 0.1)
            square[met] = square[met].lerp(gradient.square(), 0.001)
            rate = lr * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
            weight[met] -= rate * mean[met] / (square[met].sqrt() + 1e-8)
    return weight


# ---- all of it, once -------------------------------------------------------------------------------------------------


def prepare(
    graph: Graph,
    seed: int = 0,
    tokens: int = 100,
    hops: int = 2,
    sampler: str = "auto",
    pos_enc: int = 64,
    walk: dict[str, int] | None = None,
    folder: Path | None = None,
) -> Sequences:
    """Sequences, averages and positional encodings of a graph; in ``folder``, each made once and memory-mapped.

    Args:
        graph: "x" (n, f), "edge_index" (2, e); "y", masks and "name" are passed on. Where it brings "sequences" (n, K),
            "context" (n, hops, f) or "pos_enc" (n, g), those are taken.
        walk: of `node2vec`.
    Raises:
        ValueError: if a feature is NaN or infinite.
        ZooError: if what the graph brings does not fit, or names an unknown node.
    """
    x = graph["x"].float()
    check_finite(x, "x")
    n = len(x)
    brought = graph.get("sequences")
    rows = Rows(graph["edge_index"], n) if "edge_index" in graph else None
    if rows is None and (brought is None or (pos_enc and "pos_enc" not in graph)):
        raise ZooError("There are no edges to draw sequences or positional encodings from.")
    if brought is not None:
        low, high = (int(v) for v in torch.aminmax(brought))
        if brought.shape != (n, tokens) or low < 0 or high >= n:
            raise ZooError(
                f"Sequences of shape {tuple(brought.shape)} name nodes {low} to {high}; expected ({n}, {tokens}) and "
                f"0 to {n - 1}."
            )
        if not torch.equal(brought[:, 0].long(), torch.arange(n)):
            raise ZooError("The sequence of a node must begin with the node itself.")
    given = graph.get("pos_enc")
    if given is not None and pos_enc and given.shape != (n, pos_enc):
        raise ZooError(f"Positional encodings have shape {tuple(given.shape)}; expected ({n}, {pos_enc}).")

    if sampler == "auto" and rows is not None:
        sampler = "exact" if float(rows.second().sum(dtype=torch.float64)) <= EXACT else "paths"
    print_ = rows.fingerprint() if rows is not None else str(n)
    walk = walk or {"walks": 10, "length": 40, "context": 20, "epochs": 1, "batch": 256}

    def generator(what: str) -> torch.Generator:
        return torch.Generator().manual_seed(seed_from(seed, what))

    def make_tokens(out: Tensor) -> None:
        if brought is not None:
            out.copy_(brought)
        else:
            (exact_sequences if sampler == "exact" else path_sequences)(rows, tokens, generator("sequences"), out)

    def make_features(out: Tensor) -> None:
        out[:, 0] = x
        if "context" in graph:
            out[:, 1:] = graph["context"][:, :hops]
        else:
            averages(rows, out, hops)

    def make_encodings(out: Tensor) -> None:
        out.copy_(given if given is not None else node2vec(rows, pos_enc, generator("node2vec"), **walk))

    store = functools.partial(_stored, folder)
    sources = [x, graph["context"]] if "context" in graph else [x]
    content = _digest(*sources) if folder is not None else ""
    made = {
        "tokens": store(f"tokens-{tokens}-{sampler}-{seed}-{print_}", make_tokens, (n, tokens), torch.int32)
        if brought is None
        else brought.int(),
        "features": store(f"features-{hops}-{content}-{print_}", make_features, (n, 1 + hops, x.shape[1])),
    }
    if pos_enc:
        mark = "-".join(map(str, walk.values()))
        made["pos_enc"] = (
            given.float()
            if given is not None
            else store(f"node2vec-{pos_enc}-{mark}-{seed}-{print_}", make_encodings, (n, pos_enc))
        )
    masks = {key: graph[key] for key in ("train_mask", "val_mask", "test_mask") if key in graph}
    return Sequences(**made, y=graph.get("y"), masks=masks, names=graph.get("name"))


def _stored(
    folder: Path | None, name: str, make: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """What ``make`` writes into a tensor: in memory, or in a file that is complete or absent, and mapped."""
    if folder is None:
        out = torch.empty(shape, dtype=dtype)
        make(out)
        return out
    path = folder / f"{name}.npy"
    if not path.is_file():
        kind = np.int32 if dtype == torch.int32 else np.float32
        with atomic_write(path) as part:
            mapped = np.lib.format.open_memmap(part, mode="w+", dtype=kind, shape=shape)
            make(torch.from_numpy(mapped))
            mapped.flush()
            del mapped
    try:
        # Copies on writing: nothing writes, and torch wants arrays that could be written to.
        mapped = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ZooError(f"{path} cannot be read: {error}. Remove it, and it is made anew.") from error
    if mapped.shape != shape:
        raise ZooError(f"{path} has shape {mapped.shape}; expected {shape}. Remove it, and it is made anew.")
    return torch.from_numpy(mapped)


# ---- generated graphs and splits -------------------------------------------------------------------------------------


def block_ball(
    seed: int,
    blocks: int = 8,
    size: int = 250,
    degree: float = 6.0,
    within: float = 0.6,
    noise: float = 0.7,
    radius: int = 3,
) -> Graph:
    """A stochastic block model whose labels follow from what lies around: the commonest block within ``radius`` hops.

    Args:
        blocks, size: blocks, and nodes of each.
        degree: mean degree, before repeated edges are merged.
        within: fraction of edges within a block.
        noise: fraction of nodes whose features name a block drawn at random instead of their own.
    """
    generator = torch.Generator().manual_seed(seed_from(seed, "block ball"))
    n, block = blocks * size, torch.arange(blocks).repeat_interleave(size)
    source = torch.randint(n, (round(n * degree / 2),), generator=generator)
    stay = torch.rand(source.shape, generator=generator) < within
    shift = torch.randint(1, blocks, source.shape, generator=generator)
    other = (block[source] + torch.where(stay, 0, shift)) % blocks
    target = other * size + torch.randint(size, source.shape, generator=generator)
    edges = clean_edges(torch.stack((source, target)), n)
    wrong = torch.rand(n, generator=generator) < noise
    shown = torch.where(wrong, torch.randint(blocks, (n,), generator=generator), block)
    near = torch.sparse_coo_tensor(edges, torch.ones(edges.shape[1]), (n, n), check_invariants=False)
    ball = torch.eye(n, dtype=torch.bool)
    for _ in range(radius):
        ball |= near @ ball.float() > 0
    counts = ball.float() @ F.one_hot(block, blocks).float()
    return {"x": F.one_hot(shown, blocks).float(), "edge_index": edges, "y": counts.argmax(1)}


def half_split(y: Tensor, seed: int) -> dict[str, Tensor]:
    """Half of the labelled nodes for training, a quarter for validation, the rest for tests, drawn by ``seed``.

    Shapes:
        y: (n) int64, -1 for unlabelled; returns: three masks (n) bool
    """
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed_from(seed, "half split")))
    order = order[y[order] >= 0]
    parts = order.tensor_split((len(order) // 2, len(order) // 2 + len(order) // 4))
    masks = {}
    for key, part in zip(("train_mask", "val_mask", "test_mask"), parts, strict=True):
        masks[key] = torch.zeros(len(y), dtype=torch.bool)
        masks[key][part] = True
    return masks


# ---- public layouts --------------------------------------------------------------------------------------------------


def read_prepared(path: Path, hops: int = 2) -> Graph:
    """The authors' ``NAME_sample_node_len_K.pt``: [sequences, X, averages (n, 3, f), adjacency, labels, three splits],
    from the adjacency on as far as there; or ogbn-papers100M's dictionary, whose averages are in a file of their own.

    Raises:
        ZooError: if it holds something else.
    """
    content = tensor_file(path)
    graph: Graph = {}
    try:
        if isinstance(content, dict):
            parts = [content["nodes_in_seq"], content["node_feat"]]
            other = path.with_name(path.name.replace(".pt", "_hop2token_feats.pt"))
            if not other.is_file():
                raise FileNotFoundError(f"{other} is missing: expected the averages that belong to {path.name}.")
            parts.append(tensor_file(other))
            graph["y"] = torch.as_tensor(content["label"]).flatten().nan_to_num(nan=-1).long()
            splits = [content["split_idx"][key] for key in ("train", "valid", "test")]
        else:
            parts = list(content[:3])
            if len(content) > 3 and isinstance(content[3], Matrix):
                graph["edge_index"] = torch.from_numpy(np.stack(content[3].places()[:2]))
            splits = list(content[5:8])
            labels = torch.as_tensor(content[4]) if len(content) > 4 else None
            if labels is not None and labels.ndim == 2 and len(labels) == len(parts[1]):
                graph["y"] = labels.argmax(1)
        graph["sequences"] = torch.as_tensor(parts[0]).int()
        graph["x"] = torch.as_tensor(parts[1]).float()
        context = torch.as_tensor(parts[2]).float()
        n, f = graph["x"].shape
        if context.ndim != 3 or context.shape[0] != n or context.shape[2] != f or context.shape[1] < hops:
            raise ValueError(f"averages have shape {tuple(context.shape)}, features ({n}, {f})")
        graph["context"] = context[:, :hops]
        if "y" in graph:
            for key, index in zip(("train_mask", "val_mask", "test_mask"), splits, strict=True):
                graph[key] = torch.zeros(n, dtype=torch.bool)
                graph[key][torch.as_tensor(index).long()] = True
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise ZooError(f"{path} does not hold prepared sequences: {error}") from error
    return graph


def quantile_labels(years: np.ndarray, classes: int = 5) -> Tensor:
    """The classes of snap-patents: equally many years below each bound. Shapes: years (n); returns (n) int64."""
    bounds = [np.nanquantile(years, (k + 1) / classes) for k in range(classes - 1)]
    labels = np.searchsorted(np.asarray(bounds), years, side="right").astype(np.int64)
    return torch.from_numpy(np.where(np.isnan(years), -1, labels))


def read_patents(path: Path) -> Graph:
    """``snap_patents.mat`` of github.com/CUAI/Non-Homophily-Large-Scale: citations from patent to patent.

    Raises:
        ZooError: if it holds something else.
    """
    import scipy.io

    try:
        content = scipy.io.loadmat(path)
        x = content["node_feat"]
        x = torch.from_numpy(np.asarray(x.toarray() if hasattr(x, "toarray") else x, dtype=np.float32))
        edges = torch.from_numpy(np.asarray(content["edge_index"], dtype=np.int64))
        years = np.asarray(content["years"], dtype=np.float64).flatten()
        n = int(np.asarray(content["num_nodes"]).item())
        if edges.ndim != 2 or len(edges) != 2 or len(x) != n or len(years) != n:
            raise ValueError(f"{n} nodes, features {tuple(x.shape)}, {len(years)} years, edges {tuple(edges.shape)}")
    except Exception as error:
        raise ZooError(f"{path} does not hold snap-patents: {error}") from error
    return {"x": x, "edge_index": edges, "y": quantile_labels(years)}
