"""PyTorch's own modules beside `bncli.exchange.torch`."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exchange_helpers import (
    FEATURES,
    SHAPES,
    check_agrees,
    check_no_population,
    check_round_trip,
    data,
    features,
    fitted,
)
from helpers import advised, peer
from torch_helpers import Evil, inference, module, trained

from bncli import exchange
from bncli.errors import InputError, UsageError
from bncli.stats.record import Stats

pytestmark = pytest.mark.peer
NEW = "as a new layer has them"


@pytest.fixture(scope="module")
def torch() -> Any:
    return peer("torch")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("use", ["running", "population"])
def test_exported_and_loaded_strictly(torch: Any, tmp_path: Path, shape: tuple[int, ...], dtype: str, use: str) -> None:
    x = data(shape, dtype)
    stats = fitted(x, eps=1e-4)
    path = str(tmp_path / "bn.pt")
    exchange.write(stats, path, use=use)
    state = torch.load(path, weights_only=True)
    assert state["num_batches_tracked"].dtype == torch.int64
    assert state["num_batches_tracked"].item() == stats.num_batches
    layer = module(torch, x, 1e-4)
    layer.load_state_dict(state, strict=True)
    fresh = data(shape, dtype, seed=6)
    check_agrees(inference(torch, layer, fresh), stats, fresh, use=use)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_imported_after_training(torch: Any, tmp_path: Path, shape: tuple[int, ...], dtype: str) -> None:
    x = data(shape, dtype)
    layer = module(torch, x, 1e-3)
    trained(torch, layer, x)
    path = str(tmp_path / "bn.pth")
    torch.save(layer.state_dict(), path)
    stats = exchange.read(path, eps=1e-3)
    assert (stats.momentum, stats.eps, stats.ddof, stats.init, stats.axis) == (0.9, 1e-3, 1, "unit", 1)
    assert stats.num_batches == -(-len(x) // 16)
    assert stats.gamma.tolist() != [1.0] * shape[1]  # the training moved it
    check_no_population(stats)
    check_agrees(inference(torch, layer, x), stats, x)


@pytest.fixture
def checkpoint(torch: Any, tmp_path: Path) -> tuple[Any, str]:
    """A trained model of two layers, in a checkpoint beside other things."""
    nn = torch.nn
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 6), nn.Sequential(nn.BatchNorm1d(6, affine=False)))
    trained(torch, model, data((64, 4), "f4"))
    path = str(tmp_path / "model.pt")
    torch.save({"epoch": 3, "state_dict": model.state_dict(), "history": [1.0, 2.0]}, path)
    return model, path


def test_layer_of_a_checkpoint(torch: Any, checkpoint: tuple[Any, str]) -> None:
    model, path = checkpoint
    stats = exchange.read(path, layer="state_dict.0")
    x = data((20, 4), "f4", seed=7)
    check_agrees(inference(torch, model[0], x), stats, x)


def test_layers_are_listed(checkpoint: tuple[Any, str]) -> None:
    for layer in (None, "conv1", "0"):  # two names end in .0
        with pytest.raises(UsageError) as error:
            exchange.read(checkpoint[1], layer=layer)
        assert "--layer state_dict.0: 4 features" in str(error.value)
        assert "--layer state_dict.2.0: 6 features" in str(error.value)


@pytest.mark.parametrize("layer", ["2.0.", "2.0.running_mean", "state_dict.2.0.weight", "0.num_batches_tracked"])
def test_layer_by_one_of_its_keys(checkpoint: tuple[Any, str], layer: str) -> None:
    if layer.startswith("0"):  # two names end in .0
        with pytest.raises(UsageError, match="choose one with --layer"):
            exchange.read(checkpoint[1], layer=layer)
    else:
        assert exchange.read(checkpoint[1], layer=layer).num_features == 6


def test_one_key_for_two_tensors(torch: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "x.pt")
    state = torch.nn.BatchNorm1d(3).state_dict()
    flat = {f"bn.{key}": tensor for key, tensor in state.items()}
    torch.save({**flat, "bn": state}, path)  # the same tensors twice
    with advised(NEW):
        assert exchange.read(path).num_features == 3
    torch.save({**flat, "bn": torch.nn.BatchNorm1d(3).state_dict()}, path)
    with pytest.raises(InputError, match=r"two tensors under the key bn\.weight, .*save one state_dict alone"):
        exchange.read(path)
    torch.save({f"bn..{key}": tensor for key, tensor in state.items()} | flat, path)
    with pytest.raises(UsageError, match=r"(?s)2 layers.*--layer bn\.: 3.*--layer bn: 3"):
        exchange.read(path)


def test_layer_without_weight_and_bias(torch: Any, checkpoint: tuple[Any, str]) -> None:
    model, path = checkpoint
    stats = exchange.read(path, layer="2.0")
    assert (stats.gamma.tolist(), stats.beta.tolist()) == ([1.0] * 6, [0.0] * 6)
    assert stats.provenance["imported"]["assumed"]["gamma"] == 1
    x = data((20, 6), "f4")
    check_agrees(inference(torch, model[2][0], x), stats, x)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_types(torch: Any, tmp_path: Path, dtype: str) -> None:
    layer = torch.nn.BatchNorm1d(3).to(getattr(torch, dtype))
    layer.running_mean.copy_(torch.tensor([0.1, 2.5, -7]))
    torch.save(layer.state_dict(), tmp_path / "x.pt")
    with advised("saw no batch (num_batches_tracked is 0)"):
        assert exchange.read(str(tmp_path / "x.pt")).running_mean.tolist() == layer.running_mean.double().tolist()


@pytest.mark.parametrize("count", FEATURES)
def test_round_trip(torch: Any, tmp_path: Path, count: int) -> None:
    back = check_round_trip(tmp_path, count, ".pt", eps=1e-3, momentum=0.97)
    assert (back.eps, back.momentum, back.num_batches) == (1e-3, 0.97, 3)


def test_a_member_that_is_marked_as_a_folder(torch: Any, tmp_path: Path) -> None:
    """PyTorch 2.13 reads zeros for it, and no checksum covers the mark."""
    path = tmp_path / "x.pt"
    exchange.write(features(3), str(path))
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"archive/data/0") - 46  # of the directory at the end
    assert content[entry : entry + 4] == b"PK\x01\x02"
    content[entry + 38] |= 0x10
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.pt: .*archive/data/0 is marked as a folder"):
        exchange.read(str(path))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["all", "inside"])
def test_pickle_that_would_run_code_does_not(
    torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool, where: str
) -> None:
    monkeypatch.chdir(tmp_path)
    content = Evil() if where == "all" else torch.nn.BatchNorm1d(3).state_dict() | {"extra": Evil()}
    torch.save(content, "evil.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="could run code"):
        exchange.read("evil.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.pt"]


def test_plain_pickle_and_whole_model(torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plain.pt").write_bytes(pickle.dumps(Evil()))
    torch.save(torch.nn.BatchNorm1d(3), "model.pt")
    for name in ("plain.pt", "model.pt"):
        with pytest.raises(InputError, match=name):
            exchange.read(name)
    assert not Path("ran").exists()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_content_that_is_no_layer(torch: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "x.pt")
    one = torch.ones(3)
    for content in (
        torch.ones(3),
        [one],
        {},
        {"running_mean": one},
        {"running_mean": one, "running_var": torch.ones(4)},
        {"running_mean": torch.ones(3, 2), "running_var": torch.ones(3, 2)},
        {"running_mean": one, "running_var": -one},
        {"running_mean": one * np.inf, "running_var": one},
        {"running_mean": one * np.nan, "running_var": one},
        {"running_mean": one, "running_var": one, "weight": torch.ones(4)},
        {"running_mean": one, "running_var": one, "weight": one * np.nan},
        {"running_mean": one, "running_var": one, "num_batches_tracked": torch.tensor(-1)},
        {"running_mean": one, "running_var": one, "num_batches_tracked": one},
        {"running_mean": one.to_sparse(), "running_var": one.to_sparse()},
        {"running_mean": one.to("meta"), "running_var": one.to("meta")},
        {"running_mean": one.to(torch.complex64), "running_var": one.to(torch.complex64)},
        dict.fromkeys(("running_mean", "running_var"), torch.zeros(1).expand(10**13)),
        dict.fromkeys(("running_mean", "running_var"), torch.zeros(1).expand(10**5)),
        {"running_mean": one, "running_var": one, "num_batches_tracked": torch.zeros(1, dtype=int).expand(10**13)},
        {"running_mean": torch.nested.nested_tensor([one, one]), "running_var": one},
    ):
        torch.save(content, path)
        with pytest.raises(InputError, match=r"x\.pt"):
            exchange.read(path)


def test_nested_in_itself(torch: Any, tmp_path: Path) -> None:
    content: dict[str, Any] = {"bn": torch.nn.BatchNorm1d(2).state_dict()}
    content["again"] = content
    torch.save(content, tmp_path / "x.pt")
    with advised(NEW):
        assert exchange.read(str(tmp_path / "x.pt"), layer="bn").num_features == 2


def test_dictionaries_that_stand_in_each_other_many_times(torch: Any, tmp_path: Path) -> None:
    """A file of 2 KB has 10^20 keys."""
    content: Any = torch.nn.BatchNorm1d(2).state_dict()
    for _ in range(19):
        content = dict.fromkeys("abcdefghij", content)
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"x\.pt: .*nested too deeply"):
        exchange.read(str(tmp_path / "x.pt"))


def test_compressed_members(torch: Any, tmp_path: Path) -> None:
    torch.save(torch.nn.BatchNorm1d(10**6).state_dict(), tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as source,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for name in source.namelist():
            out.writestr(name, source.read(name))
    with pytest.raises(InputError, match=r"y\.pt: .*is compressed, as torch\.save never does"):
        exchange.read(str(tmp_path / "y.pt"))


def test_package_too_old(torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exchange.write(features(3), str(tmp_path / "x.pt"))
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(UsageError, match=r"2\.5\.1.*older than 2\.6"):
        exchange.read(str(tmp_path / "x.pt"))


def test_notes_say_what_to_set(torch: Any, tmp_path: Path) -> None:
    stats = fitted(data((20, 8, 6, 3)), axis=-1, momentum=0.7, eps=1e-3, gamma=1, beta=0)
    report = exchange.write(stats, str(tmp_path / "x.pt"))
    assert report.settings == {"eps": 1e-3, "momentum": 0.3}
    said = " ".join(report.notes)
    for words in (
        "nn.BatchNorm2d(3, eps=0.001, momentum=0.3)",
        "ddof 0",
        "ddof 1",
        "axis -1",
        "(N, C, H, W)",
        "float64",
    ):
        assert words in said
    x = data((30, 3))
    x[:, 1] = 2
    x[:, 2] *= 1e39
    said = " ".join(exchange.write(fitted(x, eps=0.0, momentum="none"), str(tmp_path / "x.pt")).notes)
    for words in (
        "momentum is none",
        "feature 1 has variance 0 and eps 0",
        "feature 2 has numbers, scale or shift beyond float32",
    ):
        assert words in said
    assert "below" not in said


def noted(tmp_path: Path, stats: Stats) -> str:
    return " ".join(exchange.write(stats, str(tmp_path / "x.pt")).notes)


def test_what_float32_does_not_compute_is_told(torch: Any, tmp_path: Path) -> None:
    """A float32 layer gives infinity for the first and NaN for the constant one."""
    x = data((30, 3))
    x[:, 0] *= 1e-25
    x[:, 1] = 0
    stats = fitted(x, eps=1e-50)
    assert "2 features (the first: 0) have variance + eps below 1.2e-38" in noted(tmp_path, stats)
    layer = module(torch, x.astype("f4"), 1e-50)
    layer.load_state_dict(torch.load(tmp_path / "x.pt", weights_only=True))
    assert np.isfinite(inference(torch, layer, x.astype("f4"))).all(axis=0).tolist() == [False, False, True]


def test_what_is_on_axis_1_needs_no_note(torch: Any, tmp_path: Path) -> None:
    x = data((20, 3, 5))
    assert "expects them on axis 1" not in noted(tmp_path, fitted(x, axis=-2))
    assert "expects them on axis 1: (N, C, L)" in noted(tmp_path, fitted(x, axis=-1, gamma=1, beta=0))


def test_missing_statistics_are_told(torch: Any, tmp_path: Path) -> None:
    stats = features(3)
    hole = [1.0, np.nan, 1.0]
    stats = replace(stats, running_mean=stats.running_mean * hole, running_var=stats.running_var * hole)
    assert "feature 1 has no statistics: NaN in the file, and NaN comes out" in noted(tmp_path, stats)


def test_no_layer_of_six_dimensions(torch: Any, tmp_path: Path) -> None:
    x = data((20, 3, 2, 2, 2, 2))
    stats = fitted(x)
    said = noted(tmp_path, stats)
    assert (
        "nn.BatchNorm1d(3, eps=1e-05, momentum=0.1) and give it data of shape (N, C, L): PyTorch has no layer" in said
    )
    layer = module(torch, x.reshape(20, 3, 16), 1e-5)
    layer.load_state_dict(torch.load(tmp_path / "x.pt", weights_only=True))
    check_agrees(inference(torch, layer, x.reshape(20, 3, 16)).reshape(x.shape), stats, x)


def test_a_layer_whose_shapes_differ_is_not_passed_over(tmp_path: Path) -> None:
    """It counts as one of several, and is refused by name."""
    torch = peer("torch")
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.BatchNorm1d(4))
    state = net.state_dict()
    state["0.running_var"] = torch.ones(3)
    path = str(tmp_path / "x.pt")
    torch.save(state, path)
    with pytest.raises(UsageError, match="--layer"):
        exchange.read(path)
    with pytest.raises(InputError, match=r"0\.running_mean has the shape \(4,\), running_var \(3,\)"):
        exchange.read(path, layer="0")
    with advised(NEW):
        assert exchange.read(path, layer="1").num_features == 4
