"""LargeGT: graph transformers for large graphs, by local attention in a 4-hop field and a global codebook.

Paper: Vijay Prakash Dwivedi, Yozen Liu, Anh Tuan Luu, Xavier Bresson, Neil Shah, Tong Zhao, "Graph Transformers for
Large Graphs", arXiv:2312.11109, 2023. Code by the authors: https://github.com/snap-research/LargeGT, MIT.

In: for each node of a mini-batch a sequence of K nodes (itself, then K - 1 from its 1- and 2-hop neighbourhood), each
with its features and their averages over one and two hops, and a positional encoding. Out: class logits. Sampling over
two hops and averages over two more make a field of 4 hops, with no operation over more than 2 (Algorithm 1):

    tokens   x_j, (A x)_j, (A^2 x)_j of every node j in the sequence of i: 3 K tokens
    local    o = attention among the tokens;        out_local  = o_0 + sum_t softmax_t(w o_t) o_t,  t >= 1
    global   q = [W fc(x_i) | p_i], keys and values from B centroids:
                                                    out_global = softmax(q K^T / sqrt(h) + log count) V
    class    MLP([out_local | out_global])

The centroids are moving averages of the queries that fell to them (`Codebook`), count is how many nodes belong to each.

Reproduces the architecture and training of the authors' code. Departs from it: their codebook starts with random sums
over clusters of size 0, which throws a centroid that gets no query a hundred thousand lengths away for the first
thousand steps (``authors_codebook_start``); the gradient of the keys' weight uses the codebook as it stands after the
update that follows the forward pass (``authors_key_gradient``). A batch of one node fails there, and normalises by the
running statistics here. What softmax forgets is left out, because it never gets a gradient: the biases of keys, and the
part of the readout's score that sees token 0 alone; so are layers that are declared and never used. Nodes that are not
trained on keep the centroid drawn for them at the start, as theirs do: counts near N / B for most of a sparsely
labelled graph.

Index legend: b nodes of a batch, u distinct nodes of a batch's sequences, K nodes of a sequence, t kinds of token,
f features, h width, H heads, g width of a positional encoding, B centroids, N nodes of the graph, c classes.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.core import ZooError, ZooModule, check_finite, unwrap
from zoo.nn.graph import tracing

EPSILON = 1e-5
"""Of the codebook's normalisation and of the smoothing of its sizes."""
UNKNOWN = -1
"""A label that does not count."""


class BatchNorm(nn.BatchNorm1d):
    """Batch norm that takes the running statistics for a batch of one, which has no variance."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)


NORMS = {"batch": BatchNorm, "layer": nn.LayerNorm, "none": lambda width: nn.Identity()}


def full(x: Tensor) -> Any:
    """A context without autocast: sums over batches are too fine for half precision. (No autocast on "meta".)"""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


# ---- local module ----------------------------------------------------------------------------------------------------


class LocalAttention(nn.Module):
    """Attention among a node's tokens and their readout (Sec. 3.1); every head has the full width.

        y = LN(x),   x <- R x + O [softmax(q_k k_k^T / sqrt(h)) v_k]_k,   o = LN(x)
        out = o_0 + sum_t a_t o_t,   a = softmax_t(w o_t),  t >= 1

    Args:
        width, heads: h, H.
        dropout: rate after the attention's output and after the sum.
    """

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.p = heads, dropout
        self.embed = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.query, self.value = nn.Linear(width, heads * width), nn.Linear(width, heads * width)
        self.key = nn.Linear(width, heads * width, bias=False)  # a bias would shift all logits of a query alike
        self.output = nn.Linear(heads * width, heads * width)
        self.residual = nn.Linear(width, heads * width)
        self.output_norm = nn.LayerNorm(heads * width)
        self.score = nn.Linear(heads * width, 1, bias=False)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, 0.0, 0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def project(self, x: Tensor, last: nn.Linear) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values and residuals of single tokens.

        Two products with nothing in between are one: ``last`` and `embed`; and in the logits, heads being as wide as
        what they see, the products with queries' and keys' weights, <U y_i + b, W y_j> = <W^T (U y_i + b), y_j>: all
        heads have the same keys y.

        Args:
            last: the layer before.
        Shapes:
            x: (..., h); returns: (..., H h), (..., h), (..., H h), (..., H h)
        """
        weight = self.embed.weight @ last.weight
        x = F.linear(x, weight, self.embed.weight @ last.bias + self.embed.bias)
        y = self.norm(x)
        key = self.key.weight.unflatten(0, (self.heads, -1)).mT  # (H, h, h)
        weight = key @ self.query.weight.unflatten(0, (self.heads, -1))
        bias = key @ self.query.bias.unflatten(0, (self.heads, -1))[..., None]
        return F.linear(y, weight.flatten(0, 1), bias.flatten()), y, self.value(y), self.residual(x)

    def forward(self, x: Tensor, last: nn.Linear, spread: Callable[[Tensor], Tensor]) -> Tensor:
        """The tokens' readout.

        Args:
            last: the layer before (see `project`).
            spread: makes sequences (b, tokens, .) of what is there once for every node.
        Shapes:
            x: (..., h), what ``spread`` takes; returns: (b, H h)
        """
        parts = list(self.project(x, last))
        for i in range(len(parts)):
            parts[i] = spread(parts[i])  # one by one: the smaller form goes as the larger comes
        residual, v, k, q = (parts.pop() for _ in range(4))
        q, v = (m.unflatten(2, (self.heads, -1)).transpose(1, 2) for m in (q, v))
        k = k[:, None].expand(-1, self.heads, -1, -1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        del q, k, v
        x = residual + F.dropout(self.output(mixed), self.p, self.training)
        o = self.output_norm(F.dropout(x, self.p, self.training))
        target, rest = o[:, 0], o[:, 1:]
        weight = self.score(rest).softmax(1)  # (b, tokens - 1, 1)
        return target + (weight.transpose(1, 2) @ rest)[:, 0]


# ---- global module ---------------------------------------------------------------------------------------------------


class Codebook(nn.Module):
    """Centroids of all queries seen in training, as moving averages (Sec. 3.2; van den Oord et al., arXiv:1711.00937).

        z = (x - mean) / std over the batch,   c(x) = argmin_c |z - e_c|
        size <- 0.99 size + 0.01 counts,  smoothed (size + eps) / (n + B eps) n with n = sum size
        sum  <- 0.99 sum + 0.01 sum of z,      e = sum / size,      centroids = e std + mean, running

    In a distributed run, statistics, counts and sums are those of all ranks, and so are the assignments: every rank
    ends a step with the same codebook.

    Args:
        centroids, width: B, 2g.
        nodes: N.
        decay: of the averages.
        authors_start: sizes of 0 and sums that do not belong to them, as in the authors' code.
    """

    embedding: Tensor
    centroids: Tensor
    size: Tensor
    total: Tensor
    mean: Tensor
    variance: Tensor
    assigned: Tensor
    count: Tensor

    def __init__(self, centroids: int, width: int, nodes: int, decay: float = 0.99, authors_start: bool = False):
        super().__init__()
        self.decay = decay
        embedding = torch.randn(centroids, width)
        self.register_buffer("embedding", embedding)  # e, normalised
        self.register_buffer("centroids", torch.randn_like(embedding) if authors_start else embedding.clone())
        self.register_buffer("size", torch.zeros(centroids) if authors_start else torch.ones(centroids))
        self.register_buffer("total", torch.randn_like(embedding) if authors_start else embedding.clone())
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        # 32 bits: 16 would overflow beyond 32,768 centroids, and no process group moves them
        self.register_buffer("assigned", torch.randint(centroids, (nodes,), dtype=torch.int32))
        self.register_buffer("count", torch.zeros(centroids, dtype=torch.int64), persistent=False)
        self.recount()
        self.register_load_state_dict_post_hook(_recount)

    @torch.no_grad()
    def recount(self) -> None:
        """Count the nodes of each centroid anew, from ``assigned``."""
        self.count.zero_()
        for part in self.assigned.split(2**22):  # int64 copies of a part only
            self.count.index_add_(0, part.long(), torch.ones_like(part, dtype=torch.int64))

    @torch.no_grad()
    def update(self, x: Tensor, node: Tensor) -> None:
        """Take in a batch of queries.

        Shapes:
            x: (b, 2g) float; node: (b) int64, whose queries they are
        """
        with full(x):
            x = x.detach().to(self.embedding.dtype)
            z, nearest = self._nearest(x)
            counts = torch.zeros_like(self.size).index_add_(0, nearest, torch.ones_like(z[:, 0]))
            sums = torch.zeros_like(self.total).index_add_(0, nearest, z)
            _all_reduce(counts, sums)
            size = self.size * self.decay + (1 - self.decay) * counts
            n = size.sum()
            self.size.copy_((size + EPSILON) / (n + len(size) * EPSILON) * n)
            self.total.mul_(self.decay).add_(sums, alpha=1 - self.decay)
            self.embedding.copy_(self.total / self.size[:, None])
            self.centroids.copy_(self.embedding * (self.variance + EPSILON).sqrt() + self.mean)
        self._assign(*_gather(node, nearest))

    def _nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised queries and the centroid of each; moves the running statistics."""
        number = torch.tensor(len(x), dtype=x.dtype, device=x.device)
        mean = x.sum(0)
        _all_reduce(number, mean)
        mean = mean / number
        square = (x - mean).square().sum(0)
        _all_reduce(square)
        if len(x) == 1 and (x.is_meta or float(number) == 1.0):
            mean, variance = self.mean, self.variance  # one query has no variance
        else:
            variance = square / number
            self.mean.lerp_(mean, 0.1)
            self.variance.lerp_(square / (number - 1), 0.1)
        z = (x - mean) * (variance + EPSILON).rsqrt()
        distance = torch.addmm(self.embedding.square().sum(1), z, self.embedding.t(), alpha=-2)  # less |z|^2
        return z, distance.argmin(1)

    def _assign(self, node: Tensor, nearest: Tensor) -> None:
        """Note where nodes belong; a node that comes twice counts once, with its first query."""
        node, order = node.sort(stable=True)
        first = torch.ones_like(node, dtype=torch.bool)
        first[1:] = node[1:] != node[:-1]
        start = torch.where(first, torch.arange(len(node), device=node.device), 0).cummax(0).values
        new = nearest[order][start]
        weight = first.to(self.count.dtype)
        self.count.index_add_(0, self.assigned[node].long(), -weight).index_add_(0, new, weight)
        self.assigned[node] = new.to(self.assigned.dtype)


def _recount(codebook: Codebook, keys: Any) -> None:
    codebook.recount()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _all_reduce(*tensors: Tensor) -> None:
    """Sum each tensor over all ranks, in place."""
    if _distributed():
        for tensor in tensors:
            dist.all_reduce(tensor)


def _gather(*columns: Tensor) -> tuple[Tensor, ...]:
    """The rows of all ranks, in the order of ranks; a rank may have more than another. Shapes: (b) each."""
    if not _distributed():
        return columns
    rows = torch.stack(columns, 1)
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=rows.device)
    sizes[dist.get_rank()] = len(rows)
    dist.all_reduce(sizes)
    largest = int(sizes.max())
    padded = F.pad(rows, (0, 0, 0, largest - len(rows)))
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return tuple(torch.cat([part[:size] for part, size in zip(parts, sizes.tolist(), strict=True)]).unbind(1))


class GlobalAttention(nn.Module):
    """Attention from nodes to the centroids, which count for as many nodes as belong to them.

        out = softmax(q K^T / sqrt(h) + log count) V

    A centroid without nodes is masked: log 0. Some centroid always has nodes.

    Args:
        width, heads, pos_enc: h, H, g.
        dropout: rate of the attention.
    Shapes:
        query: (b, 2g); keys: (B, 2g), the centroids; values: (B, g), their first half; count: (B) int64
        returns: (b, H h)
    """

    def __init__(self, width: int, heads: int, pos_enc: int, dropout: float):
        super().__init__()
        self.heads, self.p = heads, dropout
        self.project = nn.Linear(width, pos_enc)
        self.query = nn.Linear(2 * pos_enc, heads * width)
        self.key = nn.Linear(2 * pos_enc, heads * width, bias=False)  # a bias would shift all logits of a query alike
        self.value = nn.Linear(pos_enc, heads * width)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, count: Tensor) -> Tensor:
        parts = self.query(query), self.key(keys), self.value(values)
        q, k, v = (m.unflatten(1, (self.heads, -1)).transpose(0, 1)[None] for m in parts)  # (1, H, ., h)
        mask = count.to(q.dtype).log().expand(1, 1, q.shape[2], -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.p if self.training else 0.0)
        return out[0].transpose(0, 1).flatten(1)


# ---- the method ------------------------------------------------------------------------------------------------------


class LargeGT(ZooModule):
    """Node classification on one graph of any size in mini-batches: local attention and a global codebook.

    Batch (a dict, or what a torch_geometric loader gives under these keys): "features" (u, t, f) float, of all nodes
    that occur in the batch's sequences: their own, and averages over one and two hops; "tokens" (b, K) int64, the
    sequences as rows of "features", the node itself first; "pos_enc" (b, g) float, but for ``conv_type="local"``;
    "node" (b) int64, the nodes' numbers in the graph (training); "y" (b) int64, -1 where unknown; "name", list[str].

    Logs "loss" and "accuracy". The codebook moves in training alone, in `forward`, as batch norm does.

    In several processes, the codebook keeps itself equal on all ranks: for a very large graph,
    ``DDPStrategy(broadcast_buffers=False)`` spares sending N assignments before every step. ``sync_batchnorm=True`` of
    the trainer serves the other norms.

    Args:
        in_features: f.
        num_classes: c.
        num_nodes: N, of the graph that is trained on; loading for another graph draws its assignments anew.
        conv_type: "full", or one half alone: "local", "global".
        width: h.
        global_dim: g, of the positional encodings.
        heads: H, each of width h.
        num_centroids: B.
        norm: "batch", "layer" or "none", in the layers before and after attention.
        dropout: rate in those layers.
        local_dropout: rate in the local module.
        attn_dropout: rate of the global attention.
        decay: of the codebook's moving averages.
        lr: learning rate (Adam).
        authors_codebook_start: the codebook of the authors' code at the start (see the module's docstring).
        authors_key_gradient: the gradient that their code computes for the weight of the global keys.
    Raises:
        ValueError: for an unknown choice, or sizes below 1.
    Example:
        >>> from zoo.graph import LargeGT, LargeGTTokenDataModule
        >>> import zoo
        >>> data = LargeGTTokenDataModule(tokens=10, pos_enc=8, walks=1, batch_size=256)
        >>> data.setup()
        >>> model = LargeGT.from_variant("tiny", **data.describe())
        >>> trainer = zoo.Trainer(max_epochs=1, enable_model_summary=False, enable_progress_bar=False)
        >>> trainer.fit(model, datamodule=data)
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {
            "in_features": 8,
            "num_classes": 8,
            "num_nodes": 2000,
            "width": 16,
            "global_dim": 8,
            "num_centroids": 32,
        },
        "snap_patents": {"in_features": 269, "num_classes": 5, "num_nodes": 2923922, "width": 128},
        "papers100m": {
            "in_features": 128,
            "num_classes": 172,
            "num_nodes": 111059956,
            "width": 512,
            "global_dim": 128,
        },
    }
    monitor, mode = "val/accuracy", "max"
    head = ("output", "codebook.assigned")

    def __init__(
        self,
        in_features: int = 100,
        num_classes: int = 47,
        num_nodes: int = 2449029,
        conv_type: str = "full",
        width: int = 256,
        global_dim: int = 64,
        heads: int = 2,
        num_centroids: int = 4096,
        norm: str = "batch",
        dropout: float = 0.5,
        local_dropout: float = 0.3,
        attn_dropout: float = 0.0,
        decay: float = 0.99,
        lr: float = 1e-3,
        authors_codebook_start: bool = False,
        authors_key_gradient: bool = False,
    ):
        super().__init__()
        self.save_hyperparameters()
        for name, value, choices in (
            ("conv_type", conv_type, ("full", "local", "global")),
            ("norm", norm, tuple(NORMS)),
        ):
            if value not in choices:
                raise ValueError(f"LargeGT: {name} is {value!r}; it must be one of {', '.join(choices)}.")
        for name in ("in_features", "num_classes", "num_nodes", "width", "global_dim", "heads", "num_centroids"):
            if self.hparams[name] < 1:
                raise ValueError(f"LargeGT: {name} is {self.hparams[name]}; it must be at least 1.")
        self.local = self.attend = self.codebook = None
        if conv_type != "global":
            self.token_input, self.token_last = nn.Linear(in_features, width), nn.Linear(width, width)
            self.local = LocalAttention(width, heads, local_dropout)
        if conv_type != "local":
            self.input, self.input_norm = nn.Linear(in_features, width), NORMS[norm](width)
            self.input_last = nn.Linear(width, width)
            self.attend = GlobalAttention(width, heads, global_dim, attn_dropout)
            self.codebook = Codebook(num_centroids, 2 * global_dim, num_nodes, decay, authors_codebook_start)
        both = heads * width * (2 if conv_type == "full" else 1)
        self.mix, self.mix_norm = nn.Linear(both, heads * width), NORMS[norm](heads * width)
        self.narrow, self.narrow_norm = nn.Linear(heads * width, width), NORMS[norm](width)
        self.output = nn.Linear(width, num_classes)

    def forward(
        self, features: Tensor, tokens: Tensor, pos_enc: Tensor | None = None, node: Tensor | None = None
    ) -> Tensor:
        """Logits.

        Args:
            node: numbers in the graph; in training the codebook takes these nodes in, without them it stays.
        Shapes:
            features: (u, t, f); tokens: (b, K) int64, into u; pos_enc: (b, g); node: (b) int64
            returns: (b, c)
        Raises:
            ValueError: for other shapes, fewer than 2 nodes a sequence, or numbers that name nothing.
        """
        self._check(features, tokens, pos_enc, node)
        p, parts = self.hparams.dropout, []
        if self.local is not None:
            parts.append(self._local(features, tokens))
        if self.attend is not None:
            x = self.input_norm(self.input(features[tokens[:, 0], 0])).relu()
            x = self.input_last(F.dropout(x, p, self.training))
            parts.append(self._global(x, pos_enc, node))
        x = F.dropout(self.mix_norm(self.mix(torch.cat(parts, 1))).relu(), p, self.training)
        x = F.dropout(self.narrow_norm(self.narrow(x)).relu(), p, self.training)
        return self.output(x)

    def _local(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Shapes: features (u, t, f); tokens (b, K); returns (b, H h)."""
        hidden = self.token_input(features).relu()  # once a node, however often it is sampled

        def spread(x: Tensor) -> Tensor:
            # (b, K t, .): x_j, (A x)_j, (A^2 x)_j, then the next node's
            return x.index_select(0, tokens.flatten()).unflatten(0, tokens.shape).flatten(1, 2)

        if not self.training:
            return self.local(hidden, self.token_last, spread)
        hidden = F.dropout(spread(hidden), self.hparams.dropout, True)  # what it leaves differs from token to token
        return self.local(hidden, self.token_last, lambda x: x)

    def _global(self, x: Tensor, pos_enc: Tensor, node: Tensor | None) -> Tensor:
        """Shapes: x (b, h); pos_enc (b, g); returns (b, H h)."""
        query = torch.cat((self.attend.project(x), pos_enc.to(x.dtype)), 1)
        book, g = self.codebook, self.hparams.global_dim
        if not self.training or node is None:
            return self.attend(query, book.centroids, book.centroids[:, :g], book.count)
        keys = book.centroids.clone()  # what the backward pass needs, for the codebook moves on
        out = self.attend(query, keys, keys[:, :g].clone(), book.count)
        book.update(query, node)
        if self.hparams.authors_key_gradient:
            keys.data.copy_(book.centroids)  # unseen by autograd
        return out

    def _check(self, features: Tensor, tokens: Tensor, pos_enc: Tensor | None, node: Tensor | None) -> None:
        hp = self.hparams
        if features.ndim != 3 or features.shape[2] != hp.in_features or 0 in features.shape:
            raise ValueError(
                f"'features' has shape {tuple(features.shape)}; expected (nodes >= 1, kinds >= 1, {hp.in_features})."
            )
        least = 1 if self.local is None else 2
        if tokens.ndim != 2 or tokens.shape[1] < least or len(tokens) == 0 or tokens.dtype != torch.int64:
            raise ValueError(
                f"'tokens' has shape {tuple(tokens.shape)} and type {tokens.dtype}; expected (batch >= 1, "
                f"K >= {least}) and int64: rows of 'features', the node itself first."
            )
        if self.attend is not None and (pos_enc is None or pos_enc.shape != (len(tokens), hp.global_dim)):
            came = "missing" if pos_enc is None else f"of shape {tuple(pos_enc.shape)}"
            raise ValueError(
                f"'pos_enc' is {came}; expected ({len(tokens)}, {hp.global_dim}): global_dim is {hp.global_dim}."
            )
        for name, index, size in (
            ("tokens", tokens, len(features)),
            ("node", node if self.attend is not None else None, hp.num_nodes),
        ):
            if index is None or tracing(index):
                continue
            if name == "node" and index.shape != tokens.shape[:1]:
                raise ValueError(f"'node' has shape {tuple(index.shape)}; expected ({len(tokens)},).")
            low, high = (int(v) for v in torch.aminmax(index))
            if low < 0 or high >= size:
                raise ValueError(f"'{name}' names {low if low < 0 else high}; expected 0 to {size - 1}.")

    @staticmethod
    def loss(logits: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy of the nodes with a label. Shapes: logits (b, c); y (b) int64; returns ()."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, y, ignore_index=UNKNOWN)

    # ---- steps --------------------------------------------------------------------------------------------------

    def logits(self, batch: Any) -> Tensor:
        """`forward` of a batch."""
        return self(**{key: batch[key] for key in ("features", "tokens", "pos_enc", "node") if key in batch})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(self.logits(batch), batch["y"])
        self.log("train/loss", loss.detach(), batch_size=len(batch["tokens"]))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Any, split: str) -> None:
        y = batch["y"]
        known = y != UNKNOWN
        count = int(known.sum())
        if count == 0:
            return
        logits, y = self.logits(batch).float()[known], y[known]
        accuracy = (logits.argmax(1) == y).float().mean()
        self.log(f"{split}/loss", self.loss(logits, y), batch_size=count, on_epoch=True, sync_dist=True)
        self.log(
            f"{split}/accuracy", accuracy, batch_size=count, on_epoch=True, sync_dist=True, prog_bar=split == "val"
        )

    def predict(self, features: Tensor, tokens: Tensor, pos_enc: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Probabilities of the classes.

        Shapes:
            features: (u, t, f); tokens: (b, K); pos_enc: (b, g); returns: (b, c)
        Raises:
            ValueError: if a value is NaN or infinite.
        """
        check_finite(features, "features")
        if pos_enc is not None:
            check_finite(pos_enc, "pos_enc")
            pos_enc = pos_enc.to(self.device)
        return super().predict(features, tokens, pos_enc=pos_enc).float().softmax(-1)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """ "name": list[str] (the position where the batch has none); "class": (b) int64; "probability": (b, c)."""
        given = {key: batch[key] for key in ("features", "tokens", "pos_enc") if key in batch}
        probability = self.predict(**given)
        names = batch["name"] if "name" in batch else [str(i) for i in range(len(probability))]
        return {"name": list(names), "class": probability.argmax(1), "probability": probability}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameter_groups(), lr=self.hparams.lr)

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Two nodes with sequences of 4 among 6."""
        hp, device = self.hparams, self.device
        features = torch.linspace(-1, 1, 6 * 3 * hp.in_features, device=device).view(6, 3, -1)
        tokens = torch.tensor([[0, 1, 2, 3], [5, 4, 4, 1]], device=device)
        if self.attend is None:
            return features, tokens
        return features, tokens, torch.linspace(-1, 1, 2 * hp.global_dim, device=device).view(2, -1)

    # ---- authors' checkpoints -----------------------------------------------------------------------------------

    @classmethod
    def convert_state_dict(cls, content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """From the state dict of the authors' ``LargeGT``, or the ``{"model": ...}`` that their script saves.

        Raises:
            ZooError: naming keys that are missing or left over.
        """
        content = dict(unwrap(content))
        for needed in ("fc_out.weight", "ffs.0.0.weight", "fc_in.0.weight", "convs.0.local_module.attn_layer.weight"):
            if needed not in content:
                raise ZooError(f"No LargeGT of the authors: {needed} is missing.")
        num_classes, width = content["fc_out.weight"].shape
        inner = content["convs.0.local_module.attn_layer.weight"].shape[1] // 2  # H h
        has_global = "convs.0.c_idx" in content
        wide = content["ffs.0.0.weight"].shape[1] == 2 * inner
        kind = "full" if wide else "global" if has_global else "local"
        norm = "none" if "fc_in.1.weight" not in content else "batch" if "fc_in.1.running_mean" in content else "layer"
        hyperparameters: dict[str, Any] = {
            "in_features": content["fc_in.0.weight"].shape[1],
            "num_classes": num_classes,
            "conv_type": kind,
            "width": width,
            "heads": inner // width,
            "norm": norm,
        }
        if kind != "local" and has_global:
            hyperparameters["num_nodes"] = len(content["convs.0.c_idx"])
            hyperparameters["num_centroids"] = len(content["convs.0.vq._embedding"])
            hyperparameters["global_dim"] = content["convs.0.vq._embedding"].shape[1] // 2
        names = _names(kind, norm)
        score = content["convs.0.local_module.attn_layer.weight"][:, inner:]
        content["convs.0.local_module.attn_layer.weight"] = score
        unused = _unused(kind, norm)
        missing = sorted(names.keys() - content.keys())
        extra = sorted(key for key in content if key not in names and not key.startswith(unused))
        if missing or extra:
            raise ZooError(
                f"No LargeGT of the authors: missing {missing[:3] or 'nothing'}, unexpected {extra[:3] or 'nothing'}."
            )
        state = {ours: content[theirs].clone() for theirs, ours in names.items()}
        if "codebook.assigned" in state:
            if int(state["codebook.assigned"].min()) < 0:
                raise ZooError("Assignments below 0: in the authors' 16 bits, more than 32,768 centroids overflow.")
            state["codebook.assigned"] = state["codebook.assigned"].int()
        return hyperparameters, state


def _names(kind: str, norm: str) -> dict[str, str]:
    """The authors' keys -> ours, of what the network uses."""
    local, conv = "convs.0.local_module", "convs.0"
    layers, norms, biasless, rest = {"fc_out": "output"}, {}, {}, {}
    shift = 0 if norm == "none" else 1
    layers |= {"ffs.0.0": "mix", f"ffs.0.{3 + shift}": "narrow"}
    norms |= {"ffs.0.1": "mix_norm", "ffs.0.5": "narrow_norm"}
    if kind != "global":
        encoder = f"{local}.layers.0"
        layers |= {"fc_in_seq.0": "token_input", "fc_in_seq.3": "token_last"}
        layers |= {f"{local}.att_embeddings_nope": "local.embed", f"{encoder}.self_attention_norm": "local.norm"}
        layers |= {f"{encoder}.self_attention.linear_q": "local.query", f"{encoder}.res_proj": "local.residual"}
        layers |= {f"{encoder}.self_attention.linear_v": "local.value"}
        layers |= {f"{encoder}.self_attention.output_layer": "local.output", f"{local}.final_ln": "local.output_norm"}
        biasless |= {f"{encoder}.self_attention.linear_k": "local.key", f"{local}.attn_layer": "local.score"}
    if kind != "local":
        layers |= {"fc_in.0": "input", f"fc_in.{3 + shift}": "input_last", f"{conv}.lin_proj_g": "attend.project"}
        layers |= {f"{conv}.lin_query_g": "attend.query", f"{conv}.lin_value_g": "attend.value"}
        norms |= {"fc_in.1": "input_norm"}
        biasless |= {f"{conv}.lin_key_g": "attend.key"}
        buffers = {"_embedding": "embedding", "_embedding_output": "centroids", "_ema_cluster_size": "size"}
        buffers |= {"_ema_w": "total", "bn.running_mean": "mean", "bn.running_var": "variance"}
        rest |= {f"{conv}.vq.{theirs}": f"codebook.{ours}" for theirs, ours in buffers.items()}
        rest |= {f"{conv}.c_idx": "codebook.assigned"}
    parts = {"batch": ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    rest |= {f"{a}.{part}": f"{b}.{part}" for a, b in layers.items() for part in ("weight", "bias")}
    rest |= {f"{a}.weight": f"{b}.weight" for a, b in biasless.items()}
    if norm != "none":
        wanted = parts.get(norm, ("weight", "bias"))
        rest |= {f"{a}.{part}": f"{b}.{part}" for a, b in norms.items() for part in wanted}
    return rest


def _unused(kind: str, norm: str) -> tuple[str, ...]:
    """Beginnings of the authors' keys that their network declares and does not use, or whose effect softmax forgets."""
    conv = "convs.0."
    found = [f"{conv}{name}." for name in ("lin_key", "lin_query", "lin_value", "lin_skip", "local_module.out_proj")]
    found += [f"{conv}local_module.attn_layer.bias", f"{conv}local_module.layers.0.self_attention.linear_k.bias"]
    found += [f"{conv}lin_key_g.bias", f"{conv}vq.bn.num_batches_tracked"]
    if kind == "global":
        found += ["fc_in_seq.", f"{conv}local_module."]
    if kind == "local":
        found += ["fc_in."]
    return tuple(found)
