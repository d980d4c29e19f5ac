#!/bin/bash
# What deeptrust-head@.service runs on the head, as the user that `ray up` logs in as:
#   start    Ray, by the very command of cluster.yaml, and stays until a process is gone that a head cannot be without: exit
#            status 1, and systemd ends what is left
#   deploy   serve_config.yaml, as soon as Ray's dashboard takes it; exit status 1 if it does not within eight minutes, and at
#            once if there is a mistake in it: Ray passes over keys that it does not know
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
    /bin/bash -c "$command"
    # not left to `ray start --block`: it stays when one of them ends with code 0 or by SIGTERM
    # systemd gives the unit a session of its own; the oldest, because each of them forks
    pid_of() { pgrep -o -s 0 "$@" || true; }
    declare -A running
    running[raylet]=$(pid_of -x raylet)
    running[gcs_server]=$(pid_of -x gcs_server)
    running[dashboard]=$(pid_of -f 'ray/dashboard/dashboard[.]py')
    running[autoscaler]=$(pid_of -f 'ray/autoscaler/_private/monitor[.]py')
    echo "watching ${!running[*]}: ${running[*]}"
    while sleep 1; do
        for name in "${!running[@]}"; do
            if ! kill -0 "${running[$name]}" 2>/dev/null; then
                echo "Ray's $name has ended: see $RAY_FOLDER/session_latest/logs" >&2
                # a raylet that is only asked to end tells the GCS first, and waits for it
                kill -KILL "${running[@]}" 2>/dev/null || true
                exit 1
            fi
        done
    done
    ;;
deploy)
    cd "$code"
    python -m app.config serve_config.yaml
    until=$((SECONDS + 480))
    until serve deploy serve_config.yaml; do
        if [ "$SECONDS" -ge "$until" ]; then
            echo "serve_config.yaml was not taken: see $RAY_FOLDER/session_latest/logs/dashboard.log" >&2
            exit 1
        fi
        # systemd starts nothing again before this has ended
        [ -z "${MAINPID:-}" ] || kill -0 "$MAINPID" || exit 1
        sleep 5
    done
    ;;
*)
    echo "usage: head.sh start|deploy" >&2
    exit 2
    ;;
esac
