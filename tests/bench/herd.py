"""A thousand clients started at once, in virtual time, with the program's own decisions when to ask.

They read their tag by the EC2 API (those that read it from instance metadata cost no call), inside its
Describe bucket, while one server gives them their tokens, and they mark, inside the CreateTags bucket.
"""
from __future__ import annotations

import heapq
import itertools
import random
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import keto_tokens
from standin_fleet import buckets

Pause = Callable[[int, bool, float, float], float]
INTERVAL = 5.0  # the client's default
FIRST_PASS = 3.0  # seconds until the server sees the new nodes
STARTED_AGAIN = 5.0  # seconds after which a unit whose client gave up on its mark starts it again


def constant(looks: int, refused: bool, interval: float, chance: float) -> float:
    """An interval with jitter, whatever comes: what to compare with."""
    return interval * (0.75 + 0.5 * chance)


class Herd:
    """So many clients from start to mark; times are seconds since their start."""

    def __init__(self, count: int, pause: Pause = keto_tokens.pause_after, seed: int = 1):
        self.count, self.pause, self.random, self.now = count, pause, random.Random(seed), 0.0
        self.limits = buckets(lambda: self.now)
        self.tagged: dict[int, float] = {}
        self.found: dict[int, float] = {}
        self.marked: dict[int, float] = {}
        self.asked: Counter[int] = Counter()  # looks, and those refused, by the second
        self.refused: Counter[int] = Counter()
        self.gave_up = 0  # runs that ended with exit code 6
        self._number = itertools.count()
        self._queue: list[tuple[float, int, Callable[[int, int], None], int, int]] = []

    def later(self, seconds: float, what: Callable[[int, int], None], client: int, number: int) -> None:
        """Have `what` happen in so many seconds."""
        heapq.heappush(self._queue, (self.now + seconds, next(self._number), what, client, number))

    def run(self) -> Herd:
        """Until the last one has marked its tag."""
        rate, burst = keto_tokens.TAGS_PER_SECOND, keto_tokens.TAGS_BURST
        for client in range(self.count):
            self.later(self.random.random(), self.look, client, 0)
            self.later(FIRST_PASS + max(0.0, (client - burst) / rate), self.tag, client, 1)
        while len(self.marked) < self.count:
            self.now, _, what, client, number = heapq.heappop(self._queue)
            what(client, number)
        return self

    def tag(self, client: int, attempt: int) -> None:
        """The server writes a token; when refused, botocore tries again."""
        if self.limits["CreateTags"].take():
            self.tagged[client] = self.now
        else:
            self.later(self.random.random() * 2 ** min(attempt, 4), self.tag, client, attempt + 1)

    def look(self, client: int, looks: int) -> None:
        """The client looks at its tag."""
        self.asked[int(self.now)] += 1
        refused = not self.limits["Describe"].take()
        self.refused[int(self.now)] += refused
        if not refused and client in self.tagged:
            self.found.setdefault(client, self.now)
            return self.later(0.2, self.mark, client, 1)
        pause = self.pause(looks, refused, INTERVAL, self.random.random())
        return self.later(pause, self.look, client, looks + 1)

    def mark(self, client: int, attempt: int) -> None:
        """The client marks its tag, with the patience that it has."""
        if self.limits["CreateTags"].take():
            self.marked[client] = self.now
        elif attempt < keto_tokens.MARK_ATTEMPTS:
            wait = keto_tokens.backoff(attempt, 0.0, self.random.uniform(0.5, 1.0))
            self.later(wait, self.mark, client, attempt + 1)
        else:
            self.gave_up += 1
            self.later(STARTED_AGAIN, self.look, client, 0)

    def rate(self, start: int, end: int) -> float:
        """Looks a second in that time."""
        return sum(self.asked[second] for second in range(start, end)) / (end - start)

    def waits(self) -> list[float]:
        """Seconds from a token's being in the tag to its being found, in order."""
        return sorted(self.found[client] - self.tagged[client] for client in self.found)


def show(name: str, herd: Herd) -> None:
    """Print how it went."""
    waits: Any = herd.waits()
    rates = [f"{start}-{end} s {herd.rate(start, end):.0f}/s" for start, end in (
        (0, 1), (1, 10), (10, 20), (20, 40), (40, 60), (60, 120), (120, 180), (180, 240))]
    later = sum(number for second, number in herd.refused.items() if second >= 1)
    print(
        f"{name}: {', '.join(rates)}; {sum(herd.asked.values())} looks, "
        f"{herd.refused[0]} refused in the first second and {later} later\n"
        f"  last tag {max(herd.tagged.values()):.0f} s, last found {max(herd.found.values()):.0f} s, last "
        f"marked {max(herd.marked.values()):.0f} s; found after {statistics.median(waits):.0f} s (median), "
        f"{waits[len(waits) * 9 // 10]:.0f} s (90 %), {waits[-1]:.0f} s (last); "
        f"{herd.gave_up} gave up on the mark", flush=True,
    )


def main(argv: list[str]) -> None:
    """The arguments: numbers of clients."""
    print("\nHerd: looks a second when all clients start together (EC2 allows 100, and 20/s from then on)")
    for count in map(int, argv or (10, 150, 1000, 3000)):
        show(f"{count} clients", Herd(count).run())
    show("1000 clients with a constant interval", Herd(1000, constant).run())
