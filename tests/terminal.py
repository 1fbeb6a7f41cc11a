"""Runs a command at a terminal of its own and answers the question that it asks.

    terminal.py STDOUT ANSWER COMMAND...

The command's stdout goes to the file STDOUT; what it writes to the terminal goes to our stdout. ANSWER
is typed once `[y/N]` is seen: a text, or `^C`. Exits with the command's code, or 128 and its signal.
"""

import os
import pty
import select
import sys
import time

SECONDS = 60


def main(stdout, answer, *command):
    pid, terminal = pty.fork()
    if pid == 0:
        os.dup2(os.open(stdout, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 1)
        os.execv(command[0], command)
    typed = b"\x03" if answer == "^C" else answer.encode() + b"\n"
    seen, has_answered = b"", False
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 0.1)[0]:
            continue
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the terminal is closed: the command has ended
            break
        if not part:
            break
        seen += part
        if b"[y/N]" in seen and not has_answered:
            has_answered = True
            os.write(terminal, typed)
    else:
        os.kill(pid, 9)
    sys.stdout.buffer.write(seen)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    sys.exit(code if code >= 0 else 128 - code)


main(*sys.argv[1:])
