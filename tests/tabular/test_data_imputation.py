"""TimeSeriesImputationDataModule: which values go missing, the public layout, users' own files in and out."""

import csv
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.core import ZooError
from zoo.tabular.timeseries.data_imputation import (
    PATTERNS,
    TimeSeriesImputationDataModule,
    hide,
    read_table,
    sinusoid_windows,
    split_rows,
)
from zoo.tabular.timeseries.glocal_ib import GlocalIB


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def write_ett(path: Path, months: int = 24, columns: int = 3, per_month: int = 20) -> np.ndarray:
    """A table in ETT's layout with ``per_month`` rows a month; returns its values."""
    values = np.random.default_rng(0).normal(10, 3, (months * per_month, columns)).round(3)
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["date", *(f"c{i}" for i in range(columns))])
        for i, row in enumerate(values):
            month, hour = divmod(i, per_month)
            writer.writerow([f"{2016 + (month + 6) // 12}-{(month + 6) % 12 + 1:02d}-01 {hour:02d}:00:00", *row])
    return values


# ---- missing patterns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_rate_is_what_was_asked_for(pattern, rate):
    hidden = hide((100, 96, 7), rate, pattern, draw())
    assert float(hidden.float().mean()) == pytest.approx(rate, abs=0.01)
    assert torch.equal(hidden, hide((100, 96, 7), rate, pattern, draw()))
    assert not torch.equal(hidden, hide((100, 96, 7), rate, pattern, draw(1)))


def lengths(series: torch.Tensor) -> list[int]:
    """Lengths of the runs of True."""
    runs, count = [], 0
    for value in [*series.tolist(), False]:
        if value:
            count += 1
        elif count:
            runs.append(count)
            count = 0
    return runs


@settings(max_examples=30, deadline=None)
@given(
    steps=st.integers(4, 40), length=st.integers(1, 8), rate=st.floats(0.05, 0.6), windows=st.integers(1, 6),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_subseq_is_made_of_whole_runs(steps, length, rate, windows, seed):
    length = min(length, steps)
    runs = math.ceil(windows * 3 * rate * steps / length)
    if runs > windows * 3 * (steps // length):
        with pytest.raises(ValueError, match="shorter block_len"):
            hide((windows, steps, 3), rate, "subseq", draw(seed), length)
        return
    hidden = hide((windows, steps, 3), rate, "subseq", draw(seed), length)
    assert int(hidden.sum()) == runs * length
    each = [lengths(hidden[w, :, n]) for w in range(windows) for n in range(3)]
    assert all(run % length == 0 for series in each for run in series)  # runs may touch, never overlap
    counts = [sum(series) // length for series in each]
    assert max(counts) - min(counts) <= 1  # dealt out evenly


def test_every_start_of_a_run_is_equally_likely():
    hidden = hide((6000, 10, 1), 0.3, "subseq", draw(), 3)  # one run of 3 a series, 8 possible starts
    starts = hidden[:, :, 0].int().argmax(1)
    share = torch.bincount(starts, minlength=10).float() / 6000
    assert torch.allclose(share[:8], torch.full((8,), 1 / 8), atol=0.02) and float(share[8:].sum()) == 0


def test_block_is_a_rectangle_of_neighbouring_channels():
    hidden = hide((200, 20, 6), 8 / 120, "block", draw(), 4, 2)  # exactly one block
    for window in hidden:
        rows, columns = torch.nonzero(window.any(1)).flatten(), torch.nonzero(window.any(0)).flatten()
        assert len(rows) == 4 and int(rows[-1] - rows[0]) == 3
        assert len(columns) == 2 and int(columns[1] - columns[0]) == 1
        assert int(window.sum()) == 8


def test_point_hides_every_entry_alike():
    hidden = hide((4000, 4, 3), 0.25, "point", draw()).float().mean(0)
    assert torch.allclose(hidden, torch.full((4, 3), 0.25), atol=0.03)


@pytest.mark.parametrize(
    ("given_", "match"),
    [
        ({"rate": 1.0}, r"rate=1.0.*\[0, 1\)"),
        ({"rate": -0.1}, "rate=-0.1"),
        ({"pattern": "stripe"}, "pattern='stripe'.*point, subseq, block"),
        ({"hidden": 0.0}, "hidden=0.0"),
        ({"n_steps": 1}, "at least 2 steps"),
        ({"stride": 0}, "stride of 1"),
    ],
)
def test_wrong_arguments_are_refused_at_once(given_, match):
    with pytest.raises(ValueError, match=match):
        TimeSeriesImputationDataModule(**given_)


def test_a_block_larger_than_the_window_is_refused():
    with pytest.raises(ValueError, match="100 steps and 3 channels does not fit a window of 48 and 6"):
        TimeSeriesImputationDataModule(pattern="block", block_len=100).setup()


# ---- the embedded set -----------------------------------------------------------------------------------------------


def test_embedded_windows_are_three_shared_sinusoids():
    clean = sinusoid_windows(5, 96, 6, 0)  # whole cycles: 96 steps of frequencies k / 96
    spectrum = torch.fft.rfft(clean, dim=1).abs().square()
    for window in spectrum:
        strongest = {tuple(sorted(window[:, n].topk(3).indices.tolist())) for n in range(6)}
        assert len(strongest) == 1 and all(2 <= k <= 10 for k in next(iter(strongest)))
        rest = window.sum(0) - window.topk(3, dim=0).values.sum(0)
        noise = rest / (96 * 96 / 2)  # of each channel, by Parseval
        assert torch.allclose(noise, torch.full((6,), 0.01), atol=0.006)
    assert not torch.equal(sinusoid_windows(5, 96, 6, 0, "test"), clean)


def test_training_batches_hide_afresh_and_never_show_what_the_pattern_took():
    data = TimeSeriesImputationDataModule(rate=0.5, hidden=0.2)
    data.setup()
    train = data.dataset("train")
    one, two = train.batch([3, 4], draw(1)), train.batch([3, 4], draw(2))
    assert torch.equal(one["target_mask"], two["target_mask"]) and not torch.equal(one["mask"], two["mask"])
    assert torch.equal(one["target"], two["target"])
    assert bool((one["mask"] <= one["target_mask"]).all())
    assert torch.equal(one["x"], one["target"] * one["mask"])
    every = train.batch(list(range(600)), draw())
    assert float(every["target_mask"].mean()) == pytest.approx(0.5, abs=0.01)
    assert float(every["mask"].mean()) == pytest.approx(0.4, abs=0.01)
    test = data.dataset("test").batch([0, 1], draw(1))
    assert float(test["target_mask"].min()) == 1.0 and float(test["mask"].mean()) == pytest.approx(0.5, abs=0.06)
    assert torch.equal(test["mask"], data.dataset("test").batch([0, 1], draw(9))["mask"])  # hidden once and for all


def test_loaders_give_the_documented_batch():
    data = TimeSeriesImputationDataModule(batch_size=16)
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"x", "mask", "target", "target_mask", "name", "start"}
    assert all(batch[k].shape == (16, 48, 6) and batch[k].dtype == torch.float32 for k in list(batch)[:4])
    assert data.describe() == {"n_features": 6, "n_steps": 48}


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_ett_layout_months_scaler_and_windows(tmp_path):
    values = write_ett(tmp_path / "ETTh1.csv")
    data = TimeSeriesImputationDataModule(str(tmp_path), n_steps=30, rate=0.3)
    data.setup()
    assert {k: len(data.dataset(k)) for k in ("train", "val", "test")} == {"train": 9, "val": 3, "test": 3}
    mean, std = data.statistics()  # 14 months of 20 rows, also those behind the last whole window
    assert torch.allclose(mean, torch.tensor(values[:280].mean(0)).float(), atol=1e-5)
    assert torch.allclose(std, torch.tensor(values[:280].std(0)).float(), atol=1e-5)
    test = data.dataset("test").batch([0, 1, 2], draw())
    assert test["start"].tolist() == [380, 410, 440]  # after 19 months
    assert torch.allclose(test["target"][1], torch.tensor(values[410:440]).float())
    assert data.describe() == {"n_features": 3, "n_steps": 30}


def test_stride_gives_overlapping_training_windows_only(tmp_path):
    values = write_ett(tmp_path / "ETTh1.csv")
    data = TimeSeriesImputationDataModule(str(tmp_path), n_steps=30, stride=10)
    train = data.dataset("train")
    assert len(train) == 26 and len(data.dataset("val")) == 3
    shown = train.batch([1], draw())
    assert torch.allclose(shown["target"][0], torch.tensor(values[10:40]).float() * shown["target_mask"][0])


def test_a_table_of_ones_own_with_gaps(tmp_path):
    rows = ["time;a;note;b"]
    for i in range(100):
        rows.append(f"{i};{'' if i % 5 == 0 else i};x;{'NaN' if i == 7 else -200 if i == 8 else 2 * i}")
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    data = TimeSeriesImputationDataModule(str(tmp_path), n_steps=10, rate=0.0, missing_code=-200)
    data.setup()
    assert data.columns == ["a", "b"]
    train = data.dataset("train")
    batch = train.batch(list(range(7)), draw())
    gaps = batch["target_mask"].flatten(0, 1)
    assert gaps[::5, 0].sum() == 0 and gaps[[7, 8], 1].sum() == 0 and gaps.sum() == 140 - 14 - 2
    known = [i for i in range(70) if i % 5]
    assert float(data.statistics()[0][0]) == pytest.approx(sum(known) / len(known))
    val = data.dataset("val").batch([0], draw())  # something is hidden to be scored
    assert 0 < float((val["target_mask"] - val["mask"]).sum()) < 10


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no rows below the header"),
        ("a,b\n", "no rows below the header"),
        ("1,2\n3,4\n", "first line holds numbers"),
        ("a,b\n1,2\n3\n", "line 3 has 1 cells, the header 2"),
        ("a,b\n1,inf\n", "column 'b' holds an infinite value"),
        ("a\nx\n", "no column of numbers"),
    ],
)
def test_broken_tables_say_what_is_wrong(tmp_path, text, match):
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(ZooError, match=match):
        TimeSeriesImputationDataModule(str(tmp_path), n_steps=2).setup()


def test_layout_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not a folder.*one CSV in the layout"):
        TimeSeriesImputationDataModule(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"ETTh1.csv is missing.*ETDataset"):
        TimeSeriesImputationDataModule(str(tmp_path)).setup()
    write_ett(tmp_path / "ETTh1.csv", months=24, per_month=3)
    with pytest.raises(ZooError, match="less than a window of 96"):
        TimeSeriesImputationDataModule(str(tmp_path)).setup()
    (tmp_path / "other.csv").write_text("a\n1\n2\n")
    with pytest.raises(ValueError, match="2 CSV files.*file="):
        TimeSeriesImputationDataModule(str(tmp_path)).setup()
    with pytest.raises(ValueError, match="counts months"):
        TimeSeriesImputationDataModule(str(tmp_path), file="other.csv", split=[3, 1, 1]).setup()
    (tmp_path / "empty.csv").write_text("a,b\n" + "1,\n" * 40 + "1,2\n" * 40)
    with pytest.raises(ZooError, match="no value in the training rows of b"):
        TimeSeriesImputationDataModule(str(tmp_path), file="empty.csv", n_steps=4, split=[0.5, 0.25, 0.25]).setup()


def test_split_rows(tmp_path):
    write_ett(tmp_path / "ETTh1.csv", months=6)
    table = read_table(tmp_path / "ETTh1.csv")
    assert split_rows(table, [3, 2, 1]) == [slice(0, 60), slice(60, 100), slice(100, 120)]
    assert split_rows(table, [0.5, 0.25, 0.25]) == [slice(0, 60), slice(60, 90), slice(90, 120)]
    for wrong in ([0.5, 0.5], [0.6, 0.5, 0.2], [-1, 1, 1]):
        with pytest.raises(ValueError, match="split="):
            split_rows(table, wrong)


# ---- users' own files -----------------------------------------------------------------------------------------------


def test_a_table_comes_back_completed_and_otherwise_as_it_was(tmp_path):
    torch.manual_seed(0)
    source = tmp_path / "in"
    source.mkdir()
    lines = ["timestamp;flow;place;heat"]
    for i in range(30):
        lines.append(f"2024-01-{i + 1:02d};{'' if 4 <= i < 9 else f'{i}.50'};dam;{'NA' if i == 29 else 100 + i}")
    (source / "river.csv").write_text("\n".join(lines) + "\n")
    (source / "short.csv").write_text("flow,heat\n1,\n,101\n3,102\n")
    (source / "wide.csv").write_text("a,b,c\n1,2,3\n")
    (source / "broken.csv").write_bytes(b"\xff\xfe\x00\x01")
    model = GlocalIB(n_features=2, n_steps=12, d_model=8, n_heads=2, n_layers=1, d_ffn=8)
    model.scaler.set(torch.tensor([10.0, 110.0]), torch.tensor([5.0, 8.0]))
    data = TimeSeriesImputationDataModule(n_steps=12).from_files(source)
    assert sorted(path.name for path, _ in data.skipped) == ["broken.csv", "wide.csv"]
    predictions = [model.predict_step(b, i) for i, b in enumerate(data.predict_dataloader())]
    written = data.write(predictions, tmp_path / "out")
    assert sorted(path.name for path in written) == ["river.csv", "short.csv"]

    before = list(csv.reader((source / "river.csv").read_text().splitlines(), delimiter=";"))
    after = list(csv.reader((tmp_path / "out" / "river.csv").read_text().splitlines(), delimiter=";"))
    filled = [(i, j) for i, row in enumerate(before) for j, cell in enumerate(row) if cell != after[i][j]]
    assert filled == [(i + 1, 1) for i in range(4, 9)] + [(30, 3)]
    raw = torch.tensor(
        [[math.nan if not (c := row[j]) or c == "NA" else float(c) for j in (1, 3)] for row in before[1:]]
    )
    expected = model.predict(raw[None])[0]
    for i, j in filled:
        assert float(after[i][j]) == pytest.approx(float(expected[i - 1, j // 2]), rel=1e-5)
    short = (tmp_path / "out" / "short.csv").read_text().splitlines()
    assert short[0] == "flow,heat" and short[3] == "3,102" and "" not in short[1].split(",") + short[2].split(",")


def test_write_says_what_does_not_fit(tmp_path):
    data = TimeSeriesImputationDataModule()
    data.setup()
    piece = {"name": ["a", "b"], "start": torch.tensor([0, 0]), "imputed": torch.ones(2, 48, 6)}
    with pytest.raises(ZooError, match="2 tables to write. Give a folder"):
        data.write([piece], tmp_path / "one.csv")
    paths = data.write([piece], tmp_path / "out")  # series that came from no table
    rows = list(csv.reader(paths[0].read_text().splitlines()))
    assert rows[0] == ["index", *(f"channel_{i}" for i in range(6))] and len(rows) == 49 and rows[48][0] == "47"


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "text.csv").write_text("name\nAda\n")
    with pytest.raises(ZooError, match=r"Nothing readable.*no column of numbers"):
        TimeSeriesImputationDataModule().from_files(tmp_path / "text.csv")


# ---- real data ------------------------------------------------------------------------------------------------------

ETT = Path(os.environ.get("ZOO_DATA", "/nowhere")) / "etth1"


@pytest.mark.skipif(not ETT.is_dir(), reason="needs $ZOO_DATA/etth1")
def test_etth1_has_benchpots_windows():
    data = TimeSeriesImputationDataModule(str(ETT), rate=0.5)
    data.setup()
    # July 2016 to August 2017: 10,248 hours; September to January: 3,672; February to 26 June: 3,500
    assert {k: len(data.dataset(k)) for k in ("train", "val", "test")} == {"train": 106, "val": 38, "test": 36}
    assert data.columns == ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]
    assert data.dataset("val").batch([0], draw())["start"].tolist() == [10248]
