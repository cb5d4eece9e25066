"""Every reader of a file succeeds or says in one line what is wrong, whatever the file holds. In full: fuzz.py."""

import time

import pytest
from fuzz import READERS, Late, try_reader

from pretraining.errors import UserError


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert sum(try_reader(name, examples=40).values()) > 15


def test_a_reader_that_lets_an_error_through_is_found(monkeypatch):
    monkeypatch.setattr("fuzz.Position.read", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        try_reader("position", examples=1)


def test_a_reader_that_hangs_is_found_though_it_takes_every_error_for_one_of_the_file(monkeypatch):
    def read(folder):
        try:
            time.sleep(30)
        except Exception as error:
            raise UserError(str(error)) from None

    monkeypatch.setattr("fuzz.SECONDS", 1)
    reads = iter([lambda folder: None])  # what is not damaged is read at once
    monkeypatch.setattr(READERS["text"], "read", lambda folder: next(reads, read)(folder))
    with pytest.raises(Late):
        try_reader("text", examples=2)
