"""`python -m fluxsmith` is the `fluxsmith` command."""

from fluxsmith.cli.main import main

main()
