"""Is the program in this container healthy? `python -I healthy.py PORT` asks its /healthz and ends with 0, or says what is wrong."""

import http.client
import sys

try:
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=4)
    connection.request("GET", "/healthz")
    answer = connection.getresponse()
    said = answer.read(1000).decode(errors="replace")
except OSError as e:
    sys.exit(f"/healthz does not answer: {e}")
sys.exit(0 if answer.status == 200 else f"/healthz answers {answer.status}: {said}")
