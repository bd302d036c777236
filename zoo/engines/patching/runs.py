"""Reading and replacing values while a model runs. Leaving a context leaves the model as it was, bit for bit.

Index legend: b prompts, t positions, d width of the residual stream, e width of a head.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.core.errors import ZooError
from zoo.engines.patching.anatomy import PER_HEAD, Anatomy, Site

Change = Tensor | Callable[[Tensor], Tensor]
"""What comes in the place of a value (b, t, d or e): a tensor that broadcasts to it, or a function of it."""


@contextlib.contextmanager
def capture(anatomy: Anatomy, sites: Iterable[Site | str], gradients: bool = False) -> Iterator[dict[Site, Tensor]]:
    """Collect the values of sites in each forward pass within; the last pass stays.

    Args:
        gradients: keep the values in the graph (for attribution by gradients), else they are detached.
    Shapes:
        values: (b, t, d), of heads (b, t, e)
    """
    found: dict[Site, Tensor] = {}

    def look(site: Site) -> Callable[[Tensor], Tensor]:
        def seen(value: Tensor) -> Tensor:
            found[site] = value if gradients else value.detach()
            return value

        return seen

    with _hooked(anatomy, {(known := anatomy.site(site)): look(known) for site in sites}, writes=gradients):
        yield found


@contextlib.contextmanager
def patched(anatomy: Anatomy, changes: Mapping[Any, Change]) -> Iterator[None]:
    """Replace the values of sites in every forward pass within.

    Args:
        changes: by `Site` or its name.
    Raises:
        ZooError: for an unknown site, or a tensor that does not broadcast to the site's value.
    """

    def change(site: Site, what: Change) -> Callable[[Tensor], Tensor]:
        def made(value: Tensor) -> Tensor:
            new = what(value) if callable(what) else what
            try:
                return new.to(value.device, value.dtype).expand(value.shape)
            except RuntimeError as error:
                raise ZooError(
                    f"A patch of {tuple(new.shape)} does not fit {site}, which is {tuple(value.shape)}."
                ) from error

        return made

    with _hooked(anatomy, {(site := anatomy.site(name)): change(site, what) for name, what in changes.items()}):
        yield


def at(positions: Any, new: Tensor) -> Callable[[Tensor], Tensor]:
    """A change at some positions only: ``at([-1], value)``, value broadcasting to (b, positions, d)."""

    def change(value: Tensor) -> Tensor:
        found = value.clone()
        found[:, positions] = new.to(value)
        return found

    return change


def copies(value: Any, b: int, n: int) -> Any:
    """What a forward is given, for n copies of its b prompts: tensors of b rows, wherever they stand, with n b rows."""
    if isinstance(value, Tensor):
        return value.repeat(n, *[1] * (value.ndim - 1)) if n > 1 and value.ndim > 1 and len(value) == b else value
    if isinstance(value, (tuple, list)):
        return type(value)(copies(v, b, n) for v in value)
    return {k: copies(v, b, n) for k, v in value.items()} if isinstance(value, dict) else value


def in_copy(i: int, b: int, new: Tensor) -> Callable[[Tensor], Tensor]:
    """A change of the i-th of several copies of b prompts only: its value is ``new`` (b, ...)."""

    def change(value: Tensor) -> Tensor:
        found = value.clone()
        found[i * b : (i + 1) * b] = new.to(value)
        return found

    return change


@contextlib.contextmanager
def _hooked(anatomy: Anatomy, seen: Mapping[Site, Callable[[Tensor], Tensor]], writes: bool = True) -> Iterator[None]:
    """Pass the values of sites through functions; one hook a module."""
    places: dict[tuple[nn.Module, bool], list[tuple[slice | None, Callable[[Tensor], Tensor]]]] = {}
    for site, function in seen.items():
        where = anatomy.columns(site) if site.kind in PER_HEAD else None
        places.setdefault(_place(anatomy, site), []).append((where, function))
    with contextlib.ExitStack() as stack:
        for (module, before), parts in places.items():
            if before:
                handle = module.register_forward_pre_hook(_pre(parts, writes), with_kwargs=True)
            else:
                handle = module.register_forward_hook(_post(parts, writes))
            stack.callback(handle.remove)
        yield


def _place(anatomy: Anatomy, site: Site) -> tuple[nn.Module, bool]:
    """The module at which a site's value passes, and whether as its input."""
    if site.kind in ("input", "residual"):
        return anatomy.layers[site.layer], site.kind == "input"
    if site.kind == "head":
        return anatomy.out(site.layer), True
    if site.kind in PER_HEAD:
        return anatomy.projection(site.layer, site.kind), False
    return (anatomy.attends if site.kind == "attention" else anatomy.mlp)(site.layer), False


def _through(value: Tensor, parts: list[tuple[slice | None, Callable[[Tensor], Tensor]]], writes: bool) -> Tensor:
    for where, function in parts:
        if where is None:
            value = function(value)
        elif writes:
            new = function(value[..., where])
            value = torch.cat((value[..., : where.start], new, value[..., where.stop :]), -1)
        else:
            function(value[..., where])
    return value


def _pre(parts: Any, writes: bool) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (_through(args[0], parts, writes), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _through(kwargs["hidden_states"], parts, writes)}

    return hook


def _post(parts: Any, writes: bool) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (_through(output[0], parts, writes), *output[1:])
        return _through(output, parts, writes)

    return hook


@contextlib.contextmanager
def instead(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Modules that do something else for a while: what is replaced is not computed."""
    kept = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, old in kept.items():
            if old is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = old


@contextlib.contextmanager
def evaluating(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Eval mode, without gradients unless asked for; afterwards each module's mode is what it was."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for module in training:
            module.training = True


def inputs_of(anatomy: Anatomy, given: Mapping[str, Tensor] | Tensor) -> dict[str, Tensor]:
    """Token ids, or what a tokenizer gives, on the model's device.

    Raises:
        ZooError: if there are no prompts, or a token is beyond the vocabulary.
    """
    inputs = {"input_ids": given} if isinstance(given, Tensor) else {k: v for k, v in given.items() if k != "labels"}
    ids = inputs["input_ids"]
    if ids.ndim != 2 or not ids.numel():
        raise ZooError(f"input_ids are {tuple(ids.shape)}; expected (prompts, positions), at least one of each.")
    check_tokens(ids, anatomy.config.vocab_size)
    device = device_of(anatomy.model)
    return {key: value.to(device) for key, value in inputs.items()}


def check_tokens(ids: Tensor, words: int) -> None:
    """Refuse token ids that are not among a model's.

    Raises:
        ZooError: naming one.
    """
    if ids.is_meta or not ids.numel():
        return
    least, most = (int(value) for value in ids.aminmax())
    if least < 0 or most >= words:
        found = least if least < 0 else most
        raise ZooError(f"A token is {found}; the model has {words}. Is it another model's tokenizer?")


def device_of(model: nn.Module) -> torch.device:
    """Where a model's inputs go; of one that accelerate spreads over devices, where its first parameters work."""
    device = next(model.parameters()).device
    hook: Any = getattr(model, "_hf_hook", None)
    if device.type == "meta" and hook is not None:  # weights wait in memory or on disk
        return torch.device(hook.execution_device)
    return device
