"""What a person looks at: tables that never cut a number, aligned numbers, TSV, progress and summaries."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import NUMBER, on_terminal, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from bncli.engine.apply import Applied, ApplySpec
from bncli.numerics.moments import Moments
from bncli.render import progress as progress_module
from bncli.render import summary, table
from bncli.stats.record import Stats


def stats_of(means: Any, sds: Any, names: tuple[str, ...] | None = None) -> Stats:
    mean, sd = np.asarray(means, float), np.asarray(sds, float)
    population = Moments.without_extremes(np.full(len(mean), 1_234_567.0), mean, 0 * mean, sd**2 * 1_234_567, 0 * mean)
    return Stats(mean, sd**2, mean + 1.25, -sd, population, names=names, batch_size=256, num_samples=1_234_567)


def shown(stats: Stats, width: int, monkeypatch: pytest.MonkeyPatch, **chosen: Any) -> str:
    """The table as it would stand on a terminal of this width."""

    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")  # Rich takes a dumb one to be 80 columns wide
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    record, rows = table.select(stats, **({"features": None, "sort": None, "top": None} | chosen))
    table.show(record, rows, "s.bn.h5", [], None, chosen_rows=bool(chosen))
    monkeypatch.undo()
    return plain(out.getvalue())


def check_table(stats: Stats, text: str, width: int) -> None:
    """Every row has its index, running mean and sd in full, and nothing is wider than the terminal."""
    lines = text.splitlines()
    assert all(cell_len(line) <= width for line in lines), max(lines, key=cell_len)
    rows = {line.split()[0]: line for line in text.split("\n\n", 1)[1].splitlines() if line.strip()}
    for i in range(stats.num_features):
        numbers = NUMBER.findall(rows[str(i)])
        assert f"{stats.running_mean[i]:.6g}" in numbers, (rows[str(i)], stats.running_mean[i])
        assert f"{np.sqrt(stats.running_var[i]):.6g}" in numbers


AWKWARD = [1e-5, -1.23456789e-10, 0, 12345.678, -1.23456e200, 0.1, 3, 1e6, 999999.5, 1e-100]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 132, 300])
@pytest.mark.parametrize(
    "names",
    [
        None,
        tuple("abcdefghij"),
        ("a name that is far longer than any terminal has room for, so it is cut",) * 10,
        ("変数の名前がとても長いので途中で切れます",) * 10,
        ("[bold]x[/bold]\x1b[31m", "e\u0301" * 20, "👩‍👩‍👧" * 9, *"cdefghi"),
    ],
)
def test_no_number_is_cut(width: int, names: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = stats_of(AWKWARD, np.abs(np.resize(AWKWARD[::-1], 10)) / 1e101, names)
    check_table(stats, shown(stats, width, monkeypatch), width)


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.floats(-1e140, 1e140), st.floats(0, 1e140)), min_size=1, max_size=8),
    st.integers(40, 200),
    st.lists(st.text(max_size=30), min_size=8, max_size=8) | st.none(),
)
def test_no_number_of_any_table_is_cut(pairs: list[tuple[float, float]], width: int, names: list[str] | None) -> None:
    means, sds = zip(*pairs, strict=True)
    stats = stats_of(means, sds, None if names is None else tuple(names[: len(means)]))
    with pytest.MonkeyPatch.context() as monkeypatch:
        text = shown(stats, width, monkeypatch)
    check_table(stats, text, width)


def test_what_has_no_room_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = stats_of([1, 2], [1, 2], ("a", "b"))
    narrow = " ".join(shown(stats, 50, monkeypatch).split())
    assert "no room for: " in narrow
    assert "(--tsv prints everything)" in narrow
    wide = shown(stats, 300, monkeypatch)
    assert "no room" not in wide
    titles = next(line for line in wide.splitlines() if line.lstrip().startswith("#")).split()
    for title in ("mean", "sd", "gamma", "beta", "scale", "shift", "count"):
        assert title in titles
    assert "1,234,567" in wide


def test_many_rows_are_said_but_not_when_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = stats_of(np.arange(150.0), np.ones(150))
    assert "50 more features" in shown(stats, 80, monkeypatch)
    assert "more features" not in shown(stats, 80, monkeypatch, features="0-149")


def test_real_terminal_gets_colour_and_no_control_of_its_own(tmp_path: Path) -> None:
    stats_of([1.5, 2.5], [1, 2], ("\x1b[31m[red]a", "b\x9b")).save(str(tmp_path / "s.bn.h5"))
    out = on_terminal(["inspect", tmp_path / "s.bn.h5"], 80).out
    assert "\\x1b[31m[red]a" in plain(out)
    assert "\x1b" in out
    assert "\x1b" not in plain(out)
    assert "\x9b" not in out


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([650.249, 0.0963, None], ["650.249 ", "  0.0963", "  -     "]),
        ([1.0, -10.5, 1e20], ["  1    ", "-10.5  ", "  1e+20"]),
        ([], []),
        ([0.0], ["0"]),
    ],
)
def test_aligned(values: list[float | None], expected: list[str]) -> None:
    assert table.aligned(values) == expected


@given(st.lists(st.floats() | st.none(), max_size=9))
def test_aligned_cuts_nothing_and_lines_up(values: list[float | None]) -> None:
    texts = table.aligned(values)
    assert len({len(text) for text in texts}) <= 1
    assert [t.strip() for t in texts] == ["-" if v is None else f"{v:.6g}" for v in values]
    assert len({t.index(".") for t in texts if "." in t}) <= 1


@given(st.lists(st.tuples(st.floats(-1e9, 1e9), st.floats(0, 1e9)), min_size=1, max_size=6))
def test_glance_is_one_line_with_one_dot(features: list[tuple[float, float]]) -> None:
    glance = table.Glance.over(features)
    dots = []
    for mean, sd in features:
        drawn = glance.draw(mean, sd)
        assert len(drawn) == table.GLANCE_WIDTH
        assert drawn.count("●") == 1
        assert set(drawn) <= {"●", "━", " "}
        dots.append((mean, drawn.index("●")))
    dots.sort()
    assert [place for _, place in dots] == sorted(place for _, place in dots)


# --- progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_progress_lines_come_after_a_second_and_then_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    with progress_module.progress("fit", quiet=False) as told:
        for seconds, done in ((0.5, 10), (2.0, 12_000), (5.0, 13_000), (11.5, 14_000), (12.5, 60_000)):
            clock.now = 100 + seconds
            told(done, 90_000, done * 100_000)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "bn fit: 12,000 of 90,000 samples, 0.60 GB/s, 13 s left",
        "bn fit: 60,000 of 90,000 samples, 0.48 GB/s, 6 s left",
    ]


def test_progress_without_a_total_or_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    for quiet in (True, False):
        with progress_module.progress("fit", quiet) as told:
            clock.now += 5
            told(7, None, 0)
    assert capsys.readouterr().err == "bn fit: 7 samples\n"


def test_progress_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with progress_module.progress("apply", quiet=False) as told:
        told(1, 100, 10)
        assert capsys.readouterr().err == ""  # what is done in a second needs no bar
        clock.now += 10
        told(50, 100, 10**9)
    text = plain(capsys.readouterr().err)
    assert "apply" in text
    assert "50 of 100 samples, 0.10 GB/s, 10 s left" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (99, "99 s"), (100, "2 min"), (3600, "60 min"), (7500, "2 h 05 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert progress_module._duration(seconds) == text


# --- summaries


def test_fit_summary_counts_in_words() -> None:
    stats = stats_of([1], [1])
    text = summary.fit_summary(stats, "s\x1b.h5")
    assert text.splitlines()[0] == "1 feature, 1,234,567 samples, 0 batches of 256, the last of 135"
    assert text.splitlines()[-1] == "stats in s\\x1b.h5"


@pytest.mark.parametrize(
    ("momentum", "words"),
    [
        (0.9, "running = 0.9 * running + 0.1 * batch (0.9 weighs the OLD value; PyTorch's momentum is 0.1)"),
        (0.99, "PyTorch's momentum is 0.01)"),
        (0.0, "running = 0 * running + 1 * batch"),
        (None, "the running statistics are the population's"),
    ],
)
def test_momentum_in_words(momentum: float | None, words: str) -> None:
    assert words in summary.momentum_in_words(momentum)


def test_momentum_none_says_its_ddof() -> None:
    assert summary.momentum_in_words(None, 0) == "momentum none: the running statistics are the population's"
    assert "the population's, with ddof 1: the variance is m2 / (count - 1)" in summary.momentum_in_words(None, 1)


def test_apply_summary_says_what_there_is_to_say() -> None:
    quiet = Applied(["y.npy"], 1000, 3000)
    assert summary.apply_summary(quiet, ApplySpec()) == "1,000 samples normalized with the running statistics: y.npy"
    report = Applied(["a", "b\x1b"], 1, 3, non_finite=1, filled=2, others=[f"x.h5::/{i}\x1b" for i in range(5)])
    lines = summary.apply_summary(report, ApplySpec(inverse=True, use="population")).splitlines()
    assert lines[0] == "1 sample denormalized with the population statistics: a and 1 more"
    assert lines[1] == "1 value NaN or infinite: passed through"
    assert lines[2] == "2 values equal to the fill value: now NaN"
    assert lines[3].startswith("not copied: x.h5::/0\\x1b, x.h5::/1\\x1b, x.h5::/2\\x1b and 2 more (--copy-others")
    report.left = report.others[:1]
    lines = summary.apply_summary(report, ApplySpec(copy_others=True)).splitlines()
    assert lines[3] == "4 other datasets copied"
    assert lines[4] == "not copied, since their values are in other files: x.h5::/0\\x1b"


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((200, 1, 256), "200 samples, 1 batch of 200"),
        ((600, 3, 256), "600 samples, 3 batches of 256, the last of 88"),
        ((512, 2, 256), "512 samples, 2 batches of 256"),
        ((600, 3, 0), "600 samples, 3 batches"),
        ((600, 30, 64, 3), "600 samples, 30 batches of 64 in 3 epochs"),
    ],
)
def test_batches_in_words(counts: tuple[int, ...], words: str) -> None:
    assert summary.batches_in_words(*counts) == words
