"""Tasks that fine-tuned models are merged for: texts of each to calibrate and to score by, generated or from files."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from zoo.core import ZooError, seed_from
from zoo.data.fixed import Fixed
from zoo.data.plain import write_csv
from zoo.data.prompts import OwnPrompts, PromptDataModule, answered, ending, labelled, prompts, questions, replies
from zoo.language.llm.languages import all_right, train_decoder, word_tokenizer

log = logging.getLogger(__name__)

KINDS = ("jsonl", "jsonl.gz", "txt")


class CharacterTasks:
    """Sentences "copy a b c : a b c <end>" of a task, letters and the answer, padded on the left to one length.

    ``copy``; ``reverse``; ``shift``, each letter's next one, the first after the last; ``sort``. A task has letters of
    its own beside those that it shares with its neighbours, as mathematics, code and translations have words.

    Args:
        letters: of each task. shared: how many of them the next task has, too. In all there are up to 26.
        shortest, longest: letters of a prompt.
    """

    TASKS: ClassVar[tuple[str, ...]] = ("copy", "reverse", "shift", "sort")

    def __init__(self, letters: int = 10, shared: int = 5, shortest: int = 3, longest: int = 6):
        self.letters, self.shared, self.shortest, self.longest = letters, shared, shortest, longest
        alphabet = [chr(ord("a") + i) for i in range(letters + (len(self.TASKS) - 1) * (letters - shared))]
        self.tokenizer = word_tokenizer([*alphabet, *self.TASKS, ":", "<end>"])
        self.tokenizer.eos_token = "<end>"
        self._ids = self.tokenizer.get_vocab()

    @property
    def positions(self) -> int:
        """Of a sentence."""
        return 2 * self.longest + 3

    def answer(self, task: str, letters: list[int]) -> list[int]:
        """What a task makes of letters, by number."""
        if task == "shift":
            return [(x + 1) % self.letters for x in letters]
        return {"copy": letters, "reverse": letters[::-1], "sort": sorted(letters)}[task]

    def draw(self, tasks: Sequence[str], generator: torch.Generator) -> dict[str, Any]:
        """A sentence for each of these tasks: "input_ids", "attention_mask", "labels" (n, t), "task", "name"."""
        sizes = torch.randint(self.shortest, self.longest + 1, (len(tasks),), generator=generator).tolist()
        letters = torch.randint(self.letters, (len(tasks), self.longest), generator=generator).tolist()
        width = self.positions
        ids, labels, prompts = [], [], []
        for task, size, row in zip(tasks, sizes, letters, strict=True):
            first = self._ids["a"] + self.TASKS.index(task) * (self.letters - self.shared)
            prompt = [self._ids[task], *(first + x for x in row[:size]), self._ids[":"]]
            answer = [*(first + x for x in self.answer(task, row[:size])), self._ids["<end>"]]
            empty = width - len(prompt) - len(answer)
            ids.append([0] * empty + prompt + answer)
            labels.append([-100] * (empty + len(prompt)) + answer)
            prompts.append(" ".join(self.tokenizer.convert_ids_to_tokens(prompt)))
        found = torch.tensor(ids)
        mask = (found != 0).long()
        return {
            "input_ids": found, "attention_mask": mask, "labels": torch.tensor(labels), "task": list(tasks),
            "name": prompts,
        }  # fmt: skip

    def mixture(self, tasks: Sequence[str], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sentences of these tasks in turn: ids and labels (count, t)."""
        batch = self.draw([tasks[i % len(tasks)] for i in range(count)], generator)
        return batch["input_ids"], batch["labels"]


def pretrain_characters(
    folder: Path,
    seed: int,
    experts: dict[str, int],
    base: float = 0.6,
    base_steps: int = 2000,
    expert_lr: float = 3e-4,
    **sizes: Any,
) -> None:
    """A decoder trained on all tasks, in ``folder/base``, and from it one on each expert's task, ``folder/<task>``.

    Args:
        experts: training steps by task. base: mean accuracy at which the first one stops. base_steps: its most steps.
    """
    language = CharacterTasks()
    check = language.draw(list(language.TASKS) * 64, torch.Generator().manual_seed(seed_from("check", seed)))

    def enough(model: nn.Module) -> bool:
        logits = model(check["input_ids"], attention_mask=check["attention_mask"]).logits
        return float(all_right(logits, check["labels"]).float().mean()) >= base

    def train(name: str, tasks: Sequence[str], number: int, steps: int, **given: Any) -> None:
        train_decoder(
            folder / name, seed_from(number, seed), language.tokenizer,
            lambda count, generator: language.mixture(tasks, count, generator), steps, **given,
        )  # fmt: skip

    train("base", language.TASKS, 0, base_steps, enough=enough, **sizes)
    for number, (task, steps) in enumerate(experts.items(), 1):
        train(task, [task], number, steps, lr=expert_lr, start=folder / "base")


class ModelMergeDataModule(PromptDataModule):
    """Texts of the tasks that models are merged for: some to calibrate by, the others to score by.

    Batches: "input_ids", "attention_mask", "labels" (b, t), labels -100 where nothing is scored; "task" and "name",
    lists of str. Padding is on the left. To predict: "input_ids", "attention_mask", "name".

    root=None: copying, reversing, shifting and sorting letters (`CharacterTasks`), for decoders that
    `pretrain_characters` made.

    root=DIR: for each task a folder DIR/<task> with train.jsonl and test.jsonl, gzipped or not, a line each
    {"question": ..., "answer": ...} as GSM8K's, or train.txt and test.txt with a text a line, which is scored whole.
    Validation texts are val.jsonl's or val.txt's; without such a file those in train after the ones to calibrate by.
    Needs ``tokenizer``.

    A user's own prompts: a text file, one a line, or the field "prompt" of JSON lines, CSV or TSV; the answers are a
    CSV of prompt and answer.

    Args:
        root: folder of the tasks; None for generated ones.
        batch_size: texts a batch. num_workers: processes that load data. seed: of the generated texts.
        tasks: their names; of generated ones "copy", "reverse", "shift", "sort".
        samples: texts of each task to calibrate by. val_samples, test_samples: to score by, at most.
        tokenizer: Hub id or folder of the base's tokenizer; None for the generated tasks'.
        prompt: how a question is put.
        block: tokens of a text at most; longer ones of a task are left out, a longer prompt of the user's is refused.
    Raises:
        FileNotFoundError: if a task has no such file.
        ZooError: for text without tokenizer, a broken line, or a task without a text that fits.
    """

    embedded: ClassVar[str] = "generated tasks on letters"

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        tasks: list[str] = ["copy", "reverse", "shift"],  # noqa: B006 (read only; the command knows no tuple)
        samples: int = 30,
        val_samples: int = 100,
        test_samples: int = 300,
        tokenizer: str | None = None,
        prompt: str = "Question: {question}\nAnswer:",
        block: int = 512,
    ):
        super().__init__(root, batch_size, num_workers, seed)
        self.save_hyperparameters()
        if not tasks or len(set(tasks)) != len(tasks):
            raise ValueError(f"tasks is {tasks}; name each once, and one at least.")
        unknown = [task for task in tasks if task not in CharacterTasks.TASKS]
        if root is None and unknown:
            raise ValueError(f"No generated task {unknown[0]!r}; there are {', '.join(CharacterTasks.TASKS)}.")
        if min(samples, val_samples, test_samples) < 1 or block < 2 or "{question}" not in prompt:
            raise ValueError(
                f"samples={samples}, val_samples={val_samples}, test_samples={test_samples}, block={block}: at least "
                f"1, and a block of 2; prompt={prompt!r} needs {{question}}."
            )

    def describe(self) -> dict[str, Any]:
        return {"tasks": list(self.hparams.tasks)}

    def own_tokenizer(self) -> Any:
        return CharacterTasks().tokenizer

    def build(self) -> dict[str, Dataset]:
        hp = self.hparams
        if self.root is None:
            counts = {"train": hp.samples, "val": hp.val_samples, "test": hp.test_samples}
            sets = {split: self._generated(split, count) for split, count in counts.items()}
            return {**sets, "predict": OwnPrompts(sets["test"].made["name"], self.words, hp.block)}
        parts: dict[str, list[TaskTexts]] = {"train": [], "val": [], "test": []}
        for task in hp.tasks:
            train, test = self._task(task, "train"), self._task(task, "test")
            own = self._path(task, "val") is not None
            val = self._task(task, "val") if own else train.some(hp.samples, hp.samples + hp.val_samples)
            if not own and not len(val):
                log.warning("%s: no texts are left in train to validate by; add val.jsonl or val.txt.", task)
            parts["train"].append(train.some(0, hp.samples))
            parts["val"].append(val.some(0, hp.val_samples))
            parts["test"].append(test.some(0, hp.test_samples))
        joined = {
            split: TaskTexts([row for part in own for row in part.rows], self._pad) for split, own in parts.items()
        }
        asked = [row["prompt"] for row in joined["test"].rows if row["prompt"]]
        sets = {split: own for split, own in joined.items() if len(own)}
        return {**sets, **({"predict": OwnPrompts(asked, self.words, hp.block)} if asked else {})}

    def _generated(self, split: str, count: int) -> Fixed:
        generator = torch.Generator().manual_seed(seed_from("characters", split, self.seed))
        return Fixed(CharacterTasks().draw([task for _ in range(count) for task in self.hparams.tasks], generator))

    # ---- files ------------------------------------------------------------------------------------------------------

    @property
    def _pad(self) -> int:
        return int(self.words.pad_token_id or 0)

    def _path(self, task: str, split: str) -> Path | None:
        assert self.root is not None
        places = [self.root / task / f"{split}.{kind}" for kind in KINDS]
        return next((path for path in places if path.is_file()), None)

    def _task(self, task: str, split: str) -> "TaskTexts":
        """All texts of a task that fit."""
        path = self._path(task, split) or self.need(
            task, f"{split}.jsonl",
            expected=f'a line each {{"question": ..., "answer": ...}}; or {split}.txt with a text a line',
        )  # fmt: skip
        rows = self._whole(task, path) if ending(path) == ".txt" else self._asked(task, path)
        fit = [row for row in rows if len(row["ids"]) <= self.hparams.block]
        if not fit:
            if not rows:
                raise ZooError(f"{path} is empty: expected at least one text of task {task!r}.")
            shortest = min(len(row["ids"]) for row in rows)
            raise ZooError(
                f"{path}: no text of at most block={self.hparams.block} tokens; the shortest has {shortest}. "
                "Raise `block`."
            )
        if len(fit) < len(rows):
            log.info("%s: %d of %d texts are longer than block, and left out.", path, len(rows) - len(fit), len(rows))
        return TaskTexts(fit, self._pad)

    def _whole(self, task: str, path: Path) -> list[dict[str, Any]]:
        """Texts that are scored whole, one a line; what the tokenizer puts before and after a text stays."""
        texts = prompts(path)
        every = self.words(texts, truncation=False, verbose=False)["input_ids"] if texts else []
        return [
            {"task": task, "ids": ids, "labels": ids, "prompt": "", "name": text}
            for text, ids in zip(texts, every, strict=True)
        ]

    def _asked(self, task: str, path: Path) -> list[dict[str, Any]]:
        """Questions of which the answer is scored."""
        rows = questions(path)
        texts = [self.hparams.prompt.format(question=row["question"]) for row in rows]
        pairs = answered(self.words, [(text, row["answer"]) for text, row in zip(texts, rows, strict=True)])
        return [
            {"task": task, "ids": ids, "labels": labels, "prompt": text, "name": row["question"]}
            for text, row, (ids, labels) in zip(texts, rows, pairs, strict=True)
        ]

    # ---- a user's own prompts ---------------------------------------------------------------------------------------

    def write(self, predictions: Iterable[dict[str, Any]], path: Path) -> list[Path]:
        """``predictions.csv``: prompt, answer."""
        rows = (
            pair
            for batch in predictions
            for pair in zip(batch["name"], replies(self.words, batch["tokens"].cpu()), strict=True)
        )
        return write_csv(path, ["prompt", "answer"], rows)


class TaskTexts(Dataset):
    """Texts in tokens, with what of them is scored."""

    def __init__(self, rows: list[dict[str, Any]], pad: int):
        self.rows, self.pad = rows, pad

    def __len__(self) -> int:
        return len(self.rows)

    def some(self, start: int, end: int) -> "TaskTexts":
        """Those from ``start`` to before ``end``."""
        return TaskTexts(self.rows[start:end], self.pad)

    def batch(self, indices: list[int], generator: torch.Generator) -> dict[str, Any]:
        chosen = [self.rows[i] for i in indices]
        return {
            **labelled([(row["ids"], row["labels"]) for row in chosen], self.pad),
            "task": [row["task"] for row in chosen],
            "name": [row["name"] for row in chosen],
        }
