"""Files of a checkpoint that was saved in several, as Hugging Face's libraries write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import check_refused, untouched
from helpers import Array, peer

from bncli import exchange
from bncli.errors import InputError

ONE = np.linspace(1, 2, 4).astype("f4")
FIRST, SECOND = "model-00001-of-00002", "model-00002-of-00002"


def save(path: Path, keys: str) -> None:
    arrays: dict[str, Array] = dict.fromkeys(keys.split(), ONE)
    if path.suffix == ".safetensors":
        peer("safetensors.numpy").save_file(arrays, path)
    else:
        torch = peer("torch")
        torch.save({key: torch.from_numpy(a) for key, a in arrays.items()}, path)


def index(folder: Path, suffix: str, shards: dict[str, str], **changes: Any) -> None:
    """`model.safetensors.index.json` of these shards."""
    weight_map = {key: f"{shard}{suffix}" for shard, keys in shards.items() for key in keys.split()}
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map} | changes
    (folder / f"model{suffix}.index.json").write_text(json.dumps(content))


@pytest.fixture(params=[".safetensors", ".bin"])
def suffix(request: pytest.FixtureRequest) -> str:
    peer("safetensors")
    found: str = request.param
    return found


def read(path: Path, **options: Any) -> Any:
    return exchange.read(str(path), "torch" if path.suffix == ".bin" else None, **options)


@pytest.mark.peer
@pytest.mark.parametrize("scale", ["weight bias", "gamma beta"])
def test_gamma_and_beta_in_another_shard(tmp_path: Path, suffix: str, scale: str) -> None:
    weight, bias = (f"bn.{name}" for name in scale.split())
    shards = {FIRST: "bn.running_mean bn.running_var fc.weight", SECOND: f"{weight} {bias} fc.bias"}
    for shard, keys in shards.items():
        save(tmp_path / f"{shard}{suffix}", keys)
    with pytest.raises(
        InputError, match=r"holds only a part of layer 'bn': none of bn\.weight, .* is in it; it is one of"
    ):
        read(tmp_path / f"{FIRST}{suffix}")
    with pytest.raises(
        InputError, match=r"no running_mean and running_var; it is one of several files of a checkpoint"
    ):
        read(tmp_path / f"{SECOND}{suffix}")
    index(tmp_path, suffix, shards)
    found = rf"{weight} is in {SECOND}\{suffix}, {bias} is in {SECOND}\{suffix}; it is one of several"
    for name in (FIRST, "renamed"):
        (tmp_path / f"{name}{suffix}").write_bytes((tmp_path / f"{FIRST}{suffix}").read_bytes())
        with pytest.raises(InputError, match=found):
            read(tmp_path / f"{name}{suffix}")


@pytest.mark.peer
def test_one_statistic_in_another_shard(tmp_path: Path, suffix: str) -> None:
    shards = {
        FIRST: "bn.weight bn.bias bn.running_mean",
        SECOND: "bn.running_var a.running_mean a.running_var a.weight a.bias",
    }
    for shard, keys in shards.items():
        save(tmp_path / f"{shard}{suffix}", keys)
    with pytest.raises(InputError, match=r"'bn': none of bn\.running_var, bn\.running_variance, .* is in it"):
        read(tmp_path / f"{FIRST}{suffix}")
    index(tmp_path, suffix, shards)
    with pytest.raises(InputError, match=rf"'bn': bn\.running_var is in {SECOND}"):
        read(tmp_path / f"{FIRST}{suffix}")
    with pytest.raises(InputError, match=rf"'bn': bn\.running_mean is in {FIRST}"):
        read(tmp_path / f"{SECOND}{suffix}", layer="bn")
    assert read(tmp_path / f"{SECOND}{suffix}", layer="a").gamma.tolist() == ONE.tolist()


@pytest.mark.peer
def test_layers_that_are_whole_are_read(tmp_path: Path, suffix: str) -> None:
    """One with all its numbers, and one of which the index says that nobody has a gamma and beta."""
    shards = {FIRST: "a.running_mean a.running_var a.weight a.bias", SECOND: "b.running_mean b.running_var"}
    for shard, keys in shards.items():
        save(tmp_path / f"{shard}{suffix}", keys)
    assert read(tmp_path / f"{FIRST}{suffix}").gamma.tolist() == ONE.tolist()
    index(tmp_path, suffix, shards)
    assert read(tmp_path / f"{FIRST}{suffix}").gamma.tolist() == ONE.tolist()
    assert read(tmp_path / f"{SECOND}{suffix}").gamma.tolist() == [1.0] * 4
    save(tmp_path / f"model-00001-of-00001{suffix}", "b.running_mean b.running_var")
    assert read(tmp_path / f"model-00001-of-00001{suffix}").gamma.tolist() == [1.0] * 4


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}', '{"weight_map": {"bn.weight": 3}}', "[" * 99_999],
)  # fmt: skip
def test_an_index_that_is_none_says_nothing(tmp_path: Path, content: str) -> None:
    np.savez(tmp_path / "x.npz", **{"bn.running_mean": ONE, "bn.running_var": ONE})
    (tmp_path / "model.index.json").write_text(content)
    (tmp_path / "folder.index.json").mkdir()
    assert exchange.read(str(tmp_path / "x.npz")).num_features == 4


def test_a_file_of_an_index_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, with what would reach a terminal escaped."""
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", **{"bn.running_mean": ONE, "bn.running_var": ONE})
    Path("m.index.json").write_text(json.dumps({"weight_map": {"bn.weight": "/dev/zero", "bn.bias": "../\x1b[31m"}}))
    with untouched(tmp_path):
        check_refused(
            3, ["import", "x.npz", "-o", "s.bn.h5"], "bn.weight is in /dev/zero", r"bn.bias is in ../\x1b[31m"
        )


def test_half_a_layer_of_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00002.npz"
    np.savez(path, **{"bn.running_mean": np.ones(3), "bn.weight": np.ones(3)})
    with pytest.raises(InputError, match=r"holds only a part of layer 'bn': none of bn\.running_var"):
        exchange.read(str(path))
