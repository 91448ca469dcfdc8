"""Run a study, variants of a configuration with several seeds:  python sra_fast/ablate.py configs/ablations/layers.yaml

Writes runs/ablations/<study>/table.md, rows.json and plot.png. The same command resumes after an
interruption.
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    from sra_fast.analysis.study import read_study, run_study, table
    from sra_fast.plots.report import plot_study

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
    args = parser.parse_args()
    try:
        studies = [read_study(path) for path in args.study]
    except ValueError as error:
        parser.error(str(error))
    for study in studies:
        if args.seeds:
            study.seeds[:] = args.seeds
        folder = args.out / study.name
        try:
            rows = run_study(study, folder)
        except (ValueError, RuntimeError, OSError) as error:
            sys.exit(f"error: {error}")
        plot_study(folder / "plot.png", rows)
        print(f"\n{study.name}\n\n{table(rows)}")


if __name__ == "__main__":
    # launched by path, Python looks for modules in this folder: let it look in the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
