"""Files that claim more than they hold, and names of very different lengths, take no more memory than a good run."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from cli_helpers import bn
from exchange_helpers import features
from helpers import peer
from test_memory import peak_mb

import bncli
from bncli import exchange
from bncli.errors import InputError, MismatchError
from bncli.stats import container

ROOM_MB = 64  # beside 1.2 times the peak of a good run
LONG = "y" * 300_000


def member(header: str, content: bytes = b"") -> bytes:
    """A .npy file with this header."""
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header) + 1) + header.encode() + b"\n" + content


def archive(path: Path, **members: bytes) -> None:
    def npy(value: float) -> bytes:
        stream = io.BytesIO()
        np.save(stream, np.full(1, value))
        return stream.getvalue()

    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in ({"running_mean": npy(0), "running_var": npy(1)} | members).items():
            out.writestr(f"{name}.npy", content)


def changed_json(path: Path, **changes: object) -> None:
    exchange.write(features(1), str(path))
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "sha256"} | changes))


def many_features(path: Path) -> None:
    changed_json(path, num_features=120_000_000)


def names_of_no_size(path: Path) -> None:
    archive(path, name=member("{'descr':'<U0','fortran_order':False,'shape':(200000000,)}"))


def more_names_than_features(path: Path) -> None:
    """4,000,000 names of a Chinese letter each: 16 MB that deflate to 16 kB."""
    letters = "語".encode("utf-32-le") * 4_000_000
    archive(path, name=member("{'descr':'<U1','fortran_order':False,'shape':(4000000,)}", letters))


def texts_of_gigabytes(path: Path) -> None:
    """A text claims 3 GB, where the file says how long it is."""
    image = container.unsealed(features(1).to_bytes(), "x")
    with h5py.File(io.BytesIO(image)) as file:
        text = str(file.attrs["provenance"])
    path.write_bytes(claiming(image, text))


def layer_name_of_gigabytes(path: Path) -> None:
    exchange.write(features(1), str(path))
    path.write_bytes(claiming(container.unsealed(path.read_bytes(), "x"), "batch_normalization"))


def claiming(image: bytes, text: str) -> bytes:
    """The file, whose last mention of the size of this text, in the reference to it, says 3 GB."""
    reference = struct.pack("<I", len(text.encode()))
    places = [i for i in range(len(image)) if image.startswith(reference, i) and image[i + 12 : i + 16] != bytes(4)]
    places = [i for i in places if image[(a := int.from_bytes(image[i + 4 : i + 12], "little")) : a + 4] == b"GCOL"]
    assert len(places) == 1
    return image[: places[0]] + struct.pack("<I", 3_000_000_000) + image[places[0] + 4 :]


def the_same_values_many_times(path: Path) -> None:
    """4 MB of values, which 300 datasets say are theirs."""
    with container.in_memory() as file:
        file["x"] = np.zeros(1 << 19)
        for i in range(300):
            file.create_dataset(f"state/{i}", (1 << 19,), "f8")  # of no values yet: its address is undefined
        file.attrs[container.DIGEST] = "0" * 64
        file.flush()
        size, address = (4 << 20).to_bytes(8, "little"), file["x"].id.get_offset().to_bytes(8, "little")
        image = file.id.get_file_image()
    assert image.count(b"\xff" * 8 + size) == 300
    path.write_bytes(image.replace(b"\xff" * 8 + size, address + size))


def bytes_of_gigabytes(path: Path) -> None:
    """Beside good tensors, what `weights_only` allows too: bytearray(3_000_000_000)."""
    exchange.write(features(1), str(path))
    with zipfile.ZipFile(path) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in members.items():
            if name.endswith("data.pkl"):
                call = b"X\1\0\0\0acbuiltins\nbytearray\n\x8a\5" + (3_000_000_000).to_bytes(5, "little") + b"\x85Rs."
                content = content[:-1] + call
            new.writestr(name, content)


def values_of_gigabytes(path: Path) -> None:
    onnx = peer("onnx")
    exchange.write(features(1), str(path))
    model = onnx.load(str(path))
    for tensor in model.graph.initializer:
        tensor.dims[0], tensor.doc_string = 1 << 30, ""
    model.graph.node[0].doc_string = ""
    path.write_bytes(model.SerializeToString())


def tensors_of_gigabytes(path: Path) -> None:
    exchange.write(features(1), str(path))
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for name in ("running_mean", "running_var"):
        header[name]["shape"] = [1 << 30]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def rows_that_are_not_there(path: Path) -> None:
    path.write_text("running_mean,running_var,num_features\n0,1,120000000\n")


@pytest.mark.peer
@pytest.mark.parametrize(
    ("suffix", "build"),
    [
        (".json", many_features),
        (".npz", names_of_no_size),
        (".npz", more_names_than_features),
        (".bn.h5", texts_of_gigabytes),
        (".bn.h5", the_same_values_many_times),
        (".weights.h5", layer_name_of_gigabytes),
        (".pt", bytes_of_gigabytes),
        (".onnx", values_of_gigabytes),
        (".safetensors", tensors_of_gigabytes),
        (".csv", rows_that_are_not_there),
    ],
)
def test_counts_are_compared_with_what_is_there(tmp_path: Path, suffix: str, build: Callable[[Path], None]) -> None:
    needed = {".pt": "torch", ".safetensors": "safetensors", ".onnx": "onnx"}.get(suffix)
    if needed:
        peer(needed)
    bad, good, out = (tmp_path / f"{name}{suffix}" for name in ("bad", "good", "out"))
    build(bad)
    if suffix == ".bn.h5":
        features(1).save(str(good))
    else:
        exchange.write(features(1), str(good))
    peaks = {}
    for path, expected in ((good, 0), (bad, 3)):
        args = ("inspect", path) if suffix == ".bn.h5" else ("import", path, "-o", out.with_suffix(".bn.h5"), "-f")
        peaks[path], code = peak_mb(*map(str, args))
        assert code == expected
    assert peaks[bad] <= 1.2 * peaks[good] + ROOM_MB


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, str]:
    """Two files of 3,000 features each: names as usual, and one of them very long."""
    paths = {}
    for kind, first in (("good", "n0"), ("long", LONG)):
        paths[kind] = str(tmp_path / f"{kind}.h5")
        with h5py.File(paths[kind], "w", libver="latest") as file:
            data = file.create_dataset("x", data=np.tile(np.arange(4.0)[:, None], (1, 3000)))
            names = np.array([first, *(f"n{i}" for i in range(1, 3000))], dtype=object)
            data.attrs.create("feature_names", names, dtype=h5py.string_dtype())
    return paths


@pytest.mark.peer
def test_one_long_name_takes_its_own_length(tmp_path: Path, inputs: dict[str, str]) -> None:
    """In the stats file and in every export, which hold at most a few times the bytes of the names more."""
    peer("safetensors")
    peaks: dict[str, list[float]] = {"good": [], "long": []}
    sizes: dict[str, list[int]] = {"good": [], "long": []}
    for kind, path in inputs.items():
        stats = tmp_path / f"{kind}.bn.h5"
        outs = [tmp_path / f"{kind}{s}" for s in (".json", ".csv", ".npz", ".safetensors")]
        runs = [("fit", path, "-o", str(stats), "-q"), ("merge", str(stats), "-o", f"{stats}.2", "-q")]
        runs += [("export", str(stats), "-o", str(out), "-q") for out in outs]
        runs += [("import", str(out), "-o", f"{out}.bn.h5", "-q") for out in outs]
        for run in runs:
            peak, code = peak_mb(*run)
            assert code == 0, run
            peaks[kind].append(peak)
            sizes[kind].append(Path(run[-2]).stat().st_size)
            if run[0] == "import":
                assert bncli.load(run[-2]).names == bncli.load(str(stats)).names
    assert bncli.load(str(tmp_path / "long.bn.h5")).names == (LONG, *(f"n{i}" for i in range(1, 3000)))
    for good, long in zip(peaks["good"], peaks["long"], strict=True):
        assert long <= 1.2 * good + ROOM_MB
    for small, large in zip(sizes["good"], sizes["long"], strict=True):
        assert large < small + 2 * len(LONG)


def test_names_of_usual_lengths_are_stored_as_ever(tmp_path: Path) -> None:
    """As texts that other programs read: in the stats file and in the .npz archive."""
    names = ("ä", "bb", "", "a name of words")
    bncli.fit(np.arange(8.0).reshape(2, 4), names=names).save(str(tmp_path / "x.bn.h5"))
    exchange.write(bncli.load(str(tmp_path / "x.bn.h5")), str(tmp_path / "x.npz"))
    with h5py.File(tmp_path / "x.bn.h5") as file:
        assert tuple(file["feature_names"].asstr()[...]) == names
    assert tuple(np.load(tmp_path / "x.npz")["name"]) == names


@pytest.mark.parametrize("kind", ["S", "U"])
@pytest.mark.parametrize("texts", [["a", "", "ä\0b"], ["", "\x85語" * 500_000, "b", *["c"] * 100]])
def test_texts_round_trip(kind: str, texts: list[str]) -> None:
    arrays = container.text_arrays("x", texts, kind)
    assert sum(array.nbytes for array in arrays.values()) <= 16 * sum(len(t.encode()) for t in texts) + (4 << 20)
    assert container.texts_of("x", arrays, len(texts)) == tuple(texts)
    with pytest.raises(ValueError, match=f"not {len(texts) + 1} texts"):
        container.texts_of("x", arrays, len(texts) + 1)
    assert container.texts_of("y", arrays, len(texts)) is None


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        (b"abc", [1, 2]),
        (b"abc", [1, 4]),
        (b"abc", [2, 1]),
        (b"abc", [-1, 3]),
        (b"abc", [1.0, 3.0]),
        (b"\xff\xff", [1, 2]),
    ],
)
def test_ends_of_texts_that_are_no_ends(values: bytes, ends: list[float]) -> None:
    arrays = {"x": np.frombuffer(values, np.uint8), "x_ends": np.array(ends)}
    with pytest.raises(ValueError, match=r"does not hold texts|not all there|can't decode"):
        container.texts_of("x", arrays, 2)


@pytest.mark.parametrize("code", [0xFFFFFFFF, 0x110000, 0xD800])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("field", ["name", "init"])
def test_letters_that_are_none(tmp_path: Path, code: int, order: str, field: str) -> None:
    shape = "(1,)" if field == "name" else "()"
    content = struct.pack(f"{order}I", code)
    archive(
        tmp_path / "x.npz", **{field: member(f"{{'descr':'{order}U1','fortran_order':False,'shape':{shape}}}", content)}
    )
    result = bn("import", tmp_path / "x.npz", "-o", tmp_path / "x.bn.h5")
    assert result.code == 3, result
    assert "x.npz" in result.err


def test_a_name_of_more_letters_than_the_csv_module_takes(tmp_path: Path) -> None:
    stats = bncli.fit(np.arange(8.0).reshape(4, 2), names=["a" * 200_000, "b"])
    exchange.write(stats, str(tmp_path / "x.csv"))
    assert exchange.read(str(tmp_path / "x.csv")).names == stats.names


@pytest.mark.parametrize("name", ["a\0", "\0", "\ud800"])
def test_names_that_no_file_keeps(tmp_path: Path, name: str) -> None:
    """A NUL at the end is what texts of one length are padded with."""
    with pytest.raises(MismatchError, match="name of feature 1"):
        bncli.fit(np.arange(8.0).reshape(4, 2), names=["a", name])
    exchange.write(bncli.fit(np.arange(8.0).reshape(4, 2), names=["a", "b"]), str(tmp_path / "x.json"))
    record = json.loads((tmp_path / "x.json").read_text())
    record["features"][1]["name"] = name
    del record["sha256"]
    (tmp_path / "x.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"x\.json"):
        exchange.read(str(tmp_path / "x.json"))


def test_a_nul_within_a_name_is_kept(tmp_path: Path) -> None:
    stats = bncli.fit(np.arange(8.0).reshape(4, 2), names=["a\0b", "c"])
    for suffix in (".json", ".npz", ".csv", ".bn.h5"):
        path = str(tmp_path / f"x{suffix}")
        if suffix == ".bn.h5":
            stats.save(path)
            assert bncli.load(path).names == ("a\0b", "c")
        else:
            exchange.write(stats, path)
            assert exchange.read(path).names == ("a\0b", "c")


def test_the_message_is_not_in_the_words_of_python(tmp_path: Path) -> None:
    """What Python says of a value of another kind, or of thousands of digits, helps nobody who has only the file."""
    path = tmp_path / "x.json"
    for changes in ({"features": None}, {"sources": None}, {"sources": [None]}, {"features": [None]}, {"eps": None}):
        changed_json(path, **changes)
        check_plain(path)
    path.write_text("null")
    check_plain(path)
    exchange.write(features(1), str(path))
    digits = path.read_text().replace('"num_batches": ', '"num_batches": ' + "9" * 5000)
    path.write_text(digits)
    check_plain(path)
    table = tmp_path / "x.csv"
    table.write_text("running_mean,running_var,num_batches\n0,1," + "9" * 5000 + "\n")
    check_plain(table)


def check_plain(path: Path) -> None:
    result = bn("import", path, "-o", path.with_suffix(".bn.h5"))
    assert result.code == 3
    assert not [w for w in ("NoneType", "int_max_str_digits", "object", "attribute", "subscript") if w in result.err]
