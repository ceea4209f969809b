"""Networks of torchvision and timm with weights that hide no mistake; shared by test_zoo.py and bench_coverage.py.

`ZOO` lists them, smallest member of a family first choice. A network is built with the random weights its authors start
training from, and `randomise` then makes every part of it matter to the output: a residual branch that starts at zero,
a layer scale of 1e-6, or a batch normalisation with mean 0 and variance 1 would let a wrong channel pass unseen.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["ZOO", "Entry", "build", "define_operators", "example", "randomise"]


@dataclass(frozen=True)
class Entry:
    """A network of the zoo.

    Attributes:
        source: "torchvision" or "timm".
        name: what the source calls it.
        size: height and width of its input, the smallest it runs with or close to it.
        cnn: False when parts of it are a transformer, an LSTM or a state space model.
        options: what it is made with.
    """

    source: str
    name: str
    size: int = 64
    cnn: bool = True
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.source}-{self.name}"


def _torchvision() -> list[Entry]:
    families = """alexnet vgg11_bn resnet18 resnet50 resnext50_32x4d wide_resnet50_2 squeezenet1_1 densenet121
        googlenet:96 inception_v3:96 mobilenet_v2 mobilenet_v3_small mnasnet0_5 shufflenet_v2_x0_5 efficientnet_b0
        efficientnet_v2_s regnet_x_400mf regnet_y_400mf convnext_tiny"""
    initialised = {"init_weights": True}  # the two warn when they are not told
    options = {"googlenet": initialised, "inception_v3": initialised}
    cnns = [Entry("torchvision", name, size, options=options.get(name, {})) for name, size in _names(families)]
    return [
        *cnns,
        Entry("torchvision", "vit_b_32", cnn=False, options={"image_size": 64}),
        Entry("torchvision", "swin_t", cnn=False),
        Entry("torchvision", "maxvit_t", 224, cnn=False),  # its windows want 7 * 32
    ]


def _timm() -> list[Entry]:
    cnns = """resnet14t resnetblur18 resnet50_gn ecaresnet26t seresnet18 legacy_seresnext26_32x4d skresnet18
        skresnext50_32x4d resnest14d resnest50d_4s2x40d res2net50_14w_8s res2next50 resnetv2_18 resnetv2_50x1_bit
        resnetv2_50d_frn tresnet_m resnet32ts resnet51q gcresnext26ts resnet50_clip_gap
        dla34 dla46_c dla60_res2next dpn48b dpn68 densenetblur121d rdnet_tiny
        ese_vovnet19b_slim ese_vovnet19b_dw eca_vovnet39b selecsls42 hrnet_w18_small
        xception41 xception41p legacy_xception inception_v4:96 inception_resnet_v2:96 nasnetalarge pnasnet5large
        cs3darknet_focus_s cspresnet50 cspresnext50 cspdarknet53 cspnext_tiny darknet17 darknetaa53
        repvgg_a0 repvgg_b1g4 mobileone_s0 gernet_s repghostnet_050 repvit_m0_9 fastvit_t8
        regnetx_002 regnety_002 regnetv_040 regnetz_005 regnetz_b16
        mobilenetv1_100 mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small_035 mobilenetv4_conv_blur_medium
        mobilenet_edgetpu_v2_xs mnasnet_small spnasnet_100 fbnetc_100 fbnetv3_b lcnet_035 lcnetv2_small tinynet_e
        hardcorenas_a mixnet_s ghostnet_050 ghostnetv2_100 ghostnetv3_050 rexnet_100 rexnetr_100
        efficientnet_lite0 efficientnet_es efficientnet_b0_gn efficientnet_b0_g8_gn efficientnet_b0_g16_evos
        efficientnet_cc_b0_4e efficientnet_x_b3 tf_efficientnetv2_b0 gc_efficientnetv2_rw_t
        nf_resnet26 nf_regnet_b0 eca_nfnet_l0 dm_nfnet_f0
        convnext_atto convnext_atto_ols convnextv2_atto convnext_zepto_rms inception_next_atto convmixer_768_32
        convformer_s18 poolformer_s12 poolformerv2_s12 focalnet_tiny_srf fasternet_t0 starnet_s050 mambaout_femto"""
    others = """resnet50_clip bat_resnext26ts:256 lambda_resnet26t halonet26t:256 mobilevit_xxs mobilevitv2_050
        edgenext_xx_small efficientvit_b0 efficientvit_m0 efficientvim_m1 swiftformer_xs shvit_s1 cpubone_nano iformer_t
        lowformer_b0 nextvit_small mobilenetv4_hybrid_medium sequencer2d_s"""
    sized = ["botnet26t_256", "visformer_tiny", "coatnet_pico_rw_224", "efficientformerv2_s0"]
    return [
        *(Entry("timm", name, size) for name, size in _names(cnns)),
        *(Entry("timm", name, size, cnn=False) for name, size in _names(others)),
        *(Entry("timm", name, cnn=False, options={"img_size": 64}) for name in sized),
    ]


def _names(text: str) -> list[tuple[str, int]]:
    """The words of a text, "name" or "name:size", with 64 for a size."""
    return [(name, int(size or 64)) for name, _, size in (word.partition(":") for word in text.split())]


ZOO = (*_torchvision(), *_timm())


def build(entry: Entry, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The network in eval mode, with reproducible random parameters and statistics."""
    define_operators()
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # how the authors write their code is not ours
            if entry.source == "torchvision":
                import torchvision

                model = torchvision.models.get_model(entry.name, weights=None, **entry.options)
            else:
                import timm

                model = timm.create_model(entry.name, pretrained=False, **entry.options)
        model = model.to(dtype).eval()
        randomise(model, example(entry, dtype=dtype))
    finally:
        torch.random.set_rng_state(state)
    return model


def example(entry: Entry, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A reproducible batch of images, (batch, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, entry.size, entry.size, generator=generator, dtype=dtype)


@torch.no_grad()
def randomise(model: nn.Module, images: torch.Tensor) -> None:
    """Give vectors, constant tensors and batch statistics values that differ from channel to channel, in place.

    Gains are in 0.5..1.5 with a tenth of them negative, layer scales and the like in 0.3..0.8, offsets normal with
    deviation 0.2. Means and variances of batch normalisations are those of the images (no variance below half of the
    layer's mean: there may be two values to a channel), moved by normal noise and a factor in 0.7..1.4: other values
    would let the signal of a deep network die out or explode.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    gains = {id(module.weight) for module in model.modules() if _is_norm(module) and module.weight is not None}
    for name, parameter in model.named_parameters():
        vector = parameter.numel() == max(parameter.shape, default=1)
        if not vector and parameter.numel() > 1 and parameter.std() > 0:
            continue
        if not vector:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif re.search(r"bias|beta", name.rpartition(".")[2]):
            parameter.normal_(std=0.2)
        elif id(parameter) in gains:
            sign = 1 - 2 * (torch.rand_like(parameter) < 0.1).to(parameter.dtype)
            parameter.uniform_(0.5, 1.5).mul_(sign)
        else:
            parameter.uniform_(0.3, 0.8)
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    model(images)
    for norm, momentum in zip(norms, before, strict=True):
        norm.eval()
        norm.momentum = momentum
        norm.running_var.clamp_(min=max(float(norm.running_var.mean()) / 2, 1e-3))
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.7, 1.4))
        norm.running_mean.addcmul_(torch.randn_like(norm.running_mean), norm.running_var.sqrt(), value=0.3)
    model.eval()


def _is_norm(module: nn.Module) -> bool:
    """Whether the module is a normalisation, by its name: timm has many of its own."""
    return "Norm" in type(module).__name__ and hasattr(module, "weight")


def define_operators() -> None:
    """Let torchvision import where its own native module does not fit the torch that is installed."""
    if _LIBRARY:
        return
    package = importlib.util.find_spec("torchvision")
    locations = package.submodule_search_locations if package else None
    for path in (found for location in locations or () for found in Path(location).glob("_C.*")):
        try:
            torch.ops.load_library(str(path))
        except OSError:
            continue
        _LIBRARY.append(None)
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARY.append(library)


_LIBRARY: list[torch.library.Library | None] = []  # what is defined lives as long as the object does
