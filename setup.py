"""The build. All of it is declared in pyproject.toml but one switch, which must not be ignored silently."""

import os
import sys

from setuptools import setup

if os.environ.get("FASTLORA_BUILD_CUDA", "0") not in ("", "0"):
    sys.exit("FASTLORA_BUILD_CUDA: this version has no CUDA C++ library to build; unset it to install the rest")

setup()
