"""Single steps that go wrong are named: skipped updates, spikes, and the images in them."""

import logging
import math

import pytest
import torch
from tiny_config import config

from sra_fast.data.order import ShuffledBatches
from sra_fast.data.training_data import TrainingData
from sra_fast.training.step_values import StepValues, means
from sra_fast.training.step_watch import History, StepWatch

pytestmark = pytest.mark.usefixtures("rooms")
CPU = torch.device("cpu")


class Images(TrainingData):
    """Sixty images, some of them not finite."""

    def __init__(self, *bad: int):
        self.labels = torch.zeros(60, dtype=torch.int64)
        self.images = torch.zeros(60, 1, 2, 2)
        for number in bad:
            self.images[number, 0, 1, 0] = math.nan

    def __getitems__(self, indices):
        return self.images[indices], self.labels[indices]


def stream(rank=0, world=2, micro=3, accumulation=2, start=0):
    return ShuffledBatches(60, 0, micro, accumulation, rank, world, start, 100)


def watch(*args, data=None, rank=0, shift=0):
    return StepWatch(config(*args), stream(rank), data or Images(), rank, shift, History())


def steps(losses, skipped=(), first=0):
    """Tables of steps with these losses, two micro-steps each."""
    values = StepValues(CPU)
    for step, loss in enumerate(losses, first):
        values.add({"loss": torch.tensor(1.0), "student_norm": torch.tensor(2.0)}, step, 0)
        values.add({"loss": torch.tensor(loss), "student_norm": torch.tensor(2.0)}, step, 1)
        values.add({"grad_norm": 1.0}, step)
        values.add({"skipped": torch.tensor(step in skipped)}, step)
    return values.take()


def test_means_leave_out_what_is_not_finite():
    values = StepValues(CPU)
    for i, loss in enumerate((1.0, math.nan, 3.0)):
        values.add({"loss": torch.tensor(loss, dtype=torch.bfloat16), "denoise": loss}, i)
        values.add({"skipped": torch.tensor(loss != loss)}, i)
    values.add({"loss": torch.tensor(5.0), "align": torch.tensor(math.inf)}, 3)
    assert values.total("loss").isnan()
    names, numbers = means(values.take(), 1)
    found = dict(zip(names, numbers.tolist(), strict=True))
    assert math.isnan(found.pop("align")), "no value is finite"
    assert found == {"loss": 3.0, "denoise": 2.0, "skipped": 1.0}
    assert values.take() == []


def test_a_norm_that_is_a_number_in_some_steps_lies_on_the_device():
    """DeepSpeed gives infinity as a number where the norm is a tensor in other steps."""
    values = StepValues(torch.device("meta"))
    values.add({"grad_norm": torch.zeros((), device="meta")}, 0)
    values.add({"grad_norm": math.inf}, 1)
    (table,) = values.take()
    assert table.values.device.type == "meta" and table.at == [(0, 0), (1, 0)]


def test_a_replay_that_overwrites_its_outputs_changes_no_earlier_step():
    values = StepValues(CPU)
    output = torch.tensor(1.0)
    values.add({"loss": output}, 0)
    output.fill_(7.0)
    values.add({"loss": output}, 1)
    assert values.take()[0].values.flatten().tolist() == [1.0, 7.0]


def test_numbers_of_a_step_are_those_that_the_loader_gets():
    for rank in (0, 1):
        order = stream(rank, start=3)
        listed = iter(order)
        asked = stream(rank)
        for step in range(3, 20):
            for micro_step in (0, 1):
                # asked about a step of another epoch in between
                assert asked.numbers(0, 0) == stream(rank).numbers(0, 0)
                assert next(listed) == asked.numbers(step, micro_step)


def test_a_skipped_update_names_the_images_that_are_not_finite(caplog):
    numbers = stream(rank=1).numbers(4, 1)
    bad = watch(data=Images(numbers[2]), rank=1)
    with caplog.at_level(logging.WARNING):
        bad.look(steps([1.0] * 4 + [math.nan], skipped=(4,)))
    assert caplog.messages == [f"step 5, rank 1: the loss is nan; not finite: image {numbers[2]}"]
    assert bad.flags == {"diverged": 0, "roll_back": 0}
    # rank 0 has seen nothing: it says that there was a step
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        watch().look(steps([1.0] * 5, skipped=(4,)))
    said = ", ".join(f"image {number}" for number in stream().numbers(4, 0))
    assert caplog.messages == [
        f"step 5: its update was skipped, the gradients are not finite; {said} and those of "
        "other processes"
    ]


def test_images_after_a_rollback_are_those_of_the_shifted_position(caplog):
    numbers = stream().numbers(4 + 7, 1)
    with caplog.at_level(logging.WARNING):
        watch(data=Images(*numbers), shift=7).look(steps([math.nan], skipped=(4,), first=4))
    assert f"not finite: image {numbers[0]}, image {numbers[1]}" in caplog.messages[0]


@pytest.mark.parametrize(
    "args, skipped, flags",
    [
        ((), (1, 2), {"diverged": 0, "roll_back": 0}),
        (("--train.skip_limit", "2"), (1, 2), {"diverged": 1, "roll_back": 0}),
        (("--train.skip_limit", "2"), (1, 3), {"diverged": 0, "roll_back": 0}),
        (("--train.on_nan", "stop"), (2,), {"diverged": 1, "roll_back": 0}),
        (("--train.on_nan", "rollback"), (1, 2), {"diverged": 0, "roll_back": 3}),
        # a row with more skipped updates than the limit, which then counts returns
        (
            ("--train.on_nan", "rollback", "--train.skip_limit", "1"),
            (0, 1, 2),
            {"diverged": 0, "roll_back": 3},
        ),
    ],
)
def test_what_follows_a_skipped_update(args, skipped, flags):
    watcher = watch(*args)
    # the rows of one interval, then those of the next: a row in between does not reset the count
    watcher.look(steps([1.0, 1.0], skipped))
    watcher.look(steps([1.0, 1.0], skipped, first=2))
    assert watcher.flags == flags


def test_a_spike_is_said_once_with_its_images(caplog):
    watcher = watch("--train.spike", "10", rank=1)
    numbers = stream(rank=1).numbers(25, 1)
    losses = [1.0] * 25 + [11.0, 12.0, 1.0, 9.0]
    with caplog.at_level(logging.WARNING):
        watcher.look(steps(losses))
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(
        "step 26, rank 1: loss 11 is 11 times its running median 1; "
        f"image {numbers[0]}, image {numbers[1]}"
    )
    assert watcher.flags["roll_back"] == 0


def test_no_spike_in_the_first_steps_nor_without_the_option(caplog):
    with caplog.at_level(logging.WARNING):
        watch().look(steps([1.0, 1000.0]))
        watch("--train.spike", "0").look(steps([1.0] * 50 + [1e35]))
    assert not caplog.messages


def test_the_last_bad_step_counts_and_spikes_are_looked_at_in_order(caplog):
    watcher = watch("--train.on_nan", "rollback", "--train.on_spike", "rollback")
    tables = steps([1.0] * 30 + [1330.0], skipped=(25,))
    watcher.look(tables)
    assert watcher.flags["roll_back"] == 31
    # steps with alignment and without come in two tables
    values = StepValues(CPU)
    for step in range(60):
        loss = {41: 500.0, 52: 500.0}.get(step, 1.0)
        aligned = {"align": torch.tensor(1.0)} if step % 2 else {}
        values.add({"loss": torch.tensor(loss), **aligned}, step)
        values.add({"skipped": torch.tensor(False)}, step)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        watch().look(values.take())
    assert [message.split(",")[0] for message in caplog.messages] == ["step 42", "step 53"]


def test_many_skipped_updates_are_a_few_lines(caplog):
    with caplog.at_level(logging.WARNING):
        watch("--train.skip_limit", "99").look(steps([1.0] * 40, skipped=range(0, 40, 2)))
    assert len(caplog.messages) == 6
    assert caplog.messages[-1] == "15 more updates were skipped up to step 39"


def test_a_median_of_zero_says_nothing(caplog):
    with caplog.at_level(logging.WARNING):
        watch().look(steps([0.0] * 60 + [1.0]))
    assert not [message for message in caplog.messages if "loss" in message]


def test_a_spike_of_the_loss_may_go_back():
    watcher = watch("--train.on_spike", "rollback")
    watcher.look(steps([1.0] * 30 + [1330.0]))
    assert watcher.flags == {"diverged": 0, "roll_back": 31}
