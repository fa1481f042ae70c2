"""Write weights for other tools."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from brainfm.errors import ConfigError
from brainfm.settings import VERBATIM

PLACE = 12


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Write weights for other tools.

    brainfm export format=nnssl backbone=runs/a/backbone.safetensors out=ssl3d.pth
    """

    format: Annotated[
        Literal["nnssl", "nnunet"],
        "nnssl: a checkpoint for nnssl and nnU-Net's fine-tuning, of a residual U-Net; nnunet: a data set for nnU-Net",
    ]
    out: Annotated[Path, "what is written"]
    backbone: Annotated[Path | None, "a backbone file"] = None
    manifest: Annotated[Path | None, "of nnunet: the sessions"] = None
    target: Annotated[str | None, "of nnunet: column <target>_mask or <target>_labels", VERBATIM] = None
    contrasts: Annotated[tuple[str, ...], "of nnunet: the channels, in this order"] = ()
    channels: Annotated[int, "of nnssl: of the first convolution; nnU-Net's fine-tuning adapts 1 to n by itself"] = 1
    axes: Annotated[
        Literal["zyx", "xyz"], "of nnssl: order of the arrays' axes there; zyx: read by SimpleITK, xyz: by nibabel"
    ] = "zyx"
    debug: Annotated[bool, "a traceback in place of the sentence"] = False

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ConfigError(f"channels={self.channels}: expected 1 or more")


def run(settings: Settings) -> int:
    return {"nnssl": _nnssl, "nnunet": _nnunet}[settings.format](settings)


def _needed(settings: Settings, *keys: str) -> None:
    """Raises: ConfigError where a key that this format needs is not given."""
    lacking = [key for key in keys if not getattr(settings, key)]
    if lacking:
        raise ConfigError(f"brainfm export format={settings.format}: {', '.join(lacking)} must be given")


def _nnssl(settings: Settings) -> int:
    from brainfm.nets.backbone_file import load_backbone
    from brainfm.nets.exchange.nnssl import adaptation_plan, network_weights, residual, write_checkpoint

    _needed(settings, "backbone")
    assert settings.backbone is not None
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


def _nnunet(settings: Settings) -> int:
    from brainfm.data.manifest import read_manifest
    from brainfm.data.nnunet_dataset import write_dataset

    _needed(settings, "manifest", "target", "contrasts")
    assert settings.manifest is not None and settings.target is not None
    written = write_dataset(read_manifest(settings.manifest), settings.out, settings.target, settings.contrasts)
    for case, reason in written.left_out:
        print(f"left out: {case}: {reason}")
    print(f"{settings.out}: {len(written.cases)} cases, labels {', '.join(written.labels)}")
    return 0
