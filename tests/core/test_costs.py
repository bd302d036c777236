"""`import zoo` and listing load neither torch nor lightning. Seconds are measured by `python -m benchmarks imports`."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "lightning", "numpy", "transformers", "huggingface_hub", "timm", "jsonargparse"}


@pytest.mark.parametrize(
    "code",
    [
        "import zoo, zoo.vision, zoo.graph, zoo.tabular, zoo.language",
        "from zoo.cli import main; main(['list'])",
        "from zoo.cli import main; main(['info', 'Regformer'])",
        "from zoo.cli import main; main(['fit', 'Regfomer'])",
        "from zoo.cli import main; main(['--help'])",
    ],
)
def test_light_verbs_stay_light(code: str) -> None:
    code += f"; import sys; print('LOADED', sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "LOADED []", done.stdout + done.stderr


def test_lightning_talks_only_of_what_a_user_must_act_on() -> None:
    code = "from zoo.core.command import quiet; quiet(); import lightning; lightning.Trainer(logger=False)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout == "", done.stderr
