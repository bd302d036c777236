"""SubmoduleTaskArithmetic: normal equations by hand and against a slow twin, what is linear, streaming, its texts."""

import copy
import csv
import functools
import gzip
import itertools
import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from zoo.core import ZooError
from zoo.data.prompts import questions
from zoo.engines.patching import Anatomy, swapped, weights_of
from zoo.language.llm import shards
from zoo.language.llm.data_merge import CharacterTasks, ModelMergeDataModule, pretrain_characters
from zoo.language.llm.languages import word_tokenizer
from zoo.language.llm.shards import Held, Shards, check_experts, without_weights
from zoo.language.llm.submodule_task_arithmetic import SubmoduleTaskArithmetic, merge_folders
from zoo.language.llm.submodules import Calibration, Layout, Texts, merged, solve

TASKS = ["copy", "reverse", "shift"]
SIZES: dict[str, Any] = {
    "vocab_size": 33, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip


def decoder(kind: str = "llama", seed: int = 0, **given: Any) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {**SIZES, **given}
    if kind == "gpt2":
        sizes = {"vocab_size": 33, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, **given}
    elif kind == "gpt_neox":
        del sizes["num_key_value_heads"]
    elif kind in ("gemma2", "qwen3"):
        sizes["head_dim"] = 4
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    with torch.no_grad():
        for p in model.parameters():  # larger than fresh ones: attention is not uniform, biases are not zero
            p.add_(torch.randn_like(p) * 0.15)
    return model


def expert(base: nn.Module, seed: int, size: float = 0.1) -> nn.Module:
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * size)
    return model


def sources(*models: nn.Module) -> list[Any]:
    return [Held(dict(m.named_parameters()), f"model {i}") for i, m in enumerate(models)]


def texts(tasks: int = 2, count: int = 3, seed: int = 0) -> list[Texts]:
    """Of several lengths, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for task in range(tasks):
        lengths = torch.randint(3, 7, (count, 1), generator=generator)
        mask = (torch.arange(6) >= 6 - lengths).long()
        found.append(Texts(task, torch.randint(1, 24, (count, 6), generator=generator) * mask, mask))
    return found


def calibrated(models: list[nn.Module], level: str, points: int = 0, given: list[Texts] | None = None) -> Calibration:
    found = Calibration(Layout(Anatomy(models[0]), level), len(models) - 1, points)
    found.measure(given or texts(len(models) - 1), sources(*models))
    return found


# ---- the equations --------------------------------------------------------------------------------------------------


def test_normal_equations_by_hand() -> None:
    grams = torch.tensor([[[4.0, 1.0], [1.0, 1.0]], [[1.0, 0.5], [0.5, 2.0]]], dtype=torch.float64)
    # A = [[5, 1.5], [1.5, 3]], b = (4 + 0.5, 1 + 2): a = (4.5 * 3 - 1.5 * 3, 5 * 3 - 1.5 * 4.5) / 12.75
    assert solve(grams, tikhonov=0.0).tolist() == pytest.approx([9 / 12.75, 8.25 / 12.75])
    # with G_0 / 4 and G_1 / 2: A = [[1.5, 0.5], [0.5, 1.25]], b = (1.25, 1.25)
    assert solve(grams, normalise=True, tikhonov=0.0).tolist() == pytest.approx([0.9375 / 1.625, 1.25 / 1.625])
    ridge = 0.1 * 8 / 2
    expected = torch.linalg.solve(grams.sum(0) + ridge * torch.eye(2), torch.tensor([4.5, 3.0], dtype=torch.float64))
    assert torch.allclose(solve(grams, tikhonov=0.1), expected)


def test_weights_minimise_the_sum_of_squares() -> None:
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(3, 3, 40, generator=generator, dtype=torch.float64)  # inputs' task, expert, feature
    a = solve(torch.einsum("tif,tjf->tij", g, g), tikhonov=0.0)

    def wrong(a: Tensor) -> Tensor:
        return sum(((a @ g[t] - g[t, t]) ** 2).sum() for t in range(3))  # type: ignore[return-value]

    for step in (*torch.eye(3, dtype=torch.float64), *-torch.eye(3, dtype=torch.float64)):
        assert wrong(a + 1e-3 * step) > wrong(a)


def test_limits_of_the_equations() -> None:
    one = torch.rand(1, 1, 1, dtype=torch.float64) + 0.1
    assert solve(one).tolist() == pytest.approx([1.0], abs=2e-6), "a single task: its own expert"
    assert solve(torch.zeros(3, 3, 3, dtype=torch.float64)).tolist() == [0.0] * 3, "no expert differs"
    apart = torch.zeros(3, 3, 3, dtype=torch.float64)
    for t, size in enumerate((4.0, 0.01, 1.0)):
        apart[t, t, t] = size  # expert t answers only to inputs of task t
    assert solve(apart, tikhonov=0.0).tolist() == pytest.approx([1.0] * 3)
    twins = torch.ones(2, 2, 2, dtype=torch.float64)
    assert solve(twins).tolist() == pytest.approx([0.5, 0.5], abs=1e-5), "two alike share"


# ---- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gemma2", "qwen3"])
def test_every_parameter_is_in_one_part(kind: str) -> None:
    model = decoder(kind)
    for level in ("model", "layer", "attention_mlp", "head"):
        layout = Layout(Anatomy(model), level)
        seen = {n: torch.zeros(p.shape) for n, p in model.named_parameters()}
        for part in layout.parts:
            for piece in part.slices:
                piece.of(seen[piece.name]).add_(1)
        assert all(bool((count == 1).all()) for count in seen.values()), level
        written = [name for section in layout.sections for name in section.names]
        assert sorted(written) == sorted(seen), "tied ones once"


def test_a_head_level_has_a_part_for_each_group() -> None:
    parts = [part.name for part in Layout(Anatomy(decoder()), "head").parts]
    assert [name for name in parts if ".head." in name] == [f"layers.{i}.head.{g}" for i in (0, 1) for g in (0, 1)]
    assert "layers.0.attention" not in parts
    assert "layers.1.attention" in [part.name for part in Layout(Anatomy(decoder("gpt2")), "head").parts], "o's bias"


# ---- against a slow twin --------------------------------------------------------------------------------------------


def twin(models: list[nn.Module], name: str, path: str, given: list[Texts]) -> Tensor:
    """Gram sums of a module, text by text without padding, each module run in its own model, float64."""
    count = len(models) - 1
    total = torch.zeros(count, count, count, dtype=torch.float64)
    for one in given:
        for ids, mask in zip(one.ids, one.mask, strict=True):
            entered: dict[str, Any] = {}

            def look(module: nn.Module, args: Any, kwargs: Any, entered: dict[str, Any] = entered) -> None:
                entered["args"], entered["kwargs"] = args, kwargs

            own = models[one.task + 1]
            handle = own.get_submodule(path).register_forward_pre_hook(look, with_kwargs=True)
            with torch.no_grad():
                own(ids[mask.bool()][None], use_cache=False)
                handle.remove()
                outs = [answer(models, i, name, path, entered) for i in range(len(models))]
            for position in range(outs[0].shape[1]):
                g = [out[0, position].double() - outs[0][0, position].double() for out in outs[1:]]
                for i, j in itertools.product(range(count), repeat=2):
                    total[one.task, i, j] += float(g[i] @ g[j]) / outs[0].shape[1]
    return total


def answer(models: list[nn.Module], i: int, name: str, path: str, entered: dict[str, Any]) -> Tensor:
    """What a module gives in model i; for a head, in the base with this head's parameters of model i."""
    if ".head." not in name:
        out = models[i].get_submodule(path)(*entered["args"], **entered["kwargs"])
        return out[0] if isinstance(out, tuple) else out
    _, layer, _, group = name.split(".")
    anatomy = Anatomy(models[0])
    per = anatomy.heads // anatomy.kv_heads
    pieces = [
        p for h in range(int(group) * per, (int(group) + 1) * per) for p in anatomy.slices(f"layers.{layer}.head.{h}")
    ]
    with swapped(models[0], weights_of(models[i], pieces)):
        return models[0].get_submodule(path)(*entered["args"], **entered["kwargs"])[0]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("level", ["layer", "attention_mlp", "head"])
def test_sums_are_those_of_a_loop(kind: str, level: str) -> None:
    base = decoder(kind)
    models = [base, expert(base, 1), expert(base, 2)]
    given = texts()
    found = calibrated(models, level, given=given)
    for section in found.layout.sections[1:]:
        for place in section.places:
            for number in place.parts:
                name = found.layout.parts[number].name
                expected = twin(models, name, place.module, given)
                assert torch.allclose(found.gram[number], expected, rtol=1e-4, atol=1e-6), name


def test_the_whole_model_and_the_embedding_are_those_of_a_loop() -> None:
    base = decoder()
    models, given = [base, expert(base, 1), expert(base, 2)], texts()
    whole, apart = calibrated(models, "model", given=given), calibrated(models, "layer", given=given)
    for found, run in ((whole, lambda m, ids: m(ids).logits), (apart, lambda m, ids: m.model.embed_tokens(ids))):
        total = torch.zeros(2, 2, 2, dtype=torch.float64)
        for one in given:
            for ids, mask in zip(one.ids, one.mask, strict=True):
                with torch.no_grad():
                    outs = [run(m, ids[mask.bool()][None])[0].double() for m in models]
                g = torch.stack([out - outs[0] for out in outs[1:]])
                total[one.task] += torch.einsum("itv,jtv->ij", g, g) / g.shape[1]
        assert torch.allclose(found.gram[0], total, rtol=1e-4, atol=1e-6)


def test_nonlinearity_is_that_of_a_loop() -> None:
    base = decoder()
    models, given = [base, expert(base, 1)], texts(1)
    found = calibrated(models, "model", points=3, given=given)
    wrong = size = 0.0
    for ids, mask in zip(given[0].ids, given[0].mask, strict=True):
        row = ids[mask.bool()][None]
        with torch.no_grad():
            start, end = (m(row).logits for m in models)
            for a in (0.25, 0.5, 0.75):
                mix = copy.deepcopy(base)
                for p, q in zip(mix.parameters(), models[1].parameters(), strict=True):
                    p.add_(a * (q - p))
                straight = a * (end - start)
                wrong += float((mix(row).logits - start - straight).norm(dim=-1).mean())
                size += float(straight.norm(dim=-1).mean())
    assert float(found.nonlinearity()[0]) == pytest.approx(wrong / size, rel=1e-4)


def test_what_is_linear_has_no_nonlinearity_and_submodules_have_less() -> None:
    base = decoder()
    models = [base, expert(base, 1), expert(base, 2)]
    found = calibrated(models, "attention_mlp", points=3)
    for part, (wrong, size) in zip(found.layout.parts, found.bent[:, 0].tolist(), strict=True):
        if part.name in ("embedding", "norm", "unembedding") or part.name.endswith("layernorm"):
            assert size > 0 and wrong < 1e-5 * size, part.name
        else:
            assert wrong > 1e-3 * size, part.name
    layer, whole = (calibrated(models, level, points=3).nonlinearity() for level in ("layer", "model"))
    assert bool((whole > layer).all()) and bool((layer > 0).all())


def test_linear_parts_of_tasks_apart_are_recovered() -> None:
    """Each expert has its own tokens' embeddings changed: the merge has all of them, and nothing is left over."""
    base = decoder()
    models, given = [base, copy.deepcopy(base), copy.deepcopy(base)], []
    for task, own in enumerate((torch.arange(1, 9), torch.arange(9, 24))):
        with torch.no_grad():
            models[task + 1].model.embed_tokens.weight[own] += torch.randn(len(own), 16)
        given.append(Texts(task, own[None, :8], torch.ones(1, 8, dtype=torch.long)))
    found = calibrated(models, "attention_mlp", given=given)
    weights = found.weights()
    assert weights[0].tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert not weights[1:].any(), "where no expert differs nothing is added"
    section = found.layout.sections[0]
    states = [dict(m.named_parameters()) for m in models]
    value = merged(found.layout, section, states, weights)["model.embed_tokens.weight"]
    for task, one in enumerate(given):
        wanted = models[task + 1].model.embed_tokens.weight[one.ids]
        assert torch.allclose(value[one.ids], wanted, atol=1e-4)


def test_the_order_of_experts_does_not_matter() -> None:
    base = decoder()
    experts = [expert(base, seed, size) for seed, size in ((1, 0.05), (2, 0.1), (3, 0.2))]
    given = texts(3)
    order = [2, 0, 1]
    moved = [Texts(order.index(one.task), one.ids, one.mask) for one in texts(3)]
    first = calibrated([base, *experts], "attention_mlp", given=given).weights()
    second = calibrated([base, *(experts[i] for i in order)], "attention_mlp", given=moved).weights()
    assert torch.allclose(first[:, order], second, atol=1e-6)
    assert not torch.allclose(first, second, atol=1e-3)


def test_one_expert_comes_back() -> None:
    base = decoder()
    models = [base, expert(base, 4)]
    weights = calibrated(models, "head").weights()
    assert torch.allclose(weights, torch.ones_like(weights), atol=2e-6)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_a_tied_embedding_is_merged_once(kind: str) -> None:
    base = decoder(kind, **({} if kind == "gpt2" else {"tie_word_embeddings": True}))
    models = [base, expert(base, 1), expert(base, 2)]
    found = calibrated(models, "layer")
    names = [name for section in found.layout.sections for name in section.names]
    tied = "transformer.wte.weight" if kind == "gpt2" else "model.embed_tokens.weight"
    assert names.count(tied) == 1 and "lm_head.weight" not in names
    assert found.layout.parts[found.layout.places[tied][0][0]].name == "unembedding"
    assert ("embedding" in [part.name for part in found.layout.parts]) == (kind == "gpt2"), "positions alone are left"
    assert bool(found.gram.diagonal(dim1=2, dim2=3).gt(0).all())


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of five layers in many files, and three experts."""
    place = tmp_path_factory.mktemp("models")
    base = decoder(num_hidden_layers=5)
    tokenizer = CharacterTasks().tokenizer
    for name, model in {"base": base, **{t: expert(base, i, 0.05 * i) for i, t in enumerate(TASKS, 1)}}.items():
        model.save_pretrained(place / name, max_shard_size="8KB" if name != "shift" else "5GB")
        tokenizer.save_pretrained(place / name)
    return place


def batches(**given: Any) -> list[dict[str, Any]]:
    data = ModelMergeDataModule(**{"batch_size": 8, "samples": 4, "val_samples": 4, "test_samples": 4, **given})
    return list(data.train_dataloader())


def merger(folder: Path, **given: Any) -> SubmoduleTaskArithmetic:
    options: dict[str, Any] = {"backbone": str(folder / "base"), "tasks": TASKS}
    options["experts"] = [str(folder / task) for task in TASKS]
    return SubmoduleTaskArithmetic(**{**options, **given})


def fit(model: SubmoduleTaskArithmetic, **given: Any) -> SubmoduleTaskArithmetic:
    data = ModelMergeDataModule(**{"batch_size": 8, "samples": 4, "val_samples": 4, "test_samples": 4, **given})
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    lightning.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **options).fit(model, data)
    return model


@pytest.fixture(scope="module")
def fitted(folder: Path) -> Callable[[str], SubmoduleTaskArithmetic]:
    """The models merged at a level, each once; what is below reads them only."""
    return functools.cache(lambda level: fit(merger(folder, level=level)))


@pytest.mark.parametrize("level", ["attention_mlp", "model"])
def test_streaming_is_the_same(folder: Path, fitted: Any, tmp_path: Path, level: str) -> None:
    model = fitted(level)
    experts = {task: folder / task for task in TASKS}
    weights = merge_folders(folder / "base", experts, batches(), tmp_path / "merged", level=level, points=3)
    assert {k: pytest.approx(v, abs=1e-6) for k, v in model.table().items()} == weights
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for name, p in streamed.named_parameters():
        assert (p - model.backbone.get_parameter(name)).abs().max() <= 1e-6, name
    content = json.loads((tmp_path / "merged" / "merging.json").read_text())
    assert content["weights"] == weights and content["level"] == level
    assert list(content["nonlinearity"].values()) == pytest.approx(model.nonlinearity.tolist(), rel=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab() == CharacterTasks().tokenizer.get_vocab()


def test_streaming_holds_a_section_of_each(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been read and is still alive, at its most, against what a section of each takes."""
    alive, most = [0], [0]
    real = shards.finite

    def watched(value: Tensor, name: str, whose: str) -> Tensor:
        size = value.numel() * value.element_size()
        alive[0] += size
        most[0] = max(most[0], alive[0])
        weakref.finalize(value, lambda: alive.__setitem__(0, alive[0] - size))
        return real(value, name, whose)

    monkeypatch.setattr(shards, "finite", watched)
    experts = {task: folder / task for task in TASKS}
    merge_folders(folder / "base", experts, batches(), tmp_path / "merged")
    layout = Layout(Anatomy(AutoModelForCausalLM.from_pretrained(folder / "base")), "attention_mlp")
    sizes = [4 * sum(layout.shapes[n].numel() for n in section.names) for section in layout.sections]
    assert 4 * max(sizes) <= most[0] <= 4 * max(sizes) + max(sizes), "the base and three experts"
    assert most[0] < 0.25 * 4 * sum(sizes)


def test_bfloat16_stays_and_is_computed_in_float32(folder: Path, fitted: Any, tmp_path: Path) -> None:
    for name in ("base", *TASKS):
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.bfloat16).save_pretrained(tmp_path / name)
    experts = {task: tmp_path / task for task in TASKS}
    weights = merge_folders(tmp_path / "base", experts, batches(), tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert found.dtype == torch.bfloat16
    for part, row in fitted("attention_mlp").table().items():
        assert weights[part] == pytest.approx(row, abs=0.05), part


def test_a_failure_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    experts = {task: folder / task for task in TASKS}
    with pytest.raises(ZooError, match="No calibration text of task 2"):
        some = [{**b, "task": ["copy" if t == "shift" else t for t in b["task"]]} for b in batches()]
        merge_folders(folder / "base", experts, some, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_skeleton_has_real_buffers_and_no_weights() -> None:
    model = decoder()
    bare = without_weights(model.config)
    assert all(p.is_meta for p in bare.parameters())
    for name, value in model.named_buffers():
        assert torch.equal(bare.get_buffer(name), value), name
    assert not any(p.is_meta for p in nn.Linear(2, 2).parameters()), "afterwards modules are as always"


# ---- the module -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["layer", "head"])
def test_each_part_gets_its_weights(folder: Path, fitted: Any, level: str) -> None:
    model = fitted(level) if level == "layer" else fit(merger(folder, level=level, points=0))
    states = [dict(AutoModelForCausalLM.from_pretrained(folder / n).named_parameters()) for n in ("base", *TASKS)]
    for part, row in zip(model.layout.parts, model.weights.tolist(), strict=True):
        for piece in part.slices:
            own, *others = (piece.of(state[piece.name]) for state in states)
            wanted = own + sum(a * (other - own) for a, other in zip(row, others, strict=True))
            assert torch.allclose(piece.of(model.backbone.get_parameter(piece.name)), wanted, atol=1e-6), part.name
    assert bool(model.weights.any())


def test_the_average_is_the_average_and_alpha_is_the_best(folder: Path) -> None:
    states = [dict(AutoModelForCausalLM.from_pretrained(folder / n).named_parameters()) for n in TASKS]
    average = fit(merger(folder, merge="average"))
    for name, p in average.backbone.named_parameters():
        assert torch.allclose(p, sum(s[name] for s in states) / 3, atol=1e-6)
    found = merger(folder, merge="arithmetic")
    tried: list[float] = []
    right = {0.5: 0.25, 0.8: 0.75, 1.1: 0.75}

    def logits(batch: dict[str, Any]) -> Tensor:
        """Right for a share of the texts that depends on the weight."""
        base, own = (m.model.embed_tokens.weight[1, 0] for m in (plain, found.backbone))
        alpha = float((own - base) / sum(s["model.embed_tokens.weight"][1, 0] - base for s in states))
        tried.append(round(alpha, 3))
        best = torch.nn.functional.one_hot(batch["labels"].clamp(min=0), 33).float().roll(-1, 1)
        hits = (torch.arange(len(best)) % 4 < 4 * right.get(round(alpha, 1), 0.0)).float()
        return best * hits[:, None, None] + (1 - hits)[:, None, None] * best.roll(1, -1)

    plain = AutoModelForCausalLM.from_pretrained(folder / "base")
    found._logits = logits  # type: ignore[method-assign]
    fit(found, val_samples=4)
    assert float(found.weights[0, 0]) == pytest.approx(0.8), "the smaller of two as good"
    assert set(tried) >= {0.1, 0.5, 0.8, 1.1, 1.5}


@pytest.mark.parametrize("merge", ["ties", "dare", "arithmetic"])
def test_other_merges_are_those_functions(folder: Path, merge: str) -> None:
    from zoo.language.llm import merging

    base, *experts = (
        dict(AutoModelForCausalLM.from_pretrained(folder / n).named_parameters()) for n in ("base", *TASKS)
    )
    base, *experts = ({n: p.detach() for n, p in s.items()} for s in (base, *experts))
    wanted = {
        "ties": lambda: merging.ties(base, experts, 0.3, 0.7),
        "dare": lambda: merging.dare(base, experts, 0.3, 0.7, torch.Generator().manual_seed(0)),
        "arithmetic": lambda: merging.task_arithmetic(base, experts, 0.7),
    }[merge]()
    model = fit(merger(folder, merge=merge, alpha=0.7, density=0.3))
    for name, p in model.backbone.named_parameters():
        assert torch.allclose(p, wanted[name], atol=1e-5), name


def test_a_merged_model_is_an_ordinary_one(fitted: Any, tmp_path: Path) -> None:
    model = fitted("layer")
    model.save_merged(tmp_path / "merged")
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(again(ids).logits, model.eval()(ids))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").padding_side == "left"


def test_live_models_are_merged(folder: Path, fitted: Any) -> None:
    models = [AutoModelForCausalLM.from_pretrained(folder / n) for n in ("base", *TASKS)]
    live = SubmoduleTaskArithmetic.from_backbone(models[0], models[1:], tasks=TASKS)
    assert torch.allclose(fit(live).weights, fitted("attention_mlp").weights, atol=1e-6)
    assert not torch.equal(live.backbone.lm_head.weight, models[0].lm_head.weight)


def test_answers_are_generated(folder: Path) -> None:
    model, language = merger(folder, new_tokens=5).eval(), CharacterTasks()
    tokenizer = language.tokenizer
    batch = tokenizer(["copy a b :", "reverse a b c d :"], padding=True, return_tensors="pt")
    tokens = model.predict(batch["input_ids"], batch["attention_mask"])["tokens"]
    for row, text in zip(tokens, ["copy a b :", "reverse a b c d :"], strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        for token in row.tolist():
            assert int(model(ids)[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
    with pytest.raises(ZooError, match="60 tokens and new_tokens=5 are more than the model's 64 positions"):
        model.predict(torch.ones(1, 60, dtype=torch.long))


# ---- mistakes -------------------------------------------------------------------------------------------------------


def test_experts_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    wide = decoder(intermediate_size=32, num_hidden_layers=5)
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(
        ZooError, match=r"wide does not fit the base: model.layers.0.mlp.gate_proj.weight is \(32, 16\)"
    ):
        fit(merger(folder, experts=[str(folder / "copy"), str(folder / "copy"), str(tmp_path / "wide")]))
    broken = AutoModelForCausalLM.from_pretrained(folder / "copy")
    with torch.no_grad():
        broken.model.layers[3].mlp.up_proj.weight[0, 0] = torch.nan
    broken.save_pretrained(tmp_path / "nan")
    with pytest.raises(ZooError, match=r"layers.3.mlp.up_proj.weight of .*nan has NaN"):
        fit(merger(folder, experts=[str(folder / "copy"), str(folder / "copy"), str(tmp_path / "nan")]))
    AutoModelForCausalLM.from_pretrained(folder / "copy").save_pretrained(tmp_path / "words")
    word_tokenizer([f"w{i}" for i in range(22)]).save_pretrained(tmp_path / "words")
    with pytest.raises(ZooError, match=r"have other tokenizers: ':' is token \d+ in '.*base' and none in '.*words'"):
        check_experts(Shards(folder / "base"), [Shards(tmp_path / "words")], [])
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ZooError, match=r"pickle has no model.safetensors"):
        Shards(tmp_path / "pickle")
    with pytest.raises(ZooError, match="is neither a folder here nor a model on the Hub"):
        Shards(tmp_path / "nothing")


def test_mistakes_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="merge is 'some'; one of closed"):
        merger(folder, merge="some")
    with pytest.raises(ValueError, match="level is 'block'; one of model, layer"):
        merger(folder, level="block")
    with pytest.raises(ValueError, match="1 experts for tasks"):
        merger(folder, experts=["a"])
    with pytest.raises(ZooError, match="No experts to merge for copy, reverse, shift"):
        fit(merger(folder, experts=[]))
    batch = batches()[0]
    with pytest.raises(ZooError, match=r"No task 'cpy' here. Did you mean 'copy'"):
        merger(folder).training_step({**batch, "task": ["cpy"] * 8}, 0)
    with pytest.raises(ZooError, match="A token is 33; the models have 33"):
        merger(folder).training_step({**batch, "input_ids": torch.full_like(batch["input_ids"], 33)}, 0)
    with pytest.raises(ZooError, match="A calibration text is all padding"):
        merger(folder).training_step({**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}, 0)
    with pytest.raises(ZooError, match="No calibration text of task 0"):
        merger(folder).solve()
    with pytest.raises(ZooError, match="No calibration texts"):
        merge_folders(folder / "base", {"copy": folder / "copy"}, [], folder / "never")


# ---- texts ----------------------------------------------------------------------------------------------------------


def test_generated_tasks_are_what_they_say() -> None:
    language = CharacterTasks()
    batch = language.draw(list(language.TASKS) * 8, torch.Generator().manual_seed(0))
    rows = language.tokenizer.batch_decode(batch["input_ids"])
    alphabets = {"copy": "abcdefghij", "reverse": "fghijklmno", "shift": "klmnopqrst", "sort": "pqrstuvwxy"}
    for task, text in zip(batch["task"], rows, strict=True):
        asked, answered = (side.split() for side in text.replace("<pad>", "").split(":"))
        letters = alphabets[task]
        wanted = {
            "copy": asked[1:],
            "reverse": asked[:0:-1],
            "sort": sorted(asked[1:]),
            "shift": [letters[(letters.index(c) + 1) % 10] for c in asked[1:]] if task == "shift" else [],
        }[task]
        assert set(asked[1:]) <= set(letters)
        assert asked[0] == task and answered == [*wanted, "<end>"] and 3 <= len(wanted) <= 6
    known = batch["labels"] != -100
    assert torch.equal(batch["labels"][known], batch["input_ids"][known])
    assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == 0)


def test_splits_differ_and_all_tasks_are_in_each() -> None:
    data = ModelMergeDataModule(samples=5, val_samples=6, test_samples=7, batch_size=100)
    found = [next(iter(loader)) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
    assert [len(batch["name"]) for batch in found] == [15, 18, 21]
    assert all(set(batch["task"]) == set(TASKS) for batch in found)
    assert not set(found[0]["name"]) & set(found[2]["name"])
    assert data.describe() == {"tasks": TASKS}


def test_a_base_and_its_experts_are_prepared(tmp_path: Path) -> None:
    pretrain_characters(tmp_path, 5, {"copy": 3, "shift": 6}, base_steps=2, width=16, layers=1, batch=8)
    models = {n: AutoModelForCausalLM.from_pretrained(tmp_path / n).lm_head.weight for n in ("base", "copy", "shift")}
    moved = [float((models[n] - models["base"]).detach().norm()) for n in ("copy", "shift")]
    assert 0 < moved[0] < moved[1], "a longer training goes further"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A task of questions, zipped, and one of plain text, with a tokenizer for both."""
    text = "Question: Answer: What is two and three ? five . #### 5 the sea was calm again that night"
    word_tokenizer(list(dict.fromkeys(text.split(" ")))).save_pretrained(tmp_path / "words")
    line = json.dumps({"question": "What is two and three ?", "answer": "two and three is five . #### 5"})
    long = json.dumps({"question": "What is two ? " * 20, "answer": "two"})
    for split, count in (("train", 6), ("test", 3)):
        (tmp_path / "maths").mkdir(exist_ok=True)
        text = "\n".join([line] * count + [long, ""])
        (tmp_path / "maths" / f"{split}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        (tmp_path / "prose").mkdir(exist_ok=True)
        (tmp_path / "prose" / f"{split}.txt").write_text("the sea was calm\n\n" * count)
    return tmp_path


def test_questions_and_plain_text_are_read(files: Path) -> None:
    data = ModelMergeDataModule(
        str(files), tasks=["maths", "prose"], tokenizer=str(files / "words"), samples=4, batch_size=20, block=40
    )
    batch = next(iter(data.train_dataloader()))
    assert sorted(batch["task"]) == ["maths"] * 4 + ["prose"] * 4
    row = batch["task"].index("maths")
    text = data.words.decode(batch["input_ids"][row])
    assert text == "Question: What is two and three ? Answer: two and three is five . #### 5"
    learnt = batch["labels"][row][batch["labels"][row] != -100]
    assert data.words.decode(learnt) == "two and three is five . #### 5"
    row = batch["task"].index("prose")
    assert data.words.decode(batch["labels"][row][batch["labels"][row] != -100]) == "the sea was calm"
    assert int(batch["attention_mask"][row].sum()) == 4 and int(batch["attention_mask"][row, -1]) == 1
    assert [len(data.dataset(split)) for split in ("val", "test")] == [4, 6], "what is left of train; all of test"
    (files / "maths" / "val.jsonl").write_text(json.dumps({"question": "What ?", "answer": "two"}))
    again = ModelMergeDataModule(str(files), tasks=["maths"], tokenizer=str(files / "words"), block=40)
    assert [row["name"] for row in again.dataset("val").rows] == ["What ?"]


GSM8K = Path(os.environ.get("ZOO_DATA", "/nowhere")) / "gsm8k"


@pytest.mark.skipif(not GSM8K.is_dir(), reason="needs $ZOO_DATA/gsm8k")
def test_gsm8k_is_read(tmp_path: Path) -> None:
    """All of its lines are questions with answers; tokens are made of the first ones only, which takes long enough."""
    word_tokenizer(["Question:", "Answer:", "####"]).save_pretrained(tmp_path / "words")
    (tmp_path / "gsm8k").mkdir()
    for split, count in (("train", 7473), ("test", 1319)):
        file = GSM8K / f"{split}.jsonl.gz"
        assert len(questions(file)) == count
        with gzip.open(file, "rt") as lines, gzip.open(tmp_path / "gsm8k" / file.name, "wt") as first:
            first.writelines(itertools.islice(lines, 140))
    data = ModelMergeDataModule(str(tmp_path), tasks=["gsm8k"], tokenizer=str(tmp_path / "words"), test_samples=9999)
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [30, 100, 140]
    batch = next(iter(data.train_dataloader()))
    assert "#### " in data.words.decode(batch["labels"][0].clamp(min=0)[-2:]) + " "


def test_own_prompts_come_back_as_a_table(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "prompts.txt").write_text("copy a b :\n\nshift c d e :\n")
    data = ModelMergeDataModule().from_files(tmp_path / "prompts.txt")
    model = merger(folder, new_tokens=4).eval()
    predictions = [model.predict_step(batch, 0) for batch in data.predict_dataloader()]
    with data.write(predictions, tmp_path / "out")[0].open() as table:
        rows = list(csv.reader(table))
    assert rows[0] == ["prompt", "answer"] and [row[0] for row in rows[1:]] == ["copy a b :", "shift c d e :"]
    assert all(row[1] for row in rows[1:])


def test_mistakes_in_files_are_named(files: Path, tmp_path: Path) -> None:
    def data(**given: Any) -> ModelMergeDataModule:
        return ModelMergeDataModule(
            **{"root": str(files), "tasks": ["maths"], "tokenizer": str(files / "words"), **given}
        )

    with pytest.raises(ZooError, match="give `tokenizer`"):
        data(tokenizer=None).setup()
    with pytest.raises(FileNotFoundError, match=r"code.train.jsonl is missing: expected a line each"):
        data(tasks=["code"]).setup()
    with pytest.raises(ZooError, match=r"no text of at most block=5 tokens; the shortest has 16"):
        data(block=5).setup()
    (files / "maths" / "train.jsonl").write_text('{"question": "a"}\n')
    with pytest.raises(ZooError, match=r"train.jsonl, line 1: expected a question and an answer"):
        data().setup()
    with pytest.raises(ValueError, match="No generated task 'maths'"):
        data(root=None)
    with pytest.raises(ValueError, match="name each once"):
        data(tasks=["maths", "maths"])
    with pytest.raises(ValueError, match=r"needs {question}"):
        data(prompt="Q:")
