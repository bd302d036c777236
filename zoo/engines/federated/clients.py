"""Clients at work: their copies of a network side by side, trained together or one by one with the same numbers.

Index legend: s clients that train together, b samples of a local batch.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

Function = Callable[[nn.Module, Any], Any]
"""What one client computes: (its network, its local batch) -> tensors. It never sees the others."""
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
        self._tied = len(parameters) < sum(1 for _ in model.named_parameters(remove_duplicate=False))
        self.start = {name: value for name, value in (start or state).items() if name in trained}
        if start is None:
            self.start = {name: value.clone() for name, value in self.start.items()}
        self.corrections: list[Correct] = []
        self._make = optimizer
        self._leaves: dict[str, Tensor] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self.narrow(self.count)

    @property
    def now(self) -> dict[str, Tensor]:
        """The trained parameters of the clients that still work, each (s, ...)."""
        return {name: self.state[name][: self.count] for name in self.start}

    def narrow(self, count: int) -> None:
        """Go on with the first ``count`` clients: the others have done their steps."""
        self.count = count
        before, old = self._leaves, self._optimizer
        self._leaves = {name: self._row(self.state[name]).detach().requires_grad_() for name in self.start}
        self._optimizer = self._make(list(self._leaves.values()))
        for name, leaf in self._leaves.items() if old is not None else ():
            kept = old.state.get(before[name], {})  # type: ignore[union-attr]
            self._optimizer.state[leaf] = {  # type: ignore[index]
                key: v[: len(leaf)] if isinstance(v, Tensor) and v.shape == before[name].shape and self.stacked else v
                for key, v in kept.items()
            }

    def _row(self, value: Tensor) -> Tensor:
        return value[: self.count] if self.stacked else value[0]

    def call(self, function: Function, batch: Mapping[str, Tensor]) -> Any:
        """What each client's ``function`` gives on its own batch, (s, ...); with gradients to the clients' weights."""
        network = Bound(self.model, function)
        fixed = {name: self._row(value) for name, value in self.state.items() if name not in self._leaves}

        def one(leaves: dict[str, Tensor], rest: dict[str, Tensor], rows: dict[str, Tensor]) -> Any:
            weights = {f"network.{name}": value for name, value in (*leaves.items(), *rest.items())}
            return functional_call(network, weights, (rows,), tie_weights=self._tied)  # looking for ties takes a while

        if self.stacked:
            return vmap(one, randomness="different")(self._leaves, fixed, dict(batch))
        found = one(self._leaves, fixed, {key: value[0] for key, value in batch.items()})
        return torch.utils._pytree.tree_map(lambda value: value[None], found)

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
        assert self._optimizer is not None
        self._optimizer.step()
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
