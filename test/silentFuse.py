"""A FUSE server of one executable script that stops answering: `silentFuse.py MOUNTPOINT OPERATION FIFO`.

It answers until the first OPERATION (`lookup`, `open` or `read`), and that one only once something is written to FIFO.ON, after which it
answers everything. FIFO.AT says when it has come that far. The kernel does not let go of a request that a server has read and not
answered: whoever waits for it cannot even be killed.
"""

import ctypes
import os
import struct
import sys

LOOKUP, FORGET, GETATTR, OPEN, READ, RELEASE, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR, INTERRUPT, BATCH_FORGET = (
    1, 2, 3, 14, 15, 18, 25, 26, 27, 28, 29, 36, 42)
SILENT = {"lookup": LOOKUP, "open": OPEN, "read": READ}
ROOT, PROGRAM = 1, 2
SCRIPT = b"#!/bin/sh\necho ran >/run/ran\nexec sleep 1000\n"

mountpoint, operation, fifo = sys.argv[1:]
device = os.open("/dev/fuse", os.O_RDWR)
os.makedirs(mountpoint, exist_ok=True)
options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
libc = ctypes.CDLL(None, use_errno=True)
if libc.mount(b"silent", mountpoint.encode(), b"fuse", ctypes.c_ulong(0), options) != 0:
    raise OSError(ctypes.get_errno(), "mount")
for end in ("at", "on"):
    os.mkfifo(f"{fifo}.{end}")
print("mounted", flush=True)


def attributes(node):
    mode, size, links = (0o40755, 0, 2) if node == ROOT else (0o100755, len(SCRIPT), 1)
    return struct.pack("<6Q10I", node, size, 1, 0, 0, 0, 0, 0, 0, mode, links, 0, 0, 0, 4096, 0)


def answer(opcode, node, body):
    if opcode == INIT:
        return struct.pack("<4I2H2I2H8I", 7, 31, 0, 0, 16, 12, 65536, 1, 16, 0, *[0] * 8)
    if opcode == LOOKUP and body == b"program\0":
        return struct.pack("<4Q2I", PROGRAM, 0, 1000, 1000, 0, 0) + attributes(PROGRAM)
    if opcode == GETATTR:
        return struct.pack("<Q2I", 1000, 0, 0) + attributes(node)
    if opcode in (OPEN, OPENDIR):
        return struct.pack("<Q2I", 0, 0, 0)
    if opcode == READ:
        _, offset, size = struct.unpack_from("<2QI", body)
        return SCRIPT[offset : offset + size]
    if opcode in (READDIR, FLUSH, RELEASE, RELEASEDIR):
        return b""
    return None


silent = SILENT[operation]
while True:
    request = os.read(device, 1 << 20)
    _, opcode, unique, node = struct.unpack_from("<2I2Q", request)
    if opcode in (FORGET, BATCH_FORGET, INTERRUPT):
        continue
    if opcode == silent:
        silent = None
        with open(f"{fifo}.at", "w") as at:
            at.write("silent")
        with open(f"{fifo}.on") as on:
            on.read()
    payload = answer(opcode, node, request[40:])
    error = 0 if payload is not None else -(2 if opcode == LOOKUP else 38)
    payload = payload or b""
    os.write(device, struct.pack("<IiQ", 16 + len(payload), error, unique) + payload)
