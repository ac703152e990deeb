"""A store of objects on this machine: gs://bucket is a local folder, for each library that speaks to it."""

import contextlib
import http.server
import json
import pathlib
import threading
import urllib.parse

from fsspec.implementations import dirfs, local


def file_system(folder: pathlib.Path) -> type:
    """What fsspec opens for gs:// and gcs://: `folder` holds the buckets. Nothing appends or renames."""

    class Store(dirfs.DirFileSystem):
        protocol = "gs"

        def __init__(self, **_options):
            super().__init__(path=str(folder), fs=local.LocalFileSystem(auto_mkdir=True))

        @classmethod
        def _strip_protocol(cls, path):
            return str(path).removeprefix("gs://")

        def open(self, path, mode="rb", *args, **kwargs):
            assert mode.rstrip("bt") in ("r", "w"), f"{path} opened with mode {mode}"
            return super().open(path, mode, *args, **kwargs)

        def mv(self, *paths, **_options):
            raise AssertionError(f"renamed: {paths}")

        rename = move = mv

    return Store


class Endpoint(http.server.ThreadingHTTPServer):
    """Answers as Google's storage does (JSON API): what TensorStore and ArrayRecord ask and send.

    Attributes:
        sent: (name, bytes) of each part of an object that was read.
    """

    def __init__(self, bucket: pathlib.Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bucket, self.sent = bucket, []
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def about(self, path: pathlib.Path) -> dict[str, str]:
        stat = path.stat()
        name = path.relative_to(self.server.bucket).as_posix()
        return {"name": name, "size": str(stat.st_size), "generation": str(stat.st_mtime_ns)}

    def asked(self) -> tuple[pathlib.Path, dict[str, str]]:
        url = urllib.parse.urlsplit(self.path)
        query = {name: values[0] for name, values in urllib.parse.parse_qs(url.query).items()}
        name = urllib.parse.unquote(url.path).removeprefix("/storage/v1/b/bucket/o").lstrip("/")
        return self.server.bucket / query.get("name", name), query

    def do_GET(self):
        path, query = self.asked()
        if path == self.server.bucket:
            found = [self.about(file) for file in sorted(path.rglob("*")) if file.is_file()]
            items = [item for item in found if item["name"].startswith(query.get("prefix", ""))]
            return self.answer(200, json.dumps({"items": items}).encode())
        if not path.is_file():
            return self.answer(404)
        data, wanted = path.read_bytes(), self.headers.get("Range")
        first, last = (wanted or "bytes=0-").removeprefix("bytes=").split("-")
        start = int(first) if first else max(len(data) - int(last), 0)
        part = data[start : int(last) + 1 if first and last else len(data)]
        headers = {"x_goog_generation": self.about(path)["generation"]}
        if wanted:
            headers["Content_Range"] = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
        self.server.sent.append((path.relative_to(self.server.bucket).as_posix(), len(part)))
        return self.answer(206 if wanted else 200, part, **headers)

    def do_POST(self):
        path, query = self.asked()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        expected = query.get("ifGenerationMatch")
        if expected is not None and expected != (self.about(path)["generation"] if path.exists() else "0"):
            return self.answer(412)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        return self.answer(200, json.dumps(self.about(path)).encode())

    def do_DELETE(self):
        path, _ = self.asked()
        path.unlink(missing_ok=True)
        return self.answer(204)

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(OSError):  # readers hang up when they have what they want
            super().handle()
