#!/bin/sh
# install_debian.sh PACKAGE...: installs Debian packages and prepares the directories that any user may write to.
set -eu
touch /tmp/started

export DEBIAN_FRONTEND=noninteractive
apt-get update
# The official node:20-slim is no longer rebuilt: Node 20 ended in April 2026.
apt-get upgrade --yes --no-install-recommends
apt-get install --yes --no-install-recommends "$@"

# A new volume takes the mode of its mount point. /root is HOME for every user, and is only read.
mkdir -p /root/.local/share/opencode /workspace /backups
chmod 755 /root
chmod 1777 /root/.local/share/opencode /workspace /backups

"$(dirname "$0")/configure.sh"
"$(dirname "$0")/trim.sh"

# Fixed times: 315532800 is 1980-01-01, the earliest time that a zip file can hold.
find / -xdev -newer /tmp/started -exec touch --no-dereference --date=@315532800 {} +
rm /tmp/started
