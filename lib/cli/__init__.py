"""Flags to values: in, a command line; out, one frozen value of all that it names, opened and checked.

command.py starts and ends a command, flags.py has the flags that commands share, prune_flags.py main.py's own, and prune_checks.py
what of those contradicts each other. open.py opens models and text, run.py all that main.py needs. Below this room nobody sees
an `argparse.Namespace`, and nobody writes to one.
"""
