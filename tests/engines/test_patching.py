"""Patching by the engine against slow, obvious twins, on a small model of each family."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engines.families import CONFIGS, LAYERS, WORDS, build, every_family
from zoo.core import ZooError
from zoo.engines.patching import (
    FAMILIES,
    KINDS,
    Anatomy,
    Deltas,
    Family,
    Site,
    activation_sweep,
    at,
    capture,
    logit_difference,
    patched,
    path_sweep,
    probability,
    receiver_sweep,
    run,
    same_shape,
    swapped,
    weights_of,
)
from zoo.engines.patching.weights import _changed, exchanged


def prompts(b: int = 3, t: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randint(1, WORDS, (b, t), generator=generator)
    counterfactual = reference.clone()
    counterfactual[:, 2:3] = (counterfactual[:, 2:3] + 7) % WORDS
    return reference, counterfactual


def close(a: Tensor, b: Tensor, within: float = 1e-5) -> None:
    assert (a - b).abs().max() <= within * b.abs().max().clamp(min=1e-6), float((a - b).abs().max())


def test_every_known_family_is_tested() -> None:
    assert set(FAMILIES) == set(CONFIGS)


# ---- values ---------------------------------------------------------------------------------------------------------


@every_family
def test_the_stream_is_the_sum_of_what_is_added(kind: str) -> None:
    anatomy = build(kind)
    reference, _ = prompts()
    with capture(anatomy, anatomy.sites(*KINDS)) as seen, torch.no_grad():
        anatomy.model(reference)
    factor = getattr(anatomy.config, "residual_multiplier", 1.0)  # Granite
    for layer in range(LAYERS):
        added = seen[Site(layer, "attention")] + seen[Site(layer, "mlp")]
        close(seen[Site(layer, "input")] + factor * added, seen[Site(layer, "residual")])
        if layer:
            assert torch.equal(seen[Site(layer, "input")], seen[Site(layer - 1, "residual")])


@every_family
def test_heads_are_what_attention_is_made_of(kind: str) -> None:
    anatomy = build(kind)
    reference, _ = prompts()
    with capture(anatomy, anatomy.sites("head", "attention")) as seen, torch.no_grad():
        anatomy.model(reference)
    for layer in range(LAYERS):
        heads = torch.cat([seen[Site(layer, "head", h)] for h in range(anatomy.heads)], -1)
        made = anatomy.out(layer)(heads)
        close(anatomy.attends(layer)(made) if anatomy.family.attends else made, seen[Site(layer, "attention")])


@every_family
def test_heads_follow_from_their_queries_keys_and_values(kind: str) -> None:
    """Rows of projections are named right: a head is its own softmax(q k^T) v, rotary embedding left aside at t = 1."""
    anatomy = build(kind)
    reference, _ = prompts(t=1)
    with capture(anatomy, anatomy.sites("head", "value")) as seen, torch.no_grad():
        anatomy.model(reference)
    for site in anatomy.sites("head"):  # with one position attention is its value
        close(seen[site], seen[Site(site.layer, "value", anatomy.group(site.head))])
    long, _ = prompts()
    with torch.no_grad():
        with capture(anatomy, [Site(1, "head", h) for h in range(anatomy.heads)]) as before:
            anatomy.model(long)
        with patched(anatomy, {Site(1, "query", 1): lambda q: q + 1.0}), capture(anatomy, list(before)) as after:
            anatomy.model(long)
    moved = [bool((after[site] - before[site]).abs().max() > 1e-6) for site in before]
    assert moved == [h == 1 for h in range(anatomy.heads)], "a query is its own head's only"
    with torch.no_grad(), patched(anatomy, {Site(1, "key", 0): lambda k: -k}), capture(anatomy, list(before)) as after:
        anatomy.model(long)
    moved = [bool((after[site] - before[site]).abs().max() > 1e-6) for site in before]
    assert moved == [anatomy.group(h) == 0 for h in range(anatomy.heads)], "a key is its whole group's"


@every_family
def test_nothing_is_left_behind(kind: str) -> None:
    anatomy = build(kind)
    reference, counterfactual = prompts()
    model = anatomy.model.train()
    before = copy.deepcopy(model.state_dict())
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__) for m in model.modules()]
    score = logit_difference(torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6]))
    activation_sweep(anatomy, reference, counterfactual, ["layers.1.head.2"], score)
    path_sweep(anatomy, reference, counterfactual, ["layers.1.head.2"], score)
    receiver_sweep(anatomy, reference, counterfactual, ["layers.0.mlp"], anatomy.reads("layers.1.head.2"), score)
    part = weights_of(model, anatomy.slices("layers.1.head.2"))
    with (
        pytest.raises(KeyError),
        patched(anatomy, {"layers.0.mlp": torch.zeros(())}),
        capture(anatomy, ["layers.0.mlp"]),
        swapped(model, {key: torch.zeros_like(value) for key, value in part.items()}),
    ):
        raise KeyError
    with pytest.raises(ZeroDivisionError):
        path_sweep(anatomy, reference, counterfactual, ["layers.1.mlp"], lambda logits: logits / (1 // 0))
    now = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__) for m in model.modules()]
    assert now == hooks and all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- sweeps against twins that do one site at a time and compute everything -----------------------------------------


def patched_once(anatomy: Anatomy, reference: Tensor, counterfactual: Tensor, site: Site) -> Tensor:
    with torch.no_grad():
        with capture(anatomy, [site]) as new:
            anatomy.model(counterfactual)
        with patched(anatomy, {site: new[site].clone()}):
            return anatomy.model(reference).logits[:, -1]


@every_family
def test_activation_sweep(kind: str) -> None:
    anatomy = build(kind)
    reference, counterfactual = prompts()
    answer = torch.tensor([3, 4, 5])
    sites = anatomy.sites(*KINDS)
    found = activation_sweep(anatomy, reference, counterfactual, sites, probability(answer), rows=7)
    for site, effects in zip(sites, found, strict=True):
        logits = patched_once(anatomy, reference, counterfactual, site)
        close(effects, logits.softmax(-1)[torch.arange(3), answer])


def path_once(anatomy: Anatomy, reference: Tensor, counterfactual: Tensor, sender: Site) -> Tensor:
    """Three whole runs; every later attention is made to give what it gave on the reference."""
    held = anatomy.sites("head")
    with torch.no_grad():
        with capture(anatomy, held) as old:
            anatomy.model(reference)
        with capture(anatomy, [sender]) as new:
            anatomy.model(counterfactual)
        changes = {site: value.clone() for site, value in old.items() if site.layer >= sender.layer}
        changes[sender] = new[sender].clone()
        with patched(anatomy, changes):
            return anatomy.model(reference).logits[:, -1]


@every_family
def test_path_sweep(kind: str) -> None:
    anatomy = build(kind)
    reference, counterfactual = prompts()
    a, b = torch.tensor([3, 4, 5]), torch.tensor([6, 7, 8])
    sites = anatomy.sites("head", "mlp")
    found = path_sweep(anatomy, reference, counterfactual, sites, logit_difference(a, b), rows=5)
    rows = torch.arange(3)
    for site, effects in zip(sites, found, strict=True):
        logits = path_once(anatomy, reference, counterfactual, site)
        close(effects, logits[rows, a] - logits[rows, b], 1e-4)


def received_once(
    anatomy: Anatomy, reference: Tensor, counterfactual: Tensor, sender: Site, receivers: list[Site]
) -> Tensor:
    """Four whole runs for one sender: what arrives with all heads held is seen, then put in its place."""
    held = anatomy.sites("head")
    with torch.no_grad():
        with capture(anatomy, held) as old:
            anatomy.model(reference)
        with capture(anatomy, [sender]) as new:
            anatomy.model(counterfactual)
        changes = {site: value.clone() for site, value in old.items() if site.layer >= sender.layer}
        changes[sender] = new[sender].clone()
        with patched(anatomy, changes), capture(anatomy, receivers) as seen:
            anatomy.model(reference)
        with patched(anatomy, {site: value.clone() for site, value in seen.items()}):
            return anatomy.model(reference).logits[:, -1]


@every_family
def test_receiver_sweep(kind: str) -> None:
    anatomy = build(kind)
    reference, counterfactual = prompts()
    answer = torch.tensor([3, 4, 5])
    sites = anatomy.sites("head", "mlp")
    receivers = [*anatomy.reads("layers.2.head.1"), *anatomy.reads("layers.1.head.3")[:2]]
    for into in (receivers, anatomy.reads("layers.1.head.2"), [Site(2, "value", 0)]):
        found = receiver_sweep(anatomy, reference, counterfactual, sites, into, probability(answer), rows=7)
        whole = anatomy.model(reference).logits[:, -1].softmax(-1)[torch.arange(3), answer].detach()
        for site, effects in zip(sites, found, strict=True):
            logits = received_once(anatomy, reference, counterfactual, site, into)
            close(effects, logits.softmax(-1)[torch.arange(3), answer], 1e-4)
            if site.layer >= max(receiver.layer for receiver in into):
                assert torch.allclose(effects, whole, rtol=1e-5), "it comes after what receives"
        assert (found - whole).abs().max() > 1e-5, "something arrives"


def test_what_heads_read() -> None:
    anatomy = build("llama")  # four heads, two of keys and values
    assert anatomy.reads("layers.1.head.3") == [Site(1, "query", 3), Site(1, "key", 1), Site(1, "value", 1)]
    with pytest.raises(ZooError, match=r"layers.1.mlp is no head"):
        anatomy.reads("layers.1.mlp")


def test_sweeps_take_padding_on_the_left_and_another_position() -> None:
    anatomy = build("llama")
    reference, counterfactual = prompts()
    padded = {
        "input_ids": torch.cat([torch.zeros(3, 2, dtype=torch.long), reference], 1),
        "attention_mask": torch.cat([torch.zeros(3, 2, dtype=torch.long), torch.ones_like(reference)], 1),
    }
    other = {**padded, "input_ids": torch.cat([torch.zeros(3, 2, dtype=torch.long), counterfactual], 1)}
    score, sites = probability(torch.tensor([3, 4, 5])), anatomy.sites("head", "mlp")
    for sweep in (activation_sweep, path_sweep):
        close(
            sweep(anatomy, padded, other, sites, score), sweep(anatomy, reference, counterfactual, sites, score), 1e-4
        )
    into = anatomy.reads("layers.2.head.1")
    close(
        receiver_sweep(anatomy, padded, other, sites, into, score),
        receiver_sweep(anatomy, reference, counterfactual, sites, into, score),
        1e-4,
    )
    shorter = activation_sweep(anatomy, reference[:, :4], counterfactual[:, :4], sites, score)
    close(activation_sweep(anatomy, reference, counterfactual, sites, score, position=3), shorter)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_by_any_implementation(implementation: str) -> None:
    reference, counterfactual = prompts()
    anatomy = build("llama", implementation=implementation)
    score = probability(torch.tensor([3, 4, 5]))
    found = activation_sweep(anatomy, reference, counterfactual, anatomy.sites("head"), score)
    other = activation_sweep(build("llama"), reference, counterfactual, anatomy.sites("head"), score)
    close(found, other)


def test_sweeps_run_in_bfloat16() -> None:
    anatomy = build("llama")
    anatomy.model.bfloat16()
    reference, counterfactual = prompts()
    sites = anatomy.sites("head", "mlp")
    found = path_sweep(anatomy, reference, counterfactual, sites, probability(torch.tensor([3, 4, 5])))
    assert found.dtype == torch.float32 and found.isfinite().all() and found.std() > 0


def test_the_same_prompts_change_nothing() -> None:
    anatomy = build("qwen2")
    reference, _ = prompts()
    score = logit_difference(torch.tensor([3, 4, 5]), torch.tensor([6, 7, 8]))
    whole = score(run(anatomy, reference)[None])
    for sweep in (activation_sweep, path_sweep):
        close(sweep(anatomy, reference, reference, anatomy.sites("head", "mlp"), score), whole.expand(3 * 5, -1))


def test_knocking_out_everything_leaves_the_embedding() -> None:
    anatomy = build("llama")
    reference, _ = prompts()
    nothing = {site: torch.zeros(()) for site in anatomy.sites("attention", "mlp")}
    with patched(anatomy, nothing), torch.no_grad():
        found = anatomy.model(reference).logits
    embedded = anatomy.model.get_input_embeddings()(reference)
    close(found, anatomy.unembedding(anatomy.norm(embedded)))


def test_a_change_at_some_positions() -> None:
    anatomy = build("llama")
    reference, _ = prompts()
    with patched(anatomy, {"layers.1.mlp": at([0, 3], torch.ones(()))}), capture(anatomy, ["layers.1.mlp"]) as seen:
        anatomy.model(reference)
    assert [bool((seen[Site(1, "mlp")][:, i] == 1).all()) for i in range(6)] == [True, False, False, True, False, False]


# ---- another library ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma2", "phi3"])
def test_transformer_lens_says_the_same(kind: str, tmp_path: Path) -> None:
    """Heads' values, total effects and effects along paths, by the hooks of TransformerLens."""
    bridges = pytest.importorskip("transformer_lens.model_bridge")
    from zoo.language.llm.languages import word_tokenizer

    anatomy = build(kind, implementation="eager")
    reference, counterfactual = prompts()
    anatomy.model.save_pretrained(tmp_path)
    word_tokenizer([f"w{i}" for i in range(WORDS - 2)]).save_pretrained(tmp_path)
    bridge = bridges.TransformerBridge.boot_transformers(str(tmp_path), device="cpu", dtype=torch.float32)
    places = [f"blocks.{layer}.attn.hook_z" for layer in range(LAYERS)]
    with torch.no_grad():
        (_, old), (_, new) = (bridge.run_with_cache(ids) for ids in (reference, counterfactual))
    answer = torch.tensor([3, 4, 5])
    sites = anatomy.sites("head")
    with capture(anatomy, sites) as seen, torch.no_grad():
        anatomy.model(reference)

    def changed(site: Site, freeze: bool) -> Tensor:
        """The answers' probabilities with one head's value; ``freeze``: all other heads from there on are held."""

        def hook(value: Tensor, hook: Any) -> Tensor:
            layer = int(hook.name.split(".")[1])
            value = old[places[layer]].clone() if freeze else value.clone()
            if layer == site.layer:
                value[:, :, site.head] = new[places[layer]][:, :, site.head]
            return value

        held = range(site.layer, LAYERS) if freeze else [site.layer]
        with torch.no_grad():
            logits = bridge.run_with_hooks(reference, fwd_hooks=[(places[layer], hook) for layer in held])
        return logits[:, -1].softmax(-1)[torch.arange(3), answer]

    total = activation_sweep(anatomy, reference, counterfactual, sites, probability(answer))
    along = path_sweep(anatomy, reference, counterfactual, sites, probability(answer))
    for i, site in enumerate(sites):
        close(seen[site], old[places[site.layer]][:, :, site.head])
        close(total[i], changed(site, freeze=False), 1e-4)
        close(along[i], changed(site, freeze=True), 1e-4)
    assert (total - along).abs().max() > 1e-6, "the two kinds of effects differ"


# ---- a model over several devices -----------------------------------------------------------------------------------


def spread(anatomy: Anatomy, place: str, folder: Path, block: int = 1) -> Anatomy:
    """A copy with accelerate's hooks, the weights of a block on the CPU or on disk."""
    accelerate = pytest.importorskip("accelerate")
    parts = [name for name, module in anatomy.model.named_modules() if name and not list(module.children())]
    options = {"offload_dir": str(folder), "main_device": "cpu", "force_hooks": True}
    where = {name: place if f".{block}." in name else "cpu" for name in parts}
    return Anatomy(accelerate.dispatch_model(copy.deepcopy(anatomy.model), where, **options))


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_a_model_that_accelerate_spreads(kind: str, place: str, tmp_path: Path) -> None:
    """Blocks with accelerate's hooks, and some whose weights wait on disk until they are needed."""
    anatomy = build(kind)
    reference, counterfactual = prompts()
    score, sites = probability(torch.tensor([3, 4, 5])), anatomy.sites("head", "mlp")
    into = anatomy.reads("layers.2.head.1")
    expected = [
        activation_sweep(anatomy, reference, counterfactual, sites, score),
        path_sweep(anatomy, reference, counterfactual, sites, score),
        receiver_sweep(anatomy, reference, counterfactual, sites, into, score),
    ]
    other = spread(anatomy, place, tmp_path)
    model = other.model
    assert hasattr(model, "_hf_hook")
    waiting = [name for name, value in model.named_parameters() if value.is_meta]
    assert bool(waiting) == (place == "disk") and all(".1." in name for name in waiting)
    found = [
        activation_sweep(other, reference, counterfactual, sites, score),
        path_sweep(other, reference, counterfactual, sites, score),
        receiver_sweep(other, reference, counterfactual, sites, into, score),
    ]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        close(model(reference).logits, anatomy.model(reference).logits)
    assert [name for name, value in model.named_parameters() if value.is_meta] == waiting


# ---- weights --------------------------------------------------------------------------------------------------------


@every_family
def test_weights_of_a_head_are_all_of_it(kind: str) -> None:
    """A head whose output columns are zero adds nothing; one whose value rows are zero gives nothing."""
    anatomy = build(kind)
    reference, _ = prompts()
    site = Site(1, "head", 2)
    out = [part for part in anatomy.slices(site) if anatomy.family.out in part.name and part.name.endswith("weight")]
    assert len(out) == 1
    with torch.no_grad(), patched(anatomy, {site: torch.zeros(())}):
        expected = anatomy.model(reference).logits
    with torch.no_grad(), swapped(anatomy.model, {out[0]: torch.zeros_like(weights_of(anatomy.model, out)[out[0]])}):
        close(anatomy.model(reference).logits, expected)
    value = anatomy.slices(Site(1, "value", anatomy.group(2)))
    zero = {part: torch.zeros_like(own) for part, own in weights_of(anatomy.model, value).items()}
    with torch.no_grad(), swapped(anatomy.model, zero), capture(anatomy, [site]) as seen:
        anatomy.model(reference)
    assert not seen[site].any()


@every_family
def test_all_sites_of_a_block_are_its_parameters(kind: str) -> None:
    anatomy = build(kind)
    whole = {part.name for part in anatomy.slices("layers.0.residual")}
    parts = {part.name for s in ("attention", "mlp") for part in anatomy.slices(f"layers.0.{s}")}
    rest = {name.split(".")[-2] for name in whole - parts}
    assert (parts < whole and rest == set(anatomy.family.norms)) or kind == "olmo", "but for the norms"
    size = sum(
        part.of(dict(anatomy.model.named_parameters())[part.name]).numel()
        for part in anatomy.slices("layers.0.residual")
    )
    assert size == sum(p.numel() for p in anatomy.layers[0].parameters())


@every_family
def test_deltas_are_what_merging_them_gives(kind: str) -> None:
    anatomy = build(kind)
    reference, _ = prompts()
    deltas = Deltas(anatomy, heads=3, mlps=1)
    assert deltas.sites == []
    chosen = [Site(0, "head", 1), Site(0, "head", 0), Site(1, "head", 3), Site(2, "mlp")]
    deltas.choose(chosen)
    assert deltas.sites == chosen
    with torch.no_grad():
        plain = anatomy.model(reference).logits
        with deltas.active(anatomy):
            assert torch.equal(anatomy.model(reference).logits, plain), "zero at first"
        for value in deltas.values.values():
            value.normal_(std=0.2)
        with deltas.active(anatomy):
            found = anatomy.model(reference).logits
        merged = Anatomy(copy.deepcopy(anatomy.model))
        deltas.merge(merged)
        close(found, merged.model(reference).logits, 1e-4)
        assert (found - plain).abs().max() > 1e-3
        deltas.merge(merged, -1.0)
        close(merged.model(reference).logits, plain, 1e-4)
    other = Deltas(build(kind), heads=3, mlps=1)
    other.load_state_dict(deltas.state_dict())
    with torch.no_grad(), other.active(anatomy):
        close(anatomy.model(reference).logits, found)


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_deltas_of_a_model_that_accelerate_spreads(kind: str, place: str, tmp_path: Path) -> None:
    """The changes are those of the model in memory, as are their gradients; what would be lost is refused."""
    anatomy = build(kind)
    anatomy.model.requires_grad_(False)
    other = spread(anatomy, place, tmp_path, block=0)
    reference, _ = prompts()
    gradients = []
    ours, theirs = (Deltas(one, heads=2, mlps=1) for one in (anatomy, other))
    chosen = [Site(0, "head", 1), Site(1, "head", 3), Site(1, "mlp")]
    for deltas, one in ((ours, anatomy), (theirs, other)):
        assert not any(value.is_meta for value in deltas.state_dict().values())
        deltas.choose(chosen)
        generator = torch.Generator().manual_seed(0)
        for value in deltas.parameters():
            value.data.normal_(std=0.2, generator=generator)
        with deltas.active(one):
            one.model(reference).logits.square().mean().backward()
        gradients.append([value.grad for value in deltas.parameters()])
    for first, second in zip(*gradients, strict=True):
        assert first is not None and second is not None and bool(first.any())
        close(second, first)
    parts = anatomy.slices("layers.0.mlp")
    values = weights_of(anatomy.model, parts)
    if place == "disk":
        with pytest.raises(ZooError, match=r"waits outside of its module .offloaded by accelerate."):
            theirs.merge(other)
        with pytest.raises(ZooError, match="waits outside"), swapped(other.model, values):
            pass
        with (
            pytest.raises(ZooError, match="waits outside"),
            exchanged(other.model, dict(anatomy.model.named_parameters())),
        ):
            pass
        return
    with torch.no_grad(), theirs.active(other):
        found = other.model(reference).logits
    theirs.merge(other)
    with torch.no_grad():
        close(found, other.model(reference).logits, 1e-4)


def test_a_delta_is_added_where_its_projection_works() -> None:
    """Inputs on one device, the projection's result on another (the meta device stands for it)."""
    anatomy = build("gpt2")
    deltas = Deltas(anatomy, heads=1)
    deltas.choose([Site(0, "head", 1)])
    (weight, first), (bias, second), *_ = deltas.changes(anatomy)
    assert weight.name.endswith("weight") and bias.name.endswith("bias")
    hook = _changed([(weight, first), (bias, second)], turned=True)
    result = torch.empty(2, 3, 96, device="meta", dtype=torch.bfloat16)
    found = hook(torch.nn.Identity(), (torch.zeros(2, 3, 32, dtype=torch.bfloat16),), result)
    assert found.is_meta and found.shape == result.shape and found.dtype == torch.bfloat16


def test_deltas_alone_are_trained() -> None:
    anatomy = build("llama")
    anatomy.model.requires_grad_(False)
    reference, _ = prompts()
    deltas = Deltas(anatomy, heads=2)
    deltas.choose([Site(1, "head", 0), Site(1, "head", 1)])
    optimizer = torch.optim.AdamW(deltas.parameters(), lr=0.01, weight_decay=0.0)
    before = copy.deepcopy(anatomy.model.state_dict())
    losses = []
    for _ in range(8):
        with deltas.active(anatomy):
            loss = anatomy.model(reference, labels=reference).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and all(torch.equal(v, before[k]) for k, v in anatomy.model.state_dict().items())
    # 8 rows of queries, of keys and of values, 8 columns out
    assert sum(v.numel() for v in deltas.parameters()) == 2 * 32 * (8 + 8 + 8 + 8)


def test_a_delta_of_heads_has_the_gradient_of_its_rows() -> None:
    anatomy = build("gpt2")
    reference, _ = prompts()
    deltas = Deltas(anatomy, heads=1)
    deltas.choose([Site(1, "head", 3)])
    with deltas.active(anatomy):
        anatomy.model(reference, labels=reference).loss.backward()
    parameters = dict(anatomy.model.named_parameters())
    for place, (part, _) in enumerate(deltas.changes(anatomy)):
        found = deltas.values[f"head_{place}"].grad[0] - part.of(parameters[part.name].grad)
        assert found.abs().max() < 1e-6, "that of a key's bias is zero"


# ---- mistakes -------------------------------------------------------------------------------------------------------


def test_mistakes_are_named() -> None:
    anatomy = build("llama")
    reference, counterfactual = prompts()
    score = probability(torch.tensor([3, 4, 5]))

    def says(match: str) -> Any:
        return pytest.raises(ZooError, match=match)

    with says(r"No site 'layers.1.heads.2'. .*layers.1.head.2"):
        anatomy.site("layers.1.heads.2")
    with says("layers.0 to layers.2"), patched(anatomy, {"layers.3.mlp": torch.zeros(())}):
        pass
    with says("4 heads, 2 of keys"):
        anatomy.site("layers.0.key.2")
    with says(r"pairs must align"):
        path_sweep(anatomy, reference, counterfactual[:, 1:], ["layers.0.mlp"], score)
    with says(r"cannot send along a path"):
        path_sweep(anatomy, reference, counterfactual, ["layers.0.residual"], score)
    with says(r"layers.0.head.1 cannot receive; 'query'"):
        receiver_sweep(anatomy, reference, counterfactual, ["layers.0.mlp"], ["layers.0.head.1"], score)
    with says(r"Nothing cannot receive"):
        receiver_sweep(anatomy, reference, counterfactual, ["layers.0.mlp"], [], score)
    with says(r"layers.0.query.1 cannot send"):
        receiver_sweep(anatomy, reference, counterfactual, ["layers.0.query.1"], ["layers.1.key.0"], score)
    with says(r"A token is 50; the model has 50"):
        run(anatomy, reference * 0 + 50)
    with says(r"expected .prompts, positions."):
        run(anatomy, reference[0])
    with says("does not fit layers.0.mlp"), patched(anatomy, {"layers.0.mlp": torch.zeros(3, 7, 32)}):
        anatomy.model(reference)
    right = {"input_ids": reference, "attention_mask": (torch.arange(6) < 4).long().expand(3, -1)}
    with says("pad on the left"):
        activation_sweep(anatomy, right, right, ["layers.0.mlp"], score)
    with says("has no parameters"):
        anatomy.slices("layers.0.input")
    with says("0 heads and 0 MLPs to tune; the model has 12 and 3"):
        Deltas(anatomy)
    with says("13 heads and 0 MLPs"):
        Deltas(anatomy, heads=13)
    with says("2 heads and 0 MLPs were chosen, for 2 and 0 changes; each once"):
        Deltas(anatomy, heads=2).choose([Site(0, "head", 1)] * 2)
    with says(r"No facts of the architecture 'Linear'; known are gemma2"):
        Anatomy(nn.Linear(2, 2))
    with says("no self_attn.c_proj"):
        Anatomy(anatomy.model, Family(out="c_proj"))
    with says("no transformer.h"):
        Anatomy(anatomy.model, FAMILIES["gpt2"])


def test_models_must_be_alike() -> None:
    first, second = build("llama").model, build("qwen2").model
    with pytest.raises(ZooError, match=r"k_proj.bias is missing in one|q_proj.bias is missing"):
        same_shape(first, second)
    same_shape(first, build("llama", 5).model)
    with torch.no_grad():
        second.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ZooError, match="NaN or infinite"):
        same_shape(second, second)
