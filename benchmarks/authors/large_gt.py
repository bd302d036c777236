"""LargeGT beside the authors' code (snap-research/LargeGT): their network, codebook, sequences and averages run."""

import contextlib
import io
import random
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import error, float64, in_turns
from zoo.graph.node.data_tokens import Rows, averages, exact_sequences, quantile_labels
from zoo.graph.node.large_gt import LargeGT, _names

SIZES = {"in_channels": 7, "hidden_channels": 12, "out_channels": 4, "global_dim": 5, "heads": 2, "num_centroids": 11}
K = 6


def _error(ours: Tensor, theirs: Tensor) -> float:
    return error(ours.double(), theirs.double())


def _rearrange(x: Tensor, pattern: str, h: int = 0) -> Tensor:
    """The two patterns that their network asks of einops."""
    if pattern == "n (h d) -> h n d":
        return x.view(len(x), h, -1).transpose(0, 1)
    assert pattern == "h n d -> n (h d)"
    return x.transpose(0, 1).reshape(x.shape[1], -1)


@contextlib.contextmanager
def _package(checkout: Path) -> Iterator[tuple[Any, Any, Any]]:
    """Their modules ``model``, ``data`` and ``data_utils``; packages that are missing here are stood in for."""
    before = dict(sys.modules)
    stubs = {
        "einops": {"rearrange": _rearrange},
        "ogb": {},
        "ogb.nodeproppred": {"DglNodePropPredDataset": None},
    }
    for name, content in stubs.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        sys.modules[name] = module
    sys.path.insert(0, str(checkout))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import data
            import data_utils
            import model
        yield model, data, data_utils
    finally:
        sys.path.remove(str(checkout))
        for name in ("model", "data", "data_utils", "codebook", "local_module", *stubs):
            sys.modules.pop(name, None)
            if name in before:
                sys.modules[name] = before[name]


def _batch(nodes: int = 40, size: int = 9, seed: int = 0, sizes: dict[str, int] = SIZES, k: int = K) -> dict[str, Any]:
    """A batch in our form, and the sequences of features as theirs takes them."""
    generator = torch.Generator().manual_seed(seed)
    f, g = sizes["in_channels"], sizes["global_dim"]
    features = torch.randn(nodes, 3, f, generator=generator)
    node = torch.randperm(nodes, generator=generator)[:size]
    tokens = torch.randint(nodes, (size, k), generator=generator)
    tokens[:, 0] = node
    return {
        "features": features,
        "tokens": tokens,
        "pos_enc": torch.randn(size, g, generator=generator),
        "node": node,
        "y": torch.randint(sizes["out_channels"], (size,), generator=generator),
    }


def _theirs(package: Any, kind: str, nodes: int = 40, sizes: dict[str, int] = SIZES, k: int = K, **more: Any) -> Any:
    arguments = {"norm_type": "batch_norm", "no_bn": False, **more}
    network = package.LargeGT(
        num_nodes=nodes,
        num_layers=1,
        ff_dropout=0.5,
        attn_dropout=0.0,
        skip=False,
        conv_type=kind,
        sample_node_len=k,
        **{**sizes, **arguments},
    )
    for part in network.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return network


def _ours(theirs: nn.Module, **arguments: Any) -> LargeGT:
    """Ours with their weights, through `convert_state_dict`, dropout off."""
    hyperparameters, state = LargeGT.convert_state_dict({"model": theirs.state_dict()})
    quiet = {"dropout": 0.0, "local_dropout": 0.0, "authors_key_gradient": True}
    model = LargeGT(**{**hyperparameters, **quiet, **arguments})
    model.load_state_dict(state)
    model.log = lambda *a, **k: None  # type: ignore[method-assign]
    return model


def _call(theirs: Any, batch: dict[str, Any], kind: str) -> Tensor:
    """A forward pass as their script makes it."""
    x, seq = batch["features"][batch["node"], 0], batch["features"][batch["tokens"]].flatten(1, 2)
    if kind == "global":
        return theirs.global_forward(x, batch["pos_enc"], batch["node"])
    return theirs(seq, x, x if kind == "local" else batch["pos_enc"], batch["node"])


def _pairs(ours: LargeGT, theirs: nn.Module, kind: str, norm: str, gradient: bool = False) -> dict[str, Any]:
    """Our parameters (or their gradients) beside theirs, by our names."""
    own, other, found = dict(ours.named_parameters()), dict(theirs.named_parameters()), {}
    for key, name in _names(kind, norm).items():
        if name in own:
            a, b = (own[name].grad, other[key].grad) if gradient else (own[name], other[key])
            assert a is not None and b is not None, name
            found[name] = (a, b[:, b.shape[1] // 2 :] if name == "local.score.weight" else b)
    assert found.keys() == own.keys()
    return found


def _layers(pairs: dict[str, Any]) -> float:
    """The largest error of gradients, each layer's weight and bias as one vector: biases before a batch norm have
    gradients that are all rounding."""
    joined: dict[str, list[Any]] = {}
    for name, pair in pairs.items():
        joined.setdefault(name.rpartition(".")[0], []).append([t.flatten() for t in pair])
    return max(_error(*(torch.cat(side) for side in zip(*parts, strict=True))) for parts in joined.values())


def _run(package: Any, kind: str, norm: str = "batch", steps: int = 1, spread: bool = False, **given: Any) -> Any:
    """Evaluation, training forward, loss, gradients, codebook and weights of ``steps`` steps.

    Args:
        spread: begin with a codebook that belongs to itself, not with their random one over sizes of 0.
    """
    torch.manual_seed(0)
    arguments = {"batch": {}, "layer": {"norm_type": "layer_norm"}, "none": {"no_bn": True}}[norm]
    double = torch.get_default_dtype() == torch.float64
    theirs = _theirs(package, kind, **arguments, **given)
    if spread and kind != "local":
        book = theirs.convs[0].vq
        book._ema_cluster_size.uniform_(1, 5)
        book._ema_w.copy_(book._embedding * book._ema_cluster_size[:, None])
        book._embedding_output.copy_(book._embedding)
    ours = _ours(theirs)
    options = {"sizes": given.get("sizes", SIZES), "k": given.get("k", K), "nodes": given.get("nodes", 40)}
    optimizers = [torch.optim.Adam(theirs.parameters(), lr=1e-3), ours.configure_optimizers()]
    found: dict[str, float] = {}

    def note(key: str, value: float) -> None:
        found[key] = max(found.get(key, 0.0), value)

    for step in range(steps):
        batch = _batch(**options, size=9 + step, seed=step)
        theirs.eval(), ours.eval()
        with torch.no_grad():
            note("forward", _error(ours.logits(batch), _call(theirs, batch, kind)))
        theirs.train(), ours.train()
        output = _call(theirs, batch, kind)
        loss = F.cross_entropy(output, batch["y"])
        before = {k: v.clone() for k, v in ours.state_dict().items()}
        note("train_forward", _error(ours.logits(batch), output))
        ours.load_state_dict(before)  # that pass has moved the codebook and the norms
        mine = ours.training_step(batch, 0)
        note("loss", _error(mine, loss))
        for optimizer, value in zip(optimizers, (loss, mine), strict=True):
            optimizer.zero_grad()
            value.backward()
        note("gradients", _layers(_pairs(ours, theirs, kind, norm, True)))
        for optimizer in optimizers:
            optimizer.step()
        if double:
            note("step", _layers(_pairs(ours, theirs, kind, norm)))
        if kind != "local":
            book_of, state = ours.codebook, theirs.convs[0].state_dict()
            names = {"embedding": "_embedding", "centroids": "_embedding_output", "size": "_ema_cluster_size"}
            names |= {"total": "_ema_w", "mean": "bn.running_mean", "variance": "bn.running_var"}
            errors = [_error(getattr(book_of, a), state[f"vq.{b}"]) for a, b in names.items()]
            note("codebook", max(errors))
            same = torch.equal(book_of.assigned.long(), theirs.convs[0].c_idx.long())
            counts = torch.bincount(theirs.convs[0].c_idx.long(), minlength=len(book_of.count))
            note("assignments", float(not (same and torch.equal(counts, book_of.count))))
    return found


def compare(checkout: Path) -> dict[str, float]:
    """Largest relative errors in float32, dropout off; in float64 (so labelled) also the weights after steps of Adam,
    which moves a weight by the sign of its gradient at first, and some gradients are all rounding. At the paper's size
    gradients are compared in float64 alone: in float32 either side's are up to 1e-5 (a layer) from exact ones.
    """
    found: dict[str, float] = {}

    def note(label: str, figures: dict[str, float]) -> None:
        found.update({f"{label}_{key}": value for key, value in figures.items()})

    large = {"in_channels": 100, "hidden_channels": 256, "out_channels": 47, "global_dim": 64, "heads": 2}
    with _package(checkout) as (model, data, utils):
        for kind in ("full", "local", "global"):
            note(kind, _run(model, kind))
        for norm in ("layer", "none"):
            note(f"norm_{norm}", _run(model, "full", norm))
        note("spread", _run(model, "full", spread=True))
        paper: dict[str, Any] = {"sizes": {**large, "num_centroids": 4096}, "k": 10, "nodes": 200}
        figures = _run(model, "full", spread=True, **paper)
        note("paper", {key: value for key, value in figures.items() if key != "gradients"})
        with float64():
            note("paper_float64", _run(model, "full", spread=True, **paper))
            for kind in ("full", "local", "global"):
                note(f"{kind}_float64", _run(model, kind, steps=3, spread=True))
        found["key_gradient"] = _key_gradient(model)
        found |= _tokens(data, utils)
    return found


def _key_gradient(package: Any) -> float:
    """The gradients that ours computes by default are theirs with a codebook that stays where it is."""
    torch.manual_seed(0)
    theirs = _theirs(package, "full")
    ours, batch = _ours(theirs, authors_key_gradient=False), _batch()
    theirs.convs[0].vq.update = lambda x: torch.zeros(len(x), 1, dtype=torch.int64)
    F.cross_entropy(_call(theirs, batch, "full"), batch["y"]).backward()
    ours.training_step(batch, 0).backward()
    return _layers(_pairs(ours, theirs, "full", "batch", True))


def _tokens(data: Any, utils: Any) -> dict[str, float]:
    """Their sequences, averages, collating and labels, on a directed graph without double edges."""
    import scipy.sparse

    n, k = 120, 12
    generator = torch.Generator().manual_seed(3)
    edges = torch.randint(n - 2, (2, 260), generator=generator)  # the last two nodes have no edges
    edges = torch.unique(edges[:, edges[0] != edges[1]], dim=1)
    x = torch.randn(n, 5, generator=generator)
    matrix = scipy.sparse.csr_matrix((np.ones(edges.shape[1]), edges.numpy()), shape=(n, n), dtype=np.int64)
    random.seed(0)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        sequences, context = utils.create_node_ids(x, matrix, sample_node_len=k)
    theirs, rows = torch.tensor(sequences), Rows(edges, n)
    ours = torch.empty(n, k, dtype=torch.int32)
    exact_sequences(rows, k, generator, ours)
    near, two = (np.split(m.indices, m.indptr)[1:-1] for m in (matrix, matrix @ matrix))
    wrong = 0
    for i in range(n):
        multiset = Counter([*near[i].tolist(), *two[i].tolist()])
        if 0 < multiset.total() < k - 1:  # no choice: the very same
            wrong += not torch.equal(ours[i].long(), theirs[i])
            continue
        for drawn in (ours[i], theirs[i]):
            part = Counter(drawn[1:].tolist())
            wrong += int(drawn[0]) != i or (bool(multiset) and not part <= multiset) or part.total() != k - 1
            wrong += not multiset and max(part.values()) > 1
    features = torch.empty(n, 3, 5)
    features[:, 0] = x
    averages(rows, features, 2)
    tokens = object.__new__(data.LargeGTTokens)
    tokens.nodes_in_seq, tokens.X, tokens.hop2token_feats = theirs, x, context
    tokens.token_len, tokens.input_dim = k, 5
    nodes = [5, 119, 0, 7]
    collated, _ = tokens.collate_new(nodes, None)
    years = np.random.default_rng(0).integers(1963, 2000, 500).astype(float)
    labels = torch.from_numpy(data.even_quantile_labels(years, 5, verbose=False))
    return {
        "sequences": float(wrong),
        "averages": _error(features[:, 1:], context[:, :2]),
        "collated": _error(features[theirs[nodes]].flatten(1, 2), collated),
        "labels": float(not torch.equal(quantile_labels(years), labels)),
    }


def golden(checkout: Path) -> dict[str, Tensor]:
    """A tiny batch, their weights, and what their code makes of both in the three forms, in float64."""
    tensors: dict[str, Tensor] = {}
    sizes = {"in_channels": 5, "hidden_channels": 6, "out_channels": 3, "global_dim": 4, "heads": 2, "num_centroids": 7}
    with _package(checkout) as (model, _, _), float64():
        for kind in ("full", "local", "global"):
            torch.manual_seed(0)
            theirs = _theirs(model, kind, nodes=20, sizes=sizes, k=4)
            batch = _batch(20, 6, sizes=sizes, k=4)
            found = {f"weights.{k}": v.clone() for k, v in theirs.state_dict().items()}
            theirs.eval()
            found["evaluated"] = _call(theirs, batch, kind)
            optimizer = torch.optim.Adam(theirs.train().parameters(), lr=1e-3)
            output = _call(theirs, batch, kind)
            loss = F.cross_entropy(output, batch["y"])
            loss.backward()
            named = [(k, p) for k, p in theirs.named_parameters() if p.grad is not None]
            found |= {f"gradient.{k}": p.grad.clone() for k, p in named}
            optimizer.step()
            found |= {f"stepped.{k}": v.clone() for k, v in theirs.state_dict().items()}
            found |= {**batch, "trained": output, "loss": loss}
            tensors |= {f"{kind}.{k}": v.detach().contiguous() for k, v in found.items()}
    return tensors


# ---- speed -----------------------------------------------------------------------------------------------------------


def _side(model: nn.Module, optimizer: Any, forward: Callable[[], Tensor], train: bool) -> Callable[[], None]:
    if train:

        def step() -> None:
            model.train()
            optimizer.zero_grad()
            forward().backward()
            optimizer.step()

        return step

    @torch.no_grad()
    def look() -> None:
        model.eval()
        forward()

    return look


def speed(checkout: Path | None, device: str = "cpu") -> dict[str, dict[str, float]]:
    """Training step and evaluation at the paper's width, centroids and K, on batches of 8 nodes (a CPU's share of its
    1,024); the codebook of a step alone, at the paper's batch; sequences of a graph. Both start from the batch's node
    numbers: putting together what the network takes is part of it.
    """

    found = {}
    sizes = {"in_channels": 100, "hidden_channels": 256, "out_channels": 47, "global_dim": 64, "heads": 2}
    sizes["num_centroids"], n, k = 4096, 20000, 100
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(n, 3, 100, generator=generator).to(device)
    sequences = torch.randint(n, (n, k), generator=generator)
    sequences[:, 0] = torch.arange(n)
    y, positions = torch.randint(47, (n,), generator=generator), torch.randn(n, 64, generator=generator)
    node = torch.randperm(n, generator=generator)[:8]

    def batch() -> dict[str, Tensor]:
        distinct, rows = torch.unique(sequences[node], return_inverse=True)
        parts = {"tokens": rows, "pos_enc": positions[node], "node": node, "y": y[node]}
        return {"features": table[distinct.to(device)], **{key: part.to(device) for key, part in parts.items()}}

    def collated() -> Tensor:
        seq = torch.empty(len(node), 3 * k, 100, device=device)
        near = sequences[node]
        for kind in range(3):
            seq[:, kind::3] = table[near.to(device), kind]
        return seq

    with contextlib.ExitStack() as stack:
        package = stack.enter_context(_package(checkout))[0] if checkout is not None else None
        for train in (True, False):
            torch.manual_seed(0)
            ours = LargeGT(num_nodes=n).to(device)
            ours.log = lambda *a, **k: None  # type: ignore[method-assign]
            sides = {
                "ours": _side(ours, ours.configure_optimizers(), lambda m=ours: m.training_step(batch(), 0), train)
            }
            if package is not None:
                theirs = _theirs(package, "full", n, sizes, k).to(device)
                for part in theirs.modules():
                    if isinstance(part, nn.Dropout):
                        part.p = 0.3 if part in set(theirs.convs[0].local_module.modules()) else 0.5

                def forward(m: Any = theirs) -> Tensor:
                    x = table[node.to(device), 0]
                    out = m(collated(), x, positions[node].to(device), node.to(device))
                    return F.cross_entropy(out, y[node].to(device))

                sides["authors"] = _side(theirs, torch.optim.Adam(theirs.parameters(), lr=1e-3), forward, train)
            found["train_step" if train else "evaluation"] = in_turns(sides, device)
        x, many = torch.randn(1024, 128, device=device), torch.randperm(n)[:1024].to(device)
        calls: dict[str, Callable[[], Any]] = {"ours": lambda: ours.train().codebook.update(x, many)}
        if package is not None:
            theirs.train()

            def update() -> None:
                theirs.convs[0].c_idx.unique(return_counts=True)
                theirs.convs[0].c_idx[many] = theirs.convs[0].vq.update(x).squeeze().to(torch.short)

            calls["authors"] = update
        found["codebook_step"] = in_turns(calls, device)
    return found
