"""Official DiT or SiT weights to start or sample from:

python sra_fast/import_weights.py --from DiT-XL-2-256x256.pt --model DiT-XL/2 --out dit_xl2.safetensors
"""

import argparse
import json
import sys
from pathlib import Path

sys.path[0] = str(
    Path(__file__).resolve().parents[1]
)  # launched by path: import the checkout, not this folder


def run(source: str, name: str, out: str, num_heads: int | None = None, seed: int = 0) -> None:
    """Convert and write; ValueError says what is wrong."""
    from dataclasses import asdict

    from safetensors.torch import save_file

    from sra_fast.checkpoint.official_weights import convert, interpolant, model_config
    from sra_fast.checkpoint.reading import read_weights
    from sra_fast.utils.files import make_folder, write_atomic

    held = read_weights(source)
    state = held.get("ema", held.get("model"))
    cfg = model_config(state, name, num_heads)
    metadata = {
        "config": json.dumps(
            {"model": asdict(cfg), "diffusion": {"path": interpolant(held.get("args"))}}
        )
    }
    model = convert(state, cfg, seed)
    file = make_folder(Path(out).parent) / Path(out).name
    write_atomic(file, lambda p: save_file(model.state_dict(), p, metadata=metadata))


def main() -> None:
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
        run(args.source, args.model, args.out, args.num_heads, args.seed)
    except ValueError as error:
        parser.error(str(error))
    print(args.out)


if __name__ == "__main__":
    main()
