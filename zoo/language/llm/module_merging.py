"""Merging several models specialised from one base, each module by a weight of its own.

    merged = base + lambda sum_k sum_m w_{k,m} (S_k - B)_m

w comes from scores of the modules (`shared`, `kept`), or is fitted by a few steps of gradient descent (`learnt`).

Index legend: k experts, m modules, b prompts, t positions, d width of the stream.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.engines.patching import Anatomy, Site, Slice
from zoo.engines.patching.weight_sweeps import module_slices, with_gradients
from zoo.engines.patching.weights import exchanged
from zoo.language.llm.anchors import prompts_of
from zoo.language.llm.module_scores import Scorer

Weights = dict[str, Tensor]
Places = dict[Slice, list[int]]
"""By part of a parameter the numbers of the modules whose weights it is merged by; several: by their mean."""


def shared(score: Tensor, temperature: float) -> Tensor:
    """softmax over experts of score / T, (k, m): experts share what no score tells apart."""
    return (score / temperature).softmax(0)


def kept(score: Tensor, small: Tensor, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """A mask of each expert's modules with the largest positive scores, as many as make up a share of their sum.

    Args:
        score: (k, m). small: (m,) bool, which modules may be taken. top_p: the share, in (0, 1].
        generator: takes as many modules at random instead.
    Shapes:
        returns: (k, m) of 0 and 1
    """
    score = score.clamp(min=0) * small
    ranked = score.sort(dim=1, descending=True, stable=True)
    before = ranked.values.cumsum(1) - ranked.values
    enough = top_p * score.sum(1, keepdim=True)
    count = ((before < enough) & (ranked.values > 0)).sum(1)
    order = ranked.indices
    if generator is not None:
        places = small.nonzero().flatten().cpu()
        order = torch.stack([places[torch.randperm(len(places), generator=generator)] for _ in count])
    mask = torch.zeros_like(score)
    for k, n in enumerate(count.tolist()):
        mask[k, order[k, :n].to(mask.device)] = 1.0
    return mask


def places_of(anatomy: Anatomy, sites: Sequence[Site]) -> Places:
    """What is merged by heads and MLPs, and of an attention block's other weights by the block."""
    places: Places = {}
    for i, site in enumerate(sites):
        if site.kind in ("head", "mlp"):
            for part in module_slices(anatomy, site):
                places.setdefault(part, []).append(i)
    covered = {part.name for part in places}
    for i, site in enumerate(sites):
        if site.kind == "attention":
            rest = (part for part in module_slices(anatomy, site) if part.name not in covered)
            places.update({part: [i] for part in rest})
    return places


@torch.no_grad()
def merged_by(
    base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]], places: Places, weights: Tensor, scale: float
) -> Weights:
    """The parameters that a merge changes, by name, where the base has them.

    Args:
        weights: w, (k, m). scale: lambda.
    """
    found = {name: base[name].detach().clone() for name in {part.name: None for part in places}}
    for part, own in places.items():
        start = part.of(base[part.name].detach()).float()
        change = torch.zeros_like(start)
        for expert, row in zip(experts, weights, strict=True):
            share = float(row[own].mean())
            if share:
                change += share * (part.of(expert[part.name].detach()).to(start) - start)
        part.of(found[part.name]).copy_(start + scale * change)
    return found


@dataclass(frozen=True)
class Aim:
    """What the merged model is to do on some prompts.

    Args:
        inputs: as a tokenizer gives them. until: the block after which the stream is read.
        loss: the stream (b, t, d) -> (b,). share: what one prompt counts in the sum that is the loss.
    """

    inputs: dict[str, Tensor]
    until: int
    loss: Callable[[Tensor], Tensor]
    share: float


def towards(scorer: Scorer, batch: dict[str, Any], share: float) -> Aim:
    """To an expert's own state, along its anchor, on its prompts: ((<a, h> - <a, h_S>) / |mu_S - mu_B|)^2."""
    _, expert, _ = scorer.ends(batch)
    target, anchor, size = expert.detach().clone(), scorer.anchor.clone(), float(scorer.size)

    def loss(stream: Tensor) -> Tensor:
        return (((stream[:, -1].float() * anchor).sum(-1) - target) / size).square()

    return Aim(prompts_of(batch), scorer.level, loss, share)


def learnt(
    anatomy: Anatomy,
    experts: Sequence[Mapping[str, Tensor]],
    places: Places,
    start: Tensor,
    aims: Sequence[Aim],
    steps: int,
    lr: float,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Fit w by Adam, so that the merged model comes near to the aims: w (k, m), and the loss before each step.

    The gradient of w_{k,m} is that of the merged parameters along the expert's change of this module,

        dL / dw_{k,m} = lambda <dL / d theta_m, (S_k - B)_m>

    so that beside the merged parameters only one gradient is in memory at a time. A module that no aim reads keeps the
    weight that it starts with.

    Args:
        anatomy: of the base. start: w to begin with.
    """
    base = {name: p.detach() for name, p in anatomy.model.named_parameters()}
    named: dict[str, list[tuple[Slice, list[int]]]] = {}
    for part, own in places.items():
        named.setdefault(part.name, []).append((part, own))
    weights = start.detach().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([weights], lr=lr)
    losses = []
    for _ in range(steps):
        merged = merged_by(base, experts, places, weights.detach(), scale)
        slope = torch.zeros_like(start)

        def use(name: str, value: Tensor, gradient: Tensor, slope: Tensor = slope) -> None:
            for part, own in named[name]:
                before, there = part.of(base[name]).float(), part.of(gradient).float()
                for k, expert in enumerate(experts):
                    change = part.of(expert[name].detach()).to(before) - before
                    slope[k, own] += scale * (there * change).sum() / len(own)

        total = 0.0
        with exchanged(anatomy.model, merged):
            for aim in aims:
                total += with_gradients(
                    anatomy, aim.inputs, named, use, lambda s, aim=aim: aim.loss(s) * aim.share, aim.until
                )
        weights.grad = slope
        optimizer.step()
        losses.append(total)
    return weights.detach(), torch.tensor(losses)
