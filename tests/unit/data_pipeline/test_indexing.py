"""`espalier data index` and `data verify`: what is read, kept, said and refused."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from data_pipeline import commands
from data_pipeline.index import ShardError
from data_pipeline.indexing import data_folders, index_folder
from data_pipeline.manifest import MANIFEST_NAME, load_manifest
from data_pipeline.manifest_writer import write_keep
from data_pipeline.parallel import RankError
from data_pipeline.shards import write_shard
from data_pipeline.verify import verify


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (number, 40, 90)).save(buffer, "JPEG")
    return buffer.getvalue()


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    commands.add_parsers(parser)
    return commands.run(parser.parse_args(words))


def indexed(folder: Path, task: str | None = None, split: str | None = None, force: bool = False):
    """index_folder in a process that runs alone, which always gets the report."""
    report = index_folder(folder, task=task, split=split, force=force)
    assert report is not None
    return report


def settle(folder: Path) -> None:
    """Make the shards old enough for their time of change to count."""
    for path in folder.glob("*.tar"):
        os.utime(path, ns=(10**18, 10**18))


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def img2dataset_folder(folder: Path, shards: int = 2, successes: int = 3) -> Path:
    """As img2dataset leaves it: tars by webdataset's TarWriter, statistics and tables beside."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        name = folder / f"{shard:05d}"
        with wds.TarWriter(f"{name}.tar") as writer:
            for n in range(3):
                key = f"{shard:05d}{n:04d}"
                sample = {"__key__": key, "jpg": picture(n), "txt": f"caption {n}"}
                writer.write(sample | {"json": json.dumps({"key": key}).encode()})
        Path(f"{name}_stats.json").write_text(json.dumps({"count": 4, "successes": successes}))
        Path(f"{name}.parquet").write_bytes(b"PAR1")
    return folder


def test_only_what_changed_is_read_again(write_shards, capsys):
    folder = write_shards("vqa", 25)
    settle(folder)
    before = load_manifest(folder)
    assert run("index", str(folder)) == 0
    assert "25 samples in 3 shards, 3 of them read" in capsys.readouterr().out
    assert run("index", str(folder), "--processes", "2") == 0
    captured = capsys.readouterr()
    assert "25 samples in 3 shards, 0 of them read" in captured.out
    assert "index: 3/3 shards" in captured.err
    assert load_manifest(folder) == before
    assert before.extra["image_size"] == 24
    flip(folder / "shard-000001.tar", 600)
    assert run("index", str(folder)) == 0
    captured = capsys.readouterr()
    assert "25 samples in 3 shards, 1 of them read" in captured.out
    line = next(line for line in captured.err.splitlines() if "warning" in line)
    assert "shard-000001.tar: its content is not what the manifest listed (10 samples" in line
    assert load_manifest(folder).hash != before.hash


def test_force_finds_what_time_and_size_hide(write_shards, capsys):
    folder = write_shards("vqa", 25)
    settle(folder)
    indexed(folder)
    flip(folder / "shard-000002.tar", 600)
    settle(folder)
    assert indexed(folder).notes == ()
    notes = indexed(folder, force=True).notes
    assert len(notes) == 1
    assert notes[0].startswith("shard-000002.tar: its content changed, but neither its size")


def test_lost_shards_and_repeated_keys_are_said(tmp_path):
    folder = tmp_path / "vqa" / "train"
    for number, keys in enumerate((["a", "b"], ["c"], ["b", "d", "a"])):
        write_shard(folder, number, [(key, {"json": b"{}"}) for key in keys])
    (note,) = indexed(folder).notes
    assert note.startswith("2 samples have the key of an earlier one, such as '")
    assert note.split("'")[1] in ("a", "b")
    assert "shard-000000.tar and shard-000002.tar" in note
    _, problems = verify(folder)
    said = {(p.sample, p.what) for p in problems if "the key is also in" in p.what}
    assert said == {(key, "the key is also in shard-000000.tar") for key in "ab"}
    (folder / "shard-000002.tar").unlink()
    assert indexed(folder).notes == ("shard-000002.tar: was listed in the manifest and is gone",)


def test_task_and_split(tmp_path):
    folder = tmp_path / "somewhere"
    write_shard(folder, 0, [("a", {"json": b"{}"})])
    with pytest.raises(ValueError, match=r"somewhere: task .* is unknown; give --task pretrain"):
        indexed(folder)
    report = indexed(folder, task="vqa", split="val")
    assert (report.content["task"], report.content["split"]) == ("vqa", "val")
    report = indexed(folder)  # as before
    assert (report.content["task"], report.content["split"]) == ("vqa", "val")
    report = indexed(folder, task="captioning")
    assert (report.content["task"], report.content["schema"]) == ("captioning", "captioning")


def test_first_manifests_and_indexes_are_renewed(write_shards):
    """Version 1 of both, as earlier releases wrote them: values of the maker stay."""
    folder = write_shards("vqa", 12)
    new = load_manifest(folder)
    path = folder / MANIFEST_NAME
    old = json.loads(path.read_bytes()) | {"version": 1}
    for name in ("members", "keys_hash", "filter"):
        del old[name]
    path.write_text(json.dumps(old))
    for shard in folder.glob("*.idx"):
        header = b'{"version": 1}'
        shard.write_bytes(b"ESPTARIX" + len(header).to_bytes(8, "little") + header)
    with pytest.raises(ShardError, match="manifest version 1"):
        load_manifest(folder)
    assert indexed(folder).notes == ()
    assert load_manifest(folder) == new


def test_what_img2dataset_writes(tmp_path):
    folder = img2dataset_folder(tmp_path / "cc3m" / "00")
    report = indexed(folder)
    manifest = load_manifest(folder)
    assert report.notes == ()
    assert (manifest.task, manifest.split, manifest.samples) == ("pretrain", "train", 6)
    assert manifest.extra == {"schema": "pretrain", "layout": "img2dataset"}
    assert manifest.members == {"jpg": 6, "json": 6, "txt": 6}
    counts, problems = verify(folder)
    assert (counts["samples"], problems) == (6, [])
    (folder / "00001_stats.json").write_text('{"successes": 5}')
    assert indexed(folder).notes == ("00001.tar: 3 samples, but 00001_stats.json says 5",)


def test_an_empty_caption_of_img2dataset_is_a_problem(tmp_path):
    folder = tmp_path / "x"
    for number, text in enumerate((b"", b" ", b"\xff", b"fine")):
        members = {"jpg": picture(1), "txt": text, "json": b"{}"}
        write_shard(folder, number, [(f"k{number}", members)])
    indexed(folder)
    _, problems = verify(folder, processes=2)
    said = [(problem.sample, problem.what.split("(")[0]) for problem in problems]
    empty = "the txt member is missing or empty"
    assert said == [("k0", empty), ("k1", empty), ("k2", "txt: not UTF-8 ")]


def test_a_json_member_that_training_cannot_read_is_a_problem(tmp_path):
    folder = tmp_path / "x"
    nested, half = b"[" * 100_000, b'{"image_id": "1", "captions": ["\\ud83d"]}'
    for number, raw in enumerate((nested, half, b"{}")):
        members = {"jpg": picture(1), "txt": b"a caption", "json": raw}
        write_shard(folder, number, [(f"k{number}", members)])
    indexed(folder)
    _, problems = verify(folder)
    assert [problem.sample for problem in problems] == ["k0", "k1"]
    assert "is not valid" in problems[0].what and "surrogate" in problems[1].what


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz"])
def test_compressed_shards_beside_others_are_refused(tmp_path, suffix):
    folder = tmp_path / "my vqa" / "train"
    folder.mkdir(parents=True)
    with tarfile.open(folder / f"x{suffix}", "w:gz") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(ShardError) as refused:
        data_folders(tmp_path)
    command = str(refused.value).split("decompress all of them: ")[1]
    assert command == f"gunzip '{folder}'/*{suffix} && espalier data index '{folder}'"
    write_shard(folder, 0, [("a", {"json": b"{}"})])
    with pytest.raises(ShardError, match="decompress all of them"):
        indexed(folder)
    # The way out works as it is written.
    subprocess.run(["sh", "-c", command.split(" && ")[0]], check=True)
    assert indexed(folder, task="vqa").content["samples"] == 2


def test_a_filter_stays_while_the_shards_do(write_shards, capsys):
    folder = write_shards("vqa", 25)
    settle(folder)
    kept = np.arange(25) % 3 > 0
    write_keep(folder, kept, {"min_side": 9}, {"min_side": 9})
    before = load_manifest(folder)
    assert run("index", str(folder)) == 0
    assert "16 of 25 samples in 3 shards" in capsys.readouterr().out
    assert load_manifest(folder) == before
    flip(folder / "shard-000000.tar", 600)
    with pytest.raises(ShardError, match=r"min_side.*give the filter options again, or --no-filte"):
        run("index", str(folder))
    assert load_manifest(folder) == before  # nothing was written
    assert run("index", str(folder), "--no-filter") == 0
    assert load_manifest(folder).samples == 25
    with pytest.raises(ValueError, match="--no-filter"):
        run("index", str(folder), "--no-filter", "--min-side", "3")


def test_filter_options_reach_the_filters(write_shards, capsys):
    folder = write_shards("pretrain", 8)
    assert run("index", str(folder), "--drop-duplicates", "--min-side", "10") == 0
    assert run("index", str(folder), "--min-words", "4", "--processes", "1") == 0
    manifest = load_manifest(folder)
    assert manifest.filter is not None
    assert manifest.filter["rules"]["min_words"] == 4
    assert "min_side" not in manifest.filter["rules"] or not manifest.filter["rules"]["min_side"]
    assert f"{folder}: 8 samples kept" in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(ValueError, match="leave no sample"):
        run("index", str(folder), "--min-side", "10000")
    assert load_manifest(folder) == manifest  # the earlier filter stays


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_write_what_one_process_writes(write_shards, on_ranks, ranks):
    folder = write_shards("vqa", 25)
    alone = indexed(folder)
    for path in folder.glob("*.idx"):
        path.unlink()
    (folder / MANIFEST_NAME).unlink()
    outcomes = on_ranks(ranks, lambda: index_folder(folder, task="vqa", split="train", processes=1))
    assert outcomes[0].content["keys_hash"] == alone.content["keys_hash"]
    assert outcomes[0].content["shards"] == alone.content["shards"]
    assert outcomes[0].read == 3
    assert outcomes[1:] == [None] * (ranks - 1)


def test_a_bad_shard_on_one_rank_ends_all_and_writes_nothing(write_shards, on_ranks):
    folder = write_shards("vqa", 25)
    before = (folder / MANIFEST_NAME).read_bytes()
    os.truncate(folder / "shard-000001.tar", 1500)
    outcomes = on_ranks(2, lambda: index_folder(folder, processes=1))
    assert isinstance(outcomes[1], ShardError)
    assert isinstance(outcomes[0], RankError)
    assert "shard-000001.tar" in str(outcomes[0])
    assert (folder / MANIFEST_NAME).read_bytes() == before


def test_verify_names_the_damaged_member(write_shards):
    folder = write_shards("vqa", 25)
    path = folder / "shard-000001.tar"
    with tarfile.open(path) as tar:
        member = tar.getmember("s00013.json")
    flip(path, member.offset_data + 1)
    counts, problems = verify(folder)
    assert counts == {"folders": 1, "shards": 3, "samples": 25}
    assert [problem.sample for problem in problems] == ["", "s00013"]
    assert "content hash" in problems[0].what
    assert problems[1].what.startswith("member json (")
    assert "damaged: checksum" in problems[1].what


def test_verify_in_processes_finds_the_same(write_shards):
    def spoil(number, sample):
        if number in (4, 22):
            sample["jpg"] = sample["jpg"][:50]

    folder = write_shards("vqa", 25, change=spoil)
    one, two = verify(folder, 1), verify(folder, 2)
    assert one == two
    assert [problem.sample for problem in one[1]] == ["s00004", "s00022"]
