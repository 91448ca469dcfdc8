"""What a resumed run may change of the run before it: some settings never, the others are said."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

from sra_fast.alignment.schedule import is_over
from sra_fast.alignment.target import trained_heads
from sra_fast.checkpoint.average_snapshots import read_snapshot, snapshot_folders
from sra_fast.checkpoint.manifest import MAIN, RULES, DamagedCheckpoint, Manifest
from sra_fast.checkpoint.reading import CONFIG, SUMMARY, run_folder
from sra_fast.checkpoint.steps import step_of
from sra_fast.config.averages import (
    MOST_PLANNED,
    check_made,
    power_averages,
    power_width,
    snapshot_times,
)
from sra_fast.config.cli import SECTIONS, save_config
from sra_fast.config.schema import Config
from sra_fast.data.facts import DataFacts, differences
from sra_fast.models import ALIGN_HEADS
from sra_fast.utils.checks import require_that
from sra_fast.utils.files import plain, write_atomic
from sra_fast.utils.power_profile import Profile
from sra_fast.utils.registry import TARGETS

# sections and fields that the weights, or the images and noise of a step, depend on
FIXED = ("model.", "diffusion.", "train.seed", "train.global_batch", "data.flip")
# where a run lies and how it was started says nothing of it
UNSAID = ("train.resume", "train.out", "train.init_from")
DEEPSPEED = "deepspeed.json"
ABSENT = "absent"
# fields that older versions had not, with values that say nothing
NEW = {
    "model.options": {},
    "data.latent_statistics": False,
    "diffusion.time_mean": 0.0,
    "diffusion.time_std": 1.0,
    "diffusion.time_shift": 1.0,
    "train.averages": {},
    "train.average_snapshots": 0,
    "optim.schedule": "constant",
    "optim.min_lr": 0.0,
}


def _flat(settings: dict) -> dict:
    """``{section.field: value}``; what is nested deeper stays one value."""
    return {
        f"{section}.{name}": value
        for section, fields in settings.items()
        for name, value in fields.items()
    }


def changes(before: dict, after: dict) -> dict[str, tuple]:
    """``{section.field: (value before, value after)}`` of all settings that differ.

    Args:
        before: settings of a manifest.
        after: ``asdict`` of a configuration.
    """
    old = _flat(before)
    new = _flat(plain(after))
    names = [*new, *(name for name in old if name not in new)]
    if "align2" not in before and after["align2"]["target"] == "none":
        # of an older version, which had no second target
        names = [name for name in names if not name.startswith("align2.")]
    pairs = {name: (old.get(name, ABSENT), new.get(name, ABSENT)) for name in names}
    return {
        name: pair
        for name, pair in pairs.items()
        if pair[0] != pair[1]
        and pair != (ABSENT, None)
        and name not in UNSAID
        and pair != (ABSENT, NEW.get(name, ABSENT))
    }


def check_run(path: Path, manifest: Manifest, cfg: Config, world: int, facts: DataFacts) -> None:
    """ValueError unless a run of ``world`` processes can go on from a checkpoint to its own end."""
    check(path, manifest, cfg, facts)
    _check_compared(path, manifest, cfg, world)
    check_steps(path, manifest, cfg)
    check_weights(path, manifest, cfg)


def check(path: Path, manifest: Manifest, cfg: Config, facts: DataFacts | None) -> None:
    """ValueError, which names everything, unless a run can go on from a checkpoint.

    Args:
        path: folder of the checkpoint.
        manifest: of it.
        cfg: of the run that goes on, filled in.
        facts: about its data; None: they are not compared.
    """
    different = changes(manifest.settings, asdict(cfg))
    refused = {name: pair for name, pair in different.items() if name.startswith(FIXED)}
    # another target can be followed with the same heads; another head was never trained
    if _needs_other_heads(manifest.settings, asdict(cfg)):
        names = [f"{section}.{name}" for section in SECTIONS for name in ("target", "head")]
        refused |= {name: different[name] for name in names if name in different}
    for section, align in cfg.alignments.items():
        # the same head with other parameters
        names = [f"{section}.{name}" for name in TARGETS[align.target].head_options]
        refused |= {name: different[name] for name in names if name in different}
    said = "; ".join(
        f"it was made with {name} {old}, this run has {new}" for name, (old, new) in refused.items()
    )
    require_that(not refused, f"cannot resume {path}: {said}")
    _check_averages(path, manifest, cfg)
    if facts is not None and manifest.data is not None:
        other = differences(facts, DataFacts.from_json(manifest.data))
        require_that(
            not other,
            f"cannot resume {path} on other data: {'; '.join(other)}; to go on from its weights: "
            "train.init_from",
        )


def _check_compared(path: Path, manifest: Manifest, cfg: Config, world: int) -> None:
    """ValueError if a loss that compares images with each other would compare more or fewer than
    before.
    """
    before = manifest.settings
    now = asdict(cfg)
    for section, align in cfg.alignments.items():
        old = before.get(section, {})
        if old.get("target") != align.target or is_over(align, manifest.step):
            continue
        compared = TARGETS[align.target].images_compared
        of_then = compared(SimpleNamespace(**old), _micro(before, manifest.world), manifest.world)
        of_now = compared(align, _micro(now, world), world)
        require_that(
            of_then == of_now,
            f"cannot resume {path}: {section}.target {align.target} compared {of_then} images with "
            f"each other, this run has {of_now}: expected the same, which train.micro_batch "
            "decides",
        )


def _micro(settings: dict, world: int) -> int:
    """Images per process and forward pass."""
    train = settings["train"]
    return train["micro_batch"] or train["global_batch"] // world


def _check_averages(path: Path, manifest: Manifest, cfg: Config) -> None:
    """ValueError for an average that would go on by another rule under the same name.

    An exponential one may get another decay, as the EMA may. A power-function average of another
    width would have neither profile.
    """
    for name, average in cfg.train.averages.items():
        before = {rule: manifest.emas.get(name, {}).get(rule) for rule in RULES}
        same_kind = {rule for rule in RULES if before[rule] is not None} == set(average.given)
        require_that(
            name not in manifest.emas
            or (same_kind and before["sigma_rel"] == average.given.get("sigma_rel")),
            f"cannot resume {path}: train.averages.{name} was made with "
            f"{ {rule: value for rule, value in before.items() if value is not None} }, this run has "
            f"{average.given}: expected another name for another average",
        )


def check_weights(path: Path, manifest: Manifest, cfg: Config) -> None:
    """ValueError unless a run that goes on has the weights ``power:SIGMA`` that it samples at its end.

    An average that began later than others cannot be used with them, so that a run that goes on may
    have fewer than a new one of the same options.

    Args:
        path: folder of the checkpoint.
        manifest: of it.
        cfg: of the run that goes on; as a new run it would have these weights.
    """
    name = cfg.sample.weights
    width = power_width(name)
    if width is None:
        return
    train = cfg.train
    updates = manifest.counts[0]
    # if all further updates are taken
    ahead = [updates + time - manifest.step for time in snapshot_times(train, manifest.step)]
    # (when it began, its name, its profile)
    every = _stored(path, manifest)
    for average in power_averages(train):
        # a new one begins with this run
        began = manifest.emas.get(average, {"since": updates}).get("since", 0)
        sigma_rel = train.averages[average].sigma_rel or 0.0
        every += [(began, average, Profile(sigma_rel, time)) for time in ahead]
    first = min((began for began, _, _ in every), default=0)
    held = {profile for began, _, profile in every if began == first}
    later = sorted({average for began, average, _ in every if began != first})
    what = f"cannot resume {path}: sample.weights {name}"
    require_that(bool(held), f"{what} is made from snapshots, and the run has none")
    if later:
        what += f", without {', '.join(later)}, which began later than others,"
    check_made(what, width, list(held), updates + train.steps - manifest.step)


def _stored(path: Path, manifest: Manifest) -> list[tuple[float, str, Profile]]:
    """The averages in the snapshots that a run has at a checkpoint."""
    folders = [
        folder
        for folder in snapshot_folders(run_folder(path.absolute()))
        if step_of(folder) <= manifest.step
    ]
    found = []
    for folder in folders[:: max(1, len(folders) // MOST_PLANNED)]:
        try:
            snapshot = read_snapshot(folder)
        except DamagedCheckpoint:
            # it is left out at the end, too
            continue
        found += [
            (entry["since"], name, Profile(entry["sigma_rel"], snapshot.updates))
            for name, entry in snapshot.averages.items()
        ]
    return found


def average_lines(manifest: Manifest, cfg: Config) -> list[str]:
    """A line for each average that a resumed run begins or drops."""
    names = list(cfg.train.averages)
    new = [name for name in names if name not in manifest.emas]
    gone = [name for name in manifest.emas if name not in (MAIN, *names)]
    return [
        *(
            f"the average {name} begins with the weights of step {manifest.step}: the checkpoint has "
            "none of this name"
            for name in new
        ),
        *(
            f"the average {name} of the checkpoint is dropped: the run has it no more"
            for name in gone
        ),
    ]


def _needs_other_heads(before: dict, after: dict) -> bool:
    """Whether a run trains a head that the run before it, which had a target, did not train; or
    has other heads of single targets.
    """
    old, new = (_heads(settings) for settings in (before, after))
    own = [{name for name in heads if name.startswith(ALIGN_HEADS)} for heads in (old, new)]
    return own[0] != own[1] or (bool(new - old) and before["align"]["target"] != "none")


def _heads(settings: dict) -> set[str]:
    """Names of the heads that a run's targets train."""
    sections = [settings[section] for section in SECTIONS if section in settings]
    return trained_heads(
        SimpleNamespace(**section) for section in sections if section["target"] != "none"
    )


def check_steps(path: Path, manifest: Manifest, cfg: Config) -> None:
    """ValueError if a run has taken all of its steps already.

    A run that was killed after its last step and before its summary may go on: it still exports.
    """
    step = manifest.step
    if step < cfg.train.steps:
        return
    run = run_folder(path)
    if step == cfg.train.steps and _summarised(run) != manifest.digest:
        return
    raise ValueError(
        f"train.steps {cfg.train.steps} is not above step {step} of {path}: raise train.steps to "
        f"train on; sra-fast export --checkpoint {path} --out FILE.safetensors writes its weights"
    )


def _summarised(run: Path) -> str | None:
    """``Manifest.digest`` of the checkpoint that a run's summary is of; None: there is no summary.

    A step would not tell: a summary of the same step may have been given up by a rollback.
    """
    try:
        return json.loads((run / SUMMARY).read_text())["checkpoint"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def changed_line(manifest: Manifest, cfg: Config) -> str | None:
    """One line about the settings that a resumed run has changed; None: it has changed none."""
    different = changes(manifest.settings, asdict(cfg))
    if not different:
        return None
    listed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in different.items())
    return f"changed since step {manifest.step}: {listed}"


def record(folder: Path, cfg: Config, ds_config: dict, start: Manifest | None = None) -> None:
    """Write the settings of a run into its folder.

    ``config.yaml`` and ``deepspeed.json`` are what the run began with. If the resumed run has
    changed any, all that hold from that step on are in ``config_00001200.yaml`` and
    ``deepspeed_00001200.json``.

    Args:
        folder: of the run.
        cfg: the configuration.
        ds_config: what DeepSpeed gets.
        start: of the checkpoint that the run goes on from; None: it is new.
    """
    ds_text = json.dumps(ds_config, indent=1)
    if start is None:
        write_atomic(folder / CONFIG, lambda path: save_config(cfg, path))
        write_atomic(folder / DEEPSPEED, lambda path: path.write_text(ds_text))
        return
    for name in (CONFIG, DEEPSPEED):
        # of steps that were given up
        for path in _recorded(folder, name):
            if step_of_record(path) >= start.step:
                path.unlink()
    if changes(start.settings, asdict(cfg)):
        path = folder / recorded_name(CONFIG, start.step)
        write_atomic(path, lambda temporary: save_config(cfg, temporary))
    in_force = [folder / DEEPSPEED, *_recorded(folder, DEEPSPEED)][-1]
    if not in_force.exists() or in_force.read_bytes() != ds_text.encode():
        path = folder / recorded_name(DEEPSPEED, start.step)
        write_atomic(path, lambda temporary: temporary.write_text(ds_text))


def recorded_name(name: str, step: int) -> str:
    """The name of a settings file that holds from a step on."""
    stem, dot, suffix = name.partition(".")
    return f"{stem}_{step:08d}{dot}{suffix}"


def step_of_record(path: Path) -> int:
    """The step from which a settings file holds."""
    return int(path.stem.rpartition("_")[2])


def _recorded(folder: Path, name: str) -> list[Path]:
    """The settings files of later steps, in order."""
    stem, dot, suffix = name.partition(".")
    found = folder.glob(f"{stem}_{'[0-9]' * 8}*{dot}{suffix}")
    return sorted(
        (path for path in found if path.stem[len(stem) + 1 :].isdecimal()), key=step_of_record
    )
