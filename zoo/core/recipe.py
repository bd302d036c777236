"""Recipes: a paper's claim as a table that a command runs and judges."""

import copy
import gc
import hashlib
import importlib
import json
import logging
import math
import os
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zoo.core import catalogue, results
from zoo.core.errors import ZooError, nearest
from zoo.core.files import atomic_write
from zoo.core.memory import hold_memory

log = logging.getLogger(__name__)

KEYS = {
    "claim", "paper", "comparable", "seeds", "budget", "evaluate", "model", "data", "trainer", "prepare", "arms",
    "checks", "class", "datamodule", "fit", "cause", "embedded",
}  # fmt: skip
ARM_KEYS = {"class", "datamodule", "model", "data", "trainer", "prepare", "from", "fit", "evaluate"}
OPERATORS: dict[str, Callable[[float, float], bool]] = {">": lambda a, b: a > b, "<": lambda a, b: a < b}


def recipe(name: str, dataset: str = "default") -> dict[str, Any]:
    """A method's recipe, checked.

    Raises:
        ZooError: if there is none of that name, or it is malformed.
    """
    entry = catalogue.entry(name)
    if dataset not in entry.recipes:
        have = ", ".join(f"{name}@{d}" if d != "default" else name for d in entry.recipes) or "none"
        raise ZooError(f"{name} has no recipe {dataset!r}.{nearest(dataset, list(entry.recipes))} It has {have}.")
    found = copy.deepcopy(entry.recipes[dataset])
    where = f"{entry.toml.name} [recipes.{dataset}]"
    for key in ("claim", "arms", "checks", "seeds", "budget"):
        if not found.get(key):
            raise ZooError(f"{where}: '{key}' is missing.")
    unknown = [k for k in found if k not in KEYS] + [k for a in found["arms"].values() for k in a if k not in ARM_KEYS]
    if unknown:
        raise ZooError(f"{where}: unknown key {unknown[0]!r}.{nearest(unknown[0], sorted(KEYS | ARM_KEYS))}")
    if len(found["seeds"]) < 3:
        raise ZooError(f"{where}: at least 3 seeds.")
    for check in found["checks"]:
        sides = [check["left"], check["right"]]
        bad = [s for s in sides if isinstance(s, str) and s not in found["arms"]]
        if bad or check["op"] not in OPERATORS or "metric" not in check:
            raise ZooError(
                f"{where}: the check {check} names no arm {bad}, no metric or an operator other than < and >."
            )
    return found


def reproduce(
    name: str,
    dataset: str = "default",
    *,
    root: str | Path | None = None,
    seeds: int | list[int] | None = None,
    arms: list[str] | None = None,
    work: str | Path = "runs/reproduce",
    accelerator: str = "auto",
    progress: bool = False,
    jobs: int = 1,
) -> dict[str, Any]:
    """Run a recipe and judge its claim.

    Args:
        name: the method.
        dataset: ``"default"``, or the recipe's name.
        root: the dataset's folder, ``$ZOO_DATA/<dataset>`` by default; recipes on the embedded set take none.
        seeds: how many of the recipe's seeds (more than it has goes on counting), or which.
        arms: only these; the checks that need others are then left open and the claim with them.
        work: folder for checkpoints; an interrupted run goes on from the arms it has finished.
        jobs: processes that share the arms and seeds; the figures don't depend on it, "seconds" do.
    Returns:
        what goes to ``results/<Name>[@dataset].json``.
    """
    clock = results.Clock()
    name = catalogue.entry(name).facts["class"]
    table = recipe(name, dataset)
    chosen = _seeds(table["seeds"], seeds)
    data_root = None if table.get("embedded", dataset == "default") else _root(dataset, root)
    label = name if dataset == "default" else f"{name}@{dataset}"
    base = Path(work) / label
    values: dict[str, dict[str, dict[str, float]]] = {}
    wanted = [a for a in table["arms"] if arms is None or a in arms]
    if not wanted:
        raise ZooError(f"{label} has no arm {arms}; it has {', '.join(table['arms'])}.")
    plans = {arm: _plan(table, arm, data_root) for arm in wanted}
    # what others start from comes first: prepared folders, then arms, then arms that evaluate another's checkpoint
    stages = {json.dumps(p["prepare"], sort_keys=True): p["prepare"] for p in plans.values() if p.get("prepare")}
    runs = {(key, stage.get("seed", seed)): stage for key, stage in stages.items() for seed in chosen}
    _each(jobs, _prepare, [(stage, seed, base) for (_, seed), stage in runs.items()])
    for dependent in (False, True):
        tasks = [(arm, seed) for seed in chosen for arm in wanted if bool(table["arms"][arm].get("from")) == dependent]
        found = _each(jobs, _arm, [(name, plans[a], a, s, base, accelerator, progress) for a, s in tasks])
        for (arm, seed), metrics in zip(tasks, found, strict=True):
            values.setdefault(arm, {})[str(seed)] = metrics
    shutil.rmtree(base / "done", ignore_errors=True)
    checks = [judge(check, values) for check in table["checks"]]
    open_ = any(c["holds"] is None for c in checks)
    outcome: dict[str, Any] = {
        "name": label,
        "claim": table["claim"],
        "paper": table.get("paper", ""),
        "comparable": bool(table.get("comparable", False)),
        "holds": None if open_ else all(c["holds"] for c in checks),
        "checks": checks,
        "arms": values,
        "seeds": chosen,
        "seconds": round(clock.seconds, 1),
        "budget_minutes": table["budget"],
        "recipe": results.recipe_digest(table),
        "files": results.fingerprint(name),
        **results.circumstances(),
    }
    if outcome["holds"] is False:
        outcome["cause"] = table.get("cause", "")
    return outcome


def confirm(name: str, dataset: str = "default", *, evidence: dict[str, Any], **how: Any) -> dict[str, Any]:
    """Repeat the first seed of recorded evidence with the code as it is now; the same figures keep it current.

    For changes that should leave every figure as it is, at the cost of one seed.

    Args:
        evidence: what `reproduce` found, recorded with the recipe as it stands.
        how: of `reproduce`: ``root``, ``work``, ``accelerator``, ``progress``, ``jobs``.
    Returns:
        the evidence with a section "confirmed": the seed, the largest relative difference, and the circumstances.
    Raises:
        ZooError: if nothing is recorded, the recipe has changed since, or a figure differs by more than 1e-4 of it.
    """
    table = recipe(name, dataset)
    label = evidence.get("name", "")
    if not evidence.get("arms") or evidence.get("recipe") != results.recipe_digest(table):
        state = "was recorded with another recipe" if evidence.get("arms") else "is not recorded"
        raise ZooError(f"{name}@{dataset} {state}: nothing to confirm. Run `zoo reproduce` without --confirm.")
    seed = evidence["seeds"][0]
    again = reproduce(name, dataset, seeds=[seed], **how)
    judged = {check["metric"] for check in table["checks"]}
    worst = 0.0
    for arm, seeds in evidence["arms"].items():
        now = again["arms"][arm][str(seed)]
        for metric, before in seeds[str(seed)].items():
            if not metric.startswith("test/") and metric not in judged:
                continue
            difference = abs(now.get(metric, math.inf) - before) / max(abs(before), 1e-2)
            if difference > 1e-4:
                raise ZooError(
                    f"{label}, {arm}, seed {seed}: {metric} was {before:.6g} and is {now.get(metric, math.nan):.6g}. "
                    "The change is not neutral: run `zoo reproduce` with all seeds."
                )
            worst = max(worst, difference)
    note = {"seed": seed, "largest_difference": worst, "seconds": again["seconds"], "files": again["files"]}
    return {**evidence, "confirmed": note | results.circumstances()}


def _seeds(own: list[int], asked: int | list[int] | None) -> list[int]:
    if asked is None:
        return own
    if isinstance(asked, list):
        return asked
    if asked < 1:
        raise ZooError(f"--seeds is {asked}; at least 1.")
    return (own + [max(own) + 1 + i for i in range(asked)])[:asked]


def _root(dataset: str, root: str | Path | None) -> str:
    if root is not None:
        return str(root)
    home = os.environ.get("ZOO_DATA")
    if not home:
        raise ZooError(f"Where is {dataset}? Pass --root DIR, or set $ZOO_DATA to the folder that holds {dataset}/.")
    return str(Path(home) / dataset)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and key in ("model", "data", "trainer")
        merged[key] = {**merged[key], **value} if both else value
    return merged


def _each(jobs: int, call: Callable[..., Any], tasks: list[tuple[Any, ...]]) -> list[Any]:
    """Call with each tuple of arguments, in this process or in several; results in order."""
    if jobs <= 1 or len(tasks) <= 1:
        return [call(*task) for task in tasks]
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(min(jobs, len(tasks)), get_context("spawn"), hold_memory) as pool:
        futures = [pool.submit(call, *task) for task in tasks]
        return [future.result() for future in futures]


def _plan(table: dict[str, Any], arm: str, root: str | None) -> dict[str, Any]:
    """An arm's whole plan: the recipe's, under the source arm's where it has one, under its own."""
    plan = {k: v for k, v in table.items() if k in ARM_KEYS}
    source = table["arms"][arm].get("from")
    if source:
        plan = _merge(plan, table["arms"][source])
    plan = _merge(plan, table["arms"][arm])
    if root is not None:
        plan["data"] = {"root": root, **plan.get("data", {})}
        if plan.get("prepare"):  # "{root}" lets a stage read the same set
            plan["prepare"] = _fill(plan["prepare"], "{root}", root)
    return plan


def _arm(
    name: str,
    plan: dict[str, Any],
    arm: str,
    seed: int,
    base: Path,
    accelerator: str,
    progress: bool,
) -> dict[str, float]:
    """Train and test one arm with one seed; its metrics. Finished arms of an interrupted run are taken as they are."""
    source = base / f"{plan['from']}-{seed}" / "checkpoints" if plan.get("from") else None
    folder, done = base / f"{arm}-{seed}", base / "done" / f"{arm}-{seed}.json"
    metrics = run_once(done, name, plan, seed, folder, source, accelerator, progress)
    line = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k.startswith("test/"))
    print(f"{base.name}  {arm}  seed {seed}: {line}", flush=True)
    return metrics


def run_once(done: Path, name: str, plan: dict[str, Any], seed: int, *rest: Any) -> dict[str, float]:
    """`run`, or the metrics that it left in ``done`` where plan, seed and code are still the same."""
    key = hashlib.sha256(json.dumps([plan, seed, results.fingerprint(plan.get("class", name))]).encode()).hexdigest()
    if done.is_file():
        kept = json.loads(done.read_text())
        if kept["key"] == key:
            return kept["metrics"]
    metrics = run(name, plan, seed, *rest)
    gc.collect()  # a trainer, its model and its data hold each other
    with atomic_write(done) as part:
        part.write_text(json.dumps({"key": key, "metrics": metrics}))
    return metrics


def run(
    name: str,
    plan: dict[str, Any],
    seed: int,
    folder: Path,
    checkpoint: Path | None,
    accelerator: str,
    progress: bool,
) -> dict[str, float]:
    """Train and test a method as a plan says, or only test a ``checkpoint`` of it; every metric that was logged."""
    import inspect

    import lightning
    import torch

    from zoo.core.trainer import Trainer

    lightning.seed_everything(seed, verbose=False)
    cls = catalogue.load_class(plan.get("class", name))
    data_cls = catalogue.load_datamodule(plan.get("datamodule") or plan.get("class", name))
    if plan.get("prepare"):
        prepared = _prepare(plan["prepare"], seed, folder.parent)
        plan = {**plan, **{k: _fill(plan.get(k, {}), "{prepare}", prepared) for k in ("model", "data")}}
    arguments = dict(plan.get("data", {}))
    if "seed" in inspect.signature(data_cls).parameters:
        arguments.setdefault("seed", seed)
    data = data_cls(**arguments)
    data.prepare_data()
    data.setup("fit")
    lightning.seed_everything(seed, verbose=False)  # the same first weights for every arm, whatever the data drew
    model = build(cls, data, plan.get("model", {}))
    if folder.exists():
        shutil.rmtree(folder)
    trainer = Trainer(
        **{
            "default_root_dir": folder,
            "seed": seed,
            "accelerator": accelerator,
            "devices": 1,
            "enable_progress_bar": progress,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "logger": False,
            **plan.get("trainer", {}),
        }
    )
    clock = results.Clock()
    metrics: dict[str, float] = {}
    if checkpoint is None and plan.get("fit", True):
        trainer.fit(model, datamodule=data)
        metrics |= _numbers(trainer.callback_metrics)
        checkpoint = folder / "checkpoints"
    metrics["seconds"] = clock.seconds
    if checkpoint is not None and (checkpoint / "last.ckpt").is_file():
        best = checkpoint / f"{plan.get('evaluate', 'best')}.ckpt"
        content = torch.load(
            best if best.is_file() else checkpoint / "last.ckpt", map_location="cpu", weights_only=True
        )
        model.on_load_checkpoint(content)
        model.load_state_dict(content["state_dict"])
    trainer.test(model, datamodule=data, verbose=False)
    metrics |= _numbers(trainer.callback_metrics)
    metrics["parameters"] = float(sum(p.numel() for p in model.parameters() if p.requires_grad))
    broken = [k for k, v in metrics.items() if not math.isfinite(v)]
    if broken:
        raise ZooError(f"{name}, seed {seed}: {broken[0]} is {metrics[broken[0]]}. Training diverged.")
    return metrics


def build(cls: Any, data: Any, given: dict[str, Any]) -> Any:
    """A method with the user's arguments, a variant's, and the sizes that the data know and the user left out."""
    import inspect

    given = dict(given)
    variant = cls.variant(given.pop("variant", "paper"))
    known = inspect.signature(cls).parameters
    sizes = {k: v for k, v in data.describe().items() if k in known}
    return cls(**{**variant, **sizes, **given})


def _numbers(metrics: Any) -> dict[str, float]:
    return {k: float(v) for k, v in metrics.items()}


def _fill(value: Any, key: str, replacement: object) -> Any:
    if isinstance(value, dict):
        return {k: _fill(v, key, replacement) for k, v in value.items()}
    if isinstance(value, list):
        return [_fill(v, key, replacement) for v in value]
    return value.replace(key, str(replacement)) if isinstance(value, str) else value


def _prepare(stage: dict[str, Any], seed: int, base: Path) -> Path:
    """Run a preparing stage once per seed, or once for all where it has its own; its folder is complete or absent."""
    seed = stage.get("seed", seed)
    key = hashlib.sha256(json.dumps(stage, sort_keys=True).encode()).hexdigest()[:12]
    folder = base / f"prepare-{key}-{seed}"
    if folder.is_dir():
        return folder
    module, _, function = stage["call"].partition(":")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    getattr(importlib.import_module(module), function)(part, seed, **stage.get("args", {}))
    part.rename(folder)
    return folder


def mean(values: dict[str, dict[str, float]], metric: str) -> float:
    """Mean of a metric over an arm's seeds.

    Raises:
        ZooError: if the arm did not log it.
    """
    missing = [m for m in values.values() if metric not in m]
    if missing:
        raise ZooError(f"No metric {metric!r}.{nearest(metric, list(missing[0]))} Logged: {', '.join(missing[0])}.")
    return statistics.fmean(m[metric] for m in values.values())


def judge(check: dict[str, Any], values: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """One comparison of means over seeds, with its figures. What float32 cannot tell apart is a tie, which fails."""
    metric, margin = check["metric"], check.get("margin", 0.0)
    row = {k: check[k] for k in ("left", "op", "right", "metric")}
    row |= {"margin": margin, "relative": bool(check.get("relative", False))}
    if any(isinstance(s, str) and s not in values for s in (check["left"], check["right"])):
        return {**row, "holds": None}
    left = mean(values[check["left"]], metric)
    right = check["right"]
    right = mean(values[right], metric) if isinstance(right, str) else float(right)
    sign = 1 if check["op"] == ">" else -1
    bar = right * (1 + sign * margin) if check.get("relative") else right + sign * margin
    tie = math.isclose(left, bar, rel_tol=1e-6)
    return {**row, "left_mean": left, "right_mean": right, "holds": not tie and OPERATORS[check["op"]](left, bar)}


def report(outcome: dict[str, Any]) -> str:
    """Paper, expected and measured side by side, for a terminal."""
    lines = [f"{outcome['name']}: {outcome['claim']}"]
    if outcome["comparable"] and outcome["paper"]:
        lines.append(f"paper: {outcome['paper']}")
    metrics = list(dict.fromkeys(c["metric"] for c in outcome["checks"]))
    width = max(map(len, outcome["arms"]))
    for arm, seeds in outcome["arms"].items():
        cells = []
        for metric in metrics:
            have = [m[metric] for m in seeds.values() if metric in m]
            if have:
                spread = statistics.stdev(have) if len(have) > 1 else 0.0
                cells.append(f"{metric} {statistics.fmean(have):.4f} ± {spread:.4f}")
        lines.append(f"  {arm:<{width}}  {'   '.join(cells)}")
    for c in outcome["checks"]:
        margin = f"{c['margin']:.0%}" if c["relative"] else f"{c['margin']:g}"
        expected = f"{c['left']} {c['op']} {c['right']} by {margin} in {c['metric']}"
        if c["holds"] is None:
            lines.append(f"  open      expected {expected}")
            continue
        lines.append(
            f"  {'holds' if c['holds'] else 'FAILS':<8}  expected {expected};"
            f" measured {c['left_mean']:.4f} and {c['right_mean']:.4f}"
        )
    word = {True: "the claim holds", False: "the claim does not hold", None: "not all arms ran: the claim is open"}
    lines.append(f"{word[outcome['holds']]} ({len(outcome['seeds'])} seeds, {outcome['seconds']:.0f} s)")
    if outcome.get("cause"):
        lines.append(f"cause: {outcome['cause']}")
    return "\n".join(lines)
