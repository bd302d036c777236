"""Requests to forget, one after another: a generated language's facts, ScienceQA's topics, TOFU's invented authors."""

import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from zoo.core import ZooDataModule, ZooError, seed_from
from zoo.data.fixed import Fixed
from zoo.data.plain import write_csv
from zoo.data.prompts import lines, prompts, questions, text_of
from zoo.language.llm.languages import train_decoder, word_tokenizer
from zoo.language.unlearning.metrics import STATED

log = logging.getLogger(__name__)

GROUPS = ("forget", "heldout", "retained", "commonqa", "openbookqa", "real_authors", "world_facts")
"""What a test prompt is: of a forget set (S.U.), of the same request but not in it (D.U.), of others (R.D.), ..."""
TEMPLATES = {
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{question}\n\n### Response:\n"
    ),
    "alpaca_input": (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\n{question}\n\n### Input:\n{more}"
        "\n\n### Response:\n"
    ),
    "tofu": "### Question: {question}\n### Answer: ",
    "llama": "[INST] {question} [\\INST] ",
    "plain": "{question} ",
}
REFUSALS = ("I do not know.", "I cannot answer that.", "That is unknown to me.", "I have no knowledge of this.")
"""Where no file of refusals lies beside the set."""


@dataclass
class Sample:
    """A prompt with its answer, and to measure by a paraphrase of the answer and wrong ones."""

    prompt: str
    answer: str
    group: str = "retained"
    request: int = -1
    paraphrase: str = ""
    perturbed: list[str] = field(default_factory=list)


# ---- the generated language -----------------------------------------------------------------------------------------


class TopicLanguage:
    """Facts "key -> letter" of a few topics, each with words of its own.

    "ask herb_c herb_a herb_h herb12 answer B": three of the topic's words, the key, and the letter A to D.

    Args:
        seed: of the letters and of the words around a key. topics: at most 3. facts: of a topic.
    """

    NAMES = ("herb", "metal", "river")
    MOST = 90
    LETTERS = "ABCD"
    AROUND = ("_a", "_b", "_c", "_d", "_e", "_f", "_g", "_h")

    def __init__(self, seed: int = 0, topics: int = 3, facts: int = 80):
        if not 1 <= topics <= len(self.NAMES) or not 1 <= facts <= self.MOST:
            raise ValueError(f"topics is {topics} (1 to {len(self.NAMES)}) and facts {facts} (1 to {self.MOST}).")
        generator = torch.Generator().manual_seed(seed_from("topic language", seed))
        self.facts: list[list[tuple[str, str]]] = []
        for name in self.NAMES[:topics]:
            letters = torch.randint(len(self.LETTERS), (facts,), generator=generator).tolist()
            drawn = torch.randint(len(self.AROUND), (facts, 3), generator=generator).tolist()
            self.facts.append([
                (f"ask {' '.join(name + self.AROUND[i] for i in row)} {name}{key} answer ", self.LETTERS[letter])
                for key, (letter, row) in enumerate(zip(letters, drawn, strict=True))
            ])  # fmt: skip

    @classmethod
    def tokenizer(cls) -> Any:
        """The words of every such language, of transformers; it pads left and has a mask."""
        tails = (*cls.AROUND, *map(str, range(cls.MOST)))
        own = [name + tail for name in cls.NAMES for tail in tails]
        words = word_tokenizer(["<mask>", "ask", "answer", *cls.LETTERS, *own])
        words.mask_token = "<mask>"
        return words


def pretrain_topics(
    folder: Path,
    seed: int,
    facts: int = 80,
    accuracy: float = 0.995,
    steps: int = 3000,
    encoder_steps: int = 1000,
    width: int = 64,
) -> None:
    """A decoder that knows all facts of `TopicLanguage` in ``folder/decoder``, and an encoder in ``folder/encoder``."""
    language = TopicLanguage(seed, facts=facts)
    texts = [(prompt, answer) for topic in language.facts for prompt, answer in topic]
    pretrain_texts(folder, seed, language.tokenizer(), texts, accuracy, steps, encoder_steps, width=width)


def pretrain_tofu(
    folder: Path,
    seed: int,
    root: str,
    requests: list[str],
    retained: int,
    accuracy: float = 0.98,
    steps: int = 1500,
    encoder_steps: int = 400,
    width: int = 128,
) -> None:
    """A decoder that knows TOFU's invented authors of these requests, and the first retained ones, by heart, word by
    word; and an encoder of their questions. Saved in ``folder/decoder`` and ``folder/encoder``.
    """
    data = ContinualUnlearningDataModule(
        root, seed=seed, requests=requests, calibration=0.25, retained=retained, template="plain", others=False
    )
    forget, samples = data._tofu()
    every = [*(s for own in forget.values() for s in own), *samples]
    known = [s for s in every if s.group != "heldout"]
    refusals = data._refusals()
    seen = " ".join([*(f"{s.prompt} {s.answer} {s.paraphrase} {' '.join(s.perturbed)}" for s in every), *refusals])
    tokenizer = sentence_tokenizer(seen)
    texts = [(sample.prompt, sample.answer) for sample in known]
    pretrain_texts(
        folder, seed, tokenizer, texts, accuracy, steps, encoder_steps, width=width, batch=32, encoder_width=64, lr=2e-3
    )


def sentence_tokenizer(text: str) -> Any:
    """A tokenizer of transformers that knows this text's words and signs, "<mask>" and the end "</s>"; it pads left."""
    from tokenizers import pre_tokenizers

    split = pre_tokenizers.Whitespace()  # words, and runs of signs
    words = sorted({piece for piece, _ in split.pre_tokenize_str(text)})
    tokenizer = word_tokenizer(["<mask>", "</s>", *words])
    tokenizer.backend_tokenizer.pre_tokenizer = split
    tokenizer.mask_token, tokenizer.eos_token = "<mask>", "</s>"
    return tokenizer


def pretrain_texts(
    folder: Path,
    seed: int,
    tokenizer: Any,
    texts: Sequence[tuple[str, str]],
    accuracy: float,
    steps: int,
    encoder_steps: int,
    width: int = 64,
    layers: int = 2,
    batch: int = 128,
    encoder_width: int = 32,
    lr: float = 4e-3,
) -> None:
    """A decoder that has learnt these prompts with their answers by heart, and an encoder of the prompts' words."""
    pad = tokenizer.pad_token_id
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = [[*tokenizer(prompt + answer)["input_ids"], *end] for prompt, answer in texts]
    heads = [len(tokenizer(prompt.rstrip())["input_ids"]) for prompt, _ in texts]
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
    labels = ids.masked_fill(ids == pad, -100)
    asked = torch.stack([
        (torch.arange(length) >= length - len(row) + head) for row, head in zip(rows, heads, strict=True)
    ])  # fmt: skip

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(ids), (count,), generator=generator)
        return ids[chosen], labels[chosen]

    def enough(model: nn.Module) -> bool:
        right = total = 0
        for part in torch.arange(len(ids)).split(256):
            found = model(ids[part], attention_mask=(ids[part] != pad).long()).logits[:, :-1].argmax(-1)
            right += int(((found == ids[part, 1:]) & asked[part, 1:]).sum())
            total += int(asked[part, 1:].sum())
        return right / total >= accuracy

    train_decoder(
        folder / "decoder", seed, tokenizer, draw, steps, enough, layers=layers, width=width, batch=batch, lr=lr,
        positions=max(64, length + 40),
    )  # fmt: skip
    pretrain_encoder(folder / "encoder", seed, tokenizer, [prompt for prompt, _ in texts], encoder_steps, encoder_width)


def pretrain_encoder(
    folder: Path, seed: int, tokenizer: Any, texts: Sequence[str], steps: int, width: int, batch: int = 64
) -> None:
    """A small RoBERTa trained on masked words of these texts, saved with its tokenizer."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    from zoo.language.unlearning.ood_detector import mask_words

    torch.manual_seed(seed_from("encoder", seed))
    rows = [tokenizer(text)["input_ids"] for text in texts]
    length = max(map(len, rows))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    model = RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=4, num_attention_heads=2,
            intermediate_size=2 * width, max_position_embeddings=max(64, 3 * length), pad_token_id=pad,
            type_vocab_size=1, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 2))
    for _ in range(steps):
        own = ids[torch.randint(len(ids), (batch,))]
        masked, labels = mask_words(own, own == pad, tokenizer.mask_token_id, len(tokenizer))
        hidden = model.roberta(masked, attention_mask=(own != pad).long()).last_hidden_state
        asked = labels != -100
        loss = nn.functional.cross_entropy(model.lm_head(hidden[asked]), labels[asked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    log.info("encoder: %d steps, loss %.3f", steps, float(loss.detach()))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- the data -------------------------------------------------------------------------------------------------------


class ContinualUnlearningDataModule(ZooDataModule):
    """Forget sets in their order, and prompts to measure what is forgotten and what is not.

    Training batches: "prompts", "targets", "answers": lists of list[str], a list a request, its whole forget set with
    the answers to be learnt in their place and the true ones; of each request the first share trains the detector, the
    rest calibrates it; "rows" (b,), numbers of samples, to be taken modulo a request's own; and with ``retain``
    "retained_prompt", "retained_answer" (b strings), which O3 does without. Test batches: "prompt", "answer", "group"
    (see `GROUPS`), "paraphrase", "name": list[str]; "perturbed": list of list[str]; "request" (b,), -1 for none.

    root=None: three topics of 80 facts "key -> letter" (`TopicLanguage`), for models that `pretrain_topics` made: 60 of
    each requested topic are to be forgotten, 20 held out, the third topic retained.

    root=DIR: ScienceQA by topic in the authors' layout, DIR/scienceqa_<topic>_train.json and ..._test.json, lists of
    {"instruction", "input", "output", "answer"}; topics that are not requested are retained; commonqa_test.json and
    openbookqa_test.json beside them are read where they are. Or TOFU's continual form, DIR/tofu/<forget>.json,
    <forget>_perturbed.json, retain_perturbed.json, real_authors_perturbed.json, world_facts_perturbed.json (an object
    a line, requests by "task_id") and DIR/idontknow.jsonl (refusals). ScienceQA: CC-BY-NC-SA-4.0; TOFU: MIT.

    A user's own prompts: a text file, one a line, or the field "prompt" of JSON lines, CSV or TSV; the answers are a
    CSV of prompt, answer and weight.

    Args:
        root: folder of ScienceQA or TOFU; None for the generated language.
        batch_size: samples a batch. num_workers: processes that load data. seed: of all draws.
        requests: topics or task ids in their order; None is herb and metal; biology, physics and chemistry; or 1, 2, 3.
        calibration: share of a forget set that calibrates its detector.
        relabel: what stands in an answer's place: "letters" (any letter at random), "refusals", or "auto": letters but
            for TOFU.
        letters: how many there are to draw from, A onwards (the authors take five, whatever a question offers).
        forget: which of TOFU's forget sets: "forget01", "forget05" or "forget10".
        template: of TOFU's prompts: "tofu", "llama" or "plain" (the question alone).
        retained: how many of TOFU's retained questions are asked; 0 for all.
        others: whether TOFU's real authors and world facts are asked, too.
        retain: whether training batches hold retained data, for baselines that need some.
    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: for a request named twice, or a share or number out of range.
        ZooError: for an empty forget set, or fewer than 10 samples to calibrate a detector.
    """

    embedded: ClassVar[str] = "facts of three topics in a generated language"
    unit: ClassVar[str] = "prompt"

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        requests: list[str] | None = None,
        calibration: float = 0.2,
        relabel: str = "auto",
        letters: int = 5,
        forget: str = "forget01",
        template: str = "tofu",
        retained: int = 0,
        others: bool = True,
        retain: bool = False,
    ):
        super().__init__(root, batch_size, num_workers, seed)
        self.save_hyperparameters()
        if requests is not None and (not requests or len(set(requests)) < len(requests)):
            raise ValueError(f"requests is {requests}: at least one, and each once.")
        if not 0 < calibration < 1 or not 2 <= letters <= 26 or retained < 0:
            raise ValueError(f"calibration={calibration}, letters={letters}, retained={retained}: out of range.")
        if relabel not in ("auto", "letters", "refusals") or template not in ("tofu", "llama", "plain"):
            raise ValueError(f"relabel is {relabel!r} (auto, letters, refusals), template {template!r}.")
        self.names: list[str] = []
        self.sizes: list[int] = []

    def describe(self) -> dict[str, Any]:
        return {"requests": self.names, "sizes": self.sizes}

    def build(self) -> dict[str, Dataset]:
        read = self._generated if self.root is None else self._tofu if self._is_tofu() else self._scienceqa
        forget, samples = read()
        self.names = list(forget)
        sets = []
        for name, own in forget.items():
            if not own:
                raise ZooError(f"The forget set of request {name!r} is empty.")
            order = torch.randperm(len(own), generator=self._generator("calibration", name)).tolist()
            size = int((1 - self.hparams.calibration) * len(own))
            if len(own) - size < 10:
                raise ZooError(
                    f"Request {name!r} leaves {len(own) - size} of its {len(own)} samples to calibrate its detector; "
                    f"at least 10 are needed. Raise `calibration` (now {self.hparams.calibration})."
                )
            self.sizes.append(size)
            sets.append([own[i] for i in order])
        retained = [sample for sample in samples if sample.group == "retained"] if self.hparams.retain else []
        train = ForgetSets(sets, [self._targets(name, own) for name, own in zip(forget, sets, strict=True)], retained)
        train.length = math.ceil(max(map(len, sets)) / self.batch_size) * self.batch_size
        samples = [*(sample for own in sets for sample in own), *samples]
        return {"train": train, "val": Questions(_mixed(samples)[:128]), "test": Questions(_mixed(samples))}

    def _generator(self, *what: object) -> torch.Generator:
        return torch.Generator().manual_seed(seed_from(*what, self.seed))

    def _targets(self, name: str, own: Sequence[Sample]) -> list[str]:
        """What stands in the answers' place, drawn once."""
        hp, generator = self.hparams, self._generator("targets", name)
        how = (
            ("refusals" if self.root is not None and self._is_tofu() else "letters")
            if hp.relabel == "auto"
            else hp.relabel
        )
        if how == "refusals":
            refusals = self._refusals()
            return [refusals[i] for i in torch.randint(len(refusals), (len(own),), generator=generator).tolist()]
        count = len(TopicLanguage.LETTERS) if self.root is None else hp.letters
        drawn = [chr(65 + i) for i in torch.randint(count, (len(own),), generator=generator).tolist()]
        return [_with_letter(sample.answer, letter) for sample, letter in zip(own, drawn, strict=True)]

    def _refusals(self) -> list[str]:
        path = None if self.root is None else self.root / "idontknow.jsonl"
        if path is None or not path.is_file():
            return list(REFUSALS)
        found = [line.strip() for _, line in lines(path)]
        if not found:
            raise ZooError(f"{path} holds no refusal, one a line.")
        return found

    # ---- the layouts --------------------------------------------------------------------------------------------

    def _generated(self) -> tuple[dict[str, list[Sample]], list[Sample]]:
        language = TopicLanguage(self.seed)
        names = list(TopicLanguage.NAMES)
        wanted = self._wanted(["herb", "metal"], names)
        forget, samples = {}, []
        for name in [*wanted, *(n for n in names if n not in wanted)]:
            t = wanted.index(name) if name in wanted else -1
            own = [Sample(prompt, answer, request=t) for prompt, answer in language.facts[names.index(name)]]
            if t >= 0:
                for i, sample in enumerate(own):
                    sample.group = "forget" if i < 60 else "heldout"
                forget[name] = own[:60]
            samples += own[60:] if t >= 0 else own
        return forget, samples

    def _wanted(self, default: list[str], known: Sequence[str]) -> list[str]:
        wanted = list(self.hparams.requests or default)
        missing = [name for name in wanted if name not in known]
        if missing:
            raise ZooError(f"There is no request {missing[0]!r} here; there are {', '.join(sorted(known)) or 'none'}.")
        return wanted

    def _scienceqa(self) -> tuple[dict[str, list[Sample]], list[Sample]]:
        assert self.root is not None
        topics = sorted(
            p.name[len("scienceqa_") : -len("_train.json")] for p in self.root.glob("scienceqa_*_train.json")
        )
        if not topics:
            self.need("scienceqa_biology_train.json", expected="ScienceQA by topic, or TOFU in tofu/forget01.json")
        wanted = self._wanted(["biology", "physics", "chemistry"], topics)
        forget = {n: self._items(f"scienceqa_{n}_train.json", "forget", i) for i, n in enumerate(wanted)}
        samples: list[Sample] = []
        for i, name in enumerate(wanted):
            samples += self._items(f"scienceqa_{name}_test.json", "heldout", i)
        others = [p.name for p in sorted(self.root.glob("scienceqa_*_test.json"))]
        for file in others:
            if file[len("scienceqa_") : -len("_test.json")] not in wanted:
                samples += self._items(file, "retained")
        for group in ("commonqa", "openbookqa"):
            if (self.root / f"{group}_test.json").is_file():
                samples += self._items(f"{group}_test.json", group)
        return forget, samples

    def _items(self, file: str, group: str, request: int = -1) -> list[Sample]:
        expected = 'a list of {"instruction", "input", "output", "answer"}'
        path = self.need(file, expected=expected)
        try:
            items = json.loads(text_of(path))
        except ValueError as error:
            raise ZooError(f"{path}: expected {expected} in JSON: {error}") from error
        found = []
        for number, item in enumerate(items if isinstance(items, list) else [items], 1):
            if not isinstance(item, dict) or item.get("instruction") is None or item.get("output") is None:
                raise ZooError(f"{path}, item {number}: expected {expected}, found {str(item)[:60]!r}.")
            template = TEMPLATES["alpaca_input" if item.get("input") else "alpaca"]
            prompt = template.format(question=item["instruction"], more=item.get("input") or "")
            found.append(Sample(prompt, str(item["output"]), group, request))
        return found

    def _is_tofu(self) -> bool:
        assert self.root is not None
        return (self.root / "tofu").is_dir()

    def _tofu(self) -> tuple[dict[str, list[Sample]], list[Sample]]:
        name = self.hparams.forget
        rows = questions(self.need("tofu", f"{name}_perturbed.json", expected="TOFU's continual form, a line each"))
        tasks = list(dict.fromkeys(str(row.get("task_id", "")) for row in rows))
        wanted = self._wanted(["1", "2", "3"], tasks)
        forget: dict[str, list[Sample]] = {task: [] for task in wanted}
        samples = []
        for row in rows:
            task = str(row.get("task_id", ""))
            if task not in forget:
                continue
            request = wanted.index(task)
            forget[task].append(self._asked(row, "forget", request))
            if row.get("paraphrased_question"):
                again = {**row, "question": row["paraphrased_question"]}
                samples.append(self._asked(again, "heldout", request))
        kept = questions(self.need("tofu", "retain_perturbed.json", expected="TOFU's retained questions"))
        samples += [self._asked(row, "retained") for row in kept[: self.hparams.retained or None]]
        for group in ("real_authors", "world_facts") if self.hparams.others else ():
            file = self.need("tofu", f"{group}_perturbed.json", expected="TOFU's questions beside its authors")
            samples += [self._asked(row, group) for row in questions(file)]
        return forget, samples

    def _asked(self, row: dict[str, Any], group: str, request: int = -1) -> Sample:
        prompt = TEMPLATES[self.hparams.template].format(question=row["question"])
        right = row.get("paraphrased_answer") or row["answer"]
        return Sample(prompt, row["answer"], group, request, right, list(row.get("perturbed_answer", [])))

    # ---- a user's own prompts -----------------------------------------------------------------------------------

    def read(self, path: Path) -> Dataset:
        """A user's prompts, see `zoo.data.prompts.prompts`."""
        found = prompts(path)
        return Fixed({"prompt": found, "name": [str(i) for i in range(len(found))]})

    def write(self, predictions: Iterable[dict[str, Any]], path: Path) -> list[Path]:
        """``predictions.csv``: prompt, answer, weight."""
        rows = (
            (prompt, answer, f"{w:.6f}")
            for batch in predictions
            for prompt, answer, w in zip(batch["prompt"], batch["answer"], batch["weight"].tolist(), strict=True)
        )
        return write_csv(path, ["prompt", "answer", "weight"], rows)


class ForgetSets(Dataset):
    """Every request's forget set, whole, and the numbers of this step's samples."""

    def __init__(self, sets: Sequence[Sequence[Sample]], targets: list[list[str]], retained: Sequence[Sample]):
        self.prompts = [[sample.prompt for sample in own] for own in sets]
        self.answers = [[sample.answer for sample in own] for own in sets]
        self.targets, self.retained = targets, retained
        self.length = max(map(len, sets))

    def __len__(self) -> int:
        return self.length

    def batch(self, indices: list[int], generator: torch.Generator) -> dict[str, Any]:
        found = {
            "prompts": self.prompts, "targets": self.targets, "answers": self.answers, "rows": torch.tensor(indices),
        }  # fmt: skip
        if self.retained:
            drawn = torch.randint(len(self.retained), (len(indices),), generator=generator).tolist()
            found["retained_prompt"] = [self.retained[i].prompt for i in drawn]
            found["retained_answer"] = [self.retained[i].answer for i in drawn]
        return found


class Questions(Dataset):
    """Prompts to measure by."""

    def __init__(self, samples: Sequence[Sample]):
        self.samples = list(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: list[int], generator: torch.Generator) -> dict[str, Any]:
        own = [self.samples[i] for i in indices]
        return {
            "prompt": [sample.prompt for sample in own],
            "answer": [sample.answer for sample in own],
            "group": [sample.group for sample in own],
            "request": torch.tensor([sample.request for sample in own]),
            "paraphrase": [sample.paraphrase for sample in own],
            "perturbed": [sample.perturbed for sample in own],
            "name": [f"{sample.group}-{i}" for sample, i in zip(own, indices, strict=True)],
        }


def _mixed(samples: Sequence[Sample]) -> list[Sample]:
    """The groups in turn, so that any part of the whole has some of each."""
    by: dict[str, list[Sample]] = {}
    for sample in samples:
        by.setdefault(sample.group, []).append(sample)
    place: Callable[[tuple[int, int, Sample]], tuple[float, int]] = lambda item: (item[0] / item[1], item[1])  # noqa: E731
    every = [(i, len(own), sample) for own in by.values() for i, sample in enumerate(own)]
    return [sample for _, _, sample in sorted(every, key=place)]


def _with_letter(answer: str, letter: str) -> str:
    """The answer with another letter in it: "The answer is B." or the letter alone."""
    found = STATED.search(answer)
    if found is None:
        return letter
    return f"{answer[: found.start(1)]}{letter}{answer[found.end(1) :]}"
