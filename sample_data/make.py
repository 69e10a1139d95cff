"""Make the sample data again: ``python sample_data/make.py [FOLDER]``.

Needs numpy, h5py, scikit-learn (both data sets ship with it, nothing is fetched) and Pillow (to
decode the photographs). Writes into FOLDER, by default the folder of this script. README.md
beside it says what each file is, who made it and under which licence.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_sample_image

SEED = 0
CANCER_TRAIN = 455  # of 569 rows; the other 114 are held out
PICTURES = ("china.jpg", "flower.jpg")
TILE = 32  # pixels, both ways
TILES_TRAIN, TILES_HELDOUT = 200, 40

CANCER_SOURCE = (
    "Breast Cancer Wisconsin (Diagnostic), W. H. Wolberg, W. N. Street, O. L. Mangasarian, 1995, "
    "UCI Machine Learning Repository, https://doi.org/10.24432/C5DW2B; the copy in scikit-learn, "
    "455 of its 569 rows in shuffled order"
)
CANCER_LICENCE = "CC BY 4.0 (UCI); distributed with scikit-learn under BSD-3-Clause"
IMAGES_SOURCE = (
    "china.jpg by danielbuechele, https://www.flickr.com/photos/danielbuechele/6061409035/; "
    "flower.jpg by vultilion (so its link; scikit-learn's note names danielbuechele), "
    "https://www.flickr.com/photos/vultilion/6056698931/; the copies in scikit-learn, "
    "changed: cut into tiles of 32 x 32 pixels, a part of them kept, in shuffled order"
)
IMAGES_LICENCE = "CC BY 2.0, https://creativecommons.org/licenses/by/2.0/"


def shuffled(count: int) -> NDArray[np.int64]:
    """Return 0 … count - 1 in seeded random order, of shape (count,)."""
    # RandomState, not default_rng: numpy promises that only the former's stream never changes.
    return np.random.RandomState(SEED).permutation(count).astype(np.int64)


def tiles(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Cut a picture of shape (H, W, 3) into whole tiles of shape (N, 3, TILE, TILE), row by row."""
    rows, columns = picture.shape[0] // TILE, picture.shape[1] // TILE
    whole = picture[: rows * TILE, : columns * TILE]
    grid = whole.reshape(rows, TILE, columns, TILE, 3)
    return grid.transpose(0, 2, 4, 1, 3).reshape(-1, 3, TILE, TILE)  # (N, 3, TILE, TILE)


def add_dataset(file: h5py.File, name: str, values: NDArray[np.generic], chunk: int, **names: Sequence[str]) -> None:
    """Write one compressed dataset, `chunk` samples a chunk, with lists of names (UTF-8)."""
    dataset = file.create_dataset(
        name,
        data=values,
        chunks=(chunk, *values.shape[1:]),
        compression="gzip",
        shuffle=True,
        track_times=False,  # no clock in the file: the same bytes every time
    )
    for key, value in names.items():
        dataset.attrs.create(key, list(value), dtype=h5py.string_dtype("utf-8"))


def write_cancer(folder: Path) -> None:
    """Write the breast-cancer table: 455 rows for training, 114 held out, 30 features."""
    table = load_breast_cancer()
    order = shuffled(len(table.data))
    x, y = table.data[order].astype(np.float64), table.target[order].astype(np.int64)
    with h5py.File(folder / "cancer_train.h5", "w") as file:
        file.attrs["source"], file.attrs["licence"] = CANCER_SOURCE, CANCER_LICENCE
        add_dataset(file, "x", x[:CANCER_TRAIN], 128, feature_names=[str(n) for n in table.feature_names])
        add_dataset(file, "y", y[:CANCER_TRAIN], 128, class_names=[str(n) for n in table.target_names])
    np.save(folder / "cancer_heldout.npy", x[CANCER_TRAIN:])
    np.save(folder / "cancer_heldout_labels.npy", y[CANCER_TRAIN:])


def write_images(folder: Path) -> None:
    """Write tiles of two photographs, channel first: 200 for training, 40 others held out."""
    cut = np.concatenate([tiles(load_sample_image(name)) for name in PICTURES])  # (N, 3, TILE, TILE)
    drawn = cut[shuffled(len(cut))[: TILES_TRAIN + TILES_HELDOUT]]
    with h5py.File(folder / "images.h5", "w") as file:
        file.attrs["source"], file.attrs["licence"] = IMAGES_SOURCE, IMAGES_LICENCE
        add_dataset(file, "images", drawn[:TILES_TRAIN], 64, feature_names=["red", "green", "blue"])
    np.save(folder / "images_heldout.npy", drawn[TILES_TRAIN:])


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    target.mkdir(parents=True, exist_ok=True)
    write_cancer(target)
    write_images(target)
