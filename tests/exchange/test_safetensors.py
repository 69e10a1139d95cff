"""The safetensors package, and torch, beside `bncli.exchange.safetensors`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exchange_helpers import FEATURES, SHAPES, check_agrees, check_round_trip, data, features, fitted
from helpers import advised, peer
from torch_helpers import inference, module, trained

from bncli import exchange
from bncli.errors import InputError, UsageError

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module")
def torch() -> Any:
    peer("safetensors")
    return peer("torch")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_exported_and_loaded_strictly(torch: Any, tmp_path: Path, shape: tuple[int, ...], dtype: str) -> None:
    from safetensors.torch import load_file

    x = data(shape, dtype)
    stats = fitted(x)
    exchange.write(stats, str(tmp_path / "bn.safetensors"))
    layer = module(torch, x, 1e-5)
    layer.load_state_dict(load_file(tmp_path / "bn.safetensors"), strict=True)
    check_agrees(inference(torch, layer, x), stats, x)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_imported_after_training(torch: Any, tmp_path: Path, dtype: str) -> None:
    from safetensors.torch import save_model

    x = data((64, 3, 5, 4), dtype)
    layer = module(torch, x, 1e-5)
    trained(torch, layer, x)
    path = str(tmp_path / "model.safetensors")
    save_model(torch.nn.Sequential(layer, torch.nn.Conv2d(3, 2, 1)), path)
    stats = exchange.read(path)
    assert stats.provenance["imported"]["layer"] == "0"
    assert (stats.ddof, stats.init, stats.axis) == (1, "unit", 1)
    check_agrees(inference(torch, layer, x), stats, x)


def test_layers_are_listed(torch: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(5)).state_dict()
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=r"(?s)2 layers.*--layer 0: 3 features.*--layer 1: 5 features"):
        exchange.read(str(tmp_path / "x.safetensors"))
    with advised("as a new layer has them"):
        assert exchange.read(str(tmp_path / "x.safetensors"), layer="1").num_features == 5


@pytest.mark.parametrize("count", FEATURES)
def test_round_trip_keeps_the_conventions(torch: Any, tmp_path: Path, count: int) -> None:
    back = check_round_trip(tmp_path, count, ".safetensors")
    assert (back.eps, back.momentum, back.ddof, back.init, back.axis) == (1e-3, 0.97, 0, "debias", 1)
    assert back.provenance["imported"]["assumed"] == {}


def test_names_and_momentum_none(torch: Any, tmp_path: Path) -> None:
    from safetensors import safe_open

    names = ("a", "β", "")
    stats = fitted(data((40, 3)), momentum="none")
    stats = replace(stats, names=names)
    exchange.write(stats, str(tmp_path / "x.safetensors"))
    back = exchange.read(str(tmp_path / "x.safetensors"))
    assert (back.names, back.momentum) == (names, None)
    with safe_open(tmp_path / "x.safetensors", "numpy") as file:
        told = json.loads(file.metadata()["bncli"])
    assert (told["eps"], told["momentum"], told["pytorch_momentum"], told["ddof"]) == (1e-5, None, None, 0)


def test_options_win_over_the_metadata(torch: Any, tmp_path: Path) -> None:
    exchange.write(features(3), str(tmp_path / "x.safetensors"))
    back = exchange.read(str(tmp_path / "x.safetensors"), eps=0.5, momentum=0.75)
    assert (back.eps, back.momentum) == (0.5, 0.75)


@pytest.mark.parametrize(
    "told",
    ["{", "[]", "7", '{"eps": "x"}', '{"eps": -1}', '{"momentum": 1}', '{"ddof": 0.5}', '{"axis": 0}', '{"axis": true}',
     '{"names": 3}', '{"names": ["a"]}', '{"names": [1, 2, 3]}', '{"names": ["a", "b", "\\ud800"]}', '{"init": []}',
     '{"axis": 1' + "0" * 30 + "}", "[" * 100_000],
)  # fmt: skip
def test_metadata_that_mean_nothing(torch: Any, tmp_path: Path, told: str) -> None:
    from safetensors.numpy import save_file

    one = np.ones(3)
    path = str(tmp_path / "x.safetensors")
    save_file({"running_mean": one, "running_var": one}, path, {"bncli": told})
    with pytest.raises(InputError, match=r"x\.safetensors"):
        exchange.read(path)


def test_types(torch: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = str(tmp_path / "x.safetensors")
    save_file({"running_mean": torch.ones(3).half(), "running_var": torch.ones(3)}, path)
    assert exchange.read(path).running_mean.tolist() == [1.0] * 3
    narrow = torch.tensor([0.1, -2.5e-39, 3e38]).bfloat16()
    save_file({"running_var": torch.ones(3), "running_mean": narrow, "num_batches_tracked": torch.tensor(7)}, path)
    stats = exchange.read(path)
    assert (stats.running_mean.tolist(), stats.num_batches) == (narrow.double().tolist(), 7)
    save_file({"running_mean": torch.ones(3).bool(), "running_var": torch.ones(3).bool()}, path)
    with pytest.raises(InputError, match="is of type BOOL; bn reads F16, F32, F64, I64, BF16"):
        exchange.read(path)


def test_the_checksum(torch: Any, tmp_path: Path) -> None:
    """A damaged one is no missing one; without any of bn's metadata a file is believed."""
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    path = str(tmp_path / "x.safetensors")
    exchange.write(features(3), path)
    with safe_open(path, "numpy") as file:
        told = file.metadata()["bncli"]
    tensors = load_file(path)
    tensors["weight"][0] += 1
    for metadata in (
        {"bncli": told},
        {"bnclu": told},
        {"bncli": told.replace("bncli_", "bnclu_")},
        {"bncli": told.replace("pytorch_momentum", "pytorch-momentum")},
        {"bnclu": told.replace("bncli_", "bnclu_")},
        {"bnclu": told.replace("pytorch_momentum", "pytorch-momentum")},
    ):
        save_file(tensors, path, metadata)
        with pytest.raises(InputError, match=r"x\.safetensors: .*damaged"):
            exchange.read(path)
    tensors = load_file(path)
    save_file(tensors, path, {"format": "pt"})
    assert exchange.read(path).gamma[0] == tensors["weight"][0]
