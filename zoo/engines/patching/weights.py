"""Weights of a site: taken from another model for a while, or tuned alone."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.core.errors import ZooError
from zoo.engines.patching.anatomy import Anatomy, Site, Slice, is_transposed
from zoo.engines.patching.runs import device_of


def weights_of(model: nn.Module, slices: Iterable[Slice]) -> dict[Slice, Tensor]:
    """The parts of a model's parameters, as they are (views)."""
    parameters = dict(model.named_parameters())
    return {part: part.of(parameters[part.name]).detach() for part in slices}


@contextlib.contextmanager
def swapped(model: nn.Module, weights: Mapping[Slice, Tensor]) -> Iterator[None]:
    """Parts of parameters with other values; afterwards the old ones, bit for bit, also after an exception.

    Raises:
        ZooError: for a parameter that the model lacks, or a value of another shape.
    """
    parameters = dict(model.named_parameters())
    old = []
    try:
        for part, value in weights.items():
            if part.name not in parameters:
                raise ZooError(f"The model has no parameter {part.name!r}.")
            place = part.of(here(parameters[part.name], part.name, value)).detach()
            if place.shape != value.shape:
                raise ZooError(f"{part.name}: a value of {tuple(value.shape)} for a part of {tuple(place.shape)}.")
            old.append((place, place.clone()))
            place.copy_(value)
        yield
    finally:
        for place, value in reversed(old):
            place.copy_(value)


def here(parameter: Tensor, name: str, value: Tensor) -> Tensor:
    """A parameter, made sure to be in memory, if what shall come into it is.

    Raises:
        ZooError: if accelerate keeps it elsewhere until it is needed: what were written into it would be lost.
    """
    if parameter.is_meta and not value.is_meta:
        raise ZooError(
            f"{name} waits outside of its module (offloaded by accelerate): load the model without offloading."
        )
    return parameter


@contextlib.contextmanager
def exchanged(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """A model with other parameters, as a whole: its own wait untouched, and come back also after an exception.

    Nothing is copied but what is on another device or of another dtype.

    Raises:
        ZooError: for a parameter that the model lacks, or a value of another shape.
    """
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        if name not in parameters:
            raise ZooError(f"The model has no parameter {name!r}.")
        if parameters[name].shape != value.shape:
            raise ZooError(f"{name}: a value of {tuple(value.shape)} for one of {tuple(parameters[name].shape)}.")
        here(parameters[name], name, value)
    with torch.inference_mode(False):
        old = {name: parameters[name].data for name in weights}
        try:
            for name, value in weights.items():
                parameters[name].data = value.detach().to(old[name])
            yield
        finally:
            for name, own in old.items():
                parameters[name].data = own


class Deltas(nn.Module):
    """Trainable changes to some heads and MLPs of a frozen model: only they have gradients and optimiser state.

    What a projection gives is changed by ``delta x`` beside its own weight, which stays as it is; the model never holds
    a second copy of a weight. Which heads and MLPs they belong to stands in two buffers, so that a checkpoint of these
    tensors alone says all; the model may be another copy of the same. Heads of one group share keys and values: the
    changes that each brings add up. All lie on one device, that of the model's inputs; where accelerate spreads the
    model over devices each is added where its projection works, and that one's weight may wait elsewhere meanwhile.

    Args:
        anatomy: of the model. heads, mlps: how many of each. biases: change the projections' biases, too.
    Shapes:
        values: of heads (heads, ...), of MLPs (mlps, ...), by the place of the parameter in `Anatomy.slices`
    Raises:
        ZooError: for more heads or MLPs than there are, or none, or projections without plain weights.
    """

    head_index: Tensor
    mlp_index: Tensor

    def __init__(self, anatomy: Anatomy, heads: int = 0, mlps: int = 0, biases: bool = True):
        super().__init__()
        layers, every = len(anatomy.layers), len(anatomy.layers) * anatomy.heads
        if not 0 <= heads <= every or not 0 <= mlps <= layers or not heads + mlps:
            raise ZooError(f"{heads} heads and {mlps} MLPs to tune; the model has {every} and {layers}.")
        self.biases = biases
        parameters, device = dict(anatomy.model.named_parameters()), device_of(anatomy.model)
        self.values = nn.ParameterDict()
        for kind, count in (("head", heads), ("mlp", mlps)):
            first = Site(0, kind, 0 if kind == "head" else -1)
            for place, part in enumerate(self._parts(anatomy, first) if count else ()):
                is_transposed(anatomy.model.get_submodule(part.name.rpartition(".")[0]))  # refuses what has no weight
                shape = part.of(parameters[part.name]).shape
                self.values[f"{kind}_{place}"] = nn.Parameter(torch.zeros(count, *shape, device=device))
        self.register_buffer("head_index", torch.full((heads, 2), -1))
        self.register_buffer("mlp_index", torch.full((mlps,), -1))

    def _parts(self, anatomy: Anatomy, site: Site) -> list[Slice]:
        return [part for part in anatomy.slices(site) if self.biases or not part.name.endswith(".bias")]

    def choose(self, sites: Iterable[Site]) -> None:
        """Say which heads and MLPs the changes are for, as many as there is room for; the changes become zero.

        Raises:
            ZooError: for another number of them, or one twice.
        """
        sites = list(sites)
        heads, mlps = [s for s in sites if s.kind == "head"], [s for s in sites if s.kind == "mlp"]
        if (len(heads), len(mlps)) != (len(self.head_index), len(self.mlp_index)) or len(set(sites)) != len(sites):
            raise ZooError(
                f"{len(heads)} heads and {len(mlps)} MLPs were chosen, for {len(self.head_index)} and "
                f"{len(self.mlp_index)} changes; each once."
            )
        with torch.no_grad():
            self.head_index.copy_(torch.tensor([(s.layer, s.head) for s in heads]).view(-1, 2))
            self.mlp_index.copy_(torch.tensor([s.layer for s in mlps]))
            for value in self.values.values():
                value.zero_()

    @property
    def sites(self) -> list[Site]:
        """The heads and MLPs that were chosen; none before, and none on the meta device, which holds no numbers."""
        if self.head_index.is_meta:
            return []
        heads = [Site(layer, "head", head) for layer, head in self.head_index.tolist() if layer >= 0]
        return heads + [Site(layer, "mlp") for layer in self.mlp_index.tolist() if layer >= 0]

    def changes(self, anatomy: Anatomy) -> list[tuple[Slice, Tensor]]:
        """Each change and the part of a parameter that it is for."""
        found = []
        for kind in ("head", "mlp"):
            for i, site in enumerate(site for site in self.sites if site.kind == kind):
                parts = enumerate(self._parts(anatomy, site))
                found += [(part, self.values[f"{kind}_{place}"][i]) for place, part in parts]
        return found

    @contextlib.contextmanager
    def active(self, anatomy: Anatomy) -> Iterator[None]:
        """The model with these changes in every forward pass within."""
        owners: dict[str, list[tuple[Slice, Tensor]]] = {}
        for part, value in self.changes(anatomy):
            owners.setdefault(part.name.rpartition(".")[0], []).append((part, value))
        with contextlib.ExitStack() as stack:
            for owner, own in owners.items():
                module = anatomy.model.get_submodule(owner)
                stack.callback(module.register_forward_hook(_changed(own, is_transposed(module))).remove)
            yield

    @torch.no_grad()
    def merge(self, anatomy: Anatomy, scale: float = 1.0) -> None:
        """Add the changes, times ``scale``, to the model's own weights.

        Raises:
            ZooError: for a model with weights that are not in memory.
        """
        parameters = dict(anatomy.model.named_parameters())
        for part, value in self.changes(anatomy):
            own = here(parameters[part.name], part.name, value)
            part.of(own).add_(value.to(own), alpha=scale)


def _changed(parts: list[tuple[Slice, Tensor]], turned: bool) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].to(output.device)  # accelerate brings a module's inputs to its device only within
        for part, value in parts:
            if value.ndim == 1:
                own, start = value.to(output).expand(*output.shape[:-1], -1), part.start
            else:
                matrix = (value.T if turned else value).to(x)
                inputs = part.dim == (0 if turned else 1)
                seen = x[..., part.start : part.start + part.size] if inputs else x
                own, start = F.linear(seen, matrix), 0 if inputs else part.start
            output = output + F.pad(own, (start, output.shape[-1] - start - own.shape[-1]))
        return output

    return hook
