"""A stand-in for the Hugging Face Hub on this machine: repositories that hold what is committed to them."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """`repositories`: by name, their files. `refusals`: by the end of a path, the status that it gets."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.private, self.refusals, self.tokens = {}, set(), {}, []

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, data, status=200, **headers):
        body = json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def repository(self):
        return "/".join(self.path.split("/")[3:5])

    def refused(self):
        self.server.tokens.append(self.headers.get("Authorization"))
        status = next((s for end, s in self.server.refusals.items() if end in self.path), None)
        if status:
            self.answer({"error": "refused"}, status)
        return status

    def do_GET(self):
        if self.refused():
            return
        files = self.server.repositories.get(self.repository())
        if files is None:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif "/tree/" in self.path:
            self.answer([{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in files.items()])
        else:
            siblings = [{"rfilename": p} for p in files]
            self.answer({"id": self.repository(), "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.refused():
            return
        if self.path == "/api/repos/create":
            said = json.loads(body)
            name = f"{said['organization']}/{said['name']}" if said.get("organization") else said["name"]
            self.server.repositories.setdefault(name, {".gitattributes": b""})
            if said.get("private") or said.get("visibility") == "private":
                self.server.private.add(name)
            self.answer({"url": f"{self.server.endpoint}/{name}", "name": name, "id": name})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            new = {v["path"]: base64.b64decode(v["content"]) for v in (o["value"] for o in lines if o["key"] == "file")}
            self.server.repositories[self.repository()] |= new
            self.answer(
                {
                    "success": True,
                    "commitOid": COMMIT,
                    "commitUrl": f"{self.server.endpoint}/{self.repository()}/commit/{COMMIT}",
                }
            )
        else:
            self.answer({"error": f"what is {self.path}"}, 400)


@contextmanager
def stand_in():
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
