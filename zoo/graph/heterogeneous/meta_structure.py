"""Meta-structures: small typed graphs between a source and a target, their words, their edits, their order of work.

Pure Python, no tensors. A meta-structure such as "two papers by one author" is what a network of `restruct.py`
computes along; the search moves from one to its neighbours here.

Index legend: v, w nodes of a structure (0 the source, 1 the target, others in between), a, b types of nodes.
"""

import functools
import itertools
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

LARGEST = 8
"""Nodes of the largest structure, the paper's."""
EDGE_WORDS = "Is Linked To"
"""What an edge without words of its own is called."""


# ---- the network's schema --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schema:
    """What a heterogeneous network consists of, and between which types structures run.

    Args:
        types: names of the node types.
        relations: pairs of types that edges join; a pair stands for both directions and comes once.
        source, target: types of the structures' ends.
        words: ``"P-A" -> "Is Written By"``, how an edge read from the first to the second type is said.
    Raises:
        ValueError: for a repeated or unknown type, a repeated relation, or a source and target that nothing joins.
    """

    types: tuple[str, ...]
    relations: tuple[tuple[str, str], ...]
    source: str
    target: str
    words: dict[str, str] = field(default_factory=dict, hash=False, compare=False)

    def __post_init__(self) -> None:
        if len(set(self.types)) != len(self.types) or not self.types:
            raise ValueError(f"types are {list(self.types)}; expected distinct names, at least one.")
        pairs = [frozenset(pair) for pair in self.relations]
        for pair in self.relations:
            if len(pair) != 2 or not set(pair) <= set(self.types):
                raise ValueError(f"relation {list(pair)} does not join two of the types {', '.join(self.types)}.")
        if len(set(pairs)) != len(pairs):
            raise ValueError(f"relations {[list(p) for p in self.relations]} name a pair of types twice; join them.")
        for end in (self.source, self.target):
            if end not in self.types:
                raise ValueError(f"{end!r} is an end of the structures but none of the types {', '.join(self.types)}.")
        for key in self.words:
            if key.count("-") != 1 or not self.joined(*key.split("-")):
                raise ValueError(f"words has the key {key!r}; expected 'A-B' for two types that a relation joins.")
        self.fallback()

    def joined(self, a: str, b: str) -> bool:
        """True if edges join the two types."""
        return (a, b) in self._pairs

    @functools.cached_property
    def _pairs(self) -> frozenset[tuple[str, str]]:
        return frozenset(p for a, b in self.relations for p in ((a, b), (b, a)))

    @functools.cached_property
    def paths(self) -> tuple[tuple[str, ...], ...]:
        """All sequences of 1 to 3 types whose neighbours edges join: what edits put in (the paper's components)."""
        found = [
            path
            for n in (1, 2, 3)
            for path in itertools.product(self.types, repeat=n)
            if all(self.joined(a, b) for a, b in itertools.pairwise(path))
        ]
        return tuple(found)

    def say(self, a: str, b: str) -> str:
        """The words for an edge read from a to b."""
        return self.words.get(f"{a}-{b}", EDGE_WORDS)

    def fallback(self) -> "MetaStructure":
        """The shortest path from source to target with at least one edge, over the relations in their order.

        Raises:
            ValueError: if there is none.
        """
        paths, seen = deque([(self.source,)]), set()
        while paths:
            path = paths.popleft()
            for a, b in self.relations:
                for here, there in ((a, b), (b, a)):
                    if here != path[-1]:
                        continue
                    if there == self.target:
                        return MetaStructure.path((*path, there))
                    if there not in seen:
                        seen.add(there)
                        paths.append((*path, there))
        raise ValueError(f"No relation leads from {self.source} to {self.target}; structures between them don't exist.")


# ---- structures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MetaStructure:
    """A typed graph; node 0 is the source, node 1 the target.

    Args:
        types: the type of every node.
        edges: pairs (v, w) with v < w.
    """

    types: tuple[str, ...]
    edges: frozenset[tuple[int, int]]

    @classmethod
    def path(cls, types: Sequence[str]) -> "MetaStructure":
        """The structure of a meta-path: ``path("PAP")`` is P - A - P."""
        order = [0, *range(2, len(types)), 1]
        pairs = itertools.pairwise(order)
        return cls((types[0], types[-1], *types[1:-1]), frozenset((min(p), max(p)) for p in pairs))

    @classmethod
    def read(cls, content: Any, schema: Schema, largest: int = LARGEST) -> "MetaStructure":
        """A structure from JSON: ``{"nodes": ["P", "P", "A"], "edges": [[0, 2], [1, 2]]}``, checked.

        Raises:
            ValueError: for another form, or a structure that `check` refuses.
        """
        if isinstance(content, cls):
            return check(content, schema, largest)
        try:
            types, edges = tuple(content["nodes"]), [(int(v), int(w)) for v, w in content["edges"]]
        except (TypeError, KeyError, ValueError):
            raise ValueError(
                f"A structure is {str(content)[:80]}; expected {{'nodes': [types], 'edges': [[v, w], ...]}}."
            ) from None
        return check(cls(types, frozenset((min(e), max(e)) for e in edges)), schema, largest)

    def json(self) -> dict[str, list[Any]]:
        """The form that `read` takes."""
        return {"nodes": list(self.types), "edges": [list(e) for e in sorted(self.edges)]}

    @functools.cached_property
    def neighbours(self) -> tuple[tuple[int, ...], ...]:
        """Of every node, ascending."""
        found: list[list[int]] = [[] for _ in self.types]
        for v, w in self.edges:
            found[v].append(w)
            found[w].append(v)
        return tuple(tuple(sorted(n)) for n in found)

    def __len__(self) -> int:
        return len(self.types)

    @functools.cached_property
    def canonical(self) -> "MetaStructure":
        """The same for all structures that differ only in how the nodes between source and target are numbered.

        Nodes are first grouped by type and by what a few rounds of looking at neighbours tell of them; of the
        numberings that keep the groups in order, the one with the smallest list of edges is taken.
        """
        n = len(self.types)
        label: list[Any] = [(min(v, 2), t) for v, t in enumerate(self.types)]
        for _ in range(n):
            told = [(label[v], tuple(sorted(label[w] for w in self.neighbours[v]))) for v in range(n)]
            rank = {key: i for i, key in enumerate(sorted(set(told)))}
            new = [rank[key] for key in told]
            same, label = len(set(new)) == len(set(label)), new
            if same:
                break
        # `label` now sorts by (is source, is target, type) first: ranks of pairs keep the order of their first parts
        groups = [[v for v in range(2, n) if label[v] == g] for g in sorted({label[v] for v in range(2, n)})]
        best: tuple[tuple[int, int], ...] | None = None
        for choice in itertools.product(*(itertools.permutations(group) for group in groups)):
            order = [0, 1, *itertools.chain(*choice)]
            place = {v: i for i, v in enumerate(order)}
            edges = tuple(sorted((min(place[v], place[w]), max(place[v], place[w])) for v, w in self.edges))
            best = edges if best is None or edges < best else best
        types = (*self.types[:2], *(self.types[v] for group in groups for v in group))
        return MetaStructure(types, frozenset(best or ()))

    def sentence(self, schema: Schema) -> str:
        """The structure in words (the paper's grammar translator).

        Depth first from the source: each edge is "A (v) THAT words B (w)", branches are joined by AND and bracketed; a
        branch ends at the target, and doesn't enter nodes that its path or a branch beside it has entered.
        """
        return self._tell(schema, 0, {0}, "")

    def _tell(self, schema: Schema, v: int, entered: set[int], said: str) -> str:
        own, parts = f"{self.types[v]} ({v})", []
        for place, w in enumerate([w for w in self.neighbours[v] if w not in entered]):
            clause = f"THAT {schema.say(self.types[v], self.types[w])} {self.types[w]} ({w})"
            clause = clause if said or place else f"{own} {clause}"
            if w != 1:
                entered.add(w)
                clause = self._tell(schema, w, set(entered), clause)
            parts.append(clause)
        if len(parts) > 1:
            parts = [part[: (at := part.find("THAT"))] + f"({part[at:]})" for part in parts]
        told = " AND ".join(parts) or ("" if said else own)
        return f"{said} {told}".strip()


def check(structure: MetaStructure, schema: Schema, largest: int = LARGEST) -> MetaStructure:
    """The structure itself, if it is one of this network.

    Raises:
        ValueError: for unknown types, wrong ends, self-loops, edges that no relation allows, too many nodes, a source
            and target that nothing joins, or nodes on no way between them.
    """
    types, text = structure.types, str(structure.json())[:160]
    if not 2 <= len(types) <= largest:
        raise ValueError(f"{text} has {len(types)} nodes; a structure has 2 to {largest}.")
    for a in types:
        if a not in schema.types:
            raise ValueError(f"{text} has the type {a!r}; types are {', '.join(schema.types)}.")
    if types[:2] != (schema.source, schema.target):
        raise ValueError(f"{text} begins with {list(types[:2])}; node 0 must be {schema.source}, 1 {schema.target}.")
    for v, w in sorted(structure.edges):
        if not 0 <= v < len(types) or not 0 <= w < len(types):
            raise ValueError(f"{text}: edge {[v, w]} names no node.")
        if v == w:
            raise ValueError(f"{text}: node {v} has an edge to itself.")
        if not schema.joined(types[v], types[w]):
            raise ValueError(f"{text}: no relation joins {types[v]} and {types[w]} (edge {[v, w]}).")
    on_paths = {v for path in simple_paths(structure) for v in path}
    if not on_paths:
        raise ValueError(f"{text}: nothing joins source and target.")
    if len(on_paths) < len(types):
        loose = min(set(range(len(types))) - on_paths)
        raise ValueError(f"{text}: node {loose} lies on no way from source to target.")
    return structure


def simple_paths(structure: MetaStructure) -> Iterable[tuple[int, ...]]:
    """All ways from source to target that enter no node twice, depth first, lower numbers first."""

    def walk(path: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
        for w in structure.neighbours[path[-1]]:
            if w == 1:
                yield (*path, 1)
            elif w not in path:
                yield from walk((*path, w))

    return walk((0,))


def clean(structure: MetaStructure) -> MetaStructure | None:
    """Only what lies on ways from source to target, the first of each sequence of types; None where there is no way."""
    edges, seen = set(), set()
    for path in simple_paths(structure):
        types = tuple(structure.types[v] for v in path)
        if types not in seen:
            seen.add(types)
            edges |= {(min(p), max(p)) for p in itertools.pairwise(path)}
    if not edges:
        return None
    kept = sorted({0, 1} | {v for e in edges for v in e})
    place = {v: i for i, v in enumerate(kept)}
    return MetaStructure(tuple(structure.types[v] for v in kept), frozenset((place[v], place[w]) for v, w in edges))


# ---- edits -----------------------------------------------------------------------------------------------------------


def insertions(structure: MetaStructure, schema: Schema, longest: int) -> Iterable[MetaStructure]:
    """An edge replaced by a path over 1 to ``longest`` new nodes."""
    n = len(structure)
    for v, w in sorted(structure.edges):
        for path in schema.paths:
            ends = (structure.types[v], *path, structure.types[w])
            if len(path) <= longest and all(schema.joined(a, b) for a, b in itertools.pairwise(ends)):
                way = itertools.pairwise((v, *range(n, n + len(path)), w))
                edges = {(min(p), max(p)) for p in way} | (structure.edges - {(v, w)})
                yield MetaStructure((*structure.types, *path), frozenset(edges))


def graftings(structure: MetaStructure, schema: Schema) -> Iterable[MetaStructure]:
    """A path of two or three types laid over two nodes of its end types: a new edge, or a new node between them."""
    n = len(structure)
    for v, w in itertools.combinations(range(n), 2):
        for path in schema.paths:
            if len(path) > 1 and (path[0], path[-1]) == (structure.types[v], structure.types[w]):
                if len(path) == 2:
                    yield MetaStructure(structure.types, structure.edges | {(v, w)})
                else:
                    yield MetaStructure((*structure.types, path[1]), structure.edges | {(v, n), (w, n)})


def deletions(structure: MetaStructure, schema: Schema, nodes: int) -> Iterable[MetaStructure]:
    """One node, or two joined ones, taken out; their neighbours are joined wherever a relation allows it.

    Where that parts source and target, the schema's `Schema.fallback`.
    """
    inner = range(2, len(structure))
    gone = [{v} for v in inner] if nodes == 1 else [{v, w} for v, w in sorted(structure.edges) if v >= 2]
    for out in gone:
        around = sorted({w for v in out for w in structure.neighbours[v]} - out)
        edges = {e for e in structure.edges if not out & set(e)}
        edges |= {
            (v, w)
            for v, w in itertools.combinations(around, 2)
            if schema.joined(structure.types[v], structure.types[w])
        }
        # nodes keep their numbers: the ones taken out have no edges and are cleaned away
        left = MetaStructure(structure.types, frozenset(edges))
        yield left if any(True for _ in simple_paths(left)) else schema.fallback()


def neighbours(structure: MetaStructure, schema: Schema, steps: int = 1) -> list[MetaStructure]:
    """The structures one edit away (``steps=1``) or those by the two-step edits, canonical, cleaned, without itself.

    One step: a node inserted into an edge, a path of two or three nodes grafted, a node deleted. Two steps: one or two
    nodes inserted, two joined nodes deleted.
    """
    if steps == 1:
        found = itertools.chain(
            insertions(structure, schema, 1), graftings(structure, schema), deletions(structure, schema, 1)
        )
    else:
        found = itertools.chain(insertions(structure, schema, 2), deletions(structure, schema, 2))
    own, unique = structure.canonical, {}
    for candidate in found:
        cleaned = clean(candidate)
        if cleaned is not None and cleaned.canonical != own:
            unique[cleaned.canonical] = None
    return sorted(unique, key=lambda s: (len(s), s.types, sorted(s.edges)))


def beginnings(schema: Schema, count: int, largest: int = LARGEST) -> list[MetaStructure]:
    """The ``count`` smallest structures that edits reach from the schema's fallback: a population to start with."""
    first = schema.fallback().canonical
    found, edge = {first: None}, [first]
    while len(found) < count and edge:
        following = [s for old in edge for s in neighbours(old, schema) if s not in found and len(s) <= largest]
        edge = list(dict.fromkeys(sorted(following, key=lambda s: (len(s), len(s.edges), s.types, sorted(s.edges)))))
        found |= dict.fromkeys(edge)
    return sorted(found, key=lambda s: (len(s), len(s.edges), s.types, sorted(s.edges)))[:count]


# ---- similarity ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=65536)
def edit_distance(a: MetaStructure, b: MetaStructure) -> int:
    """Fewest nodes and edges to take out or put in to turn one into the other; ends stay ends, types stay.

    Two nodes of one type left unmatched cost two edits and save none, so that every node that can be matched is.
    """
    total = 0
    slots: list[tuple[list[int], list[tuple[int | None, ...]]]] = []
    for kind in sorted({*a.types, *b.types}):
        left = [v for v, t in enumerate(a.types) if t == kind and v >= 2]
        right: list[int | None] = [v for v, t in enumerate(b.types) if t == kind and v >= 2]
        total += abs(len(left) - len(right))
        right += [None] * (len(left) - len(right))
        if left:
            slots.append((left, list(itertools.permutations(right, len(left)))))
    best = 0
    for choice in itertools.product(*(options for _, options in slots)):
        place: dict[int, int | None] = {0: 0, 1: 1}
        for (left, _), chosen in zip(slots, choice, strict=True):
            place.update(zip(left, chosen, strict=True))
        moved = ((place[v], place[w]) for v, w in a.edges)
        shared = sum((min(v, w), max(v, w)) in b.edges for v, w in moved if v is not None and w is not None)
        best = max(best, shared)
    return total + len(a.edges) + len(b.edges) - 2 * best


def similarity(a: MetaStructure, b: MetaStructure) -> float:
    """1 - edit distance / max(nodes of both, edges of both), the authors' scale; 1 for the same structure."""
    return 1.0 - edit_distance(a, b) / max(len(a) + len(b), len(a.edges) + len(b.edges))


# ---- order of work ---------------------------------------------------------------------------------------------------

Operation = tuple[int, str, str]
"""(j, a, b): state j, moved along the edges that lead from b to a."""


def plan(structure: MetaStructure, root: int = 0, authors_order: bool = False) -> list[list[Operation]]:
    """How a network computes along a structure: of every state after the first, the sum it is.

    The nodes in the order of a breadth-first walk from ``root``, reversed, are the states s_0 ... s_L; s_i is the sum
    of the earlier states whose nodes are joined to its own. The last state is the root's. States that nothing earlier
    reaches are 0 and have an empty sum.

    Args:
        root: 0, the source, or 1, the target.
        authors_order: as the authors' code: it lists the operations that skip states by the state they start from and
            reads them by the state they go to. From five nodes on they then join other states, of other types.
    """
    order, waiting = [], deque([root])
    entered = {root}
    while waiting:
        v = waiting.popleft()
        order.append(v)
        for w in structure.neighbours[v]:
            if w not in entered:
                entered.add(w)
                waiting.append(w)
    states = order[::-1]
    n, types = len(states), [structure.types[v] for v in states]

    def joined(j: int, i: int) -> bool:
        return (min(states[i], states[j]), max(states[i], states[j])) in structure.edges

    sums: list[list[Operation]] = [[] for _ in range(n)]
    for i in range(1, n):
        if joined(i - 1, i):
            sums[i].append((i - 1, types[i], types[i - 1]))
    skips = [(j, i) for j in range(n) for i in range(j + 2, n)]
    places = sorted(skips, key=lambda skip: skip[::-1]) if authors_order else skips
    for (j, i), (source, target) in zip(skips, places, strict=True):
        if joined(j, i):
            sums[target].append((source, types[i], types[j]))
    live = {0}  # what nothing feeds is 0 and feeds nothing
    for i in range(1, n):
        sums[i] = [operation for operation in sorted(sums[i]) if operation[0] in live]
        if sums[i]:
            live.add(i)
    used = {n - 1}
    for i in range(n - 1, 0, -1):
        if i in used:
            used |= {j for j, _, _ in sums[i]}
        else:
            sums[i] = []
    return sums[1:]


def reached(sums: list[list[Operation]], root_type: str) -> list[set[str]]:
    """The types whose rows every state must have, for the last state's rows of ``root_type`` (see `plan`)."""
    needed: list[set[str]] = [set() for _ in range(len(sums) + 1)]
    needed[-1] = {root_type}
    for i in range(len(sums), 0, -1):
        for j, a, b in sums[i - 1]:
            needed[j] |= needed[i] | ({b} if a in needed[i] else set())
    return needed


# ---- words and pictures ----------------------------------------------------------------------------------------------


def differences(structure: MetaStructure, other: MetaStructure) -> str:
    """What ``other`` has more or less than ``structure``, counted by type: "one more A; edges P-A two more"."""
    parts = []
    for what, own, theirs in (
        ("node", Counter(structure.types), Counter(other.types)),
        ("edge", _edge_types(structure), _edge_types(other)),
    ):
        for key in sorted({*own, *theirs}):
            change = theirs[key] - own[key]
            if change:
                count = abs(change)
                parts.append(f"{count} {key} {what}{'s' if count > 1 else ''} {'more' if change > 0 else 'fewer'}")
    return ", ".join(parts) or "the same nodes, joined otherwise"


def _edge_types(structure: MetaStructure) -> Counter[str]:
    pairs = ("-".join(sorted((structure.types[v], structure.types[w]))) for v, w in structure.edges)
    return Counter(pairs)


def draw(structures: MetaStructure | Sequence[MetaStructure], path: Any, titles: Sequence[str] = ()) -> Any:
    """Draw structures side by side into a picture; source on the left, target on the right.

    Args:
        path: of the picture; its ending chooses the format.
        titles: one a structure.
    Returns:
        the path written.
    Raises:
        ImportError: naming the extra, where matplotlib is missing.
    """
    from pathlib import Path

    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import FancyArrowPatch
    except ImportError as error:
        raise ImportError("Drawing needs matplotlib: pip install 'paper-zoo[plots]'.") from error
    from zoo.core import atomic_write

    several = [structures] if isinstance(structures, MetaStructure) else list(structures)
    names = sorted({t for s in several for t in s.types})
    colours = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#9d755d", "#72b7b2", "#bab0ac")
    plans = [_layout(s) for s in several]
    widths = [max(x for x, _ in places) + 1.2 for places in plans]
    height = max(max(abs(y) for _, y in places) for places in plans) + 0.9
    figure = Figure(figsize=(1.3 * sum(widths), max(2.6 * height, 2.8)))
    for axes, structure, places, title in itertools.zip_longest(
        figure.subplots(1, len(several), width_ratios=widths, squeeze=False)[0], several, plans, titles[: len(several)]
    ):
        for v, w in sorted(structure.edges):
            far = abs(places[v][0] - places[w][0]) > 1  # past other nodes: in a bow
            bow = (0.4 if places[v][1] + places[w][1] < 0 else -0.4) * (1 if places[v][0] < places[w][0] else -1)
            line = {"arrowstyle": "-", "color": "#888888", "linewidth": 1.5, "zorder": 1}
            style = f"arc3,rad={bow if far else 0}"
            axes.add_patch(FancyArrowPatch(places[v], places[w], connectionstyle=style, **line))
        for v, (x, y) in enumerate(places):
            colour = colours[names.index(structure.types[v]) % len(colours)]
            edge = {"edgecolors": "black", "linewidths": 2} if v < 2 else {}
            axes.scatter([x], [y], s=800, zorder=2, color=colour, **edge)
            axes.text(x, y, f"{structure.types[v]}{v}", ha="center", va="center", color="white", weight="bold")
            if v < 2:
                below = {"xytext": (0, -19), "textcoords": "offset points", "ha": "center", "va": "top", "fontsize": 9}
                axes.annotate(("source", "target")[v], (x, y), **below)
        axes.set_title(title or "", fontsize=10)
        axes.set_xlim(-0.6, max(x for x, _ in places) + 0.6)
        axes.set_ylim(-height, height)
        axes.set_axis_off()
    with atomic_write(Path(path)) as part:
        figure.savefig(part, dpi=150, bbox_inches="tight")
    return Path(path)


def _layout(structure: MetaStructure) -> list[tuple[float, float]]:
    """Columns by how far from the source a node lies, the target in a last one of its own; rows spread evenly."""
    far = {0: 0}
    waiting = deque([0])
    while waiting:
        v = waiting.popleft()
        for w in structure.neighbours[v]:
            if w not in far and w != 1:
                far[w] = far[v] + 1
                waiting.append(w)
    far[1] = max(far.values(), default=0) + 1
    columns: dict[int, list[int]] = {}
    for v, column in far.items():
        columns.setdefault(column, []).append(v)
    places = [(0.0, 0.0)] * len(structure)
    for column, members in columns.items():
        for row, v in enumerate(sorted(members)):
            lift = (
                0.18 if len(members) == 1 and v >= 2 and column % 2 else 0.0
            )  # straight edges don't hide behind nodes
            places[v] = (float(column), row - (len(members) - 1) / 2 + lift)
    return places
