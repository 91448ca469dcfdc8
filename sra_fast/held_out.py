"""The held-out denoising loss:  python sra_fast/held_out.py --checkpoint runs/mine/000

Under a launcher (`deepspeed sra_fast/held_out.py ...`) every process takes its share; the result is
the same.
"""

import sys
from pathlib import Path


def main() -> None:
    from sra_fast.utils.stopping import one_line_on_error, one_line_on_interrupt

    one_line_on_interrupt()
    from sra_fast.analysis.held_out_loss import Options, run, table
    from sra_fast.config.cli import make_parser, parse

    parser = make_parser(Options, "The denoising loss on images that no run trains on.")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    options, _ = parse(Options, parser)
    with one_line_on_error():
        report = run(options)
    if report:
        print(table(report))


if __name__ == "__main__":
    # launched by path, Python looks for modules in this folder: let it look in the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
