"""A clip of a skeleton as a picture: a row of frames, bones as lines. Needs matplotlib (extra ``plots``)."""

from pathlib import Path

import numpy as np
from torch import Tensor

from zoo.core import ZooError
from zoo.core.files import atomic_write
from zoo.graph.skeleton.data_skeleton import LAYOUTS


def draw(clip: Tensor, layout: str, path: str | Path, frames: int = 8, title: str = "") -> Path:
    """Draw ``frames`` frames of a clip, evenly spread, the first and the last among them.

    The root joint of the layout (the one that is nobody's child) is marked. People who are all zeros are left out.

    Args:
        layout: a key of ``LAYOUTS``: "ntu", "openpose" or "jhmdb".
        path: the picture; its ending says the format (.png, .svg, .pdf).
    Shapes:
        clip: (c, t, v) or (c, t, v, m), c >= 2: x to the right, y up for "ntu", down for the others (pixels)
    Raises:
        ValueError: for an unknown layout or a clip that does not fit it.
        ZooError: if matplotlib is not installed.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; it must be one of {', '.join(LAYOUTS)}.")
    joints, edges = LAYOUTS[layout]
    clip = clip[..., None] if clip.ndim == 3 else clip
    if clip.ndim != 4 or clip.shape[0] < 2 or clip.shape[2] != joints or clip.shape[1] < 1 or frames < 1:
        raise ValueError(
            f"The clip has shape {tuple(clip.shape)}; layout {layout!r} needs (c >= 2, frames >= 1, {joints}, people)."
        )
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, no global state
        from matplotlib.collections import LineCollection
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ZooError("Drawing a skeleton needs matplotlib: pip install 'paper-zoo[plots]'.") from error
    children = {child for child, _ in edges}
    root = next(joint for joint in range(joints) if joint not in children)
    people = clip[:2].detach().cpu().numpy().transpose(3, 1, 2, 0)  # (m, t, v, 2)
    people = people[np.abs(people).sum((1, 2, 3)) > 0]
    chosen = np.unique(np.linspace(0, clip.shape[1] - 1, frames).round().astype(int))
    figure = Figure(figsize=(1.6 * len(chosen), 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    low, high = (people.min((0, 1, 2)), people.max((0, 1, 2))) if len(people) else (np.zeros(2), np.ones(2))
    margin = 0.08 * max(float((high - low).max()), 1e-6)
    for place, frame in enumerate(chosen):
        axis = figure.add_subplot(1, len(chosen), place + 1)
        for person in people[:, frame]:
            axis.add_collection(LineCollection([person[list(edge)] for edge in edges], linewidths=2, color="0.35"))
            axis.scatter(*person.T, s=10, color="tab:blue", zorder=2)
            axis.scatter(*person[root], s=28, color="tab:orange", zorder=3)
        axis.set(xlim=(low[0] - margin, high[0] + margin), ylim=(low[1] - margin, high[1] + margin), aspect="equal")
        if layout != "ntu":
            axis.invert_yaxis()
        axis.set_axis_off()
        axis.set_title(f"frame {frame}", fontsize=8)
    if title:
        figure.suptitle(title)
    path = Path(path)
    with atomic_write(path) as part:
        figure.savefig(part, dpi=110, format=path.suffix.lstrip(".") or "png")
    return path
