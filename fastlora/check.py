"""The self-check: a path is compared with the reference in float64, on the device itself, before it runs there.

On a CPU a path is admitted for all calls, by small ragged cases. On a GPU the kernels that a call will launch are: with
its N, K, R, dtypes, layout, dropout and tiles, by the road of eager calls, on as few of its rows as launch the same
kernels. A verdict is kept in memory and, for the device, driver, versions, the path's fingerprint and those kernels, in
the cache folder; an error on the way there (no memory, a compiler's) in memory only.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import replace

import torch

from fastlora import accuracy, autograd, env
from fastlora._version import __version__
from fastlora.cache import read_json, write_json
from fastlora.errors import warn_once
from fastlora.paths import Path
from fastlora.paths.problem import Problem, draw_seed, drawn, drawn_bank

# (M, N, K, R, dropout_p): no size a multiple of a tile, one aligned case for the TMA kernels, one of a single row
CASES = ((37, 53, 41, 3, 0.0), (130, 72, 100, 16, 0.25), (64, 128, 256, 8, 0.0), (1, 24, 40, 1, 0.0))
THREADS = (1, 2, 5, 17)  # of a CPU: a sum that more of them share, and more than there are processors
ROWS = 2048  # of a comparison on a GPU, where they launch all that more would

_verdicts: dict[tuple[str, torch.device, str], str | None] = {}
_kernels: dict[tuple[str, Problem], frozenset[str]] = {}


def admit(path: Path, problem: Problem, trial: Trial | None = None) -> str | None:
    """Whether `path` may run `problem`: None, or why not. Checks the first time, remembers after that.

    `trial` holds what paths and tiles that are checked in a row are compared with.
    """
    device = problem.device
    reason = verdict(path, device)
    if reason or device.type == "cpu" or path.fingerprint is None:
        return reason
    try:
        subject = _subject(path, problem)
    except Exception as error:  # whatever planning a launch raises, the path is not to be used
        return _said(error)
    return _verdict(path, device, subject, lambda: (trial or Trial(problem)).fault(path))


def verdict(path: Path, device: torch.device) -> str | None:
    """What is known against `path` on `device` as a whole: None, or why it may not run. A CPU is checked now."""
    if not needs_check(path, device):
        return None
    if device.type == "cpu":
        return _verdict(path, device, "", lambda: examine(path, device))
    return _verdicts.get((path.name, indexed(device), ""))


def admitted(path: Path, problem: Problem, here: bool) -> bool:
    """Whether it is known that `path` may run `problem`, with nothing run to find out.

    here: only if it ran in this process, so that nothing is compiled or loaded any more.
    """
    if not needs_check(path, problem.device):
        return True
    try:
        key = path.name, indexed(problem.device), _subject(path, problem)
    except Exception:  # it cannot even be planned
        return False
    known = _verdicts[key] if key in _verdicts else here or _stored(path, *key[1:])
    return known is None and verdict(path, problem.device) is None


def needs_check(path: Path, device: torch.device) -> bool:
    """ATen is trusted, and Triton's interpreter; what was compiled is not, until it was compared on this device."""
    return path.fingerprint is not None and not (device.type == "cpu" and env.interpreting())


def recheck(path: Path, device: torch.device) -> str | None:
    """Examine `path` on `device` anew, on small ragged cases: None, or why it cannot run there."""
    reason = path.why_not(device, None)
    try:
        reason = reason or examine(path, device)
    except Exception as error:
        reason = _said(error)
    _verdicts[path.name, indexed(device), ""] = reason
    return reason


def examine(path: Path, device: torch.device) -> str | None:
    """Compare `path` with the reference on `device` now, on small ragged cases; None, or the first fault.

    Raises:
        Exception: whatever a compiler or driver raises.
    """
    return apart(device, _examine, path, device, torch.get_num_threads())


def _examine(path: Path, device: torch.device, count: int) -> str | None:
    dtypes = [torch.float32, torch.float16] + ([torch.bfloat16] if _has_bfloat16(device) else [])
    cases = [(*sizes, dtype, dtype) for dtype in dtypes for sizes in CASES]
    for M, N, K, R, dropout_p, dtype, adapter_dtype in [*cases, *path.cases]:
        problem = Problem(M, N, K, R, dtype, adapter_dtype, device, dropout_p > 0.0)
        if path.why_not(device, problem):
            continue
        inputs = _with_mask(
            path, accuracy.draw(M, N, K, R, dtype, adapter_dtype=adapter_dtype, device=device), dropout_p
        )
        known = accuracy.expected(inputs)
        try:
            for threads in [*(THREADS if path.cases and device.type == "cpu" else ()), count]:
                torch.set_num_threads(threads)
                fault = _fault(path, inputs, known)
                if fault:
                    return f"{fault} ({threads} threads)"
        finally:
            torch.set_num_threads(count)
    return None


class Trial:
    """A problem's random inputs and what must come of them, for every path and tile that is compared with them."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.failed = problem, False  # failed: something raised an error, which is no verdict
        self._cases: dict[int, list[tuple[accuracy.Inputs, accuracy.Expected]]] = {}

    def fault(self, path: Path) -> str | None:
        """The first way in which `path` errs, with a bias or without, or None."""
        try:
            return apart(self.problem.device, self._fault, path)
        except Exception:
            self.failed = True
            raise

    def _fault(self, path: Path) -> str | None:
        M = _rows(path, self.problem)
        if M not in self._cases:
            problem = self.problem._replace(M=M)
            bank = drawn_bank(problem)
            inputs = accuracy.Inputs(*drawn(problem), scaling=2.0 if bank is None else 1.0, bank=bank)
            inputs = _with_mask(path, inputs, 0.1 if self.problem.dropout else 0.0)
            self._cases[M] = [(one, accuracy.expected(one)) for one in (inputs, replace(inputs, bias=None))]
        return next(filter(None, (_fault(path, *case) for case in self._cases[M])), None)


def compile_ahead(paths: Iterable[Path], problem: Problem, also: Iterable[Path] = ()) -> None:
    """Compile what `paths` launch for `problem`, and for as many rows as the check takes; errors wait for the call.

    `also`: what may be wanted next; compiled at once where there are processors for it.

    So are Triton's launchers: before 3.7 each is a file for the C compiler.
    """
    paths = [path for path in paths if path.launches is not None]
    if problem.device.type != "cuda" or not paths:
        return
    from triton.runtime import driver

    from fastlora.kernels import ahead
    from fastlora.kernels.tiles import target_of

    calls, target = [], target_of(problem.device)
    for path in (*paths, *(also if ahead.helpers() else ())):
        with suppress(Exception):
            rows = {problem.M, _rows(path, problem)}
            calls += [(path.name, dict(path.cut), problem._replace(M=M)) for M in rows]

    def load(launch) -> None:
        kernel = launch.compile(target)
        driver.active.launcher_cls(kernel.src, kernel.metadata)

    with suppress(Exception):
        ahead.compile_all(target, ahead.planned(target, calls), calls, load)


def _verdict(path: Path, device: torch.device, subject: str, find: Callable[[], str | None]) -> str | None:
    """The verdict on `subject` (what would run, in a word; "": all of the path), found by `find` if nobody knows it."""
    device = indexed(device)
    key = path.name, device, subject
    if key in _verdicts:
        return _verdicts[key]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "its self-check has not run yet and cannot run while a graph is captured; run the call once before that"
    reason = _stored(path, device, subject)
    if reason is _UNKNOWN:
        try:
            reason = find()
            _keep(path, device, subject, reason)
        except torch.OutOfMemoryError as error:  # later there may be enough
            return _said(error)
        except Exception as error:  # whatever a compiler or driver raises, the path is not to be used
            reason = _said(error)
    _verdicts[key] = reason
    if reason:
        message = f"fastlora: path {path.name!r} failed its self-check on {device} and is disabled there: {reason}"
        warn_once(("self-check", path.name, device), message)
    return reason


_UNKNOWN = object()


def _stored(path: Path, device: torch.device, subject: str) -> object:
    """The verdict in the cache folder, or _UNKNOWN where it is absent or damaged."""
    verdict = read_json(_store(path, device, subject))
    reason = verdict.get("reason", _UNKNOWN) if isinstance(verdict, dict) else _UNKNOWN
    return reason if reason is None or (isinstance(reason, str) and reason.isprintable()) else _UNKNOWN


def _keep(path: Path, device: torch.device, subject: str, reason: str | None) -> None:
    store = _store(path, device, subject)
    try:
        write_json(store, {"path": path.label, "reason": reason})
    except OSError as error:  # a read-only home costs a second per process, nothing else
        message = f"fastlora: the self-check's verdict could not be kept in {store.parent}: {error}"
        warn_once("self-check cache", message)


def _subject(path: Path, problem: Problem) -> str:
    """What a verdict on a GPU is about: the kernels, and all of the problem but M, on which they depend."""
    card = problem._replace(device=problem.device.type)  # cards of a kind share it: `_store` names the kind
    if path.launches is None:
        rows = card._replace(M=1 << max(problem.M - 1, 0).bit_length()), problem.M % 16 == 0
    else:
        rows = card._replace(M=0), *sorted(_kernels_of(path, problem))
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:32]


def _kernels_of(path: Path, problem: Problem) -> frozenset[str]:
    """What a call would launch: a key for each compiled kernel, and whether its programs take a second tile."""
    from fastlora.kernels.tiles import target_of

    key = path.label, problem
    if key not in _kernels:
        target = target_of(problem.device)
        launches = path.launches(path, problem)
        if len(_kernels) >= 4096:
            _kernels.clear()
        _kernels[key] = frozenset(f"{one.key(target)} {one.turns > 1}" for one in launches)
    return _kernels[key]


def _rows(path: Path, problem: Problem) -> int:
    """The fewest rows, of M's divisibility by 16, that launch the kernels of all M.

    Of a path that does not tell its launches: those that give each multiprocessor a second tile of 128 x 256.
    """
    from fastlora.kernels.tiles import ceil_div, multiprocessors, target_of

    M, odd, few = problem.M, problem.M % 16, ROWS

    def enough() -> bool:
        if path.launches is not None:
            return _kernels_of(path, problem._replace(M=few + odd)) == _kernels_of(path, problem)
        count = multiprocessors(problem.device, target_of(problem.device))
        return few // 128 * ceil_div(min(problem.N, problem.K), 256) >= 2 * count

    while few + odd < M and not enough():
        few *= 2
    return min(few + odd, M)


def _fault(path: Path, inputs: accuracy.Inputs, known: accuracy.Expected) -> str | None:
    """The first way in which `path`, run by the road of eager calls, breaks the rule on `inputs`, or None."""

    def function(x, weight, lora_A, lora_B, bias, scaling, dropout_p, bank=None):
        return autograd.run(path, x, weight, lora_A, lora_B, bias, scaling, dropout_p, bank)

    torch.manual_seed(0)  # so that the call draws what the mask was made of
    found = accuracy.violations(accuracy.run(function, inputs), inputs, known=known)
    x, dropout = inputs.x, f" dropout={inputs.dropout_p}" * bool(inputs.dropout_p)
    kinds = "/".join(str(kind).removeprefix("torch.") for kind in dict.fromkeys((x.dtype, inputs.lora_A.dtype)))
    (M, K), (N, R) = x.shape, inputs.lora_B.shape
    return f"M={M} N={N} K={K} R={R} {kinds}{dropout}: {found[0]}" if found else None


def _with_mask(path: Path, inputs: accuracy.Inputs, dropout_p: float) -> accuracy.Inputs:
    if not dropout_p:
        return inputs
    torch.manual_seed(0)
    mask = path.mask(draw_seed(inputs.x.device), *inputs.x.shape, inputs.bank or dropout_p)
    return replace(inputs, dropout_p=dropout_p, mask=mask)


def apart(device: torch.device, function: Callable, *arguments):
    """function(*arguments) in a thread of its own, so that nothing that surrounds the first call reaches it: no_grad,
    autocast, default devices, an op's dispatch keys; and the caller's random numbers stay what they were."""

    def work():
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return function(*arguments)

    with torch.random.fork_rng([device] if device.type == "cuda" else []), ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def _has_bfloat16(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def indexed(device: torch.device) -> torch.device:
    """`device` with its index, which a bare "cuda" leaves to what is current."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _store(path: Path, device: torch.device, subject: str) -> pathlib.Path:
    facts = {
        "path": path.name,
        "subject": subject,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "driver": _driver(device),
        "torch": torch.__version__,
        "fastlora": __version__,
        "fingerprint": path.fingerprint(),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    return env.cache_dir() / "selfcheck" / f"{key}.json"


def _driver(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    module = pathlib.Path("/proc/driver/nvidia/version")
    return f"{version() if version else ''} {module.read_text() if module.is_file() else ''}"
