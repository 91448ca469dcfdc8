"""What launchers say, and what happens if they say half of it."""

import os
import socket

import pytest
from launch import GROUP, call, error_of, free_port, run_python

from sra_fast.utils.launcher import first_host, read_launcher, tasks_per_node
from sra_fast.zero.process_group import _why_apart

COMPLETE = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "12",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-05,9],big1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x3)",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "12",
}
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.fixture
def variables(monkeypatch):
    """Set these variables and no others of a launcher, read them, and return what is set then."""

    def read(given: dict, group: bool = True) -> dict:
        for name in list(os.environ):
            if (
                name in GROUP
                or name == "LOCAL_SIZE"
                or name.startswith(("SLURM_", "OMPI_", "PMI_", "MPI_"))
            ):
                monkeypatch.delenv(name)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        # what the call itself sets goes with monkeypatch
        for name in GROUP - given.keys():
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        read_launcher(group)
        return {name: os.environ[name] for name in GROUP if name in os.environ}

    return read


def test_no_launcher_is_one_process(variables):
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert variables({}) == alone
    # one process needs no place to meet
    assert variables({"WORLD_SIZE": "1", "RANK": "0"}) == alone
    # the shell of a batch script is no task
    batch = {name: value for name, value in SRUN.items() if "STEP" not in name}
    assert variables(batch) == alone
    assert variables({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}) == alone


def test_what_a_launcher_sets_is_left_as_it_is(variables):
    assert variables(COMPLETE) == COMPLETE
    assert variables({**COMPLETE, "LOCAL_WORLD_SIZE": "2"}) == {**COMPLETE, "LOCAL_WORLD_SIZE": "2"}
    # DeepSpeed's name for the number of processes on this machine
    assert variables({**COMPLETE, "LOCAL_SIZE": "2"}) == {**COMPLETE, "LOCAL_WORLD_SIZE": "2"}
    # inside of srun too: torchrun has been started by it
    assert variables({**COMPLETE, **SRUN}) == COMPLETE


@pytest.mark.parametrize("missing", [*COMPLETE, "RANK WORLD_SIZE", "MASTER_ADDR MASTER_PORT"])
def test_what_is_missing_is_named(variables, missing):
    names = missing.split()
    given = {name: value for name, value in COMPLETE.items() if name not in names}
    with pytest.raises(ValueError, match=f"but not {', '.join(names)}: use a launcher"):
        variables(given)


def test_processes_that_do_not_talk_need_no_place_to_meet(variables):
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    assert variables(given, group=False) == given
    with pytest.raises(ValueError, match="but not MASTER_ADDR, MASTER_PORT"):
        variables(given)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"RANK": "one"}, "RANK must be a whole number, got 'one'"),
        ({"RANK": "-1"}, "RANK must be a whole number, got '-1'"),
        ({"RANK": "2"}, "RANK must be below WORLD_SIZE 2, got 2"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be at least 1, got 0"),
        ({"LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK must be below LOCAL_WORLD_SIZE 1, got 1"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE must be at most WORLD_SIZE 2, got 3"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT must be from 1 to 65535, got 99999"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT must be a whole number, got 'http'"),
    ],
)
def test_values_that_contradict_each_other(variables, wrong, message):
    with pytest.raises(ValueError, match=message):
        variables({**COMPLETE, **wrong})


def test_tasks_of_srun_know_their_place(variables):
    read = variables(SRUN)
    port = int(read.pop("MASTER_PORT"))
    assert read == {
        "RANK": "5",
        "WORLD_SIZE": "12",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu03",
    }
    assert 15000 <= port < 32768
    # every task finds the same port, another step of the job another one
    other_task = {**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    assert int(variables(other_task)["MASTER_PORT"]) == port
    assert int(variables({**SRUN, "SLURM_STEP_ID": "3"})["MASTER_PORT"]) != port
    # what the batch script has chosen holds
    chosen = {"MASTER_ADDR": "login", "MASTER_PORT": "4000"}
    read = variables({**SRUN, **chosen})
    assert (read["MASTER_ADDR"], read["MASTER_PORT"]) == ("login", "4000")


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID"])
def test_what_srun_does_not_say_is_named(variables, missing):
    given = {name: value for name, value in SRUN.items() if name != missing}
    with pytest.raises(ValueError, match=f"one of 12, but {missing} not set"):
        variables(given)


def test_processes_of_mpirun_do_not_train_alone(variables):
    with pytest.raises(ValueError, match=r"Open MPI started this .* MASTER_ADDR, MASTER_PORT"):
        variables(MPIRUN)
    place = {"MASTER_ADDR": "first", "MASTER_PORT": "4000"}
    expected = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **place}
    assert variables({**MPIRUN, **place}) == expected
    # its daemons are tasks of srun, its processes are not
    assert variables({**MPIRUN, **place, **SRUN}) == expected
    intel = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    assert variables({**intel, **place}) == expected
    with pytest.raises(ValueError, match="MPICH or Intel MPI .* MPI_LOCALRANKID not set"):
        variables({**intel, **place, "MPI_LOCALRANKID": ""})


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("node7", "node7"),
        ("node[01-04,7],other", "node01"),
        ("a,b[1-2]", "a"),
        ("rack[2-3]node[08,10]", "rack2node08"),
        ("n[5]-gpu.cluster,x", "n5-gpu.cluster"),
    ],
)
def test_first_host_of_a_list(nodes, host):
    assert first_host(nodes) == host


def test_lists_that_are_none():
    for nodes in ("", ",a", "[", "]x"):
        with pytest.raises(ValueError, match="must be like node"):
            first_host(nodes)
    assert tasks_per_node("8(x2),4") == [8, 8, 4]
    assert tasks_per_node("3") == [3]
    with pytest.raises(ValueError, match="must be like 8"):
        tasks_per_node("8x2")


JOIN = """
import os, sys
os.environ.update(RANK=sys.argv[1], WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR=sys.argv[2])
os.environ["MASTER_PORT"] = sys.argv[3]
from datetime import timedelta
from sra_fast.zero import process_group
process_group.JOIN_TIMEOUT = timedelta(seconds=1)
try:
    process_group.init_distributed()
except ValueError as error:
    print(error)
"""


def test_processes_that_do_not_find_each_other():
    def said(rank, host, port):
        done = run_python("-c", JOIN, rank, host, port)
        assert done.returncode == 0, done.stderr
        return done.stdout

    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert said(0, "localhost", port).startswith(
            f"MASTER_PORT {port} is in use on this machine"
        )
    port = free_port()
    place = f"MASTER_ADDR 127.0.0.1, MASTER_PORT {port}: "
    assert said(1, "127.0.0.1", port).startswith(f"the processes do not find each other at {place}")
    host = "no-such-host.invalid"
    assert said(1, host, port).startswith(f"MASTER_ADDR must be the host of rank 0, got '{host}'")


def test_only_the_first_line_of_what_torch_says():
    long = _why_apart("first line\nException raised from\n#1 0x7f", "h", "1")
    assert long.endswith("MASTER_ADDR h, MASTER_PORT 1: first line")


@pytest.mark.parametrize("name, arguments", [("sample", ["--checkpoint", "x"]), ("train", [])])
def test_the_programs_refuse_half_a_launcher(tmp_path, monkeypatch, name, arguments):
    # `call` takes away the variables of a group, and srun's are none
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    done = call(name, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert error_of(done).startswith(
        "error: srun started this process as one of 2, but SLURM_PROCID"
    )
