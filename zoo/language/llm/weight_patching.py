"""WeightPatching: where in its weights a specialised model carries what it learnt, and merging by what is found.

Sun, Zhang, Qin, Dai, Tian, "Weight Patching: Toward Source-Level Mechanistic Localization in LLMs", arXiv:2604.13694,
2026.

In: a base model and models specialised from it, and prompts that ask for what they learnt. Out: for each head,
attention block, MLP and layer, how much of the specialised model's inner state comes back in the base when this one
module's weights are taken over; and one model merged by these scores.

    anchor       a = (mu_S - mu_B) / |mu_S - mu_B|, means of the stream after layer L* at the prompts' last token
    weights      r_m = (<a, h_{B<-m}> - <a, h_B>) / (<a, h_S> - <a, h_B>), the base with module m's weights of S
    necessity    d_m = 1 - (<a, h_{S<-m}> - <a, h_B>) / (<a, h_S> - <a, h_B>), S with the base's module m
    activations  q_m as r_m, the base's weights but what S's module m gives
    execution    as q_m, but of the log-probability of the response rather than at L*

r, d and q are means over prompts whose denominator is not small. A module with high r is a source of the skill; one
with high q but low r aggregates what sources send; one that acts on the response only executes. L* is, of the layers
whose projections separate S from B best on validation prompts, the one where adding mu_S - mu_B to the base (steering)
raises the response's log-probability most. Modules above L* are not seen at L*: their r, d and q are 0.

    merged = base + lambda sum_k sum_m w_{k,m} (S_k - B)_m,  w_{k,m} = softmax over k of r_{k,m} / T, a mask, or learnt
    learnt: some steps down mean_k mean_x ((<a_k, h_merged(x)> - <a_k, h_{S_k}(x)>) / |mu_S - mu_B|_k)^2

No code of the authors is public: the frame (paired models, replaced weights at a fixed input, a vector as criterion) is
the abstract's, the formulas are ours. So is what follows: a layer is its attention and MLP without norms; norms,
embeddings and the projection to the vocabulary stay the base's and are named where they differ; steering is of the last
prompt token and all that follow; weights that heads share take the mean of these heads' w.

Cost: with L layers and n modules a layer, scores of b prompts take about n L / 2 runs of b prompts, and greedy joint
sets as many again for every size; a step of learning w is a forward and backward pass of the prompts up to L*, beside
a merged copy of the modules and one parameter's gradient at a time. Memory: base and experts lie on the CPU or on the
model's device; a 70B base with one expert in bfloat16 is 280 GB, and each run by an expert brings it to the device as a
whole. Of a model in shards over processes (FSDP) no module can be replaced.

Index legend: k experts, m modules, b prompts, t positions, d width of the stream, v words.
"""

import copy
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from zoo.core import ZooError, seed_from
from zoo.core.errors import nearest
from zoo.engines.patching import CausalLMModule, Site
from zoo.engines.patching.weight_sweeps import changes, outside
from zoo.engines.patching.weights import exchanged
from zoo.language.llm.anchors import answered, last_states, right, separation, steered
from zoo.language.llm.merging import dare, task_arithmetic, ties
from zoo.language.llm.module_merging import Weights, kept, learnt, merged_by, places_of, shared, towards
from zoo.language.llm.module_scores import Scorer, mean_rank, ranked, taken_over
from zoo.language.llm.pairs import refuse_strangers, same_tokenizer, tokenizer_at
from zoo.nn.backbones import build_backbone, config_of, take_weights

log = logging.getLogger(__name__)

MERGES = ("softmax", "top_p", "random", "learnt", "average", "task_arithmetic", "ties", "dare", "none")
KINDS = ("recovery", "necessity", "activation", "execution")
TINY = {
    "model_type": "gpt2", "vocab_size": 24, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


class WeightPatching(CausalLMModule):
    """Score the modules of a model by what their weights bring back of a specialised model, and merge by the scores.

    An epoch's start fits the anchors, its validation the scores and, with ``merge="learnt"``, the merging weights; all
    lie in buffers, and no parameter of a model is trained. With Hub ids or folders a checkpoint holds these alone.

    Args:
        backbone: Hub id or local folder of the base, a causal language model, or a config dict with ``model_type``.
        backbone_revision: commit, tag or branch of a Hub id. backbone_dtype: "float32" or "bfloat16".
        experts: Hub ids or folders of models specialised from it, or config dicts (random weights, saved with ours).
        expert_revisions: one for each expert, or none.
        layer: L*, from 0; -1 lets the validation prompts choose it.
        anchor_batches: training batches that anchors are fitted by, and validation batches that choose L*, at most.
        auc_slack: a layer whose area under the curve is so much below the best may still be chosen.
        strength: of steering, times mu_S - mu_B.
        least: prompts count whose denominator is at least this share of |mu_S - mu_B|.
        prefilter: share of the modules that is patched, chosen by the first-order estimate, which stands for the
            others' recovery; 1 patches all.
        scores: which scores beside recovery are computed: any of "necessity", "activation", "execution".
        joint: size of the largest joint set that is built greedily. joint_from: as many modules, those with the largest
            recovery, may enter it.
        source, aggregation: recovery, and activation's share, from which a module is called so.
        merge: "softmax" or "top_p" by the scores; "learnt" (from "softmax" on, see `learn_merge`); "random" (as many
            modules as "top_p"), "average", "task_arithmetic", "ties", "dare", or "none" (the base).
        temperature: T. top_p: share of an expert's recovery that its mask keeps. scale: lambda.
        merge_steps, merge_lr: steps and learning rate of Adam with "learnt" (ours; the paper's are not known).
        density: of TIES and DARE.
        new_tokens: length of responses that are generated where the data has none.
        rows: prompts in one pass of a sweep at most.
        seed: of random merging.
    Raises:
        ZooError: if base or experts do not load, are no pair (another architecture, vocabulary, tokenizer), are not
            finite, quantised, or of an unknown architecture.
        ValueError: for a number out of range.
    Example:
        >>> model = WeightPatching.from_variant("tiny")
        >>> model(torch.tensor([[2, 10, 3, 23]])).shape
        torch.Size([1, 4, 24])
        >>> str(model.sites[0]), len(model.sites)
        ('layers.0.head.0', 14)
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {
            "backbone": TINY, "experts": [TINY, TINY],
            "anchor_batches": 1, "joint": 2, "joint_from": 4, "new_tokens": 4,
        }
    }  # fmt: skip
    monitor, mode = "val/auc", "max"
    _means: Any
    recovery: Tensor
    necessity: Tensor
    activation: Tensor
    execution: Tensor
    anchor: Tensor
    level: Tensor
    size: Tensor
    auc: Tensor
    steering: Tensor
    curve: Tensor
    chosen: Tensor
    counted: Tensor
    fitted: Tensor
    learnt: Tensor
    steps: Tensor

    def __init__(
        self,
        backbone: str | dict[str, Any] = "meta-llama/Llama-2-7b-hf",
        backbone_revision: str | None = None,
        backbone_dtype: str = "float32",
        experts: list[str | dict[str, Any]] = ["meta-llama/Llama-2-7b-chat-hf"],  # noqa: B006 (read only)
        expert_revisions: list[str | None] = [],  # noqa: B006 (read only)
        layer: int = -1,
        anchor_batches: int = 4,
        auc_slack: float = 0.02,
        strength: float = 1.0,
        least: float = 0.1,
        prefilter: float = 1.0,
        scores: list[str] = ["necessity", "activation", "execution"],  # noqa: B006 (read only)
        joint: int = 4,
        joint_from: int = 12,
        source: float = 0.1,
        aggregation: float = 0.1,
        merge: str = "softmax",
        temperature: float = 0.05,
        top_p: float = 0.95,
        scale: float = 1.0,
        merge_steps: int = 20,
        merge_lr: float = 0.05,
        density: float = 0.2,
        new_tokens: int = 64,
        rows: int = 512,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self._check_numbers()
        self.backbone = build_backbone(backbone, backbone_revision, dtype=backbone_dtype)
        live = [build_backbone(e, dtype=backbone_dtype) for e in experts if isinstance(e, dict)]
        self.experts = nn.ModuleList(live)
        self.freeze("backbone", "experts")
        self._pairs: dict[int, nn.Module] = {}
        self._exact: dict[int, list[int]] = {}
        self._estimates: dict[int, Tensor] = {}
        anatomy = self.anatomy
        self.sites: list[Site] = anatomy.sites("head", "attention", "mlp", "residual")
        k, m, layers = len(experts), len(self.sites), len(anatomy.layers)
        if not -1 <= layer < layers:
            raise ValueError(f"layer is {layer}; -1 to choose it, or 0 to {layers - 1}.")
        for name in (*KINDS, "learnt"):
            self.register_buffer(name, torch.zeros(k, m))
        for name, shape in (("anchor", (k, anatomy.width)), ("size", (k,)), ("auc", (k, layers)),
                            ("steering", (k, layers)), ("curve", (k, joint))):  # fmt: skip
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("level", torch.full((k,), -1))
        self.register_buffer("chosen", torch.full((k, joint), -1))
        self.register_buffer("counted", torch.zeros(k, dtype=torch.long))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.long))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self._means = nn.ModuleDict({f"{what}_{i}": MeanMetric() for i in range(k) for what in TESTED})

    def _check_numbers(self) -> None:
        hp = self.hyperparameters
        if hp["merge"] not in MERGES:
            raise ValueError(
                f"merge is {hp['merge']!r}.{nearest(hp['merge'], list(MERGES))} One of {', '.join(MERGES)}."
            )
        unknown = [name for name in hp["scores"] if name not in KINDS[1:]]
        if unknown:
            raise ValueError(f"scores has {unknown[0]!r}; any of {', '.join(KINDS[1:])}.")
        for name in ("prefilter", "top_p", "density"):
            if not 0 < hp[name] <= 1:
                raise ValueError(f"{name} is {hp[name]}; it must lie in (0, 1].")
        for name in ("anchor_batches", "joint", "joint_from", "new_tokens", "rows", "merge_steps"):
            if hp[name] < 1:
                raise ValueError(f"{name} is {hp[name]}; it must be at least 1.")
        for name in ("temperature", "least", "merge_lr"):
            if hp[name] <= 0:
                raise ValueError(f"{name} is {hp[name]}; it must be above 0.")
        if not hp["experts"] or len(hp["expert_revisions"]) not in (0, len(hp["experts"])):
            raise ValueError(
                f"{len(hp['experts'])} experts and {len(hp['expert_revisions'])} expert_revisions: at least one "
                "expert, and a revision for each or none."
            )

    # ---- base and experts ---------------------------------------------------------------------------------------

    @classmethod
    def from_backbone(cls, module: nn.Module, experts: Sequence[nn.Module], **hparams: Any) -> Self:  # type: ignore[override]
        """Take a live base and live experts of transformers; their weights are saved with ours."""
        for expert in experts:
            refuse_strangers(module, expert)
        model = super().from_backbone(module, experts=[config_of(expert) for expert in experts], **hparams)
        for own, expert in zip(model.experts, experts, strict=True):
            take_weights(own, expert)
        return model

    def expert(self, k: int) -> Weights:
        """An expert's parameters by name; one that is named is read when it is needed first, and kept on the CPU.

        Raises:
            ZooError: if it is no pair of the base.
        """
        if k not in self._pairs:
            model = self._expert_model(k)
            refuse_strangers(self.backbone, model)
            self._pairs[k] = model
            moved = self.elsewhere(k)
            if moved:
                name, far = max(moved.items(), key=lambda item: item[1])
                log.warning(
                    "Expert %d: %d parameters of no module differ from the base's, %s most (by %.2g of its norm); they "
                    "are never patched nor merged.", k, len(moved), name, far,
                )  # fmt: skip
        return {name: p.detach() for name, p in self._pairs[k].named_parameters()}

    def _expert_model(self, k: int) -> nn.Module:
        hp = self.hyperparameters
        given = hp["experts"][k]
        if isinstance(given, dict):
            return self.experts[sum(isinstance(e, dict) for e in hp["experts"][:k])]
        revision = hp["expert_revisions"][k] if hp["expert_revisions"] else None
        same_tokenizer(hp["backbone"], given, (hp["backbone_revision"], revision))
        return build_backbone(given, revision, dtype=hp["backbone_dtype"])

    def elsewhere(self, k: int) -> dict[str, float]:
        """Norms, embeddings and whatever else belongs to no module and differs, by |S - B| / |B|."""
        return changes(self.backbone, self.expert(k), outside(self.anatomy))

    # ---- the anchor ---------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        if int(self.fitted):  # a resumed run has its anchors
            return
        count = self.hyperparameters["anchor_batches"]
        data: Any = self.trainer.train_dataloader
        checked: Any = self.trainer.val_dataloaders or data
        self.fit_anchors(_some(data, count), _some(checked, count))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Nothing: anchors are fitted when training starts, scores in validation."""

    def configure_optimizers(self) -> None:
        return None

    def fit_anchors(self, batches: Sequence[dict[str, Any]], validation: Sequence[dict[str, Any]]) -> Self:
        """Fit each expert's anchor by prompts, and choose its layer by others.

        Raises:
            ZooError: for an expert without prompts in either, or whose inner state is the base's.
        """
        most = max(int(batch["skill"].max()) for batch in (*batches, *validation))
        if most >= len(self.level):
            log.warning("Prompts of skill %d are left out: there are %d experts.", most, len(self.level))
        with torch.inference_mode(False), torch.no_grad():
            for k in range(len(self.hyperparameters["experts"])):
                first, second = self._own(batches, k), self._own(validation, k)
                if not first or not second:
                    raise ZooError(f"No prompt of expert {k} to fit or to validate its anchor by.")
                self._fit_anchor(k, first, second)
            self.fitted.fill_(1)
        return self

    def _fit_anchor(self, k: int, batches: list[dict[str, Any]], validation: list[dict[str, Any]]) -> None:
        pairs = [self._last(batch, k) for batch in batches]
        base, expert = (torch.cat(side, 1).mean(1) for side in zip(*pairs, strict=True))
        difference = expert - base
        size = difference.norm(dim=-1)
        if not bool(size.any()):
            raise ZooError(f"Expert {k} does on these prompts what the base does: there is nothing to locate.")
        anchors = difference / size.clamp(min=1e-12)[:, None]
        pairs = [self._last(batch, k) for batch in validation]
        seen = [torch.cat([(s * anchors[:, None]).sum(-1) for s in side], 1) for side in zip(*pairs, strict=True)]
        self.auc[k] = separation(*seen)
        strong = difference * self.hyperparameters["strength"]
        rises = [steered(self.anatomy, self._answered(batch, k), strong) for batch in validation]
        self.steering[k] = torch.stack(rises).mean(0)
        level = self.hyperparameters["layer"]
        if level < 0:
            good = self.auc[k] >= self.auc[k].max() - self.hyperparameters["auc_slack"]
            level = int(self.steering[k].masked_fill(~good, -torch.inf).argmax())
        self.level[k], self.anchor[k], self.size[k] = level, anchors[level], size[level]

    def _last(self, batch: dict[str, Any], k: int) -> tuple[Tensor, Tensor]:
        """The stream after each layer at the prompts' last token by base and expert, (layers, b, d) each."""
        with exchanged(self.backbone, self.expert(k)):
            expert = last_states(self.anatomy, batch)
        return last_states(self.anatomy, batch), expert

    def _answered(self, batch: dict[str, Any], k: int) -> dict[str, Any]:
        """The batch with responses: its own, or where there are none the expert's greedy ones."""
        if "labels" in batch:
            return batch
        with exchanged(self.backbone, self.expert(k)):
            return answered(self.backbone, batch, self.hyperparameters["new_tokens"])

    def _own(self, batches: Iterable[dict[str, Any]], k: int) -> list[dict[str, Any]]:
        """Of each batch the rows of an expert, on this device."""
        found = []
        for batch in batches:
            keep = (batch["skill"] == k).nonzero().flatten().tolist()
            if keep:
                found.append({key: _kept(value, keep, self.device) for key, value in batch.items()})
        return found

    # ---- scores -------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        k, m = self.recovery.shape
        self._sums = torch.zeros(len(KINDS), k, m, dtype=torch.float64)
        self._counts = torch.zeros(len(KINDS), k)
        self._sample: dict[int, dict[str, Any]] = {}
        self._exact.clear()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Scores of this batch's prompts, added up."""
        if self._trainer is not None and self._trainer.sanity_checking:
            return  # before training starts, and so before there are anchors
        self._need_anchors()
        for k in range(len(self.level)):
            for own in self._own([batch], k):
                self._sample.setdefault(k, own)
                for i, kind in enumerate(KINDS):
                    if kind == "recovery" or kind in self.hyperparameters["scores"]:
                        score, usable = self._scored(kind, own, k)
                        self._sums[i, k] += score[:, usable].sum(1).double().cpu()
                        self._counts[i, k] += int(usable.sum())

    def on_validation_epoch_end(self) -> None:
        """The means into the buffers, joint sets by the first batch's prompts, and what is logged."""
        mean = self._sums / self._counts.clamp(min=1)[..., None]
        for kind, value in zip(KINDS, mean, strict=True):
            getattr(self, kind).copy_(value)
        self.counted.copy_(self._counts[0])
        lost = [k for k in self._sample if not int(self.counted[k])]
        if lost:
            raise ZooError(
                f"No prompt of expert {lost[0]} moves the stream along its anchor by "
                f"least={self.hyperparameters['least']} of the mean: nothing to score modules by. Lower `least`, or "
                "give other prompts."
            )
        for k, batch in self._sample.items():
            candidates = self.ranked(k)[: self.hyperparameters["joint_from"]]
            grown = self.scorer(k).grown(batch, candidates, self.hyperparameters["joint"])
            for step, (site, share) in enumerate(grown):
                self.curve[k, step], self.chosen[k, step] = share, self.sites.index(site)
        self._sample.clear()
        trainer = self._trainer
        fitting = trainer is not None and trainer.state.fn == "fit" and not trainer.sanity_checking
        if fitting and self.hyperparameters["merge"] == "learnt":
            self.learn_merge(_some(self.trainer.train_dataloader, self.hyperparameters["anchor_batches"]))
        self.log("val/auc", self.auc[range(len(self.level)), self.level.clamp(min=0)].mean())
        self.log("val/recovery", self.recovery.max(1).values.mean())
        moved = [self.elsewhere(k).values() for k in range(len(self.level))] if int(self.fitted) else []
        self.log("val/outside", max((far for own in moved for far in own), default=0.0))
        self.log("val/joint", self.curve[:, -1].mean())

    def _scored(self, kind: str, batch: dict[str, Any], k: int) -> tuple[Tensor, Tensor]:
        if kind == "recovery":
            return self.recovery_of(batch, k)
        return getattr(self.scorer(k), kind)(self._answered(batch, k) if kind == "execution" else batch)

    def _need_anchors(self) -> None:
        if not int(self.fitted):
            raise ZooError("No anchor is fitted: run `fit` first, or `fit_anchors`, or load a fitted checkpoint.")

    def scorer(self, k: int) -> Scorer:
        """What scores modules for an expert, by its fitted anchor."""
        hp = self.hyperparameters
        return Scorer(
            self.anatomy, self.sites, self.expert(k), self.anchor[k], int(self.level[k]), self.size[k], hp["least"],
            hp["rows"],
        )  # fmt: skip

    def recovery_of(self, batch: dict[str, Any], k: int) -> tuple[Tensor, Tensor]:
        """r of modules for each prompt of an expert, (m, b), and which prompts count, (b,).

        With ``prefilter`` below 1 only modules with the largest first-order estimates, by the first batch, are patched;
        the others' r is the estimate.
        """
        one = self.scorer(k)
        if self.hyperparameters["prefilter"] >= 1:
            return one.recovery(batch)
        if k not in self._exact:
            self._estimates[k] = estimate = one.estimated(batch)
            count = max(1, round(self.hyperparameters["prefilter"] * len(self.sites)))
            self._exact[k] = sorted(estimate.abs().argsort(descending=True, stable=True)[:count].tolist())
        exact, usable = one.recovery(batch, [self.sites[i] for i in self._exact[k]])
        found = self._estimates[k][:, None].to(exact).repeat(1, exact.shape[1])
        found[self._exact[k]] = exact
        return found, usable

    # ---- what was found -----------------------------------------------------------------------------------------

    def joint_set(self, k: int) -> list[tuple[Site, float]]:
        """The greedy set in the order of its growth, with the recovery up to each."""
        pairs = zip(self.chosen[k].tolist(), self.curve[k].tolist(), strict=True)
        return [(self.sites[i], share) for i, share in pairs if i >= 0]

    def ranked(self, k: int, by: str = "recovery") -> list[Site]:
        """Heads and MLPs, the largest score first."""
        return ranked(getattr(self, by)[k], self.sites)

    def rank(self, k: int, sites: Iterable[Site | str], by: str = "recovery") -> float:
        """Mean rank of heads and MLPs among all of them, from 1; among equals the mean of their places."""
        return mean_rank(getattr(self, by)[k], self.sites, [self.anatomy.site(site) for site in sites])

    def stages(self, k: int) -> dict[Site, str]:
        """Each module's stage: "source", "aggregation", "execution", or "none"."""
        found = {}
        for i, site in enumerate(self.sites):
            if float(self.recovery[k, i]) >= self.hyperparameters["source"]:
                found[site] = "source"
            elif float(self.activation[k, i]) >= self.hyperparameters["aggregation"]:
                found[site] = "aggregation"
            else:
                late = float(self.execution[k, i]) >= self.hyperparameters["aggregation"]
                found[site] = "execution" if late and site.layer > int(self.level[k]) else "none"
        return found

    # ---- merging ------------------------------------------------------------------------------------------------

    def merge_weights(self, how: str | None = None) -> Tensor:
        """w of each expert and module, (k, m): by "softmax", "top_p", "random" (a mask of as many modules) or "learnt".

        By "softmax" experts share what no score tells apart, such as modules above L*.

        Raises:
            ZooError: if none are learnt.
        """
        hp, how = self.hyperparameters, how or self.hyperparameters["merge"]
        if how == "softmax":
            return shared(self.recovery, hp["temperature"])
        if how == "learnt":
            if not int(self.steps):
                raise ZooError("No merging weights are learnt: `fit` with merge='learnt', or call `learn_merge`.")
            return self.learnt.clone()
        small = torch.tensor([site.kind in ("head", "mlp") for site in self.sites], device=self.recovery.device)
        generator = torch.Generator().manual_seed(seed_from("random mask", hp["seed"])) if how == "random" else None
        return kept(self.recovery, small, hp["top_p"], generator)

    def learn_merge(self, batches: Sequence[dict[str, Any]]) -> Tensor:
        """Fit merging weights by a few steps on the anchor loss; returns it before each step, (steps,).

            L = mean_k mean_x ((<a_k, h_merged(x)> - <a_k, h_{S_k}(x)>) / |mu_S - mu_B|_k)^2

        Each expert's part of the merged model's state is to be the expert's own, at L*, on the expert's prompts. The
        weights start as those of "softmax"; those of modules above L* stay.

        Args:
            batches: prompts, such as those that anchors are fitted by.
        Raises:
            ZooError: if no anchor is fitted, or there is no prompt.
        """
        self._need_anchors()
        hp, experts = self.hyperparameters, range(len(self.level))
        with torch.inference_mode(False):
            given = {k: own for k in experts if (own := self._own(batches, k))}
            if not given:
                raise ZooError("No prompt of any expert to learn merging weights by.")
            count = {k: len(given) * sum(len(batch["skill"]) for batch in own) for k, own in given.items()}
            aims = [towards(self.scorer(k), batch, 1 / count[k]) for k, own in given.items() for batch in own]
            weights, losses = learnt(
                self.anatomy, [self.expert(k) for k in experts], places_of(self.anatomy, self.sites),
                self.merge_weights("softmax"), aims, hp["merge_steps"], hp["merge_lr"], hp["scale"],
            )  # fmt: skip
        self.learnt.copy_(weights)
        self.steps.fill_(len(losses))
        log.info("merging weights: loss %.4g before the first and %.4g before the last step", losses[0], losses[-1])
        return losses

    @torch.no_grad()
    def merged_weights(self, how: str | None = None) -> Weights:
        """The parameters that a merge changes, by name, on the base's device."""
        how = how or self.hyperparameters["merge"]
        if how == "none":
            return {}
        own = {name: p.detach() for name, p in self.backbone.named_parameters()}
        scale, density = self.hyperparameters["scale"], self.hyperparameters["density"]
        if how in ("softmax", "top_p", "random", "learnt"):
            every = [self.expert(k) for k in range(len(self.level))]
            return merged_by(own, every, places_of(self.anatomy, self.sites), self.merge_weights(how), scale)
        inside = own.keys() - set(outside(self.anatomy))
        base = {name: own[name] for name in own if name in inside}
        experts = [{n: self.expert(k)[n].detach().to(base[n]) for n in base} for k in range(len(self.level))]
        if how == "ties":
            return ties(base, experts, density, scale)
        if how == "dare":
            generator = torch.Generator().manual_seed(seed_from("dare", self.hyperparameters["seed"]))
            return dare(base, experts, density, scale, generator)
        return task_arithmetic(base, experts, scale / len(experts) if how == "average" else scale)

    def merged(self, how: str | None = None) -> nn.Module:
        """The merged model, of transformers, to be used without this library."""
        weights = self.merged_weights(how)
        model = copy.deepcopy(self.backbone)
        for name, p in model.named_parameters():
            if name in weights:
                p.data = weights[name].clone()
        return model

    def save_merged(self, folder: str | Path, how: str | None = None) -> Path:
        """Save the merged model, with the base's tokenizer where there is one; returns the folder.

        Raises:
            ZooError: if something other than a folder is there.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ZooError(f"{folder} is a file; give a folder to save the merged model in.")
        self.merged(how).save_pretrained(folder)  # type: ignore[operator]
        tokenizer = tokenizer_at(self.hyperparameters["backbone"], self.hyperparameters["backbone_revision"])
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return folder

    # ---- tests --------------------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        self._need_anchors()
        self._merged = self.merged_weights()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """What prompts get right from the base, from the base with its joint set, and from the merged model."""
        for k in range(len(self.level)):
            for own in self._own([batch], k):
                top = self.ranked(k)[: len(own["truth"][0].split()) if "truth" in own else 2]
                found: dict[str, Any] = {"accuracy_base": self.right(own)}
                one = self.scorer(k)
                found["joint_recovery"] = torch.tensor([one.joint(own, top)] * len(own["skill"]))
                with taken_over(one, top):
                    found["accuracy_patched"] = self.right(own)
                with exchanged(self.backbone, self.expert(k)):
                    found["accuracy_expert"] = self.right(own)
                with exchanged(self.backbone, self._merged):
                    found["accuracy"] = self.right(own)
                if "truth" in own:
                    found |= {name: torch.tensor([value]) for name, value in self._located(own, k).items()}
                for name, value in found.items():
                    self._means[f"{name}_{k}"].update(value.float().to(self.device))

    def _located(self, batch: dict[str, Any], k: int) -> dict[str, float]:
        """Where the true modules stand by weights and by activations."""
        truth = batch["truth"][0].split()
        rank, other = self.rank(k, truth), self.rank(k, truth, "activation")
        top = {str(site) for site in self.ranked(k)[: len(truth)]}
        return {"rank": rank, "activation_rank": other, "rank_gain": other - rank, "found": float(top == set(truth))}

    def on_test_epoch_end(self) -> None:
        experts = range(len(self.level))
        for name in TESTED:
            values = [self._means[f"{name}_{k}"] for k in experts]
            seen = [float(value.compute()) for value in values if value.update_count]
            if seen:
                self.log(f"test/{name}", sum(seen) / len(seen))
                if name.startswith("accuracy"):
                    self.log(f"test/{name.replace('accuracy', 'worst')}", min(seen))
            for value in values:
                value.reset()

    def right(self, batch: dict[str, Any]) -> Tensor:
        """Which prompts (b,) the backbone as it is answers right: by "labels" all tokens, by "judge" all constraints.

        Raises:
            ZooError: if the batch has neither.
        """
        return right(self.backbone, batch, self.hyperparameters["new_tokens"])

    # ---- prediction ---------------------------------------------------------------------------------------------

    def predict(  # type: ignore[override]
        self, prompt: Tensor, prompt_mask: Tensor | None = None, skill: Tensor | None = None
    ) -> dict[str, Any]:
        """Each module's recovery at each prompt.

        Args:
            prompt: token ids (b, t), padded on the left. skill: the number of each prompt's expert (b,); 0 for None.
        Returns:
            "recovery" (b, m), by `sites`, 0 where the prompt does not count; "base", "expert" (b,), projections on the
            anchor; "best", list of the names of the heads or MLPs with the largest recovery.
        Raises:
            ZooError: if no anchor is fitted.
            ValueError: for the number of no expert.
        """
        b = len(prompt)
        skill = torch.zeros(b, dtype=torch.long) if skill is None else skill.cpu()
        if b and (int(skill.min()) < 0 or int(skill.max()) >= len(self.level)):
            raise ValueError(f"skill is {skill.tolist()[:8]}; there are experts 0 to {len(self.level) - 1}.")
        self._need_anchors()
        mask = torch.ones_like(prompt) if prompt_mask is None else prompt_mask
        with torch.inference_mode(False), torch.no_grad():
            found: dict[str, Any] = {"recovery": torch.zeros(b, len(self.sites))}
            found |= {"base": torch.zeros(b), "expert": torch.zeros(b)}
            for k in skill.unique().tolist():
                rows = (skill == k).nonzero().flatten()
                own = {"prompt": prompt.cpu()[rows].to(self.device), "prompt_mask": mask.cpu()[rows].to(self.device)}
                base, expert, usable = self.scorer(k).ends(own)
                recovery, _ = self.scorer(k).recovery(own)
                found["recovery"][rows] = (recovery * usable).T.float().cpu()
                found["base"][rows], found["expert"][rows] = base.float().cpu(), expert.float().cpu()
        small = torch.tensor([site.kind in ("head", "mlp") for site in self.sites])
        best = found["recovery"].masked_fill(~small, -torch.inf).argmax(1).tolist()
        return {**found, "best": [str(self.sites[i]) for i in best]}

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return {"name": batch["name"], **self.predict(batch["prompt"], batch["prompt_mask"], batch["skill"])}


TESTED = (
    "accuracy", "accuracy_base", "accuracy_expert", "accuracy_patched", "joint_recovery", "rank", "activation_rank",
    "rank_gain", "found",
)  # fmt: skip
"""What is measured of each expert; of accuracies the mean over experts is logged, and the worst."""


def _some(loader: Iterable[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The first batches."""
    return [batch for _, batch in zip(range(count), loader, strict=False)]


def _kept(value: Any, rows: list[int], device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value[torch.tensor(rows, device=value.device)].to(device)
    return [value[i] for i in rows]
