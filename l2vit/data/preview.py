"""The former address of ``python -m pretrain preview``."""

import sys

from l2vit import cli
from pretrain.preview import main

if __name__ == "__main__":
    sys.exit(cli.run(main, program="preview"))
