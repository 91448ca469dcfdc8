"""Which of the processes above this one are its launchers."""

import os
import subprocess
import sys

import pytest
from launch import ROOT, environment, run_python

from sra_fast.utils import processes
from sra_fast.utils.processes import LauncherWatch, is_launcher, was_orphaned


@pytest.mark.parametrize(
    "command, expected",
    [
        ("/usr/bin/python3 /env/bin/deepspeed --num_gpus 8 train.py", True),
        ("python -u -m deepspeed.launcher.launch --world_info x train.py", True),
        ("python -m torch.distributed.run train.py", True),
        ("python -um torch.distributed.run train.py", True),
        ("python -mtorch.distributed.run train.py", True),
        ("python3.11 -X dev -Wignore -W error -B /env/bin/torchrun train.py", True),
        ("python3 --check-hash-based-pycs never -O torchrun", True),
        ("/env/bin/python /env/bin/torchrun train.py", True),
        ("/env/bin/python /env/bin/accelerate launch train.py", True),
        ("pdsh -S -f 1024 -w a,b", True),
        ("python sra_fast/ablate.py --study x", True),
        ("python -m sra_fast.ablate --study x", True),
        ("python -m sra_fast ablate --study x", True),
        ("/env/bin/python /env/bin/sra-fast ablate --study x", True),
        ("/env/bin/python /env/bin/sra-fast train", False),
        ("/env/bin/python /env/bin/sra-fast train ablate", False),
        ("-bash", False),
        ("bash run.sh ds", False),
        ("bash deepspeed", False),
        ("vim torchrun", False),
        ("less sra_fast/ablate.py", False),
        ("python run_all.py torchrun", False),
        ("python -c torchrun", False),
        ("python -uc x torchrun", False),
        ("python - torchrun", False),
        ("python -X torchrun train.py", False),
        ("python -m pdb torchrun", False),
        ("python -m", False),
        ("python", False),
        ("/usr/sbin/slurmstepd", False),
        ("", False),
    ],
)
def test_launchers_are_known_by_their_program(command, expected):
    assert is_launcher(command.split()) == expected


def above(monkeypatch, *tree: tuple[int, str]) -> None:
    """Let the processes above this one be these: parent first, its number and its command."""
    commands = dict(tree)
    parents = dict(zip(commands, [*commands, 0][1:], strict=True))
    monkeypatch.setattr(os, "getppid", lambda: next(iter(commands)))
    monkeypatch.setattr(processes, "_command", lambda pid: commands[pid].split())
    monkeypatch.setattr(
        processes,
        "_status",
        lambda pid: (processes.Process(pid, 0), parents[pid]) if pid in parents else None,
    )


def test_only_launchers_that_follow_each_other_count(monkeypatch):
    launch = "python -m deepspeed.launcher.launch"
    above(monkeypatch, (9, launch), (8, "deepspeed x"), (7, "bash"), (6, "torchrun"))
    assert [p.pid for p in processes.launchers()] == [9, 8]


@pytest.mark.parametrize(
    "mark, parent, expected",
    [
        ("TORCHELASTIC_RUN_ID", (1, "/sbin/init splash"), True),
        ("CROSS_RANK", (1, "/sbin/init splash"), True),
        # of srun or mpirun, or given by hand
        ("RANK", (1, "/sbin/init splash"), False),
        ("TORCHELASTIC_RUN_ID", (1, "bash"), True),
        ("TORCHELASTIC_RUN_ID", (812, "/usr/lib/systemd/systemd --user"), True),
        ("TORCHELASTIC_RUN_ID", (812, "slurmstepd: [17.0]"), True),
        # the launcher is the first process of a container
        ("TORCHELASTIC_RUN_ID", (1, "python /env/bin/torchrun train.py"), False),
        ("TORCHELASTIC_RUN_ID", (1, "python my_launcher.py"), False),
        ("TORCHELASTIC_RUN_ID", (812, "python my_launcher.py"), False),
        ("TORCHELASTIC_RUN_ID", (812, "bash run.sh"), False),
        # outside of a container
        ("TORCHELASTIC_RUN_ID", (0, ""), False),
    ],
)
def test_a_process_of_init_has_lost_its_launcher(monkeypatch, mark, parent, expected):
    for name in processes.MARKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(mark, "0")
    above(monkeypatch, parent)
    assert was_orphaned() == expected
    assert LauncherWatch().gone() == expected


# adopts the processes below it, as systemd does; its launcher ends before the process looks
ADOPTER = """
import ctypes, os, subprocess, sys
PR_SET_CHILD_SUBREAPER = 36
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
subprocess.run([sys.executable, *sys.argv[1:]], check=True)
# the adopted process
os.wait()
"""
LAUNCHER = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())])
"""
ADOPTED = """
import os, sys, time
until = time.monotonic() + 60
while os.getppid() == int(sys.argv[1]) and time.monotonic() < until:
    time.sleep(0.01)
sys.path.insert(0, {root!r})
from sra_fast.utils.processes import LauncherWatch
watch = LauncherWatch()
print(watch.launchers, watch.gone(), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="adoption by another process than 1")
@pytest.mark.parametrize("name, gone", [("systemd", True), ("supervisor.py", False)])
def test_a_launcher_that_ended_before_the_first_look(tmp_path, name, gone):
    adopter = tmp_path / name
    adopter.write_text(ADOPTER)
    launcher = tmp_path / "torchrun"
    launcher.write_text(LAUNCHER)
    done = subprocess.run(
        [sys.executable, adopter, launcher, ADOPTED.format(root=str(ROOT))],
        env=environment(TORCHELASTIC_RUN_ID="none"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout, done.stderr) == (f"[] {gone}\n", "")


def test_only_the_standard_library_is_needed():
    """The first lines of the training program import it, before the launcher can end."""
    source = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); before = set(sys.modules)\n"
        "import sra_fast.utils.processes, sra_fast.utils.streams\n"
        "tops = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(tops - sys.stdlib_module_names))"
    )
    done = run_python("-c", source)
    assert (done.stdout, done.stderr) == ("sra_fast\n", "")
