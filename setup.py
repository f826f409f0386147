"""The build; everything but the optional CUDA C++ library is declared in pyproject.toml."""

from setuptools import setup

setup()
