"""How much of a specialised model's inner state each module's weights, or values, bring back in its base.

Index legend: m modules, b prompts, t positions, d width of the stream.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.engines.patching import Anatomy, Site, capture, swapped
from zoo.engines.patching.weight_sweeps import (
    first_order,
    module_slices,
    reading,
    record,
    taken,
    value_sweep,
    weight_sweep,
)
from zoo.engines.patching.weights import exchanged
from zoo.language.llm.anchors import log_probability, prompts_of, texts_of

Batch = dict[str, Any]


@dataclass(frozen=True)
class Scorer:
    """Scores of modules for one expert.

    Args:
        anatomy: of the base. sites: the modules. expert: its parameters by name.
        anchor: a, (d,). level: L*. size: |mu_S - mu_B| there.
        least: prompts count whose denominator is at least this share of ``size``. rows: prompts in one pass at most.
    """

    anatomy: Anatomy
    sites: Sequence[Site]
    expert: Mapping[str, Tensor]
    anchor: Tensor
    level: int
    size: Tensor
    least: float
    rows: int

    def readout(self, stream: Tensor) -> Tensor:
        """<a, h> at the last token of streams (b, t, d), (b,)."""
        return (stream[:, -1].float() * self.anchor.to(stream.device)).sum(-1)  # float32 under autocast, too

    def ends(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """<a, h_B> and <a, h_S> of prompts, (b,) each, and which of them count: their difference is not small."""
        base = reading(self.anatomy, prompts_of(batch), self.readout, self.level)
        with exchanged(self.anatomy.model, self.expert):
            expert = reading(self.anatomy, prompts_of(batch), self.readout, self.level)
        return base, expert, (expert - base).abs() >= self.least * self.size

    def swept(self, batch: Batch, weights: Mapping[str, Tensor], sites: Sequence[Site]) -> Tensor:
        """<a, h> where one module has these weights, (m, b)."""
        return weight_sweep(self.anatomy, prompts_of(batch), weights, sites, self.readout, self.level, self.rows)

    def recovery(self, batch: Batch, sites: Sequence[Site] | None = None) -> tuple[Tensor, Tensor]:
        """r of modules for each prompt, (m, b), and which prompts count, (b,)."""
        base, expert, usable = self.ends(batch)
        found = self.swept(batch, self.expert, self.sites if sites is None else sites)
        return share(found - base, expert - base), usable

    def estimated(self, batch: Batch) -> Tensor:
        """The mean r of each module over prompts, to first order, (m,)."""
        base, expert, usable = self.ends(batch)
        distance = expert - base
        each = torch.where(usable, 1 / torch.where(usable, distance, 1), 0) / usable.sum().clamp(min=1)
        with torch.inference_mode(False):
            anchor, each = self.anchor.clone(), each.clone()
        return first_order(
            self.anatomy, prompts_of(batch), self.expert, self.sites,
            lambda stream: (stream[:, -1].float() * anchor).sum(-1) * each, self.level,
        )  # fmt: skip

    def necessity(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """d of modules for each prompt, (m, b): what the expert loses with the base's module in it."""
        base, expert, usable = self.ends(batch)
        own = {name: p.detach() for name, p in self.anatomy.model.named_parameters()}
        with exchanged(self.anatomy.model, self.expert):
            left = self.swept(batch, own, self.sites)
        return share(expert - left, expert - base), usable

    def activation(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """q of modules for each prompt, (m, b): the expert's activation of one, the base's weights in all."""
        base, expert, usable = self.ends(batch)
        inputs = prompts_of(batch)
        found = value_sweep(self.anatomy, inputs, self.values(inputs), self.readout, self.level, self.rows)
        return share(found - base, expert - base), usable

    def execution(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As `activation`, of the response's log-probability at the fixed prompt with its response."""
        inputs = texts_of(batch)
        passage = record(self.anatomy, inputs)

        def read(stream: Tensor) -> Tensor:
            return log_probability(self.anatomy, passage, stream, batch["labels"])

        base = reading(self.anatomy, inputs, read)
        with exchanged(self.anatomy.model, self.expert):
            expert = reading(self.anatomy, inputs, read)
        found = value_sweep(self.anatomy, inputs, self.values(inputs), read, None, self.rows)
        usable = (expert - base).abs() >= self.least * (expert - base).abs().mean().clamp(min=1e-6)
        return share(found - base, expert - base), usable

    def values(self, inputs: dict[str, Tensor]) -> dict[Site, Tensor]:
        """What each module of the expert gives."""
        with exchanged(self.anatomy.model, self.expert), capture(self.anatomy, self.sites) as seen:
            record(self.anatomy, inputs)
            return {site: seen[site] for site in self.sites}

    def joint(self, batch: Batch, sites: Iterable[Site | str]) -> float:
        """Mean r of several modules together, exactly."""
        base, expert, usable = self.ends(batch)
        with taken_over(self, sites):
            found = reading(self.anatomy, prompts_of(batch), self.readout, self.level)
        return float(share(found - base, expert - base)[usable].mean())

    def grown(self, batch: Batch, candidates: Sequence[Site], size: int) -> list[tuple[Site, Tensor]]:
        """Modules one by one, each time the one that brings the set's recovery highest, exactly, and that recovery."""
        base, expert, usable = self.ends(batch)
        left, found = list(candidates), []
        for _ in range(min(size, len(left))):
            with taken_over(self, [site for site, _ in found]):
                after = self.swept(batch, self.expert, left)
            mean = share(after - base, expert - base)[:, usable].mean(1)
            best = int(mean.argmax())
            found.append((left.pop(best), mean[best]))
        return found


def taken_over(scorer: Scorer, sites: Iterable[Site | str]) -> Any:
    """The base with these modules' weights of the expert, as long as the context lasts."""
    parts = {part: None for site in sites for part in module_slices(scorer.anatomy, site)}
    return swapped(scorer.anatomy.model, taken(scorer.expert, parts))


def share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, 0 where the whole is 0."""
    return torch.where(whole == 0, torch.zeros_like(part), part / torch.where(whole == 0, 1, whole))


def ranked(score: Tensor, sites: Sequence[Site]) -> list[Site]:
    """Heads and MLPs, the largest score (m,) first."""
    order = score.argsort(descending=True, stable=True).tolist()
    return [sites[i] for i in order if sites[i].kind in ("head", "mlp")]


def mean_rank(score: Tensor, sites: Sequence[Site], wanted: Iterable[Site]) -> float:
    """Mean rank of heads and MLPs among all of them by a score (m,), from 1; among equals the mean of their places."""
    known = {site: value for site, value in zip(sites, score.tolist(), strict=True) if site.kind in ("head", "mlp")}
    ranks = []
    for own in (known[site] for site in wanted):
        larger, equal = (sum(test) for test in ([v > own for v in known.values()], [v == own for v in known.values()]))
        ranks.append(larger + (equal + 1) / 2)
    return sum(ranks) / len(ranks)
