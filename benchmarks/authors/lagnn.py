"""LAGNN beside the authors' code (SongtaoLiu0823/LAGNN).

Their models stand in scripts that parse arguments and load data when imported, so that single classes and functions
are taken out of these files by name and run as they are.
"""

import ast
import contextlib
import importlib.util
import io
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import error, in_turns, timed
from zoo.graph.node.lagnn import LAGNN, Generator, augmentation_loss, generator_loss, read_authors_generator
from zoo.nn.graph import Adjacency, row_normalise

EDGES = 40


def _worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    return max(error(ours[key], theirs[key]) for key in theirs)


def _module(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _citation(checkout: Path) -> Iterator[None]:
    """Their packages ``gcn``, ``gcnii``, ``grand``, ``cvae_models`` and ``utils`` importable, and gone afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(checkout / "Citation"))
    try:
        yield
    finally:
        sys.path.remove(str(checkout / "Citation"))
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("gcn", "gcnii", "grand", "cvae_models", "cvae_pretrain", "utils"):
                del sys.modules[name]


def _taken(path: Path, *names: str, **namespace: Any) -> list[Any]:
    """Classes and functions of a script, by name, without running the script."""
    tree = ast.parse(path.read_text())
    kinds = (ast.ClassDef, ast.FunctionDef)
    chosen = [node for node in tree.body if isinstance(node, kinds) and node.name in names]
    exec(compile(ast.Module(chosen, []), str(path), "exec"), namespace)
    return [namespace[name] for name in names]


def _graph(n: int = 20, f: int = 12, classes: int = 3, edges: int = EDGES) -> dict[str, Any]:
    """A small random graph: binary features, both directions of every edge, an isolated node, a row of zeros."""
    generator = torch.Generator().manual_seed(1)
    pairs = torch.randint(n - 1, (2, edges), generator=generator)  # the last node stays alone
    dense = torch.zeros(n, n)
    dense[pairs[0], pairs[1]] = 1
    dense = ((dense + dense.T) > 0).float().fill_diagonal_(0)
    x = (torch.rand((n, f), generator=generator) < 0.4).float()
    x[3] = 0
    y = torch.randint(classes, (n,), generator=generator)
    mask = torch.arange(n) < n // 2
    return {"x": x, "edge_index": dense.nonzero().T.contiguous(), "y": y, "mask": mask, "scipy": sp.csr_matrix(dense)}


def _vae(module: Any, f: int, hidden: int = 16, latent: int = 5) -> nn.Module:
    return module.VAE([f, hidden], latent, [hidden, f], conditional=True, conditional_size=f)


def _method(theirs: nn.Module, vae: nn.Module | None = None, **arguments: Any) -> LAGNN:
    """Ours with the weights of their LAGCN and VAE, through `convert_state_dict`."""
    hyperparameters, state = LAGNN.convert_state_dict({**theirs.state_dict(), **vae.state_dict()})
    model = LAGNN(**hyperparameters, **arguments)
    model.load_state_dict(state)
    return model


def _adjacency(utils: Any, graph: dict[str, Any]) -> Tensor:
    n = len(graph["x"])
    return utils.sparse_mx_to_torch_sparse_tensor(utils.normalize_adj(graph["scipy"] + sp.eye(n)))


def _losses(outputs: list[Tensor], graph: dict[str, Any], consistency: Callable[..., Tensor]) -> Tensor:
    """Their training objective, written in their scripts' main loop: mean NLL over samples and the consistency."""
    train = graph["mask"].nonzero().flatten()
    supervised = sum(F.nll_loss(o[train], graph["y"][train]) for o in outputs) / len(outputs)
    return supervised + consistency(outputs)


def _steps(
    theirs: nn.Module, ours: LAGNN, graph: dict[str, Any], run: Any, utils: Any, loss_of: Any
) -> dict[str, float]:
    """Loss of two samples with consistency, gradients and one Adam step on both sides, dropout off, equal inputs."""
    x, edge_index = graph["x"], graph["edge_index"]
    samples = [ours.draw(x, seed) for seed in (5, 6)]
    theirs.eval(), ours.net.eval()
    outputs = [run([*sample, graph["own"]]).log_softmax(-1) for sample in samples]
    loss_theirs = _losses(outputs, graph, loss_of)
    log_probs = torch.stack([ours(x, edge_index, sample) for sample in samples]).log_softmax(-1)
    loss_ours = sum(augmentation_loss(log_probs, graph["y"], graph["mask"]))
    optimizer = torch.optim.Adam(theirs.parameters(), lr=0.01, weight_decay=5e-4)
    own = ours.configure_optimizers()
    loss_theirs.backward(), loss_ours.backward()
    names = dict(zip(ours.net.state_dict(), theirs.state_dict(), strict=True))
    ordered = dict(theirs.named_parameters())
    ours_named = dict(ours.net.named_parameters())
    gradients = max(error(p.grad, ordered[names[key]].grad) for key, p in ours_named.items())
    optimizer.step(), own.step()
    step = max(error(p, ordered[names[key]]) for key, p in ours_named.items())
    return {"forward": error(log_probs[0], outputs[0]), "loss": error(loss_ours, loss_theirs),
            "gradients": gradients, "step": step}  # fmt: skip


def compare(checkout: Path) -> dict[str, float]:
    """Largest relative errors in float32, dropout off."""
    torch.manual_seed(0)
    graph = _graph()
    x, f, classes = graph["x"], graph["x"].shape[1], 3
    citation = checkout / "Citation"
    found: dict[str, float] = {}
    with _citation(checkout):
        import cvae_models
        import utils
        from gcn.models import LAGCN
        from gcnii.model import LAGCNII
        from grand.models import MLP

        args = types.SimpleNamespace(tem=0.5, lam=1.0, hidden=8, nb_heads=4, nb_heads_2=1, dropout=0.0, alpha=0.2)
        (consistency,) = _taken(citation / "lagcn.py", "consis_loss", torch=torch, args=args)
        (vae_loss,) = _taken(citation / "cvae_pretrain.py", "loss_fn", torch=torch)
        adjacency = _adjacency(utils, graph)
        graph["own"] = torch.tensor(utils.normalize_features(x.numpy()), dtype=torch.float32)
        # A row of zeros is 0 with us; their reciprocal of its sum is infinite and set to 0 as well.
        found["features"] = error(row_normalise(x), graph["own"])
        identity = torch.eye(len(x))
        found["adjacency"] = error(Adjacency(graph["edge_index"], len(x)) @ identity, adjacency.to_dense())

        # Stage 1: forward, loss and one Adam step on equal pairs and equal noise.
        vae = _vae(cvae_models, f)
        target, source = graph["edge_index"]
        for kind, module in (("bernoulli", cvae_models), ("gaussian", _module(checkout / "OGB/cvae_models.py", "ogb"))):
            vae = _vae(module, f)
            ours = Generator(f, 16, 5, kind)
            ours.load_state_dict(_renamed(vae))
            loss = vae_loss if kind == "bernoulli" else _ogb_loss(checkout)
            optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (vae, ours)]
            torch.manual_seed(3)
            theirs = vae(x[target], x[source])
            torch.manual_seed(3)
            mine = ours(x[target], x[source])
            found[f"generator_{kind}_forward"] = max(error(a, b) for a, b in zip(mine, theirs[:3], strict=True))
            losses = (
                loss(theirs[0], x[target], theirs[1], theirs[2]),
                generator_loss(mine[0], x[target], *mine[1:], kind),
            )
            found[f"generator_{kind}_loss"] = error(losses[1], losses[0])
            for value, optimizer in zip(losses, optimizers, strict=True):
                value.backward()
                optimizer.step()
            found[f"generator_{kind}_step"] = _worst(
                {k: v for k, v in ours.state_dict().items() if not _silent(k, kind)},
                {k: v for k, v in _renamed(vae).items() if not _silent(k, kind)},
            )

        # The generators that they ship, through our reader.
        for file, width, module, kind in (
            ("Citation/model/pubmed.pkl", 500, cvae_models, "bernoulli"),
            ("OGB/model/arxiv.pkl", 128, _module(checkout / "OGB/cvae_models.py", "ogb"), "gaussian"),
        ):
            if not (checkout / file).is_file():
                continue
            content = read_authors_generator(checkout / file)
            latent = content["encoder.linear_means.bias"].shape[0]
            theirs = _vae(module, width, 256, latent)
            theirs.load_state_dict(content)
            model = LAGNN(in_features=width, likelihood=kind, latent=latent, row_normalise=False)
            model.load_generator(content)
            rows = (torch.rand(30, width) < 0.1).float()
            z = torch.randn(1, 30, latent, generator=torch.Generator().manual_seed(9))[0]
            found[f"shipped_{Path(file).stem}"] = error(model.draw(rows, seed=9)[0], theirs.eval().inference(z, rows))
            if kind == "gaussian":  # their scripts draw in train mode
                model.generator.batch_statistics = True
                found["shipped_arxiv_batch_statistics"] = error(
                    model.draw(rows, seed=9)[0], theirs.train().inference(z, rows)
                )

        # Stage 2: each backbone.
        vae = _vae(cvae_models, f)
        theirs = LAGCN(2, f, 8, classes, 0.5)
        ours = _method(theirs, vae)
        z = torch.randn(1, len(x), 5, generator=torch.Generator().manual_seed(5))[0]
        (normalise,) = _taken(citation / "cvae_pretrain.py", "feature_tensor_normalize", torch=torch)
        found["draw"] = error(ours.draw(x, seed=5)[0], normalise(vae.inference(z, x)))
        figures = _steps(theirs, ours, graph, lambda xs: theirs(xs, adjacency), utils, consistency)
        found |= {f"lagcn_{key}": value for key, value in figures.items()}

        from torch_geometric.nn import GATConv

        (LAGAT,) = _taken(citation / "lagat.py", "LAGAT", torch=torch, nn=nn, F=F, GATConv=GATConv, args=args)
        theirs = LAGAT(2, f, classes)
        ours = _plain(ours, "gat", theirs, {"gcn1_list": "branches", "conv2": "classifier"}, f, classes, dropout=0.0)
        figures = _steps(theirs, ours, graph, lambda xs: theirs(xs, graph["edge_index"]), utils, consistency)
        found |= {f"lagat_{key}": value for key, value in figures.items()}

        theirs = LAGCNII(2, f, 4, 8, classes, 0.0, 0.5, 0.1, False)
        ours = LAGNN(f, classes, "gcnii", layers=4, generator_hidden=16, latent=5, dropout=0.0)
        state = {f"middle.{i}": theirs.convs[i].weight for i in range(4)}
        state |= {f"branches.{i}.{p}": getattr(theirs.fcs[i], p) for i in range(2) for p in ("weight", "bias")}
        state |= {f"classifier.{p}": getattr(theirs.fcs[2], p) for p in ("weight", "bias")}
        ours.net.load_state_dict(state)
        sample = ours.eval().draw(x, 5)
        found["lagcnii_forward"] = error(
            ours(x, graph["edge_index"], sample), theirs.eval()([*sample, graph["own"]], adjacency)
        )

        theirs = MLP(f, 8, classes, 0.5, 0.5)
        arguments = types.SimpleNamespace(dropnode_rate=0.5, order=3, cuda=False)
        (propagate,) = _taken(citation / "lagrand.py", "propagate", torch=torch)
        (spread,) = _taken(
            citation / "lagrand.py", "rand_prop", torch=torch, np=np, args=arguments, propagate=propagate
        )
        ours = LAGNN(f, classes, "grand", order=3, generator_hidden=16, latent=5).eval()
        ours.net.load_state_dict(
            {f"{o}.{p}": getattr(getattr(theirs, t), p) for o, t in (("hidden", "layer1"), ("classifier", "layer2"))
             for p in ("weight", "bias")}
        )  # fmt: skip
        found["lagrand_forward"] = error(
            ours(x, graph["edge_index"]), theirs.eval()(spread(graph["own"].clone(), adjacency, False))
        )

        from torch_geometric.nn import GCNConv

        (ogb,) = _taken(checkout / "OGB/lagcn_arxiv.py", "LAGCN", torch=torch, F=F, GCNConv=GCNConv)
        theirs = ogb(2, f, 8, classes, 3, 0.5)
        ours = LAGNN.from_variant(
            "ogb_arxiv", in_features=f, num_classes=classes, hidden=8, generator_hidden=16, latent=5, dropout=0.0
        )
        state = {}
        for i in range(2):
            state[f"branches.{i}.weight"] = theirs.convs_initial[i].lin.weight.T
            state[f"branches.{i}.bias"] = theirs.convs_initial[i].bias
        for key, conv in (("middle.0", theirs.convs[0]), ("classifier", theirs.convs[1])):
            state |= {f"{key}.weight": conv.lin.weight.T, f"{key}.bias": conv.bias}
        first = [bn.state_dict() for bn in theirs.bns_initial]
        for key, value in first[0].items():
            state[f"norms.0.{key}"] = torch.cat([part[key] for part in first]) if value.ndim else value
        state |= {f"norms.1.{key}": value for key, value in theirs.bns[0].state_dict().items()}
        ours.net.load_state_dict(state)
        sample = ours.draw(x, 5)
        theirs.dropout = 0.0
        for mode in (True, False):  # with batch statistics, then with the running ones that this made
            theirs.train(mode), ours.net.train(mode)
            found[f"ogb_{'train' if mode else 'eval'}_forward"] = error(
                ours(x, graph["edge_index"], sample), theirs([*sample, x], graph["edge_index"])
            )
    return found


def _silent(key: str, kind: str) -> bool:
    """A bias before a batch norm has no gradient but rounding noise, of which Adam makes whole steps."""
    biases = ("encoder.bias", "decoder.bias", "output.bias")
    return key.endswith("tracked") or (kind == "gaussian" and key in biases)


def _renamed(vae: nn.Module) -> dict[str, Tensor]:
    from zoo.graph.node.lagnn import _generator_state

    return _generator_state(vae.state_dict())


def _ogb_loss(checkout: Path) -> Any:
    return _taken(checkout / "OGB/cvae_pretrain_small.py", "loss_fn", torch=torch)[0]


def _plain(
    like: LAGNN, name: str, theirs: nn.Module, names: dict[str, str], f: int, classes: int, **more: Any
) -> LAGNN:
    """Ours with a torch_geometric backbone whose keys differ by their first word."""
    ours = LAGNN(f, classes, name, generator_hidden=16, latent=5, **more)
    ours.generator.load_state_dict(like.generator.state_dict())
    state = {}
    for key, value in theirs.state_dict().items():
        word, _, rest = key.partition(".")
        state[f"{names[word]}.{rest}"] = value
    ours.net.load_state_dict(state)
    return ours


def golden(checkout: Path) -> dict[str, Tensor]:
    """A tiny graph with their weights and what their code makes of it."""
    torch.manual_seed(0)
    graph = _graph()
    x, (target, source) = graph["x"], graph["edge_index"]
    with _citation(checkout):
        import cvae_models
        import utils
        from gcn.models import LAGCN

        args = types.SimpleNamespace(tem=0.5, lam=1.0)
        (consistency,) = _taken(checkout / "Citation/lagcn.py", "consis_loss", torch=torch, args=args)
        pretrain = checkout / "Citation/cvae_pretrain.py"
        normalise, vae_loss = _taken(pretrain, "feature_tensor_normalize", "loss_fn", torch=torch)
        adjacency = _adjacency(utils, graph)
        own = torch.tensor(utils.normalize_features(x.numpy()), dtype=torch.float32)
        vae, model = _vae(cvae_models, 12), LAGCN(2, 12, 8, 3, 0.5).eval()
        kept = {f"weights.{k}": v.clone() for k, v in {**model.state_dict(), **vae.state_dict()}.items()}
        z = torch.randn(2, 1, 20, 5, generator=torch.Generator().manual_seed(5))
        output, mean, log_variance, posterior = vae(x[target], x[source])
        samples = [normalise(vae.inference(z[s, 0], x)).detach() for s in range(2)]
        outputs = [model([sample, own], adjacency).log_softmax(-1) for sample in samples]
        loss = _losses(outputs, graph, consistency)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)
        loss.backward()
        gradients = {f"gradient.{k}": p.grad.clone() for k, p in model.named_parameters()}
        optimizer.step()
        stepped = {f"stepped.{k}": p.detach().clone() for k, p in model.named_parameters()}
        elbo = vae_loss(output, x[target], mean, log_variance)
    inputs = {key: graph[key] for key in ("x", "edge_index", "y", "mask")}
    tensors = {
        **inputs, **kept, "z": z, "mean": mean, "log_variance": log_variance, "reconstruction": output,
        "posterior": posterior,
        "generator_loss": elbo, "augmented": torch.stack(samples), "own": own, "adjacency": adjacency.to_dense(),
        "log_probs": torch.stack(outputs), "loss": loss, **gradients, **stepped,
    }  # fmt: skip
    return {key: value.detach().contiguous() for key, value in tensors.items()}


# ---- speed -----------------------------------------------------------------------------------------------------------


def _cora_sized() -> dict[str, Any]:
    """2,708 nodes, 1,433 features of which 18 are on, 5,278 undirected edges, 140 training nodes."""
    graph = _graph(2708, 1433, 7, 5278)
    x = torch.zeros(2708, 1433)
    graph["x"] = x.scatter_(1, torch.randint(1433, (2708, 18), generator=torch.Generator().manual_seed(2)), 1.0)
    graph["mask"] = torch.arange(2708) < 140
    return graph


def speed(checkout: Path | None, device: str = "cpu") -> dict[str, dict[str, float]]:
    """Milliseconds (and on CUDA MiB at most) of an epoch of stage 2 and of a step of stage 1, in turns, medians.

    An epoch: four samples, backward, update, one validation pass. A step of stage 1 is measured with 10 passes of the
    judge and not 100; both sides' passes cost in proportion.
    """
    graph = _cora_sized()
    cpu = graph
    graph = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in graph.items()}
    ours = LAGNN(judge_passes=10).to(device)
    ours.log = lambda *a, **k: None
    optimizer = ours.configure_optimizers()
    batch = {key: graph[key] for key in ("x", "edge_index", "y")} | {"train_mask": graph["mask"]}

    def own_epoch() -> None:
        ours.train()
        optimizer.zero_grad()
        ours.training_step(batch, 0).backward()
        optimizer.step()
        ours.eval()
        with torch.no_grad():
            ours.noise_seed += 1
            F.cross_entropy(ours(graph["x"], graph["edge_index"])[graph["mask"]], graph["y"][graph["mask"]])

    few = graph["edge_index"][:, :256]  # four batches; the judge has the whole graph on both sides
    ours.hparams.update(judge_epochs=1, warmup=0, judge_updates=0)

    def own_stage(steps: int) -> None:
        ours.hparams.generator_steps = steps
        ours.fit_generator(graph["x"], graph["edge_index"], graph["y"], graph["mask"])

    if checkout is None:
        return {
            "epoch": in_turns({"ours": own_epoch}, device, 5),
            "generator_step": _per_step({"ours": lambda: own_stage(4), "base": lambda: own_stage(0)}, device),
        }
    with _citation(checkout):
        import cvae_models
        import cvae_pretrain
        import utils
        from gcn.models import LAGCN

        args = types.SimpleNamespace(tem=0.5, lam=1.0, cuda=device != "cpu")
        (consistency,) = _taken(checkout / "Citation/lagcn.py", "consis_loss", torch=torch, args=args)
        adjacency = _adjacency(utils, cpu).to(device)
        normalised = torch.tensor(utils.normalize_features(cpu["x"].numpy()), dtype=torch.float32).to(device)
        vae = _vae(cvae_models, 1433, 256, 10).to(device)
        (draw,) = _taken(
            checkout / "Citation/lagcn.py", "get_augmented_features", torch=torch, args=args, cvae_model=vae,
            cvae_pretrain=cvae_pretrain, features=cpu["x"].numpy(), device=device,
        )  # fmt: skip
        model = LAGCN(2, 1433, 8, 7, 0.5).to(device)
        their_optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)

        def their_epoch() -> None:
            model.train()
            their_optimizer.zero_grad()
            outputs = [model([*draw(1), normalised], adjacency).log_softmax(-1) for _ in range(4)]
            _losses(outputs, graph, consistency).backward()
            their_optimizer.step()
            model.eval()
            output = model([*draw(1), normalised], adjacency).log_softmax(1)
            F.nll_loss(output[graph["mask"]], graph["y"][graph["mask"]])

        sparse = sp.csr_matrix(
            (np.ones(256), tuple(few.cpu().numpy())), shape=(2708, 2708)
        )  # the same 256 directed pairs
        settings = {"batch_size": 64, "latent_size": 10, "pretrain_lr": 0.01, "conditional": True, "num_models": 10}
        settings |= {"warmup": 200, "update_epochs": 20, "cuda": device != "cpu"}

        def their_stage(epochs: int) -> None:
            run = types.SimpleNamespace(pretrain_epochs=epochs, **settings)
            quiet = mock.patch.object(cvae_pretrain, "range", lambda *a: [0] if a == (100,) else range(*a), create=True)
            with quiet, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                cvae_pretrain.generated_generator(
                    run, torch.device(device), sparse, cpu["x"].numpy(), cpu["y"], normalised.cpu(), adjacency.cpu(),
                    cpu["mask"].nonzero().flatten(),
                )  # fmt: skip

        epoch = in_turns({"ours": own_epoch, "authors": their_epoch}, device, 5)
        stage = _per_step(
            {"ours": lambda: own_stage(4), "base": lambda: own_stage(0),
             "authors": lambda: their_stage(1), "authors_base": lambda: their_stage(0)}, device,
        )  # fmt: skip
    return {"epoch": epoch, "generator_step": stage}


def _per_step(calls: dict[str, Callable[[], Any]], device: str) -> dict[str, float]:
    """Milliseconds of four steps, less what both sides do before them."""
    stage = timed(calls, device, 5)
    found = {"ours_ms": (stage["ours_ms"] - stage["base_ms"]) / 4}
    if "authors" in calls:
        found["authors_ms"] = (stage["authors_ms"] - stage["authors_base_ms"]) / 4
    return found
