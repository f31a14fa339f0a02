"""Recipes: find one, resolve it with `a.b=c` overrides into a RunConfig, and write the result down.

A recipe is YAML with the sections of `train.config.RunConfig`. The order is: defaults, recipe,
overrides. A finished run's `run.yaml` is a recipe too: its `provenance` section is dropped on
reading.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from train.config import RunConfig, UserError

__all__ = [
    "dump_run_yaml",
    "find_recipe",
    "flatten",
    "load_run_config",
    "nearest",
    "schema",
    "section_class",
    "to_plain",
]

PROVENANCE = "provenance"
_RECIPES = Path(__file__).resolve().parent / "recipes"
_UNKNOWN = {"unexpected_keyword_argument", "extra_forbidden"}


class _StrictLoader(yaml.SafeLoader):
    """YAML whose duplicate keys are an error: the last one would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} appears twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """` (did you mean "x"?)` when some known name is close, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f' (did you mean "{close[0]}"?)' if close else ""


def find_recipe(name_or_path: str | Path) -> Path:
    """Path of a recipe: a YAML file, or the name of a shipped one. Raises FileNotFoundError."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = {file.stem: file for file in sorted(_RECIPES.glob("*.yaml"))}
    if str(name_or_path) in shipped:
        return shipped[str(name_or_path)]
    raise FileNotFoundError(
        f"recipe {str(name_or_path)!r}: neither a file nor a shipped recipe"
        f"{nearest(str(name_or_path), shipped)}; shipped are: {', '.join(shipped) or 'none'}"
    )


def load_run_config(recipe: Path, overrides: list[str]) -> tuple[RunConfig, dict[str, str]]:
    """The resolved run file and, per dotted key, where its value came from.

    Returns (config, sources); a source is "default", "recipe" or "override".
    Raises UserError naming file, dotted key and the nearest known name.
    """
    values = _read_yaml(recipe)
    written = flatten(values)
    overridden: set[str] = set()
    for override in overrides:
        overridden.add(_apply_override(values, override))
    try:
        config = TypeAdapter(RunConfig).validate_python(values)
    except ValidationError as error:
        raise UserError(_explain(error, recipe, overridden)) from None
    sources = {
        key: _source(key, written, overridden)
        for key in flatten(TypeAdapter(RunConfig).dump_python(config))
    }
    return config, sources


def _read_yaml(recipe: Path) -> dict[str, Any]:
    try:
        values = yaml.load(recipe.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{recipe}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{recipe}: a recipe is a mapping of sections; start from one under train/recipes/"
        )
    values.pop(PROVENANCE, None)
    return values


def _apply_override(values: dict[str, Any], override: str) -> str:
    """Sets one `a.b=c` in place and returns `a.b`."""
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(
            f"override {override!r}: write it as section.key=value, for example optim.lr=1e-4"
        )
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise UserError(
            f"override {override!r}: the value is not YAML: {' '.join(str(error).split())}"
        ) from None
    here = values
    for part in parts[:-1]:
        inner = here.get(part)
        if inner is None:
            inner = here[part] = {}
        elif not isinstance(inner, dict):
            raise UserError(
                f"override {override!r}: {part} is {inner!r} in the recipe, not a section"
            )
        here = inner
    here[parts[-1]] = value
    return key


def _source(key: str, written: dict[str, Any], overridden: set[str]) -> str:
    prefixes = {".".join(key.split(".")[: n + 1]) for n in range(key.count(".") + 1)}
    if prefixes & overridden:
        return "override"
    return "recipe" if prefixes & set(written) else "default"


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted keys; an empty dict is a leaf."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{dotted}."))
        else:
            flat[dotted] = value
    return flat


def _section_at(path: list[str]) -> type | None:
    """The config class that holds the key `path[-1]`, by following the type hints; None where there
    is none.
    """
    here: type | None = RunConfig
    for part in path[:-1]:
        here = section_class(here, part)
        if here is None:
            return None
    return here


def section_class(section: type, key: str) -> type | None:
    """The config class of what lies under `key` of a config class; None where it is a value."""
    hint = typing.get_type_hints(section).get(key)
    candidates = (hint, *typing.get_args(hint))
    return next(
        (c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)), None
    )


def _explain(error: ValidationError, recipe: Path, overridden: set[str]) -> str:
    lines = []
    for item in error.errors():
        path = [str(part) for part in item["loc"]]
        key = ".".join(path)
        where = f"{recipe}" if key not in overridden else f"override of {recipe}"
        section = _section_at(path)
        if item["type"] in _UNKNOWN:
            known = [f.name for f in dataclasses.fields(section)] if section else []
            message = f"unknown key{nearest(path[-1], known)}; known here: {', '.join(known)}"
        elif item["type"] == "missing":
            message = "required, and not given"
        else:
            message = f"{item['msg']} (got {item.get('input')!r})"
        lines.append(f"{where}: {key}: {message}")
    return "\n".join(lines)


def to_plain(config: RunConfig) -> dict[str, Any]:
    """The configuration as JSON and YAML types (tuples become lists)."""
    return TypeAdapter(RunConfig).dump_python(config, mode="json")


def schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    return TypeAdapter(RunConfig).json_schema()


def dump_run_yaml(config: RunConfig, path: Path, provenance: dict[str, Any] | None = None) -> None:
    """Writes `run.yaml`: the resolved configuration, and under `provenance` commit, versions and
    world size.
    """
    values = to_plain(config)
    if provenance:
        values[PROVENANCE] = provenance
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
