"""What the fork server of ``forked_ranks`` imports once, so that no rank has to."""

import contextlib
import gc
import io
import logging

with contextlib.redirect_stdout(io.StringIO()):
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed.module_inject  # noqa: F401
    import torch._inductor.compile_fx
    import torch.utils.tensorboard  # noqa: F401

    import l2vit.data.loader
    import l2vit.train.classification
    import l2vit.train.kernels
    import l2vit.train.startup
    import l2vit.train.transfer  # noqa: F401
    import pretrain.train  # noqa: F401  imports no more than it needs to print its help

gc.collect()
gc.freeze()  # a rank's own collections need not look at all this again
