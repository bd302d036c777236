"""LocalPrompt: CLIP tuned from a few images that classifies known classes and flags unknown inputs by region.

Paper: Fanhu Zeng, Zhen Cheng, Fei Zhu, Hongxin Wei, Xu-Yao Zhang, "Local-Prompt: Extensible Local Prompts for Few-Shot
Out-of-Distribution Detection", ICLR 2025, arXiv:2409.04796. Code by the authors:
https://github.com/AuroraZengfh/Local-Prompt, no licence stated (its Dassl part MIT).

In: an image. Out: a known class, its probability and an out-of-distribution score (large = known, "ID").

CLIP is frozen. An image gives one global feature g and one local feature per region L: the last vision block with its
attention replaced by its value path. Three sets of prompts give text features: global G ("a photo of a {class}.",
fixed), local P (16 trained vectors + class name, for each class), negative N (300 times 16 trained vectors, no name).

    S = max_c softmax_c cos(g, G_c)  +  mean of the k largest, over regions and classes, of softmax_{P, N} cos(L, P_c)

Training takes several random crops of each image; the crops most similar to the class's global prompt are positives,
the least similar one is the negative ("negative augmentation"). Class prompts must explain the positives, negative
prompts the negative, and the negative prompts must differ from each other.

Departs from the authors' code, with equal results: sequences are cropped to the tokens in use (attention is causal),
the last blocks compute only the rows that are read, the local path shares the layer norm and values of the ordinary
one, denominators are log-sum-exp, text features are kept between evaluation batches.

Index legend: b batch, v views, r regions, c classes, m negative prompts, n context vectors, l tokens, w text width,
d width of the shared space.
"""

import contextlib
import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchmetrics import CatMetric, MeanMetric

from zoo.core import ZooError, ZooModule, check_channels, check_finite, unwrap
from zoo.nn.ood_metrics import OODMetrics

log = logging.getLogger(__name__)

TINY_CLIP: dict[str, Any] = {
    "text_config": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": 80, "max_position_embeddings": 24, "pad_token_id": 0, "bos_token_id": 78, "eos_token_id": 79,
    },
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8,
    },
    "projection_dim": 16,
}  # fmt: skip
TINY_CLASSES = ["red square", "green circle", "blue triangle", "yellow cross", "purple diamond", "cyan ring"]


# ---- names -> tokens ------------------------------------------------------------------------------------------------


class EmbeddedTokenizer:
    """A tokenizer that needs no file: for CLIP models built from a config, and trained with it.

    Text is put in lower case and split at blanks; a word on the list below is one token, any other word is spelled, one
    token a character, and closed by the end-of-word token unless a mark follows. ``bos`` and ``eos`` are the two
    highest ids, as in CLIP's own vocabulary.
    ids: 0 padding, 1 unknown character, 2 end of word, then marks, letters and digits, then words.

    Args:
        vocab_size: size of the text model's vocabulary; the words that do not fit are spelled.
    Raises:
        ValueError: if not even the characters fit.
    """

    characters = ".,-'abcdefghijklmnopqrstuvwxyz0123456789"
    words = (
        "a", "of", "photo", "the", "picture", "drawing", "one",
        "red", "green", "blue", "yellow", "purple", "cyan", "orange", "white",
        "square", "circle", "triangle", "cross", "diamond", "ring", "bar", "arrow", "moon", "frame", "corner",
        "hourglass",
    )  # fmt: skip

    def __init__(self, vocab_size: int):
        least = 3 + len(self.characters) + 2
        if vocab_size < least:
            raise ValueError(f"The embedded tokenizer needs vocab_size >= {least} in text_config, not {vocab_size}.")
        known = (*self.characters, *(w for w in self.words if len(w) > 1))
        self.ids = {piece: index for index, piece in enumerate(known[: vocab_size - 5], start=3)}
        self.bos, self.eos = vocab_size - 2, vocab_size - 1

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` without ``bos`` and ``eos``."""
        ids: list[int] = []
        for mark in ".,-'":
            text = text.replace(mark, f" {mark} ")
        for word in text.lower().split():
            if word in self.ids:
                ids.append(self.ids[word])
            else:
                ids += [self.ids.get(character, 1) for character in word] + [2]
        return ids


class HubTokenizer:
    """CLIP's own byte-pair tokenizer, from the Hub or a folder, with the interface of `EmbeddedTokenizer`.

    Args:
        vocab_size: of the text model, which the tokenizer's must equal.
    Raises:
        ZooError: if there is no tokenizer, or it is not the model's.
    """

    def __init__(self, name: str, vocab_size: int, revision: str | None = None):
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
            # transformers makes up an empty tokenizer where there are no files
            if len(self.tokenizer) != vocab_size:
                raise ValueError(f"it has {len(self.tokenizer)} tokens, the text model {vocab_size}.")
        except (OSError, ValueError, ImportError) as error:
            raise ZooError(
                f"No tokenizer for this backbone in {name}: {str(error).splitlines()[0]} Name one, such as "
                "tokenizer='openai/clip-vit-base-patch16', or 'embedded' if the backbone was trained with that."
            ) from error
        self.bos, self.eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def class_names(classes: Sequence[str] | str) -> list[str]:
    """The class names as they enter the prompts: underscores become blanks.

    Args:
        classes: names in the order of the labels; ``"imagenet"`` stands for the 1,000 of ImageNet-1k as timm lists them
            (the first WordNet lemma; the cleaned names of the CLIP authors can be passed as a list).
    Raises:
        ValueError: if there is none, or one is empty.
    """
    if isinstance(classes, str):
        if classes != "imagenet":
            raise ValueError(f"classes={classes!r}: pass a list of class names, or 'imagenet' for its 1,000.")
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        classes = [info.index_to_description(index).split(",")[0] for index in range(info.num_classes())]
    names = [" ".join(name.replace("_", " ").split()) for name in classes]
    if not names or not all(names):
        raise ValueError(f"classes={list(classes)[:5]}: at least one class name is needed, and none may be empty.")
    return names


# ---- CLIP, run by its documented parts ------------------------------------------------------------------------------


class CLIP(nn.Module):
    """A `transformers.CLIPModel`, run block by block: prompts can be vectors, and the last block has a local path.

    Args:
        model: `CLIPModel` (transformers >= 4.45).
    Raises:
        TypeError: if the model lacks a part of CLIP, naming it.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        for part in (
            "text_model.embeddings.token_embedding", "text_model.embeddings.position_embedding",
            "text_model.encoder.layers", "text_model.final_layer_norm", "text_projection",
            "vision_model.embeddings", "vision_model.pre_layrnorm",
            "vision_model.encoder.layers", "vision_model.post_layernorm", "visual_projection", "logit_scale",
        ):  # fmt: skip
            found: Any = model
            for name in part.split("."):
                found = getattr(found, name, None)
            if found is None:
                raise TypeError(f"The backbone {type(model).__name__} has no '{part}': not a transformers CLIPModel.")
        self.model = model
        config = model.config
        self.text_width = int(config.text_config.hidden_size)
        self.text_heads = int(config.text_config.num_attention_heads)
        self.vision_heads = int(config.vision_config.num_attention_heads)
        self.positions = int(config.text_config.max_position_embeddings)
        self.image_size = int(config.vision_config.image_size)
        self.regions = (self.image_size // int(config.vision_config.patch_size)) ** 2
        self.width = int(config.projection_dim)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.visual_projection.weight.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings: (..., l) ids -> (..., l, w)."""
        return self.model.text_model.embeddings.token_embedding(ids)

    def text(self, embeddings: Tensor, end: Tensor, checkpointing: bool = False) -> Tensor:
        """Text features of prompts given as vectors.

        Args:
            checkpointing: recompute the blocks in the backward pass instead of keeping their activations.
        Shapes:
            embeddings: (p, l, w), any l up to CLIP's positions: what follows a prompt's end cannot reach it (causal);
            end: (p,) index of the end token, which is read out; returns: (p, d), not normalised.
        """
        text = self.model.text_model
        length = embeddings.shape[1]
        x = embeddings + text.embeddings.position_embedding.weight[:length]
        layers = list(text.encoder.layers)
        for layer in layers[:-1]:
            if checkpointing and torch.is_grad_enabled() and x.requires_grad:
                x = checkpoint(_block, layer, x, self.text_heads, True, use_reentrant=False)
            else:
                x = _block(layer, x, self.text_heads, True)
        # the last block, only for the token that is read
        layer, rows = layers[-1], torch.arange(x.shape[0], device=x.device)
        h = layer.layer_norm1(x)
        seen = (torch.arange(length, device=x.device) <= end[:, None])[:, None, None]
        y = _attend(layer.self_attn, h[rows, end].unsqueeze(1), h, self.text_heads, mask=seen)
        y = x[rows, end] + y.squeeze(1)
        y = y + layer.mlp(layer.layer_norm2(y))
        return self.model.text_projection(text.final_layer_norm(y))

    def image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Global and local image features.

        In the last block, input x, the local path is v = x + out_proj(v_proj(ln_1(x))), v = v + mlp(ln_2(v)): the
        values of each region without the mixing of attention, which carries little locality.

        Shapes:
            pixels: (b, 3, s, s), normalised; returns: g (b, d), L (b, r, d), not normalised.
        """
        vision = self.model.vision_model
        x = vision.pre_layrnorm(vision.embeddings(pixels))  # sic: transformers' spelling
        layers = list(vision.encoder.layers)
        for layer in layers[:-1]:
            x = _block(layer, x, self.vision_heads, False)
        layer = layers[-1]
        h = layer.layer_norm1(x)
        attention = layer.self_attn
        value = attention.v_proj(h)
        first = x[:, :1] + _attend(attention, h[:, :1], h, self.vision_heads, value=value)
        regions = x[:, 1:] + attention.out_proj(value[:, 1:])
        y = torch.cat([first, regions], 1)
        y = y + layer.mlp(layer.layer_norm2(y))
        y = self.model.visual_projection(vision.post_layernorm(y))
        return y[:, 0], y[:, 1:]


def _attend(
    attention: nn.Module,
    query: Tensor,
    source: Tensor,
    heads: int,
    causal: bool = False,
    mask: Tensor | None = None,
    value: Tensor | None = None,
) -> Tensor:
    """Multi-head attention of ``query`` (b, q, w) over ``source`` (b, l, w) with the projections of a CLIP block."""

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    value = attention.v_proj(source) if value is None else value
    q, k, v = split(attention.q_proj(query)), split(attention.k_proj(source)), split(value)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return attention.out_proj(y.transpose(1, 2).flatten(2))


def _block(layer: nn.Module, x: Tensor, heads: int, causal: bool) -> Tensor:
    h = layer.layer_norm1(x)
    x = x + _attend(layer.self_attn, h, h, heads, causal)
    return x + layer.mlp(layer.layer_norm2(x))


def load_clip(backbone: str | dict[str, Any], revision: str | None = None) -> nn.Module:
    """A `transformers.CLIPModel` in float32, from a Hub id or folder (with weights) or a config (random weights).

    Raises:
        ZooError: if nothing is found under the id or folder.
    """
    from transformers import CLIPConfig, CLIPModel

    if isinstance(backbone, dict):
        # CLIPConfig keeps and fills the dictionaries that it is given
        config = {k: dict(v) if isinstance(v, dict) else v for k, v in backbone.items()}
        return CLIPModel(CLIPConfig(**config))
    name = str(Path(backbone).expanduser()) if Path(backbone).expanduser().is_dir() else backbone
    try:
        return CLIPModel.from_pretrained(name, revision=revision).float()
    except (OSError, ValueError) as error:
        raise ZooError(
            f"No CLIP model under backbone={backbone!r}: {str(error).splitlines()[0]} "
            "Give a Hub id, a folder written by save_pretrained, or a config dict."
        ) from error


# ---- prompts --------------------------------------------------------------------------------------------------------


class Prompts(nn.Module):
    """Global, local and negative prompts as sequences of vectors (section 3.2, 3.3).

        global:    [bos] a photo of a {class} . [eos]        fixed words, or trained vectors in their place
        local:     [bos] v_1 ... v_n {class} . [eos]         v of its own for each class, trained
        negative:  [bos] u_1 ... u_n . [eos]                 no class, trained

    Args:
        names: class names.
        tokenizer: with ``encode``, ``bos`` and ``eos``.
        width: text width w. positions: the text model's longest sequence.
        context: trained vectors n of a prompt. negatives: number of negative prompts m.
        local: without it there are only the global prompts.
        global_context: trained vectors in place of the template's words; 0 = the template.
        template: with ``{}`` for the class name.
    Raises:
        ValueError: if a class name is too long for the positions, naming it.
    """

    def __init__(
        self,
        names: list[str],
        tokenizer: Any,
        width: int,
        positions: int,
        context: int,
        negatives: int,
        local: bool,
        global_context: int,
        template: str,
    ):
        super().__init__()
        self.context, self.global_context = context, global_context
        self.bos = tokenizer.bos
        suffixes = [[*tokenizer.encode(f"{name}."), tokenizer.eos] for name in names]
        whole = suffixes if global_context else [[*tokenizer.encode(template.format(n)), tokenizer.eos] for n in names]
        for name, local_ids, global_ids in zip(names, suffixes, whole, strict=True):
            longest = max(1 + context * local + len(local_ids), 1 + global_context + len(global_ids))
            if longest > positions:
                raise ValueError(
                    f"The class name {name[:60]!r} needs {longest} tokens with {max(context * local, global_context)} "
                    f"context vectors; the text model has {positions} positions. Shorten the name or the context."
                )
        # not in checkpoints: they follow from the names
        self._tokens("class", suffixes)
        self._tokens("global", whole)
        self._tokens("negative", [[*tokenizer.encode("."), tokenizer.eos]])
        self.local = self.negative = None
        if local:
            self.local = nn.Parameter(torch.empty(len(names), context, width))
            # tells whether prompts in a checkpoint belong to these names
            self.register_buffer("local_names", torch.tensor([_fingerprint(name) for name in names]))
            if negatives:
                self.negative = nn.Parameter(torch.empty(negatives, context, width))
        if global_context:
            self.register_buffer("global_vectors", torch.empty(global_context, width))
        for vectors in (self.local, self.negative, getattr(self, "global_vectors", None)):
            if vectors is not None:
                nn.init.normal_(vectors, std=0.02)  # CoOp's

    def _tokens(self, name: str, ids: list[list[int]]) -> None:
        longest = max(map(len, ids))
        padded = [row + [0] * (longest - len(row)) for row in ids]
        self.register_buffer(f"{name}_ids", torch.tensor(padded), persistent=False)
        self.register_buffer(f"{name}_end", torch.tensor([len(row) - 1 for row in ids]), persistent=False)

    def _sequence(self, clip: CLIP, vectors: Tensor | None, ids: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """[bos] vectors ids -> embeddings (p, l, w) and the index of the end token (p,)."""
        count = ids.shape[0] if vectors is None or vectors.ndim == 2 else vectors.shape[0]
        start = clip.embed(ids.new_full((1, 1), self.bos)).expand(count, -1, -1)
        words = clip.embed(ids).expand(count, -1, -1)
        parts = [start, words] if vectors is None else [start, vectors.expand(count, -1, -1).to(words.dtype), words]
        x = torch.cat(parts, 1)
        return x, (end + (x.shape[1] - ids.shape[1])).expand(count)

    def global_sequences(self, clip: CLIP) -> tuple[Tensor, Tensor]:
        vectors = self.global_vectors if self.global_context else None
        return self._sequence(clip, vectors, self.global_ids, self.global_end)

    def local_sequences(self, clip: CLIP) -> tuple[Tensor, Tensor]:
        return self._sequence(clip, self.local, self.class_ids, self.class_end)

    def negative_sequences(self, clip: CLIP) -> tuple[Tensor, Tensor]:
        return self._sequence(clip, self.negative, self.negative_ids, self.negative_end)


def _fingerprint(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


# ---- losses and scores ----------------------------------------------------------------------------------------------


def positive_loss(local: Tensor, negative: Tensor, label: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    """Class prompts explain the positive view (Eq. 5; x = logits, top = the k regions where a prompt's are largest).

        L_pos = -mean log( A / ( sum_c sum_{top of c} e^{x_c/T} + sum_m sum_{top of m} e^{x_m/T} ) ),
        A = sum_{top of y} e^{x_y/T}

    Args:
        k: regions. temperature: T.
    Shapes:
        local: (b, c, r) logits of the class prompts; negative: (b, m, r) of the negative prompts, m may be 0;
        label: (b,) long; returns: scalar.
    """
    classes = local.topk(k, dim=-1, sorted=False).values.float() / temperature
    own = classes[torch.arange(len(label), device=label.device), label]
    whole = classes.flatten(1)
    if negative.shape[1]:
        others = negative.topk(k, dim=-1, sorted=False).values.float() / temperature
        whole = torch.cat([whole, others.flatten(1)], 1)
    return (whole.logsumexp(1) - own.logsumexp(1)).mean()


def negative_loss(local: Tensor, negative: Tensor, label: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    """Negative prompts explain the negative view, class prompts do not (Eq. 6).

        L_neg = -mean log( A / ( A + sum_c sum_{top of c} e^{x_c/T} ) ),   A = sum_m sum_{regions in top of y} e^{x_m/T}

    Shapes:
        local: (b, c, r), negative: (b, m, r) logits of the negative view; label: (b,); returns: scalar.
    """
    top = local[torch.arange(len(label), device=label.device), label].topk(k, dim=-1, sorted=False).indices
    kept = negative.gather(2, top[:, None].expand(-1, negative.shape[1], -1)).float() / temperature
    classes = local.topk(k, dim=-1, sorted=False).values.float() / temperature
    own = kept.flatten(1).logsumexp(1)
    return (torch.logaddexp(own, classes.flatten(1).logsumexp(1)) - own).mean()


def diversity_loss(negative: Tensor) -> Tensor:
    """Negative prompts differ: L_div = sum_{i,j} cos(N_i, N_j) / (m (m - 1)), i = j included as the authors do (Eq. 7).

    Shapes:
        negative: (m, d), normalised; returns: scalar, 0 for fewer than two prompts.
    """
    m = negative.shape[0]
    if m < 2:
        return negative.sum() * 0
    return negative.sum(0).square().sum() / (m * (m - 1))  # sum_ij <N_i, N_j> = |sum_i N_i|^2


def mcm_score(g: Tensor, text: Tensor, temperature: float = 1.0) -> Tensor:
    """Maximum concept matching: max_c softmax_c(cos(g, G_c) / T).

    Shapes: g: (b, d), text: (c, d), normalised; returns: (b,).
    """
    return (g @ text.t() / temperature).softmax(-1).amax(-1)


def regional_score(regions: Tensor, local: Tensor, negative: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    """The local term of R-MCM: mean of the k largest, over regions and classes, of softmax_{P, N} cos(L, .) / T.

    Shapes: regions: (b, r, d), local: (c, d), negative: (m, d), normalised; returns: (b,).
    """
    x = regions @ torch.cat([local, negative]).t() / temperature
    share = (x[..., : local.shape[0]] - x.logsumexp(-1, keepdim=True)).flatten(1)
    return share.topk(k, dim=-1, sorted=False).values.exp().mean(-1)


def class_score(g: Tensor, regions: Tensor, text: Tensor, local: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    """score_c = exp(cos(g, G_c)) * mean over the k best regions of exp(cos(L, P_c) / T).

    Shapes: g: (b, d), regions: (b, r, d), text, local: (c, d), normalised; returns: (b, c).
    """
    top = (regions @ local.t()).transpose(1, 2).topk(k, dim=-1, sorted=False).values
    return (g @ text.t()).exp() * (top / temperature).exp().mean(-1)


# ---- the method -----------------------------------------------------------------------------------------------------


class LocalPrompt(ZooModule):
    """Few-shot out-of-distribution detection with local prompts for a frozen CLIP.

    `forward` takes images in [0, 1] and returns the class scores and the OOD score (large = known). Images of another
    size are resized (shorter side, bicubic) and cropped to the centre; normalisation is part of the model.

    Training batches hold ``views`` (b, v, 3, h, w) and ``label`` (b,); with ``view_key`` (b,), an integer that names an
    image whose views are the same in every epoch, their features are computed once and kept on the CPU.
    One training batch takes ``positives`` optimiser steps, one for each positive view, as the authors do;
    ``step_per_view=False`` takes one step on the mean of their losses (the prompts then pass the text encoder once a
    batch, not ``positives`` times). A trainer's ``max_steps`` counts optimiser steps, as always in Lightning. Without a
    trainer `training_step` returns that mean and steps nothing.

    Validation uses known images only; during `fit` it sets ``threshold``, below which 5 % of them score.

    Args:
        classes: names of the known classes in the order of the labels; "imagenet" = the 1,000 of ImageNet-1k.
        backbone: Hub id or folder of a transformers CLIPModel, or its config as a dict (random weights). With an id or
            folder, checkpoints hold the prompts only.
        backbone_revision: commit, tag or branch of the Hub id.
        tokenizer: "auto" = the backbone's own, for a config dict the embedded one; "embedded"; or a Hub id or folder.
        local: trained local prompts; False is MCM, the zero-shot baseline: nothing is trained.
        negatives: negative prompts; 0 leaves out L_neg and L_div as well.
        context: trained vectors of a prompt.
        regions: K, regions that a prompt is judged by in the losses (20 by default in the code, 50 in its README's
            command and checkpoint names).
        score_regions: k, regions in the scores.
        temperature: T, of losses and scores.
        positives: views taken as positives; the least similar view is the negative one.
        negative_weight: lambda, of L_neg.
        diversity_weight: delta, of L_div.
        template: of the global prompts; ``{}`` is the class name.
        global_context: vectors of trained global prompts (CoOp's) that replace the template; 0 = the template.
            See `use_global_prompts`.
        step_per_view: one optimiser step per positive view (the authors'), or one per batch.
        checkpointing: recompute the text encoder's blocks in the backward pass: less memory, about a third more time.
        chunk: images encoded at once while views are selected.
        mean, std: of CLIP's image normalisation.
        lr, momentum, weight_decay: of SGD.
        warmup_epochs, warmup_lr: epochs at a constant low rate before the cosine.
    Shapes:
        image: (b, 3, h, w) float in [0, 1] or uint8; returns: class scores (b, c), OOD score (b,).
    Raises:
        ValueError: if K or k exceeds the number of regions, a name the text positions, or a number its range.
    Example:
        >>> model = LocalPrompt.from_variant("tiny")
        >>> model.predict(torch.rand(2, 3, 32, 32))["score"].shape
        torch.Size([2])
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {
            "classes": TINY_CLASSES, "backbone": TINY_CLIP, "negatives": 4, "context": 4, "regions": 4,
            "score_regions": 4, "positives": 1,
        },
    }  # fmt: skip
    monitor, mode = "val/accuracy", "max"
    head: ClassVar[tuple[str, ...]] = ("prompts.local", "threshold")

    def __init__(
        self,
        classes: list[str] | str = "imagenet",
        backbone: str | dict[str, Any] = "openai/clip-vit-base-patch16",
        backbone_revision: str | None = None,
        tokenizer: str = "auto",
        local: bool = True,
        negatives: int = 300,
        context: int = 16,
        regions: int = 50,
        score_regions: int = 10,
        temperature: float = 1.0,
        positives: int = 8,
        negative_weight: float = 5.0,
        diversity_weight: float = 0.5,
        template: str = "a photo of a {}.",
        global_context: int = 0,
        step_per_view: bool = True,
        checkpointing: bool = False,
        chunk: int = 256,
        mean: list[float] = [0.48145466, 0.4578275, 0.40821073],  # noqa: B006 (read only; JSON has no tuple)
        std: list[float] = [0.26862954, 0.26130258, 0.27577711],  # noqa: B006
        lr: float = 0.002,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        warmup_epochs: int = 1,
        warmup_lr: float = 1e-5,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.classes = class_names(classes)
        for name, value, least in (
            ("negatives", negatives, 0), ("context", context, 1), ("positives", positives, 1), ("chunk", chunk, 1),
            ("global_context", global_context, 0), ("warmup_epochs", warmup_epochs, 0),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"{name}={value}: expected at least {least}.")
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: expected a positive number.")
        if template.count("{}") != 1:
            raise ValueError(f"template={template!r}: expected one {{}} for the class name.")
        self.backbone = CLIP(load_clip(backbone, backbone_revision))
        for name, value in (("regions", regions), ("score_regions", score_regions)):
            if local and not 1 <= value <= self.backbone.regions:
                raise ValueError(
                    f"{name}={value}: the backbone has {self.backbone.regions} regions. Choose between 1 and that."
                )
        self.prompts = Prompts(
            self.classes, self._tokenizer(), self.backbone.text_width, self.backbone.positions, context, negatives,
            local, global_context, template,
        )  # fmt: skip
        self.freeze("backbone")
        self.register_buffer("threshold", torch.tensor(-math.inf))
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        # text features of the last evaluation; `_key` says for which weights they hold
        for name, rows in (("global", len(self.classes)), ("local", len(self.classes)), ("negative", negatives)):
            rows = rows if local or name == "global" else 0
            self.register_buffer(f"text_{name}", torch.zeros(rows, self.backbone.width), persistent=False)
        self._key: dict[str, Any] = {}
        self._views: dict[int, Tensor] = {}
        self._epochs = 1
        self.automatic_optimization = local and not step_per_view
        self.register_load_state_dict_pre_hook(_keep_fresh_prompts)
        self.val_accuracy, self.val_scores = MeanMetric(), CatMetric()
        self.test_accuracy, self.test_ood, self.test_mcm = MeanMetric(), OODMetrics(), OODMetrics()

    def _tokenizer(self) -> EmbeddedTokenizer | HubTokenizer:
        hp = self.hparams
        vocab_size = int(self.backbone.model.config.text_config.vocab_size)
        if hp.tokenizer == "embedded" or (hp.tokenizer == "auto" and isinstance(hp.backbone, dict)):
            return EmbeddedTokenizer(vocab_size)
        if hp.tokenizer == "auto":
            return HubTokenizer(hp.backbone, vocab_size, hp.backbone_revision)
        return HubTokenizer(hp.tokenizer, vocab_size)

    @classmethod
    def from_backbone(cls, module: nn.Module, **hparams: Any) -> Self:
        """Build around a live `transformers.CLIPModel`; its weights are then part of checkpoints.

        Args:
            module: the CLIPModel; it is frozen and shared, not copied.
            hparams: hyperparameters; ``tokenizer`` is needed unless the model was trained with the embedded one.
        Raises:
            ValueError: for a model with CLIP's own vocabulary and no word on its tokenizer.
        Example:
            >>> from transformers import CLIPConfig, CLIPModel
            >>> clip = CLIPModel(CLIPConfig(**TINY_CLIP))
            >>> model = LocalPrompt.from_backbone(clip, **{**LocalPrompt.variant("tiny"), "classes": ["cat", "dog"]})
        """
        CLIP(module)  # refuses what is no CLIP
        config = module.config
        if int(config.text_config.vocab_size) == 49408 and "tokenizer" not in hparams:
            raise ValueError(
                "from_backbone: this CLIP has its own vocabulary of 49,408 tokens. Pass its tokenizer, for instance "
                "tokenizer='openai/clip-vit-base-patch16' (or 'embedded' if it was trained with that)."
            )
        plain = {
            "text_config": _plain(config.text_config),
            "vision_config": _plain(config.vision_config),
            "projection_dim": config.projection_dim,
            "logit_scale_init_value": config.logit_scale_init_value,
        }
        self = cls(**{**hparams, "backbone": plain})
        self.backbone = CLIP(module)
        return self.freeze("backbone")

    # ---- features ---------------------------------------------------------------------------------------------------

    def preprocess(self, image: Tensor) -> Tensor:
        """To the backbone's size (shorter side, bicubic, then the centre) and CLIP's normalisation.

        Shapes: image: (b, 3, h, w) float in [0, 1] or uint8; returns: (b, 3, s, s).
        """
        check_channels(image, 3, "image")
        size = self.backbone.image_size
        x = image.to(self.mean.dtype) / 255 if image.dtype == torch.uint8 else image.to(self.mean.dtype)
        h, w = x.shape[-2:]
        if (h, w) != (size, size):
            scale = size / min(h, w)
            grown = (max(size, round(h * scale)), max(size, round(w * scale)))
            if grown != (h, w):
                x = F.interpolate(x, grown, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
            top, left = (grown[0] - size) // 2, (grown[1] - size) // 2
            x = x[..., top : top + size, left : left + size]
        return ((x - self.mean) / self.std).to(self.backbone.dtype)

    def encode_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised features in float32 (or wider): (b, 3, h, w) -> g (b, d), L (b, r, d)."""
        g, regions = self.backbone.image(self.preprocess(image))
        return _unit(g), _unit(regions)

    def encode_text(self, which: str) -> Tensor:
        """Normalised text features (rows, d) of the "global", "local" or "negative" prompts, with gradients."""
        if which != "global" and getattr(self.prompts, which) is None:
            return self.mean.new_zeros(0, self.backbone.width)
        embeddings, end = getattr(self.prompts, f"{which}_sequences")(self.backbone)
        return _unit(self.backbone.text(embeddings, end, self.hparams.checkpointing))

    def text(self, which: str) -> Tensor:
        """`encode_text` without gradients, computed again only when weights have changed."""
        kept = getattr(self, f"text_{which}")
        if torch.compiler.is_compiling():
            # an exported graph holds the text features as constants where the module has been used since its last step
            return kept.clone() if which in self._key and not self.training else self.encode_text(which)
        sources = [*self.backbone.model.text_model.parameters(), self.backbone.model.text_projection.weight]
        if which == "global":
            sources += [self.prompts.global_vectors] if self.hparams.global_context else []
        elif getattr(self.prompts, which) is not None:
            sources += [getattr(self.prompts, which)]
        key = [(id(p), p._version) for p in sources]
        if self._key.get(which) != key:
            # never in the lower precision of a training step: evaluation reads it too
            with torch.no_grad(), _full_precision(kept):
                kept.copy_(self.encode_text(which))
            self._key[which] = key
        return kept

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._key.clear()  # other device or type: the weights are others, their version counters are not
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():  # 16 bits are too few for cosines, which differ little
            if buffer is not None and buffer.dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = buffer.float()
        return self

    def use_global_prompts(self, vectors: Tensor) -> Self:
        """Put trained global prompts (CoOp's context vectors) in the template's place, without retraining.

        Args:
            vectors: (global_context, w).
        Raises:
            ValueError: if the shape differs or the module was built with ``global_context=0``.
        """
        shape = (self.hparams.global_context, self.backbone.text_width)
        if tuple(vectors.shape) != shape or not shape[0]:
            raise ValueError(
                f"use_global_prompts: vectors have shape {tuple(vectors.shape)}, this module takes {shape}. "
                "Build or load it with global_context = the number of vectors."
            )
        with torch.no_grad():
            self.prompts.global_vectors.copy_(vectors)
        return self

    # ---- scores -----------------------------------------------------------------------------------------------------

    def scores(self, g: Tensor, regions: Tensor, text: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Class scores (b, c) and OOD score (b,) from normalised features; ``text`` holds global, local, negative."""
        k, temperature = self.hparams.score_regions, self.hparams.temperature
        mcm = mcm_score(g, text["global"], temperature)
        if not self.hparams.local:
            return (g @ text["global"].t()).exp(), mcm
        regional = regional_score(regions, text["local"], text["negative"], k, temperature)
        return class_score(g, regions, text["global"], text["local"], k, temperature), mcm + regional

    def _texts(self) -> dict[str, Tensor]:
        if self.training:
            return {"global": self.text("global"), **{w: self.encode_text(w) for w in ("local", "negative")}}
        return {which: self.text(which) for which in ("global", "local", "negative")}

    def example_inputs(self) -> tuple[Tensor, ...]:
        size = self.backbone.image_size
        generator = torch.Generator().manual_seed(0)
        return (torch.rand(2, 3, size, size, generator=generator).to(self.device),)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        g, regions = self.encode_image(image)
        return self.scores(g, regions, self._texts())

    def predict(self, image: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Classify images and say how known they look.

        Returns:
            ``class`` (b,) index of the best class; ``probability`` (b,) of it: softmax over the log class scores times
            CLIP's logit scale; ``score`` (b,) OOD score, large = known; ``is_ood`` (b,) bool: score below ``threshold``
            (nothing is before a fit or `calibrate` has set it).
        Shapes:
            image: (b, 3, h, w) float in [0, 1] or uint8.
        """
        check_channels(image, 3, "image")
        check_finite(image, "image")
        scores, score = super().predict(image)
        scale = self.backbone.model.logit_scale.detach().exp()
        probability, best = (scale * scores.log()).softmax(-1).max(-1)
        return {"class": best, "probability": probability, "score": score, "is_ood": score < self.threshold}

    def calibrate(self, scores: Tensor, kept: float = 0.95) -> Self:
        """Set ``threshold`` so that the share ``kept`` of known images' scores lies at or above it.

        Args:
            scores: (n,) OOD scores of known images.
        """
        check_finite(scores, "scores")
        ordered = scores.flatten().sort().values
        self.threshold.copy_(ordered[int((1 - kept) * len(ordered))])
        return self

    # ---- training ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def select_views(self, views: Tensor, label: Tensor, keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Negative augmentation guided by the global prompts: the local features of the best views and of the worst.

        Views are ordered by the cosine of their g with the global prompt of the image's own class.

        Args:
            keys: (b,) integers; features of a key seen before are taken from memory.
        Shapes:
            views: (b, v, 3, h, w); label: (b,); returns: positives (p, b, r, d), the most similar first, and the
            negative (b, r, d), normalised.
        Raises:
            ValueError: if there are no more views than positives.
        """
        b, v = views.shape[:2]
        p = self.hparams.positives
        if v <= p:
            raise ValueError(f"'views' has {v} views of each image; {p} positives and 1 negative need {p + 1} or more.")
        known = keys.tolist() if keys is not None and not keys.is_meta else None
        if known is not None and all(key in self._views for key in known):
            chosen = torch.stack([self._views[key] for key in known], 1).to(views.device)
            return chosen[:p], chosen[p]
        text = self.text("global")[label]
        similarity, regions = [], []
        for part in views.flatten(0, 1).split(self.hparams.chunk):
            g, local = self.encode_image(part)
            similarity.append(g)
            regions.append(local)
        similarity = torch.einsum("bvd,bd->vb", torch.cat(similarity).view(b, v, -1), text.to(similarity[0].dtype))
        local = torch.cat(regions).unflatten(0, (b, v))
        order = torch.cat([similarity.topk(p, dim=0).indices, similarity.argmin(0, keepdim=True)])
        chosen = local[torch.arange(b, device=order.device), order]
        if known is not None:
            for column, key in enumerate(known):
                self._views[key] = chosen[:, column].cpu()
        return chosen[:p], chosen[p]

    def loss(self, positive: Tensor, negative: Tensor, label: Tensor) -> dict[str, Tensor]:
        """L = L_pos + lambda L_neg + delta L_div for selected views; all views of ``positive`` count alike (Eq. 8).

        Shapes:
            positive: (p, b, r, d) or (b, r, d), negative: (b, r, d), normalised local features; label: (b,).
        Returns:
            ``loss`` and its parts ``positive``, ``negative``, ``diversity``, scalars.
        """
        if self.prompts.local is None:
            raise ZooError("LocalPrompt(local=False) is the zero-shot baseline: it has nothing to train and no loss.")
        hp = self.hparams
        for which in ("local", "negative"):  # a step follows: what an export would take as constants no longer holds
            self._key.pop(which, None)
        local, others = self.encode_text("local"), self.encode_text("negative")
        positive = positive if positive.ndim == 4 else positive[None]
        c = local.shape[0]
        # cosines times the logit scale would lose most digits in bf16
        with _full_precision(label):
            text = self.backbone.model.logit_scale.exp().to(local.dtype) * torch.cat([local, others])
            x = text @ positive.flatten(0, 1).to(text.dtype).transpose(1, 2)  # (p b, c + m, r)
            # slices, not .split: its backward is a fresh concatenation
            labels = label.repeat(len(positive))
            parts = {"positive": positive_loss(x[:, :c], x[:, c:], labels, hp.regions, hp.temperature)}
            if hp.negatives:
                x = text @ negative.to(text.dtype).transpose(1, 2)
                parts["negative"] = negative_loss(x[:, :c], x[:, c:], label, hp.regions, hp.temperature)
                parts["diversity"] = diversity_loss(others)
            else:
                parts["negative"] = parts["diversity"] = parts["positive"].new_zeros(())
        total = parts["positive"] + hp.negative_weight * parts["negative"] + hp.diversity_weight * parts["diversity"]
        return {"loss": total, **parts}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        if self.prompts.local is None:
            return None
        label = batch["label"]
        self._check_labels(label)
        positive, negative = self.select_views(batch["views"], label, batch.get("view_key"))
        if self.automatic_optimization or self._trainer is None:
            parts = self.loss(positive, negative, label)
        else:
            optimizer = self.optimizers()
            taken = []
            for view in positive:
                parts = self.loss(view, negative, label)
                optimizer.zero_grad()
                self.manual_backward(parts["loss"])
                optimizer.step()
                taken.append({name: value.detach() for name, value in parts.items()})
            parts = {name: torch.stack([step[name] for step in taken]).mean() for name in parts}
        if self._trainer is not None:
            self.log("train/loss", parts["loss"].detach(), prog_bar=True, batch_size=len(label))
            self.log_dict(
                {f"train/{name}": parts[name].detach() for name in ("positive", "negative", "diversity")},
                batch_size=len(label),
            )
        return parts["loss"]

    def on_train_start(self) -> None:
        self._epochs = self._count_epochs()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # from the epoch alone, as the authors' schedule, so that a resumed run needs no scheduler's state
        if self.prompts.local is not None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            for group in optimizer.param_groups:
                group["lr"] = self.rate(self.current_epoch, self._epochs)

    def on_train_epoch_end(self) -> None:
        if self.prompts.local is None:
            self.trainer.should_stop = True  # nothing is trained: one epoch is as good as many

    def rate(self, epoch: int, epochs: int) -> float:
        """The learning rate of an epoch: constant and low to warm up, then a cosine that ends where the fit does."""
        hp = self.hparams
        if epoch < hp.warmup_epochs:
            return hp.warmup_lr
        return hp.lr * 0.5 * (1 + math.cos(math.pi * (epoch - hp.warmup_epochs) / epochs))

    def _check_labels(self, label: Tensor) -> None:
        if not label.is_meta and (int(label.max()) >= len(self.classes) or int(label.min()) < 0):
            raise ValueError(
                f"'label' runs from {int(label.min())} to {int(label.max())}, this module knows {len(self.classes)} "
                "classes (0 to one less). Pass the data's class names as `classes`."
            )

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._views.clear()

    def configure_optimizers(self) -> Any:
        if self.prompts.local is None:
            return None
        hp = self.hparams
        parameters = [p for p in self.prompts.parameters() if p.requires_grad]
        return torch.optim.SGD(parameters, lr=hp.lr, momentum=hp.momentum, weight_decay=hp.weight_decay)

    def _count_epochs(self) -> int:
        """Epochs of this fit, also where the trainer counts steps."""
        trainer = self.trainer
        epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else None
        if trainer.max_steps is not None and trainer.max_steps > 0:
            steps = trainer.num_training_batches * (self.hparams.positives if self.hparams.step_per_view else 1)
            by_steps = max(1, math.ceil(trainer.max_steps / steps))
            epochs = by_steps if epochs is None else min(epochs, by_steps)
        return epochs or 1

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._check_labels(batch["label"])
        scores, score = self(batch["image"])
        self.val_accuracy.update((scores.argmax(-1) == batch["label"]).float())
        self.val_scores.update(score.float())
        self.log("val/accuracy", self.val_accuracy, prog_bar=True, batch_size=len(score))

    def on_validation_epoch_end(self) -> None:
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.calibrate(self.val_scores.compute())
        self.val_scores.reset()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        g, regions = self.encode_image(batch["image"])
        text = self._texts()
        scores, score = self.scores(g, regions, text)
        known = batch["ood"] == 0
        if bool(known.any()):
            self._check_labels(batch["label"][known])
            self.test_accuracy.update((scores.argmax(-1) == batch["label"])[known].float())
        self.test_ood.update(score, batch["ood"])
        self.test_mcm.update(mcm_score(g, text["global"], self.hparams.temperature), batch["ood"])

    def on_test_epoch_end(self) -> None:
        names = getattr(getattr(self.trainer, "datamodule", None), "ood_names", None)
        figures = {"test/accuracy": self.test_accuracy.compute()}
        for prefix, metric in (("test/", self.test_ood), ("test/mcm_", self.test_mcm)):
            for name, value in metric.compute().items():
                name, _, group = name.partition("/")
                group = names[int(group) - 1] if group and names else group
                figures[f"{prefix}{name}{'/' + group if group else ''}"] = value
            metric.reset()
        self.test_accuracy.reset()
        self.log_dict(figures)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        out: dict[str, Any] = self.predict(batch["image"])
        names = [self.classes[index] for index in out["class"].tolist()]
        return {**out, "class_name": names, "name": list(batch["name"])}

    # ---- authors' checkpoints ---------------------------------------------------------------------------------------

    @classmethod
    def convert_state_dict(cls, content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The authors' ``prompt_learner/model.pth.tar-30``: local_ctx (c, n, w) and neg_ctx (m, n, w).

        The fixed token vectors beside them follow from the class names and are left out, as the authors do. Pass the
        class names, which the file does not hold; without them the hyperparameters name ``class 0``, ``class 1``...

        Raises:
            ZooError: if a tensor is missing or unknown.
        """
        tensors = {key.removeprefix("prompt_learner."): value for key, value in unwrap(content).items()}
        fixed = {"token_prefix", "token_suffix", "neg_token_prefix", "neg_token_suffix"}
        missing, unknown = {"local_ctx", "neg_ctx"} - tensors.keys(), tensors.keys() - {"local_ctx", "neg_ctx"} - fixed
        if missing or unknown:
            raise ZooError(
                f"Not a Local-Prompt checkpoint: missing {sorted(missing)}, unknown {sorted(unknown)[:3]}; "
                "expected local_ctx and neg_ctx."
            )
        local, negative = tensors["local_ctx"].float(), tensors["neg_ctx"].float()
        c = local.shape[0]
        names = "imagenet" if c == 1000 else [f"class {index}" for index in range(c)]
        marks = torch.tensor([_fingerprint(name) for name in class_names(names)])
        state = {
            "prompts.local": local,
            "prompts.local_names": marks,
            "prompts.negative": negative,
            "threshold": torch.tensor(-math.inf),
        }
        return {"classes": names, "context": local.shape[1], "negatives": negative.shape[0]}, state


def _keep_fresh_prompts(module: LocalPrompt, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Prompts of other class names, though as many, are not this model's: it keeps its freshly initialised ones."""
    module._key.clear()
    own, given, prompts = f"{prefix}prompts.local", state.get(f"{prefix}prompts.local_names"), module.prompts
    if prompts.local is None or given is None or own not in state or given.is_meta or prompts.local.is_meta:
        return
    if given.shape == prompts.local_names.shape and not torch.equal(given.cpu(), prompts.local_names.cpu()):
        log.info("LocalPrompt: initialised anew for your classes: prompts.local, threshold.")
        state[own], state[f"{own}_names"] = prompts.local.detach().clone(), prompts.local_names.clone()
        state[f"{prefix}threshold"] = torch.full_like(module.threshold, -math.inf)


def _unit(x: Tensor) -> Tensor:
    """Unit length along the last dimension, in float32 or wider."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def _full_precision(like: Tensor) -> contextlib.AbstractContextManager[None]:
    """No autocast on the device of ``like`` (the meta device knows none)."""
    return contextlib.nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


def _plain(config: Any) -> dict[str, Any]:
    """The sizes in a part of a CLIPConfig, as JSON."""
    kept = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps",
        "vocab_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "image_size",
        "patch_size", "num_channels",
    )  # fmt: skip
    return {name: getattr(config, name) for name in kept if getattr(config, name, None) is not None}
