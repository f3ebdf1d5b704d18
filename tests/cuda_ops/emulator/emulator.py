"""CUDA kernels on a CPU: the sources of cuda_ops/csrc/cuda, host code included, compiled by g++, run thread by thread.

For small cases. cuda_runtime.h, machine.cpp, memory.cpp and torch_host.cpp beside this file say what is emulated, and
which faults are found. Not seen: the GPU's own arithmetic (expf, log2f), streams and their races, speed; a thread's own
variables and its stack, of 128 KiB; memcpy and memset within a kernel; host code that reads or writes device memory;
writes to an input, reads of a freed tensor or of a static array of the host; two barriers in one line that threads of a
block part at. Some of these end the process.
"""

import ctypes
import hashlib
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
CSRC = REPOSITORY / "cuda_ops" / "csrc"
BUILD = REPOSITORY / "build" / "cuda_emulator"
NAMESPACE = "cuda_ops_emulated"
FLAGS = ["-std=c++20", "-fPIC", "-g1", "-w", "-fvisibility=hidden", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]
MACROS = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA", "-DEMULATED_ARCH=900"]
KERNEL_FLAGS = ["-O1", "-fsanitize=thread,alignment", "--param=tsan-instrument-func-entry-exit=0"]
EMULATOR_FLAGS = ["-O2", "-fno-tree-loop-distribute-patterns"]
WRAPPED = (  # calls of libtorch's C interface that torch_host.cpp answers; failed assertions, which machine.cpp reports
    "__assert_fail", "aoti_torch_aten_fill__Scalar",
    "torch_get_const_data_ptr", "torch_get_mutable_data_ptr", "aoti_torch_get_data_ptr", "torch_call_dispatcher",
    "aoti_torch_create_device_guard", "aoti_torch_delete_device_guard", "aoti_torch_get_current_cuda_stream",
    "torch_c10_cuda_check_msg", "torch_c10_cuda_free_error_msg", "aoti_torch_library_init_impl",
    "aoti_torch_library_init_fragment",
)  # fmt: skip
REWRITES = (  # what no header can define; lines keep their numbers
    (r"\b__CUDA_ARCH__\b", "EMULATED_ARCH"),
    (r"^( *)extern __shared__ (?:__align__\(\d+\) )?([\w ]+) (\w+)\[\];",
     r"\1static \2* const \3 = reinterpret_cast<\2*>(emulator::shared_memory);"),
    (r"^( *)__shared__ (.+) (\w+)((?:\[.*\])?);", r"\1auto& \3 = emulator::shared<\2\4, __COUNTER__>();"),
    (r"(__launch_bounds__\(([^()]*)\)\s*\w+\([^(){}]*\)\s*\{)", r"\1 emulator::at_most(\2);"),
    (r"([\w:]+(?:<[^<>;]*>)?)<<<([^;]*?)>>>\(",
     r'emulator::launch("\1", [&](const auto&... args) { \1(args...); }, \2)('),
)  # fmt: skip
PRECOMPILED = "cuda_common.h"  # which each kernel includes, and with it torch; parsed once for all of them
FILLS = (0xFF, 0x00, 0x7F, 0xAA)  # nan, 0, 3e38 and a small negative number in float32


def rewritten(source: str) -> str:
    """CUDA C++ as C++."""
    for pattern, replacement in REWRITES:
        source = re.sub(pattern, replacement, source, flags=re.MULTILINE)
    return source


def build() -> Path:
    """The library of all kernels, from build/cuda_emulator where their sources have not changed.

    Of several processes one builds, while the others wait and then find what it has built.

    Raises:
        RuntimeError: if a source does not compile; the compiler's words say why.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILD / "lock"):
        return _built()


def _built() -> Path:
    headers = [*sorted(CSRC.glob("*.h")), *sorted(HERE.glob("*.h"))]
    kernels = [*sorted(CSRC.glob("cuda/*.cu")), HERE / "mistakes.cu"]
    helpers = [path for path in sorted(CSRC.glob("*.cpp")) if "STABLE_TORCH_LIBRARY" not in path.read_text()]
    parts = [(path, KERNEL_FLAGS) for path in kernels]
    parts += [(path, EMULATOR_FLAGS) for path in (*helpers, *sorted(HERE.glob("*.cpp")))]
    parts.sort(key=lambda part: -part[0].stat().st_size)  # those that take longest first
    texts = {path.name: rewritten(path.read_text()) if path.parent == CSRC else path.read_text() for path in headers}
    folder = BUILD / f"sources-{_digest(*texts.values(), *FLAGS, *MACROS, torch.__version__, str(REWRITES))}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        if not (folder / name).exists():  # to g++ a file of another age is another file than the precompiled one
            _write(folder / name, text)
    _precompile(folder)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda part: _compiled(*part, folder), parts))
    library = BUILD / f"kernels-{_digest(*(path.name for path in objects), *WRAPPED)}.so"
    if not library.exists():
        wraps = [f"-Wl,--wrap={name}" for name in WRAPPED]
        torch_lib = Path(torch.__file__).parent / "lib"
        _run(["g++", "-shared", *objects, *wraps, f"-L{torch_lib}", "-ltorch_cpu", "-ltorch", "-lc10"], library)
    return library


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _compiled(source: Path, flags: list[str], folder: Path) -> Path:
    """The object file of one source, made where it is not there yet; folder holds the headers."""
    text = rewritten(source.read_text()) if source.suffix == ".cu" else source.read_text()
    out = BUILD / f"{source.stem}-{_digest(folder.name, text, *flags)}.o"
    if out.exists():
        return out
    copy = folder / source.name
    _write(copy, text)
    common = ["-include", folder / PRECOMPILED] if source.suffix == ".cu" else []
    _run([*_compiler(flags, folder), *common, "-c", "-x", "c++", copy], out)
    return out


def _precompile(folder: Path) -> None:
    """The headers of torch and CUDA as a kernel sees them: g++ takes this file where it would read PRECOMPILED."""
    out = folder / f"{PRECOMPILED}.gch"
    if not out.exists():
        _run([*_compiler(KERNEL_FLAGS, folder), "-x", "c++-header", folder / PRECOMPILED], out)


def _compiler(flags: list[str], folder: Path) -> list[str]:
    includes = [f"-I{folder}", *(f"-isystem{path}" for path in include_paths())]
    return ["g++", *FLAGS, *MACROS, *flags, *includes]


def _write(path: Path, text: str) -> None:
    """Write a source, whole or not at all: another session may compile it."""
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(text)
    part.replace(path)


def _run(command: list[object], out: Path) -> None:
    """Run a compiler, whose output is there whole or not at all."""
    part = out.with_suffix(f".{os.getpid()}.part")
    done = subprocess.run([*map(str, command), "-o", str(part)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{out.name} cannot be built for the emulator:\n{done.stderr[-4000:]}")
    part.replace(out)


class Emulator:
    """The library of all kernels, loaded: torch.ops.cuda_ops_emulated.<operator> runs them on tensors of the CPU."""

    def __init__(self, library: Path) -> None:
        self.path = library
        self.operators = [
            name
            for path in sorted(CSRC.glob("cuda/*.cu"))
            for name in re.findall(r'm\.impl\("(\w+)"', path.read_text())
        ]
        self._schemas = torch.library.Library(NAMESPACE, "FRAGMENT")
        for name in self.operators:
            schema = str(getattr(torch.ops.cuda_ops, name).default._schema)
            self._schemas.define(schema.removeprefix("cuda_ops::"))
        torch.ops.load_library(library)
        self._library = ctypes.CDLL(str(library))
        self._library.emulator_faults.restype = self._library.emulator_launches.restype = ctypes.c_char_p

    def schedule(self, seed: int) -> None:
        """Choose the order of blocks and threads, the number of blocks that stride, and what new memory holds."""
        draw = random.Random(seed)
        order, max_grid, fill = draw.randrange(3), draw.choice([0, 0, 1, 3]), draw.choice(FILLS)
        self._library.emulator_schedule(order, ctypes.c_uint64(seed), max_grid, fill)

    def launches(self) -> dict[str, int]:
        """How often each kernel was launched since the last call."""
        return {name: int(count) for count, name in self._lines(self._library.emulator_launches())}

    def faults(self) -> list[str]:
        """What kernels did wrong since the last call, with the lines of the sources."""
        found = []
        for count, text in self._lines(self._library.emulator_faults()):
            what, _, address = text.partition(" @")
            found.append(f"{count} × {what}{self._place_of(int(address)) if address else ''}")
        return found

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Within it the operators of cuda_ops compute on tensors of the CPU with their CUDA kernels."""
        library = torch.library.Library("cuda_ops", "IMPL")
        for name in self.operators:
            library.impl(name, getattr(getattr(torch.ops, NAMESPACE), name).default, "CPU", allow_override=True)
        try:
            yield
        finally:
            library._destroy()

    @staticmethod
    def _lines(account: bytes) -> list[tuple[str, str]]:
        return [tuple(line.split(" ", 1)) for line in account.decode().splitlines()]

    def _place_of(self, address: int) -> str:
        """Lines of the kernel and of what calls it there, innermost first."""
        command = ["addr2line", "-i", "-e", str(self.path), hex(address)]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        names = [line.split(" ")[0].rpartition("/")[2] for line in found if f"/{BUILD.name}/" in line]
        return " at " + " < ".join(name for name in names if not name.startswith(("cuda_runtime.h", "memory.")))


def load() -> Emulator:
    """The emulator, built where it is not yet.

    Raises:
        FileNotFoundError: if there is no g++.
    """
    if shutil.which("g++") is None:
        raise FileNotFoundError("the emulator of CUDA needs g++")
    return Emulator(build())
