"""`python -m kvserve`."""

from kvserve.cli.app import main

main()
