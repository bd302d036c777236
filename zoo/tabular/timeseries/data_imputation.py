"""Windows of multivariate time series with values hidden from the model, and users' own CSV files completed."""

import csv
import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from zoo.core import ZooDataModule, ZooError, atomic_write, seed_from

log = logging.getLogger(__name__)

PATTERNS = ("point", "subseq", "block")
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?", "-"})
TIME_NAMES = frozenset({"", "date", "time", "datetime", "timestamp", "index", "day", "month"})
ETT_MONTHS = (14, 5, 5)  # BenchPOTS: training, validation, test


# ---- which values go missing ----------------------------------------------------------------------------------------


def hide(
    shape: tuple[int, int, int],
    rate: float,
    pattern: str,
    generator: torch.Generator,
    block_len: int | None = None,
    block_width: int | None = None,
) -> Tensor:
    """Draw which entries of ``shape`` = (windows, steps, channels) go missing.

    * ``point``: every entry by itself with probability ``rate`` (missing completely at random).
    * ``subseq``: runs of ``block_len`` steps in one channel. As in PyGrinder's ``seq_missing``, ceil(series * rate *
      steps / block_len) runs are dealt out over all series; where that is more than one a series, a series gets
      several that do not overlap.
    * ``block``: rectangles of ``block_len`` steps by ``block_width`` neighbouring channels, as in PyGrinder's
      ``block_missing``. They may overlap, so every window takes as many as bring it nearest to ``rate`` (PyGrinder's
      ``factor`` is not the rate that results).

    Args:
        rate: share that goes missing, in [0, 1).
        block_len: steps of a run or rectangle; None is an eighth of the window.
        block_width: channels of a rectangle; None is half of them.
    Returns:
        (windows, steps, channels) bool, True = hidden.
    Raises:
        ValueError: for a rate, pattern or block that does not fit the window.
    """
    windows, steps, channels = shape
    if not 0 <= rate < 1:
        raise ValueError(f"rate={rate}; the share of missing values lies in [0, 1).")
    if pattern not in PATTERNS:
        raise ValueError(f"pattern={pattern!r}; choose one of {', '.join(PATTERNS)}.")
    if rate == 0:
        return torch.zeros(shape, dtype=torch.bool)
    if pattern == "point":
        return torch.rand(shape, generator=generator) < rate

    length = max(1, steps // 8) if block_len is None else block_len
    width = max(1, channels // 2) if block_width is None else block_width
    if not 1 <= length <= steps or not 1 <= width <= channels:
        raise ValueError(
            f"A block of {length} steps and {width} channels does not fit a window of {steps} and {channels}."
        )
    draw = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    if pattern == "subseq":
        return torch.from_numpy(_runs(windows, steps, channels, rate, length, draw))
    return torch.from_numpy(_rectangles(windows, steps, channels, rate, length, width, draw))


def _runs(windows: int, steps: int, channels: int, rate: float, length: int, draw: np.random.Generator) -> np.ndarray:
    series = windows * channels
    fit = steps // length
    runs = math.ceil(series * rate * steps / length)
    if runs > series * fit:
        raise ValueError(
            f"rate={rate} with runs of {length} steps: at most {fit} such runs fit a window of {steps} without "
            f"overlap, a rate of {fit * length / steps:.2f}. Give a shorter block_len."
        )
    each, more = divmod(runs, series)
    count = np.full(series, each)
    count[draw.permutation(series)[:more]] += 1
    hidden = np.zeros((series, steps), dtype=bool)
    for k in np.unique(count[count > 0]):
        rows = np.nonzero(count == k)[0]
        # k runs leave steps - k * length free steps; sorted draws with repetition place the runs among them
        free = steps - k * length
        gaps = np.sort(np.argsort(draw.random((len(rows), free + k)), axis=1)[:, :k], axis=1) - np.arange(k)
        starts = gaps + length * np.arange(k)
        at = (starts[:, :, None] + np.arange(length)).reshape(len(rows), -1)
        hidden[rows[:, None], at] = True
    return hidden.reshape(windows, channels, steps).transpose(0, 2, 1).copy()


def _rectangles(
    windows: int, steps: int, channels: int, rate: float, length: int, width: int, draw: np.random.Generator
) -> np.ndarray:
    hidden = np.zeros((windows, steps, channels), dtype=bool)
    goal = rate * steps * channels
    for window in hidden:
        while (size := int(window.sum())) < goal:
            before = window.copy()
            row, column = draw.integers(steps - length + 1), draw.integers(channels - width + 1)
            window[row : row + length, column : column + width] = True
            after = int(window.sum())
            if after > goal and after - goal > goal - size:  # the window was nearer without this one
                window[:] = before
                break
    return hidden


# ---- files ----------------------------------------------------------------------------------------------------------


@dataclass
class Table:
    """A CSV as its owner wrote it, and its numbers.

    Attributes:
        header: column names; rows: all cells as text; delimiter: what stood between them.
        columns: indices of the columns that are series; values: (rows, series) float64, NaN = missing.
        months: ``YYYY-MM`` of every row, or None where the first column holds no ISO dates.
    """

    header: list[str]
    rows: list[list[str]]
    delimiter: str
    columns: list[int]
    values: np.ndarray
    months: list[str] | None


def read_table(path: Path, missing_code: float | None = None) -> Table:
    """Read a CSV with one header line: a column of times (optional) and columns of numbers, gaps left empty or NaN.

    A column named like a time (date, time, timestamp, index, ...) or holding text is no series; it is kept as it is.

    Raises:
        ValueError: saying the line and what is wrong there.
    """
    with open(path, newline="", encoding="utf-8-sig") as stream:
        first = stream.readline()
        delimiter = max(",;\t|", key=first.count)
        stream.seek(0)
        lines = [line for line in csv.reader(stream, delimiter=delimiter) if line]
    if len(lines) < 2:
        raise ValueError("it has no rows below the header line")
    header, rows = lines[0], lines[1:]
    if all(_number(cell) is not None for cell in header):
        raise ValueError("its first line holds numbers; a header line with the columns' names is needed")
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f"line {i + 2} has {len(row)} cells, the header {len(header)}")
    columns, series = [], []
    for j, name in enumerate(header):
        if name.strip().lower() in TIME_NAMES:
            continue
        numbers = [_number(row[j]) for row in rows]
        if None in numbers:
            continue  # text
        if math.inf in numbers or -math.inf in numbers:
            raise ValueError(f"column {name!r} holds an infinite value; leave missing cells empty")
        columns.append(j)
        series.append(numbers)
    if not columns:
        raise ValueError("it has no column of numbers")
    values = np.array(series, dtype=np.float64).T.copy()
    if missing_code is not None:
        values[values == missing_code] = np.nan
    months = [row[0][:7] for row in rows]
    dated = 0 not in columns and all(re.fullmatch(r"\d{4}-\d{2}", month) for month in months)
    return Table(header, rows, delimiter, columns, values, months if dated else None)


def _number(cell: str) -> float | None:
    """A cell as a number, NaN where it is empty or says so, None where it is text."""
    try:
        return float(cell)
    except ValueError:
        return math.nan if cell.strip().lower() in MISSING else None


def split_rows(table: Table, split: Iterable[float]) -> list[slice]:
    """Rows of training, validation and test, in time: counts of calendar months (integers) or shares (fractions).

    Raises:
        ValueError: if months are asked for without dates, or the numbers do not fit.
    """
    parts = list(split)
    if len(parts) != 3 or min(parts) <= 0:
        raise ValueError(f"split={parts}; give three positive numbers: training, validation, test.")
    if all(float(p).is_integer() for p in parts):
        if table.months is None:
            raise ValueError(
                f"split={parts} counts months, but the first column holds no dates such as 2016-07-01. "
                "Give shares, such as split=[0.7, 0.1, 0.2]."
            )
        starts = [0] + [i for i in range(1, len(table.months)) if table.months[i] != table.months[i - 1]]
        if len(starts) < 3:
            raise ValueError(f"The table covers {len(starts)} months; give shares, such as split=[0.7, 0.1, 0.2].")
        cuts = [starts[min(int(sum(parts[: i + 1])), len(starts) - 1)] for i in range(2)]
    else:
        if sum(parts) > 1 + 1e-9:
            raise ValueError(f"split={parts} sums to {sum(parts):g}; shares sum to 1, months are integers.")
        rows = len(table.rows)
        cuts = [round(rows * sum(parts[: i + 1])) for i in range(2)]
    end = len(table.rows) if all(float(p).is_integer() for p in parts) else round(len(table.rows) * sum(parts))
    return [slice(0, cuts[0]), slice(cuts[0], cuts[1]), slice(cuts[1], end)]


# ---- datasets -------------------------------------------------------------------------------------------------------


class Windows(Dataset):
    """Windows with known values, some of them hidden once and for all, and in training others hidden at every draw."""

    def __init__(self, values: Tensor, hidden: Tensor, names: list[str], starts: list[int], fresh: float):
        known = ~values.isnan()
        self.values = torch.where(known, values, torch.zeros_like(values)).float()
        self.known, self.seen = known, known & ~hidden
        self.names, self.starts, self.fresh = names, starts, fresh

    def __len__(self) -> int:
        return len(self.values)

    def batch(self, indices: list[int], generator: torch.Generator) -> dict[str, Any]:
        values, seen = self.values[indices], self.seen[indices]
        # Training: what is left of the window is the target, a fresh part of it is hidden from the model. Otherwise
        # the whole window is the target.
        known = seen if self.fresh else self.known[indices]
        if self.fresh:
            seen = seen & (torch.rand(seen.shape, generator=generator) >= self.fresh)
        return {
            "x": values * seen,
            "mask": seen.float(),
            "target": values * known,
            "target_mask": known.float(),
            "name": [self.names[i] for i in indices],
            "start": torch.tensor([self.starts[i] for i in indices]),
        }


class OwnWindows(Dataset):
    """Windows that cover users' tables end to end; the last one is flush with the end, a short table is padded."""

    def __init__(self, tables: dict[str, Table], steps: int):
        self.tables, self.steps = tables, steps
        self.places = [
            (name, start)
            for name, table in tables.items()
            for start in [*range(0, len(table.rows) - steps, steps), max(len(table.rows) - steps, 0)]
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, start = self.places[index]
        values = torch.from_numpy(self.tables[name].values[start : start + self.steps]).float()
        length = len(values)
        values = torch.cat([values, values.new_full((self.steps - length, values.shape[1]), math.nan)])
        seen = ~values.isnan()
        filled = torch.where(seen, values, torch.zeros_like(values))
        return {"x": filled, "mask": seen.float(), "name": name, "start": start, "length": length}


class TimeSeriesImputationDataModule(ZooDataModule):
    """Multivariate time series with missing values.

    Batch: "x" (b, t, n) float, what the model may see, in the units of the data and 0 elsewhere; "mask" (b, t, n)
    float, 1 where it may see; "target" (b, t, n) float, all that is known; "target_mask" (b, t, n) float, 1 where it
    is known; "name" list[str]; "start" (b,) int, the first row of the window. In training, "target" is what the
    missing pattern leaves and "mask" hides a further share ``hidden`` of it, drawn afresh every epoch; in validation
    and test, "target" is the truth and "mask" what the pattern leaves.

    root=None: 600/100/200 windows of 48 steps and 6 channels: sums of three sinusoids whose frequencies the channels
    of a window share (2 to 10 cycles per 96 steps), amplitudes and phases fixed by channel, noise 0.1.

    root=DIR: one CSV in the layout of https://github.com/zhouhaoyi/ETDataset (DIR/ETTh1.csv; CC BY-ND 4.0): a header
    line, a first column of times, columns of numbers, gaps left empty or NaN. Any CSV of one's own will do.

    Users' own files: a CSV, or a folder of them, with the columns that the model was trained on, in that order; it
    comes back completed, every cell that held something as it was.

    Args:
        batch_size: windows a batch.
        file: the CSV under ``root``; None where there is only one.
        n_steps: length t of a window; None is 96, for the embedded set 48.
        rate: share of the values that go missing, in [0, 1), in training, validation and test. With 0 (a table with
            gaps of its own), validation and test still hide a share ``hidden`` at random, to have something to score.
        pattern: ``point``, ``subseq`` or ``block``; see `hide`.
        block_len: steps of a run or block; None is an eighth of the window.
        block_width: channels of a block; None is half of them.
        hidden: share of what is left that is hidden from the model in training, the target to learn from.
        split: training, validation, test: months (integers) or shares of the rows; None is BenchPOTS' 14, 5, 5 months
            for files named ETT*, else 0.7, 0.1, 0.2.
        stride: steps between training windows; None is ``n_steps``, no overlap.
        missing_code: a number that stands for a missing value, such as -200 in AirQuality.
    """

    embedded = "windows of sinusoids with shared frequencies"

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        file: str | None = None,
        n_steps: int | None = None,
        rate: float = 0.1,
        pattern: str = "point",
        block_len: int | None = None,
        block_width: int | None = None,
        hidden: float = 0.2,
        split: list[float] | None = None,
        stride: int | None = None,
        missing_code: float | None = None,
    ):
        super().__init__(root, batch_size, num_workers, seed)
        self.save_hyperparameters()
        hide((1, 8, 1), rate, pattern, torch.Generator(), 1, 1)  # refuse a wrong rate or pattern now
        if not 0 < hidden < 1:
            raise ValueError(f"hidden={hidden}; the share hidden in training lies in (0, 1).")
        if (n_steps is not None and n_steps < 2) or (stride is not None and stride < 1):
            raise ValueError(f"n_steps={n_steps}, stride={stride}; need at least 2 steps and a stride of 1.")
        self.file, self.rate, self.pattern, self.hidden = file, rate, pattern, hidden
        self.block_len, self.block_width = block_len, block_width
        self.split, self.stride, self.missing_code = split, stride, missing_code
        self.n_steps = n_steps or (48 if root is None else 96)
        self.columns: list[str] = []
        self._mean: Tensor | None = None
        self._std: Tensor | None = None
        self._tables: dict[str, Table] = {}

    # ---- datasets ---------------------------------------------------------------------------------------------------

    def build(self) -> dict[str, Dataset]:
        return self._build_embedded() if self.root is None else self._build_table()

    def _build_embedded(self) -> dict[str, Dataset]:
        windows, sets = {}, {}
        for split, count in (("train", 600), ("val", 100), ("test", 200)):
            windows[split] = sinusoid_windows(count, self.n_steps, 6, self.seed, split)
        self.columns = [f"channel_{i}" for i in range(6)]
        self._fit(windows["train"].flatten(0, 1).double())
        for split, values in windows.items():
            names = [f"{split}_{i}" for i in range(len(values))]
            sets[split] = self._windows(split, values, names, [0] * len(values))
        return sets

    def _build_table(self) -> dict[str, Dataset]:
        path = self._table_path()
        try:
            table = read_table(path, self.missing_code)
        except (ValueError, csv.Error) as error:
            raise ZooError(f"{path} is not a table to train on: {error}.") from error
        self.columns = [table.header[j] for j in table.columns]
        default = ETT_MONTHS if path.name.startswith("ETT") else (0.7, 0.1, 0.2)
        rows = split_rows(table, self.split or default)
        train = torch.from_numpy(table.values[rows[0]])
        empty = [name for name, known in zip(self.columns, (~train.isnan()).any(0).tolist(), strict=True) if not known]
        if empty:
            raise ZooError(f"{path}: no value in the training rows of {', '.join(empty[:5])}. Take these columns out.")
        self._fit(train)
        sets: dict[str, Dataset] = {}
        for split, part in zip(("train", "val", "test"), rows, strict=True):
            step = self.stride if split == "train" and self.stride else self.n_steps
            offsets = list(range(0, part.stop - part.start - self.n_steps + 1, step))
            if not offsets:
                raise ZooError(
                    f"{path}: {part.stop - part.start} rows for {split} are less than a window of {self.n_steps} "
                    "steps. Choose a smaller n_steps or another split."
                )
            values = torch.from_numpy(table.values[part])
            windows = torch.stack([values[o : o + self.n_steps] for o in offsets])
            sets[split] = self._windows(split, windows, [path.name] * len(offsets), [part.start + o for o in offsets])
        return sets

    def _table_path(self) -> Path:
        assert self.root is not None
        if self.file is None:
            found = sorted(path.name for path in self.root.glob("*.csv"))
            if len(found) > 1:
                raise ValueError(f"{self.root} holds {len(found)} CSV files; say which: file={found[0]!r}.")
            name = found[0] if found else "ETTh1.csv"
        else:
            name = self.file
        return self.need(
            name,
            expected="a CSV with a header line, a column of times and columns of numbers",
            get="ETTh1.csv and its kin: https://github.com/zhouhaoyi/ETDataset.",
        )

    def _windows(self, split: str, values: Tensor, names: list[str], starts: list[int]) -> Windows:
        train = split == "train"
        rate, pattern = self.rate, self.pattern
        if rate == 0 and not train:
            rate, pattern = self.hidden, "point"
        generator = torch.Generator().manual_seed(seed_from(self.seed, split, "missing"))
        shape = (values.shape[0], values.shape[1], values.shape[2])
        gone = hide(shape, rate, pattern, generator, self.block_len, self.block_width)
        if split != "train" and not bool((~values.isnan() & gone).any()):
            log.warning("%s: no known value is hidden in %s; there is nothing to score.", type(self).__name__, split)
        return Windows(values, gone, names, starts, self.hidden if train else 0.0)

    def _fit(self, rows: Tensor) -> None:
        known = ~rows.isnan()
        count = known.sum(0)
        mean = rows.nan_to_num(0.0).sum(0) / count
        spread = torch.where(known, rows - mean, torch.zeros_like(rows)).square().sum(0) / count
        self._mean, self._std = mean.float(), spread.sqrt().float()

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (n,) of the training rows, before any value was hidden, as the authors fit it."""
        self.setup()
        assert self._mean is not None and self._std is not None
        return self._mean, self._std

    def describe(self) -> dict[str, Any]:
        return {"n_features": len(self.columns), "n_steps": self.n_steps}

    # ---- users' own files -------------------------------------------------------------------------------------------

    def read(self, path: Path) -> Dataset:
        files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
        tables: dict[str, Table] = {}
        for file in files:
            try:
                table = read_table(file, self.missing_code)
            except UnicodeDecodeError:
                self.skip(file, "it is not UTF-8 text")
                continue
            except (OSError, ValueError, csv.Error) as error:
                self.skip(file, error)
                continue
            if tables and len(table.columns) != len(next(iter(tables.values())).columns):
                first = next(iter(tables))
                self.skip(file, f"it has {len(table.columns)} columns of numbers, {first} another number")
                continue
            tables[file.name] = table
        self._tables = tables
        return OwnWindows(tables, self.n_steps)

    def write(self, predictions: Iterable[dict[str, Any]], path: Path) -> list[Path]:
        """Write the completed tables: a file where ``path`` ends in .csv and there is one, else into the folder.

        A table that `read` took in comes back cell by cell, only the gaps filled; other series are written with the
        training columns' names.
        """
        pieces: dict[str, list[tuple[int, np.ndarray]]] = {}
        for batch in predictions:
            imputed = torch.as_tensor(batch["imputed"]).float().cpu().numpy()
            for i, name in enumerate(batch["name"]):
                start = int(batch["start"][i]) if "start" in batch else 0
                length = int(batch["length"][i]) if "length" in batch else imputed.shape[1]
                pieces.setdefault(name, []).append((start, imputed[i, :length]))
        path = Path(path)
        single = path.suffix.lower() == ".csv"
        if single and len(pieces) > 1:
            raise ZooError(f"{path} is one file, but there are {len(pieces)} tables to write. Give a folder.")
        written = []
        for name, parts in pieces.items():
            target = path if single else path / (name if name.endswith(".csv") else f"{name}.csv")
            with atomic_write(target) as part, open(part, "w", newline="", encoding="utf-8") as stream:
                self._write_table(stream, self._tables.get(name), parts)
            written.append(target)
        return written

    def _write_table(self, stream: Any, table: Table | None, parts: list[tuple[int, np.ndarray]]) -> None:
        parts = sorted(parts, key=lambda part: -part[0])  # where windows overlap, the earlier one stands
        if table is None:
            first = min(start for start, _ in parts)
            rows = max(start + len(values) for start, values in parts) - first
            done = np.full((rows, parts[0][1].shape[1]), np.nan)
            for start, values in parts:
                done[start - first : start - first + len(values)] = values
            names = self.columns if len(self.columns) == done.shape[1] else map(str, range(done.shape[1]))
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["index", *names])
            writer.writerows([first + i, *(f"{v:.7g}" for v in row)] for i, row in enumerate(done))
            return
        done = table.values.copy()
        for start, values in parts:
            done[start : start + len(values)] = values
        writer = csv.writer(stream, delimiter=table.delimiter, lineterminator="\n")
        writer.writerow(table.header)
        for i, row in enumerate(table.rows):
            cells = list(row)
            for k, j in enumerate(table.columns):
                if math.isnan(table.values[i, k]) and not math.isnan(done[i, k]):
                    cells[j] = f"{done[i, k]:.7g}"
            writer.writerow(cells)


def sinusoid_windows(count: int, steps: int, channels: int, seed: int, split: str = "train") -> Tensor:
    """Generated windows (count, steps, channels): every channel is a sum of three sinusoids plus noise.

        x_n(t) = sum_k a_nk sin(2 pi f_k t + phi_nk) + 0.1 e,   f_k in {2, ..., 10} / 96

    The channels' amplitudes a_nk in [0.5, 1.5] and phases phi_nk in [0, 2 pi) follow from the seed alone; every
    window draws its own three frequencies, shared by its channels: a few values, wherever they are, tell the rest.
    """
    draw = np.random.default_rng(seed_from(seed, "channels"))
    amplitude = draw.uniform(0.5, 1.5, (channels, 3))
    phase = draw.uniform(0, 2 * np.pi, (channels, 3))
    draw = np.random.default_rng(seed_from(seed, split))
    cycles = np.argsort(draw.random((count, 9)), axis=1)[:, :3] + 2
    angle = 2 * np.pi * (cycles / 96)[:, None, None, :] * np.arange(steps)[None, :, None, None]
    clean = (amplitude * np.sin(angle + phase)).sum(-1)
    return torch.from_numpy(clean + 0.1 * draw.standard_normal(clean.shape)).float()
