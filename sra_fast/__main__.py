"""The console command:  sra-fast COMMAND ARGS, or python -m sra_fast COMMAND ARGS

A command runs the script of the same name. `sra-fast sample ARGS` is the same as
`python sra_fast/sample.py ARGS`.
"""

import sys
from importlib import import_module

COMMANDS = {
    "train": "train SiT, DiT or MMDiT with SRA",
    "sample": "sample images from a run, a checkpoint or an export",
    "evaluate": "FID, sFID, Inception score, precision and recall of samples",
    "held-out": "the denoising loss on images that no run trains on",
    "preprocess": "images to packed VAE moments or pixels, or one layout of moments to another",
    "probe": "linear probes of every layer at several times",
    "visualize": "PCA maps of features, curves of runs, samples side by side",
    "ablate": "run a study: variants of a configuration with several seeds",
    "import-weights": "convert official DiT or SiT weights, or a DiT of diffusers",
    "export": "write weights as .safetensors, .pt, a Hugging Face or a diffusers folder",
}


def usage() -> str:
    lines = ["usage: sra-fast COMMAND ARGS", "", "commands:"]
    lines += [f"  {name:16}{description}" for name, description in COMMANDS.items()]
    lines += ["", "sra-fast COMMAND --help lists the arguments of a command."]
    return "\n".join(lines)


def main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else "nothing"
    if command in ("-h", "--help"):
        print(usage())
        return
    if command not in COMMANDS:
        print(f"error: expected a command of {', '.join(COMMANDS)}, got {command}", file=sys.stderr)
        sys.exit(2)
    # the script's parser reads sys.argv and takes its program name from the first word
    sys.argv = [f"sra-fast {command}", *sys.argv[2:]]
    # imported late, so that --help does not import torch
    import_module(f"sra_fast.{command.replace('-', '_')}").main()


if __name__ == "__main__":
    main()
