"""How submodules of fine-tuned models answer to the same inputs: what closed-form merging weights follow from.

A model is passed through section by section (embeddings, each block, last norm and projection to the vocabulary), all
calibration texts at a time, so that one section of each model is in memory.

Index legend: T tasks, b texts, t positions, d width; g_i(x) = f(x; theta_i) - f(x; theta_0).
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from zoo.core.errors import ZooError
from zoo.engines.patching import Anatomy, Site, Slice
from zoo.engines.patching.anatomy import is_transposed
from zoo.engines.patching.runs import evaluating, instead
from zoo.language.llm.shards import Source
from zoo.nn.backbones import known_mask

LEVELS = ("model", "layer", "attention_mlp", "head")
State = dict[str, Tensor]
"""Parameters of a section by their names in the model, float32."""


@dataclass(frozen=True)
class Part:
    """What gets merging weights of its own.

    Args:
        name: as "layers.3.mlp". slices: its parameters. main: whether its non-linearity counts for the level.
    """

    name: str
    slices: tuple[Slice, ...]
    main: bool = True


@dataclass(frozen=True)
class Place:
    """A module, and the parts that its outputs are for, by number; more than one where its heads are apart."""

    module: str
    parts: tuple[int, ...]


@dataclass
class Section:
    """Parameters that are in memory together.

    Args:
        kind: "embedding", "block" or "end". names: of its parameters. needs: others that it reads. places: in order.
    """

    kind: str
    names: list[str]
    needs: list[str] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    layer: int = -1


class Layout:
    """A model's parameters parted at a level: each belongs to one part.

    At "model" all of it is one. At the others embeddings, last norm and projection to the vocabulary are parts of their
    own; at "layer" each block is one; at "attention_mlp" each attention, MLP and norm; at "head" each head, those that
    share keys and values being one, and what of an attention belongs to no head.

    Raises:
        ValueError: for an unknown level.
        ZooError: if a parameter belongs to no part.
    """

    def __init__(self, anatomy: Anatomy, level: str):
        if level not in LEVELS:
            raise ValueError(f"level is {level!r}; one of {', '.join(LEVELS)}.")
        self.anatomy, self.level = anatomy, level
        self.shapes = {n: p.shape for n, p in anatomy.model.named_parameters()}
        self._names = {id(p): n for n, p in anatomy.model.named_parameters()}
        self.parts: list[Part] = []
        family = anatomy.family
        every = list(self.shapes)
        blocks = [[n for n in every if n.startswith(f"{family.layers}.{i}.")] for i in range(len(anatomy.layers))]
        head, norm = self.inside(family.head), self.inside(family.norm)
        end = list(dict.fromkeys([*norm.values(), *head.values()]))
        tied = [n for n in end if not n.startswith((family.head, family.norm))]
        rest = set(end).union(*blocks)
        self.sections = [Section("embedding", [n for n in every if n not in rest], tied)]
        self.sections += [Section("block", names, layer=i) for i, names in enumerate(blocks)]
        self.sections += [Section("end", end)]
        if level == "model":
            self.parts = [Part("model", self.whole(every))]
        else:
            self._part_all(list(norm.values()), list(head.values()))
        self.places: dict[str, list[tuple[int, Slice]]] = {name: [] for name in every}
        for number, part in enumerate(self.parts):
            for piece in part.slices:
                self.places[piece.name].append((number, piece))
        missing = [n for n in every if not self.places[n]]
        if missing:
            raise ZooError(f"{missing[0]} belongs to no part at the level {level!r}: merge at 'layer' or 'model'.")

    def inside(self, path: str) -> dict[str, str]:
        """The parameters of a module: its own names for them -> the model's."""
        module = self.anatomy.model.get_submodule(path)
        return {own: self._names[id(p)] for own, p in module.named_parameters()}

    def whole(self, names: Sequence[str]) -> tuple[Slice, ...]:
        """Parameters as slices."""
        return tuple(Slice(n, 0, 0, self.shapes[n][0]) for n in names)

    def _add(self, section: Section, path: str, *parts: Part) -> None:
        first = len(self.parts)
        self.parts += parts
        section.places.append(Place(path, tuple(range(first, len(self.parts)))))

    def _part_all(self, norm: list[str], head: list[str]) -> None:
        family = self.anatomy.family
        if self.sections[0].names:
            self._add(self.sections[0], "", Part("embedding", self.whole(self.sections[0].names), main=False))
        for section in self.sections[1:-1]:
            block = f"{family.layers}.{section.layer}"
            if self.level == "layer":
                self._add(section, block, Part(f"layers.{section.layer}", self.whole(section.names)))
                continue
            self._add(section, f"{block}.{family.attention}", *self._attention(section.layer))
            for kind, paths in (("mlp", family.mlp_parts), ("norm", family.norms)):
                for path in paths:
                    name = f"layers.{section.layer}.{path}"
                    own = self.whole(list(self.inside(f"{block}.{path}").values()))
                    self._add(section, f"{block}.{path}", Part(name, own, main=kind == "mlp"))
        self._add(self.sections[-1], family.norm, Part("norm", self.whole(norm), main=False))
        self._add(self.sections[-1], family.head, Part("unembedding", self.whole(head), main=False))

    def _attention(self, layer: int) -> list[Part]:
        """The attention as one part, or its heads and what belongs to none of them."""
        anatomy = self.anatomy
        every = self.whole([s.name for s in anatomy.slices(Site(layer, "attention"))])
        if self.level != "head":
            return [Part(f"layers.{layer}.attention", every)]
        per = anatomy.heads // anatomy.kv_heads
        found = []
        for group in range(anatomy.kv_heads):
            sites = [Site(layer, "head", group * per + i) for i in range(per)]
            slices = dict.fromkeys(piece for site in sites for piece in anatomy.slices(site))
            found.append(Part(f"layers.{layer}.head.{group}", tuple(slices)))
        named = {piece.name for part in found for piece in part.slices}
        rest = tuple(piece for piece in every if piece.name not in named)
        return [*found, Part(f"layers.{layer}.attention", rest, main=False)] if rest else found


@dataclass
class Texts:
    """Calibration texts of one task on their way through the models.

    Args:
        task: its number. ids: (b, t). mask: (b, t), 0 at padding.
        hidden: what the next section gets, by the model that made it, given as coefficients of the task vectors.
        calls: the other arguments of each block.
    """

    task: int
    ids: Tensor
    mask: Tensor
    hidden: dict[tuple[float, ...], Tensor] = field(default_factory=dict)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    @property
    def weight(self) -> Tensor:
        """Of each position: its text's mean is taken, padding left out, (b, t)."""
        mask = self.mask.float()
        return mask / mask.sum(1, keepdim=True).clamp(min=1)


class Calibration:
    """Gram matrices of g_1(x) ... g_T(x), for each part and the inputs of each task, and how far f is from linear.

    Args:
        layout: of a model, whose own parameters are never used and may be on the meta device.
        tasks: T. points: at how many a in (0, 1) the non-linearity is measured; 0 leaves it out.
    Shapes:
        gram: (parts, task of the inputs, i, j) float64, sums over texts of the mean over positions of <g_i, g_j>
        bent: (parts, task, 2) float64, sums of |f(x; a) - f(x; 0) - a g| and of |a g| over texts, positions and a
        count: (task,) texts
    """

    def __init__(self, layout: Layout, tasks: int, points: int = 3):
        self.layout, self.model, self.tasks = layout, layout.anatomy.model, tasks
        self.points = [(k + 1) / (points + 1) for k in range(points)]
        parts = len(layout.parts)
        self.gram = torch.zeros(parts, tasks, tasks, tasks, dtype=torch.float64)
        self.bent = torch.zeros(parts, tasks, 2, dtype=torch.float64)
        self.count = torch.zeros(tasks, dtype=torch.float64)

    @torch.no_grad()
    def measure(
        self,
        texts: Sequence[Texts],
        models: Sequence[Source],
        after: Callable[[Section, list[State]], None] = lambda section, states: None,
    ) -> None:
        """Pass texts through all models.

        Args:
            models: the base, then the experts. after: called after each section with what was read of each model.
        Raises:
            ZooError: if there is no text, one is empty, or has a token that the models lack.
        """
        if not texts:
            raise ZooError("No calibration texts: give some of every task that is merged.")
        for one in texts:
            _check(one, self.layout.anatomy.config.vocab_size)
            self.count[one.task] += len(one.ids)
        device = texts[0].ids.device
        with evaluating(self.model):
            for section in self.layout.sections:
                states = read(section.names + section.needs, models, device)
                for one in texts:
                    getattr(self, f"_{section.kind}")(section, one, states)
                after(section, states)
                del states

    # ---- sections -----------------------------------------------------------------------------------------------

    def _unit(self, i: int, size: float = 1.0) -> tuple[float, ...]:
        return tuple(size if j == i else 0.0 for j in range(self.tasks))

    def _runs(self, task: int) -> list[tuple[float, ...]]:
        """The models that a text passes through: its own expert, or for the whole model's sake all."""
        if self.layout.level != "model":
            return [self._unit(task)]
        return [
            self._unit(0, 0.0), *(self._unit(i) for i in range(self.tasks)),
            *(self._unit(task, a) for a in self.points),
        ]  # fmt: skip

    def _embedding(self, section: Section, one: Texts, states: list[State]) -> None:
        for run in self._runs(one.task):
            one.hidden[run], one.calls = self._embedded(one, mixed(states, run))
        own = states[one.task + 1]
        for place in section.places:  # a tied projection is merged at the end: here it is the expert's own
            varied = [{**own, **{n: state[n] for n in section.names}} for state in states]
            self._compare(place, one, partial(self._first, one, varied))

    def _first(self, one: Texts, states: list[State], run: tuple[float, ...]) -> list[Tensor]:
        return [self._embedded(one, mixed(states, run))[0]]

    def _embedded(self, one: Texts, state: State) -> tuple[Tensor, list[Any]]:
        """What enters the first block, and with which other arguments each block is called."""
        anatomy, calls, first = self.layout.anatomy, [], []

        def block(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            first.append(hidden)
            calls.append((args, kwargs))
            return hidden

        idle: dict[nn.Module, Any] = {module: lambda x, *a, **k: x for module in (anatomy.norm, anatomy.unembedding)}
        options = {"attention_mask": known_mask(one.ids, one.mask), "use_cache": False}
        options |= positions_for(self.model, one.mask)
        with instead({**idle, **dict.fromkeys(anatomy.layers, block)}):
            functional_call(self.model, state, (one.ids,), options)
        return first[0], calls

    def _block(self, section: Section, one: Texts, states: list[State]) -> None:
        args, kwargs = one.calls[section.layer]
        path = f"{self.layout.anatomy.family.layers}.{section.layer}"
        if self.layout.level == "model":
            for run, hidden in one.hidden.items():
                one.hidden[run] = self._call(path, mixed(states, run), (hidden, *args), kwargs)
            return
        own = self._unit(one.task)
        with self._entrances([place.module for place in section.places]) as entered:
            one.hidden[own] = self._call(path, states[one.task + 1], (one.hidden[own], *args), kwargs)
        for place in section.places:
            self._evaluate(place, one, states, *entered[place.module])

    def _end(self, section: Section, one: Texts, states: list[State]) -> None:
        family = self.layout.anatomy.family
        if self.layout.level == "model":
            last = {}
            for run, hidden in one.hidden.items():
                state = mixed(states, run)
                last[run] = self._call(family.head, state, (self._call(family.norm, state, (hidden,), {}),), {})
            self._compare(Place("", (0,)), one, lambda run: [last[run]])
            return
        value = one.hidden[self._unit(one.task)]
        for place in section.places:
            self._evaluate(place, one, states, (value,), {})
            value = self._call(place.module, states[one.task + 1], (value,), {})

    # ---- modules ------------------------------------------------------------------------------------------------

    def _call(self, path: str, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What a module gives with other parameters."""
        own = {name: state[full] for name, full in self.layout.inside(path).items()}
        out = functional_call(self.model.get_submodule(path), own, args, kwargs)
        return out[0] if isinstance(out, tuple) else out

    @contextmanager
    def _entrances(self, paths: list[str]) -> Iterator[dict[str, tuple[tuple[Any, ...], dict[str, Any]]]]:
        """What modules are called with."""
        entered: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        handles = []
        for path in paths:

            def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
                entered[path] = args, kwargs

            module = self.model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(look, with_kwargs=True))
        try:
            yield entered
        finally:
            for handle in handles:
                handle.remove()

    def _evaluate(
        self, place: Place, one: Texts, states: list[State], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        parts = [self.layout.parts[i] for i in place.parts]
        if ".head." not in parts[0].name:
            self._compare(place, one, lambda run: [self._call(place.module, mixed(states, run), args, kwargs)])
            return
        out = f"{place.module}.{self.layout.anatomy.family.out}"

        def heads(run: tuple[float, ...]) -> list[Tensor]:
            """What each head adds to the stream; other heads don't enter into it."""
            state = mixed(states, run)
            with self._entrances([out]) as entered:
                whole = self._call(place.module, state, args, kwargs)
            (z, *_), _ = entered[out]
            turned = is_transposed(self.model.get_submodule(out))
            found = []
            for part in parts:
                pieces = [piece for piece in part.slices if piece.name == f"{out}.weight"]
                if ".head." in part.name:
                    rows = [piece.of(state[piece.name]) for piece in pieces]
                    inputs = [z[..., piece.start : piece.start + piece.size] for piece in pieces]
                    added = [x @ (w if turned else w.T) for x, w in zip(inputs, rows, strict=True)]
                    found.append(torch.stack(added).sum(0))
                else:
                    found.append(whole)
            return found

        self._compare(place, one, heads)

    def _compare(self, place: Place, one: Texts, respond: Callable[[tuple[float, ...]], list[Tensor]]) -> None:
        """Add to the sums of a place's parts.

        Args:
            respond: outputs (b, t, d), one for each part, of the model with these coefficients.
        """
        before = respond(self._unit(0, 0.0))
        deltas = [
            [new - old for new, old in zip(respond(self._unit(i)), before, strict=True)] for i in range(self.tasks)
        ]
        for k, part in enumerate(place.parts):
            self._add(self.gram[part, one.task], gram([delta[k] for delta in deltas], one.weight))
        for a in self.points:
            for k, value in enumerate(respond(self._unit(one.task, a))):
                straight = a * deltas[one.task][k]
                far = torch.stack([lengths(value - before[k] - straight, one), lengths(straight, one)])
                self._add(self.bent[place.parts[k], one.task], far)

    def _add(self, total: Tensor, value: Tensor) -> None:
        if not value.is_meta:
            total += value.double().cpu()

    # ---- results ------------------------------------------------------------------------------------------------

    def nonlinearity(self) -> Tensor:
        """The level's score for each task, (T,): the mean over its parts of |f(a) - f(0) - a g| / |a g|."""
        main = torch.tensor([part.main for part in self.layout.parts])
        wrong, size = self.bent[main].unbind(-1)
        known = size > 0  # a part that an expert left as it was says nothing
        return (wrong / size.clamp(min=1e-300) * known).sum(0) / known.sum(0).clamp(min=1)

    def weights(self, normalise: bool = False, tikhonov: float = 1e-6) -> Tensor:
        """Merging weights, (parts, T) float64.

        Raises:
            ZooError: if a task had no text.
        """
        empty = (self.count == 0).nonzero().flatten().tolist()
        if empty:
            raise ZooError(f"No calibration text of task {empty[0]}: give some of every task that is merged.")
        return torch.stack([solve(own / self.count[:, None, None], normalise, tikhonov) for own in self.gram])


def positions_for(model: nn.Module, mask: Tensor) -> dict[str, Tensor]:
    """Positions (b, t) by a mask, for a model that takes them, so that padding on the left changes nothing."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}  # GPT-2 would count the padding


def read(names: Sequence[str], models: Sequence[Source], device: Any) -> list[State]:
    """These parameters of each model, float32."""
    return [{name: model.read(name).to(device, torch.float32) for name in names} for model in models]


def gram(deltas: Sequence[Tensor], weight: Tensor) -> Tensor:
    """sum over texts and positions of weight <g_i, g_j>: T tensors (b, t, d), weight (b, t) -> (T, T) float64.

    Each text's sum is float32; texts are added up in float64.
    """
    padding = (weight == 0)[..., None]
    g = torch.stack([delta.float().masked_fill(padding, 0) for delta in deltas])
    each = torch.einsum("ibtd,jbtd->bij", g * weight[..., None], g)
    return each.sum(0) if each.is_meta else each.cpu().double().sum(0)


def lengths(value: Tensor, one: Texts) -> Tensor:
    """sum over texts of the mean length over positions: (b, t, d) -> ()."""
    norm = value.float().norm(dim=-1).masked_fill(one.mask == 0, 0)
    return (norm * one.weight).sum()


def solve(grams: Tensor, normalise: bool = False, tikhonov: float = 1e-6) -> Tensor:
    """The a that minimise sum_t E_t |sum_i a_i g_i(x) - g_t(x)|^2.

        A a = b,   A_ij = sum_t E_t <g_i, g_j>,   b_i = sum_t E_t <g_i, g_t>

    Args:
        grams: E_t <g_i, g_j>, (t, i, j) float64. normalise: divide task t's term by E_t |g_t|^2, so that all count
            alike. tikhonov: times tr(A) / T, added to the diagonal.
    Shapes:
        returns: (T,) float64; zero where no expert differs from the base
    """
    tasks = torch.arange(len(grams))
    if normalise:
        own = grams[tasks, tasks, tasks]
        grams = grams / torch.where(own > 0, own, 1)[:, None, None]
    a, b = grams.sum(0), grams[tasks, :, tasks].sum(0)
    ridge = tikhonov * a.trace() / len(a)
    if not ridge > 0:
        return torch.linalg.lstsq(a, b[:, None], driver="gelsd").solution[:, 0]
    return torch.linalg.solve(a + ridge * torch.eye(len(a), dtype=a.dtype), b)


def mixed(states: Sequence[State], run: tuple[float, ...]) -> State:
    """theta_0 + sum_i run_i (theta_i - theta_0); the base and the experts as they are."""
    used = [i for i, c in enumerate(run) if c]
    if not used:
        return states[0]
    if len(used) == 1 and run[used[0]] == 1:
        return states[used[0] + 1]
    return {n: own + sum(run[i] * (states[i + 1][n] - own) for i in used) for n, own in states[0].items()}


def merged(layout: Layout, section: Section, states: Sequence[State], weights: Tensor) -> State:
    """A section's parameters with each part's own weights (parts, T), float32."""
    found = {}
    for name in section.names:
        own = states[0][name]
        found[name] = value = own.clone()
        for part, piece in layout.places[name]:
            for a, state in zip(weights[part].tolist(), states[1:], strict=True):
                piece.of(value).add_(piece.of(state[name]) - piece.of(own), alpha=a)
    return found


def _check(one: Texts, words: int) -> None:
    if one.ids.ndim != 2 or not one.ids.numel():
        raise ZooError(f"input_ids are {tuple(one.ids.shape)}; expected (texts, positions), at least one of each.")
    if one.ids.is_meta:
        return
    if int(one.ids.max()) >= words or int(one.ids.min()) < 0:
        raise ZooError(f"A token is {int(one.ids.max())}; the models have {words}. Is it another model's tokenizer?")
    if not bool(one.mask.any(1).all()):
        raise ZooError("A calibration text is all padding: leave empty texts out.")
