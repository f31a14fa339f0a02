"""Where ZeRO puts the elements of parameters, for any number of ranks.

ZeRO 1 and 2 write the parameters of a group one behind the other and cut the whole into equal
partitions; ZeRO 3 cuts every parameter on its own. Both pad with zeros at the end. (DeepSpeed 0.19:
stage_1_and_2.py `__init__`, partition_parameters.py `partition`.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

__all__ = ["Slot", "concatenated", "partitioned", "whole"]


@dataclass(frozen=True)
class Slot:
    """`count` elements of the parameter `name`, from its flat index `start` on; they stand at index
    `at` of a rank's flat tensor.
    """

    name: str
    start: int
    at: int
    count: int


def whole(name: str, numel: int) -> Slot:
    """A parameter that is not cut (ZeRO 0)."""
    return Slot(name, 0, 0, numel)


def concatenated(
    numels: Mapping[str, int], paddings: Sequence[int], size: int, rank: int
) -> list[Slot]:
    """ZeRO 1 and 2: what is in partition `rank`, of `size` elements, of one group.

    Args:
        numels: name -> elements, in the order in which they stand.
        paddings: zeros behind each of them (alignment).
    """
    begin, end = rank * size, (rank + 1) * size
    steps = (numel + padding for numel, padding in zip(numels.values(), paddings, strict=True))
    slots = []
    for (name, numel), first in zip(numels.items(), accumulate(steps, initial=0), strict=False):
        low, high = max(first, begin), min(first + numel, end)
        if low < high:
            slots.append(Slot(name, low - first, low - begin, high - low))
    return slots


def partitioned(numels: Mapping[str, int], world: int, rank: int) -> list[Slot]:
    """ZeRO 3: what rank `rank` of `world` has of the parameters of one sub-group; a parameter's last
    share is padded.
    """
    sizes = {name: share(numel, world) for name, numel in numels.items()}
    firsts: Iterable[int] = accumulate(sizes.values(), initial=0)
    slots = []
    for (name, numel), at in zip(numels.items(), firsts, strict=False):
        start = rank * sizes[name]
        count = min(sizes[name], numel - start)
        if count > 0:
            slots.append(Slot(name, start, at, count))
    return slots


def share(numel: int, world: int) -> int:
    """Elements that ZeRO 3 gives to each rank, padding included."""
    return -(-numel // world)
