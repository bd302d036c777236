"""Networks along meta-structures: the typed graph ready to multiply, the cell, the attention over several structures.

    H       = dropout(W_type x + b_type)                                      every node, by its type
    s_0     = U H + c
    s_i     = sum over the structure's edges (j -> i) of  D^-1 (A_type + I) s_j
    z       = gelu(layer norm(s_L))                                           the last state, the root's
    out     = sum_k softmax_k(v^T tanh(V z_k)) z_k                            over several structures

``D^-1 (A + I)`` of one edge type has rows of the other types that are rows of I: these are not multiplied. States are
kept by type, and only the types that the last state's rows depend on are computed at all. Where values cannot be
looked at (meta device, torch.compile, torch.export) the same is computed on all nodes with masks.

Index legend: n nodes, e edges, s stored features, m nodes asked for, h hidden units, f features of one type.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.graph.heterogeneous.meta_structure import MetaStructure, Operation, plan, reached
from zoo.nn.graph import Sparse, tracing

States = dict[str, Tensor]
"""Rows by type; on the traced way all rows under the one key ""."""


# ---- the graph -------------------------------------------------------------------------------------------------------


def check_hin(
    x: Tensor,
    x_index: Tensor,
    node_type: Tensor,
    edge_index: Tensor,
    edge_type: Tensor,
    widths: Sequence[int],
    relations: Sequence[Sequence[int]],
) -> None:
    """Refuse what is no graph of these types and relations; values are looked at where they can be.

    Args:
        widths: features of every type.
        relations: pairs of type numbers.
    Raises:
        ValueError: saying what came and what is expected.
    """
    shapes = {"x_index": (x_index, (2, len(x))), "edge_type": (edge_type, (edge_index.shape[-1],))}
    for key, (value, shape) in shapes.items():
        if tuple(value.shape) != shape or value.dtype != torch.int64:
            raise ValueError(f"'{key}' has shape {tuple(value.shape)} and type {value.dtype}; expected {shape}, int64.")
    if x.ndim != 1 or not x.is_floating_point():
        raise ValueError(f"'x' has shape {tuple(x.shape)} and type {x.dtype}; expected (stored features,) and float.")
    if edge_index.ndim != 2 or edge_index.shape[0] != 2 or edge_index.dtype != torch.int64:
        raise ValueError(f"'edge_index' has shape {tuple(edge_index.shape)}; expected (2, edges), int64.")
    if node_type.ndim != 1 or node_type.dtype != torch.int64 or not len(node_type):
        raise ValueError(f"'node_type' has shape {tuple(node_type.shape)}; expected (nodes >= 1,), int64, ascending.")
    if tracing(node_type):
        return
    n = len(node_type)
    if bool((node_type.diff() < 0).any()) or int(node_type[0]) < 0 or int(node_type[-1]) >= len(widths):
        raise ValueError(f"'node_type' must ascend within 0 to {len(widths) - 1}: nodes stand together by type.")
    for key, value, size in (("x_index", x_index[0], n), ("edge_index", edge_index, n)):
        if value.numel() and (int(value.min()) < 0 or int(value.max()) >= size):
            low = int(value.min())
            raise ValueError(f"'{key}' names node {low if low < 0 else int(value.max())}; nodes are 0 to {size - 1}.")
    width = torch.tensor(list(widths), device=x.device)[node_type[x_index[0]]]
    wide = (x_index[1] < 0) | (x_index[1] >= width)
    if bool(wide.any()):
        at = int(wide.nonzero()[0])
        kind = int(node_type[x_index[0, at]])
        raise ValueError(
            f"'x_index' has column {int(x_index[1, at])} for a node of type {kind}, which has {widths[kind]} features."
        )
    if edge_type.numel() and (int(edge_type.min()) < 0 or int(edge_type.max()) >= len(relations)):
        raise ValueError(f"'edge_type' must lie in 0 to {len(relations) - 1}, one a relation.")
    pairs = torch.tensor([list(r) for r in relations], device=x.device).t()  # (2, relations)
    wrong = node_type[edge_index] != pairs[:, edge_type]
    if bool(wrong.any()):
        at = int(wrong.any(0).nonzero()[0])
        got, want = node_type[edge_index[:, at]].tolist(), pairs[:, edge_type[at]].tolist()
        raise ValueError(
            f"'edge_index' joins types {got} in column {at}, where 'edge_type' says {want} (sources in row 0)."
        )


def check_nodes(node: Tensor, node_type: Tensor, ends: Sequence[int]) -> None:
    """Refuse what is asked for if it is not there, or of another type.

    Args:
        ends: the types of what is asked for: one (``node`` is (m)) or two (``node`` is (m, 2)).
    Raises:
        ValueError: saying what came and what is expected.
    """
    wanted, n = "(m >= 1,)" if len(ends) == 1 else "(m >= 1, 2)", len(node_type)
    if node.ndim != len(ends) or node.dtype != torch.int64 or not len(node) or node.shape[1:] != (2,) * (node.ndim - 1):
        raise ValueError(f"'node' has shape {tuple(node.shape)} and type {node.dtype}; expected {wanted}, int64.")
    if tracing(node):
        return
    low, high = int(node.min()), int(node.max())
    if low < 0 or high >= n:
        raise ValueError(f"'node' names node {low if low < 0 else high}; nodes are 0 to {n - 1}.")
    for place, kind in enumerate(ends):
        column = node if node.ndim == 1 else node[:, place]
        found = node_type[column] != kind
        if bool(found.any()):
            wrong = int(column[found][0])
            raise ValueError(f"'node' holds node {wrong} of type {int(node_type[wrong])}; expected type {kind}.")


class _Graph:
    """A heterogeneous graph: names, widths, and the tensors of a batch.

    Args:
        types: names, by number.
        relations: pairs of names, by number.
        widths: features of every type.
        x, x_index, node_type, edge_index, edge_type: as in `ReStruct.forward`.
    """

    def __init__(
        self,
        types: Sequence[str],
        relations: Sequence[Sequence[str]],
        widths: Sequence[int],
        x: Tensor,
        x_index: Tensor,
        node_type: Tensor,
        edge_index: Tensor,
        edge_type: Tensor,
    ):
        self.types, self.widths, self.relations = list(types), list(widths), [tuple(r) for r in relations]
        self.x, self.x_index, self.node_type = x, x_index, node_type
        self.edge_index, self.edge_type = edge_index, edge_type

    def _edges(self, a: str, b: str) -> tuple[Tensor, Tensor, Tensor]:
        """Which edges join a to b, (e) bool, and all edges' ends on the sides of a and of b, (e) int64 each."""
        turned = (a, b) not in self.relations
        number = self.relations.index((b, a) if turned else (a, b))
        rows, columns = self.edge_index.flip(0) if turned else self.edge_index
        return self.edge_type == number, rows, columns


class TypedGraph(_Graph):
    """The graph by its types, with the matrices that structures ask for, each made once."""

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        sizes = torch.bincount(self.node_type, minlength=len(self.types)).tolist()
        self.sizes = dict(zip(self.types, sizes, strict=True))
        self.first = {name: sum(sizes[:k]) for k, name in enumerate(self.types)}
        self._matrices: dict[Any, Any] = {}

    def _kept(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._matrices:
            with torch.inference_mode(False), torch.no_grad():
                self._matrices[key] = make()
        return self._matrices[key]

    def _features(self, name: str) -> Any:
        """A type's features: None for its nodes' own numbers (one-hot), a `Sparse`, or a dense tensor."""
        inside = self.node_type[self.x_index[0]] == self.types.index(name)
        rows, columns, values = self.x_index[0, inside] - self.first[name], self.x_index[1, inside], self.x[inside]
        n, f = self.sizes[name], self.widths[self.types.index(name)]
        own = torch.arange(n, device=self.x.device)
        if n == f and len(values) == n and bool((values == 1).all() & (rows == own).all() & (columns == own).all()):
            return None
        if len(values) > 0.1 * n * f:
            return self.x.new_zeros(n, f).index_put_((rows, columns), values, accumulate=True)
        return Sparse(rows, columns, values, (n, f))

    def project(self, name: str, weights: Tensor) -> Tensor:
        """A type's features times its weights. Shapes: weights (f, w); returns (nodes of the type, w)."""
        features = self._kept(("features", name), lambda: self._features(name))
        return weights if features is None else features @ weights

    def _adjacency(self, a: str, b: str) -> tuple[Tensor, Sparse]:
        """Of D^-1 (A + I): the diagonal (nodes of type a, 1), and the rest, (nodes of a, nodes of b)."""
        own, rows, columns = self._edges(a, b)
        rows, columns = rows[own] - self.first[a], columns[own] - self.first[b]
        n = self.sizes[a]
        if a == b:  # within a type: both directions, and the symmetric normalisation
            rows, columns = torch.cat((rows, columns)), torch.cat((columns, rows))
            loop = 1.0 / (1.0 + torch.bincount(rows, minlength=n).to(self.x.dtype))
            return loop[:, None], Sparse(rows, columns, loop.sqrt()[rows] * loop.sqrt()[columns], (n, n))
        loop = 1.0 / (1.0 + torch.bincount(rows, minlength=n).to(self.x.dtype))
        return loop[:, None], Sparse(rows, columns, loop[rows], (n, self.sizes[b]))

    def move(self, a: str, b: str, state: States, needed: set[str]) -> States:
        """D^-1 (A_ab + I) times a state, of the types ``needed``."""
        out = {name: state[name] for name in needed if name != a}
        if a in needed:
            loop, rest = self._kept((a, b), lambda: self._adjacency(a, b))
            moved = rest @ state[b]
            out[a] = torch.addcmul(moved, loop, state[a].to(moved.dtype))
        return out

    def split(self, rows: Tensor) -> States:
        """All rows as rows by type."""
        return dict(zip(self.types, rows.split(list(self.sizes.values())), strict=True))

    def rows(self, state: States, name: str, node: Tensor) -> Tensor:
        """Of the nodes asked for, all of one type. Shapes: node (m) int64; returns (m, w)."""
        return state[name][node - self.first[name]]


class TracedGraph(_Graph):
    """The same on all nodes at once with masks: dense operations of fixed shapes only."""

    def project_all(self, table: Tensor) -> Tensor:
        """Shapes: table (features of all types, w); returns (n, w)."""
        offsets = torch.tensor([sum(self.widths[:k]) for k in range(len(self.widths))], device=self.x.device)
        # clamped: in a traced graph no place may lie outside, whatever is fed
        place = (self.x_index[1] + offsets[self.node_type[self.x_index[0]]]).clamp(0, len(table) - 1)
        out = table.new_zeros(len(self.node_type), table.shape[1])
        return out.index_add(0, self.x_index[0], table[place] * self.x[:, None].to(table.dtype))

    def move(self, a: str, b: str, state: States, needed: set[str]) -> States:
        s = state[""]
        own, rows, columns = self._edges(a, b)
        weight = own.to(s.dtype)
        if a == b:
            rows, columns, weight = torch.cat((rows, columns)), torch.cat((columns, rows)), weight.repeat(2)
        loop = 1.0 / (1.0 + s.new_zeros(len(s)).index_add(0, rows, weight))
        scale = loop.sqrt()[rows] * loop.sqrt()[columns] if a == b else loop[rows]
        moved = torch.zeros_like(s).index_add(0, rows, s[columns] * (weight * scale)[:, None])
        return {"": moved + loop[:, None] * s}

    def rows(self, state: States, name: str, node: Tensor) -> Tensor:
        return state[""][node]


# ---- the network -----------------------------------------------------------------------------------------------------


class Projection(nn.Module):
    """One linear layer a type, all in one table: W of a type are its rows, so that unused types get zero gradients.

    Args:
        widths: features of every type.
        hidden: h.
    """

    def __init__(self, widths: Sequence[int], hidden: int):
        super().__init__()
        self.widths = list(widths)
        self.table = nn.Parameter(torch.empty(sum(widths), hidden))
        self.bias = nn.Parameter(torch.empty(len(widths), hidden))
        with torch.no_grad():
            for rows, bias in zip(self.table.split(self.widths), self.bias, strict=True):
                bound = len(rows) ** -0.5  # torch's initialisation of a linear layer
                rows.uniform_(-bound, bound)
                bias.uniform_(-bound, bound)


class Cell(nn.Module):
    """The states along one structure (module docstring), and the last one's rows of the root's type.

    Args:
        hidden: h.
        norm, activation: layer norm and GELU on the last state.
    """

    def __init__(self, hidden: int, norm: bool = True, activation: bool = True):
        super().__init__()
        self.affine = nn.Linear(hidden, hidden)
        self.norm = nn.LayerNorm(hidden) if norm else nn.Identity()
        self.activation = activation

    def forward(self, graph: Any, h: States, sums: list[list[Operation]], root: str) -> States:
        """Args: sums: the structure's `plan`. Shapes: h, by type (nodes, h); returns: rows of the root's type."""
        needed = reached(sums, root)
        traced = "" in h
        first = {"": h[""]} if traced else {name: h[name] for name in needed[0]}
        states: list[States | None] = [{k: self.affine(v) for k, v in first.items()}]
        for i, operations in enumerate(sums, 1):
            total: States | None = None
            for j, a, b in operations:
                source = states[j]
                assert source is not None  # a plan starts only from states that something feeds
                moved = graph.move(a, b, source, needed[i])
                total = moved if total is None else {k: total[k] + v for k, v in moved.items()}
            states.append(total)
        last = states[-1]
        if last is None:  # the authors' order may leave the last state without any
            rows = h[""] if traced else h[root] if root in h else next(iter(h.values()))[:0]
            last = {"" if traced else root: torch.zeros_like(rows)}
        out = {k: self.norm(v) for k, v in last.items()}
        return {k: F.gelu(v) for k, v in out.items()} if self.activation else out


class Tower(nn.Module):
    """Features to the representations of one type's nodes, along one or several structures.

    Args:
        types, widths: node types and features of each.
        hidden, attention: h, and units of the attention over structures.
        cells: structures that run side by side.
        dropout: rate, after the projection.
        norm, activation: see `Cell`.
        tanh: of the projected features.
    """

    def __init__(
        self,
        types: Sequence[str],
        widths: Sequence[int],
        hidden: int,
        attention: int,
        cells: int,
        dropout: float,
        norm: bool = True,
        activation: bool = True,
        tanh: bool = False,
    ):
        super().__init__()
        self.types, self.p, self.tanh = list(types), dropout, tanh
        self.projection = Projection(widths, hidden)
        self.cells = nn.ModuleList(Cell(hidden, norm, activation) for _ in range(cells))
        self.attention = (
            nn.Sequential(nn.Linear(hidden, attention), nn.Tanh(), nn.Linear(attention, 1)) if cells > 1 else None
        )

    def hidden(self, graph: Any, plans: Sequence[list[list[Operation]]], root: str) -> States:
        """H without dropout, of the types that the structures reach."""
        if isinstance(graph, TracedGraph):
            h = {"": graph.project_all(self.projection.table) + self.projection.bias[graph.node_type]}
        else:
            wanted = set.union(*(reached(sums, root)[0] for sums in plans))
            parts = self.projection.table.split(self.projection.widths)
            h = {
                name: graph.project(name, parts[k]) + self.projection.bias[k]
                for k, name in enumerate(self.types)
                if name in wanted
            }
        return {k: v.tanh() for k, v in h.items()} if self.tanh else h

    def forward(
        self,
        graph: Any,
        plans: Sequence[list[list[Operation]]],
        root: str,
        node: Tensor,
        hidden: States | None = None,
    ) -> Tensor:
        """Args: hidden: what `hidden` gave, where it is known already. Shapes: node (m); returns: (m, h)."""
        h = self.hidden(graph, plans, root) if hidden is None else hidden
        h = {k: F.dropout(v, self.p, self.training) for k, v in h.items()}
        outs = [
            graph.rows(cell(graph, h, sums, root), root, node) for cell, sums in zip(self.cells, plans, strict=True)
        ]
        if self.attention is None:
            return outs[0]
        several = torch.stack(outs, 1)  # (m, k, h)
        return (self.attention(several).softmax(1) * several).sum(1)


class StructureNet(nn.Module):
    """Class logits of nodes, or scores of pairs by two towers.

        logits = W z_source + b              score = <z_source, z_target>

    Args:
        types, relations, ends: names; the structures' source and target type.
        widths: features of every type.
        num_classes: c; 0 for scores.
        cells: structures side by side.
        authors_order: see `plan`.
        rest: of `Tower`.
    """

    def __init__(
        self,
        types: Sequence[str],
        relations: Sequence[Sequence[str]],
        ends: Sequence[str],
        widths: Sequence[int],
        num_classes: int,
        cells: int = 1,
        authors_order: bool = False,
        **rest: Any,
    ):
        super().__init__()
        self.types, self.relations, self.widths = list(types), [list(r) for r in relations], list(widths)
        self.ends, self.authors_order = list(ends), authors_order
        towers = 1 if num_classes else 2
        self.towers = nn.ModuleList(Tower(types, widths, cells=cells, **rest) for _ in range(towers))
        self.classifier = nn.Linear(rest["hidden"], num_classes) if num_classes else None

    def plans(self, structures: Sequence[MetaStructure]) -> list[list[list[list[Operation]]]]:
        """Of every tower, of every structure: the source's tower ends at node 0, the target's at node 1."""
        return [[plan(s, root, self.authors_order) for s in structures] for root in range(len(self.towers))]

    def hidden(self, graph: Any, structures: Sequence[MetaStructure]) -> list[States]:
        """What every tower's dropout takes: the projected features."""
        every = zip(self.towers, self.plans(structures), self.ends[: len(self.towers)], strict=True)
        return [tower.hidden(graph, plans, root) for tower, plans, root in every]

    def forward(
        self, graph: Any, structures: Sequence[MetaStructure], node: Tensor, hidden: list[States] | None = None
    ) -> Tensor:
        """Shapes: node (m) or (m, 2); returns: (m, c) or (m)."""
        outs = []
        for k, (tower, plans) in enumerate(zip(self.towers, self.plans(structures), strict=True)):
            own = node if node.ndim == 1 else node[:, k]
            outs.append(tower(graph, plans, self.ends[k], own, None if hidden is None else hidden[k]))
        return self.classifier(outs[0]) if self.classifier is not None else (outs[0] * outs[1]).sum(-1)
