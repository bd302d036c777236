"""A method of the zoo in a plain PyTorch loop: no Trainer, no callbacks, your own optimiser and loss.

    python examples/plain_pytorch_loop.py [--steps N] [--out FOLDER]

Any DataLoader that yields the documented keys would do in place of ours.
"""

import argparse
from pathlib import Path

import torch
from torch.nn import functional as F

from zoo.vision import DerainDataModule, Regformer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("plain"), help="folder that the weights are saved in")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    model = Regformer.from_variant("tiny").to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DerainDataModule(batch_size=4, patch=32).train_dataloader()
    step = 0
    while step < args.steps:
        for batch in loader:
            loss = F.l1_loss(model(batch["rainy"].to(device)), batch["clean"].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % 5 == 0 or step == args.steps:
                print(f"step {step}: loss {loss.item():.4f}")
            if step == args.steps:
                break

    model.save_pretrained(args.out)
    again = Regformer.from_pretrained(args.out).to(device)
    picture = batch["rainy"][:1].to(device)
    print("saved, loaded and equal:", torch.equal(again.predict(picture), model.predict(picture)))


if __name__ == "__main__":
    main()
