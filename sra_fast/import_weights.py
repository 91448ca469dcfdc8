"""Weights of other projects to start or sample from: official DiT and SiT, and DiT of diffusers:

python sra_fast/import_weights.py --from DiT-XL-2-256x256.pt --model DiT-XL/2 --out
dit_xl2.safetensors
python sra_fast/import_weights.py --from PIPELINE_FOLDER --out dit_xl2.safetensors
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    from sra_fast.checkpoint.diffusers_folder import import_pipeline
    from sra_fast.checkpoint.official_weights import import_file
    from sra_fast.checkpoint.sources import transformer_folder

    parser = argparse.ArgumentParser(
        description="Convert weights of the official DiT or SiT release, or of a DiT of diffusers."
    )
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        help="official .pt: a state dict, or a training checkpoint; or a folder of diffusers: a "
        "DiTPipeline, or its transformer",
    )
    parser.add_argument(
        "--model", help="{SiT,DiT}-{S,B,L,XL}/{2,4,8}; a folder of diffusers says it itself"
    )
    parser.add_argument(
        "--out", required=True, help=".safetensors file for sample.py and train.init_from"
    )
    parser.add_argument("--num_heads", type=int, help="for weights that are no size of the paper's")
    parser.add_argument(
        "--input_size", type=int, help="for weights without a position embedding: side of the input"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the projection head, which other projects do not have",
    )
    parser.add_argument(
        "--fold-time",
        action="store_true",
        help="for a DiT that was trained in diffusers: fit its time's first layer to our features",
    )
    args = parser.parse_args()
    if not args.out.endswith(".safetensors"):
        parser.error(f"--out must end with .safetensors, got {args.out}")
    pipeline = transformer_folder(Path(args.source)) is not None
    options = {name: getattr(args, name) for name in ("model", "num_heads", "input_size")}
    given = [f"--{name} {value}" for name, value in options.items() if value is not None]
    if pipeline and given:
        parser.error(f"a folder of diffusers says its model itself: expected no {given[0]}")
    if args.fold_time and not pipeline:
        parser.error("--fold-time is for folders of diffusers, got no such folder")
    if not pipeline and args.model is None:
        parser.error(
            "--model must say what the weights are, {SiT,DiT}-{S,B,L,XL}/{2,4,8}, got none"
        )
    try:
        if pipeline:
            import_pipeline(args.source, args.out, args.seed, args.fold_time)
        else:
            import_file(
                args.source, args.model, args.out, args.num_heads, args.seed, args.input_size
            )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(args.out)


if __name__ == "__main__":
    # launched by path, Python looks for modules in this folder: let it look in the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
