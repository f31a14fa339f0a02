"""The teacher: which precision and backend it takes, what it costs, and that its own stream keeps
the order of events.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from models import presets
from models.trimming import default_trimming, with_trimming
from models.xvlm import XVLM
from train.config import TeacherConfig, UserError
from train.runtime import injection
from train.runtime import teacher as teacher_module
from train.runtime.injection import inject_text_layers
from train.runtime.side_stream import SideStream
from train.runtime.teacher import Sample, Teacher, choose_dtype, parity

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "model"
    presets.create("blocksworld-micro-teacher").save_pretrained(path)
    return path


def load(folder: Path, **options: Any) -> Teacher:
    return Teacher.load(TeacherConfig(path=str(folder), **options), CPU)


# --- precision and backend ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "expected"), [((9, 0), torch.float16), ((6, 1), torch.float32)]
)
def test_half_precision_is_for_tensor_cores(monkeypatch, capability, expected) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_dtype("auto", torch.device("cuda")) == expected
    assert choose_dtype("bf16", torch.device("cuda")) == torch.bfloat16


def test_on_a_cpu_torch_runs_it_and_the_log_says_so(folder: Path, caplog) -> None:
    with caplog.at_level(logging.INFO):
        teacher = load(folder, dtype="fp32")
    assert teacher.backend == "torch"
    assert "torch.float32, backend torch" in caplog.text


def test_a_precision_that_overflows_is_passed_over(folder: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(teacher_module, "choose_dtype", lambda wanted, device: torch.float16)
    outputs = Sample.outputs

    def overflowing(self: Sample, model: Any) -> dict[str, torch.Tensor]:
        half = next(model.parameters()).dtype == torch.float16
        if half:
            return {"image": torch.tensor([1.0, torch.inf]), "text": torch.zeros(1)}
        return outputs(self, model)

    monkeypatch.setattr(Sample, "outputs", overflowing)
    assert load(folder).dtype == torch.bfloat16
    assert "image states are not finite" in caplog.text
    with pytest.raises(ValueError, match=r"torch.float16: image states.*teacher.dtype=fp32"):
        load(folder, dtype="fp16")


def test_deepspeed_falls_back_only_when_it_may_choose(folder: Path, monkeypatch, caplog) -> None:
    import deepspeed

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(deepspeed, "init_inference", broken)
    with pytest.raises(ValueError, match=r"teacher.backend=deepspeed .*no compiler"):
        load(folder, dtype="fp32", backend="deepspeed")
    model = presets.create("blocksworld-micro-teacher")
    moved = {}
    monkeypatch.setattr(type(model), "to", lambda self, **where: moved.update(where) or self)
    assert teacher_module._placed(model, torch.float16, torch.device("cuda"), "auto")[1] == "torch"
    assert moved == {"device": torch.device("cuda"), "dtype": torch.float16}
    assert "no compiler" in caplog.text


def test_deepspeeds_engine_computes_what_torch_does(folder: Path) -> None:
    plain, engine = (load(folder, dtype="fp32", backend=name) for name in ("torch", "deepspeed"))
    assert engine.backend == "deepspeed"
    sample = Sample.for_model(plain.model, CPU)
    found = parity(sample.outputs(engine.model), sample.outputs(plain.model))
    assert found == {"image": 0.0, "text": 0.0}


def test_what_runs_is_the_model_without_gradients_in_its_own_precision(folder: Path) -> None:
    teacher = load(folder, dtype="fp32")
    sample = Sample.for_model(teacher.model, CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16), teacher.running() as model:
        states = model.encode_image(sample.images).last
    assert states.dtype == torch.float32
    assert not states.requires_grad and not states.is_inference()
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_a_trimmed_teacher_is_imitated_with_all_its_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = {"heads": (2,) * 4, "head_dim": 16}
    plain = XVLM(presets.config("blocksworld-micro-teacher", vision=vision))
    trimming = default_trimming(plain.config, vision=(1,), guided=False, mode="gather")
    with_trimming(plain, trimming).save_pretrained(tmp_path / "trimmed")
    model = load(tmp_path / "trimmed", dtype="fp32").model
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    with torch.inference_mode():
        seen = model.encode_image(images)
        torch.testing.assert_close(seen.last, plain.eval().encode_image(images).last)
    assert seen.trimming is None


def test_no_teacher_path_names_the_key() -> None:
    with pytest.raises(ValueError, match="teacher.path"):
        Teacher.load(TeacherConfig(), CPU)


# --- cost -----------------------------------------------------------------------------------------


def test_metrics_are_of_the_time_since_the_last_call(folder: Path, monkeypatch) -> None:
    now = iter([0.0, 1.0, 2.0, 5.0, 8.0, 10.0, 14.0]).__next__
    monkeypatch.setattr(teacher_module.time, "perf_counter", now)
    teacher = load(folder, dtype="fp32")  # 0; the trial batch is not counted
    for _ in range(2):  # 1 to 2 and 5 to 8
        with teacher.running():
            pass
    weights = sum(4 * p.numel() for p in teacher.model.parameters())
    expected = {"seconds": 2.0, "share": 0.4, "weights_bytes": float(weights)}
    assert teacher.metrics() == expected  # at 10
    assert teacher.metrics() == expected | {"seconds": 0.0, "share": 0.0}


class FakeEvent:
    """A CUDA event on a clock that a test turns; done when the clock has passed it."""

    now = 0.0
    finished = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = -1.0

    def record(self, stream: Any = None) -> None:
        self.at = FakeEvent.now

    def query(self) -> bool:
        return FakeEvent.finished >= self.at

    def synchronize(self) -> None:
        FakeEvent.finished = max(FakeEvent.finished, self.at)

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.query() and end.query(), "read before the GPU got there"
        return (end.at - self.at) * 1e3


def test_gpu_time_comes_from_events_and_is_read_late() -> None:
    class Api:
        Event = FakeEvent

    FakeEvent.now = FakeEvent.finished = 0.0
    clock = teacher_module._CudaClock(Api)
    for start, length in ((1.0, 2.0), (4.0, 4.0)):
        FakeEvent.now = start
        with clock.running():
            FakeEvent.now = start + length
    assert len(clock._open) == 2, "nothing was done yet, so nothing may be read"
    assert clock.take()["seconds"] == pytest.approx(3.0)
    FakeEvent.now, FakeEvent.finished = 9.0, 99.0
    with clock.running():
        FakeEvent.now = 10.0
    assert not clock._open, "what is done is not kept"
    assert clock.take()["seconds"] == pytest.approx(1.0)


def test_peak_memory_is_what_a_run_adds() -> None:
    class Api:
        held, peak = 100, 5000  # a peak from before training

        def reset_peak_memory_stats(self, device: Any) -> None:
            self.peak = self.held

        def memory_allocated(self, device: Any) -> int:
            return self.held

        def max_memory_allocated(self, device: Any) -> int:
            return self.peak

    api = Api()
    memory = teacher_module._PeakMemory(CPU, api)
    for held, peak in ((100, 400), (900, 950), (200, 2000)):
        api.held = held
        with memory.running():
            api.peak = max(api.peak, peak)
    assert memory.bytes == 1800  # 300, then 50, then 1800


# --- injected kernels -----------------------------------------------------------------------------


def stand_in_for_kernels(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    """Layers that are off by `error`, in the place of the kernels that need a GPU."""

    def inject(model: Any, dtype: torch.dtype, device: torch.device) -> Any:
        layer = model.text.layers[model.config.text.text_layers - 1]
        plain = layer.forward
        layer.forward = lambda *a, **k: (plain(*a, **k)[0] * (1 + error), None, None)
        return lambda: delattr(layer, "forward")

    monkeypatch.setattr(teacher_module, "inject_text_layers", inject)


def test_kernels_that_compute_the_same_are_taken(folder: Path, monkeypatch, caplog) -> None:
    stand_in_for_kernels(monkeypatch, 0.0)
    with caplog.at_level(logging.INFO):
        teacher = load(folder, dtype="fp32", inject=True)
    assert "forward" in vars(teacher.model.text.layers[1])
    assert "they differ by image 0.0e+00, text 0.0e+00" in caplog.text


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_kernels_that_differ_are_refused_with_the_numbers(
    folder: Path, monkeypatch, error: float
) -> None:
    stand_in_for_kernels(monkeypatch, error)
    with pytest.raises(UserError, match=r"text (\d\.\de[+-]\d+|inf) .*inject_bound 0.01"):
        load(folder, dtype="fp32", inject=True)


@pytest.mark.parametrize("at_first_use", [False, True])
def test_kernels_that_cannot_be_built_are_refused_by_name(
    folder: Path, monkeypatch, at_first_use: bool
) -> None:
    undone = []

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Error building extension 'transformer_inference'")

    def inject(model: Any, dtype: torch.dtype, device: torch.device) -> Any:
        model.text.layers[0].forward = broken
        return lambda: undone.append(delattr(model.text.layers[0], "forward"))

    monkeypatch.setattr(teacher_module, "inject_text_layers", inject if at_first_use else broken)
    with pytest.raises(UserError, match="teacher.inject: .*Error building extension.* leave"):
        load(folder, dtype="fp32", inject=True)
    assert len(undone) == at_first_use


def test_kernels_are_refused_where_they_do_not_fit(folder: Path) -> None:
    with pytest.raises(UserError, match="need a GPU"):
        load(folder, dtype="fp32", inject=True)
    gpu = torch.device("cuda")
    model = presets.create("blocksworld-micro-teacher", text={"activation": "quick_gelu"})
    with pytest.raises(UserError, match="text layer 0 has the activation quick_gelu"):
        inject_text_layers(model, torch.float16, gpu)
    fusion = model.text.layers[model.config.text.text_layers]
    assert "cross-attention" in str(injection._misfit(fusion, "gelu"))


class FakeKernels(torch.nn.Module):
    """The layout of DeepSpeedTransformerInference: weights (in, out), one residual, post-norm."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, units = config.hidden_size, config.intermediate_size
        new = lambda *shape: torch.nn.Parameter(torch.zeros(shape), requires_grad=False)  # noqa: E731
        self.config, self.attention, self.mlp = config, torch.nn.Module(), torch.nn.Module()
        self.attention.attn_qkvw, self.attention.attn_qkvb = new(width, 3 * width), new(3 * width)
        self.attention.attn_ow, self.attention.attn_ob = new(width, width), new(width)
        self.mlp.attn_nw, self.mlp.attn_nb = new(width), new(width)
        self.mlp.inter_w, self.mlp.inter_b = new(width, units), new(units)
        self.mlp.output_w, self.mlp.output_b = new(units, width), new(width)
        self.norm_w, self.norm_b = new(width), new(width)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        F, c, m = torch.nn.functional, self.config, self.mlp
        qkv = x @ self.attention.attn_qkvw + self.attention.attn_qkvb
        q, k, v = (
            part.unflatten(-1, (c.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        mixed = mixed.transpose(1, 2).flatten(2) @ self.attention.attn_ow + self.attention.attn_ob
        x.add_(mixed)  # in place, as the kernels do
        x = F.layer_norm(x, x.shape[-1:], m.attn_nw, m.attn_nb, c.epsilon)
        y = F.gelu(x @ m.inter_w + m.inter_b) @ m.output_w + m.output_b
        return F.layer_norm(x + y, x.shape[-1:], self.norm_w, self.norm_b, c.epsilon)


def test_weights_and_masks_reach_the_kernels_in_their_layout(folder: Path, monkeypatch) -> None:
    from deepspeed.model_implementations.transformers import ds_bert

    monkeypatch.setattr(ds_bert, "DeepSpeedBERTInference", FakeKernels)
    teacher = load(folder, dtype="fp32")
    sample = Sample.for_model(teacher.model, CPU, rows=3)
    assert not bool(sample.mask.all()), "there must be padding"
    expected = sample.outputs(teacher.model)
    for layer in list(teacher.model.text.layers)[: teacher.model.config.text.text_layers]:
        layer.forward = injection._Injected(layer, 2, torch.float32, CPU)
    assert max(parity(sample.outputs(teacher.model), expected).values()) < 1e-6
    with pytest.raises(UserError, match="kd.attention=none"):
        layer(torch.zeros(1, 2, 32), None, trace=True)


# --- its own stream -------------------------------------------------------------------------------


class FakeStreams:
    """torch.cuda's stream calls, written down in the order in which they are made."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.main = self._stream("main")
        self.current: Any = self.main

    def _stream(self, name: str) -> Any:
        api = self

        class Stream:
            def wait_stream(self, other: Any) -> None:
                api.log.append(f"{name} waits for {other}")

            def wait_event(self, event: Any) -> None:
                api.log.append(f"{name} waits for event at {event.place}")

            def __str__(self) -> str:
                return name

        return Stream()

    def Stream(self) -> Any:
        return self._stream("side")

    def Event(self) -> Any:
        api = self

        class Event:
            def record(self, stream: Any) -> None:
                self.place = f"{stream}:{len(api.log)}"

        return Event()

    def current_stream(self) -> Any:
        return self.current

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def work(self, what: str) -> None:
        self.log.append(f"{self.current}: {what}")


def test_a_side_stream_waits_for_its_inputs_and_is_waited_for() -> None:
    api = FakeStreams()
    side = SideStream(api)
    api.work("inputs")
    side.inputs_ready()
    api.work("student")
    with side.running():
        api.work("teacher")
    api.work("losses")
    assert api.log == [
        "main: inputs",
        "main: student",
        "side waits for event at main:1",  # behind the inputs, not behind the student
        "side: teacher",
        "main waits for side",
        "main: losses",
    ]


def test_an_event_serves_one_block_only() -> None:
    """The second block reuses memory that the first one's readers may still need: it must wait for
    them, which an old event would not do.
    """
    api = FakeStreams()
    side = SideStream(api)
    side.inputs_ready()
    with side.running():
        pass
    with side.running():
        pass
    assert [line for line in api.log if line.startswith("side")] == [
        "side waits for event at main:0",
        "side waits for main",
    ]


def test_the_main_stream_waits_even_when_the_block_fails() -> None:
    api = FakeStreams()
    with pytest.raises(RuntimeError), SideStream(api).running():
        raise RuntimeError
    assert api.log[-1] == "main waits for side"
    assert api.current is api.main


def test_overlap_uses_the_stream_and_a_cpu_says_that_it_has_none(folder: Path, caplog) -> None:
    teacher = load(folder, dtype="fp32", overlap=True)
    assert "no second stream on cpu" in caplog.text
    teacher.inputs_ready()  # harmless
    api = FakeStreams()
    teacher._side = SideStream(api)
    teacher.inputs_ready()
    with teacher.running():
        api.work("teacher")
    assert api.log == ["side waits for event at main:0", "side: teacher", "main waits for side"]


def test_compiled_encoders_are_the_models_own(folder: Path, monkeypatch, caplog) -> None:
    modes: list[str] = []
    monkeypatch.setattr(
        "models.xvlm.XVLM.compile_encoders", lambda self, mode: modes.append(mode), raising=False
    )
    with caplog.at_level(logging.INFO):
        assert load(folder, dtype="fp32", compile="reduce-overhead").compiled
        assert not load(folder, dtype="fp32").compiled
    assert modes == ["reduce-overhead"]
    assert "torch.compile reduce-overhead" in caplog.text
