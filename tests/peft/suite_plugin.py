"""pytest plugin for PEFT's own tests: keeps the LoRA cases, fuses every layer they make, and records what happened.

Loaded with `-p suite_plugin` by `run_peft_suite.py`; the environment says where results go (SUITE_RESULTS) and whether
layers are fused (SUITE_FUSED=1). Nothing here is part of the package.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from collections import Counter
from pathlib import Path

OTHER_METHODS = ("adalora", "vblora", "randlora", "unilora", "gralora", "tinylora", "melora", "xlora")
outcomes: dict[str, str] = {}
fused_calls = 0
fallbacks: Counter[str] = Counter()


def _stand_in(name: str, **attributes) -> None:
    """PEFT's test helpers import `name` at the top; the LoRA linear cases never use it."""
    if importlib.util.find_spec(name) is None:
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
        sys.modules[name] = module


def _fuse_every_layer() -> None:
    from peft.tuners.lora import Linear

    import fastlora.peft
    from fastlora.peft import layer

    construct, compute = Linear.__init__, layer.lora_linear

    def construct_and_patch(self, *args, **kwargs):
        construct(self, *args, **kwargs)
        if type(self) is Linear:
            fastlora.peft.patch(self)

    def count_fused(*args, **kwargs):
        global fused_calls
        fused_calls += 1
        return compute(*args, **kwargs)

    def count_fallback(key, message):
        fallbacks[key[1]] += 1

    Linear.__init__ = construct_and_patch
    layer.lora_linear, layer.warn_once = count_fused, count_fallback


def pytest_configure(config):
    config.addinivalue_line("markers", "single_gpu_tests: PEFT's own marker")
    config.addinivalue_line("markers", "multi_gpu_tests: PEFT's own marker")
    config.addinivalue_line("markers", "regression: PEFT's own marker")
    config.addinivalue_line("markers", "bitsandbytes: PEFT's own marker")
    _stand_in("diffusers", StableDiffusionPipeline=None)
    _stand_in("datasets", load_dataset=None)
    _stand_in("parameterized", parameterized=None)
    if os.environ.get("SUITE_FUSED") == "1":
        _fuse_every_layer()


def pytest_collection_modifyitems(config, items):
    kept = [item for item in items if _is_lora_case(item)]
    config.hook.pytest_deselected(items=[item for item in items if not _is_lora_case(item)])
    items[:] = kept


def _is_lora_case(item) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    for name in ("config_cls", "config_class"):
        if isinstance(parameters.get(name), type):
            return parameters[name].__name__ == "LoraConfig"
    name = " ".join([item.nodeid, *item.fixturenames]).lower()
    return "lora" in name and not any(other in name for other in OTHER_METHODS)


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish(session):
    Path(os.environ["SUITE_RESULTS"]).write_text(
        json.dumps({"outcomes": outcomes, "fused_calls": fused_calls, "fallbacks": dict(fallbacks)})
    )
