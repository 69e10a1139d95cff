"""The names under which frameworks keep a layer's numbers: one table for every format that holds named arrays.

>>> pair({"gamma", "beta", "moving_mean", "moving_variance"})
('moving_mean', 'moving_variance')
>>> groups(["bn.weight", "bn._mean", "net/bn2/gamma:0"])
{'bn.': {'weight': 'bn.weight', '_mean': 'bn._mean'}, 'net/bn2/': {'gamma': 'net/bn2/gamma:0'}}
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from itertools import chain, product

MEAN, VAR = "running_mean", "running_var"  # what nn.BatchNorm, and bn, call them
TRACKED = "num_batches_tracked"
# before "mean" and before "var" and the like; where a layer holds several pairs the first is taken
STEMS = (
    "running_",  # PyTorch, burn, MLX, tinygrad
    "moving_",  # TensorFlow, Keras, MindSpore, MXNet
    "_",  # Paddle, rsl_rl
    "avg_",  # Chainer
    "rolling_",  # Darknet
    "",  # Flax, ONNX, and what people write by hand
)
VARIANCES = ("var", "variance")
DEVIATIONS = ("std", "stddev", "sd")  # which are squared
PAIRS = (
    *((f"{stem}mean", stem + spread) for stem, spread in product(STEMS, (*VARIANCES, *DEVIATIONS))),
    ("mean_", "var_"),  # scikit-learn
    ("mean_", "scale_"),  # which is sqrt(var_), or 1 for a constant
)
PLAIN = {"mean", "mean_"}  # a layer's, or those of any data
# the first that is there; scale and shift are also what bn writes besides gamma and beta, of y = scale * x + shift
AFFINE = {"gamma": ("weight", "gamma", "scale"), "beta": ("bias", "beta", "offset", "shift")}
KNOWN = {TRACKED, *chain.from_iterable((*PAIRS, *AFFINE.values()))}
# two names for one thing, so that the choice is ambiguous
RIVALS = (("weight", "gamma"), ("weight", "scale"), ("bias", "beta"), ("bias", "offset"), ("bias", "shift"))
STATE, PARAMETERS = "batch_stats", "params"  # Flax keeps the statistics apart from scale and bias


def groups(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Keys by what stands before their last dot or slash, that included, and there by their last part."""
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        cut = max(key.rfind("."), key.rfind("/")) + 1
        prefix, last = key[:cut], key[cut:]
        if len(prefix) != 1:  # a key that starts with its only dot belongs to no layer
            found.setdefault(prefix, {})[last.removesuffix(":0")] = key  # TensorFlow numbers the outputs of a variable
    return found


def pair(names: Collection[str]) -> tuple[str, str] | None:
    """The names of the mean and of the variance or deviation, where both are there."""
    return next((pair for pair in PAIRS if pair[0] in names and pair[1] in names), None)


def is_deviation(name: str) -> bool:
    """Whether a name of PAIRS is of a standard deviation."""
    return name.endswith((*DEVIATIONS, "scale_"))


def affine(prefix: str, all_groups: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Keys of gamma and beta, as far as they are there, for the statistics under a prefix."""
    places = [all_groups.get(place, {}) for place in (prefix, parameters(prefix))]
    found: dict[str, str] = {}
    for column, names in AFFINE.items():
        keys = [place[name] for place in places for name in names if name in place]
        found |= {column: keys[0]} if keys else {}
    return found


def parameters(prefix: str) -> str:
    """Where gamma and beta are when the statistics are under this prefix: in Flax in another tree, else there."""
    return re.sub(rf"(^|[./]){STATE}(?=[./])", rf"\1{PARAMETERS}", prefix)
