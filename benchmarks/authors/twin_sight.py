"""TwinSight beside its authors' code: the networks, steps of each kind of client, a round; speed; recorded tensors.

The authors' trainer and averaging run as they are; wandb and tensorboard, which they only report to, are stubs. Their
ResNet has one width, so that what is recorded for the tests is a small network inside their `SemiFed`.
"""

import contextlib
import importlib
import logging
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import error, float64, in_turns
from zoo.core.seeding import seed_from
from zoo.engines.federated import Clients, local_batches
from zoo.engines.federated.algorithms import algorithm
from zoo.nn.classifiers import classifier
from zoo.vision.federated.twin_sight import Twins, TwinSight

SETTINGS = {
    "model": "SemiFed_SimCLR", "insDis": 0.5, "sim": 1.0, "SSL_method": "freematch", "PC_use_pesudo_label": False,
    "PC_ulb_loss_ratio": 0.5, "PD_ulb_loss_ratio": 5.0, "fixmatch_T": 0.5, "fixmatch_threshold": 0.95,
    "num_classes": 10, "dataset": "cifar10", "fedprox": True, "fedprox_mu": 0.5, "record_tool": "none", "batch_size": 8,
}  # fmt: skip
SMALL = {"name": "cnn", "widths": [4, 6], "features": 8}


@contextlib.contextmanager
def _authors(checkout: Path) -> Iterator[Any]:
    """Their modules, and gone afterwards: their names (``utils``, ``model``) are anybody's."""
    before, level = set(sys.modules), logging.getLogger().level
    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = object  # type: ignore[attr-defined]
    kept = sys.modules.get("torch.utils.tensorboard")
    sys.modules["torch.utils.tensorboard"] = board
    sys.path.insert(0, str(checkout))
    try:
        names = ("trainers.normal_trainer", "model.SemiFed", "ssl_model.SimCLR", "model.SSFL_ResNet18")
        trainer, semi, simclr, resnet = (importlib.import_module(name) for name in names)
        byol, simsiam = (importlib.import_module(f"ssl_model.{name}") for name in ("BYOL", "SimSiam"))
        averaging = importlib.import_module("algorithms_standalone.basePS.strategies")
        logging.getLogger().setLevel(logging.WARNING)
        code = {"trainer": trainer, "semi": semi, "simclr": simclr, "resnet": resnet, "byol": byol, "simsiam": simsiam}
        yield SimpleNamespace(**code, averaging=averaging)
    finally:
        logging.getLogger().setLevel(level)
        sys.path.remove(str(checkout))
        own = {path.stem for path in checkout.iterdir()}
        for name in set(sys.modules) - before:
            if name.split(".")[0] in own or name == "torch.utils.tensorboard":
                del sys.modules[name]
        if kept is not None:
            sys.modules["torch.utils.tensorboard"] = kept


class Small(nn.Module):
    """A network with the face of their ResNet, of 1 x 8 x 8 pictures."""

    feature_dim = SMALL["features"]

    def __init__(self, classes: int = 10):
        super().__init__()
        (first, second), features = SMALL["widths"], SMALL["features"]
        self.conv1, self.conv2 = nn.Conv2d(1, first, 3, padding=1), nn.Conv2d(first, second, 3, padding=1)
        self.hidden, self.fc = nn.Linear(4 * second, features), nn.Linear(features, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        f = F.relu(self.hidden(x.flatten(1)))
        return f, self.fc(f)


SMALL_NAMES = {"conv1": "layer1.0", "conv2": "layer2.0", "hidden": "hidden.0", "fc": "head"}


def small_state(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names for the weights of `Small` inside their `SemiFed`."""
    sides = {"sup_classifier": "supervised", "unsup_model.online_encoder": "unsupervised"}
    found = {}
    for key, value in theirs.items():
        side = next(s for s in sides if key.startswith(s))
        layer, _, rest = key.removeprefix(f"{side}.").partition(".")
        found[f"{sides[side]}.{SMALL_NAMES[layer]}.{rest.removeprefix('net.')}"] = value
    return found


def _names(content: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names for either network's state."""
    if "sup_classifier.hidden.weight" in content:
        return small_state(content)
    state = TwinSight.convert_state_dict(content)[1]
    return {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}


def _twins(
    code: Any, small: bool, seed: int = 0, projection: tuple[int, int] | None = None, **changes: Any
) -> tuple[nn.Module, TwinSight]:
    """Their network, and ours with its weights; with the paper's ``projection`` around a ResNet unless told."""
    torch.manual_seed(seed)
    args = SimpleNamespace(**{**SETTINGS, **changes})
    net = (lambda: Small()) if small else (lambda: code.resnet.ResNet18(args))
    hidden, last = projection or ((12, 6) if small else (4096, 2048))
    unsupervised = code.simclr.SimCLRModel(net(), projection_size=last, projection_hidden_size=hidden)
    theirs = code.semi.SemiFed(unsupervised, net(), args=args)
    shape: dict[str, Any] = {"net": SMALL, "in_channels": 1, "image_size": 8} if small else {"image_size": 16}
    shape["projection"] = [hidden, last]
    # their projector has batch norm whatever the network has: ours follows `norm`, so the small one takes it by hand
    given = {"augment": [], "strong": [], "authors_xor": True, "local_batch": 8, "stack": 1}
    ours = TwinSight(**shape, **given, norm="none" if small else "batch")
    if small:
        ours.model.unsupervised.head[1] = nn.BatchNorm1d(12)  # type: ignore[index, operator, union-attr]
    ours.model.load_state_dict(_names(theirs.state_dict()))
    ours.log = lambda *a, **k: None  # type: ignore[method-assign]
    return theirs, ours


def _trainer(code: Any, model: nn.Module, notes: dict[str, float], **changes: Any) -> Any:
    """Their trainer of a client; what it reports goes to ``notes``."""
    code.trainer.log_info = lambda kind, name, value, *a, **k: notes.__setitem__(name, float(value))
    args = SimpleNamespace(**{**SETTINGS, **changes})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=1e-4, momentum=0.9)
    options = {"role": "client", "client_index": 0}
    return code.trainer.NormalTrainer(model, torch.device("cpu"), nn.CrossEntropyLoss(), optimizer, args, **options)


def _pictures(steps: int, count: int, small: bool, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Weak and strong views, and labels, of some steps."""
    generator = torch.Generator().manual_seed(seed)
    shape = (steps, count, 1, 8, 8) if small else (steps, count, 3, 8, 8)
    weak = torch.rand(shape, generator=generator).to(torch.get_default_dtype())
    strong = (weak + 0.2 * torch.rand(shape, generator=generator)).clamp(0, 1).to(weak)
    return weak, strong, torch.randint(10, (steps, count), generator=generator)


class Given(list):  # type: ignore[type-arg]
    """Local batches of one client as `Samples` gives them."""

    def __init__(self, batches: list[dict[str, Tensor]], known: int):
        super().__init__((1, batch) for batch in batches)
        self.batch, self.rows, self.counts = {"known": [known], "size": [1]}, [0], [len(batches)]


def _steps(ours: TwinSight, batches: list[dict[str, Tensor]], idle: bool = False) -> tuple[Clients, dict[str, Tensor]]:
    """Our steps of one client; the mean of its figures."""
    down = ours.broadcast()
    clients = ours.clients(ours.start_state([0], down), stacked=False)
    clients.corrections += ours.algorithm.corrections([0], down)
    samples: Any = Given(batches, 0 if idle else 1)
    return clients, ours.work(clients, samples, down)


def _batch(weak: Tensor, strong: Tensor, label: Tensor, labelled: Tensor) -> dict[str, Tensor]:
    found = {"image": weak, "strong": strong, "label": torch.where(labelled, label, -1), "labelled": labelled}
    return {key: value[None] for key, value in found.items()} | {"mask": torch.ones_like(labelled)[None]}


def _client(code: Any, small: bool, kind: str, steps: int = 3, **changes: Any) -> dict[str, float]:
    """A client of one kind: loss and gradients of its first step, weights after the first and after all."""
    count, found = 8, {}
    weak, strong, label = _pictures(steps, count, small)
    options: dict[str, Any] = {}
    if kind == "few":
        method = changes["SSL_method"]
        options = {"pseudo": method, "pseudo_weight": 5.0, "algorithm": "fedprox", "mu": 1.0}
    elif changes.get("PC_use_pesudo_label"):
        options = {"pseudo": changes["SSL_method"], "authors_swap": True}
    options |= {"threshold": changes["fixmatch_threshold"]} if "fixmatch_threshold" in changes else {}
    labelled = torch.full((count,), kind == "labelled")
    if kind == "few":
        labelled[:3] = True
    for until in sorted({1, steps}):
        theirs, ours = _twins(code, small, projection=None if small else (64, 32), **changes)
        with torch.no_grad():  # as sure as a trained network is, of some samples
            for net in (theirs.sup_classifier, ours.model.supervised):
                (net.fc if hasattr(net, "fc") else net.head).weight.mul_(changes.get("sharpen", 1.0))
        for key, value in options.items():
            ours._hp[key] = value
        if "algorithm" in options:
            ours.mu, ours.algorithm = options["mu"], algorithm(options["algorithm"], ours)
        notes: dict[str, float] = {}
        trainer = _trainer(code, theirs, notes, **changes)
        start = {name: value.clone() for name, value in theirs.state_dict().items()}
        if kind == "labelled":
            loader = [(weak[i], strong[i], label[i]) for i in range(until)]
            trainer.train_semiFed_model_labeled_client_PC(0, 0, loader, "cpu")
        elif kind == "unlabelled":
            trainer.train_semiFed_model_unlabeled_client_PC(0, 0, [(weak[i], strong[i]) for i in range(until)], "cpu")
        else:
            known = [(weak[i, :3], strong[i, :3], label[i, :3]) for i in range(until)]
            rest = [(weak[i, 3:], strong[i, 3:]) for i in range(until)]
            trainer.train_semiFed_model_PD(0, 1, start, known, rest, "cpu")
        batches = [_batch(weak[i], strong[i], label[i], labelled) for i in range(until)]
        clients, logs = _steps(ours, batches, idle=kind == "unlabelled")
        now, wanted = clients.state, _names(theirs.state_dict())
        floats = [name for name, value in wanted.items() if value.is_floating_point()]
        moved = max(error(now[name][0], wanted[name]) for name in floats)
        assert all(torch.equal(now[name][0], wanted[name]) for name in wanted if name not in floats)
        if until > 1:
            found["steps"] = moved
            break
        found["step"] = moved
        reported = next(value for name, value in notes.items() if "total_loss" in name)
        found["loss"] = abs(float(logs["loss"]) - reported) / abs(reported)  # the proximal term is 0 in the first step
        grads = _names({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None} | _fill(theirs))
        own = _gradients(ours, batches[0], start)
        # the bias before batch norm has none but rounding
        for side in ("supervised", "unsupervised"):
            names = [n for n in own if n.startswith(f"{side}.") and n != "unsupervised.head.0.bias"]
            found[f"{side}_gradients"] = max(error(own[n], grads[n]) for n in names)
        if options:
            assert float(logs["pseudo"]) > 0 and float(logs["sure_share"]) > 0, "no pseudo label to compare"
        if kind == "unlabelled" and not options:
            head = "sup_classifier.fc.weight"
            assert torch.equal(theirs.state_dict()[head], start[head]), "their head moved without a gradient"
            found["idle_head"] = error(now["supervised.head.weight"][0], start[head])
    return found


def _fill(theirs: nn.Module) -> dict[str, Tensor]:
    """Zeros for what `convert_state_dict` wants to see beside gradients."""
    return {
        name: torch.zeros_like(value, dtype=torch.get_default_dtype())
        for name, value in theirs.state_dict().items()
        if not (name in dict(theirs.named_parameters()) and theirs.get_parameter(name).grad is not None)
    }


def _gradients(ours: TwinSight, batch: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of our loss at their first weights; the proximal term's are zero there."""
    ours.model.load_state_dict(_names(start))
    ours.model.train()
    extra = {}
    if ours._hp["pseudo"] == "freematch":
        extra = {"sure": torch.tensor(0.1), "often": torch.full((10,), 0.1)}
    loss = ours.loss(ours.model, {**{key: value[0] for key, value in batch.items()}, **extra})["loss"]
    names, parameters = zip(*ours.model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}


def _round(code: Any) -> float:
    """A whole round of two labelled and two unlabelled clients of different sizes, and their averaging."""
    theirs, ours = _twins(code, small=True)
    start = {name: value.clone() for name, value in theirs.state_dict().items()}
    sizes, known = [16, 24, 8, 32], [16, 0, 0, 32]
    generator = torch.Generator().manual_seed(5)
    image = torch.rand(sum(sizes), 1, 8, 8, generator=generator).to(torch.get_default_dtype())
    label = torch.randint(10, (sum(sizes),), generator=generator)
    labelled = torch.cat([torch.full((s,), k > 0) for s, k in zip(sizes, known, strict=True)])
    batch = {"image": image, "label": torch.where(labelled, label, -1), "labelled": labelled, "known": known}
    batch |= {
        "client": [0, 1, 2, 3],
        "size": sizes,
        "work": [1.0] * 4,
        "seed": [seed_from("round", i) for i in range(4)],
    }
    index, _, counts = local_batches(sizes, batch["seed"], 8, drop_last=True)
    results, first = [], 0
    for client, size in enumerate(sizes):
        own, _ = _twins(code, small=True)
        own.load_state_dict(start)
        trainer = _trainer(code, own, {})
        rows = [index[client, step] + first for step in range(counts[client])]
        if known[client]:
            loader = [(image[r], image[r], label[r]) for r in rows]
            trainer.train_semiFed_model_labeled_client_PC(0, 0, loader, "cpu")
        else:
            trainer.train_semiFed_model_unlabeled_client_PC(0, 0, [(image[r], image[r]) for r in rows], "cpu")
        results.append(own.state_dict())
        first += size
    averaged = _names(code.averaging.federated_averaging_by_params(results, sizes))
    ours.training_step(batch, 0)
    now = ours.model.state_dict()
    return max(error(now[name], value) for name, value in averaged.items() if value.is_floating_point())


KINDS: dict[str, dict[str, Any]] = {
    "labelled": {"kind": "labelled"},
    "unlabelled": {"kind": "unlabelled"},
    "unlabelled_fixmatch": {
        "kind": "unlabelled", "PC_use_pesudo_label": True, "SSL_method": "fixmatch", "fixmatch_threshold": 0.5,
        "sharpen": 60.0,
    },
    "unlabelled_freematch": {"kind": "unlabelled", "PC_use_pesudo_label": True, "SSL_method": "freematch"},
    "few_fixmatch": {"kind": "few", "SSL_method": "fixmatch", "fixmatch_threshold": 0.5, "sharpen": 60.0},
    "few_freematch": {"kind": "few", "SSL_method": "freematch", "sharpen": 60.0},
}  # fmt: skip


def _objective(code: Any, kind: str) -> dict[str, float]:
    """Their BYOL or SimSiam and ours on two views: the loss, and its gradients in the network and the predictor."""
    torch.manual_seed(0)
    net = Small()  # theirs counts on 512 features
    net.hidden, net.feature_dim = nn.Linear(net.hidden.in_features, 512), 512
    if kind == "simsiam":
        projection, theirs = [512, 512], code.simsiam.SimSiam(net)
        parts = {"unsupervised": theirs.encoder, "predictor": theirs.predictor}
    else:
        projection, theirs = [48, 32], code.byol.BYOLmodel(net, projection_size=32, projection_hidden_size=48)
        for p in theirs.target_encoder.parameters():
            p.data += 0.1 * torch.randn_like(p)
        parts = {"unsupervised": theirs.online_encoder, "predictor": theirs.online_predictor}
        parts["target"] = theirs.target_encoder
    sizes = {"num_classes": 10, "in_channels": 1, "image_size": 8, "norm": "none"}
    twins = Twins(*(classifier({**SMALL, "features": 512}, **sizes) for _ in range(2)), kind, projection, "batch")
    for name, part in parts.items():
        own = twins.get_submodule(name)
        own.load_state_dict(dict(zip(own.state_dict(), part.state_dict().values(), strict=True)))
    weak, strong, _ = _pictures(1, 8, small=True)
    ours = TwinSight(net=SMALL, norm="none", in_channels=1, image_size=8, unsupervised=kind, projection=projection)
    _, loss = ours._instance(twins.train(), torch.cat([weak[0], strong[0]]), torch.ones(8, dtype=torch.bool))
    wanted = theirs.train()(weak[0], strong[0])[0 if kind == "simsiam" else -1]
    found = {"loss": error(loss, wanted)}
    for name in ("unsupervised", "predictor"):
        pair = ((loss, twins.get_submodule(name)), (wanted, parts[name]))
        grads = [torch.autograd.grad(value, list(part.parameters()), retain_graph=True) for value, part in pair]
        found[f"{name}_gradients"] = error(*(torch.cat([g.flatten() for g in side]) for side in grads))
    return found


def compare(checkout: Path) -> dict[str, float]:
    """Largest relative errors: steps of each kind of client with a small network and the paper's, and a whole round."""
    found: dict[str, float] = {}
    with _authors(checkout) as code:
        theirs, ours = _twins(code, small=False)
        x = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(2))
        theirs.eval(), ours.eval()
        with torch.no_grad():
            f_u, f_s, z, logits = theirs(x[:3], x[3:])
            found["resnet_logits"] = error(ours(x), logits)
            found["resnet_features"] = error(ours.model.supervised[:-1](x), f_s)  # type: ignore[index]
            found["resnet_unsupervised_features"] = error(ours.model.unsupervised[:-1](x), f_u)  # type: ignore[index]
            found["resnet_projection"] = error(ours.model.unsupervised(x), z)  # type: ignore[operator]
        for label, options in KINDS.items():
            found |= {f"{label}_{key}": value for key, value in _client(code, True, steps=1, **options).items()}
        # Batch norm over eight pictures is a bad case for float32: over several steps, and in the paper's network.
        with float64():
            for label, options in KINDS.items():
                found[f"{label}_float64_three_steps"] = _client(code, True, **options)["steps"]
            found["round_float64"] = _round(code)
            for kind in ("byol", "simsiam"):
                found |= {f"{kind}_float64_{key}": value for key, value in _objective(code, kind).items()}
            for label in ("labelled", "few_freematch"):
                figures = _client(code, False, steps=1, **KINDS[label])
                found |= {f"resnet_{label}_float64_{key}": value for key, value in figures.items()}
    return found


def golden(checkout: Path) -> dict[str, Tensor]:
    """The small network, three batches, and their steps on them as a labelled and an unlabelled client, in float64."""
    tensors: dict[str, Tensor] = {}
    with _authors(checkout) as code, float64():
        weak, strong, label = _pictures(3, 8, small=True)
        tensors |= {"weak": weak, "strong": strong, "label": label}
        for kind in ("labelled", "unlabelled"):
            theirs, _ = _twins(code, small=True)
            start = {f"weights.{k}": v.clone() for k, v in small_state(theirs.state_dict()).items()}
            notes: dict[str, float] = {}
            trainer = _trainer(code, theirs, notes)
            if kind == "labelled":
                loader: list[Any] = [(weak[i], strong[i], label[i]) for i in range(3)]
                trainer.train_semiFed_model_labeled_client_PC(0, 0, loader, "cpu")
            else:
                trainer.train_semiFed_model_unlabeled_client_PC(0, 0, [(weak[i], strong[i]) for i in range(3)], "cpu")
            tensors |= start
            tensors |= {f"{kind}.{k}": v.clone() for k, v in small_state(theirs.state_dict()).items()}
            short = {"total": "loss", "instanceDis": "instance", "sim": "neighbourhood", "ce": "supervised"}
            for name, value in notes.items():
                part = next((s for t, s in short.items() if name.endswith(f"labeled_{t}_loss")), None)
                if part is not None:
                    tensors[f"{kind}_mean.{part}"] = torch.tensor(value)
    return tensors


def _sides(
    code: Any, device: str, sizes: list[int], small: bool, stack: int | None, batch_size: int
) -> dict[str, Callable[[], Any]]:
    """A round of labelled and unlabelled clients by turns, without the views, which run in other places."""
    _, ours = _twins(code, small)
    ours._hp.update(stack=stack, local_batch=batch_size)
    ours.to(device)
    total, shape = sum(sizes), (1, 8, 8) if small else (3, 16, 16)
    image, label = torch.rand(total, *shape, device=device), torch.randint(10, (total,), device=device)
    known = [size if i % 2 == 0 else 0 for i, size in enumerate(sizes)]
    labelled = torch.cat([torch.full((s,), k > 0) for s, k in zip(sizes, known, strict=True)]).to(device)
    batch = {"image": image, "label": torch.where(labelled, label, -1), "labelled": labelled, "known": known}
    clients = list(range(len(sizes)))
    batch |= {"client": clients, "size": sizes, "work": [1.0] * len(sizes), "seed": clients}
    theirs = [_twins(code, small)[0].to(device) for _ in sizes]
    trainers = [_trainer(code, own, {}) for own in theirs]
    parts = list(zip(image.split(sizes), label.split(sizes), strict=True))

    def authors() -> None:
        down = theirs[0].state_dict()
        results = []
        for client, (own, trainer) in enumerate(zip(theirs, trainers, strict=True)):
            own.load_state_dict(down)
            x, y = parts[client]
            cut = [slice(start, start + batch_size) for start in range(0, len(x) - batch_size + 1, batch_size)]
            if known[client]:
                trainer.train_semiFed_model_labeled_client_PC(0, 0, [(x[c], x[c], y[c]) for c in cut], device)
            else:
                trainer.train_semiFed_model_unlabeled_client_PC(0, 0, [(x[c], x[c]) for c in cut], device)
            results.append(own.state_dict())
        code.averaging.federated_averaging_by_params(results, sizes)

    return {"ours": lambda: ours.training_step(batch, 0), "authors": authors}


def speed(checkout: Path | None, device: str = "cpu") -> dict[str, dict[str, float]]:
    """A round in turns, medians: ten clients of 128 pictures with the small network, which ours trains together; two
    clients of 16 pictures of 16 x 16, a step each, with the paper's.
    """
    if checkout is None:
        raise ValueError("The networks come from the authors' code: give --authors DIR.")
    found = {}
    with _authors(checkout) as code:
        found["round_small"] = in_turns(_sides(code, device, [128] * 10, True, None, 64), device)
        found["round_paper"] = in_turns(_sides(code, device, [16] * 2, False, 1, 16), device, rounds=3)
    return found
