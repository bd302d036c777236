"""Texts with labels: the generated language, public layouts written small, a user's own files, and refusals."""

import csv
from pathlib import Path
from typing import Any

import pytest

from zoo.core import ZooError
from zoo.language.finetuning.data_lora import LoRAFinetuneDataModule, ToyLanguage


def write(folder: Path, **files: str | bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def lines(count: int, labels: int = 2) -> str:
    return "".join(f"{i % labels} sentence number {i} .\n" for i in range(count))


def rows(data: LoRAFinetuneDataModule, split: str) -> list[dict[str, Any]]:
    found = data.dataset(split)
    return [found[i] for i in range(len(found))]  # type: ignore[arg-type]


# ---- the generated language -------------------------------------------------------------------------------------


def test_language_plants_two_dialects() -> None:
    language = ToyLanguage(3)
    assert len(set(language.vocabulary)) == len(language.vocabulary) == 4 * 12 + 24
    topic = {d: {word: k for k, words in enumerate(language.words[d]) for word in words} for d in ("home", "away")}
    assert set(topic["home"]) == set(topic["away"]) and len(topic["home"]) == 48
    for dialect in ("home", "away"):
        texts, labels = language.texts(dialect, 300, 7)
        for text, label in zip(texts, labels, strict=True):
            words = text.split()
            counts = [sum(topic[dialect].get(word) == k for word in words) for k in range(4)]
            assert len(words) == 12 and sum(counts) == 6 and counts[label] == max(counts) >= 4
        assert min(labels.count(k) for k in range(4)) > 40
    # the dialects are independent: what is one topic at home is spread over all away
    spread = [[sum(topic["away"][w] == k for w in words) for k in range(4)] for words in language.words["home"]]
    assert max(map(max, spread)) <= 8


def test_embedded_set_follows_the_seed() -> None:
    one, same, other = (LoRAFinetuneDataModule(seed=s) for s in (0, 0, 1))
    assert rows(one, "train") == rows(same, "train") != rows(other, "train")
    assert {s: len(one.dataset(s)) for s in ("train", "val", "test")} == {"train": 512, "val": 128, "test": 256}  # type: ignore[arg-type]
    texts = [{r["text"] for r in rows(one, s)} for s in ("train", "val", "test")]
    assert not texts[0] & texts[1] and not texts[0] & texts[2]
    batch = next(iter(one.train_dataloader()))
    assert list(batch) == ["text", "name", "label"] and len(batch["text"]) == 16 and batch["label"].shape == (16,)
    assert one.describe() == {"num_classes": 4, "classes": ["topic0", "topic1", "topic2", "topic3"]}
    assert LoRAFinetuneDataModule(task="causal-lm").describe() == {"task": "causal-lm"}
    home = LoRAFinetuneDataModule(dialect="home")
    assert rows(home, "test") != rows(one, "test")


# ---- public layouts ---------------------------------------------------------------------------------------------


def test_label_sentence_files(tmp_path: Path) -> None:
    root = write(
        tmp_path / "SST-2",
        stsa__binary__train=lines(12),
        stsa__binary__dev=lines(4),
        stsa__binary__test="1 a caf\xe9 . \n0 dull\n".encode("latin-1"),  # such files are in the public sets
        README__md="not data",
    )
    data = LoRAFinetuneDataModule(str(root))
    assert [len(rows(data, s)) for s in ("train", "val", "test")] == [12, 4, 2]
    assert rows(data, "test")[0] == {"text": "a caf\xe9 .", "label": 1, "name": "stsa.binary.test:1"}
    assert data.describe() == {"num_classes": 2, "classes": ["0", "1"]}


def test_missing_val_is_cut_from_train_and_one_file_is_cut_in_folds(tmp_path: Path) -> None:
    root = write(tmp_path / "TREC", TREC__train__all=lines(60, 6), TREC__test__all=lines(12, 6))
    data = LoRAFinetuneDataModule(str(root))
    assert len(rows(data, "test")) == 12 and len(rows(data, "train")) + len(rows(data, "val")) == 60
    assert 6 <= len(rows(data, "val")) <= 7
    one = write(tmp_path / "MR", **{"rt-polarity__all": lines(100)})
    tests = []
    for fold in range(10):
        part = LoRAFinetuneDataModule(str(one), fold=fold)
        names = {s: {r["name"] for r in rows(part, s)} for s in ("train", "val", "test")}
        assert sum(map(len, names.values())) == len(set.union(*names.values())) == 100
        tests.append(names["test"])
    assert len(set.union(*tests)) == sum(map(len, tests)) == 100  # the ten test sets make the whole
    small = LoRAFinetuneDataModule(str(root), train_size=20)
    assert len(rows(small, "train")) == 20
    kept = {r["name"] for r in rows(small, "train")}
    assert kept == {r["name"] for r in rows(LoRAFinetuneDataModule(str(root), train_size=20), "train")}
    assert kept != {r["name"] for r in rows(LoRAFinetuneDataModule(str(root), train_size=20, seed=1), "train")}


def test_own_csv_tsv_and_jsonl(tmp_path: Path) -> None:
    text = "text,label\n" + "".join(f'"one, {i}",{"good" if i % 2 else "bad"}\n' for i in range(20))
    file = write(tmp_path, reviews__csv=text) / "reviews.csv"
    data = LoRAFinetuneDataModule(str(file))  # a file as root
    assert data.describe()["classes"] == ["bad", "good"]
    assert sum(len(rows(data, s)) for s in ("train", "val", "test")) == 20
    assert all(r["text"].startswith("one, ") for r in rows(data, "train"))
    root = write(
        tmp_path / "glue",
        train__tsv='sentence\tlabel\nhe said "no\t0\nyes\t1\n',  # an open quote, as in GLUE
        dev__tsv="sentence\tlabel\nfine\t1\n",
        test__jsonl='{"text": "x", "label": 1}\n\n{"text": "y", "label": 0}\n',
    )
    data = LoRAFinetuneDataModule(str(root))
    assert [r["text"] for r in rows(data, "train")] == ['he said "no', "yes"]
    assert [r["label"] for r in rows(data, "test")] == [1, 0]
    other = write(
        tmp_path / "named",
        train__csv="Body,Kind\na,x\nb,y\n",
        val__csv="Body,Kind\nc,x\n",
        test__csv="Body,Kind\nd,y\n",
    )
    data = LoRAFinetuneDataModule(str(other), text_column="body", label_column="kind")
    assert [r["label"] for r in rows(data, "test")] == [1]
    many = write(
        tmp_path / "lines",
        train__csv='text,label\n"two\nlines",0\nb,1\n',
        val__csv="text,label\na,0\n",
        test__csv="text,label\na,0\n",
    )
    assert rows(LoRAFinetuneDataModule(str(many)), "train")[0]["text"] == "two\nlines"


def test_integer_classes_sort_by_number(tmp_path: Path) -> None:
    root = write(tmp_path, train__txt=lines(12, 12), dev__txt=lines(3), test__txt=lines(3))
    assert LoRAFinetuneDataModule(str(root)).describe()["classes"] == [str(k) for k in range(12)]


# ---- refusals ---------------------------------------------------------------------------------------------------


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        LoRAFinetuneDataModule(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no file with 'train' in its name"):
        LoRAFinetuneDataModule(str(write(tmp_path / "a", dev__txt=lines(3), test__txt=lines(3)))).setup()
    with pytest.raises(ZooError, match="2 files for train"):
        LoRAFinetuneDataModule(str(write(tmp_path / "b", train__csv="text,label\n", train__txt=""))).setup()
    with pytest.raises(ZooError, match=r"no label column .* label_column"):
        LoRAFinetuneDataModule(str(write(tmp_path / "c", train__csv="text,stars\na,1\n"))).setup()
    with pytest.raises(ZooError, match="label '7' of the test set is not among the 2 classes"):
        root = write(tmp_path / "d", train__txt=lines(4), dev__txt=lines(4), test__txt="7 odd one\n")
        LoRAFinetuneDataModule(str(root)).setup()
    with pytest.raises(ZooError, match=r"train.txt, line 2: expected 'label sentence'"):
        LoRAFinetuneDataModule(str(write(tmp_path / "e", train__txt="0 fine\nbroken\n"))).setup()
    with pytest.raises(ZooError, match=r"train.jsonl, line 1: expected an object .* in JSON, found '{text: 1}'"):
        LoRAFinetuneDataModule(str(write(tmp_path / "f", train__jsonl="{text: 1}\n"))).setup()
    with pytest.raises(ZooError, match="too few"):
        LoRAFinetuneDataModule(str(write(tmp_path / "g", train__txt=lines(4)))).setup()
    with pytest.raises(ValueError, match="fold is 10"):
        LoRAFinetuneDataModule(fold=10)
    with pytest.raises(ValueError, match="dialect is 'why'"):
        LoRAFinetuneDataModule(dialect="why")


# ---- a user's own files -----------------------------------------------------------------------------------------


def test_own_texts_in_and_csv_out(tmp_path: Path) -> None:
    root = write(
        tmp_path / "mine",
        reviews__txt="\ufeffa good film\n\nnot so good\r\n",
        table__csv='id,text\n1,"from, a table"\n2,\n',
        broken__txt=b"\x00\x01\x02",
        other__jsonl='{"nothing": 1}\n',
    )
    data = LoRAFinetuneDataModule().from_files(root)
    batch = next(iter(data.predict_dataloader()))
    assert batch["text"] == ["a good film", "not so good", "from, a table"]
    assert batch["name"] == ["reviews.txt:1", "reviews.txt:3", "table.csv:2"]
    assert "label" not in batch
    assert sorted(p.name for p, _ in data.skipped) == ["broken.txt", "other.jsonl", "table.csv"]
    one = LoRAFinetuneDataModule().from_files(root / "reviews.txt")
    assert len(one.dataset("predict")) == 2  # type: ignore[arg-type]
    predictions = [{"text": ["a, b", 'say "x"'], "class": ["yes", "no"], "probability": [0.75, 1.0]}]
    (written,) = data.write(predictions, tmp_path / "out")
    assert written == tmp_path / "out" / "predictions.csv"
    with open(written, newline="", encoding="utf-8") as stream:
        assert list(csv.DictReader(stream)) == [
            {"text": "a, b", "label": "yes", "probability": "0.75"},
            {"text": 'say "x"', "label": "no", "probability": "1"},
        ]
    assert data.write(predictions, tmp_path / "named.csv") == [tmp_path / "named.csv"]
    with pytest.raises(ZooError, match="Nothing readable"):
        LoRAFinetuneDataModule().from_files(root / "broken.txt")


def test_corpus_for_a_language_model(tmp_path: Path) -> None:
    root = write(tmp_path, input__txt="To be, or not to be.\n" * 40)
    data = LoRAFinetuneDataModule(str(root), task="causal-lm", block=20)
    whole = [r for s in ("train", "val", "test") for r in rows(data, s)]
    assert sum(len(r["text"]) for r in whole) == 21 * 40 - 1 and "label" not in whole[0]


# ---- the real sets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "sizes", "classes"),
    [("SST-2", (6920, 872, 1821), 2), ("SST-5", (8544, 1101, 2210), 5), ("TREC", (4907, 545, 500), 6)],
)
def test_real_sets(folder: str, sizes: tuple[int, ...], classes: int, zoo_data: Any) -> None:
    data = LoRAFinetuneDataModule(str(zoo_data("text") / folder))
    assert tuple(len(data.dataset(s)) for s in ("train", "val", "test")) == sizes  # type: ignore[arg-type]
    assert data.describe()["num_classes"] == classes
