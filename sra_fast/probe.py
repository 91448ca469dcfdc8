"""Linear probes of every layer at several times:

python sra_fast/probe.py --checkpoint runs/digits/000 --out analysis
"""

import sys
from pathlib import Path


def main() -> None:
    from sra_fast.utils.stopping import one_line_on_error, one_line_on_interrupt

    one_line_on_interrupt()
    from sra_fast.analysis.probing import Options, run
    from sra_fast.config.cli import make_parser, parse

    description = "Train linear probes on the frozen features of a SiT, DiT or MMDiT."
    options, _ = parse(Options, make_parser(Options, description))
    with one_line_on_error():
        top = run(options)["best"]
    print(
        f"best: block {top['layer']} at t = {top['time']:g}, {top['accuracy']:.1%}; {options.out}/probe.json, probe.png"
    )


if __name__ == "__main__":
    # launched by path, Python looks for modules in this folder: let it look in the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
