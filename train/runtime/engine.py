"""The DeepSpeed engine: its settings made explicit and checked, the engine itself.

A file in ds_configs/ holds engine settings only. What the run file decides (batch, accumulation,
clipping, precision) is "auto" there and filled in here. DeepSpeed ignores unknown top-level keys
and half-understands "auto", so both are refused here (DeepSpeed 0.19.8, runtime/config.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from train.config import EngineConfig, RunConfig, UserError
from train.recipes_io import nearest
from train.runtime.optimizer import make_optimizer, parameter_groups

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

__all__ = [
    "build_engine",
    "engine_settings",
    "gathered",
    "parameter_groups",
    "zero_stage",
]

_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
_AUTO = "auto"
_OFFLOADS = ("offload_optimizer", "offload_param")
_PRECISION_BLOCKS = ("fp16", "bf16", "torch_autocast")

# Top-level keys a file may have; what the run file owns (optimizer, scheduler, train_batch_size) is
# not among them.
_ALLOWED: dict[str, frozenset[str] | None] = {
    "train_micro_batch_size_per_gpu": None,
    "gradient_accumulation_steps": None,
    "gradient_clipping": None,
    "steps_per_print": None,
    "zero_optimization": None,  # DeepSpeed itself refuses unknown keys in these two
    "fp16": None,
    "bf16": None,
    "torch_autocast": frozenset({"enabled", "dtype", "lower_precision_safe_modules"}),
    "checkpoint": frozenset(
        {"tag_validation", "load_universal", "use_node_local_storage", "parallel_write", "writer"}
    ),
    "data_types": frozenset(
        {"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"}
    ),
    "zero_allow_untested_optimizer": None,
    "zero_force_ds_cpu_optimizer": None,
    "communication_data_type": None,
    "prescale_gradients": None,
    "gradient_predivide_factor": None,
    "gradient_allreduce_op": None,
    "managed_gradient_accumulation": None,
    "disable_allgather": None,
    "disable_python_gc": None,
    "wall_clock_breakdown": None,
    "memory_breakdown": None,
    "dump_state": None,
    "log_level": None,
    "flops_profiler": frozenset(
        {
            "enabled",
            "recompute_fwd_factor",
            "profile_step",
            "module_depth",
            "top_modules",
            "detailed",
            "output_file",
        }
    ),
    "comms_logger": None,
    "activation_checkpointing": None,
    "aio": None,
    "compile": None,
}
_OURS = {
    "train_batch_size": "it follows from the batch, the accumulation and the number of processes: leave it out",
    "optimizer": "the optimizer comes from the run file's optim section: leave it out",
    "scheduler": "the learning rate comes from the run file's optim section: leave it out",
    "tensorboard": "the run directory has its own TensorBoard files: leave it out",
}


def engine_settings(config: RunConfig) -> dict[str, Any]:
    """The complete DeepSpeed settings of a run: every "auto" filled, every key known. Raises
    UserError.
    """
    path = _find(config.engine)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object of DeepSpeed settings")
    _check_keys(path, values)
    for key, (ours, source) in _decided(config).items():
        theirs = values.get(key, _AUTO)
        if theirs not in (_AUTO, ours):
            raise UserError(
                f'{path}: {key} is {theirs!r}, but {source} says {ours!r}; write "auto" there'
            )
        values[key] = ours
    _fill_precision(path, values, config.engine)
    zero = values.setdefault("zero_optimization", {"stage": 0})
    _fill_offload(path, zero, config.engine.offload)
    for block in _OFFLOADS:
        if (zero.get(block) or {}).get("pin_memory") == _AUTO:
            # Page-locked memory is for copies to a GPU.
            zero[block] = zero[block] | {"pin_memory": torch.cuda.is_available()}
    if zero.get("stage", 0) == 0:
        if config.engine.precision == "fp16":
            raise UserError(
                f"{path}: engine.precision=fp16 at ZeRO stage 0 takes a wrong first Adam step in "
                "DeepSpeed 0.19; use engine.config=zero1"
            )
        values["gradient_clipping"] = 0.0  # GuardedAdamW clips
    if zero_stage(values) == 3 and config.engine.compile != "none":
        raise UserError(
            f"{path}: engine.compile={config.engine.compile} does not go with ZeRO stage 3, whose "
            "hooks gather parameters in the middle of every graph: use engine.config=zero2, or "
            "engine.compile=none"
        )
    values.setdefault("zero_allow_untested_optimizer", True)
    values.setdefault("zero_force_ds_cpu_optimizer", False)  # `_cpu_optimizer` chooses
    left = _auto_keys(values)
    if left:
        raise UserError(
            f'{path}: {", ".join(left)}: "auto" is not known for this key; write the value'
        )
    return values


def zero_stage(settings: dict[str, Any]) -> int:
    """ZeRO stage of resolved settings."""
    return int(settings["zero_optimization"].get("stage", 0))


def _find(engine: EngineConfig) -> Path:
    named = _CONFIGS / f"{engine.config}.json"
    path = named if named.is_file() else Path(engine.config)
    if not path.is_file():
        known = sorted(file.stem for file in _CONFIGS.glob("*.json"))
        raise FileNotFoundError(
            f"engine.config {engine.config!r}: neither a file nor one of ds_configs/: "
            f"{', '.join(known)}{nearest(engine.config, known)}"
        )
    return path


def _check_keys(path: Path, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if key in _OURS:
            raise UserError(f"{path}: {key}: {_OURS[key]}")
        if key not in _ALLOWED:
            raise UserError(f"{path}: {key}: unknown DeepSpeed setting{nearest(key, _ALLOWED)}")
        inner = _ALLOWED[key]
        if inner is not None and isinstance(value, dict):
            for name in value:
                if name not in inner:
                    raise UserError(
                        f"{path}: {key}.{name}: unknown DeepSpeed setting{nearest(name, inner)}"
                    )


def _decided(config: RunConfig) -> dict[str, tuple[Any, str]]:
    return {
        "train_micro_batch_size_per_gpu": (config.data.batch, "data.batch in the run file"),
        "gradient_accumulation_steps": (
            config.engine.accumulate,
            "engine.accumulate in the run file",
        ),
        "gradient_clipping": (config.optim.clip, "optim.clip in the run file"),
    }


def _fill_precision(path: Path, values: dict[str, Any], engine: EngineConfig) -> None:
    """Turns on the one block of `engine.precision`. bf16 is autocast: parameters, and so small
    updates, stay fp32.
    """
    precision = engine.precision
    power = _scale_power(engine)
    wanted = {"fp32": None, "bf16": "torch_autocast", "fp16": "fp16"}[precision]
    for block in _PRECISION_BLOCKS:
        given = values.get(block, _AUTO)
        inner = {} if given == _AUTO else dict(given)
        enabled = inner.get("enabled", _AUTO)
        if enabled not in (_AUTO, block == wanted):
            raise UserError(
                f"{path}: {block}.enabled is {enabled}, but engine.precision in the run file is "
                f"{precision}; "
                f'write "auto" there'
            )
        inner["enabled"] = block == wanted
        if block == "torch_autocast":
            if inner.get("dtype", _AUTO) == _AUTO:
                inner["dtype"] = "bfloat16"
        elif block == "fp16" and block == wanted:
            inner = {"initial_scale_power": 16, "loss_scale_window": 1000} | inner
            if power is not None:
                inner["initial_scale_power"] = power
        values[block] = inner


def _scale_power(engine: EngineConfig) -> int | None:
    """log2 of engine.max_loss_scale, None without one. Raises UserError."""
    limit = engine.max_loss_scale
    if not limit:
        return None
    if engine.precision != "fp16":
        raise UserError(
            f"engine.max_loss_scale: there is no loss scale in {engine.precision}; leave it out or "
            "set engine.precision=fp16"
        )
    if limit < 1 or not math.log2(limit).is_integer():
        raise UserError(f"engine.max_loss_scale: {limit:g} is not a power of two, as 1024 is")
    return int(math.log2(limit))


def _fill_offload(path: Path, zero: dict[str, Any], offload: str) -> None:
    """Adds the blocks of engine.offload to those of the file. Raises UserError."""
    stage = int(zero.get("stage", 0))
    if offload == "none":
        if stage == 0 and _host_optimizer({"zero_optimization": zero}):
            raise UserError(f"{path}: zero_optimization.offload_optimizer needs stage 1, 2 or 3")
        return
    lowest = 3 if offload == "parameters" else 1
    if stage < lowest:
        raise UserError(
            f"engine.offload={offload} needs ZeRO stage {lowest} or higher, and {path} has stage "
            f"{stage}; use engine.config=zero{max(lowest, 2)}"
        )
    for block in _OFFLOADS[: 2 if offload == "parameters" else 1]:
        zero[block] = {"device": "cpu", "pin_memory": _AUTO} | (zero.get(block) or {})


def _host_optimizer(settings: dict[str, Any]) -> bool:
    """Optimizer states, and so its arithmetic, are in host memory."""
    block = settings["zero_optimization"].get("offload_optimizer") or {}
    return block.get("device", "none") != "none"


def _auto_keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _auto_keys(value, f"{prefix}{key}.")
        elif value == _AUTO:
            found.append(f"{prefix}{key}")
    return found


def build_engine(
    config: RunConfig, module: nn.Module, groups: list[dict[str, Any]]
) -> DeepSpeedEngine:
    """`deepspeed.initialize` with resolved settings. `torch.distributed` is initialised already
    (distributed.start).

    engine.activation_checkpointing and engine.compile are passed on to `module.student`.

    Args:
        module: usually an `EngineModule`.
        groups: from `parameter_groups`.

    Raises:
        UserError: settings that do not work, naming file and key.
    """
    import deepspeed
    from deepspeed.utils import logger
    from pydantic import ValidationError

    logger.setLevel(logging.WARNING)
    settings = engine_settings(config)
    student: Any = getattr(module, "student", module)
    if config.engine.activation_checkpointing:
        student.set_activation_checkpointing(True)
    optimizer = make_optimizer(
        groups, config.optim, zero_stage(settings), _host_optimizer(settings)
    )
    try:
        with _quiet_info():
            engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{_find(config.engine)}: {error.title}: {key}: {first['msg']}") from None
    if zero_stage(settings) == 3:
        _register_external(module)
    if config.engine.precision == "fp16":
        from train.runtime.loss_scale import bound_loss_scale

        bound_loss_scale(engine.optimizer, config.engine.max_loss_scale)
    if config.engine.compile != "none":
        # After the engine has put its hooks and its precision into the model.
        student.compile_encoders(config.engine.compile)
        module.replays_graphs = True  # type: ignore[assignment]
    return engine


@contextlib.contextmanager
def _quiet_info() -> Iterator[None]:
    """DeepSpeed logs its whole configuration at INFO while it initialises."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def _register_external(module: nn.Module) -> None:
    """Tells ZeRO-3 of parameters that a module uses in its forward and another one owns (tied
    weights): a method `external_parameters()` lists such (module, parameter) pairs.
    """
    from deepspeed import zero

    for owner in module.modules():
        if hasattr(owner, "external_parameters"):
            listed: Any = owner.external_parameters
            for user, parameter in listed():
                zero.register_external_parameter(user, parameter)


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[nn.Module]:
    """The module with complete parameters on every rank, for reading. Collective at ZeRO-3, nothing
    to do below it.
    """
    parameters = [p for p in module.parameters() if hasattr(p, "ds_id")]
    if not parameters:
        yield module
        return
    from deepspeed import zero

    with zero.GatheredParameters(parameters, modifier_rank=None):
        yield module
