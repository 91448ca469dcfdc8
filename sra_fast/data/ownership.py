"""Whose a folder is that is being made: the recipe in ``preprocess.json``, and a lock.

The processes of one launch share a folder. They all have one recipe. Rank 0 holds the lock, and
only rank 0 replaces the recipe of an earlier run; the others wait until it has.
"""

import fcntl
import json
import os
import time
from pathlib import Path

from sra_fast.data.layouts import LAYOUTS
from sra_fast.data.normalization import OF_LATENTS
from sra_fast.data.packed import RECIPE
from sra_fast.utils.files import write_first, write_json

PARTS = "parts"
# what names the folder of rows that lie beside a data set
NAMED_BY = {"features": "features_name", "text": "text_name"}
# seconds in which rank 0 replaces a recipe after another rank has looked at it
PATIENCE = 60.0


def _same(begun, now) -> bool:
    """Whether an entry of a recipe is that of a folder that was begun. An older version did not
    keep the statistics in a VAE's configuration, which change no moments.
    """
    if isinstance(begun, dict) and isinstance(now, dict):
        now = {key: value for key, value in now.items() if key in begun or key not in OF_LATENTS}
    return begun == now


class FolderLock:
    """One launch at a time writes into a folder, until ``release`` or until the process dies.

    The lock leaves no file. On a network drive it may be seen by the processes of this machine
    only.

    Args:
        folder: to lock, which is there.
        message: of the ValueError that is raised if another process has it.
    """

    def __init__(self, folder: Path, message: str):
        self._handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._handle)
            raise ValueError(message) from None
        except OSError:
            # a file system without locks: the recipe is compared once more with every part
            pass

    def release(self) -> None:
        os.close(self._handle)


class Ownership:
    """A folder as one process of a launch has it.

    Args:
        out: the folder.
        recipe: see ``PackingJob``.
        rank: of this process.
    """

    def __init__(self, out: Path, recipe: dict, rank: int):
        self.out = out
        self.recipe = recipe
        self.rank = rank
        self.file = out / RECIPE
        self.kind = recipe.get("kind", "moments")
        self.another = f"choose another {NAMED_BY.get(self.kind, 'out')}"
        self._lock: FolderLock | None = None

    def claim(self) -> None:
        """Make the folder, or take the one that an earlier run of this command has begun.

        Raises:
            ValueError: another launch is at work there, a part was made with another recipe, or
                there are files that this command did not make.
        """
        parts = self.out / PARTS
        parts.mkdir(parents=True, exist_ok=True)
        if self.rank == 0 and self._lock is None:
            self._lock = FolderLock(
                parts,
                f"another process writes into {self.out}: wait until it has ended, or {self.another}",
            )
        try:
            self._claim()
        except BaseException:
            self.release()
            raise

    def _claim(self) -> None:
        folder = self.out / LAYOUTS[self.recipe["layout"]].folder
        folder.mkdir(exist_ok=True)
        # look for files before the recipe: another process of this job may write both at this moment
        foreign = next(folder.iterdir(), None)
        if self.file.exists():
            self._replace_recipe()
        else:
            if foreign:
                raise ValueError(
                    f"{foreign} was not made by this command, it would be lost: choose another out"
                )
            write_first(self.file, self.recipe)
        # another process or an earlier run may have written it: all must agree
        self.check()

    def check(self) -> None:
        """ValueError if the folder has another recipe than this process."""
        begun = self._begun()
        for key in self._differences(begun):
            raise ValueError(
                f"{self.out} was begun with {key} {begun.get(key)}, this run has "
                f"{self.recipe[key]}: delete it or {self.another}"
            )

    def release(self) -> None:
        """Let other launches write here."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _begun(self) -> dict:
        return json.loads(self.file.read_text())

    def _differences(self, begun: dict) -> list[str]:
        return [key for key, value in self.recipe.items() if not _same(begun.get(key), value)]

    def _replace_recipe(self) -> None:
        """Give the folder this recipe, if all that is finished would be the same with it."""
        end = time.monotonic() + PATIENCE
        while self._may_change(begun := self._begun()):
            if self.rank == 0:
                if not self._is_anything_finished():
                    self._remove_rows(begun)
                write_json(self.file, self.recipe)
                return
            if time.monotonic() > end:
                return
            time.sleep(0.1)

    def _remove_rows(self, begun: dict) -> None:
        """Remove what a killed process has left of a part with another recipe."""
        folder = self.out / LAYOUTS[begun.get("layout", "packed")].folder
        for file in folder.rglob("*.npy"):
            file.unlink(missing_ok=True)

    def _may_change(self, begun: dict) -> bool:
        """Whether the recipe is another one, and may become this one."""
        differences = self._differences(begun)
        if not differences or not self._is_anything_finished():
            return bool(differences)
        if differences != ["bad"] or self.kind == "text":
            # captions are stored without a look at their images
            return False
        # a part that was finished under stop has no image that skip would leave out
        return (begun["bad"], self.recipe["bad"]) == ("stop", "skip")

    def _is_anything_finished(self) -> bool:
        if next((self.out / PARTS).glob("*.json"), None):
            return True
        return any((self.out / layout.last).exists() for layout in LAYOUTS.values())
