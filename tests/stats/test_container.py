"""Named arrays and attributes as one HDF5 image: what goes in comes out, and damage is noticed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bncli.errors import InputError
from bncli.stats import container

Arrays = dict[str, npt.NDArray[Any]]
SAMPLE: Arrays = {
    "mean": np.array([1.5, -0.0, np.nan, np.inf, 5e-324]),
    "deep/er/count": np.array([1, -(2**63), 2**63 - 1], np.int64),
    "names": np.array(["ä".encode(), b"", b"long name"]),
    "one": np.array([0.1]),
}
PLAIN: dict[str, container.Value] = {
    "format": "x", "number": 7, "tiny": 5e-324, "nan": float("nan"), "shape": (3, 224, 224), "none": (), "text": "ä\n",
}  # fmt: skip


def check_same(
    found: tuple[Arrays, dict[str, container.Value]], arrays: Arrays, attributes: dict[str, container.Value]
) -> None:
    assert set(found[0]) == set(arrays)
    for name, array in arrays.items():
        assert found[0][name].dtype == array.dtype
        assert found[0][name].shape == array.shape
        assert found[0][name].tobytes() == array.tobytes()
    assert {k: repr(v) for k, v in found[1].items()} == {k: repr(v) for k, v in attributes.items()}


def test_round_trip() -> None:
    check_same(container.unpack(container.pack(SAMPLE, PLAIN), "s"), SAMPLE, PLAIN)


@given(
    st.dictionaries(st.sampled_from(["a", "b/c", "b/d"]), st.lists(st.floats(), min_size=1, max_size=9)),
    st.dictionaries(
        st.sampled_from(["p", "q", "r"]),
        st.one_of(
            st.integers(-(2**63), 2**63 - 1),
            st.floats(),
            st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1),
            st.lists(st.integers(0, 2**40), max_size=5).map(tuple),
        ),
    ),
)
def test_round_trip_of_anything(lists: dict[str, list[float]], attributes: dict[str, container.Value]) -> None:
    arrays = {name: np.array(values, float) for name, values in lists.items()}
    check_same(container.unpack(container.pack(arrays, attributes), "s"), arrays, attributes)


def test_same_content_same_bytes() -> None:
    assert container.pack(SAMPLE, PLAIN) == container.pack(SAMPLE, PLAIN)


def test_any_hdf5_tool_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    path.write_bytes(container.pack(SAMPLE, PLAIN))
    with h5py.File(path) as file:
        assert file["deep/er/count"][:].tolist() == SAMPLE["deep/er/count"].tolist()
        assert [n.decode() for n in file["names"][:]] == ["ä", "", "long name"]
        assert file.attrs["text"] == "ä\n"
        assert file.attrs["digest"] == container.digest(SAMPLE, PLAIN)


@pytest.mark.parametrize(
    "change",
    [
        lambda a, p: a.update(mean=a["mean"][::-1].copy()),
        lambda a, p: a.update(mean=np.array([1.5, 0.0, np.nan, np.inf, 5e-324])),
        lambda a, p: a.update(mean=a["mean"].reshape(5, 1)),
        lambda a, p: a.update(mean=a["mean"].view(np.int64)),
        lambda a, p: a.update(moan=a.pop("mean")),
        lambda a, p: a.pop("one"),
        lambda a, p: p.update(number=8),
        lambda a, p: p.update(number=7.0),
        lambda a, p: p.update(shape=(224, 3, 224)),
        lambda a, p: p.update(extra="x"),
        lambda a, p: p.pop("none"),
    ],
)
def test_digest_sees_every_change(change: Any) -> None:
    arrays, attributes = dict(SAMPLE), dict(PLAIN)
    change(arrays, attributes)
    assert container.digest(arrays, attributes) != container.digest(SAMPLE, PLAIN)


def test_digest_does_not_see_order_or_byte_order() -> None:
    arrays = {name: SAMPLE[name] for name in reversed(SAMPLE)}
    arrays["mean"] = arrays["mean"].astype(">f8")
    assert container.digest(arrays, dict(reversed(PLAIN.items()))) == container.digest(SAMPLE, PLAIN)


def unsealed(content: bytes) -> bytes:
    """A stats file as another HDF5 tool would write it: without bn's own line behind it."""
    image, seal, _ = content.rpartition(container.SEAL)
    assert seal
    return image


def test_every_cut_is_refused() -> None:
    image = container.pack({"a": np.arange(3.0)}, {"n": 1})
    whole = len(unsealed(image))
    for end in (*range(0, whole, 7), whole - 1, whole + len(container.SEAL), len(image) - 1):
        with pytest.raises(InputError):
            container.unpack(image[:end], "s")
    for end in range(whole, whole + len(container.SEAL)):  # nothing is missing but the seal
        assert container.unpack(image[:end], "s")[1] == {"n": 1}


def test_the_seal_is_checked_before_hdf5_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """HDF5 loops for ever over some damaged bytes of its global heap, so it must not see them."""
    image = bytearray(container.pack({"a": np.arange(3.0)}, {"text": "words"}))
    image[image.index(b"GCOL") + 8] ^= 0x10

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("HDF5 was asked")

    monkeypatch.setattr(h5py.h5f, "open_file_image", never)
    with pytest.raises(InputError, match="s: damaged: its bytes do not match their checksum"):
        container.unpack(bytes(image), "s")


def test_flipped_bytes_of_what_is_kept_are_refused() -> None:
    """Names, attributes and their values."""
    arrays, attributes = {"mean": np.array([1.0, 2.0])}, {"eps": 1e-5, "axis": -1, "init": "debias"}
    image = unsealed(container.pack(arrays, attributes))
    for kept in (
        b"debias",
        np.float64(1e-5).tobytes(),
        np.int64(-1).tobytes(),
        container.digest(arrays, attributes).encode(),
    ):
        start = image.rindex(kept)
        for at in range(start, start + len(kept)):
            damaged = bytearray(image)
            damaged[at] ^= 0x04
            with pytest.raises(InputError):
                container.unpack(bytes(damaged), "s")


def test_names_that_are_not_utf8_are_refused() -> None:
    image = unsealed(container.pack({"mean": np.array([1.0, 2.0]), "n/k": np.zeros(1)}, {}))
    with pytest.raises(InputError, match="damaged"):
        container.unpack(image.replace(b"mean", b"m\x9aan"), "s")


@pytest.mark.parametrize("name", ["mean", "n/k"])
def test_every_flipped_bit_of_a_number_is_refused(name: str) -> None:
    arrays = {"mean": np.array([1.0, 2.0]), "n/k": np.array([7_203_912_345_678])}
    image = unsealed(container.pack(arrays, {}))
    start = image.index(arrays[name].tobytes())
    for bit in range(8 * arrays[name].nbytes):
        damaged = bytearray(image)
        damaged[start + bit // 8] ^= 1 << bit % 8
        with pytest.raises(InputError, match="s: damaged: its content does not match its digest"):
            container.unpack(bytes(damaged), "s")


def image_of(tmp_path: Path, build: Any) -> bytes:
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        build(file)
    return path.read_bytes()


@pytest.mark.parametrize(
    "build",
    [
        lambda f: None,
        lambda f: f.create_dataset("x", data=np.zeros((5, 3))),
        lambda f: f.create_dataset("x", data=np.zeros((5, 3)), chunks=(1, 3), compression="gzip"),
        lambda f: f.attrs.update(range=np.array([0.5, np.inf])),
        lambda f: f.attrs.update(empty=h5py.Empty("f4"), many=["a", "b"]),
    ],
)
def test_other_hdf5_files_are_told_apart(tmp_path: Path, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    image = image_of(tmp_path, build)
    with pytest.raises(InputError, match=r"s: an HDF5 file, but not a stats file .*bn fit"):
        container.unpack(image, "s")
    container.check_file(str(tmp_path / "other.h5"))  # small: read whole, and refused as above
    monkeypatch.setattr(container, "LARGE", 0)
    with pytest.raises(InputError, match="not a stats file"):
        container.check_file(str(tmp_path / "other.h5"))


def test_other_files_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((5, 3)))
    words = "not a readable stats file: it is not an HDF5 file; make one with 'bn fit' or 'bn import'"
    with pytest.raises(InputError, match=f"s: {words}"):
        container.unpack(path.read_bytes(), "s")
    monkeypatch.setattr(container, "LARGE", 0)
    with pytest.raises(InputError, match=rf"x\.npy: {words}"):
        container.check_file(str(path))


@pytest.mark.parametrize(
    "build",
    [
        lambda f: f.attrs.update(range=np.array([0.5, np.inf])),
        lambda f: f.attrs.update(empty=h5py.Empty("f4")),
        lambda f: f.attrs.update(many=["a", "b"]),
        lambda f: f.attrs.update(digest=h5py.Empty("f4")),
        lambda f: f.attrs.update(reference=f.ref),
        lambda f: f.create_dataset("x", data=["a", "b"]),
        lambda f: f.create_dataset("x", data=np.zeros((5, 3)), chunks=(1, 3)),
        lambda f: f.create_dataset("x", (10**12, 64), "f8"),
        lambda f: f.create_dataset("x", (10**12, 64), "f8", chunks=(1, 64)),
        lambda f: f.create_dataset("x", (10**9,), "f8", chunks=(10**8,), compression="gzip"),
        lambda f: f.create_dataset("x", (10**8,), "f8", chunks=(10**8,), compression="gzip"),
        lambda f: f.create_dataset("x", data=np.zeros(10**8, "u1"), chunks=(10**8,), compression="gzip"),
        lambda f: f.create_dataset("x", data=np.zeros(9), chunks=(9,), compression="gzip", shuffle=True),
        lambda f: f.create_dataset("x", data=h5py.Empty("f8")),
        lambda f: f.create_dataset("x", data=np.zeros(3, [("a", "f4"), ("b", "O")][:1])),
        lambda f: f.__setitem__("x", h5py.ExternalLink("/etc/passwd", "/")),
        lambda f: f.__setitem__("x", h5py.SoftLink("/x")),
        lambda f: f.__setitem__("type", np.dtype("f8")),
        lambda f: f.__setitem__("g/loop", f["/"]),
    ],
)
def test_forged_files_are_refused(tmp_path: Path, build: Any) -> None:
    """Files that carry a digest: whatever else they hold, the answer is an InputError or nothing of it."""

    def forged(file: h5py.File) -> None:
        file.attrs["digest"] = "0" * 64
        build(file)

    with pytest.raises(InputError):
        container.unpack(image_of(tmp_path, forged), "s")


def test_compressed_arrays_are_read_back() -> None:
    arrays = {"long": np.array([b"the same words"] * 9999), "plain": np.arange(3.0)}
    image = container.pack(arrays, {}, compressed=("long", "not there"))
    assert len(image) < 20_000
    found, _ = container.unpack(image, "s")
    assert {name: array.tolist() for name, array in found.items()} == {n: a.tolist() for n, a in arrays.items()}


def test_names_are_escaped() -> None:
    with pytest.raises(InputError) as caught:
        container.unpack(b"", "s\x1b[31m")
    assert "s\\x1b[31m: not a readable stats file" in str(caught.value)


@pytest.mark.parametrize("sealed", [True, False])
def test_a_damaged_heap_does_not_hang(tmp_path: Path, sealed: bool) -> None:
    """In a child with a time limit: libhdf5 walks on the spot for ever where a size in its heap of texts is 0."""
    image = bytearray(container.pack({"a": np.arange(3.0)}, {"text": "words"}))
    if not sealed:
        image = bytearray(unsealed(bytes(image)))
    start = image.index(b"GCOL") + 16
    free = next(
        at
        for at in range(start, len(image), 8)
        if image[at : at + 8] == bytes(8) and image[at + 8 : at + 16] != bytes(8)
    )
    image[free + 8 : free + 16] = bytes(8)
    path = tmp_path / "s.bn.h5"
    path.write_bytes(bytes(image))
    code = "import sys; from bncli.cli import main; main(['inspect', sys.argv[1]])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 3
    assert "damaged" in done.stderr
