"""pdm: predictive maintenance for rotating machines, from a notebook to the edge and back.

Handwritten (not exported from a notebook): the names that users call, loaded on first use (PEP 562), so that an edge
agent that imports `pdm` pays for nothing that it does not touch.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Bearing": "pdm.signal.kinematics",
    "Detector": "pdm.model.detector",
    "Verdict": "pdm.model.monitor",
    "check_sensor": "pdm.signal.sensor",
    "diagnose": "pdm.signal.diagnose",
    "fault_frequencies": "pdm.signal.kinematics",
}
__all__ = sorted(_WHERE)

if TYPE_CHECKING:
    from pdm.model.detector import Detector as Detector
    from pdm.model.monitor import Verdict as Verdict
    from pdm.signal.diagnose import diagnose as diagnose
    from pdm.signal.kinematics import Bearing as Bearing
    from pdm.signal.kinematics import fault_frequencies as fault_frequencies
    from pdm.signal.sensor import check_sensor as check_sensor


def _refuse_package_manager() -> None:
    "PyPI's `pdm` is a package manager whose modules would overwrite ours, or be overwritten by them."
    try:
        metadata.distribution("pdm")
    except metadata.PackageNotFoundError:
        return
    raise ImportError(
        "the package manager PDM is installed in this environment, and its import name is `pdm` too: "
        "give predmaint an environment of its own (python -m venv, then pip install predmaint), or pip uninstall pdm"
    )


_refuse_package_manager()


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pdm' has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
