"""`python -m ltxforge` and the console script: runs the command line and turns errors into messages."""

from __future__ import annotations

from ltxforge.cli import main

if __name__ == "__main__":
    main()
