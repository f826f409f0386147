"""The examples of the READMEs run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "fastlora" / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGES, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES)
def test_the_example_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 7 * 1024
    pages = PAGES.split("\n# ")
    assert all(len(page.strip().splitlines()) <= 30 for page in pages)
