"""Forward and backward pass as one function of tensors, which a GPU replays as a graph.

The training is the same to the bit.
"""

from dataclasses import replace
from json import dumps
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from bare_training import save, train
from zero_worker import tiny

from sra_fast.checkpoint.manifest import Progress
from sra_fast.data.dataset import make_dataset
from sra_fast.data.loader import Batches
from sra_fast.data.order import ShuffledBatches
from sra_fast.training import graphed_step as module
from sra_fast.training import saving
from sra_fast.training.checks import check_graph
from sra_fast.training.graphed_step import _check_engine, graphed_step
from sra_fast.training.logger import TrainLogger
from sra_fast.training.loop import optimizer_step
from sra_fast.training.plan import make_plan
from sra_fast.training.saver import Saver
from sra_fast.training.trainer import build
from sra_fast.utils import cuda_graph
from sra_fast.utils.cuda_graph import GraphedGradients, held_accumulators, hidden_bytes
from sra_fast.zero import fused_step
from sra_fast.zero.process_group import init_distributed

CUDA = torch.cuda.is_available()
# DeepSpeed's condition for some options of its JSON
HOOKS = {"zero_optimization": {"reduce_scatter": False}}
SAVE = Saver.save
ARGUMENTS = [
    "",
    "--train.micro_batch 8",
    "--align none",
    "--align.every 2 --align.fraction 0.5",
    '--align.schedule milestones --align.milestones {"0":0.0,"2":0.4,"5":0.1} '
    "--train.micro_batch 12",
    "--train.recompute full",
    "--train.recompute norm --train.residual fp32",
    "--model.name DiT-S/2 --align.weight 0.04",
    "--align dual_time --align.student_layer 2 --align.teacher_layer 3 --align.full_share 0.25 "
    "--train.micro_batch 8",
    "--align vae_latent --align.student_layer 2 --align.stop_at_step 3",
    # four kinds of step, two of which have one target each
    "--align self_flow --align.student_layer 2 --align.teacher_layer 3 --align.every 2 "
    "--align2 vae_latent --align2.student_layer 1 --align2.every 3",
]
if CUDA:
    # several graphs, each with a second stream inside
    ARGUMENTS += ["--align.every 2 --train.micro_batch 8 --align.teacher_stream true"]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Nothing is saved, and attention's backward pass adds in one order."""
    monkeypatch.setattr(Saver, "save", lambda *args: None)
    monkeypatch.setenv("SRA_FAST_ATTENTION", "math")


def run(folder, graphed, stage, precision, args, sums=False):
    """Logged rows and the masters, EMA and moments after six steps.

    ``sums``: the optimizer's step adds up gradients, as on several processes.
    """
    cfg = tiny(stage, precision, "--train.graph", str(graphed or sums).lower(), *args.split())
    trainer = build(make_plan(cfg), init_distributed())
    assert bool(getattr(trainer.engine.optimizer.step, "gradients", [])) == sums
    if not graphed:
        trainer.graphed = None
    else:
        assert trainer.graphed.graphs == CUDA
    folder.mkdir()
    rows = train(trainer, make_dataset(cfg), folder)
    names = ("loss", "align", "denoise", "vb", "grad_norm", "student_norm", "teacher_norm")
    names += ("align2", "student_norm2", "teacher_norm2")
    logged = [{name: row[name] for name in names if name in row} for row in rows]
    state = [
        trainer.masters.flats,
        trainer.ema.flats,
        *(trainer.masters.state(name) for name in ("exp_avg", "exp_avg_sq")),
    ]
    state = [[t.clone() for t in tensors] for tensors in state]
    trainer.engine.destroy()
    return logged, state


# the way of the gradients is what differs between stages
CASES = [(1, "bf16", args) for args in ARGUMENTS]
CASES += [
    (stage, precision, args)
    for stage, precision in ((2, "fp32"), (0, "bf16"), (0, "fp32"))
    for args in ARGUMENTS[:2]
]


@pytest.mark.parametrize("stage, precision, args", CASES)
def test_the_same_training(tmp_path, stage, precision, args):
    eager, graphed = (
        run(tmp_path / name, name == "graphed", stage, precision, args)
        for name in ("eager", "graphed")
    )
    assert eager[0] == graphed[0] and len(eager[0]) == 6
    for ours, theirs in zip(graphed[1], eager[1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("stage, precision, args", [CASES[0], CASES[1], (2, "fp32", ARGUMENTS[3])])
def test_the_same_training_where_gradients_are_added_up_afterwards(
    tmp_path, monkeypatch, stage, precision, args
):
    """One process takes the way of several: one flat gradient, sent in place."""
    with monkeypatch.context() as several:
        several.setattr(fused_step, "_is_alone", lambda group: False)
        eager, graphed = (
            run(tmp_path / name, name == "graphed", stage, precision, args, sums=True)
            for name in ("eager", "graphed")
        )
    assert eager[0] == graphed[0] and len(eager[0]) == 6
    for ours, theirs in zip(graphed[1], eager[1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    # the norm is added up in another order than that of each parameter's gradient
    alone = run(tmp_path / "alone", True, stage, precision, args)[0]
    assert [row["loss"] for row in alone] == pytest.approx([row["loss"] for row in eager[0]], 2e-3)


def make(graphs=CUDA):
    torch.manual_seed(0)
    device = "cuda" if CUDA else "cpu"
    layer = torch.nn.Linear(5, 3).to(device)
    loss = lambda x, y: ((layer(x) - y).square().mean(), {"sum": layer(x).sum()})
    batches = [
        (torch.randn(4, 5, device=device), torch.randn(4, 3, device=device)) for _ in range(3)
    ]
    return layer, loss, batches, GraphedGradients(loss, layer.parameters(), graphs)


def expected(layer, loss, batches):
    layer.zero_grad()
    for batch in batches:
        value, output = loss(*batch)
        value.backward()
    return [p.grad.clone() for p in layer.parameters()], output["sum"].detach()


def test_gradients_and_their_sum():
    layer, loss, batches, graphed = make()
    # the second time everything has been captured
    for _ in range(2):
        for count in (1, 3):
            outputs = [
                graphed(*batch, accumulate=i > 0)["sum"].clone()
                for i, batch in enumerate(batches[:count])
            ]
            found = [p.grad.clone() for p in layer.parameters()]
            wanted, last = expected(layer, loss, batches[:count])
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(outputs[-1], last)


def test_gradients_keep_their_place_though_they_were_taken_away():
    """The optimizer's table of addresses is made once."""
    layer, _, batches, graphed = make()
    places = []
    x, y = batches[0]
    for rows in (4, 2, 4):
        graphed(x[:rows], y[:rows])
        places.append([p.grad.data_ptr() for p in layer.parameters()])
        layer.zero_grad(set_to_none=True)
    assert places[0] == places[1] == places[2]
    assert len(graphed.captured) == 2


def test_shared_and_strided_gradients_become_tensors_of_their_own():
    a, b, c = (torch.nn.Parameter(torch.randn(3, 4)) for _ in range(3))
    x = torch.randn(3, 4)
    # the gradients of a and b are one tensor, that of c is expanded
    graphed = GraphedGradients(
        lambda x: (((a + b) * x).sum() + c.sum(), None), [a, b, c], graphs=False
    )
    graphed(x)
    graphed(x, accumulate=True)
    for p, wanted in ((a, 2 * x), (b, 2 * x), (c, torch.full_like(x, 2.0))):
        assert p.grad.is_contiguous()
        torch.testing.assert_close(p.grad, wanted)


def test_outputs_have_no_history():
    """It would hold autograd's nodes, and so forbid the next capture."""
    layer, _, batches, graphed = make(graphs=False)
    output = graphed(*batches[0])
    assert not output["sum"].requires_grad
    assert held_accumulators(layer.parameters()) == 0


def test_only_gradients_that_share_memory_are_copied():
    """A linear layer's weight gradient is a view that covers all of its memory."""
    layer, loss, batches, _ = make()
    weight = torch.autograd.grad(loss(*batches[0])[0], layer.weight)[0]
    part = torch.randn(2, 3, 5)[0]
    found = cuda_graph._own([weight, part, weight])
    assert found[0] is weight and found[1] is not part and found[2] is not weight
    for ours, given in zip(found, (weight, part, weight), strict=True):
        assert torch.equal(ours, given)


def test_memory_that_pytorch_does_not_count():
    before = hidden_bytes()
    if not CUDA:
        make()[-1](*make()[2][0])
        assert hidden_bytes() == before == 0
        return
    layer = torch.nn.Linear(1024, 1024, device="cuda")
    x = torch.randn(2**14, 1024, device="cuda")
    graphed = GraphedGradients(
        lambda x: (layer(layer(x).relu()).square().mean(), None), layer.parameters()
    )
    graphed(x)
    # two outputs of the layer, one of the activation, and gradients: at least four of 64 MiB at
    # once
    assert hidden_bytes() - before >= 4 * x.nbytes


def test_who_may_ask_for_a_graph():
    no_json = make_plan(tiny(1, "bf16")).ds_config
    asked = lambda *args: tiny(1, "bf16", "--train.graph", "true", *args)
    unfused = asked("--optim.implementation", "torch")
    teacher_graph = asked("--align.teacher_graph", "true")
    over_all = asked("--align", "dispersive", "--align.over", "all")
    for found, stage, world in (
        (asked(), 0, 1),
        (asked(), 1, 8),
        (asked(), 2, 2),
        (over_all, 1, 1),
    ):
        check_graph(found, no_json, stage, world)
    # a CPU runs the same program
    check_graph(asked(), no_json, 1, 2)
    for found, stage, world, message in (
        (asked(), 3, 1, "on 1 process needs ZeRO stage 0, 1 or 2, got 3"),
        (asked(), 3, 2, "on 2 processes needs ZeRO stage 1 or 2, got 3"),
        (asked(), 0, 8, "on 8 processes needs ZeRO stage 1 or 2, got 0"),
        (over_all, 1, 2, "it excludes align.over all"),
        (unfused, 1, 1, "needs optim.implementation fused, got torch"),
        (teacher_graph, 1, 1, "it excludes align.teacher_graph"),
    ):
        with pytest.raises(ValueError, match=message):
            check_graph(found, no_json, stage, world)


@pytest.mark.parametrize(
    "stage, precision",
    [(0, "bf16"), (0, "fp32"), (1, "bf16"), (1, "fp32"), (2, "bf16"), (2, "fp32")],
)
def test_nothing_holds_the_nodes_that_accumulate_gradients(stage, precision, tmp_path, monkeypatch):
    """A capture would wait for the stream in which they were made.

    On a GPU that is the legacy stream, and the capture fails. DeepSpeed makes the nodes when it is
    built. A checkpoint that is loaded makes none.
    """
    trainer = build(make_plan(tiny(stage, precision, "--train.graph", "false")), init_distributed())
    graphed = graphed_step(trainer.engine, trainer.student, 1, graphs=False)
    assert (held_accumulators(graphed.parameters) > 0) == (stage > 0), "else nothing to release"
    graphed.release()
    assert held_accumulators(graphed.parameters) == 0
    monkeypatch.setattr(Saver, "save", SAVE)
    saving.load(trainer, save(trainer, tmp_path, Progress(0), 0))
    assert held_accumulators(graphed.parameters) == 0
    # the check can tell: a view that autograd tracks holds one
    view = graphed.parameters[0].view(-1)
    assert held_accumulators(graphed.parameters) == 1 and view.grad_fn is not None
    trainer.engine.destroy()


@pytest.mark.parametrize(
    "args, count",
    [
        ("", 1),
        ("--align none", 1),
        ("--train.micro_batch 8", 2),
        ("--align.every 2", 2),
        ("--align.stop_at_step 3", 2),
        ('--align.schedule milestones --align.milestones {"2":0.0} --train.micro_batch 12', 4),
        ('--align.schedule milestones --align.milestones {"0":0.0,"3":0.4}', 2),
        ('--align.schedule milestones --align.milestones {"0":0.1,"3":0.4}', 1),
    ],
)
def test_every_step_of_a_run_is_captured_at_its_first(args, count, monkeypatch):
    """Later a warm-up would need memory for a step in addition to that of the graphs."""
    cfg = tiny(1, "bf16", *args.split())
    trainer = build(make_plan(cfg), init_distributed())
    trainer.graphed = graphed_step(
        trainer.engine, trainer.student, trainer.plan.accumulation, graphs=False
    )
    made = []
    capture_all = trainer.graphed.capture_all

    def counted(calls):
        capture_all(calls)
        made.append(len(trainer.graphed.captured))

    monkeypatch.setattr(trainer.graphed, "capture_all", counted)
    data = make_dataset(cfg)
    stream = ShuffledBatches(
        len(data), 0, trainer.plan.micro, trainer.plan.accumulation, 0, 1, 0, 6
    )
    batches = Batches(data, stream, 0, False)
    metrics = TrainLogger(None, cfg, trainer.device, 1)
    for step in range(6):
        optimizer_step(trainer, batches, stream, data, step, metrics)
    assert set(made) == {count}
    trainer.engine.destroy()


def test_all_is_warmed_up_before_anything_is_captured(monkeypatch):
    layer, _, batches, _ = make(graphs=False)
    log = []
    loss = lambda x, y: ((layer(x) - y).square().mean(), None)
    graphed = GraphedGradients(loss, layer.parameters(), release=lambda: log.append("release"))
    monkeypatch.setattr(cuda_graph, "warm_up", lambda fn: log.append("warm up"))
    monkeypatch.setattr(
        graphed, "capture", lambda fn: log.append(("capture", fn())) or (None, None)
    )
    (x, y), *_ = batches
    graphed.capture_all([((x, y), True), ((x, y), False), ((x[:2], y[:2]), False), ((x, y), False)])
    # the accumulating one comes last: it adds to the gradients of another
    assert log == ["release", *["warm up"] * 3, *[("capture", None)] * 3]
    assert [accumulate for accumulate, _ in graphed.captured] == [False, False, True]
    graphed.capture_all([((x, y), True)])
    assert len(log) == 7
    view = layer.weight.view(-1)
    with pytest.raises(RuntimeError, match="nodes of 1 parameters are held by something else"):
        graphed.capture_all([((x[:1], y[:1]), False)])
    assert view.grad_fn is not None


def test_what_of_deepspeeds_stands_in_the_way(caplog, monkeypatch):
    trainer = build(make_plan(tiny(1, "bf16")), init_distributed())
    graphed = graphed_step(trainer.engine, trainer.student, 1, graphs=False)
    check = lambda: _check_engine(trainer.engine, 1, graphed)
    check()
    view = graphed.parameters[0].view(-1)
    with pytest.raises(ValueError, match="holds autograd's nodes of 1 parameters"):
        check()
    assert view.grad_fn is not None
    monkeypatch.setattr(trainer.engine.optimizer.step, "takes_gradients", False)
    with pytest.raises(ValueError, match="DeepSpeed's JSON lets it convert or scale"):
        check()
    trainer.engine.destroy()


@pytest.mark.parametrize(
    "args, said",
    [
        ("", None),
        ("--optim.implementation torch", "train.graph needs optim.implementation fused, got torch"),
        ("--train.zero_stage 3", "needs ZeRO stage 0, 1 or 2, got 3"),
        ("--align.teacher_graph true", "it excludes align.teacher_graph"),
    ],
)
def test_a_graph_that_nobody_asked_for_is_left_out_with_a_line(args, said, caplog, monkeypatch):
    """On one GPU; what does not build an engine for it is stood in for."""
    plan = make_plan(tiny(1, "bf16"))
    cfg = tiny(1, "bf16", *args.split())
    plan = replace(plan, cfg=cfg, stage=cfg.train.zero_stage)
    student = Mock(parameters=lambda: iter([Mock(is_cuda=True)]))
    monkeypatch.setattr(module, "graphed_step", Mock(return_value="graph"))
    monkeypatch.setattr(module, "_check_engine", Mock())
    found = module.make_graphed(plan, None, student)
    assert found == (None if said else "graph")
    lines = [f"no CUDA graph of the step, the host launches every kernel: {said}"] if said else []
    assert len(caplog.messages) == len(lines)
    assert not said or caplog.messages[0].endswith(said)
    # none is asked about on several GPUs, nor where it is turned off
    cfg.train.graph = False
    assert module.make_graphed(plan, None, student) is None
    cfg.train.graph = None
    assert module.make_graphed(replace(plan, world=2), None, student) is None
    assert len(caplog.messages) == len(lines)


def test_a_process_takes_its_own_part_of_the_sum_in_place(monkeypatch):
    """The third of four processes. The padding is added up as well, and is part of the norm."""
    weights = torch.zeros(12)
    first, second = parameters = [weights[:3], weights[3:10].view(7, 1)]
    step = object.__new__(fused_step.PartitionedStep)
    step.gradients = []
    step._places = {}
    step.zero = SimpleNamespace(
        bit16_groups_flat=[weights],
        bit16_groups=[parameters],
        real_dp_process_group=[None],
        free_grad_in_param_list=lambda parameters: None,
    )
    step._make_places()
    sent = []
    communication = SimpleNamespace(
        get_world_size=lambda group: 4,
        get_rank=lambda group: 2,
        reduce_scatter_fn=lambda part, flat, group: sent.append((part, flat)),
    )
    monkeypatch.setattr(fused_step, "dist", communication)
    # one was left by autograd, the other is in its place
    first.grad = torch.ones(3)
    (second.grad,) = step.places_of([second])
    second.grad += 2
    part = step._reduced(0)
    ((given, flat),) = sent
    assert flat.tolist() == [1.0] * 3 + [2.0] * 7 + [0.0] * 2
    assert given is part and part.numel() == 3
    # NCCL's condition for a reduce-scatter in place
    assert part.data_ptr() == flat.data_ptr() + 2 * part.nbytes


def test_a_replay_waits_for_the_weights_of_the_teacher(monkeypatch):
    """The wait in the middle of the passes would be part of the graph."""
    cfg = tiny(1, "bf16", "--train.graph", "true", "--align.every", "2")
    trainer = build(make_plan(cfg), init_distributed())
    # so that each step is a call
    trainer.graphed.graphs = False
    pending = []
    step = trainer.graphed._step

    def watched(*args):
        pending.append(len(trainer.teacher.pending))
        return step(*args)

    monkeypatch.setattr(trainer.graphed, "_step", watched)
    data = make_dataset(cfg)
    stream = ShuffledBatches(len(data), 0, trainer.plan.micro, 1, 0, 1, 0, 6)
    batches = Batches(data, stream, 0, False)
    logger = TrainLogger(None, cfg, trainer.device, 1)
    left = []
    for number in range(4):
        optimizer_step(trainer, batches, stream, data, number, logger)
        left.append(len(trainer.teacher.pending))
    # the teacher runs in the steps 0 and 2
    assert pending == [0, 0, 0, 0] and left[1] > 0
    trainer.engine.destroy()


@pytest.mark.parametrize(
    "json, option, worlds",
    [
        ({"communication_data_type": "fp32"}, "communication_data_type must be bf16", (2,)),
        ({"prescale_gradients": True, **HOOKS}, "prescale_gradients must be false", (2,)),
        ({"gradient_predivide_factor": 2.0, **HOOKS}, "gradient_predivide_factor must be 1", (2,)),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, "data_types.grad_accum_dtype must", (1, 2)),
        ({"wall_clock_breakdown": True}, "wall_clock_breakdown must be false", (1, 2)),
        ({"flops_profiler": {"enabled": True}}, "flops_profiler.enabled must be false", (1, 2)),
        ({"timers": {"throughput": {"enabled": True}}}, "timers.throughput.enabled must", (1, 2)),
    ],
)
def test_what_a_graph_excludes_in_deepspeeds_json(json, option, worlds, tmp_path):
    """One line that names it, before anything is built."""
    path = tmp_path / "ds.json"
    path.write_text(dumps(json))
    for world in (1, 2):
        plan = lambda graph, world=world: make_plan(
            tiny(2, "bf16", "--train.graph", graph), str(path), world
        )
        plan("false")
        if world in worlds:
            with pytest.raises(
                ValueError, match=f"^--deepspeed_config: {option}.* with train.graph"
            ):
                plan("true")
        else:
            plan("true")


@pytest.mark.parametrize(
    "json",
    [
        {"communication_data_type": "fp32"},
        {"prescale_gradients": True, **HOOKS},
        {"gradient_predivide_factor": 2.0, **HOOKS},
        {"data_types": {"grad_accum_dtype": "fp32"}},
    ],
)
def test_gradients_that_deepspeed_is_to_change_are_left_to_it(json, tmp_path, monkeypatch):
    """Also if a plan has not looked at the JSON."""
    monkeypatch.setattr(fused_step, "_is_alone", lambda group: False)
    path = tmp_path / "ds.json"
    path.write_text(dumps(json))
    plan = make_plan(tiny(2, "bf16"), str(path))
    plan.cfg.train.graph = True
    message = "DeepSpeed's JSON lets it convert or scale|grad_accum_dtype must be bf16 with train"
    with pytest.raises(ValueError, match=message):
        build(plan, init_distributed())


def test_a_cpu_has_none_unless_asked():
    cases = {"": None, "--train.graph true": False} if not CUDA else {}
    for args, graphs in cases.items():
        trainer = build(make_plan(tiny(1, "bf16", *args.split())), init_distributed())
        assert getattr(trainer.graphed, "graphs", None) is graphs
        trainer.engine.destroy()


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_one_gpu_has_a_graph_unless_it_cannot():
    device = init_distributed()
    cases = {
        "": True,
        "--train.graph false": False,
        "--align.teacher_graph true": False,
        "--optim.implementation torch": False,
    }
    for args, graph in cases.items():
        trainer = build(make_plan(tiny(1, "bf16", *args.split())), device)
        assert (trainer.graphed is not None) == graph, args
        trainer.engine.destroy()
