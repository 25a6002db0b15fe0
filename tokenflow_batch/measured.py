"""What this work folder has measured: seconds a row, memory, compressed sizes, bytes a pixel.

Read from the newest finished folders of each stage, without torch. What a plan says of time rests
on these numbers; where there are none it says "unknown".
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenflow_batch.arrays import ArraySpec
from tokenflow_batch.files import digest_json
from tokenflow_batch.footprint import Peak, host_bytes
from tokenflow_batch.keys import STORED
from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.paths import Workspace
from tokenflow_batch.stage_names import STAGES, StageName

NEWEST = 3
"""Folders that are read of each stage."""

RateKey = tuple[StageName, str, int]
"""Stage, digest of the part of the model that it uses, latent pixels of a frame."""


@dataclass
class Measured:
    """Rates and ratios.

    Attributes:
        seconds: per UNet row (invert, match, edit; partial ones by their FLOPs) or per frame
            (encode, render, report).
        ratio: array name → compressed over plain bytes.
        pixel: stage → bytes of video per latent pixel and frame.
        sheet: bytes of a contact sheet; None where none was made.
        peaks: digest of a model's part → stage → memory of its runs.
        device_bytes: memory of the device; None where it was never seen.
    """

    seconds: dict[RateKey, float] = field(default_factory=dict)
    ratio: dict[str, float] = field(default_factory=dict)
    pixel: dict[StageName, float] = field(default_factory=dict)
    sheet: float | None = None
    peaks: dict[str, dict[StageName, list[Peak]]] = field(default_factory=dict)
    device_bytes: int | None = None

    @classmethod
    def of(cls, workspace: Workspace, device: str = "auto") -> Measured:
        """Read what there is, a calibration's results too; damaged records are left out.

        Args:
            workspace: where to look.
            device: `cpu` or `cuda` to leave the other one's memory out; `auto` takes a GPU's.
        """
        found = cls._read(workspace)
        for name in ("usual", "small"):
            extra = cls._read(Workspace(workspace.output, workspace.calibration / name))
            if name == "usual":  # small batches take longer a row
                found.seconds = {**extra.seconds, **found.seconds}
            for model, stages in extra.peaks.items():
                for stage, peaks in stages.items():
                    found.peaks.setdefault(model, {}).setdefault(stage, []).extend(peaks)
        found._keep_device(device)
        return found

    def _keep_device(self, device: str) -> None:
        every = [p for stages in self.peaks.values() for of in stages.values() for p in of]
        there = {p.device: p.device_bytes for p in every}
        if device == "auto":
            device = "cuda" if "cuda" in there else "cpu"
        self.device_bytes = host_bytes() if device == "cpu" else there.get(device)
        for stages in self.peaks.values():
            for stage, peaks in stages.items():
                stages[stage] = [p for p in peaks if p.device == device]

    @classmethod
    def _read(cls, workspace: Workspace) -> Measured:
        sums: defaultdict[RateKey, _Sum] = defaultdict(_Sum)
        arrays: defaultdict[str, _Sum] = defaultdict(_Sum)
        pixels: defaultdict[StageName, _Sum] = defaultdict(_Sum)
        sheets: defaultdict[str, _Sum] = defaultdict(_Sum)
        used: dict[str, dict[StageName, list[Peak]]] = {}
        for stage in STAGES:
            for folder in _newest(workspace, stage):
                source = _origin(workspace, stage, folder)
                if source is None:
                    continue
                model, area = source
                specs = _specs(folder)
                with suppress(KeyError, TypeError):
                    peak = Peak(**_read(_mark(folder))["facts"]["memory"])
                    used.setdefault(model, {}).setdefault(stage, []).append(peak)
                for facts, files in _records(folder):
                    if not facts.get("handed"):
                        work = facts.get("work", facts.get("rows", facts.get("frames", 0)))
                        sums[stage, model, area].add(facts.get("seconds", 0.0), work)
                    for name, size in files.items():
                        _array(arrays, specs, name, size)
                    if stage in ("render", "report") and "frames" in facts:
                        videos = (size for name, size in files.items() if name.endswith(".mp4"))
                        pixels[stage].add(sum(videos), facts["frames"] * area)
                    for name, size in files.items():
                        if name.endswith(".png"):
                            sheets["sheet"].add(size, 1)
        return cls(
            _ratios(sums), _ratios(arrays), _ratios(pixels), _ratios(sheets).get("sheet"), used
        )


@dataclass
class _Sum:
    top: float = 0.0
    bottom: float = 0.0

    def add(self, top: float, bottom: float) -> None:
        self.top, self.bottom = self.top + top, self.bottom + bottom


def _ratios(sums: Mapping[Any, _Sum]) -> dict[Any, float]:
    return {key: s.top / s.bottom for key, s in sums.items() if s.top > 0 and s.bottom > 0}


def _newest(workspace: Workspace, stage: StageName) -> list[Path]:
    root = workspace.work / stage
    found = [p for p in root.iterdir() if p.is_dir()] if root.is_dir() else []
    done = [(mark.stat().st_mtime_ns, p) for p in found if (mark := _mark(p)).is_file()]
    return [p for _, p in sorted(done, reverse=True)[:NEWEST]]


def _mark(folder: Path) -> Path:
    return folder / "commits" / "complete.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _records(folder: Path) -> Iterator[tuple[Mapping[str, Any], Mapping[str, int]]]:
    """Facts and file sizes of every unit; the files of dropped ones count too."""
    for path in (folder / "commits").glob("[!.]*.json"):
        raw = _read(path)
        files = {name: int(size) for name, (size, _) in raw.get("files", {}).items()}
        yield raw.get("facts", {}), files


def _specs(folder: Path) -> dict[str, ArraySpec]:
    arrays = _read(folder / "commits" / "layout.json").get("facts", {}).get("arrays", {})
    return {name: ArraySpec.from_json(raw) for name, raw in arrays.items()}


def _array(
    sums: defaultdict[str, _Sum], specs: Mapping[str, ArraySpec], file: str, size: int
) -> None:
    """Count a shard of a compressed array whose block is whole."""
    parts = file.split("/")
    spec = specs.get(parts[1]) if len(parts) > 2 else None
    if spec is None or not spec.compress or parts[-1] == "zarr.json":
        return
    block = int(parts[3 + len(spec.lead)])
    frames = min(spec.block_frames, spec.frames - block * spec.block_frames)
    plain = ArraySpec(spec.unit, (), frames, spec.block_frames, spec.tail, spec.dtype)
    overhead = plain.stored_bytes() - frames * spec.frame_bytes
    sums[parts[1]].add(max(size - overhead, 0), frames * spec.frame_bytes)


def _origin(workspace: Workspace, stage: StageName, folder: Path) -> tuple[str, int] | None:
    """The digest of the model's part that computed a folder, and its latent pixels a frame."""
    key = _read(folder / "key.json")
    try:
        if stage == "encode":
            return key["vae"], _area(folder)
        if stage == "invert":
            return key["model"], _area(folder)
        if stage == "match":
            return _origin(workspace, "invert", workspace.stage("invert", key["invert"]))
        if stage == "edit":
            inverted = _inverted(workspace, key["match"])
            return _origin(workspace, "invert", workspace.stage("invert", inverted))
        if stage == "render":
            return _origin(workspace, "encode", workspace.stage("encode", key["encode"]))
        return _origin(workspace, "render", workspace.stage("render", key["render"]))
    except (KeyError, OSError):
        return None


def _area(folder: Path) -> int:
    return math.prod(_specs(folder)["latents"].tail[1:])


def _inverted(workspace: Workspace, matched: str) -> str:
    """The key of the inversion behind what an edit's key calls its `match` (see `keys`)."""
    for folder in (workspace.work / "match").iterdir():
        key = _read(folder / "key.json")
        told = {k: v for k, v in key.items() if k not in ("stage", *STORED)}
        if digest_json(told)[:24] == matched:
            return str(key["invert"])
    raise KeyError(matched)


def stored_bytes(folder: StageFolder) -> int:
    """Bytes of everything that a stage folder keeps, by its records."""
    records = (folder.record(unit) for unit in folder.units())
    kept = (r for r in records if r is not None and not r.dropped)
    return sum(size for r in kept for size, _ in r.files.values())
