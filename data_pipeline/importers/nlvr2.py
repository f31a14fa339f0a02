"""NLVR2 (lil.nlp.cornell.edu/nlvr): statements about pairs of photographs, to shards.

train.json, dev.json and test1.json hold one JSON object a line: "sentence", "label" ("True" or
"False") and "identifier", SPLIT-SET-PAIR-SENTENCE. Its pictures are SPLIT-SET-PAIR-img0.png (left)
and -img1.png, in images/train/DIRECTORY/ ("directory" of the line), dev/ and test1/. Not all of
them are PNGs, whatever their name says. All statements about a pair become one sample.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.importers import annotations as source
from data_pipeline.importers.common import Counts, PictureFinder, run_import
from data_pipeline.importers.unit import ImportItem
from data_pipeline.shards import dump_json

__all__ = ["Pair", "build_nlvr2", "read_pairs"]

_IDENTIFIER = re.compile(r"^(([a-z0-9]+)-\d+-\d+)-(\d+)$")
_LABELS = {"true": True, "false": False}


@dataclass
class Pair:
    """Two pictures. `name`: SPLIT-SET-PAIR; `directories`: where they may lie; `statements`: JSON."""

    name: str
    directories: tuple[str, ...]
    statements: list[dict[str, Any]] = field(default_factory=list)

    def files(self, side: int) -> tuple[str, ...]:
        """Names of the left (0) or right (1) picture below a folder of images."""
        return tuple(f"{folder}{self.name}-img{side}.png" for folder in self.directories)


def _label(entry: dict[str, Any], where: str) -> bool:
    value = entry.get("label")
    label = value if isinstance(value, bool) else _LABELS.get(str(value).lower())
    if label is None:
        raise ValueError(f'{where} needs \'label\' ("True" or "False"), has {value!r}')
    return label


def _directories(entry: dict[str, Any], split: str, where: str) -> tuple[str, ...]:
    if "directory" not in entry:
        return f"{split}/", ""
    name = str(entry["directory"])
    if not name.isalnum():
        raise ValueError(f"{where}: directory {name!r} is no plain name")
    return f"{split}/{name}/", f"{name}/", f"{split}/", ""


def read_pairs(files: Sequence[Path]) -> list[Pair]:
    """The pairs of train.json, dev.json or test1.json, in order.

    Raises: FileNotFoundError, or ValueError naming the line and key that are wrong.
    """
    pairs: dict[str, Pair] = {}
    seen: set[str] = set()
    for file in files:
        for where, entry in source.read_lines(file, "NLVR2 file"):
            identifier = source.field(entry, "identifier", str, where)
            match = _IDENTIFIER.match(identifier)
            if match is None:
                raise ValueError(
                    f"{where}: identifier {identifier!r} is not SPLIT-SET-PAIR-SENTENCE"
                )
            if identifier in seen:
                raise ValueError(f"{where}: identifier {identifier!r} occurs twice")
            seen.add(identifier)
            name = match[1]
            if name not in pairs:
                pairs[name] = Pair(name, _directories(entry, match[2], where))
            pairs[name].statements.append(
                {
                    "sentence": source.one_line(source.field(entry, "sentence", str, where)),
                    "label": _label(entry, where),
                    "identifier": identifier,
                }
            )
    if not pairs:
        raise ValueError(f"{files[0]}: no statements in it")
    return list(pairs.values())


def _item(pair: Pair, finder: PictureFinder) -> ImportItem:
    pictures = tuple(finder.find(*pair.files(side)) for side in (0, 1))
    ids = [f"nlvr2-{pair.name}-img{side}" for side in (0, 1)]
    record = dump_json({"image_ids": ids, "statements": pair.statements})
    return ImportItem(f"nlvr2-{pair.name}", pictures, record)


def build_nlvr2(
    statements: Sequence[Path],
    images: Sequence[Path],
    out: Path,
    *,
    split: str = "train",
    max_side: int = 0,
    per_shard: int = 1000,
    processes: int | None = None,
    skip_bad: bool = False,
) -> Counts:
    """Writes OUT/nlvr2/SPLIT: a sample holds two pictures and what is said about them.

    Args:
        statements: train.json, dev.json or test1.json.   images: the folder with train/, dev/ and
            test1/ in it, one of these, or one with all pictures; or zips of them.
        max_side ... skip_bad: as for `run_import`.

    Raises: ValueError / FileNotFoundError naming file, line and remedy.
    """
    finder = PictureFinder(images)
    return run_import(
        "nlvr2",
        [_item(pair, finder) for pair in read_pairs(statements)],
        out,
        task="nlvr2",
        split=split,
        settings={},
        inputs=statements,
        max_side=max_side,
        per_shard=per_shard,
        processes=processes,
        skip_bad=skip_bad,
    )
