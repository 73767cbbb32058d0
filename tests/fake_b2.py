"""A fake of Backblaze B2's native API on loopback, with fault injection.

It serves the calls that rclone (API v1) and b2sdk (v3) make in the tests and refuses all others.
Objects are kept in memory. Keys, tokens and the SHA-1 of each upload are checked as B2 does.
https://www.backblaze.com/apidocs
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote, urlsplit

ACCOUNT, KEY = "0123456789ab", "K0012345secretsecretsecret67890"
ACCOUNT_TOKEN, UPLOAD_TOKEN = "account-token", "upload-token"
CHUNK = 1024
SECONDS_PER_CHUNK = 0.02
CAPABILITIES = ["listBuckets", "listFiles", "readFiles", "writeFiles", "deleteFiles"]
CAPABILITIES += ["writeBuckets"]
UNREADABLE = {"isClientAuthorizedToRead": False, "value": None}


class Refused(Exception):
    """An error response: HTTP status, B2's code and a message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Stored:
    """One version of an object."""

    id: str
    bucket: str
    name: str
    data: bytes
    info: dict[str, str]
    sha1: str = ""
    at: int = field(default_factory=lambda: int(time.time() * 1000))

    def __post_init__(self) -> None:
        self.replace(self.data)

    def replace(self, data: bytes) -> None:
        """Change the content and its SHA-1."""
        self.data, self.sha1 = data, sha1(data)

    def json(self) -> dict[str, Any]:
        """Return the version as the API describes it."""
        return {
            "accountId": ACCOUNT,
            "action": "upload",
            "bucketId": self.bucket,
            "contentLength": len(self.data),
            "contentSha1": self.sha1,
            "contentType": "application/octet-stream",
            "fileId": self.id,
            "fileInfo": self.info,
            "fileName": self.name,
            "fileRetention": UNREADABLE,
            "legalHold": UNREADABLE,
            "size": len(self.data),
            "uploadTimestamp": self.at,
        }


@dataclass
class Large:
    """An upload in parts that is not finished."""

    bucket: str
    name: str
    info: dict[str, str]
    parts: dict[int, bytes] = field(default_factory=dict)


def sha1(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


@dataclass
class FakeB2:
    """The content of the server and what was requested.

    ``buckets`` holds the versions of each object, newest last, by bucket and name; the ID of a
    bucket is its name. ``requests`` lists "CALL NAME" of each request and ``refusals`` the code of
    each error. ``fault`` is called with the call and the name of the object before each request.
    It returns an empty string or a fault: ``503``; a code of B2, which is answered with 403; ``cut`` closes the connection half-way;
    ``slow`` transfers a kilobyte at a time; ``hang`` blocks until the server ends.
    """

    port: int = 0
    buckets: dict[str, dict[str, list[Stored]]] = field(default_factory=dict)
    large: dict[str, Large] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    fault: Callable[[str, str], str] = lambda _call, _name: ""
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.RLock = field(default_factory=threading.RLock)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environ(self) -> dict[str, str]:
        """Return the variables that make ``b2:`` a remote of rclone."""
        return {
            "RCLONE_CONFIG_B2_TYPE": "b2",
            "RCLONE_CONFIG_B2_ACCOUNT": ACCOUNT,
            "RCLONE_CONFIG_B2_KEY": KEY,
            "RCLONE_CONFIG_B2_ENDPOINT": self.url,
        }

    def objects(self, bucket: str) -> dict[str, bytes]:
        """Return the newest version of each object, by name."""
        versions = sorted(self.buckets[bucket].items())
        return {name: stored[-1].data for name, stored in versions if stored}

    def tamper(self, bucket: str, name: str, change: Callable[[bytes], bytes]) -> None:
        """Change the content of an object and its SHA-1, as anyone with the keys could."""
        stored = self.buckets[bucket][name][-1]
        stored.replace(change(stored.data))

    def version(self, file_id: str) -> Stored:
        for bucket in self.buckets.values():
            for stored in itertools.chain.from_iterable(bucket.values()):
                if stored.id == file_id:
                    return stored
        raise Refused(404, "not_found", "no such file")

    def _versions(self, bucket: str) -> dict[str, list[Stored]]:
        if bucket not in self.buckets:
            raise Refused(400, "bad_bucket_id", f"no bucket {bucket}")
        return self.buckets[bucket]

    def _store(self, bucket: str, name: str, data: bytes, info: dict[str, str]) -> Stored:
        stored = Stored(f"4_z{next(self.numbers)}", bucket, name, data, info)
        self._versions(bucket).setdefault(name, []).append(stored)
        return stored

    # The calls of the API: each takes and returns a JSON object.

    def b2_list_buckets(self, request: dict[str, Any]) -> dict[str, Any]:
        wanted = {request.get("bucketName"), request.get("bucketId")} - {None}
        return {"buckets": [_bucket(name) for name in self.buckets if wanted <= {name}]}

    def b2_create_bucket(self, request: dict[str, Any]) -> dict[str, Any]:
        name = request["bucketName"]
        if name in self.buckets:
            raise Refused(400, "duplicate_bucket_name", "it exists")
        self.buckets[name] = {}
        return _bucket(name)

    def b2_list_file_versions(self, request: dict[str, Any]) -> dict[str, Any]:
        return self._list(request, lambda versions: versions[::-1])

    def b2_list_file_names(self, request: dict[str, Any]) -> dict[str, Any]:
        return self._list(request, lambda versions: versions[-1:])

    def _list(
        self, request: dict[str, Any], select: Callable[[list[Stored]], list[Stored]]
    ) -> dict[str, Any]:
        """List all objects with the prefix in one page, those in folders as one entry a folder."""
        prefix, delimiter = request.get("prefix") or "", request.get("delimiter")
        first = request.get("startFileName") or ""
        files: dict[str, dict[str, Any]] = {}
        for name, versions in sorted(self._versions(request["bucketId"]).items()):
            if not name.startswith(prefix) or name < first:
                continue
            folder, nested, _ = name.removeprefix(prefix).partition(delimiter or "\0")
            for stored in select(versions):
                if nested:
                    path = f"{prefix}{folder}{delimiter}"
                    files[path] = {"action": "folder", "fileName": path, "contentLength": 0}
                else:
                    files[stored.id] = stored.json()
        return {"files": list(files.values()), "nextFileName": None, "nextFileId": None}

    def b2_delete_file_version(self, request: dict[str, Any]) -> dict[str, Any]:
        stored = self.version(request["fileId"])
        self.buckets[stored.bucket][stored.name].remove(stored)
        return {"fileId": stored.id, "fileName": stored.name}

    def b2_get_upload_url(self, request: dict[str, Any]) -> dict[str, Any]:
        bucket = request["bucketId"]
        self._versions(bucket)
        url = f"{self.url}/upload/{bucket}"
        return {"bucketId": bucket, "uploadUrl": url, "authorizationToken": UPLOAD_TOKEN}

    def b2_start_large_file(self, request: dict[str, Any]) -> dict[str, Any]:
        bucket, name = request["bucketId"], request["fileName"]
        self._versions(bucket)
        file_id = f"4_large{next(self.numbers)}"
        self.large[file_id] = Large(bucket, name, request.get("fileInfo") or {})
        return {"fileId": file_id, "fileName": name, "bucketId": bucket}

    def b2_get_upload_part_url(self, request: dict[str, Any]) -> dict[str, Any]:
        file_id = request["fileId"]
        url = f"{self.url}/part/{file_id}"
        return {"fileId": file_id, "uploadUrl": url, "authorizationToken": UPLOAD_TOKEN}

    def b2_finish_large_file(self, request: dict[str, Any]) -> dict[str, Any]:
        large = self.large.pop(request["fileId"])
        parts = [data for _, data in sorted(large.parts.items())]
        if [sha1(data) for data in parts] != request["partSha1Array"]:
            raise Refused(400, "bad_request", "partSha1Array does not match")
        return self._store(large.bucket, large.name, b"".join(parts), large.info).json()


def _bucket(name: str) -> dict[str, Any]:
    return {
        "accountId": ACCOUNT,
        "bucketId": name,
        "bucketName": name,
        "bucketType": "allPrivate",
        "bucketInfo": {},
        "corsRules": [],
        "lifecycleRules": [],
        "options": [],
        "revision": 1,
        "defaultServerSideEncryption": UNREADABLE,
        "fileLockConfiguration": UNREADABLE,
    }


def authorization(url: str, version: str) -> dict[str, Any]:
    """Return the response of b2_authorize_account in version ``v1`` or ``v3`` of the API."""
    api = {
        "apiUrl": url,
        "downloadUrl": url,
        "s3ApiUrl": url,
        "absoluteMinimumPartSize": 5_000_000,
        "recommendedPartSize": 100_000_000,
    }
    allowed = {
        "capabilities": CAPABILITIES,
        "bucketId": None,
        "bucketName": None,
        "namePrefix": None,
    }
    account = {"accountId": ACCOUNT, "authorizationToken": ACCOUNT_TOKEN}
    if version == "v1":
        return account | api | {"allowed": allowed}
    storage = api | allowed | {"infoType": "storageApi"}
    return account | {
        "apiInfo": {"storageApi": storage},
        "applicationKeyExpirationTimestamp": None,
    }


class Handler(BaseHTTPRequestHandler):
    """One connection of a client. Objects are at /file, uploads at /upload and /part."""

    protocol_version = "HTTP/1.1"
    b2: FakeB2

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_POST(self) -> None:
        url = urlsplit(self.path)
        kind, _, self.rest = unquote(url.path).lstrip("/").partition("/")
        self.call = self.rest.split("/")[-1] if kind == "b2api" else kind
        self.file_id = url.query.removeprefix("fileId=")
        name = self._object_name()
        with self.b2.lock:
            self.b2.requests.append(f"{self.call} {name}".strip())
        if self.file_id:
            with contextlib.suppress(Refused):
                name = self.b2.version(self.file_id).name
        fault = self.b2.fault(self.call, name)
        try:
            self._respond(fault)
        except Refused as refused:
            self.b2.refusals.append(refused.code)
            error = {"status": refused.status, "code": refused.code, "message": str(refused)}
            self._reply(refused.status, json.dumps(error).encode())
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST  # noqa: N815

    def _object_name(self) -> str:
        if self.call == "file":
            return self.rest
        return unquote(self.headers.get("X-Bz-File-Name", ""))

    def _respond(self, fault: str) -> None:
        body = self._body(fault)
        if fault == "503":
            raise Refused(503, "service_unavailable", "try again")
        if "_" in fault:
            raise Refused(403, fault, fault.replace("_", " "))
        with self.b2.lock:
            result = self._result(body)
        if isinstance(result, Stored):
            self._download(result, fault)
        else:
            self._reply(200, json.dumps(result).encode())

    def _body(self, fault: str) -> bytes:
        """Read the request's body, or as much of it as the fault lets through."""
        length = int(self.headers.get("Content-Length", 0))
        if fault == "hang":
            self.b2.over.wait()
            raise ConnectionError
        if fault == "cut" and length:
            self.rfile.read(min(length // 2, 1 << 20))
            raise ConnectionError
        if fault == "slow":
            body = b""
            while len(body) < length:
                body += self.rfile.read(min(CHUNK, length - len(body)))
                self.b2.over.wait(SECONDS_PER_CHUNK)
            return body
        body = self.rfile.read(length)
        if len(body) != length:
            raise ConnectionError
        return body

    def _result(self, body: bytes) -> dict[str, Any] | Stored:
        """Return a JSON object, or the object to download."""
        self._authorize()
        match self.call:
            case "b2_authorize_account":
                return authorization(self.b2.url, self.rest.partition("/")[0])
            case "upload":
                return self._upload(self._checked(body))
            case "part":
                return self._part(self._checked(body))
            case "file":
                bucket, _, name = self.rest.partition("/")
                versions = self.b2.buckets.get(bucket, {}).get(name)
                if not versions:
                    raise Refused(404, "not_found", f"no file {name}")
                return versions[-1]
            case "b2_download_file_by_id":
                return self.b2.version(self.file_id)
        method = getattr(self.b2, self.call, None)
        if not self.call.startswith("b2_") or method is None:
            raise Refused(400, "bad_request", f"no call {self.call}")
        return dict(method(json.loads(body)))

    def _authorize(self) -> None:
        given = self.headers.get("Authorization", "")
        if self.call == "b2_authorize_account":
            keys = base64.b64encode(f"{ACCOUNT}:{KEY}".encode()).decode()
            # b2sdk sends "Basic:".
            if given.replace("Basic:", "Basic ").split() != ["Basic", keys]:
                raise Refused(401, "unauthorized", "wrong keys")
        elif given != (UPLOAD_TOKEN if self.call in ("upload", "part") else ACCOUNT_TOKEN):
            raise Refused(401, "bad_auth_token", "wrong token")

    def _checked(self, body: bytes) -> bytes:
        """Return the content of an upload, without a SHA-1 at its end."""
        expected = self.headers.get("X-Bz-Content-Sha1", "")
        if expected == "hex_digits_at_end":
            body, expected = body[:-40], body[-40:].decode()
        if expected != sha1(body):
            raise Refused(400, "bad_request", "Sha1 did not match data received")
        return body

    def _upload(self, data: bytes) -> dict[str, Any]:
        prefix = "x-bz-info-"
        info = {}
        for header, value in self.headers.items():
            if header.lower().startswith(prefix):
                info[header.lower().removeprefix(prefix)] = unquote(value)
        return self.b2._store(self.rest, self._object_name(), data, info).json()

    def _part(self, data: bytes) -> dict[str, Any]:
        number = int(self.headers["X-Bz-Part-Number"])
        if self.rest not in self.b2.large:
            raise Refused(400, "bad_request", "no such large file")
        self.b2.large[self.rest].parts[number] = data
        return {"fileId": self.rest, "partNumber": number, "contentSha1": sha1(data)}

    def _download(self, stored: Stored, fault: str) -> None:
        data, status = stored.data, 200
        headers = {
            "Content-Type": "application/octet-stream",
            "X-Bz-File-Id": stored.id,
            "X-Bz-File-Name": quote(stored.name),
            "X-Bz-Content-Sha1": stored.sha1,
            "X-Bz-Upload-Timestamp": str(stored.at),
        }
        for name, value in stored.info.items():
            headers[f"X-Bz-Info-{name}"] = quote(value)
        # rclone continues a download that was cut with a range.
        if requested := self.headers.get("Range", "").removeprefix("bytes="):
            first, _, last = requested.partition("-")
            begin, end = int(first), min(int(last or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
            data, status = data[begin : end + 1], 206
        self._reply(status, data, headers, fault)

    def _reply(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, fault: str = ""
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {"Content-Type": "application/json"}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif fault == "slow":
            for place in range(0, len(body), CHUNK):
                self.wfile.write(body[place : place + CHUNK])
                self.b2.over.wait(SECONDS_PER_CHUNK)
        else:
            self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report errors of this file, but no client that was killed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def fake_b2(*buckets: str) -> Iterator[FakeB2]:
    """Run the server with these empty buckets."""
    b2 = FakeB2(buckets={name: {} for name in buckets})
    server = Server(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"b2": b2}))
    b2.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield b2
    finally:
        b2.over.set()
        server.shutdown()
        thread.join()
        server.server_close()
