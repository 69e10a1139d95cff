"""bn import, as a person and a script see it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from cli_helpers import bn, check_refused, good, no_controls, on_terminal, plain, save, temporaries, untouched
from exchange_helpers import check_agrees, check_no_population, data, features, fitted, keras_with_torch
from helpers import peer

import bncli
from bncli import exchange


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with m.weights.h5, a layer of three channels with eps 1e-3, and x.npy to apply it to."""
    monkeypatch.chdir(tmp_path)
    exchange.write(features(3), "m.weights.h5")
    save(tmp_path / "x.npy", data((20, 5, 4, 3), axis=-1))
    return tmp_path


def test_import_then_apply_and_inspect(here: Path) -> None:
    result = good("import", "m.weights.h5", "-o", "s.bn.h5")
    assert result.out.startswith(
        "3 features of batch_normalization imported from m.weights.h5; no population statistics\n"
    )
    assert result.out.endswith("stats in s.bn.h5\n")
    stats = bncli.load("s.bn.h5")
    assert stats.running is None
    assert stats.sample_shape == ()
    check_no_population(stats)
    good("apply", "s.bn.h5", "x.npy", "-o", "y.npy")  # of any rank, features on the preset's axis
    x = np.load("x.npy")
    original = features(3)
    expected = original.gamma * (x - original.running_mean) / np.sqrt(original.running_var + 1e-3) + original.beta
    np.testing.assert_allclose(np.load("y.npy"), expected, rtol=1e-12, atol=1e-12)
    check_refused(4, ["apply", "s.bn.h5", "x.npy", "-o", "z.npy", "--use", "population"], "population")
    shown = plain(on_terminal(["inspect", "s.bn.h5"], 120).out)
    assert "imported from m.weights.h5::batch_normalization" in shown
    assert "no-population" in shown
    assert temporaries(here) == []


def test_what_the_file_does_not_hold_is_said(here: Path) -> None:
    result = good("import", "m.weights.h5", "-o", "s.bn.h5")
    (line,) = result.err.splitlines()
    assert line.startswith("bn: note: not in the file, so the defaults of keras: ")
    for words in ("momentum 0.99", "eps 0.001", "ddof 0", "init unit", "axis -1", "--eps and --momentum"):
        assert words in line
    result = good("import", "m.weights.h5", "-o", "s.bn.h5", "-f", "--eps", "1e-7", "--momentum", "0.5")
    assert "eps" not in result.err
    assert "momentum" not in result.err
    stats = bncli.load("s.bn.h5")
    assert (stats.eps, stats.momentum) == (1e-7, 0.5)
    good("export", "s.bn.h5", "-o", "o.json")
    result = good("import", "o.json", "-o", "s.bn.h5", "-f")  # holds everything
    assert result.err == ""


def test_other_variances_are_not_the_populations(here: Path) -> None:
    columns = {name: np.ones(3) for name in ("running_mean", "population_mean", "population_var")}
    np.savez("c.npz", running_var=np.full(3, 5.0), count=np.full(3, 100), **columns)
    assert "are the population's" not in good("import", "c.npz", "--momentum", "none", "-o", "c.bn.h5").out
    assert "are the population's" not in good("inspect", "c.bn.h5").out
    np.savez("d.npz", running_var=np.ones(3), count=np.full(3, 100), **columns)
    assert "are the population's" in good("import", "d.npz", "--momentum", "none", "-o", "d.bn.h5").out


def test_momentum_none(here: Path) -> None:
    """Statistics that no recurrence made; PyTorch's None is another thing."""
    result = good("import", "m.weights.h5", "-o", "s.bn.h5", "--momentum", "none")
    assert "momentum none: how the running statistics were folded is not known" in result.out
    assert "population's" not in result.out
    assert "; no population statistics" in result.out
    shown = plain(on_terminal(["inspect", "s.bn.h5"], 200).out)
    assert "momentum none: how the running statistics were folded is not known" in shown
    assert "momentum" not in result.err
    assert bncli.load("s.bn.h5").momentum is None
    check_refused(2, ["import", "m.weights.h5", "-o", "t.bn.h5", "--momentum", "nine"], "--momentum 'nine'")


def test_provenance(here: Path) -> None:
    good("import", "m.weights.h5", "-o", "s.bn.h5")
    record = json.loads(h5py.File("s.bn.h5").attrs["provenance"])
    assert record["imported"]["format"] == "keras"
    assert record["imported"]["file"] == "m.weights.h5"
    assert record["imported"]["layer"] == "batch_normalization"
    assert record["imported"]["assumed"]["eps"] == 1e-3
    assert "time" in record
    (source,) = json.loads(good("inspect", "s.bn.h5", "--json").out)["sources"]
    assert (source["name"], source["dataset"]) == ("m.weights.h5", "batch_normalization")


def test_from_wins_over_the_suffix(here: Path) -> None:
    Path("m.weights.h5").rename("weights.dat")
    check_refused(2, ["import", "weights.dat", "-o", "s.bn.h5"], "weights.dat", "--from", "keras")
    good("import", "weights.dat", "--from", "keras", "-o", "s.bn.h5")
    check_refused(2, ["import", "weights.dat", "--from", "fold", "-o", "t.bn.h5"], "fold")


def test_quiet(here: Path) -> None:
    result = good("import", "m.weights.h5", "-o", "s.bn.h5", "-q")
    assert (result.out, result.err) == ("", "")


def test_output_exists(here: Path) -> None:
    save(here / "s.npy", np.zeros(3)).rename("s.bn.h5")
    with untouched(here):
        check_refused(5, ["import", "m.weights.h5", "-o", "s.bn.h5"], "s.bn.h5", "-f/--force")
        check_refused(5, ["import", "m.weights.h5", "-o", "m.weights.h5", "-f"], "also an input")
        check_refused(74, ["import", "m.weights.h5", "-o", "no/s.bn.h5"], "no/s.bn.h5")
    good("import", "m.weights.h5", "-o", "s.bn.h5", "-f")
    assert bncli.load("s.bn.h5").num_features == 3


def test_usage(here: Path) -> None:
    good("fit", "x.npy", "--axis", "-1", "-o", "f.bn.h5", "-q")
    good("export", "f.bn.h5", "-o", "o.json", "-q")
    with untouched(here):
        check_refused(2, ["import", "m.weights.h5", "-o", "s.bn.h5", "--layer", "conv"], "no layer 'conv'", "--layer")
        check_refused(2, ["import", "m.weights.h5", "-o", "s.bn.h5", "--eps", "-1"], "eps")
        check_refused(2, ["import", "m.weights.h5", "-o", "s.bn.h5", "--momentum", "1"], "momentum", "PyTorch")
        check_refused(2, ["import", "o.json", "-o", "s.bn.h5", "--layer", "x"], "--layer", "json")
        check_refused(3, ["import", "no.json", "-o", "s.bn.h5"], "no.json", "no such file")
        check_refused(3, ["import", "x.npy", "--from", "npz", "-o", "s.bn.h5"], "x.npy", ".npz")
        check_refused(3, ["import", "f.bn.h5", "--from", "keras", "-o", "s.bn.h5"], "f.bn.h5", "a stats file already")
        assert bn("import", "m.weights.h5").code == 2


def test_layers_are_listed(here: Path) -> None:
    with h5py.File("two.weights.h5", "w") as file:
        for layer, c in (("first", 3), ("se\x1bcond", 4)):
            for i in range(4):
                file[f"layers/{layer}/vars/{i}"] = np.ones(c)
            file[f"layers/{layer}/vars"].attrs["name"] = layer
    with untouched(here):
        result = check_refused(2, ["import", "two.weights.h5", "-o", "s.bn.h5"], "2 layers", "--layer", lines=3)
    lines = result.err.splitlines()
    assert lines[-2:] == ["  --layer first: 3 features", "  --layer se\\x1bcond: 4 features"]
    assert no_controls(result.err)
    good("import", "two.weights.h5", "-o", "s.bn.h5", "--layer", "first")
    assert bncli.load("s.bn.h5").num_features == 3


@pytest.mark.peer
def test_pickle_that_would_run_code(here: Path) -> None:
    torch = peer("torch")
    from torch_helpers import Evil

    torch.save({"running_mean": torch.ones(3), "running_var": torch.ones(3), "x": Evil()}, "evil.pt")
    with untouched(here):
        check_refused(3, ["import", "evil.pt", "-o", "s.bn.h5"], "evil.pt", "refused", "could run code")


@pytest.mark.peer
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".weights.h5", ".onnx"])
def test_cut_files(here: Path, suffix: str) -> None:
    for name in ("torch", "safetensors", "onnx"):
        peer(name)
    exchange.write(features(3), f"m{suffix}", force=True)
    whole = Path(f"m{suffix}").read_bytes()
    Path(f"m{suffix}").write_bytes(whole[: len(whole) // 2])
    with untouched(here):
        result = check_refused(3, ["import", f"m{suffix}", "-o", "s.bn.h5"], f"m{suffix}", "; write or copy it again")
    assert len(result.err) < 240  # torch's own message is as long as a page


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # Keras' torch backend
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's exporter to ONNX
@pytest.mark.parametrize("suffix", ["pt", "safetensors", "onnx", "weights.h5"])
def test_sample_data_there_and_back(here: Path, suffix: str) -> None:
    """Fit the images of the samples, train on in the framework, import that and apply it to the images held out."""
    folder = Path(__file__).parents[2] / "sample_data"
    with h5py.File(folder / "images.h5") as file:
        train = np.asarray(next(iter(file.values()))[:64], np.float32)
    heldout = np.load(folder / "images_heldout.npy").astype(np.float32)
    if suffix == "weights.h5":
        train, heldout = (np.moveaxis(a, 1, -1).copy() for a in (train, heldout))
        y = in_keras(train, heldout, folder)
    else:
        y = in_torch(train, heldout, folder, suffix)
    good("import", f"trained.{suffix}", "-o", "trained.bn.h5", "--eps", "1e-4")
    stats = bncli.load("trained.bn.h5")
    check_agrees(y, stats, heldout)
    save(here / "heldout.npy", heldout)
    good("apply", "trained.bn.h5", "heldout.npy", "-o", "heldout.norm.npy")
    np.testing.assert_allclose(np.load("heldout.norm.npy"), y, rtol=1e-5, atol=1e-5)


def in_torch(train: Any, heldout: Any, folder: Path, suffix: str) -> Any:
    """Trained on in PyTorch from what was exported; as ONNX it is written by PyTorch and run by onnxruntime."""
    torch = peer("torch")
    good("fit", folder / "images.h5", "--preset", "torch", "--eps", "1e-4", "-o", "i.bn.h5", "-q")
    source = "i.safetensors" if suffix == "safetensors" else "i.pt"
    good("export", "i.bn.h5", "-o", source)
    layer = torch.nn.BatchNorm2d(3, eps=1e-4)
    load = peer("safetensors.torch").load_file if suffix == "safetensors" else torch.load
    layer.load_state_dict(load(source), strict=True)
    for batch in torch.from_numpy(train).split(16):
        layer(batch)
    layer.eval()
    if suffix == "onnx":
        torch.onnx.export(layer, (torch.from_numpy(heldout),), "trained.onnx", dynamo=False)
        session = peer("onnxruntime").InferenceSession("trained.onnx", providers=["CPUExecutionProvider"])
        return session.run(None, {session.get_inputs()[0].name: heldout})[0]
    save_file = peer("safetensors.torch").save_file if suffix == "safetensors" else torch.save
    save_file(layer.state_dict(), f"trained.{suffix}")
    with torch.no_grad():
        return layer(torch.from_numpy(heldout)).numpy()


def in_keras(train: Any, heldout: Any, folder: Path) -> Any:
    keras = keras_with_torch()
    good("fit", folder / "images.h5", "--axis", "1", "-o", "i.bn.h5", "-q")
    good("export", "i.bn.h5", "-o", "i.weights.h5")
    layer = keras.layers.BatchNormalization(epsilon=1e-4)
    model = keras.Sequential([keras.Input(train.shape[1:]), layer])
    model.load_weights("i.weights.h5")
    for first in range(0, 64, 16):
        model(train[first : first + 16], training=True)
    model.save_weights("trained.weights.h5")
    return model(heldout, training=False).detach().numpy()


def test_momentum_none_of_a_file_with_its_population(here: Path) -> None:
    """The summary names the population where it is one, and not where the file says otherwise."""
    x = np.arange(40.0).reshape(20, 2) ** 2
    for momentum, same in ((0.5, False), ("none", True)):
        exchange.write(fitted(x, momentum=momentum), "p.json")
        out = good("import", "p.json", "-o", "p.bn.h5", "-f", "--momentum", "none").out
        assert ("the running statistics are the population's" in out) == same
        assert ("is not known" in out) != same


def test_json_is_what_inspect_prints(here: Path) -> None:
    result = good("import", "m.weights.h5", "-o", "s.bn.h5", "--json")
    assert json.loads(result.out) == json.loads(good("inspect", "s.bn.h5", "--json").out)
    assert "not in the file" in result.err
    quiet = good("import", "m.weights.h5", "-o", "s.bn.h5", "--json", "-q", "-f")
    assert (quiet.out, quiet.err) == (result.out, "")


@pytest.mark.parametrize(("momentum", "meant"), [("0.1", "0.9"), ("0.01", "0.99"), ("0.3", "0.7")])
def test_a_momentum_that_may_be_pytorchs(tmp_path: Path, momentum: str, meant: str) -> None:
    """Of a format that only PyTorch has; whoever means it has a warning more."""
    peer("safetensors")
    path, stats = tmp_path / "m.safetensors", tmp_path / "m.bn.h5"
    exchange.write(bncli.fit(np.arange(40.0).reshape(20, 2)), str(path))
    said = good("import", path, "-o", stats, "--momentum", momentum).err
    assert f"bn: warning: momentum {momentum} is the weight of the OLD value here" in said
    assert f"type --momentum {meant}\n" in said
    assert bncli.load(str(stats)).momentum == float(momentum)
    np.save(tmp_path / "x.npy", np.arange(40.0).reshape(20, 2))
    said = good("fit", tmp_path / "x.npy", "--like", stats, "--momentum", momentum, "-o", tmp_path / "y.bn.h5").err
    assert f"type --momentum {meant}\n" in said
    for silent in (meant, "none", "0"):
        assert "OLD value here" not in good("import", path, "-o", stats, "-f", "--momentum", silent).err
