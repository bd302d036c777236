"""What the authors of O3 leave on disk: an unlearning adapter, and for each request the files of its detector.

Their ScienceQA code writes for a request NAME

    NAME_roberta_ocsvm/            the encoder's adapter, of peft
    NAME_mean_list_ocsvm.pt, NAME_precision_list_ocsvm.pt, NAME_fea_list_ocsvm.pt      lists of tensors, one a layer
    NAME_ocsvm.pkl, NAME_gmm_w_ocsvm.pkl                                               objects of scikit-learn

and their TOFU code the same without "_ocsvm", but for the SVM's. The unlearning adapter is another folder of peft; here
its files, or that folder, lie beside these. Of a pickle only the numbers are taken, and none of its code runs: see
`numbers`.
"""

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from zoo.core import ZooError
from zoo.core.errors import first_line
from zoo.data.plain import PlainUnpickler, load_npz

MEANS = re.compile(r"(.+)_mean_list(_ocsvm)?\.pt")
EXPORTS = {
    "normal": "normal=model.dual_coef_ @ model.support_vectors_",
    "mixture": "mixture=[*model.means_.flatten(), model.covariances_.flatten()[1] ** 0.5]",
}
"""What a user who trusts a pickle writes into an .npz instead, by what it holds."""


def read_folder(folder: Path) -> dict[str, Any]:
    """The unlearning adapter and the detectors in a folder.

    Returns "adapter" and "config", tensors and settings of peft; "snap", the thresholds of that branch's evaluation;
    "detectors", by request: "adapter", "config", "mean" (l, d), "precision" (l, d, d), "bank" (l, n, d), "normal"
    (l - 1), "mixture" (3).

    Raises:
        ZooError: naming the file that is missing or not as it should be.
    """
    found = {match[1]: match[2] or "" for path in sorted(folder.iterdir()) if (match := MEANS.fullmatch(path.name))}
    detectors = {name.partition("_ood_")[0]: _detector(folder, name, ending) for name, ending in found.items()}
    if len(detectors) < len(found):
        raise ZooError(f"{folder} holds detectors of two settings for one request: {', '.join(found)}. Keep one each.")
    own = {f"{name}_roberta{ending}" for name, ending in found.items()}
    places = [folder, *(path for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in own)]
    places = [path for path in places if (path / "adapter_config.json").is_file()]
    if len(places) != 1:
        raise ZooError(
            f"{folder} holds {len(places)} unlearning adapters; expected one: adapter_config.json and "
            "adapter_model.safetensors (or .bin) in it, or in one folder in it."
        )
    snap = "none" if not found else "scienceqa" if all(found.values()) else "tofu"
    return {**_peft(places[0]), "detectors": detectors, "snap": snap}


def _detector(folder: Path, name: str, ending: str) -> dict[str, Any]:
    def stacked(what: str) -> Tensor:
        path = folder / f"{name}_{what}_list{ending}.pt"
        parts = _tensors(path)
        try:
            return torch.stack([part.float() for part in parts])
        except (TypeError, AttributeError, RuntimeError) as error:
            raise ZooError(
                f"{path}: expected a list of tensors of one shape, one a layer: {first_line(error)}"
            ) from error

    mean, precision, bank = (stacked(what) for what in ("mean", "precision", "fea"))
    layers, width = mean.shape if mean.ndim == 2 else (0, 0)
    if precision.shape != (layers, width, width) or bank.ndim != 3 or bank.shape[::2] != (layers, width):
        raise ZooError(
            f"{folder / name}_...: means are {tuple(mean.shape)}, precisions {tuple(precision.shape)}, features "
            f"{tuple(bank.shape)}; expected (l, d), (l, d, d), (l, n, d)."
        )
    statistics = {
        "normal": numbers(folder / f"{name}_ocsvm.pkl", "normal", layers - 1),
        "mixture": numbers(folder / f"{name}_gmm_w{ending}.pkl", "mixture", 3),
    }
    own = _peft(folder / f"{name}_roberta{ending}")
    return {**own, **statistics, "mean": mean, "precision": precision, "bank": bank}


def _peft(folder: Path) -> dict[str, Any]:
    """A folder of peft: "adapter", its tensors, and "config", its settings."""
    files = [folder / f"adapter_model.{ending}" for ending in ("safetensors", "bin")]
    weights = next((path for path in files if path.is_file()), None)
    config = folder / "adapter_config.json"
    if weights is None or not config.is_file():
        raise ZooError(f"{folder} is no adapter of peft: expected adapter_config.json and adapter_model.safetensors.")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ZooError(f"{config} is no JSON: {first_line(error)}") from error
    return {"adapter": _tensors(weights), "config": settings}


def _tensors(path: Path) -> Any:
    """What a file of tensors holds, read without running anything in it."""
    from zoo.core.command import load_tensors

    if not path.is_file():
        raise ZooError(f"{path} is missing.")
    return load_tensors(path)


# ---- pickles of scikit-learn -----------------------------------------------------------------------------------------


class Fields:
    """The attributes of an object, without its class."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class FieldsOnly(PlainUnpickler):
    """Arrays and numbers, and the attributes of the two objects of scikit-learn that hold them here."""

    more: ClassVar[dict[tuple[str, str], Any]] = {
        **{(f"sklearn.svm.{module}", "OneClassSVM"): Fields for module in ("_classes", "classes")},
        **{
            (f"sklearn.mixture.{module}", "GaussianMixture"): Fields
            for module in ("_gaussian_mixture", "gaussian_mixture")
        },
    }


def numbers(path: Path, what: str, count: int) -> Tensor:
    """Numbers of a pickle of scikit-learn, or of an .npz of that name, which comes first.

    Args:
        what: "normal": (l - 1), the sum of a linear one-class SVM's support vectors by their coefficients; "mixture":
            (3), two means and the standard deviation that both components share.
        count: how many there must be.
    Raises:
        ZooError: for a pickle that asks for anything else, saying how to export its numbers; for another kernel, or
            other numbers.
    """
    export = path.with_suffix(".npz")
    if export.is_file():
        found: Any = load_npz(export, [what])[what]
        path = export
    elif not path.is_file():
        raise ZooError(f"{path} is missing, and so is {export.name}.")
    else:
        found = (_normal if what == "normal" else _mixture)(path, _fields(path, export.name, what))
    values = np.asarray(found, dtype=np.float64).flatten()
    if len(values) != count or not np.isfinite(values).all():
        raise ZooError(f"{path}: {what} has {len(values)} numbers; expected {count} finite ones.")
    return torch.from_numpy(values)


def _fields(path: Path, export: str, what: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as stream:
            return vars(FieldsOnly(stream).load())
    except Exception as error:
        raise ZooError(
            f"{path} is refused: {first_line(error)}. Only plain numbers of a OneClassSVM or GaussianMixture are read. "
            f"If you trust the file, load it as `model` and write np.savez({export!r}, {EXPORTS[what]}) beside it."
        ) from error


def _normal(path: Path, fields: dict[str, Any]) -> np.ndarray:
    if fields.get("kernel") != "linear" or not {"dual_coef_", "support_vectors_"} <= fields.keys():
        raise ZooError(f"{path}: expected a fitted OneClassSVM with kernel='linear', found {fields.get('kernel')!r}.")
    return fields["dual_coef_"] @ fields["support_vectors_"]


def _mixture(path: Path, fields: dict[str, Any]) -> list[float]:
    means, variances = (np.asarray(fields.get(key, [])).flatten() for key in ("means_", "covariances_"))
    if len(means) != 2 or len(variances) != 2 or variances[0] != variances[1]:
        raise ZooError(f"{path}: expected a GaussianMixture of two components of one width, as the authors have it.")
    return [*means, float(variances[0]) ** 0.5]
