"""HRP: LoRA fine-tuning whose directions come from a few steps at a high rank.

Paper: Yuzhu Chen, Yingjie Wang, Shi Fu, Li Shen, Yongcheng Jing, Xinmei Tian, Dacheng Tao, "HRP: High-Rank Preheating
for Superior LoRA Initialization", 2025, arXiv:2502.07739. No public code. In: a pretrained transformer (any of
`transformers`, through `peft`) and texts with classes, or plain texts; out: a rank-r adapter and a classifier.

    W = W_0 + s B A^T,   s = alpha / r,   A (n_in x r), B (n_out x r)                                   (LoRA)
    preheat K steps at rank R >> r;  B A^T = U S V^T;  start over with A = c V_r, B = 0, W_0 as it was   (HRP)

The end of LoRA depends on where A starts: the best start is the top right singular vectors of the change that the task
asks for, and preheating estimates them. Only the direction is taken over: the preheated B, the classifier's optimiser
state and the schedule start over, and c keeps the norm of A that the usual start has.

Fidelity is "reconstruction": abstract, summaries and the algebra are public, the settings are not. Gaps filled here:
  * Scale: c = sqrt(n_in Var(A_ij)) of peft's Kaiming-uniform start, = 1/sqrt(3), so that ||A||_F is the usual one.
  * Preheating is plain LoRA of rank R, so s = alpha / R there (``preheat_scale="rank"``). Under Adam each of the R
    directions moves by the learning rate, so that this keeps the size of a step; with s = alpha / r ("same", right for
    plain gradient descent) preheating oversteps and its directions are worse, as we measured; "root" lies between.
  * Preheating runs at the full learning rate, without warm-up or decay; the main schedule then starts from zero and
    spans the steps that are left: steps of preheating count as steps of the run.
  * The classifier goes on training through the swap (only the adapters start over); its optimiser state starts over.
  * r = 8, alpha = 16, R = 128, K = 100, lr = 2e-4, linear warm-up over 3 % and linear decay, no weight decay.
  * Classification puts a linear head on the pooled encoder or decoder (T5: its encoder), not label words.
  * A layer that preheating leaves at B = 0 (no gradient reached it) gets orthonormal directions out of its random A.
`keep_b` is an ablation of ours: B and A both start from the truncated product and W_0 is corrected (as PiSSA does).

Index legend: b batch, t tokens, c classes, r rank, R preheating rank, n_in/n_out sizes of a layer, s adapter scale.
"""

import logging
import math
import re
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassMatthewsCorrCoef

from zoo.core import ZooError, ZooModule
from zoo.core.errors import first_line
from zoo.nn.backbones import build_backbone, config_of, take_weights

log = logging.getLogger(__name__)

INITS = ("hrp", "lora", "rslora", "pissa", "dora")
SCALES = ("rank", "root", "same")
POOLINGS = ("auto", "mean", "first", "last")


def need_peft() -> Any:
    """The package peft.

    Raises:
        ZooError: one line naming the extra, where it is missing.
    """
    try:
        import peft
    except ImportError as error:
        raise ZooError(
            "HRP adapts models through peft, which is missing: pip install 'paper-zoo[language]'."
        ) from error
    return peft


# ---- texts to numbers -------------------------------------------------------------------------------------------


class HashTokenizer:
    """Words (and signs) to ids by a checksum: no vocabulary file, so it is its own description.

    A word is ``3 + crc32(word) mod (size - 3)``, lower-cased; 0 pads, 1 ends each text, 2 is left for masks.

    Args:
        size: number of ids, at least 8.
    """

    pad_token_id, eos_token_id, mask_token_id = 0, 1, 2

    def __init__(self, size: int):
        if size < 8:
            raise ValueError(f"vocab_size is {size}; hashing words needs at least 8 ids.")
        self.size = size

    def __call__(self, texts: list[str], max_length: int = 128, **_: Any) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, (b, t) int64, padded on the right to the longest text."""
        rows = []
        for text in texts:
            words = re.findall(r"\w+|[^\w\s]", text.lower())[: max_length - 1]
            rows.append([3 + zlib.crc32(w.encode()) % (self.size - 3) for w in words] + [self.eos_token_id])
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


# ---- the algebra ------------------------------------------------------------------------------------------------


def truncated_svd(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The top singular triplets of ``b @ a`` without forming it: two thin QRs and an SVD of size R x R.

        b = Q_b R_b,   a^T = Q_a R_a,   R_b R_a^T = U' S V'^T   =>   b a = (Q_b U') S (Q_a V')^T

    Args:
        rank: r, how many triplets; at most R.
    Shapes:
        a: (..., R, n_in), peft's ``lora_A``; b: (..., n_out, R), peft's ``lora_B``
        returns: U (..., n_out, r), S (..., r) falling, V (..., n_in, r)
    """
    q_a, r_a = torch.linalg.qr(a.mT)
    q_b, r_b = torch.linalg.qr(b)
    u, s, vt = torch.linalg.svd(r_b @ r_a.mT)
    return q_b @ u[..., :rank], s[..., :rank], q_a @ vt.mT[..., :rank]


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """peft's LoRA layers of a model by name."""
    need_peft()
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def adapter_of(layer: Any) -> str:
    """The name of the one active adapter of a LoRA layer.

    Raises:
        ZooError: if there is none or more than one.
    """
    if len(layer.active_adapters) != 1:
        raise ZooError(f"HRP preheats one adapter; the active ones are {layer.active_adapters}. Activate one.")
    return layer.active_adapters[0]


def check_layers(layers: Mapping[str, Any], rank_pre: int) -> None:
    """Refuse what cannot be preheated at rank R.

    Raises:
        ZooError: for no LoRA layers, quantised layers, convolutions, embeddings and LoRA variants such as DoRA.
        ValueError: for r > R or R > min(n_in, n_out), naming the layer.
    """
    if not layers:
        raise ZooError(
            "HRP found no LoRA layers: wrap the model with peft (get_peft_model, inject_adapter_in_model) first."
        )
    from peft.tuners.lora.layer import Linear as LoraLinear

    for name, layer in layers.items():
        weight = getattr(layer.get_base_layer(), "weight", None)
        # the quantised layers of peft are classes of their own, or hold integer weights
        if type(layer) is not LoraLinear or weight is None or not weight.is_floating_point():
            kind = type(layer.get_base_layer()).__name__
            raise ZooError(
                f"HRP cannot preheat {name} ({kind}): quantised layers, convolutions and embeddings are not supported, "
                "only float Linear and Conv1D. Load the model unquantised, or leave this layer out of target_modules."
            )
        if layer.lora_variant:
            raise ZooError(
                f"HRP cannot preheat {name}: it carries the variant {next(iter(layer.lora_variant.values()))}."
            )
        rank, limit = final_rank(layer), min(layer.in_features, layer.out_features)
        if rank > rank_pre:
            raise ValueError(
                f"rank is {rank} and rank_pre {rank_pre}: preheating needs a rank_pre of at least rank ({name})."
            )
        if rank_pre > limit:
            raise ValueError(
                f"rank_pre is {rank_pre}, but {name} is {layer.in_features} -> {layer.out_features}: a rank above "
                f"{limit} adds nothing there. Pass rank_pre={limit} or less."
            )


def final_rank(layer: Any) -> int:
    """The rank r that a layer ends with, also while it is preheated at R."""
    return getattr(layer, "hrp_rank", None) or layer.r[adapter_of(layer)]


def resize(layer: Any, rank: int) -> None:
    """Give a LoRA layer new factors of another rank: A as peft starts it, B zero; what is frozen stays so."""
    name = adapter_of(layer)
    old_a, old_b = layer.lora_A[name].weight, layer.lora_B[name].weight
    with torch.device(old_a.device):
        layer.lora_A[name] = nn.Linear(layer.in_features, rank, bias=False, dtype=old_a.dtype)
        layer.lora_B[name] = nn.Linear(rank, layer.out_features, bias=False, dtype=old_b.dtype)
    layer.r[name] = rank
    layer.reset_lora_parameters(name, True)
    layer.lora_A[name].weight.requires_grad_(old_a.requires_grad)
    layer.lora_B[name].weight.requires_grad_(old_b.requires_grad)


def heat(layer: Any, rank_pre: int, scale: str) -> None:
    """Bring a layer into the preheating phase: rank R, fresh factors, scale s times r/R, sqrt(r/R) or 1."""
    name, rank = adapter_of(layer), final_rank(layer)
    layer.hrp_rank, layer.hrp_scaling = rank, layer.scaling[name]
    layer.scaling[name] *= {"rank": rank / rank_pre, "root": math.sqrt(rank / rank_pre), "same": 1.0}[scale]
    resize(layer, rank_pre)


def cool(layer: Any) -> None:
    """Bring a layer back: rank r and its scale s, with fresh factors."""
    resize(layer, layer.hrp_rank)
    layer.scaling[adapter_of(layer)] = layer.hrp_scaling
    del layer.hrp_rank, layer.hrp_scaling


def expand(model: nn.Module, rank_pre: int, scale: str = "rank") -> None:
    """Step 1: every LoRA layer gets fresh factors of rank R.

    Args:
        scale: of preheating, from s = alpha / r: "rank" is alpha / R, "root" alpha / sqrt(r R), "same" alpha / r.
    Raises:
        ZooError, ValueError: as `check_layers`; ValueError for an unknown scale.
    """
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}; it must be one of {', '.join(SCALES)}.")
    layers = lora_layers(model)
    check_layers(layers, rank_pre)
    for layer in layers.values():
        heat(layer, rank_pre, scale)


@torch.no_grad()
def swap(model: nn.Module, keep_b: bool = False) -> list[str]:
    """Steps 2 and 3: back to rank r with A = c V_r and B = 0, so that the model computes what it did before preheating.

    Layers of one shape are decomposed together. The parameters are new: an optimiser must be made anew.

    Args:
        keep_b: start from A = sqrt(S) V^T, B = U sqrt(S) and take s B A off W_0 instead (ablation).
    Returns:
        The names of the layers whose B was still zero; their directions come from the random A.
    Raises:
        ZooError: if every B is still zero (nothing was preheated), or nothing was expanded.
    """
    layers = {name: layer for name, layer in lora_layers(model).items() if hasattr(layer, "hrp_rank")}
    if not layers:
        raise ZooError("HRP: no layer is being preheated. Call expand(model, rank_pre) first.")
    idle = [name for name, layer in layers.items() if not layer.lora_B[adapter_of(layer)].weight.any()]
    if len(idle) == len(layers):
        raise ZooError(
            "HRP: every B is still zero, so there are no directions to take. Preheat at least one step (K >= 1)."
        )
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for layer in layers.values():
        a = layer.lora_A[adapter_of(layer)].weight
        key = (*a.shape, layer.out_features, layer.hrp_rank, a.device)
        groups.setdefault(key, []).append(layer)
    for (*_, rank, _device), group in groups.items():
        a = torch.stack([layer.lora_A[adapter_of(layer)].weight.float() for layer in group])
        b = torch.stack([layer.lora_B[adapter_of(layer)].weight.float() for layer in group])
        u, s, v = truncated_svd(a, b, rank)
        for i, layer in enumerate(group):
            cool(layer)
            name = adapter_of(layer)
            new_a, new_b = layer.lora_A[name].weight, layer.lora_B[name].weight
            if keep_b:
                new_a.copy_(s[i].sqrt()[:, None] * v[i].mT)
                new_b.copy_(u[i] * s[i].sqrt())
                base = layer.get_base_layer().weight
                change = layer.scaling[name] * (new_b.float() @ new_a.float())
                base.sub_((change.mT if layer.fan_in_fan_out else change).to(base.dtype))
            else:
                # Var(A_ij) = 1 / (3 n_in) in peft's Kaiming-uniform start, so c = sqrt(n_in Var) = 1 / sqrt(3)
                new_a.copy_(v[i].mT / math.sqrt(3))
    return idle


def match_ranks(
    model: nn.Module, state: Mapping[str, Tensor], rank_pre: int, scale: str = "rank", prefix: str = ""
) -> None:
    """Bring LoRA layers to the phase (R or r) that a state dict was saved in, so that it loads; leave others alone."""
    for name, layer in lora_layers(model).items():
        key = f"{prefix}{name}.lora_A.{adapter_of(layer)}.weight"
        if key not in state or len(state[key]) == layer.r[adapter_of(layer)]:
            continue
        rank, given = final_rank(layer), len(state[key])
        if given == rank:
            cool(layer)
        elif given == rank_pre:
            heat(layer, rank_pre, scale)


def compute_budget(model: nn.Module, rank_pre: int, preheat_steps: int, total_steps: float) -> dict[str, float]:
    """What a run costs next to plain LoRA, in multiply-adds of the adapted layers (forward and backward).

    A step at rank q costs 2 n_in n_out + 3 q (n_in + n_out) a token and layer; where A is frozen its gradient,
    q n_in, is spared. Attention and the head cost the same in both phases and are left out, so the true ratio is lower.
    The decomposition comes once a run and is not in it (it is timed: ``swap_seconds`` of the callback).

    Returns:
        ``preheat_steps``, ``main_steps``, ``total_steps``; ``preheat_cost``: cost of a step at R over one at r;
        ``equivalent_lora_steps``: the steps that plain LoRA of rank r could do for the same cost.
    """
    high = low = 0.0
    for layer in lora_layers(model).values():
        n_in, n_out = layer.in_features, layer.out_features
        each = 3 * (n_in + n_out) - (0 if layer.lora_A[adapter_of(layer)].weight.requires_grad else n_in)
        high += 2 * n_in * n_out + rank_pre * each
        low += 2 * n_in * n_out + final_rank(layer) * each
    main = total_steps - preheat_steps
    return {
        "preheat_steps": preheat_steps,
        "main_steps": main,
        "total_steps": total_steps,
        "preheat_cost": high / low,
        "equivalent_lora_steps": preheat_steps * high / low + main,
    }


# ---- preheating inside one fit ----------------------------------------------------------------------------------


class HRPCallback(lightning.Callback):
    """Preheats the LoRA layers of any LightningModule for K steps and swaps them, all inside one ``Trainer.fit``.

    Before the first step every LoRA layer gets rank R; after K optimiser steps `swap` brings it back to its own rank,
    and the module's ``configure_optimizers`` is called again, as for a run of the steps that are left: preheating is
    part of the run's budget. During preheating the learning rate is the optimiser's own, without schedule. What a
    ModelCheckpoint held best before the swap is forgotten: those weights have rank R.

    A checkpoint from before the swap and one from after it both resume to the weights of an unbroken run. Adapters
    that are trained already (some B is not zero) are not preheated again; one log line says so.

    Works on one device and under DDP. For a plain PyTorch loop: `expand`, K steps, `swap`, a new optimiser.

    Args:
        rank_pre: R, at least the layers' rank and at most the smallest side of any of them.
        steps: K, optimiser steps of preheating, at least 1 and less than the run's.
        keep_b: see `swap`.
        scale: of preheating, see `expand`.
    Raises:
        ValueError: if K < 1, or (at fit start) K leaves no main phase, or R does not fit a layer.
    Example:
        >>> model = ...  # a LightningModule around peft.get_peft_model(...)
        >>> trainer = lightning.Trainer(max_steps=1000, callbacks=[HRPCallback(rank_pre=128, steps=50)])
    """

    def __init__(self, rank_pre: int = 128, steps: int = 100, keep_b: bool = False, scale: str = "rank"):
        if steps < 1:
            raise ValueError(
                f"steps (K) is {steps}: with no preheating step B is zero and has no directions. Use 1 or more."
            )
        if rank_pre < 1:
            raise ValueError(f"rank_pre is {rank_pre}; it must be at least 1.")
        if scale not in SCALES:
            raise ValueError(f"scale is {scale!r}; it must be one of {', '.join(SCALES)}.")
        self.rank_pre, self.steps, self.keep_b, self.scale = rank_pre, steps, keep_b, scale
        self.swapped_at: int | None = None
        """Step of the swap: None before it, 0 where trained adapters made preheating needless."""
        self.budget: dict[str, float] = {}
        """`compute_budget` of this run."""
        self.swap_seconds = 0.0
        self._hook: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"swapped_at": self.swapped_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.swapped_at = state_dict["swapped_at"]

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ZooError(
                f"HRP swaps parameters during the run, which {type(trainer.strategy).__name__} cannot follow. "
                "Use one device or strategy='ddp'."
            )
        layers = lora_layers(pl_module)
        check_layers(layers, self.rank_pre)
        self.swapped_at = None
        preheating = any(hasattr(layer, "hrp_rank") for layer in layers.values())  # a run that was broken off
        if not preheating and any(layer.lora_B[adapter_of(layer)].weight.any() for layer in layers.values()):
            self.swapped_at = 0
            log.info("HRP: the adapters are trained already and go on from there, without preheating.")
        elif not preheating:
            expand(pl_module, self.rank_pre, self.scale)
        # a checkpoint is loaded right after this hook, and may be of either phase
        self._hook = pl_module.register_load_state_dict_pre_hook(
            lambda module, state, prefix, *_: match_ranks(module, state, self.rank_pre, self.scale, prefix)
        )

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # the strategy has just made the optimisers; their states are loaded after this hook
        total = trainer.estimated_stepping_batches
        if self.swapped_at:
            self._rebuild(trainer, total - self.swapped_at)
        elif self.swapped_at is None:
            if self.steps >= total and not trainer.fast_dev_run:
                raise ValueError(
                    f"{self.steps} preheating steps leave no main phase in a run of {total} steps. "
                    f"Train longer, or preheat fewer steps (1 to 5 % of the run)."
                )
            trainer.strategy.lr_scheduler_configs = []
            for optimizer in trainer.strategy.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group.get("initial_lr", group["lr"])
        done = self.steps if self.swapped_at is None else self.swapped_at
        self.budget = compute_budget(pl_module, self.rank_pre, min(done, total), total)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.swapped_at is None and trainer.global_step >= self.steps:
            self._swap(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.swapped_at is None and trainer.fast_dev_run and trainer.global_step:
            self._swap(trainer, pl_module)  # too short a test run still ends with rank r

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _swap(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        start = time.perf_counter()
        idle = swap(pl_module, self.keep_b)
        self.swap_seconds = time.perf_counter() - start
        self.swapped_at = trainer.global_step
        if idle:
            log.info("HRP: no gradient reached %d layers (%s, ...); they start at random.", len(idle), idle[0])
        self._rebuild(trainer, trainer.estimated_stepping_batches - self.swapped_at)
        for checkpoint in trainer.checkpoint_callbacks:
            if isinstance(checkpoint, ModelCheckpoint):
                _forget(checkpoint, trainer)
        log.info(
            "HRP: preheated %d steps at rank %d; the run costs as much as %.1f steps of plain LoRA.",
            self.swapped_at, self.rank_pre, self.budget["equivalent_lora_steps"],
        )  # fmt: skip

    @staticmethod
    def _rebuild(trainer: lightning.Trainer, steps: float) -> None:
        """Optimisers and schedules of the new parameters, for the steps that are left."""
        strategy, loop = trainer.strategy, trainer.fit_loop.epoch_loop
        if isinstance(strategy, DDPStrategy):
            strategy.model = strategy.lightning_module  # lets go of the old wrapper, whose hooks sit on old parameters
            strategy.configure_ddp()
        limit = loop.max_steps
        try:
            loop.max_steps = -1 if math.isinf(steps) else max(int(steps), 1)
            strategy.setup_optimizers(trainer)
        finally:
            loop.max_steps = limit


def _forget(checkpoint: ModelCheckpoint, trainer: lightning.Trainer) -> None:
    """Drop what a best-k checkpoint callback kept of the preheating phase."""
    if checkpoint.monitor is None or checkpoint.save_top_k < 1:
        return
    for path in checkpoint.best_k_models:
        trainer.strategy.remove_checkpoint(path)
    checkpoint.best_k_models = {}
    checkpoint.best_model_path = checkpoint.kth_best_model_path = ""
    checkpoint.best_model_score = checkpoint.current_score = None
    checkpoint.kth_value = torch.tensor(math.inf if checkpoint.mode == "min" else -math.inf)


# ---- adapters -------------------------------------------------------------------------------------------------------


def linear_names(model: nn.Module) -> list[str]:
    """The names of all linear layers (transformers' Conv1D included), less poolers and output embeddings."""
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and layer is not output and "pooler" not in name.split(".")
    ]


def add_adapters(
    model: nn.Module, targets: str | list[str], rank: int, alpha: float, init: str, dropout: float
) -> nn.Module:
    """Put LoRA layers of peft into ``model``, in place; all else is frozen.

    Raises:
        ValueError: if a target matches no linear layer, naming those there are.
    """
    peft = need_peft()
    names = linear_names(model)
    if targets != "all-linear":
        wanted = [targets] if isinstance(targets, str) else targets
        ends = sorted({name.rsplit(".", 1)[-1] for name in names})
        for target in wanted:
            if not any(name == target or name.endswith("." + target) for name in names):
                raise ValueError(
                    f"target_modules names {target!r}, but the linear layers of this backbone end in "
                    f"{', '.join(ends)}. Name some of these, or 'all-linear'."
                )
        names = [n for n in names if any(n == target or n.endswith("." + target) for target in wanted)]
    layers = dict(model.named_modules())
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=names,
        use_rslora=init == "rslora",
        use_dora=init == "dora",
        init_lora_weights="pissa" if init == "pissa" else True,
        fan_in_fan_out=all(type(layers[name]).__name__ == "Conv1D" for name in names),
    )
    model = peft.inject_adapter_in_model(config, model)
    for name, p in model.named_parameters():
        if ".lora_" in name:  # peft follows the layer's type; steps of 1e-4 would be lost in bfloat16
            p.data = p.data.float()
    return model


# ---- the method -------------------------------------------------------------------------------------------------


class HRP(ZooModule):
    """Fine-tunes a transformer by LoRA from the directions that high-rank preheating finds (arXiv:2502.07739).

    Takes texts. For ``task="classification"`` `forward` gives logits over ``num_classes`` and `predict` probabilities;
    for ``task="causal-lm"`` logits over tokens and nats a token. A batch is ``{"text": list[str], "label": (b,)}``, or
    ``"input_ids"`` and ``"attention_mask"`` in place of ``"text"``. During ``fit`` an `HRPCallback` preheats.

    With a Hub id or a folder as ``backbone`` a checkpoint holds the adapters and the classifier only (for
    ``init="pissa"`` and ``keep_b`` also the adapted layers' weights, which these change) and the tokenizer; with a
    config all weights.

    Args:
        backbone: Hub id or local folder of a transformers model, or a config dict with ``model_type``.
        backbone_revision: commit, tag or branch of a Hub id.
        backbone_dtype: "float32" or "bfloat16"; adapters and classifier are float32 in either.
        task: "classification" or "causal-lm".
        num_classes: c.
        classes: names of the classes, for predictions; None: those of the data that it is fitted to, else numbers.
            Names of another count than ``num_classes`` are dropped.
        tokenizer: None is the backbone's own (Hub id, folder) or hashing (config); "hash", a Hub id or a folder.
        max_length: tokens a text is cut to.
        pooling: of the last hidden states: "mean" over tokens, "first", "last", or "auto" (decoders last, others mean).
        init: "hrp", or a baseline: "lora", "rslora" (scale alpha / sqrt(r)), "pissa", "dora".
        rank: r.
        alpha: the adapter is scaled by s = alpha / r.
        rank_pre: R, the rank of preheating.
        preheat_steps: K, optimiser steps of preheating; they count as steps of the run.
        preheat_scale: of the adapter during preheating, see `expand`: "rank" (alpha / R), "root" or "same" (alpha / r).
        asymmetric: train B only, the A that it starts from stays (the setting of the paper's theory).
        keep_b: ablation, see `swap`.
        target_modules: "all-linear" (the backbone's linear layers), or ends of layer names, e.g. ["q", "v"].
        dropout: on the adapters' inputs.
        lr: AdamW's learning rate after warm-up.
        warmup: share of the main steps with rising learning rate; then it falls linearly to zero.
        weight_decay: of AdamW.
    Shapes:
        input_ids, attention_mask: (b, t) int64
        forward: (b, c) float32, or (b, t, vocabulary) for a language model
    Raises:
        ValueError: for an unknown ``init``, ``task`` or target, r > R, K < 1, R above a layer's smaller side.
        ZooError: if peft is missing, or the backbone does not load or is quantised.
    Example:
        >>> model = HRP.from_variant("tiny")
        >>> model.predict(["a fine film", "not my cup of tea"]).shape
        torch.Size([2, 4])
    """

    variants = {
        "tiny": {
            "backbone": {
                "model_type": "bert",
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 64,
                "vocab_size": 512,
                "max_position_embeddings": 64,
            },
            "num_classes": 4,
            "max_length": 32,
            "rank": 2,
            "rank_pre": 8,
            "preheat_steps": 1,
        }
    }
    monitor, mode = "val/accuracy", "max"
    head = ("classifier",)

    def __init__(
        self,
        backbone: str | dict[str, Any] = "google-t5/t5-base",
        backbone_revision: str | None = None,
        backbone_dtype: str = "float32",
        task: str = "classification",
        num_classes: int = 2,
        classes: list[str] | None = None,
        tokenizer: str | None = None,
        max_length: int = 128,
        pooling: str = "auto",
        init: str = "hrp",
        rank: int = 8,
        alpha: float = 16.0,
        rank_pre: int = 128,
        preheat_steps: int = 100,
        preheat_scale: str = "rank",
        asymmetric: bool = False,
        keep_b: bool = False,
        target_modules: str | list[str] = "all-linear",
        dropout: float = 0.0,
        lr: float = 2e-4,
        warmup: float = 0.03,
        weight_decay: float = 0.0,
    ):
        super().__init__()
        for name, value, known in (
            ("init", init, INITS),
            ("task", task, ("classification", "causal-lm")),
            ("pooling", pooling, POOLINGS),
            ("preheat_scale", preheat_scale, SCALES),
            ("backbone_dtype", backbone_dtype, ("float32", "bfloat16")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}.")
        if rank < 1 or num_classes < 2 or max_length < 2:
            raise ValueError(
                f"rank is {rank} (1 or more), num_classes {num_classes} and max_length {max_length} (each 2 or more)."
            )
        if init == "hrp" and preheat_steps < 1:
            raise ValueError(
                f"preheat_steps is {preheat_steps}: without preheating there are no directions. "
                "Use 1 or more, or init='lora'."
            )
        if classes is not None and len(classes) != num_classes:  # from_pretrained(repo, num_classes=7): another task
            log.warning("HRP: %d names of classes for %d classes are dropped.", len(classes), num_classes)
            classes = self.hyperparameters["classes"] = None
        self.save_hyperparameters()
        need_peft()
        self.backbone = build_backbone(backbone, backbone_revision, task, backbone_dtype)
        add_adapters(self.backbone, target_modules, rank, alpha, init, dropout)
        if init == "hrp":
            check_layers(lora_layers(self.backbone), rank_pre)
        if asymmetric:
            for layer in lora_layers(self.backbone).values():
                layer.lora_A.requires_grad_(False)
        config = self.backbone.config
        self.tokenizer = self._tokenizer(tokenizer, backbone, backbone_revision, config)
        if task == "classification":
            self.classifier = nn.Linear(config.hidden_size, num_classes)
            decoder = type(config).__name__ in _decoder_configs()
            self.pooling = ("last" if decoder else "mean") if pooling == "auto" else pooling
            for stage in ("val", "test"):
                setattr(self, f"{stage}_accuracy", MulticlassAccuracy(num_classes, average="micro"))
                setattr(self, f"{stage}_mcc", MulticlassMatthewsCorrCoef(num_classes))
        else:
            self.monitor, self.mode = "val/loss", "min"

    @classmethod
    def from_backbone(cls, module: nn.Module, tokenizer: Any = None, **hparams: Any) -> Self:
        """Take a live transformers model (its weights are copied and saved with ours) and, optionally, its tokenizer.

        Args:
            module: an encoder or decoder without head, or a causal language model for ``task="causal-lm"``.
            tokenizer: a transformers tokenizer; it is saved with the checkpoint. None hashes words.
            hparams: hyperparameters of `HRP` other than ``backbone``.
        """
        model = cls(backbone=config_of(module), **hparams)
        take_weights(model.backbone, module)
        if model.hparams.init in ("pissa", "dora"):  # both start from the weights that have only now come
            for layer in lora_layers(model.backbone).values():
                config_ = model.backbone.peft_config[adapter_of(layer)]
                layer.update_layer(adapter_of(layer), r=config_.r, lora_alpha=config_.lora_alpha, config=config_)
        if tokenizer is not None:
            model.tokenizer = _with_padding(tokenizer)
        return model

    @staticmethod
    def _tokenizer(name: str | None, backbone: str | dict[str, Any], revision: str | None, config: Any) -> Any:
        if name == "hash" or (name is None and isinstance(backbone, dict)):
            return HashTokenizer(config.vocab_size)
        from transformers import AutoTokenizer

        where, pinned = (backbone, revision) if name is None else (name, None)
        try:
            return _with_padding(AutoTokenizer.from_pretrained(where, revision=pinned))
        except (OSError, ValueError, KeyError) as error:
            raise ZooError(
                f"No tokenizer in {where!r} ({first_line(error)}). Pass tokenizer='hash', a Hub id or a folder."
            ) from error

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def saved_state_dict(self) -> dict[str, Tensor]:
        state = self.state_dict()
        if not isinstance(self.hyperparameters["backbone"], str):
            return state
        changed = self.hparams.init == "pissa" or self.hparams.keep_b
        adapted = tuple(f"backbone.{name}.base_layer.weight" for name in lora_layers(self.backbone)) if changed else ()
        return {k: v for k, v in state.items() if not k.startswith("backbone.") or ".lora_" in k or k in adapted}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        match_ranks(self, state_dict, self.hparams.rank_pre, self.hparams.preheat_scale)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def save_extra(self, folder: Path) -> None:
        """The tokenizer travels with the checkpoint (hashing needs no file)."""
        if not isinstance(self.tokenizer, HashTokenizer):
            self.tokenizer.save_pretrained(folder / "tokenizer")

    @staticmethod
    def load_extra(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
        """Point ``tokenizer`` at the one saved with the checkpoint."""
        saved = folder / "tokenizer"
        return {**values, "tokenizer": str(saved)} if saved.is_dir() else values

    def reset_adapters(self) -> Self:
        """Start the adapters over (A random, B zero), so that the next ``fit`` preheats again.

        Raises:
            ZooError: where the backbone's own weights were changed (``init="pissa"``, ``keep_b``).
        """
        if self.hparams.init == "pissa" or self.hparams.keep_b:
            raise ZooError(
                "reset_adapters: with init='pissa' or keep_b the backbone's weights were changed; build anew."
            )
        for layer in lora_layers(self.backbone).values():
            layer.reset_lora_parameters(adapter_of(layer), True)
        return self

    # ---- forward ------------------------------------------------------------------------------------------------

    def encode(self, texts: str | list[str]) -> tuple[Tensor, Tensor]:
        """Texts as ``input_ids`` and ``attention_mask``, (b, t) int64, padded on the right, on the module's device.

        Raises:
            TypeError: if ``texts`` is not a string or a list of strings.
            ValueError: for an empty list.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(
                f"HRP takes strings, not {type(next(t for t in texts if not isinstance(t, str))).__name__}."
            )
        if not texts:
            raise ValueError("HRP got an empty list of texts. Give at least one.")
        out = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.hparams.max_length, return_tensors="pt"
        )
        ids, mask = out["input_ids"].long(), out["attention_mask"].long()
        if ids.shape[1] == 0:  # only texts without a token
            ids = ids.new_full((len(texts), 1), self.tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
        mask[:, 0] = 1  # a text without tokens still has one place to attend to
        return ids.to(self.device), mask.to(self.device)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits: (b, c), or (b, t, vocabulary) for a language model."""
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; expected (batch, tokens), neither empty.")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        # transformers' masks look at their values, which meta tensors lack; there only shapes are asked for
        out = self.backbone(input_ids=input_ids, attention_mask=None if input_ids.is_meta else mask)
        if self.hparams.task == "causal-lm":
            return out.logits.float()
        hidden = out.last_hidden_state.float()  # (b, t, n)
        if self.pooling == "mean":
            weight = mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
        elif self.pooling == "first":
            pooled = hidden[:, 0]
        else:
            last = (mask.sum(1) - 1).clamp(min=0)
            pooled = hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[-1])).squeeze(1)
        return self.classifier(pooled)

    def loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Cross entropy, (), and the logits: of the classes, or of each next token.

        Raises:
            ValueError: if a label is not in [0, num_classes).
        """
        ids, mask = self._inputs(batch)
        logits = self(ids, mask)
        if self.hparams.task == "causal-lm":
            return token_nats(logits, ids, mask).sum() / mask[:, 1:].sum().clamp(min=1), logits
        label = batch["label"]
        if label.device.type == "cpu" and int(label.max()) >= self.hparams.num_classes:
            raise ValueError(
                f"A label is {int(label.max())}, but num_classes is {self.hparams.num_classes} (labels 0 to "
                f"{self.hparams.num_classes - 1}). Pass num_classes={int(label.max()) + 1} or more."
            )
        return F.cross_entropy(logits, label), logits

    def _inputs(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        if "input_ids" in batch:
            ids = batch["input_ids"]
            return ids, batch.get("attention_mask", torch.ones_like(ids))
        if "text" not in batch:
            raise KeyError(f"A batch needs 'text' (or 'input_ids' and 'attention_mask'); it has {', '.join(batch)}.")
        return self.encode(batch["text"])

    # ---- steps --------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[lightning.Callback]:
        if self.hparams.init != "hrp":
            return []
        hp = self.hparams
        return [HRPCallback(hp.rank_pre, hp.preheat_steps, hp.keep_b, hp.preheat_scale)]

    def setup(self, stage: str) -> None:
        """Hold the data's classes against ours, before the first step."""
        data = getattr(self.trainer, "datamodule", None)
        if data is None or stage == "predict" or self.hparams.task == "causal-lm" or not hasattr(data, "classes"):
            return
        names = data.describe()["classes"] if hasattr(data, "describe") else data.classes
        have = self.hparams.num_classes
        if len(names) > have:
            raise ValueError(
                f"The data has {len(names)} classes ({', '.join(names[:6])}{', ...' if len(names) > 6 else ''}), the "
                f"model num_classes={have}. Build it, or load it by from_pretrained, with num_classes={len(names)}."
            )
        if names and len(names) < have:
            log.warning(
                "HRP: num_classes is %d, the data has %d classes; the rest will not be learned.", have, len(names)
            )
        elif stage == "fit" and names and self.hparams.classes is None:  # the names travel with the checkpoint
            self.hparams.classes = self.hyperparameters["classes"] = list(names)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        loss, _ = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=_size(batch))
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._score(batch, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._score(batch, "test")

    def _score(self, batch: Mapping[str, Any], stage: str) -> None:
        loss, logits = self.loss(batch)
        if self.hparams.task == "causal-lm":
            _, mask = self._inputs(batch)
            self.log(f"{stage}/loss", loss, prog_bar=True, batch_size=max(int(mask[:, 1:].sum()), 1))
            return
        self.log(f"{stage}/loss", loss, batch_size=_size(batch))
        for name in ("accuracy", "mcc"):
            metric = getattr(self, f"{stage}_{name}")
            metric(logits, batch["label"])
            self.log(f"{stage}/{name}", metric, prog_bar=name == "accuracy", batch_size=_size(batch))

    def example_inputs(self) -> tuple[Any, ...]:
        """Two texts as token ids and mask, for export."""
        return self.encode(["two words", "and a longer text"])

    def predict(  # type: ignore[override]
        self, text: str | list[str] | Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Class probabilities (b, c) of texts (or of token ids), or nats a token (b,) for a language model.

        Many texts go through in pieces of 64.
        """
        if isinstance(text, Tensor):
            pieces = [(text, torch.ones_like(text) if attention_mask is None else attention_mask)]
        else:
            texts = [text] if isinstance(text, str) else list(text)
            pieces = [self.encode(texts[i : i + 64]) for i in range(0, max(len(texts), 1), 64)]
        results = []
        for ids, mask in pieces:
            logits = super().predict(ids, mask.to(self.device))
            if self.hparams.task == "causal-lm":
                counts = mask[:, 1:].sum(1).clamp(min=1)
                nats = token_nats(logits, ids.to(self.device), mask.to(self.device)).sum(1)
                results.append(nats / counts.to(self.device))
            else:
                results.append(logits.softmax(-1))
        return torch.cat(results)

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        """``name``, ``text``, ``probabilities`` (b, c), the best ``label`` (b,), its name ``class`` (list[str]) and its
        ``probability`` (b,); for a language model ``nats_per_token`` (b,)."""
        ids, mask = self._inputs(batch)
        scores = self.predict(ids, mask)
        texts = list(batch["text"]) if "text" in batch else [""] * len(ids)
        result: dict[str, Any] = {"name": list(batch.get("name", [str(i) for i in range(len(ids))])), "text": texts}
        if self.hparams.task == "causal-lm":
            return {**result, "nats_per_token": scores}
        probability, label = scores.max(-1)
        names = self.hparams.classes or [str(k) for k in range(self.hparams.num_classes)]
        classes = [] if label.is_meta else [names[k] for k in label.tolist()]
        return {**result, "probabilities": scores, "label": label, "class": classes, "probability": probability}

    def configure_optimizers(self) -> Any:
        """AdamW; the learning rate rises over the first ``warmup`` of the steps and falls linearly to zero."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.hparams.lr, weight_decay=self.hparams.weight_decay)
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            return optimizer
        rise = max(round(self.hparams.warmup * steps), 1)

        def factor(step: int) -> float:
            return (step + 1) / rise if step < rise else max(steps - step, 0) / max(steps - rise, 1)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def token_nats(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """-log p(token | those before it), zero at padding: (b, t, vocabulary), (b, t), (b, t) -> (b, t - 1)."""
    nats = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return nats * mask[:, 1:]


def _size(batch: Mapping[str, Any]) -> int:
    return len(batch["text"] if "text" in batch else batch["input_ids"])


def _with_padding(tokenizer: Any) -> Any:
    """Decoders' tokenizers often name no padding token and pad on the left."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _decoder_configs() -> set[str]:
    """Names of the configs that transformers has a causal language model for, and no masked one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    masked = {config.__name__ for config in MODEL_FOR_MASKED_LM_MAPPING}
    return {config.__name__ for config in MODEL_FOR_CAUSAL_LM_MAPPING} - masked


# ---- the theory's own setting: matrix sensing -------------------------------------------------------------------


class MatrixSensing(ZooModule):
    """LoRA on one linear layer under the population loss, where everything is known (the setting of the theory).

        L(A, B) = 0.5 ||B A^T - M||_F^2,   M = sum_k 2^-k u_k v_k^T (k = 0..15, n = 64),   gradient descent

    One training step is the whole run, in three settings: B alone trained for ``steps`` (asymmetric), both factors for
    ``short`` steps, both for ``steps``. Preheating steps are taken off these. `test_step` logs the excess of
    ||B A^T - M||^2 over the best rank-r approximation: "test/asymmetric", "test/classic_short", "test/classic".

    Args:
        init: of A: "random", "hrp" or "oracle" (the top right singular vectors of M).
        size: n.
        terms: singular values of M that are not zero.
        rank: r.
        rank_pre: R.
        preheat_steps: K.
        lr: step size.
        steps: of the long runs.
        short: of the short run.
    """

    def __init__(
        self,
        init: str = "hrp",
        size: int = 64,
        terms: int = 16,
        rank: int = 4,
        rank_pre: int = 64,
        preheat_steps: int = 20,
        lr: float = 0.1,
        steps: int = 1500,
        short: int = 100,
    ):
        super().__init__()
        if init not in ("random", "hrp", "oracle"):
            raise ValueError(f"init is {init!r}; it must be 'random', 'hrp' or 'oracle'.")
        if not rank <= rank_pre <= size or not rank <= terms <= size or preheat_steps < 1 or short <= preheat_steps:
            raise ValueError("MatrixSensing needs rank <= rank_pre <= size, rank <= terms <= size and 1 <= K < short.")
        self.save_hyperparameters()
        self.automatic_optimization = False
        u, v = (torch.linalg.qr(torch.randn(size, terms))[0] for _ in range(2))
        self.register_buffer("singular", 2.0 ** -torch.arange(terms, dtype=torch.float32))
        self.register_buffer("target", u * self.singular @ v.mT)
        self.register_buffer("oracle", v[:, :rank].clone())
        for name in ("asymmetric", "classic_short", "classic"):
            self.register_buffer(name, torch.zeros(size, size))  # what B A^T ended as

    def forward(self, name: str = "classic") -> Tensor:
        """B A^T of a setting, (n, n)."""
        return getattr(self, name)

    def descend(self, a: Tensor, b: Tensor, steps: int, asymmetric: bool) -> tuple[Tensor, Tensor]:
        """Gradient descent on L: a (n, r), b (n, r)."""
        for _ in range(steps):
            rest = b @ a.mT - self.target
            a, b = a if asymmetric else a - self.hparams.lr * rest.mT @ b, b - self.hparams.lr * rest @ a
        return a, b

    def start(self, asymmetric: bool) -> tuple[Tensor, int]:
        """A at the start, of norm sqrt(r), and the steps that finding it took."""
        hp, n = self.hparams, len(self.target)
        if hp.init == "oracle":
            return self.oracle, 0
        a = torch.randn(n, hp.rank_pre if hp.init == "hrp" else hp.rank, device=self.device) / math.sqrt(n)
        used = 0
        if hp.init == "hrp":
            a, b = self.descend(a, torch.zeros_like(a), hp.preheat_steps, asymmetric)
            a, used = truncated_svd(a.mT, b, hp.rank)[2], hp.preheat_steps
        return a * (math.sqrt(hp.rank) / a.norm()), used

    @torch.no_grad()
    def training_step(self, batch: Any, batch_idx: int) -> None:
        long, short = self.hparams.steps, self.hparams.short
        for name, steps in (("asymmetric", long), ("classic_short", short), ("classic", long)):
            a, used = self.start(name == "asymmetric")
            a, b = self.descend(a, torch.zeros_like(a), steps - used, name == "asymmetric")
            getattr(self, name).copy_(b @ a.mT)

    def excess(self, name: str) -> Tensor:
        """||B A^T - M||_F^2 less that of the best approximation of rank r, ()."""
        return (getattr(self, name) - self.target).square().sum() - self.singular[self.hparams.rank :].square().sum()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        for name in ("asymmetric", "classic_short", "classic"):
            self.log(f"test/{name}", self.excess(name), batch_size=1)

    def configure_optimizers(self) -> None:
        return None


# ---- backbones for the proofs -----------------------------------------------------------------------------------


def pretrain_toy(
    folder: Path, seed: int, width: int = 64, depth: int = 2, steps: int = 400, batch: int = 64, lr: float = 2e-3
) -> None:
    """Pretrain a small BERT on the generated language's dialect "home" and save it as a folder.

    Fine-tuning then goes to the dialect "away" of the same language.
    """
    from transformers import BertConfig, BertModel

    from zoo.language.finetuning.data_lora import ToyLanguage

    torch.manual_seed(seed)
    language, tokenize = ToyLanguage(seed), HashTokenizer(4096)
    config = BertConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=4, intermediate_size=2 * width,
        vocab_size=tokenize.size, max_position_embeddings=64,
    )  # fmt: skip
    model, classifier = BertModel(config, add_pooling_layer=False), nn.Linear(width, language.topics)
    texts, labels = language.texts("home", 8192, seed)
    optimizer = torch.optim.AdamW([*model.parameters(), *classifier.parameters()], lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        index = torch.randint(len(texts), (batch,)).tolist()
        inputs = tokenize([texts[i] for i in index])
        weight = inputs["attention_mask"].unsqueeze(-1)
        hidden = (model(**inputs).last_hidden_state * weight).sum(1) / weight.sum(1)
        loss = F.cross_entropy(classifier(hidden), torch.tensor([labels[i] for i in index]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            log.info("pretraining step %d: loss %.3f", step, float(loss.detach()))
    model.save_pretrained(folder)


def pretrain_masked(
    folder: Path,
    seed: int,
    root: str,
    width: int = 128,
    depth: int = 2,
    steps: int = 1500,
    batch: int = 64,
    lr: float = 1e-3,
) -> None:
    """Pretrain a small BERT by masked words on the training texts under ``root``, without their labels.

    Model and tokenizer are saved as a folder.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    from zoo.language.finetuning.data_lora import LoRAFinetuneDataModule

    torch.manual_seed(seed)
    data = LoRAFinetuneDataModule(root, seed=seed)
    found: Any = data.dataset("train")
    counts: dict[str, int] = {}
    for word in (w for text in found.texts for w in text.lower().split()):
        counts[word] = counts.get(word, 0) + 1
    words = ["[PAD]", "[UNK]", "[MASK]", *sorted(w for w, n in counts.items() if n > 1)]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    )
    config = BertConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=4, intermediate_size=4 * width,
        vocab_size=len(words), max_position_embeddings=64,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        texts = [found.texts[i] for i in torch.randint(len(found), (batch,)).tolist()]
        out = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        ids, mask = out["input_ids"], out["attention_mask"]
        hidden = (torch.rand(ids.shape) < 0.15) & mask.bool()
        inputs = ids.masked_fill(hidden & (torch.rand(ids.shape) < 0.9), tokenizer.mask_token_id)
        # logits of the hidden words only: the vocabulary is most of the cost
        states = model.bert(inputs, attention_mask=mask).last_hidden_state[hidden]
        loss = F.cross_entropy(model.cls(states), ids[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 300 == 0 or step == steps - 1:
            log.info("pretraining step %d: loss %.3f", step, float(loss.detach()))
    model.bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
