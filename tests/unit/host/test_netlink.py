"""Frames of rtnetlink."""

from __future__ import annotations

import struct

from apptainer_py.host import netlink


def test_attributes_are_padded_and_found_again():
    data = netlink.attribute(3, b"eth0\0") + netlink.attribute(28, struct.pack("=I", 9))
    assert len(data) == 12 + 8
    assert netlink.attributes(data) == {3: b"eth0\0", 28: b"\x09\0\0\0"}


def test_what_is_cut_off_is_left_out():
    data = netlink.attribute(3, b"eth0\0")
    assert netlink.attributes(data[:7]) == {}
    assert netlink.attributes(b"\x01\0\x03\0") == {}


def test_messages():
    one = struct.pack("=IHHII", 20, 16, 0, 1, 0) + b"abcd"
    two = struct.pack("=IHHII", 17, 3, 0, 1, 0) + b"x" + bytes(3)
    assert list(netlink.messages(one + two)) == [(16, b"abcd"), (3, b"x")]
    assert list(netlink.messages(one[:19])) == []
    assert list(netlink.messages(struct.pack("=IHHII", 4, 16, 0, 1, 0))) == []
