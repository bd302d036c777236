"""DisPFL: clients among peers, each with a sparse network of its own whose active weights alone are trained and sent.

Paper: Dai, Shen, He, Tian, Tao, "DisPFL: Towards Communication-Efficient Personalized Federated Learning via
Decentralized Sparse Training", ICML 2022, arXiv:2206.00187. Code: https://github.com/rong-dai/DisPFL, MIT.

There is no server. Client k has weights w_k and a mask m_k of a fixed number of active weights. In a round it takes
from its peers G_k (itself among them) the mean over those that own a weight, trains, and moves a part of its mask:

    w_k = m_k * sum_j w_j / sum_j m_j          over j in G_k, 0 where nobody owns it; w_j is 0 outside its mask
    SGD on w_k, whose gradients are masked
    fire the ceil(alpha_t n) smallest |w_k| of each tensor's n active ones
    regrow as many inactive ones, those of the largest |gradient|
    alpha_t = anneal / 2 (1 + cos(pi t / rounds))

What a peer sends is the model that it trained, under the mask that it trained it with; its moved mask holds from the
next round on. A weight regrown begins at what its owners among the peers have, or at 0. With ``density`` 1 this is
decentralised SGD (D-PSGD), and with ``topology="full"`` besides, federated averaging.

What one picture of nobody's is classified with (``client`` -1) is the mean over all owners of each weight.

Index legend: s clients of a round, p peers, n weights of a tensor, t round.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.core import ZooError
from zoo.core.seeding import seed_from
from zoo.engines.federated import Clients, FederatedModule, Message, Samples, full_precision, local_batches
from zoo.nn.classifiers import has_batch_norm

CIFAR_MEAN, CIFAR_STD = [0.49139968, 0.48215827, 0.44653124], [0.24703233, 0.24348505, 0.26158768]


# ---- masks ----------------------------------------------------------------------------------------------------------


def layer_densities(shapes: Mapping[str, Sequence[int]], density: float, power: float = 1.0) -> dict[str, float]:
    """The share of each tensor's weights that is active, by Erdos-Renyi-Kernel: the smaller a tensor, the denser.

        density_l = eps (sum of its sizes / product of its sizes) ** power

    with eps such that ``density`` of all weights are active. Tensors that would come above 1 are dense, and eps is
    found again for the others. Evci et al., "Rigging the Lottery", ICML 2020, arXiv:1911.11134.

    Raises:
        ValueError: if ``density`` is not in (0, 1], or less than what the dense tensors alone take.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}; it must be in (0, 1].")
    raw = {name: (sum(shape) / math.prod(shape)) ** power for name, shape in shapes.items()}
    numbers = {name: math.prod(shape) for name, shape in shapes.items()}
    dense: set[str] = set() if density < 1 else set(shapes)
    while len(dense) < len(shapes):
        ones = density * sum(numbers.values()) - sum(numbers[name] for name in dense)
        others = [name for name in shapes if name not in dense]
        scale = ones / sum(raw[name] * numbers[name] for name in others)
        if scale <= 0:
            small = sum(numbers[name] for name in dense) / sum(numbers.values())
            raise ValueError(f"density is {density}: the small tensors, which stay dense, are {small:.3g} already.")
        largest = max(raw[name] for name in others)
        if largest * scale <= 1:
            return {name: 1.0 if name in dense else scale * raw[name] for name in shapes}
        dense |= {name for name in others if raw[name] == largest}
    return dict.fromkeys(shapes, 1.0)


def random_mask(shape: Sequence[int], density: float) -> Tensor:
    """``int(density * n)`` random places of a tensor, bool; drawn from torch's global generator."""
    found = torch.zeros(math.prod(shape), dtype=torch.bool)
    found[torch.randperm(len(found))[: int(density * len(found))]] = True
    return found.view(*shape)


def largest(values: Tensor, counts: Tensor) -> Tensor:
    """Where each row's ``counts`` largest values are.

    Shapes:
        values: (s, n); counts: (s,); returns: (s, n) bool
    """
    order = values.argsort(1, descending=True)
    taken = torch.arange(values.shape[1], device=values.device) < counts[:, None]
    return torch.zeros_like(taken).scatter(1, order, taken)


def fire(masks: Tensor, weights: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Masks without the smallest of the active weights, and how many of each client's those are.

    Shapes:
        masks, weights: (s, n); returns: (s, n) bool, (s,)
    """
    counts = (share * masks.sum(1).float()).ceil()
    return masks & ~largest(torch.where(masks, -weights.abs(), -torch.inf), counts), counts


def regrow(masks: Tensor, scores: Tensor, counts: Tensor) -> Tensor:
    """Masks with as many inactive weights again, those of the largest scores; what was just fired is among them.

    Shapes:
        masks: (s, n) bool; scores: (s, n) not negative; counts: (s,); returns: (s, n) bool
    """
    return masks | largest(torch.where(masks, -torch.inf, scores), counts)


def owners_mean(weights: Tensor, masks: Tensor, peers: Tensor) -> Tensor:
    """Each client's mean of its peers' weights over those that own them; 0 where none does.

    Shapes:
        weights: (p, ...), 0 outside the masks; masks: (p, ...) bool; peers: (s, p) 0 or 1; returns: (s, ...)
    """
    with full_precision(weights):  # a run in bf16 must not average in it
        owned = peers @ masks.flatten(1).to(peers)
        found = (peers @ weights.flatten(1).to(peers)) / owned.clamp(min=1)
    return found.view(len(peers), *weights.shape[1:]).to(weights)


# ---- the method -----------------------------------------------------------------------------------------------------


class DisPFL(FederatedModule):
    """Decentralised personalised training of sparse networks.

    A client that takes part listens to peers among those that take part. What is counted as sent is what goes over all
    links: 4 bytes for each active weight, and for a tensor that is not dense one bit an entry for the mask; up and down
    are the same. ``train/busiest_mb`` is what the busiest client sends and gets in a round.

    Args:
        net, num_classes, in_channels, image_size: as in `FederatedModule`; the paper's is a ResNet-18 with group norm.
        density: share of active weights of each client; several are dealt to the clients in turn.
        layers: "erk", see `layer_densities`, or "uniform", the same share of every tensor.
        erk_power: how much denser small tensors are.
        shared_mask: begin with one mask for all (of clients with one density) instead of one for each.
        evolve: move masks; False keeps those drawn at the beginning.
        anneal: alpha of the first round, the share of a mask that moves then.
        regrow: "gradient", or "random" as in the authors' scripts.
        rounds: after which alpha is 0, the length of the run.
        topology: whom a client listens to: "random" (``peers`` others, drawn each round), "ring" or "full".
        peers: how many others with "random"; the authors' a tenth of the clients.
        norm: "group" or "none": batch norm's statistics belong to no mask.
    Raises:
        ValueError: if an argument is out of range, a ring has fewer than 3 clients, or the net has batch norm.
    Example:
        >>> from zoo.vision import DisPFL
        >>> model = DisPFL.from_variant("tiny", num_clients=3)
        >>> network = model.client_model(2)
    """

    monitor, mode = "val/personal_accuracy", "max"
    head: ClassVar[tuple[str, ...]] = (
        "model.head",
        "states.personal__head",
        "states.masks__head",
        "states.shared__head",
    )
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {
            "net": {"name": "cnn", "widths": [8, 16], "features": 32},
            "in_channels": 1,
            "image_size": 8,
            "num_clients": 10,
            "peers": 3,
            "rounds": 10,
            "local_epochs": 1,
            "local_batch": 32,
            "augment": [],
            "mean": [],
            "std": [],
        },
        "scripts": {"regrow": "random"},
    }

    def __init__(
        self,
        net: str | dict[str, Any] = "resnet18",
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        num_clients: int = 100,
        density: float | list[float] = 0.5,
        layers: str = "erk",
        erk_power: float = 1.0,
        shared_mask: bool = False,
        evolve: bool = True,
        anneal: float = 0.5,
        regrow: str = "gradient",
        rounds: int = 500,
        topology: str = "random",
        peers: int = 10,
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 5e-4,
        lr_decay: float = 0.998,
        local_epochs: int = 5,
        local_steps: int | None = None,
        local_batch: int = 128,
        norm: str = "group",
        clip: float = 10.0,
        augment: list[str] = ["crop:4", "flip"],  # noqa: B006 (read only; the command knows no tuple)
        mean: list[float] = CIFAR_MEAN,
        std: list[float] = CIFAR_STD,
        stack: int | None = None,
        state_on_disk: bool = False,
    ):
        super(FederatedModule, self).__init__()
        self.save_hyperparameters()
        self.densities = density if isinstance(density, list) else [density]
        if not self.densities or not all(0 < d <= 1 for d in self.densities):
            raise ValueError(f"density is {density}; shares in (0, 1].")
        for key, value, known in (
            ("layers", layers, ("erk", "uniform")),
            ("regrow", regrow, ("gradient", "random")),
            ("topology", topology, ("random", "ring", "full")),
        ):
            if value not in known:
                raise ValueError(f"{key} is {value!r}; one of {', '.join(known)}.")
        if num_clients < 2 or peers < 1 or rounds < 1 or not 0 <= anneal <= 1:
            raise ValueError(
                f"num_clients={num_clients}, peers={peers}, rounds={rounds}, anneal={anneal}: at least 2 clients, "
                "1 peer and 1 round, and anneal in [0, 1]."
            )
        if topology == "ring" and num_clients < 3:
            raise ValueError(f"A ring of {num_clients} clients; it needs at least 3.")
        if norm == "batch":
            raise ValueError("norm is 'batch', whose statistics belong to no mask; use 'group' or 'none'.")
        self._setup()
        if has_batch_norm(self.model):
            raise ValueError("The net has batch norm, whose statistics belong to no mask; give one with group norm.")
        self._links: dict[int, list[int]] = {}
        self._first_masks()

    @property
    def _shared(self) -> set[str]:
        """Nothing is common to all: every weight is its client's own."""
        return set()

    @torch.no_grad()
    def _first_masks(self) -> None:
        """A mask for each client, and the one dense beginning of all under it."""
        parameters = dict(self.model.named_parameters())
        shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        hp = self._hp
        shares = []
        for density in self.densities:
            erk = hp["layers"] == "erk"
            shares.append(layer_densities(shapes, density, hp["erk_power"]) if erk else dict.fromkeys(shapes, density))
        for name, p in parameters.items():
            for kind in ("masks", "shared"):
                self.states.add(f"{kind}.{name}", torch.zeros_like(p, dtype=torch.bool))
        common: dict[int, Message] = {}
        for client in range(hp["num_clients"]):
            place = client % len(shares)
            if not hp["shared_mask"] or place not in common:
                common[place] = {n: random_mask(shapes[n], share)[None] for n, share in shares[place].items()}
            masks = common[place]
            for kind in ("masks", "shared"):
                self.states.write([client], masks, f"{kind}.")
            start = {n: p.detach()[None] * masks[n].to(p.device) for n, p in parameters.items()}
            self.states.write([client], start, "personal.")
        self._consensus()

    # ---- the round --------------------------------------------------------------------------------------------------

    def local(self, batch: dict[str, Any], down: Message, rows: Sequence[int]) -> tuple[Message, Message, Message]:
        self._links = self.neighbours(batch)
        return super().local(batch, down, rows)

    def neighbours(self, batch: dict[str, Any]) -> dict[int, list[int]]:
        """Whom each client of a round listens to, itself first; others that answer in this round."""
        rows = [row for row, share in enumerate(batch["work"]) if share > 0]
        ids = [batch["client"][row] for row in rows]
        found = {}
        for place, row in enumerate(rows):
            others = ids[:place] + ids[place + 1 :]
            if self._hp["topology"] == "ring":
                others = sorted({ids[place - 1], ids[(place + 1) % len(ids)]} - {ids[place]})
            elif self._hp["topology"] == "random":
                generator = torch.Generator().manual_seed(seed_from(batch["seed"][row], "peers"))
                order = torch.randperm(len(others), generator=generator)[: self._hp["peers"]]
                others = [others[i] for i in order.tolist()]
            found[ids[place]] = [ids[place], *others]
        return found

    def start_state(self, ids: Sequence[int], down: Message) -> Message:
        """What each client makes of its peers' models, under its own mask."""
        heard = {client: self._links.get(client, [client]) for client in ids}
        peers = sorted({peer for own in heard.values() for peer in own})
        links = torch.tensor([[float(peer in heard[client]) for peer in peers] for client in ids], device=self.device)
        weights = self.states.read(peers, "personal.", self.device)
        trained_under = self.states.read(peers, "shared.", self.device)
        masks = self.states.read(ids, "masks.", self.device)
        return {n: owners_mean(weights[n], trained_under[n], links) * masks[n] for n in masks}

    def work(self, clients: Clients, samples: Samples, down: Message) -> dict[str, Tensor]:
        """Steps along `loss` within the masks: with masked gradients, inactive weights stay at 0."""
        masks = self.states.read(samples.ids, "masks.", self.device)
        clients.corrections.append(lambda _, grads: {n: g * masks[n][: len(g)] for n, g in grads.items()})
        return self.train_clients(clients, samples)

    def upload(self, clients: Clients, samples: Samples, down: Message) -> tuple[Message, Message]:
        """Nothing goes up: peers fetch the weights and the mask that they were trained under."""
        up, kept = super().upload(clients, samples, down)
        masks = self.states.read(samples.ids, "masks.", self.device)
        moved = self.moved(clients, samples, masks) if self._hp["evolve"] else masks
        return up, kept | {f"shared.{n}": m for n, m in masks.items()} | {f"masks.{n}": m for n, m in moved.items()}

    @torch.no_grad()
    def moved(self, clients: Clients, samples: Samples, masks: Message) -> Message:
        """The masks of the next round: each (s, ...)."""
        hp = self._hp
        done = min(self.done, hp["rounds"])
        share = hp["anneal"] / 2 * (1 + math.cos(math.pi * done / hp["rounds"]))
        scores = self.gradients(clients, samples) if hp["regrow"] == "gradient" else self._draws(samples, masks)
        found = {}
        for name, mask in masks.items():
            left, counts = fire(mask.flatten(1), clients.state[name].flatten(1), share)
            found[name] = regrow(left, scores[name].flatten(1).abs(), counts).view_as(mask)
        return found

    def gradients(self, clients: Clients, samples: Samples) -> Message:
        """Gradients of all weights, active or not, on one more batch of each client, in eval mode: each (s, ...)."""
        batch = samples.batch
        seeds = [seed_from(seed, "screen") for seed in batch["seed"]]
        plan = local_batches(batch["size"], seeds, self._hp["local_batch"], steps=1)
        look = Clients(self.model, clients.state, self.local_optimizer, clients.stacked, start=clients.start)
        self.model.eval()
        _, one = next(iter(Samples(self, batch, samples.rows, plan)))
        with torch.enable_grad():
            return look.gradients(self.loss, one)[1]

    def _draws(self, samples: Samples, masks: Message) -> Message:
        generators = [
            torch.Generator().manual_seed(seed_from(samples.batch["seed"][row], "regrow")) for row in samples.rows
        ]
        return {
            n: torch.stack([torch.rand(m.shape[1:], generator=g) for g in generators]).to(self.device)
            for n, m in masks.items()
        }

    def aggregate(self, down: Message, up: Message, weights: Tensor, batch: dict[str, Any]) -> None:
        self._consensus()
        sizes = self._sizes()
        sent = dict.fromkeys(self._links, 0)
        for client, heard in self._links.items():
            for peer in heard[1:]:
                sent[peer] += sizes[peer]
                sent[client] += sizes[peer]
        self.log("train/busiest_mb", max(sent.values()) / 1e6, batch_size=len(batch["client"]))

    def _consensus(self) -> None:
        """The mean over all owners of each weight, to the network that belongs to nobody."""
        total: Message = {}
        owners: Message = {}
        for client in range(self._hp["num_clients"]):
            for name, value in self.states.read([client], "personal.", self.device).items():
                total[name] = total.get(name, 0) + value[0]
            for name, mask in self.states.read([client], "shared.", self.device).items():
                owners[name] = owners.get(name, 0) + mask[0].to(total[name])
        self.set_weights({f"model.{name}": value / owners[name].clamp(min=1) for name, value in total.items()})

    # ---- what is sent -----------------------------------------------------------------------------------------------

    def _sizes(self) -> dict[int, int]:
        """Bytes of each client's message in this round."""
        ids = list(self._links)
        if self.round.is_meta:
            return dict.fromkeys(ids, 0)
        total = torch.zeros(len(ids), dtype=torch.long)
        for mask in self.states.read(ids, "shared.").values():
            ones, size = mask.flatten(1).sum(1).cpu(), mask[0].numel()
            total += 4 * ones + (ones < size) * -(-size // 8)
        return dict(zip(ids, total.tolist(), strict=True))

    def bytes_up(self, up: Message) -> int:
        """Bytes over all links of the round."""
        sizes = self._sizes()
        return sum(sizes[peer] for heard in self._links.values() for peer in heard[1:])

    def bytes_down(self, down: Message, clients: Sequence[int]) -> int:
        """The same: what one peer sends another gets."""
        return self.bytes_up({})

    # ---- afterwards -------------------------------------------------------------------------------------------------

    def client_model(self, client: int) -> nn.Module:
        """A client's network on its own, for pictures that are normalised already; inactive weights are 0."""
        if not 0 <= client < self._hp["num_clients"]:
            raise ValueError(f"client is {client}; there are {self._hp['num_clients']}, from 0.")
        network = copy.deepcopy(self.model)
        network.load_state_dict(self.personal_weights(client))
        return network.eval()

    @classmethod
    def convert_state_dict(cls, content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """From the authors' ``w_per_mdls`` and ``mask_pers``: lists of what each client has, by their names.

        Raises:
            ZooError: if it is anything else.
        """
        try:
            models, masks = content["w_per_mdls"], content["mask_pers"]
            linear, stem = models[0]["linear.weight"], models[0]["conv1.weight"]
        except (KeyError, IndexError, TypeError) as error:
            raise ZooError(f"DisPFL converts 'w_per_mdls' and 'mask_pers' of ResNet-18 clients; no {error}.") from error
        names = {name: _ours(name) for name in models[0]}
        state: dict[str, Tensor] = {"round": torch.zeros((), dtype=torch.long)}
        state["sent"] = torch.zeros(2, dtype=torch.float64)
        for theirs, ours in names.items():
            rows = torch.stack([model[theirs] for model in models])
            owned = torch.stack([mask[theirs] != 0 for mask in masks])
            key = ours.replace(".", "__")
            state |= {f"states.personal__{key}": rows, f"states.masks__{key}": owned, f"states.shared__{key}": owned}
            state[f"model.{ours}"] = rows.sum(0) / owned.sum(0).clamp(min=1)
        sizes = {"num_classes": len(linear), "in_channels": stem.shape[1], "num_clients": len(models)}
        return sizes, state


def _ours(name: str) -> str:
    """Our name of one of their ResNet's parameters."""
    first, _, rest = name.partition(".")
    first = {"conv1": "stem.0", "bn1": "stem.1", "linear": "head"}.get(first, first)
    return f"{first}.{rest}".replace(".bn", ".norm")
