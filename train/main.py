"""The command line: `espalier VERB ...`, the same as `python -m train.main VERB ...`.

Exit codes: 0 done, 1 failed, 2 wrong usage or bad input, 75 stopped by a signal with a checkpoint
saved. Only the verb that is asked for imports its room, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from train.runtime import report

__all__ = ["main"]

EXIT_FAILED = 1
EXIT_USAGE = 2
STAGES = ("pretrain", "distill", "finetune", "prune", "trim")
_RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")


@dataclass(frozen=True)
class _Verb:
    """One verb: its line in the overview, and what runs it with the arguments after it."""

    help: str
    run: Callable[[str, Sequence[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; the message of bad input goes to stderr.

    Unexpected exceptions pass through: Python prints their traceback and exits 1.
    """
    try:
        arguments = _without_local_rank(list(sys.argv[1:] if argv is None else argv))
        if not arguments or arguments[0].startswith("-"):
            _overview().parse_args(arguments or ["--help"])
            return EXIT_USAGE
        name, *rest = arguments
        verb = _verbs().get(name)
        if verb is None:
            from train.recipes_io import nearest

            print(f"espalier: no verb {name!r}{nearest(name, _verbs())}", file=sys.stderr)
            return EXIT_USAGE
        code = verb.run(name, rest)
        report.left(code)
        return code
    except SystemExit as leaving:  # argparse: 0 after --help, 2 on wrong usage
        return leaving.code if isinstance(leaving.code, int) else EXIT_FAILED
    except (ValueError, FileNotFoundError) as error:
        print(f"{_who()}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print(f"{_who()}: interrupted", file=sys.stderr)
        return EXIT_FAILED
    except (
        BrokenPipeError
    ):  # `espalier config show ... | head`; Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def _who() -> str:
    rank = os.environ.get("RANK", "0")
    return "espalier" if rank == "0" else f"espalier (rank {rank})"


def _without_local_rank(arguments: list[str]) -> list[str]:
    """The arguments without `--local_rank N`, which the DeepSpeed launcher puts before the verb.

    The rank comes from LOCAL_RANK in the environment, which that launcher sets too.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--local_rank", "--local-rank", type=int)
    head: list[str] = []
    while arguments and arguments[0].startswith(("--local_rank", "--local-rank")):
        size = 1 if "=" in arguments[0] else 2
        head, arguments = head + arguments[:size], arguments[size:]
    parser.parse_args(head)
    return arguments


def _overview() -> argparse.ArgumentParser:
    width = max(map(len, _verbs()))
    lines = [f"  {name:<{width}}  {verb.help}" for name, verb in _verbs().items()]
    parser = argparse.ArgumentParser(
        prog="espalier",
        usage="espalier VERB ...",
        description="Distils and prunes vision-language models.\n\nverbs:\n" + "\n".join(lines),
        epilog="`espalier VERB --help` explains a verb, with an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    return parser


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"espalier {version('espalier')}"
    except PackageNotFoundError:
        return "espalier (not installed, running from its folder)"


def _verbs() -> dict[str, _Verb]:
    return {
        "data": _Verb(
            "make, import, index, verify and inspect data", _room("data_pipeline.commands")
        ),
        "pretrain": _Verb("train a teacher from scratch", _stage),
        "distill": _Verb("train a student from a teacher", _stage),
        "finetune": _Verb("train a model for a task", _stage),
        "prune": _Verb("prune a model for a task, with its teacher", _stage),
        "trim": _Verb("train a model to drop tokens and heads by itself", _stage),
        "launch": _Verb("start a stage on many processes", _launch),
        "eval": _Verb("metrics of a model on a task", _room("train.evaluation.commands")),
        "bench": _Verb(
            "latency, throughput, memory, parameters", _room("train.evaluation.commands")
        ),
        "predict": _Verb("answer a question about an image", _room("train.evaluation.commands")),
        "convert": _Verb("checkpoints of X-VLM, CLIP, BERT and timm", _room("train.convert")),
        "export": _Verb("write a model to ship", _room("train.export.commands")),
        "report": _Verb("one page comparing runs", _room("train.export.commands")),
        "doctor": _Verb("what this machine has and lacks", _room("train.doctor")),
        "config": _Verb("show, compare or describe a recipe", _config),
    }


def _room(module: str) -> Callable[[str, Sequence[str]], int]:
    """Runs a verb whose module has `add_parsers(subparsers)` and `run(namespace) -> int`."""

    def run(name: str, rest: Sequence[str]) -> int:
        room = importlib.import_module(module)
        parser = argparse.ArgumentParser(prog="espalier")
        verbs = parser.add_subparsers(metavar="VERB", required=True)
        room.add_parsers(verbs)
        verbs.choices[name].epilog = verbs.choices[name].epilog or f"example: espalier {name}"
        return int(room.run(parser.parse_args([name, *rest])))

    return run


def _launch(name: str, rest: Sequence[str]) -> int:
    from launchers import main as launcher

    parser = argparse.ArgumentParser(
        prog="espalier launch",
        description="Starts a stage on many processes: here, over a hostfile, with Slurm or with MPI.",
        epilog="example: espalier launch -n 2 -- distill blocksworld-distill optim.steps=200",
    )
    launcher.add_arguments(parser)
    return launcher.run(parser.parse_args(rest))


def _stage(name: str, rest: Sequence[str]) -> int:
    """One training stage on this process (one of many under a launcher)."""
    options = _stage_parser(name).parse_intermixed_args(rest)
    if options.dry_run:  # nothing to save: signals end it
        return _run_stage(name, options)
    from train.runtime.signals import stop_on_signals

    # First of all: the run file and the libraries take seconds to load, and Python would end with
    # 143 (the launcher's "failed") where 75 says that the same command goes on.
    with stop_on_signals():
        return _run_stage(name, options)


def _run_stage(name: str, options: argparse.Namespace) -> int:
    from train.runtime.signals import alone

    try:
        with alone("before the run file was read"):
            from train.recipes_io import find_recipe, load_run_config

            recipe = find_recipe(options.recipe)
            config, sources = load_run_config(recipe, options.overrides)
        if config.stage != name:
            raise ValueError(
                f"{recipe}: stage is {config.stage!r}: run `espalier {config.stage} ...`"
            )
    except (ValueError, FileNotFoundError) as error:
        if _is_first_rank():  # every rank finds the same: say it once
            print(f"espalier: {error}", file=sys.stderr)
        return EXIT_USAGE
    _warn(config, sources)
    from train import stages

    plan = {key: getattr(options, key) for key in ("ranks", "samples_per_s", "like")}
    if any(plan.values()) and not options.dry_run:
        raise ValueError("--ranks, --samples-per-s and --like belong to --dry-run: add it")
    return stages.run(config, options.resume, options.dry_run, options.rebase, plan)


def _stage_parser(name: str) -> argparse.ArgumentParser:
    recipe = {
        "pretrain": "blocksworld-pretrain-teacher",
        "finetune": "blocksworld-finetune-teacher",
        "trim": "blocksworld-vqa-trim",
    }
    example = f"espalier {name} {recipe.get(name, f'blocksworld-{name}')} optim.steps=200"
    parser = argparse.ArgumentParser(
        prog=f"espalier {name}",
        description=f"{_verbs()[name].help.capitalize()}.",
        epilog=f"example: {example} --resume none",
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="change one key of the recipe"
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|PATH|none",
        help="auto: go on from the last valid checkpoint, if there is one (default); "
        "PATH: from this one; none: start over, keeping old checkpoints aside",
    )
    parser.add_argument(
        "--rebase",
        action="store_true",
        help="resume although data sets, weights or order settings changed: a new order begins where "
        "the run stands, and its checkpoints record it",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print sizes, memory for each ZeRO stage, work and hours; needs no data and no GPU",
    )
    parser.add_argument(
        "--ranks",
        type=_counts,
        default=(),
        metavar="N[,N...]",
        help="with --dry-run: numbers of devices (default: 8,1,64, or the launcher's)",
    )
    parser.add_argument(
        "--samples-per-s",
        type=float,
        metavar="N",
        help="with --dry-run: speed of all devices together, for hours and MFU",
    )
    parser.add_argument(
        "--like", metavar="RUN", help="with --dry-run: take the speed from an earlier run's records"
    )
    return parser


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _warn(config: object, sources: dict[str, str]) -> None:
    from train.effects import ineffective_keys

    if _is_first_rank():
        for line in ineffective_keys(config, sources):  # type: ignore[arg-type]
            print(f"espalier: warning: {line}", file=sys.stderr)


def _is_first_rank() -> bool:
    return next((os.environ[v] for v in _RANK_VARIABLES if v in os.environ), "0") == "0"


def _config(name: str, rest: Sequence[str]) -> int:
    """`config show|diff|schema`."""
    options = _config_parser().parse_intermixed_args(rest)
    from train import recipes_io

    if options.what == "schema":
        print(json.dumps(recipes_io.schema(), indent=2))
        return 0
    overrides = [argument for argument in options.arguments if "=" in argument]
    recipes = [argument for argument in options.arguments if "=" not in argument]
    wanted = {"show": (1, 1), "diff": (1, 2)}[options.what]
    if not wanted[0] <= len(recipes) <= wanted[1]:
        raise ValueError(
            f"config {options.what} takes {' or '.join(map(str, sorted(set(wanted))))} recipe(s)"
        )
    loaded = [recipes_io.load_run_config(recipes_io.find_recipe(r), overrides) for r in recipes]
    flat = [recipes_io.flatten(recipes_io.to_plain(config)) for config, _ in loaded]
    if options.what == "show":
        _print_table(
            [
                (key, _text(value), loaded[0][1].get(key, "default"))
                for key, value in flat[0].items()
            ]
        )
    elif len(flat) == 1:
        changed = [(key, source) for key, source in loaded[0][1].items() if source != "default"]
        _print_table([(key, _text(flat[0].get(key)), source) for key, source in changed])
    else:
        keys = [k for k in flat[0] | flat[1] if flat[0].get(k) != flat[1].get(k)]
        _print_table([(key, _text(flat[0].get(key)), _text(flat[1].get(key))) for key in keys])
    return 0


def _config_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="espalier config",
        description="show: every resolved key and where its value came from. diff: what a recipe sets, or the keys "
        "in which two recipes differ. schema: JSON schema of a recipe, for editors.",
        epilog="example: espalier config show blocksworld-distill optim.lr=3e-4",
    )
    parser.add_argument("what", choices=("show", "diff", "schema"))
    parser.add_argument("arguments", nargs="*", metavar="RECIPE [RECIPE] [a.b=c ...]")
    return parser


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _print_table(rows: list[tuple[str, str, str]]) -> None:
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    for key, value, last in rows:
        print(f"{key:<{widths[0]}}  {value:<{min(widths[1], 60)}}  {last}")


if __name__ == "__main__":
    sys.exit(main())
