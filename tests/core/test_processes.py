"""Several processes: methods with gradients are wrapped, methods without add up by themselves or are refused."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from tests.core.dummies import Fitted, Line
from zoo.core import Trainer, ZooError
from zoo.core.trainer import GradientsOrSums

QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}


@pytest.mark.parametrize("strategy", ["auto", "ddp", "ddp_find_unused_parameters_true", DDPStrategy()])
def test_every_name_of_it_is_ours(strategy: Any, tmp_path: Path) -> None:
    found = Trainer(tmp_path, devices=2, strategy=strategy, **QUIET).strategy
    assert isinstance(found, GradientsOrSums)
    assert found._ddp_kwargs == ({"find_unused_parameters": True} if str(strategy).endswith("true") else {})


def test_other_strategies_stay(tmp_path: Path) -> None:
    class Own(DDPStrategy):
        pass

    assert type(Trainer(tmp_path, devices=2, strategy=Own(), **QUIET).strategy) is Own
    assert not isinstance(Trainer(tmp_path, devices=1, **QUIET).strategy, DDPStrategy)
    assert type(lightning.Trainer(devices=2, strategy="ddp", **QUIET).strategy) is DDPStrategy


def test_a_method_that_does_not_add_up_is_refused(tmp_path: Path) -> None:
    strategy: Any = Trainer(tmp_path, devices=2, strategy="ddp", **QUIET).strategy
    strategy.model = Fitted()
    with pytest.raises(ZooError, match=r"Fitted is fitted without gradients, by one process .* 2\. Set devices=1"):
        strategy.configure_ddp()


SCRIPT = """
import sys
import torch
from tests.core.dummies import Fitted, Line, LineDataModule
from zoo.core import Trainer

class Summed(Fitted):
    adds_up = True

    def on_train_epoch_end(self):
        self.count.copy_(self.trainer.strategy.reduce(self.count, reduce_op="sum"))

cls = {"Summed": Summed, "Line": Line}[sys.argv[1]]
torch.manual_seed(len(sys.argv))
model = cls()
trainer = Trainer(sys.argv[2], devices=2, strategy="ddp", max_epochs=1, accelerator="cpu", logger=False,
                  enable_checkpointing=False, enable_progress_bar=False, limit_val_batches=0, num_sanity_val_steps=0)
trainer.fit(model, datamodule=LineDataModule())
torch.save(dict(model.state_dict()), f"{sys.argv[2]}/{trainer.global_rank}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Summed", "Line"])
def test_two_processes_end_alike(name: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    command = [sys.executable, str(script), name, str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    if name == "Summed":
        assert first["count"] == second["count"] == 22, "each sample of both shares once"
    else:
        kept = dict(Line().named_parameters())
        assert all(torch.equal(first[key], second[key]) for key in kept)
