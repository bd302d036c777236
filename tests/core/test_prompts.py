"""Files of prompts: what is read, which line is broken. Tokens: nothing cut, what the tokenizer puts around stays."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.core import ZooError
from zoo.data.prompts import (
    OwnPrompts,
    PromptDataModule,
    answered,
    encoded,
    labelled,
    lines,
    load_tokenizer,
    padded,
    prompts,
    questions,
    records,
    replies,
    text_of,
)
from zoo.language.llm.languages import word_tokenizer

# ---- files -----------------------------------------------------------------------------------------------------------


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_text_is_utf8_with_any_ends_of_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\ufeffx é\r\ny\rz\n")
    assert text_of(path) == "x é\ny\nz\n"
    assert text_of(write(tmp_path / "a.txt.gz", gzip.compress(b"x\r\ny"))) == "x\ny"
    assert text_of(write(path, "\xe9".encode("latin-1")), latin=True) == "é"
    for content, reason in ((b"\xe9", "is no text file in UTF-8"), (b"a\0b", "is no text file: it holds zero bytes")):
        with pytest.raises(ZooError, match=rf"a\.txt {reason}"):
            text_of(write(path, content))
    with pytest.raises(ZooError, match=r"a\.txt\.gz cannot be read: Not a gzipped file"):
        text_of(write(tmp_path / "a.txt.gz", b"plain"))
    with pytest.raises(ZooError, match=r"cannot be read: Is a directory\. Expected a text file"):
        text_of(tmp_path)


def test_lines_keep_their_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", " one\n\n \ntwo \u2028 half\n")
    assert lines(path) == [(1, " one"), (4, "two \u2028 half")], "only the end of a line ends it"
    assert prompts(path) == ["one", "two \u2028 half"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"prompt": "one"}\n\n{"prompt": " two\\u2028", "more": 1}\n'),
        ("a.csv", 'id,prompt\n1,one\n2," two"\n'),
        ("a.tsv", "prompt\tid\none\t1\n two\t2\n"),
    ],
)
def test_prompts_are_a_field(tmp_path: Path, name: str, text: str) -> None:
    assert prompts(write(tmp_path / name, text)) == ["one", "two"]
    assert prompts(write(tmp_path / f"{name}.gz", gzip.compress(text.encode()))) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "one"}\n{prompt\n', r"line 2: expected a prompt, .* in JSON, found '{prompt'"),
        ("a.jsonl", '\n["one"]\n', r"line 2: expected a prompt, {\"prompt\": ...}, found '\[\"one\"\]'"),
        ("a.jsonl", '{"question": "one"}\n', r"line 1: expected a prompt"),
        ("a.jsonl", '{"prompt": 3}\n', r"line 1: expected a prompt"),
        ("a.csv", "prompt,id\none,1\n,2\n", r"line 3: expected a prompt"),
        ("a.csv", "text\none\n", r"line 2: expected a prompt, .* found \"{'text': 'one'}\""),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ZooError, match=rf"{name}, {message}") as caught:
        prompts(write(tmp_path / name, text))
    assert "\n" not in str(caught.value)


def test_tables_are_read_as_glue_writes_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'a\tb\nsaid "no\t1\n')
    assert list(records(path)) == [(2, {"a": 'said "no', "b": "1"})]
    path = write(tmp_path / "a.csv", 'a,b\n"two\nlines",1\nshort\nlong,1,2\n')
    assert list(records(path)) == [
        (3, {"a": "two\nlines", "b": "1"}), (4, {"a": "short", "b": None}), (5, {"a": "long", "b": "1"})
    ]  # fmt: skip


def test_questions_have_answers(tmp_path: Path) -> None:
    row = {"question": "2 + 3", "answer": 5, "task": "1"}
    assert questions(write(tmp_path / "a.jsonl", json.dumps(row))) == [{**row, "answer": "5"}]
    with pytest.raises(ZooError, match=r"a\.jsonl, line 1: expected a question and an answer, .* found \"{'question"):
        questions(write(tmp_path / "a.jsonl", '{"question": "a"}\n'))


# ---- tokens ----------------------------------------------------------------------------------------------------------


def words(around: str = "$A", **given: str) -> Any:
    """A tokenizer of a few words that puts <s> or </s> around a text, as ``around`` says."""
    from tokenizers.processors import TemplateProcessing

    found = word_tokenizer(["<s>", "</s>", *"abcdefgh", ":"])
    special = [(token, found.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    found.backend_tokenizer.post_processor = TemplateProcessing(single=around, special_tokens=special)
    found.add_special_tokens(given)
    return found


def test_a_text_keeps_what_the_tokenizer_puts_around_it() -> None:
    tokenizer = words("<s> $A </s>")
    (ids,) = encoded(tokenizer, ["a b"], 4)
    assert tokenizer.decode(ids) == "<s> a b </s>"
    (ids,) = encoded(tokenizer, ["a b"], 4, special=False)
    assert tokenizer.decode(ids) == "a b"
    assert encoded(tokenizer, [], 4) == []


def test_nothing_is_cut(tmp_path: Path) -> None:
    """Not even where the tokenizer's own file asks for it."""
    tokenizer = words("<s> $A")
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=6)
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"]["max_length"] == 3
    again = load_tokenizer(str(tmp_path))
    assert again.decode(encoded(again, ["a b c d"], 5)[0]) == "<s> a b c d"
    assert again.decode(answered(again, [("a b", "c d")])[0][0]) == "<s> a b c d"
    with pytest.raises(ZooError, match=r"A prompt has 5 tokens; 1 to block=4 fit: 'a b c d'"):
        encoded(again, ["a", "a b c d"], 4)
    with pytest.raises(ZooError, match=r"A chat has 0 tokens; 1 to block=4 fit: ' '"):
        encoded(words(), ["a", " "], 4, "chat")


@pytest.mark.parametrize(
    ("around", "expected"),
    [("$A", "a : b c </s>"), ("<s> $A", "<s> a : b c </s>"), ("<s> $A </s>", "<s> a : b c </s>")],
)
def test_answers_alone_are_learnt(around: str, expected: str) -> None:
    tokenizer = words(around, eos_token="</s>")
    ((ids, labels),) = answered(tokenizer, [("a :", "b c")])
    assert tokenizer.decode(ids) == expected
    assert tokenizer.decode([token for token in labels if token != -100]) == "b c </s>"
    assert answered(tokenizer, []) == []


def test_a_token_across_the_border_is_the_answers() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "a": 1, ":": 2, " ": 3, "b": 4, ": b": 5, ": ": 6}
    merges = [(":", " "), (": ", "b")]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, merges)), pad_token="<pad>")
    assert answered(tokenizer, [("a:", "b")]) == [([1, 5], [-100, 5])]


def test_rows_are_padded_on_the_left() -> None:
    ids, mask = padded([[1, 2, 3], [4]], 9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert padded([], 9)[0].shape == (0, 1)
    batch = labelled([([1, 2], [-100, 2]), ([3], [3])], 0)
    assert batch["labels"].tolist() == [[-100, 2], [-100, 3]] and batch["attention_mask"].tolist() == [[1, 1], [0, 1]]


def test_replies_end_at_their_end() -> None:
    tokenizer = words(eos_token="</s>")
    ids = tokenizer.convert_tokens_to_ids(["a", "b", "</s>", "c"])
    assert replies(tokenizer, torch.tensor([ids, ids[:2] * 2])) == ["a b", "a b a b"]


def test_tokenizers_pad_on_the_left_or_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"No tokenizer in .*nowhere"):
        load_tokenizer(str(tmp_path / "nowhere"))
    tokenizer = words(eos_token="</s>")
    tokenizer.pad_token, tokenizer.padding_side = None, "right"
    tokenizer.save_pretrained(tmp_path / "a")
    found = load_tokenizer(str(tmp_path / "a"))
    assert found.padding_side == "left" and found.pad_token == "</s>"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "b")
    with pytest.raises(ZooError, match="neither a padding nor an end token: set one and save it"):
        load_tokenizer(str(tmp_path / "b"))


# ---- the data --------------------------------------------------------------------------------------------------------


class Asked(PromptDataModule):
    """Prompts alone."""

    def __init__(self, root: str | None = None, tokenizer: str | None = None, block: int = 4):
        super().__init__(root, 2)
        self.save_hyperparameters()

    def own_tokenizer(self) -> Any:
        return words()


def test_own_prompts_are_read_in_the_models_tokens(tmp_path: Path) -> None:
    words("<s> $A").save_pretrained(tmp_path / "words")
    path = write(tmp_path / "a.txt", "a b c\n\nd\n")
    data = Asked(tokenizer=str(tmp_path / "words")).from_files(path)
    (batch,) = data.predict_dataloader()
    assert words().batch_decode(batch["input_ids"]) == ["<s> a b c", "<pad> <pad> <s> d"]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]] and batch["name"] == ["a b c", "d"]
    with pytest.raises(ZooError, match=r"A prompt has 4 tokens; 1 to block=3 fit: 'a b c'"):
        Asked(tokenizer=str(tmp_path / "words"), block=3).from_files(path)
    with pytest.raises(ZooError, match="Nothing readable"):
        Asked().from_files(write(path, "\n"))


def test_a_generated_language_knows_its_words_alone(tmp_path: Path) -> None:
    with pytest.raises(
        ZooError, match=r"'What' is no word of the generated language\. For other text give `tokenizer`"
    ):
        Asked().from_files(write(tmp_path / "a.txt", "a b\nWhat is that\n"))
    with pytest.raises(ZooError, match="Files hold text: give `tokenizer`"):
        _ = Asked(str(tmp_path)).words


def test_a_tokenizer_of_the_hub_travels_and_a_folder_does_not(tmp_path: Path) -> None:
    words().save_pretrained(tmp_path)
    assert Asked(tokenizer="someone/model").remember() == {"tokenizer": "someone/model"}
    assert Asked(tokenizer=str(tmp_path)).remember() == {} == Asked().remember()


def test_own_prompts_know_their_length() -> None:
    assert len(OwnPrompts(["a", "b c"], words(), 4)) == 2
