"""Inception v3 of 2015-12-05, the network that FID is defined on: images to pool3 features.

The layers are torch-fidelity's; the weights come as a state dict under its names (those of pytorch-fid too), read with
`weights_only=True` or as safetensors.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_inceptionv3 import (
    BasicConv2d,
    InceptionA,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE_1,
    InceptionE_2,
)
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from sbrush.console import SbrushError, info, printable
from sbrush.device import exact_convolutions
from sbrush.metrics.conventions import Resize
from sbrush.models.parts import refuse_pointer

WIDTH, SIDE = 2048, 299
NAME, DIGEST = "weights-inception-2015-12-05-6726825d.pth", "6726825d"  # of which SHA-256 begins so
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{NAME}"


class Inception(nn.Sequential):
    """The network up to its last pooling, laid out channels last, each batch norm within the convolution before it.

    Its features differ from the plain network's in rounding alone. With calibrated random weights they are 6e-7 of
    their rms away from float64's on drawn images and 5e-5 on noise; torch-fidelity's own float32, 3e-7 and 4e-5.
    """

    memory_format = torch.channels_last  # half as fast again as the other on CPUs

    def __init__(self) -> None:
        pool = nn.MaxPool2d(kernel_size=3, stride=2)
        layers: list[tuple[str, nn.Module]] = [
            ("Conv2d_1a_3x3", BasicConv2d(3, 32, kernel_size=3, stride=2)),
            ("Conv2d_2a_3x3", BasicConv2d(32, 32, kernel_size=3)),
            ("Conv2d_2b_3x3", BasicConv2d(32, 64, kernel_size=3, padding=1)),
            ("MaxPool_1", pool),
            ("Conv2d_3b_1x1", BasicConv2d(64, 80, kernel_size=1)),
            ("Conv2d_4a_3x3", BasicConv2d(80, 192, kernel_size=3)),
            ("MaxPool_2", pool),
            ("Mixed_5b", InceptionA(192, pool_features=32)),
            ("Mixed_5c", InceptionA(256, pool_features=64)),
            ("Mixed_5d", InceptionA(288, pool_features=64)),
            ("Mixed_6a", InceptionB(288)),
            ("Mixed_6b", InceptionC(768, channels_7x7=128)),
            ("Mixed_6c", InceptionC(768, channels_7x7=160)),
            ("Mixed_6d", InceptionC(768, channels_7x7=160)),
            ("Mixed_6e", InceptionC(768, channels_7x7=192)),
            ("Mixed_7a", InceptionD(768)),
            ("Mixed_7b", InceptionE_1(1280)),
            ("Mixed_7c", InceptionE_2(WIDTH)),
            ("AvgPool", nn.AdaptiveAvgPool2d(1)),
            ("Flatten", nn.Flatten()),
        ]
        super().__init__(OrderedDict(layers))
        self.digest = ""

    def frozen(self) -> Self:
        """The network ready to extract, once it has its weights: each batch norm within the convolution before it."""
        self.requires_grad_(False).eval().to(memory_format=self.memory_format)
        for layer in self.modules():
            if isinstance(layer, BasicConv2d):
                layer.conv, layer.bn = fuse_conv_bn_eval(layer.conv, layer.bn), nn.Identity()
        return self

    @classmethod
    def load(cls, file: Path | None = None, *, download: bool = False, device: str = "cpu") -> Inception:
        """The network from `file`, else from torch's own cache, fetched into it if `download`.

        SbrushError if there is none, or if the file is another network's or damaged.
        """
        file = file or _standard(download)
        try:
            refuse_pointer(file)
            if file.suffix == ".safetensors":
                state = load_file(file)
            else:
                state = torch.load(file, map_location="cpu", weights_only=True)
            net = cls()
            net.load_state_dict({name: value for name, value in state.items() if not name.startswith("fc.")})
            if not all(tensor.isfinite().all() for tensor in net.state_dict().values()):
                raise ValueError("some of its weights are not finite")
            with file.open("rb") as handle:
                net.digest = hashlib.file_digest(handle, "sha256").hexdigest()
        except SbrushError:
            raise
        except Exception as problem:  # whatever torch or safetensors make of a file that is none of theirs
            raise SbrushError(
                f"{printable(file)} does not hold Inception's weights ({type(problem).__name__})",
                f"it is {NAME}, a state dict of 91 MB, from {URL}",
            ) from problem
        return net.frozen().to(device)

    @torch.inference_mode()
    def features(self, images: Tensor, resize: Resize = "tensorflow") -> Tensor:
        """Pool3 of images: [B, 3, H, W] to float32 [B, 2048], on the CPU.

        Those in uint8 are resized here: as the first FID code and torch-fidelity do, or with "antialias" as
        torchmetrics does since 1.8. Those that `clean_resize` gave, float32, are ready.
        """
        x = images.to(next(self.parameters()).device)
        if not x.is_floating_point() and resize == "antialias":
            x = interpolate(x.float(), (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
        elif not x.is_floating_point():
            x = interpolate_bilinear_2d_like_tensorflow1x(x.float(), (SIDE, SIDE), align_corners=False)
        with exact_convolutions():
            out: Tensor = self(((x - 128) / 128).contiguous(memory_format=self.memory_format))
        return out.float().cpu()


def clean_resize(image: Tensor, side: int = SIDE) -> Tensor:
    """clean-fid's resizing (arXiv 2104.11222): uint8 [3, H, W] to float32 [3, side, side], 0 to 255, not rounded."""
    channels = [
        np.asarray(Image.fromarray(c.numpy().astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC))
        for c in image
    ]
    return torch.from_numpy(np.stack(channels).clip(0, 255))


def _standard(download: bool) -> Path:
    """The weights in torch's own cache."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / NAME
    if file.is_file():
        return file
    if not download:
        raise SbrushError(
            f"FID needs Inception's weights, and {printable(file)} is not there",
            f"--download fetches it (91 MB) from {URL}; or give --inception FILE",
        )
    info(f"fetching {URL}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(file), hash_prefix=DIGEST)  # aside, checked, renamed
    except Exception as problem:
        raise SbrushError(f"cannot fetch {URL}: {printable(problem)}", "check the network and try again") from problem
    return file
