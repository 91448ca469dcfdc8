"""Train and compare variants with several seeds:  python sra_fast/ablate.py STUDY.yaml

Writes runs/ablations/<study>/table.md, rows.json and plot.png. The same command resumes after an
interruption.
"""

import sys
import time
from pathlib import Path


def main() -> None:
    # before the imports, which take seconds: the launcher may end meanwhile
    from sra_fast.utils.processes import LauncherWatch
    from sra_fast.utils.stopping import one_line_on_interrupt

    one_line_on_interrupt("stopped; the same command resumes")
    launchers = LauncherWatch()
    began = time.monotonic()
    from sra_fast.analysis.study import check_seeds, read_study
    from sra_fast.config.arguments import ArgumentParser
    from sra_fast.training.signals import STOPPED, StopSignals

    parser = ArgumentParser(description=__doc__.partition(":  ")[0])
    args = _parse(parser)
    try:
        studies = [read_study(path) for path in args.study]
        check_seeds(args.seeds or [])
    except ValueError as error:
        parser.error(str(error))
    failed = []
    code = 0
    with StopSignals(launchers) as stop:

        def why() -> str | None:
            """Why to stop, or None."""
            if stop.asked:
                return f"stopped by {stop.asked}"
            over = args.minutes is not None and time.monotonic() - began > 60 * args.minutes
            return f"{args.minutes:g} minutes are over" if over else None

        for study in studies:
            failures, left = _run(study, args, why)
            failed += failures
            reason = why()
            runs = f"{left} run{'' if left == 1 else 's'} left"
            if reason is not None and (left or study is not studies[-1]):
                print(f"{study.name}: {reason}, {runs}; the same command goes on", flush=True)
                # time that is over was planned
                code = STOPPED if stop.asked else 0
                break
            if left:
                # they were only to be scored
                print(f"{study.name}: {runs} to train", flush=True)
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(1 if failed else code)


def _run(study, args, why) -> tuple[list[str], int]:
    """Run a study and show its table; a line for each failure, and how many runs are left."""
    from sra_fast.analysis.study_schedule import Options, run_study
    from sra_fast.analysis.study_table import panels, table
    from sra_fast.plots.study import plot_study
    from sra_fast.utils.stopping import INTERRUPTED

    folder = args.out / study.name
    options = Options(
        args.jobs, args.score_only, args.dry_run, args.variants or (), args.seeds or ()
    )
    # a line after every run, also where nobody looks at a terminal
    report = lambda line: print(line, flush=True)
    try:
        ended = run_study(study, folder, options, why, report)
        results = ended.results
        if results.rows:
            plot_study(folder / "plot.png", panels(results))
            print(f"\n{study.name}\n\n{table(results)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the checkpoints", file=sys.stderr)
        sys.exit(INTERRUPTED)
    return ended.failed, ended.left


def _parse(parser):
    """What was given, checked; ``parser``: without arguments yet."""
    parser.add_argument(
        "study", type=Path, nargs="+", help="YAML file: base, args, seeds, variants, and more"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/ablations"),
        help="a folder for each study is made in here",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help="only these, or further ones than the file's; the table has all that are finished",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        help="only these of the file's; the table has all that are finished",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs at once, each in a process with its share of the cores",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="stop after so many minutes, with a checkpoint of each run; the same command goes on",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        "--score-only",
        "--score_only",
        action="store_true",
        help="score finished runs, and train nothing",
    )
    only.add_argument(
        "--dry-run",
        "--dry_run",
        "--cost",
        action="store_true",
        help="say what is left to do: runs, images, FLOPs and hours",
    )
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    if args.minutes is not None and not args.minutes > 0:
        parser.error(f"--minutes must be more than 0, got {args.minutes:g}")
    return args


if __name__ == "__main__":
    # launched by path, Python looks for modules in this folder: let it look in the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
