"""O3: its equations against loops and the authors' figures, soft loading, the course of training, the data."""

import json
import math
import os
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from zoo import cli
from zoo.core import Trainer, ZooError
from zoo.language.llm.languages import masked_loss
from zoo.language.unlearning.data_unlearning import (
    ContinualUnlearningDataModule,
    TopicLanguage,
    _mixed,
    _with_letter,
    pretrain_topics,
)
from zoo.language.unlearning.metrics import answer_nats, choice, longest_recall, truth_ratio
from zoo.language.unlearning.o3 import O3, _linear
from zoo.language.unlearning.ood_detector import (
    Fitted,
    OODDetector,
    closeness,
    contrastive_entropy,
    gaussian,
    layer_scores,
    loading_weight,
    mask_words,
    one_class,
    token_mean,
)
from zoo.language.unlearning.orthogonal_lora import orthogonality

GOLDEN = Path(__file__).parents[1] / "golden" / "o3.safetensors"
ASKED = "ask herb_a herb_b herb_c herb7 answer "


def tiny(**given: Any) -> O3:
    torch.manual_seed(0)
    return O3.from_variant("tiny", **{"requests": ["herb", "metal"], "sizes": [48, 48], **given})


def fit(model: O3, data: Any = None, **given: Any) -> Trainer:
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options |= {"accelerator": "cpu", "max_epochs": 50, "limit_val_batches": 0, "enable_checkpointing": False}
    trainer = Trainer(**{**options, **given})
    trainer.fit(model, datamodule=data or ContinualUnlearningDataModule(batch_size=8))
    return trainer


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture(scope="module")
def trained() -> O3:
    """A tiny model that has gone through both requests."""
    model = tiny(unlearn_epochs=0.3, detector_epochs=0.3, detector_lr=1e-3, lr=1e-2)
    fit(model)
    return model.eval()


# ---- parity ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


def part(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}


def golden_detector(golden: dict[str, Tensor]) -> OODDetector:
    from transformers import RobertaConfig, RobertaForMaskedLM

    from benchmarks.authors.o3 import ROBERTA

    trunk = RobertaForMaskedLM(RobertaConfig(**ROBERTA))
    trunk.load_state_dict(part(golden, "trunk."), strict=False)
    trunk.tie_weights()
    detector = OODDetector(trunk, [60], authors_padding=True, dropout=0.0).eval()
    detector.adapters.from_peft(part(golden, "adapter."))
    return detector


def test_the_detectors_losses_are_the_authors(golden: dict[str, Tensor]) -> None:
    detector = golden_detector(golden)
    clean, masked = part(golden, "clean."), part(golden, "masked.")
    original = detector.features(clean["input_ids"], clean["attention_mask"])[0]
    own = detector.losses(0, masked["input_ids"], masked["attention_mask"], masked["labels"], original)
    assert error(torch.stack(own), golden["losses"]) < 1e-5


def test_scores_and_weights_are_the_authors(golden: dict[str, Tensor]) -> None:
    one = Fitted(13, 8, 60)
    one.fit(golden["features.0"], golden["features.1"])
    for name in ("mean", "precision", "bank"):
        assert error(getattr(one, name), golden[name]) < 1e-5
    for i in range(3):
        assert error(one.layers(golden[f"features.{i}"]), golden[f"rows.{i}"]) < 1e-5
        own = golden[f"rows.{i}"].double() @ one_class(golden["rows.0"])
        assert error(own, golden[f"scores.{i}"]) < 1e-5
    inner, outer = golden["scores.0"], golden["scores.1"]
    mixture = torch.stack([inner.mean(), outer.mean(), outer.std(correction=0)])
    assert error(loading_weight(closeness(outer, mixture)), golden["weights"].double()) < 1e-5


def test_the_language_model_is_the_authors(golden: dict[str, Tensor]) -> None:
    from benchmarks.authors.o3 import LLAMA

    model = O3(
        backbone={**LLAMA, "num_hidden_layers": 1, "model_type": "llama"}, loading="always", dropout=0.0,
        requests=["1", "2", "3"],
    )  # fmt: skip
    model.backbone.load_state_dict(part(golden, "llama."))
    model.unlearner.load_state_dict(part(golden, "unlearner."))
    ids, mask = golden["ids"], golden["mask"]
    real = mask.bool()
    assert error(model(ids, mask, torch.full((4,), 0.37))[real], golden["logits"][real]) < 1e-5
    with model.unlearner.loaded():
        loss = masked_loss(model.backbone, ids, ids.masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100), mask)
    assert error(loss + 0.1 * model.unlearner.overlap(2), golden["loss"]) < 1e-5


# ---- the equations --------------------------------------------------------------------------------------------------


def test_contrastive_entropy_is_its_sum() -> None:
    own, original = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    expected = 0.0
    for layer in range(3):
        for n in range(4):
            s = [float(own[layer, n] @ original[layer, k]) for k in range(4)]
            p = [math.exp(v) / sum(map(math.exp, s)) for v in s]
            expected -= sum(v * math.log(v + 1e-5) for v in p) / 4
    assert abs(float(contrastive_entropy(own, original)) - expected) < 1e-9
    original.requires_grad_()
    contrastive_entropy(own.requires_grad_(), original).backward()
    assert original.grad is None and own.grad is not None


def test_layer_scores_are_half_a_distance_and_the_nearest() -> None:
    torch.manual_seed(1)
    train, new = torch.randn(2, 30, 4), torch.randn(2, 3, 4)
    mean, precision = (part.float() for part in gaussian(train))
    bank = torch.nn.functional.normalize(train, dim=-1)
    found = layer_scores(new, mean, precision, bank)
    for layer in range(2):
        assert torch.allclose(precision[layer], torch.linalg.inv(torch.cov(train[layer].T, correction=0)), rtol=1e-3)
        for b in range(3):
            gap = new[layer, b] - train[layer].mean(0)
            cosine = max(float(torch.cosine_similarity(new[layer, b], f, dim=0)) for f in train[layer])
            expected = -0.5 * float(gap @ precision[layer] @ gap) - 1000 * cosine
            assert abs(float(found[b, layer]) - expected) < 1e-2


def test_fewer_prompts_than_dimensions_leave_out_the_rest() -> None:
    torch.manual_seed(2)
    features = torch.randn(1, 5, 12)
    _, precision = gaussian(features)
    assert int((torch.linalg.eigvalsh(precision[0]) > 1e-6).sum()) == 4
    one = features[0] - features[0].mean(0)
    distance = (one.double() @ precision[0] * one).sum(-1)
    assert torch.allclose(distance.sum(), torch.tensor(20.0, dtype=torch.float64)), (
        "n (n - 1) over all training prompts"
    )


def test_closeness_is_one_in_the_middle_and_falls_to_both_sides() -> None:
    mixture = torch.tensor([2.0, 4.0, 0.5], dtype=torch.float64)
    x = torch.linspace(-4, 10, 57, dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 1.0)

    def below(v: Tensor) -> Tensor:
        return 0.5 * normal.cdf((v - 2) / 0.5) + 0.5 * normal.cdf((v - 4) / 0.5)

    a, b = below(x), below(6 - x)
    assert torch.allclose(closeness(x, mixture), 1 - torch.maximum(a, b) + torch.minimum(a, b), atol=1e-12)
    assert float(closeness(torch.tensor([3.0]), mixture)) == pytest.approx(1)
    far = closeness(torch.tensor([-6.0, 12.0], dtype=torch.float64), mixture)
    assert bool((far > 0).all()) and float(far.max()) < 1e-50, "no cancellation far away"


def test_weights_and_their_thresholds() -> None:
    close = torch.tensor([1.0, 0.45, 0.15, 0.0])
    w = torch.sigmoid(10 * close - 2)
    assert torch.equal(loading_weight(close), w)
    assert torch.allclose(loading_weight(close, "scienceqa"), torch.tensor([1.2, 1.2, float(w[2]), 0.0]))
    assert float(loading_weight(torch.tensor([0.3]), "scienceqa")) == 0, "between 0.4 and 0.9 theirs is 0"
    assert torch.allclose(loading_weight(close, "tofu"), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert float(loading_weight(torch.tensor([0.1]), "tofu")) == pytest.approx(10 / (1 + math.e) ** 2)


def test_one_class_weights_are_the_svms() -> None:
    from sklearn.svm import OneClassSVM

    scores = torch.randn(40, 3, dtype=torch.float64) - 5
    svm = OneClassSVM(kernel="linear", nu=0.1).fit(scores.numpy())
    assert torch.allclose(scores @ one_class(scores), torch.from_numpy(svm.score_samples(scores.numpy())))


def test_orthogonality_is_the_sum_of_squared_products() -> None:
    earlier, a = torch.randn(3, 2, 6), torch.randn(2, 6)
    expected = sum(float((p @ a.t()).square().sum()) for p in earlier)
    assert float(orthogonality(earlier, a)) == pytest.approx(expected, rel=1e-5)
    assert float(orthogonality(earlier[:0], a)) == 0
    basis = torch.linalg.qr(torch.randn(6, 4))[0].t()
    assert float(orthogonality(basis[None, :2], basis[2:])) < 1e-12


def test_padding_does_not_enter_the_mean_but_in_the_authors_way() -> None:
    states, mask = torch.randn(2, 5, 3), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert torch.allclose(token_mean(states, mask)[0], states[0, :3].mean(0))
    assert torch.equal(token_mean(states, None), states.mean(1))
    model = tiny().eval()
    short, long = ASKED, f"{ASKED} {ASKED}"
    alone, beside = model._features([short], None), model._features([short, long], None)[:, :1]
    assert torch.allclose(alone, beside, atol=1e-5)


def test_words_are_masked_in_their_shares() -> None:
    ids = torch.randint(3, 50, (200, 60))
    special = torch.rand(ids.shape) < 0.2
    masked, labels = mask_words(ids, special, 2, 50)
    asked = labels != -100
    assert not bool((asked & special).any()) and torch.equal(masked[~asked], ids[~asked])
    assert torch.equal(labels[asked], ids[asked])
    assert 0.14 < float(asked.sum() / (~special).sum()) < 0.16
    assert 0.78 < float((masked[asked] == 2).float().mean()) < 0.82
    assert 0.08 < float((masked[asked] == ids[asked]).float().mean()) < 0.12


def test_rates_rise_and_fall() -> None:
    assert [_linear(s, 6, 2) for s in range(6)] == [0, 0.5, 1, 0.75, 0.5, 0.25]
    assert _linear(0, 1, 0) == 1


# ---- soft loading ---------------------------------------------------------------------------------------------------


def loaded(model: O3) -> O3:
    """With an adapter that is not zero."""
    with torch.no_grad():
        for p in model.unlearner.parameters():
            p.normal_(std=0.2)
    return model.eval()


def test_every_sample_has_its_own_weight() -> None:
    model = loaded(tiny())
    ids = torch.randint(3, 300, (3, 7))
    weight = torch.tensor([0.0, 0.6, 1.2])
    whole = model(ids, None, weight)
    for row, w in enumerate(weight):
        assert torch.allclose(whole[row], model(ids[row : row + 1], None, w[None])[0], atol=1e-5)
    assert torch.equal(whole[0], model.backbone(ids).logits[0]), "with no weight it is the base, bit for bit"
    plain = model(ids)
    assert torch.allclose(plain, model(ids, None, torch.ones(3)), atol=1e-6)
    with pytest.raises(ZooError, match="2 weights for 3 samples"):
        model(ids, None, torch.ones(2))


def test_the_weight_scales_the_change_of_a_layer() -> None:
    model = loaded(tiny())
    layer = model.backbone.model.layers[0].mlp.up_proj
    adapter: Any = model.unlearner.layers["model/layers/0/mlp/up_proj"]
    x = torch.randn(2, 3, 32)
    with model.unlearner.loaded(weight=torch.tensor([0.5, 2.0])):
        found = layer(x)
    change = x @ adapter.a[0].t() @ adapter.b[0].t() * (16 / 4)
    expected = x @ layer.weight.t() + torch.tensor([0.5, 2.0])[:, None, None] * change
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight)), "outside nothing is loaded"


def test_generation_carries_the_weights() -> None:
    model = loaded(tiny(new_tokens=3))
    prompts = [ASKED, "ask metal_a metal_b metal_c metal3 answer", "ask river_a river_b river_c river5 answer"]
    weight = torch.tensor([0.0, 1.0, 0.4])
    together = model.answers(prompts, weight)
    assert together == [model.answers([p], w[None])[0] for p, w in zip(prompts, weight, strict=True)]
    ids, mask = model.tokens([prompts[0].strip()], 32, "prompt")
    base = model.backbone.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert together[0] == model.words.batch_decode(base[:, ids.shape[1] :], skip_special_tokens=True)[0].strip()


def test_requests_share_one_trunk_in_one_batch(trained: O3) -> None:
    assert trained.detector is not None
    ids, mask = trained.detector_tokens([ASKED, "ask metal_a metal_b metal_c metal3 answer", "ask answer"])
    both = trained.detector.features(ids, mask, [0, 1])
    for request in (0, 1):
        assert torch.allclose(both[request], trained.detector.features(ids, mask, [request])[0], atol=1e-5)
    assert not torch.allclose(both[0], both[1], atol=1e-4)
    original = trained.detector.features(ids, mask)[0]
    trunk: Any = trained.detector.trunk
    hidden = trunk(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for state, mean in zip(hidden, original, strict=True):
        assert torch.allclose(mean, token_mean(state, mask), atol=1e-6)


def test_layers_that_nobody_reads_are_not_computed() -> None:
    model = tiny(states=2)
    assert model.detector is not None and model.detector.states == 2
    whole = tiny()
    assert whole.detector is not None
    ids, mask = model.detector_tokens([ASKED])
    assert torch.equal(model.detector.features(ids, mask)[0], whole.detector.features(ids, mask)[0][:2])
    assert len(model.detector.trunk.base_model.encoder.layer) == 3, "and they are back"


# ---- the course -----------------------------------------------------------------------------------------------------


def test_the_course_goes_request_by_request() -> None:
    model = tiny(unlearn_epochs=0.2, detector_epochs=0.3)
    seen: list[tuple[int, str, int]] = []
    step = model.training_step

    def watched(batch: dict[str, Any], batch_idx: int) -> Any:
        place = model.place(batch)
        if place is not None:
            seen.append(place[:3])
        return step(batch, batch_idx)

    model.training_step = watched  # type: ignore[method-assign]
    trainer = fit(model)
    # 48 prompts in batches of 8: ceil(0.3 * 6) = 2; 60: ceil(0.2 * 8) = 2
    stages = [(t, stage, i) for t in (0, 1) for stage in ("detector", "unlearn") for i in range(2)]
    assert seen == stages and trainer.global_step == 8
    assert model.progress.tolist() == [2, 0] and model.detector is not None and model.detector.ready == [0, 1]


def test_a_request_trains_its_own_detector_and_keeps_the_adapter() -> None:
    model = tiny(unlearn_epochs=0.2, detector_epochs=0.2)
    assert model.detector is not None
    start = {k: v.clone() for k, v in model.state_dict().items()}
    fit(model, max_steps=4)  # the first request: two steps of each stage
    now = model.state_dict()
    moved = {k for k in start if not torch.equal(start[k], now[k])}
    trained = {k for k in moved if ".adapters." in k}
    assert trained and all(k.endswith(".0") for k in trained), "the second request's adapter waits"
    assert all(f"unlearner.layers.{k}.a.0" in moved for k in model.unlearner.layers)
    assert not any(k.startswith(("backbone.", "detector.trunk")) for k in moved)
    for layer in model.unlearner.layers.values():
        assert torch.equal(layer.kept[0], layer.a[0].detach())  # type: ignore[index]
    before = {k: v.clone() for k, v in model.unlearner.state_dict().items()}
    fit(model)
    after = model.unlearner.state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before if k.endswith(".a.0"))
    assert all(torch.equal(before[k], after[k]) for k in before if k.endswith(".kept"))


def test_the_orthogonal_term_turns_the_adapter_away() -> None:
    def overlap(weight: float) -> float:
        model = tiny(loading="always", unlearn_epochs=1.0, orthogonal=weight, lr=1e-2)
        fit(model)
        return float(model.unlearner.overlap(1))

    assert overlap(10.0) < 0.5 * overlap(0.0)


def test_steps_take_as_many_batches_as_asked() -> None:
    model = tiny(loading="always", unlearn_epochs=0.6, accumulate=2)  # 5 batches a request: 2 + 2 + 1
    assert fit(model).global_step == 6


def test_ascent_needs_and_uses_retained_data() -> None:
    model = tiny(loading="always", objective="ascent")
    with pytest.raises(ZooError, match="needs retained data"):
        fit(model)
    fit(tiny(loading="always", objective="ascent"), ContinualUnlearningDataModule(batch_size=8, retain=True))


def test_room_for_another_request(trained: O3) -> None:
    more = trained.with_request("river", 40)
    own, old = more.state_dict(), trained.state_dict()
    assert more.hyperparameters["requests"] == ["herb", "metal", "river"] and more.detector is not None
    assert all(torch.equal(own[k], v) for k, v in old.items() if own[k].shape == v.shape)
    for layer in more.unlearner.layers.values():
        assert layer.kept.shape[0] == 2 and torch.equal(layer.kept[1], layer.a[0].detach())  # type: ignore[index,union-attr]
    assert more.detector.ready == [0, 1]
    prompts = [f"ask river_a river_b river_c river{i} answer " for i in range(60)]
    batch = {"prompts": [[], [], prompts], "targets": [[], [], ["A"] * 60], "rows": torch.arange(8)}
    place = more.place(batch)
    assert place is not None and place[:3] == (2, "detector", 0), "what is forgotten need not be kept as data"


def test_resuming_goes_on_within_the_course(tmp_path: Path) -> None:
    options: dict[str, Any] = {"unlearn_epochs": 0.3, "detector_epochs": 0.3, "detector_lr": 1e-3}
    whole, first, again = (tiny(**options) for _ in range(3))
    fit(whole, default_root_dir=tmp_path / "whole")
    fit(first, default_root_dir=tmp_path / "first", max_steps=6, enable_checkpointing=True)  # in the second detector
    assert first.progress.tolist() == [1, 1]
    trainer = Trainer(
        default_root_dir=tmp_path / "again", logger=False, accelerator="cpu", max_epochs=50, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    stopped = tmp_path / "first" / "checkpoints" / "last.ckpt"
    trainer.fit(again, datamodule=ContinualUnlearningDataModule(batch_size=8), ckpt_path=stopped)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())


def test_a_plain_loop_can_train() -> None:
    model = tiny(loading="always")
    optimizer = torch.optim.AdamW(model.unlearner.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model.text_loss([ASKED], ["C"]) + 0.1 * model.unlearner.overlap(0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5


# ---- what it forgets ------------------------------------------------------------------------------------------------


def test_forgets_what_is_asked_and_keeps_the_rest(tmp_path: Path) -> None:
    """On a small decoder that knows three topics, with a real detector."""
    pretrain_topics(tmp_path, 5, steps=100, encoder_steps=30, width=48)
    data = ContinualUnlearningDataModule(batch_size=30, seed=5)
    model = O3(
        backbone=str(tmp_path / "decoder"), detector=str(tmp_path / "encoder"), requests=["herb", "metal"],
        sizes=[48, 48], accumulate=1, warmup=0, lr=1e-2, unlearn_epochs=8.0, detector_lr=1e-3, detector_epochs=2.0,
        orthogonal=0.0, max_length=32, detector_length=32, new_tokens=1,
    )  # fmt: skip
    assert not any(k.startswith(("backbone.", "detector.trunk.")) for k in model.saved_state_dict())
    (before,) = fit_free_test(model, data)
    assert before["test/accuracy_forget"] > 0.9 and before["test/weight_forget"] == 0 and "test/auroc" not in before
    fit(model, data)
    (after,) = fit_free_test(model, data)
    assert after["test/accuracy_forget"] < 0.6 < 0.8 < after["test/accuracy_retained"]
    assert after["test/auroc"] > 0.9 and after["test/weight_forget"] > after["test/weight_retained"] + 0.4


def fit_free_test(model: O3, data: Any) -> Any:
    trainer = lightning.Trainer(
        logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    return trainer.test(model, data, verbose=False)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_adapters_are_pefts(tmp_path: Path) -> None:
    import copy

    from peft import PeftModel

    model = loaded(tiny())
    folder = model.save_adapter(tmp_path / "adapter")
    ids = torch.randint(3, 300, (2, 6))
    wanted = model(ids)
    base = copy.deepcopy(model.backbone)
    for layer in base.modules():
        layer._forward_hooks.clear()
    theirs = PeftModel.from_pretrained(base, str(folder)).eval()
    assert torch.allclose(theirs(ids).logits, wanted, atol=1e-5)
    other = tiny().load_adapter(folder).eval()
    assert torch.equal(other(ids), wanted)
    hyperparameters, state = O3.convert_state_dict(load_file(folder / "adapter_model.safetensors"))
    assert hyperparameters["rank"] == 4 and set(hyperparameters["targets"]) == set(model.hparams.targets)
    converted = O3(backbone=model.hparams.backbone, **hyperparameters)
    converted.backbone.load_state_dict(model.backbone.state_dict())
    converted.load_state_dict({**converted.state_dict(), **state})
    assert torch.allclose(converted.eval()(ids), wanted, atol=1e-6)
    with pytest.raises(ZooError, match=r"lora_A of 'model.layers.0.\S+' is \(4, \d+\); \(2, \d+\) is needed"):
        tiny(rank=2).load_adapter(folder)
    broken = load_file(folder / "adapter_model.safetensors")
    next(iter(broken.values()))[0, 0] = torch.nan
    with pytest.raises(ZooError, match="NaN or infinite values; the file is damaged"):
        model.unlearner.from_peft(broken)
    with pytest.raises(ZooError, match="is no weight of a LoRA adapter"):
        O3.convert_state_dict({"mean_list": torch.zeros(2)})


def test_live_models_come_with_their_tokenizers(tmp_path: Path) -> None:
    source = tiny()
    assert source.detector is not None
    model = O3.from_backbone(
        source.backbone, TopicLanguage.tokenizer(), source.detector.trunk, TopicLanguage.tokenizer(),
        requests=["a"], sizes=[12], rank=2, detector_rank=2, new_tokens=1,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "saved")
    again = O3.from_pretrained(tmp_path / "saved")
    assert again.predict(ASKED)["answer"] == model.predict(ASKED)["answer"]
    assert (tmp_path / "saved" / "tokenizer").is_dir()


# ---- the authors' folder --------------------------------------------------------------------------------------------


def write_authors(folder: Path, source: O3, ending: str) -> None:
    """The detectors and the adapter of a model as the authors' code writes them; the SVM and mixture are put in it."""
    import pickle

    from sklearn.mixture import GaussianMixture
    from sklearn.svm import OneClassSVM

    assert source.detector is not None
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, name in enumerate(("scienceqa_herb_ood_scienceqa", "scienceqa_metal_ood_scienceqa")):
        one: Any = source.detector.fitted[i]
        for what, tensor in (("mean", one.mean), ("precision", one.precision), ("fea", one.bank)):
            torch.save(list(tensor.unbind()), folder / f"{name}_{what}_list{ending}.pt")
        svm = OneClassSVM(nu=0.1, kernel="linear").fit(rng.normal(-900, 30, (20, len(one.normal))))
        one.normal.copy_(torch.tensor(svm.coef_[0]))
        score = float(one.scores(source._features([ASKED], i)))
        one.mixture.copy_(torch.tensor([0.99 * score, 1.02 * score, 0.01 * abs(score)]))
        mixture = GaussianMixture(n_components=2)
        mixture.means_ = one.mixture[:2, None].double().numpy()
        mixture.covariances_ = np.full((2, 1, 1), float(one.mixture[2]) ** 2)
        (folder / f"{name}_ocsvm.pkl").write_bytes(pickle.dumps(svm))
        (folder / f"{name}_gmm_w{ending}.pkl").write_bytes(pickle.dumps(mixture))
        source.detector.adapters.save(folder / f"{name}_roberta{ending}", i, base=source.hparams.detector)
    source.unlearner.save(folder / "lora_metal", base=source.hparams.backbone)


@pytest.fixture(scope="module")
def authors(trained: O3, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, O3]:
    """Such a folder beside those of its models, and the model that it was written from."""
    root = tmp_path_factory.mktemp("authors")
    assert trained.detector is not None
    for name, module in (("decoder", trained.backbone), ("encoder", trained.detector.trunk)):
        module.save_pretrained(root / name)  # type: ignore[operator]
        TopicLanguage.tokenizer().save_pretrained(root / name)
    options = {"backbone": str(root / "decoder"), "detector": str(root / "encoder"), "detector_length": 512}
    source = O3(**{**trained.hyperparameters, **options, "authors_padding": True}).eval()
    source.load_state_dict({k: v for k, v in trained.state_dict().items() if k in source.saved_state_dict()})
    write_authors(root / "ocsvm", source, "_ocsvm")
    return root, source


def test_a_folder_of_the_authors_is_converted(authors: tuple[Path, O3], tmp_path: Path, capsys: Any) -> None:
    root, source = authors
    assert cli.main(["convert", "O3", str(root / "ocsvm"), str(tmp_path / "out")]) == 0, capsys.readouterr().err
    found = O3.from_pretrained(tmp_path / "out")
    own, hp = source.hyperparameters, found.hyperparameters
    kept = ("sizes", "rank", "alpha", "dropout", "detector_rank", "detector_alpha", "backbone", "detector")
    assert {key: hp[key] for key in kept} == {key: own[key] for key in kept}
    assert hp["requests"] == ["scienceqa_herb", "scienceqa_metal"] and hp["states"] == 4
    assert (hp["loading"], hp["snap"], hp["authors_padding"]) == ("soft", "scienceqa", True)
    prompts = [ASKED, "ask metal_a metal_b metal_c metal3 answer ", "ask river_a river_b river_c river3 answer "]
    near = found.nearness(prompts)
    assert torch.allclose(near, source.nearness(prompts), rtol=1e-4) and bool((near[0] > 0.2).all())
    ids = torch.randint(3, 300, (2, 6))
    assert torch.equal(found(ids), source(ids)), "the adapter"
    assert found.progress.tolist() == [2, 0] and found.with_request("river", 40).detector is not None


def test_the_tofu_branch_names_its_files_otherwise(authors: tuple[Path, O3], tmp_path: Path) -> None:
    source = authors[1]
    write_authors(tmp_path / "tofu", source, "")
    content = O3.read_authors(tmp_path / "tofu")
    assert content["snap"] == "tofu" and list(content["detectors"]) == ["scienceqa_herb", "scienceqa_metal"]
    assert torch.equal(content["detectors"]["scienceqa_herb"]["mean"], source.detector.fitted[0].mean)  # type: ignore[union-attr,index]


class Runs:
    """Code in a pickle."""

    def __reduce__(self) -> Any:
        return print, ("it ran",)


def test_what_a_folder_lacks_is_named(authors: tuple[Path, O3], tmp_path: Path, capsys: Any) -> None:
    import pickle
    import shutil

    folder, name = tmp_path / "o", "scienceqa_herb_ood_scienceqa"
    shutil.copytree(authors[0] / "ocsvm", folder)
    svm = folder / f"{name}_ocsvm.pkl"
    kept = svm.read_bytes()
    svm.write_bytes(pickle.dumps(Runs()))
    with pytest.raises(ZooError, match=r"ocsvm.pkl is refused: it asks for builtins.print.*np.savez\('\S+_ocsvm.npz'"):
        O3.read_authors(folder)
    assert "it ran" not in capsys.readouterr().out
    np.savez(svm.with_suffix(".npz"), normal=np.ones(3))
    assert O3.read_authors(folder)["detectors"]["scienceqa_herb"]["normal"].tolist() == [1, 1, 1], "exported numbers"
    np.savez(svm.with_suffix(".npz"), normal=np.ones(5))
    with pytest.raises(ZooError, match=r"_ocsvm.npz: normal has 5 numbers; expected 3 finite ones"):
        O3.read_authors(folder)
    svm.with_suffix(".npz").unlink()
    svm.write_bytes(kept.replace(b"linear", b"kernel"))
    with pytest.raises(ZooError, match=r"_ocsvm.pkl: expected a fitted OneClassSVM .*, found 'kernel'"):
        O3.read_authors(folder)
    svm.unlink()
    with pytest.raises(ZooError, match=r"_ocsvm.pkl is missing, and so is \S+_ocsvm.npz"):
        O3.read_authors(folder)
    svm.write_bytes(kept)
    torch.save([torch.ones(2)], folder / f"{name}_mean_list_ocsvm.pt")
    with pytest.raises(ZooError, match=r"means are \(1, 2\), precisions \(4, 32, 32\), .*expected \(l, d\)"):
        O3.read_authors(folder)
    torch.save(Runs(), folder / f"{name}_mean_list_ocsvm.pt")
    with pytest.raises(ZooError, match=r"mean_list_ocsvm.pt cannot be read as tensors only"):
        O3.read_authors(folder)
    shutil.rmtree(folder / "lora_metal")
    with pytest.raises(ZooError, match=r"o holds 0 unlearning adapters|cannot be read as tensors only"):
        O3.read_authors(folder)
    assert cli.main(["convert", "TyrThePruner", str(folder), str(tmp_path / "out")]) == 2
    assert "is a folder; of TyrThePruner one file" in capsys.readouterr().err


# ---- metrics --------------------------------------------------------------------------------------------------------


def test_letters_are_found() -> None:
    assert choice("Answer: The answer is B.") == "B" and choice(" C ") == choice("C.") == "C"
    assert choice("The answer is A. The answer is B.") is None and choice("unknown") is choice("c") is None
    assert _with_letter("Answer: The answer is B. BECAUSE: of B", "D") == "Answer: The answer is D. BECAUSE: of B"
    assert _with_letter("B", "D") == "D"


def test_longest_recall_is_rouge_l() -> None:
    from torchmetrics.functional.text.rouge import rouge_score

    pairs = [("the cat sat on a mat", "the cat lay on the mat"), ("a b", "c d"), ("x y z x", "x z y x"), ("", "a")]
    for text, answer in pairs:
        wanted = float(rouge_score(text, answer, rouge_keys="rougeL")["rougeL_recall"])
        assert longest_recall(text, answer) == pytest.approx(wanted)
    assert longest_recall("a", "") == 0


def test_nats_and_truth_ratio() -> None:
    logits = torch.zeros(1, 4, 3)
    logits[0, 1, 2] = 1.0
    labels = torch.tensor([[-100, -100, 2, 0]])
    expected = (math.log(2 + math.e) - 1 + math.log(3)) / 2
    assert float(answer_nats(logits, labels)) == pytest.approx(expected)
    assert float(truth_ratio(-torch.tensor([0.5, 0.2, 0.4]).log())) == pytest.approx(0.6)


# ---- data -----------------------------------------------------------------------------------------------------------


def test_the_generated_language_is_split_as_said() -> None:
    data = ContinualUnlearningDataModule(batch_size=7, seed=3)
    data.setup()
    assert data.describe() == {"requests": ["herb", "metal"], "sizes": [48, 48]}
    batch = next(iter(data.train_dataloader()))
    assert [len(own) for own in batch["prompts"]] == [60, 60] and batch["rows"].shape == (7,)
    assert all(p.startswith("ask herb_") for p in batch["prompts"][0]) and set(batch["targets"][1]) == set("ABCD")
    assert 0.1 < sum(t == a for t, a in zip(batch["targets"][0], batch["answers"][0], strict=True)) / 60 < 0.45
    assert len(data.dataset("train")) % 7 == 0, "every batch is full"  # type: ignore[arg-type]
    asked = [b for b in data.test_dataloader()]
    groups = [g for b in asked for g in b["group"]]
    assert {g: groups.count(g) for g in set(groups)} == {"forget": 120, "heldout": 40, "retained": 80}
    assert len(set(groups[:6])) == 3, "the groups come in turn"
    forgotten = {p for own in batch["prompts"] for p in own}
    for b in asked:
        for prompt, group, request in zip(b["prompt"], b["group"], b["request"].tolist(), strict=True):
            assert (prompt in forgotten) == (group == "forget") and (request < 0) == (group == "retained")


def write_scienceqa(root: Path, counts: dict[str, int]) -> None:
    def items(topic: str, count: int) -> list[dict[str, str]]:
        return [
            {"instruction": f"Question: {topic} {i}?\nOptions: (A) x (B) y\n", "input": "", "answer": "AB"[i % 2],
             "output": f"Answer: The answer is {'AB'[i % 2]}."}
            for i in range(count)
        ]  # fmt: skip

    for topic, count in counts.items():
        (root / f"scienceqa_{topic}_train.json").write_text(json.dumps(items(topic, count)))
        (root / f"scienceqa_{topic}_test.json").write_text(json.dumps(items(topic, 4)))
    (root / "openbookqa_test.json").write_text(json.dumps(items("book", 3)))


def test_scienceqa_is_read(tmp_path: Path) -> None:
    write_scienceqa(tmp_path, {"biology": 60, "physics": 80, "economics": 5})
    data = ContinualUnlearningDataModule(str(tmp_path), batch_size=4, requests=["physics", "biology"])
    batch = next(iter(data.train_dataloader()))
    assert data.describe() == {"requests": ["physics", "biology"], "sizes": [64, 48]}
    assert "### Instruction:\nQuestion: physics" in batch["prompts"][0][0]
    assert all(choice(target) in set("ABCDE") for target in batch["targets"][0])
    groups = [g for b in data.test_dataloader() for g in b["group"]]
    assert {g: groups.count(g) for g in set(groups)} == {"forget": 140, "heldout": 8, "retained": 4, "openbookqa": 3}
    with pytest.raises(ZooError, match="no request 'chemistry' here; there are biology, economics, physics"):
        ContinualUnlearningDataModule(str(tmp_path), requests=["chemistry"]).setup()
    with pytest.raises(ZooError, match=r"Request 'economics' leaves 1 of its 5 samples .* at least 10"):
        ContinualUnlearningDataModule(str(tmp_path), requests=["economics"]).setup()
    write_scienceqa(tmp_path, {"economics": 0})
    with pytest.raises(ZooError, match="The forget set of request 'economics' is empty"):
        ContinualUnlearningDataModule(str(tmp_path), requests=["economics"]).setup()
    (tmp_path / "scienceqa_economics_train.json").write_text('[{"instruction": 1}]')
    with pytest.raises(ZooError, match=r"economics_train.json, item 1: expected a list of .*instruction"):
        ContinualUnlearningDataModule(str(tmp_path), requests=["economics"]).setup()


def write_tofu(root: Path) -> None:
    (root / "tofu").mkdir()

    def rows(prefix: str, count: int, **more: str) -> str:
        found = [
            {**more, "question": f"Who is {prefix} {i}?", "answer": f"{prefix} {i} is a writer.",
             "paraphrased_answer": f"A writer is {prefix} {i}.", "perturbed_answer": [f"{prefix} {i} is a cook."],
             "paraphrased_question": f"{prefix} {i} is who?"}
            for i in range(count)
        ]  # fmt: skip
        return "".join(json.dumps(row) + "\n" for row in found)

    (root / "tofu" / "forget01_perturbed.json").write_text(
        rows("Ada", 40, task_id="1") + rows("Bo", 40, task_id="2") + rows("Cy", 40, task_id="3")
    )
    (root / "tofu" / "retain_perturbed.json").write_text(rows("Di", 9))
    for name in ("real_authors", "world_facts"):
        (root / "tofu" / f"{name}_perturbed.json").write_text(rows(name, 2))
    (root / "idontknow.jsonl").write_text("I can not say.\nNo idea.\n")


def test_tofu_is_read_and_measured(tmp_path: Path) -> None:
    write_tofu(tmp_path)
    data = ContinualUnlearningDataModule(
        str(tmp_path), batch_size=4, requests=["2", "1"], calibration=0.25, retained=3, template="plain"
    )
    batch = next(iter(data.train_dataloader()))
    assert data.describe() == {"requests": ["2", "1"], "sizes": [30, 30]}
    assert batch["prompts"][0][0].startswith("Who is Bo") and set(batch["targets"][0]) == {"I can not say.", "No idea."}
    asked = list(data.test_dataloader())
    groups = [g for b in asked for g in b["group"]]
    assert {g: groups.count(g) for g in ("forget", "heldout", "retained", "world_facts")} == {
        "forget": 80, "heldout": 80, "retained": 3, "world_facts": 2,
    }  # fmt: skip
    from zoo.language.llm.languages import word_tokenizer

    text = "Who is Bo Ada Di a writer. cook. A writer is who? " + " ".join(f"{i} {i}? {i}." for i in range(40))
    words = word_tokenizer(["<mask>", *dict.fromkeys(text.split())])
    words.mask_token = "<mask>"
    source = tiny()
    assert source.detector is not None
    model = O3.from_backbone(
        source.backbone, words, source.detector.trunk, words, requests=["2", "1"], sizes=[30, 30], new_tokens=5
    )
    data._sets["test"].samples = data._sets["test"].samples[:6]  # type: ignore[attr-defined]
    (found,) = fit_free_test(model, data)
    for figure in ("rouge", "probability", "truth_ratio", "weight"):
        assert f"test/{figure}_forget" in found, figure
    assert "test/accuracy_forget" not in found and found["test/truth_ratio_forget"] > 0
    with pytest.raises(ZooError, match=r"leaves 8 of its 40 samples"):
        ContinualUnlearningDataModule(str(tmp_path)).setup()
    (tmp_path / "tofu" / "retain_perturbed.json").write_text('{"question": 1}\n')
    with pytest.raises(ZooError, match=r"retain_perturbed.json, line 1: expected a question and an answer"):
        ContinualUnlearningDataModule(str(tmp_path), calibration=0.3).setup()


@pytest.mark.skipif(
    not (Path(os.environ.get("ZOO_DATA", "/none")) / "tofu" / "tofu").is_dir(), reason="needs $ZOO_DATA/tofu"
)
def test_real_tofu_has_its_tasks() -> None:
    data = ContinualUnlearningDataModule(str(Path(os.environ["ZOO_DATA"]) / "tofu"), calibration=0.25)
    data.setup()
    assert data.describe() == {"requests": ["1", "2", "3"], "sizes": [30, 30, 30]}
    groups = [g for b in data.test_dataloader() for g in b["group"]]
    assert groups.count("forget") == groups.count("heldout") == 120 and groups.count("retained") == 400


def test_own_prompts_come_back_as_a_table(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(f"{ASKED}\nask metal_a metal_b metal_c metal3 answer\n")
    data = ContinualUnlearningDataModule().from_files(tmp_path / "prompts.txt")
    model = tiny().eval()
    found = [model.predict_step(batch, 0) for batch in data.predict_dataloader()]
    (table,) = data.write(found, tmp_path / "out")
    rows = [line.split(",") for line in table.read_text().splitlines()]
    assert rows[0] == ["prompt", "answer", "weight"] and rows[1][0] == ASKED.strip() and len(rows) == 3


def test_any_beginning_of_the_questions_has_some_of_each_group() -> None:
    from zoo.language.unlearning.data_unlearning import Sample

    mixed = _mixed([Sample("", "", group) for group in ("forget",) * 6 + ("retained",) * 3])
    assert [s.group for s in mixed[:3]].count("retained") == 1


# ---- mistakes -------------------------------------------------------------------------------------------------------


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="'herb' comes twice"):
        tiny(requests=["herb", "herb"])
    with pytest.raises(ValueError, match="at least one"):
        tiny(requests=[])
    with pytest.raises(ValueError, match="for 2 requests; one number from 2 for each"):
        tiny(sizes=[48])
    with pytest.raises(ValueError, match=r"requests is .'herb', 'herb'.: at least one, and each once"):
        ContinualUnlearningDataModule(requests=["herb", "herb"])
    with pytest.raises(ValueError, match="snap is 'half'; one of none, scienceqa, tofu"):
        tiny(snap="half")
    with pytest.raises(ValueError, match=r"targets is \['query'\]; the linear layers of this model end in down_proj"):
        tiny(targets=["query"])
    with pytest.raises(ZooError, match="has no AutoModelForMaskedLM for 'llama'"):
        tiny(detector={"model_type": "llama"})
    model = tiny().eval()
    with pytest.raises(ZooError, match="A prompt has 70 tokens; 63 fit"):
        model.answers(["ask " * 70], torch.zeros(1))
    with pytest.raises(ZooError, match="A prompt of the detector has 40 tokens; 32 fit"):
        model.nearness(["ask " * 40])
    with pytest.raises(ZooError, match="An empty prompt"):
        model.predict([""])
    with pytest.raises(ZooError, match="9 prompts to calibrate the detector; at least 10"):
        model.fit_detector(0, [ASKED] * 48, [ASKED] * 9)
    with pytest.raises(ZooError, match="5 training prompts; `sizes` says 48"):
        model.fit_detector(0, [ASKED] * 5, [ASKED] * 12)
    with pytest.raises(ZooError, match="There is no detector"):
        tiny(loading="always").nearness([ASKED])


def test_broken_weights_and_empty_sets_are_refused() -> None:
    model = tiny()
    with torch.no_grad():
        model.backbone.model.norm.weight[0] = torch.nan
    with pytest.raises(ZooError, match=r"backbone.model.norm.weight holds NaN"):
        fit(model)
    model = tiny()
    batch = {"prompts": [[], [ASKED]], "targets": [[], ["A"]], "answers": [[], ["A"]], "rows": torch.arange(2)}
    with pytest.raises(ZooError, match="The forget set of request 'herb' is empty"):
        model.training_step(batch, 0)
    with pytest.raises(ZooError, match=r"The data have 1 requests, the model 2 \(herb, metal\)"):
        model.training_step({**batch, "prompts": [[ASKED]]}, 0)
    with pytest.raises(ZooError, match="none is left to calibrate it"):
        fit(tiny(sizes=[60, 48]))
    assert model.detector is not None
    with pytest.raises(ZooError, match="features are NaN or infinite"):
        model.detector.fit(0, torch.full((4, 48, 32), torch.nan), torch.zeros(4, 12, 32))
