"""FLatten and InLine as networks: sizes, timm's contract, any attention in any backbone."""

import warnings

import families_reference as reference
import pytest
import timm
import torch
from timm.models import group_parameters

import l2vit  # noqa: F401
from l2vit.models.count import count_macs, count_parameters
from l2vit.models.families.cswin import CSwin
from l2vit.models.families.deit import Deit
from l2vit.models.families.pvt import Pvt, PvtV2
from l2vit.models.families.resize import adapt_state_dict
from l2vit.models.families.swin import Swin
from l2vit.models.released_keys import rename

# From the authors' configurations: input, learned parameters in M, multiply-adds in G.
SIZES = """
flatten_pvt_tiny        224 12.151 2.037     flatten_pvt_small       224 21.670 4.030
flatten_pvt_medium      224 37.242 7.036     flatten_pvt_base        224 50.649 10.380
flatten_pvt_v2_b0       224 3.595 0.580      flatten_pvt_v2_b1       224 12.931 2.219
flatten_pvt_v2_b2       224 22.548 4.251     flatten_pvt_v2_b3       224 38.274 7.284
flatten_pvt_v2_b4       224 51.837 10.677    flatten_swin_tiny       224 29.192 4.483
flatten_swin_small      224 50.510 8.734     flatten_swin_base       224 88.972 15.421
flatten_swin_base_384   384 91.434 46.382    flatten_cswin_tiny      224 21.202 4.324
flatten_cswin_small     224 35.452 6.783     flatten_cswin_base      224 74.867 14.913
flatten_cswin_base_384  384 78.369 46.305    inline_deit_tiny        224 6.478 1.109
inline_deit_small       288 16.735 4.966     inline_deit_base        448 23.797 17.169
inline_pvt_tiny         224 12.032 1.976     inline_pvt_small        224 21.556 3.915
inline_pvt_medium       224 37.619 6.862     inline_pvt_large        224 51.154 10.130
inline_swin_tiny        224 29.224 4.459     inline_swin_small       224 49.793 8.719
inline_swin_base        224 88.350 15.398    inline_swin_base_384    384 88.465 46.200
inline_cswin_tiny       224 20.605 4.312     inline_cswin_small      224 33.033 6.773
inline_cswin_base       224 73.414 14.885    inline_cswin_base_384   384 73.414 46.220
"""
FIELDS = SIZES.split()
ROWS = list(zip(*(FIELDS[i::4] for i in range(4)), strict=True))


@pytest.mark.parametrize(("name", "size", "parameters", "macs"), ROWS)
def test_parameters_and_multiply_adds_equal_the_table(name, size, parameters, macs):
    with torch.device("meta"):
        model = timm.create_model(name)
    # The table counts the norm (512 weights, 512 biases) that the FLatten-PVT files hold and no
    # forward pass applies; the model does not have it.
    unused = 1024 if name.startswith("flatten_pvt_") and "v2" not in name else 0
    assert f"{(count_parameters(model) + unused) / 1e6:.3f}" == parameters
    assert f"{count_macs(model, int(size)) / 1e9:.3f}" == macs
    assert model.pretrained_cfg["input_size"] == (3, int(size), int(size))


MINI = {"embed_dims": (16, 32, 48, 64), "depths": (1, 2, 2, 1), "num_heads": (1, 2, 3, 4)}
BACKBONES = {
    "pvt": (Pvt, MINI),
    "pvt_v2": (PvtV2, MINI),
    "swin": (Swin, {**MINI, "embed_dims": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8)}),
    "cswin": (CSwin, {**MINI, "embed_dims": (16, 32, 64, 128), "num_heads": (2, 2, 4, 8)}),
}


def small(backbone, attention, types="LLLS", size=64, **arguments):
    """A small network of any backbone with any attention."""
    torch.manual_seed(0)
    if backbone == "deit":
        return Deit(
            size,
            num_classes=5,
            global_pool="avg",  # the class token alone leaves the last block's residual idle
            embed_dim=32,
            depth=2,
            num_heads=2,
            attention=attention,
            **arguments,
        )
    cls, sizes = BACKBONES[backbone]
    given = {"window_size": 2, "img_size": size, "num_classes": 5, **sizes, **arguments}
    return cls(types=types, attention=attention, **given)


@pytest.mark.parametrize("attention", ["softmax", "focused", "injective", "enhanced"])
@pytest.mark.parametrize("backbone", [*BACKBONES, "deit"])
def test_any_attention_in_any_backbone(backbone, attention):
    model = small(backbone, attention).train()
    images = torch.randn(2, 3, 64, 64)
    model(images).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(torch.isfinite(g).all() for g in plain.values())
    assert all(g.abs().sum() > 0 for name, g in plain.items() if "residual" not in name)
    # Recomputing blocks in the backward pass changes nothing.
    model.zero_grad()
    model.set_grad_checkpointing(True)
    model(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], msg=name)


@pytest.mark.parametrize(
    "net",
    [
        reference.Network(
            "pvt", "focused", (16, 32, 48, 64), (1, 1, 2, 1), (1, 2, 3, 4), "LSSS", 64
        ),
        reference.Network(
            "pvt_v2", "focused", (16, 32, 48, 64), (1, 2, 2, 1), (1, 2, 3, 4), "SLSS", 64
        ),
    ],
    ids=["pvt", "pvt_v2"],
)
def test_softmax_blocks_with_reduced_keys(net):
    """No released model has these blocks; the backbones do."""
    net.sr = (8, 4, 2, 1)
    weights = reference.released_weights(net)
    cls = {"pvt": Pvt, "pvt_v2": PvtV2}[net.backbone]
    model = cls(
        img_size=64,
        num_classes=net.classes,
        embed_dims=net.dims,
        depths=net.depths,
        num_heads=net.heads,
        types=net.types,
        attention="focused",
    )
    model.load_state_dict({rename(cls.__name__, key): value for key, value in weights.items()})
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    answer = model.double().eval()(image)[0]
    torch.testing.assert_close(
        answer, reference.logits(net, image[0], weights), rtol=1e-8, atol=1e-9
    )


def test_swin_with_softmax_everywhere_is_timms_swin():
    theirs = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5).eval()
    ours = Swin(num_classes=5).eval()
    state = {}
    for name, value in theirs.state_dict().items():
        name = name.replace("patch_embed.proj", "stem.conv").replace(
            "patch_embed.norm", "stem.norm"
        )
        name = name.replace("layers.", "stages.")
        name = name.replace("attn.relative", "attn.core.bias.relative")
        state[name] = value
    ours.load_state_dict(state)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


REGISTERED = [
    ("flatten_swin_mini", {"img_size": 64, "window_size": 4}),
    ("inline_swin_mini", {"img_size": 64, "window_size": 4}),
    ("flatten_pvt_v2_b0", {"img_size": 64}),
    ("inline_pvt_tiny", {"img_size": 64}),
    ("flatten_cswin_tiny", {"img_size": 64, "window_size": 4}),
    ("inline_deit_tiny", {"img_size": 64}),
]


@pytest.mark.parametrize(("name", "arguments"), REGISTERED)
def test_timms_contract(name, arguments):
    images = torch.randn(1, 3, 64, 64)
    features = timm.create_model(name, features_only=True, **arguments)
    for got, channels, reduction in zip(
        features(images),
        features.feature_info.channels(),
        features.feature_info.reduction(),
        strict=True,
    ):
        assert got.shape == (1, channels, 64 // reduction, 64 // reduction)
    model = timm.create_model(name, num_classes=5, drop_path_rate=0.1, **arguments).eval()
    final, stages = model.forward_intermediates(images, indices=2)
    assert len(stages) == 2
    torch.testing.assert_close(model.forward_head(final), model(images))
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    assert pooled.shape == (1, model.num_features)
    model.reset_classifier(3)
    assert model(images).shape == (1, 3) and model.get_classifier().out_features == 3
    model.reset_classifier(0)
    assert model(images).shape == (1, model.num_features)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    names = {n for n, _ in model.named_parameters()}
    assert set(groups) == names
    absent = {"dist_token", "reg_token"}  # timm names them for every vision transformer
    assert model.no_weight_decay() - absent <= names
    colour = timm.create_model(name, in_chans=1, num_classes=0, **arguments)
    assert colour(images[:, :1]).shape == (1, colour.num_features)


FEW = {"depths": (1, 1, 2, 1)}  # a shifted window needs a second block
SHALLOW = [(n, {**a, **({"depth": 2} if "deit" in n else FEW)}) for n, a in REGISTERED]


@pytest.mark.parametrize(("name", "arguments"), SHALLOW)
def test_compiles_whole_and_exports(name, arguments):
    model = timm.create_model(name, num_classes=5, **arguments).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), expected)
        any_batch = ({0: torch.export.Dim("batch", min=1)},)
        exported = torch.export.export(model, (images,), dynamic_shapes=any_batch).module()
        for count in (1, 3):
            more = torch.randn(count, 3, 64, 64)
            torch.testing.assert_close(exported(more), model(more))
    torch._dynamo.reset()


IN_CI = ("inline_pvt_tiny",)  # its residual has kernels of its own for each image


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param(name, arguments, id=name, marks=() if name in IN_CI else pytest.mark.slow)
        for name, arguments in SHALLOW
    ],
)
def test_onnx_runs_in_onnxruntime(name, arguments, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **arguments).eval()
    batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.randn(2, 3, 64, 64),),
            tmp_path / "model.onnx",
            dynamo=True,
            input_names=["images"],
            dynamic_shapes=batch,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for count in (1, 3):
        images = torch.randn(count, 3, 64, 64)
        (got,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(got), model(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "arguments"), SHALLOW)
def test_another_input_size(name, arguments, caplog):
    """After set_input_size the model is the one built for that size with resized tables."""
    caplog.set_level("INFO", logger="l2vit")
    model = timm.create_model(name, num_classes=5, **arguments)
    for name_, parameter in model.named_parameters():
        if name_.endswith(("positional_encoding", "pos_embed", "bias_table")):
            torch.nn.init.constant_(parameter, 0.25)  # a constant stays one when resized
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    window = {"window_size": 8} if "swin" in name else {}
    before = {name: parameter.shape for name, parameter in model.named_parameters()}
    model.eval().set_input_size(128, **window)
    changed = [
        name for name, parameter in model.named_parameters() if parameter.shape != before[name]
    ]
    assert [line.split()[1] for line in caplog.messages] == changed
    built = timm.create_model(name, num_classes=5, **{**arguments, "img_size": 128, **window})
    built.load_state_dict(
        {
            key: torch.full_like(value, 0.25)
            if key.endswith(("positional_encoding", "pos_embed", "bias_table"))
            else model.state_dict()[key]
            for key, value in built.state_dict().items()
        }
    )
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(model(images), built.eval()(images), rtol=1e-4, atol=1e-5)
    assert not model.training and not next(iter(model.parameters())).requires_grad


@pytest.mark.parametrize(("name", "pool"), [("inline_pvt_tiny", "max"), ("inline_deit_tiny", "")])
def test_another_input_size_keeps_the_head(name, pool):
    model = timm.create_model(name, img_size=64).eval()
    model.reset_classifier(3, pool)
    head = model.get_classifier()
    model.set_input_size(96)
    with torch.no_grad():
        features = model.forward_features(torch.randn(2, 3, 96, 96))
        expected = head(features.amax((1, 2)) if pool else model.fc_norm(features))
        assert torch.equal(model.forward_head(features), expected)
    assert model.get_classifier() is head


@pytest.mark.parametrize(("name", "arguments"), SHALLOW)
def test_another_input_size_of_a_backbone(name, arguments):
    """Stages (DeiT: blocks) that features_only dropped stay dropped."""
    features = timm.create_model(name, features_only=True, out_indices=(0, 1), **arguments).eval()
    features.model.set_input_size(128, window_size=8)
    whole = timm.create_model(name, **{**arguments, "img_size": 128, "window_size": 8}).eval()
    whole.load_state_dict({**whole.state_dict(), **features.model.state_dict()})
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        expected = whole.forward_intermediates(images, indices=[0, 1], intermediates_only=True)
        for got, wanted in zip(features(images), expected, strict=True):
            torch.testing.assert_close(got, wanted)


def test_resizing_that_cannot_be_right_is_refused():
    """64 rows may be 8×8 or 16×4; CSwin's stripes have other parameters than a whole window."""
    model = timm.create_model("inline_pvt_tiny", img_size=256)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for sides in ((512, 128), (256, 512)):
        with pytest.raises(ValueError, match=rf"cannot be resized for or from .*{sides[0]}"):
            model.set_input_size(sides)
    assert model.img_size == (256, 256) and model.stem.grid == (64, 64)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    oblong = timm.create_model("inline_pvt_tiny", img_size=(512, 128))
    with pytest.raises(ValueError, match=r"from images of \(512, 128\)"):
        oblong.set_input_size(256)
    with pytest.raises(ValueError, match=r"for or from images of \(1024, 256\)"):
        adapt_state_dict(before, timm.create_model("inline_pvt_tiny", img_size=(1024, 256)))
    bias_only = timm.create_model("inline_swin_mini", img_size=64, window_size=2)
    bias_only.set_input_size((128, 64), window_size=2)
    assert bias_only(torch.zeros(1, 3, 128, 64)).shape == (1, 1000)
    stripes = timm.create_model("flatten_cswin_tiny", img_size=64, window_size=4)
    with pytest.raises(ValueError, match=r"need other parameters .*branches.*window_size"):
        stripes.set_input_size(128)


def test_sizes_a_model_cannot_take_are_refused():
    model = timm.create_model("flatten_swin_mini", img_size=64, window_size=4)
    with pytest.raises(ValueError, match=r"built for images of \(64, 64\), not \(96, 96\)"):
        model(torch.zeros(1, 3, 96, 96))
    with pytest.raises(ValueError, match="window of 7 does not divide the grid"):
        timm.create_model("flatten_swin_mini", img_size=256)
    with pytest.raises(ValueError, match="do not divide the grid"):
        timm.create_model("flatten_cswin_tiny", img_size=256)
    with pytest.raises(ValueError, match="not a multiple of 32"):
        timm.create_model("flatten_pvt_tiny", img_size=100)
    with pytest.raises(ValueError, match="unknown attention 'quadratic'"):
        Swin(attention="quadratic")
    with pytest.raises(ValueError, match="one of L, I, S, M per stage"):
        Swin(types="LLM")
    with pytest.raises(ValueError, match="sr_ratio"):
        Pvt(types="IIII", attention="injective", linear_sr_ratios=(2, 1, 1, 1))


def test_inline_pvt_takes_any_size_by_resizing_positions():
    """Where a grid differs, the position table is resized bilinearly."""
    model = timm.create_model("inline_pvt_tiny", img_size=64, num_classes=5).eval()
    sized = timm.create_model("inline_pvt_tiny", img_size=96, num_classes=5).eval()
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith("pos_embed"):
            side = int(value.shape[1] ** 0.5)
            new = side * 3 // 2
            picture = value.transpose(1, 2).reshape(1, -1, side, side)
            picture = torch.nn.functional.interpolate(picture, (new, new), mode="bilinear")
            state[name] = picture.flatten(2).transpose(1, 2)
    sized.load_state_dict(state)
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(images), sized(images), rtol=1e-4, atol=1e-5)


def test_weight_decay_and_initial_values():
    """As the authors do: `scale`, encodings, kernels and PVT's positions decay; bias tables do not,
    nor DeiT's positions and class token."""
    swin = timm.create_model("flatten_swin_mini", img_size=64, window_size=4)
    exempt = swin.no_weight_decay()
    assert len(exempt) == 4 and all(n.endswith("relative_position_bias_table") for n in exempt)
    assert timm.create_model("inline_pvt_tiny", img_size=64).no_weight_decay() == set()
    deit = timm.create_model("inline_deit_tiny", img_size=64)
    assert {"pos_embed", "cls_token"} <= deit.no_weight_decay()
    assert abs(deit.cls_token.std() - 0.02) < 0.004 and abs(deit.pos_embed.std() - 0.02) < 0.002
    for model in (swin, deit):
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module.weight.numel() > 4000:
                assert (abs(module.weight.std() - 0.02) < 0.002 and module.bias is None) or (
                    module.bias.abs().sum() == 0
                )
    core = swin.stages[0].blocks[0].attn.core
    assert core.scale.abs().sum() == 0 and core.positional_encoding.abs().sum() == 0
    pvt = timm.create_model("flatten_pvt_v2_b0")
    convolution = pvt.stages[0].blocks[0].mlp.conv  # 3×3 depthwise of 256
    assert abs(convolution.weight.std() / (2 / 9) ** 0.5 - 1) < 0.1
    assert convolution.bias.abs().sum() == 0
    assert [round(b.drop_path.drop_prob, 3) if hasattr(b.drop_path, "drop_prob") else 0
            for s in timm.create_model("inline_swin_mini", drop_path_rate=0.7).stages
            for b in s.blocks] == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]  # fmt: skip
