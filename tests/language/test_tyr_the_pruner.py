"""TyrThePruner: the local pruner against loops and the authors' figures, the search, the smaller model, its text."""

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from zoo.core import ZooError
from zoo.engines.patching import FAMILIES, Anatomy
from zoo.language.compression import evolution
from zoo.language.compression.data_calibration import LMCalibrationDataModule
from zoo.language.compression.local_pruning import LocalPruner, by_magnitude, eliminate, group_scores, kept, members
from zoo.language.compression.supernet import Blocks, expected, prunables
from zoo.language.compression.texts import MarkovText, character_tokenizer, pretrain_characters, pretrain_markov
from zoo.language.compression.tyr_the_pruner import TyrThePruner

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "tyr_the_pruner.safetensors")
SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    return float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


def decoder(kind: str = "llama", seed: int = 0, **given: Any) -> Any:
    """A random decoder of three blocks, its weights large enough for all parts to matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {**SIZES, **given}
    if kind in ("gpt2", "gpt_neox"):
        sizes.pop("num_key_value_heads")
    if kind == "gpt2":
        sizes["n_inner"] = sizes.pop("intermediate_size")
    if kind == "gemma2":
        sizes["head_dim"] = 8
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(4.0)
    return model


def text(count: int = 12, length: int = 16) -> Tensor:
    return torch.randint(40, (count, length), generator=torch.Generator().manual_seed(1))


def pruner(model: Any = None, **given: Any) -> TyrThePruner:
    sizes: dict[str, Any] = {
        "rounds": 2, "generations": 3, "offspring": 6, "survivors": [3, 1], "stage_tokens": [48, 96], "step": 0.25,
        "least_neurons": 6,
    }  # fmt: skip
    return TyrThePruner.from_backbone(model or decoder(), **{**sizes, **given})


def searched(model: TyrThePruner, blocks: Tensor | None = None) -> TyrThePruner:
    model.start(text() if blocks is None else blocks, 4)
    while not model.finished:
        model.generation()
    return model


def problem(n: int = 24, o: int = 5, seed: int = 0, tokens: int = 80) -> tuple[Tensor, Tensor]:
    """Weights (n, o) and H, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64)
    x = x @ (torch.eye(n, dtype=torch.float64) + 0.3 * torch.randn(n, n, generator=generator, dtype=torch.float64))
    return torch.randn(n, o, generator=generator, dtype=torch.float64), x.T @ x


# ---- against the authors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("label", "groups", "rounds"), [("neurons", 24, 16), ("heads", 4, 1)])
def test_a_layer_is_pruned_as_the_authors_prune_it(label: str, groups: int, rounds: int) -> None:
    x = GOLDEN[f"{label}.inputs"]
    local = LocalPruner(GOLDEN[f"{label}.weight"], x.T @ x, groups, authors_refit=True)
    assert close(local.scores()[local.alive], GOLDEN[f"{label}.scores"][local.alive])
    for sparsity in (0.25, 0.5, 0.75):
        found = local.prune(kept(groups, sparsity, authors_counts=True), rounds)
        assert close(found, GOLDEN[f"{label}.pruned.{sparsity}"])


def test_supernet_and_search_are_the_authors() -> None:
    """Their two programs on a tiny decoder: weights at each level, the levels chosen, the fitness of generations."""
    model = decoder(intermediate_size=64, num_key_value_heads=4)
    model.load_state_dict({k.removeprefix("model."): v for k, v in GOLDEN.items() if k.startswith("model.")})
    method = pruner(
        model, rounds=1, generations=4, offspring=12, survivors=[6, 3, 2], stage_tokens=[40, 96, 200], step=0.125,
        least_neurons=1, top_k=16, error_accumulation="none", authors_counts=True, authors_refit=True,
        authors_flips=True, authors_empty=True,
    ).start(GOLDEN["blocks"], 4)  # fmt: skip
    names = ("model.layers.0.self_attn.o_proj", "model.layers.2.mlp.down_proj")
    for name, layer in zip(names, (method._running.layers[1], method._running.layers[4]), strict=True):
        recorded = {int(k.rpartition(".")[2]): v for k, v in GOLDEN.items() if k.startswith(f"supernet.{name}.")}
        assert len(recorded) > 2
        for level, weight in recorded.items():
            assert close(layer.levels[level], weight, 5e-5), "few tokens: float32 leaves 2e-5 on either side"
    layers, rng = method._running.layers, random.Random(3)
    fitness = [method.generation(rng) for _ in range(4)]
    assert close(torch.tensor(fitness), GOLDEN["fitness"])
    steps = torch.tensor([max(1, layer.groups // 8) for layer in layers])
    assert torch.equal((method.removed - method.centre) // steps, GOLDEN["levels"])


# ---- one layer ------------------------------------------------------------------------------------------------------


def slow_prune(weight: Tensor, hessian: Tensor, groups: int, keep: int, rounds: int) -> Tensor:
    """The card's program with an explicit inverse of what is left in each round."""
    n = len(weight)
    size = n // groups
    h = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(n, dtype=weight.dtype)
    g = h @ weight
    live, remove = list(range(groups)), groups - keep
    base, extra = divmod(remove, min(rounds, remove))
    for r in range(min(rounds, remove)):
        rows = [i * size + k for i in live for k in range(size)]
        inverse = torch.linalg.inv(h[rows][:, rows])
        best = inverse @ g[rows]  # the least squares of what is left: what surgeon's updates come to
        scores = []
        for place, _ in enumerate(live):
            own = slice(place * size, (place + 1) * size)
            b, target = best[own], g[rows][own]
            scores.append(float((b * (torch.linalg.inv(inverse[own, own]) @ b / 2 + target)).sum()))
        order = sorted(range(len(live)), key=scores.__getitem__)[: base + (r < extra)]
        live = [group for place, group in enumerate(live) if place not in order]
    rows = [i * size + k for i in live for k in range(size)]
    found = torch.zeros_like(weight)
    found[rows] = torch.linalg.solve(h[rows][:, rows], g[rows])
    return found


@pytest.mark.parametrize(("groups", "rounds"), [(24, 5), (24, 40), (8, 1), (8, 3)])
def test_pruning_against_loops(groups: int, rounds: int) -> None:
    weight, hessian = problem()
    local = LocalPruner(weight, hessian, groups)
    for keep in (1, groups // 3, groups - 2):
        assert close(local.prune(keep, rounds), slow_prune(weight, hessian, groups, keep, rounds), 1e-9)
    assert torch.equal(local.prune(groups), weight) and not local.prune(0).any()


def test_elimination_is_the_inverse_of_the_rest() -> None:
    weight, hessian = problem()
    target = hessian @ weight
    gone, stay = torch.tensor([1, 7, 8]), torch.tensor([i for i in range(24) if i not in (1, 7, 8)])
    inverse, rest = eliminate(torch.linalg.inv(hessian), weight, gone, stay)
    assert close(inverse, torch.linalg.inv(hessian[stay][:, stay]), 1e-9)
    assert close(rest, torch.linalg.solve(hessian[stay][:, stay], target[stay]), 1e-9)


def test_a_score_is_what_is_lost_and_what_it_explains() -> None:
    """Without the second term, the exact rise of f; both by hand for a layer of two uncorrelated inputs."""
    weight, hessian = torch.tensor([[2.0], [3.0]]), torch.diag(torch.tensor([4.0, 0.5]))
    found = group_scores(torch.linalg.inv(hessian), weight, hessian @ weight, 1)
    assert found.tolist() == pytest.approx([1.5 * 4 * 4, 1.5 * 0.5 * 9])
    found = group_scores(torch.linalg.inv(hessian), weight, hessian @ weight, 2)
    assert found.tolist() == pytest.approx([1.5 * 4 * 4 + 1.5 * 0.5 * 9])


def test_how_many_stay() -> None:
    assert kept(5, 0.8) == 1 and kept(5, 0.8, authors_counts=True) == 0, "5 * (1 - 0.8) is below 1 in floating point"
    assert kept(4, 0.5) == 2 and kept(4, 0.625) == 2 and kept(11008, 0.125) == 9632


def test_dead_inputs_go_first_and_for_nothing() -> None:
    weight, hessian = problem()
    hessian[:6], hessian[:, :6] = 0, 0
    found = LocalPruner(weight, hessian, 24).prune(18, 4)
    assert not found[:6].any() and close(found[6:], weight[6:], 1e-12)


def test_zero_groups_leave_the_least_squares() -> None:
    """Already zero, with live inputs: the dense weights are best; the authors' inverse spoils them."""
    weight, hessian = problem()
    weight[:6] = 0
    assert close(LocalPruner(weight, hessian, 24).prune(18, 4), weight, 1e-12)
    theirs = LocalPruner(weight, hessian, 24, authors_refit=True).prune(18, 4)
    assert not theirs[:6].any() and not close(theirs, weight, 0.05)
    found = LocalPruner(weight, hessian, 24).prune(10, 14)
    rest = slow_prune(weight[6:], hessian[6:, 6:], 18, 10, 14)
    assert close(found[6:], rest, 0.05), "but for damping, which is by the mean of all inputs"


def test_magnitude_drops_the_least() -> None:
    weight = torch.tensor([[1.0], [-1.0], [0.1], [3.0], [2.0], [0.0]])
    assert by_magnitude(weight, 3, 1).flatten().tolist() == pytest.approx([0, 0, 0.1, 3, 0, 0])
    assert by_magnitude(weight, 3, 2).flatten().tolist() == pytest.approx([0, 0, 0.1, 3, 2, 0])
    assert members(torch.tensor([2, 0]), 2).tolist() == [4, 5, 0, 1]


# ---- search ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=60, deadline=None)
def test_flips_keep_what_is_pruned_of_each_kind(seed: int, same: bool) -> None:
    rng = random.Random(seed)
    ranges = [range(-rng.randint(0, 3), rng.randint(0, 3) + 1) for _ in range(8)]
    kinds = ["mlp", "attention"] * 4
    child = evolution.mutate((0,) * 8, ranges, kinds, rng, same)
    assert all(level in own for level, own in zip(child, ranges, strict=True))
    assert sum(child[::2]) == 0 and sum(child[1::2]) == 0
    assert sum(map(abs, child)) <= 8


def test_children_differ_and_may_be_few() -> None:
    kinds = ["mlp", "attention"] * 3
    ranges = [range(-1, 2)] * 6
    children = evolution.offspring((0,) * 6, 20, ranges, kinds, random.Random(0))
    assert len(children) == len(set(children)) == 20
    few = evolution.offspring((0, 0), 20, [range(-1, 2)] * 2, ["mlp", "attention"], random.Random(0))
    assert few == [(0, 0)], "no other layer of a kind to exchange with"
    assert evolution.offspring((0,) * 4, 5, [range(0, 1)] * 4, kinds[:4], random.Random(0)) == [(0,) * 4]


def test_blocks_are_drawn_once_and_cut() -> None:
    rng = random.Random(0)
    drawn = evolution.draw_blocks([10] * 8, 35, rng)
    assert len({block for block, _ in drawn}) == 4 and [size for _, size in drawn] == [10, 10, 10, 5]
    assert evolution.draw_blocks([10] * 3, 99, rng) == [(0, 10), (1, 10), (2, 10)]
    assert len(evolution.draw_blocks([10] * 8, 31, rng)) == 3, "a single token predicts nothing"


def test_elimination_in_stages_keeps_the_parent_until_beaten() -> None:
    seen: list[list[evolution.State]] = []

    def evaluate(stage: int, states: list[evolution.State]) -> list[float]:
        seen.append(states)
        return [abs(s[0] - 3) + 0.25 for s in states]

    assert evolution.select((3,), [(1,), (2,), (5,), (9,)], [2, 1], evaluate) == ((3,), 0.25)
    assert seen == [[(1,), (2,), (5,), (9,)], [(2,), (1,), (3,)]]
    assert evolution.select((7,), [(1,), (2,), (5,), (9,)], [3, 2], evaluate) == ((2,), 1.25)


def test_sparse_kl_against_loops() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 9), torch.randn(2, 4, 9)
    total, count = evolution.sparse_kl(student, *evolution.top(teacher, 3))
    expected_total = 0.0
    for b in range(2):
        for t in range(3):
            best = sorted(range(9), key=lambda v: -float(teacher[b, t, v]))[:3]
            p = torch.tensor([float(teacher[b, t, v]) for v in best]).softmax(0)
            q = torch.tensor([float(student[b, t, v]) for v in best]).softmax(0)
            expected_total += float((p * (p / q).log()).sum())
    assert count == 6 and float(total) == pytest.approx(expected_total, rel=1e-5)
    whole, _ = evolution.sparse_kl(student, *evolution.top(teacher, 9))
    p, q = teacher[:, :-1].log_softmax(-1), student[:, :-1].log_softmax(-1)
    assert float(whole) == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-5)


def test_expected_weights_by_hand() -> None:
    levels = {-1: torch.tensor([4.0]), 0: torch.tensor([2.0]), 1: torch.tensor([0.0])}
    keeps = {-1: 3, 0: 2, 1: 1}
    assert float(expected(levels, keeps, "weighted")) == pytest.approx((3 * 4 + 2 * 2) / 6)
    assert float(expected(levels, keeps, "median")) == 2


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_blocks_run_one_by_one_and_from_the_middle(kind: str) -> None:
    model, ids = decoder(kind), text(3)
    blocks = Blocks(Anatomy(model))
    with torch.no_grad():
        whole, states = model(ids).logits, [blocks.enter(ids)]
        for i in range(3):
            states.append(blocks.step(i, states[-1]))
        for first, hidden in enumerate(states):
            assert torch.allclose(blocks.logits(ids, first, hidden), whole, atol=1e-5)


@pytest.mark.parametrize("accumulation", ["weighted", "median", "none"])
def test_later_blocks_see_what_they_should(accumulation: str) -> None:
    """H of the last block's layers is that of the model with the earlier blocks' expected weights."""
    model = pruner(error_accumulation=accumulation).start(text(), 4)
    twin = decoder()
    layers, seen = prunables(Anatomy(twin)), []
    if accumulation != "none":
        for layer, own in zip(layers[:4], model._running.layers, strict=False):
            keeps = {j: int(own.turned(w).reshape(own.groups, -1).any(1).sum()) for j, w in own.levels.items()}
            layer.put(expected(own.levels, keeps, accumulation))
    layers[4].module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        twin(text())
    local = LocalPruner(layers[4].turned(layers[4].weight), seen[0].T @ seen[0], 48)
    assert close(local.prune(24, 16).T, model._running.layers[4].levels[0], 2e-3)


def test_children_from_the_first_difference_are_evaluated_as_a_whole() -> None:
    model = pruner(generations=2).start(text(), 4)
    states: list[evolution.State] = [(0,) * 6, (1, 0, 0, 0, -1, 0), (0, 0, 0, 1, 0, -1), (0, 0, 1, 0, -1, 0)]
    drawn = [(0, 16), (3, 16), (5, 9)]
    with torch.no_grad():
        found = model._fitness(states[0], states, drawn)
        for state, value in zip(states, found, strict=True):
            total, count = 0.0, 0
            for block, size in drawn:
                ids = text()[block : block + 1, :size]
                model._running.load(state)
                loss, n = evolution.sparse_kl(model.backbone(ids).logits, *evolution.top(decoder()(ids).logits, 40))
                total, count = total + float(loss), count + n
            assert value == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("fitness", ["sparse_kl", "kl", "ppl"])
def test_search_keeps_the_budget_and_never_rises_on_fixed_text(fitness: str) -> None:
    model = searched(pruner(fresh=False, generations=4, fitness=fitness, top_k=8))
    assert model.rises == 0 and bool((model.history > 0).all())
    gone = model.removed.tolist()
    assert sum(gone[::2]) == 3 * 24 and sum(gone[1::2]) == 3 * 2
    assert [int((~layer.alive()).sum()) for layer in model.layers] == gone
    assert model._search is None and model.finished


def test_no_generations_is_the_same_share_everywhere() -> None:
    model = searched(pruner(generations=0))
    assert model.removed.tolist() == [24, 2] * 3
    assert [int((~layer.alive()).sum()) for layer in searched(pruner(generations=0, local="magnitude")).layers] == [
        24,
        2,
    ] * 3


def test_a_round_goes_on_from_the_last_with_half_the_step() -> None:
    model = pruner(step=0.25).start(text(), 4)
    layers, first = model._running.layers, model.centre.clone()
    assert [model._step(layer) for layer in layers[:2]] == [12, 1]
    for _ in range(3):
        model.generation()
    assert int(model.round) == 1 and model.state == (0,) * 6
    assert torch.equal(model.centre, model.removed) and not torch.equal(model.centre, first)
    assert [model._step(layer) for layer in layers[:2]] == [6, 1]
    for layer, gone in zip(layers, model.centre.tolist(), strict=True):
        d = model._step(layer)
        dead = {j: int((~layer.turned(w).reshape(layer.groups, -1).any(1)).sum()) for j, w in layer.levels.items()}
        assert dead == {j: gone + j * d for j in dead} and len(dead) > 1


def test_an_interrupted_search_ends_the_same(tmp_path: Path) -> None:
    whole = searched(pruner())
    half = pruner().start(text(), 4)
    for _ in range(4):  # into the second round
        half.generation()
    checkpoint: dict[str, Any] = {"state_dict": half.state_dict()}
    half.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "half.ckpt")
    left = torch.load(tmp_path / "half.ckpt", weights_only=True)
    again = pruner(decoder(seed=5))
    again.on_load_checkpoint(left)
    again.load_state_dict(left["state_dict"])
    again.on_train_start()
    while not again.finished:
        again.generation()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())
    with pytest.raises(ZooError, match="start from the dense one, or resume"):
        again.start(text())


def test_a_trainer_searches_to_the_end(tmp_path: Path) -> None:
    data = LMCalibrationDataModule(batch_size=4, block=16, tokens=800)
    model = TyrThePruner.from_variant("tiny")
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(
        max_epochs=9, accelerator="cpu", enable_model_summary=False, default_root_dir=tmp_path, **quiet
    )
    trainer.fit(model, data)
    assert model.finished and trainer.current_epoch < 2
    (found,) = trainer.test(model, data, verbose=False)
    ids = torch.cat([batch["input_ids"] for batch in data.test_dataloader()])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert found["test/perplexity"] == pytest.approx(math.exp(float(loss)), rel=1e-4)
    assert found["test/parameters"] == model.export().num_parameters()


# ---- the smaller model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_the_smaller_model_is_the_pruned_one(kind: str, tmp_path: Path) -> None:
    """Also with groups of query heads that died in part, a layer without heads, and one without neurons."""
    from transformers import AutoModelForCausalLM

    from zoo.language.compression import narrow

    method = pruner(decoder(kind, num_attention_heads=8), generations=0).start(text(), 4)
    for layer, groups in zip(method.layers[1:], ([0, 1, 2, 5], [*range(48)], [*range(8)]), strict=False):
        layer.turned(layer.module.weight.data).view(layer.groups, layer.size, -1)[groups] = 0
    small = method.export()
    ids, options = text(2), {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        dense = method.backbone(ids, attention_mask=mask).logits
        assert float((small(ids, attention_mask=mask).logits - dense)[:, 5:].abs().max()) < 1e-5 * float(
            dense.abs().max()
        )
    if kind not in narrow.TYPES:
        assert type(small) is type(method.backbone)
        return
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__.startswith("Narrow") and not list(tmp_path.glob("*.py"))
    assert loaded.num_parameters() == method.size() < method.backbone.num_parameters()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, small(ids).logits)
        written = [m.generate(ids, attention_mask=mask, **options) for m in (method.backbone, loaded)]
        again = loaded.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(*written) and torch.equal(written[1], again)


def test_key_value_heads_go_with_the_last_that_reads_them() -> None:
    from zoo.language.compression.narrow import plan, shape

    alive = torch.tensor([1, 0, 0, 0, 1, 1, 0, 0], dtype=torch.bool)
    left = plan(alive, torch.tensor([True, False, True]), 4)
    assert left == {"heads": [0, 4, 5], "neurons": [0, 2], "kv": [0, 2]}
    assert shape(left, 2) == {"reads": [0, 1, 1], "neurons": 2}
    nothing = plan(torch.zeros(8, dtype=torch.bool), torch.zeros(3, dtype=torch.bool), 4)
    assert nothing == {"heads": [0], "neurons": [0], "kv": [0]}


def test_a_checkpoint_of_a_hub_model_holds_what_was_pruned(tmp_path: Path) -> None:
    decoder().save_pretrained(tmp_path / "dense")
    method = searched(TyrThePruner(backbone=str(tmp_path / "dense"), generations=0))
    method.save_pretrained(tmp_path / "pruned")
    held = load_file(tmp_path / "pruned" / "model.safetensors")
    weights = [key for key in held if key.startswith("backbone.")]
    assert len(weights) == 6 and all(key.endswith(("o_proj.weight", "down_proj.weight")) for key in weights)
    again = TyrThePruner.from_pretrained(tmp_path / "pruned")
    assert torch.equal(again(text()), method.eval()(text()))


# ---- text -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def characters(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("characters")
    character_tokenizer(sorted(set("abcdefghij \n"))).save_pretrained(folder)
    return str(folder)


def test_plays_are_cut_nine_to_one(tmp_path: Path, characters: str) -> None:
    (tmp_path / "input.txt").write_text("abcdefghij" * 40)
    data = LMCalibrationDataModule(str(tmp_path), batch_size=2, block=8, tokenizer=characters)
    data.setup()
    batch = next(iter(data.test_dataloader()))
    assert data.words.decode(batch["input_ids"][0]) == "abcdefgh" and batch["name"] == ["test:0", "test:1"]
    assert (len(data.dataset("train")), len(data.dataset("test"))) == (45, 5)
    assert bool(batch["attention_mask"].all())


def test_documents_are_joined_and_named_splits_kept(tmp_path: Path, characters: str) -> None:
    (tmp_path / "corpus_train.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ("abc", "d")) + "\n")
    (tmp_path / "test.txt").write_text("jjjj")
    data = LMCalibrationDataModule(str(tmp_path), block=3, tokenizer=characters)
    data.setup()
    ids = data.dataset("train").ids  # type: ignore[attr-defined]
    assert data.words.decode(ids.flatten()) == "abc\n\nd" and list(data._sets) == ["train", "test"]
    assert data.words.decode(data.dataset("test").ids[0]) == "jjj"  # type: ignore[attr-defined]


def test_own_texts_come_back_as_a_table(tmp_path: Path, characters: str) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("abcdefghij")
    (folder / "b.jsonl").write_text('{"text": "abc"}\n')
    (folder / "c.jsonl").write_text("no json\n")
    data = LMCalibrationDataModule(block=8, tokenizer=characters).from_files(folder)
    model = pruner().eval()
    predictions = [model.predict_step(batch, 0) for batch in data.predict_dataloader()]
    (table,) = data.write(predictions, tmp_path / "out")
    rows = [line.split(",") for line in table.read_text().splitlines()]
    assert [row[0] for row in rows] == ["name", "a.txt:0", "a.txt:1", "b.jsonl#1"]
    assert [path.name for path, _ in data.skipped] == ["c.jsonl"]
    alone = torch.tensor(data.words("abc")["input_ids"])[None]
    loss = torch.nn.functional.cross_entropy(model(alone)[0, :-1], alone[0, 1:])
    assert float(rows[3][1]) == pytest.approx(float(loss), abs=1e-4)


def test_markov_text_is_as_said() -> None:
    language = MarkovText(0, symbols=6)
    assert torch.allclose(language.odds.sum(-1), torch.ones(6, 6))
    ids = language.draw(400, 30, torch.Generator().manual_seed(0)) - 2
    pairs = ids[:, :-2] * 6 + ids[:, 1:-1]
    count = torch.zeros(36, 6).index_put_((pairs.flatten(), ids[:, 2:].flatten()), torch.ones(1), accumulate=True)
    often = count.sum(1) > 300
    assert float((count / count.sum(1, keepdim=True) - language.odds.view(36, 6))[often].abs().max()) < 0.12
    assert 1 < language.perplexity(4000) < 6
    assert torch.equal(MarkovText(0, 6).odds, language.odds) and not torch.equal(MarkovText(1, 6).odds, language.odds)


def test_decoders_to_prune_are_made(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("to be or not to be, that is the question\n" * 20)
    sizes: dict[str, Any] = {"steps": 2, "layers": 1, "width": 16, "heads": 2, "batch": 4}
    for name, make, more in (("m", pretrain_markov, {}), ("c", pretrain_characters, {"root": str(tmp_path)})):
        (tmp_path / name).mkdir()
        make(tmp_path / name, 0, **more, **sizes)  # type: ignore[operator]
        data = LMCalibrationDataModule(batch_size=2, tokenizer=str(tmp_path / name), tokens=640)
        model = TyrThePruner(backbone=str(tmp_path / name), generations=0, local="magnitude")
        assert model(next(iter(data.test_dataloader()))["input_ids"] % 10).shape[-1] == len(data.words)


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"sparsity": 0.0}, r"sparsity is 0.0; it must lie in \(0, 1\)"),
        ({"sparsity": 1.0}, r"sparsity is 1.0; it must lie in"),
        ({"sparsity": 0.95}, r"a layer has 4 heads: 4 of them would go.*give 0.25 to 0.75"),
        ({"sparsity": 0.05}, r"a layer has 4 heads: 0 of them would go"),
        ({"fitness": "loss"}, "fitness is 'loss'; one of sparse_kl, kl, ppl"),
        ({"error_accumulation": "mean"}, "error_accumulation is 'mean'"),
        ({"local": "random"}, "local is 'random'; one of obs, magnitude"),
        ({"survivors": [2]}, "both need one a stage"),
        ({"stage_tokens": [1, 9]}, "from 2 are accepted"),
        ({"levels": 8}, "levels=8"),
        ({"rounds": 0}, "rounds is 0; at least 1"),
        ({"damping": -0.1}, "damping=-0.1"),
    ],
)
def test_numbers_out_of_range(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        pruner(**arguments)


def test_models_that_cannot_be_pruned() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    opt = OPTForCausalLM(
        OPTConfig(
            vocab_size=20,
            hidden_size=16,
            ffn_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            word_embed_proj_dim=16,
        )
    )
    with pytest.raises(ZooError, match=r"No facts of the architecture 'opt'; known are .*Family\(layers="):
        pruner(opt)
    broken = decoder()
    broken.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ZooError, match=r"projection of layers.1.mlp has NaN or infinite weights"):
        pruner(broken)
    tied = decoder()
    tied.model.layers[2].mlp.down_proj.weight = tied.model.layers[0].mlp.down_proj.weight
    with pytest.raises(ZooError, match=r"layers.0.mlp.down_proj.weight and model.layers.2.* are one tied weight"):
        prunables(Anatomy(tied))
    quantised = decoder()
    quantised.model.layers[0].self_attn.o_proj.weight = torch.nn.Parameter(
        torch.zeros(32, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(ZooError, match=r"no plain floating-point weight \(quantised\?\)"):
        prunables(Anatomy(quantised))


def test_text_that_cannot_calibrate() -> None:
    for blocks in ([], [torch.zeros(0, 8, dtype=torch.long)]):
        with pytest.raises(ZooError, match="No calibration text"):
            pruner().start(blocks)
    with pytest.raises(ZooError, match="blocks of one length"):
        pruner().start([text(2, 8), text(2, 9)])
    with pytest.raises(ZooError, match="32 tokens do not determine a layer of 48 inputs: give more text, or damping"):
        pruner(damping=0.0).start(text(4, 8))
    with pytest.raises(ZooError, match="Blocks of 65 tokens; the model takes 64"):
        pruner().start(text(2, 65))
    with pytest.raises(ZooError, match=r"A token is 40; the model has 40"):
        pruner().start(text() + 1)
    with pytest.raises(ZooError, match="No search is going on: call start"):
        pruner().generation()
    with pytest.raises(ZooError, match="All inputs of a layer are zero"):
        LocalPruner(torch.ones(4, 2), torch.zeros(4, 4), 4)
    with pytest.raises(ZooError, match="raise `damping`"):
        LocalPruner(torch.ones(4, 2), torch.ones(4, 4), 4, damping=0.0).prune(2)
    with pytest.raises(ZooError, match="NaN or infinite"):
        LocalPruner(torch.full((4, 2), torch.nan), torch.ones(4, 4), 4)


def test_text_that_cannot_be_read(tmp_path: Path, characters: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no text: expected text files"):
        LMCalibrationDataModule(str(tmp_path), tokenizer=characters).setup()
    (tmp_path / "a.jsonl").write_text('{"words": "a"}\n')
    with pytest.raises(ZooError, match=r'a.jsonl, line 1: expected {"text"'):
        LMCalibrationDataModule(str(tmp_path), tokenizer=characters).setup()
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ZooError, match=r"train text has 0 tokens, less than a block of 64"):
        LMCalibrationDataModule(str(tmp_path), tokenizer=characters).setup()
    with pytest.raises(ZooError, match="give `tokenizer`"):
        LMCalibrationDataModule(str(tmp_path)).setup()
    with pytest.raises(ValueError, match="block=1, tokens=200000"):
        LMCalibrationDataModule(block=1)
    with pytest.raises(ZooError, match=r"input.txt is missing"):
        pretrain_characters(tmp_path, 0, str(tmp_path))


# ---- real data ------------------------------------------------------------------------------------------------------


def test_tiny_shakespeare(tmp_path: Path) -> None:
    root = Path(os.environ.get("ZOO_DATA", "")) / "tinyshakespeare"
    if not os.environ.get("ZOO_DATA") or not root.is_dir():
        pytest.skip("needs $ZOO_DATA/tinyshakespeare")
    character_tokenizer(sorted(set((root / "input.txt").read_text()))).save_pretrained(tmp_path)
    data = LMCalibrationDataModule(str(root), block=64, tokenizer=str(tmp_path))
    assert len(data.words) == 67
    assert (len(data.dataset("train")), len(data.dataset("test"))) == (1003854 // 64, 111540 // 64)
