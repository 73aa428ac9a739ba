"""How a circuit is evaluated: one file a backend."""

from qconv.backends.jobs import JobFailed
from qconv.backends.loading import backend_names, load_backend
from qconv.backends.protocol import Backend, Compiled, Unsupported

__all__ = ["Backend", "Compiled", "JobFailed", "Unsupported", "backend_names", "load_backend"]
