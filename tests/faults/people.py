"People at a site: they shelve, label and acknowledge alarms and work on machines, whatever goes on, and remember what they were told."

import json
import random
import threading
from enum import Enum
from http.client import HTTPException
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from small_site import Site


class Answer(Enum):
    DONE = "done"
    REFUSED = "refused"
    NONE = "no answer, or one that leaves it open"


class Said(NamedTuple):
    "A command."
    asset: str
    kind: str       # of the event that it comes to
    comment: str    # which no other has
    answer: Answer


_KINDS = {"shelve": "shelved", "acknowledge": "acknowledged", "label": "labelled", "maintenance": "maintenance"}
NUL = "\0"          # in a comment: PostgreSQL can't hold it


class People:
    "They give a command now and then from `begin` to `end`; and `say` one at any time."

    def __init__(self, site: Site, assets: list[str], seed: int):
        self.said: list[Said] = []
        self._site, self._assets, self._draw = site, assets, random.Random(seed)
        self._ended, self._thread = threading.Event(), threading.Thread()

    def begin(self) -> None:
        if not self._thread.is_alive():
            self._ended.clear()
            self._thread = threading.Thread(target=self._run, name="people", daemon=True)
            self._thread.start()

    def end(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._draw.uniform(0.1, 1.0)):
            self.say(self._draw.choice(self._assets), self._draw.choice(list(_KINDS)), NUL if self._draw.random() < 0.1 else "")

    def say(self, asset: str, action: str, more: str = "") -> Answer:
        comment = f"{len(self.said)}-{self._draw.getrandbits(64)}{more}"
        command = {"asset": asset, "action": action, "by": "somebody", "comment": comment,
                   **{"shelve": {"reason": "test", "for_s": 0.3}, "label": {"reason": "false_alarm"}, "maintenance": {"what": "bearing replaced"}}.get(action, {})}
        request = Request(f"http://127.0.0.1:{self._site.metrics_port}/alarms", json.dumps(command).encode(), {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=10) as reply:
                answer = Answer.DONE if json.load(reply)["asset"] == asset else Answer.NONE
        except HTTPError as e:
            answer = Answer.REFUSED if e.code == 400 else Answer.NONE
        except (OSError, HTTPException, ValueError):  # nobody there, or no more in the middle of the answer
            answer = Answer.NONE
        self.said.append(Said(asset, _KINDS[action], comment, answer))
        return answer
