"""Models for sharing: one graph of a bundle, a folder for a model hub, and a bundle of MONAI's."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from brainfm import __version__
from brainfm.errors import ConfigError
from brainfm.files import write_folder, write_text, writing_folder
from brainfm.nets.backbone_file import LoadedBackbone
from brainfm.nets.exchange.graphs import Graph, write_graph
from brainfm.tasks.bundle import Bundle
from brainfm.tasks.registry import kind_of

_YAML_WORDS = ("yes", "no", "on", "off", "y", "n", "true", "false", "null")  # what YAML takes for other than text
_MOST_VOXELS = 512**3  # of a graph's windows: more than any scanner gives, and a first map that still fits a memory


def bundle_graph(bundle: Bundle) -> Graph:
    """A bundle as one network, for graphs. Raises: ConfigError for what no graph can hold, in one sentence."""
    task = bundle.task
    try:
        graph = kind_of(task.kind).graph(bundle.networks, task, bundle.decisions)
    except ConfigError as error:
        raise ConfigError(f"{bundle.path}: {error}") from None
    about = {
        "brainfm": __version__, "fingerprint": bundle.fingerprint, "task": task.to_dict(),
        "preprocess": bundle.preprocess.to_dict(), "decisions": bundle.decisions.to_dict(), **graph.about,
    }  # fmt: skip
    return replace(graph, about=about)


def backbone_graph(loaded: LoadedBackbone, patch_vox: tuple[int, int, int] | None = None) -> Graph:
    """The same of an encoder: one channel in, its maps out. Raises: ConfigError for a patch that does not fit."""
    backbone, patch = loaded.backbone, patch_vox or loaded.patch_vox
    backbone.check_patch(patch)
    if math.prod(patch) > _MOST_VOXELS:
        raise ConfigError(
            f"patch_vox={list(patch)}: a window of {math.prod(patch) / 1e6:,.0f} million voxels, expected at most "
            f"{_MOST_VOXELS / 1e6:.0f} million"
        )
    about = {
        "brainfm": __version__, "fingerprint": loaded.fingerprint, "backbone": backbone.config,
        "preprocess": loaded.preprocess.to_dict(), "strides": list(backbone.strides), "widths": list(backbone.widths),
        "input": "image: [cases, 1, X, Y, Z], RAS+, prepared as `preprocess` says",
    }  # fmt: skip
    names = tuple(f"map_{stride}" for stride in backbone.strides)
    return Graph(backbone, {"image": torch.randn(2, 1, *patch)}, names, about)


# ---- a folder for a hub ----------------------------------------------------------------------------------------------


def write_hub_folder(out: Path, source: Path, about: Mapping[str, Any], card: str, licence: str) -> None:
    """A folder that can be pushed to a model hub as it is: ``config.json``, ``README.md`` with its front matter, and
    ``model.safetensors``, or the bundle untouched in ``bundle/``. Nothing is sent anywhere.

    Args:
        source: a backbone file or a bundle.
        about: what ``config.json`` holds.
        card: the model card's text.
        licence: an identifier as hubs know them, e.g. ``cc-by-4.0``; the weights', which their data decide.

    Raises: ConfigError where the folder holds something; FileError.
    """
    _check_free(out)
    front = [
        "---",
        f"license: {_yaml(licence)}",
        "library_name: brainfm",
        "tags: [mri, brain, medical-imaging]",
        "---",
        "",
    ]
    contents = {
        "config.json": (json.dumps(dict(about), indent=2) + "\n").encode(),
        "README.md": ("\n".join(front) + card).encode(),
    }
    with writing_folder(out) as part:
        for name, content in contents.items():
            (part / name).write_bytes(content)
        if source.is_dir():
            write_folder(part / "bundle", {path.name: path.read_bytes() for path in sorted(source.iterdir())})
        else:
            (part / "model.safetensors").write_bytes(source.read_bytes())


def _check_free(out: Path) -> None:
    """Raises: ConfigError where the folder holds something."""
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={out}: is there already; expected a free place for a folder")


def _yaml(text: str) -> str:
    """A text as a value of YAML: as it stands where it is a plain word, else quoted."""
    plain = re.fullmatch(r"[A-Za-z][\w.+-]*", text) and text.lower() not in _YAML_WORDS
    return text if plain else json.dumps(text)


def backbone_card(loaded: LoadedBackbone) -> str:
    """A model card of a backbone: what it is, what it saw, how it is used."""
    backbone, spec, origin = loaded.backbone, loaded.preprocess, loaded.provenance
    size = sum(p.numel() for p in backbone.parameters()) / 1e6
    seen = f"{origin.samples:,} samples, {origin.steps:,} steps, {origin.hours:g} hours" if origin.steps else "not told"
    beside = "the skip decoder that was trained with it" if loaded.decoder is not None else "no decoder"
    maps = ", ".join(f"{width} channels at stride {s}" for width, s in zip(backbone.widths, backbone.strides))
    spacing, (low, high) = " x ".join(f"{edge:g}" for edge in spec.spacing_mm), spec.clip_percentiles
    return f"""# {backbone.config["name"]}: a 3D brain-MRI encoder

{size:.1f} million parameters, pre-trained with `{loaded.objective["name"]}`, and {beside}. One channel in: any
contrast, each by itself. Maps out: {maps}.

| | |
|---|---|
| scans | RAS+, {spacing} mm, clipped at percentiles {low:g} and {high:g} of the head, then standardised over it |
| trained on | patches of {" x ".join(map(str, loaded.patch_vox))} voxels |
| training | {seen} |
| fingerprint | `{loaded.fingerprint}` |

```
pip install brainfm-mri
brainfm finetune task=segmentation task.target=lesion store=STORE run=RUN backbone_from=model.safetensors
python -c "import brainfm; print(brainfm.load('model.safetensors'))"
```

Research software, no medical device.
"""


# ---- MONAI -----------------------------------------------------------------------------------------------------------


def write_monai_bundle(out: Path, bundle: Bundle, licence: str) -> None:
    """A bundle as MONAI's tools run it: ``configs/metadata.json``, ``configs/inference.json``, ``models/model.ts``.

    MONAI prepares scans with its own transforms: the same axes, voxel size and windows, but intensities standardised
    without clipping over what is not 0, and no crop. Answers differ from brainfm's by that.

    Raises: ConfigError where the folder holds something, or the bundle answers for a whole head; FileError.
    """
    _check_free(out)
    if bundle.task.kind != "segmentation":
        raise ConfigError(
            f"{bundle.path}: answers for a whole head, whose view MONAI has no transform for; expected a "
            "segmentation's bundle, or format=onnx"
        )
    graph = bundle_graph(bundle)
    with writing_folder(out) as part:
        write_text(part / "configs" / "metadata.json", json.dumps(_metadata(bundle, licence), indent=2) + "\n")
        write_text(part / "configs" / "inference.json", json.dumps(_inference(bundle), indent=2) + "\n")
        write_text(part / "docs" / "README.md", (bundle.path / "README.md").read_text(encoding="utf-8") + _DIFFERS)
        write_graph(part / "models" / "model.pt", "torchscript", graph)
        (part / "models" / "model.pt").replace(part / "models" / "model.ts")


_DIFFERS = """
## In MONAI

`python -m monai.bundle run --config_file configs/inference.json --bundle_root .` labels the scans of `inputs/`. MONAI
prepares them with its own transforms: intensities are standardised over what is not 0, without clipping, and nothing is
cropped; `brainfm predict` does more, and its answers are those that were scored.
"""


def _metadata(bundle: Bundle, licence: str) -> dict[str, Any]:
    task, patch = bundle.task, list(bundle.task.patch_vox)
    channels = {str(index): contrast for index, contrast in enumerate(task.contrasts)}
    classes = {str(index): "background" if not index else f"{task.target} {v}" for index, v in enumerate(task.values)}
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json",
        "version": __version__,
        "changelog": {__version__: "exported by brainfm"},
        "monai_version": "1.4.0", "pytorch_version": torch.__version__.split("+")[0], "numpy_version": "1.26.4",
        "name": f"brainfm {task.target}",
        "task": f"{task.target} in brain MRI",
        "description": f"A brainfm bundle, fingerprint {bundle.fingerprint}",
        "authors": "see docs/README.md", "copyright": licence,
        "network_data_format": {
            "inputs": {"image": {
                "type": "image", "format": "magnitude", "modality": "MR", "num_channels": len(task.contrasts),
                "spatial_shape": patch, "dtype": "float32", "value_range": [], "is_patch_data": True,
                "channel_def": channels,
            }},
            "outputs": {"pred": {
                "type": "probabilities", "format": "segmentation", "num_channels": task.classes,
                "spatial_shape": patch, "dtype": "float32", "value_range": [0, 1], "is_patch_data": True,
                "channel_def": classes,
            }},
        },
    }  # fmt: skip


def _inference(bundle: Bundle) -> dict[str, Any]:
    task = bundle.task
    keys = list(task.contrasts)
    return {
        "imports": ["$import glob", "$import os", "$import torch", "$import numpy as np"],
        "bundle_root": ".", "dataset_dir": "$@bundle_root + '/inputs'", "output_dir": "$@bundle_root + '/outputs'",
        "contrasts": keys,
        "cases": "$sorted(p for p in glob.glob(@dataset_dir + '/*') if os.path.isdir(p))",
        "data": "$[{c: os.path.join(p, c + '.nii.gz') for c in @contrasts} for p in @cases]",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "network": "$torch.jit.load(@bundle_root + '/models/model.ts', map_location=@device).eval()",
        "preprocessing": {"_target_": "Compose", "transforms": [
            {"_target_": "LoadImaged", "keys": keys, "ensure_channel_first": True},
            {"_target_": "Orientationd", "keys": keys, "axcodes": "RAS"},
            {"_target_": "Spacingd", "keys": keys, "pixdim": list(bundle.preprocess.spacing_mm), "mode": "bilinear"},
            {"_target_": "NormalizeIntensityd", "keys": keys, "nonzero": True, "channel_wise": True},
            {"_target_": "ConcatItemsd", "keys": keys, "name": "image"},
        ]},
        "dataset": {"_target_": "Dataset", "data": "$@data", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": {
            "_target_": "SlidingWindowInferer", "roi_size": list(task.patch_vox), "sw_batch_size": 1, "overlap": 0.5,
            "mode": "gaussian",
        },
        "postprocessing": {"_target_": "Compose", "transforms": [
            {
                "_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": keys[0],
                "nearest_interp": False, "to_tensor": True,
            },
            {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
            {
                "_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir", "output_postfix": task.target,
                "output_dtype": "$np.uint8", "separate_folder": True,
            },
        ]},
        "evaluator": {
            "_target_": "SupervisedEvaluator", "device": "@device", "val_data_loader": "@dataloader",
            "network": "@network", "inferer": "@inferer", "postprocessing": "@postprocessing",
        },
        "run": ["$@evaluator.run()"],
    }  # fmt: skip
