"""JSON with the schema of `bn inspect --json`, out and in."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exchange_helpers import FEATURES, check_no_population, check_round_trip, data, features, fitted
from helpers import advised

from bncli import exchange
from bncli.errors import InputError, UsageError
from bncli.stats.record import Stats

CONVENTIONS = ("momentum", "eps", "ddof", "init", "axis", "batch_size", "num_samples", "num_batches", "names")


def check_same_record(one: Stats, other: Stats) -> None:
    """Assert that everything a record keeps beside its running state is the same."""
    assert {name: getattr(one, name) for name in CONVENTIONS} == {name: getattr(other, name) for name in CONVENTIONS}
    for name in ("count", "mean", "var"):
        np.testing.assert_array_equal(getattr(one, f"population_{name}"), getattr(other, f"population_{name}"))


@pytest.mark.parametrize("count", FEATURES)
@pytest.mark.parametrize("suffix", [".json", ".npz", ".csv"])
def test_round_trip_keeps_everything(tmp_path: Path, count: int, suffix: str) -> None:
    back = check_round_trip(tmp_path, count, suffix)
    check_same_record(features(count), back)
    assert back.provenance["imported"]["assumed"] == {}


@pytest.mark.parametrize("suffix", [".json", ".npz", ".csv"])
def test_names_missing_values_and_momentum_none(tmp_path: Path, suffix: str) -> None:
    x = data((40, 4))
    x[:, 2] = np.nan
    stats = replace(fitted(x, nan="omit", momentum="none"), names=('a "b",\t\n\r', "β", "", "x\x1b"))
    path = str(tmp_path / f"x{suffix}")
    exchange.write(stats, path)
    with advised("running_mean and running_var are NaN in 1 of 4 channels: 2"):
        back = exchange.read(path)
    check_same_record(stats, back)
    assert back.momentum is None
    assert back.flags()[2] == ["missing"]
    np.testing.assert_array_equal(back.running_var, stats.running_var)


@pytest.mark.parametrize("suffix", [".json", ".npz", ".csv"])
def test_population_as_running(tmp_path: Path, suffix: str) -> None:
    stats = features(3)
    path = str(tmp_path / f"x{suffix}")
    report = exchange.write(stats, path, use="population")
    assert "hold the population statistics" in " ".join(report.notes)
    back = exchange.read(path)
    assert back.running_mean.tolist() == stats.population_mean.tolist()
    assert back.running_var.tolist() == stats.population_var.tolist()


@pytest.mark.parametrize("suffix", [".json", ".npz", ".csv"])
def test_options_win_over_the_file(tmp_path: Path, suffix: str) -> None:
    path = str(tmp_path / f"x{suffix}")
    exchange.write(features(3), path)
    back = exchange.read(path, eps=0.5, momentum=0.25)
    assert (back.eps, back.momentum) == (0.5, 0.25)
    for options in ({"eps": -1.0}, {"momentum": 1.0}, {"eps": float("nan")}, {"layer": "x"}):
        with pytest.raises(UsageError):
            exchange.read(path, **options)


@pytest.mark.parametrize("suffix", [".json", ".npz", ".csv"])
def test_imported_and_exported_again(tmp_path: Path, suffix: str) -> None:
    """Statistics without a population go out and in as such."""
    stats = features(3)
    exchange.write(stats, str(tmp_path / "x.weights.h5"))
    imported = exchange.read(str(tmp_path / "x.weights.h5"))
    path = str(tmp_path / f"x{suffix}")
    exchange.write(imported, path)
    check_no_population(exchange.read(path))


def test_is_what_inspect_prints(tmp_path: Path) -> None:
    stats = features(3)
    exchange.write(stats, str(tmp_path / "x.json"))
    record = json.loads((tmp_path / "x.json").read_text())
    digest = record.pop("sha256")
    assert record == stats.as_dict()
    assert digest == hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def test_the_checksum(tmp_path: Path) -> None:
    """It holds for the values, however they are written; without it a record is believed."""
    path = tmp_path / "x.json"
    exchange.write(features(3), str(path))
    record = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(record.items())), indent=2))
    check_same_record(features(3), exchange.read(str(path)))
    record["features"][1]["running_mean"] = 7.5
    path.write_text(json.dumps(record))
    with pytest.raises(
        InputError, match=r"x\.json: damaged: its values do not match its checksum.*take the checksum out"
    ):
        exchange.read(str(path))
    path.write_text(json.dumps({"shb256" if key == "sha256" else key: value for key, value in record.items()}))
    with pytest.raises(InputError, match=r"x\.json: .*no key 'shb256'"):
        exchange.read(str(path))
    del record["sha256"]
    path.write_text(json.dumps(record))
    assert exchange.read(str(path)).running_mean[1] == 7.5


def changed(record: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    target: Any = record
    for key in path[:-1]:
        target = target[key]
    if value is KeyError:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return record


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), "other"),
        (("version",), 3),
        (("version",), True),
        (("part",), {"parts": ["1/2"]}),
        (("num_features",), 4),
        (("features",), []),
        (("features",), 7),
        (("features", 1), 7),
        (("features", 0, "index"), 1),
        (("features", 0, "running_mean"), KeyError),
        (("features", 0, "running_mean"), None),
        (("features", 0, "running_mean"), "1"),
        (("features", 0, "running_mean"), [1]),
        (("features", 0, "running_mean"), 10**400),
        (("features", 0, "running_var"), -1.0),
        (("features", 0, "running_var"), True),
        (("features", 0, "gamma"), None),
        (("features", 0, "count"), -1),
        (("features", 0, "count"), 1.5),
        (("features", 0, "count"), None),
        (("features", 0, "population_mean"), None),
        (("features", 0, "population_var"), -1.0),
        (("features", 0, "minimum"), 1e300),
        (("features", 0, "maximum"), "1"),
        (("features", 0, "name"), 7),
        (("features", 0, "name"), "\ud800"),
        (("eps",), KeyError),
        (("eps",), -1),
        (("eps",), 10**400),
        (("eps",), "1e-5"),
        (("momentum",), 1),
        (("momentum",), True),
        (("ddof",), 2),
        (("init",), "half"),
        (("axis",), 0),
        (("axis",), 10**30),
        (("num_samples",), -1),
        (("sources",), 7),
        (("sources",), [7]),
        (("sources",), [{}]),
        (("sources",), [{"name": "a", "dataset": None, "shape": [float("nan")]}]),
    ],
)
def test_hostile(tmp_path: Path, path: tuple[Any, ...], value: Any) -> None:
    record = changed(features(3).as_dict(), path, value)
    (tmp_path / "x.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"x\.json"):
        exchange.read(str(tmp_path / "x.json"))


def test_version_1_had_no_minimum(tmp_path: Path) -> None:
    record = features(3).as_dict()
    for feature in record["features"]:
        del feature["minimum"], feature["maximum"], feature["missing"]
    (tmp_path / "x.json").write_text(json.dumps(record | {"version": 1}))
    found = exchange.read(str(tmp_path / "x.json"))
    assert np.isnan(found.minimum).all()
    assert found.running_mean.tolist() == features(3).running_mean.tolist()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "NaN", "Infinity", "null", "3", '"x"', "[]", "{}", '{"a": 1, "a": 2}', "\ufeff{}"]
)
def test_texts_that_are_no_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=r"x\.json"):
        exchange.read(str(tmp_path / "x.json"))


def test_keys_twice_and_numbers_that_are_no_json(tmp_path: Path) -> None:
    text = json.dumps(features(3).as_dict())
    for old, new in (
        ('"eps": ', '"eps": 1.0, "eps": '),
        ('"eps": 0.001', '"eps": NaN'),
        ('"eps": 0.001', '"eps": 1e999'),
    ):
        assert old in text
        (tmp_path / "x.json").write_text(text.replace(old, new))
        with pytest.raises(InputError, match=r"x\.json"):
            exchange.read(str(tmp_path / "x.json"))
