"""Folding: PyTorch's own layer after folding gives what its unfused pair gave; nothing else in the file changes."""

from __future__ import annotations

import json
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from cli_helpers import check_refused, good, untouched
from helpers import Array, peer

import bncli
from bncli import Stats, exchange
from bncli.errors import InputError, MismatchError, OutputExistsError, UsageError
from bncli.numerics.moments import Moments

TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "float16": 4e-3}


def stats_of(seed: int, c: int, **options: Any) -> Stats:
    """Statistics with means, variances, gammas and betas of several magnitudes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(rng.normal(0, 3, c), rng.uniform(0.1, 5, c), (512, c))
    return bncli.fit(x, momentum=0.99, gamma=rng.normal(1, 0.5, c), beta=rng.normal(0, 1, c), **options)


def arrays_of(c: int, dtype: str = "f4") -> dict[str, Array]:
    """A small model's weights, and arrays that have nothing to do with the folding."""
    rng = np.random.default_rng(c)
    return {
        "conv.weight": rng.normal(size=(c, 2, 3, 3)).astype(dtype),
        "conv.bias": rng.normal(size=c).astype(dtype),
        "fc.weight": rng.normal(size=(c, 7)).astype(dtype),
        "bn.weight": np.ones(c, dtype),
        "bn.num_batches_tracked": np.array(3),
        "file": np.arange(3, dtype="u1"),
        "none": np.zeros((0, 4), dtype),
    }


def write_safetensors(
    path: Path, tensors: dict[str, tuple[str, Array]], metadata: dict[str, str] | None = None
) -> Path:
    """The format as its specification has it, written without bn and without the package."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, (kind, array) in tensors.items():
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def folded(weight: Array, bias: Array | None, stats: Stats) -> tuple[Array, Array]:
    """The formula, in float64, row by row."""
    rows, biases = [], []
    for i, row in enumerate(weight.astype("f8")):
        factor = stats.gamma[i] / np.sqrt(stats.running_var[i] + stats.eps)
        rows.append(row * factor)
        biases.append(((0.0 if bias is None else float(bias[i])) - stats.running_mean[i]) * factor + stats.beta[i])
    return np.array(rows), np.array(biases)


@pytest.mark.peer
@pytest.mark.parametrize("container", ["safetensors", "npz"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "kind",
    [
        *("linear", "conv1", "conv2", "square", "grouped", "depthwise", "conv3"),
        *("deconv", "deconv_square", "deconv_groups", "deconv_wide_groups", "deconv_depthwise", "deconv1", "deconv3"),
    ],
)
def test_the_folded_layer_is_torchs_unfused_pair(
    tmp_path: Path, kind: str, bias: bool, dtype: str, container: str
) -> None:
    torch = peer("torch")
    torch.manual_seed(7)
    nn, c = torch.nn, 6
    layer, norm, shape = {
        "linear": (nn.Linear(4, c, bias=bias), nn.BatchNorm1d(c), (5, 4)),
        "conv1": (nn.Conv1d(4, c, 3, bias=bias), nn.BatchNorm1d(c), (5, 4, 9)),
        "conv2": (nn.Conv2d(4, c, (3, 2), stride=2, padding=1, bias=bias), nn.BatchNorm2d(c), (5, 4, 9, 8)),
        "square": (nn.Conv2d(c, c, 3, bias=bias), nn.BatchNorm2d(c), (5, c, 9, 8)),
        "grouped": (nn.Conv2d(4, c, 3, groups=2, bias=bias), nn.BatchNorm2d(c), (5, 4, 9, 8)),
        "depthwise": (nn.Conv1d(3, c, 3, groups=3, bias=bias), nn.BatchNorm1d(c), (5, 3, 9)),
        "conv3": (nn.Conv3d(4, c, 2, dilation=2, bias=bias), nn.BatchNorm3d(c), (2, 4, 5, 5, 5)),
        "deconv": (nn.ConvTranspose2d(4, c, 3, stride=2, bias=bias), nn.BatchNorm2d(c), (5, 4, 7, 6)),
        "deconv_square": (nn.ConvTranspose2d(c, c, 3, bias=bias), nn.BatchNorm2d(c), (5, c, 7, 6)),
        "deconv_groups": (nn.ConvTranspose2d(c, c, 3, groups=2, bias=bias), nn.BatchNorm2d(c), (5, c, 7, 6)),
        "deconv_wide_groups": (nn.ConvTranspose2d(9, c, 3, groups=3, bias=bias), nn.BatchNorm2d(c), (5, 9, 7, 6)),
        "deconv_depthwise": (nn.ConvTranspose2d(c, c, 3, groups=c, bias=bias), nn.BatchNorm2d(c), (5, c, 7, 6)),
        "deconv1": (nn.ConvTranspose1d(4, c, 3, groups=2, bias=bias), nn.BatchNorm1d(c), (5, 4, 7)),
        "deconv3": (nn.ConvTranspose3d(2, c, 2, groups=2, bias=bias), nn.BatchNorm3d(c), (2, 2, 3, 3, 3)),
    }[kind]
    pair = nn.Sequential(layer, norm).to(getattr(torch, dtype))
    stats = stats_of(3, c)
    for name in ("running_mean", "running_var"):
        getattr(norm, name).copy_(torch.from_numpy(getattr(stats, name)))
    norm.weight.data.copy_(torch.from_numpy(stats.gamma.copy()))
    norm.bias.data.copy_(torch.from_numpy(stats.beta.copy()))
    source, out = tmp_path / f"model.{container}", tmp_path / f"folded.{container}"
    if container == "npz":
        np.savez(source, **{k: v.numpy() for k, v in pair.state_dict().items()})
    else:
        peer("safetensors.torch").save_file(pair.state_dict(), source)
    ambiguous = {"square": False, "grouped": False, "deconv_square": True, "deconv_groups": True}
    if kind in ambiguous:
        with pytest.raises(UsageError, match=r"--no-transposed if .*--transposed if"):
            exchange.write(stats, str(out), "fold", into=str(source), layer="0")
        assert not out.exists()
    report = exchange.write(stats, str(out), "fold", into=str(source), layer="0", transposed=ambiguous.get(kind))
    assert any("transposed" in note for note in report.notes) is (kind[:2] == "de" and "depthwise" not in kind)
    assert any("had no bias" in note for note in report.notes) is not bias
    if container == "npz":
        with np.load(out) as archive:
            tensors = {k: torch.from_numpy(v) for k, v in archive.items()}
    else:
        tensors = peer("safetensors.torch").load_file(out)
    assert set(tensors) == set(pair.state_dict()) | {"0.bias"}
    assert tensors["0.weight"].dtype == tensors["0.bias"].dtype == getattr(torch, dtype)
    x = torch.randn(shape, dtype=getattr(torch, dtype))
    with torch.no_grad():
        expected = pair.eval()(x)
        layer.bias = nn.Parameter(torch.empty(c, dtype=getattr(torch, dtype)))
        layer.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith("0.")}, strict=True)
        found = layer(x)
    error = ((found - expected).abs() / expected.abs().clamp(min=1)).max().item()
    assert error <= TOLERANCE[dtype], error


@pytest.mark.peer
def test_a_convolution_over_the_sample_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of what a convolution makes of the images; folded, it gives what the pair does for those held out."""
    torch, samples = peer("torch"), Path(__file__).parents[2] / "sample_data"
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    conv, norm = torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8)
    with h5py.File(samples / "images.h5") as file, torch.no_grad():
        np.save("x.npy", conv(torch.from_numpy(file["images"][:].astype("f4"))).numpy())
    good("fit", "x.npy", "--axis", "1", "--gamma", "1.5", "--beta", "-0.5", "-o", "x.bn.h5", "-q")
    good("export", "x.bn.h5", "-o", "x.pt")
    norm.load_state_dict(torch.load("x.pt", weights_only=True), strict=True)
    peer("safetensors.torch").save_file({"0.weight": conv.weight.detach()}, "model.safetensors")
    good("export", "x.bn.h5", "--to", "fold", "--into", "model.safetensors", "-o", "folded.safetensors")
    both = peer("safetensors.torch").load_file("folded.safetensors")
    heldout = torch.from_numpy(np.load(samples / "images_heldout.npy").astype("f4"))
    with torch.no_grad():
        expected = norm.eval()(conv(heldout))
        found = torch.nn.functional.conv2d(heldout, both["0.weight"], both["0.bias"])
    assert ((found - expected).abs() / expected.abs().clamp(min=1)).max().item() <= 1e-5


@pytest.mark.parametrize("use", ["running", "population"])
def test_scale_and_shift_alone(tmp_path: Path, use: str) -> None:
    stats = stats_of(1, 4)
    x = np.random.default_rng(0).normal(2, 3, (50, 4))
    exchange.write(stats, str(tmp_path / "a.npz"), "fold", use=use)
    with np.load(tmp_path / "a.npz") as archive:
        assert sorted(archive) == ["scale", "shift"]
        np.testing.assert_allclose(archive["scale"] * x + archive["shift"], stats.normalize(x, use=use), atol=1e-13)


@pytest.mark.peer
def test_scale_and_shift_in_safetensors(tmp_path: Path) -> None:
    stats = stats_of(1, 4)
    exchange.write(stats, str(tmp_path / "a.safetensors"), "fold")
    found = peer("safetensors.numpy").load_file(tmp_path / "a.safetensors")
    scale = stats.gamma / np.sqrt(stats.running_var + stats.eps)
    np.testing.assert_allclose(found["scale"], scale, rtol=1e-15)
    np.testing.assert_allclose(found["shift"], stats.beta - stats.running_mean * scale, rtol=1e-14)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4"])
def test_npz_keeps_types_and_carries_the_rest(tmp_path: Path, dtype: str) -> None:
    arrays, stats = arrays_of(5, dtype), stats_of(5, 5)
    write_npz(tmp_path / "model.npz", arrays)
    exchange.write(stats, str(tmp_path / "out.npz"), "fold", into=str(tmp_path / "model.npz"), layer="conv")
    with np.load(tmp_path / "out.npz") as archive:
        found = dict(archive)
    assert list(found) == list(arrays)
    weight, bias = folded(arrays["conv.weight"], arrays["conv.bias"], stats)
    for name, values in arrays.items():
        assert found[name].dtype == values.dtype
        expected = {"conv.weight": weight, "conv.bias": bias}.get(name)
        if expected is None:
            np.testing.assert_array_equal(found[name], values)
        else:
            np.testing.assert_array_equal(found[name], expected.astype(dtype))


def write_npz(path: Path, arrays: dict[str, Array]) -> None:
    """np.savez, which takes no array named "file"."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, values in arrays.items():
            with archive.open(name + ".npy", "w") as member:
                np.lib.format.write_array(member, values)


@pytest.mark.peer
def test_safetensors_carries_types_numpy_does_not_have_and_metadata(tmp_path: Path) -> None:
    torch, safetensors = peer("torch"), peer("safetensors.torch")
    torch.manual_seed(0)
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(3, 2, dtype=torch.bfloat16),
        "eight": torch.randn(5).to(torch.float8_e4m3fn),
        "steps": torch.tensor(7),
        "lin.weight": torch.randn(4, 3),
        "none": torch.zeros(0, 3),
    }
    source, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    safetensors.save_file(tensors, source, {"format": "pt"})
    exchange.write(stats_of(2, 4), str(out), "fold", into=str(source))  # the only layer needs no name
    found = safetensors.load_file(out)
    for name in ("odd", "half", "eight", "steps", "none"):
        assert found[name].dtype == tensors[name].dtype
        assert found[name].shape == tensors[name].shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensors[name].reshape(-1).view(torch.uint8))
    with peer("safetensors").safe_open(out, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    weight, bias = folded(tensors["lin.weight"].numpy(), None, stats_of(2, 4))
    np.testing.assert_array_equal(found["lin.weight"].numpy(), weight.astype("f4"))
    np.testing.assert_array_equal(found["lin.bias"].numpy(), bias.astype("f4"))


def test_a_bare_weight_has_the_empty_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "layer.npz", weight=np.ones((4, 2)), bias=np.ones(4))
    exchange.write(stats_of(2, 4), str(tmp_path / "out.npz"), "fold", into=str(tmp_path / "layer.npz"), layer="")
    with np.load(tmp_path / "out.npz") as archive:
        np.testing.assert_array_equal(archive["bias"], folded(np.ones((4, 2)), np.ones(4), stats_of(2, 4))[1])


def test_a_weight_in_fortran_order(tmp_path: Path) -> None:
    weight = np.asfortranarray(np.arange(8.0).reshape(4, 2))
    np.savez(tmp_path / "layer.npz", **{"a.weight": weight})
    exchange.write(stats_of(2, 4), str(tmp_path / "out.npz"), "fold", into=str(tmp_path / "layer.npz"))
    with np.load(tmp_path / "out.npz") as archive:
        np.testing.assert_array_equal(archive["a.weight"], folded(weight, None, stats_of(2, 4))[0])


@pytest.mark.parametrize(
    ("shape", "fits", "words"),
    [
        ((4, 4, 3), "both", "fits a convolution and a transposed one;"),
        ((4, 2, 3), "both", "fits a convolution and a transposed one of 2 groups;"),
        ((4, 4), "ordinary", "a linear layer's, which has no transposed form"),
        ((4, 3, 3), "ordinary", "not (in, 4 / groups, ...) of a transposed convolution"),
        ((4, 8, 1, 1), "ordinary", "not (in, 4 / groups, ...) of a transposed convolution"),
        ((4, 0, 3), "ordinary", "not (in, 4 / groups, ...) of a transposed convolution"),
        ((4, 1, 3), "same", ""),  # depthwise: each input channel has its own output channel
        ((8, 4, 3), "transposed", "8 output channels"),
        ((8, 1, 3), "transposed", "8 output channels"),  # 4 groups of two inputs and one output
        ((1, 4, 3), "transposed", "1 output channels"),
        ((3, 2, 3), "neither", "3 output channels"),
    ],
)
def test_the_kind_of_layer_that_a_shape_fits(tmp_path: Path, shape: tuple[int, ...], fits: str, words: str) -> None:
    """Taken where only one does; where both do the caller says which, and what does not fit is refused."""
    weight = np.random.default_rng(0).normal(size=shape)
    np.savez(tmp_path / "layer.npz", **{"a.weight": weight})

    def write(transposed: bool | None) -> Array:
        exchange.write(
            stats_of(2, 4), str(tmp_path / "o.npz"), "fold", into=str(tmp_path / "layer.npz"), transposed=transposed
        )
        with np.load(tmp_path / "o.npz") as archive:
            found: Array = archive["a.weight"]
        return found

    stats = stats_of(2, 4)
    factor = stats.gamma / np.sqrt(stats.running_var + stats.eps)
    ordinary = transposed = weight
    if fits in ("ordinary", "both", "same"):
        ordinary = np.stack([weight[i] * factor[i] for i in range(4)])
        np.testing.assert_array_equal(write(False), ordinary)
    if fits in ("transposed", "both", "same"):
        a, b = shape[:2]
        run = a // (4 // b)  # inputs of a group
        transposed = np.array([[weight[i, j] * factor[i // run * b + j] for j in range(b)] for i in range(a)])
        np.testing.assert_array_equal(write(True), transposed)
    if fits in ("ordinary", "transposed", "same"):
        np.testing.assert_array_equal(write(None), transposed if fits == "transposed" else ordinary)
    wrong = {"both": [None], "ordinary": [True], "transposed": [False], "neither": [None, False], "same": []}[fits]
    for given in wrong:
        with pytest.raises((UsageError, MismatchError), match=re.escape(words)):
            write(given)


def test_safetensors_carries_values_of_less_than_a_byte(tmp_path: Path) -> None:
    """And puts tensors of larger values first, so that each lies at a multiple of its size."""
    four, wide = np.arange(3, dtype="u1"), np.arange(2, dtype="f8")
    header: dict[str, Any] = {
        "q": {"dtype": "F4", "shape": [2, 3], "data_offsets": [0, 3]},
        "h.weight": {"dtype": "F16", "shape": [3, 1], "data_offsets": [3, 9]},
        "w": {"dtype": "F64", "shape": [2], "data_offsets": [9, 25]},
    }
    text = json.dumps(header).encode()
    data = four.tobytes() + np.ones(3, "f2").tobytes() + wide.tobytes()
    source, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    source.write_bytes(struct.pack("<Q", len(text)) + text + data)
    exchange.write(stats_of(2, 3), str(out), "fold", into=str(source))
    content = out.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert length % 8 == 0
    entries, tensors = json.loads(content[8 : 8 + length]), content[8 + length :]
    assert {key: (entry["dtype"], entry["shape"]) for key, entry in entries.items()} == {
        "q": ("F4", [2, 3]),
        "h.weight": ("F16", [3, 1]),
        "h.bias": ("F16", [3]),
        "w": ("F64", [2]),
    }
    places = {key: slice(*entry["data_offsets"]) for key, entry in entries.items()}
    assert tensors[places["q"]] == four.tobytes()
    assert tensors[places["w"]] == wide.tobytes()
    assert (places["w"].start % 8, places["h.weight"].start % 2, places["h.bias"].start % 2) == (0, 0, 0)


def refused(tmp_path: Path, error: type[Exception], match: str, arrays: dict[str, Array], **options: Any) -> None:
    """Assert that folding into these arrays is refused and leaves no file."""
    stats = options.pop("stats", None) or stats_of(5, 5)
    write_npz(tmp_path / "model.npz", arrays)
    with pytest.raises(error, match=match):
        exchange.write(
            stats, str(tmp_path / "out.npz"), "fold", **{"into": str(tmp_path / "model.npz"), "layer": "conv"} | options
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.npz"]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    arrays = arrays_of(5)
    wrong = arrays_of(4)
    refused(tmp_path, MismatchError, r"conv.weight has 4 output channels .*have 5 features", wrong)
    refused(tmp_path, MismatchError, "conv.bias has shape", arrays | {"conv.bias": np.ones((5, 1))})
    refused(tmp_path, MismatchError, "conv.weight is of type int64", arrays | {"conv.weight": np.ones((5, 2), int)})
    refused(tmp_path, MismatchError, "does not fit float16", arrays | {"conv.weight": np.full((5, 2), 6e4, "f2")})
    refused(tmp_path, UsageError, r"no layer 'bn'(.|\n)*--layer conv(.|\n)*--layer fc", arrays, layer="bn")
    refused(tmp_path, UsageError, r"2 layers", arrays, layer=None)
    refused(tmp_path, InputError, "no linear or convolution layer", {"bn.weight": np.ones(5)})
    refused(tmp_path, UsageError, "--into FILE", arrays, into=None)
    refused(tmp_path, UsageError, "--transposed .*--into FILE", arrays, into=None, layer=None, transposed=False)


def test_missing_statistics_are_refused(tmp_path: Path) -> None:
    nan = np.array([1.0, np.nan])
    stats = Stats(nan, nan, np.ones(2), np.zeros(2), Moments.empty(2))
    arrays = {"conv.weight": np.ones((2, 2))}
    refused(tmp_path, MismatchError, "feature 1 has no running statistics", arrays, stats=stats)
    refused(tmp_path, MismatchError, "hold no population statistics", arrays, stats=stats, use="population")


def test_the_weights_are_never_the_output(tmp_path: Path) -> None:
    write_npz(tmp_path / "model.npz", arrays_of(5))
    with pytest.raises(OutputExistsError, match="is also an input"):
        exchange.write(
            stats_of(5, 5), str(tmp_path / "model.npz"), "fold", into=str(tmp_path / "model.npz"), layer="conv"
        )


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_cut_and_mutated_files_are_refused_or_read(tmp_path: Path, suffix: str) -> None:
    """Never anything but an error of bn's; what is read is whole, or what the package reads of it, as there is no checksum."""
    good_file, bad, out = (tmp_path / f"{n}.{suffix}" for n in ("good", "bad", "out"))
    tensors = {"a.weight": np.ones((5, 2), "f4"), "b": np.arange(6, dtype="f4")}
    if suffix == "npz":
        np.savez(good_file, **tensors)
    else:
        write_safetensors(good_file, {k: ("F32", v) for k, v in tensors.items()}, {"format": "pt"})
    content, stats = good_file.read_bytes(), stats_of(5, 5)
    exchange.write(stats, str(out), "fold", into=str(good_file))
    expected = dict(zip(("a.weight", "a.bias"), folded(tensors["a.weight"], None, stats), strict=True)) | {
        "b": tensors["b"]
    }
    expected = {name: array.astype("f4").tobytes() for name, array in expected.items()}
    for length in range(0, len(content), 7):
        bad.write_bytes(content[:length])
        with pytest.raises(InputError):
            exchange.write(stats, str(out), "fold", into=str(bad))
    rng = np.random.default_rng(0)
    for _ in range(200):
        mutated = bytearray(content)
        mutated[rng.integers(len(content))] = rng.integers(256)
        bad.write_bytes(mutated)
        try:
            exchange.write(stats, str(out), "fold", into=str(bad))
        except (InputError, UsageError, MismatchError):
            continue
        if suffix == "npz":  # which holds checksums
            with np.load(out) as archive:
                assert {name: archive[name].tobytes() for name in archive.files} == expected
        else:
            check_folded_as_read(bad, out, stats)


def check_folded_as_read(source: Path, out: Path, stats: Stats) -> None:
    """Assert that a file with one layer, whatever its names and values, was folded as the package reads them."""
    package = peer("safetensors.numpy")
    try:
        theirs = package.load_file(source)
    except peer("safetensors").SafetensorError:  # it knows fewer types than bn carries
        return
    ours = package.load_file(out)
    (key,) = [name for name in theirs if name.endswith("weight")]
    with np.errstate(invalid="ignore"):
        weight, bias = folded(theirs[key], theirs.get(key.replace("weight", "bias")), stats)
    np.testing.assert_array_equal(ours.pop(key), weight.astype("f4"))
    np.testing.assert_array_equal(ours.pop(key.replace("weight", "bias")), bias.astype("f4"))
    assert {name: values.tobytes() for name, values in ours.items()} == {
        name: values.tobytes() for name, values in theirs.items() if name != key
    }


@pytest.mark.parametrize(
    "header",
    [
        b"[]", b"3", b"null", b"{", b'{"a": 1}', b'{"a": {}}', b"[" * 5000,
        b'{"a.weight": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}',
        b'{"a.weight": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 8]}}',
        b'{"a.weight": {"dtype": "F32", "shape": [2, 1], "data_offsets": [4, 8]}}',
        b'{"a.weight": {"dtype": [], "shape": [2, 1], "data_offsets": [0, 8]}}',
        b'{"a.weight": {"dtype": "F32", "shape": [2.0, 1], "data_offsets": [0, 8]}}',
        b'{"a.weight": {"dtype": "F4", "shape": [99999999999999999999, 1], "data_offsets": [0, 8]}}',
        b'{"a.weight": {"dtype": "F32", "shape": "xy", "data_offsets": "ab"}}',
        b'{"__metadata__": 3}',
    ],
)  # fmt: skip
def test_hostile_headers_are_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(InputError, match=r"bad\.safetensors"):
        exchange.write(stats_of(5, 5), str(tmp_path / "out.safetensors"), "fold", into=str(path))


def test_an_npz_that_needs_pickle_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", **{"a.weight": np.array([[None]])})
    with pytest.raises(InputError, match=r"not a readable \.npz file"):
        exchange.write(stats_of(5, 5), str(tmp_path / "out.npz"), "fold", into=str(tmp_path / "bad.npz"))


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stats_of(5, 5).save("s.bn.h5")
    write_npz(tmp_path / "model.npz", arrays_of(5))
    result = good("export", "s.bn.h5", "--to", "fold", "-o", "out.npz", "--into", "model.npz", "--layer", "conv")
    assert "conv holds the normalization now" in result.err
    good("export", "s.bn.h5", "--to", "fold", "-o", "scale.npz")
    weight = np.random.default_rng(1).normal(size=(5, 5, 3, 3))
    np.savez("square.npz", **{"conv.weight": weight})
    found = []
    for option in ("--transposed", "--no-transposed"):
        good("export", "s.bn.h5", "--to", "fold", "-o", f"o{option}.npz", "--into", "square.npz", option)
        with np.load(f"o{option}.npz") as archive:
            found.append(archive["conv.weight"])
    np.testing.assert_array_equal(found[0].swapaxes(0, 1), folded(weight.swapaxes(0, 1), None, stats_of(5, 5))[0])
    np.testing.assert_array_equal(found[1], folded(weight, None, stats_of(5, 5))[0])
    with untouched(tmp_path):
        args = ["export", "s.bn.h5", "--to", "fold", "-f", "-o"]
        check_refused(
            2, [*args, "x.npz", "--into", "model.npz", "--layer", "no"], "--layer conv", "--layer fc", lines=4
        )
        square = ["x.npz", "--into", "square.npz", "--layer", "conv"]
        check_refused(2, [*args, *square], "conv.weight", "(5, 5, 3, 3)", "--transposed", "--no-transposed")
        check_refused(2, ["export", "s.bn.h5", "-o", "x.json", "--no-transposed"], "--transposed", "json")
        check_refused(5, [*args, "model.npz", "--into", "model.npz", "--layer", "conv"], "is also an input")
        check_refused(2, [*args, "x.safetensors", "--into", "model.npz", "--layer", "conv"], "suffix")
        check_refused(2, [*args, "x.json"], ".npz and .safetensors")
        check_refused(3, [*args, "x.npz", "--into", "none.npz"], "none.npz: no such file")
