"""`python -m edgekd`, which is also what a launcher starts: `torchrun --nproc-per-node 4 -m edgekd distill`."""

from __future__ import annotations

from edgekd.cli import main

if __name__ == "__main__":
    main()
