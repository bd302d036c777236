"""Draw what is measured: `python -m benchmarks.pictures [NAME ...]` writes docs/NAME.png from results/ and data.

n2_cost         time of N2's forward pass over the number of nodes (results/N2.json, written by `benchmarks speed N2`)
restruct_acm    the meta-structure that hub/restruct-acm was trained along
stigcn_clips    test clips of JHMDB with what hub/stigcn-jhmdb says of them (needs $ZOO_DATA/jhmdb)
gallery         before, after, reference: what every checkpoint under hub/ that turns pictures into pictures makes of
                photographs, as gallery.png beside its card; of those that magnify motion, a clip
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from zoo.core import catalogue, load, results

DOCS = Path(__file__).resolve().parents[1] / "docs"
HUB = DOCS.parent / "hub"
SHOWN: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = dict.fromkeys(
    ("regformer-small", "realrain1k-small", "blinddiff-x2"), ({"patch": 144}, (17, 21))
)
"""Of a checkpoint: options of its data, for larger cut-outs than those it is measured on, and which of them to show."""
MIN_WIDTH = 400
"""Galleries of smaller pictures are enlarged, pixel by pixel, to at least so many."""


def n2_cost(path: Path) -> None:
    from matplotlib.figure import Figure

    figures = results.read("N2")["speed"]["figures"]
    sizes = sorted(int(key.split("_")[1]) for key in figures if key.startswith("forward_"))
    times = [figures[f"forward_{n}_nodes"]["ours_ms"] for n in sizes]
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axis = figure.add_subplot()
    axis.plot(sizes, times, "o-", label="N2, 256 pseudo nodes, 4 steps")
    slope = (times[-1] - times[0]) / (sizes[-1] - sizes[0])
    line = [times[0] + slope * (n - sizes[0]) for n in sizes]
    axis.plot(sizes, line, ":", color="0.4", label=f"straight line, {1e3 * slope:.1f} µs a node")
    axis.set(
        xlabel="nodes (five edges a node)", ylabel="forward pass, ms, one CPU thread", ylim=(0, None), xlim=(0, None)
    )
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)


def stigcn_clips(path: Path) -> None:
    import torch

    from zoo.graph import SkeletonActionDataModule
    from zoo.graph.skeleton.drawing import draw

    data = SkeletonActionDataModule(str(Path(os.environ["ZOO_DATA"]) / "jhmdb"), layout="jhmdb", persons=1)
    data.setup("test")
    model = load(DOCS.parent / "hub" / "stigcn-jhmdb")
    batch = next(iter(data.test_dataloader()))
    probability = torch.as_tensor(model.predict(batch["skeleton"]))
    sure = int(probability.max(1).values.argmax())
    said, truth = int(probability[sure].argmax()), int(batch["label"][sure])
    title = f"{batch['name'][sure]}: action {truth}, predicted {said} ({probability[sure, said]:.2f})"
    draw(batch["skeleton"][sure], "jhmdb", path, title=title)


def restruct_acm(path: Path) -> None:
    load(DOCS.parent / "hub" / "restruct-acm").draw(path)


def montage(folder: Path, path: Path) -> None:
    """Before, after and, where there is one, reference of a checkpoint, on the embedded test photographs: those come
    with scikit-image and scikit-learn, may be shown, and no method trains on them."""
    import torch

    from zoo.vision.restoration.linear_light import display
    from zoo.vision.restoration.photos import read_picture, side_by_side, write_picture

    model = load(folder)
    options, rows = SHOWN.get(folder.name, ({}, (0, 1)))
    data = catalogue.load_datamodule(type(model).__name__)(**options)
    pictures = data.dataset("test")
    batch = data.collate([pictures[row] for row in rows])
    given = batch[data.given]
    if hasattr(data, "curve"):  # linear light
        given = [display(picture, data.curve) for picture in given]

    def written(values: dict[str, Any]) -> list[list[torch.Tensor]]:
        """What ``zoo predict`` would leave of each picture."""
        with tempfile.TemporaryDirectory() as place:
            data.write([values], Path(place))
            return [[read_picture(file) for file in data.targets(name, Path(place))] for name in values["name"]]

    made = written(model.predict_step(batch, 0))
    best = [[picture] for picture in batch[model.wanted]] if hasattr(model, "wanted") else written(batch)
    lines = [side_by_side([given[i], *made[i], *best[i]]) for i in range(len(rows))]
    gap = torch.ones(3, 4, lines[0].shape[-1])
    whole = torch.cat([piece for line in lines for piece in (gap, line)][1:], 1)
    times = -(-MIN_WIDTH // whole.shape[-1])
    write_picture(whole.repeat_interleave(times, 1).repeat_interleave(times, 2), path)


def magnified_clip(folder: Path, path: Path) -> None:
    """A disc that swings by a third of a pixel, as given, ten times as far by the checkpoint, and in truth, above one
    of their rows over time; as an animated PNG."""
    import torch
    from PIL import Image

    from zoo.vision.restoration.photos import side_by_side
    from zoo.vision.video.data_motion_magnification import vibration

    factor, way, size, width = 10.0, 0.3, 160, 192
    model = load(folder)
    given, truth = (vibration(size=size, width=width, way=by) for by in (way, factor * way))
    clips = [given, torch.stack(list(model.magnify(given, factor))), truth]
    # the middle row, a frame below another, each three pixels high
    rows = [clip[:, :, size // 2].permute(1, 0, 2).repeat_interleave(3, 1) for clip in clips]
    below = side_by_side(rows)
    line = torch.ones(3, 4, below.shape[-1])
    frames = []
    for t in range(10):  # one period of three a second, at thirty frames a second
        whole = torch.cat([side_by_side(clip[t] for clip in clips), line, below], 1)
        pixels = (255 * whole).round().byte().permute(1, 2, 0).numpy()
        frames.append(Image.fromarray(pixels).quantize(128, dither=Image.Dither.NONE))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=66, loop=0)


def gallery(path: Path) -> None:
    """Into the folders of the checkpoints, not to ``path``."""
    for name in catalogue.names():
        if hasattr(catalogue.load_class(name), "magnify"):
            draw = magnified_clip
        elif hasattr(catalogue.load_datamodule(name), "given"):
            draw = montage
        else:
            continue
        for point in catalogue.facts(name).get("checkpoints", []):
            if point["status"] == "local":
                draw(HUB / point["path"], HUB / point["path"] / "gallery.png")
                print(HUB / point["path"] / "gallery.png")


ALL = {
    "n2_cost": n2_cost,
    "restruct_acm": restruct_acm,
    "stigcn_clips": stigcn_clips,
    "gallery": gallery,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or ALL:
        ALL[name](DOCS / f"{name}.png")
        if name != "gallery":
            print(DOCS / f"{name}.png")
