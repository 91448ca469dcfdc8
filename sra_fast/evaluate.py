"""Score samples:  python sra_fast/evaluate.py --samples samples.npz --reference ref.npz --inception weights.pth"""

import sys
from pathlib import Path


def main() -> None:
    from sra_fast.utils.stopping import one_line_on_error, one_line_on_interrupt

    one_line_on_interrupt()
    from sra_fast.config.cli import make_parser, parse
    from sra_fast.evaluation.run import Options, run, table

    description = (
        "FID, sFID, Inception score, precision, recall, CLIP score and PickScore of samples."
    )
    options, _ = parse(Options, make_parser(Options, description))
    with one_line_on_error():
        report = run(options)
    print(table(report))


if __name__ == "__main__":
    # launched by path, Python looks for modules in this folder: let it look in the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
