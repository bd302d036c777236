"""What makes the restoration networks fast changes nothing: each change beside the plain form that it replaced.

`python -m benchmarks speed` measures what each gains.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from benchmarks.authors import blind_diff, fd4mm, regformer
from zoo.vision import FD4MM, BlindDiff, Regformer


def derain() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    rainy = torch.rand(1, 3, 40, 56, dtype=torch.float64)
    return Regformer.from_variant("tiny"), lambda net: net(rainy)


def denoise() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    low, x = torch.rand(1, 3, 8, 16, dtype=torch.float64), torch.randn(1, 3, 32, 64, dtype=torch.float64)
    return BlindDiff.from_variant("tiny"), lambda net: net(low, x, torch.tensor([3]))[0]


def magnify() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    frames = torch.rand(2, 1, 3, 40, 56, dtype=torch.float64)
    return FD4MM.from_variant("tiny"), lambda net: net(*frames, torch.tensor([5.0], dtype=torch.float64))


CASES = [
    (make, name, change)
    for make, changes in (
        (derain, regformer.CHANGES),
        (denoise, blind_diff.CHANGES),
        (magnify, fd4mm.CHANGES | fd4mm.IN_TRAINING),
    )
    for name, change in changes.items()
]


@pytest.mark.parametrize(("make", "name", "change"), CASES, ids=[f"{case[0].__name__}-{case[1]}" for case in CASES])
def test_a_change_keeps_output_and_gradients(make, name, change):
    torch.manual_seed(0)
    net, call = make()
    net.double()
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn_like(p))

    def run() -> list[Tensor]:
        net.zero_grad()
        out = call(net)
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]

    ours = run()
    owner, attribute, form = change
    used = mock.Mock(side_effect=form)
    # through a function, as a method is bound to its object and a Mock is not
    with mock.patch.object(owner, attribute, lambda *a, **k: used(*a, **k)):
        plain = run()
    assert used.called
    assert len(plain) == len(ours)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
