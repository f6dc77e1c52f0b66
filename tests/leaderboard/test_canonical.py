from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leaderboard.canonical import canonical, digest, sha256_file

TEXT = st.text(st.characters(codec="utf-8"), max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def test_the_canonical_form_is_the_one_written_out_by_hand() -> None:
    assert canonical({"b": [1, 2.5, None], "a": {"é": True}}) == '{"a":{"é":true},"b":[1,2.5,null]}'.encode()


@given(st.dictionaries(TEXT, JSON, max_size=5))
def test_the_order_of_keys_changes_nothing(value: dict[str, object]) -> None:
    assert canonical(dict(reversed(value.items()))) == canonical(value)
    assert digest(dict(reversed(value.items()))) == digest(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_say_is_refused(value: float) -> None:
    with pytest.raises(ValueError):
        canonical({"x": [value]})


def test_a_digest_covers_everything_but_itself_and_the_clock() -> None:
    record = {"id": "x", "metrics": {"clean": 1}}
    expected = hashlib.sha256(b'{"id":"x","metrics":{"clean":1}}').hexdigest()
    assert digest({**record, "digest": "anything", "timing": {"created": "now"}}) == expected
    assert digest({**record, "metrics": {"clean": 2}}) != expected


def test_a_file_is_digested_by_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    # the example of FIPS 180-2, appendix B.1
    assert sha256_file(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
