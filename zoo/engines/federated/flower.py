"""Flower: the module that was simulated, on machines of their own (``pip install "paper-zoo[federated]"``).

    python -m zoo.engines.federated.flower hospitals --method FederatedModule --clients 3 --rounds 20
    flower-superlink ...; flower-supernode ... --node-config 'partition-id=0 root="/data/ours"'; flwr run hospitals

The first command writes a Flower app that names `client` and `server` of this file; `docs/federated.md` goes through
the rest. What travels is what `broadcast` and `upload` return, and what a method's `exchange` before a round asks and
is answered. What lives on with a client is kept in the node's ``context.state`` and never leaves it.

Run config (in the app's pyproject.toml, or ``flwr run --run-config``):

* ``method``: class name, of the catalogue or ``FederatedModule``. ``model``: its arguments as JSON, ``"variant"`` too;
  the sizes that the data know may be left out.
* ``data``: arguments of the method's DataModule as JSON: the number of ``clients``, ``per_round``, ``seed``, ...
* ``num-server-rounds``; ``seed`` of the initial weights; ``min-clients`` that must answer in a round; ``timeout`` of a
  round in seconds; ``wait``: seconds to wait for all clients at the start.
* ``out``: folder on the server's machine for the global checkpoint in Hub form and ``rounds.csv``; ``start``: a
  checkpoint to go on from. ``evaluate``: score every client's own model on its own test pictures at the end.

Node config (``flower-supernode --node-config``):

* ``partition-id``: which client this is, from 0. ``root``: this client's own data, in a layout that the DataModule
  reads; without it the node takes its share of the set that ``data`` describes, as the simulation divides it.
* ``device``; ``keep``: folder of this machine where what lives on with the client is also written, its own model after
  scoring, and its samples as they were read, for Flower starts a process for every message.
"""

import csv
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.core import ZooError, atomic_write, catalogue
from zoo.engines.federated.aggregation import Message as Tensors
from zoo.engines.federated.module import FederatedModule
from zoo.engines.federated.remote import (
    Answer,
    Machines,
    Order,
    at_client,
    build_for,
    enter,
    merge_classes,
    own_test,
    recall,
    relabel,
    score,
    surroundings,
)

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
except ImportError as error:
    raise ZooError('Federated learning on machines needs flwr: pip install "paper-zoo[federated]".') from error

log = logging.getLogger("flwr")  # whose lines `flwr run --stream` shows


# ---- messages -------------------------------------------------------------------------------------------------------


def to_record(message: Tensors) -> ArrayRecord:
    """Tensors as Flower sends them; bfloat16, which NumPy lacks, as its bits."""
    found = OrderedDict()
    for name, value in message.items():
        value = value.detach().cpu().contiguous()
        brain = value.dtype == torch.bfloat16
        array = Array((value.view(torch.int16) if brain else value).numpy())
        if brain:
            array.dtype = "bfloat16"
        found[name] = array
    return ArrayRecord(found)


def from_record(record: ArrayRecord) -> Tensors:
    """The inverse of `to_record`."""
    found = {}
    for name, array in record.items():
        value = torch.from_numpy(np.array(array.numpy()))
        found[name] = value.view(torch.bfloat16) if array.dtype == "bfloat16" else value
    return found


def _content(**records: Any) -> RecordDict:
    found = RecordDict()
    for name, record in records.items():
        found[name] = record
    return found


# ---- settings -------------------------------------------------------------------------------------------------------


def _table(config: Any, key: str) -> dict[str, Any]:
    try:
        found = json.loads(str(config.get(key, "") or "{}"))
    except ValueError as error:
        raise ZooError(f"{key!r} of the run config is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ZooError(f"{key!r} of the run config must be a JSON object; it is {found!r}.")
    return found


def _classes(method: str) -> tuple[Any, Any]:
    """The method and its DataModule."""
    if method == "FederatedModule":
        return FederatedModule, catalogue.load_datamodule("FederatedClassificationDataModule")
    return catalogue.load_class(method), catalogue.load_datamodule(method)


def _module(method: str, model: dict[str, Any]) -> Any:
    given = dict(model)
    cls = _classes(method)[0]
    return cls(**{**cls.variant(given.pop("variant", "paper")), **given})


@dataclass
class Site:
    """What a client has.

    Args:
        own: all its training samples as a DataModule's ``gather([client])`` gives them: "image" (n, c, h, w), "label"
            (n,), "size" [n], and what the method needs beside.
        classes: names of the classes, by label. test: "image" and "label" of its own to be scored on, or None.
    """

    own: dict[str, Any]
    classes: list[str]
    test: dict[str, Any] | None = None


def site_from_data(context: Context) -> Site:
    """This node's samples by the DataModule of the run's method."""
    config, node = context.run_config, context.node_config
    cls, given = _classes(str(config.get("method", "FederatedModule")))[1], _table(config, "data")
    client = _client(context)
    if "root" in node:  # all there is in this folder is this client's
        given = {k: v for k, v in given.items() if k not in ("partition_file", "alpha", "classes_per_client")}
        given |= {"root": str(node["root"]), "clients": 1, "partition": "iid"}
    data = cls(**given)
    data.setup("fit")
    if "root" in node and len(data.sites) > 1:
        raise ZooError(f"{node['root']} holds {len(data.sites)} sites, {', '.join(data.sites[:3])}; a node has one.")
    place = 0 if "root" in node else client
    if place >= len(data.shares):
        raise ZooError(f"partition-id is {client}; the data are divided among {len(data.shares)} clients, from 0.")
    return Site(data.gather([place]), list(data.class_names), own_test(data.test_dataloader(), place))


def _client(context: Context) -> int:
    if "partition-id" not in context.node_config:
        raise ZooError("The node config has no partition-id: start it with --node-config 'partition-id=0 ...'.")
    return int(context.node_config["partition-id"])


# ---- a client's machine ---------------------------------------------------------------------------------------------


def client_app(
    build: Callable[[str, dict[str, Any]], FederatedModule] = _module, site: Callable[[Context], Site] = site_from_data
) -> ClientApp:
    """A ClientApp for any method.

    Args:
        build: makes the module from the run's method and its hyperparameters.
        site: this node's samples; yours, where no DataModule reads them.
    """
    app = ClientApp()

    def opened(message: Message, context: Context) -> tuple[Any, ...]:
        client, given = _client(context), message.content["order"]
        here = _once(site, context)
        for key in ("label", "clean") if "clean" in here.own else ("label",):
            here.own[key] = relabel(here.own[key], here.classes, list(given["classes"]))
        method, model = str(given["method"]), json.loads(str(given["model"]))
        module = build_for([client], int(given["model-seed"]), lambda: build(method, model))
        module.to(str(context.node_config.get("device", "cuda" if torch.cuda.is_available() else "cpu")))
        down, around = (from_record(message.content[key]) for key in ("down", "around"))
        return client, given, here, module, down, around

    @app.query()
    def meet(message: Message, context: Context) -> Message:
        """Who this is: its number, how many samples of which classes it has, and the shape of its pictures."""
        here = _once(site, context)
        shape = [int(side) for side in here.own["image"].shape[1:]]
        size = int(sum(here.own["size"]))
        about = ConfigRecord({"client": _client(context), "size": size, "classes": here.classes, "shape": shape})
        return Message(_content(about=about), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client, given, here, module, down, around = opened(message, context)
        aside = from_record(message.content["aside"])
        order = Order(int(given["round"]), int(given["seed"]), float(given["work"]), str(given["part"]), aside)
        answer, kept = at_client(module, client, here.own, down, _recall(context), order, around)
        if not order.part:
            _remember(context, kept)
        metrics = MetricRecord({"samples": answer.size, **answer.logs})
        return Message(_content(up=to_record(answer.up), metrics=metrics), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        client, given, here, module, down, around = opened(message, context)
        enter(module, down, around, int(given["round"]))
        recall(module, client, _recall(context))
        if "keep" in context.node_config:
            module.states.complete()
            module.save_pretrained(Path(str(context.node_config["keep"])) / "model")
        if here.test is None:
            return Message(_content(metrics=MetricRecord({"samples": 0.0})), reply_to=message)
        here.test["label"] = relabel(here.test["label"], here.classes, list(given["classes"]))
        return Message(_content(metrics=MetricRecord(score(module, client, here.test))), reply_to=message)

    return app


def _file(context: Context, kind: str) -> Path | None:
    keep = context.node_config.get("keep")
    return None if keep is None else Path(str(keep)) / f"client-{_client(context)}-run-{context.run_id}.{kind}"


def _once(site: Callable[[Context], Site], context: Context) -> Site:
    """A node's samples, read once a run where there is a folder to keep them."""
    file = _file(context, "samples")
    if file is None:
        return site(context)
    if file.is_file():
        return Site(**torch.load(file, weights_only=True))
    found = site(context)
    for old in file.parent.glob(f"client-{_client(context)}-run-*.samples"):
        old.unlink()
    with atomic_write(file) as part:
        torch.save(vars(found), part)
    return found


def _recall(context: Context) -> Tensors:
    """What the last round left on this node; from its file where the node was started again in the same run."""
    if "kept" in context.state:
        return from_record(context.state["kept"])
    file = _file(context, "safetensors")
    if file is None or not file.is_file():
        return {}
    from safetensors.torch import load_file

    return load_file(file)


def _remember(context: Context, kept: Tensors) -> None:
    context.state["kept"] = to_record(kept)
    file = _file(context, "safetensors")
    if file is not None:
        from safetensors.torch import save_file

        with atomic_write(file) as part:
            save_file({name: value.cpu().contiguous() for name, value in kept.items()}, part)


# ---- the server -----------------------------------------------------------------------------------------------------


class Nodes:
    """Which node is which client, and messages to them and back.

    Args:
        grid: of the run. clients: how many there are. timeout: seconds that a round may take.
    """

    def __init__(self, grid: Grid, clients: int, timeout: float):
        self.grid, self.clients, self.timeout = grid, clients, timeout
        self.about: dict[int, dict[str, Any]] = {}  # by node
        self.common: dict[str, Any] = {}  # goes with every order
        self.around: Callable[[], Tensors] = dict

    @property
    def node_of(self) -> dict[int, int]:
        return {about["client"]: node for node, about in self.about.items()}

    def refresh(self) -> None:
        """Forget nodes that left, and ask new ones who they are.

        Raises:
            ZooError: if two nodes are the same client, or one is none of the clients.
        """
        there = set(self.grid.get_node_ids())
        self.about = {node: about for node, about in self.about.items() if node in there}
        new = [Message(RecordDict(), node, "query") for node in sorted(there - self.about.keys())]
        for reply in self.grid.send_and_receive(new, timeout=self.timeout) if new else ():
            node = reply.metadata.src_node_id
            if reply.has_error():
                log.warning("Node %d cannot say which client it is: %s", node, _reason(reply))
                continue
            about = dict(reply.content["about"])
            if not 0 <= about["client"] < self.clients:
                raise ZooError(f"A node says it is client {about['client']}; there are {self.clients}, from 0.")
            if about["client"] in self.node_of:
                raise ZooError(f"Two nodes say they are client {about['client']}; give each its own partition-id.")
            self.about[node] = about

    def wait(self, wanted: int, least: int, seconds: float) -> None:
        """Until ``wanted`` clients are there, or ``seconds`` are over.

        Raises:
            ZooError: if even ``least`` are not.
        """
        until = time.monotonic() + seconds
        self.refresh()
        while len(self.about) < wanted and time.monotonic() < until:
            time.sleep(min(1.0, seconds))
            self.refresh()
        if len(self.about) < least:
            raise ZooError(f"{len(self.about)} of {wanted} clients came within {seconds:g} s; {least} are needed.")
        if len(self.about) < wanted:
            log.warning("%d of %d clients came within %g s; going on.", len(self.about), wanted, seconds)

    def ask(self, kind: str, down: Tensors, orders: dict[int, Order]) -> dict[int, RecordDict | str]:
        """Send clients their orders; what each replied, or why it did not."""
        self.refresh()
        nodes, sent = self.node_of, to_record(down)
        around, messages = to_record(self.around()), []
        found: dict[int, RecordDict | str] = {client: "it is not connected" for client in orders}
        for client in orders.keys() & nodes.keys():
            found[client] = f"no answer within {self.timeout:g} s"
            given = orders[client]
            told = {"round": given.number, "seed": given.seed, "work": float(given.work), "part": given.part}
            order = ConfigRecord({**self.common, **told})
            content = _content(down=sent, around=around, aside=to_record(given.aside), order=order)
            messages.append(Message(content, nodes[client], kind, ttl=self.timeout, group_id=str(given.number)))
        client_of = {node: client for client, node in nodes.items()}
        silent = client_of.values() & orders.keys()
        lost = ""
        for reply in self.grid.send_and_receive(messages, timeout=self.timeout) if messages else ():
            node = reply.metadata.src_node_id
            if node not in client_of:  # the SuperLink speaks for a node that it has lost, and does not say which
                lost = _reason(reply)
                continue
            silent.discard(client_of[node])
            found[client_of[node]] = _reason(reply) if reply.has_error() else reply.content
        return found | {client: lost for client in silent if lost}

    def send(self, down: Tensors, orders: dict[int, Order]) -> dict[int, Answer | str]:
        """What `Machines` calls."""
        return {client: _answer(reply) for client, reply in self.ask("train", down, orders).items()}


def _reason(reply: Message) -> str:
    """The last line of what a node says went wrong."""
    lines = [line for line in str(reply.error.reason or "").splitlines() if line.strip()]
    return f"error {reply.error.code}{': ' + lines[-1].strip() if lines else ''}"


def _answer(reply: RecordDict | str) -> Answer | str:
    if isinstance(reply, str):
        return reply
    try:
        metrics = dict(reply["metrics"])
        return Answer(from_record(reply["up"]), int(metrics.pop("samples")), metrics)
    except Exception as error:  # one client's broken message must not end the round
        return f"unreadable answer ({type(error).__name__}: {error})"


def server_app(build: Callable[[str, dict[str, Any]], FederatedModule] = _module) -> ServerApp:
    """A ServerApp for any method that has a server; ``build`` as for `client_app`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run(grid, context, build)

    return app


def run(grid: Grid, context: Context, build: Callable[[str, dict[str, Any]], FederatedModule] = _module) -> Any:
    """All rounds of a run; returns the module, which is also in the folder ``out``.

    Raises:
        ZooError: if too few clients come, or answer in a round. What ``out`` holds is then of the last round done.
    """
    config = context.run_config
    method, model, data = str(config.get("method", "FederatedModule")), _table(config, "model"), _table(config, "data")
    cls, data_cls = _classes(method)
    hp = data_cls(**{k: v for k, v in data.items() if k != "root"}).hparams  # a root is the nodes' affair
    clients = hp.clients or 0
    if "clients" not in data:
        raise ZooError("'data' of the run config does not say how many 'clients' there are.")
    least = int(config.get("min-clients", 1))
    nodes = Nodes(grid, clients, float(config.get("timeout", 3600)))
    nodes.wait(clients, least, float(config.get("wait", 600)))
    classes, sizes = _agree(nodes, clients)
    known = cls.__init__.__annotations__
    model = {**{k: v for k, v in sizes.items() if k in known}, **model}
    seed = int(config.get("seed", 0))
    try:
        module = build_for([], seed, lambda: build(method, model))
    except ZooError as error:
        raise ZooError(f"{method} cannot run on machines of their own: {error}") from error
    if config.get("start"):
        first = _start(cls, str(config["start"]))
        enter(module, first, {}, int(first["round"]))
    nodes.common = {
        "method": method, "model": json.dumps(module.hyperparameters), "model-seed": seed, "classes": classes,
    }  # fmt: skip
    nodes.around = lambda: surroundings(module)
    machines = Machines(
        module, nodes.send, seed=hp.get("seed", 0), per_epoch=hp.rounds, per_round=hp.per_round, dropout=hp.dropout,
        stragglers=hp.stragglers, min_clients=least,
    )  # fmt: skip
    module.data_memory = {"class": data_cls.__name__, "class_names": classes, "shape": _shape(nodes)}
    out = Path(str(config["out"])) if config.get("out") else None
    table: list[dict[str, Any]] = []
    while int(module.round) < int(config.get("num-server-rounds", 10)):
        found = machines.step()
        line = {
            "round": int(module.round),
            **found,
            "silent": " ".join(map(str, machines.silent)),
            "bytes": machines.wire,
        }
        log.info("Round %d: %s", line["round"], ", ".join(f"{k} {v:g}" for k, v in found.items()))
        table.append(line)
        if out is not None:
            _write(out, module, table)
    if str(config.get("evaluate", "")).lower() in ("true", "1"):
        _evaluate(nodes, module, out)
    return module


def _agree(nodes: Nodes, clients: int) -> tuple[list[str], dict[str, Any]]:
    """The classes of all sites, and the sizes that a model must have.

    Raises:
        ZooError: if pictures differ in shape.
    """
    shape = _shape(nodes)
    for about in nodes.about.values():
        if list(about["shape"]) != shape:
            raise ZooError(
                f"Client {about['client']} has pictures of {list(about['shape'])}, others of {shape}: "
                "set image_size and channels in 'data'."
            )
    classes = merge_classes([about["classes"] for about in nodes.about.values()])
    sizes = {"num_classes": len(classes), "in_channels": shape[0], "image_size": shape[-1], "num_clients": clients}
    return classes, sizes


def _shape(nodes: Nodes) -> list[int]:
    return list(next(iter(nodes.about.values()))["shape"])


def _start(cls: Any, path: str) -> Tensors:
    """What a server takes from a checkpoint: all but the clients' own."""
    saved = cls.from_pretrained(path).state_dict()
    return {name: value for name, value in saved.items() if not name.startswith(("states.", "accuracy."))}


def _write(out: Path, module: Any, table: list[dict[str, Any]]) -> None:
    """The global checkpoint, with first values for what lives with clients, and a line for each round."""
    import copy

    whole = copy.deepcopy(module)
    whole.states.complete()
    whole.save_pretrained(out, trained_on=f"{module.states.clients} clients on machines of their own, by Flower")
    keys = list(dict.fromkeys(key for line in table for key in line))
    with atomic_write(out / "rounds.csv") as part, part.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, keys)
        writer.writeheader()
        writer.writerows(table)


def _evaluate(nodes: Nodes, module: Any, out: Path | None) -> None:
    """Every client's scores by its own pictures, in ``out``/clients.csv."""
    order = Order(int(module.round), 0)
    replies = nodes.ask("evaluate", {n: v.detach() for n, v in module.broadcast().items()}, {
        client: order for client in range(nodes.clients)
    })  # fmt: skip
    lines = []
    for client, reply in sorted(replies.items()):
        if isinstance(reply, str):
            log.warning("Client %d was not scored: %s", client, reply)
        elif dict(reply["metrics"])["samples"] > 0:
            lines.append({"client": client, **dict(reply["metrics"])})
    for name in ("accuracy", "personal_accuracy") if lines else ():
        log.info("%s over %d clients: %.4f", name, len(lines), sum(line[name] for line in lines) / len(lines))
    if out is not None and lines:
        with atomic_write(out / "clients.csv") as part, part.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)


# ---- the app --------------------------------------------------------------------------------------------------------

client = client_app()
server = server_app()


def write_app(folder: str | Path, **config: Any) -> Path:
    """Write a Flower app, a folder that ``flwr run`` takes; returns it.

    Args:
        config: of the run, see the top of this file, with ``_`` for ``-``; ``model`` and ``data`` as dicts.
    Example::

        write_app("hospitals", method="FederatedModule", data={"clients": 3}, num_server_rounds=20)
    """
    folder = Path(folder)
    defaults = {
        "method": "FederatedModule", "model": {}, "data": {}, "num-server-rounds": 10, "seed": 0, "min-clients": 1,
        "timeout": 3600, "wait": 600, "out": "", "start": "", "evaluate": False,
    }  # fmt: skip
    given = {name.replace("_", "-"): value for name, value in config.items()}
    unknown = sorted(given.keys() - defaults.keys())
    if unknown:
        raise ZooError(f"A run has no setting {unknown[0]!r}; it has {', '.join(defaults)}.")
    lines = [
        f"{name} = {json.dumps(json.dumps(value) if isinstance(value, dict) else value)}"
        for name, value in (defaults | given).items()
    ]  # a JSON string, number or truth value is one of TOML, too
    folder.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in folder.resolve().name.lower()).strip("-") or "federated"
    text = f"""[project]
name = "{name}"
version = "1.0.0"
description = "Federated training by paper-zoo"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "paper-zoo"

[tool.flwr.app.components]
serverapp = "zoo.engines.federated.flower:server"
clientapp = "zoo.engines.federated.flower:client"

[tool.flwr.app.config]
"""
    with atomic_write(folder / "pyproject.toml") as part:
        part.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")
    return folder


def main(arguments: list[str] | None = None) -> None:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m zoo.engines.federated.flower", description="Write a Flower app.")
    parser.add_argument("folder")
    parser.add_argument("--method", default="FederatedModule")
    parser.add_argument("--clients", type=int, required=True, help="how many there are")
    parser.add_argument("--per-round", type=int, help="how many take part in each round; all")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--model", default="{}", help="arguments of the method, JSON")
    parser.add_argument("--data", default="{}", help="further arguments of its DataModule, JSON")
    parser.add_argument("--out", default="", help="folder on the server's machine for the checkpoint")
    args = parser.parse_args(arguments)
    data = {**json.loads(args.data), "clients": args.clients}
    data |= {} if args.per_round is None else {"per_round": args.per_round}
    folder = write_app(
        args.folder, method=args.method, model=json.loads(args.model), data=data, num_server_rounds=args.rounds,
        out=args.out and str(Path(args.out).resolve()),
    )  # fmt: skip
    print(f"{folder}: flwr run {folder} [SUPERLINK] --stream")


if __name__ == "__main__":
    main()
