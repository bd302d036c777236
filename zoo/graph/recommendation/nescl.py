"""NESCL: collaborative filtering where a node's collaborative neighbours are positives of a contrastive loss.

Paper: Sun, Wu, Zhang, Chen, Wang, "Neighborhood-Enhanced Supervised Contrastive Learning for Collaborative Filtering",
IEEE TKDE 2023, arXiv:2402.11523. Code by the authors: https://github.com/PeiJieSun/NESCL (there called SUPCCL), MIT.

In: users, items and who interacted with what. Out: a score for every (user, item), or each user's best k unseen items.

    A_hat = D^-1/2 A D^-1/2,   h^(l+1) = A_hat h^(l),   h = mean over layers,   score(u, i) = <h_u, h_i>
    loss = BPR(u, i, j) + regulariser * L2(u, i, j) + weight * contrast(h', h''),   h', h'' from two thinned graphs

The baselines are the same file: ``positives=["self"]`` is SGL (Wu et al., SIGIR 2021), ``positives=[]`` LightGCN
(He et al., SIGIR 2020). The defaults are the paper's for Gowalla; those for the other two sets are variants.

Departs from the authors' code: views are drawn anew each step instead of from 300 stored sub-graphs (``pool_size=300``
restores the pool, as 300 seeds instead of 300 graphs); a node without neighbours, on which their sampler fails, is its
own neighbour; equal similarities are ordered by index; -log(1e-10 + sigmoid(x)) is a true log-sigmoid.

Index legend: m users, n items, v = m + n nodes (users first), e interactions, k neighbours, d channels, b batch,
w graphs propagated side by side (the whole graph, and two views).
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.core import ZooError, unwrap
from zoo.graph.recommendation.recommender import Interactions, Recommender, identity, spans

# ---- the graph -------------------------------------------------------------------------------------------------------


class InteractionGraph(Interactions):
    """The bipartite graph of the training interactions, and each node's most similar nodes of its own kind.

    Stored once, as rows of a symmetric adjacency in CSR: row u lists the items of user u (as m + item), row m + i the
    users of item i. A thinned graph has the same rows with weights 0 and 1, so that no view ever sorts an edge list.

    Args:
        users, items: m and n.
        interactions: e, the number of distinct (user, item) pairs.
        neighbours: k, how many similar users (items) are kept for a user (item).
    Shapes:
        interactions: (2, e) users and items, sorted; neighbours, similarity: (v, k), the first ``count`` of a row count
        rows: (v + 1,); columns, edges: (2e,), ``edges`` says which interaction an entry is
    """

    neighbours: Tensor
    similarity: Tensor
    count: Tensor
    rows: Tensor
    columns: Tensor
    edges: Tensor

    def __init__(self, users: int, items: int, interactions: int, neighbours: int):
        super().__init__(users, items, interactions)
        self.size = users + items
        v, e = self.size, interactions
        self.register_buffer("neighbours", torch.arange(v, dtype=torch.int32)[:, None].repeat(1, neighbours))
        self.register_buffer("similarity", torch.zeros(v, neighbours))
        self.register_buffer("count", torch.ones(v, dtype=torch.int32))
        self.register_buffer("rows", torch.zeros(v + 1, dtype=torch.int32), persistent=False)
        self.register_buffer("columns", torch.zeros(2 * e, dtype=torch.int32), persistent=False)
        self.register_buffer("edges", torch.zeros(2 * e, dtype=torch.int32), persistent=False)

    def set(self, interactions: Tensor) -> Tensor:
        """As for `Interactions`; also finds the neighbours."""
        pairs = super().set(interactions)
        device = pairs.device
        k = self.neighbours.shape[1]
        for offset, size, others in ((0, self.users, self.items), (self.users, self.items, self.users)):
            near, value = most_similar(pairs.flip(0) if offset else pairs, size, others, k)
            part = slice(offset, offset + size)
            count = (value > 0).sum(1)
            alone = torch.arange(size, device=device)
            empty = count == 0  # nobody shares an item with this one: it is its own neighbour
            near = torch.where(value > 0, near, alone[:, None])
            value[empty, 0] = 1.0
            self.neighbours[part] = (near + offset).int()
            self.similarity[part] = value
            self.count[part] = count.clamp(min=1).int()
        return pairs

    def _index(self) -> None:
        """Derive the CSR rows from the interactions (also after loading)."""
        super()._index()
        if not self.ready or self.interactions.is_meta:
            return
        user, item = self.interactions
        by_item = torch.argsort(item, stable=True)
        degree = torch.cat([torch.bincount(user, minlength=self.users), torch.bincount(item, minlength=self.items)])
        self.rows[1:] = degree.cumsum(0).int()
        self.columns.copy_(torch.cat([item + self.users, user[by_item]]))
        self.edges.copy_(torch.cat([torch.arange(len(by_item), device=by_item.device), by_item]))

    def multiply(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """A x, where ``keep`` weights the interactions.

        On a CPU `embedding_bag` is several times faster than any sparse matrix of torch's; on CUDA cuSPARSE balances
        the few very long rows better.

        Shapes:
            x: (v, d); keep: (e,) float or None; returns: (v, d)
        """
        if x.is_meta or torch.compiler.is_exporting():
            source = torch.cat([self.interactions[1] + self.users, self.interactions[0]]).long()
            target = torch.cat([self.interactions[0], self.interactions[1] + self.users]).long()
            rows = x.index_select(0, source)
            rows = rows if keep is None else rows * keep.repeat(2)[:, None]
            return torch.zeros_like(x).index_add(0, target, rows)
        weights = None if keep is None else keep.index_select(0, self.edges)
        if x.device.type == "cpu":
            return F.embedding_bag(self.columns, x, self.rows[:-1], mode="sum", per_sample_weights=weights)
        values = torch.ones(len(self.columns), dtype=x.dtype, device=x.device) if weights is None else weights
        return _csr(self.rows, self.columns, values, (self.size, self.size)) @ x

    def degree(self) -> Tensor:
        """Number of neighbours of each node, (v,) float."""
        if self.interactions.is_meta or torch.compiler.is_exporting():
            return self.multiply(torch.ones(self.size, 1, device=self.rows.device))[:, 0]
        return self.rows.diff().float()


def most_similar(pairs: Tensor, size: int, others: int, k: int, block: int = 2**22) -> tuple[Tensor, Tensor]:
    """The k most similar rows of each row of a binary matrix, by s_ij = |N_i & N_j| / (sqrt|N_i| sqrt|N_j| + 1e-6).

    Rows that share a column come from a sparse product, a block of rows at a time. Equal similarities are ordered by
    index.

    Args:
        pairs: (2, e) row and column of each one, distinct.
        size, others: number of rows and columns.
        block: most entries of the dense block that the best are picked from (2^22: 16 MiB).
    Shapes:
        returns: (size, k) int64 rows, best first; (size, k) float32 similarities, 0 where fewer than k share a column
    """
    device = pairs.device
    pairs = pairs.long().cpu()  # a matter of seconds, once, and equal on every machine
    row, column = pairs[:, pairs[0].argsort(stable=True)]
    by_column = column.argsort(stable=True)
    degree = torch.bincount(row, minlength=size)
    start = F.pad(degree.cumsum(0), (1, 0))
    head = F.pad(torch.bincount(column, minlength=others).cumsum(0), (1, 0))
    root = degree.float().sqrt()
    transposed = _csr(head, row[by_column], torch.ones(len(row)), (others, size))
    step = min(size, max(1, block // size))
    board = torch.zeros(step, size)
    index, value = torch.zeros(size, k, dtype=torch.int64), torch.zeros(size, k)
    kept = min(k, size)
    for low in range(0, size, step):
        high = min(low + step, size)
        a, b = int(start[low]), int(start[high])
        left = _csr(start[low : high + 1] - a, column[a:b], torch.ones(b - a), (high - low, others))
        shared = left @ transposed
        at = torch.arange(high - low).repeat_interleave(shared.crow_indices().diff())
        other = shared.col_indices()
        score = shared.values() / (root[at + low] * root[other] + 1e-6)
        score[other == at + low] = 0
        board[at, other] = score
        lines = board[: high - low]
        for place in range(kept):  # for a few places cheaper than topk, and of equal ones the first is taken
            best, where = lines.max(1)
            index[low:high, place], value[low:high, place] = where, best
            lines.scatter_(1, where[:, None], 0)
        board[at, other] = 0
    return index.to(device), value.to(device)


@functools.cache
def _silence() -> None:
    """Have torch say once, unheard, that CSR matrices are in beta; a filter at every use would upset other warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index = torch.zeros(2, dtype=torch.int64)
        torch.sparse_csr_tensor(index, index[:0], torch.zeros(0), (1, 1), check_invariants=False)


def _csr(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    _silence()
    return torch.sparse_csr_tensor(rows, columns, values, shape, check_invariants=False)


def _exact(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """No lower precision by autocast in here."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


# ---- views and propagation -------------------------------------------------------------------------------------------


def drop(size: int, ratio: float, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A mask of ones with exactly ``int(size * ratio)`` zeros at random places, (size,) float."""
    order = torch.randperm(size, device=device, generator=generator)
    return torch.ones(size, device=device).index_fill_(0, order[: int(size * ratio)], 0.0)


class View:
    """One graph: its symmetric normalisation and which interactions it keeps. Immutable.

        A_view = S (A * keep) S,   S = diag(scale),   scale_i = 1 / sqrt(degree_i of the view), 0 for a dropped node

    so that dropping nodes is a matter of ``scale`` alone: all such views share the unweighted A.
    """

    def __init__(self, graph: InteractionGraph, node: Tensor | None = None, keep: Tensor | None = None):
        if node is None and keep is None:
            degree = graph.degree()
        else:
            ones = torch.ones(graph.size, device=graph.rows.device) if node is None else node
            degree = graph.multiply(ones[:, None], keep)[:, 0] * ones
        self.scale = torch.where(degree > 0, degree.clamp(min=1).rsqrt(), 0.0)
        self.keep = keep

    @classmethod
    def thinned(
        cls, graph: InteractionGraph, how: str, ratio: float, generator: torch.Generator | None = None
    ) -> "View":
        """Without a share of users and items (``"node"``) or of interactions (``"edge"``, ``"walk"``)."""
        device = graph.rows.device
        if how == "node":
            parts = [drop(size, ratio, device, generator) for size in (graph.users, graph.items)]
            return cls(graph, node=torch.cat(parts))
        e = graph.interactions.shape[1]
        order = torch.randperm(e, device=device, generator=generator)
        keep = torch.zeros(e, device=device).index_fill_(0, order[: int(e * (1 - ratio))], 1.0)
        return cls(graph, keep=keep)


def propagate(graph: InteractionGraph, views: list[list[View]], x: Tensor, initial: bool = False) -> Tensor:
    """Mean over layers of what each layer makes of ``x``, for several graphs at once (linear, no weights).

    Args:
        views: for each layer the w graphs.
        initial: count x itself as a layer.
    Shapes:
        x: (v, d) float32; returns: (v, w * d), the graphs side by side
    """
    if x.is_meta or torch.compiler.is_exporting():
        return _Propagate.run(graph, views, x, initial)
    return _Propagate.apply(x, graph, views, initial)


class _Propagate(torch.autograd.Function):
    """P = (sum over l of A_l ... A_1) / L. Every A_l is symmetric: P^T needs no transposed matrix, no saved layer."""

    @staticmethod
    def layer(graph: InteractionGraph, views: list[View], scale: Tensor, x: Tensor) -> Tensor:
        """(v, w, d) -> (v, w, d): every graph's own A_view."""
        x = x * scale
        if all(view.keep is None for view in views):
            x = graph.multiply(x.flatten(1)).view_as(x)
        else:
            x = torch.stack([graph.multiply(x[:, i].contiguous(), view.keep) for i, view in enumerate(views)], dim=1)
        return x * scale

    @staticmethod
    def scales(views: list[list[View]]) -> list[Tensor]:
        made: dict[int, Tensor] = {}
        for layer in views:
            if id(layer) not in made:
                made[id(layer)] = torch.stack([view.scale for view in layer], dim=1)[:, :, None]
        return [made[id(layer)] for layer in views]

    @staticmethod
    def run(graph: InteractionGraph, views: list[list[View]], x: Tensor, initial: bool) -> Tensor:
        first = x[:, None].expand(-1, len(views[0]), -1)
        current, total = first, None
        for layer, scale in zip(views, _Propagate.scales(views), strict=True):
            current = _Propagate.layer(graph, layer, scale, current)
            total = current if total is None else total + current
        total = total + first if initial else total
        return (total / (len(views) + initial)).flatten(1)

    @staticmethod
    def forward(ctx: Any, x: Tensor, graph: InteractionGraph, views: list[list[View]], initial: bool) -> Tensor:
        ctx.graph, ctx.views, ctx.initial, ctx.dtype = graph, views, initial, x.dtype
        with _exact(x):  # sums over a thousand neighbours want float32
            return _Propagate.run(graph, views, x.float(), initial)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        views = ctx.views
        g = gradient.float().reshape(len(gradient), len(views[0]), -1)
        h = None
        for layer, scale in zip(reversed(views), reversed(_Propagate.scales(views)), strict=True):
            h = _Propagate.layer(ctx.graph, layer, scale, g if h is None else g + h)
        h = h + g if ctx.initial else h
        return (h.sum(1) / (len(views) + ctx.initial)).to(ctx.dtype), None, None, None


# ---- losses ----------------------------------------------------------------------------------------------------------


class _RowLogSumExp(torch.autograd.Function):
    """log sum_j exp(<q_i, k_j>), in blocks of rows. The (rows, columns) matrix is never kept, but made again backward.

    ``bound`` is a number that no <q_i, k_j> exceeds. Where it is small enough, nothing underflows once it is taken off
    and the pass that looks for each row's maximum is saved.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, bound: float) -> Tensor:
        # CPU: 8 MiB, a block that stays in the cache is twice as fast. Elsewhere: 128 MiB, few launches.
        ctx.rows = max(1, (2**21 if q.device.type == "cpu" else 2**25) // len(k))
        parts = [q[part] for part in spans(len(q), ctx.rows)]
        if bound <= 30:  # exp(-60) of a sum's largest term is still a float32 like any other
            bounds = [q.new_full((1, 1), -bound).expand(len(p), len(k)) for p in parts]
            result = torch.cat([torch.addmm(b, p, k.t()).exp_().sum(1) for b, p in zip(bounds, parts, strict=True)])
            result = result.log_().add_(bound)
        else:
            result = torch.cat([torch.logsumexp(p @ k.t(), dim=1) for p in parts])
        ctx.save_for_backward(q, k, result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, result = ctx.saved_tensors
        dq, dk = torch.empty_like(q), torch.zeros_like(k)
        for part in spans(len(q), ctx.rows):
            weight = torch.addmm(-result[part, None], q[part], k.t()).exp_().mul_(gradient[part, None])
            dq[part] = weight @ k
            dk.addmm_(weight.t(), q[part])
        return dq, dk, None


def contrastive_loss(
    view1: Tensor,
    view2: Tensor,
    near1: Tensor | None,
    near2: Tensor | None,
    positives: Iterable[str] = ("self", "interacted", "neighbour"),
    temperature: float = 0.1,
    variant: str = "mean_then_log",
    anchor_first: bool = False,
) -> Tensor:
    """The supervised contrastive loss; anchors are the batch's users and items, duplicates kept.

        s_ip = exp(cos(h'_p, h''_i) / tau),   Z_p = sum over batch nodes b of exp(cos(h'_p, h''_b) / tau)
        per_positive:   - mean over i and p of log(s_ip / Z_p)
        mean_then_log:  - mean over i of log mean over p of (s_ip / Z_p)

    ``per_positive`` is the code's ``positive_cl_type`` 1, ``mean_then_log`` its 2. With ``anchor_first`` the anchor is
    in view 1, its positives and Z_i in view 2 (as in SupCon and in the paper's formula; the code's ``supcon_flag``).

    Args:
        view1, view2: h' and h'' of the batch: first its users, then its items, pair by pair.
        near1, near2: h' and h'' of the neighbours drawn for these anchors (only the one that is a positive is used).
        positives: which of itself, the other end of its pair, and the drawn neighbour are an anchor's positives.
    Shapes:
        view1, view2, near1, near2: (2b, d); returns: ()
    Raises:
        ValueError: for an unknown positive or variant, a temperature <= 0, or a missing neighbour.
    """
    positives = list(positives)
    _check_contrast(positives, temperature, variant)
    # what the query (in view 1) and the other side of a pair are, by orientation
    near = near2 if anchor_first else near1
    if "neighbour" in positives and near is None:
        raise ValueError("positives hold 'neighbour', but no neighbours came: pass near1 (near2 with anchor_first).")
    query = F.normalize(view1, dim=1) / temperature
    key = F.normalize(view2, dim=1)
    half = len(query) // 2

    def swap(x: Tensor) -> Tensor:
        """Each node's partner in its pair: users <-> items."""
        return torch.cat([x[half:], x[:half]])

    rows = query
    if "neighbour" in positives and not anchor_first:
        rows = torch.cat([query, F.normalize(near, dim=1) / temperature])  # type: ignore[arg-type]
    with _exact(rows):  # 1 / tau magnifies every rounding
        normaliser = _RowLogSumExp.apply(rows.float(), key.float(), 1 / temperature)
    own, others = normaliser[: 2 * half], normaliser[2 * half :]
    terms = []
    for name in positives:
        if anchor_first:
            other = key if name == "self" else swap(key) if name == "interacted" else F.normalize(near, dim=1)
            terms.append((query * other).sum(1) - own)
        elif name == "neighbour":
            terms.append((rows[2 * half :] * key).sum(1) - others)
        else:
            positive, z = (query, own) if name == "self" else (swap(query), swap(own))
            terms.append((positive * key).sum(1) - z)
    logs = torch.stack(terms, dim=1)
    if variant == "per_positive":
        return -logs.mean()
    return -(torch.logsumexp(logs, dim=1) - math.log(len(terms))).mean()


POSITIVES = ("self", "interacted", "neighbour")
VARIANTS = ("mean_then_log", "per_positive")
AUGMENTATIONS = ("node", "edge", "walk")
SAMPLING = ("uniform", "similarity")


def _check_contrast(positives: list[str], temperature: float, variant: str) -> None:
    unknown = [p for p in positives if p not in POSITIVES]
    if unknown or len(set(positives)) != len(positives) or not positives:
        raise ValueError(f"positives are {positives}; expected some of {', '.join(POSITIVES)}, each once.")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0 (the paper's is 0.1).")
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; expected {' or '.join(VARIANTS)}.")


def bpr_loss(user: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """- mean log sigmoid(<u, i> - <u, j>) (Rendle et al., 2009). Shapes: (b, d) each; returns ()."""
    return -F.logsigmoid((user * (positive - negative)).sum(1)).mean()


def norm_penalty(*embeddings: Tensor) -> Tensor:
    """Sum of the (unsquared) Frobenius norms, divided by the batch size, as in RecBole. Shapes: (b, d) each; ()."""
    return torch.stack([e.norm() for e in embeddings]).sum() / len(embeddings[0])


# ---- the method ------------------------------------------------------------------------------------------------------


class NESCL(Recommender):
    """Top-N recommendation from implicit feedback: LightGCN with neighbours as positives of a contrastive loss.

    The interactions are part of the model (buffers), so a checkpoint can recommend by itself. With a Trainer they come
    from the DataModule (anything with ``interactions()``), else from the first batch's ``graph``, else call
    `set_graph`. With several processes, each contrasts the nodes of its own batch.

    Args:
        num_users, num_items: sizes of the two embedding tables.
        num_interactions: distinct (user, item) pairs in the training data.
        dim: channels of an embedding.
        layers: propagation steps.
        positives: an anchor's positives: ``"self"`` in the other view, ``"interacted"`` (the other end of the pair),
            ``"neighbour"`` (one of its most similar). Only ``self``: SGL. None of them: LightGCN.
        variant: ``"mean_then_log"`` or ``"per_positive"``, see `contrastive_loss`.
        anchor_first: the anchor in view 1 and its positives in view 2 (the code's ``supcon_flag``).
        augmentation: what a view lacks: ``"node"``, ``"edge"``, or edges drawn per layer, ``"walk"``.
        drop: share of nodes or edges that a view lacks, in [0, 1).
        pool_size: number of different views drawn from, as the authors do with 300; 0 draws new ones every step.
        temperature: of the contrast, tau.
        weight: of the contrast in the loss, lambda.
        neighbours: how many most similar nodes are candidates, k.
        neighbour_sampling: draw among them ``"uniform"``, or by ``"similarity"``.
        initial_embedding: whether the embeddings themselves count as a layer.
        bpr: whether the pairwise ranking loss is part of the loss (not for Amazon-Book).
        regulariser: of the norm penalty.
        authors_constant_regulariser: with ``bpr=False``, add the number ``regulariser`` instead of the penalty, as the
            authors' code does (it changes the loss's value, not its gradient).
        lr: Adam's learning rate.
        top_k: length of the ranked list that is evaluated and predicted.
        block: most users ranked at once; fewer where their scores (4 bytes an item) would take more than 64 MiB on a
            CPU, 256 MiB elsewhere.
    Shapes:
        user: (b,) int64; returns: (b, n) float scores
    Raises:
        ValueError: for a hyperparameter out of range.
    Example:
        >>> from zoo.graph import NESCL, ImplicitCFDataModule
        >>> data = ImplicitCFDataModule()
        >>> model = NESCL.from_variant("tiny").set_graph(data.interactions())
        >>> model.predict([0, 1])["item"].shape
        torch.Size([2, 20])
    """

    variants: ClassVar = {
        "tiny": {"num_users": 600, "num_items": 400, "num_interactions": 6600, "dim": 8, "layers": 2, "neighbours": 3},
        "yelp2018": {
            "num_users": 31668, "num_items": 38048, "num_interactions": 1237259, "layers": 2, "weight": 0.3,
            "neighbours": 15,
        },
        "amazon-book": {
            "num_users": 52643, "num_items": 91599, "num_interactions": 2380730, "layers": 2, "weight": 0.3,
            "augmentation": "edge", "variant": "per_positive", "initial_embedding": True, "bpr": False,
            "neighbour_sampling": "similarity",
        },
    }  # fmt: skip
    monitor, mode = "val/recall@20", "max"

    def __init__(
        self,
        num_users: int = 29858,
        num_items: int = 40981,
        num_interactions: int = 810128,
        dim: int = 64,
        layers: int = 3,
        positives: list[str] = ["self", "interacted", "neighbour"],  # noqa: B006  (JSON has no tuples; never changed)
        variant: str = "mean_then_log",
        anchor_first: bool = False,
        augmentation: str = "node",
        drop: float = 0.3,
        pool_size: int = 0,
        temperature: float = 0.1,
        weight: float = 0.1,
        neighbours: int = 5,
        neighbour_sampling: str = "uniform",
        initial_embedding: bool = False,
        bpr: bool = True,
        regulariser: float = 1e-4,
        authors_constant_regulariser: bool = False,
        lr: float = 1e-3,
        top_k: int = 20,
        block: int = 1024,
    ):
        super().__init__()
        self.save_hyperparameters()
        _check_contrast(list(positives) or ["self"], temperature, variant)
        for name, value, known in (
            ("augmentation", augmentation, AUGMENTATIONS),
            ("neighbour_sampling", neighbour_sampling, SAMPLING),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected {', '.join(known)}.")
        if not 0 <= drop < 1:
            raise ValueError(f"drop is {drop}; it must lie in [0, 1).")
        least = {"num_users": num_users, "num_items": num_items, "num_interactions": num_interactions, "dim": dim}
        least |= {"layers": layers, "neighbours": neighbours}
        for name, value in least.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if not bpr and not positives:
            raise ValueError("bpr=False and no positives: nothing is left to train on.")
        self.user_embedding = nn.Embedding(num_users, dim)
        self.item_embedding = nn.Embedding(num_items, dim)
        for table in (self.user_embedding, self.item_embedding):
            nn.init.xavier_uniform_(table.weight)
        graph = InteractionGraph(num_users, num_items, num_interactions, neighbours)
        self.build_ranking(graph, top_k, block)
        self._whole: tuple[Any, View] | None = None
        self._final: tuple[Any, Tensor] | None = None

    # ---- the graph ----------------------------------------------------------------------------------------------

    def set_graph(self, interactions: Tensor) -> Self:
        """Take the training interactions, (2, e) integers (users, items); find the neighbours. Returns self.

        Raises:
            ValueError: if they do not fit the model's sizes, repeat a pair, or leave a user out.
        """
        super().set_graph(interactions)
        self._whole = self._final = None
        return self

    def whole(self) -> View:
        """The whole graph as a view, made once."""
        if self.bipartite.rows.is_meta or torch.compiler.is_compiling():
            return View(self.bipartite)
        key = identity(self.bipartite.rows)
        if self._whole is None or self._whole[0] != key:
            self._whole = (key, View(self.bipartite))
        return self._whole[1]

    def views(self) -> list[list[View]]:
        """What one training step propagates through: for each layer the whole graph and, with positives, two views."""
        hp = self.hyperparameters
        if not hp["positives"]:
            return [[self.whole()]] * hp["layers"]
        if hp["augmentation"] == "walk":
            return [[self.whole(), self._view(), self._view()] for _ in range(hp["layers"])]
        return [[self.whole(), self._view(), self._view()]] * hp["layers"]

    def _view(self) -> View:
        hp = self.hyperparameters
        generator = None
        if hp["pool_size"]:
            # a stored sub-graph is a seed here; any two may meet (the authors' loop ends when all pairs are used up)
            which = int(torch.randint(hp["pool_size"], ()))
            generator = torch.Generator(self.bipartite.rows.device).manual_seed(which)
        return View.thinned(self.bipartite, hp["augmentation"], hp["drop"], generator)

    def neighbour(self, node: Tensor) -> Tensor:
        """One neighbour of each node, drawn among its k most similar. Shapes: (b,) node ids; returns (b,) node ids."""
        near = self.bipartite.neighbours.index_select(0, node)
        if self.hyperparameters["neighbour_sampling"] == "similarity":
            weight = self.bipartite.similarity.index_select(0, node)
            place = (weight / torch.empty_like(weight).exponential_()).argmax(1)  # exponential races: p ~ weight
        else:
            count = self.bipartite.count.index_select(0, node)
            place = (torch.rand(len(node), device=node.device) * count).long()
        return near.gather(1, place[:, None])[:, 0].long()

    # ---- forward ------------------------------------------------------------------------------------------------

    def table(self) -> Tensor:
        """All embeddings before propagation, (v, d): users, then items."""
        return torch.cat([self.user_embedding.weight, self.item_embedding.weight])

    def embeddings(self) -> Tensor:
        """All embeddings after propagation through the whole graph, (v, d)."""
        hp = self.hyperparameters
        return propagate(self.bipartite, [[self.whole()]] * hp["layers"], self.table(), hp["initial_embedding"])

    def forward(self, user: Tensor) -> Tensor:
        """Scores of all items for some users. Shapes: (b,) int64; returns (b, n)."""
        final = self.embeddings()
        return final.index_select(0, user) @ final[self.bipartite.users :].t()

    # ---- training -----------------------------------------------------------------------------------------------

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss and its parts: ``loss``, ``bpr``, ``penalty``, ``contrast``.

        Shapes:
            batch: user, item, negative (b,) int64: a positive pair, and an item that the user has not
        """
        hp = self.hyperparameters
        self.take_graph(batch)
        self._final = None
        user, item, negative = batch["user"], batch["item"], batch["negative"]
        m, size, d = self.bipartite.users, len(user), hp["dim"]
        anchor = torch.cat([user, item + m])
        nodes = [anchor, negative + m]
        if "neighbour" in hp["positives"]:
            nodes.append(self.neighbour(anchor))
        table = self.table()
        final = propagate(self.bipartite, self.views(), table, hp["initial_embedding"])
        rows = final.index_select(0, torch.cat(nodes))  # one gather for everything the losses look at
        ego = table.index_select(0, torch.cat(nodes[:2]))
        parts = {
            "bpr": bpr_loss(rows[:size, :d], rows[size : 2 * size, :d], rows[2 * size : 3 * size, :d]),
            "penalty": norm_penalty(*ego.split(size)),
        }
        constant = hp["authors_constant_regulariser"] and not hp["bpr"]
        penalty = hp["regulariser"] * (1.0 if constant else parts["penalty"])
        parts["loss"] = parts["bpr"] + penalty if hp["bpr"] else penalty
        if hp["positives"]:
            batch_rows, near = rows[: 2 * size], rows[3 * size :]
            parts["contrast"] = contrastive_loss(
                batch_rows[:, d : 2 * d],
                batch_rows[:, 2 * d :],
                near[:, d : 2 * d],
                near[:, 2 * d :],
                hp["positives"],
                hp["temperature"],
                hp["variant"],
                hp["anchor_first"],
            )
            parts["loss"] = parts["loss"] + hp["weight"] * parts["contrast"]
        return parts

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        parts = self.losses(batch)
        for name in ("loss", "bpr", "contrast"):
            if name in parts:
                self.log(f"train/{name}", parts[name].detach(), batch_size=len(batch["user"]))
        return parts["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameter_groups(), lr=self.hyperparameters["lr"])

    # ---- ranking ------------------------------------------------------------------------------------------------

    def scorer(self) -> Callable[[Tensor, Tensor], None]:
        final = self._cached().float()
        items = final[self.bipartite.users :].t()

        def write(user: Tensor, scores: Tensor) -> None:
            torch.mm(final.index_select(0, user), items, out=scores)

        return write

    def _cached(self) -> Tensor:
        """`embeddings`, kept until a parameter changes."""
        key = identity(self.user_embedding.weight, self.item_embedding.weight, self.bipartite.rows)
        if self._final is None or self._final[0] != key:
            self._final = (key, self.embeddings().detach())
        return self._final[1]

    def on_test_epoch_end(self) -> None:
        self.log("test/neighbour_cosine", self.neighbour_cosine())

    @torch.no_grad()
    def neighbour_cosine(self) -> Tensor:
        """Mean cosine of a user with its most similar users: what the contrast with neighbours raises. Shapes: ()."""
        m = self.bipartite.users
        final = F.normalize(self._cached()[:m], dim=1)
        k = self.bipartite.neighbours.shape[1]
        near = self.bipartite.neighbours[:m].long()
        real = torch.arange(k, device=final.device) < self.bipartite.count[:m, None]
        real &= near != torch.arange(m, device=final.device)[:, None]
        cosines = torch.stack(
            [(final * final[self.bipartite.neighbours[:m, j].long()]).sum(1) for j in range(k)], dim=1
        )
        return (cosines * real).sum() / real.sum().clamp(min=1)

    # ---- authors' checkpoints -----------------------------------------------------------------------------------

    @classmethod
    def convert_state_dict(cls, content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """From RecBole's ``user_embedding.weight`` and ``item_embedding.weight``, whose row 0 is padding.

        RecBole does not save the interactions; put them beside its ``state_dict`` as ``interactions``, (2, e) integers
        in RecBole's own numbers (from 1).

        Raises:
            ZooError: if one of the three is missing.
        """
        pairs = content.get("interactions")
        tensors = unwrap({k: v for k, v in content.items() if k != "interactions"})
        users, items = tensors.get("user_embedding.weight"), tensors.get("item_embedding.weight")
        if users is None or items is None or not isinstance(pairs, Tensor):
            raise ZooError(
                "Expected user_embedding.weight, item_embedding.weight and 'interactions', a (2, e) tensor of the "
                "training pairs in RecBole's numbers (it does not save them itself: add it to the file). "
                f"Got {', '.join(map(str, content))}."
            )
        sizes = {
            "num_users": len(users) - 1,
            "num_items": len(items) - 1,
            "num_interactions": pairs.shape[1],
            "dim": users.shape[1],
        }
        model = cls(**sizes).set_graph(pairs - 1)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        state["user_embedding.weight"], state["item_embedding.weight"] = users[1:].clone(), items[1:].clone()
        return sizes, state
