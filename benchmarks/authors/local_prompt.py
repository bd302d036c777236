"""LocalPrompt beside its authors' code: features, losses, optimiser steps, scores and metrics; speed; recorded tensors.

The authors' trainer runs as it is, on stubs of what it imports and this comparison does not need: Dassl's trainer (a
plain object), einops.repeat (the patterns in use), ftfy. Where there is no CUDA its `.cuda()` calls do nothing, and its
automatic mixed precision is off.
"""

import contextlib
import copy
import importlib
import math
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import in_turns
from zoo.vision.prompt.local_prompt import EmbeddedTokenizer, LocalPrompt

NAMES = ["red square", "green circle", "blue triangle", "yellow cross", "purple diamond", "cyan ring"]
TINY = {
    "width": 32, "heads": 2, "layers": 2, "image": 24, "patch": 6, "projection": 16, "positions": 24, "vocab": 80,
    "context": 4, "negatives": 5, "regions": 4, "score_regions": 3, "views": 6, "positives": 3, "batch": 4,
    "classes": 4,
}  # fmt: skip
MODERATE = {
    "width": 256, "heads": 4, "layers": 4, "image": 112, "patch": 16, "projection": 128, "positions": 77, "vocab": 512,
    "context": 16, "negatives": 30, "regions": 20, "score_regions": 10, "views": 16, "positives": 8, "batch": 8,
    "classes": 6,
}  # fmt: skip


def _repeat(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """einops.repeat for patterns that add axes or widen axes of length one."""
    left, right = (side.split() for side in pattern.split("->"))
    order = [name for name in right if name in left and name != "1"]
    if "1" in left:  # 'b k 1 -> b k n': the last axis of length one is widened
        x, left = x.squeeze(left.index("1")), [name for name in left if name != "1"]
    x = x.permute([left.index(name) for name in order])
    shape = []
    for axis, name in enumerate(right):
        if name not in left:
            x = x.unsqueeze(axis)
            shape.append(1 if name == "1" else sizes[name])
        else:
            shape.append(x.shape[axis])
    return x.expand(shape)


@contextlib.contextmanager
def _as_on_cpu() -> Iterator[None]:
    """`.cuda()` that does nothing, where there is none."""
    if torch.cuda.is_available():
        yield
        return
    kept = nn.Module.cuda, Tensor.cuda
    nn.Module.cuda = Tensor.cuda = lambda self, *a, **k: self  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.cuda, Tensor.cuda = kept  # type: ignore[method-assign]


def authors_modules(checkout: Path) -> tuple[Any, Any, Any]:
    """The authors' trainer, CLIP and metrics modules."""

    def stub(name: str, **content: Any) -> None:
        module = types.ModuleType(name)
        module.__dict__.update(content)
        sys.modules.setdefault(name, module)

    registry = SimpleNamespace(register=lambda: lambda cls: cls)
    stub("ftfy", fix_text=lambda text: text)
    stub("einops", repeat=_repeat)
    stub("dassl")
    stub("dassl.engine", TRAINER_REGISTRY=registry, TrainerX=object)
    stub("dassl.utils", load_pretrained_weights=None, load_checkpoint=None)
    stub("dassl.optim", build_optimizer=None, build_lr_scheduler=None)
    sys.path.insert(0, str(checkout))
    blocking = os.environ.get("CUDA_LAUNCH_BLOCKING")
    try:
        with _as_on_cpu():
            names = ("trainers.localprompt", "clip_w_local.model", "utils.detection_util")
            return tuple(importlib.import_module(name) for name in names)  # type: ignore[return-value]
    finally:
        sys.path.remove(str(checkout))
        os.environ.pop("CUDA_LAUNCH_BLOCKING", None)  # their module sets it: it would slow everything after it
        if blocking is not None:
            os.environ["CUDA_LAUNCH_BLOCKING"] = blocking


def _config(size: dict[str, int]) -> dict[str, Any]:
    """Our hyperparameters of a size."""
    part = {
        "hidden_size": size["width"], "intermediate_size": 4 * size["width"], "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
    }  # fmt: skip
    ids = {"pad_token_id": 0, "bos_token_id": size["vocab"] - 2, "eos_token_id": size["vocab"] - 1}
    return {
        "classes": NAMES[: size["classes"]],
        "backbone": {
            "text_config": {
                **part, "vocab_size": size["vocab"], "max_position_embeddings": size["positions"], **ids
            },
            "vision_config": {**part, "image_size": size["image"], "patch_size": size["patch"]},
            "projection_dim": size["projection"],
        },
        **{name: size[name] for name in ("context", "negatives", "regions", "score_regions", "positives")},
    }  # fmt: skip


class _Evaluator:
    """Keeps what the authors' test loop hands in."""

    def reset(self) -> None:
        self.outputs: list[Tensor] = []

    def process(self, output: Tensor, label: Tensor) -> None:
        self.outputs.append(output.clone())

    def evaluate(self) -> dict[str, float]:
        return {"accuracy": 0.0}


def authors_trainer(checkout: Path, size: dict[str, int], device: str = "cpu") -> Any:
    """Their trainer around their CLIP of random weights, with class names through the embedded tokenizer."""
    trainers, clips, _ = authors_modules(checkout)
    torch.manual_seed(0)
    clip = clips.CLIP(
        size["projection"], size["image"], size["layers"], 64 * size["heads"], size["patch"], size["positions"],
        size["vocab"], size["width"], size["heads"], size["layers"],
    )  # fmt: skip
    # their CLIP fixes 64 values a head; smaller ones keep the recorded tensors small
    clip.visual = clips.VisionTransformer(
        size["image"], size["patch"], size["width"], size["layers"], size["heads"], size["projection"]
    )
    with torch.no_grad():  # biases start at zero and norms at one: as after training, they should not
        for name, p in clip.named_parameters():
            if name.endswith("bias") or "ln_" in name:
                p.add_(0.1 * torch.randn_like(p))
    tokenizer = EmbeddedTokenizer(size["vocab"])

    def tokenize(text: str) -> Tensor:
        words = text.split()
        # their prompts spell the context as X, one token each, which is then replaced
        marks = [1] * sum(word == "X" for word in words)
        rest = tokenizer.encode(" ".join(word for word in words if word != "X"))
        ids = [tokenizer.bos, *marks, *rest, tokenizer.eos]
        return torch.tensor([ids + [0] * (size["positions"] - len(ids))])

    trainers.clip.tokenize = tokenize
    own = SimpleNamespace(N_CTX=size["context"], CTX_INIT="", CSC=True, CLASS_TOKEN_POSITION="end", PREC="amp")
    cfg = SimpleNamespace(
        num_neg_prompts=size["negatives"], num_pos=size["positives"], lambda_value=5.0, div_value=0.5,
        TRAINER=SimpleNamespace(LOCALPROMPT=own), INPUT=SimpleNamespace(SIZE=(size["image"], size["image"])),
        TEST=SimpleNamespace(SPLIT="test"),
    )  # fmt: skip
    with _as_on_cpu(), contextlib.redirect_stdout(None):
        model = trainers.CustomCLIP(cfg, NAMES[: size["classes"]], clip.eval().to(device))
    for name, p in model.named_parameters():
        p.requires_grad_("prompt_learner" in name)
    model.to(device)
    for attribute in ("global_embedding",):
        setattr(model.prompt_learner, attribute, getattr(model.prompt_learner, attribute).to(device))
    for prefix in ("global", "local", "neg"):
        setattr(model, f"{prefix}_tokenized_prompts", getattr(model, f"{prefix}_tokenized_prompts").to(device))
    trainer = trainers.LOCALPROMPT()
    trainer.model, trainer.cfg, trainer.top_k, trainer.T = model, cfg, size["regions"], 1
    trainer.optim = torch.optim.SGD(model.prompt_learner.parameters(), lr=0.002, momentum=0.9, weight_decay=5e-4)
    trainer.scaler = torch.amp.GradScaler(device, enabled=False)
    trainer.device, trainer.batch_idx, trainer.num_batches, trainer.epoch = device, 0, 2, 0
    trainer.evaluator, trainer.model_inference = _Evaluator(), lambda images: model(images)
    trainer.set_model_mode = lambda mode: model.train(mode == "train")
    trainer.write_scalar = lambda *a: None
    trainer.parse_batch_test = lambda batch: batch
    trainer.clip = clip
    return trainer


def to_ours(trainer: Any, size: dict[str, int]) -> LocalPrompt:
    """Our module with the weights of their CLIP and prompts."""
    state: dict[str, Tensor] = {}
    theirs = trainer.clip.state_dict()
    width = size["width"]
    for ours, stem in (("vision_model", "visual.transformer"), ("text_model", "transformer")):
        for i in range(size["layers"]):
            a, b = f"{stem}.resblocks.{i}.", f"{ours}.encoder.layers.{i}."
            for kind in ("weight", "bias"):
                joined = theirs[f"{a}attn.in_proj_{kind}"]
                for j, name in enumerate(("q_proj", "k_proj", "v_proj")):
                    state[f"{b}self_attn.{name}.{kind}"] = joined[j * width : (j + 1) * width]
                for x, y in (
                    ("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                    ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
                ):  # fmt: skip
                    state[f"{b}{y}.{kind}"] = theirs[f"{a}{x}.{kind}"]
    for kind in ("weight", "bias"):
        state[f"vision_model.pre_layrnorm.{kind}"] = theirs[f"visual.ln_pre.{kind}"]
        state[f"vision_model.post_layernorm.{kind}"] = theirs[f"visual.ln_post.{kind}"]
        state[f"text_model.final_layer_norm.{kind}"] = theirs[f"ln_final.{kind}"]
    state |= {
        "vision_model.embeddings.class_embedding": theirs["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": theirs["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": theirs["visual.positional_embedding"],
        "visual_projection.weight": theirs["visual.proj"].t(),
        "text_model.embeddings.token_embedding.weight": theirs["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": theirs["positional_embedding"],
        "text_projection.weight": theirs["text_projection"].t(),
        "logit_scale": theirs["logit_scale"],
    }
    ours = LocalPrompt(**_config(size))
    ours.backbone.model.load_state_dict(state)
    learner = trainer.model.prompt_learner.state_dict()
    hyper, prompts = LocalPrompt.convert_state_dict({"state_dict": learner, "epoch": 30})
    assert hyper["negatives"] == size["negatives"] and hyper["context"] == size["context"]
    with torch.no_grad():
        ours.prompts.local.copy_(prompts["prompts.local"])
        ours.prompts.negative.copy_(prompts["prompts.negative"])
    return ours.to(trainer.device)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()


def _inputs(size: dict[str, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    views = torch.rand(size["batch"], size["views"], 3, size["image"], size["image"], generator=generator)
    return views, torch.arange(size["batch"]) % size["classes"]


def _batch(ours: LocalPrompt, views: Tensor, label: Tensor) -> dict[str, Tensor]:
    """A batch of the authors' trainer: normalised images under img1, img2, ..."""
    return {**{f"img{i + 1}": ours.preprocess(views[:, i]) for i in range(views.shape[1])}, "label": label}


def _theirs(trainer: Any, ours: LocalPrompt, views: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Everything their code says about a batch before any step: features, losses, gradients, scores."""
    images, label = trainer.parse_batch_train(_batch(ours, views, label))
    model, p = trainer.model, trainer.cfg.num_pos
    model.eval()
    g, local = model.image_encoder(images[0])
    with _as_on_cpu(), torch.no_grad(), contextlib.redirect_stdout(None):
        texts = model.prompt_learner()
        features = [
            model.text_encoder(text, getattr(model, f"{name}_tokenized_prompts"))
            for text, name in zip(texts, ("global", "local", "neg"), strict=True)
        ]
        trainer.test_loader = [(images[0], label)]
        importlib.import_module("trainers.localprompt").tqdm = lambda loader: loader  # no progress bars
        trainer.val_loader, trainer.top_k = None, trainer.score_regions
        # The released CLIP's: their scores divide by a fixed 100. With it the losses of a random CLIP, whose cosines
        # differ more, overflow in their code, so that training here keeps the initial 1 / 0.07.
        kept = model.logit_scale.clone()
        model.logit_scale.fill_(math.log(100))
        trainer.test()
        scores = trainer.evaluator.outputs[0]
        mcm, score = trainer.test_ood(_Loader(images[0], label), trainer.score_regions, 1)
        trainer.top_k = trainer.regions
        model.logit_scale.copy_(kept)
    out = {
        "global": g, "local": local, "text_global": features[0], "text_local": features[1],
        "text_negative": features[2], "class_score": scores, "mcm": -torch.from_numpy(mcm),
        "score": -torch.from_numpy(score),
    }  # fmt: skip
    model.train()
    similarity, features_g, features_l = model.multi_loader_select(images, label)
    best = torch.topk(similarity, k=p, dim=0)[1]
    worst = torch.topk(similarity, k=p, largest=False, dim=0)[1]
    x_pp, x_np, x_pn, x_nn, diversity = model(images, features_g, features_l, best[0:1], worst[0:1])
    positive = trainer.calculate_loss_local(x_pp, x_pn, label)
    negative = trainer.calculate_loss_local_neg(x_nn, x_np, label)
    total = positive + 5.0 * negative + 0.5 * diversity
    gradients = torch.autograd.grad(total, [model.prompt_learner.local_ctx, model.prompt_learner.neg_ctx])
    return {
        **{name: value.detach() for name, value in out.items()},
        "best": best, "worst": worst[0], "loss_positive": positive.detach(), "loss_negative": negative.detach(),
        "loss_diversity": diversity.detach(), "loss": total.detach(), "gradient_local": gradients[0],
        "gradient_negative": gradients[1],
    }  # fmt: skip


class _Loader(list):
    """One batch, with the ``dataset`` whose length their code asks for."""

    def __init__(self, images: Tensor, label: Tensor):
        super().__init__([(images, label)])
        self.dataset = label


def _pair(checkout: Path, size: dict[str, int], device: str = "cpu") -> tuple[Any, LocalPrompt]:
    trainer = authors_trainer(checkout, size, device)
    trainer.score_regions, trainer.regions = size["score_regions"], size["regions"]
    return trainer, to_ours(trainer, size)


def _steps(trainer: Any, ours: LocalPrompt, views: Tensor, label: Tensor) -> tuple[dict[str, Tensor], ...]:
    """Prompts after one training batch of ours and of theirs: an optimiser step for each positive view."""
    learner = trainer.model.prompt_learner
    trainer.model.train()
    with contextlib.redirect_stdout(None):
        trainer.forward_backward(_batch(ours, views, label))
    _train_batch(ours.train(), _optimizer(ours), views, label)
    return (
        {"local": ours.prompts.local.detach(), "negative": ours.prompts.negative.detach()},
        {"local": learner.local_ctx.detach(), "negative": learner.neg_ctx.detach()},
    )


def _optimizer(ours: LocalPrompt) -> torch.optim.Optimizer:
    return ours.configure_optimizers()


def _train_batch(ours: LocalPrompt, optimizer: torch.optim.Optimizer, views: Tensor, label: Tensor) -> None:
    """`training_step` itself, with the optimiser handed in and without the log."""
    ours._trainer = SimpleNamespace(training=True)  # type: ignore[assignment]
    ours.optimizers = lambda: optimizer  # type: ignore[method-assign,assignment]
    ours.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign,assignment]
    ours.log = ours.log_dict = lambda *a, **k: None  # type: ignore[method-assign,assignment]
    ours.training_step({"views": views, "label": label}, 0)


def compare(checkout: Path) -> dict[str, float]:
    """Largest relative errors in float32, on a tiny CLIP of random weights."""
    trainer, ours = _pair(checkout, TINY)
    views, label = _inputs(TINY)
    theirs = _theirs(trainer, ours, views, label)
    figures = {}
    ours.eval()
    with torch.no_grad():
        g, local = ours.backbone.image(ours.preprocess(views[:, 0]))
        figures["features_global"] = relative(g, theirs["global"])
        figures["features_local"] = relative(local, theirs["local"])
        for name in ("global", "local", "negative"):
            their_text = nn.functional.normalize(theirs[f"text_{name}"], dim=-1)
            figures[f"text_{name}"] = relative(ours.encode_text(name), their_text)
        scores, score = ours(views[:, 0])
        figures["class_score"] = relative(scores, theirs["class_score"])
        figures["score_r_mcm"] = relative(score, theirs["score"])
        ours.hparams.local = False
        figures["score_mcm"] = relative(ours(views[:, 0])[1], theirs["mcm"])
        ours.hparams.local = True
    ours.train()
    positive, negative = ours.select_views(views, label)
    their_views = trainer.model.multi_loader_select(*trainer.parse_batch_train(_batch(ours, views, label)))[2]
    expected = nn.functional.normalize(their_views, dim=-1)
    rows = torch.arange(len(label))
    figures["selected_views"] = max(
        relative(positive, expected[theirs["best"], rows]), relative(negative, expected[theirs["worst"], rows])
    )
    parts = ours.loss(positive[0], negative, label)
    for name in ("positive", "negative", "diversity"):
        figures[f"loss_{name}"] = relative(parts[name], theirs[f"loss_{name}"])
    figures["loss"] = relative(parts["loss"], theirs["loss"])
    gradients = torch.autograd.grad(parts["loss"], [ours.prompts.local, ours.prompts.negative])
    figures["gradient_local"] = relative(gradients[0], theirs["gradient_local"])
    figures["gradient_negative"] = relative(gradients[1], theirs["gradient_negative"])
    before = {"local": ours.prompts.local.detach().clone(), "negative": ours.prompts.negative.detach().clone()}
    after, theirs_after = _steps(trainer, ours, views, label)
    for name in before:  # of the change, not of the prompts, which barely move
        figures[f"steps_{name}"] = relative(after[name] - before[name], theirs_after[name] - before[name])
    figures |= _compare_metrics(checkout)
    return figures


def _compare_metrics(checkout: Path) -> dict[str, float]:
    from zoo.nn.ood_metrics import OODMetrics

    detection = authors_modules(checkout)[2]
    generator = torch.Generator().manual_seed(2)
    known = (torch.rand(237, generator=generator) * 0.5 + 0.3).mul(200).round() / 200  # with ties
    unknown = (torch.rand(151, generator=generator) * 0.6).mul(200).round() / 200
    auroc, aupr, fpr = detection.get_measures(known.numpy(), unknown.numpy())
    metric = OODMetrics()
    metric.update(torch.cat([known, unknown]), torch.cat([torch.zeros(237), torch.ones(151)]).long())
    ours = metric.compute()
    pairs = {"auroc": auroc, "aupr": aupr, "fpr95": fpr}
    return {name: abs(float(ours[name]) - float(value)) / float(value) for name, value in pairs.items()}


def golden(checkout: Path) -> dict[str, Tensor]:
    """Views, labels, our names for the authors' weights, and what their code made of them."""
    trainer, ours = _pair(checkout, TINY)
    views, label = _inputs(TINY)
    views = (views[:3] * 255).round() / 255
    label = label[:3]  # not 2: their test loop takes a batch of two for a pair
    weights = {f"weight.{name}": value for name, value in ours.state_dict().items() if name != "threshold"}
    outputs = {f"authors.{name}": value for name, value in _theirs(trainer, ours, views, label).items()}
    trainer.model.train()
    with contextlib.redirect_stdout(None):
        trainer.forward_backward(_batch(ours, views, label))
    learner = trainer.model.prompt_learner
    steps = {"authors.step_local": learner.local_ctx.detach(), "authors.step_negative": learner.neg_ctx.detach()}
    stored = {"views": (views * 255).to(torch.uint8), "label": label}
    return {k: v.contiguous().clone() for k, v in {**stored, **weights, **outputs, **steps}.items()}


def speed(checkout: Path | None, device: str = "cpu", rounds: int = 3) -> dict[str, dict[str, float]]:
    """A training batch (16 views of 8 images, 8 optimiser steps) and the scoring of 32 images: median ms, peak MiB.

    Four blocks of width 256 on both sides, 77 text positions, 49 regions, 36 prompts. "train_batched" is our single
    step on the mean of the 8 losses, beside the same authors' batch.
    """
    size = MODERATE
    views, label = (x.to(device) for x in _inputs(size))
    images = views.flatten(0, 1)[:32]
    if checkout is None:
        torch.manual_seed(0)
        ours, trainer = LocalPrompt(**_config(size)).to(device), None
    else:
        trainer, ours = _pair(checkout, size, device)
        theirs = _batch(ours, views, label)
        pixels = ours.preprocess(images)
    batched = copy.deepcopy(ours)
    batched.automatic_optimization = True
    optimizers = {id(m): _optimizer(m) for m in (ours, batched)}

    def train(module: LocalPrompt) -> Callable[[], None]:
        def run() -> None:
            module.train()
            if not module.automatic_optimization:
                return _train_batch(module, optimizers[id(module)], views, label)
            positive, negative = module.select_views(views, label)
            optimizers[id(module)].zero_grad()
            module.loss(positive, negative, label)["loss"].backward()
            optimizers[id(module)].step()

        return run

    def authors_train() -> None:
        trainer.model.train()
        with contextlib.redirect_stdout(None):
            trainer.forward_backward(theirs)

    def authors_score() -> None:
        trainer.model.eval()
        importlib.import_module("trainers.localprompt").tqdm = lambda loader: loader
        with _as_on_cpu():
            trainer.test_ood(_Loader(pixels, pixels[:, 0, 0, 0]), size["score_regions"], 1)

    tasks: dict[str, dict[str, Callable[[], Any]]] = {
        "train_step": {"ours": train(ours), "authors": authors_train},
        "train_batched": {"ours": train(batched), "authors": authors_train},
        "score": {"ours": lambda: ours.predict(images), "authors": authors_score},
    }
    figures: dict[str, dict[str, float]] = {}
    for name, runs in tasks.items():
        runs = {who: run for who, run in runs.items() if who == "ours" or trainer is not None}
        figures[name] = in_turns(runs, device, rounds)
    return figures


if __name__ == "__main__":
    root = Path(sys.argv[1])
    print(compare(root))
    if "--speed" in sys.argv:
        print(speed(root, *sys.argv[3:4]))
