"""A study: variants of one configuration with several seeds, read from a YAML file."""

import json
from dataclasses import asdict, dataclass, field
from importlib import import_module
from modulefinder import ModuleFinder
from pathlib import Path
from types import ModuleType

import yaml

from sra_fast.analysis.study_scores import OF_TRAINING, OWN_PREFIX, SCORES
from sra_fast.utils.files import sha256
from sra_fast.utils.registry import import_parts, modules_outside
from sra_fast.utils.yaml_loader import KeysOnce

REQUIRED = {"base", "args", "seeds", "variants"}
OPTIONAL = {"baseline", "rounding", "score", "scores", "claims"}
CLAIM_KEYS = {"claim", "variant", "score", "expect"}
# what scores a run, unless a study names another function
SCORE = "sra_fast.analysis.run_scores:score_run"
# what a run was made with of modules outside of this package
PARTS = "parts"
# options that a study sets for every run
SET_BY_STUDY = ("train.seed", "train.out", "train.resume")
LOWER = "lower"
HIGHER = "higher"


@dataclass(frozen=True)
class Claim:
    """Something that a study is to show, or to contradict.

    Attributes:
        claim: in words.
        variant: whose score it is about.
        baseline: the variant that it is compared with.
        score: a name in ``SCORES``, or of the study's own.
        expect: ``lower`` or ``higher``, than the baseline's.
    """

    claim: str
    variant: str
    baseline: str
    score: str
    expect: str


@dataclass(frozen=True)
class Scoring:
    """How the runs of a study are scored after their training.

    Attributes:
        function: ``module:function``.
        options: of ``run_scores.ScoreOptions``; empty for a function of the study's own.
    """

    function: str = SCORE
    options: dict = field(default_factory=dict)

    @property
    def is_own(self) -> bool:
        """Whether the function is the study's own: called with the run folder, and nothing else."""
        return self.function != SCORE

    def identity(self) -> dict:
        """What scores follow from, besides the run: the function, and what it does.

        The function must be importable. A study's own function is identified by its source file
        and by the files in the same folder that it imports. The built-in one is identified by its
        version and all of its options, defaults included.
        """
        module = import_module(self.function.partition(":")[0])
        held: dict = {"function": self.function}
        if self.is_own:
            return {**held, **source_of(module)}
        options = asdict(module.ScoreOptions(**self.options))
        return {**held, "options": options, "version": module.VERSION}


def source_of(module: ModuleType) -> dict:
    """SHA-256 of a module's file, and of those in the same folder that it imports; of a package, of
    all of its files.
    """
    file = Path(str(module.__file__))
    if hasattr(module, "__path__"):
        inside = sorted(file.parent.rglob("*.py"))
        others = {str(path.relative_to(file.parent)): path for path in inside if path != file}
    else:
        others = imported_beside(file)
    held: dict = {"source": sha256(file)}
    if others:
        held["imports"] = {name: sha256(path) for name, path in others.items()}
    return held


def parts_outside() -> dict[str, dict] | None:
    """``source_of`` the modules that ``SRA_FAST_IMPORT`` brings; None: it names none."""
    import_parts()
    return {name: source_of(import_module(name)) for name in modules_outside()} or None


def imported_beside(file: Path) -> dict[str, Path]:
    """The modules in a file's own folder that it imports, also by way of each other, by name."""
    if {"site-packages", "dist-packages"} & {*file.parts}:
        # what lies beside an installed module is everything that is installed
        return {}
    # beside a module in a checkout lies this package, whose versions count for themselves
    finder = ModuleFinder([str(file.parent)], excludes=["sra_fast"])
    # it reads the code and runs nothing
    finder.run_script(str(file))
    return {
        name: Path(found.__file__)
        for name, found in sorted(finder.modules.items())
        if found.__file__ and Path(found.__file__) != file
    }


@dataclass(frozen=True)
class Study:
    """A study that was read from a file.

    Attributes:
        path: the file.
        base: configuration that all variants share.
        seeds: of the runs of every variant.
        variants: name -> arguments of train.py.
        baseline: name of the variant that the others are compared with.
        rounding: name of a variant that does the baseline's arithmetic by other means, or None.
        scoring: None: runs are not scored.
        claims: what the study is to show.
    """

    path: Path
    base: Path
    seeds: list[int]
    variants: dict[str, list[str]]
    baseline: str
    rounding: str | None = None
    scoring: Scoring | None = field(default_factory=Scoring)
    claims: list[Claim] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.stem

    def folder_of(self, variant: str, seed: int, folder: Path) -> Path:
        """Where the run of a variant with a seed lies, in the folder of the study."""
        # by number: a variant's name may have characters that a folder's must not
        return folder / f"{list(self.variants).index(variant):02d}_seed{seed}"

    def made_with(self, variant: str) -> dict:
        """What a variant's runs follow from, beside the seed."""
        return {
            "arguments": self.variants[variant],
            "base": yaml.safe_load(self.base.read_text()),
            PARTS: parts_outside(),
        }

    def command(self, variant: str, seed: int, folder: Path) -> list[str]:
        """The arguments of ``train.py`` for a run; ``folder``: of the study."""
        out = str(self.folder_of(variant, seed, folder))
        common = ["--config", str(self.base), *self.variants[variant]]
        return [*common, "--train.seed", str(seed), "--train.out", out]


class _OnceLoader(KeysOnce, yaml.SafeLoader):
    """YAML in which a mapping has every key once: of two variants of one name one would be lost."""


def read_study(path: Path) -> Study:
    """Read a study from YAML; docs/make_a_study.md explains its keys.

    Raises:
        ValueError: the file cannot be read, a key is missing, unknown or of another type, a name is
            no variant's, or seeds or variants are empty.
    """
    try:
        held = yaml.load(path.read_text(), _OnceLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        # YAML's text has several lines
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no readable YAML file: {reason}") from None
    complete = isinstance(held, dict) and REQUIRED <= set(held) <= REQUIRED | OPTIONAL
    if not complete or not held["seeds"] or not held["variants"]:
        raise ValueError(
            f"{path} must have {sorted(REQUIRED)}, may have {sorted(OPTIONAL)}, and none of seeds "
            f"and variants may be empty, got {held}"
        )
    try:
        return _study_of(path, held)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _study_of(path: Path, held: dict) -> Study:
    """The study of a file's keys; ValueError without the file's name."""
    # an empty mapping in YAML is None
    common = held["args"] or {}
    mappings = [common, held["variants"]]
    if isinstance(held["variants"], dict):
        mappings += [fields or {} for fields in held["variants"].values()]
    if not all(isinstance(part, dict) for part in mappings):
        raise ValueError(f"args, variants and each variant must be mappings, got {held}")
    names = [*held["variants"]]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"names of variants must be text (in quotes), got {names}")
    for option in SET_BY_STUDY:
        if any(option in part for part in mappings if part is not held["variants"]):
            raise ValueError(
                f"{option} is set for each run by the study, got it in args or variants"
            )
    check_seeds(held["seeds"])
    base = path.parent / str(held["base"])
    if not base.is_file():
        raise ValueError(f"there is no base configuration {base}")

    baseline = _variant(held.get("baseline", names[0]), names, "baseline")
    rounding = held.get("rounding")
    if rounding is not None and _variant(rounding, names, "rounding") == baseline:
        raise ValueError(f"rounding must be another variant than the baseline {baseline}")
    scoring = _scoring(held)
    claims = held.get("claims") or []
    if not isinstance(claims, list):
        raise ValueError(f"claims must be a list, got {claims}")
    return Study(
        path=path,
        base=base,
        seeds=list(held["seeds"]),
        variants={
            name: [*_arguments(common), *_arguments(fields or {})]
            for name, fields in held["variants"].items()
        },
        baseline=baseline,
        rounding=rounding,
        scoring=scoring,
        claims=[_claim(claim, names, baseline, scoring) for claim in claims],
    )


def check_seeds(seeds: object) -> None:
    """ValueError unless these are seeds, each once."""
    if not isinstance(seeds, list) or not all(type(seed) is int for seed in seeds):
        raise ValueError(f"seeds whole numbers in a list expected, got {seeds}")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"each of the seeds must be there once, got {seeds}")


def _arguments(fields: dict) -> list[str]:
    """``{"align.weight": 2.0}`` -> ``["--align.weight", "2.0"]``."""
    words = []
    for key, value in fields.items():
        words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return words


def _variant(name: object, names: list[str], role: str) -> str:
    if name not in names:
        raise ValueError(f"{role} must name a variant, one of {names}, got {name!r}")
    return str(name)


def _scoring(held: dict) -> Scoring | None:
    options = held.get("scores", {})
    if options in (None, "none"):
        if "score" in held:
            raise ValueError("score names a function and scores says none: expected one of them")
        return None
    if not isinstance(options, dict):
        raise ValueError(f"scores must be a mapping of options, or none, got {options!r}")
    function = held.get("score", SCORE)
    if not isinstance(function, str) or function.count(":") != 1:
        raise ValueError(f"score must be module:function, got {function!r}")
    scoring = Scoring(function, options)
    if scoring.is_own and options:
        raise ValueError(f"scores are no options of {function}, got {options}")
    if options:
        _check_scores(options)
    return scoring


def _check_scores(options: dict) -> None:
    """ValueError for options that scores do not have, or values that they cannot have."""
    # it imports torch, which takes seconds
    from sra_fast.analysis.run_scores import ScoreOptions

    known = [*ScoreOptions.__dataclass_fields__]
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(f"scores has no {unknown[0]!r}: expected keys of {', '.join(known)}")
    ScoreOptions(**options).check()


def _claim(held: object, names: list[str], baseline: str, scoring: Scoring | None) -> Claim:
    """A claim that names variants and, as far as that is known, a score."""
    if not isinstance(held, dict) or not CLAIM_KEYS <= set(held) <= CLAIM_KEYS | {"baseline"}:
        raise ValueError(
            f"a claim must have {sorted(CLAIM_KEYS)} and may have baseline, got {held}"
        )
    if held["expect"] not in (LOWER, HIGHER):
        raise ValueError(f"expect of a claim must be lower or higher, got {held['expect']!r}")
    compared = _variant(held.get("baseline", baseline), names, "baseline of a claim")
    variant = _variant(held["variant"], names, "variant of a claim")
    if variant == compared:
        raise ValueError(f"a claim must be about two variants, got {variant} twice")
    score = str(held["score"])
    own = scoring is not None and scoring.is_own
    later = set() if scoring is None else set(SCORES) - OF_TRAINING
    if score in SCORES and not SCORES[score].compared:
        raise ValueError(
            f"score of a claim must be one that variants are compared by, got {score!r}"
        )
    if not own and score not in OF_TRAINING | later and not score.startswith(OWN_PREFIX):
        there = sorted(OF_TRAINING | later)
        raise ValueError(f"score of a claim must be one of {there}, got {score!r}")
    return Claim(str(held["claim"]), variant, compared, score, held["expect"])
