"""What the fork server of ``forked_ranks`` imports once, so that no rank has to."""

import contextlib
import gc
import io
import logging

with contextlib.redirect_stdout(io.StringIO()):
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import torch.utils.tensorboard  # noqa: F401

    import pretrain.train  # noqa: F401

gc.collect()
gc.freeze()  # a rank's own collections need not look at all this again
