"""Starts several processes of a program on this machine."""

import sys

__all__ = ["torchrun"]


def torchrun(processes: int) -> list[str]:
    """Returns the command that starts a program in several processes; a module follows as `-m`, `module`.

    The address is local, because the name of a machine cannot always be resolved.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=localhost"]
    return [sys.executable, *launcher, f"--nproc-per-node={processes}"]
