"""The text of signed JSON files, which later versions have to read, and what is refused."""

import pytest

from sra_fast.checkpoint.signed_json import (
    DamagedCheckpoint,
    StoredFile,
    content_fault,
    read_signed,
    write_signed,
)

VALUES = {"step": 3, "names": ["\u00e4", None], "a": {"x": 1e-07, "b": True}}
DIGEST = "4f2006f8c14923aae903df24e04b98c8bd4708faa118bdb1e2714344982f3fa3"
# the keys are sorted: the digest comes after "manifest" and before "snapshot"
HELD = """{
  "a": {
   "b": true,
   "x": 1e-07
  },
  "names": [
   "\\u00e4",
   null
  ],
  "step": 3
 }"""
TEXTS = {
    "manifest": f'{{\n "manifest": {HELD},\n "sha256": "{DIGEST}"\n}}\n',
    "snapshot": f'{{\n "sha256": "{DIGEST}",\n "snapshot": {HELD}\n}}\n',
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_format(tmp_path, name):
    path = tmp_path / f"{name}.json"
    write_signed(path, VALUES)
    assert path.read_text() == TEXTS[name]
    assert read_signed(path) == VALUES


@pytest.mark.parametrize(
    "text, fault",
    [
        ("{}", "snapshot.json cannot be read: it is not what was written"),
        (TEXTS["manifest"], "snapshot.json cannot be read: it is not what was written"),
        (TEXTS["snapshot"][:-1], "snapshot.json has another SHA-256"),
        (TEXTS["snapshot"].replace("3", "4", 1), "snapshot.json has another SHA-256"),
        (None, "snapshot.json cannot be read: No such file or directory"),
    ],
)
def test_what_was_changed_is_refused(tmp_path, text, fault):
    path = tmp_path / "snapshot.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DamagedCheckpoint) as caught:
        read_signed(path)
    assert str(caught.value) == fault


def test_a_list_is_no_signed_file(tmp_path):
    """Its text is the same again, and its hash holds."""
    path = tmp_path / "snapshot.json"
    write_signed(path, [1, 2])
    with pytest.raises(DamagedCheckpoint, match="has another SHA-256"):
        read_signed(path)


def test_contents(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "b").write_bytes(b"b")
    of_nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    nothing = StoredFile(0, of_nothing)
    assert content_fault(tmp_path, {"a": nothing}) is None
    assert content_fault(tmp_path, {"a": nothing, "b": nothing}) == "b has another SHA-256"
    assert content_fault(tmp_path, {"c": nothing}) == (
        "c cannot be read: No such file or directory"
    )
