"""Train from a configuration: python scripts/train.py CONFIG.yaml [key.path=value ...].

The same as `flowkern train`; a file, so that accelerate launch and torchrun can start it.
"""

import sys

from flowkern.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
