"""The EMA of a checkpoint as a .safetensors file:

python sra_fast/export.py --checkpoint runs/digits/000 --out ema.safetensors
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    from sra_fast.checkpoint.export import export_checkpoint

    parser = argparse.ArgumentParser(description="Export the EMA of a checkpoint as safetensors.")
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="run folder (its newest checkpoint) or checkpoint folder",
    )
    parser.add_argument(
        "--out", required=True, help=".safetensors file for sample.py and train.init_from"
    )
    args = parser.parse_args()
    try:
        export_checkpoint(args.checkpoint, args.out)
    except ValueError as error:
        parser.error(str(error))
    print(args.out)


if __name__ == "__main__":
    # launched by path, Python looks for modules in this folder: let it look in the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
