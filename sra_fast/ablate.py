"""Run a study, variants of a configuration with several seeds:  python sra_fast/ablate.py configs/ablations/layers.yaml

Writes runs/ablations/<study>/table.md, rows.json and plot.png. The same command resumes after an
interruption.
"""

import argparse
import sys
import time
from pathlib import Path


def main() -> None:
    # before the imports, which take seconds: the launcher may end meanwhile
    from sra_fast.utils.processes import LauncherWatch

    launchers = LauncherWatch()
    began = time.monotonic()
    from sra_fast.analysis.study import read_study, run_study, table
    from sra_fast.plots.report import plot_study
    from sra_fast.training.signals import INTERRUPTED, STOPPED, StopSignals

    args, parser = _parse()
    try:
        studies = [read_study(path) for path in args.study]
    except ValueError as error:
        parser.error(str(error))
    failed = []
    code = 0
    with StopSignals(launchers) as stop:
        over = lambda: args.minutes and time.monotonic() - began > 60 * args.minutes
        for study in studies:
            if args.seeds:
                study.seeds[:] = args.seeds
            folder = args.out / study.name
            try:
                result = run_study(study, folder, args.jobs, lambda: stop.asked or over())
            except (ValueError, RuntimeError, OSError) as error:
                sys.exit(f"error: {error}")
            except KeyboardInterrupt:
                print("interrupted; the same command resumes", file=sys.stderr)
                sys.exit(INTERRUPTED)
            failed += result.failed
            if result.rows:
                plot_study(folder / "plot.png", result.rows)
                print(f"\n{study.name}\n\n{table(result.rows)}")
            if stop.asked or over():
                why = (
                    f"stopped by {stop.asked}"
                    if stop.asked
                    else f"{args.minutes:g} minutes are over"
                )
                runs = f"{result.left} run{'' if result.left == 1 else 's'} left"
                print(f"{study.name}: {why}: {runs}; the same command resumes")
                code = STOPPED if stop.asked else 0
                break
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(1 if failed else code)


def _parse() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=__doc__.partition(":  ")[0])
    parser.add_argument(
        "study", type=Path, nargs="+", help="YAML file: base, args, seeds, variants"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/ablations"),
        help="a folder for each study is made in here",
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the file's")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs at once, each in a process with its share of the cores",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="stop after so many minutes, with a checkpoint of each run; the same command resumes",
    )
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    if args.minutes is not None and args.minutes <= 0:
        parser.error(f"--minutes must be more than 0, got {args.minutes:g}")
    return args, parser


if __name__ == "__main__":
    # launched by path, Python looks for modules in this folder: let it look in the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
