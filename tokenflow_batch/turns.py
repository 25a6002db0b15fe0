"""Work that is done side by side in one thread: each piece takes turns.

A piece is a generator that yields before each of its turns, and says where in the work that turn
is. Whoever is furthest behind comes next, so that pieces that are at the same place stay together
and one that begins further back (it was killed earlier) catches up first.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from itertools import groupby
from typing import TypeVar

T = TypeVar("T")
Place = tuple[int, ...]
"""Where a turn is: stage, then whatever the stage says (step, window). Ascending."""
Turns = Generator[Place, None, T]


def side_by_side(pieces: Sequence[Turns[T]]) -> list[T]:
    """See all pieces through; what each returned, in their order.

    At equal places the earlier piece comes first.

    Raises:
        BaseException: what a piece raised; the others are closed.
    """
    results: dict[int, T] = {}
    places: dict[int, Place] = dict.fromkeys(range(len(pieces)), ())
    try:
        while places:
            index = min(places, key=lambda i: (places[i], i))
            try:
                places[index] = next(pieces[index])
            except StopIteration as stop:
                results[index] = stop.value
                del places[index]
    finally:
        for piece in pieces:
            piece.close()
    return [results[index] for index in range(len(pieces))]


def groups(
    jobs: Sequence[T], clip: Callable[[T], str], together: int, processes: int = 1
) -> list[list[T]]:
    """Jobs of one clip that a process takes at once, to edit them side by side.

    Args:
        jobs: those of a clip one after the other.
        clip: what each is of.
        together: how many at most.
        processes: among which a clip's jobs are shared out evenly.
    """
    found = []
    for _, of_clip in groupby(jobs, key=clip):
        every = list(of_clip)
        size = min(together, -(-len(every) // processes))
        found += [every[i : i + size] for i in range(0, len(every), size)]
    return found


def all_turns(piece: Turns[T]) -> T:
    """See one piece through."""
    return side_by_side([piece])[0]
