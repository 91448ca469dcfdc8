"""Kills, tears, damages and injects, and tells whether a run comes through:

python tests/chaos/run.py [--cases 360] [--seed 0] [--jobs 2] [--only KIND] [--case N]

Every case is a run of the real program on a tiny model that something happens to, and what follows
from `--train.resume auto`. The table at the end has a verdict for each:

survived  the end is that of the uninterrupted run, bit for bit (other world: within 1e-6)
refused   exit code 2 and one line that names the cause; with the cause gone, the run goes on
silent    exit code 0 with another result
lost      progress is gone that was committed, or a person is needed
executed  code from a file of the run ran

The exit code is 1 if a case is silent, lost or executed.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import warm  # noqa: I001 (before anything of torch)
import faults  # noqa: F401 (registers its kinds)
from bench import BAD, LOST, SETTINGS, VERDICTS, Bench, Verdict
from cases import KINDS, SHARES, Case

DEFAULT_CASES = 360
# a case that takes longer hangs
LIMIT = 400.0


def plan(count: int, only: str | None = None, without: list[str] = ()) -> list[tuple[str, int]]:
    """``(kind, number)`` of every case, at least one of each kind."""
    if only is not None:
        return [(only, number) for number in range(count)]
    shares = {name: share for name, share in SHARES.items() if name not in without}
    total = sum(shares.values())
    cases = []
    for name, share in shares.items():
        cases += [(name, number) for number in range(max(1, round(count * share / total)))]
    return cases


def run_case(bench: Bench, folder: Path, seed: int, name: str, number: int) -> tuple[str, Verdict]:
    """One case in this process; an error of the driver is a lost case."""
    try:
        return KINDS[name](Case(bench, folder, seed, name, number))
    except Exception:
        return "the driver failed", Verdict(LOST, traceback.format_exc())


class Jobs:
    """Forked processes that each do one thing, some at a time."""

    def __init__(self, at_once: int):
        self.at_once = at_once
        self.running: dict[int, float] = {}

    def start(self, work) -> None:
        while len(self.running) >= self.at_once:
            self.reap()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                # its runs can be ended with it
                os.setsid()
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        self.running[pid] = time.monotonic()

    def reap(self) -> None:
        time.sleep(0.01)
        for pid, begun in list(self.running.items()):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del self.running[pid]
            elif time.monotonic() - begun > LIMIT:
                os.kill(pid, 9)

    def finish(self) -> None:
        while self.running:
            self.reap()


def prepare(bench: Bench, jobs: Jobs) -> None:
    """The uninterrupted runs, each in a process; then this one reads how long they took."""
    for setting in SETTINGS:
        jobs.start(lambda setting=setting: bench.prepare(setting))
    jobs.finish()
    for setting in SETTINGS:
        # raises if one has failed
        bench.prepare(setting)


def run_all(
    bench: Bench, chosen: list[tuple[int, str, int]], seed: int, jobs: Jobs, talk: bool
) -> dict[int, tuple[str, Verdict]]:
    """Run cases ``(index, kind, number)``; returns what was done and the verdict by index."""
    results = bench.root / "results"
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir()
    for index, name, number in chosen:
        folder = bench.root / f"cases/{index:04d}"
        shutil.rmtree(folder, ignore_errors=True)

        def work(index=index, name=name, number=number, folder=folder):
            begun = time.monotonic()
            what, verdict = run_case(bench, folder, seed, name, number)
            held = [what, verdict.name, verdict.detail]
            (results / f"{index}.tmp").write_text(json.dumps(held))
            (results / f"{index}.tmp").rename(results / f"{index}.json")
            if talk:
                seconds = time.monotonic() - begun
                print(f"{index:4} {verdict.name:9} {seconds:5.1f} s  {name}: {what}", flush=True)
            if verdict.name not in BAD:
                shutil.rmtree(folder, ignore_errors=True)

        jobs.start(work)
    jobs.finish()
    found = {}
    for index, _, _ in chosen:
        path = results / f"{index}.json"
        if path.exists():
            what, name, detail = json.loads(path.read_text())
            found[index] = (what, Verdict(name, detail))
        else:
            found[index] = ("?", Verdict(LOST, "the case did not end"))
    return found


def table(chosen: list[tuple[int, str, int]], found: dict[int, tuple[str, Verdict]]) -> str:
    """Kinds by verdicts."""
    rows = {name: dict.fromkeys(VERDICTS, 0) for _, name, _ in chosen}
    for index, name, _ in chosen:
        rows[name][found[index][1].name] += 1
    rows["all"] = {verdict: sum(row[verdict] for row in rows.values()) for verdict in VERDICTS}
    lines = [f"{'kind':22}{'cases':>7}" + "".join(f"{verdict:>10}" for verdict in VERDICTS)]
    for name, row in rows.items():
        counts = "".join(f"{row[verdict]:>10}" for verdict in VERDICTS)
        lines.append(f"{name:22}{sum(row.values()):>7}{counts}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=DEFAULT_CASES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", choices=sorted(KINDS))
    parser.add_argument("--without", choices=sorted(KINDS), nargs="*", default=[])
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="how many of them")
    parser.add_argument("--case", type=int, help="index of one case of these, to repeat it")
    parser.add_argument("--folder", type=Path, help="for all files; default: a temporary one")
    options = parser.parse_args(argv)
    del SETTINGS[options.settings :]

    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos_"))
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder)
    warm.warm_up(bench.arguments(folder / "warm", SETTINGS[0]), folder)
    jobs = Jobs(options.jobs)
    begun = time.monotonic()
    prepare(bench, jobs)
    chosen = [
        (i, name, number) for i, (name, number) in enumerate(plan(options.cases, options.only))
    ]
    if options.case is not None:
        chosen = [chosen[options.case]]
    found = run_all(bench, chosen, options.seed, jobs, talk=True)

    bad = [case for case in chosen if found[case[0]][1].name in BAD]
    for index, name, _ in bad:
        what, verdict = found[index]
        only = f" --only {options.only}" if options.only else ""
        only += f" --without {' '.join(options.without)}" if options.without else ""
        only += f" --settings {len(SETTINGS)}"
        print(f"\n{verdict.name}: {name}: {what}\n  {verdict.detail}")
        print(
            f"  repeat: python tests/chaos/run.py --cases {options.cases} --seed {options.seed}"
            f"{only} --case {index}; its files: {folder}/cases/{index:04d}"
        )
    print(f"\nseed {options.seed}, {time.monotonic() - begun:.0f} s\n{table(chosen, found)}")
    if not bad and options.folder is None:
        shutil.rmtree(folder)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
