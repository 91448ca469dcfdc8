"""Images -> packed VAE moments, or one layout of moments -> another:

deepspeed sra_fast/preprocess.py --source imagenet/train --vae sd-vae-ft-mse --resolution 256 --out
data/imagenet256
"""

import os
import sys
from pathlib import Path


def fail(error: Exception) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


def main() -> None:
    from sra_fast.config.cli import make_parser, parse
    from sra_fast.data.preprocess import Options, make_job
    from sra_fast.data.writer import run_job

    parser = make_parser(Options, __doc__.partition(":\n")[0])
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    options, _ = parse(Options, parser)
    try:
        job = make_job(options)
    except ValueError as error:
        # every process of this machine finds the same error: one of them says it
        if int(os.environ.get("LOCAL_RANK", 0)):
            sys.exit(2)
        fail(error)
    try:
        completed = run_job(job)
    except ValueError as error:
        fail(error)
    if completed:
        print(f"{job.out}: {len(job.source)} images of {job.recipe['num_classes']} classes")


if __name__ == "__main__":
    # launched by path, Python looks for modules in this folder: let it look in the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
