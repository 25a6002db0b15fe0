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
    """Mean over scenes per method and figure; scenes without it are left out, `scenes` counts."""
    table = {}
    for name in names:
        rows = [scene["rows"][name] for scene in scenes if name in scene["rows"]]
        if rows:
            table[name] = {key: mean([row[key] for row in rows]) for key in rows[0]}
            table[name]["scenes"] = float(len(rows))
    return table


def mean(values: Sequence[float]) -> float:
    """Of the values that are known; NaN if none is."""
    known = [v for v in values if not np.isnan(v)]
    return float(np.mean(known)) if known else float("nan")


def ratio(scenes: Sequence[dict[str, Any]], key: str, above: str, below: str) -> dict[str, float]:
    """Ratio of two methods' means over scenes, its paired bootstrap interval, extreme scenes."""
    pairs = np.array(
        [
            [s["rows"][above][key], s["rows"][below][key]]
            for s in scenes
            if above in s["rows"] and below in s["rows"]
        ]
    )
    drawn = np.random.default_rng(0).integers(len(pairs), size=(5000, len(pairs)))
    sums = pairs[drawn].sum(axis=1)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], (0.025, 0.975))
    total = pairs.sum(axis=0)
    return {
        "ratio": float(total[0] / total[1]),
        "low": float(low),
        "high": float(high),
        "least_scene": float((pairs[:, 0] / pairs[:, 1]).min()),
        "worst_scene": float((pairs[:, 0] / pairs[:, 1]).max()),
        "scenes": len(pairs),
    }


def ratios(scenes: Sequence[dict[str, Any]], methods: Sequence[str]) -> dict[str, Any]:
    """Warp error and sharpness of every method against per-frame PnP, published mode, default."""
    return {
        f"{key}: {above} / {below}": ratio(scenes, key, above, below)
        for below in ("per_frame", "official", "default")
        if below in methods
        for above in methods
        if above != below and any(above in s["rows"] for s in scenes)
        for key in ("warp_all", "warp_object", "warp_ground", "gradient")
    }


def bounds(scenes: Sequence[dict[str, Any]], inversion: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the default method must reach, each with its figure and whether it holds.

    Args:
        scenes: with rows of `per_frame`, `official`, `default` and `perfect`.
        inversion: `mean` in dB, and `first_scene` where it was compared with plain steps.

    Returns:
        Rows of `what`, `value`, `bound` and whether it `holds`; of sharpness also what the
        `perfect` edit has, which may be plain where per-frame editing is not.
    """
    colour = [s for s in scenes if s["kind"] == "color"]
    local = [s for s in scenes if s["kind"] in ("color", "texture")]
    against = ratio(scenes, "warp_all", "default", "official")
    found = [
        _at_most("warp error, default / official", against["ratio"], 1.05),
        _at_most("the same, worst scene", against["worst_scene"], 1.2),
    ]
    if colour:
        ground, whole = (
            ratio(colour, key, "default", "per_frame") for key in ("warp_ground", "warp_all")
        )
        found += [
            _at_most("colour edits: warp error of ground, / per frame", ground["ratio"], 0.35),
            _at_most("colour edits: warp error, / per frame", whole["ratio"], 0.6),
        ]
    sharp, ideal = (ratio(scenes, "gradient", m, "per_frame") for m in ("default", "perfect"))
    found.append(
        _at_least("gradient energy in the mask, / per frame", sharp["ratio"], 0.9)
        | {"perfect": ideal["ratio"]}
    )
    if local:
        both = means(local, ("default", "per_frame"))
        gain = both["default"]["background"] - both["per_frame"]["background"]
        found += [
            _at_least("success of colour and texture edits", both["default"]["success"], 0.95),
            _at_least("background PSNR, default - per frame, dB", gain, 1.0),
        ]
    found.append(_at_least("inversion 25 x 1, dB", inversion["mean"], 45.0))
    if inversion.get("first_scene"):
        fixed, plain_steps = (row["mean"] for row in inversion["first_scene"].values())
        found.append(_at_least("the same, less 500 plain steps'", fixed - plain_steps, 0))
    return found


def _at_most(what: str, value: float, bound: float) -> dict[str, Any]:
    return {"what": what, "value": value, "bound": f"<= {bound:g}", "holds": value <= bound}


def _at_least(what: str, value: float, bound: float) -> dict[str, Any]:
    return {"what": what, "value": value, "bound": f">= {bound:g}", "holds": value >= bound}


def print_bounds(found: Sequence[Mapping[str, Any]]) -> None:
    """One row per bound."""
    shown = Table("must hold", "bound", "measured", "", "the perfect edit")
    for row in found:
        shown.add_row(
            row["what"],
            row["bound"],
            f"{row['value']:.3f}",
            "yes" if row["holds"] else "NO",
            f"{row['perfect']:.3f}" if "perfect" in row else "",
        )
    Console().print(shown)


def endpoint_means(scenes: Sequence[dict[str, Any]]) -> dict[str, Row]:
    """Over scenes, by step and site."""
    steps = scenes[0]["endpoint_error"]
    return {
        step: {site: mean([s["endpoint_error"][step][site] for s in scenes]) for site in sites}
        for step, sites in steps.items()
    }


def print_endpoints(table: Mapping[str, Row]) -> None:
    """How far the correspondences lie from the exact flow: one row per site, one column a step."""
    shown = Table("end-point error in tokens", *table)
    for site in next(iter(table.values())):
        shown.add_row(site, *(f"{row[site]:.2f}" for row in table.values()))
    Console().print(shown)


def plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def print_table(table: Mapping[str, Row]) -> None:
    """One row per method; gradient energies × 10³, as warp errors are."""
    shown = Table("method")
    columns = [key for key in next(iter(table.values())) if not key.startswith("read_")]
    for key in columns:
        shown.add_column(key, justify="right")
    for name, row in table.items():
        shown.add_row(
            name,
            *(f"{row[k] * (1e3 if k.startswith('gradient') else 1):.3f}" for k in columns),
        )
    Console().print(shown)
