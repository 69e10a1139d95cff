"""`bn fit --target`: what it says, what it writes, what it refuses; going on from a stats file; little memory."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from cli_helpers import bn, check_refused, good, no_controls, on_terminal, plain, save, save_h5, untouched
from helpers import ANY_ADVICE, advised
from test_memory import LIMIT_MB, peak_mb, sparse_npy

import bncli
from bncli.engine.checkpoint import Checkpointer
from bncli.engine.fit import fit_to_file, make_spec
from bncli.errors import InputError

Array = npt.NDArray[Any]
SAMPLE = Path(__file__).parents[2] / "sample_data" / "cancer_train.h5"


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """An HDF5 file of 300 samples, x, their labels, y, and numbers to predict, z."""
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=300)
    path = save_h5(tmp_path / "data.h5", rng.standard_normal((300, 4)) * 3 + labels[:, None] * 2)
    with h5py.File(path, "a") as file:
        file["y"] = labels
        file["z"] = rng.standard_normal((300, 2))
        file["bad"] = np.where(np.arange(300) == 123, np.nan, 1.0)
    return path


def fit(path: Path, *options: object, output: str = "s.bn.h5") -> list[object]:
    return ["fit", f"{path}::/x", "-o", path.parent / output, *options]


def test_summary_says_what_learning_bought(tmp_path: Path) -> None:
    out = tmp_path / "s.bn.h5"
    result = good("fit", SAMPLE, "--eps", "1e-8", "--target", "::/y", "--holdout", "0.3", "-o", out)
    assert "1,000 batches of 256 in 500 epochs" in result.out
    found = re.search(r"held-out loss ([\d.]+), ([\d.]+)% right; with gamma 1, beta 0 .* ([\d.]+)\n", result.out)
    assert found
    stats = bncli.load(str(out))
    assert stats.learned is not None
    assert float(found[1]) == pytest.approx(stats.learned.holdout_loss[-1], rel=1e-3)
    assert float(found[3]) == pytest.approx(stats.learned.holdout_loss_fixed, rel=1e-3)
    assert float(found[1]) < float(found[3])
    assert "did not help" not in result.out
    shown = plain(on_terminal(["inspect", str(out), "--top", "2"]).out)
    assert "learned in 500 epochs" in shown
    assert found[1] in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_without_a_hold_out_it_says_that_only_the_training_loss_is_known(labelled: Path) -> None:
    out = good(*fit(labelled, "--target", "::/y", "--epochs", 3)).out
    assert "training loss" in out
    assert "no sample was held out" in out
    assert "held-out loss" not in out


def test_it_says_when_learning_did_not_help(tmp_path: Path) -> None:
    labels = save(tmp_path / "random.npy", np.random.default_rng(1).integers(2, size=455))
    options = ["--target", labels, "--holdout", "0.3", "--epochs", "250", "-o", tmp_path / "s.bn.h5"]
    out = good("fit", SAMPLE, "--eps", "1e-8", *options).out
    found = re.search(r"held-out loss ([\d.]+),.* ([\d.]+)\n", out)
    assert found
    assert float(found[1]) > max(math.log(2), float(found[2]))
    assert "did not help" in out


def test_json_is_as_promised(labelled: Path) -> None:
    record = json.loads(good(*fit(labelled, "--target", "::/y", "--holdout", "0.2", "--epochs", 4, "--json")).out)
    learning = record["learning"]
    assert set(learning) == {"epochs", "holdout_loss", "holdout_loss_fixed"}
    assert len(learning["epochs"]) == 4
    assert all(set(e) == {"train_loss", "holdout_loss", "accuracy"} for e in learning["epochs"])
    assert learning["holdout_loss"] == learning["epochs"][-1]["holdout_loss"]
    stored = json.loads(good("inspect", labelled.parent / "s.bn.h5", "--json").out)
    assert stored["learning"] == learning
    assert "learning" not in json.loads(good(*fit(labelled, "--json", output="plain.bn.h5")).out)


def test_dry_run_shows_the_plan_and_writes_nothing(labelled: Path) -> None:
    with untouched(labelled.parent):
        out = good(*fit(labelled, "--target", "::/y", "--holdout", "0.25", "--batch-size", 32, "-n")).out
    assert "labels (cross-entropy, sigmoid): 143 epochs of 7 batches" in out  # the last of 1 sample is left out
    assert "75 samples held out" in out
    out = good(*fit(labelled, "--target", "::/z", "--lr", "0.5", "--epochs", 7, "--optimizer", "sgd", "-n")).out
    assert "2 numbers (mse, identity): 7 epochs of 2 batches, sgd with lr 0.5, none held out" in out
    assert "own shape" in good(*fit(labelled, "--target", "::/x", "-n")).out


def test_progress_tells_of_every_epoch(labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bncli.render.progress.APPEARS_AFTER", 0.0)
    monkeypatch.setattr("bncli.render.progress.LINE_EVERY", 0.0)
    err = good(*fit(labelled, "--target", "::/y", "--holdout", "0.2", "--epochs", 3)).err
    for epoch in (1, 2, 3):
        assert re.search(rf"epoch {epoch}/3: loss [\d.]+, held-out [\d.]+, [\d.]+% right", err)
    assert no_controls(err)
    assert good(*fit(labelled, "--target", "::/y", "--epochs", 2, "-q", "-f")).err == ""


def test_like_goes_on_from_a_stats_file(labelled: Path) -> None:
    folder = labelled.parent
    common = ["--target", "::/y", "--lr", "0.02", "--batch-size", "300", "--no-shuffle"]
    good(*fit(labelled, *common, "--epochs", 9, output="whole.bn.h5"))
    good(*fit(labelled, *common, "--epochs", 4, output="half.bn.h5"))
    good(*fit(labelled, *common, "--epochs", 5, "--like", folder / "half.bn.h5", output="rest.bn.h5"))
    whole, rest = (bncli.load(str(folder / f"{name}.bn.h5")) for name in ("whole", "rest"))
    assert whole.learned is not None
    assert rest.learned is not None
    for name in ("gamma", "beta"):
        assert getattr(whole, name).tobytes() == getattr(rest, name).tobytes()
    for name in ("weight", "bias", "first", "second"):
        assert getattr(whole.learned, name).tobytes() == getattr(rest.learned, name).tobytes()
    assert whole.learned.train_loss[4:].tobytes() == rest.learned.train_loss.tobytes()
    check_refused(4, fit(labelled, "--target", "::/z", "--like", folder / "half.bn.h5", "-f"), "--like")
    other = save(folder / "other.npy", np.arange(300) % 2 + 1)
    check_refused(4, fit(labelled, "--target", other, "--like", folder / "half.bn.h5", "-f"), "classes")


def test_merge_says_what_it_leaves_out(labelled: Path) -> None:
    good(*fit(labelled, "--target", "::/y", "--epochs", 2, "--lr", "1e-9", "--optimizer", "sgd"))
    result = good("merge", labelled.parent / "s.bn.h5", "-o", labelled.parent / "m.bn.h5")
    assert "are not merged" in result.err
    assert bncli.load(str(labelled.parent / "m.bn.h5")).learned is None


@pytest.mark.parametrize(
    ("code", "options", "words"),
    [
        (2, ["--epochs", "3"], ["--epochs", "--target"]),
        (2, ["--holdout", "0.2"], ["--holdout", "--target"]),
        (2, ["--target", "::/y", "--nan", "omit"], ["--nan omit", "--target"]),
        (2, ["--target", "::/y", "--fill-value", "-1"], ["--fill-value", "--target"]),
        (2, ["--target", "::/z", "--loss", "cross-entropy"], ["integer labels"]),
        (2, ["--target", "::/x", "--activation", "relu"], ["--activation relu"]),
        (2, ["--target", "::/y", "--holdout", "1"], ["--holdout", "0 <= F < 1"]),
        (2, ["--target", "::"], ["names no dataset"]),
        (3, ["--target", "::/none"], ["/none"]),
        (3, ["--target", "missing.npy"], ["missing.npy"]),
        (3, ["--target", "::/bad"], ["::/bad: sample 123 is nan"]),
        (3, ["--target", "::/z", "--lr", "1e9", "--optimizer", "sgd"], ["diverged", "epoch", "batch", "--lr 1e+09"]),
        (4, ["--target", SAMPLE], ["455", "300"]),
    ],
)
def test_refusals_leave_nothing(labelled: Path, code: int, options: list[str], words: list[str]) -> None:
    options = [f"{SAMPLE}::/y" if option == SAMPLE else option for option in options]
    with untouched(labelled.parent):
        check_refused(code, fit(labelled, *options), *words, lines=5)


def test_divergence_leaves_no_checkpoint(labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bncli.engine.checkpoint.EVERY", 0.0)
    monkeypatch.setattr("bncli.engine.checkpoint.SHARE", 0)
    kept = []
    offer = Checkpointer.offer

    def offered(checkpointer: Checkpointer, *given: Any) -> None:
        offer(checkpointer, *given)
        kept.append(Path(checkpointer.path).exists())

    monkeypatch.setattr(Checkpointer, "offer", offered)
    with untouched(labelled.parent):
        result = check_refused(
            3, fit(labelled, "--target", "::/z", "--lr", "1e9", "--optimizer", "sgd"), "diverged", lines=5
        )
    assert any(kept)
    assert "--resume" not in result.err


def test_progress_after_a_resume_counts_what_this_run_read(labelled: Path) -> None:
    path, told = labelled.parent / "s.bn.h5", list[tuple[int, int, int]]()

    def stop(done: int, total: int, size: int, *_: str) -> None:
        told.append((done, total, size))
        if len(told) == 3:
            raise InputError("stop")

    options: dict[str, Any] = {"target": "::/y", "epochs": 4, "batch_size": 10}
    spec = make_spec(options)
    with pytest.MonkeyPatch.context() as patch, advised(*ANY_ADVICE, "--resume", "continues from"):
        patch.setattr("bncli.engine.checkpoint.EVERY", 0.0)
        patch.setattr("bncli.engine.checkpoint.SHARE", 0)
        with pytest.raises(InputError, match="stop"):
            fit_to_file([f"{labelled}::/x"], spec, str(path), progress=stop)
        told.clear()
        fit_to_file([f"{labelled}::/x"], spec, str(path), resume=True, progress=lambda *given: told.append(given[:3]))
    assert told[0] == (240, 1200, 0)  # three runs of 8 batches
    assert told[-1] == (1200, 1200, 960 * 4 * 8)


def test_the_target_is_no_output(labelled: Path) -> None:
    labels = save(labelled.parent / "y.npy", np.arange(300) % 2)
    with untouched(labelled.parent):
        check_refused(5, ["fit", f"{labelled}::/x", "--target", labels, "-o", labels, "-f"], "y.npy")


def test_targets_beside_many_inputs_are_found_in_each(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((90, 2)), np.arange(90) % 3
    for i, rows in enumerate((slice(0, 50), slice(50, 90))):
        with h5py.File(save_h5(tmp_path / f"part-{i}.h5", x[rows]), "a") as file:
            file["y"] = y[rows]
    options = ["--epochs", "2", "--batch-size", "16"]
    good("fit", tmp_path / "part-*.h5", "-d", "x", "--target", "::/y", "-o", tmp_path / "a.bn.h5", *options)
    good(
        "fit",
        save(tmp_path / "x.npy", x),
        "--target",
        save(tmp_path / "y.npy", y),
        "-o",
        tmp_path / "b.bn.h5",
        *options,
    )
    assert (
        bncli.load(str(tmp_path / "a.bn.h5")).gamma.tobytes() == bncli.load(str(tmp_path / "b.bn.h5")).gamma.tobytes()
    )
    assert bn("fit", tmp_path / "x.npy", "--target", "::/y", "-o", tmp_path / "c.bn.h5").code == 3


def test_learning_holds_little_of_a_large_file(tmp_path: Path) -> None:
    data, labels, out = tmp_path / "x.npy", tmp_path / "y.npy", tmp_path / "s.bn.h5"
    sparse_npy(data, (800_000, 256), "<f4")
    sparse_npy(labels, (800_000,), "<i8")
    assert data.stat().st_size > 2.4 * LIMIT_MB * 1e6
    options = ["--target", str(labels), "--epochs", "1", "--batch-size", "4096", "--holdout", "0.1", "-o", str(out)]
    peak, code = peak_mb("fit", str(data), "-q", *options)
    assert code == 0
    assert peak < LIMIT_MB
    assert bncli.load(str(out)).num_samples == 720_000
