"""`python -m kvserve`, and the command `kvserve`."""

import sys


def run() -> None:
    """Run the command line; Ctrl-C ends it quietly, also while its modules are imported."""
    try:
        from kvserve.cli.app import main  # noqa: PLC0415

        main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run()
