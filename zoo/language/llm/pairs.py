"""Are these models a base and one specialised from it? Only then do weights of one fit into the other."""

import logging
from pathlib import Path
from typing import Any

from torch import nn

from zoo.core.errors import ZooError
from zoo.engines.patching import same_shape

log = logging.getLogger(__name__)

HARMLESS = (
    "_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "max_position_embeddings", "initializer_range", "pretraining_tp", "vocab_size",
    "tie_word_embeddings", "attention_dropout", "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop",
    "task_specific_params",
)  # fmt: skip
"""Entries of a config that may differ between base and expert: shapes are compared by the parameters themselves."""
WORDS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""A folder with a tokenizer has one of these."""


def refuse_strangers(base: nn.Module, expert: nn.Module) -> None:
    """Make sure that two live models are a pair: one architecture, one vocabulary, the same parameters, all finite.

    Raises:
        ZooError: naming the first difference.
    """
    same_config(base.config, expert.config)
    same_vocabulary(base, expert)
    same_shape(base, expert)


def same_config(base: Any, expert: Any) -> None:
    """Make sure that two models compute alike.

    Raises:
        ZooError: naming the first entry that differs.
    """
    ours, theirs = base.to_dict(), expert.to_dict()
    for name in sorted({*ours, *theirs} - set(HARMLESS), key=lambda name: name != "model_type"):
        if ours.get(name) != theirs.get(name):
            raise ZooError(
                f"Base and expert are no pair: {name} is {ours.get(name)} in the base and {theirs.get(name)} in the "
                "expert. The expert must be specialised from this base."
            )


def same_vocabulary(base: nn.Module, expert: nn.Module) -> None:
    """Make sure that two models have as many tokens.

    Raises:
        ZooError: saying how many either has.
    """
    ours, theirs = (m.get_input_embeddings().weight.shape[0] for m in (base, expert))  # type: ignore[operator]
    if ours != theirs:
        raise ZooError(
            f"The expert's embeddings are resized: {theirs} tokens, the base's has {ours}. Resize them back "
            "(resize_token_embeddings), or give a base with the same tokens."
        )


def tokenizer_at(place: Any, revision: str | None = None) -> Any:
    """The tokenizer of a folder or Hub id; None where there is none, as for a config."""
    from transformers import AutoTokenizer

    if not isinstance(place, str | Path):
        return None
    if Path(place).is_dir() and not any((Path(place) / name).is_file() for name in WORDS):
        return None
    try:
        return AutoTokenizer.from_pretrained(place, revision=revision)
    except (OSError, ValueError, KeyError):
        return None


def same_tokenizer(base: Any, expert: Any, revisions: tuple[str | None, str | None] = (None, None)) -> None:
    """Make sure that two saved models read alike; where one has no tokenizer that is taken for granted, and said.

    Args:
        base, expert: folders or Hub ids. revisions: of both.
    Raises:
        ZooError: naming a word that is another token in the other's tokenizer.
    """
    first, second = (tokenizer_at(*one) for one in zip((base, expert), revisions, strict=True))
    if first is None or second is None:
        log.warning(
            "%s has no tokenizer to compare: I take it that they read alike.", base if first is None else expert
        )
        return
    ours, theirs = first.get_vocab(), second.get_vocab()
    if ours == theirs:
        return
    word = next(word for word in sorted({*ours, *theirs}) if ours.get(word) != theirs.get(word))
    raise ZooError(
        f"Base and expert have other tokenizers: {word!r} is token {ours.get(word, 'none')} in {str(base)!r} and "
        f"{theirs.get(word, 'none')} in {str(expert)!r}."
    )
