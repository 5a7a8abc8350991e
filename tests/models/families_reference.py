"""FLatten and InLine transcribed from their description, in float64, on the released key names.

Plain formulas: attention as a full matrix of weights, convolutions as sums of shifted pictures,
windows as lists of pixels. One image at a time; nothing of l2vit is used.
"""

import math
from dataclasses import dataclass

import torch


@dataclass
class Network:
    """One released network: what its key names do not tell."""

    backbone: str  # swin, pvt, pvt_v2, cswin, deit
    kind: str  # focused, injective
    dims: tuple
    depths: tuple
    heads: tuple
    types: str  # one letter per stage: L linear, S softmax
    size: int
    window: int = 7
    classes: int = 7
    sr: tuple = (1, 1, 1, 1)  # of softmax blocks in pvt

    def side(self, stage):
        return self.size // 16 if self.backbone == "deit" else self.size // (4 * 2**stage)

    def linear(self, stage):
        return self.types[stage] == "L"

    def ratio(self, stage):
        return 1 if self.linear(stage) else self.sr[stage]


# ---------------------------------------------------------------- tensors of a released file


def core_shapes(net, stage, dim, heads, tokens):
    d = dim // heads
    if net.kind == "focused":
        return {
            "scale": (1, 1, dim),
            "positional_encoding": (1, tokens, dim),
            "dwc.weight": (d, 1, 5, 5),
            "dwc.bias": (d,),
        }
    return {
        "residual.0.weight": (dim, d, 1),
        "residual.0.bias": (dim,),
        "residual.2.weight": (9 * dim, d, 1),
        "residual.2.bias": (9 * dim,),
    }


def affine(name, out, inside=None, bias=True):
    shapes = {f"{name}.weight": (out,) if inside is None else (out, *inside)}
    return {**shapes, f"{name}.bias": (out,)} if bias else shapes


def block_shapes(net, stage, ratio=4):
    dim, heads, side = net.dims[stage], net.heads[stage], net.side(stage)
    prefix = "" if net.backbone == "cswin" else "attn."
    shapes = {
        **affine("norm1", dim),
        **affine("norm2", dim),
        **affine(f"{prefix}proj", dim, (dim,)),
    }
    shapes |= affine("mlp.fc1", ratio * dim, (dim,)) | affine("mlp.fc2", dim, (ratio * dim,))
    if net.backbone.startswith("pvt"):
        shapes |= affine("attn.q", dim, (dim,)) | affine("attn.kv", 2 * dim, (dim,))
        r = net.ratio(stage)
        if r > 1:
            shapes |= affine("attn.sr", dim, (dim, r, r)) | affine("attn.norm", dim)
    else:
        shapes |= affine(f"{prefix}qkv", 3 * dim, (dim,))
    if net.backbone == "cswin":
        two = not net.linear(stage) and stripe(net, stage) is not None
        for b in range(2 if two else 1):
            width = dim // 2 if two else dim
            shapes |= affine(f"attns.{b}.get_v", width, (1, 3, 3))
        prefix = "attns.0."
    if net.linear(stage):
        tokens = side * side + (net.backbone == "deit")
        shapes |= {prefix + k: s for k, s in core_shapes(net, stage, dim, heads, tokens).items()}
    elif net.backbone == "swin":
        w = min(net.window, side)
        shapes["attn.relative_position_bias_table"] = ((2 * w - 1) ** 2, heads)
    if net.backbone == "pvt_v2":
        shapes |= affine("mlp.dwconv.dwconv", ratio * dim, (1, 3, 3))
    return shapes


def released_shapes(net):
    """Every learned tensor of the network's file, by its released name."""
    dims, shapes = net.dims, {}
    stages = range(len(dims))
    mlp = (8, 8, 4, 4) if net.backbone.startswith("pvt") else (4, 4, 4, 4)
    name = {
        "swin": "layers.{0}.blocks.{2}.",
        "pvt": "block{1}.{2}.",
        "pvt_v2": "block{1}.{2}.",
        "cswin": "stage{1}.{2}.",
        "deit": "blocks.{2}.",
    }[net.backbone]
    for i in stages:
        for j in range(net.depths[i]):
            own = block_shapes(net, i, mlp[i])
            shapes |= {name.format(i, i + 1, j) + key: shape for key, shape in own.items()}
    inside = (3, *dims[:-1])
    for i in stages:
        if net.backbone.startswith("pvt"):
            kernel = (4 if i == 0 else 2) if net.backbone == "pvt" else (7 if i == 0 else 3)
            conv = (inside[i], kernel, kernel)
            shapes |= affine(f"patch_embed{i + 1}.proj", dims[i], conv)
            shapes |= affine(f"patch_embed{i + 1}.norm", dims[i])
            if net.backbone == "pvt":
                shapes[f"pos_embed{i + 1}"] = (1, net.side(i) ** 2, dims[i])
            else:
                shapes |= affine(f"norm{i + 1}", dims[i])
        elif net.backbone == "cswin" and i:
            shapes |= affine(f"merge{i}.conv", dims[i], (dims[i - 1], 3, 3))
            shapes |= affine(f"merge{i}.norm", dims[i])
        elif net.backbone == "swin" and i:
            down = f"layers.{i - 1}.downsample"
            shapes |= affine(f"{down}.norm", 4 * dims[i - 1])
            shapes |= affine(f"{down}.reduction", dims[i], (4 * dims[i - 1],), bias=False)
    if net.backbone == "swin":
        shapes |= affine("patch_embed.proj", dims[0], (3, 4, 4)) | affine(
            "patch_embed.norm", dims[0]
        )
    elif net.backbone == "cswin":
        shapes |= affine("stage1_conv_embed.0", dims[0], (3, 7, 7))
        shapes |= affine("stage1_conv_embed.2", dims[0])
    elif net.backbone == "deit":
        shapes |= affine("patch_embed.proj", dims[0], (3, 16, 16))
        shapes |= {"cls_token": (1, 1, dims[0]), "pos_embed": (1, 1 + net.side(0) ** 2, dims[0])}
    if not net.backbone.startswith("pvt"):
        shapes |= affine("norm", dims[-1])
    return shapes | affine("head", net.classes, (dims[-1],))


def released_weights(net, seed=0):
    """Random tensors under the released names, of a size that keeps activations lively."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in released_shapes(net).items():
        noise = torch.randn(shape, generator=generator)
        fan = math.prod(shape[1:]) if len(shape) > 1 else 100
        is_norm = name.endswith("weight") and len(shape) == 1
        is_table = any(part in name for part in ("pos", "scale", "token"))
        weights[name] = 1 + 0.1 * noise if is_norm else noise * (0.3 if is_table else fan**-0.5)
    return weights


# ---------------------------------------------------------------- pieces, all on one image


def normalise(x, weights, name, eps):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    out = x @ weights[f"{name}.weight"].T
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def convolve(picture, kernel, bias, stride, padding):
    """(C, H, W) with kernel (O, C, k, k) to (O, H', W'): a sum over the kernel's positions."""
    k = kernel.shape[-1]
    c, h, w = picture.shape
    padded = picture.new_zeros(c, h + 2 * padding, w + 2 * padding)
    padded[:, padding : padding + h, padding : padding + w] = picture
    rows, columns = (h + 2 * padding - k) // stride + 1, (w + 2 * padding - k) // stride + 1
    out = bias[:, None, None].expand(len(bias), rows, columns).clone()
    for y in range(k):
        for x in range(k):
            seen = padded[
                :,
                y : y + stride * (rows - 1) + 1 : stride,
                x : x + stride * (columns - 1) + 1 : stride,
            ]
            out += torch.einsum("oc,chw->ohw", kernel[:, :, y, x], seen)
    return out


def depthwise(picture, kernels, bias):
    """(C, H, W), one k×k kernel (C, k, k) per channel, zero padding to the same size."""
    k = kernels.shape[-1]
    c, h, w = picture.shape
    padded = picture.new_zeros(c, h + k - 1, w + k - 1)
    padded[:, k // 2 : k // 2 + h, k // 2 : k // 2 + w] = picture
    out = torch.zeros_like(picture)
    for y in range(k):
        for x in range(k):
            out += kernels[:, y, x, None, None] * padded[:, y : y + h, x : x + w]
    return out + bias[:, None, None]


def picture_of(tokens, side):
    return tokens.T.reshape(-1, side, side)


def tokens_of(picture):
    return picture.flatten(1).T


def focused_matrices(q, k, weights, heads, prefix=""):
    """The weights of each head, (heads, N, n), and q, k after focusing (focusing, steps 1-4)."""
    softplus = torch.log(1 + torch.exp(weights[f"{prefix}scale"][0, 0]))
    k = k + weights[f"{prefix}positional_encoding"][0]
    q, k = ((t.clamp(min=0) + 1e-6) / softplus for t in (q, k))
    q, k = (
        t**3 * t.pow(2).sum(-1, keepdim=True).sqrt() / t.pow(6).sum(-1, keepdim=True).sqrt()
        for t in (q, k)
    )
    rows = []
    for part_q, part_k in zip(q.chunk(heads, -1), k.chunk(heads, -1), strict=True):
        z = 1 / (part_q @ part_k.mean(0) + 1e-6)
        rows.append(z[:, None] * (part_q @ part_k.T) / len(part_k))
    return torch.stack(rows), q, k


def stretch(tokens, count):
    """1-D linear interpolation of (n, C) rows to ``count``, align_corners False."""
    n = len(tokens)
    rows = []
    for i in range(count):
        at = max((i + 0.5) * n / count - 0.5, 0)
        low = int(at)
        high = min(low + 1, n - 1)
        rows.append(tokens[low] * (1 - (at - low)) + tokens[high] * (at - low))
    return torch.stack(rows)


def focused(q, k, v, weights, prefix, heads, side):
    matrices, _, _ = focused_matrices(q, k, weights, heads, prefix)
    out = []
    grid_v = v if len(v) == side * side else stretch(v, side * side)
    for matrix, values, grid in zip(
        matrices, v.chunk(heads, -1), grid_v.chunk(heads, -1), strict=True
    ):
        local = depthwise(
            picture_of(grid, side),
            weights[f"{prefix}dwc.weight"][:, 0],
            weights[f"{prefix}dwc.bias"],
        )
        out.append(matrix @ values + tokens_of(local))
    return torch.cat(out, -1)


def injective_matrices(q, k, heads):
    """a_ij of each head, (heads, N, n)."""
    rows = []
    for part_q, part_k in zip(q.chunk(heads, -1), k.chunk(heads, -1), strict=True):
        n, d = part_k.shape
        scores = part_q @ part_k.T * d**-0.5 / n
        rows.append(scores - scores.mean(1, keepdim=True) + 1 / n)
    return torch.stack(rows)


def injective(q, k, v, source, weights, prefix, heads, side, skip=0):
    parts = zip(injective_matrices(q, k, heads), v.chunk(heads, -1), strict=True)
    out = torch.cat([matrix @ values for matrix, values in parts], -1)
    mean = source.mean(0)
    d = mean.shape[0] // heads

    def grouped(x, name):
        weight, bias = weights[f"{prefix}{name}.weight"][:, :, 0], weights[f"{prefix}{name}.bias"]
        per = len(weight) // heads
        pieces = [weight[g * per : (g + 1) * per] @ x[g * d : (g + 1) * d] for g in range(heads)]
        return torch.cat(pieces) + bias

    kernels = grouped(gelu(grouped(mean, "residual.0")), "residual.2").view(-1, 3, 3)
    local = depthwise(picture_of(v[skip:], side), kernels, torch.zeros_like(mean))
    return out + torch.cat([torch.zeros_like(out[:skip]), tokens_of(local)])


def softmax(q, k, v, heads, added=None):
    out = []
    for g, (a, b, c) in enumerate(
        zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True)
    ):
        scores = a @ b.T * a.shape[-1] ** -0.5
        scores = scores if added is None else scores + added[g]
        weights = torch.exp(scores - scores.max(1, keepdim=True).values)
        out.append(weights / weights.sum(1, keepdim=True) @ c)
    return torch.cat(out, -1)


def shifted_windows(q, k, v, weights, name, heads, side, window, index):
    """Swin's softmax attention, window by window, pixel by pixel."""
    w, shift = (side, 0) if side <= window else (window, window // 2 if index % 2 else 0)
    table = weights[f"{name}.relative_position_bias_table"]
    cell = [(y, x) for y in range(w) for x in range(w)]
    bias = torch.stack(
        [
            torch.stack([table[(a - c + w - 1) * (2 * w - 1) + b - d + w - 1] for c, d in cell])
            for a, b in cell
        ]
    )  # (w², w², heads)

    def region(at):
        return 0 if at < side - w else 1 if at < side - shift else 2

    out = torch.zeros_like(q)
    for top in range(0, side, w):
        for left in range(0, side, w):
            rolled = [(top + y, left + x) for y, x in cell]
            rows = [(y + shift) % side * side + (x + shift) % side for y, x in rolled]
            labels = [(region(y), region(x)) if shift else 0 for y, x in rolled]
            mask = torch.tensor([[0.0 if a == b else -100.0 for b in labels] for a in labels])
            added = bias.permute(2, 0, 1) + mask
            out[rows] = softmax(q[rows], k[rows], v[rows], heads, added)
    return out


def stripe(net, stage):
    """Width of CSwin's stripes, None for one window over the whole grid."""
    width = (1, 2, net.window, net.window)[stage]
    return None if stage == 3 or net.side(stage) == width or net.side(stage) < width else width


def crossed(q, k, v, weights, name, heads, side, width):
    """CSwin's softmax attention with LePE inside each stripe."""
    halves = 1 if width is None else 2
    out = []
    for b, (a, c, e) in enumerate(
        zip(q.chunk(halves, -1), k.chunk(halves, -1), v.chunk(halves, -1), strict=True)
    ):
        tall, wide = (side, side) if width is None else ((side, width), (width, side))[b]
        half = torch.zeros_like(a)
        kernel, bias = weights[f"{name}.{b}.get_v.weight"][:, 0], weights[f"{name}.{b}.get_v.bias"]
        for top in range(0, side, tall):
            for left in range(0, side, wide):
                rows = [
                    y * side + x for y in range(top, top + tall) for x in range(left, left + wide)
                ]
                local = depthwise(e[rows].T.reshape(-1, tall, wide), kernel, bias)
                half[rows] = softmax(a[rows], c[rows], e[rows], heads // halves) + tokens_of(local)
        out.append(half)
    return torch.cat(out, -1)


# ---------------------------------------------------------------- networks


def attention(net, x, raw, weights, name, stage, index):
    """Attention of one block on normalised tokens (N, C), output projection included."""
    heads, side = net.heads[stage], net.side(stage)
    inner = f"{name}attn." if net.backbone != "cswin" else name
    if net.backbone.startswith("pvt"):
        keys, r = x, net.ratio(stage)
        if r > 1:
            kernel, bias = weights[f"{inner}sr.weight"], weights[f"{inner}sr.bias"]
            keys = tokens_of(convolve(picture_of(x, side), kernel, bias, r, 0))
            keys = normalise(keys, weights, f"{inner}norm", 1e-5)
        q = linear(x, weights, f"{inner}q")
        k, v = linear(keys, weights, f"{inner}kv").chunk(2, -1)
    else:
        q, k, v = linear(x, weights, f"{inner}qkv").chunk(3, -1)
    if net.linear(stage):
        core = f"{name}attns.0." if net.backbone == "cswin" else inner
        if net.kind == "focused":
            out = focused(q, k, v, weights, core, heads, side)
        else:
            source = raw if net.backbone == "cswin" else x
            skip = 1 if net.backbone == "deit" else 0
            out = injective(q, k, v, source, weights, core, heads, side, skip)
        if net.backbone == "cswin":
            kernel, bias = weights[f"{core}get_v.weight"][:, 0], weights[f"{core}get_v.bias"]
            out = out + tokens_of(depthwise(picture_of(v, side), kernel, bias))
    elif net.backbone == "swin":
        out = shifted_windows(q, k, v, weights, f"{name}attn", heads, side, net.window, index)
    elif net.backbone == "cswin":
        out = crossed(q, k, v, weights, f"{name}attns", heads, side, stripe(net, stage))
    else:
        out = softmax(q, k, v, heads)
    return linear(out, weights, f"{inner}proj")


def mlp(net, x, weights, name, stage):
    x = linear(x, weights, f"{name}mlp.fc1")
    if net.backbone == "pvt_v2":
        conv = f"{name}mlp.dwconv.dwconv"
        picture = picture_of(x, net.side(stage))
        x = tokens_of(depthwise(picture, weights[f"{conv}.weight"][:, 0], weights[f"{conv}.bias"]))
    return linear(gelu(x), weights, f"{name}mlp.fc2")


def embed(net, x, weights, stage):
    """The tokens (N, C) a stage starts from; x is the image (3, H, W) or the tokens before."""
    if stage and net.backbone != "deit":
        x = picture_of(x, net.side(stage - 1))
    if net.backbone == "swin" and stage:
        cells = [x[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
        down = f"layers.{stage - 1}.downsample"
        merged = normalise(tokens_of(torch.cat(cells)), weights, f"{down}.norm", 1e-5)
        return linear(merged, weights, f"{down}.reduction")
    conv, norm, stride, padding = {
        "swin": ("patch_embed.proj", "patch_embed.norm", 4, 0),
        "deit": ("patch_embed.proj", None, 16, 0),
        "pvt": (
            f"patch_embed{stage + 1}.proj",
            f"patch_embed{stage + 1}.norm",
            2 if stage else 4,
            0,
        ),
        "pvt_v2": (
            f"patch_embed{stage + 1}.proj",
            f"patch_embed{stage + 1}.norm",
            2 if stage else 4,
            1 if stage else 3,
        ),
        "cswin": (
            (f"merge{stage}.conv", f"merge{stage}.norm", 2, 1)
            if stage
            else ("stage1_conv_embed.0", "stage1_conv_embed.2", 4, 2)
        ),
    }[net.backbone]
    x = tokens_of(convolve(x, weights[f"{conv}.weight"], weights[f"{conv}.bias"], stride, padding))
    x = x if norm is None else normalise(x, weights, norm, 1e-5)
    if net.backbone == "deit":
        return torch.cat([weights["cls_token"][0], x]) + weights["pos_embed"][0]
    return x + weights[f"pos_embed{stage + 1}"][0] if net.backbone == "pvt" else x


def logits(net, image, weights):
    """Logits (classes,) of one image (3, H, W) in float64."""
    weights = {name: value.double() for name, value in weights.items()}
    eps = 1e-5 if net.backbone in ("swin", "cswin") else 1e-6
    x = image.double()
    for stage in range(len(net.depths)):
        x = embed(net, x, weights, stage)
        for index in range(net.depths[stage]):
            name = {
                "swin": f"layers.{stage}.blocks.{index}.",
                "cswin": f"stage{stage + 1}.{index}.",
                "deit": f"blocks.{index}.",
            }.get(net.backbone, f"block{stage + 1}.{index}.")
            y = normalise(x, weights, f"{name}norm1", eps)
            x = x + attention(net, y, x, weights, name, stage, index)
            x = x + mlp(net, normalise(x, weights, f"{name}norm2", eps), weights, name, stage)
        if net.backbone == "pvt_v2":
            x = normalise(x, weights, f"norm{stage + 1}", eps)
    if net.backbone in ("swin", "cswin", "deit"):
        x = normalise(x, weights, "norm", eps)
    return linear(x[0] if net.backbone == "deit" else x.mean(0), weights, "head")
