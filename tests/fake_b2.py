"""Backblaze B2's native API over HTTP on loopback, for rclone and b2sdk alike, with faults to order.

It keeps objects in memory, asks for keys and tokens, and refuses what does not match the SHA-1 it is sent with. A fault
is a function that is asked before each request: what it returns is done instead.
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
SECONDS_SLOW = 0.02


@dataclass
class Stored:
    id: str
    name: str
    data: bytes
    info: dict[str, str]
    sha1: str
    at: int
    hidden: bool = False


@dataclass
class FakeB2:
    """``buckets`` are objects by bucket and name, newest version last; ``requests`` what was asked for, in order.

    ``fault`` gets "name of the call" and the object's name when there is one, and returns "" or one of: ``503``;
    ``cut``, the connection ends in the middle; ``slow``, a kilobyte at a time; ``hang``, until the server ends.
    """

    port: int = 0
    buckets: dict[str, dict[str, list[Stored]]] = field(default_factory=dict)
    large: dict[str, tuple[str, str, dict[str, str], dict[int, bytes]]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    fault: Callable[[str, str], str] = lambda _call, _name: ""
    refusals: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.RLock = field(default_factory=threading.RLock)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environ(self) -> dict[str, str]:
        """What makes ``b2:`` a remote of rclone's."""
        told = {"TYPE": "b2", "ACCOUNT": ACCOUNT, "KEY": KEY, "ENDPOINT": self.url}
        return {f"RCLONE_CONFIG_B2_{name}": value for name, value in told.items()}

    def objects(self, bucket: str) -> dict[str, bytes]:
        """Return what a listing would: the newest version of each object that is not hidden."""
        newest = {name: versions[-1] for name, versions in self.buckets[bucket].items() if versions}
        return {name: stored.data for name, stored in sorted(newest.items()) if not stored.hidden}

    def tamper(self, bucket: str, name: str, change: Callable[[bytes], bytes]) -> None:
        """Change an object's content as somebody with the keys would: with a right SHA-1."""
        stored = self.buckets[bucket][name][-1]
        stored.data = change(stored.data)
        stored.sha1 = hashlib.sha1(stored.data, usedforsecurity=False).hexdigest()

    # -- calls of the API: each gets what was sent as JSON, and returns what is sent as JSON

    def b2_list_buckets(self, sent: dict[str, Any]) -> dict[str, Any]:
        names = [name for name in self.buckets if sent.get("bucketName") in (None, name)]
        return {"buckets": [self._bucket(name) for name in names if sent.get("bucketId") in (None, name)]}

    def b2_create_bucket(self, sent: dict[str, Any]) -> dict[str, Any]:
        if sent["bucketName"] in self.buckets:
            raise Refused(400, "duplicate_bucket_name", "it exists")
        self.buckets[sent["bucketName"]] = {}
        return self._bucket(sent["bucketName"])

    def _bucket(self, name: str) -> dict[str, Any]:
        return {
            "accountId": ACCOUNT, "bucketId": name, "bucketName": name, "bucketType": "allPrivate", "bucketInfo": {},
            "corsRules": [], "lifecycleRules": [], "options": [], "revision": 1,
            "defaultServerSideEncryption": {"isClientAuthorizedToRead": False, "value": None},
            "fileLockConfiguration": {"isClientAuthorizedToRead": False, "value": None},
        }  # fmt: skip

    def _file(self, bucket: str, stored: Stored) -> dict[str, Any]:
        return {
            "accountId": ACCOUNT, "action": "hide" if stored.hidden else "upload", "bucketId": bucket,
            "contentLength": len(stored.data), "contentSha1": stored.sha1, "contentType": "application/octet-stream",
            "fileId": stored.id, "fileInfo": stored.info, "fileName": stored.name, "uploadTimestamp": stored.at,
            "size": len(stored.data), "contentMd5": None, "serverSideEncryption": {"mode": None, "algorithm": None},
            "fileRetention": {"isClientAuthorizedToRead": False, "value": None},
            "legalHold": {"isClientAuthorizedToRead": False, "value": None},
        }  # fmt: skip

    def b2_list_file_names(self, sent: dict[str, Any]) -> dict[str, Any]:
        return self._list(sent, versions=False)

    def b2_list_file_versions(self, sent: dict[str, Any]) -> dict[str, Any]:
        return self._list(sent, versions=True)

    def _list(self, sent: dict[str, Any], *, versions: bool) -> dict[str, Any]:
        bucket, prefix, delimiter = sent["bucketId"], sent.get("prefix") or "", sent.get("delimiter")
        found: list[dict[str, Any]] = []
        folders: set[str] = set()
        for name, kept in sorted(self._existing(bucket).items()):
            if not name.startswith(prefix) or name < (sent.get("startFileName") or "") or not kept:
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folder = prefix + rest.split(delimiter)[0] + delimiter
                if folder not in folders:
                    folders.add(folder)
                    found.append({"action": "folder", "fileName": folder, "fileId": None, "contentLength": 0})
            elif versions:
                found += [self._file(bucket, stored) for stored in reversed(kept)]
            elif not kept[-1].hidden:
                found.append(self._file(bucket, kept[-1]))
        return {"files": found, "nextFileName": None, "nextFileId": None}

    def _existing(self, bucket: str) -> dict[str, list[Stored]]:
        if bucket not in self.buckets:
            raise Refused(400, "bad_bucket_id", f"no bucket {bucket}")
        return self.buckets[bucket]

    def b2_get_upload_url(self, sent: dict[str, Any]) -> dict[str, Any]:
        self._existing(sent["bucketId"])
        url = f"{self.url}/upload/{sent['bucketId']}"
        return {"bucketId": sent["bucketId"], "uploadUrl": url, "authorizationToken": "upload-token"}

    def b2_hide_file(self, sent: dict[str, Any]) -> dict[str, Any]:
        return self._file(sent["bucketId"], self._store(sent["bucketId"], sent["fileName"], b"", {}, hidden=True))

    def b2_delete_file_version(self, sent: dict[str, Any]) -> dict[str, Any]:
        for bucket in self.buckets.values():
            versions = bucket.get(sent["fileName"], [])
            for stored in versions:
                if stored.id == sent["fileId"]:
                    versions.remove(stored)
                    return {"fileId": stored.id, "fileName": stored.name}
        raise Refused(400, "file_not_present", "no such version")

    def b2_get_file_info(self, sent: dict[str, Any]) -> dict[str, Any]:
        return self._file(*self.version(sent["fileId"]))

    def version(self, number: str) -> tuple[str, Stored]:
        for bucket, names in self.buckets.items():
            for stored in itertools.chain.from_iterable(names.values()):
                if stored.id == number:
                    return bucket, stored
        raise Refused(404, "not_found", "no such file")

    def b2_start_large_file(self, sent: dict[str, Any]) -> dict[str, Any]:
        self._existing(sent["bucketId"])
        number = f"4_large{next(self.numbers)}"
        self.large[number] = (sent["bucketId"], sent["fileName"], sent.get("fileInfo") or {}, {})
        return {"fileId": number, "fileName": sent["fileName"], "bucketId": sent["bucketId"], "accountId": ACCOUNT,
                "contentType": "b2/x-auto", "fileInfo": sent.get("fileInfo") or {}, "uploadTimestamp": 0}  # fmt: skip

    def b2_get_upload_part_url(self, sent: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.url}/part/{sent['fileId']}"
        return {"fileId": sent["fileId"], "uploadUrl": url, "authorizationToken": "upload-token"}

    def b2_finish_large_file(self, sent: dict[str, Any]) -> dict[str, Any]:
        bucket, name, info, parts = self.large.pop(sent["fileId"])
        sums = [hashlib.sha1(data, usedforsecurity=False).hexdigest() for _, data in sorted(parts.items())]
        if sums != sent["partSha1Array"]:
            raise Refused(400, "bad_request", "partSha1Array does not match")
        return self._file(bucket, self._store(bucket, name, b"".join(parts[part] for part in sorted(parts)), info))

    def b2_cancel_large_file(self, sent: dict[str, Any]) -> dict[str, Any]:
        self.large.pop(sent["fileId"], None)
        return {"fileId": sent["fileId"]}

    def b2_list_unfinished_large_files(self, _sent: dict[str, Any]) -> dict[str, Any]:
        files = [{"fileId": number, "fileName": name, "bucketId": bucket, "contentType": "b2/x-auto", "fileInfo": info,
                  "accountId": ACCOUNT, "uploadTimestamp": 0}
                 for number, (bucket, name, info, _) in self.large.items()]  # fmt: skip
        return {"files": files, "nextFileId": None}

    def _store(self, bucket: str, name: str, data: bytes, info: dict[str, str], *, hidden: bool = False) -> Stored:
        sha1 = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        number = f"4_z{next(self.numbers)}"
        stored = Stored(number, name, data, info, sha1, int(time.time() * 1000), hidden)
        self._existing(bucket).setdefault(name, []).append(stored)
        return stored

    def authorize(self, version: str) -> dict[str, Any]:
        rights = ["listBuckets", "listFiles", "readFiles", "shareFiles", "writeFiles", "deleteFiles", "writeBuckets"]
        allowed: dict[str, Any] = {"capabilities": rights, "bucketId": None, "bucketName": None, "namePrefix": None}
        sizes = {"absoluteMinimumPartSize": 5_000_000, "recommendedPartSize": 100_000_000}
        urls = {"apiUrl": self.url, "downloadUrl": self.url, "s3ApiUrl": self.url}
        answer: dict[str, Any] = {"accountId": ACCOUNT, "authorizationToken": "account-token"}
        if version in ("v1", "v2"):
            return answer | sizes | urls | {"allowed": allowed, "minimumPartSize": 5_000_000}
        storage: dict[str, Any] = {
            **sizes,
            **urls,
            "infoType": "storageApi",
            "capabilities": rights,
            "namePrefix": None,
        }
        buckets: dict[str, Any] = {"bucketId": None, "bucketName": None}
        storage |= buckets if version == "v3" else {"allowed": {**allowed, "buckets": None}}
        return answer | {"apiInfo": {"storageApi": storage}, "applicationKeyExpirationTimestamp": None}


class Refused(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    b2: FakeB2

    def log_message(self, *_: object) -> None:
        """Say nothing on the test's stderr."""

    def do_POST(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def do_HEAD(self) -> None:
        self._handle()

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        kind, _, rest = path.partition("/")
        call = rest.split("/")[-1] if kind == "b2api" else kind
        name = unquote(self.headers.get("X-Bz-File-Name", "")) or (rest if kind == "file" else "")
        with self.b2.lock:
            self.b2.requests.append(f"{call} {name}".strip())
        if call == "b2_download_file_by_id":
            with contextlib.suppress(Refused):
                name = self.b2.version(urlsplit(self.path).query.removeprefix("fileId="))[1].name
        fault = self.b2.fault(call, name)
        try:
            body = self._body(fault)
            if fault == "503":
                raise Refused(503, "service_unavailable", "try again")  # noqa: TRY301
            with self.b2.lock:
                answer, data = self._answer(kind, call, rest, body)
        except Refused as refused:
            self.b2.refusals.append(refused.code)
            said = {"status": refused.status, "code": refused.code, "message": str(refused)}
            self._reply(refused.status, json.dumps(said).encode(), {})
        except ConnectionError:
            self.close_connection = True
        else:
            with contextlib.suppress(ConnectionError):
                if data is None:
                    self._reply(200, json.dumps(answer).encode(), {})
                else:
                    self._download(data, fault)

    def _body(self, fault: str) -> bytes:
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
                body += self.rfile.read(min(1024, length - len(body)))
                self.b2.over.wait(SECONDS_SLOW)
            return body
        body = self.rfile.read(length)
        if len(body) != length:
            raise ConnectionError
        return body

    def _answer(self, kind: str, call: str, rest: str, body: bytes) -> tuple[dict[str, Any], Stored | None]:
        authorization = self.headers.get("Authorization", "")
        if call == "b2_authorize_account":
            wanted = "Basic " + base64.b64encode(f"{ACCOUNT}:{KEY}".encode()).decode()
            if authorization.replace("Basic:", "Basic ").split() != wanted.split():
                raise Refused(401, "unauthorized", "wrong keys")
            return self.b2.authorize(rest.split("/", maxsplit=1)[0]), None
        if authorization != ("upload-token" if kind in ("upload", "part") else "account-token"):
            raise Refused(401, "bad_auth_token", "wrong token")
        if kind in ("upload", "part"):
            return (self._upload if kind == "upload" else self._part)(rest, self._checked(body)), None
        if kind == "file":
            bucket, _, name = rest.partition("/")
            versions = self.b2.buckets.get(bucket, {}).get(name, [])
            if not versions or versions[-1].hidden:
                raise Refused(404, "not_found", f"no file {name}")
            return {}, versions[-1]
        if call == "b2_download_file_by_id":
            wanted = urlsplit(self.path).query.removeprefix("fileId=")
            return {}, self.b2.version(wanted)[1]
        method = getattr(self.b2, call, None)
        if not call.startswith("b2_") or method is None:
            raise Refused(400, "bad_request", f"no call {call}")
        return method(json.loads(body or b"{}")), None

    def _checked(self, body: bytes) -> bytes:
        told = self.headers.get("X-Bz-Content-Sha1", "")
        if told == "hex_digits_at_end":
            body, told = body[:-40], body[-40:].decode()
        if told != hashlib.sha1(body, usedforsecurity=False).hexdigest():
            raise Refused(400, "bad_request", "Sha1 did not match data received")
        return body

    def _part(self, large: str, data: bytes) -> dict[str, Any]:
        number = int(self.headers["X-Bz-Part-Number"])
        if large not in self.b2.large:
            raise Refused(400, "bad_request", "no such large file")
        self.b2.large[large][3][number] = data
        sha1 = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        return {"fileId": large, "partNumber": number, "contentLength": len(data), "contentSha1": sha1}

    def _upload(self, bucket: str, data: bytes) -> dict[str, Any]:
        prefix = "x-bz-info-"
        info = {name.lower().removeprefix(prefix): unquote(value) for name, value in self.headers.items()
                if name.lower().startswith(prefix)}  # fmt: skip
        stored = self.b2._store(bucket, unquote(self.headers["X-Bz-File-Name"]), data, info)
        return self.b2._file(bucket, stored)

    def _download(self, stored: Stored, fault: str) -> None:
        data, status = stored.data, 200
        headers = {
            "X-Bz-File-Id": stored.id, "X-Bz-File-Name": quote(stored.name), "X-Bz-Content-Sha1": stored.sha1,
            "X-Bz-Upload-Timestamp": str(stored.at), "Accept-Ranges": "bytes",
            **{f"X-Bz-Info-{name}": quote(value) for name, value in stored.info.items()},
        }  # fmt: skip
        if asked := self.headers.get("Range", "").removeprefix("bytes="):
            first, _, last = asked.partition("-")
            begin, end = int(first), min(int(last or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
            data, status = data[begin : end + 1], 206
        self._reply(status, data, headers, fault)

    def _reply(self, status: int, body: bytes, headers: dict[str, str], fault: str = "") -> None:
        self.send_response(status)
        kind = "application/octet-stream" if headers else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif fault == "slow":
            for place in range(0, len(body), 1024):
                self.wfile.write(body[place : place + 1024])
                self.b2.over.wait(SECONDS_SLOW)
        else:
            self.wfile.write(body)


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that was killed; everything else is a defect of this file."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def fake_b2(*buckets: str) -> Iterator[FakeB2]:
    """Run the server with these empty buckets."""
    b2 = FakeB2(buckets={name: {} for name in buckets})
    handler = type("BoundHandler", (Handler,), {"b2": b2})
    server = Quiet(("127.0.0.1", 0), handler)
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
