"""`fastlora info`: versions, devices, the paths usable here and why not, what was timed, the data found."""

from __future__ import annotations

import torch

import fastlora
from fastlora import env, tuning
from fastlora.finetune.data import found
from fastlora.finetune.run import versions
from fastlora.node import NODE


def info() -> str:
    """The lines that `fastlora info` prints."""
    lines = [f"{name:<10} {version}" for name, version in versions().items()]
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines += [f"{'GPU':<10} {name}" for name in devices or ["none"]]
    lines += [f"{'CPU':<10} {torch.get_num_threads()} threads, autograd node {_node()}"]
    lines += ["", "paths"] + [f"  {name:<8} {state}" for name, state in fastlora.paths().items()]
    for i in range(len(devices)):
        lines += [line for where, table in tuning.tables(torch.device("cuda", i)) for line in ("", where, table)]
    lines += ["", f"data (cache: {env.cache_dir()})"] + [f"  {name:<8} {place}" for name, place in found().items()]
    return "\n".join(lines)


def _node() -> str:
    if NODE is not None:
        return "in C++"
    return f"in Python (for torch {torch.__version__} none was compiled: install fastlora again, after torch)"
