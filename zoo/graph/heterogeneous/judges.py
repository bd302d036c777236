"""Judges: who says which neighbour of a meta-structure is worth trying. A language model, or something cheaper.

    predict   a score in [0, 1] and a confidence in [0, 1] for every candidate, from structures with known scores
    select    the candidate to try next
    explain   why the best structure does better than its neighbours

`SimilarityJudge` needs no language model: kernel regression over edit similarity. `RandomJudge` is the control.
`ModelJudge` asks a local model of `transformers`, `ServerJudge` any server that speaks the OpenAI chat protocol, and
`ReplayJudge` a log of what one of them was asked and answered.
"""

import collections
import hashlib
import json
import logging
import math
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.core import ZooError, seed_from
from zoo.graph.heterogeneous.meta_structure import MetaStructure, Schema, differences, similarity

log = logging.getLogger(__name__)

Scored = list[tuple[MetaStructure, float]]
"""Structures with their validation scores in [0, 1], the larger the better."""
Predictions = list[tuple[float, float]]
"""A score and a confidence for every candidate."""
Message = dict[str, str]
"""``{"role": "system" | "user" | "assistant", "content": text}``."""


class Judge:
    """What the search asks: `begin` once, then, for every structure that is to be changed, `turn` and the questions.

    A subclass writes `predict` and `select`.
    """

    schema: Schema
    task = "node classification"
    seed = 0

    def begin(self, schema: Schema, task: str) -> "Judge":
        """Take the network's schema and the task in words; returns self."""
        self.schema, self.task = schema, task
        return self

    def turn(self, seed: int) -> None:
        """What follows draws from this seed alone, so that a resumed search asks and is answered the same."""
        self.seed = seed

    def predict(self, candidates: Sequence[MetaStructure], known: Scored) -> Predictions:
        """A score and a confidence for every candidate."""
        raise NotImplementedError

    def select(
        self, current: MetaStructure, candidates: Sequence[MetaStructure], predictions: Predictions | None
    ) -> int:
        """The place of the candidate to try; ``predictions`` are None in the first generation."""
        raise NotImplementedError

    def explain(self, best: tuple[MetaStructure, float], others: Scored) -> str:
        """A text that compares the best structure with its neighbours and their scores: sorted, counted, in words."""
        structure, score = best
        lines = [f"Best: {structure.sentence(self.schema)} (score {score:.4f})."]
        for other, value in sorted(others, key=lambda pair: -pair[1]):
            change = differences(structure, other)
            verdict = "no worse" if value >= score else f"worse by {score - value:.4f}"
            lines.append(f"With {change}: {verdict} ({value:.4f}), {other.sentence(self.schema)}.")
        if not others:
            lines.append("None of its neighbours was tried.")
        return "\n".join(lines)


class SimilarityJudge(Judge):
    """Kernel regression over edit similarity: what resembles good structures is predicted to be good.

        score(c) = (sum_i k_i y_i + y_mean) / (sum_i k_i + 1),   k_i = exp(-(1 - similarity(c, i)) / width)
        confidence(c) = sum_i k_i / (sum_i k_i + 1)

    The candidate with the largest score + curiosity (1 - confidence) is taken: what resembles little that was tried may
    be better than all of it. Before anything is known, the one with the most types of nodes, then the smallest.

    Args:
        width: of the kernel, in units of similarity.
        curiosity: what not knowing is worth, in units of the score.
    """

    def __init__(self, width: float = 0.2, curiosity: float = 0.3):
        if width <= 0 or curiosity < 0:
            raise ValueError(f"width is {width} and curiosity {curiosity}; they must be above 0 and at least 0.")
        self.width, self.curiosity = width, curiosity

    def predict(self, candidates: Sequence[MetaStructure], known: Scored) -> Predictions:
        scores = [score for _, score in known]
        mean = sum(scores) / len(scores) if scores else 0.5
        found = []
        for candidate in candidates:
            kernel = [math.exp((similarity(candidate, s) - 1.0) / self.width) for s, _ in known]
            weight = sum(kernel) + 1.0
            total = sum(k * y for k, y in zip(kernel, scores, strict=True)) + mean
            found.append((min(max(total / weight, 0.0), 1.0), 1.0 - 1.0 / weight))
        return found

    def select(
        self, current: MetaStructure, candidates: Sequence[MetaStructure], predictions: Predictions | None
    ) -> int:
        if predictions is None:
            keys = [(len(set(c.types)), -len(c), -i) for i, c in enumerate(candidates)]
            return max(range(len(candidates)), key=lambda i: keys[i])
        values = [score + self.curiosity * (1.0 - sure) for score, sure in predictions]
        return max(range(len(candidates)), key=lambda i: values[i])


class RandomJudge(Judge):
    """Any candidate, each as likely: what a judge has to beat at the same number of evaluations."""

    def turn(self, seed: int) -> None:
        super().turn(seed)
        self._random = random.Random(seed_from(seed, "random judge"))

    def predict(self, candidates: Sequence[MetaStructure], known: Scored) -> Predictions:
        return [(0.5, 0.0) for _ in candidates]

    def select(
        self, current: MetaStructure, candidates: Sequence[MetaStructure], predictions: Predictions | None
    ) -> int:
        return self._random.randrange(len(candidates))


# ---- judges that are asked in words ----------------------------------------------------------------------------------


class TextJudge(Judge):
    """Asks in words and reads the answer strictly; asks again saying what was wrong, and at last answers by similarity.

    A subclass writes `ask`.

    Args:
        retries: how often an answer that cannot be read is asked for again.
        log_file: file that every question and answer is appended to, one JSON object a line; "" for none.
    """

    def __init__(self, retries: int = 2, log_file: str = ""):
        if retries < 0:
            raise ValueError(f"retries is {retries}; it must be at least 0.")
        self.retries, self.log_file = retries, log_file
        self.fallback = SimilarityJudge()
        self.failures = 0

    def begin(self, schema: Schema, task: str) -> "Judge":
        self.fallback.begin(schema, task)
        return super().begin(schema, task)

    def ask(self, messages: list[Message]) -> str:
        """The answer to a conversation.

        Raises:
            ZooError: where none came.
        """
        raise NotImplementedError

    # ---- questions ----------------------------------------------------------------------------------------------

    def system(self) -> str:
        """What every question begins with: the network, how structures are written, what helps."""
        s = self.schema
        edges = "; ".join(f"{a} {s.say(a, b)} {b}" for x, y in s.relations for a, b in dict.fromkeys(((x, y), (y, x))))
        return (
            f"A heterogeneous network has nodes of the types {', '.join(s.types)}. Its edges, read in both directions: "
            f"{edges}. A meta-structure is a small typed graph that joins a source node of type {s.source}, number 0, "
            f"to a target node of type {s.target}, number 1; a graph neural network gathers information along it for "
            f"{self.task}. It is written as clauses joined by THAT, each naming the edge and the next node with its "
            "number; where several edges leave a node, their clauses are bracketed and joined by AND. Structures that "
            "mean similar things tend to score similarly. Structures with several types of nodes are often better than "
            "those with one or two. Overly long ones are rarely meaningful."
        )

    def predict_question(self, candidates: Sequence[MetaStructure], known: Scored) -> str:
        """The question behind `predict`."""
        told = "\n".join(f"{score:.4f}: {s.sentence(self.schema)}" for s, score in known)
        return (
            f"Validation scores of structures that were tried (larger is better):\n{told or 'none yet'}\n\n"
            f"Structures that were not tried:\n{self._listed(candidates)}\n\n"
            "Predict the score of each, between 0 and 1, and how sure you are, between 0 and 1. Answer with one line "
            "for each and nothing else, in this form:\nCandidate 0, performance 0.50, confidence 0.50"
        )

    def select_question(
        self, current: MetaStructure, candidates: Sequence[MetaStructure], predictions: Predictions | None
    ) -> str:
        """The question behind `select`."""
        return (
            f"The structure to improve:\n{current.sentence(self.schema)}\n\nStructures one change away from it:\n"
            f"{self._listed(candidates, predictions)}\n\nWhich of them is most worth trying next? Where the present "
            "structure is too complicated to mean something, take a shorter one. Answer with one line and nothing "
            "else, in this form:\nCandidate 0"
        )

    def explain_question(self, best: tuple[MetaStructure, float], others: Scored) -> str:
        """The question behind `explain`."""
        near = "\n".join(f"{score:.4f} ({differences(best[0], s)}): {s.sentence(self.schema)}" for s, score in others)
        return (
            f"The best structure scores {best[1]:.4f}:\n{best[0].sentence(self.schema)}\n\nIts neighbours, what sets "
            f"each apart from it, and their scores:\n{near or 'none was tried'}\n\nExplain to somebody who knows the "
            "data why it works: which parts of it help and which parts that a neighbour has would hurt, each with the "
            "scores that show it. At most eight sentences."
        )

    def _listed(self, candidates: Sequence[MetaStructure], predictions: Predictions | None = None) -> str:
        lines = []
        for i, candidate in enumerate(candidates):
            told = "" if predictions is None else " (predicted {:.4f}, confidence {:.2f})".format(*predictions[i])
            lines.append(f"Candidate {i}: {candidate.sentence(self.schema)}{told}")
        return "\n".join(lines)

    # ---- answers ------------------------------------------------------------------------------------------------

    def predict(self, candidates: Sequence[MetaStructure], known: Scored) -> Predictions:
        question, count = self.predict_question(candidates, known), len(candidates)
        fallback = self.fallback.predict(candidates, known)
        found = self._converse(question, lambda answer: read_predictions(answer, count))
        return fallback if found is None else found

    def select(
        self, current: MetaStructure, candidates: Sequence[MetaStructure], predictions: Predictions | None
    ) -> int:
        question, count = self.select_question(current, candidates, predictions), len(candidates)
        found = self._converse(question, lambda answer: read_choice(answer, count))
        return self.fallback.select(current, candidates, predictions) if found is None else found

    def explain(self, best: tuple[MetaStructure, float], others: Scored) -> str:
        found = self._converse(self.explain_question(best, others), read_text)
        return super().explain(best, others) if found is None else found

    def _converse(self, question: str, read: Any) -> Any:
        """Ask until the answer can be read; None where it never can."""
        messages = [{"role": "system", "content": self.system()}, {"role": "user", "content": question}]
        problem = ""
        for _ in range(self.retries + 1):
            try:
                answer = self.ask(messages)
            except ZooError as error:
                problem = str(error)
                break
            self._note(messages, answer)
            try:
                return read(answer)
            except ValueError as error:
                problem = str(error)
                complaint = f"{problem} Answer again, in the form asked for and with nothing else."
                messages = [
                    *messages,
                    {"role": "assistant", "content": answer},
                    {"role": "user", "content": complaint},
                ]
        self.failures += 1
        log.warning("%s gave no usable answer, similarity answers instead: %s", type(self).__name__, problem)
        return None

    def _note(self, messages: list[Message], answer: str) -> None:
        if self.log_file:
            path = Path(self.log_file).expanduser()
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as stream:
                stream.write(
                    json.dumps({"turn": self.seed, "messages": messages, "answer": answer}, ensure_ascii=False) + "\n"
                )


_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_PREDICTION = re.compile(
    rf"^\W*candidate\s+(\d+)\W+(?:predicted\s+)?performance[^\w.]*{_NUMBER}\W+confidence[^\w.]*{_NUMBER}\W*$", re.I
)
_CHOICE = re.compile(r"^\W*(?:candidate\s+)?(\d+)\W*$", re.I)


def read_predictions(answer: str, count: int) -> Predictions:
    """One line a candidate, "Candidate i, performance p, confidence c"; empty lines may stand between.

    Raises:
        ValueError: for any other line, a number outside of [0, 1], or a candidate that is missing, repeated or unknown.
    """
    found: dict[int, tuple[float, float]] = {}
    for line in filter(str.strip, answer.splitlines()):
        match = _PREDICTION.match(line)
        if match is None:
            raise ValueError(f"The line {line.strip()[:60]!r} is not 'Candidate i, performance p, confidence c'.")
        i, score, sure = int(match[1]), float(match[2]), float(match[3])
        if not (i < count and 0 <= score <= 1 and 0 <= sure <= 1):
            raise ValueError(f"{line.strip()[:60]!r}: candidates are 0 to {count - 1}, both numbers lie in 0 to 1.")
        if i in found:
            raise ValueError(f"Candidate {i} comes twice.")
        found[i] = (score, sure)
    missing = [i for i in range(count) if i not in found]
    if missing:
        raise ValueError(f"Candidates {', '.join(map(str, missing))} are missing.")
    return [found[i] for i in range(count)]


def read_choice(answer: str, count: int) -> int:
    """One line, "Candidate i".

    Raises:
        ValueError: for anything else, or an unknown candidate.
    """
    lines = [line for line in answer.splitlines() if line.strip()]
    match = _CHOICE.match(lines[0]) if len(lines) == 1 else None
    if match is None:
        raise ValueError(f"{answer.strip()[:60]!r} is not one line 'Candidate i'.")
    if int(match[1]) >= count:
        raise ValueError(f"There is no candidate {int(match[1])}; they are 0 to {count - 1}.")
    return int(match[1])


def read_text(answer: str) -> str:
    """Any text that is not empty.

    Raises:
        ValueError: for an empty one.
    """
    if not answer.strip():
        raise ValueError("The answer is empty.")
    return answer.strip()


class ModelJudge(TextJudge):
    """A causal language model of `transformers`, by its Hub id or folder; its chat template is used where it has one.

    Args:
        model: Hub id or folder.
        revision: commit, tag or branch on the Hub.
        device: where it runs; "auto" is CUDA where there is one.
        max_tokens: longest answer.
        temperature: 0 takes the likeliest token always.
        retries, log_file: see `TextJudge`.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        device: str = "auto",
        max_tokens: int = 1000,
        temperature: float = 0.6,
        retries: int = 2,
        log_file: str = "",
    ):
        super().__init__(retries, log_file)
        self.name, self.revision, self.max_tokens, self.temperature = model, revision, max_tokens, temperature
        self.device = device
        self._loaded: tuple[Any, Any] | None = None
        self._asked = 0

    def _model(self) -> tuple[Any, Any]:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if self._loaded is None:
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.name, revision=self.revision)
                model = AutoModelForCausalLM.from_pretrained(self.name, revision=self.revision)
            except (OSError, ValueError) as error:
                text = (str(error).splitlines() or ["unknown"])[0]
                raise ZooError(
                    f"The judge's language model {self.name!r} cannot be loaded: {text[:200]} Give the Hub id or the "
                    "folder of a causal model with its tokenizer."
                ) from error
            auto = "cuda" if torch.cuda.is_available() else "cpu"
            self._loaded = tokenizer, model.eval().to(auto if self.device == "auto" else self.device)
        return self._loaded

    def begin(self, schema: Schema, task: str) -> "Judge":
        self._model()  # a model that is not there is told before anything is trained
        return super().begin(schema, task)

    def turn(self, seed: int) -> None:
        super().turn(seed)
        self._asked = 0

    def ask(self, messages: list[Message]) -> str:
        import torch

        tokenizer, model = self._model()
        if getattr(tokenizer, "chat_template", None):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            text = "\n\n".join(f"{m['role']}: {m['content']}" for m in messages) + "\n\nassistant:"
        given = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and given.shape[1] >= limit:
            raise ZooError(
                f"The question has {given.shape[1]} tokens, the judge's model takes {limit}. Show fewer candidates."
            )
        longest = self.max_tokens if limit is None else min(self.max_tokens, limit - given.shape[1])
        draw = {"do_sample": True, "temperature": self.temperature} if self.temperature > 0 else {"do_sample": False}
        self._asked += 1
        state = torch.random.get_rng_state()
        try:
            torch.manual_seed(seed_from(self.seed, "model judge", self._asked))
            with torch.no_grad():
                out = model.generate(
                    given,
                    attention_mask=torch.ones_like(given),
                    max_new_tokens=longest,
                    pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
                    **draw,
                )
        finally:
            torch.random.set_rng_state(state)
        return str(tokenizer.decode(out[0, given.shape[1] :], skip_special_tokens=True))


class ServerJudge(TextJudge):
    """Any server that speaks the OpenAI chat protocol: ``POST ADDRESS/chat/completions``.

    Args:
        address: such as "http://localhost:8000/v1".
        model: its name there.
        key_variable: name of the environment variable that holds the key; it is read when asked and never stored.
        temperature, max_tokens: the paper's.
        timeout: seconds to wait for an answer.
        attempts: how often one question is sent, where the server is busy or silent.
        pause: seconds before the second attempt; doubled before each further one.
        retries, log_file: see `TextJudge`.
    """

    def __init__(
        self,
        address: str,
        model: str,
        key_variable: str = "OPENAI_API_KEY",
        temperature: float = 0.6,
        max_tokens: int = 1000,
        timeout: float = 120.0,
        attempts: int = 5,
        pause: float = 2.0,
        retries: int = 2,
        log_file: str = "",
    ):
        super().__init__(retries, log_file)
        if not address.startswith(("http://", "https://")):
            raise ValueError(f"address is {address!r}; it must start with http:// or https://.")
        if attempts < 1 or timeout <= 0:
            raise ValueError(f"attempts is {attempts} and timeout {timeout}; they must be at least 1 and above 0.")
        self.address, self.name, self.key_variable = address.rstrip("/"), model, key_variable
        self.temperature, self.max_tokens, self.timeout = temperature, max_tokens, timeout
        self.attempts, self.pause = attempts, pause

    def ask(self, messages: list[Message]) -> str:
        content = {
            "model": self.name,
            "messages": messages,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.key_variable, "")
        if key:
            headers["Authorization"] = f"Bearer {key}"
        url, problem = f"{self.address}/chat/completions", ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            request = urllib.request.Request(url, json.dumps(content).encode(), headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as stream:
                    answer = json.load(stream)["choices"][0]["message"]["content"]
                if not isinstance(answer, str):
                    raise KeyError("content")
                return answer
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.reason}"
                if error.code not in (408, 409, 425, 429) and error.code < 500:
                    break  # the same question will not be answered the next time either
            except (urllib.error.URLError, OSError, TimeoutError) as error:
                problem = str(getattr(error, "reason", error))
            except (ValueError, KeyError, IndexError, TypeError):
                problem = "what came is no chat completion"
        hint = "" if key else f" (${self.key_variable} is not set)"
        raise ZooError(f"{url} gave no answer: {problem}{hint}.")


class ReplayJudge(TextJudge):
    """The answers of a log: the same search again without the model.

    Args:
        file: what ``log_file`` wrote. A question that comes several times gets its answers in their order.
        retries: as in the logged search.
        log_file: see `TextJudge`.
    Raises:
        ZooError: in `begin`, if the file is missing or no such log.
    """

    def __init__(self, file: str, retries: int = 2, log_file: str = ""):
        super().__init__(retries, log_file)
        self.file = Path(file).expanduser()

    def begin(self, schema: Schema, task: str) -> "Judge":
        # read only now: a checkpoint of the search loads where the log is not
        self._answers: dict[str, collections.deque[str]] = collections.defaultdict(collections.deque)
        try:
            for line in self.file.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                self._answers[_key(record["turn"], record["messages"])].append(str(record["answer"]))
        except OSError as error:
            raise ZooError(f"The log {self.file} cannot be read: {error.strerror or error}.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ZooError(
                f"{self.file} is no log of a judge: each line is a JSON object that has turn, messages and answer."
            ) from error
        return super().begin(schema, task)

    def ask(self, messages: list[Message]) -> str:
        waiting = self._answers[_key(self.seed, messages)]
        if not waiting:
            raise ZooError(f"{self.file} holds no answer to this question: it is the log of another search.")
        return waiting.popleft() if len(waiting) > 1 else waiting[0]


def _key(turn: int, messages: list[Message]) -> str:
    return hashlib.sha256(json.dumps([turn, messages], sort_keys=True).encode()).hexdigest()


KINDS: dict[str, type[Judge]] = {
    "similarity": SimilarityJudge,
    "random": RandomJudge,
    "model": ModelJudge,
    "server": ServerJudge,
    "replay": ReplayJudge,
}


def make_judge(content: dict[str, Any]) -> Judge:
    """A judge from JSON: ``{"kind": "server", "address": "http://localhost:8000/v1", "model": "..."}``.

    Raises:
        ValueError: for an unknown kind or argument.
    """
    arguments = dict(content)
    kind = arguments.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"judge is {content}; its 'kind' must be one of {', '.join(KINDS)}.")
    try:
        return KINDS[kind](**arguments)
    except TypeError as error:
        raise ValueError(f"judge {kind!r}: {str(error).split('.')[-1].replace('__init__() ', '')}.") from None
