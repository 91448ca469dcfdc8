"""Score samples:  python sra_fast/evaluate.py --samples samples.npz --reference ref.npz --inception weights.pth"""

import sys
from pathlib import Path


def main() -> None:
    from sra_fast.utils.stopping import one_line_on_interrupt

    one_line_on_interrupt()
    from sra_fast.config.cli import make_parser, parse
    from sra_fast.evaluation.run import Options, run, table

    description = (
        "FID, sFID, Inception score, precision, recall, CLIP score and PickScore of samples."
    )
    options, _ = parse(Options, make_parser(Options, description))
    try:
        report = run(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        sys.exit(f"error: {error}")
    print(table(report))


if __name__ == "__main__":
    # launched by path, Python looks for modules in this folder: let it look in the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
