"""How clients' updates are kept from drifting apart, and combined: the baselines, which any method may build on.

An algorithm adds to what goes down, corrects the clients' gradients, adds to what comes up, and combines it. Names of
what is sent: "model.<name>" weights and buffers, "control.<name>" control variates.

Index legend: s clients that answered.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.core.errors import ZooError, nearest
from zoo.engines.federated.aggregation import Message, average
from zoo.engines.federated.clients import Clients, Correct

if TYPE_CHECKING:
    from zoo.engines.federated.module import FederatedModule, Samples


class FedAvg:
    """Federated averaging: the mean of the clients' weights by their numbers of samples.

    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
    arXiv:1602.05629. With ``server_lr`` other than 1 the server goes that share of the way to the mean.
    """

    def __init__(self, module: "FederatedModule"):
        self.module = module

    def setup(self) -> None:
        """Add what lives on with clients or server, to ``module.states`` and ``module.server``."""

    def broadcast(self, down: Message) -> Message:
        """What goes to each client of a round."""
        return down

    def corrections(self, ids: list[int], down: Message) -> list[Correct]:
        """Changes the clients' gradients before each step."""
        return []

    def beside(self, samples: "Samples", down: Message, stacked: bool) -> Message:
        """What clients do beside their work for the server; returns what stays with them, each (s, ...)."""
        return {}

    def finish(self, clients: Clients, ids: list[int], steps: Tensor, down: Message) -> tuple[Message, Message]:
        """What else comes up, and what else stays with the client, each (s, ...), after their ``steps`` (s,)."""
        return {}, {}

    def aggregate(self, down: Message, up: Message, weights: Tensor) -> Message:
        """The new weights by name ("model." and what follows), from the clients' and their weights (s,)."""
        mean = average({name: value for name, value in up.items() if name.startswith("model.")}, weights)
        rate = self.module.server_lr
        if rate == 1.0:
            return mean
        return {n: torch.lerp(down[n], v, rate) if v.is_floating_point() else v for n, v in mean.items()}


class FedProx(FedAvg):
    """A proximal term mu / 2 ||w - w_global||^2 in every client's loss.

    Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, arXiv:1812.06127.
    """

    def corrections(self, ids: list[int], down: Message) -> list[Correct]:
        return [towards(down, self.module.mu)]


def towards(down: Message, mu: float) -> Correct:
    """The gradient of mu / 2 ||w - w_global||^2, added for what came down."""

    def correct(clients: Clients, grads: Message) -> Message:
        now = clients.now
        return {n: g + mu * (now[n] - down[f"model.{n}"]) if f"model.{n}" in down else g for n, g in grads.items()}

    return correct


class SCAFFOLD(FedAvg):
    """Control variates: each client steps along g - c_k + c, and c_k becomes c_k - c + (w_global - w_k) / (steps * lr).

    Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020, arXiv:1910.06378
    (option II). Sends twice as much as FedAvg. The server's c moves by the clients' mean change times the share of
    clients that took part.
    """

    def setup(self) -> None:
        for name in self.module.shared_parameters:
            zero = torch.zeros_like(self.module.model.get_parameter(name))
            self.module.states.add(f"control.{name}", zero)
            self.module.server.add(f"control.{name}", zero)

    def broadcast(self, down: Message) -> Message:
        control = self.module.server.read([0], "control.")
        return {**down, **{f"control.{name}": value[0] for name, value in control.items()}}

    def corrections(self, ids: list[int], down: Message) -> list[Correct]:
        own = self.module.states.read(ids, "control.", self.module.device)

        def correct(clients: Clients, grads: Message) -> Message:
            return {n: g + down[f"control.{n}"] - own[n][: len(g)] if n in own else g for n, g in grads.items()}

        return [correct]

    def finish(self, clients: Clients, ids: list[int], steps: Tensor, down: Message) -> tuple[Message, Message]:
        up, kept = {}, {}
        lr = self.module.round_lr()
        for name, own in self.module.states.read(ids, "control.", self.module.device).items():
            moved = clients.start[name] - clients.state[name]
            change = moved / (steps * lr).view(-1, *[1] * (moved.ndim - 1)) - down[f"control.{name}"]
            up[f"control.{name}"] = change
            kept[f"control.{name}"] = own + change
        return up, kept

    def aggregate(self, down: Message, up: Message, weights: Tensor) -> Message:
        change = {name: value for name, value in up.items() if name.startswith("control.")}
        mean = average(change, torch.ones_like(weights))
        share = len(weights) / self.module.states.clients
        self.module.server.write([0], {name: (down[name] + share * value)[None] for name, value in mean.items()})
        return super().aggregate(down, up, weights)


class FedNova(FedAvg):
    """Normalised averaging: each client's way is divided by the length of its path before it is averaged.

    With momentum rho the path of t steps has the length a = (t - rho (1 - rho^t) / (1 - rho)) / (1 - rho).
    Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization", NeurIPS 2020,
    arXiv:2007.07481.
    """

    def finish(self, clients: Clients, ids: list[int], steps: Tensor, down: Message) -> tuple[Message, Message]:
        rho = self.module.momentum
        return {"length": (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)}, {}

    def aggregate(self, down: Message, up: Message, weights: Tensor) -> Message:
        share = weights / weights.sum()
        length = up["length"].to(share)
        trained = {f"model.{name}" for name in self.module.shared_parameters}
        mean = average({n: v for n, v in up.items() if n.startswith("model.") and n not in trained}, weights)
        for name in trained:
            rows = (share / length).view(-1, *[1] * down[name].ndim)
            way = (rows * (down[name] - up[name])).sum(0)
            mean[name] = down[name] - self.module.server_lr * (share * length).sum() * way
        return mean


class Ditto(FedAvg):
    """FedAvg, and beside it a personal model for each client, pulled to the global one by mu / 2 ||v - w_global||^2.

    Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021, arXiv:2012.04221. The
    personal model takes the same local steps on the same batches.
    """

    def setup(self) -> None:
        for name, value in self.module.model.state_dict().items():
            self.module.states.add(f"personal.{name}", value)

    def beside(self, samples: "Samples", down: Message, stacked: bool) -> Message:
        own = self.module.states.read(samples.ids, "personal.", self.module.device)
        clients = self.module.clients(own, stacked)
        clients.corrections.append(towards(down, self.module.mu))
        self.module.train_clients(clients, samples.again())
        return {f"personal.{name}": value for name, value in clients.state.items()}


class LocalOnly(FedAvg):
    """No exchange at all: every client trains a model of its own. All parameters are personal, nothing is sent."""

    def aggregate(self, down: Message, up: Message, weights: Tensor) -> Message:
        return {}


ALGORITHMS: dict[str, type[FedAvg]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "scaffold": SCAFFOLD,
    "fednova": FedNova,
    "ditto": Ditto,
    "local": LocalOnly,
}


def algorithm(name: str, module: Any) -> FedAvg:
    """The algorithm of a name.

    Raises:
        ZooError: for an unknown name, with the nearest.
    """
    if name not in ALGORITHMS:
        raise ZooError(f"No algorithm {name!r}.{nearest(name, list(ALGORITHMS))} There are {', '.join(ALGORITHMS)}.")
    return ALGORITHMS[name](module)
