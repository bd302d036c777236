"""Image classifiers of the sizes that methods are tried with: a perceptron, a small CNN, ResNets for small pictures.

Each is a `torch.nn.Sequential` of named stages that ends in ``head``, a linear layer: ``net[:-1](x)`` are the features
(n, d), and it can be cut in two after any stage.

Index legend: n pictures, c channels, h/w height and width, d features, k classes.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from zoo.core.errors import ZooError, nearest

Norm = Callable[[int], nn.Module]


def norm_layer(kind: str) -> Norm:
    """``"batch"``, ``"group"`` (32 groups, or as many as divide the channels), or ``"none"``.

    Raises:
        ZooError: for another word.
    """
    kinds: dict[str, Norm] = {
        "batch": nn.BatchNorm2d,
        "group": lambda c: nn.GroupNorm(next(g for g in (32, 16, 8, 4, 2, 1) if c % g == 0), c),
        "none": lambda c: nn.Identity(),
    }
    if kind not in kinds:
        raise ZooError(f"No normalisation {kind!r}.{nearest(kind, list(kinds))} There are {', '.join(kinds)}.")
    return kinds[kind]


class BasicBlock(nn.Module):
    """relu(norm(conv3(relu(norm(conv3(x))))) + shortcut(x)): two 3 x 3 convolutions and a way around them.

    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
    """

    expansion = 1

    def __init__(self, inside: int, width: int, stride: int, norm: Norm):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = norm(width)
        self.shortcut = _shortcut(inside, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """A 3 x 3 convolution between two of 1 x 1, four times as wide at the end, and a way around them."""

    expansion = 4

    def __init__(self, inside: int, width: int, stride: int, norm: Norm):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm2 = norm(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.norm3 = norm(4 * width)
        self.shortcut = _shortcut(inside, 4 * width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


def _shortcut(inside: int, outside: int, stride: int, norm: Norm) -> nn.Module:
    if stride == 1 and inside == outside:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), norm(outside))


def resnet(
    depth: int = 18, num_classes: int = 10, in_channels: int = 3, width: int = 64, norm: str = "batch", **_: Any
) -> nn.Sequential:
    """A ResNet for pictures of about 32 x 32: a 3 x 3 stem of stride 1 and no pooling before the first stage.

    Stages ``stem``, ``layer1`` to ``layer4`` (width, 2, 4 and 8 times it), ``pool``, ``head``.
    """
    shapes: dict[int, tuple[type[nn.Module], tuple[int, ...]]] = {
        10: (BasicBlock, (1, 1, 1, 1)),
        18: (BasicBlock, (2, 2, 2, 2)),
        34: (BasicBlock, (3, 4, 6, 3)),
        50: (Bottleneck, (3, 4, 6, 3)),
    }
    if depth not in shapes:
        raise ZooError(f"No ResNet of depth {depth}; there are {', '.join(map(str, shapes))}.")
    block, counts = shapes[depth]
    layer = norm_layer(norm)
    stem = nn.Sequential(nn.Conv2d(in_channels, width, 3, 1, 1, bias=False), layer(width), nn.ReLU())
    stages: OrderedDict[str, nn.Module] = OrderedDict(stem=stem)
    inside = width
    for number, count in enumerate(counts):
        blocks = []
        for i in range(count):
            wide = width * 2**number
            blocks.append(block(inside, wide, 2 if i == 0 and number else 1, layer))  # type: ignore[call-arg]
            inside = wide * block.expansion  # type: ignore[attr-defined, operator]
        stages[f"layer{number + 1}"] = nn.Sequential(*blocks)
    stages["pool"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    stages["head"] = nn.Linear(inside, num_classes)
    return nn.Sequential(stages)


def cnn(
    widths: list[int] | None = None,
    features: int = 64,
    kernel: int = 3,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
    norm: str = "none",
    **_: Any,
) -> nn.Sequential:
    """Convolutions, each followed by normalisation, ReLU and max pooling by 2, then a hidden layer and the head.

    Stages ``layer1``, ``layer2``, ..., ``pool`` (flatten), ``hidden``, ``head``.
    """
    layer = norm_layer(norm)
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    inside, side = in_channels, image_size
    for number, wide in enumerate(widths or [32, 64], 1):
        conv = nn.Conv2d(inside, wide, kernel, padding=kernel // 2)
        stages[f"layer{number}"] = nn.Sequential(conv, layer(wide), nn.ReLU(), nn.MaxPool2d(2))
        inside, side = wide, side // 2
    if side < 1:
        raise ZooError(f"{len(stages)} poolings leave nothing of pictures of {image_size} pixels; give fewer widths.")
    stages["pool"] = nn.Flatten()
    stages["hidden"] = nn.Sequential(nn.Linear(inside * side * side, features), nn.ReLU())
    stages["head"] = nn.Linear(features, num_classes)
    return nn.Sequential(stages)


def mlp(
    hidden: list[int] | None = None, num_classes: int = 10, in_channels: int = 1, image_size: int = 8, **_: Any
) -> nn.Sequential:
    """Hidden layers with ReLU on the flattened picture, or on vectors (``image_size`` 1, a channel a feature)."""
    stages: OrderedDict[str, nn.Module] = OrderedDict(pool=nn.Flatten())
    inside = in_channels * image_size**2
    for number, wide in enumerate(hidden if hidden is not None else [64], 1):
        stages[f"layer{number}"] = nn.Sequential(nn.Linear(inside, wide), nn.ReLU())
        inside = wide
    stages["head"] = nn.Linear(inside, num_classes)
    return nn.Sequential(stages)


NETS: dict[str, Callable[..., nn.Sequential]] = {
    "mlp": mlp,
    "cnn": cnn,
    **{f"resnet{depth}": lambda depth=depth, **given: resnet(depth, **given) for depth in (10, 18, 34, 50)},
}


def classifier(net: str | dict[str, Any], **sizes: Any) -> nn.Sequential:
    """A classifier by name, or by ``{"name": ..., arguments}``.

    Args:
        net: one of `NETS`. sizes: ``num_classes``, ``in_channels``, ``image_size`` and ``norm``, as the net knows them.
    Raises:
        ZooError: for an unknown net or argument.
    """
    given = {"name": net} if isinstance(net, str) else dict(net)
    name = given.pop("name", "")
    if name not in NETS:
        raise ZooError(f"No net {name!r}.{nearest(str(name), list(NETS))} There are {', '.join(NETS)}.")
    known = {"widths", "features", "kernel", "norm", "hidden", "width"}
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ZooError(f"The net {name!r} has no argument {unknown[0]!r}.{nearest(unknown[0], sorted(known))}")
    return NETS[name](**{**sizes, **given})


def has_batch_norm(model: nn.Module) -> bool:
    """Whether anything in a network computes statistics over the batch."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def features(net: nn.Sequential, x: Tensor) -> Tensor:
    """What goes into the head, (n, d)."""
    return net[:-1](x)
