"""What torchrun starts: `torchrun --nproc-per-node=8 train.py RECIPE [a.b=c ...]`."""

import sys

from hyperllama.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
