"""`CausalLMModule`: live models, what checkpoints hold, and the check of token ids."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from zoo.core import ZooError
from zoo.engines.patching import CausalLMModule
from zoo.nn.backbones import build_backbone

TINY: dict[str, Any] = {
    "model_type": "gpt2", "vocab_size": 16, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


class Wrapped(CausalLMModule):
    """A language model as it is."""

    variants: ClassVar[dict[str, dict[str, Any]]] = {"tiny": {"backbone": TINY}}

    def __init__(self, backbone: str | dict[str, Any] = "openai-community/gpt2", kept: str = ""):
        super().__init__()
        self.save_hyperparameters()
        self.backbone = build_backbone(backbone)
        self.register_buffer("own", torch.zeros(1))

    def changed_weights(self) -> list[str]:
        kept = self.hyperparameters["kept"]
        return [name for name in self.backbone.state_dict() if kept and kept in name]


def test_a_live_model_says_what_it_said() -> None:
    live: Any = build_backbone(TINY).eval()
    model = Wrapped.from_backbone(live).eval()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids), live(ids).logits)
    assert len(model.saved_state_dict()) == 1 + len(live.state_dict()), "its weights are saved with ours"
    live.register_parameter("extra", torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(ZooError, match=r"has 1 weights that its config knows nothing of \(extra"):
        Wrapped.from_backbone(live)


def test_of_a_named_model_only_what_changed_is_saved(tmp_path: Path) -> None:
    build_backbone(TINY).save_pretrained(tmp_path)  # type: ignore[operator]
    assert list(Wrapped(str(tmp_path)).saved_state_dict()) == ["own"]
    found = Wrapped(str(tmp_path), kept="h.1.mlp").saved_state_dict()
    assert set(found) == {"own", *(f"backbone.transformer.h.1.mlp.{n}" for n in (
        "c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias"
    ))}  # fmt: skip


def test_parts_are_those_of_the_backbone_as_it_is() -> None:
    model = Wrapped.from_variant("tiny")
    first = model.anatomy
    assert model.anatomy is first and len(first.layers) == 2
    model.backbone = build_backbone({**TINY, "n_layer": 1})
    assert len(model.anatomy.layers) == 1


@pytest.mark.parametrize("shape", [(3,), (0, 3), (1, 0), (1, 2, 3)])
def test_token_ids_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(prompts, positions\), at least one each"):
        Wrapped.from_variant("tiny")(torch.ones(shape, dtype=torch.long))


def test_examples_are_words_of_the_model() -> None:
    model = Wrapped.from_variant("tiny")
    (ids,) = model.example_inputs()
    assert model(ids).shape == (1, 5, 16) and int(ids.max()) < 16
