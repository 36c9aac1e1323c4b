"""kvserve: the longest context at the best KV-cache precision that the free memory allows."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("kvserve")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0.0.0+checkout"
