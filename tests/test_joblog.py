"""Each job has log files of its own."""

from tokenflow_batch.joblog import JobLog

NAMES = [("a", "b"), ("a.b", "c"), ("a", "b.c"), ("a%2Eb", "c"), ("a", "b%2Ec"), ("a%252Eb", "c")]


def test_no_two_jobs_share_a_file(tmp_path):
    logs = [JobLog(tmp_path, clip, edit) for clip, edit in NAMES]
    assert len({log.events for log in logs}) == len(NAMES)
    assert len({log.traceback for log in logs}) == len(NAMES)
    assert logs[0].events.name == "a.b.jsonl"
