"""One pass over the same shards by each contestant. Every function gives the keys of each batch.

Recipes:
    canonical   as each library's own documentation decodes and augments images: PIL, torchvision's v1
                transforms, float32, normalised on the CPU
    same        for all: simplejpeg, the crop of `CropAssembler`, uint8 batches
    pretrain    everything that a pre-training batch needs: RandAugment, tokens, masks; "canonical" is
                X-VLM's published loop (PIL, one tokenizer call a sample), "same" our stages
"""

from __future__ import annotations

import dataclasses
import io
import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader

from data_pipeline.batches import Batch
from data_pipeline.collate import Assembler, Item, PretrainAssembler
from data_pipeline.decode import Picture
from data_pipeline.loader import build_loader
from data_pipeline.records import parse_record
from data_pipeline.text import Masking, TextEncoder, clean_text, load_tokenizer
from data_pipeline.transforms import Augmentation, crop, mirror, random_resized_box, resize
from data_pipeline.transforms import sample_random as generator_of

__all__ = ["BATCH", "CONTESTANTS", "SIZE", "crop_picture"]

BATCH, SIZE, SEED = 64, 256, 7
SCALE = (0.2, 1.0)
BUFFER = 1000
Keys = Iterator[list[str]]


def crop_picture(raw: bytes, rng: random.Random):
    """(SIZE, SIZE, 3) uint8: decoding, RandomResizedCrop and a mirror. What all do in "same"."""
    picture = Picture(raw)
    height, width = picture.shape[:2]
    box = random_resized_box(width, height, SCALE, rng)
    image = resize(crop(picture, *box, least=SIZE), SIZE, SIZE)
    return mirror(image) if rng.random() < 0.5 else image


def canonical_transform() -> Callable[[Image.Image], torch.Tensor]:
    """As published: torchvision's v1 transforms on PIL pictures, float32."""
    from torchvision import transforms

    return transforms.Compose([
        transforms.RandomResizedCrop(SIZE, SCALE, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)),
    ])  # fmt: skip


class CropSample:
    """`crop_picture` with a generator of its own for each picture; (3, SIZE, SIZE) uint8."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, raw: bytes) -> torch.Tensor:
        self.count += 1
        return torch.from_numpy(crop_picture(raw, generator_of(SEED, self.count))).permute(2, 0, 1)


def stack(samples: list[tuple[str, torch.Tensor, Any]]) -> tuple[list[str], torch.Tensor]:
    """Keys and images of a batch."""
    keys, images, _ = zip(*samples, strict=True)
    return list(keys), torch.stack(images)


@cache
def _tokenizer(folder: Path):
    return load_tokenizer(folder)


# -- ours -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CropAssembler(Assembler):
    """Only images: decoding, crop, mirror."""

    def _draw(self, sample: dict[str, Any], rng: random.Random) -> Item:
        picture = sample["image"]
        height, width = picture.shape[:2]
        box = random_resized_box(width, height, SCALE, rng)
        image = resize(crop(picture, *box, least=SIZE), SIZE, SIZE)
        image = mirror(image) if rng.random() < 0.5 else image
        return Item(image, sample["__key__"], sample["__position__"], sample["__valid__"])

    def collate(self, items) -> Batch:
        return Batch(
            images=self._images(items),
            image_index=torch.arange(len(items)),
            valid=torch.tensor([item.valid for item in items]),
            keys=tuple(item.key for item in items),
        )


def _one_pass(folder: Path, workers: int, change: Callable[[Any], Assembler]) -> Keys:
    """One epoch in training's order. A training stream has no end, and its workers would have
    prepared batches beyond the epoch when it is left, which nobody counts."""
    loader = build_loader(
        "pretrain", folder, tokenizer=_tokenizer(folder), batch=BATCH, train=True, seed=SEED,
        image_size=SIZE, augment="pretrain", workers=workers,
    )  # fmt: skip
    loader._assembler = change(loader._assembler)
    if not loader._train:
        raise RuntimeError("the loader has no training order to be cut to one epoch")
    loader._train = False
    for batch in loader:
        yield [key for key, valid in zip(batch.keys, batch.valid.tolist(), strict=True) if valid]


def ours_same(folder: Path, workers: int) -> Keys:
    return _one_pass(
        folder, workers, lambda old: CropAssembler(old.text, old.augmentation, old.seed, old.train)
    )


def ours_pretrain(folder: Path, workers: int) -> Keys:
    return _one_pass(folder, workers, lambda old: old)


# -- webdataset -----------------------------------------------------------------------------------


def _webdataset(folder: Path):
    import webdataset as wds

    tars = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = wds.WebDataset(tars, shardshuffle=len(tars), seed=SEED, empty_check=False)
    return dataset.shuffle(BUFFER)


def _web_loader(dataset, workers: int) -> Keys:
    import webdataset as wds

    for keys, *_ in wds.WebLoader(dataset, batch_size=None, num_workers=workers):
        yield list(keys)


def webdataset_canonical(folder: Path, workers: int) -> Keys:
    dataset = _webdataset(folder).decode("pil").to_tuple("__key__", "jpg", "json")
    dataset = dataset.map_tuple(lambda key: key, canonical_transform(), lambda record: 0)
    return _web_loader(dataset.batched(BATCH), workers)


def webdataset_same(folder: Path, workers: int) -> Keys:
    dataset = _webdataset(folder).to_tuple("__key__", "jpg", "json")
    dataset = dataset.map_tuple(lambda key: key, CropSample(), json.loads)
    return _web_loader(dataset.batched(BATCH, collation_fn=stack), workers)


class PublishedPretrain:
    """X-VLM's sample: PIL RandAugment by timm's operations, then float32; tokens and mask one by one."""

    def __init__(self, folder: Path) -> None:
        from torchvision import transforms as t

        bicubic = t.InterpolationMode.BICUBIC
        self.tokenizer = _tokenizer(folder)
        self.masking = Masking(self.tokenizer, 0.25, 8)
        self.before = t.Compose([t.RandomResizedCrop(SIZE, SCALE, interpolation=bicubic),
                                 t.RandomHorizontalFlip()])  # fmt: skip
        self.after = canonical_transform().transforms[2:]

    def augment(self, image: Image.Image) -> Image.Image:
        """Two of ten operations, each applied half of the time, at magnitude 7."""
        from timm.data import auto_augment as timm

        sign = random.choice((-1, 1))
        options = {"resample": Image.Resampling.BILINEAR, "fillcolor": (128, 128, 128)}
        operations: list[Callable[[Image.Image], Image.Image]] = [
            lambda im: im,
            timm.auto_contrast,
            timm.equalize,
            lambda im: timm.brightness(im, 1.36),
            lambda im: timm.sharpness(im, 1.36),
            lambda im: timm.shear_x(im, sign * 0.21, **options),
            lambda im: timm.shear_y(im, sign * 0.21, **options),
            lambda im: timm.translate_x_abs(im, sign * 7.0, **options),
            lambda im: timm.translate_y_abs(im, sign * 7.0, **options),
            lambda im: timm.rotate(im, sign * 21.0, **options),
        ]
        for operation in random.choices(operations, k=2):
            if random.random() < 0.5:
                image = operation(image)
        return image

    def __call__(self, sample: dict[str, Any]) -> tuple[str, torch.Tensor, torch.Tensor]:
        image: Any = self.augment(self.before(sample["jpg"]))
        for step in self.after:
            image = step(image)
        text = clean_text(random.choice(sample["json"]["captions"]), 40)
        row = self.tokenizer(text, padding="max_length", truncation=True, max_length=40)
        ids = row["input_ids"][: sum(row["attention_mask"])]
        masked = self.masking(ids, random.Random(random.random())).ids
        pad = [0] * (40 - len(ids))
        return sample["__key__"], image, torch.tensor([row["input_ids"], masked + pad])


def webdataset_canonical_pretrain(folder: Path, workers: int) -> Keys:
    dataset = _webdataset(folder).decode("pil").map(PublishedPretrain(folder))
    return _web_loader(dataset.batched(BATCH), workers)


class OurStages:
    """Our draw as a stage of webdataset."""

    def __init__(self, assembler: PretrainAssembler) -> None:
        self.assembler, self.count = assembler, 0

    def __call__(self, sample: dict[str, Any]) -> Item:
        self.count += 1
        record = parse_record("pretrain", sample["json"], sample["__url__"], sample["__key__"])
        more = {"__position__": self.count, "__attempt__": 0, "__valid__": True}
        more |= {"record": record, "image": Picture(sample["jpg"])}
        return self.assembler.draw(sample | more)


def webdataset_same_pretrain(folder: Path, workers: int) -> Keys:
    tokenizer = _tokenizer(folder)
    assembler = PretrainAssembler(
        TextEncoder(tokenizer, 40), Augmentation("pretrain", SIZE), SEED, True,
        Masking(tokenizer, 0.25, 8),
    )  # fmt: skip
    import webdataset as wds

    dataset = _webdataset(folder).map(OurStages(assembler))
    dataset = dataset.batched(BATCH, collation_fn=assembler.collate)
    for batch in wds.WebLoader(dataset, batch_size=None, num_workers=workers):
        yield list(batch.keys)


# -- Energon --------------------------------------------------------------------------------------


def _energon(folder: Path, workers: int, decoded: bool) -> Keys:
    from megatron import energon

    transform = canonical_transform() if decoded else CropSample()

    @energon.edataclass
    class Pictured(energon.Sample):
        image: Any
        record: Any

    def cook(sample: dict[str, Any]) -> Pictured:
        record = sample["json"] if decoded else json.loads(sample["json"])
        return Pictured(**energon.basic_sample_keys(sample), image=sample["jpg"], record=record)

    class Encoder(energon.DefaultTaskEncoder):
        decoder = energon.SampleDecoder(image_decode="pilrgb") if decoded else None
        cookers = [energon.Cooker(energon.stateless(cook))]  # noqa: RUF012

        # The canonical augmentation draws from global generators; Energon restores their seeds.
        @energon.stateless(restore_seeds=decoded)
        def encode_sample(self, sample: Pictured) -> tuple:
            return Named(sample.__key__, transform(sample.image), sample.record)

        @energon.stateless
        def batch(self, samples: list) -> tuple:
            return stack([(s.key, s.image, s.record) for s in samples])

    @dataclasses.dataclass
    class Named:
        key: str
        image: torch.Tensor
        record: Any

    config = energon.WorkerConfig(rank=0, world_size=1, num_workers=workers)
    dataset = energon.get_train_dataset(
        folder.with_name(folder.name + "-energon"), batch_size=BATCH, shuffle_buffer_size=BUFFER,
        max_samples_per_sequence=100, worker_config=config, task_encoder=Encoder(), repeat=False,
    )  # fmt: skip
    for keys, _ in energon.get_loader(dataset):
        # Energon's keys carry the shard's name.
        yield [key.rsplit("/", 1)[-1] for key in keys]


def energon_canonical(folder: Path, workers: int) -> Keys:
    return _energon(folder, workers, decoded=True)


def energon_same(folder: Path, workers: int) -> Keys:
    return _energon(folder, workers, decoded=False)


# -- Hugging Face datasets --------------------------------------------------------------------------


def _hugging_face(folder: Path, workers: int, decoded: bool) -> Keys:
    import datasets

    datasets.disable_progress_bars()
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    stream = datasets.load_dataset(
        "webdataset", data_files={"train": tars}, split="train", streaming=True
    )
    if not decoded:
        stream = stream.cast_column("jpg", datasets.Image(decode=False))
    transform = canonical_transform() if decoded else CropSample()

    def prepare(sample: dict[str, Any]) -> dict[str, Any]:
        picture = sample["jpg"] if decoded else sample["jpg"]["bytes"]
        return {"key": sample["__key__"], "image": transform(picture)}

    stream = stream.shuffle(seed=SEED, buffer_size=BUFFER)
    stream = stream.map(prepare, remove_columns=stream.column_names)
    loader = DataLoader(
        stream, batch_size=BATCH, num_workers=workers,
        collate_fn=lambda batch: stack([(s["key"], s["image"], None) for s in batch]),
    )  # fmt: skip
    for keys, _ in loader:
        yield keys


def hugging_face_canonical(folder: Path, workers: int) -> Keys:
    return _hugging_face(folder, workers, decoded=True)


def hugging_face_same(folder: Path, workers: int) -> Keys:
    return _hugging_face(folder, workers, decoded=False)


# -- the floor ------------------------------------------------------------------------------------


def decode_only(folder: Path, workers: int) -> Keys:
    """Nothing but `crop_picture` on pictures that are in memory: what no loader can be below."""
    raws = [io.BytesIO(raw).getvalue() for raw in _pictures(folder)]
    yield []  # what was before this is not counted
    for number, raw in enumerate(raws):
        crop_picture(raw, generator_of(SEED, number))
        yield [f"{number:08d}"]


def _pictures(folder: Path) -> Iterator[bytes]:
    import tarfile

    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    file = tar.extractfile(member)
                    assert file is not None
                    yield file.read()


# (part of the issue, contestant) -> one pass.
CONTESTANTS: dict[tuple[str, str], Callable[[Path, int], Keys]] = {
    ("A", "webdataset"): webdataset_canonical,
    ("A", "energon"): energon_canonical,
    ("A", "datasets"): hugging_face_canonical,
    ("B", "ours"): ours_same,
    ("B", "webdataset"): webdataset_same,
    ("B", "energon"): energon_same,
    ("B", "datasets"): hugging_face_same,
    ("B", "decode only"): decode_only,
    ("C", "ours"): ours_pretrain,
    ("C", "webdataset canonical"): webdataset_canonical_pretrain,
    ("C", "webdataset"): webdataset_same_pretrain,
}
