"""Builds pyvit's compiled parts.

Three kinds of files come out of csrc/:

* ``pyvit/_cpu_<isa>.so``: the CPU kernels and their registration with torch, compiled once per
  instruction set against LibTorch's stable ABI, so that one build runs on torch 2.11 and later.
  ``pyvit/_native.py`` loads the best one that the machine can run.
* ``pyvit/_cuda.so``: the CUDA C++ kernels, where torch has CUDA and nvcc is found.
* ``pyvit/_C``: a pybind11 module without torch: build information and CPU features.

Environment: ``CXX`` names the compiler, ``MAX_JOBS`` limits parallel compilations,
``PYVIT_SANITIZE=1`` builds with AddressSanitizer and UndefinedBehaviorSanitizer. ``FORCE_CUDA=1``
builds the CUDA kernels whatever torch has, ``FORCE_CUDA=0`` never; ``CUDA_HOME`` is where nvcc is;
``TORCH_CUDA_ARCH_LIST`` names the GPUs to build for ("8.0;9.0a"), else the present one's alone.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_MINIMUM = (2, 11)
TORCH_TARGET_VERSION = "0x020b000000000000"

INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        *("-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
    ],
}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
BUILT_SETS = list(INSTRUCTION_SETS) if IS_X86 else ["baseline"]


# GPUs to build for where none is present and none is named; later ones compile the PTX anew.
CUDA_ARCHITECTURES = ["8.0+PTX", "9.0a"]
CUDA_OLDEST = (8, 0)  # asynchronous copies, and products of bfloat16
NVCC_MINIMUM = (12, 0)
COMPILER_LAUNCHERS = ("ccache", "sccache", "distcc")


def stop(problem: str, remedy: str) -> None:
    sys.exit(f"\npyvit cannot be built: {problem}\n  To mend it: {remedy}\n")


def find_compiler() -> str:
    named = os.environ.get("CXX")
    for candidate in [named] if named else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(candidate)[0]):
            return candidate
    stop(
        f"no C++ compiler ({'CXX=' + named if named else 'c++, g++ or clang++'}) was found",
        "apt-get install g++   (Debian, Ubuntu), or set CXX to the compiler's path",
    )


def find_torch():
    try:
        import torch
    except ImportError:
        stop(
            "torch is not installed in the environment that builds",
            "pip install 'torch>=2.11', then pip install --no-build-isolation .",
        )
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < TORCH_MINIMUM:
        stop(
            f"torch {torch.__version__} is too old; 2.11 or later has the ABI that pyvit uses",
            "pip install --upgrade 'torch>=2.11'",
        )
    return torch


def python_include() -> str:
    include = sysconfig.get_paths()["include"]
    if not (Path(include) / "Python.h").exists():
        stop(f"Python.h is not in {include}", "apt-get install python3-dev   (Debian, Ubuntu)")
    return include


def pybind11_include() -> str:
    try:
        import pybind11
    except ImportError:
        stop("pybind11 is not installed", "pip install pybind11")
    return pybind11.get_include()


def ninja_program() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        program = shutil.which("ninja")
        if program is None:
            stop("ninja is not installed", "pip install ninja")
        return program


def find_cuda_home() -> Path | None:
    """The folder that has bin/nvcc."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    candidates = [Path(named)] if named else []
    candidates += [Path(on_path).resolve().parents[1]] if on_path else []
    candidates += [Path("/usr/local/cuda")]
    return next((folder for folder in candidates if (folder / "bin/nvcc").exists()), None)


def cuda_home() -> Path | None:
    """Where CUDA is, if its kernels are to be built."""
    forced = os.environ.get("FORCE_CUDA")
    if forced == "0":
        return None
    home = find_cuda_home()
    if forced != "1" and (home is None or find_torch().version.cuda is None):
        return None
    if home is None:
        stop(
            "FORCE_CUDA=1 asks for the CUDA kernels, and nvcc was not found",
            "set CUDA_HOME to the folder that has bin/nvcc, or put nvcc on the path",
        )
    problem = cuda_problem(home)
    if problem and forced == "1":
        stop(
            f"FORCE_CUDA=1 asks for the CUDA kernels, but {problem}",
            "set CUDA_HOME to another CUDA, and TORCH_CUDA_ARCH_LIST to the GPUs it is for "
            '("8.0;9.0a")',
        )
    if problem:  # an installation for the CPU, and for Triton, need not fail
        print(f"pyvit: the CUDA C++ kernels are left out: {problem}", file=sys.stderr)
    return None if problem else home


def cuda_problem(home: Path) -> str:
    """Why nvcc cannot build for the GPUs that are wanted; "" where it can."""
    printed = nvcc_says(home, "--version")
    release = re.search(r"release (\d+)\.(\d+)", printed)
    if release is None:
        return f"{home}/bin/nvcc tells no version: {printed.strip()[-200:]}"
    name = f"nvcc {release[0].split()[1]} in {home}"
    if (int(release[1]), int(release[2])) < NVCC_MINIMUM:
        return f"{name} is older than {NVCC_MINIMUM[0]}.{NVCC_MINIMUM[1]}"
    wanted = cuda_architectures()
    if not wanted:
        return "no GPU here, or in TORCH_CUDA_ARCH_LIST, has compute capability 8.0 or later"
    known = nvcc_says(home, "--list-gpu-code").split()
    unknown = [one for one in wanted if f"sm_{digits(one).rstrip('af')}" not in known]
    return f"{name} does not know compute capability {', '.join(unknown)}" if unknown else ""


def nvcc_says(home: Path, option: str) -> str:
    run = subprocess.run([home / "bin/nvcc", option], capture_output=True, text=True)
    return run.stdout + run.stderr


def cuda_architectures() -> list[str]:
    """As "8.0" or "9.0a", from TORCH_CUDA_ARCH_LIST or the GPUs that are here."""
    if named := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return [one for one in named.replace(";", " ").split() if capability(one) >= CUDA_OLDEST]
    torch = find_torch()
    if not torch.cuda.is_available():
        return CUDA_ARCHITECTURES
    here = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [
        f"{major}.{minor}{'a' if major == 9 else ''}"
        for major, minor in sorted(here)
        if (major, minor) >= CUDA_OLDEST
    ]


def capability(architecture: str) -> tuple[int, int]:
    """(9, 0) of "9.0a+PTX"."""
    parts = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", architecture)
    if parts is None:
        stop(
            f"TORCH_CUDA_ARCH_LIST has {architecture!r}, which is no compute capability",
            'write for example TORCH_CUDA_ARCH_LIST="8.0;9.0a"',
        )
    return int(parts[1]), int(parts[2])


def digits(architecture: str) -> str:
    """ "90a" of "9.0a+PTX"."""
    return architecture.removesuffix("+PTX").replace(".", "")


def code_flags(architectures: list[str]) -> list[str]:
    """nvcc's options for machine code; "+PTX" adds what later GPUs can compile."""
    flags = []
    for architecture in architectures:
        version = digits(architecture)
        flags.append(f"-gencode=arch=compute_{version},code=sm_{version}")
        if architecture.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{version},code=compute_{version}")
    return flags


def host_compiler(cxx: str) -> str:
    """The program that nvcc calls: it takes a name alone."""
    words = shlex.split(cxx)
    return next((w for w in words if Path(w).name not in COMPILER_LAUNCHERS), cxx)


class NinjaBuild(build_ext):
    """Writes one build.ninja for all libraries and runs it: parallel, and incremental."""

    def get_ext_filename(self, fullname: str) -> str:
        # Kernel libraries are no Python modules: torch loads them, for any Python version.
        if fullname.split(".")[-1].startswith(("_cpu_", "_cuda")):
            return fullname.replace(".", os.sep) + ".so"
        return super().get_ext_filename(fullname)

    def run(self) -> None:
        self.torch = find_torch()
        self.cxx = find_compiler()
        self.build_directory = ROOT / "build" / ("sanitize" if sanitize() else "native")
        self.build_directory.mkdir(parents=True, exist_ok=True)
        super().run()

    def build_extensions(self) -> None:
        if CUDA_HOME is None:  # what an earlier build left is not what was asked for
            Path(self.get_ext_fullpath("pyvit._cuda")).unlink(missing_ok=True)
        lines = self.rules()
        for extension in self.extensions:
            lines += self.edges(extension)
        (self.build_directory / "build.ninja").write_text("\n".join(lines) + "\n")
        command = [ninja_program(), "-C", str(self.build_directory)]
        if jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", jobs]
        if subprocess.run(command).returncode != 0:
            stop(
                "a compilation failed (the compiler's message is above)",
                "use g++ 11 or later, or clang++ 14 or later (set CXX), and a torch >= 2.11 "
                "whose headers are complete (pip install --force-reinstall torch); FORCE_CUDA=0 "
                "leaves out what nvcc compiles",
            )

    def rules(self) -> list[str]:
        flags = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
        # Products and sums fuse where simd::fma says so and nowhere else: see csrc/cpu/simd.h.
        flags += ["-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-psabi"]
        # gcc 12 warns inside its own intrinsics.
        flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
        link = []
        if sanitize():
            flags += ["-g", "-O1", "-fno-omit-frame-pointer"]
            flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
            link += ["-fsanitize=address,undefined"]
        torch_root = Path(self.torch.__file__).parent
        includes = [torch_root / "include", torch_root / "include/torch/csrc/api/include"]
        torch_flags = [f"-isystem {i}" for i in includes]
        torch_flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", f"-I{ROOT / 'csrc'}"]
        python_flags = [f"-isystem {python_include()}", f"-isystem {pybind11_include()}"]
        sets = ",".join(BUILT_SETS)
        python_flags += [
            f'-DPYVIT_BUILT_SETS=\\"{sets}\\"',
            f'-DPYVIT_TORCH_VERSION=\\"{self.torch.__version__}\\"',
            f"-DPYVIT_SANITIZED={int(sanitize())}",
        ]
        torch_link = f"-L{torch_root / 'lib'} -ltorch_cpu"
        return [
            *self.cuda_rules(torch_link),
            f"cxx = {self.cxx}",
            f"flags = {' '.join(flags)}",
            f"torch_flags = {' '.join(torch_flags)}",
            f"python_flags = {' '.join(python_flags)}",
            f"torch_link = {torch_link}",
            "rule compile",
            "  command = $cxx -MMD -MF $out.d $flags $extra -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = $cxx -shared {' '.join(link)} $in -o $out $extra",
        ]

    def cuda_rules(self, torch_link: str) -> list[str]:
        home = CUDA_HOME
        if home is None:
            return []
        # As on the CPU, products and sums fuse where fmaf says so; hidden symbols, as there.
        flags = ["-std=c++17", "-O3", "--fmad=false", "-lineinfo", f"-I{ROOT / 'csrc'}"]
        flags += ["-Xcompiler=-fPIC,-fvisibility=hidden", f"-ccbin {host_compiler(self.cxx)}"]
        flags += code_flags(cuda_architectures())
        folders = [home / "lib64", home / "lib", home / "targets/x86_64-linux/lib"]
        link = [torch_link, *(f"-L{folder}" for folder in folders if folder.exists())]
        if self.torch.version.cuda is None:
            link.append(f"-L{self.empty_torch_cuda()}")
        link.append("-Wl,--no-as-needed -ltorch_cuda -Wl,--as-needed")
        link.append("-lcudart_static -ldl -lrt -lpthread")
        return [
            "rule nvcc",
            f"  command = {home / 'bin/nvcc'} -MD -MF $out.d {' '.join(flags)} -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            f"cuda_link = {' '.join(link)}",
        ]

    def empty_torch_cuda(self) -> Path:
        """The folder of a library without functions that has the name of torch's for CUDA.

        What is built where torch has no CUDA names it, and runs where torch has.
        """
        folder = self.build_directory / "torch_cuda"
        folder.mkdir(exist_ok=True)
        name = "libtorch_cuda.so"
        command = [*shlex.split(self.cxx), "-shared", f"-Wl,-soname,{name}", "-x", "c", os.devnull]
        subprocess.run([*command, "-o", str(folder / name)], check=True)
        return folder

    def edges(self, extension: Extension) -> list[str]:
        isa = extension.name.rpartition("_cpu_")[2] if "_cpu_" in extension.name else None
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        lines, objects = [], []
        for source in map(Path, extension.sources):
            for_isa = isa is not None and source.parent.name == "cpu"
            folder = isa if for_isa else "cuda" if source.parent.name == "cuda" else "common"
            compiled = self.build_directory / folder / f"{source.name}.o"
            if source.suffix == ".cu":
                objects.append(str(compiled))
                lines += [f"build {compiled}: nvcc {ROOT / source}"]
                continue
            if extension.name == "pyvit._C":
                extra = "$python_flags"
            else:
                extra = "$torch_flags " + (" ".join(INSTRUCTION_SETS[isa]) if for_isa else "")
            objects.append(str(compiled))
            if compiled not in self.declared:
                self.declared.add(compiled)
                lines += [f"build {compiled}: compile {ROOT / source}", f"  extra = {extra}"]
        lines += [f"build {target}: link {' '.join(objects)}"]
        link = "$torch_link" if isa else "$cuda_link" if extension.name == "pyvit._cuda" else ""
        lines += [f"  extra = {link}"]
        return lines

    def initialize_options(self) -> None:
        super().initialize_options()
        self.declared: set[Path] = set()


def sanitize() -> bool:
    return os.environ.get("PYVIT_SANITIZE") == "1"


def sources(folder: str, *, pattern: str = "*.cpp", without: tuple[str, ...] = ()) -> list[str]:
    found = sorted((ROOT / "csrc" / folder).glob(pattern))
    return [str(f.relative_to(ROOT)) for f in found if f.name not in without]


python_module = "python_module.cpp"
CUDA_HOME = cuda_home()
cuda_sources = sources("cuda", pattern="*.cu") + sources("bindings/cuda")
kernel_sources = sources("cpu") + sources("bindings", without=(python_module,))
setup(
    ext_modules=[
        Extension("pyvit._C", [f"csrc/bindings/{python_module}"]),
        *(Extension(f"pyvit._cpu_{isa}", kernel_sources) for isa in BUILT_SETS),
        *([Extension("pyvit._cuda", cuda_sources)] if CUDA_HOME else []),
    ],
    cmdclass={"build_ext": NinjaBuild},
)
