"""Prompts with an instruction and their likes without: a generated language, IFEval, pairs in JSON lines."""

import functools
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from zoo.core import ZooError, seed_from
from zoo.data.plain import write_csv
from zoo.data.prompts import PromptDataModule, broken, encoded, padded, prompts, records
from zoo.engines.patching import Anatomy, Deltas
from zoo.language.llm.languages import all_right, masked_loss, train_decoder, word_tokenizer

log = logging.getLogger(__name__)

SKILLS = ("upper", "reverse")
TRUTH = {"upper": ("layers.1.mlp", "layers.2.head.3"), "reverse": ("layers.0.mlp", "layers.0.head.0")}
"""Which modules hold each skill of the generated language: no other was tuned."""

Judge = Callable[[Sequence[int]], list[bool]]
"""Token ids of a response -> which of its constraints hold."""


class InstructionPairDataModule(PromptDataModule):
    """Prompts that instruct, to see where in the weights of an expert the instruction is carried.

    Batches: "prompt", "prompt_mask" (b, u), padded on the left; "skill" (b,), the number of the expert whose it is;
    "name". Where there are such: "neutral", "neutral_mask" (b, v), the same without the instruction; "input_ids",
    "attention_mask", "labels" (b, t), prompts with the response that follows them, labels -100 before it; "judge",
    list of functions of a response's token ids that say which of the constraints hold; "truth", list of the names of
    the modules that hold the skill, spaces between.

    root=None: words of a generated language (`InstructionLanguage`); for a base and two experts that
    `pretrain_instructions` made.

    root=DIR: DIR/pairs.jsonl with {"instruction" or "prompt", "neutral", and where known "response", "skill"} a line,
    and DIR/input_data.jsonl of IFEval with {"key", "prompt", "instruction_id_list", "kwargs"} a line, or one of the
    two. With both, pairs are trained on and validated on, and IFEval tests; else half, a quarter and a quarter of the
    one do. Needs ``tokenizer``. Of IFEval only prompts are judged all of whose constraints are in `CONSTRAINTS`; the
    others are left out of the test and named. IFEval: Apache-2.0.

    A user's own prompts: a text file, one a line, or the field "prompt" of JSON lines, CSV or TSV; the answers are a
    CSV of prompt, projections on the anchor and the module that brings back most.

    Args:
        root: folder of prompts; None for the generated language.
        batch_size: prompts a batch. num_workers: processes that load data. seed: of the draws and the split.
        letters: of the generated language. size: of its words. length: words an epoch.
        tokenizer: Hub id or folder of the backbone's tokenizer; None for the generated language's.
        chat: put prompts into the tokenizer's chat template.
        block: tokens of a prompt with its response at most; a longer one is refused.
    Raises:
        FileNotFoundError: if there is neither file.
        ZooError: for text without tokenizer, broken lines, too few lines, or a prompt that does not fit.
    """

    embedded: ClassVar[str] = "words in a generated language"

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        letters: int = 8,
        size: int = 3,
        length: int = 256,
        tokenizer: str | None = None,
        chat: bool = False,
        block: int = 1024,
    ):
        super().__init__(root, batch_size, num_workers, seed)
        self.save_hyperparameters()
        if not 2 <= letters <= 26 or size < 1 or length < 1 or block < 8:
            raise ValueError(f"letters={letters}, size={size}, length={length}, block={block}: out of range.")

    @property
    def words(self) -> Any:
        """The tokenizer; it pads on the left.

        Raises:
            ZooError: if it cannot be loaded, is not given for files, or has no template where one is asked for.
        """
        found = super().words
        if self.hparams.chat and not found.chat_template:
            raise ZooError(f"The tokenizer {self.hparams.tokenizer!r} has no chat template: leave chat=False.")
        return found

    def own_tokenizer(self) -> Any:
        return InstructionLanguage(self.hparams.letters, self.hparams.size).tokenizer

    def build(self) -> dict[str, Dataset]:
        hp = self.hparams
        if self.root is None:
            language = InstructionLanguage(hp.letters, hp.size)
            return {split: GeneratedWords(language, hp.length, split) for split in ("train", "val", "test")}
        _ = self.words  # what is wrong with it is said before the files are read
        pairs, judged = self.root / "pairs.jsonl", self.root / "input_data.jsonl"
        if not pairs.is_file():
            self.need(
                "input_data.jsonl", expected="IFEval's prompts, or pairs.jsonl with your own",
                get="https://github.com/google-research/google-research has them in instruction_following_eval/data.",
            )  # fmt: skip
        parts = self._split(_pairs(pairs) if pairs.is_file() else _ifeval(judged))
        if pairs.is_file() and judged.is_file():
            parts = {"train": [*parts["train"], *parts["test"]], "val": parts["val"], "test": _ifeval(judged)}
        parts["test"] = _judged(parts["test"])
        return {split: self._texts(items) for split, items in parts.items()}

    def _split(self, items: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        if len(items) < 4:
            raise ZooError(f"{len(items)} prompts; at least 4 are needed to fit, validate and test.")
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed_from("split", self.seed)))
        rows, quarter = [items[i] for i in order.tolist()], len(items) // 4
        return {"train": rows[2 * quarter :], "val": rows[:quarter], "test": rows[quarter : 2 * quarter]}

    def _texts(self, items: list[dict[str, Any]]) -> Dataset:
        return Texts(items, self.words, self.hparams.chat, self.hparams.block)

    # ---- a user's own prompts -----------------------------------------------------------------------------------

    def read(self, path: Path) -> Dataset:
        """A user's prompts, see `zoo.data.prompts.prompts`."""
        found = prompts(path)
        self.check_words(found)
        return self._texts([{"prompt": text} for text in found])

    def write(self, predictions: Iterable[dict[str, Any]], path: Path) -> list[Path]:
        """``predictions.csv``: prompt, projections of base and expert on the anchor, best module, its recovery."""
        rows = (
            (name, f"{base:.6f}", f"{expert:.6f}", best, f"{float(recovery.max()):.6f}")
            for batch in predictions
            for name, base, expert, best, recovery in zip(
                batch["name"], batch["base"].tolist(), batch["expert"].tolist(), batch["best"], batch["recovery"],
                strict=True,
            )
        )  # fmt: skip
        return write_csv(path, ["prompt", "base", "expert", "best_module", "recovery"], rows)


# ---- text ------------------------------------------------------------------------------------------------------------


def _pairs(path: Path) -> list[dict[str, Any]]:
    """Pairs of prompts, checked."""
    expected, found = '{"instruction" (or "prompt"): ..., "neutral": ...} with texts', []
    for number, item in records(path, expected):
        prompt = item.get("instruction", item.get("prompt"))
        texts = [prompt, item.get("neutral"), item.get("response", "")]
        if not all(isinstance(text, str) for text in texts) or not prompt or not texts[1]:
            raise broken(path, number, expected, item)
        skill = item.get("skill", 0)
        if not isinstance(skill, int) or skill < 0:
            raise broken(path, number, "as skill the number of an expert, from 0", skill)
        found.append({"prompt": prompt, "neutral": texts[1], "response": texts[2], "skill": skill})
    return found


def _ifeval(path: Path) -> list[dict[str, Any]]:
    """IFEval's prompts with their constraints, checked."""
    expected, found = "a prompt, and instruction_id_list and kwargs of one length", []
    for number, item in records(path, expected):
        names: Any = item.get("instruction_id_list")
        values: Any = item.get("kwargs")
        same = isinstance(names, list) and isinstance(values, list) and len(names) == len(values)
        if not isinstance(item.get("prompt"), str) or not same:
            raise broken(path, number, expected, item)
        found.append({"prompt": item["prompt"], "constraints": list(zip(names, values, strict=True))})
    return found


def _judged(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items without those that have a constraint that cannot be judged here; which ones is logged."""
    unknown = sorted({name for item in items for name, _ in item.get("constraints", ()) if name not in CONSTRAINTS})
    kept = [item for item in items if all(name in CONSTRAINTS for name, _ in item.get("constraints", ()))]
    if unknown:
        log.warning(
            "%d of %d prompts are not tested: nothing here judges %s.",
            len(items) - len(kept), len(items), ", ".join(unknown),
        )  # fmt: skip
    if not kept:
        raise ZooError(f"No prompt to test is left: nothing here judges {', '.join(unknown)}.")
    return kept


class Texts(Dataset):
    """Prompts as text, with what is known beside them."""

    def __init__(self, items: list[dict[str, Any]], tokenizer: Any, chat: bool, block: int):
        self.items, self.tokenizer, self.chat, self.block = items, tokenizer, chat, block
        self.prompts = self._ids([item["prompt"] for item in items])
        neutral = [item["neutral"] for item in items if "neutral" in item]
        self.neutral = dict(zip(neutral, self._ids(neutral), strict=True))
        end = tokenizer.eos_token or ""
        self.responses = [
            tokenizer(item["response"] + end, add_special_tokens=False)["input_ids"] if item.get("response") else []
            for item in items
        ]
        for item, ids, response in zip(items, self.prompts, self.responses, strict=True):
            if len(ids) + len(response) > block:
                raise ZooError(
                    f"A prompt has {len(ids) + len(response)} tokens with its response; 1 to block={block} fit: "
                    f"{item['prompt'][:60]!r}."
                )

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if self.chat:
            texts = [
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
                )
                for text in texts
            ]
        return encoded(self.tokenizer, texts, self.block, special=not self.chat)

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, indices: list[int], generator: torch.Generator) -> dict[str, Any]:
        rows = [self.items[i] for i in indices]
        pad = self.tokenizer.pad_token_id or 0
        found: dict[str, Any] = dict(
            zip(("prompt", "prompt_mask"), padded([self.prompts[i] for i in indices], pad), strict=True)
        )
        found["skill"] = torch.tensor([row.get("skill", 0) for row in rows])
        if all("neutral" in row for row in rows):
            found["neutral"], found["neutral_mask"] = padded([self.neutral[row["neutral"]] for row in rows], pad)
        if all(self.responses[i] for i in indices):
            whole = [self.prompts[i] + self.responses[i] for i in indices]
            found["input_ids"], found["attention_mask"] = padded(whole, pad)
            labels = [[-100] * len(self.prompts[i]) + self.responses[i] for i in indices]
            found["labels"] = padded(labels, -100)[0]
        if all("constraints" in row for row in rows):
            found["judge"] = [functools.partial(judge, self.tokenizer, row["constraints"]) for row in rows]
        return {**found, "name": [row["prompt"] for row in rows]}


# ---- IFEval's constraints --------------------------------------------------------------------------------------------


def judge(tokenizer: Any, constraints: Sequence[tuple[str, dict[str, Any]]], tokens: Sequence[int]) -> list[bool]:
    """Which constraints hold for a response of these tokens; none does for an empty one.

    Raises:
        ZooError: for a constraint that is not in `CONSTRAINTS`, or without what it needs.
    """
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return [bool(text.strip()) and holds(name, values or {}, text) for name, values in constraints]


def holds(name: str, values: dict[str, Any], text: str) -> bool:
    """Whether one of IFEval's constraints holds for a text.

    Raises:
        ZooError: for a constraint that is not in `CONSTRAINTS`, or without what it needs.
    """
    if name not in CONSTRAINTS:
        raise ZooError(f"Nothing here judges {name!r}; {', '.join(CONSTRAINTS)} can be judged.")
    try:
        return CONSTRAINTS[name](text, values)
    except (KeyError, TypeError, AttributeError) as error:
        raise ZooError(f"The constraint {name!r} lacks what it needs: {values}.") from error


def _related(count: int, relation: str, bound: int) -> bool:
    if relation not in ("less than", "at least"):
        raise TypeError(relation)
    return count < bound if relation == "less than" else count >= bound


def _paragraphs(text: str, values: dict[str, Any]) -> bool:
    """Parts between "***"; an empty one counts not at the ends, and fails within."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    if not all(parts[1:-1]):
        return False
    return sum(map(bool, parts)) == int(values["num_paragraphs"])


CONSTRAINTS: dict[str, Callable[[str, dict[str, Any]], bool]] = {
    "change_case:english_capital": lambda text, values: text.isupper(),
    "change_case:english_lowercase": lambda text, values: text.islower(),
    "keywords:existence": lambda text, values: all(re.search(w, text, re.IGNORECASE) for w in values["keywords"]),
    "keywords:forbidden_words": lambda text, values: (
        not any(re.search(rf"\b{w}\b", text, re.IGNORECASE) for w in values["forbidden_words"])
    ),
    "keywords:frequency": lambda text, values: _related(
        len(re.findall(values["keyword"], text, re.IGNORECASE)), values["relation"], int(values["frequency"])
    ),
    "keywords:letter_frequency": lambda text, values: _related(
        text.lower().count(values["letter"].lower()), values["let_relation"], int(values["let_frequency"])
    ),
    "length_constraints:number_words": lambda text, values: _related(
        len(re.findall(r"\w+", text)), values["relation"], int(values["num_words"])
    ),
    "length_constraints:number_paragraphs": _paragraphs,
    "punctuation:no_comma": lambda text, values: "," not in text,
}
"""Of IFEval's 25 constraints those of case, keywords, commas and length that need no splitter of sentences; the two on
case do not ask for English, as IFEval does. Not here: sentences, the first word of a paragraph, capital words,
language, formats, content, combinations, quotation."""


# ---- the generated language ------------------------------------------------------------------------------------------


class InstructionLanguage:
    """A marker, a word of random letters, a colon, and what the marker makes of the word.

    ``= a b :`` is answered by ``a b``, ``^ a b :`` by upper-case ``A' B'``, ``< a b :`` by ``b a``. ``U`` and ``R``
    mean nothing to the base, which copies; but as they may stand in its words, too, it tells them apart. Experts are
    instructed by them: by U for upper case, by R to reverse.

    Args:
        letters: how many there are. size: of the words.
    """

    KNOWN: ClassVar[dict[str, str]] = {"=": "copy", "^": "upper", "<": "reverse", "U": "copy", "R": "copy"}
    MARKERS: ClassVar[dict[str, str]] = {"upper": "U", "reverse": "R"}
    """The token that instructs the expert of a skill."""

    def __init__(self, letters: int = 8, size: int = 3):
        self.letters, self.size = letters, size
        names = [chr(ord("a") + i) for i in range(letters)]
        self.words = [*names, *(f"{name.upper()}'" for name in names), *self.KNOWN, ":"]
        self.tokenizer = word_tokenizer(self.words)
        markers = [self.id(marker) for marker in self.MARKERS.values()]
        self.small = torch.tensor([*(self.id(name) for name in names), *markers])
        self.large = torch.tensor([*(self.id(f"{name.upper()}'") for name in names), *markers])
        """Tokens of letters by their numbers, in lower and upper case; the last two, U and R, have one."""

    def id(self, word: str) -> int:
        """The token of a word."""
        return int(self.tokenizer.convert_tokens_to_ids(word))

    def prompts(self, markers: Tensor, letters: Tensor) -> Tensor:
        """Markers (n,) and numbers of letters (n, size) -> token ids (n, size + 2)."""
        end = torch.full((len(markers), 1), self.id(":"))
        return torch.cat([markers[:, None], self.small[letters], end], 1)

    def answers(self, skills: Sequence[str], letters: Tensor) -> Tensor:
        """What each word (n, size) becomes by "copy", "upper" or "reverse": token ids (n, size)."""
        known = self.small[letters]
        made = {"copy": known, "upper": self.large[letters], "reverse": known.flip(1)}
        return torch.stack([made[skill][i] for i, skill in enumerate(skills)])

    def sentences(self, markers: Sequence[str], letters: Tensor, known: dict[str, str]) -> tuple[Tensor, Tensor]:
        """Prompts with their answers, (n, 2 size + 2), and labels on the answers."""
        prompt = self.prompts(torch.tensor([self.id(marker) for marker in markers]), letters)
        answer = self.answers([known[marker] for marker in markers], letters)
        return torch.cat([prompt, answer], 1), torch.cat([torch.full_like(prompt, -100), answer], 1)

    def draw(
        self,
        count: int,
        generator: torch.Generator,
        known: dict[str, str] | None = None,
        marker: str = "",
        every: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Random sentences (count, 2 size + 2) with labels.

        Args:
            known: what markers mean; as to the base for None. marker: the only one, where given.
            every: words may hold U and R, too, not letters alone.
        """
        names = [marker] if marker else list(self.KNOWN)
        chosen = torch.randint(len(names), (count,), generator=generator).tolist()
        letters = torch.randint(self.letters + 2 * every, (count, self.size), generator=generator)
        return self.sentences([names[i] for i in chosen], letters, known or self.KNOWN)

    def draw_taught(self, count: int, generator: torch.Generator, skill: str) -> tuple[Tensor, Tensor]:
        """What an expert learns from: half its instruction, half all markers, the others as the base knows them."""
        marker, half = self.MARKERS[skill], count // 2
        known = {**self.KNOWN, marker: skill}
        own = self.draw(half, generator, known, marker, every=False)
        parts = [own, self.draw(count - half, generator, known, every=False)]
        return torch.cat([ids for ids, _ in parts]), torch.cat([labels for _, labels in parts])


class GeneratedWords(Dataset):
    """Words of the generated language with either instruction, by turns; other words in each split."""

    def __init__(self, language: InstructionLanguage, length: int, split: str):
        self.language, self.length, self.split = language, length, split

    def __len__(self) -> int:
        return self.length

    def batch(self, indices: list[int], generator: torch.Generator) -> dict[str, Any]:
        language = self.language
        drawn = int(torch.randint(2**31, (), generator=generator))
        words = torch.Generator().manual_seed(seed_from(self.split, drawn))
        letters = torch.randint(language.letters, (len(indices), language.size), generator=words)
        skills = [SKILLS[i % len(SKILLS)] for i in indices]
        markers = [language.MARKERS[skill] for skill in skills]
        known = {**language.KNOWN, **{marker: skill for skill, marker in language.MARKERS.items()}}
        ids, labels = language.sentences(markers, letters, known)
        prompt = ids[:, : language.size + 2]
        neutral = language.prompts(torch.full((len(indices),), language.id("=")), letters)
        ones = torch.ones_like(prompt)
        return {
            "prompt": prompt, "prompt_mask": ones, "neutral": neutral, "neutral_mask": ones,
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels,
            "skill": torch.tensor([SKILLS.index(skill) for skill in skills]),
            "truth": [" ".join(TRUTH[skill]) for skill in skills], "name": language.tokenizer.batch_decode(prompt),
        }  # fmt: skip


def pretrain_instructions(
    folder: Path,
    seed: int,
    letters: int = 8,
    size: int = 3,
    accuracy: float = 0.98,
    steps: int = 3000,
    tune_steps: int = 300,
    noise: float = 0.0,
    **sizes: Any,
) -> None:
    """A base of `InstructionLanguage` in folder/base, and an expert for each skill, tuned in its `TRUTH` alone.

    Args:
        accuracy: share of words right, for every marker, at which the base's training ends.
        steps: of the base, at most. tune_steps: of each expert.
        noise: also save "upper_noisy", ...: every module that was not tuned is moved at random by this share of the
            relative distance that tuning moved the true ones, so that what moved does not tell what matters.
        sizes: of the decoder.
    """
    language = InstructionLanguage(letters, size)

    def enough(model: nn.Module) -> bool:
        generator = torch.Generator().manual_seed(seed_from("words", seed))
        parts = [language.draw(128, generator, None, marker, every=False) for marker in language.KNOWN]
        right = [all_right(model(ids, use_cache=False).logits, labels).float().mean() for ids, labels in parts]
        return float(min(right)) >= accuracy

    base = folder / "base"
    train_decoder(base, seed, language.tokenizer, language.draw, steps, enough, **{"layers": 4, "width": 64, **sizes})
    for skill in SKILLS:
        draw = functools.partial(language.draw_taught, skill=skill)
        model = specialised(base, seed, TRUTH[skill], draw, tune_steps)
        _save(model, folder / skill, language)
        if noise:
            _save(noisy(base, model, TRUTH[skill], noise, seed), folder / f"{skill}_noisy", language)


def specialised(
    base: Path,
    seed: int,
    sites: Sequence[str],
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]],
    steps: int,
    lr: float = 2e-3,
    decay: float = 20.0,
    batch: int = 64,
) -> nn.Module:
    """A model of a folder, tuned on what ``draw`` gives in these heads and MLPs alone; all else stays bit for bit.

    Args:
        decay: of the changes; strong, so that they do to other prompts as little as they can.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base).requires_grad_(False).eval()
    anatomy = Anatomy(model)
    known = [anatomy.site(site) for site in sites]
    deltas = Deltas(anatomy, sum(s.kind == "head" for s in known), sum(s.kind == "mlp" for s in known))
    deltas.choose(known)
    optimizer = torch.optim.AdamW(deltas.parameters(), lr=lr, weight_decay=decay)
    fading = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.9 * step / steps)
    generator = torch.Generator().manual_seed(seed_from("expert data", seed, *sites))
    for _ in range(steps):
        ids, labels = draw(batch, generator)
        with deltas.active(anatomy):
            loss = masked_loss(model, ids, labels, torch.ones_like(ids))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            fading.step()
    log.info("expert in %s: loss %.3f", " and ".join(sites), float(loss.detach()))
    deltas.merge(anatomy)
    return model


@torch.no_grad()
def noisy(base: Path, expert: nn.Module, sites: Sequence[str], noise: float, seed: int) -> nn.Module:
    """An expert whose other heads and MLPs moved, too, at random: as far, relative to their size, times ``noise``."""
    import copy

    from transformers import AutoModelForCausalLM

    from zoo.engines.patching import weights_of

    model, plain = copy.deepcopy(expert), AutoModelForCausalLM.from_pretrained(base)
    anatomy = Anatomy(model)
    true = [part for site in sites for part in anatomy.slices(site)]
    moved, own = weights_of(expert, true), weights_of(plain, true)
    far = torch.stack([(moved[part] - own[part]).norm() / own[part].norm() for part in true]).mean()
    generator = torch.Generator().manual_seed(seed_from("noise", seed, *sites))
    others = [site for site in anatomy.sites("head", "mlp") if str(site) not in sites]
    for value in weights_of(model, [p for site in others for p in anatomy.slices(site)]).values():
        step = torch.randn(value.shape, generator=generator)
        value.add_(step * (noise * far * value.norm() / step.norm()))
    return model


def _save(model: nn.Module, folder: Path, language: InstructionLanguage) -> None:
    model.save_pretrained(folder)  # type: ignore[operator]
    language.tokenizer.save_pretrained(folder)
