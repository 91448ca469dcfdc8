"""The kinds of cases: what is done to a run, and what must come out.

A kind is a function of a ``Case``. Every kind lists its variants in a fixed order; the seed shuffles
them and draws what a variant leaves open, so a case is repeated by its kind, number and seed.
"""

import pickle
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import children
from bench import (
    EVERY,
    LOST,
    REFUSED,
    SETTINGS,
    SILENT,
    STEPS,
    SURVIVED,
    Bench,
    Setting,
    Verdict,
    dies_at,
    newest_run,
    one_line,
    tail,
    write_data,
)
from damage import DAMAGES, FullDisk, Payload, PowerCut, swap
from states import MANIFEST, final_state, named_step

from sra_fast.training import saver

PHASES = (
    *("copied", "file_begun", "file_half", "file_written", "file_renamed", "exchanged"),
    *("manifest_written", "latest_written", "pruning", "pruned"),
)
# of rank 0 only
AFTER_EXCHANGE = PHASES[6:]
SAVES = STEPS // EVERY


@dataclass
class Case:
    """One experiment.

    Attributes:
        bench: what all cases share.
        folder: of this case alone.
        rng: of this case alone.
        number: within its kind.
    """

    bench: Bench
    folder: Path
    seed: int
    kind: str
    number: int
    rng: random.Random = field(init=False)

    def __post_init__(self):
        self.rng = random.Random(f"{self.seed} {self.kind} {self.number}")
        self.out = self.folder / "out"
        self.folder.mkdir(parents=True)

    def variant(self, variants: list):
        """The ``number``-th of these, in the seed's order."""
        order = list(variants)
        random.Random(f"{self.seed} {self.kind}").shuffle(order)
        return order[self.number % len(order)]

    @property
    def run(self) -> Path:
        return self.out / "000"

    def committed_step(self) -> int | None:
        """The step that must not be lost any more."""
        return named_step(self.run) if self.run.exists() else None


KINDS: dict[str, Callable[[Case], tuple[str, Verdict]]] = {}
# how many of a hundred cases are of a kind
SHARES: dict[str, int] = {}


def kind(share: int):
    def registered(function):
        name = function.__name__
        KINDS[name] = function
        SHARES[name] = share
        return function

    return registered


@kind(18)
def kill_in_a_save(case: Case) -> tuple[str, Verdict]:
    """SIGKILL at every phase of a save, on every rank."""
    variants = [
        (setting, rank, phase, save)
        for setting, phase, save in product(SETTINGS, PHASES, range(1, SAVES + 1))
        for rank in range(1 if phase in AFTER_EXCHANGE else setting.world)
    ]
    setting, rank, phase, save = case.variant(variants)
    what = f"{setting.key}, rank {rank} at {phase} of save {save}"
    together = case.rng.random() < 0.3
    ended = case.bench.run(case.out, setting, hook=dies_at(phase, save, rank, together))
    if ended.complete:
        return what, Verdict(LOST, "the phase was never reached")
    return what, case.bench.judge(case.out, setting, case.committed_step())


@kind(12)
def kill_at_random(case: Case) -> tuple[str, Verdict]:
    """SIGKILL for one rank or all, at any time of a run."""
    setting = case.variant(SETTINGS[:6])
    delay = case.rng.uniform(0, 1.1) * case.bench.seconds[setting.key]
    ranks = case.variant([[0], None, [setting.world - 1]])

    def kill(running: children.Running) -> None:
        until = time.monotonic() + delay
        while time.monotonic() < until and not running.poll():
            time.sleep(0.005)
        running.signal(9, ranks)

    ended = case.bench.run(case.out, setting, meanwhile=kill)
    what = f"{setting.key}, {'all ranks' if ranks is None else ranks} after {delay:.2f} s"
    if ended.complete:
        return what, case.bench.compare(case.out, setting, ended, None)
    if (case.run / "summary.json").exists():
        # it had finished: there is nothing to resume
        return what, case.bench.judge(case.out, setting, STEPS, may_refuse=("train.steps",))
    return what, case.bench.judge(case.out, setting, case.committed_step())


@kind(12)
def power_cut(case: Case) -> tuple[str, Verdict]:
    """All ranks die at a phase of a save, and with them what was not flushed to the disk."""
    variants = [
        (setting, rank, phase, save)
        for setting, phase, save in product(SETTINGS[:6], PHASES, range(1, SAVES + 1))
        for rank in range(1 if phase in AFTER_EXCHANGE else setting.world)
    ]
    setting, rank, phase, save = case.variant(variants)
    cut = PowerCut(case.out, case.folder / "journal")
    dies = dies_at(phase, save, rank, together=True)

    def hook(own: int) -> None:
        cut.install(own)
        dies(own)

    ended = case.bench.run(case.out, setting, hook=hook)
    what = f"{setting.key}, at {phase} of save {save} of rank {rank}"
    if ended.complete:
        return what, Verdict(LOST, "the phase was never reached")
    before = case.committed_step()
    lost = cut.apply(case.rng)
    # a commit is complete when `latest` is on the disk; while it is written, either may be there
    reached = before if phase not in ("manifest_written",) else None
    if phase in AFTER_EXCHANGE[1:]:
        reached = save * EVERY
    verdict = case.bench.judge(case.out, setting, reached)
    return what, Verdict(verdict.name, f"{verdict.detail}; {', '.join(lost)[:200]}")


def checkpoint_files(run: Path, step: int) -> list[Path]:
    folder = run / f"checkpoints/step_{step:08d}"
    return sorted(path for path in folder.iterdir() if path.is_file())


def other_files(run: Path) -> list[Path]:
    """What a run folder holds besides its checkpoints."""
    names = ("config.yaml", "deepspeed.json", "data.json", "stats.jsonl", "lock")
    return [run / name for name in names if (run / name).exists()]


@kind(22)
def damaged_file(case: Case) -> tuple[str, Verdict]:
    """One file of a run is damaged; the checkpoint before is whole."""
    settings = SETTINGS[:5]
    places = ("new", "new", "old", "latest", "other")
    setting, place, name = case.variant(list(product(settings, places, DAMAGES)))
    run = case.bench.killed(setting, case.out)
    if place == "latest":
        path = run / "checkpoints/latest"
    elif place == "other":
        path = case.rng.choice(other_files(run))
    else:
        path = case.rng.choice(checkpoint_files(run, 2 * EVERY if place == "new" else EVERY))
    what = f"{setting.key}, {name} {path.relative_to(run)}"
    kept = case.folder / "kept"
    shutil.copy2(path, kept)
    DAMAGES[name](path, case.rng)

    def undo() -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.copy2(kept, path)

    # a checkpoint that is damaged costs the steps since the one before
    at_least = EVERY if place == "new" else 2 * EVERY
    # settings and logs are needed too: a refusal by name is right
    # and nothing but a person can take a folder away
    may_refuse = (path.name,) if place == "other" or name == "folder" else ()
    return what, case.bench.judge(case.out, setting, at_least, may_refuse, undo)


@kind(6)
def all_damaged(case: Case) -> tuple[str, Verdict]:
    """No checkpoint is whole: the run must not begin anew without a word."""
    setting, name = case.variant(list(product(SETTINGS[:4], DAMAGES)))
    run = case.bench.killed(setting, case.out)
    kept = case.folder / "kept"
    shutil.copytree(run, kept)
    damaged = [case.rng.choice(checkpoint_files(run, step)) for step in (EVERY, 2 * EVERY)]
    for path in damaged:
        DAMAGES[name](path, case.rng)

    def undo() -> None:
        shutil.rmtree(run)
        shutil.copytree(kept, run)

    what = f"{setting.key}, {name} {' and '.join(str(p.relative_to(run)) for p in damaged)}"
    # without a manifest a step is no checkpoint, and its name is all there is
    names = (*(path.name for path in damaged), MANIFEST)
    return what, case.bench.judge(case.out, setting, STEPS, names, undo, at_least_then=2 * EVERY)


@kind(8)
def swapped_files(case: Case) -> tuple[str, Verdict]:
    """Files of other steps, ranks and runs, each whole in itself."""
    setting = case.variant([setting for setting in SETTINGS if setting.world > 1][:3])
    how = case.variant(["steps", "ranks", "other run", "manifests", "folder renamed", "all steps"])
    run = case.bench.killed(setting, case.out)
    old, new = (run / f"checkpoints/step_{step:08d}" for step in (EVERY, 2 * EVERY))
    rank = case.rng.randrange(setting.world)
    name = f"rank_{rank:05d}.safetensors"
    at_least = 0
    if how == "steps":
        swap(old / name, new / name)
    elif how == "manifests":
        swap(old / MANIFEST, new / MANIFEST)
    elif how == "all steps":
        swap(old, new)
    elif how == "ranks":
        swap(new / name, new / f"rank_{(rank + 1) % setting.world:05d}.safetensors")
        at_least = EVERY
    elif how == "other run":
        whole = case.bench.whole(setting)
        shutil.copy2(whole / f"checkpoints/step_{STEPS:08d}" / name, new / name)
        at_least = EVERY
    else:
        new.rename(new.with_name("step_1000000000"))
        (run / "checkpoints/latest").write_text("step_1000000000")
        at_least = EVERY
    names = () if at_least else ("rank_", MANIFEST)
    return f"{setting.key}, {how}", case.bench.judge(case.out, setting, at_least or EVERY, names)


@kind(4)
def wrong_latest(case: Case) -> tuple[str, Verdict]:
    """`latest` names something else: outside of the run, a step that is not there, an older one."""
    outside = case.folder / "elsewhere/step_00000006"
    texts = {
        "../../../elsewhere/step_00000006": 2 * EVERY,
        str(outside): 2 * EVERY,
        "step_99999999": 2 * EVERY,
        "step_1000000000": 2 * EVERY,
        "step_6": 2 * EVERY,
        "": 2 * EVERY,
        "step_00000006\x00": EVERY,
        ".": 2 * EVERY,
        # a rollback is final
        f"step_{EVERY:08d}": EVERY,
    }
    setting, text = case.variant(list(product(SETTINGS[:3], texts)))
    run = case.bench.killed(setting, case.out)
    shutil.copytree(run / "checkpoints/step_00000006", outside)
    # another state: to take it would show
    whole = case.bench.whole(setting) / f"checkpoints/step_{STEPS:08d}"
    shutil.copytree(whole, outside, dirs_exist_ok=True)
    (run / "checkpoints/latest").write_text(text)
    verdict = case.bench.judge(case.out, setting, texts[text])
    return f"{setting.key}, latest is {text!r}", verdict


@kind(6)
def pickle_with_code(case: Case) -> tuple[str, Verdict]:
    """A pickle that runs code, wherever a file could be loaded."""
    setting = case.variant(SETTINGS[:2])
    run = case.bench.killed(setting, case.out)
    marker = case.folder / "executed"
    payload = pickle.dumps(Payload(marker))
    new = run / "checkpoints/step_00000006"
    places = {
        "rank file": new / "rank_00000.safetensors",
        "manifest": new / MANIFEST,
        "latest": run / "checkpoints/latest",
        "data": run / "data.json",
        "rows": run / "stats.jsonl",
        "deepspeed": run / "deepspeed.json",
        "lock": run / "lock",
        # what other programs would load
        "model states": new / "mp_rank_00_model_states.pt",
        "optimizer states": new / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "ema of a rank": new / "ema_rank_0.pt",
        "no manifest": new / "ema_rank_0.pt",
        "yaml": run / "config.yaml",
    }
    place = case.variant(list(places))
    path = places[place]
    kept = case.folder / "kept"
    if path.exists():
        shutil.copy2(path, kept)
    if place == "yaml":
        path.write_text(f"train: !!python/object/apply:os.mkdir ['{marker}']\n")
    else:
        path.write_bytes(payload)
    if place == "no manifest":
        for step in (EVERY, 2 * EVERY):
            (run / f"checkpoints/step_{step:08d}" / MANIFEST).unlink()
        (new / "sra_fast.json").write_text('{"step": 6}')

    def undo() -> None:
        shutil.copy2(kept, path)

    outside = place in ("data", "rows", "deepspeed", "lock", "yaml")
    names = (path.name,) if outside else ("0.1", MANIFEST) if place == "no manifest" else ()
    at_least = EVERY if place in ("rank file", "manifest") else 2 * EVERY
    verdict = case.bench.judge(
        case.out, setting, at_least, names, undo if kept.exists() and outside else None, marker
    )
    return f"{setting.key}, {place}", verdict


@kind(6)
def full_disk(case: Case) -> tuple[str, Verdict]:
    """ENOSPC at any write of a save; with space again, the run goes on."""
    setting = case.variant(SETTINGS[:6])
    rank = case.rng.randrange(setting.world)
    save = case.rng.randint(1, SAVES)
    after = case.rng.randrange(0, 40)

    def hook(own: int) -> None:
        seen = [0]

        def at_phase(name: str) -> None:
            if name == "copied":
                seen[0] += 1
                if own == rank and seen[0] == save:
                    FullDisk(case.out / "000/checkpoints", after).install()

        saver.at_phase = at_phase

    ended = case.bench.run(case.out, setting, hook=hook)
    what = f"{setting.key}, write {after} of save {save} of rank {rank}"
    if ended.complete:
        # the checkpoint took fewer writes
        return what, case.bench.compare(case.out, setting, ended, None)
    said = one_line(ended)
    if said is None:
        return what, Verdict(LOST, f"no line: {ended.codes} {tail(ended)}")
    before = case.committed_step()
    fallback = "there is no checkpoint before it" if before is None else f"step_{before:08d}"
    needed = ("No space left on device", "free", "step", "checkpoints", fallback)
    missing = [word for word in needed if word not in said]
    if missing:
        return what, Verdict(LOST, f"the message lacks {missing}: {said}")
    return what, case.bench.judge(case.out, setting, before)


@kind(5)
def settings_changed(case: Case) -> tuple[str, Verdict]:
    """What a resumed run may change is said, what it may not is refused by name."""
    refused = [
        ("train.seed", "1"),
        ("train.global_batch", "24"),
        ("model.depth", "6"),
        ("diffusion.path", "cosine"),
        ("data.latent_scale", "0.5"),
        ("data.path", "other data"),
        # at its step exactly a run that was killed may still write its summary
        ("train.steps", str(2 * EVERY - 1)),
    ]
    listed = [("optim.lr", "0.001"), ("train.ema_decay", "0.9"), ("align.weight", "0.1")]
    name, value = case.variant([*refused, *listed])
    setting = case.variant(SETTINGS[:3])
    case.bench.killed(setting, case.out)
    what = f"{setting.key}, {name} {value}"
    if name == "data.path":
        value = str(case.folder / "data")
        write_data(Path(value), seed=1)
    ended = case.bench.resume(case.out, setting, f"--{name}", value)
    if (name, value) in listed:
        said = f"changed since step {2 * EVERY}: {name} "
        if ended.complete and said in ended.log and final_state(case.run).step == STEPS:
            return what, Verdict(SURVIVED, "listed")
        return what, Verdict(SILENT, f"{ended.codes}, not listed: {tail(ended)}")
    if ended.complete:
        return what, Verdict(SILENT, "accepted")
    said = one_line(ended)
    word = "data" if name == "data.path" else name.replace("data.latent_", "")
    if said is None or word not in said:
        return what, Verdict(LOST, f"not refused by name: {tail(ended)}")
    after = case.bench.judge(case.out, setting, 2 * EVERY)
    return what, Verdict(REFUSED, said) if after.name == SURVIVED else after


@kind(4)
def two_runs(case: Case) -> tuple[str, Verdict]:
    """A second run in the folder of one that trains is refused; the first ends as it should."""
    setting = case.variant(SETTINGS[:4])
    case.bench.killed(setting, case.out)
    second: list[children.Ended] = []

    def start_second(running: children.Running) -> None:
        lines = ""
        while not running.poll() and "0/" not in lines and "6/9" not in lines:
            lines = running.log.read_text(errors="replace") if running.log.exists() else ""
            time.sleep(0.01)
        # the first one stands still, so that it does not end before the second one looks
        running.signal(19)
        arguments = case.bench.arguments(case.out, setting, "--train.resume", "auto")
        try:
            second.append(children.run(arguments, setting.world, case.folder / "second.log"))
        finally:
            running.signal(18)

    arguments = case.bench.arguments(case.out, setting, "--train.resume", "auto")
    first = children.run(arguments, setting.world, case.folder / "out.log", meanwhile=start_second)
    what = f"{setting.key}"
    said = one_line(second[0])
    if said is None or "in use" not in said:
        return what, Verdict(LOST, f"second: {second[0].codes} {tail(second[0])}")
    if not first.complete:
        return what, Verdict(LOST, f"first: {first.codes} {tail(first)}")
    verdict = case.bench.compare(case.out, setting, first, 2 * EVERY)
    return what, Verdict(REFUSED, said) if verdict.name == SURVIVED else verdict


@kind(6)
def elastic(case: Case) -> tuple[str, Verdict]:
    """Another number of processes and another ZeRO stage after every checkpoint."""
    stages = [case.rng.randrange(4) for _ in range(3)]
    worlds = case.variant([(2, 1, 3), (1, 3, 2), (3, 2, 1), (2, 3, 1), (1, 2, 3), (3, 1, 2)])
    parts = [Setting(world, stage) for world, stage in zip(worlds, stages, strict=True)]
    what = " -> ".join(part.key for part in parts)
    for number, part in enumerate(parts):
        # every part ends with its first checkpoint but the last, which ends by itself
        dies = dies_at("latest_written", save=1, rank=0, together=True)
        hook = dies if number < 2 else None
        ended = case.bench.resume(case.out, part, hook=hook)
        expected = number * EVERY or None
        if ended.resumed_at != expected:
            return what, Verdict(LOST, f"resumed at {ended.resumed_at}: {tail(ended)}")
    if not ended.complete:
        return what, Verdict(LOST, f"{ended.codes} {tail(ended)}")
    state = final_state(newest_run(case.out))
    reference = case.bench.reference(SETTINGS[0])
    far = {name: state.distance(reference, name) for name in state.tensors}
    if state.step != STEPS or state.counts != reference.counts:
        return what, Verdict(SILENT, f"step and counts {state.step} {state.counts}")
    if max(far.values()) > 1e-6:
        return what, Verdict(SILENT, f"{far}")
    return what, Verdict(SURVIVED, f"within {max(far.values()):.1e}")
