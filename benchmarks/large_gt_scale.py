"""How LargeGT grows with the graph: python -m benchmarks.large_gt_scale [--sizes 10000 ...] [--json FILE] [--plot FILE]

Each size in a process of its own: a generated graph of mean degree 10, its sequences, averages and positional encodings
prepared into a folder and mapped from there, then training steps on batches of equal size. Peak resident memory (of all
of it, and of Python with its packages before), and CPU time, of two threads together, for preparation and for one step:
what other processes do does not enter it. Elapsed times are recorded beside it.
"""

import argparse
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

SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
FEATURES, CLASSES, DEGREE = 32, 16, 10
STEPS, BATCH = 40, 256
DATA = {
    "tokens": 20,
    "sampler": "paths",
    "pos_enc": 16,
    "walk": {"walks": 1, "length": 10, "context": 5, "epochs": 1, "batch": 1024},
}
MODEL = {"width": 64, "global_dim": 16, "num_centroids": 1024}
THREADS = 2


def memory() -> float:
    """Peak resident memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Clock:
    """CPU seconds of all threads, and elapsed ones, since it was made."""

    def __init__(self) -> None:
        self.start = time.process_time(), time.perf_counter()

    def read(self) -> tuple[float, float]:
        return time.process_time() - self.start[0], time.perf_counter() - self.start[1]


def graph(nodes: int, seed: int = 0) -> dict[str, Any]:
    """Communities of 100 nodes, each of one class; four edges in five stay inside; features are the class and noise."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(nodes, (nodes * DEGREE // 2,), generator=generator)
    inside = source // 100 * 100 + torch.randint(100, source.shape, generator=generator)
    anywhere = torch.randint(nodes, source.shape, generator=generator)
    target = torch.where(torch.rand(source.shape, generator=generator) < 0.8, inside.clamp_(max=nodes - 1), anywhere)
    y = torch.randint(CLASSES, (nodes // 100 + 1,), generator=generator)[torch.arange(nodes) // 100]
    x = torch.randn(nodes, FEATURES, generator=generator)
    x[torch.arange(nodes), y] += 1.0
    edges = torch.stack((torch.cat((source, target)), torch.cat((target, source))))
    return {"x": x, "edge_index": edges, "y": y}


def one(nodes: int) -> dict[str, float]:
    """Prepare and train one size in this process."""
    import torch

    torch.set_num_threads(THREADS)
    from zoo.graph.node.data_tokens import LargeGTTokenDataModule, half_split, prepare
    from zoo.graph.node.large_gt import LargeGT

    bare, found = memory(), {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(graph(1000), **DATA)  # what only the first use costs
        whole = graph(nodes)
        whole |= half_split(whole["y"], 0)
        found["edges"] = whole["edge_index"].shape[1]
        clock = Clock()
        prepared = prepare(whole, folder=Path(folder), **DATA)
        found["prepare_s"], found["prepare_elapsed_s"] = clock.read()
        found["prepare_peak_mib"] = memory()
        found["disk_mib"] = sum(f.stat().st_size for f in Path(folder).iterdir()) / 2**20
        del whole
        data = LargeGTTokenDataModule(batch_size=BATCH, tokens=DATA["tokens"], pos_enc=DATA["pos_enc"])
        data._sets["train"] = prepared.subset(prepared.masks["train_mask"].nonzero().flatten())
        torch.manual_seed(0)
        model = LargeGT(**{**data.describe(), **MODEL}).train()
        model.log = lambda *a, **k: None  # type: ignore[method-assign]
        optimizer, steps, losses = model.configure_optimizers(), [], []
        epochs = itertools.chain.from_iterable(data.train_dataloader() for _ in itertools.count())
        for batch in itertools.islice(epochs, STEPS):
            clock = Clock()
            optimizer.zero_grad()
            loss = model.training_step(batch, 0)
            loss.backward()
            optimizer.step()
            steps.append(clock.read())
            losses.append(float(loss.detach()))
        batches = []
        for _ in range(STEPS):
            indices = torch.randint(len(data.dataset("train")), (BATCH,)).tolist()
            clock = Clock()
            data.dataset("train").batch(indices)
            batches.append(clock.read())
        for name, times in (("step", steps), ("batch", batches)):
            cpu, elapsed = zip(*times[5:], strict=True)
            found[f"{name}_ms"] = 1e3 * statistics.median(cpu)
            found[f"{name}_elapsed_ms"] = 1e3 * statistics.median(elapsed)
        found["first_losses"], found["last_losses"] = (statistics.fmean(part) for part in (losses[:5], losses[-5:]))
    return {**found, "steps": len(steps), "python_mib": bare, "peak_mib": memory()}


def plot(figures: dict[str, dict[str, float]], path: Path) -> None:
    """Two panels: memory, and times, over the number of nodes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = [int(n) for n in figures]
    rows = list(figures.values())
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    peak, bare = ([row[key] / 1024 for row in rows] for key in ("peak_mib", "python_mib"))
    left.loglog(sizes, peak, "o-", color="#1f6f8b", label="peak, preparing and training")
    left.loglog(sizes, bare, "--", color="#888888", label="Python and its packages")
    left.axhline(8, color="#c44536", lw=1, ls=":")
    left.annotate("8 GiB", (sizes[0], 8), xytext=(0, 4), textcoords="offset points", color="#c44536")
    left.set(xlabel="nodes", ylabel="resident memory (GiB)", title="Memory", ylim=(0.4, 16))
    left.set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
    left.minorticks_off()
    left.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.78))
    names = {"prepare_s": "preparing, once", "step_ms": f"one training step, {BATCH} nodes"}
    names["batch_ms"] = "putting a batch together"
    styles = {"prepare_s": ("o-", "#1f6f8b"), "step_ms": ("s-", "#e09f3e"), "batch_ms": ("^-", "#7a9e7e")}
    for key, (style, colour) in styles.items():
        values = [row[key] / (1e3 if key.endswith("_ms") else 1) for row in rows]
        right.loglog(sizes, values, style, color=colour, label=names[key])
    top = max(row["prepare_s"] for row in rows)
    right.set(xlabel="nodes", ylabel="CPU seconds, two threads together", title="Time", ylim=(None, 100 * top))
    right.legend(frameon=False, loc="upper left")
    for axes in (left, right):
        axes.grid(True, which="major", alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--json", default="results/LargeGT.json")
    parser.add_argument("--plot", default="docs/large_gt_scale.png")
    parser.add_argument("--one", type=int, help="measure this size in this process and print it")
    parser.add_argument("--only-plot", action="store_true", help="draw what the file holds")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one)))
        return
    from zoo.core import results

    if not args.only_plot:
        figures = {}
        # a thread that waits must not spin: its time would count
        threads = {"OMP_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "passive"}
        for nodes in args.sizes:
            call = [sys.executable, "-m", "benchmarks.large_gt_scale", "--one", str(nodes)]
            done = subprocess.run(call, capture_output=True, text=True, env={**os.environ, **threads})
            if done.returncode:
                raise SystemExit(done.stderr)
            figures[str(nodes)] = json.loads(done.stdout.splitlines()[-1])
            print(nodes, figures[str(nodes)], flush=True)
        setup = {"data": DATA, "model": MODEL, "batch": BATCH, "features": FEATURES, "degree": DEGREE}
        section = {
            "figures": figures,
            "setup": setup,
            "files": results.fingerprint("LargeGT"),
            **results.circumstances(),
        }
        results.record(Path(args.json), {"scale": section})
    plot(json.loads(Path(args.json).read_text())["scale"]["figures"], Path(args.plot))


if __name__ == "__main__":
    main()
