"""What each of many sites does to the model's answer: many patched copies of the prompts in one pass.

A sweep never runs what it knows: blocks below the patched one are skipped, their result is that of the unpatched run.
`path_sweep` moreover needs no attention and, as nothing then passes between positions, only the position that is read.

Index legend: n sites of a group, b prompts, t positions, d width of the residual stream, e width of a head, v words.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.core.errors import ZooError
from zoo.engines.patching.anatomy import Anatomy, Site
from zoo.engines.patching.runs import capture, copies, evaluating, in_copy, inputs_of, instead, patched

Inputs = Mapping[str, Tensor] | Tensor
Score = Callable[[Tensor], Tensor]
"""Logits (n, b, v) at the position that is read -> (n, b)."""


def probability(answer: Tensor) -> Score:
    """The probability of each prompt's answer, token ids (b,)."""
    return lambda logits: logits.float().softmax(-1)[:, torch.arange(len(answer)), answer.to(logits.device)]


def logit_difference(answer: Tensor, other: Tensor) -> Score:
    """How much larger the logit of each prompt's answer (b,) is than that of another token (b,)."""

    def score(logits: Tensor) -> Tensor:
        rows = torch.arange(len(answer))
        return logits.float()[:, rows, answer.to(logits.device)] - logits.float()[:, rows, other.to(logits.device)]

    return score


def run(anatomy: Anatomy, inputs: Inputs, position: int = -1) -> Tensor:
    """Logits (b, v) at a position of an ordinary run."""
    with evaluating(anatomy.model):
        return _logits(anatomy, inputs_of(anatomy, inputs), position)


def _logits(anatomy: Anatomy, inputs: Mapping[str, Tensor], position: int) -> Tensor:
    place = torch.tensor([position % inputs["input_ids"].shape[1]])
    return anatomy.model(**inputs, use_cache=False, logits_to_keep=place).logits[:, 0]


def _pair(anatomy: Anatomy, reference: Inputs, counterfactual: Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    first, second = inputs_of(anatomy, reference), inputs_of(anatomy, counterfactual)
    shapes = tuple(first["input_ids"].shape), tuple(second["input_ids"].shape)
    if shapes[0] != shapes[1]:
        raise ZooError(
            f"Reference prompts are {shapes[0]} and counterfactual ones {shapes[1]} tokens: pairs must align."
        )
    masks = [x.get("attention_mask") for x in (first, second)]
    if any(mask is not None and not bool(mask[:, -1].all()) for mask in masks):
        raise ZooError(
            "Prompts are padded on the right: pad on the left (tokenizer.padding_side = 'left'), or not at all."
        )
    return first, second


def activation_sweep(
    anatomy: Anatomy,
    reference: Inputs,
    counterfactual: Inputs,
    sites: Iterable[Site | str],
    score: Score,
    position: int = -1,
    rows: int = 256,
) -> Tensor:
    """The score of reference prompts where one site has its value of the counterfactual prompts: total effects.

    Args:
        reference, counterfactual: token ids (b, t) or what a tokenizer gives, aligned position by position.
        position: which one's logits are scored. rows: prompts in one pass at most.
    Shapes:
        returns: (sites, b)
    Raises:
        ZooError: for an unknown site, or prompts that do not align.
    """
    known = [anatomy.site(site) for site in sites]
    first, second = _pair(anatomy, reference, counterfactual)
    found: dict[Site, Tensor] = {}
    with evaluating(anatomy.model):
        with capture(anatomy, known) as new:
            _logits(anatomy, second, position)
        with capture(anatomy, anatomy.sites("input")) as stream, _kinds(anatomy) as kinds:
            _logits(anatomy, first, position)
        b = len(first["input_ids"])
        for group in _groups(known, max(rows // b, 1)):
            changes = {site: in_copy(i, b, new[site]) for i, site in enumerate(group)}
            start = stream[Site(group[0].layer, "input")].repeat(len(group), 1, 1)
            with _from(anatomy, group[0].layer, start, kinds), patched(anatomy, changes):
                logits = _logits(anatomy, copies(first, b, len(group)), position)
            found.update(zip(group, score(logits.unflatten(0, (len(group), b))), strict=True))
    return torch.stack([found[site] for site in known])


def path_sweep(
    anatomy: Anatomy,
    reference: Inputs,
    counterfactual: Inputs,
    sites: Iterable[Site | str],
    score: Score,
    position: int = -1,
    rows: int = 1024,
) -> Tensor:
    """As `activation_sweep`, but only along the direct path to the logits: attention of later blocks stays as it was,
    MLPs are computed anew (path patching with the final residual stream as receiver).

    Wang et al., "Interpretability in the Wild", ICLR 2023, arXiv:2211.00593; Goldowsky-Dill et al., arXiv:2304.05969.

    Args:
        sites: of kind "head", "attention" or "mlp".
    Shapes:
        returns: (sites, b)
    """
    known = _senders(anatomy, sites)
    first, second = _pair(anatomy, reference, counterfactual)
    place = position % first["input_ids"].shape[1]
    found: dict[Site, Tensor] = {}
    with evaluating(anatomy.model):
        with capture(anatomy, known) as seen:
            _logits(anatomy, second, place)
        new = {site: value[:, [place]] for site, value in seen.items()}
        fixed = anatomy.sites("input", "attention", "head")
        with capture(anatomy, fixed) as values, _kinds(anatomy) as kinds:
            _logits(anatomy, first, place)
        old = {site: value[:, [place]] for site, value in values.items()}
        b = len(first["input_ids"])
        short = {"input_ids": first["input_ids"][:, [place]]}
        for group in _groups(known, max(rows // b, 1)):
            n, layer = len(group), group[0].layer
            forwards = _frozen(anatomy, group, old, new, b, kinds)
            changes = {site: in_copy(i, b, new[site]) for i, site in enumerate(group) if site.kind == "mlp"}
            start = old[Site(layer, "input")].repeat(n, 1, 1)
            with _from(anatomy, layer, start, kinds), instead(forwards), patched(anatomy, changes):
                logits = _logits(anatomy, copies(short, b, n), 0)
            found.update(zip(group, score(logits.unflatten(0, (n, b))), strict=True))
    return torch.stack([found[site] for site in known])


def receiver_sweep(
    anatomy: Anatomy,
    reference: Inputs,
    counterfactual: Inputs,
    sites: Iterable[Site | str],
    receivers: Iterable[Site | str],
    score: Score,
    position: int = -1,
    rows: int = 256,
) -> Tensor:
    """As `path_sweep`, but along the direct paths to what some heads read: their queries, keys or values.

    Three runs, as in Wang et al., arXiv:2211.00593, app. B: what the senders give on the counterfactual prompts; what
    then arrives at the receivers, all attention held at what it was and MLPs computed anew; and the score of the
    reference prompts with that in the receivers, everything after them computed anew. All positions are patched. A
    sender that no receiver comes after changes nothing.

    Args:
        sites: senders, of kind "head", "attention" or "mlp".
        receivers: of kind "query", "key" or "value", patched together; `Anatomy.reads` names a head's three.
    Shapes:
        returns: (sites, b)
    Raises:
        ZooError: for an unknown site, a kind that cannot send or receive, or prompts that do not align.
    """
    known, into = _senders(anatomy, sites), list(dict.fromkeys(anatomy.site(site) for site in receivers))
    wrong = [site for site in into if site.kind not in ("query", "key", "value")]
    if wrong or not into:
        raise ZooError(f"{wrong[0] if wrong else 'Nothing'} cannot receive; 'query', 'key' and 'value' of heads can.")
    first, second = _pair(anatomy, reference, counterfactual)
    b = len(first["input_ids"])
    low, high = min(site.layer for site in into), max(site.layer for site in into)
    found: dict[Site, Tensor] = {}
    with evaluating(anatomy.model):
        with capture(anatomy, known) as new:
            _logits(anatomy, second, position)
        fixed = [site for site in anatomy.sites("input", "attention", "head") if site.layer <= high]
        with capture(anatomy, fixed) as old, _kinds(anatomy) as kinds:
            whole = score(_logits(anatomy, first, position)[None])[0]
        for group in _groups([site for site in known if site.layer < high], max(rows // b, 1)):
            n = len(group)
            repeated = copies(first, b, n)
            arrived = _arriving(anatomy, group, into, repeated, old, new, b, kinds)
            start = old[Site(low, "input")].repeat(n, 1, 1)
            with _from(anatomy, low, start, kinds), patched(anatomy, arrived):
                logits = _logits(anatomy, repeated, position)
            found.update(zip(group, score(logits.unflatten(0, (n, b))), strict=True))
    return torch.stack([found.get(site, whole) for site in known])


def _arriving(
    anatomy: Anatomy,
    group: Sequence[Site],
    into: Sequence[Site],
    repeated: Mapping[str, Tensor],
    old: dict[Site, Tensor],
    new: dict[Site, Tensor],
    b: int,
    kinds: Mapping[nn.Module, int],
) -> dict[Site, Tensor]:
    """What the receivers after the senders' layer are in each copy, with all attention held: (n b, t, e)."""
    layer, high = group[0].layer, max(site.layer for site in into)
    seen: dict[int, Tensor] = {}
    forwards = _frozen(anatomy, group, old, new, b, kinds, last=high)
    for late in sorted({site.layer for site in into if site.layer > layer}):
        module = anatomy.attention(late)
        forwards[module] = _noting(forwards[module], seen, late)
    forwards |= {module: _passing(kinds[module]) for module in anatomy.layers[high + 1 :]}
    changes = {site: in_copy(i, b, new[site]) for i, site in enumerate(group) if site.kind == "mlp"}
    start = old[Site(layer, "input")].repeat(len(group), 1, 1)
    with _from(anatomy, layer, start, kinds), instead(forwards), patched(anatomy, changes):
        _logits(anatomy, repeated, -1)
    made: dict[nn.Module, Tensor] = {}
    found = {}
    for site in into:
        if site.layer > layer:
            module = anatomy.projection(site.layer, site.kind)
            if module not in made:
                made[module] = module(seen[site.layer])
            found[site] = made[module][..., anatomy.columns(site)]
    return found


def _senders(anatomy: Anatomy, sites: Iterable[Site | str]) -> list[Site]:
    known = [anatomy.site(site) for site in sites]
    wrong = [site for site in known if site.kind not in ("head", "attention", "mlp")]
    if wrong:
        raise ZooError(f"{wrong[0]} cannot send along a path; 'head', 'attention' and 'mlp' can.")
    return known


def _frozen(
    anatomy: Anatomy,
    group: Sequence[Site],
    old: dict[Site, Tensor],
    new: dict[Site, Tensor],
    b: int,
    kinds: Mapping[nn.Module, int],
    last: int | None = None,
) -> dict[nn.Module, Callable[..., Any]]:
    """Forwards of the attentions from the senders' layer to the ``last``: what each gave, but for the senders."""
    n, layer = len(group), group[0].layer
    sent = _sent(anatomy, group, old[Site(layer, "attention")].repeat(n, 1, 1), old, new, b)
    forwards = {}
    for later in range(layer, len(anatomy.layers) if last is None else last + 1):
        value, times = (sent, 1) if later == layer else (old[Site(later, "attention")], n)
        module = anatomy.attention(later)
        forwards[module] = _always(value, kinds[module], times)
        if anatomy.family.attends:  # a norm after the projection: its result is what is added
            forwards[anatomy.attends(later)] = _always(value, 0, times)
    return forwards


def _sent(
    anatomy: Anatomy, group: Sequence[Site], value: Tensor, old: dict[Site, Tensor], new: dict[Site, Tensor], b: int
) -> Tensor:
    """What attention adds to the stream in each copy, one head (or all of it) being the counterfactual's."""
    layer = group[0].layer
    value = value.clone()
    heads = [(i, site) for i, site in enumerate(group) if site.kind == "head"]
    if heads:
        together = torch.cat([old[Site(layer, "head", h)] for h in range(anatomy.heads)], -1)
        mixed = together.repeat(len(heads), 1, 1)
        for copy, (_, site) in enumerate(heads):
            mixed[copy * b : (copy + 1) * b, :, anatomy.columns(site)] = new[site]
        made = anatomy.out(layer)(mixed)
        if anatomy.family.attends:
            made = anatomy.attends(layer)(made)
        for copy, (i, _) in enumerate(heads):
            value[i * b : (i + 1) * b] = made[copy * b : (copy + 1) * b]
    for i, site in enumerate(group):
        if site.kind == "attention":
            value[i * b : (i + 1) * b] = new[site]
    return value


def _groups(sites: Sequence[Site], most: int) -> list[list[Site]]:
    """Sites of one layer together, at most so many."""
    found = []
    for layer in sorted({site.layer for site in sites}):
        own = [site for site in dict.fromkeys(sites) if site.layer == layer]
        found += [own[i : i + most] for i in range(0, len(own), most)]
    return found


def _always(value: Tensor, kind: int, times: int = 1) -> Callable[..., Any]:
    """A forward that gives a value so many times, in a tuple of that length (0: as it is)."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        result = value if times == 1 else value.repeat(times, 1, 1)
        return (result, *[None] * (kind - 1)) if kind else result

    return forward


def _noting(forward: Callable[..., Any], seen: dict[int, Tensor], layer: int) -> Callable[..., Any]:
    """A forward that keeps its input under a layer's number."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen[layer] = args[0] if args else kwargs["hidden_states"]
        return forward(*args, **kwargs)

    return noted


def _passing(kind: int) -> Callable[..., Any]:
    """A forward that gives its input, as `_always` does."""
    return lambda stream, *args, **kwargs: _always(stream, kind)()


@contextlib.contextmanager
def _kinds(anatomy: Anatomy) -> Iterator[dict[nn.Module, int]]:
    """Lengths of the tuples that blocks and attentions return, by version of transformers; 0: no tuple."""
    found: dict[nn.Module, int] = {}

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        found[module] = len(output) if isinstance(output, tuple) else 0

    with contextlib.ExitStack() as stack:
        for module in (*anatomy.layers, *(anatomy.attention(i) for i in range(len(anatomy.layers)))):
            stack.callback(module.register_forward_hook(hook).remove)
        yield found


@contextlib.contextmanager
def _from(anatomy: Anatomy, layer: int, stream: Tensor, kinds: Mapping[nn.Module, int]) -> Iterator[None]:
    """Begin with the stream (n b, t, d) that enters a block: those below it do nothing."""
    below = {module: _always(stream, kinds[module]) for module in anatomy.layers[:layer]}
    with instead(below), patched(anatomy, {Site(layer, "input"): stream}):
        yield
