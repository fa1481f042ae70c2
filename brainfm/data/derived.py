"""Derived images, told by their names: files that are no scans but were made of one."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from brainfm.imaging.endings import strip_ending

LABEL = "label or mask by name; claim with masks.NAME= or labels.NAME="
MAP = "map of probabilities, tissue, thickness or the like, by name"
TRANSFORM = "deformation or other transform by name"
PART = "phase, real or imaginary part by name"
COPY = "made from the scan beside it, by name"
TEMPLATE = "template that scans are compared with, by name"
FREESURFER = "working file of FreeSurfer beside its T1.mgz"

# Words are what stands between _ - . and blanks, in small letters. Entities of BIDS that only tell a scan from others
# are not asked: a subject may be called GT, an acquisition seg.
_IDENTITY = re.compile(
    r"(?:^|(?<=_))(?:(?:sub|ses|acq|run|task|dir|rec|echo|flip|inv|mt|proc|den|recording|chunk|sample|mod)-[a-z0-9+]*"
    r"|(?:sub|ses)_\d+)(?=[^a-z0-9+]|$)"
)
_LABEL = re.compile(
    r"[a-z]*(?:mask|dseg|labelmap|pveseg|label|segm|segmentation|annotation|groundtruth|parcellation|atlas)s?\d*"
    r"|[a-z]*segs?\d*|rois?|msk|gt|aseg|aparc|wmparc|parc|warp|les|truth|annots?|consensus|contours?|delineations?|dkt"
    r"|dlmuse|dlicv|ribbon|ples|bles|origsegs|preds?|predictions?|predicted|glistr\w*"
)
_LAST_LABEL = re.compile(
    r"lesions?\d*|wmhs?|hyperintensities|tissues?|manual|expert\d*|rater\d*|tumou?rs?|o?edema|infarcts?"
)
_MAP = re.compile(
    r"[a-z]*(?:probseg|probtissue|probmap|probability|probabilities|posteriors?|thickness|mixeltype|biasfield)\d*"
    r"|probs?|pve\d*|dartelinput|seg8|uncertainty"
)
_LAST_MAP = re.compile(r"gm|wm|csf|grey|gray|white|bias")
_TRANSFORM = re.compile(
    r"[a-z0-9]*(?:warp|warpfield|xfm|jacobian|deformation|deformationfield|displacement|displacementfield|flowfield)\d*"
    r"|jac|velocity|svf|coeffs?|coefs?"
)
_LAST_TRANSFORM = re.compile(r"field|disp")
_TEMPLATE = re.compile(
    r"mni152_t[12]_\d|mni152nlin|avg152t[12]|avg305|(?:mni_)?icbm_?152|colin_?27|template(?![a-z0-9])"
)
_PART = re.compile(r"(?:^|_)part-(?!mag(?:_|$))[a-z0-9]+(?=_|$)")
_LAST_PART = re.compile(r"(?:phase|pha?|real|imag|imaginary)\d?")
_NUMBER = re.compile(r"(?:e|echo)?\d{1,2}[a-z]?")  # what a converter may add behind
_FOLDER = re.compile(
    r"labels?(?:tr|ts)?|masks?|segs?|segmentations?|derivatives|rois?|samseg|synthseg|posteriors", re.IGNORECASE
)
# SPM writes before the name, without a mark between: c1 grey matter, wm warped and bias-corrected, y_ deformation,
# s8mwp1 smoothed by 8 mm; wj_ and jac_ of CAT12 are Jacobians.
_SPM = (
    (re.compile(r"(?:(?:s\d{0,2})?[smwr]*(?:c[1-6]|wp[0-3]|p[0-3])|u_r?c[1-6])(?P<rest>.+)"), MAP),
    (re.compile(r"(?:i?y|w?j|jac)_(?P<rest>.+)"), TRANSFORM),
    (re.compile(r"s\d{1,2}w?m?(?P<rest>.+)"), COPY),
)
_ANTS = re.compile(r"(?P<scan>.+?)_?(?:inverse)?warped")  # ANTs writes behind the name without a mark
_SPM_LETTERS, _MOST_LETTERS = "smwra", 5
_BLOOD = re.compile(r"cb[vf]")  # rCBV beside CBV is another measure, not its resliced copy
# Nothing follows the suffix of a BIDS name but what programs add. These additions leave a scan a scan:
_AFTER_SUFFIX = re.compile(r"(?P<scan>sub-[^_]+_(?:[^_]+_)*?(?:t[12]w|flair|pdw|unit1))_(?P<added>.+)")
_STILL_A_SCAN = re.compile(
    r"brain|bet|ss|stripped|skullstripped|strip|synthstrip|masked|restore|n3|n4\w*|bias\w*|corrected|defaced?|norm\w*|"
    r"reg|registered|coreg\w*|resampled?|resliced?|iso|mni\w*|std|reorient\w*|preproc\w*|denoised?|gd|ce|post|c|crop\w*|"
    r"conform\w*|ras|lps|las|\d+(?:mm|iso)?|run|e\d*|mean|ax|sag|cor|tra|3d|2d|space|to|in|t[12]w?|flair|filled|lesion"
)


def why_no_scan(parts: Sequence[str], beside: Collection[str] = ()) -> str:
    """Why a file is not taken for a scan, one of the sentences above; empty for a scan.

    Args:
        parts: the file's folders, below the dataset's, and its name.
        beside: the stems of all images of its folder, in small letters.
    """
    if any(_FOLDER.fullmatch(part) for part in parts[:-1]):
        return LABEL
    stem, folders = strip_ending(parts[-1]).lower(), [part.lower() for part in parts[:-1]]
    if folders[-1:] == ["mri"] and "t1" in beside and "orig" in beside and stem != "t1":
        return FREESURFER
    if folders[-2:] in (["mri", "orig"], ["mri", "transforms"]) and parts[-1].lower().endswith((".mgz", ".mgh")):
        return FREESURFER
    if _TEMPLATE.match(stem):
        return TEMPLATE
    if _PART.search(stem):
        return PART
    by_words = _of_words(_telling_words(stem, folders))
    return _of_spm(stem, beside) or by_words or _of_suffix(stem, beside) or _of_prefix(stem, beside)


def is_label_word(word: str) -> bool:
    """Whether a word of a name speaks of labels; ``seg07`` is one of many that are called so, and does not."""
    return _LABEL.fullmatch(word.lower()) is not None and not re.search(r"\d\d$", word)


def _of_spm(stem: str, beside: Collection[str]) -> str:
    for pattern, reason in _SPM:
        found = pattern.fullmatch(stem)
        if found and (found["rest"] in beside or re.match("sub[-_]", found["rest"])):
            return reason
    for length in range(1, _MOST_LETTERS + 1):
        if stem[length - 1 : length] not in tuple(_SPM_LETTERS):
            break
        if stem[length:] in beside and not _BLOOD.match(stem[length:]):
            return COPY
    warped = _ANTS.fullmatch(stem)
    return COPY if warped and warped["scan"] in beside else ""


def _of_words(words: Sequence[str]) -> str:
    if not words:
        return ""
    named = [word for word in words if not _NUMBER.fullmatch(word)]
    if named and _LAST_PART.fullmatch(named[-1]):
        return PART
    for word in words:
        for pattern, reason in ((_TRANSFORM, TRANSFORM), (_MAP, MAP), (_LABEL, LABEL)):
            if pattern.fullmatch(word):
                return reason
    for pattern, reason in ((_LAST_TRANSFORM, TRANSFORM), (_LAST_MAP, MAP), (_LAST_LABEL, LABEL)):
        if pattern.fullmatch(words[-1]):
            return reason
    return COPY if "synthsr" in words else ""


def _of_suffix(stem: str, beside: Collection[str]) -> str:
    found = _AFTER_SUFFIX.fullmatch(stem)
    if found is None or found["scan"] not in beside:
        return ""
    return "" if all(_STILL_A_SCAN.fullmatch(word) for word in re.findall(r"[a-z0-9]+", found["added"])) else COPY


def _of_prefix(stem: str, beside: Collection[str]) -> str:
    """Nothing stands before the subject in BIDS but what programs add: ``n4_sub-01_T1w``."""
    at = stem.find("sub-", 1)
    return COPY if at > 0 and stem[at:] in beside else ""


def _telling_words(stem: str, folders: Sequence[str]) -> list[str]:
    """The words of a name without those that tell whose it is: the name of a folder above, entities, numbered ids."""
    whole = stem
    for folder in sorted(folders, key=len, reverse=True):
        if stem.startswith(folder) and not stem[len(folder) :][:1].isalnum():
            stem = stem[len(folder) :]
            break
    text = _IDENTITY.sub("", stem).replace("masked_out", "mask")
    words = re.findall(r"[a-z0-9]+", text) or re.findall(r"[a-z0-9]+", _IDENTITY.sub("", whole))
    return words[_end_of_id(words) :]


def _end_of_id(words: Sequence[str]) -> int:
    """How many words are an id in which a label word stands: ``seg07``, ``ms_lesion_seg_003``, before what is shown."""
    for at, word in enumerate(words[:-1]):
        if re.match(r"t[12]|flair|pdw?$|mprage", word):
            return 0
        if _LABEL.fullmatch(word):
            if re.search(r"\d\d$", word):
                return at + 1
            if re.fullmatch(r"\d\d+", words[at + 1]) and at + 2 < len(words):
                return at + 2
    return 0
