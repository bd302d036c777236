"""LocalPrompt: equal to its authors' code, equations against loops, cropped prompts, heads, views, bad inputs."""

import logging
import math
from pathlib import Path

import lightning
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from zoo.core import ZooError
from zoo.vision.prompt.data_ood import FewShotOODDataModule
from zoo.vision.prompt.local_prompt import (
    CLIP,
    TINY_CLASSES,
    TINY_CLIP,
    EmbeddedTokenizer,
    LocalPrompt,
    class_names,
    class_score,
    diversity_loss,
    load_clip,
    mcm_score,
    negative_loss,
    positive_loss,
    regional_score,
)


def tiny(**overrides):
    torch.manual_seed(0)
    return LocalPrompt.from_variant("tiny", **{"positives": 2, **overrides})


def unit(*shape):
    return nn.functional.normalize(torch.randn(*shape), dim=-1)


# ---- the authors' recorded tensors ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    found = load_file(Path(__file__).parents[1] / "golden/local_prompt.safetensors")
    return {**found, "views": found["views"].float() / 255}


@pytest.fixture
def recorded(golden):
    """Our module with the authors' weights."""
    part = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**part, "vocab_size": 80, "max_position_embeddings": 24, "bos_token_id": 78, "eos_token_id": 79}
    module = LocalPrompt(
        classes=["red square", "green circle", "blue triangle", "yellow cross"],
        backbone={
            "text_config": {**text, "pad_token_id": 0},
            "vision_config": {**part, "image_size": 24, "patch_size": 6},
            "projection_dim": 16,
        },
        context=4, negatives=5, regions=4, score_regions=3, positives=3,
    )  # fmt: skip
    weights = {key.removeprefix("weight."): value for key, value in golden.items() if key.startswith("weight.")}
    module.load_state_dict({**weights, "threshold": module.threshold})
    return module


def close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_features_equal_the_authors(recorded, golden):
    with torch.no_grad():
        g, regions = recorded.backbone.image(recorded.preprocess(golden["views"][:, 0]))
        close(g, golden["authors.global"])
        close(regions, golden["authors.local"])
        for name in ("global", "local", "negative"):  # theirs run through all 24 positions
            close(recorded.encode_text(name), nn.functional.normalize(golden[f"authors.text_{name}"], dim=-1))


def test_scores_equal_the_authors(recorded, golden):
    recorded.eval()
    with torch.no_grad():
        scores, score = recorded(golden["views"][:, 0])
        close(scores, golden["authors.class_score"])
        close(score, golden["authors.score"])
        g, _ = recorded.encode_image(golden["views"][:, 0])
        close(mcm_score(g, recorded.text("global")), golden["authors.mcm"])


def test_selection_losses_and_gradients_equal_the_authors(recorded, golden):
    recorded.train()
    views, label = golden["views"], golden["label"]
    positive, negative = recorded.select_views(views, label)
    rows = torch.arange(len(label))
    _, chosen = recorded.encode_image(views[rows, golden["authors.best"][0]])
    close(positive[0], chosen)
    _, chosen = recorded.encode_image(views[rows, golden["authors.worst"]])
    close(negative, chosen)
    parts = recorded.loss(positive[0], negative, label)
    for name in ("positive", "negative", "diversity"):
        close(parts[name], golden[f"authors.loss_{name}"])
    close(parts["loss"], golden["authors.loss"])
    gradients = torch.autograd.grad(parts["loss"], [recorded.prompts.local, recorded.prompts.negative])
    close(gradients[0], golden["authors.gradient_local"])
    close(gradients[1], golden["authors.gradient_negative"])


def test_a_training_batch_moves_the_prompts_as_the_authors(recorded, golden):
    """Three optimiser steps, one a positive view, through the real Trainer; the change is compared, not the prompts."""
    before = {name: getattr(recorded.prompts, name).detach().clone() for name in ("local", "negative")}
    recorded.hparams.warmup_epochs = 0
    batch = [{"views": golden["views"], "label": golden["label"]}]
    trainer = quiet(max_epochs=1)
    trainer.fit(recorded, torch.utils.data.DataLoader(batch, batch_size=None))
    assert trainer.global_step == 3
    for name, start in before.items():
        moved = getattr(recorded.prompts, name).detach() - start
        close(moved, golden[f"authors.step_{name}"] - start)


def quiet(**options):
    return lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


# ---- CLIP by its parts ---------------------------------------------------------------------------------------------


def test_global_features_are_those_of_transformers():
    model = load_clip(TINY_CLIP).eval()
    clip = CLIP(model)
    pixels = torch.randn(2, 3, 32, 32)
    tokenizer = EmbeddedTokenizer(80)
    ids = torch.tensor([[tokenizer.bos, *tokenizer.encode("a photo of a red ring."), tokenizer.eos]])
    with torch.no_grad():
        whole = model(input_ids=ids, pixel_values=pixels)
        g, _ = clip.image(pixels)
        text = clip.text(clip.embed(ids), torch.tensor([ids.shape[1] - 1]))
    torch.testing.assert_close(nn.functional.normalize(g, dim=-1), whole.image_embeds)
    torch.testing.assert_close(nn.functional.normalize(text, dim=-1), whole.text_embeds)


def test_local_features_follow_the_value_path():
    """Region by region, through the modules of transformers."""
    model = load_clip(TINY_CLIP).eval()
    vision, pixels = model.vision_model, torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        _, regions = CLIP(model).image(pixels)
        x = vision.pre_layrnorm(vision.embeddings(pixels))
        first = vision.encoder.layers[0]
        x = first(x, None)
        x = x[0] if isinstance(x, tuple) else x
        last = vision.encoder.layers[-1]
        for r in range(regions.shape[1]):
            v = x[0, r + 1] + last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(x[0, r + 1])))
            v = v + last.mlp(last.layer_norm2(v))
            expected = model.visual_projection(vision.post_layernorm(v))
            torch.testing.assert_close(regions[0, r], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["global", "local", "negative"])
def test_cropped_prompts_equal_full_length(which):
    module = tiny(classes=["cat", "a very long hourglass"])
    embeddings, end = getattr(module.prompts, f"{which}_sequences")(module.backbone)
    assert embeddings.shape[1] < module.backbone.positions
    padding = torch.randn(len(embeddings), module.backbone.positions - embeddings.shape[1], embeddings.shape[2])
    with torch.no_grad():
        short = module.backbone.text(embeddings, end)
        full = module.backbone.text(torch.cat([embeddings, padding], 1), end)
    torch.testing.assert_close(short, full)
    assert int(end.max()) == embeddings.shape[1] - 1  # nothing longer than needed


def test_checkpointing_changes_no_gradient():
    module, gradients = tiny(), []
    for checkpointing in (False, True):
        module.hparams.checkpointing = checkpointing
        gradients.append(torch.autograd.grad(module.encode_text("local").square()[:, 0].sum(), module.prompts.local)[0])
    torch.testing.assert_close(*gradients)


# ---- equations against loops ---------------------------------------------------------------------------------------


def loop_positive(local, negative, label, k, t):
    total = 0.0
    for x, n, y in zip(local, negative, label.tolist(), strict=True):
        own = sum(math.exp(v / t) for v in sorted(x[y].tolist(), reverse=True)[:k])
        every = sum(math.exp(v / t) for row in (*x, *n) for v in sorted(row.tolist(), reverse=True)[:k])
        total -= math.log(own / every)
    return total / len(label)


def loop_negative(local, negative, label, k, t):
    total = 0.0
    for x, n, y in zip(local, negative, label.tolist(), strict=True):
        regions = sorted(range(x.shape[1]), key=lambda r, row=x[y]: -row[r].item())[:k]
        own = sum(math.exp(n[m, r].item() / t) for m in range(len(n)) for r in regions)
        every = own + sum(math.exp(v / t) for row in x for v in sorted(row.tolist(), reverse=True)[:k])
        total -= math.log(own / every)
    return total / len(label)


@pytest.mark.parametrize(
    ("b", "c", "m", "r", "k", "t"), [(1, 1, 1, 1, 1, 1.0), (3, 4, 5, 7, 3, 1.0), (2, 3, 2, 6, 6, 0.5)]
)
def test_losses_against_loops(b, c, m, r, k, t):
    torch.manual_seed(b)
    local, negative = torch.randn(b, c, r), torch.randn(b, m, r)
    label = torch.randint(c, (b,))
    expected = loop_positive(local, negative, label, k, t)
    assert positive_loss(local, negative, label, k, t).item() == pytest.approx(expected, rel=1e-5)
    expected = loop_negative(local, negative, label, k, t)
    assert negative_loss(local, negative, label, k, t).item() == pytest.approx(expected, rel=1e-5)


def test_losses_by_hand():
    zero = torch.zeros(1, 2, 5)
    # equal logits: the label's K entries among those of 2 classes and 3 negatives
    assert positive_loss(zero, torch.zeros(1, 3, 5), torch.tensor([0]), 2).item() == pytest.approx(math.log(5))
    assert positive_loss(zero, torch.zeros(1, 0, 5), torch.tensor([0]), 2).item() == pytest.approx(math.log(2))
    # 3 negatives on K regions against 2 classes on K regions
    assert negative_loss(zero, torch.zeros(1, 3, 5), torch.tensor([1]), 2).item() == pytest.approx(math.log(5 / 3))
    same = unit(1, 4).expand(3, -1)
    assert diversity_loss(same).item() == pytest.approx(9 / 6)  # all cosines 1, the diagonal included
    assert diversity_loss(torch.eye(3)).item() == pytest.approx(3 / 6)
    assert diversity_loss(torch.eye(3)[:1]).item() == 0


def test_losses_stay_finite_where_exponentials_overflow():
    local = torch.full((1, 2, 3), -200.0)
    local[0, 1] = 200.0
    local.requires_grad_()
    loss = positive_loss(local, torch.zeros(1, 2, 3), torch.tensor([0]), 2)
    loss.backward()
    assert loss.item() == pytest.approx(400, rel=1e-4)
    assert local.grad.isfinite().all()


def test_diversity_against_all_pairs():
    n = unit(6, 8).double()
    total = sum(nn.functional.cosine_similarity(n[i], n[j], dim=0) for i in range(6) for j in range(6))
    torch.testing.assert_close(diversity_loss(n), total / 30)


def test_scores_against_loops():
    torch.manual_seed(1)
    b, r, c, m, d, k = 2, 5, 3, 4, 8, 4
    g, regions, text, local, negative = unit(b, d), unit(b, r, d), unit(c, d), unit(c, d), unit(m, d)
    for i in range(b):
        shares, tops = [], []
        for row in regions[i]:
            whole = sum(math.exp(float(row @ p)) for p in (*local, *negative))
            shares += [math.exp(float(row @ p)) / whole for p in local]
        expected = sum(sorted(shares, reverse=True)[:k]) / k
        assert regional_score(regions, local, negative, k)[i].item() == pytest.approx(expected, rel=1e-5)
        for j in range(c):
            best = sorted((math.exp(float(row @ local[j])) for row in regions[i]), reverse=True)[:k]
            tops.append(math.exp(float(g[i] @ text[j])) * sum(best) / k)
        torch.testing.assert_close(class_score(g, regions, text, local, k)[i], torch.tensor(tops))
        concept = [math.exp(float(g[i] @ p)) for p in text]
        assert mcm_score(g, text)[i].item() == pytest.approx(max(concept) / sum(concept), rel=1e-5)


def test_one_class_without_negatives_is_always_known():
    g, regions, one = unit(2, 8), unit(2, 5, 8), unit(1, 8)
    torch.testing.assert_close(mcm_score(g, one), torch.ones(2))
    torch.testing.assert_close(regional_score(regions, one, unit(0, 8), 3), torch.ones(2))


def test_scores_do_not_depend_on_the_order_of_regions_or_negatives():
    g, regions, text, local, negative = unit(2, 8), unit(2, 9, 8), unit(3, 8), unit(3, 8), unit(4, 8)
    mixed = regions[:, torch.randperm(9)]
    torch.testing.assert_close(
        regional_score(regions, local, negative, 4), regional_score(mixed, local, negative[torch.randperm(4)], 4)
    )
    torch.testing.assert_close(class_score(g, regions, text, local, 4), class_score(g, mixed, text, local, 4))


# ---- training ------------------------------------------------------------------------------------------------------


def batch_of(module, b=3, v=4):
    generator = torch.Generator().manual_seed(3)
    size = module.backbone.image_size
    return {
        "views": torch.randint(0, 256, (b, v, 3, size, size), generator=generator, dtype=torch.uint8),
        "label": torch.arange(b) % len(module.classes),
        "name": [str(i) for i in range(b)],
    }


def test_views_are_ordered_by_their_own_class():
    module = tiny()
    batch = batch_of(module)
    positive, negative = module.select_views(batch["views"], batch["label"])
    for i, label in enumerate(batch["label"].tolist()):
        g, regions = module.encode_image(batch["views"][i])
        order = (g @ module.text("global")[label]).argsort(descending=True)
        torch.testing.assert_close(positive[:, i], regions[order[:2]])
        torch.testing.assert_close(negative[i], regions[order[-1]])


def test_kept_views_are_not_encoded_again(monkeypatch):
    module = tiny()
    batch = {**batch_of(module), "view_key": torch.tensor([7, 3, 5])}
    first = module.select_views(batch["views"], batch["label"], batch["view_key"])
    monkeypatch.setattr(module, "encode_image", lambda _: pytest.fail("encoded again"))
    order = torch.tensor([2, 0, 1])
    again = module.select_views(batch["views"][order], batch["label"][order], batch["view_key"][order])
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(b, a[:, order] if a.ndim == 4 else a[order], rtol=0, atol=0)


def test_mean_over_views_is_the_mean_of_their_losses():
    module = tiny()
    batch = batch_of(module)
    positive, negative = module.select_views(batch["views"], batch["label"])
    together = module.loss(positive, negative, batch["label"])
    apart = [module.loss(view, negative, batch["label"])["loss"] for view in positive]
    torch.testing.assert_close(together["loss"], torch.stack(apart).mean())


def test_only_prompts_train_and_the_backbone_stays_in_eval_mode():
    module = tiny()
    module.train()
    assert not module.backbone.training
    module.training_step(batch_of(module), 0).backward()
    got = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert got == {"prompts.local", "prompts.negative"}


@pytest.mark.parametrize("step_per_view", [True, False])
def test_training_lowers_the_loss(step_per_view):
    module = tiny(step_per_view=step_per_view, lr=0.02, warmup_epochs=0)
    batch = batch_of(module, b=6)

    def value():
        with torch.no_grad():
            return module.loss(*module.select_views(batch["views"], batch["label"]), batch["label"])["loss"].item()

    before = value()
    trainer = quiet(max_epochs=10)
    trainer.fit(module, torch.utils.data.DataLoader([batch], batch_size=None))
    assert trainer.global_step == (20 if step_per_view else 10)
    assert value() < 0.8 * before


def test_learning_rate_is_the_authors_schedule():
    module = tiny()
    rates = [module.rate(epoch, 30) for epoch in range(30)]
    assert rates[0] == 1e-5 and rates[1] == 0.002
    assert rates[16] == pytest.approx(0.001)  # half of the cosine after 15 epochs
    assert rates[29] == pytest.approx(0.001 * (1 + math.cos(math.pi * 28 / 30)))


def test_without_negatives_only_the_positive_loss_remains():
    module = tiny(negatives=0)
    batch = batch_of(module)
    parts = module.loss(*module.select_views(batch["views"], batch["label"]), batch["label"])
    torch.testing.assert_close(parts["loss"], parts["positive"])
    assert "prompts.negative" not in module.state_dict()
    assert module.predict(batch["views"][:, 0])["score"].isfinite().all()


def test_mcm_baseline_trains_nothing(tmp_path):
    module = tiny(local=False)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    data = FewShotOODDataModule(batch_size=16, shots=1, val_shots=1, views=3, embedded_test=1)
    trainer = quiet(max_epochs=5)
    trainer.fit(module, data)
    assert trainer.current_epoch == 1 and not [p for p in module.parameters() if p.requires_grad]
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items() if key != "threshold")
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        g, _ = module.encode_image(image)
    torch.testing.assert_close(module.predict(image)["score"], mcm_score(g, module.text("global")))
    with pytest.raises(ZooError, match="nothing to train"):
        module.loss(torch.zeros(1, 1, 16, 16), torch.zeros(1, 16, 16), torch.zeros(1, dtype=torch.long))


def test_text_features_are_kept_until_weights_change(monkeypatch):
    module = tiny().eval()
    image = torch.rand(1, 3, 32, 32)
    first = module.predict(image)["score"]
    encode, calls = module.encode_text, []
    monkeypatch.setattr(module, "encode_text", lambda which: calls.append(which) or encode(which))
    torch.testing.assert_close(module.predict(image)["score"], first)
    assert not calls
    with torch.no_grad():
        module.prompts.local.add_(torch.randn_like(module.prompts.local))
    assert not torch.equal(module.predict(image)["score"], first)
    assert calls == ["local"]
    with torch.no_grad():
        module.backbone.model.text_projection.weight.mul_(-1)
    module.predict(image)
    assert calls == ["local", "global", "local", "negative"]


def test_export_after_training_holds_the_trained_prompts():
    module = tiny().eval()
    image = torch.rand(2, 3, 32, 32)
    module.predict(image)  # text features of the untrained prompts are now kept
    batch = batch_of(module)
    optimizer = torch.optim.SGD(module.prompts.parameters(), lr=1.0)
    module.training_step(batch, 0).backward()  # a plain loop, never leaving eval mode
    optimizer.step()
    exported = torch.export.export(module, (image,)).module()(image)
    with torch.no_grad():
        torch.testing.assert_close(exported, module(image))


# ---- prediction, threshold -----------------------------------------------------------------------------------------


def test_predict_agrees_with_forward_and_batches():
    module = tiny().eval()
    image = torch.rand(3, 3, 32, 32)
    out = module.predict(image)
    with torch.no_grad():
        scores, score = module(image)
    assert torch.equal(out["class"], scores.argmax(-1))
    torch.testing.assert_close(out["score"], score)
    assert ((out["probability"] >= 1 / 6) & (out["probability"] <= 1)).all()
    for i in range(3):
        one = module.predict(image[i : i + 1])
        torch.testing.assert_close(one["score"], out["score"][i : i + 1], rtol=1e-5, atol=1e-6)
    step = module.predict_step({"image": image, "name": ["a", "b", "c"]}, 0)
    assert step["class_name"] == [module.classes[i] for i in step["class"].tolist()]
    torch.testing.assert_close(step["score"], out["score"])


def test_threshold_keeps_its_share_of_known_images():
    module = tiny()
    assert not module.predict(torch.rand(2, 3, 32, 32))["is_ood"].any()  # nothing is flagged before it is set
    scores = torch.arange(100.0)[torch.randperm(100)]
    module.calibrate(scores)
    assert (scores >= module.threshold).float().mean().item() == pytest.approx(0.95)
    module.calibrate(torch.full((10,), 9.0))  # above any score
    assert module.predict(torch.rand(2, 3, 32, 32))["is_ood"].all()


def test_other_sizes_are_resized_and_cropped():
    module = tiny().eval()
    image = torch.rand(1, 3, 32, 32)
    wide = torch.cat([torch.zeros(1, 3, 32, 8), image, torch.zeros(1, 3, 32, 8)], 3)
    torch.testing.assert_close(module.predict(wide)["score"], module.predict(image)["score"])
    assert module.predict(torch.rand(1, 3, 41, 97))["score"].isfinite().all()
    whole = (image * 255).round().to(torch.uint8)
    torch.testing.assert_close(module.predict(whole)["score"], module.predict(whole.float() / 255)["score"])


# ---- classes, checkpoints, backbones -------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [["cat", "dog"], ["cat", "dog", "cow", "hen", "pig", "fox"]])
def test_other_classes_start_their_prompts_anew(tmp_path, classes, caplog):
    module = tiny()
    module.calibrate(torch.ones(3))
    module.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        other = LocalPrompt.from_pretrained(tmp_path, classes=classes)  # also where there are as many
    assert "prompts.local" in caplog.text
    state, own = other.state_dict(), module.state_dict()
    assert other.classes == classes and other.threshold == -math.inf
    assert state["prompts.local"].shape[0] == len(classes)
    assert not torch.equal(state["prompts.local"][:2], own["prompts.local"][:2])
    for key in own.keys() - {"prompts.local", "prompts.local_names", "threshold"}:
        assert torch.equal(state[key], own[key]), key
    same = LocalPrompt.from_pretrained(tmp_path)
    assert torch.equal(same.prompts.local, module.prompts.local) and same.threshold == 1


def test_a_backbone_by_folder_stays_out_of_the_checkpoint(tmp_path):
    clip = load_clip(TINY_CLIP)
    clip.save_pretrained(tmp_path / "clip")
    hyper = {**LocalPrompt.variant("tiny"), "backbone": str(tmp_path / "clip"), "tokenizer": "embedded"}
    module = LocalPrompt(**hyper)
    module.save_pretrained(tmp_path / "saved")
    assert set(module.saved_state_dict()) == {"prompts.local", "prompts.local_names", "prompts.negative", "threshold"}
    again = LocalPrompt.from_pretrained(tmp_path / "saved")
    image = torch.rand(2, 3, 32, 32)
    assert torch.equal(again.predict(image)["score"], module.predict(image)["score"])
    live = LocalPrompt.from_backbone(clip, **{k: v for k, v in hyper.items() if k not in ("backbone", "tokenizer")})
    live.prompts.load_state_dict(module.prompts.state_dict())
    torch.testing.assert_close(live.predict(image)["score"], module.predict(image)["score"])
    live.save_pretrained(tmp_path / "live")  # its weights are part of this one
    torch.testing.assert_close(LocalPrompt.from_pretrained(tmp_path / "live").predict(image), live.predict(image))
    with pytest.raises(ZooError, match="No tokenizer for this backbone"):
        LocalPrompt(**{**hyper, "tokenizer": "auto"})


def test_global_prompts_can_be_replaced_without_retraining():
    module = tiny(global_context=3).eval()
    image = torch.rand(2, 3, 32, 32)
    before = module.predict(image)["score"]
    local = module.text("local").clone()
    module.use_global_prompts(torch.randn(3, 32))
    assert not torch.equal(module.predict(image)["score"], before)
    assert torch.equal(module.text("local"), local)
    assert "prompts.global_vectors" in module.state_dict() and len(list(module.prompts.parameters())) == 2
    with pytest.raises(ValueError, match="global_context"):
        tiny().use_global_prompts(torch.randn(3, 32))


def test_words_in_the_place_of_vectors_give_the_template():
    """Trained global prompts that equal the embeddings of 'a photo of a' are the hand-written template."""
    module = tiny(global_context=4)
    words = tiny()
    words.backbone.load_state_dict(module.backbone.state_dict())
    ids = EmbeddedTokenizer(80).encode("a photo of a")
    module.use_global_prompts(module.backbone.embed(torch.tensor(ids)))
    torch.testing.assert_close(module.encode_text("global"), words.encode_text("global"))


def test_conversion_reads_sizes_and_drops_fixed_vectors(golden):
    learner = {
        "local_ctx": torch.randn(6, 4, 32), "neg_ctx": torch.randn(4, 4, 32), "token_prefix": torch.randn(6, 1, 32),
        "token_suffix": torch.randn(6, 19, 32), "neg_token_prefix": torch.randn(4, 1, 32),
        "neg_token_suffix": torch.randn(4, 19, 32),
    }  # fmt: skip
    hyper, state = LocalPrompt.convert_state_dict({"state_dict": learner, "epoch": 30})
    assert hyper == {"classes": [f"class {i}" for i in range(6)], "context": 4, "negatives": 4}
    module = LocalPrompt.from_variant("tiny", **hyper)
    backbone = {k: v for k, v in module.state_dict().items() if k.startswith("backbone.")}
    module.load_state_dict({**backbone, **state})
    assert torch.equal(module.prompts.local, learner["local_ctx"])
    with pytest.raises(ZooError, match="neg_ctx"):
        LocalPrompt.convert_state_dict({"state_dict": {"local_ctx": torch.zeros(1, 1, 1)}})


# ---- names, tokens, bad input --------------------------------------------------------------------------------------


def test_embedded_tokenizer_spells_what_it_does_not_know():
    tokenizer = EmbeddedTokenizer(80)
    known, spelled = tokenizer.encode("Red square."), tokenizer.encode("cat")
    assert len(known) == 3 and len(spelled) == 4 and spelled[-1] == 2
    assert tokenizer.encode("cat") != tokenizer.encode("c a t") and tokenizer.encode("é") == [1, 2]
    assert max(known) < tokenizer.bos < tokenizer.eos == 79
    assert EmbeddedTokenizer(60).encode("hourglass") != tokenizer.encode("hourglass")  # spelled where it does not fit
    with pytest.raises(ValueError, match="vocab_size"):
        EmbeddedTokenizer(20)


def test_class_names():
    assert class_names(["polar_bear", " cat "]) == ["polar bear", "cat"]
    assert len(class_names("imagenet")) == 1000 and class_names("imagenet")[1] == "goldfish"
    for bad in ([], ["cat", " "]):
        with pytest.raises(ValueError, match="class name"):
            class_names(bad)
    with pytest.raises(ValueError, match="imagenet"):
        class_names("cifar")


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({"regions": 17}, "16 regions"),
        ({"score_regions": 17}, "16 regions"),
        ({"classes": ["unpronounceable creature"]}, "unpronounceable creature.*24 positions"),
        ({"context": 20}, "24 positions"),
        ({"template": "a photo"}, "template"),
        ({"temperature": 0.0}, "temperature"),
        ({"negatives": -1}, "negatives=-1"),
    ],
)
def test_impossible_sizes_are_refused(overrides, match):
    with pytest.raises(ValueError, match=match):
        tiny(**overrides)


def test_bad_inputs_are_refused():
    module = tiny()
    with pytest.raises(ValueError, match="image"):
        module.predict(torch.rand(2, 1, 32, 32))
    with pytest.raises(ValueError, match="NaN"):
        module.predict(torch.full((1, 3, 32, 32), math.nan))
    batch = batch_of(module, v=2)
    with pytest.raises(ValueError, match="2 positives and 1 negative"):
        module.select_views(batch["views"], batch["label"])
    batch = batch_of(module)
    batch["label"] = torch.tensor([0, 1, 6])
    with pytest.raises(ValueError, match="knows 6 classes"):
        module.training_step(batch, 0)
    with pytest.raises(TypeError, match="text_model"):
        LocalPrompt.from_backbone(nn.Linear(2, 2))
    with pytest.raises(ZooError, match="No CLIP model"):
        LocalPrompt(classes=TINY_CLASSES, backbone="/nowhere/clip")


def test_a_foreign_vocabulary_needs_its_tokenizer():
    config = {**TINY_CLIP, "text_config": {**TINY_CLIP["text_config"], "vocab_size": 49408}}
    with pytest.raises(ValueError, match="tokenizer"):
        LocalPrompt.from_backbone(load_clip(config), classes=["cat"])
