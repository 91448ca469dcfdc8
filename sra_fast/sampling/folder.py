"""The folder of samples: whose they are, and what is written into it.

Several processes, and later commands, share nothing but this folder. It is written in an order:

1. the identity of the parts,
2. images in ``png/`` and parts, by every process,
3. ``samples.json``, which repeats the identity, then ``samples.npz``, by the first process,
4. the parts are deleted, then their identity.

A process that starts late looks in this order too: whatever it finds at one step, it finds what
explains that at the next. So samples of another identity are never touched, and finished ones are
not made again.
"""

from dataclasses import dataclass
from pathlib import Path

from sra_fast.evaluation.packed import ORIGIN, SAMPLES
from sra_fast.utils.checks import require_that
from sra_fast.utils.files import plain, read_json, write_first

# of samples.json
IDENTITY = "identity"
OTHERWISE = "delete it or choose another --out"


@dataclass
class SampleFolder:
    """Where samples go.

    Attributes:
        path: of the folder, which is there.
        identity: what the images depend on; JSON.
        count: how many images.
        with_pngs: whether every image is also a PNG.
    """

    path: Path
    identity: dict
    count: int
    with_pngs: bool

    def __post_init__(self):
        # through JSON and back: tuples become lists, as in the files
        self.identity = plain(self.identity)

    @property
    def parts(self) -> Path:
        return self.path / "parts"

    @property
    def npz(self) -> Path:
        return self.path / SAMPLES

    @property
    def png(self) -> Path | None:
        """Folder of the PNGs; None if there are to be none."""
        return self.path / "png" if self.with_pngs else None

    def finished(self) -> bool:
        """Whether these samples are there already.

        Raises:
            ValueError: others are there, which would be lost.
        """
        if not self.npz.exists():
            return False
        file = self.path / ORIGIN
        held = read_json(file) if file.exists() else {}
        known = held.get(IDENTITY) if isinstance(held, dict) else None
        if known is None:
            raise ValueError(
                f"{self.npz} is there, and no {file} says that it is of these samples: {OTHERWISE}"
            )
        self._compare(f"{self.npz} holds samples of {held.get('checkpoint')}", known)
        return True

    def open(self) -> bool:
        """Make the folder of the parts, or resume in it.

        Returns:
            Whether there is something to make: False if these samples are finished.

        Raises:
            ValueError: the folder holds other samples, finished or not, or images that are not of
                these, or cannot be written. Nothing has been written then.
        """
        # in the order in which other processes write: see the top of the file
        images = self._images()
        begun = self._begun()
        if self.finished():
            self._check_images()
            return False
        unfinished = f"{self.parts} holds unfinished samples"
        if begun is not None:
            self._compare(unfinished, begun)
        self._refuse_others(images, begun is None)
        try:
            if self.png:
                self.png.mkdir(exist_ok=True)
            # not of a resumed command: the first process may delete the folder at this moment
            if begun is None:
                self.parts.mkdir(exist_ok=True)
                # of several processes that start together, one writes the file and all read it
                write_first(self._identity_file, self.identity)
                self._compare(unfinished, read_json(self._identity_file))
        except OSError as error:
            raise ValueError(f"out {self.path} cannot be written: {error.strerror}") from None
        return True

    def left_over(self) -> bool:
        """Whether parts of these finished samples are still there, as after a crash."""
        return self._begun() == self.identity

    @property
    def _identity_file(self) -> Path:
        return self.parts / "identity.json"

    def _begun(self) -> dict | None:
        """The identity of the parts; None: there is none."""
        try:
            return read_json(self._identity_file) if self._identity_file.exists() else None
        except ValueError:
            # deleted at this moment
            if not self._identity_file.exists():
                return None
            raise

    def _images(self) -> set[int]:
        """Numbers of the images in ``png/``, whether or not these samples have any."""
        folder = self.path / "png"
        return {int(file.stem) for file in folder.glob("*.png") if file.stem.isdigit()}

    def _refuse_others(self, images: set[int], fresh: bool) -> None:
        """ValueError for images that would be taken for images of these samples.

        Args:
            images: numbers.
            fresh: there are no parts, so that none of the images is of these samples.
        """
        own = set() if fresh or not self.png else set(range(self.count))
        others = len(images - own)
        these = "these samples" if self.png else "these samples, which get none (--png true)"
        require_that(
            not others,
            f"{self.path / 'png'} holds {others} images that are not of {these}: {OTHERWISE}",
        )

    def _check_images(self) -> None:
        """ValueError if PNGs of finished samples were deleted."""
        missing = len(set(range(self.count)) - self._images()) if self.png else 0
        require_that(
            not missing,
            f"{self.npz} is finished, but {missing} of its images are no longer in "
            f"{self.png}: delete both or choose another --out",
        )

    def _compare(self, what: str, held: dict) -> None:
        """ValueError unless an identity is that of these samples; ``what`` has it."""
        for key, value in _flat(self.identity).items():
            found = _flat(held).get(key)
            require_that(
                found == value, f"{what} with {key} {found}, this run has {value}: {OTHERWISE}"
            )


def _flat(values: dict, prefix: str = "") -> dict:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``: a message names what differs."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
