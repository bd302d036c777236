"""What each of many modules does to a model's inner state when its weights are another model's: weight patching.

A *module* is a site with weights: a head, an attention block, an MLP, or a layer ("residual": attention and MLP; norms
stay). One recorded run serves all: a module of block i needs what entered this block, and only the blocks from i up to
the one that is read are computed anew, those above i for many modules in one pass. The heads of a block need one pass
of attention with the other's projections (two where heads share keys), and are then taken apart: what a head adds is
linear in what it gives. Measured on one CPU core (six layers of 16 heads on 8 keys, 8 prompts of 16 tokens): all 114
modules take 0.31 of the time of whole runs, and the heads 0.66 of one by one from the recorded run.

Index legend: n modules of a group, b prompts, t positions, d width of the stream, h heads, e width of a head.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.core.errors import ZooError
from zoo.engines.patching.anatomy import Anatomy, Site, Slice, is_transposed
from zoo.engines.patching.runs import copies, evaluating, in_copy, inputs_of, instead, patched
from zoo.engines.patching.weights import swapped

Weights = Mapping[str, Tensor]
"""Another model's parameters by name, on any device."""
Inputs = Mapping[str, Tensor] | Tensor
Readout = Callable[[Tensor], Tensor]
"""The stream (n b, t, d) after a block -> (n b,)."""
MODULES = ("head", "attention", "mlp", "residual")
Call = tuple[tuple[Any, ...], dict[str, Any]]


def module_slices(anatomy: Anatomy, site: Site | str) -> list[Slice]:
    """The parts of parameters that a module has: of "residual" those of attention and MLP, without norms.

    Raises:
        ZooError: for a site that is no module.
    """
    site = anatomy.site(site)
    if site.kind not in MODULES:
        raise ZooError(f"{site} is no module whose weights can be taken; {', '.join(MODULES)} are.")
    if site.kind != "residual":
        return anatomy.slices(site)
    return [part for kind in ("attention", "mlp") for part in anatomy.slices(Site(site.layer, kind))]


def taken(weights: Weights, slices: Iterable[Slice]) -> dict[Slice, Tensor]:
    """These parts of another model's parameters.

    Raises:
        ZooError: for a parameter that it lacks, or that is too small.
    """
    found = {}
    for part in slices:
        if part.name not in weights:
            raise ZooError(f"The other model has no parameter {part.name!r}.")
        value = weights[part.name].detach()
        if value.ndim <= part.dim or value.shape[part.dim] < part.start + part.size:
            raise ZooError(f"{part.name} is {tuple(value.shape)} in the other model, too small: is it another's?")
        found[part] = part.of(value)
    return found


def outside(anatomy: Anatomy) -> list[str]:
    """The parameters that belong to no module: norms, embeddings, the projection to the vocabulary."""
    inside = {part.name for site in anatomy.sites("residual") for part in module_slices(anatomy, site)}
    return [name for name, _ in anatomy.model.named_parameters() if name not in inside]


def changes(model: nn.Module, weights: Weights, names: Iterable[str] | None = None) -> dict[str, float]:
    """How far another model's parameters are from this one's, |other - own| / |own|; only those that differ."""
    parameters = dict(model.named_parameters())
    found = {}
    for name in parameters if names is None else names:
        own = parameters[name].detach().float()
        distance = (weights[name].detach().to(own) - own).norm()
        if bool(distance):
            found[name] = float(distance / own.norm().clamp(min=1e-12))
    return found


# ---- one recorded run ------------------------------------------------------------------------------------------------


@dataclass
class Passage:
    """A run up to a block: what entered each (b, t, d), and after the last, what left it; how blocks and attentions
    were called; what attention gave (b, t, d) and, before the output projection, its heads (b, t, h e)."""

    inputs: dict[str, Tensor]
    until: int
    streams: list[Tensor] = field(default_factory=list)
    blocks: list[Call] = field(default_factory=list)
    attentions: list[Call] = field(default_factory=list)
    given: list[Tensor] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)
    kind: int = 0
    """Length of the tuple that attention returns; 0: no tuple."""
    tuples: bool = False
    """Whether blocks return tuples, as in old versions of transformers."""

    @property
    def rows(self) -> int:
        return len(self.inputs["input_ids"])


class _Reached(Exception):
    """The last block that is needed has run."""


def record(anatomy: Anatomy, inputs: Inputs, until: int | None = None) -> Passage:
    """Run prompts through the blocks up to one, the last for None, and keep what is needed to go on from any.

    Raises:
        ZooError: for a block that the model lacks, or tokens that it does not know.
    """
    layers = len(anatomy.layers)
    until = layers - 1 if until is None else until
    if not 0 <= until < layers:
        raise ZooError(f"There is no layer {until}; the model has 0 to {layers - 1}.")
    passage = Passage(inputs_of(anatomy, inputs), until)
    with contextlib.ExitStack() as stack:
        for layer in range(until + 1):
            _watch(anatomy, passage, layer, stack)
        with contextlib.suppress(_Reached):
            anatomy.model(**passage.inputs, use_cache=False)
    return passage


def _watch(anatomy: Anatomy, passage: Passage, layer: int, stack: contextlib.ExitStack) -> None:
    def before_block(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = args[0] if args else kwargs["hidden_states"]
        passage.streams.append(stream)
        passage.blocks.append((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))

    def before_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passage.attentions.append((args, dict(kwargs)))

    def before_out(module: nn.Module, args: tuple[Any, ...]) -> None:
        passage.heads.append(args[0])

    def after_attention(module: nn.Module, args: Any, output: Any) -> None:
        passage.kind = len(output) if isinstance(output, tuple) else 0
        passage.given.append(_first(output))

    def after_block(module: nn.Module, args: Any, output: Any) -> None:
        passage.streams.append(_first(output))
        passage.tuples = isinstance(output, tuple)
        raise _Reached

    block, attention = anatomy.layers[layer], anatomy.attention(layer)
    stack.callback(block.register_forward_pre_hook(before_block, with_kwargs=True).remove)
    stack.callback(attention.register_forward_pre_hook(before_attention, with_kwargs=True).remove)
    stack.callback(anatomy.out(layer).register_forward_pre_hook(before_out).remove)
    stack.callback(attention.register_forward_hook(after_attention).remove)
    if layer == passage.until:
        stack.callback(block.register_forward_hook(after_block).remove)


def resumed(anatomy: Anatomy, passage: Passage, layer: int, stream: Tensor, until: int | None = None) -> Tensor:
    """The stream after a block, from what enters block ``layer``: copies of the prompts, (n b, t, d) each."""
    for later in range(layer, (passage.until if until is None else until) + 1):
        stream = _block(anatomy, passage, later, stream)
    return stream


def logits_after(anatomy: Anatomy, passage: Passage, stream: Tensor) -> Tensor:
    """Logits (n b, t, v) of what left the last block, by the model's own last norm and head."""
    given = (stream,) if passage.tuples else stream
    with instead(dict.fromkeys(anatomy.layers, lambda *args, **kwargs: given)):
        n = len(stream) // passage.rows
        return anatomy.model(**copies(passage.inputs, passage.rows, n), use_cache=False).logits


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _block(anatomy: Anatomy, passage: Passage, layer: int, stream: Tensor, attention: Tensor | None = None) -> Tensor:
    """What leaves a block; ``attention`` (n b, t, d) is taken for what attention gives."""
    n = len(stream) // passage.rows
    args, kwargs = copies(passage.blocks[layer], passage.rows, n)
    known = {}
    if attention is not None:
        result = (attention, *[None] * (passage.kind - 1)) if passage.kind else attention
        known[anatomy.attention(layer)] = lambda *a, **k: result
    with instead(known):
        return _first(anatomy.layers[layer](stream, *args, **kwargs))


# ---- sweeps ----------------------------------------------------------------------------------------------------------


def weight_sweep(
    anatomy: Anatomy,
    inputs: Inputs,
    weights: Weights,
    sites: Iterable[Site | str],
    readout: Readout,
    until: int | None = None,
    rows: int = 256,
) -> Tensor:
    """What is read of the stream after block ``until`` where one module has another model's weights.

    Args:
        weights: of the other model. sites: modules; one above ``until`` changes nothing there.
        rows: prompts in one pass at most.
    Shapes:
        returns: (sites, b)
    Raises:
        ZooError: for an unknown site, one without weights, or a parameter that the other model lacks or has in another
            shape.
    """
    known = [anatomy.site(site) for site in sites]
    for site in known:
        module_slices(anatomy, site)

    def after(passage: Passage, layer: int, group: Sequence[Site]) -> Tensor:
        found: dict[Site, Tensor] = {}
        stream, heads = passage.streams[layer], [site for site in group if site.kind == "head"]
        if heads:
            attention = _with_heads(anatomy, passage, layer, weights, [site.head for site in heads])
            made = _block(anatomy, passage, layer, stream.repeat(len(heads), 1, 1), attention)
            found.update(zip(heads, made.chunk(len(heads)), strict=True))
        for site in group:
            if site.kind != "head":
                same = passage.given[layer] if site.kind == "mlp" else None
                with swapped(anatomy.model, taken(weights, module_slices(anatomy, site))):
                    found[site] = _block(anatomy, passage, layer, stream, same)
        return torch.cat([found[site] for site in group])

    return _sweep(anatomy, inputs, known, after, readout, until, rows)


def value_sweep(
    anatomy: Anatomy,
    inputs: Inputs,
    values: Mapping[Site, Tensor],
    readout: Readout,
    until: int | None = None,
    rows: int = 256,
) -> Tensor:
    """As `weight_sweep` where one site has a given value (b, t, d or e), such as another model's: activation patching.

    Shapes:
        returns: (values, b)
    """

    def after(passage: Passage, layer: int, group: Sequence[Site]) -> Tensor:
        b = passage.rows
        new = {site: in_copy(i, b, values[site]) for i, site in enumerate(group)}
        with patched(anatomy, new):
            return _block(anatomy, passage, layer, passage.streams[layer].repeat(len(group), 1, 1))

    return _sweep(anatomy, inputs, [anatomy.site(site) for site in values], after, readout, until, rows)


def reading(anatomy: Anatomy, inputs: Inputs, readout: Readout, until: int | None = None) -> Tensor:
    """What is read of the stream after a block of the model as it is, (b,)."""
    with _plainly(anatomy.model):
        return readout(record(anatomy, inputs, until).streams[-1])


def _sweep(
    anatomy: Anatomy,
    inputs: Inputs,
    sites: Sequence[Site],
    after: Callable[[Passage, int, Sequence[Site]], Tensor],
    readout: Readout,
    until: int | None,
    rows: int,
) -> Tensor:
    found: dict[Site, Tensor] = {}
    with _plainly(anatomy.model):
        passage = record(anatomy, inputs, until)
        b = passage.rows
        plain = readout(passage.streams[-1])
        for layer in sorted({site.layer for site in sites}):
            own = [site for site in dict.fromkeys(sites) if site.layer == layer]
            if layer > passage.until:
                found.update(dict.fromkeys(own, plain))
                continue
            most = max(rows // b, 1)
            for group in (own[i : i + most] for i in range(0, len(own), most)):
                stream = resumed(anatomy, passage, layer + 1, after(passage, layer, group))
                found.update(zip(group, readout(stream).unflatten(0, (len(group), b)), strict=True))
        return torch.stack([found[site] for site in sites]) if sites else plain.new_empty(0, b)


@contextlib.contextmanager
def _plainly(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Eval mode, outside of inference mode, whose tensors could not be put into parameters."""
    with torch.inference_mode(False), evaluating(model, gradients):
        yield


def _with_heads(anatomy: Anatomy, passage: Passage, layer: int, weights: Weights, heads: Sequence[int]) -> Tensor:
    """What attention gives where one head is another model's, for each of these: (n b, t, d).

        given + z' W'_h - z W_h + sum over heads g that share h's keys of (z* - z)_g W_g

    z, z' and z* being what heads give by the own projections, by the other's, and by own queries on the other's keys
    and values.
    """
    out, shared = anatomy.out(layer), anatomy.kv_heads < anatomy.heads
    weight = out.get_parameter("weight")
    whole = Slice(anatomy.slices(Site(layer, "head", 0))[-1].name, 0, 0, len(weight))
    own_matrix = _by_head(anatomy, out, weight)
    matrix = _by_head(anatomy, out, taken(weights, [whole])[whole].to(weight))
    own = passage.heads[layer].unflatten(-1, (anatomy.heads, -1))
    new = _heads_by(anatomy, passage, layer, weights, ("query", "key", "value"))
    found = []
    mates = None
    if shared:
        change = _heads_by(anatomy, passage, layer, weights, ("key", "value")) - own
        mates = torch.einsum("bthe,dhe->hbtd", change, own_matrix)
    for head in heads:
        added = new[:, :, head] @ matrix[:, head].T - own[:, :, head] @ own_matrix[:, head].T
        if mates is not None:
            group = [g for g in range(anatomy.heads) if g != head and anatomy.group(g) == anatomy.group(head)]
            added = added + mates[group].sum(0)
        found.append(passage.given[layer] + added)
    return torch.cat(found)


def _by_head(anatomy: Anatomy, module: nn.Module, weight: Tensor) -> Tensor:
    """A projection to the stream as (d, h, e)."""
    matrix = weight.detach()
    return (matrix.T if is_transposed(module) else matrix).unflatten(1, (anatomy.heads, -1))


def _heads_by(anatomy: Anatomy, passage: Passage, layer: int, weights: Weights, kinds: Sequence[str]) -> Tensor:
    """What heads give, (b, t, h, e), where these projections are another model's."""
    seen: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    sites = [site for kind in kinds for site in anatomy.sites(kind) if site.layer == layer]
    parts = [part for site in sites for part in anatomy.slices(site)]
    args, kwargs = passage.attentions[layer]
    with swapped(anatomy.model, taken(weights, parts)), instead({anatomy.out(layer): keep}):
        anatomy.attention(layer)(*args, **kwargs)
    return seen[0].unflatten(-1, (anatomy.heads, -1))


# ---- the first order -------------------------------------------------------------------------------------------------


def first_order(
    anatomy: Anatomy,
    inputs: Inputs,
    weights: Weights,
    sites: Iterable[Site | str],
    readout: Readout,
    until: int | None = None,
) -> Tensor:
    """How what is read would change, to first order: <gradient, other's weights - own>, (sites,); one backward.

    Args:
        readout: the stream (b, t, d) -> (b,), whose sum is differentiated; no tensor in it is one of inference mode.
    """
    known = [anatomy.site(site) for site in sites]
    places: dict[str, list[tuple[int, Slice]]] = {}
    for i, site in enumerate(known):
        for part in module_slices(anatomy, site):
            places.setdefault(part.name, []).append((i, part))
    found = [0.0] * len(known)

    def use(name: str, own: Tensor, gradient: Tensor) -> None:
        change = weights[name].detach().to(gradient) - own
        for i, part in places[name]:
            found[i] += float((part.of(gradient) * part.of(change)).sum(dtype=torch.float64))

    with_gradients(anatomy, inputs, places, use, readout, until)
    return torch.tensor(found)


def with_gradients(
    anatomy: Anatomy,
    inputs: Inputs,
    names: Iterable[str],
    use: Callable[[str, Tensor, Tensor], None],
    readout: Readout,
    until: int | None = None,
) -> float:
    """Use the gradients of parameters, each dropped as soon as it is there: never more than one is held.

    Args:
        names: of the parameters. use: called with a parameter's name, value and gradient.
        readout: as in `first_order`.
    Returns:
        the sum that was differentiated
    """
    names = list(names)
    parameters = dict(anatomy.model.named_parameters())
    kept = {name: (p.requires_grad, p.grad) for name, p in parameters.items()}

    def hooked(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            use(name, parameter.detach(), parameter.grad)
            parameter.grad = None

        return hook

    with contextlib.ExitStack() as stack:
        stack.enter_context(_plainly(anatomy.model, gradients=True))
        stack.callback(_restore, parameters, kept)
        for p in parameters.values():
            p.grad = None
            p.requires_grad_(False)
        for name in names:
            parameters[name].requires_grad_(True)
            stack.callback(parameters[name].register_post_accumulate_grad_hook(hooked(name)).remove)
        given = {k: v.clone() for k, v in inputs_of(anatomy, inputs).items()}  # none of inference mode
        total = readout(record(anatomy, given, until).streams[-1]).sum()
        total.backward()
    return float(total.detach())


def _restore(parameters: Mapping[str, nn.Parameter], kept: Mapping[str, tuple[bool, Tensor | None]]) -> None:
    for name, (needed, gradient) in kept.items():
        parameters[name].requires_grad_(needed)
        parameters[name].grad = gradient
