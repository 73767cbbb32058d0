#!/bin/sh
# start.sh: runs Caddy with the Caddyfile next to it. Caddy gets credentials as HTTP has them, in its environment.
set -eu

encode() {
    printf '%s:%s' "${OPENCODE_SERVER_USERNAME:-opencode}" "$1" | base64 | tr -d '\n'
}

GATEWAY_CREDENTIALS=$(encode "${GATEWAY_PASSWORD:?is empty}")
UPSTREAM_CREDENTIALS=$(encode "${OPENCODE_SERVER_PASSWORD:?is empty}")
GATEWAY_PORT=${GATEWAY_PORT:-4096}
case ${GATEWAY_TLS:=none} in
none) GATEWAY_SITE=http://:$GATEWAY_PORT ;;
*) GATEWAY_SITE=https://${GATEWAY_HOST:?is empty, and TLS needs a name}:$GATEWAY_PORT ;;
esac
export GATEWAY_CREDENTIALS UPSTREAM_CREDENTIALS GATEWAY_SITE GATEWAY_TLS
unset GATEWAY_PASSWORD OPENCODE_SERVER_PASSWORD
exec caddy run --config "$(dirname "$0")/Caddyfile" --adapter caddyfile
