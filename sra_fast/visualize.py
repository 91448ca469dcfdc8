"""Pictures of models and runs:  python sra_fast/visualize.py --checkpoint runs/digits/000 --out analysis

PCA maps of features (--checkpoint), loss and norm curves (--runs), samples side by side
(--samples).
"""

import sys
from pathlib import Path


def main() -> None:
    from sra_fast.utils.stopping import one_line_on_interrupt

    one_line_on_interrupt()
    from sra_fast.analysis.pictures import Options, run
    from sra_fast.config.cli import make_parser, parse

    description = "Draw PCA maps of features, curves of runs and samples side by side."
    parser = make_parser(Options, description)
    options, _ = parse(Options, parser)
    try:
        print(*run(options), sep="\n")
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    # launched by path, Python looks for modules in this folder: let it look in the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
