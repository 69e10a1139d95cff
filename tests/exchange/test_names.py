"""Layers whose numbers go by other names than nn.BatchNorm's, beside PyTorch's own arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Array, advised, peer

from bncli import exchange
from bncli.errors import BnNote, BnWarning, InputError, UsageError

C = 5


def numbers() -> tuple[Array, Array, Array, Array]:
    """Mean, variance, gamma and beta of a layer, in float32."""
    rng = np.random.default_rng(4)
    return tuple(
        a.astype("f4") for a in (rng.normal(size=C), rng.uniform(0.5, 2, C), rng.uniform(0.5, 2, C), rng.normal(size=C))
    )  # type: ignore[return-value]


def save_pt(arrays: dict[str, Array], path: Path) -> None:
    torch = peer("torch")
    torch.save({key: torch.from_numpy(np.array(a)) for key, a in arrays.items()}, path)


def save_safetensors(arrays: dict[str, Array], path: Path) -> None:
    peer("safetensors.numpy").save_file({key: np.array(a) for key, a in arrays.items()}, path)


def save_npz(arrays: dict[str, Array], path: Path) -> None:
    np.savez(path, **arrays)  # type: ignore[arg-type]


SAVERS: dict[str, Callable[[dict[str, Array], Path], None]] = {
    ".pt": save_pt, ".safetensors": save_safetensors, ".npz": save_npz,
}  # fmt: skip

NAMES = {  # mean, variance or deviation, gamma, beta
    "PyTorch": ("bn.running_mean", "bn.running_var", "bn.weight", "bn.bias"),
    "burn": ("bn.running_mean", "bn.running_var", "bn.gamma", "bn.beta"),
    "Paddle": ("bn._mean", "bn._variance", "bn.weight", "bn.bias"),
    "TensorFlow": ("net/bn/moving_mean:0", "net/bn/moving_variance:0", "net/bn/gamma:0", "net/bn/beta:0"),
    "MXNet": ("moving_mean", "moving_var", "gamma", "beta"),
    "Chainer": ("bn/avg_mean", "bn/avg_var", "bn/gamma", "bn/beta"),
    "Darknet": ("rolling_mean", "rolling_variance", "scale", "bias"),
    "Flax": ("batch_stats.net.bn.mean", "batch_stats.net.bn.var", "params.net.bn.scale", "params.net.bn.bias"),
    "Flax in Orbax": ("batch_stats/bn/mean", "batch_stats/bn/var", "params/bn/scale", "params/bn/bias"),
    "Sonnet": ("moving_mean", "moving_variance", "scale", "offset"),
    "ONNX": ("mean", "var", "scale", "bias"),
    "by hand": ("mean", "variance", "gamma", "beta"),
    "shift": ("mean", "var", "scale", "shift"),
    "deviation": ("bn.mean", "bn.std", "bn.weight", "bn.bias"),
    "running deviation": ("bn.running_mean", "bn.running_std", "bn.gamma", "bn.beta"),
    "data": ("mean", "std", None, None),
    "data of rsl_rl": ("norm._mean", "norm._std", None, None),
    "scikit-learn": ("mean_", "var_", None, None),
    "half of it": ("bn.moving_mean", "bn.moving_variance", None, "bn.beta"),
}


@pytest.mark.peer
@pytest.mark.parametrize("suffix", SAVERS)
@pytest.mark.parametrize("kind", NAMES)
def test_a_layer_by_the_names_of_others(tmp_path: Path, kind: str, suffix: str) -> None:
    """What PyTorch computes with these numbers."""
    torch = peer("torch")
    mean, var, gamma, beta = numbers()
    is_deviation = NAMES[kind][1].endswith("std")
    values = (mean, np.sqrt(var) if is_deviation else var, gamma, beta)
    arrays = {key: a for key, a in zip(NAMES[kind], values, strict=True) if key is not None}
    SAVERS[suffix](arrays, tmp_path / f"x{suffix}")
    if is_deviation:
        with pytest.warns(BnNote, match=r"is a standard deviation, and is squared"):
            stats = exchange.read(str(tmp_path / f"x{suffix}"))
    else:
        stats = exchange.read(str(tmp_path / f"x{suffix}"))
    x = np.random.default_rng(1).normal(size=(9, C)).astype("f4")
    tensors = [
        None if key is None else torch.from_numpy(a)
        for key, a in zip(NAMES[kind], (mean, var, gamma, beta), strict=True)
    ]
    expected = torch.nn.functional.batch_norm(torch.from_numpy(x), *tensors, False, 0, 1e-5).numpy()
    np.testing.assert_allclose(stats.normalize(x, axis=1), expected, atol=2e-6)
    assumed = stats.provenance["imported"]["assumed"]
    assert ("gamma" in assumed, "beta" in assumed) == (NAMES[kind][2] is None, NAMES[kind][3] is None)


@pytest.mark.peer
@pytest.mark.parametrize("suffix", SAVERS)
def test_layers_are_listed_and_chosen(tmp_path: Path, suffix: str) -> None:
    mean, var, gamma, beta = numbers()
    arrays: dict[str, Array] = {}
    for i, names in enumerate((NAMES["burn"], NAMES["Paddle"])):
        arrays |= {
            f"block{i}.{key}": a + i for key, a in zip(names, (mean, var, gamma, beta), strict=True) if key is not None
        }
    path = str(tmp_path / f"x{suffix}")
    SAVERS[suffix](arrays, Path(path))
    with pytest.raises(UsageError, match=r"(?s)2 layers.*--layer block0\.bn: 5 features.*--layer block1\.bn: 5"):
        exchange.read(path)
    for layer in ("block1.bn", "block1.bn._variance", "block1.bn."):
        assert exchange.read(path, layer=layer).gamma.tolist() == (gamma + 1).tolist()


def test_statistics_of_data_beside_a_layer(tmp_path: Path) -> None:
    """They are no rival of the only batch-normalization layer, and can be had by name."""
    mean, var, gamma, beta = numbers()
    arrays = {"bn.moving_mean": mean, "bn.moving_variance": var, "bn.gamma": gamma, "bn.beta": beta}
    path = str(tmp_path / "x.npz")
    np.savez(path, **arrays, **{"normalize.mean": mean[:3], "normalize.std": var[:3]})
    assert exchange.read(path).gamma.tolist() == gamma.tolist()
    with pytest.warns(BnNote):
        assert exchange.read(path, layer="normalize").num_features == 3
    with pytest.raises(UsageError, match=r"(?s)no layer 'x'.*--layer bn: 5 features.*--layer normalize: 3 features"):
        exchange.read(path, layer="x")


def test_the_variance_goes_before_the_deviation(tmp_path: Path) -> None:
    mean, var, *_ = numbers()
    np.savez(tmp_path / "x.npz", _mean=mean, _var=var, _std=np.ones(C))
    assert exchange.read(str(tmp_path / "x.npz")).running_var.tolist() == var.tolist()


def test_bns_own_scale_and_shift_are_not_gamma_and_beta(tmp_path: Path) -> None:
    mean, var, gamma, beta = numbers()
    np.savez(tmp_path / "x.npz", running_mean=mean, running_var=var, scale=mean, shift=mean, gamma=gamma, beta=beta)
    stats = exchange.read(str(tmp_path / "x.npz"))
    assert (stats.gamma.tolist(), stats.beta.tolist()) == (gamma.tolist(), beta.tolist())


def test_a_layers_running_deviation_goes_before_a_bare_variance(tmp_path: Path) -> None:
    mean, var, *_ = numbers()
    np.savez(tmp_path / "x.npz", running_mean=mean, running_std=np.full(C, 3.0), mean=var, var=var)
    with advised("is a standard deviation"):
        stats = exchange.read(str(tmp_path / "x.npz"))
    assert (stats.running_mean.tolist(), stats.running_var.tolist()) == (mean.tolist(), [9.0] * C)


def test_weight_and_scale(tmp_path: Path) -> None:
    """Two names for gamma; but the scale of a quantized layer is one number, of its output."""
    mean, var, gamma, beta = numbers()
    layer = {"running_mean": mean, "running_var": var, "weight": gamma, "bias": beta}
    for name in ("scale", "shift", "offset"):
        np.savez(tmp_path / "x.npz", **layer, **{name: var})
        with pytest.raises(InputError, match=rf"holds both (weight|bias) and {name}; take out"):
            exchange.read(str(tmp_path / "x.npz"))
    np.savez(tmp_path / "x.npz", **layer, scale=np.float32(0.1), zero_point=np.int64(3))
    assert exchange.read(str(tmp_path / "x.npz")).gamma.tolist() == gamma.tolist()


@pytest.mark.peer
@pytest.mark.parametrize("suffix", SAVERS)
def test_two_names_for_one_thing(tmp_path: Path, suffix: str) -> None:
    mean, var, gamma, beta = numbers()
    path = tmp_path / f"x{suffix}"
    SAVERS[suffix]({"b.running_mean": mean, "b.running_var": var, "b.bias": beta, "b.beta": gamma}, path)
    with pytest.raises(InputError, match=r"holds both b\.bias and b\.beta; take out"):
        exchange.read(str(path))


@pytest.mark.peer
@pytest.mark.parametrize("suffix", SAVERS)
def test_a_scale_by_a_name_that_nobody_knows(tmp_path: Path, suffix: str) -> None:
    mean, var, gamma, beta = numbers()
    path = tmp_path / f"x{suffix}"
    layer = {"b.running_mean": mean, "b.running_var": var, "b.bias": beta}
    SAVERS[suffix](layer | {"b.amplitude": gamma, "b.count": gamma, "b.other": gamma[:2], "c.amplitude": gamma}, path)
    with pytest.warns(BnWarning, match=r"x\.\w+: no name that bn knows for gamma, taken as 1; not used: b\.amplitude$"):
        assert exchange.read(str(path)).gamma.tolist() == [1.0] * C


@pytest.mark.peer
@pytest.mark.parametrize("suffix", SAVERS)
@pytest.mark.parametrize("shape", [(1, C), (1, C, 1, 1), (C, 1)])
def test_axes_of_length_1_beside_the_features(tmp_path: Path, suffix: str, shape: tuple[int, ...]) -> None:
    """rsl_rl keeps (1, C), and arithmetic with images wants (1, C, 1, 1)."""
    arrays = dict(zip(("_mean", "_var", "weight", "bias"), numbers(), strict=True))
    path = tmp_path / f"x{suffix}"
    for keys in (set(arrays), {"_mean", "_var"}):
        SAVERS[suffix]({key: a.reshape(shape) if key in keys else a for key, a in arrays.items()}, path)
        stats = exchange.read(str(path))
        found = (stats.running_mean, stats.running_var, stats.gamma, stats.beta)
        assert [a.tolist() for a in found] == [a.tolist() for a in arrays.values()]
    for wrong in ((C, C), (2, C)):
        SAVERS[suffix]({key: np.ones(wrong, "f4") for key in arrays}, path)
        with pytest.raises(InputError, match="need one number per feature"):
            exchange.read(str(path))


def test_what_is_no_number_is_no_scale_in_an_archive(tmp_path: Path) -> None:
    """Labels, and Python objects, which are not opened."""
    mean, var, *_ = numbers()
    labels, objects = np.array(list("abcde")), np.array([{}] * C, object)
    np.savez(tmp_path / "x.npz", running_mean=mean, running_var=var, labels=labels, objects=objects)
    assert exchange.read(str(tmp_path / "x.npz")).gamma.tolist() == [1.0] * C


@pytest.mark.parametrize(
    ("std", "words"),
    [
        ([1.0, -2.0, 1.0], "running_var is negative in 1 of 3 channels: 1"),
        (
            [1.0, np.nan, np.inf],
            "running_var is NaN in 1 of 3 channels: 1; running_var is infinite in 1 of 3 channels: 2",
        ),
        ([1e200, 1.0, 1e160], "running_var is infinite in 2 of 3 channels: 0, 2"),
    ],
)
def test_deviations_that_are_none(tmp_path: Path, std: list[float], words: str) -> None:
    """Squaring hides none of them."""
    np.savez(tmp_path / "x.npz", mean=np.zeros(3), std=np.array(std))
    with advised("is a standard deviation"), pytest.raises(InputError, match=words):
        exchange.read(str(tmp_path / "x.npz"))


def test_a_deviation_of_a_narrow_type_is_squared_in_float64(tmp_path: Path) -> None:
    for dtype, value in (("f2", 300.0), ("i1", 100), ("u1", 200)):
        np.savez(tmp_path / "x.npz", mean=np.zeros(1), std=np.array([value], dtype))
        with advised("is a standard deviation"):
            found: Any = exchange.read(str(tmp_path / "x.npz")).running_var
        assert found.tolist() == [value**2]


@pytest.mark.peer
def test_scikit_learns_scale_is_no_gamma(tmp_path: Path) -> None:
    """Whatever its attributes are saved as, what comes in does what the scaler does."""
    scaler = peer("sklearn.preprocessing").StandardScaler()
    x = np.random.default_rng(0).normal(5, [0.5, 1, 30, 0], (200, 4))
    scaler.fit(x)
    path = tmp_path / "x.npz"
    for names in ({"mean": "mean_", "var": "var_", "scale": "scale_"}, {"mean_": "mean_", "scale_": "scale_"}):
        np.savez(path, **{name: getattr(scaler, attribute) for name, attribute in names.items()})
        with advised("is a standard deviation"):
            stats = exchange.read(str(path), eps=0.0)
        np.testing.assert_allclose(stats.normalize(x), scaler.transform(x), atol=1e-12)
    np.savez(
        path, mean=scaler.mean_, var=scaler.var_, scale=scaler.scale_ * 2
    )  # another number is one that was learned
    assert exchange.read(str(path)).gamma.tolist() == (scaler.scale_ * 2).tolist()
    np.savez(path, mean=scaler.mean_, var=scaler.var_, scale=scaler.scale_, bias=scaler.mean_)
    assert exchange.read(str(path)).gamma.tolist() == scaler.scale_.tolist()
