"""Weights from anywhere in another format:

python sra_fast/export.py --checkpoint runs/digits/000 --out ema.safetensors
python sra_fast/export.py --checkpoint runs/digits/000 --out digits --push USER/digits
python sra_fast/export.py --checkpoint runs/dit/000 --format diffusers --vae VAE --out pipeline
"""

import sys
from pathlib import Path


def main() -> None:
    from sra_fast.utils.stopping import one_line_on_interrupt

    one_line_on_interrupt()
    from sra_fast.checkpoint.formats import FORMATS, Options, export
    from sra_fast.config.arguments import ArgumentParser

    parser = ArgumentParser(
        description="Write weights, the EMA of a run for example, in another format."
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="run folder (its newest weights), checkpoint folder, .safetensors, shards, a Hugging "
        "Face model folder, or the published code's .pt",
    )
    parser.add_argument("--out", required=True, help="FILE.safetensors, FILE.pt, or a folder")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="default: what the name of --out says, and huggingface for a folder",
    )
    parser.add_argument("--num_heads", type=int, help="for weights that do not say it")
    parser.add_argument(
        "--vae", help="folder of the AutoencoderKL of the latents, for --format diffusers"
    )
    parser.add_argument(
        "--fold-time",
        "--fold_time",
        action="store_true",
        help="fit the time's first layer to the features of diffusers, which are not DiT's",
    )
    parser.add_argument(
        "--weights",
        default="ema",
        help="which weights of a run: ema, model, the name of one of train.averages, or power:SIGMA; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--push", metavar="USER/NAME", help="upload the folder to the Hugging Face hub"
    )
    args = parser.parse_args()
    options = Options(
        args.checkpoint,
        args.out,
        args.format,
        args.num_heads,
        args.vae,
        args.fold_time,
        args.weights,
        args.push,
    )
    try:
        export(options)
    except ValueError as error:
        parser.error(str(error))
    print(args.out)


if __name__ == "__main__":
    # launched by path, Python looks for modules in this folder: let it look in the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
