"""What the documents name exists: paths, recipe keys, commands, make targets, links."""

from __future__ import annotations

import dataclasses
import re
import shlex
import typing
from pathlib import Path

import pytest

from train.config import RunConfig
from train.main import main

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
FOLDERS = (
    "train",
    "data_pipeline",
    "models",
    "launchers",
    "tests",
    "ds_configs",
    "docs",
    "benchmarks",
)


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))


def command_lines(text: str) -> list[str]:
    # Opening and closing fences in pairs: the end of a Python block begins no other.
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.S | re.M)
    shell = [block for language, block in blocks if language in ("", "bash", "sh", "console")]
    lines = "\n".join(shell).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip().removeprefix("$ ") for line in lines if line.strip()]


def has_key(section: type, parts: list[str]) -> bool:
    """Whether `a.b.c` is a key of the run file."""
    fields = typing.get_type_hints(section)
    if parts[0] not in fields:
        return False
    if len(parts) == 1:
        return True
    kinds = [fields[parts[0]], *typing.get_args(fields[parts[0]])]
    if any(typing.get_origin(kind) is dict for kind in kinds):
        return True
    return any(dataclasses.is_dataclass(kind) and has_key(kind, parts[1:]) for kind in kinds)


@pytest.mark.parametrize("document", DOCUMENTS, ids=identify)
def test_paths_exist(document):
    for span in code_spans(document.read_text()):
        if re.fullmatch(r"[\w./-]+", span) and span.split("/")[0] in FOLDERS and "/" in span:
            assert (ROOT / span).exists(), f"{identify(document)} names {span}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=identify)
def test_recipe_keys_exist(document):
    sections = {
        name
        for name, kind in typing.get_type_hints(RunConfig).items()
        if any(dataclasses.is_dataclass(part) for part in (kind, *typing.get_args(kind)))
    }
    for span in code_spans(document.read_text()):
        key = span.split("=")[0]
        first, _, rest = key.partition(".")
        if rest and first in sections and re.fullmatch(r"[a-z_.]+", key):
            if (ROOT / key.replace(".", "/")).exists() or rest in ("py", "md", "json", "yaml"):
                continue
            assert has_key(RunConfig, key.split(".")), f"{identify(document)} names {key}"


@pytest.fixture
def only_parsing(monkeypatch):
    """Every verb parses its arguments (and a stage reads its recipe), then does nothing."""
    for room in (
        "train.stages",
        "launchers.main",
        "data_pipeline.commands",
        "train.evaluation.commands",
        "train.export.commands",
        "train.convert",
        "train.doctor",
    ):
        monkeypatch.setattr(f"{room}.run", lambda *args, **kwargs: 0)


@pytest.mark.parametrize("document", DOCUMENTS, ids=identify)
def test_commands_parse(document, only_parsing, capsys):
    for line in command_lines(document.read_text()):
        words = shlex.split(line)
        if words[:1] == ["make"]:
            makefile = (ROOT / "Makefile").read_text()
            for target in words[1:]:
                assert re.search(rf"^{re.escape(target)}:", makefile, flags=re.M), line
        if words[:3] == ["python", "-m", "train.main"]:
            words = ["espalier", *words[3:]]
        if words[:1] == ["espalier"]:
            assert main(words[1:]) == 0, f"{line}: {capsys.readouterr().err}"
        if words[:1] == ["python"] and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), line


def option(words: list[str], name: str, default: str) -> str:
    return words[words.index(name) + 1] if name in words else default


def test_evaluations_read_splits_that_a_command_builds():
    """Of the sets that the docs say how to make; `test` is the default of `espalier eval`."""
    known = [
        shlex.split(line)
        for document in DOCUMENTS
        for line in command_lines(document.read_text())
        if line.startswith("espalier data build")
    ]
    built = {
        (option(words, "--out", ""), option(words, "--split", "train"))
        for words in known
        if words[:3] == ["espalier", "data", "build"]
    }
    sets = {out for out, _ in built}
    for document in DOCUMENTS:
        for line in command_lines(document.read_text()):
            words = line.split()
            if words[:2] == ["espalier", "eval"] and option(words, "--data", "") in sets:
                read = (option(words, "--data", ""), option(words, "--split", "test"))
                assert read in built, f"{identify(document)}: {line}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=identify)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{identify(document)} links to {target}"


def test_the_checks_find_what_is_wrong():
    assert has_key(RunConfig, ["prune", "freeze_step"])
    assert has_key(RunConfig, ["data", "region", "images"])
    assert not has_key(RunConfig, ["prune", "freeze"])
    assert command_lines("```bash\nmake a \\\n  b  # why\n```") == ["make a    b"]
    assert code_spans("x `a/b` y") == ["a/b"]
