"""Federated rounds: clients together against one by one, many clients, and beside a plain loop and Flower's simulation.

Seconds and milliseconds are the process's own CPU time with one thread, which others' load enters little; `simulators`
gives the clock's beside it. Flower takes part where ``pip install "flwr[simulation]"`` was done.
"""

import copy
import functools
import importlib.metadata
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.measure import timed
from zoo.core import ZooError
from zoo.data.pictures import read_pictures
from zoo.engines.federated import FederatedModule
from zoo.engines.federated.module import STACK_BELOW

NETS: dict[str, tuple[Any, int, int, int]] = {  # net, channels, side, clients
    "mlp_8x8": ({"name": "mlp", "hidden": [64]}, 1, 8, 20),
    "mlp_28x28": ({"name": "mlp", "hidden": [200, 200]}, 1, 28, 20),
    "cnn_8x8": ({"name": "cnn", "widths": [8, 16], "features": 32}, 1, 8, 20),
    "cnn_28x28": ({"name": "cnn", "widths": [16, 32], "features": 64}, 1, 28, 10),
    "cnn_32x32": ({"name": "cnn", "widths": [32, 64], "features": 64}, 3, 32, 10),
    "resnet10_quarter": ({"name": "resnet10", "width": 16}, 3, 32, 5),
    "resnet10": ("resnet10", 3, 32, 2),
    "resnet18": ("resnet18", 3, 32, 2),
}


def a_round(clients: int, samples: int, channels: int, side: int) -> dict[str, Any]:
    draws = torch.Generator().manual_seed(0)
    count = clients * samples
    return {
        "image": torch.randint(256, (count, channels, side, side), generator=draws, dtype=torch.uint8),
        "label": torch.randint(10, (count,), generator=draws),
        "client": list(range(clients)),
        "size": [samples] * clients,
        "work": [1.0] * clients,
        "seed": list(range(clients)),
    }


def module(net: Any, channels: int, side: int, clients: int, batch: int, **more: Any) -> FederatedModule:
    torch.manual_seed(0)
    sizes = {"in_channels": channels, "image_size": side, "num_clients": clients, "local_batch": batch}
    norm = "group" if "resnet" in str(net) else "none"
    found = FederatedModule(net=net, norm=norm, **sizes, **more)
    object.__setattr__(found, "log", lambda *_, **__: None)
    return found


# ---- together or one by one -----------------------------------------------------------------------------------------


def stacking(device: str = "cpu", names: list[str] | None = None) -> dict[str, Any]:
    """Milliseconds of one client's local step, all clients of a round together against one by one."""
    found: dict[str, Any] = {}
    for name in names or NETS:
        net, channels, side, clients = NETS[name]
        for size in (8, 32) if "resnet1" not in name or "quarter" in name else (8,):
            steps = 4 if clients > 2 else 1
            batch = a_round(clients, size * steps, channels, side)
            batch |= {k: v.to(device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
            runs, cost = {}, 0.0
            for word, stack in (("together", clients), ("one_by_one", 1)):
                model = module(net, channels, side, clients, size, stack=stack).to(device)
                cost = model._cost()
                down = model.broadcast()
                runs[word] = lambda m=model, d=down, b=batch: m.local(b, d, range(len(b["client"])))
            times = timed(runs, device, rounds=3)
            row = {word: times[f"{word}_ms"] / (clients * steps) for word in runs}
            found[f"{name}_batch{size}"] = {
                "forward_operations": cost, "clients": clients,
                "together_ms": row["together"], "one_by_one_ms": row["one_by_one"],
                "speedup": row["one_by_one"] / row["together"],
            }  # fmt: skip
            print(f"{name}_batch{size}", json.dumps(found[f"{name}_batch{size}"]), file=sys.stderr, flush=True)
    return found


def crossover(rows: dict[str, Any]) -> dict[str, Any]:
    """Where to stop stacking: the threshold that loses least over all rows, and what the rule in use loses."""
    cases = [(row["forward_operations"], row["together_ms"], row["one_by_one_ms"]) for row in rows.values()]

    def lost(threshold: float) -> float:
        """Mean share of time above the better way."""
        ratios = [(t if c <= threshold else o) / min(t, o) for c, t, o in cases]
        return sum(ratios) / len(ratios) - 1

    costs = sorted(cost for cost, _, _ in cases)
    between = [0.0, *((a * b) ** 0.5 for a, b in itertools.pairwise(costs)), costs[-1] * 2]
    best = min(between, key=lost)
    return {
        "best_threshold": best, "best_loses": lost(best), "stack_below": STACK_BELOW,
        "stack_below_loses": lost(STACK_BELOW), "always_loses": lost(float("inf")), "never_loses": lost(0.0),
    }  # fmt: skip


# ---- many clients ---------------------------------------------------------------------------------------------------

SCALE = ({"name": "cnn", "widths": [16, 32], "features": 64}, 1, 16, 16)  # net, channels, side, samples a client


def scale_one(clients: int, algorithm: str, on_disk: bool, rounds: int = 3, per_round: int = 100) -> dict[str, float]:
    """Rounds of so many clients of a total, in this process: seconds and MiB."""
    net, channels, side, samples = SCALE
    draws = torch.Generator().manual_seed(0)
    before = _status("VmRSS")
    start = time.process_time()
    model = module(net, channels, side, clients, 8, algorithm=algorithm, state_on_disk=on_disk, momentum=0.0)
    with tempfile.TemporaryDirectory() as folder:
        if on_disk:
            model.states.to_disk(folder)
        made, setup = time.process_time() - start, _status("VmHWM") - before
        times = []
        for number in range(rounds + 1):
            batch = a_round(per_round, samples, channels, side)
            batch["client"] = torch.randperm(clients, generator=draws)[:per_round].sort().values.tolist()
            start = time.process_time()
            model.training_step(batch, number)
            times.append(time.process_time() - start)
        return {
            "clients": clients, "per_round": per_round, "setup_s": made, "round_s": sorted(times[1:])[rounds // 2],
            "parameters": sum(p.numel() for p in model.model.parameters()), "peak_setup_mib": setup,
            "peak_mib": _status("VmHWM") - before, "anonymous_mib": _status("RssAnon"),
        }  # fmt: skip


def _status(key: str) -> float:
    """MiB of this process, from the kernel; the peak where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def scale() -> dict[str, Any]:
    """Each case in a process of its own."""
    found = {}
    cases = [("fedavg", False), ("scaffold", False), ("scaffold", True)]
    for algorithm, on_disk in cases:
        for clients in (200, 1000, 5000):
            name = f"{algorithm}{'_disk' if on_disk else ''}_{clients}"
            code = (
                "import json, sys, benchmarks.federated as f; print(json.dumps(f.scale_one(*json.loads(sys.argv[1]))))"
            )
            done = subprocess.run(
                [sys.executable, "-c", code, json.dumps([clients, algorithm, on_disk])], capture_output=True, text=True,
                check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            found[name] = json.loads(done.stdout.splitlines()[-1])
            print(name, json.dumps(found[name]), file=sys.stderr, flush=True)
    return found


# ---- beside a plain loop --------------------------------------------------------------------------------------------


def plain_round(net: torch.nn.Module, batch: dict[str, Any], hp: dict[str, Any]) -> Any:
    """FedAvg as research code writes it: a copy of the net, a DataLoader and an optimiser for each client."""
    states, first = [], 0
    size, lr, momentum, decay = (hp[key] for key in ("local_batch", "lr", "momentum", "weight_decay"))
    for samples in batch["size"]:
        rows = slice(first, first + samples)
        first += samples
        data = TensorDataset(batch["image"][rows].float() / 255, batch["label"][rows])
        local = copy.deepcopy(net)
        optimizer = torch.optim.SGD(local.parameters(), lr, momentum, weight_decay=decay)
        for image, label in DataLoader(data, size, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(local(image), label).backward()
            optimizer.step()
        states.append(local.state_dict())
    total = sum(batch["size"])
    mean = {name: sum(s[name] * (n / total) for s, n in zip(states, batch["size"], strict=True)) for name in states[0]}
    net.load_state_dict(mean)
    return net


def beside(names: tuple[str, ...] = ("mlp_8x8", "cnn_8x8", "cnn_28x28", "cnn_32x32")) -> dict[str, Any]:
    """Milliseconds of a whole round of many clients, ours against the plain loop; 16 samples each in batches of 8."""
    found = {}
    for name in names:
        net, channels, side, _ = NETS[name]
        clients = 100 if side == 8 else 20
        model = module(net, channels, side, clients, 8)
        batch = a_round(clients, 16, channels, side)
        plain, hp = copy.deepcopy(model.model), model._hp
        runs = {
            "ours": lambda m=model, b=batch: m.training_step(copy.copy(b), 0),
            "plain": lambda n=plain, b=batch, h=hp: plain_round(n, b, h),
        }
        times = timed(runs, rounds=3)
        found[name] = {"clients": clients, **times, "speedup": times["plain_ms"] / times["ours_ms"]}
        print(name, json.dumps(found[name]), file=sys.stderr, flush=True)
    return found


# ---- beside Flower's simulation -------------------------------------------------------------------------------------

LENET = {"name": "cnn", "widths": [6, 16], "features": 120, "kernel": 5}
CLIENTS, SAMPLES, BATCH = 100, 500, 50
"""CIFAR-10 among 100 clients, as FedAvg's paper has it."""
HP = {"local_batch": BATCH, "lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}


def lenet(clients: int = CLIENTS, size: int = BATCH) -> FederatedModule:
    """The CNN that most of the papers train on CIFAR-10, in FedAvg's module, with local batches of a size."""
    return module(LENET, 3, 32, clients, size, **{k: v for k, v in HP.items() if k != "local_batch"})


def cifar(clients: int = CLIENTS, samples: int = SAMPLES) -> tuple[dict[str, Any], str]:
    """So many pictures of CIFAR-10 for each client, or random ones of its size, as one batch; and which."""
    every = a_round(clients, samples, 3, 32)
    root = Path(os.environ.get("ZOO_DATA", "")) / "cifar10"
    if "ZOO_DATA" not in os.environ or not root.is_dir():
        return every, "random pictures of CIFAR-10's size"
    train = read_pictures(root).train
    rows = torch.arange(clients * samples) % len(train)
    return {**every, "image": train.image[rows], "label": train.label[rows]}, "CIFAR-10"


def some(every: dict[str, Any], chosen: list[int]) -> dict[str, Any]:
    """The round of these clients."""
    samples = every["size"][0]
    rows = (torch.tensor(chosen)[:, None] * samples + torch.arange(samples)).flatten()
    sizes = {"client": chosen, "size": [samples] * len(chosen), "work": [1.0] * len(chosen), "seed": chosen}
    return {"image": every["image"][rows], "label": every["label"][rows], **sizes}


def drawn(every: dict[str, Any], per_round: int, number: int) -> dict[str, Any]:
    """A round of so many clients, drawn by its number."""
    draws = torch.Generator().manual_seed(number)
    return some(every, torch.randperm(len(every["size"]), generator=draws)[:per_round].tolist())


class Rounds:
    """Rounds of ours and of the plain loop on the same clients, with the clock's and the process's seconds of each."""

    def __init__(self, every: dict[str, Any], per_round: int, size: int = BATCH):
        self.every, self.per_round, self.number = every, per_round, 0
        self.hp = {**HP, "local_batch": size}
        self.model = lenet(len(every["size"]), size)
        self.net = copy.deepcopy(self.model.model)
        self.times: dict[str, list[tuple[float, float]]] = {"ours": [], "plain": []}

    def __call__(self) -> None:
        batch = drawn(self.every, self.per_round, self.number)
        for who, run in (
            ("ours", lambda: self.model.training_step(copy.copy(batch), self.number)),
            ("plain", lambda: plain_round(self.net, batch, self.hp)),
        ):
            start = time.perf_counter(), time.process_time()
            run()
            self.times[who].append((time.perf_counter() - start[0], time.process_time() - start[1]))
        self.number += 1


def medians(times: list[tuple[float, float]]) -> dict[str, float]:
    """Of rounds after the first: the clock's and the process's milliseconds, and rounds a second by the clock."""
    wall, own = (statistics.median(values) for values in zip(*times[1:], strict=True))
    return {"wall_ms": 1e3 * wall, "cpu_ms": 1e3 * own, "rounds_per_second": 1 / wall}


SIZES = {"100_pictures": (100, 32), "500_pictures": (SAMPLES, BATCH)}
"""Pictures of a client, and of a local batch: a small round with last batches of 4, and FedAvg's paper's."""


def simulators(rounds: int = 10, per_round: int = 10) -> dict[str, Any]:
    """Rounds of 10 of 100 clients, LeNet, one local epoch: ours, a plain loop, Flower's simulation, ours on all cores.

    Ours, the plain loop and Flower in one run, a round of each in turn. Flower's clients are processes of ray, as many
    at once as there are cores, and its CPU time is that of all of them; ours and the plain loop have torch's threads.
    After them ours by as many processes as there are cores, which share a round's clients (`ranks`).
    """
    found: dict[str, Any] = {"clients": CLIENTS, "per_round": per_round, "rounds": rounds}
    found |= {"threads": torch.get_num_threads(), "cores": os.cpu_count()}
    try:
        found |= {name: importlib.metadata.version(name) for name in ("flwr", "ray")}
    except importlib.metadata.PackageNotFoundError as error:
        found["flower"] = f'not measured: {error.name} is not installed (pip install "flwr[simulation]")'
    for name, (samples, size) in SIZES.items():
        every, found["data"] = cifar(CLIENTS, samples)
        beside, row = Rounds(every, per_round, size), {}
        if "ray" in found:
            row["flower"] = medians(flower_rounds(rounds + 1, per_round, samples, size, beside))
        else:
            for _ in range(rounds + 1):
                beside()
        row |= {who: medians(times) for who, times in beside.times.items()}
        row["ours_on_all_cores"] = {"wall_ms": ranks(samples, size, rounds, per_round)}
        for who in ("plain", *(["flower"] if "flower" in row else [])):
            for kind in ("wall", "cpu"):
                row[f"{who}_over_ours_{kind}"] = row[who][f"{kind}_ms"] / row["ours"][f"{kind}_ms"]
            row[f"{who}_over_ours_on_all_cores"] = row[who]["wall_ms"] / row["ours_on_all_cores"]["wall_ms"]
        found[name] = row
        print(name, json.dumps(row), file=sys.stderr, flush=True)
    return found


def ranks(samples: int, size: int, rounds: int, per_round: int) -> float:
    """Median milliseconds by the clock of such a round, by a Trainer with a process for each core; in a run apart."""
    call = [sys.executable, "-m", "benchmarks.federated", *map(str, (samples, size, rounds, per_round))]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return float(subprocess.run(call, capture_output=True, text=True, check=True, env=env).stdout.splitlines()[-1])


class _Drawn(Dataset[dict[str, Any]]):
    """Rounds of clients drawn anew."""

    def __init__(self, every: dict[str, Any], per_round: int, rounds: int):
        self.every, self.per_round, self.rounds = every, per_round, rounds

    def __len__(self) -> int:
        return self.rounds

    def __getitem__(self, number: int) -> dict[str, Any]:
        return drawn(self.every, self.per_round, number)


def one_rank(samples: int, size: int, rounds: int, per_round: int) -> None:
    """This process's part of `ranks`, which starts the others; the first prints."""
    from zoo.core import Trainer

    model, seconds = lenet(CLIENTS, size), []
    step = model.training_step

    def timed_step(*given: Any) -> None:
        start = time.perf_counter()
        step(*given)
        seconds.append(time.perf_counter() - start)

    object.__setattr__(model, "training_step", timed_step)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    where = {"accelerator": "cpu", "devices": os.cpu_count(), "strategy": "ddp", "enable_checkpointing": False}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(default_root_dir=folder, max_epochs=1, **quiet, **where)
        trainer.fit(model, DataLoader(_Drawn(cifar(CLIENTS, samples)[0], per_round, rounds + 1), batch_size=None))
    if trainer.global_rank == 0:
        print(1e3 * statistics.median(seconds[1:]))


def uneven(rounds: int = 40, per_round: int = 10) -> dict[str, Any]:
    """Rounds of 10 of 100 clients of 100 pictures in batches of 32, of which the last has 4: ours and a plain loop."""
    every, data = cifar(CLIENTS, 100)
    both = Rounds(every, per_round, 32)
    for _ in range(rounds + 1):
        both()
    found: dict[str, Any] = {"clients": CLIENTS, "per_round": per_round, "rounds": rounds, "data": data}
    found |= {"threads": torch.get_num_threads()} | {who: medians(times) for who, times in both.times.items()}
    found["plain_over_ours_cpu"] = found["plain"]["cpu_ms"] / found["ours"]["cpu_ms"]
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def flower_rounds(rounds: int, per_round: int, samples: int, size: int, beside: Rounds) -> list[tuple[float, float]]:
    """The clock's and all processes' seconds of each of Flower's rounds; after each comes one of ``beside``."""
    import logging

    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    client, server = ClientApp(), ServerApp()
    times: list[tuple[float, float]] = []

    @client.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        own = _client_data(samples)
        net = lenet().model
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        first = int(context.node_config["partition-id"]) * samples
        image, label = (own[key][first : first + samples] for key in ("image", "label"))
        optimizer = torch.optim.SGD(net.parameters(), HP["lr"], HP["momentum"], weight_decay=HP["weight_decay"])
        for rows in torch.randperm(samples).split(size):
            optimizer.zero_grad()
            F.cross_entropy(net(image[rows].float() / 255), label[rows]).backward()
            optimizer.step()
        content = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": samples})}
        return Message(content=RecordDict(content), reply_to=message)

    class Timed(FedAvg):
        def configure_train(self, *args: Any, **kwargs: Any) -> Any:
            self.start = time.perf_counter(), family_seconds()
            return super().configure_train(*args, **kwargs)

        def aggregate_train(self, *args: Any, **kwargs: Any) -> Any:
            found = super().aggregate_train(*args, **kwargs)
            times.append((time.perf_counter() - self.start[0], family_seconds() - self.start[1]))
            beside()
            return found

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Timed(fraction_train=per_round / CLIENTS, fraction_evaluate=0.0)
        strategy.start(grid=grid, initial_arrays=ArrayRecord(lenet().model.state_dict()), num_rounds=rounds)

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server_app=server, client_app=client, num_supernodes=CLIENTS, backend_config=resources)
    if len(times) != rounds:
        raise ZooError(f"Flower's simulation did {len(times)} of {rounds} rounds.")
    return times


@functools.cache
def _client_data(samples: int) -> dict[str, Any]:
    """All clients' pictures, read once by each process of Flower's."""
    return cifar(CLIENTS, samples)[0]


def family_seconds() -> float:
    """CPU seconds of this process and all that descend from it, from the kernel."""
    parent, used = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        parent[int(stat.parent.name)] = int(fields[1])
        used[int(stat.parent.name)] = int(fields[11]) + int(fields[12])
    family = {os.getpid()}
    while more := {child for child, of in parent.items() if of in family} - family:
        family |= more
    return sum(used.get(process, 0) for process in family) / os.sysconf("SC_CLK_TCK")


def sampled(clients: int = 1000) -> dict[str, Any]:
    """CPU milliseconds of a round by how many of 1,000 clients are sampled, 50 pictures each: ours, the plain loop."""
    every, _ = cifar(clients, BATCH)
    found = {}
    for per_round in (10, 30, 100, 300, 1000):
        rounds = Rounds(every, per_round)
        for _ in range(1 + max(3 - per_round // 100, 1)):
            rounds()
        found[str(per_round)] = {f"{who}_ms": medians(times)["cpu_ms"] for who, times in rounds.times.items()}
        print(per_round, json.dumps(found[str(per_round)]), file=sys.stderr, flush=True)
    return found


def plot(figures: dict[str, Any], path: Path) -> None:
    """Together or one by one over operations; memory over clients; beside the plain loop; rounds over their clients."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = 3 + ("sampled" in figures)
    figure, (left, middle, right, *last) = plt.subplots(1, count, figsize=(4.3 * count, 3.8), constrained_layout=True)
    rows = figures["stacking"]
    for size, mark in ((8, "o"), (32, "s")):
        own = [row for name, row in rows.items() if name.endswith(f"batch{size}")]
        left.plot([r["forward_operations"] for r in own], [r["speedup"] for r in own], mark, label=f"batches of {size}")
    left.axhline(1, color="grey", lw=0.8)
    left.axvline(figures["crossover"]["stack_below"], color="grey", lw=0.8, ls="--", label="STACK_BELOW")
    left.set(xscale="log", xlabel="forward operations of a local batch", ylabel="times faster together", yscale="log")
    left.set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
    left.yaxis.set_minor_formatter("")
    left.set_title("clients together against one by one")
    left.legend(fontsize=8)
    for kind, label in (
        ("fedavg", "FedAvg"), ("scaffold", "SCAFFOLD in memory"), ("scaffold_disk", "SCAFFOLD on disk"),
    ):  # fmt: skip
        own = [figures["scale"][f"{kind}_{n}"] for n in (200, 1000, 5000) if f"{kind}_{n}" in figures["scale"]]
        middle.plot([r["clients"] for r in own], [r["anonymous_mib"] for r in own], "o-", label=label)
    middle.set(xscale="log", xlabel="clients, 100 of them a round", ylabel="MiB after four rounds, mapped files apart")
    middle.set_xticks([200, 1000, 5000], ["200", "1,000", "5,000"])
    middle.xaxis.set_minor_formatter("")
    middle.set_ylim(0)
    middle.set_title("memory")
    middle.legend(fontsize=8)
    names = list(figures["beside"])
    places = range(len(names))
    for shift, who, label in ((-0.2, "plain", "plain loop, DataLoaders"), (0.2, "ours", "ours")):
        values = [figures["beside"][n][f"{who}_ms"] / figures["beside"][n]["clients"] for n in names]
        right.bar([p + shift for p in places], values, 0.4, label=label)
    right.set_xticks(list(places), names, fontsize=8)
    right.set(ylabel="ms of a client's round", yscale="log")
    right.set_title("a round beside a plain loop")
    right.legend(fontsize=8)
    for axes in last:
        rounds = [int(n) for n in figures["sampled"]]
        for who, label in (("plain", "plain loop, DataLoaders"), ("ours", "ours")):
            axes.plot(rounds, [row[f"{who}_ms"] / 1e3 for row in figures["sampled"].values()], "o-", label=label)
        axes.set(xscale="log", yscale="log", xlabel="clients sampled in a round", ylabel="CPU seconds of a round")
        axes.set_title("a round over its clients, LeNet's size")
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    one_rank(*map(int, sys.argv[1:]))
