"""An engine that runs its commands: questions about images, and what takes several commands."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core import process
from pipeline.core.errors import ComposeMissing, DiskFull, EngineBroken
from pipeline.engines.commands import Commands

PODMAN_COMPOSE = Path(__file__).with_name("podman_compose_main.py")

ASK_SECONDS = 60.0
"""How long a program may take to answer, and an empty container to start: some hang."""


class Engine(Commands):
    """podman or docker on this machine."""

    def ask(
        self,
        argv: Sequence[str],
        *,
        timeout: float | None = 300,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> process.Completed:
        """Run a command; the ``options`` are those of ``process.run``.

        Raises subprocess.TimeoutExpired after ``timeout`` seconds.
        """
        return process.run(argv, timeout=timeout, env={**self.env, **(env or {})}, **options)

    def answers(self) -> bool:
        """Whether the engine answers; of docker, the daemon.

        podman on this machine has no daemon, so it answers unless it was removed.
        """
        return self.ask(self.argv("version"), timeout=ASK_SECONDS).ok

    def find_compose(self) -> list[str]:
        """Return the command that runs Compose files with this engine.

        podman: podman_compose_main.py in this folder. docker: its plugin (v2), or
        docker-compose (v1).
        Raises ComposeMissing.
        """
        if self.podman:
            if importlib.util.find_spec("podman_compose"):
                return [sys.executable, "-P", str(PODMAN_COMPOSE)]
            raise ComposeMissing(
                f"podman-compose is not installed in {sys.prefix}",
                "Use ./inv, or: pip install --require-hashes -r locks/tasks.txt",
            )
        if self.ask([self.program, "compose", "version"], timeout=ASK_SECONDS).ok:
            return [self.program, "compose"]
        if standalone := shutil.which("docker-compose"):
            return [standalone]
        raise ComposeMissing(
            f"{self.program} has no Compose plugin, and docker-compose is not on PATH",
            "Install docker-compose-plugin or docker-compose, or use podman.",
        )

    def image(self, reference: str) -> dict[str, Any] | None:
        """Return the ``image inspect`` of an image, or None if it is not on this machine.

        The keys are those of docker's API: Id, Created, Size, Config, RootFS and so on.
        ``reference`` is a name, an ID or a digest.
        """
        done = self.ask(self.argv("image inspect", reference))
        if not done.ok:
            return None
        image: dict[str, Any] = json.loads(done.stdout)[0]
        if self.containerd:  # its Size is that of the compressed layers
            sizes = self.ask(self.argv("history", "--human=false", reference, format="{{.Size}}"))
            image["Size"] = sum(map(int, sizes.stdout.split()))
        return image

    def images(self) -> dict[str, dict[str, Any]]:
        """Return the ``image inspect`` of every image by ID, without the prefix ``sha256:``.

        Images without a name are included; RepoTags has the names.
        """
        listed = self.ask(self.argv("images", quiet=True, no_trunc=True)).stdout.split()
        if not listed:
            return {}
        # An image that was removed a moment ago makes it fail; the others are printed.
        done = self.ask(self.argv("image inspect", *sorted(set(listed))))
        inspected = json.loads(done.stdout or "[]")
        return {image["Id"].removeprefix("sha256:"): image for image in inspected}

    def image_names(self) -> dict[str, str]:
        """Return the image ID of each REPOSITORY:TAG.

        podman's IDs have the prefix ``sha256:`` here, as docker's do.
        """
        template = "{{.Repository}}:{{.Tag}} {{.ID}}"
        lines = self.ask(self.argv("images", no_trunc=True, format=template)).stdout.splitlines()
        names = (line.split() for line in lines)
        return {name: identity for name, identity in names if "<none>" not in name}

    def images_in_use(self) -> set[str]:
        """Return the image IDs of all containers, without the prefix ``sha256:``.

        Stopped containers count too: their images cannot be removed.
        """
        listed = self.ask(self.argv("ps", all=True, quiet=True, no_trunc=True)).stdout.split()
        if not listed:
            return set()
        done = self.ask(self.argv("inspect", *listed, format="{{.Image}}"))
        return set(done.stdout.replace("sha256:", "").split())

    def tag(
        self,
        source: str,
        *names: str,
    ) -> None:
        """Give an image more names. Raises EngineBroken.

        A name that another image has is moved to this one.
        """
        for name in names:
            self.must("tag", source, self.local(name))

    def save(
        self,
        image: str,
        archive: Path,
    ) -> None:
        """Write an image to a docker archive, 0.8 GB for ours. Raises DiskFull, EngineBroken.

        The archive is a tar file with a manifest.json and one tar file for each layer.
        """
        self.must("save", "--output", str(archive), image)

    def must(
        self,
        *words: str,
        timeout: float = 300,
    ) -> process.Completed:
        """Run a command that has to succeed. Raises DiskFull, EngineBroken.

        The error names the whole command and quotes its output.
        """
        argv = self.argv(*words)
        done = self.ask(argv, timeout=timeout)
        if done.ok:
            return done
        what = f"{' '.join(argv)} exited with {done.code}"
        if "no space left" in done.output.lower():
            raise DiskFull(what, "Free up space: inv prune, then inv doctor.", done.output)
        raise EngineBroken(what, "Check the engine: inv doctor.", done.output)

    def prune_build_cache(self, mark: str) -> None:
        """Remove what BuildKit keeps of steps whose command has ``mark``, and of those around them.

        What an image still shares stays. The copies of build contexts go too, those of others
        included: they have no name, and the next build sends its context again.
        podman's cache is its images.
        """
        if not self.buildkit:
            return
        listed = self.ask(self.argv("system df", verbose=True, format="{{json .BuildCache}}"))
        records = json.loads(listed.stdout) if listed.ok else []
        records.sort(key=lambda record: str(record["CreatedAt"]))
        ours: set[str] = set()
        for record in records:
            if mark in record["Description"] or ours.intersection(record["Parent"].split(", ")):
                ours.add(record["ID"])
        filters = []
        # A step stays while a later one stands on it: the latest goes first. "from local" is a
        # base; without its image, and without a step on it, it only takes up space.
        for record in reversed(records):
            if record["ID"] in ours or record["Description"].startswith("from local"):
                ours.update(record["Parent"].split(", "))
                if record["Shared"] == "false":
                    filters.append(f"id={record['ID']}")
        for one in [*filters, "type=source.local"]:
            self.ask(self.argv("builder prune", force=True, filter=one))

    def remove_working_containers(
        self,
        since: float,
        base: str,
    ) -> None:
        """Remove the containers that an interrupted ``podman build`` on ``base`` has left.

        ``since`` is when the build began (time.time()). Nothing else identifies them: buildah's
        containers that are younger, on an image that shares the lowest layer of ``base``.
        """
        found = self.image(base) if self.podman else None
        if not found:
            return
        bottom = found["RootFS"]["Layers"][0]
        done = self.ask(self.argv("ps", all=True, external=True, format="json"), timeout=60)
        for container in json.loads(done.stdout or "[]"):
            if container["Command"] != ["buildah"] or container["Created"] < int(since):
                continue
            image = self.image(container["ImageID"])
            if image and image["RootFS"]["Layers"][0] == bottom:
                self.ask(self.remove_container(container["Id"]), timeout=60)
