"""SubmoduleTaskArithmetic: fine-tuned language models merged submodule by submodule, with weights in closed form.

"Leveraging Submodule Linearity Enhances Task Arithmetic Performance in LLMs", ICLR 2025, arXiv:2504.10902.

In: a base theta_0, experts theta_1 ... theta_T that were fine-tuned from it, a few dozen texts of each one's task. Out:
one model of all tasks. Nothing is trained and no value is searched. Each submodule f (a block, an attention, an MLP, a
head) answers almost linearly to its parameters, more so than the whole model; with g_i(x) = f(x; theta_i) -
f(x; theta_0), and x what enters f in expert t on its own texts, its merging weights are

    argmin_a sum_t E_t |sum_i a_i g_i(x) - g_t(x)|^2        (T equations with T unknowns)

and its parameters theta_0 + sum_i a_i (theta_i - theta_0).

No code of the authors is public. Ours are: norms, embeddings, last norm and projection to the vocabulary get weights of
their own in the same way; every position of a text counts, texts alike; heads that share keys and values are one.

`merge_folders` does the same from folder to folder with one section of each model in memory (`shards`, `submodules`).
A text passes once through its own expert, and each submodule answers it T + 1 times, and ``points`` times more where
the non-linearity is measured. For four experts of 70 billion parameters in bfloat16: 700 GB are read once and 140 GB
written, the largest section (a block, 0.86 billion parameters, five times in float32) takes 17 GB.
"""

import json
import logging
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from zoo.core import ZooError
from zoo.core.errors import nearest
from zoo.core.files import atomic_folder
from zoo.engines.patching import Anatomy, CausalLMModule
from zoo.language.llm.languages import all_right
from zoo.language.llm.merging import dare, task_arithmetic, ties
from zoo.language.llm.shards import (
    Held,
    Shaken,
    Shards,
    Source,
    Writer,
    check_experts,
    copy_beside,
    found,
    without_weights,
)
from zoo.language.llm.submodules import Calibration, Layout, Section, State, Texts, merged, positions_for, read
from zoo.nn.backbones import build_backbone

log = logging.getLogger(__name__)

MERGES = ("closed", "arithmetic", "average", "ties", "dare", "none")
ALPHAS = [k / 10 for k in range(1, 16)]
"""Tried on the validation texts where ``alpha`` is None."""


class SubmoduleTaskArithmetic(CausalLMModule):
    """Merge fine-tuned models of one base, each submodule with its own closed-form weights.

    ``fit`` passes the calibration texts through the experts once (one epoch; a step is a batch of texts, no gradients),
    then merges; ``merge`` also offers the methods that this one is compared with. Experts are read layer by layer and
    never held whole (by those other methods they are). A checkpoint holds the merged model; `save_merged` writes it for
    use without this library.

    Batches: "input_ids", "attention_mask", "labels" (b, t), -100 where nothing is scored, and "task", list of str.

    Args:
        backbone: the base: Hub id or local folder of a causal language model, or a config dict with ``model_type``.
        backbone_revision: commit, tag or branch of a Hub id.
        backbone_dtype: of the merged model, "float32" or "bfloat16"; weights are computed in float32 in either.
        tasks: their names, as the batches have them.
        experts: one for each task, in order: Hub id (``ORG/NAME@REVISION``) or local folder. A number stands for the
            base with noise of this seed, to try things out.
        merge: "closed" (this method), "arithmetic" (one weight for all), "average", "ties", "dare", or "none".
        level: what gets weights of its own: "model", "layer", "attention_mlp" or "head".
        alpha: weight of the task vectors with "arithmetic", "ties" and "dare"; None takes the best on the validation
            texts.
        density: share of a task vector that "ties" and "dare" keep.
        normalise: let all tasks count alike, however far their experts are from the base.
        tikhonov: added to the equations' diagonal, times its mean.
        points: at how many a in (0, 1) the non-linearity of each part is measured; 0 leaves it out.
        new_tokens: to answer with in `predict`.
    Raises:
        ZooError: if the backbone does not load or is of an unknown architecture.
        ValueError: for an unknown merge or level, or numbers out of range.
    Example:
        >>> model = SubmoduleTaskArithmetic.from_variant("tiny")
        >>> model(torch.tensor([[2, 5, 3, 4]])).shape
        torch.Size([1, 4, 33])
    """

    weights: Tensor
    nonlinearity: Tensor
    monitor, mode = "val/accuracy", "max"
    adds_up = True
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {
            "backbone": {
                "model_type": "llama", "vocab_size": 33, "hidden_size": 16, "intermediate_size": 32,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
            },
            "tasks": ["copy", "reverse", "shift"],
            "experts": [1, 2, 3],
            "new_tokens": 6,
        }
    }  # fmt: skip

    def __init__(
        self,
        backbone: str | dict[str, Any] = "meta-llama/Llama-2-7b-hf",
        backbone_revision: str | None = None,
        backbone_dtype: str = "float32",
        tasks: list[str] = ["mathematics", "coding", "translation"],  # noqa: B006 (read only; the command knows no tuple)
        experts: list[str | int] = [],  # noqa: B006
        merge: str = "closed",
        level: str = "attention_mlp",
        alpha: float | None = None,
        density: float = 0.2,
        normalise: bool = False,
        tikhonov: float = 1e-6,
        points: int = 3,
        new_tokens: int = 64,
    ):
        super().__init__()
        self.save_hyperparameters()
        if merge not in MERGES:
            raise ValueError(f"merge is {merge!r}; one of {', '.join(MERGES)}.")
        if not tasks or len(set(tasks)) != len(tasks) or len(experts) not in (0, len(tasks)):
            raise ValueError(f"{len(experts)} experts for tasks {tasks}; one for each, and each task once.")
        if tikhonov < 0 or points < 0 or new_tokens < 1 or not 0 < density <= 1:
            raise ValueError(
                f"tikhonov={tikhonov}, points={points}, new_tokens={new_tokens}, density={density}: out of range."
            )
        self.automatic_optimization = False
        self._tasks = {task: i for i, task in enumerate(tasks)}
        self.backbone = build_backbone(backbone, backbone_revision, dtype=backbone_dtype)
        self.freeze("backbone")
        self.layout = Layout(Anatomy(self.backbone), level)
        self.register_buffer("weights", torch.zeros(len(self.layout.parts), len(tasks)))
        self.register_buffer("nonlinearity", torch.zeros(len(tasks)))
        self.calibration = Calibration(self.layout, len(tasks), points)
        self.accuracy = nn.ModuleList(MeanMetric() for _ in tasks)
        self.loss = nn.ModuleList(MeanMetric() for _ in tasks)
        self._models: list[Source] = []
        self._given: list[Source] = []
        self._base: State = {}
        self._merged = False

    @classmethod
    def from_backbone(  # type: ignore[override]
        cls, module: nn.Module, experts: Sequence[Any] = (), **hparams: Any
    ) -> Self:
        """Take a live causal language model of transformers as the base; its weights are saved with ours.

        Args:
            experts: live models, in the order of ``tasks``; else ``experts=[...]`` of their places.
        """
        live = [e for e in experts if isinstance(e, nn.Module)]
        model = super().from_backbone(module, **({} if live else {"experts": list(experts)}), **hparams)
        model._given = [Held(dict(e.named_parameters()), f"expert {i}") for i, e in enumerate(live)]
        return model

    def changed_weights(self) -> Collection[str]:
        """All: whoever has the merged model needs neither base nor experts."""
        return self.backbone.state_dict()

    # ---- the models ---------------------------------------------------------------------------------------------

    @property
    def models(self) -> list[Source]:
        """The base and the experts, to be read from; checked once.

        Raises:
            ZooError: for experts that are not there, or do not fit the base.
        """
        if not self._models:
            hp = self.hyperparameters
            base: Source
            if isinstance(hp["backbone"], str):
                base = source(hp["backbone"], hp["backbone_revision"], self.backbone)
            else:  # fit merges into the backbone: this is what it was
                own = {n: p.detach().clone() for n, p in self.backbone.named_parameters()}
                base = Held(self._base or own, "the base")
            experts = self._given or [
                Shaken(base, e) if isinstance(e, int) else source(e, None, self.backbone) for e in hp["experts"]
            ]
            if len(experts) != len(hp["tasks"]):
                raise ZooError(
                    f"No experts to merge for {', '.join(hp['tasks'])}: give `experts`, a folder or Hub id for each."
                )
            check_experts(base, experts, self.layout.shapes)
            self._models = [base, *experts]
        return self._models

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        own = self.calibration
        checkpoint["calibration"] = {"gram": own.gram, "bent": own.bent, "count": own.count}
        if self._models and not isinstance(self.hyperparameters["backbone"], str):
            checkpoint["base"] = self._models[0].parameters  # type: ignore[union-attr]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        for name, value in checkpoint.get("calibration", {}).items():
            setattr(self.calibration, name, value)
        self._base, self._models = checkpoint.get("base", {}), []

    # ---- calibration --------------------------------------------------------------------------------------------

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (b, t, v) of token ids (b, t); padding on the left changes nothing."""
        places = {} if attention_mask is None else positions_for(self.backbone, attention_mask)
        return self.logits(input_ids, attention_mask, **places)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Pass the texts through their experts, and add up how each part answers."""
        self._merged = False
        if self.hyperparameters["merge"] != "closed":
            return
        texts = by_task(batch, self.hyperparameters["tasks"], batch["input_ids"].device)
        kind = batch["input_ids"].device.type
        # the difference of two models is noise in bfloat16
        with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
            self.calibration.measure(texts, self.models)

    def configure_optimizers(self) -> None:
        """None: nothing is trained."""

    def on_validation_start(self) -> None:
        """While fitting, the merge by the texts so far is validated, once there are some of every task."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking and not self._merged:
            seen = _summed(self.calibration.count, self.device)
            if self.hyperparameters["merge"] != "closed" or bool(seen.all()):
                self.solve()

    def on_train_epoch_end(self) -> None:
        """Without a validation this is where the models are merged."""
        if not self._merged:
            self.solve()
        for name, value in zip(self.hyperparameters["tasks"], self.nonlinearity, strict=True):
            if self.hyperparameters["merge"] == "closed" and self.hyperparameters["points"]:
                self.log(f"train/nonlinearity_{name}", value)

    @torch.no_grad()
    def solve(self) -> Self:
        """Merge the models into the backbone, by the texts seen so far.

        Raises:
            ZooError: if a task had no text.
        """
        hp = self.hyperparameters
        self._merged = True
        if hp["merge"] == "none":
            return self
        if hp["merge"] == "closed":
            whole = self._everywhere()
            self.weights.copy_(whole.weights(hp["normalise"], hp["tikhonov"]))
            self.nonlinearity.copy_(whole.nonlinearity())
            for section in self.layout.sections:
                states = read(section.names, self.models, self.device)
                self._take(merged(self.layout, section, states, self.weights.double()))
            return self
        base, *experts = read(list(self.layout.shapes), self.models, "cpu")
        direction = self._direction(base, experts)
        alpha = 1 / len(experts) if hp["merge"] == "average" else hp["alpha"]
        alpha = self._best(base, direction) if alpha is None else alpha
        self.weights.fill_(alpha)
        self._take(task_arithmetic(base, [direction], alpha))
        return self

    def _take(self, values: State) -> None:
        parameters = dict(self.backbone.named_parameters())
        for name, value in values.items():
            parameters[name].copy_(value)

    def _direction(self, base: State, experts: list[State]) -> State:
        """The merge with a weight of one; others are on the line from the base through it."""
        hp = self.hyperparameters
        if hp["merge"] == "ties":
            return ties(base, experts, hp["density"])
        if hp["merge"] == "dare":
            return dare(base, experts, hp["density"], generator=torch.Generator().manual_seed(0))
        return task_arithmetic(base, experts, 1.0)

    def _best(self, base: State, direction: State) -> float:
        """The weight with the best mean accuracy over tasks on the validation texts, the smallest of equals."""
        data = getattr(self.trainer, "datamodule", None)
        loader = data.val_dataloader() if data is not None else self.trainer.val_dataloaders
        if not loader:
            raise ZooError("No validation texts to choose alpha by: give `alpha`.")
        scores = []
        for alpha in ALPHAS:
            self._take(task_arithmetic(base, [direction], alpha))
            right = torch.zeros(len(self.accuracy), 2, device=self.device)
            for batch in loader:
                moved = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                hits = all_right(self._logits(moved), moved["labels"]).float()
                for task, value in zip(moved["task"], hits, strict=True):
                    right[self._tasks[task]] += torch.stack([value, torch.ones_like(value)])
            right = _summed(right, self.device)
            scores.append(float((right[:, 0] / right[:, 1].clamp(min=1)).mean()))
        return ALPHAS[max(range(len(scores)), key=lambda i: scores[i])]

    def _everywhere(self) -> Calibration:
        """The sums of all processes."""
        own = self.calibration
        whole = Calibration(self.layout, own.tasks)
        for name in ("gram", "bent", "count"):
            setattr(whole, name, _summed(getattr(own, name), self.device))
        return whole

    def table(self) -> dict[str, dict[str, float]]:
        """The merging weights of each part, by task."""
        return table(self.layout, self.weights, self.hyperparameters["tasks"])

    def save_merged(self, folder: str | Path) -> Path:
        """Write the merged model as transformers saves one, with the base's tokenizer, all or nothing.

        Raises:
            ZooError: if the folder cannot be written.
        """
        folder, name = Path(folder), self.hyperparameters["backbone"]
        with atomic_folder(folder) as part:
            self.backbone.save_pretrained(part)
            if isinstance(name, str):
                revision = self.hyperparameters["backbone_revision"]
                copy_beside(found(f"{name}@{revision}" if revision else name), part)
        return folder

    # ---- scoring ------------------------------------------------------------------------------------------------

    def _logits(self, batch: dict[str, Any]) -> Tensor:
        return self(batch["input_ids"], batch["attention_mask"])

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._score(batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._score(batch)

    def _score(self, batch: dict[str, Any]) -> None:
        """By task: how many answers are right in every token, and the loss of a text's labelled tokens."""
        logits, labels = self._logits(batch).float(), batch["labels"]
        right = all_right(logits, labels)
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
        losses = losses.sum(1) / (labels[:, 1:] != -100).sum(1).clamp(min=1)
        for task, hit, loss in zip(batch["task"], right.float(), losses, strict=True):
            self.accuracy[self._tasks[task]].update(hit)  # type: ignore[operator]
            self.loss[self._tasks[task]].update(loss)  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        self._log("val")

    def on_test_epoch_end(self) -> None:
        self._log("test")

    def _log(self, stage: str) -> None:
        """Each task's figures, and the means over tasks."""
        for kind, metrics in (("accuracy", self.accuracy), ("loss", self.loss)):
            every = {
                task: metric.compute()  # type: ignore[operator]
                for task, metric in zip(self.hyperparameters["tasks"], metrics, strict=True)
            }
            known = {task: value for task, value in every.items() if not value.isnan()}  # a task without texts has none
            for task, value in known.items():
                self.log(f"{stage}/{kind}_{task}", value)
            self.log(f"{stage}/{kind}", torch.stack(list(known.values())).mean(), prog_bar=kind == "accuracy")
            for metric in metrics:
                metric.reset()  # type: ignore[operator]

    @torch.no_grad()
    def predict(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        """The most probable answers to prompts (b, t), padded on the left: "tokens" (b, new_tokens), padded at the end.

        Raises:
            ZooError: if a prompt and its answer are longer than the model's positions.
        """
        count, config = self.hyperparameters["new_tokens"], self.backbone.config
        if input_ids.shape[1] + count > config.max_position_embeddings:
            raise ZooError(
                f"A prompt of {input_ids.shape[1]} tokens and new_tokens={count} are more than the model's "
                f"{config.max_position_embeddings} positions."
            )
        pad = next((i for i in (config.pad_token_id, config.eos_token_id) if isinstance(i, int)), 0)
        ids = input_ids.to(self.device)
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.to(self.device)
        training = self.backbone.training
        self.backbone.eval()
        try:
            made = self.backbone.generate(
                ids, attention_mask=mask, max_new_tokens=count, do_sample=False, num_beams=1, pad_token_id=pad
            )[:, ids.shape[1] :]
        finally:
            self.backbone.train(training)
        return {"tokens": F.pad(made, (0, count - made.shape[1]), value=pad)}


# ---- from folder to folder ------------------------------------------------------------------------------------------


@torch.no_grad()
def merge_folders(
    base: str | Path,
    experts: dict[str, str | Path],
    texts: Iterable[dict[str, Any]],
    folder: str | Path,
    level: str = "attention_mlp",
    normalise: bool = False,
    tikhonov: float = 1e-6,
    points: int = 0,
    device: str = "cpu",
) -> dict[str, dict[str, float]]:
    """Merge saved models into a new folder with one section of each in memory.

    Beside the model, in the base's dtype, stands ``merging.json``: the weights of each part and, with ``points``, the
    non-linearity.

    Args:
        base, experts: folders or Hub ids, experts by task.
        texts: batches of "input_ids", "attention_mask" and "task", as those of `ModelMergeDataModule`. All are kept,
            with one hidden state for each position.
        level, normalise, tikhonov, points: see `SubmoduleTaskArithmetic`. device: that computes.
    Returns:
        the weights, by part and task.
    Raises:
        ZooError: for models that do not fit each other, no texts, or a folder that cannot be written.
    """
    from transformers import AutoConfig

    place = found(base)
    skeleton = without_weights(AutoConfig.from_pretrained(place))
    for module in skeleton.modules():  # the parameters stay on the meta device
        for name, value in module._buffers.items():
            module._buffers[name] = value if value is None else value.to(device)
    layout, tasks = Layout(Anatomy(skeleton), level), list(experts)
    models = [source(one, None, skeleton) for one in (base, *experts.values())]
    check_experts(models[0], models[1:], layout.shapes)
    calibration = Calibration(layout, len(tasks), points)
    rows = [row for batch in texts for row in by_task(batch, tasks, device)]
    if not rows:
        raise ZooError("No calibration texts: give some of every task that is merged.")
    with atomic_folder(folder) as part:
        writer = Writer(part, place)

        def write(section: Section, states: list[State]) -> None:
            weights = calibration.weights(normalise, tikhonov)
            values = merged(layout, section, states, weights)
            writer.write({name: value.to(models[0].dtype(name)) for name, value in values.items()})

        if level == "model":  # its weights are known only at the end
            calibration.measure(rows, models)
            for section in layout.sections:
                write(section, read(section.names, models, device))
        else:
            calibration.measure(rows, models, write)
        writer.close()
        weights = table(layout, calibration.weights(normalise, tikhonov), tasks)
        content: dict[str, Any] = {"level": level, "weights": weights}
        if points:
            content["nonlinearity"] = dict(zip(tasks, calibration.nonlinearity().tolist(), strict=True))
        (part / "merging.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return weights


def by_task(batch: dict[str, Any], tasks: Sequence[str], device: Any) -> list[Texts]:
    """A batch of several tasks' texts as those of each.

    Raises:
        ZooError: for a task that is not merged.
    """
    rows: dict[int, list[int]] = {}
    for i, task in enumerate(batch["task"]):
        if task not in tasks:
            raise ZooError(f"No task {task!r} here.{nearest(task, list(tasks))} Merged are {', '.join(tasks)}.")
        rows.setdefault(tasks.index(task), []).append(i)
    ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    return [Texts(task, ids[own], mask[own]) for task, own in sorted(rows.items())]


def table(layout: Layout, weights: Tensor, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Merging weights (parts, T) by part and task."""
    pairs = zip(layout.parts, weights.tolist(), strict=True)
    return {part.name: dict(zip(tasks, row, strict=True)) for part, row in pairs}


def source(place: str | Path, revision: str | None, model: nn.Module) -> Shards:
    """A saved model of the same class as this one, to be read from."""
    pinned = f"{place}@{revision}" if revision else place
    return Shards(pinned, f"{getattr(model, 'base_model_prefix', '')}.")


def _summed(value: Tensor, device: Any) -> Tensor:
    """The sum over all processes, which talk from this device."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return value
    whole = value.detach().clone().to(device)
    dist.all_reduce(whole)
    return whole.to(value.device)
