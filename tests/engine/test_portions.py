"""Parts of a fit, merged in any grouping and order, have the bytes of one fit; what does not belong together is named."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import bn, check_refused, good, save, table
from helpers import ANY_ADVICE, advised, check_same_files
from hypothesis import given
from hypothesis import strategies as st

import bncli
from bncli.errors import InputError, MismatchError, UsageError
from bncli.numerics import layout
from bncli.stats.portion import named

pytestmark = pytest.mark.filterwarnings("ignore::bncli.errors.BnWarning")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """x.npy of 41 segments, the last of which is a short batch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(layout, "PENDING_VALUES", 12)  # 4 batches of 10 samples in a segment
    x = table(1603)
    x[::7, 1] = np.nan
    save(tmp_path / "x.npy", x)
    return tmp_path


OPTIONS = ("--batch-size", "10", "--nan", "omit", "--momentum", "0.99", "--init", "first")


def fitted(name: str, *options: object) -> Path:
    good("fit", "x.npy", *OPTIONS, *options, "-o", name, "-q", "-f")
    return Path(name)


@pytest.mark.parametrize("parts", [1, 2, 7, 64])
def test_all_parts_give_the_bytes_of_one_fit(folder: Path, parts: int) -> None:
    whole = fitted("whole.bn.h5")
    names = [fitted(f"p{i}.bn.h5", "--part", f"{i}/{parts}") for i in range(1, parts + 1)]
    random.Random(parts).shuffle(names)
    good("merge", *names, "-o", "all.bn.h5", "-q")
    check_same_files(whole, Path("all.bn.h5"))


@pytest.mark.parametrize(
    "options", [("--momentum", "none"), ("--shuffle",), ("--rows", "5:-9"), ("--preset", "torch"), ("--gamma", "2")]
)
def test_every_option_that_goes_with_parts(folder: Path, options: tuple[str, ...]) -> None:
    given = list(OPTIONS[:4])
    good("fit", "x.npy", *given, *options, "-o", "whole.bn.h5", "-q")
    for i in (1, 2, 3):
        good("fit", "x.npy", *given, *options, "--part", f"{i}/3", "-q")
    good("merge", "x.part-2-of-3.bn.h5", "x.part-3-of-3.bn.h5", "x.part-1-of-3.bn.h5", "-o", "all.bn.h5", "-q")
    check_same_files(folder / "whole.bn.h5", folder / "all.bn.h5")


@given(st.integers(1, 9), st.randoms(use_true_random=False))
def test_any_grouping(parts: int, chance: random.Random) -> None:
    x = np.random.default_rng(parts).normal(1e3, 1, (chance.randint(3, 300), 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "PENDING_VALUES", 8)
        with advised(*ANY_ADVICE, "is a part again"):
            whole = bncli.fit(x, batch_size=5)
            left = [bncli.fit(x, batch_size=5, part=(i, parts)) for i in range(1, parts + 1)]
            while len(left) > 1:
                i = chance.randrange(len(left) - 1)
                pair = left[i : i + 2]
                chance.shuffle(pair)
                left[i : i + 2] = [bncli.merge(pair)]
            (found,) = left if parts > 1 else [bncli.merge(left)]
    assert found.part is None
    for name in ("running_mean", "running_var", "population_mean", "population_var", "minimum", "maximum"):
        assert getattr(found, name).tobytes() == getattr(whole, name).tobytes()


def test_counts_of_parts_may_differ(folder: Path) -> None:
    whole = fitted("whole.bn.h5")
    names = [fitted("a", "--part", "1/2"), fitted("b", "--part", "3/4"), fitted("c", "--part", "4/4")]
    good("merge", *names, "-o", "all.bn.h5", "-q")
    check_same_files(whole, Path("all.bn.h5"))


def test_adjacent_parts_give_a_part_again(folder: Path) -> None:
    whole = fitted("whole.bn.h5")
    for i in range(1, 6):
        fitted(f"p{i}.bn.h5", "--part", f"{i}/5")
    found = bn("merge", "p4.bn.h5", "p3.bn.h5", "-o", "p34.bn.h5")
    assert found.code == 0
    assert "a part again; still to merge: parts 1-2 of 5 (segments 0 to 15 of 41), part 5 of 5" in found.err
    record = json.loads(good("inspect", "p34.bn.h5", "--json").out)
    assert record["part"] == {"parts": ["3/5", "4/5"], "segments": [16, 32], "num_segments": 41}
    good("merge", "p34.bn.h5", "p5.bn.h5", "p1.bn.h5", "p2.bn.h5", "-o", "all.bn.h5", "-q")
    check_same_files(whole, folder / "all.bn.h5")


def test_what_does_not_belong_together_is_named(folder: Path) -> None:
    whole = fitted("whole.bn.h5")
    p = [fitted(f"p{i}.bn.h5", "--part", f"{i}/4") for i in range(1, 5)]
    check_refused(
        4, ["merge", p[0], p[2], p[3], "-o", "o"], "part 2 of 4", "segments 10 to 19 of 41", "p1.bn.h5", "p3.bn.h5"
    )
    check_refused(4, ["merge", *p, p[2], "-o", "o"], "part 3 of 4 is in p3.bn.h5 and in p3.bn.h5")
    check_refused(4, ["merge", *p, whole, "-o", "o"], "whole.bn.h5", "not a part of a fit")
    check_refused(4, ["merge", p[0], fitted("h", "--part", "1/2"), "-o", "o"], "hold the same segments")
    other = fitted("other.bn.h5", "--part", "2/4", "--eps", "0.5")
    check_refused(4, ["merge", p[0], other, "-o", "o"], "parts of different runs: eps is 1e-05 and 0.5")
    save(folder / "x.npy", table(1603, seed=2))
    other = fitted("other.bn.h5", "--part", "2/4")
    check_refused(4, ["merge", p[0], other, "-o", "o"], "different runs", "modified or replaced (x.npy)")
    check_refused(2, ["merge", *p, "--population-only", "-o", "o"], "merge the parts of a fit without it first")
    assert not (folder / "o").exists()


def test_a_part_is_no_statistics_to_apply(folder: Path) -> None:
    part = fitted("p.bn.h5", "--part", "1/2")
    for args in (
        ["apply", part, "x.npy", "-o", "y.npy"],
        ["export", part, "-o", "y.csv"],
        ["export", part, "-o", "y.json"],
        ["fit", "x.npy", "--like", part, "-o", "y.bn.h5"],
    ):
        check_refused(4, args, "part 1 of 2 of a fit", "bn merge")
    with pytest.raises(MismatchError, match="part 1 of 2"):
        bncli.load(part).normalize(np.zeros((2, 3)))
    assert (
        "part 1/2 of a fit: segments 0 to 19 of 41; bn merge joins all parts"
        in good("fit", "x.npy", *OPTIONS, "--part", "1/2").out
    )


def test_parts_that_cannot_be(folder: Path) -> None:
    for text in ("0/3", "4/3", "1/0", "-1/2"):
        check_refused(2, ["fit", "x.npy", f"--part={text}"], f"--part {text}: I/N with 1 <= I <= N")
    for text in ("3", "a/b", "1/2/3"):
        check_refused(2, ["fit", "x.npy", f"--part={text}"], f"--part {text!r} is not a part I/N")
    check_refused(2, ["fit", "x.npy", "--part", "1/2", "--target", "x.npy"], "--part together with --target")
    with pytest.raises(UsageError, match="an iterable of batches has no parts"):
        bncli.fit(iter([np.zeros((4, 2))]), part="1/2")


def test_an_empty_part_is_one_too(folder: Path) -> None:
    """There may be more machines than segments."""
    part = fitted("p.bn.h5", "--part", "1/64")
    assert bncli.load(part).num_samples == 0
    assert good("inspect", part, "--json").out
    last, many = fitted("last.bn.h5", "--part", "64/64"), fitted("many.bn.h5", "--part", "1/1000000000")
    found = bn("merge", part, "-o", "empty.bn.h5")
    assert (found.code, "parts 2-64 of 64 (segments 0 to 40 of 41)" in found.err) == (0, True)
    found = bn("merge", part, last, "-o", "ends.bn.h5")
    assert (found.code, "parts 2-63 of 64 (segments 0 to 39 of 41)" in found.err) == (0, True)
    found = bn("merge", many, "-o", "many2.bn.h5")
    assert (found.code, "parts 24390244-1000000000 of 1000000000 (segments 0 to 40" in found.err) == (0, True)


def test_a_dry_run_shows_the_part(folder: Path) -> None:
    assert "the part: samples 800 to 1603\n" in good("fit", "x.npy", *OPTIONS, "--part", "2/2", "--dry-run").out


def test_all_empty_parts_are_asked_for(folder: Path) -> None:
    save(folder / "x.npy", table(50))
    parts = [fitted(f"p{i}.bn.h5", "--part", f"{i}/4") for i in range(1, 5)]
    held = [bncli.load(part).num_samples for part in parts]
    assert sorted(held)[:2] == [0, 0]
    whole = fitted("whole.bn.h5")
    good("merge", *parts, "-o", "all.bn.h5", "-q")
    check_same_files(whole, folder / "all.bn.h5")
    left = [i for i in range(4) if held[i] or i == held.index(0)]
    found = bn("merge", *(parts[i] for i in left), "-o", "some.bn.h5")
    missing = next(i + 1 for i in range(4) if i not in left)
    assert f"still to merge: part {missing} of 4 (without segments)" in found.err


def test_parts_of_other_features_are_named(folder: Path) -> None:
    one = fitted("p1.bn.h5", "--part", "1/2")
    save(folder / "wide.npy", np.random.default_rng(0).normal(size=(1603, 5)))
    good("fit", "wide.npy", *OPTIONS, "--part", "2/2", "-o", "p2.bn.h5", "-q")
    check_refused(4, ["merge", one, "p2.bn.h5", "-o", "o"], "are parts of different runs")


def test_merge_says_what_the_fits_said_of_the_data(folder: Path) -> None:
    """Jobs of a cluster run with -q."""
    save(folder / "x.npy", np.arange(3 * 1603, dtype="i8").reshape(1603, 3) + (1 << 60))
    parts = [fitted(f"p{i}.bn.h5", "--part", f"{i}/2") for i in (1, 2)]
    assert "integers beyond 2^53 were rounded" in bn("merge", *parts, "-o", "all.bn.h5").err
    import h5py

    with h5py.File(folder / "fill.h5", "w") as file:
        x = table(1603)
        x[:5, 1] = -999
        file["x"] = x
        file["x"].attrs["missing_value"] = -999.0
    for i in (1, 2):
        good("fit", "fill.h5", *OPTIONS, "--part", f"{i}/2", "-o", f"f{i}.bn.h5", "-q", "-f")
    found = bn("merge", "f1.bn.h5", "f2.bn.h5", "-o", "f.bn.h5")
    assert "5 values that the inputs declare missing were taken for data" in found.err


def test_a_part_without_its_nodes_is_damaged(folder: Path) -> None:
    parts = [bncli.load(fitted(f"p{i}.bn.h5", "--part", f"{i}/2")) for i in (1, 2)]
    assert parts[1].part is not None
    bare = dataclasses.replace(parts[1].part, arrays={}, plain=parts[1].part.plain | {"nodes": []})
    with pytest.raises(InputError, match="part 1: the part is damaged"):
        bncli.merge([parts[0], dataclasses.replace(parts[1], part=bare)])


def test_names_of_parts() -> None:
    assert named(((1, 3), (3, 3))) == "parts 1, 3 of 3"


def test_the_slurm_scripts_of_the_documentation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SLURM runs them, with 3 tasks instead of 64, of which one is requeued."""
    page = (Path(__file__).parents[2] / "docs" / "merge-and-clusters.md").read_text(encoding="utf-8")
    array, submit = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    assert len((array + submit).splitlines()) <= 10
    assert "#SBATCH --array=1-64\n" in array
    for name in ("data", "parts", "bin"):
        (folder / name).mkdir()
    x = table(700)
    save(folder / "data" / "part-2.npy", x[:300])
    save(folder / "data" / "part-10.npy", x[300:])
    (folder / "bin" / "bn").write_text(f'#!/bin/sh\nexec {sys.executable} -m bncli "$@"\n')
    sbatch = 'case "$*" in *afterok:7*) sh -c "$3";; *--parsable*) echo 7;; esac\n'
    (folder / "bin" / "sbatch").write_text(f"#!/bin/sh\n{sbatch}")
    for tool in ("bn", "sbatch"):
        (folder / "bin" / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    for task in (1, 2, 3, 2):
        done = {"SLURM_ARRAY_TASK_ID": str(task)}
        subprocess.run(["bash", "-ec", array.replace("/64", "/3")], env=os.environ | done, check=True)
    subprocess.run(["bash", "-ec", submit], check=True)
    good("fit", "data/*.npy", "-o", "whole.bn.h5", "-q")
    check_same_files(folder / "whole.bn.h5", folder / "all.bn.h5")
