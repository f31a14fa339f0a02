"""The `data` section of a run file: shards, their order, and how a batch is made from them."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

__all__ = ["DataConfig", "RegionConfig", "RemoteConfig", "SourceConfig"]

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RegionConfig:
    """Region batches (X-VLM). With `probability` a region step runs BEFORE the general step, as its
    own optimizer step; the learning-rate schedule counts general steps only.

    Attributes:
        images, rows: per rank and micro-batch.   global_images, global_rows: over all ranks; given
            together, they replace `images` and `rows`.
        unit_images: rows are drawn within units of so many neighbouring images, of which a rank
            takes whole ones, so that the global batch is the same on any number of ranks; 0 takes
            the smallest of at least 6 that fits.
    """

    probability: float = 0.0
    images: int = 48
    rows: int = 128
    global_images: int | None = None
    global_rows: int | None = None
    unit_images: int = 0
    max_regions: int = 5
    min_fraction_in_crop: float = 0.5


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SourceConfig:
    """One data set of a mixture: a folder or URL with manifest.json.

    Attributes:
        weight: its share of the samples; None is as many shares as it has samples.
    """

    path: str
    weight: float | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RemoteConfig:
    """Data that lie behind a URL (http, https, s3, gs, az), and the local cache of their shards.

    Attributes:
        cache: folder shared by the processes of a node; None reads ranges over the network.
        cache_gb: its size limit.   retries, timeout_s, deadline_s: of one transfer.
        allow_pipe: admit `pipe:COMMAND` sources, which run a program.
    """

    cache: str | None = None
    cache_gb: float = 100.0
    retries: int = 8
    timeout_s: float = 30.0
    deadline_s: float = 600.0
    allow_pipe: bool = False


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataConfig:
    """Shards and how a batch is made from them.

    Attributes:
        train, val: folders or URLs made by `espalier data ...` (with manifest.json); `train` may be
            a list of {path, weight}, a mixture.
        region_train: the same for region batches; None uses `train`.
        batch: images per rank and micro-batch.   global_batch: over all ranks; given, it replaces
            `batch`, so that a run can go on with another number of ranks unchanged.
        rows_per_image: texts drawn per image (not in pre-training).
        max_tokens: text length after padding.   max_words: words of a text that are kept, 0: as many
            as max_tokens.   prompt: what captions start with (captioning).
        augment: "none", "blocksworld", "pretrain" or "finetune".
        window_blocks, block: shuffle window (blocks of samples mixed at a time) and block size.
        groups: canonical groups of the order; 0 chooses (docs/data.md).   mix_period: samples in
            which the shares of a mixture are exact.
        faults: "raise", or "skip" (count, record, substitute) for samples that cannot be decoded.
    """

    train: str | tuple[SourceConfig, ...]
    val: str | None = None
    region_train: str | tuple[SourceConfig, ...] | None = None
    tokenizer: str | None = None
    batch: int = 64
    global_batch: int | None = None
    rows_per_image: int = 1
    max_tokens: int = 40
    max_words: int = 0
    prompt: str = "a picture of"
    max_answer_tokens: int = 8
    mlm_probability: float = 0.25
    mlm_max: int = 8
    augment: str = "none"
    workers: int = 0
    block: int = 256
    window_blocks: int = 64
    groups: int = 0
    mix_period: int = 1000
    faults: Literal["raise", "skip"] = "raise"
    max_fault_rate: float = 0.001
    region: RegionConfig = RegionConfig()
    remote: RemoteConfig = RemoteConfig()

    @property
    def folder(self) -> str:
        """The (first) data set of `train`, beside which tokenizer and answer list are looked for."""
        return self.train if isinstance(self.train, str) else self.train[0].path
