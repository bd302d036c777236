"""Random views of images in two halves, drawing and doing, so that each client draws from a generator of its own.

    draw = view.draw(shape, generator)  # of each client, shape (n, c, h, w): (n, ...)
    x = view(x, torch.cat(draws))       # of all clients at once

Images are (n, c, h, w) float in [0, 1].
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.core.errors import ZooError, nearest


class Crop:
    """A crop of the picture's own size after padding each side by ``pad`` zeros (``mode="reflect"``: mirrored)."""

    def __init__(self, pad: int = 4, mode: str = "constant"):
        self.pad, self.mode = pad, mode

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Offsets, (n, 2) long."""
        return torch.randint(2 * self.pad + 1, (shape[0], 2), generator=generator)

    def __call__(self, x: Tensor, draw: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        padded = F.pad(x, [self.pad] * 4, mode=self.mode)
        rows = draw[:, 0, None] + torch.arange(h, device=x.device)
        columns = draw[:, 1, None] + torch.arange(w, device=x.device)
        samples = torch.arange(len(x), device=x.device)[:, None, None]
        return padded.movedim(1, -1)[samples, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


class Flip:
    """The picture or, with probability ``p``, its mirror image."""

    def __init__(self, p: float = 0.5):
        self.p = p

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Which, (n, 1) bool."""
        return torch.rand(shape[0], 1, generator=generator) < self.p

    def __call__(self, x: Tensor, draw: Tensor) -> Tensor:
        return torch.where(draw.view(-1, 1, 1, 1), x.flip(-1), x)


class Noise:
    """The picture plus Gaussian noise of standard deviation ``std``, within [0, 1]."""

    def __init__(self, std: float = 0.1):
        self.std = std

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """The noise, (n, c, h, w)."""
        return self.std * torch.randn(shape, generator=generator)

    def __call__(self, x: Tensor, draw: Tensor) -> Tensor:
        return (x + draw).clamp(0, 1)


class Erase:
    """A square of side ``size`` at a random place is set to 0 (cutout)."""

    def __init__(self, size: int = 8):
        self.size = size

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Its centre as shares of height and width, (n, 2)."""
        return torch.rand(shape[0], 2, generator=generator)

    def __call__(self, x: Tensor, draw: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        centre = (draw.to(x) * torch.tensor([h, w], device=x.device)).floor()
        rows = (torch.arange(h, device=x.device) - centre[:, :1] + self.size // 2).clamp(-1, self.size)
        columns = (torch.arange(w, device=x.device) - centre[:, 1:] + self.size // 2).clamp(-1, self.size)
        inside = ((rows >= 0) & (rows < self.size))[:, :, None] & ((columns >= 0) & (columns < self.size))[:, None]
        return x.masked_fill(inside[:, None], 0.0)


class RandAugment:
    """``count`` operations drawn for each picture, each done with probability one half at a level drawn too.

    The fourteen operations and their ranges are FixMatch's (Sohn et al., NeurIPS 2020, arXiv:2001.07685); they equal
    Pillow's but for the rounding of bytes. What lies outside a turned or shifted picture is black. Pictures that drew
    the same operation go through it together, each at its own level and in its own direction.

    Args:
        count: operations for each picture. magnitude: levels are drawn from 1 to ``magnitude`` - 1, of 10.
        varied: draw the level; otherwise it is ``magnitude``.
        hole: side of a grey square at a random place afterwards, as a share of the picture's; 0 for none. FixMatch's
            strong view has 0.5.
    """

    operations = (
        "autocontrast", "brightness", "color", "contrast", "equalize", "identity", "posterize", "rotate", "sharpness",
        "solarize", "shear_x", "shear_y", "translate_x", "translate_y",
    )  # fmt: skip

    def __init__(self, count: int = 2, magnitude: int = 10, varied: bool = True, hole: float = 0.0):
        if count < 0 or not 1 <= magnitude <= 10 or (varied and magnitude < 2) or not 0 <= hole <= 1:
            raise ValueError(
                f"RandAugment: count={count}, magnitude={magnitude}, hole={hole}; they must be at least 0, from 1 "
                "(where levels vary 2) to 10, and from 0 to 1."
            )
        self.count, self.magnitude, self.varied, self.hole = count, magnitude, varied, hole

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Operation, level and direction of each (0: left out), then the hole's place: (n, 3 count + 2)."""
        n = shape[0]
        which = torch.randint(len(self.operations), (n, self.count), generator=generator)
        levels = torch.randint(1, max(self.magnitude, 2), (n, self.count), generator=generator)
        levels = levels if self.varied else torch.full_like(levels, self.magnitude)
        done, sign = (torch.rand(2, n, self.count, generator=generator) < 0.5).long()
        place = torch.rand(n, 2, generator=generator)
        return torch.cat([which, levels, done * (2 * sign - 1), place], 1)

    def __call__(self, x: Tensor, draw: Tensor) -> Tensor:
        if x.shape[1] not in (1, 3):
            raise ValueError(f"RandAugment: pictures have {x.shape[1]} channels; grey (1) or colour (3).")
        which, levels, sign = draw[:, :-2].view(len(x), 3, self.count).unbind(1)
        x = x.clone()
        for step in range(self.count):
            kinds = torch.where(sign[:, step] == 0, self.operations.index("identity"), which[:, step].round())
            for number in sorted(set(kinds.long().tolist()) - {self.operations.index("identity")}):
                rows = (kinds == number).nonzero().flatten()
                level, way = (values[rows, step].view(-1, 1, 1, 1).to(x) for values in (levels, sign))
                x[rows] = operate(self.operations[number], x[rows], level / 10, way)
        if self.hole:
            size = torch.tensor(x.shape[-2:], device=x.device)
            side = int(self.hole * min(x.shape[-2:]))
            first = (draw[:, -2:].to(x) * size - side / 2).clamp(min=0).long()
            rows, columns = (torch.arange(n, device=x.device) - f[:, None] for n, f in zip(size, first.T, strict=True))
            inside = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None]
            x = x.masked_fill(inside[:, None], 127 / 255)
        return x


def operate(name: str, x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """One of `RandAugment.operations` on pictures, each at its own level.

    Shapes:
        x: (n, c, h, w) in [0, 1]; level: (n, 1, 1, 1) in (0, 1]; sign: the same, 1 or -1; returns: as x
    """
    from torchvision.transforms.v2 import functional as tv

    h, w = x.shape[-2:]
    if name == "autocontrast":
        return tv.autocontrast(x)
    if name == "equalize":
        return tv.equalize(x)
    if name in ("posterize", "solarize"):
        whole = (255 * x).round()
        if name == "posterize":
            step = 2 ** (4 - (4 * level).floor())
            return (whole / step).floor() * step / 255
        return torch.where(whole >= 256 - (256 * level).floor(), 1 - x, x)
    if name in ("brightness", "color", "contrast", "sharpness"):
        grey = tv.rgb_to_grayscale(x)
        if name == "brightness":
            flat = torch.zeros_like(x)
        elif name == "color":
            flat = grey.expand_as(x)
        elif name == "contrast":
            flat = grey.mean((1, 2, 3), keepdim=True).expand_as(x)
        else:
            flat = x.clone()
            if min(h, w) > 2:
                kernel = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]], device=x.device).to(x) / 13
                flat[..., 1:-1, 1:-1] = F.conv2d(x, kernel.expand(x.shape[1], 1, 3, 3), groups=x.shape[1])
        return torch.lerp(flat, x, 0.9 * level + 0.05).clamp(0, 1)
    return _moved(name, x, level.flatten(), sign.flatten())


def _moved(name: str, x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Pictures whose pixel (i, j) comes from the nearest to M (i, j); the centre of the first pixel is (0.5, 0.5)."""
    h, w = x.shape[-2:]
    zero, one = torch.zeros_like(level), torch.ones_like(level)
    if name == "rotate":
        angle = -torch.deg2rad(sign * (30 * level).floor())  # counter-clockwise
        c, s = angle.cos(), angle.sin()
        rows = [c, s, w / 2 - c * w / 2 - s * h / 2, -s, c, h / 2 + s * w / 2 - c * h / 2]
    else:
        amount = 0.3 * level * sign
        rows = {
            "shear_x": [one, amount, zero, zero, one, zero],
            "shear_y": [one, zero, zero, amount, one, zero],
            "translate_x": [one, zero, (amount * w).trunc(), zero, one, zero],
            "translate_y": [one, zero, zero, zero, one, (amount * h).trunc()],
        }[name]
    a, b, c, d, e, f = rows
    # grid_sample counts from -1 to 1 between the outer edges
    theta = torch.stack([a, b * h / w, a + b * h / w + 2 * c / w - 1, d * w / h, e, d * w / h + e + 2 * f / h - 1], -1)
    grid = F.affine_grid(theta.view(-1, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="nearest", padding_mode="zeros", align_corners=False)


VIEWS = {"crop": Crop, "flip": Flip, "noise": Noise, "erase": Erase, "randaugment": RandAugment}


class Views:
    """Views one after the other, by name with an argument: ``Views(["crop:4", "flip"])``.

    Raises:
        ZooError: for an unknown view.
    """

    def __init__(self, names: Sequence[str]):
        self.views = []
        for text in names:
            name, _, value = text.partition(":")
            if name not in VIEWS:
                raise ZooError(f"No view {name!r}.{nearest(name, list(VIEWS))} There are {', '.join(VIEWS)}.")
            first = float(value) if "." in value else int(value) if value else None
            self.views.append(VIEWS[name]() if first is None else VIEWS[name](first))

    def __call__(self, x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Shapes: x (s, b, c, h, w), one generator for each of the s; returns the same."""
        if not self.views:
            return x
        flat = x.flatten(0, 1)
        for view in self.views:
            draws = torch.cat([view.draw(x.shape[1:], generator) for generator in generators])
            flat = view(flat, draws.to(x.device))
        return flat.view(x.shape)
