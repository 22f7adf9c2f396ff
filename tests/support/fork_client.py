"""What a shell starts for elf.py: `python fork_client.py ADDRESS elf.py …` has it forked and ends as it does."""

import json
import os
import signal
import socket
import sys
from pathlib import Path

address, *args = sys.argv[1:]
its_end, told_to = os.pipe()
umask = os.umask(0)
os.umask(umask)
request = {"args": args, "cwd": str(Path.cwd()), "env": dict(os.environ), "umask": umask, "new_session": False}
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect(f"\0{address}")
socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2, told_to])
pid = int(server.recv(64))
os.close(told_to)
for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(each, lambda number, _: os.kill(pid, number))
status = os.waitstatus_to_exitcode(int(os.read(its_end, 64)))
server.send(b"it has ended")  # else this process is being killed
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
