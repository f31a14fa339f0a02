"""Files of checkpoints in one process: what is copied, what may be loaded, what stays, and 500 ways
to damage them.
"""

from __future__ import annotations

import errno
import os
import pickle
import random
import resource
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from hypothesis import given, settings
from hypothesis import strategies as st

from train.checkpoint import manifest, scan
from train.checkpoint.find import LATEST, find_valid
from train.checkpoint.manager import CheckpointManager, SaveError
from train.checkpoint.manifest import MANIFEST, ManifestError
from train.checkpoint.peers import Peers
from train.checkpoint.retention import Best, Retention, stays
from train.checkpoint.staging import StagingEngine, host_copy, write_files
from train.config import UserError
from train.runtime.loss_scale import CappedLossScaler, bound_loss_scale

MUTATIONS = 500


class FakeEngine:
    """What the manager uses of DeepSpeed's engine: files by way of the checkpoint engine."""

    def __init__(self, weights: torch.Tensor) -> None:
        self.weights = weights
        self.checkpoint_engine: Any = StagingEngine()
        parameter = torch.nn.Parameter(torch.zeros(1))
        self.param_names = {parameter: "w"}
        self.optimizer = torch.optim.AdamW([parameter])

    def zero_optimization_stage(self) -> int:
        return 0

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert not save_latest
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
            state = {"module": {"w": self.weights}, "file": name}
            self.checkpoint_engine.save(state, os.path.join(folder, tag, name))

    def load_checkpoint(self, folder: str, tag: str, **options: Any) -> tuple[str, None]:
        loaded = [
            self.checkpoint_engine.load(str(path)) for path in Path(folder, tag).glob("*_states.pt")
        ]
        assert len(loaded) == 2
        self.weights = loaded[0]["module"]["w"]
        assert torch.equal(loaded[1]["module"]["w"], self.weights), "half of each"
        return tag, None


def state_of(step: int) -> dict[str, Any]:
    return {"step": step, "config": {"a": 1}, "rng": torch.arange(5.0) + step}


def save(manager: CheckpointManager, step: int, **options: Any) -> Path:
    return manager.save(FakeEngine(torch.full((40,), float(step))), step, state_of(step), **options)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    manager = CheckpointManager(tmp_path / "checkpoints", keep=3, run_id="mine")
    for step in (10, 20, 30):
        save(manager, step)
    return tmp_path / "checkpoints"


# Mutations


def _truncate(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def _flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def mutate(kind: str, victim: Path, others: list[Path], rng: random.Random) -> str:
    """Damages one file of checkpoint `victim`; returns the name that the complaint must have."""
    path = rng.choice(sorted(victim.iterdir()))
    if kind == "truncate":
        _truncate(path, rng)
    elif kind == "flip":
        _flip(path, rng)
    elif kind == "delete":
        path.unlink()
    else:
        # A file of the same name from another checkpoint: of an earlier step, or of another run.
        other = rng.choice(others) / path.name
        assert other.read_bytes() != path.read_bytes()
        shutil.copyfile(other, path)
    return path.name


def test_500_mutations_are_detected_and_nothing_wrong_is_loaded(tmp_path: Path) -> None:
    """Every mutation of the newest checkpoint leads to the one before, with a warning that names the
    file; the engine gets that one's weights, all of them.
    """
    for name in ("mine", "foreign"):
        manager = CheckpointManager(tmp_path / name, keep=3, run_id=name)
        for step in (10, 20):
            offset = 0.0 if name == "mine" else 0.5
            engine = FakeEngine(torch.full((40,), step + offset))
            manager.save(engine, step, state_of(step) | {"of": name})  # type: ignore[arg-type]
    good = tmp_path / "good"
    shutil.copytree(tmp_path / "mine", good)
    victim = tmp_path / "mine" / "step_00000020"
    others = [good / "step_00000010", tmp_path / "foreign" / "step_00000020"]
    rng = random.Random(6)
    kinds = ("truncate", "flip", "delete", "swap")
    for number in range(MUTATIONS):
        kind = kinds[number % len(kinds)]
        name = mutate(kind, victim, others, rng)
        with pytest.raises(ManifestError):
            manifest.verify(victim)
        engine = FakeEngine(torch.zeros(40))
        manager = CheckpointManager(tmp_path / "mine", run_id="mine")
        with pytest.raises(UserError) as said:
            manager.load(engine, str(victim))  # type: ignore[arg-type]
        # A damaged file is named. Without its manifest a folder is no checkpoint, and with that of
        # another one it is the first file that is not the other's which is named.
        named = victim.name if name == MANIFEST else name
        assert named in str(said.value)
        assert torch.equal(engine.weights, torch.zeros(40)), f"{kind} of {name} was half loaded"
        loaded = manager.load(engine)  # type: ignore[arg-type]
        assert loaded is not None and loaded["step"] == 10, f"{number}: {kind} of {name}"
        assert torch.equal(engine.weights, torch.full((40,), 10.0))
        shutil.rmtree(victim)
        shutil.copytree(good / victim.name, victim)
    assert manager.load(engine)["step"] == 20  # type: ignore[index, arg-type]


def test_whole_checkpoints_in_the_wrong_place_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / "step_00000030")
    shutil.copytree(folder / "step_00000010", folder / "step_00000030")  # an old one as a new one
    assert find_valid(Peers(), folder, "auto", "mine")[0].name == "step_00000020"  # type: ignore[index]
    shutil.rmtree(folder)
    save(CheckpointManager(folder, run_id="theirs"), 30)
    with pytest.raises(UserError, match="belongs to another run"):
        find_valid(Peers(), folder, "auto", "mine")


def test_lost_checkpoints_are_not_taken_for_a_new_run(folder: Path) -> None:
    for tag in list(folder.glob("step_*")):
        (tag / MANIFEST).unlink()
    with pytest.raises(UserError, match="no checkpoint is intact"):
        find_valid(Peers(), folder, "auto", "mine")
    for tag in list(folder.glob("step_*")):
        shutil.rmtree(tag)
    with pytest.raises(UserError, match="latest is there, but no checkpoint is"):
        find_valid(Peers(), folder, "auto", "mine")
    (folder / LATEST).unlink()  # nothing was ever completed
    assert find_valid(Peers(), folder, "auto", "mine") is None


# Loading without running code


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_files_that_run_code_are_refused_although_their_hash_is_right(tmp_path: Path) -> None:
    target = save(CheckpointManager(tmp_path / "checkpoints", run_id="mine"), 10)
    shard = target / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"module": Evil(tmp_path / "harm")}, shard)
    values = manifest.read(target)
    values["files"][shard.name] = manifest.describe(shard)
    del values["hash"]
    manifest.write(target, values)
    assert manifest.verify(target)  # well forged
    engine = FakeEngine(torch.zeros(40))
    with pytest.raises(UserError, match=rf"{shard.name}: refused, it may run code.*mkdir"):
        CheckpointManager(target.parent, run_id="mine").load(engine)  # type: ignore[arg-type]
    with pytest.raises(ManifestError, match="refused"):  # the engine's own reader refuses it, too
        engine.checkpoint_engine.load(str(shard))
    assert not (tmp_path / "harm").exists()
    torch.load(shard, weights_only=False)
    assert (tmp_path / "harm").exists(), "the forged file does no harm: the test proves nothing"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", pickle.dumps(open), b"\x80\x02" * 50])
def test_files_that_are_none_of_torchs_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ManifestError, match=r"x\.pt: "):
        scan.scan(tmp_path / "x.pt")


def test_the_loss_scale_of_an_fp16_run_is_kept_with_its_upper_end(tmp_path: Path) -> None:
    scaler: Any = DynamicLossScaler(2.0**20, 1000, 1, 1, False)
    optimizer = SimpleNamespace(loss_scaler=scaler)
    bound_loss_scale(optimizer, 1024.0)
    torch.save({"loss_scaler": host_copy(scaler)}, tmp_path / "x.pt")
    loaded = scan.load(tmp_path / "x.pt")["loss_scaler"]
    assert (loaded.cur_scale, loaded.max_scale, type(loaded)) == (1024.0, 1024.0, CappedLossScaler)


# Copies


def test_copies_are_independent_and_share_what_was_shared(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    state = {
        "a": weight,
        "tied": weight,
        "t": weight.t(),
        "l": [(weight[0], 3), None],
        "e": torch.empty(0),
    }
    copied = host_copy(state)
    weight.zero_()
    assert torch.equal(copied["a"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(copied["t"], copied["a"].t())
    assert torch.equal(copied["l"][0][0], copied["a"][0]) and copied["l"][0][1] == 3
    assert copied["a"].data_ptr() == copied["tied"].data_ptr() != weight.data_ptr()
    module = torch.nn.Linear(2, 2)
    assert type(host_copy(dict(module.named_parameters()))["weight"]) is torch.Tensor
    metadata = host_copy(module.state_dict())
    assert metadata._metadata == module.state_dict()._metadata  # type: ignore[attr-defined]


# Retention


def test_retention_by_hand() -> None:
    scores = {10: 0.1, 20: 0.9, 30: None, 40: 0.9, 50: 0.3}
    assert stays(scores, Retention(2)) == {40, 50}
    assert stays(scores, Retention(1, every=20)) == {20, 40, 50}
    assert stays(scores, Retention(1, best="accuracy")) == {20, 50}
    assert stays(scores, Retention(1, best="loss")) == {10, 50}
    assert stays(dict.fromkeys(scores), Retention(1, best="loss")) == {50}


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(1, 60), min_size=1), st.integers(1, 5), st.integers(0, 7))
def test_what_stays_at_each_save_is_what_stays_at_the_end(
    steps: set[int], keep: int, every: int
) -> None:
    left: dict[int, float | None] = {}
    for step in sorted(steps):
        left[step] = None
        left = dict.fromkeys(stays(left, Retention(keep, every)))
    assert set(left) == stays(dict.fromkeys(steps), Retention(keep, every))


def test_the_best_checkpoint_stays_through_a_restart(tmp_path: Path) -> None:
    options: dict[str, Any] = {"keep": 1, "run_id": "mine", "best": "accuracy"}
    manager = CheckpointManager(tmp_path, **options)
    for step, accuracy in ((10, 0.5), (20, 0.8)):
        assert manager.best.see(step, {"accuracy": accuracy})
        save(manager, step)
    state = manager.best.state_dict()
    manager = CheckpointManager(tmp_path, **options)
    manager.load(FakeEngine(torch.zeros(40)))  # type: ignore[arg-type]
    manager.best.load_state_dict(state)
    assert not manager.best.see(30, {"accuracy": 0.7})
    for step in (30, 40):
        save(manager, step)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_00000020", "step_00000040"]
    assert manifest.read(tmp_path / "step_00000020")["score"] == {"name": "accuracy", "value": 0.8}


def test_a_checkpoint_validated_late_has_its_score(folder: Path) -> None:
    manager = CheckpointManager(folder, keep=1, run_id="mine", best="accuracy")
    manager.load(FakeEngine(torch.zeros(40)))  # type: ignore[arg-type]
    manager.note_score(30)  # not validated: nothing to note
    assert manager.best.see(30, {"accuracy": 0.9})
    manager.note_score(30)
    found = find_valid(Peers(), folder, "auto", "mine")
    assert found is not None and found[0].name == "step_00000030", "still valid"
    assert found[1]["score"] == {"name": "accuracy", "value": 0.9}
    for step in (40, 50):
        manager.best.see(step, {"accuracy": 0.5})
        save(manager, step)
    assert sorted(p.name for p in folder.glob("step_*")) == ["step_00000030", "step_00000050"]


def test_a_metric_that_is_not_measured_is_named() -> None:
    with pytest.raises(UserError, match=r"checkpoint.best: 'accuracyy'.*accuracy"):
        Best("accuracyy").see(1, {"accuracy": 0.5})
    assert not Best("accuracy").see(1, {})  # no validation data
    assert not Best("accuracy").see(1, {"accuracy": float("nan")})


# Saving


def test_a_failed_write_names_the_file_and_leaves_the_last_checkpoint(folder: Path) -> None:
    manager = CheckpointManager(folder, run_id="mine")
    engine = FakeEngine(torch.zeros(10**5))
    manager.load(engine)  # type: ignore[arg-type]
    engine.weights = torch.zeros(10**5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(SaveError, match=rf"rank 0: .*{os.strerror(errno.EFBIG)}.*states\.pt"):
            manager.save(engine, 40, state_of(40))  # type: ignore[arg-type]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (folder / "step_00000040").exists(), "its room is not given back"
    assert (folder / LATEST).read_text() == "step_00000030\n"
    assert find_valid(Peers(), folder, "auto", "mine")[0].name == "step_00000030"  # type: ignore[index]
    save(manager, 50)
    assert find_valid(Peers(), folder, "auto", "mine")[0].name == "step_00000050"  # type: ignore[index]


class Gate:
    """Holds writing until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        write = write_files

        def held(*args: Any) -> Any:
            self.reached.set()
            assert self.opened.wait(30)
            return write(*args)

        monkeypatch.setattr("train.checkpoint.staging.write_files", held)


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    manager = CheckpointManager(tmp_path, run_id="mine", asynchronous=True)
    engine = FakeEngine(torch.full((40,), 10.0))
    manager.save(engine, 10, state_of(10), wait=False)  # type: ignore[arg-type]
    assert gate.reached.wait(30)
    assert find_valid(Peers(), tmp_path, "auto", "mine") is None  # not there before it is complete
    engine.weights.fill_(-1.0)  # the next step
    gate.opened.set()
    manager.wait()
    again = FakeEngine(torch.zeros(40))
    assert CheckpointManager(tmp_path, run_id="mine").load(again)["step"] == 10  # type: ignore[index, arg-type]
    assert torch.equal(again.weights, torch.full((40,), 10.0))


def test_a_failed_save_in_the_background_is_tried_again_and_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", "some.pt")

    manager = CheckpointManager(tmp_path, run_id="mine", asynchronous=True)
    with monkeypatch.context() as patch:
        patch.setattr("train.checkpoint.staging.write_files", full)
        save(manager, 10, wait=False)
        assert manager._writer is not None
        manager._writer.join()
        assert "was not saved" in caplog.text and "some.pt" in caplog.text
        with pytest.raises(SaveError, match="some.pt"):
            save(manager, 20, wait=False)
        save(manager, 30, wait=False)
        with pytest.raises(SaveError, match="step_00000030"):
            manager.wait()
    save(manager, 40, wait=False)
    manager.wait()
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_00000040"]


def test_going_on_from_an_older_checkpoint_sets_newer_ones_aside(folder: Path) -> None:
    manager = CheckpointManager(folder, keep=3, run_id="mine")
    manager.load(FakeEngine(torch.zeros(40)), str(folder / "step_00000010"))  # type: ignore[arg-type]
    save(manager, 15)
    assert find_valid(Peers(), folder, "auto", "mine")[0].name == "step_00000015"  # type: ignore[index]
    aside = sorted(p.name for p in (folder / "superseded").iterdir())
    assert aside == ["step_00000020-1", "step_00000030-1"]
    assert sorted(p.name for p in folder.glob("step_*")) == ["step_00000010", "step_00000015"]


def test_an_older_checkpoint_gone_on_from_replaces_none_of_the_abandoned_ones(folder: Path) -> None:
    """The new attempt comes by the steps of the old one: its checkpoints are set aside, too."""
    manager = CheckpointManager(folder, keep=3, run_id="mine")
    manager.load(FakeEngine(torch.zeros(40)), str(folder / "step_00000010"))  # type: ignore[arg-type]
    manager.save(FakeEngine(torch.full((40,), -1.0)), 20, state_of(20))  # type: ignore[arg-type]
    again = FakeEngine(torch.zeros(40))
    manager.load(again)  # type: ignore[arg-type]
    assert torch.equal(again.weights, torch.full((40,), -1.0))
    old = folder / "superseded" / "step_00000020-1"
    manifest.check_files(old, manifest.read(old))
    assert sorted(p.name for p in old.parent.iterdir()) == [old.name, "step_00000030-1"]
    save(manager, 30)
    assert len(list(old.parent.iterdir())) == 2


def test_deepspeeds_own_writers_are_refused(tmp_path: Path) -> None:
    engine = FakeEngine(torch.zeros(4))
    engine.checkpoint_engine = SimpleNamespace()
    with pytest.raises(UserError, match="checkpoint.writer"):
        CheckpointManager(tmp_path, run_id="mine").save(engine, 1, state_of(1))  # type: ignore[arg-type]
