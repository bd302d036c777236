"""Layers for whole graphs: normalised adjacency, sparse features, the graph convolution, cheap dropout.

Index legend: n nodes, e directed edges, f features, h hidden units, s stored (non-zero) features.

A graph is ``x`` (n, f) and ``edge_index`` (2, e): row 0 the sources, row 1 the targets, every undirected edge twice.
torch_geometric's layout; that package itself is not needed here.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def tracing(x: Tensor) -> bool:
    """True where values cannot be looked at: meta tensors, torch.compile, torch.export."""
    return x.is_meta or torch.compiler.is_compiling() or torch.compiler.is_exporting()


def check_graph(x: Tensor, edge_index: Tensor, features: int) -> None:
    """Refuse anything but one graph with ``features`` features a node.

    Raises:
        ValueError: saying what came and what is expected; the range of ``edge_index`` is checked where values can be
            looked at.
    """
    if x.ndim != 2 or x.shape[1] != features or x.shape[0] == 0:
        raise ValueError(f"'x' has shape {tuple(x.shape)}; expected (nodes >= 1, {features}).")
    if edge_index.ndim != 2 or edge_index.shape[0] != 2 or edge_index.dtype != torch.int64:
        raise ValueError(
            f"'edge_index' has shape {tuple(edge_index.shape)} and type {edge_index.dtype}; expected (2, edges) and "
            "int64: sources in row 0, targets in row 1."
        )


def row_normalise(x: Tensor) -> Tensor:
    """Divide each row by its sum; a row whose sum is 0 becomes 0, never NaN.

    Shapes:
        x: (n, f) float; returns: (n, f)
    """
    total = x.sum(-1, keepdim=True)
    return x * torch.where(total == 0, 0.0, 1.0 / torch.where(total == 0, 1.0, total))


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout that costs a sixth of torch's on a CPU; for wide inputs that need no gradient.

    torch draws one Bernoulli variable at a time there. Here every 64-bit draw decides four entries, so that ``p`` is
    rounded to a multiple of 2^-16 (the scale 1 / (1 - p) uses the rounded value: the expectation is exact).

    Shapes:
        x: any, float; returns: the same
    """
    if not training or p == 0.0:
        return x
    if tracing(x) or x.device.type != "cpu" or x.requires_grad or not 0.0 < p < 1.0:
        return F.dropout(x, p, True)
    threshold = min(round(p * 2**16), 2**16 - 1)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = (draws.view(torch.int16)[: x.numel()] >= threshold - 2**15).view(x.shape)
    return (x * kept).mul_(2**16 / (2**16 - threshold))


class Sparse:
    """A constant sparse matrix beside its transpose: torch would make that anew in every backward pass.

    A symmetric matrix is held once. Products keep the matrix's dtype, also under autocast: sparse ones know no
    bfloat16, going forward or backward.

    Args:
        rows, columns: (s) int64 places; values of the same place are added up.
        values: (s) float.
        shape: of the matrix.
    """

    def __init__(self, rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]):
        whole = torch.sparse_coo_tensor(torch.stack((rows, columns)), values, shape, check_invariants=False).coalesce()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
            self.back = whole.t().coalesce().to_sparse_csr()
            self.there = whole.to_sparse_csr()
        parts = zip(_parts(self.there), _parts(self.back), strict=True)
        if shape[0] == shape[1] and all(torch.equal(*pair) for pair in parts):
            self.back = self.there
        self.shape = shape

    def t(self) -> "Sparse":
        """The transpose, of the same tensors."""
        turned = object.__new__(Sparse)
        turned.there, turned.back, turned.shape = self.back, self.there, self.shape[::-1]
        return turned

    def __matmul__(self, x: Tensor) -> Tensor:
        """Shapes: x (columns, h) float; returns (rows, h), in the dtype of the values."""
        return _Product.apply(x.to(self.there.dtype), self.there, self.back)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.there, ctx.back = there, back
        if not torch.is_autocast_enabled(x.device.type):
            return there @ x.contiguous()
        with torch.autocast(x.device.type, enabled=False):
            return there @ x.contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Product.apply(gradient, ctx.back, ctx.there), None, None


class Adjacency:
    """D^-1/2 (A + I) D^-1/2 of one graph, ready to multiply.

    Self-loops in ``edge_index`` do not count: every node gets exactly one of weight 1, so that an isolated node keeps
    its own features. An edge listed twice counts twice (the data modules list each once). D is the in-degree.

    Args:
        edge_index: (2, e) int64.
        nodes: n.
        dtype: of the weights.
    Raises:
        ValueError: if ``edge_index`` names a node that does not exist.
    """

    def __init__(self, edge_index: Tensor, nodes: int, dtype: torch.dtype = torch.float32):
        if not tracing(edge_index) and edge_index.numel():
            low, high = (int(v) for v in torch.aminmax(edge_index))
            if low < 0 or high >= nodes:
                raise ValueError(f"'edge_index' names node {low if low < 0 else high}; nodes are 0 to {nodes - 1}.")
        loops = torch.arange(nodes, device=edge_index.device)
        self.edge_index = edge_index
        source, target = torch.cat((edge_index, loops.expand(2, -1)), dim=1)
        weight = torch.cat(((edge_index[0] != edge_index[1]).to(dtype), torch.ones_like(loops, dtype=dtype)))
        scale = torch.zeros(nodes, dtype=dtype, device=weight.device).index_add(0, target, weight).rsqrt()
        self.source, self.target, self.nodes = source, target, nodes
        self.weight = scale[source] * weight * scale[target]  # (e + n)
        self._sparse: Sparse | None = None

    def __matmul__(self, x: Tensor) -> Tensor:
        """Shapes: x (n, h) float; returns (n, h), in the dtype of the weights."""
        return self._times(x)

    def back(self, x: Tensor) -> Tensor:
        """The transpose's product: against the edges. Shapes: x (n, h) float; returns (n, h)."""
        return self._times(x, transposed=True)

    def _times(self, x: Tensor, transposed: bool = False) -> Tensor:
        x = x.to(self.weight.dtype)
        # dense operations only: exportable, shapes are enough for them, and devices without sparse rows know them
        if tracing(x) or x.device.type not in ("cpu", "cuda"):
            source, target = (self.target, self.source) if transposed else (self.source, self.target)
            return torch.zeros_like(x).index_add(0, target, x[source] * self.weight[:, None])
        if self._sparse is None:
            with torch.inference_mode(False):  # an inference tensor could not be used by a later training step
                self._sparse = Sparse(self.target, self.source, self.weight, (self.nodes, self.nodes))
        return (self._sparse.t() if transposed else self._sparse) @ x

    def within(self, targets: Tensor, hops: int) -> tuple["Adjacency", Tensor, Tensor]:
        """The part that decides the output of ``hops`` convolutions at ``targets``.

        Returns:
            the adjacency among the kept nodes (weights as in the whole graph), the kept nodes (indices into the whole
            graph), and where the targets are among them.
        """
        kept = torch.zeros(self.nodes, dtype=torch.bool, device=targets.device)
        kept[targets] = True
        for _ in range(hops):
            kept[self.source[kept[self.target]]] = True
        nodes = kept.nonzero().flatten()
        place = torch.zeros(self.nodes, dtype=torch.int64, device=targets.device)
        place[nodes] = torch.arange(len(nodes), device=targets.device)
        inside = kept[self.source] & kept[self.target]
        part = object.__new__(Adjacency)
        part.edge_index = place[self.edge_index[:, kept[self.edge_index].all(0)]]
        part.source, part.target = place[self.source[inside]], place[self.target[inside]]
        part.weight, part.nodes, part._sparse = self.weight[inside], len(nodes), None
        return part, nodes, place[targets]


def _parts(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return matrix.crow_indices(), matrix.col_indices(), matrix.values()


class SparseRows:
    """A mostly zero feature matrix as its non-zero entries: ``drop`` and ``linear`` cost what those entries cost.

    Shapes:
        x: (n, f) float, dense.
    """

    def __init__(self, x: Tensor):
        rows, self.indices = x.nonzero(as_tuple=True)
        self.values = x[rows, self.indices]  # (s)
        counts = torch.bincount(rows, minlength=x.shape[0])
        self.offsets = counts.cumsum(0) - counts  # (n): where each row begins
        self.shape, self.device = x.shape, x.device

    def drop(self, p: float, training: bool) -> "SparseRows":
        """Input dropout: a dropped zero is a zero, so only the stored entries draw."""
        if not training or p == 0.0:
            return self
        dropped = object.__new__(SparseRows)
        dropped.__dict__.update(self.__dict__, values=F.dropout(self.values, p, True))
        return dropped

    def dense(self) -> Tensor:
        """The whole matrix again, (n, f)."""
        counts = torch.diff(self.offsets, append=self.offsets.new_tensor([len(self.values)]))
        rows = torch.repeat_interleave(torch.arange(self.shape[0], device=self.device), counts)
        return self.values.new_zeros(self.shape).index_put((rows, self.indices), self.values)

    def linear(self, weight: Tensor) -> Tensor:
        """Shapes: weight (f, h); returns x @ weight, (n, h)."""
        return F.embedding_bag(
            self.indices, weight, self.offsets, mode="sum", per_sample_weights=self.values.to(weight.dtype)
        )


def as_features(x: Tensor) -> Tensor | SparseRows:
    """``x`` itself, or `SparseRows` where that pays: on a CPU and at most a tenth non-zero."""
    if tracing(x) or x.device.type != "cpu" or int(x.count_nonzero()) > 0.1 * x.numel():
        return x
    return SparseRows(x)


def drop(x: Tensor | SparseRows, p: float, training: bool) -> Tensor | SparseRows:
    """Input dropout of dense or sparse features."""
    return x.drop(p, training) if isinstance(x, SparseRows) else dropout(x, p, training)


def linear(x: Tensor | SparseRows, weight: Tensor) -> Tensor:
    """Shapes: x (n, f), weight (f, h); returns (n, h)."""
    return x.linear(weight) if isinstance(x, SparseRows) else x @ weight


class GraphLinear(nn.Module):
    """x W and b of a graph convolution  A (x W) + b  (Kipf and Welling, arXiv:1609.02907, Eq. 2).

    The product with A is the caller's, so that several branches over one graph share a single one.

    Args:
        inputs, outputs: widths.
        shifted_init: draw weights and bias from a normal distribution of mean -1/sqrt(outputs) and deviation
            1/sqrt(outputs) instead of Glorot's uniform and zero.
    Shapes:
        x: (n, inputs), dense or `SparseRows`; returns: (n, outputs), without the bias
    """

    def __init__(self, inputs: int, outputs: int, shifted_init: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        if shifted_init:
            deviation = 1.0 / math.sqrt(outputs)
            nn.init.normal_(self.weight, -deviation, deviation)
            nn.init.normal_(self.bias, -deviation, deviation)
        else:
            nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor | SparseRows) -> Tensor:
        return linear(x, self.weight)


class Remember:
    """Keeps the last result of a function: what one graph needs is made once, not in every epoch.

    The same objects, unchanged since, give the kept result; anything else makes it anew. Values that are looked at
    only symbolically (`tracing`) are never kept. It is no part of a state dict, a copy or a pickle.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._value: Any = None

    def __call__(self, make: Callable[..., Any], *arguments: Any) -> Any:
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        if any(tracing(t) for t in tensors):
            return make(*arguments)
        key = tuple((a, a._version if isinstance(a, Tensor) and not a.is_inference() else 0) for a in arguments)
        if len(key) != len(self._key) or not all(map(_same, key, self._key)):
            # An inference tensor could not be used by a later training step.
            with torch.inference_mode(False), torch.no_grad():
                plain = (a.clone() if isinstance(a, Tensor) and a.is_inference() else a for a in arguments)
                self._value = make(*plain)
            self._key = key
        return self._value

    def knows(self, *arguments: Any) -> bool:
        """True if the kept result is that of arguments which begin with these very objects."""
        return len(self._key) >= len(arguments) and all(a is b for a, (b, _) in zip(arguments, self._key, strict=False))

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Remember, ()


def _same(a: tuple[Any, int], b: tuple[Any, int]) -> bool:
    by_value = isinstance(a[0], str | int | float | bool | torch.device)
    return (a[0] == b[0] if by_value else a[0] is b[0]) and a[1] == b[1]


def torch_geometric_nn() -> Any:
    """The module ``torch_geometric.nn``.

    Raises:
        ImportError: naming the extra to install.
    """
    try:
        import torch_geometric.nn as layers
    except ImportError as error:
        raise ImportError("This backbone needs torch_geometric: pip install 'paper-zoo[graph]'.") from error
    return layers
