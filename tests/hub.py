"""A stand-in for the hub's API, as far as making a repository and uploading files to it goes:
commits are kept in memory.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """Serves on a free port of the loopback interface while the block runs.

    Attributes:
        repositories: By id: whether private, and the files of its one branch.
        commits: Number of commits.
        denied: Whether uploading is forbidden.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict] = {}
        self.stored: dict[str, bytes] = {}
        self.commits = 0
        self.denied = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self._thread.join(10)
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments):
        pass

    def _answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while length := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(length))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self):
        if self.path.startswith("/api/whoami"):
            return self._answer(
                {"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}}
            )
        found = re.fullmatch(r"/api/models/([^/]+/[^/?]+)(/revision/main)?(\?.*)?", self.path)
        if found and found[1] in self.server.repositories:
            files = [{"rfilename": name} for name in self.server.repositories[found[1]]["files"]]
            return self._answer(
                {"id": found[1], "sha": "0" * 40, "siblings": files, "private": True, "tags": []}
            )
        return self._answer({"error": "not found"}, 404)

    def do_PUT(self):
        self.server.stored[self.path.rsplit("/", 1)[1]] = self._body()
        self._answer({})

    def do_POST(self):
        body = self._body()
        if self.server.denied:
            return self._answer({"error": "forbidden"}, 403)
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            self.server.repositories.setdefault(
                name, {"private": wanted.get("visibility") == "private", "files": {}}
            )
            return self._answer({"url": f"{self.server.url}/{name}", "name": name})
        if found := re.match(r"/api/models/(.+)/preupload/main", self.path):
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
            return self._answer({"files": modes})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": item["oid"],
                    "size": item["size"],
                    "actions": {
                        "upload": {"href": f"{self.server.url}/lfs/{item['oid']}", "header": {}}
                    },
                }
                for item in json.loads(body)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        if found := re.match(r"/api/models/(.+)/commit/main", self.path):
            files = self.server.repositories[found[1]]["files"]
            for line in body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    data = self.server.stored[value["oid"]]
                    assert hashlib.sha256(data).hexdigest() == value["oid"]
                    files[value["path"]] = data
            self.server.commits += 1
            url = f"{self.server.url}/{found[1]}/commit/{'0' * 40}"
            return self._answer({"commitUrl": url, "commitOid": "0" * 40, "hookOutput": ""})
        return self._answer({"error": f"unknown path {self.path}"}, 404)
