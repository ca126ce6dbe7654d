"""Runs a module as a user who may not write where the modes forbid it; root otherwise may."""

import ctypes
import os
import runpy
import struct
import sys

_VERSION_3 = 0x20080522


def _drop_capabilities():
    # https://man7.org/linux/man-pages/man2/capset.2.html: a header, then two sets of three masks.
    header, masks = struct.pack("=Ii", _VERSION_3, 0), bytes(24)
    if ctypes.CDLL(None, use_errno=True).capset(header, masks):
        raise OSError(ctypes.get_errno(), "capset")


if __name__ == "__main__":
    if os.geteuid() == 0:
        _drop_capabilities()
    module = sys.argv.pop(1)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
