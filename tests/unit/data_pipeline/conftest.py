"""Small shards written with webdataset's own ShardWriter, and a small tokenizer."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from data_pipeline import parallel
from data_pipeline.manifest_writer import write_manifest

WORDS = [
    "what",
    "colour",
    "is",
    "the",
    "shape",
    "left",
    "right",
    "of",
    "above",
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "triangle",
    "how",
    "many",
    "are",
    "there",
    "person",
    "a",
    "sentence",
    "play",
    "##ing",
    "##ed",
    "##s",
    "un",
    "##break",
    "##able",
]


def encode_picture(number: int, size: int = 24, kind: str = "JPEG") -> bytes:
    """A coloured picture whose content depends on `number`."""
    pixels = np.random.default_rng(number).integers(0, 255, (3, 3, 3), dtype=np.uint8)
    image = Image.fromarray(pixels.repeat(size // 3, 0).repeat(size // 3, 1))
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=95)
    return buffer.getvalue()


def vqa_json(number: int, questions: int = 3) -> dict[str, Any]:
    return {
        "image_id": str(number),
        "questions": [
            {
                "question_id": f"{number}-{k}",
                "question": f"What colour is the {WORDS[(number + k) % 15]}?",
                "answers": {"red": 0.75, "blue circle": 0.25} if k % 2 else {"green": 1.0},
                "type": "colour",
            }
            for k in range(questions)
        ],
    }


def pretrain_json(number: int, size: int = 24) -> dict[str, Any]:
    return {
        "image_id": str(number),
        "captions": [f"a {WORDS[(number + k) % 15]} circle is playing" for k in range(2)],
        "width": size,
        "height": size,
        "elems": [
            {"caption": "red square", "bb": [2, 3, 8, 9], "attributes": ["big", "blue"]},
            {"caption": ["green circle", "a circle"], "bb": [10, 11, 12.5, 13]},
            {"caption": "triangle", "bb": [0, 0, 5, 24]},
        ],
    }


class Meeting:
    """An MPI world whose ranks are threads."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.values: list[object] = [None] * size


class ThreadRank:
    """The part of mpi4py's communicator that parallel.py uses."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank = meeting, rank

    def Get_rank(self) -> int:
        return self.rank

    def Get_size(self) -> int:
        return self.meeting.size

    def barrier(self) -> None:
        self.meeting.barrier.wait(20)

    def allgather(self, value: object) -> list[object]:
        self.meeting.values[self.rank] = value
        self.barrier()
        values = list(self.meeting.values)
        self.barrier()
        return values

    def gather(self, value: object, root: int) -> list[object] | None:
        values = self.allgather(value)
        return values if self.rank == root else None


@pytest.fixture
def on_ranks(monkeypatch):
    """on_ranks(size, function) -> what function() returned or raised on each rank."""

    def run(size, function):
        meeting = Meeting(size)
        here = threading.local()
        monkeypatch.setattr(parallel, "_world", lambda: here.world)
        outcomes: list[object] = [None] * size

        def work(rank: int) -> None:
            here.world = ThreadRank(meeting, rank)
            try:
                outcomes[rank] = function()
            except Exception as error:
                outcomes[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return outcomes

    return run


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tokenizer/`, as in a data folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate(special + WORDS)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        unk_token="[UNK]",
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path):
    from data_pipeline.text import load_tokenizer

    return load_tokenizer(tokenizer_folder)


@pytest.fixture
def write_shards(tmp_path: Path) -> Callable[..., Path]:
    """write_shards(task, samples, per_shard=10, change=None, size=24) -> folder with shards and
    manifest.

    `change(number, sample)` may edit, or spoil, a sample before it is written.
    """

    def write(
        task: str,
        samples: int,
        per_shard: int = 10,
        change: Callable[[int, dict[str, Any]], None] | None = None,
        size: int = 24,
    ) -> Path:
        folder = tmp_path / task
        folder.mkdir()
        pattern = str(folder / "shard-%06d.tar")
        with wds.ShardWriter(pattern, maxcount=per_shard, verbose=0, mtime=0) as writer:
            for number in range(samples):
                record = vqa_json(number) if task == "vqa" else pretrain_json(number, size)
                sample = {
                    "__key__": f"s{number:05d}",
                    "jpg": encode_picture(number, size),
                    "json": json.dumps(record).encode(),
                }
                if change is not None:
                    change(number, sample)
                writer.write(sample)
        write_manifest(folder, task, "train", {"image_size": size})
        return folder

    return write
