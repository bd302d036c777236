"""The classifiers that methods are tried with: torchvision's numbers with torchvision's weights, stages, mistakes."""

from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from zoo.core import ZooError
from zoo.nn.classifiers import classifier, features, has_batch_norm, norm_layer


@pytest.mark.parametrize(("depth", "parameters"), [(18, 11_173_962), (34, 21_282_122), (50, 23_520_842)])
def test_resnets_are_torchvisions_for_small_pictures(depth: int, parameters: int) -> None:
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f"resnet{depth}")(num_classes=10)
    theirs.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    theirs.maxpool = nn.Identity()
    ours = classifier(f"resnet{depth}", num_classes=10)
    assert sum(p.numel() for p in ours.parameters()) == parameters
    names = {"conv1": "stem.0", "bn1": "stem.1", "fc": "head"}
    state = {}
    for key, value in theirs.state_dict().items():
        first, _, rest = key.partition(".")
        if first in names:
            state[f"{names[first]}.{rest}"] = value
        else:
            state[key.replace(".bn", ".norm").replace("downsample", "shortcut")] = value
    ours.load_state_dict(state)
    x = torch.randn(2, 3, 16, 16)
    for net in (ours, theirs):
        net.eval()
    assert torch.allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_every_net_ends_in_its_head() -> None:
    x = torch.rand(2, 1, 8, 8)
    given: list[Any] = ["mlp", "cnn", "resnet10", {"name": "cnn", "widths": [4], "features": 7, "kernel": 5}]
    for net in given:
        model = classifier(net, num_classes=3, in_channels=1, image_size=8, norm="group")
        assert model(x).shape == (2, 3) and isinstance(model.head, nn.Linear)
        assert torch.equal(model.head(features(model, x)), model(x))
    vectors = classifier({"name": "mlp", "hidden": [5, 4]}, num_classes=2, in_channels=7, image_size=1)
    assert vectors(torch.rand(4, 7, 1, 1)).shape == (4, 2)
    assert len(classifier({"name": "mlp", "hidden": []}, num_classes=2, in_channels=3, image_size=2)) == 2


def test_normalisation() -> None:
    assert has_batch_norm(classifier("resnet10", norm="batch"))
    assert not has_batch_norm(classifier("resnet10", norm="group")) and not has_batch_norm(
        classifier("cnn", norm="none")
    )
    assert [norm_layer("group")(c).num_groups for c in (64, 48, 12, 7)] == [32, 16, 4, 1]


@pytest.mark.parametrize(
    ("net", "error"),
    [
        ("resnet19", "No net 'resnet19'. Did you mean 'resnet1"),
        ({"widths": [3]}, "No net ''"),
        ({"name": "mlp", "hiden": [3]}, "no argument 'hiden'. Did you mean 'hidden'"),
        ({"name": "cnn", "norm": "layer"}, "No normalisation 'layer'"),
    ],
)
def test_mistakes(net: Any, error: str) -> None:
    with pytest.raises(ZooError) as caught:
        classifier(net)
    assert error in str(caught.value)
