"""One stage from its first to its last step."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from models import from_pretrained
from models.pruning.surgery import prune, sparsity_report
from train.answers import answers_file
from train.build import Run, build, make_loader
from train.config import RunConfig, per_rank
from train.provenance import provenance
from train.recipes_io import dump_run_yaml
from train.runtime import report
from train.runtime.distributed import finish, start
from train.runtime.loop import save_model, train
from train.runtime.signals import EXIT_STOPPED, Stopped, alone
from train.stages.trim import finish_trimming
from train.student import ORIGIN
from train.tasks.trim import TrimTask

__all__ = ["slim_model", "walk"]

_LOG = logging.getLogger(__name__)
_CALIBRATE = 2048  # held-out inputs, where eval.samples says all


def walk(config: RunConfig, resume: str, rebase: bool = False) -> int:
    """Build, resume, train, and leave `model/` in the run directory. Collective over ranks.

    Args:
        rebase: resume although the data changed; see `Loader.load_state_dict`.

    Returns:
        0 when done, 75 when a signal stopped the run after a checkpoint, or before there was
        anything to save.
    Raises:
        ValueError, FileNotFoundError: bad input.
    """
    with alone("before all ranks had come"):
        dist = start(config.engine.collective_timeout)
    failed, code, held_out = True, None, False
    try:
        config = per_rank(config, dist.world_size)
        directory = Path(config.out)
        if dist.rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            dump_run_yaml(config, directory / "run.yaml", provenance(dist.world_size))
        run = build(config, dist)
        if dist.rank == 0:
            run.first.save(directory / ORIGIN)
        code = train(run, resume, rebase)
        if code == 0 and run.gates is not None:
            run.gates.freeze()  # it is, but for a stop at the last step of a run without validation
            save_model(run)
            if dist.rank == 0:
                slim_model(run)
        if code == 0 and dist.rank == 0:
            keep_answers(run)
        run.monitor.close()
        failed, held_out = False, code == 0 and isinstance(run.task, TrimTask)
        if not held_out:
            return code
    except Stopped as stopped:
        failed, code = False, EXIT_STOPPED
        if dist.is_main:
            print(f"espalier: {stopped}: nothing to save yet", file=sys.stderr, flush=True)
        return code
    finally:
        # After a failure the other ranks may be anywhere: no barrier then. Where there is more to do
        # the launcher is told when that is done.
        finish(failed, None if held_out else code)
    if dist.rank == 0:
        _calibrate_alone(run)
    return 0


def _calibrate_alone(run: Run) -> None:
    """`calibrate` on the first rank when all have left the group: losses with counts and negatives of
    all ranks would wait for the others, and the others only as long as a collective may take.
    """
    assert isinstance(run.task, TrimTask)
    report.at("what the trimmers keep on held-out inputs")
    try:
        calibrate(run, run.task)
    except BaseException as error:
        report.failed(error)
        raise
    report.ended(0)


def calibrate(run: Run, task: TrimTask) -> None:
    """What the trimmers keep on held-out inputs (training inputs where a run has no others)."""
    config, alone = run.config, replace(run.dist, rank=0, world_size=1)
    source = config.data.train if config.data.val is None else config.data.val
    config = replace(config, eval=replace(config.eval, samples=config.eval.samples or _CALIBRATE))
    held_out = make_loader(
        config, config.task, source, run.student.config, run.tokenizer, alone, False
    )
    finish_trimming(run.directory / "model", task, held_out, run.dist.device, run.tokenizer)


def keep_answers(run: Run) -> None:
    """Put the answer list beside the weights, so that `predict` needs the model folder alone."""
    answers = answers_file(run.config)
    if run.config.task == "vqa" and answers is not None:
        shutil.copyfile(answers, run.directory / "model" / answers.name)


def slim_model(run: Run) -> None:
    """Cut what the final gates closed: `model/` becomes the smaller model, `dense/` keeps the rest.

    Runs on one rank, on the weights that the loop has just saved.
    """
    assert run.gates is not None
    model_folder, dense_folder = run.directory / "model", run.directory / "dense"
    dense = from_pretrained(model_folder)
    slim = prune(dense, {name: z.cpu() for name, z in run.gates.structure().items()})
    dense.save_pretrained(dense_folder, tokenizer=run.tokenizer)
    slim.save_pretrained(model_folder, tokenizer=run.tokenizer)
    told = sparsity_report(dense, slim, run.gates.prune.modalities)
    told["budget"] = run.gates.budget.report(run.gates.hard_gates())
    (run.directory / "sparsity.json").write_text(json.dumps(told, indent=2) + "\n")
    _LOG.info("slim model written to %s: %s", model_folder, told)
