#!/bin/sh
# configure.sh: system-wide settings of programs that agents use, for any user on a read-only root.
set -eu

# The container is the security boundary. Without this, git refuses a project of another user, and OpenCode then has no
# diffs, undo or project for it.
printf '[safe]\n\tdirectory = *\n[credential]\n\thelper = /app/scripts/git-credential-env\n' >/etc/gitconfig

# The web terminal starts a login shell, and Debian's /etc/profile resets PATH.
cat >/etc/profile.d/opencode-server.sh <<'END'
PATH=/app/scripts:/opt/venv/bin:$PATH
END

# Names of users that are known at run time only: scripts/opencode writes the file.
sed --in-place --regexp-extended 's/^(passwd|group):.*/& extrausers/' /etc/nsswitch.conf
rm -rf /var/lib/extrausers
ln -s /tmp/extrausers /var/lib/extrausers
