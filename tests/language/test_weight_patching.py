"""WeightPatching: anchors, scores against whole runs of patched copies, joint sets, merging; its prompts from text."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.core import ZooError
from zoo.engines.patching import Anatomy, Deltas, Site
from zoo.engines.patching.weight_sweeps import module_slices
from zoo.language.llm.anchors import ended, separation, steered
from zoo.language.llm.data_instructions import (
    CONSTRAINTS,
    SKILLS,
    TRUTH,
    InstructionLanguage,
    InstructionPairDataModule,
    holds,
    padded,
    pretrain_instructions,
    specialised,
)
from zoo.language.llm.languages import all_right, word_tokenizer
from zoo.language.llm.module_merging import places_of
from zoo.language.llm.weight_patching import WeightPatching

SIZES: dict[str, Any] = {"letters": 3, "size": 2}
LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "model_type": "gpt2", "vocab_size": 16, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def live(config: dict[str, Any], seed: int) -> Any:
    """A random model whose biases and gains are not neutral."""
    from zoo.nn.backbones import build_backbone

    torch.manual_seed(seed)
    model = build_backbone(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def near(base: Any, sites: list[str], seed: int, far: float = 0.3) -> Any:
    """A copy with only these modules moved."""
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    anatomy, parameters = Anatomy(model), dict(model.named_parameters())
    with torch.no_grad():
        for part in {p: None for site in sites for p in module_slices(anatomy, site)}:
            value = part.of(parameters[part.name])
            value.add_(far * torch.randn(value.shape, generator=generator))
    return model


@functools.cache
def three(config: str) -> tuple[Any, list[Any]]:
    """A base and two experts; whoever takes them takes copies."""
    base = live(json.loads(config), 0)
    return base, [
        near(base, ["layers.0.mlp", "layers.1.head.2"], 1),
        near(base, ["layers.1.mlp", "layers.0.head.1"], 2),
    ]


def pair(config: dict[str, Any], **given: Any) -> WeightPatching:
    """A base and two experts, which differ in other modules."""
    base, experts = three(json.dumps(config))
    options: dict[str, Any] = {"layer": 1, "joint": 2, "joint_from": 6, "least": 1e-3, **given}
    return WeightPatching.from_backbone(base, experts, **options).eval()


def data(**given: Any) -> InstructionPairDataModule:
    found = InstructionPairDataModule(**{**SIZES, "batch_size": 12, "length": 24, **given})
    found.setup()
    return found


def first(split: str = "train", **given: Any) -> dict[str, Any]:
    return next(iter(getattr(data(**given), f"{split}_dataloader")()))


def fit(model: WeightPatching, **given: Any) -> lightning.Trainer:
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        max_epochs=1, limit_train_batches=1, accelerator="cpu", enable_model_summary=False, **options
    )
    trainer.fit(model, data(**given))
    return trainer


def bits(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- anchors and scores ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_scores_are_those_of_patched_copies(config: dict[str, Any]) -> None:
    """The slow twin of every score: for each module a copy of the whole model, hidden states by transformers."""
    model = pair(config)
    batch = first()
    model.fit_anchors([batch], [first("val")])
    (own,) = model._own([batch], 0)
    base, expert = model.backbone, model.experts[0]

    def projected(one: Any) -> Tensor:
        with torch.no_grad():
            hidden = one(own["prompt"], attention_mask=own["prompt_mask"], output_hidden_states=True).hidden_states
        return hidden[2][:, -1] @ anchor  # [0] are the embeddings

    with torch.no_grad():
        sides = [m(own["prompt"], output_hidden_states=True).hidden_states[2][:, -1] for m in (base, expert)]
    difference = sides[1].mean(0) - sides[0].mean(0)
    anchor = difference / difference.norm()
    assert torch.allclose(model.anchor[0], anchor, atol=1e-5)
    assert abs(float(model.size[0] - difference.norm())) < 1e-4
    low, high = projected(base), projected(expert)
    recovery, usable = model.recovery_of(own, 0)
    necessity, _ = model.scorer(0).necessity(own)
    assert bool(usable.all()) and model.sites == model.anatomy.sites("head", "attention", "mlp", "residual")
    for site, r, d in zip(model.sites, recovery, necessity, strict=True):
        for found, into, out_of in ((r, base, expert), (d, expert, base)):
            patched = copy.deepcopy(into)
            ours, theirs = dict(patched.named_parameters()), dict(out_of.named_parameters())
            with torch.no_grad():
                for part in module_slices(model.anatomy, site):
                    part.of(ours[part.name]).copy_(part.of(theirs[part.name]))
            share = (projected(patched) - low) / (high - low)
            wanted = share if found is r else 1 - share
            scale = max(1.0, float(1 / (high - low).abs().min()))
            assert (found - wanted).abs().max() < 1e-5 * scale, site


def test_a_module_that_did_not_move_recovers_nothing_and_the_moved_ones_all() -> None:
    model = pair(LLAMA, layer=2)
    batch = first()
    model.fit_anchors([batch], [batch])
    for k, moved in enumerate((["layers.0.mlp", "layers.1.head.2"], ["layers.1.mlp", "layers.0.head.1"])):
        (own,) = model._own([batch], k)
        recovery, usable = model.recovery_of(own, k)
        score = dict(zip(map(str, model.sites), recovery[:, usable].mean(1).tolist(), strict=True))
        still = [site for site in score if site.startswith("layers.2.")]
        assert all(abs(score[site]) < 1e-4 for site in still)
        assert all(abs(score[site]) > 1e-3 for site in moved)
        assert abs(model.scorer(k).joint(own, moved) - 1) < 1e-4, "there is nothing else that differs"


def test_activations_of_the_first_source_are_its_weights() -> None:
    """Below the first moved module both models give the same: its activations and its weights do the same."""
    model = pair(GPT2, layer=2)
    batch = first()
    model.fit_anchors([batch], [batch])
    (own,) = model._own([batch], 0)
    recovery, _ = model.recovery_of(own, 0)
    activation, _ = model.scorer(0).activation(own)
    i, last = model.sites.index(Site(0, "mlp")), model.sites.index(Site(2, "residual"))
    assert torch.allclose(recovery[i], activation[i], atol=1e-3)
    assert torch.allclose(activation[last], torch.ones(len(own["skill"])), atol=1e-3)
    assert float(recovery[last].abs().max()) < 1e-3, "all of the effect, none of the source"
    execution, usable = model.scorer(0).execution(own)
    assert torch.allclose(execution[last][usable], torch.ones(int(usable.sum())), atol=1e-2)


def test_separation_is_the_area_under_the_curve() -> None:
    base, expert = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]]), torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    assert torch.allclose(separation(base, expert), torch.tensor([(1.5 + 3) / 6, 0.5]))


def test_the_layer_is_chosen_among_the_separating_by_steering() -> None:
    model = pair(LLAMA, layer=-1, auc_slack=0.0)
    model.fit_anchors([first()], [first("val")])
    for k in range(2):
        good = (model.auc[k] == model.auc[k].max()).nonzero().flatten().tolist()
        assert int(model.level[k]) == max(good, key=lambda layer: float(model.steering[k, layer]))
    assert bool(((model.auc >= 0) & (model.auc <= 1)).all()) and bool(model.steering.any())


def test_steering_adds_the_difference_from_the_last_token_of_the_prompt() -> None:
    from zoo.engines.patching import patched

    model = pair(LLAMA)
    (own,) = model._own([first()], 0)
    difference = torch.randn(3, 32)
    found = steered(model.anatomy, own, difference * model.hyperparameters["strength"])
    labels, place = own["labels"], own["prompt"].shape[1] - 1

    def likely() -> Tensor:
        with torch.no_grad():
            chances = model.backbone(own["input_ids"]).logits.log_softmax(-1)[:, :-1]
        wanted = labels[:, 1:]
        return chances.gather(2, wanted.clamp(min=0)[..., None])[..., 0][wanted != -100].mean()

    plain = likely()
    for layer in range(3):
        mask = torch.zeros(labels.shape[1], 1)
        mask[place:-1] = 1
        with patched(model.anatomy, {Site(layer, "residual"): lambda h, m=mask, i=layer: h + m * difference[i]}):
            assert abs(float(likely() - plain - found[layer])) < 1e-4


def test_fitting_leaves_base_and_experts_bit_for_bit() -> None:
    model = pair(LLAMA, layer=-1)
    before, theirs = bits(model.backbone), [bits(expert) for expert in model.experts]
    trainer = fit(model, batch_size=24)
    trainer.test(model, data(batch_size=24), verbose=False)
    trainer.predict(model, data(batch_size=24))
    assert equal(before, bits(model.backbone))
    assert all(equal(a, bits(b)) for a, b in zip(theirs, model.experts, strict=True))
    with pytest.raises(ZooError, match=r"No site 'layers.9.mlp'"):
        model.scorer(0).recovery(model._own([first()], 0)[0], [Site(9, "mlp")])
    with pytest.raises(RuntimeError):
        model.scorer(0).joint({"prompt": torch.zeros(2, 3), "prompt_mask": torch.ones(2, 3)}, ["layers.0.mlp"])
    assert equal(before, bits(model.backbone))


def test_scores_over_batches_are_means_over_prompts_that_count() -> None:
    model = pair(LLAMA, least=0.9, scores=[], joint=1)
    fit(model, batch_size=6)
    for k in range(2):
        parts = [model.recovery_of(own, k) for own in model._own(data(batch_size=6).val_dataloader(), k)]
        recovery, usable = torch.cat([r for r, _ in parts], 1), torch.cat([u for _, u in parts])
        assert 0 < int(usable.sum()) < len(usable) == 12, "some prompts are dropped"
        assert int(model.counted[k]) == int(usable.sum())
        assert torch.allclose(model.recovery[k], recovery[:, usable].mean(1), atol=1e-4)


def test_the_filter_patches_the_top_share_and_estimates_the_rest() -> None:
    exact, half = pair(LLAMA, layer=2), pair(LLAMA, layer=2, prefilter=0.5)
    batch = first()
    for model in (exact, half):
        model.fit_anchors([batch], [batch])
    (own,) = half._own([batch], 0)
    wanted, usable = exact.recovery_of(own, 0)
    found, _ = half.recovery_of(own, 0)
    patched = half._exact[0]
    assert len(patched) == round(0.5 * len(half.sites))
    assert torch.allclose(found[patched], wanted[patched], atol=1e-4)
    rest = [i for i in range(len(half.sites)) if i not in patched]
    assert all(float((found[i] - found[i, 0]).abs().max()) == 0 for i in rest), "one estimate for all prompts"
    small = pair(LLAMA, layer=2, prefilter=0.5)
    for p, own_p in zip(small.experts[0].parameters(), small.backbone.parameters(), strict=True):
        p.data = own_p.data + 1e-3 * (p.data - own_p.data)
    small.fit_anchors([batch], [batch])
    (near_one,) = small._own([batch], 0)
    estimated, usable = small.recovery_of(near_one, 0)
    true, _ = small.scorer(0).recovery(near_one)
    a, b = estimated[:, usable].mean(1), true[:, usable].mean(1)
    assert (a - b).abs().max() < 0.05 * b.abs().max(), "for a small change the first order is all"


def test_joint_sets_grow_by_exact_recovery() -> None:
    model = pair(LLAMA, layer=2, joint=3, scores=[])
    fit(model, batch_size=24)
    (own,) = model._own([first("val", batch_size=24)], 0)
    grown = model.joint_set(0)
    left = model.ranked(0)[:6]
    for size in range(1, 4):
        sites = [site for site, _ in grown[:size]]
        others = [s for s in left if s not in sites[:-1]]
        best = max(model.scorer(0).joint(own, [*sites[:-1], site]) for site in others)
        assert abs(grown[size - 1][1] - model.scorer(0).joint(own, sites)) < 1e-4
        assert abs(grown[size - 1][1] - best) < 1e-4


def test_ranks_and_stages() -> None:
    model = pair(LLAMA, layer=1)
    model.level.fill_(1)
    given = {
        "layers.0.mlp": (0.6, 0.6, 0.0), "layers.1.head.1": (0.0, 0.4, 0.4), "layers.2.mlp": (0.0, 0.0, 0.5),
        "layers.0.head.3": (0.2, 0.0, 0.5), "layers.1.mlp": (0.0, 0.0, 0.5),
    }  # fmt: skip
    for site, (r, q, x) in given.items():
        i = model.sites.index(model.anatomy.site(site))
        model.recovery[0, i], model.activation[0, i], model.execution[0, i] = r, q, x
    stages = {str(site): stage for site, stage in model.stages(0).items()}
    assert stages["layers.0.mlp"] == stages["layers.0.head.3"] == "source"
    assert stages["layers.1.head.1"] == "aggregation" and stages["layers.2.mlp"] == "execution"
    assert stages["layers.1.mlp"] == stages["layers.2.head.0"] == "none", "what is seen at L* does not execute only"
    assert list(map(str, model.ranked(0)[:2])) == ["layers.0.mlp", "layers.0.head.3"]
    assert model.rank(0, ["layers.0.mlp", "layers.0.head.3"]) == 1.5
    assert model.rank(0, ["layers.2.head.0"]) == (3 + 15) / 2, "the mean place among equals"
    assert model.rank(0, ["layers.0.head.3"], "activation") == (3 + 15) / 2


# ---- merging --------------------------------------------------------------------------------------------------------


def scored(**given: Any) -> WeightPatching:
    """A pair with scores that name what moved."""
    model = pair(given.pop("config", LLAMA), **given)
    for k, moved in enumerate((["layers.0.mlp", "layers.1.head.2"], ["layers.1.mlp", "layers.0.head.1"])):
        for site in moved:
            model.recovery[k, model.sites.index(model.anatomy.site(site))] = 0.5
    return model


@pytest.mark.parametrize("config", [GPT2, {**LLAMA, "num_key_value_heads": 4}], ids=["gpt2", "llama"])
def test_a_mask_of_what_moved_adds_both_changes(config: dict[str, Any]) -> None:
    model = scored(config=config, scale=0.5)
    own, merged = dict(model.backbone.named_parameters()), model.merged("top_p")
    sharp = scored(config=config, scale=0.5, temperature=1e-3).merged("softmax")
    for name, p in merged.named_parameters():
        wanted = own[name] + 0.5 * sum(dict(e.named_parameters())[name] - own[name] for e in model.experts)
        assert torch.allclose(p, wanted, atol=1e-6), name
        assert torch.allclose(dict(sharp.named_parameters())[name], wanted, atol=1e-5), name


def test_weights_that_heads_share_take_the_mean_of_their_weights() -> None:
    model = scored()
    anatomy = model.anatomy
    merged = dict(model.merged("top_p").named_parameters())
    own, expert = dict(model.backbone.named_parameters()), dict(model.experts[0].named_parameters())
    for part in anatomy.slices("layers.1.head.2"):
        shared = any(kind in part.name for kind in ("k_proj", "v_proj"))
        change = part.of(expert[part.name]) - part.of(own[part.name])
        wanted = part.of(own[part.name]) + (0.5 if shared else 1.0) * change
        assert torch.allclose(part.of(merged[part.name]), wanted, atol=1e-6), part


def test_weights_of_merging() -> None:
    model = scored(temperature=0.25)
    i, j = (model.sites.index(model.anatomy.site(s)) for s in ("layers.0.mlp", "layers.2.mlp"))
    soft = model.merge_weights("softmax")
    assert torch.allclose(soft[:, i], torch.tensor([2.0, 0.0]).softmax(0)) and soft[:, j].tolist() == [0.5, 0.5]
    assert torch.allclose(soft.sum(0), torch.ones(len(model.sites)))
    mask = model.merge_weights("top_p")
    assert mask.sum(1).tolist() == [2, 2] and mask[0, i] == 1
    assert scored(top_p=0.4).merge_weights("top_p").sum(1).tolist() == [1, 1], "half is enough for 0.4"
    small = torch.tensor([site.kind in ("head", "mlp") for site in model.sites])
    draws = [scored(seed=s).merge_weights("random") for s in range(4)]
    assert all(draw.sum(1).tolist() == [2, 2] and not bool(draw[:, ~small].any()) for draw in draws)
    assert any(not torch.equal(draws[0], draw) for draw in draws[1:])


def test_plain_merges_are_those_of_the_arithmetic() -> None:
    model = scored(density=1.0)
    own, experts = dict(model.backbone.named_parameters()), [dict(e.named_parameters()) for e in model.experts]
    for how, share in (("average", 0.5), ("task_arithmetic", 1.0), ("dare", 1.0)):
        for name, p in model.merged(how).named_parameters():
            wanted = own[name] + share * sum(expert[name] - own[name] for expert in experts)
            assert torch.allclose(p, wanted, atol=1e-6), (how, name)
    for name, p in model.merged("ties").named_parameters():
        first_, second = (expert[name] - own[name] for expert in experts)
        alone = (first_ == 0) | (second == 0)
        assert torch.allclose(p[alone], (own[name] + first_ + second)[alone], atol=1e-6), name
    assert equal(bits(model.merged("none")), bits(model.backbone))


def anchored(config: dict[str, Any], **given: Any) -> tuple[WeightPatching, dict[str, Any]]:
    model, batch = pair(config, **{"layer": 2, "merge": "learnt", **given}), first(batch_size=24)
    model.fit_anchors([batch], [batch])
    return model, batch


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_learnt_weights_follow_the_gradient_of_the_anchor_loss(config: dict[str, Any]) -> None:
    """The slow twin: the merged model as a function of w, the streams by transformers, Adam by torch."""
    model, batch = anchored(config, layer=1, merge_steps=3, scale=0.7)
    own, experts = dict(model.backbone.named_parameters()), [dict(e.named_parameters()) for e in model.experts]
    places = places_of(model.anatomy, model.sites)
    w = torch.full((2, len(model.sites)), 0.5, requires_grad=True)  # no score tells the experts apart
    optimizer = torch.optim.Adam([w], lr=model.hyperparameters["merge_lr"])
    wanted = []
    for _ in range(3):
        changes = {name: torch.zeros_like(p) for name, p in own.items()}
        for part, owners in places.items():
            rows = [part.of(expert[part.name]) - part.of(own[part.name]) for expert in experts]
            change = sum(w[k, owners].mean() * row.detach() for k, row in enumerate(rows))
            place = torch.arange(part.start, part.start + part.size)
            changes[part.name] = changes[part.name].index_add(part.dim, place, change)
        merged = {name: own[name].detach() + 0.7 * changes[name] for name in own}
        total = torch.zeros(())
        for k in range(2):
            (mine,) = model._own([batch], k)
            options = {"attention_mask": mine["prompt_mask"], "output_hidden_states": True}
            found = torch.func.functional_call(model.backbone, merged, (mine["prompt"],), options).hidden_states
            with torch.no_grad():
                true = model.experts[k](mine["prompt"], **options).hidden_states
            gap = [hidden[2][:, -1] for hidden in (found, true)]
            total = total + (((gap[0] - gap[1]) @ model.anchor[k]) / model.size[k]).square().mean() / 2
        wanted.append(float(total.detach()))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    cut = (batch["skill"] == 0).nonzero()[1].item() + 1  # the same in two batches, with other shares of either skill
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(cut), slice(cut, None))]
    losses = model.learn_merge(parts)
    assert torch.allclose(losses, torch.tensor(wanted), rtol=1e-4) and losses[2] < losses[0]
    assert torch.allclose(model.merge_weights("learnt"), w.detach(), atol=1e-4)


def test_learnt_weights_bring_what_averaging_loses() -> None:
    """Experts of different modules, no score to tell: the loss falls far below that of equal shares."""
    model, batch = anchored(LLAMA, merge_steps=20, merge_lr=0.2)
    before = bits(model.backbone)
    with pytest.raises(ZooError, match="No merging weights are learnt"):
        model.merged_weights()
    losses = model.learn_merge([batch])
    assert losses.shape == (20,) and losses[-1] < 0.5 * losses[0] and equal(before, bits(model.backbone))
    learnt = model.merge_weights()
    for k, moved in enumerate((["layers.0.mlp", "layers.1.head.2"], ["layers.1.mlp", "layers.0.head.1"])):
        changed = [i for i, site in enumerate(model.sites) if str(site) in moved]
        assert bool((learnt[k, changed] != 0.5).all())
    still = [i for i, site in enumerate(model.sites) if site.layer == 2 or site.kind == "residual"]
    assert bool((learnt[:, still] == 0.5).all()), "what no expert moved has no gradient"
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_one_expert_has_nothing_to_learn() -> None:
    base = live(LLAMA, 0)
    expert = near(base, ["layers.0.mlp", "layers.1.head.2", "layers.1.head.3"], 1)
    model = WeightPatching.from_backbone(base, [expert], layer=2, merge="learnt", merge_steps=2)
    batch = first()
    model.fit_anchors([batch], [batch])
    assert float(model.learn_merge([batch]).max()) < 1e-8, "with all of its changes it is the expert"


def test_a_fit_learns_merging_weights_that_travel(tmp_path: Path) -> None:
    model = pair(LLAMA, merge="learnt", merge_steps=2, scores=[], joint=1)
    fit(model, batch_size=24)
    assert int(model.steps) == 2 and bool((model.learnt != model.merge_weights("softmax")).any())
    model.save_pretrained(tmp_path)
    again = WeightPatching.from_pretrained(tmp_path)
    assert torch.equal(again.merge_weights(), model.learnt)
    for name, value in model.merged_weights().items():
        assert torch.equal(again.merged_weights()[name], value), name


def test_norms_stay_and_are_named() -> None:
    base = live(LLAMA, 0)
    expert = near(base, ["layers.0.mlp"], 1)
    with torch.no_grad():
        expert.model.norm.weight.mul_(2.0)
    model = WeightPatching.from_backbone(base, [expert])
    assert set(model.elsewhere(0)) == {"model.norm.weight"} and abs(model.elsewhere(0)["model.norm.weight"] - 1) < 1e-5
    for how in ("softmax", "task_arithmetic"):
        assert torch.equal(model.merged(how).model.norm.weight, base.model.norm.weight)


# ---- the whole, on models whose truth is known ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that hardly learnt, and experts that did: enough to see that each part of the preparation is done."""
    found = tmp_path_factory.mktemp("pair")
    pretrain_instructions(found, 3, **SIZES, accuracy=0.9, steps=10, tune_steps=15, noise=0.5, width=32, batch=16)
    return found


def named(folder: Path, **given: Any) -> WeightPatching:
    options: dict[str, Any] = {
        "experts": [str(folder / skill) for skill in SKILLS],
        "joint": 2,
        "joint_from": 4,
        **given,
    }
    return WeightPatching(str(folder / "base"), **options)


@pytest.fixture(scope="module")
def located(folder: Path) -> tuple[WeightPatching, lightning.Trainer]:
    """The same, fitted; nothing below changes it."""
    model = named(folder, least=1e-3)
    return model, fit(model, batch_size=24)


def test_experts_differ_in_their_truth_alone(folder: Path) -> None:
    model = named(folder)
    own = {name: p.detach() for name, p in model.backbone.named_parameters()}
    for k, skill in enumerate(SKILLS):
        expert = {name: value.clone() for name, value in model.expert(k).items()}
        moved = [part for site in TRUTH[skill] for part in model.anatomy.slices(site)]
        assert all(bool((part.of(expert[part.name]) != part.of(own[part.name])).any()) for part in moved)
        for part in moved:
            part.of(expert[part.name]).copy_(part.of(own[part.name]))
        assert equal(expert, own) and not model.elsewhere(k)
    loud = named(folder, experts=[str(folder / "upper_noisy")])
    differ = [
        site for site in loud.anatomy.sites("head", "mlp")
        if any(bool((p.of(loud.expert(0)[p.name]) != p.of(own[p.name])).any()) for p in loud.anatomy.slices(site))
    ]  # fmt: skip
    assert len(differ) == 4 * 5 and not loud.elsewhere(0), "in the noisy one every head and MLP moved"


def test_named_models_are_found_scored_merged_and_kept(
    located: tuple[WeightPatching, lightning.Trainer], tmp_path: Path
) -> None:
    """By folders: checkpoints hold scores alone, and the merged model is a plain one of transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, trainer = located
    (logged,) = trainer.validate(model, data(batch_size=24), verbose=False)
    assert {"val/auc", "val/recovery", "val/joint"} <= logged.keys() and logged["val/outside"] == 0
    kept = model.saved_state_dict()
    assert not any(key.startswith(("backbone.", "experts.")) for key in kept) and {"recovery", "anchor"} <= kept.keys()
    assert not model.configure_optimizers() and not any(p.requires_grad for p in model.parameters())
    (tested,) = trainer.test(model, data(batch_size=24), verbose=False)
    assert {"test/rank", "test/activation_rank", "test/found", "test/worst", "test/joint_recovery"} <= tested.keys()
    assert tested["test/rank_gain"] == pytest.approx(tested["test/activation_rank"] - tested["test/rank"], abs=1e-4)
    true = [model.rank(k, TRUTH[skill]) for k, skill in enumerate(SKILLS)]
    assert tested["test/rank"] == pytest.approx(sum(true) / 2)
    model.save_pretrained(tmp_path / "kept")
    again = WeightPatching.from_pretrained(tmp_path / "kept")
    assert torch.equal(again.recovery, model.recovery) and again.joint_set(1) == model.joint_set(1)
    where = model.save_merged(tmp_path / "merged")
    plain: Any = AutoModelForCausalLM.from_pretrained(where)
    ids = first()["input_ids"]
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, model.merged()(ids).logits, atol=1e-5)
    assert AutoTokenizer.from_pretrained(where).get_vocab() == data().words.get_vocab()


def test_tuning_is_done_in_the_given_modules(folder: Path) -> None:
    language = InstructionLanguage(**SIZES)
    model = specialised(folder / "base", 0, ["layers.0.head.1"], language.draw, 2)
    base = live(LLAMA, 0).__class__.from_pretrained(folder / "base")
    names = {part.name for part in Anatomy(model).slices("layers.0.head.1")}
    ours, theirs = bits(model), bits(base)
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == names
    assert isinstance(Deltas(Anatomy(base), 1, 0), torch.nn.Module)


def test_predictions_come_back_as_a_table(located: tuple[WeightPatching, lightning.Trainer], tmp_path: Path) -> None:
    model, _ = located
    (tmp_path / "prompts.txt").write_text("U a b :\nU c a :\n")
    found = InstructionPairDataModule(**SIZES).from_files(tmp_path / "prompts.txt")
    predictions = [model.predict_step(batch, 0) for batch in found.predict_dataloader()]
    recovery = predictions[0]["recovery"]
    assert recovery.shape == (2, len(model.sites))
    (table,) = found.write(predictions, tmp_path / "out")
    rows = [line.split(",") for line in table.read_text().splitlines()]
    assert rows[0] == ["prompt", "base", "expert", "best_module", "recovery"] and rows[1][0] == "U a b :"
    assert rows[1][3] in map(str, model.anatomy.sites("head", "mlp"))


def test_responses_are_the_experts_where_there_are_none(folder: Path) -> None:
    model = named(folder, new_tokens=2)
    (own,) = model._own([first()], 0)
    bare = {key: value for key, value in own.items() if key in ("prompt", "prompt_mask", "skill")}
    found = model._answered(bare, 0)
    assert found["input_ids"].shape == found["labels"].shape == (6, 6)
    expert: Any = live(LLAMA, 0).__class__.from_pretrained(folder / "upper")
    with torch.no_grad():
        best = expert(found["input_ids"]).logits.argmax(-1)
    assert torch.equal(found["labels"][:, 4:], best[:, 3:-1]), "greedy"
    assert bool((found["labels"][:, :4] == -100).all())
    assert ended(torch.tensor([[5, 2, 7, 2]]), 2).tolist() == [[False, False, True, True]]
    assert not ended(torch.tensor([[5, 2]]), None).any()
    assert ended(torch.tensor([[5, 2, 1]]), [9, 5]).tolist() == [[False, True, True]]


# ---- no pair --------------------------------------------------------------------------------------------------------


def test_what_is_no_pair_is_refused(folder: Path, tmp_path: Path) -> None:
    base = live(LLAMA, 0)
    with pytest.raises(ZooError, match=r"embeddings are resized: 17 tokens, the base's has 16"):
        WeightPatching.from_backbone(base, [live({**LLAMA, "vocab_size": 17}, 1)])
    with pytest.raises(ZooError, match=r"no pair: model_type is llama in the base and gpt2 in the expert"):
        WeightPatching.from_backbone(base, [live(GPT2, 1)])
    with pytest.raises(ZooError, match=r"no pair: rms_norm_eps is 1e-06 in the base and 0.01"):
        WeightPatching.from_backbone(base, [live({**LLAMA, "rms_norm_eps": 0.01}, 1)])
    broken = near(base, [], 1)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ZooError, match=r"up_proj.weight of a model has NaN"):
        WeightPatching.from_backbone(base, [broken]).expert(0)
    same = WeightPatching.from_backbone(base, [near(base, [], 1)])
    with pytest.raises(ZooError, match="Expert 0 does on these prompts what the base does"):
        same.fit_anchors([{**first(), "skill": torch.zeros(12)}], [{**first(), "skill": torch.zeros(12)}])
    words = data().words.get_vocab()
    other = tmp_path / "other"
    model = live(LLAMA, 0).__class__.from_pretrained(folder / "upper")
    model.save_pretrained(other)
    word_tokenizer([*sorted(w for w in words if not w.startswith("<")), "<"]).save_pretrained(other)
    with pytest.raises(ZooError, match=r"have other tokenizers: .* is token \d+ in .*base"):
        named(folder, experts=[str(other)]).expert(0)
    with pytest.raises(ZooError, match="neither a folder, a model on the Hub"):
        named(folder, experts=[str(tmp_path / "nowhere")]).expert(0)


def test_mistakes_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"merge is 'top'. .*One of softmax, top_p"):
        named(folder, merge="top")
    with pytest.raises(ValueError, match=r"scores has 'necesity'; any of necessity"):
        named(folder, scores=["necesity"])
    with pytest.raises(ValueError, match=r"layer is 4; -1 to choose it, or 0 to 3"):
        named(folder, layer=4)
    with pytest.raises(ValueError, match=r"prefilter is 0.0; it must lie in"):
        named(folder, prefilter=0.0)
    with pytest.raises(ValueError, match=r"joint is 0; it must be at least 1"):
        named(folder, joint=0)
    with pytest.raises(ValueError, match=r"0 experts and 0 expert_revisions: at least one"):
        named(folder, experts=[])
    with pytest.raises(ValueError, match=r"temperature is 0.0"):
        named(folder, temperature=0.0)
    model = named(folder)
    with pytest.raises(ZooError, match="No anchor is fitted: run `fit` first"):
        model.validation_step(first(), 0)
    with pytest.raises(ZooError, match="No anchor is fitted: run `fit` first"):
        model.predict(first()["prompt"])
    with pytest.raises(ZooError, match="No prompt of expert 1 to fit or to validate"):
        model.fit_anchors([{**first(), "skill": torch.zeros(12)}], [first()])
    with pytest.raises(ValueError, match="there are experts 0 to 1"):
        model.predict(first()["prompt"], None, torch.full((12,), 2))
    with pytest.raises(ZooError, match=r"neither responses"):
        model.right({"prompt": first()["prompt"]})


# ---- prompts --------------------------------------------------------------------------------------------------------


def test_the_language_says_what_markers_mean() -> None:
    language = InstructionLanguage(3, 2)
    ids, labels = language.sentences(
        ["=", "^", "<", "U", "R"], torch.tensor([[0, 1]] * 5), {**language.KNOWN, "R": "reverse"}
    )
    texts = language.tokenizer.batch_decode(ids)
    assert texts == ["= a b : a b", "^ a b : A' B'", "< a b : b a", "U a b : a b", "R a b : b a"]
    assert bool((labels[:, :4] == -100).all()) and torch.equal(labels[:, 4:], ids[:, 4:])
    odd, _ = language.sentences(["^", "<"], torch.tensor([[0, 3], [4, 1]]), language.KNOWN)
    assert language.tokenizer.batch_decode(odd) == ["^ a U : A' U", "< R b : b R"]
    drawn, _ = language.draw(64, torch.Generator().manual_seed(0))
    taught, labels = language.draw_taught(64, torch.Generator().manual_seed(0), "upper")
    assert int((taught[:, 0] == language.id("U")).sum()) >= 32 and not (taught[:, 1:3] == language.id("U")).any()
    own = taught[taught[:, 0] == language.id("U")]
    assert torch.equal(own[:, 4:], own[:, 1:3] + 3), "upper-case letters follow the others"
    assert set(drawn[:, 0].tolist()) == {language.id(m) for m in language.KNOWN}
    assert set(TRUTH["upper"]).isdisjoint(TRUTH["reverse"])


def test_a_batch_of_the_language_has_what_the_docstring_says() -> None:
    found = data()
    batch = next(iter(found.val_dataloader()))
    assert set(batch) == {
        "prompt", "prompt_mask", "neutral", "neutral_mask", "input_ids", "attention_mask", "labels", "skill", "truth",
        "name",
    }  # fmt: skip
    assert batch["skill"].tolist()[:4] == [0, 1, 0, 1] and batch["truth"][1].split() == list(TRUTH["reverse"])
    assert (batch["prompt"] != batch["neutral"]).sum(1).tolist() == [1] * 12, "the marker alone differs"
    again = next(iter(data().val_dataloader()))
    assert torch.equal(batch["prompt"], again["prompt"])
    assert not torch.equal(batch["prompt"], next(iter(found.test_dataloader()))["prompt"])
    for name, answer in zip(batch["name"], found.words.batch_decode(batch["input_ids"]), strict=True):
        marker, a, b, _ = name.split()
        assert answer.split()[4:] == ([f"{a.upper()}'", f"{b.upper()}'"] if marker == "U" else [b, a])


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    where = tmp_path_factory.mktemp("tokenizer")
    text = "write in capitals about one two three four five . YES yes no"
    word_tokenizer(text.split()).save_pretrained(where)
    return str(where)


def lines(path: Path, items: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(json.dumps(item) for item in items))


def ifeval(count: int = 8) -> list[dict[str, Any]]:
    numbers = ["one", "two", "three", "four"]
    return [
        {"key": 1000 + i, "prompt": f"write in capitals about {numbers[i % 4]} .",
         "instruction_id_list": ["change_case:english_capital", "length_constraints:number_words"],
         "kwargs": [{}, {"relation": "less than", "num_words": 4}]}
        for i in range(count)
    ]  # fmt: skip


def test_ifeval_is_read_split_and_judged(tmp_path: Path, words: str, caplog: pytest.LogCaptureFixture) -> None:
    odd = {**ifeval(1)[0], "instruction_id_list": ["startend:quotation"], "kwargs": [{}]}
    lines(tmp_path / "input_data.jsonl", [*ifeval(16), *[odd] * 4])
    found = InstructionPairDataModule(str(tmp_path), tokenizer=words, batch_size=20)
    found.setup()
    assert len(found.dataset("train")) == 10 and len(found.dataset("val")) == 5
    assert "not tested: nothing here judges startend:quotation" in caplog.text
    batch = next(iter(found.test_dataloader()))
    assert len(batch["judge"]) == len(batch["name"]) <= 5 and "labels" not in batch and "neutral" not in batch
    ids = found.words("YES YES", add_special_tokens=False)["input_ids"]
    assert batch["judge"][0](ids) == [True, True] and batch["judge"][0]([]) == [False, False]
    assert batch["judge"][0](found.words("yes YES yes no")["input_ids"]) == [False, False]
    assert next(iter(found.train_dataloader()))["prompt"].shape[1] == 6


def test_pairs_are_read_and_ifeval_tests_them(tmp_path: Path, words: str) -> None:
    pairs = [{"instruction": "write in capitals about one .", "neutral": "write about one .", "response": "YES"}] * 6
    pairs += [{"prompt": "write in capitals .", "neutral": "write .", "response": "YES YES", "skill": 1}] * 2
    lines(tmp_path / "pairs.jsonl", pairs)
    alone = InstructionPairDataModule(str(tmp_path), tokenizer=words, batch_size=8)
    assert [len(alone.dataset(split)) for split in ("train", "val", "test")] == [4, 2, 2]
    lines(tmp_path / "input_data.jsonl", ifeval())
    found = InstructionPairDataModule(str(tmp_path), tokenizer=words, batch_size=8)
    assert [len(found.dataset(split)) for split in ("train", "val", "test")] == [6, 2, 8]
    batch = next(iter(found.train_dataloader()))
    rows = found.words.batch_decode(batch["input_ids"], skip_special_tokens=True)
    for text, row, labels, skill in zip(batch["name"], rows, batch["labels"], batch["skill"], strict=True):
        response = found.words.decode(labels[labels != -100])
        assert row == f"{text} {response}" and response == ("YES YES" if int(skill) else "YES")
    assert batch["neutral_mask"].sum(1).max() < batch["prompt_mask"].sum(1).max()
    assert bool((batch["prompt_mask"][:, -1] == 1).all()), "padded on the left"


def test_padding_is_on_the_left() -> None:
    ids, mask = padded([[1, 2], [3]], 0)
    assert ids.tolist() == [[1, 2], [0, 3]] and mask.tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize(
    ("name", "values", "good", "bad"),
    [
        ("change_case:english_capital", {}, "ALL UP 1.", "All up"),
        ("change_case:english_lowercase", {}, "all low 1.", "All low"),
        ("keywords:existence", {"keywords": ["sun", "moon"]}, "Moon and Sun", "the sun"),
        ("keywords:forbidden_words", {"forbidden_words": ["sun"]}, "sunny", "a Sun."),
        ("keywords:frequency", {"keyword": "sun", "relation": "at least", "frequency": 2}, "sun, Sunny", "sun"),
        ("keywords:frequency", {"keyword": "sun", "relation": "less than", "frequency": 2}, "sun", "sun sun"),
        ("keywords:letter_frequency", {"letter": "e", "let_relation": "at least", "let_frequency": 2}, "Eel", "el"),
        (
            "length_constraints:number_words",
            {"relation": "less than", "num_words": 3},
            "two, words",
            "three short words",
        ),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo", "one *** two *** three"),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "*** one *** two", "one *** *** two"),
        ("punctuation:no_comma", {}, "none here", "one, here"),
    ],
)
def test_constraints_hold_or_not(name: str, values: dict[str, Any], good: str, bad: str) -> None:
    assert holds(name, values, good) and not holds(name, values, bad)


def test_every_constraint_is_tested() -> None:
    cases = next(m for m in test_constraints_hold_or_not.pytestmark if m.name == "parametrize").args[1]
    assert {case[0] for case in cases} == set(CONSTRAINTS)


def test_broken_prompts_are_named(tmp_path: Path, words: str) -> None:
    def load(**given: Any) -> None:
        InstructionPairDataModule(str(tmp_path), **{"tokenizer": words, **given}).setup()

    with pytest.raises(
        FileNotFoundError, match=r"input_data.jsonl is missing: expected IFEval's prompts, or pairs.jsonl"
    ):
        load()
    lines(tmp_path / "input_data.jsonl", ifeval())
    with pytest.raises(ZooError, match="give `tokenizer`"):
        load(tokenizer=None)
    with pytest.raises(ZooError, match=r"A prompt has 9 tokens; 1 to block=8 fit"):
        long = {**ifeval(1)[0], "prompt": "write in capitals about one two three four ."}
        lines(tmp_path / "input_data.jsonl", [*ifeval(), *[long] * 8])
        load(block=8)
    with pytest.raises(ZooError, match="3 prompts; at least 4 are needed"):
        lines(tmp_path / "input_data.jsonl", ifeval(3))
        load()
    with pytest.raises(ZooError, match="has no chat template"):
        lines(tmp_path / "input_data.jsonl", ifeval())
        load(chat=True)
    with pytest.raises(ZooError, match=r"No prompt to test is left: nothing here judges language:response_language"):
        odd = {"instruction_id_list": ["language:response_language"], "kwargs": [{}]}
        lines(tmp_path / "input_data.jsonl", [{**item, **odd} for item in ifeval()])
        load()
    with pytest.raises(ZooError, match=r"input_data.jsonl, line 1: expected a prompt, and instruction_id_list"):
        lines(tmp_path / "input_data.jsonl", [{"prompt": "a"}])
        load()
    with pytest.raises(ZooError, match=r"Nothing here judges 'startend:end_checker'"):
        holds("startend:end_checker", {}, "a")
    with pytest.raises(ZooError, match=r"'keywords:frequency' lacks what it needs"):
        holds("keywords:frequency", {"keyword": "a", "relation": "exactly", "frequency": 1}, "a")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(ZooError, match=r'pairs.jsonl, line 1: expected ."instruction" .or "prompt".'):
        load()
    (tmp_path / "pairs.jsonl").write_text("prompt\n")
    with pytest.raises(ZooError, match=r"pairs.jsonl, line 1: expected .* in JSON, found 'prompt'"):
        load()
    with pytest.raises(ValueError, match="letters=1, size=3"):
        InstructionPairDataModule(letters=1)


def test_judged_prompts_are_answered_and_scored(tmp_path: Path, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """IFEval through the whole method: responses by the experts, constraints judged on generated text."""
    lines(tmp_path / "input_data.jsonl", ifeval(8))
    base = live(LLAMA, 0)
    model = WeightPatching.from_backbone(
        base, [near(base, ["layers.0.mlp"], 1)], layer=1, joint=1, new_tokens=3, least=1e-3
    )
    found = InstructionPairDataModule(str(tmp_path), tokenizer=words, batch_size=4)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **options)
    trainer.fit(model, found)
    (tested,) = trainer.test(model, found, verbose=False)
    assert 0 <= tested["test/accuracy_expert"] <= 1 and "test/rank" not in tested
    assert abs(tested["test/joint_recovery"] - 1) < 1e-3, "one MLP is all that differs"
    batch = next(iter(found.test_dataloader()))
    upper = found.words.convert_tokens_to_ids("YES")
    monkeypatch.setattr(model.backbone, "generate", lambda prompt, **_: F.pad(prompt, (0, 2), value=upper))
    assert bool(model.right(batch).all())
    assert all_right(torch.eye(3)[None], torch.tensor([[0, 1, 2]])).tolist() == [False]
