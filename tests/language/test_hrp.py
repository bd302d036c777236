"""HRP: the algebra against dense twins, the swap inside one fit, resuming across it, checkpoints, refusals."""

import builtins
import copy
import itertools
import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from zoo.core import Trainer, ZooError
from zoo.language.finetuning.data_lora import LoRAFinetuneDataModule
from zoo.language.finetuning.hrp import (
    HRP,
    HashTokenizer,
    HRPCallback,
    MatrixSensing,
    adapter_of,
    add_adapters,
    compute_budget,
    expand,
    lora_layers,
    match_ranks,
    swap,
    truncated_svd,
)

BERT = HRP.variants["tiny"]["backbone"]
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "gpt2": {
        "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64,
        "bos_token_id": 1, "eos_token_id": 1,
    },
    "llama": {
        "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 128,
    },
    "t5": {
        "model_type": "t5", "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 100,
    },
}  # fmt: skip
NO_DROPOUT = {"attention_probs_dropout_prob": 0.0}
TEXTS = ["a short one", "a text that has quite a few more words than the first one", "three"]


def tiny(**changes: Any) -> HRP:
    torch.manual_seed(0)
    return HRP.from_variant("tiny", **changes)


class Net(nn.Module):
    """Two linear layers, for peft to find by name."""

    def __init__(self, n_in: int = 12, n_out: int = 10):
        super().__init__()
        self.first, self.second = nn.Linear(n_in, n_out), nn.Linear(n_out, n_in)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(rank: int = 2, **sizes: int) -> nn.Module:
    torch.manual_seed(0)
    return add_adapters(Net(**sizes), "all-linear", rank, 16.0, "lora", 0.0)


def fit(model: lightning.LightningModule, folder: Path, steps: int, ckpt: Path | None = None, **more: Any) -> Any:
    callbacks = more.pop("callbacks", [])
    trainer = Trainer(
        default_root_dir=folder, max_steps=steps, accelerator="cpu", seed=0, logger=False, callbacks=callbacks,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **more,
    )  # fmt: skip
    trainer.fit(model, datamodule=LoRAFinetuneDataModule(batch_size=8, train_size=64, seed=0), ckpt_path=ckpt)
    return trainer


class SaveAt(lightning.Callback):
    """Saves ``<step>.ckpt`` after these steps, when all other callbacks are through."""

    def __init__(self, folder: Path, *steps: int):
        self.folder, self.steps = folder, steps

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


# ---- algebra ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_in", "n_out", "high"), [(12, 10, 5), (7, 30, 7), (30, 7, 6), (16, 16, 16)])
def test_qr_svd_equals_dense_svd(n_in: int, n_out: int, high: int) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, high, n_in, dtype=torch.float64), torch.randn(3, n_out, high, dtype=torch.float64)
    u, s, v = truncated_svd(a, b, 3)
    for i in range(3):
        du, ds, dvt = torch.linalg.svd(b[i] @ a[i])
        assert torch.allclose(s[i], ds[:3], atol=1e-10)
        # subspaces by their projections: signs and rotations within are free
        assert torch.allclose(v[i] @ v[i].T, dvt[:3].T @ dvt[:3], atol=1e-10)
        assert torch.allclose(u[i] * s[i] @ v[i].T, du[:, :3] * ds[:3] @ dvt[:3], atol=1e-10)


def test_directions_do_not_depend_on_signs_or_scale() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, 9, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    signs = torch.tensor([1.0, -1, -1, 1], dtype=torch.float64)

    def projection(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        v = truncated_svd(a, b, 2)[2]
        return v @ v.T

    same = projection(a, b)
    assert torch.allclose(projection(signs[:, None] * a, b * signs), same, atol=1e-10)
    assert torch.allclose(projection(3 * a, -b), same, atol=1e-10)


def test_one_step_at_full_rank_gives_the_gradients_directions() -> None:
    """K = 1, R = n, orthogonal A: B = -lr s G A^T A is -lr s G, so V_r are the top right singular vectors of G."""
    model = adapted(rank=2, n_in=10, n_out=10)
    expand(model, 10)
    layer = lora_layers(model)["first"]
    with torch.no_grad():
        nn.init.orthogonal_(layer.lora_A["default"].weight)
    x, y = torch.randn(64, 10), torch.randn(64, 10)
    weight = layer.base_layer.weight.requires_grad_(True)
    (model(x) - y).square().mean().backward()
    assert weight.grad is not None
    with torch.no_grad():
        for each in lora_layers(model).values():
            each.lora_B["default"].weight -= 0.1 * each.lora_B["default"].weight.grad
    v = torch.linalg.svd(weight.grad)[2][:2].T
    swap(model)
    a = lora_layers(model)["first"].lora_A["default"].weight.detach()
    assert torch.allclose(3 * a.T @ a, v @ v.T, atol=1e-5)


def test_swap_keeps_the_function_the_scale_and_what_is_frozen() -> None:
    model = adapted(rank=3, n_in=60, n_out=50)
    x = torch.randn(5, 60)
    before = model(x)
    scaling = [layer.scaling["default"] for layer in lora_layers(model).values()]
    lora_layers(model)["second"].lora_A.requires_grad_(False)
    expand(model, 40)
    assert torch.equal(model(x), before)
    assert {layer.lora_A["default"].weight.shape[0] for layer in lora_layers(model).values()} == {40}
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight.normal_()
    assert not torch.allclose(model(x), before, atol=1e-2)
    assert swap(model) == []
    assert torch.equal(model(x), before)  # the preheated B is thrown away
    assert [layer.scaling["default"] for layer in lora_layers(model).values()] == scaling
    for layer in lora_layers(model).values():
        a = layer.lora_A["default"].weight
        assert a.shape[0] == layer.r["default"] == 3
        # ||A||_F of peft's own start: r n_in Var = r / 3, here exactly; and a long run of peft's own starts agrees
        assert torch.isclose(a.square().sum(), torch.tensor(1.0), atol=1e-5)
        assert torch.allclose(a @ a.T, torch.eye(3) / 3, atol=1e-5)
    assert not lora_layers(model)["second"].lora_A["default"].weight.requires_grad
    usual = [adapted_start_norm(seed) for seed in range(20)]
    assert sum(usual) / 20 == pytest.approx(1.0, rel=0.1)


def adapted_start_norm(seed: int) -> float:
    torch.manual_seed(seed)
    layer = lora_layers(add_adapters(Net(60, 50), "all-linear", 3, 16.0, "lora", 0.0))["first"]
    return float(layer.lora_A["default"].weight.detach().square().sum())


def test_keep_b_starts_from_the_truncated_product_and_keeps_the_function() -> None:
    model = adapted(rank=2)
    x = torch.randn(5, 12)
    before = model(x)
    expand(model, 8)
    layer = lora_layers(model)["first"]
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    dense = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    u, s, vt = torch.linalg.svd(dense)
    assert swap(model, keep_b=True) == ["second"]
    now = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(now, u[:, :2] * s[:2] @ vt[:2], atol=1e-5)
    assert torch.allclose(model(x), before, atol=1e-5)


def test_preheating_scales() -> None:
    for scale, factor in (("rank", 2 / 8), ("root", 0.5), ("same", 1.0)):
        model = adapted(rank=2)
        expand(model, 8, scale)
        assert {layer.scaling["default"] for layer in lora_layers(model).values()} == {8.0 * factor}
        with torch.no_grad():
            for layer in lora_layers(model).values():
                layer.lora_B["default"].weight.normal_()
        swap(model)
        assert {layer.scaling["default"] for layer in lora_layers(model).values()} == {8.0}
    with pytest.raises(ValueError, match="scale is 'none'"):
        expand(adapted(), 8, "none")


def test_idle_layers_get_orthonormal_directions_and_nothing_preheated_is_refused() -> None:
    model = adapted(rank=2)
    with pytest.raises(ZooError, match="no layer is being preheated"):
        swap(model)
    expand(model, 8)
    with pytest.raises(ZooError, match="every B is still zero"):
        swap(model)
    with torch.no_grad():
        lora_layers(model)["first"].lora_B["default"].weight.normal_()
    assert swap(model) == ["second"]
    a = lora_layers(model)["second"].lora_A["default"].weight
    assert torch.allclose(a @ a.T, torch.eye(2) / 3, atol=1e-5)


def test_budget_counts_preheating() -> None:
    model = adapted(rank=2)
    budget = compute_budget(model, 8, 10, 100)
    # by hand: two layers, 12 -> 10 and 10 -> 12
    high, low = 2 * (2 * 120 + 3 * 8 * 22), 2 * (2 * 120 + 3 * 2 * 22)
    assert budget["preheat_cost"] == pytest.approx(high / low)
    assert budget["main_steps"] == 90
    assert budget["equivalent_lora_steps"] == pytest.approx(90 + 10 * high / low)
    for layer in lora_layers(model).values():
        layer.lora_A.requires_grad_(False)
    high, low = (2 * (2 * 120 + 3 * r * 22) - r * 22 for r in (8, 2))
    assert compute_budget(model, 8, 10, 100)["preheat_cost"] == pytest.approx(high / low)


def test_sensing_follows_the_card() -> None:
    """Excess falls with R, and the oracle's is zero (Eckart-Young)."""
    found: dict[Any, list[float]] = {}
    for init, high in (("random", 4), ("hrp", 8), ("hrp", 32), ("hrp", 64), ("oracle", 4)):
        runs = []
        for seed in range(3):
            torch.manual_seed(seed)
            module = MatrixSensing(init=init, rank_pre=high, steps=100, short=60)
            torch.manual_seed(seed + 100)
            module.training_step(None, 0)
            runs.append(float(module.excess("asymmetric")))
        found[init, high] = sum(runs) / 3
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert found["oracle", 4] == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="rank <= rank_pre"):
        MatrixSensing(rank=8, rank_pre=4)


# ---- backbones --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_of_backbones(name: str) -> None:
    model = tiny(backbone=CONFIGS[name]).eval()
    single = torch.cat([model.predict([text]) for text in TEXTS])
    assert torch.allclose(model.predict(TEXTS), single, atol=1e-6)  # padding changes nothing
    names = set(lora_layers(model.backbone))
    assert names and all(layer.scaling["default"] == 8.0 for layer in lora_layers(model.backbone).values())
    before = model.predict(TEXTS)
    expand(model, 8)
    model.loss({"text": TEXTS, "label": torch.tensor([0, 1, 2])})[0].backward()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if ".lora_" in key and p.grad is not None:
                p -= 0.5 * p.grad
    assert not torch.allclose(model.predict(TEXTS), before, atol=1e-3)
    assert swap(model) == []
    assert torch.equal(model.predict(TEXTS), before)


@pytest.mark.parametrize("init", ["lora", "rslora", "pissa", "dora"])
def test_baselines_start_from_the_pretrained_function(init: str) -> None:
    plain, model = tiny(init="lora").eval(), tiny(init=init).eval()
    scale = {"rslora": 16 / math.sqrt(2)}.get(init, 8.0)
    assert {layer.scaling["default"] for layer in lora_layers(model.backbone).values()} == {scale}
    base = tiny(init="lora")
    whole = HRP.from_backbone(_merged(base), init=init, **_rest()).eval()
    whole.classifier.load_state_dict(plain.classifier.state_dict())
    assert torch.allclose(whole.predict(TEXTS), plain.predict(TEXTS), atol=1e-5)
    assert model.configure_callbacks() == []


@pytest.mark.parametrize("init", ["hrp", "pissa", "dora"])
def test_bfloat16_backbone_keeps_float32_adapters(init: str) -> None:
    model = tiny(backbone_dtype="bfloat16", init=init)
    if init == "hrp":
        expand(model, 8)
    types = {(".lora_" in k or k.startswith("classifier"), p.dtype) for k, p in model.named_parameters()}
    assert types == {(True, torch.float32), (False, torch.bfloat16)}
    loss = model.loss({"text": TEXTS, "label": torch.tensor([0, 1, 2])})[0]
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()


def _merged(model: HRP) -> nn.Module:
    """The plain transformers model under a fresh HRP."""
    from transformers import AutoConfig, AutoModelForTextEncoding

    values = dict(BERT)
    backbone = AutoModelForTextEncoding.from_config(
        AutoConfig.for_model(values.pop("model_type"), **values), add_pooling_layer=False
    )
    state = {k.replace(".base_layer.", "."): v for k, v in model.backbone.state_dict().items() if ".lora_" not in k}
    backbone.load_state_dict(state)
    return backbone


def _rest() -> dict[str, Any]:
    return {k: v for k, v in HRP.variants["tiny"].items() if k != "backbone"}


def test_causal_language_model(tmp_path: Path) -> None:
    model = tiny(backbone=CONFIGS["gpt2"], task="causal-lm")
    assert model.monitor == "val/loss"
    model.eval()
    ids, mask = model.encode(TEXTS)
    logits = model(ids, mask)
    expected = []
    for i in range(3):
        nats = [-logits[i, t].log_softmax(-1)[ids[i, t + 1]] for t in range(ids.shape[1] - 1) if mask[i, t + 1]]
        expected.append(sum(nats) / len(nats))
    assert torch.allclose(model.predict(TEXTS), torch.stack(expected), atol=1e-5)
    data = LoRAFinetuneDataModule(batch_size=8, train_size=32, task="causal-lm")
    trainer = Trainer(
        default_root_dir=tmp_path, max_steps=3, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=1, val_check_interval=1,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    assert math.isfinite(trainer.callback_metrics["val/loss"])
    step = model.predict_step(next(iter(data.test_dataloader())), 0)
    files = data.write([step], tmp_path / "out.csv")
    assert files[0].read_text().splitlines()[0] == "text,nats_per_token"


# ---- one fit ----------------------------------------------------------------------------------------------------


def test_fit_preheats_swaps_and_schedules_anew(tmp_path: Path) -> None:
    seen = []

    class Watch(lightning.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            ranks = {layer.r["default"] for layer in lora_layers(module).values()}
            held = {id(p) for g in optimizer.param_groups for p in g["params"]}
            assert held == {id(p) for p in module.parameters() if p.requires_grad}
            seen.append((ranks, optimizer.param_groups[0]["lr"], len(optimizer.state)))

    model = tiny(preheat_steps=3, lr=1e-2, warmup=0.25)
    trainer = fit(model, tmp_path, 11, callbacks=[Watch()])
    assert [ranks for ranks, _, _ in seen] == [{8}] * 3 + [{2}] * 8
    rates = [rate for _, rate, _ in seen]
    assert rates[:3] == [1e-2] * 3  # preheating: no schedule
    assert rates[3:6] == pytest.approx([0.5e-2, 1e-2, 1e-2])  # then 8 steps: warm-up over 2, linear decay over 6
    assert rates[-1] == pytest.approx(1e-2 / 6)
    assert seen[0][2] == seen[3][2] == 0 and seen[1][2] > 0 and seen[4][2] > 0  # the optimiser's state starts over
    callback = next(c for c in trainer.callbacks if isinstance(c, HRPCallback))
    assert (callback.swapped_at, callback.budget["main_steps"], trainer.global_step) == (3, 8, 11)
    assert 11 < callback.budget["equivalent_lora_steps"] < 11 + 3


class Worsening(HRP):
    """Validates ever worse, so that the first checkpoint is the best."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/accuracy", -float(self.global_step), batch_size=1)


def test_best_checkpoint_is_never_from_preheating(tmp_path: Path) -> None:
    model = Worsening(**{**HRP.variants["tiny"], "preheat_steps": 2})
    trainer = fit(model, tmp_path, 4, val_check_interval=1, limit_val_batches=1)
    assert trainer.checkpoint_callback.best_model_score == -2  # validated right after the swap; -1 is forgotten
    content = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert content["global_step"] == 2
    assert {len(v) for k, v in content["state_dict"].items() if ".lora_A." in k} == {2}


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_resume_across_the_swap_is_exact(tmp_path: Path, stop: int) -> None:
    """K = 2: before the swap (1), right after it (2) and later (3, 4)."""
    whole = tiny(preheat_steps=2, lr=1e-2)
    fit(whole, tmp_path / "a", 6, callbacks=[SaveAt(tmp_path, stop)])
    torch.manual_seed(99)
    again = HRP.from_variant("tiny", preheat_steps=2, lr=1e-2)
    fit(again, tmp_path / "b", 6, ckpt=tmp_path / f"{stop}.ckpt")
    for (key, x), (other, y) in zip(whole.state_dict().items(), again.state_dict().items(), strict=True):
        assert key == other and torch.equal(x, y), key


class Plain(lightning.LightningModule):
    """Somebody's own module around a peft model, with a scheduler of its own."""

    def __init__(self, peft_model: bool = False):
        super().__init__()
        torch.manual_seed(0)
        if peft_model:
            import peft

            config = peft.LoraConfig(r=2, target_modules=["first", "second"])
            self.net = peft.get_peft_model(Net(), config)
        else:
            self.net = adapted(rank=2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.net(batch) - batch).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5, momentum=0.9)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("peft_model", [False, True])
@pytest.mark.parametrize("stop", [2, 3, 5])
def test_callback_on_any_module_and_plain_lightning(tmp_path: Path, stop: int, peft_model: bool) -> None:
    data = torch.randn(
        4, 12, generator=torch.Generator().manual_seed(0)
    )  # one batch: lightning's own loaders lose their place

    def run(ckpt: Path | None = None, **more: Any) -> Plain:
        module = Plain(peft_model)
        trainer = lightning.Trainer(
            max_steps=8, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[HRPCallback(8, 3), *more.get("callbacks", [])],
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4), ckpt_path=ckpt, weights_only=True)
        return module

    whole = run(callbacks=[SaveAt(tmp_path, stop)])
    assert {layer.r["default"] for layer in lora_layers(whole).values()} == {2}
    again = run(ckpt=tmp_path / f"{stop}.ckpt")
    for x, y in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(x, y)


def test_trained_adapters_are_not_thrown_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(lr=1e-2)
    fit(model, tmp_path / "a", 3)
    model.save_pretrained(tmp_path / "saved")
    loaded = HRP.from_pretrained(tmp_path / "saved", num_classes=4)
    before = copy.deepcopy(loaded.state_dict())
    with caplog.at_level("INFO"):
        trainer = fit(loaded, tmp_path / "b", 2)
    assert "trained already" in caplog.text
    callback = next(c for c in trainer.callbacks if isinstance(c, HRPCallback))
    assert callback.swapped_at == 0 and callback.budget["preheat_steps"] == 0
    assert loaded.hyperparameters["classes"] == ["topic0", "topic1", "topic2", "topic3"]  # the data's, learned in fit
    moved = [(v - before[k]).abs().max() for k, v in loaded.state_dict().items() if ".lora_B." in k]
    assert 0 < max(moved) < 0.1
    loaded.reset_adapters()
    assert not any(layer.lora_B["default"].weight.any() for layer in lora_layers(loaded).values())


def test_fast_dev_run_ends_with_rank_r(tmp_path: Path) -> None:
    model = tiny(preheat_steps=5)
    trainer = lightning.Trainer(fast_dev_run=2, accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.fit(model, datamodule=LoRAFinetuneDataModule(batch_size=8, train_size=32))
    assert {layer.r["default"] for layer in lora_layers(model).values()} == {2}


def test_asymmetric_trains_b_only(tmp_path: Path) -> None:
    model = tiny(asymmetric=True, lr=1e-2)
    trained = {k.split(".")[-3] for k, p in model.named_parameters() if p.requires_grad and ".lora_" in k}
    assert trained == {"lora_B"}
    fit(model, tmp_path, 4)
    for layer in lora_layers(model).values():
        a = layer.lora_A["default"].weight
        assert not a.requires_grad
        assert torch.allclose(a @ a.T, torch.eye(2) / 3, atol=1e-5)  # as the swap left it


# ---- checkpoints ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone on disk with a word tokenizer, as on the Hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForTextEncoding, PreTrainedTokenizerFast

    where = tmp_path_factory.mktemp("backbone")
    values = dict(BERT)
    torch.manual_seed(1)
    AutoModelForTextEncoding.from_config(AutoConfig.for_model(values.pop("model_type"), **values)).save_pretrained(
        where
    )
    words = {w: i for i, w in enumerate(["[PAD]", "[UNK]", *sorted({w for t in TEXTS for w in t.split()})])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(where)
    return where


@pytest.mark.parametrize(
    ("init", "keep_b"), [("hrp", False), ("hrp", True), ("pissa", False), ("lora", False), ("dora", False)]
)
def test_a_folder_backbone_is_not_saved_and_comes_back_exactly(
    folder: Path, tmp_path: Path, init: str, keep_b: bool
) -> None:
    model = tiny(backbone=str(folder), init=init, keep_b=keep_b, lr=1e-2)
    trainer = fit(model, tmp_path / "run", 3)
    model.save_pretrained(tmp_path / "saved")
    from safetensors.torch import load_file

    keys = set(load_file(tmp_path / "saved" / "model.safetensors"))
    assert {k for k in keys if not (".lora_" in k or k.startswith("classifier."))} == (
        {k for k in model.state_dict() if k.endswith("base_layer.weight")} if init == "pissa" or keep_b else set()
    )
    for loaded in (HRP.from_pretrained(tmp_path / "saved"), tiny(backbone=str(folder), init=init, keep_b=keep_b)):
        if loaded.training:
            content = torch.load(trainer.folder / "checkpoints" / "last.ckpt", weights_only=True)
            assert set(content["state_dict"]) == keys
            loaded.load_state_dict(content["state_dict"])
            with pytest.raises(ZooError, match="missing"):
                loaded.load_state_dict({k: v for k, v in content["state_dict"].items() if "layer.0" not in k})
        for (key, x), (_, y) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
            assert torch.equal(x, y), key
        assert torch.equal(loaded.predict(TEXTS), model.predict(TEXTS))


def test_the_tokenizer_travels_and_the_head_changes(folder: Path, tmp_path: Path) -> None:
    model = tiny(backbone=str(folder), classes=["a", "b", "c", "d"])
    assert model.tokenizer.vocab_size < 40  # the folder's own, not hashing
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer").is_dir()
    loaded = HRP.from_pretrained(tmp_path / "saved", num_classes=7)
    assert loaded.predict(TEXTS).shape == (3, 7) and loaded.hparams.classes is None
    assert torch.equal(loaded.encode(TEXTS)[0], model.encode(TEXTS)[0])
    from transformers import AutoTokenizer

    alive = HRP.from_backbone(model_of(folder), AutoTokenizer.from_pretrained(folder), **_rest())
    alive.save_pretrained(tmp_path / "alive")
    back = HRP.from_pretrained(tmp_path / "alive")
    assert torch.equal(back.predict(TEXTS), alive.predict(TEXTS))
    assert torch.equal(back.encode(TEXTS)[0], model.encode(TEXTS)[0])


def model_of(folder: Path) -> nn.Module:
    from transformers import AutoModelForTextEncoding

    return AutoModelForTextEncoding.from_pretrained(folder, add_pooling_layer=False)


def test_checkpoints_of_both_phases_load_into_a_plain_model() -> None:
    high, low = tiny(), tiny()
    expand(high, 8)
    state = high.state_dict()
    low.load_state_dict(state)
    assert {layer.r["default"] for layer in lora_layers(low).values()} == {8}
    low.load_state_dict(tiny().state_dict())
    assert {layer.r["default"] for layer in lora_layers(low).values()} == {2}
    match_ranks(low, {k: v[:5] if ".lora_A." in k else v for k, v in state.items()}, 8)  # neither r nor R: left alone
    with pytest.raises(ZooError, match="of another shape"):
        low.load_state_dict({k: v[:5] if ".lora_A." in k else v for k, v in state.items()})


# ---- texts and refusals -----------------------------------------------------------------------------------------


def test_hashing_tokenizer() -> None:
    out = HashTokenizer(100)(["one two", "One", ""])
    assert out["input_ids"].shape == (3, 3)
    assert out["input_ids"][0, 0] == out["input_ids"][1, 0]
    assert out["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert out["input_ids"][2].tolist() == [1, 0, 0]
    assert HashTokenizer(100)(["x " * 50], max_length=5)["input_ids"].shape == (1, 5)
    with pytest.raises(ValueError, match="at least 8"):
        HashTokenizer(4)


def test_predict_takes_strings_ids_and_many() -> None:
    model = tiny(classes=["a", "b", "c", "d"])
    assert model.predict("one text").shape == (1, 4)
    many = model.predict(TEXTS * 30)
    assert many.shape == (90, 4) and torch.allclose(many.sum(1), torch.ones(90), atol=1e-5)
    assert torch.allclose(model.predict(*model.encode(TEXTS)), many[:3], atol=1e-6)
    step = model.predict_step({"text": TEXTS, "name": ["x", "y", "z"]}, 0)
    assert torch.allclose(step["probabilities"], many[:3], atol=1e-6)
    assert step["class"] == [model.hparams.classes[k] for k in many[:3].argmax(1)]
    assert model.training  # predicting does not leave it in eval mode
    with pytest.raises(TypeError, match="takes strings, not int"):
        model.predict(["a", 3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="empty list"):
        model.predict([])
    with pytest.raises(ValueError, match="neither empty"):
        model(torch.zeros(0, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="num_classes is 4"):
        model.loss({"text": ["a"], "label": torch.tensor([4])})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 9}, "rank is 9 and rank_pre 8"),
        ({"rank_pre": 33}, "rank above 32 adds nothing"),
        ({"preheat_steps": 0}, "preheat_steps is 0"),
        ({"init": "olora"}, "init is 'olora'"),
        ({"task": "regression"}, "task is 'regression'"),
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"target_modules": ["q_proj"]}, "'q_proj'.*query"),
        ({"num_classes": 1}, "each 2 or more"),
        ({"backbone": {"model_type": "nonsense"}}, "transformers knows"),
        ({"backbone": "no/such-folder-or-model", "tokenizer": "hash"}, "neither a folder"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, ZooError), match=message) as caught:
        tiny(**changes)
    assert "\n" not in str(caught.value)


def test_callback_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"steps \(K\) is 0"):
        HRPCallback(8, 0)
    with pytest.raises(ValueError, match="leave no main phase"):
        fit(tiny(preheat_steps=3), tmp_path, 3)
    with pytest.raises(ZooError, match="no LoRA layers"):
        expand(Net(), 4)
    quantised = adapted()
    layer = lora_layers(quantised)["first"]
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ZooError, match="quantised"):
        expand(quantised, 4)
    with pytest.raises(ZooError, match="carries the variant"):
        expand(add_adapters(Net(), "all-linear", 2, 16.0, "dora", 0.0), 4)
    two = adapted()
    lora_layers(two)["first"].update_layer("other", 2, 16, two.peft_config["default"])
    lora_layers(two)["first"].set_adapter(["default", "other"])
    with pytest.raises(ZooError, match="one adapter"):
        adapter_of(lora_layers(two)["first"])


def test_class_count_mismatch_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"The data has 4 classes .* num_classes=4") as caught:
        fit(tiny(num_classes=3), tmp_path, 4)
    assert "\n" not in str(caught.value)


def test_missing_peft_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "peft":
            raise ImportError("No module named 'peft'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ZooError, match=r"paper-zoo\[language\]"):
        tiny()


def test_plain_loop_learns() -> None:
    """expand, K steps, swap, a new optimiser: no Trainer."""
    torch.manual_seed(0)
    model = tiny()
    texts, labels = ["red apple", "blue sky", "green leaf", "black coal"] * 4, torch.arange(4).repeat(4)
    for phase, steps in ((lambda: expand(model, 8), 3), (lambda: swap(model), 25)):
        phase()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(steps):
            loss = model.loss({"text": texts, "label": labels})[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert (model.predict(texts).argmax(1) == labels).float().mean() > 0.9
    assert all(a is not b for a, b in itertools.pairwise(model.parameters()))


@pytest.mark.slow
def test_two_processes_swap_together(tmp_path: Path) -> None:
    """The gradients of new parameters are reduced too: two ranks of 4 texts end where one of 8 does."""
    ends = []
    for devices in (1, 2):
        model = tiny(preheat_steps=2, lr=1e-2, backbone={**BERT, "hidden_dropout_prob": 0.0, **NO_DROPOUT})
        trainer = Trainer(
            default_root_dir=tmp_path / str(devices), max_steps=5, accelerator="cpu", devices=devices, seed=0,
            strategy="ddp_spawn" if devices == 2 else "auto", logger=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        )  # fmt: skip
        data = LoRAFinetuneDataModule(batch_size=8 // devices, train_size=64)
        trainer.fit(model, datamodule=data)
        content = torch.load(tmp_path / str(devices) / "checkpoints" / "last.ckpt", weights_only=True)
        ends.append(content["state_dict"])
    for key, value in ends[0].items():
        assert torch.allclose(value, ends[1][key], atol=1e-3), key
