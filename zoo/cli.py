"""The command ``zoo``. Verbs that only read the catalogue load neither torch nor lightning."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zoo.core import catalogue
from zoo.core.catalogue import published
from zoo.core.errors import ZooError, nearest

TRAINING = ("fit", "validate", "test")
WORKING = (*TRAINING, "predict", "demo", "reproduce", "compare")
HELP = """\
usage: zoo VERB ...

  list [--domain D] [--family F] [--json]          the methods
  info NAME [--json]                               one method: facts, recipes, evidence, checkpoints
  info NAME --backbone ID|FOLDER|CONFIG.json [--model.OPTION V] [--json]
                                                   its size and memory on a backbone, from the config alone
  fit|validate|test NAME [--variant V] [--from CHECKPOINT] [--ckpt_path FILE] [any LightningCLI option]
  predict NAME --ckpt_path FILE|DIR|REPO[@REVISION] --input PATH --output PATH [--compare] [--overwrite]
          [--data.OPTION V] [--model.OPTION V]
  demo NAME --ckpt_path FILE|DIR|REPO[@REVISION]   a page on this machine: drop a picture, slide from before to after
  reproduce NAME[@DATASET] [--root DIR] [--seeds N] [--json FILE] [--confirm]
  compare [LABEL=]NAME[,KEY=VALUE...] ... --output DIR [--seeds N]
          [--data.OPTION V] [--model.OPTION V] [--trainer.OPTION V]
  convert NAME AUTHORS_CHECKPOINT OUT_DIR          an authors' checkpoint to ours
  publish DIR --repo-id ORG/NAME [--private]       to the Hugging Face Hub, in one commit
  export NAME CHECKPOINT OUT --format onnx|torch_export

NAME is a class name, any case. Every verb takes --help, and --traceback to see more of an error.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status is returned: 0 done, 2 a user's mistake, 3 a claim that does not hold."""
    args = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in args or bool(os.environ.get("ZOO_TRACEBACK"))
    args = [a for a in args if a != "--traceback"]
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if args[0] == "--version":
        from zoo import __version__

        print(__version__)
        return 0
    verb, rest = args[0], args[1:]
    if verb in WORKING:
        from zoo.core.memory import hold_memory

        hold_memory()
    try:
        if verb in TRAINING:
            return _train(verb, rest)
        if verb not in VERBS:
            raise ZooError(f"No verb {verb!r}.{nearest(verb, [*VERBS, *TRAINING])} `zoo --help` shows all.")
        return VERBS[verb](rest) or 0
    except SystemExit as error:
        if type(error).__name__ == "SIGTERMException":  # lightning's, after it has saved: the training is not done
            return 143
        return error.code if isinstance(error.code, int) else 1 if error.code else 0
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if traceback:
            raise
        print(f"zoo: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    text = str(error).strip("'\"") if isinstance(error, KeyError) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if type(error).__name__ == "ArgumentError" and len(lines) > 1:  # jsonargparse puts the cause on the next lines
        text = " ".join(lines[:4])
    known = (
        isinstance(error, (ZooError, ValueError, TypeError, KeyError, OSError)) or "Argument" in type(error).__name__
    )
    return text if known else f"{type(error).__name__}: {text} (--traceback shows more)"


class _Parser(argparse.ArgumentParser):
    """argparse without the usage dump."""

    def error(self, message: str) -> Any:
        raise ZooError(f"{message}. See: {self.prog} --help")


def _parser(verb: str, about: str, name: bool = True) -> _Parser:
    parser = _Parser(prog=f"zoo {verb}", description=about)
    if name:
        parser.add_argument("name", metavar="NAME", help="a method's class name, any case")
    return parser


# ---- reading the catalogue ---------------------------------------------------------------------------------------


def _list(argv: list[str]) -> None:
    parser = _parser("list", "The methods of the zoo.", name=False)
    parser.add_argument("--domain", choices=sorted({e.domain for e in catalogue.entries().values()}))
    parser.add_argument("--family")
    parser.add_argument("--json", action="store_true", help="facts as JSON")
    args = parser.parse_args(argv)
    names = catalogue.names(args.domain, args.family)
    if args.json:
        rows = [
            {**catalogue.facts(n), "domain": e.domain, "family": e.family} for n in names if (e := catalogue.entry(n))
        ]
        print(json.dumps(rows, indent=1))
        return
    from zoo.core import results

    width = max(map(len, names), default=0)
    for name in names:
        entry = catalogue.entry(name)
        held = {True: "holds", False: "does not hold", None: "not measured"}[results.read(name).get("holds")]
        points = ", ".join(c.get("repo") or f"hub/{c['path']}" for c in entry.facts.get("checkpoints", [])) or "-"
        place = f"{entry.domain}/{entry.family}"
        print(f"{name:<{width}}  {place:<22}  {entry.facts['fidelity']:<14}  claim: {held:<13}  checkpoints: {points}")
    if not names:
        raise ZooError(f"No method in family {args.family!r}.")


def _info(argv: list[str]) -> None:
    parser = _parser("info", "Facts, recipes, evidence and checkpoints of a method.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--backbone", help="size and memory on this backbone: a Hub id, a folder or a config.json")
    args, extra = parser.parse_known_args(argv)
    if extra and not args.backbone:
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    from zoo.core import results

    entry = catalogue.entry(args.name)
    facts = entry.facts
    name = facts["class"]
    if args.backbone:
        from zoo.core.sizes import describe, sizes

        options = _options(extra, ("model",))["model"]
        told = sizes(name, args.backbone, **options) if args.json else describe(name, args.backbone, **options)
        print(json.dumps(told, indent=1) if args.json else told)
        return
    evidence = results.of(name)
    if args.json:
        print(json.dumps({**facts, "recipes": entry.recipes, "results": evidence}, indent=1))
        return
    print(f"{name}: {facts['title']} ({published(facts)}, arXiv {facts.get('arxiv') or '-'})")
    print(f"  {facts['summary']}")
    print(f"  from {entry.package} import {name}, {facts['datamodule']}")
    print(f"  authors' code: {facts.get('code') or 'none public'} ({facts.get('code_licence', 'none')})")
    sizes = ", ".join(f"{k} {v:,}" for k, v in facts["parameters"].items())
    print(f"  fidelity: {facts['fidelity']}; parameters: {sizes}")
    no = [f"{k} ({v})" for k, v in facts.get("capabilities", {}).items() if v is not True]
    print(f"  capabilities: all but {'; '.join(no)}" if no else "  capabilities: all")
    for point in facts.get("checkpoints", []):
        metrics = ", ".join(f"{k} {v}" for k, v in point.get("metrics", {}).items())
        print(f"  checkpoint {point.get('repo') or 'hub/' + point['path']} ({point['status']}): {metrics}")
    for dataset, table in entry.recipes.items():
        label = name if dataset == "default" else f"{name}@{dataset}"
        found = evidence.get(label, {})
        held = {True: "holds", False: "does not hold", None: "not measured"}[found.get("holds")]
        stale = ", stale: the code or the recipe changed since" if results.is_stale(label, found) else ""
        print(f"  zoo reproduce {label}  ({held}{stale}; {table['budget']} min): {table['claim']}")


# ---- training ----------------------------------------------------------------------------------------------------


def _train(verb: str, argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        if argv[:1] in (["-h"], ["--help"]):
            print(f"usage: zoo {verb} NAME [--variant V] [--from CHECKPOINT] [--ckpt_path P] [LightningCLI options]")
            print(f"`zoo {verb} NAME --help` shows all options of a method.")
            return 0
        raise ZooError(f"zoo {verb} needs a method's name first. `zoo list` shows all.")
    name = catalogue.entry(argv[0]).facts["class"]
    from zoo.core.command import train

    return train(verb, name, argv[1:])


# ---- everything else ---------------------------------------------------------------------------------------------


def _options(extra: list[str], prefixes: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """``--data.root X --model.tile=256`` as ``{"data": {...}, "model": {...}}``."""
    found: dict[str, dict[str, Any]] = {p: {} for p in prefixes}
    words: Iterator[str] = iter(extra)
    for word in words:
        key, equals, value = word.partition("=")
        prefix, dot, option = key.removeprefix("--").partition(".")
        if not key.startswith("--") or not dot or prefix not in prefixes:
            raise ZooError(f"Unknown option {word!r}; options of the method go as --{prefixes[0]}.NAME VALUE.")
        if not equals:
            value = next(words, "")
        try:
            found[prefix][option] = json.loads(value)
        except ValueError:
            found[prefix][option] = None if value in ("None", "null") else value
    return found


def _predict(argv: list[str]) -> None:
    parser = _parser("predict", "Run a trained method on your own files.")
    parser.add_argument("--ckpt_path", required=True, metavar="FILE|DIR|REPO[@REVISION]")
    parser.add_argument("--input", required=True, metavar="PATH", help="a file or folder of yours")
    parser.add_argument("--output", required=True, metavar="PATH", help="where the results go")
    parser.add_argument("--compare", action="store_true", help="pictures: also input, result and reference in a row")
    parser.add_argument("--overwrite", action="store_true", help="do again what an earlier run finished")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    args, extra = parser.parse_known_args(argv)
    options = _options(extra, ("data", "model"))
    name = catalogue.entry(args.name).facts["class"]
    if not Path(args.input).expanduser().exists():
        raise ZooError(f"--input {args.input} does not exist.")
    from zoo.core.command import predict

    how = {"device": args.device, "compare": args.compare, "overwrite": args.overwrite}
    how |= {"data_options": options["data"], "model_options": options["model"]}
    for path in predict(name, args.ckpt_path, args.input, args.output, **how):
        print(path)


def _demo(argv: list[str]) -> None:
    parser = _parser("demo", "A page on this machine: drop a picture, slide between before and after.")
    parser.add_argument("--ckpt_path", metavar="FILE|DIR|REPO[@REVISION]")
    parser.add_argument("--variant", help="untrained weights of this variant instead of a checkpoint")
    parser.add_argument("--host", default="127.0.0.1", help="the page is for this machine alone by default")
    parser.add_argument("--port", type=int, help="the first free one from 7860 on by default")
    parser.add_argument("--browser", action="store_true", help="open the page in a browser")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    args, extra = parser.parse_known_args(argv)
    options = _options(extra, ("data", "model"))
    name = catalogue.entry(args.name).facts["class"]
    from zoo.core.command import demo

    how = {key: getattr(args, key) for key in ("variant", "host", "port", "browser", "device")}
    demo(name, args.ckpt_path, **how, data_options=options["data"], model_options=options["model"])


def _reproduce(argv: list[str]) -> int:
    parser = _Parser(prog="zoo reproduce", description="Run a method's recipe and judge its paper's claim.")
    parser.add_argument("name", metavar="NAME[@DATASET]")
    parser.add_argument("--root", help="folder of the dataset; $ZOO_DATA/DATASET by default")
    parser.add_argument("--seeds", type=int, help="how many seeds; the recipe's own by default")
    parser.add_argument("--arms", help="only these arms, comma-separated")
    parser.add_argument("--json", metavar="FILE", help="also write the outcome here")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--work", default="runs/reproduce", help="folder for checkpoints")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the arms and seeds")
    parser.add_argument("--progress", action="store_true", help="show progress bars")
    parser.add_argument(
        "--confirm", action="store_true", help="repeat one seed of the recorded evidence after a change of the code"
    )
    args = parser.parse_args(argv)
    name, _, dataset = args.name.partition("@")
    name, dataset = catalogue.entry(name).facts["class"], dataset or "default"
    from zoo.core import recipe, results

    recipe.recipe(name, dataset)
    from zoo.core.command import quiet

    quiet()
    how = {key: getattr(args, key) for key in ("root", "work", "accelerator", "progress", "jobs")}
    if args.confirm:
        if args.seeds or args.arms:
            raise ZooError("--confirm repeats every arm with the first recorded seed: leave out --seeds and --arms.")
        file = Path(args.json or results.path(name if dataset == "default" else f"{name}@{dataset}"))
        found = recipe.confirm(name, dataset, evidence=results.read(file.stem, file.parent), **how)
        results.record(file, found)
        again = found["confirmed"]
        print(f"{found['name']}: seed {again['seed']} gives the recorded figures ({again['largest_difference']:.1g}).")
        return 0
    arms = args.arms.split(",") if args.arms else None
    outcome = recipe.reproduce(name, dataset, seeds=args.seeds, arms=arms, **how)
    if args.json:
        results.record(Path(args.json), outcome, drop=("cause", "confirmed"))
    print(recipe.report(outcome))
    return 3 if outcome["holds"] is False else 0


def _compare(argv: list[str]) -> None:
    parser = _parser(
        "compare", "Train and test several methods on one set: a table, a CSV file and a plot.", name=False
    )
    parser.add_argument(
        "methods",
        nargs="*",
        metavar="[LABEL=]NAME[,KEY=VALUE...]",
        help="a method, with hyperparameters of its own, under its own name or a label",
    )
    parser.add_argument("--family", help="all methods of a family")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="where table, plot and runs go; goes on with what is there"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--progress", action="store_true", help="show progress bars")
    args, extra = parser.parse_known_args(argv)
    options = _options(extra, ("data", "model", "trainer"))
    methods = args.methods + (catalogue.names(family=args.family) if args.family else [])
    if not methods or args.seeds < 1:
        raise ZooError("Name methods to compare, or a --family that has some (`zoo list`), and at least one seed.")
    from zoo.core.command import quiet
    from zoo.core.compare import compare, table

    quiet()
    run = {"output": Path(args.output), "seeds": args.seeds, "accelerator": args.accelerator, "progress": args.progress}
    print(table(compare(methods, **options, **run)))


def _convert(argv: list[str]) -> None:
    parser = _parser("convert", "Turn an authors' checkpoint into ours.")
    known = "safetensors, torch's, or TensorFlow's .index; of some methods a folder"
    parser.add_argument("checkpoint", metavar="AUTHORS_CHECKPOINT", help=known)
    parser.add_argument("out", metavar="OUT_DIR")
    args = parser.parse_args(argv)
    name = catalogue.entry(args.name).facts["class"]
    if not Path(args.checkpoint).exists():
        raise ZooError(f"{args.checkpoint} does not exist.")
    from zoo.core.command import convert

    print(convert(name, Path(args.checkpoint), Path(args.out)))


def _publish(argv: list[str]) -> None:
    parser = _parser("publish", "Upload a checkpoint to the Hub in one commit.", name=False)
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--repo-id", required=True, metavar="ORG/NAME")
    parser.add_argument("--private", action="store_true")
    args = parser.parse_args(argv)
    if not Path(args.folder).is_dir():
        raise ZooError(f"{args.folder} is not a folder; save one with `save_pretrained`.")
    from zoo.core.command import publish

    print(publish(Path(args.folder), args.repo_id, args.private))


def _export(argv: list[str]) -> None:
    parser = _parser("export", "Export a checkpoint for use without the zoo.")
    parser.add_argument("checkpoint", metavar="FILE|DIR|REPO")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--format", choices=("onnx", "torch_export"), required=True)
    args = parser.parse_args(argv)
    name = catalogue.entry(args.name).facts["class"]
    from zoo.core.command import export

    print(export(name, args.checkpoint, Path(args.out), args.format))


VERBS = {
    "list": _list,
    "info": _info,
    "predict": _predict,
    "demo": _demo,
    "reproduce": _reproduce,
    "compare": _compare,
    "convert": _convert,
    "publish": _publish,
    "export": _export,
}

if __name__ == "__main__":
    sys.exit(main())
