"""Train SiT or DiT with SRA:  deepspeed sra_fast/train.py --config configs/digits.yaml [--section.field VALUE ...]"""
import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path: import the checkout, not this folder


def main() -> None:
    from sra_fast.engine.cli import parse_train
    from sra_fast.engine.distributed import init_distributed
    from sra_fast.engine.run import prepare, run

    cfg, ds_json = parse_train()
    rank = int(os.environ.get("RANK", 0))
    try:
        plan = prepare(cfg, ds_json)
    except ValueError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    summary = run(plan, init_distributed())
    if rank == 0:
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
