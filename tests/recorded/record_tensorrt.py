"""Record what TensorRT's Python bindings offer: `python record_tensorrt.py tensorrt_bindings > one.json`.

The bindings need libnvinfer, libnvinfer_plugin and libnvonnxparser to be imported, and nothing of them to be looked at: where those can't be had,
empty libraries of these names will do, with the few functions that `nm -D --undefined-only tensorrt.so` asks for. tensorrt.json was recorded so from
tensorrt-cu12-bindings 10.3.0, 10.16.1.11 and 11.4.0.106.
"""

import importlib
import json
import re
import sys

CLASSES = ["Builder", "INetworkDefinition", "ITensor", "IBuilderConfig", "IOptimizationProfile", "OnnxParser", "ParserError", "ILogger",
           "IProgressMonitor", "ITimingCache", "IHostMemory", "Runtime", "ICudaEngine", "Refitter", "OnnxParserRefitter"]
ENUMS = ["NetworkDefinitionCreationFlag", "BuilderFlag", "MemoryPoolType"]


def parameters(function) -> list[str]:
    "Their names, `=` behind those that may be left out; of an overloaded function those of the first."
    found = re.search(r"^\s*(?:1\. )?\w+\(self.*?\) -> ", function.__doc__ or "", re.M)
    flat = re.sub(r"<[^>]*>|\[[^\[\]]*\]|\[[^\[\]]*\[[^\]]*\][^\]]*\]", "_", found[0]) if found else ""
    return [name + default for name, default in re.findall(r", (\w+): [^,=)]+(=?)", flat)]


def members(kind) -> dict:
    "Methods with their parameters, properties with what may be done to them, values."
    found = {}
    for name in sorted(n for n in dir(kind) if not n.startswith("_") or n == "__init__"):
        member = getattr(kind, name)
        if kind.__name__ == "INetworkDefinition" and name.startswith("add_"):
            continue  # hundreds of layers that a parser adds
        if isinstance(member, property):
            found[name] = "read, write" if member.fset else "read"
        elif not isinstance(member, type):
            found[name] = parameters(member) if callable(member) else "value"
    return found


def record(trt) -> dict:
    return {**{c: members(getattr(trt, c)) for c in CLASSES}, **{e: list(getattr(trt, e).__members__) for e in ENUMS}}


if __name__ == "__main__":
    trt = importlib.import_module(sys.argv[1])
    print(json.dumps({trt.__version__: record(trt)}))
