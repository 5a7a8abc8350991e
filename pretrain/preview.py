"""``python -m pretrain preview --config F --out page.html``: what the model really sees.

The first pictures of a step in one HTML file: the source with the crop, the picture as each backend
makes it and as it is mixed, the operations drawn for it, its partner, and the mixture's labels.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from l2vit import cli, files
from l2vit.train import tasks
from l2vit.train.config import TrainConfig


@cli.program("pretrain preview")
def main(argv: Sequence[str]) -> None:
    """Write the page the arguments ask for."""
    parser = cli.parser("python -m pretrain preview", __doc__, keys_of=TrainConfig)
    cli.add_config(parser)
    parser.add_argument("--out", type=Path, required=True, help="HTML file to write")
    parser.add_argument("--images", type=int, default=16, help="pictures to show")
    parser.add_argument("--images-seen", type=int, default=0, help="which step of the run")
    options = cli.parse(parser, argv)
    settings = tasks.load_classification(
        options.config, options.overrides, program="pretrain preview"
    )
    from pretrain import preview_page  # torch: not needed for --help

    images = preview_page.shown(settings, options.images)
    page = preview_page.page(settings, images=images, images_seen=options.images_seen)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(options.out, page)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    sys.exit(main())
