"""A second Ray node on this machine, for programs that take it away again: ``python -m benchmarks.second_node GCS``.

In: the address of a running instance's GCS, that instance's environment (``app.cluster.environment``), CPUs that the
node may hand out. Out: a raylet with its agents, all bearing the instance's mark, so that they end with it; it exits
when they run. ``ray start --address`` refuses clusters that are told to stay on loopback, as this one is.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Start the node and leave it running."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    address, cpus = sys.argv[1], float(sys.argv[2])
    parameters = RayParams(
        gcs_address=address,
        node_ip_address="127.0.0.1",
        num_cpus=cpus,
        num_gpus=0,
        object_store_memory=150 * 2**20,
        include_log_monitor=False,
        node_manager_port=0,
        min_worker_port=0,
        max_worker_port=0,
        dashboard_agent_listen_port=0,
    )
    Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=False)


if __name__ == "__main__":
    main()
