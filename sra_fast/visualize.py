"""Pictures of models and runs:  python sra_fast/visualize.py --checkpoint runs/digits/000 --out analysis

PCA maps of features (--checkpoint), loss and norm curves (--runs), samples side by side
(--samples).
"""

import sys
from pathlib import Path


def main() -> None:
    from sra_fast.utils.stopping import one_line_on_error, one_line_on_interrupt

    one_line_on_interrupt()
    from sra_fast.analysis.pictures import Options, run
    from sra_fast.config.cli import make_parser, parse

    description = "Draw PCA maps of features, curves of runs and samples side by side."
    options, _ = parse(Options, make_parser(Options, description))
    with one_line_on_error():
        print(*run(options), sep="\n")


if __name__ == "__main__":
    # launched by path, Python looks for modules in this folder: let it look in the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
