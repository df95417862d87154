"""What the compiler made of the CUDA kernels: registers, spills and instructions of every instance.

    python bench/kernel_table.py [MODULE] writes bench/results/cuda_kernels.json and prints a table

Reads the machine code inside clipvip/_C*.so; no GPU is needed, but NVIDIA's cuobjdump and nvdisasm
are (`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`).
"""

import collections
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

REGISTERS = 65536  # of a multiprocessor
INSTRUCTIONS = {
    "mma": r"HMMA\.",
    "ldmatrix": r"LDSM\.",
    "cp_async": r"LDGSTS\.",
    "exp2": r"MUFU\.EX2",
    "local_memory": r"(LDL|STL)\b",
}


def cuobjdump() -> Path | None:
    """The program inside its wheel, or None where that or nvdisasm's is not installed."""
    package = importlib.util.find_spec("nvidia")
    for root in package.submodule_search_locations or () if package else ():
        for program in Path(root).glob("*/bin/cuobjdump"):
            if program.with_name("nvdisasm").exists():
                return program
    return None


def read(module: Path) -> list[dict]:
    """A dict for each kernel and architecture in a compiled module.

    kernel, arch, registers (of a thread), threads (of a block at most), stack (bytes, what is
    spilled included), blocks (that the registers of a multiprocessor hold, 0 without a bound on
    threads), and how many instructions there are of each kind in INSTRUCTIONS.
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
            warps = threads // 32
            each = warps * 32 * -(-row["registers"] // 8) * 8
            most = 48 if arch[:2] in ("86", "87", "89", "12") else 64  # warps of a multiprocessor
            row["blocks"] = min(REGISTERS // each, most // warps) if warps else 0
    names = _demangled({kernel for _, kernel in rows})
    return [
        {"kernel": names[kernel], "arch": arch, **row}
        for (arch, kernel), row in sorted(rows.items(), key=lambda x: (names[x[0][1]], x[0][0]))
    ]


def _sections(module: Path, option: str, heading: str):
    """(architecture, mangled kernel, text) of a listing, heading after heading."""
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
    """Mangled → as in the source, without namespaces and parameters."""
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
    """Markdown, a line a kernel: figures of the architectures side by side where they differ."""
    archs = list(dict.fromkeys(row["arch"] for row in rows))
    lines = [
        f"Registers a thread and blocks a multiprocessor that they allow, on {', '.join(archs)}.",
        "",
        "| kernel | threads | registers | blocks | stack | mma | ldmatrix | cp.async | local |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    kernels = collections.defaultdict(list)
    for row in rows:
        kernels[row["kernel"]].append(row)
    for kernel, each in kernels.items():
        cells = [
            " / ".join(map(str, dict.fromkeys(row[column] for row in each)))
            if column != "registers"
            else " / ".join(str(row[column]) for row in each)
            for column in ("threads", "registers", "blocks", "stack")
            + ("mma", "ldmatrix", "cp_async", "local_memory")
        ]
        lines.append(f"| `{kernel}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    if cuobjdump() is None:
        sys.exit("kernel_table: `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm` first")
    if len(sys.argv) > 1:
        module = Path(sys.argv[1])
    else:
        from clipvip import _C

        module = Path(_C.__file__)
    rows = read(module)
    if not rows:
        sys.exit(f"kernel_table: {module} holds no CUDA kernels; build it where nvcc is found")
    from harness import BENCH, write  # beside this file

    print(table(rows))
    path = BENCH / "results" / "cuda_kernels.json"
    print(f"\n{write(path, {'nvcc': _nvcc(), 'kernels': rows})}")


def _nvcc() -> str:
    from clipvip import _C

    return _C.build_info().get("nvcc", "")


if __name__ == "__main__":
    main()
