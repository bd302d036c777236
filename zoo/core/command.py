"""What the verbs of the command do once torch is loaded."""

import inspect
import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from zoo.core import catalogue, hub
from zoo.core.errors import ZooError, first_line, nearest
from zoo.core.files import atomic_write
from zoo.core.hub import load_tensors

log = logging.getLogger(__name__)


def quiet() -> None:
    """Show the zoo's own log lines, and of lightning's only what a user must act on."""
    import lightning.pytorch  # noqa: F401  (its import sets its loggers' levels)

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("zoo").setLevel(logging.INFO)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*LightningCLI's args parameter.*")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    warnings.filterwarnings("ignore", ".*isinstance.treespec.*")
    warnings.filterwarnings("ignore", ".*exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*GPU available but not used.*")
    warnings.filterwarnings("ignore", ".*sync_dist=True.*")  # for a method's author
    warnings.filterwarnings("ignore", ".*`LightningModule.configure_optimizers` returned `None`.*")


# ---- fit, validate, test -----------------------------------------------------------------------------------------


def train(verb: str, name: str, argv: list[str]) -> int:
    """Run fit, validate or test through LightningCLI."""
    import lightning
    from jsonargparse import ArgumentError, Namespace
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    from zoo.core.trainer import Trainer

    quiet()
    cls, data_cls, facts = catalogue.load_class(name), catalogue.load_datamodule(name), catalogue.facts(name)
    variant, argv = _take(argv, "--variant")
    defaults = cls.variant(variant or "paper")
    signature = inspect.signature(cls).parameters

    class Command(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_argument("--ckpt_path", default=None, type=str | None, help="'last', or a checkpoint")
            parser.add_argument("--from", default=None, type=str | None, help="folder, file or repository to fine-tune")
            parser.set_defaults({f"model.{k}": v for k, v in defaults.items()})
            parser.set_defaults({"trainer.default_root_dir": f"runs/{name}"})
            if facts.get("trainer"):
                parser.set_defaults({f"trainer.{k}": v for k, v in facts["trainer"].items()})

        def instantiate_classes(self) -> None:
            self.datamodule = data_cls(**_plain(self.config.get("data", Namespace())))
            given = _plain(self.config.get("model", Namespace()))
            chosen = {k: v for k, v in given.items() if v != signature[k].default or k in defaults}
            self.model = self.build(chosen)
            # callbacks and loggers by class path; model and data stand already
            self.config_init = self.parser.instantiate_classes(self.config, instantiate_groups=False)
            self.trainer = self.instantiate_trainer()

        def build(self, chosen: dict[str, Any]) -> Any:
            if self.config["from"] and verb == "fit":
                plain = {k: v for k, v in chosen.items() if k not in defaults or v != defaults[k]}
                return cls.from_pretrained(self.config["from"], **plain)
            if verb != "fit":
                if not self.config["ckpt_path"]:
                    raise ZooError(f"zoo {verb} needs --ckpt_path: a .ckpt file, a folder or a repository.")
                return cls.from_pretrained(self.config["ckpt_path"])
            self.datamodule.prepare_data()
            self.datamodule.setup("fit")
            sizes = {k: v for k, v in self.datamodule.describe().items() if k in signature}
            for key, value in sizes.items():
                if key in chosen and chosen[key] not in (None, value, defaults.get(key)):
                    raise ZooError(f"--model.{key} is {chosen[key]}, but the data has {value}. Leave the option out.")
            try:
                return cls(**{**chosen, **sizes})
            except ValueError as error:
                own = {k for k, v in chosen.items() if k not in defaults or v != defaults[k]}
                if own or variant or self.datamodule.root is not None:
                    raise
                raise ZooError(
                    f"{error} The paper's sizes need other data: give --data.root, or --variant tiny."
                ) from error

    try:
        command = Command(
            cls,
            data_cls,
            trainer_class=Trainer,
            args=argv,
            run=False,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"exit_on_error": False, "prog": f"zoo {verb} {name}", "allow_abbrev": False},
        )
    except ArgumentError as error:
        raise ZooError(_short(str(error), name, verb, [cls, data_cls, Trainer, lightning.Trainer])) from error
    trainer, model, data = command.trainer, command.model, command.datamodule
    if verb == "fit":
        trainer.fit(model, datamodule=data, ckpt_path=command.config["ckpt_path"])
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if best and trainer.is_global_zero:
            print(f"best checkpoint: {best}")
        return 0
    getattr(trainer, verb)(model, datamodule=data)
    return 0


def _take(argv: list[str], option: str) -> tuple[str | None, list[str]]:
    """Take ``--option VALUE`` or ``--option=VALUE`` out of the arguments."""
    rest, value = [], None
    words = iter(argv)
    for word in words:
        if word == option:
            value = next(words, None)
            if value is None:
                raise ZooError(f"{option} needs a value.")
        elif word.startswith(option + "="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return value, rest


def _plain(config: Any) -> dict[str, Any]:
    return config.as_dict() if hasattr(config, "as_dict") else dict(config)


def _short(text: str, name: str, verb: str, classes: list[Any]) -> str:
    """jsonargparse's complaint in one line, with the nearest option for an unknown one."""
    lines = [line.strip(" -") for line in text.splitlines() if line.strip()]
    hint = ""
    if "unrecognized arguments: --" in lines[0]:
        given = lines[0].partition("--")[2].split()[0].partition("=")[0]
        groups = zip(("model", "data", "trainer", "trainer"), classes, strict=True)
        options = [f"{group}.{key}" for group, cls in groups for key in inspect.signature(cls).parameters]
        hint = nearest(given, options)
    return f"{' '.join(lines[:3])}.{hint} See: zoo {verb} {name} --help"


# ---- predict -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(
    name: str,
    checkpoint: str,
    source: str,
    target: str,
    device: str,
    data_options: dict[str, Any],
    model_options: dict[str, Any],
    compare: bool = False,
    overwrite: bool = False,
) -> list[Path]:
    """Read a user's files, run the method, write the results; the paths written are returned.

    What an earlier run finished is left alone, see `ZooDataModule.aim`.
    """
    from tqdm import tqdm

    quiet()
    model = catalogue.load_class(name).from_pretrained(checkpoint, **model_options)
    data = data_for(name, model, data_options).from_files(source)
    before = data.aim(Path(target), compare, overwrite)
    left = len(data.dataset("predict"))
    if before:
        log.info("%d of %d %ss are done already; --overwrite does them again.", before, before + left, data.unit)
    model.to(pick_device(device))
    # A disabled bar (no terminal) counts nothing, so the count is kept here.
    form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
    bar = tqdm(total=left, desc=name, unit=f" {data.unit}s", bar_format=form, disable=None)
    done, start = 0, time.monotonic()

    def results() -> Iterator[dict[str, Any]]:
        nonlocal done
        for index, batch in enumerate(data.predict_dataloader()):
            batch = model.on_before_batch_transfer(batch, 0)
            found = model.predict_step(model.transfer_batch_to_device(batch, model.device, 0), index)
            yield found  # and written, when the next one is asked for
            names = found["name"] if isinstance(found, dict) and "name" in found else [""]
            more = min(len(names), left - done)  # one whole graph has many names
            done += more
            bar.update(more)

    with bar:
        written = data.write(results(), Path(target))
    if left:
        seconds = max(time.monotonic() - start, 1e-9)
        broken = f"; {len(data.skipped)} could not be read" if data.skipped else ""
        log.info("%d %ss in %.1f s, %.3g a second%s.", done, data.unit, seconds, done / seconds, broken)
    return written


def demo(
    name: str,
    checkpoint: str | None,
    variant: str | None,
    host: str,
    port: int | None,
    browser: bool,
    device: str,
    data_options: dict[str, Any],
    model_options: dict[str, Any],
) -> None:
    """Serve a page on this machine that shows what the method makes of a picture, until it is stopped."""
    quiet()
    cls, facts = catalogue.load_class(name), catalogue.facts(name)
    if not hasattr(catalogue.load_datamodule(name), "demo"):
        raise ZooError(
            f"zoo demo shows methods that turn pictures into pictures; {name} is for {facts['task']}. "
            f"Its results come from zoo predict {name}."
        )
    if (checkpoint is None) == (variant is None):
        raise ZooError(
            f"zoo demo {name} needs --ckpt_path: a .ckpt file, a folder or a repository. "
            "Or, to see the page with untrained weights that improve nothing, --variant tiny. Not both."
        )
    if checkpoint is None:
        model = cls.from_variant(variant, **model_options).eval()
        about = f"Untrained weights of the variant {variant}: the page works, the pictures do not get better."
    else:
        model, about = cls.from_pretrained(checkpoint, **model_options), f"Checkpoint: {checkpoint}"
    data = data_for(name, model, data_options)
    page = data.demo(model.to(pick_device(device)), name, f"{facts['summary']} {about}")
    page.launch(host, port, browser)


def data_for(name: str, model: Any, options: dict[str, Any]) -> Any:
    """A DataModule that reads a user's files as the data did that the checkpoint was fitted to."""
    remembered = dict(model.data_memory)
    data_cls = catalogue.load_datamodule(remembered.pop("class", name))
    try:
        return data_cls.recall(remembered, **options)
    except TypeError as error:
        raise ZooError(f"{data_cls.__name__}: {error}") from error


def pick_device(device: str) -> str:
    """``auto`` as the fastest device that is there."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


# ---- convert, publish, export ------------------------------------------------------------------------------------


def convert(name: str, checkpoint: Path, out: Path) -> Path:
    """An authors' checkpoint, a file or for a class with ``read_authors`` a folder, as a folder in the Hub's form."""
    cls: Any = catalogue.load_class(name)
    if checkpoint.is_dir() and not hasattr(cls, "read_authors"):
        raise ZooError(f"{checkpoint} is a folder; of {name} one file of the authors' is converted.")
    content = cls.read_authors(checkpoint) if checkpoint.is_dir() else load_tensors(checkpoint)
    values, state = cls.convert_state_dict(content)
    model = cls(**values)
    model.load_state_dict(state)
    facts = catalogue.facts(name)
    return model.save_pretrained(
        out,
        dataset="the authors' (see their repository)",
        recipe=f"zoo convert {name} {checkpoint.name} {out.name}",
        limits=f"Converted from the authors' weights; their licence ({facts.get('code_licence', 'none')}) applies.",
    )


def publish(folder: Path, repo_id: str, private: bool = False) -> str:
    """Check a checkpoint's folder (loads, runs, complete card), upload it in one commit, return the revision."""
    from huggingface_hub import HfApi, ModelCard

    from zoo.core.card import SECTIONS

    config = hub.read_config(folder)
    model = hub.load(folder)
    card_path = folder / hub.CARD
    text = card_path.read_text(encoding="utf-8") if card_path.is_file() else ""
    missing = [s for s in SECTIONS if f"## {s}" not in text]
    if missing:
        raise ZooError(
            f"{card_path} is no complete model card: section '{missing[0]}' is missing. Save the model anew."
        )
    data: Any = ModelCard(text).data
    if not data.library_name or not data.license:
        raise ZooError(f"{card_path} names no library or no licence in its header. Save the model anew.")
    _runs(config["class"], model)
    try:
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.png", hub.CARD],
            ignore_patterns=[".*"],  # what a killed save left behind
            commit_message=f"{config['class']}: {data.model_name or folder.name}",
        )
    except Exception as error:  # the client lets its HTTP library's own errors through
        text = first_line(error)
        raise ZooError(f"Uploading to {repo_id} failed: {text}") from error
    return f"{repo_id}@{done.oid}"


def _runs(name: str, model: Any) -> None:
    """One prediction on the embedded set: a checkpoint that cannot do it is not published."""
    data: Any = catalogue.load_datamodule(name)()
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    try:
        with torch.inference_mode():
            model.predict_step(batch, 0)
    except Exception as error:
        fits = {k: v for k, v in data.describe().items() if model.hyperparameters.get(k, v) != v}
        if fits:  # made for other data than the embedded set: loading was all that can be checked here
            return
        raise ZooError(f"The checkpoint loads, but does not run: {error}") from error


def export(name: str, checkpoint: str, out: Path, form: str) -> Path:
    """`forward` as an ONNX file or a torch.export program, with the size of batches left open."""
    facts = catalogue.facts(name)
    flag = facts["capabilities"].get("onnx" if form == "onnx" else "export", True)
    if flag is not True:
        raise ZooError(f"{name} cannot be exported to {form}: {flag}")
    model = catalogue.load_class(name).from_pretrained(checkpoint)
    inputs = model.example_inputs()
    with atomic_write(out) as part:
        if form == "onnx":
            try:
                import onnxscript  # noqa: F401
            except ImportError as error:
                raise ZooError("ONNX export needs the extra: pip install 'paper-zoo[export]'") from error
            torch.onnx.export(model, inputs, str(part), dynamo=True, external_data=False, verbose=False)
        else:
            torch.export.save(torch.export.export(model, inputs), str(part))
    return out
