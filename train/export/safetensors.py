"""A model folder to ship: weights cast, structure as it is, tokenizer and answer list beside it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.export.card import Facts

__all__ = ["DTYPES", "copy_companions", "export_safetensors"]

DTYPES = ("fp32", "fp16", "bf16")
# Everything a transformers tokenizer may leave; other files of the source folder are not for
# shipping.
_PASSED_ON = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "answers.json",
)


def export_safetensors(
    source: Path,
    out: Path,
    dtype: str = "fp16",
    facts: Facts | None = None,
    tokenizer: Path | None = None,
) -> dict[str, Any]:
    """Write config.json, model.safetensors, tokenizer files and a model card (README.md) to `out`.

    Args:
        dtype: type of the weights on disk, one of DTYPES; loading gives fp32 again.
        facts: what the card tells besides the shape; None reads the run directory around `source`.
        tokenizer: folder to take tokenizer files from where `source` has none.

    Returns:
        {"parameters", "bytes", "dtype"}. Raises FileNotFoundError or ValueError on a source that is
        not a model folder, on an unknown dtype, or where `out` is the source.
    """
    import torch

    from models import from_pretrained
    from train.export.card import Facts, card

    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if out.resolve() == source.resolve():
        raise ValueError(f"--out {out}: is the model itself; name another folder")
    model = from_pretrained(source)
    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    _check_range(model, kinds[dtype], source)
    model.save_pretrained(out, dtype=kinds[dtype])
    copy_companions(out, tokenizer, source)
    size = (out / "model.safetensors").stat().st_size
    text = card(model, facts or Facts.of_run(source), dtype, size)
    (out / "README.md").write_text(text, encoding="utf-8")
    return {"parameters": sum(p.numel() for p in model.parameters()), "bytes": size, "dtype": dtype}


def copy_companions(out: Path, *folders: Path | None) -> None:
    """Copies tokenizer files and answer list to `out`; those of later folders win."""
    for folder in folders:
        for name in _PASSED_ON:
            if folder is not None and (folder / name).is_file():
                shutil.copyfile(folder / name, out / name)


def _check_range(model: Any, dtype: Any, source: Path) -> None:
    """Refuse a cast that would turn a weight into infinity."""
    import torch

    limit = torch.finfo(dtype).max
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.numel() and float(value.abs().max()) > limit:
            raise ValueError(
                f"{source}: {name} exceeds the range of {dtype}; use --dtype fp32 or bf16"
            )
