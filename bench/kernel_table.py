"""Lists registers, spills and instructions of every compiled CUDA kernel, and how many blocks of
attention fit on a multiprocessor at the models' shapes.

    python bench/kernel_table.py [MODULE] writes bench/results/cuda_kernels.json and prints tables

It reads the machine code inside clipvip/_C*.so. This needs no GPU, but NVIDIA's cuobjdump and
nvdisasm (`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`).
"""

import collections
import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from records import RESULTS, write
from tables import markdown_table

REGISTERS = 65536  # per multiprocessor
# Bytes of shared memory of a multiprocessor. The system takes 1 KiB of it for every block.
SHARED = {"80": 164 * 1024, "90a": 228 * 1024, "100": 228 * 1024, "120": 100 * 1024}
SYSTEM = 1024
PATCHES = {"B/32": 49, "B/16": 196, "L/14": 256, "L/14@336": 576}
INSTRUCTIONS = {
    "mma": r"HMMA\.",
    "ldmatrix": r"LDSM\.",
    "cp_async": r"LDGSTS\.",
    "load_128": r"LDG\.E\.128\b",
    "store_128": r"STG\.E\.128\b",
    "exp2": r"MUFU\.EX2",
    "local_memory": r"(LDL|STL)\b",
}
COLUMNS = ("threads", "registers", "blocks", "stack", "mma", "ldmatrix", "cp_async", "local_memory")


def cuobjdump() -> Path | None:
    """Return the program inside its wheel, or None if that or nvdisasm is not installed."""
    package = importlib.util.find_spec("nvidia")
    for root in package.submodule_search_locations or () if package else ():
        for program in Path(root).glob("*/bin/cuobjdump"):
            if program.with_name("nvdisasm").exists():
                return program
    return None


def read(module: Path) -> list[dict]:
    """Return one dict per kernel and architecture in a compiled module.

    Its keys are kernel, arch, registers (per thread), threads (largest block), stack (bytes, with
    spills), blocks (that fit into the registers of a multiprocessor, 0 without a bound on threads),
    and the number of instructions of each kind in INSTRUCTIONS.
    """
    rows: dict[tuple[str, str], dict] = {}
    for arch, kernel, usage in _sections(module, "--dump-resource-usage", " Function "):
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert found, usage
        registers, stack, local = map(int, found.groups())
        rows[arch, kernel] = {"registers": registers, "stack": stack + local}
    for arch, kernel, code in _sections(module, "-sass", "\t\tFunction : "):
        counts = {name: len(re.findall(what, code)) for name, what in INSTRUCTIONS.items()}
        rows[arch, kernel] |= counts
    for arch, kernel, attributes in _sections(module, "-elf", ".nv.info."):
        bound = re.search(r"EIATTR_MAX_THREADS\n.*\n\s*Value:\s*(0x[0-9a-f]+)", attributes)
        threads = int(bound[1], 16) if bound else 0
        row = rows.get((arch, kernel))
        if row is not None:
            row["threads"] = threads
            row["blocks"] = _blocks(row["registers"], threads // 32, arch)
    names = _demangled({kernel for _, kernel in rows})
    return [
        {"kernel": names[kernel], "arch": arch, **row}
        for (arch, kernel), row in sorted(rows.items(), key=lambda x: (names[x[0][1]], x[0][0]))
    ]


def _blocks(registers: int, warps: int, arch: str) -> int:
    """Return how many blocks fit into a multiprocessor's registers and warp slots."""
    each = warps * 32 * -(-registers // 8) * 8
    most = 48 if arch[:2] in ("86", "87", "89", "12") else 64  # warps of a multiprocessor
    return min(REGISTERS // each, most // warps) if warps else 0


class Plan(NamedTuple):
    """How a block is launched: its warps, whether its rows stay in shared memory, and the bytes of
    shared memory."""

    warps: int
    resident: bool
    shared: int


def plan(direction: str, patches: int, most: int, dim: int = 64, proxies: int = 4) -> Plan:
    """Return the choice of make_plan of csrc/proxy_attention for 16-bit numbers and heads of 64.

    most: largest shared memory of a block in bytes. tests/emulator compares with the launches.
    """
    chunks = -(-(proxies + patches) // 16)
    sweeps, most_warps = (1, 7) if direction == "forward" else (2, 4)

    def shared(warps: int, resident: bool) -> int:
        rows = 16 * chunks if resident else 2 * 64  # otherwise a ring of two tiles
        if direction == "forward":  # keys, values, queries of every warp
            return (2 * rows + 16 * warps) * dim * 2
        own = rows if resident else 16 * warps  # for queries and gradients of outputs
        return (2 * rows + 2 * own) * dim * 2 + 2 * 16 * chunks * 4  # and two statistics of rows

    for resident, blocks in itertools.product((True, False), (2, 1)):
        turns = sweeps * chunks if resident else chunks
        warps = min(chunks, -(-turns // -(-turns // (most_warps * 2 // blocks))))
        chosen = Plan(warps, resident, shared(warps, resident))
        if blocks * (chosen.shared + SYSTEM) <= most + SYSTEM:
            break
    return chosen


def occupancy(rows: list[dict]) -> list[dict]:
    """Return one dict per model, direction and architecture: its plan, and blocks per
    multiprocessor."""
    found = []
    for row in rows:
        kernel = re.search(r"(forward|backward)<bfloat16, 64>", row["kernel"])
        memory = SHARED.get(row["arch"])
        if not kernel or not memory:
            continue
        for model, patches in PATCHES.items():
            chosen = plan(kernel[1], patches, memory - SYSTEM)
            blocks = min(
                _blocks(row["registers"], chosen.warps, row["arch"]),
                memory // (chosen.shared + SYSTEM),
            )
            case = {"model": model, "direction": kernel[1], "arch": row["arch"]}
            found.append(case | chosen._asdict() | {"blocks": blocks})
    return found


def occupancy_table(cases: list[dict]) -> str:
    """Return Markdown with one row per model and direction, and one column per architecture."""
    archs = [f"sm_{arch}" for arch in dict.fromkeys(case["arch"] for case in cases)]
    kernels = collections.defaultdict(list)
    for case in cases:
        where = "resident" if case["resident"] else "ring"
        kernels[f"{case['model']} {case['direction']}"].append(
            f"{case['blocks']} of {case['warps']} warps, {case['shared'] / 1024:.0f} KiB {where}"
        )
    return (
        "Blocks of attention (bf16, heads of 64) per multiprocessor, with warps and shared memory."
        "\n\n" + markdown_table(["kernel", *archs], ([name, *x] for name, x in kernels.items()))
    )


def _sections(module: Path, option: str, heading: str):
    """Yield (architecture, mangled kernel, text) for each section of a listing."""
    program = cuobjdump()
    assert program, "cuobjdump is not installed"
    environment = os.environ | {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    listing = subprocess.run(
        [program, option, module], env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    for part in re.split(r"^arch = sm_", listing, flags=re.M)[1:]:
        arch = part.split("\n", 1)[0].strip()
        for section in re.split(rf"^{re.escape(heading)}", part, flags=re.M)[1:]:
            kernel, text = section.split("\n", 1)
            yield arch, kernel.strip().rstrip(":"), text


def _demangled(names: set[str]) -> dict[str, str]:
    """Return mangled name → name as in the source, without namespaces and parameters."""
    ordered = sorted(names)
    plain = subprocess.run(
        ["c++filt", "-p"], input="\n".join(ordered), stdout=subprocess.PIPE, text=True, check=True
    ).stdout.splitlines()
    short = [
        re.sub(r"\bclipvip::(device::)?|\(anonymous namespace\)::|\(\w+\)(?=\d)|^void ", "", name)
        for name in plain
    ]
    return dict(zip(ordered, short, strict=True))


def table(rows: list[dict]) -> str:
    """Return Markdown with one row per kernel; architectures that differ share a cell."""
    archs = list(dict.fromkeys(row["arch"] for row in rows))
    kernels = collections.defaultdict(list)
    for row in rows:
        kernels[row["kernel"]].append(row)
    lines = []
    for kernel, each in kernels.items():
        cells = {column: [str(row[column]) for row in each] for column in COLUMNS}
        cells |= {x: list(dict.fromkeys(cells[x])) for x in COLUMNS if x != "registers"}
        lines.append([f"`{kernel}`", *map(" / ".join, cells.values())])
    return (
        f"Registers per thread, and blocks per multiprocessor they allow, on {', '.join(archs)}."
        "\n\n" + markdown_table(["kernel", *COLUMNS], lines)
    )


def main() -> None:
    if cuobjdump() is None:
        sys.exit(
            "kernel_table: cuobjdump and nvdisasm are missing; run "
            "`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`"
        )
    if len(sys.argv) > 1:
        module = Path(sys.argv[1])
    else:
        from clipvip import _C

        module = Path(_C.__file__)
    rows = read(module)
    if not rows:
        sys.exit(f"kernel_table: {module} holds no CUDA kernels; build it where nvcc is found")
    blocks = occupancy(rows)
    print(f"{table(rows)}\n\n{occupancy_table(blocks)}")
    path = RESULTS / "cuda_kernels.json"
    write(path, {"nvcc": _nvcc(), "kernels": rows, "occupancy": blocks})
    print(f"\n{path}")


def _nvcc() -> str:
    from clipvip import _C

    return _C.build_info().get("nvcc", "")


if __name__ == "__main__":
    main()
