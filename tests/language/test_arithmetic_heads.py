"""ArithmeticHeads: what is found, what knocking out does, what alone is tuned; its prompts from words and from text."""

import gzip
import json
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor

from zoo.core import ZooError
from zoo.engines.patching import Site, patched
from zoo.language.llm.arithmetic_heads import ArithmeticHeads
from zoo.language.llm.data_arithmetic import ArithmeticPromptDataModule
from zoo.language.llm.head_tuning import _from_end
from zoo.language.llm.languages import ArithmeticLanguage, all_right, masked_loss, pretrain_arithmetic, word_tokenizer
from zoo.nn.backbones import build_backbone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder that adds modulo 5 and copies."""
    found = tmp_path_factory.mktemp("decoder")
    pretrain_arithmetic(found, 3, modulus=5, accuracy=0.9, steps=600, layers=2, width=32, batch=64, lr=4e-3)
    return found


def tuner(folder: Path, **given: Any) -> ArithmeticHeads:
    return ArithmeticHeads(**{"backbone": str(folder), "heads": 2, "mlps": 1, "find_batches": 2, "lr": 1e-3, **given})


def data(**given: Any) -> ArithmeticPromptDataModule:
    found = ArithmeticPromptDataModule(**{"modulus": 5, "batch_size": 25, "length": 100, **given})
    found.setup()
    return found


def fit(model: ArithmeticHeads, steps: int = 4, **given: Any) -> ArithmeticHeads:
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_steps=steps, accelerator="cpu", enable_model_summary=False, **options)
    trainer.fit(model, data(**given))
    return model


# ---- the language ---------------------------------------------------------------------------------------------------


def test_sums_are_modular_and_their_likes_are_not() -> None:
    language = ArithmeticLanguage(7)
    a, b = torch.tensor([3, 6]), torch.tensor([2, 5])
    prompt, answer = language.sums(a, b)
    assert language.tokenizer.batch_decode(prompt) == ["3 + 2 =", "6 + 5 ="]
    assert language.tokenizer.batch_decode(answer[:, None]) == ["5", "4"]
    assert language.tokenizer.batch_decode(language.sums(a, b, "&")[1][:, None]) == ["3", "6"]
    assert (language.sums(a, b, "&")[0] != prompt).sum(1).tolist() == [1, 1], "the cue alone differs"


def test_sentences_end_in_their_labels() -> None:
    language = ArithmeticLanguage(7)
    ids, labels = language.draw(64, torch.Generator().manual_seed(0))
    assert ids.shape == labels.shape == (64, 8)
    known = labels != -100
    assert torch.equal(ids[known], labels[known]) and known[:, -1].all() and not known[:, 0].any()
    texts = language.tokenizer.batch_decode(
        language.draw_others(4, torch.Generator().manual_seed(0))[0], skip_special_tokens=True
    )
    for i, text in enumerate(texts):
        words = text.split()
        assert words[0] == ("back" if i % 2 else "copy") and words[3] == ":"
        assert words[4:] == (words[1:3][::-1] if i % 2 else words[1:3])


def test_all_right_needs_every_label() -> None:
    logits = torch.zeros(2, 3, 4)
    logits[:, 0, 1] = logits[:, 1, 2] = 1.0
    labels = torch.tensor([[-100, 1, 2], [-100, 1, 3]])
    assert all_right(logits, labels).tolist() == [True, False]
    assert all_right(logits, torch.tensor([[0, -100, 2], [3, -100, -100]])).tolist() == [True, True]


# ---- finding --------------------------------------------------------------------------------------------------------


def test_effects_are_relative_changes_along_the_path(folder: Path) -> None:
    """Against a loop: one head at a time, every other head held at what it gave."""
    model = tuner(folder, least=0.0, correct=False).eval()
    batch = next(iter(data().train_dataloader()))
    model.find([batch])
    anatomy, heads = model.anatomy, model.anatomy.sites("head")
    from zoo.engines.patching import capture

    rows = torch.arange(len(batch["answer"]))
    with torch.no_grad():
        with capture(anatomy, heads) as old:
            before = model.backbone(batch["reference"]).logits[:, -1].softmax(-1)[rows, batch["answer"]]
        with capture(anatomy, heads) as new:
            model.backbone(batch["counterfactual"])
        for site in heads:
            held = {h: value for h, value in old.items() if h.layer >= site.layer} | {site: new[site]}
            with patched(anatomy, held):
                after = model.backbone(batch["reference"]).logits[:, -1].softmax(-1)[rows, batch["answer"]]
            expected = ((after - before) / before).mean()
            assert abs(float(expected - model.effects[site.layer, site.head])) < 1e-3 * max(1.0, float(expected.abs()))


def test_ranks_are_by_size_and_others_are_others(folder: Path) -> None:
    model = tuner(folder)
    model.effects.copy_(torch.tensor([[0.1, -0.9, 0.0, 0.2], [0.3, 0.0, -0.5, 0.0]]))
    model.mlp_effects.copy_(torch.tensor([-0.1, -0.4]))
    assert model.ranked(3, 1) == [Site(0, "head", 1), Site(1, "head", 2), Site(1, "head", 0), Site(1, "mlp")]
    draws = [model.ranked(3, 1, how="random", draw=i) for i in range(6)]
    assert all(not set(draw) & set(model.ranked(3, 1)) and len(set(draw)) == 4 for draw in draws)
    assert len({tuple(draw) for draw in draws}) > 1


def test_only_answers_that_the_model_knows_count(folder: Path) -> None:
    batch = next(iter(data().train_dataloader()))
    with pytest.raises(ZooError, match=r"above 0.1: nothing to find heads by"):
        tuner(folder).find([{**batch, "answer": torch.full_like(batch["answer"], 7)}])
    assert 0 < int(tuner(folder).find([batch]).found) <= 25


# ---- tuning ---------------------------------------------------------------------------------------------------------


def test_only_what_was_found_is_tuned(folder: Path) -> None:
    model = tuner(folder)
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    fit(model)
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items())
    assert model.deltas is not None and model.deltas.sites == model.ranked(2, 1)
    assert all(bool(value.any()) for value in model.deltas.values.values())
    kept = model.saved_state_dict()
    assert not any(key.startswith("backbone.") for key in kept)
    held = sum(value.numel() for value in kept.values())
    assert held < 0.7 * sum(value.numel() for value in before.values())


def test_the_first_step_is_that_of_masked_gradients(folder: Path) -> None:
    """AdamW on the changes alone takes the step of AdamW on the weights with every other gradient at zero."""
    model = fit(tuner(folder, heads=1, mlps=0, weight_decay=0.0), steps=1)
    plain = tuner(folder, tune="full")
    batch = next(iter(data().train_dataloader()))
    loss = masked_loss(plain.backbone, batch["input_ids"], batch["labels"], batch["attention_mask"])
    loss.backward()
    parameters = dict(plain.backbone.named_parameters())
    assert model.deltas is not None
    for part, change in model.deltas.changes(model.anatomy):
        gradient = part.of(parameters[part.name].grad)
        step = -1e-3 * gradient / (gradient.abs() + 1e-8)  # Adam's first
        assert (change - step).abs().max() < 2e-5, part


def test_merged_weights_say_the_same(folder: Path) -> None:
    model = fit(tuner(folder))
    ids = next(iter(data().test_dataloader()))["input_ids"]
    assert torch.allclose(model(ids), model.merged()(ids).logits, atol=1e-4)


@pytest.mark.parametrize("tune", ["random", "full", "lora", "none"])
def test_baselines_train_or_rest(folder: Path, tune: str) -> None:
    model = tuner(folder, tune=tune)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fit(model)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    trained = {key for key in moved if key.startswith(("backbone.", "deltas.values"))}
    if tune == "none":
        assert not trained
    elif tune == "lora":
        assert trained and all(".lora_" in key for key in trained)
    else:
        assert trained and all(key.startswith("backbone." if tune == "full" else "deltas.") for key in trained)


def test_adapters_on_a_live_gpt2_say_what_it_said() -> None:
    """Its linear layers are no ``nn.Linear``; a fresh adapter changes nothing."""
    live: Any = build_backbone(ArithmeticHeads.TINY).eval()
    model = ArithmeticHeads.from_backbone(live, tune="lora", heads=2).eval()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids), live(ids).logits)
    assert len(model.changed_weights()) == 2 * 4 * 2, "two matrices on four layers of each of two blocks"


def test_knocking_out_the_found_heads_costs_the_sums(folder: Path) -> None:
    model = tuner(folder, tune="none")
    batches = list(data().test_dataloader())
    model.find(batches)
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0] if key != "name"}
    right = float(model.right(whole).float().mean())
    without = float(model.knocked_out(whole, model.ranked(4)).float().mean())
    assert right >= 0.9 and without < right - 0.3
    assert torch.equal(model.knocked_out(whole, []), model.right(whole)), "nothing knocked out changes nothing"
    attended = model.attended(whole, model.ranked(4))
    assert attended.shape == (4,) and bool(((attended >= 0) & (attended <= 1)).all())


def test_means_are_laid_from_the_end() -> None:
    mean = torch.arange(3.0).view(1, 3, 1)
    assert _from_end(mean, 2).flatten().tolist() == [1, 2]
    assert _from_end(mean, 5).flatten().tolist() == [0, 0, 0, 1, 2]


# ---- text -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    text = "+ - * / , = The sum pair of and is difference product ratio Question: Answer: What two three ? five . ####"
    word_tokenizer([*map(str, range(100)), *text.split(" ")]).save_pretrained(folder)
    return str(folder)


def write_gsm8k(root: Path, packed: bool) -> None:
    line = json.dumps({"question": "What is two and three ?", "answer": "two and three is five . #### 5"})
    for split, count in (("train", 6), ("test", 3)):
        text = "\n".join([line] * count)
        if packed:
            (root / f"{split}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (root / f"{split}.jsonl").write_text(text)


@pytest.mark.parametrize("packed", [False, True])
def test_gsm8k_is_read_and_prompts_align(tmp_path: Path, words: str, packed: bool) -> None:
    write_gsm8k(tmp_path, packed)
    found = ArithmeticPromptDataModule(str(tmp_path), batch_size=6, tokenizer=words)
    batch = next(iter(found.train_dataloader()))
    text = found.words.batch_decode(batch["input_ids"])[0]
    assert text.split()[:3] == ["Question:", "What", "is"]
    learnt = batch["labels"][0][batch["labels"][0] != -100]
    assert found.words.decode(learnt).split()[:3] == ["two", "and", "three"]
    assert batch["reference"].shape == batch["counterfactual"].shape == batch["reference_mask"].shape
    for reference, answer in zip(found.words.batch_decode(batch["reference"]), batch["answer"].tolist(), strict=True):
        a, b = (int(word) for word in reference.split() if word.isdigit())
        value = int(found.words.decode([answer]))
        assert value in (a + b, a - b, a * b, a / b if b else None)
    assert len(found.dataset("test")) == 3


def test_own_prompts_come_back_as_a_table(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "prompts.txt").write_text("1 + 2 =\n3 & 4 =\n")
    found = ArithmeticPromptDataModule(modulus=5).from_files(tmp_path / "prompts.txt")
    model = tuner(folder).eval()
    predictions = [model.predict_step(batch, 0) for batch in found.predict_dataloader()]
    (table,) = found.write(predictions, tmp_path / "out")
    rows = [line.split(",") for line in table.read_text().splitlines()]
    assert rows[0] == ["prompt", "answer", "probability"] and rows[2][:2] == ["3 & 4 =", "3"]


def test_mistakes_are_named(tmp_path: Path, folder: Path, words: str) -> None:
    with pytest.raises(ValueError, match=r"tune is 'some'; one of found, random"):
        tuner(folder, tune="some")
    with pytest.raises(ZooError, match=r"9 heads and 1 MLPs to tune; the model has 8 and 2"):
        tuner(folder, heads=9)
    with pytest.raises(ZooError, match=r"give `tokenizer`"):
        ArithmeticPromptDataModule(str(tmp_path)).setup()
    with pytest.raises(FileNotFoundError, match=r"train.jsonl is missing: expected GSM8K"):
        ArithmeticPromptDataModule(str(tmp_path), tokenizer=words).setup()
    (tmp_path / "train.jsonl").write_text('{"question": "a"}\n')
    with pytest.raises(ZooError, match=r"train.jsonl, line 1: expected a question and an answer"):
        ArithmeticPromptDataModule(str(tmp_path), tokenizer=words).setup()
    write_gsm8k(tmp_path, packed=False)
    with pytest.raises(ZooError, match=r"No text fits into block=8 tokens; the shortest has 1\d"):
        ArithmeticPromptDataModule(str(tmp_path), tokenizer=words, block=8).setup()
    with pytest.raises(ValueError, match=r"operations is \['%'\]; any of \+"):
        ArithmeticPromptDataModule(operations=["%"])
    bare = tmp_path / "bare"
    word_tokenizer(["Question:", "Answer:"]).save_pretrained(bare)
    with pytest.raises(ZooError, match="No template is split alike"):
        ArithmeticPromptDataModule(str(tmp_path), tokenizer=str(bare)).setup()


def test_a_batch_of_the_language_has_what_the_docstring_says() -> None:
    batch: dict[str, Tensor] = next(iter(data().test_dataloader()))
    assert set(batch) == {
        "input_ids", "attention_mask", "labels", "reference", "counterfactual", "reference_mask", "answer", "cues",
        "other_input_ids", "other_attention_mask", "other_labels", "name",
    }  # fmt: skip
    assert batch["cues"].tolist()[0] == [True, True, True, False]
