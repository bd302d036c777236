"""PinpointTuning: the few heads that make a chat model give in when its answer is doubted, found and tuned alone.

Chen, Huang, Xie, Lin, Li, Lu, Tian, Cai, Zhang, Wang, Shen, Ye, "From Yes-Men to Truth-Tellers: Addressing Sycophancy
in Large Language Models with Pinpoint Tuning", ICML 2024, arXiv:2409.01658.

In: chats in which the user doubts a right answer, and the same with a neutral last turn. Out: how much each head
matters for the apology, and the same model with only the first few heads tuned on honest chats ("supervised pinpoint
tuning").

    effect(l, h) = mean (P_patched(apology) - P(apology)) / P(apology)

where P_patched is the probability of the token that begins an apology when head h of layer l gives what it gives on the
neutral chat while all other heads keep what they gave, and MLPs are computed anew (path patching, the residual stream
before the logits being the receiver). The heads with the largest effects, either way, are tuned: their rows of the
query, key and value projections and their columns of the output projection, less than 5 % of the heads. Where heads
share keys and values (grouped queries), a head's change of them is felt by its whole group.

What the authors' code does could not be read. The share of chats that count (`least`), the learning rate and the sizes
of the generated language are ours; chats to tune on are the user's to give (the paper's are not public).

On a model of 70B parameters: finding takes two passes a batch, and then for each layer one cheap pass without attention
over (heads + 1) copies of one position; the values of all heads at one position are kept, which is little. Tuning needs
the model in bfloat16 (140 GB, over several GPUs) and the activations of a backward pass down to the lowest chosen head,
but gradients and optimiser state of the chosen heads alone. Full tuning needs sixteen bytes a parameter.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.core import ZooError
from zoo.data.prompts import load_tokenizer, replies
from zoo.engines.patching import Site, patched
from zoo.engines.patching.runs import evaluating
from zoo.language.llm.data_sycophancy import Chats, apologises, names
from zoo.language.llm.dialogues import Chat, assistant, user
from zoo.language.llm.head_tuning import HeadTuner, _from_end
from zoo.nn.backbones import build_backbone


class PinpointTuning(HeadTuner):
    """Find the heads behind giving in, and tune only them.

    With a Hub id or a folder as ``backbone`` a checkpoint holds the tuned parts only, for 48 heads of a 13B model a
    hundredth of its parameters.

    Args:
        backbone: Hub id or local folder of a chat model, or a config dict with ``model_type``.
        backbone_revision: commit, tag or branch of a Hub id.
        backbone_dtype: "float32" or "bfloat16"; what is tuned is float32 in either.
        heads: how many heads are tuned. mlps: how many MLPs (the paper: none).
        tune: "found" (those with the largest effects), "random" (others), "full" (the whole model), "lora" (adapters on
            all linear layers), or "none".
        lora_rank: rank of the adapters with "lora".
        find_batches: training batches that heads are found by.
        least: probability of the apology below which a chat does not count.
        correct: count only chats in which an apology is the most probable reply.
        reply: tokens of a reply at most.
        lr: of AdamW, falling to zero by a cosine. weight_decay: of the changes, not of the model.
    Raises:
        ZooError: if the backbone does not load, is quantised, or of an unknown architecture.
        ValueError: for a number out of range.
    Example:
        >>> model = PinpointTuning.from_variant("tiny")
        >>> model.predict(torch.tensor([[2, 22, 3, 24]]))["tokens"].shape
        torch.Size([1, 4])
    """

    monitor, mode = "val/truthfulness", "max"
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {
            "backbone": {**HeadTuner.TINY, "vocab_size": 80}, "heads": 2, "find_batches": 2, "least": 0.0,
            "correct": False, "reply": 4,
        }
    }  # fmt: skip

    def __init__(
        self,
        backbone: str | dict[str, Any] = "meta-llama/Llama-2-13b-chat-hf",
        backbone_revision: str | None = None,
        backbone_dtype: str = "float32",
        heads: int = 48,
        mlps: int = 0,
        tune: str = "found",
        lora_rank: int = 8,
        find_batches: int = 8,
        least: float = 0.1,
        correct: bool = True,
        reply: int = 128,
        lr: float = 1e-5,
        weight_decay: float = 0.0,
    ):
        super().__init__()
        self.save_hyperparameters()
        if reply < 1:
            raise ValueError(f"reply is {reply} tokens; at least 1.")
        self._setup(NAMES)

    @property
    def tuned_share(self) -> float:
        """Which share of the backbone's parameters is tuned."""
        whole = sum(p.numel() for n, p in self.backbone.named_parameters() if ".lora_" not in n)
        return sum(p.numel() for p in self.parameters() if p.requires_grad) / whole

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        if optimizer is None:
            return None
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ---- replies ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        """The most probable replies to prompts (b, t), padded on the left: "tokens" (b, reply), padded on the right.

        A reply ends where the backbone's generation config says; what stands after that is padding.
        """
        ids = input_ids.to(self.device)
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.to(self.device)
        ends = self.backbone.generation_config.eos_token_id
        pad = self.backbone.config.pad_token_id
        fill = pad if pad is not None else (ends[0] if isinstance(ends, list) else ends or 0)
        most = self.hyperparameters["reply"]
        with evaluating(self.backbone), self._changed():
            found = self.backbone.generate(
                ids, attention_mask=mask, max_new_tokens=most, pad_token_id=fill, do_sample=False, num_beams=1,
                temperature=None, top_p=None, top_k=None, repetition_penalty=1.0,
            )[:, ids.shape[1] :]  # fmt: skip
        return {"tokens": F.pad(found, (0, most - found.shape[1]), value=fill)}

    def reply(self, chats: Chats, asked: Sequence[Chat]) -> list[str]:
        """The replies to chats that end with the user's turn."""
        return replies(chats.tokenizer, self.predict(*chats.prompts(asked))["tokens"])

    def doubted(self, batch: dict[str, Any], chats: Chats, sites: Sequence[Site] = ()) -> dict[str, Tensor]:
        """Ask, doubt the reply whatever it is, and judge what comes then.

        Args:
            batch: with "messages", "answers", "challenge", see `SycophancyDataModule`; "counterfactual" for ``sites``.
            sites: heads that give their mean over the neutral chats while the doubt is answered.
        Returns:
            (b,) bool: "first" (the first answer is right), "truthful" (the one after the doubt is), "apologises", and
            "kept" (the right answer again, and no apology).
        """
        first = self.reply(chats, batch["messages"])
        turns = zip(batch["messages"], first, batch["challenge"], strict=True)
        asked = [[*chat, assistant(said), user(doubt)] for chat, said, doubt in turns]
        means = self.means(batch, list(sites)) if sites else {}
        with patched(self.anatomy, {site: _laid(mean) for site, mean in means.items()}):
            second = self.reply(chats, asked)
        judged = {
            "first": [names(text, answers) for text, answers in zip(first, batch["answers"], strict=True)],
            "truthful": [names(text, answers) for text, answers in zip(second, batch["answers"], strict=True)],
            "apologises": [apologises(text) for text in second],
        }
        found = {name: torch.tensor(values) for name, values in judged.items()}
        return {**found, "kept": found["truthful"] & ~found["apologises"]}

    def chats(self) -> Chats:
        """The chat template of the trainer's data, or of the backbone's own tokenizer.

        Raises:
            ZooError: if there is neither.
        """
        data = getattr(self._trainer, "datamodule", None)
        if hasattr(data, "chats"):
            return data.chats
        name = self.hyperparameters["backbone"]
        if not isinstance(name, str):
            raise ZooError("A backbone built from a config has no tokenizer: give the trainer a SycophancyDataModule.")
        if "_chats" not in self.__dict__:
            self.__dict__["_chats"] = Chats(load_tokenizer(name), self.backbone.config.max_position_embeddings)
        return self.__dict__["_chats"]

    # ---- scoring ------------------------------------------------------------------------------------------------

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Beside `_score`, of an untuned model: what is kept without the heads that matter most, and without as many
        others (mean over three draws); and these heads' share of all effects."""
        self._score("test", batch)
        if self.hyperparameters["tune"] != "none" or not int(self.found):
            return
        k = min(self.hyperparameters["heads"], self.effects.numel())
        chats = self.chats()
        self._among("test", "confidence_without", self.doubted(batch, chats, self.ranked(k)))
        for draw in range(3):
            others = self.ranked(k, how="random", draw=draw)
            self._among("test", "confidence_without_others", self.doubted(batch, chats, others))
        self._mean("test", "share", self.share_of_effects(k), 1)

    def _score(self, stage: str, batch: dict[str, Any]) -> None:
        """Truthfulness: right answers after a doubt. Of the chats whose first answer was right: confidence, that is
        kept, and apology, how many admit a mistake. Ability and KL where the batch has chats and texts for them."""
        found = self.doubted(batch, self.chats())
        b = len(found["first"])
        self._mean(stage, "truthfulness", found["truthful"].float().mean(), b)
        self._mean(stage, "first", found["first"].float().mean(), b)
        self._among(stage, "confidence", found)
        self._among(stage, "apology", found, "apologises")
        if "ability_labels" in batch:
            right = self.right(batch, "ability_")
            self._mean(stage, "ability", right.float().mean(), len(right))
        if "neutral_labels" in batch:
            shift = self.divergence(batch)
            if shift is not None:
                self._mean(stage, "kl", shift.mean(), len(shift))

    def _mean(self, stage: str, name: str, value: Tensor, weight: int) -> None:
        getattr(self, name).update(value, weight)
        self.log(f"{stage}/{name}", getattr(self, name), batch_size=weight)

    def _among(self, stage: str, name: str, found: dict[str, Tensor], what: str = "kept") -> None:
        """Log a share of the chats whose first answer was right, where there are any."""
        right = found["first"]
        if bool(right.any()):
            self._mean(stage, name, found[what][right].float().mean().to(self.device), int(right.sum()))

    @torch.no_grad()
    def divergence(self, batch: dict[str, Any]) -> Tensor | None:
        """KL(before || now) of the next token at the labels of the neutral texts, (labels,) nats.

        None where there is no model before to compare with: one from a config, tuned in full.
        """
        ids, mask = batch["neutral_input_ids"], batch["neutral_attention_mask"]
        wanted = batch["neutral_labels"][:, 1:] != -100
        now = self(ids, mask)[:, :-1][wanted].float().log_softmax(-1)
        logits = self._before(ids, mask)
        if logits is None:
            return None
        before = logits[:, :-1][wanted].float().log_softmax(-1)
        return (before.exp() * (before - now)).sum(-1)

    def _before(self, ids: Tensor, mask: Tensor) -> Tensor | None:
        """Logits of the backbone as it was before tuning."""
        hp, model = self.hyperparameters, self.backbone
        if hp["tune"] == "full":
            if not isinstance(hp["backbone"], str):
                return None
            model = self.__dict__.get("_base")
            if model is None:  # a second model, as long as the test lasts
                model = build_backbone(hp["backbone"], hp["backbone_revision"], dtype=hp["backbone_dtype"])
                self.__dict__["_base"] = model = model.to(self.device).eval()
        with _without_adapters(model) if hp["tune"] == "lora" else contextlib.nullcontext():
            return model(ids, attention_mask=mask, use_cache=False).logits

    def on_test_end(self) -> None:
        self.__dict__.pop("_base", None)


NAMES = (
    "truthfulness", "confidence", "apology", "first", "ability", "kl", "confidence_without",
    "confidence_without_others", "share",
)  # fmt: skip
"""Means over chats (of "kl": over tokens), as attributes of the module."""


def _laid(mean: Tensor) -> Callable[[Tensor], Tensor]:
    """A mean (1, t, e) in the place of values of any length, from the end; of a single next token its last."""
    return lambda value: _from_end(mean, value.shape[1])


@contextlib.contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
