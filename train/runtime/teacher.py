"""The frozen teacher: evaluation mode, no gradients, half precision where the device is fast at it.

It is replicated on every rank and never a submodule of what the engine wraps, so it is in no
optimizer and in no checkpoint. Backend and precision are tried out before training: the first pair
that runs and stays finite is taken, and the log names it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import from_pretrained
from models.xvlm import XVLM
from train.config import TeacherConfig, UserError
from train.runtime.injection import inject_text_layers
from train.runtime.side_stream import SideStream

__all__ = ["Sample", "Teacher", "choose_dtype", "parity"]

_LOG = logging.getLogger(__name__)
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_TENSOR_CORES = 7  # compute capability from which fp16 products are fast (Volta)


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Resolve "auto": fp16 on CUDA with tensor cores, else fp32; on a CPU bf16 where it has matrix
    units for it, else fp32.

    Raises:
        ValueError: a half precision was asked for by name and this device cannot compute in it.
    """
    if device.type == "cuda":
        if wanted != "auto":
            return _DTYPES[wanted]
        fast = torch.cuda.get_device_capability(device)[0] >= _TENSOR_CORES
        return torch.float16 if fast else torch.float32
    if wanted == "auto":
        return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32
    if wanted == "fp16" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise ValueError(
            "teacher.dtype: fp16 is not supported by this CPU; use teacher.dtype=auto, bf16 or fp32"
        )
    return _DTYPES[wanted]


@dataclass(frozen=True)
class Sample:
    """A small input that goes through the teacher's encoders.

    Attributes:
        images: (N, 3, S, S) uint8.   ids: (B, L) int64.   mask: (B, L) bool, with padding.
    """

    images: Tensor
    ids: Tensor
    mask: Tensor

    @classmethod
    def for_model(cls, model: XVLM, device: torch.device, rows: int = 2) -> Sample:
        """Noise of the model's own sizes, the same at every call."""
        generator = torch.Generator().manual_seed(0)
        size, text = model.config.vision.image_size, model.config.text
        length = min(16, text.max_positions)
        lengths = torch.linspace(max(1, length // 2), length, rows).long()
        return cls(
            images=torch.randint(
                0, 256, (rows, 3, size, size), dtype=torch.uint8, generator=generator
            ).to(device),
            ids=torch.randint(0, text.vocab_size, (rows, length), generator=generator).to(device),
            mask=(torch.arange(length)[None] < lengths[:, None]).to(device),
        )

    @torch.no_grad()
    def outputs(self, model: XVLM) -> dict[str, Tensor]:
        """Final states of both encoders, float32; padding is zeroed, nobody reads it."""
        text = model.encode_text(self.ids, self.mask).last.float()
        return {
            "image": model.encode_image(self.images).last.float(),
            "text": torch.where(self.mask[..., None], text, 0.0),
        }


def parity(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """||found - expected|| / ||expected|| by name; infinity where `found` is not finite."""
    result = {}
    for name, reference in expected.items():
        error = (found[name].float() - reference.float()).norm()
        relative = float(error / reference.float().norm().clamp_min(1e-12))
        result[name] = relative if relative == relative else float("inf")
    return result


class Teacher:
    """A frozen model and how to run it.

        teacher.inputs_ready()             # optional: from here on the teacher may run beside us
        with teacher.running() as model:
            ...                            # no gradients, the teacher's own precision

    Attributes:
        model: the model, in `dtype`, in evaluation mode, without gradients.
        backend: "deepspeed" (`deepspeed.init_inference`) or "torch".
        compiled: its encoders go through torch.compile.
    """

    def __init__(
        self,
        model: XVLM,
        dtype: torch.dtype,
        device: torch.device,
        backend: str,
        *,
        compile: str = "none",
        overlap: bool = False,
    ) -> None:
        self.dtype, self.device = dtype, device
        self.model, self.backend = _placed(
            model.eval().requires_grad_(False), dtype, device, backend
        )
        self.compiled = compile != "none"
        if self.compiled:
            self.model.compile_encoders(compile)
        on_gpu = device.type == "cuda"
        if overlap and not on_gpu:
            _LOG.warning("teacher.overlap: there is no second stream on %s; ignored", device.type)
        self._side = SideStream(torch.cuda) if overlap and on_gpu else None
        self._clock: _CpuClock | _CudaClock = _CudaClock() if on_gpu else _CpuClock()
        self._peak = _PeakMemory(device) if on_gpu else None
        self._weights = sum(
            tensor.numel() * tensor.element_size()
            for tensor in (*self.model.parameters(), *self.model.buffers())
        )
        _LOG.info(
            "teacher: %s, %s, backend %s, %.1f MB%s%s", self.model.config.name, dtype,
            self.backend, self._weights / 1e6, f", torch.compile {compile}" * self.compiled,
            ", on its own stream" * (self._side is not None),
        )  # fmt: skip

    @classmethod
    def load(cls, config: TeacherConfig, device: torch.device) -> Teacher:
        """The first precision that works: "auto" goes on from fp16 to bf16 to fp32.

        Raises:
            FileNotFoundError: `teacher.path` holds no model.
            ValueError: it is not given, or no allowed backend and precision runs here.
            UserError: injected kernels were asked for and do not run here, or do not compute what the
                model does.
        """
        if config.path is None:
            raise ValueError("teacher.path: this stage distils and needs a teacher model folder")
        first = choose_dtype(config.dtype, device)
        ladder = list(_DTYPES.values())
        dtypes = ladder[ladder.index(first) :] if config.dtype == "auto" else [first]
        troubles = []
        for dtype in dtypes:
            # From the file each time: weights that went through fp16 have lost range.
            model = from_pretrained(Path(config.path))
            if model.config.trimming is not None:
                model.set_trimming("off")  # what is imitated has all tokens
            teacher = cls(
                model,
                dtype,
                device,
                config.backend,
                compile=config.compile,
                overlap=config.overlap,
            )
            trouble = teacher._trouble()
            if trouble is None:
                if config.inject:
                    teacher._inject(config.inject_bound)
                return teacher
            troubles.append(f"{dtype}: {trouble}")
            _LOG.warning("teacher: %s cannot be used: %s", dtype, trouble)
        raise ValueError(
            f"teacher.path {config.path}: the teacher does not run on {device}: "
            f"{'; '.join(troubles)}; try teacher.dtype=fp32 and teacher.backend=torch"
        )

    def _trouble(self) -> str | None:
        """Why this teacher cannot be used, from one small batch, or None."""
        try:
            with self._computing():
                outputs = Sample.for_model(self.model, self.device).outputs(self.model)
        except (RuntimeError, NotImplementedError) as error:
            return f"{type(error).__name__}: {error}"
        bad = [name for name, value in outputs.items() if not bool(value.isfinite().all())]
        return f"{' and '.join(bad)} states are not finite" if bad else None

    def _inject(self, bound: float) -> None:
        """Puts DeepSpeed's fused kernels into the text layers, if they compute the same."""
        sample = Sample.for_model(self.model, self.device)
        with self._computing():
            expected = sample.outputs(self.model)
        undo: Callable[[], None] = lambda: None  # noqa: E731
        try:
            undo = inject_text_layers(self.model, self.dtype, self.device)
            with self._computing():
                found = parity(sample.outputs(self.model), expected)
        except UserError:
            raise
        except Exception as error:  # they are compiled here and now: compilers, linkers, versions
            undo()
            raise UserError(
                "teacher.inject: DeepSpeed's kernels cannot be built or do not run here "
                f"({type(error).__name__}: {error}); leave teacher.inject out"
            ) from error
        told = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
        if max(found.values()) > bound:
            undo()
            raise UserError(
                f"teacher.inject: the injected kernels differ from the model by {told} (relative), "
                f"more than teacher.inject_bound {bound:g}; leave teacher.inject out"
            )
        _LOG.info("teacher: kernels injected into the text layers; they differ by %s", told)

    # --- running ----------------------------------------------------------------------------------

    @property
    def overlaps(self) -> bool:
        """It runs on a stream of its own."""
        return self._side is not None

    def inputs_ready(self) -> None:
        """All inputs of the coming `running()` exist or are enqueued: with teacher.overlap it runs
        beside whatever is enqueued in between. Without overlap nothing happens.
        """
        if self._side is not None:
            self._side.inputs_ready()

    @contextmanager
    def running(self) -> Iterator[XVLM]:
        """No gradients, no autocast of the student's: the teacher computes in its own dtype.

        `no_grad`, not `inference_mode`: the losses save teacher outputs for the student's backward.
        """
        peak = nullcontext() if self._peak is None else self._peak.running()
        with self._computing(), self._clock.running(), peak:
            yield self.model

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """`running` without counting what it costs."""
        beside = nullcontext() if self._side is None else self._side.running()
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), beside:
            yield

    def metrics(self) -> dict[str, float]:
        """What the teacher cost since the last call; waits for its kernels on a GPU.

        seconds: of one run, on average.   share: of the wall time (beside the student's work where
        it overlaps).   weights_bytes; activations_bytes: peak of one run (GPU only).
        """
        values = self._clock.take() | {"weights_bytes": float(self._weights)}
        if self._peak is not None:
            values["activations_bytes"] = float(self._peak.bytes)
        return values


def _placed(
    model: XVLM, dtype: torch.dtype, device: torch.device, backend: str
) -> tuple[XVLM, str]:
    """The model in its precision on its device, and the backend that put it there.

    "auto" takes DeepSpeed's inference engine on a GPU where it starts, and torch otherwise.

    Raises:
        ValueError: the backend was asked for by name and does not start.
    """
    if backend == "deepspeed" or (backend == "auto" and device.type == "cuda"):
        try:
            import deepspeed  # after DS_ACCELERATOR has been set

            # Without kernel injection: it knows layer classes of Hugging Face only, drops
            # cross-attention and never returns attention inputs (see injection.py).
            engine = deepspeed.init_inference(model, dtype=dtype)
            return engine.module.to(device=device, dtype=dtype), "deepspeed"
        except Exception as error:  # whatever its probing of devices and compilers raises
            if backend != "auto":
                raise ValueError(
                    f"teacher.backend=deepspeed does not start in {dtype} on {device} "
                    f"({type(error).__name__}: {error}); use teacher.backend=auto"
                ) from error
            _LOG.warning("teacher: deepspeed.init_inference failed, torch runs it: %s", error)
    return model.to(device=device, dtype=dtype), "torch"


class _CpuClock:
    """Seconds spent in runs."""

    def __init__(self) -> None:
        self._since, self._seconds, self._runs = time.perf_counter(), 0.0, 0

    @contextmanager
    def running(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - started
            self._runs += 1

    def take(self) -> dict[str, float]:
        now = time.perf_counter()
        share = self._seconds / max(now - self._since, 1e-9)
        values = {"seconds": self._seconds / max(self._runs, 1), "share": share}
        self._since, self._seconds, self._runs = now, 0.0, 0
        return values


class _CudaClock(_CpuClock):
    """The same from events on the stream that runs, so that nothing waits for the GPU."""

    def __init__(self, api: Any = torch.cuda) -> None:
        super().__init__()
        self._api = api
        self._open: deque[tuple[Any, Any]] = deque()

    @contextmanager
    def running(self) -> Iterator[None]:
        begin, end = self._api.Event(enable_timing=True), self._api.Event(enable_timing=True)
        begin.record()
        try:
            yield
        finally:
            end.record()
            self._open.append((begin, end))
            while self._open and self._open[0][1].query():  # done already: no need to keep them
                self._close()

    def _close(self) -> None:
        begin, end = self._open.popleft()
        self._seconds += begin.elapsed_time(end) / 1e3
        self._runs += 1

    def take(self) -> dict[str, float]:
        while self._open:
            self._open[0][1].synchronize()
            self._close()
        return super().take()


class _PeakMemory:
    """Peak of what a run allocates, results included.

    The device's peak counter is reset once, before the first run; later runs count where they set
    a new peak. So the run's own peak is exact for the first batch and a bound from below afterwards.
    """

    def __init__(self, device: torch.device, api: Any = torch.cuda) -> None:
        self.bytes = 0
        self._device, self._api, self._first = device, api, True

    @contextmanager
    def running(self) -> Iterator[None]:
        if self._first:
            self._api.reset_peak_memory_stats(self._device)
            self._first = False
        before = self._api.memory_allocated(self._device)
        peak = self._api.max_memory_allocated(self._device)
        yield
        after = self._api.max_memory_allocated(self._device)
        if after > peak:
            self.bytes = max(self.bytes, after - before)
