"""Train SiT or DiT with SRA.

deepspeed sra_fast/train.py --config configs/digits.yaml [--section.field VALUE ...]
"""

import json
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

# seconds in which a launcher ends the other ranks after one has failed: DeepSpeed's looks every second
LAUNCHER_REACTS = 3.0


@contextmanager
def one_line_for_all():
    """What stops a run ends this process with one line and exit code 2; 1 if the loss diverged.

    All ranks mostly fail alike, and rank 0 speaks for them. The launcher ends those that wait for a
    rank that is gone.
    """
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        rank = int(os.environ.get("RANK", 0))
        who = "error"
        if rank:
            # whoever is still alive after this has failed alone
            time.sleep(LAUNCHER_REACTS)
            who = f"error on rank {rank}"
        print(f"{who}: {error}", file=sys.stderr, flush=True)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)


def main() -> None:
    # these rooms register the choices of the command line, so they come before the parser
    from sra_fast.config.cli import parse_train
    from sra_fast.training.plan import make_run_plan
    from sra_fast.training.run import run
    from sra_fast.zero.process_group import init_distributed

    cfg, ds_json = parse_train()
    try:
        plan = make_run_plan(cfg, ds_json)
    except ValueError as error:
        # once on every machine: another one may lack the data
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    with one_line_for_all():
        summary = run(plan, init_distributed(cfg.train.tf32))
    if summary:
        print(json.dumps(summary))


if __name__ == "__main__":
    # launched by path, Python looks for modules in this folder: let it look in the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
