"""One exported graph: a module, and the names, shapes and types of what it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from models.config import ModelConfig

__all__ = ["Graph", "Port", "Shape", "limits"]

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Port:
    """One input: its shape, and what it holds ("uint8", "int64", "bool" or "float32")."""

    name: str
    shape: Shape
    dtype: str = "float32"


@dataclass(frozen=True)
class Graph:
    """One graph: a module called with its inputs in order, giving its outputs in order.

    Attributes:
        vocabulary: token ids of examples are below it.
    """

    name: str
    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]
    vocabulary: int

    def example(self, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
        """Random inputs with these sizes; half of the rows of a mask end early."""
        random = torch.Generator().manual_seed(seed)
        made = {}
        for port in self.inputs:
            shape = tuple(_size(part, sizes) for part in port.shape)
            if port.dtype == "bool":
                made[port.name] = _mask(shape)
            elif port.dtype == "float32":
                made[port.name] = torch.randn(shape, generator=random)
            else:
                dtype, high = _INTEGERS[port.dtype]
                top = high or self.vocabulary
                made[port.name] = torch.randint(0, top, shape, generator=random, dtype=dtype)
        return made


_INTEGERS = {"uint8": (torch.uint8, 256), "int64": (torch.int64, 0)}


def _size(part: int | str, sizes: Mapping[str, int]) -> int:
    if isinstance(part, int):
        return part
    name, _, more = part.partition("+")
    return sizes[name] + int(more or 0)


def _mask(shape: tuple[int, ...]) -> Tensor:
    """(..., L) bool: every second row has its last third padded, as far as two tokens remain."""
    length = shape[-1]
    seen = torch.ones(shape, dtype=torch.bool)
    seen.view(-1, length)[1::2, max(2, length - length // 3) :] = False
    return seen


def limits(config: ModelConfig) -> dict[str, tuple[int, int | None]]:
    """Least and largest size behind each name of a shape; None is unlimited.

    An answer is [CLS], a token and [SEP] at least. What several answers share is computed once for
    all of them, so there are two or more; a prompt is [CLS] and a token at least.
    """
    most = config.text.max_positions
    return {
        "batch": (1, None),
        "tokens": (2 if config.form == "captioning" else 1, most),
        "answers": (2, None),
        "answer_tokens": (3, most + 1),  # the last one is predicted only
        "past": (2, most - 1),
    }
