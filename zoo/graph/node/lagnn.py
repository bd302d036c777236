"""LAGNN: local augmentation for graph neural networks.

Paper: Songtao Liu, Rex Ying, Hanze Dong, Lanqing Li, Tingyang Xu, Yu Rong, Peilin Zhao, Junzhou Huang, Dinghao Wu,
"Local Augmentation for Graph Neural Networks", ICML 2022, arXiv:2109.03856. Code by the authors:
https://github.com/SongtaoLiu0823/LAGNN, no licence stated.

In: one graph, node features and edges; out: class logits of its nodes. A node with few neighbours says little; a
conditional VAE learns p(features of a neighbour | features of the node), and what it draws is a second input beside
the node's own features:

    stage 1   max  E_q(z|x_j,x_i) log p(x_j | z, x_i) - KL(q || N(0, I))     over the edges i - j      (Eqs. 6, 7)
    stage 2   H = [relu(A X W_0) | relu(A X~_1 W_1) | ... | relu(A X~_k W_k)],  logits = A H W         (Eq. 10)
              loss = mean_s NLL(P_s) + lam * mean_s mean_v ||P_s(v) - sharpen(mean_s P_s(v))||^2

Which generator is kept out of stage 1 is decided by how little a Bayesian judge, a GCN with its dropout left on,
disagrees with itself on the training nodes (`disagreement`).

Reproduces: Table 1 (semi-supervised citation graphs); the form of the OGB table is the variant ``ogb_arxiv``. Departs
from the authors' code: its weights start from a normal distribution of mean -1/sqrt(width), which silences most ReLUs
(``authors_init`` restores it); its best U score counts during warm-up, where a good step can block every later choice
(``authors_warmup``); its OGB generators normalise by the statistics of the whole graph also when they only draw
(``authors_batch_statistics``); its LAGCNII validates with another sample than the one it stores, and its LAGRAND trains
on one stored sample and not on fresh ones. Left out: the plain average of both inputs that it uses on ogbn-products.

Index legend: n nodes, e directed edges, f features, h hidden units, k generated inputs (``concat``), s samples a step,
m passes of the judge, c classes, b edges a batch.
"""

import copy
import itertools
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.core import ZooError, ZooModule, check_finite, unwrap
from zoo.core.module import refuse_difference
from zoo.nn.graph import (
    Adjacency,
    GraphLinear,
    Remember,
    SparseRows,
    as_features,
    check_graph,
    drop,
    dropout,
    linear,
    row_normalise,
    torch_geometric_nn,
)

log = logging.getLogger(__name__)

Features = list[Tensor | SparseRows]
"""The inputs of a backbone, each (n, f): k generated ones, then the nodes' own."""


# ---- stage 1: the generator ------------------------------------------------------------------------------------------


class Generator(nn.Module):
    """Conditional VAE of a neighbour's features given the node's own (Sec. 3.1).

        q(z | x, c) = N(mu, sigma^2),  x = features of a neighbour, c = features of the node;   x^ = decoder(z, c)

    Args:
        features: f.
        hidden: units of the one hidden layer of encoder and decoder.
        latent: size of z.
        likelihood: "bernoulli" ends in a sigmoid (features in [0, 1]); "gaussian", the authors' form for OGB, has a
            batch norm after every linear layer of the two MLPs and ends in tanh (features in [-1, 1]).
        batch_statistics: draw with batch statistics instead of the running ones ("gaussian" only).
    Shapes:
        x, c: (b, f); z: (b, latent)
        returns: x^ (b, f), mu (b, latent), log sigma^2 (b, latent)
    """

    def __init__(
        self,
        features: int,
        hidden: int = 256,
        latent: int = 10,
        likelihood: str = "bernoulli",
        batch_statistics: bool = False,
    ):
        super().__init__()
        self.latent, self.likelihood, self.batch_statistics = latent, likelihood, batch_statistics
        norm = nn.BatchNorm1d if likelihood == "gaussian" else (lambda width: nn.Identity())
        self.encoder = nn.Linear(2 * features, hidden)
        self.encoder_norm = norm(hidden)
        self.mean, self.log_variance = nn.Linear(hidden, latent), nn.Linear(hidden, latent)
        self.decoder = nn.Linear(latent + features, hidden)
        self.decoder_norm = norm(hidden)
        self.output = nn.Linear(hidden, features)
        self.output_norm = norm(features)

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder_norm(self.encoder(torch.cat((x, c), dim=1))).relu()
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decode(z, self.condition(c)), mean, log_variance

    def condition(self, c: Tensor) -> Tensor:
        """What the decoder's first layer makes of c alone, (b, hidden): the same for every z."""
        return F.linear(c, self.decoder.weight[:, self.latent :], self.decoder.bias)

    def decode(self, z: Tensor, condition: Tensor) -> Tensor:
        """x^ for z (b, latent) and `condition` (b, hidden)."""
        hidden = F.linear(z, self.decoder.weight[:, : self.latent]) + condition
        hidden = self._norm(self.decoder_norm, hidden).relu_()
        x = self._norm(self.output_norm, self.output(hidden))
        return x.tanh() if self.likelihood == "gaussian" else x.sigmoid()

    def _norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        if self.batch_statistics and isinstance(norm, nn.BatchNorm1d) and not norm.training:
            return F.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
        return norm(x)


def generator_loss(output: Tensor, x: Tensor, mean: Tensor, log_variance: Tensor, likelihood: str) -> Tensor:
    """Negative evidence lower bound (Eq. 6), summed over features and latents, averaged over pairs.

    Shapes:
        output, x: (b, f); mean, log_variance: (b, latent); returns: ()
    """
    if likelihood == "bernoulli":
        reconstruction = F.binary_cross_entropy(output, x, reduction="sum")
    else:
        reconstruction = F.mse_loss(output, x, reduction="sum")
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
    return (reconstruction + divergence) / len(x)


def disagreement(log_probs: Tensor, y: Tensor) -> Tensor:
    """U score: how little the judge's passes disagree on the true classes; at most 0, larger is better (Sec. 3.2).

        U = NLL(mean_m p_m) - mean_m NLL(p_m)

    Shapes:
        log_probs: (m, t, c) of m passes on t nodes; y: (t); returns: ()
    """
    passes = log_probs.gather(2, y.expand(len(log_probs), -1)[..., None])[..., 0]  # (m, t)
    return passes.mean() - (passes.logsumexp(0) - math.log(len(passes))).mean()


class Judge:
    """A GCN whose passes with dropout on say how far drawn features are from real ones (Sec. 3.2).

    Only its logits on the training nodes count, so that it sees the nodes within two hops of them and no others: the
    same numbers for less.

    Args:
        x, edge_index, y, mask: the graph, labels and training nodes as in `LAGNN.fit_generator`.
        classes: c.
        normalise: divide features by their sum.
        epochs: updates on the real features.
        passes: m.
        shifted_init: see `GraphLinear`.
    """

    def __init__(
        self,
        x: Tensor,
        edge_index: Tensor,
        y: Tensor,
        mask: Tensor,
        classes: int,
        normalise: bool = True,
        epochs: int = 100,
        passes: int = 100,
        shifted_init: bool = False,
    ):
        train = mask.nonzero().flatten()
        self.adjacency, nodes, self.targets = Adjacency(edge_index, len(x), x.dtype).within(train, hops=2)
        self.x, self.y, self.passes, self.normalise = x[nodes], y[train], passes, normalise
        # Sizes and rates are those of the authors' code.
        self.net = LAGCN(x.shape[1], 32, classes, shifted_init=shifted_init).to(x.device, x.dtype).train()
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.01, weight_decay=5e-4)
        self.update(as_features(row_normalise(self.x) if normalise else self.x), epochs)

    def update(self, features: Tensor | SparseRows, epochs: int) -> None:
        """Train on features of the kept nodes."""
        with torch.enable_grad():
            for _ in range(epochs):
                self.optimizer.zero_grad()
                F.cross_entropy(self.net([features], self.adjacency)[self.targets], self.y).backward()
                self.optimizer.step()

    @torch.no_grad()
    def draw(self, generator: Generator) -> Tensor:
        """One sample of the generator for the kept nodes."""
        training = generator.training
        z = torch.randn(len(self.x), generator.latent, device=self.x.device, dtype=self.x.dtype)
        drawn = generator.eval().decode(z, generator.condition(self.x))
        generator.train(training)
        return row_normalise(drawn) if self.normalise else drawn

    @torch.no_grad()
    def score(self, features: Tensor) -> float:
        """`disagreement` of m passes on ``features``."""
        # Passes go together as far as memory allows: 64 MiB of dropped features on a CPU, 1 GiB elsewhere.
        together = max(1, (2**24 if features.device.type == "cpu" else 2**28) // features.numel())
        sizes = [min(together, self.passes - start) for start in range(0, self.passes, together)]
        return float(disagreement(torch.cat([self._pass(features, m) for m in sizes]), self.y))

    def _pass(self, features: Tensor, m: int) -> Tensor:
        """Log-probabilities of m passes at once, (m, t, c): their hidden units stand side by side in one product."""
        (first,), last, n = self.net.branches, self.net.classifier, len(features)
        x = dropout(features.expand(m, -1, -1), self.net.input_dropout, True) @ first.weight  # (m, n, h)
        x = self.adjacency @ x.transpose(0, 1).reshape(n, -1)  # (n, m h)
        x = F.dropout((x.view(n, m, -1) + first.bias).relu(), self.net.p) @ last.weight  # (n, m, c)
        x = (self.adjacency @ x.reshape(n, -1)).view(n, m, -1)[self.targets] + last.bias
        return x.log_softmax(-1).transpose(0, 1)


# ---- stage 2: backbones. Each takes (features, adjacency) and returns logits (n, c) ----------------------------------


class LAGCN(nn.Module):
    """GCN whose first layer has one branch per input (Eq. 10); with one branch, the GCN of Kipf and Welling.

    Args:
        features, hidden, classes: f, h of one branch, c.
        branches: k + 1.
        layers: graph convolutions in all, at least 2; the middle ones are (k + 1) h wide.
        input_dropout, p: rates before the first layer and before every other.
        batch_norm: after every convolution but the last (the OGB form).
        shifted_init: the authors' initialisation, see `GraphLinear`.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        classes: int,
        branches: int = 1,
        layers: int = 2,
        input_dropout: float = 0.5,
        p: float = 0.5,
        batch_norm: bool = False,
        shifted_init: bool = False,
    ):
        super().__init__()
        width = branches * hidden
        self.branches = nn.ModuleList(GraphLinear(features, hidden, shifted_init) for _ in range(branches))
        self.middle = nn.ModuleList(GraphLinear(width, width, shifted_init) for _ in range(layers - 2))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) if batch_norm else nn.Identity() for _ in range(layers - 1))
        self.classifier = GraphLinear(width, classes, shifted_init)
        self.input_dropout, self.p = input_dropout, p

    def forward(self, features: Features, adjacency: Adjacency) -> Tensor:
        dropped = [drop(x, self.input_dropout, self.training) for x in features]
        parts = [branch(x) for branch, x in zip(self.branches, dropped, strict=True)]
        x = adjacency @ torch.cat(parts, dim=1) + torch.cat([branch.bias for branch in self.branches])
        for norm, layer in zip(self.norms, (*self.middle, self.classifier), strict=True):
            x = F.dropout(norm(x).relu(), self.p, self.training)
            x = adjacency @ layer(x) + layer.bias
        return x


class LAGAT(nn.Module):
    """Two layers of graph attention (arXiv:1710.10903), the first with one branch per input; torch_geometric's layers.

    Args:
        features, hidden, classes, branches, p: as in `LAGCN`; ``p`` drops inputs and attention weights.
        heads, out_heads: attention heads of the first layer (concatenated) and of the second (averaged).
        elu_alpha: of the ELU between them.
    Raises:
        ImportError: where torch_geometric is missing.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        classes: int,
        branches: int = 1,
        heads: int = 4,
        out_heads: int = 1,
        p: float = 0.6,
        elu_alpha: float = 0.2,
    ):
        super().__init__()
        layer = torch_geometric_nn().GATConv
        self.branches = nn.ModuleList(layer(features, hidden, heads=heads, dropout=p) for _ in range(branches))
        self.classifier = layer(branches * hidden * heads, classes, heads=out_heads, concat=False, dropout=p)
        self.p, self.elu_alpha = p, elu_alpha

    def forward(self, features: Features, adjacency: Adjacency) -> Tensor:
        parts = []
        for branch, x in zip(self.branches, features, strict=True):
            x = drop(x, self.p, self.training)
            if isinstance(x, SparseRows):  # GATConv also takes W x itself, as (n, heads, hidden)
                x = x.dense()
            parts.append(F.elu(branch(x, adjacency.edge_index), alpha=self.elu_alpha))
        x = F.dropout(torch.cat(parts, dim=1), self.p, self.training)
        return self.classifier(x, adjacency.edge_index)


class LAGCNII(nn.Module):
    """GCNII (arXiv:2007.02133), a deep GCN with initial residual and identity mapping; one input layer per branch.

        H_l+1 = relu(((1 - alpha) A H_l + alpha H_0) ((1 - t_l) I + t_l W_l)),   t_l = log(theta / l + 1)

    Args:
        features, hidden, classes, branches, p: as in `LAGCN`.
        layers: graph convolutions.
        alpha, theta: strength of the initial residual, and of the weights.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        classes: int,
        branches: int = 1,
        layers: int = 64,
        p: float = 0.6,
        alpha: float = 0.1,
        theta: float = 0.5,
    ):
        super().__init__()
        width = branches * hidden
        self.branches = nn.ModuleList(nn.Linear(features, hidden) for _ in range(branches))
        self.middle = nn.ParameterList(nn.Parameter(torch.empty(width, width)) for _ in range(layers))
        for weight in self.middle:
            nn.init.uniform_(weight, -1.0 / math.sqrt(width), 1.0 / math.sqrt(width))
        self.classifier = nn.Linear(width, classes)
        self.p, self.alpha, self.theta = p, alpha, theta

    def forward(self, features: Features, adjacency: Adjacency) -> Tensor:
        parts = [
            linear(drop(x, self.p, self.training), branch.weight.t()) + branch.bias
            for branch, x in zip(self.branches, features, strict=True)
        ]
        x = first = torch.cat(parts, dim=1).relu()
        for number, weight in enumerate(self.middle, 1):
            strength = math.log(self.theta / number + 1)
            x = adjacency @ F.dropout(x, self.p, self.training)
            x = torch.lerp(x, first, self.alpha)
            x = torch.lerp(x, x @ weight, strength).relu()
        return self.classifier(F.dropout(x, self.p, self.training))


class LAGRAND(nn.Module):
    """GRAND (arXiv:2005.11079): drop nodes, average 0 to ``order`` propagations, then an MLP.

    It takes one input at a time: own and generated features are separate views of the graph, tied by the consistency
    loss, and the own features alone decide at test time.

    Args:
        features, hidden, classes: as in `LAGCN`.
        order: propagations.
        drop_node, input_dropout, p: rates of dropped nodes, before the first layer, before the second.
        batch_norm: before both dropouts.
        shifted_init: the authors' initialisation, see `GraphLinear`.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        classes: int,
        order: int = 8,
        drop_node: float = 0.5,
        input_dropout: float = 0.5,
        p: float = 0.5,
        batch_norm: bool = False,
        shifted_init: bool = False,
    ):
        super().__init__()
        self.input_norm = nn.BatchNorm1d(features) if batch_norm else nn.Identity()
        self.hidden = GraphLinear(features, hidden, shifted_init)
        self.norm = nn.BatchNorm1d(hidden) if batch_norm else nn.Identity()
        self.classifier = GraphLinear(hidden, classes, shifted_init)
        self.order, self.drop_node, self.input_dropout, self.p = order, drop_node, input_dropout, p

    def forward(self, features: Features, adjacency: Adjacency) -> Tensor:
        (x,) = features
        if isinstance(x, SparseRows):
            x = x.dense()
        with torch.no_grad():  # no parameter yet
            keep = x.new_full((len(x), 1), 1.0 - self.drop_node)
            x = total = x * (torch.bernoulli(keep) if self.training else keep)
            for _ in range(self.order):
                x = adjacency @ x
                total = total + x
            x = total / (self.order + 1)
        x = self.hidden(dropout(self.input_norm(x), self.input_dropout, self.training)) + self.hidden.bias
        x = F.dropout(self.norm(x.relu()), self.p, self.training)
        return self.classifier(x) + self.classifier.bias


def augmentation_loss(
    log_probs: Tensor, y: Tensor, mask: Tensor, temperature: float = 0.5, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Loss of stage 2 on s outputs for the same nodes: labels on some nodes, consistency on all (Sec. 3.3).

        mean_s NLL(P_s),    lam mean_s mean_v ||P_s(v) - q(v)||^2,   q = P^(1/T) / sum_c P^(1/T),  P = mean_s P_s

    q is a target: no gradient goes through it.

    Shapes:
        log_probs: (s, n, c); y: (n) int64, anything where ``mask`` is False; mask: (n) bool
        returns: the two terms, () each
    """
    nll = -log_probs.gather(2, y.clamp(min=0).expand(len(log_probs), -1)[..., None])[..., 0]  # (s, n)
    supervised = (nll.mean(0) * mask).sum() / mask.sum()  # weights, not indices: nothing waits for the device
    probs = log_probs.exp()
    target = probs.mean(0).detach().pow(1.0 / temperature)
    target = target / target.sum(1, keepdim=True)
    return supervised, lam * (probs - target).square().sum(2).mean()


_SMALL: dict[str, Any] = {
    "in_features": 60,
    "num_classes": 4,
    "generator_hidden": 32,
    "generator_epochs": 1,
    "warmup": 20,
    "judge_epochs": 20,
    "judge_passes": 5,
    "judge_every": 4,
}


# ---- the method ------------------------------------------------------------------------------------------------------


class LAGNN(ZooModule):
    """Node classification with generated neighbour features as further inputs; any of four backbones.

    One `fit` does both stages. Stage 1 runs once, before the first training step (in ``on_train_batch_start``, on the
    batch that comes first), unless the generator is fitted already: after resuming, loading, or a call of
    `fit_generator`. Its result is saved with the model. From then on a step is one update of the backbone by one whole
    graph, an epoch one step a graph. Each validation within `fit` draws a fresh sample by a seed that is saved with
    the weights (``noise_seed``), so that the best checkpoint, by the lowest validation loss, holds the best model and
    its sample: tests and predictions draw that very sample again, on any device.

    Batch (a dict, or a torch_geometric ``Data``): "x" (n, in_features) float, raw features (the model normalises them);
    "edge_index" (2, e) int64, every undirected edge twice; "y" (n) int64, -1 where unknown; "train_mask", "val_mask",
    "test_mask" (n) bool; "name": list[str], optional. A loader that yields the same object again says: the same
    graph. It then is checked once.

    Args:
        in_features: features a node.
        num_classes: classes.
        backbone_name: "gcn", "gat", "gcnii" or "grand".
        augment: "generator"; "none", the plain backbone with the plain loss (the baseline); or "self", a control: the
            own features take the place of the generated ones, all else (branches, samples, consistency) unchanged.
        concat: generated inputs k beside the own features.
        samples: outputs a training step, each with fresh generated inputs and dropout.
        temperature: T of the sharpening.
        lam: weight of the consistency term.
        hidden: hidden units (of one branch; of one head with "gat").
        layers: graph convolutions ("gcn", "gcnii").
        dropout: rate before every layer but the first.
        input_dropout: rate before the first layer; None takes ``dropout``.
        batch_norm: batch norm after every layer but the last ("gcn"), before the dropouts ("grand").
        heads: attention heads of the first layer ("gat").
        out_heads: attention heads of the second layer ("gat").
        elu_alpha: of the ELU ("gat").
        alpha: strength of the initial residual ("gcnii").
        theta: strength of the weights ("gcnii"; lambda in its paper).
        order: propagations ("grand").
        drop_node: rate of dropped nodes ("grand").
        lr: learning rate of the backbone (Adam).
        weight_decay: L2 penalty of the backbone.
        conv_weight_decay: another penalty for the graph convolutions of "gcnii"; None takes ``weight_decay``.
        row_normalise: divide every node's features, own and generated, by their sum; False for real-valued ones.
        likelihood: "bernoulli" for features in [0, 1], "gaussian" for real ones (batch norm, tanh, squared error).
        latent: size of z.
        generator_hidden: hidden units of the generator.
        generator_lr: its learning rate (Adam).
        generator_batch: edges a step of stage 1.
        generator_epochs: passes over the edges in stage 1.
        generator_steps: stops stage 1 after so many steps; None goes on to the last pass.
        select: choose among the generators of all steps by the judge; False takes the last one (the OGB form).
        warmup: steps of stage 1 before the first choice.
        judge_epochs: updates of the judge on the real features before stage 1.
        judge_updates: further updates on the generated features after each choice.
        judge_passes: passes m of the judge a U score.
        judge_every: a U score every so many steps; 1 is the paper's, 10 costs a tenth.
        generator_file: safetensors file with a generator that `pretrain_generator` has trained; it takes the place of
            stage 1 (the authors' protocol: one generator a graph, many runs of stage 2). Read when `fit` starts.
        authors_init: the authors' initialisation of GCN and GRAND, see `GraphLinear`.
        authors_warmup: scores during warm-up count as the best so far.
        authors_batch_statistics: draw with batch statistics (``likelihood="gaussian"``).
    Raises:
        ValueError: for an unknown choice, or sizes below 1.
        ImportError: for "gat" without torch_geometric.
    Example:
        >>> from zoo.graph import LAGNN, NodeClassificationDataModule
        >>> import zoo
        >>> trainer = zoo.Trainer(max_epochs=2, enable_model_summary=False, enable_progress_bar=False)
        >>> trainer.fit(LAGNN.from_variant("tiny"), datamodule=NodeClassificationDataModule())
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": _SMALL,
        "citeseer": {"in_features": 3703, "num_classes": 6},
        "pubmed": {"in_features": 500, "num_classes": 3, "hidden": 4, "concat": 3, "lr": 0.02, "latent": 5},
        "gat": {"backbone_name": "gat", "dropout": 0.6},
        "gat_tiny": {**_SMALL, "backbone_name": "gat", "dropout": 0.6},
        "gcnii": {
            "backbone_name": "gcnii",
            "hidden": 32,
            "layers": 64,
            "dropout": 0.6,
            "conv_weight_decay": 0.01,
            "lam": 0.0,
        },
        "grand": {"backbone_name": "grand", "hidden": 32},
        "ogb_arxiv": {
            "in_features": 128,
            "num_classes": 40,
            "hidden": 128,
            "layers": 3,
            "samples": 2,
            "batch_norm": True,
            "input_dropout": 0.0,
            "weight_decay": 0.0,
            "row_normalise": False,
            "likelihood": "gaussian",
            "generator_lr": 1e-5,
            "generator_steps": 20,
            "select": False,
        },
    }
    monitor, mode = "val/loss", "min"
    head = ("net.classifier",)

    def __init__(
        self,
        in_features: int = 1433,
        num_classes: int = 7,
        backbone_name: str = "gcn",
        augment: str = "generator",
        concat: int = 1,
        samples: int = 4,
        temperature: float = 0.5,
        lam: float = 1.0,
        hidden: int = 8,
        layers: int = 2,
        dropout: float = 0.5,
        input_dropout: float | None = None,
        batch_norm: bool = False,
        heads: int = 4,
        out_heads: int = 1,
        elu_alpha: float = 0.2,
        alpha: float = 0.1,
        theta: float = 0.5,
        order: int = 8,
        drop_node: float = 0.5,
        lr: float = 0.01,
        weight_decay: float = 5e-4,
        conv_weight_decay: float | None = None,
        row_normalise: bool = True,
        likelihood: str = "bernoulli",
        latent: int = 10,
        generator_hidden: int = 256,
        generator_lr: float = 0.01,
        generator_batch: int = 64,
        generator_epochs: int = 10,
        generator_steps: int | None = None,
        select: bool = True,
        warmup: int = 200,
        judge_epochs: int = 100,
        judge_updates: int = 20,
        judge_passes: int = 100,
        judge_every: int = 1,
        generator_file: str | None = None,
        authors_init: bool = False,
        authors_warmup: bool = False,
        authors_batch_statistics: bool = False,
    ):
        super().__init__()
        self.save_hyperparameters()
        for name, choices in (
            ("backbone_name", ("gcn", "gat", "gcnii", "grand")),
            ("augment", ("generator", "none", "self")),
            ("likelihood", ("bernoulli", "gaussian")),
        ):
            if self.hparams[name] not in choices:
                raise ValueError(f"LAGNN: {name} is {self.hparams[name]!r}; it must be one of {', '.join(choices)}.")
        for name in ("in_features", "num_classes", "concat", "samples", "hidden", "generator_batch", "judge_every"):
            if self.hparams[name] < 1:
                raise ValueError(f"LAGNN: {name} is {self.hparams[name]}; it must be at least 1.")
        if layers < 2:
            raise ValueError(f"LAGNN: layers is {layers}; a backbone has at least 2.")

        branches = 1 if augment == "none" else concat + 1
        before = dropout if input_dropout is None else input_dropout
        sizes = (in_features, hidden, num_classes)
        if backbone_name == "gcn":
            self.net = LAGCN(*sizes, branches, layers, before, dropout, batch_norm, authors_init)
        elif backbone_name == "gat":
            self.net = LAGAT(*sizes, branches, heads, out_heads, dropout, elu_alpha)
        elif backbone_name == "gcnii":
            self.net = LAGCNII(*sizes, branches, layers, dropout, alpha, theta)
        else:
            self.net = LAGRAND(*sizes, order, drop_node, before, dropout, batch_norm, authors_init)

        self.generator: Generator | None = None
        if augment == "generator":
            self.generator = Generator(in_features, generator_hidden, latent, likelihood, authors_batch_statistics)
            self.freeze("generator")  # stage 1 trains a copy and writes the chosen weights back
        # The seed of the sample that evaluation uses: a start, another one for every initialisation of the weights, and
        # the step of the last validation within `fit`.
        self.register_buffer("noise_start", torch.randint(2**48, ()))
        self.register_buffer("noise_seed", self.noise_start.clone())
        self.register_buffer("generator_fitted", torch.tensor(augment != "generator"))
        self._graph, self._condition, self._checked = Remember(), Remember(), Remember()
        self._ready = False

    # ---- the two inputs and the forward pass --------------------------------------------------------------------

    def graph(self, x: Tensor, edge_index: Tensor) -> tuple[Adjacency, Tensor | SparseRows]:
        """Normalised adjacency and own features as the backbone takes them; made once for a graph."""

        def make(x: Tensor, edge_index: Tensor) -> tuple[Adjacency, Tensor | SparseRows]:
            own = row_normalise(x) if self.hparams.row_normalise else x
            return Adjacency(edge_index, len(x), x.dtype), as_features(own)

        return self._graph(make, x, edge_index)

    @torch.no_grad()
    def draw(self, x: Tensor, seed: int | None = None) -> Tensor:
        """k generated inputs for all nodes, conditioned on their own features.

        Args:
            seed: of a generator of its own, for the same numbers on every device; None draws from torch's.
        Shapes:
            x: (n, f) raw features; returns: (k, n, f), row-normalised as the model's own features
        """
        assert self.generator is not None
        shape = (self.hparams.concat, len(x), self.generator.latent)
        if seed is None:
            noise = torch.randn(shape, device=x.device, dtype=x.dtype)
        else:
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(x.device, x.dtype)
        weights = (self.generator.decoder.weight, self.generator.decoder.bias)
        condition = self._condition(lambda x, *_: self.generator.condition(x), x, *weights)
        drawn = self.generator.decode(noise.flatten(0, 1), condition.repeat(shape[0], 1))
        drawn = row_normalise(drawn) if self.hparams.row_normalise else drawn
        return drawn.view(*shape[:2], -1)

    def forward(self, x: Tensor, edge_index: Tensor, augmented: Tensor | None = None) -> Tensor:
        """Class logits of all nodes.

        Args:
            augmented: generated inputs as `draw` gives them. None draws: fresh ones in train mode, those of
                ``noise_seed`` in eval mode.
        Shapes:
            x: (n, in_features) raw features; edge_index: (2, e) int64; augmented: (k, n, in_features)
            returns: (n, num_classes)
        Raises:
            ValueError: for other shapes, an unknown node in ``edge_index``, or for ``augmented``.
        """
        return self.views(x, edge_index, augmented)[-1]

    def views(self, x: Tensor, edge_index: Tensor, augmented: Tensor | None = None) -> list[Tensor]:
        """All outputs of one sample: one, or with "grand" in train mode one an input, the own features' last."""
        check_graph(x, edge_index, self.hparams.in_features)
        adjacency, own = self.graph(x, edge_index)
        separate = self.hparams.backbone_name == "grand"
        if separate and not self.training:
            return [self.net([own], adjacency)]
        features: Features = []
        if self.hparams.augment == "self":
            features = [own] * self.hparams.concat
        elif self.hparams.augment == "generator":
            if augmented is None:
                stored = not self.training and not x.is_meta
                augmented = self.draw(x, int(self.noise_seed) if stored else None)
            if augmented.shape != (self.hparams.concat, *x.shape):
                raise ValueError(
                    f"'augmented' has shape {tuple(augmented.shape)}; expected {(self.hparams.concat, *x.shape)}: "
                    "concat generated inputs, as `draw` gives them."
                )
            features = list(augmented)
        features.append(own)
        return [self.net([f], adjacency) for f in features] if separate else [self.net(features, adjacency)]

    # ---- stage 1 ------------------------------------------------------------------------------------------------

    def fit_generator(self, x: Tensor, edge_index: Tensor, y: Tensor, mask: Tensor) -> dict[str, float]:
        """Stage 1: train the generator on the edges and keep the one that the judge likes best.

        Only the labels of training nodes are seen. Draws from torch's random state. Plain PyTorch loops call it
        themselves.

        Args:
            mask: the training nodes.
        Shapes:
            x: (n, f) raw features; edge_index: (2, e); y: (n) int64; mask: (n) bool
        Returns:
            "step" and "score" (U) of the generator kept; the score is NaN where no judge chose.
        Raises:
            ZooError: if there is no edge to learn from.
            ValueError: if ``likelihood`` is "bernoulli" and features lie outside of [0, 1].
        """
        check_graph(x, edge_index, self.hparams.in_features)
        hp, generator = self.hparams, self.generator
        if generator is None:
            return {"step": 0, "score": math.nan}
        low, high = (float(v) for v in torch.aminmax(x))
        if hp.likelihood == "bernoulli" and (low < 0.0 or high > 1.0):
            raise ValueError(
                f"'x' lies in [{low:g}, {high:g}]; likelihood='bernoulli' takes features in [0, 1]. Scale them, or use "
                "likelihood='gaussian' and row_normalise=False."
            )
        pairs = edge_index[:, edge_index[0] != edge_index[1]]
        if pairs.shape[1] == 0:
            raise ZooError("LAGNN: the graph has no edges to train the generator on. Use augment='none'.")

        generator = copy.deepcopy(generator).requires_grad_(True).train()
        optimizer = torch.optim.Adam(generator.parameters(), lr=hp.generator_lr)
        judge = None
        if hp.select:
            settings = (hp.num_classes, hp.row_normalise, hp.judge_epochs, hp.judge_passes, hp.authors_init)
            judge = Judge(x, edge_index, y, mask, *settings)
        best, chosen, kept, step = -math.inf, (0, math.nan), None, 0
        order = (
            edges
            for _ in range(hp.generator_epochs)
            for edges in torch.randperm(pairs.shape[1], device=x.device).split(hp.generator_batch)
        )
        for edges in itertools.islice(order, hp.generator_steps):
            step += 1
            neighbour, center = x[pairs[0, edges]], x[pairs[1, edges]]
            with torch.enable_grad():
                output, mean, log_variance = generator(neighbour, center)
                loss = generator_loss(output, neighbour, mean, log_variance, hp.likelihood)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            if judge is None or step % hp.judge_every or (step <= hp.warmup and not hp.authors_warmup):
                continue
            drawn = judge.draw(generator)
            score = judge.score(drawn)
            if score > best:
                best = score
                if step > hp.warmup:
                    chosen, kept = (step, score), copy.deepcopy(generator.state_dict())
                    judge.update(drawn, hp.judge_updates)
        if kept is None:
            if judge is not None:
                log.warning("No generator was chosen in %d steps (warm-up %d); the last one is kept.", step, hp.warmup)
            chosen, kept = (step, math.nan), generator.state_dict()
        self.generator.load_state_dict(kept)
        self.generator_fitted.fill_(True)
        log.info("LAGNN: generator of step %d of %d kept, U score %.4f.", chosen[0], step, chosen[1])
        return {"step": chosen[0], "score": chosen[1]}

    def load_generator(self, content: Mapping[str, Any]) -> None:
        """Take the generator from an authors' state dict (`read_authors_generator`) instead of stage 1.

        Raises:
            ZooError: if there is no generator of this size in it.
        """
        if self.generator is None:
            raise ZooError("LAGNN: augment is not 'generator'; there is nothing to load a generator into.")
        state = _generator_state(content)
        refuse_difference("LAGNN's generator", self.generator.state_dict(), state)
        self.generator.load_state_dict(state)
        self.generator_fitted.fill_(True)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._ready = bool(self.generator_fitted)  # looked at once: a buffer on a GPU would be waited for in every step

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._ready:
            return
        self._ready = True
        if self.generator is not None and self.hparams.generator_file:
            if not Path(self.hparams.generator_file).is_file():
                raise FileNotFoundError(
                    f"LAGNN: generator_file {self.hparams.generator_file} does not exist. `pretrain_generator` writes "
                    "one; generator_file=None trains a generator first."
                )
            state = load_file(self.hparams.generator_file)
            refuse_difference("LAGNN's generator", self.generator.state_dict(), state)
            self.generator.load_state_dict(state)
            self.generator_fitted.fill_(True)
            return
        self.fit_generator(batch["x"], batch["edge_index"], batch["y"], _mask(batch, "train"))
        if self.trainer.world_size > 1:  # every rank fitted one; they differ where their devices round differently
            state = self.trainer.strategy.broadcast({k: v.cpu() for k, v in self.generator.state_dict().items()})
            self.generator.load_state_dict(state)

    # ---- stage 2 ------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, edge_index, y, mask = batch["x"], batch["edge_index"], batch["y"], _mask(batch, "train")
        if self.hparams.augment == "none":
            log_probs = self(x, edge_index).log_softmax(-1)[None]
            loss, _ = augmentation_loss(log_probs, y, mask)
        else:
            outputs = [v for _ in range(self.hparams.samples) for v in self.views(x, edge_index)]
            log_probs = torch.stack(outputs).log_softmax(-1)
            supervised, consistency = augmentation_loss(log_probs, y, mask, self.hparams.temperature, self.hparams.lam)
            loss = supervised + consistency
            self.log("train/consistency", consistency.detach(), batch_size=1)
        self.log("train/loss", loss.detach(), batch_size=1)
        return loss

    def on_validation_epoch_start(self) -> None:
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            # A fresh sample; the best checkpoint holds the seed that it was validated with. It follows from the step,
            # so that a resumed run draws what an unbroken one draws.
            self.noise_seed.copy_(self.noise_start + self.trainer.global_step)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Any, split: str) -> None:
        """Logs loss and accuracy on the nodes of a split, and in tests accuracy on those with at most 2 neighbours."""
        y, edge_index = batch["y"], batch["edge_index"]
        logits = self(batch["x"], edge_index)
        groups = {"": _mask(batch, split)}
        if split == "test":
            real = (edge_index[0] != edge_index[1]).long()
            degree = torch.zeros_like(y).index_add(0, edge_index[1], real)
            groups["_low_degree"] = groups[""] & (degree <= 2)
        for suffix, mask in groups.items():
            nodes = mask.nonzero().flatten()
            if len(nodes) == 0:
                continue
            correct = logits[nodes].argmax(1) == y[nodes]
            self.log(f"{split}/accuracy{suffix}", correct.float().mean(), batch_size=len(nodes), on_epoch=True)
            if not suffix:
                loss = F.cross_entropy(logits[nodes].float(), y[nodes])
                self.log(f"{split}/loss", loss, batch_size=len(nodes), on_epoch=True, prog_bar=split == "val")

    def example_inputs(self) -> tuple[Tensor, ...]:
        """A ring of 8 nodes; an exported graph takes the generated inputs (of `draw`) as its third argument."""
        nodes = torch.arange(8, device=self.device)
        ring = torch.stack((nodes, nodes.roll(1)))
        x = torch.ones(8, self.hparams.in_features, device=self.device)
        inputs = (x, torch.cat((ring, ring.flip(0)), dim=1))
        return (*inputs, self.draw(x, seed=0)) if self.generator is not None else inputs

    def predict(self, x: Tensor, edge_index: Tensor) -> Tensor:  # type: ignore[override]
        """Class probabilities of all nodes, with the stored sample.

        Shapes:
            x: (n, in_features) raw features; edge_index: (2, e); returns: (n, num_classes)
        Raises:
            ValueError: if a feature is NaN or infinite.
        """
        check_finite(x, "x")
        return super().predict(x, edge_index).softmax(-1)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """ "name": list[str] (the position where the batch has none); "class": (n) int64; "probability": (n, c)."""
        probability = self.predict(batch["x"], batch["edge_index"])
        names = batch["name"] if "name" in batch else [str(i) for i in range(len(probability))]
        return {"name": list(names), "class": probability.argmax(1), "probability": probability}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        hp = self.hparams
        named = {name: p for name, p in self.named_parameters() if p.requires_grad}
        decay = hp.conv_weight_decay if hp.backbone_name == "gcnii" else None
        deep = {name for name in named if name.startswith("net.middle.") and decay is not None}
        groups: list[dict[str, Any]] = [{"params": [p for name, p in named.items() if name not in deep]}]
        if deep:
            groups.append({"params": [named[name] for name in named if name in deep], "weight_decay": decay})
        return torch.optim.Adam(groups, lr=hp.lr, weight_decay=hp.weight_decay)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        check = super().on_before_batch_transfer
        return self._checked(lambda batch: check(batch, dataloader_idx), batch)  # the same graph again: checked

    # ---- authors' checkpoints -----------------------------------------------------------------------------------

    @classmethod
    def convert_state_dict(cls, content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """From the state dicts of the authors' ``LAGCN`` and ``VAE`` in one dict (their keys do not clash).

        What the authors published is generators alone: `read_authors_generator` and `load_generator` take those.

        Raises:
            ZooError: if either part is missing, or keys are left over.
        """
        content = dict(unwrap(content))
        parts = ("encoder.", "decoder.")
        generator = _generator_state({key: content.pop(key) for key in list(content) if key.startswith(parts)})
        branches = len({key.split(".")[1] for key in content if key.startswith("gcn1_list.")})
        names = {f"gcn1_list.{i}.{p}": f"branches.{i}.{p}" for i in range(branches) for p in ("weight", "bias")}
        names |= {f"gc2.{p}": f"classifier.{p}" for p in ("weight", "bias")}
        if branches < 2 or content.keys() != names.keys():
            raise ZooError(
                f"No LAGCN of the authors here: expected gcn1_list.*, gc2.* of at least 2 branches, found "
                f"{', '.join(sorted(content)) or 'a generator alone'}. A generator alone goes into "
                "LAGNN(...).load_generator(...)."
            )
        hidden, latent = generator["encoder.weight"].shape[0], generator["mean.weight"].shape[0]
        hyperparameters = {
            "in_features": content["gcn1_list.0.weight"].shape[0],
            "hidden": content["gcn1_list.0.weight"].shape[1],
            "num_classes": content["gc2.bias"].shape[0],
            "concat": branches - 1,
            "generator_hidden": hidden,
            "latent": latent,
            "likelihood": "gaussian" if "output_norm.weight" in generator else "bernoulli",
        }
        state = {f"net.{names[key]}": value for key, value in content.items()}
        state |= {f"generator.{key}": value for key, value in generator.items()}
        state |= {"noise_start": torch.tensor(0), "noise_seed": torch.tensor(0), "generator_fitted": torch.tensor(True)}
        return hyperparameters, state


def pretrain_generator(folder: Path, seed: int, root: str | None = None, **model: Any) -> None:
    """Stage 1 alone: writes ``generator.safetensors`` into ``folder``, for ``LAGNN(generator_file=...)``.

    Args:
        root: the graph's folder, as in the DataModule.
        model: hyperparameters of `LAGNN`; sizes that the graph tells may be left out.
    """
    from zoo.core.recipe import build
    from zoo.graph.node.data_nodes import NodeClassificationDataModule

    torch.manual_seed(seed)
    data = NodeClassificationDataModule(root)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    net = build(LAGNN, data, model)
    net.fit_generator(batch["x"], batch["edge_index"], batch["y"], _mask(batch, "train"))
    save_file(net.generator.state_dict(), folder / "generator.safetensors")


def _mask(batch: Any, split: str) -> Tensor:
    """The labelled nodes of a split.

    Raises:
        KeyError: naming the key that a batch lacks.
    """
    key = f"{split}_mask"
    for name in (key, "y"):
        if name not in batch:
            raise KeyError(f"The batch has no {name!r}; LAGNN needs 'y' (n,) int64 and {key!r} (n,) bool here.")
    return batch[key] & (batch["y"] >= 0)


def _generator_state(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The authors' ``VAE`` state dict as ours.

    Raises:
        ZooError: naming keys that are missing or left over.
    """
    names = {"encoder.MLP.L0": "encoder", "encoder.MLP.B0": "encoder_norm", "encoder.linear_means": "mean"}
    names |= {"encoder.linear_log_var": "log_variance", "decoder.MLP.L0": "decoder", "decoder.MLP.B0": "decoder_norm"}
    names |= {"decoder.MLP.L1": "output", "decoder.MLP.B1": "output_norm"}
    state, unknown = {}, []
    for key, value in content.items():
        stem, _, tensor = key.rpartition(".")
        if stem in names:
            state[f"{names[stem]}.{tensor}"] = value
        else:
            unknown.append(key)
    missing = [key for key, ours in names.items() if ".B" not in key and f"{ours}.weight" not in state]
    if unknown or missing:
        raise ZooError(
            f"No generator of the authors: missing {missing or 'nothing'}, unexpected {unknown or 'nothing'}."
        )
    return state


class _Pickled:
    """Stands in for the classes inside the authors' pickled generators: it only holds what they held."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        own = {**self.__dict__.get("_parameters", {}), **self.__dict__.get("_buffers", {})}
        found = {prefix + key: value.detach() for key, value in own.items() if value is not None}
        for key, child in self.__dict__.get("_modules", {}).items():
            found |= child.tensors(f"{prefix}{key}.")
        return found


def read_authors_generator(path: str | Path) -> dict[str, Tensor]:
    """The state dict inside one of the authors' ``model/*.pkl`` files, which are pickled modules.

    Read without running anything in the file: torch's restricted unpickler, with a stand-in for their classes.

    Raises:
        FileNotFoundError: if there is no such file.
        ZooError: if it is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected a generator of the authors, such as model/pubmed.pkl.")
    layers = ("container.Sequential", "linear.Linear", "activation.ReLU", "activation.Sigmoid", "activation.Tanh")
    names = [f"torch.nn.modules.{name}" for name in (*layers, "batchnorm.BatchNorm1d")]
    names += [f"cvae_models.{name}" for name in ("VAE", "Encoder", "Decoder")]
    # One class cannot stand for several names.
    stand_ins = [(type("Pickled", (_Pickled,), {}), name) for name in names]
    try:
        with torch.serialization.safe_globals([*stand_ins, set]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        return content.tensors()
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ZooError(f"{path} is no pickled generator of the authors: {reason[0] if reason else error}") from error
