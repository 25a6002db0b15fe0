"""What `seams.py` knows of one video at its joins, and the ratios and verdicts that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

Figures = dict[str, float]

REGIONS = ("object", "ground")
KEYS = ("error", "tone", "excess", "tone_object", "tone_ground", "texture_object", "texture_ground")


@dataclass(frozen=True)
class Joined:
    """A video as the measures see it.

    Attributes:
        looks: mean L*, a*, b* and texture of object and ground in every frame, (F, 2, 4); NaN
            where a region is hidden.
        truth: the same of the perfect edit.
        errors: warp error × 10³ from each frame to the next, (F - 1,).
    """

    looks: NDArray[np.float64]
    truth: NDArray[np.float64]
    errors: NDArray[np.float64]

    def at(self, join: int, gap: int, reach: int) -> Figures:
        """Figures at one join.

        Args:
            join: first frame behind it.
            gap: frames over which tone and texture are compared; pairs on both sides count.
            reach: frames before and behind the join whose warp error counts.
        """
        first = np.arange(max(0, join - gap), min(join, len(self.looks) - gap))
        delta = self.looks[first + gap] - self.looks[first]
        beyond = delta - (self.truth[first + gap] - self.truth[first])
        tone, excess = (_tone(change) for change in (delta, beyond))
        texture = _mean(np.abs(delta[..., 3]))
        return {
            "error": float(_mean(self.errors[max(0, join - reach) : join + reach])),
            "tone": float(_mean(tone)),
            "excess": float(_mean(excess)),
            **{f"tone_{name}": float(v) for name, v in zip(REGIONS, tone, strict=True)},
            **{f"texture_{name}": float(v) for name, v in zip(REGIONS, texture, strict=True)},
        }

    def drift(self, first: int, last: int) -> Figures:
        """Change (ΔE) of mean look from the first so many frames to the last so many."""
        delta = _mean(self.looks[-last:]) - _mean(self.looks[:first])
        values = np.linalg.norm(delta[:, :3], axis=1)
        return {name: float(v) for name, v in zip(REGIONS, values, strict=True)}


def _tone(delta_N24: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean ΔE over pairs of frames, (2,): object and ground."""
    return _mean(np.linalg.norm(delta_N24[..., :3], axis=-1))


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the first axis, of what is known; NaN where nothing is."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0).sum(axis=0)
    return np.divide(total, known.sum(axis=0), out=np.full_like(total, np.nan), where=known.any(0))


def ratio(above: Sequence[float], below: Sequence[float]) -> Figures:
    """Ratio of sums of paired known values, and its 95 % bootstrap interval over the pairs."""
    pairs = np.array([above, below]).T
    pairs = pairs[~np.isnan(pairs).any(axis=1)]
    drawn = np.random.default_rng(0).integers(len(pairs), size=(5000, len(pairs)))
    sums = pairs[drawn].sum(axis=1)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], (0.025, 0.975))
    whole = pairs.sum(axis=0)
    return {"ratio": float(whole[0] / whole[1]), "low": float(low), "high": float(high)}


def compare(scenes: Sequence[Mapping[str, Any]], way: str, other: str, where: str) -> Any:
    """Every figure of one way of cutting against another's, at the same joins of all scenes.

    Args:
        scenes: as `seams.measure` returns them.
        way: above.
        other: below.
        where: "joins", the windows', or "pieces", between the independent ones.
    """

    def values(name: str, key: str) -> list[float]:
        return [at[key] for scene in scenes for at in scene["ways"][name][where]]

    return {key: ratio(values(way, key), values(other, key)) for key in KEYS}


def drift(scenes: Sequence[Mapping[str, Any]], way: str, other: str) -> dict[str, Figures]:
    """Drift of object and ground against another way's, over scenes."""
    return {
        name: ratio(*([s["ways"][w]["drift"][name] for s in scenes] for w in (way, other)))
        for name in REGIONS
    }


def judge(scenes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Ratios of every way to one window, and which bounds hold."""
    ways = [name for name in scenes[0]["ways"] if name != "one window"]
    against = {way: compare(scenes, way, "one window", "joins") for way in ways}
    drifts = {way: drift(scenes, way, "one window") for way in ways}
    apart = compare(scenes, "pieces", "windows", "pieces")
    own = against["windows"]
    found = [
        _row("error across joins, upper end", own["error"]["high"], "<=", 1.03),
        _row("tone jump across joins, upper end", own["tone"]["high"], "<=", 1.15),
        _row("drift of the object", drifts["windows"]["object"]["ratio"], "<=", 1.2),
        _row("drift of the ground", drifts["windows"]["ground"]["ratio"], "<=", 1.2),
        _row("tone jump of pieces / windows", apart["tone"]["ratio"], ">=", 1.3),
        _row("hue step's tone jump, lower end", against["hue step"]["tone"]["low"], ">=", 1.15),
    ]
    return {
        "joins": sum(len(s["ways"]["windows"]["joins"]) for s in scenes),
        "against_one_window": against,
        "drift": drifts,
        "pieces_against_windows": apart,
        "bounds": found,
    }


def _row(what: str, value: float, sign: str, bound: float) -> dict[str, Any]:
    holds = value <= bound if sign == "<=" else value >= bound
    return {"what": what, "value": value, "bound": f"{sign} {bound:g}", "holds": bool(holds)}


def print_joins(found: Mapping[str, Any]) -> None:
    """Ratios to one window, a row a way; then the bounds."""
    console = Console(width=150)
    shown = Table("against one window", *KEYS, "drift object", "drift ground")
    for way, row in found["against_one_window"].items():
        cells = [*(row[key] for key in KEYS), *found["drift"][way].values()]
        shown.add_row(way, *(f"{c['ratio']:.3f}\n{c['low']:.2f}-{c['high']:.2f}" for c in cells))
    console.print(shown)
    bounds = Table("must hold", "bound", "measured", "")
    for row in found["bounds"]:
        bounds.add_row(
            row["what"], row["bound"], f"{row['value']:.3f}", "yes" if row["holds"] else "NO"
        )
    console.print(bounds)
