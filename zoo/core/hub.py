"""Checkpoints: written whole or not at all, read strictly, from safetensors only."""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from zoo.core.errors import ZooError, first_line
from zoo.core.files import atomic_folder

log = logging.getLogger(__name__)

ORGANISATION = "paper-zoo"
"""The organisation on the Hub that the zoo's own checkpoints live under."""
FORMAT = 1
"""Version of the checkpoint's form, written to config.json; a newer one is refused."""
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"

DRAWS = {"uniform_", "normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_"}
"""Functions of `torch.Tensor` and `torch.nn.init` that fill a tensor at random."""

M = TypeVar("M")


# ---- writing ----------------------------------------------------------------------------------------------------


def save(module: Any, folder: Path, card: dict[str, Any]) -> Path:
    """Write weights, what the method adds (``save_extra``), config and card into ``folder``, all or nothing.

    The config holds the sha256 of the others: a save over an older one that is cut short cannot pass for either.
    """
    if "module" in module._modules:
        raise ZooError(f"{type(module).__name__} has a submodule called 'module', a name that wrappers use. Rename it.")
    config = {
        "format_version": FORMAT,
        "library": "paper-zoo",
        "class": type(module).__name__,
        "hyperparameters": module.hyperparameters,
        **({"data": module.data_memory} if module.data_memory else {}),
    }
    state = {key: value.detach().cpu().contiguous() for key, value in module.saved_state_dict().items()}
    with atomic_folder(folder) as part:
        try:
            save_file(_untied(state), part / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:  # safetensors wraps the operating system's error
            raise OSError(28 if "space" in str(error).lower() else 5, str(error)) from error
        if hasattr(module, "save_extra"):
            module.save_extra(part)
        config["sha256"] = {f.relative_to(part).as_posix(): _sha256(f) for f in sorted(part.rglob("*")) if f.is_file()}
        (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        text = str(module.generate_model_card(**card))
        (part / CARD).write_text(text, encoding="utf-8")
    return folder


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _untied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """safetensors refuses tensors that share memory; tied weights are written twice."""
    seen: set[int] = set()
    result = {}
    for key, value in state.items():
        pointer = value.untyped_storage().data_ptr()
        result[key] = value.clone() if pointer in seen and pointer else value
        seen.add(pointer)
    return result


# ---- finding ----------------------------------------------------------------------------------------------------


def snapshot(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """The folder of a checkpoint: a folder as it is, or a repository's snapshot, fetched and checked.

    Raises:
        ZooError: if there is no such folder or repository, no safetensors in it, or a file differs from its checksum.
    """
    folder = Path(name).expanduser()
    if folder.name in (WEIGHTS, CONFIG) and folder.is_file():
        folder = folder.parent
    if folder.is_dir():
        if revision:
            raise ZooError(f"{name} is a folder here and has no revision {revision!r}. Leave `revision` out.")
        _refuse_mixture(folder, {})
        return folder
    repo, _, pinned = str(name).partition("@")
    revision = revision or pinned or None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or repo.startswith("."):
        raise ZooError(f"{name} is neither a folder nor a repository of the form ORG/NAME[@revision].")
    # transformers and friends would also fetch pickles: only these patterns ever leave the server
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{repo}{'@' + revision if revision else ''}"
    try:
        path = Path(
            snapshot_download(
                repo,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", CARD],
                library_name="paper-zoo",
            )
        )
    except GatedRepoError as error:
        raise ZooError(
            f"{where} asks for its terms to be accepted on the Hub, then for a token (`hf auth login`)."
        ) from error
    except RevisionNotFoundError as error:
        raise ZooError(f"{repo} has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise ZooError(
            f"No repository {repo} on the Hub, or no access to it. `zoo list` shows the zoo's own."
        ) from error
    except LocalEntryNotFoundError as error:
        raise ZooError(
            f"{where} is not in the cache, and the Hub cannot be reached (or offline mode is on)."
        ) from error
    except Exception as error:  # the client lets its HTTP library's own errors through
        text = first_line(error)
        raise ZooError(f"Fetching {where} failed: {text}. Try again: what has come is kept.") from error
    if not (path / WEIGHTS).exists() and not local_files_only:
        others = []
        with contextlib.suppress(Exception):  # offline: `read` says what is missing
            others = [f for f in HfApi(token=token).list_repo_files(repo, revision=revision) if _is_pickle(f)]
        if others:
            raise ZooError(
                f"{where} offers only {', '.join(others[:2])}: a pickle, which could run code. Only safetensors load."
            )
    tree = HfApi(token=token).list_repo_tree
    _refuse_mixture(path, _verify(path, where, lambda: tree(repo, recursive=True, revision=path.name)))
    return path


def _is_pickle(name: str) -> bool:
    return name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"))


def _verify(folder: Path, where: str, tree: Callable[[], Iterable[Any]]) -> dict[Path, str]:
    """Compare each file with the checksum that the Hub gave, and return these: the client itself compares sizes only.

    It is sha256 for large files and git's sha1 for small ones. The cache names the file that a link in ``folder``
    points to after it; where the cache cannot make links, ``tree`` asks the Hub.

    Raises:
        ZooError: naming the first file that differs; it is dropped from the cache, so that the next try fetches it.
    """
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    sums = {file: Path(os.readlink(file)).name for file in files if file.is_symlink()}
    if len(sums) < len(files):
        with contextlib.suppress(Exception):  # offline: these were compared when they came
            for entry in tree():
                if hasattr(entry, "blob_id"):
                    sums.setdefault(folder / entry.path, entry.lfs.sha256 if entry.lfs else entry.blob_id)
    checked = {}
    for file in files:
        expected = sums.get(file, "")
        if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", expected):
            continue
        kind = hashlib.sha256() if len(expected) == 64 else hashlib.sha1(b"blob %d\0" % file.stat().st_size)
        with open(file, "rb") as stream:
            found = hashlib.file_digest(stream, kind.copy).hexdigest()
        if found != expected:
            blobs = [file.resolve(), *([file.parent / os.readlink(file)] if file.is_symlink() else []), file]
            for path in blobs:
                path.unlink(missing_ok=True)
            raise ZooError(
                f"{where}: {file.name} was damaged on its way (checksum differs) and is dropped. Load it again."
            )
        checked[file] = expected
    return checked


def _refuse_mixture(folder: Path, known: dict[Path, str]) -> None:
    """Compare the files with the sha256 that the config has of them; ``known`` are those that were compared before.

    Raises:
        ZooError: naming the first file that was not saved together with the config.
    """
    for name, expected in read_config(folder).get("sha256", {}).items():
        file = folder / name
        if name == WEIGHTS and not file.is_file():
            continue  # `read` says what is there instead
        if known.get(file) != expected and not (file.is_file() and _sha256(file) == expected):
            raise ZooError(
                f"{folder}: {name} is not the file that {CONFIG} was saved with (sha256 differs): saving or copying "
                "was cut short. Save or fetch it again."
            )


# ---- reading ----------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """The checked content of config.json.

    Raises:
        ZooError: if it is missing, not JSON, of a newer format, or names no method.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ZooError(f"{folder} has no {CONFIG}: it is no checkpoint of the zoo.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        version, name, values = config["format_version"], config["class"], config["hyperparameters"]
        sums, data = config.get("sha256", {}), config.get("data", {})
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ZooError(f"{path} is not a config of the zoo ({type(error).__name__}: {error}).") from error
    if type(version) is not int or version < 1 or not isinstance(name, str) or not isinstance(values, dict):
        raise ZooError(
            f"{path} is not a config of the zoo: format_version, class or hyperparameters are of a wrong type."
        )
    if version > FORMAT:
        raise ZooError(
            f"{path} has format_version {version}, this zoo reads up to {FORMAT}. Update: pip install -U paper-zoo."
        )
    if not isinstance(data, dict) or not isinstance(data.get("class", ""), str):
        raise ZooError(f"{path} is not a config of the zoo: data is of a wrong type.")
    named = isinstance(sums, dict) and all(re.fullmatch(r"(?!.*\.\.)\w[\w./-]*", file) for file in sums)
    if not named or not all(re.fullmatch("[0-9a-f]{64}", str(value)) for value in sums.values()):
        raise ZooError(f"{path} is not a config of the zoo: sha256 holds other things than checksums of files here.")
    return config


def load(name: str | Path, **options: Any) -> Any:
    """Load a checkpoint of any method; it says which. Options as in `ZooModule.from_pretrained`."""
    from zoo.core import catalogue

    keys = ("revision", "token", "cache_dir", "force_download", "local_files_only")
    of_hub = {key: options.pop(key) for key in keys if key in options}
    file = run_file(name, of_hub.get("revision"))
    if file is not None:
        content = _run(file)
        return _of_run(catalogue.load_class(content["zoo"]["class"]), file, content, options)
    folder = snapshot(name, **of_hub)
    return read(catalogue.load_class(read_config(folder)["class"]), folder, options)


def run_file(name: str | Path, revision: str | None = None) -> Path | None:
    """The file of a run that a name stands for; None where it stands for a folder, a file in one, or a repository.

    Raises:
        ZooError: if there is no such file, or a ``revision`` of one is asked for.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        if path.suffix in (".ckpt", ".safetensors"):
            raise ZooError(f"Checkpoint {name} does not exist.")
        return None
    if path.name in (WEIGHTS, CONFIG):
        return None
    if revision:
        raise ZooError(f"{name} is a file here and has no revision {revision!r}. Leave `revision` out.")
    return path


def read_run(cls: type[M], path: Path, overrides: dict[str, Any]) -> M:
    """Build ``cls`` from the file that a run of the Trainer left, and load its weights, strictly.

    Raises:
        ZooError: if it holds more than tensors, another method, or weights that do not fit.
    """
    return _of_run(cls, path, _run(path), overrides)


def _of_run(cls: type[M], path: Path, content: dict[str, Any], overrides: dict[str, Any]) -> M:
    if content["zoo"]["class"] != cls.__name__:
        raise ZooError(f"{path} holds {content['zoo']['class']}, not {cls.__name__}.")
    model = _construct(cls, {**trusted(cls, content["zoo"]["hyperparameters"]), **overrides}, path, overrides)
    head = cls.head if overrides else ()  # type: ignore[attr-defined]
    return _filled(model, f"{cls.__name__} from {path}", content["state_dict"], head, content["zoo"].get("data", {}))


def _run(path: Path) -> dict[str, Any]:
    content = load_tensors(path)
    if "zoo" not in content:
        raise ZooError(f"{path} was not written by the zoo. `zoo convert` takes authors' checkpoints.")
    return content


def load_tensors(path: Path) -> dict[str, Any]:
    """A checkpoint file's content, from safetensors, TensorFlow's (its ``.index``) or torch's format without running
    any code in it."""
    if path.suffix == ".index":
        from zoo.core.tensor_bundle import read_bundle

        return read_bundle(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch would advise to load with code
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ZooError(f"{path} cannot be read as tensors only: {_unread(path, error)}.") from error


def _unread(path: Path, error: Exception) -> str:
    """Why a file did not load, without torch's advice to run the code in it."""
    unknown = re.search(r"GLOBAL (\S+)", str(error))
    if unknown:
        return f"it asks for {unknown[1]}, which could run code"
    if path.suffix == ".safetensors" or isinstance(error, OSError):
        return first_line(error)[:200].rstrip(".")
    with open(path, "rb") as file:
        torch_wrote = file.read(4).startswith((b"PK\3\4", b"\x80"))
    return "it is damaged" if torch_wrote else "it is neither in torch's format nor in safetensors'"


def read(cls: type[M], folder: Path, overrides: dict[str, Any]) -> M:
    """Build ``cls`` from a checkpoint's folder and load its weights, strictly.

    The model is first built without memory and held against the shapes in the file, so that a hostile config costs
    nothing.

    Raises:
        ZooError: if the config does not fit the class, or the weights do not fit the config.
    """
    from zoo.core.module import refuse_difference

    config = read_config(folder)
    if config["class"] != cls.__name__:
        raise ZooError(
            f"{folder} holds {config['class']}, not {cls.__name__}. Load it with {config['class']}.from_pretrained."
        )
    weights = folder / WEIGHTS
    if not weights.is_file():
        found = [p.name for p in folder.iterdir() if _is_pickle(p.name)]
        raise ZooError(
            f"{folder} has no {WEIGHTS}"
            + (f", only {found[0]}: a pickle, which could run code. Only safetensors load." if found else ".")
        )
    try:
        with safe_open(weights, "pt") as file:
            shapes = {key: _Shape(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ZooError(f"{weights} is not a readable safetensors file: {error}.") from error
    head = cls.head if overrides else ()  # type: ignore[attr-defined]
    values = {**trusted(cls, config["hyperparameters"]), **overrides}
    relocate = getattr(cls, "load_extra", None)
    if relocate is not None:
        values = relocate(folder, values)
    name = f"{cls.__name__} from {folder}"
    if isinstance(values.get("backbone"), str):
        # how large the backbone is, only its own repository knows: what is beside it must fit this machine
        with _at_most(50_000, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
            model = _construct(cls, values, folder / CONFIG, overrides)
    else:
        with _at_most(4 * len(shapes) + 64), torch.device("meta"), _Undrawn():
            plan = _construct(cls, values, folder / CONFIG, overrides)
        kept = plan.state_dict()
        fresh = refuse_difference(name, kept, shapes, head=head)
        tables = sum(b.nbytes for key, b in plan.named_buffers() if key not in kept)
        if tables > 2**30 + 64 * weights.stat().st_size:
            raise ZooError(f"{folder / CONFIG} asks for {tables / 2**30:.0f} GiB beside the weights. Is it damaged?")
        with contextlib.nullcontext() if fresh else _Undrawn():
            model = _construct(cls, values, folder / CONFIG, overrides)
    return _filled(model, name, load_file(weights), head, config.get("data", {}))


def _filled(model: Any, name: str, state: dict[str, torch.Tensor], head: tuple[str, ...], data: dict[str, Any]) -> Any:
    """Load ``state`` strictly, less a ``head`` that other hyperparameters have changed, and turn to eval mode.

    Raises:
        ZooError: naming missing, unexpected and misshapen keys.
    """
    from zoo.core.module import refuse_difference

    own = model.state_dict()
    absent = own.keys() - model.saved_state_dict().keys()
    if refuse_difference(name, own, state, absent, head):
        # the whole head, also what would fit: half an old classifier is none
        state = {key: value for key, value in state.items() if not key.startswith(head)}
        new = ", ".join(key for key in own if key.startswith(head))
        log.info("%s: initialised anew for your task: %s.", type(model).__name__, new)
    nn.Module.load_state_dict(model, {**own, **state}, strict=True)
    model.data_memory = data
    return model.eval()


def trusted(cls: Any, hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """Those of a checkpoint's hyperparameters that it may set, see ``untrusted`` of `ZooModule`."""
    return {key: value for key, value in hyperparameters.items() if key not in cls.untrusted}


class _Undrawn(TorchFunctionMode):
    """Leaves out the random numbers that a construction draws into parameters: those of the file come in their place.

    Holds for one thread only, unlike a replaced `torch.nn.init`.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        if isinstance(target, nn.Parameter) and getattr(func, "__name__", "") in DRAWS:
            return target.detach().zero_()
        return func(*args, **kwargs)


class _Shape:
    """A stand-in for a tensor of which only the shape is known."""

    def __init__(self, shape: list[int]):
        self.shape = tuple(shape)


def _construct(cls: Any, values: dict[str, Any], source: Path, overrides: dict[str, Any]) -> Any:
    try:
        return cls(**values)
    except ZooError:
        raise
    except Exception as error:  # whatever a hostile config provokes, the user reads one line
        given = f" with your {', '.join(overrides)}" if overrides else ""
        raise ZooError(f"{source}{given} does not build {cls.__name__}: {first_line(error)}") from error


@contextlib.contextmanager
def _at_most(count: int, size: float = math.inf) -> Iterator[None]:
    """Stop a construction that registers more than the weights could fill (depth = 10**9), or more bytes than ``size``.

    Tensors register before they are initialised: until then the system only promises their memory.
    """
    left: dict[str, float] = {"parameters": count, "buffers": 10 * count, "modules": 10 * count, "bytes": size}

    def counter(kind: str) -> Callable[..., None]:
        def step(_: Any, __: str, value: Any) -> None:
            left[kind] -= 1
            left["bytes"] -= value.nbytes if isinstance(value, torch.Tensor) and not value.is_meta else 0
            if min(left[kind], left["bytes"]) < 0:
                what = kind if left[kind] < 0 else "bytes"
                raise ZooError(f"The config asks for far more {what} than the weights hold. Is it damaged?")

        return step

    registries = torch.nn.modules.module
    handles = [
        registries.register_module_parameter_registration_hook(counter("parameters")),
        registries.register_module_buffer_registration_hook(counter("buffers")),
        registries.register_module_module_registration_hook(counter("modules")),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
