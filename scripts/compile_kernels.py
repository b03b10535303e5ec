"""Compiles kvrail's CUDA kernels to PTX with NVRTC, and checks it; see scripts/kernels."""

from __future__ import annotations

import argparse
import ctypes
import difflib
import re
import subprocess
import sys
from pathlib import Path

KERNELS = Path(__file__).resolve().parent.parent / "crates/kvrail-cuda/src/kernels"
# The oldest architecture that gets the kernels; drivers compile them for newer ones.
OPTIONS = (b"--gpu-architecture=compute_80", b"--std=c++17")
# Ampere, Ada, Hopper, Blackwell (data centre and workstation).
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


class Nvrtc:
    """The compiler library of a wheel."""

    def __init__(self, folder: Path) -> None:
        """Loads it with the library of built-in functions that it needs beside it."""
        libraries = folder / "nvidia/cuda_nvrtc/lib"
        for builtins in libraries.glob("libnvrtc-builtins.so*"):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(libraries / "libnvrtc.so.12"))

    def compile(self, source: bytes, name: bytes) -> str:
        """Returns the PTX of `source`. Raises RuntimeError with the compiler's messages."""
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), source, name, 0, None, None)
        options = (ctypes.c_char_p * len(OPTIONS))(*OPTIONS)
        status = self._library.nvrtcCompileProgram(program, len(OPTIONS), options)
        if status != 0:
            raise RuntimeError(self._text("nvrtcGetProgramLog", program))
        return self._text("nvrtcGetPTX", program)

    def _text(self, function: str, program: ctypes.c_void_p) -> str:
        size = ctypes.c_size_t()
        self._call(f"{function}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(function, program, buffer)
        return buffer.value.decode()

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status != 0:
            raise RuntimeError(f"{function}: {status}")


def assemble(ptxas: Path, ptx: Path) -> list[str]:
    """Compiles PTX for each architecture; returns what is wrong with it, and prints registers.

    A kernel whose registers do not suffice keeps some of a page in memory, and is slow for it.
    """
    wrong = []
    for architecture in ARCHITECTURES:
        options = ["--verbose", "--gpu-name", architecture, "--output-file", "/dev/null"]
        done = subprocess.run([ptxas, *options, ptx], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            wrong.append(f"{architecture}: {done.stderr.strip()}")
            continue
        kernels = re.findall(
            r"Function properties for (\w+)\n\s*(\d+) bytes stack frame, "
            r"(\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers",
            done.stderr,
        )
        declared = re.findall(r"\.visible \.entry (\w+)\(", ptx.read_text())
        if sorted(name for name, *_ in kernels) != sorted(declared):
            wrong.append(f"{architecture}: kernels {declared}, but ptxas says {done.stderr}")
        wrong += [
            f"{architecture}: {name} has {stack} bytes of stack, {stores} and {loads} of spills"
            for name, stack, stores, loads, _ in kernels
            if (stack, stores, loads) != ("0", "0", "0")
        ]
        registers = ", ".join(f"{name} {count}" for name, *_, count in sorted(kernels))
        print(f"{architecture}: registers: {registers}")
    return wrong


def main() -> int:
    """Writes the PTX, or compares it with what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nvrtc", type=Path, required=True, help="folder of the NVRTC wheel")
    parser.add_argument("--ptxas", type=Path, required=True, help="folder of the nvcc wheel")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    arguments = parser.parse_args()
    source, target = KERNELS / "kvrail.cu", KERNELS / "kvrail.ptx"
    ptx = Nvrtc(arguments.nvrtc).compile(source.read_bytes(), source.name.encode())
    if not arguments.check:
        target.write_text(ptx)
        print(f"wrote {target.name}, {len(ptx.splitlines())} lines")
        return 0
    found = target.read_text()
    if found == ptx:
        print(f"{source.name} and {target.name} belong together")
        wrong = assemble(arguments.ptxas / "nvidia/cuda_nvcc/bin/ptxas", target)
        print("\n".join(wrong), file=sys.stderr)
        return 1 if wrong else 0
    difference = difflib.unified_diff(
        found.splitlines(), ptx.splitlines(), target.name, f"compiled from {source.name}", n=1
    )
    print("\n".join([*list(difference)[:40], "run scripts/kernels"]), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
