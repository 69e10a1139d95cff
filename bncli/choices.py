"""The names that options choose from, each list once, and defaults; without NumPy, so that help starts fast."""

from __future__ import annotations

from typing import Literal, get_args

Init = Literal["debias", "zeros", "unit", "first", "like"]
PresetName = Literal["torch", "keras", "flax", "onnx", "cs231n"]
Nan = Literal["error", "omit"]
Use = Literal["running", "population"]
FloatType = Literal["float16", "float32", "float64"]
Activation = Literal["identity", "sigmoid", "tanh", "relu"]  # in the order of `_learning.c`
Loss = Literal["mse", "cross-entropy"]  # in the order of `_learning.c`
Optimizer = Literal["adam", "sgd"]

INITS: tuple[Init, ...] = get_args(Init)
PRESET_NAMES: tuple[PresetName, ...] = get_args(PresetName)
NANS: tuple[Nan, ...] = get_args(Nan)
USES: tuple[Use, ...] = get_args(Use)
FLOAT_TYPES: tuple[FloatType, ...] = get_args(FloatType)
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
LOSSES: tuple[Loss, ...] = get_args(Loss)
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)

DEFAULT_MEMORY = 128 << 20  # bytes of buffers
