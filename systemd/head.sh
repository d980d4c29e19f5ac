#!/bin/bash
# What deeptrust-head@.service runs on the head, as the user that `ray up` logs in as:
#   start    Ray, by the very command of cluster.yaml, in the foreground
#   deploy   serve_config.yaml, as soon as Ray's dashboard takes it; exit status 1 if it does not within eight minutes
set -euo pipefail
code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# `ray up` has written it; it sets what is not set
set +u
. ~/deeptrust/cluster.env
set -u
case ${1:-} in
start)
    command=$(python -c '
import sys, yaml
print(yaml.safe_load(open(sys.argv[1]))["head_start_ray_commands"][-1].strip())' "$code/cluster.yaml")
    if [ ! -r ~/ray_bootstrap_config.yaml ]; then
        echo "~/ray_bootstrap_config.yaml is missing: bring the cluster up first (ray up cluster.yaml)" >&2
        exit 1
    fi
    exec /bin/bash -c "$command --block"
    ;;
deploy)
    export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$DASHBOARD_PORT
    cd "$code"
    until=$((SECONDS + 480))
    until serve deploy serve_config.yaml; do
        if [ "$SECONDS" -ge "$until" ]; then
            echo "serve_config.yaml was not taken: see $RAY_FOLDER/session_latest/logs/dashboard.log" >&2
            exit 1
        fi
        sleep 5
    done
    ;;
*)
    echo "usage: head.sh start|deploy" >&2
    exit 2
    ;;
esac
