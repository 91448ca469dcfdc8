"""Train SiT, DiT or MMDiT with SRA.

deepspeed sra_fast/train.py --config configs/digits.yaml [--section.field VALUE ...]
"""

import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def one_line_for_all(out: Path | None = None, speaker: str = "RANK"):
    """What stops a run ends this process with one line and the exit code of its kind.

    Exit codes: 2 for what a user can change; 1 if training diverged or another process died; 75 if
    the run was asked to stop and can be resumed; 130 for Ctrl-C. Mostly all ranks fail alike and
    one of them prints the line. If one has died, the launcher ends the others.

    Args:
        out: folder of the run, for errors that do not name their file.
        speaker: who prints. ``RANK``: rank 0, or a rank that has failed alone. ``LOCAL_RANK``: one
            process of every machine, as long as the processes do not know each other.
    """
    # this room imports DeepSpeed, which no other program does
    from sra_fast.training.endings import ending_of
    from sra_fast.utils import stopping

    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        ending = ending_of(error, out)
        if ending is None:
            raise
        rank = int(os.environ.get(speaker) or 0)
        line = ending.line
        if ending.alike or speaker == "LOCAL_RANK":
            speaks = rank == 0
        else:
            if rank or ending.noticed:
                # whoever is still alive after this has failed alone: the launcher's signal, which a
                # run only notes, ends the others
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(stopping.LAUNCHER_REACTS)
            line = stopping.of_rank(line, rank)
            speaks = True
        if speaks:
            print(line, file=sys.stderr, flush=True)
        sys.exit(ending.code)


def main() -> None:
    # before the imports, which take seconds: the launcher may end and the terminal be closed meanwhile
    from sra_fast.utils.processes import LauncherWatch
    from sra_fast.utils.streams import outlive_streams

    launchers = LauncherWatch()
    outlive_streams()

    # these rooms register the choices of the command line, so they come before the parser
    from sra_fast.config.cli import parse_train
    from sra_fast.training.plan import make_run_plan
    from sra_fast.training.run import run
    from sra_fast.training.signals import StopSignals
    from sra_fast.utils.launcher import read_launcher
    from sra_fast.zero.process_group import init_distributed

    cfg, ds_json = parse_train()
    out = Path(cfg.train.out)
    with StopSignals(launchers) as stop:
        with one_line_for_all(out, speaker="LOCAL_RANK"):
            read_launcher()
            plan = make_run_plan(cfg, ds_json)
            stop.check()
        with one_line_for_all(out):
            summary = run(plan, init_distributed(cfg.train.tf32), stop)
    if summary:
        print(json.dumps(summary))


if __name__ == "__main__":
    # launched by path, Python looks for modules in this folder: let it look in the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
