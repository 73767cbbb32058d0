#!/bin/sh
# start.sh: runs tinyproxy, which refuses every host but those of EGRESS_HOSTS and their subdomains.
set -eu
umask 077

: >/tmp/hosts
for host in ${EGRESS_HOSTS:-}; do
    printf '(^|\\.)%s$\n' "$(printf %s "$host" | sed 's/\./\\./g')" >>/tmp/hosts
done
cat >/tmp/tinyproxy.conf <<END
Port 8888
Timeout 600
MaxClients 200
LogLevel Connect
DisableViaHeader Yes
ConnectPort 443
Filter "/tmp/hosts"
FilterExtended On
FilterDefaultDeny Yes
END
exec tinyproxy -d -c /tmp/tinyproxy.conf
