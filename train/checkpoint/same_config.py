"""Whether a run may go on with a checkpoint's configuration: key by key, over versions of this
program that know different keys.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

from pydantic_core import to_jsonable_python

from train.config import RunConfig, UserError
from train.recipes_io import section_class

__all__ = ["check_config"]

_LOG = logging.getLogger(__name__)
# Keys that may change between save and resume: how long, how often to look and to save, and where.
# What the data are and how they are ordered is checked by the loaders, which know it exactly.
_DATA = (
    "data.train",
    "data.region_train",
    "data.block",
    "data.window_blocks",
    "data.groups",
    "data.mix_period",
    "data.batch",
    "data.global_batch",
    "data.region.images",
    "data.region.rows",
    "data.region.global_",
)
_MAY_CHANGE = (
    *_DATA,
    "out",
    "optim.steps",
    "log.",
    "checkpoint.",
    "eval.",
    "data.workers",
    "data.val",
    "data.remote.",
    # The optimizer batch is micro-batch x ranks x accumulation: the loaders check the first two.
    "engine.accumulate",
    # How the same numbers are computed, and when a step is skipped.
    "teacher.backend",
    "teacher.dtype",
    "teacher.compile",
    "teacher.overlap",
    "teacher.inject",
    "engine.activation_checkpointing",
    "engine.compile",
    "prune.gates",
    "prune.budget.cache",
    "prune.budget.repeats",
    # Who holds which part of the optimizer: a checkpoint is put together anew (reshard.py).
    "engine.config",
    "engine.offload",
    "engine.collective_timeout",
    "optim.spike_",
    "optim.skip_limit",
)


class _Absent:
    """The value of a key that is not there, which is something else than a value of None."""

    def __repr__(self) -> str:
        return "not given"


_ABSENT = _Absent()


def check_config(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Compares two configurations of `state.plain_config`.

    A key that the writing version did not know is taken to have had today's default, and one line
    of the log names it. A key that this version no longer knows is let go where it was None, which
    asks for nothing anywhere in a run file.

    Raises:
        UserError: naming every key that differs and may not, whether it is new or gone, and both
            values.
    """
    before, now = _nested(saved), _nested(current)
    new = sorted(_complete(before, RunConfig))
    lines = [
        line
        for key, old, value in _differences(before, now)
        if not key.startswith(_MAY_CHANGE) and (line := _objection(key, old, value, new))
    ]
    if lines:
        raise UserError(
            f"the checkpoint was written with another configuration ({'; '.join(lines)}); put the "
            "old values back, choose another out=, or start over with --resume none"
        )
    if named := [key for key in new if not f"{key}.".startswith(_MAY_CHANGE)]:
        _LOG.info(
            "the checkpoint is of an older version, without %s: it counts as the defaults, which "
            "this run has",
            ", ".join(named),
        )


def _objection(key: str, old: Any, value: Any, new: list[str]) -> str | None:
    """What is wrong with a key that differs; None where nothing is."""
    if any(f"{key}.".startswith(f"{name}.") for name in new):
        return f"{key}: new since the checkpoint, which counts as {old!r} -> {value!r}"
    if value is _ABSENT and not _is_key(key):
        return None if old is None else f"{key}: {old!r} -> gone from this version of the program"
    return f"{key}: {old!r} -> {value!r}"


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested dicts: the inverse of `recipes_io.flatten`."""
    nested: dict[str, Any] = {}
    for dotted, value in flat.items():
        *path, key = dotted.split(".")
        here = nested
        for part in path:
            here = here.setdefault(part, {})
        here[key] = dict(value) if isinstance(value, dict) else value
    return nested


def _complete(values: dict[str, Any], section: type, prefix: str = "") -> Iterator[str]:
    """Puts the defaults of the keys that are absent into `values`, and yields those keys.

    An absent section is one key. Keys that always have to be given stay absent.
    """
    for field in dataclasses.fields(section):
        inner = section_class(section, field.name)
        if field.name in values:
            if inner is not None and isinstance(values[field.name], dict):
                yield from _complete(values[field.name], inner, f"{prefix}{field.name}.")
            continue
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            continue
        values[field.name] = to_jsonable_python(default)
        yield f"{prefix}{field.name}"


def _differences(
    before: dict[str, Any], now: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old, new value) of what differs; a section that only one side has is one item."""
    for key in sorted(before.keys() | now.keys()):
        old, value = before.get(key, _ABSENT), now.get(key, _ABSENT)
        if isinstance(old, dict) and isinstance(value, dict):
            yield from _differences(old, value, f"{prefix}{key}.")
        elif old != value:
            yield f"{prefix}{key}", old, value


def _is_key(dotted: str) -> bool:
    """Whether this version knows the key, or has a mapping of free names (`loss`) in its place."""
    section: type = RunConfig
    for part in dotted.split("."):
        if part not in {field.name for field in dataclasses.fields(section)}:
            return False
        inner = section_class(section, part)
        if inner is None:
            return True
        section = inner
    return True
