"""Seen subjects: whom a network has seen, without their names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from brainfm import seeds
from brainfm.errors import ConfigError

_DIGITS = 16  # of a hash: 64 bits, so that two of a million people share one with a chance of 3 in 100 million


@dataclass(frozen=True)
class SeenSubjects:
    """The people of a training as salted hashes of ``dataset/subject``; they travel with the weights.

    No name can be read from them. Whoever has a name can ask whether it is among them: that is what they are for, so
    they hide nobody whose name can be guessed. A person under another name or in another data set is not recognised.

    Attributes:
        salt: hexadecimal.
        hashes: of 16 hexadecimal digits, sorted, each once.

    Raises: ConfigError for anything else.
    """

    salt: str
    hashes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.salt, str) or not re.fullmatch(r"([0-9a-f]{2})+", self.salt):
            raise ConfigError(f"subjects: found the salt {self.salt!r}, expected hexadecimal digits")
        wrong = [h for h in self.hashes if not isinstance(h, str) or not re.fullmatch(rf"[0-9a-f]{{{_DIGITS}}}", h)]
        if wrong:
            raise ConfigError(f"subjects: found {wrong[0]!r}, expected hashes of {_DIGITS} hexadecimal digits")
        object.__setattr__(self, "hashes", tuple(sorted(set(self.hashes))))

    @classmethod
    def of(cls, subject_keys: Iterable[str], seed: int) -> SeenSubjects:
        """Of ``dataset/subject`` keys; the salt is drawn from the seed."""
        salt = seeds.stream(seed, "salt of subjects").bytes(16).hex()
        return cls(salt, tuple(_hash(salt, key) for key in subject_keys))

    def with_more(self, subject_keys: Iterable[str]) -> SeenSubjects:
        """These people and further ones, under the same salt."""
        return SeenSubjects(self.salt, (*self.hashes, *(_hash(self.salt, key) for key in subject_keys)))

    def among(self, subject_keys: Iterable[str]) -> list[str]:
        """Those of the given keys that were seen, sorted, each once."""
        seen = set(self.hashes)
        return sorted(key for key in set(subject_keys) if _hash(self.salt, key) in seen)

    def to_dict(self) -> dict[str, Any]:
        return {"salt": self.salt, "hashes": list(self.hashes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SeenSubjects:
        """Raises: ConfigError where it is not what to_dict gives."""
        if not isinstance(values, Mapping) or not isinstance(values.get("hashes"), list) or len(values) != 2:
            raise ConfigError("subjects: expected a salt and a list of hashes")
        return cls(values.get("salt", ""), tuple(values["hashes"]))


@dataclass(frozen=True)
class Overlap:
    """How many of some people a training has seen."""

    seen: int
    of: int

    def __str__(self) -> str:
        return (
            f"{self.seen or 'none'} of the {self.of} people tested here {'were' if self.seen > 1 else 'was'} in the "
            "pre-training of the backbone, as data set and name tell"
        )

    def to_dict(self) -> dict[str, int]:
        return {"seen": self.seen, "of": self.of}


def overlap(subjects: SeenSubjects | None, subject_keys: Iterable[str]) -> Overlap | None:
    """Of these people, each counted once; None where nothing is known of the training."""
    if subjects is None:
        return None
    keys = set(subject_keys)
    return Overlap(len(subjects.among(keys)), len(keys))


def _hash(salt: str, key: str) -> str:
    return hashlib.sha256(bytes.fromhex(salt) + key.encode()).hexdigest()[:_DIGITS]
