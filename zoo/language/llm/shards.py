"""Models read tensor by tensor, from a folder of safetensors or from memory, and written section by section.

What merges large models reads through these: only what is asked for is in memory.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from zoo.core.errors import ZooError, first_line
from zoo.core.seeding import seed_from
from zoo.language.llm.merging import finite
from zoo.language.llm.pairs import same_tokenizer

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BESIDE = ("*.json", "*.txt", "*.model", "*.jinja")
"""What a model's folder has beside the weights: config, tokenizer, templates."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Held:
    """The parameters of a model in memory.

    Args:
        parameters: by name. name: of the model, for messages.
    """

    def __init__(self, parameters: Mapping[str, Tensor], name: str = "the model"):
        self.parameters, self.name = {n: p.detach() for n, p in parameters.items()}, name

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a parameter; None where there is none of that name."""
        return tuple(self.parameters[name].shape) if name in self.parameters else None

    def read(self, name: str) -> Tensor:
        """A parameter, in the dtype that it has.

        Raises:
            ZooError: if it has NaN or infinite values.
        """
        return finite(self.parameters[name], name, self.name)


class Shards:
    """The parameters of a model saved by transformers, in ``model.safetensors`` or as many files as its index says.

    Args:
        place: folder, or ``ORG/NAME`` or ``ORG/NAME@REVISION`` on the Hub.
        prefix: names may lack it in the files, as those of some base models do.
    Raises:
        ZooError: if there are no safetensors, or one is damaged.
    """

    def __init__(self, place: str | Path, prefix: str = ""):
        self.folder, self.name, self.prefix = found(place), str(place), prefix
        index = self.folder / INDEX
        if index.is_file():
            self.files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif (self.folder / SINGLE).is_file():
            self.files = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        else:
            raise ZooError(f"{place} has no {SINGLE} and no {INDEX}: save the model anew with `save_pretrained`.")

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ZooError(f"{self.folder / file} is missing or damaged: {error}") from error

    def _key(self, name: str) -> str:
        return name if name in self.files else name.removeprefix(self.prefix)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a parameter, without reading it; None where there is none of that name."""
        key = self._key(name)
        return tuple(self._open(self.files[key]).get_slice(key).get_shape()) if key in self.files else None

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a parameter in its file."""
        key = self._key(name)
        return DTYPES[self._open(self.files[key]).get_slice(key).get_dtype()]

    def read(self, name: str) -> Tensor:
        """A parameter, in the dtype of the file.

        Raises:
            ZooError: if it has NaN or infinite values.
        """
        key = self._key(name)
        return finite(self._open(self.files[key]).get_tensor(key), name, self.name)


class Shaken:
    """A model beside another one: its parameters with noise, to try things out without one that was fine-tuned.

    Args:
        base: the other. seed: of the noise, a fifth of each parameter's own spread.
    """

    def __init__(self, base: "Held | Shards", seed: int):
        self.base, self.seed, self.name = base, seed, f"expert {seed}"

    def shape(self, name: str) -> tuple[int, ...] | None:
        """As the other's."""
        return self.base.shape(name)

    def read(self, name: str) -> Tensor:
        """The other's with noise."""
        own = self.base.read(name)
        if own.is_meta:
            return own
        generator = torch.Generator().manual_seed(seed_from("shaken", self.seed, name))
        noise = torch.randn(own.shape, generator=generator).to(own)
        return own + noise * (0.2 * own.float().square().mean().sqrt().clamp(min=0.01)).to(own.dtype)


Source = Held | Shards | Shaken


def found(place: str | Path) -> Path:
    """The folder of a model: one that is here, or the snapshot of a repository on the Hub.

    Raises:
        ZooError: if there is neither.
    """
    folder = Path(place).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repo, _, revision = str(place).partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=["*.safetensors", *BESIDE]))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise ZooError(
            f"{place} is neither a folder here nor a model on the Hub (offline?): {first_line(error)}"
        ) from error


def check_experts(base: Source, experts: Iterable[Source], names: Iterable[str]) -> None:
    """Make sure that experts have the base's parameters and, where both have one, its tokenizer.

    Raises:
        ZooError: naming the first difference.
    """
    names = list(names)
    for expert in experts:
        for name in names:
            ours, theirs = base.shape(name), expert.shape(name)
            if ours is None or ours != theirs:
                raise ZooError(
                    f"{expert.name} does not fit the base: {name} is {theirs or 'missing'}, in the base "
                    f"{ours or 'missing'}. They must have one architecture and one vocabulary."
                )
        if isinstance(base, Shards) and isinstance(expert, Shards):
            same_tokenizer(base.folder, expert.folder)


class Writer:
    """Writes a model as a folder of transformers, one file a section; what is written is no longer in memory.

    Args:
        folder: an empty one. base: folder of the model whose config and tokenizer are copied.
    """

    def __init__(self, folder: Path, base: Path):
        self.folder = folder
        self.files: dict[str, str] = {}
        self.bytes = self.parts = 0
        copy_beside(base, folder)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """One more file.

        Raises:
            OSError: if the disk is full.
        """
        if not tensors:
            return
        self.parts += 1
        file = f"model-{self.parts:05d}.safetensors"
        try:
            save_file({n: t.contiguous() for n, t in tensors.items()}, self.folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # safetensors wraps the operating system's error
            raise OSError(28 if "space" in str(error).lower() else 5, str(error)) from error
        self.files |= dict.fromkeys(tensors, file)
        self.bytes += sum(t.numel() * t.element_size() for t in tensors.values())

    def close(self) -> None:
        """Write the index."""
        content = {"metadata": {"total_size": self.bytes}, "weight_map": self.files}
        (self.folder / INDEX).write_text(json.dumps(content, indent=1), encoding="utf-8")


def copy_beside(base: Path, folder: Path) -> None:
    """Copy config, tokenizer and templates, as far as ``folder`` does not have them."""
    for file in (file for pattern in BESIDE for file in sorted(base.glob(pattern))):
        if not file.name.endswith(".index.json") and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def without_weights(config: Any) -> nn.Module:
    """A causal language model of this config whose parameters are on the meta device, and whose buffers are real."""
    from transformers import AutoModelForCausalLM

    register = nn.Module.register_parameter

    def hollow(module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        if value is not None:
            value = nn.Parameter(value.to("meta"), requires_grad=False)
        register(module, name, value)

    try:
        nn.Module.register_parameter = hollow  # type: ignore[method-assign,assignment]
        return AutoModelForCausalLM.from_config(config).eval()
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
