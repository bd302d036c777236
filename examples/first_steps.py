"""Fine-tune a small Regformer on the embedded rain set, save it in Hub format, and draw before / after.

    python examples/first_steps.py [--out first_steps] [--steps N]

Under two minutes on two CPU cores; any accelerator is used where there is one.
"""

import argparse
from pathlib import Path

import lightning
import torch

from zoo import Trainer
from zoo.core.command import quiet
from zoo.vision import DerainDataModule, Regformer

STEPS = 100
SMALL = Path(__file__).resolve().parent.parent / "hub" / "regformer-small"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("first_steps"), help="folder for everything that is written")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    quiet()
    lightning.seed_everything(0, verbose=False)

    data = DerainDataModule(batch_size=8)
    model = Regformer.from_pretrained(SMALL, lr=3e-4)
    trainer = Trainer(
        args.out / "run",
        max_steps=args.steps,
        check_val_every_n_epoch=2,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)

    scores = trainer.test(model, datamodule=data, ckpt_path="best", verbose=False)[0]
    folder = model.save_pretrained(
        args.out / "my-regformer",
        metrics={k: v for k, v in scores.items() if k in ("test/psnr", "test/ssim")},
        dataset="the embedded rain set: generated rain on bundled photographs",
        recipe=f"python examples/first_steps.py --steps {args.steps}",
    )
    picture = before_after(Regformer.from_pretrained(folder), data, args.out / "before_after.png")
    print(f"checkpoint in Hub format: {folder}\nbefore / after / reference: {picture}")
    print(f"rainy {scores['test/psnr_rainy']:.2f} dB -> derained {scores['test/psnr']:.2f} dB")


def before_after(model: Regformer, data: DerainDataModule, path: Path, count: int = 3) -> Path:
    """Draw rainy, derained and clean pictures side by side, three times enlarged."""
    from PIL import Image

    batch = next(iter(data.test_dataloader()))
    rainy, clean = batch["rainy"][:count], batch["clean"][:count]
    columns = torch.cat([rainy, model.predict(rainy).cpu(), clean], dim=3)  # (count, 3, h, 3 w)
    sheet = torch.cat(list(columns), dim=1).permute(1, 2, 0)
    image = Image.fromarray((sheet * 255).round().to(torch.uint8).numpy())
    image.resize((image.width * 3, image.height * 3), Image.Resampling.NEAREST).save(path)
    return path


if __name__ == "__main__":
    main()
