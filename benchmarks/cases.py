"""The suite by name: which layers are measured, in which direction, in order of importance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatch

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
FORWARD, TRAIN = "forward", "forward+backward"
PLAIN, COMPILED, GRAPH = "plain", "compiled", "graph"

CLASSIFIER = (
    (64, 100, 128, 2),
    (960, 768, 768, 16),
    (960, 768, 2304, 16),
    (960, 768, 3072, 16),
    (960, 3072, 768, 16),
    (4096, 768, 768, 8),
    (2048, 384, 384, 8),
    (2048, 384, 1536, 8),
)
LLAMA = {  # projections that share a shape are measured once: (K, N)
    "llama3-8b": {"qo": (4096, 4096), "kv": (4096, 1024), "gateup": (4096, 14336), "down": (14336, 4096)},
    "llama3-70b": {"qo": (8192, 8192), "kv": (8192, 1024), "gateup": (8192, 28672), "down": (28672, 8192)},
}
LLAMA_M = (1, 16, 512, 2048, 8192, 16384)
LORAFUSION_KN, LORAFUSION_M = (4096, 5120, 8192), (2048, 4096, 8192)
RANKS, RANK_SHAPE = (4, 16, 64, 128), (4096, 4096, 4096)


@dataclass(frozen=True)
class Case:
    """One LoRA linear layer: x (M, K), weight (N, K), lora_A (R, K), lora_B (N, R)."""

    family: str
    M: int
    K: int
    N: int
    R: int
    dtype: str
    dropout: float
    base: str = ""  # "nf4": the weight is bitsandbytes' NF4 with double quantisation
    dora: bool = False
    adapters: int = 1  # over the weight, each with its share of the rows
    projections: int = 1  # that share x

    @property
    def name(self) -> str:
        drop = f"-p{self.dropout:g}" if self.dropout else ""
        kind = f"-{self.base}" * bool(self.base) + "-dora" * self.dora
        kind += f"-{self.adapters}adapters" * (self.adapters > 1) + f"-{self.projections}share" * (self.projections > 1)
        return f"{self.family}-{self.M}x{self.K}x{self.N}-r{self.R}-{SHORT[self.dtype]}{drop}{kind}"

    @property
    def plain(self) -> bool:
        return not self.base and not self.dora and not self.several

    @property
    def several(self) -> bool:
        return self.adapters > 1 or self.projections > 1

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Job:
    """A case in one direction, all its contenders in one interleaved run. The lower `rank`, the earlier it runs."""

    case: Case
    direction: str
    rank: int
    modes: tuple[str, ...] = (PLAIN,)

    @property
    def name(self) -> str:
        return f"{self.case.name}/{self.direction}"


def classifier(dtype: str, dropout: float) -> list[Case]:
    """The layers of the project's own text classifiers, the tiny one included."""
    return [Case("classifier", *shape, dtype, dropout) for shape in CLASSIFIER]


def lorafusion(dtype: str = "bfloat16", dropout: float = 0.1) -> list[Case]:
    """The kernel shapes of LoRAFusion's own evaluation."""
    return [Case("lorafusion", M, KN, KN, 16, dtype, dropout) for KN in LORAFUSION_KN for M in LORAFUSION_M]


def llama(model: str, dropout: float, rows: tuple[int, ...] = LLAMA_M) -> list[Case]:
    """Every projection of a Llama-3 block in bfloat16."""
    return [
        Case(f"{model}-{name}", M, K, N, 16, "bfloat16", dropout) for M in rows for name, (K, N) in LLAMA[model].items()
    ]


def ranks() -> list[Case]:
    """One large layer at several ranks."""
    return [Case("rank", *RANK_SHAPE, R, "bfloat16", 0.1) for R in RANKS]


def variants(case: Case) -> list[Case]:
    """`case` as QLoRA, DoRA and both."""
    return [replace(case, base="nf4"), replace(case, dora=True), replace(case, base="nf4", dora=True)]


def several(case: Case) -> list[Case]:
    """`case` with eight adapters, and as query, key and value of one x."""
    return [replace(case, adapters=8), replace(case, projections=3)]


def cpu_jobs() -> list[Job]:
    """What two cores measure in about ten minutes. float16 has no fast product there: training steps only, last."""
    jobs = []
    for dtype, rank in (("float32", 0), ("bfloat16", 1)):
        for dropout in (0.0, 0.1):
            for case in classifier(dtype, dropout):
                compiled = case.M == 960 and case.N == case.K and (dtype == "float32") == (dropout > 0)
                jobs.append(Job(case, TRAIN, rank, (PLAIN, COMPILED) if compiled else (PLAIN,)))
                jobs.append(Job(case, FORWARD, 2))
    for dtype in ("bfloat16", "float32"):
        for sizes in ((64, 100, 128, 2), (960, 768, 768, 16), (512, 1024, 4096, 16)):
            jobs += [Job(case, TRAIN, 2) for case in variants(Case("variant", *sizes, dtype, 0.0))]
        for sizes in ((64, 100, 128, 2), (960, 768, 768, 16)):
            for dropout in (0.0, 0.1):
                jobs += [Job(case, TRAIN, 2) for case in several(Case("several", *sizes, dtype, dropout))]
    jobs += [Job(case, FORWARD, 3) for case in llama("llama3-8b", 0.0, (1, 16))]
    jobs += [Job(Case("llama3-8b-qo", 512, 4096, 4096, 16, "bfloat16", 0.1), TRAIN, 3)]
    jobs += [Job(case, TRAIN, 4) for case in classifier("float16", 0.0)]
    return sorted(jobs, key=lambda job: job.rank)


def gpu_jobs() -> list[Job]:
    """What a GPU measures, the headline first."""
    captured, everything = (PLAIN, GRAPH), (PLAIN, COMPILED, GRAPH)
    headline = [Case("lorafusion", 8192, 4096, 4096, 16, "bfloat16", p) for p in (0.1, 0.0)]
    jobs = [Job(headline[0], TRAIN, 0, everything), Job(headline[1], TRAIN, 0, captured)]
    jobs += [Job(case, TRAIN, 1, captured) for case in lorafusion()]
    for dropout in (0.1, 0.0):
        jobs += [
            Job(case, TRAIN, 2, captured) for dtype in ("bfloat16", "float32") for case in classifier(dtype, dropout)
        ]
        jobs += [Job(case, TRAIN, 4, captured) for case in llama("llama3-8b", dropout, (512, 2048, 8192))]
        jobs += [Job(case, TRAIN, 6, captured) for case in llama("llama3-70b", dropout, (512, 2048, 8192))]
        jobs += [Job(case, TRAIN, 8, captured) for case in classifier("float16", dropout)]
    jobs += [Job(case, FORWARD, 3, captured) for case in llama("llama3-8b", 0.0, (1, 16))]
    jobs += [Job(case, TRAIN, 3, captured) for case in ranks()]
    jobs += [Job(case, TRAIN, 3) for one in headline for case in variants(one)]
    jobs += [
        Job(case, TRAIN, 3, captured) for one in [*headline, *classifier("bfloat16", 0.1)] for case in several(one)
    ]
    jobs += [Job(case, TRAIN, 4) for one in llama("llama3-8b", 0.0, (512, 8192)) for case in variants(one)]
    jobs += [Job(case, FORWARD, 5, captured) for case in headline]
    jobs += [Job(case, TRAIN, 5, captured) for case in lorafusion("float16")[:3] + lorafusion("float32")[:1]]
    jobs += [Job(case, FORWARD, 6, captured) for case in llama("llama3-70b", 0.0, (1, 16))]
    jobs += [Job(case, FORWARD, 7) for dtype in ("bfloat16", "float32") for case in classifier(dtype, 0.1)]
    jobs += [Job(case, FORWARD, 7) for case in lorafusion() + lorafusion(dropout=0.0)]
    for model in LLAMA:
        jobs += [Job(case, FORWARD, 9) for case in llama(model, 0.0, LLAMA_M[2:])]
        jobs += [Job(case, TRAIN, 9) for case in llama(model, 0.1, (1, 16, 16384))]
    unique = {job.name: job for job in sorted(jobs, key=lambda job: job.rank, reverse=True)}
    return sorted(unique.values(), key=lambda job: job.rank)


def quick(jobs: list[Job], count: int = 16) -> list[Job]:
    """A spread of `count` jobs, the most important first, none compiled."""
    first = [job for job in jobs if job.direction == TRAIN and job.case.dtype != "float16"]
    spread = first[:: max(1, len(first) // count)][:count]
    return [replace(job, modes=tuple(mode for mode in job.modes if mode != COMPILED)) for job in spread]


def select(jobs: list[Job], patterns: list[str] | None) -> list[Job]:
    """The jobs whose case or full name matches one of the shell patterns; all of them for no pattern."""
    if not patterns:
        return jobs
    return [job for job in jobs if any(fnmatch(name, one) for name in (job.name, job.case.name) for one in patterns)]


def jobs_for(device: torch.device) -> list[Job]:
    return gpu_jobs() if device.type == "cuda" else cpu_jobs()
