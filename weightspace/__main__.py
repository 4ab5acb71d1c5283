"""`python -m weightspace` is the console script `weightspace`."""

from weightspace.cli import main

main()
