"""Pretrained transformers that methods wrap: by Hub id, from a folder, or at random from a config."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from zoo.core import ZooError
from zoo.core.errors import first_line

TASKS = {"causal-lm": "AutoModelForCausalLM", "masked-lm": "AutoModelForMaskedLM", "classification": "AutoModel"}
"""What a backbone is for, and the class of transformers that knows which model that is."""


def build_backbone(
    backbone: str | dict[str, Any], revision: str | None = None, task: str = "causal-lm", dtype: str = "float32"
) -> nn.Module:
    """A transformers model: text encoder or decoder without head, or a causal or masked language model.

    Args:
        backbone: Hub id or local folder (with weights), or a config as a dict with ``model_type`` (random weights).
            With the meta device as torch's default no weights are read.
        revision: commit, tag or branch of a Hub id.
        task: "causal-lm", "masked-lm", or "classification" for a model without head. dtype: "float32" or "bfloat16".
    Raises:
        ZooError: if it cannot be loaded, or the config is not one of transformers, or has no model for the task.
    """
    import transformers
    from transformers import AutoConfig

    try:
        if isinstance(backbone, dict):
            values = dict(backbone)
            config = AutoConfig.for_model(values.pop("model_type", ""), **values)
        else:
            config = AutoConfig.from_pretrained(backbone, revision=revision)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ZooError(
            f"backbone {str(backbone)[:80]!r} is neither a folder, a model on the Hub (offline?) nor a config with a "
            f"model_type that transformers knows: {first_line(error)}"
        ) from error
    encoder = task == "classification" and type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING
    auto: Any = transformers.AutoModelForTextEncoding if encoder else getattr(transformers, TASKS[task])
    if type(config) not in auto._model_mapping:
        raise ZooError(f"transformers has no {auto.__name__} for {config.model_type!r}, which task={task!r} needs.")
    if task == "classification" and not encoder and getattr(config, "is_encoder_decoder", False):
        raise ZooError(
            f"{config.model_type!r} is an encoder-decoder; for classification use T5's family, an encoder or decoder."
        )
    cls = auto._model_mapping[type(config)]
    cls = cls[0] if isinstance(cls, tuple) else cls
    # a pooler that mean pooling does not use would only be weights without gradient
    options = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(cls.__init__).parameters else {}
    if isinstance(backbone, dict) or torch.get_default_device().type == "meta":
        return cls(config, **options).to(getattr(torch, dtype))
    try:
        return cls.from_pretrained(backbone, revision=revision, config=config, dtype=getattr(torch, dtype), **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ZooError(f"backbone {backbone!r} does not load: {first_line(error)}") from error


def config_of(model: nn.Module) -> dict[str, Any]:
    """The config of a live model of transformers as `build_backbone` takes it, without what its weights decide."""
    config: Any = model.config
    left_out = ("transformers_version", "dtype", "architectures")
    kept = {key: value for key, value in config.to_diff_dict().items() if key not in left_out}
    return {**kept, "model_type": config.model_type}


def take_weights(model: nn.Module, source: nn.Module) -> list[str]:
    """Copy a live model's weights into one that was built from its config, beneath peft's adapters where it has some.

    Returns:
        the names of weights that ``model`` has no place for, such as those of a pooler or a head.
    Raises:
        ZooError: if ``source`` lacks a weight.
    """
    plain = {key.replace(".base_layer.", "."): key for key in model.state_dict()}
    state = source.state_dict()
    known = {plain[key]: value for key, value in state.items() if key in plain}
    absent = [key for key in model.load_state_dict(known, strict=False).missing_keys if "lora_" not in key]
    if absent:
        raise ZooError(f"The model lacks {len(absent)} weights of its config's class ({absent[0]}, ...).")
    return [key for key in state if key not in plain]


def known_mask(ids: Tensor, mask: Tensor | None) -> Tensor | None:
    """A mask (b, t) as it is; on the meta device, where transformers could not look into it, one of all pairs.

    Shapes:
        ids: (b, t); returns: (b, t), or on the meta device (b, 1, t, t) bool
    """
    if not ids.is_meta:
        return mask
    return torch.ones(len(ids), 1, ids.shape[1], ids.shape[1], dtype=torch.bool, device="meta")
