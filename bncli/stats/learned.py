"""What a fit that learned gamma and beta stores in addition: the head, the optimizer's moments and the losses."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from bncli.errors import MismatchError
from bncli.numerics.arrays import Array, Floats

LEARNED_ARRAYS = ("weight", "bias", "first", "second", "fixed", "train_loss", "holdout_loss", "accuracy")


@dataclass(frozen=True, eq=False)
class Learned:
    """Results of learning other than gamma and beta; kept under `affine/` in the file.

    Attributes
    ----------
    weight, bias : shape (K, C) and (K,)
        The linear head; K is 0 where there is none.
    first, second : shape (2·C + K·(C + 1),)
        Adam's moments of the gradients of gamma, beta, weight and bias, one after the other.
    fixed : shape (3, 2·C + K·(C + 1)) or (0, …)
        The same parameters and their moments as trained with gamma 1 and beta 0; none where there is no such comparison.
    train_loss, holdout_loss, accuracy : shape (E,)
        Of each epoch; NaN where there is none.
    holdout_loss_fixed : float
        At the end, with gamma 1, beta 0 and a head trained for as long; NaN without a hold-out.
    classes : shape (K,) or None
        The labels, ascending.
    settings : dict
        loss, activation, optimizer, lr (None: the default), steps, seed, holdout and target.
    """

    weight: Floats
    bias: Floats
    first: Floats
    second: Floats
    fixed: Floats
    train_loss: Floats
    holdout_loss: Floats
    accuracy: Floats
    holdout_loss_fixed: float
    classes: Array | None
    settings: dict[str, Any]

    def check(self, features: int) -> None:
        """Raise MismatchError when the parts do not belong to each other and to this many features."""
        missing = {"loss", "activation", "optimizer", "steps", "holdout"} - set(self.settings)
        if missing or self.train_loss.ndim != 1 or not self.train_loss.size:
            raise MismatchError("what was learned lacks its history or settings")
        outputs = len(self.bias)
        size = 2 * features + outputs * (features + 1)
        shapes = {"weight": (outputs, features), "first": (size,), "second": (size,), "classes": (outputs,)}
        shapes["fixed"] = (3 if len(self.fixed) else 0, size)
        shapes |= {"accuracy": self.train_loss.shape, "holdout_loss": self.train_loss.shape}
        for name, shape in shapes.items():
            part = getattr(self, name)
            if part is not None and part.shape != shape:
                raise MismatchError(f"what was learned holds {name} of shape {part.shape}, not {shape}")

    def as_dict(self) -> dict[str, Any]:
        """What `inspect --json` shows: the losses of each epoch, and the held-out loss with and without learning."""
        names = ("train_loss", "holdout_loss", "accuracy")
        epochs = zip(*([_plain(v) for v in getattr(self, name).tolist()] for name in names), strict=True)
        return {
            "epochs": [dict(zip(names, epoch, strict=True)) for epoch in epochs],
            "holdout_loss": _plain(float(self.holdout_loss[-1])) if self.holdout_loss.size else None,
            "holdout_loss_fixed": _plain(self.holdout_loss_fixed),
        }

    def arrays(self) -> dict[str, Array]:
        """For the stats file."""
        found = {f"affine/{name}": getattr(self, name) for name in LEARNED_ARRAYS}
        return found if self.classes is None else found | {"affine/classes": self.classes}

    @classmethod
    def from_parts(cls, arrays: dict[str, Array], attributes: dict[str, Any]) -> Learned | None:
        """What a stats file holds; None where nothing was learned."""
        if "learning" not in attributes:
            return None
        parts = {name: arrays[f"affine/{name}"] for name in LEARNED_ARRAYS}
        fixed, classes = float(attributes["holdout_loss_fixed"]), arrays.get("affine/classes")
        return cls(**parts, holdout_loss_fixed=fixed, classes=classes, settings=json.loads(attributes["learning"]))


def _plain(value: float) -> float | None:
    """A number for JSON, which has no NaN or infinity."""
    return value if math.isfinite(value) else None
