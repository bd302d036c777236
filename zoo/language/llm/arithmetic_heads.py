"""ArithmeticHeads: the few heads with which a language model calculates, found by path patching and tuned alone.

Zhang, Wan, Zhang, Cheung, Tian, Shen, Ye, "Interpreting and Improving Large Language Models in Arithmetic Calculation",
ICML 2024, arXiv:2409.01659.

In: prompts that ask for a calculation, and counterfactual ones of the same length that do not. Out: how much each head
and MLP matters, and the same model with only the first few of them tuned ("precise tuning").

    effect(l, h) = mean (P_patched(answer) - P(answer)) / P(answer)

where P_patched is the probability when head h of layer l gives what it gives on the counterfactual prompt while all
other heads keep what they gave, and MLPs are computed anew. Heads whose knock-out (by their mean) destroys the answers
are tuned: their rows of the query, key and value projections and their columns of the output projection.

No code of the authors is public: the card's description is followed; the templates of natural prompts, the share of
prompts that count (`least`) and the sizes of the generated language are ours. The paper's answers are one token; so are
ours.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.engines.patching import Site
from zoo.engines.patching.runs import evaluating
from zoo.language.llm.head_tuning import HeadTuner


class ArithmeticHeads(HeadTuner):
    """Find the heads behind a calculation, and tune only them.

    With a Hub id or a folder as ``backbone`` a checkpoint holds the tuned parts only.

    Args:
        backbone: Hub id or local folder of a causal language model, or a config dict with ``model_type``.
        backbone_revision: commit, tag or branch of a Hub id.
        backbone_dtype: "float32" or "bfloat16"; what is tuned is float32 in either.
        heads: how many heads are tuned. mlps: how many MLPs.
        tune: "found" (those with the largest effects), "random" (others), "full" (the whole model), "lora" (adapters on
            all linear layers), or "none".
        lora_rank: rank of the adapters with "lora".
        find_batches: training batches that heads are found by.
        least: probability of the answer below which a prompt does not count.
        correct: count only prompts that the model answers right.
        lr: of AdamW. weight_decay: of the changes, not of the model.
    Raises:
        ZooError: if the backbone does not load, is quantised, or of an unknown architecture.
        ValueError: for a number out of range.
    Example:
        >>> model = ArithmeticHeads.from_variant("tiny")
        >>> model(torch.tensor([[2, 22, 3, 24]])).shape
        torch.Size([1, 4, 28])
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"backbone": HeadTuner.TINY, "heads": 2, "mlps": 1, "find_batches": 2, "least": 0.0, "correct": False}
    }

    def __init__(
        self,
        backbone: str | dict[str, Any] = "meta-llama/Llama-2-7b-hf",
        backbone_revision: str | None = None,
        backbone_dtype: str = "float32",
        heads: int = 32,
        mlps: int = 0,
        tune: str = "found",
        lora_rank: int = 8,
        find_batches: int = 8,
        least: float = 0.1,
        correct: bool = True,
        lr: float = 2e-5,
        weight_decay: float = 0.0,
    ):
        super().__init__()
        self.save_hyperparameters()
        self._setup(NAMES)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Beside the accuracies: what is left of them without the heads that matter most, and without as many others
        (mean over five draws); the heads' share of all effects, and of their attention what goes to operands and
        operator."""
        self._score("test", batch)
        if not int(self.found):
            return
        k, b = min(self.hyperparameters["heads"], self.effects.numel()), len(batch["labels"])
        top = self.ranked(k)
        self.accuracy_without.update(self.knocked_out(batch, top).float().mean(), b)
        for draw in range(5):
            others = self.ranked(k, how="random", draw=draw)
            self.accuracy_without_others.update(self.knocked_out(batch, others).float().mean(), b)
        self.share.update(self.share_of_effects(k), b)
        if "cues" in batch:
            self.attention.update(self.attended(batch, top).mean(), b)
        for name in ("accuracy_without", "accuracy_without_others", "share", "attention"):
            if name != "attention" or "cues" in batch:
                self.log(f"test/{name}", getattr(self, name), batch_size=b)

    def _score(self, stage: str, batch: dict[str, Any]) -> None:
        """Accuracy of the sums, and of another ability where the batch has it ("other_input_ids", ...)."""
        b = len(batch["labels"])
        self.accuracy.update(self.right(batch).float().mean(), b)
        self.log(f"{stage}/accuracy", self.accuracy, batch_size=b, prog_bar=True)
        if "other_labels" in batch:
            self.other_accuracy.update(self.right(batch, "other_").float().mean(), b)
            self.log(f"{stage}/other_accuracy", self.other_accuracy, batch_size=b)

    @torch.no_grad()
    def attended(self, batch: dict[str, Any], sites: list[Site]) -> Tensor:
        """How much of its attention, at the last position of the reference prompts, a head gives to operands and
        operator: (sites,).

        The attention is computed from the head's own queries and keys by the model's eager implementation.

        Args:
            batch: "reference" (b, t), and "cues" (b, t) bool: where operands and operator stand.
        """
        config = self.backbone.config
        before = config._attn_implementation
        try:
            self.backbone.set_attn_implementation("eager")
            with evaluating(self.backbone):
                found = self.backbone(
                    batch["reference"],
                    attention_mask=batch.get("reference_mask"),
                    output_attentions=True,
                    use_cache=False,
                ).attentions
        finally:
            self.backbone.set_attn_implementation(before)
        cues = batch["cues"].to(found[0])
        return torch.stack([(found[site.layer][:, site.head, -1] * cues).sum(-1).mean() for site in sites])

    def predict(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        """The most probable next token of prompts (b, t), padded on the left: "token" (b,), "probability" (b,)."""
        best = super().predict(input_ids, attention_mask)[:, -1].float().softmax(-1).max(-1)
        return {"token": best.indices, "probability": best.values}


NAMES = ("accuracy", "other_accuracy", "accuracy_without", "accuracy_without_others", "share", "attention")
"""Means over samples, as attributes of the module."""
