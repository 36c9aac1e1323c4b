"""kvserve: the longest context at the best KV-cache precision that the free memory allows."""


def __getattr__(name: str) -> str:
    """`__version__`, found out when it is asked for: looking it up takes 0.05 s."""
    if name != "__version__":
        raise AttributeError(f"module 'kvserve' has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

    try:
        return version("kvserve")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "0.0.0+checkout"
