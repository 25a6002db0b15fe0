"""A stage's arrays: a zarr v3 group whose shards are units of work.

Every array is cut along its leading axes into blocks; a block is one shard, one file, written once
by one writer and committed as (part of) one unit. Inside a shard, inner chunks of a few frames
carry a CRC-32C each. Reads go through the ledger: the unit is compared with its record first.

`block` below is a tuple of leading shard coordinates, such as (step, chunk).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from tokenflow_batch.ahead import ROOM
from tokenflow_batch.arrays import ArraySpec
from tokenflow_batch.clock import measured, waiting
from tokenflow_batch.ledger import StageFolder

LAYOUT = "layout"
Block = tuple[int, ...]
Array = NDArray[Any]


def lay_out(stage: StageFolder, specs: Mapping[str, ArraySpec]) -> None:
    """Make the group and its empty arrays, and commit them."""
    root = stage.files / "data.zarr"
    for stale in root.rglob("zarr.json"):
        stale.unlink()  # left by a killed process, or damaged; the shards keep their worth
    group = zarr.create_group(root, zarr_format=3)
    for name, spec in specs.items():
        codec = ZstdCodec(level=1, checksum=True) if spec.compress else Crc32cCodec()
        group.create_array(
            name,
            shape=spec.shape,
            shards=spec.shard,
            chunks=spec.inner,
            dtype=spec.dtype,
            compressors=[codec],
            filters=None,
            fill_value=0,
        )
    facts = {"arrays": {name: asdict(spec) for name, spec in specs.items()}}
    stage.commit(LAYOUT, root.rglob("zarr.json"), facts)


def unit_name(kind: str, block: Block) -> str:
    """The ledger's name of a unit."""
    return "-".join([kind, *(f"{i:05d}" for i in block)])


class Reads:
    """What was read at one place of the work, for others that come to the same place.

    It holds what one step of one window reads of the source: as much as the window is long, however
    long the clip.

    Attributes:
        largest: the most bytes that it has held.
        saved: bytes that were not read again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # reads run ahead in threads
        self._place: Hashable = None
        self._held: dict[Hashable, Array] = {}
        self._bytes = self.largest = self.saved = 0

    def at(self, place: Hashable) -> None:
        """From now on the work is there; what was read for another place goes."""
        with self._lock:
            if place != self._place:
                self._place, self._bytes = place, 0
                self._held.clear()

    def get(self, what: Hashable, read: Callable[[], Array]) -> Array:
        """What `read` gives, read once at a place; nobody may change it."""
        with self._lock:
            found = self._held.get(what)
            if found is not None:
                self.saved += found.nbytes
                return found
        data = read()
        with self._lock:
            if what not in self._held:
                self._held[what] = data
                self._bytes += data.nbytes
                self.largest = max(self.largest, self._bytes)
        return data


class ArrayStore:
    """The arrays of one stage folder: made by `create` (the stage itself) or `open` (readers)."""

    def __init__(self, stage: StageFolder, specs: Mapping[str, ArraySpec]) -> None:
        self.stage, self.specs = stage, dict(specs)
        self._root = stage.files / "data.zarr"
        self._fresh: dict[tuple[str, Block], Array] = {}
        self._last: Block = ()
        stage.check(LAYOUT)
        # A runtime setting of zarr, taken when an array is opened; without it a block of zeros
        # would never become a file.
        with zarr.config.set({"array.write_empty_chunks": True}):
            self._arrays = {
                name: zarr.open_array(self._root / name, mode="r+", zarr_format=3)
                for name in self.specs
            }

    @classmethod
    def create(cls, stage: StageFolder, specs: Mapping[str, ArraySpec]) -> ArrayStore:
        """Open the arrays for writing, laying them out first if that has not been committed."""
        if not stage.committed(LAYOUT):
            lay_out(stage, specs)
        return cls(stage, specs)

    @classmethod
    def open(cls, stage: StageFolder) -> ArrayStore:
        """Open the arrays as they were laid out.

        Raises:
            DamagedUnit: the layout is not what was committed.
        """
        record = stage.check(LAYOUT)
        return cls(stage, {n: ArraySpec.from_json(v) for n, v in record.facts["arrays"].items()})

    def write(
        self,
        block: Block,
        values: Mapping[str, Array],
        facts: Mapping[str, Any] | None = None,
        *,
        timed: bool = True,
    ) -> None:
        """Write one unit behind the caller: its block in each given array, then the commit record.

        Args:
            block: shard coordinates, the same in every array.
            values: array name → data of the block's frames, (frames, *tail); left alone from now
                on, as they are written while the next unit is computed.
            facts: for the record, to which the seconds since the unit before are added
                (`clock.Lap`); those of writing this one are among its own `store`.
            timed: not so where they belong to another stage's work.
        """
        kinds = {self.specs[name].unit for name in values}
        if len(kinds) != 1:
            raise ValueError(f"arrays of one unit belong together, got {sorted(values)}")
        unit = unit_name(kinds.pop(), block)
        told = {**(facts or {}), **(self.stage.lap.take() if timed else {})}
        kept = {n: v.astype(self.specs[n].dtype, copy=False) for n, v in values.items()}
        self._keep(block, kept)
        size = sum(data.nbytes for data in kept.values())
        self.stage.commit_behind(unit, lambda: self._write(unit, block, kept, told), size)

    def _keep(self, block: Block, values: Mapping[str, Array]) -> None:
        """Have what was written last in memory, with what was before it as far as it is little."""
        for name, data in values.items():
            self._fresh.pop((name, block), None)  # its place is the last
            self._fresh[name, block] = data
        self._last, much = block, sum(data.nbytes for data in self._fresh.values()) - ROOM
        for what, data in list(self._fresh.items()):
            if much > 0 and not self._needed(*what):
                del self._fresh[what]
                much -= data.nbytes

    def _needed(self, name: str, block: Block) -> bool:
        """Whether a unit is the last, or nowhere else yet."""
        unit = unit_name(self.specs[name].unit, block)
        return block == self._last or self.stage.coming(unit)

    def _held(self, name: str, block: Block) -> Array | None:
        """A unit's data while they are in memory and nobody has removed the unit."""
        unit = unit_name(self.specs[name].unit, block)
        known = self._needed(name, block) or self.stage.trusted(unit)
        return self._fresh.get((name, block)) if known else None

    def _write(
        self, unit: str, block: Block, values: Mapping[str, Array], facts: Mapping[str, Any]
    ) -> None:
        began, files = time.perf_counter(), []
        for name, data in values.items():
            file = self._file(name, block)
            file.unlink(missing_ok=True)  # zarr would merge what a killed process left
            self._arrays[name][self._where(name, block)] = data
            files.append(file)

        def told() -> dict[str, Any]:  # once all but the record is written
            took = facts.get("store", 0.0) + time.perf_counter() - began
            return {**facts, "store": round(took, 6)}

        self.stage.commit(unit, files, told)

    def shared(self, reads: Reads | None, name: str, block: Block, frames: Sequence[int]) -> Array:
        """`read`, once for all that share `reads`; to be left as it is."""
        if reads is None:
            return self.read(name, block, frames)
        what = (self.stage.stage, self.stage.key, name, block, tuple(frames))
        return reads.get(what, lambda: self.read(name, block, frames))

    def read(self, name: str, block: Block, frames: Sequence[int] | range | None = None) -> Array:
        """Read frames of one leading position, checking the units they lie in.

        The units written last are not read back: they are still there, whether behind or not.

        Args:
            name: the array.
            block: leading coordinates without the frame axis, such as (step,).
            frames: absolute frame indices in any order; None for all.

        Returns:
            (len(frames), *tail).

        Raises:
            DamagedUnit: a unit is not what was committed.
        """
        spec = self.specs[name]
        wanted = np.arange(spec.frames) if frames is None else np.asarray(frames, dtype=np.int64)
        owner = wanted // spec.block_frames
        fresh = {n: self._held(name, (*block, n)) for n in map(int, np.unique(owner))}
        stored = np.isin(owner, [n for n, data in fresh.items() if data is None])
        found = np.empty((len(wanted), *spec.tail), spec.dtype)
        for n, data in fresh.items():
            if data is not None:
                found[owner == n] = data[wanted[owner == n] % spec.block_frames]
        if stored.any():
            with waiting(), measured("store"):
                on_disk = sorted(n for n, data in fresh.items() if data is None)
                for n in on_disk:
                    self.stage.check(unit_name(spec.unit, (*block, n)))
                array: Any = self._arrays[name]
                places = np.flatnonzero(stored)
                # Run by run: zarr takes forty times as long for a list of frames.
                ends = np.flatnonzero(np.diff(wanted[places]) != 1) + 1
                for run in np.split(places, ends):
                    found[run] = array[(*block, slice(wanted[run[0]], wanted[run[-1]] + 1))]
                # Afterwards, as zarr gives zeros for a file that another run has removed meanwhile.
                for n in on_disk:
                    if not self._file(name, (*block, n)).is_file():
                        self.stage.vanished(unit_name(spec.unit, (*block, n)))
        return found

    def _where(self, name: str, block: Block) -> tuple[int | slice, ...]:
        spec = self.specs[name]
        start = block[-1] * spec.block_frames
        return (*block[:-1], slice(start, min(start + spec.block_frames, spec.frames)))

    def _file(self, name: str, block: Block) -> Path:
        array = self._arrays[name]
        full = (*block, *(0 for _ in self.specs[name].tail))
        return self._root / name / array.metadata.encode_chunk_key(full)
