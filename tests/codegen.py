"""Compile Triton kernels for a GPU that is not there, and read what the machine code costs.

    report, = compile_kernels([Request("sra_fast.kernels.adaln", "_adaln_fwd_kernel", 90, args, num_warps=8)])
    assert report.spills == 0 and report.loads[128]

    with record_launches(kernels) as launches:  # what a launcher would run, taken from the launcher itself
        kernels.adaln_fwd(*meta_tensors)
    compile_kernels([replace(launch, arch=arch) for launch in launches for arch in (80, 90, 100)])

`args` gives every kernel argument in order.  A string is a run-time argument: "*bf16", "*fp32", "*i64" (a pointer),
"i32", "i64", "fp32"; pointers and integers are specialised as divisible by 16, as the launcher does for real tensors,
unless the string ends in ":1" ("i32:1" is an odd integer, "*bf16:1" a misaligned pointer).  Anything else (an int, a
bool, None) is a constexpr.  All requests are compiled in one child process without TRITON_INTERPRET.
"""

import contextlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Request:
    """One kernel, one architecture (80, 90, 100), one set of arguments."""

    module: str
    kernel: str
    arch: int
    args: dict[str, str | int | float | bool | None]
    num_warps: int = 4
    options: dict[str, int | bool] = field(default_factory=dict)

    def bits(self, name: str) -> int:
        """Per element behind the pointer ``<name>_ptr``; 0 where None is passed."""
        pointer = self.args[f"{name}_ptr"]
        return 0 if pointer is None else int(re.search(r"\d+", pointer).group())


@dataclass(frozen=True)
class Report:
    """Per thread: 32-bit registers, bytes of stack or local memory; per program: bytes of shared memory.

    ``loads`` and ``stores`` count the global memory instructions of the PTX by width in bits, ``barriers`` its block
    barriers.  ptxas keeps the widths; it only unrolls loops (nvdisasm agrees, and takes as long as the compilation).
    """

    registers: int
    spills: int
    shared: int
    loads: Counter
    stores: Counter
    barriers: int


def compile_kernels(requests: list[Request], timeout: float = 600) -> list[Report]:
    """Compile every request; raises RuntimeError with the compiler's words if one does not compile."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    child = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([asdict(r) for r in requests]),
        capture_output=True,
        text=True,
        env=env,
        timeout=timeout,
    )
    if child.returncode:
        raise RuntimeError(f"compilation failed:\n{child.stderr[-4000:]}")
    rows = json.loads(child.stdout.splitlines()[-1])
    widths = lambda row, key: Counter({int(bits): n for bits, n in row.pop(key).items()})
    return [Report(loads=widths(row, "loads"), stores=widths(row, "stores"), **row) for row in rows]


def _describe(value, is_constexpr: bool, plain: bool) -> str | int | float | bool | None:
    """An argument as `Request.args` writes it, specialised as Triton would specialise it; `plain` ones it would not."""
    if plain and type(value) is int:
        return "i32:1" if -(2**31) <= value < 2**31 else "i64:1"
    if (
        is_constexpr
        or value is None
        or value is True
        or value is False
        or (isinstance(value, int) and value == 1)
    ):
        return value
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return ("i32" if -(2**31) <= value < 2**31 else "i64") + ("" if value % 16 == 0 else ":1")
    names = {
        "float32": "fp32",
        "float16": "fp16",
        "bfloat16": "bf16",
        "uint8": "u8",
        "bool": "i1",
        "float8_e4m3fn": "fp8e4nv",
    }
    dtype = str(value.dtype).removeprefix("torch.")
    return f"*{names.get(dtype, dtype.replace('int', 'i'))}" + (
        "" if value.data_ptr() % 16 == 0 else ":1"
    )


class _Recorder:
    def __init__(self, module, name: str, log: list[Request]):
        self.module, self.name, self.log = module, name, log
        kernel = getattr(module, name)
        self.parameters = inspect.signature(kernel.fn).parameters
        interpreted = getattr(kernel, "kwargs", None)  # which has no parameters to ask
        self.plain = (
            interpreted["do_not_specialize"] or ()
            if interpreted
            else {p.name for p in kernel.params if p.do_not_specialize}
        )

    def __getitem__(self, grid):
        return self._launch

    def _launch(self, *args, **kwargs):
        kwargs = dict(zip(self.parameters, args, strict=False)) | kwargs
        described = {
            name: _describe(
                kwargs.pop(name), "constexpr" in str(parameter.annotation), name in self.plain
            )
            for name, parameter in self.parameters.items()
        }
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        self.log.append(
            Request(
                self.module.__name__, self.name, 90, described, kwargs.pop("num_warps", 4), kwargs
            )
        )


@contextlib.contextmanager
def record_launches(*modules):
    """Every ``*_kernel`` of the modules notes its launch in the list this yields, and does not run.

    Call launchers with tensors of any device, "meta" included (aligned, and of any size).
    """
    log, kernels = [], [(m, name) for m in modules for name in vars(m) if name.endswith("_kernel")]
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
    signature, constants, attrs = {}, {}, {}
    for i, (name, value) in enumerate(request["args"].items()):
        if not isinstance(value, str):
            signature[name], constants[(i,)] = "constexpr", value
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


def _main() -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    rows = []
    for request in json.load(sys.stdin):
        options = {"num_warps": request["num_warps"], **request["options"]}
        compiled = triton.compile(
            _source(request), target=GPUTarget("cuda", request["arch"], 32), options=options
        )
        row = _measure(compiled.asm["cubin"], compiled.asm["ptx"])
        # dynamic shared memory is asked for at launch and is not in the cubin's table
        rows.append(row | {"shared": max(row["shared"], compiled.metadata.shared)})
    print(json.dumps(rows))


if __name__ == "__main__":
    _main()
