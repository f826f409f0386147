"""To go when `dispatch` reads its files through `fastlora.files`."""

from fastlora.files import read_regular

__all__ = ["read_regular"]
