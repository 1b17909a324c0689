"""`python -m marrq` is the program `marrq`."""

from marrq.cli import run

if __name__ == "__main__":
    run()
