"""Whom weights have seen: exact, without names, the same for the same seed."""

import hashlib

import pytest

from brainfm.errors import ConfigError
from brainfm.seen import SeenSubjects

KEYS = ["ixi/sub-01", "ixi/sub-02", "openms/sub-01"]


def test_those_that_were_seen_are_found_and_nobody_else():
    seen = SeenSubjects.of([*KEYS, KEYS[0]], seed=0)
    assert seen.among(["ixi/sub-03", "openms/sub-02", "sub-01", *reversed(KEYS), KEYS[1]]) == KEYS
    assert len(seen.hashes) == 3 and SeenSubjects.of([], seed=0).among(KEYS) == []


def test_a_hash_is_that_of_salt_and_name():
    seen = SeenSubjects.of(KEYS[:1], seed=5)
    assert seen.hashes == (hashlib.sha256(bytes.fromhex(seen.salt) + b"ixi/sub-01").hexdigest()[:16],)
    assert "sub" not in str(seen.to_dict())


def test_the_salt_is_the_seeds_and_the_order_of_names_is_nothing():
    assert SeenSubjects.of(KEYS, seed=1) == SeenSubjects.of(KEYS[::-1], seed=1)
    one, other = SeenSubjects.of(KEYS, seed=1), SeenSubjects.of(KEYS, seed=2)
    assert one.salt != other.salt and not set(one.hashes) & set(other.hashes)


def test_round_trip_and_refusals():
    seen = SeenSubjects.of(KEYS, seed=1)
    assert SeenSubjects.from_dict(seen.to_dict()) == seen
    for wrong in ({"salt": "0", "hashes": []}, {"salt": "00", "hashes": ["ab"]}, {"salt": "00", "hashes": [1]}, {}):
        with pytest.raises(ConfigError, match="subjects: "):
            SeenSubjects.from_dict(wrong)
