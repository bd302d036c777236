"""Text to prune small decoders by: a generated language, and characters; and the decoders, trained in a minute."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.core import ZooError, seed_from
from zoo.data.prompts import text_of
from zoo.language.llm.languages import train_decoder, word_tokenizer


class MarkovText:
    """Endless text over some symbols in which the next one depends on the last two.

    The distribution after each pair is drawn from a Dirichlet distribution of concentration 0.1: a few symbols each.
    The tokenizer's first two tokens are "<pad>" and "<unk>".

    Args:
        seed: of the chain. symbols: how many, from 2.
    """

    def __init__(self, seed: int = 0, symbols: int = 64):
        generator = torch.Generator().manual_seed(seed_from("markov", seed))
        gamma = torch._standard_gamma(torch.full((symbols, symbols, symbols), 0.1), generator=generator)
        self.odds = gamma / gamma.sum(-1, keepdim=True).clamp_min(1e-30)
        self.odds[gamma.sum(-1) < 1e-30] = 1 / symbols
        self.symbols = symbols
        self.tokenizer = word_tokenizer([f"s{i}" for i in range(symbols)])

    def draw(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Texts as token ids: (count, length)."""
        found = torch.randint(self.symbols, (count, max(length, 2)), generator=generator)
        for t in range(2, length):
            rows = self.odds[found[:, t - 2], found[:, t - 1]]
            found[:, t] = torch.multinomial(rows, 1, generator=generator)[:, 0]
        return found[:, :length] + 2

    def perplexity(self, tokens: int = 50_000, seed: int = 0) -> float:
        """What the chain itself reaches: the least that any model can."""
        generator = torch.Generator().manual_seed(seed_from("markov bound", seed))
        ids = self.draw(64, tokens // 64, generator) - 2
        odds = self.odds[ids[:, :-2], ids[:, 1:-1]].gather(-1, ids[:, 2:, None])
        return float((-odds.clamp_min(1e-30).log().mean()).exp())


def character_tokenizer(symbols: Sequence[str]) -> Any:
    """A tokenizer of transformers of which each of these characters is a token, after "<pad>" and "<unk>"."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    every = ["<pad>", "<unk>", *symbols]
    backend = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(every)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


def pretrain_markov(folder: Path, seed: int, steps: int = 1500, block: int = 64, **sizes: Any) -> None:
    """A decoder of `MarkovText` of that seed, with its tokenizer."""
    text = MarkovText(seed)

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        ids = text.draw(count, block, generator)
        return ids, ids

    train_decoder(folder, seed, text.tokenizer, draw, steps, **sizes)


def pretrain_characters(
    folder: Path, seed: int, root: str, steps: int = 1500, block: int = 64, share: float = 0.9, **sizes: Any
) -> None:
    """A decoder of the characters of a text, ``root``/input.txt, of which the first ``share`` is learnt.

    Raises:
        ZooError: if there is no such file, or hardly any text in it.
    """
    path = Path(root) / "input.txt"
    if not path.is_file():
        raise ZooError(f"{path} is missing: expected a text to train a small decoder on.")
    text = text_of(path)
    tokenizer = character_tokenizer(sorted(set(text)))
    known = torch.tensor(tokenizer(text[: int(share * len(text))])["input_ids"])
    if len(known) <= block:
        raise ZooError(f"{path} has {len(text)} characters, too few for blocks of {block}.")

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(known) - block, (count, 1), generator=generator)
        ids = known[starts + torch.arange(block)]
        return ids, ids

    train_decoder(folder, seed, tokenizer, draw, steps, **sizes)
