"""`python -m qnas.commands`: the command line as a module, for launchers such as torchrun."""

from qnas.commands.cli import main

if __name__ == "__main__":
    main()
