#!/usr/bin/env bash
# Build the wheel and try it in an environment without the checkout. Usage: tests/wheel.sh WORKDIR
# The dependencies come from the environment that runs this; the package itself comes from the wheel alone.
set -euo pipefail
work=$1
python -m pip wheel -q --no-deps -w "$work/dist" .
python -m venv "$work/clean"
site=$("$work/clean/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > "$site/dependencies.pth"
"$work/clean/bin/python" -m pip install -q --no-deps "$work"/dist/paper_zoo-*.whl
cd "$work"
"$work/clean/bin/python" - <<'PY'
import importlib.metadata, pathlib, sys
import zoo
place = pathlib.Path(zoo.__file__)
assert "clean" in place.parts, f"imported from {place}, not from the wheel"
from zoo.core import catalogue, results
assert len(catalogue.names()) >= 7, catalogue.names()
assert list(results.FOLDER.glob("*.json")), "no evidence in the wheel"
assert not {"torch", "lightning", "pytest"} & set(sys.modules)
assert (place.parent / "py.typed").is_file() and (place.parent / "vision" / "__init__.pyi").is_file()
assert "torch_geometric" in str(importlib.metadata.requires("paper-zoo"))
for name in catalogue.names():
    catalogue.load_class(name), catalogue.load_datamodule(name)
from zoo.vision import DerainDataModule, Regformer
data = DerainDataModule()
data.setup()
batch = next(iter(data.test_dataloader()))
print(Regformer.from_variant("tiny").predict(batch["rainy"]).shape, "from", place)
PY
"$work/clean/bin/zoo" list
"$work/clean/bin/python" -m pytest -q --pyargs zoo.testing.contract -k AttentionSVM
