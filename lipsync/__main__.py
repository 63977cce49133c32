"""`python -m lipsync`."""

from lipsync.cli import main

main()
