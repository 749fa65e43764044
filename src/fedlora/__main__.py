"""`python -m fedlora` is the command `fedlora`."""

from fedlora.cli import main

if __name__ == "__main__":
    main()
