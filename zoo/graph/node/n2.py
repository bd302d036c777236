"""N2: dynamic message passing on graphs through learnable pseudo nodes.

Paper: Junshu Sun, Chenxue Yang, Xiangyang Ji, Qingming Huang, Shuhui Wang, "Towards Dynamic Message Passing on
Graphs", NeurIPS 2024, arXiv:2410.23686. Code by the authors: https://github.com/sunjss/N2, no licence stated.

In: one graph or a batch of graphs, node features and edges. Out: class logits of the nodes, or of whole graphs. Graph
nodes and P learnable pseudo nodes live in one space of states; how strongly two of them are joined follows from their
positions (`PathIntegral`), and both kinds move. One layer, used T times with the same weights (`Recurrence`):

    collect    pseudo nodes gather the nodes' features and move            p <- LN(p + displacement)
    inspect    nodes ask the pseudo nodes what lies elsewhere              i  = <s, p> v
    local      one step along the edges                                    h  = LN(s + phi(A [f | i | s]))
    collect    pseudo nodes gather what the edges brought and move again   p <- LN(p + displacement)
    dispatch   and send it to wherever the nodes are now,  D = <h, p> v    f <- LN(f + phi(D)),  s <- LN(h + D)

The cost is linear in nodes, and here no (n, P) matrix is ever formed: a path integral is a bilinear form, so that the
product with values goes through (q, d) matrices, <s, p> v = s (p^T v), and so does the local step,
A [f | i | s] W = A z with z only q wide.

Reproduces the architecture and training of the authors' code; its tables need per-dataset values that it does not give.
Departs from it: edge features are summed without the 1 that it adds for the self-loops it makes (``authors_edge_sum``);
on directed graphs messages go from source to target, theirs from target to source (``authors_direction``); layers that
it declares and never uses (``edge_wise_ff``, ``time_embedding``) are left out, so that the 548,280 parameters of its
default are 531,000 here; its missing head for regression and unused positional encoders are left out. Its scripts test
graph classification on all graphs, training ones too; `GraphClassificationDataModule` keeps the folds apart.

Index legend: n nodes of all graphs, e directed edges, b graphs, P pseudo nodes, k copies of their states, q width of a
state, d width of a feature, c classes.
"""

import contextlib
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.core import ZooError, unwrap
from zoo.graph.node.supervised import PlainGNN as PlainGNN
from zoo.graph.node.supervised import SupervisedGNN, check_batch_index
from zoo.nn.graph import Adjacency, Remember, SparseRows, as_features, check_graph, linear, tracing

LIMIT = 1e4
"""No row of a path integral sums to more, in absolute value."""
BLOCK = 32
"""Nodes that are multiplied together in a batch of graphs; a graph's last block is filled up with zeros."""


# ---- the graph -------------------------------------------------------------------------------------------------------


class Members:
    """Which graph each node belongs to: sums and products a graph, at a cost that follows the nodes.

    Graphs of any sizes stand side by side in blocks of `BLOCK` nodes, so that none is padded to the largest one.

    Args:
        batch: (n) int64, the graph of each node, ascending; None is one graph.
        nodes: n.
    """

    def __init__(self, batch: Tensor | None, nodes: int):
        self.batch: Tensor | None = None
        self.sizes: Tensor | int = nodes
        self.graphs = 1
        if batch is None:
            return
        sizes = torch.bincount(batch)
        self.graphs = len(sizes)
        if self.graphs == 1:
            return
        blocks = (sizes + BLOCK - 1) // BLOCK
        first_node, first_block = sizes.cumsum(0) - sizes, blocks.cumsum(0) - blocks
        position = torch.arange(nodes, device=batch.device) - first_node[batch]
        self.batch, self.sizes = batch, sizes[:, None]  # (b, 1)
        self.slot = first_block[batch] * BLOCK + position  # (n): where a node stands among the blocks
        self.owner = torch.repeat_interleave(torch.arange(self.graphs, device=batch.device), blocks)

    def _blocks(self, x: Tensor) -> Tensor:
        """(n, w) as (blocks, BLOCK, w)."""
        filled = x.new_zeros(len(self.owner) * BLOCK, x.shape[1]).index_copy(0, self.slot, x)
        return filled.view(-1, BLOCK, x.shape[1])

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        """sum_i a_i b_i^T over each graph's nodes. Shapes: a (n, u), b (n, w); returns (b, u, w)."""
        if self.batch is None:
            return (a.t() @ b)[None]
        products = self._blocks(a).mT @ self._blocks(b)
        return products.new_zeros(self.graphs, *products.shape[1:]).index_add(0, self.owner, products)

    def apply(self, x: Tensor, matrices: Tensor) -> Tensor:
        """Each node times its graph's matrix. Shapes: x (n, u), matrices (b, u, w); returns (n, w)."""
        if self.batch is None:
            return x @ matrices[0]
        return (self._blocks(x) @ matrices[self.owner]).flatten(0, 1)[self.slot]

    def sum(self, x: Tensor) -> Tensor:
        """Shapes: x (n, w); returns (b, w)."""
        if self.batch is None:
            return x.sum(0, keepdim=True)
        return x.new_zeros(self.graphs, x.shape[1]).index_add(0, self.batch, x)


# ---- pathways --------------------------------------------------------------------------------------------------------


class PathIntegral(nn.Module):
    """How strongly two sets of states are joined (the paper's proximity measurement).

        W_ij = 1 / (K q) sum_k lambda_k <a_ik, b_jk>,     then  W_i <- W_i min(1, 10^4 / |sum_j W_ij|)

    A side with a single copy counts as K equal ones. The limit on a row is a constant for gradients. Where one side has
    a single copy, W = a mix(b)^T, which is all that the callers need: they never form W.

    Args:
        state, copies: q, K.
    """

    def __init__(self, state: int, copies: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(copies))
        self.scale = 1.0 / (state * copies)

    def mix(self, states: Tensor) -> Tensor:
        """The one state that stands for all copies. Shapes: (..., k, q) with k = 1 or K; returns (..., q)."""
        weight = self.weight * self.scale
        if states.shape[-2] == 1:
            return states[..., 0, :] * weight.sum()
        return (states * weight[:, None]).sum(-2)

    def among(self, states: Tensor, values: Tensor) -> Tensor:
        """W values, for W between the states themselves.

        Shapes:
            states: (b or 1, P, k, q); values: (b, P, w); returns: (b, P, w)
        """
        weight = self.weight * self.scale
        weight = weight.sum()[None] if states.shape[-2] == 1 else weight
        left, right = (states * weight[:, None]).flatten(2), states.flatten(2)  # (b, P, k q)
        limit = row_limit(left @ right.sum(1)[..., None])
        (groups, p, inner), w = left.shape, values.shape[-1]
        if p * p * (groups * inner + len(values) * w) <= 2 * len(values) * p * inner * w:  # multiplications
            return limit * ((left @ right.mT) @ values)
        return limit * (left @ (right.mT @ values))


def row_limit(sums: Tensor) -> Tensor:
    """What a row that sums to ``sums`` is multiplied with; a constant for gradients."""
    with torch.no_grad():
        size = sums.abs()
        return torch.where(size > LIMIT, LIMIT / size, 1.0)


class Communicator(nn.Module):
    """Pseudo nodes exchange what they gathered: where each moves, and what it has to tell.

    Args:
        inputs, outputs: widths of what was gathered and of the value.
        state, copies: q, K.
        dropout: rate.
    Shapes:
        states: (b or 1, P, k, q); gathered: (b, P, inputs)
        returns: displacement (b, P, K, q), value (b, P, outputs)
    """

    def __init__(self, inputs: int, outputs: int, state: int, copies: int, dropout: float):
        super().__init__()
        self.paths = PathIntegral(state, copies)
        self.displacement = nn.Linear(inputs, copies * state)
        self.value = nn.Linear(inputs, outputs)
        self.p, self.shape = dropout, (copies, state)

    def forward(self, states: Tensor, gathered: Tensor) -> tuple[Tensor, Tensor]:
        told = self.paths.among(states, gathered)
        displacement, value = (activate(f(told), self.p, self.training) for f in (self.displacement, self.value))
        return displacement.unflatten(-1, self.shape), value


def activate(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout(LeakyReLU(x)), what follows every linear layer of N2."""
    return F.dropout(F.leaky_relu(x), p, training)


class Recurrence(nn.Module):
    """The layer that is used T times (see the module's docstring); without pseudo nodes, its local step alone.

    Args:
        width, state, copies: d, q, K.
        pseudo: False leaves out the pseudo nodes: i is gone, and D = phi(h W).
        dropout: rate.
    Shapes:
        f: (n, d); s: (n, q); p: (b or 1, P, k, q), k = 1 before the first step
        returns: f, s, p after the step
    """

    def __init__(self, width: int, state: int, copies: int, pseudo: bool, dropout: float):
        super().__init__()
        self.sizes, self.p = (width, width, state) if pseudo else (width, 0, state), dropout
        self.local = nn.Linear(sum(self.sizes), state)
        self.local_norm, self.state_norm = nn.LayerNorm(state), nn.LayerNorm(state)
        self.feature, self.feature_norm = nn.Linear(state, width), nn.LayerNorm(width)
        self.pseudo = pseudo
        if not pseudo:
            self.own = nn.Linear(state, state)
            return
        self.collect, self.inspect, self.collect_again, self.dispatch = (PathIntegral(state, copies) for _ in range(4))
        self.communicator = Communicator(width, width, state, copies, dropout)
        self.communicator_again = Communicator(3 * width + state, state, state, copies, dropout)
        self.pseudo_norm, self.pseudo_norm_again = nn.LayerNorm(state), nn.LayerNorm(state)

    def forward(
        self, f: Tensor, s: Tensor, p: Tensor, paths: Adjacency, members: Members, last: str | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Args: last: "node" or "graph" in the last step, where only s or only p is wanted."""
        to_f, to_i, to_s = self.local.weight.split(self.sizes, 1)
        z = f @ to_f.t() + s @ to_s.t()
        if self.pseudo:
            mixed = self.collect.mix(p)  # (b or 1, P, q)
            gathered = self._gather(mixed, members.sum(s), members.outer(s, f), members)
            displacement, insight = self.communicator(p, gathered)
            p = self.pseudo_norm(p + displacement)

            mixed = self.inspect.mix(p)
            limited = s * row_limit(members.apply(s, mixed.sum(1)[..., None]))
            view = mixed.mT @ insight  # (b, q, d): i = limited view
            z = z + members.apply(limited, view @ to_i.t())

        # A ([f | i | s] W) for (A [f | i | s]) W: the same, with a sparse product only q wide.
        h = self.local_norm(s + activate(paths @ z + self.local.bias, self.p, self.training))

        if self.pseudo:
            mixed = self.collect_again.mix(p)
            back = paths.back(h)  # h^T A x = (A^T h)^T x
            parts = [members.outer(back, f), members.outer(back, limited) @ view, members.outer(back, s)]
            gathered = self._gather(mixed, members.sum(h), torch.cat(parts, -1), members)
            displacement, value = self.communicator_again(p, torch.cat((gathered, insight), -1))
            p = self.pseudo_norm_again(p + displacement)
            if last == "graph":
                return f, s, p

            mixed = self.dispatch.mix(p)
            limited = h * row_limit(members.apply(h, mixed.sum(1)[..., None]))
            sent = members.apply(limited, mixed.mT @ value)
        else:
            sent = activate(self.own(h), self.p, self.training)
        if last is None:
            f = self.feature_norm(f + activate(self.feature(sent), self.p, self.training))
        return f, self.state_norm(h + sent), p

    @staticmethod
    def _gather(mixed: Tensor, total: Tensor, products: Tensor, members: Members) -> Tensor:
        """W values / N for W between pseudo nodes and the nodes of each graph.

        Shapes:
            mixed: (b or 1, P, q); total: (b, q), the sum of the nodes' states; products: (b, q, w), states^T values
            returns: (b, P, w)
        """
        mean = products / (members.sizes if members.batch is None else members.sizes[..., None])
        return row_limit(mixed @ total[..., None]) * (mixed @ mean)


# ---- the method ------------------------------------------------------------------------------------------------------


class N2(SupervisedGNN):
    """Node or graph classification by dynamic message passing through pseudo nodes.

    Batches, metrics, prediction: `SupervisedGNN`. A batch may hold one graph or many; every graph has pseudo nodes of
    its own, which start from the same learned states.

    Args:
        in_features: features a node.
        num_classes: classes, or labels.
        level: "node": logits of the nodes, read off their states; "graph": of graphs, off their pseudo nodes' states.
        targets: "class", one right class each (cross-entropy), or "labels", several, known or not (binary
            cross-entropy).
        edge_features: features an edge; each node gets the sum over its edges as further inputs.
        width: d, of the features.
        state: q, of the states.
        copies: K, states of a pseudo node.
        pseudo_nodes: P; 0 switches the paper's idea off: message passing along the edges alone, with the same
            recurrence (at graph level followed by the mean over nodes).
        steps: T, uses of the one layer.
        class_copies: states of a class, 1 or ``copies`` (ogbg-molpcba).
        dropout: rate after every linear layer.
        lr: learning rate (Adam).
        weight_decay: L2 penalty.
        warmup: steps over which the learning rate rises; 1 starts at ``lr``.
        lr_decay: factor a step after the warm-up, down to a thousandth of ``lr``; 1 stays.
        authors_edge_sum: sum edge features as the authors' code does: a node without a self-loop of its own gets 1
            more in every channel.
        authors_direction: messages go from the targets of directed edges to their sources.
    Raises:
        ValueError: for an unknown choice, or sizes below 1.
    Example:
        >>> from zoo.graph import N2, NodeClassificationDataModule
        >>> import zoo
        >>> trainer = zoo.Trainer(max_epochs=2, enable_model_summary=False, enable_progress_bar=False)
        >>> model = N2.from_variant("tiny", in_features=60, num_classes=4)
        >>> trainer.fit(model, datamodule=NodeClassificationDataModule())
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"width": 16, "state": 8, "copies": 2, "pseudo_nodes": 8, "steps": 2},
        "graph": {"in_features": 37, "num_classes": 2, "level": "graph"},
        "graph_tiny": {
            "in_features": 6,
            "num_classes": 2,
            "level": "graph",
            "width": 16,
            "state": 8,
            "copies": 2,
            "pseudo_nodes": 8,
            "steps": 2,
        },
        "molpcba": {
            "in_features": 9,
            "edge_features": 3,
            "num_classes": 128,
            "level": "graph",
            "targets": "labels",
            "class_copies": 8,
        },
    }
    head = ("classes",)

    def __init__(
        self,
        in_features: int = 745,
        num_classes: int = 8,
        level: str = "node",
        targets: str = "class",
        edge_features: int = 0,
        width: int = 128,
        state: int = 64,
        copies: int = 8,
        pseudo_nodes: int = 256,
        steps: int = 4,
        class_copies: int = 1,
        dropout: float = 0.4,
        lr: float = 1e-3,
        weight_decay: float = 1e-6,
        warmup: int = 1,
        lr_decay: float = 1.0,
        authors_edge_sum: bool = False,
        authors_direction: bool = False,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.set_task(level, targets, num_classes)
        for name in ("in_features", "width", "state", "copies", "steps", "warmup"):
            if self.hparams[name] < 1:
                raise ValueError(f"N2: {name} is {self.hparams[name]}; it must be at least 1.")
        if pseudo_nodes < 0 or edge_features < 0:
            raise ValueError(
                f"N2: pseudo_nodes is {pseudo_nodes} and edge_features {edge_features}; 0 switches either off."
            )
        if class_copies not in (1, copies):
            raise ValueError(f"N2: class_copies is {class_copies}; it must be 1 or copies ({copies}).")

        inputs = in_features + edge_features
        self.state_input, self.feature_input = nn.Linear(inputs, state), nn.Linear(inputs, width)
        self.recurrence = Recurrence(width, state, copies, pseudo_nodes > 0, dropout)
        if pseudo_nodes > 0:
            self.pseudo_states = nn.Parameter(torch.randn(pseudo_nodes, 1, state))
        if level == "graph":
            self.pool = nn.Linear(pseudo_nodes * copies, 1) if pseudo_nodes > 0 else None
            self.pool_norm = nn.LayerNorm(state)
        self.classes = nn.Parameter(torch.randn(num_classes, class_copies, state))
        self.output = PathIntegral(state, copies)
        self._prepared = Remember()

    def forward(
        self, x: Tensor, edge_index: Tensor, batch: Tensor | None = None, edge_attr: Tensor | None = None
    ) -> Tensor:
        """Logits of all nodes, or of all graphs.

        Args:
            batch: the graph of each node, in order; None is one graph.
            edge_attr: features of the edges, with ``edge_features``.
        Shapes:
            x: (n, in_features); edge_index: (2, e) int64; batch: (n) int64; edge_attr: (e, edge_features)
            returns: (n, num_classes), at graph level (b, num_classes)
        Raises:
            ValueError: for other shapes, an unknown node in ``edge_index``, or nodes not in the order of their graphs.
        """
        hp = self.hparams
        check_graph(x, edge_index, hp.in_features)
        if (edge_attr is not None) != (hp.edge_features > 0) or (
            edge_attr is not None and edge_attr.shape != (edge_index.shape[1], hp.edge_features)
        ):
            came = "missing" if edge_attr is None else f"of shape {tuple(edge_attr.shape)}"
            wanted = f"({edge_index.shape[1]}, {hp.edge_features})" if hp.edge_features else "none (edge_features=0)"
            raise ValueError(f"'edge_attr' is {came}; expected {wanted}.")
        inputs, paths, members = self._prepared(self.prepare, x, edge_index, batch, edge_attr)
        # Both input layers in one product.
        weight = torch.cat((self.state_input.weight, self.feature_input.weight))
        bias = torch.cat((self.state_input.bias, self.feature_input.bias))
        both = activate(linear(inputs, weight.t()) + bias, hp.dropout, self.training)
        # Sums of states before they are limited are too large for bfloat16's precision. (No autocast on "meta".)
        exact = contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
        with exact:
            s, f = both.to(self.classes.dtype).split((hp.state, hp.width), 1)
            p = self.pseudo_states[None] if hp.pseudo_nodes else s.new_zeros(())
            for step in range(hp.steps):
                last = hp.level if step == hp.steps - 1 else None
                f, s, p = self.recurrence(f, s, p, paths, members, last)
            if hp.level == "graph":
                s = self._pooled(s, p, members)
            classes = self.output.mix(self.classes)  # (c, q)
            return row_limit(s @ classes.sum(0)[:, None]) * (s @ classes.t())

    def prepare(
        self, x: Tensor, edge_index: Tensor, batch: Tensor | None, edge_attr: Tensor | None
    ) -> tuple[Tensor | SparseRows, Adjacency, Members]:
        """What follows from the graphs alone: inputs with summed edge features, A, the graphs' members."""
        if not tracing(x):
            check_batch_index(batch, len(x))
        if edge_attr is not None:
            source = edge_index[0]
            total = edge_attr.new_zeros(len(x), edge_attr.shape[1]).index_add(0, source, edge_attr)
            if self.hparams.authors_edge_sum:
                looped = torch.zeros(len(x), dtype=torch.bool, device=x.device)
                looped[source[source == edge_index[1]]] = True
                total = total + (~looped)[:, None].to(total.dtype)
            x = torch.cat((x, total.to(x.dtype)), dim=1)
        directed = edge_index.flip(0) if self.hparams.authors_direction else edge_index
        return as_features(x), Adjacency(directed, len(x), self.classes.dtype), Members(batch, len(x))

    def _pooled(self, s: Tensor, p: Tensor, members: Members) -> Tensor:
        """One state a graph, (b, q)."""
        if self.pool is None:
            return self.pool_norm(members.sum(s) / members.sizes)
        weight = self.pool.weight.view(self.hparams.copies, -1)  # (K, P)
        pooled = torch.einsum("kp,bpkq->bq", weight, p) + self.pool.bias
        return self.pool_norm(activate(pooled, self.hparams.dropout, self.training))

    def configure_optimizers(self) -> Any:
        hp = self.hparams
        optimizer = torch.optim.Adam(self.parameters(), lr=hp.lr, weight_decay=hp.weight_decay)

        def factor(done: int) -> float:
            step = done + 1
            return step / hp.warmup if step < hp.warmup else max(0.001, hp.lr_decay ** (step - hp.warmup))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def example_inputs(self) -> tuple[Tensor, ...]:
        inputs = super().example_inputs()
        if not self.hparams.edge_features:
            return inputs
        attributes = torch.ones(inputs[1].shape[1], self.hparams.edge_features, device=self.device)
        return (*inputs, None, attributes)  # type: ignore[return-value]

    # ---- authors' checkpoints -----------------------------------------------------------------------------------

    @classmethod
    def convert_state_dict(cls, content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """From the state dict of the authors' ``N2Node`` or ``N2Graph``.

        What shapes do not tell stays at its default: ``steps``, rates, ``targets``; edge features count as
        ``in_features``.

        Raises:
            ZooError: naming keys that are missing or left over.
        """
        content = dict(unwrap(content))
        for key in list(content):
            if key.startswith(("node_state_updater.edge_wise_ff.", "node_state_updater.time_embedding.")):
                del content[key]  # never used
        names = _names("pnode_agg.0.weight" in content)
        missing, extra = sorted(names.keys() - content.keys()), sorted(content.keys() - names.keys())
        if missing or extra:
            raise ZooError(
                f"No N2Node or N2Graph of the authors: missing {missing[:3] or 'nothing'}, unexpected "
                f"{extra[:3] or 'nothing'}."
            )
        copies, width = len(content["out_ff.lambda_copies"]), len(content["feat_ff.0.bias"])
        _, pseudo_nodes, state = content["pnode_state"].shape
        class_copies, num_classes, _ = content["class_neuron"].shape
        hyperparameters = {
            "in_features": content["feat_ff.0.weight"].shape[1],
            "num_classes": num_classes,
            "level": "graph" if "pnode_agg.0.weight" in content else "node",
            "width": width,
            "state": state,
            "copies": copies,
            "pseudo_nodes": pseudo_nodes,
            "class_copies": class_copies,
        }
        return hyperparameters, {names[key]: _ours(names[key], value, copies) for key, value in content.items()}


def _names(graph: bool) -> dict[str, str]:
    """The authors' keys -> ours."""
    layers = {
        "node_state_interface.0": "state_input", "feat_ff.0": "feature_input",
        "node_state_updater.hstate_interface.0": "recurrence.local",
        "node_state_updater.feat_ff.0": "recurrence.feature",
        "node_state_updater.hidden_norm": "recurrence.local_norm",
        "node_state_updater.out_norm": "recurrence.state_norm",
        "node_state_updater.feat_norm": "recurrence.feature_norm",
        "node_state_updater.phidden_norm": "recurrence.pseudo_norm",
        "node_state_updater.pout_norm": "recurrence.pseudo_norm_again",
    }  # fmt: skip
    paths = {"collection1": "collect", "inspection": "inspect", "collection2": "collect_again", "dispatch": "dispatch"}
    weights = {"pnode_state": "pseudo_states", "class_neuron": "classes", "out_ff.lambda_copies": "output.weight"}
    for theirs, ours in paths.items():
        weights[f"node_state_updater.{theirs}.lambda_copies"] = f"recurrence.{ours}.weight"
    for number, ours in ((1, "communicator"), (2, "communicator_again")):
        prefix = f"node_state_updater.pnode_agg{number}"
        weights[f"{prefix}.pnode_agg.lambda_copies"] = f"recurrence.{ours}.paths.weight"
        layers |= {f"{prefix}.glob2disp.0": f"recurrence.{ours}.displacement"}
        layers |= {f"{prefix}.glob2value.0": f"recurrence.{ours}.value"}
    if graph:
        layers |= {"pnode_agg.0": "pool", "out_norm": "pool_norm"}
    return weights | {f"{a}.{part}": f"{b}.{part}" for a, b in layers.items() for part in ("weight", "bias")}


def _ours(name: str, value: Tensor, copies: int) -> Tensor:
    """A tensor of the authors' in our order of axes."""
    if name == "pseudo_states":
        return value[0][:, None]  # (1, P, q) -> (P, 1, q)
    if name == "classes":
        return value.transpose(0, 1).contiguous()  # (k, c, q) -> (c, k, q)
    if ".displacement." in name:  # rows in the order (q, k) -> (k, q)
        return value.unflatten(0, (-1, copies)).transpose(0, 1).flatten(0, 1).contiguous()
    return value.flatten() if value.shape == (copies, 1, 1) else value
