"""What scripts/torture takes for done, and for lost."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tokenflow_batch.files import write_json
from tokenflow_batch.ledger import StageFolder

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from torture import committed, lost  # a program, not a package

JOB = "out/.work/invert/k0"


@pytest.fixture
def stage(tmp_path):
    folder = StageFolder(tmp_path / JOB, "invert", "k0")
    folder.open({"stage": "invert"}, {"device": "cpu"})
    for unit in ("advance-0", "advance-1"):
        folder.commit(unit, (), {"rows": 1})
    return folder


KILLED = """
import os, signal, sys
from pathlib import Path
from tokenflow_batch.files import replacing

with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text(sys.argv[2])
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_while_writing(record, text):
    """A process that is killed with a record half written: no `finally` of it runs."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(record), text], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("text", ["", '{"files": {'])
def test_a_record_that_was_being_written_is_not_done(stage, tmp_path, text):
    before = committed(tmp_path)
    killed_while_writing(tmp_path / JOB / "commits" / "advance-2.json", text)
    assert list((tmp_path / JOB / "commits").glob(".advance-2.json*"))
    assert committed(tmp_path) == before
    assert [record.stem for record in before] == ["advance-0", "advance-1"]
    assert list(stage.units()) == ["advance-0", "advance-1"]


def test_what_is_gone_or_written_again_is_lost_and_what_is_dropped_is_not(stage, tmp_path):
    before = committed(tmp_path)
    assert lost(before, committed(tmp_path)) == []
    stage.drop("advance-0")
    assert lost(before, committed(tmp_path)) == []
    record = tmp_path / JOB / "commits" / "advance-1.json"
    content, (_, written) = record.read_bytes(), before[record]
    record.write_bytes(content)
    os.utime(record, ns=(written + 1, written + 1))
    assert lost(before, committed(tmp_path)) == ["advance-1"]
    stage.forget("advance-1")
    assert lost(before, committed(tmp_path)) == ["advance-1"]
    write_json(record, {"files": {"data": [1, "0"]}, "facts": {}, "dropped": False})
    assert lost(before, committed(tmp_path)) == ["advance-1"]
