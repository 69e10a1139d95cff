"""The fitted record: to and from its file bit by bit, what is refused, flags, JSON and presets."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import h5py
import helpers
import numpy as np
import pytest
from cli_helpers import check_refused
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as np_arrays

import bncli
from bncli.errors import BnWarning, InputError, MismatchError, OutputExistsError, UsageError
from bncli.numerics.moments import Moments, Running
from bncli.stats import container
from bncli.stats.conventions import DEFAULTS, PRESETS, check_conventions
from bncli.stats.record import Stats, load


def example(features: int = 3, **changes: Any) -> Stats:
    """Stats of which every field is something else than its default."""
    ramp = np.arange(1.0, features + 1)
    population = Moments(100 * ramp, ramp / 3, ramp * 1e-18, ramp / 7, -ramp * 1e-19, -ramp, ramp * 9)
    running = Running(
        ramp[None] * 2, np.stack([ramp, ramp / 9]), np.stack([ramp, -ramp]) * 1e-17, np.stack([ramp, ramp])
    )
    fields: dict[str, Any] = {
        "running_mean": ramp / 3,
        "running_var": ramp / 11,
        "gamma": -ramp,
        "beta": ramp / 13,
        "population": population,
        "running": running,
        "momentum": 0.987,
        "eps": 3e-4,
        "ddof": 1,
        "init": "first",
        "axis": 1,
        "batch_size": 17,
        "num_samples": 300,
        "num_batches": 18,
        "num_left_out": 1,
        "sample_shape": (3, 8, 9),
        "names": tuple(f"ä{i}\n\x1b" for i in range(features)),
        "options": {"nan": "omit", "rows": [3, None], "fill_value": -999},
        "kernel": "numpy",
        "provenance": {"sources": [{"name": "x.npy", "dataset": None}], "versions": {"bncli": "9.9"}},
    }
    return Stats(**(fields | changes))


def check_equal(a: Stats, b: Stats) -> None:
    for field in dataclasses.fields(Stats):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if isinstance(one, np.ndarray):
            assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes()), field.name
        elif isinstance(one, (Moments, Running)):
            for x, y in zip(one.arrays(), other.arrays(), strict=True):
                assert np.ascontiguousarray(x).tobytes() == np.ascontiguousarray(y).tobytes(), field.name
        else:
            assert type(one) is type(other), field.name
            assert one == other, field.name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"names": None},
        {"momentum": None},
        {"running": None, "population": Moments.empty(3)},
        {"sample_shape": ()},
        {"provenance": {}, "options": {}},
        {"eps": 0.0, "momentum": 0.0},
        {"population": Moments.without_extremes(np.array([2.0, 0, 3]), *np.zeros((4, 3)))},
        {"running_mean": np.array([np.nan, -0.0, 5e-324]), "running_var": np.array([np.nan, 0.0, 1e300])},
    ],
)
def test_every_field_survives_the_file(tmp_path: Path, changes: dict[str, Any]) -> None:
    stats = example(**changes)
    stats.save(str(tmp_path / "s.bn.h5"))
    check_equal(stats, load(str(tmp_path / "s.bn.h5")))


@given(np_arrays(np.float64, (4, 5), elements=st.floats(-1e300, 1e300)), st.floats(0, 1, exclude_max=True))
def test_any_number_survives_the_file(values: np.ndarray, momentum: float) -> None:
    mean, gamma, beta, var = values
    stats = example(5, running_mean=mean, gamma=gamma, beta=beta, running_var=np.abs(var), momentum=momentum)
    check_equal(stats, Stats.from_bytes(stats.to_bytes(), "s"))


def test_a_fit_survives_the_file(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(1000, 4))
    x[:, 3] = np.nan
    with pytest.warns(BnWarning):
        stats = bncli.fit(x, nan="omit", momentum=0.7, init="first")
    path = str(tmp_path / "s.bn.h5")
    stats.save(path)
    check_equal(stats, bncli.load(path))
    assert stats.to_bytes() == bncli.load(path).to_bytes()


def test_save_replaces_unless_told_otherwise(tmp_path: Path) -> None:
    path = str(tmp_path / "s.bn.h5")
    example().save(path)
    example(beta=np.zeros(3)).save(path)
    assert load(path).beta.tolist() == [0, 0, 0]
    with pytest.raises(OutputExistsError):
        example().save(path, force=False)


def test_file_is_as_the_contract_says(tmp_path: Path) -> None:
    path = tmp_path / "s.bn.h5"
    example().save(str(path))
    with h5py.File(path) as file:
        assert file.attrs["format"] == "bncli-stats"
        assert file.attrs["format_version"] == 2
        for name in (
            "running_mean",
            "running_var",
            "gamma",
            "beta",
            "population/mean",
            "population/m2",
            "population/min",
            "population/max",
        ):
            assert (file[name].shape, file[name].dtype) == ((3,), np.float64)
        assert (file["population/count"].shape, file["population/count"].dtype) == ((3,), np.int64)
        assert h5py.check_string_dtype(file["feature_names"].dtype).encoding == "utf-8"
        for name in ("momentum", "eps", "ddof", "init", "axis", "batch_size", "num_samples", "num_batches", "digest"):
            assert name in file.attrs
        assert file.attrs["sample_shape"].tolist() == [3, 8, 9]
        assert json.loads(file.attrs["provenance"]) == {"versions": {"bncli": "9.9"}}
        assert (file["sources"].compression, file["sources"].shape) == ("gzip", (1,))
        assert json.loads(file["sources"][0]) == {"name": "x.npy", "dataset": None}
        assert set(file["state"]) >= {"k", "a", "a_low", "first", "population_mean_low", "population_m2_low"}
    example(momentum=None).save(str(path))
    with h5py.File(path) as file:
        assert math.isnan(file.attrs["momentum"])


def repacked(change: Any) -> bytes:
    """A file with a right digest, but with other content."""
    arrays, attributes = container.unpack(example().to_bytes(), "s")
    change(arrays, attributes)
    return container.pack(arrays, attributes)


def test_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.bn.h5"
    path.write_bytes(repacked(lambda a, p: p.update(format_version=3)))
    with pytest.raises(
        InputError, match=r"s\.bn\.h5: stats format 3, written by bn 9\.9; this bn reads formats up to 2"
    ):
        load(str(path))
    check_refused(3, ["inspect", path], "stats format 3", "upgrade bn")


@pytest.mark.parametrize(
    "change",
    [
        lambda a, p: p.update(format="other"),
        lambda a, p: p.pop("format"),
        lambda a, p: p.pop("format_version"),
        lambda a, p: p.pop("momentum"),
        lambda a, p: p.update(momentum="0.9"),
        lambda a, p: p.update(momentum=1.5),
        lambda a, p: p.update(eps=-1.0),
        lambda a, p: p.update(eps=float("nan")),
        lambda a, p: p.update(eps="x"),
        lambda a, p: p.update(init="ones"),
        lambda a, p: p.update(ddof=2),
        lambda a, p: p.update(options="{"),
        lambda a, p: p.update(provenance="("),
        lambda a, p: a.pop("gamma"),
        lambda a, p: a.pop("population/m2"),
        lambda a, p: a.pop("state/first"),
        lambda a, p: a.update(gamma=np.ones(2)),
        lambda a, p: a.update({"population/mean": np.ones(4)}),
        lambda a, p: a.update({"running_mean": np.ones((3, 3))}),
        lambda a, p: a.update({"running_mean": np.array(1.0)}),
        lambda a, p: a.update({"running_var": np.array([1.0, -1.0, 1.0])}),
        lambda a, p: a.update({"feature_names": np.array([b"a"])}),
        lambda a, p: a.update({"feature_names": np.array([b"a", b"b", b"\xff"])}),
        lambda a, p: a.update({"feature_names": np.ones(3)}),
    ],
)
def test_what_is_not_a_stats_file_is_an_input_error(tmp_path: Path, change: Any) -> None:
    """With a right digest, so only what it holds can tell."""
    path = tmp_path / "s.bn.h5"
    path.write_bytes(repacked(change))
    with pytest.raises(InputError, match=r"s\.bn\.h5"):
        load(str(path))
    check_refused(3, ["inspect", path], "s.bn.h5")


def test_one_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.bn.h5"
    image = bytearray(example().to_bytes())
    image[image.index(example().running_var.tobytes())] ^= 1
    path.write_bytes(bytes(image))
    with pytest.raises(InputError, match=r"damaged.*checksum"):
        load(str(path))
    check_refused(3, ["inspect", path], "damaged")
    path.write_bytes(bytes(image[: image.rindex(b"\nbn sha256")]))
    with pytest.raises(InputError, match=r"damaged.*digest"):
        load(str(path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gamma": np.ones(4)}, r"gamma has shape \(4,\)"),
        ({"running_var": np.ones((3, 1))}, "running_var has shape"),
        ({"population": Moments.empty(2)}, "population count has shape"),
        ({"names": ("a",)}, "1 feature names for 3 features"),
        ({"running_var": np.array([1, -1e-300, 1])}, "negative"),
    ],
)
def test_arrays_that_do_not_belong_together(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(MismatchError, match=words):
        example(**changes)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 2.0, math.nan, math.inf])
def test_momentum_that_cannot_be(momentum: float) -> None:
    with pytest.raises(UsageError, match="momentum"):
        check_conventions(momentum, 1e-5, 0, "debias")


def test_stats_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        example().eps = 1.0  # type: ignore[misc]


def test_flags() -> None:
    #                   fine, constant, mean off, variance off, missing, small variance, imported
    count = np.array([10.0, 10, 10, 10, 0, 10, 0])
    mean = np.array([1.0, 5, 1, 1, 0, 1, 0])
    m2 = np.array([40.0, 0, 40, 40, 0, 1e-3, 0])
    population = Moments.without_extremes(count, mean, np.zeros(7), m2, np.zeros(7))
    stats = example(
        7,
        population=population,
        running=None,
        ddof=0,
        eps=1e-5,
        running_mean=np.array([1.19, 5, 1.21, 1, np.nan, 1, 3]),
        running_var=np.array([4.9, 0, 4, 5.1, np.nan, 1e-4, 4]),
    )
    assert stats.flags() == [[], ["constant"], ["drifted"], ["drifted"], ["missing"], ["eps"], ["no-population"]]


def test_json_is_the_contracts_to_the_letter() -> None:
    record = example(2, names=("a", "b")).as_dict()
    assert list(record) == [
        "format", "version", "momentum", "eps", "ddof", "init", "axis", "batch_size", "num_samples", "num_batches",
        "num_features", "num_parameters", "sources", "features",
    ]  # fmt: skip
    assert [list(feature) for feature in record["features"]] == [
        [
            "index", "name", "count", "running_mean", "running_var", "population_mean", "population_var", "missing",
            "minimum", "maximum", "gamma", "beta", "scale", "shift", "flags",
        ]
    ] * 2  # fmt: skip
    assert (record["format"], record["version"]) == ("bncli-stats", 2)
    assert (record["num_features"], record["num_parameters"]) == (2, 4)
    assert record["sources"] == [{"name": "x.npy", "dataset": None}]
    second = record["features"][1]
    sd = math.sqrt(2 / 11 + 3e-4)
    assert (second["index"], second["name"], second["count"]) == (1, "b", 200)
    assert second["population_var"] == 2 / 7 / 200
    assert second["scale"] == pytest.approx(-2 / sd, rel=1e-15)
    assert second["shift"] == pytest.approx(2 / 13 + 2 / 3 * 2 / sd, rel=1e-15)
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_json_has_null_where_there_is_nothing() -> None:
    nan = np.full(1, np.nan)
    record = example(
        1, names=None, momentum=None, running=None, running_mean=nan, running_var=nan, population=Moments.empty(1)
    ).as_dict()
    assert record["momentum"] is None
    feature = record["features"][0]
    for name in ("name", "running_mean", "running_var", "population_mean", "population_var", "scale", "shift"):
        assert feature[name] is None
    assert (feature["count"], feature["flags"]) == (0, ["missing"])
    json.dumps(record, allow_nan=False)


def test_normalize_and_back() -> None:
    stats = example(sample_shape=(3,))
    x = np.random.default_rng(0).normal(size=(5, 3))
    y = stats.normalize(x)
    by_hand = stats.gamma * (x - stats.running_mean) / np.sqrt(stats.running_var + 3e-4) + stats.beta
    np.testing.assert_allclose(y, by_hand, rtol=1e-14)
    np.testing.assert_allclose(stats.denormalize(y), x, rtol=1e-13)
    scale, shift = stats.scale_shift("population")
    np.testing.assert_allclose(scale * x + shift, stats.normalize(x, use="population"), rtol=1e-12)


def test_what_data_must_be_like() -> None:
    stats = example()
    assert stats.check_shape((5, 3, 8, 9), None, "x") == 1
    assert stats.check_shape((5, 3, 10, 11), None, "x") == 1
    assert stats.check_shape((5, 3), 1, "x") == 1
    with pytest.raises(MismatchError, match="x has 2 dimensions"):
        stats.check_shape((5, 3), None, "x")
    with pytest.raises(MismatchError, match="x has 8 features on axis 1"):
        stats.check_shape((5, 8, 3, 9), None, "x")
    with pytest.raises(UsageError, match="axis 0"):
        stats.check_shape((5, 3), 0, "x")
    with pytest.raises(UsageError, match="use 'both'"):
        stats.statistics("both")
    with pytest.raises(MismatchError, match="imported"):
        example(population=Moments.empty(3)).statistics("population")


def test_presets() -> None:
    assert {name: tuple(preset.plain().values()) for name, preset in PRESETS.items()} == helpers.PRESETS
    assert tuple(DEFAULTS.plain().values()) == (0.9, 1e-5, 0, "debias", -1)
