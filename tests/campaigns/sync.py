"""Whether a step waits for the GPU, asked of torch itself on a GPU that computes nothing: none is needed.

    python -m tests.campaigns.sync                                                            # five minutes
    python -m tests.campaigns.sync python -m fastlora train spam --data sample --device cuda --output runs/hollow

`hollow/hollow_gpu.c` stands in for the CUDA runtime, the driver and cuBLAS, loaded before them: a CUDA build of torch
and the launches of Triton kernels then go through all of their own host code, and every number is garbage. Each step
runs once, then again under torch's sync debug mode "error"; waits that torch does not see (the driver's own, copies of
memory that is not pinned) the stand-in counts. Two steps that do wait come first, to show that they are found. The
second form runs any command on that GPU, to see errors of the host's code. HOLLOW_CAPABILITY=80, 90 (the default),
100, ... is its kind, HOLLOW_MEMORY_GIB its memory (80).
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

import fastlora

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).parent / "hollow" / "hollow_gpu.c"
LIBRARY = "libcuda.so.1"  # what torch and Triton ask for by this name is then the stand-in too
PATHS = ("torch", "hybrid", "onepass", "split")
SIZES = ((64, 96, 128), (33, 53, 41), (4096, 4096, 1024))  # M, N, K: aligned, ragged, large
RANKS = (1, 8, 33, 128)
DTYPES = (
    *((dtype, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
)
LAYOUTS = ("plain", "transposed", "unaligned", "every second", "three dimensions", "one dimension")
CANNOT_RUN = 2


def missing() -> str | None:
    """Why the hollow GPU cannot be built or used here, or None."""
    if not (torch.version.cuda or "").startswith("13."):
        return f"it stands in for CUDA 13, and this torch was built for {torch.version.cuda or 'no CUDA'}"
    return compiler_missing()


def compiler_missing() -> str | None:
    """Why the stand-in cannot be compiled here, or None."""
    if shutil.which("cc") is None:
        return "there is no C compiler, cc"
    try:
        headers()
    except (ImportError, OSError) as error:
        return str(error)
    return None


def headers() -> Path:
    """CUDA 13's, of triton or of what torch came with."""
    import triton

    found = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    for folder in (found, Path(torch.__file__).parents[1] / "nvidia" / "cu13" / "include"):
        whole = (folder / "cuda.h").is_file() and (folder / "crt" / "host_defines.h").is_file()
        if whole and "#define CUDA_VERSION 13" in (folder / "cuda.h").read_text():
            return folder
    raise OSError("this triton has no headers of CUDA 13, and nvidia-cuda-runtime and nvidia-cuda-crt are not there")


def build(folder: Path) -> Path:
    """Compile the stand-in into `folder`."""
    library = folder / LIBRARY
    options = ["-std=gnu17", "-O1", "-w", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}", f"-I{headers()}"]
    subprocess.run(["cc", *options, str(SOURCE), "-o", str(library), "-ldl", "-lpthread"], check=True)
    return library


def run(command: list[str], folder: Path) -> int:
    """The exit status of `command`, run on a hollow GPU; its caches are in `folder`, and no other is touched."""
    library = build(folder)
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ
        | {
            "LD_PRELOAD": str(library),
            "TRITON_LIBCUDA_PATH": str(folder),
            "TRITON_CACHE_DIR": str(folder / "triton"),
            "FASTLORA_CACHE": str(folder / "fastlora"),
        },
    ).returncode


@contextlib.contextmanager
def trusted() -> Iterator[None]:
    """Every path is admitted, the mask's kernel and seeds: checks compare numbers, and there are none."""
    from fastlora import check, check_shared, node
    from fastlora.paths import mask

    with (
        mock.patch.object(check, "admit", lambda path, *_: None),
        mock.patch.object(check_shared, "admit", lambda path, *_: None),
        mock.patch.object(mask, "_kernel_agrees", lambda *_: True),
        mock.patch.object(node, "_compared", set()),
        mock.patch.object(node, "_seeds_agree", lambda *_: True),
        mock.patch.object(node, "_seeds_are_sooner", lambda *_: True),
    ):
        yield


class Watch:
    """Counts steps, their launches and waits; a step is any function of no arguments."""

    def __init__(self) -> None:
        self.gpu = ctypes.CDLL(LIBRARY)
        self.gpu.hollow_last_wait.restype = ctypes.c_char_p
        self.steps = self.launches = 0
        self.waits: list[str] = []

    def __call__(self, what: str, step: Callable[[], object]) -> None:
        """Run `step` twice, and watch the second run; what an error says counts as a wait."""
        step()
        launches, waits = self.gpu.hollow_launches(), self.gpu.hollow_waits()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        except RuntimeError as error:
            self.waits.append(f"{what}: {error}")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if self.gpu.hollow_waits() > waits:
            self.waits.append(f"{what}: {self.gpu.hollow_last_wait().decode()}")
        self.steps, self.launches = self.steps + 1, self.launches + self.gpu.hollow_launches() - launches

    def close(self, name: str) -> int:
        """Print what was counted since the last call; the number of waits."""
        found = len(self.waits)
        print(*self.waits, f"{name}: {self.steps} steps, {self.launches} launches, {found} waits", sep="\n", flush=True)
        self.steps, self.launches, self.waits = 0, 0, []
        return found


def laid_out(layout: str, M: int, K: int, dtype: torch.dtype) -> torch.Tensor:
    def empty(*shape):
        return torch.zeros(shape, dtype=dtype, device="cuda")

    x = {
        "plain": lambda: empty(M, K),
        "transposed": lambda: empty(K, M).t(),
        "unaligned": lambda: empty(M, 2 * K + 1)[:, 1 : K + 1],
        "every second": lambda: empty(M, 2 * K)[:, ::2],
        "three dimensions": lambda: empty(2, M, K),
        "one dimension": lambda: empty(K),
    }[layout]()
    return x.requires_grad_()


def cases() -> Iterator[tuple]:
    """(layout, (M, N, K), R, (dtype, adapter_dtype), dropout_p)"""
    yield from itertools.product(LAYOUTS[:1], SIZES, RANKS, DTYPES, (0.0, 0.1))
    yield from itertools.product(LAYOUTS[1:], SIZES[:2], (8,), DTYPES, (0.0, 0.1))


def function_step(path: str | None, layout, sizes, R, dtypes, dropout_p) -> Callable[[], object]:
    (M, N, K), (dtype, adapter_dtype) = sizes, dtypes
    x = laid_out(layout, M, K, dtype)
    weight, bias = (torch.zeros(shape, dtype=dtype, device="cuda") for shape in ((N, K), (N,)))
    lora_A, lora_B = (
        torch.zeros(shape, dtype=adapter_dtype, device="cuda", requires_grad=True) for shape in ((R, K), (N, R))
    )

    def step():
        y = fastlora.lora_linear(x, weight, lora_A, lora_B, bias, 2.0, dropout_p, path=path)
        torch.autograd.grad(y, (x, lora_A, lora_B), torch.empty_like(y))

    return step


def layer_steps(layer: torch.nn.Module, K: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """(what, step) of a layer: plainly, under autocast, and computed again for backward."""
    from torch.utils.checkpoint import checkpoint

    x = torch.zeros(4, 32, K, device="cuda", requires_grad=True)
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def backward(y):
        torch.autograd.grad(y, trained, torch.empty_like(y))

    def autocast():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = layer(x)
        backward(y)

    yield "plain", lambda: backward(layer(x))
    yield "autocast", autocast
    yield "checkpoint", lambda: backward(checkpoint(layer, x, use_reentrant=False))


def peft_layer(base: torch.nn.Linear) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["0"])
    return fastlora.peft.patch(get_peft_model(torch.nn.Sequential(base), config).cuda()).train()


def training_step(graph: bool) -> Callable[[], object]:
    """A step of this package's trainer, with clipping and AdamW."""
    from fastlora.finetune.step import WARM_UP, Settings, Step

    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    fastlora.inject(model, r=4, target_modules=["0"], lora_dropout=0.1)
    model.cuda()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    step = Step(model, optimiser, Settings(clip=1.0, graph=graph))
    batch = torch.zeros(16, 64, device="cuda"), torch.zeros(16, dtype=torch.long, device="cuda")
    for _ in range(WARM_UP + 1):
        step([batch])
    assert not graph or step.plain is None, step.plain
    return lambda: step([batch])


def watched() -> int:
    """All steps; the number of waits."""
    watch = Watch()
    wait = torch.zeros((), device="cuda")
    watch("item", wait.item)
    watch("synchronize", torch.cuda.synchronize)
    if len(watch.waits) != 2:
        print("a step that waits was not found: nothing below would mean anything")
        return 1
    watch = Watch()
    found = 0
    for path in PATHS:
        for case in cases():
            watch(f"{path} {case}", function_step(path, *case))
        found += watch.close(path)
    layers = {"FusedLoRALinear": lambda base: fastlora.FusedLoRALinear.from_linear(base, r=8, lora_dropout=0.1).cuda()}
    try:
        import peft  # noqa: F401

        layers["peft"] = peft_layer
    except ImportError:
        print("peft: left out, it is not installed")
    for (kind, make), path in itertools.product(layers.items(), PATHS):
        with mock.patch.dict(os.environ, FASTLORA_PATH=path):
            for what, step in layer_steps(make(torch.nn.Linear(96, 64)), 96):
                watch(f"{kind}, {path}, {what}", step)
    found += watch.close("layers")
    for graph, path in itertools.product((False, True), PATHS):
        with mock.patch.dict(os.environ, FASTLORA_PATH=path):
            watch(f"training, {path}, graph={graph}", training_step(graph))
    found += watch.close("training")
    with mock.patch.dict(os.environ, FASTLORA_AUTOTUNE="1"):
        for case in itertools.islice(cases(), 4):  # the first call of each measures, and may wait
            watch(f"tuned {case}", function_step(None, *case))
    return found + watch.close("tuned")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    reason = missing()
    if reason:
        print(f"no hollow GPU here: {reason}")
        return CANNOT_RUN
    if argv == ["watched"]:
        with trusted():
            return bool(watched())
    with tempfile.TemporaryDirectory() as folder:
        return run(argv or [sys.executable, "-W", "ignore", "-m", "tests.campaigns.sync", "watched"], Path(folder))


if __name__ == "__main__":
    sys.exit(main())
