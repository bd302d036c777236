"""The adapter to Flower: its messages, a server and nodes in one process, and real processes on loopback."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.core import ZooError, catalogue
from zoo.engines.federated import FederatedModule

from .test_remote import digits, simulated

MODEL = {"variant": "tiny", "local_batch": 16, "lr": 0.05, "stack": 1}
DATA = {"clients": 3, "seed": 3, "rounds": 2, "per_class": 12, "test_per_client": 8}


def test_where_flwr_is_missing_one_line_says_what_to_install(python: Callable[..., Any]) -> None:
    code = "import sys; sys.modules['flwr'] = None\nimport zoo.engines.federated.flower"
    last = python(code).stderr.strip().splitlines()[-1]
    assert last.endswith('needs flwr: pip install "paper-zoo[federated]".') and "ZooError" in last


@pytest.fixture
def flower() -> Any:
    pytest.importorskip("flwr", reason='needs flwr: pip install "paper-zoo[federated]"')
    from zoo.engines.federated import flower

    return flower


# ---- messages and apps ----------------------------------------------------------------------------------------------


def test_tensors_come_back_as_they_went(flower: Any) -> None:
    message = {
        "weight": torch.randn(3, 2).T, "count": torch.tensor(4), "mask": torch.tensor([True, False]),
        "half": torch.randn(2).bfloat16(), "none": torch.zeros(0, 3), "double": torch.randn(2, dtype=torch.float64),
    }  # fmt: skip
    found = flower.from_record(flower.to_record(message))
    assert list(found) == list(message)
    for name, value in message.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)
    found["count"] += 1  # writable


def test_an_app_is_what_flwr_takes(flower: Any, tmp_path: Path) -> None:
    folder = flower.write_app(tmp_path / "My Sites", data={"clients": 3}, num_server_rounds=5, evaluate=True)
    app = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert json.loads(app["config"]["data"]) == {"clients": 3}
    assert app["config"]["num-server-rounds"] == 5 and app["config"]["evaluate"] is True
    module, _, name = app["components"]["serverapp"].partition(":")
    assert getattr(sys.modules[module], name) is flower.server
    flower.main([str(tmp_path / "b"), "--clients", "4", "--per-round", "2", "--model", '{"lr": 0.1}', "--rounds", "7"])
    made = tomllib.loads((tmp_path / "b" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert json.loads(made["data"]) == {"clients": 4, "per_round": 2} and json.loads(made["model"]) == {"lr": 0.1}
    assert made["num-server-rounds"] == 7 and made["out"] == ""
    with pytest.raises(ZooError, match="no setting 'rounds'; it has method"):
        flower.write_app(tmp_path, rounds=3)


# ---- a server and nodes in one process ------------------------------------------------------------------------------


class Grid:
    """Flower's Grid with the nodes in this process: contexts live on, and messages are made and read as ever."""

    def __init__(self, flower: Any, configs: list[dict[str, Any]], run: dict[str, Any]):
        from flwr.app import Context, Error, Message, RecordDict

        self.flower, self.message, self.error = flower, Message, Error
        self.nodes = {
            100 + i: Context(run_id=7, node_id=100 + i, node_config=config, state=RecordDict(), run_config=run)
            for i, config in enumerate(configs)
        }
        self.context = Context(run_id=7, node_id=1, node_config={}, state=RecordDict(), run_config=run)
        self.dead: set[int] = set()  # the SuperLink says that it lost a node
        self.slow: set[int] = set()  # nothing comes in time
        self.sent: list[Any] = []

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Iterator[Any]:
        for message in messages:
            node = message.metadata.dst_node_id
            self.sent.append(message)
            training = message.metadata.message_type == "train"
            if training and node in self.slow:
                continue
            if training and node in self.dead:
                reply = self.message(self.error(code=5, reason="the node is unavailable"), reply_to=message)
                reply.metadata.__dict__["_src_node_id"] = 1  # the SuperLink's own
                yield reply
                continue
            try:
                yield self.flower.client(message, self.nodes[node])
            except Exception as error:
                reason = f"Traceback ...\n{type(error).__name__}: {error}"
                yield self.message(self.error(code=2, reason=reason), reply_to=message)


@pytest.fixture
def grid(flower: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Grid]:
    try:
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError:
        pass
    else:  # a message says which run it is of, which only a run knows
        for name, value in (("_run_id", 7), ("_node_id", 1), ("_task_id", 1)):
            monkeypatch.setattr(TaskIdentity, name, value, raising=False)

    def make(nodes: list[dict[str, Any]], **run: Any) -> Grid:
        settings: dict[str, Any] = {"method": "FederatedModule", "model": MODEL, "data": DATA, "wait": 0, **run}
        return Grid(flower, nodes, {k: json.dumps(v) if isinstance(v, dict) else v for k, v in settings.items()})

    return make


THREE = [{"partition-id": i} for i in (2, 0, 1)]


@pytest.mark.parametrize("change", [{"personal": ["head."]}, {"algorithm": "scaffold"}])
def test_runs_equal_the_simulation(
    flower: Any, grid: Callable[..., Grid], tmp_path: Path, change: dict[str, Any]
) -> None:
    net = grid(THREE, **{"model": {**MODEL, **change}, "num-server-rounds": 2, "seed": 5, "out": str(tmp_path / "out")})
    flower.server(net, net.context)
    alike(FederatedModule.from_pretrained(tmp_path / "out"), change)
    kept = {c.node_config["partition-id"]: flower.from_record(c.state["kept"]) for c in net.nodes.values()}
    model = simulated(FederatedModule, digits(**DATA), {**MODEL, **change})
    for client, rows in kept.items():
        for name, row in model.states.read([client]).items():
            assert torch.allclose(rows[name], row, atol=1e-6), (client, name)
    with open(tmp_path / "out" / "rounds.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["round"] for line in lines] == ["1", "2"] and lines[1]["answered"] == "3.0"
    for message in net.sent:  # what is a client's own never goes out again
        assert all(
            not name.startswith("personal.") for record in message.content.array_records.values() for name in record
        )


def alike(model: Any, change: dict[str, Any]) -> None:
    """The global weights of two rounds are the simulation's."""
    own, wanted = model.state_dict(), simulated(FederatedModule, digits(**DATA), {**MODEL, **change}).state_dict()
    for name in wanted:
        if name.startswith(("model.", "server.", "round", "sent")):
            far = (own[name] - wanted[name]).abs().max() / wanted[name].abs().max().clamp(min=1e-3)
            assert float(far) <= 1e-6, name


GGEUR = {"variant": "tiny", "per_prototype": 3, "fill_absent": True}


def ggeur(folder: Path) -> None:
    """The head and statistics of two rounds on machines are the simulation's."""
    cls = catalogue.load_class("GGEUR")
    own, wanted = cls.from_pretrained(folder).state_dict(), simulated(cls, digits(**DATA), GGEUR).state_dict()
    for name, value in wanted.items():
        if name.startswith(("model.", "statistics.", "round", "sent")):
            assert torch.allclose(own[name], value, rtol=1e-5, atol=1e-6), name


def test_clients_that_report_first_equal_the_simulation(flower: Any, grid: Callable[..., Grid], tmp_path: Path) -> None:
    settings = {"num-server-rounds": 2, "seed": 5, "out": str(tmp_path / "out")}
    net = grid(THREE, method="GGEUR", model=GGEUR, **settings)
    flower.server(net, net.context)
    ggeur(tmp_path / "out")
    statistics = {"statistics.counts", "statistics.covariance", "statistics.prototypes"}
    assert not any(statistics & set(r) for m in net.sent for r in m.content.array_records.values())


def test_a_broken_node_costs_its_answer_only(flower: Any, grid: Callable[..., Grid], tmp_path: Path) -> None:
    broken = {"partition-id": 1, "device": "nowhere"}
    net = grid([THREE[0], THREE[1], broken], **{"num-server-rounds": 1, "out": str(tmp_path / "out")})
    flower.server(net, net.context)
    with open(tmp_path / "out" / "rounds.csv", newline="") as file:
        line = next(csv.DictReader(file))
    assert line["silent"] == "1" and line["answered"] == "2.0"
    net.context.run_config |= {"min-clients": 2, "out": ""}
    lost = r"1 of 3 clients answered, min_clients is 2\. client 1: error 2.*nowhere; client 2: "
    for gone, words in (("dead", "error 5: the node is unavailable"), ("slow", "no answer within 3600 s")):
        getattr(net, gone).add(100)
        with pytest.raises(ZooError, match=lost + words):
            flower.server(net, net.context)
        getattr(net, gone).clear()


def test_sites_of_ones_own_with_different_classes(flower: Any, grid: Callable[..., Grid], tmp_path: Path) -> None:
    from PIL import Image

    for site, names in enumerate((["cat", "dog"], ["ant", "dog"])):
        for name in names:
            for part, count in (("train", 6), ("test", 2)):
                folder = tmp_path / f"site{site}" / part / name
                folder.mkdir(parents=True)
                for i in range(count):
                    shade = {"ant": 20, "cat": 120, "dog": 220}[name] + i
                    Image.new("RGB", (8, 8), (shade, shade, shade)).save(folder / f"{i}.png")
    nodes = [
        {"partition-id": i, "root": str(tmp_path / f"site{i}"), "keep": str(tmp_path / f"keep{i}")} for i in (0, 1)
    ]
    data = {"clients": 2, "val": 0.0, "image_size": 8, "min_size": 1}
    net = grid(
        nodes, model={"variant": "tiny", "personal": ["head."]}, data=data, evaluate=True, out=str(tmp_path / "out")
    )
    net.context.run_config |= {"num-server-rounds": 1}
    flower.server(net, net.context)
    model = FederatedModule.from_pretrained(tmp_path / "out")
    assert model.hyperparameters["num_classes"] == 3 and model.data_memory["class_names"] == ["ant", "cat", "dog"]
    with open(tmp_path / "out" / "clients.csv", newline="") as file:
        assert [(line["client"], line["samples"]) for line in csv.DictReader(file)] == [("0", "4.0"), ("1", "4.0")]
    own = FederatedModule.from_pretrained(tmp_path / "keep1" / "model")
    kept = flower.from_record(net.nodes[101].state["kept"])
    assert all(torch.equal(own.states.read([1])[name], row) for name, row in kept.items())
    assert len(list((tmp_path / "keep1").glob("*.samples"))) == 1
    # started again in the same run, a node finds what it kept in its file
    net.nodes[101].state.clear()
    assert all(torch.equal(value, kept[name]) for name, value in flower._recall(net.nodes[101]).items())


def test_what_a_run_refuses(flower: Any, grid: Callable[..., Grid]) -> None:
    cases: list[tuple[list[dict[str, Any]], dict[str, Any], str]] = [
        ([THREE[0]], {"min-clients": 2}, r"1 of 3 clients came within 0 s; 2 are needed"),
        ([{"partition-id": 0}, {"partition-id": 0}], {}, "Two nodes say they are client 0"),
        ([{"partition-id": 9}], {"data": {**DATA, "clients": 10}, "min-clients": 1}, "samples"),
        ([{}], {}, r"0 of 3 clients came"),
        (THREE, {"data": {"seed": 1}}, "how many 'clients' there are"),
        (THREE, {"model": "{"}, "'model' of the run config is no JSON"),
        (THREE, {"method": "DisPFL", "model": {"variant": "tiny"}}, "DisPFL cannot run on machines of their own"),
    ]
    for nodes, run, words in cases[:2] + cases[3:]:
        net = grid(nodes, **run)
        with pytest.raises(ZooError, match=words):
            flower.server(net, net.context)


def test_a_run_goes_on_from_a_checkpoint(flower: Any, grid: Callable[..., Grid], tmp_path: Path) -> None:
    net = grid(THREE, **{"num-server-rounds": 1, "seed": 5, "out": str(tmp_path / "one")})
    flower.server(net, net.context)
    net.context.run_config |= {"num-server-rounds": 2, "start": str(tmp_path / "one"), "out": str(tmp_path / "two")}
    flower.server(net, net.context)
    alike(FederatedModule.from_pretrained(tmp_path / "two"), {})


# ---- real processes on loopback -------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Loopback:
    """A superlink and supernodes as processes, everything that they write under one folder."""

    def __init__(self, folder: Path, link: tuple[str, ...] = ("--insecure",), node: tuple[str, ...] = ("--insecure",)):
        self.folder, self.node_flags = folder, node
        self.home, self.bin = folder / "flwr", Path(sys.executable).parent
        self.env = {
            **os.environ, "FLWR_HOME": str(self.home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "HOME": str(folder),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        self.processes: list[subprocess.Popen[bytes]] = []
        self.port = free_port()
        self.start(
            "flower-superlink", *link, "--host", "127.0.0.1", "--port", str(self.port),
            "--disable-runtime-dependency-installation",
        )  # fmt: skip

    def start(self, name: str, *arguments: str) -> "subprocess.Popen[bytes]":
        log = open(self.folder / f"{name}-{len(self.processes)}.log", "wb")  # noqa: SIM115 (the process's)
        command = [str(self.bin / name), *arguments]
        process = subprocess.Popen(
            command, env=self.env, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
        )
        self.processes.append(process)
        return process

    def node(self, client: int, config: str = "", *flags: str) -> "subprocess.Popen[bytes]":
        return self.start(
            "flower-supernode", *(flags or self.node_flags), "--superlink", f"127.0.0.1:{self.port}", "--host",
            "127.0.0.1", "--port", str(free_port()), "--node-config", f"partition-id={client} {config}".strip(),
        )  # fmt: skip

    def ready(self, seconds: float = 120) -> None:
        """Until the superlink listens."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self.processes[0].poll() is None, self.logs()
            time.sleep(0.5)
        pytest.fail(f"the superlink does not listen: {self.logs()}")

    def flwr(self, *arguments: str, root: Path | None = None, seconds: float = 900) -> str:
        """`flwr` with a connection named loop."""
        self.home.mkdir(exist_ok=True)
        trust = f'root-certificates = "{root}"' if root else "insecure = true"
        text = f'[superlink]\ndefault = "loop"\n\n[superlink.loop]\naddress = "127.0.0.1:{self.port}"\n{trust}\n'
        (self.home / "config.toml").write_text(text)
        done = subprocess.run(
            [str(self.bin / "flwr"), *arguments], env=self.env, cwd=self.folder, capture_output=True, text=True,
            timeout=seconds,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-2000:]}{self.logs()}"
        return done.stdout

    def logs(self) -> str:
        return "\n".join(f"{p.name}: {p.read_text()[-1500:]}" for p in sorted(self.folder.glob("*.log")))

    def kill(self, process: "subprocess.Popen[bytes]") -> None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)

    def stop(self) -> None:
        for process in reversed(self.processes):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill(process)


def commands_of_today() -> None:
    """The processes' arguments here, and in docs/federated.md, are those of flwr 1.41."""
    from importlib.metadata import version

    if tuple(map(int, version("flwr").split(".")[:2])) < (1, 41):
        pytest.skip("the commands of flwr before 1.41 are others")


@pytest.fixture
def loopback(flower: Any, tmp_path: Path) -> Iterator[Loopback]:
    commands_of_today()
    found = Loopback(tmp_path)
    yield found
    found.stop()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_processes_on_loopback_equal_the_simulation(flower: Any, loopback: Loopback, tmp_path: Path) -> None:
    loopback.ready()
    for client in range(3):
        loopback.node(client)
    for number, change in enumerate([{"personal": ["head."]}, {"algorithm": "scaffold"}]):
        app = flower.write_app(
            tmp_path / f"app{number}", model={**MODEL, **change}, data=DATA, num_server_rounds=2, seed=5,
            out=str(tmp_path / f"out{number}"), wait=600, timeout=600, min_clients=3,
        )  # fmt: skip
        said = loopback.flwr("run", str(app), "loop", "--stream")
        assert (tmp_path / f"out{number}" / "model.safetensors").is_file(), said + loopback.logs()
        alike(FederatedModule.from_pretrained(tmp_path / f"out{number}"), change)
    app = flower.write_app(
        tmp_path / "ggeur", method="GGEUR", model=GGEUR, data=DATA, num_server_rounds=2, seed=5,
        out=str(tmp_path / "heads"), wait=600, timeout=600, min_clients=3,
    )  # fmt: skip
    loopback.flwr("run", str(app), "loop", "--stream")
    ggeur(tmp_path / "heads")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_node_does_not_end_the_run(flower: Any, loopback: Loopback, tmp_path: Path) -> None:
    loopback.ready()
    nodes = [loopback.node(client) for client in range(3)]
    out = tmp_path / "out"
    app = flower.write_app(
        tmp_path / "app",
        model=MODEL,
        data=DATA,
        num_server_rounds=3,
        out=str(out),
        wait=600,
        timeout=600,
        min_clients=2,
    )
    loopback.flwr("run", str(app), "loop")
    until = time.monotonic() + 900
    while not (out / "rounds.csv").is_file():  # the first round is done
        assert time.monotonic() < until, loopback.logs()
        time.sleep(0.2)
    loopback.kill(nodes[1])
    while time.monotonic() < until:
        with open(out / "rounds.csv", newline="") as file:
            lines = list(csv.DictReader(file))
        if len(lines) == 3:
            break
        time.sleep(1)
    assert [line["answered"] for line in lines] == ["3.0", "2.0", "2.0"], loopback.logs()
    assert [line["silent"] for line in lines] == ["", "1", "1"]
    assert int(FederatedModule.from_pretrained(out).round) == 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_with_tls_only_registered_nodes_take_part(flower: Any, tmp_path: Path) -> None:
    commands_of_today()
    if not (shutil.which("openssl") and shutil.which("ssh-keygen")):
        pytest.skip("needs openssl and ssh-keygen")
    docs = (Path(__file__).parents[2] / "docs" / "federated.md").read_text(encoding="utf-8")
    shown = next(block for block in re.findall(r"```bash\n(.*?)```", docs, re.S) if block.startswith("openssl"))
    subprocess.run(["bash", "-e", "-c", shown], cwd=tmp_path, check=True, capture_output=True)
    for client in range(3):
        make = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", f"site{client}.key"]
        subprocess.run(make, cwd=tmp_path, check=True)
    root = tmp_path / "ca.pem"
    net = Loopback(
        tmp_path,
        ("--ssl-ca-certfile", "ca.pem", "--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key",
         "--enable-supernode-auth"),
    )  # fmt: skip
    try:
        net.ready()
        for client in range(2):  # the third is never registered
            net.flwr("supernode", "register", f"site{client}.key.pub", "loop", root=root)
        for client in range(3):
            key = f"site{client}.key"
            net.node(client, "", "--root-certificates", "ca.pem", "--auth-supernode-private-key", key)
        net.node(2, "", "--insecure")  # nor is one heard that does not encrypt
        out = tmp_path / "out"
        app = flower.write_app(
            tmp_path / "app", model=MODEL, data={**DATA, "clients": 3}, num_server_rounds=1, out=str(out), wait=60,
            timeout=600, min_clients=2,
        )  # fmt: skip
        said = net.flwr("run", str(app), "loop", "--stream", root=root)
        with open(out / "rounds.csv", newline="") as file:
            line = next(csv.DictReader(file))
        assert line["answered"] == "2.0" and line["silent"] == "2", said + net.logs()
        assert net.flwr("supernode", "list", "loop", "--format", "json", root=root).count('"online"') == 2
    finally:
        net.stop()
