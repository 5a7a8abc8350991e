"""The benchmark's transcription of the paper, and its weights in our names."""

import importlib.util
import re
import sys
from pathlib import Path

import torch

_PATH = Path(__file__).parents[2] / "benchmarks" / "transcription.py"
_SPEC = importlib.util.spec_from_file_location("transcription", _PATH)
transcription = importlib.util.module_from_spec(_SPEC)
sys.modules["transcription"] = transcription
_SPEC.loader.exec_module(transcription)

MINI = (32, (2, 2, 2, 2))
TINY = (96, (2, 2, 6, 2))


def reference(size=MINI, window=7, classes=11, seed=0):
    """The transcription with random weights far from their initial values (biases, norms too)."""
    torch.manual_seed(seed)
    model = transcription.PaperL2ViT(*size, window=window, classes=classes).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "temperature" in name:
                parameter.mul_(1 + torch.rand_like(parameter))
            elif "qkv" in name:
                parameter.mul_(4)  # denominators on both sides of the clamp
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer))
    return model.eval()


def our_names(state):
    """The reference's state in our names, by substitution (not by the table under test)."""
    result = {}
    for key, value in state.items():
        key = key.replace("downsample_layers.0.proj.proj.", "stem.layers.")
        key = key.replace("downsample_layers.0.norm.", "stem.norm.")
        key = re.sub(r"downsample_layers\.(\d)\.proj", r"stages.\1.downsample.conv", key)
        key = re.sub(r"downsample_layers\.(\d)\.norm", r"stages.\1.downsample.norm", key)
        key = re.sub(r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2.", key)
        key = key.replace("cpe.0.proj", "cpe1.conv").replace("cpe.1.proj", "cpe2.conv")
        key = key.replace("norm3", "lcm_norm").replace("local_mp.bn", "lcm.norm")
        key = key.replace("local_mp", "lcm").replace("temperature", "scale")
        result[re.sub(r"^head\.", "head.fc.", key)] = value
    return result
