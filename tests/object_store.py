"""Google Cloud Storage in a thread: as much of its JSON API as gcsfs, TensorStore and google-cloud-storage use of it.

Objects are in memory, in one bucket; every write gives an object another generation, which conditions are checked
against. https://cloud.google.com/storage/docs/json_api
"""

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

BUCKET = "bucket"


class Store:
    """The objects of the bucket, and uploads in progress."""

    def __init__(self):
        self.objects: dict[str, tuple[int, bytes]] = {}  # generation, content
        self.uploads: dict[str, tuple[str, bytearray]] = {}  # name, content so far
        self.generation = 1_000
        self.lock = threading.Lock()

    def put(self, name: str, content: bytes) -> None:
        self.generation += 1
        self.objects[name] = (self.generation, content)

    def metadata(self, name: str) -> dict[str, Any]:
        generation, content = self.objects[name]
        return {
            "kind": "storage#object", "name": name, "bucket": BUCKET, "size": str(len(content)),
            "generation": str(generation), "metageneration": "1", "storageClass": "STANDARD",
            "timeCreated": "2026-01-01T00:00:00.000Z", "updated": "2026-01-01T00:00:00.000Z",
        }  # fmt: skip

    def list(self, prefix: str, delimiter: str, start: str, most: int) -> dict[str, Any]:
        """Objects and, with a delimiter, what stands for those below another folder; in order, from `start` on."""
        found: dict[str, bool] = {}
        for name in sorted(self.objects):
            if name.startswith(prefix):
                below, is_folder, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
                found[prefix + below + delimiter if is_folder else name] = bool(is_folder)
        names = [name for name in sorted(found) if name >= start]
        page = {"kind": "storage#objects"} | ({"nextPageToken": names[most]} if len(names) > most else {})
        page["items"] = [self.metadata(name) for name in names[:most] if not found[name]]
        page["prefixes"] = [name for name in names[:most] if found[name]]
        return page

    def download(self, folder: str, to: Path) -> None:
        """Every object below `folder` as a file."""
        for name, (_, content) in self.objects.items():
            if name.startswith(folder + "/"):
                path = to / name.removeprefix(folder + "/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)


@contextlib.contextmanager
def serving(store: Store) -> Iterator[str]:
    """Serves it, at the address that is given."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *values: Any) -> None:
            pass

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            address = urlsplit(self.path)
            query = dict(parse_qsl(address.query, keep_blank_values=True))
            with store.lock:
                status, content, headers = self._reply(address.path, query, body)
            if not isinstance(content, bytes):
                content = json.dumps(content).encode()
                headers = {"Content-Type": "application/json", **headers}
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = _answer

        def _reply(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any, dict[str, str]]:
            found = re.fullmatch(r"(?:/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/([^/]+)(?:/(.+))?)?)?", path)
            if found is None or found[1] != BUCKET:
                return refusal(HTTPStatus.NOT_FOUND)
            if path.endswith(f"/b/{BUCKET}"):
                return HTTPStatus.OK, {"kind": "storage#bucket", "name": BUCKET}, {}
            if path.startswith("/upload"):
                return self._upload(query, body)
            if found[2] is None:
                most = int(query.get("maxResults", 1000))
                page = store.list(query.get("prefix", ""), query.get("delimiter", ""), query.get("pageToken", ""), most)
                return HTTPStatus.OK, page, {}
            name = unquote(found[2])
            if name not in store.objects:
                return refusal(HTTPStatus.NOT_FOUND)
            generation, content = store.objects[name]
            if failed := unmet(query, generation):
                return refusal(failed)
            if self.command == "DELETE":
                del store.objects[name]
                return HTTPStatus.NO_CONTENT, b"", {}
            if self.command == "POST":
                verb, target = re.fullmatch(rf"(moveTo|rewriteTo|copyTo)(?:/b/{BUCKET})?/o/(.+)", found[3]).groups()
                store.put(unquote(target), content)
                if verb == "moveTo":
                    del store.objects[name]
                made = store.metadata(unquote(target))
                return HTTPStatus.OK, {"done": True, "resource": made} if verb == "rewriteTo" else made, {}
            if query.get("alt") != "media":
                return HTTPStatus.OK, store.metadata(name), {}
            headers = {"x-goog-generation": str(generation), "Content-Type": "application/octet-stream"}
            part = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
            if part is None:
                return HTTPStatus.OK, content, headers
            first = int(part[1]) if part[1] else max(len(content) - int(part[2]), 0)
            last = min(int(part[2]), len(content) - 1) if part[1] and part[2] else len(content) - 1
            if first > last:
                return refusal(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return HTTPStatus.PARTIAL_CONTENT, content[first : last + 1], headers

        def _upload(self, query: dict[str, str], body: bytes) -> tuple[int, Any, dict[str, str]]:
            if "upload_id" in query:
                name, so_far = store.uploads[query["upload_id"]]
                so_far += body
                if self.headers["Content-Range"].endswith("/*"):
                    return HTTPStatus.PERMANENT_REDIRECT, b"", {"Range": f"bytes=0-{len(so_far) - 1}"}
                body = bytes(so_far)
            else:
                name = query["name"]
                if failed := unmet(query, store.objects.get(name, (0, b""))[0]):
                    return refusal(failed)
                if query["uploadType"] == "resumable":
                    upload = str(len(store.uploads))
                    store.uploads[upload] = (name, bytearray())
                    where = f"http://{self.headers['Host']}/upload/storage/v1/b/{BUCKET}/o?upload_id={upload}"
                    return HTTPStatus.OK, b"", {"Location": where}
                assert query["uploadType"] == "media", query
            store.put(name, body)
            return HTTPStatus.OK, store.metadata(name), {}

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def unmet(query: dict[str, str], generation: int) -> HTTPStatus | None:
    """Returns the status that rejects a request if the condition on the object's generation (0: no object) fails."""
    if query.get("ifGenerationMatch", str(generation)) != str(generation):
        return HTTPStatus.PRECONDITION_FAILED
    return HTTPStatus.NOT_MODIFIED if query.get("ifGenerationNotMatch") == str(generation) else None


def refusal(status: HTTPStatus) -> tuple[int, Any, dict[str, str]]:
    return (
        status,
        b"" if status == HTTPStatus.NOT_MODIFIED else {"error": {"code": status, "message": status.phrase}},
        {},
    )
