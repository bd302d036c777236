"""Measure the zoo.

    python -m benchmarks imports                       cost of importing and listing, in CPU seconds over bare Python
    python -m benchmarks load                          from_pretrained against bare safetensors
    python -m benchmarks data                          loading throughput of Regformer's tiny variant against its step
    python -m benchmarks steps [NAME ...]              train step and inference of the tiny variants, eager and compiled
    python -m benchmarks peers [lightgcn gcn lora]     beside packages from PyPI that do the same work
    python -m benchmarks federated [PART ...]          rounds: stacking, scale, beside others -> docs/ (plot)
    python -m benchmarks speed NAME [--authors DIR]    beside the authors' code (or a peer) -> results/NAME.json
    python -m benchmarks parity NAME --authors DIR     equality with the authors' code -> results/NAME.json
    python -m benchmarks checkpoint NAME PATH          the catalogue's checkpoint PATH, by its recipe -> hub/PATH

Freed memory stays with the process, for both sides of a comparison, as under the command ``zoo``.
``--json FILE`` writes the figures with versions and hardware; ``--device cuda`` measures there.
"""

import argparse
import importlib
import inspect
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zoo.core import catalogue, results
from zoo.core.errors import ZooError
from zoo.core.memory import hold_memory


def cpu_seconds(code: list[str], runs: int = 7) -> float:
    """Median CPU time (user and system) of a Python process."""
    times = []
    for _ in range(runs):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *code], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(times)


def imports(_: argparse.Namespace) -> dict[str, Any]:
    bare = cpu_seconds(["-c", "pass"])
    heavy = cpu_seconds(["-c", "import lightning, torch"], 3)
    method = cpu_seconds(["-c", "from zoo.vision import Regformer"], 3)
    return {
        "bare_python_s": bare,
        "import_zoo_over_bare_s": cpu_seconds(["-c", "import zoo"]) - bare,
        "zoo_list_over_bare_s": cpu_seconds(["-m", "zoo.cli", "list"]) - bare,
        "import_lightning_torch_s": heavy,
        "import_regformer_s": method,
        "import_regformer_over_lightning_torch": method / heavy - 1,
    }


def load(_: argparse.Namespace) -> dict[str, Any]:
    from safetensors.torch import load_file

    from benchmarks.measure import in_turns
    from zoo.vision import Regformer

    model = Regformer()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            **in_turns(
                {
                    "safetensors": lambda: load_file(Path(folder) / "model.safetensors"),
                    "construct": Regformer,
                    "from_pretrained": lambda: Regformer.from_pretrained(folder),
                },
                rounds=7,
            ),
        }


def data(args: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.measure import in_turns
    from zoo.vision import DerainDataModule, Regformer

    found: dict[str, Any] = {}
    for workers in (0, 1, 2):
        module = DerainDataModule(num_workers=workers)
        module.setup()
        next(iter(module.train_dataloader()))  # the embedded set is made once
        start, count = time.perf_counter(), 0
        for batch in module.train_dataloader():
            count += len(batch["rainy"])
        found[f"samples_per_s_{workers}_workers"] = count / (time.perf_counter() - start)
    model = Regformer.from_variant("tiny").to(args.device)
    batch = {k: v.to(args.device) if hasattr(v, "to") else v for k, v in batch.items()}
    step = in_turns({"step": _step(model, batch, module)}, args.device, rounds=7)
    found["step_samples_per_s"] = 1e3 * len(batch["rainy"]) / step["step_ms"]
    return found


def _step(model: Any, batch: Any, data: Any) -> Callable[[], None]:
    """A training step as Lightning makes it, without what Lightning adds."""
    from zoo.testing.contract.case import attach

    attach(model.train(), data)
    found = model.configure_optimizers()
    found = found["optimizer"] if isinstance(found, dict) else found
    if model.automatic_optimization and not hasattr(found, "step"):
        raise ZooError("no optimiser steps, or several optimisers")
    model.optimizers = lambda *a, **k: found
    model.manual_backward = lambda loss, *a, **k: loss.backward(*a, **k)

    def step() -> None:
        if not model.automatic_optimization:
            model.training_step(batch, 0)
            return
        found.zero_grad()
        loss = model.training_step(batch, 0)
        (loss["loss"] if isinstance(loss, dict) else loss).backward()
        found.step()

    return step


def _calls_forward(model: Any, step: Callable[[], None]) -> bool:
    """Whether a step goes through the module itself and not only through its parts."""
    called: list[bool] = []
    hook = model.register_forward_pre_hook(lambda *_: called.append(True))
    try:
        step()
    finally:
        hook.remove()
    return bool(called)


def steps(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds and peak MiB; what cannot be measured by itself is named with its reason."""
    import torch

    from benchmarks.measure import in_turns
    from zoo.core.recipe import build

    def measure(model: Any, batch: Any, data: Any, suffix: str = "", without: str = "") -> dict[str, Any]:
        row: dict[str, Any] = {}
        for what in ("train_step", "inference"):
            if what == "train_step" and without:
                row[what + suffix] = without
                continue
            try:
                if what == "train_step":
                    row |= in_turns({what + suffix: _step(model, batch, data)}, args.device)
                else:
                    inputs = model.eval().example_inputs()
                    with torch.no_grad():
                        row |= in_turns({what + suffix: lambda i=inputs: model(*i)}, args.device)
            except Exception as error:  # one method's trouble must not cost the others' figures
                row[what + suffix] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return row

    old = json.loads(Path(args.json).read_text()) if args.json and Path(args.json).is_file() else {}
    found: dict[str, Any] = old.get("steps", {}).get("figures", {})  # a run for some leaves the others' figures
    for name in args.names or catalogue.names():
        data = catalogue.load_datamodule(name)()
        data.setup("fit")
        torch.manual_seed(0)
        model = build(catalogue.load_class(name), data, {"variant": "tiny"}).to(args.device)
        batch = model.transfer_batch_to_device(next(iter(data.train_dataloader())), torch.device(args.device), 0)
        found[name] = measure(model, batch, data)
        able = catalogue.facts(name)["capabilities"]["compile"]
        if args.compile and able is True:
            calls = _calls_forward(model, _step(model, batch, data))
            without = "" if calls else "the training step does not call forward, which is all that is compiled"
            torch.compiler.reset()
            model.compile()
            found[name] |= measure(model, batch, data, "_compiled", without)
        elif args.compile:
            found[name]["compiled"] = able
        print(name, json.dumps(found[name]), file=sys.stderr, flush=True)
    return found


def peers(args: argparse.Namespace) -> dict[str, Any]:
    """Each peer by its name; a run for some leaves the others' figures."""
    from benchmarks.peers import ALL

    unknown = sorted(set(args.names) - set(ALL))
    if unknown:
        raise ZooError(f"No peer {unknown[0]!r}; there are {', '.join(ALL)}.")
    old = json.loads(Path(args.json).read_text()) if args.json and Path(args.json).is_file() else {}
    return old.get("peers", {}).get("figures", {}) | {name: ALL[name](args.device) for name in args.names or ALL}


FEDERATED = ("stacking", "scale", "beside", "simulators", "uneven", "sampled")


def federated(args: argparse.Namespace) -> dict[str, Any]:
    """The parts asked for, all by default; a run for some leaves the others' figures. Draws the plot where all are."""
    from benchmarks import federated as parts

    target = Path(args.json or Path(__file__).with_name("federated.json"))
    args.json = str(target)
    new = {
        name: parts.stacking(args.device) if name == "stacking" else getattr(parts, name)()
        for name in args.names or FEDERATED
    }
    old = json.loads(target.read_text()) if target.is_file() else {}
    found: dict[str, Any] = old.get("federated", {}).get("figures", {}) | new
    if "stacking" in found:
        found["crossover"] = parts.crossover(found["stacking"])
    if {"stacking", "scale", "beside"} <= set(found):
        parts.plot(found, catalogue.ROOT.parent / "docs" / "federated_scale.png")
    return found


def _section(args: argparse.Namespace, key: str, figures: dict[str, Any], **more: Any) -> None:
    name = catalogue.entry(args.name).facts["class"]
    section = {"figures": figures, "files": results.fingerprint(name), **more, **results.circumstances()}
    file = results.path(name)
    old = results.read(name)
    if key == "speed" and args.device != "cpu":
        key = f"speed_{args.device.split(':')[0]}"
    results.record(file, {"name": old.get("name", name), key: section})
    print(json.dumps({key: figures}, indent=1))


def _commit(checkout: str | None) -> str:
    if not checkout:
        return ""
    done = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()


def speed(args: argparse.Namespace) -> None:
    module = importlib.import_module(f"benchmarks.authors.{catalogue.entry(args.name).toml.stem}")
    figures = module.speed(Path(args.authors) if args.authors else None, args.device)
    _section(args, "speed", figures, authors_commit=_commit(args.authors))


def parity(args: argparse.Namespace) -> None:
    entry = catalogue.entry(args.name)
    module = importlib.import_module(f"benchmarks.authors.{entry.toml.stem}")
    figures = module.compare(Path(args.authors))
    if args.golden:
        from safetensors.torch import save_file

        path = catalogue.ROOT.parent / "tests" / "golden" / f"{entry.toml.stem}.safetensors"
        save_file({k: v.contiguous() for k, v in module.golden(Path(args.authors)).items()}, path)
        if path.stat().st_size > 300 * 1024:
            raise ZooError(f"{path} has {path.stat().st_size} bytes; at most 300 KB.")
    _section(args, "parity", figures, authors=entry.facts["code"], authors_commit=_commit(args.authors))


def checkpoint(args: argparse.Namespace) -> dict[str, Any]:
    """Train a recipe's arm as the catalogue's checkpoint says, or take it from where `zoo reproduce` left it."""
    import shutil

    from zoo.core import recipe
    from zoo.core.card import of_checkpoint

    entry = catalogue.entry(args.name)
    name = entry.facts["class"]
    points = {p["path"]: p for p in entry.facts.get("checkpoints", [])}
    if args.path not in points:
        raise ZooError(f"{name} lists no checkpoint {args.path!r}; it lists {', '.join(points) or 'none'}.")
    point = points[args.path]
    dataset, arm, seed = point["recipe"], point["arm"], point.get("seed", 0)
    table = recipe.recipe(name, dataset)
    root = None if table.get("embedded", dataset == "default") else recipe._root(point.get("root", dataset), args.root)
    plan = recipe._plan(table, arm, root)
    label = name if dataset == "default" else f"{name}@{dataset}"
    done = Path(args.trained or Path(args.work) / label / f"{arm}-{seed}" / "checkpoints")
    folder = Path("runs/checkpoints") / args.path
    if done.is_dir():
        metrics = recipe.run(name, plan, seed, folder, done, args.device, True)
    else:
        metrics = recipe.run(name, plan, seed, folder, None, args.device, True)
        done = folder / "checkpoints"
    figures = {k: v for k, v in metrics.items() if k.startswith("test/")}
    last = done / f"{plan.get('evaluate', 'best')}.ckpt"
    cls = catalogue.load_class(name)
    # files that training began with are this machine's, and what they held is in the weights
    known = inspect.signature(cls).parameters
    own = [k for k, v in plan.get("model", {}).items() if "{prepare}" in str(v) and k != "backbone"]
    kept = last if last.is_file() else done / "last.ckpt"
    model = cls.from_pretrained(kept, **{k: known[k].default for k in own})
    place = catalogue.ROOT.parent / "hub" / args.path
    part = place.with_name(f".{args.path}")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part, **of_checkpoint(name, point, figures))
    if sum(f.stat().st_size for f in part.iterdir()) > 12 * 2**20:
        raise ZooError(f"{part} is larger than 12 MB.")
    shutil.rmtree(place, ignore_errors=True)
    part.rename(place)
    return {"path": str(place), **figures}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for call in (imports, load, data, steps, peers, federated, speed, parity, checkpoint):
        sub = verbs.add_parser(call.__name__)
        sub.set_defaults(call=call)
        sub.add_argument("--device", default="cpu")
        sub.add_argument("--json")
        if call in (speed, parity):
            sub.add_argument("name")
            sub.add_argument("--authors", required=call is parity, help="checkout of the authors' repository")
            sub.add_argument("--golden", action="store_true", help="also write tests/golden/<method>.safetensors")
        if call is checkpoint:
            sub.add_argument("name")
            sub.add_argument("path", help="the folder's name under hub/")
            sub.add_argument("--root", help="folder of the dataset")
            sub.add_argument("--trained", help="folder of checkpoints that the catalogue's `command` has left")
            sub.add_argument("--work", default="runs/reproduce", help="where `zoo reproduce` left its checkpoints")
        if call in (steps, peers):
            sub.add_argument("names", nargs="*")
        if call is federated:
            sub.add_argument("names", nargs="*", metavar="PART", choices=[*FEDERATED, []])
        if call is steps:
            sub.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    hold_memory()
    figures = args.call(args)
    if figures is not None:
        print(json.dumps(figures, indent=1))
        if args.json:
            results.record(Path(args.json), {args.verb: {"figures": figures, **results.circumstances()}})


if __name__ == "__main__":
    main()
