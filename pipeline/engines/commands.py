"""The command lines of podman and docker. Nothing in here runs a program."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Name = Literal["podman", "docker"]

USER = "1000:1000"
"""``node`` in the image. Any other UID works too."""

Option = str | bool | Sequence[str]
"""The value of an option of the engine's command line; see ``Commands.argv``."""

BOUNDS = {"memory": "4g", "pids_limit": "1024"}
"""Limits of each container; a rootless engine without a delegated cgroup cannot set them."""


@dataclass(frozen=True)
class Commands:
    """The commands of an engine, with the flags that it needs on this machine.

    ``store`` is the directory of its images; empty if that is remote or not readable. ``flags`` go
    before the subcommand, ``limits`` into each ``run`` and ``build``. ``rootless``: root in a
    container is the user here. ``bounded``: the engine can limit memory and processes.
    ``platform`` is what is built for, such as linux/arm64; empty is this machine's own. ``builder``
    is the one of buildx that has this engine's images. ``vfs``: the storage copies each layer.
    ``containerd``: docker keeps its images there.
    """

    name: Name
    program: str
    version: str
    store: str = ""
    flags: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    buildkit: bool = False
    rootless: bool = False
    bounded: bool = True
    platform: str = ""
    builder: str = "default"
    vfs: bool = False
    containerd: bool = False

    @property
    def podman(self) -> bool:
        """Whether this is podman.

        What depends on the engine is decided in this module and in ``detect``.
        """
        return self.name == "podman"

    @property
    def env(self) -> dict[str, str]:
        """The variables that are set for each command, see ``Engine.ask``.

        Others of the engines apply as the user set them: DOCKER_HOST, CONTAINER_HOST and so on.
        """
        if self.podman:
            # Formats without a health check, and builds without a cache.
            return {"BUILDAH_FORMAT": "", "BUILDAH_LAYERS": ""}
        return {
            "DOCKER_BUILDKIT": str(int(self.buildkit)),
            # A builder in a container does not see the images of this engine.
            "BUILDX_BUILDER": self.builder,
            # The setting ``platform`` says it. Content trust would refuse images built here.
            "DOCKER_DEFAULT_PLATFORM": "",
            "DOCKER_CONTENT_TRUST": "",
        }

    @property
    def hardened(self) -> dict[str, Option]:
        """The options of ``run`` that take away everything the server does not need."""
        options: dict[str, Option] = {
            "read_only": True,
            # docker's default is noexec, and OpenCode loads libraries that it unpacks in /tmp.
            "tmpfs": "/tmp:exec",  # noqa: S108 -- in the container
            "cap_drop": "all",
            "security_opt": "no-new-privileges",
        }
        # Rootless: root in the container is the user who owns the volumes here.
        if not self.rootless:
            options["user"] = USER
        if self.bounded:
            options |= BOUNDS
        return options

    def local(self, name: str) -> str:
        """Return the reference of an image built here: podman stores it under ``localhost/``.

        opencode-server -> localhost/opencode-server:latest with podman, opencode-server:latest with
        docker. A name with a registry, a digest or an ID is returned as it is.
        """
        if "@" in name or name.startswith("sha256:"):
            return name
        tagged = name if ":" in name.rsplit("/", 1)[-1] else f"{name}:latest"
        return f"localhost/{tagged}" if self.podman and "/" not in tagged else tagged

    def argv(
        self,
        verb: str,
        *words: str,
        **options: Option,
    ) -> list[str]:
        """Return a command: a ``verb`` such as ``volume ls``, its options, then ``words``.

        An option is named as the engine names it, with _ for -. True is an option without a value;
        False, an empty value and an empty list leave it out; a list repeats it.
        """
        return [
            self.program,
            *self.flags,
            *verb.split(),
            *_words(options),
            *words,
        ]

    def build(
        self,
        context: Path,
        *,
        tag: str,
        containerfile: Path,
        build_args: Mapping[str, str] | None = None,
        cache: bool = True,
    ) -> list[str]:
        """Build the image ``tag``; ``cache=False`` repeats every step.

        podman build --file CONTAINERFILE --tag TAG --build-arg NAME=VALUE --format docker CONTEXT

        ``build_args`` are the values of ARG lines in the Containerfile.
        """
        arguments = [f"{key}={value}" for key, value in (build_args or {}).items()]
        words = [*self.limits, str(context)] if self.podman else [str(context)]
        return self.argv(
            "build",
            *words,
            file=str(containerfile),
            tag=self.local(tag),
            no_cache=not cache,
            build_arg=arguments,
            # The OCI format, which is podman's default, has no HEALTHCHECK.
            format="docker" if self.podman else "",
            progress="plain" if self.buildkit else "",
            platform=self.platform,
        )

    def run(
        self,
        image: str,
        *command: str,
        hardened: bool = True,
        **options: Option,
    ) -> list[str]:
        """Run an image, with ``detach`` in the background, with ``rm`` once in the foreground.

        ``env`` holds names, or NAME=VALUE for values that may show in ``ps``.
        """
        if hardened:
            options = self.hardened | options
        return self.argv("run", *self.limits, image, *command, **options)

    def exec(
        self,
        container: str,
        *command: str,
        **options: Option,
    ) -> list[str]:
        """Run a command in a running container.

        podman exec --env NAME=VALUE --user USER CONTAINER COMMAND

        ``detach=True`` does not wait for it; ``interactive=True`` and ``tty=True`` are for people.
        """
        return self.argv("exec", container, *command, **options)

    def remove_container(self, name: str) -> list[str]:
        """Kill and remove a container with its anonymous volumes.

        podman rm --force --volumes --time 0 CONTAINER
        """
        # podman waits 10 s for it to exit otherwise; podman 3 has no --time.
        at_once = "0" if self.podman and not self.version.startswith("3.") else ""
        return self.argv("rm", name, force=True, volumes=True, time=at_once)

    def logs(
        self,
        container: str,
        lines: int,
        *,
        follow: bool = False,
    ) -> list[str]:
        """Print the last ``lines`` of a container's log; ``follow`` goes on printing.

        podman logs --tail LINES --follow CONTAINER
        """
        return self.argv("logs", container, tail=str(lines), follow=follow)

    def inspect(
        self,
        container: str,
        template: str = "{{json .}}",
    ) -> list[str]:
        """Print what a Go template selects of a container's description.

        podman inspect --type container --format TEMPLATE CONTAINER

        Both engines know .State, .Config, .HostConfig and .Image.
        """
        return self.argv("inspect", container, type="container", format=template)

    def kill(
        self,
        container: str,
        signal: str = "TERM",
    ) -> list[str]:
        """Send a signal to the first process of a container.

        podman kill --signal SIGNAL CONTAINER
        """
        return self.argv("kill", container, signal=signal)

    def memory(self, containers: Sequence[str]) -> list[str]:
        """Print NAME, a tab and USED / LIMIT of each running container.

        podman stats --no-stream --format TEMPLATE CONTAINERS
        """
        return self.argv("stats", *containers, no_stream=True, format="{{.Name}}\t{{.MemUsage}}")

    def healthcheck(
        self,
        container: str,
        command: str,
    ) -> list[str]:
        """Run the health check of the image now; docker has no such command, so ``command`` is run.

        podman healthcheck run CONTAINER
        docker exec CONTAINER /bin/sh -c COMMAND
        """
        if self.podman:
            return self.argv("healthcheck", "run", container)
        return self.exec(container, "/bin/sh", "-c", command)

    def stop(self, containers: Sequence[str], seconds: int) -> list[str]:
        """Send SIGTERM to containers, and SIGKILL after ``seconds``.

        podman stop -t SECONDS CONTAINERS
        """
        return self.argv("stop", "-t", str(seconds), *containers)

    def remove_network(self, name: str) -> list[str]:
        """Remove a network.

        podman network rm NAME
        """
        return self.argv("network rm", name)

    def list_volumes(self, project: str = "") -> list[str]:
        """Print the names of all volumes, or of those of a Compose project.

        podman volume ls --quiet --filter label=com.docker.compose.project=PROJECT

        podman-compose sets the same label as Compose.
        """
        only = f"label=com.docker.compose.project={project}" if project else ""
        return self.argv("volume ls", quiet=True, filter=only)

    def remove_image(self, reference: str) -> list[str]:
        """Remove a name of an image, and the image with its last name.

        podman rmi REFERENCE
        """
        return self.argv("rmi", reference)

    def import_(
        self,
        tar: Path,
        tag: str,
        changes: Sequence[str] = (),
    ) -> list[str]:
        """Make an image of one layer out of a root file system.

        podman import --change INSTRUCTION --os linux --arch ARCHITECTURE TAR TAG

        ``changes`` are instructions of a Containerfile, such as ENV A=1.
        """
        words = [str(tar), self.local(tag)]
        if self.podman and self.platform:  # podman import has no --platform
            architecture = self.platform.rpartition("/")[2]
            return self.argv("import", *words, change=changes, os="linux", arch=architecture)
        return self.argv("import", *words, change=changes, platform=self.platform)

    def pull(self, reference: str) -> list[str]:
        """Pull an image; a name without a registry means Docker Hub.

        podman pull --tls-verify=false --platform PLATFORM docker://REFERENCE
        docker pull --platform PLATFORM REFERENCE

        podman gets ``docker://``, which bypasses the short names of its registries.conf.
        """
        source = f"docker://{reference}" if self.podman else reference
        return self.argv("pull", *self._plain_http(reference), source, platform=self.platform)

    def push(self, reference: str) -> list[str]:
        """Push an image; the last ``sha256:`` on stdout is its digest in the registry.

        podman push --digestfile /dev/stdout REFERENCE
        docker push REFERENCE
        """
        digest = "/dev/stdout" if self.podman else ""
        return self.argv("push", *self._plain_http(reference), reference, digestfile=digest)

    def manifest(self, reference: str) -> list[str]:
        """Ask the registry for the manifest of an image without pulling it.

        podman manifest inspect REFERENCE
        """
        return self.argv("manifest inspect", reference)

    def index(self, target: str, images: Sequence[str]) -> list[list[str]]:
        """Join images of a registry, one of each platform, under the name ``target`` there.

        podman manifest create TARGET, add TARGET docker://IMAGE, push --all TARGET docker://TARGET
        docker manifest create TARGET IMAGES, push TARGET

        The push prints the digest as ``push`` does. ``manifest rm TARGET`` removes the local copy.
        """
        if self.podman:
            # podman 4.3 ignores --tls-verify of a create that names images.
            plain = self._plain_http(target)
            add = self.argv("manifest add", *plain, target)
            words = [*plain, target, f"docker://{target}"]
            return [
                self.argv("manifest create", target),
                *([*add, f"docker://{image}"] for image in images),
                # Without --format: that would change the images, and so their digests.
                self.argv("manifest push", *words, all=True, digestfile="/dev/stdout"),
            ]
        insecure = _on_loopback(target)
        return [
            self.argv("manifest create", target, *images, insecure=insecure),
            self.argv("manifest push", target, insecure=insecure),
        ]

    def _plain_http(self, reference: str) -> list[str]:
        """Allow plain HTTP to a registry on loopback, as docker does by itself.

        Registries on loopback are for tests and local mirrors; they rarely have a certificate.
        """
        return ["--tls-verify=false"] if _on_loopback(reference) and self.podman else []

    def compose(
        self,
        program: Sequence[str],
        file: Path,
        project: str,
        env_file: Path,
        *words: str,
    ) -> list[str]:
        """Return a Compose command for ``project``; ``program`` is what ``find_compose`` returned.

        docker compose --project-name PROJECT --env-file ENV_FILE --file FILE WORDS

        podman-compose adds ``--podman-args`` to each podman command and ``--podman-run-args`` to
        ``podman create``.
        """
        options: dict[str, Option] = {"project_name": project}
        options |= {"env_file": str(env_file), "file": str(file)}
        argv = [*program, *_words(options)]
        if self.podman:
            # podman-compose puts all services into one pod otherwise, with one network name space.
            argv += ["--in-pod=false", "--podman-path", self.program]
            argv.append(f"--podman-args={shlex.join(self.flags)}")
            argv.append(f"--podman-run-args={shlex.join(self.limits)}")
        return [*argv, *words]


def _on_loopback(reference: str) -> bool:
    return reference.startswith(("127.0.0.1:", "localhost:"))


def _words(options: Mapping[str, Option]) -> list[str]:
    """Return options as words; see ``argv``."""
    words = []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value:
            for each in [value] if isinstance(value, str) else value:
                words += [option, each]
    return words
