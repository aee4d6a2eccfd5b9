"""The architectures: small members of many families, each with random weights and few classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import timm
import torch
import transformers
from reference import logits_of
from torch import nn
from torchvision.models import get_model

CLASSES = 5
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
SQUARE = (3, 64, 64)


class Architecture(NamedTuple):
    """A network that can be built, and the shape of an image for it."""

    library: str
    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = SQUARE


TIMM = """
resnet18 resnet26d resnet50 resnext50_32x4d wide_resnet50_2 seresnet18 ecaresnet26t skresnet18 resnest14d
res2net50_14w_8s resnetv2_18 resnetv2_50 resnetv2_50x1_bit nf_resnet26 nf_regnet_b0 dm_nfnet_f0 tresnet_m
regnetx_002 regnety_002 regnetv_040 regnetz_005 repvgg_a0 gernet_s mobileone_s0 gcresnet33ts botnet26t_256
densenet121 dla34 dpn68 vovnet39a ese_vovnet19b_dw hrnet_w18_small xception41 xception65p legacy_xception
inception_v4 cspresnet50 cspdarknet53 cs3darknet_s cspnext_s selecsls42 vgg11_bn
mobilenetv2_050 mobilenetv3_small_100 mobilenetv4_conv_small mnasnet_050 spnasnet_100 semnasnet_075 fbnetc_100
efficientnet_b0 efficientnet_lite0 efficientnetv2_rw_t mixnet_s tinynet_e lcnet_050 hardcorenas_a fbnetv3_b
ghostnet_050 ghostnetv2_100 repghostnet_050 rexnet_100 hgnetv2_b0 rdnet_tiny starnet_s050 repvit_m0_9 fasternet_t0
shvit_s1 convmixer_768_32 convnext_atto convnextv2_atto inception_next_atto fastvit_t8 efficientvit_m0
efficientvit_b0 mobilevit_xxs mobilevitv2_050 edgenext_xx_small poolformer_s12 convformer_s18 mambaout_femto
coatnet_pico_rw_224 levit_conv_128s swiftformer_xs vit_tiny_patch16_224 mixer_s32_224
""".split()
TIMM_SHAPES = {
    "inception_v4": (3, 128, 128),
    "selecsls42": (3, 128, 128),
    "botnet26t_256": (3, 256, 256),
    "coatnet_pico_rw_224": (3, 224, 224),
    "levit_conv_128s": (3, 224, 224),
    "vit_tiny_patch16_224": (3, 224, 224),
    "mixer_s32_224": (3, 224, 224),
}
TORCHVISION = {
    **dict.fromkeys(
        """resnet18 resnet50 resnext50_32x4d wide_resnet50_2 regnet_x_400mf regnet_y_400mf densenet121 mnasnet0_5
        mobilenet_v2 mobilenet_v3_small shufflenet_v2_x0_5 efficientnet_b0 efficientnet_v2_s squeezenet1_0
        squeezenet1_1 convnext_tiny vgg11 vgg11_bn alexnet swin_t""".split(),
        SQUARE,
    ),
    "googlenet": SQUARE,
    "inception_v3": (3, 128, 128),
    "maxvit_t": (3, 224, 224),
    "vit_b_32": (3, 224, 224),
    "r3d_18": (3, 4, 32, 32),
    "mc3_18": (3, 4, 32, 32),
    "r2plus1d_18": (3, 4, 32, 32),
}
SMALL = {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]}
TRANSFORMERS = {
    "ResNet": {"embedding_size": 16, **SMALL},
    "RegNet": {"embedding_size": 16, "groups_width": 8, **SMALL},
    "MobileNetV1": {"depth_multiplier": 0.25},
    "MobileNetV2": {"depth_multiplier": 0.35},
    "EfficientNet": {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
    "Bit": {"embedding_size": 32, "hidden_sizes": [128, 128, 128, 128], "depths": [1, 1, 1, 1]},
    "ConvNext": SMALL,
    "ConvNextV2": SMALL,
    "HGNetV2": {},
    "PPLCNet": {},
    "MobileViT": {"image_size": 64},
    "MobileViTV2": {"image_size": 64, "width_multiplier": 0.5},
    "PoolFormer": SMALL,
    "PvtV2": {"image_size": 64, **SMALL, "num_attention_heads": [1, 1, 1, 1]},
    "FocalNet": {"image_size": 64, "embed_dim": 24, "depths": [1, 1, 1, 1]},
    "SwiftFormer": {"image_size": 64},
    "TextNet": {},
}


def _timm(name: str) -> nn.Module:
    return timm.create_model(name, num_classes=CLASSES)


def _torchvision(name: str) -> nn.Module:
    return get_model(name, weights=None, num_classes=CLASSES)


def _transformers(name: str, options: dict) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **options)
    return getattr(transformers, f"{name}ForImageClassification")(config)


ARCHITECTURES = [
    *(Architecture("timm", name, partial(_timm, name), TIMM_SHAPES.get(name, SQUARE)) for name in TIMM),
    *(Architecture("torchvision", name, partial(_torchvision, name), shape) for name, shape in TORCHVISION.items()),
    *(
        Architecture("transformers", name, partial(_transformers, name, options))
        for name, options in TRANSFORMERS.items()
    ),
]


def generic(architecture: Architecture) -> nn.Module:
    """Build the network in eval mode and make it generic: batch norms that do something, logits of a few units.

    As built, batch norms are the identity, the last one of many residual branches is switched off by a zero, and
    logits are all but equal or, behind many layers without norm, so far apart that the softmax is one-hot.
    """
    torch.manual_seed(sum(map(ord, architecture.name)))
    model = architecture.build().eval()
    images = torch.randn(8, *architecture.shape)
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    for norm in norms:
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.3)
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        model(images)
        for norm in norms:
            norm.eval()
            norm.running_mean.add_(0.3 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean))
            noise = torch.empty_like(norm.running_var).uniform_(0.6, 1.6)
            norm.running_var.mul_(noise).add_(0.1 * norm.running_var.mean())  # a dead channel is not blown up
        heads = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d) and len(m.weight) == CLASSES]
        for head in heads:
            nn.init.normal_(head.weight)
        spread = logits_of(model(images)).std(1).mean()
        for head in heads:
            head.weight.mul_(2 / spread)
    return model
