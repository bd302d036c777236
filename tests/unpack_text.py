"""Sentence sets and a small corpus, from one archive into a folder a set, files as their authors named them."""

import gzip
import shutil
import zipfile
from pathlib import Path

SENTENCES = {
    "SST-2": ("stsa.binary.train", "stsa.binary.dev", "stsa.binary.test"),
    "SST-5": ("stsa.fine.train", "stsa.fine.dev", "stsa.fine.test"),
    "TREC": ("TREC.train.all", "TREC.test.all"),
    "MR": ("rt-polarity.all",),
    "Subj": ("subj.all",),
    "MPQA": ("mpqa.all",),
}


def unpack_text(source: Path, target: Path) -> None:
    """Sentences into target/{SST-2,SST-5,TREC,MR,Subj,MPQA}/, the plays into target/tinyshakespeare/input.txt."""
    with zipfile.ZipFile(_find(source, "text_classification.zip")) as packed:
        for folder, names in SENTENCES.items():
            (target / folder).mkdir(parents=True, exist_ok=True)
            for name in names:
                (target / folder / name).write_bytes(packed.read(name))
    corpus = target / "tinyshakespeare" / "input.txt"
    corpus.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(_find(source, "input.txt.gz"), "rb") as packed_text, open(corpus, "wb") as plain:
        shutil.copyfileobj(packed_text, plain)


def unpack_sst2(source: Path, target: Path) -> None:
    """The three files of SST-2 alone, where `zoo reproduce HRP@sst2` looks: target/stsa.binary.{train,dev,test}."""
    target.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(_find(source, "text_classification.zip")) as packed:
        for name in SENTENCES["SST-2"]:
            (target / name).write_bytes(packed.read(name))


def _find(source: Path, name: str) -> Path:
    found = [*sorted(source.rglob(name)), *sorted(source.parent.glob(f"*/{name}"))]
    if not found:
        raise FileNotFoundError(f"{name} is missing under {source}.")
    return found[0]
