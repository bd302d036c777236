"""Is a prompt one of those to be forgotten? An encoder tells, from the forget set alone.

For every request a LoRA adapter of one frozen masked language model is trained on the request's prompts by masked words
and by a contrastive entropy against the original encoder. A prompt's layer states, averaged over its tokens, are scored
against those of the training prompts, the scores are joined by a one-class SVM, and a mixture of two Gaussians turns
the result into a weight.

Index legend: b prompts, t tokens, l layer states (embeddings first), d their width, n training prompts of a request.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.core import ZooError
from zoo.language.unlearning.orthogonal_lora import Adapters
from zoo.nn.backbones import known_mask

log = logging.getLogger(__name__)

ROBERTA_LARGE = "FacebookAI/roberta-large"
ROBERTA_LARGE_CONFIG = {
    "model_type": "roberta", "vocab_size": 50265, "hidden_size": 1024, "num_hidden_layers": 24,
    "num_attention_heads": 16, "intermediate_size": 4096, "max_position_embeddings": 514, "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}  # fmt: skip
COSINE = 1000.0
"""What the largest cosine counts in a layer's score beside half a Mahalanobis distance (the authors' code)."""
SNAPS = ("none", "scienceqa", "tofu")
TARGETS = ("query", "key", "value")


# ---- the parts, as functions ----------------------------------------------------------------------------------------


def token_mean(states: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens that ``mask`` keeps, or over all. Shapes: states (b, t, d), mask (b, t); returns (b, d)."""
    if mask is None:
        return states.mean(1)
    weight = mask.to(states.dtype).unsqueeze(-1)
    return (states * weight).sum(1) / weight.sum(1)


def contrastive_entropy(own: Tensor, original: Tensor) -> Tensor:
    """How undecided a prompt is among the originals of its batch, summed over layers.

        S = z z'^T,   p = softmax over rows,   sum_l mean_n -sum_k p_nk log(p_nk + 1e-5)

    Shapes:
        own, original: (l, b, d), the second without gradient; returns: scalar
    """
    p = (own @ original.detach().mT).softmax(-1)
    return -(p * (p + 1e-5).log()).sum(-1).mean(-1).sum()


def layer_scores(features: Tensor, mean: Tensor, precision: Tensor, bank: Tensor) -> Tensor:
    """s_l = -0.5 (f - mu)^T P (f - mu) - 1000 max_j cos(f, bank_j), layer by layer.

    Shapes:
        features: (l, b, d); mean: (l, d); precision: (l, d, d); bank: (l, n, d) of unit vectors; returns: (b, l)
    """
    centred = features - mean[:, None]
    distance = ((centred @ precision) * centred).sum(-1)
    cosine = (F.normalize(features, dim=-1) @ bank.mT).amax(-1)
    return (-0.5 * distance - COSINE * cosine).T


def closeness(score: Tensor, mixture: Tensor) -> Tensor:
    """How near a score is to the middle of the mixture, in [0, 1].

        F(x) = 0.5 Phi((x - m1) / sd) + 0.5 Phi((x - m2) / sd),  x0 = (m1 + m2) / 2
        c(x) = 1 - max(F(x), F(2 x0 - x)) + min(F(x), F(2 x0 - x)) = 2 F(x0 - |x - x0|)

    Both components have the same width, so that F(2 x0 - x) = 1 - F(x): the second form is the first, without its
    cancellation far away.

    Shapes:
        score: (b,); mixture: (3,), m1, m2 and sd; returns: (b,)
    """
    m1, m2, sd = mixture.unbind()
    middle = (m1 + m2) / 2
    below = middle - (score - middle).abs()
    scale = sd * 2**0.5
    return 0.5 * (torch.special.erfc((m1 - below) / scale) + torch.special.erfc((m2 - below) / scale))


def loading_weight(close: Tensor, snap: str = "none") -> Tensor:
    """w = sigmoid(10 c - 2), and what the authors' evaluations make of it.

    Args:
        snap: "none"; "scienceqa": above 0.9 it is 1.2, in (0.3, 0.4] it stays, else 0; "tofu": from 0.32 on it is 1,
            in (0.2, 0.32) it is 10 w^2, else 0.
    """
    w = torch.sigmoid(10 * close - 2)
    if snap == "scienceqa":
        return torch.where(w > 0.9, 1.2, torch.where((w > 0.3) & (w <= 0.4), w, 0.0))
    if snap == "tofu":
        return torch.where(w >= 0.32, 1.0, torch.where(w > 0.2, 10 * w.square(), 0.0))
    return w


def gaussian(features: Tensor, authors_cutoff: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and precision (pseudo-inverse of the empirical covariance) of features (l, n, d), in double precision.

    Eigenvalues below d eps of the largest are left out, with the eps of float32, which the features are of. Behind a
    layer norm all states lie in a plane: across it there is rounding alone.

    Args:
        authors_cutoff: with the eps of float64, as theirs: that rounding then counts, and scores are in the millions.
    Shapes:
        returns: (l, d), (l, d, d)
    """
    wide = features.double()
    mean = wide.mean(1)
    centred = wide - mean[:, None]
    covariance = centred.mT @ centred / features.shape[1]
    cutoff = features.shape[-1] * torch.finfo(torch.float64 if authors_cutoff else torch.float32).eps
    return mean, torch.linalg.pinv(covariance, rtol=cutoff, hermitian=True)


def one_class(scores: Tensor, nu: float = 0.1) -> Tensor:
    """The weights (l,) of a linear one-class SVM fitted to scores (n, l): its decision is their product.

    The solution scales with the scores. They are fitted at unit size, where the solver's tolerance means something: at
    their own, in the thousands, it may never end.
    """
    from sklearn.svm import OneClassSVM

    rows = scores.double().cpu()
    size = rows.square().sum(1).mean().sqrt().clamp(min=1e-12)
    fitted = OneClassSVM(kernel="linear", nu=nu, tol=1e-9, max_iter=2_000_000).fit((rows / size).numpy())
    return torch.from_numpy(fitted.coef_[0].copy()) * size


def mask_words(ids: Tensor, special: Tensor, mask_id: int, words: int, share: float = 0.15) -> tuple[Tensor, Tensor]:
    """BERT's masking: of ``share`` of the tokens 80 % become the mask, 10 % any word, 10 % stay.

    Shapes:
        ids: (b, t); special: (b, t) bool, never chosen; returns: ids, labels (b, t), -100 where nothing is asked
    """
    chosen = (torch.rand(ids.shape, device=ids.device) < share) & ~special
    how = torch.rand(ids.shape, device=ids.device)
    drawn = torch.randint(words, ids.shape, device=ids.device)
    masked = torch.where(how < 0.8, mask_id, torch.where(how < 0.9, drawn, ids))
    return torch.where(chosen, masked, ids), torch.where(chosen, ids, -100)


# ---- the detector ---------------------------------------------------------------------------------------------------


class Fitted(nn.Module):
    """What scoring needs to know of one request.

    Args:
        states, width, size: l, d, n. authors_cutoff: see `gaussian`.
    """

    mean: Tensor
    precision: Tensor
    bank: Tensor
    normal: Tensor
    mixture: Tensor
    ready: Tensor

    def __init__(self, states: int, width: int, size: int, authors_cutoff: bool = False):
        super().__init__()
        self.authors_cutoff = authors_cutoff
        self.register_buffer("mean", torch.zeros(states, width))
        self.register_buffer("precision", torch.zeros(states, width, width))
        self.register_buffer("bank", torch.zeros(states, size, width))
        self.register_buffer("normal", torch.zeros(states - 1))  # of the SVM
        self.register_buffer("mixture", torch.zeros(3))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def fit(self, train: Tensor, calibration: Tensor) -> None:
        """From the features (l, n, d) of training prompts, and (l, m, d) of others of the same request."""
        mean, precision = gaussian(train, self.authors_cutoff)
        self.mean.copy_(mean)
        self.precision.copy_(precision)
        self.bank.copy_(F.normalize(train, dim=-1))
        rows = self.layers(train)
        self.normal.copy_(one_class(rows))
        inner, outer = self.scores(train).double(), self.scores(calibration).double()
        width = outer.std(correction=0).clamp(min=1e-9)
        self.mixture.copy_(torch.stack([inner.mean(), outer.mean(), width]))
        self.ready.fill_(True)

    def layers(self, features: Tensor) -> Tensor:
        """Layer scores without the embeddings': (l, b, d) -> (b, l - 1)."""
        return layer_scores(features, self.mean, self.precision, self.bank)[:, 1:]

    def scores(self, features: Tensor) -> Tensor:
        """(l, b, d) -> (b,)."""
        return self.layers(features) @ self.normal


class OODDetector(nn.Module):
    """One frozen encoder, and for each request an adapter and what was fitted to its prompts.

    Args:
        trunk: a masked language model of transformers (RoBERTa, BERT); it is frozen.
        sizes: n of each request.
        states: how many layer states are used, the embeddings included; those after them are not computed to score.
        rank, alpha, dropout: of the adapters on query, key and value.
        authors_padding: average over padding, too, as the authors' code does; prompts must then be padded to one
            length in training and scoring.
        authors_cutoff: see `gaussian`.
    Shapes:
        ids, mask: (b, t)
        features: (requests or 1, l, b, d) token means
    Raises:
        ValueError: for no or empty requests.
    """

    def __init__(
        self,
        trunk: nn.Module,
        sizes: Sequence[int],
        states: int = 13,
        rank: int = 8,
        alpha: float = 32.0,
        dropout: float = 0.1,
        authors_padding: bool = False,
        authors_cutoff: bool = False,
    ):
        super().__init__()
        config: Any = trunk.config
        if not sizes or min(sizes) < 2 or states < 2:
            raise ValueError(f"sizes is {list(sizes)} and states {states}; at least one request of 2 prompts, and 2.")
        self.states, self.authors_padding = min(states, config.num_hidden_layers + 1), authors_padding
        self.trunk = trunk.requires_grad_(False).eval()
        self.adapters = Adapters(trunk, TARGETS, rank, alpha, dropout, count=len(sizes))
        self.fitted = nn.ModuleList([Fitted(self.states, config.hidden_size, size, authors_cutoff) for size in sizes])

    def train(self, mode: bool = True) -> "OODDetector":
        super().train(mode)
        self.trunk.eval()
        return self

    @property
    def ready(self) -> list[int]:
        """The requests that can be told."""
        return [i for i, one in enumerate(self.fitted) if not one.ready.is_meta and bool(one.ready)]  # type: ignore[union-attr,operator]

    @property
    def longest(self) -> int:
        """Tokens that the encoder has positions for; RoBERTa counts them from behind the padding's number."""
        config: Any = self.trunk.config
        return config.max_position_embeddings - (config.pad_token_id + 1 if "roberta" in config.model_type else 0)

    @contextlib.contextmanager
    def _no_further(self) -> Iterator[None]:
        """The encoder without the layers whose states nobody reads."""
        encoder: Any = self.trunk.base_model.encoder
        whole = encoder.layer
        encoder.layer = whole[: self.states - 1]
        try:
            yield
        finally:
            encoder.layer = whole

    def _hidden(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        encoder: Any = self.trunk.base_model
        return encoder(ids, attention_mask=known_mask(ids, mask), output_hidden_states=True).hidden_states

    def _means(self, hidden: Sequence[Tensor], mask: Tensor) -> Tensor:
        kept = None if self.authors_padding else mask
        return torch.stack([token_mean(h, kept) for h in hidden[: self.states]])

    @torch.no_grad()
    def features(self, ids: Tensor, mask: Tensor, requests: Sequence[int] | None = None) -> Tensor:
        """Token means with the adapters of these requests, all in one batch; with None those of the original."""
        count = 1 if requests is None else len(requests)
        wide, wide_mask = (ids, mask) if count == 1 else (ids.repeat(count, 1), mask.repeat(count, 1))
        mode = self.training
        self.eval()
        try:
            with self._no_further(), self.adapters.loaded(requests) if requests else contextlib.nullcontext():
                means = self._means(self._hidden(wide, wide_mask), wide_mask)
        finally:
            self.train(mode)
        return means.unflatten(1, (count, len(ids))).transpose(0, 1)

    def losses(
        self, request: int, ids: Tensor, mask: Tensor, labels: Tensor, original: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Masked words and contrastive entropy of one request's adapter.

        Shapes:
            ids: (b, t), some words masked; labels: (b, t), -100 where nothing is asked
            original: (l, b, d), `features` of the whole prompts without adapter; returns: two scalars
        """
        with self.adapters.loaded([request]):
            hidden = self._hidden(ids, mask)
        head: Any = self.trunk.lm_head if hasattr(self.trunk, "lm_head") else self.trunk.cls
        last, asked = hidden[-1].flatten(0, 1), labels.flatten()
        if not ids.is_meta:  # the vocabulary is most of the cost: logits of the masked words only
            place = (asked != -100).nonzero().flatten()
            last, asked = last[place], asked[place]
        words = F.cross_entropy(head(last).float(), asked, ignore_index=-100, reduction="sum")
        count = (asked != -100).sum().clamp(min=1)
        return words / count, contrastive_entropy(self._means(hidden, mask).float(), original.float())

    def fit(self, request: int, train: Tensor, calibration: Tensor) -> None:
        """Fit what scoring needs to features (l, n, d) of the training prompts and (l, m, d) of the held-out ones.

        Raises:
            ZooError: for fewer than 10 held-out prompts, or features that are not finite.
        """
        if calibration.shape[1] < 10:
            raise ZooError(
                f"{calibration.shape[1]} prompts to calibrate the detector; at least 10. Hold out a larger share."
            )
        if not bool(train.isfinite().all() and calibration.isfinite().all()):
            raise ZooError("The detector's features are NaN or infinite: are its weights, or did training diverge?")
        self.fitted[request].fit(train.float(), calibration.float())  # type: ignore[operator]

    @torch.no_grad()
    def closeness(self, ids: Tensor, mask: Tensor) -> Tensor:
        """How near each prompt is to each request, (b, requests) float64 in [0, 1]; 0 to those not fitted yet."""
        found = torch.zeros(len(ids), len(self.fitted), dtype=torch.float64, device=ids.device)
        ready = self.ready
        if ready:
            for request, features in zip(ready, self.features(ids, mask, ready), strict=True):
                one: Any = self.fitted[request]
                found[:, request] = closeness(one.scores(features.float()).double(), one.mixture.double())
        return found
