"""Are the processes of a launch busy to the end, over clips of unequal length?

    python benchmarks/batch.py [--processes 2 3] [--json FILE]

Six generated clips of 12 to 72 frames are edited by the demo model, by several processes of one
thread each, from nothing. No schedule can end before the seconds spent in units of work, divided by
the processes, have passed (or the longest unit, which is far shorter); the makespan, from when all
have their model to the last commit, must not be more than 1.2 times that, and all runs must give
the same bits. (That each unit is committed once is counted in tests/test_distributed.py.)
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from sharing import prepare, timed

LENGTHS = (12, 72, 20, 48, 16, 36)
BOUND = 1.2


def measure(manifest: Path, processes: int) -> tuple[dict[str, Any], Any]:
    """One run: its makespan against the lower bound; and the first clip's edited latents."""
    found, edited = timed(manifest, processes)
    least = sum(found["stage_seconds"].values()) / processes
    return {
        "processes": processes,
        "makespan": found["seconds"],
        "lower_bound": least,
        "ratio": found["seconds"] / least,
        "share": found["share"],
    }, edited


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    args = parser.parse_args()
    runs, bits = [], []
    with tempfile.TemporaryDirectory() as scratch:
        manifest = prepare(Path(scratch), LENGTHS)
        for processes in args.processes:
            found, edited = measure(manifest, processes)
            print(json.dumps(found), flush=True)
            runs.append(found)
            bits.append(edited)
    assert all(np.array_equal(bits[0], other) for other in bits), "other bits"
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "frames": LENGTHS,
        "bound": BOUND,
        "holds": all(run["ratio"] <= BOUND for run in runs),
        "runs": runs,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(0 if report["holds"] else 1)


if __name__ == "__main__":
    main()
