"Every fault that a site is put to, by name; tests and the soak draw from one list."

import random
import time
from collections.abc import Callable, Iterator

from . import storms
from .rig import Rig

Fault = Callable[[Rig, random.Random], None]


def _while(draw: random.Random, most_s: float = 1.0) -> None:
    "As long as a fault lasts."
    time.sleep(draw.uniform(0, most_s))


def kill(*names: str) -> Fault:
    "SIGKILL to some parts at once; a while later they start again."
    def fault(rig: Rig, draw: random.Random) -> None:
        rig.kill(*names, pause=lambda: _while(draw, 0.5))

    return fault


def kill_stubs(rig: Rig, draw: random.Random) -> None:
    "SIGKILL to what executes the models in Triton, which does not notice."
    rig.parts["triton"].kill_stubs()
    rig.kills += 1


def freeze(name: str) -> Fault:
    "A part stands still, with all of its connections open."
    def fault(rig: Rig, draw: random.Random) -> None:
        with rig.frozen(name):
            _while(draw)

    return fault


def cut(name: str) -> Fault:
    "The network resets all connections of a link, and every new one for a while."
    def fault(rig: Rig, draw: random.Random) -> None:
        rig.links[name].cut()
        _while(draw)
        rig.links[name].heal()

    return fault


def hole(name: str) -> Fault:
    "The network swallows what goes over a link, and tells nobody."
    def fault(rig: Rig, draw: random.Random) -> None:
        rig.links[name].hole()
        _while(draw)
        rig.links[name].heal()

    return fault


def slow(name: str) -> Fault:
    "The network is late and narrow."
    def fault(rig: Rig, draw: random.Random) -> None:
        link = rig.links[name]
        link.latency_s, link.bytes_per_s = draw.uniform(0.02, 0.2), draw.uniform(2e4, 2e5)
        _while(draw)
        rig.progress(3)
        link.heal()

    return fault


def malformed(rig: Rig, draw: random.Random) -> None:
    "A storm of messages that can't be taken, on a stream that goes on."
    storms.malformed(rig, draw, draw.choice(rig.keys), 50)
    storms.invented(rig, draw, 5)


def poison(rig: Rig, draw: random.Random) -> None:
    "Windows that the model fails on."
    storms.poison(rig, draw, rig.keys[-1])


def unstorable(rig: Rig, draw: random.Random) -> None:
    "Windows whose verdicts not every store can hold."
    storms.unstorable(rig, draw, rig.keys[-1])


def reload(name: str) -> Fault:
    "A service is told to read its settings anew."
    def fault(rig: Rig, draw: random.Random) -> None:
        rig.reload(name)
        _while(draw)

    return fault


def duplicates(rig: Rig, draw: random.Random) -> None:
    "A storm of windows that were sent before."
    storms.duplicates(rig, 20, 20)


def kills(rig: Rig) -> dict[str, Fault]:
    "SIGKILL, to each part alone and to some at once."
    names = list(rig.parts)
    together = [("agent", "broker"), ("broker", "sensor-0"), ("agent", "sinks"), ("broker", "agent", "sinks"), ("triton", "agent"), ("sinks-2", "influx"),
                ("sinks", "postgres"), ("postgres", "influx"), ("agent", "postgres")]
    return ({f"kill of {name}": kill(name) for name in names} | ({"kill of the stubs": kill_stubs} if "triton" in names else {})
            | {f"kill of {' and '.join(some)}": kill(*some) for some in together if set(some) <= set(names)})


def faults(rig: Rig) -> dict[str, Fault]:
    "All of them."
    links = {f"{what.__name__} of {name}": what(name) for what in (cut, hole, slow) for name in rig.links}
    frozen = {f"freeze of {name}": freeze(name) for name in rig.parts}
    reloads = {f"reload of {name}": reload(name) for name in rig.parts if name == "agent" or name.startswith("sinks")}
    return kills(rig) | links | frozen | reloads | {"unstorable": unstorable, "malformed": malformed, "poison": poison, "duplicates": duplicates}


def deck(
    rig: Rig,
    draw: random.Random,
    deadly: int = 1,  # how often each kill is in it
) -> Iterator[tuple[str, Fault]]:
    "All of them, shuffled, and again and again: in any long run each comes as often as the others."
    cards = [*faults(rig).items(), *(list(kills(rig).items()) * (deadly - 1))]
    while True:
        draw.shuffle(cards)
        yield from cards
