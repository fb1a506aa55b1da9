"""`python -m stepsmith`."""

from stepsmith.cli import main

main()
