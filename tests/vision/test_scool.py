"""SCooL: equal to its authors' code, both graphs against loops, FedAvg and D-PSGD as limits, pruning, groups."""

import json
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from zoo.core import ZooError
from zoo.engines.federated import FederatedModule
from zoo.vision.federated.data_federated import FederatedClassificationDataModule
from zoo.vision.federated.scool import (
    SCooL,
    UpdateEncoder,
    attention_graph,
    block_model,
    conv4,
    draw_graph,
    fixed_graph,
    group_partition,
    prepare_groups,
    unit_rows,
)

SMALL = {
    "net": {"name": "mlp", "hidden": [6]}, "num_classes": 6, "in_channels": 1, "image_size": 4, "num_clients": 6,
    "local_steps": 3, "local_batch": 4, "probe": 4, "lr": 0.1, "fix_graph_round": 1, "mask_fraction": 0.5,
    "augment": [], "mean": [], "std": [],
}  # fmt: skip
AUTHORS = {"authors_sums": True, "authors_pruned": True, "authors_relu": True}


def small(**given):
    torch.manual_seed(0)
    model = SCooL(**{**SMALL, **given})
    model.log = lambda *a, **k: None
    return model


def world(number=0, sizes=(8,) * 6, classes=6, side=4, work=None, spread=0.4):
    """A round of clients with two classes each; every three clients have the same."""
    generator = torch.Generator().manual_seed(3)
    clients = len(sizes)
    label = torch.cat([torch.arange(size) % 2 + i // 3 * 2 % (classes - 1) for i, size in enumerate(sizes)])
    centres = torch.rand(classes, 1, side, side, generator=generator)
    noise = torch.rand(len(label), 1, side, side, generator=generator)
    image = (1 - spread) * centres[label] + spread * noise
    who = {"client": list(range(clients)), "size": list(sizes), "work": work or [1.0] * clients}
    return {"image": image, "label": label, **who, "seed": [100 * number + i for i in range(clients)]}


def rounds(model, count, **given):
    for number in range(count):
        model.training_step(world(number, **given), 0)
    return model


def personal(model):
    return model.states.read(range(model.hyperparameters["num_clients"]), "personal.")


def close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    bound = tolerance * max(float(theirs.abs().max()), 1e-12)
    assert float((ours.double() - theirs.double()).abs().max()) <= bound


# ---- the authors' recorded tensors ---------------------------------------------------------------------------------


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("prior", ["sbm", "attention"])
def test_rounds_equal_the_authors(prior, request):
    """Four rounds, the last two pruned: the graph, all models and the encoder after each."""
    if prior == "attention":  # as recorded: AdamW's first steps are nearly signs of gradients that are all rounding
        request.getfixturevalue("float64")
    every = load_file(Path(__file__).parents[1] / "golden/scool.safetensors")
    gold = {key.removeprefix(f"{prior}."): value for key, value in every.items() if key.startswith(f"{prior}.")}
    model = small(prior=prior, scale=2.0 if prior == "attention" else 1.0, **AUTHORS)
    names = [name for name, _ in model.model.named_parameters()]
    for name in names:
        model.states.write(range(6), {name: gold[f"start.{name}"].expand(6, *gold[f"start.{name}"].shape)}, "personal.")
        if prior == "attention":
            model.server.write([0], {f"first.{name}": gold[f"start.{name}"][None]})
    if prior == "attention":
        model.encoder.load_state_dict({k.removeprefix("phi."): v for k, v in gold.items() if k.startswith("phi.")})
    for number in range(4):
        part = {k.removeprefix(f"{number}."): v for k, v in gold.items() if k.startswith(f"{number}.")}

        def local_batch(samples, step, count, part=part):
            who = samples.ids[:count]
            full = torch.ones(count, 4, dtype=torch.bool)
            return {"image": part["image"][who, step], "label": part["label"][who, step], "mask": full}

        def probes(batch, part=part):
            return part["probe_image"], part["probe_label"], torch.ones(6, 4, dtype=torch.bool)

        def first_blocks(size, seeds, part=part):
            return part["gamma"], part["omega"], part["orders"].tolist()

        with mock.patch.multiple(model, local_batch=local_batch, probes=probes, first_blocks=first_blocks):
            model.training_step(world(number), 0)
        close(model.cooperation, part["w"])
        for name, value in personal(model).items():
            close(value, part[f"model.{name}"])
        for name, value in model.encoder.named_parameters() if prior == "attention" else ():
            close(value.detach(), part[f"phi.{name}"])


# ---- the block model -------------------------------------------------------------------------------------------------


def slow_blocks(score, gamma, omega, orders, scale):
    """Eq. 18-21 in loops."""
    count, blocks = gamma.shape
    gamma, omega = gamma.clone(), omega.clone()
    b = [[0.8 if g == h else 0.2 for h in range(blocks)] for g in range(blocks)]
    yes = [[math.log(x + 1e-6) for x in row] for row in b]
    no = [[math.log(1 - x + 1e-6) for x in row] for row in b]
    w = torch.zeros(count, count, dtype=torch.float64)
    for order in orders:
        for i in range(count):
            for j in range(count):
                x = float(score[i, j])
                for g in range(blocks):
                    for h in range(blocks):
                        x += float(omega[i, g] * omega[j, h]) * (yes[g][h] - no[g][h])
                w[i, j] = 1 / (1 + math.exp(-x / scale)) if x > -math.inf else 0.0
        for i in order:
            x = torch.zeros(blocks, dtype=torch.float64)
            for k in range(blocks):
                for j in (j for j in range(count) if j != i):
                    for h in range(blocks):
                        x[k] += omega[j, h] * (w[i, j] * yes[k][h] + w[j, i] * yes[h][k])
                        x[k] += omega[j, h] * ((1 - w[i, j]) * no[k][h] + (1 - w[j, i]) * no[h][k])
                x[k] += torch.digamma(gamma[i, k] + 1e-6) - torch.digamma(gamma[i].sum() + 1e-6)
            omega[i] = x.softmax(0)
            gamma[i] = 1 + omega[i]
    return w, omega


def blocks_of(count=7, blocks=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gamma = torch.rand(count, blocks, generator=generator, dtype=torch.float64) + 0.1
    omega = torch.rand(count, blocks, generator=generator, dtype=torch.float64).softmax(1)
    orders = [torch.randperm(count, generator=generator).tolist() for _ in range(3)]
    return -4 * torch.rand(count, count, generator=generator, dtype=torch.float64), gamma, omega, orders


def test_block_model_equals_loops():
    score, gamma, omega, orders = blocks_of()
    score[2, 5] = score[4, 0] = -torch.inf
    w, found, b = block_model(score, gamma, omega, orders, scale=1.7)
    slow_w, slow_omega = slow_blocks(score, gamma, omega, orders, 1.7)
    close(w, slow_w, 1e-12)
    close(found, slow_omega, 1e-12)
    assert w[2, 5] == w[4, 0] == 0
    close(found.sum(1), torch.ones(7, dtype=torch.float64), 1e-12)
    close(b, 0.2 + 0.6 * torch.eye(3, dtype=torch.float64), 1e-12)


def test_one_block_leaves_only_the_losses():
    score, gamma, omega, orders = blocks_of(blocks=1)
    w, _, _ = block_model(score, gamma, omega, orders)
    # one block: B = 0.8 for every pair
    close(w, (score + math.log(4)).sigmoid(), 1e-5)


def test_the_authors_memberships_fade_with_many_clients():
    """exp(x) / (sum + 1e-6) of x far below 0 is little, and little is left of the prior; a softmax keeps sums of 1."""
    score, gamma, omega, orders = blocks_of(count=100, blocks=2)
    alone = score.sigmoid()  # the losses without a prior
    w, faded, _ = block_model(score, gamma, omega, orders[:2], authors_sums=True)
    assert float(faded.sum(1).mean()) < 0.2
    assert float(((w - alone).abs() / alone).mean()) < 0.01
    w, kept, _ = block_model(score, gamma, omega, orders[:2])
    close(kept.sum(1), torch.ones(100, dtype=torch.float64), 1e-9)
    assert float(((w - alone).abs() / alone).mean()) > 0.3


def test_two_true_blocks_are_found_and_learned():
    generator = torch.Generator().manual_seed(1)
    group = torch.arange(12) % 2
    alike = group[:, None] == group
    score = torch.where(alike, -0.1, -5.0).double() - 0.1 * torch.rand(12, 12, generator=generator)
    gamma = torch.ones(12, 2, dtype=torch.float64)
    omega = torch.rand(12, 2, generator=generator, dtype=torch.float64).softmax(1)
    orders = [torch.randperm(12, generator=generator).tolist() for _ in range(6)]
    w, found, b = block_model(score, gamma, omega, orders, learn=True)
    block = found.argmax(1)
    assert torch.equal((block[:, None] == block), alike)
    assert float(w[alike].min()) > 10 * float(w[~alike].max())
    # Eq. 24 in loops, from what the last pass left (omega changes w no more by then)
    for g in range(2):
        for h in range(2):
            pairs = [(found[i, g] * found[j, h], w[i, j]) for i in range(12) for j in range(12)]
            close(b[g, h], (sum(a * c for a, c in pairs) / sum(a for a, _ in pairs)).clamp(min=1e-6), 1e-3)


# ---- attention -------------------------------------------------------------------------------------------------------


def test_encoder_equals_loops():
    torch.manual_seed(0)
    encoder = UpdateEncoder([(3, 2, 2), (3,)])
    updates = [torch.randn(4, 3, 2, 2), torch.randn(4, 3)]
    f = encoder(updates).detach()
    for i in range(4):
        for j in range(4):
            total = 0.0
            for layer in range(2):
                part = 0.0
                for row in range(3):
                    a, b = (
                        encoder.second[layer](encoder.first[layer](updates[layer][c, row].reshape(-1)).tanh()).tanh()
                        for c in (i, j)
                    )
                    part += float((a @ b).detach())
                total += part / 3
            assert float(f[i, j]) == pytest.approx(total / 2, rel=1e-5)


def test_attention_is_the_product_of_both():
    torch.manual_seed(0)
    likeness, score = torch.randn(5, 5), -3 * torch.rand(5, 5, dtype=torch.float64)
    kept = torch.rand(5, 5) < 0.7
    kept.fill_diagonal_(True)
    w = attention_graph(likeness, score, kept, scale=2.0)
    for i in range(5):
        those = kept[i].nonzero().flatten().tolist()
        raw = {j: math.exp(float(likeness[i, j]) + float(score[i, j]) / 2) for j in those}
        for j in range(5):
            assert float(w[i, j]) == pytest.approx(raw.get(j, 0.0) / sum(raw.values()), rel=1e-6)
    full = torch.ones(5, 5, dtype=torch.bool)
    flat = attention_graph(torch.zeros(5, 5), torch.zeros(5, 5, dtype=torch.float64), full)
    close(flat, torch.full((5, 5), 0.2, dtype=torch.float64))
    with_sums = attention_graph(likeness, score, full, 2.0, authors_sums=True)
    close(with_sums, attention_graph(likeness, score, full, 2.0), 1e-3)


def test_the_authors_prefer_the_worst_of_what_is_left():
    score = torch.tensor([[-0.1, -4.0, -9.0]] * 3, dtype=torch.float64)
    kept = torch.tensor([[True, True, False]] * 3)
    right, theirs = (attention_graph(torch.zeros(3, 3), score, kept, authors_pruned=p) for p in (False, True))
    assert float(right[0, 0]) > float(right[0, 1]) and float(theirs[0, 0]) < float(theirs[0, 1])
    assert float(right[0, 2]) == float(theirs[0, 2]) == 0


def test_encoder_steps_as_adamw_of_each_client_and_their_mean():
    model = small(prior="attention", encoder_lr=0.05)
    names = [n for n, _ in model.encoder.named_parameters()]
    copies = [[p.detach().clone().requires_grad_() for p in model.encoder.parameters()] for _ in range(6)]
    optimizers = [torch.optim.AdamW(copy, lr=0.05, betas=(0.9, 0.99)) for copy in copies]
    torch.manual_seed(1)
    for _ in range(3):
        grads = {n: torch.randn(6, *p.shape) for n, p in model.encoder.named_parameters()}
        with torch.no_grad():
            model._encoder_step(grads, range(6))
        for client, (copy, optimizer) in enumerate(zip(copies, optimizers, strict=True)):
            for name, p in zip(names, copy, strict=True):
                p.grad = grads[name][client]
            optimizer.step()
        for k, p in enumerate(model.encoder.parameters()):
            mean = torch.stack([copy[k].detach() for copy in copies]).mean(0)
            close(p.detach(), mean)
            for copy in copies:
                copy[k].data.copy_(mean)


def test_encoder_learns_along_each_clients_own_loss():
    """The gradient that a client steps along is that of -sum_j t_ij log p_ij of its own row alone."""
    model = small(prior="attention", scale=2.0)
    rounds(model, 1)
    before = {n: p.detach().clone() for n, p in model.encoder.named_parameters()}
    seen = {}
    score = -3 * torch.rand(6, 6, dtype=torch.float64)
    models = {n: v + 0.1 * torch.randn_like(v) for n, v in personal(model).items()}
    kept = torch.ones(6, 6, dtype=torch.bool)
    with mock.patch.object(model, "_encoder_step", lambda grads, ids: seen.update(grads)), torch.no_grad():
        model._attend(models, score, kept, range(6))
    first = model.server.read([0], "first.")
    moved = [first[n] - models[n] for n in first]
    length = torch.cat([m.flatten(1) for m in moved], 1).norm(dim=1)
    encoder = UpdateEncoder([m.shape[1:] for m in moved])
    encoder.load_state_dict(before)
    likeness = encoder([m / length.view(-1, *[1] * (m.ndim - 1)) for m in moved])
    for client in (0, 4):
        target = (score[client] / 2).softmax(0).float()
        loss = F.cross_entropy(likeness[client][None], target[None])
        grads = torch.autograd.grad(loss, list(encoder.parameters()), retain_graph=True)
        for (name, _), grad in zip(encoder.named_parameters(), grads, strict=True):
            close(seen[name][client], grad, 1e-3)


# ---- the round -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["sbm", "attention"])
def test_each_takes_the_others_updates_by_its_row(prior):
    """theta_i - sum_j w_ij delta_j in loops, with rows of sum 1."""
    model = small(prior=prior, mask_fraction=1.0)
    rounds(model, 1)
    before, seen = personal(model), {}
    call = model.cooperate

    def noting(models, weights, batch):
        seen.update(models)
        return call(models, weights, batch)

    with mock.patch.object(model, "cooperate", noting):
        model.training_step(world(1), 0)
    w = model.cooperation
    close(w.sum(1), torch.ones(6))
    assert float((w - torch.eye(6)).abs().max()) > 0.05
    for name, after in personal(model).items():
        for i in range(6):
            total = sum(w[i, j] * (before[name][j] - seen[name][j]) for j in range(6))
            close(after[i], before[name][i] - total)
        close(model.model.state_dict()[name], after.mean(0))


@pytest.mark.parametrize("sizes", [(8,) * 6, (4, 8, 12, 8, 9, 5)])
def test_one_average_for_all_is_fedavg(sizes):
    model = small(prior="dirac", topology="all")
    torch.manual_seed(0)
    keys = {k: v for k, v in SMALL.items() if k not in ("probe", "fix_graph_round", "mask_fraction")}
    fedavg = FederatedModule(**keys, momentum=0.0, weight_decay=0.0, norm="none")
    fedavg.log = lambda *a, **k: None
    fedavg.model.load_state_dict(model.model.state_dict())
    for part in (model, fedavg):
        rounds(part, 2, sizes=sizes)
    for name, value in fedavg.model.state_dict().items():
        close(model.model.state_dict()[name], value)
        close(personal(model)[name][3], value)


def test_nothing_from_others_is_training_alone():
    model = small(prior="dirac", topology="none")
    torch.manual_seed(0)
    keys = {k: v for k, v in SMALL.items() if k not in ("probe", "fix_graph_round", "mask_fraction")}
    local = FederatedModule(**keys, algorithm="local", momentum=0.0, weight_decay=0.0, norm="none")
    local.log = lambda *a, **k: None
    for name, value in model.model.state_dict().items():
        local.states.write(range(6), {name: value.expand(6, *value.shape)}, "personal.")
    for part in (model, local):
        rounds(part, 2)
    for name, value in personal(local).items():
        close(personal(model)[name], value)
    assert model.sent.tolist() == [0, 0]


def test_mixing_models_is_d_psgd():
    """sum_j w_ij theta_j - delta_i on a ring."""
    model = small(prior="dirac", topology="ring", mixing="models")
    rounds(model, 1)
    before, seen = personal(model), {}
    call = model.cooperate
    with mock.patch.object(model, "cooperate", lambda m, w, b: seen.update(m) or call(m, w, b)):
        model.training_step(world(1), 0)
    for name, after in personal(model).items():
        for i in range(6):
            mean = (before[name][i - 1] + before[name][i] + before[name][(i + 1) % 6]) / 3
            close(after[i], mean - (before[name][i] - seen[name][i]))


def test_fixed_graphs_by_hand():
    samples = torch.tensor([1.0, 2.0, 5.0])
    close(fixed_graph("all", [0, 1, 2], 3, samples), torch.tensor([[0.125, 0.25, 0.625]] * 3))
    close(fixed_graph("none", [0, 1, 2], 3, samples), torch.eye(3))
    third = torch.full((3, 3), 1 / 3)
    close(fixed_graph("ring", [0, 1, 2], 3, samples), third)
    half = torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])  # of 6: 0 and 5 are next to each other
    close(fixed_graph("ring", [0, 2, 5], 6, samples), half)
    close(fixed_graph("ring", [0, 1], 2, samples[:2]), torch.full((2, 2), 0.5))
    close(unit_rows(torch.tensor([[0.0, 0.0], [1.0, 3.0]])), torch.tensor([[1.0, 0.0], [0.25, 0.75]]))


@pytest.mark.parametrize("given", [{"prior": "sbm"}, {"prior": "attention", "scale": 2.0}])
def test_together_equals_one_by_one(given):
    net = {"net": {"name": "cnn", "widths": [2, 3], "features": 5}, "augment": ["crop:1", "flip"]}
    at_once, alone, few = (small(**net, **given, stack=stack) for stack in (None, 1, 4))
    assert at_once.together(range(6), {}) == 6
    for model in (at_once, alone, few):
        rounds(model, 3, sizes=(8, 8, 7, 3, 8, 8))  # the last one pruned
    for other in (alone, few):
        close(at_once.cooperation, other.cooperation)
        for name, value in personal(other).items():
            close(personal(at_once)[name], value)


def test_cross_losses_in_loops():
    model = small()
    rounds(model, 2)
    batch = world(7, sizes=(8, 3, 8, 8, 2, 8))
    models = personal(model)
    kept = model.kept.clone()
    assert kept.sum(1).tolist() == [3] * 6
    image, label, mask = model.probes(batch)
    assert mask.sum(1).tolist() == [4, 3, 4, 4, 2, 4]
    found = model.cross_loss(models, batch, kept)
    full = model.cross_loss(models, batch, torch.ones_like(kept))
    for i in range(6):
        own = {name: value[i] for name, value in models.items()}
        for j in range(6):
            rows = mask[j]
            out = torch.func.functional_call(model.model, own, (image[j][rows],))
            loss = F.cross_entropy(out, label[j][rows])
            close(full[i, j], loss)
            if kept[i, j]:
                close(found[i, j], loss)
            else:
                assert found[i, j] == torch.inf


def test_probes_are_the_clients_own_samples():
    model = small(probe=5)
    batch = world(3, sizes=(8, 3, 8, 8, 8, 8), work=[1, 1, 0, 1, 1, 1])
    image, label, mask = model.probes(batch)
    starts = [0, 8, 19, 27, 35]
    for row, (start, client) in enumerate(zip(starts, (0, 1, 3, 4, 5), strict=True)):
        size = batch["size"][client]
        own = batch["image"][start : start + size].flatten(1)
        where = [(own == x.flatten()).all(1).nonzero().flatten().tolist() for x in image[row][mask[row]]]
        assert all(len(w) == 1 for w in where) and len({w[0] for w in where}) == min(size, 5)
        assert torch.equal(label[row][mask[row]], batch["label"][start : start + size][[w[0] for w in where]])
    again = model.probes(batch)
    assert all(torch.equal(a, b) for a, b in zip((image, label, mask), again, strict=True))
    later = model.probes({**batch, "seed": [s + 1 for s in batch["seed"]]})
    assert not torch.equal(image, later[0])


@pytest.mark.parametrize("prior", ["sbm", "attention"])
def test_weak_neighbours_are_dropped_a_round_later(prior):
    model = small(prior=prior, fix_graph_round=1, mask_fraction=0.5)
    rounds(model, 1)
    assert bool(model.kept.all())
    model.training_step(world(1), 0)
    full = model.cooperation.clone()
    assert bool((full > 0).all())
    assert model.kept.sum(1).tolist() == [3] * 6
    if prior == "sbm":
        for i in range(6):
            assert float(full[i][model.kept[i]].min()) >= float(full[i][~model.kept[i]].max())
    kept = model.kept.clone()
    model.training_step(world(2), 0)
    assert torch.equal(model.kept, kept)
    assert torch.equal(model.cooperation > 0, kept)
    close(model.cooperation.sum(1), torch.ones(6))


def test_bytes_are_what_peers_exchange():
    model = small()
    size = 4 * sum(p.numel() for p in model.model.parameters())
    rounds(model, 2)  # every model to every other, a loss back, every update to every other
    assert model.sent.tolist() == [2 * 30 * (2 * size + 4)] * 2
    off = int(model.kept.sum() - model.kept.diagonal().sum())
    model.training_step(world(2), 0)
    assert model.sent.tolist() == [2 * 30 * (2 * size + 4) + off * (2 * size + 4)] * 2
    ring = rounds(small(prior="dirac", topology="ring"), 1)
    assert ring.sent.tolist() == [12 * size] * 2
    attention = rounds(small(prior="attention"), 1)
    phi = 4 * sum(p.numel() for p in attention.encoder.parameters())
    assert attention.sent.tolist() == [30 * (2 * size + 4) + 6 * phi] * 2


@pytest.mark.parametrize("prior", ["sbm", "attention", "dirac"])
def test_who_is_away_keeps_what_it_had(prior):
    model = rounds(small(prior=prior, mask_fraction=0.5, fix_graph_round=1), 1)
    before, graph = personal(model), model.cooperation.clone()
    model.training_step(world(1, work=[1, 1, 0, 1, 0, 1]), 0)
    for name, value in personal(model).items():
        assert torch.equal(value[[2, 4]], before[name][[2, 4]])
        assert not torch.equal(value[0], before[name][0])
    assert torch.equal(model.cooperation[[2, 4]], graph[[2, 4]])
    assert float(model.cooperation[[0, 1, 3, 5]][:, [2, 4]].abs().max()) == 0
    close(model.cooperation.sum(1), torch.ones(6))
    if prior != "dirac":  # who was away has still to choose
        assert bool(model.kept[[2, 4]].all()) and model.kept[[0, 1, 3, 5]].sum(1).tolist() == [3] * 4
    rounds(model, 2)
    assert all(bool(value.isfinite().all()) for value in personal(model).values())


def test_the_graph_finds_who_has_the_same_classes():
    for given in ({"prior": "sbm"}, {"prior": "attention", "scale": 2.0}):
        model = rounds(small(**given, mask_fraction=1.0, local_steps=20), 4)
        alike = model.fellows()
        assert alike[0].tolist() == [False, True, True, False, False, False]
        others = model.cooperation - model.cooperation.diag().diag()
        assert float(others[alike].mean()) > 3 * float(others[~alike & ~torch.eye(6, dtype=torch.bool)].mean())


def test_a_client_answers_with_its_own_classes():
    model = rounds(small(), 1)
    x = torch.rand(5, 1, 4, 4)
    for client, own in ((0, [0, 1]), (4, [2, 3])):
        p = model.predict(x, client=client)
        close(p[:, own].sum(1), torch.ones(5))
        weights = {name: value[client] for name, value in personal(model).items()}
        out = torch.func.functional_call(model.model, weights, (x,))
        close(p[:, own], out[:, own].softmax(1))
    assert bool((model.predict(x) > 0).all())
    free = rounds(small(own_classes=False), 1)
    assert bool((free.predict(x, client=0) > 0).all())
    assert bool((small().predict(x, client=0) > 0).all())  # nothing seen yet


def test_relu_on_the_logits_is_an_argument():
    plain, theirs = small(), small(authors_relu=True)
    x = torch.rand(5, 1, 4, 4)
    assert float(plain(x).min()) < 0
    close(theirs(x), plain(x).relu())


def test_conv4_has_the_sizes_of_the_paper():
    net = conv4(100, 3, 84)
    assert net[:-1](torch.rand(1, 3, 84, 84)).shape == (1, 32 * 5 * 5)
    assert [type(m) for m in net[0]] == [nn.Conv2d, nn.ReLU, nn.GroupNorm, nn.MaxPool2d]


# ---- groups, data, pictures ------------------------------------------------------------------------------------------


def test_groups_by_hand():
    labels = torch.tensor([0, 1, 2, 3] * 5)
    shares = group_partition(labels, groups=2, clients_per_group=2)
    assert [sorted(set(labels[s].tolist())) for s in shares] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [len(s) for s in shares] == [4, 6, 4, 6]
    assert sorted(torch.cat(shares).tolist()) == list(range(20))
    few = group_partition(labels, 2, 2, per_class=1, generator=torch.Generator().manual_seed(0))
    assert [len(s) for s in few] == [2] * 4 and len(set(torch.cat(few).tolist())) == 8
    with pytest.raises(ZooError, match="4 classes cannot be divided among 3 groups"):
        group_partition(labels, 3, 2)
    with pytest.raises(ZooError, match="Class 0 has 5 samples: too few for 6 clients"):
        group_partition(labels, 2, 6)
    with pytest.raises(ZooError, match="Class 0 has 5 samples"):
        group_partition(labels, 2, 2, per_class=3)


def test_prepared_groups_are_what_the_data_divide(tmp_path):
    prepare_groups(tmp_path, 4, groups=5, clients_per_group=4, per_class=6)
    lists = json.loads((tmp_path / "groups.json").read_text())["clients"]
    data = FederatedClassificationDataModule(seed=4, partition_file=str(tmp_path / "groups.json"), test="classes")
    data.setup("fit")
    assert data.describe()["num_clients"] == 20 and [s.tolist() for s in data.shares] == lists
    owned = [sorted(data.labels[s].tolist()) for s in data.shares]
    for i in range(20):
        assert owned[i][0] % 2 == 0 and owned[i] == [owned[i][0]] * 6 + [owned[i][0] + 1] * 6
    every = [sample for own in lists for sample in own]
    assert len(set(every)) == 240
    assert owned[:4] != [owned[0]] * 4  # clients are in no order
    held = next(iter(data.val_dataloader()))["image"]
    train = data.images[every]
    assert len(held) > 100 and not (held.flatten(1)[:, None] == train.flatten(1)).all(2).any()


def test_a_picture_of_the_graph(tmp_path):
    pytest.importorskip("matplotlib")
    draw_graph(rounds(small(), 1), tmp_path / "graph.png", title="w")
    assert (tmp_path / "graph.png").read_bytes()[:4] == b"\x89PNG"
    draw_graph(small(), tmp_path / "before.png")
    assert (tmp_path / "before.png").stat().st_size > 1000


# ---- bad inputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"prior": "gcn"}, "prior is 'gcn'; one of sbm, attention, dirac"),
        ({"topology": "star"}, "topology is 'star'"),
        ({"mixing": "gradients"}, "mixing is 'gradients'"),
        ({"num_clients": 1}, "num_clients is 1"),
        ({"mask_fraction": 0.1}, "mask_fraction is 0.1: of 6 clients each would keep 0"),
        ({"mask_fraction": 1.5}, "mask_fraction is 1.5"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"blocks": 0}, "blocks=0"),
        ({"fix_graph_round": -1}, "fix_graph_round=-1"),
    ],
)
def test_bad_arguments_are_one_line(given, line):
    with pytest.raises(ValueError, match=line) as caught:
        small(**given)
    assert "\n" not in str(caught.value)


def test_bad_data_are_one_line():
    with pytest.raises(ZooError, match="leaves nothing of pictures of 8 pixels"):
        SCooL(image_size=8, num_clients=5)
    with pytest.raises(ZooError, match="leaves nothing of pictures of 40 pixels"):
        SCooL(net="conv4", image_size=40, num_clients=5)
    wrong = world()
    wrong["label"][3] = 6
    with pytest.raises(ZooError, match="Labels go up to 6; the model has num_classes=6"):
        small().training_step(wrong, 0)
    lost = small()
    with torch.no_grad():
        lost.get_buffer("states.personal__head__weight")[2] = torch.nan
    with pytest.raises(ZooError, match="The loss of client 2's model on client 0's data is nan: lower lr"):
        lost.training_step(world(), 0)
    with pytest.raises(ValueError, match="client is 6; there are 6"):
        small().predict(torch.rand(1, 1, 4, 4), client=6)
    with pytest.raises(ValueError, match="has no samples"):
        small().training_step(world(sizes=(8, 0, 8, 8, 8, 8)), 0)
