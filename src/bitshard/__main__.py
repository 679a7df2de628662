"""`python -m bitshard` is `bitshard`."""

from bitshard.cli import main

main()
