"""The whole data folder: determinism, disjointness, tokenizer, and the verbs that look at it."""

import argparse
import hashlib
import json
import tarfile

import numpy as np
import pytest

from data_pipeline import commands
from data_pipeline.blocksworld.build import TASKS, build_blocksworld, load_digests
from data_pipeline.blocksworld.questions import ANSWERS, TYPES
from data_pipeline.blocksworld.scenes import SPLITS
from data_pipeline.blocksworld.vocabulary import SPECIAL, vocabulary, write_tokenizer
from data_pipeline.index import load_index
from data_pipeline.manifest import load_manifest
from data_pipeline.records import parse_record
from data_pipeline.verify import read_members, verify

SMALL = {"scenes": 30, "val": 8, "test": 8, "image_size": 48, "per_shard": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("blocks") / "data"
    build_blocksworld(out, seed=3, **SMALL)
    return out


def hashes(root):
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def records(folder, task, split):
    """(key, members, record) of every sample."""
    manifest = load_manifest(folder / task / split)
    for number in range(len(manifest.shards)):
        path = manifest.path(number)
        index = load_index(path)
        data = path.read_bytes()
        for sample in range(len(index)):
            members = read_members(data, index, sample)
            key = index.key(sample)
            yield key, members, parse_record(task, members["json"], path.name, key)


def cli(*words):
    parser = argparse.ArgumentParser()
    commands.add_parsers(parser.add_subparsers(dest="verb"))
    return commands.run(parser.parse_args(["data", *map(str, words)]))


def test_folder_verifies_and_is_described(folder):
    counts, problems = verify(folder)
    assert problems == []
    content = json.loads((folder / "dataset.json").read_text())
    assert content["scenes"] == {"train": 30, "val": 8, "test": 8}
    assert content["samples"]["nlvr2"]["train"] == 15
    assert counts["samples"] == sum(sum(c.values()) for c in content["samples"].values())
    assert set(content["blind_accuracy_by_type"]) <= set(TYPES)
    asked = sum(len(r.questions) for _, _, r in records(folder, "vqa", "test"))
    assert asked == sum(content["questions"]["test"].values())
    assert json.loads((folder / "vqa" / "answers.json").read_text()) == list(ANSWERS)


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_number_of_processes(folder, tmp_path):
    build_blocksworld(tmp_path / "two", seed=3, processes=2, **SMALL)
    assert hashes(tmp_path / "two") == hashes(folder)


def test_another_seed_gives_other_scenes_and_the_same_vocabulary(folder, tmp_path):
    build_blocksworld(tmp_path / "b", seed=4, tasks=("vqa",), **SMALL)
    assert not (tmp_path / "b" / "pretrain").exists()
    name = "tokenizer/tokenizer.json"
    assert hashes(tmp_path / "b")[name] == hashes(folder)[name]
    one, other = (
        load_digests(folder / "scenes-train.npy"),
        load_digests(tmp_path / "b/scenes-train.npy"),
    )
    assert not np.isin(one, other).all()


def test_tasks_share_scenes_and_do_not_change_them(folder, tmp_path):
    build_blocksworld(tmp_path / "only", seed=3, tasks=("vqa",), **SMALL)
    for split in SPLITS:
        name = f"vqa/{split}/shard-000000.tar"
        assert (tmp_path / "only" / name).read_bytes() == (folder / name).read_bytes()
    pictures = {key: members["jpg"] for key, members, _ in records(folder, "pretrain", "train")}
    for key, members, _ in records(folder, "vqa", "train"):
        assert members["jpg"] == pictures[key]


def test_splits_are_disjoint_and_keys_unique(folder):
    digests = np.concatenate([load_digests(folder / f"scenes-{split}.npy") for split in SPLITS])
    assert len(np.unique(digests)) == 46
    for task in TASKS:
        keys = [key for split in SPLITS for key, _, _ in records(folder, task, split)]
        assert len(set(keys)) == len(keys)


def test_excluded_scenes_stay_out(folder, tmp_path):
    out = tmp_path / "fresh"
    exclude = [folder / f"scenes-{split}.npy" for split in SPLITS]
    # The same seed draws the same scenes first, so every single one must be redrawn.
    build_blocksworld(out, seed=3, tasks=("pretrain",), exclude=exclude, **SMALL)
    seen = np.concatenate([load_digests(path) for path in exclude])
    for split in SPLITS:
        assert not np.isin(load_digests(out / f"scenes-{split}.npy"), seen).any()


def test_exclude_files_are_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match="--exclude"):
        load_digests(tmp_path / "none.npy")
    np.save(tmp_path / "floats.npy", np.zeros(3))
    with pytest.raises(ValueError, match="uint64"):
        load_digests(tmp_path / "floats.npy")
    (tmp_path / "text.npy").write_text("hello")
    with pytest.raises(ValueError, match="scenes-SPLIT"):
        load_digests(tmp_path / "text.npy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("vqa", "dance")}, "dance"),
        ({"kind": "gif"}, "gif"),
        ({"image_size": 8}, "--image-size 8"),
        ({"scenes": 0}, "--scenes"),
        ({"mix": {"smell": 1.0}}, "smell|question mix"),
    ],
)
def test_bad_settings_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        build_blocksworld(tmp_path / "x", **{**SMALL, **change})


def test_a_complete_folder_is_not_overwritten(folder):
    with pytest.raises(ValueError, match="already holds"):
        build_blocksworld(folder, seed=3, **SMALL)


def test_leftovers_of_an_interrupted_build_are_removed(tmp_path):
    stale = tmp_path / "vqa" / "train" / "shard-000099.tar.partial"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"half")
    build_blocksworld(tmp_path, seed=3, tasks=("vqa",), **SMALL)
    assert not stale.exists() and verify(tmp_path)[1] == []


def test_tokenizer_knows_every_word(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
    ids = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id]
    assert [*ids, tokenizer.sep_token_id, tokenizer.mask_token_id] == [0, 1, 2, 3, 4]
    assert tokenizer("A RED circle")["input_ids"] == tokenizer("a red circle")["input_ids"]
    texts = list(ANSWERS)
    for task in TASKS:
        for _, _, record in records(folder, task, "train"):
            texts += [q.question for q in getattr(record, "questions", ())]
            texts += [s.sentence for s in getattr(record, "statements", ())]
            texts += [e.text for e in getattr(record, "expressions", ())]
            texts += getattr(record, "captions", ())
            for elem in getattr(record, "elements", ()):
                texts += [*elem.captions, *elem.attributes]
    for text in set(texts):
        tokens = tokenizer.tokenize(text)
        assert "[UNK]" not in tokens and len(tokens) == len(text.split()), text
    assert tokenizer.decode(tokenizer("a red circle")["input_ids"]) == "[CLS] a red circle [SEP]"


def test_vocabulary_is_whole_words_and_stable(tmp_path):
    tokens = vocabulary()
    assert tuple(tokens[:5]) == SPECIAL and len(set(tokens)) == len(tokens)
    write_tokenizer(tmp_path)
    assert (tmp_path / "vocab.txt").read_text().split("\n")[:-1] == tokens


def test_shards_are_plain_ustar(folder):
    with tarfile.open(folder / "nlvr2" / "train" / "shard-000000.tar") as tar:
        members = tar.getmembers()
        assert all(m.mtime == 0 and not m.pax_headers for m in members)
    assert members[0].name.endswith("-pair.0.jpg")
    raw = (folder / "nlvr2" / "train" / "shard-000000.tar").read_bytes()
    assert b"PaxHeader" not in raw


def test_the_verbs(tmp_path, capsys):
    out = tmp_path / "cli"
    size = ("--scenes", 6, "--val", 2, "--test", 2, "--image-size", 48, "--processes", 1)
    assert cli("blocksworld", "--out", out, *size, "--tasks", "vqa,nlvr2", "--format", "png") == 0
    assert "language-only baseline" in capsys.readouterr().out
    assert cli("verify", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    assert cli("inspect", out, "--json", "--show", 3) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["folders"][0]["members"] == {"0.png": 1, "1.png": 1, "json": 1}
    assert (out / "contact_sheet.png").stat().st_size > 1000
    before = load_manifest(out / "vqa" / "train").hash
    (out / "vqa" / "train" / "manifest.json").unlink()
    assert cli("index", out) == 0
    after = load_manifest(out / "vqa" / "train")
    assert (after.task, after.split, after.samples) == ("vqa", "train", 6)
    assert after.hash != before, "image_size is not known any more"


def flip(path, old, new):
    raw = path.read_bytes()
    assert old in raw and len(old) == len(new)
    path.write_bytes(raw.replace(old, new, 1))


def test_verify_lists_every_kind_of_damage(tmp_path, capsys):
    build_blocksworld(tmp_path, seed=3, tasks=("vqa",), **SMALL)
    train = tmp_path / "vqa" / "train"
    flip(train / "shard-000000.tar", b'"questions"', b'"questi0ns"')
    flip(train / "shard-000001.tar", b"\xff\xd8\xff", b"\x00\xd8\xff")
    (train / "shard-000002.tar").unlink()
    assert cli("verify", tmp_path) == 1
    assert "shard-000002.tar" in capsys.readouterr().out
    cli("index", tmp_path)
    assert cli("verify", tmp_path, "--json") == 1
    found = [p["what"] for p in json.loads(capsys.readouterr().out.split("\n", 3)[3])["problems"]]
    assert len(found) == 2 and "questions" in found[0] and "JPEG" in found[1]


def test_verify_sees_a_changed_byte_and_shared_scenes(tmp_path):
    build_blocksworld(tmp_path, seed=3, tasks=("vqa",), **SMALL)
    flip(tmp_path / "vqa" / "test" / "shard-000000.tar", b'"type":"colour"', b'"type":"colOur"')
    np.save(tmp_path / "scenes-val.npy", load_digests(tmp_path / "scenes-train.npy"))
    text = "\n".join(problem.line() for problem in verify(tmp_path)[1])
    assert "content hash" in text and "30 scenes are in val and in train" in text


def test_verify_without_shards(tmp_path):
    with pytest.raises(FileNotFoundError, match="no shards"):
        verify(tmp_path)
