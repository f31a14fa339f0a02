"""Bad input, as a user meets it: one clear message and exit 2, or a sample that is counted and replaced."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from data_pipeline.blocksworld.build import build_blocksworld
from data_pipeline.index import build_index
from data_pipeline.manifest_writer import write_manifest
from train.main import main


@pytest.fixture
def data(tmp_path) -> Path:
    build_blocksworld(
        tmp_path / "data",
        scenes=24,
        val=8,
        test=8,
        image_size=48,
        seed=3,
        tasks=("pretrain",),
        per_shard=12,
    )
    return tmp_path / "data"


def rewrite(shard: Path, change) -> None:
    """Write a shard anew with `change(name, content)`, and its index and manifest with it."""
    with tarfile.open(shard) as source:
        members = [(m.name, source.extractfile(m).read()) for m in source.getmembers()]  # type: ignore[union-attr]
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as target:
        for name, content in members:
            changed = change(name, content)
            info = tarfile.TarInfo(name)
            info.size = len(changed)
            target.addfile(info, io.BytesIO(changed))
    build_index(shard)
    folder = shard.parent
    extra = json.loads((folder / "manifest.json").read_text())
    write_manifest(folder, "pretrain", "train", {"image_size": extra["image_size"]})


def pretrain(data: Path, out: Path, *overrides: str) -> int:
    return main(
        [
            "pretrain",
            "blocksworld-pretrain-teacher",
            "model=blocksworld-micro-teacher",
            f"out={out}",
            f"data.train={data / 'pretrain' / 'train'}",
            "data.val=null",
            "data.batch=8",
            "data.region.probability=0",
            "optim.steps=3",
            "optim.warmup_steps=0",
            "log.every=1",
            "checkpoint.every=0",
            *overrides,
        ]
    )


def test_a_wrong_key_names_the_nearest(data, tmp_path, capsys):
    assert pretrain(data, tmp_path / "run", "optim.stepps=5") == 2
    message = capsys.readouterr().err
    assert "optim.stepps" in message and "steps" in message
    assert "Traceback" not in message


def test_a_missing_shard_is_named(data, tmp_path, capsys):
    shard = sorted((data / "pretrain" / "train").glob("*.tar"))[0]
    shard.unlink()
    assert pretrain(data, tmp_path / "run") == 2
    assert shard.name in capsys.readouterr().err


def cut_picture(name: str, content: bytes) -> bytes:
    first_picture = name.endswith("0000003.jpg")
    return content[: len(content) // 3] if first_picture else content


def without_captions(name: str, content: bytes) -> bytes:
    if not name.endswith("0000003.json"):
        return content
    record = json.loads(content)
    del record["captions"]
    return json.dumps(record).encode()


@pytest.mark.parametrize("damage", [cut_picture, without_captions])
def test_a_broken_sample_is_named_or_counted(damage, data, tmp_path, capsys):
    shard = sorted((data / "pretrain" / "train").glob("*.tar"))[0]
    rewrite(shard, damage)
    assert pretrain(data, tmp_path / "raise") == 2
    message = capsys.readouterr().err
    assert shard.name in message and "0000003" in message

    out = tmp_path / "skip"
    assert pretrain(data, out, "data.faults=skip", "data.max_fault_rate=0.2") == 0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    counted = sum(value for name, value in records[-1]["faults"].items() if name != "nonfinite")
    assert counted == 1
    noted = [json.loads(line) for line in (out / "quarantine_0000.jsonl").read_text().splitlines()]
    assert len(noted) == 1 and "0000003" in json.dumps(noted[0])
    assert (out / "model" / "model.safetensors").is_file()
