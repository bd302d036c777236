"""`ZooModule`: what every method shares, and nothing of any method."""

import inspect
import json
import logging
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import lightning
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from zoo.core.checks import check_batch
from zoo.core.errors import ZooError, nearest

log = logging.getLogger(__name__)


class ZooModule(lightning.LightningModule, PyTorchModelHubMixin, library_name="paper-zoo"):
    """A method of the zoo: a LightningModule that goes to the Hub and comes back bit for bit.

    A subclass writes ``__init__`` (JSON arguments only, the paper's values as defaults, ends with
    ``save_hyperparameters``), ``forward`` and the ``*_step`` methods; the rest is here.

    Class attributes:
        variants: overrides of the defaults by name; ``paper`` (the defaults themselves) is always there.
        monitor, mode: the logged metric that the best checkpoint is chosen by, and ``"min"`` or ``"max"``.
        head: name prefixes of the parameters that depend on the user's task; ``from_pretrained(repo, num_classes=7)``
            re-initialises exactly these.
        backbone_prefix: name prefix of a wrapped pretrained backbone. Where the hyperparameter ``backbone`` is a Hub
            id, its weights are left out of checkpoints and come from the Hub again.
        untrusted: hyperparameters that a checkpoint cannot set, because they say whom to talk to: loading takes the
            default, or what the caller gives.
        nan_keys: batch keys that may hold NaN (missing values that the method itself deals with).
        adds_up: a method without a parameter to train adds up what it fits over processes by itself, see
            `zoo.core.trainer.GradientsOrSums`.
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {}
    monitor: ClassVar[str] = "val/loss"
    mode: ClassVar[str] = "min"
    head: ClassVar[tuple[str, ...]] = ()
    backbone_prefix: ClassVar[str] = "backbone."
    nan_keys: ClassVar[tuple[str, ...]] = ()
    untrusted: ClassVar[tuple[str, ...]] = ()
    adds_up: ClassVar[bool] = False

    # ---- construction -------------------------------------------------------------------------------------------

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # The mixin would silently drop what is not JSON and rebuild the default in its place.
        arguments = cls._bind(*args, **kwargs)
        instance = super().__new__(cls, *args, **kwargs)
        object.__setattr__(instance, "hyperparameters", arguments)
        object.__setattr__(instance, "_frozen", set())
        object.__setattr__(instance, "data_memory", {})
        return instance

    hyperparameters: dict[str, Any]
    """All arguments of ``__init__`` as plain JSON, defaults included: what config.json holds."""
    data_memory: dict[str, Any]
    """What the DataModule that it was last fitted to remembers, see `remember`; ``{}`` where there was none."""
    _frozen: set[str]

    @classmethod
    def _bind(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arguments of ``__init__`` as JSON, checked against its signature and annotations."""
        signature = inspect.signature(cls)
        unknown = [name for name in kwargs if name not in signature.parameters]
        if unknown:
            hint = nearest(unknown[0], list(signature.parameters))
            raise TypeError(f"{cls.__name__} has no hyperparameter {unknown[0]!r}.{hint}")
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        hints = typing.get_type_hints(cls.__init__)
        return {name: _json(cls, name, value, hints.get(name, Any)) for name, value in bound.arguments.items()}

    @classmethod
    def from_variant(cls, name: str, **overrides: Any) -> Self:
        """Build a variant, with overrides: ``Regformer.from_variant("tiny", lr=1e-3)``.

        Raises:
            KeyError: for an unknown variant, naming those that exist.
        """
        return cls(**{**cls.variant(name), **overrides})

    @classmethod
    def variant(cls, name: str) -> dict[str, Any]:
        """The overrides of a variant; ``{}`` for ``"paper"``."""
        known = {"paper": {}, **cls.variants}
        if name not in known:
            raise KeyError(f"{cls.__name__} has no variant {name!r}; it has {', '.join(sorted(known))}.")
        return dict(known[name])

    # ---- the Hub ------------------------------------------------------------------------------------------------

    def saved_state_dict(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint holds: all, less a backbone that comes from the Hub by its id."""
        state = self.state_dict()
        if isinstance(self.hyperparameters.get("backbone"), str):
            state = {key: value for key, value in state.items() if not key.startswith(self.backbone_prefix)}
        return state

    def save_pretrained(self, save_directory: str | Path, **card: Any) -> Path:  # type: ignore[override]
        """Write ``config.json``, ``model.safetensors`` and the model card ``README.md``, all or nothing.

        Args:
            save_directory: folder; made where it is missing.
            card: what the model card adds to the catalogue's facts: ``metrics`` (name -> value), ``dataset`` (str, what
                they were measured on), ``datasets`` (ids of the training sets on the Hub), ``trained_on`` (str),
                ``recipe`` (str, the command that trained it), ``limits`` (str), ``repo_id`` (str).
        Raises:
            ZooError: if the folder cannot be written or the disk is full; what stood there before still stands.
        """
        from zoo.core import hub

        card.pop("config", None)  # `push_to_hub` of the mixin passes both
        card.update(card.pop("model_card_kwargs", None) or {})
        return hub.save(self, Path(save_directory), card)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> Self:
        """Load a checkpoint from a folder, the file of a run or the Hub, strictly, in eval mode.

        Args:
            pretrained_model_name_or_path: folder, ``.ckpt`` file, ``ORG/NAME`` or ``ORG/NAME@REVISION``.
            revision: commit, tag or branch; beats the one after ``@``.
            overrides: hyperparameters to change. Where they change the shape of parameters, these must be the
                method's ``head``, which is then initialised anew; any other difference is refused.
        Raises:
            ZooError: if the checkpoint is missing, damaged, of another method, size or newer format, or a pickle.
        Example:
            >>> from zoo.vision import Regformer
            >>> model = Regformer.from_variant("tiny")
            >>> _ = model.save_pretrained("checkpoint")
            >>> model = Regformer.from_pretrained("checkpoint", lr=1e-4)
        """
        from zoo.core import hub

        file = hub.run_file(pretrained_model_name_or_path, revision)
        if file is not None:
            return hub.read_run(cls, file, overrides)
        folder = hub.snapshot(
            pretrained_model_name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        return hub.read(cls, folder, overrides)

    def generate_model_card(self, *args: Any, **card: Any) -> Any:
        """The model card of this checkpoint, a `huggingface_hub.ModelCard`."""
        from zoo.core.card import model_card

        return model_card(type(self).__name__, self, **card)

    @classmethod
    def convert_state_dict(cls, content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Turn the content of an authors' checkpoint into (hyperparameters read off its shapes, our state dict)."""
        raise ZooError(f"{cls.__name__} knows no authors' checkpoint to convert.")

    # ---- Lightning's checkpoints --------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = self.saved_state_dict()
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in kept}
        checkpoint["zoo"] = {
            "class": type(self).__name__,
            "hyperparameters": self.hyperparameters,
            "data": self.data_memory,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        name = checkpoint.get("zoo", {}).get("class", type(self).__name__)
        if name != type(self).__name__:
            raise ZooError(f"The checkpoint holds {name}, not {type(self).__name__}.")
        self.data_memory = checkpoint.get("zoo", {}).get("data", {})

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Strict as in torch, less the keys of a backbone that is not part of checkpoints.

        Raises:
            ZooError: naming missing, unexpected and misshapen keys.
        """
        own = self.state_dict()
        absent = own.keys() - self.saved_state_dict().keys()
        if strict:
            refuse_difference(type(self).__name__, own, state_dict, absent)
        return super().load_state_dict(state_dict, strict=strict and not absent, assign=assign)

    # ---- training -----------------------------------------------------------------------------------------------

    def freeze(self, *names: str) -> Self:  # type: ignore[override]
        """Stop training the named submodules (dotted paths), or all: no gradients, and eval mode during ``fit``."""
        for name in names or ("",):
            self.get_submodule(name).requires_grad_(False).eval()
            self._frozen.add(name)
        return self

    def unfreeze(self, *names: str) -> Self:  # type: ignore[override]
        """Undo `freeze` for the named submodules, or for all."""
        for name in names or tuple(self._frozen):
            self.get_submodule(name).requires_grad_(True).train()
            self._frozen.discard(name)
        return self

    def train(self, mode: bool = True) -> Self:
        """Train mode, except for what `freeze` named: a frozen batch norm must not move."""
        super().train(mode)
        for name in self._frozen if mode else ():
            self.get_submodule(name).eval()
        return self

    def on_fit_start(self) -> None:
        # `from_pretrained` hands out eval mode, and Lightning would keep it: no dropout, frozen batch norm.
        self.train()
        data = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "remember"):
            self.remember(data)

    def remember(self, data: Any) -> Self:
        """Let checkpoints carry what ``data``, a `ZooDataModule`, needs to read a user's files as it reads its own.

        ``fit`` does it by itself; a plain PyTorch loop calls it before saving. Returns self.
        """
        self.data_memory = {"class": type(data).__name__, **data.remember()}
        return self

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        check_batch(batch, self.nan_keys)  # here the batch is still on the CPU: no device waits for the answer
        return batch

    def parameter_groups(self) -> Iterable[Any]:
        """Trainable parameters; the backbone in a group of its own where ``backbone_lr`` is a hyperparameter."""
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        rate = self.hyperparameters.get("backbone_lr")
        if rate is None:
            return [p for _, p in named]
        split: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, p in named:
            split[name.startswith(self.backbone_prefix)].append(p)
        return [{"params": split[False]}, {"params": split[True], "lr": rate}]

    def configure_optimizers(self) -> Any:
        """AdamW at ``lr``; a method whose paper says otherwise overrides it."""
        hp = self.hyperparameters
        if not any(p.requires_grad for p in self.parameters()):
            return None  # a method without gradient training
        return torch.optim.AdamW(
            self.parameter_groups(), lr=hp.get("lr", 1e-3), weight_decay=hp.get("weight_decay", 0.0)
        )

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Small valid arguments of `forward`, on the module's device: what export and benchmarks trace with."""
        raise ZooError(f"{type(self).__name__} cannot be exported: it has no example inputs.")

    # ---- prediction ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """`forward` in eval mode without gradients, on the module's device; train mode is restored."""
        training = {name for name, m in self.named_modules() if m.training}
        self.eval()
        try:
            return self(*(a.to(self.device) if isinstance(a, Tensor) else a for a in args), **kwargs)
        finally:
            for name in training:
                self.get_submodule(name).training = True


def refuse_difference(
    name: str,
    own: Mapping[str, Any],
    given: Mapping[str, Any],
    optional: Iterable[str] = (),
    head: tuple[str, ...] = (),
) -> list[str]:
    """Compare two state dicts by key and shape; return the keys under ``head`` that differ.

    Raises:
        ZooError: if anything else differs, naming the first few keys of each kind.
    """
    optional = set(optional)
    missing = [key for key in own if key not in given and key not in optional]
    extra = [key for key in given if key not in own]
    shapes = [key for key in own if key in given and tuple(own[key].shape) != tuple(given[key].shape)]
    allowed = [key for key in (*missing, *extra, *shapes) if head and key.startswith(head)]
    faults = []
    for kind, keys in (("missing", missing), ("unexpected", extra)):
        keys = [key for key in keys if key not in allowed]
        if keys:
            faults.append(f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})")
    shapes = [key for key in shapes if key not in allowed]
    if shapes:
        key = shapes[0]
        faults.append(
            f"{len(shapes)} of another shape ({key}: {tuple(given[key].shape)} given, {tuple(own[key].shape)} expected)"
        )
    if faults:
        raise ZooError(
            f"{name}: the weights do not fit this model: {'; '.join(faults)}. Was it saved with other sizes?"
        )
    return allowed


def unwrap(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of an authors' checkpoint, out of the usual wrappers.

    Takes off ``params_ema``, ``params``, ``state_dict``, ``model_state_dict``, ``model`` and ``ema`` dictionaries (an
    average of the weights first) and the prefixes ``module.`` and ``_orig_mod.``.

    Raises:
        ZooError: if no tensors are found.
    """
    for key in ("params_ema", "ema_state_dict", "ema", "params", "state_dict", "model_state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            return unwrap(content[key])
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ZooError(f"No tensors found in the checkpoint; its keys are {', '.join(map(str, list(content)[:5]))}.")
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in tensors):
            return unwrap({key.removeprefix(prefix): value for key, value in tensors.items()})
    return tensors


def _json(cls: type, name: str, value: Any, annotation: Any) -> Any:
    """``value`` as JSON gives it back (tuples as lists), after a check of its type.

    Raises:
        TypeError: if it is not JSON or does not fit the annotation.
    """
    from huggingface_hub.dataclasses import type_validator

    where = f"{cls.__name__}({name}={value!r})"
    try:
        plain = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{where[:200]}: hyperparameters are plain JSON (numbers, strings, booleans, None, lists, dicts), "
            f"not {type(value).__name__}. Pass a name or a number; a live model goes through `from_backbone`."
        ) from error
    for candidate in (plain, _as_float(plain)):
        try:
            type_validator(name, candidate, _listed(annotation))
            return plain
        except TypeError:
            continue
    raise TypeError(f"{where[:200]}: expected {getattr(annotation, '__name__', annotation)}.")


def _listed(annotation: Any) -> Any:
    """The annotation with lists for tuples, which is what JSON gives back."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is tuple:
        return list
    if origin is tuple:
        inner = [_listed(arg) for arg in args if arg not in (Ellipsis, ())]
        return list[typing.Union[tuple(inner)]] if inner else list  # type: ignore[misc]  # noqa: UP007
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(_listed(arg) for arg in args)]  # noqa: UP007
    return origin[tuple(_listed(arg) for arg in args)] if origin in (list, dict) else annotation


def _as_float(value: Any) -> Any:
    """Integers as floats, also inside lists: 1 is a fine learning rate."""
    if isinstance(value, list):
        return [_as_float(v) for v in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
