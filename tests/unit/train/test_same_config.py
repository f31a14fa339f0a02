"""Which checkpoints' configurations a run goes on with, over versions that know different keys."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.stand_in import tiny_config, with_changes
from train.checkpoint.same_config import check_config
from train.checkpoint.state import plain_config
from train.config import PruneConfig, RunConfig, UserError


def _without(config: RunConfig, *starts: str) -> dict[str, Any]:
    """What a version that lacks these keys or sections would have saved."""
    plain = plain_config(config)
    kept = {key: value for key, value in plain.items() if not f"{key}.".startswith(starts)}
    assert len(kept) < len(plain)
    return kept


def _refusal(saved: dict[str, Any], current: RunConfig) -> str:
    with pytest.raises(UserError) as error:
        check_config(saved, plain_config(current))
    return str(error.value)


def test_only_harmless_keys_may_change(tmp_path: Path) -> None:
    old = tiny_config(tmp_path)
    longer = with_changes(old, optim={"steps": 99}, log={"every": 1}, checkpoint={"keep": 9})
    check_config(plain_config(old), plain_config(longer))
    other = with_changes(old, optim={"lr": 0.5}, data={"max_tokens": 7, "batch": 7})
    message = _refusal(plain_config(old), other)
    assert "data.max_tokens: " in message and "optim.lr: 0.001 -> 0.5" in message
    assert "data.batch" not in message  # the loaders know what may be read on
    assert "log." not in message and "new since" not in message


def test_keys_that_are_new_count_as_their_defaults(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = dataclasses.replace(tiny_config(tmp_path), prune=PruneConfig(sparsity=0.5))
    starts = ("engine.kernels.", "prune.round_to.", "trim.", "kd.", "initialise.", "log.wandb.")
    with caplog.at_level(logging.INFO):
        check_config(_without(config, *starts), plain_config(config))
    (line,) = caplog.messages
    for key in ("engine.kernels", "prune.round_to", "trim", "kd", "initialise"):
        assert f"{key}, " in f"{line.split(':')[0]}, ".replace("without ", "")
    assert "log.wandb" not in line  # it might have changed, too
    caplog.clear()
    check_config(plain_config(config), plain_config(config))
    assert not caplog.messages


def test_keys_that_are_new_and_used_are_refused(tmp_path: Path) -> None:
    old = tiny_config(tmp_path)
    faster = with_changes(old, engine={"kernels": "cuda"}, kd={"temperature": 2.0})
    message = _refusal(_without(old, "engine.kernels.", "kd."), faster)
    assert "engine.kernels: new since the checkpoint, which counts as 'auto' -> 'cuda'" in message
    assert "kd.temperature: new since the checkpoint, which counts as 1.0 -> 2.0" in message
    assert "kd.logits" not in message


def test_none_that_was_saved_is_no_missing_key(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    saved = plain_config(config) | {"engine.kernels": None}
    assert "engine.kernels: None -> 'auto'" in _refusal(saved, config)
    assert "not given" not in _refusal(saved, config)


def test_sections_that_come_and_go_are_one_difference(tmp_path: Path) -> None:
    dense = tiny_config(tmp_path)
    pruned = dataclasses.replace(dense, prune=PruneConfig(sparsity=0.5))
    message = _refusal(plain_config(dense), pruned)
    assert "(prune: None -> {" in message and message.count(" -> ") == 1
    message = _refusal(plain_config(pruned), dense)
    assert "} -> None)" in message and message.count(" -> ") == 1


def test_free_names_differ_without_being_new_or_gone(tmp_path: Path) -> None:
    one = dataclasses.replace(tiny_config(tmp_path), loss={"itc": 0.5})
    other = dataclasses.replace(one, loss={"itm": 0.5})
    message = _refusal(plain_config(one), other)
    assert "loss.itc: 0.5 -> not given; loss.itm: not given -> 0.5" in message
    assert "loss.itc: not given -> 0.5" in _refusal(
        plain_config(dataclasses.replace(one, loss={})), one
    )


def test_keys_that_are_gone_are_refused_unless_they_asked_for_nothing(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    plain = plain_config(config)
    check_config(plain | {"engine.magic": None, "log.colour": "red"}, plain)
    message = _refusal(plain | {"engine.magic": "much", "spell.word": "abra"}, config)
    assert "engine.magic: 'much' -> gone from this version of the program" in message
    assert "spell: {'word': 'abra'} -> gone" in message


def test_a_checkpoint_without_configuration_is_refused(tmp_path: Path) -> None:
    assert "stage: not given -> " in _refusal({}, tiny_config(tmp_path))
