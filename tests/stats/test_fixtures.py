"""Files of every released format stay readable: what is in tests/fixtures is never written again.

`write_fixtures` wrote them, with bn 0.1.0: formats 1 and 2 of the stats file, and 1 of the checkpoint.
"""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from cli_helpers import check_refused
from helpers import (
    ANY_ADVICE,
    RECURRENCE,
    STATISTICS,
    advised,
    check_moments,
    cut,
    exact,
    exact_columns,
    off,
    recurrence,
)

import bncli
from bncli.errors import InputError
from bncli.stats import container

FIXTURES = Path(__file__).parents[1] / "fixtures"
STATS, CHECKPOINT = FIXTURES / "stats-1.bn.h5", FIXTURES / "stats-1.bn.h5.checkpoint"
STATS_2 = FIXTURES / "stats-2.bn.h5"
NAMES = ("ankle", "knee", "größe")
OPTIONS = ["--momentum", "0.75", "--eps", "0.125", "--batch-size", "16", "--init", "unit", "--ddof", "1"]
KEPT = 48  # samples in the checkpoint


def data() -> npt.NDArray[np.float64]:
    """70 samples of 3 features, multiples of 1/8; the third has a gap, which is left out."""
    i = np.arange(210).reshape(70, 3)
    x = (i * 7919 % 1009 - 504) / 8 + np.array([0, 100, -3])
    x[20, 2] = np.nan
    return x


def columns(x: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
    return [column[~np.isnan(column)] for column in x.T]


@pytest.mark.parametrize("path", [STATS, STATS_2])
def test_stats_file(path: Path) -> None:
    stats = bncli.load(str(path))
    x = data()
    check_moments(stats.population_mean, stats.population_var, [exact(c) for c in columns(x)])
    assert stats.population_count.tolist() == [70, 70, 69]
    for feature in range(3):
        batches = [exact(columns(batch)[feature]) for batch in cut(x, 16)]
        mean = recurrence([b.mean for b in batches], 0.75, "unit", 0)
        var = recurrence([b.folded(1) for b in batches], 0.75, "unit", 1)
        assert off(stats.running_mean[feature], mean.value, mean.scale) <= RECURRENCE
        assert off(stats.running_var[feature], var.value, var.scale) <= RECURRENCE
    assert stats.gamma.tolist() == [2, 2, 2]
    assert stats.beta.tolist() == [-0.5, -0.5, -0.5]
    assert stats.names == NAMES
    assert (stats.momentum, stats.eps, stats.ddof, stats.init, stats.axis) == (0.75, 0.125, 1, "unit", -1)
    assert (stats.batch_size, stats.num_samples, stats.num_batches, stats.num_left_out) == (16, 70, 5, 0)
    assert stats.sample_shape == (3,)
    assert stats.options["nan"] == "omit"
    assert stats.provenance["versions"]["bncli"] == "0.1.0"
    assert [source["name"] for source in stats.provenance["sources"]] == ["x.npy"]
    if path == STATS:
        assert np.isnan([stats.minimum, stats.maximum]).all()  # nobody kept them
        assert stats.as_dict()["features"][0]["minimum"] is None
    else:
        assert stats.minimum.tolist() == [min(c) for c in columns(x)]
        assert stats.maximum.tolist() == [max(c) for c in columns(x)]
    assert [f["missing"] for f in stats.as_dict()["features"]] == [0, 0, 1]


def test_stats_file_still_merges() -> None:
    """What is under state/ is enough to go on with."""
    stats = bncli.load(str(STATS))
    with advised(*ANY_ADVICE, "own batches"):
        twice = bncli.merge([stats, stats], gamma=1, beta=0)
    x = data()
    check_moments(twice.population_mean, twice.population_var, [exact(np.tile(c, 2)) for c in columns(x)])
    assert stats.running is not None
    assert stats.running.k.tolist() == [[5, 5, 5]]


def test_a_checkpoint_of_format_1_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments were joined in a chain then, and are joined in a tree now, which gives other bits."""
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", data())
    shutil.copy(CHECKPOINT, "x.bn.h5.checkpoint")
    check_refused(
        3,
        ["fit", "x.npy", "--nan", "omit", *OPTIONS, "--resume"],
        "x.bn.h5.checkpoint: checkpoint format 1, written by bn 0.1.0; this bn reads format 2: start again",
    )


def test_tolerances_are_those_of_the_contract() -> None:
    assert (STATISTICS, RECURRENCE) == (5e-15, 1e-14)
    assert exact_columns(np.array([[1.0], [2.0]]))[0].variance == Fraction(1, 4)


@pytest.mark.parametrize("path", [STATS, STATS_2, CHECKPOINT])
def test_every_flipped_byte_is_refused(path: Path) -> None:
    """All of them; one of the seal itself may also leave a file that is read by its digest, with the same content."""
    whole = path.read_bytes()
    seal = whole.rindex(container.SEAL)
    content = {k: v.tobytes() for k, v in container.unpack(whole, "s")[0].items()}
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        try:
            arrays, attributes = container.unpack(bytes(damaged), "s")
        except InputError:
            continue
        assert at >= seal
        assert {k: v.tobytes() for k, v in arrays.items()} == content
        assert repr(attributes) == repr(container.unpack(whole, "s")[1])


@pytest.mark.parametrize("path", [STATS, STATS_2, CHECKPOINT])
def test_every_cut_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    seal = whole.rindex(container.SEAL)
    for end in [*range(0, seal, 61), seal - 1, *range(seal + len(container.SEAL), len(whole))]:
        with pytest.raises(InputError):
            container.unpack(whole[:end], "s")


def write_fixtures(folder: Path) -> None:
    """How the fixtures were made: a fit, and one that was stopped after its first segment."""
    import subprocess
    import sys

    np.save(folder / "x.npy", data())
    (folder / "names.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    args = ["fit", "x.npy", *OPTIONS, "--names", "names.txt", "--nan", "omit", "--gamma", "2", "--beta", "-0.5", "-q"]
    stopping = (
        "import os, sys\nfrom bncli.numerics import layout\nfrom bncli.engine import checkpoint\nlayout.PENDING_VALUES = 9\n"
        "checkpoint.EVERY = checkpoint.SHARE = 0\nsave = checkpoint.Checkpointer._save\n"
        "checkpoint.Checkpointer._save = lambda self: (save(self), os._exit(0))\nfrom bncli.cli import main\nmain()\n"
    )
    for command in ([sys.executable, "-m", "bncli"], [sys.executable, "-c", stopping]):
        subprocess.run([*command, *args, "-o", STATS.name, "-f"], cwd=folder, check=True)
    for path in (STATS, CHECKPOINT):
        shutil.copy(folder / path.name, path)


def write_fixture_2(folder: Path) -> None:
    """The same fit, in format 2."""
    import subprocess
    import sys

    np.save(folder / "x.npy", data())
    (folder / "names.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    args = [
        *OPTIONS,
        "--names",
        "names.txt",
        "--nan",
        "omit",
        "--gamma",
        "2",
        "--beta",
        "-0.5",
        "-q",
        "-o",
        STATS_2.name,
    ]
    subprocess.run([sys.executable, "-m", "bncli", "fit", "x.npy", *args], cwd=folder, check=True)
    shutil.copy(folder / STATS_2.name, STATS_2)
