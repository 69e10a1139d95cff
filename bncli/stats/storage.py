"""What a stats file holds and under which names (docs/stats-file.md): Stats to named arrays and attributes, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from bncli.numerics.arrays import Array
from bncli.numerics.moments import Moments, Running
from bncli.stats import container
from bncli.stats.learned import Learned
from bncli.stats.portion import FINGERPRINT, Portion

if TYPE_CHECKING:
    from bncli.stats.record import Stats

FORMAT = "bncli-stats"
FORMAT_VERSION = 2
READABLE = (1, 2)  # versions
SOURCES = "sources"
# thousands of inputs have records that resemble each other
COMPRESSED = [name + ends for name in (SOURCES, FINGERPRINT) for ends in ("", container.ENDS)]
# kept in the file under their own names, as they are
PLAIN_ATTRIBUTES = (
    "eps", "ddof", "init", "axis", "batch_size", "num_samples", "num_batches", "num_left_out", "sample_shape", "kernel",
)  # fmt: skip


def packed(stats: Stats) -> bytes:
    """The stats file of these statistics."""
    arrays: dict[str, Array] = {
        "running_mean": stats.running_mean,
        "running_var": stats.running_var,
        "gamma": stats.gamma,
        "beta": stats.beta,
        "population/count": stats.population_count,
        "population/mean": stats.population_mean,  # NaN where count is 0
        "population/m2": stats.population.m2,
        "population/min": stats.minimum,
        "population/max": stats.maximum,
    }
    if stats.names is not None:
        arrays |= container.text_arrays("feature_names", stats.names)
    if stats.running is not None:
        arrays |= {
            "state/k": np.broadcast_to(stats.running.k[0], stats.num_features).astype(np.int64),
            "state/a": stats.running.a,
            "state/a_low": stats.running.a_low,
            "state/first": stats.running.first,
            "state/population_mean_low": stats.population.mean_low,
            "state/population_m2_low": stats.population.m2_low,
        }
    if stats.start is not None:
        arrays["state/start"] = stats.start
    provenance = dict(stats.provenance)
    if sources := provenance.pop(SOURCES, []):
        arrays |= container.text_arrays(SOURCES, [json.dumps(source, sort_keys=True) for source in sources])
    attributes: dict[str, container.Value] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "momentum": math.nan if stats.momentum is None else stats.momentum,
        "options": json.dumps(stats.options, sort_keys=True),
        "provenance": json.dumps(provenance, sort_keys=True),
    }
    attributes |= {name: getattr(stats, name) for name in PLAIN_ATTRIBUTES}
    if stats.learned is not None:
        arrays |= stats.learned.arrays()
        attributes["learning"] = json.dumps(stats.learned.settings, sort_keys=True)
        attributes["holdout_loss_fixed"] = stats.learned.holdout_loss_fixed
    if stats.part is not None:
        own, attributes["part"] = stats.part.packed()
        arrays |= own | container.text_arrays(FINGERPRINT, [json.dumps(stats.part.fingerprint, sort_keys=True)])
    return container.pack(arrays, attributes, compressed=COMPRESSED)


def unpacked(arrays: dict[str, Array], attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of Stats, from what a file of any version holds.

    Raises
    ------
    LookupError, TypeError, ValueError
        When something is missing, or not what it should be.
    """
    count, mean, m2 = (arrays[f"population/{name}"] for name in ("count", "mean", "m2"))
    has_state, seen = "state/k" in arrays, count > 0
    low = [arrays[f"state/population_{n}_low"] if has_state else np.zeros(len(count)) for n in ("mean", "m2")]
    population = Moments.without_extremes(count.astype(np.float64), np.where(seen, mean, 0.0), low[0], m2, low[1])
    if attributes["format_version"] > 1:
        population.minimum = np.where(seen, arrays["population/min"], np.inf)
        population.maximum = np.where(seen, arrays["population/max"], -np.inf)
    state = {name: arrays[f"state/{name}"] for name in ("a", "a_low", "first")} if has_state else {}
    momentum, provenance = attributes["momentum"], json.loads(attributes["provenance"])
    if SOURCES in arrays:
        provenance[SOURCES] = list(map(json.loads, _texts(SOURCES, arrays)))
    return {
        **{name: arrays[name] for name in ("running_mean", "running_var", "gamma", "beta")},
        **{name: attributes[name] for name in PLAIN_ATTRIBUTES},
        "population": population,
        "running": Running(k=arrays["state/k"].astype(np.float64)[None], **state) if has_state else None,
        "momentum": None if math.isnan(momentum) else momentum,
        "names": container.texts_of("feature_names", arrays, len(count)),
        "options": json.loads(attributes["options"]),
        "provenance": provenance,
        "learned": Learned.from_parts(arrays, dict(attributes)),
        "start": arrays.get("state/start"),
        "part": _portion(arrays, attributes["part"]) if "part" in attributes else None,
    }


def _portion(arrays: dict[str, Array], plain: str) -> Portion:
    own = {name: array for name, array in arrays.items() if name != FINGERPRINT}
    return Portion.unpacked(own, plain, json.loads(_texts(FINGERPRINT, arrays)[0]))


def _texts(name: str, arrays: Mapping[str, Array]) -> tuple[str, ...]:
    """The texts of `container.text_arrays`, of which there are as many as the arrays say."""
    return container.texts_of(name, arrays, len(arrays.get(name + container.ENDS, arrays[name]))) or ()
