"""What holds for every format alike: damaged files, files of another kind, and packages that are not there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from exchange_helpers import NUMBERS, check_package_missing, features
from helpers import peer

from bncli import exchange
from bncli.errors import BnWarning, InputError, UsageError
from bncli.exchange.common import KINDS, pick
from bncli.numerics.moments import Moments
from bncli.stats.record import Stats

PACKAGES = {"torch": ".pt", "safetensors": ".safetensors", "onnx": ".onnx"}


@pytest.fixture(params=exchange.formats("read"))
def suffix(request: pytest.FixtureRequest) -> str:
    """The suffix of each format that can be read."""
    if request.param in PACKAGES:
        peer(request.param)
    return exchange.FORMATS[request.param].suffixes[0]


@pytest.mark.filterwarnings("ignore")  # of torch and NumPy over odd bytes
def test_damaged(tmp_path: Path, suffix: str) -> None:
    """A cut file is refused, and a mutated one too, unless everything that is read from it is the same."""
    path = tmp_path / f"x{suffix}"
    exchange.write(replace(features(3), names=("a", "b", "c")), str(path))
    whole = path.read_bytes()
    original = everything(exchange.read(str(path)))
    for length in {*range(0, len(whole), max(1, len(whole) // 60)), len(whole) - 1, len(whole) - 2}:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            exchange.read(str(path))
    refused = 0
    for mutated in mutations(whole):
        path.write_bytes(mutated)
        try:
            found = exchange.read(str(path))
        except InputError:
            refused += 1
        else:
            assert everything(found) == original
    assert refused > 75


def everything(stats: Stats) -> list[Any]:
    """What a file carries, bit for bit: numbers, conventions and names."""
    arrays = [getattr(stats, name) for name in (*NUMBERS, "population_count", "population_mean", "population_var")]
    return [array.tobytes() for array in arrays] + [repr(getattr(stats, name)) for name in (*KINDS, "names")]


def mutations(whole: bytes, count: int = 150) -> Iterator[bytes]:
    rng = np.random.default_rng(3)
    for _ in range(count):
        changed = bytearray(whole)
        for position in rng.integers(0, len(whole), rng.integers(1, 4)):
            changed[position] = rng.integers(0, 256)
        yield bytes(changed)


@pytest.mark.filterwarnings("ignore")
def test_other_files(tmp_path: Path, suffix: str) -> None:
    """What is no file of the format is refused, with its name."""
    for name, content in {
        "empty": b"",
        "text": b"hello, world\n" * 9,
        "zeros": bytes(4096),
        "ones": b"\xff" * 999,
    }.items():
        path = tmp_path / (name + suffix)
        path.write_bytes(content)
        with pytest.raises(InputError, match=name):
            exchange.read(str(path))
    (tmp_path / f"folder{suffix}").mkdir()
    for name, words in (("folder", "not a regular file"), ("missing", "no such file")):
        with pytest.raises(InputError, match=words):
            exchange.read(str(tmp_path / (name + suffix)))


@pytest.mark.parametrize("name", PACKAGES)
def test_package_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    check_package_missing(monkeypatch, name, PACKAGES[name])


def test_many_layers_are_listed_in_part() -> None:
    with pytest.raises(UsageError, match=r"x: holds 103 layers") as error:
        pick({f"layer{i}": 1000 for i in range(103)}, None, "x", "")
    lines = str(error.value).splitlines()
    assert lines[100:] == ["  --layer layer99: 1,000 features", "  and 3 more"]


def test_population_variances_come_back_bit_by_bit(tmp_path: Path) -> None:
    """The file holds m2 / count, rounded; times the count, rounded, and divided again it is the same."""
    count = np.arange(1.0, 3001)
    m2, one = np.random.default_rng(1).uniform(0.1, 9, 3000), np.ones(3000)
    assert (m2 / count * count != m2).any()
    columns = {"running_mean": one, "running_var": one, "population_mean": one, "population_var": m2 / count}
    np.savez(tmp_path / "x.npz", count=count, **columns)
    assert exchange.read(str(tmp_path / "x.npz")).population_var.tolist() == (m2 / count).tolist()


@pytest.mark.parametrize("count", [-1.0, 0.5, 2.0**53 + 2, np.nan])
def test_counts_that_are_none(tmp_path: Path, count: float) -> None:
    one = np.ones(1)
    columns = dict.fromkeys(("running_mean", "running_var", "population_mean", "population_var"), one)
    np.savez(tmp_path / "x.npz", count=one * count, **columns)
    with pytest.raises(InputError, match=r"x\.npz: count must contain non-negative integers"):
        exchange.read(str(tmp_path / "x.npz"))


NAN, INF = float("nan"), float("inf")
HEALTHY = {"running_mean": [0.5, 1.0, 2.0, 3.0], "running_var": [1.0, 2.0, 3.0, 4.0]}
HEALTHY |= {"gamma": [1.0, 1.5, 2.0, 2.5], "beta": [0.0, 1.0, 2.0, 3.0]}


def write_raw(path: Path, columns: dict[str, list[float]]) -> None:
    """A file of a layer as its framework writes it, whatever its numbers; without bn."""
    arrays = {name: np.array(values, "f4") for name, values in columns.items()}
    keys = {"running_mean": "running_mean", "running_var": "running_var", "gamma": "weight", "beta": "bias"}
    if path.suffix == ".pt":
        torch = peer("torch")
        torch.save({f"bn.{keys[name]}": torch.from_numpy(a) for name, a in arrays.items()}, path)
    elif path.suffix == ".safetensors":
        peer("safetensors.numpy").save_file({f"bn.{keys[name]}": a for name, a in arrays.items()}, path)
    elif path.suffix == ".npz":
        np.savez(path, **arrays)  # type: ignore[arg-type]
    elif path.suffix == ".csv":
        rows = zip(*columns.values(), strict=True)
        path.write_text("\n".join([",".join(columns), *(",".join(map(repr, row)) for row in rows)]) + "\n")
    elif path.suffix == ".json":
        record = replace(features(4), population=Moments.empty(4)).as_dict()
        for name, values in columns.items():
            for feature, value in zip(record["features"], values, strict=True):
                feature[name] = None if np.isnan(value) else value
        path.write_text(json.dumps(record))
    elif path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            for i, name in enumerate(("gamma", "beta", "running_mean", "running_var")):
                file[f"layers/bn/vars/{i}"] = arrays[name]
    else:
        onnx = peer("onnx")
        order = ["gamma", "beta", "running_mean", "running_var"]
        node = onnx.helper.make_node("BatchNormalization", ["x", *order], ["y"], name="bn")
        tensors = [onnx.numpy_helper.from_array(arrays[name], name) for name in order]
        graph = onnx.helper.make_graph([node], "g", [], [], tensors)
        onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 15)]), path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"running_var": {2: NAN}}, ["running_var is NaN in 1 of 4 channels: 2"]),
        ({"running_mean": {0: NAN, 3: NAN}}, ["running_mean is NaN in 2 of 4 channels: 0, 3"]),
        ({"running_var": {1: INF, 2: INF}}, ["running_var is infinite in 2 of 4 channels: 1, 2"]),
        ({"running_mean": {1: -INF}}, ["running_mean is infinite in 1 of 4 channels: 1"]),
        (
            {"running_mean": {2: INF}, "running_var": {2: NAN, 3: NAN}},
            ["running_mean is infinite in 1 of 4 channels: 2", "running_var is NaN in 2 of 4 channels: 2, 3"],
        ),
        ({"running_var": {1: -1e-6}}, ["running_var is negative in 1 of 4 channels: 1"]),
        ({"running_var": {1: -INF}}, ["running_var is infinite in 1 of 4 channels: 1"]),
        ({"gamma": {0: NAN}}, ["gamma is NaN in 1 of 4 channels: 0"]),
        ({"beta": {3: INF}}, ["beta is infinite in 1 of 4 channels: 3"]),
    ],
)
def test_numbers_that_no_layer_has(
    tmp_path: Path, suffix: str, changes: dict[str, dict[int, float]], words: list[str]
) -> None:
    columns = {name: list(values) for name, values in HEALTHY.items()}
    for name, values in changes.items():
        for i, value in values.items():
            columns[name][i] = value
    path = tmp_path / f"x{suffix}"
    write_raw(path, columns)
    with pytest.raises(InputError) as error:
        exchange.read(str(path))
    assert all(text in str(error.value) for text in [f"x{suffix}: ", *words])
    assert str(error.value).count(" is ") == len(words)


def test_channels_without_statistics(tmp_path: Path, suffix: str) -> None:
    """bn itself writes them where a feature is missing; in a layer that was trained something went wrong."""
    write_raw(tmp_path / f"x{suffix}", HEALTHY | {"running_mean": [NAN, 1, NAN, 3], "running_var": [NAN, 1, NAN, 3]})
    with pytest.warns(BnWarning, match=r"running_mean and running_var are NaN in 2 of 4 channels: 0, 2; 'bn apply'"):
        assert np.isnan(exchange.read(str(tmp_path / f"x{suffix}")).running_mean).tolist() == [True, False] * 2


@pytest.mark.parametrize("gamma", [[1.0] * 4, HEALTHY["gamma"]])
def test_statistics_never_touched(tmp_path: Path, suffix: str, gamma: list[float]) -> None:
    columns = HEALTHY | {"running_mean": [0.0] * 4, "running_var": [1.0] * 4, "gamma": gamma}
    write_raw(tmp_path / f"x{suffix}", columns)
    with pytest.warns(BnWarning, match=r"x\..*as a new layer has them \(mean 0 and variance 1 in every channel\)"):
        exchange.read(str(tmp_path / f"x{suffix}"))
    for name, values in (("running_mean", [0.0, 0.0, 1e-9, 0.0]), ("running_var", [1.0, 1.0, 1.0, 1.5])):
        write_raw(tmp_path / f"x{suffix}", columns | {name: values})
        exchange.read(str(tmp_path / f"x{suffix}"))  # without a warning


def test_many_channels_are_named_in_part(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", running_mean=np.zeros(1000), running_var=-np.ones(1000), name=["ankle\x1b"] * 1000)
    with pytest.raises(InputError, match=r"negative in 1,000 of 1,000 channels: 0 \(ankle\\x1b\), .* and 990 more"):
        exchange.read(str(tmp_path / "x.npz"))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_layer_that_saw_no_batch(tmp_path: Path, suffix: str) -> None:
    torch = peer("torch")
    layer = torch.nn.BatchNorm1d(3)
    layer.running_mean.fill_(2)
    save = torch.save if suffix == ".pt" else peer("safetensors.torch").save_file
    save({f"bn.{key}": value for key, value in layer.state_dict().items()}, tmp_path / f"x{suffix}")
    with pytest.warns(BnWarning, match=r"bn: the running statistics are of a layer that saw no batch"):
        exchange.read(str(tmp_path / f"x{suffix}"))
    layer(torch.ones(3, 3))
    save({f"bn.{key}": value for key, value in layer.state_dict().items()}, tmp_path / f"x{suffix}")
    exchange.read(str(tmp_path / f"x{suffix}"))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npz"])
def test_a_name_that_several_layers_end_in(tmp_path: Path, suffix: str) -> None:
    """All of them are listed, and none of the others; the exact one wins."""
    one = np.ones(3, "f4")
    names = ["a.bn1", "b/bn1", "c.bn2", "d.xbn1"]
    path = tmp_path / f"x{suffix}"

    def save(layers: list[str]) -> None:
        arrays = {
            f"{layer}.{key}": one * (i + 2) for i, layer in enumerate(layers) for key in ("running_mean", "running_var")
        }
        if suffix == ".pt":
            torch = peer("torch")
            torch.save({key: torch.from_numpy(a) for key, a in arrays.items()}, path)
        elif suffix == ".npz":
            np.savez(path, **arrays)  # type: ignore[arg-type]
        else:
            peer("safetensors.numpy").save_file(arrays, path)

    save(names)
    for asked in ("bn1", "bn1.running_var"):
        check_listed(path, asked, ["a.bn1", "b/bn1"])
    save([*names, "bn1"])
    assert exchange.read(str(path), layer="bn1").running_mean.tolist() == [6.0] * 3
    with pytest.raises(UsageError, match=r"has no layer 'bn'; choose one with --layer:(\n.*){5}$"):
        exchange.read(str(path), layer="bn")


def check_listed(path: Path, asked: str, layers: list[str]) -> None:
    """Assert that a layer is not found because several go by the name."""
    with pytest.raises(UsageError) as error:
        exchange.read(str(path), layer=asked)
    lines = str(error.value).splitlines()
    assert lines[0].endswith(f"{len(layers)} layers match {asked!r}; choose one with --layer:")
    assert lines[1:] == [f"  --layer {layer}: 3 features" for layer in layers]


def test_a_name_that_several_nodes_end_in(tmp_path: Path) -> None:
    onnx, path = peer("onnx"), tmp_path / "x.onnx"
    inputs = ["g", "b", "m", "v"]
    tensors = [onnx.numpy_helper.from_array(np.full(3, i + 2, "f4"), name) for i, name in enumerate(inputs)]

    def save(*names: str) -> None:
        nodes = [
            onnx.helper.make_node("BatchNormalization", ["x", *inputs], [f"y{i}"], name=name, epsilon=0.5 ** (i + 1))
            for i, name in enumerate(names)
        ]
        graph = onnx.helper.make_graph(nodes, "g", [], [], tensors)
        onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 15)]), path)

    save("/a/bn1", "/b/bn1", "/c/bn2")
    check_listed(path, "bn1", ["/a/bn1", "/b/bn1"])
    save("bn1", "bn1", "/c/bn1")  # names of nodes need not be unique: then they go by their outputs
    check_listed(path, "bn1", ["y0", "y1"])
    save("/a/bn1", "bn1")
    assert exchange.read(str(path), layer="bn1").eps == 0.25


def test_a_name_that_several_keras_layers_end_in(tmp_path: Path) -> None:
    path = tmp_path / "x.weights.h5"
    with h5py.File(path, "w") as file:
        for i, (at, name) in enumerate({"a/layers/x": "bn1", "b/layers/x": "bn1", "b/layers/y": "last"}.items()):
            for k in range(4):
                file[f"layers/{at}/vars/{k}"] = np.full(3, i + 2.0)
            file[f"layers/{at}/vars"].attrs["name"] = name
    check_listed(path, "bn1", ["layers/a/layers/x", "layers/b/layers/x"])
    check_listed(path, "x", ["layers/a/layers/x", "layers/b/layers/x"])
    with h5py.File(path, "a") as file:
        file["layers/b/layers/y/vars"].attrs["name"] = "x"
    assert exchange.read(str(path), layer="x").running_mean.tolist() == [4.0] * 3
