"""`CausalLMModule`: a causal language model of transformers under ``backbone``, whose parts have names."""

from collections.abc import Collection
from typing import Any, Self

import torch
from torch import Tensor, nn

from zoo.core import ZooError, ZooModule
from zoo.engines.patching.anatomy import Anatomy
from zoo.engines.patching.runs import check_tokens
from zoo.nn.backbones import config_of, known_mask, take_weights


class CausalLMModule(ZooModule):
    """A method that looks into, changes or adapts a causal language model.

    Its ``__init__`` has the hyperparameter ``backbone`` (Hub id, local folder or config) and sets ``self.backbone``, as
    `zoo.nn.backbones.build_backbone` builds it.
    """

    backbone: Any

    @property
    def anatomy(self) -> Anatomy:
        """The backbone's parts by name."""
        kept = self.__dict__.get("_anatomy")
        if kept is None or kept.model is not self.backbone:
            self.__dict__["_anatomy"] = kept = Anatomy(self.backbone)
        return kept

    @classmethod
    def from_backbone(cls, module: nn.Module, **hparams: Any) -> Self:
        """Take a live causal language model of transformers; its weights are copied, and saved with ours.

        Args:
            hparams: hyperparameters other than ``backbone``.
        Raises:
            ZooError: if the model lacks weights of its config's class, or has others.
        """
        model = cls(backbone=config_of(module), **hparams)
        extra = take_weights(model.backbone, module)
        if extra:
            raise ZooError(
                f"{type(module).__name__} has {len(extra)} weights that its config knows nothing of ({extra[0]}, ...)."
            )
        return model

    def on_fit_start(self) -> None:
        super().on_fit_start()
        for name, p in self.named_parameters():
            if not p.is_meta and not bool(p.isfinite().all()):
                raise ZooError(f"{name} holds NaN or infinite values: the weights are damaged, nothing can be fitted.")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        words = self.backbone.config.get_text_config().vocab_size
        for key, value in batch.items() if isinstance(batch, dict) else ():
            if key.endswith("input_ids") and isinstance(value, Tensor):
                check_tokens(value, words)
        return super().on_before_batch_transfer(batch, dataloader_idx)

    def changed_weights(self) -> Collection[str]:
        """Names of weights within the backbone that a checkpoint holds although the backbone is named: none here."""
        return ()

    def saved_state_dict(self) -> dict[str, Tensor]:
        """All tensors, but of a backbone that is a Hub id or a folder only the `changed_weights`."""
        state = self.state_dict()
        if not isinstance(self.hyperparameters["backbone"], str):
            return state
        changed = {f"backbone.{name}" for name in self.changed_weights()}
        return {key: value for key, value in state.items() if not key.startswith("backbone.") or key in changed}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (b, t, v) of token ids (b, t)."""
        return self.logits(input_ids, attention_mask)

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """What the backbone as it is now says after each token.

        Args:
            options: of its forward.
        Shapes:
            input_ids, attention_mask: (b, t); returns: (b, t, v)
        Raises:
            ValueError: for token ids of another shape, or none.
        """
        if input_ids.ndim != 2 or not input_ids.numel():
            raise ValueError(
                f"input_ids are {tuple(input_ids.shape)}; expected (prompts, positions), at least one each."
            )
        mask = known_mask(input_ids, attention_mask)
        return self.backbone(input_ids, attention_mask=mask, use_cache=False, **options).logits

    def example_inputs(self) -> tuple[Tensor, ...]:
        return (torch.tensor([[1, 2, 3, 4, 5]], device=self.device) % self.backbone.config.vocab_size,)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """What `predict` gives of a batch's prompts, with its "name"."""
        return {"name": batch["name"], **self.predict(batch["input_ids"], batch["attention_mask"])}
