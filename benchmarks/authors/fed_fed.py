"""FedFed beside the authors' code (visitworld123/FedFed): their clients' own methods on the same batches and draws."""

import contextlib
import importlib
import random
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import zoo.vision.federated.fed_fed as method
from benchmarks.measure import error, float64, in_turns
from zoo.engines.federated import Clients, average
from zoo.vision.federated.fed_fed import FedFed, balanced, draw_noise, joint_loss, mosaics, our_name

TOPS = {"algorithms", "algorithms_standalone", "data_preprocessing", "loss_fn", "lr_scheduler", "model", "optim"}
TOPS |= {"trainers", "utils", "configs"}


@contextlib.contextmanager
def _package(checkout: Path) -> Iterator[Any]:
    """Their modules, importable and gone afterwards; what they log to is empty."""
    before, path = dict(sys.modules), list(sys.path)
    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = object  # type: ignore[attr-defined]
    sys.modules["torch.utils.tensorboard"] = board
    sys.path.insert(0, str(checkout))
    try:
        names = {
            "client": "algorithms_standalone.basePS.client",
            "vae": "model.FL_VAE",
            "resnet": "model.cv.resnet_v2",
            "trainer": "trainers.normal_trainer",
            "set": "utils.set",
            "data": "utils.data_utils",
        }
        yield SimpleNamespace(**{key: importlib.import_module(name) for key, name in names.items()})
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] in TOPS:
                del sys.modules[name]
        sys.modules.pop("torch.utils.tensorboard", None)
        if "torch.utils.tensorboard" in before:
            sys.modules["torch.utils.tensorboard"] = before["torch.utils.tensorboard"]


@contextlib.contextmanager
def _drawn(noises: list[Tensor]) -> Iterator[None]:
    """Their noise: these tensors one after the other, then none."""
    before = torch.normal
    torch.normal = lambda mean, std, size: noises.pop(0) if noises else torch.zeros(size)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.normal = before  # type: ignore[assignment]


def _args(**changes: Any) -> SimpleNamespace:
    given = dict(dataset="cifar10", num_classes=10, model_input_channels=3, VAE_mean=0, VAE_std1=0.15, VAE_std2=0.25)
    given |= dict(noise_type="Gaussian", VAE_alpha=2.0, VAE_local_epoch=1, VAE_aug_batch_size=64, VAE_curriculum=True)
    given |= dict(VAE_re=5.0, VAE_ce=2.0, VAE_kl=0.005, VAE_x_ce=0.4, VAE_z=16, VAE_d=8, VAE_adaptive=True)
    given |= dict(VAE_batch_size=64, record_tool="none", wandb_record=False, fedprox=False, scaffold=False)
    return SimpleNamespace(**given | changes)


def _client(package: Any, args: SimpleNamespace, kind: int | None = None, small: bool = True) -> Any:
    """One of their clients with a VAE, a ResNet-10 inside where ``small``, and its optimiser."""
    found = object.__new__(package.client.Client)
    vae = package.vae.FL_CVAE_cifar(args=args, d=args.VAE_d, z=args.VAE_z, device="cpu")
    if small:
        vae.classifier = package.resnet.ResNet10(args, num_classes=args.num_classes)
    for norm in vae.modules():  # weights that tell one channel from another
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)
    found.vae_model, found.args, found.device, found.client_index = vae, args, "cpu", 0
    found.local_traindata_property = kind
    found.vae_optimizer = package.client.AdamW(
        [{"params": vae.parameters()}], lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-6
    )
    return found


def _ours(vae: nn.Module, **changes: Any) -> FedFed:
    """Ours with their weights, for three clients."""
    dtype = torch.get_default_dtype()
    content = {"vae": vae.state_dict(), "classifier": vae.classifier.state_dict()}
    hyperparameters, state = FedFed.convert_state_dict(content)
    found = FedFed(**{**hyperparameters, "num_clients": 3, "authors_noise": True, "authors_frozen": True, **changes})
    own = found.state_dict()
    found.load_state_dict({**own, **{k: v.clone() for k, v in state.items()}})
    found.log = lambda *a, **k: None  # type: ignore[method-assign]
    return found.to(dtype)


def _batches(number: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Smooth pictures, whose classes are balanced."""
    small = torch.rand(number, size, 3, 4, 4)
    large = torch.nn.functional.interpolate(small.flatten(0, 1), (32, 32), mode="bilinear").view(
        number, size, 3, 32, 32
    )
    return [(x, torch.arange(size) % 10) for x in large]


def _distilled(package: Any, kind: int | None, size: int = 8) -> tuple[Any, FedFed, list[float], list[float]]:
    """One epoch of a client's three steps, two batches each: their client, ours after it, and the losses of both."""
    client = _client(package, _args(), kind)
    ours = _ours(client.vae_model)
    passes = {name: _batches(2, size) for name in ("mixup", "mosaic", "joint")}
    state = {name: value[None].clone() for name, value in ours.vae.state_dict().items()}
    batches: dict[str, list[dict[str, Tensor]]] = {name: [] for name in passes}
    full = torch.ones(1, size, dtype=torch.bool)
    losses: list[float] = []
    backward = torch.Tensor.backward

    def noted(self: Tensor, *a: Any, **k: Any) -> None:
        losses.append(float(self))
        backward(self, *a, **k)

    torch.Tensor.backward = noted  # type: ignore[method-assign]
    try:
        for number, (x, y) in enumerate(passes["mixup"]):  # their draws, and again for ours
            np.random.seed(number)
            torch.manual_seed(number)
            client.aug_classifier_train(0, 1, client.vae_optimizer, [(x, y)])
            np.random.seed(number)
            torch.manual_seed(number)
            share, other = np.random.beta(2.0, 2.0), torch.randperm(size)
            batch = {"image": x, "label": y, "share": torch.tensor([share]).to(x), "other": other}
            batches["mixup"].append({k: v[None] for k, v in batch.items()} | {"mask": full})
        eps = torch.randn(2, 64, 16)
        for number, (x, y) in enumerate(passes["mosaic"] if kind != 2 else ()):
            client.vae_model.reparameterize = lambda m, v, e=eps[number]: m + (0.5 * v).exp() * e
            random.seed(number)
            np.random.seed(number)
            with _drawn([]):
                client.aug_VAE_train(0, 1, client.vae_optimizer, [(x, y)])
            random.seed(number)
            np.random.seed(number)
            image = mosaics(x[None], *(value[None] for value in _mosaic_draws(64, size)))
            batch = {"image": image[0], "label": y, "eps": eps[number]}
            batches["mosaic"].append({k: v[None] for k, v in batch.items()} | {"mask": full})
        noise, eps = (
            torch.randn(2, 2, 3, 32, 32) * torch.tensor([0.15, 0.25])[:, None, None, None],
            torch.randn(2, size, 16),
        )
        for number, (x, y) in enumerate(passes["joint"]):
            client.vae_model.reparameterize = lambda m, v, e=eps[number]: m + (0.5 * v).exp() * e
            with _drawn(list(noise[number])):
                client.train_whole_process(0, 1, client.vae_optimizer, [(x, y)])
            shown = noise[number][:, None].expand(2, size, 3, 32, 32)
            batch = {"image": x, "label": y, "eps": eps[number], "noise": shown}
            batches["joint"].append({k: v[None] for k, v in batch.items()} | {"mask": full})
    finally:
        torch.Tensor.backward = backward  # type: ignore[method-assign]
    own, real = [], method.Pass

    class Given:
        """Prepared batches in the place of a way through a client's samples."""

        def __init__(self, module: Any, samples: Any, name: str, epoch: int):
            self.batches, self.counts = batches[name], [2]

        def __iter__(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
            return iter([(1, batch) for batch in self.batches])

    label = torch.zeros(size, dtype=torch.long) if kind == 2 else torch.arange(size)
    sizes = [size, 100 * size if kind == 1 else size]
    samples = SimpleNamespace(batch={"size": sizes}, rows=[0], own=lambda key, i: label)
    before = Clients.step

    def step(self: Clients, *a: Any, **k: Any) -> dict[str, Tensor]:
        found = before(self, *a, **k)
        own.append(float(found["loss"]))
        return found

    method.Pass, Clients.step = Given, step  # type: ignore[misc, assignment, method-assign]
    try:
        ours.vae.train()
        clients = Clients(ours.vae, state, lambda leaves: torch.optim.SGD(leaves, lr=0.0), stacked=True)
        ours.distill(clients, samples)
    finally:
        method.Pass, Clients.step = real, before  # type: ignore[misc, method-assign]
    ours.vae.load_state_dict({name: value[0] for name, value in state.items()})
    return client, ours, losses, own


def _mosaic_draws(number: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What their loop draws for its mosaics, in its order."""
    picks, corners, holes = [], [], []
    for _ in range(number):
        picks.append(random.sample(range(size), 4))
        corners.append([random.randint(0, 16), random.randint(0, 16)])
        holes.append([np.random.randint(32), np.random.randint(32)])
    return torch.tensor(picks), torch.tensor(corners), torch.tensor(holes)


def _weights(client: Any, ours: FedFed, statistics: bool) -> float:
    """Largest relative error of the VAE's tensors, of f's running statistics only where asked."""
    own = ours.vae.state_dict()
    errors = []
    for name, value in client.vae_model.state_dict().items():
        if statistics or not ("classifier" in name and ("running" in name or "tracked" in name)):
            errors.append(error(own[our_name(name)].double(), value.double()))
    return max(errors)


def compare(checkout: Path) -> dict[str, float]:
    """Largest relative errors."""
    found: dict[str, float] = {}
    with _package(checkout) as package:
        # Networks, Eq. 6 and its gradients, in float32.
        torch.manual_seed(0)
        client = _client(package, _args())
        ours, ((x, y),) = _ours(client.vae_model), _batches(1, 6)
        eps, noise = torch.randn(6, 16), [0.15 * torch.randn(3, 32, 32), 0.25 * torch.randn(3, 32, 32)]
        client.vae_model.train()
        client.vae_model.reparameterize = lambda m, v: m + (0.5 * v).exp() * eps
        with _drawn(list(noise)):
            out, _, gx, mu, logvar, _, _, _ = client.vae_model(x)
        cross = torch.nn.functional.cross_entropy
        divergence = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / (6 * 3 * 16)
        loss = 50 * torch.nn.functional.mse_loss(gx, x) + 2 * cross(out[:12], y.repeat(2)) + 0.005 * divergence
        loss = loss + 0.4 * cross(out[12:], y)
        loss.backward()
        ours.vae.train()
        found["forward"] = max(error(a, b) for a, b in zip(ours.vae(x, eps), (gx, mu, logvar), strict=True))
        batch = {"image": x, "label": y, "mask": torch.ones(6, dtype=torch.bool), "eps": eps}
        batch |= {"noise": torch.stack(noise)[:, None].expand(2, *x.shape)}
        batch["weight"] = torch.tensor([50.0, 2.0, 0.005, 0.4])
        own = joint_loss(ours.vae, batch)["loss"]
        own.backward()
        found["loss"] = error(own, loss)
        theirs = {our_name(name): p.grad for name, p in client.vae_model.named_parameters()}
        pairs = [(p.grad.flatten(), theirs[name].flatten()) for name, p in ours.vae.named_parameters()]
        found["gradients"] = error(*(torch.cat(side) for side in zip(*pairs, strict=True)))

        # A client's whole local epoch with AdamW, which makes steps of the size of the rate out of rounding: float64.
        with float64():
            for label, kind in (("ordinary", None), ("few", 1), ("one_class", 2)):
                torch.manual_seed(1)
                client, ours, losses, own_losses = _distilled(package, kind)
                found[f"distill_{label}_float64_loss"] = error(torch.tensor(own_losses), torch.tensor(losses))
                found[f"distill_{label}_float64_weights"] = _weights(client, ours, statistics=kind == 2)

        # Mosaics.
        random.seed(3)
        np.random.seed(3)
        theirs = client.mosaic(x)
        random.seed(3)
        np.random.seed(3)
        found["mosaics"] = error(mosaics(x[None], *(value[None] for value in _mosaic_draws(64, 6)))[0], theirs)

        # Sharing: 70 pictures, two of their batches.
        torch.manual_seed(2)
        client = _client(package, _args())
        ours = _ours(client.vae_model)
        client.train_ori_data = np.random.default_rng(0).integers(0, 256, (70, 32, 32, 3), dtype=np.uint8)
        client.train_ori_targets = np.arange(70) % 10
        generator = torch.Generator().manual_seed(7)
        noise = [
            draw_noise((n, 3, 32, 32), std, "gaussian", generator, True)[0] for n in (64, 6) for std in (0.15, 0.25)
        ]
        with _drawn(noise):
            client.generate_data_by_vae()
        pictures = torch.from_numpy(client.train_ori_data).permute(0, 3, 1, 2).float() / 255
        _, first, second = ours.residuals(pictures, ours.vae.state_dict(), torch.Generator().manual_seed(7))
        found["shared"] = max(error(first, client.local_share_data1), error(second, client.local_share_data2))

        # Drawing from the pool: how many of each class.
        labels = torch.randint(10, (3000,))
        client.local_sample_number, client.dataset_num = 237, 3000
        _, drawn = client.sample_iid_data_from_share_dataset(labels[:, None], labels[:, None], labels)
        places = balanced(labels, 237, 10, torch.Generator().manual_seed(0))
        counts = [torch.bincount(values[:230], minlength=10).double() for values in (labels[places], drawn)]
        found["pool_counts"] = error(*counts) + float(len(places) != len(drawn))

        # Two steps of the last phase: the norms' biases begin at 0, and are mostly rounding in float32.
        with float64():
            found["last_phase_float64_step"] = _last_phase(package)
        # Averaging three clients.
        nets = [package.resnet.ResNet10(_args(), num_classes=10).state_dict() for _ in range(3)]
        theirs = package.data.average_named_params([(n, s) for n, s in zip((5, 9, 2), nets, strict=True)],
                                                   [5 / 16, 9 / 16, 2 / 16])  # fmt: skip
        stacked = {name: torch.stack([s[name] for s in nets]) for name in nets[0]}
        own = average(stacked, torch.tensor([5.0, 9.0, 2.0]))
        found["average"] = max(error(own[name], value) for name, value in theirs.items() if value.is_floating_point())
    return found


def _last_phase(package: Any) -> float:
    """Two steps of their trainer and of ours on pictures and residuals: largest relative error of the tensors."""
    torch.manual_seed(3)
    net = package.resnet.ResNet10(_args(), num_classes=10)
    vae = _client(package, _args()).vae_model
    vae.classifier = net
    ours = _ours(vae)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    given: tuple[Any, ...] = (net, "cpu", nn.CrossEntropyLoss(), optimizer, None, _args())
    trainer = package.trainer.NormalTrainer(*given, role="client", client_index=0)
    triples = [tuple(_batches(1, 6)[0] for _ in range(3)) for _ in range(2)]
    trainer.train_mix_dataloader(0, [tuple(x for x, _ in t) + tuple(y for _, y in t) for t in triples], "cpu")
    state = {name: value[None].clone() for name, value in ours.model.state_dict().items()}
    clients = Clients(ours.model.train(), state, ours.local_optimizer, stacked=True)
    for (x, y), *pooled in triples:
        batch = {"image": x, "label": y, "mask": torch.ones(6, dtype=torch.bool)}
        batch |= {"shared": torch.cat([p for p, _ in pooled]), "shared_label": torch.cat([p for _, p in pooled])}
        clients.step(ours.loss, {key: value[None] for key, value in batch.items()})
    return max(error(state[our_name(n)][0].double(), value.double()) for n, value in net.state_dict().items())


def golden(checkout: Path) -> dict[str, Tensor]:
    """A small VAE of theirs with a linear classifier inside: what comes out, Eq. 6's gradients, and what is shared."""
    with _package(checkout) as package:
        torch.manual_seed(0)
        client = _client(package, _args(VAE_d=4, VAE_z=8))
        vae, ((x, y),) = client.vae_model, _batches(1, 5)
        vae.classifier = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10))
        start = {f"weights.{name}": value.clone() for name, value in vae.state_dict().items()}
        eps, noise = torch.randn(5, 8), [0.15 * torch.randn(3, 32, 32), 0.25 * torch.randn(3, 32, 32)]
        vae.train()
        vae.reparameterize = lambda m, v: m + (0.5 * v).exp() * eps
        given = {"image": x, "label": y, "eps": eps, "noise": torch.stack(noise)}
        with _drawn(list(noise)):
            out, _, gx, mu, logvar, _, _, _ = vae(x)
        cross = torch.nn.functional.cross_entropy
        loss = 50 * torch.nn.functional.mse_loss(gx, x) + 2 * cross(out[:10], y.repeat(2)) + 0.4 * cross(out[10:], y)
        loss = loss + 0.005 * -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / (5 * 3 * 8)
        loss.backward()
        found = {**given, "g": gx, "mu": mu, "logvar": logvar, "scores": out, "loss": loss}
        found |= {f"gradient.{name}": p.grad.clone() for name, p in vae.named_parameters()}
    return {**start, **{name: value.detach().contiguous() for name, value in found.items()}}


# ---- speed ----------------------------------------------------------------------------------------------------------


def speed(checkout: Path | None, device: str = "cpu") -> dict[str, dict[str, float]]:
    """One joint step of the paper's networks on 8 pictures; 64 mosaics of a batch; a client's draw from the pool."""
    torch.manual_seed(0)
    ours = FedFed(num_clients=3, authors_noise=True).to(device)
    ((x, y),) = _batches(1, 8)
    batch = {"image": x, "label": y, "mask": torch.ones(8, dtype=torch.bool), "eps": torch.randn(8, 2048)}
    batch |= {"noise": torch.zeros(2, *x.shape), "weight": torch.tensor([50.0, 2.0, 0.005, 0.4])}
    batch = {key: value[None].to(device) for key, value in batch.items()}
    state = {name: value[None].clone() for name, value in ours.vae.state_dict().items()}
    moments = method.Moments(state, [name for name, _ in ours.vae.named_parameters()])
    rest: list[Tensor | None] = [None] * len(moments.names)
    make: Callable[..., Any] = lambda leaves: method.RowAdamW(leaves, moments, rest, 1e-3, 1e-6)  # noqa: E731
    clients = Clients(ours.vae.train(), state, make, stacked=False)
    labels, generator = torch.randint(10, (50_000,)), torch.Generator().manual_seed(0)
    picks, corner, hole = (
        torch.rand(1, 64, 8).argsort(-1)[..., :4],
        torch.randint(17, (1, 64, 2)),
        torch.randint(32, (1, 64, 2)),
    )
    pool = torch.zeros(50_000, 3, 8, 8)
    sides: dict[str, dict[str, Callable[[], Any]]] = {
        "joint_step": {"ours": lambda: clients.step(joint_loss, batch)},
        "mosaics": {"ours": lambda: mosaics(x[None].to(device), picks.to(device), corner.to(device), hole.to(device))},
        "pool_draw": {"ours": lambda: pool[balanced(labels, 5000, 10, generator)]},
    }
    if checkout is not None:
        with _package(checkout) as package:
            client = _client(package, _args(VAE_d=32, VAE_z=2048), small=False)
            client.device, client.vae_model.device = device, device
            client.vae_model.to(device)
            client.local_sample_number, client.dataset_num = 5000, 50_000
            sides["joint_step"]["authors"] = lambda: client.train_whole_process(0, 1, client.vae_optimizer, [(x, y)])
            sides["mosaics"]["authors"] = lambda: client.mosaic(x).to(device)
            sides["pool_draw"]["authors"] = lambda: client.sample_iid_data_from_share_dataset(pool, pool, labels)
    return {name: in_turns(runs, device) for name, runs in sides.items()}
