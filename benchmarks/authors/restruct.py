"""ReStruct beside its authors' code: networks and their training, sentences, edits, architectures, reproduction.

Their networks call ``.cuda()``: on a CPU it is made a no-operation while they run. Their scripts parse arguments and
open a connection on import: the functions compared are taken out of the source and run by themselves, and the packages
of the conversation are stubs; nothing is asked of a language model.
"""

import ast
import contextlib
import importlib
import itertools
import random
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import networkx as nx
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import in_turns
from zoo.graph.heterogeneous.meta_structure import MetaStructure, Schema, beginnings, neighbours, plan, similarity
from zoo.graph.heterogeneous.restruct import ReStruct, reproduce
from zoo.graph.heterogeneous.supervised import GRAPH

ENDS = {"acm": ("P", "P"), "imdb": ("M", "M"), "amazon": ("U", "I"), "yelp": ("U", "B"), "douban_movie": ("U", "M")}
SKEWED = {
    "nodes": ["P", "P", "A", "P", "S", "P", "A"],
    "edges": [[0, 2], [2, 3], [3, 4], [4, 1], [2, 5], [5, 4], [1, 6], [0, 6]],
}
"""Seven nodes: their order of skipping operations joins other states than it should."""


class _Module(types.ModuleType):
    """A stub that has whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock()


@contextlib.contextmanager
def _package(checkout: Path) -> Iterator[Any]:
    """Their modules, importable; ``.cuda()`` does nothing where there is no CUDA."""
    names = ("openai", "fire", "requests", "httpx")
    before = set(sys.modules)
    stubs = {name: _Module(name) for name in names}
    sys.path.insert(0, str(checkout))
    cuda = torch.Tensor.cuda
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]
    try:
        with mock.patch.dict(sys.modules, stubs):
            yield importlib.import_module
    finally:
        torch.Tensor.cuda = cuda  # type: ignore[method-assign]
        sys.path.remove(str(checkout))
        for name in set(sys.modules) - before:
            if str(checkout) in str(getattr(sys.modules[name], "__file__", "") or ""):
                del sys.modules[name]


def _functions(path: Path, names: set[str], **scope: Any) -> dict[str, Any]:
    """Functions of a script by their source, without running the rest of it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    exec(compile(tree, str(path), "exec"), scope)
    return scope


def _error(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


# ---- structures in both forms ----------------------------------------------------------------------------------------


def _matrix(structure: MetaStructure) -> dict[str, list[Any]]:
    n = len(structure)
    edges = [[0] * n for _ in range(n)]
    for v, w in structure.edges:
        edges[v][w] = edges[w][v] = 1
    return {"nodes": list(structure.types), "edges": edges}


def _structure(graph: Any) -> MetaStructure:
    """Ours, of one of their graphs: numbers closed up, types without the numbers in their names."""
    place = {v: i for i, v in enumerate(sorted(graph.nodes))}
    kinds = tuple(graph.nodes[v]["type"][0] for v in sorted(graph.nodes))
    edges = {(min(place[v], place[w]), max(place[v], place[w])) for v, w in graph.edges}
    return MetaStructure(kinds, frozenset(edges))


def _schema(judge: Any, dataset: str) -> Schema:
    """Our schema of one of their sets, with their words."""
    relations = tuple(tuple(e.split("-")) for e in judge.edge_types)
    return Schema(tuple(judge.nt_str), relations, *ENDS[dataset], words=dict(judge.relationship))  # type: ignore[arg-type]


def _reachable(schema: Schema, count: int) -> list[MetaStructure]:
    """Structures that both number alike: the smallest, and canonical ones on random walks of edits."""
    found, draw = dict.fromkeys(beginnings(schema, count // 2)), random.Random(0)
    while len(found) < count:
        s = schema.fallback().canonical
        for _ in range(8):
            near = [t for t in neighbours(s, schema, draw.choice((1, 2))) if len(t) <= 8]
            s = draw.choice(near) if near else s
            found[s] = None
    return list(found)


def _words_and_edits(load: Any, checkout: Path) -> dict[str, float]:
    """1 minus the share of structures for which sentence, neighbours and architecture are theirs."""
    utils, judges = load("utils"), load("llm_component_no_prob")
    judges.pdb = mock.MagicMock()
    names = {"get_state_list", "construct_arch", "get_connection_dict"}
    scope = _functions(checkout / "train_node_classification.py", names, nx=nx, np=np, pdb=None)
    wrong = dict.fromkeys(("sentences", "neighbours", "two_step_neighbours", "architecture", "similarity"), 0)
    total = dict.fromkeys(wrong, 0)

    def count(key: str, same: bool) -> None:
        wrong[key] += not same
        total[key] += 1

    for dataset in ("acm", "imdb", "amazon", "yelp"):
        judge = judges.LLM4Meta(client=None, dataset=dataset, downstream_task="")
        schema, lookup = _schema(judge, dataset), utils.temp_edge_type_lookup(dataset)
        structures = _reachable(schema, 16)
        for structure in structures:
            graph = utils.convert_to_networkx_graph(_matrix(structure))
            logic = utils.graph2logic(graph, dataset, initialization=True)
            count("sentences", logic == structure.sentence(schema))
            judge.logic2meta[logic] = graph
            for key, ours, theirs in (
                ("neighbours", neighbours(structure, schema), judge.get_one_step_candidates),
                ("two_step_neighbours", neighbours(structure, schema, 2), judge.get_two_step_candidates),
            ):
                if not _comparable(structure, key):
                    continue
                kept = dict(judge.logic2meta)
                found = {_structure(judge.logic2meta[c]).canonical for c in theirs(logic)} - {structure}
                judge.logic2meta = kept
                count(key, found == set(ours))
            for root in (0, 1):
                states = scope["get_state_list"](graph, root)
                count("architecture", _architecture(scope, graph, states, lookup) == plan(structure, root, True))
        for a, b in itertools.pairwise(structures):
            if len(a) + len(b) <= 10:
                theirs = utils.graph_similarity(*(utils.convert_to_networkx_graph(_matrix(s)) for s in (a, b)))
                count("similarity", similarity(a, b) <= theirs + 1e-12)  # ours keeps the ends, theirs may move them
    return {key: wrong[key] / total[key] for key in wrong}


def _comparable(structure: MetaStructure, key: str) -> bool:
    """Where their edits are well defined.

    Of several ways with the same types they keep the one that comes first in the order in which edges were put in,
    which from seven nodes on is not the order of the numbers. Deleting two nodes v < w gives two other nodes the same
    number, unless w follows v or is the last.
    """
    if len(structure) > 6:
        return False
    inner = [(v, w) for v, w in structure.edges if v >= 2]
    return key == "neighbours" or all(w in (v + 1, len(structure) - 1) for v, w in inner)


def _architecture(scope: dict[str, Any], graph: Any, states: list[int], lookup: dict[str, int]) -> list[Any]:
    """Their lists of operations as their cell reads them, in the form of `plan`."""
    seq, res = scope["construct_arch"](graph, states, lookup)
    names = {number: pair for pair, number in lookup.items()}
    sums: list[list[tuple[int, str, str]]] = [[] for _ in states]
    offset = 0
    for i in range(len(seq)):
        ops = [(i, seq[i]), *((j, res[offset + j]) for j in range(i))]
        sums[i + 1] = sorted((j, names[op][0], names[op][1]) for j, op in ops if names[op] != "O")
        offset += i
    live = {0}
    for i in range(1, len(sums)):
        sums[i] = [op for op in sums[i] if op[0] in live]
        live |= {i} if sums[i] else set()
    used = {len(sums) - 1}
    for i in range(len(sums) - 1, 0, -1):
        if i in used:
            used |= {j for j, _, _ in sums[i]}
        else:
            sums[i] = []
    return sums[1:]


# ---- networks --------------------------------------------------------------------------------------------------------


def _hin(widths: list[int], sizes: list[int], seed: int = 0) -> dict[str, Any]:
    """A random graph of papers, authors and subjects with dense features; the last paper has no edges."""
    g = torch.Generator().manual_seed(seed)
    first = [0, sizes[0], sizes[0] + sizes[1]]
    edges, kinds = [], []
    for number, (b, degree) in enumerate(((1, 3), (2, 1))):
        papers = torch.arange(sizes[0] - 1).repeat_interleave(degree)
        others = torch.randint(sizes[b], papers.shape, generator=g)
        pairs = torch.unique(torch.stack((papers, others + first[b])), dim=1)
        edges.append(pairs)
        kinds.append(torch.full((pairs.shape[1],), number))
    features = [torch.randn(n, f, generator=g) for n, f in zip(sizes, widths, strict=True)]
    index = [x.nonzero().t() + torch.tensor([[at], [0]]) for x, at in zip(features, first, strict=True)]
    m = sizes[0]
    return {
        "x": torch.cat([x.flatten() for x in features]),
        "x_index": torch.cat(index, 1),
        "node_type": torch.arange(3).repeat_interleave(torch.tensor(sizes)),
        "edge_index": torch.cat(edges, 1),
        "edge_type": torch.cat(kinds),
        "node": torch.arange(m),
        "y": torch.randint(3, (m,), generator=g),
        "train_mask": torch.arange(m) % 2 == 0,
        "val_mask": torch.arange(m) % 2 == 1,
        "features": features,
    }


def _their_inputs(load: Any, batch: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """The types of the nodes and their list of normalised matrices, identity and zero matrix at the end."""
    pre = load("preprocess_node_classification")
    import scipy.sparse as sp

    n, found = len(batch["node_type"]), []
    for number in range(int(batch["edge_type"].max()) + 1):
        rows, columns = batch["edge_index"][:, batch["edge_type"] == number].numpy()
        matrix = sp.csr_matrix((np.ones(len(rows), dtype=np.float32), (rows, columns)), shape=(n, n))
        for m in (matrix, matrix.T.tocsr()):
            whole = pre.normalize_row(m.astype(np.float32) + sp.eye(n, dtype=np.float32))
            found.append(pre.sparse_mx_to_torch_sparse_tensor(whole))
    found.append(pre.sparse_mx_to_torch_sparse_tensor(sp.eye(n, dtype=np.float32).tocoo()))
    found.append(torch.sparse_coo_tensor(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0), (n, n)))
    return batch["node_type"], found


def _archs(
    load: Any, checkout: Path, structures: list[MetaStructure], root: int, lookup: dict[str, int] | None = None
) -> tuple[list[Any], list[Any]]:
    names = {"get_state_list", "construct_arch", "get_connection_dict"}
    scope = _functions(checkout / "train_node_classification.py", names, nx=nx, np=np, pdb=None)
    utils = load("utils")
    seq, res = [], []
    for structure in structures:
        graph = utils.convert_to_networkx_graph(_matrix(structure))
        states = scope["get_state_list"](graph, root)
        found = scope["construct_arch"](graph, states, lookup or utils.temp_edge_type_lookup("acm"))
        seq.append(found[0])
        res.append(found[1])
    return seq, res


def _ours(theirs: dict[str, Tensor], **arguments: Any) -> ReStruct:
    """Ours with their weights, dropout off."""
    values, state = ReStruct.convert_state_dict(theirs)
    model = ReStruct(**{**values, "dropout": 0.0, **arguments})
    model.load_state_dict(state)
    model.log = lambda *a, **k: None  # type: ignore[method-assign]
    return model


def _training(
    ours: ReStruct,
    batch: dict[str, Any],
    theirs: list[Any],
    output: Callable[[], Tensor],
    loss: Callable[[Tensor], Tensor],
    names: list[str],
) -> dict[str, float]:
    """Output, loss, gradients and weights after one step of Adam on both sides."""
    out = output()
    found = {"forward": _error(ours(*(batch[k] for k in GRAPH), batch["node"]), out)}
    own, their = ours.training_step(batch, 0), loss(out)
    found["loss"] = _error(own, their)
    optimizers = [torch.optim.Adam([p for t in theirs for p in t.parameters()], lr=0.01, weight_decay=0.001)]
    optimizers.append(ours.configure_optimizers())
    own.backward()
    their.backward()

    def converted(values: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
        content = {
            f"{name}{key}": (v if (v := values(p)) is not None else torch.zeros_like(p))
            for name, t in zip(names, theirs, strict=True)
            for key, p in t.named_parameters()
        }
        return ReStruct.convert_state_dict(content)[1]

    own_values, gradients = dict(ours.named_parameters()), converted(lambda p: p.grad)
    # the bias before a softmax over structures has no gradient but rounding: it is compared with its weights
    pairs: dict[str, Any] = {k: (own_values[k].grad, g) for k, g in gradients.items()}
    for k in [k for k in pairs if k.endswith("attention.2.bias")]:
        both = zip(pairs.pop(k), pairs.pop(k.replace("bias", "weight")), strict=True)
        pairs[k] = tuple(torch.cat((bias, weight.flatten())) for bias, weight in both)
    found["gradients"] = max(_error(a, b) for a, b in pairs.values())
    for optimizer in optimizers:
        optimizer.step()
    found["step"] = max(_error(own_values[k], v) for k, v in converted(lambda p: p.detach()).items())
    return found


def _networks(load: Any, checkout: Path) -> dict[str, float]:
    classify, recommend = load("model_node_classification"), load("model_recommendation")
    batch = _hin([10, 10, 10], [30, 20, 7])
    node_type, adjacencies = _their_inputs(load, batch)
    whole = torch.cat(batch["features"])
    schema = ReStruct().schema
    cases = {
        "pap": [MetaStructure.path("PAP")],
        "psapap": [MetaStructure.path("PSPAP")],
        "diamond": [MetaStructure.read({"nodes": list("PPAS"), "edges": [[0, 2], [0, 3], [1, 2], [1, 3]]}, schema)],
        "seven_nodes": [MetaStructure.read(SKEWED, schema).canonical],
        "three": [MetaStructure.path("PAP"), MetaStructure.path("PSP"), MetaStructure.read(SKEWED, schema).canonical],
    }
    found: dict[str, float] = {}
    for label, structures in cases.items():
        for variant, more in ((label, {}), (f"{label}_plain", {"tanh": True, "norm": False})):
            if more and label not in ("diamond", "three"):
                continue
            torch.manual_seed(0)
            seq, res = _archs(load, checkout, structures, 0)
            theirs = classify.Model(
                10, 16, 3, 3, [len(s) for s in seq], dropout=0.0, use_norm=not more, in_nl=bool(more)
            )
            for p in theirs.parameters():  # layer norms start at 1 and 0, where mistakes hide
                torch.nn.init.normal_(p, std=0.3) if p.ndim == 1 else None
            ours = _ours(theirs.state_dict(), structures=[s.json() for s in structures], authors_order=True, **more)
            rows = batch["train_mask"]

            def output(theirs: Any = theirs, seq: Any = seq, res: Any = res) -> Tensor:
                return theirs(whole, node_type, adjacencies, seq, res)[: len(batch["node"])]

            def loss(out: Tensor) -> Tensor:
                return F.cross_entropy(out[rows], batch["y"][rows])  # noqa: B023

            part = _training(ours, batch, [theirs], output, loss, [""])
            found |= {f"{variant}_{k}": v for k, v in part.items()}

    # Two towers: one-hot numbers as features, their widths a list.
    sizes = [30, 20, 7]
    batch = _hin(sizes, sizes)
    n = sum(sizes)
    own = torch.cat([torch.arange(s) for s in sizes])
    batch |= {"x": torch.ones(n), "x_index": torch.stack((torch.arange(n), own))}
    pairs = torch.stack((torch.randint(30, (40,)), 30 + torch.randint(20, (40,))), 1)
    batch |= {"node": pairs, "y": (torch.arange(40) < 20).long()}
    batch |= {"train_mask": torch.ones(40, dtype=torch.bool)}
    features = [torch.eye(s) for s in sizes]
    schema = Schema(("P", "A", "S"), (("P", "A"), ("P", "S")), "P", "A")
    for label, content in {
        "towers": {"nodes": list("PAPA"), "edges": [[0, 3], [3, 2], [2, 1]]},
        "towers_direct": {"nodes": list("PAPS"), "edges": [[0, 1], [0, 3], [2, 3], [1, 2]]},
    }.items():
        structure = MetaStructure.read(content, schema).canonical
        arch_s, arch_t = (_archs(load, checkout, [structure], root) for root in (0, 1))
        torch.manual_seed(1)
        theirs_s, theirs_t = (recommend.Model(sizes, 16, [len(a[0][0])], dropout=0.0) for a in (arch_s, arch_t))
        content_all = {
            f"{name}{k}": v
            for name, t in (("source.", theirs_s), ("target.", theirs_t))
            for k, v in t.state_dict().items()
            if not k.startswith("global")
        }
        ours = _ours(content_all, structures=[structure.json()], ends=["P", "A"], authors_order=True)

        def scores(s: Any = theirs_s, t: Any = theirs_t, a: Any = arch_s, b: Any = arch_t) -> Tensor:
            out_s = s(features, node_type, adjacencies, *a, {})
            out_t = t(features, node_type, adjacencies, *b, {})
            return (out_s[pairs[:, 0]] * out_t[pairs[:, 1]]).sum(-1)

        def pair_loss(out: Tensor) -> Tensor:
            return -torch.mean(F.logsigmoid(out[:20]) + F.logsigmoid(-out[20:]))

        part = _training(ours, batch, [theirs_s, theirs_t], scores, pair_loss, ["source.", "target."])
        found |= {f"{label}_{k}": v for k, v in part.items()}
    return found


def _reproduction(checkout: Path) -> float:
    """Their survivors and the odds of the places that are drawn, beside ours, for random scores."""
    scope: dict[str, Any] = {"ELIMINATE_RATE": 0.4, "POPULATION_SIZE": 5, "GENE_NUM": 1}
    import copy

    fake = mock.MagicMock()
    scope |= {"np": fake, "copy": copy, "pdb": None}
    call = _functions(checkout / "main_node_classification.py", {"eliminate_and_reproduce"}, **scope)
    worst = 0.0
    for seed in range(20):
        scores = np.random.default_rng(seed).random(5)
        odds: list[Any] = []

        def choice(index: Any, size: int, p: Any, odds: list[Any] = odds) -> list[Any]:
            odds.append(p)
            return [index[-1]]

        fake.argsort, fake.exp, fake.random.choice = np.argsort, np.exp, choice
        theirs = call["eliminate_and_reproduce"](list(range(5)), scores)
        drawn: list[Any] = []

        class Draw(random.Random):
            def choices(self, members: Any, weights: Any, k: int, drawn: list[Any] = drawn) -> list[Any]:  # type: ignore[override]
                drawn.extend([weights] * k)
                return [members[-1]] * k

        ours = reproduce(scores.tolist(), 0.4, Draw())
        worst = max(
            worst, float(ours != [int(v) for v in theirs]), float(np.abs(np.array(odds) - np.array(drawn)).max())
        )
    return worst


def compare(checkout: Path) -> dict[str, float]:
    """Largest relative errors in float32, dropout off; of sentences, edits and architectures the share that differs."""
    with _package(checkout) as load:
        return {
            **_networks(load, checkout),
            **_words_and_edits(load, checkout),
            "reproduction": _reproduction(checkout),
        }


def golden(checkout: Path) -> dict[str, Tensor]:
    """A tiny graph, weights, and what their network makes of both along three structures; a sentence's bytes."""
    with _package(checkout) as load:
        model = load("model_node_classification")
        batch = _hin([6, 6, 6], [12, 8, 4])
        node_type, adjacencies = _their_inputs(load, batch)
        schema = ReStruct().schema
        structures = [MetaStructure.path("PAP"), MetaStructure.read(SKEWED, schema).canonical]
        seq, res = _archs(load, checkout, structures, 0)
        torch.manual_seed(0)
        theirs = model.Model(6, 8, 3, 3, [len(s) for s in seq], dropout=0.0, attn_dim=5)
        tensors = {f"weights.{k}": v.clone() for k, v in theirs.state_dict().items()}
        out = theirs(torch.cat(batch["features"]), node_type, adjacencies, seq, res)[: len(batch["node"])]
        rows = batch["train_mask"]
        loss = F.cross_entropy(out[rows], batch["y"][rows])
        loss.backward()
        tensors |= {f"gradient.{k}": p.grad.clone() for k, p in theirs.named_parameters() if p.grad is not None}
        torch.optim.Adam(theirs.parameters(), lr=0.01, weight_decay=0.001).step()
        tensors |= {f"stepped.{k}": p.detach().clone() for k, p in theirs.named_parameters()}
        tensors |= {k: v for k, v in batch.items() if isinstance(v, Tensor)}
        tensors |= {"output": out, "loss": loss}
        utils, judges = load("utils"), load("llm_component_no_prob")
        judge = judges.LLM4Meta(client=None, dataset="acm", downstream_task="")
        logic = utils.graph2logic(utils.convert_to_networkx_graph(_matrix(structures[1])), "acm", initialization=True)
        for pair, words in judge.relationship.items():
            logic = logic.replace(words, pair)  # the sentence's form, without their words
        tensors["sentence"] = torch.tensor(list(logic.encode()), dtype=torch.uint8)
    return {k: v.detach().contiguous() for k, v in tensors.items()}


# ---- speed -----------------------------------------------------------------------------------------------------------


def _large(n: int = 3025) -> dict[str, Any]:
    """A graph of ACM's size: 3,025 papers, 5,912 authors, 57 subjects, 1,902 binary features of which 6 % are 1."""
    batch = _hin([1, 1, 1], [n, 5912, 57])
    g = torch.Generator().manual_seed(1)
    total = n + 5912 + 57
    index = (torch.rand(total, 1902, generator=g) < 0.058).nonzero().t().contiguous()
    return {**batch, "x": torch.ones(index.shape[1]), "x_index": index}


def _sides(checkout: Path | None, structure: MetaStructure, device: str) -> dict[str, Callable[[], Any]]:
    batch = _large()
    moved = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
    ours = ReStruct(structures=[structure.json()], generations=0).to(device)
    ours.log = lambda *a, **k: None  # type: ignore[method-assign]
    optimizer = ours.configure_optimizers()

    def own() -> None:
        optimizer.zero_grad()
        ours.training_step(moved, 0).backward()
        optimizer.step()

    sides: dict[str, Callable[[], Any]] = {"ours": own}
    if checkout is None:
        return sides
    with _package(checkout) as load:
        node_type, adjacencies = _their_inputs(load, batch)
        seq, res = _archs(load, checkout, [structure], 0)
        theirs = load("model_node_classification").Model(1902, 64, 3, 3, [len(seq[0])], dropout=0.6).to(device)
    x = torch.zeros(len(node_type), 1902).index_put_(tuple(batch["x_index"]), batch["x"]).to(device)
    node_type, adjacencies = node_type.to(device), [a.to(device) for a in adjacencies]
    rows, y = moved["train_mask"].nonzero().flatten(), moved["y"]
    adam = torch.optim.Adam(theirs.parameters(), lr=0.01, weight_decay=0.001)

    def authors() -> None:
        cuda = torch.Tensor.cuda
        if device == "cpu":
            torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]
        try:
            adam.zero_grad()
            out = theirs(x, node_type, adjacencies, seq, res)
            F.cross_entropy(out[rows], y[rows]).backward()
            adam.step()
        finally:
            torch.Tensor.cuda = cuda  # type: ignore[method-assign]

    return {**sides, "authors": authors}


def speed(checkout: Path | None, device: str = "cpu") -> dict[str, dict[str, float]]:
    """A training step on a graph of ACM's size along a path and along seven nodes; and what the evaluation of a
    population takes, five structures of five epochs.
    """
    torch.manual_seed(0)
    schema = ReStruct().schema
    found = {}
    for label, structure in (
        ("step_path", MetaStructure.path("PAP")),
        ("step_seven_nodes", MetaStructure.read(SKEWED, schema).canonical),
    ):
        found[label] = in_turns(_sides(checkout, structure, device), device)
    batch = {k: v.to(device) for k, v in _large().items() if isinstance(v, Tensor)}
    model = ReStruct(search_epochs=5, generations=1).to(device)
    five = beginnings(schema, 5)
    found["evaluate_five_structures_five_epochs"] = in_turns({"ours": lambda: model.evaluate(batch, five)}, device)
    return found
