"""Clients at work: their copies of a network side by side, trained together or one by one with the same numbers.

Index legend: s clients that train together, b samples of a local batch.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

Function = Callable[[nn.Module, Any], Any]
"""What one client computes: (its network, its local batch) -> a tensor or a dict of them. It never sees the others."""
Correct = Callable[["Clients", dict[str, Tensor]], dict[str, Tensor]]
"""Changes the clients' gradients, each (s, ...), before a step."""


class Clients:
    """Copies of one network that are trained on different data, each by an optimiser of its own.

    All copies lie stacked in ``state``, and training writes there. With ``stacked`` the clients take a step in one
    call (`torch.func.vmap`), else there is one client, whose network is called as it is.

    Args:
        model: the network; its own weights are not touched, what is not in ``state`` is taken from it as it is.
        state: parameters and buffers by name, each (s, ...), most steps first: see `narrow`.
        optimizer: makes an optimiser from a list of tensors. It must work element by element, as SGD and Adam do: the
            clients are rows of the same tensors.
        stacked: whether the clients train together; False needs s = 1.
        start: what ``state`` is now, where the caller has it anyway; else a copy is made.
    Raises:
        ValueError: if a parameter of the network has two names, or several clients are to train unstacked.
    """

    def __init__(
        self,
        model: nn.Module,
        state: dict[str, Tensor],
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        stacked: bool = True,
        start: Mapping[str, Tensor] | None = None,
    ):
        self.model, self.state, self.stacked = model, state, stacked
        self.count = len(next(iter(state.values())))
        if not stacked and self.count != 1:
            raise ValueError(f"{self.count} clients cannot train unstacked at once; give one.")
        parameters = dict(model.named_parameters())
        trained = {name for name, p in parameters.items() if p.requires_grad}
        again = [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in parameters]
        if again:
            raise ValueError(
                f"{again[0]} of the network is another of its parameters, too: clients cannot share weights."
            )
        self.start = {name: value for name, value in (start or state).items() if name in trained}
        if start is None:
            self.start = {name: value.clone() for name, value in self.start.items()}
        self.corrections: list[Correct] = []
        self._make = optimizer
        self._begin()
        self._places = [] if stacked else self._slots({**parameters, **dict(model.named_buffers())})
        pools = any(isinstance(module, nn.MaxPool2d) for module in model.modules())
        self._channels_last = pools and next(iter(state.values())).device.type == "cpu"

    @property
    def now(self) -> dict[str, Tensor]:
        """The trained parameters of the clients that still work, each (s, ...)."""
        return {name: self.state[name][: self.count] for name in self.start}

    def narrow(self, count: int) -> None:
        """Go on with the first ``count`` clients: the others have done their steps."""
        if count == self.count:
            return
        self.count = count
        before, old = self._leaves, self._optimizer
        self._begin()
        for name, leaf in self._leaves.items():
            kept = old.state.get(before[name], {})
            self._optimizer.state[leaf] = {
                key: v[: len(leaf)] if isinstance(v, Tensor) and v.shape == before[name].shape else v
                for key, v in kept.items()
            }

    def _begin(self) -> None:
        self._leaves = {name: self._row(self.state[name]).detach().requires_grad_() for name in self.start}
        self._optimizer = self._make(list(self._leaves.values()))

    def _slots(self, named: Mapping[str, Tensor]) -> list[tuple[dict[str, Any], str, Tensor]]:
        """Where in the network a lone client's tensors go: `functional_call` would look for the places every time."""
        own = {id(value): self._leaves.get(n, self.state[n][0]) for n, value in named.items() if n in self.state}
        places = [place for module in self.model.modules() for place in (module._parameters, module._buffers)]
        return [(place, key, own[id(v)]) for place in places for key, v in place.items() if id(v) in own]

    def _row(self, value: Tensor) -> Tensor:
        return value[: self.count] if self.stacked else value[0]

    def call(self, function: Function, batch: Mapping[str, Tensor]) -> Any:
        """What each client's ``function`` gives on its own batch, (s, ...); with gradients to the clients' weights."""
        if not self.stacked:
            found = self._alone(function, {key: self._laid(value[0]) for key, value in batch.items()})
            return {key: value[None] for key, value in found.items()} if isinstance(found, dict) else found[None]
        network = Bound(self.model, function)
        fixed = {name: self._row(value) for name, value in self.state.items() if name not in self._leaves}

        def one(leaves: dict[str, Tensor], rest: dict[str, Tensor], rows: dict[str, Tensor]) -> Any:
            weights = {f"network.{name}": value for name, value in (*leaves.items(), *rest.items())}
            return functional_call(network, weights, (rows,), tie_weights=False)  # looking for ties takes a while

        return vmap(one, randomness="different")(self._leaves, fixed, dict(batch))

    def _laid(self, value: Tensor) -> Tensor:
        """Pictures with their channels side by side where that pays: a CPU finds maxima twice as fast that way."""
        if not self._channels_last or value.ndim != 4 or not value.is_floating_point():
            return value
        return value.contiguous(memory_format=torch.channels_last)

    def _alone(self, function: Function, rows: dict[str, Tensor]) -> Any:
        """What ``function`` gives while the network has the only client's tensors."""
        was: list[tuple[dict[str, Any], str, Any]] = [(place, key, place[key]) for place, key, _ in self._places]
        try:
            for place, key, value in self._places:
                place[key] = value
            return function(self.model, rows)
        finally:
            for place, key, whole in was:
                place[key] = whole

    def gradients(
        self, loss: Function, batch: Mapping[str, Tensor], only: str | tuple[str, ...] = ""
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What ``loss`` gives, each (s,), and its gradients by parameter, each (s, ...); see `step`."""
        found = self.call(loss, batch)
        found = found if isinstance(found, dict) else {"loss": found}
        names = [name for name in self._leaves if name.startswith(only)]
        grads = torch.autograd.grad(found["loss"].sum(), [self._leaves[name] for name in names], allow_unused=True)
        own = {n: g if self.stacked else g[None] for n, g in zip(names, grads, strict=True) if g is not None}
        return {key: value.detach() for key, value in found.items()}, own

    def step(self, loss: Function, batch: Mapping[str, Tensor], only: str | tuple[str, ...] = "") -> dict[str, Tensor]:
        """One optimiser step of every client.

        Args:
            loss: gives a scalar, or a dict of scalars of which "loss" is minimised.
            batch: the clients' local batches, each (s, b, ...).
            only: name prefixes of the parameters that learn; the others get no gradient, and their optimiser rests.
        Returns:
            what ``loss`` gave, each (s,), detached.
        """
        found, own = self.gradients(loss, batch, only)
        for correct in self.corrections:
            own = correct(self, own)
        for name, leaf in self._leaves.items():
            grad = own.get(name)
            leaf.grad = grad if grad is None or self.stacked else grad[0]
        self._optimizer.step()
        self._optimizer.zero_grad()  # else these gradients would lie beside the next
        return found


class Bound(nn.Module):
    """A function of a network as a module, so that `functional_call` can exchange the network's weights."""

    def __init__(self, network: nn.Module, function: Function):
        super().__init__()
        self.network, self.function = network, function

    def forward(self, batch: dict[str, Tensor]) -> Any:
        return self.function(self.network, batch)


def clip(largest: float) -> Correct:
    """Scale each client's gradient to a norm of at most ``largest``, as `torch.nn.utils.clip_grad_norm_` does."""

    def correct(clients: Clients, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        square = torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0)
        factor = (largest / (square.sqrt() + 1e-6)).clamp(max=1.0)
        return {name: g * factor.view(-1, *[1] * (g.ndim - 1)) for name, g in grads.items()}

    return correct


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values whose mask is true; 0 where none is.

    Shapes:
        values, mask: (b,); returns: ()
    """
    return (values * mask).sum() / mask.sum().clamp(min=1)
