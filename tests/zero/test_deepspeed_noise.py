"""What DeepSpeed and torch say at a start is kept from the user, and errors are not."""

import logging
import warnings

import pytest
from tiny_config import config

from sra_fast.training.plan import make_run_plan
from sra_fast.zero.process_group import LOG_VARIABLE, deepspeed_log_level, quiet_deepspeed


@pytest.fixture
def deepspeed_log():
    """DeepSpeed's logger with a handler that keeps messages; both get their levels back."""
    logger = logging.getLogger("DeepSpeed")
    messages = []

    class Keeper(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    keeper = Keeper()
    levels = [(part, part.level) for part in (logger, *logger.handlers)]
    logger.addHandler(keeper)
    yield logger, messages
    logger.removeHandler(keeper)
    for part, level in levels:
        part.setLevel(level)


@pytest.mark.parametrize(
    "level, heard",
    [
        (None, ["broken"]),
        ("error", ["broken"]),
        ("warning", ["odd", "broken"]),
        ("info", ["news", "odd", "broken"]),
    ],
)
def test_errors_only_unless_asked(deepspeed_log, monkeypatch, level, heard):
    logger, messages = deepspeed_log
    monkeypatch.delenv(LOG_VARIABLE, raising=False)
    if level:
        monkeypatch.setenv(LOG_VARIABLE, level)
    quiet_deepspeed()
    logger.info("news")
    logger.warning("odd")
    logger.error("broken")
    assert messages == heard


def test_a_level_that_does_not_exist(monkeypatch, tmp_path):
    monkeypatch.setenv(LOG_VARIABLE, "loud")
    message = "must be one of debug, info, warning, error, got 'loud'"
    with pytest.raises(ValueError, match=message):
        deepspeed_log_level()
    # before a process group is made
    with pytest.raises(ValueError, match=message):
        make_run_plan(config("--train.out", str(tmp_path)))


def test_new_names_in_torch_are_no_news(deepspeed_log):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        quiet_deepspeed()
        warnings.warn(
            "`torch.distributed.reduce_scatter_tensor` is deprecated. Please use another.",
            FutureWarning,
            stacklevel=1,
        )
        warnings.warn("our own", FutureWarning, stacklevel=1)
        logging.getLogger("sra_fast").warning("ours")
    assert [str(warning.message) for warning in heard] == ["our own"]
