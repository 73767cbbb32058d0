#!/bin/sh
# install_opencode.sh: OpenCode, globally by npm, and the dependencies of its plugins.
# CA certificates of the network are mounted at /dev/ca: /dev is in no layer.
set -eu
export npm_config_cache=/tmp/npm-cache npm_config_update_notifier=false
touch /tmp/started

if ls /dev/ca/*.crt >/dev/null 2>&1; then
    cat /dev/ca/*.crt >/tmp/ca.pem
    export NODE_EXTRA_CA_CERTS=/tmp/ca.pem
fi

# `npm ci` verifies every package against the lock. OpenCode is then installed from the tarball that was verified, without its
# optional packages: one binary of 177 MB per platform, two of them on x86-64. The lock names the one without AVX2.
cp -r "$(dirname "$0")/npm/$(node --print process.arch)" /tmp/npm
cd /tmp/npm
npm ci --ignore-scripts --omit=optional --no-audit --no-fund --loglevel=error
cd node_modules/opencode-ai
npm pkg delete optionalDependencies scripts
npm install --global --offline --ignore-scripts --no-fund "$(npm pack --silent)"
mv ../opencode-linux-*/bin/opencode /usr/local/lib/node_modules/opencode-ai/bin/opencode.exe
HOME=/tmp/home opencode --version

# OpenCode runs `npm install` in each configuration directory at the first request, unless package.json, the lock and
# node_modules exist. It writes a .gitignore where there is none, and answers 500 where it cannot. The plugin package's V1
# entry imports only zod: its other dependencies (49 MB, for V2), type declarations and source maps are left out.
cd /tmp/npm
version=$(node --print 'require("./package.json").dependencies["@opencode-ai/plugin"]')
lib=/usr/local/lib/opencode-plugin
mkdir -p "$lib/node_modules/@opencode-ai"
mv node_modules/@opencode-ai/plugin node_modules/@opencode-ai/sdk "$lib/node_modules/@opencode-ai/"
mv node_modules/zod "$lib/node_modules/"
rm -rf "$lib/node_modules/zod/src"
find "$lib" -type f \( -name '*.d.ts' -o -name '*.d.cts' -o -name '*.d.mts' -o -name '*.map' \) -delete
wanted="\"dependencies\":{\"@opencode-ai/plugin\":\"$version\"}"
printf '{%s}\n' "$wanted" >"$lib/package.json"
printf '{"lockfileVersion":3,"packages":{"":{%s},"node_modules/@opencode-ai/plugin":{"version":"%s"}}}\n' \
    "$wanted" "$version" >"$lib/package-lock.json"
for directory in /root/.config/opencode /opt/openagents/.opencode; do
    mkdir -p "$directory"
    printf 'node_modules\npackage.json\npackage-lock.json\n' >"$directory/.gitignore"
    for name in package.json package-lock.json node_modules; do
        ln -s "$lib/$name" "$directory/$name"
    done
done

# OpenCode's embedded npm reads this file, and no other npm does. For a directory with an .opencode of its own it installs the
# plugin package before the first answer; without a network, npm's own retries take 80 s. scripts/plugins/plugin_package.js copies it instead.
mkdir -p /usr/local/lib/node_modules/opencode-ai/etc
printf 'fetch-retries=0\n' >/usr/local/lib/node_modules/opencode-ai/etc/npmrc

cd /
rm -rf /root/.npm /root/.local/state /root/.cache
find / -xdev -newer /tmp/started ! -path '/tmp/*' -exec touch --no-dereference --date=@315532800 {} +
find /tmp -mindepth 1 -xdev -delete
