"""SCooL beside the authors' code (ShuangtongLi/SCooL): their two scripts' ``run`` as they are, with CPU for CUDA.

Our module runs first and notes what it drew; theirs is then fed the same batches, memberships and orders.
"""

import contextlib
import io
import statistics
import sys
import tempfile
import types
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from time import process_time
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import error, float64, in_turns, peak
from zoo.vision.federated.scool import SCooL, block_model, group_partition

AUTHORS = {"authors_sums": True, "authors_pruned": True, "authors_relu": True}
PLAIN: dict[str, Any] = {"augment": [], "mean": [], "std": []}


class _Comm:
    """One process: what mpi4py's communicator does there."""

    def bcast(self, value: Any, root: int = 0) -> Any:
        return value

    def gather(self, value: Any, root: int = 0) -> Any:
        return [value]

    def barrier(self) -> None:
        pass

    def Allreduce(self, sent: np.ndarray, received: np.ndarray, op: Any = None) -> None:
        received[...] = sent


@contextlib.contextmanager
def _scripts(checkout: Path) -> Iterator[Callable[[str], Any]]:
    """Imports their modules by name; all gone afterwards. CUDA calls stay on the CPU, what they print is dropped."""
    before = set(sys.modules)
    mpi = types.ModuleType("mpi4py")
    mpi.MPI = Namespace(SUM=None, COMM_WORLD=_Comm())  # type: ignore[attr-defined]
    wandb = types.ModuleType("wandb")
    wandb.log = wandb.save = wandb.init = lambda *a, **k: None  # type: ignore[attr-defined]
    same = {"cuda": lambda self, *a, **k: self}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(sys.modules, {"mpi4py": mpi, "wandb": wandb}))
        stack.enter_context(mock.patch.object(sys, "path", [str(checkout), *sys.path]))
        stack.enter_context(mock.patch.multiple(torch.Tensor, **same))
        stack.enter_context(mock.patch.multiple(nn.Module, **same))
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize", lambda *a: None))
        stack.enter_context(contextlib.chdir(stack.enter_context(tempfile.TemporaryDirectory())))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        import importlib

        yield importlib.import_module
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(str(checkout)):
            del sys.modules[name]


# ---- ours, noting what it draws --------------------------------------------------------------------------------------


def world(model: SCooL, each: int = 8, seed: int = 0) -> dict[str, Any]:
    """One round's batch: two classes for each client, every three clients the same."""
    hp, generator = model.hyperparameters, torch.Generator().manual_seed(seed)
    clients, classes = hp["num_clients"], hp["num_classes"]
    label = torch.cat([torch.arange(each) % 2 + i // 3 * 2 % (classes - 1) for i in range(clients)])
    shape = (classes, hp["in_channels"], hp["image_size"], hp["image_size"])
    centres = torch.rand(shape, generator=generator)
    noise = torch.rand((len(label), *shape[1:]), generator=generator)
    image = (0.6 * centres[label] + 0.4 * noise).to(torch.get_default_dtype())
    return {"image": image, "label": label, "client": list(range(clients)), "size": [each] * clients}


def run_ours(model: SCooL, rounds: int, each: int = 8) -> list[dict[str, Any]]:
    """Rounds of ours; of each what was drawn and what came of it."""
    batch, notes = world(model, each), []
    clients = range(model.hyperparameters["num_clients"])
    model.log = lambda *a, **k: None  # type: ignore[method-assign]
    for number in range(rounds):
        note: dict[str, Any] = {"steps": [[] for _ in clients], "probe": None, "blocks": None}
        local_batch, probes, first_blocks = model.local_batch, model.probes, model.first_blocks

        def noting(samples: Any, step: int, count: int, call: Any = local_batch, note: Any = note) -> Any:
            found = call(samples, step, count)
            for row, client in enumerate(samples.ids[:count]):
                note["steps"][client].append((found["image"][row], found["label"][row]))
            return found

        def noting_probes(given: Any, call: Any = probes, note: Any = note) -> Any:
            note["probe"] = call(given)
            return note["probe"]

        def noting_blocks(*given: Any, call: Any = first_blocks, note: Any = note) -> Any:
            note["blocks"] = call(*given)
            return note["blocks"]

        note["before"] = model.states.read(clients, "personal.")
        noted = {"local_batch": noting, "probes": noting_probes, "first_blocks": noting_blocks}
        with mock.patch.multiple(model, **noted):
            model.training_step(
                {**batch, "seed": [1000 * number + i for i in clients], "work": [1.0] * len(clients)}, 0
            )
        note["after"] = model.states.read(clients, "personal.")
        note["w"] = model.cooperation.clone()
        if model.encoder is not None:
            note["encoder"] = {n: p.detach().clone() for n, p in model.encoder.named_parameters()}
        notes.append(note)
    return notes


# ---- theirs, fed with it ---------------------------------------------------------------------------------------------


class _Loader:
    """Training batches to the first who asks, then the round's probe to each of the clients."""

    def __init__(self, notes: list[dict[str, Any]], client: int):
        self.notes, self.client, self.calls = notes, client, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.calls == 0:
            self.calls += 1
            return iter([pair for note in self.notes for pair in note["steps"][self.client]])
        clients = len(self.notes[0]["probe"][0])
        number, self.calls = (self.calls - 1) // clients, self.calls + 1
        image, label, _ = self.notes[number]["probe"]
        return iter([(image[self.client], label[self.client])])


def _net(models: Any, kind: str, hp: dict[str, Any]) -> Any:
    """One of their networks, or a perceptron of their layers."""
    if kind == "cnn5":
        return models.resnet.CNNCifar1(hp["num_classes"])
    if kind == "conv4":
        return models.resnet.CNNminiimagenet(hp["num_classes"])

    class Perceptron(models.resnet.MetaModule):
        def __init__(self) -> None:
            super().__init__()
            inside = hp["in_channels"] * hp["image_size"] ** 2
            self.fc1 = models.resnet.MetaLinear(inside, hp["net"]["hidden"][0])
            self.fc2 = models.resnet.MetaLinear(hp["net"]["hidden"][0], hp["num_classes"])

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.fc2(F.relu(self.fc1(x.flatten(1)))))

    return Perceptron()


def _fill(theirs: Any, ours: list[Tensor]) -> Any:
    """Their network with these weights: both list them layer by layer."""
    with torch.no_grad():
        for p, value in zip(theirs.params(), ours, strict=True):
            p.copy_(value.reshape(p.shape))
    return theirs


def run_authors(
    checkout: Path, ours: SCooL, start: list[Tensor], notes: list[dict[str, Any]], phi: dict[str, Tensor] | None = None
) -> list[dict[str, Any]]:
    """Their script on our draws; of each round the models, the graph and the encoder.

    Args:
        ours: for its hyperparameters. start: the weights that all clients begin with. phi: the encoder's.
    """
    hp = ours.hyperparameters
    clients, found = hp["num_clients"], []
    attention = hp["prior"] == "attention"
    kind = hp["net"] if isinstance(hp["net"], str) else "mlp"
    with _scripts(checkout) as load:
        script, models, util, util1 = (
            load(n) for n in ("SCooL_ATTENTION" if attention else "SCooL_SBM", "models", "util", "util1")
        )
        load("models.resnet")
        args = Namespace(
            randomSeed=0, train_ratio=None, experiment_setting="non-iid", graph_name="full", lr=hp["lr"],
            momentum=hp["momentum"], weight_decay=hp["weight_decay"], nesterov=False, epoch=len(notes),
            communicate_iteration=hp["local_steps"], fix_graph_epoch=hp["fix_graph_round"], start_mixing_epoch=0,
            mask_fraction=hp["mask_fraction"], scale=hp["scale"], mixing_model_arch="layerwise", mixing_updates=1,
            mixing_lr=hp["encoder_lr"], dataset="cifar10_tiny", model_arch="CNN", choose_filter_num=None,
        )  # fmt: skip
        script.args, script.comm, script.size = args, _Comm(), 1
        script.child_rank_num, script.parent_rank_list = clients, [np.arange(clients)]
        script.mixing_net_checkpoint_path = "."
        script.wandb = sys.modules["wandb"]
        classes = list(range(hp["num_classes"]))

        def partition(client: int, *_: Any) -> Any:
            return _Loader(notes, client), None, classes

        def build_mixing(given: Any, comm: Any, size: int, device_name: str, ref_model: Any) -> Any:
            net = models.resnet.Attention_layerwise_model_update_multilayer_mask(ref_model, 10, 0, comm, size)
            for name, value in (phi or {}).items():
                part, number, rest = name.split(".")
                layers = net.w_qs_layers1 if part == "first" else net.w_qs_layers2
                getattr(layers[int(number)], rest).data.copy_(value)
            return net

        class Recorder:
            def __init__(self, *given: Any):
                pass

            def add_new(self, *given: Any) -> None:
                found[-1]["w"] = torch.from_numpy(np.array(given[4]))

        def note_model(model: Any, *given: Any) -> tuple[float, float]:
            if not found or len(found[-1]["models"]) == clients:
                found.append({"models": []})
            found[-1]["models"].append([p.detach().clone() for p in model.params()])
            return 0.0, 0.0

        def average(comm: Any, ranks: Any, size: int, group: Any, *given: Any) -> Any:
            call_average(comm, ranks, size, group, *given)
            net = group[0]
            parts = {"first": net.w_qs_layers1, "second": net.w_qs_layers2}
            encoder = {f"{part}.{n}": p.detach().clone() for part, m in parts.items() for n, p in m.named_parameters()}
            found[-1]["encoder"] = encoder

        call_average = script.sync_allreduce1
        changes = {
            "build_model": lambda given, device_name: _fill(_net(models, kind, hp), start),
            "build_mixing_model": build_mixing,
            "sync_allreduce1": average,
        }
        stack = contextlib.ExitStack()
        with stack:
            stack.enter_context(mock.patch.multiple(script, **changes))
            stack.enter_context(mock.patch.object(util, "partition_non_iid_random_dataset", partition))
            stack.enter_context(
                mock.patch.multiple(util1, test=note_model, Recorder=Recorder, get_true_correlation=_none)
            )
            if attention:
                stack.enter_context(mock.patch.object(script.util3, "Recorder", Recorder))
                stack.enter_context(mock.patch.object(torch, "save", _none))
            else:
                _their_blocks(stack, script.SBM, notes)
            begin = process_time()
            script.run(0, 1)
            found[-1]["seconds"] = process_time() - begin
    return found


def _none(*given: Any, **named: Any) -> None:
    return None


def _their_blocks(stack: contextlib.ExitStack, module: Any, notes: list[dict[str, Any]]) -> None:
    """Their block model begins with our memberships and takes the clients in our orders."""
    made: list[int] = []
    first, state = module.SBM.__init__, Namespace(orders=[])

    def init(self: Any, *given: Any, **named: Any) -> None:
        first(self, *given, **named)
        gamma, omega, orders = notes[len(made)]["blocks"]
        self.gamma, self.phi = gamma.numpy().copy(), omega.numpy().copy()
        state.orders = [order for order in orders for _ in range(2)]  # they shuffle two lists and use the first
        made.append(1)

    def shuffle(items: list[int]) -> None:
        items[:] = state.orders.pop(0)

    stack.enter_context(mock.patch.object(module.SBM, "__init__", init))
    stack.enter_context(mock.patch.object(module, "random", Namespace(shuffle=shuffle)))


# ---- what is compared ------------------------------------------------------------------------------------------------


def _model(**given: Any) -> SCooL:
    torch.manual_seed(0)
    sizes = {
        "num_clients": 6,
        "local_steps": 3,
        "local_batch": 4,
        "probe": 4,
        "fix_graph_round": 1,
        "mask_fraction": 0.5,
    }
    return SCooL(**{**PLAIN, **AUTHORS, **sizes, **given})


def _start(model: SCooL) -> tuple[list[Tensor], dict[str, Tensor] | None]:
    phi = None if model.encoder is None else {n: p.detach().clone() for n, p in model.encoder.named_parameters()}
    return [p.detach().clone() for p in model.model.parameters()], phi


def _both(checkout: Path, rounds: int, **given: Any) -> dict[str, float]:
    """Rounds on both sides: graphs before and after pruning, models after the first round and the last, the encoder."""
    model = _model(**given)
    start, phi = _start(model)
    names = [name for name, _ in model.model.named_parameters()]
    notes = run_ours(model, rounds)
    theirs = run_authors(checkout, model, start, notes, phi)
    assert len(theirs) == rounds
    found: dict[str, float] = {}
    graphs = [error(note["w"], other["w"]) for note, other in zip(notes, theirs, strict=True)]
    pruned = model.hyperparameters["fix_graph_round"] + 1
    found["graph"], found["graph_pruned"] = max(graphs[:pruned]), max(graphs[pruned:])
    moves = []
    for number, label in ((0, "first_round"), (rounds - 1, "last_round")):
        note, other = notes[number], theirs[number]["models"]
        after = [torch.stack([model[i] for model in other]) for i in range(len(names))]
        found[f"models_{label}"] = max(error(note["after"][n], v) for n, v in zip(names, after, strict=True))
        moves.append(max(error(note["after"][n] - s, v - s) for n, v, s in zip(names, after, start, strict=True)))
    found["update_first_round"], found["update_all_rounds"] = moves
    if phi is not None:
        last = theirs[-1]["encoder"]
        found["encoder"] = max(error(notes[-1]["encoder"][n], last[n]) for n in phi)
    return found


def _networks(checkout: Path) -> dict[str, float]:
    """Their two networks: logits and gradients."""
    found = {}
    with _scripts(checkout) as load:
        models = load("models")
        load("models.resnet")
        for kind, size, classes in (("cnn5", 32, 10), ("conv4", 84, 20)):
            sizes = {"net": kind, "image_size": size, "num_classes": classes, "num_clients": 2}
            ours = _model(**sizes, authors_relu=kind == "cnn5")
            own = dict(ours.model.named_parameters())
            # theirs lists all convolutions, all norms, and the head
            names = sorted(own, key=lambda name: (name.startswith("head"), name.split(".")[1] == "2"))
            theirs = _fill(_net(models, kind, ours.hyperparameters), [own[name].detach() for name in names])
            image, label = torch.rand(4, 3, size, size), torch.arange(4)
            out, other = ours.logits(ours.model, image), theirs(image)
            found[f"{kind}_forward"] = error(out, other)
            ours_grads = torch.autograd.grad(F.cross_entropy(out, label), [own[name] for name in names])
            their_grads = torch.autograd.grad(F.cross_entropy(other, label), list(theirs.params()))
            found[f"{kind}_gradients"] = max(error(a, b) for a, b in zip(ours_grads, their_grads, strict=True))
    return found


def _partition(checkout: Path) -> float:
    """Share of samples that lie with another client than in their division into groups."""
    label = torch.randint(10, (1037,), generator=torch.Generator().manual_seed(0))
    with _scripts(checkout) as load:
        util = load("util")
        data = Namespace(data=None, targets=label.tolist())
        shards = util.split_non_iid_dataset_tiny(data, 4, num_labels=10)
        theirs = util.fusion_index_by_partition(shards, util.select_partition(5, 4, 10))
    ours = group_partition(label, 5, 4)
    wrong = sum(len(set(a.tolist()) ^ set(b)) for a, b in zip(ours, theirs, strict=True))
    return wrong / len(label)


def compare(checkout: Path) -> dict[str, float]:
    """Largest relative errors: three rounds of four clients on their CIFAR network, the last pruned, both priors.

    "update" figures compare how far weights have moved from where all clients began.
    """
    found = {**_networks(checkout), "partition": _partition(checkout)}
    for prior, given in (("sbm", {"lr": 0.05}), ("attention", {"lr": 0.05, "scale": 2.0, "momentum": 0.0})):
        for wide in (False, True):
            with float64(wide):
                figures = _both(checkout, 3, prior=prior, num_clients=4, **given)
            # moved weights are differences of nearly equal numbers, Adam's first steps nearly signs: judged in float64
            keep = {k: v for k, v in figures.items() if wide or not k.startswith(("update", "encoder"))}
            found |= {f"{prior}{'_float64' if wide else ''}_{k}": v for k, v in keep.items()}
    with float64(True):
        figures = _both(checkout, 3, prior="sbm", num_clients=4, lr=0.1, scale=2.0, weight_decay=5e-4, stack=1)
    return found | {f"weight_decay_float64_{k}": v for k, v in figures.items()}


def golden(checkout: Path) -> dict[str, Tensor]:
    """Four rounds of six small perceptrons with each prior: what was drawn, and their graphs, models and encoder.

    Attention in float64: the first steps of its encoder's AdamW are nearly signs of gradients that are all rounding.
    """
    tensors: dict[str, Tensor] = {}
    for prior in ("sbm", "attention"):
        with float64(prior == "attention"):
            tensors |= {f"{prior}.{k}": v.detach().contiguous() for k, v in _record(checkout, prior).items()}
    return tensors


def _record(checkout: Path, prior: str) -> dict[str, Tensor]:
    given = {"net": {"name": "mlp", "hidden": [6]}, "num_classes": 6, "in_channels": 1, "image_size": 4}
    model = _model(**given, prior=prior, lr=0.1, scale=2.0 if prior == "attention" else 1.0)
    start, phi = _start(model)
    notes = run_ours(model, 4)
    theirs = run_authors(checkout, model, start, notes, phi)
    names = [name for name, _ in model.model.named_parameters()]
    found = {f"start.{name}": value for name, value in zip(names, start, strict=True)}
    found |= {f"phi.{name}": value for name, value in (phi or {}).items()}
    for number, (note, other) in enumerate(zip(notes, theirs, strict=True)):
        for place, key in enumerate(("image", "label")):  # (client, step, ...)
            found[f"{number}.{key}"] = torch.stack([torch.stack([p[place] for p in own]) for own in note["steps"]])
        found[f"{number}.probe_image"], found[f"{number}.probe_label"], _ = note["probe"]
        if note["blocks"] is not None:
            gamma, omega, orders = note["blocks"]
            found |= {f"{number}.gamma": gamma, f"{number}.omega": omega, f"{number}.orders": torch.tensor(orders)}
        found[f"{number}.w"] = other["w"]
        for i, name in enumerate(names):
            found[f"{number}.model.{name}"] = torch.stack([m[i] for m in other["models"]])
        found |= {f"{number}.phi.{name}": value for name, value in other.get("encoder", {}).items()}
    return found


# ---- speed -----------------------------------------------------------------------------------------------------------

SPEED: dict[str, dict[str, Any]] = {
    "sbm": {"prior": "sbm", "fix_graph_round": 99},
    "sbm_pruned": {"prior": "sbm", "fix_graph_round": 0, "mask_fraction": 0.5},
    "attention": {"prior": "attention", "scale": 9.0, "fix_graph_round": 99},
    "small_sbm": {"fix_graph_round": 99, "net": {"name": "mlp", "hidden": [32]}, "in_channels": 1, "image_size": 8},
}
CLIENTS = 4


def _round(checkout: Path | None, given: dict[str, Any], device: str) -> dict[str, float]:
    """The second round of four clients, three steps of ten pictures each: what two rounds cost beyond one.

    Theirs without the reading and cutting of pictures, which ours does within the round.
    """
    given = {"num_clients": CLIENTS, "local_steps": 3, "local_batch": 10, "probe": 10, **given}
    times: dict[str, list[float]] = {"ours": [], "authors": []}

    def ours(rounds: int) -> float:
        model = _model(**given).to(device)
        model.log = lambda *a, **k: None  # type: ignore[method-assign]
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in world(model, 20).items()}
        begin = process_time()
        for number in range(rounds):
            seeds = {"seed": [1000 * number + i for i in range(CLIENTS)], "work": [1.0] * CLIENTS}
            model.training_step({**batch, **seeds}, 0)
        return process_time() - begin

    if checkout is not None:
        model = _model(**given)
        start, phi = _start(model)
        notes = run_ours(model, 2, 20)
    ours(1)
    for _ in range(2):
        once, twice = ours(1), ours(2)
        times["ours"].append(twice - once)
        if checkout is not None:
            seconds = [run_authors(checkout, model, start, notes[:n], phi)[-1]["seconds"] for n in (1, 2)]
            times["authors"].append(seconds[1] - seconds[0])
    memory = {"ours": peak(lambda: ours(2), device)}
    if checkout is not None:
        memory["authors"] = peak(lambda: run_authors(checkout, model, start, notes, phi), device)
    found = {f"{who}_ms": 1e3 * statistics.median(values) for who, values in times.items() if values}
    return found | {f"{who}_mib": value for who, value in memory.items()}


def speed(checkout: Path | None, device: str = "cpu") -> dict[str, dict[str, float]]:
    """Rounds of four clients with the network for CIFAR and a small perceptron; the block model among 100 clients."""
    found = {f"{name}_round": _round(checkout, given, device) for name, given in SPEED.items()}
    draws = np.random.default_rng(0)
    score = -5 * draws.random((100, 100))
    model = _model(**SPEED["small_sbm"], num_clients=100)
    gamma, omega, orders = model.first_blocks(100, [0])
    given = torch.from_numpy(score)
    sides: dict[str, Callable[[], Any]] = {"ours": lambda: block_model(given, gamma, omega, orders)}
    if checkout is None:
        return found | {"block_model_100_clients": in_turns(sides, "cpu", 1)}
    with _scripts(checkout) as load:
        module = load("SBM")
        sides["authors"] = lambda: module.SBM(score, 2, scale=1.0).variational_inference()
        return found | {"block_model_100_clients": in_turns(sides, "cpu", 1)}
