"""CameraSR: super-resolution of real photographs, learnt from pairs that a camera's lens made.

Paper: Chen et al., "Camera Lens Super-Resolution", CVPR 2019, arXiv:1904.03378. Code by the authors (TensorFlow 1):
https://github.com/ngchc/CameraSR, MIT.

In: pictures taken with a wide view, in [0, 1], already enlarged to the size of the wanted ones. Out: the same scene
with the detail of a long focal length. A lens trades resolution against the width of its view (R-V degradation); what
it loses differs from what bicubic or Gaussian shrinking takes away, so that networks trained on those fail on real
input. The paper's point is the data: pairs of one scene at two focal lengths (City100). Its two networks are known:

    VDSR     y' = y + f(y), y the luma (BT.601) and f twenty 3x3 convolutions; trained by the squared error.
    SRGAN    x' = G(shrunk x); content + 0.001 * adversarial, with
             content     = 0.0061 * mean over positions of sum over channels (phi(x') - phi(x))^2, phi = VGG19 conv5_4
             adversarial = -log D(x'),      D: -log D(x) - log(1 - D(x'))

A residual of the luma is added to all three colours with the weight 255/219, which is what it amounts to when the
colour difference signals are kept (16 to 235 is the range of luma).

Departures: the training of VDSR is not public beyond the network; loss, optimiser and patches are VDSR's own (Kim et
al. 2016), without its gradient clipping. The authors feed VGG with pictures in [-1, 1]; here they are normalised as VGG
was trained (``authors_vgg_range`` restores theirs). Gradients of G go through D after D's step.
Adam's epsilon is PyTorch's: TensorFlow adds its own before the bias correction.
"""

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.core import ZooError, check_channels, check_finite
from zoo.nn.layout import channels_last
from zoo.nn.vgg import VGG, VGG19, load_vgg
from zoo.vision.restoration.degradations import resize_bicubic
from zoo.vision.restoration.restorer import Restorer
from zoo.vision.restoration.tiling import check_tile

LUMA = (65.481 / 255, 128.553 / 255, 24.966 / 255)  # and 16 / 255: BT.601, as MATLAB's rgb2ycbcr


def luma(rgb: Tensor) -> Tensor:
    """BT.601 luma over 255, in [16/255, 235/255]: (b, 3, h, w) -> (b, 1, h, w)."""
    weights = rgb.new_tensor(LUMA).view(1, 3, 1, 1)
    return (rgb * weights).sum(1, keepdim=True) + 16 / 255


# ---- VDSR ---------------------------------------------------------------------------------------------------------


class VDSR(nn.Module):
    """Twenty 3x3 convolutions with ReLUs that predict what is missing: (b, 1, h, w) -> (b, 1, h, w), any size.

    Args:
        depth: convolutions, at least 2.
        width: channels between them.
        identity: start with f = 0.
    """

    def __init__(self, depth: int = 20, width: int = 64, identity: bool = False):
        super().__init__()
        widths = [1, *[width] * (depth - 1), 1]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)
        if identity:
            nn.init.zeros_(self.convs[-1].weight)
        self.reach = depth  # pixels that an output pixel looks to each side

    def residual(self, y: Tensor) -> Tensor:
        """f(y)."""
        y = channels_last(F.relu(self.convs[0](y), inplace=True))
        for conv in self.convs[1:-1]:
            y = F.relu(conv(y), inplace=True)
        return self.convs[-1](y)

    def forward(self, y: Tensor) -> Tensor:
        return y + self.residual(y)


# ---- SRGAN --------------------------------------------------------------------------------------------------------


class Norm(nn.BatchNorm2d):
    """Batch norm that shifts but does not scale, as the authors' (epsilon 0.001, running average 0.9)."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-3, momentum=0.1)
        self.register_parameter("weight", None)

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        nn.init.zeros_(self.bias)


def xavier(conv: nn.Conv2d | nn.Linear) -> Any:
    """The layer with weights as TensorFlow's Xavier initialiser draws them, bias zero."""
    nn.init.xavier_uniform_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class ResidualBlock(nn.Module):
    """x + norm(conv(prelu(norm(conv(x)))))."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = xavier(nn.Conv2d(width, width, 3, padding=1, bias=False))
        self.norm1 = Norm(width)
        self.act = nn.PReLU(width, init=0.0)
        self.conv2 = xavier(nn.Conv2d(width, width, 3, padding=1, bias=False))
        self.norm2 = Norm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))


class Generator(nn.Module):
    """SRResNet with one pixel shuffle: (b, 3, h, w) in [0, 1] -> (b, 3, scale*h, scale*w) in about [-1, 1].

    Args:
        blocks: residual blocks.
        width: channels.
        tail: channels after the pixel shuffle (42 in the authors' x3).
        scale: output side over input side.
    """

    def __init__(self, blocks: int = 16, width: int = 64, tail: int = 42, scale: int = 3):
        super().__init__()
        self.scale = scale
        self.first = xavier(nn.Conv2d(3, width, 9, padding=4))
        self.first_act = nn.PReLU(width, init=0.0)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(blocks))
        self.middle = xavier(nn.Conv2d(width, width, 3, padding=1, bias=False))
        self.middle_norm = Norm(width)
        self.up = xavier(nn.Conv2d(width, tail * scale**2, 3, padding=1))
        self.up_act = nn.PReLU(tail, init=0.0)
        self.last = xavier(nn.Conv2d(tail, 3, 9, padding=4))
        self.reach = 4 + 2 * blocks + 2 + -(-4 // scale)  # input pixels that an output pixel looks to each side

    def forward(self, small: Tensor) -> Tensor:
        x = skip = self.first_act(self.first(channels_last(small)))
        for block in self.blocks:
            x = block(x)
        x = self.middle_norm(self.middle(x)) + skip
        return self.last(self.up_act(F.pixel_shuffle(self.up(x), self.scale)))


class Discriminator(nn.Module):
    """Log odds that a picture is a real one: (b, 3, patch, patch) in [-1, 1] -> (b,).

    Args:
        patch: side of the pictures; the dense layer is made for it.
        width: channels of the first layer; doubled three times.
        hidden: width of the dense layer.
    """

    def __init__(self, patch: int = 72, width: int = 64, hidden: int = 1024):
        super().__init__()
        self.patch = patch
        self.first = xavier(nn.Conv2d(3, width, 3, padding=1))
        widths = [width * k for k in (1, 1, 2, 2, 4, 4, 8, 8)]
        self.strides = (2, 1, 2, 1, 2, 1, 2)
        self.convs = nn.ModuleList(
            xavier(nn.Conv2d(a, b, 3, stride=s, bias=False))
            for a, b, s in zip(widths, widths[1:], self.strides, strict=False)
        )
        self.norms = nn.ModuleList(Norm(b) for b in widths[1:])
        side = patch
        for _ in range(4):
            side = -(-side // 2)
        self.dense = xavier(nn.Linear(widths[-1] * side**2, hidden))
        self.out = xavier(nn.Linear(hidden, 1))

    def features(self, x: Tensor) -> Tensor:
        """What the dense layers look at: (b, c * side**2)."""
        x = F.leaky_relu(self.first(x), 0.2)
        for conv, norm, stride in zip(self.convs, self.norms, self.strides, strict=True):
            # TensorFlow's "SAME": what an even side lacks is added after it
            pads = [max((-(-side // stride) - 1) * stride + 3 - side, 0) for side in (x.shape[-1], x.shape[-2])]
            x = conv(F.pad(x, (pads[0] // 2, pads[0] - pads[0] // 2, pads[1] // 2, pads[1] - pads[1] // 2)))
            x = F.leaky_relu(norm(x), 0.2)
        return x.flatten(1)

    def judge(self, found: Tensor) -> Tensor:
        """Log odds (b,) from `features`."""
        return self.out(F.leaky_relu(self.dense(found), 0.2)).squeeze(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.judge(self.features(x))


# ---- losses -------------------------------------------------------------------------------------------------------


def content_loss(made: Tensor, wanted: Tensor, scaling: float = 0.0061) -> Tensor:
    """scaling * mean over positions of the sum over channels of squared differences.

    Shapes:
        made, wanted: (b, c, h, w), features (or pictures in [-1, 1], with scaling 1); returns a scalar
    """
    return scaling * (made - wanted).square().sum(1).mean()


def adversarial_loss(fake: Tensor) -> Tensor:
    """-log D(G(x)), from log odds: (b,) -> scalar. The authors' 1e-12 inside the logarithm is not needed this way."""
    return F.softplus(-fake).mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """-log D(y) - log(1 - D(G(x))), from log odds: (b,), (b,) -> scalar."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


# ---- the method ---------------------------------------------------------------------------------------------------


class CameraSR(Restorer):
    """Camera lens super-resolution (arXiv:1904.03378), as VDSR for accuracy or SRGAN for looks.

    Defaults are the paper's VDSR; ``from_variant("srgan")`` is its SRGAN, and ``from_variant("srresnet")`` what SRGAN
    is best started from (``net="srgan"`` without discriminator, by the squared error).

    Batch: "low" and "high", (b, 3, h, w) in [0, 1] and of one size: "low" is enlarged already. SRGAN shrinks it to
    ``1 / scale`` by bicubic interpolation and makes its own pixels. ``model.net`` is the bare network: of luma for
    VDSR, of small pictures for SRGAN.

    With a discriminator two optimisers take a step each, and ``max_steps`` counts both.

    Args:
        net: ``"vdsr"`` or ``"srgan"``.
        depth: VDSR's convolutions.
        width: channels of either network, and of the discriminator's first layer.
        identity: let VDSR start as the identity, its last convolution zero: short trainings gain. The authors' starts
            at random.
        blocks: SRGAN's residual blocks.
        tail: SRGAN's channels after the pixel shuffle.
        scale: SRGAN's enlargement; a whole number.
        content: SRGAN's content loss: ``"vgg54"`` (last convolution of VGG19), ``"vgg22"`` or ``"mse"`` (pixels).
        vgg_scaling: factor of a VGG content loss.
        adversarial: weight of the adversarial loss; 0 leaves the discriminator out.
        patch: side of SRGAN's training patches, for the discriminator's dense layer; a multiple of ``scale``.
        backbone: VGG19 of the content loss: Hub id of timm's, or a folder or file, fetched when training begins; or
            ``{"blocks": [...], "widths": [...]}``, random weights (tests).
        backbone_revision: commit, tag or branch of the Hub id.
        authors_vgg_range: feed VGG with pictures in [-1, 1] as the authors do, instead of normalised ones.
        tile: `predict` works in tiles of this side when a picture has more than ``tile**2`` pixels; exact, as tiles
            overlap by all that a pixel depends on. 0 never cuts. A multiple of 8.
        lr: Adam's learning rate.
        decay_steps: SRGAN's learning rate falls to a tenth each time so many batches are done; 0 keeps it.
    Raises:
        ValueError: if an argument is out of range.
    Example:
        >>> model = CameraSR.from_variant("tiny")
        >>> model.predict(torch.rand(1, 3, 50, 70)).shape
        torch.Size([1, 3, 50, 70])
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "srgan": {"net": "srgan"},
        "srresnet": {"net": "srgan", "content": "mse", "adversarial": 0.0},
        "small": {"depth": 8, "width": 32, "identity": True, "lr": 1e-3},
        "tiny": {"depth": 3, "width": 8, "lr": 1e-3},
        "tiny_srgan": {
            "net": "srgan", "width": 4, "blocks": 1, "tail": 4, "patch": 24,
            "backbone": {"blocks": [1, 1], "widths": [4, 4]},
        },
    }  # fmt: skip
    given, wanted, output = "low", "high", "restored"

    def __init__(
        self,
        net: str = "vdsr",
        depth: int = 20,
        width: int = 64,
        identity: bool = False,
        blocks: int = 16,
        tail: int = 42,
        scale: int = 3,
        content: str = "vgg54",
        vgg_scaling: float = 0.0061,
        adversarial: float = 1e-3,
        patch: int = 72,
        backbone: str | dict[str, Any] = "timm/vgg19.tv_in1k",
        backbone_revision: str | None = None,
        authors_vgg_range: bool = False,
        tile: int = 1024,
        lr: float = 1e-4,
        decay_steps: int = 500_000,
    ):
        super().__init__()
        if net not in ("vdsr", "srgan") or content not in ("vgg54", "vgg22", "mse"):
            raise ValueError(
                f"net is {net!r} and content {content!r}; net may be 'vdsr' or 'srgan', content 'vgg54', 'vgg22' or "
                "'mse'."
            )
        if depth < 2 or min(width, blocks, tail) < 1 or scale < 2 or min(adversarial, vgg_scaling, decay_steps) < 0:
            raise ValueError(
                f"depth is {depth}, width {width}, blocks {blocks}, tail {tail}, scale {scale}; depth and scale must "
                "be at least 2, the others at least 1; losses' weights and decay_steps at least 0."
            )
        if patch < 16 or patch % scale:
            raise ValueError(f"patch is {patch}; it must be a multiple of scale {scale}, from 16 on.")
        check_tile(tile)
        self.save_hyperparameters()
        self.net: Any = VDSR(depth, width, identity) if net == "vdsr" else Generator(blocks, width, tail, scale)
        self.discriminator = Discriminator(patch, width, 16 * width) if net == "srgan" and adversarial else None
        self.backbone: VGG | None = None
        if net == "srgan" and content != "mse" and isinstance(backbone, dict):
            self.backbone = self.load_backbone()
            self.freeze("backbone")
        self.automatic_optimization = self.discriminator is None

    @classmethod
    def from_backbone(cls, module: nn.Module, **hparams: Any) -> Self:
        """SRGAN whose content loss takes the features of a live torchvision or timm VGG; its weights are saved, too.

        Args:
            module: a VGG without batch norm.
            hparams: hyperparameters, less ``net`` and ``backbone``.
        """
        whole = VGG.from_tensors(module.state_dict())
        config = {"blocks": list(whole.blocks), "widths": list(whole.widths)}
        self = cls(**{**hparams, "net": "srgan", "backbone": config})
        if self.backbone is not None:
            own = self.backbone.state_dict()
            self.backbone.load_state_dict({key: value for key, value in whole.state_dict().items() if key in own})
        return self

    # ---- forward ------------------------------------------------------------------------------------------------

    def forward(self, low: Tensor) -> Tensor:
        """The picture with its detail, not clamped.

        Shapes:
            low: (b, 3, h, w) float in [0, 1], enlarged already; for SRGAN h and w multiples of ``scale``
            returns: (b, 3, h, w)
        Raises:
            ValueError: for another shape.
        """
        check_channels(low, 3, "low")
        if self.hparams.net == "vdsr":
            return low + 255 / 219 * self.net.residual(luma(low))
        return (self.net(self.shrink(low)) + 1) / 2

    def shrink(self, low: Tensor) -> Tensor:
        """What SRGAN sees of an enlarged picture: (b, 3, h, w) -> (b, 3, h / scale, w / scale)."""
        scale = self.hparams.scale
        if low.shape[-2] % scale or low.shape[-1] % scale:
            raise ValueError(
                f"CameraSR: {low.shape[-2]} x {low.shape[-1]} is no multiple of scale {scale}. `predict` takes any "
                "size; or crop."
            )
        return resize_bicubic(low, 1 / scale).clamp(0, 1)

    def example_inputs(self) -> tuple[Tensor, ...]:
        return (torch.rand(1, 3, 30, 42, generator=torch.Generator().manual_seed(0)).to(self.device),)

    # ---- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        low, high = batch["low"], batch["high"]
        if self.hparams.net == "vdsr":
            loss = F.mse_loss(self.net(luma(low)), luma(high))
            self.log("train/loss", loss, batch_size=len(low))
            return loss
        made, wanted = self.net(self.shrink(low)), high * 2 - 1
        if self.discriminator is None:
            loss = self.content(made, wanted)
            self.log("train/loss", loss, batch_size=len(low))
            return loss
        if high.shape[-2:] != (self.hparams.patch,) * 2:
            raise ValueError(
                f"CameraSR: patches are {high.shape[-2]} x {high.shape[-1]}, the discriminator was made for "
                f"patch={self.hparams.patch}. Give model and data the same patch."
            )
        made = made.contiguous()  # channels apart, where wide convolutions of few pixels run faster
        first, second = self.optimizers()  # type: ignore[misc]
        self.toggle_optimizer(second)
        second.zero_grad()
        # batch norm sees real and made pictures apart; the dense layer, most of the weights, both at once
        seen = torch.cat([self.discriminator.features(x) for x in (wanted, made.detach())])
        d_loss = discriminator_loss(*self.discriminator.judge(seen).chunk(2))
        self.manual_backward(d_loss)
        second.step()
        self.untoggle_optimizer(second)

        self.toggle_optimizer(first)
        first.zero_grad()
        content = self.content(made, wanted)
        adversarial = adversarial_loss(self.discriminator(made))
        loss = content + self.hparams.adversarial * adversarial
        self.manual_backward(loss)
        first.step()
        self.untoggle_optimizer(first)
        for scheduler in self.lr_schedulers() or ():  # type: ignore[union-attr]
            scheduler.step()
        parts = {"loss": loss, "content": content, "adversarial": adversarial, "discriminator": d_loss}
        self.log_dict({f"train/{key}": value.detach() for key, value in parts.items()}, batch_size=len(low))
        return None

    def content(self, made: Tensor, wanted: Tensor) -> Tensor:
        """SRGAN's content loss between pictures in [-1, 1]: of VGG's features, or of pixels."""
        hp = self.hparams
        if hp.content == "mse":
            return content_loss(made, wanted, 1.0)
        vgg = self.features(made.device)
        with torch.no_grad():
            target = vgg(wanted)
        return content_loss(vgg(made), target, hp.vgg_scaling)

    def load_backbone(self) -> VGG:
        """The VGG of the content loss, up to the layer that it names."""
        hp = self.hparams
        source, kept = hp.backbone, None
        if hp.content == "vgg22":
            source = {key: value[:2] for key, value in source.items()} if isinstance(source, dict) else source
            kept = VGG19["blocks"][:2]
        hint = "; or compare pixels with content='mse'"
        return load_vgg(source, hp.backbone_revision, kept, not hp.authors_vgg_range, hint)

    def features(self, device: torch.device) -> VGG:
        """VGG up to the wanted layer. One that comes from the Hub stays outside the module's state: no checkpoint
        holds it, and prediction never fetches it."""
        if self.backbone is not None:
            return self.backbone
        if "_vgg" not in self.__dict__:
            self.__dict__["_vgg"] = self.load_backbone().eval()
        return self.__dict__["_vgg"].to(device)

    def configure_optimizers(self) -> Any:
        """Adam; with a discriminator one for each network, its learning rate falling exponentially."""
        hp = self.hparams

        def adam(net: nn.Module) -> torch.optim.Adam:
            wide = net is self.discriminator or None  # 15 million weights: one pass over them where there were a dozen
            return torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=hp.lr, fused=wide)

        if hp.net == "vdsr":
            return adam(self.net)
        optimizers = [adam(net) for net in (self.net, self.discriminator) if net is not None]

        def factor(step: int) -> float:
            return 0.1 ** (step / hp.decay_steps) if hp.decay_steps else 1.0

        schedulers = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in optimizers]
        return optimizers, [{"scheduler": s, "interval": "step"} for s in schedulers]

    # ---- prediction ------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, low: Tensor, tile: int | None = None) -> Tensor:  # type: ignore[override]
        """Restore pictures of any size: exact tiles where they are large, clamped to [0, 1].

        Args:
            low: (b, 3, h, w) float in [0, 1], enlarged already.
            tile: instead of the hyperparameter of that name.
        Shapes:
            returns: (b, 3, h, w)
        Raises:
            ValueError: for another shape, or if a value is not finite.
        """
        check_channels(low, 3, "low")
        if not torch.compiler.is_compiling():
            check_finite(low, "low")
        tile = check_tile(self.hparams.tile if tile is None else tile)
        (h, w), scale = low.shape[-2:], self.hparams.scale
        unit = 1 if self.hparams.net == "vdsr" else scale
        padded = F.pad(low, (0, -w % unit, 0, -h % unit), mode="replicate") if h % unit or w % unit else low
        if not tile or h * w <= tile**2:
            group = max(1, tile**2 // (h * w)) if tile else len(low)  # as many at once as have the pixels of a tile
            parts = [self.restore(part) for part in padded.split(group)]
            return torch.cat(parts)[..., :h, :w].clamp(0, 1)
        margin = unit * (self.net.reach + (4 if unit > 1 else 0))  # bicubic shrinking looks further, too
        inner = tile // unit * unit
        out = torch.empty_like(padded)
        for top in range(0, padded.shape[-2], inner):
            for left in range(0, padded.shape[-1], inner):
                y, x = max(top - margin, 0), max(left - margin, 0)
                piece = padded[..., y : top + inner + margin, x : left + inner + margin]
                done = torch.cat([self.restore(one) for one in piece.split(1)])
                out[..., top : top + inner, left : left + inner] = done[
                    ..., top - y : top - y + inner, left - x : left - x + inner
                ]
        return out[..., :h, :w].clamp(0, 1)

    # ---- the authors' checkpoints -------------------------------------------------------------------------------

    @classmethod
    def convert_state_dict(cls, content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The authors' TensorFlow variables (`zoo convert` reads an ``.index``) as (hyperparameters, state).

        Optimiser slots, counters, running losses and VGG are left out. Hyperparameters are read off the shapes.

        Raises:
            ZooError: if a variable is missing or unknown.
        """
        return convert(content)


# ---- names --------------------------------------------------------------------------------------------------------

_SKIP = re.compile(
    r"(beta[12]_power|global_step|.*/Adam(_1)?|.*/beta[12]_power|.*/ExponentialMovingAverage|.*/global_step|vgg_19/.*)"
)
_NORM = {"beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def rename(theirs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The authors' variables (or their gradients) under our names and in our shapes: kernels HWIO -> OIHW.

    Raises:
        ZooError: naming variables that neither network has.
    """
    ours: dict[str, Tensor] = {}
    unknown = []
    for key, value in theirs.items():
        if _SKIP.fullmatch(key):
            continue
        name = _name(key)
        if name is None or not isinstance(value, Tensor):
            unknown.append(key)
            continue
        if value.ndim == 4:
            value = value.permute(3, 2, 0, 1)
        elif name == "discriminator.dense.weight":  # their features are flattened as (h, w, c)
            last = theirs.get("discriminator/discriminator_unit/disblock_7/BatchNorm/beta")
            channels = len(last) if isinstance(last, Tensor) else 512
            side = math.isqrt(value.shape[0] // channels)
            value = value.view(side, side, channels, -1).permute(3, 2, 0, 1).flatten(1)
        elif value.ndim == 2:
            value = value.T
        ours[name] = value.contiguous().clone()
    if unknown:
        raise ZooError(
            f"{len(unknown)} variables of the checkpoint are unknown ({', '.join(unknown[:3])}): expected those of "
            "CameraSR's VDSR or SRGAN."
        )
    return ours


def _name(key: str) -> str | None:
    """Our name of one of their variables."""
    if match := re.fullmatch(r"vdsr\d+/conv(\d+)/(kernel|bias)", key):
        return f"net.convs.{int(match[1]) - 1}.{'weight' if match[2] == 'kernel' else 'bias'}"
    if match := re.fullmatch(r"generator/generator_unit/resblock_(\d+)/(.+)", key):
        block = f"net.blocks.{int(match[1]) - 1}"
        if norm := re.fullmatch(r"BatchNorm(_1)?/(beta|moving_mean|moving_variance)", match[2]):
            return f"{block}.norm{2 if norm[1] else 1}.{_NORM[norm[2]]}"
        parts = {
            "Prelu/alpha": "act.weight",
            "conv_1/Conv/weights": "conv1.weight",
            "conv_2/Conv/weights": "conv2.weight",
        }
        return f"{block}.{parts[match[2]]}" if match[2] in parts else None
    if match := re.fullmatch(r"generator/generator_unit/resblock_output/BatchNorm/(\w+)", key):
        return f"net.middle_norm.{_NORM[match[1]]}" if match[1] in _NORM else None
    if match := re.fullmatch(r"discriminator/discriminator_unit/disblock_(\d)/BatchNorm/(\w+)", key):
        return f"discriminator.norms.{int(match[1]) - 1}.{_NORM[match[2]]}" if match[2] in _NORM else None
    if match := re.fullmatch(r"discriminator/discriminator_unit/disblock_(\d)/conv1/Conv/weights", key):
        return f"discriminator.convs.{int(match[1]) - 1}.weight"
    stages = {
        "generator/generator_unit/input_stage": "net.first",
        "generator/generator_unit/resblock_output": "net.middle",
        "generator/generator_unit/subpixelconv_stage1": "net.up",
        "generator/generator_unit/output_stage": "net.last",
        "discriminator/discriminator_unit/input_stage": "discriminator.first",
        "discriminator/discriminator_unit/dense_layer_1": "discriminator.dense",
        "discriminator/discriminator_unit/dense_layer_2": "discriminator.out",
    }
    stage, place = next(((s, p) for s, p in stages.items() if key.startswith(f"{s}/")), ("", ""))
    tails = {
        "Prelu/alpha": "_act.weight", "conv/Conv/weights": ".weight", "conv/Conv/biases": ".bias",
        "dense/kernel": ".weight", "dense/bias": ".bias",
    }  # fmt: skip
    tail = tails.get(key.removeprefix(f"{stage}/")) if stage else None
    return None if tail is None else place + tail


def convert(theirs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """See `CameraSR.convert_state_dict`."""
    ours = rename(theirs)
    if "net.convs.0.weight" in ours:
        depth = len({key.split(".")[2] for key in ours})
        return {"net": "vdsr", "depth": depth, "width": len(ours["net.convs.0.weight"])}, ours
    need = ("net.first.weight", "net.up.weight", "net.last.weight")
    missing = [key for key in need if key not in ours]
    if missing:
        raise ZooError(f"The checkpoint lacks the authors' variable for {missing[0]}: it is no whole CameraSR.")
    tail = ours["net.last.weight"].shape[1]
    hyper = {
        "net": "srgan",
        "width": len(ours["net.first.weight"]),
        "blocks": len({key.split(".")[2] for key in ours if key.startswith("net.blocks.")}),
        "tail": tail,
        "scale": math.isqrt(len(ours["net.up.weight"]) // tail),
    }
    if "discriminator.dense.weight" in ours:
        side = math.isqrt(ours["discriminator.dense.weight"].shape[1] // len(ours["discriminator.norms.6.bias"]))
        # of the patches that four halvings bring to that side, SRGAN's own (24 small pixels), or else the smallest
        fit = [p for p in range(max(16, 16 * side - 15), 16 * side + 1) if p % hyper["scale"] == 0]
        hyper["patch"] = 24 * hyper["scale"] if 24 * hyper["scale"] in fit else fit[0]
    else:
        hyper["adversarial"] = 0.0
    for key in [k for k in ours if k.endswith("running_mean")]:  # ours also counts batches
        ours[key.replace("running_mean", "num_batches_tracked")] = torch.tensor(0)
    return hyper, ours
