"""What the child process may use, and what onnxruntime's static quantizer is told."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# In the environment: from 1.29 on onnxruntime, and genai, report to their maker what they load.
NO_TELEMETRY = {"ORT_DISABLE_TELEMETRY": "1", "ORT_TELEMETRY_DISABLED": "1"}


@dataclass(frozen=True)
class Limits:
    """Time and memory that the child gets for one request, by the size of the model.

    Parameters
    ----------
    seconds : for one load or run, however small the model is
    bytes_per_second : of the model; so much more time it gets
    memory : bytes, however small the model is
    memory_per_byte : so many more for each byte of the model
    free_share : of the machine's free memory, which it never exceeds
    """

    seconds: float = 60.0
    bytes_per_second: float = 1e6
    memory: int = 4 << 30
    memory_per_byte: int = 8
    free_share: float = 0.8

    def seconds_for(self, size: int) -> float:
        """Seconds for a model of `size` bytes."""
        return self.seconds + size / self.bytes_per_second

    def memory_for(self, size: int) -> int:
        """Bytes of memory for a model of `size` bytes, on this machine as it is now."""
        memory = self.memory + self.memory_per_byte * size
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
        except OSError:
            return memory
        for line in lines:
            if line.startswith("MemAvailable"):
                free = int(line.split()[1]) << 10
                return min(memory, int(self.free_share * free))
        return memory


@dataclass(frozen=True)
class StaticQuantization:
    """What onnxruntime's static quantizer is told; weights become symmetric int8.

    Parameters
    ----------
    operators : kinds of nodes to quantize
    excluded_nodes : names of nodes that stay float
    activations : type of the activations: "int8", "uint8" or "int16"
    symmetric : with the zero_point of the activations in the middle of their range
    calibration : how their range is found: "minmax", "entropy" or "percentile"
    per_channel : one scale per channel of a weight instead of one per tensor
    """

    operators: Sequence[str]
    excluded_nodes: Sequence[str]
    activations: str
    symmetric: bool
    calibration: str
    per_channel: bool
