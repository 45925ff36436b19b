"""Questions to whoever sits at the terminal; passphrases are not shown."""

from __future__ import annotations

import sys


def ask(prompt: str) -> str:
    """Return one line of standard input, without its end."""
    sys.stdout.write(prompt)
    sys.stdout.flush()
    return sys.stdin.readline().rstrip("\n")


def ask_hidden(prompt: str) -> str:
    """Return one line of standard input, which a terminal does not show."""
    if not sys.stdin.isatty():
        return ask(prompt)
    import termios

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    quiet = termios.tcgetattr(fd)
    quiet[3] &= ~termios.ECHO
    try:
        termios.tcsetattr(fd, termios.TCSAFLUSH, quiet)
        return ask(prompt)
    finally:
        termios.tcsetattr(fd, termios.TCSAFLUSH, before)
        sys.stdout.write("\n")


def number(prompt: str) -> int:
    """Return a number that is asked for.

    Raises:
        ValueError: the answer is none.
    """
    answer = ask(prompt)
    try:
        return int(answer)
    except ValueError:
        raise ValueError(f'parsing "{ascii(answer)[1:-1]}": invalid syntax') from None
