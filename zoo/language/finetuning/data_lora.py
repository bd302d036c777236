"""Texts with labels for fine-tuning: public sentence sets as they are on disk, a user's own CSV, a toy language."""

import csv
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from zoo.core import ZooDataModule, ZooError, atomic_write, seed_from
from zoo.data.prompts import RECORDS, broken, ending, lines, records, text_of

log = logging.getLogger(__name__)

TEXT_NAMES = ("text", "sentence", "content", "review", "question")
LABEL_NAMES = ("label", "labels", "class", "category", "target")
SPLITS = {"train": ("train",), "val": ("dev", "val", "valid", "validation"), "test": ("test",)}

DIALECTS = ("home", "away")


class Texts(Dataset):
    """Texts with or without labels. Items: "text": str, "name": str, and "label": int where there are labels."""

    def __init__(self, texts: list[str], labels: list[int] | None, names: list[str]):
        self.texts, self.labels, self.names = texts, labels, names

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {"text": self.texts[index], "name": self.names[index]}
        return item if self.labels is None else {**item, "label": self.labels[index]}


class ToyLanguage:
    """A generated language of two dialects, in which the same words stand for other topics.

    A text has ``length`` words: four of its own topic, two of any, the rest fillers, shuffled; its class is its topic.
    Each of ``topics`` topics has ``synonyms`` words. At "home" these are one partition of the words, "away" another,
    independent one. A model that knows home is near chance away and must learn which words now go together; that
    change of its first layers has low rank: one direction a topic, each a sum over that topic's words.

    Args:
        seed: of the spelling of the words and of the two partitions; texts draw from seeds of their own.
    """

    def __init__(self, seed: int = 0, topics: int = 4, synonyms: int = 12, fillers: int = 24, length: int = 12):
        self.topics, self.length = topics, length
        generator = torch.Generator().manual_seed(seed_from("toy language", seed))
        syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
        words: dict[str, None] = {}
        while len(words) < topics * synonyms + fillers:
            parts = torch.randint(len(syllables), (3,), generator=generator).tolist()
            words["".join(syllables[i] for i in parts)] = None
        self.vocabulary = list(words)
        self.fillers = self.vocabulary[topics * synonyms :]
        self.words: dict[str, list[list[str]]] = {}
        for dialect in DIALECTS:
            order = torch.randperm(topics * synonyms, generator=generator).tolist()
            parts = [order[k * synonyms : (k + 1) * synonyms] for k in range(topics)]
            self.words[dialect] = [[self.vocabulary[i] for i in part] for part in parts]

    def texts(self, dialect: str, count: int, seed: int) -> tuple[list[str], list[int]]:
        """``count`` texts of a dialect ("home" or "away") and their topics (0..topics-1)."""
        generator = torch.Generator().manual_seed(seed_from("toy texts", seed))
        words = self.words[dialect]

        def draw(limit: int) -> int:
            return int(torch.randint(limit, (), generator=generator))

        texts, labels = [], []
        for _ in range(count):
            label = draw(self.topics)
            topics = [label] * 4 + [draw(self.topics) for _ in range(2)]
            text = [words[k][draw(len(words[k]))] for k in topics]
            text += [self.fillers[draw(len(self.fillers))] for _ in range(self.length - len(text))]
            order = torch.randperm(self.length, generator=generator).tolist()
            texts.append(" ".join(text[i] for i in order))
            labels.append(label)
        return texts, labels


class LoRAFinetuneDataModule(ZooDataModule):
    """Texts and their classes. Batch: "text": list[str]; "label": (b,) int64 in [0, classes); "name": list[str].

    root=None: a generated language (see `ToyLanguage`) with 4 classes, 512/128/256 texts, in its dialect "away".

    root=DIR: files whose names contain train, dev or val, and test, such as the original
    ``stsa.binary.{train,dev,test}`` (SST-2), ``TREC.{train,test}.all`` or your own ``train.csv``, ``val.csv``,
    ``test.csv``; or one file alone, such as ``rt-polarity.all`` or ``reviews.csv``, cut 80/10/10 by the seed. Each is
    ``label sentence`` lines (any other ending), a CSV or TSV with the header columns text and label (sentence is known
    too), or JSONL with these keys.

    UTF-8, and latin-1 where that fails. A missing val is a tenth of train, a missing test a tenth more, both by the
    seed. Classes are the train labels in order (as numbers where all are). A file may be given as ``root`` itself.
    Your own texts to predict on: a text file with a sentence a line, CSV/TSV/JSONL with a text
    column, or a folder of these; predictions are a CSV with text, label, probability.

    The sentence sets are research benchmarks whose sources state no licence.

    Args:
        root: folder (or one CSV, TSV, JSONL or text file); None serves the generated language.
        batch_size: texts a batch.
        num_workers: processes that load data.
        seed: of the generated language, the order and the cuts.
        text_column: column or key of the text; None finds text, sentence, content, review or question.
        label_column: column or key of the class; None finds label, labels, class, category or target.
        train_size: use only this many training texts, drawn by the seed (0: all).
        fold: which tenth is the test set where one file holds everything, 0..9; the next tenth is val.
        dialect: of the generated language: "away" or "home".
        task: "classification" needs labels; "causal-lm" takes texts without (a plain .txt is cut into blocks).
        block: characters of a text that a plain .txt is cut into for ``task="causal-lm"``.
    Raises:
        FileNotFoundError: if ``root`` or its train file is missing.
        ZooError: if a file has no such column, a line has no label, or a label is not among those of train.
    """

    embedded = "a generated language with 4 classes (512 training texts)"

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        text_column: str | None = None,
        label_column: str | None = None,
        train_size: int = 0,
        fold: int = 0,
        dialect: str = "away",
        task: str = "classification",
        block: int = 256,
    ):
        file = Path(root).expanduser() if root is not None else None
        self.file = file if file is not None and file.is_file() else None
        super().__init__(str(file.parent) if self.file and file else root, batch_size, num_workers, seed)
        self.save_hyperparameters()
        if dialect not in DIALECTS:
            raise ValueError(f"dialect is {dialect!r}; the generated language has 'home' and 'away'.")
        if task not in ("classification", "causal-lm"):
            raise ValueError(f"task is {task!r}; it must be 'classification' or 'causal-lm'.")
        if not 0 <= fold <= 9 or train_size < 0 or block < 1:
            raise ValueError(f"fold is {fold} (0..9), train_size {train_size} (0 or more), block {block} (1 or more).")
        self.columns = (text_column, label_column)
        self.train_size, self.fold, self.dialect, self.task, self.block = train_size, fold, dialect, task, block
        self.classes: list[str] = []

    # ---- datasets -----------------------------------------------------------------------------------------------

    def build(self) -> dict[str, Dataset]:
        if self.root is None:
            return self._generated()
        found = {"train": [self.file]} if self.file else self._find()
        rows = {split: [row for path in paths for row in self._rows(path)] for split, paths in found.items()}
        if "test" not in rows:
            rows["train"], rows["test"] = self._cut(rows["train"], self.fold, of=10)
        if "val" not in rows:  # a tenth of what was there, also where a tenth is gone to test
            rows["train"], rows["val"] = self._cut(rows["train"], self.fold + 1, of=10 if "test" in found else 9)
        if self.train_size:
            order = torch.randperm(len(rows["train"]), generator=self._generator("train_size")).tolist()
            rows["train"] = [rows["train"][i] for i in order[: self.train_size]]
        if self.task == "causal-lm":
            return {
                split: Texts([t for t, _, _ in part], None, [n for _, _, n in part]) for split, part in rows.items()
            }
        self.classes = _classes(label for _, label, _ in rows["train"])
        return {split: self._labelled(split, part) for split, part in rows.items()}

    def describe(self) -> dict[str, Any]:
        """``num_classes`` and the names of the ``classes``, as the model calls them."""
        if self.task == "causal-lm":
            return {"task": self.task}
        self.setup()
        return {"num_classes": len(self.classes), "classes": self.classes}

    def _generator(self, *what: object) -> torch.Generator:
        return torch.Generator().manual_seed(seed_from(self.seed, *what))

    def _generated(self) -> dict[str, Dataset]:
        language = ToyLanguage(self.seed)
        self.classes = [f"topic{k}" for k in range(language.topics)]
        sets: dict[str, Dataset] = {}
        for split, count in (("train", self.train_size or 512), ("val", 128), ("test", 256)):
            texts, labels = language.texts(self.dialect, count, seed_from(self.seed, split))
            kept = None if self.task == "causal-lm" else labels
            sets[split] = Texts(texts, kept, [f"{split}:{i + 1}" for i in range(count)])
        return sets

    def _find(self) -> dict[str, list[Path]]:
        """The files of each split by their names."""
        assert self.root is not None
        files = [
            p for p in sorted(self.root.iterdir()) if p.is_file() and not p.name.lower().startswith(("readme", "."))
        ]
        found: dict[str, list[Path]] = {}
        for split, words in SPLITS.items():
            named = [p for p in files if set(words) & set(_words(p.name))]
            if named:
                found[split] = named[:1]
                if len(named) > 1:
                    raise ZooError(
                        f"{self.root} has {len(named)} files for {split} ({named[0].name}, {named[1].name}): "
                        "give each set a folder of its own, or one file as root."
                    )
        if "train" not in found and len(files) == 1:
            found = {"train": files}
        if "train" not in found:
            raise FileNotFoundError(f"{self.root} has no file with 'train' in its name: expected {self.layout()}")
        return found

    def _cut(self, rows: list[Any], tenth: int, of: int) -> tuple[list[Any], list[Any]]:
        """(the rest, one part of ``of``): the order follows from the seed alone, the part from the fold."""
        if len(rows) < 10:
            raise ZooError(f"{self.root}: {len(rows)} rows are too few to cut a held-out tenth from; give at least 10.")
        order = torch.randperm(len(rows), generator=self._generator("cut", of)).tolist()
        tenth %= of
        part = set(order[tenth * len(rows) // of : (tenth + 1) * len(rows) // of])
        return [r for i, r in enumerate(rows) if i not in part], [r for i, r in enumerate(rows) if i in part]

    def _labelled(self, split: str, rows: list[tuple[str, str | None, str]]) -> Texts:
        index = {name: i for i, name in enumerate(self.classes)}
        labels = []
        for _, label, name in rows:
            if label is None and split == "test":
                raise ZooError(f"{name}: the test file has no labels, so nothing can be scored. Predict on it instead.")
            if label not in index:
                raise ZooError(
                    f"{name}: the label {label!r} of the {split} set is not among the {len(index)} classes of train "
                    f"({', '.join(self.classes[:8])}{', ...' if len(index) > 8 else ''})."
                )
            labels.append(index[label])
        return Texts([t for t, _, _ in rows], labels, [n for _, _, n in rows])

    # ---- files --------------------------------------------------------------------------------------------------

    def _rows(self, path: Path, labelled: bool = True) -> list[tuple[str, str | None, str]]:
        """(text, label or None, "file:line") of each row."""
        labelled = labelled and self.task == "classification"
        if ending(path) in RECORDS:
            return self._fields(path, labelled)
        if labelled:
            return self._labelled_lines(path)
        if self.task == "causal-lm":
            text = text_of(path, latin=True).removesuffix("\n")
            parts = ((text[i : i + self.block], i) for i in range(0, len(text), self.block))
            return [(part, None, f"{path.name}:{i}") for part, i in parts if part.strip()]
        return [(line.strip(), None, f"{path.name}:{number}") for number, line in lines(path, latin=True)]

    def _labelled_lines(self, path: Path) -> list[tuple[str, str | None, str]]:
        """Lines of a label and a sentence."""
        rows: list[tuple[str, str | None, str]] = []
        for number, line in lines(path, latin=True):
            label, _, text = line.strip().partition(" ")
            if not text.strip():
                raise broken(path, number, "'label sentence'", line.strip())
            rows.append((text.strip(), label, f"{path.name}:{number}"))
        return rows

    def _fields(self, path: Path, labelled: bool) -> list[tuple[str, str | None, str]]:
        """The fields of text and label of a table or of JSON lines."""
        rows: list[tuple[str, str | None, str]] = []
        for number, row in records(path, "an object with text and label", latin=True):
            text, label = self._pick(path, list(row), labelled)
            value, given = (None if key is None else row[key] for key in (text, label))
            if value is None or not str(value).strip():
                self.skip(path, f"line {number} has no text")
                continue
            if label and (given is None or not str(given).strip()):
                raise broken(path, number, f"a label in {label!r}", row)
            rows.append((str(value).strip(), str(given).strip() if label else None, f"{path.name}:{number}"))
        return rows

    def _pick(self, path: Path, header: list[str], labelled: bool) -> tuple[str, str | None]:
        """The columns of text and label."""
        picked: list[str | None] = []
        for what, wanted, usual in zip(("text", "label"), self.columns, (TEXT_NAMES, LABEL_NAMES), strict=True):
            if what == "label" and not labelled:
                picked.append(None)
                continue
            known = (wanted,) if wanted else usual
            column = next((c for name in known for c in header if c.strip().lower() == name.lower()), None)
            if column is None:
                raise ZooError(
                    f"{path} has no {what} column ({', '.join(known)}); its columns are "
                    f"{', '.join(map(str, header[:8]))}. Name it with {what}_column."
                )
            picked.append(column)
        text, label = picked
        assert text is not None
        return text, label

    def read(self, path: Path) -> Dataset:
        """A sentence a line (.txt and others), or the text column of CSV, TSV, JSONL; a folder reads each file."""
        files = [p for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else [path]
        rows: list[tuple[str, str | None, str]] = []
        for file in files:
            try:
                rows += self._rows(file, labelled=False)
            except (ZooError, OSError, csv.Error) as error:
                self.skip(file, error)
        return Texts([t for t, _, _ in rows], None, [n for _, _, n in rows])

    def write(self, predictions: Iterable[dict[str, Any]], path: Path) -> list[Path]:
        """One CSV: text,label,probability (or text,nats_per_token for a language model)."""
        path = Path(path)
        target = path if path.suffix else path / "predictions.csv"
        with atomic_write(target) as part, open(part, "w", newline="", encoding="utf-8") as stream:
            table = csv.writer(stream)
            started = False
            for batch in predictions:
                scores = [key for key in ("probability", "nats_per_token") if key in batch]
                labels = batch.get("class") or (batch["label"].tolist() if "label" in batch else None)
                if not started:
                    table.writerow(["text", *(["label"] if labels is not None else []), *scores])
                    started = True
                for i, text in enumerate(batch["text"]):
                    numbers = [f"{float(batch[key][i]):.6g}" for key in scores]
                    table.writerow([text, *([labels[i]] if labels is not None else []), *numbers])
        return [target]


def _words(name: str) -> list[str]:
    """``"stsa.binary.dev"`` as ``["stsa", "binary", "dev"]``."""
    return "".join(c if c.isalnum() else " " for c in name.lower()).split()


def _classes(labels: Iterable[str | None]) -> list[str]:
    """The distinct labels: by number where all are integers, else by name."""
    names = {label for label in labels if label is not None}
    try:
        return sorted(names, key=int)
    except ValueError:
        return sorted(names)
