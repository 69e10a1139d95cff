"""PyTorch's own layers, trained and asked, for tests of what is carried there and back."""

from __future__ import annotations

import os
from typing import Any

from helpers import Array


def module(torch: Any, x: Array, eps: float) -> Any:
    kinds = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}
    return kinds[x.ndim](x.shape[1], eps=eps, dtype={"f4": torch.float32, "f8": torch.float64}[x.dtype.str[1:]])


def inference(torch: Any, layer: Any, x: Array) -> Array:
    with torch.no_grad():
        result: Array = layer.eval()(torch.from_numpy(x)).numpy()
    return result


def trained(torch: Any, model: Any, x: Array) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in torch.from_numpy(x).split(16):
        optimizer.zero_grad()
        model(batch).square().sub(2).square().mean().backward()
        optimizer.step()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)
