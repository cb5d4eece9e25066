"""Every reader of a file succeeds or says in one line what is wrong, whatever the file holds. In full: fuzz.py."""

import pytest
from fuzz import READERS, try_reader


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert sum(try_reader(name, examples=60).values()) > 20


def test_a_reader_that_lets_an_error_through_is_found(monkeypatch):
    monkeypatch.setattr("fuzz.Position.read", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        try_reader("position", examples=1)
