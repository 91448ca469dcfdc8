"""Images -> packed VAE moments, pixels or features, or one layout of moments -> another:

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
    from sra_fast.data.preprocess import Options, list_bad, make_jobs
    from sra_fast.data.summary import summary
    from sra_fast.data.writer import run_jobs
    from sra_fast.utils.launcher import read_launcher

    parser = make_parser(Options, __doc__.partition(":\n")[0])
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    options, _ = parse(Options, parser)
    try:
        # the processes of a launcher share the work without talking to each other
        read_launcher(group=False)
        if options.bad == "list":
            bad = list(list_bad(options))
            print(*bad, f"{len(bad)} images cannot be read", sep="\n")
            sys.exit(2 if bad else 0)
        jobs = make_jobs(options)
    except ValueError as error:
        # every process of this machine finds the same error: one of them says it
        if os.environ.get("LOCAL_RANK", "0") != "0":
            sys.exit(2)
        fail(error)
    try:
        for job, finished in run_jobs(jobs):
            if finished:
                print(*summary(job, finished), sep="\n")
    except ValueError as error:
        fail(error)


if __name__ == "__main__":
    # launched by path, Python looks for modules in this folder: let it look in the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
