"""ONNX's checker, onnxruntime and torch's exporter beside `bncli.exchange.onnx`."""

from __future__ import annotations

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
    check_same_numbers,
    data,
    features,
    fitted,
)
from helpers import Array, peer

from bncli import exchange
from bncli.errors import InputError, MismatchError, UsageError

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module")
def onnx() -> Any:
    return peer("onnx")


def run(path: str, x: Array) -> Array:
    runtime = peer("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x})
    result: Array = y
    return result


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("use", ["running", "population"])
def test_exported_and_run(onnx: Any, tmp_path: Path, shape: tuple[int, ...], use: str) -> None:
    x = data(shape, "f4")
    stats = fitted(x, eps=1e-4, momentum=0.8)
    path = str(tmp_path / "bn.onnx")
    exchange.write(stats, path, use=use)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    (node,) = model.graph.node
    assert {a.name: np.float32(a.f) for a in node.attribute} == {
        "epsilon": np.float32(1e-4),
        "momentum": np.float32(0.8),
    }
    assert model.opset_import[0].version >= 15
    for size in (1, 11):  # any batch, and any size behind the channels
        fresh = data((size, shape[1], *(n + size for n in shape[2:])), "f4", seed=6)
        check_agrees(run(path, fresh), stats, fresh, use=use)


@pytest.mark.parametrize("rank", [2, 3, 4, 5, 8])
def test_rank(onnx: Any, tmp_path: Path, rank: int) -> None:
    stats = fitted(data((60, 3)))
    path = str(tmp_path / "bn.onnx")
    assert exchange.write(stats, path, rank=rank).settings["rank"] == rank
    x = data((2, 3, *[4] * (rank - 2)), "f4")
    check_agrees(run(path, x), stats, x, axis=1)


def test_rank_that_is_none(onnx: Any, tmp_path: Path) -> None:
    for rank in (1, 0, -4, 9):
        with pytest.raises(UsageError, match=f"--rank {rank}"):
            exchange.write(features(3), str(tmp_path / "bn.onnx"), rank=rank)


def test_features_on_the_last_axis(onnx: Any, tmp_path: Path) -> None:
    x = data((20, 4, 5, 3), "f4", axis=-1)
    stats = fitted(x, axis=-1)
    path = str(tmp_path / "bn.onnx")
    assert "axis -1, the other side expects them on axis 1: (N, C, D2, D3)" in " ".join(
        exchange.write(stats, path).notes
    )
    y = run(path, np.moveaxis(x, -1, 1).copy())
    check_agrees(np.moveaxis(y, 1, -1), stats, x)


def test_rounding_is_told(onnx: Any, tmp_path: Path) -> None:
    x = data((40, 3))
    x[:, 1] = 1e5 + np.random.default_rng(1).normal(size=40)
    stats = fitted(x, gamma=1, beta=0)
    (said,) = [note for note in exchange.write(stats, str(tmp_path / "bn.onnx")).notes if "float32, by" in note]
    moved = abs(float(np.float32(stats.running_mean[1])) - stats.running_mean[1]) / np.sqrt(stats.running_var[1] + 1e-5)
    assert f"by up to {moved:.1g} (feature 1)" in said


def test_numbers_beyond_float32(onnx: Any, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"running_mean of feature 0 is .*float32"):
        exchange.write(fitted(data((20, 2)) * 1e60), str(tmp_path / "bn.onnx"))
    assert not (tmp_path / "bn.onnx").exists()


@pytest.mark.parametrize(
    ("factor", "options", "words"),
    [
        (1e-25, {"eps": 0.0}, r"feature 0 has a variance \+ eps below 1.2e-38"),
        (0.0, {"eps": 1e-50}, r"feature 0 has a variance \+ eps below 1.2e-38"),
        (1e-10, {"eps": 0.0, "gamma": 1e30}, "feature 0 has a scale or shift beyond 3.4e38"),
        (1, {"eps": 1e39}, r"eps 1e\+39 is inf in the float32"),
        (1, {"momentum": 0.99999999}, r"momentum 0.99999999 is 1.0 in the float32"),
    ],
)
def test_what_float32_does_not_compute(
    onnx: Any, tmp_path: Path, factor: float, options: dict[str, float], words: str
) -> None:
    with pytest.raises(MismatchError, match=words):
        exchange.write(fitted(data((20, 2)) * factor, **options), str(tmp_path / "bn.onnx"))
    assert not (tmp_path / "bn.onnx").exists()


def test_small_numbers_that_float32_computes(onnx: Any, tmp_path: Path) -> None:
    x = data((20, 2), "f4") * np.float32(1e-17)
    stats = fitted(x, eps=0.0)
    exchange.write(stats, str(tmp_path / "bn.onnx"))
    check_agrees(run(str(tmp_path / "bn.onnx"), x), stats, x)


def test_rounded_conventions_are_told(onnx: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "bn.onnx")
    report = exchange.write(fitted(data((20, 2)), eps=1e-50, momentum=0.123456789123), path)
    back = exchange.read(path)
    assert (back.eps, back.momentum) == (report.settings["epsilon"], report.settings["momentum"]) == (0.0, 0.12345679)
    assert "eps 1e-50 is rounded to 0.0" in report.notes
    assert "momentum 0.123456789123 is rounded to 0.12345679" in report.notes
    assert not any("is rounded" in note for note in exchange.write(features(3), path).notes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", SHAPES)
def test_imported_from_a_trained_model(onnx: Any, tmp_path: Path, shape: tuple[int, ...]) -> None:
    """A model trained in torch, written by torch's own exporter and run by onnxruntime."""
    torch = peer("torch")
    from torch_helpers import module, trained

    x = data(shape, "f4")
    layer = module(torch, x, 1e-3)
    trained(torch, layer, x)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(layer.eval(), (torch.from_numpy(x),), path, dynamo=False)
    stats = exchange.read(path)
    assert (stats.momentum, stats.eps, stats.ddof, stats.axis) == (0.9, 1e-3, 0, 1)
    check_no_population(stats)
    check_agrees(run(path, x), stats, x)


@pytest.mark.filterwarnings("ignore")
def test_training_form(onnx: Any, tmp_path: Path) -> None:
    """What PyTorch exports in training mode is refused with the call that gives what can be read; that call does."""
    torch = peer("torch")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    model(torch.randn(5, 3, 6, 6) + 1)
    path, mode = str(tmp_path / "m.onnx"), torch.onnx.TrainingMode
    x = (torch.randn(2, 3, 6, 6),)
    torch.onnx.export(model, x, path, dynamo=False, training=mode.TRAINING)
    with pytest.raises(
        InputError, match=r"in training mode: .*after model\.eval\(\); .*TrainingMode\.PRESERVE is given"
    ):
        exchange.read(path)
    torch.onnx.export(model.eval(), x, path, dynamo=False)
    with pytest.raises(InputError, match=r"no BatchNormalization node .*folds such layers .*TrainingMode\.PRESERVE is"):
        exchange.read(path)
    torch.onnx.export(model.eval(), x, path, dynamo=False, training=mode.PRESERVE)
    assert exchange.read(path).running_mean.tolist() == model[1].running_mean.double().tolist()


def two_layers(onnx: Any, path: str, **options: Any) -> Any:
    """A model of two nodes, the second without a name; its numbers come through Identity and Constant nodes."""
    helper, numbers = onnx.helper, onnx.numpy_helper.from_array
    x, y = (helper.make_tensor_value_info(n, 1, ["N", 3]) for n in "xy")
    rows = np.array([[1, 2, 3], [0, 1, 2], [4, 5, 6], [7, 8, 9]], "f4")
    nodes = [
        helper.make_node("Identity", ["mean"], ["same"]),
        helper.make_node("Constant", [], ["fixed"], value=numbers(rows[3])),
        helper.make_node("Constant", [], ["listed"], value_floats=rows[2].tolist()),
        helper.make_node("BatchNormalization", ["x", "scale", "bias", "mean", "var"], ["h"], name="one", **options),
        helper.make_node("BatchNormalization", ["h", "scale", "listed", "same", "fixed"], ["y"], **options),
    ]
    initializers = [numbers(row, name) for row, name in zip(rows, ("scale", "bias", "mean", "var"), strict=True)]
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    onnx.save(model, path)
    return model


def test_layers_are_listed_and_chosen(onnx: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "x.onnx")
    two_layers(onnx, path)
    with pytest.raises(UsageError, match=r"(?s)--layer one: 3 features.*--layer y: 3 features"):
        exchange.read(path)
    first, second = exchange.read(path, layer="one"), exchange.read(path, layer="y")
    assert (first.momentum, first.eps) == (0.9, 1e-5)  # the operator's own defaults
    assert first.running_mean.tolist() == second.running_mean.tolist() == [4, 5, 6]
    assert first.gamma.tolist() == [1, 2, 3]
    assert second.beta.tolist() == [4, 5, 6]
    x = data((20, 3), "f4")
    check_agrees(run(path, x), second, first.normalize(x), axis=1)


def test_a_name_that_is_the_output_of_another(onnx: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "x.onnx")
    model = two_layers(onnx, path)
    model.graph.node[3].name = "y"
    onnx.save(model, path)
    with pytest.raises(UsageError, match=r"(?s)--layer h: 3 features.*--layer y: 3 features"):
        exchange.read(path)
    assert exchange.read(path, layer="h").beta.tolist() == [0, 1, 2]
    assert exchange.read(path, layer="y").beta.tolist() == [4, 5, 6]


def test_an_operator_of_another_domain_is_no_layer(onnx: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "x.onnx")
    model = two_layers(onnx, path)
    model.graph.node[3].domain = "com.example"
    onnx.save(model, path)
    assert exchange.read(path).beta.tolist() == [4, 5, 6]


@pytest.mark.parametrize(
    ("opset", "attributes", "outputs", "words"),
    [
        (15, {"training_mode": 1}, 3, "training mode"),
        (13, {}, 5, "training mode"),
        (9, {}, 5, "training mode"),
        (9, {}, 1, None),
        (7, {"spatial": 0}, 1, "spatial 0"),
        (7, {"spatial": 1}, 1, None),
        (6, {}, 1, "training mode"),
        (6, {"is_test": 0}, 1, "training mode"),
        (6, {"is_test": 1}, 1, None),
    ],
)
def test_the_forms_of_older_opsets(
    onnx: Any, tmp_path: Path, opset: int, attributes: dict[str, int], outputs: int, words: str | None
) -> None:
    path = str(tmp_path / "x.onnx")
    model = two_layers(onnx, path, **attributes)
    model.opset_import[0].version = opset
    model.graph.node[3].output.extend(f"o{i}" for i in range(1, outputs))
    onnx.save(model, path)
    if words is None:
        assert exchange.read(path, layer="one").beta.tolist() == [0, 1, 2]
    else:
        with pytest.raises(InputError, match=rf"x\.onnx: one: the node .*{words}") as error:
            exchange.read(path, layer="one")
        assert "not a readable" not in str(error.value)


def test_bfloat16(onnx: Any, tmp_path: Path) -> None:
    torch = peer("torch")
    path = str(tmp_path / "x.onnx")
    model = two_layers(onnx, path)
    narrow = torch.tensor([0.1, -2.5, 3e38]).bfloat16()
    (mean,) = [tensor for tensor in model.graph.initializer if tensor.name == "mean"]
    mean.data_type, mean.raw_data = onnx.TensorProto.BFLOAT16, narrow.view(torch.int16).numpy().tobytes()
    onnx.save(model, path)
    assert exchange.read(path, layer="one").running_mean.tolist() == narrow.double().tolist()


def test_attributes_are_read(onnx: Any, tmp_path: Path) -> None:
    two_layers(onnx, str(tmp_path / "x.onnx"), epsilon=0.002, momentum=0.6)
    stats = exchange.read(str(tmp_path / "x.onnx"), layer="one")
    assert (stats.eps, stats.momentum) == (0.002, 0.6)
    stats = exchange.read(str(tmp_path / "x.onnx"), layer="one", eps=0.5, momentum=0.25)
    assert (stats.eps, stats.momentum) == (0.5, 0.25)


def test_conventions_that_were_given_as_whole_numbers(onnx: Any, tmp_path: Path) -> None:
    exchange.write(fitted(data((40, 3)), eps=1, momentum=0), str(tmp_path / "x.onnx"))
    exchange.write(replace(features(3), eps=1, momentum=0), str(tmp_path / "y.onnx"))
    for name in ("x.onnx", "y.onnx"):
        stats = exchange.read(str(tmp_path / name))
        assert (stats.eps, stats.momentum) == (1.0, 0.0)


@pytest.mark.parametrize("count", FEATURES)
def test_round_trip(onnx: Any, tmp_path: Path, count: int) -> None:
    back = check_round_trip(tmp_path, count, ".onnx", "f4")
    assert (back.eps, back.momentum) == (1e-3, 0.97)


def test_values_in_another_file(onnx: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "x.onnx")
    model = two_layers(onnx, path)
    onnx.save(model, path, save_as_external_data=True, location="x.data", size_threshold=0)
    with pytest.raises(InputError, match="are in another file"):
        exchange.read(path, layer="one")


def test_models_without_a_layer(onnx: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "x.onnx")
    model = two_layers(onnx, path)
    del model.graph.initializer[:]
    onnx.save(model, path)
    with pytest.raises(InputError, match="no BatchNormalization node whose numbers are in the file"):
        exchange.read(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.dims.append(10**12),
        lambda t: t.dims.__setitem__(0, 10**18),
        lambda t: t.dims.__setitem__(0, -3),
        lambda t: t.ClearField("raw_data"),
        lambda t: setattr(t, "data_type", 8),
        lambda t: setattr(t, "data_type", 9999),
        lambda t: setattr(t, "raw_data", np.float32([1, np.inf, 1]).tobytes()),
        lambda t: t.dims.append(1),
    ],
)
def test_hostile_tensors(onnx: Any, tmp_path: Path, change: Any) -> None:
    path = str(tmp_path / "x.onnx")
    exchange.write(features(3), path)
    model = onnx.load(path)
    change(model.graph.initializer[2])
    onnx.save(model, path)
    with pytest.raises(InputError, match=r"x\.onnx"):
        exchange.read(path)


def test_the_checksum(onnx: Any, tmp_path: Path) -> None:
    """A damaged one is no missing one; without any a model is believed, and where it was moved its values are compared."""
    path = str(tmp_path / "x.onnx")
    exchange.write(features(3), path)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    parts = [model.graph.node[0], *model.graph.initializer]
    moved = onnx.compose.add_prefix(model, "a_")
    onnx.save(moved, path)
    check_same_numbers(exchange.read(path), features(3), "f4")
    changed = np.frombuffer(parts[1].raw_data, "f4").copy()
    changed[0] += 1
    parts[1].raw_data = changed.tobytes()
    for part in (None, *parts[:-1]):
        if part is not None:
            part.ClearField("doc_string")
        onnx.save(model, path)
        with pytest.raises(InputError, match=r"x\.onnx: damaged: its values do not match its checksum"):
            exchange.read(path)
    parts[-1].ClearField("doc_string")
    onnx.save(model, path)
    assert exchange.read(path).gamma[0] == changed[0]


def test_a_layer_that_divides_by_0_is_refused(tmp_path: Path) -> None:
    peer("onnx")
    x = data((30, 2))
    x[:, 1] = 0.1
    with pytest.raises(MismatchError, match="feature 1 has a variance and an eps of 0, which bn scales by 1"):
        exchange.write(fitted(x, eps=0.0), str(tmp_path / "x.onnx"))
