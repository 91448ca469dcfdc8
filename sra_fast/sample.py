"""Sample images:  python sra_fast/sample.py --checkpoint runs/digits/000 --count 100 --out samples

Under a launcher (`deepspeed sra_fast/sample.py ...`) every process makes its share. The same
command resumes after an interruption; finished samples of another one are refused.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    # before the imports, which take seconds
    from sra_fast.utils.stopping import one_line_on_error, one_line_on_interrupt

    one_line_on_interrupt("stopped; the same command resumes")
    from sra_fast.config.cli import make_parser, parse
    from sra_fast.sampling.run import Options, load_job, run
    from sra_fast.utils.launcher import read_launcher

    parser = make_parser(Options, "Sample images from a SiT, DiT or MMDiT.")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    options, _ = parse(Options, parser)

    def not_written(error: OSError) -> str:
        return (
            f"cannot write {options.out}: {error}; finished parts are kept, "
            "the same command resumes"
        )

    with one_line_on_error(not_written):
        # the processes of a launcher share the work without talking to each other
        read_launcher(group=False)
        summary = run(load_job(options))
    if summary:
        print(json.dumps(summary))


if __name__ == "__main__":
    # launched by path, Python looks for modules in this folder: let it look in the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
