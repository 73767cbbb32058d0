"""podman-compose with one change: ``podman create`` reads variables from a file in memory.

podman-compose 1.6 passes each variable of a service as ``-e NAME=VALUE``, which ``ps`` shows to
every user of the machine while the container is created.
"""

import os
import sys
from typing import Any

import podman_compose  # type: ignore[import-untyped]

container_to_args = podman_compose.container_to_args


async def private_container_to_args(*arguments: Any, **options: Any) -> list[str]:
    """Return the arguments of ``podman create`` with ``--env-file`` in place of each ``-e``."""
    words = iter(await container_to_args(*arguments, **options))
    kept, variables = [], []
    for word in words:
        if word == "-e":
            variables.append(next(words))
        else:
            kept.append(word)
    descriptor = os.memfd_create("environment")
    os.write(descriptor, "\n".join(variables).encode())
    # The descriptor stays open: podman opens the file by the path of this process.
    return [f"--env-file=/proc/{os.getpid()}/fd/{descriptor}", *kept]


if __name__ == "__main__":
    podman_compose.container_to_args = private_container_to_args
    sys.exit(podman_compose.main())
