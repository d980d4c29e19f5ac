"""A task of plain Ray beside the service, and the worker that it runs in: ``python -m benchmarks.bystander GCS``.

In: the address of a running instance's GCS, that instance's environment (``app.cluster.environment``). The task waits
and takes no CPU; Ray starts it again in another worker when its own is killed. It ends with this process.
"""

from __future__ import annotations

import sys
import time


def bystander() -> None:
    """Wait."""
    time.sleep(24 * 3600)


def main() -> None:
    """Run the task until somebody ends this process."""
    import ray

    ray.init(address=sys.argv[1], log_to_driver=False)
    ray.get(ray.remote(num_cpus=0, max_retries=-1)(bystander).remote())


if __name__ == "__main__":
    main()
