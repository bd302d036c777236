"""GLLCM beside its authors' code: networks, losses, a step of each stage, sampler, fusion, scores, their script.

Needs what their code imports: monai, monai-generative, diffusers, lpips and opencv-python-headless.
"""

import contextlib
import copy
import importlib
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.measure import error, float64, in_turns
from zoo.nn.vgg import VGG, VGG16
from zoo.vision.restoration import fusion, gllcm
from zoo.vision.restoration.data_bone_suppression import make_pairs
from zoo.vision.restoration.gllcm import GLLCM, Perceptual, rename

AUTOENCODER = {"num_channels": (16, 24), "num_res_channels": 20, "num_res_layers": 2, "num_embeddings": 64}
PAPER_AUTOENCODER = {
    **{"num_channels": (128, 256, 512), "num_res_channels": 512, "num_res_layers": 2},
    "num_embeddings": 1024,
}
UNET = {"model_channels": 32, "channel_mult": (1, 2, 2), "num_res_blocks": 2, "attention_resolutions": (64, 4, 2)}
PAPER_UNET = {
    **{"model_channels": 128, "channel_mult": (1, 1, 2, 2, 4, 4), "num_res_blocks": 8},
    "attention_resolutions": (64, 32, 16, 8),
}

# ---- their networks -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def their_modules(checkout: Path) -> Iterator[None]:
    """Their folder on the import path; their modules have names (``config``, ``model``) that must not stay."""
    before, folder = set(sys.modules), str(Path(checkout) / "codes")
    sys.path.insert(0, folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "") or "").startswith(folder):
                del sys.modules[name]


def their_unet(checkout: Path, config: dict[str, Any]) -> nn.Module:
    """The network of their model.py at another size."""
    with their_modules(checkout):
        cls = importlib.import_module("modules.unet").UNetModel
    return cls(
        image_size=32,
        in_channels=8,
        out_channels=8,
        num_heads=8,
        num_heads_upsample=-1,
        num_head_channels=-1,
        resblock_updown=True,
        use_scale_shift_norm=True,
        use_new_attention_order=True,
        **config,
    )


def their_autoencoder(config: dict[str, Any]) -> nn.Module:
    """MONAI's VQVAE as in their model.py at another size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from generative.networks.nets import VQVAE
    levels = len(config["num_channels"])
    return VQVAE(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        downsample_parameters=((2, 4, 1, 1),) * levels,
        upsample_parameters=((2, 4, 1, 1, 0),) * levels,
        embedding_dim=4,
        **config,
    )


def roughen(net: nn.Module) -> None:
    """Random weights where a fresh network has zeros and ones, as after training."""
    with torch.no_grad():
        for p in net.parameters():
            if not p.any():
                p.normal_(0, 0.05)
            elif p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))


def pair(checkout: Path, autoencoder: dict[str, Any], unet: dict[str, Any], **changes: Any) -> tuple[GLLCM, Any, Any]:
    """Ours, their VQVAE and their U-Net with the same weights, through `convert_state_dict`."""
    torch.manual_seed(0)
    vqvae, net = their_autoencoder(autoencoder).eval(), their_unet(checkout, unet).eval()
    roughen(net)
    hyper, state = GLLCM.convert_state_dict({**vqvae.state_dict(), **net.state_dict()})
    ours = GLLCM(**{**hyper, **changes}).eval()
    ours.load_state_dict(state)
    return ours, vqvae, net


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor], floor: float = 0.0) -> float:
    """The largest relative error over tensors of the same names.

    Args:
        floor: what a tensor's largest value counts as at least, as a part of the largest of all: gradients of biases
            that a norm or a softmax cancels are zero but for rounding.
    """
    assert theirs.keys() <= ours.keys(), sorted(theirs.keys() - ours.keys())[:3]
    least = floor * max(float(value.abs().max()) for value in theirs.values())
    return max(
        float((ours[name] - value).detach().abs().max()) / max(float(value.detach().abs().max()), least, 1e-12)
        for name, value in theirs.items()
    )


# ---- parity -------------------------------------------------------------------------------------------------------


def compare(checkout: Path) -> dict[str, float]:
    """Largest relative errors, part by part. Those "of_255" are on 8 bits, where a grey level is .0039 of the
    range: theirs truncates before and after blending, ours does not round at all."""
    figures = {**first_stage(checkout), **second_stage(checkout), **sampling()}
    return figures | blending() | scores(checkout) | script(checkout)


def first_stage(checkout: Path) -> dict[str, float]:
    """Autoencoder and critic: forward, all losses, gradients, the codes' averages and one step of both optimisers."""
    import lpips
    from generative.losses import PatchAdversarialLoss
    from generative.networks.nets import PatchDiscriminator

    torch.manual_seed(1)
    theirs = their_autoencoder(AUTOENCODER).train()
    critic = PatchDiscriminator(spatial_dims=2, in_channels=1, num_layers_d=3, num_channels=8).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        perceptual = lpips.LPIPS(pretrained=True, net="vgg", pnet_rand=True, verbose=False)
    size = {"ae_widths": [16, 24], "ae_hidden": 20, "ae_layers": 2, "codes": 64, "critic_width": 8}
    ours = GLLCM(stage="autoencoder", size=128, mult=[1, 1], width=32, attention=[2], heads=8, **size).train()
    state = rename(theirs.state_dict()) | {f"critic.{k}": v for k, v in _critic(critic.state_dict()).items()}
    ours.load_state_dict(state)
    vgg = {f"features.{i}.{k}": v for i, layer in _vgg(perceptual) for k, v in layer.state_dict().items()}
    lines = [getattr(perceptual, f"lin{i}").model[1].weight for i in range(5)]
    ours._perceptual.append(Perceptual(VGG.from_tensors(vgg), lines))

    cxr, bs, _ = make_pairs(2, 128, torch.Generator().manual_seed(0))
    pictures = 2 * torch.cat((cxr, bs)) - 1
    figures = {}
    with torch.no_grad():
        codes = theirs.eval().encode_stage_2_inputs(pictures)
        ours.eval()
        figures["encode"] = error(ours.encode(pictures / 2 + 0.5), codes)
        figures["decode"] = error(2 * ours.decode(codes) - 1, theirs.decode(codes))
        noisy = codes + 0.3 * torch.randn_like(codes)
        figures["requantise"] = error(ours.autoencoder.quantiser(noisy)[0], theirs.quantizer(noisy)[1])
        theirs.train()
        ours.train()

    adversarial = PatchAdversarialLoss(criterion="least_squares")
    with their_modules(checkout):
        cls = importlib.import_module("pytorch_msssim").MSSSIM
    similarity = cls(window_size=11, size_average=True, channel=1, normalize="relu")
    reconstruction, commitment = theirs(images=pictures)
    scores_made = critic(reconstruction.contiguous().float())[-1]
    parts = {
        "mse": F.mse_loss(reconstruction, pictures),
        "commitment": commitment,
        "perceptual": perceptual(reconstruction, pictures).mean(),
        "adversarial": adversarial(scores_made, target_is_real=True, for_discriminator=False),
        "ssim": similarity(reconstruction, pictures),
    }
    total = parts["mse"] + commitment + 0.001 * parts["perceptual"] + 0.01 * parts["adversarial"] + 1 - parts["ssim"]
    same = copy.deepcopy(ours)
    loss, made, own = ours.autoencoder_loss(pictures)
    figures["reconstruction"] = error(made, reconstruction)
    figures |= {f"loss_{name}": error(own[name], value) for name, value in parts.items()}
    figures["loss_autoencoder"] = error(loss, total)

    first = torch.optim.Adam(theirs.parameters(), lr=1e-4)
    second = torch.optim.Adam(critic.parameters(), lr=5e-4)
    total.backward()
    loss.backward()
    gradients = rename({n: p.grad for n, p in theirs.named_parameters() if p.grad is not None})
    found = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    figures["gradients_autoencoder"] = worst(found, gradients, floor=1e-3)
    # Adam's first step is nearly the signs of the gradients, and of those that are all rounding another order of sums
    # turns some: from here on ours lies in memory as theirs does.
    with mock.patch.object(gllcm, "channels_last", lambda x: x):
        loss, made, _ = same.autoencoder_loss(pictures)
    ours = same
    (our_first, our_second), _ = ours.configure_optimizers()
    loss.backward()
    first.step()
    our_first.step()
    second.zero_grad()
    made_loss = adversarial(critic(reconstruction.detach())[-1], target_is_real=False, for_discriminator=True)
    real_loss = adversarial(critic(pictures)[-1], target_is_real=True, for_discriminator=True)
    critic_loss = 0.01 * (made_loss + real_loss) * 0.5
    own_critic = ours.critic_loss(pictures, made)
    figures["loss_critic"] = error(own_critic, critic_loss)
    critic_loss.backward()
    own_critic.backward()
    second.step()
    our_second.step()
    after = rename(theirs.state_dict()) | {f"critic.{k}": v for k, v in _critic(critic.state_dict()).items()}
    own_after = ours.state_dict()
    codebook = {k for k in after if "quantiser" in k}
    figures["codebook_step"] = worst(own_after, {k: after[k] for k in codebook})
    figures["step_autoencoder"] = worst(own_after, {k: v for k, v in after.items() if k not in codebook and v.any()})
    return figures


def _vgg(perceptual: nn.Module) -> list[tuple[int, nn.Module]]:
    """The convolutions of lpips' VGG with their numbers in torchvision's."""
    found = []
    for slice_ in (getattr(perceptual.net, f"slice{i}") for i in range(1, 6)):
        found += [(int(name), layer) for name, layer in slice_.named_children() if isinstance(layer, nn.Conv2d)]
    return found


def _critic(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """MONAI's PatchDiscriminator under our names."""
    ours = {}
    for key, value in theirs.items():
        words = key.split(".")
        if words[0] in ("initial_conv", "final_conv"):
            ours[f"{'first' if words[0] == 'initial_conv' else 'last'}.{words[-1]}"] = value
        elif words[1] == "conv":
            ours[f"convs.{words[0]}.{words[-1]}"] = value
        else:
            ours[f"norms.{words[0]}.{words[-1]}"] = value
    return ours


def second_stage(checkout: Path) -> dict[str, float]:
    """U-Net: forward, their training loss with their scheduler's noise, gradients, one step of AdamW; gradients and the
    step in double precision, too, where their casts to single are taken out."""
    figures = _second_stage(checkout)
    single = torch.Tensor.float
    torch.Tensor.float = lambda self: self  # type: ignore[method-assign]
    try:
        with float64():
            exact = _second_stage(checkout)
    finally:
        torch.Tensor.float = single  # type: ignore[method-assign]
    kept = ("gradients_diffusion", "step_diffusion")
    return figures | {f"{name}_float64": exact[name] for name in kept}


def _second_stage(checkout: Path) -> dict[str, float]:
    from diffusers import LCMScheduler

    dtype = torch.get_default_dtype()
    ours, _, net = pair(checkout, AUTOENCODER, UNET, size=128)
    net.dtype = dtype
    net.time_embed.register_forward_pre_hook(lambda _, given: (given[0].to(dtype),))
    torch.manual_seed(2)
    x, t = torch.randn(2, 8, 32, 32), torch.tensor([7, 812])
    figures = {"estimator": error(ours(x[:, :4], x[:, 4:], t), net(x, t))}
    clean, condition = torch.randn(2, 2, 4, 32, 32)
    noise = torch.randn_like(condition) + 0.1 * torch.randn(2, 4, 1, 1)
    scheduler = LCMScheduler(num_train_timesteps=1000)
    blank = torch.cat((noise, torch.zeros_like(noise)), 1)
    estimate = net(scheduler.add_noise(torch.cat((clean, condition), 1), blank, t), t)
    their_loss = F.mse_loss(estimate[:, :4], noise)
    loss = ours.noise_loss(clean, condition, noise, t)
    figures["loss_diffusion"] = error(loss, their_loss)
    their_loss.backward()
    loss.backward()
    theirs = rename({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    found = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    figures["gradients_diffusion"] = worst(found, theirs, floor=1e-3)
    ours.trainer = types.SimpleNamespace(estimated_stepping_batches=600)  # type: ignore[assignment]
    training = ours.configure_optimizers()  # its scheduler must live as long as the step
    training["optimizer"].step()
    torch.optim.AdamW(net.parameters(), lr=1e-4, eps=1e-6).step()
    figures["step_diffusion"] = worst(ours.state_dict(), rename(net.state_dict()))
    return figures


def sampling() -> dict[str, float]:
    """The consistency and the ancestral sampler against diffusers' schedulers, noise injected; the guidance."""
    from diffusers import DDPMScheduler, LCMScheduler

    torch.manual_seed(4)
    signal = gllcm.signal_levels(1000)
    figures = {}

    def network(x: Tensor, t: int) -> Tensor:
        return torch.tanh(x * (1 + t / 1000)) + 0.1 * x.flip(-1)

    for steps in (50, 10, 1):
        theirs = ours = torch.randn(1, 4, 8, 8)
        schedule = LCMScheduler(num_train_timesteps=1000, clip_sample=True)
        schedule.set_timesteps(steps)
        times = gllcm.lcm_timesteps(steps, 1000)
        assert times == schedule.timesteps.tolist()
        for j, t in enumerate(times):
            limit = 2 + 0.025 * j
            again = LCMScheduler(num_train_timesteps=1000, clip_sample=True, clip_sample_range=limit)
            again.set_timesteps(steps)
            noise = torch.randn_like(theirs)
            with _injected([noise]):
                theirs = again.step(network(theirs, t), torch.tensor(t), theirs).prev_sample
            last = j == len(times) - 1
            to = signal.new_ones(()) if last else signal[times[j + 1]]
            ours = gllcm.lcm_step(ours, network(ours, t), None if last else noise, t, signal[t], to, limit)
        figures[f"lcm_{steps}"] = error(ours, theirs)

    options = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample_range": 2.0}
    ddpm = DDPMScheduler(num_train_timesteps=1000, **options)
    ddpm.set_timesteps(100)
    times = gllcm.ddpm_timesteps(100, 1000)
    assert times == ddpm.timesteps.tolist()
    theirs = ours = torch.randn(1, 4, 8, 8)
    for j, t in enumerate(times):
        noise = torch.randn_like(theirs)
        with _injected([noise], "scheduling_ddpm"):
            theirs = ddpm.step(network(theirs, t), t, theirs).prev_sample
        last = j == len(times) - 1
        to = signal.new_ones(()) if last else signal[times[j + 1]]
        ours = gllcm.ddpm_step(ours, network(ours, t), None if last else noise, signal[t], to, 2.0)
    figures["ddpm_100"] = error(ours, theirs)

    eps, noise = torch.randn(1, 8, 8, 8), torch.randn(1, 8, 8, 8)
    expected = 3 * eps + (1 - 3) * noise / torch.std(eps)
    figures["guidance"] = error(gllcm.enhance(eps, noise, 3), expected)
    return figures


@contextlib.contextmanager
def _injected(noise: list[Tensor], module: str = "scheduling_lcm") -> Iterator[None]:
    """diffusers draws these in turn."""
    scheduling = importlib.import_module(f"diffusers.schedulers.{module}")
    real, rest = scheduling.randn_tensor, iter(noise)
    scheduling.randn_tensor = lambda *a, **k: next(rest)
    try:
        yield
    finally:
        scheduling.randn_tensor = real


def blending() -> dict[str, float]:
    """Poisson blending against OpenCV's seamlessClone (8 bits) and against a direct solve of the sparse equations."""
    import cv2

    generator = torch.Generator().manual_seed(5)
    cxr, bs, mask = make_pairs(3, 192, generator)
    largest = direct = 0.0
    for source, target, held in zip((cxr * 0.8 + 0.1), bs, mask, strict=True):
        a, b = ((t[0] * 255).round().byte().numpy() for t in (source, target))
        binary = (held[0] * 255).byte().numpy()
        left, top, width, height = cv2.boundingRect(binary)
        colour = (cv2.cvtColor(t, cv2.COLOR_GRAY2BGR) for t in (a, b))
        centre = (left + width // 2, top + height // 2)
        theirs = cv2.seamlessClone(*colour, binary.copy(), centre, cv2.MONOCHROME_TRANSFER)[..., 0]
        given = (torch.from_numpy(t).double()[None, None] for t in (a, b))
        ours = fusion.poisson_blend(*given, held[None])[0, 0].clamp(0, 255)
        largest = max(largest, float((ours - torch.from_numpy(theirs)).abs().max()))
        edge = torch.rand(40, 50, generator=generator, dtype=torch.float64)
        laplacian = torch.randn(38, 48, generator=generator, dtype=torch.float64)
        direct = max(direct, error(fusion.solve_poisson(laplacian, edge), _direct(laplacian, edge)))
    return {"fusion_opencv_of_255": largest / 255, "fusion_direct": direct}


def _direct(laplacian: Tensor, edge: Tensor) -> Tensor:
    from scipy import sparse
    from scipy.sparse.linalg import spsolve

    h, w = edge.shape
    inner = np.zeros((h, w), bool)
    inner[1:-1, 1:-1] = True
    number = np.full((h, w), -1)
    number[inner] = np.arange(inner.sum())
    matrix = sparse.lil_matrix((inner.sum(), inner.sum()))
    right = laplacian.numpy().flatten().copy()
    for y, x in zip(*np.nonzero(inner), strict=True):
        row = number[y, x]
        matrix[row, row] = -4
        for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            if inner[y + dy, x + dx]:
                matrix[row, number[y + dy, x + dx]] = 1
            else:
                right[row] -= float(edge[y + dy, x + dx])
    solved = edge.clone()
    solved[1:-1, 1:-1] = torch.from_numpy(spsolve(matrix.tocsr(), right)).view(h - 2, w - 2)
    return solved


def scores(checkout: Path) -> dict[str, float]:
    """BSR, MSE, PSNR from their script on files, against ours."""
    sys.modules.setdefault("openpyxl", types.SimpleNamespace(Workbook=object))  # type: ignore[arg-type]
    with their_modules(checkout):
        theirs = importlib.import_module("metrics")
    cxr, bs, _ = make_pairs(1, 64, torch.Generator().manual_seed(6))
    made = (0.7 * bs + 0.3 * cxr + 0.03 * torch.randn(bs.shape, generator=torch.Generator().manual_seed(7))).clamp(0, 1)
    with tempfile.TemporaryDirectory() as folder:
        paths = {k: str(Path(folder) / f"{k}.png") for k in ("cxr", "bs", "made")}
        for key, picture in (("cxr", cxr), ("bs", bs), ("made", made)):
            Image.fromarray((picture[0, 0] * 255).round().byte().numpy()).save(paths[key])
        theirs.config.image_size = 64
        bsr = theirs.cal_BSR(paths["cxr"], paths["bs"], paths["made"])
        mse = theirs.cal_MSE(paths["bs"], paths["made"])
        psnr = theirs.cal_PSNR(paths["bs"], paths["made"])
    own = gllcm.mean_squared_error(made.double(), bs.double())
    return {
        "bsr": error(gllcm.bone_suppression_ratio(made.double(), bs.double(), cxr.double()), torch.tensor([bsr])),
        "mse": error(own, torch.tensor([float(mse)])),
        "psnr": error(gllcm.decibels(own), torch.tensor([psnr])),
    }


def script(checkout: Path) -> dict[str, float]:
    """Their evaluation script itself, on files, with their networks and injected noise, against ours.

    "script_global" and "script_local" are the decoded paths in floating point, the fused picture is on 8 bits.
    """
    size, steps = 128, 50
    ours, vqvae, net = pair(checkout, AUTOENCODER, UNET, size=size, steps=steps)
    with torch.no_grad():  # latents of a natural size, so that clipping is at work but not all there is
        for p in net.out[2].parameters():
            p.mul_(0.2)
        ours.load_state_dict(GLLCM.convert_state_dict({**vqvae.state_dict(), **net.state_dict()})[1])
    cxr, _, mask = make_pairs(1, size, torch.Generator().manual_seed(8))
    cxr = (cxr * 255).round() / 255
    alone = (gllcm.lungs_alone(cxr, mask) * 255).round() / 255
    shape = (1, 8, size // 4, size // 4)
    generator = torch.Generator().manual_seed(9)
    noise = {
        "start": [torch.randn(shape, generator=generator)],
        **{
            use: [torch.randn(shape, generator=generator) for _ in range(steps)] for use in ("guide", "global", "local")
        },
    }
    streams = {use: iter(values) for use, values in noise.items()}
    decoded: list[Tensor] = []

    with tempfile.TemporaryDirectory() as folder, their_modules(checkout):
        root = Path(folder)
        for name, picture in (("CXR", cxr), ("Masked_CXR", alone), ("Mask", mask)):
            (root / "SZCH-X-Rays" / name).mkdir(parents=True)
            pixels = (picture[0, 0] * 255).round().byte().numpy()
            Image.fromarray(pixels).save(root / "SZCH-X-Rays" / name / "0.png")
        for name in ("BS", "Masked_BS", "Fusion_BS"):
            (root / "lcm_output_bs" / name).mkdir(parents=True)
        (root / "SZCH.txt").write_text("0.png\n")
        sys.modules.setdefault("pandas", _small_pandas())
        config = importlib.import_module("config").config
        config.image_size = size
        evaluation = importlib.import_module("batch_lcm_eval")
        vqvae.decode, plain = _recording(vqvae.decode, decoded), vqvae.decode
        uses = iter(["start", *["guide"] * steps])
        steps_drawn = iter([u for _ in range(steps) for u in ("global", "local")][: 2 * steps])
        scheduling = importlib.import_module("diffusers.schedulers.scheduling_lcm")
        saved = torch.load, torch.randn_like, scheduling.randn_tensor, evaluation.tqdm, os.getcwd()
        torch.load = lambda name, *a, **k: vqvae if "VQGAN" in name else net  # type: ignore[assignment]
        torch.randn_like = lambda like: next(streams[next(uses)])[:, : like.shape[1]]  # type: ignore[assignment]
        scheduling.randn_tensor = lambda *a, **k: next(streams[next(steps_drawn)])
        evaluation.tqdm = lambda items, *a, **k: items
        os.chdir(root)
        try:
            with contextlib.redirect_stdout(None):
                evaluation.eval()
        finally:
            torch.load, torch.randn_like, scheduling.randn_tensor, evaluation.tqdm = saved[:4]  # type: ignore[assignment]
            os.chdir(saved[4])
            vqvae.decode = plain
        fused = np.asarray(Image.open(root / "lcm_output_bs/Fusion_BS/0.png").convert("L")).copy()

    again = {use: iter(values) for use, values in noise.items()}

    def draw(use: str, shape: tuple[int, ...]) -> Tensor:
        return next(again[use])[:, : shape[1]]

    own: list[Tensor] = []
    ours.decode = _recording(ours.decode, own)  # type: ignore[method-assign]
    with torch.no_grad():
        result = ours.restore(cxr, mask, steps, draw)
    return {
        "script_global": error(2 * own[0] - 1, decoded[0]),
        "script_local": error(2 * own[1] - 1, decoded[1]),
        "script_fused_of_255": float((result[0, 0] * 255 - torch.from_numpy(fused)).abs().max()) / 255,
    }


def _recording(call: Callable[[Tensor], Tensor], results: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def recorded(x: Tensor) -> Tensor:
        results.append(call(x))
        return results[-1]

    return recorded


def _small_pandas() -> Any:
    """``read_csv`` of a list of names, which is all that their dataset asks of pandas."""

    class Rows:
        def __init__(self, names: list[str]):
            self.names, self.iloc = names, self

        def __len__(self) -> int:
            return len(self.names)

        def __getitem__(self, place: tuple[int, int]) -> str:
            return self.names[place[0]]

    module = types.ModuleType("pandas")
    module.read_csv = lambda path, **_: Rows(Path(path).read_text().split())  # type: ignore[attr-defined]
    return module


# ---- recorded tensors ---------------------------------------------------------------------------------------------


def planted(index: int, shape: tuple[int, ...]) -> Tensor:
    """Weights from a formula, so that a recording need not hold them: sines of a scale that keeps activations even."""
    count = int(np.prod(shape))
    waves = torch.sin(1.618 * torch.arange(count, dtype=torch.float64) + index)
    scale = 1.5 / float(np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.3
    return (scale * waves).float().view(shape)


def golden(checkout: Path) -> dict[str, Tensor]:
    """Names and shapes of the authors' tensors (``shape.*``), whose values are `planted` in the names' order; inputs,
    and their networks' outputs, loss and small gradients, their scheduler's samples and OpenCV's blending."""
    import cv2
    from diffusers import LCMScheduler

    torch.manual_seed(0)
    autoencoder = {"num_channels": (4, 6), "num_res_channels": 5, "num_res_layers": 1, "num_embeddings": 16}
    unet = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (2,)}
    vqvae, net = their_autoencoder(autoencoder).eval(), their_unet(checkout, unet).eval()
    state = {**vqvae.state_dict(), **net.state_dict()}
    weights = {key: planted(i, tuple(state[key].shape)) for i, key in enumerate(sorted(state))}
    vqvae.load_state_dict({key: weights[key] for key in vqvae.state_dict()})
    net.load_state_dict({key: weights[key] for key in net.state_dict()})
    found = {f"shape.{key}": torch.tensor(value.shape, dtype=torch.int32) for key, value in state.items()}

    cxr, bs, mask = make_pairs(2, 64, torch.Generator().manual_seed(0))
    with torch.no_grad():
        codes = vqvae.encode_stage_2_inputs(2 * cxr - 1)
        found |= {"cxr": cxr, "mask": mask, "codes": codes, "decoded": vqvae.decode(codes)}
    x, t, noise = torch.randn(2, 8, 8, 8), torch.tensor([11, 790]), torch.randn(2, 4, 8, 8)
    scheduler = LCMScheduler(num_train_timesteps=1000)
    noisy = scheduler.add_noise(x, torch.cat((noise, torch.zeros_like(noise)), 1), t)
    estimate = net(noisy, t)
    loss = F.mse_loss(estimate[:, :4], noise)
    loss.backward()
    found |= {"x": x, "t": t, "noise": noise, "estimate": estimate.detach(), "loss": loss.detach()}
    small = {n: p.grad for n, p in net.named_parameters() if p.grad is not None and p.numel() <= 256}
    found |= {f"gradient.{n}": g for n, g in small.items() if float(g.abs().max()) > 1e-4}

    scheduler.set_timesteps(10)
    draws = torch.randn(11, 1, 4, 8, 8)
    sample = draws[10]
    for j, step in enumerate(scheduler.timesteps):
        clipped = LCMScheduler(num_train_timesteps=1000, clip_sample=True, clip_sample_range=2 + 0.025 * j)
        clipped.set_timesteps(10)
        with _injected([draws[j]]):
            sample = clipped.step(torch.tanh(sample), step, sample).prev_sample
    found |= {"draws": draws, "sampled": sample}

    source, target = ((p[0, 0] * 255).round().byte() for p in (cxr, bs))
    binary = (mask[0, 0] * 255).byte().numpy()
    left, top, width, height = cv2.boundingRect(binary)
    colour = (cv2.cvtColor(p.numpy(), cv2.COLOR_GRAY2BGR) for p in (source, target))
    blended = cv2.seamlessClone(*colour, binary.copy(), (left + width // 2, top + height // 2), cv2.MONOCHROME_TRANSFER)
    found |= {"source": source, "target": target, "blended": torch.from_numpy(blended[..., 0].copy())}
    return found


# ---- speed --------------------------------------------------------------------------------------------------------


def speed(
    checkout: Path | None, device: str = "cpu", size: int = 256, rounds: int = 3, width: int = 128
) -> dict[str, dict[str, float]]:
    """At size x size and the paper's widths, median ms and MiB: a sampler's step of both paths; decoding both; blending
    at 1024 x 1024 (theirs by OpenCV); a training step of the estimator (one pair, whole and lungs; ``recompute`` off
    and on; without the optimiser) and its forward pass alone, whose MiB are what is kept for the backward pass, where
    the whole step's are 1.5 GiB of gradients; a step of the autoencoder (one pair of 128 x 128).

    What gained: both paths in one pass of the network, whose weights are then read and reordered once (all of the
    sampler's gain on a CPU, for more than twice the activations); one scale and shift for norm and time, attention
    without recomputing (the estimator's step); selective recomputing, which keeps convolutions' outputs only (its
    memory); a direct solve for one channel (blending). Decoding and the autoencoder's step are bare convolutions on
    either side: nothing gained.
    """
    unet = {**PAPER_UNET, "model_channels": width}
    side = size // 8
    figures: dict[str, dict[str, float]] = {}
    torch.manual_seed(0)
    if checkout is None:
        ours, theirs, vqvae = GLLCM(size=size, width=width), None, None
    else:
        ours, vqvae, theirs = pair(checkout, PAPER_AUTOENCODER, unet, size=size)
        theirs.to(device)
        vqvae.to(device)
    ours.to(device)
    x, condition = torch.randn(2, 2, 4, side, side, device=device)
    t = torch.tensor([500], device=device)

    def own_step() -> None:
        with torch.no_grad():
            ours(x, condition, t.expand(2))

    def apart() -> None:
        with torch.no_grad():
            for i in range(2):
                ours(x[i : i + 1], condition[i : i + 1], t)

    def their_step() -> None:
        with torch.no_grad():
            for i in range(2):
                theirs(torch.cat((x[i : i + 1], condition[i : i + 1]), 1), t)

    def turns(
        own: Callable[[], None], other: Callable[[], None] | None, **more: Callable[[], None]
    ) -> dict[str, float]:
        calls = {"ours": own, **more}
        return in_turns(calls if other is None else {**calls, "authors": other}, device, rounds)

    figures["sampler_step"] = turns(own_step, None if theirs is None else their_step, without_one_pass=apart)

    def own_decode() -> None:
        with torch.no_grad():
            for latent in x.split(1):
                ours.decode(latent)

    def their_decode() -> None:
        with torch.no_grad():
            for latent in x.split(1):
                vqvae.decode(latent)

    figures["decode"] = turns(own_decode, None if vqvae is None else their_decode)

    noise, steps = torch.randn_like(x), t.expand(2)

    def own_train(recompute: bool, backward: bool = True) -> Callable[[], None]:
        def run() -> None:
            ours.net.recompute = recompute
            loss = ours.noise_loss(x, condition, noise, steps)
            if backward:
                loss.backward()
                ours.net.zero_grad()

        return run

    def their_train(backward: bool = True) -> Callable[[], None]:
        def run() -> None:
            signal = ours.signal[steps].view(-1, 1, 1, 1)
            noisy = torch.cat((signal.sqrt() * x + (1 - signal).sqrt() * noise, signal.sqrt() * condition), 1)
            loss = F.mse_loss(theirs(noisy, steps)[:, :4], noise)
            if backward:
                loss.backward()
                theirs.zero_grad()

        return run

    for name, backward in (("train_step", True), ("train_forward", False)):
        other = None if theirs is None else their_train(backward)
        figures[name] = turns(own_train(False, backward), other, ours_recompute=own_train(True, backward))
    ours.net = None
    figures["autoencoder_step"] = turns(*_autoencoder_steps(vqvae, 128, device))
    if device == "cpu" and checkout is not None:
        figures["blend_1024"] = turns(*_blends())
    return figures


def _autoencoder_steps(vqvae: Any, size: int, device: str) -> tuple[Callable[[], None], Callable[[], None] | None]:
    """A step of the first stage on one pair (four pictures), perceptual loss on random weights of VGG-16."""
    ours = GLLCM(stage="autoencoder", size=size, mult=[1]).train().to(device)
    generator = torch.Generator().manual_seed(0)
    lines = [torch.rand(c, generator=generator) / c for c in (64, 128, 256, 512, 512)]
    ours._perceptual.append(Perceptual(VGG(**VGG16).to(device), lines))
    cxr, bs, mask = make_pairs(1, size, generator)
    pictures = ours.pictures({"cxr": cxr, "bs": bs, "mask": mask}).to(device)
    optimizers, _ = ours.configure_optimizers()

    def own() -> None:
        loss, made, _ = ours.autoencoder_loss(pictures)
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        critic_loss = ours.critic_loss(pictures, made)
        optimizers[1].zero_grad()
        critic_loss.backward()
        optimizers[1].step()

    if vqvae is None:
        return own, None
    import lpips
    from generative.losses import PatchAdversarialLoss
    from generative.networks.nets import PatchDiscriminator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        perceptual = lpips.LPIPS(pretrained=True, net="vgg", pnet_rand=True, verbose=False).to(device)
    critic = PatchDiscriminator(spatial_dims=2, in_channels=1, num_layers_d=3, num_channels=64).train().to(device)
    adversarial = PatchAdversarialLoss(criterion="least_squares")
    vqvae.train()
    first, second = torch.optim.Adam(vqvae.parameters(), lr=1e-4), torch.optim.Adam(critic.parameters(), lr=5e-4)

    def other() -> None:
        first.zero_grad()
        made, commitment = vqvae(images=pictures)
        loss = F.mse_loss(made, pictures) + commitment + 0.001 * perceptual(made, pictures).mean()
        loss = loss + 0.01 * adversarial(critic(made)[-1], target_is_real=True, for_discriminator=False)
        (loss + 1 - gllcm.ms_ssim(made, pictures)).backward()
        first.step()
        second.zero_grad()
        false = adversarial(critic(made.detach())[-1], target_is_real=False, for_discriminator=True)
        true = adversarial(critic(pictures)[-1], target_is_real=True, for_discriminator=True)
        (0.01 * (false + true) * 0.5).backward()
        second.step()

    return own, other


def _blends() -> tuple[Callable[[], None], Callable[[], None]]:
    """Blending at 1024 x 1024, from and to tensors of this range."""
    import cv2

    cxr, bs, mask = make_pairs(1, 1024, torch.Generator().manual_seed(0))

    def own() -> None:
        fusion.poisson_blend(cxr, bs, mask)

    def other() -> None:
        binary = (mask[0, 0] * 255).byte().numpy()
        left, top, width, height = cv2.boundingRect(binary)
        colour = (cv2.cvtColor((p[0, 0] * 255).byte().numpy(), cv2.COLOR_GRAY2BGR) for p in (cxr, bs))
        cv2.seamlessClone(*colour, binary, (left + width // 2, top + height // 2), cv2.MONOCHROME_TRANSFER)

    return own, other
