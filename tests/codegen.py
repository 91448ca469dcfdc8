"""Compile Triton kernels for a GPU that is not there, and read what the machine code costs.

    (report,) = compile_kernels([Request("sra_fast.kernels.adaln", "_adaln_fwd_kernel", 90, args)])
    assert report.spills == 0 and report.loads[128]

    with record_launches(kernels) as launches:  # what a launcher would run
        kernels.adaln_fwd(*meta_tensors)
    compile_kernels([replace(launch, arch=arch) for launch in launches for arch in ARCHS])

`args` gives every kernel argument in order. A string is a run-time argument: "*bf16", "*fp32",
"*i64" (a pointer), "i32", "i64", "fp32". Pointers and integers are specialized as divisible by 16,
as Triton's launcher does for real tensors, unless the string ends in ":1" ("i32:1" is an odd
integer, "*bf16:1" a misaligned pointer). Anything else (an int, a bool, None) is a constexpr.
"""

import contextlib
import functools
import inspect
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALL_ARCHS = (80, 90, 100)


def chosen_archs(text: str) -> tuple[int, ...]:
    """Architectures to compile for, as in "80 90": without Hopper some tests would look at nothing.

    Raises:
        ValueError: an architecture that the tests do not know, or no 90.
    """
    archs = text.split()
    if "90" not in archs or not {*archs} <= {str(arch) for arch in ALL_ARCHS}:
        raise ValueError(f"SRA_FAST_ARCHS must be 90 and others of {ALL_ARCHS}, got {text!r}")
    return tuple(map(int, archs))


# `make codegen` says all of them
ARCHS = chosen_archs(os.environ.get("SRA_FAST_ARCHS", "90"))
# child processes that compile at the same time
MAX_CHILDREN = 4
# names of dtypes in Triton's signatures where they differ from torch's
TRITON_DTYPES = {
    "float32": "fp32",
    "float64": "fp64",
    "float16": "fp16",
    "bfloat16": "bf16",
    "uint8": "u8",
    "bool": "i1",
    "float8_e4m3fn": "fp8e4nv",
}


@dataclass(frozen=True)
class Request:
    """One kernel, one architecture of ``ALL_ARCHS``, one set of arguments."""

    module: str
    kernel: str
    arch: int
    args: dict[str, str | int | float | bool | None]
    num_warps: int = 4
    options: dict[str, int | bool] = field(default_factory=dict)

    def bits(self, name: str) -> int:
        """Bits of an element of the pointer ``<name>_ptr``; 0 if None is passed."""
        pointer = self.args[f"{name}_ptr"]
        return 0 if pointer is None else int(re.findall(r"\d+", str(pointer))[0])


@dataclass(frozen=True)
class Report:
    """What one compiled kernel costs.

    Attributes:
        registers: 32-bit registers per thread.
        spills: bytes of stack and local memory per thread.
        shared: bytes of shared memory per program.
        loads: global loads of the PTX by width in bits. ptxas keeps the widths and only unrolls
            loops (nvdisasm agrees, but takes as long as the compilation).
        stores: global stores of the PTX by width in bits.
        barriers: block barriers of the PTX.
    """

    registers: int
    spills: int
    shared: int
    loads: Counter
    stores: Counter
    barriers: int


# reports of this session by request: test modules share what they compile
_reports: dict[str, Report] = {}


def compile_kernels(requests: list[Request]) -> list[Report]:
    """Compile every request that this session has not compiled yet; return all reports in order.

    Raises:
        RuntimeError: a request does not compile; the message holds the compiler's output.
    """
    missing = {repr(r): r for r in requests if repr(r) not in _reports}
    if missing:
        children = _idle_children()
        with ThreadPoolExecutor(children.maxsize) as pool:
            found = pool.map(lambda request: _compile_in_child(children, request), missing.values())
            _reports.update(zip(missing, found, strict=True))
    return [_reports[repr(request)] for request in requests]


@functools.cache
def _idle_children() -> queue.Queue[subprocess.Popen[str]]:
    """Child processes that compile, started once per session: importing torch and triton takes
    seconds.

    They run without TRITON_INTERPRET, which must be set before triton is imported. They end when
    this process does, because their input ends then.
    """
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    env["OMP_NUM_THREADS"] = "1"
    # the workers of pytest-xdist share the cores; Triton's cache on disk shares the compiled code
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    # one more than a worker's share: a worker that compiles waits, and near the end it is the last
    count = min((os.cpu_count() or 1) // workers + 1, MAX_CHILDREN)
    children: queue.Queue[subprocess.Popen[str]] = queue.Queue(count)
    for _ in range(count):
        command = [sys.executable, __file__]
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True
        )
        children.put(child)
    return children


def _compile_in_child(children: queue.Queue[subprocess.Popen[str]], request: Request) -> Report:
    """Send one request to an idle child as a line of JSON, and read its answer."""
    child = children.get()
    try:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(json.dumps(asdict(request)) + "\n")
        child.stdin.flush()
        answer = child.stdout.readline()
    finally:
        children.put(child)
    row = json.loads(answer) if answer else {"error": "the compiling process died"}
    if "error" in row:
        raise RuntimeError(f"compilation of {request} failed:\n{row['error'][-4000:]}")
    # JSON has no integer keys
    for kind in ("loads", "stores"):
        row[kind] = Counter({int(bits): count for bits, count in row[kind].items()})
    return Report(**row)


def _describe(
    value, is_constexpr: bool, never_specialized: bool
) -> str | int | float | bool | None:
    """An argument as `Request.args` has it, specialized as Triton would specialize it."""
    if never_specialized and type(value) is int:
        return f"{_integer_type(value)}:1"
    # Triton makes a constant of 1, too
    if (
        is_constexpr
        or value is None
        or isinstance(value, bool)
        or type(value) is int
        and value == 1
    ):
        return value
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return _integer_type(value) + ("" if value % 16 == 0 else ":1")
    # a tensor
    dtype = str(value.dtype).removeprefix("torch.")
    name = TRITON_DTYPES.get(dtype, dtype.replace("int", "i"))
    return f"*{name}" + ("" if value.data_ptr() % 16 == 0 else ":1")


def _integer_type(value: int) -> str:
    return "i32" if -(2**31) <= value < 2**31 else "i64"


class _Recorder:
    """Stands in for a kernel: launches become requests in a log."""

    def __init__(self, module, name: str, log: list[Request]):
        self.module = module
        self.name = name
        self.log = log
        kernel = getattr(module, name)
        self.parameters = inspect.signature(kernel.fn).parameters
        # an interpreted kernel has no `params`, but the keywords of its decorator
        if hasattr(kernel, "params"):
            self.never_specialized = {p.name for p in kernel.params if p.do_not_specialize}
        else:
            self.never_specialized = set(kernel.kwargs["do_not_specialize"] or ())

    def __getitem__(self, grid):
        return self._launch

    def _launch(self, *args, **kwargs):
        kwargs = dict(zip(self.parameters, args, strict=False)) | kwargs
        described = {}
        for name, parameter in self.parameters.items():
            is_constexpr = "constexpr" in str(parameter.annotation)
            never_specialized = name in self.never_specialized
            described[name] = _describe(kwargs.pop(name), is_constexpr, never_specialized)
        # what remains are options of the launch
        num_warps = kwargs.pop("num_warps", 4)
        options = {key: value for key, value in kwargs.items() if value is not None}
        request = Request(self.module.__name__, self.name, 90, described, num_warps, options)
        self.log.append(request)


@contextlib.contextmanager
def record_launches(*modules):
    """Yield a list that receives a request for every launch of the modules' kernels; none of them
    runs.

    Call launchers with tensors of any device, "meta" included (aligned, and of any size).
    """
    log: list[Request] = []
    kernels = [(m, name) for m in modules for name in vars(m) if name.endswith("_kernel")]
    originals = [getattr(module, name) for module, name in kernels]
    for module, name in kernels:
        setattr(module, name, _Recorder(module, name, log))
    try:
        yield log
    finally:
        for (module, name), original in zip(kernels, originals, strict=True):
            setattr(module, name, original)


def _source(request: dict):
    """Triton's ASTSource for a request: types, constants and divisibility of every argument."""
    from importlib import import_module

    from triton.compiler import ASTSource

    kernel = getattr(import_module(request["module"]), request["kernel"])
    if list(request["args"]) != kernel.arg_names:
        raise ValueError(
            f"{request['kernel']} takes {kernel.arg_names}, got {list(request['args'])}"
        )
    signature = {}
    constants = {}
    attrs = {}
    for i, (name, value) in enumerate(request["args"].items()):
        if not isinstance(value, str):
            signature[name] = "constexpr"
            constants[(i,)] = value
            continue
        signature[name], _, odd = value.partition(":")
        if not odd and not value.startswith("fp"):
            attrs[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attrs)


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _measure(cubin: bytes, ptx: str) -> dict:
    """A `Report` of a compiled kernel."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(cubin)
        file.flush()
        usage = _run(_tool("cuobjdump"), "--dump-resource-usage", file.name)
    used = {
        key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)
    }

    def by_width(opcode: str) -> Counter:
        # ld.global.v4.b32, ld.global.L1::evict_last.b16
        found = re.findall(rf"\b{opcode}\.global\S*?(?:\.v(\d))?\.[bfsu](\d+) ", ptx)
        return Counter(int(lanes or 1) * int(bits) for lanes, bits in found)

    return {
        "registers": used["REG"],
        "spills": used["STACK"] + used["LOCAL"],
        "shared": used["SHARED"],
        "loads": by_width("ld"),
        "stores": by_width("st"),
        "barriers": len(re.findall(r"\bbar\.sync", ptx)),
    }


def _compile(request: dict) -> dict:
    """A `Report` as a dict of one request; the child's part of `compile_kernels`."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": request["num_warps"], **request["options"]}
    target = GPUTarget("cuda", request["arch"], 32)
    compiled = triton.compile(_source(request), target=target, options=options)
    row = _measure(compiled.asm["cubin"], compiled.asm["ptx"])
    # dynamic shared memory is requested at launch and is not in the cubin's table
    row["shared"] = max(row["shared"], compiled.metadata.shared)
    return row


def _main() -> None:
    """Answer every line of JSON on stdin with one on stdout."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # whatever a compiler prints goes to stderr
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        try:
            row = _compile(json.loads(line))
        except Exception:
            row = {"error": traceback.format_exc()}
        print(json.dumps(row), file=answers, flush=True)


if __name__ == "__main__":
    _main()
