"""Faults planted one at a time in a copy of the tree: does the test that is to catch each of them fail?

    python -m tests.planted [WORD ...]      all of them, or those whose file or texts hold one of the words

Status 1 when a fault survives, or its text is no longer in the file. Faults in C++ are compiled, half a minute each.

To add a fault, give it a line in FAULTS. One is not there, for it changes nothing: that `ds_db_kernel` adds rows beyond
its region. `tiles.split` gives regions of whole blocks, so that only the last one has such rows, and they are zero.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


FAULTS = {  # by the test that is to catch them: (file, text that stands in it once, what is to stand there)
    "tests/test_merge.py::TestMerge::test_the_merged_weight_is_the_sum_rounded_once": (
        ("fastlora/linear.py", "alpha=self.scaling)", "alpha=self.scaling * (1 + self.fan_in_fan_out))"),
        ("fastlora/linear.py", "merged = total.to(base.dtype)", "merged = base + (total - base).to(base.dtype)"),
    ),
    "tests/test_merge.py::TestMerge::test_unmerge_restores_every_bit": (
        ("fastlora/linear.py",
         "            self.weight = self._base\n",
         "            self.weight = nn.Parameter(self._base, False)\n"),
    ),
    "tests/test_merge.py::TestMerge::test_drawing_anew_unmerges": (
        ("fastlora/linear.py", "        self.unmerge()\n        nn.init", "        nn.init"),
    ),
    "tests/test_inject.py::test_every_kind_of_hook_runs_on": (
        ("fastlora/inject.py", '    "_backward_pre_hooks",\n', ""),
        ("fastlora/inject.py", "layer._is_full_backward_hook = module._is_full_backward_hook", "pass"),
    ),
    "tests/test_inject.py::TestErrorsChangeNothing": (
        ("fastlora/base_layer.py", 'if "forward" in linear.__dict__', 'if "call" in linear.__dict__'),
    ),
    "tests/peft/test_numbers.py::test_the_dropout_modules_own_mode_counts": (
        ("fastlora/peft/layer.py",
         "parts.drop_type is nn.Dropout and drop.training",
         "parts.drop_type is nn.Dropout and self.training"),
        ("fastlora/peft/layer.py",
         "drops = isinstance(drop, nn.Dropout) and drop.training",
         "drops = isinstance(drop, nn.Dropout) and self.training"),
    ),
    "tests/peft/test_exits.py": (
        ("fastlora/peft/layer.py", '            and "forward" not in up\n', ""),
    ),
    "tests/test_functional.py::test_no_gradient_flows_to_the_scaling": (
        ("fastlora/functional.py", "scaling.detach().reshape(())", "scaling.reshape(())"),
    ),
    "tests/test_functional.py::test_weight_gets_no_gradient_and_says_so": (
        ("fastlora/functional.py", "if weight.requires_grad and torch.is_grad_enabled()", "if False"),
    ),
    "tests/test_autograd.py::test_forward_mode_differentiation_gives_the_tangent": (
        ("fastlora/gate.py", "if forward_ad._current_level >= 0", "if forward_ad._current_level > 0"),
    ),
    "tests/paths/test_cpu.py::test_what_runs_on_a_cpu": (
        ("fastlora/choice.py", "lora_A.dtype, R, dropout, bank\n", "lora_A.dtype, R\n"),
    ),
    "tests/test_choice.py::test_selfcheck_examines_every_dtype_and_the_paths_own_cases": (
        ("fastlora/check.py", "in [*cases, *path.cases]:", "in cases:"),
        ("fastlora/check.py", "([torch.bfloat16] if _has_bfloat16(device) else [])", "[]"),
    ),
    "tests/test_choice.py::test_the_first_call_may_be_inside_a_checkpoint": (
        ("fastlora/check.py", "apart(device, _examine, path, device,", "_examine(path, device,"),
    ),
    "tests/test_autograd.py::test_gradients_can_be_differentiated_again": (
        ("fastlora/autograd.py",
         "kept = x if any(needs[::3]) else _shadow(x) if need_x and any(needs[1::3]) else None",
         "kept = x if any(needs[::3]) else None"),
        ("fastlora/autograd.py", "kept = kept / (1.0 - p) if p < 1.0 and bank is None else kept", "kept = kept"),
        ("csrc/node.cpp", "? shadow(x)", "? Tensor()"),
        ("csrc/node.cpp", "at::GradMode::is_enabled() || !nobody_watches()", "!nobody_watches()"),
    ),
    "tests/test_autograd.py::test_a_dual_gradient_keeps_its_tangent": (
        ("fastlora/autograd.py", " or why_eager(*given) is not None", ""),
    ),
    "tests/test_autograd.py::test_backward_inside_a_foreign_autocast_region_keeps_its_dtype": (
        ("fastlora/autograd.py",
         "with torch.autocast(device, enabled=False) if torch._C._is_any_autocast_enabled() else _nothing:",
         "with _nothing:"),
        ("csrc/node.cpp",
         "    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);\n",
         ""),
    ),
    "tests/test_compile.py::test_dropout_in_a_graph_uses_one_mask_and_differs_between_calls": (
        ("fastlora/ops.py",
         "ctx.save_for_backward(x, weight, lora_A, lora_B, output[1], seed)",
         "ctx.save_for_backward(x, weight, lora_A, lora_B, output[1], seed if seed is None else seed + 1)"),
    ),
    "tests/test_autograd.py::test_an_S_that_hooks_have_narrowed_is_refused": (
        ("fastlora/paths/problem.py", "        and S.shape == (M, R)\n", ""),
        ("csrc/gate.h", "S.size(0) != M || S.size(1) != R || ", ""),
    ),
    "tests/test_functional.py::test_a_scaling_of_zero_hides_no_nan": (
        ("fastlora/paths/aten.py", "1e-37 < abs(scaling)", "0.0 < abs(scaling)"),
    ),
    "tests/test_functional.py::test_error_rule": (
        ("fastlora/paths/aten.py",
         "return 1.0 / (1.0 - p) if p < 1.0 else 0.0",
         "return 1.0 if p < 1.0 else 0.0"),
    ),
    "tests/paths/test_cpu.py::test_adapters_may_lie_anyhow": (
        ("fastlora/paths/cpu.py", "if dx is not None and (onto is not None or not add):", "if dx is not None:"),
        ("fastlora/paths/cpu.py", "_dense(lora_A), _dense(lora_B), seed", "_dense(lora_A), lora_B, seed"),
        ("csrc/node_cpu.h", "A = layer.lora_A.contiguous(), B = layer.lora_B.contiguous();",
         "A = layer.lora_A.contiguous(), B = layer.lora_B;"),
    ),
    "tests/paths/test_cpu.py::test_error_rule": (
        ("csrc/cpu_kernels.h",
         "const std::int64_t padded = whole(width);",
         "const std::int64_t padded = width / COLUMNS * COLUMNS;"),
        ("csrc/cpu_kernels.h", "if (to.add) Engine::load_tile(there, at);", "Engine::load_tile(there, at);"),
    ),
    "tests/test_bank.py::test_each_adapter_is_as_if_alone": (
        ("fastlora/paths/bank.py", "= scaling / (1.0 - p) if p < 1.0 else 0.0", "= scaling"),
        ("fastlora/paths/bank.py", "        for adapter in sorted(counts):", "        for adapter in counts:"),
        ("fastlora/paths/cpu.py", "dA *= bank.column", "pass"),
        ("fastlora/paths/cpu.py", "y2[order], S[order] = mine, kept", "y2[order], S = mine, kept"),
        ("csrc/cpu_kernels.h", "from[(column + j) * stride + r]", "from[(column + j) * R + r]"),
        ("csrc/cpu_kernels.h", "convert(S + m * R, kept + m * call.rank_stride, R)", "convert(S + m * R, kept, R)"),
    ),
    "tests/test_bank.py::test_each_row_s_threshold_is_met_to_the_bit": (
        ("fastlora/paths/mask.py", "(least.clamp(max=65535) - 32768)", "(least.clamp(max=65535) - 32767)"),
    ),
    "tests/test_bank.py::test_second_derivatives": (
        ("fastlora/autograd.py", "else bank.masked(dropped @ A.t())", "else dropped @ A.t()"),
        ("fastlora/autograd.py", "else bank.masked(dy_wide @ B)", "else dy_wide @ B"),
    ),
    "tests/test_bank.py::test_adapters_drop_apart": (
        ("fastlora/paths/bank.py", "seed + _STEP * torch", "seed + 0 * torch"),
    ),
    "tests/test_bank.py::test_routes_nest_and_end": (
        ("fastlora/bank.py", 'layer.__dict__["_route"] = old', 'layer.__dict__["_route"] = None'),
    ),
    "tests/peft/test_route.py": (
        ("fastlora/peft/routing.py", "record.route, record.parts = new, None", "record.route = new"),
        ("fastlora/peft/routing.py", "            handle.remove()", "            handle"),
    ),
    "tests/paths/test_mask.py": (
        ("fastlora/paths/mask.py", "return round(p * 65536)", "return round(p * 65536) + 1"),
        ("fastlora/paths/mask.py", "return torch.ge(bits, least - 32768", "return torch.gt(bits, least - 32768"),
        ("fastlora/paths/mask.py", "[:, :K] >= _least(p)", "[:, :K] > _least(p)"),
        ("csrc/call.h", "(p * 65536.0 + 0.5)", "(p * 65536.0 + 1.5)"),
        ("csrc/cpu_kernels.h", "(Bits)(random >= dropout.threshold)", "(Bits)(random > dropout.threshold)"),
        ("csrc/cpu_kernels.h", "dropout.seed + 0x9e3779b97f4a7c15u", "(dropout.seed >> 1) + 0x9e3779b97f4a7c15u"),
    ),
    "tests/kernels/test_dropout.py": (
        ("fastlora/kernels/dropout.py", "low = ((threshold & 0x7FFF)", "low = (((threshold + 1) & 0x7FFF)"),
    ),
    "tests/kernels/test_grads.py::test_ragged_sizes_regions_and_splits": (
        ("fastlora/kernels/grads.py", "end = tl.minimum(start + region_m, M)", "end = M"),
    ),
    "tests/paths/test_cpu.py::test_a_nan_that_rounding_would_carry_over_stays_one": (
        ("csrc/cpu_kernels.h", "const Bits nan = (Bits)(v != v);", "const Bits nan = {};"),
        ("csrc/cpu_kernels.h", "(nan & 0x200u)", "(nan & 0u)"),
    ),
    "tests/paths/test_cpu.py::test_every_float16_is_read_and_rounded_as_ieee_has_it": (
        ("csrc/cpu.cpp", "(bits_of<__m256>(v), _MM_FROUND_TO_NEAREST_INT)", "(bits_of<__m256>(v), _MM_FROUND_TO_ZERO)"),
        ("csrc/cpu.cpp", "_mm512_maskz_cvtph_ps(0xffff", "_mm512_maskz_cvtph_ps(0x7fff"),
        ("csrc/cpu_kernels.h", "0xfffu + ((size >> 13) & 1u)", "0x1000u"),
        ("csrc/cpu_kernels.h", "infinite = (Bits)(size >= 143u << 23)", "infinite = (Bits)(size > 255u << 23)"),
        ("csrc/cpu_kernels.h", "(subnormal & units) | (~subnormal & normal)", "normal"),
    ),
    "tests/paths/test_cpu.py::test_sizes_that_several_threads_share": (
        ("csrc/cpu_kernels.h",
         "for (int part = 0; part < parts; ++part)\n      for",
         "for (int part = 0; part < std::min(parts, 4); ++part)\n      for"),
    ),
    "tests/paths/test_cpu.py::test_nothing_beyond_a_tensors_rows_and_columns_is_read_or_written": (
        ("csrc/cpu_bfloat16.h",
         "rows > 1 ? bits_of<__m512i>(load(in + stride)) : __m512i{}",
         "bits_of<__m512i>(load(in + stride))"),
    ),
    "tests/paths/test_cpu.py::test_what_an_earlier_call_left_behind_is_not_read": (
        ("csrc/cpu_bfloat16.h", "m + 1 < rows ? R - r : 0", "R - r"),
    ),
    "tests/test_packed.py": (
        ("fastlora/packed.py", "self.version is not None and self._now()", "False and self._now()"),
        ("fastlora/peft/layer.py", "return weight if same and not weight.changed else", "return weight if same else"),
        ("csrc/node.cpp", "if (each[0].packed && compiles_backward()) return {};", ""),
    ),
    "tests/test_siblings.py": (
        ("fastlora/siblings.py", "autocast = torch._C._is_any_autocast_enabled() and", "autocast = False and"),
        ("fastlora/siblings.py", "torch.is_inference_mode_enabled(), dtype", "dtype"),
        ("fastlora/siblings.py", "            self._missed.pop(id(layer), None)\n", "            pass\n"),
        ("fastlora/siblings.py", "self._missed.get(key, 0) + 1", "self._missed.get(key, 0)"),
        ("fastlora/siblings.py", "min(2 * self._wait + 1, _LONGEST)", "0"),
        ("fastlora/siblings.py", "return versions, places, lora_A", "return versions, lora_A"),
        ("fastlora/siblings.py", "and self.address == x.data_ptr() ", ""),
        ("fastlora/siblings.py", "versions = weight._version + lora_A", "versions = lora_A"),
        ("fastlora/siblings.py", " or any(t is not None and t.is_inference() for t in own[0][:4])", ""),
        ("fastlora/siblings.py", "None if one._forward_pre_hooks else one._projection(x)", "one._projection(x)"),
        ("fastlora/siblings.py",
         "torch._C._autograd._top_saved_tensors_default_hooks(True) is not None",
         "False"),
        ("fastlora/siblings.py", "or not on or", "or"),
        ("fastlora/siblings.py", "shared = self._shared and", "shared ="),
        ("fastlora/siblings.py", "own[1] != first[1] or ", ""),
        ("fastlora/peft/patching.py", "group.leave(layer)", "pass"),
    ),
    "tests/test_shared.py": (
        ("fastlora/shared.py", "                or any(t.device != x.device for t in tensors)\n", ""),
        ("fastlora/shared.py", "                or weight.requires_grad\n", ""),
        ("fastlora/shared.py", "    if len(learn) > 1:", "    if False:"),
        ("fastlora/autograd.py", "x is None or As[i].requires_grad", "need_A[i]"),
        ("fastlora/autograd.py",
         "kept = x if any(needs[::3]) else _shadow(x) if need_x and any(needs[1::3]) else None",
         "kept = x if any(needs[::3]) else None"),
        ("fastlora/autograd.py", "enabled=False) if torch._C._is_any_autocast_enabled()", "enabled=False) if False"),
        ("csrc/node.cpp", "? shadow(x)", "? Tensor()"),
        ("csrc/node.cpp", " || learns(one) != learn) return {};", ") return {};"),
        ("csrc/node.cpp", "= ctx->needs_input_grad(inputs++);", "= ctx->needs_input_grad(j + 1), ++inputs;"),
        ("csrc/node.cpp", "at::GradMode::is_enabled() || !nobody_watches()", "!nobody_watches()"),
        ("csrc/node.cpp", "numbers.get(3 + 2 * i) != 0.0 ? 3 : 2", "numbers.get(3 + 2 * i) != 0.0 ? 3 : 3"),
    ),
    "tests/paths/test_cpu.py::test_the_node_in_cpp_serves_what_is_ordinary_and_leaves_the_rest": (
        ("csrc/table.h", "(cuda || met.again(*key))", "true"),
    ),
    "tests/test_record.py": (
        ("csrc/seeds.h", "round < 10", "round < 7"),
        ("fastlora/record.py", "return False  # for which", "return True  # for which"),
        ("fastlora/record.py", "*t.stride(), *rest))", "*t.contiguous().stride(), *rest))"),
        ("fastlora/node.py", "    if several or first.bank", "    if first.bank"),
        ("csrc/node.cpp", "PyObject_IsTrue(PyTuple_GET_ITEM(wanted, 1 + i)) == 1", "false"),
        ("fastlora/check_shared.py", "shared.backward(dys, x, many, Ss, needs)", "pass"),
        ("fastlora/check_shared.py", "@lru_cache(4096)", "@partial"),
    ),
    "tests/kernels/test_shared.py::test_the_self_check_finds_what_is_wrong": (
        ("fastlora/check_shared.py", "inputs, needs=needs)", "inputs)"),
        ("fastlora/check_shared.py", "in draw_seeds(x.device, len(many))", "in [torch.randint(99, ()) for _ in many]"),
    ),
    "tests/kernels/test_grouped.py": (
        ("fastlora/kernels/grouped.py", "tl.where(i == 2, third, first)", "third"),
        ("fastlora/kernels/gemm_each.py", "[dx, *dys, *weights], one_way)", "[dx, *dys, *weights])"),
        ("fastlora/kernels/launch.py", '"K" if "dx_desc" in self.args else None', "None"),
        ("fastlora/kernels/gemm_each.py", "    acc += tl.load(dx_ptr", "    tl.load(dx_ptr"),
        ("fastlora/kernels/grouped.py", "weights[i].stride() if weights else None", "None"),
        ("fastlora/kernels/grouped.py", "sums = [(part, out) for", "sums = [] and [(part, out) for"),
        ("fastlora/kernels/partials.py", "    return block - blocks\n", "    return block - 2 * blocks\n"),
    ),
    "tests/test_record.py::test_products_are_done_again_with_their_factors_and_on_scratch_memory": (
        ("fastlora/record.py", "product.beta, product.alpha)", "product.beta, 1.0)"),
        ("fastlora/record.py", 'and factors.get("beta", 1.0) else None', "else None"),
        ("csrc/record.h", "offset + m.offset / static_cast<int64_t>(like.dtype().itemsize())", "offset"),
        ("csrc/record.h", "else if (product.alpha == 1.0)", "else if (true)"),
    ),
}  # fmt: skip


def copy_tree(folder: Path) -> None:
    """What git knows of, and what was compiled here. What is compiled there is to be compiled fast."""
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    built = [str(file.relative_to(ROOT)) for file in (ROOT / "fastlora").glob("*.so")]
    for name in [*names.stdout.splitlines(), *built]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    setup = folder / "setup.py"
    setup.write_text(setup.read_text().replace('"-O3"', '"-O1"').replace('"-O2"', '"-O0"'))


@contextlib.contextmanager
def planted(name: str, old: str, new: str, folder: Path) -> Iterator[None]:
    """The fault in its file, compiled where that is C++; all is put back after it, times of change too."""
    kept, file = folder.with_name("kept"), folder / name
    compiled = list((folder / "fastlora").glob("*.so")) if name.startswith("csrc") else []
    kept.mkdir(exist_ok=True)
    for one in (file, *compiled):
        shutil.copy2(one, kept / one.name)
    text = file.read_text()
    if text.count(old) != 1:
        raise LookupError(f"the text stands there {text.count(old)} times")
    file.write_text(text.replace(old, new))
    try:
        if compiled:
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            subprocess.run(build, cwd=folder, check=True, capture_output=True)
            if not all(one.exists() for one in compiled):  # they are optional
                raise LookupError("it does not compile")
        yield
    finally:
        for one in (file, *compiled):
            shutil.copy2(kept / one.name, one)


def passes(test: str, folder: Path) -> bool:
    interpret = str(int(test.startswith("tests/kernels")))
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "TRITON_INTERPRET": interpret,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode in (2, 3, 4, 5):  # not a failure of the test: it could not even be asked
        raise LookupError(f"pytest ended with status {done.returncode}: {done.stdout[-300:]}")
    return done.returncode == 0


def main(words: list[str]) -> int:
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "tree"
        copy_tree(folder)
        for test, faults in FAULTS.items():
            chosen = [fault for fault in faults if not words or any(word in text for word in words for text in fault)]
            if chosen and not passes(test, folder):
                chosen, counts["red"] = [], counts.get("red", 0) + 1
                print(f"red without a fault: {test}", flush=True)
            for name, old, new in chosen:
                began = time.monotonic()
                try:
                    with planted(name, old, new, folder):
                        said = "SURVIVES" if passes(test, folder) else "caught"
                except LookupError as error:
                    said = f"STALE, {error}"
                counts[said.split(",")[0]] = counts.get(said.split(",")[0], 0) + 1
                shown = f"{name}: {' '.join(old.split())[:60]}"
                print(f"{said:<9} {time.monotonic() - began:4.0f} s  {shown}  [{test}]", flush=True)
    print(", ".join(f"{count} {said}" for said, count in counts.items()) or f"no fault holds {' or '.join(words)}")
    return int(counts.keys() != {"caught"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only faults whose file or texts hold one of them")
    sys.exit(main(parser.parse_args().words))
