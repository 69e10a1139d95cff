"""Training of gamma and beta from files and arrays: against torch, closed forms, and byte for byte."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from cli_helpers import save, save_h5
from helpers import ANY_ADVICE, advised, peer

import bncli
from bncli import Stats
from bncli.engine.executors import in_threads
from bncli.engine.fit import make_spec
from bncli.engine.learning import setup
from bncli.engine.learning.setup import Plan, Setup, open_target
from bncli.engine.learning.trainer import Trainer, TrainingState
from bncli.engine.order import Order
from bncli.engine.parts import Recurrence
from bncli.errors import BnWarning, InputError, MismatchError, UsageError
from bncli.formats.dataset import Joined
from bncli.formats.reading import ReadOptions
from bncli.numerics import learning
from bncli.numerics.layout import Layout
from bncli.render.summary import fit_summary

Array = npt.NDArray[Any]
SAMPLE = Path(__file__).parents[3] / "sample_data" / "cancer_train.h5"


def fit(source: Any, **options: Any) -> Stats:
    """`bncli.fit`, with warnings about the data allowed."""
    with advised(*ANY_ADVICE):
        return bncli.fit(source, **options)


def cancer() -> tuple[Array, Array]:
    with h5py.File(SAMPLE) as file:
        return file["x"][()], file["y"][()]


def classified(n: int = 320, c: int = 6, classes: int = 3, seed: int = 1) -> tuple[Array, Array]:
    """Samples of classes with different centers, far from 0 and in different units; labels other than 0, 1, 2."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    x = rng.standard_normal((n, c)) + rng.standard_normal((classes, c))[labels]
    return x * 10.0 ** np.arange(c) + 7, labels * 5 - 3


def shuffled(stats: Stats, x: Array, epoch: int) -> Array:
    """Sample indices in the order of training."""
    options = stats.options
    order = Order(len(x), x[0].size, options.get("seed", 0), options.get("holdout", 0.0), "shuffle" in options)
    return order.indices(0, order.count, epoch)


def held(stats: Stats, x: Array) -> Array:
    order = Order(len(x), x[0].size, stats.options["seed"], stats.options["holdout"])
    return order.held_out(0, order.held)


# --- against torch


@pytest.mark.parametrize("optimizer", learning.OPTIMIZERS)
@pytest.mark.parametrize("kind", ["labels", "numbers", "distillation"])
def test_fifty_steps_equal_those_of_torch(optimizer: str, kind: str) -> None:
    torch = peer("torch")
    x, labels = classified()
    rng = np.random.default_rng(2)
    target = {"labels": labels, "numbers": rng.standard_normal((320, 2)), "distillation": rng.standard_normal(x.shape)}[
        kind
    ]
    stats = fit(x, target=target, preset="torch", batch_size=32, epochs=5, optimizer=optimizer, lr=0.03, seed=4)

    norm = torch.nn.BatchNorm1d(6, dtype=torch.float64)
    head = torch.nn.Linear(6, {"labels": 3, "numbers": 2, "distillation": 1}[kind], dtype=torch.float64)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    parameters = [*norm.parameters(), *(head.parameters() if kind != "distillation" else [])]
    theirs = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer](parameters, lr=0.03)
    wanted = torch.tensor((labels + 3) // 5 if kind == "labels" else target)
    for epoch in range(5):
        order = shuffled(stats, x, epoch)
        for rows in (order[i : i + 32] for i in range(0, 320, 32)):
            y = norm(torch.tensor(x[rows]))
            theirs.zero_grad()
            if kind == "labels":
                loss = torch.nn.functional.cross_entropy(head(torch.sigmoid(y)), wanted[rows])
            else:
                loss = torch.nn.functional.mse_loss(y if kind == "distillation" else head(y), wanted[rows])
            loss.backward()
            theirs.step()
    state = {k: v.numpy() for k, v in norm.state_dict().items() if v.ndim}
    assert np.abs(stats.gamma - 1).max() > 1e-3
    for found, name in ((stats.gamma, "weight"), (stats.beta, "bias")):
        np.testing.assert_allclose(found, state[name], rtol=0, atol=1e-8)
    for found, name in ((stats.running_mean, "running_mean"), (stats.running_var, "running_var")):
        np.testing.assert_allclose(found, state[name], rtol=1e-8)
    if kind != "distillation":
        assert stats.learned is not None
        np.testing.assert_allclose(stats.learned.weight, head.weight.detach(), rtol=0, atol=1e-8)
        np.testing.assert_allclose(stats.learned.bias, head.bias.detach(), rtol=0, atol=1e-8)


# --- what training achieves, and what it must not claim


def recomputed_loss(stats: Stats, x: Array, labels: Array) -> float:
    """Cross-entropy of the held-out samples, computed from the contents of the stats file."""
    learned = stats.learned
    assert learned is not None
    rows = held(stats, x)
    a = 1 / (1 + np.exp(-stats.normalize(x[rows])))
    outputs = a @ learned.weight.T + learned.bias
    top = outputs.max(axis=1, keepdims=True)
    logs = outputs - top - np.log(np.exp(outputs - top).sum(axis=1, keepdims=True))
    assert learned.classes is not None
    return float(
        -np.mean([row[learned.classes.tolist().index(label)] for row, label in zip(logs, labels[rows], strict=True)])
    )


def test_the_sample_table_is_learned_better_with_gamma_and_beta() -> None:
    x, y = cancer()
    better = 0
    for seed in range(10):
        stats = fit(x, target=y, holdout=0.3, batch_size=32, epochs=30, lr=0.01, seed=seed)
        assert stats.learned is not None
        found, fixed = stats.learned.holdout_loss[-1], stats.learned.holdout_loss_fixed
        assert found == pytest.approx(recomputed_loss(stats, x, y), rel=1e-9)
        assert 0.15 < fixed < 0.4
        better += found < fixed
    assert better >= 8


def test_the_sample_table_with_default_settings() -> None:
    x, y = cancer()
    stats = fit(x, target=y, holdout=0.3)
    assert stats.learned is not None
    assert stats.learned.settings["steps"] >= 1000
    assert stats.learned.holdout_loss[-1] < stats.learned.holdout_loss_fixed
    assert stats.learned.accuracy[-1] > 0.94


def test_random_labels_are_not_learned() -> None:
    x, _ = cancer()
    labels = np.random.default_rng(3).integers(2, size=len(x))
    stats = fit(x, target=labels, holdout=0.3, epochs=100, seed=1)
    assert stats.learned is not None
    assert stats.learned.holdout_loss[-1] == pytest.approx(recomputed_loss(stats, x, labels), rel=1e-9)
    assert stats.learned.holdout_loss[-1] > math.log(2)
    assert stats.learned.train_loss[-1] < math.log(2)


def closed_form(x: Array, target: Array, batches: list[Array], eps: float) -> tuple[Array, Array]:
    """Least squares of the target on the values normalized batch by batch, for each feature."""
    z = np.concatenate([(x[b] - x[b].mean(0)) / np.sqrt(x[b].var(0) + eps) for b in batches])
    t = np.concatenate([target[b] for b in batches])
    gamma = ((z - z.mean(0)) * (t - t.mean(0))).mean(0) / z.var(0)
    return gamma, t.mean(0) - gamma * z.mean(0)


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-3, 7.0), (300.0, -1e4)])
def test_distillation_of_one_batch_reaches_its_closed_form(scale: float, offset: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 5)) * [1, 0.01, 3, 100, 1] + 10
    x[:, 4] = 2  # constant: gamma has no effect, only beta can fit
    target = scale * (x * rng.uniform(-2, 2, 5) + rng.standard_normal((200, 5))) + offset
    stats = fit(x, target=target, eps=1e-3)
    gamma, beta = closed_form(x[:, :4], target[:, :4], [np.arange(200)], 1e-3)
    np.testing.assert_allclose(stats.gamma[:4], gamma, rtol=0, atol=1e-6 * max(1, scale))
    np.testing.assert_allclose(stats.beta[:4], beta, rtol=0, atol=1e-6 * max(1, abs(offset)))
    assert stats.beta[4] == pytest.approx(target[:, 4].mean(), abs=1e-6 * max(1, abs(offset)))


@pytest.mark.parametrize("batch_size", [32, 256])
def test_distillation_of_many_batches_is_as_good_as_the_closed_form(batch_size: int) -> None:
    rng = np.random.default_rng(1)
    x = rng.gamma(2, size=(5000, 4)) * [1, 5, 0.1, 30]
    target = x * [2, -1, 40, 0.1] + rng.standard_normal((5000, 4)) * 0.5 - 7
    stats = fit(x, target=target, holdout=0.2, batch_size=batch_size)
    assert stats.learned is not None
    epochs = [shuffled(stats, x, epoch) for epoch in range(len(stats.learned.train_loss))]
    batches = [order[i : i + batch_size] for order in epochs for i in range(0, len(order), batch_size)]
    gamma, beta = closed_form(x, target, batches, stats.eps)
    rows = held(stats, x)
    z = (x[rows] - stats.running_mean) / np.sqrt(stats.running_var + stats.eps)
    best = np.square(gamma * z + beta - target[rows]).mean()
    assert np.square(stats.gamma * z + stats.beta - target[rows]).mean() == pytest.approx(
        stats.learned.holdout_loss[-1], rel=1e-12
    )
    assert stats.learned.holdout_loss[-1] < 1.02 * best


def test_numbers_of_any_scale_are_learned() -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((2000, 3)) * [1, 100, 0.01] + [0, 1e4, 5]
    for scale in (1e-4, 1.0, 1e6):
        target = scale * ((x - x.mean(0)) / x.std(0) @ [1.0, -2.0, 0.5] + 3)
        stats = fit(x, target=target, holdout=0.2)
        assert stats.learned is not None
        assert stats.learned.holdout_loss[-1] < 0.02 * target.var()


# --- which samples the statistics count


def test_population_is_counted_once_and_running_over_all_epochs() -> None:
    x, labels = classified()
    stats = fit(x, target=labels, batch_size=32, epochs=4, momentum=0.5)
    assert stats.population_count.tolist() == [320] * 6
    np.testing.assert_allclose(stats.population_mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(stats.population_var, x.var(0), rtol=1e-13)
    assert (stats.num_samples, stats.num_batches) == (320, 40)
    mean, weight = np.zeros(6), 0.0
    for order in (shuffled(stats, x, epoch) for epoch in range(4)):
        for i in range(0, 320, 32):
            mean, weight = 0.5 * mean + 0.5 * x[order[i : i + 32]].mean(0), 0.5 * weight + 0.5
    np.testing.assert_allclose(stats.running_mean, mean / weight, rtol=1e-12)


def test_samples_held_out_are_never_seen() -> None:
    x, labels = classified()
    one = fit(x, target=labels, holdout=0.25, epochs=3, batch_size=32)
    poisoned = x.copy()
    poisoned[held(one, x)] = 1e9
    two = fit(poisoned, target=labels, holdout=0.25, epochs=3, batch_size=32)
    assert one.learned is not None
    assert two.learned is not None
    assert one.num_samples == 240
    for name in ("running_mean", "running_var", "population_mean", "population_var", "gamma", "beta"):
        assert getattr(one, name).tobytes() == getattr(two, name).tobytes()
    assert one.learned.train_loss.tobytes() == two.learned.train_loss.tobytes()
    assert one.learned.holdout_loss[-1] != two.learned.holdout_loss[-1]


def test_momentum_none_and_no_shuffle() -> None:
    x, labels = classified()
    stats = fit(x, target=labels, momentum="none", shuffle=False, batch_size=32, epochs=2, holdout=0.2)
    assert "shuffle" not in stats.options
    rows = shuffled(stats, x, 0)
    assert (np.diff(rows) > 0).all()
    np.testing.assert_allclose(stats.running_var, x[rows].var(0), rtol=1e-12)


def test_last_batch_of_one_value_is_counted_and_not_learned_from() -> None:
    x, labels = classified(n=65)
    stats = fit(x, target=labels, batch_size=32, epochs=3)
    assert (stats.num_samples, stats.num_batches, stats.num_left_out) == (65, 6, 1)
    assert stats.learned is not None
    assert stats.learned.settings["steps"] == 6
    assert stats.population_count[0] == 65


def test_images_learn_from_the_mean_over_space() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=400)
    x = (
        rng.standard_normal((400, 3, 5, 4)) * 20 + 100 + 15 * labels[:, None, None, None] * [[[1]], [[-1]], [[0]]]
    ).astype("f4")
    stats = fit(x, target=labels, axis=1, holdout=0.25, activation="relu", epochs=30, lr=0.1)
    assert stats.learned is not None
    assert stats.learned.weight.shape == (2, 3)
    assert stats.learned.accuracy[-1] > 0.95


# --- the same bytes


def contents(stats: Stats) -> list[bytes]:
    learned = stats.learned
    assert learned is not None
    arrays = [
        stats.running_mean,
        stats.running_var,
        stats.gamma,
        stats.beta,
        stats.population_mean,
        *learned.arrays().values(),
    ]
    return [a.tobytes() for a in arrays] + [np.float64(learned.holdout_loss_fixed).tobytes()]


def test_same_bytes_for_any_workers_files_chunks_and_memory(tmp_path: Path) -> None:
    x, labels = classified(n=900)
    options: dict[str, Any] = {"holdout": 0.2, "batch_size": 64, "epochs": 3, "seed": 9}
    one = contents(fit(x, target=labels, **options))
    parts = [save(tmp_path / f"{i}.npy", p) for i, p in enumerate(np.split(x, [100, 333]))]
    whole = save(tmp_path / "y.npy", labels)
    joined = tmp_path / "joined.h5"
    with h5py.File(joined, "w") as file:
        file.create_dataset("x", data=x, chunks=(70, 2), compression=1)
        file.create_dataset("y", data=labels[:, None], chunks=(11, 1))
    for workers in (1, 2, 3):
        assert contents(fit([*map(str, parts)], target=str(whole), workers=workers, **options)) == one
        assert contents(fit(f"{joined}::/x", target="::/y", workers=workers, max_memory="6M", **options)) == one
    assert contents(fit(x, target=labels, **(options | {"seed": 10}))) != one


@pytest.mark.parametrize("stop", [1, 4, 5, 6, 11, 15])
def test_a_training_state_continues_as_if_never_interrupted(stop: int) -> None:
    x, labels = classified(n=257)
    spec = make_spec({"target": labels, "holdout": 0.25, "batch_size": 6, "epochs": 3})

    def states(start: TrainingState | None = None) -> list[TrainingState]:
        data = Joined(x, ReadOptions(max_memory=spec.max_memory))
        layout, targets = Layout.of(x.shape, -1), open_target(spec, data)
        plan = Plan.of(spec, data, layout, targets)
        made = Setup.of(plan, layout, targets, 1e-5, np.ones(6), np.zeros(6), None, spec.max_memory)
        return list(Trainer(made, data, targets, spec.conventions(), spec.max_memory, 2).states(start))

    whole = states()
    kept = whole[stop - 1]
    packed, plain = kept.pack()
    rest = states(TrainingState.unpack({k: v.copy() for k, v in packed.items()}, dict(plain), kept.tree))
    assert len(rest) == len(whole) - stop
    for one, other in zip(rest, whole[stop:], strict=True):
        assert one.pack()[1] == other.pack()[1]
        assert [v.tobytes() for v in one.pack()[0].values()] == [v.tobytes() for v in other.pack()[0].values()]
        one_fold, other_fold = one.tree.fold(0.9), other.tree.fold(0.9)
        assert one_fold[Recurrence].running.a.tobytes() == other_fold[Recurrence].running.a.tobytes()


# --- the file


def test_what_was_learned_survives_the_file(tmp_path: Path) -> None:
    x, labels = classified()
    stats = fit(x, target=labels, holdout=0.2, epochs=2)
    stats.save(str(tmp_path / "s.bn.h5"))
    again = bncli.load(str(tmp_path / "s.bn.h5"))
    assert contents(again) == contents(stats)
    assert again.learned is not None
    assert stats.learned is not None
    assert again.learned.settings == stats.learned.settings
    assert again.learned.classes is not None
    assert again.learned.classes.tolist() == [-3, 2, 7]
    found = again.as_dict()["learning"]
    assert [set(e) for e in found["epochs"]] == [{"train_loss", "holdout_loss", "accuracy"}] * 2
    assert found["holdout_loss"] == stats.learned.holdout_loss[-1]
    assert found["holdout_loss_fixed"] == stats.learned.holdout_loss_fixed


@pytest.mark.parametrize(
    ("part", "value"),
    [("weight", np.zeros((3, 5))), ("bias", np.zeros(2)), ("first", np.zeros(3)), ("fixed", np.zeros((2, 33))), ("classes", np.arange(2)),
     ("accuracy", np.zeros(3)), ("train_loss", np.zeros((2, 1))), ("train_loss", np.zeros(0)), ("settings", {})],
)  # fmt: skip
def test_parts_that_do_not_belong_together_are_refused(part: str, value: Any) -> None:
    x, labels = classified()
    stats = fit(x, target=labels, epochs=2)
    assert stats.learned is not None
    with pytest.raises(MismatchError, match="learned"):
        replace(stats, learned=replace(stats.learned, **{part: value}))


def test_like_keeps_activation_and_optimizer() -> None:
    x, labels = classified()
    first = fit(x, target=labels, epochs=2, activation="tanh", optimizer="sgd")
    again = fit(x, target=labels, epochs=2, like=first)
    other = fit(x, target=labels, epochs=2, like=first, activation="relu")
    numbers = fit(x, target=x[:, 0], epochs=1, like=replace(first, learned=None))
    found = [
        (s.learned.settings["activation"], s.learned.settings["optimizer"])
        for s in (again, other, numbers)
        if s.learned
    ]
    assert found == [("tanh", "sgd"), ("relu", "sgd"), ("identity", "adam")]


def test_like_goes_on_with_the_comparison_too() -> None:
    x, labels = classified()
    options: dict[str, Any] = {"holdout": 0.25, "batch_size": 240, "lr": 0.02, "shuffle": False}
    whole = fit(x, target=labels, epochs=7, **options).learned
    rest = fit(x, target=labels, epochs=3, like=fit(x, target=labels, epochs=4, **options), **options).learned
    assert whole is not None
    assert rest is not None
    assert whole.fixed.tobytes() == rest.fixed.tobytes()
    seen = fit(x, target=labels, epochs=2, batch_size=240)
    with pytest.warns(BnWarning, match="may have been learned from samples that are held out now"):
        unlike = bncli.fit(x, target=labels, epochs=2, like=seen, holdout=0.25)
    assert unlike.as_dict()["learning"]["holdout_loss_fixed"] is None
    assert "nothing to compare with" in fit_summary(unlike, "s.bn.h5")


def test_fit_warns_about_samples_seen_anywhere_in_a_chain(tmp_path: Path) -> None:
    x, labels = classified()
    first, second = str(tmp_path / "1.bn.h5"), str(tmp_path / "2.bn.h5")
    same: dict[str, Any] = {"target": labels, "epochs": 1, "holdout": 0.2}
    fit(x, **same).save(first)
    with pytest.warns(BnWarning, match="held out now"):
        bncli.fit(x, **same, seed=1, like=first).save(second)
    with pytest.warns(BnWarning, match="held out now"):
        bncli.fit(x, **same, seed=1, like=second)
    with pytest.warns(BnWarning, match="held out now"):
        bncli.fit(x, **same, rows=(10, None), like=first)
    fit(x, **same, like=first)  # no other warning


@pytest.mark.parametrize("parameter", ["gamma", "beta"])
def test_fit_warns_about_samples_that_gamma_or_beta_saw(tmp_path: Path, parameter: str) -> None:
    x, labels = classified()
    first = str(tmp_path / "1.bn.h5")
    same: dict[str, Any] = {"target": labels, "epochs": 1, "holdout": 0.2}
    fit(x, **same).save(first)
    fit(x, **same, **{parameter: first})  # no warning: the same samples are held out
    with pytest.warns(BnWarning, match="--gamma or --beta may have been learned from samples that are held out now"):
        bncli.fit(x, **same, seed=1, **{parameter: first})


def test_without_a_hold_out_there_is_no_held_out_loss() -> None:
    x, labels = classified()
    found = fit(x, target=labels, epochs=2).as_dict()["learning"]
    assert found["holdout_loss"] is found["holdout_loss_fixed"] is found["epochs"][0]["holdout_loss"] is None
    assert 0 <= found["epochs"][1]["accuracy"] <= 1
    numbers = fit(x, target=x[:, :2] / 1e5, epochs=2).as_dict()["learning"]
    assert numbers["epochs"][0]["accuracy"] is None


def test_rows_apply_to_the_target_too(tmp_path: Path) -> None:
    x, labels = classified()
    one = fit(x, target=labels, rows=(40, 300), epochs=2)
    assert contents(one) == contents(fit(x[40:300], target=labels[40:300], epochs=2))


# --- refusals


def refused(kind: type[Exception], words: str, x: Any, **options: Any) -> None:
    with pytest.raises(kind, match=words):
        bncli.fit(x, **options)


def test_targets_that_do_not_fit(tmp_path: Path) -> None:
    x, labels = classified(n=100)
    refused(MismatchError, "99 samples", x, target=labels[:99])
    refused(MismatchError, "shape", x, target=np.zeros((100, 2, 3)))
    refused(MismatchError, "--loss mse", x, target=np.zeros((100, 2), int))
    refused(UsageError, "needs integer labels", x, target=labels / 2, loss="cross-entropy")
    refused(UsageError, "--activation tanh", x, target=x, activation="tanh")
    refused(InputError, "every label is 4", x, target=np.full(100, 4))
    refused(UsageError, "no such|read only once", iter([x]), target=labels)
    files = [save_h5(tmp_path / f"{i}.h5", x[:50]) for i in range(2)]
    for path, count in zip(files, (40, 60), strict=True):
        with h5py.File(path, "a") as file:
            file["y"] = labels[:count]
    refused(
        MismatchError, r"0\.h5::/y holds 40 samples, .*0\.h5::/x 50", [*map(str, files)], dataset="/x", target="::/y"
    )


def test_rows_do_not_hide_another_length() -> None:
    x, labels = classified(n=100)
    refused(MismatchError, "99 samples", x, target=labels[:99], rows=(0, 50))


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    x, _ = classified(n=100)
    target = np.zeros(100)
    target[70] = np.inf
    refused(InputError, "sample 70 is inf", x, target=target)
    path = save(tmp_path / "x.npy", np.where(np.arange(600).reshape(100, 6) == 33 * 6 + 4, np.nan, x))
    words = r"x\.npy: sample 33, feature 4 is nan; leave such samples out$"
    refused(InputError, words, str(path), target=np.arange(100) % 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 3}, "--epochs .*--target"),
        ({"holdout": 0.1}, "--holdout .*--target"),
        ({"target": "y", "nan": "omit"}, "--nan omit"),
        ({"target": "y", "fill_value": 0}, "--fill-value"),
        ({"target": "y", "lr": 0.0}, "--lr"),
        ({"target": "y", "lr": math.inf}, "--lr"),
        ({"target": "y", "epochs": 0}, "--epochs"),
        ({"target": "y", "loss": "hinge"}, "--loss"),
        ({"target": "y", "activation": "gelu"}, "--activation"),
        ({"target": "y", "optimizer": "lamb"}, "--optimizer"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    refused(UsageError, words, np.eye(4), **options)


def test_too_few_samples() -> None:
    x, labels = classified(n=100)
    refused(UsageError, "holds out no sample", x, target=labels, holdout=0.001)
    refused(InputError, "left to train on", x[:2], target=labels[:2], holdout=0.5)


def test_labels_that_must_be_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "MOST_CLASSES", 50)
    x, _ = classified(n=100)
    refused(InputError, "more than 50 different labels", x, target=np.arange(100))
    stats = fit(x, target=np.arange(100), loss="mse", epochs=1)
    assert stats.learned is not None
    assert stats.learned.weight.shape == (1, 6)


def test_a_batch_that_does_not_fit_is_refused_with_a_size_that_does() -> None:
    x = np.random.default_rng(0).standard_normal((600, 5000)).astype("f4")
    labels = np.arange(600) % 2
    with pytest.raises(UsageError, match=r"--batch-size 300: .*; (\d+) does") as caught:
        bncli.fit(x, target=labels, batch_size=300, max_memory="16M")
    size = int(str(caught.value).split()[-2])
    assert 2 <= size < 300
    fit(x, target=labels, batch_size=size, max_memory="16M", epochs=1)
    refused(UsageError, "two samples do not fit .* at least", x, target=labels, batch_size=2, max_memory="1M")


def test_memory_is_checked_with_the_classes_that_were_found() -> None:
    x = np.random.default_rng(0).standard_normal((20_000, 2)).astype("f4")
    labels = np.arange(20_000) % 10_000
    refused(UsageError, "a head of 10,000 outputs do not fit", x, target=labels, batch_size=20_000, max_memory="12M")
    tracemalloc.start()
    fit(x, target=labels, batch_size=2000, max_memory="24M", epochs=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 << 20  # the outputs of a whole batch would take 160 MB


def test_masked_targets_are_refused() -> None:
    x, _ = classified(n=100)
    refused(InputError, "masked", x, target=np.ma.masked_less(x[:, 0], 0))


@pytest.mark.parametrize(("one", "other"), [("int64", "uint64"), ("int32", "float64"), ("float32", "bool")])
def test_labels_of_several_types_do_not_become_numbers(tmp_path: Path, one: str, other: str) -> None:
    x, labels = classified(n=100)
    files = []
    for i, dtype in enumerate((one, other)):
        files.append(str(save_h5(tmp_path / f"{i}.h5", x[:50])))
        with h5py.File(files[-1], "a") as file:
            file["y"] = (labels[:50] > 0).astype(dtype)
    words = rf"0\.h5::/y holds {one}, .*1\.h5::/y {other}"
    refused(MismatchError, words, files, dataset="/x", target="::/y")
    assert fit(files, dataset="/x", target="::/y", loss="mse", epochs=1).learned is not None


def test_divergence_names_epoch_and_batch() -> None:
    x, _ = classified()
    target = x[:, 0] * 1e3
    refused(
        InputError,
        r"diverged: at batch \d+ of epoch \d+ .*--lr 10",
        x,
        target=target,
        optimizer="sgd",
        lr=10.0,
        batch_size=32,
    )
    refused(InputError, "at batch 1 of epoch 1 .* before any step: the targets", x, target=target * 1e200)


def test_a_held_out_loss_that_is_not_finite_is_refused() -> None:
    x, _ = classified()
    target = np.ones(320)
    target[held(fit(x, target=target, holdout=0.2, epochs=1), x)[0]] = 1e200
    refused(InputError, "held-out loss after epoch 1 is inf", x, target=target, holdout=0.2)


def test_reading_ahead_changes_nothing_and_stops_with_the_loop() -> None:
    assert list(in_threads(lambda i: i * i, range(5), 0, 1)) == list(in_threads(lambda i: i * i, range(5), 1, 4))
    taken = in_threads(lambda i: 1 // (3 - i), range(9), 1, 3)
    with pytest.raises(ZeroDivisionError):
        list(taken)
