"""`python -m qnas`: the command line, for what starts modules, as torchrun does."""

from qnas.commands.cli import main

if __name__ == "__main__":
    main()
