"""JSON with the schema of `bn inspect --json`, whose floats round-trip exactly, and its checksum."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from bncli.exchange import fields
from bncli.exchange.common import KINDS, conventions, damaged
from bncli.exchange.contract import Content, Encoded, ExportOptions, Layer, Layers
from bncli.stats.columns import read_back
from bncli.stats.record import Stats
from bncli.stats.storage import FORMAT, FORMAT_VERSION, READABLE

CHECKSUM = "sha256"
KEYS = {"format", "version", *KINDS, "num_features", "num_parameters", "sources", "features", "learning", "part"}


def encode(stats: Stats, options: ExportOptions) -> Encoded:
    """Write the record that `bn inspect --json` prints, and its SHA-256."""
    record = stats.as_dict()
    made = json.dumps(record | {CHECKSUM: _checksum(record)}, allow_nan=False).encode()
    return Encoded(made, conventions(stats), fields.use_notes(options.use))


def decode(content: Content) -> Layers:
    """Read what `write`, `bn inspect --json` or `bn fit --json` wrote.

    Raises
    ------
    InputError
        When the file is missing, no such JSON, of a newer version, or holds only some of the features.
    """
    errors = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
    with content.reading("JSON of 'bn inspect --json'", *errors):
        record = json.loads(content.data, object_pairs_hook=_once, parse_constant=float)
        digest, record = record.get(CHECKSUM), {key: value for key, value in record.items() if key != CHECKSUM}
        features = _features(record)
        if digest is not None and digest != _checksum(record):
            raise damaged(content.name)
        columns = {name: [_number(feature[name]) for feature in features] for name in read_back(record["version"])}
        held = {name: record[name] for name in KINDS}
        names = [feature["name"] for feature in features]
        sources = [
            {**source, "name": str(source["name"]), "dataset": source.get("dataset")} for source in record["sources"]
        ]
        json.dumps(sources, allow_nan=False)  # elsewhere a NaN or an infinity has no meaning
    given = None if all(name is None for name in names) else names
    return Layers.single(Layer(columns, held, given, sources))


def _checksum(record: Any) -> str:
    """SHA-256 of everything in the record, independent of the order of keys and of white space."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _features(record: Any) -> list[Any]:
    """The list of features, checked to be all of them and in their order."""
    if unknown := sorted(set(record) - KEYS):  # it may be the checksum's
        raise ValueError(f"bn knows no key {unknown[0]!r} in it")
    if record["format"] != FORMAT or record["version"] not in READABLE or isinstance(record["version"], bool):
        raise ValueError(
            f"its format is {record['format']!r} {record['version']!r}, not {FORMAT!r} 1 or {FORMAT_VERSION}"
        )
    if "part" in record:
        raise ValueError("it is of a part of a fit; merge the parts' stats files, and export the result")
    features, claimed = record["features"], record["num_features"]
    if claimed != len(features):  # before a list of as many is made
        raise ValueError(f"it holds {len(features)} features, but declares {str(claimed)[:20]}")
    if [feature["index"] for feature in features] != list(range(len(features))):
        raise ValueError(f"its features are not 0 to {len(features) - 1}, all of them and in order")
    return list(features)


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"{value} is no number")
    return math.nan if value is None else value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("it holds the same key twice")
    return dict(pairs)
