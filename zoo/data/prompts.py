"""Text for language models: files of prompts read line by line, a tokenizer, and whole texts in its tokens.

A broken line is named by file and number, with what was expected there. Nothing is ever cut: what does not fit is
refused. What a tokenizer puts around a text (BOS, say) stays; a text that a chat template made has its own already.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from zoo.core import ZooDataModule, ZooError
from zoo.core.errors import first_line

TABLES = {".csv": ",", ".tsv": "\t"}
"""Endings of tables with a header, and what stands between their fields."""
RECORDS = (*TABLES, ".jsonl", ".json")
"""Endings of files whose lines have named fields."""

Ids = list[int]
Learnt = tuple[Ids, Ids]
"""Token ids of a text and its labels, -100 where nothing is learnt."""


# ---- files -----------------------------------------------------------------------------------------------------------


def text_of(path: Path, latin: bool = False) -> str:
    """A text file in UTF-8, gzipped or not, with "\\n" at its lines' ends and without a byte order mark.

    Args:
        latin: what is not UTF-8 is latin-1.
    Raises:
        ZooError: if it cannot be read, or is no text.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ZooError(f"{path} cannot be read: {reason}. Expected a text file.") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if not latin:
            raise ZooError(f"{path} is no text file in UTF-8: {first_line(error)}") from error
        text = content.decode("latin-1")
    if "\0" in text[:4096]:
        raise ZooError(f"{path} is no text file: it holds zero bytes.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def lines(path: Path, latin: bool = False) -> list[tuple[int, str]]:
    """(number from 1, line) of the lines of a text file that are not blank.

    Raises:
        ZooError: as `text_of`.
    """
    return [(n, line) for n, line in enumerate(text_of(path, latin).split("\n"), 1) if line.strip()]


def broken(path: Path, number: int, expected: str, found: object) -> ZooError:
    """What to raise for a line that is not as it should be."""
    return ZooError(f"{path}, line {number}: expected {expected}, found {str(found)[:60]!r}.")


def ending(path: Path) -> str:
    """The ending in lower case, ".jsonl" of "Test.JSONL.gz", say."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def records(path: Path, expected: str = "an object {...}", latin: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, fields) of a table with a header (.csv, .tsv), or of JSON lines: an object a line.

    Args:
        expected: what a line should be, for errors. latin: see `text_of`.
    Raises:
        ZooError: naming the line that is none, or as `text_of`.
    """
    if ending(path) in TABLES:
        yield from _table(path, latin)
        return
    for number, line in lines(path, latin):
        try:
            item = json.loads(line)
        except ValueError as error:
            raise broken(path, number, f"{expected} in JSON", line.strip()) from error
        if not isinstance(item, dict):
            raise broken(path, number, expected, line.strip())
        yield number, item


def _table(path: Path, latin: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    quoting = csv.QUOTE_NONE if ending(path) == ".tsv" else csv.QUOTE_MINIMAL  # GLUE's TSV quotes nothing
    content = io.StringIO(text_of(path, latin), newline="")
    rows = csv.DictReader(content, delimiter=TABLES[ending(path)], quoting=quoting)
    try:
        for row in rows:
            yield rows.line_num, {name: value for name, value in row.items() if name is not None}
    except csv.Error as error:
        raise ZooError(f"{path}, line {rows.line_num}: no row of a table: {error}") from error


def questions(path: Path) -> list[dict[str, Any]]:
    """The rows of `records` that each have a "question" and an "answer" in words.

    Raises:
        ZooError: naming the line without.
    """
    expected, found = 'a question and an answer, {"question": ..., "answer": ...}', []
    for number, row in records(path, expected):
        if row.get("question") is None or row.get("answer") is None:
            raise broken(path, number, expected, row)
        found.append({**row, "question": str(row["question"]), "answer": str(row["answer"])})
    return found


def prompts(path: Path) -> list[str]:
    """A user's prompts: the lines of a text file, or the field "prompt" of `records`.

    Raises:
        ZooError: naming the line without.
    """
    if ending(path) not in RECORDS:
        return [line.strip() for _, line in lines(path)]
    expected, found = 'a prompt, {"prompt": ...}', []
    for number, row in records(path, expected):
        if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise broken(path, number, expected, row)
        found.append(row["prompt"].strip())
    return found


# ---- tokens ----------------------------------------------------------------------------------------------------------


def load_tokenizer(name: str) -> Any:
    """A tokenizer of transformers, by Hub id or folder, that pads on the left.

    Raises:
        ZooError: if it cannot be loaded, or has nothing to pad with.
    """
    from transformers import AutoTokenizer

    try:
        found: Any = AutoTokenizer.from_pretrained(name, padding_side="left")
    except (OSError, ValueError, KeyError) as error:
        raise ZooError(f"No tokenizer in {name!r}: {first_line(error)}") from error
    if found.pad_token is None:
        found.pad_token = found.eos_token
    if found.pad_token is None:
        raise ZooError(f"The tokenizer in {name!r} has neither a padding nor an end token: set one and save it.")
    return found


def encoded(tokenizer: Any, texts: Sequence[str], block: int, what: str = "prompt", special: bool = True) -> list[Ids]:
    """Token ids of whole texts.

    Args:
        block: tokens of a text at most. what: the name of a text, for errors.
        special: whether the tokenizer puts around a text what it puts there; not where a chat template did.
    Raises:
        ZooError: naming a text of more than ``block`` tokens, or of none.
    """
    if not texts:
        return []
    rows = tokenizer(list(texts), add_special_tokens=special, truncation=False, verbose=False)["input_ids"]
    for text, row in zip(texts, rows, strict=True):
        if not 1 <= len(row) <= block:
            advice = " Shorten it, or raise `block`." if row else ""
            raise ZooError(f"A {what} has {len(row)} tokens; 1 to block={block} fit: {text[:60]!r}.{advice}")
    return rows


def answered(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Learnt]:
    """Prompts with their answers after a space and the end token behind; the answer and that end are learnt.

    A token that the prompt shares with the answer is the answer's, and so is an end that the tokenizer puts anyway.
    """
    if not pairs:
        return []
    end = tokenizer.eos_token or ""
    asked = tokenizer([prompt for prompt, _ in pairs], truncation=False, verbose=False)["input_ids"]
    texts = [f"{prompt} {answer}{end}" for prompt, answer in pairs]
    found = []
    for head, ids in zip(asked, tokenizer(texts, truncation=False, verbose=False)["input_ids"], strict=True):
        if end and ids[-2:] == [tokenizer.eos_token_id] * 2:
            ids = ids[:-1]
        same = next((i for i, (a, b) in enumerate(zip(head, ids, strict=False)) if a != b), min(len(head), len(ids)))
        found.append((ids, [-100] * same + ids[same:]))
    return found


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows padded on the left to one length, (b, t), and the mask of what is no padding."""
    t = max((len(row) for row in rows), default=0)
    ids = [F.pad(torch.tensor(row, dtype=torch.long), (t - len(row), 0), value=pad) for row in rows]
    mask = [(torch.arange(t) >= t - len(row)).long() for row in rows]
    return (torch.stack(ids), torch.stack(mask)) if rows else (torch.zeros(0, 1).long(), torch.zeros(0, 1).long())


def labelled(items: Sequence[Learnt], pad: int) -> dict[str, Tensor]:
    """Texts padded on the left: "input_ids", "attention_mask" and "labels" (b, t)."""
    ids, mask = padded([ids for ids, _ in items], pad)
    return {"input_ids": ids, "attention_mask": mask, "labels": padded([labels for _, labels in items], -100)[0]}


def replies(tokenizer: Any, tokens: Tensor) -> list[str]:
    """What replies (b, n) say, up to where each ends."""
    ends = tokens == tokenizer.eos_token_id
    rows = [row[: int(end.nonzero()[0])] if bool(end.any()) else row for row, end in zip(tokens, ends, strict=True)]
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


# ---- the data --------------------------------------------------------------------------------------------------------


class PromptDataModule(ZooDataModule):
    """Prompts in the tokens of a language model.

    A subclass has the hyperparameters ``tokenizer`` (a Hub id or folder; None for a generated language's own, which
    `own_tokenizer` makes) and ``block`` (tokens of a prompt at most). A user's own prompts: a text file, one a line, or
    the field "prompt" of JSON lines, CSV or TSV.
    """

    unit: ClassVar[str] = "prompt"
    _words: Any = None

    def own_tokenizer(self) -> Any:
        """The generated language's."""
        raise NotImplementedError

    @property
    def words(self) -> Any:
        """The tokenizer; it pads on the left.

        Raises:
            ZooError: if it cannot be loaded, or is not given where text comes from files.
        """
        if self._words is None:
            name = self.hparams.tokenizer
            if name is None and self.root is not None:
                raise ZooError("Files hold text: give `tokenizer`, the model's Hub id or folder.")
            self._words = self.own_tokenizer() if name is None else load_tokenizer(name)
        return self._words

    def remember(self) -> dict[str, Any]:
        """The tokenizer, too, where others can have it: by its Hub id."""
        name = self.hparams.tokenizer
        known = name is not None and not Path(name).is_dir()
        return {**super().remember(), **({"tokenizer": name} if known else {})}

    def check_words(self, texts: Sequence[str]) -> None:
        """Refuse a user's text that is not in the generated language, where no tokenizer is given.

        Raises:
            ZooError: naming the word.
        """
        if self.hparams.tokenizer is not None:
            return
        known = self.words.get_vocab()
        for word in (word for text in texts for word in text.split()):
            if word not in known:
                raise ZooError(
                    f"{word!r} is no word of the generated language. For other text give `tokenizer`, the model's Hub "
                    "id or folder (--data.tokenizer)."
                )

    def read(self, path: Path) -> Dataset:
        """A user's prompts, see `prompts`."""
        found = prompts(path)
        self.check_words(found)
        return OwnPrompts(found, self.words, self.hparams.block)


class OwnPrompts(Dataset):
    """A user's prompts. Batch: "input_ids", "attention_mask" (b, t), padded on the left; "name": list[str].

    Raises:
        ZooError: for a prompt of more than ``block`` tokens.
    """

    def __init__(self, texts: list[str], tokenizer: Any, block: int):
        self.texts, self.pad = texts, tokenizer.pad_token_id
        self.rows = encoded(tokenizer, texts, block)

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, indices: list[int], generator: torch.Generator) -> dict[str, Any]:
        ids, mask = padded([self.rows[i] for i in indices], self.pad)
        return {"input_ids": ids, "attention_mask": mask, "name": [self.texts[i] for i in indices]}
