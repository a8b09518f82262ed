"A web server with files in memory, for tests of downloads. Each subclass says how it answers."

import http.server
import threading


class Web:
    def __init__(self):
        self.files: dict[str, bytes] = {}
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                try:
                    web.answer(self)
                except OSError:
                    self.close_connection = True  # the client has had enough

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,))
        self.thread.start()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        raise NotImplementedError

    def put(self, name: str, data: bytes) -> str:
        "Serve `data`; its URL."
        self.files[f"/{name}"] = data
        return f"http://127.0.0.1:{self.http.server_port}/{name}"

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()
