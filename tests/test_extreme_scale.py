"""Numbers of any size that a float64 holds: right where the result fits, whatever the steps between; else counted and refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cli_helpers import check_refused, good, save
from helpers import peer, root
from hypothesis import given
from hypothesis import strategies as st

from bncli import Stats, exchange
from bncli.errors import MismatchError
from bncli.numerics import affine, batchnorm, compiled
from bncli.numerics.batchnorm import Affine
from bncli.numerics.moments import Moments

Array = npt.NDArray[Any]


def floats(least: float | None = None) -> st.SearchStrategy[float]:
    """Any float64, the ends of the range and what is near them more often."""
    ends = [0.0, 5e-324, 2.0**-1022, 1e-300, 1e-200, 1.0, 1e155, 1e200, 1e300, 1.7e308, np.finfo("f8").max]
    signed = ends if least == 0 else [*ends, *(-e for e in ends)]
    return st.sampled_from(signed) | st.floats(least, allow_nan=False, allow_infinity=False)


def check_wide(found: float, term: Fraction, plus: Fraction) -> None:
    """Assert term + plus to four units of the larger of both, or of 5e-324; infinity only where no float64 holds it."""
    truth, limit = term + plus, max(abs(term), abs(plus)) * Fraction(2**-51) + Fraction(2) ** -1074
    assert not np.isnan(found)
    if np.isinf(found):
        assert abs(truth) + limit > Fraction(float(np.finfo("f8").max))
        assert (found > 0) == (truth > 0)
    else:
        assert abs(Fraction(found) - truth) <= limit


def check_fitting(function: Callable[..., Array], found: Array, x: Array, *arguments: Any) -> None:
    """Assert that a function gives what was found, in float32 too, or refuses it, counting what does not fit."""
    for dtype in ("f8", "f4"):
        with np.errstate(over="ignore"):
            rounded = found.astype(dtype)
        count = int(np.isinf(rounded).sum())
        if count:
            with pytest.raises(MismatchError, match=f"^{count} values do not fit"):
                function(x, *arguments, dtype=dtype)
        else:
            assert function(x, *arguments, dtype=dtype).tobytes() == rounded.tobytes()


class TestWholeRange:
    """Any statistics and values that a float64 holds: the result is right where a float64 holds it, whatever the steps between."""

    @pytest.mark.parametrize("kernel", [True, False])
    @given(st.lists(floats(), min_size=1, max_size=4), floats(), floats(0), floats(), floats(), floats(0))
    def test_test_mode(
        self, kernel: bool, values: list[float], mean: float, var: float, gamma: float, beta: float, eps: float
    ) -> None:
        x = np.array([[mean], *([v] for v in values)])
        columns = [np.full((1, 1), a) for a in (mean, var, gamma, beta)]
        affine = Affine.of(*columns, eps=eps)
        with pytest.MonkeyPatch.context() as patch:
            if not kernel:
                patch.setattr(compiled, "AVAILABLE", False)
            y = affine.columns(x[:, :, None], np.dtype("f8"))[0][:, 0, 0]
            single = affine.columns(x[:, :, None], np.dtype("f4"))[0][:, 0, 0]
        with np.errstate(over="ignore"):
            assert single.tobytes() == y.astype("f4").tobytes()
        assert y[0] == beta
        scale = Fraction(gamma) / (root(Fraction(var) + Fraction(eps)) or 1)
        for value, found in zip(x[:, 0].tolist(), y.tolist(), strict=True):
            check_wide(found, scale * (Fraction(value) - Fraction(mean)), Fraction(beta))
        check_fitting(batchnorm.normalize, y[:, None], x, mean, var, gamma, beta, eps)

    @given(st.lists(floats(), min_size=1, max_size=4), floats(), floats(0), floats().filter(bool), floats(), floats(0))
    def test_inverse(self, values: list[float], mean: float, var: float, gamma: float, beta: float, eps: float) -> None:
        y = np.array([[beta], *([v] for v in values)])
        columns = [np.full((1, 1), a) for a in (mean, var, gamma, beta)]
        x = Affine.of(*columns, eps=eps, inverse=True)(y)[0][:, 0]
        assert x[0] == mean
        scale = (root(Fraction(var) + Fraction(eps)) or 1) / Fraction(gamma)
        for value, found in zip(y[:, 0].tolist(), x.tolist(), strict=True):
            check_wide(found, scale * (Fraction(value) - Fraction(beta)), Fraction(mean))
        check_fitting(batchnorm.denormalize, x[:, None], y, mean, var, gamma, beta, eps)

    @pytest.mark.parametrize(
        ("x", "mean", "var", "gamma", "beta", "eps", "y"),
        [
            (0.0, 0.0, 1e-300, 1e200, 5.0, 0.0, 5.0),
            (1e300, 0.0, 1e300, 1e-200, 0.0, 0.0, 1e-50),
            (1e155, 0.0, 1.7e308, 1.0, 0.0, 1e308, 6.085806194501846),  # 1e155 / sqrt(2.7e308)
            (1.7e308, -1.7e308, 1e300, 1.0, 0.0, 0.0, 3.4e158),
            (1e308, 0.0, 1.0, 2.0, -1.5e308, 0.0, 5e307),
            (1e-320, 0.0, 1e-300, 1e200, 0.0, 0.0, 1e-320 * 1e300 * 1e50),
        ],
    )
    def test_there_and_back(
        self, x: float, mean: float, var: float, gamma: float, beta: float, eps: float, y: float
    ) -> None:
        np.testing.assert_allclose(batchnorm.normalize([[x]], mean, var, gamma, beta, eps), [[y]], rtol=2e-15)
        np.testing.assert_allclose(batchnorm.denormalize([[y]], mean, var, gamma, beta, eps), [[x]], rtol=4e-15)

    def test_features_of_ordinary_size_keep_their_bits(self) -> None:
        """Beside features of any other."""
        rng = np.random.default_rng(3)
        x, y = rng.normal(size=(2, 400, 5)) * 3
        mean, var, gamma, beta = rng.normal(size=(4, 5))
        var = var**2 + 1e-3
        sd = np.sqrt(var)
        expected = (x - mean) * (gamma / sd) + beta, (y - beta) / gamma * sd + mean
        for wide in ((1e-320, 1.0), (1e200, 1e-300), (1e300, 1e300), (1.7e308, 5e-324)):
            gamma[4], var[4], mean[3] = *wide, 1.7e308
            x[::2, 3], y[:, 4] = -1.7e308, 1e-310
            found = [np.empty((400, 5)), np.empty((400, 5))]
            for inverse in (False, True):
                found[inverse] = Affine.of(mean, var, gamma, beta, 0.0, inverse=inverse)((x, y)[inverse])[0]
                assert found[inverse][:, :3].tobytes() == expected[inverse][:, :3].tobytes()

    def test_infinity_and_nan_pass_through(self) -> None:
        x = np.array([[np.inf], [-np.inf], [np.nan], [1e-300]])
        y = batchnorm.normalize(x, 0.0, 1e-300, -1e200, 5.0, 0.0)
        np.testing.assert_allclose(y, [[-np.inf], [np.inf], [np.nan], [-1e50]], rtol=1e-15)
        x = batchnorm.denormalize(x, 5.0, 1e300, 1e-200, 0.0, 0.0)
        np.testing.assert_allclose(x, [[np.inf], [-np.inf], [np.nan], [1e50]], rtol=1e-15)

    def test_many_values(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Computed by parts a few at a time, on any axis and in any order in memory."""
        monkeypatch.setattr(affine, "PART_VALUES", 7)
        x = np.random.default_rng(0).normal(size=(5, 2, 3)) * 1e-300
        for array in (x, np.asfortranarray(x), x.astype(">f8")):
            for axis, gamma in ((1, [1e200, 1.0]), (2, [1.0, 1e200, 1.0]), (-2, [1e200, 1e200])):
                y = batchnorm.normalize(array, 0.0, 1e-300, gamma, 5.0, 0.0, axis)
                shape = (-1, 1) if axis != 2 else (-1,)
                np.testing.assert_allclose(y, x * 1e150 * np.reshape(gamma, shape) + 5, rtol=1e-15)

    def test_training_mode(self) -> None:
        """gamma · xhat does not fit a float64 and the result does; and the gradient, whose scale does not fit."""
        y, _ = batchnorm.forward([[0.0], [0.0], [3.0]], 1.5e308, -0.7e308, eps=0.0)
        r = 2**-0.5
        np.testing.assert_allclose(y, np.array([[-1.5 * r - 0.7], [-1.5 * r - 0.7], [3 * r - 0.7]]) * 1e308, rtol=1e-15)
        with pytest.raises(MismatchError, match="2 values do not fit float64; rescale"):
            batchnorm.forward([[0.0], [0.0], [3.0]], 1.5e308, -1e308, eps=0.0)
        _, cache = batchnorm.forward([[0.0], [0.0], [3e-140]], 1e200, 0.0, eps=0.0)
        dx = batchnorm.backward([[1e-100], [0.0], [0.0]], cache)[0]
        np.testing.assert_allclose(dx, np.array([[0.5], [-0.5], [0]]) * r * 1e240, rtol=1e-14, atol=1e226)


WIDE = {  # running_var, gamma, beta, eps: what becomes of 1e300, and of scale and shift; None where no float64 holds it
    "o": ((1e-300, 1e200, 5.0, 0.0), None, (None, 5.0)),
    "u": ((1e300, 1e-200, 0.0, 0.0), 1e-50, (0.0, 0.0)),
    "e": ((1.7e308, 1e-100, 0.0, 1e308), 6.085806194501846e45, (6.085806194501846e-255, 0.0)),
}


def wide_stats(name: str) -> Stats:
    (var, gamma, beta, eps), *_ = WIDE[name]
    columns = (np.full(2, a) for a in (0.0, var, gamma, beta))
    return Stats(*columns, Moments.empty(2), eps=eps)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in WIDE:
        wide_stats(name).save(f"{name}.bn.h5")
    return tmp_path


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("options", [[], ["--fill-value", "7"]])
def test_apply(here: Path, name: str, options: list[str]) -> None:
    _, y, _ = WIDE[name]
    beta = float(wide_stats(name).beta[0])
    save(here / "zero.npy", np.zeros((3, 2)))
    good("apply", f"{name}.bn.h5", "zero.npy", "-o", "y.npy", *options)
    assert np.load("y.npy").tolist() == [[beta, beta]] * 3
    save(here / "x.npy", np.array([[0, 1e300], [1e300, 0], [0, 0]]))
    arguments = ["apply", f"{name}.bn.h5", "x.npy", "-o", "x_y.npy", *options]
    if y is None:
        check_refused(4, arguments, "2 values do not fit float64", "Rescale")
        return
    good(*arguments)
    np.testing.assert_allclose(np.load("x_y.npy"), [[0, y], [y, 0], [0, 0]], rtol=1e-15)
    good("apply", f"{name}.bn.h5", "x_y.npy", "-o", "x.npy", "--inverse", "-f", *options)
    np.testing.assert_allclose(np.load("x.npy"), [[0, 1e300], [1e300, 0], [0, 0]], rtol=1e-15)


def test_apply_takes_parts_of_a_sample(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bncli.engine import apply as engine

    monkeypatch.setattr(engine, "PIECE_VALUES", 1)
    wide = np.array([1e300, 1.0])
    stats = Stats(np.zeros(2), wide, np.array([1e-200, 1.0]), np.zeros(2), Moments.empty(2), axis=1, eps=0.0)
    stats.save("s.bn.h5")
    save(here / "x.npy", np.full((2, 2, 5), 1e300))
    good("apply", "s.bn.h5", "x.npy", "-o", "y.npy")
    expected = np.broadcast_to(np.array([[1e-50], [1e300]]), (2, 2, 5))
    np.testing.assert_allclose(np.load("y.npy"), expected, rtol=1e-15)


@pytest.mark.parametrize("name", WIDE)
def test_scale_and_shift(here: Path, name: str) -> None:
    _, _, (scale, shift) = WIDE[name]
    stats = wide_stats(name)
    feature = json.loads(good("inspect", f"{name}.bn.h5", "--json").out)["features"][1]
    assert (feature["scale"], feature["shift"]) == (scale and pytest.approx(scale, rel=1e-15), shift)
    exchange.write(stats, "s.json")
    if scale is None:
        with pytest.raises(MismatchError, match="of 2 of 2 features"):
            stats.scale_shift()
        for path, format in (("s.csv", "csv"), ("s.npz", "npz"), ("f.npz", "fold"), ("f.safetensors", "fold")):
            check_refused(4, ["export", f"{name}.bn.h5", "--to", format, "-o", path], "2 of 2 features", "float64")
            assert not Path(path).exists()
        return
    np.testing.assert_allclose(stats.scale_shift(), [[scale] * 2, [shift] * 2], rtol=1e-15)
    exchange.write(stats, "s.csv")
    exchange.write(stats, "s.npz")
    exchange.write(stats, "f.npz", "fold")
    with open("s.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for found in (np.load("s.npz"), np.load("f.npz"), {k: [float(r[k]) for r in rows] for k in ("scale", "shift")}):
        np.testing.assert_allclose([found["scale"], found["shift"]], [[scale] * 2, [shift] * 2], rtol=1e-15)


def test_a_shift_whose_product_does_not_fit(here: Path) -> None:
    stats = Stats(np.array([1e300]), np.array([1e-20]), np.array([2.0]), np.array([1.5]), Moments.empty(1), eps=0.0)
    with pytest.raises(MismatchError, match="of 1 of 1 features"):
        stats.scale_shift()
    assert stats.as_dict()["features"][0]["shift"] is None
    assert stats.normalize([[1e300]]).tolist() == [[1.5]]


@pytest.mark.peer
@pytest.mark.parametrize("name", WIDE)
def test_other_frameworks_are_warned_about(here: Path, name: str) -> None:
    for needed in ("torch", "safetensors", "onnx"):
        peer(needed)
    for path in ("s.pt", "s.safetensors", "s.weights.h5"):
        result = good("export", f"{name}.bn.h5", "-o", path)
        assert "2 features (the first: 0) have scale, shift or variance + eps beyond float64" in result.err
    check_refused(4, ["export", f"{name}.bn.h5", "-o", "s.onnx"], "float32")


def test_folding(here: Path) -> None:
    """W · gamma / sd where gamma / sd fits no float64; what fits no type of the file is counted."""
    np.savez("w.npz", weight=[[1e-100, -0.0], [1e300, 1e250]], bias=[-1e-100, 1.0])
    stats = Stats(
        np.zeros(2),
        np.array([1e-300, 1e300]),
        np.array([1e200, 1e-200]),
        np.array([5.0, 0.0]),
        Moments.empty(2),
        eps=0.0,
    )
    exchange.write(stats, "f.npz", "fold", into="w.npz")
    found = np.load("f.npz")
    np.testing.assert_allclose(found["weight"], [[1e250, 0], [1e-50, 1e-100]], rtol=1e-15)
    assert np.signbit(found["weight"]).tolist() == [[False, True], [False, False]]
    np.testing.assert_allclose(found["bias"], [-1e250, 0], rtol=1e-15)
    np.savez("w.npz", weight=[[1.0, 2.0], [1e300, 1e250]], bias=[0.0, 1.0])
    with pytest.raises(MismatchError, match=r"weight, folded, does not fit float64 \(2 values\)"):
        exchange.write(stats, "g.npz", "fold", into="w.npz")
    assert not Path("g.npz").exists()
