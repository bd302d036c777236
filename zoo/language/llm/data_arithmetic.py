"""Prompts that ask for a calculation, and their counterfactual ones: generated words, natural templates, GSM8K."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from zoo.core import ZooError
from zoo.data.plain import write_csv
from zoo.data.prompts import PromptDataModule, answered, labelled, questions
from zoo.language.llm.languages import ArithmeticLanguage

TEMPLATES = {
    "+": (("{a} + {b} =", "{a} , {b} ="), ("The sum of {a} and {b} is", "The pair of {a} and {b} is")),
    "-": (("{a} - {b} =", "{a} , {b} ="), ("The difference of {a} and {b} is", "The pair of {a} and {b} is")),
    "*": (("{a} * {b} =", "{a} , {b} ="), ("The product of {a} and {b} is", "The pair of {a} and {b} is")),
    "/": (("{a} / {b} =", "{a} , {b} ="), ("The ratio of {a} and {b} is", "The pair of {a} and {b} is")),
}
"""By operation: pairs of a prompt and the same without the cue to calculate."""


class ArithmeticPromptDataModule(PromptDataModule):
    """Sums to find heads by, to tune on and to test on, and another ability beside them.

    Training batches: "input_ids", "attention_mask", "labels" (b, t), labels -100 where nothing is learnt; "reference",
    "counterfactual", "reference_mask" (b, u) and "answer" (b,), see `HeadTuner`. Test batches of the generated language
    have besides "cues" (b, u) bool, operands and operator of the reference, and "other_input_ids",
    "other_attention_mask", "other_labels" (b, t), and "name". Padding is on the left. To predict: "input_ids",
    "attention_mask", "name".

    root=None: sums modulo ``modulus``, beside copying and reversing (`ArithmeticLanguage`); for a decoder that
    `pretrain_arithmetic` made.

    root=DIR: DIR/train.jsonl and DIR/test.jsonl of GSM8K ({"question", "answer"} a line, gzipped or not) to tune on and
    to test on; heads are found by prompts from templates, with operands up to ``largest``. Needs ``tokenizer``. MIT.

    A user's own prompts: a text file, one a line, or the field "prompt" of JSON lines, CSV or TSV; the answers are a
    CSV of prompt, answer, probability.

    Args:
        root: folder of GSM8K; None for the generated language.
        batch_size: prompts a batch. num_workers: processes that load data. seed: of the draws.
        modulus: of the generated sums. length: training sentences an epoch.
        tokenizer: Hub id or folder of the backbone's tokenizer; None for the generated language's.
        operations: of prompts from templates: "+", "-", "*", "/".
        largest: operands go up to it. block: tokens of a text at most; longer ones of GSM8K are left out, a longer
            prompt of the user's is refused.
    Raises:
        FileNotFoundError: if a file is missing.
        ZooError: for text without tokenizer, a broken line, a prompt that does not fit, or templates that this
            tokenizer does not split alike.
    """

    embedded: ClassVar[str] = "sums in a generated language"

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        modulus: int = 20,
        length: int = 4096,
        tokenizer: str | None = None,
        operations: list[str] = ["+", "-", "*", "/"],  # noqa: B006 (read only; the command knows no tuple)
        largest: int = 99,
        block: int = 256,
    ):
        super().__init__(root, batch_size, num_workers, seed)
        self.save_hyperparameters()
        unknown = [name for name in operations if name not in TEMPLATES]
        if unknown or not operations:
            raise ValueError(f"operations is {operations}; any of {', '.join(TEMPLATES)}.")
        if modulus < 2 or length < 1 or largest < 1 or block < 8:
            raise ValueError(f"modulus={modulus}, length={length}, largest={largest}, block={block}: out of range.")

    def own_tokenizer(self) -> Any:
        return ArithmeticLanguage(self.hparams.modulus).tokenizer

    def build(self) -> dict[str, Dataset]:
        hp = self.hparams
        if self.root is None:
            language = ArithmeticLanguage(hp.modulus)
            return {
                "train": GeneratedSums(language, hp.length, test=False),
                "val": GeneratedSums(language, hp.modulus**2, test=True),
                "test": GeneratedSums(language, hp.modulus**2, test=True),
            }
        prompts = Prompts(self.words, hp.operations, hp.largest)
        sets: dict[str, Dataset] = {}
        for split in ("train", "test"):
            sets[split] = Solutions(self._lines(split), self.words, prompts, hp.block)
        return sets

    def _lines(self, split: str) -> list[tuple[str, str]]:
        assert self.root is not None
        packed = self.root / f"{split}.jsonl.gz"
        path = packed if packed.is_file() else self.need(
            f"{split}.jsonl", expected='GSM8K, a line each: {"question": ..., "answer": ...}',
            get="https://github.com/openai/grade-school-math has it.",
        )  # fmt: skip
        return [(row["question"], row["answer"]) for row in questions(path)]

    def write(self, predictions: Iterable[dict[str, Any]], path: Path) -> list[Path]:
        """``predictions.csv``: prompt, answer, probability."""
        rows = (
            (name, self.words.decode([token]).strip(), f"{p:.6f}")
            for batch in predictions
            for name, token, p in zip(
                batch["name"], batch["token"].tolist(), batch["probability"].tolist(), strict=True
            )
        )
        return write_csv(path, ["prompt", "answer", "probability"], rows)


class GeneratedSums(Dataset):
    """Sums of the generated language: random ones to train on, every one to test on."""

    def __init__(self, language: ArithmeticLanguage, length: int, test: bool):
        self.language, self.length, self.test = language, length, test

    def __len__(self) -> int:
        return self.length

    def batch(self, indices: list[int], generator: torch.Generator) -> dict[str, Any]:
        language, n = self.language, len(indices)
        if self.test:
            a, b = (side[indices] for side in language.all_sums())
        else:
            a, b = torch.randint(language.modulus, (2, n), generator=generator)
        prompt, answer = language.sums(a, b)
        ids, labels = language.answered(prompt, answer[:, None])
        found = {
            "input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels, "reference": prompt,
            "counterfactual": language.sums(a, b, "&")[0], "reference_mask": torch.ones_like(prompt), "answer": answer,
        }  # fmt: skip
        if self.test:
            other, wanted = language.draw_others(n, generator)
            found |= {"other_input_ids": other, "other_attention_mask": (other != 0).long(), "other_labels": wanted}
            found["cues"] = torch.tensor([True, True, True, False]).expand(n, -1)
            found["name"] = language.tokenizer.batch_decode(prompt)
        return found


class Prompts:
    """Prompts from templates, their counterfactuals token by token beside them, and answers of one token.

    Raises:
        ZooError: if hardly any survives this tokenizer.
    """

    def __init__(self, tokenizer: Any, operations: list[str], largest: int):
        self.rows: dict[int, list[tuple[list[int], list[int], int]]] = {}
        numbers, step = list(range(largest + 1)), max(largest // 24, 1)
        for name in operations:
            for first, second in TEMPLATES[name]:
                every = ((a, b, _result(a, b, name)) for a in numbers[::step] for b in numbers[1::step])
                pairs = [(a, b, c) for a, b, c in every if c is not None and 0 <= c <= largest]
                self._add(tokenizer, pairs, first, second)
        self.lengths = [length for length, rows in self.rows.items() if len(rows) >= 16]
        if not self.lengths:
            raise ZooError(
                "No template is split alike with and without its cue, with an answer of one token, by this tokenizer."
            )

    def _add(self, tokenizer: Any, pairs: list[tuple[int, int, int]], first: str, second: str) -> None:
        texts = [[form.format(a=a, b=b) for a, b, _ in pairs] for form in (first, second)]
        ids = [tokenizer(part)["input_ids"] for part in texts]
        full = tokenizer([f"{text} {c}" for text, (_, _, c) in zip(texts[0], pairs, strict=True)])["input_ids"]
        for reference, other, whole in zip(*ids, full, strict=True):
            if len(reference) == len(other) and whole[:-1] == reference and reference != other:
                self.rows.setdefault(len(reference), []).append((reference, other, whole[-1]))

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Pairs of one length."""
        length = self.lengths[int(torch.randint(len(self.lengths), (), generator=generator))]
        rows = self.rows[length]
        chosen = [rows[i] for i in torch.randint(len(rows), (count,), generator=generator).tolist()]
        reference, other, answer = (torch.tensor(part) for part in zip(*chosen, strict=True))
        return {
            "reference": reference,
            "counterfactual": other,
            "reference_mask": torch.ones_like(reference),
            "answer": answer,
        }


def _result(a: int, b: int, operation: str) -> int | None:
    if operation == "/":
        return a // b if b and a % b == 0 else None
    return {"+": a + b, "-": a - b, "*": a * b}[operation]


class Solutions(Dataset):
    """GSM8K's questions with their solutions as text to tune on, and prompts from templates beside them."""

    def __init__(self, lines: list[tuple[str, str]], tokenizer: Any, prompts: Prompts, block: int):
        self.prompts, self.pad = prompts, tokenizer.pad_token_id
        every = answered(tokenizer, [(f"Question: {question}\nAnswer:", answer) for question, answer in lines])
        self.items = [item for item in every if len(item[0]) <= block]
        if not every:
            raise ZooError("GSM8K's file is empty: expected a question and an answer a line.")
        if not self.items:
            shortest = min(len(ids) for ids, _ in every)
            raise ZooError(f"No text fits into block={block} tokens; the shortest has {shortest}. Raise `block`.")

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, indices: list[int], generator: torch.Generator) -> dict[str, Any]:
        chosen = [self.items[i] for i in indices]
        return {**labelled(chosen, self.pad), **self.prompts.draw(len(indices), generator)}
