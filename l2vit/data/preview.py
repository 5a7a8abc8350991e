"""The former address of ``python -m pretrain preview``."""

import sys

from pretrain.preview import main

if __name__ == "__main__":
    sys.exit(main())
