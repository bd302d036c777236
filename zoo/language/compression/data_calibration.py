"""Blocks of text for language models: to calibrate them by, and to measure their perplexity on."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from zoo.core import ZooError, seed_from
from zoo.data.plain import write_csv
from zoo.data.prompts import PromptDataModule, broken, ending, records, text_of
from zoo.language.compression.texts import MarkovText

SPLITS = {"train": ("train",), "val": ("val", "valid", "validation", "dev"), "test": ("test",)}
ENDINGS = (".txt", ".jsonl")


class LMCalibrationDataModule(PromptDataModule):
    """Blocks of token ids. Batch: "input_ids" (b, t) int64; "attention_mask" (b, t), 0 at padding; "name": list[str].

    root=None: text over 64 symbols in which the next one depends on the last two (`MarkovText` of ``seed``): ``tokens``
    to calibrate by, a tenth as many to validate and to test on, each. For a decoder of `pretrain_markov`.

    root=DIR: text files (.txt, a document each) and JSON lines (.jsonl, {"text": ...} a document), in DIR and below.
    Where names say train, val or test (train.txt, wiki.test.jsonl) these are the splits. Else, as in Tiny Shakespeare
    (DIR/input.txt), the first 90 % of the text are to calibrate by; the last 10 % to validate and to test on. Documents
    are joined with two newlines, tokenized without special tokens, and cut; what is left at the end is dropped. Needs
    ``tokenizer``.

    A user's own text: a file or folder of that kind, document by document; the last block of each is padded on the
    right. The answers are a CSV of name, nll (nats a token), perplexity.

    Args:
        root: folder of text; None for the generated language.
        batch_size: blocks a batch. num_workers: processes that load data.
        seed: of the generated language and the order.
        block: tokens of a block, from 2.
        tokens: of the generated language's training text.
        tokenizer: Hub id or folder of the model's tokenizer; None for the generated language's.
    Raises:
        FileNotFoundError: if the folder has no text.
        ZooError: for text without tokenizer, lines that are no JSON, or less text than a block.
    """

    embedded: ClassVar[str] = "text over 64 symbols from a Markov chain of order 2"
    unit: ClassVar[str] = "block"

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        block: int = 64,
        tokens: int = 200_000,
        tokenizer: str | None = None,
    ):
        super().__init__(root, batch_size, num_workers, seed)
        self.save_hyperparameters()
        if block < 2 or tokens < 10 * block:
            raise ValueError(f"block={block}, tokens={tokens}: at least 2 tokens a block, and 10 blocks.")

    def own_tokenizer(self) -> Any:
        return MarkovText(self.seed).tokenizer

    def build(self) -> dict[str, Dataset]:
        block = self.hparams.block
        if self.root is None:
            return self._generated(block)
        files = self._files(self.root)
        named = {split: [f for f in files if _named(f, words)] for split, words in SPLITS.items()}
        if named["train"] and named["test"]:
            texts = {split: self._joined(own) for split, own in named.items() if own}
        else:
            text = self._joined(files)
            cut = int(0.9 * len(text))
            texts = {"train": text[:cut], "val": text[cut:], "test": text[cut:]}
        return {split: TextBlocks(self._cut(text, split), split) for split, text in texts.items()}

    def _generated(self, block: int) -> dict[str, Dataset]:
        text = MarkovText(self.seed)
        found: dict[str, Dataset] = {}
        for split, share in (("train", 1.0), ("val", 0.1), ("test", 0.1)):
            generator = torch.Generator().manual_seed(seed_from("markov text", self.seed, split))
            count = math.ceil(share * self.hparams.tokens / block)
            found[split] = TextBlocks(text.draw(count, block, generator), split)
        return found

    def _cut(self, text: str, split: str) -> Tensor:
        block = self.hparams.block
        ids = self.words(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) < block:
            raise ZooError(
                f"{self.root}: the {split} text has {len(ids)} tokens, less than a block of {block}. Give more text, "
                "or a smaller `block`."
            )
        return torch.tensor(ids[: len(ids) // block * block]).view(-1, block)

    # ---- files ----------------------------------------------------------------------------------------------------

    def _files(self, path: Path) -> list[Path]:
        found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in ENDINGS)
        if not found:
            raise FileNotFoundError(f"{path} has no text: expected {self.layout()}")
        return found

    def _joined(self, files: list[Path]) -> str:
        return "\n\n".join(text for file in files for _, text in documents(file))

    def read(self, path: Path) -> Dataset:
        """A text file, JSON lines, or a folder of them."""
        rows, names = [], []
        for file in self._files(path):
            try:
                every = list(documents(file))
            except ZooError as error:
                self.skip(file, error)
                continue
            self.check_words([text for _, text in every])
            for name, text in every:
                ids = self.words(text, add_special_tokens=False, verbose=False)["input_ids"]
                parts = [ids[i : i + self.hparams.block] for i in range(0, len(ids), self.hparams.block)]
                parts = [part for part in parts if len(part) > 1]
                rows += parts
                names += [name if len(parts) == 1 else f"{name}:{i}" for i in range(len(parts))]
        return Padded(rows, names)

    def write(self, predictions: Iterable[dict[str, Any]], path: Path) -> list[Path]:
        """``predictions.csv``: name, nll, perplexity."""
        rows = (
            (name, f"{nll:.6f}", f"{perplexity:.6g}")
            for batch in predictions
            for name, nll, perplexity in zip(
                batch["name"], batch["nll"].tolist(), batch["perplexity"].tolist(), strict=True
            )
        )
        return write_csv(path, ["name", "nll", "perplexity"], rows)


def _named(file: Path, words: tuple[str, ...]) -> bool:
    """Whether a file's name says that it is of a split: a part of it is that word."""
    return bool(set(file.stem.lower().replace("-", ".").replace("_", ".").split(".")) & set(words))


def documents(file: Path) -> Iterator[tuple[str, str]]:
    """The documents of a file, with names: of a .jsonl a line each, else the whole.

    Raises:
        ZooError: for a line that is no {"text": ...}, or a file that is no text in UTF-8.
    """
    if ending(file) != ".jsonl":
        yield file.name, text_of(file)
        return
    for number, row in records(file, '{"text": ...}'):
        if row.get("text") is None:
            raise broken(file, number, '{"text": ...}', row)
        yield f"{file.name}#{number}", str(row["text"])


class TextBlocks(Dataset):
    """Blocks of one length (n, t)."""

    def __init__(self, ids: Tensor, split: str):
        self.ids, self.split = ids, split

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: list[int], generator: torch.Generator) -> dict[str, Any]:
        ids = self.ids[indices]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "name": [f"{self.split}:{i}" for i in indices],
        }


class Padded(Dataset):
    """A user's texts, padded on the right to the longest of a batch."""

    def __init__(self, rows: list[list[int]], names: list[str]):
        self.rows, self.names = rows, names

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: list[int], generator: torch.Generator) -> dict[str, Any]:
        rows = [torch.tensor(self.rows[i]) for i in indices]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = (torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "name": [self.names[i] for i in indices]}
