"""Backbones of transformers: by config, from a live model, for each task."""

from typing import Any

import pytest
import torch

from zoo.core import ZooError
from zoo.nn.backbones import build_backbone, config_of, known_mask, take_weights

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
ROBERTA: dict[str, Any] = {
    "model_type": "roberta", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "task", "name"),
    [
        (LLAMA, "causal-lm", "LlamaForCausalLM"),
        (ROBERTA, "masked-lm", "RobertaForMaskedLM"),
        (ROBERTA, "classification", "RobertaModel"),
        (LLAMA, "classification", "LlamaModel"),
    ],
)
def test_each_task_has_its_class(config: dict[str, Any], task: str, name: str) -> None:
    model = build_backbone(config, task=task, dtype="bfloat16")
    assert type(model).__name__ == name and next(model.parameters()).dtype == torch.bfloat16


def test_what_cannot_be_built_is_named() -> None:
    with pytest.raises(ZooError, match="no AutoModelForMaskedLM for 'llama', which task='masked-lm' needs"):
        build_backbone(LLAMA, task="masked-lm")
    with pytest.raises(ZooError, match="nor a config with a model_type that transformers knows"):
        build_backbone({"vocab_size": 3})
    with pytest.raises(ZooError, match="encoder-decoder; for classification use"):
        build_backbone({"model_type": "bart", "d_model": 8}, task="classification")


def test_a_folder_on_the_meta_device_has_sizes_alone(tmp_path: Any) -> None:
    build_backbone(ROBERTA, task="masked-lm").save_pretrained(tmp_path)  # type: ignore[operator]
    with torch.device("meta"):
        model = build_backbone(str(tmp_path), task="masked-lm")
    assert all(p.is_meta for p in model.parameters())
    assert {n: p.shape for n, p in build_backbone(str(tmp_path), task="masked-lm").named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }


def test_a_live_model_is_built_anew_with_its_weights(tmp_path: Any) -> None:
    live: Any = build_backbone(LLAMA)
    live.save_pretrained(tmp_path)
    live = type(live).from_pretrained(tmp_path)  # its config now knows its class, dtype and version
    config = config_of(live)
    assert config["model_type"] == "llama" and not {"dtype", "transformers_version", "architectures"} & config.keys()
    again = build_backbone(config)
    assert take_weights(again, live) == []
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(ids).logits, live(ids).logits)
    trunk = build_backbone(LLAMA, task="classification")
    with pytest.raises(ZooError, match=r"lacks \d+ weights of its config's class"):
        take_weights(again, trunk)
    headless = take_weights(live.model, trunk)
    assert headless == [] and take_weights(trunk, live.model) == []


def test_weights_come_beneath_adapters_and_leave_out_what_has_no_place() -> None:
    peft = pytest.importorskip("peft")
    live, model = build_backbone(LLAMA), build_backbone(LLAMA)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    live.register_parameter("extra", torch.nn.Parameter(torch.ones(2)))
    assert take_weights(model, live) == ["extra"]
    weight = "model.layers.0.self_attn.q_proj.{}weight"
    assert torch.equal(model.get_parameter(weight.format("base_layer.")), live.get_parameter(weight.format("")))


def test_a_mask_is_made_up_on_the_meta_device_only() -> None:
    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3)
    assert known_mask(ids, mask) is mask and known_mask(ids, None) is None
    made = known_mask(ids.to("meta"), None)
    assert made is not None and made.is_meta and made.shape == (2, 1, 3, 3)
