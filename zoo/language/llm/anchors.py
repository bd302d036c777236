"""The direction in which a specialised model's inner state differs from its base's, and what following it does.

Index legend: l layers, b prompts, t positions, d width of the stream, v words, n copies of the prompts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.core.errors import ZooError
from zoo.engines.patching import Anatomy
from zoo.engines.patching.weight_sweeps import Passage, logits_after, record, resumed
from zoo.language.llm.languages import all_right


def prompts_of(batch: dict[str, Any]) -> dict[str, Tensor]:
    """The prompts of a batch alone."""
    return {"input_ids": batch["prompt"], "attention_mask": batch["prompt_mask"]}


def texts_of(batch: dict[str, Any]) -> dict[str, Tensor]:
    """The prompts of a batch with their responses."""
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def last_states(anatomy: Anatomy, batch: dict[str, Any]) -> Tensor:
    """The stream after each layer at the prompts' last token, (l, b, d)."""
    return torch.stack([stream[:, -1] for stream in record(anatomy, prompts_of(batch)).streams[1:]]).float()


def separation(base: Tensor, expert: Tensor) -> Tensor:
    """Area under the curve of telling the expert's values (l, b) from the base's: the chance that its is larger."""
    first, second = expert[:, :, None], base[:, None, :]
    return ((first > second).float() + 0.5 * (first == second).float()).mean((1, 2))


def log_probability(anatomy: Anatomy, passage: Passage, stream: Tensor, labels: Tensor) -> Tensor:
    """Mean log-probability of each row's labels (b, t), by what leaves the last block (n b, t, d): (n b,)."""
    logits = logits_after(anatomy, passage, stream)[:, :-1].float()
    wanted = labels[:, 1:].repeat(len(stream) // len(labels), 1)
    loss = F.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=-100, reduction="none")
    return -loss.sum(1) / (wanted != -100).sum(1).clamp(min=1)


def steered(anatomy: Anatomy, batch: dict[str, Any], difference: Tensor) -> Tensor:
    """How much more probable, in nats a token, responses become by adding to the stream after each layer, (l,).

    What is added is a difference (l, d), at the last prompt token and all that follow.
    """
    passage = record(anatomy, texts_of(batch))
    places = (batch["labels"].roll(-1, 1) != -100)[..., None].to(difference)
    plain = log_probability(anatomy, passage, passage.streams[-1], batch["labels"]).mean()
    found = []
    for layer, change in enumerate(difference):
        stream = passage.streams[layer + 1] + (places * change).to(passage.streams[0])
        stream = resumed(anatomy, passage, layer + 1, stream)
        found.append(log_probability(anatomy, passage, stream, batch["labels"]).mean() - plain)
    return torch.stack(found)


def ended(tokens: Tensor, end: int | list[int] | None) -> Tensor:
    """Which tokens (b, t) come after the first that ends a text."""
    ends = torch.zeros_like(tokens, dtype=torch.bool)
    for token in [] if end is None else end if isinstance(end, list) else [end]:
        ends |= tokens == token
    return (ends.long().cumsum(1) - ends.long()) > 0


@torch.no_grad()
def respond(model: Any, prompt: Tensor, mask: Tensor | None, new_tokens: int) -> Tensor:
    """A model's greedy responses to prompts (b, t), (b, new)."""
    pad = model.config.pad_token_id
    found = model.generate(
        prompt, attention_mask=torch.ones_like(prompt) if mask is None else mask, do_sample=False,
        max_new_tokens=new_tokens, pad_token_id=0 if pad is None else pad,
    )  # fmt: skip
    return found[:, prompt.shape[1] :]


def answered(model: Any, batch: dict[str, Any], new_tokens: int) -> dict[str, Any]:
    """The batch with a model's greedy responses as what is labelled."""
    prompt, new = batch["prompt"], respond(model, batch["prompt"], batch["prompt_mask"], new_tokens)
    over = ended(new, model.config.eos_token_id)
    return {
        **batch,
        "input_ids": torch.cat([prompt, new], 1),
        "attention_mask": torch.cat([batch["prompt_mask"], (~over).long()], 1),
        "labels": torch.cat([torch.full_like(prompt, -100), new.masked_fill(over, -100)], 1),
    }


@torch.no_grad()
def right(model: Any, batch: dict[str, Any], new_tokens: int) -> Tensor:
    """Which prompts (b,) a model answers right: by "labels" all tokens, by "judge" all constraints.

    Raises:
        ZooError: if the batch has neither.
    """
    if "judge" in batch:
        responses = respond(model, batch["prompt"], batch["prompt_mask"], new_tokens)
        over = ended(responses, model.config.eos_token_id)
        texts = [row[~gone].tolist() for row, gone in zip(responses, over, strict=True)]
        return torch.tensor([all(judge(row)) for judge, row in zip(batch["judge"], texts, strict=True)])
    if "labels" not in batch:
        raise ZooError('These prompts have neither responses ("labels") nor constraints ("judge") to be tested by.')
    return all_right(model(**texts_of(batch), use_cache=False).logits, batch["labels"])
