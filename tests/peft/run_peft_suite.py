"""PEFT's own LoRA tests, with stock arithmetic and with ours underneath: the same passes and the same skips.

    python tests/peft/run_peft_suite.py DIR [--files test_custom_models.py ...] [-k EXPRESSION] [--least 600]

DIR is PEFT's source distribution, unpacked, of the installed version (`pip download peft==VERSION --no-binary :all:
--no-deps`, then tar xf); `tests/` lies in it. Exit status 1 when an outcome differs, or when fewer than `--least` calls
were fused, so that nothing passes by falling back.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="PEFT's unpacked source distribution")
    parser.add_argument("--files", nargs="+", default=["test_custom_models.py", "test_lora_variants.py"])
    parser.add_argument("-k", default=None, help="pytest's -k, to run fewer cases")
    parser.add_argument("--least", type=int, default=600, help="fused calls that must be counted (default 600)")
    parser.add_argument("--timeout", type=int, default=3000, help="seconds for each of the two runs")
    args = parser.parse_args()
    missing = [name for name in args.files if not (args.directory / "tests" / name).is_file()]
    if missing:
        print(f"{args.directory / 'tests'} holds no {', '.join(missing)}", file=sys.stderr)
        return 2

    stock, fused = _run(args, "0"), _run(args, "1")
    for name, result in (("stock", stock), ("fused", fused)):
        counts = Counter(result["outcomes"].values())
        print(f"{name}: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    print(f"fused calls: {fused['fused_calls']}; by PEFT's own forward: {sum(fused['fallbacks'].values())}")
    for reason, count in sorted(fused["fallbacks"].items(), key=lambda pair: -pair[1]):
        print(f"  {count:6} x {reason}")
    differing = sorted(
        name
        for name in stock["outcomes"].keys() | fused["outcomes"].keys()
        if stock["outcomes"].get(name) != fused["outcomes"].get(name)
    )
    for name in differing:
        print(f"differs: {name}: stock {stock['outcomes'].get(name)}, fused {fused['outcomes'].get(name)}")
    if fused["fused_calls"] < args.least:
        print(f"only {fused['fused_calls']} fused calls; at least {args.least} are needed")
        return 1
    return 1 if differing or not stock["outcomes"] else 0


def _run(args: argparse.Namespace, fused: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(args.directory / "tests", Path(folder) / "tests")
        (Path(folder) / "tests" / "__init__.py").touch()  # the distribution leaves it out, and the tests need it
        results = Path(folder) / "results.json"
        path = os.pathsep.join([str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "SUITE_FUSED": fused, "SUITE_RESULTS": str(results), "PYTHONPATH": path}
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=line", "-p", "suite_plugin"]
        command += ["-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="]
        command += [f"tests/{name}" for name in args.files] + (["-k", args.k] if args.k else [])
        done = subprocess.run(
            command, cwd=folder, env=environment, timeout=args.timeout, capture_output=True, text=True
        )
        if not results.is_file():
            raise SystemExit(f"pytest did not run:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
        return json.loads(results.read_text())


if __name__ == "__main__":
    sys.exit(main())
