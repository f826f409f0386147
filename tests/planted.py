"""Faults planted one at a time in a copy of the tree: does the test that is to catch each of them fail?

    python -m tests.planted [WORD ...]      all of them, or those whose file, texts or test hold one of the words

Status 1 when a fault survives, or its text is no longer in the file. Faults in C++ are compiled, half a minute each.

To add a fault: a line in FAULTS: the file, a text that stands in it once, what stands there instead, and the test. Not
here, for they change nothing: rows beyond its region that `ds_db_kernel` might add (`split` gives regions of whole
blocks, and `test_tiles.py` says so).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Fault(NamedTuple):
    file: str
    old: str
    new: str
    test: str


FAULTS = [
    Fault(*fault)
    for fault in (
        # merging
        ("fastlora/linear.py", "alpha=self.scaling)", "alpha=self.scaling * (1 + self.fan_in_fan_out))",
         "tests/test_merge.py::TestMerge::test_the_merged_weight_is_the_sum_rounded_once"),
        ("fastlora/linear.py", "merged = total.to(base.dtype)", "merged = base + (total - base).to(base.dtype)",
         "tests/test_merge.py::TestMerge::test_the_merged_weight_is_the_sum_rounded_once"),
        ("fastlora/linear.py", "            self.weight = self._base\n", "            self.weight = nn.Parameter(self._base, False)\n",
         "tests/test_merge.py::TestMerge::test_unmerge_restores_every_bit"),
        ("fastlora/linear.py", "        self.unmerge()\n        nn.init", "        nn.init",
         "tests/test_merge.py::TestMerge::test_drawing_anew_unmerges"),
        # injection
        ("fastlora/inject.py", '    "_backward_pre_hooks",\n', "", "tests/test_inject.py::test_every_kind_of_hook_runs_on"),
        ("fastlora/inject.py", "layer._is_full_backward_hook = module._is_full_backward_hook", "pass",
         "tests/test_inject.py::test_every_kind_of_hook_runs_on"),
        ("fastlora/base_layer.py", 'if "forward" in linear.__dict__', 'if "call" in linear.__dict__',
         "tests/test_inject.py::TestErrorsChangeNothing"),
        # PEFT
        ("fastlora/peft/layer.py", "parts.drop_type is nn.Dropout and drop.training",
         "parts.drop_type is nn.Dropout and self.training",
         "tests/peft/test_numbers.py::test_the_dropout_modules_own_mode_counts"),
        ("fastlora/peft/layer.py", "isinstance(drop, nn.Dropout) and drop.training",
         "isinstance(drop, nn.Dropout) and self.training",
         "tests/peft/test_numbers.py::test_the_dropout_modules_own_mode_counts"),
        ("fastlora/peft/layer.py", '            and "forward" not in up\n', "", "tests/peft/test_exits.py"),
        # one call: arguments, gate, choice, check
        ("fastlora/functional.py", "scaling.detach().reshape(())", "scaling.reshape(())",
         "tests/test_functional.py::test_scaling_as_a_tensor"),
        ("fastlora/functional.py", "if weight.requires_grad and torch.is_grad_enabled()", "if False",
         "tests/test_functional.py::test_weight_gets_no_gradient_and_says_so"),
        ("fastlora/gate.py", "if forward_ad._current_level >= 0", "if forward_ad._current_level > 0",
         "tests/test_autograd.py::test_forward_mode_differentiation_gives_the_tangent"),
        ("fastlora/choice.py", "lora_A.shape[0], dropout_p > 0.0, *sizes)", "lora_A.shape[0], *sizes)",
         "tests/paths/test_cpu.py::test_what_runs_on_a_cpu"),
        ("fastlora/check.py", "enumerate([*cases, *path.cases])", "enumerate(cases)",
         "tests/test_choice.py::test_selfcheck_examines_every_dtype_and_the_paths_own_cases"),
        ("fastlora/check.py", "([torch.bfloat16] if _has_bfloat16(device) else [])", "[]",
         "tests/test_choice.py::test_selfcheck_examines_every_dtype_and_the_paths_own_cases"),
        ("fastlora/check.py", "        torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),\n", "",
         "tests/test_choice.py::test_the_first_call_may_be_inside_a_checkpoint"),
        # gradients in Python
        ("fastlora/autograd.py", "kept = x if need_A else _shadow(x) if need_x and need_B else None",
         "kept = x if need_A else None", "tests/test_autograd.py::test_gradients_can_be_differentiated_again"),
        ("fastlora/autograd.py", "kept = kept / (1.0 - p) if p < 1.0 else kept", "kept = kept",
         "tests/test_autograd.py::test_gradients_can_be_differentiated_again"),
        ("fastlora/autograd.py", " or why_eager(dy) is not None", "",
         "tests/test_autograd.py::test_a_dual_gradient_keeps_its_tangent"),
        ("fastlora/autograd.py", "with torch.autocast(dy.device.type, enabled=False) if torch._C._is_any_autocast_enabled() else _nothing:",
         "with _nothing:",
         "tests/test_autograd.py::test_backward_inside_a_foreign_autocast_region_keeps_its_dtype"),
        ("fastlora/ops.py", "ctx.save_for_backward(x, weight, lora_A, lora_B, output[1], seed)",
         "ctx.save_for_backward(x, weight, lora_A, lora_B, output[1], seed if seed is None else seed + 1)",
         "tests/test_compile.py::test_dropout_in_a_graph_uses_one_mask_and_differs_between_calls"),
        ("fastlora/paths/problem.py", "        and S.shape == (M, R)\n", "",
         "tests/test_autograd.py::test_an_S_that_hooks_have_narrowed_is_refused"),
        # paths
        ("fastlora/paths/aten.py", "1e-37 < abs(scaling)", "0.0 < abs(scaling)",
         "tests/test_functional.py::test_a_scaling_beyond_float32_is_eagers"),
        ("fastlora/paths/aten.py", "return scaling / (1.0 - p) if p < 1.0 else 0.0", "return scaling if p < 1.0 else 0.0",
         "tests/test_functional.py::test_error_rule"),
        ("fastlora/paths/cpu.py", "_dense(lora_A), _dense(lora_B)\n    (M, K)", "_dense(lora_A), lora_B\n    (M, K)",
         "tests/paths/test_cpu.py::test_adapters_may_lie_anyhow"),
        ("fastlora/paths/cpu.py", "add = dy.dtype is torch.bfloat16  #", "add = False  #",
         "tests/paths/test_cpu.py::test_error_rule"),
        # masks
        ("fastlora/paths/mask.py", "return round(p * 65536)", "return round(p * 65536) + 1", "tests/paths/test_mask.py"),
        ("fastlora/paths/mask.py", "return torch.ge(bits", "return torch.gt(bits", "tests/paths/test_mask.py"),
        ("fastlora/paths/mask.py", "[:, :K] >= threshold(p)", "[:, :K] > threshold(p)", "tests/paths/test_mask.py"),
        ("fastlora/kernels/dropout.py", "low = ((threshold & 0x7FFF)", "low = (((threshold + 1) & 0x7FFF)",
         "tests/kernels/test_dropout.py"),
        ("fastlora/kernels/grads.py", "end = tl.minimum(start + region_m, M)", "end = M",
         "tests/kernels/test_grads.py::test_ragged_sizes_regions_and_splits"),
        ("csrc/call.h", "(p * 65536.0 + 0.5)", "(p * 65536.0 + 1.5)", "tests/paths/test_mask.py"),
        ("csrc/cpu_kernels.h", "(Bits)(random >= dropout.threshold)", "(Bits)(random > dropout.threshold)",
         "tests/paths/test_mask.py"),
        ("csrc/cpu_kernels.h", "dropout.seed + 0x9e3779b97f4a7c15u", "(dropout.seed >> 1) + 0x9e3779b97f4a7c15u",
         "tests/paths/test_mask.py"),
        # the kernels in C++
        ("csrc/cpu_kernels.h", "const Bits nan = (Bits)(v != v);", "const Bits nan = {};",
         "tests/paths/test_cpu.py::test_a_nan_that_rounding_would_carry_over_stays_one"),
        ("csrc/cpu.cpp", "static_cast<std::uint16_t>(v != v ? 0x7fc0u : rounded)", "static_cast<std::uint16_t>(rounded)",
         "tests/paths/test_cpu.py::test_a_nan_that_rounding_would_carry_over_stays_one"),
        ("csrc/cpu_kernels.h", "for (int part = 0; part < parts; ++part)\n        for", "for (int part = 0; part < std::min(parts, 4); ++part)\n        for",
         "tests/paths/test_cpu.py::test_sizes_that_several_threads_share"),
        ("csrc/cpu_kernels.h", "const std::int64_t padded = whole(width);", "const std::int64_t padded = width / COLUMNS * COLUMNS;",
         "tests/paths/test_cpu.py::test_error_rule"),
        ("csrc/cpu_kernels.h", "if (to.add) Engine::load_tile(there, at);", "Engine::load_tile(there, at);",
         "tests/paths/test_cpu.py::test_error_rule"),
        ("csrc/cpu_bfloat16.h", "rows > 1 ? bits_of<__m512i>(load(in + stride)) : __m512i{}", "bits_of<__m512i>(load(in + stride))",
         "tests/paths/test_cpu.py::test_nothing_beyond_a_tensors_rows_and_columns_is_read_or_written"),
        ("csrc/cpu_bfloat16.h", "m + 1 < rows ? R - r : 0", "R - r",
         "tests/paths/test_cpu.py::test_nothing_beyond_a_tensors_rows_and_columns_is_read_or_written"),
        # the node in C++
        ("csrc/node.cpp", "    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);\n", "",
         "tests/test_autograd.py::test_backward_inside_a_foreign_autocast_region_keeps_its_dtype"),
        ("csrc/node.cpp", "S.size(0) != M || S.size(1) != R || ", "",
         "tests/test_autograd.py::test_an_S_that_hooks_have_narrowed_is_refused"),
        ("csrc/node.cpp", "? shadow(x)", "? Tensor()", "tests/test_autograd.py::test_gradients_can_be_differentiated_again"),
        ("csrc/node.cpp", "const bool ours = !at::GradMode::is_enabled() && ", "const bool ours = ",
         "tests/test_autograd.py::test_gradients_can_be_differentiated_again"),
        ("csrc/node.cpp", "A = lora_A.contiguous(), B = lora_B.contiguous();\n  fastlora::Call call{};\n  call.M = rows.size(0);\n  call.K",
         "A = lora_A.contiguous(), B = lora_B;\n  fastlora::Call call{};\n  call.M = rows.size(0);\n  call.K",
         "tests/paths/test_cpu.py::test_adapters_may_lie_anyhow"),
    )
]  # fmt: skip


def copy_tree(folder: Path) -> None:
    """What git knows of, and what was compiled here."""
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    built = [str(file.relative_to(ROOT)) for file in (ROOT / "fastlora").glob("*.so")]
    for name in [*names.stdout.splitlines(), *built]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


@contextlib.contextmanager
def planted(fault: Fault, folder: Path) -> Iterator[None]:
    """The fault in its file, compiled where that is C++; all is put back after it, times of change too."""
    kept, file = folder.with_name("kept"), folder / fault.file
    compiled = list((folder / "fastlora").glob("*.so")) if fault.file.startswith("csrc") else []
    kept.mkdir(exist_ok=True)
    for one in (file, *compiled):
        shutil.copy2(one, kept / one.name)
    text = file.read_text()
    if text.count(fault.old) != 1:
        raise LookupError(f"the text stands there {text.count(fault.old)} times")
    file.write_text(text.replace(fault.old, fault.new))
    try:
        if compiled:
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            subprocess.run(build, cwd=folder, check=True, capture_output=True)
            if not all(one.exists() for one in compiled):
                raise LookupError("it does not compile")
        yield
    finally:
        for one in (file, *compiled):
            shutil.copy2(kept / one.name, one)


def passes(test: str, folder: Path) -> bool:
    interpret = str(int(test.startswith("tests/kernels")))
    environment = os.environ | {"PYTHONPATH": str(folder), "TRITON_INTERPRET": interpret, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode in (2, 3, 4, 5):  # not a failure of the test: it could not even be asked
        raise LookupError(f"pytest ended with status {done.returncode}: {done.stdout[-300:]}")
    return done.returncode == 0


def main(words: list[str]) -> int:
    faults = [fault for fault in FAULTS if not words or any(word in text for word in words for text in fault)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "tree"
        copy_tree(folder)
        red = [test for test in sorted({fault.test for fault in faults}) if not passes(test, folder)]
        if red:
            print("red without a fault:", *red, sep="\n  ")
            return 1
        caught = 0
        for fault in faults:
            began = time.monotonic()
            try:
                with planted(fault, folder):
                    said = "SURVIVES" if passes(fault.test, folder) else "caught"
            except LookupError as error:
                said = f"STALE: {error}"
            caught += said == "caught"
            shown = " ".join(fault.old.split())[:60]
            print(f"{said:<9} {time.monotonic() - began:4.0f} s  {fault.file}: {shown}  [{fault.test}]", flush=True)
    print(f"{len(faults)} faults planted, {caught} caught")
    return int(caught < len(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
