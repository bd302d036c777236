"""TyrThePruner: whole heads and neurons removed from a language model, how many of each layer's found by search.

Paper: Guanchen Li, Yixing Xu, Zeping Li, Ji Liu, Xuanwu Yin, Dong Li, Emad Barsoum, "Tyr-the-Pruner: Structural Pruning
LLMs via Global Sparsity Distribution Optimization", NeurIPS 2025, arXiv:2503.09657. Code by the authors:
https://github.com/AMD-AGI/Tyr-the-Pruner, Apache-2.0.

In: a pretrained decoder, text, and which share of the heads and neurons is to go. Out: the same decoder without them,
what is left fitted again in closed form, nothing trained. Rounds of two programs:

    supernet   every layer is pruned at up to 9 levels around its present sparsity, in steps of d    (`supernet`)
    search     one level a layer by mutation and elimination; what one layer gains another gives      (`evolution`)

Then d halves, and the layers, dense again, are pruned around what was found. Heads leave by the columns of the output
projection, neurons by those of the MLP's last one (`local_pruning`); `export` slices both away (`narrow`).

Departs from the authors' code where that does not do what paper and comments say; arguments bring theirs back:
  * Later blocks see the expected weights of pruned ones. In their code a reset variable lets dense weights through:
    ``error_accumulation="none"``.
  * Groups that are zero already: the inverse leaves them out, and what stays is the least squares
    (``authors_refit=True``: theirs, with them inside).
  * How many groups stay is rounded, not cut off after floating-point error (``authors_counts=True``).
  * A flip exchanges a step between two layers, never of a layer with itself (``authors_flips=True``).
  * A layer keeps one head and one neuron at least, which an exported model needs for its cache; theirs may lose all
    (``authors_empty=True``; the exported model then has a dead one).
  * Steps are whole heads and neurons, so that each state has exactly as many; theirs are shares of a matrix's weights.
Children are run from the first block in which they differ from their parent; the same numbers at less cost.
"""

import copy
import logging
import math
import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torchmetrics.text import Perplexity

from zoo.core import ZooError
from zoo.core.seeding import seed_from
from zoo.engines.patching import CausalLMModule, Site, capture
from zoo.engines.patching.runs import evaluating, inputs_of
from zoo.language.compression import evolution
from zoo.language.compression.evolution import FITNESS, State
from zoo.language.compression.local_pruning import kept
from zoo.language.compression.supernet import (
    ACCUMULATIONS,
    Blocks,
    LocalSettings,
    Prunable,
    build,
    prunables,
    refuse_broken,
)
from zoo.nn.backbones import build_backbone

log = logging.getLogger(__name__)

TEACHER_BYTES = 2**32
"""What the dense model says of a block of text is kept for later generations as far as it fits into this."""


@dataclass
class Search:
    """What a search holds beside the model.

    Args:
        tokens: the calibration text (n, t) int64, on the CPU. at_once: sequences a forward pass.
        loaded: by layer the level that the model holds, None for its dense weight. taught: by block of text what the
            dense model says.
    """

    tokens: Tensor
    at_once: int
    blocks: Blocks
    layers: list[Prunable]
    loaded: list[int | None] = field(default_factory=list)
    taught: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def load(self, state: Sequence[int | None]) -> None:
        """Give the layers the weights of a state."""
        for i, (layer, level) in enumerate(zip(self.layers, state, strict=True)):
            if level != self.loaded[i]:
                weight = layer.dense if level is None else layer.levels[level]
                assert weight is not None
                layer.put(weight)
        self.loaded = list(state)


class TyrThePruner(CausalLMModule):
    """Prune a causal language model to a share of its heads and neurons.

    There is no gradient: a training step is one generation of the search, the first ones of a fit gather calibration
    text, and an epoch means nothing. The fit stops by itself after ``rounds * generations`` steps; `trainer.max_epochs`
    must leave room for them. A checkpoint from the middle of a search holds its text and the dense weights, and goes on
    to the same result. Without a trainer:

        model = TyrThePruner.from_backbone(llm, sparsity=0.5)
        model.start(blocks_of_token_ids)
        while not model.finished:
            model.generation()
        small = model.export()

    At 70B parameters: the levels of all layers (9 times about 30 % of the model) lie in the CPU's memory, some 400 GB
    in bfloat16; H of an MLP of 28,672 neurons takes 3.3 GB, and its inverse as much again; a round reads the text twice
    and a generation evaluates some 130 children. The model itself must be on one device.

    Args:
        backbone: Hub id or local folder of a causal language model, or a config dict with ``model_type``.
        backbone_revision: commit, tag or branch of a Hub id.
        backbone_dtype: "float32" or "bfloat16"; layers are pruned in float32 in either.
        sparsity: which share of the heads and of the neurons goes, in (0, 1).
        rounds: how often layers are pruned around what the last search found. generations: of a search; 0 leaves every
            layer at ``sparsity``. offspring: children a generation.
        survivors: how many states are left after each stage of a generation. stage_tokens: how much text a stage
            evaluates them on.
        step: first step between levels, as a share of a layer's groups; halved every round.
        levels: at most so many a layer, odd. least_neurons: smallest step of an MLP; that of attention is one head.
        fitness: "sparse_kl" (KL from the dense model over its ``top_k`` likeliest tokens), "kl" or "ppl".
        top_k: see ``fitness``.
        error_accumulation: what later blocks see of a pruned one when they are calibrated: "weighted" (the expectation
            over its levels), "median" (level 0) or "none" (its dense weights).
        calibration_tokens: how much text layers are pruned on, and states are evaluated on parts of.
        fresh: every generation draws text anew; else all generations of a round are judged by the same.
        local: "obs", or "magnitude" (the baseline: least weights, nothing fitted again).
        damping: added to the diagonal of X^T X, as a share of its mean.
        neuron_rounds: rounds in which neurons go. head_rounds: and heads.
        offload: keep the levels, and what blocks give in calibration, in the CPU's memory.
        seed: of the search.
        authors_counts: see the module. authors_refit: see the module. authors_flips: see the module.
        authors_empty: see the module.
    Raises:
        ZooError: if the backbone does not load, is quantised, has tied or broken weights in what is pruned, or is of an
            unknown architecture; for calibration text that is too little or does not fit.
        ValueError: for a number out of range.
    Example:
        >>> model = TyrThePruner.from_variant("tiny")
        >>> model.start(torch.randint(2, 66, (8, 32))).finished
        False
    """

    perplexity: Any
    removed: Tensor
    centre: Tensor
    round: Tensor
    turn: Tensor
    history: Tensor
    monitor, mode = "val/perplexity", "min"
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {
            "backbone": {
                "model_type": "llama", "vocab_size": 66, "hidden_size": 32, "intermediate_size": 48,
                "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
                "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
            },
            "rounds": 2, "generations": 2, "offspring": 4, "survivors": [2, 1], "stage_tokens": [64, 128],
            "calibration_tokens": 256, "step": 0.25, "least_neurons": 4,
        }
    }  # fmt: skip

    def __init__(
        self,
        backbone: str | dict[str, Any] = "meta-llama/Llama-2-7b-hf",
        backbone_revision: str | None = None,
        backbone_dtype: str = "float32",
        sparsity: float = 0.5,
        rounds: int = 4,
        generations: int = 50,
        offspring: int = 128,
        survivors: list[int] = [16, 4, 2],  # noqa: B006 (read only; the command knows no tuple)
        stage_tokens: list[int] = [2048, 16384, 131072],  # noqa: B006
        step: float = 0.125,
        levels: int = 9,
        least_neurons: int = 32,
        fitness: str = "sparse_kl",
        top_k: int = 8192,
        error_accumulation: str = "weighted",
        calibration_tokens: int = 4194304,
        fresh: bool = True,
        local: str = "obs",
        damping: float = 0.01,
        neuron_rounds: int = 16,
        head_rounds: int = 1,
        offload: bool = True,
        seed: int = 0,
        authors_counts: bool = False,
        authors_refit: bool = False,
        authors_flips: bool = False,
        authors_empty: bool = False,
    ):
        super().__init__()
        self.save_hyperparameters()
        self._check()
        self.backbone = build_backbone(backbone, backbone_revision, dtype=backbone_dtype)
        self.freeze("backbone")
        layers = self.layers
        refuse_broken(layers)
        for kind in ("mlp", "attention"):
            groups = max(layer.groups for layer in layers if layer.site.kind == kind)
            if kept(groups, sparsity, authors_counts) in (0, groups):
                what = "neurons" if kind == "mlp" else "heads"
                raise ValueError(
                    f"sparsity is {sparsity}, but a layer has {groups} {what}: "
                    f"{groups - kept(groups, sparsity, authors_counts)} of them would go. At least one must go and one "
                    f"stay: give {1 / groups:.3g} to {1 - 1 / groups:.3g}."
                )
        self.register_buffer("removed", torch.zeros(len(layers), dtype=torch.long))
        self.register_buffer("centre", torch.zeros(len(layers), dtype=torch.long))
        self.register_buffer("round", torch.zeros((), dtype=torch.long))
        self.register_buffer("turn", torch.zeros((), dtype=torch.long))
        self.register_buffer("history", torch.zeros(rounds, max(generations, 1)))
        self.automatic_optimization = False
        self._search: Search | None = None
        self._interrupted: dict[str, Any] | None = None
        self.perplexity = Perplexity(ignore_index=-100)

    def _check(self) -> None:
        hp = self.hyperparameters
        if not 0 < hp["sparsity"] < 1:
            raise ValueError(f"sparsity is {hp['sparsity']}; it must lie in (0, 1).")
        for name, known in (
            ("fitness", FITNESS), ("error_accumulation", ACCUMULATIONS), ("local", ("obs", "magnitude")),
        ):  # fmt: skip
            if hp[name] not in known:
                raise ValueError(f"{name} is {hp[name]!r}; one of {', '.join(known)}.")
        stages = list(zip(hp["survivors"], hp["stage_tokens"], strict=False))
        if not stages or len(hp["survivors"]) != len(hp["stage_tokens"]) or min(map(min, stages)) < 1:
            raise ValueError(
                f"survivors is {hp['survivors']} and stage_tokens {hp['stage_tokens']}; both need one a stage, from 1."
            )
        least = {"rounds": 1, "generations": 0, "offspring": 1, "levels": 1, "least_neurons": 1, "top_k": 1}
        least |= {"calibration_tokens": 2, "neuron_rounds": 1, "head_rounds": 1}
        for name, bound in least.items():
            if hp[name] < bound:
                raise ValueError(f"{name} is {hp[name]}; at least {bound}.")
        if hp["levels"] % 2 == 0 or not 0 < hp["step"] < 1 or not hp["damping"] >= 0 or min(hp["stage_tokens"]) < 2:
            raise ValueError(
                f"levels={hp['levels']}, step={hp['step']}, damping={hp['damping']}, stage_tokens="
                f"{hp['stage_tokens']}: odd, in (0, 1), from 0, and from 2 are accepted."
            )

    # ---- the model ------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> list[Prunable]:
        """What is pruned: layer by layer the MLP's and the attention's projection."""
        return prunables(self.anatomy)

    @classmethod
    def from_backbone(cls, module: Any, **hparams: Any) -> Self:
        """Take a live causal language model of transformers, in its dtype; its weights are saved with ours."""
        dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
        model = super().from_backbone(module, **{"backbone_dtype": dtype, **hparams})
        refuse_broken(model.layers)
        return model

    def changed_weights(self) -> Collection[str]:
        """Those of the layers that are pruned."""
        pruned = {id(layer.module.weight) for layer in self.layers}
        return [name for name, p in self.backbone.named_parameters() if id(p) in pruned]

    # ---- the search -----------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether all rounds are done."""
        return int(self.round) >= self.hyperparameters["rounds"]

    def start(self, blocks: Tensor | Iterable[Tensor], at_once: int | None = None) -> Self:
        """Take calibration text, and prune every layer at every level for the first round.

        Args:
            blocks: token ids, (n, t) or several of such; only as many as ``calibration_tokens`` asks for are taken.
            at_once: sequences a forward pass; as many as the first of several have, or 8.
        Raises:
            ZooError: for no text, text that does not fit the model or is not cut into blocks of one length, or too
                little of it to prune by without damping; if the model has been pruned already.
        """
        if int(self.round) or int(self.turn) or self._search is not None:
            raise ZooError("This model is pruned, or being pruned: start from the dense one, or resume its checkpoint.")
        parts = [blocks] if isinstance(blocks, Tensor) else list(blocks)
        at_once = at_once or (len(parts[0]) if parts and not isinstance(blocks, Tensor) else 8)
        layers = self.layers
        self._begin(self._text(parts, layers), at_once, layers, [layer.weight.to("cpu", copy=True) for layer in layers])
        amount = self.hyperparameters["sparsity"]
        authors = self.hyperparameters["authors_counts"]
        goes = [layer.groups - kept(layer.groups, amount, authors) for layer in layers]
        self.centre.copy_(torch.tensor(goes))
        self.removed.copy_(self.centre)
        self._build()
        return self

    def _text(self, parts: list[Tensor], layers: list[Prunable]) -> Tensor:
        """The calibration text, as much as is asked for: (n, t)."""
        if not parts or not sum(part.numel() for part in parts):
            raise ZooError("No calibration text: the pruner needs some blocks of tokens.")
        if len({part.shape[1:] for part in parts}) > 1 or parts[0].ndim != 2 or parts[0].shape[1] < 2:
            raise ZooError(
                f"Calibration text comes in blocks of one length, from 2 tokens; these are "
                f"{', '.join(sorted({str(tuple(part.shape)) for part in parts}))}."
            )
        tokens = torch.cat([part.cpu().long() for part in parts])
        tokens = tokens[: math.ceil(self.hyperparameters["calibration_tokens"] / tokens.shape[1])]
        inputs_of(self.anatomy, tokens)
        most = max(layer.groups * layer.size for layer in layers)
        if not self.hyperparameters["damping"] and tokens.numel() < most:
            raise ZooError(
                f"{tokens.numel()} tokens do not determine a layer of {most} inputs: give more text, or damping > 0."
            )
        limit = getattr(self.backbone.config, "max_position_embeddings", None)
        if limit is not None and tokens.shape[1] > limit:
            raise ZooError(f"Blocks of {tokens.shape[1]} tokens; the model takes {limit}.")
        return tokens

    def _begin(self, tokens: Tensor, at_once: int, layers: list[Prunable], dense: list[Tensor]) -> None:
        refuse_broken(layers)
        for layer, weight in zip(layers, dense, strict=True):
            layer.dense = weight
        self._search = Search(tokens, at_once, Blocks(self.anatomy), layers)

    @property
    def _running(self) -> Search:
        if self._search is None:
            raise ZooError("No search is going on: call start(blocks of token ids) first.")
        return self._search

    def _step(self, layer: Prunable) -> int:
        """d of this round, in groups."""
        hp = self.hyperparameters
        least = hp["least_neurons"] if layer.site.kind == "mlp" else 1
        return max(least, math.floor(hp["step"] * layer.groups / 2 ** int(self.round) + 0.5))

    def _ranges(self) -> list[range]:
        """By layer the levels that it has: level 0 is where the last round left it."""
        most, found = self.hyperparameters["levels"] // 2, []
        for layer, gone in zip(self._running.layers, self.centre.tolist(), strict=True):
            d = self._step(layer)
            last = 0 if self.hyperparameters["authors_empty"] else 1
            found.append(range(-min(gone // d, most), min((layer.groups - last - gone) // d, most) + 1))
        return found

    def _build(self) -> None:
        """The supernet of this round."""
        search, hp = self._running, self.hyperparameters
        keeps = []
        for layer, gone, own in zip(search.layers, self.centre.tolist(), self._ranges(), strict=True):
            p, d = layer.groups, self._step(layer)
            keeps.append({j: kept(p, (gone + j * d) / p, hp["authors_counts"]) for j in own})
        how = LocalSettings(
            hp["local"], hp["damping"], hp["neuron_rounds"], hp["head_rounds"], hp["authors_refit"]
        )  # fmt: skip
        batches = list(search.tokens.split(search.at_once))
        build(search.blocks, search.layers, batches, keeps, how, hp["error_accumulation"], hp["offload"])
        search.loaded = [0] * len(search.layers)
        search.load(self.state)
        if not hp["generations"]:
            self._finish()

    def _finish(self) -> None:
        self.round.fill_(self.hyperparameters["rounds"])
        self._search = None

    @property
    def state(self) -> State:
        """By layer the level of this round that the search has found best so far."""
        both = zip(self._running.layers, self.removed.tolist(), self.centre.tolist(), strict=True)
        return tuple((gone - centre) // self._step(layer) for layer, gone, centre in both)

    @torch.no_grad()
    def generation(self, rng: random.Random | None = None) -> float:
        """One generation: children, their elimination, and the best takes its parent's place.

        Args:
            rng: what is drawn with; by default made of ``seed``, round and generation.
        Returns:
            its fitness; less is better
        Raises:
            ZooError: if no search is going on.
        """
        search, hp = self._running, self.hyperparameters
        where = (int(self.round), int(self.turn))
        drawn = rng or random.Random(seed_from("search", hp["seed"], *where))
        kinds = [layer.site.kind for layer in search.layers]
        ranges, parent = self._ranges(), self.state
        children = evolution.offspring(parent, hp["offspring"], ranges, kinds, drawn, hp["authors_flips"])
        lengths = [search.tokens.shape[1]] * len(search.tokens)

        def evaluate(stage: int, states: list[State]) -> list[float]:
            own = drawn if hp["fresh"] else random.Random(seed_from("text", hp["seed"], where[0], stage))
            return self._fitness(parent, states, evolution.draw_blocks(lengths, hp["stage_tokens"][stage], own))

        with evaluating(self.backbone):
            best, value = evolution.select(parent, children, hp["survivors"], evaluate)
        search.load(best)
        moved = [gone + j * self._step(layer) for layer, gone, j in zip(search.layers, self.centre, best, strict=True)]
        self.removed.copy_(torch.stack(moved))
        self.history[where] = value
        self.turn.add_(1)
        if int(self.turn) == hp["generations"]:
            self._next_round()
        return value

    def _next_round(self) -> None:
        self.round.add_(1)
        if self.finished:
            self._finish()
            return
        self.turn.zero_()
        self.centre.copy_(self.removed)
        self._build()

    # ---- fitness --------------------------------------------------------------------------------------------------

    def _fitness(self, parent: State, states: list[State], drawn: list[tuple[int, int]]) -> list[float]:
        """How far each state is from the dense model (or, by "ppl", from the text) on parts of the blocks of text."""
        search = self._running
        totals, count = torch.zeros(len(states), dtype=torch.float64), 0
        starts = [self._first_difference(parent, state) for state in states]
        for numbers, size in self._together(drawn):
            ids = search.tokens[numbers, :size].to(self.device)
            target = self._taught(numbers, size)
            search.load(parent)
            sites = {Site(i, "input") for i in starts if i is not None}
            with capture(search.blocks.anatomy, sites) as seen:
                whole = search.blocks.logits(ids)
            for i, (state, first) in enumerate(zip(states, starts, strict=True)):
                search.load(state)
                logits = whole if first is None else search.blocks.logits(ids, first, seen[Site(first, "input")])
                loss, n = self._distance(logits, ids, target)
                totals[i] += loss.double().cpu()
            count += n
        mean = totals / count
        return (mean.exp() if self.hyperparameters["fitness"] == "ppl" else mean).tolist()

    def _distance(self, logits: Tensor, ids: Tensor, target: tuple[Tensor, Tensor] | None) -> tuple[Tensor, int]:
        if target is None:
            return evolution.negative_log_likelihood(logits, ids)
        return evolution.sparse_kl(logits, *target)

    def _first_difference(self, a: State, b: State) -> int | None:
        """The first block in which two states differ."""
        every = zip(self._running.layers, a, b, strict=True)
        return next((layer.site.layer for layer, x, y in every if x != y), None)

    def _together(self, drawn: list[tuple[int, int]]) -> Iterable[tuple[list[int], int]]:
        """Blocks of one size, as many as fit into a forward pass."""
        sizes: dict[int, list[int]] = {}
        for block, size in drawn:
            sizes.setdefault(size, []).append(block)
        n = self._running.at_once
        return [(blocks[i : i + n], size) for size, blocks in sizes.items() for i in range(0, len(blocks), n)]

    def _taught(self, numbers: list[int], size: int) -> tuple[Tensor, Tensor] | None:
        """What the dense model says of blocks of text: its likeliest tokens, (b, size, k) each."""
        hp, search = self.hyperparameters, self._running
        if hp["fitness"] == "ppl":
            return None
        missing = [i for i in numbers if i not in search.taught]
        new: dict[int, tuple[Tensor, Tensor]] = {}
        if missing:
            search.load([None] * len(search.layers))
            logits = search.blocks.logits(search.tokens[missing].to(self.device))
            values, ids = evolution.top(logits, hp["top_k"] if hp["fitness"] == "sparse_kl" else logits.shape[-1])
            new = {i: (v.cpu(), k.cpu()) for i, v, k in zip(missing, values, ids, strict=True)}
        known = [new[i] if i in new else search.taught[i] for i in numbers]
        each = sum(part.numel() * part.element_size() for part in known[0])
        for i, said in new.items():
            if (len(search.taught) + 1) * each <= TEACHER_BYTES:
                search.taught[i] = said
        values, ids = (torch.stack([part[k][:size] for part in known]).to(self.device) for k in (0, 1))
        return values, ids

    # ---- Lightning ------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        if self._search is not None or self.finished:
            return
        if self._interrupted is not None:
            left, self._interrupted = self._interrupted, None
            self._begin(left["tokens"].long(), left["at_once"], self.layers, left["dense"])
            self._build()
            return
        loader: Any = self.trainer.train_dataloader
        self.start(self._enough(loader))

    def _enough(self, batches: Iterable[dict[str, Any]]) -> Iterable[Tensor]:
        """The token ids of batches, until there is as much text as is asked for.

        Raises:
            ZooError: for padded text.
        """
        left = self.hyperparameters["calibration_tokens"]
        for batch in batches:
            if "attention_mask" in batch and not bool(batch["attention_mask"].all()):
                raise ZooError("Calibration text has padding: give blocks of one length without it.")
            yield batch["input_ids"]
            left -= batch["input_ids"].numel()
            if left <= 0:
                return

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One generation; the batch itself is not used."""
        if not self.finished:
            where = int(self.round), int(self.turn)
            value = self.generation()
            log.info("round %d, generation %d: fitness %.6g", where[0] + 1, where[1] + 1, value)
            self.log("train/fitness", value, batch_size=1, prog_bar=True)
        if self.finished:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self._search is not None:
            search = self._search
            dense = [layer.dense for layer in search.layers]
            checkpoint["search"] = {"tokens": search.tokens.int(), "at_once": search.at_once, "dense": dense}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._interrupted, self._search = checkpoint.get("search"), None

    @property
    def rises(self) -> int:
        """How many generations ended worse than the one before them in their round; none with ``fresh=False``."""
        last = self.history[: int(self.round)]
        return int((last[:, 1:] > last[:, :-1] * (1 + 1e-5)).sum())  # rounding is no rise

    # ---- what comes out -------------------------------------------------------------------------------------------

    def plan(self) -> list[dict[str, list[int]]]:
        """By block which heads, key-value heads and neurons are left, see `narrow.plan`."""
        from zoo.language.compression import narrow

        layers = self.layers
        return [
            narrow.plan(attention.alive(), mlp.alive(), self.anatomy.kv_heads)
            for mlp, attention in zip(layers[::2], layers[1::2], strict=True)
        ]

    def export(self) -> nn.Module:
        """The smaller model, of transformers: sliced where its family can be, else dense with zeros.

        Key-value heads go only where all query heads that read them went.
        """
        from zoo.language.compression import narrow

        if self.backbone.config.model_type in narrow.TYPES:
            return narrow.narrowed(self.backbone, self.plan(), self.anatomy.head_width)
        log.warning("A %s model cannot be sliced: its zeros stay.", self.backbone.config.model_type)
        return copy.deepcopy(self.backbone).requires_grad_(True)

    def size(self) -> int:
        """Parameters of what `export` gives."""
        from zoo.language.compression import narrow

        if self.backbone.config.model_type not in narrow.TYPES:
            return sum(p.numel() for p in self.backbone.parameters())
        return narrow.count(narrow.narrow_config(self.backbone.config, self.plan()))

    # ---- scoring --------------------------------------------------------------------------------------------------

    def _score(self, stage: str, batch: dict[str, Any]) -> None:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
        self.perplexity.update(self(ids, mask)[:, :-1].float(), labels[:, 1:])
        self.log(f"{stage}/perplexity", self.perplexity, batch_size=len(ids), prog_bar=True)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._score("val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Beside the perplexity: the parameters of the smaller model, and how often a generation ended worse than the
        one before."""
        self._score("test", batch)
        if batch_idx == 0:
            self.log("test/parameters", float(self.size()), batch_size=len(batch["input_ids"]))
            self.log("test/rises", float(self.rises), batch_size=len(batch["input_ids"]))

    def predict(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        """Of texts (b, t), padded on the right: "nll", the mean a token in nats, and "perplexity", (b,) each."""
        logits = super().predict(input_ids, attention_mask)[:, :-1].float()
        ids = input_ids.to(logits.device)
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.to(ids.device)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        told = mask[:, 1:].float()
        nll = (loss.view_as(told) * told).sum(1) / told.sum(1).clamp(min=1)
        return {"nll": nll, "perplexity": nll.exp()}
