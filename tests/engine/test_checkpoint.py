"""Checkpoints: a run stopped anywhere and resumed gives the same bytes; a checkpoint of another run is refused."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import check_refused, contents, good, save, save_h5, table, temporaries, untouched
from faults.kills import EAGER, Killed, fit_killed, make_data
from helpers import ANY_ADVICE, advised, bits, check_same_bytes

import bncli
from bncli.engine import checkpoint
from bncli.engine.checkpoint import Checkpointer, differences
from bncli.engine.fit import fit_to_file, make_spec
from bncli.engine.parts import Marked, Population, Recurrence, Rounded, Samples
from bncli.engine.tree import Fold
from bncli.errors import BnNote, BnWarning, InputError, MismatchError, OutputExistsError, WriteError
from bncli.numerics import compiled, layout
from bncli.stats import container
from bncli.system import atomic

KEPT = "x.bn.h5.checkpoint"


def samples_kept(folder: Path = Path()) -> int:
    """Samples in the checkpoint, of all its nodes."""
    attributes = container.unpack((folder / KEPT).read_bytes(), "c")[1]
    counts = [value for name, value in attributes.items() if name.endswith("/samples/samples")]
    assert counts
    return sum(int(value) for value in counts)  # type: ignore[arg-type]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data of 12 segments; a checkpoint is written after each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(layout, "PENDING_VALUES", 64)
    monkeypatch.setattr(checkpoint, "EVERY", 0)
    monkeypatch.setattr(checkpoint, "SHARE", 0)
    x = table(3000, 5)
    x[::7, 2] = np.nan
    save(tmp_path / "x.npy", x)
    return tmp_path


class Stopped(BaseException):
    """Stands in for SIGKILL: nothing is saved."""


def stop_after(monkeypatch: pytest.MonkeyPatch, segments: int) -> None:
    """Stop the next fit after this many segments."""
    real, left = Checkpointer.offer, [segments]

    def offer(self: Checkpointer, parts: Any, done: str) -> None:
        real(self, parts, done)
        left[0] -= 1
        if not left[0]:
            raise Stopped

    monkeypatch.setattr(Checkpointer, "offer", offer)


def fitted(resume: bool = False, **options: Any) -> bncli.Stats:
    spec = make_spec({"batch_size": 16, "nan": "omit", "momentum": 0.99} | options)
    with advised(*ANY_ADVICE, "continues from", "starts from the beginning"):
        return fit_to_file(["x.npy"], spec, None, force=True, resume=resume)[0]


def stopped_fit(segments: int = 5, **options: Any) -> None:
    """Leave a checkpoint after this many segments."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, segments)
        with pytest.raises(Stopped):
            fitted(**options)
    assert os.path.exists(KEPT)


# --- the same bytes


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": "none"}, {"init": "first", "ddof": 1}, {"rows": "17:2900"}, {"shuffle": True, "seed": 3}],
)
def test_stopped_after_any_task(here: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """A task is a segment, or a node of a few."""
    offered: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "offer", lambda checkpointer, pack, done: offered.append(done))
        whole = fitted(**options)
    os.unlink("x.bn.h5")
    total = len(offered)
    assert total > 7
    for tasks in (1, 2, total // 2, total - 1):
        stopped_fit(tasks, **options)
        assert not os.path.exists("x.bn.h5")
        check_same_bytes(whole, fitted(resume=True, **options))
        check_same_bytes(whole, bncli.load("x.bn.h5"))
        os.unlink("x.bn.h5")
        assert contents(here).keys() == {"x.npy"}


@pytest.mark.parametrize("options", [{"holdout": 0.25}, {"optimizer": "sgd", "shuffle": False}, {"loss": "mse"}])
def test_learning_stopped_after_any_run_of_batches(here: Path, options: dict[str, Any]) -> None:
    """The optimizer's moments, the order of batches, the history and the comparison continue unchanged."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((200, 4))
    save(here / "x.npy", x)
    save(here / "y.npy", (x[:, 0] > 0).astype("i8"))
    options = {"nan": "error", "target": "y.npy", "epochs": 3, "batch_size": 5} | options
    whole = fitted(**options)
    os.unlink("x.bn.h5")
    for steps in (1, 5, 7, 11, 14):
        stopped_fit(steps, **options)
        again = fitted(resume=True, **options)
        check_same_bytes(whole, again)
        assert whole.learned is not None
        assert again.learned is not None
        for field in dataclasses.fields(whole.learned):
            one, other = (getattr(stats.learned, field.name) for stats in (whole, again))
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes() or one == other, field.name
        os.unlink("x.bn.h5")


def test_learning_goes_on_only_with_the_same_target(here: Path) -> None:
    x = np.random.default_rng(3).standard_normal((200, 4))
    save(here / "x.npy", x)
    save(here / "y.npy", (x[:, 0] > 0).astype("i8"))
    options = {"nan": "error", "target": "y.npy", "epochs": 2, "batch_size": 32}
    stopped_fit(3, **options)
    with pytest.raises(MismatchError, match="epochs was 2, is 3"):
        fitted(resume=True, **options | {"epochs": 3})
    save(here / "y.npy", (x[:, 1] > 0).astype("i8"))
    with pytest.raises(MismatchError, match=r"target was y\.npy .*, is y\.npy"):
        fitted(resume=True, **options)


def test_stopped_after_every_segment_in_turn(here: Path) -> None:
    whole = fitted(workers=1)
    stopped_fit(1)
    for turn in range(100):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, 1)
            try:
                result = fitted(resume=True, workers=1 + turn % 3, max_memory=(1 + turn % 2) << 20)
            except Stopped:
                continue
            break
    assert turn > 5
    check_same_bytes(whole, result)


def test_stopped_when_all_was_folded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the output could not be written at the end."""
    whole = fitted()
    fill = atomic.fill

    def full(temporary: str, content: bytes) -> None:
        if "checkpoint" not in temporary:
            raise OSError(28, os.strerror(28))
        fill(temporary, content)

    monkeypatch.setattr(atomic, "fill", full)
    spec = make_spec({"batch_size": 16, "nan": "omit", "momentum": 0.99})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(WriteError):
            fit_to_file(["x.npy"], spec, None, force=True)
    assert [str(w.message) for w in told if w.category is BnNote] == [
        f"continue with --resume ({KEPT} keeps the first 3,000 of 3,000 samples) after fixing the cause"
    ]
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setattr(layout, "PENDING_VALUES", 64)
    check_same_bytes(whole, fitted(resume=True))


def test_integers_that_were_rounded_are_still_told(here: Path) -> None:
    x = np.full((3000, 5), 2**53 + 1, np.int64)
    x[1::2] = 3
    x[300:] = np.arange(5)
    x[301::2] = 7
    save(here / "x.npy", x)
    stopped_fit(8, nan="error")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit_to_file(["x.npy"], make_spec({"batch_size": 16, "momentum": 0.99}), None, resume=True)
    assert any("beyond 2^53" in str(w.message) for w in told)


def test_parts_of_a_fold(here: Path) -> None:
    rng = np.random.default_rng(3)
    features = 7
    fold = Fold.empty(features)
    population = fold[Population].moments.map(lambda a: rng.standard_normal(a.shape))
    running = fold[Recurrence].running.map(lambda a: rng.standard_normal(a.shape))
    whole = fold.replace(
        Population(population), Recurrence(running, 3, 1), Samples(12), Rounded(True), Marked((5, 1 << 40))
    )
    arrays, attributes = container.unpack(container.pack(*whole.pack()), "s")
    back = Fold.unpack(arrays, attributes, features)
    for name, part in whole.parts.items():
        assert {k: a.tobytes() for k, a in part.arrays().items()} == {
            k: a.tobytes() for k, a in back.parts[name].arrays().items()
        }
        assert part.attributes() == back.parts[name].attributes()
    assert (back.samples, back[Recurrence].left_out, back[Rounded], back[Marked].marked) == (
        12,
        1,
        Rounded(True),
        (5, 1 << 40),
    )
    with pytest.raises(ValueError, match="count"):
        Fold.unpack(arrays, attributes, features + 1)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """The long run is `python tests/faults/kills.py 100`."""
    make_data(tmp_path)
    chance, seen = random.Random(5), Killed()
    for run, most in (("npy", 2), ("gzip", 4), ("two", 2)) * 4:  # on a busy machine a kill may come too late
        killed = fit_killed(tmp_path, run, chance, most)
        seen.kills, seen.continued = seen.kills + killed.kills, seen.continued + killed.continued
        if run == "two" and seen.kills >= 3 and seen.continued:
            break
    assert seen.kills >= 3
    assert seen.continued >= 1


# --- signals


@pytest.mark.parametrize(("number", "code", "words"), [(2, 130, "interrupted"), (15, 143, "terminated")])
def test_a_signal_keeps_what_was_done_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int, words: str
) -> None:
    """The next checkpoint is due in an hour, so what is found was saved because of the signal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(layout, "PENDING_VALUES", 256)  # as in EAGER
    save(tmp_path / "x.npy", table(200_000, 3))
    args = ["fit", "x.npy", "--batch-size", "32"]
    slow = EAGER.replace("EVERY = checkpoint.SHARE = 0", "EVERY = 3600").replace(
        "sys.argv",
        "import time\nfold = __import__('bncli.engine.accumulate', fromlist=['_'])\nreal = fold.fold_segment\n"
        "fold.fold_segment = lambda *a: (time.sleep(0.06), real(*a))[1]\nsys.argv",
        1,
    )
    process = subprocess.Popen([sys.executable, "-c", slow, *args], cwd=tmp_path, stderr=subprocess.PIPE)
    while not temporaries(tmp_path):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(number)
    err = process.communicate(timeout=60)[1].decode()
    assert process.returncode == code
    assert contents(tmp_path).keys() == {"x.npy", KEPT}
    done = samples_kept(tmp_path)
    assert 0 < done < 200_000
    assert err == (f"bn: {words}; continue with --resume ({KEPT} keeps the first {done:,} of 200,000 samples)\n")
    told = good(*args, "--resume", "-q")
    assert (told.out, told.err) == ("", "")
    resumed = bncli.load("x.bn.h5")
    with advised(*ANY_ADVICE):
        check_same_bytes(resumed, bncli.fit("x.npy", batch_size=32))


def test_nothing_is_promised_when_nothing_was_done(tmp_path: Path) -> None:
    save(tmp_path / "x.npy", table(2000, 3))
    slow = EAGER.replace(
        "sys.argv",
        "import time\nfold = __import__('bncli.engine.accumulate', fromlist=['_'])\n"
        "fold.fold_segment = lambda *a: time.sleep(60)\nsys.argv",
        1,
    )
    process = subprocess.Popen([sys.executable, "-c", slow, "fit", "x.npy"], cwd=tmp_path, stderr=subprocess.PIPE)
    while not temporaries(tmp_path):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == b"bn: interrupted; outputs are as they were\n"
    assert contents(tmp_path).keys() == {"x.npy"}


# --- messages


def test_without_a_checkpoint_it_starts_from_the_beginning(here: Path) -> None:
    result = good("fit", "x.npy", "--nan", "omit", "--resume")
    assert f"bn: note: starts from the beginning: there is no {KEPT}\n" in result.err
    assert good("fit", "x.npy", "--nan", "omit", "--resume", "-f", "-q").err == ""


def test_continuing_and_replacing_are_reported(here: Path) -> None:
    args = ["fit", "x.npy", "--nan", "omit", "--momentum", "0.99", "--batch-size", "16"]
    stopped_fit(2)
    done = samples_kept()
    with untouched(here):
        keeps = f"which keeps the first {done} of 3,000 samples"
        assert f"continues from {KEPT}, {keeps}\n" in good(*args, "--resume", "-n").out
        assert f"starts from the beginning and replaces {KEPT}; --resume would" in good(*args, "-n").out
    assert f"bn: note: starts from the beginning and replaces {KEPT}" in good(*args).err
    assert not os.path.exists(KEPT)
    os.unlink("x.bn.h5")
    stopped_fit(2)
    assert f"bn: note: continues from {KEPT}, {keeps}\n" in good(*args, "--resume").err
    assert "checkpoint" not in good(*args, "-n").out


def test_an_error_leaves_the_checkpoint_and_says_so(here: Path) -> None:
    x = table(3000, 5)
    x[2500, 1] = np.inf
    save(here / "x.npy", x)
    result = check_refused(3, ["fit", "x.npy", "--batch-size", "16"], "sample 2500, feature 1", lines=3)
    assert f"bn: note: continue with --resume ({KEPT} keeps the first " in result.err
    assert contents(here).keys() == {"x.npy", KEPT}


# --- checkpoints of other runs


def modified(here: Path) -> None:
    os.utime("x.npy", ns=(1, 1))


def longer(here: Path) -> None:
    save(here / "x.npy", table(3001, 5))


@pytest.mark.parametrize(
    ("options", "change", "words"),
    [
        ({"batch_size": 32}, None, "batch_size was 16, is 32"),
        ({"momentum": 0.9}, None, "momentum was 0.99, is 0.9"),
        ({"eps": 0.5}, None, "eps was 1e-05, is 0.5"),
        ({"ddof": 1}, None, "ddof was 0, is 1"),
        ({"init": "unit"}, None, "init was debias, is unit"),
        ({"axis": 1}, None, "axis was -1, is 1"),
        ({"shuffle": True}, None, "shuffle was None, is True"),
        ({"rows": "1:"}, None, "rows was [None, None], is [1, None]"),
        ({"fill_value": 3}, None, "fill_value was None, is 3"),
        ({"gamma": 2.0}, None, "gamma was SHA-256"),
        ({"beta": 2.0}, None, "beta was SHA-256"),
        ({"names": list("abcde")}, None, "names was SHA-256"),
        ({}, modified, "the file was modified or replaced (x.npy)"),
        ({}, longer, r"shape was [3000, 5], is [3001, 5] (x.npy); size was 120128, is 120168 (x.npy)"),
    ],
)
def test_changed_data_or_options_are_refused(
    here: Path, options: dict[str, Any], change: Callable[[Path], None] | None, words: str
) -> None:
    stopped_fit()
    if change:
        change(here)
    with untouched(here), pytest.raises(MismatchError) as caught:
        fitted(resume=True, **options)
    assert caught.value.exit_code == 4
    text = str(caught.value)
    assert text.startswith(f"{KEPT}: belongs to another run: ")
    assert words in text
    assert "or start again without --resume" in text


def test_another_kernel_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_fit()
    monkeypatch.setattr(compiled, "NAME", "abacus")
    with pytest.raises(MismatchError, match=r"kernel was (c|numpy), is abacus\. Give the same"):
        fitted(resume=True)


def test_other_segments_are_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint ends on a segment boundary; continuing from elsewhere would lose samples."""
    stopped_fit()
    monkeypatch.setattr(layout, "PENDING_VALUES", 200)
    with pytest.raises(MismatchError, match="samples per segment was 192, is 640"):
        fitted(resume=True)
    monkeypatch.setattr(checkpoint, "differences", lambda then, now: iter(()))
    with pytest.raises(InputError, match="the checkpoint is damaged"):
        fitted(resume=True)


def test_another_number_of_inputs_is_refused(here: Path) -> None:
    stopped_fit()
    save(here / "y.npy", table(3, 5))
    with pytest.raises(MismatchError, match="the number of inputs was 1, is 2"):
        fit_to_file(
            ["x.npy", "y.npy"], make_spec({"batch_size": 16, "nan": "omit", "momentum": 0.99}), "x.bn.h5", resume=True
        )


def test_workers_and_memory_may_change(here: Path) -> None:
    whole = fitted()
    stopped_fit(workers=2)
    kept = samples_kept()
    seen: list[int] = []
    spec = make_spec({"batch_size": 16, "nan": "omit", "momentum": 0.99, "workers": 1, "max_memory": 1 << 20})
    with advised(*ANY_ADVICE, "continues from"):
        resumed, _ = fit_to_file(
            ["x.npy"], spec, None, force=True, resume=True, progress=lambda done, *rest: seen.append(done)
        )
    assert seen[0] == kept > 0  # it was resumed, not started again
    check_same_bytes(resumed, whole)


def test_differences_of_numbers_that_are_no_number() -> None:
    assert list(differences({"fill_value": float("nan")}, {"fill_value": float("nan")})) == []
    assert list(differences({"shuffle": True}, {})) == ["shuffle was True, is None"]


def test_three_differences_are_named(here: Path) -> None:
    stopped_fit()
    with pytest.raises(
        MismatchError, match=r"batch_size was 16, is 3; ddof was 0, is 1; eps was 1e-05, is 1, and 3 more\. Give"
    ):
        fitted(resume=True, momentum=0.5, eps=1, ddof=1, batch_size=3, init="zeros")


@pytest.mark.parametrize(("at_most", "kept"), [(16, True), (15, False)])
def test_a_large_state_is_not_saved_when_the_process_is_stopped(
    here: Path, monkeypatch: pytest.MonkeyPatch, at_most: int, kept: bool
) -> None:
    """The process has to end within a second; an earlier checkpoint stays."""
    monkeypatch.setattr(checkpoint, "AT_STOP", at_most)
    monkeypatch.setattr(checkpoint, "EVERY", 600.0)
    with Checkpointer("z", {}, resume=False) as kept_by:
        kept_by.offer(lambda: ({"a": np.zeros(2)}, {}), "two numbers")
        assert kept_by._stopped() == ("continue with --resume (z.checkpoint keeps two numbers)" if kept else None)
        assert os.path.exists("z.checkpoint") == kept


def test_learning_goes_on_only_from_the_end_of_a_run(here: Path) -> None:
    x = np.random.default_rng(3).standard_normal((200, 4))
    save(here / "x.npy", x)
    save(here / "y.npy", (x[:, 0] > 0).astype("i8"))
    options = {"nan": "error", "target": "y.npy", "epochs": 2, "batch_size": 5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bncli.engine.learning.setup.RUN_BATCHES", 4)
        stopped_fit(1, **options)
    with pytest.raises(InputError, match="the checkpoint is damaged"):
        fitted(resume=True, **options)


# --- damaged and newer checkpoints, and other files


def test_every_flipped_byte_and_every_cut_is_refused(here: Path) -> None:
    stopped_fit()
    whole = Path(KEPT).read_bytes()
    chance = random.Random(0)
    for at in chance.sample(range(len(whole)), 150):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << chance.randrange(8)
        Path(KEPT).write_bytes(damaged)
        with pytest.raises((InputError, OutputExistsError)) as caught:
            fitted(resume=True)
        assert KEPT in str(caught.value)
    for end in chance.sample(range(len(whole) - 1), 50):
        Path(KEPT).write_bytes(whole[:end])
        with pytest.raises((InputError, OutputExistsError)):
            fitted(resume=True)
    Path(KEPT).write_bytes(whole)
    fitted(resume=True)


def test_a_damaged_one_says_what_to_do(here: Path) -> None:
    stopped_fit()
    whole = Path(KEPT).read_bytes()
    Path(KEPT).write_bytes(whole[:-1000] + bytes(1000))
    args = ["fit", "x.npy", "--resume", "--nan", "omit", "--momentum", "0.99", "--batch-size", "16"]
    with untouched(here):
        check_refused(
            3, args, f"{KEPT}: the checkpoint is damaged; remove it, or start again without --resume", lines=1
        )
    assert "replaces" in good(*[a for a in args if a != "--resume"]).err
    assert not os.path.exists(KEPT)


def repacked(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
    arrays, attributes = container.unpack(Path(KEPT).read_bytes(), "c")
    change(arrays, attributes)
    Path(KEPT).write_bytes(container.pack(arrays, attributes))


def test_a_newer_format_names_who_wrote_it(here: Path) -> None:
    stopped_fit()
    repacked(lambda a, p: p.update(format_version=3, bncli="9.1.0"))
    with pytest.raises(
        InputError, match=r"checkpoint format 3, written by bn 9\.1\.0; this bn reads format 2: upgrade"
    ):
        fitted(resume=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda a, p: p.update(fingerprint="{"),
        lambda a, p: p.update(fingerprint="[]"),
        lambda a, p: a.pop("node0/running/k"),
        lambda a, p: p.pop("node0/samples/samples"),
        lambda a, p: a.update({"node0/running/a": a["node0/running/a"][:, :2]}),
        lambda a, p: a.update({"node0/population/m2": a["node0/population/m2"].astype("f4")}),
        lambda a, p: p.update({"node0/running/batches": "many"}),
        lambda a, p: p.update(nodes=(*p["nodes"], 0, 0)),
        lambda a, p: p.update(nodes=p["nodes"][2:]),
        lambda a, p: p.update({"node0/parts": "running,nothing"}),
        lambda a, p: p.update({"node0/samples/samples": 5}),
    ],
)
def test_a_forged_one_is_refused(here: Path, change: Any) -> None:
    """With a correct digest and wrong content."""
    stopped_fit()
    repacked(change)
    with untouched(here), pytest.raises(InputError, match="the checkpoint is damaged"):
        fitted(resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_that_only_has_its_name_is_not_touched(here: Path, resume: bool) -> None:
    Path(KEPT).write_bytes(b"weights of a network")
    with untouched(here), pytest.raises(OutputExistsError, match=f"{KEPT}: exists and is not a bn checkpoint"):
        fitted(resume=resume)


def test_an_input_is_never_a_checkpoint(here: Path) -> None:
    save_h5(here / KEPT, table(300, 5))
    with untouched(here), pytest.raises(OutputExistsError, match="also an input"):
        fit_to_file([KEPT], make_spec({}), "x.bn.h5")


# --- the checkpointer


def checkpointer(resume: bool = False) -> Checkpointer:
    return Checkpointer("x.bn.h5", {"a": 1}, resume=resume)


def state(number: int) -> Callable[[], Any]:
    return lambda: ({"values": np.full(3, number)}, {"number": number})


def kept() -> Any:
    return container.unpack(Path(KEPT).read_bytes(), "c")[1]["number"] if os.path.exists(KEPT) else None


def test_a_checkpoint_every_so_often(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(checkpoint, "EVERY", 10)
    with checkpointer() as kept_by:
        seen = []
        for number in range(50):
            clock[0] += 1
            kept_by.offer(state(number), "words")
            seen.append(kept())
    assert seen[:9] == [None] * 9
    assert seen[9:] == [9 + (i - 9) // 10 * 10 for i in range(9, 50)]
    kept_by.remove()
    assert contents(here).keys() == {"x.npy"}


def test_what_takes_long_comes_less_often(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, written = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(checkpoint, "EVERY", 10)
    monkeypatch.setattr(checkpoint, "SHARE", 20)

    def slow(self: Checkpointer) -> None:
        clock[0] += 5
        written.append(clock[0])

    monkeypatch.setattr(Checkpointer, "_save", slow)
    with checkpointer() as kept_by:
        while clock[0] < 400:
            clock[0] += 1
            kept_by.offer(state(0), "words")
    assert np.diff(written).min() >= 100


def test_a_full_disk_warns_once_and_the_run_continues(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = atomic.fill

    def full(temporary: str, content: bytes) -> None:
        if "checkpoint" in temporary:
            raise OSError(28, os.strerror(28))
        fill(temporary, content)

    monkeypatch.setattr(atomic, "fill", full)
    result = good("fit", "x.npy", "--nan", "omit", "--batch-size", "16")
    told = [line for line in result.err.splitlines() if "without a checkpoint" in line]
    assert len(told) == 1
    assert f"{KEPT}: cannot be written: No space left on device" in told[0]
    assert contents(here).keys() == {"x.npy", "x.bn.h5"}


def test_one_that_cannot_be_removed_warns(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = os.unlink

    def stuck(path: str) -> None:
        if path.endswith(".checkpoint"):
            raise OSError(5, os.strerror(5))
        unlink(path)

    monkeypatch.setattr(os, "unlink", stuck)
    result = good("fit", "x.npy", "--nan", "omit", "--batch-size", "16")
    assert f"bn: warning: {KEPT}" in result.err.replace(str(here.resolve()) + "/", "")
    assert "cannot be removed: Input/output error" in result.err


def test_a_failed_checkpoint_leaves_the_one_before(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with checkpointer() as kept_by:
        kept_by.offer(state(1), "one")
        monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.warns(BnWarning, match="without a checkpoint"):
            kept_by.offer(state(2), "two")
        monkeypatch.undo()
        monkeypatch.chdir(here)
        assert kept() == 1
        assert kept_by._stopped() == f"continue with --resume ({KEPT} keeps two)"
        assert kept() == 2
    assert temporaries(here) == []


def test_fingerprint_holds_every_option_that_matters() -> None:
    """New options are part of it, unless named as not affecting the result."""
    from bncli.engine.plan import FitSpec
    from bncli.engine.task import FREE

    assert set(FREE) <= set(FitSpec.__dataclass_fields__)
    assert set(FREE) == {"workers", "max_memory", "dataset", "part", "on"}


def test_bits_see_a_difference(here: Path) -> None:
    """The comparison used in this file can fail."""
    assert bits(fitted()) != bits(fitted(momentum=0.98))
