"""`python -m obsprune`, and `torchrun … -m obsprune`."""

from obsprune.cli import main

main()
