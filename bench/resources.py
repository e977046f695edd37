"""What the compilers make of every Triton kernel, without a GPU: a gate against regressions that no value shows.

    python -m bench.resources            compile every launch for four GPUs, compare with bench/baselines/resources.json; exit 1
    python -m bench.resources --update   rewrite the baseline of this version of Triton: one line a launch, to be reviewed

The launches are those that the public ops make at the shapes of four models (workloads.py), recorded where they would be run, with
the specialization a GPU's driver would see: nobody lists signatures, and a kernel that no launch reached fails by its name.
Each is compiled ahead of time and disassembled. A launch fails

    that spills registers, or has no 128-bit access to memory, and is not listed in ALLOWED with a reason;
    that uses more shared memory than a program may have;
    whose share of 128-bit accesses, or kind of matrix instruction, is below the baseline's (that of its kernel's worst launch, when
    it is a new one); that the baseline does not know.

Figures differ between versions of Triton; for one without a baseline only the first two rules hold, and the gate says so.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from hyperllama import kernels
from hyperllama.errors import HyperLlamaError
from hyperllama.files import write_text
from hyperllama.kernels.backend import GPUS

from . import workloads
from .fake_gpu import Launch, fake_gpu

BASELINES = Path(__file__).parent / "baselines" / "resources.json"
TARGETS = {
    name: GPUTarget("cuda", gpu.capability, gpu.warp) if gpu.capability else GPUTarget("hip", name, gpu.warp)
    for name, gpu in GPUS.items()
}
MATRIX = ("", "mma", "mfma", "wgmma", "tcgen05")  # slower to faster on the GPUs that have them
SLACK = 0.1  # of the share of 128-bit accesses: one narrow access more among ten is no lost vectorization


@dataclass(frozen=True)
class Allowed:
    """A launch that may spill or have no 128-bit access, and why. The kernel is that of `Build.kernel`, a target or all."""

    kernel: str
    rule: str  # spills, narrow
    reason: str
    target: str | None = None
    triton: str | None = None  # version; None: all


ALLOWED: tuple[Allowed, ...] = (
    *(
        Allowed(
            "rms_norm._backward_kernel",
            "spills",
            "two registers: this version's assembler settles for 128 of the 168 that three programs leave; 3.9's takes 155 to 168",
            target=target,
            triton="3.6.0",
        )
        for target in ("sm_80", "sm_100")
    ),
    Allowed(
        "merge_triton._l1_kernel",
        "spills",
        "two registers, five fp32 models under random masks: the assembler settles for 72; nothing else of merges spills",
        target="sm_80",
        triton="3.9.0",
    ),
    Allowed(
        "attention_triton._dkv_kernel",
        "spills",
        "32 bytes, in fp32 alone, which is for tests and small models: all 256 registers, 240 in 3.9",
        target="gfx942",
        triton="3.6.0",
    ),
    Allowed(
        "linear_cross_entropy_epilogue._product_kernel",
        "spills",
        "48 bytes, of a tile whose sums are half of all 255 registers, which 3.9 fits; by request only, and not yet measured",
        target="sm_90",
        triton="3.6.0",
    ),
    Allowed(
        "embedding._join_kernel",
        "narrow",
        "eight pieces of 64 columns are two fp32 a thread of its 256; it reads what ids that come again leave, little",
        target="gfx942",
    ),
)


@dataclass(frozen=True, eq=False)  # hashed by identity: its dicts have no hash
class Build:
    """One launch, specialized for one target: all that compiling needs, and what it is called in the baseline."""

    module: str
    function: str
    target: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    name: str

    @property
    def kernel(self) -> str:
        """`rms_norm._forward_kernel`."""
        return f"{self.module.rpartition('.')[2]}.{self.function}"


@dataclass(frozen=True)
class Figures:
    """What a compiler made of a launch. Accesses are instructions that read or write global memory."""

    registers: int  # per thread
    spilled: int  # bytes per thread
    shared: int  # bytes per program
    accesses: int
    wide: int  # of them, those of 128 bits or more a thread
    widest: int  # bits
    matrix: str  # kind of matrix instruction


def specialized(launch: Launch, target: str) -> Build:
    """A launch as Triton's launcher specializes it for a target: types, what divides by 16, what is 1."""
    kernel, backend = launch.kernel, make_backend(TARGETS[target])
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, kinds, rest = binder(*launch.arguments, **launch.options)
    _, signature, constants, attributes = kernel._pack_args(backend, dict(launch.options), bound, kinds, rest)
    values = {name: value for name, value in bound.items() if signature[name] == "constexpr"}
    chosen = {name: value for name, value in launch.options.items() if name not in signature}
    shown = [f"{kind}:{more}" if more else kind for kind, more in kinds if kind != "constexpr"]
    runs = [(kind, len(list(group))) for kind, group in groupby(shown)]
    types = ", ".join(f"{count} {kind}" if count > 1 else kind for kind, count in runs)
    settings = " ".join(f"{name}={value}" for name, value in (values | chosen).items())
    return Build(
        kernel.__module__, kernel.__name__, target, signature, constants, attributes, chosen,
        f"{target} {launch.name}({types}) {settings}",
    )  # fmt: skip


def recorded(target: str) -> list[Build]:
    """Every launch of the workloads on a target, each once."""
    with fake_gpu(GPUS[target]) as trace:
        workloads.everything()
    builds = (specialized(launch, target) for launch in trace.launches)
    return list({build.name: build for build in builds}.values())


def assembled(build: Build) -> Any:
    """Triton's compiled kernel of a launch."""
    kernel = getattr(importlib.import_module(build.module), build.function)
    source = ASTSource(kernel, build.signature, build.constants, build.attributes)
    return triton.compile(source, target=TARGETS[build.target], options=build.options)


def compiled(build: Build) -> Figures | str:
    """Compile a launch ahead of time and read its figures; the compiler's complaint when it can't."""
    try:
        result = assembled(build)
    except Exception as error:  # a kernel that does not compile is what the gate is there to name
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
    if "cubin" in result.asm:
        return _nvidia(result.asm["cubin"], result.metadata.shared)
    return _amd(result.asm["amdgcn"], result.metadata.shared)


def _nvidia(cubin: bytes, shared: int) -> Figures:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    operations = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE)
    widths = [_sass_bits(name) for name in operations if re.match(r"LDG\.|STG\.|LDGSTS\.|UTMALDG|UTMASTG|UBLKCP", name)]
    kinds = {"tcgen05": r"UTC\w*MMA", "wgmma": r"[HQI]GMMA", "mma": r"[HQI]MMA|[DB]MMA"}
    return _figures(
        found["REG"], found["STACK"] + found["LOCAL"], shared, widths,
        next((kind for kind, names in kinds.items() if any(re.match(names, name) for name in operations)), ""),
    )  # fmt: skip


def _sass_bits(operation: str) -> int:
    """128 for LDG.E.128 and for what moves whole tiles; 32 for LDG.E."""
    words = operation.split(".")
    if words[0].startswith(("UTMA", "UBLKCP")):
        return 128
    return next((int(word.lstrip("US")) for word in words if word in SASS_WIDTHS), 32)


SASS_WIDTHS = ("U8", "S8", "U16", "S16", "64", "128", "256")


def _amd(code: str, shared: int) -> Figures:
    def number(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", code)[-1])

    widths = re.findall(r"^\s+(?:global|buffer)_(?:load|store)_(?:lds_)?(\w+)", code, re.MULTILINE)
    bits = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128, "b32": 32, "b64": 64, "b128": 128}
    return _figures(
        number("vgpr_count"), number("private_segment_fixed_size"), shared,
        [bits.get(width, 8 if "byte" in width else 16) for width in widths],
        "mfma" if re.search(r"^\s+v_s?mfma", code, re.MULTILINE) else "",
    )  # fmt: skip


def _figures(registers: int, spilled: int, shared: int, widths: list[int], matrix: str) -> Figures:
    wide = sum(width >= 128 for width in widths)
    return Figures(registers, spilled, shared, len(widths), wide, max(widths, default=0), matrix)


def _tool(name: str, *arguments: str) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def judged(build: Build, found: Figures | str, baseline: Mapping[str, Figures] | None) -> list[str]:
    """What is wrong with a launch, a sentence each; `baseline` is that of this version of Triton."""
    if isinstance(found, str):
        return [f"{build.name}: does not compile: {found}"]
    limit, wrong = GPUS[build.target].shared_bytes, []
    if found.spilled and not allowed(build, "spills"):
        wrong.append(f"spills {found.spilled} bytes a thread ({found.registers} registers), 0 were expected")
    if found.shared > limit:
        wrong.append(f"uses {found.shared} bytes of shared memory, the device has {limit}")
    if not found.wide and not allowed(build, "narrow"):
        wrong.append(f"its widest access is of {found.widest} bits, 128 were expected ({found.accesses} accesses)")
    if baseline is not None:
        before = baseline.get(build.name)
        if before is None:
            wrong.append("is not in the baseline; see what is new and run python -m bench.resources --update")
        prefix = f"{build.target} {build.kernel}("
        known = [before] if before else [figures for name, figures in baseline.items() if name.startswith(prefix)]
        share, least = _share(found), min(map(_share, known), default=0.0)
        if share < least - SLACK:
            wrong.append(f"{share:.0%} of its accesses are of 128 bits, {least:.0%} were in the baseline")
        kind = min((figures.matrix for figures in known), key=MATRIX.index, default="")
        if MATRIX.index(found.matrix) < MATRIX.index(kind):
            wrong.append(f"its products are {found.matrix or 'no matrix instructions'}, {kind} in the baseline")
    return [f"{build.name}: {sentence}" for sentence in wrong]


def _share(figures: Figures) -> float:
    return figures.wide / max(1, figures.accesses)


def allowed(build: Build, rule: str) -> bool:
    """Whether an exception is listed."""
    return any(
        (a.kernel, a.rule) == (build.kernel, rule)
        and a.target in (None, build.target)
        and a.triton in (None, triton.__version__)
        for a in ALLOWED
    )


def unreached(builds: Iterable[Build]) -> list[str]:
    """Kernels of hyperllama.kernels that no launch reached, neither directly nor as a function of one that was."""
    everything = {}
    for found in pkgutil.iter_modules(kernels.__path__, kernels.__name__ + "."):
        for name, value in vars(importlib.import_module(found.name)).items():
            if isinstance(value, JITFunction) and value.__module__ == found.name:
                everything[(found.name, name)] = value
    reached = {(build.module, build.function) for build in builds}
    stack = list(reached)
    while stack:
        function: Any = everything.get(stack.pop())
        for name in function.fn.__code__.co_names if function else ():
            callee = function.fn.__globals__.get(name)
            key = (callee.__module__, callee.__name__) if isinstance(callee, JITFunction) else None
            if key and key not in reached:
                reached.add(key)
                stack.append(key)
    return [f"{module.rpartition('.')[2]}.{name}" for module, name in sorted(set(everything) - reached)]


def measure(targets: Iterable[str], jobs: int | None = None) -> dict[Build, Figures | str]:
    """Every launch on the given targets with its figures, in the order of names; on `jobs` processes."""
    with pool(jobs) as workers:
        builds = [build for found in workers.map(recorded, targets) for build in found]
        builds.sort(key=lambda build: build.name)
        return dict(zip(builds, workers.map(compiled, builds), strict=True))


def pool(jobs: int | None = None) -> ProcessPoolExecutor:
    """Processes that compile reproducibly; by default as many as there are CPUs for us."""
    jobs = jobs or len(os.sched_getaffinity(0))
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_settings)


def _settings() -> None:
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # a kernel's path would be in its code
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # said, because Triton's own default is about to change


def read_baseline(path: Path = BASELINES) -> dict[str, dict[str, Figures]]:
    """Figures by version of Triton and name of launch."""
    if not path.exists():
        return {}
    versions = json.loads(path.read_text(encoding="utf-8"))
    return {
        version: {name: Figures(**figures) for name, figures in launches.items()}
        for version, launches in versions.items()
    }


def write_baseline(versions: Mapping[str, Mapping[str, Figures]], path: Path = BASELINES) -> None:
    """Write the baseline, sorted, one line a launch, so that a diff can be read."""
    parts = []
    for version in sorted(versions):
        launches = sorted(versions[version].items())
        lines = [f"  {json.dumps(name)}: {json.dumps(asdict(figures))}" for name, figures in launches]
        parts.append(f" {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n }")
    path.parent.mkdir(exist_ok=True)
    write_text(path, "{\n" + ",\n".join(parts) + "\n}\n")


def check(measured: Mapping[Build, Figures | str], baseline: Mapping[str, Figures] | None) -> list[str]:
    """All that is wrong, a sentence each."""
    wrong = [sentence for build, found in measured.items() for sentence in judged(build, found, baseline)]
    wrong += [f"{name}: no workload launches it; add one to bench/workloads.py" for name in unreached(measured)]
    targets = {build.target for build in measured}
    gone = set(baseline or ()) - {build.name for build in measured}
    wrong += [f"{name}: is only in the baseline" for name in sorted(gone) if name.partition(" ")[0] in targets]
    return wrong


def main() -> None:
    """Run the gate."""
    parser = argparse.ArgumentParser(
        description="Compile every Triton kernel ahead of time and compare what comes out."
    )
    parser.add_argument("--check", action="store_true", help="compare with the baseline (the default)")
    parser.add_argument("--update", action="store_true", help="rewrite the baseline of this version of Triton")
    parser.add_argument("--json", type=Path, help="also write the figures to a file")
    parser.add_argument("--targets", default=",".join(TARGETS), help="some of %(default)s")
    parser.add_argument("--jobs", type=int, help="processes; default: one a CPU")
    arguments = parser.parse_args()
    targets = arguments.targets.split(",")
    if unknown := sorted(set(targets) - set(TARGETS)):
        raise HyperLlamaError(f"--targets: {', '.join(unknown)}; some of {', '.join(TARGETS)} were expected")
    if arguments.update and set(targets) != set(TARGETS):
        raise HyperLlamaError("--update takes no --targets: a baseline has them all")

    measured = measure(targets, arguments.jobs)
    figures = {build.name: found for build, found in measured.items() if isinstance(found, Figures)}
    for name, found in figures.items():
        print(
            f"{name}: {found.registers} registers, {found.shared} B shared, {found.wide}/{found.accesses} wide {found.matrix}"
        )
    if arguments.json:
        write_baseline({triton.__version__: figures}, arguments.json)
    versions = read_baseline()
    if arguments.update:
        versions[triton.__version__] = figures
        write_baseline(versions)
    baseline = versions.get(triton.__version__)
    wrong = check(measured, baseline)
    if baseline is None:
        known = ", ".join(versions) or "none"
        print(
            f"no baseline for Triton {triton.__version__} (there is: {known}): only spills, widths and limits were checked"
        )
    print("\n".join(wrong), file=sys.stderr)
    print(f"{len(measured)} launches of Triton {triton.__version__} on {', '.join(targets)}: {len(wrong)} faults")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    try:
        main()
    except HyperLlamaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
