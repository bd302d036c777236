"""O3: a language model that forgets request after request, without retained data, and only where it is asked about it.

Paper: Chongyang Gao, Lixu Wang, Kaize Ding, Chenkai Weng, Xiao Wang, Qi Zhu, "On Large Language Model Continual
Unlearning" (first "Practical Unlearning for Large Language Models"), ICLR 2025, arXiv:2407.10223. Code by the authors:
https://github.com/GCYZSL/O3-LLM-UNLEARNING, no licence stated.

In: a causal language model, and requests one after the other, each a set of questions whose answers are to be unknown.
Out: the same model with one LoRA adapter beside it, and for each prompt a weight w with which that adapter is loaded.

    A  detector    an encoder learns what the request's prompts look like  (`zoo.language.unlearning.ood_detector`)
    B  unlearning  the adapter of the request before goes on, on answers drawn at random or refusals, with
                   loss = cross-entropy + 0.1 L_orth                    (`zoo.language.unlearning.orthogonal_lora`)
    C  inference   W x + w(prompt) s B A x,   w the largest over requests, each sample of a batch its own

A and B of request 1, then of request 2, ...: `O3.place`. At the end of A the detector's statistics are fitted, at the
end of B the adapter's A is remembered for the requests after it.

Departs from the authors' code: padding does not enter the average over tokens, so that a prompt's weight does not hang
on its batch (``authors_padding``); what is only rounding in the features is left out of their precision
(``authors_cutoff``); the frozen models' own dropout is off, also in the original that the contrastive entropy compares
with, whose features are therefore computed once; all training prompts enter the statistics, theirs leave out the last
incomplete batch; a text's first token is not learnt, theirs is read off padding where there is some; a text longer than
``max_length`` is refused, theirs is cut; the SVM is kept as its weights, theirs is a pickle. Their evaluations put
thresholds on w (``snap``); a step with fewer than ``accumulate`` batches left at the end of a request is taken.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from zoo.core import ZooError, unwrap
from zoo.core.errors import first_line
from zoo.engines.patching import CausalLMModule
from zoo.language.llm.languages import masked_loss
from zoo.language.unlearning.data_unlearning import GROUPS, TopicLanguage
from zoo.language.unlearning.metrics import answer_nats, choice, longest_recall, truth_ratio
from zoo.language.unlearning.ood_detector import (
    ROBERTA_LARGE,
    ROBERTA_LARGE_CONFIG,
    SNAPS,
    OODDetector,
    loading_weight,
    mask_words,
)
from zoo.language.unlearning.orthogonal_lora import OrthogonalLoRA, own_names
from zoo.nn.backbones import build_backbone, config_of, take_weights
from zoo.nn.ood_metrics import OODMetrics

OBJECTIVES = ("relabel", "ascent")
FIGURES = ("accuracy", "probability", "rouge", "truth_ratio", "weight")


class Place(NamedTuple):
    """Where training stands: which request, "detector" or "unlearn", which of how many batches."""

    request: int
    stage: str
    step: int
    steps: int
    last: bool
    """Whether the request ends with this batch."""


class O3(CausalLMModule):
    """Unlearns request after request, and answers prompts with as much of it as each calls for.

    Training batches hold every request's whole forget set as text ("prompts", "targets", "answers": a list a request)
    and the numbers of the samples of this step ("rows"); the model takes those of the request that it is at, so that
    the training loop knows of no stages: it ends by itself after the last one, and a resumed run goes on where it
    stopped (with the same batch size). One epoch of the loader means nothing; set ``max_epochs`` high.

    A 70B model needs its weights once, the adapter (0.1 %), and 1.4 GB for the encoder; every request adds the states'
    precisions and features (about 100 MB for RoBERTa-large and 1000 prompts) and one pass of the encoder a prompt, all
    requests in one batch. Nothing is merged: the base stays as it is, on whatever devices it lies.

    Args:
        backbone: Hub id or local folder of a causal language model, or a config dict with ``model_type``.
        backbone_revision: commit, tag or branch of a Hub id.
        backbone_dtype: "float32" or "bfloat16"; adapters are float32 in either.
        detector: Hub id, folder or config dict of a masked language model (RoBERTa, BERT).
        detector_revision: commit, tag or branch of it.
        tokenizer: Hub id or folder; None is the backbone's own, or for a config the generated language's words.
        detector_tokenizer: the same for the detector.
        requests: their names, in the order in which they come.
        sizes: how many prompts of each request's forget set train its detector; those after them calibrate it.
        rank: r of the unlearning adapter. alpha: it is scaled by alpha / r. dropout: on its inputs.
        targets: ends of the names of the adapted linear layers.
        orthogonal: weight of L_orth; 0 switches it off.
        objective: "relabel" (cross-entropy on the targets), or the baseline "ascent" (its negative on the true answers,
            and cross-entropy on retained data, which O3 does without).
        loading: "soft" (by the detector), or "always": the adapter alone, without a detector.
        snap: what becomes of the weight: "none", or the thresholds of the authors' evaluations, "scienceqa" or "tofu".
        train_on_prompt: whether the loss covers the prompt as well as its answer.
        unlearn_epochs: passes through a request's forget set. accumulate: batches a step of the adapter.
        lr: of the adapter, after ``warmup`` steps, then falling linearly. weight_decay: of its AdamW.
        warmup: steps with a rising learning rate. clip: largest norm of its gradient; 0 for none.
        states: layer states that the detector uses, embeddings included.
        detector_rank: of the detector's adapters. detector_alpha: their alpha. detector_dropout: on their inputs.
        detector_epochs: passes through the detector's training prompts.
        detector_lr: falls linearly after the warm-up. detector_weight_decay: of its AdamW.
        detector_warmup: share of its steps with a rising learning rate.
        detector_length: tokens of a prompt at most, for the detector.
        max_length: tokens of a training text at most. new_tokens: of an answer.
        authors_padding: padding enters the detector's averages, with prompts padded to ``detector_length``.
        authors_cutoff: directions in which features differ by rounding alone enter their precision.
    Shapes:
        forward: input_ids, attention_mask (b, t), weight (b,) or None (1 for all) -> logits (b, t, v)
    Raises:
        ValueError: for an unknown choice, a number out of range, or requests that are none or named twice.
        ZooError: if a model or tokenizer does not load.
    Example:
        >>> model = O3.from_variant("tiny", requests=["herb", "metal"], sizes=[48, 48])
        >>> model.predict(["ask herb_a herb_b herb_c herb7 answer"])["weight"]
        tensor([0.])
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {
            "backbone": {
                "model_type": "llama", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64,
                "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
                "bos_token_id": None, "eos_token_id": None,
            },
            "detector": {
                "model_type": "roberta", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64,
                "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
            },
            "requests": ["herb", "metal"], "sizes": [48, 48], "rank": 4, "detector_rank": 4, "unlearn_epochs": 0.02,
            "detector_epochs": 0.02, "accumulate": 1, "warmup": 0, "detector_warmup": 0.0, "new_tokens": 1,
            "max_length": 32, "detector_length": 32,
        }
    }  # fmt: skip
    monitor, mode = "val/score", "max"
    progress: Tensor

    def __init__(
        self,
        backbone: str | dict[str, Any] = "gcyzsl/O3_LLAMA2_ScienceQA",
        backbone_revision: str | None = None,
        backbone_dtype: str = "float32",
        detector: str | dict[str, Any] = ROBERTA_LARGE,
        detector_revision: str | None = None,
        tokenizer: str | None = None,
        detector_tokenizer: str | None = None,
        requests: list[str] = ["biology", "physics", "chemistry"],  # noqa: B006 (read only; the command knows no tuple)
        sizes: list[int] = [1024, 1024, 1024],  # noqa: B006
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.05,
        targets: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],  # noqa: B006
        orthogonal: float = 0.1,
        objective: str = "relabel",
        loading: str = "soft",
        snap: str = "none",
        train_on_prompt: bool = True,
        unlearn_epochs: float = 15.0,
        accumulate: int = 16,
        lr: float = 3e-4,
        weight_decay: float = 0.0,
        warmup: int = 100,
        clip: float = 1.0,
        states: int = 13,
        detector_rank: int = 8,
        detector_alpha: float = 32.0,
        detector_dropout: float = 0.1,
        detector_epochs: float = 2.0,
        detector_lr: float = 1e-5,
        detector_weight_decay: float = 0.01,
        detector_warmup: float = 0.06,
        detector_length: int = 512,
        max_length: int = 256,
        new_tokens: int = 128,
        authors_padding: bool = False,
        authors_cutoff: bool = False,
    ):
        super().__init__()
        for name, value, known in (
            ("objective", objective, OBJECTIVES), ("loading", loading, ("soft", "always")), ("snap", snap, SNAPS),
            ("backbone_dtype", backbone_dtype, ("float32", "bfloat16")),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name} is {value!r}; one of {', '.join(known)}.")
        check_requests(requests)
        if loading == "soft" and (len(sizes) != len(requests) or min(sizes) < 2):
            raise ValueError(f"sizes is {sizes} for {len(requests)} requests; one number from 2 for each.")
        if min(rank, detector_rank, accumulate, new_tokens) < 1 or min(max_length, detector_length) < 4:
            raise ValueError(f"rank {rank}, accumulate {accumulate}, new_tokens {new_tokens}: at least 1; lengths: 4.")
        if min(unlearn_epochs, detector_epochs) <= 0 or min(orthogonal, clip, warmup, detector_warmup) < 0:
            raise ValueError(
                f"epochs are {unlearn_epochs} and {detector_epochs}: above 0; weights and warm-ups: from 0."
            )
        self.save_hyperparameters()
        self.automatic_optimization = False  # two optimisers, one at a time
        self.backbone = build_backbone(backbone, backbone_revision, dtype=backbone_dtype)
        depth = self.backbone.config.num_hidden_layers
        self.unlearner = OrthogonalLoRA(self.backbone, targets, rank, alpha, dropout, len(requests), depth)
        self.freeze("backbone")
        self.words = tokenizer_of(tokenizer, backbone, backbone_revision, "left")
        self.detector: OODDetector | None = None
        if loading == "soft":
            only_sizes = detector == ROBERTA_LARGE and torch.get_default_device().type == "meta"
            trunk = build_backbone(ROBERTA_LARGE_CONFIG if only_sizes else detector, detector_revision, "masked-lm")
            self.detector = OODDetector(
                trunk, sizes, states, detector_rank, detector_alpha, detector_dropout, authors_padding, authors_cutoff
            )
            self.freeze("detector.trunk")
            self.detector_words = tokenizer_of(detector_tokenizer, detector, detector_revision, "right")
        self.register_buffer("progress", torch.zeros(2, dtype=torch.long))  # requests done, batches of the next
        self._originals: dict[int, Tensor] = {}
        self.figures = nn.ModuleDict({f"{name}_{group}": MeanMetric() for name in FIGURES for group in GROUPS})
        self.by_request = nn.ModuleList([MeanMetric() for _ in requests])
        self.score = MeanMetric()
        self.ood = OODMetrics()

    @classmethod
    def from_backbone(  # type: ignore[override]
        cls,
        module: nn.Module,
        tokenizer: Any,
        trunk: nn.Module | None = None,
        detector_tokenizer: Any = None,
        **hparams: Any,
    ) -> Self:
        """Take a live causal language model and, but for ``loading="always"``, a live encoder, with their tokenizers.

        Weights are copied and saved with ours, and so are the tokenizers.
        """
        model = super().from_backbone(module, **({} if trunk is None else {"detector": config_of(trunk)}), **hparams)
        model.words = padded(tokenizer, "left")
        if trunk is not None and model.detector is not None:
            take_weights(model.detector.trunk, trunk)
            model.detector_words = padded(detector_tokenizer, "right")
        model._live_tokenizers = True
        return model

    _live_tokenizers = False

    def save_extra(self, folder: Path) -> None:
        """Tokenizers that no Hub id leads to travel with the checkpoint."""
        hp = self.hyperparameters
        for name, own in (("tokenizer", "words"), ("detector_tokenizer", "detector_words")):
            if hasattr(self, own) and (self._live_tokenizers or Path(str(hp[name])).is_dir()):
                getattr(self, own).save_pretrained(folder / name)

    @staticmethod
    def load_extra(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
        found = {n: str(folder / n) for n in ("tokenizer", "detector_tokenizer") if (folder / n).is_dir()}
        return {**values, **found}

    def saved_state_dict(self) -> dict[str, Tensor]:
        state = super().saved_state_dict()
        if not isinstance(self.hyperparameters["detector"], str):
            return state
        return {key: value for key, value in state.items() if not key.startswith("detector.trunk.")}

    @classmethod
    def convert_state_dict(cls, content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The authors' unlearning adapter: a file of peft, then always loaded, or a folder with detectors.

        Of a folder the detectors average over padding, as they were fitted, and w goes through the thresholds of their
        evaluation (``snap``). Requests are in the order of their names; which adapters came before the last one is not
        in it, so that the next request is held orthogonal to this one alone.
        """
        detectors = content.get("detectors", {})
        state, ends, rank = own_names(content["adapter"] if "adapter" in content else unwrap(content))
        requests = list(detectors) or ["converted"]
        hyperparameters = {"rank": rank, "targets": ends, "loading": "always", "requests": requests}
        found = {f"unlearner.{key}": value for key, value in state.items()}
        if "config" in content:
            hyperparameters |= _of_peft(content["config"], "backbone", alpha="alpha", dropout="dropout")
        for i, one in enumerate(detectors.values()):
            own, _, detector_rank = own_names(one["adapter"])
            found |= {f"detector.adapters.{key.removesuffix('0')}{i}": value for key, value in own.items()}
            fitted = ("mean", "precision", "bank", "normal", "mixture")
            found |= {f"detector.fitted.{i}.{key}": one[key].float() for key in fitted}
            found[f"detector.fitted.{i}.ready"] = torch.ones((), dtype=torch.bool)
            hyperparameters |= {"detector_rank": detector_rank, "states": len(one["mean"])}
            hyperparameters |= _of_peft(one["config"], "detector", alpha="detector_alpha", dropout="detector_dropout")
        for key in [key for key in found if key.endswith(".a.0")]:
            earlier = len(requests) - 1 if key.startswith("unlearner.") else 0
            found[key.removesuffix("a.0") + "kept"] = found[key].new_zeros(earlier, *found[key].shape)
        if detectors:
            hyperparameters |= {
                "loading": "soft", "sizes": [one["bank"].shape[1] for one in detectors.values()],
                "snap": content["snap"], "authors_padding": True, "authors_cutoff": True,
            }  # fmt: skip
        return hyperparameters, {**found, "progress": torch.tensor([len(detectors), 0])}

    @classmethod
    def read_authors(cls, folder: Path) -> dict[str, Any]:
        """What `convert_state_dict` takes, of a folder with the authors' detectors and their unlearning adapter."""
        from zoo.language.unlearning.authors_files import read_folder

        return read_folder(folder)

    def with_request(self, name: str, size: int) -> "O3":
        """This model ready for one more request: the same weights and statistics, and room for ``name``.

        Args:
            size: how many of its prompts train the detector.
        """
        hp = self.hyperparameters
        model = type(self)(**{**hp, "requests": [*hp["requests"], name], "sizes": [*hp["sizes"], size]})
        own = model.state_dict()
        for key, value in self.state_dict().items():  # its tensors are the model's own
            (own[key] if own[key].shape == value.shape else own[key][: len(value)]).copy_(value)
        model.unlearner.keep(len(hp["requests"]) - 1)
        model.words = self.words
        if self.detector is not None:
            model.detector_words = self.detector_words
        model._live_tokenizers = self._live_tokenizers
        return model.to(self.device)

    # ---- texts to numbers ---------------------------------------------------------------------------------------

    def tokens(self, texts: Sequence[str], limit: int, what: str, end: bool = False) -> tuple[Tensor, Tensor]:
        """Ids and mask (b, t) of texts, padded on the left; with ``end`` each ends in the end token, if there is one.

        Raises:
            ZooError: for a text of more than ``limit`` tokens, or of none.
        """
        rows = self.words(list(texts))["input_ids"]
        last = self.words.eos_token_id
        if end and last is not None:
            rows = [row if row and row[-1] == last else [*row, last] for row in rows]
        return self._padded(rows, self.words, limit, what)

    def detector_tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask (b, t) of prompts for the detector, padded on the right."""
        hp = self.hyperparameters
        assert self.detector is not None
        rows = self.detector_words(list(prompts))["input_ids"]
        limit = min(hp["detector_length"], self.detector.longest)
        return self._padded(
            rows, self.detector_words, limit, "prompt of the detector", limit if hp["authors_padding"] else 0
        )

    def _padded(
        self, rows: list[list[int]], words: Any, limit: int, what: str, length: int = 0
    ) -> tuple[Tensor, Tensor]:
        counts = [len(row) for row in rows]
        if not rows or min(counts) == 0:
            raise ZooError(f"An empty {what}: there is nothing to read in it.")
        if max(counts) > limit:
            raise ZooError(
                f"A {what} has {max(counts)} tokens; {limit} fit (max_length, detector_length, new_tokens and the "
                "model itself set that). Shorten it."
            )
        length = max(length, max(counts))
        left = words.padding_side == "left"
        ids = torch.full((len(rows), length), words.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            place = slice(length - len(row), None) if left else slice(len(row))
            ids[i, place], mask[i, place] = torch.tensor(row), 1
        return ids.to(self.device), mask.to(self.device)

    # ---- the course of training ---------------------------------------------------------------------------------

    def course(self, batch: Mapping[str, Any], request: int) -> list[tuple[str, int]]:
        """Stages of a request and their batches, for batches of this size on as many processes as there are."""
        hp = self.hyperparameters
        world = self._trainer.world_size if self._trainer is not None else 1
        each = len(batch["rows"]) * world
        plan = [("unlearn", len(batch["prompts"][request]), hp["unlearn_epochs"])]
        if self.detector is not None:
            plan.insert(0, ("detector", hp["sizes"][request], hp["detector_epochs"]))
        return [(stage, max(1, math.ceil(epochs * math.ceil(size / each)))) for stage, size, epochs in plan]

    def place(self, batch: Mapping[str, Any]) -> Place | None:
        """Where training stands; None behind the last request."""
        request, done = (0, 0) if self.progress.is_meta else self.progress.tolist()
        if request >= len(self.hyperparameters["requests"]):
            return None
        plan = self.course(batch, request)
        total = sum(steps for _, steps in plan)
        for stage, steps in plan:
            if done < steps:
                return Place(request, stage, done, steps, total - done == 1)
            done, total = done - steps, total - steps
        raise ZooError("The run was started with smaller batches and cannot go on with these. Resume with the same.")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        """One batch of the stage that training is at."""
        requests, given = self.hyperparameters["requests"], batch["prompts"]
        if len(given) != len(requests):
            raise ZooError(f"The data have {len(given)} requests, the model {len(requests)} ({', '.join(requests)}).")
        place = self.place(batch)
        if place is None:
            self.trainer.should_stop = True
            return None
        if not given[place.request]:
            raise ZooError(f"The forget set of request {requests[place.request]!r} is empty.")
        rows = batch["rows"].tolist() if not batch["rows"].is_meta else list(range(len(batch["rows"])))
        found = self.optimizers()
        optimizers: list[Any] = list(found) if isinstance(found, (list, tuple)) else [found]
        if place.stage == "detector":
            loss = self._detector_step(place, batch, rows, optimizers[0])
        else:
            loss = self._unlearn_step(place, batch, rows, optimizers[-1])
        self.progress[1] += 1
        if place.last:
            self.progress[0] += 1
            self.progress[1] = 0
            if place.request + 1 == len(requests):
                self.trainer.should_stop = True
        return loss.detach()

    def _detector_step(self, place: Place, batch: dict[str, Any], rows: list[int], optimizer: Any) -> Tensor:
        hp, detector = self.hyperparameters, self.detector
        assert detector is not None
        prompts = batch["prompts"][place.request]
        size = hp["sizes"][place.request]
        if len(prompts) <= size:
            raise ZooError(
                f"Request {hp['requests'][place.request]!r} has {len(prompts)} prompts, of which {size} train the "
                "detector: none is left to calibrate it. Give `sizes` that leave at least 10."
            )
        chosen = [row % size for row in rows]
        ids, mask = self.detector_tokens([prompts[i] for i in chosen])
        words, labels = self.masked(ids, mask)
        if place.request not in self._originals:  # the original encoder never changes: once for all prompts
            self._originals = {place.request: self._features(prompts[:size], None)}
        original = self._originals[place.request][:, chosen]
        losses = detector.losses(place.request, words, mask, labels, original)
        rate = _linear(place.step, place.steps, int(hp["detector_warmup"] * place.steps))
        _set_rate(optimizer, hp["detector_lr"] * rate)
        optimizer.zero_grad()
        self.manual_backward(sum(losses))
        optimizer.step()
        self.log_dict({"train/words": losses[0].detach(), "train/contrast": losses[1].detach()}, batch_size=len(rows))
        if place.step + 1 == place.steps and not ids.is_meta:
            self._originals = {}
            self.fit_detector(place.request, prompts[:size], prompts[size:])
        return sum(losses)  # type: ignore[return-value]

    def masked(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Masked words and labels of the detector's tokens (b, t)."""
        special = mask == 0
        for one in self.detector_words.all_special_ids:
            special = special | (ids == one)
        return mask_words(ids, special, self.detector_words.mask_token_id, len(self.detector_words))

    def _features(self, prompts: Sequence[str], request: int | None, size: int = 32) -> Tensor:
        """Token means of prompts, (l, n, d)."""
        assert self.detector is not None
        use = None if request is None else [request]
        parts = [
            self.detector.features(*self.detector_tokens(prompts[i : i + size]), use)[0]
            for i in range(0, len(prompts), size)
        ]
        return torch.cat(parts, 1)

    def fit_detector(self, request: int, train: Sequence[str], calibration: Sequence[str]) -> Self:
        """Fit what the detector of a request knows to its training prompts and to others of the same request.

        Raises:
            ZooError: for fewer than 10 to calibrate, a number of training prompts other than in ``sizes``, or NaN.
        """
        if self.detector is None:
            raise ZooError("There is no detector with loading='always'.")
        if len(train) != self.hyperparameters["sizes"][request]:
            raise ZooError(f"{len(train)} training prompts; `sizes` says {self.hyperparameters['sizes'][request]}.")
        if len(calibration) < 10:
            raise ZooError(f"{len(calibration)} prompts to calibrate the detector; at least 10. Hold out more.")
        self.detector.fit(request, self._features(train, request), self._features(calibration, request))
        return self

    def _unlearn_step(self, place: Place, batch: dict[str, Any], rows: list[int], optimizer: Any) -> Tensor:
        hp = self.hyperparameters
        if place.step == 0:  # each request is a training run of its own
            getattr(optimizer, "optimizer", optimizer).state.clear()
            optimizer.zero_grad()
        prompts = batch["prompts"][place.request]
        chosen = [row % len(prompts) for row in rows]
        answers = batch["targets" if hp["objective"] == "relabel" else "answers"][place.request]
        loss = self.text_loss([prompts[i] for i in chosen], [answers[i] for i in chosen])
        if hp["objective"] == "ascent":
            if not batch.get("retained_prompt"):
                raise ZooError("objective='ascent' needs retained data: give the data `retain=True`.")
            loss = self.text_loss(batch["retained_prompt"], batch["retained_answer"]) - loss
        overlap = self.unlearner.overlap(place.request)
        self.log_dict({"train/loss": loss.detach(), "train/overlap": overlap.detach()}, batch_size=len(rows))
        if hp["orthogonal"] and place.request:
            loss = loss + hp["orthogonal"] * overlap
        self.manual_backward(loss / hp["accumulate"])
        steps = math.ceil(place.steps / hp["accumulate"])
        if (place.step + 1) % hp["accumulate"] == 0 or place.step + 1 == place.steps:
            if hp["clip"]:
                nn.utils.clip_grad_norm_(self.unlearner.parameters(), hp["clip"])
            _set_rate(optimizer, hp["lr"] * _linear(place.step // hp["accumulate"], steps, hp["warmup"]))
            optimizer.step()
            optimizer.zero_grad()
        if place.step + 1 == place.steps:
            self.unlearner.keep(place.request)
        return loss

    def text_loss(self, prompts: Sequence[str], answers: Sequence[str]) -> Tensor:
        """Mean cross-entropy of the tokens of prompts with their answers, with the adapter fully loaded, a scalar."""
        ids, mask, labels = self.labelled(prompts, answers, whole=self.hyperparameters["train_on_prompt"])
        with self.unlearner.loaded():
            return masked_loss(self.backbone, ids, labels, mask)

    def labelled(self, prompts: Sequence[str], answers: Sequence[str], whole: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask and labels (b, t) of prompts with their answers; the prompt's labels are -100 unless ``whole``."""
        limit = self.hyperparameters["max_length"]
        texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        ids, mask = self.tokens(texts, limit, "text of a prompt and its answer", end=True)
        labels = ids.masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100)  # the first is read off nothing, or padding
        if not whole:
            heads = [len(row) for row in self.words([p.rstrip() for p in prompts])["input_ids"]]
            start = ids.shape[1] - mask.sum(1)
            place = torch.arange(ids.shape[1], device=ids.device)
            labels = labels.masked_fill(place < (start + torch.tensor(heads, device=ids.device))[:, None], -100)
        return ids, mask, labels

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW of the detector's adapters, and of the unlearning adapter; the steps set their learning rates."""
        hp = self.hyperparameters
        own = torch.optim.AdamW(self.unlearner.parameters(), lr=hp["lr"], weight_decay=hp["weight_decay"])
        if self.detector is None:
            return [own]
        adapters = self.detector.adapters.parameters()
        rest = {"lr": hp["detector_lr"], "eps": 1e-6, "weight_decay": hp["detector_weight_decay"]}
        return [torch.optim.AdamW(adapters, **rest), own]

    # ---- answers ------------------------------------------------------------------------------------------------

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """Logits (b, t, v) of token ids (b, t), the adapter loaded by ``weight`` (b,), or fully."""
        with self.unlearner.loaded(weight=weight):
            return self.logits(input_ids, attention_mask)

    @torch.no_grad()
    def nearness(self, prompts: Sequence[str]) -> Tensor:
        """c of each prompt to each request, (b, requests) in [0, 1]; 0 where a request has no detector yet."""
        if self.detector is None:
            raise ZooError("There is no detector with loading='always'.")
        return self.detector.closeness(*self.detector_tokens(prompts))

    def weights(self, prompts: Sequence[str], near: Tensor | None = None) -> Tensor:
        """How strongly each prompt loads the adapter, (b,): the largest over requests; 0 before there is any.

        Args:
            near: what `nearness` gave for these prompts, where it is known.
        """
        hp = self.hyperparameters
        if self.detector is None:
            return torch.ones(len(prompts), device=self.device)
        ready = self.detector.ready
        if not ready:
            return torch.zeros(len(prompts), device=self.device)
        near = self.nearness(prompts) if near is None else near
        return loading_weight(near[:, ready].float(), hp["snap"]).amax(1)

    @torch.no_grad()
    def answers(self, prompts: Sequence[str], weight: Tensor, new_tokens: int | None = None) -> list[str]:
        """The most probable continuations, each prompt with its own weight.

        Raises:
            ZooError: for a prompt that does not fit into the model with its answer.
        """
        count = new_tokens or self.hyperparameters["new_tokens"]
        limit = getattr(self.backbone.config, "max_position_embeddings", 10**9) - count
        ids, mask = self.tokens([p.rstrip(" ") for p in prompts], limit, "prompt")
        with self.unlearner.loaded(weight=weight) if bool(weight.any()) else contextlib.nullcontext():
            out = self.backbone.generate(
                ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=self.words.pad_token_id
            )
        return [text.strip() for text in self.words.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)]

    @torch.no_grad()
    def predict(self, prompt: str | list[str], new_tokens: int | None = None) -> dict[str, Any]:  # type: ignore[override]
        """Answers to prompts: "answer" (list of str) and "weight" (b,), how strongly each was made to forget."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        modes = {name: m.training for name, m in self.named_modules()}
        self.eval()
        try:
            weight = self.weights(prompts)
            return {"answer": self.answers(prompts, weight, new_tokens), "weight": weight}
        finally:
            for name, mode in modes.items():
                self.get_submodule(name).training = mode

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """What `predict` gives, with "name" and "prompt"."""
        return {"name": batch["name"], "prompt": list(batch["prompt"]), **self.predict(batch["prompt"])}

    # ---- scoring ------------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """ "val/score": the share of prompts treated as they should be: the forgotten ones wrong, all others right."""
        found = self.predict(batch["prompt"])["answer"]
        for text, answer, group in zip(found, batch["answer"], batch["group"], strict=True):
            right = likeness(text, answer)
            self.score.update(1 - right if group in ("forget", "heldout") else right)
        self.log("val/score", self.score, batch_size=len(found), prog_bar=True)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """By group of prompts (S.U. "forget", D.U. "heldout", R.D. "retained", ...): accuracy of the letter chosen, or
        of answers in words their probability, the truth ratio and ROUGE-L recall; the weight; and of the detector
        "test/auroc" and "test/fpr95", held-out prompts of the requests against retained ones."""
        prompts = list(batch["prompt"])
        near = self.nearness(prompts) if self.detector is not None else None
        weight = self.weights(prompts, near)
        texts = self.answers(prompts, weight)
        letters = [choice(answer) is not None for answer in batch["answer"]]
        values: dict[str, list[float | None]] = {"weight": weight.tolist()}
        same = [likeness(text, answer) for text, answer in zip(texts, batch["answer"], strict=True)]
        values["accuracy"] = [v if letter else None for v, letter in zip(same, letters, strict=True)]
        if not all(letters):
            values["rouge"] = [None if letter else v for v, letter in zip(same, letters, strict=True)]
            chance = torch.exp(-self._nats(prompts, batch["answer"], weight)).tolist()
            values["probability"] = [None if letter else v for v, letter in zip(chance, letters, strict=True)]
            values["truth_ratio"] = self._truth_ratios(batch, weight)
        for name, column in values.items():
            for value, group in zip(column, batch["group"], strict=True):
                if value is not None:
                    metric: Any = self.figures[f"{name}_{group}"]
                    metric.update(value)
                    self.log(f"test/{name}_{group}", metric, batch_size=1)
        for value, group, request in zip(same, batch["group"], batch["request"].tolist(), strict=True):
            if group == "forget":
                one: Any = self.by_request[request]
                one.update(value)
                self.log(f"test/forget_{request + 1}", one, batch_size=1)
        if near is not None and self.detector is not None and self.detector.ready:
            kept = [i for i, group in enumerate(batch["group"]) if group in ("heldout", "retained")]
            label = torch.tensor([int(batch["group"][i] == "retained") for i in kept], device=self.device)
            if kept:
                self.ood.update(near[kept].amax(1), label)

    def on_test_epoch_end(self) -> None:
        if not self.ood.update_called:
            return
        for name, value in self.ood.compute().items():
            if name in ("auroc", "fpr95"):
                self.log(f"test/{name}", value)
        self.ood.reset()

    @torch.no_grad()
    def _nats(self, prompts: Sequence[str], answers: Sequence[str], weight: Tensor) -> Tensor:
        """-log p of answers, a token, (b,)."""
        ids, mask, labels = self.labelled(prompts, answers, whole=False)
        return answer_nats(self(ids, mask, weight), labels)

    def _truth_ratios(self, batch: dict[str, Any], weight: Tensor) -> list[float | None]:
        """Of the samples that have wrong answers beside a paraphrase of the right one."""
        found: list[float | None] = []
        rows = zip(batch["prompt"], batch["paraphrase"], batch["perturbed"], weight, strict=True)
        for prompt, right, wrong, own in rows:
            if not right or not wrong:
                found.append(None)
                continue
            texts = [right, *wrong]
            found.append(float(truth_ratio(self._nats([prompt] * len(texts), texts, own.expand(len(texts))))))
        return found

    # ---- files of peft ------------------------------------------------------------------------------------------

    def save_adapter(self, folder: str | Path) -> Path:
        """Write the unlearning adapter as a folder that peft loads onto the backbone; returns it."""
        name = self.hyperparameters["backbone"]
        self.unlearner.save(Path(folder), base=name if isinstance(name, str) else None)
        return Path(folder)

    def load_adapter(self, folder: str | Path) -> Self:
        """Take over an unlearning adapter from a folder of peft (``adapter_model.safetensors``)."""
        from safetensors.torch import load_file

        path = Path(folder) / "adapter_model.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: expected an adapter of peft in safetensors.")
        self.unlearner.from_peft(load_file(path))
        return self


# ---- small parts ----------------------------------------------------------------------------------------------------


def check_requests(names: Sequence[str]) -> None:
    """Refuse requests that are none, or named twice."""
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if not names or twice:
        raise ValueError(f"requests is {list(names)}: {f'{twice[0]!r} comes twice' if twice else 'at least one'}.")


def likeness(text: str, answer: str) -> float:
    """1 or 0, whether the letter is the right one; of an answer in words its ROUGE-L recall."""
    letter = choice(answer)
    return float(choice(text) == letter) if letter is not None else longest_recall(text, answer)


def tokenizer_of(name: str | None, model: str | dict[str, Any], revision: str | None, side: str) -> Any:
    """A tokenizer of transformers with a padding token: the named one, the model's own, or the generated language's.

    Raises:
        ZooError: if there is none.
    """
    if name is None and isinstance(model, dict):
        return padded(TopicLanguage.tokenizer(), side)
    from transformers import AutoTokenizer

    where, pinned = (model, revision) if name is None else (name, None)
    if torch.get_default_device().type == "meta" and name is None and not Path(str(where)).is_dir():
        return None  # only shapes are asked for
    try:
        return padded(AutoTokenizer.from_pretrained(where, revision=pinned), side)
    except (OSError, ValueError, KeyError) as error:
        raise ZooError(f"No tokenizer in {where!r}: {first_line(error)}") from error


def padded(words: Any, side: str) -> Any:
    """A tokenizer that pads on this side, with the unknown word where it has no padding of its own."""
    if words.pad_token is None:
        words.pad_token = words.unk_token or words.eos_token
    words.padding_side = side
    return words


def _of_peft(config: Mapping[str, Any], base: str, alpha: str, dropout: str) -> dict[str, Any]:
    """The hyperparameters, by these names, that peft's settings of an adapter tell."""
    given = {alpha: config.get("lora_alpha"), dropout: config.get("lora_dropout")}
    name = config.get("base_model_name_or_path")
    given[base] = ROBERTA_LARGE if name == "roberta-large" else name
    return {key: value for key, value in given.items() if value is not None}


def _linear(step: int, steps: int, warmup: int) -> float:
    """The factor of a learning rate that rises from 0 over ``warmup`` steps and falls to 0 at ``steps``."""
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, (steps - step) / max(1, steps - warmup))


def _set_rate(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
