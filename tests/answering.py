"A server that speaks OpenAI's protocol on loopback and does what a test tells it to."
import json
import re
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeModel:
    "Answers each question by `answer(text, times)`: the item's text, and how often it has been asked; words, or a step below."

    def __init__(self, answer=lambda text, times: 'non-hateful', delay=0.):
        self.answer, self.delay, self.asked, self.keys, self.arrived = answer, delay, [], set(), []
        self._turn = threading.Lock()
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), self._handler())
        self.url = f'http://127.0.0.1:{self.server.server_port}/v1'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self): return self

    def __exit__(self, *_): self.server.shutdown(); self.server.server_close()

    def note(self, text, key):
        "Remember a question; how often it has come."
        with self._turn:
            self.asked.append(text)
            self.arrived.append(time.monotonic())
            self.keys.add(key)
            return self.asked.count(text)

    def _handler(self):
        model = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
                content = body['messages'][0]['content']
                words = content if isinstance(content, str) else ' '.join(p.get('text', '') for p in content)
                text = re.findall(r'Text: (.*)', words)[-1]
                times = model.note(text, self.headers.get('Authorization'))
                time.sleep(model.delay)
                step = model.answer(text, times)
                try: step(self) if callable(step) else reply(self, step)
                except OSError: pass  # the client has gone

            def log_message(self, *args): pass
        return Handler


def send(handler, status, content, **headers):
    handler.send_response(status)
    for name, value in headers.items(): handler.send_header(name.replace('_', '-'), value)
    handler.send_header('Content-Length', str(len(content.encode())))
    handler.end_headers()
    handler.wfile.write(content.encode())


def reply(handler, words):
    usage = dict(prompt_tokens=1000, completion_tokens=10)
    send(handler, 200, json.dumps(dict(choices=[dict(message=dict(role='assistant', content=words))], usage=usage)))


def status(code, message='broken', **headers): return lambda handler: send(handler, code, json.dumps(dict(error=dict(message=message))), **headers)


def malformed(handler): send(handler, 200, '{"choices": [{"mess')


def slow(handler): time.sleep(3.); reply(handler, 'hateful')


def cut(handler):
    "Promise more than is sent, and reset the connection."
    handler.send_response(200)
    handler.send_header('Content-Length', '1000')
    handler.end_headers()
    handler.wfile.write(b'{"choices"')
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    handler.connection.close()
