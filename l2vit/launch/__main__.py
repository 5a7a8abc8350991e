"""``python -m l2vit.launch SCRIPT ARGS``: what ``bash launch/pretrain.sh ARGS`` runs."""

from __future__ import annotations

import sys

from l2vit.launch.supervisor import main

sys.exit(main(sys.argv[1:]))
