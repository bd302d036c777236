"""Where the parts of a causal language model are: by facts of its architecture, one small table a family.

A *site* is a place whose value can be read and replaced: the residual stream before and after a block, what a head
gives before the output projection, what attention or MLP adds to the stream. A *slice* is the part of a parameter that
belongs to a site.

Index legend: b prompts, t positions, d width of the residual stream, e width of a head.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.core.errors import ZooError, nearest

KINDS = ("input", "query", "key", "value", "head", "attention", "mlp", "residual")
"""Of a layer, in the order of its forward pass. "query", "key" and "value" are a head's after its projection, before
rotary embedding; the last two are counted by key-value head."""
PER_HEAD = ("query", "key", "value", "head")


@dataclass(frozen=True, order=True)
class Site:
    """A place in the model, written ``layers.3.head.5`` or ``layers.3.mlp``.

    Args:
        layer: from 0. kind: one of `KINDS`. head: for kinds of a head, from 0; else -1.
    """

    layer: int
    kind: str
    head: int = -1

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.kind}" + (f".{self.head}" if self.kind in PER_HEAD else "")


@dataclass(frozen=True)
class Slice:
    """Part of a parameter: ``parameter.narrow(dim, start, size)``."""

    name: str
    dim: int
    start: int
    size: int

    def of(self, parameter: Tensor) -> Tensor:
        """The part of the parameter of that name, a view."""
        return parameter.narrow(self.dim, self.start, self.size)


@dataclass(frozen=True)
class Family:
    """Facts of an architecture, as paths of modules.

    Args:
        layers: the list of blocks. attention: in a block. out: in the attention, the projection to the stream.
        query, key, value: projections in the attention; all the same where they are one.
        fused: how that one is laid out: "blocks" (all queries, all keys, all values), "heads" (head by head its query,
            key and value), or "" where there are three.
        mlp: in a block, the module whose output the MLP adds to the stream, or which ends in it.
        mlp_parts: modules in a block that hold the MLP's parameters.
        down: in a block, the projection from the MLP's neurons.
        attends: in a block, the module whose output is added to the stream, where it is not ``out`` (a norm after it).
        norm, head: the last norm, and the projection to the vocabulary. norms: in a block.
    """

    layers: str = "model.layers"
    attention: str = "self_attn"
    out: str = "o_proj"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    fused: str = ""
    mlp: str = "mlp"
    mlp_parts: tuple[str, ...] = ("mlp",)
    down: str = "mlp.down_proj"
    attends: str = ""
    norm: str = "model.norm"
    head: str = "lm_head"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")


LLAMA = Family()
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "olmo"), LLAMA),
    "gemma2": Family(
        mlp="post_feedforward_layernorm", attends="post_attention_layernorm",
        norms=(*LLAMA.norms, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    "phi3": Family(query="qkv_proj", key="qkv_proj", value="qkv_proj", fused="blocks"),
    "gpt2": Family(
        layers="transformer.h", attention="attn", out="c_proj", query="c_attn", key="c_attn", value="c_attn",
        fused="blocks", down="mlp.c_proj", norm="transformer.ln_f", norms=("ln_1", "ln_2"),
    ),
    "gpt_neox": Family(
        layers="gpt_neox.layers", attention="attention", out="dense", query="query_key_value", key="query_key_value",
        value="query_key_value", fused="heads", down="mlp.dense_4h_to_h", norm="gpt_neox.final_layer_norm",
        head="lm_head",
    ),
}  # fmt: skip
"""By ``config.model_type``. A new one is an entry here, or `Anatomy`'s argument."""


class Anatomy:
    """A causal language model of transformers, with its parts by name.

    Args:
        model: the model; it stays as it is.
        family: facts of its architecture, where `FAMILIES` lacks them.
    Raises:
        ZooError: for an unknown family, or one whose facts do not fit the model, naming them.
    """

    def __init__(self, model: nn.Module, family: Family | None = None):
        config: Any = getattr(model, "config", None)
        kind = getattr(config, "model_type", type(model).__name__)
        if family is None:
            if kind not in FAMILIES:
                raise ZooError(
                    f"No facts of the architecture {kind!r}; known are {', '.join(sorted(FAMILIES))}. In Python "
                    f"zoo.engines.patching.FAMILIES[{kind!r}] = Family(layers=..., attention=..., out=..., query=..., "
                    "key=..., value=..., mlp=..., norms=..., norm=..., head=...) makes it known."
                )
            family = FAMILIES[kind]
        self.model, self.family, self.config = model, family, config
        missing = [path for path in (family.layers, family.norm, family.head) if not _has(model, path)]
        if missing:
            raise ZooError(f"A {kind} model has no {' and no '.join(missing)}: its facts are wrong, see Family.")
        self.layers: list[nn.Module] = list(model.get_submodule(family.layers).children())
        inside = [
            family.attention,
            *(f"{family.attention}.{p}" for p in (family.out, family.query, family.key, family.value)),
        ]
        inside += [family.mlp, *family.mlp_parts, *family.norms, *([family.attends] if family.attends else [])]
        missing = [p for p in dict.fromkeys(inside) if not _has(self.layers[0], p)]
        if missing:
            raise ZooError(
                f"A block of this {kind} model has no {' and no '.join(missing)}: its facts are wrong, see Family."
            )
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = getattr(config, "num_key_value_heads", None) or self.heads
        self.width: int = config.hidden_size
        self.head_width: int = getattr(config, "head_dim", None) or self.width // self.heads
        self._names = {id(module): name for name, module in model.named_modules()}

    # ---- sites --------------------------------------------------------------------------------------------------

    def sites(self, *kinds: str) -> list[Site]:
        """All sites of these kinds, layer by layer."""
        return [site for layer in range(len(self.layers)) for kind in kinds for site in self._of(layer, kind)]

    def _of(self, layer: int, kind: str) -> Iterator[Site]:
        count = self.kv_heads if kind in ("key", "value") else self.heads
        return (Site(layer, kind, head) for head in (range(count) if kind in PER_HEAD else (-1,)))

    def site(self, name: str | Site) -> Site:
        """The site of a name.

        Raises:
            ZooError: if there is none, with the nearest.
        """
        text = str(name)
        match = re.fullmatch(r"layers\.(\d+)\.([a-z]+)(?:\.(\d+))?", text)
        if match is not None and match[2] in KINDS and int(match[1]) < len(self.layers):
            found = Site(int(match[1]), match[2], -1 if match[3] is None else int(match[3]))
            if found in self._of(found.layer, found.kind):
                return found
        options = [str(site) for site in self.sites(*KINDS)]
        raise ZooError(
            f"No site {text!r}.{nearest(text, options)} There are layers.0 to layers.{len(self.layers) - 1}, each with "
            f"{', '.join(KINDS)}; {self.heads} heads, {self.kv_heads} of keys and values."
        )

    # ---- modules ------------------------------------------------------------------------------------------------

    def attention(self, layer: int) -> nn.Module:
        """The attention module of a block."""
        return self.layers[layer].get_submodule(self.family.attention)

    def out(self, layer: int) -> nn.Module:
        """Its projection to the residual stream, whose input is what the heads give, side by side."""
        return self.attention(layer).get_submodule(self.family.out)

    def attends(self, layer: int) -> nn.Module:
        """The module whose output attention adds to the stream."""
        return self.layers[layer].get_submodule(self.family.attends) if self.family.attends else self.out(layer)

    def mlp(self, layer: int) -> nn.Module:
        """The module whose output the MLP adds to the stream."""
        return self.layers[layer].get_submodule(self.family.mlp)

    def down(self, layer: int) -> nn.Module:
        """The projection from the MLP's neurons, whose input is what they give.

        Raises:
            ZooError: if the family's facts name no such module.
        """
        if not _has(self.layers[layer], self.family.down):
            raise ZooError(f"A block of this model has no {self.family.down}: its facts lack Family(down=...).")
        return self.layers[layer].get_submodule(self.family.down)

    def projection(self, layer: int, kind: str) -> nn.Module:
        """The projection that makes the queries, keys or values of a block."""
        return self.attention(layer).get_submodule(getattr(self.family, kind))

    @property
    def norm(self) -> nn.Module:
        """The last norm."""
        return self.model.get_submodule(self.family.norm)

    @property
    def unembedding(self) -> nn.Module:
        """The projection to the vocabulary."""
        return self.model.get_submodule(self.family.head)

    def columns(self, site: Site) -> slice:
        """Which of the features of its module are a head's."""
        e, h = self.head_width, site.head
        if site.kind == "head":
            return slice(h * e, (h + 1) * e)
        if self.family.fused == "heads":
            start = (3 * h + ("query", "key", "value").index(site.kind)) * e
        else:
            before = {"query": 0, "key": self.heads, "value": self.heads + self.kv_heads}[site.kind]
            start = ((before if self.family.fused else 0) + h) * e
        return slice(start, start + e)

    # ---- parameters ---------------------------------------------------------------------------------------------

    def group(self, head: int) -> int:
        """The key-value head that a query head reads."""
        return head // (self.heads // self.kv_heads)

    def reads(self, site: Site | str) -> list[Site]:
        """What a head reads: its query, and its group's key and value.

        Raises:
            ZooError: for an unknown site, or one that is no head.
        """
        site = self.site(site)
        if site.kind != "head":
            raise ZooError(f"{site} is no head: only heads read queries, keys and values.")
        kv = self.group(site.head)
        return [Site(site.layer, "query", site.head), Site(site.layer, "key", kv), Site(site.layer, "value", kv)]

    def slices(self, site: Site | str) -> list[Slice]:
        """The parts of parameters that make up a site.

        Of a head: its rows of the query, key and value projections (those that its group shares, too) with their
        biases, and its columns of the output projection. Of "query", "key", "value": the rows. Of "attention" and
        "mlp": all their parameters. Of "residual": all of the block.

        Raises:
            ZooError: for an unknown site, or "input", which has none.
        """
        site = self.site(site)
        if site.kind == "input":
            raise ZooError(f"{site} has no parameters: it is what the block before gives.")
        block = self.layers[site.layer]
        if site.kind not in PER_HEAD:
            parts = {"attention": (self.family.attention,), "mlp": self.family.mlp_parts, "residual": ("",)}[site.kind]
            whole = [p for part in parts for p in block.get_submodule(part).parameters()]
            names = {id(p): n for n, p in self.model.named_parameters()}
            return [Slice(names[id(p)], 0, 0, p.shape[0]) for p in whole]
        found = []
        for made in self.reads(site) if site.kind == "head" else [site]:
            found += self._rows(self.projection(site.layer, made.kind), self.columns(made), outputs=True)
        if site.kind == "head":
            found += self._rows(self.out(site.layer), self.columns(site), outputs=False)
        return found

    def _rows(self, module: nn.Module, where: slice, outputs: bool) -> list[Slice]:
        """Slices of a projection: of some of its outputs with their bias, or of some of its inputs."""
        name, size = self._names[id(module)], where.stop - where.start
        found = [Slice(f"{name}.weight", int(outputs == is_transposed(module)), where.start, size)]
        if outputs and getattr(module, "bias", None) is not None:
            found.append(Slice(f"{name}.bias", 0, where.start, size))
        return found


def is_transposed(module: nn.Module) -> bool:
    """Whether a projection's weight is (inputs, outputs), as GPT-2's, not (outputs, inputs).

    Raises:
        ZooError: for a weight that is no plain matrix of numbers, such as a quantised one.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise ZooError(
            f"{type(module).__name__} has no plain floating-point weight (quantised?): load the model unquantised."
        )
    return not isinstance(module, nn.Linear) and hasattr(module, "nf")


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def same_shape(base: nn.Module, other: nn.Module) -> None:
    """Make sure that two models have the same parameters, so that weights of one fit into the other.

    Raises:
        ZooError: naming the first difference, or a parameter that is not finite.
    """
    ours, theirs = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (base, other))
    for name in dict.fromkeys((*ours, *theirs)):
        if ours.get(name) != theirs.get(name):
            raise ZooError(
                f"The two models differ: {name} is {ours.get(name, 'missing')} in one and "
                f"{theirs.get(name, 'missing')} in the other. They must have one architecture and one vocabulary."
            )
    for model in (base, other):
        for name, value in model.named_parameters():
            if not value.is_meta and not bool(torch.isfinite(value).all()):
                raise ZooError(f"{name} of a model has NaN or infinite values.")
