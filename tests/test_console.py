"""Progress of several processes: one table, told by all and shown by one."""

import io
import time

from rich.console import Console
from torch.distributed import HashStore

from tokenflow_batch.console import progress_bars
from tokenflow_batch.distributed import Team


def test_one_process_shows_a_row_for_each(monkeypatch):
    monkeypatch.setattr("tokenflow_batch.console._PAUSE", 0.02)
    store, screen = HashStore(), io.StringIO()
    first, second = (Team(store, rank, 2) for rank in range(2))
    console = Console(file=screen, force_terminal=True, width=100)
    with (
        progress_bars(team=first, console=console) as own,
        progress_bars(shown=False, team=second) as other,
        own("wolf/robot edit", 50) as advance,
        other("bear/gold invert", 80) as others,
    ):
        for _ in range(20):
            time.sleep(0.02)
            advance(2)
            others(4)
        assert first.shown()[1][0] == "bear/gold invert"
        time.sleep(0.2)
    told = screen.getvalue()
    assert "process 0: wolf/robot edit" in told
    assert "process 1: bear/gold invert" in told
    assert "/50" in told
    assert "/80" in told
    assert first.shown() == [None, None]


def test_nothing_is_written_where_nobody_looks():
    screen = io.StringIO()
    with (
        progress_bars(team=Team(HashStore(), 0, 2), console=Console(file=screen)) as bars,
        bars("wolf/robot edit", 5) as advance,
    ):
        advance(1)
    assert screen.getvalue() == ""
