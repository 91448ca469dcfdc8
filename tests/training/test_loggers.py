"""Where numbers and pictures go: TensorBoard, CSV, wandb, and a logger that enters by its socket."""

import csv
import json
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import ROOT, call, error_of
from PIL import Image
from tiny_config import config

from sra_fast.training.logger import StepFacts, TrainLogger
from sra_fast.training.loggers import RunLogger, check_loggers
from sra_fast.training.rows import read_rows
from sra_fast.utils import files
from sra_fast.utils.registry import LOGGERS

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("rooms")


def open_logger(folder: Path, *names: str, start: int = 0) -> TrainLogger:
    cfg = config("--train.log_every", "1", "--train.loggers", f"[{', '.join(names)}]")
    return TrainLogger(folder, cfg, CPU, 1, start)


def log_steps(logger: TrainLogger, steps: range, extra_from: int = 100) -> None:
    """The loss is the step; a second value appears at ``extra_from``."""
    for step in steps:
        logger.add({"loss": torch.tensor(float(step))})
        if step >= extra_from:
            logger.add({"align": torch.tensor(step / 2)})
        logger.step(StepFacts(step, lr=0.5))
    logger.flush()


def picture(folder: Path) -> Path:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(pixels).save(folder / "grid.png")
    return folder / "grid.png"


def read_csv(folder: Path) -> list[dict]:
    with open(folder / "stats.csv", newline="") as f:
        return list(csv.DictReader(f))


def test_csv_is_the_log(tmp_path):
    logger = open_logger(tmp_path, "csv")
    log_steps(logger, range(1, 6), extra_from=3)
    # a picture and scores are for others
    logger.show("samples", 5, picture(tmp_path), {"step": 5, "fid": 1.0})
    logger.close()
    rows = read_csv(tmp_path)
    assert [(r["step"], r["loss"], r["align"]) for r in rows] == [
        ("1", "1.0", ""),
        ("2", "2.0", ""),
        ("3", "3.0", "1.5"),
        ("4", "4.0", "2.0"),
        ("5", "5.0", "2.5"),
    ]
    written = read_rows(tmp_path / "stats.jsonl")
    found = [{name: float(value) for name, value in row.items() if value} for row in rows]
    assert found == written


def test_a_resumed_csv_drops_rows_beyond_the_checkpoint(tmp_path):
    logger = open_logger(tmp_path, "csv")
    log_steps(logger, range(1, 7))
    logger.close()
    # cut short by a crash
    with open(tmp_path / "stats.csv", "a") as f:
        f.write("7,0.")
    logger = open_logger(tmp_path, "csv", start=4)
    assert [row["step"] for row in read_csv(tmp_path)] == ["1", "2", "3", "4"]
    log_steps(logger, range(5, 8))
    logger.close()
    assert [row["step"] for row in read_csv(tmp_path)] == [str(step) for step in range(1, 8)]


def test_a_csv_that_is_asked_for_later_is_whole(tmp_path):
    logger = open_logger(tmp_path)
    log_steps(logger, range(1, 4))
    logger.close()
    logger = open_logger(tmp_path, "csv", "csv", start=3)
    assert len(logger.loggers) == 1, "one logger for a name that is given twice"
    logger.close()
    assert [row["loss"] for row in read_csv(tmp_path)] == ["1.0", "2.0", "3.0"]
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboard_holds_scalars_pictures_and_the_configuration(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = open_logger(tmp_path, "tensorboard")
    log_steps(logger, range(1, 4))
    logger.show("samples/monitor", 2, picture(tmp_path), {"step": 2, "fid": 7.5})
    logger.close()
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert [(e.step, e.value) for e in events.Scalars("samples/fid")] == [(2, 7.5)]
    (shown,) = events.Images("samples/monitor")
    assert (shown.step, shown.width, shown.height) == (2, 4, 4)
    (text,) = events.Tensors("config/text_summary")
    assert "    log_every: 1\n" in text.tensor_proto.string_val[0].decode()


def wandb_records(folder: Path) -> list:
    """What wandb has written, from all of its offline runs in the order of their names."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in log_entries(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            records.append(record)
    return records


def log_entries(data: bytes, block: int = 2**15) -> list[bytes]:
    """Entries of a LevelDB log, which wandb's file is after a header of 7 bytes.

    A piece has a checksum, its length and its kind: 1 whole, 2 first, 3 middle, 4 last.
    """
    entries = []
    pending = b""
    at = 7
    while at < len(data):
        # a piece does not cross a block, and its header takes 7 bytes
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        pending += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            entries.append(pending)
            pending = b""
    return entries


def history_of(records: list) -> list[dict]:
    return [
        {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """wandb without a network, and without the settings and keys of whoever runs the tests."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_PROJECT", "tests")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    # its own process may take long to start where many tests run at once
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "300")
    # it reads its variables once in a process: forget those of tests before, and these for tests after
    wandb.teardown()
    yield wandb
    wandb.teardown()


def test_a_resumed_run_is_one_run_of_wandb(tmp_path, offline):
    run = tmp_path / "000"
    run.mkdir()
    logger = open_logger(run, "wandb")
    log_steps(logger, range(1, 4))
    logger.show("samples/monitor", 3, picture(run), {"step": 3, "fid": 7.5})
    logger.close()
    first = json.loads((run / "wandb.json").read_text())["id"]
    # wandb names a folder by the second
    time.sleep(1.1)
    logger = open_logger(run, "wandb", start=2)
    log_steps(logger, range(3, 5))
    logger.close()
    # wandb's own process writes the files, and may still do so when `finish` returns
    offline.teardown()
    patience = time.monotonic() + 60
    while len(history_of(wandb_records(run))) < 6 and time.monotonic() < patience:
        time.sleep(0.2)

    assert json.loads((run / "wandb.json").read_text())["id"] == first
    files_written = list(run.glob("wandb/offline-run-*/*.wandb"))
    assert {file.name for file in files_written} == {f"run-{first}.wandb"}
    records = wandb_records(run)
    runs = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert {(r.run_id, r.project) for r in runs} == {(first, "tests")}
    settings = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert settings["train"]["log_every"] == 1
    history = history_of(records)
    losses = [(json.loads(row["step"]), row["loss"]) for row in history if "loss" in row]
    assert {step: float(loss) for step, loss in losses} == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    assert [row["samples/fid"] for row in history if "samples/fid" in row] == ["7.5"]
    assert list(run.glob("wandb/offline-run-*/files/media/images/samples/*.png"))


@pytest.mark.parametrize(
    "name, value, message",
    [
        (
            "WANDB_MODE",
            "online",
            "wandb has no API key; expected a login (`wandb login`), or WANDB_M",
        ),
        (
            "WANDB_MODE",
            "fastest",
            "wandb did not start (1 validation error for Settings mode Input",
        ),
        ("WANDB_API_KEY", "abc", "wandb did not start (WANDB_API_KEY invalid: API key must have"),
    ],
)
def test_without_a_login_wandb_is_one_error(tmp_path, offline, monkeypatch, name, value, message):
    """Before anything is made, and without the network."""
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_IDENTITY_TOKEN_FILE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv(name, value)
    demo = ROOT / "configs/digits.yaml"
    done = call("train", "--config", demo, "--train.loggers", "[csv, wandb]", cwd=tmp_path)
    assert error_of(done).startswith(f"error: train.loggers: {message}")
    assert done.returncode == 2
    assert not (tmp_path / "runs").exists()


def test_offline_needs_no_login(tmp_path, offline, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    check_loggers(config("--train.loggers", "[wandb]"))


def test_other_ranks_need_no_login(offline, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "fastest")
    monkeypatch.setenv("RANK", "1")
    check_loggers(config("--train.loggers", "[wandb]"))


def test_a_wandb_that_fails_later_is_one_error(tmp_path, offline, monkeypatch):
    import wandb

    def fail(**options):
        raise wandb.errors.CommError("no route to host")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(ValueError, match=r"wandb did not start \(no route to host\).*=offline"):
        open_logger(tmp_path, "wandb")


def test_a_logger_enters_by_its_socket(tmp_path):
    class Memory(RunLogger):
        """Keeps what it gets."""

        def __init__(self, run):
            self.rows = list(run.rows)
            self.pictures = []
            self.closed = False

        @classmethod
        def place(cls, folder):
            return "in memory"

        def row(self, row):
            self.rows.append(row)

        def picture(self, name, step, path):
            self.pictures.append((name, step, path.name))

        def close(self):
            self.closed = True

    LOGGERS.register("memory")(Memory)
    try:
        logger = open_logger(tmp_path, "memory")
        log_steps(logger, range(1, 3))
        logger.show("x", 2, picture(tmp_path), {"step": 2})
        logger.close()
        (memory,) = logger.loggers
        resumed = open_logger(tmp_path, "memory", start=1)
        assert [row["step"] for row in resumed.loggers[0].rows] == [1]
        resumed.close()
    finally:
        LOGGERS.remove("memory")
    assert memory.rows == logger.rows
    assert memory.pictures == [("x", 2, "grid.png")]
    assert memory.closed


def test_what_cannot_log_is_named(monkeypatch):
    cfg = config("--train.loggers", "[csv, mlflow]")
    expected = "expected a logger of tensorboard, csv, wandb, got 'mlflow'"
    with pytest.raises(ValueError, match=expected):
        check_loggers(cfg)
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    cfg = config("--train.loggers", "[wandb]")
    with pytest.raises(ValueError, match=r"needs wandb: pip install 'sra-fast\[wandb\]'"):
        check_loggers(cfg)
