"""Write weights for other tools."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from brainfm.errors import ConfigError
from brainfm.settings import VERBATIM

PLACE = 19


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Write weights for other tools, and models for sharing.

    brainfm export format=nnssl backbone=runs/a/backbone.safetensors out=ssl3d.pth
    brainfm export format=onnx bundle=runs/b/bundle out=lesions.onnx
    brainfm export format=hub bundle=runs/b/bundle out=folder licence=cc-by-4.0
    brainfm export format=nnunet manifest=manifest.csv target=lesion contrasts=[flair,t1] out=Dataset501_lesion
    """

    format: Annotated[
        Literal["nnssl", "onnx", "torch_export", "torchscript", "hub", "monai", "nnunet"],
        "nnssl: a checkpoint for nnssl and nnU-Net's fine-tuning, of a residual U-Net or a Primus; onnx, torch_export, "
        "torchscript: the graph of a backbone, of a segmenting bundle (for windows) or of a whole-head bundle (for "
        "views); hub: a folder for a model hub; monai: a bundle of MONAI's; nnunet: a data set for nnU-Net",
    ]
    out: Annotated[Path, "what is written; the ending of a graph is .onnx, .pt2 or .pt"]
    backbone: Annotated[Path | None, "of nnssl, graphs and hub: a backbone file or name"] = None
    bundle: Annotated[Path | None, "of graphs, hub and monai: a bundle"] = None
    patch_vox: Annotated[
        tuple[int, int, int] | None, "of a backbone's graph: edges of its windows; null: as it was trained"
    ] = None
    licence: Annotated[str, "of hub and monai: the weights' licence; what their data allow", VERBATIM] = "other"
    manifest: Annotated[Path | None, "of nnunet: the sessions"] = None
    target: Annotated[str | None, "of nnunet: column <target>_mask or <target>_labels", VERBATIM] = None
    contrasts: Annotated[tuple[str, ...], "of nnunet: the channels, in this order"] = ()
    channels: Annotated[int, "of nnssl: of the first convolution; nnU-Net's fine-tuning adapts 1 to n by itself"] = 1
    axes: Annotated[
        Literal["zyx", "xyz"], "of nnssl: order of the arrays' axes there; zyx: read by SimpleITK, xyz: by nibabel"
    ] = "zyx"
    order: Annotated[
        Literal["whd", "hwd"],
        "of nnssl: how the tokens of a Primus follow each other; whd: as today's nnU-Net has it, hwd: as nnssl",
    ] = "whd"
    debug: Annotated[bool, "a traceback in place of the sentence"] = False

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ConfigError(f"channels={self.channels}: expected 1 or more")


def run(settings: Settings) -> int:
    write = {"nnssl": _nnssl, "nnunet": _nnunet, "hub": _hub, "monai": _monai}.get(settings.format, _graph)
    return write(settings)


def _needed(settings: Settings, *keys: str) -> None:
    """Raises: ConfigError where a key that this format needs is not given."""
    lacking = [key for key in keys if not getattr(settings, key)]
    if lacking:
        raise ConfigError(f"brainfm export format={settings.format}: {', '.join(lacking)} must be given")


def _nnssl(settings: Settings) -> int:
    from brainfm.nets.backbone_file import load_backbone
    from brainfm.nets.exchange import nnssl, primus
    from brainfm.nets.exchange.plans import write_checkpoint
    from brainfm.nets.primus import Primus

    _needed(settings, "backbone")
    assert settings.backbone is not None
    loaded = load_backbone(settings.backbone)
    encoder, channels, axes = loaded.backbone, settings.channels, settings.axes
    about = {"fingerprint": loaded.fingerprint, "objective": loaded.objective["name"], "axes": axes}
    if isinstance(encoder, Primus):
        weights = primus.network_weights(encoder, channels=channels, axes=axes, order=settings.order)
        plan = primus.adaptation_plan(encoder, loaded.preprocess, loaded.patch_vox, channels=channels, axes=axes)
        about |= {"decoder": False, "order": settings.order}
        came = f"a fresh way up to voxels, tokens in the order {settings.order}"
    else:
        residual = nnssl.residual(encoder, str(settings.backbone))
        weights = nnssl.network_weights(residual, loaded.decoder, channels=channels, axes=axes)
        plan = nnssl.adaptation_plan(residual, loaded.preprocess, loaded.patch_vox, channels=channels, axes=axes)
        about["decoder"] = loaded.decoder is not None
        came = "its decoder" if loaded.decoder is not None else "a fresh decoder (the file has none)"
    write_checkpoint(settings.out, weights, plan, about)
    print(f"{settings.out}: {len(weights)} tensors, {plan['architecture_plans']['arch_class_name']}, with {came}")
    return 0


def _graph(settings: Settings) -> int:
    from brainfm.nets.backbone_file import load_backbone
    from brainfm.nets.exchange.graphs import write_graph
    from brainfm.submission.sharing import backbone_graph, bundle_graph
    from brainfm.tasks.bundle import read_bundle

    _one_of(settings)
    if settings.bundle is not None:
        graph = bundle_graph(read_bundle(settings.bundle))
    else:
        assert settings.backbone is not None
        graph = backbone_graph(load_backbone(settings.backbone), settings.patch_vox)
    write_graph(settings.out, settings.format, graph)
    given = (f"{name} [cases, {', '.join(map(str, value.shape[1:]))}]" for name, value in graph.inputs.items())
    print(f"{settings.out}: {', '.join(given)} -> {', '.join(graph.outputs)}")
    return 0


def _hub(settings: Settings) -> int:
    from brainfm.nets.backbone_file import load_backbone
    from brainfm.nets.shipped import located
    from brainfm.submission.sharing import backbone_card, write_hub_folder
    from brainfm.tasks.bundle import read_bundle

    _one_of(settings)
    if settings.bundle is not None:
        bundle, source = read_bundle(settings.bundle), settings.bundle
        card = (settings.bundle / "README.md").read_text(encoding="utf-8")
        about: dict[str, Any] = {"kind": "bundle", "fingerprint": bundle.fingerprint, "task": bundle.task.to_dict()}
        about |= {"preprocess": bundle.preprocess.to_dict(), "provenance": bundle.provenance.to_dict()}
    else:
        assert settings.backbone is not None
        loaded, source = load_backbone(settings.backbone), located(settings.backbone)
        card = backbone_card(loaded)
        about = {"kind": "backbone", "fingerprint": loaded.fingerprint, "backbone": loaded.backbone.config}
        about |= {"preprocess": loaded.preprocess.to_dict(), "provenance": loaded.provenance.to_dict()}
    write_hub_folder(settings.out, source, about, card, settings.licence)
    print(f"{settings.out}: {about['kind']} {about['fingerprint'][:16]}, licence {settings.licence}")
    return 0


def _monai(settings: Settings) -> int:
    from brainfm.submission.sharing import write_monai_bundle
    from brainfm.tasks.bundle import read_bundle

    _needed(settings, "bundle")
    assert settings.bundle is not None
    write_monai_bundle(settings.out, read_bundle(settings.bundle), settings.licence)
    print(f"{settings.out}: python -m monai.bundle run --config_file configs/inference.json --bundle_root .")
    return 0


def _one_of(settings: Settings) -> None:
    """Raises: ConfigError unless there is a backbone or a bundle."""
    if (settings.backbone is None) == (settings.bundle is None):
        raise ConfigError(f"brainfm export format={settings.format}: expected either backbone=FILE or bundle=DIR")


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
