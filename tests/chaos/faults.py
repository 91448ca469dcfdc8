"""Kinds of cases in which a number is not finite, and in which somebody asks the run to stop."""

import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import children
import psutil
import torch
from bench import EVERY, LOST, SETTINGS, SILENT, STEPS, SURVIVED, Setting, Verdict, tail
from cases import PHASES, Case, kind
from launch import free_port
from states import final_state, not_finite

from sra_fast.training import loop, saver
from sra_fast.training.host_copy import flats_by_kind

NAN = float("nan")
# said by a rank into the log after the step with a fault
UNCHANGED = "chaos: unchanged by the step"
CHANGED = "chaos: changed by the step"


def state_of(trainer) -> dict[str, list[torch.Tensor]]:
    """Copies of this rank's masters, moments and EMA, and of the weights that it computes with."""
    tensors = {
        name: [flat.clone() for flat in flats] for name, flats in flats_by_kind(trainer).items()
    }
    live = trainer.student.parameters()
    tensors["live"] = [parameter.detach().clone() for parameter in live]
    return tensors


def with_fault(where: str, rank: int, at: int, value: float):
    """A hook that puts a number that is not finite into a run.

    Args:
        where: ``latent`` or ``gradient``, during the step; or what ``flats_by_kind`` names, after it.
        rank: whose.
        at: optimizer step, from 1.
        value: NaN or an infinity.
    """

    def hook(own: int) -> None:
        plain = loop.optimizer_step

        def step_with_fault(trainer, batches, stream, data, step, *others, **options):
            arguments = (trainer, batches, stream, data, step, *others)
            if step + 1 != at:
                return plain(*arguments, **options)
            before = state_of(trainer)
            undo = _put_in(trainer, data, where, value) if own == rank else None
            known = plain(*arguments, **options)
            if undo is not None:
                undo()
            if where in ("latent", "gradient"):
                _say_what_changed(before, state_of(trainer))
            return known

        loop.optimizer_step = step_with_fault

    return hook


def _put_in(trainer, data, where: str, value: float):
    """Put the value in; returns what takes it away after the step."""
    if where == "latent":
        plain = data.to_latent

        def to_latent(images, noise):
            latents = plain(images, noise)
            latents[0, 0, 0, 0] = value
            return latents

        data.to_latent = to_latent
        return lambda: data.__dict__.pop("to_latent")
    if where == "gradient":
        parameter = next(p for p in trainer.student.parameters() if p.requires_grad)
        return parameter.register_hook(lambda gradient: gradient * value).remove

    def poke() -> None:
        # a rank of stage 0 stores a share only: a value everywhere is in every share
        for flat in flats_by_kind(trainer)[where]:
            flat.fill_(value)

    return poke


def _say_what_changed(before: dict, after: dict) -> None:
    for name, tensors in before.items():
        for old, new in zip(tensors, after[name], strict=True):
            if not torch.equal(old, new):
                print(CHANGED, name, flush=True)
                return
    print(UNCHANGED, flush=True)


@kind(12)
def not_finite_number(case: Case) -> tuple[str, Verdict]:
    """NaN or inf in a latent, a gradient, a master weight, a moment or the EMA of one rank."""
    places = ("latent", "gradient", "master", "exp_avg", "exp_avg_sq", "ema.main")
    answers = ("skip", "stop", "rollback")
    setting, where, answer = case.variant(list(product(SETTINGS, places, answers)))
    rank = case.rng.randrange(setting.world)
    # a step with a save too; a rollback needs a checkpoint to go back to
    at = case.rng.randint(EVERY + 2 if answer == "rollback" else 1, STEPS - 1)
    value = case.rng.choice([NAN, float("inf"), -float("inf")])
    hook = with_fault(where, rank, at, value)
    ended = case.bench.run(case.out, setting, "--train.on_nan", answer, hook=hook)
    what = f"{setting.key}, {value} in {where} of rank {rank} at step {at}, {answer}"
    bad = not_finite(case.run)
    if bad is not None:
        return what, Verdict(SILENT, f"{bad} was committed")
    if ended.complete:
        return what, _after_a_skip(case, ended, setting, where, answer)
    if ended.code != 1 or "Traceback" in ended.log or not ended.errors():
        return what, Verdict(LOST, f"{ended.codes} {tail(ended)}")
    verdict = case.bench.judge(case.out, setting, case.committed_step())
    return what, Verdict(verdict.name, f"{ended.errors()[0][:160]}; {verdict.detail}")


def _after_a_skip(
    case: Case, ended: children.Ended, setting: Setting, where: str, answer: str
) -> Verdict:
    """The verdict on a run that went on after a fault."""
    if where not in ("latent", "gradient"):
        return Verdict(SILENT, "exit code 0 with weights or moments that were not finite")
    if answer == "stop":
        return Verdict(SILENT, "went on in spite of train.on_nan stop")
    unchanged = ended.log.count(UNCHANGED)
    if CHANGED in ended.log or unchanged != setting.world:
        return Verdict(SILENT, "the update was not left out bit for bit")
    state = final_state(case.run)
    skipped = 1 if answer == "skip" else 0
    if state.step != STEPS or state.counts[:2] != [STEPS - skipped, skipped]:
        return Verdict(SILENT, f"step {state.step}, counts {state.counts}")
    return Verdict(SURVIVED, f"counts {state.counts}")


@kind(12)
def signal_to_ranks(case: Case) -> tuple[str, Verdict]:
    """A signal for one rank or all, during training or during a save."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    times = ("training", *PHASES[:6])
    setting, number, when = case.variant(list(product(SETTINGS[:6], numbers, times)))
    rank = case.rng.randrange(setting.world)
    ranks = case.rng.choice([[rank], list(range(setting.world))])
    at = case.rng.randint(1, STEPS - 1)
    save = case.rng.randint(1, 2)

    def in_training(own: int) -> None:
        plain = loop.optimizer_step

        def signalled(trainer, batches, stream, data, step, *others, **options):
            if step + 1 == at and own in ranks:
                os.kill(os.getpid(), number)
            return plain(trainer, batches, stream, data, step, *others, **options)

        loop.optimizer_step = signalled

    def in_a_save(own: int) -> None:
        seen = [0]

        def at_phase(name: str) -> None:
            seen[0] += name == "copied"
            if own in ranks and name == when and seen[0] == save:
                os.kill(os.getpid(), number)

        saver.at_phase = at_phase

    hook = in_training if when == "training" else in_a_save
    ended = case.bench.run(case.out, setting, hook=hook)
    moment = f"in step {at}" if when == "training" else f"at {when} of save {save}"
    what = f"{setting.key}, {number.name} for {ranks} {moment}"
    if ended.complete:
        # so late that the last step came first
        return what, case.bench.compare(case.out, setting, ended, None)
    return what, stopped_well(case, ended, setting, number.name)


def stopped_well(case: Case, ended: children.Ended, setting: Setting, name: str) -> Verdict:
    """The verdict on a run that was asked to stop: its line, its checkpoint, and what follows."""
    lines = [line for line in ended.lines() if line.startswith("stopped by")]
    if any(code != 75 for code in ended.codes) or len(lines) != 1:
        return Verdict(LOST, f"{ended.codes}, {len(lines)} lines: {tail(ended)}")
    step = case.committed_step()
    if step is None or f"stopped by {name} after step {step}; checkpoint step_" not in lines[0]:
        return Verdict(LOST, f"step {step} is committed: {lines[0]}")
    return case.bench.judge(case.out, setting, step)


# a step takes long enough for a signal to come during training
SLOW = """
import sys, time
sys.path.insert(0, {root!r})
from sra_fast import train
from sra_fast.data.digits import Digits
from sra_fast.training import loop
# loader processes are among those that have to end
Digits.in_memory = False
plain = loop.optimizer_step
def slow(*arguments, **options):
    time.sleep(0.4)
    return plain(*arguments, **options)
loop.optimizer_step = slow
if __name__ == "__main__":
    train.main()
"""
LAUNCHERS = {
    "python": [],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
}
# seconds after which no process may be left, on a machine that does nothing else
NOBODY_AFTER = 10.0


@kind(2)
def signal_to_launcher(case: Case) -> tuple[str, Verdict]:
    """A signal for a real launcher, one of its ranks, or the process group."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    targets = ("launcher", "group", "rank")
    variants = [
        (launcher, target, number)
        for launcher, target, number in product(LAUNCHERS, targets, numbers)
        # a rank alone is told everything; launchers end by what they do not know
        if target == "rank" or number != signal.SIGUSR1 or launcher == "python"
    ]
    launcher, target, number = case.variant(variants)
    setting = SETTINGS[0] if launcher == "python" else SETTINGS[1]
    what = f"{launcher}, {number.name} to the {target}"
    process, log = _launch(case, launcher, setting)
    tree: list[psutil.Process] = []
    try:
        rows = case.run / "stats.jsonl"
        until = time.monotonic() + 120
        while not (rows.exists() and rows.read_text().count("\n") >= 2):
            if process.poll() is not None or time.monotonic() > until:
                return what, Verdict(LOST, f"no step was taken: {log.read_text()[-300:]}")
            time.sleep(0.05)
        tree = [process_of(process.pid), *process_of(process.pid).children(recursive=True)]
        ranks = _ranks(tree)
        if target == "launcher":
            os.kill(process.pid, number)
        elif target == "rank":
            ranks[-1].send_signal(number)
        else:
            # torchrun gives its ranks groups of their own
            for member in tree:
                member.send_signal(number)
        gone = _wait_until_gone(process, tree)
    finally:
        for member in tree:
            if member.is_running():
                member.kill()
        process.kill()
        process.wait()
    if gone is None:
        return what, Verdict(
            LOST, f"processes are left {NOBODY_AFTER:.0f} s (of a free machine) later"
        )
    step = case.committed_step()
    if step is None or step < 2:
        return what, Verdict(LOST, f"step {step} is committed: {log.read_text()[-300:]}")
    verdict = case.bench.judge(case.out, setting, step)
    return what, Verdict(verdict.name, f"all gone after {gone:.1f} s; {verdict.detail}")


def process_of(pid: int) -> psutil.Process:
    return psutil.Process(pid)


def _launch(case: Case, launcher: str, setting: Setting) -> tuple[subprocess.Popen, Path]:
    script = case.folder / "slow.py"
    script.write_text(SLOW.format(root=str(Path(children.train.__file__).parents[1])))
    options = LAUNCHERS[launcher]
    port = [free_port()] if options else []
    training = [*case.bench.arguments(case.out, setting), "--data.num_workers", "1"]
    arguments = [*options, *port, str(script), *training]
    log = case.folder / "launcher.log"
    with open(log, "wb") as handle:
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=handle, stderr=handle, start_new_session=True
        )
    return process, log


def _ranks(tree: list[psutil.Process]) -> list[psutil.Process]:
    """The training processes of a launcher's tree, without their loader processes (forked)."""
    runs = {p.pid: p for p in tree if "slow.py" in " ".join(p.cmdline()[:4])}
    return [p for p in runs.values() if p.ppid() not in runs]


def _wait_until_gone(process: subprocess.Popen, tree: list[psutil.Process]) -> float | None:
    """Seconds until no process is left; None: some are."""
    begun = time.monotonic()
    # processes of others wait for the same cores
    busy = max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))
    while time.monotonic() - begun < NOBODY_AFTER * busy:
        process.poll()
        living = [p for p in tree if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        if not living:
            return time.monotonic() - begun
        time.sleep(0.05)
    return None
