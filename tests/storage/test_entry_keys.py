"""Keys of the entries in Keras's files: made and taken apart by one pair of functions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freezeops.storage.entry_keys import EntryKey, entry_key, parse_entry_key

NAMES = st.text(st.characters(exclude_categories=["Cs"]))  # a surrogate is no text of a file
KEYS = st.builds(EntryKey, st.sampled_from(["record", "mask", "unseeded"]), st.integers(0, 10**8), NAMES)


@given(KEYS | st.just(EntryKey("index")))
def test_a_key_is_read_as_it_was_written(key):
    text = entry_key(key)
    assert parse_entry_key(text) == key
    assert "/" not in text  # a group of HDF5 would begin there


def test_keys_are_those_of_files_that_exist():
    assert entry_key(EntryKey("index")) == "index"
    assert entry_key(EntryKey("record", 12, "head/kernel#1")) == "record 000012 head%2Fkernel%231"
    assert parse_entry_key("unseeded 000003 a%2Fb c") == EntryKey("unseeded", 3, "a/b c")


@pytest.mark.parametrize("text", ["", "0", "vars", "record", "record 1", "mask x a", "index 1", " record 000001 a"])
def test_other_keys_are_none_of_ours(text):
    assert parse_entry_key(text) is None
