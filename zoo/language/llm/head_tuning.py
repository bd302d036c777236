"""Finding the heads behind a behaviour by path patching, and tuning only them: what the methods that do so share."""

import contextlib
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from zoo.core import ZooError, atomic_write
from zoo.core.seeding import seed_from
from zoo.engines.patching import (
    Anatomy,
    CausalLMModule,
    Deltas,
    Site,
    capture,
    patched,
    path_sweep,
    probability,
    receiver_sweep,
    run,
)
from zoo.engines.patching.runs import evaluating
from zoo.language.llm.languages import all_right, masked_loss
from zoo.nn.backbones import build_backbone

log = logging.getLogger(__name__)

TUNE = ("found", "random", "full", "lora", "none")


class HeadTuner(CausalLMModule):
    """A causal language model whose heads (and MLPs) are found by their effect, and alone are tuned.

    A subclass lists its hyperparameters, calls `_setup`, and scores. Before training `find` measures, on the first
    batches, how much the probability of each prompt's ``answer`` changes when one head gives what it gives on the
    counterfactual prompt, along its direct path to the logits (`zoo.engines.patching.path_sweep`):

        effect(l, h) = mean over prompts of (P_patched(answer) - P(answer)) / P(answer)

    Batches: "input_ids", "attention_mask", "labels" (b, t) to train on; "reference", "counterfactual" (b, t) and
    "answer" (b,) to find by, prompts padded on the left, with "reference_mask" (b, t) where they are padded.
    """

    effects: Tensor
    mlp_effects: Tensor
    found: Tensor
    monitor, mode = "val/accuracy", "max"
    TINY: ClassVar[dict[str, Any]] = {
        "model_type": "gpt2", "vocab_size": 28, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip

    def _setup(self, figures: Iterable[str] = ()) -> None:
        """Everything that follows from the hyperparameters; the last line of a method's ``__init__``.

        Args:
            figures: names of what is measured, each a mean that becomes an attribute.
        """
        hp = self.hyperparameters
        if hp["tune"] not in TUNE:
            raise ValueError(f"tune is {hp['tune']!r}; one of {', '.join(TUNE)}.")
        if hp["find_batches"] < 1 or not 0 <= hp["least"] < 1:
            raise ValueError(
                f"find_batches is {hp['find_batches']} and least {hp['least']}; at least 1, and in [0, 1)."
            )
        self.backbone = build_backbone(hp["backbone"], hp["backbone_revision"], dtype=hp["backbone_dtype"])
        anatomy = self.anatomy
        layers = len(anatomy.layers)
        self.register_buffer("effects", torch.zeros(layers, anatomy.heads))
        self.register_buffer("mlp_effects", torch.zeros(layers))
        self.register_buffer("found", torch.zeros((), dtype=torch.long))
        self.deltas: Deltas | None = None
        if hp["tune"] == "lora":
            from peft import LoraConfig, inject_adapter_in_model
            from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, its weight the other way round

            named = ((n.rpartition(".")[2], m) for n, m in self.backbone.named_modules())
            linear = {n: m for n, m in named if isinstance(m, nn.Linear | Conv1D)}
            del linear[anatomy.family.head.rpartition(".")[2]]
            turned = any(isinstance(m, Conv1D) for m in linear.values())
            options: dict[str, Any] = {"target_modules": sorted(linear), "fan_in_fan_out": turned}
            config = LoraConfig(r=hp["lora_rank"], lora_alpha=2 * hp["lora_rank"], **options)
            self.backbone = inject_adapter_in_model(config, self.backbone)
        elif hp["tune"] != "full":
            self.freeze("backbone")
            self.deltas = Deltas(anatomy, hp["heads"], hp["mlps"])
        for name in figures:
            setattr(self, name, MeanMetric())

    def changed_weights(self) -> Collection[str]:
        """All where all are tuned, and those of adapters."""
        names = self.backbone.state_dict()
        return names if self.hyperparameters["tune"] == "full" else [name for name in names if ".lora_" in name]

    # ---- finding ------------------------------------------------------------------------------------------------

    def score(self, answer: Tensor) -> Any:
        """What is measured of the logits: the answers' probabilities."""
        return probability(answer)

    @torch.no_grad()
    def find(self, batches: Iterable[dict[str, Tensor]]) -> Self:
        """Measure the effects on these batches, and choose the heads and MLPs with the largest.

        Prompts that the model gets wrong (with ``correct``), or whose answer has a probability below ``least``, do not
        count.

        Raises:
            ZooError: if no prompt counts.
        """
        anatomy, hp = self.anatomy, self.hyperparameters
        sites = anatomy.sites("head", "mlp")
        mean, count = self._mean_effects(
            batches, len(sites), lambda first, second, score: path_sweep(anatomy, first, second, sites, score)
        )
        heads = torch.tensor([site.kind == "head" for site in sites])
        self.effects.copy_(mean[heads].view_as(self.effects))
        self.mlp_effects.copy_(mean[~heads])
        self.found.fill_(count)
        if self.deltas is not None:
            self.deltas.choose(self.ranked(hp["heads"], hp["mlps"], hp["tune"]))
        return self

    @torch.no_grad()
    def upstream(self, batches: Iterable[dict[str, Tensor]], heads: Iterable[Site]) -> dict[Site, float]:
        """A second round: the effect of each head and MLP along the direct paths to what these heads read, their
        queries, keys and values together (`zoo.engines.patching.receiver_sweep`).

        Raises:
            ZooError: if no prompt counts, or a site is no head.
        """
        anatomy = self.anatomy
        into = [part for head in heads for part in anatomy.reads(head)]
        last = max((site.layer for site in into), default=0)
        sites = [site for site in anatomy.sites("head", "mlp") if site.layer < last]
        if not sites:
            raise ZooError("No head comes before these: they read the embedding.")
        mean, _ = self._mean_effects(
            batches, len(sites), lambda first, second, score: receiver_sweep(anatomy, first, second, sites, into, score)
        )
        return dict(zip(sites, mean.tolist(), strict=True))

    def _mean_effects(
        self, batches: Iterable[dict[str, Tensor]], sites: int, sweep: Callable[..., Tensor]
    ) -> tuple[Tensor, int]:
        """Mean relative change of the answers' score by a sweep of (prompts, counterfactual ones, score), and how many
        prompts count."""
        anatomy, hp = self.anatomy, self.hyperparameters
        total, count = torch.zeros(sites, dtype=torch.float64), 0
        for batch in batches:
            prompts = {"input_ids": batch["reference"]}
            other = {"input_ids": batch["counterfactual"]}
            if "reference_mask" in batch:
                prompts["attention_mask"] = other["attention_mask"] = batch["reference_mask"]
            answer = batch["answer"].to(self.device)
            logits = run(anatomy, prompts)
            before = self.score(answer)(logits[None])[0]
            usable = ((logits.argmax(-1) == answer) | (not hp["correct"])) & (before > hp["least"])
            if not bool(usable.any()):
                continue
            keep = usable.nonzero().flatten().cpu()
            prompts, other = ({k: v.cpu()[keep] for k, v in part.items()} for part in (prompts, other))
            after = sweep(prompts, other, self.score(answer[keep]))
            total += ((after - before[keep]) / before[keep]).sum(1).double().cpu()
            count += len(keep)
        total, count = self._everywhere(total, count)
        if not count:
            raise ZooError(
                f"No prompt is answered right with a probability above {hp['least']}: nothing to find heads by. "
                "Lower `least`, or give prompts that the model can answer."
            )
        return (total / count).float(), count

    def _everywhere(self, total: Tensor, count: int) -> tuple[Tensor, int]:
        """Sums over all processes."""
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return total, count
        both = torch.cat([total, total.new_tensor([count])]).to(self.device)
        dist.all_reduce(both)
        return both[:-1].cpu(), int(both[-1])

    def ranked(self, heads: int, mlps: int = 0, how: str = "found", draw: int = 0) -> list[Site]:
        """The heads and MLPs with the largest effects in absolute value, or with ``how="random"`` any others.

        Args:
            how: "random" takes from those that "found" would not, as far as there are enough. draw: number of the draw.
        """
        width = self.effects.shape[1]
        order = self.effects.abs().flatten().argsort(descending=True, stable=True).tolist()
        own = self.mlp_effects.abs().argsort(descending=True, stable=True).tolist()
        if how == "random":
            generator = torch.Generator().manual_seed(seed_from("random heads", draw))
            order, own = (
                [*(rest[i] for i in torch.randperm(len(rest), generator=generator).tolist()), *kept]
                for kept, rest in ((order[:heads], order[heads:]), (own[:mlps], own[mlps:]))
            )
        return [Site(i // width, "head", i % width) for i in order[:heads]] + [Site(i, "mlp") for i in own[:mlps]]

    def share_of_effects(self, heads: int) -> Tensor:
        """Which share of all heads' effects the largest ones have, a scalar."""
        sizes = self.effects.abs().flatten().sort(descending=True).values
        return sizes[:heads].sum() / sizes.sum()

    def on_train_start(self) -> None:
        if self.deltas is None or int(self.found):  # a resumed run has found them
            return
        self._find_by(self.trainer.train_dataloader)
        log.info("%s: found %s", type(self).__name__, ", ".join(map(str, self.deltas.sites)))

    def on_test_start(self) -> None:
        """Heads that training has not found are found by the test's own prompts."""
        if not int(self.found) and self.hyperparameters["tune"] in ("found", "random", "none"):
            self._find_by(self.trainer.test_dataloaders)

    def _find_by(self, loader: Any) -> None:
        self.find(itertools.islice(loader, self.hyperparameters["find_batches"]))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._score("val", batch)

    def _score(self, stage: str, batch: dict[str, Any]) -> None:
        """Log what a method measures under ``val`` and ``test``."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is scored.")

    # ---- tuning -------------------------------------------------------------------------------------------------

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (b, t, v) of token ids (b, t), with the tuned heads."""
        with self._changed():
            return self.logits(input_ids, attention_mask)

    def _changed(self) -> contextlib.AbstractContextManager[None]:
        """The backbone with its tuned heads, where it has some."""
        return contextlib.nullcontext() if self.deltas is None else self.deltas.active(self.anatomy)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        ids, labels = batch["input_ids"], batch["labels"]
        with self._changed():
            loss = masked_loss(self.backbone, ids, labels, batch["attention_mask"])
        self.log("train/loss", loss, batch_size=len(ids))
        return loss

    def configure_optimizers(self) -> Any:
        if self.hyperparameters["tune"] == "none":
            return None
        return super().configure_optimizers()

    def merged(self) -> nn.Module:
        """The backbone with the changes in its own weights, to be used without this library."""
        import copy

        model = copy.deepcopy(self.backbone)
        if self.deltas is not None:
            self.deltas.merge(Anatomy(model))
        return model

    # ---- scoring ------------------------------------------------------------------------------------------------

    def right(self, batch: dict[str, Any], prefix: str = "") -> Tensor:
        """Which sequences of a batch have all their labels predicted: (b,) bool."""
        logits = self(batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"])
        return all_right(logits, batch[f"{prefix}labels"])

    def knocked_out(self, batch: dict[str, Any], sites: list[Site], prefix: str = "") -> Tensor:
        """As `right` where these sites give their mean over the counterfactual prompts, position by position from the
        end."""
        length = batch[f"{prefix}input_ids"].shape[1]
        means = self.means(batch, sites)
        changes = {site: _from_end(mean, length) for site, mean in means.items()}
        with evaluating(self.backbone), patched(self.anatomy, changes):
            return self.right(batch, prefix)

    def means(self, batch: dict[str, Any], sites: list[Site]) -> dict[Site, Tensor]:
        """What these sites give on the counterfactual prompts, the mean over prompts, padding left out: (1, t, e)."""
        mask = batch.get("reference_mask")
        with evaluating(self.backbone), capture(self.anatomy, sites) as seen:
            self.backbone(batch["counterfactual"], attention_mask=mask, use_cache=False)
        if mask is None or bool(mask.all()):
            return {site: value.mean(0, keepdim=True) for site, value in seen.items()}
        share = (mask / mask.sum(0).clamp(min=1))[..., None]
        return {site: (value * share.to(value)).sum(0, keepdim=True) for site, value in seen.items()}

    @torch.no_grad()
    def answered(self, batch: dict[str, Any], sites: Sequence[Site] = ()) -> Tensor:
        """Which reference prompts have their answer as the most probable next token, these sites giving their mean over
        the counterfactual ones: (b,) bool. With batches of another kind than those of `find` it says whether what was
        found matters there, too."""
        prompts = {"input_ids": batch["reference"]}
        if "reference_mask" in batch:
            prompts["attention_mask"] = batch["reference_mask"]
        with patched(self.anatomy, self.means(batch, list(sites)) if sites else {}), self._changed():
            return run(self.anatomy, prompts).argmax(-1) == batch["answer"].to(self.device)

    # ---- pictures -----------------------------------------------------------------------------------------------

    def heat_map(self, path: str | Path) -> Path:
        """Draw the heads' effects, layers downwards, those that are tuned framed. Needs matplotlib (extra ``plots``).

        Raises:
            ZooError: if nothing has been found yet, or matplotlib is not installed.
        """
        if not int(self.found):
            raise ZooError("No effects to draw: find the heads first (`find`, or `fit`).")
        try:
            from matplotlib.figure import Figure
            from matplotlib.patches import Rectangle
        except ImportError as error:
            raise ZooError("Drawing effects needs matplotlib: pip install 'paper-zoo[plots]'.") from error
        layers, heads = self.effects.shape
        figure = Figure(figsize=(min(2 + 0.35 * heads, 12), min(1.4 + 0.35 * layers, 12)), layout="constrained")
        axis = figure.add_subplot()
        most = float(self.effects.abs().max()) or 1.0
        image = axis.imshow(self.effects.cpu().numpy(), cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
        tuned = [] if self.deltas is None else self.deltas.sites
        for site in tuned:
            if site.kind == "head":
                axis.add_patch(Rectangle((site.head - 0.5, site.layer - 0.5), 1, 1, fill=False, linewidth=1.5))
        axis.set(xlabel="head", ylabel="layer", title="relative change of the answer's probability")
        figure.colorbar(image)
        path = Path(path)
        with atomic_write(path) as part:
            figure.savefig(part, dpi=150, format=path.suffix.lstrip(".") or "png")
        return path


def _from_end(mean: Tensor, length: int) -> Tensor:
    """Position by position from the end, (1, t, e) -> (1, length, e): the first one repeated, or some left out."""
    t = mean.shape[1]
    if t >= length:
        return mean[:, t - length :]
    return torch.cat([mean[:, :1].expand(-1, length - t, -1), mean], 1)
