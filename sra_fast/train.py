"""Train SiT or DiT with SRA.

deepspeed sra_fast/train.py --config configs/digits.yaml [--section.field VALUE ...]
"""

import json
import os
import sys
from pathlib import Path


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
    summary = run(plan, init_distributed(cfg.train.tf32))
    if summary:
        print(json.dumps(summary))


if __name__ == "__main__":
    # launched by path, Python looks for modules in this folder: let it look in the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
