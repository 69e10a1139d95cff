"""Keras 3 on its torch backend beside `bncli.exchange.keras`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
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
    keras_with_torch,
)
from helpers import Array, advised

from bncli import exchange
from bncli.errors import InputError, UsageError
from bncli.stats import container

# Keras' torch backend turns tensors into arrays in a way that NumPy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
TYPES = {"f4": "float32", "f8": "float64"}


@pytest.fixture(scope="module")
def keras() -> Any:
    return keras_with_torch()


def model_of(keras: Any, x: Array, axis: int = -1, **options: Any) -> Any:
    dtype = TYPES[x.dtype.str[1:]]
    layer = keras.layers.BatchNormalization(axis=axis, dtype=dtype, **options)
    return keras.Sequential([keras.Input(x.shape[1:], dtype=dtype), layer])


def inference(model: Any, x: Array) -> Array:
    """Test mode of a layer, or of a model's only one: the model itself would round its input to float32."""
    layer = model.layers[-1] if hasattr(model, "layers") else model
    result: Array = layer(x, training=False).detach().numpy()
    return result


@pytest.mark.peer
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", [1, -1])
def test_exported_and_loaded(keras: Any, tmp_path: Path, shape: tuple[int, ...], axis: int) -> None:
    x = data(shape, "f4", axis)
    stats = fitted(x, axis, eps=1e-4)
    report = exchange.write(stats, str(tmp_path / "bn.weights.h5"))
    assert report.settings == {"axis": axis, "momentum": 0.9, "epsilon": 1e-4}
    model = model_of(keras, x, **report.settings)
    model.load_weights(tmp_path / "bn.weights.h5")
    fresh = data(shape, "f4", axis, seed=6)
    check_agrees(inference(model, fresh), stats, fresh)


@pytest.mark.peer
def test_a_float64_layer_holds_the_same_numbers(keras: Any, tmp_path: Path) -> None:
    """Keras computes inference in float32 whatever the layer's type, so its variables are compared."""
    x = data((40, 5))
    stats = fitted(x)
    exchange.write(stats, str(tmp_path / "bn.weights.h5"))
    model = model_of(keras, x)
    model.load_weights(tmp_path / "bn.weights.h5")
    found = [variable.numpy() for variable in model.layers[-1].weights]
    np.testing.assert_array_equal(found, [stats.gamma, stats.beta, stats.running_mean, stats.running_var])
    model.save_weights(tmp_path / "saved.weights.h5")
    check_same_numbers(exchange.read(str(tmp_path / "saved.weights.h5")), stats)


@pytest.mark.peer
def test_loaded_into_a_functional_model(keras: Any, tmp_path: Path) -> None:
    x = data((40, 5), "f4")
    stats = fitted(x, eps=1e-3)
    exchange.write(stats, str(tmp_path / "bn.weights.h5"))
    inputs = keras.Input((5,))
    model = keras.Model(inputs, keras.layers.BatchNormalization(name="mine")(inputs))
    model.load_weights(tmp_path / "bn.weights.h5")
    check_agrees(inference(model, x), stats, x)


def trained(keras: Any, model: Any, x: Array) -> None:
    model.compile(optimizer=keras.optimizers.SGD(0.05), loss="mse")
    model.fit(
        x,
        np.ones(model.output_shape[1:], x.dtype) * np.ones((len(x), *[1] * (x.ndim - 1)), x.dtype),
        batch_size=16,
        verbose=0,
    )


@pytest.mark.peer
@pytest.mark.parametrize("shape", [(48, 7), (20, 4, 5, 3)])
def test_imported_after_training(keras: Any, tmp_path: Path, shape: tuple[int, ...]) -> None:
    x = data(shape, "f4", -1)
    model = model_of(keras, x, momentum=0.8)
    trained(keras, model, x)
    model.save_weights(tmp_path / "bn.weights.h5")
    stats = exchange.read(str(tmp_path / "bn.weights.h5"))
    assert (stats.momentum, stats.eps, stats.ddof, stats.init, stats.axis) == (0.99, 1e-3, 0, "unit", -1)
    assert stats.gamma.tolist() != [1.0] * shape[-1]  # the training moved it
    check_no_population(stats)
    check_agrees(inference(model, x), stats, x)


@pytest.fixture
def saved(keras: Any, tmp_path: Path) -> tuple[Any, str]:
    """A trained model of three layers, two of them in a model inside it."""
    inner = keras.Sequential(
        [keras.layers.BatchNormalization(name="norm"), keras.layers.BatchNormalization(name="deep", scale=False)]
    )
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.BatchNormalization(name="first"), keras.layers.Dense(4, name="dense"), inner]
    )
    trained(keras, model, data((64, 6), "f4"))
    model.save_weights(tmp_path / "model.weights.h5")
    return model, str(tmp_path / "model.weights.h5")


@pytest.mark.peer
def test_layer_of_a_model(saved: tuple[Any, str]) -> None:
    model, path = saved
    stats = exchange.read(path, layer="first")
    assert stats.provenance["imported"]["layer"] == "first"
    x = data((20, 6), "f4", seed=7)
    check_agrees(inference(model.layers[0], x), stats, x)
    inner = exchange.read(path, layer="norm")
    y = data((20, 4), "f4", seed=7)
    check_agrees(inference(model.layers[2].layers[0], y), inner, y)


@pytest.mark.peer
def test_layers_are_listed(saved: tuple[Any, str]) -> None:
    with pytest.raises(InputError, match="deep: gamma or beta is not in the file"):  # nobody can say which
        exchange.read(saved[1], layer="deep")
    for layer in (None, "dense"):
        with pytest.raises(UsageError, match=r"(?s)--layer first: 6 features.*--layer norm: 4 features"):
            exchange.read(saved[1], layer=layer)


def test_layers_of_one_name_are_listed_by_path(tmp_path: Path) -> None:
    path = str(tmp_path / "x.weights.h5")
    with h5py.File(path, "w") as file:
        for group in ("layers/a", "layers/b"):
            for i in range(4):
                file[f"{group}/vars/{i}"] = np.full(3, float(i + 1))
            file[f"{group}/vars"].attrs["name"] = "same"
    with pytest.raises(UsageError, match="--layer layers/a: 3 features"):
        exchange.read(path, layer="same")
    assert exchange.read(path, layer="layers/b").running_var.tolist() == [4.0] * 3
    assert exchange.read(path, layer="b").running_mean.tolist() == [3.0] * 3


@pytest.mark.parametrize("count", FEATURES)
def test_round_trip(tmp_path: Path, count: int) -> None:
    back = check_round_trip(tmp_path, count, ".weights.h5", eps=1e-3, momentum=0.97)
    assert (back.eps, back.momentum) == (1e-3, 0.97)


def spoil(change: Callable[[h5py.Group], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.write_bytes(container.unsealed(path.read_bytes(), "x"))  # as Keras writes it
        with h5py.File(path, "a") as file:
            group = file["layers/batch_normalization/vars"]
            del group["2"]
            change(group)

    return apply


def virtual(group: h5py.Group) -> None:
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource("other.h5", "x", (3,))
    group.create_virtual_dataset("2", layout)


HOSTILE = {
    "missing": lambda g: None,
    "external link": lambda g: g.__setitem__("2", h5py.ExternalLink("/etc/hostname", "/x")),
    "soft link": lambda g: g.__setitem__("2", h5py.SoftLink("/layers/batch_normalization/vars/2")),
    "virtual": virtual,
    "external storage": lambda g: g.create_dataset("2", (3,), "f8", external=[("/etc/hostname", 0, 24)]),
    "huge and unwritten": lambda g: g.create_dataset("2", (3,), "f8", chunks=(1,)),
    "compressed": lambda g: g.create_dataset("2", data=np.ones(3), compression="gzip"),
    "text": lambda g: g.create_dataset("2", data=[b"a", b"b", b"c"]),
    "integers": lambda g: g.create_dataset("2", data=[1, 2, 3]),
    "never written": lambda g: g.create_dataset("2", (3,), "f8"),
    "another length": lambda g: g.create_dataset("2", data=np.ones(4)),
    "two dimensions": lambda g: g.create_dataset("2", data=np.ones((3, 1))),
    "group": lambda g: g.create_group("2"),
    "infinite": lambda g: g.create_dataset("2", data=[1, np.inf, 1.0]),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile(tmp_path: Path, how: str) -> None:
    path = tmp_path / "x.weights.h5"
    exchange.write(features(3), str(path))
    spoil(HOSTILE[how])(path)
    with pytest.raises(InputError, match=r"x\.weights\.h5"):
        exchange.read(str(path))


def test_twelve_orders_of_magnitude_more_than_the_file_has(tmp_path: Path) -> None:
    path = str(tmp_path / "x.weights.h5")
    with h5py.File(path, "w") as file:
        for i in range(4):
            file.create_dataset(f"layers/b/vars/{i}", (10**12,), "f8", chunks=(1000,))
    with pytest.raises(InputError, match="not stored as Keras stores it"):
        exchange.read(path)
    assert os.path.getsize(path) < 100_000


def test_a_heap_that_libhdf5_would_walk_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "x.weights.h5"
    exchange.write(features(3), str(path))
    content = bytearray(container.unsealed(path.read_bytes(), "x"))
    heap = content.index(b"GCOL")
    free = heap + 16 + 16 + 24  # after the header and the layer's name, padded to 24 bytes
    assert int.from_bytes(content[free : free + 2], "little") == 0
    content[free + 8 : free + 16] = (200).to_bytes(8, "little")  # the rest reads as entries without a size
    path.write_bytes(content)
    with pytest.raises(InputError, match="heap of texts is damaged"):
        exchange.read(str(path))


def test_the_seal(tmp_path: Path) -> None:
    """A damaged one is no missing one; a copy by another tool has none, and is believed."""
    path = tmp_path / "x.weights.h5"
    stats = features(3)
    exchange.write(stats, str(path))
    whole = path.read_bytes()
    for at in range(len(whole) - container.SEAL_BYTES, len(whole)):
        for number in (whole.index(stats.running_mean.tobytes()), at):  # with a changed number, and by itself
            damaged = bytearray(whole)
            damaged[at] ^= 0x10
            damaged[number] ^= 0x02
            path.write_bytes(damaged)
            with pytest.raises(InputError, match=r"x\.weights\.h5: damaged: its bytes do not match their checksum"):
                exchange.read(str(path))
    path.write_bytes(whole[: -container.SEAL_BYTES])
    check_same_numbers(exchange.read(str(path)), stats)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize("name", ["m.keras", "m.h5"])
def test_whole_models_are_told_how_to_go_on(keras: Any, tmp_path: Path, name: str) -> None:
    path = str(tmp_path / name)
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
    model.save(path)
    for format in (None, "keras"):
        with pytest.raises(InputError, match=r'a (whole Keras )?model.*model\.save_weights\("x\.weights\.h5"\)'):
            exchange.read(path, format)
    model.save_weights(tmp_path / "x.weights.h5")
    (tmp_path / "x.weights.h5").rename(tmp_path / "x.h5")
    with advised("as a new layer has them"):
        assert exchange.read(str(tmp_path / "x.h5")).num_features == 4


def test_a_stats_file_is_no_framework_file(tmp_path: Path) -> None:
    path = str(tmp_path / "x.bn.h5")
    features(3).save(path)
    with pytest.raises(InputError, match=r"x\.bn\.h5: a stats file already"):
        exchange.read(path)


@pytest.mark.peer
def test_a_layer_without_scale_is_named_and_not_passed_over(keras: Any, tmp_path: Path) -> None:
    layers = [keras.layers.BatchNormalization(name="a"), keras.layers.BatchNormalization(name="bare", scale=False)]
    keras.Sequential([keras.Input((4,)), *layers]).save_weights(tmp_path / "m.weights.h5")
    path = str(tmp_path / "m.weights.h5")
    with pytest.raises(UsageError, match=r"holds several layers.*bare"):
        exchange.read(path)
    with pytest.raises(InputError, match="bare: gamma or beta is not in the file"):
        exchange.read(path, layer="bare")
    with advised("as a new layer has them"):
        assert exchange.read(path, layer="a").num_features == 4


@pytest.mark.peer
def test_layers_of_nested_models_go_by_the_names_that_the_user_gave(keras: Any, tmp_path: Path) -> None:
    inputs = keras.Input((3,))
    out = inputs
    for name, mean in (("b1", 1.0), ("b2", 2.0)):
        block = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(name="bn")], name=name)
        block.layers[0].set_weights([np.ones(3), np.zeros(3), np.full(3, mean), np.ones(3)])
        out = block(out)
    keras.Model(inputs, out).save_weights(tmp_path / "m.weights.h5")
    for name, mean in (("b1/bn", 1.0), ("b2/bn", 2.0)):
        stats = exchange.read(str(tmp_path / "m.weights.h5"), layer=name)
        assert stats.running_mean.tolist() == [mean] * 3


@pytest.mark.peer
def test_a_layer_by_each_of_its_names(keras: Any, tmp_path: Path) -> None:
    """Its own, which is unique here, that after the model's around it, its path, and the end of one."""
    block = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(name="norm_3")], name="enc")
    model = keras.Sequential([keras.Input((3,)), block, keras.layers.BatchNormalization(name="last")])
    block.layers[0].set_weights([np.ones(3), np.zeros(3), np.full(3, 7.0), np.ones(3)])
    path = str(tmp_path / "m.weights.h5")
    model.save_weights(path)
    with h5py.File(path) as file:
        found: list[str] = []
        file.visititems(lambda at, item: found.append(at) if item.attrs.get("name") == "norm_3" else None)
    at = found[0].removesuffix("/vars")
    for layer in ("norm_3", "enc/norm_3", at, at.partition("/")[2]):
        stats = exchange.read(path, layer=layer)
        assert stats.running_mean.tolist() == [7.0] * 3
        assert stats.provenance["imported"]["layer"] == layer
    for layer in ("3", "dec/norm_3", ""):
        with pytest.raises(UsageError, match=r"(?s)has no layer.*--layer last: 3 features.*--layer norm_3: 3"):
            exchange.read(path, layer=layer)


@pytest.mark.peer
def test_bfloat16(keras: Any, tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(dtype="bfloat16")])
    values = np.array([0.1, -2.5, 3e38])
    model.layers[0].set_weights([np.ones(3), np.zeros(3), values, np.ones(3)])
    path = str(tmp_path / "m.weights.h5")
    model.save_weights(path)
    expected = model.layers[0].moving_mean.value.detach().double().numpy()
    assert exchange.read(path).running_mean.tolist() == expected.tolist()
    np.testing.assert_allclose(expected, values, rtol=2**-8)
