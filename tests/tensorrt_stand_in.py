"""A stand-in for TensorRT and for a GPU, where there is neither: it compiles nothing and executes nothing.

What it is good for: that our code uses the API as the bindings of three TensorRT versions offer it, and what it does with the answers. Its classes have
the members that were recorded from the real bindings (`recorded/tensorrt.json`), with the recorded parameters, and no others: a misspelled flag, a
property that can't be set or a missing argument fails here as it would on a device. What they answer is made up, and marked as such.
"""

import json
from pathlib import Path
from types import SimpleNamespace

RECORDED = json.loads(Path(__file__).with_name("recorded").joinpath("tensorrt.json").read_text())


class Memory(bytes):
    "What `bytes()` makes bytes of."


def _recorded(name, members, behaviours):
    "A class with the recorded members. A method without a behaviour can't be called."
    def method(member, parameters):
        required = [p for p in parameters if not p.endswith("=")]
        names = [p.rstrip("=") for p in parameters]

        def call(self, *given, **named):
            assert len(given) <= len(names) and set(named) <= set(names[len(given):]), f"{name}.{member} takes {parameters}"
            assert set(required) <= {*names[:len(given)], *named}, f"{name}.{member} takes {parameters}"
            if member == "__init__" and member not in behaviours:
                return None
            return behaviours[member](self, *given, **named)

        return call

    def set_(self, key, value):
        if type(self).__name__ == name:  # a subclass may have what it likes
            assert key.startswith("_") or members.get(key) == "read, write", f"{name}.{key} cannot be set"
        object.__setattr__(self, key, value)

    values = {k: k for k, v in members.items() if v == "value"}
    methods = {k: method(k, v) for k, v in members.items() if isinstance(v, list)}
    for k, v in members.items():
        if v == "read" and k in behaviours:
            methods[k] = property(behaviours[k])
    return type(name, (), {**values, **methods, "__setattr__": set_})


class _Flag(int):
    "A member of an enumeration."


def tensorrt(version, inputs=None, unknown=b"", memory=True):
    """The module `tensorrt` of a recorded version.

    inputs: name to shape of the network's; unknown: a graph with these bytes in it is refused; memory: whether there is enough of it
    """
    api = RECORDED[version]
    shapes = inputs or {"window": (-1, 2, 64)}
    marker = f"timings of {version};".encode()

    def parse(self, model, path=None):
        self._network._onnx = bytes(model)
        return not (unknown and unknown in model)

    def parser(self, network, logger):
        self._network, self._logger = network, logger

    def error(_self, index):
        e = types["ParserError"]()
        for k, v in dict(node=7, node_name="/net/Det", node_operator="Det", desc="no importer registered for op: Det ", file="/src/ModelImporter.cpp", line=98).items():
            object.__setattr__(e, k, lambda v=v: v)
        return e

    def tensor(_self, index):
        t = types["ITensor"]()
        for k, v in zip(("name", "shape"), list(shapes.items())[index], strict=True):
            object.__setattr__(t, k, v)
        return t

    def config(_self):
        c = types["IBuilderConfig"]()
        c._flags, c._pools, c._profiles, c._cache = {"TF32"}, {}, [], None
        return c

    def profile(_self):
        p = types["IOptimizationProfile"]()
        p._shapes = {}
        return p

    def add_profile(self, profile):
        fits = profile._shapes.keys() == shapes.keys() and all(a <= b <= c for s in profile._shapes.values() for a, b, c in zip(*s, strict=True))
        self._profiles.append(profile._shapes)
        return len(self._profiles) - 1 if fits else -1

    def timings(data):
        cache = types["ITimingCache"]()
        cache._data = bytes(data)
        return cache

    def set_timings(self, cache, ignore_mismatch):
        if cache._data and not cache._data.startswith(marker):
            return False
        self._cache = cache
        return True

    def compile_(self, network, config):
        monitor = getattr(config, "progress_monitor", None)
        if monitor:
            monitor.phase_start("Building engine", None, 2)
            if not all(monitor.step_complete("Building engine", step) for step in range(2)):
                self._logger.log("ERROR", "IBuilder::buildSerializedNetwork: Error Code 7: BuildCanceled")
                return None
            monitor.phase_finish("Building engine")
        if not memory:
            self._logger.log("ERROR", "Requested amount of GPU memory (1073741824 bytes) could not be allocated.")
            return None
        if config._cache is not None:
            config._cache._data = (config._cache._data or marker) + b"+"
        plan = {"stand-in": version, "flags": sorted(config._flags), "pools": config._pools, "profiles": config._profiles,
                "optimization": config.builder_optimization_level, "strongly_typed": network._flags == 1 << api["NetworkDefinitionCreationFlag"].index("STRONGLY_TYPED")}
        return Memory(json.dumps(plan).encode() + b"\n" + network._onnx)

    def deserialize(_self, serialized_engine):
        head, _, onnx = bytes(serialized_engine).partition(b"\n")
        if b"stand-in" not in head:
            return None
        engine = types["ICudaEngine"]()
        engine._head, engine._onnx = head, onnx
        return engine

    def refitter(self, engine, logger):
        self._engine = engine

    def parser_refitter(self, refitter, logger):
        self._refitter = refitter

    def refit(self, model, path=None):
        self._refitter._onnx = bytes(model)
        return len(model) == len(self._refitter._engine._onnx)  # made up: as many bytes, the same architecture

    def take(self):
        self._engine._onnx = self._onnx
        return b'"REFIT"' in self._engine._head

    def attach(**values):
        def init(self, *given):
            for k, v in zip(values, given, strict=True):
                object.__setattr__(self, f"_{k}", v)
        return init

    behaviours = {
        "Builder": {"__init__": attach(logger=0), "create_builder_config": config, "create_optimization_profile": profile, "build_serialized_network": compile_,
                    "create_network": lambda self, flags=0: _with(types["INetworkDefinition"](), _flags=flags)},
        "INetworkDefinition": {"get_input": tensor, "num_inputs": lambda self: len(shapes)},
        "IBuilderConfig": {"set_flag": lambda self, flag: self._flags.add(flag.name), "clear_flag": lambda self, flag: self._flags.discard(flag.name),
                           "set_memory_pool_limit": lambda self, pool, pool_size: self._pools.update({pool.name: pool_size}), "add_optimization_profile": add_profile,
                           "create_timing_cache": lambda self, serialized_timing_cache: timings(serialized_timing_cache), "set_timing_cache": set_timings,
                           "get_timing_cache": lambda self: self._cache},
        "IOptimizationProfile": {"set_shape": lambda self, input, min, opt, max: self._shapes.update({input: [list(min), list(opt), list(max)]})},
        "ITimingCache": {"serialize": lambda self: Memory(self._data)},
        "OnnxParser": {"__init__": parser, "parse": parse, "get_error": error, "num_errors": lambda self: 1},
        "Runtime": {"deserialize_cuda_engine": deserialize},
        "ICudaEngine": {"serialize": lambda self: Memory(self._head + b"\n" + self._onnx)},
        "Refitter": {"__init__": refitter, "get_missing_weights": lambda self: [], "refit_cuda_engine": take},
        "OnnxParserRefitter": {"__init__": parser_refitter, "refit_from_bytes": refit, "get_error": error, "num_errors": lambda self: 1},
    }
    types = {name: _recorded(name, members, behaviours.get(name, {})) for name, members in api.items() if isinstance(members, dict)}
    enums = {name: SimpleNamespace(**{m: _with(_Flag(i), name=m) for i, m in enumerate(members)}) for name, members in api.items() if isinstance(members, list)}
    return SimpleNamespace(__name__="tensorrt", __version__=version, **types, **enums)


def _with(thing, **values):
    for k, v in values.items():
        object.__setattr__(thing, k, v)
    return thing


class Cuda:
    "A stand-in for libcuda.so.1 of a Jetson Orin Nano: what the driver's API answers to who asks for the device. `code`: the error it answers with instead."

    def __init__(self, name="Orin", code=0):
        self.name, self.code = name, code

    def cuInit(self, flags):
        assert flags == 0
        return self.code

    def cuDeviceGet(self, device, ordinal):
        device._obj.value = ordinal
        return 0

    def cuDeviceGetName(self, name, length, device):
        name.value = self.name.encode()[: length - 1]
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = {75: 8, 76: 7, 18: 1}[attribute]
        return 0
