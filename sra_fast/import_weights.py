"""Official DiT or SiT weights to start or sample from:

python sra_fast/import_weights.py --from DiT-XL-2-256x256.pt --model DiT-XL/2 --out
dit_xl2.safetensors
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    from sra_fast.checkpoint.official_weights import import_file

    parser = argparse.ArgumentParser(
        description="Convert weights of the official DiT or SiT release."
    )
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        help="official .pt: a state dict, or a training checkpoint",
    )
    parser.add_argument("--model", required=True, help="{SiT,DiT}-{S,B,L,XL}/{2,4,8}")
    parser.add_argument(
        "--out", required=True, help=".safetensors file for sample.py and train.init_from"
    )
    parser.add_argument("--num_heads", type=int, help="for weights that are no size of the paper's")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the projection head, which the release does not have",
    )
    args = parser.parse_args()
    if not args.out.endswith(".safetensors"):
        parser.error(f"--out must end with .safetensors, got {args.out}")
    try:
        import_file(args.source, args.model, args.out, args.num_heads, args.seed)
    except ValueError as error:
        parser.error(str(error))
    print(args.out)


if __name__ == "__main__":
    # launched by path, Python looks for modules in this folder: let it look in the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
