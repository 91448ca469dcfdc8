"""Images -> packed VAE moments, pixels or features, or one layout of moments -> another:

deepspeed sra_fast/preprocess.py --source imagenet/train --vae sd-vae-ft-mse --resolution 256 --out
data/imagenet256
"""

import sys
from pathlib import Path


def say(*lines: str) -> None:
    """Print lines. What the terminal's encoding lacks, such as bytes in a file's name that are no
    UTF-8, is written as escapes, as Python does it for errors.
    """
    encoding = sys.stdout.encoding or "utf-8"
    for line in lines:
        print(line.encode(encoding, "backslashreplace").decode(encoding))


def main() -> None:
    from sra_fast.utils.stopping import fail, one_line_on_interrupt

    one_line_on_interrupt("stopped; the same command resumes")
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
            say(*bad, f"{len(bad)} images cannot be read")
            sys.exit(2 if bad else 0)
        jobs = make_jobs(options)
        for job, finished in run_jobs(jobs):
            if finished:
                say(*summary(job, finished))
    except ValueError as error:
        fail(f"error: {error}")


if __name__ == "__main__":
    # launched by path, Python looks for modules in this folder: let it look in the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
