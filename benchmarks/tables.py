"""Means, paired ratios with bootstrap intervals, and the printed table of the quality benchmark.

A *scene* here is the record of one: {"rows": {method: {figure: value}}, "endpoint_error": …}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

Row = dict[str, float]


def means(scenes: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Row]:
    """Mean over scenes per method and figure; scenes without the figure are left out."""
    return {
        name: {
            key: mean([scene["rows"][name][key] for scene in scenes])
            for key in scenes[0]["rows"][name]
        }
        for name in names
    }


def mean(values: Sequence[float]) -> float:
    """Of the values that are known; NaN if none is."""
    known = [v for v in values if not np.isnan(v)]
    return float(np.mean(known)) if known else float("nan")


def ratio(scenes: Sequence[dict[str, Any]], key: str, above: str, below: str) -> dict[str, float]:
    """Ratio of two methods' means over scenes, its paired bootstrap interval, the worst scene."""
    pairs = np.array([[s["rows"][above][key], s["rows"][below][key]] for s in scenes])
    drawn = np.random.default_rng(0).integers(len(pairs), size=(5000, len(pairs)))
    sums = pairs[drawn].sum(axis=1)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], (0.025, 0.975))
    total = pairs.sum(axis=0)
    return {
        "ratio": float(total[0] / total[1]),
        "low": float(low),
        "high": float(high),
        "worst_scene": float((pairs[:, 0] / pairs[:, 1]).max()),
    }


def ratios(scenes: Sequence[dict[str, Any]], methods: Sequence[str]) -> dict[str, Any]:
    """Every method's warp error and sharpness against per-frame PnP's and the published mode's."""
    return {
        f"{key}: {above} / {below}": ratio(scenes, key, above, below)
        for below in ("per_frame", "official")
        if below in methods
        for above in methods
        if above != below
        for key in ("warp_all", "warp_object", "warp_ground", "gradient")
    }


def endpoint_means(scenes: Sequence[dict[str, Any]]) -> dict[str, Row]:
    """Over scenes, by step and site."""
    steps = scenes[0]["endpoint_error"]
    return {
        step: {site: mean([s["endpoint_error"][step][site] for s in scenes]) for site in sites}
        for step, sites in steps.items()
    }


def plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def print_table(table: Mapping[str, Row]) -> None:
    """One row per method."""
    shown = Table("method")
    columns = [key for key in next(iter(table.values())) if not key.startswith("read_")]
    for key in columns:
        shown.add_column(key, justify="right")
    for name, row in table.items():
        shown.add_row(name, *(f"{row[key]:.3f}" for key in columns))
    Console().print(shown)
