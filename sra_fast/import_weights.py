"""Weights of other projects to start or sample from: official DiT and SiT, SD3, and DiT and SD3 of
diffusers:

python sra_fast/import_weights.py --from DiT-XL-2-256x256.pt --model DiT-XL/2 --out
dit_xl2.safetensors
python sra_fast/import_weights.py --from PIPELINE_FOLDER --out dit_xl2.safetensors
python sra_fast/import_weights.py --from sd3.safetensors --input_size 128 --out mmdit.safetensors
"""

import sys
from pathlib import Path


def main() -> None:
    from sra_fast.utils.stopping import one_line_on_interrupt

    one_line_on_interrupt()
    from sra_fast.checkpoint.diffusers_folder import import_pipeline
    from sra_fast.checkpoint.official_weights import import_file
    from sra_fast.checkpoint.sources import transformer_folder
    from sra_fast.config.arguments import ArgumentParser

    parser = ArgumentParser(
        description="Convert weights of the official DiT, SiT or SD3 release, or of a DiT or SD3 "
        "of diffusers."
    )
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        help="official file: a state dict, or a training checkpoint; or a folder of diffusers: a "
        "DiTPipeline or StableDiffusion3Pipeline, or its transformer",
    )
    parser.add_argument(
        "--model",
        help="{SiT,DiT}-{S,B,L,XL}/{2,4,8}; a folder of diffusers, and an MMDiT, say it themselves",
    )
    parser.add_argument(
        "--out", required=True, help=".safetensors file for sample.py and train.init_from"
    )
    parser.add_argument("--num_heads", type=int, help="for weights that are no size of the paper's")
    parser.add_argument(
        "--input_size",
        type=int,
        help="side of the input: for weights without a position embedding, and for SD3, whose "
        "table is that of its largest image",
    )
    parser.add_argument(
        "--time-scale",
        "--time_scale",
        type=float,
        help="for an MMDiT that does not say it: what times are multiplied by; default: 1000 with a "
        "pooled feature (SD3), otherwise 1",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the projection head, which other projects do not have",
    )
    parser.add_argument(
        "--fold-time",
        "--fold_time",
        action="store_true",
        help="for a DiT that was trained in diffusers: fit its time's first layer to our features",
    )
    args = parser.parse_args()
    if not args.out.endswith(".safetensors"):
        parser.error(f"--out must end with .safetensors, got {args.out}")
    pipeline = transformer_folder(Path(args.source)) is not None
    options = {name: getattr(args, name) for name in ("model", "num_heads", "time_scale")}
    given = [f"--{name} {value}" for name, value in options.items() if value is not None]
    if pipeline and given:
        parser.error(f"a folder of diffusers says its model itself: expected no {given[0]}")
    if args.fold_time and not pipeline:
        parser.error("--fold-time is for folders of diffusers, got no such folder")
    try:
        if pipeline:
            import_pipeline(args.source, args.out, args.seed, args.fold_time, args.input_size)
        else:
            sizes = (args.num_heads, args.seed, args.input_size, args.time_scale)
            import_file(args.source, args.model, args.out, *sizes)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        place = error.filename or args.out
        parser.error(f"{place} cannot be read or written: {error.strerror or error}")
    print(args.out)


if __name__ == "__main__":
    # launched by path, Python looks for modules in this folder: let it look in the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
