"""Means, paired ratios with bootstrap intervals, and the printed table of the quality benchmark.

A *scene* here is the record of one: {"rows": {method: {figure: value}}, "endpoint_error": …}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

Row = dict[str, float]

_WIDTH: Final = 180
"""Characters that the widest table takes."""


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
    """Ratio of two methods' means over scenes, its paired bootstrap interval, extreme scenes.

    Scenes without either are left out; NaN if none is left.
    """
    pairs = _pairs(scenes, key, above, below)
    sums = _drawn(pairs).sum(axis=1)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], (0.025, 0.975))
    total, each = pairs.sum(axis=0), pairs[:, 0] / pairs[:, 1]
    return {
        "ratio": float(total[0] / total[1]),
        "low": float(low),
        "high": float(high),
        "least_scene": float(each.min()),
        "worst_scene": float(each.max()),
        "scenes": len(pairs),
    }


def difference(
    scenes: Sequence[dict[str, Any]], key: str, above: str, below: str
) -> tuple[float, float, float]:
    """Mean difference of two methods over scenes, and its paired bootstrap interval."""
    pairs = _pairs(scenes, key, above, below)
    return _interval(pairs[:, 0] - pairs[:, 1])


def _interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Their mean, and the 95 % bootstrap interval of it."""
    low, high = np.quantile(_drawn(values).mean(axis=1), (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def _pairs(
    scenes: Sequence[dict[str, Any]], key: str, above: str, below: str
) -> NDArray[np.float64]:
    """What both methods have, by scene; one row of NaN if there is no scene."""
    rows = [s["rows"] for s in scenes if above in s["rows"] and below in s["rows"]]
    pairs = np.array([[r[above][key], r[below][key]] for r in rows], float).reshape(-1, 2)
    known = pairs[~np.isnan(pairs).any(axis=1)]
    return known if len(known) else np.full((1, 2), np.nan)


def _drawn(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """5000 times as many, drawn from them."""
    chosen = np.random.default_rng(0).integers(len(values), size=(5000, len(values)))
    return values[chosen]


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
        scenes: with rows of `per_frame`, `official`, `default` and `perfect`, and their `inversion`
            in dB.
        inversion: `first_scene` where it was compared with plain steps.

    Returns:
        Rows of `what`, `value`, the ends of its interval `low` and `high`, `bound` and whether it
        `holds`, None where there is nothing to judge; of sharpness also what the `perfect` edit
        has, which may be plain where per-frame editing is not.
    """
    colour = [s for s in scenes if s["kind"] == "color"]
    local = [s for s in scenes if s["kind"] in ("color", "texture")]
    against = ratio(scenes, "warp_all", "default", "official")
    found = [
        _at_most("warp error, default / official", _of(against), 1.05),
        _at_most("the same, worst scene", (against["worst_scene"],), 1.2),
    ]
    if colour:
        ground, whole = (
            ratio(colour, key, "default", "per_frame") for key in ("warp_ground", "warp_all")
        )
        found += [
            _at_most("colour edits: warp error of ground, / per frame", _of(ground), 0.35),
            _at_most("colour edits: warp error, / per frame", _of(whole), 0.6),
        ]
    sharp, ideal = (ratio(scenes, "gradient", m, "per_frame") for m in ("default", "perfect"))
    found.append(
        _at_least("gradient energy in the mask, / per frame", _of(sharp), 0.9)
        | {"perfect": ideal["ratio"]}
    )
    for kind, name in (("color", "colour"), ("texture", "texture")):
        if of_kind := [s["rows"]["default"]["success"] for s in scenes if s["kind"] == kind]:
            share = _interval(np.array(of_kind, float))
            found.append(_at_least(f"success of {name} edits", share, 0.95))
    if local:
        gain = difference(local, "background", "default", "per_frame")
        found.append(_at_least("background PSNR, default - per frame, dB", gain, 1.0))
    own = np.array([s["inversion"]["mean"] for s in scenes], float)
    found.append(_at_least("inversion 25 x 1, dB", _interval(own), 45.0))
    if inversion.get("first_scene"):
        fixed, plain_steps = (row["mean"] for row in inversion["first_scene"].values())
        found.append(_at_least("the same, less 500 plain steps'", (fixed - plain_steps,), 0))
    return found


def _of(found: Mapping[str, float]) -> tuple[float, ...]:
    return found["ratio"], found["low"], found["high"]


def _at_most(what: str, values: Sequence[float], bound: float) -> dict[str, Any]:
    return _judged(what, values, f"<= {bound:g}", holds=values[0] <= bound)


def _at_least(what: str, values: Sequence[float], bound: float) -> dict[str, Any]:
    return _judged(what, values, f">= {bound:g}", holds=values[0] >= bound)


def _judged(what: str, values: Sequence[float], bound: str, *, holds: bool) -> dict[str, Any]:
    """Value, and its interval if it has one; what is not known does not hold or fail to."""
    named = dict(zip(("value", "low", "high"), values, strict=False))
    return {"what": what, **named, "bound": bound, "holds": None if np.isnan(values[0]) else holds}


_VERDICTS: Final = {True: "yes", False: "NO", None: ""}


def print_bounds(found: Sequence[Mapping[str, Any]]) -> None:
    """One row per bound."""
    shown = Table("must hold", "bound", "measured", "95 %, by scenes", "", "the perfect edit")
    for row in found:
        shown.add_row(
            row["what"],
            row["bound"],
            _shown(row["value"]),
            f"{_shown(row['low'])} to {_shown(row['high'])}" if "low" in row else "",
            _VERDICTS[row["holds"]],
            _shown(row["perfect"]) if "perfect" in row else "",
        )
    _print(shown)


def _shown(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"


def _print(table: Table) -> None:
    """At least wide enough for all columns: a pipe or a file has no width of its own."""
    console = Console()
    Console(width=max(console.width, _WIDTH) if not console.is_terminal else None).print(table)


def endpoint_means(scenes: Sequence[dict[str, Any]], method: str) -> dict[str, Row]:
    """Of a method over the scenes that have it, by step and site."""
    found = [s["endpoint_error"][method] for s in scenes if method in s["endpoint_error"]]
    return {
        step: {site: mean([at[step][site] for at in found]) for site in sites}
        for step, sites in found[0].items()
    }


def print_endpoints(name: str, table: Mapping[str, Row]) -> None:
    """How far the correspondences lie from the exact flow: one row per site, one column a step."""
    shown = Table(f"{name}: end-point error in tokens", *table)
    for site in next(iter(table.values())):
        shown.add_row(site, *(_shown(row[site]) for row in table.values()))
    _print(shown)


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
            *(_shown(row[k] * (1e3 if k.startswith("gradient") else 1)) for k in columns),
        )
    _print(shown)
