"""ReStruct: meta-structures for heterogeneous networks, found by evolution and a judge, and the network along them.

Paper: Lin Chen, Fengli Xu, Nian Li, Zhenyu Han, Meng Wang, Yong Li, Pan Hui, "Large Language Model-driven
Meta-structure Discovery in Heterogeneous Information Network", KDD 2024, arXiv:2402.11518. Code by the authors:
https://github.com/LinChen-65/ReStruct, MIT.

In: a graph whose nodes and edges have types (papers, authors, subjects). Out: classes of one type's nodes, or scores of
pairs of two types' nodes; and the small typed graph, the meta-structure, along which information was gathered, as a
picture and in words. The network along a structure is in `network.py`. The search (``generations`` > 0):

    evaluate     train a network along every structure of the population; its score is that of the validation nodes
    eliminate    the worst 40 % go; copies of the others, drawn with softmax(score), take their places
    improve      of the neighbours of each (`meta_structure.neighbours`) that were not tried, a judge (`judges.py`)
                 predicts scores from up to 30 known ones and picks one

One training step is one generation; it takes no optimiser step, so that ``global_step`` stays 0 meanwhile. Everything
the search knows (population, tried structures and scores, generation) lies in buffers: a resumed search goes on exactly
where it stopped. After every generation the model holds the best structure and its weights, so that "val/f1" never
falls. Once the generations are over, steps are steps of Adam: with ``combine = 1`` they go on from the winner's
weights, with more they train the ``combine`` best structures together from fresh ones. With ``generations = 0`` the
given ``structures`` are trained, all together: this is also the baseline of a meta-path chosen by hand.

Only the nodes and edges that a structure's result depends on are multiplied; structures are told apart by a canonical
form, so that none is evaluated twice.

Departs from the authors' code: it evaluates structures anew that differ in numbering only; from five nodes on its list
of skipping operations is read in another order than it was written in (``authors_order``); it may propose the structure
itself as its own neighbour, and deleting two nodes may number two others alike; it has a second kind of attention for
several structures in recommendation, where the one of classification stands here; it keeps the epoch with the best
validation score and reports that score's test result, as here, but its recommendation never stops early
(``patience = 0``). Its conversation is with GPT-4; the questions here are written afresh.

Index legend: n nodes, e edges, s stored features, m nodes or pairs asked for, c classes, k structures.
"""

import logging
import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.core import ZooError, seed_from, unwrap
from zoo.graph.heterogeneous.judges import Judge, Scored, make_judge
from zoo.graph.heterogeneous.meta_structure import LARGEST, MetaStructure, beginnings, draw, neighbours
from zoo.graph.heterogeneous.network import StructureNet
from zoo.graph.heterogeneous.supervised import GRAPH, SupervisedHIN
from zoo.graph.heterogeneous.supervised import HAN as HAN
from zoo.graph.heterogeneous.supervised import MetaPathGCN as MetaPathGCN

log = logging.getLogger(__name__)


class ReStruct(SupervisedHIN):
    """Node classes or scores of pairs along meta-structures, given or found.

    Args:
        types: names of the node types.
        relations: pairs of types that edges join; "edge_index" holds the first type in row 0.
        words: how edges are said, ``{"P-A": "Is Written By", "A-P": "Wrote"}``; for sentences and judges only.
        ends: source and target type of the structures; for classification twice the type that is classified.
        in_features: features of every type.
        num_classes: c, for classification.
        task: "classification" of nodes or "recommendation", scores of pairs.
        structures: ``{"nodes": [types], "edges": [[v, w], ...]}``, node 0 the source, 1 the target: the first
            population, or, with ``generations = 0``, what is trained; None takes the smallest structures there are.
        generations: of the search.
        population: structures a generation.
        eliminate: fraction of them that is replaced.
        candidates: at most so many neighbours, drawn at random, are shown to the judge.
        shown: known scores that the judge is told, drawn at random.
        max_nodes: of a structure.
        combine: best structures that are trained together after the search.
        judge: ``{"kind": "similarity" | "random" | "model" | "server" | "replay", ...}`` with the arguments of the
            judge's class (`judges.py`). A live one goes through `set_judge`.
        search_epochs: at most so many epochs a structure.
        patience: epochs without a better validation score that end a structure's training; 0 never does.
        hidden, attention: h, and units of the attention over several structures.
        dropout: rate after the projection.
        norm: layer norm on the last state.
        tanh: of the projected features.
        lr, weight_decay: of Adam, in the search and after it.
        authors_order: restores an order of the authors' code that joins wrong states from five nodes on.
    Raises:
        ValueError: for unknown types, structures that are none of this network, sizes out of range, an unknown judge.
    Example:
        >>> from zoo.graph import HINDataModule, ReStruct
        >>> data = HINDataModule(); data.setup()
        >>> model = ReStruct(**data.describe(), generations=0)
        >>> model.sentences()[0]
        'M (0) THAT Is Directed By D (2) THAT Directed M (1)'
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {
            "hidden": 8, "attention": 4, "generations": 1, "population": 2, "search_epochs": 3, "dropout": 0.2,
        },
        "amazon": {
            "types": ["U", "I", "B", "C", "V"],
            "relations": [["U", "I"], ["I", "B"], ["I", "C"], ["I", "V"]],
            "ends": ["U", "I"], "in_features": [6170, 2753, 334, 22, 3857], "task": "recommendation",
        },
    }  # fmt: skip
    head = ("net.classifier",)
    untrusted = ("judge",)  # a server's address, a model's name, files

    def __init__(
        self,
        types: list[str] = ["P", "A", "S"],  # noqa: B006
        relations: list[list[str]] = [["P", "A"], ["P", "S"]],  # noqa: B006
        words: dict[str, str] = {},  # noqa: B006
        ends: list[str] = ["P", "P"],  # noqa: B006
        in_features: list[int] = [1902, 1902, 1902],  # noqa: B006
        num_classes: int = 3,
        task: str = "classification",
        structures: list[dict[str, Any]] | None = None,
        generations: int = 20,
        population: int = 5,
        eliminate: float = 0.4,
        candidates: int = 20,
        shown: int = 30,
        max_nodes: int = LARGEST,
        combine: int = 1,
        judge: dict[str, Any] = {"kind": "similarity"},  # noqa: B006
        search_epochs: int = 200,
        patience: int = 10,
        hidden: int = 64,
        attention: int = 64,
        dropout: float = 0.6,
        norm: bool = True,
        tanh: bool = False,
        lr: float = 0.01,
        weight_decay: float = 0.001,
        authors_order: bool = False,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.set_task(words)
        for name, value, least in (
            ("generations", generations, 0), ("population", population, 1), ("candidates", candidates, 1),
            ("shown", shown, 1), ("max_nodes", max_nodes, 2), ("combine", combine, 1), ("patience", patience, 0),
            ("search_epochs", search_epochs, 1), ("hidden", hidden, 1), ("attention", attention, 1),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"ReStruct: {name} is {value}; it must be at least {least}.")
        if not 0 <= eliminate < 1:
            raise ValueError(f"ReStruct: eliminate is {eliminate}; it must lie in [0, 1).")
        if structures is not None and not structures:
            raise ValueError("ReStruct: structures is an empty list; give at least one, or None.")
        given = [MetaStructure.read(s, self.schema, max_nodes).canonical for s in structures or []]
        first = list(dict.fromkeys(given or beginnings(self.schema, population if generations else 1, max_nodes)))
        if generations and len(first) > population:
            raise ValueError(f"ReStruct: {len(first)} structures came for a population of {population}.")
        self.automatic_optimization = generations == 0
        cells = combine if generations else len(first)
        self.net = self._network(cells)
        self.structures: list[MetaStructure] = [first[i % len(first)] for i in range(cells)]
        self.generation = 0
        self._judge: tuple[bool, Judge] = (False, make_judge(judge))
        if generations:
            room = population * generations
            self._add_pack("chosen", cells)
            self._add_pack("tried", room)
            self._add_pack("pool", population)
            self.register_buffer("tried_score", torch.full((room,), -1.0, dtype=torch.float64))
            self.register_buffer("tried_in", torch.full((room,), -1, dtype=torch.int64))
            self.register_buffer("done", torch.zeros((), dtype=torch.int64))
            self.register_buffer("search_seed", torch.randint(2**31, ()))
            self._pack("chosen", self.structures)
            self._pack("pool", [first[i % len(first)] for i in range(population)])
            self.register_load_state_dict_post_hook(ReStruct._loaded)

    tried_score: Tensor
    tried_in: Tensor
    done: Tensor
    search_seed: Tensor

    def _network(self, cells: int) -> StructureNet:
        hp = self.hparams
        return StructureNet(
            hp.types, hp.relations, hp.ends, hp.in_features, hp.num_classes if hp.task == "classification" else 0,
            cells=cells, authors_order=hp.authors_order, hidden=hp.hidden, attention=hp.attention, dropout=hp.dropout,
            norm=hp.norm, tanh=hp.tanh,
        )  # fmt: skip

    # ---- structures as buffers ----------------------------------------------------------------------------------

    def _add_pack(self, name: str, count: int) -> None:
        size = self.hparams.max_nodes
        self.register_buffer(f"{name}_types", torch.full((count, size), -1, dtype=torch.int64))
        self.register_buffer(f"{name}_edges", torch.zeros((count, size, size), dtype=torch.bool))

    def _pack(self, name: str, structures: Sequence[MetaStructure], start: int = 0) -> None:
        types, edges = self.get_buffer(f"{name}_types"), self.get_buffer(f"{name}_edges")
        for row, structure in enumerate(structures, start):
            types[row], edges[row] = -1, False
            numbers = [self.schema.types.index(t) for t in structure.types]
            types[row, : len(numbers)] = torch.tensor(numbers, device=types.device)
            for v, w in structure.edges:
                edges[row, v, w] = True

    def _unpack(self, name: str) -> list[MetaStructure]:
        types, edges = self.get_buffer(f"{name}_types").tolist(), self.get_buffer(f"{name}_edges").cpu()
        found = []
        for row, numbers in enumerate(types):
            names = tuple(self.schema.types[k] for k in numbers if k >= 0)
            if names:
                found.append(MetaStructure(names, frozenset((v, w) for v, w in edges[row].nonzero().tolist())))
        return found

    @staticmethod
    def _loaded(model: "ReStruct", _: Any) -> None:
        if not model.done.is_meta:
            model.structures, model.generation = model._unpack("chosen"), int(model.done)

    def known(self) -> Scored:
        """Every structure that was tried with its validation score, in the order of trying."""
        if not self.hparams.generations:
            return []
        return list(zip(self._unpack("tried"), self.tried_score[self.tried_score >= 0].tolist(), strict=True))

    def set_judge(self, judge: Judge) -> Self:
        """Search with a live judge instead of the hyperparameter's; returns self."""
        self._judge = (False, judge)
        return self

    def judge(self) -> Judge:
        """The judge, told of this network."""
        ready, judge = self._judge
        if not ready:
            words = {"classification": f"classifying {self.schema.source}", "recommendation": "recommendation"}
            self._judge = (True, judge.begin(self.schema, words[self.hparams.task]))
        return judge

    # ---- the network --------------------------------------------------------------------------------------------

    def forward(
        self, x: Tensor, x_index: Tensor, node_type: Tensor, edge_index: Tensor, edge_type: Tensor, node: Tensor
    ) -> Tensor:
        """Logits of classes, or scores of pairs, along `structures`.

        Shapes:
            x: (s) float, the features that are stored, all others are 0; x_index: (2, s) int64, node and column (within
            its type's features) of each; node_type: (n) int64, ascending; edge_index: (2, e) int64, nodes of the
            relation's first type in row 0, of its second in row 1, every edge once; edge_type: (e) int64, number of the
            relation; node: (m) int64, nodes of the source type, or (m, 2), a source and a target each
            returns: (m, c), or (m)
        Raises:
            ValueError: for other shapes, or numbers that name no node, type or feature.
        """
        graph = self.graph(x, x_index, node_type, edge_index, edge_type, node)
        return self.net(graph, self.structures, node)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        """One generation of the search while there are any; then one step of Adam."""
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        if self.generation < self.hparams.generations and not self.done.is_meta:
            self._generation(self.arranged(batch))
            return None
        loss = super().training_step(batch, batch_idx)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach()

    # ---- the search ---------------------------------------------------------------------------------------------

    def _generation(self, batch: dict[str, Any]) -> None:
        """Evaluate the population, keep the best, make the next population."""
        hp, judge = self.hparams, self.judge()
        pool, known = self._unpack("pool"), dict(self.known())
        new = [s for s in dict.fromkeys(pool) if s not in known]
        best = max(known.values(), default=-1.0)
        for structure, (score, weights) in zip(new, self.evaluate(batch, new), strict=True):
            self._pack("tried", [structure], len(known))
            self.tried_score[len(known)], self.tried_in[len(known)] = score, self.generation
            known[structure] = score
            if score > best:
                best = score
                self._keep(structure, weights)
        self.generation += 1
        self.done += 1
        scores = [known[s] for s in pool]
        self.log("train/best", best, batch_size=1, prog_bar=True)
        self.log("train/population", sum(scores) / len(scores), batch_size=1)
        self.log("train/tried", float(len(known)), batch_size=1)
        if self.generation < hp.generations:
            draw = random.Random(seed_from(int(self.search_seed), self.generation))
            survivors = reproduce(scores, hp.eliminate, draw)
            seen = set(known)
            for place, member in enumerate([pool[i] for i in survivors]):
                judge.turn(seed_from(int(self.search_seed), self.generation, place))
                chosen = improve(
                    member, list(known.items()), seen, judge, draw,
                    predict=self.generation > 1, limit=hp.candidates, shown=hp.shown, largest=hp.max_nodes,
                )  # fmt: skip
                seen.add(chosen)
                self._pack("pool", [chosen], place)
        elif hp.combine > 1:
            ranked = sorted(known, key=lambda s: -known[s])
            self._set([ranked[i % len(ranked)] for i in range(hp.combine)])
            state = torch.random.get_rng_state()
            torch.manual_seed(int(self.search_seed))
            fresh = self._network(hp.combine).state_dict()
            torch.random.set_rng_state(state)
            self.net.load_state_dict(fresh)

    def _set(self, structures: list[MetaStructure]) -> None:
        self.structures = structures
        self._pack("chosen", structures)

    def _keep(self, structure: MetaStructure, weights: dict[str, Tensor]) -> None:
        """Hold the best structure and its weights; with several cells, in each of them."""
        self._set([structure] * self.hparams.combine)
        own = self.net.state_dict()
        with torch.no_grad():
            for key, value in own.items():
                head, found, rest = key.partition(".cells.")
                source = f"{head}.cells.0.{rest.partition('.')[2]}" if found else key
                if source in weights:  # the attention over several structures stays as it is
                    value.copy_(weights[source])

    def evaluate(
        self, batch: dict[str, Any], structures: Sequence[MetaStructure]
    ) -> list[tuple[float, dict[str, Tensor]]]:
        """Train a network along every structure; its best validation score and the weights that had it.

        Every structure starts from the same draws and sees the same dropout draws: its score is its own. (Training
        several side by side, their products with the features made at once, takes as long on a CPU and more memory.)

        Raises:
            ZooError: if the batch has no training or validation targets.
        """
        train, val = self.part(batch, "train"), self.part(batch, "val")
        if not len(train[1]) or not len(val[1]) or "val_mask" not in batch:
            raise ZooError("ReStruct: the search needs training and validation targets: 'y', 'train_mask', 'val_mask'.")
        graph = self.graph(*(batch[key] for key in GRAPH), val[0])
        device = batch["x"].device
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=True),
            torch.autocast(device.type, enabled=False),
            torch.enable_grad(),
        ):
            return [self._evaluate_one(graph, structure, train, val) for structure in structures]

    def _evaluate_one(
        self, graph: Any, structure: MetaStructure, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]
    ) -> tuple[float, dict[str, Tensor]]:
        hp, seed = self.hparams, int(self.search_seed)
        torch.manual_seed(seed)
        net = self._network(1).to(train[0].device)
        optimizer = torch.optim.Adam(net.parameters(), lr=hp.lr, weight_decay=hp.weight_decay)
        best: tuple[float, dict[str, Tensor]] = (-1.0, {})
        waited = 0
        for epoch in range(hp.search_epochs + 1):
            hidden = net.hidden(graph, [structure])  # before dropout: validation and the next step share it
            if epoch:  # the weights after `epoch` steps; the first ones are nobody's
                with torch.no_grad():
                    score = float(self.fitness(net.eval()(graph, [structure], val[0], hidden), val[1]))
                waited = 0 if score > best[0] else waited + 1
                if score > best[0]:
                    best = (score, {key: value.clone() for key, value in net.state_dict().items()})
                if epoch == hp.search_epochs or (hp.patience and waited >= hp.patience):
                    break
            torch.manual_seed(seed_from(seed, epoch))
            optimizer.zero_grad(set_to_none=True)
            self.loss(net.train()(graph, [structure], train[0], hidden), train[1]).backward()
            optimizer.step()
        return best

    # ---- words and pictures -------------------------------------------------------------------------------------

    def sentences(self) -> list[str]:
        """The structures in words."""
        return [s.sentence(self.schema) for s in self.structures]

    def explain(self) -> str:
        """Why the best structure does better than the neighbours of it that were tried, by the judge.

        Raises:
            ZooError: if nothing was tried yet.
        """
        known = dict(self.known())
        if not known:
            raise ZooError("ReStruct: nothing was tried yet; `fit` with generations > 0 searches.")
        best = max(known, key=lambda s: known[s])
        near = {*neighbours(best, self.schema), *neighbours(best, self.schema, 2)}
        judge = self.judge()
        judge.turn(seed_from(int(self.search_seed), "explain"))
        return judge.explain((best, known[best]), [(s, score) for s, score in known.items() if s in near])

    def draw(self, path: Any) -> Any:
        """Draw the structures into a picture (see `meta_structure.draw`)."""
        return draw(self.structures, path)

    # ---- the authors' weights -----------------------------------------------------------------------------------

    @classmethod
    def convert_state_dict(cls, content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """From the authors' networks: of classification, or of both towers, their keys under "source." and "target.".

        The structures, types and relations are no part of their weights: give them to the constructor.
        """
        content = unwrap(content)
        towers = ["source.", "target."] if any(k.startswith("source.") for k in content) else [""]
        state: dict[str, Tensor] = {}
        widths: list[int] = []
        cells = 0
        for number, tower in enumerate(towers):
            own = {k.removeprefix(tower): v for k, v in content.items() if k.startswith(tower)}
            count = 1 + max((int(k.split(".")[1]) for k in own if k.startswith("ws.")), default=-1)
            cells = 1 + max((int(k.split(".")[1]) for k in own if k.startswith("metas.")), default=-1)
            if not count or not cells:
                raise ZooError("No network of ReStruct: keys 'ws.*' and 'metas.*' are missing.")
            to = f"net.towers.{number}"
            widths = [own[f"ws.{k}.weight"].shape[1] for k in range(count)]
            state[f"{to}.projection.table"] = torch.cat([own[f"ws.{k}.weight"].t() for k in range(count)])
            state[f"{to}.projection.bias"] = torch.stack([own[f"ws.{k}.bias"] for k in range(count)])
            state |= {f"{to}.cells.{k.removeprefix('metas.')}": v for k, v in own.items() if k.startswith("metas.")}
            if cells > 1:
                for theirs, ours in (("attn_fc1", 0), ("attn_fc2", 2)):
                    for part in ("weight", "bias"):
                        state[f"{to}.attention.{ours}.{part}"] = own[f"{theirs}.{part}"]
            if "classifier.weight" in own:
                state["net.classifier.weight"] = own["classifier.weight"]
                state["net.classifier.bias"] = own["classifier.bias"]
        first = state["net.towers.0.projection.table"]
        values: dict[str, Any] = {
            "in_features": widths,
            "hidden": first.shape[1],
            "generations": 0,
            "norm": "net.towers.0.cells.0.norm.weight" in state,
            "task": "recommendation" if len(towers) == 2 else "classification",
        }
        if "net.classifier.weight" in state:
            values["num_classes"] = len(state["net.classifier.weight"])
        if cells > 1:
            values["attention"] = len(state["net.towers.0.attention.0.weight"])
        return values, {k: v.contiguous() for k, v in state.items()}


# ---- steps of the search ---------------------------------------------------------------------------------------------


def reproduce(scores: Sequence[float], eliminate: float, draw: random.Random) -> list[int]:
    """Who lives on: all but the worst ``int(eliminate * population)``, then places drawn by softmax of their scores.

    Args:
        scores: of the population, the larger the better.
    Returns:
        numbers of members, as many as the population; the worst survivor first, as in the authors' code.
    """
    ranking = sorted(range(len(scores)), key=lambda i: scores[i])
    kept = ranking[int(eliminate * len(scores)) :]
    weights = F.softmax(torch.tensor([scores[i] for i in kept], dtype=torch.float64), 0).tolist()
    return kept + draw.choices(kept, weights, k=len(scores) - len(kept))


def improve(
    current: MetaStructure,
    known: Scored,
    seen: set[MetaStructure],
    judge: Judge,
    draw: random.Random,
    predict: bool = True,
    limit: int = 20,
    shown: int = 30,
    largest: int = LARGEST,
) -> MetaStructure:
    """The neighbour that the judge picks.

    Candidates are the neighbours by one edit that were not seen, else by the two-step edits, else three seen ones, else
    three of all that were seen; at most ``limit``, drawn at random.

    Args:
        known: structures with scores; of them at most ``shown``, drawn at random, are told to the judge.
        predict: False before anything was learned: the judge picks without predictions.
    """
    schema = judge.schema
    fresh: list[MetaStructure] = []
    again: list[MetaStructure] = []
    for steps in (1, 2):
        near = [s for s in neighbours(current, schema, steps) if len(s) <= largest]
        fresh, again = [s for s in near if s not in seen], [s for s in near if s in seen] or again
        if fresh:
            break
    if not fresh:
        pool = again if len(again) > 3 else sorted(seen, key=lambda s: (len(s), s.types, sorted(s.edges)))
        fresh = draw.sample(pool, min(3, len(pool)))
    if len(fresh) > limit:
        fresh = draw.sample(fresh, limit)
    if not predict:
        return fresh[judge.select(current, fresh, None)]
    told = draw.sample(known, shown) if len(known) > shown else known
    scores = dict(known)
    unknown = [s for s in fresh if s not in scores]
    guesses = dict(zip(unknown, judge.predict(unknown, told), strict=True)) if unknown else {}
    predictions = [guesses[s] if s in guesses else (scores[s], 1.0) for s in fresh]
    return fresh[judge.select(current, fresh, predictions)]
