"""ONNX: a model of one BatchNormalization, and one such node of a whole model. All numbers are float32.

Operator: https://onnx.ai/onnx/operators/onnx__BatchNormalization.html; its momentum weighs the OLD value, as bn's does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from bncli.errors import InputError, MismatchError, UsageError, printable
from bncli.exchange.common import ROUNDED, below_float32, beyond_float32, checksum, notes, package
from bncli.exchange.contract import Content, Encoded, ExportOptions, Layer, Layers
from bncli.numerics.arrays import Array, Floats
from bncli.stats.record import Stats

OPSET = 15
IR_VERSION = 8  # of the release that brought opset 15: what older runtimes still read
OPERATOR = "BatchNormalization"
DOMAINS = ("", "ai.onnx")  # two names of ONNX's own
INPUTS = ("gamma", "beta", "running_mean", "running_var")  # after the data, in the operator's order
HIGHEST_RANK = 8
FOLDED = "torch.onnx.export folds such layers into those before them unless training=torch.onnx.TrainingMode.PRESERVE is given"
SIGN = "bncli sha256 "  # before the checksum, in the doc_string of the node and of each of its tensors


def encode(stats: Stats, options: ExportOptions) -> Encoded:
    """Write a model x -> y, float32, of `rank` dimensions (that of the fit, or 2), channels on axis 1.

    Raises
    ------
    UsageError
        For a rank outside 2 to 8.
    MismatchError
        When a number does not fit a float32, or inference in float32 gives none.
    """
    onnx = package("onnx", "onnx")
    rank = options.rank if options.rank is not None else len(stats.sample_shape) + 1 if stats.sample_shape else 2
    if not 2 <= rank <= HIGHEST_RANK:
        raise UsageError(f"--rank {rank} is outside 2 to {HIGHEST_RANK}: samples, channels and spatial axes")
    arrays = {name: _float32(getattr(stats, name), name) for name in INPUTS}
    _check_inference(stats)
    attributes = {"epsilon": _attribute(stats.eps, "eps")}
    if stats.momentum is not None:
        attributes["momentum"] = _attribute(stats.momentum, "momentum")
    model = _model(onnx, arrays, rank, attributes)
    settings = {"epsilon": None, "momentum": None} | attributes | {"rank": rank, "opset": OPSET}
    return Encoded(model.SerializeToString(deterministic=True), settings, _notes(stats, arrays, settings))


def decode(content: Content) -> Layers:
    """BatchNormalization nodes by their names, or by those of their outputs where they have none.

    Raises
    ------
    UsageError
        When onnx is missing.
    InputError
        When the file is damaged.
    """
    onnx = package("onnx", "onnx")
    from google.protobuf.message import DecodeError

    errors = (DecodeError, ValueError, TypeError, LookupError)
    with content.reading("ONNX model", *errors):
        model = onnx.ModelProto.FromString(content.data)
        if not model.opset_import:  # the last thing in a file; without it parsing still succeeds
            raise ValueError("it names no opset, so it was cut short")
        constants = dict(_constants(onnx, model.graph))
        found = [node for node in model.graph.node if _is_layer(node, constants)]
        nodes = _named(found)
        widths = {name: int(np.prod(constants[node.input[1]].dims)) for name, node in nodes.items()}
        if not all(isinstance(name, str) for name in nodes):  # protobuf gives bytes where they are no UTF-8
            raise ValueError("the name of a node is not text")
        also = {name: {node.name, node.output[0]} for name, node in nodes.items()}

    def read(name: str) -> Layer:
        node = nodes[name]
        with content.reading("ONNX model", *errors):
            tensors = [constants[key] for key in node.input[1:5]]
            columns = dict(zip(INPUTS, (_array(onnx, tensor, content.name) for tensor in tensors), strict=True))
            opset = min((o.version for o in model.opset_import if o.domain in DOMAINS), default=OPSET)
            _check_inference_form(node, opset, f"{content}: {printable(name)}")
            digest = _checksum([node.doc_string, *(tensor.doc_string for tensor in tensors)])
            return Layer(columns, _conventions(node), checksum=digest)

    return Layers(widths, read, also, f"no {OPERATOR} node whose numbers are in the file; {FOLDED}")


def _float32(values: Floats, name: str) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float32)
    bad = np.flatnonzero(np.isinf(rounded))
    if len(bad):
        raise MismatchError(
            f"{name} of feature {bad[0]} is {values[bad[0]]:g}, which does not fit the float32 of an ONNX model; "
            "scale the data first, or export to torch or keras, which take float64"
        )
    return rounded


def _check_inference(stats: Stats) -> None:
    """Raise MismatchError where numbers that fit float32 each do not give a result in it."""
    for where, what in (
        (
            np.maximum(stats.running_var, stats.eps) == 0,
            "a variance and an eps of 0, which bn scales by 1 and ONNX divides by",
        ),
        (below_float32(stats), "a variance + eps below 1.2e-38"),
        (beyond_float32(stats), "a scale or shift beyond 3.4e38"),
    ):
        if where.any():
            raise MismatchError(
                f"feature {np.flatnonzero(where)[0]} has {what}, and an ONNX model computes in float32, which gives infinity or "
                "NaN; give an eps, scale the data first, or export to torch or keras, which take float64"
            )


def _attribute(value: float, name: str) -> float:
    """The shortest decimal of a convention's float32; raises MismatchError where it has no meaning any more."""
    rounded = _shortest(value)
    if np.isinf(rounded) or (name == "momentum" and rounded >= 1):
        raise MismatchError(f"{name} {value!r} is {rounded} in the float32 of an ONNX model; export to torch or keras")
    return rounded


def _shortest(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


def _model(onnx: Any, arrays: dict[str, npt.NDArray[np.float32]], rank: int, attributes: dict[str, float]) -> Any:
    from bncli.version import __version__

    helper = onnx.helper
    shape = ["N", len(arrays["gamma"]), *(f"D{axis}" for axis in range(2, rank))]
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in "xy")
    node = helper.make_node(OPERATOR, ["x", *INPUTS], ["y"], name=OPERATOR, **attributes)
    initializers = [onnx.numpy_helper.from_array(values, name) for name, values in arrays.items()]
    for part in (node, *initializers):
        part.doc_string = SIGN + checksum(arrays, _conventions(node))
    return helper.make_model(
        helper.make_graph([node], "batch_normalization", [x], [y], initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="bncli",
        producer_version=__version__,
    )


def _notes(stats: Stats, arrays: dict[str, npt.NDArray[np.float32]], settings: dict[str, Any]) -> list[str]:
    """The layout, and what the rounding to float32 does to the result."""
    rank = settings["rank"]
    conventions = (("eps", stats.eps, settings["epsilon"]), ("momentum", stats.momentum, settings["momentum"]))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        moved = np.abs(stats.gamma * (arrays["running_mean"] - stats.running_mean)) / np.sqrt(
            stats.running_var + stats.eps
        )
    worst = int(np.nanargmax(moved)) if np.isfinite(moved).any() else 0
    layout = ", ".join(["N", "C", *(f"D{axis}" for axis in range(2, rank))])
    return [
        f"the model takes float32 of shape ({layout}), channels on axis 1",
        f"values are rounded to float32, {ROUNDED}; the rounded means move results by up to {moved[worst]:.1g} (feature {worst})",
        *(f"{name} {value!r} is rounded to {other!r}" for name, value, other in conventions if value != other),
        *notes(stats, "onnx", f"({layout})" if rank > 2 else ""),
    ]


def _constants(onnx: Any, graph: Any) -> Iterator[tuple[str, Any]]:
    """Tensors whose values are in the model, by name; Identity nodes, which exporters put before shared ones, pass them on."""
    known = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:  # in the order of computation
        values = [a.t for a in node.attribute if a.name == "value" and a.HasField("t")]
        floats = [a.floats for a in node.attribute if a.name == "value_floats"]
        if node.op_type == "Constant" and len(values + floats) == 1 and node.output:
            known[node.output[0]] = values[0] if values else onnx.numpy_helper.from_array(np.array(floats[0], "f4"))
        elif node.op_type == "Identity" and node.output and node.input and node.input[0] in known:
            known[node.output[0]] = known[node.input[0]]
    yield from known.items()


def _is_layer(node: Any, constants: dict[str, Any]) -> bool:
    return (
        node.op_type == OPERATOR
        and node.domain in DOMAINS
        and len(node.input) == 5
        and len(node.output) > 0
        and all(name in constants for name in node.input[1:])
    )


def _named(found: list[Any]) -> dict[str, Any]:
    """Nodes by name, or by output: an output has one node, but names may be empty, stand twice, or be another's output."""
    words = Counter(word for node in found for word in {node.name, node.output[0]})
    return {n.name if n.name and words[n.name] == 1 else n.output[0]: n for n in found}


def _check_inference_form(node: Any, opset: int, where: str) -> None:
    """Raise InputError for a node that normalizes with the batch, or with a mean per place, as older opsets have it."""
    given = {attribute.name: attribute.i for attribute in node.attribute}
    if given.get("training_mode") or any(node.output[1:]) or (opset < 7 and not given.get("is_test")):
        raise InputError(
            f"{where}: the node is in training mode: it normalizes with each batch, not with the numbers in the file. Export it "
            f"after model.eval(); {FOLDED}"
        )
    if given.get("spatial") == 0:
        raise InputError(
            f"{where}: the node has spatial 0: a mean and variance for every place, not for every channel; bn has no such layer"
        )


def _array(onnx: Any, tensor: Any, path: str) -> Array:
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise InputError(
            f"{printable(path)}: the values of {printable(tensor.name)} are in another file, which bn does not open; "
            "save the model in one file"
        )
    array: Array = onnx.numpy_helper.to_array(tensor)
    if array.shape != tuple(tensor.dims):  # a negative size is taken for "what is left"
        raise ValueError(f"{tensor.name} has the shape {tuple(tensor.dims)}")
    return array.astype(np.float32) if tensor.data_type == onnx.TensorProto.BFLOAT16 else array


def _checksum(texts: list[str]) -> str | None:
    """The checksum that every part bears, so that damage to one does not hide it; None where none bears any."""
    if not any(text.startswith(SIGN) for text in texts):
        return None
    return texts[0].removeprefix(SIGN) if len(set(texts)) == 1 else ""  # which matches nothing


def _conventions(node: Any) -> dict[str, Any]:
    """Eps and momentum, with the operator's own defaults: the shortest decimals that give the float32 in the file."""
    given = {attribute.name: attribute.f for attribute in node.attribute}
    eps, momentum = given.get("epsilon", 1e-5), given.get("momentum", 0.9)
    return {"axis": 1, "eps": _shortest(eps), "momentum": _shortest(momentum)}
