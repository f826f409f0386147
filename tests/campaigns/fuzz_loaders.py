"""Coverage-guided fuzzing of the loaders; needs atheris (pip install atheris), which the tests do not.

    python -m tests.campaigns.fuzz_loaders checkpoint -max_total_time=60      else it goes on until it is stopped

The loaders are those of `tests.campaigns.loaders`.
What follows the loader's name is libFuzzer's. The corpus starts from `tests/campaigns/corpus/<loader>`, good files made
by `python -m tests.campaigns.fuzz_loaders --corpus`; what it finds interesting is kept in a temporary folder.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import warnings
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"


def main(argv: list[str]) -> int:
    from .loaders import LOADERS

    if not argv or argv[0] not in (*LOADERS, "--corpus"):
        print(f"usage: python -m tests.campaigns.fuzz_loaders {'|'.join(LOADERS)} [-max_total_time=SECONDS ...]")
        return 2
    for name in [name for name in sys.modules if name.startswith(("fastlora", f"{__package__}.loaders"))]:
        del sys.modules[name]  # to be imported again with atheris looking on
    try:
        import atheris
    except ImportError:
        print("atheris is not installed: pip install atheris")
        return 2
    with atheris.instrument_imports(include=["fastlora", "json", "safetensors"]):
        from fastlora.errors import UserError

        from .loaders import LOADERS
    warnings.simplefilter("ignore")
    name = argv[0]
    if name == "--corpus":
        for name, loader in LOADERS.items():
            (CORPUS / name).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as folder:
                (CORPUS / name / "good").write_bytes(loader.make(Path(folder)).read_bytes())
        return 0
    loader = LOADERS[name]
    folder, found = Path(tempfile.mkdtemp()), tempfile.mkdtemp()
    path = loader.make(folder)
    good = loader.load(folder)

    def one(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.suppress(UserError):
            got = loader.load(folder)
            assert not loader.summed(data) or got == good, "read as something else"

    atheris.Setup([sys.argv[0], "-rss_limit_mb=4096", *argv[1:], found, str(CORPUS / name)], one)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
