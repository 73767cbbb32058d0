#!/bin/sh
# trim.sh: removes what nothing in the image uses, and what differs between two builds of the same packages.
set -eu

rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/log/*.log /var/log/apt/*
rm -f /var/cache/ldconfig/aux-cache

# Debian's git brings perl, and no git command that is used here needs it (33 MB): headers, CJK encodings and
# collation, CPAN and manuals go. So do git's servers, IMAP, WebDAV and scalar, and completions of shells.
rm -rf /usr/lib/*/perl/*/CORE/*.h \
    /usr/lib/*/perl/*/auto/Encode/CN /usr/lib/*/perl/*/auto/Encode/JP \
    /usr/lib/*/perl/*/auto/Encode/KR /usr/lib/*/perl/*/auto/Encode/TW \
    /usr/lib/*/perl/*/auto/Unicode/Collate /usr/share/perl/*/Unicode/Collate /usr/share/perl/*/pod \
    /usr/share/perl/*/CPAN /usr/share/perl/*/Module/CoreList* \
    /usr/lib/git-core/git-daemon /usr/lib/git-core/git-http-backend /usr/lib/git-core/git-http-push \
    /usr/lib/git-core/git-imap-send /usr/lib/git-core/git-shell /usr/bin/git-shell \
    /usr/lib/git-core/scalar /usr/bin/scalar \
    /usr/share/bash-completion/completions /usr/share/fish /usr/share/zsh
find /usr/lib/*/perl /usr/share/perl -name '*.pod' -delete
find /usr/lib/python3/dist-packages -name __pycache__ -prune -exec rm -rf {} +

# The day on which a package created a user.
sed --in-place --regexp-extended 's/^([^:]*:[^:]*):[0-9]+:/\1:3652:/' /etc/shadow /etc/shadow-
