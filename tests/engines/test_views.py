"""Random views: RandAugment against Pillow, one picture at a time."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from zoo.engines.federated.views import RandAugment, Views, operate


def pictures(n: int = 6, channels: int = 3, h: int = 24, w: int = 32) -> Tensor:
    """Smooth pictures of whole bytes, so that Pillow starts from the same."""
    small = torch.rand(n, channels, 4, 4, generator=torch.Generator().manual_seed(5))
    large = torch.nn.functional.interpolate(small, (h, w), mode="bilinear")
    return (255 * large).round() / 255


def pillow(name: str, x: Tensor, level: int, sign: int) -> Tensor:
    """FixMatch's operations as Pillow does them on one picture (c, h, w)."""
    array = (255 * x).round().to(torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    share, w, h = level / 10, *image.size
    enhance = {"brightness": "Brightness", "color": "Color", "contrast": "Contrast", "sharpness": "Sharpness"}
    moves = {
        "shear_x": (1, 0.3 * share * sign, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.3 * share * sign, 1, 0),
        "translate_x": (1, 0, int(0.3 * share * sign * w), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, int(0.3 * share * sign * h)),
    }
    if name in enhance:
        image = getattr(ImageEnhance, enhance[name])(image).enhance(0.9 * share + 0.05)
    elif name in moves:
        image = image.transform(image.size, Image.Transform.AFFINE, moves[name])
    elif name == "rotate":
        image = image.rotate(sign * int(30 * share))
    elif name == "posterize":
        image = ImageOps.posterize(image, int(4 * share) + 4)
    elif name == "solarize":
        image = ImageOps.solarize(image, 256 - int(256 * share))
    elif name in ("autocontrast", "equalize"):
        image = getattr(ImageOps, name)(image)
    found = torch.from_numpy(np.asarray(image).copy()).float() / 255
    return found[None] if found.ndim == 2 else found.permute(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [name for name in RandAugment.operations if name != "identity"])
def test_operations_equal_pillow(name: str, channels: int) -> None:
    x = pictures(channels=channels)
    levels, signs = torch.tensor([1, 3, 5, 6, 8, 10]), torch.tensor([1, -1, 1, -1, 1, -1])
    found = operate(name, x, levels.view(-1, 1, 1, 1) / 10, signs.view(-1, 1, 1, 1))
    wanted = torch.stack([pillow(name, *each) for each in zip(x, levels.tolist(), signs.tolist(), strict=True)])
    # Pillow rounds to bytes, also in between; a pixel may lie on the edge between two neighbours
    away = ((found - wanted).abs() > 3.1 / 255).float().mean()
    assert away < (0.02 if name in ("rotate", "shear_x", "shear_y") else 1e-9), float(away)
    if name != "color" or channels == 3:
        assert not torch.equal(wanted, x)


def test_a_batch_is_its_pictures_one_by_one() -> None:
    view, x = RandAugment(3, hole=0.5), pictures(64)
    draw = view.draw(x.shape, torch.Generator().manual_seed(1))
    together = view(x, draw)
    alone = torch.cat([view(x[i : i + 1], draw[i : i + 1]) for i in range(64)])
    assert torch.allclose(together, alone, atol=1e-6)
    assert (together - x).flatten(1).abs().amax(1).min() > 0  # the hole at least
    assert together.min() >= 0 and together.max() <= 1


def test_draws() -> None:
    view = RandAugment(2)
    draw = view.draw(torch.Size((20_000, 3, 8, 8)), torch.Generator().manual_seed(0))
    which, levels, sign = draw[:, :-2].view(-1, 3, 2).unbind(1)
    assert torch.bincount(which.flatten().long(), minlength=14).min() > 40_000 / 14 * 0.9
    assert sorted(set(levels.flatten().tolist())) == list(range(1, 10))
    counts = [float((sign == way).float().mean()) for way in (-1, 0, 1)]
    assert counts == pytest.approx([0.25, 0.5, 0.25], abs=0.01)
    fixed = RandAugment(2, magnitude=10, varied=False).draw(torch.Size((5, 3, 8, 8)), torch.Generator())
    assert set(fixed[:, 2:4].flatten().tolist()) == {10.0}


def test_hole_is_grey_and_of_its_size() -> None:
    view, x = RandAugment(0, hole=0.5), torch.zeros(50, 1, 8, 8)
    found = view(x, view.draw(x.shape, torch.Generator().manual_seed(2)))
    sizes = (found == 127 / 255).sum((1, 2, 3))
    assert sizes.max() == 16 and sizes.min() >= 4 and ((found == 0) | (found == 127 / 255)).all()


def test_by_name_each_client_its_own() -> None:
    views, x = Views(["randaugment:2"]), pictures(8).view(2, 4, 3, 24, 32)
    both = views(x, [torch.Generator().manual_seed(seed) for seed in (3, 4)])
    second = views(x[1:], [torch.Generator().manual_seed(4)])
    assert torch.allclose(both[1:], second, atol=1e-6)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="magnitude=11"):
        RandAugment(2, magnitude=11)
    view = RandAugment(1)
    with pytest.raises(ValueError, match="2 channels"):
        view(torch.rand(1, 2, 4, 4), view.draw(torch.Size((1, 2, 4, 4)), torch.Generator()))
