"""All that may follow an instruction's name. What is not here is not understood, and refused: nothing is ignored."""

from __future__ import annotations

import re

INTEGER, BITS, HALF = r"[us](16|32|64)", r"b(16|32|64)", r"(bf16|f16)(x2)?"
FLOAT, ROUNDED = r"(ftz\.)?f32|f64", rf"(rn\.)?((ftz\.)?f32|f64|f32x2|{HALF})"
SCOPE, SHARED, TYPE = r"(cta|cluster|gpu|sys)", r"shared(::cta|::cluster)?", r"[busf](8|16|32|64)"
HINT = r"((ca|cg|cs|lu|cv|wb|wt|nc|L1::evict_\w+|L1::no_allocate|L2::evict_\w+|L2::\d+B)\.)*"
PLACE = rf"((global|local|{SHARED})\.)?{HINT}(v[248]\.)?{TYPE}"
ATOMIC = rf"({SCOPE}\.)?((global|{SHARED})\.)?(add|min|max|and|or|xor|exch|cas|inc|dec)\.[busf](32|64)"
MATRIX = r"sync\.aligned\.m8n8\.x[124]\.(trans\.)?shared(::cta)?\.b16"
MBARRIER = rf"((relaxed|acquire|release)\.{SCOPE}\.)?shared(::cta)?\.b64"
REDUCE = rf"(rn\.)?f32\.(bf16|f16)|{ROUNDED}"  # the first is sm_100's: a half and a float32

FORMS = {
    "add": rf"{INTEGER}|{REDUCE}",
    "sub": rf"{INTEGER}|{REDUCE}",
    "mul": rf"(lo|hi)\.{INTEGER}|wide\.[us](16|32)|{ROUNDED}",
    "mad": rf"(lo|hi)\.{INTEGER}|wide\.[us](16|32)",
    "fma": rf"rn\.((ftz\.)?f32|f64|f32x2|{HALF})",
    "div": rf"{INTEGER}|(full|approx|rn)\.(ftz\.)?f32|rn\.f64",
    "rem": INTEGER,
    "neg": rf"s(16|32|64)|{FLOAT}|{HALF}",
    "abs": rf"s(16|32|64)|{FLOAT}|{HALF}",
    "min": rf"{INTEGER}|(ftz\.)?(NaN\.)?f32|f64|(NaN\.)?{HALF}",
    "max": rf"{INTEGER}|(ftz\.)?(NaN\.)?f32|f64|(NaN\.)?{HALF}",
    "rcp": r"(approx|rn)\.(ftz\.)?f32",
    "sqrt": r"(approx|rn)\.(ftz\.)?f32",
    "rsqrt": r"approx\.(ftz\.)?f32",
    "ex2": r"approx\.(ftz\.)?f32",
    "lg2": r"approx\.(ftz\.)?f32",
    "and": rf"pred|{BITS}",
    "or": rf"pred|{BITS}",
    "xor": rf"pred|{BITS}",
    "not": rf"pred|{BITS}",
    "shl": BITS,
    "shr": r"[bus](16|32|64)",
    "shf": r"[lr]\.(wrap|clamp)\.b32",
    "bfe": r"[us]32",
    "bfi": "b32",
    "prmt": "b32",
    "lop3": "b32",
    "popc": r"b(32|64)",
    "clz": r"b(32|64)",
    "brev": "b32",
    "setp": rf"({INTEGER}|{BITS}|{FLOAT}|bf16|f16)",  # after the comparison
    "selp": r"[busf](16|32|64)",
    "mov": r"pred|[busf](16|32|64)",
    "cvta": r"(to\.)?(param|shared|global|local)\.u64",
    "cvt": rf"((rn|rna|rzi|rni|rmi|rpi|ftz)\.)*(f16x2|bf16x2|tf32|bf16|{TYPE})\.(bf16|{TYPE})",
    "ld": rf"(weak\.|volatile\.|(relaxed|acquire)\.{SCOPE}\.)?{PLACE}|param(::entry|::func)?\.(v[248]\.)?{TYPE}",
    "st": rf"(weak\.|volatile\.|(relaxed|release)\.{SCOPE}\.)?{PLACE}|param(::func)?\.(v[248]\.)?{TYPE}",
    "atom": rf"((relaxed|acquire|release|acq_rel)\.)?{ATOMIC}",
    "red": rf"((relaxed|release)\.)?{ATOMIC}",
    "cp": rf"async\.(ca|cg)\.{SHARED}\.global(\.L2::\d+B)?|async\.(commit_group|wait_group|wait_all)"
          rf"|async\.bulk\.(commit_group|wait_group(\.read)?)"
          rf"|async\.bulk(\.tensor\.[1-5]d)?\.{SHARED}\.global(\.tile)?\.mbarrier::complete_tx::bytes(\.L2::cache_hint)?"
          r"|async\.bulk(\.tensor\.[1-5]d)?\.global\.shared::cta(\.tile)?\.bulk_group(\.L2::cache_hint)?",
    "ldmatrix": MATRIX,
    "stmatrix": MATRIX,
    "mma": r"sync\.aligned\.m16n8k\d+\.row\.col\.f32\.(bf16\.bf16|f16\.f16|tf32\.tf32)\.f32",
    "wgmma": r"(fence|commit_group|wait_group)\.sync\.aligned"
             r"|mma_async\.sync\.aligned\.m64n\d+k\d+\.f32\.(bf16\.bf16|f16\.f16|tf32\.tf32)",
    "shfl": r"sync\.(up|down|bfly|idx)\.b32",
    "vote": r"sync\.((any|all|uni)\.pred|ballot\.b32)",
    "redux": r"sync\.((add|min|max)\.[us]32|(and|or|xor)\.b32)",
    "elect": "sync",
    "activemask": "b32",
    "fence": rf"(acq_rel|sc)\.{SCOPE}|proxy\.async(\.(global|{SHARED}))?|mbarrier_init\.release\.cluster",
    "membar": "cta|gl|sys",
    "mbarrier": rf"(init|inval)\.shared(::cta)?\.b64|(arrive|expect_tx|arrive\.expect_tx)\.{MBARRIER}"
                rf"|(try_wait|test_wait)\.(parity\.)?{MBARRIER}",
    "createpolicy": r"fractional\.L2::\w+\.b64",
    "prefetch": r"(param\.)?tensormap|global\.L[12](::evict_\w+)?",
    "setmaxnreg": r"(inc|dec)\.sync\.aligned\.u32",
    "nanosleep": "u32",
    "griddepcontrol": "wait|launch_dependents",
    "bra": "(uni)?",
    "ret": "(uni)?",
    "exit": "",
    "trap": "",
    "bar": r"(cta\.)?(sync|arrive)|warp\.sync",
    "barrier": r"(cta\.)?(sync|arrive)(\.aligned)?",
}  # fmt: skip
COMPARISON = r"(eq|ne|lt|le|gt|ge|lo|ls|hi|hs|equ|neu|ltu|leu|gtu|geu|num|nan)\.((and|or|xor)\.)?"
FORMS["setp"] = COMPARISON + FORMS["setp"]
FORMS = {name: re.compile(form) for name, form in FORMS.items()}


def understood(op: str) -> bool:
    name, _, rest = op.partition(".")
    return name in FORMS and FORMS[name].fullmatch(rest) is not None
