"""Several ranks of a gloo group for a test: one process that imports torch once and forks them."""

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

from launch import ROOT, environment

BEFORE = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import torch
import torch.distributed as dist

torch.set_num_threads(1)
WORLD = {world}
FOLDER = {folder!r}
"""
AFTER = """
children = []
for rank in range(WORLD):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            store = {store}
            dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
            main(rank)
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
sys.exit(max(map(abs, codes)))
"""
STORES = {
    "file": 'dist.FileStore(FOLDER + "/store", WORLD)',
    "tcp": 'dist.TCPStore("127.0.0.1", PORT, WORLD, rank == 0, multi_tenant=True)',
}


def run_ranks(
    source: str, world: int, folder: Path, port: str | None = None
) -> subprocess.CompletedProcess:
    """Fork ``world`` ranks that join a gloo group and call ``main(rank)`` of ``source``.

    Args:
        source: Python, with ``WORLD`` and ``FOLDER`` defined; prints are captured.
        world: number of ranks.
        folder: for the store's file.
        port: of a TCP store, as launchers make it; None: a store in a file.
    """
    script = BEFORE.format(root=str(ROOT), world=world, folder=str(folder))
    script += f"PORT = {port}\n" + dedent(source)
    script += AFTER.format(store=STORES["tcp" if port else "file"])
    return subprocess.run(
        [sys.executable, "-c", script],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
