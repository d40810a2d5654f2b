"""What a set of preferences says: levels of a partial order, and every pair that follows from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Positions = tuple[int, int]  # chosen, rejected


def levels(count: int, pairs: Iterable[Positions]) -> list[int]:
    """The level of each of ``count`` candidates: 0 when nothing is preferred to it, else one more than the deepest
    candidate that is. So the level of the chosen one is below that of the rejected one in every pair, and the order is
    total exactly when no two candidates share a level.

    pairs: (chosen, rejected), positions below ``count``. Raises ValueError, naming a circle, when there is one.
    """
    beaten: list[set[int]] = [set() for _ in range(count)]
    for chosen, rejected in pairs:
        beaten[chosen].add(rejected)
    waiting = [0] * count
    for each in beaten:
        for rejected in each:
            waiting[rejected] += 1
    level = [0] * count
    ready = [i for i in range(count) if not waiting[i]]
    for chosen in ready:
        for rejected in beaten[chosen]:
            level[rejected] = max(level[rejected], level[chosen] + 1)
            waiting[rejected] -= 1
            if not waiting[rejected]:
                ready.append(rejected)
    if len(ready) < count:
        raise ValueError(f"the preferences go in a circle: {_circle(beaten, set(range(count)) - set(ready))}")
    return level


def _circle(beaten: Sequence[set[int]], left: set[int]) -> str:
    """One circle as "0 > 2 > 0". Each of ``left`` is preferred less than another of them, so going up never ends."""
    above = {rejected: chosen for chosen in left for rejected in beaten[chosen] & left}
    path = [min(left)]
    while above[path[-1]] not in path:
        path.append(above[path[-1]])
    path = path[path.index(above[path[-1]]) :]
    return " > ".join(map(str, [path[0], *reversed(path)]))


def implied(count: int, pairs: Sequence[Positions]) -> list[Positions]:
    """The pairs and all that follow from them (a > b and b > c: a > c), sorted, each once. Raises as `levels`."""
    level = levels(count, pairs)
    direct: list[set[int]] = [set() for _ in range(count)]
    for chosen, rejected in pairs:
        direct[chosen].add(rejected)
    below: list[set[int]] = [set() for _ in range(count)]
    for chosen in sorted(range(count), key=lambda i: -level[i]):
        below[chosen] = direct[chosen].union(*(below[rejected] for rejected in direct[chosen]))
    return [(chosen, rejected) for chosen in range(count) for rejected in sorted(below[chosen])]
