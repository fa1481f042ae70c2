"""Write weights for other tools."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from brainfm.errors import ConfigError

PLACE = 12


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Write weights for other tools.

    brainfm export format=nnssl backbone=runs/a/backbone.safetensors out=ssl3d.pth
    """

    format: Annotated[Literal["nnssl"], "nnssl: a checkpoint for nnssl and nnU-Net's fine-tuning, of a residual U-Net"]
    out: Annotated[Path, "what is written"]
    backbone: Annotated[Path | None, "a backbone file"] = None
    channels: Annotated[int, "of nnssl: of the first convolution; nnU-Net's fine-tuning adapts 1 to n by itself"] = 1
    axes: Annotated[
        Literal["zyx", "xyz"], "of nnssl: order of the arrays' axes there; zyx: read by SimpleITK, xyz: by nibabel"
    ] = "zyx"
    debug: Annotated[bool, "a traceback in place of the sentence"] = False

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ConfigError(f"channels={self.channels}: expected 1 or more")


def run(settings: Settings) -> int:
    return {"nnssl": _nnssl}[settings.format](settings)


def _nnssl(settings: Settings) -> int:
    from brainfm.nets.backbone_file import load_backbone
    from brainfm.nets.exchange.nnssl import adaptation_plan, network_weights, residual, write_checkpoint

    if settings.backbone is None:
        raise ConfigError("brainfm export format=nnssl: backbone=FILE must be given")
    loaded = load_backbone(settings.backbone)
    encoder = residual(loaded.backbone, str(settings.backbone))
    channels, axes = settings.channels, settings.axes
    weights = network_weights(encoder, loaded.decoder, channels=channels, axes=axes)
    plan = adaptation_plan(encoder, loaded.preprocess, loaded.patch_vox, channels=channels, axes=axes)
    about = {"fingerprint": loaded.fingerprint, "objective": loaded.objective["name"], "axes": axes}
    about["decoder"] = loaded.decoder is not None
    write_checkpoint(settings.out, weights, plan, about)
    came = "its decoder" if loaded.decoder is not None else "a fresh decoder (the file has none)"
    print(f"{settings.out}: {len(weights)} tensors, {plan['architecture_plans']['arch_class_name']}, with {came}")
    return 0
