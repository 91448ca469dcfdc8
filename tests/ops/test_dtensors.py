"""DTensors in the operators that work element by element: each rank updates its own shards."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from sra_fast.ops import adamw_ema_, ema_update_
from sra_fast.ops.adamw_ema import DeviceStep
from sra_fast.ops.fp8 import Fp8Copy
from sra_fast.ops.quantize_rows import E4M3

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a mesh of host tensors")
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])


@pytest.fixture
def mesh():
    """Of one process."""
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    if ours:
        dist.destroy_process_group()


def sharded(x, mesh, placement=None, rows=None):
    """A DTensor with this shard; ``rows``: of the whole tensor, of which other ranks hold some."""
    shape = (rows or x.shape[0], *x.shape[1:])
    placements = [placement or Shard(0)]
    return DTensor.from_local(x, mesh, placements, shape=torch.Size(shape), stride=x.stride())


@BACKENDS
def test_the_average_of_a_model_of_fsdp2(backend, mesh):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3))
    average = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    whole = [p.detach().clone() for p in model.parameters()]
    expected = [e.clone() for e in average.parameters()]
    ema_update_(expected, whole, 0.7, backend=backend)
    for net in (model, average):
        for layer in (*net, net):
            fully_shard(layer, mesh=mesh)
    versions = [e._version for e in average.parameters()]
    ema_update_(average.parameters(), model.parameters(), 0.7, backend=backend)
    for e, x in zip(average.parameters(), expected, strict=True):
        assert isinstance(e, DTensor)
        assert torch.equal(e.full_tensor(), x)
    assert all(e._version > v for e, v in zip(average.parameters(), versions, strict=True))
    # beside plain ones, with copies
    plain = torch.zeros(6)
    first = next(iter(average.parameters()))
    copies = [torch.empty(6, dtype=torch.bfloat16)]
    copies.append(distribute_tensor(torch.empty(5, 4, dtype=torch.bfloat16), mesh, [Shard(0)]))
    one = distribute_tensor(torch.ones(5, 4), mesh, [Shard(0)])
    ema_update_([plain, first], [torch.ones(6), one], 0.0, copies, backend=backend)
    assert (plain == 1).all() and (first.full_tensor() == 1).all()
    assert (copies[0] == 1).all() and (copies[1].full_tensor() == 1).all()


@BACKENDS
def test_uneven_shards(backend, mesh):
    """The shards decide, not the whole; a rank may hold nothing."""
    local = [torch.zeros(3, 4), torch.zeros(0, 4)]
    ema = [sharded(x, mesh, rows=5) for x in local]
    params = [sharded(torch.ones_like(x), mesh, rows=5) for x in local]
    ema_update_(ema, params, 0.5, backend=backend)
    assert (local[0] == 0.5).all()


def test_dtensors_that_are_not_sharded_alike_are_refused(mesh):
    other_mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("other",))
    e = sharded(torch.zeros(3, 4), mesh)
    p = sharded(torch.ones(3, 4), mesh)
    half = torch.zeros(3, 4, dtype=torch.bfloat16)
    start = (
        "^ema_update_: expected DTensors of one shape, mesh and placements, none of them partial"
    )
    for ema, params, copies, match in (
        (e, torch.ones(3, 4), None, r"got ema\[0\] a DTensor \[3, 4\] .*, params\[0\] a Tensor"),
        (torch.ones(3, 4), p, None, r"ema\[0\] a Tensor, params\[0\] a DTensor \[3, 4\] .*Shard"),
        (e, sharded(torch.ones(3, 4), mesh, Replicate()), None, r"Shard.*Replicate\(\)"),
        (e, sharded(torch.ones(3, 4), mesh, Shard(1)), None, r"Shard\(dim=0\).*Shard\(dim=1\)"),
        (e, sharded(torch.ones(3, 4), other_mesh), None, "DeviceMesh.*DeviceMesh.*other"),
        (e, sharded(torch.ones(3, 4), mesh, rows=5), None, r"ema\[0\] .*\[3, 4\].*\[5, 4\]"),
        (e, p, half, r"copies\[0\] a Tensor$"),
        (*(sharded(x, mesh, Partial()) for x in torch.ones(2, 3, 4)), None, "Partial.*Partial"),
    ):
        copies = None if copies is None else [copies]
        with pytest.raises(ValueError, match=f"{start}.*{match}") as raised:
            ema_update_([ema], [params], 0.5, copies)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="as many params"):
        ema_update_([e], [], 0.5)
    decay = distribute_tensor(torch.ones((), dtype=torch.float64), mesh, [Replicate()])
    with pytest.raises(ValueError, match="^ema_update_: expected decay as a plain tensor"):
        ema_update_([e], [p], decay)
    # the shards in one memory
    with pytest.raises(ValueError, match=r"ema\[1\] in the memory of ema\[0\]"):
        ema_update_([e, e], [p, p], 0.5)
    assert not e.full_tensor().any()


def optimizer_buffers(mesh=None):
    torch.manual_seed(1)
    state = {name: torch.rand(6, 4) for name in ("param", "grad", "exp_avg", "exp_avg_sq", "ema")}
    half = {name: torch.zeros(6, 4, dtype=torch.bfloat16) for name in ("weights", "ema_copy")}
    state |= half
    return state if mesh is None else {name: sharded(x, mesh) for name, x in state.items()}


@BACKENDS
def test_the_optimizer_step_of_shards(backend, mesh):
    settings = {"lr": 0.1, "clip_scale": torch.tensor(0.5), "decay": 0.7, "backend": backend}
    expected = optimizer_buffers()
    adamw_ema_(**expected, step=1, **settings)
    found = optimizer_buffers(mesh)
    versions = {name: x._version for name, x in found.items()}
    adamw_ema_(**found, step=1, **settings)
    for name, x in found.items():
        assert torch.equal(x.to_local(), expected[name]), name
        assert (x._version > versions[name]) == (name != "grad")


def test_optimizer_buffers_that_are_not_sharded_alike_are_refused(mesh):
    whole = optimizer_buffers()
    good = optimizer_buffers(mesh) | {"step": 1, "lr": 0.1}
    start = "^adamw_ema_: expected "
    number = distribute_tensor(torch.ones(1), mesh, [Replicate()])
    numbers = distribute_tensor(torch.ones(4, dtype=torch.float64), mesh, [Replicate()])
    fp8 = Fp8Copy.of(torch.zeros(6, 4, dtype=E4M3), torch.ones(1), torch.zeros(1), [24])
    for change, match in (
        ({"grad": whole["grad"]}, "DTensors of one shape.* param a DTensor .*grad a Tensor"),
        ({"param": whole["param"]}, "DTensors of one shape.* param a Tensor, grad a DTensor"),
        ({"exp_avg": sharded(whole["exp_avg"], mesh, Replicate())}, r"exp_avg .*Replicate\(\)"),
        ({"grad": [(0, whole["grad"].view(-1))]}, "grad a list"),
        ({"ema_copy": fp8}, "ema_copy a Fp8Copy"),
        (
            {"clip_scale": number},
            r"clip_scale as a plain tensor, as full_tensor\(\) returns it, got",
        ),
        ({"step": DeviceStep(numbers)}, "step.numbers as a plain tensor"),
        (whole | {"grad": [(0, good["grad"])]}, "piece 0 of grad as a plain tensor"),
        (
            whole | {"ema_copy": fp8._replace(amax=number)},
            "ema_copy.amax as a plain tensor",
        ),
    ):
        with pytest.raises(ValueError, match=start + ".*" + match) as raised:
            adamw_ema_(**good | change)
        assert "\n" not in str(raised.value)
