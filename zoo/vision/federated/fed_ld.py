"""FedLD: federated averaging whose clients hold back their margins, and whose server follows principal directions.

Paper: Zeng, Guo, Wang, Wang, Zhou, Qu, "Tackling Data Heterogeneity in Federated Learning via Loss Decomposition",
MICCAI 2024, arXiv:2408.12300. Code by the authors: https://github.com/Zeng-Shuang/FedLD, no licence.

The global model's loss on all data is the clients' local losses, plus what their models lose on the others' data
(distribution shift), plus what is lost in combining them (aggregation). Two switches, one for each of the latter:

    margin control      loss = cross entropy + margin log(1 + ||P||^2),   P (b, k) the softmax of a local batch
    principal gradients of each tensor's updates G (m, d):  G G^T / m = E diag(S) E^T,   v_j = G^T e_j
                        update = 1/m sum_i sum_{j <= k} sign(<g_i, v_j>) S_j / sum S  ||g_i||  v_j / ||v_j||

with the k = int(share m) largest S. As <g_i, v_j> = m S_j e_ij, the update is G^T c with c (m,) from the m x m problem
alone. Until a tensor has moved for the first time, and of tensors of one number, it is the clients' mean; all clients
count alike.
With ``margin`` 0 and ``principal`` 0 this is FedAvg.

Index legend: m clients that answered, d numbers of a tensor, b samples of a local batch, k classes, T tensors.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from zoo.core import ZooError, unwrap
from zoo.core.errors import nearest
from zoo.engines.federated import Clients, FederatedModule, Message, average, full_precision, masked_mean, pixels

# ---- the two ideas --------------------------------------------------------------------------------------------------


def margin_penalty(logits: Tensor, mask: Tensor, reduction: str = "batch") -> Tensor:
    """log(1 + ||P||^2) of the probabilities: small where none is sure.

    Args:
        reduction: "batch" takes the norm of all probabilities of a batch together, which grows with the batch as the
            authors' does; "sample" the mean over samples of each one's.
    Shapes:
        logits: (b, k); mask: (b,) bool; returns: ()
    """
    square = logits.softmax(-1).square().sum(-1)
    if reduction == "sample":
        return masked_mean(square.log1p(), mask)
    return (square * mask).sum().log1p()


def principal_weights(gram: Tensor, keep: int) -> Tensor:
    """How much of each client's update goes into the aggregate, from the products of their updates.

    Directions in which nothing moves, less than 1e-12 of the largest, weigh 0; the authors divide 0 by 0 there.

    Args:
        gram: G G^T of each tensor. keep: how many directions.
    Shapes:
        gram: (T, m, m) float64; returns: c (T, m), the aggregate is sum_i c_i g_i
    """
    count = gram.shape[-1]
    values, vectors = torch.linalg.eigh(gram / count)  # ascending
    values, vectors = values[:, -keep:].clamp(min=0), vectors[:, :, -keep:]
    total = gram.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) / count  # the sum of all S
    norms = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    votes = (vectors.sign() * norms[:, :, None]).mean(1)
    alive = values > 1e-12 * values[:, -1:]
    # S_j / sum S, over ||v_j|| = sqrt(m S_j)
    scale = torch.where(alive, values, 0.0).sqrt() / (total * count**0.5).clamp(min=torch.finfo(gram.dtype).tiny)
    return (vectors * (votes * scale)[:, None]).sum(2)


def principal_mean(updates: Mapping[str, Tensor], share: float, ready: Tensor) -> Message:
    """The aggregate of clients' updates along their principal directions, tensor by tensor.

    Args:
        updates: each (m, ...). share: of the m directions that are kept; 0 of them gives the mean.
        ready: (T,) bool, which tensors are combined so; the mean for the others, and for those of one number.
    Shapes:
        returns: each (...)
    Raises:
        ZooError: if an update is not finite.
    """
    flat = {name: value.flatten(1) for name, value in updates.items()}
    if not flat:
        return {}
    with full_precision(ready):  # a run in bf16 must not combine in it
        return _principal_mean(updates, flat, share, ready)


def _principal_mean(updates: Mapping[str, Tensor], flat: Message, share: float, ready: Tensor) -> Message:
    count = len(next(iter(flat.values())))
    grams = torch.stack([value @ value.T for value in flat.values()])
    grams = (
        grams.double() if grams.is_meta else grams.cpu().double()
    )  # small problems; and not every device has float64
    weights = torch.full_like(grams[:, 0], 1 / count)
    if int(count * share):
        if not grams.is_meta and not bool(grams.isfinite().all()):
            raise ZooError("A client's update is not finite: its training diverged. Lower lr, or set clip.")
        long = torch.tensor([value.shape[1] > 1 for value in flat.values()], device=grams.device)
        chosen = ready.to(grams.device) & long
        weights = torch.where(chosen[:, None], principal_weights(grams, int(count * share)), weights)
    return {n: (c.to(v) @ v).view(updates[n].shape[1:]) for (n, v), c in zip(flat.items(), weights, strict=True)}


# ---- the method -----------------------------------------------------------------------------------------------------


class FedLD(FederatedModule):
    """Federated averaging with margin control at the clients and principal gradients at the server.

    Args:
        net: name of a classifier of `zoo.nn.classifiers`, or "torchvision:<model>", one of torchvision's: the paper's
            is its ResNet-50 in the form for ImageNet.
        pretrained: begin with torchvision's ImageNet weights (IMAGENET1K_V1, as the paper), all but the last layer;
            they are downloaded. Only with "torchvision:".
        num_classes, in_channels, image_size: as in `FederatedModule`; the paper's Retina has 2 classes.
        margin: weight of margin control; 0 turns it off.
        margin_reduction: "batch" or "sample", see `margin_penalty`.
        principal: share of principal directions that are kept; 0 turns them off and averages by numbers of samples.
        warm_up: local epochs E t over which the learning rate rises, to the same in all steps of a round; 0 for none.
        decompose: log what the global loss on the round's data consists of, "local_loss", "shift_loss" and
            "aggregation_loss". It looks at all clients' data at once: for analysis only.
        authors_buffers: combine the statistics of batch norm along principal directions, as the authors do, which may
            make a variance negative; else they are averaged.
        authors_eval: train in eval mode, in which the authors' test before training leaves the network: batch norm then
            goes by the statistics that it began with.
        authors_warm_up: begin at a rate of 0, so that the first round trains nothing; else one round further up.
    Raises:
        ValueError: if an argument is out of range, or there are fewer than 2 clients.
        ZooError: if torchvision knows no such model.
    Example:
        >>> from zoo.vision import FedLD
        >>> model = FedLD.from_variant("tiny", num_clients=5)
        >>> probabilities = model.predict(torch.rand(2, 1, 8, 8))
    """

    head: ClassVar[tuple[str, ...]] = ("model.head", "model.fc")
    untrusted: ClassVar[tuple[str, ...]] = ("pretrained",)  # a checkpoint brings its weights
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {
            "net": {"name": "cnn", "widths": [8, 16], "features": 32},
            "num_classes": 10,
            "in_channels": 1,
            "image_size": 8,
            "norm": "none",
            "warm_up": 0,
            "local_batch": 32,
            "mean": [],
            "std": [],
        }
    }

    def __init__(
        self,
        net: str | dict[str, Any] = "torchvision:resnet50",
        pretrained: bool = False,
        num_classes: int = 2,
        in_channels: int = 3,
        image_size: int = 384,
        num_clients: int = 5,
        margin: float = 0.1,
        margin_reduction: str = "batch",
        principal: float = 0.8,
        lr: float = 0.01,
        momentum: float = 0.5,
        weight_decay: float = 5e-4,
        lr_decay: float = 1.0,
        warm_up: int = 5,
        local_epochs: int = 1,
        local_steps: int | None = None,
        local_batch: int = 50,
        norm: str = "batch",
        batch_norm: str = "aggregate",
        clip: float = 0.0,
        augment: list[str] = [],  # noqa: B006 (read only; the command knows no tuple)
        mean: list[float] = [0.5007, 0.5010, 0.5019],  # noqa: B006
        std: list[float] = [0.0342, 0.0535, 0.0484],  # noqa: B006
        decompose: bool = False,
        authors_buffers: bool = False,
        authors_eval: bool = False,
        authors_warm_up: bool = False,
        stack: int | None = None,
    ):
        super(FederatedModule, self).__init__()
        self.save_hyperparameters()
        if num_clients < 2:
            raise ValueError(f"num_clients is {num_clients}; principal directions need at least 2.")
        if margin < 0 or not 0 <= principal <= 1 or warm_up < 0:
            raise ValueError(
                f"margin={margin}, principal={principal}, warm_up={warm_up}: margin and warm_up must not be negative, "
                "and principal lies in [0, 1]."
            )
        if margin_reduction not in ("batch", "sample"):
            raise ValueError(f"margin_reduction is {margin_reduction!r}; 'batch' or 'sample'.")
        if principal and int(principal * num_clients) < 1:
            raise ValueError(f"principal is {principal}: no direction of {num_clients} clients is left; give more.")
        self._setup()
        if authors_eval:
            self._hp["drop_last"] = False
        self.register_buffer("ready", torch.zeros(len(self._combined), dtype=torch.bool))  # which have moved

    def build(self) -> nn.Module:
        net = self._hp["net"]
        if not (isinstance(net, str) and net.startswith("torchvision:")):
            if self._hp["pretrained"]:
                raise ValueError(f"pretrained is for nets of torchvision; net is {net!r}.")
            return super().build()
        return _torchvision(net.removeprefix("torchvision:"), self._hp)

    @property
    def _combined(self) -> list[str]:
        """What is combined along principal directions, by its name in messages; the rest is averaged."""
        trained = {name for name, _ in self.model.named_parameters()}
        own = self._shared
        return [
            f"model.{name}"
            for name, value in self.model.state_dict().items()
            if name in own and value.is_floating_point() and (name in trained or self._hp["authors_buffers"])
        ]

    def clients(self, state: Message, stacked: bool, own: Message | None = None) -> Clients:
        found = super().clients(state, stacked, own)
        self.model.train(not self._hp["authors_eval"])
        return found

    def round_lr(self) -> float:
        hp = self._hp
        epochs = hp["local_epochs"] * (self.done + (not hp["authors_warm_up"]))
        return super().round_lr() * (min(epochs / hp["warm_up"], 1.0) if hp["warm_up"] else 1.0)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross entropy and margin control; logs the penalty too."""
        logits = self.logits(model, self.normalise(batch["image"]))
        each = F.cross_entropy(logits, batch["label"], reduction="none")
        penalty = margin_penalty(logits, batch["mask"], self._hp["margin_reduction"])
        return {"loss": masked_mean(each, batch["mask"]) + self._hp["margin"] * penalty, "penalty": penalty}

    def aggregate(self, down: Message, up: Message, weights: Tensor, batch: dict[str, Any]) -> None:
        share = self._hp["principal"]
        if share:
            names = self._combined
            moved = principal_mean({n: up[n] - down[n] for n in names}, share, self.ready)
            self.ready |= torch.stack([value.any() for value in moved.values()])
            rest = {n: value for n, value in up.items() if n.startswith("model.") and n not in moved}
            mean = average(rest, torch.ones_like(weights))
            self.set_weights(mean | {n: down[n] + value for n, value in moved.items()})
        else:
            super().aggregate(down, up, weights, batch)
        if self._hp["decompose"]:
            for name, value in self.decomposition(up, batch).items():
                self.log(f"train/{name}", value, batch_size=len(weights))

    # ---- analysis ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decomposition(self, up: Message, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What the aggregated model's loss on all data of the round consists of: three parts that add up to it.

        "local_loss", the mean of the clients' models' losses on their own data; "shift_loss", how much more these lose
        on all data; "aggregation_loss", how much more than that the aggregated model does. In eval mode.
        """
        ends = torch.tensor(batch["size"]).cumsum(0).tolist()
        rows = [row for row, share in enumerate(batch["work"]) if share > 0]
        local, everywhere = [], []
        for place, row in enumerate(rows):
            each = self._losses({n: value[place] for n, value in up.items() if n.startswith("model.")}, batch)
            local.append(each[ends[row] - batch["size"][row] : ends[row]].mean())
            everywhere.append(each.mean())
        own, all_ = torch.stack(local).mean(), torch.stack(everywhere).mean()
        whole = self._losses({}, batch).mean()
        return {"local_loss": own, "shift_loss": all_ - own, "aggregation_loss": whole - all_}

    def _losses(self, weights: Message, batch: dict[str, Any]) -> Tensor:
        """Cross entropy of each sample of a round, (n,), with these weights in the place of the global ones."""
        self.model.eval()
        own = {n.removeprefix("model."): value for n, value in weights.items()}
        found = []
        for image, label in zip(batch["image"].split(1024), batch["label"].split(1024), strict=True):
            x = self.normalise(pixels(image))
            found.append(F.cross_entropy(functional_call(self.model, own, (x,)), label, reduction="none"))
        return torch.cat(found)

    @classmethod
    def convert_state_dict(cls, content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """From the authors' global model: a ResNet of torchvision's under torchvision's names.

        Raises:
            ZooError: if it is no such network.
        """
        content = unwrap(content)
        if "fc.weight" not in content or "layer4.0.conv1.weight" not in content:
            raise ZooError(f"FedLD converts torchvision's ResNets; no 'fc.weight' among {list(content)[:3]}.")
        blocks = tuple(len({n.split(".")[1] for n in content if n.startswith(f"layer{i}.")}) for i in range(1, 5))
        kind = (blocks, "layer1.0.conv3.weight" in content)
        if kind not in RESNETS:
            raise ZooError(f"FedLD converts torchvision's ResNets; none has {blocks} blocks.")
        state = {f"model.{name}": value for name, value in content.items()}
        trained = sum(not n.endswith(("running_mean", "running_var", "num_batches_tracked")) for n in content)
        state |= {"round": torch.zeros((), dtype=torch.long), "sent": torch.zeros(2, dtype=torch.float64)}
        state["ready"] = torch.zeros(trained, dtype=torch.bool)
        return {"net": f"torchvision:{RESNETS[kind]}", "num_classes": len(content["fc.weight"])}, state


RESNETS = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
"""By the blocks of the stages, and whether these are bottlenecks."""


def _torchvision(name: str, hp: dict[str, Any]) -> nn.Module:
    """One of torchvision's ResNets, in the form for ImageNet: a 7 x 7 stem of stride 2 and pooling."""
    if name not in RESNETS.values():
        known = sorted(RESNETS.values())
        raise ZooError(f"No net 'torchvision:{name}'.{nearest(name, known)} There are {', '.join(known)}.")
    if hp["in_channels"] != 3:
        raise ValueError(f"in_channels is {hp['in_channels']}; torchvision's nets take 3.")
    from torchvision import models

    network = models.get_model(name, weights=None, num_classes=hp["num_classes"])
    if hp["pretrained"] and not network.fc.weight.is_meta:
        weights = models.get_model_weights(name)["IMAGENET1K_V1"].get_state_dict(progress=False, check_hash=True)
        body = {n: value for n, value in weights.items() if not n.startswith("fc.")}
        network.load_state_dict(body | {f"fc.{n}": value for n, value in network.fc.state_dict().items()})
    return network
