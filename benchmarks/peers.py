"""Ours beside packages from PyPI that do the same work, in one run: milliseconds and peak MiB, in turns."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import in_turns


def lightgcn(device: str) -> dict[str, Any]:
    """LightGCN (64 channels, 3 layers, batch 4096) on Gowalla's published split, and all users ranked over all items.

    torch_geometric's beside `NESCL` without its contrast, and whole. An epoch is its number of steps times a step.

    Theirs with ``edge_index``, as its documentation trains it, and with the normalised adjacency as a sparse tensor.
    """
    from torch_geometric.nn.conv.gcn_conv import gcn_norm
    from torch_geometric.nn.models import LightGCN
    from torch_geometric.utils import to_torch_csr_tensor

    from zoo.graph import NESCL, ImplicitCFDataModule

    root = Path(os.environ.get("ZOO_DATA", "data")) / "gowalla"
    data = ImplicitCFDataModule(root=str(root), batch_size=4096)
    data.setup("test")
    pairs = data.interactions()
    sizes = data.describe()
    users, items = sizes["num_users"], sizes["num_items"]
    ours = NESCL(**sizes, positives=[]).set_graph(pairs).to(device)
    ours.log = lambda *a, **k: None  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(pairs.shape[1], (4096,), generator=generator)
    user, item = pairs[:, chosen].to(device)
    negative = torch.randint(items, (4096,), generator=generator).to(device)

    both = torch.stack((pairs[0], pairs[1] + users)).to(device)
    edges = torch.cat((both, both.flip(0)), dim=1)
    theirs = LightGCN(users + items, 64, 3).to(device)
    index, weight = gcn_norm(edges, None, users + items, add_self_loops=False)
    adjacency = to_torch_csr_tensor(index, weight, (users + items, users + items))

    def step(loss: Callable[[], Tensor], net: torch.nn.Module) -> Callable[[], None]:
        return _update(torch.optim.Adam(net.parameters(), lr=1e-3), loss)

    def ours_loss(model: Any) -> Tensor:
        return model.losses({"user": user, "item": item, "negative": negative})["loss"]

    def theirs_loss(graph: Tensor) -> Tensor:
        nodes = torch.stack((torch.cat((user, user)), torch.cat((item, negative)) + users))
        positive, wrong = theirs(graph, nodes).chunk(2)
        return theirs.recommendation_loss(positive, wrong, node_id=nodes.unique(), lambda_reg=1e-4)

    row = in_turns(
        {
            "ours": step(lambda: ours_loss(ours), ours),
            "torch_geometric": step(lambda: theirs_loss(edges), theirs),
        },
        device,
    )
    for conv in theirs.convs:
        conv.normalize = False  # the adjacency is normalised already
    row |= in_turns({"torch_geometric_sparse": step(lambda: theirs_loss(adjacency), theirs)}, device)
    whole = NESCL(**sizes).set_graph(pairs).to(device)
    row |= in_turns({"ours_nescl": step(lambda: ours_loss(whole), whole)}, device, rounds=2)
    steps = math.ceil(pairs.shape[1] / 4096)
    row |= {f"{who}_epoch_s": steps * row[f"{who}_ms"] / 1e3 for who in _sides(row)}

    everyone = torch.arange(users, device=device)
    ours.eval()

    def rank() -> None:
        with torch.no_grad():
            ours._final = None
            ours.rank(everyone)

    ranking = in_turns({"ours": rank}, device, rounds=1) | {"users": users, "items": items, "block": ours.block}
    for who in ("ours", "ours_nescl"):
        ranking[f"share_of_{who}_epoch"] = ranking["ours_ms"] / 1e3 / row[f"{who}_epoch_s"]
    return {"train_step": row, "full_ranking": ranking}


def gcn(device: str) -> dict[str, Any]:
    """A two-layer GCN (256 hidden, dropout 0.5) on a random graph: 100,000 nodes, a million edges, 128 features.

    One epoch of full-batch training and validation: torch_geometric's `GCN` with ``edge_index`` and with the adjacency
    as a sparse tensor (normalisation cached in all), beside LA-GCN's network with one branch.
    """
    from torch_geometric.nn import GCN
    from torch_geometric.utils import to_torch_csr_tensor

    from zoo.graph.node.lagnn import LAGCN
    from zoo.nn.graph import Adjacency

    nodes, edges, features, classes = 100_000, 1_000_000, 128, 40
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(nodes, (2, edges // 2), generator=generator)
    half = half[:, half[0] != half[1]]
    graph = torch.cat((half, half.flip(0)), dim=1).to(device)
    x = torch.randn(nodes, features, generator=generator).to(device)
    y = torch.randint(classes, (nodes,), generator=generator).to(device)
    ours = LAGCN(features, 256, classes, input_dropout=0.0).to(device)  # theirs drops between the layers only
    adjacency = Adjacency(graph, nodes)
    plain = GCN(features, 256, 2, classes, dropout=0.5, cached=True).to(device)
    sparse = GCN(features, 256, 2, classes, dropout=0.5, cached=True).to(device)
    matrix = to_torch_csr_tensor(graph, size=(nodes, nodes))

    def epoch(net: torch.nn.Module, forward: Callable[[], Tensor]) -> Callable[[], None]:
        update = _update(torch.optim.Adam(net.parameters(), lr=0.01), lambda: F.cross_entropy(forward(), y))

        def run() -> None:
            net.train()
            update()
            net.eval()
            with torch.no_grad():
                forward()

        return run

    runs = {
        "ours": epoch(ours, lambda: ours([x], adjacency)),
        "torch_geometric": epoch(plain, lambda: plain(x, graph)),
        "torch_geometric_sparse": epoch(sparse, lambda: sparse(x, matrix)),
    }
    return {"epoch": in_turns(runs, device)}


def lora(device: str) -> dict[str, Any]:
    """A step of LoRA fine-tuning (rank 8, batch 16 of 64 tokens) of a BERT of 4 layers and 256 channels.

    peft and transformers by themselves, beside `HRP` after its swap, whose step must cost no more.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from zoo.language import HRP

    config = {"model_type": "bert", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    config |= {"intermediate_size": 1024, "vocab_size": 8000, "max_position_embeddings": 128}
    torch.manual_seed(0)
    ours = HRP(backbone=config, init="lora", rank=8, alpha=8, max_length=64).to(device).train()
    ours.log = lambda *a, **k: None  # type: ignore[assignment]
    built = AutoConfig.for_model(**config, num_labels=2)
    theirs: Any = AutoModelForSequenceClassification.from_config(built)
    wanted = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="SEQ_CLS")
    theirs = get_peft_model(theirs, wanted).to(device).train()
    ids = torch.randint(5, 8000, (16, 64), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "label": torch.randint(2, (16,), device=device)}

    def step(net: Any, loss: Callable[[], Tensor]) -> Callable[[], None]:
        return _update(torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4), loss)

    runs = {
        "ours": step(ours, lambda: ours.training_step(batch, 0)),
        "peft": step(
            theirs,
            lambda: theirs(input_ids=ids, attention_mask=batch["attention_mask"], labels=batch["label"]).loss,
        ),
    }
    return {"train_step": in_turns(runs, device, rounds=9)}


def _update(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return run


def _sides(row: dict[str, float]) -> list[str]:
    return [key.removesuffix("_ms") for key in row if key.endswith("_ms")]


ALL = {"lightgcn": lightgcn, "gcn": gcn, "lora": lora}
